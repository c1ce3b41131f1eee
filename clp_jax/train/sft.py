"""Supervised finetuning on a task's references: makes the reference policy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from clp_jax import config as config_lib
from clp_jax import run_folder, sharding
from clp_jax.data.vocabulary import load_vocabulary
from clp_jax.initial import Initial, load_initial
from clp_jax.masked import Mean, masked_sum
from clp_jax.models import t5
from clp_jax.train import checkpoints as checkpoints_lib
from clp_jax.train import loop
from clp_jax.train.data import train_batches
from clp_jax.train.state import (
  TrainState,
  init_state,
  make_optimizer,
  state_shardings,
)

Params = Any
# What of a config this stage depends on, and its config.json records.
SECTIONS = ("seed", "model", "data", "optimizer", "sft", "mesh")


def update(
  state: TrainState,
  encoder_input_tokens: jax.Array,
  decoder_target_tokens: jax.Array,
  *,
  model: t5.T5,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
  """One step on the mean cross-entropy of the target tokens.

  Args:
    state: before the update.
    encoder_input_tokens: [B, S] int32, 0 is padding.
    decoder_target_tokens: [B, T] int32, EOS included, 0 is padding.
    model: the T5; its dropout_rate is applied.
    optimizer: that made `state.opt_state`.

  Returns:
    (state after the update, metrics of the state before it; nats a token).
  """
  mask = decoder_target_tokens > 0
  tokens = mask.sum().astype(jnp.float32)
  dropout_key = jax.random.fold_in(state.key, state.step)

  def loss_fn(params):
    logits: jax.Array = model.apply(  # type: ignore[assignment]
      {"params": params},
      encoder_input_tokens,
      t5.shift_right(decoder_target_tokens),
      deterministic=model.config.dropout_rate == 0,
      rngs={"dropout": dropout_key},
    )
    logp = jnp.take_along_axis(
      jax.nn.log_softmax(logits), decoder_target_tokens[..., None], axis=-1
    )[..., 0]
    right = logits.argmax(-1) == decoder_target_tokens
    return -masked_sum(logp, mask) / tokens, masked_sum(right, mask)

  (loss, right), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  metrics = {
    "loss": loss,
    "accuracy": Mean(right.astype(jnp.float32), tokens),
    "gradient_norm": optax.global_norm(gradient),
  }
  new_state = dataclasses.replace(
    state,
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  return new_state, metrics


def train(config: ml_collections.ConfigDict, workdir: str) -> Initial:
  """Finetunes `model.init` on the task's references, or resumes doing so.

  Args:
    config: see config.py; reads SECTIONS.
    workdir: the folder of this run.

  Returns:
    The finetuned model.
  """
  own = ml_collections.ConfigDict({name: config[name] for name in SECTIONS})
  run_folder.start(workdir, own)
  if not run_folder.has_model(workdir):
    initial = load_initial(config)
    run_folder.save_model(
      workdir, initial.model_config, initial.vocabulary, initial.params
    )
  model_config = run_folder.load_model_config(workdir)
  vocabulary = load_vocabulary(run_folder.vocabulary_path(workdir))
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  settings = config.sft
  if settings.batch % mesh.shape["data"]:
    raise config_lib.ConfigError(
      f"sft.batch = {settings.batch} is not a multiple of the mesh's data "
      f"axis, {mesh.shape['data']}; change it or mesh.data."
    )
  optimizer = make_optimizer(
    name=config.optimizer.name,
    learning_rate=settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    decay_steps=settings.decay_steps,
    clip_norm=config.optimizer.clip_norm,
  )
  model = t5.T5(
    dataclasses.replace(model_config, dropout_rate=settings.dropout)
  )
  abstract = t5.abstract_params(model_config)
  params_at = sharding.param_shardings(
    mesh, t5.logical_axes(model_config), abstract, fsdp=config.mesh.fsdp
  )
  state_at = state_shardings(mesh, optimizer, abstract, params_at)
  rows, whole = sharding.row_sharding(mesh), sharding.replicated(mesh)
  init = jax.jit(
    lambda params, key: init_state(params, optimizer, key),
    in_shardings=(params_at, whole),
    out_shardings=state_at,
  )
  update_step = jax.jit(
    lambda state, inputs, targets: update(
      state, inputs, targets, model=model, optimizer=optimizer
    ),
    in_shardings=(state_at, rows, rows),
    out_shardings=(state_at, whole),
    donate_argnums=0,
  )
  start = run_folder.load_reference(
    workdir, checkpoints_lib.abstract_like(abstract, params_at)
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 0x5F7)

  def step_fn(state, step, batch, want_texts):
    state, metrics = update_step(
      state,
      sharding.to_devices(mesh, batch.encoder_input_tokens, settings.batch),
      sharding.to_devices(mesh, batch.decoder_target_tokens, settings.batch),
    )
    tokens = int((batch.decoder_target_tokens > 0).sum())
    return loop.Step(state, metrics, tokens=tokens * jax.process_count())

  state = loop.run(
    workdir,
    label="supervised finetuning",
    abstract_state=checkpoints_lib.abstract_like(
      jax.eval_shape(init, start, key), state_at
    ),
    start=lambda: init(start, key),
    batches_from=lambda first: train_batches(
      config, vocabulary, settings.batch, first
    ),
    step_fn=step_fn,
    steps=settings.steps,
    checkpoint_every=settings.checkpoint_every,
    keep=1,
    log_samples_every=max(settings.steps, 1),
  )
  return Initial(
    model_config, state.params, run_folder.load_vocabulary_bytes(workdir)
  )

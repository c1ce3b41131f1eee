"""Supervised finetuning on a task's references: makes the reference policy."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clp_jax import batches, build, keys, run_folder, sharding
from clp_jax.config import column
from clp_jax.errors import ConfigError
from clp_jax.initial import Initial, load_initial
from clp_jax.masked import Mean, masked_sum
from clp_jax.models import families
from clp_jax.models.model import Model
from clp_jax.prompting import Prompts
from clp_jax.train import loop, stage
from clp_jax.train.optimizer import stage_optimizer
from clp_jax.train.state import TrainState, apply_gradient, init_state

Params = Any
# What of a config this stage depends on, and its config.json records.
SECTIONS = ("seed", "model", "data", "optimizer", "sft", "mesh")


def _predict(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  decoder_target_tokens: jax.Array,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(their log-probability, how many are the likeliest, how many there are)."""
  logits, _ = model.score(
    params, encoder_input_tokens, decoder_target_tokens, dropout_key
  )
  mask = decoder_target_tokens != model.config.pad_id
  at = jnp.maximum(decoder_target_tokens, 0)[..., None]  # padding may be -1
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits), at, axis=-1)[..., 0]
  right = logits.argmax(-1) == decoder_target_tokens
  return masked_sum(logp, mask), masked_sum(right, mask), mask.sum()


def update(
  state: TrainState,
  encoder_input_tokens: jax.Array,
  decoder_target_tokens: jax.Array,
  *,
  model: Model,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
  """One step on the mean cross-entropy of the target tokens.

  Args:
    state: before the update.
    encoder_input_tokens: [B, S] int32, the model's pad_id is padding.
    decoder_target_tokens: [B, T] int32, EOS included.
    model: its dropout_rate is applied.
    optimizer: that made `state.opt_state`.

  Returns:
    (state after the update, metrics of the state before it; nats a token).
  """
  dropout_key = None
  if model.config.dropout_rate:
    dropout_key = jax.random.fold_in(state.key, state.step)

  def loss_fn(params):
    logp, right, tokens = _predict(
      model, params, encoder_input_tokens, decoder_target_tokens, dropout_key
    )
    tokens = tokens.astype(jnp.float32)
    return -logp / tokens, Mean(right.astype(jnp.float32), tokens)

  (loss, accuracy), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  state = apply_gradient(state, gradient, optimizer, state.step)
  return dataclasses.replace(state, step=state.step + 1), {
    "loss": loss,
    "accuracy": accuracy,
    "gradient_norm": optax.tree.norm(gradient),
  }


def make_programs(
  config: ml_collections.ConfigDict,
  model_config: families.Config,
  mesh: Mesh,
  prompts: Prompts | None = None,
) -> stage.Programs:
  """Builds the programs that a config describes, for a mesh.

  Args:
    config: see config.py; reads SECTIONS.
    model_config: of the model.
    mesh: from `build.make_mesh`.
    prompts: that prompting.sft_share of the documents get; None for none.

  Returns:
    The programs, not yet compiled; the update's data is (inputs, targets).
  """
  model = families.build(
    dataclasses.replace(model_config, dropout_rate=config.sft.dropout)
  )
  optimizer = stage_optimizer(config, config.sft, model.axes())
  distribution = build.distribution(config)

  def init(reference, key):
    return init_state(reference, optimizer, key)

  def sft_update(state, inputs, targets):
    if prompts is not None:
      key = jax.random.fold_in(
        jax.random.fold_in(state.key, keys.PROMPTS), state.step
      )
      inputs = prompts.prepend_to_some(
        inputs,
        key,
        distribution=distribution,
        share=config.prompting.sft_share,
      )
    return update(state, inputs, targets, model=model, optimizer=optimizer)

  rows = sharding.row_sharding(mesh)
  return stage.make_programs(
    mesh,
    model,
    init,
    sft_update,
    axes=model.axes(),
    data=(rows, rows),
    fsdp=config.mesh.fsdp,
  )


class HeldOut(NamedTuple):
  """How a model predicts the references of held-out documents."""

  loss: float  # nats a token
  accuracy: float  # of the likeliest token
  tokens: int
  documents: int


def held_out(
  config: ml_collections.ConfigDict, initial: Initial, vocabulary: Any
) -> HeldOut:
  """Evaluates a model on the first eval.prompts held-out documents.

  Args:
    config: see config.py; reads `data`, `eval`, `sft.batch` and `mesh`. Fewer
      documents than eval.prompts are taken as they are.
    initial: the model.
    vocabulary: its own, loaded.

  Raises:
    ConfigError: when there are no held-out documents.
  """
  count = min(batches.count_held_out(config, vocabulary), config.eval.prompts)
  batch = batches.eval_batch(config, vocabulary, count)
  mesh = build.make_mesh(config)
  model = families.build(initial.model_config)
  rows = sharding.row_sharding(mesh)

  @jax.jit
  def sums(params, inputs, targets):
    inputs, targets = jax.lax.with_sharding_constraint((inputs, targets), rows)
    return _predict(model, params, inputs, targets)

  size = config.sft.batch
  start, stop = sharding.process_rows(mesh, size)
  totals = np.zeros([3])
  for i in range(0, count, size):
    parts = []
    for tokens in (batch.encoder_input_tokens, batch.decoder_target_tokens):
      # Rows of padding: no mask.
      part = np.full([size, tokens.shape[1]], model.config.pad_id, np.int32)
      part[: len(tokens[i : i + size])] = tokens[i : i + size]
      parts.append(sharding.to_devices(mesh, part[start:stop], size))
    totals += np.asarray(jax.device_get(sums(initial.params, *parts)))
  logp, right, tokens = totals.tolist()
  return HeldOut(-logp / tokens, right / tokens, int(tokens), count)


def report_held_out(
  config: ml_collections.ConfigDict, workdir: str, initial: Initial
) -> HeldOut | None:
  """Writes DIR/evaluation/held_out.json of what `train` returned, see
  `held_out`; None without held-out documents."""
  if config.data.train is not None and config.data.eval is None:
    return None
  vocabulary = run_folder.load_tokenizer(workdir)
  report = held_out(config, initial, vocabulary)
  stage.write_report(workdir, "held_out", report._asdict())
  return report


def own_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """What of a config concerns this stage; its folder's config.json."""
  own = ml_collections.ConfigDict({name: config[name] for name in SECTIONS})
  if config.prompting.style != "none":  # it may be in the data and the model
    own.prompting = {
      **config.prompting,
      "objectives": config.objectives,
      "weightings": config.weightings,
    }
  return own


def train(config: ml_collections.ConfigDict, workdir: str) -> Initial:
  """Finetunes `model.init` on the task's references, or resumes doing so.

  Returns:
    The finetuned model.
  """
  if config.data.train is not None and column(config.data, "reference") is None:
    raise ConfigError(
      "data.reference_field is None, but supervised finetuning learns from "
      "references; name their field, or set sft.steps=0."
    )
  batches.check_data(config)
  stage.prepare(workdir, own_config(config), lambda: load_initial(config))
  model_config = run_folder.load_model_config(workdir)
  vocabulary = run_folder.load_tokenizer(workdir)
  batches.check_data(config, vocabulary)
  mesh = build.make_mesh(config)
  settings = config.sft
  build.check_rows("sft.batch", settings.batch, mesh)
  prompts = None
  if config.prompting.sft_share:
    prompts = build.prompts(config, vocabulary, model_config.vocab_size)
  programs = make_programs(config, model_config, mesh, prompts)

  def step_fn(state, step, batch, want_texts):
    state, metrics = programs.update(
      state,
      sharding.to_devices(mesh, batch.encoder_input_tokens, settings.batch),
      sharding.to_devices(mesh, batch.decoder_target_tokens, settings.batch),
    )
    targets = batch.decoder_target_tokens
    tokens = int((targets != model_config.pad_id).sum())
    tokens *= settings.batch // len(targets)
    metrics = {**metrics, "cut_inputs": batch.cut_share}
    return loop.Step(state, metrics, tokens=tokens)

  state = loop.run(
    workdir,
    programs,
    stage.load_reference(workdir, families.build(model_config), programs),
    jax.random.fold_in(jax.random.key(config.seed), keys.SUPERVISED),
    label="supervised finetuning",
    settings=settings,
    batches_from=lambda first: batches.train_batches(
      config, vocabulary, settings.batch, first, mesh
    ),
    step_fn=step_fn,
    wandb_project=config.wandb.project,
  )
  return Initial(model_config, state.params, vocabulary)

"""Trains a preference model from pairs of responses.

A step, on P pairs of a chosen and a rejected response to the same document:
1. score both with the model (rewards/preference.py);
2. the probability that the chosen one is preferred is sigmoid(score of the
   chosen - score of the rejected) (Bradley and Terry 1952);
3. one optimizer step on the mean of its negative logarithm.

Pairs are numbered as prompts are: batch k is a function of (file, seed, k).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clp_jax import build, keys, run_folder, sharding
from clp_jax.config import column
from clp_jax.data import jsonl
from clp_jax.data.reader import Numbering, own_numbers, text_of
from clp_jax.errors import ConfigError, as_config_error
from clp_jax.initial import load_initial
from clp_jax.masked import Mean, mean_of
from clp_jax.models import families
from clp_jax.models.model import Model
from clp_jax.rewards import model as models
from clp_jax.rewards import preference
from clp_jax.train import loop, stage
from clp_jax.train.optimizer import stage_optimizer
from clp_jax.train.state import TrainState, apply_gradient, init_state

# What of a config a reward model depends on, and its config.json records.
SECTIONS = ("seed", "model", "data", "optimizer", "reward_model", "mesh")


class Report(NamedTuple):
  """How a reward model does on held-out pairs."""

  accuracy: float  # share of pairs whose chosen response scores higher
  stderr: float
  loss: float  # Bradley-Terry, nats a pair; log 2 is chance
  pairs: int
  step: int


def update(
  state: TrainState,
  tokens: jax.Array,
  *,
  model: Model,
  token: int | None,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
  """One step on the Bradley-Terry loss.

  Args:
    state: before the update.
    tokens: [P, 2, S] int32, chosen first, 0 is padding.
    model: its dropout_rate is applied.
    token: whose logit is the score; None reads the head.
    optimizer: that made `state.opt_state`.

  Returns:
    (state after the update, metrics of the state before it; nats a pair).
  """
  rows = tokens.reshape(-1, tokens.shape[-1])
  dropout_key = None
  if model.config.dropout_rate:
    dropout_key = jax.random.fold_in(state.key, state.step)

  def loss_fn(params):
    scores = preference.score_rows(model, params, rows, token, dropout_key)
    scores = scores.reshape(-1, 2)
    margin = scores[:, 0] - scores[:, 1]
    return -jax.nn.log_sigmoid(margin).mean(), margin

  (loss, margin), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  state = apply_gradient(state, gradient, optimizer, state.step)
  return dataclasses.replace(state, step=state.step + 1), {
    "loss": loss,
    "accuracy": mean_of(_right(margin)),
    "margin": mean_of(margin),
    "gradient_norm": optax.tree.norm(gradient),
  }


def _right(margin):
  """1 where the chosen response scores higher, half where both score alike."""
  return (margin > 0) + 0.5 * (margin == 0)


def pair_batches(
  pairs: jsonl.Rows,
  inputs: models.Inputs,
  numbering: Numbering,
) -> Iterator[np.ndarray]:
  """This process's rows of global batches start, start + 1, ...

  Args:
    pairs: rows of (document, chosen, rejected).
    inputs: that tokenises them.
    numbering: of the batches, P pairs each; each epoch has its own order.

  Returns:
    An endless iterator over [p, 2, S] int32, chosen first.
  """
  numbers = own_numbers(len(pairs), numbering)
  return (tokenise(inputs, [pairs[i] for i in own]) for own in numbers)


def tokenise(inputs: models.Inputs, pairs: list[tuple[Any, ...]]) -> np.ndarray:
  """(document, chosen, rejected) to [P, 2, S] int32; of a conversation the text
  that a reward is given of one."""
  tokens, _ = inputs(
    [text_of(document) for document, _, _ in pairs for _ in range(2)],
    [response for _, *both in pairs for response in both],
  )
  return tokens.reshape(len(pairs), 2, inputs.length)


def make_programs(
  config: ml_collections.ConfigDict,
  model_config: families.Config,
  mesh: Mesh,
  token: int | None,
) -> stage.Programs:
  """Builds the programs that a config describes, as `sft.make_programs` does.

  Args:
    config, model_config, mesh: as there; reads this file's SECTIONS.
    token: whose logit is the score; None for a linear head.
  """
  settings = config.reward_model
  model = families.build(
    dataclasses.replace(model_config, dropout_rate=settings.dropout)
  )
  axes = preference.logical_axes(model_config, settings.head)
  optimizer = stage_optimizer(config, settings, axes)

  def init(reference, key):
    params = {"t5": reference}
    if settings.head == "linear":
      # From zero, all responses score alike and the loss is log 2.
      params["head"] = jnp.zeros([model_config.emb_dim], jnp.float32)
    # It starts at 0, and the states that it reads are normalised.
    floors = {("head",): jnp.asarray(model_config.emb_dim**-0.5)}
    return init_state(params, optimizer, key, floors=floors)

  def update_step(state, tokens):
    return update(state, tokens, model=model, token=token, optimizer=optimizer)

  return stage.make_programs(
    mesh,
    model,
    init,
    update_step,
    axes=axes,
    data=(sharding.row_sharding(mesh),),
    fsdp=config.mesh.fsdp,
  )


def train(config: ml_collections.ConfigDict, workdir: str) -> Report:
  """Trains `model.init` on pairs, or resumes doing so, and evaluates it.

  Args:
    config: see config.py; reads SECTIONS.
    workdir: the folder of this run.

  Returns:
    Held-out accuracy and loss, which DIR/evaluation/accuracy.json has too.

  Raises:
    ConfigError, RunError: what a user can cause.
    Preempted: after SIGTERM.
  """
  settings = config.reward_model
  if settings.steps < 1:
    raise ConfigError(
      "reward_model.steps is 0: nothing would be trained; set it."
    )
  training, held_out = load_pairs(config)
  mesh = build.make_mesh(config)
  build.check_rows("reward_model.batch", settings.batch, mesh)
  own = ml_collections.ConfigDict({name: config[name] for name in SECTIONS})
  stage.prepare(workdir, own, lambda: load_initial(config))
  model_config = run_folder.load_model_config(workdir)
  vocabulary = run_folder.load_tokenizer(workdir)
  with as_config_error():
    inputs = models.Inputs(
      vocabulary, settings.template, config.data.source_length, overlap=None
    )
    token = None
    if settings.head == "token":
      token = models.token_of(vocabulary, settings.token)
  programs = make_programs(config, model_config, mesh, token)
  share = sharding.process_share(mesh, settings.batch)
  model = families.build(model_config)

  def step_fn(state, step, batch, want_texts):
    state, metrics = programs.update(
      state, sharding.to_devices(mesh, batch, settings.batch)
    )
    tokens = int((batch != model_config.pad_id).sum()) * share[1]
    return loop.Step(state, metrics, tokens=tokens)

  state = loop.run(
    workdir,
    programs,
    stage.load_reference(workdir, model, programs),
    jax.random.fold_in(jax.random.key(config.seed), keys.REWARD_MODEL),
    label="train reward model",
    settings=settings,
    batches_from=lambda first: pair_batches(
      training,
      inputs,
      Numbering(settings.batch, config.seed, first, *share),
    ),
    step_fn=step_fn,
    wandb_project=config.wandb.project,
  )
  scorer = models.make_scorer(
    lambda params, rows: preference.score_rows(model, params, rows, token),
    state.params,
    mesh,
    2 * settings.batch,
  )
  report = evaluate(held_out, inputs, scorer, int(state.step), share)
  stage.write_report(workdir, "accuracy", report._asdict())
  return report


def load_pairs(
  config: ml_collections.ConfigDict,
) -> tuple[jsonl.Rows, jsonl.Rows]:
  """(training, held-out) rows of (document, chosen, rejected).

  Raises:
    ConfigError: when a file is missing or a line of it is not a pair.
  """
  data = config.data
  fields = tuple(column(data, x) for x in ("document", "chosen", "rejected"))
  for name in ("train", "eval"):
    if data[name] is None:
      raise ConfigError(
        f"data.{name} is not set; give a JSONL file of pairs: objects with "
        f'"{fields[0]}", "{fields[1]}" and "{fields[2]}".'
      )
  with as_config_error():
    return (
      jsonl.read_rows(data.train, fields, conversations=True),
      jsonl.read_rows(data.eval, fields, conversations=True),
    )


def evaluate(
  pairs: jsonl.Rows,
  inputs: models.Inputs,
  scorer: Any,
  step: int,
  share: tuple[int, int],
) -> Report:
  """Compares the scores of chosen and rejected responses.

  Args:
    pairs: rows of (document, chosen, rejected).
    inputs: that tokenises them.
    scorer: from `rewards.model.make_scorer`.
    step: updates that the model has seen.
    share: (part, parts): which part of the pairs this process scores.

  Returns:
    The report, the same on every process.
  """
  part, parts = share
  chunk = 1024  # texts in memory at once
  sums = np.zeros([3])
  own = range(part, len(pairs), parts)
  # As many calls on every process, though one may have a pair less.
  for i in range(0, -(-len(pairs) // parts), chunk):
    some = [pairs[k] for k in own[i : i + chunk]]
    tokens = tokenise(inputs, some)
    scores = scorer(tokens.reshape(-1, inputs.length)).reshape(-1, 2)
    margin = (scores[:, 0] - scores[:, 1]).astype(np.float64)
    losses = np.logaddexp(0, -margin)
    sums += [_right(margin).sum(), losses.sum(), len(some)]
  if jax.process_count() > 1:
    # As many processes have scored each part: the model axis may span some.
    sums = np.asarray(multihost_utils.process_allgather(sums)).sum(0)
    sums *= parts / jax.process_count()
  right, loss, count = sums.tolist()
  accuracy = right / count
  return Report(
    accuracy=accuracy,
    stderr=(accuracy * (1 - accuracy) / count) ** 0.5,
    loss=loss / count,
    pairs=int(count),
    step=step,
  )

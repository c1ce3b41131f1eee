"""The loop that every stage of training shares.

Restores, then steps until done: update, write metrics, checkpoint, listen for
SIGTERM. What a step does is the caller's.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from clp_jax import distributed, progress, run_folder
from clp_jax.errors import Preempted, RewardError, RunError
from clp_jax.masked import Mean
from clp_jax.train.checkpoints import Checkpoints
from clp_jax.train.metrics import MetricsWriter
from clp_jax.train.stage import Params, Programs
from clp_jax.train.state import TrainState


class Step(NamedTuple):
  """What one step gives back."""

  state: TrainState
  metrics: Mapping[str, Mean | jax.Array | float]
  tokens: int  # that the step has worked on, for the rate
  texts: dict[str, str] | None = None  # to look at, when they were asked for


def run(
  workdir: str,
  programs: Programs,
  reference: Params,
  key: jax.Array,
  *,
  label: str,
  settings: ml_collections.ConfigDict,
  batches_from: Callable[[int], Iterator[Any]],
  step_fn: Callable[[TrainState, int, Any, bool], Step],
  before: Callable[[TrainState], TrainState] = lambda state: state,
  keep: int = 1,
  log_samples_every: int = 1,
  wandb_project: str | None = None,
) -> TrainState:
  """Trains to `steps` updates, from the newest checkpoint if there is one.

  Args:
    workdir: the run's folder.
    programs: of the stage; its init makes the state.
    reference: that the run starts from.
    key: the run's.
    label: what the progress bar says.
    settings: `steps`, updates in all, and `checkpoint_every`, updates between
      checkpoints; the last is always saved, the start where `steps` is 0.
    batches_from: data from a numbered batch on.
    step_fn: (state, step, batch, want_texts) -> Step; may donate the state.
    before: what is done to a new state before the first update.
    keep: newest checkpoints that are kept.
    log_samples_every: updates between texts.
    wandb_project: of Weights & Biases, that is to have the metrics too.

  Returns:
    The state after `steps` updates.

  Raises:
    Preempted: after SIGTERM, once everything is saved.
    RewardError: when a reward fails, once the steps before are saved.
    RunError: when the loss or the gradient is not finite, a checkpoint can't
      be read or written, or another process trains here; what was saved
      before stays.
  """
  steps = settings.steps
  abstract = programs.abstract_state(reference, key)
  with (
    run_folder.alone(workdir),
    Checkpoints(workdir, keep) as checkpoints,
    distributed.StopSignal().listen() as stopping,
  ):
    restored = checkpoints.restore(abstract)
    state, consumed = restored or (before(programs.init(reference, key)), 0)
    step = int(state.step)
    if step >= steps:
      if restored is None:  # 0 steps: the start is the result
        checkpoints.save(state, consumed)
      return state
    batches = batches_from(consumed)
    pending: tuple[int, Step, float] | None = None
    failed: RewardError | None = None
    with (
      MetricsWriter(workdir, step, wandb_project) as writer,
      progress.track(
        steps, label, start=step, shown=distributed.is_first()
      ) as advance,
    ):
      clock = time.perf_counter()
      while step < steps and not stopping:
        stopping.ask()
        wants_texts = (step + 1) % log_samples_every == 0
        try:
          result = step_fn(state, step, next(batches), wants_texts)
        except RewardError as error:
          failed = error
          break
        state, step, consumed = result.state, step + 1, consumed + 1
        # Metrics are read one step late, when the device has finished them.
        if pending is not None:
          advance(1, _write(writer, *pending))
        now = time.perf_counter()
        pending, clock = (step, result, now - clock), now
        if step % settings.checkpoint_every == 0 or step == steps:
          # Their check comes first: a state gone wrong must not be saved.
          advance(1, _write(writer, *pending))
          pending = None
          writer.flush()
          checkpoints.save(state, consumed)
      if pending is not None:
        advance(1, _write(writer, *pending))
    if step < steps:
      checkpoints.save(state, consumed)
      checkpoints.wait()
      raise _why_stopped(step, steps, failed) from failed
    return state


def _why_stopped(
  step: int, steps: int, failed: RewardError | None
) -> Exception:
  if failed is not None:
    return RewardError(
      f"{failed} What came before is saved: the same command goes on from step "
      f"{step}."
    )
  return Preempted(
    f"stopped by SIGTERM after {step} of {steps} steps, all saved; start the "
    "same command again to go on."
  )


def _write(
  writer: MetricsWriter, step: int, result: Step, seconds: float
) -> dict[str, float]:
  values = {}
  for name, metric in jax.device_get(result.metrics).items():
    if isinstance(metric, Mean):
      metric = metric.sum / np.maximum(metric.count, 1)
    values[name] = float(metric)
  for name in ("loss", "gradient_norm", "critic/loss"):
    if not np.isfinite(values.get(name, 0)):
      raise RunError(
        f"{name} is {values[name]} at step {step}; lower the learning rate, "
        "then start again in a new --workdir or from an older checkpoint."
      )
  values["perf/steps_per_second"] = 1 / seconds
  values["perf/tokens_per_second"] = result.tokens / seconds
  writer.write(step, values)
  if result.texts:
    writer.write_texts(step, result.texts)
  if not values.get("cut_inputs"):  # the line on the screen is long enough
    values.pop("cut_inputs", None)
  return values

"""Checkpoints of a run over Orbax: DIR/checkpoints/<step>/.

A step holds two trees and a note, each restorable alone:
  params   the parameter sets and the shared parameters
  train    optimizer state, step, the run's key, reward statistics, and where
           there are some, the critic, the estimate of the front and responses
           that were sampled ahead
  data     JSON: how many batches the data iterator has given, and LAYOUT
Saving is asynchronous; Orbax renames a finished step into place, so that a
step that was interrupted is never picked up.
"""

import json
import logging
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from clp_jax import distributed, run_folder
from clp_jax.errors import RunError
from clp_jax.saved_params import one_line
from clp_jax.train.optimizer import is_adafactor
from clp_jax.train.state import TrainState

Tree = Any

# Of Adafactor's state; 1, of steps that do not say: one scale for all sets.
LAYOUT = 2


class Checkpoints:
  """Owner of a run's checkpoints while it trains."""

  def __init__(self, workdir: str, keep: int):
    """Opens DIR/checkpoints, keeping the `keep` newest steps.

    Raises:
      RunError: when there can't be such a folder.
    """
    self.directory = run_folder.folder(workdir) / "checkpoints"
    try:
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=ocp.checkpoint_managers.LatestN(keep),
          enable_async_checkpointing=True,
          async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
        ),
      )
    except OSError as error:
      raise self._cannot_save(error) from error

  def save(self, state: TrainState, batches: int) -> None:
    """Starts to save a step, and how many batches of data it has consumed; a
    step that is already saved is left alone.

    Raises:
      RunError: when this or the save before it can't be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    params, train = _split(state)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(params),
          train=ocp.args.StandardSave(train),
          data=ocp.args.JsonSave({"batches": batches, "layout": LAYOUT}),
        ),
        force=True,
      )
    except Exception as error:  # a full disk surfaces as many types
      raise self._cannot_save(error) from error

  def restore(
    self, abstract_state: TrainState
  ) -> tuple[TrainState, int] | None:
    """The newest step that can be read, or None when there is none.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.

    Returns:
      (state, batches of data it has consumed).

    Raises:
      RunError: when there are steps and none of them can be read, or the newest
        has an older layout of Adafactor's state.
    """
    failed = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      if is_adafactor(abstract_state.opt_state):
        self._check_layout(step)
      # Each process reads by itself, and then all go by the one that could not:
      # inside Orbax the others would wait for it for ever.
      reason = "another process can't read it"
      try:
        restored = self._read(step, abstract_state)
      except Exception as error:  # Orbax raises many types for a bad file
        restored, reason = None, one_line(error)
      if not distributed.all_agree(restored is not None) or restored is None:
        logging.warning(
          "checkpoint %d in %s can't be read, trying the one before: %s",
          step,
          self.directory,
          reason,
        )
        failed.append((step, reason))
        continue
      for bad, _ in failed:
        self._set_aside(bad)
      return restored
    if failed:
      step, reason = failed[0]
      raise RunError(
        f"no checkpoint in {self.directory} can be read; the newest, {step}, "
        f"says: {reason}. Move the folder away to start anew, or "
        "restore it from a copy."
      )
    return None

  def _check_layout(self, step: int) -> None:
    file = self.directory / str(step) / "data" / "metadata"
    try:
      layout = json.loads(file.read_text()).get("layout", 1)
    except (OSError, ValueError):
      return  # reading the step will say what is wrong
    if layout != LAYOUT:
      raise RunError(
        f"checkpoint {step} in {self.directory} has Adafactor's state in an "
        "older layout, one scale for all parameter sets and layers, and can't "
        "be trained on; start again in a new --workdir. Evaluating, steering "
        "and exporting it work as before."
      )

  def _read(
    self, step: int, abstract_state: TrainState
  ) -> tuple[TrainState, int]:
    """`restore` of one step, without a word to other processes."""
    params, train = _split(abstract_state)
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    with ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        enable_async_checkpointing=False,
        multiprocessing_options=alone,
      ),
    ) as manager:
      item = manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(params),
          train=ocp.args.StandardRestore(train),
          data=ocp.args.JsonRestore(),
        ),
      )
    return TrainState(params=item.params, **item.train), item.data["batches"]

  def wait(self) -> None:
    """Waits until all that was saved is on disk.

    Raises:
      RunError: when it could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._cannot_save(error) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    """Waits for what is being saved, then releases Orbax's threads."""
    try:
      self._manager.wait_until_finished()
    except Exception as failure:
      if error is None:  # else the first error is the one to report
        raise self._cannot_save(failure) from failure
    finally:
      self._manager.close()

  def _set_aside(self, step: int) -> None:
    """Moves a step out of the way of saving it again.

    Not deleted: what failed may have been the reading and not the step.
    """
    if jax.process_index() == 0:
      aside = self.directory.parent / "unreadable"
      aside.mkdir(exist_ok=True)
      target = aside / str(step)
      if target.exists():
        target.rmtree()
      (self.directory / str(step)).rename(target)
    multihost_utils.sync_global_devices("set aside")
    self._manager.reload()

  def _cannot_save(self, error: Exception) -> RunError:
    return RunError(
      f"can't save to {self.directory}: {one_line(error)}. Free space or make "
      "it writable, then start the same command again: it resumes from the "
      "newest complete checkpoint."
    )


def _meet(*, key: str, timeout_ms: int) -> None:
  """Waits for the job's other processes, unless this one has failed.

  Orbax meets them after a failed save too. They wait elsewhere, for this very
  save, so that all would sit for 20 minutes and then tell of the waiting.

  Raises:
    Exception: that which is being handled, when there is one.
  """
  failure = sys.exc_info()[1]
  if failure is not None:
    raise failure
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _split(state: TrainState) -> tuple[Tree, Tree]:
  train = {
    "step": state.step,
    "opt_state": state.opt_state,
    "key": state.key,
    "reward_stats": state.reward_stats,
  }
  # Runs without them have the same files as before there were any.
  for name in ("critic", "front", "pending"):
    if getattr(state, name) is not None:
      train[name] = getattr(state, name)
  return state.params, train

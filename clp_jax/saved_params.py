"""What a run's checkpoints hold, without the state of training: over Orbax.

train/checkpoints.py writes them and resumes from them.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from clp_jax import run_folder
from clp_jax.errors import RunError
from clp_jax.rewards.normalisation import RewardStats

Tree = Any

# Every replica of an array writes a part of it, and to cut it Orbax compiles a
# program for each shape and device: seconds, for leaves that take none. Orbax
# has an option for it, but none of the ways to pass it keeps the rest of the
# handler that it has made; a release that renames this is only slower.
_handler: Any = ocp.type_handlers.get_type_handler(jax.Array)
_handler._min_slice_bytes_for_replica_parallel = 1 << 20


def newest_step(workdir: str) -> int | None:
  """The newest step that a run has saved; None without any."""
  directory = run_folder.folder(workdir) / "checkpoints"
  if not directory.exists():
    return None
  manager = ocp.CheckpointManager(
    directory, options=ocp.CheckpointManagerOptions(read_only=True)
  )
  step = manager.latest_step()
  manager.close()
  return step


def load_params(
  workdir: str, abstract: Tree, step: int | None = None
) -> tuple[Tree, int]:
  """The parameters of a step, without optimizer state.

  Args:
    workdir: the run's folder.
    abstract: shapes, dtypes and shardings; leaves without a sharding are
      restored whole, as NumPy arrays.
    step: None takes the newest.

  Returns:
    (params, step).

  Raises:
    RunError: when there is no such step or it can't be read.
  """
  directory = run_folder.folder(workdir) / "checkpoints"
  if not directory.exists():
    raise RunError(
      f"{workdir} holds no checkpoints; let `clp train` run to its first one."
    )
  target = jax.tree.map(
    lambda x: np.empty(x.shape, x.dtype) if x.sharding is None else x, abstract
  )
  manager = ocp.CheckpointManager(
    directory, options=ocp.CheckpointManagerOptions(read_only=True)
  )
  steps = sorted(manager.all_steps())
  if not steps:
    raise RunError(
      f"{directory} holds no complete checkpoint; let `clp train` run to its "
      "first one."
    )
  step = steps[-1] if step is None else step
  if step not in steps:
    raise RunError(
      f"{directory} has no step {step}; it has {', '.join(map(str, steps))}."
    )
  try:
    _check_shapes(directory / str(step) / "params", target)
    restored = manager.restore(
      step,
      args=ocp.args.Composite(params=ocp.args.StandardRestore(target)),
    )
  except RunError:
    raise
  except Exception as error:  # Orbax raises many types for a bad file
    raise RunError(
      f"checkpoint {step} in {directory} can't be read: {one_line(error)}. "
      "Choose another --step, or remove that step's folder and let "
      "`clp train` resume."
    ) from error
  finally:
    manager.close()
  return restored.params, step


def _check_shapes(directory, expected: Tree) -> None:
  """Names the first leaf whose saved shape is another than the expected one.

  Raises:
    RunError: with both shapes. Orbax says less, and after reading much.
  """
  with ocp.StandardCheckpointer() as checkpointer:
    saved = dict(_paths(checkpointer.metadata(directory).item_metadata.tree))
  for name, leaf in _paths(expected):
    found = saved.get(name)
    if found is None or tuple(found.shape) != tuple(leaf.shape):
      raise RunError(
        f"{directory} holds "
        + ("no " if found is None else f"{tuple(found.shape)} for ")
        + f"{name}, and the run's model needs shape {tuple(leaf.shape)}; the "
        "checkpoint and model.json are of different models: restore the one "
        "that was changed."
      )


def _paths(tree: Tree) -> list[tuple[str, Any]]:
  """(path with slashes, leaf) of a tree's leaves."""
  return [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def abstract_like(shapes: Tree, shardings: Tree) -> Tree:
  """ShapeDtypeStructs with shardings: what `restore` needs to know."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def load_reward_stats(
  workdir: str, step: int, num_rewards: int
) -> RewardStats | None:
  """The moments of the m rewards at a saved step, without the rest of its
  state: NumPy arrays, [m] float32; None where nothing was trained.

  Raises:
    RunError: when it can't be read.
  """
  path = run_folder.folder(workdir) / "checkpoints" / str(step) / "train"
  if not path.exists():
    return None
  names = [field.name for field in dataclasses.fields(RewardStats)]
  shapes = {n: np.zeros(num_rewards, np.float32) for n in names}
  arrays = {n: ocp.RestoreArgs(restore_type=np.ndarray) for n in names}
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      restored = reader.restore(
        path,
        args=ocp.args.PyTreeRestore(
          item={"reward_stats": shapes},
          restore_args={"reward_stats": arrays},
          partial_restore=True,
        ),
      )
  except Exception as error:  # Orbax raises many types for a bad file
    raise RunError(
      f"the rewards' moments in {path} can't be read: {one_line(error)}."
    ) from error
  return RewardStats(**restored["reward_stats"])


def save_params(workdir: str, step: int, params: Tree) -> None:
  """Saves parameter sets that were not trained here (Rewarded Soups)."""
  manager = ocp.CheckpointManager(run_folder.folder(workdir) / "checkpoints")
  manager.save(
    step, args=ocp.args.Composite(params=ocp.args.StandardSave(params))
  )
  manager.close()


def one_line(error: BaseException) -> str:
  """An error's type and the start of its text, on one line."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}"

"""The units of a front: those in which its rewards were optimised.

A reward that training normalised has arbitrary zero and scale; what a weighting
means, and hypervolume, spread, utility and value with it, is in units of the
normalised one: deviations from the mean, of the reference policy's scores where
it is "fixed". The run's checkpoint has the moments; those of a soup's parts are
in its parts.json.
"""

import json
from typing import NamedTuple

import ml_collections
import numpy as np
from numpy.typing import NDArray

from clp_jax import run_folder, saved_params
from clp_jax.errors import ConfigError

# Default of a normalised objective in the reference point: so many deviations
# below the mean.
BELOW = -3.0


class Units(NamedTuple):
  """Of m objectives: optimised = (raw - mean) / deviation."""

  names: tuple[str, ...]  # of the normalised ones
  mean: NDArray[np.float64]  # [m]; 0 where raw is what was optimised
  deviation: NDArray[np.float64]  # [m]; 1 there

  def of(self, raw: NDArray) -> NDArray[np.float32]:
    """[..., m] raw scores in these units."""
    return ((raw - self.mean) / self.deviation).astype(np.float32)


def units_of(
  config: ml_collections.ConfigDict, workdir: str, step: int
) -> Units:
  """The units of the front of a run's policy at a step.

  Raises:
    ConfigError: a reward is normalised, the folder has no moments of it, and
      there is no eval.reference_point in raw units.
  """
  objectives = tuple(config.objectives)
  asked = [n for n in objectives if config.rewards[n].normalise != "none"]
  mean, deviation = np.zeros(len(objectives)), np.ones(len(objectives))
  if not asked:
    return Units((), mean, deviation)
  found = _moments(workdir, step, objectives)
  missing = [name for name in asked if name not in found]
  if missing and config.eval.reference_point is None:
    raise ConfigError(
      f"rewards.{missing[0]}.normalise = "
      f"{config.rewards[missing[0]].normalise}, but {workdir} has no moments "
      "of it, so that its front is in raw scores, whose zero means nothing; "
      "give eval.reference_point, one value an objective."
    )
  names = tuple(name for name in asked if name in found)
  for name in names:
    i = objectives.index(name)
    mean[i], deviation[i] = found[name]
  return Units(names, mean, deviation)


def reference_point(
  config: ml_collections.ConfigDict,
) -> tuple[float, ...]:
  """The config's, or BELOW for normalised objectives and 0 for others."""
  point = config.eval.reference_point
  if point is not None:
    return tuple(point)
  return tuple(
    0.0 if config.rewards[name].normalise == "none" else BELOW
    for name in config.objectives
  )


def _moments(
  workdir: str, step: int, objectives: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
  """Objective -> (mean, deviation), of those that have some."""
  file = run_folder.folder(workdir) / run_folder.PARTS
  if file.exists():
    parts = json.loads(file.read_text())
    return {
      part["part"]: tuple(part["moments"])
      for part in parts
      if part.get("moments")
    }
  stats = saved_params.load_reward_stats(workdir, step, len(objectives))
  if stats is None:
    return {}
  deviations = np.asarray(stats.deviation())
  return {
    name: (float(stats.mean[i]), float(deviations[i]))
    for i, name in enumerate(objectives)
    if stats.count[i] > 0
  }

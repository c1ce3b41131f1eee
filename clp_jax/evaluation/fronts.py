"""What a set of points says about a policy: front quality and steerability.

A front is measured at P weightings; point p has rewards [m], each to be
maximised, and the weights [m] that it was asked for. Two questions, kept apart:
how good the points are (`non_dominated`, `hypervolume`, `igd_plus`,
`expected_utility`, `dominated_share`) and whether the weights steer (`spread`,
`monotonicity`). Exact non-dominated filtering and hypervolume are moocore's.
NumPy only: nothing here runs on a device.
"""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(rewards: ArrayLike) -> NDArray[np.bool_]:
  """Which points no other point of the set dominates.

  One point dominates another where it is at least as good in every reward and
  better in one. Equal points do not dominate each other: all copies of a
  non-dominated point are non-dominated.

  Args:
    rewards: [P, m] float, larger is better, P >= 1.

  Returns:
    [P] bool.

  Raises:
    ValueError: not a non-empty [P, m] array, or a value that is not finite.
  """
  rewards = _matrix("rewards", rewards)
  if rewards.shape[1] == 1:
    return rewards[:, 0] == np.max(rewards)
  return moocore.is_nondominated(rewards, maximise=True, keep_weakly=True)


def hypervolume(rewards: ArrayLike, reference_point: ArrayLike) -> float:
  """Volume that the points dominate above the reference point.

  A point that does not exceed the reference point in every reward adds nothing.

  Args:
    rewards: [P, m] float, larger is better, P >= 1.
    reference_point: [m] float, in the units of the rewards.

  Returns:
    Volume in the product of the rewards' units, >= 0.

  Raises:
    ValueError: wrong shapes, or a value that is not finite.
  """
  rewards = _matrix("rewards", rewards)
  reference_point = np.asarray(reference_point, np.float64)
  if reference_point.shape != rewards.shape[1:]:
    raise ValueError(
      f"reference_point must have shape {rewards.shape[1:]}, one value for "
      f"each of the rewards, and has shape {reference_point.shape}."
    )
  _require_finite("reference_point", reference_point)
  counted = rewards[np.all(rewards > reference_point, axis=1)]
  if not counted.size:
    return 0.0
  if rewards.shape[1] == 1:
    return float(np.max(counted) - reference_point[0])
  return float(moocore.hypervolume(counted, ref=reference_point, maximise=True))


def hypervolumes(
  fronts: NDArray[np.float64], reference_point: ArrayLike
) -> NDArray[np.float64]:
  """`hypervolume` of many fronts [..., P, m], unchecked: [...] float64; those
  of two rewards at once."""
  if fronts.shape[-1] != 2:
    flat = fronts.reshape(-1, *fronts.shape[-2:])
    found = [hypervolume(front, reference_point) for front in flat]
    return np.reshape(found, fronts.shape[:-2])
  sides = np.maximum(fronts - np.asarray(reference_point), 0)
  # From the widest box to the narrowest, each adds what is above the others.
  order = np.argsort(-sides[..., 0], axis=-1)
  sides = np.take_along_axis(sides, order[..., None], axis=-2)
  heights = np.maximum.accumulate(sides[..., 1], axis=-1)
  widths = -np.diff(sides[..., 0], append=0, axis=-1)
  return (widths * heights).sum(axis=-1)


def spread(rewards: ArrayLike) -> float:
  """Diameter of the sweep: the largest distance between two of its points.

  Euclidean, in reward space, over all points, dominated ones too: it asks how
  far the weights move the policy, not whether the points are good.

  Args:
    rewards: [P, m] float, P >= 1.

  Returns:
    Distance in the rewards' units, >= 0; 0 for one point.

  Raises:
    ValueError: not a non-empty [P, m] array, or a value that is not finite.
  """
  rewards = _matrix("rewards", rewards)
  differences = rewards[:, None, :] - rewards[None, :, :]
  return float(np.max(np.linalg.norm(differences, axis=2)))


def monotonicity(weights: ArrayLike, rewards: ArrayLike) -> NDArray[np.float64]:
  """Spearman's rank correlation of each reward with its own weight.

  1 where a larger w_i always means a larger reward i. Ties share their mean
  rank. A reward (or weight) that never changes has no rank order: NaN, which
  is not 0.

  Args:
    weights: [P, m] float.
    rewards: [P, m] float, P >= 2.

  Returns:
    [m] float64 in [-1, 1], or NaN as said.

  Raises:
    ValueError: shapes that differ, fewer than 2 points, or a value that is not
      finite.
  """
  weights, rewards = _pair(weights, rewards)
  if len(rewards) < 2:
    raise ValueError("A rank correlation needs 2 points or more; there is 1.")
  pairs = zip(weights.T, rewards.T, strict=True)
  return np.array([float(rank_correlations(w, r)) for w, r in pairs])


def rank_correlations(
  x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
  """Spearman's rank correlation of x [P] with every row of y [..., P].

  [...] float64 in [-1, 1], NaN where x or a row never changes; without checks.
  """
  x_ranks, y_ranks = centred_ranks(x), centred_ranks(y)
  scale = np.sqrt((x_ranks**2).sum() * (y_ranks**2).sum(axis=-1))
  defined = scale > 0
  found = (y_ranks @ x_ranks) / np.where(defined, scale, 1.0)
  return np.where(defined, np.clip(found, -1, 1), np.nan)


def centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
  """[..., P] ranks about their mean; equal values share theirs."""
  from scipy import stats  # late: importing it takes most of a second

  return stats.rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2


def expected_utility(weights: ArrayLike, rewards: ArrayLike) -> float:
  """Mean over the points of sum_i w_i r_i, each at its own weights.

  Of weights and rewards [P, m] float, P >= 1, in the rewards' units. Raises
  ValueError for shapes that differ, or a value that is not finite.
  """
  weights, rewards = _pair(weights, rewards)
  return float(np.sum(weights * rewards, axis=1).mean())


def dominated_share(a: ArrayLike, b: ArrayLike) -> float:
  """Share of b's points [Q, m] that a point of a [P, m] beats in every reward.

  Larger rewards are better.

  Raises:
    ValueError: wrong shapes, an empty one, or a value that is not finite.
  """
  a, b = _matrix("a", a), _matrix("b", b)
  if a.shape[1] != b.shape[1]:
    raise ValueError(
      f"a has {a.shape[1]} rewards and b has {b.shape[1]}; fronts are compared "
      "on the same rewards."
    )
  beaten = np.all(a[:, None, :] > b[None, :, :], axis=2)
  return float(beaten.any(axis=0).mean())


def igd_plus(
  fronts: Sequence[NDArray[np.float64]],
) -> NDArray[np.float64]:
  """How far each front falls short of the best points of all (IGD+).

  Mean over the non-dominated of all fronts' points of the Euclidean distance to
  the nearest point of the front, in which only those rewards count in which the
  front's is worse. Without checks; of many draws, each by itself.

  Args:
    fronts: of each [draws, P, m] float64, larger is better, P >= 1.

  Returns:
    [fronts, draws] float64, >= 0, lower is better; 0 where a front has all of
    the best points.
  """
  turned = [np.ascontiguousarray(front.T) for front in fronts]  # [m, P, draws]
  pooled = np.concatenate(turned, axis=1)
  best = np.ones(pooled.shape[1:], np.bool_)
  for point in pooled.swapaxes(0, 1):
    other = point[:, None]
    best &= (other < pooled).any(axis=0) | (other <= pooled).all(axis=0)
  found = []
  for front in turned:
    nearest = np.full(best.shape, np.inf)  # squares
    for point in front.swapaxes(0, 1):
      short = np.maximum(pooled - point[:, None], 0)
      np.minimum(nearest, (short**2).sum(axis=0), out=nearest)
    found.append((np.sqrt(nearest) * best).sum(axis=0) / best.sum(axis=0))
  return np.stack(found)


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float64]:
  """values as a finite, non-empty [P, m] array of float64."""
  array = np.asarray(values, np.float64)
  if array.ndim != 2 or 0 in array.shape:
    raise ValueError(
      f"{name} must be a non-empty [points, rewards] array and has shape "
      f"{array.shape}."
    )
  _require_finite(name, array)
  return array


def _pair(
  weights: ArrayLike, rewards: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
  """weights and rewards, checked to be [P, m] alike."""
  weights, rewards = _matrix("weights", weights), _matrix("rewards", rewards)
  if weights.shape != rewards.shape:
    raise ValueError(
      f"weights {weights.shape} and rewards {rewards.shape} must have the same "
      "shape: a weight for each reward of each point."
    )
  return weights, rewards


def _require_finite(name: str, array: NDArray[np.float64]) -> None:
  if not np.isfinite(array).all():
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    raise ValueError(
      f"{name} must be finite; {name}{list(where)} is {array[where]}."
    )

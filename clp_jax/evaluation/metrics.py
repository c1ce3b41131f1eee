"""The metrics of a comparison, of all its fronts and many draws at a time.

  hypervolume   above one fixed reference point
  IGD+          how far the front falls short of the best points of all methods,
                the non-dominated ones of their mean fronts pooled; lower is
                better
  spread        the largest distance between two points
  rank corr.    of each reward with its weight (with one reward: with -alpha)
  utility       E_Q sum_i w_i R_i, Q the weightings' distribution
  value         E_Q of what is optimised, (1 - alpha) sum_i w_i R_i - alpha KL

A front of one reward over several alphas lies in the plane of the reward and
-KL. Points are [..., P, m + 1]: the rewards and then -KL.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clp_jax.evaluation import fronts as fronts_lib
from clp_jax.evaluation import intervals
from clp_jax.evaluation.front import Front
from clp_jax.weightings import Distribution

Array = NDArray[np.float64]

DRAWS = 20_000  # weightings drawn from Q to weigh the points of a grid
TIED = 2.5  # standard errors by which a pair may fall short of the farthest


class Measure:
  """Metrics of all runs of a comparison.

  Attributes:
    names: the k metrics.
    lowest: [k] that each can be.
    highest: [k]
  """

  def __init__(
    self,
    methods: Sequence[Sequence[Front]],
    reference_points: Mapping[str, Sequence[float]],
    distribution: Distribution,
  ):
    """Takes what all draws share.

    Args:
      methods: each method's runs; their order is that of all runs.
      reference_points: of the hypervolumes, by name.
      distribution: Q.
    """
    sizes = [len(runs) for runs in methods]
    ends = itertools.accumulate(sizes)
    self._methods = [
      range(end - size, end) for size, end in zip(sizes, ends, strict=True)
    ]
    self._weightings = [weightings_of(f) for runs in methods for f in runs]
    self._reference_points = reference_points
    self._shares = point_weights(distribution, self._weightings[0])
    objectives = methods[0][0].objectives
    self._axes = axes_of(methods[0][0])
    ranks = tuple(f"rank corr. {o}" for o in objectives)
    self.names = (
      *(*reference_points, "IGD+", "spread"),
      *ranks,
      *("utility", "value"),
    )
    self._igd, self._spread, first = (
      self.names.index(name) for name in ("IGD+", "spread", ranks[0])
    )
    self._ranks = slice(first, first + len(ranks))
    self.lowest = np.zeros(len(self.names))
    self.lowest[-2:] = -math.inf
    self.highest = np.full(len(self.names), math.inf)
    self.lowest[self._ranks], self.highest[self._ranks] = -1, 1

  def __call__(self, points: Sequence[Array]) -> Array:
    """[runs, draws, k], NaN where one is not defined, of the points of every
    run, [draws, P, m + 1]."""
    found = np.full([len(points), len(points[0]), len(self.names)], math.nan)
    found[..., self._ranks] = self._rank_correlations(points)
    for of_run, p, weightings in zip(
      found, points, self._weightings, strict=True
    ):
      for i, reference_point in enumerate(self._reference_points.values()):
        of_run[:, i] = fronts_lib.hypervolumes(
          p[..., self._axes], reference_point
        )
      rewards, minus_kl = p[..., :-1], p[..., -1]
      apart = np.linalg.norm(rewards[:, :, None] - rewards[:, None], axis=3)
      of_run[:, self._spread] = apart.max(axis=(1, 2))
      if self._is_grid(weightings):
        weights, alphas = weightings[:, :-1], weightings[:, -1]
        utilities = (weights * rewards).sum(axis=2)
        values = (1 - alphas) * utilities + alphas * minus_kl
        of_run[:, -2:] = np.stack([utilities, values], -1).swapaxes(1, 2) @ (
          self._shares
        )
    return found

  def sample(
    self,
    points: Sequence[Array],
    drawn: Sequence[Array],
    luck: Sequence[Array],
  ) -> intervals.Sample:
    """The metrics of all runs with their errors.

    Args:
      points: of every run, [P, m + 1], as measured.
      drawn: of every run, [draws, P, m + 1], noise.
      luck: of every run, [draws], from `intervals.luck`.
    """
    sample = intervals.sample(self, points, drawn)
    self._widen_ranks(sample, points, drawn)
    # Of several pairs that may be the farthest, noise chooses the largest.
    pairs = zip(points, drawn, strict=True)
    most = sample.errors[3, ..., self._spread]
    most[:] = np.maximum(most, [_farthest(*pair) for pair in pairs])
    self._set_igd_plus(sample, points, drawn, luck)
    return sample

  def _widen_ranks(
    self,
    sample: intervals.Sample,
    points: Sequence[Array],
    drawn: Sequence[Array],
  ) -> None:
    """Sets the errors of rank correlations in two of the views.

    Noise takes from them, whichever sign they have: in place of the unbiased
    view the order is perfect. Points that may be equal may have any order.
    """
    pairs = zip(points, self._weightings, strict=True)
    perfect = [steered(*pair) for pair in pairs]
    unbiased, _, _, most = sample.errors[..., self._ranks]
    unbiased[:] = intervals.around(self._rank_correlations, perfect, drawn)
    unbiased -= self._rank_correlations([c[None] for c in perfect])
    closest = [c[None] for c in intervals.closest(points, drawn)]
    any_order = np.isnan(self._rank_correlations(closest))
    ends = np.where(np.arange(len(drawn[0])) % 2, 2.0, -2.0)[:, None]
    most[:] = np.where(any_order, ends, most)

  def mean_points(self, points: Sequence[Array]) -> list[Array]:
    """Of every method, the mean of its runs' [..., P, m + 1]."""
    return [
      np.mean([points[i] for i in runs], axis=0) for runs in self._methods
    ]

  def best_points(self, points: Sequence[Array]) -> Array:
    """[Q, axes]: IGD+'s reference set, of every method's mean [P, m + 1]."""
    pooled = np.concatenate([p[:, self._axes] for p in points])
    return pooled[fronts_lib.non_dominated(pooled)]

  def _igd_plus(self, points: Sequence[Array]) -> Array:
    """[methods, draws, 1], of every method's mean points [draws, P, m + 1]."""
    traded = [p[..., self._axes] for p in points]
    return fronts_lib.igd_plus(traded)[..., None]

  def _set_igd_plus(
    self,
    sample: intervals.Sample,
    points: Sequence[Array],
    drawn: Sequence[Array],
    luck: Sequence[Array],
  ) -> None:
    """Sets the IGD+ and its errors, the same for all runs of a method.

    It is that of a method's mean front, so seeds are noise of its points. Noise
    makes it larger, or smaller where the reference set follows, and between
    methods that are alike its bias is twice what is seen: the bias is taken the
    other way round in one view, and twice in another.
    """
    means, of_prompts = self.mean_points(points), self.mean_points(drawn)
    with_seeds = [noise.copy() for noise in of_prompts]
    for mean, noise, runs in zip(means, with_seeds, self._methods, strict=True):
      for i in runs:
        noise += luck[i][:, None, None] * (points[i] - mean)
    found = intervals.sample(self._igd_plus, means, of_prompts)
    unbiased, seen, _, _ = found.errors
    if any(len(runs) > 1 for runs in self._methods):
      unbiased, seen = intervals.unbiased_and_seen(
        self._igd_plus, means, with_seeds
      )
    twice = unbiased + 2 * (found.errors[1] - found.errors[0])
    most = unbiased + found.errors[3] - found.errors[0]
    errors = np.stack([unbiased, 2 * unbiased - seen, twice, most])
    for method, runs in enumerate(self._methods):
      for i in runs:
        sample.values[i, self._igd] = found.values[method, 0]
        sample.bias[i, self._igd] = found.bias[method, 0]
        sample.errors[:, i, :, self._igd] = errors[:, method, :, 0]

  def _rank_correlations(self, points: Sequence[Array]) -> Array:
    """[runs, draws, m]"""
    return np.stack(
      [
        np.stack(
          [
            fronts_lib.rank_correlations(asked, p[..., i])
            for i, asked in enumerate(_asked(weightings))
          ],
          axis=-1,
        )
        for p, weightings in zip(points, self._weightings, strict=True)
      ]
    )

  def _is_grid(self, weightings: Array) -> bool:
    grid = self._weightings[0]
    return weightings.shape == grid.shape and np.allclose(
      weightings, grid, atol=1e-6
    )


def _farthest(points: Array, drawn: Array) -> Array:
  """[draws] errors of the spread if every pair that may be is the farthest, of
  points [P, m + 1] with noise [draws, P, m + 1]."""
  apart = (points[:, None] - points[None])[..., :-1]
  lengths = np.linalg.norm(apart, axis=2)
  towards = apart / np.where(lengths > 0, lengths, 1)[..., None]
  noise = (drawn[:, :, None] - drawn[:, None])[..., :-1]
  errors = (noise * towards).sum(axis=3)  # [draws, P, P]
  row, column = divmod(int(np.argmax(lengths)), lengths.shape[1])
  against = (errors - errors[:, row, column][:, None, None]).std(axis=0)
  tied = lengths >= lengths[row, column] - TIED * against
  return errors[:, tied].max(axis=1)


def in_plane(front: Front) -> bool:
  """Whether the front is one of a reward against KL."""
  return len(front.objectives) == 1


def axes_of(front: Front) -> slice:
  """Of a point's m + 1 numbers those that are traded off."""
  return slice(None) if in_plane(front) else slice(len(front.objectives))


def weightings_of(front: Front) -> Array:
  """[P, m + 1]: the weights and the alpha of every point."""
  alphas = [[point.alpha] for point in front.points]
  return np.concatenate([front.weights, alphas], axis=1)


def steered(points: Array, weightings: Array) -> Array:
  """[P, m + 1]: points whose rewards follow what was asked and nothing else.

  Their slope in the ranks of what was asked, of weightings [P, m + 1] from
  `weightings_of`, is that of the points.
  """
  made = points.copy()
  for i, asked in enumerate(_asked(weightings)):
    ranks = fronts_lib.centred_ranks(asked)
    slope = ranks @ points[:, i] / max(float(ranks @ ranks), 1.0)
    made[:, i] = points[:, i].mean() + slope * ranks
  return made


def _asked(weightings: Array) -> Array:
  """[m, P]: what should order each reward, its weight or -alpha."""
  num_rewards = weightings.shape[1] - 1
  return -weightings[:, 1:].T if num_rewards == 1 else weightings[:, :-1].T


def point_weights(distribution: Distribution, weightings: Array) -> Array:
  """[P] probabilities that Q gives the points of a sweep, [P, m + 1] from
  `weightings_of`.

  Each weighting of Q counts for the point next to it, in the weights and in
  log alpha.
  """
  rng = np.random.default_rng(0)  # an integral, the same for all who ask
  m = distribution.num_rewards
  if distribution.weights is not None:
    drawn = np.tile(distribution.weights, (DRAWS, 1))
  else:
    drawn = rng.dirichlet([distribution.concentration] * m, DRAWS)
  nearest = _nearest(weightings[:, :m], drawn)
  if distribution.alpha_range is not None:
    low, high = np.log(distribution.alpha_range)
    log_alpha = rng.uniform(low, high, (DRAWS, 1))
    nearest = nearest & _nearest(np.log(weightings[:, m:]), log_alpha)
  # A point that stands twice shares its part.
  shares = nearest / nearest.sum(axis=1, keepdims=True)
  return shares.mean(axis=0)


def _nearest(points: Array, drawn: Array) -> NDArray[np.bool_]:
  """[draws, P]: which points are next to each draw."""
  distances = np.linalg.norm(drawn[:, None] - points[None], axis=2)
  return distances <= distances.min(axis=1, keepdims=True) + 1e-9

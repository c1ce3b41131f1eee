"""Q adapted during training: more weightings where the front has gaps.

The simplex is cut into cells around the points of a grid. For each cell a
moving average estimates the rewards of the weightings in it. Cells whose
neighbours' rewards are far from theirs get more of the weightings; a share is
drawn from Q as it is, so that no cell is forgotten and every estimate follows
the policies.

An extension that the paper leaves to future work (arXiv 2407.15762); this is
our own, simple form of it. It changes what is optimised: the mean over the
adapted Q.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from clp_jax import weightings


@struct.dataclass
class FrontEstimate:
  """What is known of the front; part of the train state."""

  rewards: jax.Array  # [P, m] float32, decayed sums of group mean rewards
  count: jax.Array  # [P] float32, decayed number of groups


@dataclasses.dataclass(frozen=True)
class Adaptation:
  """How Q is adapted.

  Attributes:
    num_rewards: m, at least 2.
    points: of the grid, an edge of the simplex.
    decay: of a cell's moving average, a step that has visited it.
    exploration: share of weightings that are drawn from Q itself.
  """

  num_rewards: int
  points: int
  decay: float
  exploration: float

  def __post_init__(self):
    if self.num_rewards < 2:
      raise ValueError(
        "weightings.adapt needs at least 2 objectives: there is one weighting "
        "of one reward."
      )
    if self.points < 2:
      raise ValueError(
        f"weightings.adapt_points must be at least 2, got {self.points}."
      )
    if not 0 <= self.decay < 1:
      raise ValueError(
        f"weightings.adapt_decay must be in [0, 1), got {self.decay}."
      )
    if not 0 < self.exploration <= 1:
      raise ValueError(
        "weightings.adapt_exploration must be in (0, 1], got "
        f"{self.exploration}."
      )

  @property
  def grid(self) -> np.ndarray:
    """[P, m] float32, the middles of the cells."""
    return weightings.simplex_grid(self.num_rewards, self.points)

  def empty(self) -> FrontEstimate:
    """The estimate before training."""
    return FrontEstimate(
      jnp.zeros(self.grid.shape, jnp.float32),
      jnp.zeros([len(self.grid)], jnp.float32),
    )

  def update(
    self, estimate: FrontEstimate, weights: jax.Array, rewards: jax.Array
  ) -> FrontEstimate:
    """Adds a step's groups to their cells.

    Args:
      estimate: before.
      weights: [G, m] float32, the groups' weights.
      rewards: [G, m] float32, their mean rewards.
    """
    in_cell = self._cells(weights)  # [G, P]
    groups = in_cell.sum(0)
    summed = (in_cell[:, :, None] * rewards[:, None, :]).sum(0)
    kept = jnp.where(groups > 0, self.decay, 1.0)
    return FrontEstimate(
      rewards=kept[:, None] * estimate.rewards + summed,
      count=kept * estimate.count + groups,
    )

  def probabilities(self, estimate: FrontEstimate) -> jax.Array:
    """How likely each cell is, exploration left out: by its gaps.

    A cell's gap is the mean distance of its rewards from its neighbours', each
    reward in units of its range over the front. Cells that are not known, or
    have no known neighbour, count as the mean of those that are.

    Returns:
      [P] float32 that sum to 1; uniform where all gaps are equal.
    """
    known = estimate.count > 0
    count = jnp.where(known, estimate.count, 1)
    rewards = estimate.rewards / count[:, None]
    low = jnp.where(known[:, None], rewards, jnp.inf).min(0)
    high = jnp.where(known[:, None], rewards, -jnp.inf).max(0)
    width = jnp.where(high > low, high - low, 1)
    rewards = jnp.where(known[:, None], rewards / width[None], 0)
    edges = jnp.asarray(self._neighbours()) & known[:, None] & known[None, :]
    between = rewards[:, None] - rewards[None]
    distance = jnp.sqrt((between**2).sum(-1))
    degree = edges.sum(1)
    gap = jnp.where(edges, distance, 0).sum(1) / jnp.maximum(degree, 1)
    measured = degree > 0
    mean = jnp.where(measured, gap, 0).sum() / jnp.maximum(measured.sum(), 1)
    # A front without extent, as it is before the first step, is uniform.
    gap = jnp.where(measured, gap, mean) + 1e-6
    return gap / gap.sum()

  def sample(
    self,
    key: jax.Array,
    distribution: weightings.Distribution,
    estimate: FrontEstimate,
    num: int,
  ) -> weightings.Weighting:
    """Draws G = num weightings; a pure function of the key and the estimate.

    Alpha comes from Q, and so do the weights with probability `exploration`.
    The others are a cell's middle, moved towards a point of the simplex chosen
    uniformly by as much as keeps it near the cell.
    """
    q_key, cell_key, inside_key, share_key = jax.random.split(key, 4)
    plain = distribution.sample(q_key, num)
    cells = jax.random.categorical(
      cell_key, jnp.log(self.probabilities(estimate)), shape=(num,)
    )
    offset = jax.random.dirichlet(
      inside_key, jnp.ones([self.num_rewards]), (num,)
    )
    step = 1 / self.points  # the cells of two rewards then tile the simplex
    near = (1 - step) * jnp.asarray(self.grid)[cells] + step * offset
    explores = jax.random.uniform(share_key, [num]) < self.exploration
    weights = jnp.where(explores[:, None], plain.weights, near)
    return weightings.Weighting(weights, plain.alpha)

  def _cells(self, weights: jax.Array) -> jax.Array:
    """[G, m] -> [G, P] float32, 1 at the cell whose middle is nearest."""
    # What `sample` does to a middle, so that a cell keeps what it has drawn.
    step = 1 / self.points
    middles = (1 - step) * self.grid + step / self.num_rewards
    away = ((weights[:, None] - jnp.asarray(middles)[None]) ** 2).sum(-1)
    return jax.nn.one_hot(away.argmin(1), len(middles), dtype=jnp.float32)

  def _neighbours(self) -> np.ndarray:
    """[P, P] bool: middles that differ by one step of one weight to another."""
    between = np.abs(self.grid[:, None] - self.grid[None]).sum(-1)
    return np.isclose(between, 2 / (self.points - 1))

"""Q adapted to the front: where the mass goes, and what it costs."""

import jax
import numpy as np
import pytest

from clp_jax import weightings
from clp_jax.adaptation import Adaptation

Q = weightings.Distribution(num_rewards=2, alpha=0.1)
ADAPTATION = Adaptation(num_rewards=2, points=5, decay=0.8, exploration=0.2)


def estimate_of(adaptation, front):
  """What is known after each cell was visited once."""
  estimate = adaptation.empty()
  for middle in adaptation.grid:
    weights = (
      1 - 1 / adaptation.points
    ) * middle + 1 / adaptation.points / len(middle)
    estimate = adaptation.update(
      estimate, weights[None].astype(np.float32), front(middle)[None]
    )
  return estimate


def gap_front(middle):
  """Two clusters: nothing between the third and the fourth cell."""
  w = middle[0]
  return np.float32(
    [0.1 * w + 0.8 * (w > 0.6), 0.9 - 0.1 * w - 0.7 * (w > 0.6)]
  )


def even_front(middle):
  return np.float32([middle[0], 1 - middle[0]])


def test_before_anything_is_known_cells_are_equally_likely():
  np.testing.assert_allclose(
    ADAPTATION.probabilities(ADAPTATION.empty()), 0.2, atol=1e-6
  )


def test_an_evenly_spread_front_gets_the_same_everywhere():
  estimate = estimate_of(ADAPTATION, even_front)
  np.testing.assert_array_equal(estimate.count, 1)
  np.testing.assert_allclose(ADAPTATION.probabilities(estimate), 0.2, atol=1e-5)


def test_mass_moves_to_the_gap_of_the_front():
  probabilities = np.asarray(
    ADAPTATION.probabilities(estimate_of(ADAPTATION, gap_front))
  )
  np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-6)
  # The grid goes from w = 0 to w = 1: the gap is between cells 2 and 3.
  assert probabilities[[2, 3]].sum() > 0.75
  weighting = ADAPTATION.sample(
    jax.random.key(0), Q, estimate_of(ADAPTATION, gap_front), 2000
  )
  w = np.asarray(weighting.weights)
  np.testing.assert_allclose(w.sum(1), 1, atol=1e-5)
  assert (w >= 0).all()
  near = ((w[:, 0] > 0.4) & (w[:, 0] < 0.8)).mean()
  plain = np.asarray(Q.sample(jax.random.key(0), 2000).weights)
  assert near > 0.65
  assert 0.35 < ((plain[:, 0] > 0.4) & (plain[:, 0] < 0.8)).mean() < 0.45
  np.testing.assert_array_equal(weighting.alpha, np.float32(0.1))


def test_the_scale_of_a_reward_does_not_matter():
  def scaled(middle):
    return gap_front(middle) * np.float32([50, 0.01])

  np.testing.assert_allclose(
    ADAPTATION.probabilities(estimate_of(ADAPTATION, scaled)),
    ADAPTATION.probabilities(estimate_of(ADAPTATION, gap_front)),
    atol=1e-5,
  )


def test_three_rewards_concentrate_around_a_corner_that_is_far():
  adaptation = Adaptation(num_rewards=3, points=4, decay=0.8, exploration=0.1)

  def front(middle):
    return np.float32(0.1 * middle + 0.9 * (middle > 0.9))

  probabilities = np.asarray(
    adaptation.probabilities(estimate_of(adaptation, front))
  )
  corner = adaptation.grid.max(1) > 0.9
  assert probabilities[corner].min() > 2 * probabilities[~corner].min()
  weights = adaptation.sample(
    jax.random.key(1),
    weightings.Distribution(num_rewards=3),
    estimate_of(adaptation, front),
    50,
  ).weights
  np.testing.assert_allclose(np.asarray(weights).sum(1), 1, atol=1e-5)


def test_estimates_are_moving_averages_of_the_visited_cells_alone():
  estimate = ADAPTATION.empty()
  low, high = np.float32([[0.1, 0.9]]), np.float32([[0.9, 0.1]])
  first, second = np.float32([[0.3, 0.7]]), np.float32([[0.5, 0.1]])
  estimate = ADAPTATION.update(estimate, low, first)
  estimate = ADAPTATION.update(estimate, high, first)
  estimate = ADAPTATION.update(estimate, low, second)
  np.testing.assert_allclose(estimate.count, [1.8, 0, 0, 0, 1], atol=1e-6)
  np.testing.assert_allclose(
    estimate.rewards[0], 0.8 * first[0] + second[0], atol=1e-6
  )
  np.testing.assert_allclose(estimate.rewards[4], first[0], atol=1e-6)
  both = ADAPTATION.update(
    ADAPTATION.empty(),
    np.concatenate([low, low]),
    np.concatenate([first, second]),
  )
  np.testing.assert_allclose(both.count, [2, 0, 0, 0, 0])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"num_rewards": 1}, "at least 2 objectives"),
    ({"points": 1}, "adapt_points must be at least 2, got 1"),
    ({"decay": 1.0}, r"adapt_decay must be in \[0, 1\), got 1.0"),
    ({"exploration": 0.0}, r"adapt_exploration must be in \(0, 1\], got 0.0"),
  ],
)
def test_settings_out_of_range_are_errors(change, message):
  settings = {"num_rewards": 2, "points": 5, "decay": 0.5, "exploration": 0.5}
  with pytest.raises(ValueError, match=message):
    Adaptation(**(settings | change))

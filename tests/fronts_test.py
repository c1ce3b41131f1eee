"""Tests of clp_jax.evaluation.fronts."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from clp_jax.evaluation import fronts

# A few values, so that ties and duplicates are common.
_VALUES = st.sampled_from([-0.75, 0.0, 0.125, 0.3, 0.55, 0.8125, 1.7])


@st.composite
def _rewards(draw, rewards=(1, 4)):
  shape = draw(st.tuples(st.integers(1, 9), st.integers(*rewards)))
  return draw(hnp.arrays(np.float64, shape, elements=_VALUES))


def _dominates(a, b):
  return np.all(a >= b) and np.any(a > b)


def _inclusion_exclusion(rewards, reference):
  """Volume of a union of boxes, from the volumes of their intersections."""
  total = 0.0
  for size in range(1, len(rewards) + 1):
    for chosen in itertools.combinations(rewards, size):
      sides = np.maximum(np.min(chosen, axis=0) - reference, 0)
      total += (-1) ** (size + 1) * np.prod(sides)
  return total


class TestNonDominated:
  def test_a_hand_drawn_plane(self):
    rewards = [[0.2, 0.9], [0.5, 0.5], [0.4, 0.4], [0.9, 0.1], [0.2, 0.8]]
    np.testing.assert_array_equal(
      fronts.non_dominated(rewards), [True, True, False, True, False]
    )

  def test_copies_of_a_best_point_all_count(self):
    rewards = [[0.5, 0.7], [0.5, 0.7], [0.1, 0.7]]
    np.testing.assert_array_equal(
      fronts.non_dominated(rewards), [True, True, False]
    )

  def test_one_reward_keeps_its_maxima(self):
    np.testing.assert_array_equal(
      fronts.non_dominated([[0.3], [0.8], [0.8], [-1.0]]),
      [False, True, True, False],
    )

  @hypothesis.given(_rewards())
  def test_agrees_with_the_definition(self, rewards):
    expected = [not any(_dominates(a, b) for a in rewards) for b in rewards]
    np.testing.assert_array_equal(fronts.non_dominated(rewards), expected)

  @hypothesis.given(_rewards())
  def test_does_not_change_its_argument(self, rewards):
    before = rewards.copy()
    fronts.non_dominated(rewards)
    fronts.hypervolume(rewards, np.zeros(rewards.shape[1]))
    np.testing.assert_array_equal(rewards, before)


class TestHypervolume:
  def test_two_overlapping_rectangles(self):
    # 0.3 x 0.9 + 0.8 x 0.4 - 0.3 x 0.4
    assert fronts.hypervolume([[0.3, 0.9], [0.8, 0.4]], [0, 0]) == (
      pytest.approx(0.27 + 0.32 - 0.12)
    )

  def test_is_measured_from_the_reference_point(self):
    assert fronts.hypervolume([[0.85, 0.9]], [0.55, 0.65]) == (
      pytest.approx(0.3 * 0.25)
    )

  def test_points_that_do_not_exceed_the_reference_add_nothing(self):
    front = [[0.85, 0.9]]
    below = [[0.99, 0.65], [0.5, 0.99], [0.1, 0.1]]
    assert fronts.hypervolume(front + below, [0.55, 0.65]) == (
      fronts.hypervolume(front, [0.55, 0.65])
    )
    assert fronts.hypervolume(below, [0.55, 0.65]) == 0

  def test_one_reward_is_a_length(self):
    assert fronts.hypervolume([[0.3], [0.8]], [0.25]) == pytest.approx(0.55)
    assert fronts.hypervolume([[0.2]], [0.25]) == 0

  @hypothesis.given(_rewards(), _VALUES)
  def test_agrees_with_inclusion_and_exclusion(self, rewards, reference):
    reference_point = np.linspace(reference, reference - 0.3, rewards.shape[1])
    np.testing.assert_allclose(
      fronts.hypervolume(rewards, reference_point),
      _inclusion_exclusion(rewards, reference_point),
      atol=1e-9,
    )

  @pytest.mark.parametrize("m", [2, 3])
  def test_agrees_with_counting_random_points(self, m):
    rng = np.random.default_rng(m)
    rewards = rng.uniform(0.1, 1, (12, m))
    darts = rng.uniform(0, 1, (200_000, m))
    hits = np.zeros(len(darts), bool)
    for point in rewards:
      hits |= np.all(darts < point, axis=1)
    # 4 standard errors of a share over 200,000 darts.
    assert fronts.hypervolume(rewards, np.zeros(m)) == (
      pytest.approx(hits.mean(), abs=4 * 0.5 / np.sqrt(len(darts)))
    )

  @hypothesis.given(_rewards(), st.permutations(range(4)))
  def test_order_of_points_and_rewards_does_not_matter(self, rewards, order):
    m = rewards.shape[1]
    columns = [i for i in order if i < m]
    reference = np.linspace(-1, 0, m)
    np.testing.assert_allclose(
      fronts.hypervolume(rewards[::-1][:, columns], reference[columns]),
      fronts.hypervolume(rewards, reference),
      atol=1e-12,
    )

  @hypothesis.given(_rewards())
  def test_is_that_of_the_non_dominated_points(self, rewards):
    reference = np.full(rewards.shape[1], -1.0)
    kept = rewards[fronts.non_dominated(rewards)]
    np.testing.assert_allclose(
      fronts.hypervolume(kept, reference),
      fronts.hypervolume(rewards, reference),
    )

  @hypothesis.given(st.integers(1, 3), st.integers(0, 9))
  def test_many_fronts_at_once_are_those_of_each(self, m, seed):
    rng = np.random.default_rng(seed)
    many = rng.choice([-0.5, 0.1, 0.3, 0.3, 0.8], (4, 3, 7, m))
    reference = np.linspace(-0.1, 0.2, m)
    expected = [[fronts.hypervolume(f, reference) for f in row] for row in many]
    np.testing.assert_allclose(
      fronts.hypervolumes(many, reference), expected, atol=1e-12
    )


class TestIgdPlus:
  def test_by_hand(self):
    # (0.5, 0.9): 0.1 short in the one reward, above in the other. (0.9, 0.2):
    # nearest is (0.8, 0.1), short by 0.1 in both. All others are dominated.
    front = np.array([[0.5, 0.8], [0.8, 0.1]])
    best = np.array([[0.5, 0.9], [0.9, 0.2], [0.4, 0.2]])
    found = fronts.igd_plus([front[None], best[None]])
    expected = [[(0.1 + 0.1 * np.sqrt(2)) / 2], [0]]
    np.testing.assert_allclose(found, expected, atol=1e-12)

  @hypothesis.given(st.integers(2, 3), st.integers(0, 99))
  def test_agrees_with_a_double_loop(self, m, seed):
    rng = np.random.default_rng(seed)
    values = [-0.5, 0.1, 0.3, 0.3, 0.8, 1.1]  # with ties and duplicates
    many = [rng.choice(values, (4, size, m)) for size in (5, 1, 8)]
    found = fronts.igd_plus(many)
    assert found.shape == (3, 4)
    for draw in range(4):
      pooled = np.concatenate([front[draw] for front in many])
      best = [z for z in pooled if not any(_dominates(p, z) for p in pooled)]
      for front, of_front in zip(many, found, strict=True):
        short = [
          min(np.linalg.norm(np.maximum(z - p, 0)) for p in front[draw])
          for z in best
        ]
        assert of_front[draw] == pytest.approx(np.mean(short))


class TestSpread:
  def test_is_the_distance_of_the_two_farthest_points(self):
    rewards = [[0.1, 0.9], [0.2, 0.5], [0.4, 0.5]]
    assert fronts.spread(rewards) == pytest.approx(0.5)

  def test_one_point_has_none(self):
    assert fronts.spread([[0.3, 0.7, 0.1]]) == 0

  def test_counts_dominated_points(self):
    assert fronts.spread([[1.0, 1.0], [0.4, 0.2]]) == pytest.approx(1.0)

  @hypothesis.given(_rewards())
  def test_agrees_with_a_double_loop(self, rewards):
    expected = max(np.linalg.norm(a - b) for a in rewards for b in rewards)
    np.testing.assert_allclose(fronts.spread(rewards), expected)


class TestMonotonicity:
  def test_one_for_rewards_that_follow_their_weights(self):
    w = np.array([0.0, 0.25, 0.6, 1.0])
    weights = np.stack([w, 1 - w], axis=1)
    rewards = np.stack([w**3, -np.exp(w)], axis=1)
    np.testing.assert_allclose(fronts.monotonicity(weights, rewards), [1, 1])
    np.testing.assert_allclose(fronts.monotonicity(weights, -rewards), [-1, -1])

  def test_a_swapped_pair_by_hand(self):
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 (16 - 1)) = 0.8.
    weights = [[0.0], [0.1], [0.5], [0.9]]
    rewards = [[0.2], [0.7], [0.6], [0.8]]
    np.testing.assert_allclose(fronts.monotonicity(weights, rewards), [0.8])

  def test_ties_share_their_mean_rank(self):
    # Ranks 1 2 3 and 1.5 1.5 3: Pearson's correlation of these.
    expected = np.corrcoef([1, 2, 3], [1.5, 1.5, 3])[0, 1]
    np.testing.assert_allclose(
      fronts.monotonicity([[0.1], [0.4], [0.5]], [[0.3], [0.3], [0.9]]),
      [expected],
    )

  @hypothesis.given(st.data(), st.integers(2, 9))
  def test_agrees_with_scipy(self, data, points):
    column = hnp.arrays(np.float64, (points, 1), elements=_VALUES)
    weights, rewards = data.draw(column), data.draw(column)
    hypothesis.assume(np.ptp(weights) > 0 and np.ptp(rewards) > 0)
    np.testing.assert_allclose(
      fronts.monotonicity(weights, rewards)[0],
      scipy.stats.spearmanr(weights[:, 0], rewards[:, 0]).statistic,
      atol=1e-12,
    )

  def test_many_rows_at_once_are_those_of_each_front(self):
    rng = np.random.default_rng(0)
    x = np.array([0.0, 0.5, 0.5, 1.0])
    y = rng.integers(0, 3, (50, 4)).astype(float)
    y[0] = 2.0  # never changes
    expected = [fronts.monotonicity(x[:, None], row[:, None])[0] for row in y]
    found = fronts.rank_correlations(x, y)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(found[0])

  def test_a_reward_that_never_moves_is_nan(self):
    weights = [[0.1, 0.9], [0.6, 0.4]]
    rewards = [[0.5, 0.8], [0.5, 0.7]]
    np.testing.assert_allclose(
      fronts.monotonicity(weights, rewards), [np.nan, 1.0]
    )

  def test_one_point_is_an_error(self):
    with pytest.raises(ValueError, match="2 points or more; there is 1"):
      fronts.monotonicity([[0.5]], [[0.5]])


class TestExpectedUtility:
  def test_by_hand(self):
    # (0.25 x 0.4 + 0.75 x 0.8 + 1.0 x 0.9 + 0.0 x 0.1) / 2
    assert fronts.expected_utility(
      [[0.25, 0.75], [1.0, 0.0]], [[0.4, 0.8], [0.9, 0.1]]
    ) == pytest.approx((0.1 + 0.6 + 0.9) / 2)


class TestDominatedShare:
  def test_by_hand(self):
    a = [[0.5, 0.5], [0.9, 0.1]]
    b = [[0.4, 0.4], [0.5, 0.3], [0.85, 0.05], [0.1, 0.6]]
    assert fronts.dominated_share(a, b) == 0.5  # Not (0.5, 0.3): a tie.

  @hypothesis.given(_rewards(rewards=(3, 3)), _rewards(rewards=(3, 3)))
  def test_agrees_with_a_double_loop(self, a, b):
    expected = np.mean([any(np.all(p > q) for p in a) for q in b])
    assert fronts.dominated_share(a, b) == expected

  @hypothesis.given(_rewards())
  def test_no_front_dominates_itself_beyond_its_dominated_points(self, a):
    share = fronts.dominated_share(a, a)
    assert share <= np.mean(~fronts.non_dominated(a))


class TestErrors:
  @pytest.mark.parametrize(
    "call",
    [
      fronts.non_dominated,
      fronts.spread,
      lambda r: fronts.hypervolume(r, [0.0, 0.0]),
      lambda r: fronts.monotonicity(r, r),
      lambda r: fronts.expected_utility(r, r),
      lambda r: fronts.dominated_share(r, [[0.1, 0.2]]),
      lambda r: fronts.dominated_share([[0.1, 0.2]], r),
    ],
  )
  def test_bad_points_are_named(self, call):
    with pytest.raises(ValueError, match=r"\[1, 0\] is nan"):
      call([[0.1, 0.2], [np.nan, 0.3]])
    with pytest.raises(ValueError, match=r"\[0, 1\] is -?inf"):
      call([[0.1, -np.inf], [0.2, 0.3]])
    with pytest.raises(ValueError, match=r"has shape \(2,\)"):
      call([0.1, 0.2])
    with pytest.raises(ValueError, match=r"has shape \(0, 2\)"):
      call(np.zeros((0, 2)))

  def test_reference_point_of_another_length(self):
    with pytest.raises(ValueError, match=r"shape \(2,\).* has shape \(3,\)"):
      fronts.hypervolume([[0.1, 0.2]], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"has shape \(\)"):
      fronts.hypervolume([[0.1, 0.2]], 0.0)

  def test_nan_in_the_reference_point(self):
    with pytest.raises(ValueError, match=r"reference_point\[1\] is nan"):
      fronts.hypervolume([[0.1, 0.2]], [0.0, np.nan])

  def test_weights_of_another_shape(self):
    for call in (fronts.monotonicity, fronts.expected_utility):
      with pytest.raises(ValueError, match=r"\(2, 2\) and rewards \(2, 3\)"):
        call(np.ones((2, 2)), np.ones((2, 3)))

  def test_fronts_over_different_rewards(self):
    with pytest.raises(ValueError, match="a has 2 rewards and b has 3"):
      fronts.dominated_share(np.ones((2, 2)), np.ones((2, 3)))

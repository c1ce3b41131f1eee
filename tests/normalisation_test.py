"""Reward normalisation and its moments."""

import jax.numpy as jnp
import numpy as np

from clp_jax.rewards.normalisation import RewardStats, normalise


def test_moments_in_parts_equal_those_of_all_samples():
  """With a large offset, where sums of squares would lose all digits."""
  random = np.random.default_rng(0)
  parts = [
    (random.normal(size=(n, 2)) * [0.5, 20] + [300, -7]).astype(np.float32)
    for n in (3, 64, 17)
  ]
  stats = RewardStats.empty(2)
  for part in parts:
    stats = stats.update(jnp.asarray(part), jnp.asarray([True, True]))
  everything = np.concatenate(parts).astype(np.float64)
  np.testing.assert_array_equal(stats.count, [84, 84])
  np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-6)
  np.testing.assert_allclose(stats.deviation(), everything.std(0), rtol=1e-4)


def test_objectives_that_are_not_updated_keep_their_moments():
  stats = RewardStats.empty(2).update(
    jnp.asarray([[1.0, 5.0], [2.0, 7.0]]), jnp.asarray([False, True])
  )
  np.testing.assert_array_equal(stats.count, [0, 2])
  np.testing.assert_array_equal(stats.mean, [0, 6])


def test_only_enabled_objectives_are_normalised():
  samples = jnp.asarray([[1.0, 5.0], [2.0, 8.0]])
  stats = RewardStats.empty(2).update(samples, jnp.asarray([True, True]))
  result = normalise(samples, stats, jnp.asarray([False, True]))
  np.testing.assert_allclose(result, [[1.0, -1.0], [2.0, 1.0]], atol=1e-6)


def test_a_constant_reward_is_centred_and_not_divided_by_zero():
  samples = jnp.full([4, 1], 0.3)
  stats = RewardStats.empty(1).update(samples, jnp.asarray([True]))
  result = normalise(samples, stats, jnp.asarray([True]))
  np.testing.assert_allclose(result, 0, atol=1e-6)

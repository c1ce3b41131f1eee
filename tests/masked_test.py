"""Masked sums, and metrics that add up exactly."""

import jax.numpy as jnp
import numpy as np

from clp_jax.masked import Mean, add, masked_sum, mean_of


def test_masked_out_values_may_be_nan():
  x = jnp.asarray([[1.5, jnp.nan], [2.25, 4.0]])
  mask = jnp.asarray([[True, False], [True, True]])
  np.testing.assert_array_equal(masked_sum(x, mask, axis=1), [1.5, 6.25])


def test_means_of_parts_add_up_to_the_mean_of_the_whole():
  x = jnp.asarray([1.0, 2.5, 4.0, -3.0, 7.0])
  mask = jnp.asarray([True, False, True, True, True])
  whole = mean_of(x, mask)
  parts = add(mean_of(x[:2], mask[:2]), mean_of(x[2:], mask[2:]))
  np.testing.assert_allclose(whole.sum / whole.count, 9.0 / 4)
  assert isinstance(parts, Mean)
  np.testing.assert_allclose([parts.sum, parts.count], [9.0, 4.0])

"""Weightings: the simplex, Q and grids."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clp_jax
from clp_jax import weightings


def test_without_alpha_coefficients_are_the_weights():
  weights = [0.2, 0.5, 0.3]
  np.testing.assert_array_equal(
    clp_jax.coefficients(weights), np.asarray(weights, np.float32)
  )


@given(st.floats(0, 1), st.floats(0, 1))
def test_with_alpha_the_kl_set_comes_last(w, alpha):
  result = np.asarray(clp_jax.coefficients([w, 1 - w], alpha), np.float64)
  np.testing.assert_allclose(
    result, [(1 - alpha) * w, (1 - alpha) * (1 - w), alpha], atol=1e-6
  )
  assert abs(result.sum() - 1) < 1e-6


def test_coefficients_broadcast_over_weightings():
  weights = np.asarray([[0.5, 0.5], [1.0, 0.0]], np.float32)
  result = clp_jax.coefficients(weights, np.asarray([0.5, 0.25], np.float32))
  np.testing.assert_allclose(
    result, [[0.25, 0.25, 0.5], [0.75, 0.0, 0.25]], atol=1e-7
  )


@pytest.mark.parametrize(
  "weights, message",
  [
    ([0.5, 0.6], "sum to 1"),
    ([1.5, -0.5], ">= 0"),
    ([math.nan, 1.0], "finite"),
    ([math.inf, 0.0], "finite"),
  ],
)
def test_weights_off_the_simplex_are_an_error(weights, message):
  with pytest.raises(ValueError, match=message):
    clp_jax.coefficients(weights)
  with pytest.raises(ValueError, match=message):
    weightings.Distribution(2, weights=tuple(weights))
  with pytest.raises(ValueError, match=message):
    weightings.weights_array({"a": weights[0], "b": weights[1]}, ("a", "b"))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_out_of_range_is_an_error(alpha):
  with pytest.raises(ValueError, match=r"alpha.*\[0, 1\]"):
    clp_jax.coefficients([0.5, 0.5], alpha)
  with pytest.raises(ValueError, match=r"alpha.*\[0, 1\]"):
    weightings.Distribution(2, alpha=alpha)


def test_a_weight_beyond_float32_is_an_error_without_a_warning():
  with pytest.raises(ValueError, match="must be finite"):
    weightings.weights_array({"a": 1e300}, ["a", "b"])


def test_named_weights_take_the_order_of_the_objectives():
  array = weightings.weights_array({"c": 0.25, "a": 0.75}, ("a", "b", "c"))
  np.testing.assert_array_equal(array, np.float32([0.75, 0, 0.25]))
  with pytest.raises(ValueError, match="unknown objective 'nil'.*nli, rouge"):
    weightings.weights_array({"nil": 1.0}, ("nli", "rouge"))


@pytest.mark.parametrize("concentration", [0.01, 0.3, 1.0, 20.0])
def test_dirichlet_has_its_moments(concentration):
  q = weightings.Distribution(3, concentration=concentration)
  w = np.asarray(q.sample(jax.random.key(3), 20000).weights, np.float64)
  assert np.isfinite(w).all() and (w >= 0).all()
  np.testing.assert_allclose(w.sum(1), 1, atol=1e-5)
  np.testing.assert_allclose(w.mean(0), 1 / 3, atol=0.015)
  variance = (1 / 3) * (2 / 3) / (3 * concentration + 1)
  np.testing.assert_allclose(w.var(0), variance, rtol=0.06)


def test_alpha_is_fixed_or_log_uniform():
  fixed = weightings.Distribution(2, alpha=0.03)
  np.testing.assert_array_equal(
    fixed.sample(jax.random.key(0), 5).alpha, np.full(5, np.float32(0.03))
  )
  assert fixed.num_sets == 2
  ranged = weightings.Distribution(2, alpha_range=(0.01, 1.0))
  assert ranged.num_sets == 3
  draw = ranged.sample(jax.random.key(0), 20000)
  u = np.log10(np.asarray(draw.alpha, np.float64))
  assert u.min() >= -2.0001 and u.max() <= 1e-4
  np.testing.assert_allclose(
    np.quantile(u, [0.25, 0.5, 0.75]), [-1.5, -1, -0.5], atol=0.03
  )
  assert ranged.coefficients(draw).shape == (20000, 3)


def test_fixed_weights_are_every_draw():
  q = weightings.Distribution(2, weights=(0.25, 0.75))
  np.testing.assert_array_equal(
    q.sample(jax.random.key(1), 3).weights, np.float32([[0.25, 0.75]] * 3)
  )


def test_sampling_is_a_function_of_the_key_and_never_traces_again():
  q = weightings.Distribution(2)
  sample = jax.jit(q.sample, static_argnums=1)
  a, b = (sample(jax.random.key(5), 4) for _ in range(2))
  np.testing.assert_array_equal(a.weights, b.weights)
  c = sample(jax.random.key(6), 4)
  assert not np.array_equal(a.weights, c.weights)
  assert sample._cache_size() == 1


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"num_rewards": 0}, "objectives is empty"),
    ({"num_rewards": 2, "concentration": 0.0}, "concentration must be > 0"),
    ({"num_rewards": 2, "concentration": math.inf}, "> 0 and finite, got inf"),
    ({"num_rewards": 2, "alpha_range": (0.0, 0.5)}, "alpha_range"),
    ({"num_rewards": 2, "alpha_range": (0.5, 0.1)}, "alpha_range"),
    ({"num_rewards": 3, "weights": (0.5, 0.5)}, "expected 3 weights"),
    (
      {
        "num_rewards": 1,
        "alpha_range": (1.0, 1.0),
        "kl_coefficient": "realigned",
      },
      "low is below 1",
    ),
  ],
)
def test_impossible_distributions_are_errors(settings, message):
  with pytest.raises(ValueError, match=message):
    weightings.Distribution(**settings)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("points", [2, 5, 11])
def test_grid_holds_every_multiple_once_with_exact_vertices(m, points):
  grid = weightings.simplex_grid(m, points)
  assert grid.shape == (math.comb(points - 2 + m, m - 1), m)
  np.testing.assert_allclose(grid.sum(1), 1, atol=1e-6)
  counts = np.rint(grid * (points - 1)).astype(int)
  np.testing.assert_allclose(counts, grid * (points - 1), atol=1e-5)
  assert len({tuple(row) for row in counts}) == len(grid)
  for vertex in np.eye(m, dtype=np.float32):
    assert (grid == vertex).all(1).sum() == 1


def test_grid_of_one_point_is_an_error():
  with pytest.raises(ValueError, match="at least 2 points"):
    weightings.simplex_grid(2, 1)


@pytest.mark.parametrize("alpha", [0.5, 1, np.float32(0.5), np.int64(1)])
def test_one_alpha_is_of_all_texts(alpha):
  assert weightings.per_text(2, None, alpha) == [(None, alpha)] * 2


def test_traced_weights_pass_through():
  result = jax.jit(clp_jax.coefficients)(jnp.asarray([0.5, 0.5]))
  np.testing.assert_array_equal(result, [0.5, 0.5])

"""Scalarisations: values, gradients, and what training weights rewards by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.algorithms import reinforce
from clp_jax.scalarisation import Scalarisation

UTOPIA = (1.1, 0.9, 1.3)
LINEAR = Scalarisation()
CHEBYSHEV = Scalarisation("chebyshev", UTOPIA)
SMOOTH = Scalarisation("smooth_chebyshev", UTOPIA, 0.07)


def simplex(*shape):
  random = np.random.default_rng(0)
  return random.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


def rewards(*shape):
  return np.random.default_rng(1).uniform(0, 0.8, shape).astype(np.float32)


def test_values_equal_their_definitions():
  expected, weights = rewards(4, 3), simplex(4, 3)
  gaps = weights * (np.asarray(UTOPIA) - expected)
  for scalarisation, value in (
    (LINEAR, (weights * expected).sum(1)),
    (CHEBYSHEV, -gaps.max(1)),
    (SMOOTH, -0.07 * np.log(np.exp(gaps / 0.07).sum(1))),
  ):
    np.testing.assert_allclose(
      scalarisation.value(expected, weights), value, atol=1e-6
    )


@pytest.mark.parametrize("scalarisation", [LINEAR, CHEBYSHEV, SMOOTH])
def test_gradient_is_that_of_the_value(scalarisation):
  expected, weights = rewards(4, 3), simplex(4, 3)
  gradient = jax.grad(lambda j: scalarisation.value(j, weights).sum())(expected)
  np.testing.assert_allclose(
    scalarisation.gradient(expected, weights), gradient, atol=1e-6
  )


def test_a_small_smoothness_approaches_chebyshev():
  expected, weights = rewards(4, 3), simplex(4, 3)
  sharp = Scalarisation("smooth_chebyshev", UTOPIA, 1e-3)
  np.testing.assert_allclose(
    sharp.value(expected, weights),
    CHEBYSHEV.value(expected, weights),
    atol=2e-3,
  )


def test_chebyshev_gaps_that_tie_share_the_gradient():
  scalarisation = Scalarisation("chebyshev", (1.0, 1.0))
  found = scalarisation.gradient(np.float32([0.5, 0.5]), np.float32([0.5, 0.5]))
  np.testing.assert_allclose(found, [0.25, 0.25])


def test_chebyshev_prefers_the_dent_that_no_linear_weighting_reaches():
  front = np.float32([[1, 0], [0.45, 0.45], [0, 1]])
  scalarisation = Scalarisation("chebyshev", (1.05, 1.05))
  for w in np.linspace(0, 1, 11):
    weights = np.tile(np.float32([[w, 1 - w]]), (3, 1))
    assert int(LINEAR.value(front, weights).argmax()) != 1
  middle = np.tile(np.float32([[0.5, 0.5]]), (3, 1))
  assert int(scalarisation.value(front, middle).argmax()) == 1


def test_a_response_is_weighted_by_what_other_prompts_got():
  raw, weights = rewards(2, 6, 3), simplex(2, 3)  # 3 prompts x 2 samples
  found = np.asarray(SMOOTH.response_weights(raw, weights, 2))
  for g, r in np.ndindex(2, 6):
    others = [q for q in range(6) if q // 2 != r // 2]
    expected = SMOOTH.gradient(raw[g, others].mean(0), weights[g])
    np.testing.assert_allclose(found[g, r], expected, atol=1e-6)
  changed = raw.copy()
  changed[0, 4:] += 0.3
  again = np.asarray(SMOOTH.response_weights(changed, weights, 2))
  np.testing.assert_allclose(again[0, 4:], found[0, 4:], atol=1e-6)
  assert not np.allclose(again[0, :4], found[0, :4])
  np.testing.assert_array_equal(
    LINEAR.response_weights(raw, weights, 2), weights
  )
  with pytest.raises(ValueError, match="at least 2 prompts a weighting"):
    SMOOTH.response_weights(raw[:, :2], weights, 2)


def test_reweighted_policy_gradient_is_that_of_the_scalarised_expectation():
  """One state, 4 responses enumerated: sum_y pi(y) e . R(y) dlog pi(y)."""
  table = rewards(4, 3)
  weights = simplex(1, 3)
  theta = jnp.asarray([0.3, -0.2, 0.5, 0.1])

  def value(theta):
    return SMOOTH.value(jax.nn.softmax(theta) @ table, jnp.asarray(weights[0]))

  probs = jax.nn.softmax(theta)
  e = SMOOTH.gradient(probs @ table, jnp.asarray(weights[0]))
  returns = reinforce.scalar_returns(
    table[None],
    jnp.zeros([1, 4]),
    jnp.broadcast_to(e, (1, 4, 3)),
    jnp.zeros([1]),
  )[0]
  surrogate = jax.grad(
    lambda t: reinforce.loss(
      jax.nn.log_softmax(t)[:, None], jnp.ones([4, 1], bool), probs * returns
    )
  )(theta)
  np.testing.assert_allclose(-surrogate, jax.grad(value)(theta), atol=1e-6)
  # Scalarising each response first is another objective altogether.
  each = SMOOTH.value(table, jnp.broadcast_to(weights, (4, 3)))
  other = jax.grad(lambda t: jax.nn.softmax(t) @ each)(theta)
  assert np.abs(other - jax.grad(value)(theta)).max() > 1e-3


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"name": "max"}, "one of linear, chebyshev, smooth_chebyshev, got 'max'"),
    ({"utopia": (1.0,)}, "is for chebyshev"),
    ({"name": "chebyshev"}, "needs scalarisation.utopia"),
    ({"name": "chebyshev", "utopia": (np.nan,)}, "must be finite"),
    ({"smoothness": 0.0}, "smoothness must be > 0, got 0.0"),
  ],
)
def test_settings_that_do_not_fit_are_errors(settings, message):
  with pytest.raises(ValueError, match=message):
    Scalarisation(**settings)

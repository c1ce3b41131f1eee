"""REINFORCE: returns, baselines, and a gradient that needs no sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.algorithms import reinforce


def loop_advantages(returns, num_samples, baseline):
  """The definition, a sample at a time."""
  result = np.zeros_like(returns)
  for g, row in enumerate(returns):
    for r, value in enumerate(row):
      prompt = r // num_samples
      own = range(prompt * num_samples, (prompt + 1) * num_samples)
      others = {
        "none": [0.0],
        "group_mean": row,
        "leave_one_out": [row[i] for i in own if i != r],
      }[baseline]
      result[g, r] = value - np.mean(others)
  return result


@pytest.mark.parametrize("baseline", reinforce.BASELINES)
def test_advantages_equal_their_definition(baseline):
  returns = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  np.testing.assert_allclose(
    reinforce.advantages(jnp.asarray(returns), 4, baseline),
    loop_advantages(returns, 4, baseline),
    atol=1e-6,
  )


def test_return_is_the_value_of_the_weighting():
  random = np.random.default_rng(1)
  rewards = random.normal(size=(2, 3, 4)).astype(np.float32)
  kl = random.normal(size=(2, 3)).astype(np.float32)
  weights = random.dirichlet(np.ones(4), 2).astype(np.float32)
  alpha = np.float32([0.1, 0.65])
  expected = np.zeros((2, 3))
  for g, r in itertools.product(range(2), range(3)):
    scalar = sum(weights[g, i] * rewards[g, r, i] for i in range(4))
    expected[g, r] = (1 - alpha[g]) * scalar - alpha[g] * kl[g, r]
  np.testing.assert_allclose(
    reinforce.scalar_returns(rewards, kl, weights, alpha), expected, atol=1e-6
  )


def test_permuting_objectives_with_their_weights_changes_nothing():
  random = np.random.default_rng(2)
  rewards = random.normal(size=(2, 3, 3)).astype(np.float32)
  kl = random.normal(size=(2, 3)).astype(np.float32)
  weights = random.dirichlet(np.ones(3), 2).astype(np.float32)
  alpha = np.float32([0.1, 0.65])
  order = [2, 0, 1]
  np.testing.assert_allclose(
    reinforce.scalar_returns(rewards, kl, weights, alpha),
    reinforce.scalar_returns(rewards[..., order], kl, weights[:, order], alpha),
    atol=1e-6,
  )


def test_expected_gradient_is_that_of_the_value():
  """Two-token responses over 3 symbols, all 9 enumerated.

  The loss's gradient, averaged over responses with their probabilities, must
  be minus the exact gradient of V = E[(1 - alpha) R - alpha log(pi / ref)],
  whose log-ratio is differentiated too.
  """
  alpha = 0.3
  responses = np.asarray(list(itertools.product(range(3), repeat=2)))
  rewards = np.random.default_rng(3).normal(size=9).astype(np.float32)
  theta = jax.random.normal(jax.random.key(0), (2, 3))
  ref = jax.random.normal(jax.random.key(1), (2, 3))

  def token_logp(theta):
    table = jax.nn.log_softmax(theta)
    return table[jnp.arange(2)[None], responses]  # [9, 2]

  def value(theta):
    logp = token_logp(theta).sum(1)
    kl = logp - token_logp(ref).sum(1)
    return (jnp.exp(logp) * ((1 - alpha) * rewards - alpha * kl)).sum()

  probs = jnp.exp(token_logp(theta).sum(1))
  kl = (token_logp(theta) - token_logp(ref)).sum(1)
  returns = reinforce.scalar_returns(
    rewards[None, :, None], kl[None], jnp.ones([1, 1]), jnp.float32([alpha])
  )[0]

  def expected_loss(theta, baseline):
    mask = jnp.ones([9, 2], bool)
    # The probability stands for how often a response is sampled.
    return reinforce.loss(
      token_logp(theta),
      mask,
      jax.lax.stop_gradient(probs * (returns - baseline)),
    )

  exact = jax.grad(value)(theta)
  for baseline in (0.0, 1.7):
    np.testing.assert_allclose(
      jax.grad(expected_loss)(theta, baseline), -exact, atol=2e-6
    )


@pytest.mark.parametrize(
  ("baseline", "share"),
  [("none", 4), ("leave_one_out", 4), ("group_mean", 3)],
)
def test_expected_gradient_of_a_group_with_each_baseline(baseline, share):
  """Two prompts of 2 samples, one of 3 responses each: all 81 draws."""
  random = np.random.default_rng(5)
  theta = jnp.asarray(random.normal(size=(2, 3)), jnp.float32)
  rewards = jnp.asarray(random.normal(size=(2, 3)), jnp.float32)
  draws = jnp.asarray(list(itertools.product(range(3), repeat=4)))  # [81, R]
  prompts = jnp.asarray([0, 0, 1, 1])
  returns = rewards[prompts, draws]
  advantages = reinforce.advantages(returns, 2, baseline)

  def expected_loss(theta):
    logp = jax.nn.log_softmax(theta)[prompts, draws]
    probability = jax.lax.stop_gradient(jnp.exp(logp.sum(1)))
    mask = jnp.ones([*draws.shape, 1], bool)
    return reinforce.loss(
      logp[..., None], mask, probability[:, None] * advantages
    )

  def value(theta):  # the mean over prompts
    return (jax.nn.softmax(theta) * rewards).sum() / 2

  np.testing.assert_allclose(
    -jax.grad(expected_loss)(theta), share * jax.grad(value)(theta), atol=2e-6
  )


def test_loss_ignores_what_follows_the_end_and_constants():
  logp = jnp.asarray([[-1.0, -2.0, jnp.nan], [-0.5, -0.25, -4.0]])
  mask = jnp.asarray([[True, True, False], [True, True, True]])
  advantages = jnp.asarray([0.5, -2.0])
  loss, gradient = jax.value_and_grad(reinforce.loss)(logp, mask, advantages)
  np.testing.assert_allclose(loss, -(0.5 * -3.0 - 2.0 * -4.75))
  np.testing.assert_allclose(gradient, [[-0.5, -0.5, 0], [2, 2, 2]])
  to_advantages = jax.grad(reinforce.loss, argnums=2)(logp, mask, advantages)
  np.testing.assert_array_equal(to_advantages, [0, 0])


def test_impossible_baselines_are_errors():
  returns = jnp.ones([1, 4])
  with pytest.raises(ValueError, match="none, group_mean, leave_one_out.*'rl'"):
    reinforce.advantages(returns, 2, "rl")
  with pytest.raises(ValueError, match="at least 2 samples a prompt, got 1"):
    reinforce.advantages(returns, 1, "leave_one_out")

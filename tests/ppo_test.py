"""PPO's losses and advantages against their definitions, on ragged rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.algorithms import ppo, reinforce

LENGTHS = np.asarray([[1, 5, 3], [4, 2, 5]])  # G = 2 groups of R = 3, T = 5
MASK = np.arange(5) < LENGTHS[..., None]
WEIGHTS = np.float32([[0.7, 0.3], [0.15, 0.85]])
ALPHA = np.float32([0.1, 0.35])


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loop_advantages(rewards, values, lengths, discount, gae_lambda):
  """The definition: sum_k (gamma lambda)^k delta_{t + k}, a row at a time."""
  advantages = np.zeros_like(values)
  for index in np.ndindex(lengths.shape):
    n = lengths[index]
    v = np.concatenate([values[index][:n], np.zeros((1, values.shape[-1]))])
    deltas = rewards[index][:n] + discount * v[1:] - v[:-1]
    for t in range(n):
      advantages[index][t] = sum(
        (discount * gae_lambda) ** k * deltas[t + k] for k in range(n - t)
      )
  return advantages


def token_rewards():
  return ppo.token_rewards(draw(0, 2, 3, 2), draw(1, 2, 3, 5), MASK)


def test_rewards_are_paid_at_the_last_token_and_kl_at_every_one():
  rewards, kl = draw(0, 2, 3, 2), draw(1, 2, 3, 5)
  paid = np.asarray(ppo.token_rewards(rewards, kl, MASK))
  for g, r in np.ndindex(2, 3):
    n = LENGTHS[g, r]
    np.testing.assert_array_equal(paid[g, r, n - 1, :2], rewards[g, r])
    np.testing.assert_array_equal(paid[g, r, :n, 2], kl[g, r, :n])
    assert not paid[g, r, n:].any() and not paid[g, r, : n - 1, :2].any()
  assert ppo.token_rewards(rewards, None, MASK).shape == (2, 3, 5, 2)


def test_what_other_samples_got_is_taken_off_at_the_end():
  """3 samples of one prompt in each group; the critic's KL likewise."""
  rewards = np.asarray(token_rewards())
  found = np.asarray(ppo.less_other_samples(rewards, MASK, 3))
  totals = rewards.sum(2)
  for g, r in np.ndindex(2, 3):
    n = LENGTHS[g, r]
    others = np.mean([totals[g, o] for o in range(3) if o != r], axis=0)
    expected = rewards[g, r].copy()
    expected[n - 1] -= others
    np.testing.assert_allclose(found[g, r], expected, atol=1e-5)
  returns = ppo.scalarise(found.sum(2, keepdims=True), WEIGHTS, ALPHA)[..., 0]
  plain = ppo.scalarise(rewards.sum(2, keepdims=True), WEIGHTS, ALPHA)[..., 0]
  np.testing.assert_allclose(
    returns, reinforce.advantages(plain, 3, "leave_one_out"), atol=1e-5
  )


@pytest.mark.parametrize(
  "discount, gae_lambda", [(1, 0.95), (0.9, 0.7), (1, 0)]
)
def test_advantages_equal_their_definition(discount, gae_lambda):
  rewards, values = np.asarray(token_rewards()), draw(2, 2, 3, 5, 3)
  found = ppo.generalised_advantages(
    rewards, values, MASK, discount=discount, gae_lambda=gae_lambda
  )
  expected = loop_advantages(rewards, values, LENGTHS, discount, gae_lambda)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert not np.asarray(found)[~MASK].any()


def test_without_discount_and_lambda_1_they_are_returns_minus_values():
  rewards, values = np.asarray(token_rewards()), draw(2, 2, 3, 5, 3)
  found = ppo.generalised_advantages(
    rewards, values, MASK, discount=1.0, gae_lambda=1.0
  )
  to_go = rewards[..., ::-1, :].cumsum(-2)[..., ::-1, :]
  np.testing.assert_allclose(
    np.asarray(found)[MASK], (to_go - values)[MASK], atol=1e-5
  )


def test_scalarised_advantages_are_those_of_the_scalarised_reward():
  """The KL's included: the same as running GAE on one scalar."""
  rewards, values = token_rewards(), draw(2, 2, 3, 5, 3)
  settings = {"discount": 0.97, "gae_lambda": 0.8}
  by_objective = ppo.generalised_advantages(rewards, values, MASK, **settings)

  def scalar(x):
    reward = (np.asarray(x)[..., :2] * WEIGHTS[:, None, None]).sum(-1)
    a = ALPHA[:, None, None]
    return (1 - a) * reward - a * np.asarray(x)[..., 2]

  at_once = ppo.generalised_advantages(
    scalar(rewards)[..., None], scalar(values)[..., None], MASK, **settings
  )[..., 0]
  found = ppo.scalarise(by_objective, WEIGHTS, ALPHA)
  np.testing.assert_allclose(found, at_once, atol=1e-5)
  each = np.broadcast_to(WEIGHTS[:, None], (2, 3, 2))
  np.testing.assert_array_equal(ppo.scalarise(by_objective, each, ALPHA), found)
  np.testing.assert_allclose(
    ppo.scalarise(by_objective[..., [1, 0, 2]], WEIGHTS[:, ::-1], ALPHA),
    found,
    atol=1e-6,
  )


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens():
  white = np.asarray(ppo.whiten(3 * draw(3, 2, 3, 5) + 2, MASK))
  assert not white[~MASK].any()
  np.testing.assert_allclose(white[MASK].mean(), 0, atol=1e-6)
  np.testing.assert_allclose(white[MASK].std(), 1, rtol=1e-5)


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
  logp, advantages = draw(4, 2, 3, 5), draw(5, 2, 3, 5)

  def surrogate(x):
    return ppo.policy_loss(x, logp, MASK, advantages, 0.2).loss

  # REINFORCE's loss with one "response" a token.
  def plain(x):
    return reinforce.loss(x[..., None], MASK[..., None], advantages)

  np.testing.assert_allclose(
    jax.grad(surrogate)(logp), jax.grad(plain)(jnp.asarray(logp)), atol=1e-7
  )
  same = ppo.policy_loss(logp, logp, MASK, advantages, 0.2)
  assert float(same.clipped) == 0 and float(same.kl) == 0


def test_clipped_loss_and_its_gradient_agree_with_loops_and_differences():
  old, advantages = draw(4, 2, 3, 5), draw(5, 2, 3, 5)
  logp = old + 0.4 * draw(6, 2, 3, 5)
  logp[~MASK] = np.nan  # whatever a row's end is followed by
  clip = 0.25

  def loop(logp):
    total = 0.0
    for i in zip(*np.nonzero(MASK), strict=True):
      ratio = np.exp(logp[i].astype(np.float64) - old[i])
      bounded = min(max(ratio, 1 - clip), 1 + clip)
      total -= min(ratio * advantages[i], bounded * advantages[i])
    return total

  found = ppo.policy_loss(logp, old, MASK, advantages, clip)
  np.testing.assert_allclose(found.loss, loop(logp), rtol=1e-5)
  change = logp[MASK].astype(np.float64) - old[MASK]
  outside = np.abs(np.exp(change) - 1) > clip
  assert 0 < outside.sum() < outside.size
  assert int(found.clipped) == outside.sum()
  np.testing.assert_allclose(
    found.kl, (np.exp(change) - 1 - change).sum(), rtol=1e-5
  )
  gradient = jax.grad(
    lambda x: ppo.policy_loss(x, old, MASK, advantages, clip).loss
  )(jnp.asarray(logp))
  assert np.isfinite(gradient).all() and not np.asarray(gradient)[~MASK].any()
  for i in zip(*np.nonzero(MASK), strict=True):
    up, down = logp.astype(np.float64), logp.astype(np.float64)
    up[i] += 1e-5
    down[i] -= 1e-5
    slope = (loop(up) - loop(down)) / 2e-5
    np.testing.assert_allclose(gradient[i], slope, atol=1e-4)


def test_no_clip_is_the_plain_importance_weighted_gain():
  old, advantages = draw(4, 2, 3, 5), draw(5, 2, 3, 5)
  logp = old + 0.4 * draw(6, 2, 3, 5)
  found = ppo.policy_loss(logp, old, MASK, advantages, None)
  expected = -(np.exp(logp - old) * advantages)[MASK].sum()
  np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
  assert float(found.clipped) == 0


def test_values_that_moved_too_far_have_no_gradient():
  """[1, 1, 3]: further than 0.3 from the old value, towards the target or not.

  A value that moves away from its target keeps its gradient: it must return.
  """
  old = np.float32([[[0.0, 0.0, 0.0]]])
  targets = np.float32([[[1.0, 1.0, 1.0]]])
  values = np.float32([[[0.25, 0.5, -0.5]]])
  mask = np.asarray([[True]])
  loss, gradient = jax.value_and_grad(ppo.value_loss)(
    values, old, targets, mask, 0.3
  )
  np.testing.assert_allclose(loss, 0.5 * (0.75**2 + 0.7**2 + 1.5**2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [[[-0.75, 0.0, -1.5]]], atol=1e-6)
  plain, gradient = jax.value_and_grad(ppo.value_loss)(
    values, old, targets, mask, None
  )
  np.testing.assert_allclose(
    plain, 0.5 * (0.75**2 + 0.5**2 + 1.5**2), rtol=1e-6
  )
  np.testing.assert_allclose(gradient, [[[-0.75, -0.5, -1.5]]], atol=1e-6)
  nothing = ppo.value_loss(values * np.nan, old, targets, ~mask, 0.3)
  assert float(nothing) == 0


def test_explained_variance_of_perfect_mean_and_constant_values():
  targets = draw(7, 2, 3, 5, 4)
  targets[..., 3] = 0.3
  values = targets.copy()
  values[..., 1] = targets[..., 1][MASK].mean()
  values[..., 2] = 0.5 * targets[..., 2] + 4  # what a shift can't explain
  values[..., 3] = 1.0
  values[~MASK] = 100.0
  found = ppo.explained_variance(values, targets, MASK)
  np.testing.assert_allclose(found, [1, 0, 0.75, 0], atol=1e-5)

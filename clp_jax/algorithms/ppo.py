"""PPO on the value of each weighting, with one value estimate per objective.

1. Every token is an action. Objective i pays its reward R_i at the last token;
   the KL term, where there is one, is the last "objective" and costs its
   log-ratio at every token (k1).
2. A critic gives K values a token, K = m rewards + 1 for the KL. Generalised
   advantage estimation runs for each of them, and the weighting then scalarises
   advantages just as it scalarises rewards: both are linear in the objectives.
3. The loss is the clipped surrogate, with one ratio a token.
At the policy that sampled, every ratio is 1 and the surrogate's gradient is
REINFORCE's with these advantages: REINFORCE with a learned baseline is the case
of one epoch, one minibatch and lambda = 1.

Sources: Schulman et al. 2017 (arXiv 1707.06347); advantages, Schulman et al.
2016 (arXiv 1506.02438); the low-variance KL estimate, Schulman 2020
(joschu.net/blog/kl-approx.html).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clp_jax.masked import masked_sum


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an update with a critic does with a rollout.

  Attributes:
    epochs: times that it goes through the responses.
    minibatches: updates an epoch.
    clip: the ratio's clipping range is [1 - clip, 1 + clip]; None is off.
    value_clip: how far a value may move from the old one before its loss has
      no gradient, in units of the reward; None is off.
    discount: gamma, a token.
    gae_lambda: lambda; 1 trusts the sampled returns alone.
    leave_one_out: returns are less the mean of the prompt's other samples, and
      the critic learns what is left.
    whiten: advantages of a step are shifted to mean 0, scaled to deviation 1.
    target_kl: nats a token between the policy that sampled and the present one,
      beyond which a step takes no further update; None is off.
  """

  epochs: int
  minibatches: int
  clip: float | None
  value_clip: float | None
  discount: float
  gae_lambda: float
  leave_one_out: bool
  whiten: bool
  target_kl: float | None

  def __post_init__(self):
    for name, value in vars(self).items():
      if name in ("epochs", "minibatches"):
        valid, what = value is not None and value > 0, "> 0"
      elif name in ("clip", "value_clip", "target_kl"):  # False for NaN, too
        valid, what = value is None or value > 0, "> 0, or None for off"
      elif name in ("discount", "gae_lambda"):
        valid, what = 0 <= value <= 1, "in [0, 1]"
      else:
        continue
      if not valid:
        raise ValueError(f"ppo.{name} must be {what}, got {value}.")


# One step on the sampled returns less the critic's values.
REINFORCE = Settings(
  epochs=1,
  minibatches=1,
  clip=None,
  value_clip=None,
  discount=1.0,
  gae_lambda=1.0,
  leave_one_out=False,
  whiten=False,
  target_kl=None,
)


def token_rewards(
  rewards: jax.Array, kl: jax.Array | None, mask: jax.Array
) -> jax.Array:
  """What every objective pays at every token.

  Args:
    rewards: [..., m] float32, of whole responses.
    kl: [..., T] float32, log-ratio of each token, nats; None leaves the KL out.
    mask: [..., T] bool, True up to and including EOS.

  Returns:
    [..., T, K] float32: rewards at the last token, log-ratios where they are.
  """
  paid = _last(mask)[..., None] * rewards[..., None, :]
  if kl is None:
    return paid
  cost = jnp.where(mask, kl, 0)[..., None]
  return jnp.concatenate([paid, cost], axis=-1)


def less_other_samples(
  rewards: jax.Array, mask: jax.Array, num_samples: int
) -> jax.Array:
  """Takes off, at the last token, what the prompt's other samples got.

  A constant to the response, so that its policy gradient stays what it is. What
  prompts have in common with their samples is gone from the first step on, and
  the critic need not know it: where it knows nothing, values of 0 leave
  REINFORCE's leave-one-out baseline.

  Args:
    rewards: [G, R, T, K] float32, the samples of a prompt side by side.
    mask: [G, R, T] bool.
    num_samples: N, at least 2.

  Returns:
    [G, R, T, K] float32.
  """
  total = rewards.sum(-2)
  by_prompt = total.reshape(total.shape[0], -1, num_samples, total.shape[-1])
  others = by_prompt.sum(2, keepdims=True) - by_prompt
  others = others.reshape(total.shape) / (num_samples - 1)
  return rewards - _last(mask)[..., None] * others[..., None, :]


def _last(mask: jax.Array) -> jax.Array:
  """A row's last token: the next one is masked, or there is none."""
  after = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], -1)
  return mask & ~after


def generalised_advantages(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  discount: float,
  gae_lambda: float,
) -> jax.Array:
  """Advantages of every token for every objective.

  A_t = sum_k (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t,
  with nothing beyond the end. A response that was cut at the length limit has
  ended, too: its reward is that of the text as it is.

  Args:
    rewards: [..., T, K] float32, 0 where masked.
    values: [..., T, K] float32, V_t before token t is chosen; anything finite
      where masked.
    mask: [..., T] bool, True up to and including EOS.
    discount: gamma.
    gae_lambda: lambda.

  Returns:
    [..., T, K] float32, 0 where masked. Adding the values gives the critic's
    targets.
  """
  inside = mask[..., None]
  values = jnp.where(inside, values, 0)
  following = jnp.concatenate(
    [values[..., 1:, :], jnp.zeros_like(values[..., :1, :])], axis=-2
  )
  deltas = jnp.where(inside, rewards + discount * following - values, 0)

  def backwards(later, delta):
    advantage = delta + discount * gae_lambda * later
    return advantage, advantage

  # Masked deltas are 0, so that nothing reaches back over a row's end.
  _, advantages = jax.lax.scan(
    backwards,
    jnp.zeros_like(deltas[..., 0, :]),
    jnp.moveaxis(deltas, -2, 0),
    reverse=True,
  )
  return jnp.moveaxis(advantages, 0, -2)


def scalarise(
  advantages: jax.Array, weights: jax.Array, alpha: jax.Array
) -> jax.Array:
  """The weighting's combination of the objectives' advantages.

  Args:
    advantages: [G, R, T, K] float32; where K = m + 1 the last is the KL's.
    weights: [G, m] float32, or [G, R, m] of each response.
    alpha: [G] float32 in [0, 1].

  Returns:
    [G, R, T] float32, (1 - alpha) sum_i w_i A_i - alpha A_kl.
  """
  if weights.ndim == 2:
    weights = weights[:, None]
  m = weights.shape[-1]
  alpha = alpha[:, None, None]
  # Multiply-adds in float32: an einsum rounds to bfloat16 on some devices.
  reward = (advantages[..., :m] * weights[:, :, None]).sum(-1)
  total = (1 - alpha) * reward
  if advantages.shape[-1] > m:
    total = total - alpha * advantages[..., m]
  return total


def whiten(advantages: jax.Array, mask: jax.Array) -> jax.Array:
  """Advantages of mean 0 and deviation 1 over the tokens of all weightings.

  Over all, because the weightings' shares of the objective would change if each
  were scaled by itself. Advantages are [...] float32, 0 where masked.
  """
  count = jnp.maximum(mask.sum(), 1)
  centred = jnp.where(
    mask, advantages - masked_sum(advantages, mask) / count, 0
  )
  deviation = jnp.sqrt((centred**2).sum() / count)
  return centred / (deviation + 1e-8)


class PolicyLoss(NamedTuple):
  """Sums over tokens, so that microbatches add up exactly."""

  loss: jax.Array  # [] float32, of -min(ratio A, clipped ratio A)
  clipped: jax.Array  # [] float32, tokens whose ratio is out of range
  kl: jax.Array  # [] float32, nats, of the old policy from the present one


def policy_loss(
  logp: jax.Array,
  old_logp: jax.Array,
  mask: jax.Array,
  advantages: jax.Array,
  clip: float | None,
) -> PolicyLoss:
  """The clipped surrogate.

  Args:
    logp: [..., T] float32, nats, of the sampled tokens under the policy.
    old_logp: [..., T] float32, under the policy that sampled them.
    mask: [..., T] bool.
    advantages: [..., T] float32, constants.
    clip: half the width of the ratio's range; None is off.
  """
  # Where masked, a ratio of 1: an infinity would turn its gradient into NaN.
  log_ratio = jnp.where(mask, logp - jax.lax.stop_gradient(old_logp), 0)
  ratio = jnp.exp(log_ratio)
  advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0))
  gain = ratio * advantages
  clipped = jnp.zeros([], jnp.float32)
  if clip is not None:
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip)
    gain = jnp.minimum(gain, bounded * advantages)
    clipped = (bounded != ratio).sum().astype(jnp.float32)
  return PolicyLoss(
    loss=-gain.sum(),
    clipped=jax.lax.stop_gradient(clipped),
    kl=jax.lax.stop_gradient((ratio - 1 - log_ratio).sum()),
  )


def value_loss(
  values: jax.Array,
  old_values: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  clip: float | None,
) -> jax.Array:
  """Half the squared error of the values, summed over tokens and objectives.

  Args:
    values: [..., T, K] float32.
    old_values: [..., T, K] float32, those that the advantages were made with.
    targets: [..., T, K] float32, constants: advantages + old_values.
    mask: [..., T] bool.
    clip: the larger of the errors of a value and of the value kept within
      `clip` of the old one counts; None is off.

  Returns:
    [] float32.
  """
  targets = jax.lax.stop_gradient(targets)
  error = (values - targets) ** 2
  if clip is not None:
    old_values = jax.lax.stop_gradient(old_values)
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    error = jnp.maximum(error, (near - targets) ** 2)
  return 0.5 * masked_sum(error, mask[..., None])


def explained_variance(
  values: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
  """1 - Var(targets - values) / Var(targets) of each objective: [K] float32.

  Of values and targets [..., T, K] float32 where the mask [..., T] is True.
  1 is perfect, 0 no better than the mean; 0 where the targets do not vary.
  """
  axes = tuple(range(mask.ndim))
  inside = mask[..., None]
  count = jnp.maximum(mask.sum(), 1)

  def variance(x):
    mean = masked_sum(x, inside, axes) / count
    centred = x - mean.reshape((1,) * mask.ndim + (-1,))
    return masked_sum(centred**2, inside, axes) / count

  total = variance(targets)
  varies = total > 1e-12
  unexplained = variance(targets - values) / jnp.where(varies, total, 1)
  return jnp.where(varies, 1 - unexplained, 0)

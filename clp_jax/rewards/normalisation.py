"""Per-objective normalisation of rewards, and its statistics."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class RewardStats:
  """Moments of each reward; part of the train state."""

  count: jax.Array  # [m] float32, samples seen
  mean: jax.Array  # [m] float32
  m2: jax.Array  # [m] float32, summed squared deviations from the mean

  @classmethod
  def empty(cls, num_rewards: int) -> "RewardStats":
    """No samples seen yet."""
    # Three arrays, because a donated buffer can be given away only once.
    return cls(*(jnp.zeros([num_rewards], jnp.float32) for _ in range(3)))

  def update(self, rewards: jax.Array, updated: jax.Array) -> "RewardStats":
    """Adds samples (Chan et al. 1979: stable for any offset).

    Args:
      rewards: [..., m] float32.
      updated: [m] bool, False leaves an objective's moments as they are.
    """
    rewards = rewards.reshape(-1, rewards.shape[-1])
    n = jnp.float32(rewards.shape[0])
    mean = rewards.mean(axis=0)
    m2 = ((rewards - mean[None]) ** 2).sum(axis=0)
    total = self.count + n
    delta = mean - self.mean
    new = RewardStats(
      count=total,
      mean=self.mean + delta * (n / total),
      m2=self.m2 + m2 + delta**2 * (self.count * n / total),
    )
    return jax.tree.map(lambda a, b: jnp.where(updated, a, b), new, self)

  def deviation(self) -> jax.Array:
    """[m] standard deviations; 1 where a reward never varied."""
    variance = self.m2 / jnp.maximum(self.count, 1)
    varies = variance > 1e-12
    return jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 1)


def normalise(
  rewards: jax.Array, stats: RewardStats, enabled: jax.Array
) -> jax.Array:
  """(reward - mean) / deviation for the objectives that ask for it.

  Args:
    rewards: [..., m] float32.
    stats: moments of the m rewards.
    enabled: [m] bool, False leaves a reward as it is.

  Returns:
    [..., m] float32.
  """
  shape = (1,) * (rewards.ndim - 1) + (-1,)
  mean = stats.mean.reshape(shape)
  deviation = stats.deviation().reshape(shape)
  return jnp.where(
    enabled.reshape(shape), (rewards - mean) / deviation, rewards
  )

"""What an update learns from: a rollout and its rewards, by weighting."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from clp_jax.adaptation import Adaptation, FrontEstimate
from clp_jax.algorithms import reinforce
from clp_jax.masked import Mean, mean_of
from clp_jax.rewards.normalisation import RewardStats, normalise
from clp_jax.rollout import Rollout
from clp_jax.scalarisation import Scalarisation
from clp_jax.train.state import TrainState

Metric = Mean | jax.Array


@struct.dataclass
class Experience:
  """Responses of G weightings, the samples of a prompt side by side."""

  coefficients: jax.Array  # [G, M] float32, of the parameter sets
  encoder_input_tokens: jax.Array  # [G, B/G, S] int32
  tokens: jax.Array  # [G, R/G, T] int32
  mask: jax.Array  # [G, R/G, T] bool, True up to and including EOS
  # Both under the policies that sampled, which may lack the last update.
  logp: jax.Array  # [G, R/G, T] float32, nats; means nothing where masked
  kl: jax.Array  # [G, R/G, T] float32, log-ratio to the reference, nats
  raw_rewards: jax.Array  # [G, R/G, m] float32
  rewards: jax.Array  # [G, R/G, m] float32, normalised
  # What rewards are weighted by in the gradient: [G, m], or [G, R/G, m] where
  # it depends on the response's group.
  weights: jax.Array
  alpha: jax.Array  # [G] float32
  objective: jax.Array  # [G] float32, the weighting's value, estimated
  # What the train state holds from now on.
  reward_stats: RewardStats
  front: FrontEstimate | None

  @property
  def returns(self) -> jax.Array:
    """[G, R/G] float32, whose policy gradient is that of the value."""
    return reinforce.scalar_returns(
      self.rewards, self.kl.sum(-1), self.weights, self.alpha
    )


def gather(
  state: TrainState,
  rollout: Rollout,
  rewards: jax.Array,
  *,
  num_samples: int,
  normalisation: tuple[np.ndarray, np.ndarray],
  scalarisation: Scalarisation,
  adaptation: Adaptation | None,
) -> Experience:
  """Folds a rollout by group and scalarises its rewards.

  Args:
    state: before the update.
    rollout: R responses under G weightings.
    rewards: [R, m] float32, raw.
    num_samples: N.
    normalisation: ([m] bool normalised at all, [m] bool by running moments).
    scalarisation: of the rewards.
    adaptation: of Q, or None.
  """
  groups = rollout.coefficients.shape[0]

  def by_group(x):
    return x.reshape(groups, -1, *x.shape[1:])

  normalised, running = normalisation
  raw, mask = by_group(rewards), by_group(rollout.mask)
  assert rollout.ref_logp is not None  # scored by now
  assert state.reward_stats is not None  # None is supervised training's
  stats = state.reward_stats.update(raw, jnp.asarray(running))
  rewards = normalise(raw, stats, jnp.asarray(normalised))
  # Of the policy that sampled, and not of the state's, which may be an update
  # further: a token's price, like its reward, is known once it is sampled, and
  # PPO's ratio corrects for what has changed since.
  kl = jnp.where(mask, by_group(rollout.logp - rollout.ref_logp), 0)
  weights, alpha = rollout.weighting
  front = state.front
  if adaptation is not None and front is not None:
    front = adaptation.update(front, weights, raw.mean(1))
  scalar = scalarisation.value(rewards.mean(1), weights)
  return Experience(
    coefficients=rollout.coefficients,
    encoder_input_tokens=by_group(rollout.encoder_input_tokens),
    tokens=by_group(rollout.tokens),
    mask=mask,
    logp=by_group(rollout.logp),
    kl=kl,
    raw_rewards=raw,
    rewards=rewards,
    weights=scalarisation.response_weights(rewards, weights, num_samples),
    alpha=alpha,
    objective=(1 - alpha) * scalar - alpha * kl.sum(-1).mean(1),
    reward_stats=stats,
    front=front,
  )


def metrics(experience: Experience) -> dict[str, Metric]:
  """What every algorithm logs of a step's responses; see `with_names`."""
  found: dict[str, Metric] = {
    "return": mean_of(experience.objective),
    "kl": mean_of(experience.kl.sum(-1)),
    "length": mean_of(experience.mask.sum(-1)),
    "alpha": mean_of(experience.alpha),
  }
  for i in range(experience.raw_rewards.shape[-1]):
    found[f"reward/{i}"] = mean_of(experience.raw_rewards[..., i])
  return found


def with_names(
  metrics: Mapping[str, Metric], objectives: Sequence[str]
) -> dict[str, Metric]:
  """Puts the m names where a program's metrics, whose keys end in "/<number>",
  have the objectives' numbers.

  A name in a program would be compiled into it: runs of other objectives could
  not take it from JAX's cache.
  """

  def named(key: str) -> str:
    path, _, last = key.rpartition("/")
    return f"{path}/{objectives[int(last)]}" if last.isdigit() else key

  return {named(key): value for key, value in metrics.items()}

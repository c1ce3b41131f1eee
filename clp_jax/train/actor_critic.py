"""The learner with a critic: PPO, and REINFORCE with a learned baseline.

One program, without a transfer to the host in it:
1. the policies are run once more, for the critic's values of every token and
   for the old log-probabilities; with rollout.ahead those are decoding's, since
   the policies have learned from a step since they sampled;
2. advantages, for each objective, then scalarised by the weighting;
3. a scan over epochs x minibatches. A minibatch has as many prompts of every
   weighting, with all of their samples, and takes one step of the policies'
   optimizer and one of the critic's. Once the policies are too far from those
   that sampled, what remains of the scan changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from clp_jax import critic as critic_lib
from clp_jax import keys, sharding
from clp_jax.algorithms import ppo
from clp_jax.masked import Mean, add, mean_of
from clp_jax.models.decoding import TokenScores
from clp_jax.train.experience import Experience
from clp_jax.train.gradients import accumulate, map_parts
from clp_jax.train.state import TrainState, apply_gradient

Params = Any
Batch = dict[str, jax.Array]  # [G, prompts or responses of a group, ...]
Score = Callable[[Params, Batch], TokenScores]  # of the policies of `params`
KL = "ppo/approximate_kl"
METRICS = ("loss", "critic/loss", "ppo/clip_fraction", KL, "gradient_norm")


class _Carry(NamedTuple):
  state: TrainState
  stopped: jax.Array  # [] bool
  metrics: dict[str, Mean]  # METRICS, over the minibatches learned from


@dataclasses.dataclass(frozen=True)
class ActorCritic:
  """Learns as algorithms/ppo.py says.

  Attributes:
    score, optimizer, num_samples, microbatches: as Reinforce's; a minibatch is
      cut into microbatches.
    critic_optimizer: that made `state.critic.opt_state`.
    settings: of PPO.
    values_kl: the critic has a value for the KL: it can have a weight.
    rows: where the rows of a minibatch lie.
    ahead: the responses are of the policies before the last update.
  """

  score: Callable[..., TokenScores]
  optimizer: optax.GradientTransformation
  critic_optimizer: optax.GradientTransformation
  settings: ppo.Settings
  values_kl: bool
  num_samples: int
  microbatches: int
  rows: NamedSharding
  ahead: bool = False

  def __call__(
    self, state: TrainState, experience: Experience, reference: Params
  ) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
    """The three steps of the module, a pure function as `Reinforce` is."""
    critic, settings, mask = state.critic, self.settings, experience.mask
    assert critic is not None

    def score(params, batch):
      return self.score(params, reference, experience.coefficients, batch)

    def before(batch):
      scores = score(state.params, batch)
      values = critic_lib.values(critic.params, scores.states)
      return {"logp": scores.logp, "values": values}, scores.entropy

    batch = {
      "encoder_input_tokens": experience.encoder_input_tokens,
      "tokens": experience.tokens,
    }
    sampled, entropy = map_parts(
      before, batch, settings.minibatches * self.microbatches
    )
    advantages, targets = self._targets(experience, sampled["values"])
    batch |= sampled
    if self.ahead:
      # The state's policies are not those that sampled: with their
      # log-probabilities every ratio would start at 1 and correct nothing.
      batch["logp"] = experience.logp
    batch |= {"mask": mask, "advantages": advantages, "targets": targets}
    _, _, key = keys.of_step(state.key, state.step)
    last, _ = jax.lax.scan(
      functools.partial(self._learn, score, batch),
      _Carry(
        state,
        jnp.asarray(False),
        {name: Mean(jnp.float32(0), jnp.float32(0)) for name in METRICS},
      ),
      minibatches(key, settings, *experience.encoder_input_tokens.shape[:2]),
    )
    metrics: dict[str, Mean | jax.Array] = {
      name: last.metrics[name]
      for name in METRICS
      if settings != ppo.REINFORCE or not name.startswith("ppo/")
    }
    metrics["entropy"] = mean_of(entropy, mask)
    explained = ppo.explained_variance(sampled["values"], targets, mask)
    for i in range(experience.rewards.shape[-1]):
      metrics[f"critic/explained_variance/{i}"] = explained[i]
    if self.values_kl:
      metrics["critic/explained_variance/kl"] = explained[-1]
    if settings != ppo.REINFORCE:
      metrics["ppo/updates"] = last.metrics["loss"].count
    return last.state, metrics

  def _targets(
    self, experience: Experience, values: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """([G, R/G, T] advantages, [G, R/G, T, K] what the critic shall say)."""
    settings, mask = self.settings, experience.mask
    rewards = ppo.token_rewards(
      experience.rewards, experience.kl if self.values_kl else None, mask
    )
    if settings.leave_one_out:
      rewards = ppo.less_other_samples(rewards, mask, self.num_samples)
    by_objective = ppo.generalised_advantages(
      rewards,
      values,
      mask,
      discount=settings.discount,
      gae_lambda=settings.gae_lambda,
    )
    advantages = ppo.scalarise(
      by_objective, experience.weights, experience.alpha
    )
    if settings.whiten:
      advantages = ppo.whiten(advantages, mask)
    return advantages, by_objective + values

  def _learn(
    self, score: Score, batch: Batch, carry: _Carry, order: jax.Array
  ) -> tuple[_Carry, None]:
    """Learns from the minibatch of the prompts in `order` [G, b]."""
    state = carry.state
    assert state.critic is not None
    prompts = batch["encoder_input_tokens"].shape[1]
    part = {
      name: _take(x, order, prompts, self.rows) for name, x in batch.items()
    }
    responses = part["mask"].shape[0] * part["mask"].shape[1]
    tokens = part["mask"].sum().astype(jnp.float32)
    loss = functools.partial(self._loss, score, responses, tokens)
    (_, sums), (gradient, critic_gradient) = accumulate(
      jax.value_and_grad(loss, has_aux=True),
      (state.params, state.critic.params),
      part,
      self.microbatches,
    )
    sums["gradient_norm"] = optax.tree.norm(gradient)
    stopped = carry.stopped
    if self.settings.target_kl is not None:
      stopped = stopped | (sums[KL] > self.settings.target_kl)
    taken = ~stopped
    learned = dataclasses.replace(
      apply_gradient(state, gradient, self.optimizer, state.step),
      critic=apply_gradient(
        state.critic, critic_gradient, self.critic_optimizer, state.step
      ),
    )
    state = jax.tree.map(
      lambda new, old: jnp.where(taken, new, old), learned, state
    )
    found = {
      name: Mean(jnp.where(taken, x, 0), taken.astype(jnp.float32))
      for name, x in sums.items()
    }
    return _Carry(state, stopped, add(carry.metrics, found)), None

  def _loss(
    self,
    score: Score,
    responses: int,
    tokens: jax.Array,
    both: tuple[Params, Params],
    part: Batch,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The losses of (policies', critic's) parameters and what is logged.

    Sums over the whole minibatch's counts, so that microbatches add up. The
    critic reads the policies' states as constants: neither loss has a gradient
    in the other's parameters.
    """
    params, critic_params = both
    scores = score(params, part)
    policy = ppo.policy_loss(
      scores.logp,
      part["logp"],
      part["mask"],
      part["advantages"],
      self.settings.clip,
    )
    values = ppo.value_loss(
      critic_lib.values(critic_params, scores.states),
      part["values"],
      part["targets"],
      part["mask"],
      self.settings.value_clip,
    )
    sums = {
      "loss": policy.loss / responses,
      "critic/loss": values / tokens,
      "ppo/clip_fraction": policy.clipped / tokens,
      KL: policy.kl / tokens,
    }
    return sums["loss"] + sums["critic/loss"], sums


def minibatches(
  key: jax.Array, settings: ppo.Settings, groups: int, prompts: int
) -> jax.Array:
  """The prompts of every minibatch, shuffled anew each epoch.

  Args:
    key: of this step.
    settings: epochs and minibatches.
    groups: G.
    prompts: of a group.

  Returns:
    [epochs * minibatches, G, prompts / minibatches] int32.
  """
  keys = jax.random.split(key, (settings.epochs, groups))
  order = jax.vmap(jax.vmap(lambda k: jax.random.permutation(k, prompts)))(keys)
  order = order.reshape(settings.epochs, groups, settings.minibatches, -1)
  order = order.swapaxes(1, 2)
  return order.reshape(-1, *order.shape[2:])


def _take(
  x: jax.Array, order: jax.Array, prompts: int, rows: NamedSharding
) -> jax.Array:
  """Rows of the prompts in `order` [G, b], cut over the data axis again.

  x: [G, prompts * n, ...], the n rows of a prompt side by side.
  """
  groups, length = x.shape[:2]
  by_prompt = x.reshape(groups, prompts, length // prompts, *x.shape[2:])
  taken = jax.vmap(lambda group, index: group[index])(by_prompt, order)
  flat = taken.reshape(-1, *x.shape[2:])
  # Otherwise every device would work on all of the minibatch; as it does where
  # the data axis does not divide it.
  if flat.shape[0] % sharding.row_shards(rows.mesh) == 0:
    flat = jax.lax.with_sharding_constraint(flat, rows)
  return flat.reshape(groups, -1, *x.shape[2:])

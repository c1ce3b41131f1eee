"""The update with a critic: PPO, and REINFORCE with a learned baseline.

One program, without a transfer to the host in it:
1. the policies that sampled are run once more, for their log-probabilities and
   for the critic's values of every token;
2. advantages, for each objective, then scalarised by the weighting;
3. a scan over epochs x minibatches. A minibatch has as many prompts of every
   weighting, with all of their samples, and takes one step of the policies'
   optimizer and one of the critic's. Once the policies are too far from those
   that sampled, what remains of the scan changes nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from clp_jax import critic as critic_lib
from clp_jax import sharding
from clp_jax.algorithms import ppo
from clp_jax.bank import Bank
from clp_jax.critic import CriticState
from clp_jax.masked import Mean, add, mean_of
from clp_jax.rollout import score_groups
from clp_jax.train import experience as experience_lib
from clp_jax.train.experience import Experience
from clp_jax.train.gradients import accumulate, map_parts
from clp_jax.train.optimizer import at_step
from clp_jax.train.state import TrainState, step_keys

Params = Any
Batch = dict[str, jax.Array]  # [G, prompts or responses of a group, ...]


class _Carry(NamedTuple):
  params: Params
  opt_state: optax.OptState
  critic: CriticState
  stopped: jax.Array  # [] bool
  metrics: dict[str, Mean]


def update(
  state: TrainState,
  experience: Experience,
  reference: Params,
  *,
  bank: Bank,
  coefficients: jax.Array,
  optimizer: optax.GradientTransformation,
  critic_optimizer: optax.GradientTransformation,
  settings: ppo.Settings,
  values_kl: bool,
  num_samples: int,
  temperature: float,
  microbatches: int,
  rows: NamedSharding,
) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
  """Learns from a rollout, a pure function.

  Args:
    state: before the update.
    experience: of R responses under G weightings.
    reference: an ordinary T5's parameters; what the bank freezes.
    bank: that makes the policies.
    coefficients: [G, M] float32, of the parameter sets.
    optimizer: that made `state.opt_state`.
    critic_optimizer: that made `state.critic.opt_state`.
    settings: of PPO.
    values_kl: the critic has a value for the KL: it can have a weight.
    num_samples: N.
    temperature: of the policy, as in the rollout.
    microbatches: parts of a minibatch whose gradients are accumulated.
    rows: where the rows of a minibatch lie.

  Returns:
    (state after the update, metrics).
  """
  critic = state.critic
  assert critic is not None

  def score(params, batch):
    return score_groups(
      bank,
      params,
      reference,
      coefficients,
      batch["encoder_input_tokens"],
      batch["tokens"],
      num_samples=num_samples,
      temperature=temperature,
    )

  def before(batch):
    scores = score(state.params, batch)
    return {
      "logp": scores.logp,
      "entropy": scores.entropy,
      "values": critic_lib.values(critic.params, scores.states),
    }

  batch = {
    "encoder_input_tokens": experience.encoder_input_tokens,
    "tokens": experience.tokens,
  }
  mask = experience.mask
  sampled = map_parts(before, batch, settings.minibatches * microbatches)
  rewards = ppo.token_rewards(
    experience.rewards, experience.kl if values_kl else None, mask
  )
  if settings.leave_one_out:
    rewards = ppo.less_other_samples(rewards, mask, num_samples)
  by_objective = ppo.generalised_advantages(
    rewards,
    sampled["values"],
    mask,
    discount=settings.discount,
    gae_lambda=settings.gae_lambda,
  )
  advantages = ppo.scalarise(by_objective, experience.weights, experience.alpha)
  if settings.whiten:
    advantages = ppo.whiten(advantages, mask)
  targets = by_objective + sampled["values"]
  batch |= {
    "mask": mask,
    "logp": sampled["logp"],
    "values": sampled["values"],
    "advantages": advantages,
    "targets": targets,
  }

  def loss_fn(both, part, responses, tokens):
    params, critic_params = both
    scores = score(params, part)
    policy = ppo.policy_loss(
      scores.logp,
      part["logp"],
      part["mask"],
      part["advantages"],
      settings.clip,
    )
    values = ppo.value_loss(
      critic_lib.values(critic_params, scores.states),
      part["values"],
      part["targets"],
      part["mask"],
      settings.value_clip,
    )
    # Sums over the whole minibatch's counts, so that microbatches add up. The
    # critic reads the policies' states as constants: neither loss has a
    # gradient in the other's parameters.
    sums = {
      "loss": policy.loss / responses,
      "value_loss": values / tokens,
      "clipped": policy.clipped / tokens,
      "kl": policy.kl / tokens,
    }
    return sums["loss"] + sums["value_loss"], sums

  def learn(carry: _Carry, order: jax.Array) -> tuple[_Carry, None]:
    part = {
      name: _take(x, order, experience.encoder_input_tokens.shape[1], rows)
      for name, x in batch.items()
    }
    responses = part["mask"].shape[0] * part["mask"].shape[1]
    tokens = part["mask"].sum().astype(jnp.float32)

    def value_and_grad(both, microbatch):
      return jax.value_and_grad(loss_fn, has_aux=True)(
        both, microbatch, responses, tokens
      )

    (_, sums), (gradient, critic_gradient) = accumulate(
      value_and_grad, (carry.params, carry.critic.params), part, microbatches
    )
    stopped = carry.stopped
    if settings.target_kl is not None:
      stopped = stopped | (sums["kl"] > settings.target_kl)
    params, opt_state = _step(
      optimizer, gradient, carry.opt_state, carry.params, state.step
    )
    critic_params, critic_opt_state = _step(
      critic_optimizer,
      critic_gradient,
      carry.critic.opt_state,
      carry.critic.params,
      state.step,
    )
    sums["gradient_norm"] = optax.tree.norm(gradient)
    taken = ~stopped
    found = {
      name: Mean(jnp.where(taken, x, 0), taken.astype(jnp.float32))
      for name, x in sums.items()
    }
    new = (params, opt_state, CriticState(critic_params, critic_opt_state))
    old = (carry.params, carry.opt_state, carry.critic)
    params, opt_state, kept_critic = jax.tree.map(
      lambda a, b: jnp.where(taken, a, b), new, old
    )
    metrics = add(carry.metrics, found)
    return _Carry(params, opt_state, kept_critic, stopped, metrics), None

  _, _, key = step_keys(state.key, state.step)
  names = ("loss", "value_loss", "clipped", "kl", "gradient_norm")
  last, _ = jax.lax.scan(
    learn,
    _Carry(
      state.params,
      state.opt_state,
      critic,
      jnp.asarray(False),
      {name: Mean(jnp.float32(0), jnp.float32(0)) for name in names},
    ),
    minibatches(key, settings, *experience.encoder_input_tokens.shape[:2]),
  )
  metrics = experience_lib.metrics(experience) | {
    "loss": last.metrics["loss"],
    "gradient_norm": last.metrics["gradient_norm"],
    "entropy": mean_of(sampled["entropy"], mask),
    "critic/loss": last.metrics["value_loss"],
  }
  explained = ppo.explained_variance(sampled["values"], targets, mask)
  for i in range(experience.rewards.shape[-1]):
    metrics[f"critic/explained_variance/{i}"] = explained[i]
  if values_kl:
    metrics["critic/explained_variance/kl"] = explained[-1]
  if settings != ppo.REINFORCE:
    metrics |= {
      "ppo/clip_fraction": last.metrics["clipped"],
      "ppo/approximate_kl": last.metrics["kl"],
      "ppo/updates": last.metrics["loss"].count,
    }
  new_state = dataclasses.replace(
    state,
    step=state.step + 1,
    params=last.params,
    opt_state=last.opt_state,
    critic=last.critic,
    reward_stats=experience.reward_stats,
    front=experience.front,
  )
  return new_state, metrics


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


def _step(
  optimizer: optax.GradientTransformation,
  gradient: Params,
  opt_state: optax.OptState,
  params: Params,
  step: jax.Array,
) -> tuple[Params, optax.OptState]:
  updates, opt_state = optimizer.update(
    gradient, at_step(opt_state, step), params
  )
  return optax.apply_updates(params, updates), opt_state

"""The programs of a step of multi-objective finetuning, which moft.py takes.

`make_programs` jits pure functions, which those below it, and rollout.py, make
of a config.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from clp_jax import build, keys, saved_params, sharding
from clp_jax import critic as critic_lib
from clp_jax import rollout as rollout_lib
from clp_jax.bank import Bank
from clp_jax.critic import CriticState
from clp_jax.models import families
from clp_jax.prompting import Prompts
from clp_jax.rewards.normalisation import RewardStats
from clp_jax.rollout import Rollout
from clp_jax.train import experience as experience_lib
from clp_jax.train import stage
from clp_jax.train.actor_critic import ActorCritic
from clp_jax.train.optimizer import rl_critic_optimizer, rl_optimizer
from clp_jax.train.reinforce import Reinforce
from clp_jax.train.state import TrainState, init_state
from clp_jax.weightings import Weighting

Params = Any


@dataclasses.dataclass(frozen=True)
class Programs(stage.Programs):
  """A stage's, whose update takes (state, rollout, rewards, reference)."""

  # (params, reference, prompts, key, step, front) -> Rollout
  rollout: Callable[..., Rollout]
  # (reference, prompts, tokens, mask) -> ref_logp
  reference: Callable[..., jax.Array]
  rollout_shardings: Rollout  # of a scored one
  documents: jax.ShapeDtypeStruct  # [B, S] int32, of a step
  ahead: bool  # rollout.ahead

  def abstract_state(self, reference: Params, key: jax.Array) -> TrainState:
    """That of every stage, with the rollout that was sampled ahead."""
    state = super().abstract_state(reference, key)
    if not self.ahead:
      return state
    pending = jax.eval_shape(
      self.scored_rollout, state, reference, self.documents, np.int32(0)
    )
    return dataclasses.replace(
      state,
      pending=saved_params.abstract_like(pending, self.rollout_shardings),
    )

  def scored_rollout(
    self,
    state: TrainState,
    reference: Params,
    prompts: jax.Array,
    step: np.int32,
  ) -> Rollout:
    """Starts the first two programs; the samples are ready before the scores.

    Args:
      state: whose parameters, key and front are read.
      reference: an ordinary model's parameters.
      prompts: [B, S] int32 documents.
      step: that the randomness is of.
    """
    rollout = self.rollout(
      state.params, reference, prompts, state.key, step, state.front
    )
    return dataclasses.replace(
      rollout,
      ref_logp=self.reference(reference, prompts, rollout.tokens, rollout.mask),
    )


def make_programs(
  config: ml_collections.ConfigDict,
  model_config: families.Config,
  mesh: Mesh,
  allowed: np.ndarray,
  prompts: Prompts | None = None,
) -> Programs:
  """Builds the programs that a config describes, for a mesh.

  Args:
    config: a valid training config.
    model_config: of the policy and the reference.
    mesh: from `sharding.make_mesh`.
    allowed: [V] bool, tokens that may be sampled.
    prompts: from `build.prompts`; None where the config has no prompting.

  Returns:
    The programs, not yet compiled.

  Raises:
    ValueError: when the config asks for prompts and there are none.
  """
  if config.prompting.style != "none" and prompts is None:
    raise ValueError(
      f"prompting.style = {config.prompting.style} needs the prompts that "
      "build.prompts() makes with the model's vocabulary."
    )
  # Equal placements of the state and of rows, so callers need not know of it.
  mesh = sharding.fold_groups(mesh, config.rollout.weightings)
  on_mesh = functools.partial(sharding.on_mesh, mesh, fsdp=config.mesh.fsdp)
  bank = build.bank(config, model_config)
  scoring = {
    "num_samples": config.rollout.samples,
    "temperature": config.rollout.temperature,
    "allowed": allowed,
  }
  model = families.build(model_config)
  reference_at = sharding.param_shardings(
    mesh, model.axes(), model.abstract(), fsdp=config.mesh.fsdp
  )
  rows: Any = sharding.row_sharding(mesh)  # stand where arrays will
  whole: Any = sharding.replicated(mesh)
  rollout_at = Rollout(
    encoder_input_tokens=rows,
    tokens=rows,
    mask=rows,
    logp=rows,
    weighting=Weighting(whole, whole),
    coefficients=whole,
  )
  scored_at = dataclasses.replace(rollout_at, ref_logp=rows)
  shared = stage.make_programs(
    mesh,
    model,
    _init(config, bank),
    _update(config, bank, rows, scoring),
    axes=bank.logical_axes,
    data=(scored_at, rows, reference_at),
    fsdp=config.mesh.fsdp,
  )
  params_at = shared.state_shardings.params
  return Programs(
    **vars(shared),
    rollout=jax.jit(
      on_mesh(rollout_lib.sampler(config, bank, prompts, allowed)),
      in_shardings=(params_at, reference_at, rows, whole, whole, whole),
      out_shardings=rollout_at,
    ),
    reference=jax.jit(
      on_mesh(functools.partial(rollout_lib.score_reference, bank, **scoring)),
      in_shardings=(reference_at, rows, rows, rows),
      out_shardings=rows,
    ),
    rollout_shardings=scored_at,
    documents=jax.ShapeDtypeStruct(
      (config.rollout.prompts, config.data.source_length), jnp.int32
    ),
    ahead=bool(config.rollout.ahead),
  )


def _init(config: ml_collections.ConfigDict, bank: Bank) -> Callable:
  distribution = build.distribution(config)
  adaptation = build.adaptation(config)
  optimizer = rl_optimizer(config, bank.logical_axes)

  def init(reference, key):
    params = bank.init(reference, jax.random.fold_in(key, keys.BANK))
    stats = RewardStats.empty(distribution.num_rewards)
    scales = bank.update_scales(reference)
    state = init_state(params, optimizer, key, stats, scales)
    if adaptation is not None:
      state = dataclasses.replace(state, front=adaptation.empty())
    if build.has_critic(config):
      values = critic_lib.init_params(
        jax.random.fold_in(key, keys.CRITIC),
        bank.reference_config.emb_dim,
        config.critic.hidden,
        distribution.num_rewards + distribution.penalises_kl,
      )
      critic = CriticState(values, rl_critic_optimizer(config).init(values))
      state = dataclasses.replace(state, critic=critic)
    return state

  return init


def _update(
  config: ml_collections.ConfigDict,
  bank: Bank,
  rows: NamedSharding,
  scoring: dict[str, Any],
) -> Callable:
  num_samples = config.rollout.samples
  shared: dict[str, Any] = {
    "score": functools.partial(rollout_lib.score_groups, bank, **scoring),
    "optimizer": rl_optimizer(config, bank.logical_axes),
    "num_samples": num_samples,
    "microbatches": config.train.microbatches,
  }
  learn: Reinforce | ActorCritic
  if build.has_critic(config):
    learn = ActorCritic(
      **shared,
      critic_optimizer=rl_critic_optimizer(config),
      settings=build.ppo_settings(config),
      values_kl=build.distribution(config).penalises_kl,
      rows=rows,
      ahead=bool(config.rollout.ahead),
    )
  else:
    learn = Reinforce(**shared, baseline=config.reinforce.baseline)
  gather = functools.partial(
    experience_lib.gather,
    num_samples=num_samples,
    normalisation=normalisation_masks(config),
    scalarisation=build.scalarisation(config),
    adaptation=build.adaptation(config),
  )

  def update(state, rollout, rewards, reference):
    experience = gather(state, rollout, rewards)
    state, metrics = learn(state, experience, reference)
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      reward_stats=experience.reward_stats,
      front=experience.front,
    )
    return state, experience_lib.metrics(experience) | metrics

  return update


def normalisation_masks(
  config: ml_collections.ConfigDict,
) -> tuple[np.ndarray, np.ndarray]:
  """([m] bool normalised at all, [m] bool by running moments)."""
  kinds = [config.rewards[name].normalise for name in config.objectives]
  return (
    np.asarray([kind != "none" for kind in kinds]),
    np.asarray([kind == "running" for kind in kinds]),
  )

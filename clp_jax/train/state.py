"""The train state and where it lies on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from clp_jax import sharding
from clp_jax.adaptation import FrontEstimate
from clp_jax.critic import CriticState
from clp_jax.rewards.normalisation import RewardStats
from clp_jax.train.optimizer import optimizer_shardings

Tree = Any


@struct.dataclass
class TrainState:
  """All that changes during training, and all that a checkpoint holds.

  Attributes:
    step: [] int32, completed updates.
    params: what the bank trains (bank.py), float32.
    opt_state: of the optax optimizer.
    key: the run's key; only ever folded with the step, never used up.
    reward_stats: moments of the rewards, for their normalisation; None in
      supervised training.
    critic: of PPO and of a learned baseline; None without.
    front: estimate of the front, where Q is adapted to it; None without.
  """

  step: jax.Array
  params: Tree
  opt_state: optax.OptState
  key: jax.Array
  reward_stats: RewardStats | None
  critic: CriticState | None = None
  front: FrontEstimate | None = None


def step_keys(key: jax.Array, step: jax.Array) -> jax.Array:
  """Three keys of one step, for weightings, samples and the update.

  A function of the run's key and the step alone, so that a resumed run draws
  what an uninterrupted one would have drawn.
  """
  return jax.random.split(jax.random.fold_in(key, step), 3)


def state_shardings(
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  abstract_params: Tree,
  param_shardings: Tree,
  num_rewards: int = 0,
) -> TrainState:
  """A TrainState of shardings, without a critic or an estimate of a front."""
  whole: Any = sharding.replicated(mesh)  # stands where an array will
  return TrainState(
    step=whole,
    params=param_shardings,
    opt_state=optimizer_shardings(
      mesh, optimizer, abstract_params, param_shardings
    ),
    key=whole,
    reward_stats=RewardStats(whole, whole, whole) if num_rewards else None,
  )


def init_state(
  params: Tree,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  reward_stats: RewardStats | None = None,
) -> TrainState:
  """The state before the first update."""
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=key,
    reward_stats=reward_stats,
  )

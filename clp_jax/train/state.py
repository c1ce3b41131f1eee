"""The train state: its optimizer step, and where it lies on the mesh."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh

from clp_jax import critic as critic_lib
from clp_jax import sharding
from clp_jax.adaptation import FrontEstimate
from clp_jax.critic import CriticState
from clp_jax.rewards.normalisation import RewardStats
from clp_jax.rollout import Rollout
from clp_jax.train.optimizer import set_floors

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
    pending: the responses that the next step learns from, where they are
      sampled a step ahead; None without. Only between steps: what updates a
      state is given them apart.
  """

  step: jax.Array
  params: Tree
  opt_state: optax.OptState
  key: jax.Array
  reward_stats: RewardStats | None
  critic: CriticState | None = None
  front: FrontEstimate | None = None
  pending: Rollout | None = None


Trained = TypeVar("Trained", TrainState, CriticState)


def init_state(
  params: Tree,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  reward_stats: RewardStats | None = None,
  floors: Tree = None,
) -> TrainState:
  """The state before the first update; for floors see `set_floors`."""
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    params=params,
    opt_state=set_floors(optimizer.init(params), floors or {}),
    key=key,
    reward_stats=reward_stats,
  )


def apply_gradient(
  trained: Trained,
  gradient: Tree,
  optimizer: optax.GradientTransformation,
  step: jax.Array,
) -> Trained:
  """Takes one step of the optimizer; a TrainState's own `step` stays.

  Args:
    trained: a train state, or its critic.
    gradient: of its parameters.
    optimizer: that made its `opt_state`.
    step: [] int32, completed updates. The learning rate goes by them, because
      an update may take several steps, or fewer than it could.
  """

  def counts(state):
    return isinstance(state, optax.ScaleByScheduleState)

  opt_state = jax.tree.map(
    lambda state: state._replace(count=step) if counts(state) else state,
    trained.opt_state,
    is_leaf=counts,
  )
  updates, opt_state = optimizer.update(gradient, opt_state, trained.params)
  params = optax.apply_updates(trained.params, updates)
  return dataclasses.replace(trained, params=params, opt_state=opt_state)


def state_shardings(
  mesh: Mesh, abstract: TrainState, axes: Tree, *, fsdp: bool
) -> TrainState:
  """Where a train state lies: moments like their parameters, the rest whole.

  Adafactor's factored moments do so along the dimensions that they have. The
  names on the way to a moment are those on the way to its parameter.

  Args:
    mesh: the mesh.
    abstract: shapes and dtypes of the state.
    axes: logical axes of its `params`, a tuple of names for each leaf.
    fsdp: see `sharding.param_shardings`.
  """

  def placed(params, axes):
    at = sharding.param_shardings(mesh, axes, params, fsdp=fsdp)
    shapes = traverse_util.flatten_dict(params)
    return {
      path: (shapes[path].shape, at)
      for path, at in traverse_util.flatten_dict(at).items()
    }

  parameters = placed(abstract.params, axes)
  if abstract.critic is not None:
    parameters |= placed(abstract.critic.params, critic_lib.logical_axes())

  def leaf(path, x):
    names = tuple(
      key.key for key in path if isinstance(key, jax.tree_util.DictKey)
    )
    if names not in parameters:
      return sharding.replicated(mesh)
    return sharding.moment_sharding(x.shape, *parameters[names])

  return jax.tree_util.tree_map_with_path(leaf, abstract)

"""The train state, its optimizer and where both lie on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax.sharding import Mesh

from clp_jax import adapters, sharding
from clp_jax.adaptation import FrontEstimate
from clp_jax.critic import CriticState
from clp_jax.rewards.normalisation import RewardStats

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


def make_schedule(
  learning_rate: float, warmup_steps: int, decay_steps: int | None
) -> optax.Schedule:
  """The learning rate at each step; see `make_optimizer`."""
  if decay_steps is None:
    if warmup_steps == 0:
      return optax.constant_schedule(learning_rate)
    return optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup_steps else learning_rate,
    peak_value=learning_rate,
    warmup_steps=warmup_steps,
    decay_steps=max(decay_steps, warmup_steps + 1),
    end_value=learning_rate / 10,
  )


def make_optimizer(
  *,
  name: str,
  learning_rate: float,
  warmup_steps: int,
  decay_steps: int | None,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Clipping, then Adam or Adafactor under the config's schedule.

  Args:
    name: "adam" or "adafactor".
    learning_rate: the peak rate.
    warmup_steps: linear from 0 over so many updates.
    decay_steps: cosine to a tenth of the rate over so many updates, warm-up
      included; None keeps it constant.
    clip_norm: of the global gradient norm.
  """
  schedule = make_schedule(learning_rate, warmup_steps, decay_steps)
  if name == "adam":
    optimizer = optax.adam(schedule)
  else:
    # t5x's finetuning settings: relative steps off, scaled by the parameter.
    optimizer = optax.adafactor(
      schedule,
      multiply_by_parameter_scale=True,
      clipping_threshold=1.0,
      momentum=None,
    )
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def rl_optimizer(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """The optimizer that a training config describes."""
  optimizer = make_optimizer(**config.optimizer)
  if config.steering == "svd_lora":
    penalty = adapters.keep_orthogonal(config.adapters.orthogonality)
    optimizer = optax.chain(penalty, optimizer)
  return optimizer


def rl_critic_optimizer(config: ml_collections.ConfigDict):
  """The critic's Adam.

  Without a warm-up, because its values must lead, and without clipping, which
  would couple the objectives.
  """
  rate, decay = config.critic.learning_rate, config.optimizer.decay_steps
  return optax.adam(make_schedule(rate, 0, decay))


def at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
  """Sets what the learning rate's schedule counts.

  The schedule is in steps of training, and a step may take several updates, or
  fewer than it could where it stops early.
  """

  def counts(path, _):
    return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"

  return optax.tree_utils.tree_set(opt_state, counts, count=step)


def optimizer_shardings(
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  abstract_params: Tree,
  param_shardings: Tree,
) -> Tree:
  """Shardings of an optimizer's state: moments lie like their parameters.

  Adafactor's factored ones do so along the dimensions that they have.
  """
  whole = sharding.replicated(mesh)
  return optax.tree_utils.tree_map_params(
    optimizer,
    lambda moment, param, s: sharding.moment_sharding(
      moment.shape, param.shape, s
    ),
    jax.eval_shape(optimizer.init, abstract_params),
    abstract_params,
    param_shardings,
    transform_non_params=lambda _: whole,
  )


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

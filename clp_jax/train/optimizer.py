"""The optimizers: clipping, then Adam or Adafactor, under a schedule.

Adafactor scales an update by statistics of a whole parameter: factored second
moments, the update's root mean square, which it clips, and the parameter's own,
which it multiplies by. A leaf that stacks M sets or L layers is M L parameters,
as t5x's Adafactor takes its `layers` and `stack` axes: here every statistic is
of each set and each layer by itself, so that one that starts, or jumps, far
from the others changes nothing of them, and scanned layers train as others do.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from clp_jax import adapters

Tree = Any
Path = tuple[Any, ...]  # of a leaf, from jax.tree_util

STACKED = ("objective", "layers")  # leading logical axes of separate parameters
FLOOR = 1e-3  # least root mean square that a parameter counts as having


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
  axes: Tree = None,
) -> optax.GradientTransformation:
  """Clipping, then Adam or Adafactor under the config's schedule.

  Args:
    name: "adam" or "adafactor".
    learning_rate: the peak rate.
    warmup_steps: linear from 0 over so many updates.
    decay_steps: cosine to a tenth of the rate over so many updates, warm-up
      included; None keeps it constant.
    clip_norm: of the global gradient norm, over all sets and layers.
    axes: logical axes of the parameters, a tuple of names for each leaf;
      Adafactor takes those in STACKED, which lead, for separate parameters.
      None: none are.
  """
  schedule = make_schedule(learning_rate, warmup_steps, decay_steps)
  if name == "adam":
    optimizer = optax.adam(schedule)
  else:
    optimizer = adafactor(schedule, _num_stacked(axes))
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def adafactor(
  schedule: optax.Schedule, stacked: Mapping[Path, int]
) -> optax.GradientTransformation:
  """Adafactor with t5x's finetuning settings, for stacked parameters.

  No momentum, no relative steps; updates are clipped to a root mean square of 1
  and multiplied by the parameter's. Without stacked leaves this is
  optax.adafactor.

  Args:
    schedule: of the learning rate.
    stacked: path of a leaf -> its leading dimensions that stack parameters; 0
      where it is not named.

  Source: Shazeer and Stern 2018 (arXiv 1804.04235).
  """
  return optax.chain(
    _scale_by_factored_rms(stacked),
    _clip_by_rms(stacked),
    optax.scale_by_learning_rate(schedule, flip_sign=False),
    _scale_by_parameter(stacked),
    optax.scale(-1.0),
  )


class ParameterScaleState(NamedTuple):
  """Of `_scale_by_parameter`.

  Attributes:
    floor: tree of the parameters' stacking dimensions, float32: the least root
      mean square that each counts as having.
  """

  floor: Tree


def set_floors(opt_state: optax.OptState, floors: Tree) -> optax.OptState:
  """Gives Adafactor the scale of parameters that start at 0.

  Such a parameter has no scale of its own, and FLOOR is that of nothing: a
  low-rank factor would move its kernel by a millionth of what the kernel's own
  training would.

  Args:
    opt_state: of any optimizer here; Adam's is returned as it is.
    floors: {path of names: array of the stacking dimensions} of those leaves.
  """

  def leaf(path, floor):
    names = tuple(key.key for key in path)
    return jnp.broadcast_to(floors.get(names, floor), floor.shape)

  def replace(state):
    if not isinstance(state, ParameterScaleState):
      return state
    return ParameterScaleState(
      jax.tree_util.tree_map_with_path(leaf, state.floor)
    )

  return jax.tree.map(
    replace, opt_state, is_leaf=lambda x: isinstance(x, ParameterScaleState)
  )


def is_adafactor(opt_state: optax.OptState) -> bool:
  """Whether a state, or its shapes, is Adafactor's."""

  def factored(state):
    return isinstance(state, optax.FactoredState)

  return any(map(factored, jax.tree.leaves(opt_state, is_leaf=factored)))


def _num_stacked(axes: Tree) -> dict[Path, int]:
  """Path of a leaf -> how many of its leading axes are in STACKED."""
  found = {}
  for path, names in jax.tree_util.tree_leaves_with_path(
    axes, is_leaf=lambda x: isinstance(x, tuple)
  ):
    found[path] = sum(name in STACKED for name in names)
    if any(name in STACKED for name in names[found[path] :]):
      raise ValueError(f"{names}: {', '.join(STACKED)} must lead.")
  return found


def _scale_by_factored_rms(
  stacked: Mapping[Path, int],
) -> optax.GradientTransformation:
  """optax's, mapped over the stacking dimensions of every leaf."""
  inner = optax.scale_by_factored_rms()
  along = optax.FactoredState(count=None, v_row=0, v_col=0, v=0)
  one = along._replace(count=0)

  def mapped(function, path, in_axes, out_axes):
    for _ in range(stacked.get(path, 0)):
      function = jax.vmap(function, in_axes, out_axes)
    return function

  def part_first(params, kind, leaves):
    """A tree of leaves that are of a kind to one of that kind, of trees."""
    outer, inner = jax.tree.structure(params), jax.tree.structure(kind)
    return jax.tree.transpose(outer, inner, leaves)

  def init(params):
    states = jax.tree_util.tree_map_with_path(
      lambda path, p: mapped(inner.init, path, 0, along)(p), params
    )
    state = part_first(params, one, states)
    return state._replace(count=jnp.zeros([], jnp.int32))

  def update(updates, state, params):
    def leaf(path, gradient, row, column, whole, param):
      own = optax.FactoredState(state.count, row, column, whole)
      function = mapped(inner.update, path, (0, along, 0), (0, along))
      return function(gradient, own, param)

    pairs = jax.tree_util.tree_map_with_path(
      leaf, updates, state.v_row, state.v_col, state.v, params
    )
    scaled, new = part_first(params, (0, one), pairs)
    return scaled, new._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformation(init, update)


def _clip_by_rms(stacked: Mapping[Path, int]) -> optax.GradientTransformation:
  """Divides what has a root mean square above 1 by it."""

  def leaf(path, update):
    return update / jnp.maximum(1.0, _rms(update, stacked.get(path, 0)))

  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(leaf, updates)
  )


def _scale_by_parameter(
  stacked: Mapping[Path, int],
) -> optax.GradientTransformation:
  """Multiplies by the parameter's root mean square, at least its floor."""

  def init(params):
    return ParameterScaleState(
      jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full(p.shape[: stacked.get(path, 0)], FLOOR), params
      )
    )

  def update(updates, state, params):
    def leaf(path, update, floor, param):
      scale = _rms(param, stacked.get(path, 0))
      return update * jnp.maximum(floor.reshape(scale.shape), scale)

    scaled = jax.tree_util.tree_map_with_path(
      leaf, updates, state.floor, params
    )
    return scaled, state

  return optax.GradientTransformation(init, update)


def _rms(x: jax.Array, stacked: int) -> jax.Array:
  """Root mean square of each stacked parameter, with dimensions kept."""
  own = tuple(range(stacked, x.ndim))
  return jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True))


def stage_optimizer(
  config: ml_collections.ConfigDict,
  settings: ml_collections.ConfigDict,
  axes: Tree,
) -> optax.GradientTransformation:
  """The config's optimizer under the schedule of a stage's own settings."""
  own = ("learning_rate", "warmup_steps", "decay_steps")
  schedule = {name: settings[name] for name in own}
  return make_optimizer(**(dict(config.optimizer) | schedule), axes=axes)


def rl_optimizer(
  config: ml_collections.ConfigDict, axes: Tree = None
) -> optax.GradientTransformation:
  """The optimizer that a training config describes; axes as of
  `make_optimizer`."""
  optimizer = make_optimizer(**config.optimizer, axes=axes)
  if config.steering == "svd_lora":
    penalty = keep_orthogonal(config.adapters.orthogonality)
    optimizer = optax.chain(penalty, optimizer)
  return optimizer


def keep_orthogonal(weight: float) -> optax.GradientTransformation:
  """Adds the gradient of weight x `adapters.orthogonality` to that of a loss.

  A step of the optimizer, so that no algorithm's loss has to know of it. The
  weight is >= 0.
  """

  def update(updates, state, params):
    gradient = jax.grad(adapters.orthogonality)(params)
    updates = jax.tree.map(lambda u, g: u + weight * g, updates, gradient)
    return updates, state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def rl_critic_optimizer(config: ml_collections.ConfigDict):
  """The critic's Adam.

  Without a warm-up, because its values must lead, and without clipping, which
  would couple the objectives.
  """
  rate, decay = config.critic.learning_rate, config.optimizer.decay_steps
  return optax.adam(make_schedule(rate, 0, decay))

"""Parameter trees of any family: made, described, stacked and taken apart."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Params = Any  # a nested dict of arrays
Axes = Any  # the same nesting with a tuple of axis names for each array
# (config, key) -> parameters boxed with their logical axes
BoxedInit = Callable[[Any, jax.Array], Params]


def init(boxed_init: BoxedInit, config: Any, key: jax.Array) -> Params:
  """Random parameters, the same whether the layers are scanned or not."""
  # Drawing all layers at once compiles half as many programs, too.
  scanned = dataclasses.replace(config, scan_layers=True)
  params = nn.unbox(boxed_init(scanned, key))
  return params if config.scan_layers else unstack_layers(params)


def abstract(boxed_init: BoxedInit, config: Any) -> Params:
  """The tree of `init` with a jax.ShapeDtypeStruct for each array."""
  return jax.tree.map(lambda leaf: leaf, _abstract(boxed_init, config))


@functools.lru_cache
def _abstract(boxed_init: BoxedInit, config: Any) -> Params:
  # Building the modules takes half a second, and a run asks many times.
  return jax.eval_shape(lambda: init(boxed_init, config, jax.random.key(0)))


def axes(boxed_init: BoxedInit, config: Any) -> Axes:
  """The tree of `init` with a tuple of axis names for each array."""
  return jax.tree.map(
    lambda names: names, _axes(boxed_init, config), is_leaf=_are_names
  )


@functools.lru_cache
def _axes(boxed_init: BoxedInit, config: Any) -> Axes:
  boxed = jax.eval_shape(lambda: boxed_init(config, jax.random.key(0)))
  return jax.tree.map(
    lambda box: tuple(box.names),
    boxed,
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )


def _are_names(x: Any) -> bool:
  return isinstance(x, tuple)


def _stack(*leaves: Any) -> Any:
  # A checkpoint on the host stays on the host.
  numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves)
  return np.stack(leaves) if numpy else jnp.stack(leaves)


def stack_layers(params: Params) -> Params:
  """The listed tree (`layers_0`, `layers_1`, ...) to the scanned (`layers`).

  Args:
    params: nested dict of arrays, as `scan_layers=False` has it.

  Returns:
    The same values bit for bit, the layers' leaves [L, ...] under `layers`.
  """
  stacked = {}
  for name, subtree in params.items():
    if isinstance(subtree, Mapping) and "layers_0" in subtree:
      layers = _layers(subtree)
      subtree = {k: v for k, v in subtree.items() if not _is_layer(k)}
      subtree["layers"] = jax.tree.map(_stack, *layers)
    stacked[name] = subtree
  return stacked


def unstack_layers(params: Params) -> Params:
  """The scanned tree (`layers`) to the listed (`layers_0`, `layers_1`, ...).

  Args:
    params: nested dict of arrays, as `scan_layers=True` has it.

  Returns:
    The same values bit for bit, a subtree for each layer.
  """
  unstacked = {}
  for name, subtree in params.items():
    if isinstance(subtree, Mapping) and "layers" in subtree:
      subtree = dict(subtree)
      layers = subtree.pop("layers")
      for i in range(jax.tree.leaves(layers)[0].shape[0]):
        subtree[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
    unstacked[name] = subtree
  return unstacked


def _is_layer(name: str) -> bool:
  return name.startswith("layers_")


def _layers(subtree: Mapping[str, Params]) -> Sequence[Params]:
  return [subtree[f"layers_{i}"] for i in range(sum(map(_is_layer, subtree)))]

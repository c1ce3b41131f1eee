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
# A network, and the shapes of what it takes
Call = tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]
CallOf = Callable[[Any], Call]  # of a config


def init(call: CallOf, config: Any, key: jax.Array) -> Params:
  """Random parameters, the same whether the layers are scanned or not."""
  network, inputs = _scanned(call, config)
  # Lazy: makes the parameters without running the network.
  params = nn.unbox(network.lazy_init(key, *inputs)["params"])
  return params if config.scan_layers else unstack_layers(params)


def abstract(call: CallOf, config: Any) -> Params:
  """The tree of `init` with a jax.ShapeDtypeStruct for each array."""
  return _of_boxes(call, config, lambda box: box.value)


def axes(call: CallOf, config: Any) -> Axes:
  """The tree of `init` with a tuple of axis names for each array."""

  def names(box):
    return tuple(n for n in box.names if config.scan_layers or n != "layers")

  return _of_boxes(call, config, names)


def _scanned(call: CallOf, config: Any) -> Call:
  # Drawing all layers at once compiles half as many programs, too.
  return call(dataclasses.replace(config, scan_layers=True))


def _of_boxes(call: CallOf, config: Any, what: Callable) -> Any:
  return jax.tree.map(
    what,
    _boxes(call, config),
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )


@functools.lru_cache
def _boxes(call: CallOf, config: Any) -> Params:
  """The tree of `init`, each array's shape in a box with its axes."""
  # Once for all: running the modules takes a quarter of a second.
  network, inputs = _scanned(call, config)

  def boxes(*inputs):
    params = network.init(jax.random.key(0), *inputs)["params"]
    return params if config.scan_layers else unstack_layers(params)

  return jax.eval_shape(boxes, *inputs)


def _stack(*leaves: Any) -> Any:
  # A checkpoint on the host stays on the host.
  numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves)
  return np.stack(leaves) if numpy else jnp.stack(leaves)


def stack_layers(params: Params) -> Params:
  """The listed tree (`layers_0`, `layers_1`, ...), as `scan_layers=False` has
  it, to the scanned: the same values bit for bit, the layers' leaves [L, ...]
  under `layers`."""
  stacked = {}
  for name, subtree in params.items():
    if isinstance(subtree, Mapping) and "layers_0" in subtree:
      layers = _layers(subtree)
      subtree = {k: v for k, v in subtree.items() if not _is_layer(k)}
      subtree["layers"] = jax.tree.map(_stack, *layers)
    stacked[name] = subtree
  return stacked


def unstack_layers(params: Params) -> Params:
  """The scanned tree (`layers`), as `scan_layers=True` has it, to the listed
  (`layers_0`, `layers_1`, ...): the same values bit for bit, a subtree for each
  layer."""
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

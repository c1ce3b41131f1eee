"""What attention of all families shares: keys, their cache, many queries."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clp_jax.sharding import constrain

MASKED = -1e10  # finite, so that a row with nothing to attend to is not NaN
# From so many queries on, attention takes blocks of so many at a time.
MANY_QUERIES = 256
QUERIES = 128  # the width of a TPU's matrix unit


class KeysValues(NamedTuple):
  """Keys and values of one attention; heads come before the length, which
  makes a decoding step twice as fast on CPU as the other order."""

  keys: jax.Array  # [B, H, S, K] in the compute dtype
  values: jax.Array  # [B, H, S, K]

  @classmethod
  def of(cls, keys: jax.Array, values: jax.Array, heads: str) -> "KeysValues":
    """Of [B, S, H, K] each; heads is the logical axis of H."""
    names = ("batch", heads, "length", "kv")
    return cls(
      constrain(jnp.swapaxes(keys, 1, 2), *names),
      constrain(jnp.swapaxes(values, 1, 2), *names),
    )


def empty_cache(
  config: Any, num_layers: int, shape: tuple[int, ...], heads: str
):
  """Keys and values of all layers before the first position.

  Args:
    config: its compute dtype is theirs, its scan_layers says how they lie.
    num_layers: L.
    shape: (R, heads, T, K) of a layer.
    heads: logical axis of the heads.

  Returns:
    KeysValues of zeros, one a layer in a tuple; or, with scan_layers, one with
    a leading axis L.
  """

  def zeros(*leading: int) -> KeysValues:
    empty = jnp.zeros((*leading, *shape), config.compute_dtype)
    names = ("layers",) * len(leading) + ("batch", heads, "length", "kv")
    return KeysValues(constrain(empty, *names), constrain(empty, *names))

  if config.scan_layers:
    return zeros(num_layers)
  return tuple(zeros() for _ in range(num_layers))


def write_cache(
  cache: KeysValues,
  new: KeysValues,
  layer: jax.Array | None,
  position: jax.Array,
) -> tuple[KeysValues, KeysValues]:
  """Writes one position of one layer.

  Args:
    cache: [R, H, T, K] each; or [L, R, H, T, K] with `layer`.
    new: [R, H, 1, K] each.
    layer: [] int32, whose part of the cache this is; None if all of it.
    position: [] int32, where to write; or [R], each row's, beyond T nowhere.

  Returns:
    The cache, and the layer's own part of it.
  """
  if jnp.ndim(position):
    return _write_rows(cache, new, layer, position)
  zero = jnp.zeros_like(position)
  start: tuple[jax.Array, ...] = (zero, zero, position, zero)
  # Scanned layers carry the whole cache and write one position of it: as a
  # scanned input and output, all of it would be copied at every step.
  if layer is not None:
    new = jax.tree.map(lambda a: a[None], new)
    start = (layer, *start)
  cache = jax.tree.map(
    lambda old, a: jax.lax.dynamic_update_slice(old, a, start), cache, new
  )
  return cache, _of_layer(cache, layer)


def _write_rows(cache, new, layer, position):
  rows = jnp.arange(len(position))
  place: tuple[Any, ...] = (rows, slice(None), position)
  if layer is not None:
    place = (layer, *place)
  cache = jax.tree.map(
    lambda old, a: old.at[place].set(a[:, :, 0], mode="drop"), cache, new
  )
  return cache, _of_layer(cache, layer)


def _of_layer(cache: KeysValues, layer: jax.Array | None) -> KeysValues:
  if layer is None:
    return cache
  return jax.tree.map(
    lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), cache
  )


def in_blocks(function: Callable, queries: Any, axes: Any) -> jax.Array:
  """A function of many queries, of a block at a time.

  It is run again in the backward pass: the logits of a block stay in an
  accelerator's fast memory, where all of them would be written to its main
  memory and read several times.

  Args:
    function: of what `queries` holds, to [..., queries, K].
    queries: tuple of arrays, or of None; the first has all Q queries.
    axes: likewise, which axis of each is that of queries, from the end.

  Returns:
    [..., Q, K].
  """
  block = jax.checkpoint(lambda queries: function(*queries))
  length = queries[0].shape[axes[0]]
  whole = length - length % QUERIES

  def cut(x, axis):
    x = jax.lax.slice_in_dim(x, 0, whole, axis=axis)
    axis += x.ndim
    shape = (*x.shape[:axis], -1, QUERIES, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def rest(x, axis):
    return jax.lax.slice_in_dim(x, whole, None, axis=axis)

  done = jax.lax.map(block, jax.tree.map(cut, queries, axes))
  done = jnp.moveaxis(done, 0, -3)
  done = done.reshape(*done.shape[:-3], whole, -1)
  if whole < length:
    last = block(jax.tree.map(rest, queries, axes))
    done = jnp.concatenate([done, last], axis=-2)
  return done

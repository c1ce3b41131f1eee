"""Batches that are worked on in parts, to hold one part at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax import sharding
from clp_jax.masked import add

Params = Any


def accumulate(
  value_and_grad: Callable, params: Params, batch: Any, microbatches: int
) -> Any:
  """Sums value_and_grad over parts of a batch, holding one part at a time.

  Args:
    value_and_grad: (params, batch) -> tree of sums.
    params: of the loss.
    batch: tree of [G, rows, ...] arrays; rows are cut into the parts.
    microbatches: number of parts; divides the prompts of a group.

  Returns:
    The tree of sums over the whole batch.
  """
  if microbatches == 1:
    return value_and_grad(params, batch)

  parts = _parts(batch, microbatches)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts)),
  )

  def body(total, part):
    return add(total, value_and_grad(params, part)), None

  return jax.lax.scan(body, zeros, parts)[0]


def map_parts(function: Callable, batch: Any, parts: int) -> Any:
  """A function of a batch's rows, computed a part at a time.

  Args:
    function: tree of [G, rows, ...] -> tree of [G, rows', ...], row by row.
    batch: tree of [G, rows, ...] arrays; rows are cut into the parts.
    parts: divides the prompts of a group.

  Returns:
    What the function gives for the whole batch.
  """
  if parts == 1:
    return function(batch)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  return jax.tree.map(join, jax.lax.map(function, _parts(batch, parts)))


def _parts(batch: Any, parts: int) -> Any:
  """[G, rows, ...] -> [parts, G, rows / parts, ...]."""

  def part_first(x):
    groups, rows = x.shape[:2]
    split = x.reshape(groups, parts, rows // parts, *x.shape[2:])
    # Each part over all devices; its rows lay on a few of them.
    names = ("length", "weighting", "group_batch")
    names += ("length",) * (x.ndim - 2)
    return sharding.constrain(jnp.moveaxis(split, 1, 0), *names)

  return jax.tree.map(part_first, batch)

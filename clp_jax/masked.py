"""Masked sums and means; metrics that combine exactly over shards and hosts."""

import jax
import jax.numpy as jnp
from flax import struct


def masked_sum(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Sum of x where mask; masked-out entries may even be NaN."""
  return jnp.where(mask, x, 0).sum(axis=axis)


@struct.dataclass
class Mean:
  """A metric as (sum, count), divided only when it is logged."""

  sum: jax.Array  # [] or [m] float32
  count: jax.Array  # [] float32


def mean_of(x: jax.Array, mask: jax.Array | None = None, axis=None) -> Mean:
  """The metric `mean of x over axis`, over entries where mask if given."""
  if mask is None:
    mask = jnp.ones_like(x, bool)
  return Mean(
    masked_sum(x.astype(jnp.float32), mask, axis),
    mask.astype(jnp.float32).sum(axis=axis),
  )


def add(a, b):
  """Adds two trees of metrics (or gradients) entry by entry."""
  return jax.tree.map(jnp.add, a, b)

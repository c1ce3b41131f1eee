"""Batches in which every row has coefficients of its own.

They are computed from the sets themselves: a linear map gives sum_i c_i (W_i x)
as one product of the concatenated c_i x with the stacked W_i, which reads each
set once for the whole batch, where parameters mixed for every row would be
read, and held, once for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from clp_jax.conditioning import check_sets, combine
from clp_jax.low_rank import LowRank

Params = Any  # nested dict of arrays


@struct.dataclass
class RowMixture:
  """A steerable leaf in the policies of B rows, which differ in coefficients.

  It stands in a parameter tree where the leaf of one policy would. Decoders
  have N rows for each of the B, prompt-major. In a scanned stack of layers both
  arrays carry L first, so that a layer finds what is described here.
  """

  sets: jax.Array  # [M, ...]
  coefficients: jax.Array  # [B, M] float32

  @property
  def dtype(self) -> jnp.dtype:
    """Of the sets."""
    return self.sets.dtype

  def astype(self, dtype: jnp.dtype) -> "RowMixture":
    """The same in a dtype; the coefficients stay float32."""
    return RowMixture(self.sets.astype(dtype), self.coefficients)

  def matmul(self, x: jax.Array) -> jax.Array:
    """x [R, T, D] times each row's mixture of kernels [M, D, F]: [R, T, F]."""
    rows, length, _ = x.shape
    c = self._of_rows(rows)[:, None, :, None]
    scaled = (c * x[:, :, None].astype(jnp.float32)).astype(x.dtype)
    kernels = self.sets.astype(x.dtype).reshape(-1, self.sets.shape[-1])
    return scaled.reshape(rows, length, -1) @ kernels

  def matmul_transposed(self, x: jax.Array) -> jax.Array:
    """x [R, T, D] times each row's mixture of tables [M, V, D]: [R, T, V]."""
    c = self._of_rows(x.shape[0])[:, :, None, None]
    products = [
      (c[:, i] * x) @ self.sets[i].T for i in range(self.sets.shape[0])
    ]
    return sum(products[1:], products[0])

  def take(self, tokens: jax.Array) -> jax.Array:
    """Each row's mixture of tables [M, V, D] at tokens [R, T]: [R, T, D]."""
    c = self._of_rows(tokens.shape[0])
    # As with one table, an id outside of it gives NaN.
    entries = jnp.take(self.sets, tokens, axis=1)
    return jnp.einsum("rm,mrtd->rtd", c, entries, precision="highest")

  def mixed(self, rows: int) -> jax.Array:
    """The mixtures themselves, [R, ...], of leaves as small as a norm's."""
    c = self._of_rows(rows)
    return jnp.einsum("rm,m...->r...", c, self.sets, precision="highest")

  def _of_rows(self, rows: int) -> jax.Array:
    """[R, M]."""
    prompts = self.coefficients.shape[0]
    return jnp.repeat(self.coefficients, rows // prompts, axis=0)


def mix_rows(
  params: Params, steerable: Params, coefficients: jax.Array
) -> Params:
  """The policies of a batch whose rows have coefficients of their own.

  Args:
    params: tree whose steerable leaves are [M, ...], in scanned layers
      [M, L, ...], as `conditioning.expand` makes them; or LowRanks with
      diagonals of sets.
    steerable: tree of booleans from `steerable_leaves`.
    coefficients: [B, M] float32 on the simplex, one for each prompt.

  Returns:
    Parameters for `T5.apply` and what builds on it, with a `RowMixture` for
    each steerable leaf. Nothing is computed and nothing copied per row, and a
    row's results are those of `conditioning.mix` with its coefficients up to
    the rounding of the compute dtype: in bfloat16 the two differ from each
    other about as much as each does from float32.

  Raises:
    ValueError: when a leaf does not hold as many sets as there are
      coefficients.
  """
  coefficients = jnp.asarray(coefficients, jnp.float32)

  def leaf(path, combined, p):
    if not combined:
      return p
    stacked = "layers" in [entry.key for entry in path]
    if isinstance(p, LowRank):
      check_sets(p.diagonal, coefficients)
      return p.of_rows(coefficients, stacked)
    check_sets(p, coefficients)
    if not stacked:
      return RowMixture(p, coefficients)
    p = jnp.moveaxis(p, 1, 0)
    return RowMixture(
      p, jnp.broadcast_to(coefficients, (p.shape[0], *coefficients.shape))
    )

  return jax.tree_util.tree_map_with_path(leaf, steerable, params)


def row_coefficients(params: Params) -> jax.Array | None:
  """[B, M], those that `mix_rows` was given; None if it made nothing here that
  `mix_one` could mix: a LowRank costs no more for a row of its own."""
  leaves = jax.tree.leaves(params, is_leaf=stands_for_an_array)
  if any(isinstance(leaf, LowRank) for leaf in leaves):
    return None
  for leaf in leaves:
    if isinstance(leaf, RowMixture):
      c = leaf.coefficients
      return c if c.ndim == 2 else c[0]
  return None


def mix_one(params: Params, coefficients: jax.Array) -> Params:
  """One policy, of coefficients [M] float32, out of what `mix_rows` made, as
  `conditioning.mix` gives it."""

  def leaf(p):
    if not isinstance(p, RowMixture):
      return p
    if p.coefficients.ndim == 3:  # a stack of layers
      return jax.vmap(combine, in_axes=(0, None))(p.sets, coefficients)
    return combine(p.sets, coefficients)

  return jax.tree.map(leaf, params, is_leaf=stands_for_an_array)


def stands_for_an_array(leaf: Any) -> bool:
  """Whether it is more than one array in the place of a leaf: for is_leaf."""
  return isinstance(leaf, RowMixture | LowRank)

"""Conditioning in parameter space: the heart of Conditional Language Policy.

The steerable part of the parameters exists once per objective: such a leaf is
stacked to [M, ...]. Every other leaf is shared. For coefficients c on the
simplex the policy is the ordinary T5 whose leaves are

  mix(params)[leaf] = sum_i c_i params[leaf][i]   where steerable,
                      params[leaf]                where shared.

All sets start as copies of one checkpoint (`expand`), so that the untrained
policy is that checkpoint for every weighting, and gradients flow through `mix`
into the sets (d/d set_i = c_i g) and into the shared leaves alike.

`mix` makes one policy, or G. A batch in which every row has its own
coefficients is computed from the sets themselves (`mix_rows`): a linear map
gives sum_i c_i (W_i x) as one product of the concatenated c_i x with the
stacked W_i, which reads each set once for the whole batch, where parameters
mixed for every row would be read, and held, once for each.

Source: Conditional Language Policy (arXiv 2407.15762); which leaves belong to
"attention" and "logits" is our reading, see docs/decisions.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from clp_jax.low_rank import LowRank, is_low_rank

Params = Any  # nested dict of arrays
STEERING = ("full", "attention", "logits", "none")
_ATTENTION = {"attention", "self_attention", "encoder_decoder_attention"}


def steerable_leaves(params: Params, kind: str) -> Params:
  """Which leaves exist once per objective: a static tree of Python booleans.

  Args:
    params: an ordinary T5 parameter tree (t5x names); only names are read.
    kind: "full", every leaf; "attention", the query, key, value and output
      kernels of all attention layers; "logits", the final layer (where it is
      tied to the token embedding, that table); "none", no leaf. Soft tokens,
      where the tree has them, are steerable under every kind.

  Returns:
    A tree of the structure of `params` with True at steerable leaves.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind not in STEERING:
    raise ValueError(
      f"steering must be one of {', '.join(STEERING)}, got {kind!r}."
    )
  tied = "logits_dense" not in params.get("decoder", {})

  def is_steerable(path, _) -> bool:
    names = [entry.key for entry in path]
    if names[0] == "soft_tokens":
      return True
    if kind == "attention":
      return not _ATTENTION.isdisjoint(names)
    if kind == "logits":
      return ("token_embedder" if tied else "logits_dense") in names
    return kind == "full"

  return jax.tree_util.tree_map_with_path(is_steerable, params)


def expand(params: Params, steerable: Params, num_sets: int) -> Params:
  """Copies every steerable leaf [...] to [M, ...], M = num_sets."""
  if num_sets < 1:
    raise ValueError(f"num_sets must be at least 1, got {num_sets}.")

  def leaf(p, copied):
    return jnp.broadcast_to(p, (num_sets, *p.shape)) if copied else p

  return jax.tree.map(leaf, params, steerable)


def mix(params: Params, steerable: Params, coefficients: jax.Array) -> Params:
  """The convex combination of the parameter sets.

  Args:
    params: tree whose steerable leaves are [M, ...], any float dtype.
    steerable: tree of booleans from `steerable_leaves`.
    coefficients: [M] float32 on the simplex, or [G, M] for G policies.

  Returns:
    The parameters of an ordinary T5 in the dtypes of `params`; for [G, M]
    coefficients the steerable leaves are [G, ...] and shared ones unbatched.
    A vertex gives that set bit for bit, and equal sets give the base bit for
    bit whatever the coefficients.

  Raises:
    ValueError: when a leaf does not hold as many sets as there are
      coefficients.
  """
  coefficients = jnp.asarray(coefficients, jnp.float32)

  def leaf(p, combined):
    if not combined:
      return p
    _check_sets(p, coefficients)
    return combine(p, coefficients)

  return jax.tree.map(leaf, params, steerable)


def _check_sets(p: jax.Array, coefficients: jax.Array) -> None:
  if p.shape[:1] != coefficients.shape[-1:]:
    raise ValueError(
      f"a steerable leaf of shape {p.shape} holds {p.shape[:1]} parameter "
      f"sets, but there are {coefficients.shape[-1]} coefficients; use the "
      "num_sets given to expand()."
    )


@jax.custom_vjp
def combine(sets: jax.Array, coefficients: jax.Array) -> jax.Array:
  """sum_i c_i sets[i]: [M, ...] and [*batch, M] -> [*batch, ...].

  Written as multiply-adds and not as a matrix product: the operation is bound
  by memory, so it costs the same, and no accelerator rounds its float32
  operands to bfloat16. The selections make vertices and equal sets exact,
  signed zeros included, which a rounded sum of the coefficients would spoil.
  They are also why the gradient is written by hand: it is that of the sum.
  """
  batch = coefficients.ndim - 1
  values = sets.astype(jnp.float32)

  def c(i):
    return coefficients[..., i].reshape(
      coefficients.shape[:-1] + (1,) * (sets.ndim - 1)
    )

  def value(i):
    return values[i].reshape((1,) * batch + sets.shape[1:])

  mixed = c(0) * value(0)
  equal = jnp.ones_like(value(0), bool)
  for i in range(1, sets.shape[0]):
    mixed = mixed + c(i) * value(i)
    equal = equal & (value(i) == value(0))
  mixed = jnp.where(equal, value(0), mixed)
  for i in range(sets.shape[0]):
    mixed = jnp.where(c(i) == 1, value(i), mixed)
  return mixed.astype(sets.dtype)


def _combine_forward(sets, coefficients):
  return combine(sets, coefficients), (sets, coefficients)


def _combine_backward(residuals, gradient):
  sets, coefficients = residuals
  m = coefficients.shape[-1]
  c = coefficients.reshape(-1, m)  # [G, M]
  # The leaf's own dimensions keep their places: they may be cut over devices.
  g = gradient.astype(jnp.float32).reshape(c.shape[0], *sets.shape[1:])
  values = sets.astype(jnp.float32)
  own = tuple(range(1, sets.ndim))
  d_sets = jnp.tensordot(c, g, ((0,), (0,)), precision="highest")
  d_coefficients = jnp.tensordot(g, values, (own, own), precision="highest")
  return (
    d_sets.reshape(sets.shape).astype(sets.dtype),
    d_coefficients.reshape(coefficients.shape),
  )


combine.defvjp(_combine_forward, _combine_backward)


def batched_axes(policies: Params, steerable: Params) -> Params:
  """vmap `in_axes` of G policies, whose steerable leaves are [G, ...]; of a
  LowRank the diagonal alone is."""

  def leaf(s, p):
    if s and is_low_rank(p):
      return LowRank(None, None, None, 0)  # type: ignore[arg-type]
    return 0 if s else None

  return jax.tree.map(leaf, steerable, policies)


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
      [M, L, ...], as `expand` makes them; or LowRanks with diagonals of sets.
    steerable: tree of booleans from `steerable_leaves`.
    coefficients: [B, M] float32 on the simplex, one for each prompt.

  Returns:
    Parameters for `T5.apply` and what builds on it, with a `RowMixture` for
    each steerable leaf. Nothing is computed and nothing copied per row, and a
    row's results are those of `mix` with its coefficients up to the rounding of
    the compute dtype: in bfloat16 the two differ from each other about as much
    as each does from float32.

  Raises:
    ValueError: when a leaf does not hold as many sets as there are
      coefficients.
  """
  coefficients = jnp.asarray(coefficients, jnp.float32)

  def leaf(path, combined, p):
    if not combined:
      return p
    stacked = "layers" in [entry.key for entry in path]
    if is_low_rank(p):
      _check_sets(p.diagonal, coefficients)
      return p.of_rows(coefficients, stacked)
    _check_sets(p, coefficients)
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
  if any(map(is_low_rank, leaves)):
    return None
  for leaf in leaves:
    if _is_mixture(leaf):
      c = leaf.coefficients
      return c if c.ndim == 2 else c[0]
  return None


def mix_one(params: Params, coefficients: jax.Array) -> Params:
  """One policy out of what `mix_rows` made, as `mix` gives it.

  Args:
    params: from `mix_rows`.
    coefficients: [M] float32.
  """

  def leaf(p):
    if not _is_mixture(p):
      return p
    if p.coefficients.ndim == 3:  # a stack of layers
      return jax.vmap(combine, in_axes=(0, None))(p.sets, coefficients)
    return combine(p.sets, coefficients)

  return jax.tree.map(leaf, params, is_leaf=_is_mixture)


def stands_for_an_array(leaf: Any) -> bool:
  """Whether it is more than one array in the place of a leaf: for is_leaf."""
  return _is_mixture(leaf) or is_low_rank(leaf)


def _is_mixture(leaf: Any) -> bool:
  return isinstance(leaf, RowMixture)

"""Conditioning in parameter space: the heart of Conditional Language Policy.

The steerable part of the parameters exists once per objective: such a leaf is
stacked to [M, ...]. Every other leaf is shared. For coefficients c on the
simplex the policy is the ordinary T5 whose leaves are

  mix(params)[leaf] = sum_i c_i params[leaf][i]   where steerable,
                      params[leaf]                where shared.

All sets start as copies of one checkpoint (`expand`), so that the untrained
policy is that checkpoint for every weighting, and gradients flow through `mix`
into the sets (d/d set_i = c_i g) and into the shared leaves alike.

`mix` makes one policy, or G; `row_mixing.mix_rows` those of a batch in which
every row has coefficients of its own.

Source: Conditional Language Policy (arXiv 2407.15762); which leaves belong to
"attention" and "logits" is our reading, see docs/decisions.md.
"""

from typing import Any

import jax
import jax.numpy as jnp

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
    check_sets(p, coefficients)
    return combine(p, coefficients)

  return jax.tree.map(leaf, params, steerable)


def check_sets(p: jax.Array, coefficients: jax.Array) -> None:
  """Raises a ValueError unless p [M, ...] has coefficients [..., M]."""
  if p.shape[:1] != coefficients.shape[-1:]:
    raise ValueError(
      f"a steerable leaf of shape {p.shape} holds {p.shape[:1]} parameter "
      f"sets, but there are {coefficients.shape[-1]} coefficients; use the "
      "num_sets given to expand()."
    )


@jax.jit  # so that leaves of one shape are traced once
def combine(sets: jax.Array, coefficients: jax.Array) -> jax.Array:
  """sum_i c_i sets[i]: [M, ...] and [*batch, M] -> [*batch, ...].

  Written as multiply-adds and not as a matrix product: the operation is bound
  by memory, so it costs the same, and no accelerator rounds its float32
  operands to bfloat16. The selections make vertices and equal sets exact,
  signed zeros included, which a rounded sum of the coefficients would spoil.
  They are also why the gradient is written by hand: it is that of the sum.
  """
  return _combine(sets, coefficients)


@jax.custom_vjp
def _combine(sets: jax.Array, coefficients: jax.Array) -> jax.Array:
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
  return _combine(sets, coefficients), (sets, coefficients)


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


_combine.defvjp(_combine_forward, _combine_backward)

"""A kernel with a low-rank change, computed without making their sum.

  x (W + left diag(d) right) = x W + ((x left) * d) right

W and the factors are held once, whatever the weightings: what differs between
policies, or between the rows of a batch, are the k numbers d. For k far below
the width of W the change costs a few per cent of the product with W, and its
gradient needs none of W's.

Over many tokens the change costs more than its arithmetic: it is as wide as the
result, and is written and read once more. In float32 on a CPU a policy's kernel
is then summed for the one product and thrown away, and the gradient is still
that of the factors alone (`matmul`).

`adapters.Adapter.adapt` makes the sum to keep it: for a policy that is decoded
alone in float32, exported, or used where a plain kernel is asked for.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class LowRank:
  """Stands in a parameter tree where a kernel would.

  `diagonal` is [k] for one policy; [B, k] where each of B prompts has its own;
  and, before coefficients are chosen, [M, k] of the sets: it is linear in them.
  In a scanned stack of layers all arrays carry L first, but for the diagonals
  of sets and of a step's policies, [M, L, k], whose leading axis is mapped.
  """

  kernel: jax.Array  # [D, F]
  left: jax.Array  # [D, k]
  right: jax.Array  # [k, F]
  diagonal: jax.Array  # float32, the scale of the change included

  def change(self, x: jax.Array) -> jax.Array:
    """x [R, T, D] times what is added to the kernel: [R, T, F]."""
    d = self.diagonal
    if d.ndim == 2:  # N rows for each prompt
      d = jnp.repeat(d, x.shape[0] // d.shape[0], axis=0)[:, None]
    else:
      d = d[None, None]
    narrow = (x @ self.left.astype(x.dtype)).astype(jnp.float32) * d
    return narrow.astype(x.dtype) @ self.right.astype(x.dtype)

  def is_cheaper_summed(self, x: jax.Array) -> bool:
    """Whether x [R, T, D] is so long that `matmul` costs less than `change`
    beside the kernel: one policy's sum is k D F, its change R T k (D + F).

    Only where a product is one of float32 numbers, that is, on a CPU: by
    default a TPU's and a GPU's round them first, and small changes away.
    """
    d, f = self.left.shape[-2], self.right.shape[-1]
    tokens = x.size // d
    is_one = self.diagonal.ndim == 1
    is_exact = x.dtype == jnp.float32 and jax.default_backend() == "cpu"
    return is_one and is_exact and tokens * (d + f) > d * f

  @property
  def dtype(self) -> jnp.dtype:
    """Of the kernel."""
    return self.kernel.dtype

  def astype(self, dtype: jnp.dtype) -> "LowRank":
    """The same in a dtype; the diagonal stays float32."""
    kernel, left, right = (
      x.astype(dtype) for x in (self.kernel, self.left, self.right)
    )
    return LowRank(kernel, left, right, self.diagonal)

  def of_rows(self, coefficients: jax.Array, stacked: bool) -> "LowRank":
    """Of sets, those that B rows of coefficients [B, M] float32 mix; `stacked`
    says whether it is of a stack of layers."""
    diagonal = jnp.tensordot(
      coefficients, self.diagonal, ((1,), (0,)), precision="highest"
    )
    if stacked:
      diagonal = jnp.moveaxis(diagonal, 1, 0)
    return LowRank(self.kernel, self.left, self.right, diagonal)


@jax.custom_vjp
def matmul(
  x: jax.Array,
  kernel: jax.Array,
  left: jax.Array,
  right: jax.Array,
  diagonal: jax.Array,
) -> jax.Array:
  """x [R, T, D] times the kernel of one policy, summed: [R, T, F].

  The arguments are a LowRank's, of x's dtype but for the diagonal. The gradient
  of the factors is of k columns, and that of the kernel is no part of it: the
  compiler leaves out the kernel's where nothing trains it.
  """
  return x @ _summed(kernel, left, right, diagonal)


def _summed(kernel, left, right, diagonal):
  change = jnp.matmul(left * diagonal[None], right, precision="highest")
  return kernel + change.astype(kernel.dtype)


def _forward(x, *parts):
  return x @ _summed(*parts), (x, *parts)


def _backward(saved, gradient):
  x, kernel, left, right, diagonal = saved
  rows = tuple(range(x.ndim - 1))

  def over_tokens(a, b):
    return jax.lax.dot_general(a, b, ((rows, rows), ((), ())))

  # Narrow ones on the left: the other would be written out transposed.
  narrow, back = x @ left, gradient @ right.T
  return (
    gradient @ _summed(kernel, left, right, diagonal).T,
    over_tokens(x, gradient),
    over_tokens(back, x).T * diagonal[None],
    over_tokens(narrow, gradient) * diagonal[:, None],
    (narrow * back).sum(rows),
  )


matmul.defvjp(_forward, _backward)

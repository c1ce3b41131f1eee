"""A kernel with a low-rank change, computed without making their sum.

  x (W + left diag(d) right) = x W + ((x left) * d) right

W and the factors are held once, whatever the weightings: what differs between
policies, or between the rows of a batch, are the k numbers d. For k far below
the width of W the change costs a few per cent of the product with W, and its
gradient needs none of W's.

Merging makes the sum instead (`adapters.Adapter.adapt`): for a policy that is
decoded alone, exported, or used where a plain kernel is asked for.
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

  def matmul(self, x: jax.Array) -> jax.Array:
    """x [R, T, D] times the changed kernel: the change alone, [R, T, F]."""
    d = self.diagonal
    if d.ndim == 2:  # N rows for each prompt
      d = jnp.repeat(d, x.shape[0] // d.shape[0], axis=0)[:, None]
    else:
      d = d[None, None]
    narrow = (x @ self.left.astype(x.dtype)).astype(jnp.float32) * d
    return narrow.astype(x.dtype) @ self.right.astype(x.dtype)

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

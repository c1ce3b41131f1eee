"""Low-rank adapters: a steerable change of a kernel at the cost of its factors.

The kernel W of a linear map stays what it is; a weighting adds a product of
small factors to it, so that the result is again an ordinary kernel.

  lora      W + scale sum_i c_i A_i B_i
            A pair of factors for each parameter set. The products are mixed and
            not the factors: a vertex is W plus that set's product, and sets mix
            as the kernels of CLP do.
  svd_lora  W + scale P diag(v_1, ..., v_r, c_1 s, ..., c_M s) Q
            One pair of factors, shared. r of the singular values are trained
            and the same for all weightings; the last M are the coefficients
            themselves, times a trained number s of the kernel. P's columns and
            Q's rows are kept near orthonormal by a penalty.

B, v and s start at 0, so that the untrained policy is the base bit for bit.
Where the KL term's set is frozen at the reference, its product is 0: the other
coefficients, which add up to 1 - alpha, then scale all that is added.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); the singular values that carry
the preference, Panacea, Zhong et al. 2024 (arXiv 2402.02030); penalty and zero
start, AdaLoRA, Zhang et al. 2023 (arXiv 2303.10512). What is ours is listed in
docs/methods.md.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.conditioning import combine
from clp_jax.low_rank import LowRank

Params = Any
Leaves = dict[str, Any]  # of one adapted kernel: arrays, shapes or axes
KINDS = ("lora", "svd_lora")
TARGETS = ("attention", "mlp")
_LAYERS = {
  "attention": {"attention", "self_attention", "encoder_decoder_attention"},
  "mlp": {"mlp"},
}


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What adapters a policy has.

  Attributes:
    kind: one of KINDS.
    rank: r, of a product (lora), or how many singular values all weightings
      share (svd_lora).
    scale: multiplies what is added.
    targets: the linear maps that are adapted, out of TARGETS.
    frozen_kl: the last parameter set is the reference's and adds nothing.
  """

  kind: str
  rank: int
  scale: float
  targets: tuple[str, ...]
  frozen_kl: bool = False

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"adapters.rank must be at least 1, got {self.rank}.")
    if not 0 < self.scale < math.inf:
      raise ValueError(
        f"adapters.scale must be a finite number > 0, got {self.scale}."
      )
    if not self.targets or not set(self.targets) <= set(TARGETS):
      raise ValueError(
        f"adapters.targets must be some of {', '.join(TARGETS)}, got "
        f"{', '.join(self.targets) or 'none'}."
      )

  def adapts(self, path: tuple[str, ...]) -> bool:
    """Whether the leaf at a path of a T5's tree is a kernel that is adapted."""
    return path[-1] == "kernel" and any(
      not _LAYERS[target].isdisjoint(path) for target in self.targets
    )

  def init(self, kernel: Any, num_sets: int, key: jax.Array) -> Leaves:
    """The leaves of one kernel, before training.

    Args:
      kernel: [..., D, F]; only its shape is read.
      num_sets: M, those that are trained.
      key: of the factors that do not start at 0.
    """
    *layers, d, f = kernel.shape
    if self.kind == "lora":
      a = jax.random.normal(key, (num_sets, *layers, d, self.rank)) / d**0.5
      b = jnp.zeros((num_sets, *layers, self.rank, f))
      return {"lora_a": a, "lora_b": b}
    # Columns and rows of length about 1, and about orthogonal where D and F are
    # large: the penalty does the rest.
    left_key, right_key = jax.random.split(key)
    rank = self.rank + num_sets
    return {
      "svd_left": jax.random.normal(left_key, (*layers, d, rank)) / d**0.5,
      "svd_values": jnp.zeros((*layers, self.rank)),
      "svd_scale": jnp.zeros(layers),
      "svd_right": jax.random.normal(right_key, (*layers, rank, f)) / f**0.5,
    }

  def update_scales(self, kernel: jax.Array) -> Leaves:
    """The change of each leaf that starts at 0 which, made to all its numbers
    in one direction of the factors beside it, moves the kernel by as much as
    the kernel's own root mean square.

    Optimizers whose steps are relative to a parameter's size take it for that
    size, so that an adapter moves its kernel as far a step as training the
    kernel itself would.

    Args:
      kernel: [..., D, F], the base.

    Returns:
      Leaf -> [...] float32, for every set.
    """
    *_, d, f = kernel.shape
    wide = jnp.square(kernel.astype(jnp.float32))
    rms = jnp.sqrt(wide.mean((-2, -1))) / self.scale
    # A's rows have a length of about (r / D)^(1/2), and the columns and rows of
    # svd_lora's factors of about 1.
    if self.kind == "lora":
      return {"lora_b": rms * (d / self.rank) ** 0.5}
    return {
      "svd_values": rms * (d * f / self.rank) ** 0.5,
      "svd_scale": rms * (d * f) ** 0.5,
    }

  def logical_axes(self, axes: tuple[str, ...]) -> Leaves:
    """Logical axes of the leaves of a kernel that has these."""
    *layers, d, f = axes
    if self.kind == "lora":
      return {
        "lora_a": ("objective", *layers, d, "rank"),
        "lora_b": ("objective", *layers, "rank", f),
      }
    return {
      "svd_left": (*layers, d, "rank"),
      "svd_values": (*layers, "rank"),
      "svd_scale": tuple(layers),
      "svd_right": (*layers, "rank", f),
    }

  def adapt(
    self, kernel: jax.Array, leaves: Leaves, coefficients: jax.Array
  ) -> jax.Array:
    """The kernel of a weighting.

    Args:
      kernel: [..., D, F], the base.
      leaves: as `init` makes them.
      coefficients: [*batch, M] float32, convex.

    Returns:
      [*batch, ..., D, F] in the kernel's dtype; the base bit for bit where
      nothing is added.
    """
    product = self._lora if self.kind == "lora" else self._svd
    return _add(kernel, self.scale * product(leaves, coefficients))

  def unmerged(
    self, kernel: jax.Array, leaves: Leaves, coefficients: jax.Array
  ) -> LowRank:
    """The kernel of a weighting, without making it: `adapt` up to rounding, as
    a LowRank whose diagonal is [*batch, ..., k]; the arguments are its."""
    batch = coefficients.shape[:-1]
    layers = kernel.shape[:-2]
    if self.kind == "lora":
      a, b = leaves["lora_a"], leaves["lora_b"]
      sets = a.shape[0]
      # [M, ..., D, r] -> [..., D, M r], and [M, ..., r, F] -> [..., M r, F].
      left = jnp.moveaxis(a, 0, -2).reshape(*layers, a.shape[-2], -1)
      right = jnp.moveaxis(b, 0, -3).reshape(*layers, -1, b.shape[-1])
      diagonal = jnp.repeat(coefficients[..., :sets], self.rank, axis=-1)
      diagonal = diagonal.reshape(*batch, *(1,) * len(layers), -1)
      diagonal = jnp.broadcast_to(
        diagonal, (*batch, *layers, diagonal.shape[-1])
      )
    else:
      left, right = leaves["svd_left"], leaves["svd_right"]
      diagonal = self._singular_values(leaves, coefficients)
    return LowRank(kernel, left, right, self.scale * diagonal)

  def factors(
    self, leaves: Leaves, coefficients: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """What a weighting adds to a kernel, as one product: exactly.

    Args:
      leaves: as `init` makes them, on the host.
      coefficients: [M] float32; sets of coefficient 0 have no part.

    Returns:
      left [..., D, k] and right [..., k, F], float32, whose product times
      `scale` is what `adapt` adds. Of one set they are its factors themselves
      (lora), or k = r + 1 (svd_lora); k is the same for every kernel.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    own = coefficients[:-1] if self.frozen_kl else coefficients
    (sets,) = np.nonzero(own)
    if self.kind == "lora":
      if not sets.size:
        sets = np.arange(1)  # of rank 0 there is no product
      a, b = leaves["lora_a"], leaves["lora_b"]
      return (
        np.concatenate([a[i] for i in sets], axis=-1),
        np.concatenate([own[i] * b[i] for i in sets], axis=-2),
      )
    values, scale = leaves["svd_values"], leaves["svd_scale"]
    if self.frozen_kl:
      values = values * own.sum()
    scaled = scale[..., None] * own[sets]
    diagonal = np.concatenate([values, scaled], axis=-1)
    kept = np.concatenate([np.arange(self.rank), self.rank + sets])
    right = leaves["svd_right"][..., kept, :]
    return leaves["svd_left"][..., kept], diagonal[..., None] * right

  def _lora(self, leaves, coefficients):
    products = _matmul(leaves["lora_a"], leaves["lora_b"])
    if self.frozen_kl:
      products = jnp.concatenate([products, jnp.zeros_like(products[:1])])
    return combine(products, coefficients)

  def _singular_values(self, leaves, coefficients):
    """[*batch, ..., r + M]."""
    values, scale = leaves["svd_values"], leaves["svd_scale"]
    batch, layers = coefficients.shape[:-1], scale.shape
    own = coefficients[..., :-1] if self.frozen_kl else coefficients
    own = own.reshape(*batch, *(1,) * len(layers), -1)
    values = jnp.broadcast_to(values, (*batch, *values.shape))
    if self.frozen_kl:
      values = values * own.sum(-1, keepdims=True)
    scaled = own * scale.reshape((1,) * len(batch) + (*layers, 1))
    return jnp.concatenate([values, scaled], axis=-1)

  def _svd(self, leaves, coefficients):
    batch = coefficients.shape[:-1]
    diagonal = self._singular_values(leaves, coefficients)
    left, right = (
      leaves[name].reshape((1,) * len(batch) + leaves[name].shape)
      for name in ("svd_left", "svd_right")
    )
    return _matmul(left * diagonal[..., None, :], right)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """[..., D, r] x [..., r, F], in float32 on every device."""
  leading = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
  return jnp.matmul(
    jnp.broadcast_to(a, leading + a.shape[-2:]),
    jnp.broadcast_to(b, leading + b.shape[-2:]),
    precision="highest",
  )


@jax.custom_vjp
def _add(kernel: jax.Array, change: jax.Array) -> jax.Array:
  """kernel [...] + change [*batch, ...], and the kernel bit for bit where the
  change is 0: -0 + 0 would be 0. Its gradient is that of the sum."""
  wide = kernel.reshape((1,) * (change.ndim - kernel.ndim) + kernel.shape)
  total = wide.astype(jnp.float32) + change
  return jnp.where(change == 0, wide, total.astype(kernel.dtype))


def _add_forward(kernel, change):
  # Of the residuals only shapes and dtypes are read.
  return _add(kernel, change), (kernel, change)


def _add_backward(residuals, gradient):
  kernel, change = residuals
  batch = tuple(range(change.ndim - kernel.ndim))
  d_change = gradient.astype(change.dtype)
  return d_change.sum(batch).astype(kernel.dtype), d_change


_add.defvjp(_add_forward, _add_backward)


def orthogonality(params: Params) -> jax.Array:
  """AdaLoRA's penalty: how far the factors of svd_lora are from orthonormal.

  Args:
    params: any tree; its leaves svd_left [..., D, k] and svd_right [..., k, F]
      are read.

  Returns:
    [] float32, the mean over the adapted kernels of
    |P^T P - I|^2 + |Q Q^T - I|^2 (squared Frobenius norms).
  """
  total, kernels = jnp.zeros([]), 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    if name in ("svd_left", "svd_right"):
      rows = leaf if name == "svd_right" else jnp.swapaxes(leaf, -1, -2)
      gram = _matmul(rows, jnp.swapaxes(rows, -1, -2))
      identity = jnp.eye(gram.shape[-1]).reshape(
        (1,) * (gram.ndim - 2) + gram.shape[-2:]
      )
      total = total + jnp.square(gram - identity).sum()
      kernels += gram[..., 0, 0].size
  return total / max(kernels / 2, 1)

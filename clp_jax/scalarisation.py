"""Scalarisations: how a weighting makes one number of m expected rewards.

  linear            S(J) = sum_i w_i J_i
  chebyshev         S(J) = -max_i w_i (z_i - J_i)
  smooth_chebyshev  S(J) = -tau log sum_i exp(w_i (z_i - J_i) / tau)
J_i is the expected reward of the weighting's policy, z a utopia point that no
policy reaches, tau the smoothness. A linear scalarisation can't prefer a point
in a dent of the front; the other two can.

Trained is S of the expectations and not the expectation of S: a policy whose
half of responses is good at one reward and half at the other has the middling J
that it should be judged by, and E[S(R)] would call it bad at everything. The
gradient is then a reweighting of the objectives,
  dS/dtheta = sum_i e_i dJ_i/dtheta,   e_i = dS/dJ_i,
with e = w for linear, e_i = w_i for the objective of the largest gap alone for
chebyshev, and e_i = w_i softmax(w (z - J) / tau)_i for smooth_chebyshev. So
each policy-gradient estimator stays as it is, with e in the place of w.

J is estimated from the responses of the weighting's group to the *other*
prompts. Weights that depended on the response they multiply would be correlated
with it, and the estimate of e . dJ biased.

Sources: Steuer and Choo 1983; smooth Chebyshev, Lin et al. 2024
(arXiv 2402.19078).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.errors import check_choice

NAMES = ("linear", "chebyshev", "smooth_chebyshev")


@dataclasses.dataclass(frozen=True)
class Scalarisation:
  """One of NAMES with its settings.

  Attributes:
    name: of NAMES.
    utopia: z, in the (normalised) rewards' units, m values; None for linear.
    smoothness: tau, in the same units; used by smooth_chebyshev.
  """

  name: str = "linear"
  utopia: tuple[float, ...] | None = None
  smoothness: float = 0.1

  def __post_init__(self):
    check_choice("scalarisation.name", self.name, NAMES)
    if self.name == "linear" and self.utopia is not None:
      raise ValueError(
        f"scalarisation.utopia = {self.utopia} is for chebyshev and "
        "smooth_chebyshev; leave it None, or choose one of them."
      )
    if self.name != "linear":
      if self.utopia is None:
        raise ValueError(
          f"scalarisation {self.name} needs scalarisation.utopia, a value "
          "above what each reward can reach."
        )
      if not np.all(np.isfinite(self.utopia)):
        raise ValueError(
          f"scalarisation.utopia must be finite, got {self.utopia}."
        )
    if not 0 < self.smoothness < np.inf:
      raise ValueError(
        f"scalarisation.smoothness must be > 0, got {self.smoothness}."
      )

  def value(self, expected: jax.Array, weights: jax.Array) -> jax.Array:
    """S of each row.

    Args:
      expected: [..., m] float32, J.
      weights: [..., m] float32 on the simplex.

    Returns:
      [...] float32.
    """
    if self.name == "linear":
      return (weights * expected).sum(-1)
    gaps = self._gaps(expected, weights)
    if self.name == "chebyshev":
      return -gaps.max(-1)
    tau = self.smoothness
    return -tau * jax.nn.logsumexp(gaps / tau, axis=-1)

  def gradient(self, expected: jax.Array, weights: jax.Array) -> jax.Array:
    """e = dS/dJ of each row, args as of `value`; objectives that tie for the
    largest gap share it.

    Returns:
      [..., m] float32, not on the simplex in general.
    """
    if self.name == "linear":
      return jnp.broadcast_to(weights, expected.shape)
    gaps = self._gaps(expected, weights)
    if self.name == "chebyshev":
      largest = gaps == gaps.max(-1, keepdims=True)
      return weights * largest / largest.sum(-1, keepdims=True)
    return weights * jax.nn.softmax(gaps / self.smoothness, axis=-1)

  def response_weights(
    self, rewards: jax.Array, weights: jax.Array, num_samples: int
  ) -> jax.Array:
    """What the rewards of each response are weighted by in the gradient.

    Args:
      rewards: [G, R, m] float32, the samples of a prompt side by side.
      weights: [G, m] float32 on the simplex.
      num_samples: N.

    Returns:
      [G, m] float32, the weights themselves, for linear; otherwise
      [G, R, m] float32, e at the mean rewards of the group's other prompts.

    Raises:
      ValueError: when there is no other prompt.
    """
    if self.name == "linear":
      return weights
    groups, rows, m = rewards.shape
    if rows == num_samples:
      raise ValueError(
        f"scalarisation {self.name} needs at least 2 prompts a weighting."
      )
    by_prompt = rewards.reshape(groups, -1, num_samples, m).sum(axis=2)
    others = by_prompt.sum(axis=1, keepdims=True) - by_prompt
    expected = others / (rows - num_samples)
    e = self.gradient(expected, weights[:, None])
    return jnp.repeat(e, num_samples, axis=1)

  def _gaps(self, expected: jax.Array, weights: jax.Array) -> jax.Array:
    utopia = jnp.asarray(self.utopia, jnp.float32)
    return weights * (
      utopia.reshape((1,) * (expected.ndim - 1) + (-1,)) - expected
    )

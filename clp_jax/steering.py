"""Steering: from names and numbers to the coefficients of parameter sets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax import weightings
from clp_jax.weightings import Distribution, Weighting

Weights = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Steering:
  """The weightings that a run can be given.

  Attributes:
    objectives: names of the m rewards, in the order of weights.
    distribution: Q, what the run was trained for.
    extrapolates: where alpha varies, up to 1 and down to 0, excluded, whatever
      its range in training was.
  """

  objectives: tuple[str, ...]
  distribution: Distribution
  extrapolates: bool

  def coefficients(
    self, weights: Weights | None, alpha: float | None
  ) -> np.ndarray:
    """[M] float32; see `Policy.coefficients`."""
    array, alpha = self.weighting(weights, alpha)
    on_host: Any = (array, np.asarray(alpha, np.float32))
    return np.asarray(self.distribution.coefficients(Weighting(*on_host)))

  def weighting(
    self, weights: Weights | None, alpha: float | None
  ) -> tuple[np.ndarray, float]:
    """([m] float32, alpha), checked; arguments as for `coefficients`."""
    if weights is None:
      if len(self.objectives) > 1:
        raise ValueError(
          f"give weights for {', '.join(self.objectives)}, such as "
          f"{self.objectives[0]}=1."
        )
      weights = {self.objectives[0]: 1.0}
    array = weightings.weights_array(weights, self.objectives)
    q = self.distribution
    if q.alpha_range is None:
      if alpha is not None and alpha != q.alpha:
        raise ValueError(
          f"this run was trained with the one alpha {q.alpha:g}, got "
          f"{alpha:g}; leave alpha out."
        )
      return array, q.alpha
    low, high = (0.0, 1.0) if self.extrapolates else q.alpha_range
    if alpha is None or not (low <= alpha <= high and alpha > 0):
      raise ValueError(
        f"this run is steered by alpha in {'(' if low == 0 else '['}{low:g}, "
        f"{high:g}] too, got {alpha}; give one of them."
      )
    return array, alpha


def per_text(
  num: int,
  weights: Weights | Sequence[Weights] | None,
  alpha: float | Sequence[float | None] | None,
) -> list[tuple[Weights | None, float | None]]:
  """(weights, alpha) of each text, given one for all or one per text.

  Raises:
    ValueError: for another number of them than of texts.
  """

  def each(name: str, value: Any, kind: Any) -> list[Any]:
    if value is None or isinstance(value, kind):
      return [value] * num
    value = list(value)
    if len(value) != num:
      raise ValueError(
        f"got {len(value)} {name} for {num} texts; give one for all, or one "
        "per text."
      )
    return value

  every_alpha = each("alpha", alpha, float | int)
  return list(zip(each("weights", weights, Mapping), every_alpha, strict=True))

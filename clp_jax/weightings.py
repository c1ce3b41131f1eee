"""Weightings (alpha, weights): checked, sampled from Q, laid out on grids.

weights lie on the simplex over the m rewards; alpha in [0, 1] weighs the KL
term. With one fixed alpha the parameter sets are combined with the weights
alone; with several, the KL term is one more objective and has a set of its own
with coefficient alpha (arXiv 2407.15762; our reading, see docs/decisions.md).

Where that set is the reference itself and the others were finetuned at one
alpha_0, the coefficient can also be 1 - `realignment`(alpha, alpha_0): the
weight with which mixing logits gives alpha's optimum exactly.
"""

import dataclasses
import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.errors import check_choice

KL_COEFFICIENTS = ("alpha", "realigned")
TOLERANCE = 1e-4  # weights typed by hand, such as 0.333,0.333,0.334

Weights = Mapping[str, float]  # name of a reward -> its weight


class Weighting(NamedTuple):
  """G weightings: what a step trains on and what the policy is steered by."""

  weights: jax.Array  # [G, m] float32, rows on the simplex
  alpha: jax.Array  # [G] float32, in [0, 1]


@dataclasses.dataclass(frozen=True)
class Distribution:
  """Q, the distribution over weightings.

  Attributes:
    num_rewards: m.
    concentration: of the symmetric Dirichlet over weights; 1 is uniform over
      the simplex, small values favour its vertices, large ones its centre.
    weights: instead, one fixed weighting of the m rewards, or None.
    alpha: the one KL weight, in [0, 1].
    alpha_range: instead, (low, high) between which log(alpha) is uniform, or
      None. The policy then has a parameter set for the KL term.
    kl_coefficient: of that set: "alpha", or "realigned" from low, the alpha at
      which its coefficient is 0.
  """

  num_rewards: int
  concentration: float = 1.0
  weights: tuple[float, ...] | None = None
  alpha: float = 0.0
  alpha_range: tuple[float, float] | None = None
  kl_coefficient: str = "alpha"

  def __post_init__(self):
    if self.num_rewards < 1:
      raise ValueError("objectives is empty; name at least one reward.")
    if not 0 < self.concentration < np.inf:
      raise ValueError(
        "weightings.concentration must be > 0 and finite, got "
        f"{self.concentration}."
      )
    if self.weights is not None:
      check_weights(np.asarray(self.weights, np.float32), self.num_rewards)
    check_alpha(self.alpha)
    if self.alpha_range is not None:
      low, high = self.alpha_range
      if not 0 < low <= high <= 1:
        raise ValueError(
          "weightings.alpha_range must be 0 < low <= high <= 1, got "
          f"{tuple(self.alpha_range)}."
        )
    check_choice(
      "weightings.kl_coefficient", self.kl_coefficient, KL_COEFFICIENTS
    )
    if self.kl_coefficient == "realigned" and self.alpha_range == (1, 1):
      raise ValueError(
        "weightings.kl_coefficient = realigned needs an alpha_range whose low "
        "is below 1: what was trained at alpha = 1 knows no reward."
      )

  @property
  def num_sets(self) -> int:
    """M: one parameter set a reward, and one for KL if alpha varies."""
    return self.num_rewards + (self.alpha_range is not None)

  @property
  def penalises_kl(self) -> bool:
    """Whether the KL term has a weight at all."""
    return self.alpha_range is not None or self.alpha > 0

  def sample(self, key: jax.Array, num: int) -> Weighting:
    """Draws G = num weightings; a pure function of the key."""
    weights_key, alpha_key = jax.random.split(key)
    if self.weights is not None:
      weights = jnp.tile(jnp.asarray([self.weights], jnp.float32), (num, 1))
    else:
      # The Dirichlet through log-gammas: small concentrations underflow
      # ordinary gamma variates to 0 / 0.
      loggamma = jax.random.loggamma(
        weights_key, self.concentration, (num, self.num_rewards)
      )
      weights = jax.nn.softmax(loggamma, axis=-1)
    if self.alpha_range is None:
      alpha = jnp.full([num], self.alpha, jnp.float32)
    else:
      low, high = np.log(self.alpha_range)
      alpha = jnp.exp(
        jax.random.uniform(alpha_key, [num], minval=low, maxval=high)
      )
    return Weighting(weights, alpha)

  def coefficients(self, weighting: Weighting) -> jax.Array:
    """[G, M] coefficients of the parameter sets for the weightings.

    For an alpha below a realigned range they are not convex. NumPy arrays stay
    on the host, where nothing has to wait for a device that is busy.
    """
    if self.alpha_range is None:
      return coefficients(weighting.weights)
    if self.kl_coefficient == "alpha":
      return coefficients(weighting.weights, weighting.alpha)
    weight = realignment(weighting.alpha, self.alpha_range[0])[..., None]
    return _numpy_of(weight).concatenate(
      [weight * coefficients(weighting.weights), 1 - weight], axis=-1
    )


def realignment(alpha: jax.Array, trained_alpha: float) -> jax.Array:
  """The weight of a policy's logits that turns its KL weight into another.

  The optimum of V_alpha is proportional to pi_ref exp((1 - alpha) / alpha R).
  So with pi the optimum of trained_alpha, alpha's is proportional to
  pi_ref^(1 - weight) pi^weight for the ratio of the two factors of R.

  Args:
    alpha: [...] float in (0, 1], the KL weight that is asked for.
    trained_alpha: in (0, 1), that of the policy.

  Returns:
    [...] float32: 1 at trained_alpha, above it below, 0 at alpha 1.

  Source: Liu et al. 2024 (arXiv 2402.02992), for this V.
  """
  numpy = _numpy_of(alpha)
  alpha = numpy.asarray(alpha, numpy.float32)
  trained = numpy.float32(trained_alpha)
  # Divided in one order: exactly 1 where the two are equal.
  return ((1 - alpha) / alpha) / ((1 - trained) / trained)


def coefficients(weights, alpha=None) -> jax.Array:
  """Convex coefficients of the parameter sets for a weighting.

  Args:
    weights: [..., m] float on the simplex.
    alpha: [...] float in [0, 1] where the KL term has a set, else None.

  Returns:
    [..., m] float32 equal to weights, or [..., m + 1] float32 equal to
    ((1 - alpha) weights, alpha): the KL set comes last.

  Raises:
    ValueError: for concrete weights off the simplex or alpha out of [0, 1]
      (traced values can't be checked).
  """
  if not isinstance(weights, jax.core.Tracer):
    host = np.asarray(weights, np.float32)
    if host.ndim == 0:
      raise ValueError(f"weights must be a vector on the simplex, got {host}.")
    for row in host.reshape(-1, host.shape[-1]):
      check_weights(row, host.shape[-1])
  numpy = _numpy_of(weights)
  weights = numpy.asarray(weights, numpy.float32)
  if alpha is None:
    return weights
  if not isinstance(alpha, jax.core.Tracer):
    for value in np.asarray(alpha, np.float32).reshape(-1):
      check_alpha(float(value))
  alpha = numpy.asarray(alpha, numpy.float32)
  alpha = numpy.broadcast_to(alpha, weights.shape[:-1])[..., None]
  return numpy.concatenate([(1 - alpha) * weights, alpha], axis=-1)


def _numpy_of(array) -> Any:
  """NumPy for what is on the host, else JAX's."""
  return np if isinstance(array, np.ndarray | np.generic) else jnp


def check_weights(weights: np.ndarray, num_rewards: int) -> None:
  """Raises ValueError unless weights [m] are finite, >= 0 and sum to 1."""
  shown = ", ".join(f"{w:g}" for w in weights.reshape(-1))
  if weights.shape != (num_rewards,):
    raise ValueError(
      f"expected {num_rewards} weights, one a reward, got ({shown})."
    )
  if not np.all(np.isfinite(weights)) or np.any(weights < 0):
    raise ValueError(f"weights must be finite and >= 0, got ({shown}).")
  if abs(float(weights.sum()) - 1) > TOLERANCE:
    raise ValueError(
      f"weights must sum to 1, got ({shown}) with sum {float(weights.sum()):g}."
    )


def check_alpha(alpha: float) -> None:
  """Raises ValueError unless the KL weight alpha lies in [0, 1]."""
  if not 0 <= alpha <= 1:  # also false for NaN
    raise ValueError(f"alpha, the KL weight, must be in [0, 1], got {alpha}.")


def weights_array(weights: Weights, objectives: Sequence[str]) -> np.ndarray:
  """Named weights to [m] float32 in the order of the objectives.

  Objectives that are not named get weight 0.

  Raises:
    ValueError: for an unknown name or weights off the simplex.
  """
  if not isinstance(weights, Mapping):
    raise ValueError(
      f'weights must be named, such as {{"{objectives[0]}": 1}}, got {weights}.'
    )
  unknown = sorted(set(weights) - set(objectives))
  if unknown:
    raise ValueError(
      f"unknown objective {', '.join(map(repr, unknown))}; this run has "
      f"{', '.join(objectives)}."
    )
  try:
    values = [float(weights.get(name, 0.0)) for name in objectives]
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f"weights must be numbers, got {weights}.") from error
  with np.errstate(over="ignore"):  # infinite is refused below
    array = np.asarray(values, np.float32)
  check_weights(array, len(objectives))
  return array


@dataclasses.dataclass(frozen=True)
class WeightingSpace:
  """The weightings that a run can be given, by names and numbers.

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
    if alpha is not None and np.asarray(alpha).dtype.kind not in "fiu":
      raise ValueError(f"alpha must be a number, got {alpha!r}.")
    if weights is None:
      if len(self.objectives) > 1:
        raise ValueError(
          f"give weights for {', '.join(self.objectives)}, such as "
          f"{self.objectives[0]}=1."
        )
      weights = {self.objectives[0]: 1.0}
    array = weights_array(weights, self.objectives)
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

  every_alpha = each("alpha", alpha, numbers.Real)
  return list(zip(each("weights", weights, Mapping), every_alpha, strict=True))


def simplex_grid(num_rewards: int, points: int) -> np.ndarray:
  """All weights that are multiples of 1 / (points - 1).

  Args:
    num_rewards: m.
    points: how many points an edge of the simplex has, at least 2.

  Returns:
    [P, m] float32, P = C(points - 2 + m, m - 1), in lexicographic order;
    the vertices are exact.
  """
  if points < 2:
    raise ValueError(f"a grid needs at least 2 points an edge, got {points}.")
  steps = points - 1
  rows = []
  # Stars and bars: m - 1 bars among steps + m - 1 places.
  for bars in itertools.combinations(
    range(steps + num_rewards - 1), num_rewards - 1
  ):
    edges = (-1, *bars, steps + num_rewards - 1)
    rows.append([b - a - 1 for a, b in itertools.pairwise(edges)])
  return (np.asarray(rows, np.float64) / steps).astype(np.float32)

"""A front: what was measured of one method, as data and as files.

`Front` is the content of front.json. Means carry standard errors everywhere.
All paths may be gs://.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from numpy.typing import ArrayLike, NDArray

from clp_jax.errors import FrontError
from clp_jax.evaluation import fronts as fronts_lib
from clp_jax.interop import storage


class Estimate(NamedTuple):
  """A mean over prompts and its standard error, both in one unit."""

  mean: float
  stderr: float


@dataclasses.dataclass(frozen=True)
class Point:
  """What was measured at one weighting."""

  weights: Mapping[str, float]  # by objective, on the simplex
  alpha: float  # KL weight
  rewards: Mapping[str, Estimate]  # by objective, in the units optimised
  kl: Estimate  # nats per response, to the reference policy
  value: Estimate  # (1 - alpha) sum_i w_i R_i - alpha KL
  # Scores as the reward gives them, of objectives that training normalised.
  raw: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Front:
  """The points of one method, all on the same prompts and decoding."""

  method: str
  objectives: tuple[str, ...]  # the order of every [m] axis
  step: int  # completed updates of the policy
  prompts: int
  decoding: Mapping[str, Any]  # temperature, samples per prompt, ...
  reference_point: tuple[float, ...]  # [m], of the hypervolume
  hypervolume: float
  spread: float
  points: tuple[Point, ...]
  # What the whole method cost to train, in sampled responses; None: not known.
  training_samples: int | None = None
  # (mean, deviation) by which normalised objectives were: units.py.
  units: Mapping[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def weights(self) -> NDArray[np.float64]:
    """[P, m] objective weights of the points."""
    return np.array(
      [[p.weights[o] for o in self.objectives] for p in self.points]
    )

  @property
  def rewards(self) -> NDArray[np.float64]:
    """[P, m] mean rewards of the points."""
    return np.array(
      [[p.rewards[o].mean for o in self.objectives] for p in self.points]
    )

  @property
  def monotonicity(self) -> dict[str, float | None]:
    """Spearman correlation of each reward with its weight; None: undefined."""
    if len(self.points) < 2:
      return dict.fromkeys(self.objectives)
    values = fronts_lib.monotonicity(self.weights, self.rewards)
    return {
      o: None if np.isnan(v) else float(v)
      for o, v in zip(self.objectives, values, strict=True)
    }

  @property
  def expected_utility(self) -> float:
    """Mean over the points of sum_i w_i r_i."""
    return fronts_lib.expected_utility(self.weights, self.rewards)


def standard_error(samples: ArrayLike) -> Estimate:
  """Mean of samples, with its standard error over prompts.

  Responses to one prompt are alike, so they are no independent draws of the
  mean: the error is that of the mean of P prompt means, ignoring n.

  Args:
    samples: [P, n] float, n samples for each of P >= 2 prompts.

  Returns:
    The mean and its standard error (deviation over P - 1), in
    the samples' unit.

  Raises:
    ValueError: not [P, n], fewer than 2 prompts, or a value that is not finite.
  """
  samples = np.asarray(samples, np.float64)
  if samples.ndim != 2 or samples.shape[0] < 2 or samples.shape[1] < 1:
    raise ValueError(
      "A standard error needs samples [prompts, samples per prompt] of 2 "
      f"prompts or more; their shape is {samples.shape}."
    )
  if not np.isfinite(samples).all():
    prompt, sample = np.argwhere(~np.isfinite(samples))[0]
    raise ValueError(
      f"Sample {sample} of prompt {prompt} is {samples[prompt, sample]}; a "
      "mean needs finite values."
    )
  means = samples.mean(axis=1)
  return Estimate(
    float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))
  )


def front_from_points(
  points: Iterable[Point],
  *,
  method: str,
  objectives: Sequence[str],
  step: int,
  prompts: int,
  decoding: Mapping[str, Any],
  reference_point: Sequence[float],
  training_samples: int | None = None,
  units: Mapping[str, tuple[float, float]] | None = None,
) -> Front:
  """A front with its hypervolume and spread computed from the points.

  Args: as the fields of Front.

  Raises:
    FrontError: names of weights or rewards that are not the objectives, no
      points, a value that is not finite.
  """
  front = Front(
    method=method,
    objectives=tuple(objectives),
    step=int(step),
    prompts=int(prompts),
    decoding=dict(decoding),
    reference_point=tuple(float(x) for x in reference_point),
    hypervolume=0.0,
    spread=0.0,
    points=(),
    training_samples=training_samples,
    units=dict(units or {}),
  )
  return with_points(front, points)


def with_points(front: Front, points: Iterable[Point], **changes: Any) -> Front:
  """A front of the same kind, of these points over its objectives.

  Its other fields, but for hypervolume and spread, are the same, or those of
  `changes`. Raises FrontError as `front_from_points`.
  """
  front = dataclasses.replace(front, points=tuple(points), **changes)
  _check(front)
  return dataclasses.replace(
    front,
    hypervolume=fronts_lib.hypervolume(front.rewards, front.reference_point),
    spread=fronts_lib.spread(front.rewards),
  )


def save_front(directory: str | os.PathLike[str], front: Front) -> None:
  """Writes front.json and front.csv; each appears whole or not at all.

  Raises:
    FrontError: a front that load_front would not take back.
    OSError: the folder can't be written.
  """
  _check(front)
  path = epath.Path(directory)
  path.mkdir(parents=True, exist_ok=True)
  text = json.dumps(to_json(front), indent=2, allow_nan=False)
  storage.write_whole(path / "front.json", (text + "\n").encode())
  storage.write_whole(path / "front.csv", _to_csv(front).encode())


def load_front(path: str | os.PathLike[str]) -> Front:
  """Reads a front.json; fields that it does not know are ignored.

  Raises:
    FrontError: no such file, not JSON, or a field that is missing or wrong.
  """
  try:
    content = json.loads(epath.Path(path).read_text())
  except FileNotFoundError:
    raise FrontError(
      f"There is no {path}; `clp evaluate` writes one into a run's folder."
    ) from None
  except ValueError as error:
    raise FrontError(f"{path} is not JSON: {error}.") from None
  return front_from_json(content, str(path))


def front_from_json(content: Any, name: str) -> Front:
  """A front from the content of a front.json; `name` is what errors call it.

  Raises:
    FrontError: a field is missing or wrong.
  """
  try:
    front = _from_json(content)
    _check(front)
  except KeyError as error:
    raise FrontError(f"{name} is no front: it lacks {error}.") from None
  except (TypeError, ValueError, AttributeError) as error:
    raise FrontError(f"{name} is no front: {error}") from None
  return front


def _check(front: Front) -> None:
  """Raises FrontError unless the parts fit and every number is finite."""
  names = set(front.objectives)
  if not names or len(names) != len(front.objectives):
    raise FrontError(
      f"objectives must be different names, one or more: {front.objectives}."
    )
  if len(front.reference_point) != len(names):
    raise FrontError(
      f"reference_point has {len(front.reference_point)} values for the "
      f"{len(names)} objectives {', '.join(front.objectives)}."
    )
  if not front.points:
    raise FrontError("A front needs a point or more; there is none.")
  numbers = {
    "hypervolume": front.hypervolume,
    "spread": front.spread,
    **{f"reference_point[{i}]": x for i, x in enumerate(front.reference_point)},
  }
  for i, point in enumerate(front.points):
    where = f"points[{i}]"
    for field in ("weights", "rewards"):
      if set(getattr(point, field)) != names:
        raise FrontError(
          f"{where}.{field} must name the objectives "
          f"{', '.join(front.objectives)} and names "
          f"{', '.join(getattr(point, field)) or 'nothing'}."
        )
    numbers[f"{where}.alpha"] = point.alpha
    for name, weight in point.weights.items():
      numbers[f"{where}.weights.{name}"] = weight
    estimates = {f"rewards.{name}": e for name, e in point.rewards.items()}
    estimates |= {"kl": point.kl, "value": point.value}
    estimates |= {f"raw.{name}": e for name, e in point.raw.items()}
    for name, estimate in estimates.items():
      numbers[f"{where}.{name}.mean"] = estimate.mean
      numbers[f"{where}.{name}.stderr"] = estimate.stderr
  for name, number in numbers.items():
    if not math.isfinite(number):
      raise FrontError(f"{name} must be a finite number and is {number}.")


def to_json(front: Front) -> dict[str, Any]:
  """The content of front.json, derived quantities included."""

  def estimates(of: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {
      name: {"mean": float(mean), "stderr": float(stderr)}
      for name, (mean, stderr) in of.items()
    }

  return {
    "method": front.method,
    "objectives": list(front.objectives),
    "step": front.step,
    "prompts": front.prompts,
    "decoding": dict(front.decoding),
    "reference_point": list(front.reference_point),
    "hypervolume": front.hypervolume,
    "spread": front.spread,
    "monotonicity": front.monotonicity,
    "expected_utility": front.expected_utility,
    "training_samples": front.training_samples,
    "units": {
      name: {"mean": mean, "deviation": deviation}
      for name, (mean, deviation) in front.units.items()
    },
    "points": [
      {
        "weights": {o: float(point.weights[o]) for o in front.objectives},
        "alpha": float(point.alpha),
        "rewards": estimates({o: point.rewards[o] for o in front.objectives}),
      }
      | estimates({"kl": point.kl, "value": point.value})
      | ({"raw": estimates(point.raw)} if point.raw else {})
      for point in front.points
    ],
  }


def _from_json(content: Mapping[str, Any]) -> Front:
  """The inverse of to_json; KeyError or TypeError where it is no front."""

  def estimate(value: Mapping[str, Any]) -> Estimate:
    return Estimate(float(value["mean"]), float(value["stderr"]))

  return Front(
    method=str(content["method"]),
    objectives=tuple(content["objectives"]),
    step=int(content["step"]),
    prompts=int(content["prompts"]),
    decoding=dict(content["decoding"]),
    reference_point=tuple(float(x) for x in content["reference_point"]),
    hypervolume=float(content["hypervolume"]),
    spread=float(content["spread"]),
    points=tuple(
      Point(
        weights={name: float(w) for name, w in point["weights"].items()},
        alpha=float(point["alpha"]),
        rewards={name: estimate(e) for name, e in point["rewards"].items()},
        kl=estimate(point["kl"]),
        value=estimate(point["value"]),
        raw={name: estimate(e) for name, e in point.get("raw", {}).items()},
      )
      for point in content["points"]
    ),
    training_samples=content.get("training_samples"),
    units={
      name: (float(unit["mean"]), float(unit["deviation"]))
      for name, unit in content.get("units", {}).items()
    },
  )


def _to_csv(front: Front) -> str:
  """A row a point; `non_dominated` is 1 where no other point is better."""
  best = fronts_lib.non_dominated(front.rewards)
  rows = []
  for point, non_dominated in zip(front.points, best, strict=True):
    row: dict[str, float] = {}
    row |= {f"weight_{o}": point.weights[o] for o in front.objectives}
    row["alpha"] = point.alpha
    estimates = {f"reward_{o}": point.rewards[o] for o in front.objectives}
    estimates |= {"kl": point.kl, "value": point.value}
    estimates |= {f"raw_{o}": estimate for o, estimate in point.raw.items()}
    for name, estimate in estimates.items():
      row |= {f"{name}_mean": estimate.mean, f"{name}_stderr": estimate.stderr}
    rows.append({**row, "non_dominated": int(non_dominated)})
  return csv_text(rows)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as CSV, below the names of the first one's columns."""
  out = io.StringIO()
  writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def shared_objectives(fronts: Sequence[Front]) -> tuple[str, ...]:
  """The objectives of fronts that can be compared; FrontError for others."""
  if not fronts:
    raise FrontError("There is no front to show.")
  for front in fronts[1:]:
    if front.objectives != fronts[0].objectives:
      raise FrontError(
        f"{fronts[0].method} is a front of {', '.join(fronts[0].objectives)} "
        f"and {front.method} of {', '.join(front.objectives)}; compare fronts "
        "over the same objectives in the same order."
      )
  return fronts[0].objectives


def panels(objectives: Sequence[str]) -> list[tuple[str | None, str]]:
  """(x, y) of every picture of fronts: one reward is drawn against KL, which
  None stands for, more as every pair."""
  if len(objectives) == 1:
    return [(None, objectives[0])]
  return list(itertools.combinations(objectives, 2))


def dominated(front: Front) -> NDArray[np.bool_]:
  """[P] whether another point of the front is better in all rewards; with one
  reward, in reward and KL."""
  points = front.rewards
  if len(front.objectives) == 1:
    points = np.hstack([[[-p.kl.mean] for p in front.points], points])
  return ~fronts_lib.non_dominated(points)


def labels(front: Front, x: str | None, equals: str) -> dict[int, str]:
  """Names the ends and the middle of a sweep, or a simplex's corners.

  {number of the point: its weighting}, for an x of `panels`, with `equals`
  between a name and its value.
  """
  last = len(front.points) - 1
  named = {}
  if len(front.objectives) < 3:
    for i in (0, last // 2, last):
      point = front.points[i]
      name, value = ("\u03b1", point.alpha)
      if x is not None:
        name, value = f"w({x})", point.weights[x]
      named[i] = f"{name}{equals}{value:.2g}"
    return named
  for i, point in enumerate(front.points):
    name = max(point.weights, key=lambda o: point.weights[o])
    if point.weights[name] > 1 - 1e-6:
      named[i] = f"w({name}){equals}1"
  return named

"""A front as data, as files, as a picture and as a row of a table.

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
import rich.box
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clp_jax.errors import FrontError
from clp_jax.evaluation import fronts as fronts_lib


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
  # Over training seeds; None: one seed.
  hypervolume_stderr: float | None = None
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
    points=tuple(points),
    training_samples=training_samples,
    units=dict(units or {}),
  )
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
  write(path / "front.json", (text + "\n").encode())
  write(path / "front.csv", _to_csv(front).encode())


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
    "hypervolume_stderr": front.hypervolume_stderr,
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
    if number is not None and not math.isfinite(number):
      raise FrontError(f"{name} must be a finite number and is {number}.")


def to_json(front: Front) -> dict[str, Any]:
  """The content of front.json, derived quantities included."""

  def estimate(value: Estimate) -> dict[str, float]:
    return {"mean": float(value.mean), "stderr": float(value.stderr)}

  return {
    "method": front.method,
    "objectives": list(front.objectives),
    "step": front.step,
    "prompts": front.prompts,
    "decoding": dict(front.decoding),
    "reference_point": list(front.reference_point),
    "hypervolume": front.hypervolume,
    "hypervolume_stderr": front.hypervolume_stderr,
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
        "rewards": {o: estimate(point.rewards[o]) for o in front.objectives},
        "kl": estimate(point.kl),
        "value": estimate(point.value),
      }
      | (
        {"raw": {o: estimate(e) for o, e in point.raw.items()}}
        if point.raw
        else {}
      )
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
    hypervolume_stderr=content.get("hypervolume_stderr"),
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
  out = io.StringIO()
  writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def write(path: epath.Path, content: bytes) -> None:
  """Writes beside the file first, so that no reader sees half of it."""
  temporary = path.parent / f".{path.name}.partial"
  temporary.write_bytes(content)
  temporary.replace(path)


# Okabe and Ito's colours, told apart under the common colour blindnesses; their
# yellow is left out, too light for points on white.
COLOURS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#000000",
  "#E69F00",
  "#56B4E9",
)
MARKERS = "osD^vP"  # Six against seven colours: 42 styles.


def plot_fronts(
  fronts: Sequence[Front],
  path: str | os.PathLike[str],
  errors: str = "prompts",
) -> None:
  """Draws fronts over the same objectives into a PNG.

  One reward is drawn against KL, two in their plane, more as a panel for each
  pair. Bars are one standard error. A point that another of its front dominates
  (in all rewards; with one reward, in reward and KL) is hollow.

  Args:
    fronts: one or more, with the same objectives.
    path: of the PNG.
    errors: what the standard errors are over, for the caption.

  Raises:
    FrontError: no fronts, or fronts over different objectives.
    OSError: the file can't be written.
  """
  objectives = shared_objectives(fronts)
  pairs: list[tuple[str | None, str]]
  if len(objectives) == 1:
    pairs = [(None, objectives[0])]  # None stands for KL.
  else:
    pairs = list(itertools.combinations(objectives, 2))
  columns = min(len(pairs), 3)
  rows = -(-len(pairs) // columns)
  width, height = (6.4, 4.8) if len(pairs) == 1 else (4.0, 3.6)
  figure = Figure(
    figsize=(width * columns, height * rows + 0.4), layout="constrained"
  )
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax in axes[len(pairs) :]:
    ax.set_axis_off()
  for ax, (x, y) in zip(axes, pairs, strict=False):
    for i, front in enumerate(fronts):
      color = COLOURS[i % len(COLOURS)]
      marker = MARKERS[i % len(MARKERS)]
      _draw_points(ax, front, x, y, color, marker)
      if i == 0:
        _label_weightings(ax, front, x, y, color)
    ax.set_xlabel("KL to the reference (nats)" if x is None else f"reward {x}")
    ax.set_ylabel(f"reward {y}")
    ax.margins(x=0.12, y=0.08)  # Room for the labels.
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  handles, labels = axes[0].get_legend_handles_labels()
  longest = max(len(label) for label in labels)
  figure.legend(
    handles,
    labels,
    loc="outside upper left",
    # About 0.08 inch a character at this size, and half an inch for the marker.
    ncols=max(1, int(width * columns / (0.08 * longest + 0.5))),
    fontsize="small",
    frameon=False,
  )
  figure.supxlabel(
    "Hollow: dominated by another point of its front. Bars: one standard "
    f"error over {errors}. Labels: {fronts[0].method}.",
    fontsize="x-small",
    color="0.4",
    x=0.01,
    ha="left",
  )
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=150)
  write(epath.Path(path), png.getvalue())


def methods_rows(fronts: Sequence[Front]) -> list[dict[str, str]]:
  """A row a front, column to text: its cost, how good it is, how it steers.

  Columns that no front has a value for (training samples, rank correlation
  where no weight changes) are left out.

  Args:
    fronts: one or more, with the same objectives and reference point.

  Raises:
    FrontError: fronts whose hypervolumes can't be compared.
  """
  objectives = shared_objectives(fronts)
  for front in fronts[1:]:
    if front.reference_point != fronts[0].reference_point:
      raise FrontError(
        f"{fronts[0].method} has its hypervolume from "
        f"{fronts[0].reference_point} and {front.method} from "
        f"{front.reference_point}; evaluate both with one reference point."
      )
  rows = [
    {
      "method": front.method,
      "samples": _shown(front.training_samples, ","),
      "hypervolume": _shown_hypervolume(front),
      "spread": f"{front.spread:.3f}",
      "rank corr.": " ".join(
        _shown(front.monotonicity[o], ".2f") for o in objectives
      ),
      "utility": f"{front.expected_utility:.3f}",
    }
    | {f"raw {o}": _raw_range(front, o) for o in fronts[0].units}
    for front in fronts
  ]
  shown = [c for c in rows[0] if any(row[c].strip("- ") for row in rows)]
  return [{column: row[column] for column in shown} for row in rows]


def _raw_range(front: Front, objective: str) -> str:
  """Raw scores from the lowest point to the highest."""
  raw = [p.raw[objective].mean for p in front.points if objective in p.raw]
  return f"{min(raw):.3f} to {max(raw):.3f}" if raw else "-"


def methods_caption(fronts: Sequence[Front]) -> str:
  """What the columns of methods_rows mean, and how certain the rewards are."""
  objectives = fronts[0].objectives
  reference_point = ", ".join(f"{x:g}" for x in fronts[0].reference_point)
  points = [point for front in fronts for point in front.points]
  errors = ", ".join(
    f"{np.mean([p.rewards[o].stderr for p in points]):.3f} ({o})"
    for o in objectives
  )
  return (
    f"Hypervolume above ({reference_point}) in {', '.join(objectives)}. Rank "
    "corr.: of each reward with its weight. Utility: the weighted rewards, "
    f"mean over the sweep. Mean standard error of a point: {errors}."
    f"{units_note(fronts[0])}"
  )


def units_note(front: Front) -> str:
  """What normalised objectives are measured in, or ""."""
  if not front.units:
    return ""
  shown = ", ".join(
    f"{name} in deviations of {deviation:.3g} from {mean:.3g}"
    for name, (mean, deviation) in front.units.items()
  )
  return f" As optimised: {shown}."


def methods_table(fronts: Sequence[Front]) -> Table:
  """methods_rows as a table for a terminal; raises what it does."""
  rows = methods_rows(fronts)
  table = Table(
    box=rich.box.SIMPLE_HEAD,
    pad_edge=False,
    caption=methods_caption(fronts),
    caption_justify="left",
  )
  for i, column in enumerate(rows[0]):
    if i == 0:
      table.add_column(column, overflow="fold")
    else:
      table.add_column(column, justify="right", no_wrap=True)
  for row in rows:
    table.add_row(*map(Text, row.values()))
  return table


def print_table(fronts: Sequence[Front]) -> None:
  """Prints methods_table to stdout; 80 columns where that is no terminal."""
  Console().print(methods_table(fronts))


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


def _draw_points(
  ax: Axes, front: Front, x: str | None, y: str, color: str, marker: str
) -> None:
  """One front in one panel; x None stands for KL."""
  xs, x_errors = _axis(front, x)
  ys, y_errors = _axis(front, y)
  if x is None:
    hollow = ~fronts_lib.non_dominated(np.stack([-xs, ys], axis=1))
  else:
    hollow = ~fronts_lib.non_dominated(front.rewards)
  if len(front.objectives) < 3:
    # The order of the sweep is a line only where the weightings are one.
    ax.plot(xs, ys, color=color, linewidth=0.8, alpha=0.5, zorder=1)
  ax.errorbar(
    xs,
    ys,
    xerr=x_errors,
    yerr=y_errors,
    fmt="none",
    ecolor=color,
    elinewidth=0.8,
    alpha=0.5,
    zorder=1,
  )
  faces = np.where(hollow, "white", color)
  ax.scatter(
    xs,
    ys,
    s=28,
    marker=marker,
    c=faces,
    edgecolors=color,
    zorder=2,
  )
  ax.plot([], [], color=color, marker=marker, ls="", label=front.method)


def _label_weightings(
  ax: Axes, front: Front, x: str | None, y: str, color: str
) -> None:
  """Names the ends and the middle of a sweep, or a simplex's corners."""
  xs, _ = _axis(front, x)
  ys, _ = _axis(front, y)
  last = len(xs) - 1
  labels = {}  # by point
  if x is None:
    for i in (0, last // 2, last):
      labels[i] = f"\u03b1 = {front.points[i].alpha:.2g}"
  elif len(front.objectives) == 2:
    for i in (0, last // 2, last):
      labels[i] = f"w({x}) = {front.points[i].weights[x]:.2g}"
  else:
    for i, point in enumerate(front.points):
      name = max(point.weights, key=lambda o: point.weights[o])
      if point.weights[name] > 1 - 1e-6:
        labels[i] = f"w({name}) = 1"
  # Away from the line: reward rises with KL, and falls with another reward.
  side, align = (-5, "right") if x is None else (5, "left")
  for i, label in labels.items():
    ax.annotate(
      label,
      (float(xs[i]), float(ys[i])),
      xytext=(side, 5),
      textcoords="offset points",
      ha=align,
      fontsize="x-small",
      color=color,
    )


def _axis(front: Front, name: str | None) -> tuple[NDArray, NDArray]:
  """([P] means, [P] standard errors) of a reward, or of KL for None."""
  estimates = np.array(
    [p.kl if name is None else p.rewards[name] for p in front.points]
  )
  return estimates[:, 0], estimates[:, 1]


def _shown(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _shown_hypervolume(front: Front) -> str:
  shown = f"{front.hypervolume:.4f}"
  if front.hypervolume_stderr is not None:
    shown += f" \u00b1 {front.hypervolume_stderr:.4f}"
  return shown

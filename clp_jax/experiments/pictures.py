"""The pictures of the results page, drawn from the numbers of `results`.

A reader should see the point of a picture in ten seconds: at most five methods
in the large panel, the others one by one beside the first in small ones.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clp_jax.evaluation import fronts as fronts_lib
from clp_jax.evaluation.plot import COLOURS, MARKERS, save, tidy

Json = dict[str, Any]
Array = NDArray[np.float64]

MAIN = 5  # methods of the large panel
GREY = "0.75"
BASELINE = "Rewarded Soups"


def fronts(content: Json, path: pathlib.Path) -> None:
  """Draws an experiment's fronts, the mean of each method over its runs, into a
  PNG; the content, see `results.collect`, is of one without an axis."""
  names = list(content["fronts"])
  main = [n for n in content["shown"] if n in names][:MAIN] or names[:MAIN]
  rest = [n for n in names if n not in main]
  pairs = _pairs(content)
  if len(pairs) > 1:
    _several(content, main, pairs, path)
    return
  columns = 5
  rows = -(-len(rest) // columns)
  height = 4.6 + 1.9 * rows
  figure = Figure(figsize=(9.5, height), layout="constrained")
  top, *below = (
    figure.subfigures(
      2, 1, squeeze=False, height_ratios=[4.6, 1.9 * rows]
    ).ravel()
    if rows
    else [figure]
  )
  ax = top.subplots()
  for i, name in enumerate(main):
    _draw(ax, content, name, pairs[0], COLOURS[i], MARKERS[i])
  _label(ax, content, pairs[0])
  _name_ends(ax, content, main[0], pairs[0])
  handles, labels = ax.get_legend_handles_labels()
  top.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
  if rows:
    axes = below[0].subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(rest) :]:
      ax.set_axis_off()
    limits = [top.axes[0].get_xlim(), top.axes[0].get_ylim()]
    for ax, name in zip(axes, rest, strict=False):
      _draw(ax, content, main[0], pairs[0], GREY, "", size=1)
      _draw(ax, content, name, pairs[0], COLOURS[1], ".", size=18)
      ax.set_title(name, fontsize="small")
      ax.set_xlim(limits[0])
      ax.set_ylim(limits[1])
      ax.tick_params(labelsize="x-small")
      tidy(ax)
  _save(figure, path)


def _several(
  content: Json,
  main: Sequence[str],
  pairs: Sequence[tuple[int, int]],
  path: pathlib.Path,
) -> None:
  """Draws the fronts of three rewards or more: of two methods what each pair of
  rewards shows, and of all how much lies under them."""
  names = list(content["fronts"])
  volumes = {
    name: hypervolumes(content, content["fronts"][name]["method"])[1][0]
    for name in names
  }
  names.sort(key=lambda name: volumes[name].mean())
  against = [n for n in main[1:] if n == BASELINE] or main[1:2]
  heights = (3.6, 0.26 * len(names) + 0.8)
  figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
  grid = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
  (top,), (below,) = grid
  for ax, pair in zip(top.subplots(1, len(pairs)), pairs, strict=True):
    for i, name in enumerate([main[0], *against]):
      runs = content["fronts"][name]["runs"]
      mean = np.mean([points(content, run) for run in runs], axis=0)[:, pair]
      ax.scatter(*mean.T, s=14, color=COLOURS[i], marker=MARKERS[i], alpha=0.3)
      best = mean[fronts_lib.non_dominated(mean)]
      x, y = best[np.argsort(best[:, 0])].T
      ax.plot(x, y, color=COLOURS[i], marker=MARKERS[i], label=name)
    _label(ax, content, pair)
  top.legend(
    *top.axes[0].get_legend_handles_labels(),
    loc="outside upper left",
    ncols=2,
    frameon=False,
    title="Lines: the best of each pair of rewards.",
    alignment="left",
  )
  ax = below.subplots()
  for y, name in enumerate(names):
    colour = COLOURS[0] if name == main[0] else "0.35"
    ax.scatter(volumes[name], [y] * len(volumes[name]), s=22, color=colour)
    ax.scatter(volumes[name].mean(), y, s=160, marker="|", color=colour)
  ax.set_yticks(range(len(names)), names)
  ax.set_xlabel("hypervolume of the front: seeds, and their mean")
  tidy(ax)
  _save(figure, path)


def by_value(content: Json, path: pathlib.Path) -> None:
  """Draws an ablation, an experiment with an axis, into a PNG: a panel a value
  of its axis, the methods in each."""
  values = list(dict.fromkeys(f["value"] for f in content["fronts"].values()))
  pair = _pairs(content)[0]
  columns = 2 if len(values) == 4 else min(len(values), 3)
  rows = -(-len(values) // columns)
  figure = Figure(
    figsize=(3.4 * columns, 3.1 * rows + 0.4), layout="constrained"
  )
  axes = figure.subplots(
    rows, columns, squeeze=False, sharex=True, sharey=True
  ).ravel()
  for ax in axes[len(values) :]:
    ax.set_axis_off()
  for ax in axes[max(0, len(values) - columns) : len(values)]:
    ax.tick_params(labelbottom=True)  # below some of them is nothing
  for ax, value in zip(axes, values, strict=False):
    own = [n for n, f in content["fronts"].items() if f["value"] == value]
    for i, name in enumerate(own[:MAIN]):
      method = content["fronts"][name]["method"]
      _draw(ax, content, name, pair, COLOURS[i], MARKERS[i], 14, method)
    _label(ax, content, pair)
    ax.set_title(
      f"{content['axis']} {value:,}"
      if isinstance(value, int)
      else f"{content['axis']} {value}",
      fontsize="small",
    )
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper left", ncols=4, frameon=False
  )
  _save(figure, path)


def curve(content: Json, methods: Sequence[str], path: pathlib.Path) -> None:
  """Draws hypervolume and dominated points of training-steps over those steps,
  into a PNG; the first method is what the others are held against."""
  figure = Figure(figsize=(9.5, 4.0), layout="constrained")
  left, right = figure.subplots(1, 2)
  for i, method in enumerate(methods):
    steps, volumes = hypervolumes(content, method)
    if not steps:
      continue
    _band(left, steps, volumes, COLOURS[i], MARKERS[i], method)
    if i:
      common, shares = dominated(content, methods[0], method)
      _band(right, common, shares, COLOURS[i], MARKERS[i], None)
      common, back = dominated(content, method, methods[0])
      _band(right, common, back, COLOURS[i], "", None, dashed=True)
  left.set_ylabel("hypervolume of the front")
  right.set_ylabel("share of points dominated")
  right.set_ylim(-0.03, 1.03)
  for ax in (left, right):
    ax.set_xscale("log")
    ticks = sorted({s for m in methods for s in hypervolumes(content, m)[0]})
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("training steps of CLP")
    tidy(ax)
  figure.legend(
    *left.get_legend_handles_labels(),
    loc="outside upper left",
    ncols=3,
    frameon=False,
  )
  right.set_title(
    f"solid: theirs, by {methods[0]}; dashed: {methods[0]}'s, by theirs",
    fontsize="small",
    loc="left",
  )
  _save(figure, path)


def hypervolumes(content: Json, method: str) -> tuple[list[int], list[Array]]:
  """(values of the axis, [runs] hypervolumes at each) of a method."""
  values, found = [], []
  for front in content["fronts"].values():
    if front["method"] == method:
      values.append(front["value"])
      found.append(
        np.array(
          [
            fronts_lib.hypervolume(
              points(content, run), content["reference_point"]
            )
            for run in front["runs"]
          ]
        )
      )
  return values, found


def dominated(content: Json, a: str, b: str) -> tuple[list[int], list[Array]]:
  """(values of the axis, [runs] shares of b's points that a dominates)."""
  values, found = [], []
  by_value = {
    f["value"]: f for f in content["fronts"].values() if f["method"] == a
  }
  for front in content["fronts"].values():
    other = by_value.get(front["value"])
    if front["method"] != b or other is None:
      continue
    own = {run["seed"]: run for run in front["runs"]}
    shares = [
      fronts_lib.dominated_share(
        points(content, run), points(content, own[run["seed"]])
      )
      for run in other["runs"]
      if run["seed"] in own
    ]
    if shares:
      values.append(front["value"])
      found.append(np.array(shares))
  return values, found


def points(content: Json, run: Mapping[str, Any]) -> Array:
  """[P, axes] of a run's front; KL is an axis where there is one reward."""
  rewards = np.array(run["rewards"])
  if len(content["objectives"]) > 1:
    return rewards
  return np.concatenate([rewards, -np.array(run["kl"])[:, None]], axis=1)


def _pairs(content: Json) -> list[tuple[int, int]]:
  """Axes of each panel, of the columns of `points`."""
  m = len(content["objectives"])
  return [(1, 0)] if m == 1 else list(itertools.combinations(range(m), 2))


def _draw(
  ax: Axes,
  content: Json,
  name: str,
  pair: tuple[int, int],
  colour: str,
  marker: str,
  size: float = 22,
  label: str | None = None,
) -> None:
  """One method's mean front in one panel."""
  found = content["fronts"][name]
  each = np.stack([points(content, run) for run in found["runs"]])
  mean = each.mean(axis=0)
  x, y = mean[:, pair[0]], mean[:, pair[1]]
  if len(content["objectives"]) == 1:
    x = -x
  if len(content["objectives"]) < 3 and len(x) > 3:
    order = np.argsort(x)
    ax.plot(x[order], y[order], color=colour, linewidth=1, zorder=1)
  if len(each) > 1 and marker:
    error = each.std(axis=0, ddof=1) / np.sqrt(len(each))
    ax.errorbar(
      x,
      y,
      xerr=error[:, pair[0]],
      yerr=error[:, pair[1]],
      fmt="none",
      ecolor=colour,
      elinewidth=0.8,
      alpha=0.6,
    )
  if marker:
    ax.scatter(
      x, y, s=size, marker=marker, color=colour, zorder=2, label=label or name
    )


def _label(ax: Axes, content: Json, pair: tuple[int, int]) -> None:
  objectives = content["objectives"]
  if len(objectives) == 1:
    ax.set_xlabel("KL to the reference, nats")
  else:
    ax.set_xlabel(f"reward {objectives[pair[0]]}")
  ax.set_ylabel(f"reward {objectives[pair[1]]}")
  tidy(ax)


def _name_ends(
  ax: Axes, content: Json, name: str, pair: tuple[int, int]
) -> None:
  """Says which weighting the ends of a front are."""
  found = content["fronts"][name]
  mean = np.mean([points(content, run) for run in found["runs"]], axis=0)
  for i in (0, len(mean) - 1):
    *weights, alpha = found["weightings"][i]
    text = f"w({content['objectives'][0]}) = {weights[0]:.2g}"
    if len(content["objectives"]) == 1:
      text = f"\u03b1 = {alpha:.2g}"
    x = mean[i, pair[0]]
    ax.annotate(
      text,
      (-x if len(content["objectives"]) == 1 else x, mean[i, pair[1]]),
      xytext=(6, 6),
      textcoords="offset points",
      fontsize="small",
      color=COLOURS[0],
    )


def _band(
  ax: Axes,
  steps: Sequence[int],
  values: Sequence[Array],
  colour: str,
  marker: str,
  label: str | None,
  dashed: bool = False,
) -> None:
  """Means over seeds, and the band from the lowest seed to the highest."""
  order = np.argsort(steps)
  x = np.array(steps)[order]
  mean, low, high = (
    np.array([f(values[i]) for i in order]) for f in (np.mean, np.min, np.max)
  )
  ax.plot(
    x,
    mean,
    color=colour,
    marker=marker,
    markersize=5,
    linestyle="--" if dashed else "-",
    label=label,
  )
  if not dashed:
    ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _save(figure: Figure, path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  # The same numbers give the same file.
  save(figure, path, dpi=110, metadata={"Software": None})

"""Fronts as a picture, drawn by Matplotlib."""

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.front import Front
from clp_jax.interop import storage

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart under the common colour blindnesses; their
# yellow is left out, too light for points on white.
COLOURS = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
  *("#000000", "#E69F00", "#56B4E9"),
)
MARKERS = "osD^vP"  # Six against seven colours: 42 styles.


def plot_fronts(
  fronts: Sequence[Front],
  path: str | os.PathLike[str],
  errors: str = "prompts",
) -> None:
  """Draws fronts over the same objectives into a PNG.

  One reward is drawn against KL, two in their plane, more as a panel for each
  pair. Bars are one standard error, over what `errors` says. A point that
  another of its front dominates (in all rewards; with one reward, in reward and
  KL) is hollow.

  Raises:
    FrontError: no fronts, or fronts over different objectives.
    OSError: the file can't be written.
  """
  # Late: training imports this module, by the demo's config, and draws nothing.
  from matplotlib.figure import Figure

  pairs = front_lib.panels(front_lib.shared_objectives(fronts))
  columns = min(len(pairs), 3)
  rows = -(-len(pairs) // columns)
  width, height = (6.4, 4.8) if len(pairs) == 1 else (4.0, 3.6)
  entries = _legend_columns([f.method for f in fronts], width * columns)
  legend = 0.2 + 0.2 * -(-len(fronts) // entries)
  figure = Figure(
    figsize=(width * columns, height * rows + legend), layout="constrained"
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
    tidy(ax)
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside upper left",
    ncols=entries,
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
  save(figure, path, dpi=150)


def _legend_columns(names: Sequence[str], width: float) -> int:
  """As many as fit into `width` inches; a column is as wide as its longest
  name."""
  for columns in range(len(names), 1, -1):
    rows = -(-len(names) // columns)
    longest = [
      max(map(len, names[i : i + rows])) for i in range(0, len(names), rows)
    ]
    # About 0.08 inch a character at this size, and half an inch for the marker.
    if sum(0.08 * n + 0.5 for n in longest) <= width:
      return columns
  return 1


def tidy(ax: "Axes") -> None:
  """Leaves of the frame what is needed, and draws a pale grid below all."""
  ax.grid(color="0.92")
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)


def save(
  figure: "Figure", path: str | os.PathLike[str], dpi: int, **options: Any
) -> None:
  """Writes a PNG, whole or not at all; `options` are Matplotlib's."""
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=dpi, **options)
  storage.write_whole(epath.Path(path), png.getvalue())


def _draw_points(
  ax: "Axes", front: Front, x: str | None, y: str, color: str, marker: str
) -> None:
  """One front in one panel; x None stands for KL."""
  xs, x_errors = _axis(front, x)
  ys, y_errors = _axis(front, y)
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
  faces = np.where(front_lib.dominated(front), "white", color)
  ax.scatter(xs, ys, s=28, marker=marker, c=faces, edgecolors=color, zorder=2)
  ax.plot([], [], color=color, marker=marker, ls="", label=front.method)


def _label_weightings(
  ax: "Axes", front: Front, x: str | None, y: str, color: str
) -> None:
  """Names the ends and the middle of a sweep, or a simplex's corners."""
  xs, _ = _axis(front, x)
  ys, _ = _axis(front, y)
  # Away from the line: reward rises with KL, and falls with another reward.
  side, align = (-5, "right") if x is None else (5, "left")
  for i, label in front_lib.labels(front, x, " = ").items():
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

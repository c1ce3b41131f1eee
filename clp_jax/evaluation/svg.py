"""Where fronts lie in pictures of inline SVG, for a page that has no scripts.

A panel is a picture with a layer of points above it: each can be hovered over
and focused with the keyboard, and then shows its weighting and its figures. The
points are HTML, because text in a scaled picture is too small on a phone.
page/report.html draws what is placed here, and page/style.css gives the classes
their looks: `s0`, `s1`, ... are the fronts, `c0` to `c6` their colours.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.front import Estimate, Front, Point, dominated, labels

COLOURS = 7
MARKERS = 6  # against seven colours: 42 styles
_RADIUS = 5


class Box(NamedTuple):
  """A picture, and the edges of its axes."""

  width: int
  height: int
  left: int
  right: int
  top: int
  bottom: int


BOX = Box(440, 330, left=56, right=424, top=14, bottom=280)


class Mark(NamedTuple):
  """A point of a front."""

  shape: str  # outline of its mark, a path
  bars: str  # a cross of one standard error to each side
  is_hollow: bool
  left: str  # of the picture's width, in percent
  top: str
  side: str  # classes: where its figures have room
  lines: list[str]  # its figures


class Series(NamedTuple):
  """A front."""

  classes: str
  lines: list[str]  # paths
  marks: list[Mark]


class Label(NamedTuple):
  """The name of a point's weighting."""

  x: str
  y: str
  anchor: str
  text: str


class Panel(NamedTuple):
  """A picture of fronts."""

  caption: str
  x: str  # what the axes are
  y: str
  x_ticks: list[tuple[str, str]]  # (place, label)
  y_ticks: list[tuple[str, str]]
  series: list[Series]
  labels: list[Label]


def panels(fronts: Sequence[Front]) -> list[Panel]:
  """Places fronts over the same objectives: one reward against KL, or pairs.

  Args:
    fronts: none or more; the caller has checked that objectives are the same.

  Returns:
    A panel for one or two rewards, else one for each pair. A point that another
    of its front dominates (in all rewards; with one reward, in reward and KL)
    is hollow.
  """
  if not fronts:
    return []
  pairs = front_lib.panels(fronts[0].objectives)
  return [_panel(fronts, x, y) for x, y in pairs]


def marker(series: int) -> tuple[str, str]:
  """(classes, outline) of the mark of a front alone, for the legend."""
  return _classes(series), _shape(series, 0, 0)


def describe(front: Front, point: Point) -> list[str]:
  """What is known about a point, a line each."""
  weights = ", ".join(f"{o} {point.weights[o]:.2f}" for o in front.objectives)
  lines = [front.method, f"weights: {weights}", f"\u03b1: {point.alpha:.3g}"]
  lines += [f"{o}: {shown(point.rewards[o])}" for o in front.objectives]
  lines += [f"{o}, raw: {shown(raw)}" for o, raw in point.raw.items()]
  lines += [f"KL: {shown(point.kl)} nats", f"value: {shown(point.value)}"]
  return lines


def shown(estimate: Estimate) -> str:
  """A mean with its standard error."""
  digits = 4 if abs(estimate.mean) < 1 else 3
  return f"{estimate.mean:.{digits}f} \u00b1 {estimate.stderr:.{digits}f}"


class _Scale(NamedTuple):
  """A linear axis from data to the picture's units."""

  low: float
  high: float
  start: float
  stop: float

  def __call__(self, value: float) -> float:
    part = (value - self.low) / (self.high - self.low)
    return self.start + part * (self.stop - self.start)

  def ticks(self) -> Iterator[tuple[str, str]]:
    """A handful of round values: (place, label)."""
    rough = (self.high - self.low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    digits = max(0, -math.floor(math.log10(step)) + (step / power == 2.5))
    for i in range(
      math.ceil(self.low / step), math.floor(self.high / step) + 1
    ):
      # Adding 0 makes -0 a 0.
      label = f"{round(i * step, digits) + 0:.{digits}f}"
      yield f"{self(i * step):.1f}", label


def _panel(fronts: Sequence[Front], x: str | None, y: str) -> Panel:
  """One panel; x None stands for KL."""
  x_scale = _scale(fronts, x, BOX.left, BOX.right)
  y_scale = _scale(fronts, y, BOX.bottom, BOX.top)

  def place(point: Point) -> tuple[float, float]:
    return x_scale(_of(point, x).mean), y_scale(_of(point, y).mean)

  series = []
  for i, front in enumerate(fronts):
    places = [place(point) for point in front.points]
    marks = [
      Mark(
        _shape(i, at_x, at_y),
        _bars(point, x, y, x_scale, y_scale),
        bool(is_hollow),
        f"{100 * at_x / BOX.width:.2f}",
        f"{100 * at_y / BOX.height:.2f}",
        ("on-left" if at_x > BOX.width / 2 else "on-right")
        + (" below" if at_y < 0.45 * BOX.height else " above"),
        describe(front, point),
      )
      for point, (at_x, at_y), is_hollow in zip(
        front.points, places, dominated(front), strict=True
      )
    ]
    series.append(Series(_classes(i), _lines(front, places), marks))
  first = fronts[0]
  return Panel(
    caption=f"{y} against {'KL' if x is None else x}",
    x="KL to the reference (nats)" if x is None else f"reward {x}",
    y=f"reward {y}",
    x_ticks=list(x_scale.ticks()),
    y_ticks=list(y_scale.ticks()),
    series=series,
    labels=[
      _label(text, *place(first.points[i]))
      for i, text in labels(first, x, " ").items()
    ],
  )


def _lines(front: Front, places: list[tuple[float, float]]) -> list[str]:
  """Joins the points of a sweep, where the weightings lie on a line."""
  if len(front.objectives) > 2:
    return []
  # With two rewards and several alphas, a line for each alpha.
  keys = [p.alpha if len(front.objectives) == 2 else 0 for p in front.points]
  return [
    "M"
    + "L".join(
      f"{px:.1f} {py:.1f}"
      for (px, py), k in zip(places, keys, strict=True)
      if k == key
    )
    for key in dict.fromkeys(keys)
  ]


def _bars(
  point: Point, x: str | None, y: str, x_scale: _Scale, y_scale: _Scale
) -> str:
  """A cross of one standard error to each side."""
  at_x, at_y = _of(point, x), _of(point, y)
  left, right = (x_scale(at_x.mean + s * at_x.stderr) for s in (-1, 1))
  low, high = (y_scale(at_y.mean + s * at_y.stderr) for s in (-1, 1))
  return (
    f"M{left:.1f} {y_scale(at_y.mean):.1f}H{right:.1f}"
    f"M{x_scale(at_x.mean):.1f} {low:.1f}V{high:.1f}"
  )


def _label(text: str, x: float, y: float) -> Label:
  """Beside the point at (x, y), where there is room."""
  to_left = x > BOX.width * 0.72
  # In the corner where fronts end, there is more room below.
  below = to_left and y > BOX.height * 0.67
  return Label(
    f"{x + (-9 if to_left else 9):.1f}",
    f"{y + (17 if below else -8):.1f}",
    "end" if to_left else "start",
    text,
  )


def _scale(
  fronts: Sequence[Front], name: str | None, start: float, stop: float
) -> _Scale:
  """An axis with room for all points and their errors."""
  ends = [
    estimate.mean + side * estimate.stderr
    for front in fronts
    for estimate in (_of(point, name) for point in front.points)
    for side in (-1, 1)
  ]
  low, high = min(ends), max(ends)
  # A front of one point, or one that does not move, needs some width as well.
  room = 0.08 * (high - low) or 0.05 * abs(low) or 0.5
  return _Scale(low - room, high + room, start, stop)


def _of(point: Point, name: str | None) -> Estimate:
  return point.kl if name is None else point.rewards[name]


def _classes(series: int) -> str:
  return f"s{series} c{series % COLOURS}"


def _shape(series: int, x: float, y: float) -> str:
  """The outline of a front's mark around a place."""
  r = _RADIUS
  start = f"M{x:.1f} {y:.1f}m"
  match series % MARKERS:
    case 0:  # a circle
      return f"{start}-{r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0-{2 * r} 0z"
    case 1:  # a square
      return f"{start}-4-4h8v8h-8z"
    case 2:  # a diamond
      return f"{start}0-6l6 6-6 6-6-6z"
    case 3:  # triangles
      return f"{start}0-6l6 10h-12z"
    case 4:
      return f"{start}0 6l6-10h-12z"
  return f"{start}-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z"  # a plus

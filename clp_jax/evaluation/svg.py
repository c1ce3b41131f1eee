"""Fronts as inline SVG for a page that has no scripts.

A panel is a picture with a layer of points above it: each can be hovered over
and focused with the keyboard, and then shows its weighting and its figures. The
points are HTML, because text in a scaled picture is too small on a phone. The
page's style (html.py) gives the classes their looks: `s0`, `s1`, ... are the
fronts, `c0` to `c6` their colours.
"""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.front import Estimate, Front, Point, dominated, labels

COLOURS = 7
MARKERS = 6  # against seven colours: 42 styles
_WIDTH, _HEIGHT = 440, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 50  # margins
_RADIUS = 5


def panels(fronts: Sequence[Front]) -> list[tuple[str, str]]:
  """Draws fronts over the same objectives: one reward against KL, or pairs.

  Args:
    fronts: one or more; the caller has checked that objectives are the same.

  Returns:
    [(caption, HTML)]: a panel for one or two rewards, else one for each pair.
    A point that another of its front dominates (in all rewards; with one
    reward, in reward and KL) has the class "hollow".
  """
  return [
    (f"{y} against {'KL' if x is None else x}", _panel(fronts, x, y))
    for x, y in front_lib.panels(fronts[0].objectives)
  ]


def marker(series: int) -> str:
  """The mark of a front alone, for the legend."""
  return (
    '<svg class="key" viewBox="-9 -9 18 18" aria-hidden="true">'
    f'<path class="mark {_classes(series)}" d="{_shape(series, 0, 0)}"/></svg>'
  )


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


def escape(text: str) -> str:
  """Any text as HTML, for elements and attributes."""
  # What is no text in UTF-8, a lone surrogate, can't be written.
  return html.escape(text.encode(errors="replace").decode())


class _Scale(NamedTuple):
  """A linear axis from data to the picture's units."""

  low: float
  high: float
  start: float
  stop: float

  def __call__(self, value: float) -> float:
    part = (value - self.low) / (self.high - self.low)
    return self.start + part * (self.stop - self.start)

  def ticks(self) -> Iterator[tuple[float, str]]:
    """A handful of round values."""
    rough = (self.high - self.low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    digits = max(0, -math.floor(math.log10(step)) + (step / power == 2.5))
    for i in range(
      math.ceil(self.low / step), math.floor(self.high / step) + 1
    ):
      # Adding 0 makes -0 a 0.
      yield i * step, f"{round(i * step, digits) + 0:.{digits}f}"


def _panel(fronts: Sequence[Front], x: str | None, y: str) -> str:
  """One panel; x None stands for KL."""
  bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
  x_scale = _scale(fronts, x, _LEFT, right)
  y_scale = _scale(fronts, y, bottom, _TOP)
  x_name = "KL to the reference (nats)" if x is None else f"reward {x}"
  parts = [
    f'<div class="plot"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="{escape(f"reward {y} against {x_name}")}">'
  ]
  for value, label in x_scale.ticks():
    at = f"{x_scale(value):.1f}"
    parts.append(
      f'<path class="grid" d="M{at} {_TOP}V{bottom}"/>'
      f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
    )
  for value, label in y_scale.ticks():
    at = f"{y_scale(value):.1f}"
    parts.append(
      f'<path class="grid" d="M{_LEFT} {at}H{right}"/>'
      f'<text x="{_LEFT - 7}" y="{at}" dy=".35em" text-anchor="end">{label}'
      "</text>"
    )
  middle = (_TOP + bottom) / 2
  parts.append(
    f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
    f'<text class="name" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 9}" '
    f'text-anchor="middle">{escape(x_name)}</text>'
    f'<text class="name" x="13" y="{middle}" text-anchor="middle" '
    f'transform="rotate(-90 13 {middle})">{escape(f"reward {y}")}</text>'
  )
  points = []
  for series, front in enumerate(fronts):
    hollow = dominated(front)
    places = [
      (x_scale(_of(p, x).mean), y_scale(_of(p, y).mean)) for p in front.points
    ]
    parts.append(f'<g class="{_classes(series)}">')
    parts += _lines(front, places)
    for place, point, is_hollow in zip(
      places, front.points, hollow, strict=True
    ):
      parts.append(_bars(point, x, y, x_scale, y_scale))
      lines = [escape(line) for line in describe(front, point)]
      mark = "mark hollow" if is_hollow else "mark"
      parts.append(
        f'<path class="{mark}" d="{_shape(series, *place)}"><title>'
        f"{'&#10;'.join(lines)}</title></path>"
      )
      points.append(_point(series, place, lines))
    parts.append("</g>")
  parts += [_labels(fronts[0], x, y, x_scale, y_scale), "</svg>", *points]
  return "".join([*parts, "</div>"])


def _point(series: int, place: tuple[float, float], lines: list[str]) -> str:
  """What shows a point's figures; the lines are escaped."""
  left, top = 100 * place[0] / _WIDTH, 100 * place[1] / _HEIGHT
  side = "on-left" if left > 50 else "on-right"
  side += " below" if top < 45 else " above"
  first, *rest = lines
  shown_lines = "".join(f"<br>{line}" for line in rest)
  return (
    f'<span class="point {side} s{series}" tabindex="0" role="img" '
    f'style="left:{left:.2f}%;top:{top:.2f}%" aria-label="{"; ".join(lines)}">'
    f'<span class="tip"><b>{first}</b>{shown_lines}</span></span>'
  )


def _lines(front: Front, places: list[tuple[float, float]]) -> list[str]:
  """Joins the points of a sweep, where the weightings lie on a line."""
  if len(front.objectives) > 2:
    return []
  # With two rewards and several alphas, a line for each alpha.
  keys = [p.alpha if len(front.objectives) == 2 else 0 for p in front.points]
  return [
    '<path class="sweep" d="M'
    + "L".join(
      f"{px:.1f} {py:.1f}"
      for (px, py), k in zip(places, keys, strict=True)
      if k == key
    )
    + '"/>'
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
    f'<path class="bars" d="M{left:.1f} {y_scale(at_y.mean):.1f}H{right:.1f}'
    f'M{x_scale(at_x.mean):.1f} {low:.1f}V{high:.1f}"/>'
  )


def _labels(
  front: Front, x: str | None, y: str, x_scale: _Scale, y_scale: _Scale
) -> str:
  """Names the ends and the middle of a sweep, or a simplex's corners."""
  parts = []
  for i, label in labels(front, x, " ").items():
    at_x = x_scale(_of(front.points[i], x).mean)
    at_y = y_scale(_of(front.points[i], y).mean)
    to_left = at_x > _WIDTH * 0.72
    # In the corner where fronts end, there is more room below.
    below = to_left and at_y > _HEIGHT * 0.67
    parts.append(
      f'<text class="label s0" x="{at_x + (-9 if to_left else 9):.1f}" '
      f'y="{at_y + (17 if below else -8):.1f}" '
      f'text-anchor="{"end" if to_left else "start"}">'
      f"{escape(label)}</text>"
    )
  return "".join(parts)


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

"""report.html: fronts, tables and samples on one page that needs nothing else.

The page has no scripts and loads nothing: its pictures are inline SVG (svg.py)
and what moves is CSS, which its content security policy enforces. Its markup is
page/report.html, a template that escapes every text, its looks page/style.css.

  text = html.render(
    "My comparison",
    fronts=[json.loads(f.read_text()) for f in files],
    tables=[html.Table("Methods", rows)],
    samples=rows_of_samples_jsonl,
    configs={"full-CLP": config},
    commands=["clp compare runs/a runs/b --output runs/ab"],
    unsupported=tasks.fact_checker("newsroom"),
  )
  print(html.save("runs/ab/report.html", text))
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath
from flax import traverse_util

from clp_jax.evaluation import examples, svg
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.tables import units_note
from clp_jax.interop import storage

SHOWN_DOCUMENTS = 5
SHOWN_WEIGHTINGS = 5  # of a document's samples

# (document, summary) -> [(start, end)] of the summary's unsupported facts, or
# None where they can't be known.
Checker = Callable[[str, str], list[tuple[int, int]] | None]


class Table(NamedTuple):
  """A table of the page."""

  title: str
  # Column to value, in the order of the first row; a column that a row lacks is
  # empty there. A str is shown as it is, a float with four digits, None as "-".
  rows: Sequence[Mapping[str, Any]]
  note: str = ""  # below the table


class Grid(NamedTuple):
  """A table as text; a column of numbers is aligned at its right."""

  columns: list[tuple[str, bool]]  # name, whether it is one of numbers
  rows: list[list[str]]


class Document(NamedTuple):
  """A document with its summaries, by method and weighting."""

  document: str
  reference: str
  columns: dict[tuple, str]  # weightings that are shown -> name
  methods: dict[str, dict[tuple, Mapping[str, Any]]]  # rows by weighting


_TEMPLATES = jinja2.Environment(
  loader=jinja2.PackageLoader("clp_jax.evaluation", "page"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)


def render(
  title: str,
  *,
  fronts: Sequence[Mapping[str, Any]],
  tables: Sequence[Table] = (),
  samples: Sequence[Mapping[str, Any]] = (),
  configs: Mapping[str, Mapping[str, Any]] | None = None,
  commands: Sequence[str] = (),
  about: Mapping[str, str] | None = None,
  unsupported: Checker | None = None,
) -> str:
  """The page's HTML.

  Args:
    title: its heading.
    fronts: contents of front.json, over the same objectives; the first is the
      one whose weightings are labelled. None: the page has no plots.
    tables: shown below the plots, in this order. The points of every front get
      tables of their own by themselves.
    samples: rows of samples.jsonl ("document", "reference", "weights", "alpha",
      "summary", "rewards"), with "method" added where there are several. Of
      many weightings, SHOWN_WEIGHTINGS that are far from each other are shown.
    configs: name of a run -> its config.json. Fields that differ between runs
      are shown first.
    commands: shell commands that make this page again, in order.
    about: name -> text, such as {"time": "497 s"}, at the head of the page.
    unsupported: marks facts; `data.tasks.fact_checker` has it for data that
      know them.

  Returns:
    A whole document, for `save`.

  Raises:
    FrontError: a front is malformed, or they differ in their objectives.
  """
  loaded = [
    front_lib.front_from_json(front, f"fronts[{i}]")
    for i, front in enumerate(fronts)
  ]
  if loaded:
    front_lib.shared_objectives(loaded)
  documents, chosen = _documents(samples)
  text = _TEMPLATES.get_template("report.html").render(
    title=title,
    about=about,
    fronts=loaded,
    box=svg.BOX,
    marker=svg.marker,
    panels=svg.panels(loaded),
    measured=_measured(loaded),
    tables=[(table, _grid(table.rows)) for table in tables],
    samples=documents,
    chosen=chosen,
    knows_facts=unsupported is not None,
    marked=functools.partial(_marked, unsupported),
    points=[_points(front) for front in loaded],
    configs=configs and _configs(configs),
    runs=configs,
    commands=commands,
  )
  # What is no text in UTF-8, a lone surrogate, can't be written.
  return text.encode(errors="replace").decode()


def save(path: str | os.PathLike[str], text: str) -> str:
  """Writes a page, whole or not at all, to a path that may be gs://.

  Returns:
    Its address, which a browser opens: file://... for a local path.
  """
  storage.write_whole(epath.Path(path), text.encode())
  name = os.fspath(path)
  return name if "://" in name else epath.Path(name).absolute().as_uri()


def _measured(fronts: Sequence[front_lib.Front]) -> str:
  """How the points were measured, where all fronts agree on it."""
  kinds = [(f.prompts, f.decoding) for f in fronts]
  if any(kind != kinds[0] for kind in kinds):
    return "The fronts differ in prompts or decoding; see the points."
  return _decoding(fronts[0]) if fronts else ""


def _decoding(front: front_lib.Front) -> str:
  settings = ", ".join(f"{k} {v}" for k, v in front.decoding.items())
  return f"{front.prompts} prompts; decoding: {settings}."


def _points(front: front_lib.Front) -> tuple[front_lib.Front, Grid, str]:
  """(front, its points as a table, what is below it)."""
  rows = []
  for point in front.points:
    row: dict[str, Any] = {
      f"w({o})": f"{point.weights[o]:.2f}" for o in front.objectives
    }
    row["\u03b1"] = f"{point.alpha:.3g}"
    row |= {o: svg.shown(point.rewards[o]) for o in front.objectives}
    row |= {f"{o}, raw": svg.shown(raw) for o, raw in point.raw.items()}
    row |= {"KL (nats)": svg.shown(point.kl), "value": svg.shown(point.value)}
    rows.append(row)
  note = f"Step {front.step}. {_decoding(front)}{units_note(front)}"
  return front, _grid(rows), note


def _grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
  columns = list(dict.fromkeys(column for row in rows for column in row))
  cells = [[_shown(row.get(column, "")) for column in columns] for row in rows]
  are_numbers = [
    all(_is_number(row[i]) for row in cells if row[i])
    for i in range(len(columns))
  ]
  return Grid(list(zip(columns, are_numbers, strict=True)), cells)


def _documents(
  samples: Sequence[Mapping[str, Any]],
) -> tuple[list[Document], str]:
  """Telling documents, and how they were chosen, if some are left out."""
  by_document: dict[str, list[Mapping[str, Any]]] = {}
  for row in samples:
    by_document.setdefault(row["document"], []).append(row)
  own = [r for r in samples if r.get("method") == samples[0].get("method")]
  telling = examples.telling(own, SHOWN_DOCUMENTS)
  chosen = ""
  if len(telling) < len(by_document):
    chosen = examples.CHOSEN.format(documents=len(by_document))
  return [_document(by_document[name]) for name in telling], chosen


def _document(rows: Sequence[Mapping[str, Any]]) -> Document:
  keys = list(dict.fromkeys(map(_weighting, rows)))
  one_alpha = len({key[-1] for key in keys}) == 1
  methods: dict[str, dict[tuple, Mapping[str, Any]]] = {}
  for row in rows:
    own = methods.setdefault(row.get("method", ""), {})
    own.setdefault(_weighting(row), row)
  return Document(
    rows[0]["document"],
    rows[0]["reference"],
    {key: _weighting_name(key, one_alpha) for key in _far_apart(keys)},
    methods,
  )


def _marked(
  unsupported: Checker | None, document: str, text: str
) -> list[tuple[str, bool]] | None:
  """(part, whether it is an unsupported fact) of a text; None if unknown."""
  spans = [] if unsupported is None else unsupported(document, text)
  if spans is None:
    return None
  parts, end = [], 0
  for start, stop in spans:
    parts += [(text[end:start], False), (text[start:stop], True)]
    end = stop
  return [*parts, (text[end:], False)]


def _weighting(row: Mapping[str, Any]) -> tuple:
  return (*row["weights"].items(), ("\u03b1", row.get("alpha")))


def _weighting_name(key: tuple, one_alpha: bool) -> str:
  *weights, (_, alpha) = key
  shown = ", ".join(f"{name} {weight:.2f}" for name, weight in weights)
  return shown if one_alpha else f"{shown}, \u03b1 {alpha:.3g}"


def _far_apart(keys: list[tuple]) -> list[tuple]:
  """SHOWN_WEIGHTINGS keys that are far from each other, in their order.

  Starts with the first and adds the one that is farthest from all chosen so
  far: the ends of a line, then its middle; the corners of a simplex, then its
  centre.
  """
  if len(keys) <= SHOWN_WEIGHTINGS:
    return keys
  places = np.array(
    [[value or 0.0 for _, value in key] for key in keys], np.float64
  )
  # A KL weight counts by its order of magnitude.
  alphas = np.log(np.maximum(places[:, -1], 1e-6))
  places[:, -1] = (alphas - alphas.min()) / max(np.ptp(alphas), 1e-9)
  chosen = [0]
  while len(chosen) < SHOWN_WEIGHTINGS:
    gaps = places[:, None] - places[None, chosen]
    distances = np.linalg.norm(gaps, axis=-1)
    chosen.append(int(np.argmax(np.min(distances, axis=1))))
  return [keys[i] for i in sorted(chosen)]


def _configs(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Grid, Grid]:
  """Fields that differ between runs, and those that all share."""
  flat = {
    name: traverse_util.flatten_dict(dict(config), sep=".")
    for name, config in configs.items()
  }
  fields = list(dict.fromkeys(f for values in flat.values() for f in values))
  differing, shared = [], []
  for field in fields:
    shown = {
      name: json.dumps(values[field], ensure_ascii=False)
      if field in values
      else None
      for name, values in flat.items()
    }
    if len(set(shown.values())) == 1:
      shared.append({"field": field, "value": next(iter(shown.values()))})
    else:
      differing.append({"field": field} | shown)
  return _grid(differing), _grid(shared)


def _shown(value: Any) -> str:
  match value:
    case None:
      return "-"
    case bool():
      return str(value)
    case float() | np.floating():
      return f"{value:.4g}"
  return str(value)


def _is_number(text: str) -> bool:
  return text[:1].isdigit() or text[:2].strip("+-.").isdigit() or text == "-"

"""A comparison as files: table, fronts and one page.

comparison.md    tables, also what the terminal shows
comparison.csv   a row a method, full precision
comparison.json  everything, seed by seed
fronts.png       every method's front, mean over its runs
report.html      all of it on one page, with samples and configs
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clp_jax.evaluation import examples, html, plot
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import tables as tables_lib
from clp_jax.evaluation.compare import Comparison, mean_front
from clp_jax.evaluation.intervals import Value
from clp_jax.evaluation.metrics import in_plane
from clp_jax.interop import storage

Row = dict[str, str]


def tables(found: Comparison) -> dict[str, list[Row]]:
  """Title -> rows of text, column -> cell, for every way of showing them."""
  methods = []
  for name in found.methods:
    values = found.values[name]
    samples = found.runs[name][0].front.training_samples
    row = {
      "method": name,
      "runs": str(len(found.runs[name])),
      "samples": "-" if samples is None else f"{samples:,}",
    }
    row |= {m: shown(values[m], _digits(m)) for m in found.metrics}
    methods.append(row)
  made = {"Methods": methods}
  if found.differences:
    first = found.methods[0]
    rows = []
    for name, values in found.differences.items():
      row = {"method": name}
      for m in (m for m in found.metrics if not m.startswith("rank corr.")):
        row[m] = shown(values[m], _digits(m), sign=True)
      row[f"dominated by {first}"] = f"{found.dominated[first][name]:.2f}"
      row[f"dominates of {first}"] = f"{found.dominated[name][first]:.2f}"
      rows.append(row)
    made[f"Differences from {first}"] = rows
  return {title: tables_lib.without_empty(rows) for title, rows in made.items()}


def note(found: Comparison) -> str:
  """What the tables' figures are, in a paragraph."""
  points = [
    f"{name[0].upper()}{name[1:]} above ("
    + ", ".join(f"{k} = {v:g}" for k, v in point.items())
    + ")"
    for name, point in found.reference_points.items()
  ]
  seeds = [len(runs) > 1 for runs in found.runs.values()]
  front = found.runs[found.methods[0]][0].front
  plane = in_plane(front)
  over = "prompts alone: one seed says nothing about others"
  if any(seeds):
    over = "prompts and seeds" + ("" if all(seeds) else " (one run: prompts)")
  return (
    f"{'; '.join(points)}. "
    "IGD+: mean distance from the best points of all methods, the "
    f"{len(found.best_points)} non-dominated ones of their mean fronts, to the "
    "method's mean front, where it is worse; lower is better. "
    + ("Means over runs +- standard error over them. " if any(seeds) else "")
    + f"In brackets 95% intervals over {over}, of {found.bootstrap} resamples "
    f"of {front.prompts} prompts; what noise is expected to add is taken off "
    "the estimates. Rank corr.: Spearman's, of each reward with "
    + ("-alpha. " if plane else "its weight. ")
    + "Utility and value: means over the distribution Q of the weighted "
    "rewards, and of the objective with its KL term. Dominated: share of "
    "points beaten in every "
    + ("reward and in KL." if plane else "reward.")
    + tables_lib.units_note(front)
  )


def shown(value: Value, digits: int, sign: bool = False) -> str:
  """0.7987 +- 0.0012 [0.7961, 0.8013], as far as it is known."""
  if not math.isfinite(value.mean):
    return "-"
  plus = "+" if sign else ""
  text = f"{value.mean:{plus}.{digits}f}"
  if value.stderr is not None:
    text += f" \u00b1 {value.stderr:.{digits}f}"
  if math.isfinite(value.low):
    text += f" [{value.low:{plus}.{digits}f}, {value.high:{plus}.{digits}f}]"
  return text


def markdown(found: Comparison) -> str:
  """The tables with their note."""
  table = tables_lib.markdown_table
  parts = [f"### {t}\n\n{table(rows)}" for t, rows in tables(found).items()]
  return "\n".join(parts) + f"\n{note(found)}\n"


def to_csv(found: Comparison) -> str:
  """A row a method: mean, stderr, low and high of every metric."""
  rows = []
  for name in found.methods:
    row: dict[str, Any] = {"method": name, "runs": len(found.runs[name])}
    row["training_samples"] = found.runs[name][0].front.training_samples
    for metric in found.metrics:
      for part, number in found.values[name][metric]._asdict().items():
        row[f"{metric} {part}"] = _number(number)
    rows.append(row)
  return front_lib.csv_text(rows)


def to_json(found: Comparison) -> dict[str, Any]:
  """Everything, as JSON values; what is not defined is null."""

  def values(of: Mapping[str, Value]) -> dict[str, Any]:
    return {
      metric: {k: _number(x) for k, x in value._asdict().items()}
      for metric, value in of.items()
    }

  return {
    "objectives": list(found.objectives),
    "reference_points": found.reference_points,
    "best_points": found.best_points,
    "bootstrap": found.bootstrap,
    "methods": {
      name: {
        "runs": [
          {"path": run.path, "seed": run.seed, "step": run.front.step}
          for run in found.runs[name]
        ],
        "training_samples": found.runs[name][0].front.training_samples,
        "metrics": values(found.values[name]),
        "difference": (
          values(found.differences[name]) if name in found.differences else None
        ),
        "dominates": found.dominated[name],
      }
      for name in found.methods
    },
  }


def save(
  directory: str,
  found: Comparison,
  *,
  title: str,
  commands: Sequence[str],
  unsupported: html.Checker | None = None,
) -> str:
  """Writes the files of the module, and gives the address of report.html;
  title, commands and unsupported are of `html.render`."""
  path = epath.Path(directory)
  path.mkdir(parents=True, exist_ok=True)
  fronts = [mean_front(found.runs[name], name) for name in found.methods]
  several = any(len(runs) > 1 for runs in found.runs.values())
  over = "runs" if several else "prompts"
  plot.plot_fronts(fronts, path / "fronts.png", errors=over)
  content = json.dumps(to_json(found), indent=2, allow_nan=False) + "\n"
  for name, text in (
    ("comparison.md", markdown(found)),
    ("comparison.csv", to_csv(found)),
    ("comparison.json", content),
  ):
    storage.write_whole(path / name, text.encode())
  made = tables(found)
  page = html.render(
    title,
    fronts=[front_lib.to_json(front) for front in fronts],
    tables=[
      html.Table(name, rows, note(found) if i == len(made) - 1 else "")
      for i, (name, rows) in enumerate(made.items())
    ],
    samples=_samples_of(found),
    configs=_configs_of(found),
    commands=commands,
    unsupported=unsupported,
  )
  return html.save(path / "report.html", page)


def print_tables(found: Comparison) -> None:
  """Prints the tables to stdout, for 80 columns where that is no terminal.

  A table that is too wide is turned: a line a figure, so that nothing is cut.
  """
  console = Console()
  unbounded = console.options.update(max_width=1000)
  for title, rows in tables(found).items():
    named = {"title": title, "title_justify": "left"}
    table = tables_lib.row_each(rows, {"no_wrap": True}, **named)
    if console.measure(table, options=unbounded).maximum > console.width:
      table = _one_line_each(title, rows)
    console.print(table)
  console.print(note(found), highlight=False)


def _one_line_each(title: str, rows: Sequence[Row]) -> Table:
  """A line a figure, those of one kind together."""
  first, *columns = rows[0]
  table = tables_lib.bare(title=title, title_justify="left")
  for name in ("", first, ""):
    table.add_column(name)
  for column in columns:
    for i, row in enumerate(rows):
      cells = ("" if i else column, row[first], row[column])
      table.add_row(*map(Text, cells), end_section=i == len(rows) - 1)
  return table


def _samples_of(found: Comparison) -> list[dict[str, Any]]:
  """Rows of samples.jsonl of each method's first run, with "method"."""
  rows = []
  for name in found.methods:
    with contextlib.suppress(FileNotFoundError):
      own = examples.load(found.runs[name][0].path)
      rows += [{"method": name} | row for row in own]
  return rows


def _configs_of(found: Comparison) -> dict[str, Any]:
  """config.json of each method's first run."""
  configs = {}
  for name in found.methods:
    file = epath.Path(found.runs[name][0].path) / "config.json"
    if file.exists():
      configs[name] = json.loads(file.read_text())
  return configs


def _digits(metric: str) -> int:
  return 2 if metric.startswith("rank corr") else 4


def _number(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value

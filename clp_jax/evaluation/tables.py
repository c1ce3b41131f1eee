"""Rows of text as tables: what methods' fronts are worth, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clp_jax.errors import FrontError
from clp_jax.evaluation.front import Front, shared_objectives

Row = Mapping[str, str]


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
      "hypervolume": f"{front.hypervolume:.4f}",
      "spread": f"{front.spread:.3f}",
      "rank corr.": " ".join(
        _shown(front.monotonicity[o], ".2f") for o in objectives
      ),
      "utility": f"{front.expected_utility:.3f}",
    }
    | {f"raw {o}": _raw_range(front, o) for o in fronts[0].units}
    for front in fronts
  ]
  return without_empty(rows)


def without_empty(rows: Sequence[Row]) -> list[dict[str, str]]:
  """Rows without the columns that hold nothing but dashes."""
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


def markdown_table(rows: Sequence[Row]) -> str:
  """Rows as a markdown table; what a row lacks is left empty."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  lines = [columns, ["---"] * len(columns)]
  lines += [
    [row.get(column, "").replace("|", "\\|") for column in columns]
    for row in rows
  ]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def methods_table(fronts: Sequence[Front]) -> Table:
  """methods_rows as a table for a terminal; raises what it does."""
  caption = {"caption": methods_caption(fronts), "caption_justify": "left"}
  return row_each(methods_rows(fronts), {"overflow": "fold"}, **caption)


def row_each(rows: Sequence[Row], first: Any, **options: Any) -> Table:
  """Rows as a table for a terminal; `first` are its first column's options."""
  table = bare(**options)
  name, *others = rows[0]
  table.add_column(name, **first)
  for column in others:
    table.add_column(column, justify="right", no_wrap=True)
  for row in rows:
    table.add_row(*map(Text, row.values()))
  return table


def bare(**options: Any) -> Table:
  """A table for a terminal, without columns yet; `options` are rich's."""
  return Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, **options)


def print_table(fronts: Sequence[Front]) -> None:
  """Prints methods_table to stdout; 80 columns where that is no terminal."""
  Console().print(methods_table(fronts))


def _shown(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)

"""Writes docs/plans.md and docs/measurements.md from figures kept as JSON.

  python -m benchmarks.notes
  python -m benchmarks.notes --check

docs/results/plans.json and docs/results/measurements.json hold every figure
once. A page has a `title`, paragraphs `about` it, and `sections`. A section has
a title, the lines of its `command`, what FACTS names (null where it is not
recorded, left out where it has no meaning), and a `body` of paragraphs and
tables. The `columns` of a table say how their numbers are formatted; its other
cells are strings, which stand as they are, or null.

--check writes nothing. Status 1 if a page differs from what its figures give.
"""

import argparse
import json
import pathlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

DOCS = pathlib.Path(__file__).parents[1] / "docs"
NAMES = ("plans", "measurements")
FACTS = ("machine", "versions", "date", "commit", "n")
WIDTH = 80

Json = dict[str, Any]


def page(content: Json, source: str) -> str:
  """A page's markdown.

  Args:
    content: of a file of figures.
    source: that file, relative to the page.
  """
  written = (
    f"Written by `python -m benchmarks.notes` from [{source}]({source}): "
    "change the figures there, not here."
  )
  parts = [f"# {content['title']}"]
  parts += map(paragraph, [*content["about"], written])
  for section in content["sections"]:
    parts += section_parts(section)
  return "\n\n".join(parts) + "\n"


def section_parts(section: Json) -> list[str]:
  """The heading, command, facts, paragraphs and tables of a section."""
  parts = [f"## {section['title']}"]
  if section["command"]:
    parts.append(textwrap.indent("\n".join(section["command"]), "    "))
  facts = []
  for name in FACTS:
    if name in section:
      value = "not recorded" if section[name] is None else section[name]
      facts.append(f"{name}: {value}")
  parts.append(paragraph("; ".join(facts) + "."))
  for item in section["body"]:
    if isinstance(item, str):
      parts.append(paragraph(item))
    else:
      parts.append(table(item["columns"], item["rows"]))
  return parts


def paragraph(text: str) -> str:
  """Text in lines of WIDTH; words, and so links, stay whole."""
  return textwrap.fill(
    text, WIDTH, break_long_words=False, break_on_hyphens=False
  )


def table(columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> str:
  """A markdown table.

  Args:
    columns: name -> format of its numbers, such as ".1f".
    rows: of as many cells.

  Raises:
    ValueError: when a row has another number of cells.
  """
  lines = [list(columns), ["---"] * len(columns)]
  for row in rows:
    pairs = zip(row, columns.values(), strict=True)
    lines.append([cell(value, spec) for value, spec in pairs])
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: float | str | None, spec: str) -> str:
  """A cell's text; a number in the format of its column."""
  if value is None:
    return ""
  return value if isinstance(value, str) else format(value, spec)


def pages(docs: pathlib.Path) -> dict[pathlib.Path, str]:
  """Path of each page -> what it should hold.

  Args:
    docs: folder of the pages; their figures are in docs/results.
  """
  found = {}
  for name in NAMES:
    source = f"results/{name}.json"
    content = json.loads((docs / source).read_text())
    found[docs / f"{name}.md"] = page(content, source)
  return found


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--docs", type=pathlib.Path, default=DOCS)
  args = parser.parse_args(argv)
  status = 0
  for path, text in pages(args.docs).items():
    if not args.check:
      path.write_text(text)
    elif not path.exists() or path.read_text() != text:
      print(
        f"{path} is not what its figures give; run python -m benchmarks.notes",
        file=sys.stderr,
      )
      status = 1
  return status


if __name__ == "__main__":
  sys.exit(main())

"""The pages that are written from figures kept as JSON."""

import copy
import json
import shutil

import pytest

from benchmarks import notes


@pytest.fixture
def docs(tmp_path):
  """A copy of the pages and their figures."""
  (tmp_path / "results").mkdir()
  for name in notes.NAMES:
    for path in (f"{name}.md", f"results/{name}.json"):
      shutil.copy(notes.DOCS / path, tmp_path / path)
  return tmp_path


def contents():
  for name in notes.NAMES:
    path = notes.DOCS / "results" / f"{name}.json"
    yield name, json.loads(path.read_text())


def numbers(value, path=()):
  """The path of every number in a JSON value."""
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
      yield from numbers(item, (*path, key))
  elif isinstance(value, int | float):
    yield path


def change(content, path):
  *above, last = path
  for key in above:
    content = content[key]
  content[last] += 1


def test_the_pages_are_what_their_figures_give(capsys):
  assert notes.main(["--check"]) == 0
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", notes.NAMES)
def test_a_number_that_is_changed_alone_is_found(name, docs, capsys):
  check = ["--check", "--docs", str(docs)]
  assert notes.main(check) == 0
  path = docs / "results" / f"{name}.json"
  content = json.loads(path.read_text())
  change(content, next(numbers(content)))
  path.write_text(json.dumps(content))
  before = (docs / f"{name}.md").read_text()
  assert notes.main(check) == 1
  assert f"{name}.md is not what its figures give" in capsys.readouterr().err
  assert (docs / f"{name}.md").read_text() == before
  assert notes.main(["--docs", str(docs)]) == 0
  assert notes.main(check) == 0


@pytest.mark.parametrize("name", notes.NAMES)
def test_a_page_that_is_changed_alone_or_missing_is_found(name, docs):
  page = docs / f"{name}.md"
  page.write_text(page.read_text() + "typed in\n")
  assert notes.main(["--check", "--docs", str(docs)]) == 1
  page.unlink()
  assert notes.main(["--check", "--docs", str(docs)]) == 1


def test_every_number_is_on_its_page():
  """None is left out, or rounded away by its column's format."""
  for name, content in contents():
    written = notes.page(content, name)
    paths = list(numbers(content))
    assert len(paths) > 100
    for path in paths:
      changed = copy.deepcopy(content)
      change(changed, path)
      assert notes.page(changed, name) != written, path


def test_every_section_says_what_its_figures_were_measured_with():
  for _, content in contents():
    for section in content["sections"]:
      facts = section.keys() - {"title", "command", "body"}
      assert {"versions", "date", "commit"} <= facts <= set(notes.FACTS)
  sections = content["sections"]  # of the measurements, the last of NAMES
  assert all("machine" in section for section in sections)


def test_cells_are_text_numbers_in_their_columns_format_or_empty():
  lines = notes.table({"a": "", "b": ".1f"}, [["x", 2], [None, "two"]])
  assert lines == "| a | b |\n| --- | --- |\n| x | 2.0 |\n|  | two |"
  with pytest.raises(ValueError, match="zip"):
    notes.table({"a": "", "b": ".1f"}, [["x"]])

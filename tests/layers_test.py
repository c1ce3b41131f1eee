"""Which module imports which: the layers that docs/design.md names; how long
functions are.

`problems` reads the page and the sources; it is tried on copies of both in
which one thing is changed.
"""

import ast
import functools
import itertools
import pathlib
import re
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "design.md").read_text()


class Import(NamedTuple):
  """One imported name: `module.name`, or `module` where `name` is None."""

  module: str
  name: str | None
  line: int
  late: bool  # inside of a function


def module_of(path):
  """conditioning.py -> clp_jax.conditioning, interop/ -> clp_jax.interop."""
  path = re.sub(r"\.py$|/$", "", path)
  path = re.sub(r"(^|/)__init__$", "", path)
  return ".".join(["clp_jax", *filter(None, path.split("/"))])


def read_sources():
  """Module -> its text."""
  package = ROOT / "clp_jax"
  return {
    module_of(path.relative_to(package).as_posix()): path.read_text()
    for path in package.rglob("*.py")
  }


SOURCES = read_sources()


@functools.cache
def imports(text):
  """The imports of a module's text."""
  found = []

  def visit(node, late):
    if isinstance(node, ast.Import):
      found.extend(Import(a.name, None, node.lineno, late) for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      found.extend(
        Import(module, a.name, node.lineno, late) for a in node.names
      )
    late |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
      visit(child, late)

  visit(ast.parse(text), False)
  return found


def edges(sources):
  """{importing module: {imported module: "module-level, line 3"}}."""
  graph = {module: {} for module in sources}
  for module, text in sources.items():
    for found in imports(text):
      target = f"{found.module}.{found.name}"
      if target not in sources:
        target = found.module
      if target.partition(".")[0] not in ("clp_jax", ""):
        continue
      where = "late" if found.late else "module-level"
      graph[module].setdefault(target, f"{where}, line {found.line}")
      # Python runs the __init__.py of each package on the way, the root's
      # before anything else.
      parent = target.rpartition(".")[0]
      while parent.count(".") and not f"{module}.".startswith(f"{parent}."):
        graph[module].setdefault(parent, graph[module][target])
        parent = parent.rpartition(".")[0]
  return graph


def names(text):
  return [module_of(path) for path in re.findall(r"`([^`\s]+)`", text)]


def section(page):
  return page.partition("\n## Layers\n")[2].partition("\n## ")[0]


def layers(page):
  """The page's list: the names of each layer, from the top."""
  items = re.findall(
    r"^\d+\. (.*(?:\n {3,}.*)*)$", section(page), flags=re.MULTILINE
  )
  return [names(item) for item in items]


def open_models(page):
  """The modules of models/ that the page says others import."""
  (sentence,) = re.findall(
    r"Of `models/`, others import(.*?)\.\n\n", section(page), flags=re.DOTALL
  )
  return names(sentence)


def places(modules, listed):
  """(module -> number of its layer, what is wrong with the names)."""
  wrong, level = [], {}
  for number, own in enumerate(listed):
    for name in own:
      if name not in modules:
        wrong.append(f"the page names {name}, which is no module")
      if name in level:
        wrong.append(f"the page names {name} twice")
      level[name] = number
  placed = {}
  for module in modules:
    name = module
    while name.count(".") and name not in level:
      name = name.rpartition(".")[0]
    if name in level and (name == module or name != "clp_jax"):
      placed[module] = level[name]
    else:
      wrong.append(f"{module} is in no layer")
  return placed, wrong


def circles(graph):
  """Sets of modules that import one another, directly or through others."""
  reach = {
    module: {target for target in targets if target in graph}
    for module, targets in graph.items()
  }
  for middle in reach:
    for targets in reach.values():
      if middle in targets:
        targets |= reach[middle]
  return sorted(
    {
      tuple(sorted(m for m in reach[module] if module in reach[m]))
      for module in reach
      if module in reach[module]
    }
  )


def problems(page, sources):
  """What the page and the imports disagree on, a line each."""
  graph = edges(sources)
  placed, found = places(sources, layers(page))
  for module, targets in graph.items():
    for target, where in targets.items():
      if target not in sources:
        found.append(f"{module} imports {target}: {where}, no module")
      elif placed.get(module, 0) > placed.get(target, len(placed)):
        found.append(f"{module} imports {target}, above it: {where}")
  found += [f"circle: {', '.join(circle)}" for circle in circles(graph)]

  knowing = ("clp_jax.models", "clp_jax.interop")
  used = set()
  for module, targets in graph.items():
    # Its public names are imported when they are asked for.
    if module == "clp_jax" or module.startswith(knowing):
      continue
    used |= {t for t in targets if t.startswith("clp_jax.models.")}
  for name in sorted(used ^ set(open_models(page))):
    found.append(
      f"{name} is imported from outside of models/ and interop/"
      if name in used
      else f"the page says that others import {name}"
    )
  eager = [
    i
    for node in ast.parse(sources["clp_jax"]).body
    if isinstance(node, ast.Import | ast.ImportFrom)
    for i in imports(ast.unparse(node))
    if i.module.startswith(("clp_jax", "."))
  ]
  return found + [f"clp_jax imports {i.module} at once" for i in eager]


def test_the_page_and_the_imports_agree():
  assert len(layers(PAGE)) > 5
  assert sum(map(len, edges(SOURCES).values())) > 300
  assert not problems(PAGE, SOURCES)


def lines_of_layers():
  return re.findall(r"^\d+\. .*(?:\n {3,}.*)*$", section(PAGE), re.MULTILINE)


@pytest.mark.parametrize("line", lines_of_layers())
def test_a_layer_that_the_page_lacks_is_found(line):
  found = problems(PAGE.replace(line + "\n", ""), SOURCES)
  assert any("is in no layer" in text or "above it" in text for text in found)


@pytest.mark.parametrize(
  "above, below", list(itertools.pairwise(lines_of_layers()))
)
def test_layers_in_another_order_are_found(above, below):
  (page,) = {PAGE.replace(f"{above}\n{below}", f"{below}\n{above}")} - {PAGE}
  assert any("above it" in text for text in problems(page, SOURCES))


@pytest.mark.parametrize(
  "old, new, message",
  [
    ("`errors.py`", "`mistakes.py`", "clp_jax.mistakes, which is no module"),
    ("`errors.py`", "`masked.py`", "the page names clp_jax.masked twice"),
    (
      ", `rewards/model.py`",
      "",
      "rewards.model imports clp_jax.interop, above",
    ),
    (", `critic.py`", "", "clp_jax.critic is in no layer"),
    (", `__init__.py`", "", "clp_jax is in no layer"),
    (" and `models/trees.py`", "", "models.trees is imported from outside"),
    (
      "`models/trees.py`.",
      "`models/t5.py`.",
      "says that others import clp_jax.",
    ),
  ],
)
def test_names_that_change_on_the_page_alone_are_found(old, new, message):
  page = PAGE.replace(old, new)
  assert page != PAGE
  assert any(message in text for text in problems(page, SOURCES))


LATE = "\n\ndef f():\n  {}\n"


@pytest.mark.parametrize(
  "module, added, messages",
  [
    (
      "policy",
      "from clp_jax.baselines import soups",
      [
        r"clp_jax.policy imports clp_jax.baselines.soups, above it: module",
        r"circle: .*clp_jax.baselines.soups.*clp_jax.policy",
      ],
    ),
    (
      "bank",
      LATE.format("from clp_jax import policy as policy_lib"),
      [
        r"clp_jax.bank imports clp_jax.policy, above it: late",
        r"circle: .*clp_jax.bank.*clp_jax.policy",
      ],
    ),
    (
      "masked",
      LATE.format("import clp_jax.cli.main"),
      [r"clp_jax.masked imports clp_jax.cli.main, above it: late"],
    ),
    (
      "adaptation",
      "from clp_jax import Policy",
      [r"clp_jax.adaptation imports clp_jax, above it: module-level"],
    ),
    (
      "weightings",
      "from clp_jax import adaptation",
      [r"circle: clp_jax.adaptation, clp_jax.weightings$"],
    ),
    (
      "data.tokenizer",
      LATE.format("from clp_jax.data import hf_tokenizer"),
      [r"circle: clp_jax.data.hf_tokenizer, clp_jax.data.tokenizer$"],
    ),
    (
      "policy",
      "from clp_jax.models.t5 import T5Config",
      [r"clp_jax.models.t5 is imported from outside of models/"],
    ),
    (
      "cli.main",
      LATE.format("from clp_jax.models import layers"),
      [r"clp_jax.models.layers is imported from outside of models/"],
    ),
    (
      "policy",
      "from . import config",
      [r"policy imports \.+(config)?: .*no mod"],
    ),
    (
      "made_up",
      "from clp_jax import policy",
      [r"clp_jax.made_up is in no layer"],
    ),
    ("", "from clp_jax import policy", [r"clp_jax imports clp_jax at once"]),
  ],
)
def test_an_import_that_changes_alone_is_found(module, added, messages):
  module = ".".join(filter(None, ["clp_jax", module]))
  sources = SOURCES | {module: f"{SOURCES.get(module, '')}\n{added}\n"}
  found = problems(PAGE, sources)
  for message in messages:
    assert any(re.search(message, text) for text in found), (message, found)


def lengths(text):
  """Function name -> its lines, of a module's text."""
  return {
    node.name: node.end_lineno - node.lineno + 1
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
  }


def test_functions_can_be_read_at_once():
  for module, text in SOURCES.items():
    for name, lines in lengths(text).items():
      if name not in ("get_config", "add_arguments"):
        assert lines <= 100, f"{module}.{name}"
  step = SOURCES["clp_jax.train.moft"]
  assert len(step.splitlines()) < 300 and max(lengths(step).values()) <= 80

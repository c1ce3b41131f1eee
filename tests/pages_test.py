"""What README.md, docs/, the notebook and the configs say of the code.

What the commands do is for the tests of their subjects, which run them. Here
all of them are read, and every table of settings: a flag, a field, a method or
a setting that was renamed, added or removed shows at once.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import textwrap

import pytest
import runs

from clp_jax import bank, build, demo, prompting, scalarisation
from clp_jax.cli import experiment as experiment_command
from clp_jax.cli import main
from clp_jax.cli.arguments import load_config
from clp_jax.experiments import methods
from clp_jax.rewards import base
from clp_jax.serving import protection

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
  path.name: path.read_text()
  for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
LAUNCHER = (ROOT / "launch" / "tpu.sh").read_text()
USAGE = LAUNCHER.partition("<<'EOF'\n")[2].partition("\nEOF\n")[0]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


# Commands.


def code(text):
  """The indented lines of a page, continued ones joined."""
  text = re.sub("```.*?```", "", text, flags=re.S)
  lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
  return "\n".join(lines).replace("\\\n", " ")


def commands(text):
  """The `clp` commands of a page, as lists of arguments."""
  # On a slice, what clp is given follows " -- ".
  found = re.findall(
    r"(?:(?:^|[ /])clp | -- +(?=train))([a-z].*)$", code(text), re.M
  )
  for line in found:
    yield shlex.split(line.split(" | ")[0].rstrip("&"), comments=True)


def all_commands():
  """(where, arguments) of every command that is written down."""
  texts = PAGES | {
    "BUILD_NOTES.md": (ROOT / "BUILD_NOTES.md").read_text(),
    "tpu.sh": textwrap.indent(USAGE.partition("\nexamples:\n")[2], "  "),
    "clp --help": main.WALK,
  }
  for path in CONFIGS:
    texts[str(path.relative_to(ROOT))] = textwrap.indent(
      ast.get_docstring(ast.parse(path.read_text())), "  "
    )
  for name in main.COMMANDS:
    module = importlib.import_module(f"clp_jax.cli.{name.replace('-', '_')}")
    example = module.EXAMPLE.partition(", then")[0]
    texts[f"clp {name} --help"] = f"    {example}"
  for where, text in texts.items():
    for command in commands(text):
      yield where, command


COMMANDS = list(all_commands())


def config_of(command, folder):
  """The config that a command names or starts from; None where it has none."""
  words = [w for w in command if not w.startswith("$")]  # $D of measurements.md
  overrides = [w for w in words if w.startswith("--config.")]
  if "--config" in words:
    file = words[words.index("--config") + 1]
    path = ROOT / file if (ROOT / file).exists() else folder / file
    return load_config(str(path), overrides)
  if command[0] == "experiment":
    return load_config(demo.__file__, overrides)
  assert not overrides, command
  return None


@pytest.fixture
def folder(tmp_path):
  """Where the reader has written README's files."""
  for file in re.findall(
    r"```python\n(# (\w+\.py).*?)```", PAGES["README.md"], re.S
  ):
    (tmp_path / file[1]).write_text(file[0])
  return tmp_path


def test_every_command_is_shown():
  assert len(COMMANDS) > 60
  assert {name for _, (name, *_) in COMMANDS} == set(main.COMMANDS)


@pytest.mark.parametrize(
  "command", [c for _, c in COMMANDS], ids=[f"{w}: {c[0]}" for w, c in COMMANDS]
)
def test_a_command_exists_with_its_flags(command, folder):
  name, *rest = command
  for word in rest:
    flag = word.partition("=")[0]
    if flag.startswith("--") and not flag.startswith("--config."):
      assert re.search(rf"^  {flag}\b", help_of(name), re.M), word
  found = config_of(command, folder)  # every field, to its last component
  # Others fill in what a run has to be given, or have it in $D.
  if name.startswith("train") and "$D" not in rest:
    build.validate(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p)[-13:])
def test_a_config_s_docstring_names_fields_of_it(path):
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  words = re.findall(r"--config\.\S+=(?:\"[^\"]*\"|\S+)", docstring)
  assert bool(words) == (path.name != "demo.py")
  build.validate(load_config(str(path), [w.replace('"', "") for w in words]))


@functools.cache
def help_of(name):
  with contextlib.redirect_stdout(io.StringIO()) as out:
    with pytest.raises(SystemExit, match="^0$"):
      main.main([name, "--help"])
  return out.getvalue()


def test_other_programs_have_the_flags_that_the_pages_give_them():
  ran = set()
  for page, text in PAGES.items():
    for name, rest in re.findall(r"python -m benchmarks\.([a-z]\w*)(.*)", text):
      shared = ("models", "timing")  # the arguments that several have
      source = "".join(
        (ROOT / "benchmarks" / f"{n}.py").read_text() for n in (name, *shared)
      )
      for flag in re.findall(r"--[a-z-]+", rest):
        assert f'"{flag}"' in source, (page, name, flag)
      ran.add(name)
    for line in re.findall(r"^launch/tpu.sh (.*)$", code(text), re.M):
      for flag in re.findall(r"--[a-z-]+", line.partition(" -- ")[0]):
        assert f"{flag})" in LAUNCHER, (page, flag)
  assert {"rollout", "update", "mixing", "startup", "serving"} < ran


def fields(values, prefix=""):
  for name, value in values.items():
    yield prefix + name
    if hasattr(value, "items"):
      yield from fields(value, f"{prefix}{name}.")


@functools.cache
def all_fields():
  """Those of any of the configs."""
  return {f for path in CONFIGS for f in fields(load_config(str(path), []))}


def test_runs_of_the_demo_are_those_that_it_makes():
  words = [(where, word) for where, command in COMMANDS for word in command]
  found = [
    (where, run[1])
    for where, word in words
    if (run := re.search(r"\bruns/demo/([\w/]+)$", word))
  ]
  assert len(found) >= 5
  for where, run in found:
    name = re.sub("single/(rouge|nli)$", "single/<name>", run)
    assert re.search(rf"^  {name} ", demo.__doc__, re.M), (where, run)


def test_no_command_gives_weights_to_lines_that_have_their_own():
  """As those of samples.jsonl have, and those count."""
  texts = [p.read_text() for p in (ROOT / "clp_jax").rglob("*.py")]
  assert "samples.jsonl | " not in "".join([*texts, *PAGES.values()])


def test_fields_in_advice_exist():
  """In what clp_jax prints and says of itself."""
  texts = [p.read_text() for p in (ROOT / "clp_jax").rglob("*.py")]
  named = set(re.findall(r"--config\.([a-z_.]+)=", "".join(texts)))
  assert {"mesh.fsdp", "train.microbatches"} < named
  named -= {"path.to.field"}
  assert named <= all_fields()


def test_fields_and_flags_in_sentences_exist():
  known = all_fields()
  sections = {f.partition(".")[0] for f in known}
  flags = USAGE + "".join(map(help_of, main.COMMANDS))
  functions = {"sft.make_programs"}
  for page, text in PAGES.items():
    text = re.sub("```.*?```", "", text, flags=re.S)
    for span in re.findall(r"`([^`]+)`", text):
      for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*(?![a-z.-])", span):
        assert re.search(rf"{flag}\b", flags), (page, flag)
      for field in re.findall(
        r"(?<!\S)(?:--)?(?:config\.)?([a-z_]+(?:\.[a-z_]+)+)(?=$|[\s=])", span
      ):
        is_file = field.endswith((".py", ".json", ".jsonl", ".npz"))
        if field.partition(".")[0] in sections and not is_file:
          assert field in known | functions, (page, field)


def test_fields_that_python_sets_exist():
  """In the pages' snippets and the notebook: unlocked configs take any name."""
  notebook = json.loads((ROOT / "launch" / "colab.ipynb").read_text())
  snippets = [
    "".join(cell["source"])
    for cell in notebook["cells"]
    if cell["cell_type"] == "code"
  ]
  for text in PAGES.values():
    snippets += re.findall(r"```python\n(.*?)```", text, re.S)
  known = set(fields(demo.get_config()))
  named = set()
  for snippet in snippets:
    for node in ast.walk(ast.parse(snippet)):
      if isinstance(node, ast.Attribute):
        holder, _, field = ast.unparse(node).partition(".")
        if holder in ("config", "base"):
          named.add(field)
  # README's own reward, and functions of clp_jax.config.
  named -= {"rewards.plain", "get_config", "reward"}
  assert "sft.decay_steps" in named and "weightings.alpha_range" in named
  assert named <= known


# Links.


def anchors(text):
  """What GitHub calls the headings of a page."""
  headings = re.findall(
    r"^#+ (.*)$", re.sub("```.*?```", "", text, flags=re.S), re.M
  )
  return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_lead_to_files_and_headings():
  seen = 0
  for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
      path, _, anchor = link.partition("#")
      if path.startswith(("http://", "https://")):
        continue
      target = page if not path else page.parent / path
      assert target.exists(), (page.name, link)
      if anchor:
        assert anchor in anchors(target.read_text()), (page.name, link)
        seen += 1
  assert seen > 20


# Tables.


def table(page, *headers):
  """The rows, lists of cells, of the page's one table with these headers."""
  _, found = PAGES[page].split(f"| {' | '.join(headers)} |\n")
  found = itertools.takewhile(lambda x: x.startswith("|"), found.splitlines())
  return [[c.strip() for c in row[1:-1].split("|")] for row in found][1:]


def names(cell):
  return re.findall(r"`([^`]+)`", cell)


def test_settings_of_rewards():
  rows = table(
    "own-data.md", "`rewards.NAME.source`", "what it is", "its settings"
  )
  paths = base.BUILT_IN | base.MODELS
  assert [names(source) for source, *_ in rows] == [
    *([source] for source in paths),
    ["package.module:function"],
  ]
  for source, _, settings in rows[:-1]:
    module, _, name = paths[names(source)[0]].partition(":")
    function = getattr(importlib.import_module(module), name)
    given = 1 if names(source)[0] in base.MODELS else 3  # mesh, or the texts
    parameters = list(inspect.signature(function).parameters)[given:]
    assert names(settings) == parameters, source


def test_ways_to_condition():
  known = set(fields(demo.get_config()))
  seen = set()
  for _, overrides in table("methods.md", "method", "overrides"):
    for override in names(overrides)[0].split():
      field, _, value = override.partition("=")
      assert field in known
      seen.add((field, value))
  assert {v for f, v in seen if f == "steering"} == set(bank.STEERING)


def test_prompting_styles():
  rows = table("methods.md", "`prompting.style`", "what the model reads")
  assert {names(style)[0] for style, _ in rows} == {*prompting.STYLES} - {
    "none"
  }


def test_algorithms_and_baselines():
  rows = table(
    "methods.md",
    "`algorithm`",
    "`reinforce.baseline`",
    "what is subtracted from a return",
  )
  assert [(names(a), names(b)) for a, b, _ in rows] == [
    *((["reinforce"], [b]) for b in build.BASELINES),
    (["ppo"], []),
  ]


def test_scalarisations():
  rows = table("methods.md", "name", "S(J)", "gradient's weight of reward i")
  assert [names(name) for name, *_ in rows] == [
    [n] for n in scalarisation.NAMES
  ]


def test_methods_of_experiments():
  rows = table("experiments.md", "method", "what it is")
  listed = [name for cell, _ in rows for name in names(cell)]
  assert sorted(listed) == sorted(methods.METHODS)
  for name in experiment_command.NAMES:
    assert f"`{name}`" in PAGES["experiments.md"]


def test_limits_of_the_server():
  limits = protection.Limits()
  mebibytes = limits.body_bytes / 2**20
  assert PAGES["serving.md"].partition("## Limits")[2].splitlines()[4:9] == [
    f"| body | {mebibytes:.0f} MiB, within {limits.header_seconds:.0f} s |",
    f"| answers of a request | {limits.rows} (documents times `n`) |",
    f"| answers that wait | `--max-waiting`, {limits.waiting}; beyond that, "
    "status 429 |",
    f"| time to an answer | `--timeout`, {limits.seconds:.0f} s; then status "
    "503 |",
    f"| connections | {limits.connections}; then status 503 |",
  ]


def test_benchmarks_of_speed():
  rows = table("speed.md", "command", "what it times")
  for command, _ in rows:
    name = re.search(r"python -m benchmarks\.(\w+)", command)[1]
    assert (ROOT / "benchmarks" / f"{name}.py").exists()
  every = "".join(PAGES.values()) + (ROOT / "BUILD_NOTES.md").read_text()
  for path in (ROOT / "benchmarks").glob("*.py"):
    if '__name__ == "__main__"' in path.read_text():
      assert f"benchmarks.{path.stem}" in every, path


def test_the_map_has_every_package():
  rows = table("README.md", "where", "what")
  listed = [name for cell, _ in rows for name in names(cell)]
  for name in listed:
    assert (ROOT / "clp_jax" / name).exists() or (ROOT / name).exists(), name
  for path in (ROOT / "clp_jax").glob("*/__init__.py"):
    assert f"{path.parent.name}/" in listed


def test_defaults_of_flags_are_the_parsers():
  """`--rows` (32), or `--timeout`, 60 s."""
  helps = "".join(runs.clp(name, "--help")[1] for name in main.COMMANDS)
  helps += re.sub(
    r"(--max-restarts|--backoff) (\d+)", r"\1 (default: \2)", LAUNCHER
  )
  found = [
    pair
    for text in PAGES.values()
    for pair in re.findall(r"`(--[a-z-]+)`(?:, | \()(\d+)", text)
  ]
  assert len(found) >= 5
  for flag, value in found:
    after = helps.partition(f"  {flag} ")[2].partition("\n  --")[0]
    assert f"(default: {value})" in " ".join(after.split()), flag


# What takes longer.


@pytest.mark.slow
def test_api_pages_show_the_public_names_and_every_module(tmp_path):
  pytest.importorskip("pdoc")
  done = subprocess.run(
    [sys.executable, ROOT / "docs" / "render.py", tmp_path],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  for problem in ("does not resolve", "Couldn't import"):
    assert problem not in done.stderr, done.stderr
  front = (tmp_path / "clp_jax.html").read_text()
  for name in ("Policy", "T5Config", "mix", "expand", "coefficients"):
    assert f'id="{name}"' in front
  for file in (ROOT / "clp_jax").rglob("*.py"):
    parts = file.relative_to(ROOT).with_suffix("").parts
    if not parts[-1].startswith("__"):
      assert tmp_path.joinpath(*parts).with_suffix(".html").exists(), file


@pytest.mark.slow
def test_two_processes_on_a_laptop_train(sft_run, tmp_path):
  """The loop of docs/pods.md, on smaller settings and a port that is free."""
  page = PAGES["pods.md"]
  lines = [line[4:] for line in page.splitlines() if line.startswith("    ")]
  script = "\n".join(lines[lines.index("for i in 0 1; do") - 1 :])
  assert script.startswith("export XLA_FLAGS=") and script.endswith("wait")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    script = script.replace("8476", str(probe.getsockname()[1]))
  small = shlex.join(runs.overrides(sft_run, **{"train.steps": 2}))
  script = script.replace("--coordinator", f"{small} --coordinator")
  script = script.replace("configs/", f"{ROOT}/configs/")
  clp = tmp_path / "bin" / "clp"
  clp.parent.mkdir()
  clp.write_text(f'#!/bin/sh\nexec {sys.executable} -m clp_jax "$@"\n')
  clp.chmod(0o755)
  done = subprocess.run(
    ["bash", "-euc", script],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    timeout=600,
    env=os.environ
    | {"PYTHONPATH": str(ROOT), "PATH": f"{clp.parent}:{os.environ['PATH']}"},
  )
  assert runs.checkpoint_steps(tmp_path / "runs" / "two") == [2], done.stderr


@pytest.mark.slow
def test_the_plan_of_the_pods_page_compiles():
  """Its cheapest program: all of them take many minutes."""
  pytest.importorskip("libtpu")
  (command,) = [c for c in commands(PAGES["pods.md"]) if c[0] == "plan"]
  status, out, err = runs.clp(*command, "--only", "reference")
  assert status == 0, err
  assert "reference" in out and "v5e:8x16" in out

"""Commands of README.md and docs/, against the commands' own arguments.

What they do is for the tests of their subjects, which run them. Here all of
them are read: a flag or field that was renamed shows at once.
"""

import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest
import runs

from clp_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
  """The indented `clp` commands of a page, as lists of arguments."""
  text = re.sub("```.*?```", "", text, flags=re.S)
  lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
  script = "\n".join(lines).replace("\\\n", " ")
  for command in re.findall(r"(?:^|[ /])clp ([a-z].*)$", script, re.MULTILINE):
    yield shlex.split(command.split(" | ")[0].rstrip("&"), comments=True)


def test_every_command_of_the_pages_exists_with_its_flags():
  found = [(page.name, c) for page in PAGES for c in commands(page.read_text())]
  assert len(found) > 25
  fields = set(config_lib.get_config().to_dict())
  options = {}
  for page, (command, *rest) in found:
    if command not in options:
      status, options[command], _ = runs.clp(command, "--help")
      assert status == 0, (page, command)
    for word in rest:
      name = word.partition("=")[0]
      if name.startswith("--config."):
        assert name.split(".")[1] in fields, (page, word)
      elif name.startswith("--"):
        assert re.search(rf"^  {name}\b", options[command], re.M), (page, word)


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
  page = (ROOT / "docs" / "pods.md").read_text()
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
  text = (ROOT / "docs" / "pods.md").read_text()
  (command,) = [c for c in commands(text) if c[0] == "plan"]
  status, out, err = runs.clp(*command, "--only", "reference")
  assert status == 0, err
  assert "reference" in out and "v5e:8x16" in out

"""How long commands take to their first output, each a new process.

    python -m benchmarks.startup [--workdir runs/demo] [--n 5] [--json]

"--help" and the imports need nothing, nor does "first step", which is
`clp train` on the built-in world until its progress tells of a step. "first
line" is `clp generate` on one document of a finished run, to the first line on
its standard output. The compiled programs of the runs before are in the cache;
"cold" has an empty one. Also says whether a command imported TensorFlow.

--beside FOLDER runs the same commands of another source tree, in turns.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import timing

ROOT = pathlib.Path(__file__).parents[1]
IMPORTED = "import sys; print('tensorflow' in sys.modules, file=sys.stderr)"
CLP = (sys.executable, "-m", "clp_jax")
DOCUMENT = json.dumps({"document": "Brivane opened the museum."}) + "\n"


def run(folder: pathlib.Path, *command: str) -> None:
  """Runs a command of a source tree."""
  subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)


def first_line(folder: pathlib.Path, workdir: str, **environment: str) -> None:
  """Runs `clp generate` with a line of input until it printed a line."""
  objectives = json.loads((pathlib.Path(workdir) / "config.json").read_text())[
    "objectives"
  ]
  even = ",".join(f"{name}={1 / len(objectives)}" for name in objectives)
  with subprocess.Popen(
    [*CLP, "generate", "--workdir", workdir, "--weights", even],
    cwd=folder,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | environment,
    text=True,
  ) as process:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(DOCUMENT)
    process.stdin.close()
    line = process.stdout.readline()
    process.stdout.read()
  if not line:
    sys.exit("clp generate printed nothing.")


def first_step(folder: pathlib.Path, **environment: str) -> None:
  """Runs `clp train` in a new folder until it has taken a step."""
  with (
    tempfile.TemporaryDirectory() as workdir,
    subprocess.Popen(
      [
        *(*CLP, "train", "--config", "configs/demo.py", "--workdir", workdir),
        "--config.sft.steps=10",  # its progress is a line each tenth
      ],
      cwd=folder,
      stderr=subprocess.PIPE,
      env=os.environ | environment,
      text=True,
    ) as process,
  ):
    assert process.stderr is not None
    stepped = any(" 1/10 " in line for line in process.stderr)
    process.kill()
    process.wait()
  if not stepped:
    sys.exit("clp train took no step.")


def cold(start: Callable[..., None], *args: Any) -> None:
  """Starts one of the two above with an empty compilation cache."""
  with tempfile.TemporaryDirectory() as cache:
    start(*args, JAX_COMPILATION_CACHE_DIR=cache)


def imports_tensorflow(module: str) -> bool:
  """Whether importing a module imports TensorFlow."""
  result = subprocess.run(
    [sys.executable, "-c", f"import {module}; {IMPORTED}"],
    stderr=subprocess.PIPE,
    text=True,
    check=True,
  )
  return result.stderr.strip().endswith("True")


def commands(
  folder: pathlib.Path, workdir: str | None
) -> dict[str, Callable[[], None]]:
  """What is timed of a source tree, by name."""
  partial = functools.partial
  python = (sys.executable, "-c", "import clp_jax")
  found = {
    "clp --help": partial(run, folder, *CLP, "--help"),
    "clp generate --help": partial(run, folder, *CLP, "generate", "--help"),
    "import clp_jax": partial(run, folder, *python),
    "clp train, first step": partial(first_step, folder),
    "clp train, first step, cold": partial(cold, first_step, folder),
  }
  if workdir is not None:
    own = (first_line, folder, os.path.abspath(workdir))
    found["clp generate, first line"] = partial(*own)
    found["clp generate, first line, cold"] = partial(cold, *own)
  return found


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--workdir", help="of a finished run; without it nothing is generated"
  )
  parser.add_argument(
    "--beside", metavar="FOLDER", help="another source tree to compare with"
  )
  timing.add_arguments(parser, n=5)
  args = parser.parse_args()
  trees = {"": commands(ROOT, args.workdir)}
  if args.beside is not None:
    beside = pathlib.Path(args.beside).resolve()
    trees[f", {args.beside}"] = commands(beside, args.workdir)
  runs = {
    name + tree: trees[tree][name] for name in trees[""] for tree in trees
  }
  times = {name: timing.Times([], []) for name in runs}
  for i in range(args.n + 1):  # the first is not counted
    for name, start in runs.items():
      wall, cpu = time.perf_counter(), _children_cpu()
      start()
      if i:
        times[name].wall.append(time.perf_counter() - wall)
        times[name].cpu.append(_children_cpu() - cpu)
  table = [timing.row(name, times[name]) for name in runs]
  for module in ("clp_jax", "clp_jax.cli.main", "clp_jax.policy"):
    imports = "yes" if imports_tensorflow(module) else "no"
    table.append({"what": f"import {module}", "imports TensorFlow": imports})
  timing.show(table, args, timing.measure_rates("float32"))


def _children_cpu() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
  main()

"""How long commands take to their first output, each a new process.

    python -m benchmarks.startup [--workdir runs/demo] [--n 5] [--json]

"--help" and the imports need nothing. "first line" is `clp generate` on one
document of a finished run, to the first line on its standard output, with the
compiled programs of the runs before it in the cache; "first line, cold" has an
empty cache. Also says whether a command imported TensorFlow.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from benchmarks import timing

IMPORTED = "import sys; print('tensorflow' in sys.modules, file=sys.stderr)"


def first_line(command, text, environment) -> None:
  """Runs a command with a line of input until it printed a line."""
  with subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=environment,
    text=True,
  ) as process:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(text)
    process.stdin.close()
    line = process.stdout.readline()
    process.stdout.read()
  if not line:
    sys.exit(f"{' '.join(command)} printed nothing.")


def imports_tensorflow(module: str) -> bool:
  """Whether importing a module imports TensorFlow."""
  result = subprocess.run(
    [sys.executable, "-c", f"import {module}; {IMPORTED}"],
    stderr=subprocess.PIPE,
    text=True,
    check=True,
  )
  return result.stderr.strip().endswith("True")


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--workdir", help="of a finished run; without it nothing is generated"
  )
  timing.add_arguments(parser, n=5)
  args = parser.parse_args()
  environment = os.environ.copy()
  clp = [sys.executable, "-m", "clp_jax"]

  def run(*command):
    subprocess.run(
      command, stdout=subprocess.DEVNULL, env=environment, check=True
    )

  runs = {
    "clp --help": lambda: run(*clp, "--help"),
    "clp generate --help": lambda: run(*clp, "generate", "--help"),
    "import clp_jax": lambda: run(sys.executable, "-c", "import clp_jax"),
  }
  if args.workdir is not None:
    objectives = json.loads(
      (pathlib.Path(args.workdir) / "config.json").read_text()
    )["objectives"]
    even = ",".join(f"{name}={1 / len(objectives)}" for name in objectives)
    generate = [
      *clp,
      "generate",
      "--workdir",
      args.workdir,
      "--weights",
      even,
    ]
    document = json.dumps({"document": "Brivane opened the museum."}) + "\n"
    runs["clp generate, first line"] = lambda: first_line(
      generate, document, environment
    )

    def cold():
      with tempfile.TemporaryDirectory() as cache:
        first_line(
          generate,
          document,
          environment | {"JAX_COMPILATION_CACHE_DIR": cache},
        )

    runs["clp generate, first line, cold"] = cold
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

"""How costs grow with objectives, weightings, model and rows.

    python -m benchmarks.growth [--sizes tiny,mini,small] [--objectives 1,2,4,8]
      [--weightings 1,2,4,8] [--rows 16,32,64] [--source 256] [--target 64]
      [--n 3] [--json]

One of them varies; the others stay at the last size, 2 objectives, 4
weightings and 32 rows, which are the first line and, for what the machine did
meanwhile, the last. "update" is the update of full-CLP on `rows` samples, four
a prompt. "serving" reads `rows` prompts and samples `target` tokens for each,
every row under a weighting of its own. GB are what a program holds while it
runs, parameters and optimizer included; "times" are to the first line.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks import mixing, models, timing, update
from clp_jax import conditioning
from clp_jax.cli import setup
from clp_jax.rollout import row_keys


class Point(NamedTuple):
  """What is timed."""

  size: str
  objectives: int = 2
  weightings: int = 4
  rows: int = 32


class Measured(NamedTuple):
  """Of one program."""

  times: timing.Times
  size: int  # bytes


def points(args: argparse.Namespace) -> list[Point]:
  """The first line, the others once each, and the first again."""
  first = Point(args.sizes[-1])
  varied = [
    *(first._replace(objectives=m) for m in args.objectives),
    *(first._replace(weightings=g) for g in args.weightings),
    *(first._replace(size=size) for size in args.sizes),
    *(first._replace(rows=rows) for rows in args.rows),
  ]
  return [first, *dict.fromkeys(p for p in varied if p != first), first]


def training(point: Point, args: argparse.Namespace) -> Measured:
  """Times updates."""
  config = models.config_of(args)
  params = models.random_params(config)
  program, state, others = update.reinforce_program(
    config,
    params,
    args,
    "full" if point.objectives > 1 else "none",
    point.objectives,
    point.weightings,
  )
  compiled = program.lower(state, *others).compile()
  held = [state]
  del state  # is donated

  def step():
    held[0], metrics = compiled(held[0], *others)
    return metrics

  return _measured(compiled, step, args.n)


def serving(point: Point, args: argparse.Namespace) -> Measured:
  """Times decoding of rows with weightings of their own."""
  config = models.config_of(args)
  params = models.random_params(config)
  arguments = (
    mixing.stacked_sets(params, point.objectives),
    mixing.coefficients_of_rows(point.rows, point.objectives),
    models.random_tokens(point.rows, args.source, config),
    row_keys(jax.random.key(0), point.rows),
  )
  steerable = conditioning.steerable_leaves(params, "full")
  program = mixing.sample_rows(config, steerable, args.target)
  compiled = program.lower(*arguments).compile()
  return _measured(compiled, lambda: compiled(*arguments), args.n)


def _measured(compiled: Any, run: Callable[[], Any], n: int) -> Measured:
  times = timing.take_turns({"it": run}, n)["it"]
  return Measured(times, timing.held_bytes(compiled))


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )

  def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]

  parser.add_argument(
    "--sizes", type=lambda x: x.split(","), default="tiny,mini,small"
  )
  parser.add_argument("--objectives", type=numbers, default="1,2,4,8")
  parser.add_argument("--weightings", type=numbers, default="1,2,4,8")
  parser.add_argument("--rows", type=numbers, default="16,32,64")
  parser.add_argument("--source", type=int, default=256)
  parser.add_argument("--target", type=int, default=64)
  timing.add_arguments(parser, n=3)
  args = parser.parse_args()
  setup.configure()
  rates = timing.measure_rates("float32")
  table: list[dict[str, Any]] = []
  first: dict[str, float] = {}  # seconds of the first line
  for point in points(args):
    own = argparse.Namespace(
      **vars(args),
      family="t5",
      dtype="float32",
      size=point.size,
      batch=point.rows,
    )
    row: dict[str, Any] = point._asdict()
    for name, measure in (("update", training), ("serving", serving)):
      measured = measure(point, own)
      first.setdefault(name, measured.times.median)
      row |= {
        f"{name} s": measured.times.median,
        f"{name} min s": min(measured.times.wall),
        f"{name} max s": max(measured.times.wall),
        f"{name} times": measured.times.median / first[name],
        f"{name} GB": measured.size / 1e9,
      }
    table.append(row)
  timing.show(table, args, rates)


if __name__ == "__main__":
  main()

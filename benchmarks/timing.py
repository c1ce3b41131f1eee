"""Timing in turns, the table of it, and what the device could do.

A benchmark gives `take_turns` functions that do the same work in different
ways. They run one after the other, n times over, so that what else the machine
does falls on all of them; ratios are of medians.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Times(NamedTuple):
  """What n runs took, in seconds."""

  wall: list[float]
  cpu: list[float]  # of all threads of this process

  @property
  def median(self) -> float:
    return statistics.median(self.wall)

  @property
  def median_cpu(self) -> float:
    return statistics.median(self.cpu)


class Rates(NamedTuple):
  """What the first device can do, measured."""

  flops: float  # a second, in a large matrix product
  bandwidth: float  # bytes a second that it reads and writes


def take_turns(
  runs: Mapping[str, Callable[[], Any]], n: int
) -> dict[str, Times]:
  """Times functions in turns, after a first run of each that isn't counted.

  Args:
    runs: name -> function; JAX arrays that it returns are waited for.
    n: runs of each.

  Returns:
    name -> Times.
  """
  for name, run in runs.items():
    print(f"first run: {name}", file=sys.stderr)
    jax.block_until_ready(run())
  times: dict[str, Times] = {name: Times([], []) for name in runs}
  for i in range(n):
    print(f"run {i + 1} of {n}", file=sys.stderr)
    for name, run in runs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(run())
      times[name].wall.append(time.perf_counter() - wall)
      times[name].cpu.append(time.process_time() - cpu)
  return times


def row(
  name: str,
  times: Times,
  *,
  tokens: int | None = None,
  against: Times | None = None,
  **fields: Any,
) -> dict[str, Any]:
  """A row of a table.

  Args:
    name: of what ran.
    times: that it took.
    tokens: that a run works on, for the rate; None for none.
    against: the times of what it is compared with; None for none.
    **fields: what else describes it.

  Returns:
    Column -> value. "ratio" is the time of the other one over its own: more
    than 1 is faster. "cpu ratio" is the same of the processors' time, which
    other jobs on the machine disturb less.
  """
  columns = {"what": name} | fields
  columns |= {
    "n": len(times.wall),
    "median s": times.median,
    "min s": min(times.wall),
    "max s": max(times.wall),
    "cpu s": times.median_cpu,
  }
  if tokens is not None:
    columns["tokens/s"] = tokens / times.median
  if against is not None:
    columns["ratio"] = against.median / times.median
    columns["cpu ratio"] = against.median_cpu / times.median_cpu
  return columns


def multiple(times: Times, of: Times) -> dict[str, float]:
  """Columns that say how much longer one thing takes than another."""
  return {
    "times": times.median / of.median,
    "cpu times": times.median_cpu / of.median_cpu,
  }


def add_arguments(parser: argparse.ArgumentParser, n: int) -> None:
  """Adds what every benchmark takes."""
  parser.add_argument(
    "--n", type=int, default=n, help=f"timed runs of each (default: {n})"
  )
  parser.add_argument(
    "--json", action="store_true", help="print JSON instead of a table"
  )


def add_rank(parser: argparse.ArgumentParser) -> None:
  """Adds the rank of adapters, where some are steered by."""
  parser.add_argument(
    "--rank", type=int, default=8, help="of adapters (default: 8)"
  )


def held_bytes(compiled: Any) -> int:
  """What a compiled program holds while it runs."""
  memory = compiled.memory_analysis()
  size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  return size + memory.output_size_in_bytes - memory.alias_size_in_bytes


def show(
  rows: list[dict[str, Any]], args: argparse.Namespace, rates: Rates
) -> None:
  """Prints the rows, and what they ran on.

  Args:
    rows: from `row`.
    args: that the benchmark was given.
    rates: of the device, measured in the same run: ratios depend on them.
  """
  about = machine() | {
    "GFLOP/s of a matrix product": round(rates.flops / 1e9),
    "GB/s of memory": round(rates.bandwidth / 1e9, 1),
    "arguments": vars(args),
  }
  if args.json:
    print(json.dumps(about | {"rows": rows}, indent=2))
    return
  columns = list(dict.fromkeys(name for row in rows for name in row))
  print(", ".join(f"{k}: {v}" for k, v in about.items() if k != "arguments"))
  print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
  for row in rows:
    print(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |")


def _cell(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
  """What a figure depends on besides the code."""
  return {
    "device": jax.devices()[0].device_kind,
    "processor": _processor(),
    "devices": jax.device_count(),
    "cpus": os.cpu_count(),
    "load": f"{os.getloadavg()[0]:.1f}",
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def _processor() -> str:
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
      names = [line.split(":")[1] for line in lines if "model name" in line]
    return names[0].strip()
  except (OSError, IndexError):
    return platform.processor()


def measure_rates(dtype: str) -> Rates:
  """Measures both, in seconds, on arrays that no cache holds.

  Args:
    dtype: of the product.
  """
  on_cpu = jax.default_backend() == "cpu"
  return Rates(
    _matrix_rate(dtype, 2048 if on_cpu else 8192),
    _memory_bandwidth(2**27 if on_cpu else 2**28),
  )


def _memory_bandwidth(size: int) -> float:
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = add(jnp.zeros([size], jnp.float32))
  seconds = []
  for _ in range(10):
    jax.block_until_ready(x)
    start = time.perf_counter()
    x = add(x)
    jax.block_until_ready(x)
    seconds.append(time.perf_counter() - start)
  return 2 * 4 * size / min(seconds)


def _matrix_rate(dtype: str, size: int) -> float:
  repeats = 8
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  y = x / size**0.5

  @jax.jit
  def products(x, y):
    return jax.lax.fori_loop(0, repeats, lambda _, x: x @ y, x)

  jax.block_until_ready(products(x, y))
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(products(x, y))
    seconds.append(time.perf_counter() - start)
  return repeats * 2 * size**3 / min(seconds)

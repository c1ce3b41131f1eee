"""How much memory reading a checkpoint needs, as a multiple of its size.

    python -m benchmarks.checkpoint_memory [--gib 2.0] [--folder DIR]

writes a T5 v1.1 in float32 and a Qwen3 in bfloat16, with parameters of at least
that size, in every format, then reads each in a process of its own and prints
one line a format: the size of the files, that of the arrays in them (Orbax and
zarr compress, bfloat16 by a fifth), the memory that was resident after the
imports, the most that was ever, and the ratio of that to the arrays and to the
files. "sharded" reads to 8 virtual devices of that one process, whose memory is
the host's.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

LIMIT = 1.3
READ = """
import resource, sys
import jax
from clp_jax import interop, sharding
from clp_jax.cli import memory
from clp_jax.models import families
memory.keep_freed()  # as commands do
shardings = None
if sys.argv[2] == "sharded":
  mesh = sharding.make_mesh(4, 2)
  def shardings(config):
    model = families.build(config)
    return sharding.param_shardings(
      mesh, model.axes(), model.abstract(), fsdp=True)
resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resident())
model, params = interop.load_model(sys.argv[1], shardings)
print(resident())
print(sum(x.nbytes for x in jax.tree.leaves(params)))
"""
MODELS = (
  ("t5", "base", "float32", ("hf", "t5x", "t5x-orbax", "orbax")),
  ("qwen3", "qwen3-0.6b", "bfloat16", ("hf", "orbax")),
)


def write(folder: pathlib.Path, gib: float) -> None:
  """Writes each model in each format, to folders of their names."""
  import jax.numpy as jnp
  import numpy as np

  from clp_jax import interop
  from clp_jax.interop import leaves
  from clp_jax.models import families
  from clp_jax.models.presets import PRESETS

  for family, size, dtype_name, formats in MODELS:
    config, dtype = PRESETS[size], jnp.dtype(dtype_name)
    shapes = leaves.expected_shapes(config)
    while dtype.itemsize * sum(map(np.prod, shapes.values())) < gib * 2**30:
      deeper = {
        name: depth + 2
        for name, depth in vars(config).items()
        if name.startswith("num_") and name.endswith("_layers")
      }
      config = dataclasses.replace(config, **deeper)
      shapes = leaves.expected_shapes(config)
    rng = np.random.default_rng(0)
    params = leaves.unflatten(
      {
        path: rng.standard_normal(shape, np.float32).astype(dtype)
        for path, shape in shapes.items()
      }
    )
    model = families.build(config)
    for name in formats:
      interop.save_model(
        folder / f"{family} {name}",
        model,
        params,
        name,
        max_shard_bytes=2**29,
      )


def size_of(folder: pathlib.Path) -> int:
  """Bytes of all files."""
  return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gib", type=float, default=2.0)
  parser.add_argument(
    "--folder", help="where to write (default: a temporary one)"
  )
  args = parser.parse_args()
  parent = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
  worst = 0.0
  try:
    # In a process of its own, so that the readers start from nothing.
    pid = os.fork()
    if pid == 0:
      write(parent, args.gib)
      os._exit(0)
    if os.waitpid(pid, 0)[1]:
      return 1
    columns = ("files", "arrays", "before", "peak", "ratio", "to files", "s")
    print(" " * 24 + "".join(f"{c:>8}" for c in columns))
    for folder in sorted(parent.iterdir()):
      for where in ("host", "sharded"):
        start = time.perf_counter()
        done = subprocess.run(
          [sys.executable, "-c", READ, str(folder), where],
          env=os.environ
          | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
          },
          stdout=subprocess.PIPE,
          text=True,
          check=True,
        )
        seconds = time.perf_counter() - start
        *resident, arrays = map(int, done.stdout.split())
        before, peak = (1024 * kib for kib in resident)
        files = size_of(folder)
        worst = max(worst, peak / arrays)
        name = folder.name + ("" if where == "host" else ", sharded")
        gib = "".join(
          f"{n / 2**30:8.2f}" for n in (files, arrays, before, peak)
        )
        ratios = f"{peak / arrays:8.2f}{peak / files:8.2f}"
        print(f"{name:24}{gib}{ratios}{seconds:8.1f}", flush=True)
  finally:
    shutil.rmtree(parent)
  print(f"worst ratio {worst:.2f}, at most {LIMIT} is wanted")
  return int(worst > LIMIT)


if __name__ == "__main__":
  sys.exit(main())

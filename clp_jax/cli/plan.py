"""`clp plan`: what a config costs on a TPU slice, compiled without one."""

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError

EXAMPLE = "clp plan --config configs/xsum/base.py --topology v5e:2x4"
SECONDS_BETWEEN_LINES = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
  help = (
    "a training config; models may be presets, such as --config.model.init=xl"
  )
  arguments.add(parser, "--config", help, required=True, metavar="FILE")
  help = "a slice of v4, v5e, v5p or v6e, such as v5e:8x16 or v5p:4x4x4"
  arguments.add(parser, "--topology", help, required=True, metavar="NAME")
  parser.add_argument(
    "--mesh",
    type=parse_mesh,
    metavar="data=D,model=M",
    help="in place of the config's; what is left out fills the slice",
  )
  parser.add_argument(
    "--only",
    action="append",
    metavar="PROGRAM",
    help="sft, rollout, reference, update or 'reward NAME'; may be given again",
  )
  parser.add_argument(
    "--quick",
    action="store_true",
    help="whether it fits, and not how long it takes: a sixth of the compiling",
  )
  parser.add_argument(
    "--json", action="store_true", help="print JSON instead of tables"
  )


def parse_mesh(text: str) -> dict[str, int]:
  """ "data=64,model=4" to {"data": 64, "model": 4}.

  Raises:
    argparse.ArgumentTypeError: for anything else.
  """
  pairs = [part.partition("=") for part in text.split(",")]
  names = {name for name, _, _ in pairs}
  if len(names) < len(pairs) or not names <= {"replica", "data", "model"}:
    raise argparse.ArgumentTypeError(
      f"expected data=D,model=M (and replica=R), got {text!r}"
    )
  return {name: arguments.positive(value) for name, _, value in pairs}


@contextlib.contextmanager
def _elapsed(name: str) -> Iterator[None]:
  """Says now and then that the compiler is still at it."""
  done = threading.Event()
  start = time.perf_counter()

  def tell():
    while not done.wait(SECONDS_BETWEEN_LINES):
      seconds = time.perf_counter() - start
      print(f"  {name}: {seconds:.0f} s", file=sys.stderr, flush=True)

  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()


def run(args: argparse.Namespace) -> None:
  config = arguments.load_config(args.config, args.rest)
  import jax

  from clp_jax import build
  from clp_jax.plan import chips, programs, roofline

  if args.mesh is not None:
    config.mesh.update({"data": None, "model": 1, "replica": 1} | args.mesh)
  programs.fill_presets(config)
  build.validate(config)
  slice_ = chips.find_slice(args.topology)
  # The programs are made on this machine's CPU, whatever else it has.
  jax.config.update("jax_platforms", "cpu")
  # What was compiled for a slice that is not here can be kept, and never read.
  jax.config.update("jax_enable_compilation_cache", False)
  mesh = build.make_mesh(config, chips.devices(slice_))
  jobs = list(programs.jobs(config, mesh))
  names = [job.name for job in jobs]
  if args.only is not None:
    if unknown := [name for name in args.only if name not in names]:
      raise ConfigError(
        f"--only {unknown[0]}: the config's programs are {', '.join(names)}."
      )
    jobs = [job for job in jobs if job.name in args.only]
  start = time.perf_counter()
  compiled = []
  for i, job in enumerate(jobs):
    print(
      f"compiling {job.name} for {slice_.name} ({i + 1} of {len(jobs)}, "
      f"{time.perf_counter() - start:.0f} s so far)",
      file=sys.stderr,
      flush=True,
    )
    with _elapsed(job.name):
      compiled.append(programs.compile_job(job, args.quick))
  print(f"done in {time.perf_counter() - start:.0f} s", file=sys.stderr)
  result = roofline.make_report(
    config, slice_, mesh, compiled, whole=args.only is None
  )
  print(json.dumps(result, indent=2) if args.json else roofline.to_text(result))

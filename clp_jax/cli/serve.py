"""`clp serve`: a run behind an HTTP server, with a page to steer it."""

import argparse

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError

EXAMPLE = "clp serve --workdir runs/demo, then open http://127.0.0.1:8600/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  arguments.add_workdir(parser)
  parser.add_argument(
    "--host",
    default="127.0.0.1",
    help="address to listen on (default: 127.0.0.1); one that other machines "
    "reach needs a key in the environment variable CLP_API_KEY",
  )
  arguments.add(parser, "--port", "0 takes a free one", 8600, type=int)
  arguments.add_count(parser, "--rows", "answers decoded together", 32)
  help = "answers that may wait; requests beyond get status 429"
  arguments.add_count(parser, "--max-waiting", help, 512)
  help = "from a request to its answer"
  arguments.add_count(parser, "--timeout", help, 60, "SECONDS")


def run(args: argparse.Namespace) -> None:
  if not 0 <= args.port < 1 << 16:
    raise ConfigError(f"--port must be in 0 to 65535, got {args.port}.")
  try:
    from clp_jax.serving import protection, server
  except ModuleNotFoundError as error:
    raise ConfigError(
      f"clp serve needs the package {error.name}: pip install 'clp_jax[serve]'."
    ) from error
  server.serve(
    args.workdir,
    args.host,
    args.port,
    rows=args.rows,
    limits=protection.Limits(waiting=args.max_waiting, seconds=args.timeout),
  )

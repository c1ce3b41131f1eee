"""`clp serve`: a run behind an HTTP server, with a page to steer it."""

import argparse

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError

EXAMPLE = "clp serve --workdir runs/demo, then open http://127.0.0.1:8600/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  arguments.add_workdir(parser)
  parser.add_argument(
    "--host",
    default="127.0.0.1",
    help="address to listen on (default: 127.0.0.1); one that other machines "
    "reach needs a key in the environment variable CLP_API_KEY",
  )
  parser.add_argument(
    "--port", type=int, default=8600, help="0 takes a free one (default: 8600)"
  )
  parser.add_argument(
    "--rows",
    type=arguments.positive,
    default=32,
    metavar="N",
    help="answers decoded together (default: 32)",
  )
  parser.add_argument(
    "--max-waiting",
    type=arguments.positive,
    default=512,
    metavar="N",
    help="answers that may wait; requests beyond get status 429 (default: 512)",
  )
  parser.add_argument(
    "--timeout",
    type=arguments.positive,
    default=60,
    metavar="SECONDS",
    help="from a request to its answer (default: 60)",
  )


def run(args: argparse.Namespace) -> None:
  """Runs the command."""
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

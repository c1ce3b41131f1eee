"""`clp train`: trains, or resumes, the run that a config file describes."""

import argparse

from clp_jax.cli import arguments

EXAMPLE = (
  "clp train --config configs/demo.py --config.train.steps=200 "
  "--workdir runs/mine"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE",
    help="a Python file with get_config(); --config.path.to.field=value "
    "overrides a field",
  )
  arguments.add_workdir(parser)
  processes = parser.add_argument_group(
    "several processes", "on a TPU pod they are found out"
  )
  processes.add_argument(
    "--coordinator", metavar="HOST:PORT", help="address of process 0"
  )
  processes.add_argument("--num-processes", type=arguments.positive)
  processes.add_argument("--process-id", type=int)


def run(args: argparse.Namespace) -> None:
  """Runs the command."""
  config = arguments.load_config(args.config, args.rest)
  from clp_jax import distributed
  from clp_jax.config import validate

  validate(config)
  distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  from clp_jax.train import moft

  moft.train(config, args.workdir)
  if distributed.is_first():
    print(args.workdir)

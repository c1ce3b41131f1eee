"""`clp train`: trains, or resumes, the run that a config file describes."""

import argparse

from clp_jax.cli import arguments

EXAMPLE = (
  "clp train --config configs/demo.py --config.train.steps=200 "
  "--workdir runs/mine"
)


add_arguments = arguments.add_training


def run(args: argparse.Namespace) -> None:
  config = arguments.start_training(args)
  from clp_jax import distributed
  from clp_jax.train import moft

  moft.train(config, args.workdir)
  if distributed.is_first():
    print(args.workdir)

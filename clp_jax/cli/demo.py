"""`clp demo`: the whole method on the built-in world."""

import argparse

from clp_jax.cli import arguments

EXAMPLE = "clp demo --workdir runs/demo --seed 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  arguments.add_workdir(parser, default="runs/demo")
  arguments.add_seed(parser, "everything")


def run(args: argparse.Namespace) -> None:
  from clp_jax import demo

  demo.run(args.workdir, args.seed)

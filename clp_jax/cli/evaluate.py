"""`clp evaluate`: sweeps the weightings of a run on held-out prompts."""

import argparse

from clp_jax.cli import arguments

EXAMPLE = "clp evaluate --workdir runs/demo --grid 11 --prompts 256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  arguments.add_workdir(parser)
  arguments.add_step(parser)
  help = "points an edge of the simplex (default: the config's eval.grid)"
  arguments.add_count(parser, "--grid", help)
  help = "held-out prompts (default: the config's eval.prompts)"
  arguments.add_count(parser, "--prompts", help)
  arguments.add_seed(parser, "the sampling")


def run(args: argparse.Namespace) -> None:
  from clp_jax.evaluation import sweep, tables

  front = sweep.evaluate_run(
    args.workdir,
    step=args.step,
    grid=args.grid,
    num_prompts=args.prompts,
    seed=args.seed,
  )
  tables.print_table([front])
  print(f"{args.workdir}/evaluation/front.json")
  print(f"{args.workdir}/evaluation/pareto.png")

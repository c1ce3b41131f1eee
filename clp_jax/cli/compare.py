"""`clp compare`: fronts of several runs, with intervals."""

import argparse

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError

EXAMPLE = "clp compare runs/demo runs/demo/soups --output runs/compared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "runs",
    nargs="+",
    metavar="RUN",
    help="a run's folder, or NAME=FOLDER; folders of one name, or of one "
    "config but for the seed, are seeds of one method; the first method is "
    "what the others are compared with",
  )
  arguments.add_output(parser, "the folder to write")
  parser.add_argument(
    "--reference-point",
    type=arguments.parse_weights,
    metavar="NAME=X,...",
    help="of the hypervolume, a value a reward, with one reward also kl=NATS "
    "(default: that of the runs' evaluations, and the largest KL)",
  )
  help = "resamplings of prompts and seeds"
  arguments.add_count(parser, "--bootstrap", help, 1000)
  arguments.add_seed(parser, "the resampling")


def run(args: argparse.Namespace) -> None:
  import shlex

  from clp_jax.data.tasks import fact_checker
  from clp_jax.evaluation import compare, comparison_files

  named = [_split(text) for text in args.runs]
  paths = [path for _, path in named]
  twice = {path for path in paths if paths.count(path) > 1}
  if twice:
    raise ConfigError(f"RUN {', '.join(sorted(twice))} is given twice.")
  methods, config = compare.group_runs(named)
  found = compare.compare(
    methods,
    distribution=compare.distribution_of(config, methods),
    reference_point=args.reference_point,
    bootstrap=args.bootstrap,
    seed=args.seed,
  )
  command = ["clp", "compare", *args.runs, "--output", args.output]
  if args.reference_point:
    values = [f"{k}={v:g}" for k, v in args.reference_point.items()]
    command += ["--reference-point", ",".join(values)]
  command += ["--bootstrap", str(args.bootstrap), "--seed", str(args.seed)]
  address = comparison_files.save(
    args.output,
    found,
    title=" and ".join((", ".join(found.methods[:-1]), found.methods[-1]))
    if len(found.methods) > 1
    else found.methods[0],
    commands=[shlex.join(command)],
    unsupported=fact_checker(None if config is None else config.data.task),
  )
  comparison_files.print_tables(found)
  print(f"{args.output}/comparison.md")
  print(f"{args.output}/fronts.png")
  print(address)


def _split(text: str) -> tuple[str | None, str]:
  """NAME=FOLDER, or a FOLDER, which may have an = in its name."""
  import os

  name, equals, path = text.partition("=")
  if not equals or os.path.exists(text):
    return None, text
  if not name or not path:
    raise ConfigError(f"RUN must be a folder or NAME=FOLDER, got {text!r}.")
  return name, path

"""`clp combine`: one steerable run of runs that were finetuned for one reward
each."""

import argparse

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError

EXAMPLE = (
  "clp combine nli=runs/demo/single/nli rouge=runs/demo/single/rouge "
  "--method soup --output runs/combined"
)
METHODS = ("soup", "mod", "dera")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "runs",
    nargs="+",
    metavar="NAME=FOLDER",
    help="an objective and the run, or the LoRA of the peft library, that was "
    "finetuned for it alone; all from one reference",
  )
  parser.add_argument(
    "--method",
    required=True,
    choices=METHODS,
    help="soup: their parameters, averaged with the weights (Rewarded Soups); "
    "mod: their logits, mixed with the weights at every token (MOD); dera: "
    "their logits and the reference's, which alpha mixes as well, from the "
    "runs' own alpha to 1 (DeRa)",
  )
  help = (
    "a Python file with get_config() whose data, rewards, weightings and "
    "evaluation it has, and --config.path.to.field=value (default: the runs' "
    "own, the first one's where they differ; adapters have none)"
  )
  arguments.add(parser, "--config", help, metavar="FILE")
  arguments.add_output(parser, "the run's folder to write")


def run(args: argparse.Namespace) -> None:
  runs: dict[str, str] = {}
  for text in args.runs:
    name, _, folder = text.partition("=")
    if not name or not folder:
      raise ConfigError(f"expected NAME=FOLDER, got {text!r}.")
    if name in runs:
      raise ConfigError(f"{name} is given twice; give one folder for each.")
    runs[name] = folder
  if args.rest and args.config is None:
    raise ConfigError(f"unknown arguments: {' '.join(args.rest)}.")
  from clp_jax.baselines import soups

  config = None
  if args.config is not None:
    config = arguments.load_config(args.config, args.rest)
  soups.combine(
    soups.config_of(runs, config, steers_alpha=args.method == "dera"),
    runs,
    args.output,
    mixing="parameters" if args.method == "soup" else "logits",
  )
  print(args.output)

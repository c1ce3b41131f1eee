"""`clp experiment`: an experiment of the paper, end to end.

The names that begin with "choose-" measure what the others are run with.
`costs` measures what the methods cost, and `results` writes a page of all that
was run.
"""

import argparse

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError, RunError

EXAMPLE = "clp experiment two-reward --seeds 3 --workdir runs/experiments"
NAMES = (
  "single-reward-multi-kl",
  "two-reward",
  "three-reward",
  "training-steps",
  "front-cost",
  "model-size",
  "model-family",
  "weighting-distribution",
  "choose-supervised",
  "choose-steps",
  "choose-rate",
  "choose-rate-kl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "name",
    metavar="NAME",
    help=f"{', '.join(NAMES)}; costs, what the methods cost; results, a page "
    "of all that was run",
  )
  arguments.add_workdir(parser, default="runs/experiments")
  help = "training seeds 0 to N - 1 (default: the experiment's, 1 to 3)"
  arguments.add_count(parser, "--seeds", help)
  help = (
    "supervised checkpoints that the seeds start from in turn, where the "
    "config finetunes"
  )
  arguments.add_count(parser, "--checkpoints", help, 2)
  for name, help in (
    (
      "--methods",
      "instead of the experiment's own; the first is what the others are "
      "compared with",
    ),
    ("--values", "of what an ablation varies, instead of its own"),
  ):
    arguments.add(parser, name, help, type=_names, metavar="A,B,...")
  parser.add_argument(
    "--config",
    metavar="FILE",
    help="the base config (default: the built-in world's); --config.path.to."
    "field=value overrides a field of either",
  )
  for name, help in (
    ("--steps", "training steps of a method (default: the config's)"),
    ("--sft-steps", "supervised steps before (default: the config's)"),
    ("--prompts", "held-out prompts (default: the config's)"),
    (
      "--grid",
      "points an edge of the simplex (default: --config's, or its own)",
    ),
  ):
    arguments.add_count(parser, name, help)
  parser.add_argument(
    "--dry-run",
    action="store_true",
    help="print the runs, their folders, samples and planned chip-hours, and "
    "train nothing",
  )
  help = "of --dry-run: a generation of TPU, or a slice"
  arguments.add(parser, "--topology", help, "v5e", metavar="NAME")
  help = "of --dry-run: share of the peak FLOP/s that a step reaches"
  share = arguments.share
  arguments.add(parser, "--utilisation", help, 0.4, type=share, metavar="X")
  help = "train nothing: compare what is finished"
  parser.add_argument("--report-only", action="store_true", help=help)
  help = "of results (default: docs/RESULTS.md)"
  arguments.add(parser, "--output", help, metavar="FILE")


def run(args: argparse.Namespace) -> None:
  if args.output is not None and args.name != "results":
    raise ConfigError(f"--output is of results, not of {args.name}.")
  if args.name in ("costs", "results"):
    _only(args, "workdir", *(["output"] if args.name == "results" else []))
    (_measure_costs if args.name == "costs" else _write_results)(args)
    return
  if args.name not in NAMES:
    raise ConfigError(
      f"there is no experiment {args.name!r}; there are {', '.join(NAMES)}, "
      "and costs and results."
    )
  from clp_jax import build
  from clp_jax.experiments import dry_run, plans, protocol, running
  from clp_jax.plan import programs

  if args.name == protocol.SUPERVISED:
    _choose_supervised(args)
    return
  experiment = plans.EXPERIMENTS[args.name]
  config = arguments.load_config(args.config or protocol.__file__, args.rest)
  overridden = any(a.startswith("--config.eval.grid") for a in args.rest)
  if args.grid is not None:
    config.eval.grid = args.grid
  elif args.config is None and not overridden:
    config.eval.grid = experiment.grid
  if args.prompts is not None:
    config.eval.prompts = args.prompts
  if args.sft_steps is not None:
    config.sft.steps = args.sft_steps
  steps = args.steps
  if steps is None and args.config is None:
    steps = experiment.steps
  if steps is not None:
    plans.set_steps(config, steps)
  if args.dry_run:
    programs.fill_presets(config)
  build.validate(plans.base_config(experiment, config))
  plan = running.make_plan(
    args.name,
    config,
    methods=args.methods,
    values=args.values,
    seeds=args.seeds or experiment.seeds,
    num_checkpoints=args.checkpoints,
    workdir=args.workdir,
    command=_command(args),
    rates=_rates(args),
  )
  if args.dry_run:
    print(dry_run.text(plan, args.topology, args.utilisation))
    return
  failures = running.run(plan, train=not args.report_only)
  directory = f"{args.workdir}/{args.name}"
  with open(f"{directory}/comparison.md", encoding="utf-8") as text:
    print(text.read())
  print(f"{directory}/comparison.csv")
  print(f"{directory}/fronts.png")
  print(f"{directory}/report.html")
  if failures:
    raise RunError(
      f"{len(failures)} of the runs failed, the others are compared in "
      f"{directory}; start the same command again to try them once more. "
      + "; ".join(failures)
    )


def _only(args: argparse.Namespace, *names: str) -> None:
  """Raises ConfigError for options that are not among the names."""
  parser = argparse.ArgumentParser()
  add_arguments(parser)
  for name, value in vars(args).items():
    default = parser.get_default(name)
    known = ("name", "command", "run", "rest", *names)
    if (name not in known and value != default) or (name == "rest" and value):
      option = name.replace("_", "-")
      shown = " ".join(args.rest) if name == "rest" else f"--{option}"
      raise ConfigError(f"{shown} is not an option of {args.name}.")


def _rates(args: argparse.Namespace) -> dict[str, float]:
  """The learning rates that the built-in world's experiments have chosen."""
  from clp_jax.experiments import plans, protocol

  experiment = plans.EXPERIMENTS[args.name]
  overridden = any(
    a.startswith("--config.optimizer.learning_rate") for a in args.rest
  )
  if args.config is not None or overridden or args.name in protocol.CHOOSING:
    return {}
  kl = experiment.alpha_range is not None
  return protocol.CHOSEN_RATES_KL if kl else protocol.CHOSEN_RATES


def _choose_supervised(args: argparse.Namespace) -> None:
  """Measures the held-out loss by supervised steps."""
  from clp_jax.experiments import protocol, running

  _only(args, "workdir", "config", "values", "prompts", "rest")
  config = arguments.load_config(args.config or protocol.__file__, args.rest)
  config.data.eval_split = "test"
  config.eval.prompts = args.prompts or 1000
  values = protocol.SUPERVISED_VALUES
  if args.values is not None:
    values = tuple(arguments.positive(value) for value in args.values)
  rows = running.supervised_curve(config, values, args.workdir, _command(args))
  for row in rows:
    print(f"{row['steps']} steps: loss {row['loss']}")


def _measure_costs(args: argparse.Namespace) -> None:
  from clp_jax.experiments import results

  results.measure_costs(
    args.workdir, f"clp experiment costs --workdir {args.workdir}"
  )
  print(f"{args.workdir}/costs/costs.json")


def _write_results(args: argparse.Namespace) -> None:
  import pathlib

  from clp_jax.experiments import results

  output = pathlib.Path(args.output or "docs/RESULTS.md")
  commands = {
    name: f"clp experiment {name} --workdir {args.workdir}"
    for name in (*NAMES, "costs", "results")
  }
  results.collect(args.workdir, output.parent / "results")
  text = results.page_of(output.parent / "results", commands)
  output.write_text(text, encoding="utf-8")
  print(output)


def _names(text: str) -> tuple[str, ...]:
  return tuple(part.strip() for part in text.split(",") if part.strip())


def _command(args: argparse.Namespace) -> str:
  """The command line again, but for --report-only."""
  import shlex

  parts = ["clp", "experiment", args.name]
  parts += ["--checkpoints", str(args.checkpoints)]
  if args.seeds is not None:
    parts += ["--seeds", str(args.seeds)]
  for name in ("methods", "values"):
    if getattr(args, name) is not None:
      parts += [f"--{name}", ",".join(getattr(args, name))]
  for name in ("config", "steps", "sft_steps", "prompts", "grid"):
    if getattr(args, name) is not None:
      parts += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
  return shlex.join([*parts, *args.rest, "--workdir", args.workdir])

"""`clp`: parses, calls one command and turns errors into exit statuses.

0 the work is done; 1 a run failed; 2 bad arguments or config; 75 stopped by
SIGTERM with everything saved; 130 interrupted from the keyboard. With 134 JAX
itself ends a process, when another one of its job is gone.
"""

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from clp_jax.errors import (
  ConfigError,
  FrontError,
  Preempted,
  RewardError,
  RunError,
)

# Command -> help. The module of that name adds the command's arguments and runs
# it. Only the chosen one is imported: `clp --help` needs neither JAX nor
# TensorFlow.
COMMANDS = {
  "demo": "train and compare everything on the built-in world, in minutes",
  "train": "train, or resume, the run that a config file describes",
  "train-sft": "finetune a model on reference summaries, and no more",
  "train-reward": "train a preference model from pairs of responses",
  "plan": "compile a config for a TPU slice, without one: memory and time",
  "combine": "make one steerable run of runs that have one reward each",
  "evaluate": "sweep the weightings of a run on held-out prompts",
  "experiment": "run an experiment of the paper, every method and seed",
  "compare": "compare the fronts of several runs, with intervals",
  "generate": "summarise documents at any weighting",
  "serve": "steer a run in the browser, or through an OpenAI-like API",
  "judge": "let a language model compare the summaries of two runs",
  "export": "write a policy of a run as an ordinary checkpoint, or LoRAs",
}


WALK = """\
a walk, each step an example:
  train on the built-in world, with baselines, a table and report.html
    clp demo --workdir runs/demo
  steer what it has made: one JSON object a line in and out, or in a browser
    echo '{"document": "Averlin sold the mill. It followed talks."}' |
      clp generate --workdir runs/demo --weights nli=0.7,rouge=0.3
    clp serve --workdir runs/demo
  measure its front again, more finely
    clp evaluate --workdir runs/demo --grid 21
  train a variant: any field of the config is a flag
    clp train --config configs/demo.py --config.steering=logits \\
      --workdir runs/logits
  average, or mix, runs that were finetuned for one reward each
    clp combine nli=runs/demo/single/nli rouge=runs/demo/single/rouge \\
      --method mod --output runs/mod
  compare runs, by their rewards and by a judge
    clp evaluate --workdir runs/logits
    clp compare runs/demo runs/logits --output runs/compared
    clp judge runs/demo runs/logits --output runs/judged \\
      --endpoint http://127.0.0.1:8000/v1 --model NAME
  take one weighting away as an ordinary model
    clp export --workdir runs/demo --weights nli=0.7,rouge=0.3 \\
      --format hf --output runs/exported

configs/jsonl.py is for documents of your own; clp COMMAND --help has the rest.
Every command that trains is resumed by starting it again.
"""


class _Parser(argparse.ArgumentParser):
  """argparse whose errors are one line, with status 2."""

  def error(self, message):
    self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line, or this program's, and returns its exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = _Parser(
    prog="clp",
    description="Conditional Language Policy: one model, steered between "
    "rewards by a weighting.",
    epilog=WALK,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(
    dest="command", required=True, metavar="COMMAND", parser_class=_Parser
  )
  chosen = next((a for a in argv if not a.startswith("-")), None)
  for name, text in COMMANDS.items():
    if name == chosen:
      module = importlib.import_module(f"clp_jax.cli.{name.replace('-', '_')}")
      command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: {module.EXAMPLE}",
        allow_abbrev=False,
      )
      module.add_arguments(command)
      command.set_defaults(run=module.run)
    else:
      commands.add_parser(name, help=text)
  arguments, rest = parser.parse_known_args(argv)
  if rest and not hasattr(arguments, "config"):
    parser.error(f"unknown arguments: {' '.join(rest)}")
  arguments.rest = rest
  return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
  name = arguments.command
  # Before JAX and TensorFlow are imported: their chatter is not progress.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
  # What imports and tracing make stays, and Python would look through it for
  # garbage hundreds of times, for a tenth of the time to a first result.
  gc.set_threshold(10_000, 10, 3)
  from clp_jax.cli import setup

  setup.configure()
  from clp_jax import distributed

  try:
    arguments.run(arguments)
    return 0
  except Preempted as error:
    return _fail(name, error, 75)  # EX_TEMPFAIL
  except ConfigError as error:
    status = _fail(name, error, 2)
  except (FrontError, RunError, RewardError, OSError) as error:
    status = _fail(name, error, 1)
  except KeyboardInterrupt:
    status = _fail(name, "interrupted; start the same command to resume", 130)
  except Exception as error:
    if not distributed.is_joined():
      raise
    status = _fail(name, distributed.explain(error), 1)
  if distributed.is_joined():
    distributed.leave(status)
  return status


def _fail(name: str, error: object, status: int) -> int:
  if isinstance(error, BrokenPipeError):
    # The reader has left: nothing more can be said on stdout.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
  text = " ".join(str(error).split())
  print(f"clp {name}: error: {text}", file=sys.stderr)
  return status

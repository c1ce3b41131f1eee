"""Arguments that several commands share, and how they are read."""

import argparse
import os

from clp_jax.errors import ConfigError


def parse_weights(text: str) -> dict[str, float]:
  """ "nli=0.7,rouge=0.3" to {"nli": 0.7, "rouge": 0.3}.

  Raises:
    argparse.ArgumentTypeError: for anything else.
  """
  weights = {}
  for part in text.split(","):
    name, equals, value = part.partition("=")
    name = name.strip()
    try:
      number = float(value)
    except ValueError:
      number = None
    if not name or not equals or number is None:
      raise argparse.ArgumentTypeError(
        f"expected name=weight,name=weight such as nli=0.7,rouge=0.3, got "
        f"{text!r}"
      )
    if name in weights:
      raise argparse.ArgumentTypeError(f"{name} is given twice in {text!r}")
    weights[name] = number
  return weights


def positive(text: str) -> int:
  """An integer of at least 1."""
  try:
    value = int(text)
  except ValueError:
    value = 0
  if value < 1:
    raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
  return value


def share(text: str) -> float:
  """A number above 0 and at most 1."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value <= 1:
    raise argparse.ArgumentTypeError(f"expected 0 < X <= 1, got {text!r}")
  return value


def add_workdir(parser: argparse.ArgumentParser, default=None) -> None:
  """--workdir DIR."""
  parser.add_argument(
    "--workdir",
    required=default is None,
    default=default,
    metavar="DIR",
    help="the run's folder" + (f" (default: {default})" if default else ""),
  )


def add_training(parser: argparse.ArgumentParser) -> None:
  """--config, --workdir and what several processes need."""
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE",
    help="a Python file with get_config(); --config.path.to.field=value "
    "overrides a field",
  )
  add_workdir(parser)
  processes = parser.add_argument_group(
    "several processes",
    "the same command on every host; launch/tpu.sh does so on a TPU slice",
  )
  processes.add_argument(
    "--distributed",
    action="store_true",
    help="find the others out: on a TPU slice, GKE, Slurm or Open MPI",
  )
  processes.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="elsewhere: the address of process 0",
  )
  processes.add_argument(
    "--num-processes",
    type=positive,
    metavar="N",
    help="of the job; with --distributed, checked",
  )
  processes.add_argument(
    "--process-id", type=int, metavar="I", help="of this one, from 0"
  )
  processes.add_argument(
    "--join-timeout",
    type=positive,
    default=300,
    metavar="SECONDS",
    help="how long to wait for the others (default: 300)",
  )
  processes.add_argument(
    "--heartbeat-timeout",
    type=positive,
    default=100,
    metavar="SECONDS",
    help="how long one may be silent before all end, to be started again "
    "(default: 100)",
  )


def start_training(args: argparse.Namespace):
  """Reads and checks the config, then joins the other processes.

  Args:
    args: of a parser that `add_training` has seen; `rest` holds the overrides.

  Returns:
    The locked ConfigDict.

  Raises:
    ConfigError: names what is wrong.
  """
  config = load_config(args.config, args.rest)
  from clp_jax import distributed
  from clp_jax.build import validate

  validate(config)
  distributed.initialize(
    args.coordinator,
    args.num_processes,
    args.process_id,
    cluster=args.distributed,
    timeout=args.join_timeout,
    heartbeat_timeout=args.heartbeat_timeout,
  )
  return config


def load_config(path: str, overrides: list[str]):
  """A config file with --config.path.to.field=value applied.

  Args:
    path: a Python file with get_config().
    overrides: the command line's other arguments. The value None is None, for
      fields that may be.

  Returns:
    The locked ConfigDict.

  Raises:
    ConfigError: names the file, field or value that is wrong.
  """
  from absl import flags
  from ml_collections import config_flags

  if not os.path.exists(path):
    raise ConfigError(f"--config {path}: no such file.")
  unknown = [
    a for a in overrides if a.startswith("-") and not a.startswith("--config.")
  ]
  if unknown:
    raise ConfigError(f"unknown arguments: {' '.join(unknown)}.")
  overrides, unset = _without_none(overrides)
  values = flags.FlagValues()
  argv = ["clp", f"--config={path}", *overrides]
  config_flags.DEFINE_config_file(
    "config", flag_values=values, lock_config=True, sys_argv=argv
  )
  try:
    rest = values(argv)[1:]
    config = values.config
    for field in unset:
      _set_none(config, field)
  except ConfigError:
    raise
  except (AttributeError, KeyError) as error:
    raise ConfigError(
      f"unknown config field: {error.args[0] if error.args else error}"
    ) from error
  except Exception as error:  # a config file is the user's code
    raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  if rest:
    raise ConfigError(f"unknown arguments: {' '.join(rest)}.")
  return config


def _without_none(overrides: list[str]) -> tuple[list[str], list[str]]:
  """Takes out the flags that say None, which ml_collections reads as a text.

  Returns:
    The other arguments, and the fields whose last flag says None.
  """
  words: list[str] = []
  for word in overrides:
    if word == "None" and words and "=" not in words[-1]:
      words[-1] += "=None"  # --config.field None
    else:
      words.append(word)
  none: dict[str, bool] = {}
  kept = []
  for word in words:
    field, _, value = word.removeprefix("--config.").partition("=")
    none[field] = value == "None"
    if not none[field]:
      kept.append(word)
  return kept, [field for field, last in none.items() if last]


def _set_none(config, field: str) -> None:
  from ml_collections import config_dict

  *sections, name = field.split(".")
  for section in sections:
    config = config[section]
  if config[name] is None:
    return
  fields = dict(config.items(preserve_field_references=True))
  # A placeholder, whatever it holds; any other field keeps its type.
  if not isinstance(fields[name], config_dict.FieldReference):
    raise ConfigError(
      f"{field} can't be None; give it a value, or leave the flag out."
    )
  config[name] = None

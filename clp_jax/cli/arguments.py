"""Arguments that several commands share, and how they are read."""

import argparse
import contextlib
import os
from typing import Any

from clp_jax.errors import ConfigError


def parse_weights(text: str) -> dict[str, float]:
  """ "nli=0.7,rouge=0.3" to {"nli": 0.7, "rouge": 0.3}.

  Raises:
    argparse.ArgumentTypeError: for anything else.
  """
  weights = {}
  for part in text.split(","):
    name, _, value = part.partition("=")
    name = name.strip()
    try:
      weight = float(value)  # of "" where there is no "="
    except ValueError:
      name = ""
    if not name:
      raise argparse.ArgumentTypeError(
        f"expected name=weight,name=weight such as nli=0.7,rouge=0.3, got "
        f"{text!r}"
      )
    if name in weights:
      raise argparse.ArgumentTypeError(f"{name} is given twice in {text!r}")
    weights[name] = weight
  return weights


def positive(text: str) -> int:
  """An integer of at least 1."""
  with contextlib.suppress(ValueError):
    if int(text) >= 1:
      return int(text)
  raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")


def seed(text: str) -> int:
  """An integer of 64 bits that is not negative."""
  with contextlib.suppress(ValueError):
    if 0 <= int(text) < 2**64:
      return int(text)
  raise argparse.ArgumentTypeError(
    f"expected an integer in 0 to 2**64 - 1, got {text!r}"
  )


def temperature(text: str) -> float:
  """A number of at least 0 that float32 has."""
  with contextlib.suppress(ValueError):
    if 0 <= float(text) <= 1e38:
      return float(text)
  raise argparse.ArgumentTypeError(f"expected 0 <= T <= 1e38, got {text!r}")


def share(text: str) -> float:
  """A number above 0 and at most 1."""
  with contextlib.suppress(ValueError):
    if 0 < float(text) <= 1:
      return float(text)
  raise argparse.ArgumentTypeError(f"expected 0 < X <= 1, got {text!r}")


def add(
  parser, name: str, help: str, default: Any = None, **options: Any
) -> None:
  """An option whose help says its default, where it has one; `options` are
  argparse's."""
  if default is not None:
    help += f" (default: {default})"
  parser.add_argument(name, default=default, help=help, **options)


def add_workdir(parser, default: str | None = None) -> None:
  """--workdir DIR."""
  more = {"required": default is None, "metavar": "DIR"}
  add(parser, "--workdir", "the run's folder", default, **more)


def add_output(parser, help: str) -> None:
  """--output DIR; `help` says what it is for."""
  add(parser, "--output", help, required=True, metavar="DIR")


def add_count(
  parser, name: str, help: str, default: int | None = None, metavar: str = "N"
) -> None:
  """An option that takes an integer of at least 1; see `add`."""
  add(parser, name, help, default, type=positive, metavar=metavar)


def add_weighting(parser, help: str) -> None:
  """--weights and --alpha; `help` says which weighting it is."""
  add(parser, "--weights", help, type=parse_weights, metavar="NAME=W,...")
  help = "KL weight, where the run was trained on a range of it"
  add(parser, "--alpha", help, type=float)


def add_seed(parser, of: str) -> None:
  """--seed, 0 by default."""
  add(parser, "--seed", f"of {of}", 0, type=seed)


def add_step(parser) -> None:
  """--step, of a run."""
  add(parser, "--step", "a checkpoint (default: the newest)", type=int)


def add_temperature(parser) -> None:
  """--temperature, 1 by default."""
  add(parser, "--temperature", "0 is greedy", 1, type=temperature)


def add_training(parser: argparse.ArgumentParser) -> None:
  """--config, --workdir and what several processes need."""
  help = (
    "a Python file with get_config(); --config.path.to.field=value overrides a "
    "field"
  )
  add(parser, "--config", help, required=True, metavar="FILE")
  add_workdir(parser)
  processes = parser.add_argument_group(
    "several processes",
    "the same command on every host; launch/tpu.sh does so on a TPU slice",
  )
  help = "find the others out: on a TPU slice, GKE, Slurm or Open MPI"
  processes.add_argument("--distributed", action="store_true", help=help)
  help = "elsewhere: the address of process 0"
  add(processes, "--coordinator", help, metavar="HOST:PORT")
  help = "of the job; with --distributed, checked"
  add_count(processes, "--num-processes", help)
  add(processes, "--process-id", "of this one, from 0", type=int, metavar="I")
  help = "how long to wait for the others"
  add_count(processes, "--join-timeout", help, 300, "SECONDS")
  help = "how long one may be silent before all end, to be started again"
  add_count(processes, "--heartbeat-timeout", help, 100, "SECONDS")


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
  from ml_collections import config_dict, config_flags

  if not os.path.isfile(path):
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
  except flags.Error as error:
    raise ConfigError(str(error)) from error
  except (AttributeError, KeyError) as error:
    if getattr(error, "name", None) == "get_config":
      raise ConfigError(f"--config {path} has no get_config().") from error
    raise ConfigError(
      f"unknown config field: {error.args[0] if error.args else error}"
    ) from error
  except Exception as error:  # a config file is the user's code
    raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  if rest:
    raise ConfigError(f"unknown arguments: {' '.join(rest)}.")
  if not isinstance(config, config_dict.ConfigDict):
    raise ConfigError(
      f"--config {path}: get_config() must return a ConfigDict, got {config!r}."
    )
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

"""A run's folder: the files that say what the run is.

  config.json        the config
  model.json         the model's config
  vocabulary.model   the SentencePiece model; or tokenizer.json and what belongs
                     to it
  reference/         Orbax: the frozen start, an ordinary model
  checkpoints/<n>/   Orbax: train/checkpoints.py
  metrics.jsonl, metrics/, evaluation/

All paths may be gs://. A file appears whole or not at all.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from clp_jax import config as config_lib
from clp_jax.data import tokenizer_files
from clp_jax.data.tokenizer import Tokenizer
from clp_jax.errors import ConfigError, RunError
from clp_jax.interop import storage
from clp_jax.models import families

PARTS = "parts.json"  # of a folder that is made of other runs

# What a resumed run may change: how long, how often, and on which mesh.
_FREE = (
  *("train.steps", "train.checkpoint_every", "train.keep"),
  *("sft.checkpoint_every",),
  *("reward_model.steps", "reward_model.checkpoint_every"),
)
_FREE_PREFIXES = ("train.log_", "eval.", "mesh.", "plan.", "wandb.")
# Of RL; a supervised run and a preference model have rates of their own.
_RATES = tuple(
  f"optimizer.{name}"
  for name in ("learning_rate", "warmup_steps", "decay_steps")
)


def folder(workdir: str) -> epath.Path:
  """The absolute path of a run's folder: Orbax takes no other."""
  return storage.absolute(workdir)


@contextlib.contextmanager
def alone(workdir: str) -> Iterator[None]:
  """Keeps other processes of this machine from training in a folder meanwhile.

  Two that saved the same checkpoint would break each other's. A killed process
  leaves nothing behind; gs:// and file systems without locks have none.

  Raises:
    RunError: another process has it.
  """
  path = folder(workdir)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0 and storage.Folder(str(path)).on_disk:
      path.mkdir(parents=True, exist_ok=True)
      held = os.open(path, os.O_RDONLY)
      stack.callback(os.close, held)
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise RunError(
          f"another process is training in {workdir}; wait for its end or "
          "choose another --workdir."
        ) from error
      except OSError:  # no locks here
        pass
    yield


def start(workdir: str, config: ml_collections.ConfigDict) -> None:
  """Claims a folder for a run, or checks that it holds this very run.

  A folder is resumed when its config differs in nothing that changes the
  course of training; the new values of those other fields take effect.

  Raises:
    RunError: when the folder can't be written.
    ConfigError: when it holds a run of another config.
  """
  path = folder(workdir)
  new = config_lib.to_json(config)
  file = path / "config.json"
  try:
    if file.exists():
      _check_same(workdir, _read(file), new)
    elif path.exists() and any(path.glob("checkpoints/*")):
      raise ConfigError(
        f"{workdir} holds checkpoints but no config.json; choose another "
        "--workdir."
      )
    path.mkdir(parents=True, exist_ok=True)
    write_json(file, new)
  except OSError as error:
    raise RunError(f"can't write to {workdir}: {error}") from error
  # No process goes on before all have seen what was there.
  multihost_utils.sync_global_devices("run folder")


def _check_same(workdir: str, old: dict, new: dict) -> None:
  old, new = decisive(_completed(old)), decisive(new)
  differing = [
    f"{name} = {old.get(name, 'absent')!r} there, "
    f"{new.get(name, 'absent')!r} here"
    for name in sorted(old.keys() | new.keys())
    if not _equal(old.get(name), new.get(name))
  ]
  if differing:
    shown = "; ".join(differing[:3]) + ("; ..." if differing[3:] else "")
    raise ConfigError(
      f"{workdir} holds another run's config ({shown}); choose another "
      "--workdir or the same config."
    )


def decisive(values: dict) -> dict[str, Any]:
  """What a resumed run can't change: all that decides a step's result.

  Path of a field -> its JSON value, of a config, or some sections of one, from
  `config.to_json`.
  """
  free = _FREE if "objectives" in values else (*_FREE, *_RATES)
  return {
    name: value
    for name, value in traverse_util.flatten_dict(values, sep=".").items()
    if name not in free and not name.startswith(_FREE_PREFIXES)
  }


def _equal(old: Any, new: Any) -> bool:
  """Whether two values are one, or two spellings of one path."""
  both = isinstance(old, str) and isinstance(new, str)
  return old == new or (both and folder(old) == folder(new))


def load_config(workdir: str) -> ml_collections.ConfigDict:
  """The config of the run in `workdir`."""
  absent = (
    f"{workdir} holds no run (no config.json); give the --workdir of "
    "`clp train` or `clp demo`."
  )
  values = _read(folder(workdir) / "config.json", absent)
  return config_lib.from_json(_completed(values))


def _completed(values: dict) -> dict:
  """A training config with the fields that came after the version that wrote
  it: their defaults are what that version did."""
  if "objectives" not in values:  # a supervised run's, of a few sections
    return values
  completed = dict(values)
  for name, default in config_lib.to_json(config_lib.get_config()).items():
    if name not in completed:
      completed[name] = default
    elif isinstance(default, dict) and name != "rewards":
      completed[name] = default | completed[name]
  return completed


def save_model(
  workdir: str,
  model_config: families.Config,
  tokenizer: Tokenizer,
  reference: Any,
) -> None:
  """Writes what the policies of a run have in common: the model of them and of
  the reference, the parameters of an ordinary one."""
  path = folder(workdir)
  if jax.process_index() == 0:
    for name, content in tokenizer.files().items():
      storage.write_whole(path / name, content)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "reference", reference, force=True)
  # Last: its presence says that all three are complete.
  write_json(path / "model.json", families.to_json(model_config))
  multihost_utils.sync_global_devices("model saved")


def training_samples(
  workdir: str, config: ml_collections.ConfigDict, step: int
) -> int | None:
  """Responses that the run in `workdir` has sampled by `step`, or the runs that
  it is made of have; None where one of these does not say."""
  file = folder(workdir) / PARTS
  if file.exists():
    parts = [part.get("samples") for part in json.loads(file.read_text())]
    return None if None in parts else sum(parts)
  return step * config.rollout.prompts * config.rollout.samples


def is_run(path: str) -> bool:
  """Whether a folder is a run's, rather than what `clp export` or another
  program wrote."""
  read = storage.Folder(path)
  return read.has("model.json") and read.has("config.json")


def has_model(workdir: str) -> bool:
  """Whether `save_model` has completed in this folder."""
  return (folder(workdir) / "model.json").exists()


def load_model_config(workdir: str) -> families.Config:
  """The model of the run in `workdir`."""
  absent = (
    f"{workdir} holds no model yet (no model.json); let `clp train` run to its "
    "first checkpoint."
  )
  values = _read(folder(workdir) / "model.json", absent)
  config = families.from_json(values)
  if config.eos_ids:
    return config
  # Of a version that took the vocabulary's own.
  own = tokenizer_files.load_tokenizer(folder(workdir))
  assert own is not None
  return dataclasses.replace(config, eos_ids=own.eos_ids)


def load_reference(workdir: str, abstract: Any) -> Any:
  """The reference's parameters, placed as `abstract` says."""
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder(workdir) / "reference", abstract)


def load_tokenizer(
  workdir: str, options: Mapping[str, Any] | None = None
) -> Tokenizer:
  """The vocabulary of a run, with what ends its responses.

  Args:
    workdir: the run's folder.
    options: of its chat template; None takes the run's own.

  Raises:
    RunError: the folder holds no model yet.
    ValueError: its files are not valid.
  """
  config = load_model_config(workdir)
  file = folder(workdir) / "config.json"
  if options is None and file.exists():
    options = _read(file).get("data", {}).get("template_options")
  found = tokenizer_files.load_tokenizer(
    folder(workdir), config.eos_ids, config.pad_id, config.vocab_size, options
  )
  if found is None:
    raise RunError(
      f"{workdir} lacks vocabulary.model or tokenizer.json; restore it."
    )
  return found


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file, which is the old one or the new one, never half.

  Only process 0 writes.
  """
  if jax.process_index() == 0:
    storage.write_json(epath.Path(path), value)


def _read(path: epath.Path, absent: str | None = None) -> dict:
  """A JSON file; `absent` is the RunError's message where there is none."""
  if absent is not None and not path.exists():
    raise RunError(absent)
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise RunError(
      f"{path} is not valid JSON ({error}); restore it or choose another "
      "--workdir."
    ) from error

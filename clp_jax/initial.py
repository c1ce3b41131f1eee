"""The model a run starts from: a preset, a run's folder or a T5 checkpoint."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import ml_collections

from clp_jax import config as config_lib
from clp_jax import interop, run_folder, sharding
from clp_jax.config import ConfigError
from clp_jax.data import tasks
from clp_jax.data.vocabulary import load_vocabulary, loaded
from clp_jax.interop.storage import Folder
from clp_jax.models import t5
from clp_jax.models.presets import OWN_VOCABULARY, PRESETS
from clp_jax.train import checkpoints

Params = Any


class Initial(NamedTuple):
  """An ordinary T5 and its vocabulary."""

  model_config: t5.T5Config
  params: Params
  vocabulary: bytes  # the SentencePiece model file


def load_initial(config: ml_collections.ConfigDict) -> Initial:
  """What `config.model.init` names.

  Args:
    config: a training config.

  Returns:
    The model in the layout and dtype of computation that the config asks for.

  Raises:
    ConfigError: when it names nothing that can be loaded.
  """
  init = config.model.init
  if init in PRESETS:
    vocabulary = _vocabulary(config)
    model_config = dataclasses.replace(
      _computation(_preset(config, vocabulary), config),
      eos_ids=(vocabulary.eos_id,),
    )
    # Its own fold of the seed: the run's key must not depend on the model.
    key = jax.random.fold_in(jax.random.key(config.seed), 0x1217)
    # One program, which compiles faster than one for each kind of leaf, and
    # gives arrays of all processes, which is what Orbax can save.
    draw = jax.jit(
      t5.init_params,
      static_argnums=0,
      out_shardings=_shardings(config, model_config),
    )
    params = draw(model_config, key)
    content = vocabulary.sp_model
  elif _is_run(init):
    model_config = run_folder.load_model_config(init)
    params, _ = checkpoints.load_params(init, t5.abstract_params(model_config))
    if model_config.scan_layers and not config.model.scan_layers:
      params = t5.unstack_layers(params)
    elif config.model.scan_layers and not model_config.scan_layers:
      params = t5.stack_layers(params)
    model_config = _computation(model_config, config)
    content = run_folder.load_vocabulary_bytes(init)
    vocabulary = run_folder.load_vocabulary(init)
  elif Folder(init).is_folder():
    vocabulary = _vocabulary_beside(config)
    content = vocabulary.sp_model
    model_config, params = _load_checkpoint(config)
    model_config = dataclasses.replace(
      _computation(model_config, config), eos_ids=vocabulary.eos_ids
    )
  else:
    raise _nothing(init)
  if vocabulary.vocab_size > model_config.vocab_size:
    raise ConfigError(
      f"the vocabulary has {vocabulary.vocab_size} pieces, but the model "
      f"{init!r} embeds {model_config.vocab_size}; choose another "
      "model.vocabulary or model.init."
    )
  return Initial(model_config, params, content)


def load_model_config(config: ml_collections.ConfigDict) -> t5.T5Config:
  """The model of `load_initial`, its parameters neither made nor read.

  Args:
    config: a training config.

  Raises:
    ConfigError: when `config.model.init` names no model.
  """
  init = config.model.init
  if init in OWN_VOCABULARY:
    model_config = _preset(config, _vocabulary(config))
  elif init in PRESETS:
    model_config = PRESETS[init]
  elif _is_run(init):
    model_config = run_folder.load_model_config(init)
  elif Folder(init).is_folder():
    with config_lib.as_config_error():
      model_config = interop.load_config(init)
  else:
    raise _nothing(init)
  return _computation(model_config, config)


def load_vocabulary_of(config: ml_collections.ConfigDict) -> Any:
  """The vocabulary of the model that `config.model.init` names.

  Args:
    config: a training config.

  Raises:
    ConfigError: when there is none.
  """
  if config.model.init in PRESETS:
    return _vocabulary(config)
  if _is_run(config.model.init):
    return run_folder.load_vocabulary(config.model.init)
  return _vocabulary_beside(config)


def _nothing(init: str) -> ConfigError:
  return ConfigError(
    f"model.init = {init!r} is neither a preset ({', '.join(PRESETS)}) nor "
    "a folder that holds a T5."
  )


def _preset(config: ml_collections.ConfigDict, vocabulary: Any) -> t5.T5Config:
  model_config = PRESETS[config.model.init]
  if config.model.init in OWN_VOCABULARY:
    # As many rows as pieces and prompts' tokens, up to a multiple that cuts
    # well over devices.
    tokens = vocabulary.vocab_size + config_lib.control_tokens(config)
    rows = -(-tokens // 16) * 16
    model_config = dataclasses.replace(model_config, vocab_size=rows)
  return model_config


def _vocabulary(config: ml_collections.ConfigDict) -> Any:
  with config_lib.as_config_error():
    if config.model.vocabulary is not None:
      return load_vocabulary(config.model.vocabulary)
    if config.data.task is None:
      raise ConfigError(
        f"model.init = {config.model.init} starts from random parameters and "
        "has no vocabulary; set model.vocabulary, a SentencePiece .model file."
      )
    task = tasks.get_task(config.data.task)
    return loaded(task.output_features["inputs"].vocabulary)


def _is_run(init: str) -> bool:
  """A run's folder, rather than what `clp export` or another program wrote."""
  folder = Folder(init)
  return folder.has("model.json") and folder.has("config.json")


def _vocabulary_beside(config: ml_collections.ConfigDict) -> Any:
  path = config.model.vocabulary
  if path is None:
    path = interop.find_vocabulary(config.model.init)
  if path is None:
    raise ConfigError(
      f"model.init = {config.model.init} has no spiece.model; set "
      "model.vocabulary, the SentencePiece .model file that it was trained "
      "with."
    )
  with config_lib.as_config_error():
    eos_ids = interop.load_config(config.model.init).eos_ids
    return load_vocabulary(path, eos_ids=eos_ids)


def _load_checkpoint(
  config: ml_collections.ConfigDict,
) -> tuple[t5.T5Config, Params]:
  """A T5 of another program, in float32, cut over the mesh as it is read."""
  with config_lib.as_config_error():
    return interop.load_t5(
      config.model.init,
      functools.partial(_shardings, config),
      dtype="float32",
      scan_layers=config.model.scan_layers,
    )


def _shardings(
  config: ml_collections.ConfigDict, model_config: t5.T5Config
) -> Any:
  return sharding.param_shardings(
    config_lib.make_mesh(config),
    t5.logical_axes(model_config),
    t5.abstract_params(model_config),
    fsdp=config.mesh.fsdp,
  )


def _computation(
  model_config: t5.T5Config, config: ml_collections.ConfigDict
) -> t5.T5Config:
  return dataclasses.replace(
    model_config,
    dtype=config.model.dtype,
    scan_layers=config.model.scan_layers,
    remat=config.model.remat,
  )

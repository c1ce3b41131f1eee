"""The model a run starts from: a preset, a run's folder or a checkpoint, which
may be one of the Hugging Face Hub."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import ml_collections

from clp_jax import build, interop, keys, run_folder, saved_params, sharding
from clp_jax.data import newsroom_text, tasks, tokenizer_files
from clp_jax.data.tokenizer import Tokenizer
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.errors import ConfigError, as_config_error
from clp_jax.interop import hub
from clp_jax.interop.storage import Folder
from clp_jax.models import families, trees
from clp_jax.models.presets import OWN_VOCABULARY, PRESETS

Params = Any


class Initial(NamedTuple):
  """An ordinary model and its vocabulary."""

  model_config: families.Config
  params: Params
  vocabulary: Tokenizer


def load_initial(config: ml_collections.ConfigDict) -> Initial:
  """What `config.model.init` names.

  Returns:
    The model in the layout and dtype of computation that the config asks for.

  Raises:
    ConfigError: when it names nothing that can be loaded.
  """
  config = _found(config)
  init = config.model.init
  model_config, vocabulary = _opened(config)
  # Before a checkpoint is read, which may take minutes.
  _check_fits(config, model_config, vocabulary)
  stored = model_config
  model_config = _computation(model_config, config)
  with as_config_error():
    model_config = model_config.with_vocabulary(
      vocabulary.size, vocabulary.eos_ids, vocabulary.pad_id
    )
  if init in PRESETS:
    # Its own fold of the seed: the run's key must not depend on the model.
    key = jax.random.fold_in(jax.random.key(config.seed), keys.MODEL)
    # One program, which compiles faster than one for each kind of leaf, and
    # gives arrays of all processes, which is what Orbax can save.
    draw = jax.jit(
      families.build(model_config).init,
      out_shardings=_shardings(config, model_config),
    )
    params = draw(key)
  elif run_folder.is_run(init):
    params, _ = saved_params.load_params(
      init, families.build(stored).abstract()
    )
    if stored.scan_layers and not config.model.scan_layers:
      params = trees.unstack_layers(params)
    elif config.model.scan_layers and not stored.scan_layers:
      params = trees.stack_layers(params)
  else:
    params = _load_checkpoint(config)
  return Initial(model_config, params, vocabulary)


def _check_fits(
  config: ml_collections.ConfigDict,
  model_config: families.Config,
  vocabulary: Tokenizer,
) -> None:
  """Raises a ConfigError unless a model has room for a config's tokens."""
  init, longest = config.model.init, model_config.max_length
  if vocabulary.size > model_config.vocab_size:
    raise ConfigError(
      f"the vocabulary has {vocabulary.size} pieces, but the model "
      f"{init!r} embeds {model_config.vocab_size}; choose another "
      "model.vocabulary or model.init."
    )
  if longest is not None:
    given = config.data.source_length + config.data.target_length
    prompts = build.prompts(config, vocabulary, model_config.vocab_size)
    more = config.soft_tokens.length or 0
    more += 0 if prompts is None else prompts.length
    if given + more > longest:
      shown = f" and {more} tokens of the weighting" if more else ""
      raise ConfigError(
        f"data.source_length + data.target_length = {given}{shown}, but the "
        f"model {init!r} was made for {longest} tokens; lower one of them."
      )
  if model_config.reads_eos and not vocabulary.ends_prompts:
    raise ConfigError(
      f"the model {init!r} reads prompts that end in EOS, which those of a "
      "tokenizer.json do not; set model.vocabulary to its spiece.model."
    )
  if vocabulary.pad_id not in (-1, model_config.pad_id):  # -1: that is text
    raise ConfigError(
      f"the model {init!r} pads with token {model_config.pad_id}, and its "
      f"vocabulary with {vocabulary.pad_id}; choose another model.vocabulary."
    )


def load_model_config(config: ml_collections.ConfigDict) -> families.Config:
  """The model of `load_initial`, its parameters neither made nor read.

  Raises:
    ConfigError: when `config.model.init` names no model.
  """
  config = _found(config)
  init = config.model.init
  if init in OWN_VOCABULARY:
    model_config = _preset(config, _vocabulary(config))
  elif init in PRESETS:
    model_config = PRESETS[init]
  elif run_folder.is_run(init):
    model_config = run_folder.load_model_config(init)
  elif Folder(init).is_folder():
    with as_config_error():
      model_config = interop.load_config(init)
  else:
    raise _nothing(init)
  return _computation(model_config, config)


def load_vocabulary_of(config: ml_collections.ConfigDict) -> Tokenizer:
  """The vocabulary of the model that `config.model.init` names.

  Raises:
    ConfigError: when there is none.
  """
  return _opened(_found(config))[1]


def _opened(
  config: ml_collections.ConfigDict,
) -> tuple[families.Config, Tokenizer]:
  """The model and its vocabulary, of a config from `_found`."""
  init = config.model.init
  if init in PRESETS:
    vocabulary = _vocabulary(config)
    model_config = _preset(config, vocabulary)
  elif run_folder.is_run(init):
    with as_config_error():
      vocabulary = run_folder.load_tokenizer(init, _options(config))
    model_config = run_folder.load_model_config(init)
  elif Folder(init).is_folder():
    model_config, vocabulary = _checkpoint(config)
  else:
    raise _nothing(init)
  if _options(config) and vocabulary.chat_template is None:
    raise ConfigError(
      f"data.template_options: the model's vocabulary, {vocabulary.path}, has "
      "no chat template to give them to; leave them out."
    )
  return model_config, vocabulary


def _options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What the chat template of a config is given beside its own."""
  return config.data.template_options.to_dict()


def _found(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config, with the folder of a model that the Hub's cache has."""
  init = config.model.init
  if init in PRESETS or not hub.is_name(init):
    return config
  config = config.copy_and_resolve_references()
  with as_config_error():
    config.model.init = hub.folder(init)
  return config


def _nothing(init: str) -> ConfigError:
  return ConfigError(
    f"model.init = {init!r} is neither a preset ({', '.join(PRESETS)}) nor "
    "a folder that holds a model, nor the name of one on the Hugging Face Hub "
    "(org/name)."
  )


def _preset(
  config: ml_collections.ConfigDict, vocabulary: Tokenizer
) -> families.Config:
  model_config = PRESETS[config.model.init]
  if config.model.init in OWN_VOCABULARY:
    # As many rows as pieces and prompts' tokens, up to a multiple that cuts
    # well over devices.
    tokens = vocabulary.size + build.control_tokens(config)
    rows = -(-tokens // 16) * 16
    model_config = dataclasses.replace(model_config, vocab_size=rows)
  with as_config_error():
    return model_config.with_vocabulary(
      vocabulary.size, vocabulary.eos_ids, vocabulary.pad_id
    )


def _vocabulary(config: ml_collections.ConfigDict) -> Tokenizer:
  with as_config_error():
    if config.model.vocabulary is not None:
      # Of a tokenizer.json, every id may be text.
      found = tokenizer_files.find(
        config.model.vocabulary, pad_id=-1, options=_options(config)
      )
      if found is None:
        raise ConfigError(
          f"model.vocabulary = {config.model.vocabulary!r} holds no "
          "tokenizer.json and no SentencePiece model."
        )
      return found
    if config.data.task is None:
      raise ConfigError(
        f"model.init = {config.model.init} starts from random parameters and "
        "has no vocabulary; set model.vocabulary, a SentencePiece .model file."
      )
    if config.data.task == "newsroom":
      return Vocabulary("newsroom", newsroom_text.vocabulary_bytes())
    data = config.data
    task = tasks.get_task(data.task, data_dir=data.tfds_data_dir)
    return tasks.vocabulary_of(task)


def _checkpoint(
  config: ml_collections.ConfigDict,
) -> tuple[families.Config, Tokenizer]:
  """`_opened`, of another program's model."""
  init = config.model.init
  with as_config_error():
    own = interop.load_config(init)
    path = config.model.vocabulary or interop.find_vocabulary(init)
    found = None
    if path is not None:
      found = tokenizer_files.find(
        path, own.eos_ids, own.pad_id, own.vocab_size, _options(config)
      )
  if found is None:
    raise ConfigError(
      f"model.init = {init} has no tokenizer.json or spiece.model; set "
      "model.vocabulary, the folder or the SentencePiece .model file that it "
      "was trained with."
    )
  return own, found


def _load_checkpoint(config: ml_collections.ConfigDict) -> Params:
  """Of another program's model, in float32, cut over the mesh as it is read."""
  with as_config_error():
    _, params = interop.load_model(
      config.model.init,
      functools.partial(_shardings, config),
      dtype="float32",
      scan_layers=config.model.scan_layers,
    )
  return params


def _shardings(
  config: ml_collections.ConfigDict, model_config: families.Config
) -> Any:
  model = families.build(model_config)
  return sharding.param_shardings(
    build.make_mesh(config),
    model.axes(),
    model.abstract(),
    fsdp=config.mesh.fsdp,
  )


def _computation(
  model_config: families.Config, config: ml_collections.ConfigDict
) -> families.Config:
  return dataclasses.replace(
    model_config,
    dtype=config.model.dtype,
    scan_layers=config.model.scan_layers,
    remat=config.model.remat,
  )

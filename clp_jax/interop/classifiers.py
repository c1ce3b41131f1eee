"""Hugging Face folders of models that label a text.

What transformers' AutoModelForSequenceClassification reads: a decoder of
causal.py with `score.weight` in place of its logit layer, or an encoder of
encoders.py. A decoder can be written, too.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clp_jax.data.tokenizer import Tokenizer
from clp_jax.errors import check_choice
from clp_jax.interop import causal, encoders, leaves, weight_files
from clp_jax.interop.leaves import Leaf
from clp_jax.interop.storage import Folder
from clp_jax.models import classifiers as models
from clp_jax.models.causal import NO_PAD, CausalConfig

_HEAD = "score.weight"
_ARCHITECTURE = "ForSequenceClassification"
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, "regression")
# The field of config.json that holds a `Reading`; transformers keeps it.
_READING = "clp_jax"
_PREFIXES = {"gemma3_text": "Gemma3Text"}  # of classes, where not capitalised


class Labels(NamedTuple):
  """What the numbers of a head mean."""

  names: tuple[str, ...]
  problem: str  # one of PROBLEMS


class Reading(NamedTuple):
  """The rows that a head was trained on, in parts that are tokenised apart."""

  template: str  # as `rewards.model.Inputs` takes it
  source_length: int  # tokens of a row


class Opened(NamedTuple):
  """A folder whose arrays are not read yet."""

  model: models.Classifier
  tensors: Mapping[str, Leaf]
  labels: Labels
  # Of decoders, where they have them: tokens that end responses, and padding,
  # which transformers also takes text for that a row ends in.
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None
  reading: Reading | None = None  # of what `save_decoder` wrote


def open_folder(
  path: str | os.PathLike, *, dtype: str = "float32", scan_layers: bool = False
) -> Opened:
  """What a folder holds, for a computation in `dtype`, layers stacked where
  scan_layers says so; nothing but headers is read.

  Raises:
    ValueError: there is no such model; one line that names the file, the field
      or the tensors.
  """
  folder = Folder(os.fspath(path))
  if not folder.has("config.json"):
    raise ValueError(f"{folder.path} holds no model: there is no config.json.")
  where = f"{folder.path}/config.json"
  values = weight_files.read_json(folder, "config.json")
  kind = values.get("model_type")
  is_decoder = causal.is_causal(values)
  if not is_decoder:
    known = (*causal.families(), *encoders.MODEL_TYPES)
    check_choice(f"{where}: model_type", kind, known)
  named = values.get("architectures") or []
  if not any(str(name).endswith(_ARCHITECTURE) for name in named):
    raise ValueError(
      f"{where}: architectures must name a ...{_ARCHITECTURE}, which has a "
      f"number for a whole text, got {named}."
    )
  change = {"dtype": dtype, "scan_layers": scan_layers}
  opener = _open_decoder if is_decoder else _open_encoder
  model, tensors, count = opener(folder, values)
  config: Any = dataclasses.replace(model.config, **change)
  opened = Opened(
    dataclasses.replace(model, config=config),
    tensors,
    _labels(where, values, count),
  )
  if not is_decoder:
    return opened
  return opened._replace(
    eos_ids=config.eos_ids,
    pad_id=_pad_id(values),
    reading=_reading(where, values),
  )


def load(
  opened: Opened, shardings: Callable[[models.Classifier], leaves.Shardings]
) -> leaves.Params:
  """The float32 parameters of what `open_folder` has found, each device's part
  of them on it; `shardings` says where those of a classifier lie, a tree like
  them."""
  paths = leaves.flatten(opened.model.abstract())
  at = shardings(opened.model)
  return leaves.read_tree(paths, opened.tensors, at, np.float32)


def check_has_class(config: Any) -> None:
  """Raises a ValueError unless transformers has such a model with a head."""
  if not isinstance(config, CausalConfig):
    raise ValueError(
      "transformers has no T5 whose score is read at its first output; a head "
      "on a decoder can be written."
    )


def save_decoder(
  path: str | os.PathLike,
  config: CausalConfig,
  params: leaves.Params,
  tokenizer: Tokenizer,
  reading: Reading,
  max_shard_bytes: int = weight_files.MAX_SHARD_BYTES,
) -> None:
  """Writes a decoder with a head as `open_folder` and transformers read it.

  Both find the number at a row's last token that is no padding. Rows end in the
  first of `config.eos_ids`, so that padding is made another token.

  Args:
    path: the folder; older weights in it are replaced.
    config: of the decoder.
    params: as of `DecoderClassifier`; a logit layer is left out.
    tokenizer: whose files are written beside.
    reading: the rows that the head was trained on.
    max_shard_bytes: more than this goes to several files.

  Raises:
    ValueError: no class of transformers has such a model, or nothing can pad.
  """
  check_has_class(config)
  head = params["head"]["kernel"]
  views = leaves.views(config, params["model"])
  values = causal.config_values(config, views, tokenizer)
  prefix = _PREFIXES.get(config.architecture, config.architecture.capitalize())
  names = [f"LABEL_{i}" for i in range(head.shape[1])]
  pad_id, files = tokenizer.padding(config.eos_ids[0])
  values |= {
    "architectures": [prefix + _ARCHITECTURE],
    "num_labels": len(names),
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
    "pad_token_id": pad_id,
    _READING: reading._asdict(),
  }
  tensors = {f"model/{p}": v for p, v in views.items() if p != causal.HEAD}
  weight_files.save(
    epath.Path(path),
    values,
    {**tensors, "head/kernel": Leaf.of(head)},
    functools.partial(_decoder_tensor, config),
    max_shard_bytes,
    files,
  )


def _open_decoder(folder: Folder, values: Mapping[str, Any]):
  del values
  # The head is in place of a logit layer. Every id may be text, as to
  # transformers, whose mask says where padding is.
  config = dataclasses.replace(
    causal.read_config(folder), logits_via_embedding=True, pad_id=NO_PAD
  )
  stored = causal.read_tensors(folder, mapped=True)
  count = _rows(stored, _HEAD)
  model = models.DecoderClassifier(config, count)
  tensor = functools.partial(_decoder_tensor, config)
  return model, _leaves(folder, stored, model, tensor), count


def _decoder_tensor(config: Any, path: str) -> tuple[str, bool]:
  if path.startswith("head/"):
    return _HEAD, True
  return causal.tensor_of(config, path.removeprefix("model/"))


def _open_encoder(folder: Folder, values: Mapping[str, Any]):
  kind = values["model_type"]
  stored = weight_files.read(folder, mapped=True, unused=encoders.UNUSED)
  tensor = functools.partial(encoders.tensor_of, kind)
  count = _rows(stored, tensor("head/kernel")[0])
  where = f"{folder.path}/config.json"
  model = models.EncoderClassifier(encoders.read_config(where, values, count))
  return model, _leaves(folder, stored, model, tensor), count


def _rows(stored: Mapping[str, Leaf], name: str) -> int:
  """Labels of the head; 1 where there is none, which is found out later."""
  return stored[name].shape[0] if name in stored else 1


def _leaves(
  folder: Folder,
  stored: Mapping[str, Leaf],
  model: models.Classifier,
  tensor: weight_files.Tensor,
) -> dict[str, Leaf]:
  expected = leaves.shapes(leaves.flatten(model.abstract()))
  return weight_files.model_leaves(folder, stored, expected, tensor)


def _labels(where: str, values: Mapping[str, Any], count: int) -> Labels:
  given = values.get("id2label") or {}
  names = tuple(str(given.get(str(i), f"LABEL_{i}")) for i in range(count))
  problem = values.get("problem_type") or SINGLE_LABEL
  check_choice(f"{where}: problem_type", problem, PROBLEMS)
  return Labels(names, problem)


def _reading(where: str, values: Mapping[str, Any]) -> Reading | None:
  found = values.get(_READING)
  if found is None:
    return None
  try:
    reading = Reading(**found)
    if type(reading.template) is str and type(reading.source_length) is int:
      return reading
  except TypeError:
    pass
  raise ValueError(
    f"{where}: {_READING} must hold a template and a source_length, got "
    f"{found!r}."
  )


def _pad_id(values: Mapping[str, Any]) -> int | None:
  """As the class of transformers has it."""
  values = values.get("text_config") or values
  default = 0 if str(values.get("model_type")).startswith("gemma") else None
  return values.get("pad_token_id", default)

"""Checkpoints of other programs: Hugging Face's, t5x's and Orbax's.

  model, params = load_model("path/to/Qwen3-0.6B")
  save_model("elsewhere", model, params, "hf")

`load_model` tells formats and families apart by what is in the folder. The
stored dtype is kept. `load_t5` and `save_t5` are the same for a T5, by its
config; the parameter tree is t5x's.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.data.tokenizer import TOKENIZER
from clp_jax.errors import check_choice
from clp_jax.interop import (
  causal,
  huggingface,
  leaves,
  orbax,
  storage,
  t5x,
  weight_files,
)
from clp_jax.interop.storage import Folder
from clp_jax.models import families
from clp_jax.models.families import Config
from clp_jax.models.model import Model
from clp_jax.models.t5 import T5Config

FORMATS = ("hf", "t5x", "t5x-orbax", "orbax")


def load_model(
  path: str | os.PathLike,
  shardings: leaves.Shardings | None = None,
  *,
  dtype: Any = None,
  scan_layers: bool = False,
) -> tuple[Model, leaves.Params]:
  """Reads a model of any family; no tokenizer is needed.

  Nothing is held twice: the leaves are read one after the other, and with
  `shardings` only the parts that this process's devices hold, so that no host
  needs memory for the whole model.

  Args:
    path: a Hugging Face folder of a T5 or a decoder-only model; t5x's
      checkpoint_<step>, in either layout, or its parent for the newest step; or
      what `save_model` wrote. On disk, or gs:// (but for pytorch_model.bin).
    shardings: a tree of jax.sharding.Sharding like that of the parameters, or
      a function of the config to such a tree; None reads to the host.
    dtype: to convert to; None keeps what is stored.
    scan_layers: stack the layers, as the config's `scan_layers` wants them.

  Returns:
    (model, params): params a tree of NumPy arrays, or of jax.Arrays that lie
    as `shardings` says. `model.config.dtype` is float32: it is that of the
    computation.

  Raises:
    ValueError: when there is no model or it can't be read; one line that names
      the file, the field or the tensors.
  """
  config, stored = _open(path, mapped=shardings is not None)
  config, params = leaves.assemble(
    config, stored, shardings=shardings, dtype=dtype, scan_layers=scan_layers
  )
  return families.build(config), params


def load_t5(
  path: str | os.PathLike,
  shardings: leaves.Shardings | None = None,
  *,
  dtype: Any = None,
  scan_layers: bool = False,
) -> tuple[T5Config, leaves.Params]:
  """`load_model` for a T5: (config, params).

  A t5x checkpoint does not hold its config, which is inferred from the shapes.
  Arguments as for `load_model`.

  Raises:
    ValueError: as for `load_model`, and when it is no T5.
  """
  config, stored = _open(path, mapped=shardings is not None)
  if not isinstance(config, T5Config):
    raise ValueError(
      f"{os.fspath(path)} is not a T5; interop.load_model reads it."
    )
  return leaves.assemble(  # type: ignore[return-value]
    config, stored, shardings=shardings, dtype=dtype, scan_layers=scan_layers
  )


def load_config(path: str | os.PathLike) -> Config:
  """The config of a model that `load_model` would load, its arrays unread.

  Raises:
    ValueError: as for `load_model`.
  """
  return _open(path, mapped=True)[0]


def _open(
  path: str | os.PathLike, *, mapped: bool
) -> tuple[Config, dict[str, leaves.Leaf]]:
  """Finds out which format a folder has."""
  folder = Folder(os.fspath(path))
  if not folder.is_folder():
    raise ValueError(f"{folder.path} is no folder.")
  checkpoint = t5x.find(folder)
  if checkpoint is not None:
    return t5x.open_checkpoint(checkpoint)
  if orbax.is_checkpoint(folder):
    return orbax.open_checkpoint(folder)
  if folder.has("config.json"):
    if folder.has("model.json"):
      raise ValueError(
        f"{folder.path} is a run of clp: load it with clp_jax.Policy.load, or "
        "write one of its policies with `clp export`."
      )
    values = weight_files.read_json(folder, "config.json")
    if causal.is_causal(values):
      return causal.open_folder(folder, mapped)
    check_choice(
      f"{folder.path}/config.json: model_type",
      values.get("model_type"),
      (*huggingface.FAMILIES, *causal.families()),
    )
    return huggingface.open_folder(folder, mapped=mapped)
  raise ValueError(
    f"{folder.path} holds no model: expected config.json (Hugging Face), "
    "checkpoint or checkpoint_<step> (t5x), or model.json and params (Orbax)."
  )


def find_vocabulary(path: str | os.PathLike) -> str | None:
  """The SentencePiece model or tokenizer.json that lies with a checkpoint, or
  None.

  Returns:
    The path of the file.
  """
  folder = Folder(os.fspath(path))
  folders = [folder]
  if folder.name.startswith("checkpoint_"):
    folders.append(folder.parent)
  for candidate in folders:
    for name in (huggingface.VOCABULARY, orbax.VOCABULARY, TOKENIZER):
      if candidate.has(name):
        return f"{candidate.path.rstrip('/')}/{name}"
  return None


def save_model(
  path: str | os.PathLike,
  model: Model,
  params: leaves.Params,
  format: str,
  *,
  tokenizer: Any = None,
  step: int = 0,
  max_shard_bytes: int = weight_files.MAX_SHARD_BYTES,
) -> None:
  """Writes a model, so that `load_model` and the format's own program read it.

  The arrays are brought to the host one after the other (Orbax: together) and
  written in their dtype. Stacked layers are written one by one.

  Args:
    path: "hf", "orbax": the folder, made where it is absent; a model in it is
      replaced. "t5x": the folder for checkpoint_<step>, or that itself.
    model: whose parameters they are.
    params: a tree of NumPy arrays or jax.Arrays that this process can address.
    format: "hf", a Hugging Face folder; "orbax", params as
      ocp.StandardCheckpointer saves them, and model.json; of a T5 also "t5x",
      t5x's msgpack and zarr layout, which the public checkpoints have, and
      "t5x-orbax", t5x's other one.
    tokenizer: a `data.tokenizer.Tokenizer`, whose files are written beside the
      weights; None for none.
    step: that a t5x checkpoint is named for.
    max_shard_bytes: "hf": more than this goes to several files.

  Raises:
    ValueError: for an unknown format, params that are not the model's, a model
      that the format can't tell, or a tokenizer larger than the embedding.
  """
  config = model.config
  if isinstance(config, T5Config):
    files = {} if tokenizer is None else tokenizer.files()
    save_t5(
      path,
      config,
      params,
      format,
      vocabulary=files.pop(orbax.VOCABULARY, None),
      step=step,
      max_shard_bytes=max_shard_bytes,
    )
    # Of tokenizer.json no T5 format says anything: it is written as it is.
    _write_files(path, files)
    return
  if format not in ("hf", "orbax"):
    raise ValueError(
      f"format must be hf or orbax for a decoder-only model, got {format!r}."
    )
  views = leaves.views(config, params)
  if tokenizer is not None and tokenizer.size > config.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.size} ids, but the model embeds "
      f"{config.vocab_size}; give the one that it was trained with."
    )
  target = epath.Path(path)
  if format == "hf":
    causal.save(target, config, views, tokenizer, max_shard_bytes)
    return
  orbax.save(target, config, views, None)
  if tokenizer is not None:
    _write_files(path, tokenizer.files())


def _write_files(path: str | os.PathLike, files: Mapping[str, bytes]) -> None:
  for name, content in files.items():
    storage.write(Folder(os.fspath(path)), name, content)


def save_t5(
  path: str | os.PathLike,
  config: T5Config,
  params: leaves.Params,
  format: str,
  *,
  vocabulary: bytes | None = None,
  step: int = 0,
  max_shard_bytes: int = weight_files.MAX_SHARD_BYTES,
) -> None:
  """`save_model` for a T5, by its config; arguments as there, but for these.

  Args:
    config: of the model.
    format: one of FORMATS.
    vocabulary: content of the SentencePiece model; written beside the weights.

  Raises:
    ValueError: as `save_model`, and for a vocabulary with another EOS than the
      config's.
  """
  check_choice("format", format, FORMATS)
  views = leaves.views(config, params)
  described = None
  if vocabulary is not None:
    described = huggingface.read_vocabulary(vocabulary)
    if described.size > config.vocab_size:
      raise ValueError(
        f"the vocabulary has {described.size} pieces, but the model embeds "
        f"{config.vocab_size}; give the one that it was trained with."
      )
    eos_ids = config.eos_ids or (described.eos_id,)
    if described.eos_id not in eos_ids:
      raise ValueError(
        f"the vocabulary ends a text with token {described.eos_id}, but the "
        f"model's eos_ids are {eos_ids}; give the one that it was trained with."
      )
    config = dataclasses.replace(config, eos_ids=eos_ids)
  if format == "hf":
    huggingface.save(
      epath.Path(path), config, views, described, max_shard_bytes
    )
  elif format == "orbax":
    orbax.save(epath.Path(path), config, views, vocabulary)
  else:
    folder = Folder(os.fspath(path))
    t5x.save(folder, config, views, step, use_orbax=format == "t5x-orbax")
    if vocabulary is not None:
      beside = folder.parent if t5x.is_step(folder.name) else folder
      storage.write(beside, huggingface.VOCABULARY, vocabulary)

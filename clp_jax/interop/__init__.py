"""T5 checkpoints of other programs: Hugging Face's, t5x's and Orbax's.

  config, params = load_t5("path/to/flan-t5-base")
  save_t5("elsewhere", config, params, "t5x")

`load_t5` tells the formats apart by what is in the folder. The parameter tree
is t5x's, which is also the network's; the stored dtype is kept.
"""

import dataclasses
import os
from typing import Any

from etils import epath

from clp_jax.interop import huggingface, leaves, orbax, storage, t5x
from clp_jax.interop.storage import Folder
from clp_jax.models.t5 import T5Config

FORMATS = ("hf", "t5x", "t5x-orbax", "orbax")


def load_t5(
  path: str | os.PathLike,
  shardings: leaves.Shardings | None = None,
  *,
  dtype: Any = None,
  scan_layers: bool = False,
) -> tuple[T5Config, leaves.Params]:
  """Reads a T5, from a Hugging Face folder or a t5x checkpoint.

  Nothing is held twice: the leaves are read one after the other, and with
  `shardings` only the parts that this process's devices hold, so that no host
  needs memory for the whole model.

  Args:
    path: a Hugging Face folder; t5x's checkpoint_<step>, in either layout, or
      its parent for the newest step; or what `save_t5` wrote. On disk, or
      gs:// (but for pytorch_model.bin).
    shardings: a tree of jax.sharding.Sharding like that of the parameters, or
      a function T5Config -> such a tree; None reads to the host.
    dtype: to convert to; None keeps what is stored.
    scan_layers: stack the layers, as `T5Config.scan_layers` wants them.

  Returns:
    (config, params): params a tree of NumPy arrays, or of jax.Arrays that lie
    as `shardings` says. A t5x checkpoint does not hold its config, which is
    inferred from the shapes. `config.dtype` is float32: it is that of the
    computation.

  Raises:
    ValueError: when there is no T5 or it can't be read; one line that names
      the file or the tensors.
  """
  folder = Folder(os.fspath(path))
  if not folder.is_folder():
    raise ValueError(f"{folder.path} is no folder.")
  config, stored = _open(folder, mapped=shardings is not None)
  return leaves.assemble(
    config, stored, shardings=shardings, dtype=dtype, scan_layers=scan_layers
  )


def load_config(path: str | os.PathLike) -> T5Config:
  """The config of a T5 that `load_t5` would load, its arrays left unread.

  Args:
    path: as for `load_t5`.

  Raises:
    ValueError: as for `load_t5`.
  """
  return _open(Folder(os.fspath(path)), mapped=True)[0]


def _open(
  folder: Folder, *, mapped: bool
) -> tuple[T5Config, dict[str, leaves.Leaf]]:
  """Finds out which format a folder has."""
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
    return huggingface.open_folder(folder, mapped=mapped)
  raise ValueError(
    f"{folder.path} holds no T5: expected config.json (Hugging Face), "
    "checkpoint or checkpoint_<step> (t5x), or model.json and params (Orbax)."
  )


def find_vocabulary(path: str | os.PathLike) -> str | None:
  """The SentencePiece model that lies with a checkpoint, or None.

  Args:
    path: as for `load_t5`.

  Returns:
    The path of the file.
  """
  folder = Folder(os.fspath(path))
  folders = [folder]
  if folder.name.startswith("checkpoint_"):
    folders.append(folder.parent)
  for candidate in folders:
    for name in (huggingface.VOCABULARY, orbax.VOCABULARY):
      if candidate.has(name):
        return f"{candidate.path.rstrip('/')}/{name}"
  return None


def save_t5(
  path: str | os.PathLike,
  config: T5Config,
  params: leaves.Params,
  format: str,
  *,
  vocabulary: bytes | None = None,
  step: int = 0,
  max_shard_bytes: int = huggingface.MAX_SHARD_BYTES,
) -> None:
  """Writes a T5, so that `load_t5` and the format's own program read it.

  The arrays are brought to the host one after the other (Orbax: together) and
  written in their dtype. Stacked layers are written one by one.

  Args:
    path: "hf", "orbax": the folder, made where it is absent; a model in it is
      replaced. "t5x": the folder for checkpoint_<step>, or that itself.
    config: of the model.
    params: a tree of NumPy arrays or jax.Arrays that this process can address.
    format: "hf", a Hugging Face folder; "t5x", t5x's msgpack and zarr layout,
      which the public checkpoints have; "t5x-orbax", t5x's other one; "orbax",
      params as ocp.StandardCheckpointer saves them, and model.json.
    vocabulary: content of the SentencePiece model; written beside the weights.
    step: that a t5x checkpoint is named for.
    max_shard_bytes: "hf": more than this goes to several files.

  Raises:
    ValueError: for an unknown format, params that are not the config's, a
      model that the format can't tell, or a vocabulary larger than the
      embedding or with another EOS than the config's.
  """
  if format not in FORMATS:
    raise ValueError(
      f"format must be one of {', '.join(FORMATS)}, got {format!r}."
    )
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

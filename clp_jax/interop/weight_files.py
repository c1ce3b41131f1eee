"""Where a Hugging Face folder keeps its tensors.

In model.safetensors, or in several such files with an index that says which
tensor is where; or in pytorch_model.bin, likewise, for which PyTorch must be
installed. Only weights are taken from the latter: nothing in it is executed.
"""

import functools
import importlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from clp_jax.interop import safetensors_file
from clp_jax.interop.leaves import Index, Leaf
from clp_jax.interop.storage import Folder


def read(folder: Folder, mapped: bool) -> dict[str, Leaf]:
  """The tensors in a folder's files of weights, none of them read yet.

  Args:
    folder: with model.safetensors or pytorch_model.bin, whole or in parts.
    mapped: map PyTorch's files into memory rather than read them whole.

  Returns:
    {name: leaf}.

  Raises:
    ValueError: when there are none, or one can't be read.
  """
  for name, read_file in (
    ("model.safetensors", safetensors_file.read),
    ("pytorch_model.bin", functools.partial(_read_torch, mapped=mapped)),
  ):
    if folder.has(name):
      return dict(read_file(folder, name))
    index = f"{name}.index.json"
    if folder.has(index):
      return _indexed(folder, index, read_file)
  raise ValueError(
    f"{folder.path} holds no weights: expected model.safetensors or "
    "pytorch_model.bin, whole or in parts with an index."
  )


def _indexed(folder: Folder, index: str, read_file: Any) -> dict[str, Leaf]:
  where = f"{folder.path}/{index}"
  files = read_json(folder, index).get("weight_map")
  if not isinstance(files, dict):
    raise ValueError(f"{where} lacks weight_map.")
  tensors: dict[str, Leaf] = {}
  for name in sorted(set(files.values())):
    if not folder.has(name):
      raise ValueError(f"{folder.path} lacks {name}, which {index} names.")
    tensors |= read_file(folder, name)
  if absent := sorted(files.keys() - tensors.keys()):
    raise ValueError(
      f"{where} names {', '.join(absent[:4])}, which no file holds."
    )
  return tensors


def _read_torch(folder: Folder, name: str, mapped: bool) -> dict[str, Leaf]:
  where = f"{folder.path}/{name}"
  try:
    # By name, since it is no dependency: safetensors need it not.
    torch = importlib.import_module("torch")
  except ImportError as error:
    raise ValueError(
      f"reading {where} needs PyTorch: pip install torch, or save the model as "
      "safetensors where it is installed."
    ) from error
  if not folder.on_disk:
    raise ValueError(f"{where} must be copied to disk, or be safetensors.")
  try:
    tensors = torch.load(
      where, map_location="cpu", weights_only=True, mmap=mapped
    )
  except Exception as error:  # torch raises many types, for an old file too
    text = " ".join(str(error).split())[:200]
    raise ValueError(f"{where} can't be read: {text}") from error
  return {
    tensor: _torch_leaf(torch, where, tensor, value)
    for tensor, value in tensors.items()
  }


def _torch_leaf(torch: Any, where: str, name: str, tensor: Any) -> Leaf:
  if tensor.dtype == torch.bfloat16:
    # NumPy has it from ml_dtypes, which torch doesn't know.
    array = tensor.view(torch.int16).numpy().view(np.dtype(jnp.bfloat16))
  elif tensor.dtype in (torch.float32, torch.float16):
    array = tensor.numpy()
  else:
    raise ValueError(
      f"{where}: {name} is of dtype {tensor.dtype}, expected float32, bfloat16 "
      "or float16."
    )

  def read(index: Index) -> np.ndarray:
    return array[index]

  return Leaf(array.shape, array.dtype, read)


def read_json(folder: Folder, name: str) -> dict[str, Any]:
  """A JSON object.

  Raises:
    ValueError: when the file can't be read or holds something else.
  """
  try:
    values = json.loads(folder.read(name))
  except ValueError as error:
    raise ValueError(f"{folder.path}/{name} can't be read: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{folder.path}/{name} must be a JSON object.")
  return values

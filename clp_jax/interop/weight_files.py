"""Where a Hugging Face folder keeps its tensors.

In model.safetensors, or in several such files with an index that says which
tensor is where; or in pytorch_model.bin, likewise, for which PyTorch must be
installed. Only weights are taken from the latter: nothing in it is executed.
"""

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from clp_jax.interop import leaves, safetensors_file, storage
from clp_jax.interop.leaves import Leaf
from clp_jax.interop.storage import Folder

GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
# Our path of a parameter -> its name in transformers, and whether that has the
# matrix transposed.
Tensor = Callable[[str], tuple[str, bool]]
_OF_GENERATION = tuple(
  f"{name}_token_id" for name in ("decoder_start", "eos", "pad", "bos")
)
# Names of what `save` writes.
_WRITTEN = (
  "model.safetensors",
  "model.safetensors.index.json",
  "model-*-of-*.safetensors",
)


def read(
  folder: Folder, mapped: bool, unused: tuple[str, ...] = ()
) -> dict[str, Leaf]:
  """The tensors in a folder's files of weights, none of them read yet.

  Args:
    folder: with model.safetensors or pytorch_model.bin, whole or in parts.
    mapped: map PyTorch's files into memory rather than read them whole.
    unused: ends of names that are left out, and may be of any dtype.

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
      return dict(read_file(folder, name, unused))
    index = f"{name}.index.json"
    if folder.has(index):
      return _indexed(folder, index, read_file, unused)
  raise ValueError(
    f"{folder.path} holds no weights: expected model.safetensors or "
    "pytorch_model.bin, whole or in parts with an index."
  )


def model_leaves(
  folder: Folder,
  stored: Mapping[str, Leaf],
  expected: Mapping[str, tuple[int, ...]],
  tensor: Tensor,
) -> dict[str, Leaf]:
  """The parameters of a model, by path, out of the tensors that `read` found in
  a folder, which errors name; `expected` has the shape at each path of the
  tree.

  Raises:
    ValueError: not all are there, or others, or of other shapes.
  """
  tensors = {path: tensor(path) for path in expected}
  shapes = {
    name: expected[path][::-1] if turned else expected[path]
    for path, (name, turned) in tensors.items()
  }
  leaves.check(folder.path, shapes, stored)
  return {
    path: _turned(stored[name], turned)
    for path, (name, turned) in tensors.items()
  }


def _turned(leaf: Leaf, turned: bool) -> Leaf:
  return leaf.transposed() if turned else leaf


def _indexed(
  folder: Folder, index: str, read_file: Any, unused: tuple[str, ...]
) -> dict[str, Leaf]:
  where = f"{folder.path}/{index}"
  files = read_json(folder, index).get("weight_map")
  if not isinstance(files, dict):
    raise ValueError(f"{where} lacks weight_map.")
  tensors: dict[str, Leaf] = {}
  for name in sorted(set(files.values())):
    if not folder.has(name):
      raise ValueError(f"{folder.path} lacks {name}, which {index} names.")
    tensors |= read_file(folder, name, unused)
  named = {name for name in files if not name.endswith(unused)}
  if absent := sorted(named - tensors.keys()):
    raise ValueError(
      f"{where} names {', '.join(absent[:4])}, which no file holds."
    )
  return tensors


def _read_torch(
  folder: Folder, name: str, unused: tuple[str, ...], mapped: bool
) -> dict[str, Leaf]:
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
    if not tensor.endswith(unused)
  }


def _torch_leaf(torch: Any, where: str, name: str, tensor: Any) -> Leaf:
  if tensor.dtype == torch.bfloat16:
    # NumPy has it from ml_dtypes, which torch doesn't know.
    array = tensor.view(torch.int16).numpy().view(np.dtype(jnp.bfloat16))
  elif tensor.dtype in (torch.float64, torch.float32, torch.float16):
    array = tensor.numpy()
  else:
    raise ValueError(
      f"{where}: {name} is of dtype {tensor.dtype}, expected float64, float32, "
      "bfloat16 or float16."
    )
  return Leaf.of(array)


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


def check_only(
  where: str,
  values: Mapping[str, Any],
  only: Mapping[str, tuple[Any, ...]],
) -> None:
  """Raises a ValueError for a field of a file that has none of these values;
  the last one is what it is told to be."""
  for name, allowed in only.items():
    if values.get(name) not in allowed:
      raise ValueError(
        f"{where}: {name} = {values[name]!r} is not supported; it must be "
        f"{allowed[-1]!r}."
      )


def eos_ids(folder: Folder, values: Mapping[str, Any]) -> tuple[Any, ...]:
  """eos_token_id, one or a list: what generation reads, else the config's."""
  given = values.get("eos_token_id")
  if folder.has(GENERATION):
    generation = read_json(folder, GENERATION)
    if generation.get("eos_token_id") is not None:
      given = generation["eos_token_id"]
  if given is None:
    return ()
  return tuple(given) if isinstance(given, list) else (given,)


def save(
  path: epath.Path,
  config: Mapping[str, Any],
  views: Mapping[str, Leaf],
  tensor: Tensor,
  max_shard_bytes: int,
  files: Mapping[str, Any],
) -> None:
  """Writes a folder that transformers' from_pretrained reads.

  One tensor is in memory at a time. config.json comes last: without it the
  folder holds no model yet.

  Args:
    path: the folder; older weights in it are replaced.
    config: content of config.json, of which generation reads its tokens too.
    views: from `leaves.views`.
    tensor: what becomes of each.
    max_shard_bytes: more than this goes to several files.
    files: bytes, or JSON, that are written beside: a tokenizer's.
  """
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").unlink(missing_ok=True)
  named = ((leaf, *tensor(p)) for p, leaf in views.items())
  tensors = {name: _turned(leaf, turned) for leaf, name, turned in named}
  _save_tensors(path, tensors, max_shard_bytes)
  generation = {k: config[k] for k in _OF_GENERATION if k in config}
  storage.write_json(path / GENERATION, generation)
  for name, content in files.items():
    if isinstance(content, bytes):
      (path / name).write_bytes(content)
    else:
      storage.write_json(path / name, content)
  storage.write_json(path / "config.json", config)


def _save_tensors(
  path: epath.Path, tensors: Mapping[str, Leaf], max_shard_bytes: int
) -> None:
  for pattern in _WRITTEN:
    for old in path.glob(pattern):
      old.unlink()
  sizes = {name: leaf.nbytes for name, leaf in tensors.items()}
  files = list(_into_files(sizes, max_shard_bytes))
  if len(files) == 1:
    safetensors_file.write(path / "model.safetensors", tensors)
    return
  weight_map: dict[str, str] = {}
  for i, names in enumerate(files, 1):
    file = f"model-{i:05}-of-{len(files):05}.safetensors"
    part = {name: tensors[name] for name in names}
    safetensors_file.write(path / file, part)
    weight_map |= dict.fromkeys(names, file)
  storage.write_json(
    path / "model.safetensors.index.json",
    {
      "metadata": {"total_size": sum(sizes.values())},
      "weight_map": weight_map,
    },
  )


def _into_files(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
  """Names, in order, in lists of at most `limit` bytes, or of one name."""
  names: list[str] = []
  total = 0
  for name, size in sizes.items():
    if names and total + size > limit:
      yield names
      names, total = [], 0
    names.append(name)
    total += size
  yield names

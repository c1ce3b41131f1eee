"""The safetensors format: a JSON header, then the tensors' bytes.

The `safetensors` library maps a whole file into memory, so that a checkpoint
counts twice while it is being read, and reads from disk only. The format is
simple enough to read the parts that are needed, from gs:// too:

  8 bytes        N, little-endian
  N bytes        {name: {"dtype", "shape", "data_offsets": [first, last]}}
  the rest       tensors in C order; offsets count from here
"""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from clp_jax.interop import storage
from clp_jax.interop.leaves import Index, Leaf
from clp_jax.interop.storage import Folder

DTYPES: dict[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 16 << 20  # bytes read at a time
_MAX_HEADER = 100 << 20  # the library's own limit


def read(
  folder: Folder, name: str, unused: tuple[str, ...] = ()
) -> dict[str, Leaf]:
  """The tensors of a file in a folder, by name, none of them read yet; those
  whose names have an end of `unused` are left out, and may be of any dtype.

  Raises:
    ValueError: when the file is truncated, isn't one, or holds integers.
  """
  where = f"{folder.path}/{name}"
  try:
    length = int.from_bytes(folder.read(name, 0, 8), "little")
    if length > _MAX_HEADER:
      raise ValueError(f"its header would have {length} bytes")
    header = json.loads(folder.read(name, 8, 8 + length))
    header.pop("__metadata__", None)
    tensors = {
      tensor: _leaf(folder, name, tensor, entry, 8 + length)
      for tensor, entry in header.items()
      if not tensor.endswith(unused)
    }
    last = max((e["data_offsets"][1] for e in header.values()), default=0)
    if last:
      folder.read(name, 8 + length + last - 1, 8 + length + last)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{where} is not a complete safetensors file ({_brief(error)}); copy it "
      "again."
    ) from error
  return tensors


def _brief(error: Exception) -> str:
  text = " ".join(str(error).split()).split(" [", 1)[0]
  return text if isinstance(error, ValueError) else repr(error)


def _leaf(
  folder: Folder, name: str, tensor: str, entry: Mapping[str, Any], base: int
) -> Leaf:
  first, last = entry["data_offsets"]
  shape = tuple(entry["shape"])
  if entry["dtype"] not in DTYPES:
    raise ValueError(
      f"{tensor} is of dtype {entry['dtype']}, expected one of "
      f"{', '.join(DTYPES)}"
    )
  dtype = DTYPES[entry["dtype"]]
  if last - first != int(np.prod(shape)) * dtype.itemsize or first < 0:
    raise ValueError(
      f"{tensor} of shape {shape}, {entry['dtype']}, has {last - first} bytes"
    )

  def read_part(index: Index) -> np.ndarray:
    return _read_part(folder, name, base + first, shape, dtype, index)

  return Leaf(shape, dtype, read_part)


def _read_part(
  folder: Folder,
  name: str,
  offset: int,
  shape: tuple[int, ...],
  dtype: np.dtype,
  index: Index,
) -> np.ndarray:
  """Rows are read as they lie; columns are cut out of blocks of whole rows."""
  ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
  first, count = ranges[0].start, len(ranges[0])
  row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
  columns = tuple(slice(r.start, r.stop) for r in ranges[1:])
  part = np.empty([len(r) for r in ranges], dtype)
  if part.shape[1:] == shape[1:]:
    folder.read_into(name, offset + first * row_bytes, part)
    return part
  rows = max(1, _BLOCK // row_bytes)
  for start in range(0, count, rows):
    stop = min(start + rows, count)
    block = np.empty((stop - start, *shape[1:]), dtype)
    folder.read_into(name, offset + (first + start) * row_bytes, block)
    part[start:stop] = block[(slice(None), *columns)]
  return part


def write(path: epath.Path, tensors: Mapping[str, Leaf]) -> None:
  """Writes tensors in their order, one in memory at a time; whole or not at
  all.

  Raises:
    ValueError: for a dtype that the format doesn't have.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, leaf in tensors.items():
    if leaf.dtype not in _NAMES:
      raise ValueError(
        f"{name} is of dtype {leaf.dtype}, expected one of "
        f"{', '.join(map(str, _NAMES))}."
      )
    header[name] = {
      "dtype": _NAMES[leaf.dtype],
      "shape": list(leaf.shape),
      "data_offsets": [offset, offset + leaf.nbytes],
    }
    offset += leaf.nbytes
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
  with storage.whole(path) as partial, partial.open("wb") as file:
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for leaf in tensors.values():
      array = leaf.all()
      rows = max(1, _BLOCK // max(1, array[:1].nbytes))
      for start in range(0, len(array), rows):
        file.write(array[start : start + rows].tobytes())  # in C order

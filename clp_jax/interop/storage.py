"""Reading files and zarr arrays through tensorstore, on disk or gs://.

tensorstore reads gs:// by itself: no TensorFlow, and nothing is copied to disk.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from clp_jax.interop.leaves import Index, Leaf

_BLOCK = 16 << 20  # bytes read from a bucket at a time
_LAST = "\U0010ffff"  # sorts after every name that starts alike


def absolute(path: epath.PathLike) -> epath.Path:
  """A path as Orbax takes it: absolute on disk, gs:// as it is."""
  path = epath.Path(path)
  # absolute() would take gs:// for the start of a relative path.
  return path if "://" in str(path) else path.absolute()


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder of files to read.

  Attributes:
    path: on disk, or gs://bucket/prefix.
  """

  path: str

  @property
  def on_disk(self) -> bool:
    """Not gs://."""
    return not self.path.startswith("gs://")

  @property
  def name(self) -> str:
    """The last part of the path."""
    return os.path.basename(os.path.abspath(self.path.rstrip("/") or "/"))

  def within(self, name: str) -> "Folder":
    """A folder in this one."""
    return Folder(f"{self.path.rstrip('/')}/{name}")

  @property
  def parent(self) -> "Folder":
    """The folder that this one is in."""
    if self.on_disk:
      return Folder(os.path.dirname(os.path.abspath(self.path)))
    return Folder(os.path.dirname(self.path.rstrip("/")))

  @property
  def kvstore(self) -> dict[str, Any]:
    """tensorstore's description of this folder."""
    match = re.fullmatch(r"gs://([^/]+)/?(.*?)/*", self.path, re.DOTALL)
    if match is None:
      return {"driver": "file", "path": os.path.abspath(self.path) + "/"}
    bucket, prefix = match.groups()
    return {
      "driver": "gcs",
      "bucket": bucket,
      "path": prefix + "/" if prefix else "",
    }

  @functools.cached_property
  def _store(self) -> ts.KvStore:
    return ts.KvStore.open(self.kvstore).result()

  def is_folder(self) -> bool:
    """Whether it is there; a bucket has no folders, so gs:// always is."""
    return not self.on_disk or os.path.isdir(self.path)

  def has(self, name: str) -> bool:
    """Whether the file `name` is there."""
    if self.on_disk:
      return os.path.isfile(os.path.join(self.path, name))
    return bool(self._list(name, name + "\0"))

  def names(self, prefix: str) -> list[str]:
    """Names in the folder, of files and folders, that start with `prefix`."""
    if self.on_disk:
      names = os.listdir(self.path) if self.is_folder() else []
      return sorted(name for name in names if name.startswith(prefix))
    keys = self._list(prefix, prefix + _LAST)
    return sorted({key.split("/")[0] for key in keys})

  def _list(self, first: str, stop: str) -> list[str]:
    keys = self._store.list(ts.KvStore.KeyRange(first, stop)).result()
    return [key.decode() for key in keys]

  def read_into(self, name: str, offset: int, array: np.ndarray) -> None:
    """Fills a contiguous array with the file's bytes from `offset` on.

    Raises:
      ValueError: when the file isn't there, can't be read or is shorter.
    """
    target = array.reshape(-1).view(np.uint8).data
    if self.on_disk:
      with open(os.path.join(self.path, name), "rb", buffering=0) as file:
        file.seek(offset)
        filled = 0
        while filled < len(target) and (n := file.readinto(target[filled:])):
          filled += n
      if filled < len(target):
        raise ValueError(f"{self.path}/{name} ends too early.")
      return
    for first in range(0, len(target), _BLOCK):
      stop = min(first + _BLOCK, len(target))
      target[first:stop] = self.read(name, offset + first, offset + stop)

  def read(
    self, name: str, start: int | None = None, stop: int | None = None
  ) -> bytes:
    """Bytes start:stop of the file `name`.

    Raises:
      ValueError: when the file isn't there, can't be read or is shorter.
    """
    part = None if start is None and stop is None else slice(start, stop)
    try:
      result = self._store.read(name, byte_range=part).result()
    except ValueError as error:
      raise ValueError(f"can't read {self.path}/{name}: {error}") from error
    if result.state != "value":
      raise ValueError(f"{self.path}/{name} is missing.")
    return result.value


def write(folder: Folder, name: str, content: bytes) -> None:
  """Writes a file into a folder, which is made where it is absent."""
  ts.KvStore.open(folder.kvstore).result().write(name, content).result()


@contextlib.contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
  """Where to write what then takes the place of `path`, so that no reader sees
  half of it; what an error interrupts leaves `path` as it was."""
  partial = path.parent / f".{path.name}.partial"
  yield partial
  partial.replace(path)


def write_whole(path: epath.Path, content: bytes) -> None:
  """Writes a file, which is the old one or the new one, never half."""
  with whole(path) as partial:
    partial.write_bytes(content)


def write_json(path: epath.Path, values: Any) -> None:
  """`write_whole` of JSON."""
  write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def array_names(where: str, kvstore: dict[str, Any], prefix: str) -> list[str]:
  """Names of the zarr arrays in a store that start with `prefix`.

  Raises:
    ValueError: when the store can't be read; names `where`.
  """
  try:
    store = ts.KvStore.open(kvstore).result()
    keys = store.list(ts.KvStore.KeyRange(prefix, prefix + _LAST)).result()
  except ValueError as error:
    raise ValueError(f"can't read {where}: {brief(error)}") from error
  found = [re.fullmatch(r"([^/]+)/\.zarray", key.decode()) for key in keys]
  return sorted(match[1] for match in found if match)


def zarr_leaves(
  where: str, kvstore: dict[str, Any], names: dict[str, str]
) -> dict[str, Leaf]:
  """Leaves of zarr arrays.

  Args:
    where: the checkpoint, for messages.
    kvstore: tensorstore's description of where the arrays are.
    names: path in the parameter tree -> path in the store.

  Raises:
    ValueError: for an array that is missing or can't be read.
  """
  base = kvstore.get("path", "")
  # Chunks in flight are memory on top of what is asked for.
  context = ts.Context({"data_copy_concurrency": {"limit": 4}})
  # All before the first is waited for: a bucket answers slowly.
  opened = {
    path: ts.open(
      {
        "driver": "zarr",
        "kvstore": kvstore | {"path": f"{base}{name.rstrip('/')}/"},
        # The default takes a file that got lost for zeros.
        "fill_missing_data_reads": False,
      },
      open=True,
      context=context,
    )
    for path, name in names.items()
  }
  return {
    path: _zarr_leaf(f"{path} of {where}", future)
    for path, future in opened.items()
  }


def _zarr_leaf(what: str, future: Any) -> Leaf:
  try:
    store = future.result()
  except ValueError as error:
    raise ValueError(f"can't read {what}: {brief(error)}") from error

  def read(index: Index) -> np.ndarray:
    try:
      return store[index].read().result()
    except ValueError as error:
      raise ValueError(f"can't read {what}: {brief(error)}") from error

  return Leaf(store.shape, store.dtype.numpy_dtype, read)


def brief(error: Exception) -> str:
  """tensorstore's message without the specification that follows it."""
  return str(error).split(" [", 1)[0]

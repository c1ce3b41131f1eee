"""Documents of one's own: JSONL files, checked once, then read by row number.

A file is read through once before anything starts: every line must be a JSON
object with the string fields that were asked for, and an error names file and
line. That pass keeps only where each row lies (20 bytes a row); later a row is
read from its place, so that a shuffled order over millions of rows needs no
memory, and going on from batch k means computing row numbers, not reading what
came before. Blank lines are skipped. A file that can't be read from the middle,
because it is compressed (.gz) or on a network file system (gs://), is unpacked
into an unnamed temporary file first, in the folder that TMPDIR names.
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from clp_jax.data.tokenizer import check_messages
from clp_jax.data.vocabulary import import_seqio


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """The rows of JSONL files, in order, read when they are asked for.

  Attributes:
    fields: names of the string fields of a row; None for one that is empty.
    files: open files, kept while this object lives.
    paths: their names.
    file_of: [n] int32, which file a row is in.
    offsets: [n] int64, where its line starts, in bytes.
    sizes: [n] int64, length of the line, in bytes.
    conversations: [k] int64, rows whose first field is a list of messages.
  """

  fields: tuple[str | None, ...]
  files: tuple[BinaryIO, ...]
  paths: tuple[str, ...]
  file_of: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray
  conversations: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets)

  def __getitem__(self, row: int) -> tuple[Any, ...]:
    """The fields' values of a row; threads may read at once."""
    file = self.files[self.file_of[row]]
    line = os.pread(file.fileno(), int(self.sizes[row]), int(self.offsets[row]))
    values = json.loads(line)
    return tuple("" if name is None else values[name] for name in self.fields)

  def place(self, row: int) -> str:
    """The file and the line of a row, for messages."""
    number, end = self.file_of[row], int(self.offsets[row])
    descriptor, size = self.files[number].fileno(), 2**20
    line = 1
    for start in range(0, end, size):
      part = os.pread(descriptor, min(size, end - start), start)
      line += part.count(b"\n")
    return f"{self.paths[number]}, line {line}"


def read_rows(
  pattern: str, fields: Sequence[str | None], conversations: bool = False
) -> Rows:
  """Opens JSONL files and checks every line of them.

  Args:
    pattern: a file, or a glob whose files are taken in the order of their
      names; may be gs://. Names that end in .gz are unpacked.
    fields: string fields that every row must have; the first must not be blank,
      and None, of the others, is one that none has: it reads as empty.
    conversations: whether the first may also be a list of messages.

  Returns:
    The rows. The same object is returned while the files don't change.

  Raises:
    ValueError: no file matches, one can't be read, a line is not valid (with
      file and line number), or there are no rows.
  """
  paths = _matches(pattern)
  with _readable(pattern):
    stamps = tuple(_stamp(path) for path in paths)
  rows = _read_rows(
    tuple(map(os.fspath, paths)), stamps, tuple(fields), conversations
  )
  if not len(rows):
    raise ValueError(
      f"{pattern} is empty; it needs a line for each document: an object with "
      f"{_names(rows.fields)}."
    )
  return rows


def parse(line: str | bytes) -> Any:
  """The content of a line; ValueError where it is not JSON."""
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not valid JSON: {error}.") from error


def document_of(
  row: Any, fields: Sequence[str], conversations: bool = False
) -> Any:
  """The document of a row that was made for a run, or by one.

  Args:
    row: a line's content.
    fields: names that the run knows it by, the first that is there counts;
      "document", as rows that runs write have it, is always the last.
    conversations: whether it may also be a list of messages.

  Raises:
    ValueError: it is none, or has no such field that is a string.
  """
  names = tuple(dict.fromkeys((*fields, "document")))
  if isinstance(row, dict):
    for name in names:
      if isinstance(row.get(name), str):
        return row[name]
      if conversations and isinstance(row.get(name), list):
        check_messages(row[name])
        return row[name]
  known = " or ".join(f'"{name}"' for name in names)
  raise ValueError(f"expected an object with a {known} string.")


def _matches(pattern: str) -> list[epath.Path]:
  if epath.Path(pattern).is_file():  # whatever characters its name has
    return [epath.Path(pattern)]
  if "://" in pattern:
    tf, _ = import_seqio()
    with _readable(pattern):
      names = tf.io.gfile.glob(pattern)
  else:
    names = glob.glob(pattern, recursive=True)
  paths = [p for p in map(epath.Path, sorted(names)) if p.is_file()]
  if not paths:
    raise ValueError(
      f"no file matches {pattern}; give a JSONL file, or a glob in quotes."
    )
  return paths


def _stamp(path: epath.Path) -> tuple[int, int]:
  """What changes when a file does."""
  if "://" in os.fspath(path):
    remote = path.stat()
    return remote.mtime, remote.length
  local = os.stat(path)
  return local.st_mtime_ns, local.st_size


@contextlib.contextmanager
def _readable(name: str):
  """Turns what reading a file raises into a ValueError."""
  try:
    yield
  except (OSError, EOFError, zlib.error) as error:
    kind = "" if isinstance(error, OSError) else "not a whole gzip file: "
    raise ValueError(f"can't read {name}: {kind}{error}.") from error


@functools.lru_cache(maxsize=8)
def _read_rows(
  paths: tuple[str, ...],
  stamps: tuple[tuple[int, int], ...],
  fields: tuple[str | None, ...],
  conversations: bool,
) -> Rows:
  del stamps  # part of the cache's key: files that changed are read again
  files = []
  columns = array("i"), array("q"), array("q")
  messages = array("q")
  for number, path in enumerate(paths):
    with _readable(path):
      file = _open(path)
      offset = 0
      for line_number, line in enumerate(file, 1):
        if line.strip():
          where = f"{path}, line {line_number}"
          names = tuple(filter(None, fields))
          if _check(line, where, names, conversations):
            messages.append(len(columns[0]))
          for column, value in zip(
            columns, (number, offset, len(line)), strict=True
          ):
            column.append(value)
        offset += len(line)
    files.append(file)
  arrays = (np.asarray(c) for c in (*columns, messages))
  return Rows(fields, tuple(files), paths, *arrays)


def _open(path: str) -> BinaryIO:
  """A file that can be read from the middle."""
  compressed = path.endswith(".gz")
  if not compressed and "://" not in path:
    return open(path, "rb")
  local = tempfile.TemporaryFile()
  with contextlib.ExitStack() as stack:
    remote: Any = stack.enter_context(epath.Path(path).open("rb"))
    if compressed:
      remote = stack.enter_context(gzip.open(remote))
    shutil.copyfileobj(remote, local, 2**20)
  local.seek(0)
  return local


def _check(
  line: bytes, where: str, fields: tuple[str, ...], conversations: bool
) -> bool:
  """Whether a row's first field is a conversation; a ValueError where the line
  is no row."""
  try:
    row = parse(line)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  if not isinstance(row, dict):
    raise ValueError(
      f"{where}: expected an object with {_names(fields)}, got "
      f"{type(row).__name__}."
    )
  for name in fields:
    value = row.get(name)
    if name not in row:
      raise ValueError(
        f"{where}: no field {name!r}; it has {_names(tuple(row)) or 'none'}: "
        "correct the line or the name of the field in the config."
      )
    if conversations and name == fields[0] and not isinstance(value, str):
      try:
        check_messages(value)
        for message in value or ():
          message["content"].encode()
      except ValueError as error:
        raise ValueError(f"{where}: field {name!r}: {error}") from error
      continue
    if not isinstance(value, str):
      raise ValueError(
        f"{where}: field {name!r} must be a string, got {type(value).__name__}."
      )
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"{where}: field {name!r} is not text: {error}."
      ) from error
  if isinstance(row[fields[0]], str) and not row[fields[0]].strip():
    raise ValueError(f"{where}: field {fields[0]!r} is blank.")
  return not isinstance(row[fields[0]], str)


def _names(fields: tuple[str | None, ...]) -> str:
  return ", ".join(repr(name) for name in fields if name is not None)

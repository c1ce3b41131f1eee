"""Which vocabulary a folder or a file holds."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clp_jax.data.tokenizer import TOKENIZER, Tokenizer


def load_tokenizer(
  folder: str | os.PathLike,
  eos_ids: Sequence[int] = (),
  pad_id: int = 0,
  rows: int | None = None,
  options: Mapping[str, Any] | None = None,
) -> Tokenizer | None:
  """The vocabulary in a folder of a run or of a checkpoint, or None.

  Args:
    folder: with tokenizer.json, or a SentencePiece model; may be gs://.
    eos_ids: tokens that end a response of the model; () for the vocabulary's.
    pad_id: the model's padding.
    rows: of the model's embedding, see `HFTokenizer`.
    options: what a chat template is given beside its own.

  Raises:
    ValueError: a file is not valid.
  """
  # Late, as below: neither of the two is needed for the other.
  from clp_jax.data import vocabulary

  path = epath.Path(folder)
  # First: folders of T5 hold it beside a tokenizer.json of the same pieces.
  for name in vocabulary.FILES:
    if (path / name).exists():
      file = path / name
      return vocabulary.Vocabulary(os.fspath(file), file.read_bytes(), eos_ids)
  from clp_jax.data import hf_tokenizer

  if found := hf_tokenizer.read_files(folder):
    return hf_tokenizer.HFTokenizer(
      os.fspath(folder), found, eos_ids, pad_id, rows, options
    )
  return None


def find(
  path: str | os.PathLike,
  eos_ids: Sequence[int] = (),
  pad_id: int = 0,
  rows: int | None = None,
  options: Mapping[str, Any] | None = None,
) -> Tokenizer | None:
  """`load_tokenizer` of a folder, or of one file of it.

  Args: as for `load_tokenizer`, but for:
    path: a folder, tokenizer.json, or a SentencePiece .model file.

  Raises:
    ValueError: a file can't be read or is not valid.
  """
  from clp_jax.data import vocabulary

  file = epath.Path(path)
  if file.is_dir():
    return load_tokenizer(path, eos_ids, pad_id, rows, options)
  if file.name == TOKENIZER:
    return load_tokenizer(file.parent, eos_ids, pad_id, rows, options)
  return vocabulary.read(path, eos_ids)

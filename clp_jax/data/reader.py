"""Numbered batches of documents that are read by row number, on the host.

Training batches are numbered. Epoch e visits the n rows in an order that is a
function of (seed, e); the epochs are chained and cut into batches of B. So
batch k is a function of (rows, B, seed, k), and starting at k means computing
row numbers, whatever came before.

What seqio reads, which knows no row numbers, is in tasks.py.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from clp_jax.data.tokenizer import Template, Tokenizer, pad

_AHEAD = 2  # batches that are tokenised before they are asked for


class Batch(NamedTuple):
  """Prompts of one process, with their texts; b of a global batch's B rows."""

  encoder_input_tokens: np.ndarray  # [b, S] int32, padded
  decoder_target_tokens: np.ndarray  # [b, T] int32, EOS included, padded
  documents: list[str]  # [b]
  references: list[str]  # [b]
  num_cut: int = 0  # rows whose input was longer than S

  @property
  def cut_share(self) -> float:
    """Of this process's rows."""
    return self.num_cut / len(self.documents)


class Rows(Protocol):
  """(document, reference) by row number; a document may be messages."""

  def __len__(self) -> int: ...

  def __getitem__(self, row: int) -> Sequence[Any]: ...


class Reader(NamedTuple):
  """How rows become batches.

  Attributes:
    rows: of (document, reference).
    tokenizer: of the model.
    template: makes a prompt of a document.
    source_length: S, tokens.
    target_length: T, tokens.
  """

  rows: Rows
  tokenizer: Tokenizer
  template: Template
  source_length: int
  target_length: int

  def batch(self, numbers: Sequence[int]) -> Batch:
    """The rows of these numbers, in this order."""
    documents, references = [], []
    inputs, targets, num_cut = [], [], 0
    for number in numbers:
      document, reference = self.rows[int(number)]
      ids, cut = self.tokenizer.prompt(
        document, self.template, self.source_length
      )
      num_cut += cut
      inputs.append(ids)
      targets.append(self.tokenizer.target(reference, self.target_length))
      documents.append(text_of(document))
      references.append(reference)
    pad_id = self.tokenizer.pad_id
    return Batch(
      pad(inputs, self.source_length, pad_id),
      pad(targets, self.target_length, pad_id),
      documents,
      references,
      num_cut,
    )


def text_of(document: Any) -> str:
  """What rewards and logs see of a document: a conversation's turns, if it is
  one."""
  if isinstance(document, str):
    return document
  return "\n\n".join(f"{m['role']}: {m['content']}" for m in document)


def check_lengths(source_length: int, target_length: int) -> None:
  """Raises a ValueError unless a token and EOS fit."""
  lengths = {"inputs": source_length, "targets": target_length}
  for name, length in lengths.items():
    if length < 2:
      raise ValueError(
        f"{name} need at least 2 tokens, one and EOS, got a length of {length}."
      )


@dataclasses.dataclass(frozen=True)
class Numbering:
  """Which rows of which batches: one process's of start, start + 1, ...

  Attributes:
    batch_size: B, rows of a global batch.
    seed: of the order of rows, >= 0.
    start: number of the first batch.
    process_index: p, which rows to take: [p B / P, (p + 1) B / P).
    process_count: P; divides batch_size.
  """

  batch_size: int
  seed: int
  start: int = 0
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise ValueError(
        f"batch_size = {self.batch_size} is not a positive multiple of the "
        f"number of processes, {self.process_count}; change the batch size."
      )
    if not 0 <= self.process_index < self.process_count:
      raise ValueError(
        "expected 0 <= process_index < process_count, got "
        f"{self.process_index} and {self.process_count}."
      )
    if self.start < 0 or self.seed < 0:
      raise ValueError(
        f"expected start and seed >= 0, got start={self.start}, "
        f"seed={self.seed}."
      )

  @property
  def rows(self) -> int:
    """B / P, rows of a process's batch."""
    return self.batch_size // self.process_count


def train_batches(reader: Reader, numbering: Numbering) -> Iterator[Batch]:
  """Yields the rows of one process of global batches start, start + 1, ...

  The stream has no end, and its batches are of b = B / P rows. They run on from
  one epoch into the next, so rows fewer than a batch repeat within it.

  Raises:
    ValueError: the reader's lengths leave no room.
  """
  check_lengths(reader.source_length, reader.target_length)
  return _ahead(reader, own_numbers(len(reader.rows), numbering))


def own_numbers(num_rows: int, numbering: Numbering) -> Iterator[list[int]]:
  """Numbers of the rows of `train_batches`."""
  seed, own = numbering.seed, numbering.rows
  order = functools.lru_cache(maxsize=2)(
    lambda epoch: np.random.default_rng([seed, epoch]).permutation(num_rows)
  )
  first = numbering.start * numbering.batch_size + numbering.process_index * own
  while True:
    places = (divmod(i, num_rows) for i in range(first, first + own))
    yield [int(order(epoch)[place]) for epoch, place in places]
    first += numbering.batch_size


def _ahead(reader: Reader, numbers: Iterator[list[int]]) -> Iterator[Batch]:
  """Tokenises in a thread, while the devices are at work."""
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    waiting = [
      thread.submit(reader.batch, next(numbers)) for _ in range(_AHEAD)
    ]
    while True:
      waiting.append(thread.submit(reader.batch, next(numbers)))
      yield waiting.pop(0).result()


def eval_batch(reader: Reader, num_examples: int, what: str) -> Batch:
  """The first num_examples rows, in order; `what` they are called in messages.

  Raises:
    ValueError: there are fewer.
  """
  check_lengths(reader.source_length, reader.target_length)
  count = len(reader.rows)
  if not 1 <= num_examples <= count:
    raise ValueError(
      f"num_examples = {num_examples}, but {what} has {count} examples; ask "
      f"for 1 to {count}."
    )
  return reader.batch(range(num_examples))

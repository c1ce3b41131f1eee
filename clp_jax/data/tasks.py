"""Batches of any seqio Task: numbered, resumable, cut over processes.

A task's examples need the token features `inputs` and `targets` (int32, ending
in EOS) and, because rewards are computed from text, the string features
`document` and `reference` (or what seqio's tokenize leaves: inputs_pretokenized
and targets_pretokenized). Training batches are numbered. To make batch k:

  1. read the split in its order; epoch e of it goes through a shuffle buffer
     whose seed is a function of (seed, e);
  2. chain the epochs, and cut them into batches of B examples;
  3. of batch k, take this process's rows, tokenise, trim and pad them.

So batch k depends on nothing but (task, split, B, seed, k), and starting at k
means leaving out whole epochs and skipping untokenised examples of one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from clp_jax.data import newsroom
from clp_jax.data.vocabulary import PAD, import_seqio

# Examples shuffled together. Memory bounds it: article texts are kilobytes.
_SHUFFLE_BUFFER = 2**15


class Batch(NamedTuple):
  """Prompts of one process, with their texts; b of a global batch's B rows."""

  encoder_input_tokens: np.ndarray  # [b, S] int32, EOS included, 0-padded
  decoder_target_tokens: np.ndarray  # [b, T] int32, EOS included, 0-padded
  documents: list[str]  # [b]
  references: list[str]  # [b]


def get_task(name: str, vocabulary: Any = None) -> Any:
  """Finds a seqio Task.

  Args:
    name: `newsroom`, or a task in seqio's registry.
    vocabulary: a seqio.SentencePieceVocabulary to tokenise with instead of the
      task's own, for a model that has another; None keeps the task's.

  Returns:
    The seqio.Task.

  Raises:
    ValueError: there is no such task.
  """
  _, seqio = import_seqio()
  if name == "newsroom":
    newsroom.register_task()
  names = seqio.TaskRegistry.names()
  if name not in names:
    raise ValueError(
      f"there is no seqio task {name!r}; registered are "
      f"{', '.join(sorted({'newsroom', *names}))}. A task of your own must be "
      "registered (seqio.TaskRegistry.add) before."
    )
  task = seqio.TaskRegistry.get(name)
  if vocabulary is None:
    return task
  return task.replace(
    output_features={
      key: dataclasses.replace(feature, vocabulary=vocabulary)
      for key, feature in task.output_features.items()
    }
  )


def train_batches(
  task: Any,
  split: str,
  *,
  batch_size: int,
  source_length: int,
  target_length: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Yields the rows of one process of global batches start, start + 1, ...

  The stream has no end. Batches run on from one epoch into the next, so a split
  smaller than a batch repeats within it. Global batch k is a function of (task,
  split, batch_size, seed, k), whatever `start` and `process_count` are, as long
  as nobody calls tf.random.set_seed.

  Args:
    task: a seqio.Task whose preprocessors make one example of each.
    split: its split.
    batch_size: B, rows of a global batch.
    source_length: S, tokens; longer inputs are cut.
    target_length: T, tokens; longer targets are cut.
    seed: of the order of examples, >= 0.
    start: number of the first batch.
    process_index: p, which rows to take: [p B / P, (p + 1) B / P).
    process_count: P; divides batch_size.

  Returns:
    An iterator over batches of b = B / P rows.

  Raises:
    ValueError: the split is absent or empty, the sizes don't fit, or the task
      can't be used.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size = {batch_size} is not a positive multiple of the number of "
      f"processes, {process_count}; change the batch size."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"expected 0 <= process_index < process_count, got {process_index} and "
      f"{process_count}."
    )
  if start < 0 or seed < 0:
    raise ValueError(
      f"expected start and seed >= 0, got start={start}, seed={seed}."
    )
  tf, _ = import_seqio()
  raw, count = _raw(task, split)
  rows = batch_size // process_count
  first_epoch, skip = divmod(start * batch_size, count)

  def epoch(number):
    return raw.shuffle(
      min(count, _SHUFFLE_BUFFER),
      seed=number * 1_000_003 + seed,  # distinct for seeds below a million
      reshuffle_each_iteration=False,
    )

  def is_mine(number, _):
    return number % batch_size // rows == process_index

  epochs = tf.data.Dataset.range(first_epoch, 2**31)
  examples = epochs.flat_map(epoch).skip(skip)
  if process_count > 1:
    examples = examples.enumerate().filter(is_mine).map(lambda _, own: own)
  return _batches(task, examples, rows, source_length, target_length)


def eval_batch(
  task: Any,
  split: str,
  *,
  num_examples: int,
  source_length: int,
  target_length: int,
) -> Batch:
  """Reads the first examples of a split, in order.

  Args:
    task: a seqio.Task whose preprocessors make one example of each.
    split: its split.
    num_examples: b, how many.
    source_length: S, tokens; longer inputs are cut.
    target_length: T, tokens; longer targets are cut.

  Returns:
    One batch of b rows.

  Raises:
    ValueError: the split is absent, empty or has fewer examples, or the task
      can't be used.
  """
  raw, count = _raw(task, split)
  if not 1 <= num_examples <= count:
    raise ValueError(
      f"num_examples = {num_examples}, but split {split!r} of task "
      f"{task.name!r} has {count} examples; ask for 1 to {count}."
    )
  examples = raw.take(num_examples)
  return next(
    _batches(task, examples, num_examples, source_length, target_length)
  )


def _raw(task: Any, split: str) -> tuple[Any, int]:
  """A split's examples before preprocessing, in order, and their number."""
  tf, _ = import_seqio()
  if split not in task.splits:
    raise ValueError(
      f"task {task.name!r} has no split {split!r}; it has "
      f"{', '.join(task.splits) or 'none'}."
    )
  raw = task.source.get_dataset(split=split, shuffle=False)
  count = int(raw.cardinality())
  if count == tf.data.UNKNOWN_CARDINALITY:
    count = int(raw.reduce(np.int64(0), lambda total, _: total + 1))
  if count == tf.data.INFINITE_CARDINALITY:
    raise ValueError(
      f"split {split!r} of task {task.name!r} never ends; its source must be "
      "one pass over its examples."
    )
  if count == 0:
    raise ValueError(
      f"split {split!r} of task {task.name!r} is empty; it needs at least one "
      "example: check the files that it is read from."
    )
  return raw, count


def _batches(
  task: Any, examples: Any, rows: int, source_length: int, target_length: int
) -> Iterator[Batch]:
  """Tokenises, trims, pads and batches raw examples."""
  tf, _ = import_seqio()
  lengths = {"inputs": source_length, "targets": target_length}
  for key, length in lengths.items():
    if length < 2:
      raise ValueError(
        f"{key} need at least 2 tokens, one and EOS, got a length of {length}."
      )

  def preprocess(dataset):
    dataset = task.preprocess_precache(dataset)
    return task.preprocess_postcache(dataset, lengths)

  # A filter among the preprocessors would shift all later rows, silently.
  one = examples.take(1).apply(tf.data.experimental.assert_cardinality(1))
  if int(preprocess(one).cardinality()) != 1:
    raise ValueError(
      f"the preprocessors of task {task.name!r} drop, repeat or join examples, "
      "so that its batches can't be numbered; do that in its source instead."
    )
  dataset = preprocess(examples)
  features = {
    "inputs": _feature(task, dataset, "inputs"),
    "targets": _feature(task, dataset, "targets"),
    "document": _feature(task, dataset, "document", "inputs_pretokenized"),
    "reference": _feature(task, dataset, "reference", "targets_pretokenized"),
  }

  def select(example):
    selected = {key: example[name] for key, name in features.items()}
    for key, length in lengths.items():
      selected[key] = tf.cast(selected[key][:length], tf.int32)
    return selected

  options = tf.data.Options()
  options.deterministic = True
  padded = {
    "inputs": [source_length],
    "targets": [target_length],
    "document": [],
    "reference": [],
  }
  dataset = dataset.map(select).padded_batch(rows, padded).prefetch(2)
  return _read(dataset.with_options(options))


def _feature(task: Any, dataset: Any, *names: str) -> str:
  """The first of these names that a dataset's examples have."""
  for name in names:
    if name in dataset.element_spec:
      return name
  raise ValueError(
    f"task {task.name!r} gives examples without {' or '.join(names)}; they "
    f"have {', '.join(sorted(dataset.element_spec))}: add a preprocessor that "
    "makes it."
  )


def _read(dataset: Any) -> Iterator[Batch]:
  for batch in dataset.as_numpy_iterator():
    yield Batch(
      encoder_input_tokens=batch["inputs"],
      decoder_target_tokens=batch["targets"],
      documents=[text.decode(errors="replace") for text in batch["document"]],
      references=[text.decode(errors="replace") for text in batch["reference"]],
    )


def tokenize_inputs(
  vocabulary: Any, texts: Sequence[str], source_length: int
) -> np.ndarray:
  """Tokenises documents as a task does its inputs.

  Args:
    vocabulary: a seqio.SentencePieceVocabulary.
    texts: [B] documents.
    source_length: S, tokens, EOS included; longer documents are cut.

  Returns:
    [B, S] int32, 0-padded, every row ending in EOS.

  Raises:
    ValueError: source_length is below 2.
  """
  if source_length < 2:
    raise ValueError(
      f"source_length must be at least 2, one token and EOS, got "
      f"{source_length}."
    )
  tokens = np.full([len(texts), source_length], PAD, np.int32)
  for row, text in zip(tokens, texts, strict=True):
    ids = vocabulary.encode(text)[: source_length - 1]
    row[: len(ids) + 1] = [*ids, vocabulary.eos_id]
  return tokens


def decode_tokens(
  vocabulary: Any, tokens: np.ndarray, mask: np.ndarray
) -> list[str]:
  """Turns sampled tokens into text.

  Args:
    vocabulary: a seqio.SentencePieceVocabulary.
    tokens: [R, T] int.
    mask: [R, T] bool, True on a row's own tokens, EOS included if it has one.

  Returns:
    [R] texts, up to EOS; ids without a piece read as unknown.
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask)
  tokenizer = vocabulary.tokenizer
  known = tokens < tokenizer.get_piece_size()
  tokens = np.where(known, tokens, tokenizer.unk_id())
  ended = np.cumsum(tokens == vocabulary.eos_id, axis=1) > 0
  mask = mask & ~ended
  rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
  return tokenizer.decode(rows) if rows else []

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

A prompt template, such as "summarize: {document}", makes the inputs of any task
from its documents; rewards and logs still see the document itself.

A task that seqio's own tool has cached (seqio_cache_tasks; the task needs a
seqio.CacheDatasetPlaceholder) is read from the cache when that is asked for:
its examples are then tokenised already, by the vocabulary it was cached with.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from clp_jax.data import corpora, newsroom
from clp_jax.data import vocabulary as vocabulary_lib
from clp_jax.data.reader import Batch, Numbering, check_lengths
from clp_jax.data.tokenizer import DOCUMENT
from clp_jax.data.vocabulary import Vocabulary, import_seqio
from clp_jax.errors import importing

# Examples shuffled together. Memory bounds it: article texts are kilobytes, the
# row numbers that stand for the rows of a file are not.
_SHUFFLE_BUFFER = 2**15
_SHUFFLE_BUFFER_NUMBERS = 2**22
# (documents, references) -> a Batch.
Tokenise = Callable[[list[str], list[str]], Batch]


def get_task(
  name: str, vocabulary: Any = None, data_dir: str | None = None
) -> Any:
  """Finds a seqio Task.

  Args:
    name: `newsroom`, `xsum`, `tldr`, a task in seqio's registry, or
      `package.module:name`, where importing the module registers the task.
    vocabulary: a seqio.SentencePieceVocabulary to tokenise with instead of the
      task's own, for a model that has another; None keeps the task's.
    data_dir: where TFDS has prepared `xsum` and `tldr`; None is its own folder.

  Returns:
    The seqio.Task.

  Raises:
    ValueError: there is no such task.
  """
  _, seqio = import_seqio()
  if name == "newsroom":
    newsroom.register_task()
  elif name in corpora.CORPORA:
    corpora.register_task(name, data_dir)
  elif name not in seqio.TaskRegistry.names() and ":" in name:
    module, _, name = name.partition(":")
    what = f"{module!r}, which should register the seqio task {name!r}"
    with importing(f"can't import {what}", "add its folder to PYTHONPATH"):
      importlib.import_module(module)
  names = seqio.TaskRegistry.names()
  if name not in names:
    raise ValueError(
      f"there is no seqio task {name!r}; there are "
      f"{', '.join(sorted({'newsroom', *corpora.CORPORA, *names}))}. Name one "
      "of your own as package.module:task, where the module registers it "
      "(seqio.TaskRegistry.add)."
    )
  task = seqio.TaskRegistry.get(name)
  return task if vocabulary is None else _tokenised_by(task, vocabulary)


def _tokenised_by(task: Any, vocabulary: Any) -> Any:
  features = {
    key: dataclasses.replace(feature, vocabulary=vocabulary)
    for key, feature in task.output_features.items()
  }
  return task.replace(output_features=features)


def vocabulary_of(task: Any) -> Vocabulary:
  """A task's own, without seqio.

  Raises:
    ValueError: its file can't be read or is not valid.
  """
  own = vocabulary_lib.loaded(task.output_features["inputs"].vocabulary)
  return Vocabulary(
    own.sentencepiece_model_file, own.sp_model, getattr(own, "eos_ids", ())
  )


def of_texts(task: Any) -> Any:
  """The same task, tokenised by bytes, for whom its texts are enough: its own
  vocabulary is not read."""
  _, seqio = import_seqio()
  return _tokenised_by(task, seqio.ByteVocabulary())


def from_cache(task: Any, cache_dirs: Sequence[str] = ()) -> Any:
  """The same task, read from what seqio_cache_tasks wrote.

  Args:
    task: a seqio.Task with a seqio.CacheDatasetPlaceholder.
    cache_dirs: folders to look in, after those that seqio was told of.

  Returns:
    A seqio.Task whose source is the cache; a split that was cached with another
    vocabulary is refused when it is read. Control tokens in it, which seqio's
    own vocabularies make of documents' text, are unknown tokens.

  Raises:
    ValueError: the task can't be cached, or is not in any of the folders.
  """
  tf, seqio = import_seqio()
  if not task.supports_caching:
    raise ValueError(
      f"task {task.name!r} has no seqio.CacheDatasetPlaceholder among its "
      "preprocessors, so that it can't be cached; set data.use_cached=False."
    )
  known = seqio.get_global_cache_dirs()
  seqio.add_global_cache_dirs([d for d in cache_dirs if d not in known])
  if task.cache_dir is None:
    raise ValueError(
      f"task {task.name!r} is not cached in any of "
      f"{', '.join(seqio.get_global_cache_dirs()) or 'no folders'}; run "
      "seqio_cache_tasks, correct data.cache_dirs or set data.use_cached=False."
    )

  def without_control(example):
    """Unknown for control tokens: seqio's own tool lets documents make them."""
    for key in ("inputs", "targets"):
      vocabulary, tokens = task.output_features[key].vocabulary, example[key]
      control = vocabulary_lib.control_ids(vocabulary, vocabulary.vocab_size)
      if control:
        hits = tf.constant(control, tokens.dtype)[None] == tokens[:, None]
        unknown = tf.constant(vocabulary.unk_id, tokens.dtype)
        example[key] = tf.where(tf.reduce_any(hits, -1), unknown, tokens)
    return example

  def dataset(split, shuffle_files=False):
    del shuffle_files
    examples = task.get_dataset(
      split=split,
      use_cached=True,
      shuffle=False,
      trim_output_features=False,
      try_in_mem_cache=False,
    ).map(without_control)
    _check_cached_tokens(task, next(examples.take(1).as_numpy_iterator(), None))
    return examples

  sizes = {}
  for split in task.splits:
    # The tool leaves out splits that are not read.
    with contextlib.suppress(ValueError):
      sizes[split] = task.get_cached_stats(split)["examples"]
  return task.replace(
    source=seqio.FunctionDataSource(
      dataset, splits=list(sizes), num_input_examples=sizes
    ),
    preprocessors=[],
  )


def _check_cached_tokens(task: Any, example: dict[str, Any] | None) -> None:
  """Raises a ValueError if they are those of another vocabulary."""
  if example is None or "inputs_pretokenized" not in example:
    return
  feature = task.output_features["inputs"]
  tokens = feature.vocabulary.encode(example["inputs_pretokenized"].decode())
  if example["inputs"].tolist()[: len(tokens)] != tokens:
    raise ValueError(
      f"the cache of task {task.name!r} in {task.cache_dir} was made with "
      "another vocabulary than the model's; cache it again with that one, or "
      "set data.use_cached=False."
    )


def with_template(task: Any, template: str) -> Any:
  """The same seqio.Task, with its inputs made from its documents by a template,
  a text from `tokenizer.parse_template`."""
  tf, seqio = import_seqio()
  before, after = template.split(DOCUMENT)
  feature = task.output_features["inputs"]

  def fill(example):
    if "document" in example:
      document = example["document"]
    elif "inputs_pretokenized" in example:
      document = example["inputs_pretokenized"]
    else:
      return example  # refused, with the names it has, when batches are made
    text = tf.strings.join([before, document, after])
    tokens = tf.cast(feature.vocabulary.encode_tf(text), feature.dtype)
    if feature.add_eos:
      eos = tf.constant([feature.vocabulary.eos_id], feature.dtype)
      tokens = tf.concat([tokens, eos], 0)
    return example | {"document": document, "inputs": tokens}

  return task.replace(
    preprocessors=[*task.preprocessors, seqio.map_over_dataset(fill)]
  )


def train_batches(
  task: Any,
  split: str,
  numbering: Numbering,
  *,
  source_length: int,
  target_length: int,
  tokenise: Tokenise | None = None,
) -> Iterator[Batch]:
  """Yields the rows of one process of global batches start, start + 1, ...

  The stream has no end. Batches run on from one epoch into the next, so a split
  smaller than a batch repeats within it. Global batch k is a function of (task,
  split, batch_size, seed, k), whatever `start` and `process_count` are, as long
  as nobody calls tf.random.set_seed.

  Args:
    task: a seqio.Task whose preprocessors make one example of each.
    split: its split.
    numbering: of the batches.
    source_length: S, tokens; longer inputs are cut.
    target_length: T, tokens; longer targets are cut.
    tokenise: makes the batches of the task's texts; None takes its tokens.

  Returns:
    An iterator over batches of b = B / P rows.

  Raises:
    ValueError: the split is absent or empty, or the task can't be used.
  """
  tf, _ = import_seqio()
  raw, count = _raw(task, split)
  batch_size, rows = numbering.batch_size, numbering.rows
  first_epoch, skip = divmod(numbering.start * batch_size, count)
  texts = any(spec.dtype == tf.string for spec in raw.element_spec.values())
  buffer = _SHUFFLE_BUFFER if texts else _SHUFFLE_BUFFER_NUMBERS

  def epoch(number):
    return raw.shuffle(
      min(count, buffer),
      # Distinct for seeds below a million.
      seed=number * 1_000_003 + numbering.seed,
      reshuffle_each_iteration=False,
    )

  def is_mine(number, _):
    return number % batch_size // rows == numbering.process_index

  epochs = tf.data.Dataset.range(first_epoch, 2**31)
  examples = epochs.flat_map(epoch).skip(skip)
  if numbering.process_count > 1:
    examples = examples.enumerate().filter(is_mine).map(lambda _, own: own)
  return _batches(task, examples, rows, source_length, target_length, tokenise)


def eval_batch(
  task: Any,
  split: str,
  *,
  num_examples: int,
  source_length: int,
  target_length: int,
  tokenise: Tokenise | None = None,
) -> Batch:
  """Reads the first examples of a split, in order; args as of `train_batches`.

  Returns:
    One batch of b = num_examples rows.

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
    _batches(
      task, examples, num_examples, source_length, target_length, tokenise
    )
  )


def count(task: Any, split: str) -> int:
  """Examples of a split.

  Raises:
    ValueError: the split is absent or empty, or can't be read.
  """
  return _raw(task, split)[1]


def _raw(task: Any, split: str) -> tuple[Any, int]:
  """A split's examples before preprocessing, in order, and their number."""
  tf, _ = import_seqio()
  if split not in task.splits:
    raise ValueError(
      f"task {task.name!r} has no split {split!r}; it has "
      f"{', '.join(task.splits) or 'none'}."
    )
  try:
    raw = task.source.get_dataset(split=split, shuffle=False)
  except ValueError:
    raise
  except Exception as error:  # a source may be the user's or TFDS's code
    prepare = ""
    if task.name in corpora.CORPORA:
      dataset, _, _ = corpora.CORPORA[task.name].dataset.partition(":")
      prepare = (
        f"; `tfds build {dataset}` prepares it, once, and data.tfds_data_dir "
        "says where it is"
      )
    raise ValueError(
      f"can't read split {split!r} of task {task.name!r}{prepare}: "
      f"{type(error).__name__}: {error}"
    ) from error
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
  task: Any,
  examples: Any,
  rows: int,
  source_length: int,
  target_length: int,
  tokenise: Tokenise | None,
) -> Iterator[Batch]:
  """Tokenises, trims, pads and batches raw examples."""
  tf, _ = import_seqio()
  check_lengths(source_length, target_length)
  lengths = {"inputs": source_length, "targets": target_length}

  def preprocess(dataset):
    dataset = task.preprocess_precache(dataset)
    # One token more than there is room for tells what has to be cut.
    room = {key: length + 1 for key, length in lengths.items()}
    return task.preprocess_postcache(dataset, room)

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
    selected["cut"] = tf.size(selected["inputs"]) > source_length
    for key, length in lengths.items():
      tokens = tf.cast(selected[key], tf.int32)
      tail = tokens[length - 1 :]
      # Of what is longer, the last token is EOS, and stays.
      tail = tail[-1:] if task.output_features[key].add_eos else tail[:1]
      selected[key] = tf.concat([tokens[: length - 1], tail], 0)
    return selected

  options = tf.data.Options()
  options.deterministic = True
  # There is nothing to tune, and the tuner sleeps for up to a minute: an
  # iterator that is closed waits for it to wake.
  options.autotune.enabled = False
  padded = {key: [length] for key, length in lengths.items()}
  padded |= {"document": [], "reference": [], "cut": []}
  dataset = dataset.map(select).padded_batch(rows, padded).prefetch(2)
  read = _read(dataset.with_options(options))
  if tokenise is None:
    return read
  return (tokenise(batch.documents, batch.references) for batch in read)


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
      num_cut=int(batch["cut"].sum()),
    )


def fact_checker(
  task: str | None,
) -> Callable[[str, str], list[tuple[int, int]] | None] | None:
  """What finds the unsupported facts of a summary, as `newsroom.unsupported`
  does; None where the data of a config's data.task know no facts."""
  return newsroom.unsupported if task == "newsroom" else None

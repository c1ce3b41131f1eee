"""The batches that a config describes."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from clp_jax import sharding
from clp_jax.config import column
from clp_jax.data import jsonl, newsroom, reader, tasks
from clp_jax.data.reader import Batch, Reader
from clp_jax.data.tokenizer import Tokenizer, parse_template
from clp_jax.data.vocabulary import for_seqio
from clp_jax.errors import ConfigError, as_config_error


def _jsonl_rows(data: ml_collections.ConfigDict, pattern: str) -> jsonl.Rows:
  fields = (column(data, "document"), column(data, "reference"))
  return jsonl.read_rows(pattern, fields, conversations=True)


def _reader(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer, training: bool
) -> Reader | None:
  """Of data that are read by row number; None of what seqio reads.

  Raises:
    ConfigError: when a file is not valid, or there is no such split.
  """
  data = config.data
  with as_config_error():
    if data.train is not None:
      rows: reader.Rows = _jsonl_rows(
        data, data.train if training else data.eval
      )
    elif data.task == "newsroom" and not data.use_cached:
      rows = newsroom.rows(data.train_split if training else data.eval_split)
    else:
      return None
    template = parse_template(data.template)
    if template is not None:
      # What no prompt can be made of is said before anything starts.
      tokenizer.prompt("", template, data.source_length)
    return Reader(
      rows, tokenizer, template, data.source_length, data.target_length
    )


def _task(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> tuple[Any, tasks.Tokenise | None]:
  """The seqio Task that a config names, and what tokenises its texts, if that
  is not seqio itself.

  Raises:
    ConfigError: when there is no such task, or it can't be tokenised so.
  """
  data = config.data
  with as_config_error():
    template = parse_template(data.template)
    if template is not None:
      tokenizer.prompt("", template, data.source_length)  # says why it can't
    vocabulary = for_seqio(tokenizer)
    if vocabulary is not None:
      task = tasks.get_task(data.task, vocabulary, data.tfds_data_dir)
      if data.use_cached:
        task = tasks.from_cache(task, tuple(data.cache_dirs))
      if template is not None:
        task = tasks.with_template(task, str(template))
      return task, None
    if data.use_cached:
      raise ConfigError(
        "data.use_cached holds tokens of a SentencePiece model, which "
        f"{config.model.init} has not; set it to False."
      )

    def tokenise(documents: list[str], references: list[str]) -> Batch:
      rows = list(zip(documents, references, strict=True))
      lengths = (data.source_length, data.target_length)
      return Reader(rows, tokenizer, template, *lengths).batch(range(len(rows)))

    task = tasks.get_task(data.task, data_dir=data.tfds_data_dir)
    return tasks.of_texts(task), tokenise


def check_data(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer | None = None
) -> None:
  """Reads through JSONL files, so that a bad one stops a run before it starts.

  Args:
    config: see config.py; reads `data`.
    tokenizer: whose chat template is to show the conversations; None asks for
      no template.

  Raises:
    ConfigError: names the file and the line.
  """
  data = config.data
  with as_config_error():
    for pattern in (data.train, data.eval):
      if pattern is None:
        continue
      rows = _jsonl_rows(data, pattern)
      if tokenizer is None:
        continue
      for row in rows.conversations:
        try:
          tokenizer.check(rows[row][0], data.template)
        except ValueError as error:
          raise ConfigError(f"{rows.place(row)}: {error}") from error


def train_batches(
  config: ml_collections.ConfigDict,
  tokenizer: Tokenizer,
  batch_size: int,
  start: int,
  mesh: Mesh,
) -> Iterator[Batch]:
  """This process's rows of global batches start, start + 1, ...

  Processes whose devices share a place on the data axis read the same rows.

  What is cut of the first of them is logged.

  Args:
    config: a training config; reads `data` and `seed`.
    tokenizer: of the model.
    batch_size: B, of the global batch.
    start: number of the first batch.
    mesh: whose data axis cuts the batch.

  Raises:
    ConfigError: when the data can't be had or is empty.
  """
  index, count = sharding.process_share(mesh, batch_size)
  data = config.data
  by_number = _reader(config, tokenizer, training=True)
  with as_config_error():
    numbering = reader.Numbering(batch_size, config.seed, start, index, count)
    if by_number is not None:
      batches = reader.train_batches(by_number, numbering)
    else:
      task, tokenise = _task(config, tokenizer)
      batches = tasks.train_batches(
        task,
        data.train_split,
        numbering,
        source_length=data.source_length,
        target_length=data.target_length,
        tokenise=tokenise,
      )
  return _logged(batches, data.source_length)


def eval_batch(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer, num_examples: int
) -> Batch:
  """The first num_examples of the held-out ones that the config's `data` names,
  in order, the same on every process.

  Raises:
    ConfigError: when there are fewer, or the data can't be had.
  """
  _check_held_out(config)
  data = config.data
  by_number = _reader(config, tokenizer, training=False)
  with as_config_error():
    if by_number is not None:
      what = data.eval if data.train is not None else repr(data.eval_split)
      return reader.eval_batch(by_number, num_examples, what)
    task, tokenise = _task(config, tokenizer)
    return tasks.eval_batch(
      task,
      data.eval_split,
      num_examples=num_examples,
      source_length=data.source_length,
      target_length=data.target_length,
      tokenise=tokenise,
    )


def count_held_out(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> int:
  """How many held-out examples there are.

  Raises:
    ConfigError: when there are none, or the data can't be had.
  """
  _check_held_out(config)
  by_number = _reader(config, tokenizer, training=False)
  if by_number is not None:
    return len(by_number.rows)
  with as_config_error():
    return tasks.count(_task(config, tokenizer)[0], config.data.eval_split)


def _check_held_out(config):
  if config.data.train is not None and config.data.eval is None:
    raise ConfigError(
      "data.eval is not set; give a JSONL file of held-out documents."
    )


def _logged(batches: Iterator[Batch], source_length: int) -> Iterator[Batch]:
  for number in itertools.count():
    with as_config_error():  # a chat template may refuse a row
      batch = next(batches)
    if number == 0 and batch.num_cut and jax.process_index() == 0:
      logging.warning(
        "%d of the first %d inputs are longer than data.source_length = %d "
        "tokens, and are cut",
        batch.num_cut,
        len(batch.documents),
        source_length,
      )
    yield batch

"""The batches that a config describes."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from clp_jax import config as config_lib
from clp_jax import sharding
from clp_jax.data import jsonl, tasks
from clp_jax.data.vocabulary import for_seqio


def load_task(config: ml_collections.ConfigDict, vocabulary: Any) -> Any:
  """The seqio Task of a config's `data`: a named one, or its JSONL files.

  Args:
    config: a training config; reads `data`.
    vocabulary: of the model.

  Raises:
    ConfigError: when there is no such task, or a file is not valid.
  """
  data = config.data
  with config_lib.as_config_error():
    if data.train is not None:
      task = jsonl.make_task(
        train=data.train,
        evaluation=data.eval,
        document_field=data.document_field,
        reference_field=data.reference_field,
        vocabulary=for_seqio(vocabulary),
      )
    else:
      task = tasks.get_task(data.task, for_seqio(vocabulary))
      if data.use_cached:
        task = tasks.from_cache(task, tuple(data.cache_dirs))
    if data.template is not None:
      task = tasks.with_template(task, data.template)
    return task


def check_data(config: ml_collections.ConfigDict) -> None:
  """Reads through JSONL files, so that a bad one stops a run before it starts.

  Raises:
    ConfigError: names the file and the line.
  """
  data = config.data
  fields = (data.document_field, data.reference_field)
  with config_lib.as_config_error():
    for pattern in (data.train, data.eval):
      if pattern is not None:
        jsonl.read_rows(pattern, fields)


def train_batches(
  config: ml_collections.ConfigDict,
  vocabulary: Any,
  batch_size: int,
  start: int,
  mesh: Mesh,
) -> Iterator[tasks.Batch]:
  """This process's rows of global batches start, start + 1, ...

  Processes whose devices share a place on the data axis read the same rows.

  What is cut of the first of them is logged.

  Args:
    config: a training config; reads `data` and `seed`.
    vocabulary: of the model.
    batch_size: B, of the global batch.
    start: number of the first batch.
    mesh: whose data axis cuts the batch.

  Raises:
    ConfigError: when the data can't be had or is empty.
  """
  task = load_task(config, vocabulary)
  index, count = sharding.process_share(mesh, batch_size)
  with config_lib.as_config_error():
    batches = tasks.train_batches(
      task,
      config.data.train_split,
      batch_size=batch_size,
      source_length=config.data.source_length,
      target_length=config.data.target_length,
      seed=config.seed,
      start=start,
      process_index=index,
      process_count=count,
    )
  return _logged(batches, config.data.source_length)


def eval_batch(
  config: ml_collections.ConfigDict, vocabulary: Any, num_examples: int
) -> tasks.Batch:
  """The first held-out examples, in order, the same on every process.

  Args:
    config: a training config; reads `data`.
    vocabulary: of the model.
    num_examples: how many.

  Raises:
    ConfigError: when there are fewer, or the data can't be had.
  """
  _check_held_out(config)
  task = load_task(config, vocabulary)
  with config_lib.as_config_error():
    return tasks.eval_batch(
      task,
      config.data.eval_split,
      num_examples=num_examples,
      source_length=config.data.source_length,
      target_length=config.data.target_length,
    )


def count_held_out(config: ml_collections.ConfigDict, vocabulary: Any) -> int:
  """How many held-out examples there are.

  Raises:
    ConfigError: when there are none, or the data can't be had.
  """
  _check_held_out(config)
  task = load_task(config, vocabulary)
  with config_lib.as_config_error():
    return tasks.count(task, config.data.eval_split)


def _check_held_out(config):
  if config.data.train is not None and config.data.eval is None:
    raise config_lib.ConfigError(
      "data.eval is not set; give a JSONL file of held-out documents."
    )


def _logged(
  batches: Iterator[tasks.Batch], source_length: int
) -> Iterator[tasks.Batch]:
  for number, batch in enumerate(batches):
    if number == 0 and batch.num_cut and jax.process_index() == 0:
      logging.warning(
        "%d of the first %d inputs are longer than data.source_length = %d "
        "tokens, and are cut",
        batch.num_cut,
        len(batch.documents),
        source_length,
      )
    yield batch

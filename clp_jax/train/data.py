"""The training batches that a config describes."""

from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from clp_jax import config as config_lib
from clp_jax.data import tasks


def train_batches(
  config: ml_collections.ConfigDict,
  vocabulary: Any,
  batch_size: int,
  start: int,
) -> Iterator[tasks.Batch]:
  """This process's rows of global batches start, start + 1, ...

  Args:
    config: a training config; reads `data` and `seed`.
    vocabulary: of the model.
    batch_size: B, of the global batch.
    start: number of the first batch.

  Raises:
    ConfigError: when the data can't be had or is empty.
  """
  with config_lib.as_config_error():
    return tasks.train_batches(
      tasks.get_task(config.data.task, vocabulary),
      config.data.train_split,
      batch_size=batch_size,
      source_length=config.data.source_length,
      target_length=config.data.target_length,
      seed=config.seed,
      start=start,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

"""Where a run's metrics go: metrics.jsonl and TensorBoard, from process 0."""

import json
import math
import time
from collections.abc import Mapping

import jax
from etils import epath

# Steps between points in TensorBoard: writing one takes milliseconds, which
# was a third of a small run's time. metrics.jsonl has every step.
TENSORBOARD_EVERY = 10
# In a bucket a file can't grow: each flush writes it anew.
SECONDS_BETWEEN_UPLOADS = 10.0


class MetricsWriter:
  """Appends a row a step; a resumed run continues as if never interrupted.

  Keys that measure time start with "perf/": they alone differ between two runs
  of the same config.
  """

  def __init__(self, workdir: str, step: int):
    """Opens the files, dropping rows of steps after `step`.

    Rows past the restored checkpoint were written by a run that was killed;
    the steps are about to run again.
    """
    self._enabled = jax.process_index() == 0
    if not self._enabled:
      return
    # Lazily: TensorBoard's writer imports TensorFlow.
    from clu import metric_writers

    path = epath.Path(workdir)
    self._path = path / "metrics.jsonl"
    kept = []
    if self._path.exists():
      for line in self._path.read_text().splitlines():
        try:
          row = json.loads(line)
        except ValueError:
          continue  # the line a killed run was writing
        if row["step"] <= step:
          kept.append(line + "\n")
    partial = path / ".metrics.jsonl.partial"
    partial.write_text("".join(kept))
    partial.replace(self._path)
    self._file = self._path.open("a")
    self._in_bucket = "://" in str(workdir)
    self._flushed = time.monotonic()
    self._tensorboard = metric_writers.SummaryWriter(str(path / "metrics"))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one row; non-finite values become null."""
    if not self._enabled:
      return
    row = {"step": step} | {
      key: value if math.isfinite(value) else None
      for key, value in values.items()
    }
    self._file.write(json.dumps(row) + "\n")
    now = time.monotonic()
    if not self._in_bucket or now - self._flushed >= SECONDS_BETWEEN_UPLOADS:
      self.flush()
    if step % TENSORBOARD_EVERY == 0:
      self._tensorboard.write_scalars(step, dict(values))

  def flush(self) -> None:
    """Lets no row be lost; due before a checkpoint, which they belong to."""
    if self._enabled:
      self._file.flush()
      self._flushed = time.monotonic()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Shows texts in TensorBoard."""
    if self._enabled:
      self._tensorboard.write_texts(step, dict(texts))

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    """Flushes and closes both."""
    if self._enabled:
      self._file.close()
      self._tensorboard.close()

"""Where a run's metrics go, from process 0: metrics.jsonl, TensorBoard, and
Weights & Biases for those who ask."""

import json
import math
import os
import secrets
import socket
import time
from collections.abc import Mapping

import jax
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util

from clp_jax.errors import ConfigError, RunError
from clp_jax.interop import storage

# Steps between points in TensorBoard: writing one takes milliseconds, which
# was a third of a small run's time. metrics.jsonl has every step.
TENSORBOARD_EVERY = 10
# In a bucket a file can't grow: each flush writes it anew.
SECONDS_BETWEEN_UPLOADS = 10.0


class EventFile:
  """A file of TensorBoard's, written without TensorFlow, which its own writer
  imports."""

  def __init__(self, folder: epath.Path):
    """Makes a new file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
    self._file = (folder / f"events.out.tfevents.{name}").open("wb")
    self._records = record_writer.RecordWriter(self._file)
    self._write(event_pb2.Event(file_version="brain.Event:2"))

  def _write(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    self._records.write(event.SerializeToString())

  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """A point of each curve."""
    summary = summary_pb2.Summary()
    for tag, value in values.items():
      summary.value.add(tag=tag, simple_value=value)
    self._write(event_pb2.Event(step=step, summary=summary))

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Texts, as markdown."""
    summary = summary_pb2.Summary()
    described = text_plugin.create_summary_metadata("", "")
    for tag, text in texts.items():
      tensor = tensor_util.make_tensor_proto([text.encode()])
      summary.value.add(tag=tag, metadata=described, tensor=tensor)
    self._write(event_pb2.Event(step=step, summary=summary))

  def flush(self) -> None:
    """Lets a TensorBoard that is open see what was written."""
    self._file.flush()

  def close(self) -> None:
    """Flushes and closes it."""
    self._file.close()


class WandbRun:
  """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine.

  A run that is resumed goes on under its id, which the folder keeps. Steps that
  are run again are there already, with the same values, and are dropped.
  """

  def __init__(self, workdir: str, project: str):
    """Starts or resumes it.

    Raises:
      ConfigError: the package is not installed.
      RunError: without a login, or when the service can't be reached.
    """
    try:
      import wandb
    except ImportError as error:
      raise ConfigError(
        f"wandb.project = {project}, but wandb is not installed; pip install "
        "'clp_jax[wandb]', or set wandb.project=None."
      ) from error
    path = epath.Path(workdir)
    id_file = path / "wandb_id"
    if not id_file.exists():
      storage.write_whole(id_file, secrets.token_hex(4).encode())
    try:
      self._run = wandb.init(
        project=project,
        id=id_file.read_text(),
        name=path.name,
        config=json.loads((path / "config.json").read_text()),
        dir=None if "://" in str(workdir) else workdir,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", save_code=False),
      )
    except wandb.Error as error:
      raise RunError(
        f"wandb.project = {project}: {error} Log in with `wandb login`, set "
        "WANDB_MODE=offline, or set wandb.project=None."
      ) from error

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """A point of each curve."""
    self._run.log(dict(values), step=step)

  def close(self, failed: bool) -> None:
    """Sends what is left."""
    self._run.finish(exit_code=int(failed))


class MetricsWriter:
  """Appends a row a step; a resumed run continues as if never interrupted.

  Keys that measure time start with "perf/": they alone differ between two runs
  of the same config.
  """

  def __init__(self, workdir: str, step: int, project: str | None = None):
    """Opens the files, dropping rows of steps after `step`.

    Rows past the restored checkpoint were written by a run that was killed;
    the steps are about to run again.

    Args:
      workdir: the run's folder.
      step: that it goes on from.
      project: of Weights & Biases; None writes nothing there.

    Raises:
      ConfigError, RunError: see `WandbRun`.
    """
    self._enabled = jax.process_index() == 0
    if not self._enabled:
      return
    self._wandb = None if project is None else WandbRun(workdir, project)
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
    storage.write_whole(self._path, "".join(kept).encode())
    self._file = self._path.open("a")
    self._in_bucket = "://" in str(workdir)
    self._flushed = time.monotonic()
    self._tensorboard = EventFile(path / "metrics")

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
      self._tensorboard.write_scalars(step, values)
    if self._wandb is not None:
      self._wandb.write(step, values)

  def flush(self) -> None:
    """Lets no row be lost; due before a checkpoint, which they belong to."""
    if self._enabled:
      self._file.flush()
      self._tensorboard.flush()
      self._flushed = time.monotonic()

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Shows texts in TensorBoard."""
    if self._enabled:
      self._tensorboard.write_texts(step, texts)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    """Flushes and closes all."""
    if self._enabled:
      self._file.close()
      self._tensorboard.close()
      if self._wandb is not None:
        self._wandb.close(failed=error is not None)

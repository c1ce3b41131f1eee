"""A run of no steps is a run; TensorBoard shows one that is under way, and
Weights & Biases has what metrics.jsonl has."""

import contextlib
import json
import math
import struct
import sys
import time

import jax.numpy as jnp
import pytest
import runs
import wandb
from tensorboard.backend.event_processing import event_accumulator
from wandb.proto import wandb_internal_pb2

from clp_jax.errors import ConfigError, RunError
from clp_jax.train import loop, metrics


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "critic/loss"])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run(name, tmp_path):
  finite = {"loss": 1.0, "gradient_norm": 2.0, "critic/loss": 3.0}
  with metrics.MetricsWriter(str(tmp_path), 0) as writer:
    for value, raises in (
      (0.5, contextlib.nullcontext()),
      (math.nan, pytest.raises(RunError, match=f"{name} is nan at step 7")),
    ):
      found = {n: jnp.float32(x) for n, x in (finite | {name: value}).items()}
      with raises:
        loop._write(
          writer, 7, loop.Step(state=None, metrics=found, tokens=1), 1
        )


@pytest.mark.parametrize(("share", "shown"), [(0.0, False), (0.25, True)])
def test_cut_inputs_are_logged_and_on_the_screen_where_there_are_some(
  share, shown, tmp_path
):
  found = {"loss": jnp.float32(1), "cut_inputs": share}
  with metrics.MetricsWriter(str(tmp_path), 0) as writer:
    step = loop.Step(state=None, metrics=found, tokens=1)
    assert ("cut_inputs" in loop._write(writer, 1, step, 1)) == shown
  assert runs.metrics(tmp_path)[0]["cut_inputs"] == share


@pytest.mark.slow
def test_a_run_of_0_steps_can_be_evaluated_and_trained_on(sft_run, tmp_path):
  workdir = tmp_path / "run"

  def train(steps):
    status, _, err = runs.clp(
      *runs.train_arguments(workdir, sft_run, **{"train.steps": steps})
    )
    assert status == 0, err

  train(0)
  assert runs.checkpoint_steps(workdir) == [0]
  status, _, err = runs.clp("evaluate", "--workdir", workdir)
  assert status == 0, err
  front = json.loads((workdir / "evaluation" / "front.json").read_text())
  assert front["step"] == 0 and front["training_samples"] == 0
  # It is the reference at every weighting.
  assert max(abs(p["kl"]["mean"]) for p in front["points"]) < 1e-4
  train(2)
  assert runs.checkpoint_steps(workdir)[-1] == 2


def test_tensorboard_shows_a_run_under_way(tmp_path):
  accumulator = event_accumulator.EventAccumulator(str(tmp_path / "metrics"))
  with metrics.MetricsWriter(str(tmp_path), 0) as writer:
    for step in (10, 20):
      writer.write(step, {"loss": step / 4, "perf/x": 1.0})
    writer.write_texts(20, {"response": "Zürich"})
    writer.flush()
    accumulator.Reload()
    points = [(p.step, p.value) for p in accumulator.Scalars("loss")]
    assert points == [(10, 2.5), (20, 5.0)]
    (text,) = accumulator.Tensors("response")
    assert text.tensor_proto.string_val == ["Zürich".encode()]


def wandb_rows(workdir):
  """(id, config, [(step, {metric: value})]) of each offline run's file."""
  found = []
  for path in sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb")):
    content, start = path.read_bytes(), 7  # of a log as LevelDB's
    name, config, rows = None, {}, []
    while start + 7 <= len(content):
      _, size, kind = struct.unpack_from("<IHB", content, start)
      assert kind == 1  # whole: the file is shorter than a block
      data = content[start + 7 : start + 7 + size]
      if len(data) < size:  # is being written
        break
      start += 7 + size
      record = wandb_internal_pb2.Record.FromString(data)
      if record.HasField("run"):
        name = record.run.run_id
        config = {u.key: u.value_json for u in record.run.config.update}
      if record.HasField("history"):
        values = {
          item.key or ".".join(item.nested_key): json.loads(item.value_json)
          for item in record.history.item
        }
        own = {k: v for k, v in values.items() if not k.startswith("_")}
        rows.append((values["_step"], own))
    found.append((name, config, rows))
  return found


def test_wandb_has_the_metrics_of_a_run_and_of_its_resumption(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("WANDB_MODE", "offline")
  wandb.teardown()
  (tmp_path / "config.json").write_text('{"seed": 7, "data": {"train": "x"}}')
  for start in (0, 2):
    with metrics.MetricsWriter(str(tmp_path), start, "steering") as writer:
      for step in (start + 1, start + 2):
        writer.write(step, {"loss": step / 4, "reward/nli": 0.5})
  # Another process writes them, which may take a while.
  end = time.monotonic() + 30
  while sum(len(rows) for *_, rows in wandb_rows(tmp_path)) < 4:
    assert time.monotonic() < end
    time.sleep(0.1)
  (first, config, rows), (second, _, more) = wandb_rows(tmp_path)
  assert first == second == (tmp_path / "wandb_id").read_text()
  assert config["seed"] == "7"
  assert rows + more == [
    (s, {"loss": s / 4, "reward/nli": 0.5}) for s in (1, 2, 3, 4)
  ]


def test_wandb_says_what_it_lacks(tmp_path, monkeypatch):
  (tmp_path / "config.json").write_text("{}")
  monkeypatch.setenv("HOME", str(tmp_path))  # no login
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  monkeypatch.setenv("WANDB_MODE", "online")
  wandb.teardown()  # it reads the environment once a process
  with pytest.raises(RunError, match="wandb login.*WANDB_MODE=offline"):
    metrics.MetricsWriter(str(tmp_path), 0, "steering")
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ConfigError, match=r"pip install 'clp_jax\[wandb\]'"):
    metrics.MetricsWriter(str(tmp_path), 0, "steering")

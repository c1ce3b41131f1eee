"""One job of 2 processes: the same training, stopped and killed."""

import os
import signal

import jax
import numpy as np
import pytest
import runs

from clp_jax import batches, demo, sharding
from clp_jax.data import newsroom_text, vocabulary


def end(pair):
  """Kills what is left of a pair."""
  for process in pair:
    process.kill()
    process.communicate()


def start_training(arguments, workdir, rows, **settings):
  """A pair that has come to so many rows of metrics.

  Gloo, which stands in for a slice's network, gives processes 30 s to meet. On
  a busy machine one may compile for so much longer than the other; the next try
  finds the compiled programs in JAX's cache.
  """
  for _ in range(4):
    pair = runs.start_pair(arguments, **settings)
    runs.wait_for_rows(workdir, rows, *pair)
    if all(process.poll() in (None, 0) for process in pair):
      return pair
    for process in pair:
      process.kill()
    said = [process.communicate()[1] for process in pair]
    if not any("Gloo context initialization failed" in err for err in said):
      break
  pytest.fail("\n".join(said))


@pytest.mark.slow
@pytest.mark.parametrize(
  "algorithm",
  [{}, {"algorithm": "ppo", "rollout.ahead": 1}],
  ids=["reinforce", "ahead"],
)
def test_a_reward_that_fails_on_one_process_ends_both_with_their_steps_saved(
  algorithm, sft_run, tmp_path, monkeypatch
):
  (tmp_path / "outage.py").write_text(
    "import jax\n"
    "calls = []\n"
    "def judged(documents, references, responses):\n"
    "  calls.append(0)\n"
    "  if jax.process_index() == 1 and len(calls) > 3:\n"
    "    raise ConnectionError('the judge is down')\n"
    "  return [0.37 * len(text) for text in responses]\n"
  )
  monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
  workdir = tmp_path / "run"
  fields = {"rewards.nli.source": "outage:judged", "train.steps": 6}
  arguments = runs.train_arguments(
    workdir, sft_run, **fields, **algorithm, **{"train.checkpoint_every": 6}
  )
  pair = start_training(arguments, workdir, rows=3)
  try:
    (_, first), (_, second) = (runs.finish(p, status=1) for p in pair)
  finally:
    end(pair)
  assert "a reward failed at step 3 on another process" in first
  assert "'nli' at step 3 raised ConnectionError: the judge is down" in second
  for err in (first, second):
    assert "goes on from step 3." in err.splitlines()[-1]
  assert runs.checkpoint_steps(workdir) == [3]
  monkeypatch.syspath_prepend(str(tmp_path))
  status, _, err = runs.clp(*arguments)  # 8 devices of one process
  assert status == 0, err
  assert runs.checkpoint_steps(workdir) == [3, 6]


@pytest.mark.slow
def test_2_processes_stop_together_and_train_as_1_device_does(
  sft_run, tmp_path
):
  """20 steps on 2 x 4 devices, SIGTERM to one, on with 8 of one process."""
  workdir, alone = tmp_path / "two", tmp_path / "one"
  pair = start_training(
    # Far more steps than it will come to; they may differ when it resumes.
    runs.train_arguments(
      workdir, sft_run, **{"train.steps": 10_000, "train.checkpoint_every": 5}
    ),
    workdir,
    rows=19,
  )
  try:
    pair[1].send_signal(signal.SIGTERM)
    (out, first), (_, second) = (runs.finish(p, status=75) for p in pair)
  finally:
    end(pair)
  stopped_at = runs.checkpoint_steps(workdir)[-1]
  assert 20 <= len(runs.metrics(workdir)) == stopped_at < 10_000
  for err in (first, second):
    said = f"clp train: error: stopped by SIGTERM after {stopped_at} of"
    assert err.splitlines()[-1].startswith(said)
  # Only process 0 says how far they are; at which steps is up to the clock.
  assert "/10000 " in first
  assert "/10000 " not in second and str(workdir) not in out

  steps = {"train.steps": stopped_at + 2}
  steps["train.checkpoint_every"] = steps["train.steps"]
  reference = runs.start(runs.train_arguments(alone, sft_run, **steps))
  status, _, err = runs.clp(*runs.train_arguments(workdir, sft_run, **steps))
  assert status == 0, err
  runs.finish(reference)
  a, b = runs.metrics(alone), runs.metrics(workdir)
  assert [row["step"] for row in b] == list(range(1, 1 + len(a)))
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_both_resume(
  victim, sft_run, tmp_path
):
  """SIGKILL: the survivor must not wait for ever; the restart loses nothing."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  fields = {"train.checkpoint_every": 4, "train.keep": 2}
  # Far more steps than it will come to.
  endless = {"train.steps": 100_000} | fields
  arguments = runs.train_arguments(killed, sft_run, **endless)
  pair = start_training(arguments, killed, rows=10, devices=2, heartbeat=20)
  try:
    pair[victim].kill()
    _, err = pair[1 - victim].communicate(timeout=300)
    assert pair[1 - victim].returncode in (1, -signal.SIGABRT), err
  finally:
    end(pair)
  fields["train.steps"] = runs.checkpoint_steps(killed)[-1] + 6
  for workdir in (killed, whole):
    arguments = runs.train_arguments(workdir, sft_run, **fields)
    pair = start_training(arguments, workdir, rows=1, devices=2)
    try:
      for process in pair:
        runs.finish(process)
    finally:
      end(pair)
  runs.assert_same_run(whole, killed, fields["train.steps"])


@pytest.mark.slow
@pytest.mark.parametrize(
  "fields",
  [{"mesh.data": 1, "mesh.model": 4}, {"mesh.model": 2, "mesh.fsdp": True}],
  ids=["model 4", "data 2 x model 2, fsdp"],
)
@pytest.mark.parametrize("preset", runs.PRESETS)
def test_2_processes_train_as_1_on_any_mesh(preset, fields, sft_runs, tmp_path):
  """Where all devices are on the model axis, both hold, and score, all rows."""
  sft_run = sft_runs(preset)
  fields = {"train.steps": 3} | fields
  two, one = tmp_path / "two", tmp_path / "one"
  pair = start_training(
    runs.train_arguments(two, sft_run, **fields), two, rows=1, devices=2
  )
  try:
    for process in pair:
      runs.finish(process)
  finally:
    end(pair)
  runs.finish(
    runs.start(runs.train_arguments(one, sft_run, **fields), devices=4)
  )
  for x, y in zip(runs.metrics(one), runs.metrics(two), strict=True):
    for name in x:
      np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-5)


def test_a_process_reads_the_rows_that_its_devices_hold(tmp_path, monkeypatch):
  config = demo.get_config()
  (tmp_path / "words.model").write_bytes(newsroom_text.vocabulary_bytes())
  words = vocabulary.read(tmp_path / "words.model")
  mesh = sharding.make_mesh()

  def documents():
    stream = batches.train_batches(config, words, 8, 3, mesh)
    return next(stream).documents

  whole = documents()
  monkeypatch.setattr(sharding, "process_rows", lambda mesh, rows: (4, 6))
  assert len(whole) == 8 and documents() == whole[4:6]


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_one_full_disk_of_2_ends_both_and_loses_nothing(
  full, sft_run, tmp_path
):
  """With FSDP, so that the second process has something to write."""
  workdir = tmp_path / "run"

  def arguments(steps):
    fields = {"train.steps": steps, "mesh.fsdp": True}
    return runs.train_arguments(workdir, sft_run, **fields)

  status, _, err = runs.clp(*arguments(2))
  assert status == 0, err
  before = runs.load(workdir, 2)
  limits = [None, None]
  limits[full] = 100_000
  pair = runs.start_pair(arguments(4), heartbeat=20, file_limits=limits)
  try:
    _, err = runs.finish(pair[full], status=1)
    assert "can't save to" in err.splitlines()[-1]
    assert "Free space" in err.splitlines()[-1]
    _, err = pair[1 - full].communicate(timeout=300)
    assert pair[1 - full].returncode in (1, -signal.SIGABRT), err
  finally:
    end(pair)
  assert runs.checkpoint_steps(workdir) == [2]
  for x, y in zip(before, runs.load(workdir, 2), strict=True):
    jax.tree.map(np.testing.assert_array_equal, x, y)

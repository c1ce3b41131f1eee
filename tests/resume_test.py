"""Runs that are stopped, killed or spread over processes end the same."""

import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs


def load(workdir, step):
  """Everything that a checkpoint holds, as it is on disk."""
  manager = ocp.CheckpointManager(pathlib.Path(workdir) / "checkpoints")
  items = manager.restore(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardRestore(),
      train=ocp.args.StandardRestore(),
      data=ocp.args.JsonRestore(),
    ),
  )
  manager.close()
  return items.params, items.train, items.data


def assert_equal_leaves(p, q):
  if hasattr(p, "dtype") and jax.dtypes.issubdtype(
    p.dtype, jax.dtypes.prng_key
  ):
    p, q = jax.random.key_data(p), jax.random.key_data(q)
  np.testing.assert_array_equal(p, q)


def assert_same_run(a, b, step):
  for x, y in zip(load(a, step), load(b, step), strict=True):
    jax.tree.map(assert_equal_leaves, x, y)
  assert runs.metrics(a) == runs.metrics(b)


def wait_for_rows(process, workdir, rows):
  """Until metrics.jsonl has so many rows or the process has ended."""
  file = pathlib.Path(workdir) / "metrics.jsonl"
  while process.poll() is None:
    if file.exists() and file.read_text().count("\n") >= rows:
      return
    time.sleep(0.01)


def finish(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "Traceback" not in err
  return out, err


def test_4_steps_are_2_and_a_restart_and_2_bit_for_bit(sft_run, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  normalise = {"rewards.nli.normalise": "running"}  # statistics count too
  for workdir, steps in ((whole, 4), (parts, 2), (parts, 4)):
    status, _, err = runs.clp(
      *runs.train_arguments(
        workdir, sft_run, **normalise, **{"train.steps": steps}
      )
    )
    assert status == 0, err
  assert runs.checkpoint_steps(parts) == [2, 4]
  assert_same_run(whole, parts, 4)


def test_killed_anywhere_a_run_ends_as_if_never_killed(sft_run, tmp_path):
  """SIGTERM, then SIGKILL at three moments, one of them during a save."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  fields = {"train.steps": 24, "train.checkpoint_every": 4, "train.keep": 2}
  uninterrupted = runs.start(runs.train_arguments(whole, sft_run, **fields))
  arguments = runs.train_arguments(killed, sft_run, **fields)

  process = runs.start(arguments)
  wait_for_rows(process, killed, 2)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 75, err
  assert "stopped by SIGTERM after" in err.splitlines()[-1]
  (stopped_at,) = runs.checkpoint_steps(killed)
  assert 0 < stopped_at < 24

  for rows in (stopped_at + 1, 12, 19):
    process = runs.start(arguments)
    wait_for_rows(process, killed, rows)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  finish(runs.start(arguments))
  finish(uninterrupted)
  assert_same_run(whole, killed, 24)
  assert len(runs.metrics(killed)) == 24


def test_2_processes_train_as_1_does(sft_run, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  alone = runs.start(runs.train_arguments(one, sft_run))
  finish(alone)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  pair = [
    runs.start(
      [
        *runs.train_arguments(two, sft_run),
        *("--coordinator", f"127.0.0.1:{port}"),
        *("--num-processes", 2, "--process-id", i),
      ],
      devices=4,
    )
    for i in range(2)
  ]
  try:
    for process in pair:
      finish(process)
  finally:
    for process in pair:  # the one that waits for a dead one
      process.kill()
  a, b = runs.metrics(one), runs.metrics(two)
  assert [row["step"] for row in b] == [1, 2, 3, 4]
  for x, y in zip(a, b, strict=True):
    for name in x:
      np.testing.assert_allclose(x[name], y[name], rtol=2e-3, atol=2e-4)
  # What two processes wrote, one reads.
  status, _, err = runs.clp("evaluate", "--workdir", two)
  assert status == 0, err


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(sft_run, tmp_path):
  workdir = tmp_path / "run"
  arguments = runs.train_arguments(workdir, sft_run, **{"train.steps": 2})
  status, _, err = runs.clp(*arguments)
  assert status == 0, err
  before = load(workdir, 2)
  process = runs.start(
    runs.train_arguments(workdir, sft_run), devices=8, file_limit=200_000
  )
  _, err = process.communicate(timeout=300)
  assert process.returncode == 1, err
  assert "Traceback" not in err
  last = err.splitlines()[-1]
  assert "can't save to" in last and "Free space" in last
  assert runs.checkpoint_steps(workdir) == [2]
  for x, y in zip(before, load(workdir, 2), strict=True):
    jax.tree.map(assert_equal_leaves, x, y)


def test_a_step_that_cannot_be_read_falls_back_to_the_one_before(
  finished_run, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(finished_run, workdir)
  truncate(workdir / "checkpoints" / "4")
  arguments = runs.train_arguments(
    workdir, pathlib.Path(finished_run).parent / "sft"
  )
  process = runs.start(arguments, devices=8)
  _, err = finish(process)
  assert "checkpoint 4" in err and "trying the one before" in err
  assert_same_run(finished_run, workdir, 4)


def test_a_run_without_a_readable_step_is_an_error_that_loses_nothing(
  finished_run, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(finished_run, workdir)
  for step in (2, 4):
    truncate(workdir / "checkpoints" / str(step))
  before = sorted(p for p in workdir.rglob("*") if p.is_file())
  sft = pathlib.Path(finished_run).parent / "sft"
  status, _, err = runs.clp(*runs.train_arguments(workdir, sft))
  assert status == 1 and "Traceback" not in err
  last = err.splitlines()[-1]
  assert last.startswith("clp train: error: no checkpoint in")
  assert "Move the folder away" in last
  after = {p for p in workdir.rglob("*") if p.is_file()}
  assert set(before) <= after
  for command in (["evaluate"], ["generate", "--weights", "nli=1"]):
    status, _, err = runs.clp(*command, "--workdir", workdir)
    assert status == 1
    assert "checkpoint 4 in" in err.splitlines()[-1]


def truncate(folder):
  """Cuts every file of a checkpoint that holds array data in half."""
  for file in pathlib.Path(folder).rglob("*"):
    if file.is_file() and "/d/" in str(file):
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished_run(sft_run):
  workdir = pathlib.Path(sft_run).parent / "finished"
  status, _, err = runs.clp(*runs.train_arguments(workdir, sft_run))
  assert status == 0, err
  return workdir

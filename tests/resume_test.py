"""Runs that are stopped or killed end as if they never were."""

import contextlib
import json
import pathlib
import resource
import shutil
import signal

import jax
import ml_collections
import numpy as np
import pytest
import runs

from clp_jax import run_folder
from clp_jax.errors import ConfigError

AHEAD = {"algorithm": "ppo", "rollout.ahead": 1}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [{}, AHEAD], ids=["reinforce", "ahead"])
@pytest.mark.parametrize("preset", runs.PRESETS)
def test_4_steps_are_2_and_a_restart_and_2_bit_for_bit(
  preset, algorithm, sft_runs, tmp_path
):
  sft_run = sft_runs(preset)
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  fields = {"rewards.nli.normalise": "running"} | algorithm  # statistics, too
  for workdir, steps in ((whole, 4), (parts, 2), (parts, 4)):
    status, _, err = runs.clp(
      *runs.train_arguments(
        workdir, sft_run, **fields, **{"train.steps": steps}
      )
    )
    assert status == 0, err
  assert runs.checkpoint_steps(parts) == [2, 4]
  runs.assert_same_run(whole, parts, 4)


@pytest.mark.parametrize(
  ("preset", "algorithm"),
  [
    ("tiny", {}),
    pytest.param("tiny", AHEAD, marks=pytest.mark.slow),
    pytest.param("tiny-decoder", {}, marks=pytest.mark.slow),
  ],
  ids=["reinforce", "ahead", "decoder"],
)
def test_killed_anywhere_a_run_ends_as_if_never_killed(
  preset, algorithm, sft_runs, tmp_path
):
  """SIGTERM, then SIGKILL at two moments, whatever they interrupt."""
  sft_run = sft_runs(preset)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  fields = {"train.checkpoint_every": 3, "train.keep": 2} | algorithm
  fields["rewards.nli.normalise"] = "running"  # statistics count too
  # Far more steps than it will come to, however late a signal is.
  endless = runs.train_arguments(
    killed, sft_run, **fields, **{"train.steps": 100_000}
  )

  process = runs.start(endless, devices=8)
  runs.wait_for_rows(killed, 2, process)
  process.send_signal(signal.SIGTERM)
  _, err = runs.finish(process, status=75)
  assert "stopped by SIGTERM after" in err.splitlines()[-1]
  stopped_at = runs.checkpoint_steps(killed)[-1]
  assert len(runs.metrics(killed)) == stopped_at > 0

  for rows in (stopped_at + 1, stopped_at + 5):
    process = runs.start(endless, devices=8)
    runs.wait_for_rows(killed, rows, process)
    process.kill()
    runs.finish(process, status=-signal.SIGKILL)
  steps = runs.checkpoint_steps(killed)[-1] + 4
  for workdir in (killed, whole):
    status, _, err = runs.clp(
      *runs.train_arguments(
        workdir, sft_run, **fields, **{"train.steps": steps}
      )
    )
    assert status == 0, err
  runs.assert_same_run(whole, killed, steps)
  assert len(runs.metrics(killed)) == steps


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(clp_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(clp_run, workdir)
  before = runs.load(workdir, 4)
  sft = clp_run.parent / "sft"
  with file_limit(200_000):
    status, _, err = runs.clp(
      *runs.train_arguments(workdir, sft, **{"train.steps": 6})
    )
  assert status == 1, err
  assert "Traceback" not in err
  last = err.splitlines()[-1]
  assert "can't save to" in last and "Free space" in last
  assert runs.checkpoint_steps(workdir) == [2, 4]
  for x, y in zip(before, runs.load(workdir, 4), strict=True):
    jax.tree.map(np.testing.assert_array_equal, x, y)


@contextlib.contextmanager
def file_limit(size):
  """No file may have more bytes; writing fails as it does on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("begun", [True, False])
def test_two_processes_do_not_train_in_one_folder(begun, clp_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(clp_run, workdir) if begun else workdir.mkdir()
  arguments = runs.train_arguments(workdir, clp_run.parent / "sft")
  with run_folder.alone(str(workdir)):  # each opening has a lock of its own
    status, _, err = runs.clp(*arguments)
    assert status == 1, err
    last = err.splitlines()[-1]
    assert "another process is training in" in last and "wait" in last
    assert begun or not (workdir / "model.json").exists()
  if begun:
    assert runs.clp(*arguments)[0] == 0


def test_a_step_that_cannot_be_read_falls_back_to_the_one_before(
  clp_run, tmp_path, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(clp_run, workdir)
  truncate(workdir / "checkpoints" / "4")
  arguments = runs.train_arguments(workdir, clp_run.parent / "sft")
  status, _, err = runs.clp(*arguments)
  assert status == 0 and "Traceback" not in err, err
  (warning,) = [r.getMessage() for r in caplog.records if r.name == "root"]
  assert "checkpoint 4" in warning and "trying the one before" in warning
  runs.assert_same_run(clp_run, workdir, 4)


def test_a_run_without_a_readable_step_is_an_error_that_loses_nothing(
  clp_run, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(clp_run, workdir)
  for step in (2, 4):
    truncate(workdir / "checkpoints" / str(step))
  before = sorted(p for p in workdir.rglob("*") if p.is_file())
  sft = clp_run.parent / "sft"
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


def test_a_run_of_an_older_version_gets_the_fields_it_lacks(tmp_path):
  from clp_jax import config as config_lib
  from clp_jax import demo, run_folder

  config = demo.get_config()
  run_folder.start(str(tmp_path), config)
  file = tmp_path / "config.json"
  values = json.loads(file.read_text())
  del values["conditioning"], values["eval"]["temperature"]
  file.write_text(json.dumps(values))
  loaded = run_folder.load_config(str(tmp_path))
  assert config_lib.to_json(loaded) == config_lib.to_json(config)
  run_folder.start(str(tmp_path), config)  # resumed
  values["conditioning"] = {"kl_set": "frozen"}
  file.write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="conditioning.kl_set"):
    run_folder.start(str(tmp_path), config)


def test_the_rate_of_rl_is_no_setting_of_the_stages_before(tmp_path):
  from clp_jax import demo, run_folder
  from clp_jax.train import reward_model, sft

  def own_configs(**changes):
    config = demo.get_config()
    config.optimizer.update(changes)
    sections = {name: config[name] for name in reward_model.SECTIONS}
    return {
      "sft": sft.own_config(config),
      "reward": ml_collections.ConfigDict(sections),
      "run": config,
    }

  for name, config in own_configs().items():
    run_folder.start(str(tmp_path / name), config)
  other = own_configs(learning_rate=0.5, warmup_steps=1, decay_steps=7)
  for name in ("sft", "reward"):
    run_folder.start(str(tmp_path / name), other[name])  # resumed
  with pytest.raises(ConfigError, match="optimizer.learning_rate"):
    run_folder.start(str(tmp_path / "run"), other["run"])
  for name, config in own_configs(clip_norm=7.0).items():
    with pytest.raises(ConfigError, match="optimizer.clip_norm"):
      run_folder.start(str(tmp_path / name), config)


def test_a_path_may_be_spelled_another_way(tmp_path, monkeypatch):
  from clp_jax import demo, run_folder

  config = demo.get_config()
  config.model.init = str(tmp_path / "sft")
  run_folder.start(str(tmp_path / "run"), config)
  monkeypatch.chdir(tmp_path)
  config.model.init = "sft"
  run_folder.start("run", config)  # resumed
  config.model.init = "other"
  with pytest.raises(ConfigError, match="model.init = 'sft' there"):
    run_folder.start("run", config)


outage: list = []  # calls of the reward below that fail, by number


def judged(documents, references, responses):
  """A reward that depends on what may be down."""
  outage[0] -= 1
  if outage[0] < 0:
    raise ConnectionError("the judge is down")
  return [0.37 * len(text) for text in responses]


def test_a_reward_that_fails_twice_ends_a_run_with_its_steps_saved(
  sft_run, tmp_path
):
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  fields = {
    "train.checkpoint_every": 4,  # nothing is saved before the outage
    "rewards.nli.source": f"{__name__}:judged",
    "rewards.nli.normalise": "running",
  }

  def train(workdir, answers):
    outage[:] = [answers]
    return runs.clp(*runs.train_arguments(workdir, sft_run, **fields))

  status, _, err = train(stopped, 3)
  assert status == 1
  last = err.splitlines()[-1]
  assert "reward 'nli' at step 3 raised ConnectionError: the judge" in last
  assert last.endswith("is saved: the same command goes on from step 3.")
  assert outage == [-2]
  assert runs.checkpoint_steps(stopped) == [3]
  for workdir in (stopped, whole):
    assert train(workdir, 100)[0] == 0
  runs.assert_same_run(whole, stopped, 4)
  assert len(runs.metrics(stopped)) == 4

"""launch/tpu.sh against a cloud whose workers are processes on this machine.

tests/fake_gcloud stands in for `gcloud`, and in the quick tests a script that
counts stands in for `clp`.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
import runs
import yaml
from fake_gcloud import cloud as cloud_lib

from clp_jax.cli import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Runs the command that follows. A suite that was started in the background
# ignores SIGINT, and a shell can't trap what was ignored before it.
HEARS_SIGINT = (
  *(sys.executable, "-ISc"),
  "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
  "os.execv(sys.argv[1], sys.argv[1:])",
)

# On the workers' PATH: makes the environment that worker.sh asks for, with
# CLP from the cloud's folder as its `clp`.
UV = """#!/bin/sh
echo "$*" >> "$HOME/uv.log"
mkdir -p .venv/bin
cp "$FAKE_GCLOUD/clp" .venv/bin/clp
"""

# Counts to 20 in the output folder, from where a run before it was stopped,
# and waits at 5 while there is a file `hold`. Every worker runs it; the first
# does the counting.
CLP = r"""#!/bin/bash
[ "$1" != --help ] || exit 0
arguments=("$@")
while [ "$1" != --workdir ]; do shift; done
workdir=$FAKE_GCLOUD/buckets/${2#gs://}
mkdir -p "$workdir"
count=$(cat "$workdir/count" 2>/dev/null || echo 0)
echo "$TPU_WORKER_ID from $count $(cat version)" >> "$workdir/starts"
printf '%s\0' "$JAX_COMPILATION_CACHE_DIR" "${arguments[@]}" \
  > "$workdir/arguments-$TPU_WORKER_ID"
trap 'echo "clp train: error: stopped by SIGTERM" >&2; exit 75' TERM
BEHAVIOUR
while [ "$count" -lt 20 ]; do
  sleep 0.05
  if [ "$TPU_WORKER_ID" != 0 ]; then
    count=$(cat "$workdir/count" 2>/dev/null || echo 0)
  elif [ "$count" != 5 ] || [ ! -e "$FAKE_GCLOUD/hold" ]; then
    count=$((count + 1))
    echo "$count" > "$workdir/partial"
    mv "$workdir/partial" "$workdir/count"
  fi
done
echo "counted to $count"
"""

CREATE = ("--zone", "us-central2-b", "--accelerator-type")
OUTPUT = ("--output", "gs://bucket/runs")
QUICKLY = ("--poll", "0.3", "--backoff", "0")
# Longer than any wait on the slowest machine; only a failure takes so long.
PATIENCE = 300  # seconds
JOB = ("--", "train", "--config", "configs/demo.py")


class Launcher:
  """A checkout with launch/, and the machine that calls its tpu.sh."""

  def __init__(self, folder: pathlib.Path, cloud: cloud_lib.Cloud):
    self.cloud = cloud
    self.folder = folder
    self.checkout = folder / "a checkout"
    shutil.copytree(ROOT / "launch", self.checkout / "launch")
    self.environment = {
      "PATH": f"{cloud_lib.HERE}:/usr/local/bin:/usr/bin:/bin",
      "HOME": str(folder),
      "FAKE_GCLOUD": str(cloud.folder),
      "FAKE_PYTHON": sys.executable,
      "GIT_CEILING_DIRECTORIES": str(folder),
    }

  def commit(self, **files):
    """Makes the checkout a commit with these files."""
    for name, content in files.items():
      (self.checkout / name).write_text(content)
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
      subprocess.run(
        ["git", *identity, *arguments], cwd=self.checkout, check=True
      )

  def start(self, *arguments):
    """Starts tpu.sh; `finish` ends what this begins."""
    with (
      (self.folder / "out").open("w") as out,
      (self.folder / "err").open("w") as err,
    ):
      return subprocess.Popen(
        [*HEARS_SIGINT, self.checkout / "launch" / "tpu.sh", *arguments],
        env=self.environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
      )

  def wait_for(self, text):
    """Waits until the tpu.sh started last has said something."""
    end = time.monotonic() + PATIENCE
    while text not in (err := (self.folder / "err").read_text()):
      assert time.monotonic() < end, f"{text!r} not in {err!r}"
      time.sleep(0.02)

  def finish(self, process, status=0):
    """Waits for the tpu.sh started last: (stdout, stderr)."""
    process.wait(timeout=PATIENCE)
    out, err = ((self.folder / n).read_text() for n in ("out", "err"))
    assert process.returncode == status, err
    return out, err

  def __call__(self, *arguments, status=0):
    """Calls tpu.sh: (stdout, stderr)."""
    return self.finish(self.start(*arguments), status)

  def hold(self):
    """Lets the stand-in for clp wait once it has counted to 5."""
    (self.cloud.folder / "hold").touch()

  def release(self):
    (self.cloud.folder / "hold").unlink()

  def behave(self, lines=""):
    """Gives the stand-in for clp some lines to run at its start."""
    file = self.cloud.folder / "clp"
    file.write_text(CLP.replace("BEHAVIOUR", lines))
    file.chmod(0o755)

  def run_folder(self, name):
    return self.cloud.bucket(f"gs://bucket/runs/{name}")

  def starts(self, name):
    """Lines of the workers that started: "WORKER from COUNT VERSION"."""
    file = self.run_folder(name) / "starts"
    return file.read_text().splitlines() if file.exists() else []

  def count(self, name):
    """How far the stand-in for clp has counted."""
    file = self.run_folder(name) / "count"
    return int(file.read_text()) if file.exists() else 0

  def wait_for_5(self, name, workers=2):
    """Until the job has counted to 5, and all its workers have started."""
    end = time.monotonic() + PATIENCE
    while self.count(name) < 5 or len(self.starts(name)) < workers:
      assert time.monotonic() < end, "the job does not count"
      time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path):
  cloud = cloud_lib.Cloud(tmp_path / "cloud")
  uv = cloud.folder / "bin" / "uv"
  uv.write_text(UV)
  uv.chmod(0o755)
  yield cloud
  cloud.close()


@pytest.fixture
def tpu(tmp_path, cloud):
  tpu = Launcher(tmp_path, cloud)
  tpu.commit(version="first\n")
  tpu.behave()
  return tpu


def flag(call, name):
  """Value of a --flag=value in a call."""
  (value,) = [a for a in call if a.startswith(f"{name}=")]
  return value.partition("=")[2]


def test_a_job_on_2_workers_from_create_to_delete(tpu, cloud):
  tpu(
    "create", "job-1", *CREATE, "v4-16", "--project", "p", "--", "--network=n"
  )
  (call,) = cloud.calls("create")
  assert call == [
    *("compute", "tpus", "queued-resources", "create", "job-1"),
    *("--zone=us-central2-b", "--project=p", "--node-id=job-1"),
    *("--accelerator-type=v4-16", "--runtime-version=tpu-ubuntu2204-base"),
    "--network=n",
  ]
  (tpu.checkout / "version").write_text("not committed\n")
  _, err = tpu("setup", "job-1", "--poll", "0.1")
  assert "what is not committed" in err
  assert "job-1 is WAITING_FOR_RESOURCES" in err
  for worker in range(2):
    home = cloud.home("job-1", worker)
    assert (home / "clp_jax/source/version").read_text() == "first\n"
    assert "--editable ./source[tpu]" in (home / "uv.log").read_text()

  odd = ["--config.a=two words", '--config.b=it\'s $HOME "quoted"', "--c=a*;b"]
  tpu("run", "job-1", *OUTPUT, *QUICKLY, *JOB, *odd)
  folder = tpu.run_folder("job-1")
  assert tpu.count("job-1") == 20
  assert len(cloud.calls("scp")) == 1  # set up once
  for worker in range(2):
    cache, *arguments = (
      (folder / f"arguments-{worker}").read_text().rstrip("\0").split("\0")
    )
    assert cache == "gs://bucket/runs/compilation_cache"
    assert arguments == [
      *JOB[1:],
      *odd,
      *("--workdir", "gs://bucket/runs/job-1"),
      *("--distributed", "--num-processes", "2"),
    ]
    (log,) = folder.glob(f"logs/*/worker-{worker}.log")
    assert "counted to 20" in log.read_text()

  out, _ = tpu("status", "job-1")
  assert out.splitlines()[0] == "job-1 ACTIVE"
  assert sorted(out.splitlines()[1:]) == [
    f"worker {worker} exited 0 counted to 20" for worker in range(2)
  ]
  assert tpu("logs", "job-1")[0] == "[0] counted to 20\n"
  assert tpu("logs", "job-1", "--worker", "1")[0] == "[1] counted to 20\n"
  out, _ = tpu("logs", "job-1", "--worker", "all", "--lines", "1")
  assert sorted(out.splitlines()) == [
    "[0] counted to 20",
    "[1] counted to 20",
  ]
  for call in cloud.calls("--zone=us-central2-b"):
    assert "--project=p" in call

  tpu("delete", "job-1")
  assert cloud.load("job-1") is None
  _, err = tpu("delete", "job-1", "--zone", "us-central2-b")
  assert "there is no job-1" in err
  assert len(cloud.calls("delete")) == 1


def test_a_preempted_slice_comes_back_and_the_job_goes_on(tpu, cloud):
  # The second request fails first, as one for which there is no room may.
  states = [["ACTIVE"], ["PROVISIONING", "FAILED"], ["ACTIVE"]]
  (cloud.folder / "next_states.json").write_text(json.dumps(states))
  tpu("create", "spot", *CREATE, "v4-16", "--spot", "--", "--labels=a=b")
  tpu.hold()
  run = tpu.start("run", "spot", *OUTPUT, *QUICKLY, *JOB)
  tpu.wait_for_5("spot")
  tpu.commit(version="second\n")  # must not reach the job
  cloud.preempt("spot", grace=PATIENCE)
  assert tpu.count("spot") == 5
  tpu.release()
  _, err = tpu.finish(run)
  assert "spot is SUSPENDED; replacing it" in err
  assert "spot is FAILED; replacing it" in err
  assert "restart 2 of 20" in err and "restart 3" not in err
  first, *others = cloud.calls("create")
  assert "--spot" in first and "--labels=a=b" in first
  assert others == [first] * 2
  assert tpu.count("spot") == 20
  starts = sorted(tpu.starts("spot"))
  assert starts[:2] == ["0 from 0 first", "0 from 5 first"]
  # The other worker may start when the first has counted on.
  assert [line.split()[0] for line in starts[2:]] == ["1", "1"]
  assert all(line.endswith(" first") for line in starts)
  # A log for each attempt.
  logs = sorted(tpu.run_folder("spot").glob("logs/*/worker-0.log"))
  assert "stopped by SIGTERM" in logs[0].read_text()
  assert "counted to 20" in logs[1].read_text()


def test_a_killed_worker_restarts_the_job_on_the_same_slice(tpu, cloud):
  tpu("create", "kill", *CREATE, "v4-16")
  tpu.hold()
  # The grace is also for workers that end one after the other, in the end.
  run = tpu.start("run", "kill", *OUTPUT, *QUICKLY, "--grace", "5", *JOB)
  tpu.wait_for_5("kill")
  cloud.end("kill", 1, [signal.SIGKILL])
  tpu.wait_for("restart 1 of 20")
  tpu.release()
  _, err = tpu.finish(run)
  assert "worker 1 lost" in err
  assert "restart 1 of 20" in err and "restart 2" not in err
  assert len(cloud.calls("create")) == 1 and len(cloud.calls("scp")) == 1
  assert tpu.count("kill") == 20
  assert len(tpu.starts("kill")) == 4


def test_restarts_are_counted_and_end(tpu, cloud):
  tpu.behave("exit 75")
  tpu("create", "cap", *CREATE, "v4-8")
  _, err = tpu(
    *("run", "cap", *OUTPUT, *QUICKLY, "--max-restarts", "2", *JOB), status=1
  )
  assert len(tpu.starts("cap")) == 3
  last = err.splitlines()[-1]
  assert "interrupted again after 2 restarts" in last
  assert "gs://bucket/runs/cap" in last
  # One worker is not told of others.
  arguments = (tpu.run_folder("cap") / "arguments-0").read_text()
  assert "--distributed" not in arguments


@pytest.mark.parametrize("status", [1, 2])
def test_what_a_restart_cannot_mend_is_not_restarted(tpu, cloud, status):
  tpu.behave(
    # The other worker's end is a consequence: JAX aborts it.
    f'[ "$TPU_WORKER_ID" = 0 ] || exit 134\n'
    f'echo "clp train: error: the reason" >&2; echo noise; exit {status}'
  )
  tpu("create", "bad", *CREATE, "v4-16")
  _, err = tpu("run", "bad", *OUTPUT, *QUICKLY, *JOB, status=status)
  assert len(tpu.starts("bad")) == 2
  assert f"worker 0 exited {status} clp train: error: the reason" in err
  assert "restart" not in err


def test_the_job_outlives_its_watcher_but_not_its_slice(tpu, cloud):
  tpu("create", "watched", *CREATE, "v4-8")
  tpu.hold()
  arguments = ("run", "watched", *OUTPUT, *QUICKLY, *JOB)
  run = tpu.start(*arguments)
  tpu.wait_for("1 of 1 running")
  os.killpg(run.pid, signal.SIGINT)
  _, err = tpu.finish(run, 130)
  assert "the job goes on" in err
  # Another command is refused while it runs, the same one is watched again,
  # whatever has happened to the checkout.
  tpu.commit(version="second\n")
  _, err = tpu(*arguments, "--config.seed=1", status=1)
  assert "another job is running here" in err
  run = tpu.start(*arguments)
  tpu.wait_for("launch/tpu.sh setup watched makes one of")
  tpu.wait_for("1 of 1 running")
  # From another machine, so that this one's watcher has to find it out.
  settings = tpu.environment["HOME"] + "/elsewhere"
  subprocess.run(
    [tpu.checkout / "launch/tpu.sh", "delete", "watched", *CREATE[:2]],
    env=tpu.environment | {"XDG_STATE_HOME": settings},
    check=True,
  )
  _, err = tpu.finish(run, 1)
  assert "watched was deleted" in err.splitlines()[-1]
  assert cloud.load("watched") is None
  assert len(cloud.calls("create")) == 1
  (log, *_) = sorted(tpu.run_folder("watched").glob("logs/*/worker-0.log"))
  assert "stopped by SIGTERM" in log.read_text()  # it could save


def test_create_asks_once_and_for_one_thing(tpu, cloud):
  arguments = ("create", "once", *CREATE, "v5litepod-16")
  tpu(*arguments, "--spot")
  _, err = tpu(*arguments, "--spot")
  assert "once exists; it is WAITING_FOR_RESOURCES" in err
  for others in ([], ["--spot", "--", "--network=n"]):
    _, err = tpu(*arguments, *others, status=1)
    assert "exists with other settings" in err
  (call,) = cloud.calls("create")
  assert flag(call, "--runtime-version") == "v2-alpha-tpuv5-lite"


def test_dry_run_prints_the_commands_and_runs_none(tpu, cloud):
  def printed(*arguments):
    out, _ = tpu(*arguments)
    calls = [shlex.split(line) for line in out.splitlines()]
    assert {call[0] for call in calls} == {"gcloud"}
    return [call[1:] for call in calls]

  dry = ("--dry-run",)
  (call,) = printed("create", "dry", *CREATE, "v5p-512", "--spot", *dry)
  assert call[2:4] == ["queued-resources", "create"] and "--spot" in call
  settings = tpu.environment["HOME"] + "/.local/state/clp_jax/tpu/dry"
  assert not os.path.exists(settings)
  os.makedirs(settings)
  pathlib.Path(settings, "settings").write_text(
    "zone=z\nproject=\nspot=1\naccelerator_type=v5p-512\nruntime_version=r\n"
  )
  job = (*JOB, "--config.a=two words")
  calls = printed("run", "dry", *OUTPUT, *dry, *job)
  assert [call[3] for call in calls] == ["create", "scp", "ssh", "ssh", "ssh"]
  start = shlex.split(flag(calls[3], "--command"))
  assert start[:3] == ["bash", "clp_jax/source/launch/worker.sh", "start"]
  assert start[5:] == [
    *(*job[1:], "--workdir", "gs://bucket/runs/dry"),
    *("--distributed", "--num-processes", "64"),
  ]
  assert [call[3] for call in printed("setup", "dry", *dry)] == ["scp", "ssh"]
  for command in ("status", "logs"):
    assert [call[3] for call in printed(command, "dry", *dry)] == ["ssh"]
  assert [c[3] for c in printed("delete", "dry", *dry)] == ["ssh", "delete"]
  assert cloud.calls() == []


def settle(tpu, type_, *spot):
  """Keeps settings as `create` does, without a slice."""
  folder = pathlib.Path(tpu.environment["HOME"], ".local/state/clp_jax/tpu/a")
  folder.mkdir(parents=True)
  (folder / "settings").write_text(
    f"zone=z\nspot={len(spot)}\naccelerator_type={type_}\nruntime_version=r\n"
  )


@pytest.mark.parametrize(
  ("type_", "output", "message"),
  [
    (("v4-16",), "/mnt/runs", "2 workers write one output folder"),
    (("v4-8", "spot"), "/mnt/runs", "disks of a spot slice are lost"),
    (("v4-8",), "runs", "an absolute path"),
    (("v4-8",), "gs://", "an absolute path"),
  ],
)
def test_refuses_an_output_folder_that_would_be_lost(
  tpu, cloud, type_, output, message
):
  settle(tpu, *type_)
  _, err = tpu("run", "a", "--output", output, *JOB, status=2)
  (line,) = err.splitlines()
  assert message in line and output in line
  assert cloud.calls() == []


def test_refuses_bad_arguments_before_anything_is_asked_for(tpu, cloud):
  settle(tpu, "v4-16")
  for arguments, message in (
    (("create", "Name", *CREATE, "v4-8"), "lower-case letters"),
    (("create", "a", "--accelerator-type", "v4-8"), "give --zone"),
    (("create", "a", *CREATE, "h100-8"), "unknown accelerator type 'h100-8'"),
    (("create", "a", *CREATE, "v4-8", "--spt"), "unknown argument --spt"),
    (("create", "a", "--zone=z"), "with a space between"),
    (("launch", "a"), "unknown command launch"),
    (("status", "nowhere"), "no settings are kept for nowhere"),
    (("run", "a", *OUTPUT), "give the job after --"),
    (("run", "a", *OUTPUT, *JOB, "--workdir=x"), "tpu.sh's to give"),
    (("run", "a", *OUTPUT, "--poll", "x", *JOB), "--poll takes a number"),
    (("run", "a", *OUTPUT, "--run-name", "../x", *JOB), "--run-name takes"),
  ):
    _, err = tpu(*arguments, status=2)
    assert message in err, arguments
  assert cloud.calls() == []


def test_the_gke_job_runs_clp_once_on_every_host_of_a_slice():
  values = {
    "NAME": "clp-1",
    "IMAGE": "registry/clp:1",
    "OUTPUT": "gs://bucket/runs",
    "CONFIG": "configs/demo.py",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
  }
  text = (ROOT / "launch" / "xpk.yaml").read_text()
  comments, job = text.split("apiVersion:", 1)
  # Every name that the job needs is in the command that fills it in.
  (exports,) = re.findall(r"export (.*\\\n.*)\n", comments)
  assert sorted(re.findall(r"([A-Z]+)=", exports)) == sorted(
    set(values) - {"IMAGE"}
  )
  job = yaml.safe_load("apiVersion:" + string.Template(job).substitute(values))
  assert job["metadata"]["name"] == "clp-1"
  spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert container["image"] == "registry/clp:1"
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  parser = argparse.ArgumentParser()
  train.add_arguments(parser)
  assert container["args"][0] == "train"
  args = parser.parse_args(container["args"][1:])
  assert args.distributed and args.num_processes == 4
  assert args.workdir == "gs://bucket/runs/clp-1"
  assert (ROOT / args.config).exists()
  # A run that is refused (2) is not restarted; one that was stopped is.
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"] == {"operator": "In", "values": [2]}
  assert job["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.slow
def test_training_that_was_preempted_ends_as_if_it_never_was(
  tpu, cloud, sft_run, tmp_path
):
  """The real `clp train`, from an archive of this checkout, on 2 workers."""
  for name in ("clp_jax", "configs"):
    shutil.copytree(
      ROOT / name,
      tpu.checkout / name,
      ignore=shutil.ignore_patterns("__pycache__"),
    )
  tpu.commit()
  clp = cloud.folder / "clp"
  # In the job's folder, so that the archive's clp_jax is the one imported.
  clp.write_text(
    f'#!/bin/sh\nexport XLA_FLAGS="{runs.xla_flags(1)}"\n'
    f'exec "{sys.executable}" -m clp_jax "$@"\n'
  )
  clp.chmod(0o755)
  steps = {"train.steps": 24, "train.checkpoint_every": 4}
  settings = runs.overrides(sft_run, **steps)

  whole = runs.start_pair(
    runs.train_arguments(tmp_path / "whole", sft_run, **steps), devices=1
  )
  for process in whole:
    runs.finish(process)

  shared = tmp_path / "shared"
  tpu("create", "real", *CREATE, "v4-16", "--spot")
  run = tpu.start(
    *("run", "real", "--output", shared, "--shared"),
    *("--poll", "1", "--backoff", "0", "--grace", "120"),
    *("--", "train", "--config", "configs/demo.py", *settings),
  )
  metrics = shared / "real" / "metrics.jsonl"
  end = time.monotonic() + 600
  while not metrics.exists() or metrics.read_text().count("\n") < 5:
    assert run.poll() is None and time.monotonic() < end, (
      tmp_path / "err"
    ).read_text()
    time.sleep(0.05)
  cloud.preempt("real", grace=PATIENCE)
  assert metrics.read_text().count("\n") < 24
  run.wait(timeout=900)
  _, err = tpu.finish(run)
  assert "restart 1 of 20" in err and "restart 2" not in err
  assert len(cloud.calls("create")) == 2

  assert runs.checkpoint_steps(shared / "real")[-1] == 24
  assert runs.metrics(shared / "real") == runs.metrics(tmp_path / "whole")
  assert any((shared / "compilation_cache").iterdir())
  for worker in range(2):
    logs = shared.glob(f"real/logs/*/worker-{worker}.log")
    assert "clp train: error" not in sorted(logs)[-1].read_text()
  tpu("delete", "real")

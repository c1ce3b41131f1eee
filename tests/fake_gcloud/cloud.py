"""A stand-in for `gcloud compute tpus` whose workers are local processes.

The folder $FAKE_GCLOUD holds everything:
  calls.jsonl             the arguments of every call
  next_states.json        states that the next queued resources go through,
                          instead of STATES; a list of lists
  slices/NAME/slice.json  a queued resource and its node
  slices/NAME/worker-N/   the home folder of a worker
  buckets/                what gs:// stands for, for `gcloud storage cp`
  bin/                    programs that the workers have
Only flags that the reference of the real command lists are taken. A worker's
processes are those whose HOME is its folder. JAX finds the workers by the
variables that Slurm sets, as it finds those of a TPU slice by its metadata.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

STATES = ["WAITING_FOR_RESOURCES", "ACTIVE"]
HOSTS = {"v4-8": 1, "v4-16": 2, "v5litepod-16": 4}
HERE = pathlib.Path(__file__).resolve().parent


class Cloud:
  """What there is in the cloud, kept in a folder."""

  def __init__(self, folder: os.PathLike | str):
    """Opens the folder, empty or used before."""
    self.folder = pathlib.Path(folder)
    (self.folder / "bin").mkdir(parents=True, exist_ok=True)

  def home(self, name: str, worker: int) -> pathlib.Path:
    """A worker's home folder."""
    return self.folder / "slices" / name / f"worker-{worker}"

  def bucket(self, path: str) -> pathlib.Path:
    """Where a gs:// path lies."""
    return self.folder / "buckets" / path.removeprefix("gs://")

  def calls(self, *words: str) -> list[list[str]]:
    """The calls so far that have all these words."""
    file = self.folder / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    calls = [json.loads(line) for line in lines]
    return [call for call in calls if set(words) <= set(call)]

  def load(self, name: str) -> dict | None:
    """A slice, or None."""
    file = self.folder / "slices" / name / "slice.json"
    return json.loads(file.read_text()) if file.exists() else None

  def store(self, name: str, slice_: dict) -> None:
    """Writes a slice."""
    file = self.folder / "slices" / name / "slice.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(slice_))
    partial.rename(file)

  def create(self, name: str, type_: str) -> None:
    """Queues a slice."""
    hosts = HOSTS[type_]
    for worker in range(hosts):
      self.home(name, worker).mkdir(parents=True)
    states = STATES
    following = self.folder / "next_states.json"
    if following.exists():
      states, *rest = json.loads(following.read_text())
      following.unlink()
      if rest:
        following.write_text(json.dumps(rest))
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    node = {"hosts": hosts, "port": port, "node": "READY"}
    self.store(name, node | {"states": states})

  def step(self, name: str) -> str:
    """The slice's state, which then goes on to its next."""
    slice_ = self.load(name)
    if slice_ is None:
      return "NOT_FOUND"
    state, *following = slice_["states"]
    if following:
      self.store(name, slice_ | {"states": following})
    return state

  def processes(self, name: str, worker: int) -> list[int]:
    """Processes of a worker."""
    mark = f"HOME={self.home(name, worker)}".encode()
    found = []
    for entry in pathlib.Path("/proc").iterdir():
      try:
        if mark in (entry / "environ").read_bytes().split(b"\0"):
          found.append(int(entry.name))
      except (OSError, ValueError):  # not a process, or one that has ended
        continue
    return found

  def end(self, name: str, worker: int, signals: list[int], grace=3.0) -> None:
    """Sends a worker's processes one signal after the other."""
    for number in signals:
      for process in self.processes(name, worker):
        try:
          os.kill(process, number)
        except ProcessLookupError:
          pass
      end = time.monotonic() + grace
      while self.processes(name, worker) and time.monotonic() < end:
        time.sleep(0.05)

  def preempt(self, name: str, grace: float) -> None:
    """Takes a slice away: its processes, `grace` seconds later its disks."""
    slice_ = self.load(name)
    # First, so that nothing is started on it any more.
    taken = slice_ | {"node": "PREEMPTED"}
    self.store(name, taken | {"states": ["SUSPENDING"]})
    hosts = range(slice_["hosts"])
    for number in (signal.SIGTERM, signal.SIGKILL):
      for worker in hosts:
        self.end(name, worker, [number], 0)
      end = time.monotonic() + grace
      while time.monotonic() < end and any(
        self.processes(name, worker) for worker in hosts
      ):
        time.sleep(0.05)
    for worker in hosts:
      shutil.rmtree(self.home(name, worker))
    self.store(name, taken | {"states": ["SUSPENDED"]})

  def delete(self, name: str) -> None:
    """Deletes a slice and what runs on it."""
    for worker in range(self.load(name)["hosts"]):
      self.end(name, worker, [signal.SIGKILL])
    shutil.rmtree(self.folder / "slices" / name)

  def close(self) -> None:
    """Deletes all slices."""
    for file in self.folder.glob("slices/*/slice.json"):
      self.delete(file.parent.name)

  def environment(self, name: str, worker: int) -> dict[str, str]:
    """What a worker's processes see."""
    slice_ = self.load(name)
    return {
      "PATH": f"{self.folder / 'bin'}:{HERE}:/usr/local/bin:/usr/bin:/bin",
      "HOME": str(self.home(name, worker)),
      "FAKE_GCLOUD": str(self.folder),
      "FAKE_PYTHON": sys.executable,
      "TPU_WORKER_ID": str(worker),
      "SLURM_JOB_ID": "1",
      "SLURM_STEP_NODELIST": "127.0.0.1",
      "SLURM_NTASKS": str(slice_["hosts"]),
      "SLURM_PROCID": str(worker),
      "SLURM_LOCALID": "0",
      "JAX_COORDINATOR_PORT": str(slice_["port"]),
      "JAX_PLATFORMS": "cpu",
    }


def fail(message: str) -> None:
  """Ends as gcloud does."""
  sys.exit(f"ERROR: (gcloud) {message}")


def main(argv: list[str]) -> None:
  """One call of gcloud."""
  cloud = Cloud(os.environ["FAKE_GCLOUD"])
  with (cloud.folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(argv) + "\n")
  if argv[:2] == ["storage", "cp"]:
    *_, source, target = argv
    path = cloud.bucket(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, path)
    return
  if argv[:2] != ["compute", "tpus"] or len(argv) < 4:
    fail(f"Invalid choice: {argv}")
  kind, verb, *rest = argv[2:]
  parser = argparse.ArgumentParser(f"{kind} {verb}", allow_abbrev=False)
  for flag in ("--zone", "--project", "--format"):
    parser.add_argument(flag)
  parser.add_argument("--quiet", action="store_true")
  command = f"{kind} {verb}"
  if command == "tpu-vm scp":
    parser.add_argument("source")
  parser.add_argument("name")
  if command == "queued-resources create":
    for flag in ("--node-id", "--accelerator-type", "--runtime-version"):
      parser.add_argument(flag, required=True)
    for flag in ("--labels", "--network", "--service-account"):
      parser.add_argument(flag)
    parser.add_argument("--spot", action="store_true")
  elif command == "queued-resources delete":
    parser.add_argument("--force", action="store_true")
  elif kind == "tpu-vm" and verb in ("ssh", "scp"):
    parser.add_argument("--worker", default="0")
    if verb == "ssh":
      parser.add_argument("--command", required=True)
  elif verb != "describe":
    fail(f"Invalid choice: {command}")
  args = parser.parse_args(rest)
  if args.zone is None:
    fail("zone is required")
  run(cloud, command, args)


def run(cloud: Cloud, command: str, args: argparse.Namespace) -> None:
  """Does what the arguments ask for."""
  name = args.name.partition(":")[0]
  slice_ = cloud.load(name)
  if command == "queued-resources create":
    if slice_ is not None:
      fail(f"ALREADY_EXISTS: {name}")
    cloud.create(name, args.accelerator_type)
    return
  if slice_ is None:
    fail(f"NOT_FOUND: Resource '{name}' was not found")
  state = slice_["states"][0]
  if command == "queued-resources describe":
    assert args.format == "value(state.state)"
    sys.stdout.write(f"{cloud.step(name)}\n")
  elif command == "queued-resources delete":
    if state == "ACTIVE" and not args.force:
      fail(f"FAILED_PRECONDITION: {name} has a node")
    if state in ("SUSPENDING", "DELETING"):
      fail(f"FAILED_PRECONDITION: {name} is {state}")
    cloud.delete(name)
  elif command == "tpu-vm describe":
    assert args.format == "value(state)"
    sys.stdout.write(f"{slice_['node']}\n")
  elif slice_["node"] != "READY" or state != "ACTIVE":
    fail(f'This TPU has terminal state "{slice_["node"]}", cannot be used')
  else:
    workers = (
      range(slice_["hosts"]) if args.worker == "all" else [int(args.worker)]
    )
    if command == "tpu-vm scp":
      for worker in workers:
        target = args.name.partition(":")[2]
        shutil.copy(args.source, cloud.home(name, worker) / target)
    else:
      ssh(cloud, name, workers, args.command)


def ssh(cloud: Cloud, name: str, workers, command: str) -> None:
  """Runs a command on workers at once; ends with the first bad status."""
  started = []
  for worker in workers:
    sys.stderr.write(f"SSH: Attempting to connect to worker {worker}...\n")
    started.append(
      subprocess.Popen(
        ["bash", "-c", command],
        cwd=cloud.home(name, worker),
        env=cloud.environment(name, worker),
        stdin=subprocess.DEVNULL,
      )
    )
  statuses = [process.wait() for process in started]
  for worker, status in zip(workers, statuses, strict=True):
    if status:
      sys.stderr.write(
        f"##### Command execution on worker {worker} failed with exit status "
        f"{status}. Continuing.\n"
      )
  sys.exit(next((status for status in statuses if status), 0))


if __name__ == "__main__":
  main(sys.argv[1:])

"""Small runs on the built-in world, for the tests that need one."""

import contextlib
import gc
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from clp_jax import build, run_folder, saved_params
from clp_jax.cli.arguments import load_config
from clp_jax.cli.main import main
from clp_jax.models import families
from clp_jax.train import moft

# A small model of each family that starts from random parameters.
PRESETS = ("tiny", "tiny-decoder")
CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "demo.py")


def overrides(sft, **fields):
  """Arguments of `clp train` for a run that takes seconds."""
  settings = {
    "model.init": sft,
    "sft.steps": 0,
    "rollout.prompts": 8,
    "rollout.samples": 2,
    "train.steps": 4,
    "train.checkpoint_every": 2,
    "eval.prompts": 8,
    "eval.grid": 3,
  } | fields
  return [f"--config.{name}={value}" for name, value in settings.items()]


def train_arguments(workdir, sft, **fields):
  return [
    *("train", "--config", CONFIG, "--workdir", str(workdir)),
    *overrides(sft, **fields),
  ]


def make_run(workdir, sft, *, draw=0, **fields):
  """A run's folder whose sets differ at random: trained, but for the time."""
  config = load_config(CONFIG, overrides(sft, **fields))
  save_untrained(config, workdir, draw)


def save_untrained(config, workdir, draw=0):
  """That of any config."""
  moft.prepare(config, str(workdir))
  model_config = run_folder.load_model_config(str(workdir))
  abstract = families.build(model_config).abstract()
  reference = run_folder.load_reference(str(workdir), abstract)
  bank = build.bank(config, model_config)
  random = np.random.default_rng(draw)
  sets = jax.tree.map(
    lambda p: p + 0.03 * random.standard_normal(p.shape).astype(np.float32),
    bank.init(reference, jax.random.key(0)),
  )
  saved_params.save_params(str(workdir), config.train.steps, sets)


def clp(*arguments):
  """Runs `clp` in this process: (status, stdout, stderr)."""
  # What an earlier test's failed read left behind complains when it is
  # collected, and would do so into this command's stderr.
  gc.collect()
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      status = main([str(a) for a in arguments])
    except SystemExit as exit_:  # argparse
      status = exit_.code
  return status, out.getvalue(), err.getvalue()


def xla_flags(devices):
  """Those of this process, so that results are equal to the bit."""
  flags = os.environ["XLA_FLAGS"]
  return re.sub(r"(?<=device_count=)\d+", str(devices), flags)


def start(arguments, devices=1, file_limit=None):
  """Starts `clp` as a process of its own.

  Args:
    arguments: of the command.
    devices: virtual CPU devices.
    file_limit: bytes that a file may have; beyond, writing fails as it does on
      a full disk.
  """
  environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
  command = [sys.executable, "-m", "clp_jax", *map(str, arguments)]
  if file_limit is not None:  # in blocks of 1,024 bytes
    shell = f'ulimit -f {file_limit // 1024}; exec "$@"'
    command = ["bash", "-c", shell, "clp", *command]
  return subprocess.Popen(
    command,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  )


def start_pair(arguments, devices=4, heartbeat=100, file_limits=(None, None)):
  """Starts `clp` as 2 processes of one job: see `start`."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  return [
    start(
      [
        *arguments,
        *("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2),
        *("--process-id", i, "--heartbeat-timeout", heartbeat),
      ],
      devices=devices,
      file_limit=file_limits[i],
    )
    for i in range(2)
  ]


def finish(process, status=0, timeout=600):
  """Waits for a process that `start` gave: (stdout, stderr)."""
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == status, err
  return out, err


def wait_for_rows(workdir, rows, *processes):
  """Until metrics.jsonl has so many rows or one of the processes has ended."""
  file = pathlib.Path(workdir) / "metrics.jsonl"
  while all(process.poll() is None for process in processes):
    if file.exists() and file.read_text().count("\n") >= rows:
      return
    time.sleep(0.01)


def metrics(workdir):
  """Rows of metrics.jsonl without what measures time."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
    for line in lines
  ]


def checkpoint_steps(workdir):
  folder = pathlib.Path(workdir) / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def load(workdir, step):
  """Everything that a checkpoint of any number of processes holds, as NumPy."""
  folder = pathlib.Path(workdir) / "checkpoints"
  with ocp.CheckpointManager(folder) as manager:
    data = manager.restore(
      step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
    ).data
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)

  def item(name):
    path = folder / str(step) / name
    with ocp.PyTreeCheckpointer() as checkpointer:
      stored = checkpointer.metadata(path).item_metadata.tree
      return checkpointer.restore(
        path, restore_args=jax.tree.map(lambda _: as_numpy, stored)
      )

  return item("params"), item("train"), data


def assert_same_run(a, b, step):
  """Two runs have the same metrics and checkpoints, bit for bit."""
  for x, y in zip(load(a, step), load(b, step), strict=True):
    jax.tree.map(np.testing.assert_array_equal, x, y)
  assert metrics(a) == metrics(b)

"""Small runs on the built-in world, for the tests that need one."""

import contextlib
import gc
import io
import json
import os
import pathlib
import subprocess
import sys

from clp_jax.cli.main import main

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


def start(arguments, devices=1, file_limit=None):
  """Starts `clp` as a process of its own.

  Args:
    arguments: of the command.
    devices: virtual CPU devices.
    file_limit: bytes that a file may have; beyond, writing fails as it does on
      a full disk.
  """
  environment = os.environ | {
    # As in conftest.py, so that results are equal to the bit.
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
    "--xla_backend_optimization_level=0"
  }
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

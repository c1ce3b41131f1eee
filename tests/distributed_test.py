"""How processes find each other, and what is said when they don't."""

import os
import socket
import subprocess
import sys

import pytest
import runs

from clp_jax import distributed
from clp_jax.errors import ConfigError

JOIN = """
import sys
from clp_jax import distributed
arguments = eval(sys.argv[1])
try:
  distributed.initialize(**arguments)
  import jax
  print(jax.process_index(), "of", jax.process_count())
except Exception as error:
  print(type(error).__name__, error)
"""


def arguments(address=None, count=None, index=None, cluster=False, timeout=300):
  return {
    "coordinator": address,
    "num_processes": count,
    "process_id": index,
    "cluster": cluster,
    "timeout": timeout,
    "heartbeat_timeout": 100,
  }


def join(*args, variables=None, **kwargs):
  """Starts a process that prints its place in the job, or the error."""
  return subprocess.Popen(
    [sys.executable, "-c", JOIN, repr(arguments(*args, **kwargs))],
    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | (variables or {}),
    stdout=subprocess.PIPE,
    text=True,
  )


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def slurm(index, count, port):
  """What Slurm sets, one of the clusters that JAX recognises."""
  return {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": str(count),
    "SLURM_PROCID": str(index),
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": str(port),
  }


def test_a_process_that_never_joins_is_an_error_after_the_timeout(tmp_path):
  address = f"127.0.0.1:{free_port()}"
  # Process 0 waits for process 1 ...
  alone = runs.start(
    [
      *("train", "--config", runs.CONFIG, "--workdir", tmp_path / "run"),
      *("--coordinator", address, "--num-processes", 2, "--process-id", 0),
      *("--join-timeout", 1),
    ]
  )
  # ... and process 1 for a process 0 at an address where there is none.
  nobody = f"127.0.0.1:{free_port()}"
  lost = join(nobody, 2, 1, timeout=1)
  out, err = alone.communicate(timeout=120)
  assert alone.returncode == 1
  assert err.startswith("clp train: error: not all processes have joined")
  assert f"within 1 s (this is 0 of 2; 0 is at {address})" in err
  assert "Traceback" not in err and "Check failure" not in err
  assert not (tmp_path / "run").exists()
  out, _ = lost.communicate(timeout=120)
  assert f"within 1 s (this is 1 of 2; 0 is at {nobody})" in out


def test_a_cluster_is_found_out_and_its_size_checked():
  port = free_port()
  pair = [
    join(count=2, cluster=True, variables=slurm(i, 2, port)) for i in range(2)
  ]
  other = join(count=3, cluster=True, variables=slurm(0, 1, free_port()))
  none = join(cluster=True)
  assert pair[0].communicate(timeout=120)[0] == "0 of 2\n"
  assert pair[1].communicate(timeout=120)[0] == "1 of 2\n"
  assert other.communicate(timeout=120)[0].startswith(
    "ConfigError 1 processes joined, not --num-processes 3;"
  )
  assert none.communicate(timeout=120)[0].startswith(
    "ConfigError --distributed found no TPU slice, GKE job, Slurm or Open MPI"
  )


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (arguments("host:1"), "belong together"),
    (arguments(count=2), "belong together"),
    (arguments("host:1", 2, 2), r"in \[0, 2\), got 2"),
    (arguments("host:1", cluster=True), "leave --coordinator and --process-id"),
    (arguments(index=0, cluster=True), "leave --coordinator and --process-id"),
  ],
)
def test_refuses_arguments_that_do_not_belong_together(given, message):
  with pytest.raises(ConfigError, match=message):
    distributed.initialize(**given)

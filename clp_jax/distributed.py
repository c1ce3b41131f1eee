"""Several processes that run one program."""

import threading

import jax

from clp_jax.config import ConfigError
from clp_jax.run_folder import RunError


def initialize(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  cluster: bool,
  timeout: int,
) -> None:
  """Joins the job's other processes; must come before any use of a device.

  Args:
    coordinator: HOST:PORT of process 0; None, without `cluster`, runs alone.
    num_processes: of the job; with `cluster` it is only checked, when given.
    process_id: of this process.
    cluster: all three come from where JAX finds itself: the workers of a TPU
      slice, GKE, Slurm or Open MPI.
    timeout: seconds to wait for all processes.

  Raises:
    ConfigError: when the arguments don't belong together, or the job has
      another number of processes.
    RunError: when not all processes have joined in time.
  """
  if cluster:
    if coordinator is not None or process_id is not None:
      raise ConfigError(
        "--distributed finds the coordinator and the process out; leave "
        "--coordinator and --process-id away."
      )
  elif coordinator is None and num_processes is None and process_id is None:
    return
  elif coordinator is None or num_processes is None or process_id is None:
    raise ConfigError(
      "--coordinator, --num-processes and --process-id belong together; "
      "give all three, or none, or --distributed on a TPU slice."
    )
  elif not 0 <= process_id < num_processes:
    raise ConfigError(
      f"--process-id must be in [0, {num_processes}), got {process_id}."
    )
  # Collectives between CPU processes; other platforms ignore it.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if cluster:
    _join(None, None, None, timeout)
  else:
    _join(coordinator, num_processes, process_id, timeout)
  if num_processes is not None and jax.process_count() != num_processes:
    raise ConfigError(
      f"{jax.process_count()} processes joined, not --num-processes "
      f"{num_processes}; start the command once on every worker."
    )


def _join(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: int,
) -> None:
  """jax.distributed.initialize with an error where JAX aborts the process.

  When a process never joins, JAX's own timeout ends the program with a C++
  stack trace. So JAX waits in a thread, for longer than this function does.
  """
  failures: list[Exception] = []

  def wait():
    try:
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=timeout + 3600,
      )
    except Exception as error:
      failures.append(error)

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  thread.join(timeout)
  if thread.is_alive():
    known = (
      ""
      if coordinator is None
      else f" (this is {process_id} of {num_processes}; 0 is at {coordinator})"
    )
    raise RunError(
      f"not all processes have joined within {timeout} s{known}. Look in the "
      "logs of the others for one that did not start or can't reach process "
      "0, then start the same command on all of them; --join-timeout waits "
      "longer."
    )
  if failures:
    (error,) = failures
    if isinstance(error, ValueError) and coordinator is None:
      raise ConfigError(
        "--distributed found no TPU slice, GKE job, Slurm or Open MPI around "
        f"this process ({error}). Leave it away for a single process, or give "
        "--coordinator, --num-processes and --process-id."
      ) from error
    raise error


def is_first() -> bool:
  """Whether this process writes logs and files."""
  return jax.process_index() == 0

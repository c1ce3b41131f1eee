"""Several processes that run one program."""

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax.errors import ConfigError, RunError


def initialize(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  cluster: bool,
  timeout: int,
  heartbeat_timeout: int,
) -> None:
  """Joins the job's other processes; must come before any use of a device.

  Args:
    coordinator: HOST:PORT of process 0; None, without `cluster`, runs alone.
    num_processes: of the job; with `cluster` it is only checked, when given.
    process_id: of this process.
    cluster: all three come from where JAX finds itself: the workers of a TPU
      slice, GKE, Slurm or Open MPI.
    timeout: seconds to wait for all processes.
    heartbeat_timeout: seconds without a sign of life after which a process
      counts as dead; JAX then ends all others.

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
  # SIGTERM is for `StopSignal`. JAX's own service for it would take it at any
  # time, to answer `reached_preemption_sync_point`, which Orbax asks as well:
  # from another thread, and with a step that may have passed.
  jax.config.update("jax_enable_preemption_service", False)
  if cluster:
    _join(None, None, None, timeout, heartbeat_timeout)
  else:
    _join(coordinator, num_processes, process_id, timeout, heartbeat_timeout)
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
  heartbeat_timeout: int,
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
        heartbeat_timeout_seconds=heartbeat_timeout,
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


def is_joined() -> bool:
  """Whether this process belongs to a job of several."""
  return jax.distributed.is_initialized()


def explain(error: Exception) -> str:
  """What an error that nobody expected means, with its traceback on stderr.

  Where a process is killed, the others get an error from whatever they were
  doing with it.
  """
  traceback.print_exception(error)
  return (
    f"process {jax.process_index()} of {jax.process_count()} can't go on "
    f"({type(error).__name__}, above). If another one has ended, its log says "
    "why; start the same command on all of them to resume from the newest "
    "checkpoint"
  )


def leave(status: int) -> NoReturn:
  """Ends this process at once, when it has failed and the job can't go on.

  At an ordinary exit JAX waits for the other processes, which wait for this one
  in the middle of a step. They learn of its end by the closed connection or
  after the heartbeat timeout.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def all_agree(here: bool) -> bool:
  """Whether `here` is true on all processes; waits for all of them."""
  return not bool(_anywhere(not here))


def _anywhere(here: bool) -> jax.Array | bool:
  """Whether `here` is true on any process: [] bool, perhaps not there yet."""
  if jax.process_count() == 1:
    return here
  program, mesh = _any_program()
  flags = jax.make_array_from_process_local_data(
    NamedSharding(mesh, PartitionSpec("all")),
    np.full([jax.local_device_count()], here),
  )
  return program(flags)


@functools.cache
def _any_program() -> tuple[Callable[[jax.Array], jax.Array], Mesh]:
  mesh = Mesh(np.asarray(jax.devices()), ("all",))
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda flags: flags.any(), out_shardings=whole), mesh


class StopSignal:
  """SIGTERM, of which all processes learn in the same step.

  Each says on the devices, in a program of one flag before every step's own,
  whether it has got the signal, and reads what all have said after the step, so
  nobody waits for it. All see the same answers, hence they stop together.
  """

  def __init__(self) -> None:
    """No signal yet."""
    self._received = False
    self._answer: jax.Array | bool = False

  def ask(self) -> None:
    """Starts to ask; every process calls it at the same steps."""
    self._answer = _anywhere(self._received)

  def __bool__(self) -> bool:
    """Whether any process had the signal when they asked last."""
    if jax.process_count() == 1:
      return self._received
    return bool(self._answer)

  @contextlib.contextmanager
  def listen(self) -> Iterator["StopSignal"]:
    """Takes SIGTERM for the duration of the context."""

    def receive(number, frame):
      self._received = True

    try:
      previous = signal.signal(signal.SIGTERM, receive)
    except ValueError:  # only the main thread may; a notebook's goes without
      yield self
      return
    try:
      yield self
    finally:
      signal.signal(signal.SIGTERM, previous)

"""Several processes that run one program."""

import jax

from clp_jax.config import ConfigError


def initialize(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Joins the job's other processes; must come before any use of a device.

  Args:
    coordinator: HOST:PORT of process 0; None runs alone.
    num_processes: of the job.
    process_id: of this process.

  Raises:
    ConfigError: when only some of the three are given.
  """
  if coordinator is None and num_processes is None and process_id is None:
    return
  if coordinator is None or num_processes is None or process_id is None:
    raise ConfigError(
      "--coordinator, --num-processes and --process-id belong together; "
      "give all three or none."
    )
  if not 0 <= process_id < num_processes:
    raise ConfigError(
      f"--process-id must be in [0, {num_processes}), got {process_id}."
    )
  # Collectives between CPU processes; other platforms ignore it.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(coordinator, num_processes, process_id)
  if jax.process_count() != num_processes:
    raise ConfigError(
      f"{jax.process_count()} processes joined, not {num_processes}."
    )


def is_first() -> bool:
  """Whether this process writes logs and files."""
  return jax.process_index() == 0

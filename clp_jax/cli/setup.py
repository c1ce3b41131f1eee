"""What every command sets up before its work: logs and compiled programs."""

import ctypes
import logging
import os
import sys

import jax


def configure() -> None:
  """Quiets libraries and keeps compiled programs between runs.

  The compilation cache lies in ~/.cache/clp_jax; JAX_COMPILATION_CACHE_DIR
  names another folder.
  """
  logging.basicConfig(format="clp: %(levelname)s: %(message)s")
  # What these raise is reported by the command; their threads log it as well.
  quiet = "absl asyncio concurrent.futures jax orbax tensorflow"
  for library in quiet.split():
    logging.getLogger(library).setLevel(logging.CRITICAL)
  sys.unraisablehook = _all_but_closed_loops
  _keep_freed_memory()
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    jax.config.update(
      "jax_compilation_cache_dir", os.path.join(cache, "clp_jax", "compiled")
    )
  # Small programs as well: a demo run is made of them.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_freed_memory() -> None:
  """Lets glibc keep what a step frees for the next step.

  A program on the CPU takes megabytes for its temporaries and frees them when
  it ends; glibc returns them to the kernel, which then has to clear and map new
  pages every step: a fifth of the time of a small model's training step.
  """
  _tell_malloc(trim_threshold=2**31 - 1, top_pad=2**26)


def _tell_malloc(**parameters: int) -> None:
  numbers = {"trim_threshold": -1, "top_pad": -2, "mmap_max": -4}  # malloc.h
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return
  for name, value in parameters.items():
    mallopt(numbers[name], value)


def suit_small_models() -> None:
  """Suits JAX on CPUs to a model whose steps take tens of milliseconds.

  It sees the CPU as two devices, over which it spreads a batch: two cores are
  busier with half a batch each than with one small matrix product after the
  other. Always two, so that figures do not depend on the machine, as rounding
  depends on the number. LLVM's first level of optimisation compiles in two
  thirds of the time, and the steps are as fast. What the environment says of
  either is left alone. Large blocks are kept as well when they are freed, which
  would take a large model's checkpoint more memory to read.
  """
  _tell_malloc(mmap_max=0)
  flags = os.environ.get("XLA_FLAGS", "")
  if "backend_optimization_level" not in flags:
    flags = f"{flags} --xla_backend_optimization_level=1"
  os.environ["XLA_FLAGS"] = flags.strip()
  if "host_platform_device_count" in flags:
    return
  if jax.config.values["jax_num_cpu_devices"] == -1:
    jax.config.update("jax_num_cpu_devices", 2)


def _all_but_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
  """Python's own hook, but for what follows a save that failed.

  Writes that TensorStore still had in flight then report to an event loop that
  Orbax has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)

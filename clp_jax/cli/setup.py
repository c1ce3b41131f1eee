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
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return
  trim_threshold, top_pad = -1, -2  # malloc.h
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)


def _all_but_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
  """Python's own hook, but for what follows a save that failed.

  Writes that TensorStore still had in flight then report to an event loop that
  Orbax has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)

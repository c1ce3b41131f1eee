"""What every command sets up before its work: logs and compiled programs."""

import logging
import os
import sys

import jax

from clp_jax.cli import memory


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
  memory.keep_freed()
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    jax.config.update(
      "jax_compilation_cache_dir", os.path.join(cache, "clp_jax", "compiled")
    )
  # Small programs as well: a command's start is made of them. Of less, finding
  # it, perhaps in a bucket, takes as long.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def _all_but_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
  """Python's own hook, but for what follows a save that failed.

  Writes that TensorStore still had in flight then report to an event loop that
  Orbax has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)

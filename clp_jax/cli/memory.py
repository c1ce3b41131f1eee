"""How glibc serves the gigabytes that a step on the CPU takes and frees."""

import ctypes
import os

# Threads of so many cores may share one lock for what they allocate.
FEW_CORES = 16


def keep_freed() -> None:
  """Lets glibc keep what a step frees for the next step.

  A program on the CPU takes up to gigabytes for its temporaries and results and
  frees them when it ends. glibc returns them to the kernel, and what has more
  than 32 MB it maps anew whatever was freed before, so that every step has new
  pages cleared and mapped: a fifth of the time of a small model's training
  step, a third of that of a product with a result of 32 MB. A thread, and XLA
  runs programs in threads, has no memory of its own for more than 64 MB: it is
  kept only where all threads allocate from one arena.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return
  trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
  no_limit = -1  # of a size_t; the names and numbers are malloc.h's
  mallopt(trim_threshold, no_limit)
  mallopt(top_pad, 2**26)
  mallopt(mmap_threshold, no_limit)
  if (os.cpu_count() or 1) <= FEW_CORES:
    mallopt(arena_max, 1)

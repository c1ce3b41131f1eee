"""How glibc serves the megabytes that a step on the CPU takes and frees."""

import ctypes


def keep_freed() -> None:
  """Lets glibc keep what a step frees for the next step.

  A program on the CPU takes megabytes for its temporaries and results and frees
  them when it ends. glibc returns them to the kernel, and what has more than 32
  MB it maps anew whatever was freed before, so that every step has new pages
  cleared and mapped: a fifth of the time of a small model's training step, a
  third of that of a product with a result of 32 MB.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # another C library
    return
  trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)
  mallopt(mmap_threshold, 2**31 - 1)

"""How glibc serves the megabytes that a step on the CPU takes and frees."""

import ctypes
import os
import sys

_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def use_huge_pages() -> None:
  """Starts this program anew, with glibc asking for pages of 2 MB.

  Temporaries of more than 32 MB are mapped anew every step, and a third of a
  small model's supervised step went to mapping and clearing pages of 4 kB.
  glibc takes this setting from the environment when a program starts, and at no
  other time. Nothing happens where the kernel would not listen, or gives huge
  pages unasked, or the user has set GLIBC_TUNABLES.
  """
  try:
    with open(_HUGE_PAGES) as file:
      on_demand = "[madvise]" in file.read()
  except OSError:  # not Linux
    return
  if on_demand and sys.executable and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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

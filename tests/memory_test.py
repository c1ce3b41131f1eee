"""What glibc is told about memory, when a command starts."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from clp_jax.cli import memory

FAULTS = """
import resource, sys, threading
from clp_jax.cli import memory
if sys.argv[1] == "kept":
  memory.keep_freed()

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
  b"x" * int(sys.argv[3])

def run():
  step()  # enlarges the heap
  before = faults()
  for _ in range(10):
    step()
  print(faults() - before)

if sys.argv[2] == "thread":
  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
else:
  run()
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc is told"
)
@pytest.mark.parametrize("where", ["main", "thread"])
def test_what_is_freed_is_not_mapped_anew(where):
  if where == "thread" and os.cpu_count() > memory.FEW_CORES:
    pytest.skip("threads of many cores keep their arenas")
  size = 2**27  # no thread's own arena holds it
  anew, kept = (
    int(
      subprocess.run(
        [sys.executable, "-c", FAULTS, how, where, str(size)],
        env=os.environ | {"GLIBC_TUNABLES": ""},  # no huge pages
        capture_output=True,
        text=True,
        check=True,
      ).stdout
    )
    for how in ("anew", "kept")
  )
  pages = size // resource.getpagesize()
  assert anew >= 10 * pages and kept < pages / 10

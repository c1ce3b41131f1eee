"""What glibc is told about memory, when a command starts."""

import os
import platform
import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from clp_jax.cli import memory
if sys.argv[1] == "kept":
  memory.keep_freed()

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

size = int(sys.argv[2])
b"x" * size  # enlarges the heap
before = faults()
for _ in range(10):
  b"x" * size
print(faults() - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc is told"
)
def test_what_is_freed_is_not_mapped_anew():
  size = 2**26
  anew, kept = (
    int(
      subprocess.run(
        [sys.executable, "-c", FAULTS, how, str(size)],
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

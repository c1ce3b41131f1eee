"""What glibc is told about memory, when a command starts."""

import os
import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from clp_jax.cli import memory
memory._HUGE_PAGES = sys.argv[1]
print("started", flush=True)
memory.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


def run(file, **more):
  """What such a program prints, started with an argument of two words."""
  environment = os.environ | more
  if not more:
    environment.pop("GLIBC_TUNABLES", None)
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, str(file), "two words", "*"],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()


def test_starts_anew_once_with_its_arguments(tmp_path):
  file = tmp_path / "enabled"
  file.write_text("always [madvise] never\n")
  assert run(file) == [
    "started",
    "started",
    "glibc.malloc.hugetlb=1 ['two words', '*']",
  ]


@pytest.mark.parametrize(
  "content", ["[always] madvise never", "always madvise [never]", None]
)
def test_goes_on_where_it_would_change_nothing(content, tmp_path):
  file = tmp_path / "enabled"
  if content is not None:
    file.write_text(content)
  assert run(file) == ["started", "None ['two words', '*']"]


def test_leaves_the_users_own_tunables(tmp_path):
  file = tmp_path / "enabled"
  file.write_text("always [madvise] never\n")
  said = run(file, GLIBC_TUNABLES="glibc.malloc.check=0")
  assert said == ["started", "glibc.malloc.check=0 ['two words', '*']"]


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

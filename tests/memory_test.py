"""What glibc is told about memory, when a command starts."""

import os
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

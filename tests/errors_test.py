"""What users can cause, and what the modules of errors and configs import."""

import json
import subprocess
import sys

import pytest

from clp_jax import config, errors, run_folder


def imported_by(module):
  """All modules that a new process has after one import."""
  program = f"import {module}, json, sys; print(json.dumps(list(sys.modules)))"
  printed = subprocess.check_output([sys.executable, "-c", program], text=True)
  return set(json.loads(printed))


def test_errors_need_no_jax():
  modules = imported_by("clp_jax.errors")
  assert "clp_jax.errors" in modules
  assert not modules & {"jax", "numpy", "ml_collections"}


def test_a_config_needs_nothing_else_of_the_package():
  modules = {
    m for m in imported_by("clp_jax.config") if m.startswith("clp_jax")
  }
  assert modules == {"clp_jax", "clp_jax.config", "clp_jax.errors"}


def test_errors_are_found_where_they_were():
  assert config.ConfigError is errors.ConfigError
  assert run_folder.RunError is errors.RunError


def test_a_value_error_about_a_config_is_the_users():
  with pytest.raises(errors.ConfigError, match="rank must be"):
    with errors.as_config_error():
      raise ValueError("rank must be positive.")

"""Tests of what commands set up before their work."""

import os
import subprocess
import sys

import pytest

DEVICES = "--xla_force_host_platform_device_count=4"
LEVEL = "--xla_backend_optimization_level"


def seen_after_setup(**environment):
  """JAX's number of devices and XLA's flags in a process of its own."""
  given = {
    name: value
    for name, value in os.environ.items()
    if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
  }
  program = (
    "import os, jax; from clp_jax.cli import setup; "
    "setup.configure(); setup.suit_small_models(); "
    "print(jax.device_count()); print(os.environ['XLA_FLAGS'])"
  )
  result = subprocess.run(
    [sys.executable, "-c", program],
    env=given | {"JAX_PLATFORMS": "cpu"} | environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  devices, flags = result.stdout.splitlines()
  return int(devices), flags.split()


@pytest.mark.parametrize(
  ("environment", "devices", "flags"),
  [
    ({}, 2, [f"{LEVEL}=1"]),
    ({"JAX_NUM_CPU_DEVICES": "3"}, 3, [f"{LEVEL}=1"]),
    ({"XLA_FLAGS": DEVICES}, 4, [DEVICES, f"{LEVEL}=1"]),
    ({"XLA_FLAGS": f"{LEVEL}=2"}, 2, [f"{LEVEL}=2"]),
  ],
)
def test_small_models_get_two_devices_unless_the_environment_has_said(
  environment, devices, flags
):
  assert seen_after_setup(**environment) == (devices, flags)

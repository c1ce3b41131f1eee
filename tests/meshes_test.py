"""One run on the built-in world, on every kind of mesh (slow)."""

import jax
import numpy as np
import pytest
import runs

STEPS = 20
MESHES = {
  "data 8": {},
  "data 4 x model 2": {"mesh.model": 2},
  "data 4 x model 2, fsdp": {"mesh.model": 2, "mesh.fsdp": True},
  "replica 2 x data 2 x model 2, fsdp": {
    "mesh.replica": 2,
    "mesh.model": 2,
    "mesh.fsdp": True,
  },
}


def arguments(workdir, sft, **fields):
  settings = {"train.steps": STEPS, "train.checkpoint_every": STEPS}
  return runs.train_arguments(workdir, sft, **(settings | fields))


def compare(one, other):
  assert len(one) == len(other) == STEPS
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys()
    for name, value in a.items():
      np.testing.assert_allclose(
        b[name], value, rtol=2e-3, atol=2e-4, err_msg=f"{name} {a['step']}"
      )


@pytest.fixture(scope="module")
def one_device(sft_run, tmp_path_factory):
  """Metrics of the run on one device, in a process of its own."""
  workdir = tmp_path_factory.mktemp("meshes") / "one"
  process = runs.start(arguments(workdir, sft_run), devices=1)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return runs.metrics(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_as_one(mesh, one_device, sft_run, tmp_path):
  assert jax.device_count() == 8
  status, _, err = runs.clp(
    *arguments(tmp_path / "run", sft_run, **MESHES[mesh])
  )
  assert status == 0, err
  compare(one_device, runs.metrics(tmp_path / "run"))

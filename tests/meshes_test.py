"""A run of each family on the built-in world, on every kind of mesh (slow)."""

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


MODELS = {
  "tiny": {},
  "tiny-decoder": {},
  "tiny-decoder, scanned": {"model.scan_layers": True},
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


@pytest.fixture(scope="module", params=MODELS)
def one_device(request, sft_runs, tmp_path_factory):
  """(metrics of the run on one device, in a process of its own; where it
  started; its fields)."""
  fields = MODELS[request.param]
  sft = sft_runs(request.param.partition(",")[0])
  workdir = tmp_path_factory.mktemp("meshes") / "one"
  process = runs.start(arguments(workdir, sft, **fields), devices=1)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return runs.metrics(workdir), sft, fields


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_as_one(mesh, one_device, tmp_path):
  assert jax.device_count() == 8
  expected, sft, fields = one_device
  workdir = tmp_path / "run"
  status, _, err = runs.clp(*arguments(workdir, sft, **fields, **MESHES[mesh]))
  assert status == 0, err
  compare(expected, runs.metrics(workdir))

"""Checkpoints on other devices than those that saved them, and bad ones."""

import functools
import logging
import shutil

import jax
import numpy as np
import optax
import pytest

from clp_jax import distributed, saved_params, sharding
from clp_jax.errors import RunError
from clp_jax.models import families, t5
from clp_jax.train import checkpoints, sft
from clp_jax.train.state import init_state, state_shardings

MODEL = t5.T5Config(
  vocab_size=16,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=12,
)
OPTIMIZER = optax.adam(1e-2)


def batch():
  tokens = np.random.default_rng(0).integers(2, 16, size=(2, 8, 5))
  tokens[:, ::2, 3:] = 0  # ragged
  return tokens.astype(np.int32)


@functools.cache
def programs(data, model):
  """(state's shardings, one update) on the first data x model devices."""
  mesh = sharding.make_mesh(data, model, jax.devices()[: data * model])
  at = state_shardings(
    mesh, abstract_shapes(), t5.logical_axes(MODEL), fsdp=True
  )
  rows = sharding.row_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(at, rows, rows))
  def update(state, inputs, targets):
    return sft.update(
      state, inputs, targets, model=families.build(MODEL), optimizer=OPTIMIZER
    )

  return at, update


def abstract_shapes():
  init = functools.partial(init_state, optimizer=OPTIMIZER)
  return jax.eval_shape(init, t5.abstract_params(MODEL), key=jax.random.key(0))


def abstract_state(data, model):
  return saved_params.abstract_like(abstract_shapes(), programs(data, model)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(run's folder, state after 2 updates on 4 x 2 devices, the third)."""
  workdir = tmp_path_factory.mktemp("checkpoints")
  at, update = programs(4, 2)
  params = t5.init_params(MODEL, jax.random.key(1))
  state = jax.device_put(init_state(params, OPTIMIZER, jax.random.key(2)), at)
  with checkpoints.Checkpoints(str(workdir), keep=3) as owner:
    for step in (1, 2):
      state, _ = update(state, *batch())
      owner.save(state, step)
  kernel = state.params["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
  assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
  return workdir, state, update(state, *batch())


def assert_same(a, b):
  if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
    a, b = jax.random.key_data(a), jax.random.key_data(b)
  assert a.dtype == b.dtype
  np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("mesh", [(4, 1), (1, 1), (2, 2)], ids=str)
def test_what_8_devices_saved_goes_on_with(mesh, saved):
  workdir, state, (after, metrics) = saved
  with checkpoints.Checkpoints(str(workdir), keep=3) as owner:
    restored, batches = owner.restore(abstract_state(*mesh))
  assert batches == 2
  jax.tree.map(assert_same, restored, state)
  used = restored.params["token_embedder"]["embedding"].sharding.device_set
  assert len(used) == mesh[0] * mesh[1]
  resumed, its_metrics = programs(*mesh)[1](restored, *batch())
  assert int(resumed.step) == 3
  np.testing.assert_allclose(its_metrics["loss"], metrics["loss"], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    resumed.params,
    after.params,
  )


def test_a_step_that_another_process_cannot_read_is_nobodys(
  saved, tmp_path, monkeypatch, caplog
):
  """All must fall back to the same step, also those that could read it."""
  workdir = tmp_path / "run"
  shutil.copytree(saved[0], workdir)
  others = iter([False, True])
  monkeypatch.setattr(
    distributed, "all_agree", lambda here: here and next(others)
  )
  with (
    caplog.at_level(logging.WARNING),
    checkpoints.Checkpoints(str(workdir), keep=3) as owner,
  ):
    restored, batches = owner.restore(abstract_state(1, 1))
  assert int(restored.step) == batches == 1
  assert "checkpoint 2 in" in caplog.text
  assert "another process can't read it" in caplog.text
  assert (workdir / "unreadable" / "2").exists()


def test_a_step_that_was_not_finished_is_not_seen(saved, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(saved[0], workdir)
  folder = workdir / "checkpoints"
  # Orbax writes under such a name and renames it when all is on disk.
  (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
  with checkpoints.Checkpoints(str(workdir), keep=3) as owner:
    restored, _ = owner.restore(abstract_state(1, 1))
  assert int(restored.step) == 1


def test_no_step_at_all_starts_anew_and_an_unwritable_one_says_so(tmp_path):
  with checkpoints.Checkpoints(str(tmp_path / "new"), keep=3) as owner:
    assert owner.restore(abstract_state(1, 1)) is None
  (tmp_path / "file").touch()
  with pytest.raises(RunError, match="can't save to .*file.*make it writable"):
    checkpoints.Checkpoints(str(tmp_path / "file"), keep=3)

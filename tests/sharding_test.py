"""Where parameters and rows lie on the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clp_jax import conditioning, sharding
from clp_jax.models import t5

CONFIG = t5.T5Config(
  vocab_size=16,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=12,
)


def specs(mesh, **settings):
  shardings = sharding.param_shardings(
    mesh,
    t5.logical_axes(CONFIG),
    t5.abstract_params(CONFIG),
    **settings,
  )
  return jax.tree.map(lambda s: s.spec, shardings)


def test_mesh_takes_all_devices_and_refuses_what_does_not_fit():
  assert dict(sharding.make_mesh(model=2).shape) == {"data": 4, "model": 2}
  with pytest.raises(ValueError, match="data=3 x model=2 does not fit 8"):
    sharding.make_mesh(3, 2)
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    sharding.make_mesh(model=3)


def test_parameters_are_cut_as_t5x_cuts_them():
  tree = specs(sharding.make_mesh(4, 2))
  mlp = tree["encoder"]["layers_0"]["mlp"]
  assert mlp["wi_0"]["kernel"] == PartitionSpec(None, "model")
  assert mlp["wo"]["kernel"] == PartitionSpec("model", None)
  attention = tree["decoder"]["layers_0"]["self_attention"]
  assert attention["query"]["kernel"] == PartitionSpec(None, "model")
  assert attention["out"]["kernel"] == PartitionSpec("model", None)
  assert tree["token_embedder"]["embedding"] == PartitionSpec("model", None)
  assert tree["encoder"]["encoder_norm"]["scale"] == PartitionSpec(None)


def test_fsdp_cuts_the_embedding_axis_over_data():
  tree = specs(sharding.make_mesh(4, 2), fsdp=True)
  kernel = tree["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
  assert kernel == PartitionSpec("data", "model")


def test_a_dimension_that_does_not_divide_stays_whole():
  tree = specs(sharding.make_mesh(1, 8))
  mlp = tree["encoder"]["layers_0"]["mlp"]  # 12 is no multiple of 8
  assert mlp["wi_0"]["kernel"] == PartitionSpec(None, None)
  assert tree["token_embedder"]["embedding"] == PartitionSpec("model", None)


def test_stacked_sets_are_whole_along_the_objectives():
  abstract = t5.abstract_params(CONFIG)
  steerable = conditioning.steerable_leaves(abstract, "attention")
  sets = jax.eval_shape(
    lambda p: conditioning.expand(p, steerable, 3), abstract
  )
  shardings = sharding.param_shardings(
    sharding.make_mesh(4, 2), t5.logical_axes(CONFIG), sets
  )
  attention = shardings["encoder"]["layers_0"]["attention"]
  assert attention["query"]["kernel"].spec == PartitionSpec(None, None, "model")


@pytest.mark.parametrize(
  "axes, message",
  [(None, "needs one"), (("embed",), "needs one"), (("x", "mlp"), "unknown")],
)
def test_a_parameter_without_known_axes_is_an_error(axes, message):
  kernel = jax.ShapeDtypeStruct(
    (4, 4) if axes != ("embed",) else (4, 4, 4), "f4"
  )
  with pytest.raises(ValueError, match=f"parameter a/b .*{message}"):
    sharding.param_shardings(
      sharding.make_mesh(8), {"a": {"b": axes}}, {"a": {"b": kernel}}
    )


def test_rows_go_to_the_devices_and_back():
  mesh = sharding.make_mesh(4, 2)
  rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  placed = sharding.to_devices(mesh, rows, 8)
  assert placed.sharding.shard_shape(placed.shape) == (2, 3)
  np.testing.assert_array_equal(sharding.to_host(placed), rows)
  assert sharding.process_rows(mesh, 8) == (0, 8)

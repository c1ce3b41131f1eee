"""Where parameters and rows lie on the mesh."""

import dataclasses
import re

import both_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_families import DECODER, both, mlp_kernel
from jax.sharding import NamedSharding, PartitionSpec

from clp_jax import conditioning, sharding
from clp_jax.models import families, t5

CONFIG = dataclasses.replace(both_families.T5, mlp_dim=12)


def specs(mesh, model=CONFIG, **settings):
  built = families.build(model)
  shardings = sharding.param_shardings(
    mesh, built.axes(), built.abstract(), **settings
  )
  return jax.tree.map(lambda s: s.spec, shardings)


def test_mesh_takes_all_devices_and_refuses_what_does_not_fit():
  mesh = sharding.make_mesh(model=2)
  assert dict(mesh.shape) == {"replica": 1, "data": 4, "model": 2}
  mesh = sharding.make_mesh(model=2, replica=2)
  assert dict(mesh.shape) == {"replica": 2, "data": 2, "model": 2}
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


def test_decoders_are_cut_as_t5_is():
  tree = specs(sharding.make_mesh(4, 2), DECODER)
  layers = tree["decoder"]["layers"]  # stacked
  for name in ("query", "key", "value"):
    kernel = layers["attention"][name]["kernel"]
    assert kernel == PartitionSpec(None, None, "model")
    bias = layers["attention"][name]["bias"]
    assert bias == PartitionSpec(None, "model")
  out = layers["attention"]["out"]["kernel"]
  assert out == PartitionSpec(None, "model", None)
  assert layers["mlp"]["wi_0"]["kernel"] == PartitionSpec(None, None, "model")
  assert layers["mlp"]["wo"]["kernel"] == PartitionSpec(None, "model", None)
  assert tree["token_embedder"]["embedding"] == PartitionSpec("model", None)
  norm = layers["attention"]["query_norm"]["scale"]
  assert norm == PartitionSpec(None, None)


@both
def test_fsdp_cuts_the_embedding_axis_over_data(model):
  tree = specs(sharding.make_mesh(4, 2), model, fsdp=True)
  layers = (None,) if model.scan_layers else ()
  expected = PartitionSpec(*layers, "data", "model")
  assert mlp_kernel(model, tree) == expected


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


@both
def test_rows_and_parameters_lie_on_a_folded_mesh_where_they_lay(model):
  mesh = sharding.make_mesh(4, 2)
  folded = sharding.fold_groups(mesh, 6)  # 2 divides 6 and 4
  assert dict(folded.shape) == {
    "replica": 1,
    "group": 2,
    "data": 2,
    "model": 2,
  }
  rows = sharding.row_sharding(mesh)
  assert sharding.row_sharding(folded).is_equivalent_to(rows, 2)
  built = families.build(model)
  for fsdp in (False, True):
    plain, cut = (
      sharding.param_shardings(m, built.axes(), built.abstract(), fsdp=fsdp)
      for m in (mesh, folded)
    )
    same = jax.tree.map(
      lambda a, b, p: a.is_equivalent_to(b, p.ndim),
      plain,
      cut,
      built.abstract(),
    )
    assert all(jax.tree.leaves(same))


def test_constraints_hold_on_a_mesh_and_are_nothing_elsewhere():
  mesh = sharding.fold_groups(sharding.make_mesh(4, 2), 2)

  def double(x):
    return sharding.constrain(2 * x, "batch", "heads")

  x = np.ones([4, 6], np.float32)
  assert jax.jit(double)(x).sharding.is_fully_replicated
  # Rows of all weightings are cut over their groups too.
  pinned = jax.jit(sharding.on_mesh(mesh, double))(x)
  assert pinned.sharding.shard_shape(x.shape) == (1, 3)

  def by_group(x):
    return sharding.map_groups(double, 0)(x)

  x = np.ones([2, 4, 5], np.float32)  # 5 is not divided by the model axis
  pinned = jax.jit(sharding.on_mesh(mesh, by_group))(x)
  assert pinned.sharding.shard_shape(x.shape) == (1, 2, 5)


def test_whole_policies_are_gathered_only_where_they_are_used():
  mesh = sharding.fold_groups(sharding.make_mesh(8), 4)
  names, shape = ("embed", "mlp"), (4, 16, 6)

  @jax.jit
  def send(policies):
    return sharding.on_mesh(
      mesh,
      lambda policies: sharding.spread(
        policies, {"kernel": names}, {"kernel": jnp.float32}, whole=True
      ),
      fsdp=True,
    )({"kernel": policies})

  at_rest = NamedSharding(mesh, PartitionSpec(None, ("group", "data")))
  policies = jax.device_put(np.random.default_rng(0).random(shape), at_rest)
  sent = send(policies)["kernel"]
  np.testing.assert_array_equal(sent, policies)
  assert sent.sharding.shard_shape(shape) == (1, 16, 6)
  text = send.lower(policies).compile().as_text()
  gathered = re.findall(r"= \w+\[(\d+),.* all-gather\(", text)
  assert gathered and set(gathered) == {"1"}  # a chip's own policy


def test_factored_moments_are_cut_as_their_parameter_is():
  mesh = sharding.make_mesh(4, 2)
  at = NamedSharding(mesh, PartitionSpec(None, "data", "model"))

  def spec(*shape):
    return sharding.moment_sharding(shape, (3, 128, 256), at).spec

  assert spec(3, 128, 256) == at.spec
  assert spec(3, 128) == PartitionSpec(None, "data")
  assert spec(3, 256) == PartitionSpec(None, "model")
  assert spec(1) == PartitionSpec()

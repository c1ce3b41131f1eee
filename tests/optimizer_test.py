"""Adafactor over stacked sets and layers, and for what starts at 0."""

import dataclasses
import functools
import json

import both_families
import jax
import jax.numpy as jnp
import moft_test
import numpy as np
import optax
import pytest
from both_families import DECODER, T5, both, cases, reference

from clp_jax import build, paper, sharding
from clp_jax.bank import Bank
from clp_jax.errors import RunError
from clp_jax.models import families, t5, trees
from clp_jax.train import checkpoints
from clp_jax.train import optimizer as optimizer_lib
from clp_jax.train.state import init_state, state_shardings

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
  return (scale * RNG.standard_normal(shape)).astype(np.float32)


# A matrix that is factored and one that is not, a vector, a number.
SHAPES = {"large": (130, 140), "small": (6, 5), "bias": (7,), "one": ()}
STEPS = 4


def leaves_of(lead, scale=1.0):
  return {
    name: normal(*lead, *shape, scale=scale) for name, shape in SHAPES.items()
  }


def trained(params, gradients, axes):
  """Parameters after Adafactor's steps on given gradients."""
  tx = optimizer_lib.make_optimizer(
    name="adafactor",
    learning_rate=1e-2,
    warmup_steps=2,
    decay_steps=None,
    clip_norm=1e9,
    axes=axes,
  )
  state = tx.init(params)
  step = jax.jit(lambda g, s, p: tx.update(g, s, p))
  for gradient in gradients:
    updates, state = step(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def alone(params, gradients, *index):
  """The same of one set, or one layer of one, by optax's own Adafactor."""

  def own(tree):
    return jax.tree.map(lambda x: jnp.asarray(x[index]), tree)

  tx = optax.adafactor(
    optimizer_lib.make_schedule(1e-2, 2, None), momentum=None
  )
  params = own(params)
  state = tx.init(params)
  for gradient in gradients:
    updates, state = tx.update(own(gradient), state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize(
  "lead, names",
  [
    ((), ()),
    ((3,), ("objective",)),
    ((4,), ("layers",)),
    ((2, 3), ("objective", "layers")),
    # As many as could be taken for a dimension to factor.
    ((131,), ("layers",)),
  ],
)
def test_every_set_and_layer_trains_as_if_it_were_alone(lead, names):
  params = leaves_of(lead)
  for name in params:  # of scales of their own
    params[name] *= np.exp(normal(*lead, *(1,) * len(SHAPES[name])))
  gradients = [leaves_of(lead, scale=0.1) for _ in range(STEPS)]
  gradients[2] = jax.tree.map(np.copy, gradients[2])
  if lead:
    for leaf in gradients[2].values():
      leaf[-1] *= 21  # a spike in the last set or layer alone
  axes = {n: (*names, *"xy"[: len(s)]) for n, s in SHAPES.items()}
  got, _ = trained(params, gradients, axes)
  for index in {(0,) * len(lead), tuple(n - 1 for n in lead)}:
    expected = alone(params, gradients, *index)
    for name, leaf in expected.items():
      moved = np.abs(leaf - params[name][index]).max()
      assert moved > 0
      np.testing.assert_allclose(
        got[name][index], leaf, rtol=1e-6, atol=1e-5 * moved
      )


def test_axes_that_stack_must_lead():
  with pytest.raises(ValueError, match="must lead"):
    optimizer_lib.make_optimizer(
      name="adafactor",
      learning_rate=1.0,
      warmup_steps=0,
      decay_steps=None,
      clip_norm=1.0,
      axes={"kernel": ("embed", "layers", "mlp")},
    )


def test_factored_moments_take_no_more_memory_than_rows_and_columns():
  params = leaves_of((3, 2))
  axes = {
    n: ("objective", "layers", *"xy"[: len(s)]) for n, s in SHAPES.items()
  }
  _, state = trained(params, [params], axes)
  (factored,) = (
    s
    for s in jax.tree.leaves(
      state, is_leaf=lambda x: isinstance(x, optax.FactoredState)
    )
    if isinstance(s, optax.FactoredState)
  )
  sizes = {
    name: sum(
      int(np.prod(getattr(factored, part)[name].shape))
      for part in ("v_row", "v_col", "v")
    )
    for name in SHAPES
  }
  # Rows and columns of six matrices; elsewhere a moment a number, and for what
  # a leaf does not have a placeholder a matrix.
  assert sizes["large"] == 6 * (130 + 140 + 1)
  assert sizes["small"] == 6 * (6 * 5 + 2)


def test_the_state_lies_as_its_parameters_do():
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  abstract = {"kernel": jax.ShapeDtypeStruct((2, 3, 128, 256), jnp.float32)}
  axes = {"kernel": ("objective", "layers", "embed", "mlp")}
  tx = optimizer_lib.make_optimizer(
    name="adafactor",
    learning_rate=1e-2,
    warmup_steps=0,
    decay_steps=None,
    clip_norm=1.0,
    axes=axes,
  )
  state = jax.eval_shape(
    lambda params, key: init_state(params, tx, key),
    abstract,
    jax.random.key(0),
  )
  placed = state_shardings(mesh, state, axes, fsdp=True).opt_state
  shapes = state.opt_state
  cut = {
    part: getattr(p, part)["kernel"].shard_shape(
      getattr(s, part)["kernel"].shape
    )
    for p, s in zip(
      *(
        [
          x
          for x in jax.tree.leaves(
            tree, is_leaf=lambda x: isinstance(x, optax.FactoredState)
          )
          if isinstance(x, optax.FactoredState)
        ]
        for tree in (placed, shapes)
      ),
      strict=True,
    )
    for part in ("v_row", "v_col")
  }
  # Rows along embed, which fsdp cuts by 2; columns along mlp, by model's 2.
  assert cut == {"v_row": (2, 3, 64), "v_col": (2, 3, 128)}


def two_layers(model):
  """Not scanned."""
  if isinstance(model, t5.T5Config):
    model = both_families.SCANNED_T5
  return dataclasses.replace(model, scan_layers=False)


@pytest.mark.parametrize(
  "model",
  cases(
    (True, both_families.SCANNED_T5),
    (False, DECODER),
    (False, two_layers(T5)),
    (False, two_layers(DECODER)),
  ),
)
def test_a_vertex_equals_a_single_objective_run_under_adafactor(model):
  changes = {"optimizer.name": "adafactor"}
  mesh = moft_test.mesh_of()
  config = moft_test.make_config(
    **changes, **{"weightings.weights": (0.0, 1.0)}
  )
  state, _, _ = moft_test.train(config, mesh, 5, model=model)
  single = moft_test.make_config(**changes, steering="none")
  single.objectives = ("b",)
  alone_state, _, _ = moft_test.train(
    single,
    mesh,
    5,
    lambda rollout: moft_test.rewards_of(rollout)[:, 1:],
    model=model,
  )

  def check(sets, one, start):
    moved = np.abs(one - start).max()
    assert moved > 0
    np.testing.assert_allclose(sets[1], one, rtol=0, atol=2e-4 * moved)
    np.testing.assert_array_equal(sets[0], start)  # it has had no gradient

  jax.tree.map(check, state.params, alone_state.params, reference(model))


@pytest.mark.parametrize("family", cases((True, T5), (False, DECODER)))
@pytest.mark.slow
def test_scanned_layers_train_as_unrolled_ones_under_adafactor(family):
  unrolled = two_layers(family)
  stack, _ = both_families.stack_of(unrolled)
  params = jax.tree.map(np.copy, reference(unrolled))
  # One layer of ten times the scale.
  params[stack]["layers_1"] = jax.tree.map(
    lambda x: 10 * x, params[stack]["layers_1"]
  )
  config = moft_test.make_config(**{"optimizer.name": "adafactor"})
  found = {}
  for scan in (False, True):
    model = dataclasses.replace(unrolled, scan_layers=scan)
    own = trees.stack_layers(params) if scan else params
    state, _, _ = moft_test.train(
      config, moft_test.mesh_of(), 2, model=model, start=own
    )
    sets = [jax.tree.map(lambda x, i=i: x[i], state.params) for i in range(2)]
    found[scan] = [trees.unstack_layers(s) if scan else s for s in sets]
  for one, other in zip(found[False], found[True], strict=True):
    jax.tree.map(
      lambda x, y, start: np.testing.assert_allclose(
        x, y, rtol=0, atol=1e-3 * np.abs(x - start).max()
      ),
      one,
      other,
      params,
    )


WIDE = t5.T5Config(
  vocab_size=32,
  emb_dim=160,
  num_heads=2,
  head_dim=80,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=192,
)


@functools.cache
def wide_reference():
  return jax.jit(families.build(WIDE).init)(jax.random.key(0))


def kernel_of(policy):
  return np.asarray(policy["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"])


def moved_under(config, name):
  """How far 100 steps of one direction move a kernel, relative to itself."""
  config = config.copy_and_resolve_references()
  config.steering = name
  bank = build.bank(config, WIDE)
  reference = wide_reference()
  tx = optimizer_lib.rl_optimizer(config, bank.logical_axes)

  @jax.jit
  def start():
    params = bank.init(reference, jax.random.key(1))
    scales = bank.update_scales(reference)
    return params, optimizer_lib.set_floors(tx.init(params), scales)

  params, state = start()
  c = jnp.asarray([1.0, 0.0])
  wanted = jax.random.normal(jax.random.key(2), kernel_of(reference).shape)

  def loss(params):
    policy = bank.mix(params, reference, c)
    kernel = policy["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    return (kernel * wanted).sum()

  @jax.jit
  def after_100(params, state):
    def step(_, carry):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, 100, step, (params, state))[0]

  params = after_100(params, state)
  before = kernel_of(reference)
  after = kernel_of(jax.jit(bank.mix)(params, reference, c))
  return np.linalg.norm(after - before) / np.linalg.norm(before)


@pytest.fixture
def papers_config():
  config = paper.get_config("xsum", "base")
  config.optimizer.warmup_steps = 0
  config.adapters.orthogonality = 0.0
  return config


def test_adapters_move_their_kernels_as_far_as_full_sets(papers_config):
  moved = {
    kind: moved_under(papers_config, kind)
    for kind in ("full", "lora", "svd_lora")
  }
  assert 5e-3 < moved["full"] < 2e-2  # 100 steps of 1e-4
  for kind in ("lora", "svd_lora"):
    assert moved["full"] / 3 < moved[kind] < 3 * moved["full"]


def test_adams_state_has_no_scales():
  config = moft_test.make_config(steering="lora")
  bank = build.bank(config, WIDE)
  reference = wide_reference()
  state = optimizer_lib.rl_optimizer(config, bank.logical_axes).init(
    bank.init(reference, jax.random.key(1))
  )
  same = optimizer_lib.set_floors(state, bank.update_scales(reference))
  jax.tree.map(np.testing.assert_array_equal, state, same)
  assert not optimizer_lib.is_adafactor(state)


@both
def test_the_trained_run_has_the_adapters_scales(model):
  config = moft_test.make_config(
    steering="lora", **{"optimizer.name": "adafactor"}
  )
  start = reference(model)
  programs = moft_test.make_programs(config, moft_test.mesh_of(), model)
  state = programs.init(start, jax.random.key(0))
  bank: Bank = build.bank(config, model)
  scales = bank.update_scales(start)
  (floors,) = (
    x.floor
    for x in jax.tree.leaves(
      state.opt_state,
      is_leaf=lambda x: isinstance(x, optimizer_lib.ParameterScaleState),
    )
    if isinstance(x, optimizer_lib.ParameterScaleState)
  )
  path = (*both_families.stack_of(model), "mlp", "wi_0", "lora_b")
  found = both_families.at(floors, *path)
  np.testing.assert_allclose(
    found, np.broadcast_to(scales[path], found.shape), rtol=1e-6
  )
  assert np.min(scales[path]) > 10 * optimizer_lib.FLOOR


@pytest.mark.parametrize("name", ["adafactor", "adam"])
def test_an_old_layout_of_adafactors_state_is_refused(tmp_path, name):
  tx = optimizer_lib.make_optimizer(
    name=name,
    learning_rate=1e-2,
    warmup_steps=0,
    decay_steps=None,
    clip_norm=1.0,
  )
  state = init_state({"kernel": jnp.ones([3, 4])}, tx, jax.random.key(0))
  with checkpoints.Checkpoints(str(tmp_path), keep=2) as saved:
    saved.save(state, 5)
  file = tmp_path / "checkpoints" / "0" / "data" / "metadata"
  assert json.loads(file.read_text()) == {"batches": 5, "layout": 2}
  file.write_text(json.dumps({"batches": 5}))
  abstract = jax.eval_shape(lambda: state)
  with checkpoints.Checkpoints(str(tmp_path), keep=2) as saved:
    if name == "adam":  # its state is what it was
      assert saved.restore(abstract)[1] == 5
    else:
      with pytest.raises(RunError, match="older layout.*new --workdir"):
        saved.restore(abstract)
  assert file.exists()  # nothing was set aside

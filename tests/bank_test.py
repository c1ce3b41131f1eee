"""The bank: adapters, soft tokens and what is frozen, as one T5."""

import dataclasses
import functools

import both_families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import clp_jax
from clp_jax import adapters, sharding
from clp_jax.bank import Bank
from clp_jax.models import decoding, families, t5
from clp_jax.sampling import Sampling
from clp_jax.train.optimizer import keep_orthogonal

CONFIG = dataclasses.replace(
  both_families.T5, vocab_size=11, head_dim=3, mlp_dim=5
)
DECODER = dataclasses.replace(
  both_families.LISTED_DECODER,
  vocab_size=11,
  num_heads=3,
  num_kv_heads=1,
  head_dim=2,
  mlp_dim=5,
)
both = pytest.mark.parametrize(
  "model", [CONFIG, DECODER], ids=["t5", "decoder"]
)
BOTH = ("attention", "mlp")


def query_of(config):
  return (*both_families.stack_of(config), "attention", "query")


QUERY = query_of(CONFIG)


def make_bank(kind, frozen_kl=False, targets=BOTH, config=CONFIG, **changes):
  adapter = None
  if kind in adapters.KINDS:
    adapter = adapters.Adapter(kind, 2, 0.7, targets, frozen_kl)
  settings = {"frozen_shared": adapter is not None} | changes
  return Bank(config, kind, 3, frozen_kl=frozen_kl, adapter=adapter, **settings)


@functools.cache
def reference(config=CONFIG):
  """A base with zeros of both signs among its parameters."""
  random = np.random.default_rng(0)

  def leaf(p):
    values = random.normal(size=p.shape) * (random.uniform(size=p.shape) > 0.2)
    values = np.where(values == 0, random.choice([0.0, -0.0], p.shape), values)
    return values.astype(np.float32)

  return jax.tree.map(leaf, families.build(config).abstract())


@functools.cache
def jitted(kind, **changes):
  """A bank whose KL set is frozen, and its `mix`."""
  bank = make_bank(kind, frozen_kl=True, **changes)
  return bank, jax.jit(bank.mix)


@functools.cache
def jitted_query(kind, frozen_kl=False):
  """A bank and one kernel of its `mix`: a program of a few operations."""
  bank = make_bank(kind, frozen_kl)

  @jax.jit
  def kernel(params, coefficients):
    mixed = bank.mix(params, reference(), coefficients)
    return _module(mixed, QUERY)["kernel"]

  return bank, kernel


def trained(bank, seed=1):
  """Parameters that all differ from the first ones and from one another."""
  random = np.random.default_rng(seed)
  first = bank.init(reference(bank.reference_config), jax.random.key(3))
  return jax.tree.map(
    lambda p: np.asarray(p + random.normal(size=p.shape), np.float32), first
  )


def at(tree, *path):
  for name in path:
    tree = tree[name]
  return np.asarray(tree)


def assert_bitwise_equal(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)
    ),
    a,
    b,
  )


INTERIOR = np.float32([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
WEIGHTINGS = np.concatenate([INTERIOR, np.eye(3, dtype=np.float32)])


@both
@pytest.mark.parametrize("kind", ["lora", "svd_lora"])
def test_untrained_bank_is_the_base_bit_for_bit(kind, model):
  bank, mix = jitted(kind, config=model)
  base = reference(model)
  params = bank.init(base, jax.random.key(3))
  mixed = mix(params, base, INTERIOR)
  expected = jax.tree.map(
    lambda p, s: np.broadcast_to(p, (2, *p.shape)) if s else p,
    base,
    bank.steerable,
  )
  assert_bitwise_equal(mixed, expected)


def test_lora_mixes_products_and_a_vertex_adds_that_sets():
  bank, kernels_of = jitted_query("lora")
  params = trained(bank)
  a, b = (at(params, *QUERY, name) for name in ("lora_a", "lora_b"))
  assert a.shape == (3, 8, 2) and b.shape == (3, 2, 6)
  base = at(reference(), *QUERY, "kernel")
  kernels = np.asarray(kernels_of(params, WEIGHTINGS))
  products = np.matmul(a.astype(np.float64), b)
  expected = base + 0.7 * np.einsum("gm,mdf->gdf", WEIGHTINGS, products)
  np.testing.assert_allclose(kernels, expected, atol=2e-5)
  # Mixing the factors instead gives something else.
  factors = np.einsum("gm,mdr->gdr", INTERIOR, a) @ np.einsum(
    "gm,mrf->grf", INTERIOR, b
  )
  assert np.abs(kernels[:2] - (base + 0.7 * factors)).max() > 0.1
  # Equal sets: the same policy for any weighting, to the bit.
  equal = jax.tree.map(lambda p: np.broadcast_to(p[:1], p.shape), params)
  kernels = np.asarray(kernels_of(equal, WEIGHTINGS))
  assert_bitwise_equal(kernels, np.broadcast_to(kernels[:1], kernels.shape))


def svd_kernel(params, coefficients, base, where=QUERY):
  """Of one weighting, in float64."""
  p, v, s, q = (
    at(params, *where, f"svd_{name}").astype(np.float64)
    for name in ("left", "values", "scale", "right")
  )
  diagonal = np.concatenate([v, np.asarray(coefficients, np.float64) * s])
  return base + 0.7 * p @ np.diag(diagonal) @ q


def test_svd_loras_last_singular_values_are_the_coefficients():
  bank, kernels_of = jitted_query("svd_lora")
  params = trained(bank)
  base = at(reference(), *QUERY, "kernel")
  kernels = np.asarray(kernels_of(params, WEIGHTINGS))
  for kernel, coefficients in zip(kernels, WEIGHTINGS, strict=True):
    expected = svd_kernel(params, coefficients, base)
    np.testing.assert_allclose(kernel, expected, atol=2e-5)
  assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "svd_lora"])
@pytest.mark.parametrize("untrained", [False, True])
def test_gradient_through_adapters_is_the_closed_form(kind, untrained):
  """Also where nothing is added yet, and the forward pass selects the base."""
  bank, _ = jitted_query(kind)
  params = trained(bank)
  if untrained:
    params = bank.init(reference(), jax.random.key(3))
  leaves = {name: np.asarray(x) for name, x in _module(params, QUERY).items()}
  target = np.random.default_rng(5).normal(size=(2, 8, 6))
  kernel = reference()["encoder"]["layers_0"]["attention"]["query"]["kernel"]

  def value(leaves, kernel, coefficients):
    adapted = bank.adapter.adapt(kernel, leaves, coefficients)
    return (adapted * target.astype(np.float32)).sum()

  d_leaves, d_kernel, d_c = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(
    leaves, kernel, jnp.asarray(INTERIOR)
  )
  x = {name: leaf.astype(np.float64) for name, leaf in leaves.items()}
  g, c = 0.7 * target, INTERIOR.astype(np.float64)
  if kind == "lora":
    expected = {
      "lora_a": np.einsum("gm,gdf,mrf->mdr", c, g, x["lora_b"]),
      "lora_b": np.einsum("gm,gdf,mdr->mrf", c, g, x["lora_a"]),
    }
    expected_c = np.einsum("gdf,mdr,mrf->gm", g, x["lora_a"], x["lora_b"])
  else:
    own = c * x["svd_scale"]
    diagonal = np.concatenate(
      [np.broadcast_to(x["svd_values"], (2, 2)), own], axis=1
    )
    p, q = x["svd_left"], x["svd_right"]
    d_diagonal = np.einsum("gdf,dk,kf->gk", g, p, q)
    expected = {
      "svd_left": np.einsum("gdf,gk,kf->dk", g, diagonal, q),
      "svd_right": np.einsum("gdf,dk,gk->kf", g, p, diagonal),
      "svd_values": d_diagonal[:, :2].sum(0),
      "svd_scale": (d_diagonal[:, 2:] * c).sum(),
    }
    expected_c = d_diagonal[:, 2:] * x["svd_scale"]
  assert sum(np.abs(e).max() > 0.1 for e in expected.values()) >= 1
  for name, e in expected.items():
    np.testing.assert_allclose(d_leaves[name], e, atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(d_c, expected_c, atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(d_kernel, target.sum(0), atol=1e-5)


def _module(params, path):
  for name in path:
    params = params[name]
  return params


@both
@pytest.mark.parametrize("kind", ["full", "lora", "svd_lora"])
def test_a_frozen_kl_set_makes_alpha_1_the_reference(kind, model):
  bank, mix = jitted(kind, config=model)
  whole, where = reference(model), query_of(model)
  params = trained(bank)
  weights = np.float32([[0.3, 0.7], [0.3, 0.7]])
  rows = np.asarray(clp_jax.coefficients(weights, np.float32([1.0, 0.4])))
  mixed = mix(params, whole, rows)
  alpha_1 = jax.tree.map(lambda p, s: p[0] if s else p, mixed, bank.steerable)
  assert_bitwise_equal(alpha_1, whole)
  # Elsewhere the reference counts with weight alpha.
  c, kernel = rows[1], at(mixed, *where, "kernel")[1]
  base = at(whole, *where, "kernel").astype(np.float64)
  if kind == "full":
    sets = at(params, *where, "kernel")
    assert sets.shape == (2, 8, 6)  # neither trained nor stored
    expected = c[0] * sets[0] + c[1] * sets[1] + c[2] * base
  elif kind == "lora":
    a, b = (at(params, *where, name) for name in ("lora_a", "lora_b"))
    expected = base + 0.7 * (c[0] * a[0] @ b[0] + c[1] * a[1] @ b[1])
  else:
    shared = dict(_module(params, where))
    shared["svd_values"] = shared["svd_values"] * np.float32(0.6)
    nested = traverse_util.unflatten_dict({where: shared})
    expected = svd_kernel(nested, c[:2], base, where)
  np.testing.assert_allclose(kernel, expected, atol=2e-5)


@both
def test_shared_parameters_frozen_too_make_attention_the_reference(model):
  bank, mix = jitted("attention", frozen_shared=True, config=model)
  params = trained(bank)
  alpha_1 = clp_jax.coefficients(np.float32([0.3, 0.7]), 1.0)
  assert_bitwise_equal(mix(params, reference(model), alpha_1), reference(model))
  names = {path[-2] for path in traverse_util.flatten_dict(params)}
  norms = {"query_norm", "key_norm"} if model == DECODER else set()
  assert names == {"query", "key", "value", "out"} | norms


@pytest.mark.parametrize("kind", ["lora", "svd_lora"])
def test_what_is_not_trained_holds_no_optimizer_state(kind):
  bank = make_bank(kind, targets=("attention",))
  params = jax.eval_shape(
    bank.init, t5.abstract_params(CONFIG), jax.random.key(0)
  )
  paths = traverse_util.flatten_dict(params)
  prefix = kind.split("_")[0]
  assert {path[-1].split("_")[0] for path in paths} == {prefix}
  assert not any("mlp" in path for path in paths)
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  size = sum(x.size for x in jax.tree.leaves(params))
  assert sum(x.size for x in jax.tree.leaves(state)) == 2 * size + 1


@pytest.mark.parametrize("kind", ["lora", "svd_lora"])
def test_permuting_sets_with_their_coefficients_changes_nothing(kind):
  bank, kernels_of = jitted_query(kind)
  params = trained(bank)
  order = np.array([2, 0, 1])

  def permute(path, leaf):
    if kind == "lora":
      return leaf[order]
    columns = np.concatenate([[0, 1], 2 + order])  # two are shared
    if path[-1].key == "svd_left":
      return leaf[:, columns]
    return leaf[columns] if path[-1].key == "svd_right" else leaf

  permuted = jax.tree_util.tree_map_with_path(permute, params)
  a = kernels_of(params, WEIGHTINGS)
  b = kernels_of(permuted, WEIGHTINGS[:, order])
  np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "svd_lora"])
def test_scanned_layers_are_adapted_as_unrolled_ones(kind):
  config = dataclasses.replace(CONFIG, num_encoder_layers=2, scan_layers=True)
  bank = make_bank(kind, config=config)
  random = np.random.default_rng(2)
  abstract = t5.abstract_params(config)
  first = jax.eval_shape(bank.init, abstract, jax.random.key(1))
  stacked, params = jax.tree.map(
    lambda p: random.normal(size=p.shape).astype(np.float32), (abstract, first)
  )
  where = ("encoder", "layers", "attention", "query")

  @jax.jit
  def kernels_of(params, coefficients):
    return _module(bank.mix(params, stacked, coefficients), where)["kernel"]

  both = np.asarray(kernels_of(params, INTERIOR))
  assert both.shape == (2, 2, 8, 6)
  for layer in range(2):
    axis = 1 if kind == "lora" else 0
    leaves = {
      name: jnp.take(leaf, layer, axis=axis)
      for name, leaf in _module(params, where).items()
    }
    kernel = _module(stacked, where)["kernel"][layer]
    one = bank.adapter.adapt(kernel, leaves, jnp.asarray(INTERIOR))
    np.testing.assert_allclose(both[:, layer], one, atol=1e-6)


def test_any_bank_can_be_had_as_plain_sets():
  bank, kernels_of = jitted_query("lora")
  params = trained(bank)

  @jax.jit
  def query(params):
    return _module(bank.stacked(params, reference()), QUERY)

  mixed = clp_jax.mix(query(params), {"kernel": True}, WEIGHTINGS)
  np.testing.assert_allclose(
    mixed["kernel"], kernels_of(params, WEIGHTINGS), atol=1e-5
  )


def test_factors_are_cut_as_their_kernels_are():
  mesh = sharding.make_mesh(4, 2)
  specs = {}
  for kind in adapters.KINDS:
    bank = make_bank(kind, soft_tokens=2)
    abstract = jax.eval_shape(
      bank.init, t5.abstract_params(CONFIG), jax.random.key(0)
    )
    placed = sharding.param_shardings(
      mesh, bank.logical_axes, abstract, fsdp=True
    )
    specs |= {
      name: tuple(leaf.spec) for name, leaf in _module(placed, QUERY).items()
    }
    specs["soft"] = tuple(placed["soft_tokens"]["embedding"].spec)
  assert specs == {
    "lora_a": (None, "data", None),
    "lora_b": (None, None, "model"),
    "svd_left": ("data", None),
    "svd_values": (None,),
    "svd_scale": (),
    "svd_right": (None, "model"),
    "soft": (None, None, "data"),
  }


def test_the_penalty_vanishes_for_orthonormal_factors_only():
  bank = make_bank("svd_lora", targets=("attention",))
  params = trained(bank)

  def orthonormal(path, leaf):
    if path[-1].key == "svd_left":
      return np.linalg.qr(leaf)[0]
    if path[-1].key == "svd_right":
      return np.linalg.qr(leaf.T)[0].T
    return leaf

  exact = jax.tree_util.tree_map_with_path(orthonormal, params)
  assert adapters.orthogonality(exact) < 1e-9
  expected = []
  for path, leaf in traverse_util.flatten_dict(params).items():
    if path[-1] in ("svd_left", "svd_right"):
      p = leaf.T if path[-1] == "svd_left" else leaf
      expected.append(((p @ p.T - np.eye(5)) ** 2).sum())
  np.testing.assert_allclose(
    adapters.orthogonality(params),
    sum(expected) / (len(expected) / 2),
    rtol=1e-4,
  )
  # The optimizer follows it, whatever the loss is.
  step = optax.chain(keep_orthogonal(0.5), optax.sgd(0.002))
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(step.update)(zero, step.init(params), params)
  moved = optax.apply_updates(params, updates)
  assert adapters.orthogonality(moved) < 0.99 * adapters.orthogonality(params)


def soft_model(config):
  """Whose soft tokens are the embeddings of the words 7 and 4."""
  base = reference(config)
  table = base["token_embedder"]["embedding"]
  soft = {"embedding": table[[7, 4]]}
  model = families.build(dataclasses.replace(config, soft_tokens=2))
  return model, base | {"soft_tokens": soft}


@functools.partial(jax.jit, static_argnums=0)
def logp_of(model, params, prompts, targets):
  scores = decoding.score_tokens(model, params, prompts, targets, num_samples=2)
  return scores.logp


PROMPTS = np.int32([[3, 5, 8, 1, 0, 0], [9, 6, 2, 4, 3, 1]])


@both
def test_soft_tokens_are_words_before_the_input(model):
  """Masks, positions, windows and cross-attention: logits are those of the
  ordinary model that reads the same words."""
  soft_tokens, params = soft_model(model)
  ordinary, base = families.build(model), reference(model)
  prompts = both_families.with_padding(model, PROMPTS)
  words = np.concatenate([np.int32([[7, 4]] * 2), prompts], axis=1)
  targets = np.int32([[2, 5, 1], [6, 1, 0], [3, 3, 1], [4, 8, 9]])
  soft = logp_of(soft_tokens, params, prompts, targets)
  hard = both_families.plain_logp(model, base, words, targets)
  np.testing.assert_allclose(soft, hard, atol=2e-5)
  plain = logp_of(ordinary, base, prompts, targets)
  assert np.abs(soft - plain).max() > 0.01


@both
def test_decoding_with_soft_tokens_gives_teacher_forced_log_probabilities(
  model,
):
  soft_tokens, params = soft_model(model)
  prompts = both_families.with_padding(model, PROMPTS)
  allowed = np.arange(11) != 0
  sample = functools.partial(
    decoding.sample,
    soft_tokens,
    sampling=Sampling(allowed, model.eos_ids, model.pad_id),
    max_length=3,
    num_samples=2,
  )
  keys = jax.random.split(jax.random.key(0), 4)
  samples = jax.jit(sample)(params, prompts, keys)
  words = np.concatenate([np.int32([[7, 4]] * 2), prompts], axis=1)
  logp = both_families.plain_logp(
    model, reference(model), words, samples.tokens
  )
  logp = np.where(samples.mask, logp, 0)
  np.testing.assert_allclose(samples.logp, logp, atol=1e-4)


def test_soft_tokens_mix_as_sets_under_every_kind():
  for kind in ("none", "lora"):
    bank = make_bank(kind, soft_tokens=2)
    params = trained(bank)
    assert params["soft_tokens"]["embedding"].shape == (3, 2, 8)

    @jax.jit
    def soft_tokens(params, bank=bank):
      mixed = bank.mix(params, reference(), INTERIOR[0])
      return mixed["soft_tokens"]["embedding"]

    np.testing.assert_allclose(
      soft_tokens(params),
      np.tensordot(INTERIOR[0], params["soft_tokens"]["embedding"], 1),
      atol=1e-6,
    )


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: adapters.Adapter("lora", 0, 1.0, BOTH), "rank must be at least 1"),
    (lambda: adapters.Adapter("lora", 1, 1.0, ()), "targets must be some of"),
    (lambda: make_bank("none", frozen_shared=True), "leaves nothing to train"),
    (lambda: make_bank("full", True, soft_tokens=2), "has no soft tokens"),
    (
      lambda: make_bank("full").mix({}, {}, jnp.ones([2]) / 2),
      "2 coefficients for 3 parameter sets",
    ),
  ],
)
def test_what_can_not_work_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()

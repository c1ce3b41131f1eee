"""The heart: which leaves steer, expand, mix and its gradient."""

import dataclasses
import functools

import both_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clp_jax
from clp_jax import adapters
from clp_jax.bank import Bank
from clp_jax.low_rank import LowRank
from clp_jax.models import families, t5

CONFIG = dataclasses.replace(
  both_families.T5, vocab_size=11, head_dim=3, mlp_dim=5
)
DECODER = dataclasses.replace(both_families.DECODER, vocab_size=11, mlp_dim=5)
both = pytest.mark.parametrize(
  "model", [CONFIG, DECODER], ids=["t5", "decoder"]
)


ABSTRACT = t5.abstract_params(CONFIG)


def abstract(config):
  return families.build(config).abstract()


def sets_of(steerable, num_sets, seed=1, model=CONFIG):
  """Parameter sets that all differ, with zeros of both signs among them."""
  random = np.random.default_rng(seed)

  def leaf(p, copied):
    shape = (num_sets, *p.shape) if copied else p.shape
    values = random.normal(size=shape) * (random.uniform(size=shape) > 0.2)
    return np.where(values == 0, random.choice([0.0, -0.0], shape), values)

  sets = jax.tree.map(leaf, abstract(model), steerable)
  return jax.tree.map(lambda p: p.astype(np.float32), sets)


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, chosen in jax.tree_util.tree_leaves_with_path(tree)
    if chosen
  }


def assert_bitwise_equal(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)
    ),
    a,
    b,
  )


@functools.cache
def jitted_mix(kind, by="mix", model=CONFIG):
  """What users call, or what training runs."""
  if by == "bank":
    bank = Bank(model, kind, 3)
    return jax.jit(lambda sets, c: bank.mix(sets, {}, c))
  steerable = clp_jax.steerable_leaves(abstract(model), kind)
  return jax.jit(lambda sets, c: clp_jax.mix(sets, steerable, c))


both_ways = pytest.mark.parametrize("by", ["mix", "bank"])
simplex = st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any)


def test_attention_steers_exactly_the_attention_kernels():
  chosen = paths(clp_jax.steerable_leaves(ABSTRACT, "attention"))
  expected = {
    f"{block}/{name}/kernel"
    for block in (
      "encoder/layers_0/attention",
      "decoder/layers_0/self_attention",
      "decoder/layers_0/encoder_decoder_attention",
    )
    for name in ("query", "key", "value", "out")
  }
  assert chosen == expected


def test_logits_steers_the_last_layer_and_where_tied_the_embedding():
  assert paths(clp_jax.steerable_leaves(ABSTRACT, "logits")) == {
    "decoder/logits_dense/kernel"
  }
  tied = t5.T5Config(**{**CONFIG.__dict__, "logits_via_embedding": True})
  assert paths(
    clp_jax.steerable_leaves(t5.abstract_params(tied), "logits")
  ) == {"token_embedder/embedding"}


def test_full_steers_all_and_none_nothing():
  params = ABSTRACT
  assert all(jax.tree.leaves(clp_jax.steerable_leaves(params, "full")))
  assert not any(jax.tree.leaves(clp_jax.steerable_leaves(params, "none")))


def test_unknown_steering_lists_the_kinds():
  with pytest.raises(ValueError, match="full, attention, logits, none.*'mlp'"):
    clp_jax.steerable_leaves(ABSTRACT, "mlp")


@both
@both_ways
@pytest.mark.parametrize("kind", ["full", "attention", "logits"])
@pytest.mark.parametrize("vertex", [0, 1, 2])
def test_vertex_returns_that_set_bit_for_bit(kind, vertex, by, model):
  steerable = clp_jax.steerable_leaves(abstract(model), kind)
  sets = sets_of(steerable, 3, model=model)
  mixed = jitted_mix(kind, by, model)(sets, jax.nn.one_hot(vertex, 3))
  expected = jax.tree.map(lambda p, s: p[vertex] if s else p, sets, steerable)
  assert_bitwise_equal(mixed, expected)


@functools.cache
def attention_sets():
  steerable = clp_jax.steerable_leaves(ABSTRACT, "attention")
  return steerable, sets_of(steerable, 3)


@functools.cache
def equal_sets(model=CONFIG):
  nothing = clp_jax.steerable_leaves(abstract(model), "none")
  params = sets_of(nothing, 1, model=model)
  steerable = clp_jax.steerable_leaves(abstract(model), "full")
  return params, clp_jax.expand(params, steerable, 3)


@both
def test_the_banks_first_sets_are_those_of_expand(model):
  params, sets = equal_sets(model)
  first = Bank(model, "full", 3).init(params, jax.random.key(0))
  assert_bitwise_equal(first, sets)


@both
@both_ways
@given(counts=simplex)
def test_equal_sets_give_the_base_bit_for_bit_for_any_weighting(
  by, model, counts
):
  params, sets = equal_sets(model)
  weights = np.asarray(counts, np.float32) / sum(counts)
  assert_bitwise_equal(jitted_mix("full", by, model)(sets, weights), params)


@both_ways
@given(counts=simplex)
def test_mix_is_the_convex_combination(by, counts):
  steerable, sets = attention_sets()
  weights = np.asarray(counts, np.float64) / sum(counts)
  mixed = jitted_mix("attention", by)(sets, weights.astype(np.float32))

  def check(m, p, s):
    p = np.asarray(p, np.float64)
    expected = np.tensordot(weights, p, 1) if s else p
    np.testing.assert_allclose(m, expected, rtol=0, atol=2e-6)

  jax.tree.map(check, mixed, sets, steerable)


@both_ways
def test_several_coefficients_give_as_many_policies(by):
  steerable, sets = attention_sets()
  weights = jnp.asarray([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
  mix = jitted_mix("attention", by)
  mixed = mix(sets, weights)
  for g in range(2):
    one = mix(sets, weights[g])
    assert_bitwise_equal(
      jax.tree.map(lambda p, s, g=g: p[g] if s else p, mixed, steerable), one
    )


@both_ways
def test_permuting_sets_with_their_coefficients_changes_nothing(by):
  sets = sets_of(clp_jax.steerable_leaves(ABSTRACT, "full"), 3)
  order = np.array([2, 0, 1])
  weights = np.array([0.15, 0.6, 0.25], np.float32)
  mix = jitted_mix("full", by)
  a = mix(sets, weights)
  b = mix(jax.tree.map(lambda p: p[order], sets), weights[order])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), a, b
  )


@pytest.mark.parametrize("equal", [False, True])
def test_gradient_through_mix_is_that_of_the_sum(equal):
  """Also at equal sets and vertices, where the forward pass selects."""
  sets = jax.random.normal(jax.random.key(0), (3, 4, 2))
  if equal:
    sets = jnp.broadcast_to(sets[:1], sets.shape)
  steerable = {"a": True, "b": False}
  shared = jnp.linspace(-1, 2, 8).reshape(4, 2)
  weights = jnp.asarray([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
  target = np.asarray(jax.random.normal(jax.random.key(1), (2, 4, 2)))

  def loss(params, weights):
    mixed = clp_jax.mix(params, steerable, weights)
    return (jnp.sin(mixed["a"]) * target * mixed["b"][None]).sum()

  params = {"a": sets, "b": shared}
  d_params, d_weights = jax.grad(loss, argnums=(0, 1))(params, weights)
  s, w = np.asarray(sets, np.float64), np.asarray(weights, np.float64)
  mixed = np.einsum("gm,mxy->gxy", w, s)
  d_mixed = np.cos(mixed) * target * np.asarray(shared)
  np.testing.assert_allclose(
    d_params["a"], np.einsum("gm,gxy->mxy", w, d_mixed), atol=2e-6
  )
  np.testing.assert_allclose(
    d_params["b"], (np.sin(mixed) * target).sum(0), atol=2e-6
  )
  np.testing.assert_allclose(
    d_weights, np.einsum("gxy,mxy->gm", d_mixed, s), atol=2e-6
  )


@both_ways
def test_gradient_of_a_whole_bank_is_that_of_the_sum(by):
  steerable, sets = attention_sets()
  weights = np.float32([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
  random = np.random.default_rng(4)
  targets = jax.tree.map(
    lambda p, s: random.normal(size=(2, *p.shape[1:]) if s else p.shape),
    sets,
    steerable,
  )

  def loss(sets):
    mixed = jitted_mix("attention", by)(sets, weights)
    products = jax.tree.map(lambda p, t: (p * t).sum(), mixed, targets)
    return sum(jax.tree.leaves(products))

  def check(gradient, target, s):
    expected = np.einsum("gm,g...->m...", weights, target) if s else target
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6)

  jax.tree.map(check, jax.grad(loss)(sets), targets, steerable)


def test_bfloat16_sets_mix_in_float32_and_keep_their_dtype():
  sets = {"a": jnp.asarray([[1.0, 3.0], [1.0078125, 3.0]], jnp.bfloat16)}
  mixed = clp_jax.mix(sets, {"a": True}, jnp.asarray([0.25, 0.75]))
  assert mixed["a"].dtype == jnp.bfloat16
  expected = np.float32(0.25 + 0.75 * 1.0078125)
  assert mixed["a"][0] == jnp.asarray(expected).astype(jnp.bfloat16)


def test_new_coefficients_never_trace_again():
  steerable = clp_jax.steerable_leaves(ABSTRACT, "full")
  sets = sets_of(steerable, 2)
  traces = []

  @jax.jit
  def policy(sets, weights):
    traces.append(1)
    return clp_jax.mix(sets, steerable, weights)

  for w in (0.0, 0.25, 0.9, 1.0):
    policy(sets, jnp.asarray([w, 1 - w], jnp.float32))
  assert len(traces) == 1


def test_wrong_number_of_coefficients_is_an_error():
  with pytest.raises(ValueError, match=r"holds \(2,\).*3 coefficients"):
    clp_jax.mix({"a": jnp.ones([2, 4])}, {"a": True}, jnp.ones([3]) / 3)
  with pytest.raises(ValueError, match="num_sets must be at least 1, got 0"):
    clp_jax.expand({"a": jnp.ones([4])}, {"a": True}, 0)


def test_the_axes_of_policies_mark_what_the_bank_batches():
  adapter = adapters.Adapter("lora", 2, 1.0, ("mlp",))
  axes = Bank(CONFIG, "lora", 3, soft_tokens=2, adapter=adapter).policy_axes
  assert axes["soft_tokens"] == {"embedding": 0}
  assert axes["token_embedder"] == {"embedding": None}
  layer = axes["encoder"]["layers_0"]
  assert layer["mlp"]["wo"] == {"kernel": LowRank(None, None, None, 0)}
  assert layer["attention"]["query"] == {"kernel": None}

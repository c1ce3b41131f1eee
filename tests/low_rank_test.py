"""Adapted kernels that are never made equal the merged ones."""

import dataclasses

import jax
import jax.numpy as jnp
import lora_runs
import numpy as np
import pytest
import small_decoder
import small_t5

import clp_jax
from clp_jax import adapters, low_rank, row_mixing, sharding
from clp_jax.bank import Bank
from clp_jax.low_rank import LowRank
from clp_jax.models import decoding, families, trees

C = np.float32([[0.2, 0.5, 0.3], [1, 0, 0], [0.4, 0.25, 0.35], [0, 0.6, 0.4]])
# family, kind of adapter, whether the KL set is frozen, scanned
CASES = [
  ("decoder", "lora", True, True),
  *(
    pytest.param(case, marks=pytest.mark.slow)
    for case in (
      ("t5", "svd_lora", True, True),
      ("t5", "lora", False, False),
      ("decoder", "svd_lora", False, False),
    )
  ),
]


def make(family, kind, frozen_kl, scan):
  """(bank, reference, params away from their start, model)."""
  if family == "t5":
    config = small_t5.V1_1
    reference = small_t5.random_params(config)
  else:
    config = small_decoder.make_config("qwen2")
    reference = small_decoder.random_params(config)
  if scan:
    config = dataclasses.replace(config, scan_layers=True)
    reference = trees.stack_layers(reference)
  adapter = adapters.Adapter(kind, 2, 0.7, ("attention", "mlp"), frozen_kl)
  bank = Bank(
    config,
    kind,
    num_sets=3,
    frozen_kl=frozen_kl,
    frozen_shared=True,
    adapter=adapter,
  )
  params = bank.init(reference, jax.random.key(0))
  rng = np.random.default_rng(0)
  moved = jax.tree.map(
    lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params
  )
  return bank, reference, params, moved, families.build(config)


def arrays(config):
  rng = np.random.default_rng(1)
  prompts = rng.integers(2, config.vocab_size, [4, 7]).astype(np.int32)
  prompts[1, 5:] = config.pad_id
  targets = rng.integers(2, config.vocab_size, [8, 5]).astype(np.int32)
  return jnp.asarray(prompts), jnp.asarray(targets)


class TestMatmul:
  def test_is_the_change_of_the_dense_kernel(self):
    rng = np.random.default_rng(0)
    kernel, left, right, x, d = (
      rng.normal(size=shape).astype(np.float32)
      for shape in ((6, 5), (6, 3), (3, 5), (4, 2, 6), (2, 3))
    )
    for i in range(2):
      one = LowRank(kernel, left, right, d[i])
      np.testing.assert_allclose(
        one.change(jnp.asarray(x)), x @ (left * d[i] @ right), atol=1e-5
      )
    rows = LowRank(kernel, left, right, jnp.asarray(d)).change(jnp.asarray(x))
    for row in range(4):  # two rows for each prompt
      expected = x[row] @ (left * d[row // 2] @ right)
      np.testing.assert_allclose(rows[row], expected, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_policies_rows_and_gradients_are_those_of_merged_kernels(case):
  bank, reference, start, params, model = make(*case)
  prompts, targets = arrays(bank.reference_config)

  def merged(params, c):
    logits, _ = model.score(bank.mix(params, reference, c), prompts, targets)
    return logits

  def together(params):
    """[G, R, T, V] of the G policies."""
    policies = decoding.spread_policies(
      model, bank.policies(params, reference, jnp.asarray(C)), whole=True
    )
    return sharding.map_groups(
      lambda policy: model.score(policy, prompts, targets)[0],
      (bank.policy_axes,),
    )(policies)

  def of_rows(params):
    rows = row_mixing.mix_rows(
      bank.row_sets(params, reference), bank.steerable, jnp.asarray(C)
    )
    return model.score(rows, prompts, targets)[0]

  logits = jax.jit(merged)
  expected = np.stack([logits(params, c) for c in C])
  np.testing.assert_allclose(jax.jit(together)(params), expected, atol=1e-3)
  rows = np.asarray(jax.jit(of_rows)(params))
  for b in range(4):
    mine = slice(2 * b, 2 * b + 2)
    np.testing.assert_allclose(rows[mine], expected[b, mine], atol=1e-3)
  # It moves with the weighting, and starts as the base.
  assert np.abs(expected[0] - expected[1]).max() > 0.02
  base, _ = jax.jit(model.score)(reference, prompts, targets)
  untrained = np.asarray(jax.jit(together)(start))
  for group in untrained:
    np.testing.assert_allclose(group, base, atol=1e-3)

  def loss(logits):
    return (jax.nn.log_softmax(logits)[..., 3] * 0.1).sum()

  gradient = jax.jit(jax.grad(lambda p: loss(together(p))))(params)
  sums = jax.grad(lambda p: sum(loss(merged(p, c)) for c in C))

  def check(a, b):
    # Of random parameters, one rounding error in a kernel moves a gradient by
    # half a per cent of its largest number.
    np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())

  jax.tree.map(check, gradient, jax.jit(sums)(params))


def test_equal_sets_of_lora_are_one_at_any_weighting_and_vertices_theirs():
  """Of factors side by side, to float32 rounding."""
  adapter = adapters.Adapter("lora", 4, 0.7, ("attention",))
  rng = np.random.default_rng(0)
  kernel, a, b, x = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) / shape[-2] ** 0.5
    for shape in ((24, 20), (3, 24, 4), (3, 4, 20), (2, 5, 24))
  )

  def out(leaves, coefficients):
    made = adapter.unmerged(kernel, leaves, jnp.asarray(coefficients))
    return np.asarray(x @ made.kernel + made.change(x))

  def of(sets):
    return {"lora_a": a[sets], "lora_b": b[sets]}

  alone = [out(of(np.array([i])), np.ones(1, np.float32)) for i in range(3)]
  close = {"rtol": 0, "atol": 3e-6}
  for c in C:
    equal = out(of(np.array([1, 1, 1])), c)
    np.testing.assert_allclose(equal, alone[1], **close)
  for i, c in enumerate(np.eye(3, dtype=np.float32)):
    np.testing.assert_allclose(out(of(np.arange(3)), c), alone[i], **close)
  assert np.abs(alone[0] - alone[1]).max() > 0.1
  # Sets that add nothing leave the base to the bit.
  for c in C:
    nothing = out({"lora_a": a, "lora_b": 0 * b}, c)
    np.testing.assert_array_equal(nothing, np.asarray(x @ kernel))


def compiled_gradients(dtype):
  """Of a loss of G policies, as `unmerged` ones or not -> the program."""
  bank, reference, _, params, _ = make("decoder", "lora", False, False)
  config = dataclasses.replace(bank.reference_config, dtype=dtype)
  model = families.build(config)
  prompts, targets = arrays(config)

  def loss(params, unmerged):
    policies = (bank.policies if unmerged else bank.mix)(
      params, reference, jnp.asarray(C)
    )
    axes = bank.policy_axes
    if not unmerged:
      axes = jax.tree.map(lambda s: 0 if s else None, bank.steerable)
    return sharding.map_groups(
      lambda policy: model.score(policy, prompts, targets)[0].sum(), (axes,)
    )(policies).sum()

  def program(unmerged):
    gradient = jax.jit(jax.grad(lambda p: loss(p, unmerged)))
    return gradient.lower(params).compile()

  return program


def test_in_bfloat16_no_policy_has_a_kernel_of_its_own():
  """Neither the forward pass nor the gradient makes G x [D, F]."""
  program = compiled_gradients("bfloat16")

  def makes_kernels(unmerged):
    text = program(unmerged).as_text()
    return any(f"[4,32,{width}]" in text for width in (48, 40))

  assert makes_kernels(unmerged=False)  # the check can fail
  assert not makes_kernels(unmerged=True)


def test_in_float32_kernels_are_summed_and_have_no_gradient():
  """What is left of an update's three products is two, and narrow ones."""
  program = compiled_gradients("float32")
  assert "f32[4,32,48]" in program(unmerged=True).as_text()
  unmerged, merged = (
    program(u).cost_analysis()["flops"] for u in (True, False)
  )
  assert unmerged < 0.9 * merged


@pytest.mark.parametrize("tokens", [3, 40])
def test_few_tokens_or_many_the_product_and_its_gradient_are_the_same(tokens):
  rng = np.random.default_rng(tokens)
  kernel, left, right, x, weight, d = (
    jnp.asarray(rng.normal(size=shape).astype(np.float32))
    for shape in (
      *((12, 20), (12, 3), (3, 20)),
      *((4, 2, tokens, 12), (4, 2, tokens, 20), (4, 3)),
    )
  )
  assert LowRank(kernel, left, right, d[0]).is_cheaper_summed(x[0]) == (
    tokens > 3
  )
  assert not LowRank(kernel, left, right, d).is_cheaper_summed(x[0])

  def loss(*arguments):  # of four policies
    return (
      jax.vmap(low_rank.matmul, (0, None, None, None, 0))(*arguments) * weight
    ).sum()

  def dense(x, kernel, left, right, d):
    changed = kernel[None] + jnp.einsum("dk,gk,kf->gdf", left, d, right)
    return (jnp.einsum("grtd,gdf->grtf", x, changed) * weight).sum()

  arguments = (x, kernel, left, right, d)
  found = jax.jit(jax.value_and_grad(loss, range(5)))(*arguments)
  expected = jax.value_and_grad(dense, range(5))(*arguments)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
    *(found, expected),
  )


@pytest.mark.parametrize("family", ["t5", "decoder"])
def test_in_bfloat16_one_weighting_is_that_of_rows_of_their_own(
  family, tmp_path, monkeypatch
):
  init = lora_runs.make_bases(tmp_path)[family]
  fields = {"model.dtype": "bfloat16", "adapters.scale": 0.02}
  workdir = lora_runs.start_run(tmp_path / "run", init, **fields)
  policy = clp_jax.Policy.load(workdir)
  documents, responses = ["word1 word2", "word3"], ["word4 word5", "word6"]
  one, other = {"long": 0.3, "short": 0.7}, {"long": 1.0}
  alone = policy.score(documents, responses, one)
  of_rows = policy.score(documents, responses, [one, other])
  np.testing.assert_allclose(alone[0], of_rows[0], rtol=1e-6)
  # A merged kernel, rounded, is another policy.
  monkeypatch.setitem(vars(policy), "_unmerged", policy._mix_sets)
  merged = policy.score(documents, responses, one)
  assert abs(merged[0] - of_rows[0]) > 1e-4

"""A batch whose rows differ in coefficients, computed from the sets."""

import dataclasses
import functools

import decoding_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_test import V1_0, V1_1, jit, row_keys, sampling_of
from jax.extend.core import jaxprs_in_params

from clp_jax import conditioning, row_mixing
from clp_jax.models import decoding, families, t5
from clp_jax.sampling import choose_tokens

B, N, M = 4, 2, 3
CONFIGS = {
  "v1_1": V1_1,
  "v1_0 scanned": dataclasses.replace(V1_0, scan_layers=True),
  "v1_1 scanned": dataclasses.replace(V1_1, scan_layers=True),
}
SOURCE = decoding_test.ragged_source(B)


def sets_of(config, kind):
  """(params with differing sets, steerable)."""
  sets = [decoding_test.random_params(config, seed) for seed in range(M)]
  steerable = conditioning.steerable_leaves(sets[0], kind)
  stacked = jax.tree.map(
    lambda s, *leaves: np.stack(leaves) if s else leaves[0], steerable, *sets
  )
  return stacked, steerable


def some_coefficients():
  """[B, M], the first row a vertex."""
  rows = np.random.default_rng(0).dirichlet(np.ones(M), B)
  rows[0] = np.eye(M)[1]
  return rows.astype(np.float32)


def sample(config, params, source, keys):
  return decoding.sample(
    families.build(config),
    params,
    source,
    keys,
    sampling_of(config),
    num_samples=N,
    max_length=8,
  )


@pytest.mark.parametrize(
  "name, kind",
  (
    ("v1_1 scanned", "attention"),
    ("v1_0 scanned", "full"),
    ("v1_1", "logits"),
  ),
)
def test_rows_are_those_of_their_merged_policies(name, kind):
  config = CONFIGS[name]
  params, steerable = sets_of(config, kind)
  coefficients, keys = some_coefficients(), row_keys(B * N)
  targets = np.random.default_rng(1).integers(2, 35, (B * N, 8))

  def sample_and_score(params, source, keys, targets):
    samples = sample(config, params, source, keys)
    scores = decoding.score_tokens(
      families.build(config), params, source, targets, num_samples=N
    )
    return samples, scores.logp

  @jit
  def one_by_one(params, coefficients, source, keys, targets):
    def merged(row):
      c, source, keys, targets = row
      policy = conditioning.mix(params, steerable, c)
      return sample_and_score(policy, source[None], keys, targets)

    by_prompt = (coefficients, source, keys, targets)
    return jax.lax.map(merged, by_prompt)

  together, logp = jit(sample_and_score)(
    row_mixing.mix_rows(params, steerable, coefficients),
    SOURCE,
    keys,
    targets,
  )
  alone, expected = one_by_one(
    params,
    coefficients,
    SOURCE,
    keys.reshape(B, N),
    targets.reshape(B, N, 8),
  )
  np.testing.assert_allclose(logp, expected.reshape(logp.shape), atol=1e-4)
  np.testing.assert_array_equal(together.tokens, alone.tokens.reshape(B * N, 8))
  np.testing.assert_allclose(
    together.logp, alone.logp.reshape(B * N, 8), atol=1e-4
  )
  assert len(np.unique(together.tokens)) > 4


@pytest.mark.parametrize("name", ("v1_0 scanned", "v1_1"))
def test_long_prompts_are_encoded_by_their_merged_encoders(name, monkeypatch):
  config = CONFIGS[name]
  params, steerable = sets_of(config, "full")
  rows = row_mixing.mix_rows(params, steerable, some_coefficients())
  tokens = np.array([3, 4, 5, 6])

  def logits(at_once):
    def first(params):
      next_logits, cache = decoding.start(
        families.build(config), params, SOURCE, max_length=2, at_once=at_once
      )
      return next_logits(tokens, cache, jnp.int32(0))[0]

    return jit(first)(rows)

  together = logits(at_once=1)
  monkeypatch.setattr(decoding, "LONG_PROMPT", 9)
  np.testing.assert_allclose(logits(at_once=2), together, atol=1e-4)
  assert np.std(together, axis=0).max() > 0.1


def test_a_vertex_is_that_set_and_equal_sets_are_the_base():
  params, steerable = sets_of(V1_1, "full")
  base = decoding_test.random_params(V1_1, 1)
  targets = np.zeros((B, 3), np.int32)

  def logits(params):
    return t5.T5(V1_1).apply({"params": params}, SOURCE, targets)

  @jit
  def of_rows(params, coefficients):
    return logits(row_mixing.mix_rows(params, steerable, coefficients))

  expected = jit(logits)(base)
  vertices = np.tile(np.eye(M, dtype=np.float32)[1], (B, 1))
  np.testing.assert_allclose(of_rows(params, vertices), expected, atol=2e-4)
  copies = conditioning.expand(base, steerable, M)
  c = some_coefficients()
  np.testing.assert_allclose(of_rows(copies, c), expected, atol=2e-4)
  # And otherwise the coefficients matter, to each row its own.
  interior, others = of_rows(params, c), of_rows(params, c[[0, 2, 1, 3]])
  moved = np.abs(interior - others).max((1, 2))
  assert moved[1:3].min() > 0.1 and moved[[0, 3]].max() < 1e-4


def test_no_kernel_exists_once_per_row():
  params, steerable = sets_of(V1_1, "full")
  rows = 7  # of no axis's size
  source = decoding_test.ragged_source(rows)

  def run(params, coefficients):
    return decoding.sample(
      families.build(V1_1),
      row_mixing.mix_rows(params, steerable, coefficients),
      source,
      row_keys(rows),
      sampling_of(),
      max_length=8,
    )

  coefficients = np.full((rows, M), 1 / M, np.float32)
  jaxpr = jax.make_jaxpr(run)(params, coefficients)
  kernels = {
    leaf.shape
    for leaf in jax.tree.leaves(t5.abstract_params(V1_1))
    if leaf.ndim == 2 and min(leaf.shape) > 8  # no norm, no relative bias
  }
  assert kernels and not {(rows, *k) for k in kernels} & shapes(jaxpr)
  assert (M * 12, 20) in shapes(jaxpr)  # the MLP's kernels, stacked


def shapes(jaxpr):
  found = set()
  for eqn in jaxpr.eqns:
    found |= {v.aval.shape for v in eqn.outvars}
    for inner in jaxprs_in_params(eqn.params):
      found |= shapes(inner)
  return found


@pytest.mark.slow
def test_in_bfloat16_rows_are_as_near_to_float32_as_merged_policies_are():
  params, steerable = sets_of(V1_1, "full")
  coefficients = some_coefficients()
  targets = np.random.default_rng(1).integers(2, 35, (B, 8))

  def logits(policy, dtype, source, targets):
    model = t5.T5(dataclasses.replace(V1_1, dtype=dtype))
    return model.apply({"params": policy}, source, targets)

  @functools.partial(jit, static_argnums=1)
  def of_rows(coefficients, dtype):
    policy = row_mixing.mix_rows(params, steerable, coefficients)
    return logits(policy, dtype, SOURCE, targets)

  @functools.partial(jit, static_argnums=1)
  def merged(coefficients, dtype):
    def one(row):
      c, source, target = row
      policy = conditioning.mix(params, steerable, c)
      return logits(policy, dtype, source[None], target[None])[0]

    return jax.lax.map(one, (coefficients, SOURCE, targets))

  exact = merged(coefficients, "float32")
  np.testing.assert_allclose(of_rows(coefficients, "float32"), exact, atol=2e-4)

  def error(found):
    return np.sqrt(np.mean(np.square(found - exact), axis=(1, 2)))  # [B]

  rounding = error(merged(coefficients, "bfloat16"))
  assert rounding.min() > 1e-3  # it does round
  assert (error(of_rows(coefficients, "bfloat16")) < 1.5 * rounding).all()


def test_coefficients_of_another_number_of_sets_are_an_error():
  params, steerable = sets_of(V1_1, "attention")
  with pytest.raises(ValueError, match=r"holds \(3,\) .* are 2 coefficients"):
    row_mixing.mix_rows(params, steerable, np.full((B, 2), 0.5, np.float32))


class TestSettingsOfARow:
  """top_k, top_p and lengths as [R] arrays: data, and each row its own."""

  logits = np.random.default_rng(0).standard_normal((6, 300)) * 3
  uniforms = np.random.default_rng(1).random((6, 2))

  def choose(self, rows=slice(None), **settings):
    logits = jnp.asarray(self.logits[rows], jnp.float32)
    return decoding_test.choose(
      logits, self.uniforms[rows], **jax.tree.map(jnp.asarray, settings)
    )

  def test_rows_are_truncated_as_if_they_were_alone(self):
    top_k = np.array([1, 2, 7, 300, 40, 300], np.int32)
    top_p = np.array([1, 0.9, 0.5, 0.3, 1, 1], np.float32)
    choose = jit(
      lambda logits, uniforms, k, p: choose_tokens(
        logits,
        uniforms,
        temperature=jnp.ones(len(logits)),
        allowed=jnp.ones(300, bool),
        top_k=k,
        top_p=p,
      )
    )
    logits = jnp.asarray(self.logits, jnp.float32)
    for uniform in np.random.default_rng(2).random((40, 6, 2), np.float32):
      together = np.asarray(choose(logits, uniform, top_k, top_p))
      for i in range(6):
        probs = np.exp(self.logits[i])
        left = decoding_test.kept(probs / probs.sum(), top_k[i], top_p[i])
        assert left[together[i]] > 0
      off = choose(logits, uniform, np.full(6, 300), np.ones(6, np.float32))
      assert together[5] == off[5]
      assert together[0] == self.logits[0].argmax()

  def test_rows_end_at_lengths_of_their_own(self):
    lengths = np.array([1, 3, 9, 4], np.int32)
    logits = np.zeros((4, decoding_test.V))
    logits[:, 1] = -1e9
    logits[3, 1] = 1e9  # ends by itself
    sample = jit(
      lambda lengths: decoding.sample_from(
        decoding_test.scripted(logits),
        (),
        row_keys(4),
        sampling_of(row_lengths=lengths),
        6,
      )
    )
    samples = sample(lengths)
    assert samples.mask.sum(-1).tolist() == [1, 3, 6, 1]
    full = functools.partial(sample, np.full(4, 6, np.int32))()
    np.testing.assert_array_equal(samples.tokens[1, :3], full.tokens[1, :3])
    np.testing.assert_array_equal(samples.tokens[1, 3:], 0)

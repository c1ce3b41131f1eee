"""Logits of several models combined at every token."""

import dataclasses
import functools

import both_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models import decoding, families, mixture
from clp_jax.models.mixture import Mixture
from clp_jax.sampling import Sampling

V, T = 23, 8
T5 = dataclasses.replace(both_families.T5, vocab_size=V, mlp_dim=12)
DECODER = dataclasses.replace(
  both_families.LISTED_DECODER, vocab_size=V, mlp_dim=12
)
both = pytest.mark.parametrize("model", [T5, DECODER], ids=["t5", "decoder"])
ALLOWED = np.ones(V, bool)
ALLOWED[0] = False
# Ragged prompts; the last is all padding but one token.
SOURCE = np.asarray(
  [[5, 9, 3, 7, 2], [4, 8, 0, 0, 0], [6, 2, 2, 11, 0], [3, 0, 0, 0, 0]]
)


@functools.cache
def params(config, seed, end=1.0):
  """Random; `end` scales the logit of the end."""
  rng = np.random.default_rng(seed)
  made = jax.tree.map(
    lambda leaf: np.asarray(
      (leaf.ndim == 1) + 0.5 * rng.standard_normal(leaf.shape), np.float32
    ),
    families.build(config).abstract(),
  )
  made["decoder"]["logits_dense"]["kernel"][:, 1] *= end
  return made


def models_of(config):
  return params(config, 0), params(config, 1, end=2)


def sampling_of(config):
  return Sampling(ALLOWED, (1,), config.pad_id)


def source(config):
  return both_families.with_padding(config, SOURCE)


@functools.cache
def _sampler(config):
  @jax.jit
  def sample(models, coefficients, keys):
    next_logits, cache = mixture.start(
      families.build(config),
      Mixture(models, coefficients),
      source(config),
      num_samples=2,
      max_length=T,
    )
    return decoding.sample_from(
      next_logits,
      cache,
      keys,
      sampling_of(config),
      T,
    )

  return sample


def sample(config, models, coefficients, seed=0):
  keys = jax.random.split(jax.random.key(seed), 8)
  return _sampler(config)(models, jnp.asarray(coefficients, jnp.float32), keys)


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(config, models, coefficients, tokens):
  return mixture.token_logp(
    families.build(config),
    Mixture(models, coefficients),
    source(config),
    tokens,
    num_samples=2,
  )


@functools.partial(jax.jit, static_argnums=0)
def plain_log_probs(config, params, inputs):
  logits, _ = both_families.plain_scores(config, params, inputs)
  return jax.nn.log_softmax(logits)


@pytest.mark.parametrize("weight", [0.3, 1.0, 1.75])
@both
def test_decode_time_logp_is_that_of_the_mixed_distribution(model, weight):
  models, c = models_of(model), np.float32([1 - weight, weight])
  samples = sample(model, models, c)
  mask = np.asarray(samples.mask)
  # Rows end at different lengths, unless the end is made unlikely.
  assert len(set(mask.sum(-1))) > 1 or weight > 1
  logp = teacher_forced(model, models, c, samples.tokens)
  np.testing.assert_allclose(samples.logp[mask], logp[mask], atol=1e-4)

  # By hand, from each model's own log-probabilities: log-linear mixing.
  prompts = np.repeat(source(model), 2, axis=0)
  inputs = both_families.plain_inputs(model, prompts, samples.tokens)
  each = [plain_log_probs(model, p, inputs) for p in models]
  mixed = c[0] * each[0] + c[1] * each[1]
  mixed = mixed - jax.nn.logsumexp(mixed, axis=-1, keepdims=True)
  expected = np.asarray(both_families.picked(mixed, samples.tokens))
  np.testing.assert_allclose(logp[mask], expected[mask], atol=1e-4)


@both
def test_a_coefficient_of_one_is_that_model_alone(model):
  keys = jax.random.split(jax.random.key(0), 8)
  alone = jax.jit(
    lambda p: decoding.sample(
      families.build(model),
      p,
      source(model),
      keys,
      sampling_of(model),
      max_length=T,
      num_samples=2,
    )
  )
  models = models_of(model)
  for c, one in zip(([1, 0], [0, 1]), models, strict=True):
    expected, got = alone(one), sample(model, models, c)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logp, expected.logp, atol=1e-6)


def test_a_model_without_a_part_may_be_infinite():
  logits = [jnp.float32([[0.5, -1.25]]), jnp.float32([[jnp.inf, 2.0]])]
  got = mixture.combine(jnp.float32([1, 0]), logits)
  np.testing.assert_array_equal(got, logits[0])


def test_the_order_of_the_models_changes_nothing():
  first, second = models_of(T5)
  a = sample(T5, (first, second), [0.25, 0.75])
  b = sample(T5, (second, first), [0.75, 0.25])
  np.testing.assert_array_equal(a.tokens, b.tokens)


def test_samples_follow_the_mixed_distribution():
  """The first token's frequencies are those of softmax(sum_k c_k logits_k)."""
  c = np.float32([0.2, 0.5, 0.3])
  models = (*models_of(T5), params(T5, 2))
  rows = 8000
  keys = jax.random.split(jax.random.key(3), rows)

  @jax.jit
  def first(keys):
    next_logits, cache = mixture.start(
      families.build(T5),
      Mixture(models, jnp.asarray(c)),
      SOURCE[:1],
      num_samples=rows,
      max_length=1,
    )
    return decoding.sample_from(
      next_logits, cache, keys, sampling_of(T5), 1
    ).tokens[:, 0]

  counts = np.bincount(np.asarray(first(keys)), minlength=V) / rows
  inputs = both_families.plain_inputs(T5, SOURCE[:1], np.zeros([1, 1], int))
  # Up to a constant, logits.
  logits = [np.asarray(plain_log_probs(T5, p, inputs))[0, 0] for p in models]
  mixed = sum(w * x for w, x in zip(c, logits, strict=True))
  probs = np.where(ALLOWED, np.exp(mixed - mixed.max()), 0)
  probs /= probs.sum()
  np.testing.assert_allclose(counts, probs, atol=0.02)
  assert probs.max() < 0.8


def test_rows_that_do_not_fit_are_an_error():
  with pytest.raises(ValueError, match="4 prompts .* = 2 rows, got 7"):
    mixture.token_logp(
      families.build(T5),
      Mixture((params(T5, 1),), jnp.ones([1])),
      SOURCE,
      np.ones([7, T], np.int32),
      num_samples=2,
    )

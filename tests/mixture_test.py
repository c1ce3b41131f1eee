"""Logits of several models combined at every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models import decoding, families, mixture, t5
from clp_jax.models.mixture import Mixture

V, T = 23, 8
CONFIG = t5.T5Config(
  vocab_size=V,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=12,
  eos_ids=(1,),
)
MODEL = families.build(CONFIG)
ALLOWED = np.ones(V, bool)
ALLOWED[0] = False
# Ragged prompts; the last is all padding but one token.
SOURCE = np.asarray(
  [[5, 9, 3, 7, 2], [4, 8, 0, 0, 0], [6, 2, 2, 11, 0], [3, 0, 0, 0, 0]]
)


def params(seed, end=1.0):
  """Random; `end` scales the logit of the end."""
  rng = np.random.default_rng(seed)
  made = jax.tree.map(
    lambda leaf: np.asarray(
      (leaf.ndim == 1) + 0.5 * rng.standard_normal(leaf.shape), np.float32
    ),
    t5.abstract_params(CONFIG),
  )
  made["decoder"]["logits_dense"]["kernel"][:, 1] *= end
  return made


REFERENCE, TUNED, OTHER = params(0), params(1, end=2), params(2)


@functools.cache
def _sampler():
  @jax.jit
  def sample(models, coefficients, keys):
    next_logits, cache = mixture.start(
      MODEL,
      Mixture(models, coefficients),
      SOURCE,
      num_samples=2,
      max_length=T,
    )
    return decoding.sample_from(
      next_logits, cache, keys, max_length=T, allowed=ALLOWED, eos_ids=(1,)
    )

  return sample


def sample(models, coefficients, seed=0):
  keys = jax.random.split(jax.random.key(seed), 8)
  return _sampler()(models, jnp.asarray(coefficients, jnp.float32), keys)


@jax.jit
def teacher_forced(models, coefficients, tokens):
  return mixture.token_logp(
    MODEL, Mixture(models, coefficients), SOURCE, tokens, num_samples=2
  )


@pytest.mark.parametrize("weight", [0.3, 1.0, 1.75])
def test_decode_time_logp_is_that_of_the_mixed_distribution(weight):
  models, c = (REFERENCE, TUNED), np.float32([1 - weight, weight])
  samples = sample(models, c)
  mask = np.asarray(samples.mask)
  # Rows end at different lengths, unless the end is made unlikely.
  assert len(set(mask.sum(-1))) > 1 or weight > 1
  logp = teacher_forced(models, c, samples.tokens)
  np.testing.assert_allclose(samples.logp[mask], logp[mask], atol=1e-4)

  # By hand, from each model's own log-probabilities: log-linear mixing.
  inputs = t5.shift_right(samples.tokens)
  each = [
    jax.nn.log_softmax(t5.T5(CONFIG).apply({"params": p}, SOURCE, inputs))
    for p in models
  ]
  mixed = c[0] * each[0] + c[1] * each[1]
  mixed = mixed - jax.nn.logsumexp(mixed, axis=-1, keepdims=True)
  expected = np.take_along_axis(
    np.asarray(mixed), np.asarray(samples.tokens)[..., None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(logp[mask], expected[mask], atol=1e-4)


def test_a_coefficient_of_one_is_that_model_alone():
  keys = jax.random.split(jax.random.key(0), 8)
  alone = jax.jit(
    lambda p: decoding.sample(
      MODEL, p, SOURCE, keys, max_length=T, num_samples=2, allowed=ALLOWED
    )
  )
  for c, model in (([1, 0], REFERENCE), ([0, 1], TUNED)):
    expected, got = alone(model), sample((REFERENCE, TUNED), c)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logp, expected.logp, atol=1e-6)


def test_a_model_without_a_part_may_be_infinite():
  logits = [jnp.float32([[0.5, -1.25]]), jnp.float32([[jnp.inf, 2.0]])]
  got = mixture.combine(jnp.float32([1, 0]), logits)
  np.testing.assert_array_equal(got, logits[0])


def test_the_order_of_the_models_changes_nothing():
  a = sample((REFERENCE, TUNED), [0.25, 0.75])
  b = sample((TUNED, REFERENCE), [0.75, 0.25])
  np.testing.assert_array_equal(a.tokens, b.tokens)


def test_samples_follow_the_mixed_distribution():
  """The first token's frequencies are those of softmax(sum_k c_k logits_k)."""
  c = np.float32([0.2, 0.5, 0.3])
  models = (REFERENCE, TUNED, OTHER)
  rows = 8000
  keys = jax.random.split(jax.random.key(3), rows)

  @jax.jit
  def first(keys):
    next_logits, cache = mixture.start(
      MODEL,
      Mixture(models, jnp.asarray(c)),
      SOURCE[:1],
      num_samples=rows,
      max_length=1,
    )
    return decoding.sample_from(
      next_logits, cache, keys, max_length=1, allowed=ALLOWED, eos_ids=(1,)
    ).tokens[:, 0]

  counts = np.bincount(np.asarray(first(keys)), minlength=V) / rows
  logits = [
    np.asarray(
      t5.T5(CONFIG).apply({"params": p}, SOURCE[:1], np.zeros([1, 1], np.int32))
    )[0, 0]
    for p in models
  ]
  mixed = sum(w * x for w, x in zip(c, logits, strict=True))
  probs = np.where(ALLOWED, np.exp(mixed - mixed.max()), 0)
  probs /= probs.sum()
  np.testing.assert_allclose(counts, probs, atol=0.02)
  assert probs.max() < 0.8


def test_rows_that_do_not_fit_are_an_error():
  with pytest.raises(ValueError, match="4 prompts .* = 2 rows, got 7"):
    mixture.token_logp(
      MODEL,
      Mixture((TUNED,), jnp.ones([1])),
      SOURCE,
      np.ones([7, T], np.int32),
      num_samples=2,
    )

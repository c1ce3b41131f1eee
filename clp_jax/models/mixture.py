"""Several models whose logits are combined at every token.

  logits(y_t | x, y_<t) = sum_k c_k logits_k(y_t | x, y_<t)

Each of the K models has its own encoding of the prompts and its own key-value
cache, so a token costs K forward passes; where parameters are combined instead
(`conditioning.mix`) it costs one. The coefficients need not be convex:
decoding-time realignment (DeRa) takes 1 - weight of the reference and any
weight of the finetuned policy. Where they sum to 1, combining logits and
combining log-probabilities are the same, up to a constant in a position that
the softmax removes.

Source: Liu et al. 2024 (arXiv 2402.02992, DeRa), Shi et al. 2024 (arXiv
2406.18853, MOD).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from clp_jax.models import decoding
from clp_jax.models.model import Model, Params
from clp_jax.sampling import at_token


@struct.dataclass
class Mixture:
  """K ordinary models of one shape and vocabulary, and their coefficients."""

  models: tuple[Params, ...]  # K parameter trees
  coefficients: jax.Array  # [K] float32, or [B, K]: each prompt its own


def unstack(sets: Params, coefficients: jax.Array) -> Mixture:
  """The mixture of parameters stacked to [K, ...], with coefficients [K],
  or [B, K]."""
  models = [
    jax.tree.map(lambda s, k=k: s[k], sets)
    for k in range(coefficients.shape[-1])
  ]
  return Mixture(tuple(models), coefficients)


def combine(coefficients: jax.Array, logits: Sequence[jax.Array]) -> jax.Array:
  """sum_k c_k logits_k, in which a model of coefficient 0 has no part.

  Args:
    coefficients: [K] float32, or [B, K].
    logits: K arrays [R, ..., V] float32; R is a multiple of B, prompt-major.

  Returns:
    [R, ..., V] float32: with one coefficient 1 and the others 0, that model's
    logits bit for bit.
  """
  total = jnp.zeros_like(logits[0])
  for k, one in enumerate(logits):
    c = coefficients[..., k]
    if c.ndim:
      c = jnp.repeat(c, one.shape[0] // c.shape[0])
      c = c.reshape(-1, *(1,) * (one.ndim - 1))
    # 0 * inf would be NaN.
    total = total + jnp.where(c == 0, 0.0, c * one)
  return total


def start(
  model: Model,
  mixture: Mixture,
  encoder_input_tokens: jax.Array,
  *,
  num_samples: int = 1,
  max_length: int,
) -> tuple[decoding.NextLogits, decoding.Cache]:
  """`decoding.start` for a mixture, of whose models all are `model`."""
  lengths = {"num_samples": num_samples, "max_length": max_length}
  started = [
    decoding.start(model, params, encoder_input_tokens, **lengths)
    for params in mixture.models
  ]

  def next_logits(tokens, caches, position):
    steps = [
      one(tokens, cache, position)
      for (one, _), cache in zip(started, caches, strict=True)
    ]
    logits = combine(mixture.coefficients, [logits for logits, _ in steps])
    return logits, tuple(cache for _, cache in steps)

  return next_logits, tuple(cache for _, cache in started)


def token_logp(
  model: Model,
  mixture: Mixture,
  encoder_input_tokens: jax.Array,
  tokens: jax.Array,
  *,
  num_samples: int = 1,
  temperature: float = 1.0,
) -> jax.Array:
  """Of `decoding.score_tokens`, for a mixture, the logp; args as there, but one
  temperature for all rows.

  Raises:
    ValueError: when R is not B * N.
  """
  decoding.check_rows(encoder_input_tokens, tokens, num_samples)
  logits = [
    model.score(params, encoder_input_tokens, tokens)[0]
    for params in mixture.models
  ]
  combined = combine(mixture.coefficients, logits) / temperature
  return at_token(jax.nn.log_softmax(combined, axis=-1), tokens)

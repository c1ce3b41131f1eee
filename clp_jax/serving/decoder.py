"""Rows of any requests, decoded together in a few shapes compiled at start.

A batch has one fixed number of rows R, padded when fewer are waiting, and every
row its own weighting, random key, temperature and so on (`mix_rows`): all of
them are data. What differs between the compiled shapes is the length S that
documents are padded to, and that is a function of the row's own document.

So a row's answer can't depend on the company it is in, not even by rounding:
the same program computes it whoever else is there. With shapes of fewer rows
for quiet times it could: their float32 sums are ordered differently, a
log-probability comes out some 1e-6 apart, and now and then another token is
drawn. An accelerator decodes R rows in about the time of one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import generation
from clp_jax.models import decoding
from clp_jax.policy import Policy

Array = jax.Array | np.ndarray
ALTERNATIVES = 5  # likeliest tokens that a row can ask for at each position
SHORTEST = 64  # tokens; no shape is made for documents shorter than this


class Row(NamedTuple):
  """One response to be sampled."""

  tokens: np.ndarray  # [s] int32, the document with EOS
  coefficients: np.ndarray  # [M] float32
  seed: int  # 0 <= seed < 2**64
  number: int  # of the row in its request; with the seed, the random key
  temperature: float
  top_p: float  # 1 is off
  max_tokens: int
  alternatives: bool  # whether the likeliest tokens are wanted too


class Sampled(NamedTuple):
  """What a batch has sampled so far, on the host; R rows."""

  tokens: np.ndarray  # [R, T] int32
  logp: np.ndarray  # [R, T] float32, nats, at temperature 1
  lengths: np.ndarray  # [R] int, tokens so far
  ended: np.ndarray  # [R] bool
  top_tokens: np.ndarray  # [R, T, ALTERNATIVES] int32, the likeliest first
  top_logp: np.ndarray  # [R, T, ALTERNATIVES] float32


class _Settings(NamedTuple):
  """The rows' own values, as arrays."""

  coefficients: Array  # [R, M] float32
  seeds: Array  # [R, 2] uint32, low half first
  numbers: Array  # [R] int32
  temperature: Array  # [R] float32
  top_p: Array  # [R] float32
  max_tokens: Array  # [R] int32
  alternatives: Array  # [R] bool


class Decoder:
  """The compiled programs of a policy.

  Attributes:
    rows: R, decoded together.
    lengths: S of each shape, ascending; the last is for the longest document.
    max_tokens: T, the most that a row can have.
    eos_ids: tokens any of which ends a row.
    trace_count: programs traced so far; constant after `compile`.
  """

  def __init__(self, policy: Policy, rows: int):
    """Prepares, but does not compile.

    Args:
      policy: the run.
      rows: R; rounded up to a multiple of the mesh's data axis.
    """
    self._rows = policy.decoder
    self.rows = self._rows.whole(rows)
    longest = policy.config.data.source_length
    if policy.prompts is not None:  # what the policy is told of a weighting
      longest += policy.prompts.length
    self.lengths = sorted(
      {longest} | {n for n in (longest // 4, longest // 2) if n >= SHORTEST}
    )
    self.max_tokens = self._rows.max_length
    self.eos_ids = policy.model_config.eos_ids
    self.trace_count = 0
    # Rows are mixed from these, whatever kind they are of.
    self._sets = policy.row_sets
    self._vertex = np.eye(policy.bank.num_sets)[0]
    self._begin = jax.jit(self._trace_begin)
    self._advance = jax.jit(self._trace_advance, donate_argnames="loop")

  def compile(self) -> None:
    """Compiles every shape, by decoding a batch in each."""
    for length in self.lengths:
      tokens = np.ones([length], np.int32)
      row = Row(tokens, self._vertex, 0, 0, 1.0, 1.0, self.max_tokens, False)
      batch = self.begin([row])
      # Twice: what a program returns may lie elsewhere than what it was given.
      batch.advance(1)
      batch.advance(2)

  def length(self, num_tokens: int) -> int:
    """S of the shape that documents of so many tokens are decoded in."""
    return next(n for n in self.lengths if n >= num_tokens)

  def begin(self, rows: Sequence[Row]) -> "Batch":
    """Encodes the documents of up to R rows, all of one `length`."""
    return Batch(self, rows)

  def _trace_begin(self, sets, tokens, coefficients, is_row):
    self.trace_count += 1
    params = self._rows.policies(sets, coefficients)
    prompts = self._rows.read(params, tokens)
    num, length = len(tokens), self.max_tokens
    top = (num, length, ALTERNATIVES)
    cache = self._rows.model.empty_cache(num, length)
    noted = (jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))
    loop = self._rows.first_loop((cache, noted), num)
    return prompts, loop._replace(ended=~is_row)

  def _trace_advance(self, sets, prompts, loop, settings, until):
    self.trace_count += 1
    params = self._rows.policies(sets, settings.coefficients)
    next_logits = decoding.logits_after(self._rows.model, params, prompts)
    wanted = settings.alternatives.any()

    def noting(tokens, cache, position):
      cache, noted = cache
      logits, cache = next_logits(tokens, cache, position)
      noted = jax.lax.cond(
        wanted, _note, lambda logits, noted, _: noted, logits, noted, position
      )
      return logits, (cache, noted)

    return decoding.advance(
      noting,
      loop,
      jax.vmap(_key)(settings.seeds, settings.numbers),
      self._rows.sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        row_lengths=settings.max_tokens,
      ),
      until,
    )


class Batch:
  """Rows on their way; made by `Decoder.begin`."""

  def __init__(self, decoder: Decoder, rows: Sequence[Row]):
    if not 0 < len(rows) <= decoder.rows:
      raise ValueError(f"expected 1 to {decoder.rows} rows, got {len(rows)}.")
    length = decoder.length(max(len(row.tokens) for row in rows))
    # Copies of the last row fill the batch; they have ended from the start.
    filled = [rows[i] for i in generation.padding(len(rows), decoder.rows)]
    pad_id = decoder._rows.model.config.pad_id
    tokens = np.full([decoder.rows, length], pad_id, np.int32)
    for padded, row in zip(tokens, filled, strict=True):
      padded[: len(row.tokens)] = row.tokens

    def column(name: str, dtype: Any) -> np.ndarray:
      return np.asarray([getattr(row, name) for row in filled], dtype)

    self._settings = _Settings(
      coefficients=column("coefficients", np.float32),
      seeds=column("seed", np.uint64)[:, None].view(np.uint32),
      numbers=column("number", np.int32),
      temperature=column("temperature", np.float32),
      top_p=column("top_p", np.float32),
      max_tokens=column("max_tokens", np.int32),
      alternatives=column("alternatives", bool),
    )
    self._decoder = decoder
    self._sets = decoder._sets
    self._num = len(rows)
    self._prompts, self._loop = decoder._begin(
      self._sets,
      tokens,
      self._settings.coefficients,
      np.arange(decoder.rows) < len(rows),
    )

  def stop(self, i: int) -> None:
    """Ends row i where it is, when decoding goes on: a token later."""
    self._settings.max_tokens[i] = 1

  def advance(self, until: int) -> Sampled:
    """Decodes up to a position, or until all rows have ended.

    Args:
      until: tokens that every row has then, unless it has ended.

    Returns:
      All that is sampled so far, of the rows given.
    """
    loop = self._decoder._advance(
      self._sets, self._prompts, self._loop, self._settings, np.int32(until)
    )
    self._loop = loop
    _, noted = loop.cache
    tokens, logp, mask, ended, top_tokens, top_logp = (
      x[: self._num]
      for x in jax.device_get((*loop.samples, loop.ended, *noted))
    )
    return Sampled(tokens, logp, mask.sum(-1), ended, top_tokens, top_logp)


def _note(logits, noted, position):
  logp = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  top_logp, top_tokens = jax.lax.top_k(logp, ALTERNATIVES)
  return tuple(
    jax.lax.dynamic_update_slice_in_dim(all_, x[:, None], position, axis=1)
    for all_, x in zip(
      noted, (top_tokens.astype(jnp.int32), top_logp), strict=True
    )
  )


def _key(seed: jax.Array, number: jax.Array) -> jax.Array:
  """That of `Policy.generate`: a row's number folded into its seed's key."""
  low, high = seed
  key = jax.random.key(low)
  key = jnp.where(high > 0, jax.random.fold_in(key, high), key)
  return jax.random.fold_in(key, number)

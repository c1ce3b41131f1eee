"""From logits to tokens, for any model: how they are drawn, what ends a row.

A token is drawn from the logits' modified distribution (`choose_tokens`), by
inverting its distribution function; its log-probability is that under the
unmodified one, or over the tokens that may be drawn. What a row draws depends
on its key, its position and its own settings only, not on the other rows or on
the devices.

Axes: R rows, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # tokens; the width of a TPU's vector lane
_TINY = float(jnp.finfo(jnp.float32).tiny)  # smaller ones are subnormal
_LOWEST = float(jnp.finfo(jnp.float32).min)
_SETTINGS = (  # of Sampling, what rows can differ in
  *("temperature", "top_k", "top_p", "logp_temperature", "row_lengths"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
  """How tokens are drawn, and what ends a row.

  All but the ids are data and may be traced; a number is checked here, a value
  that is traced can't be.

  Attributes:
    allowed: [V] bool, tokens that may be sampled: EOS among them, padding not.
    eos_ids: tokens any of which ends a row.
    pad_id: what stands where a row has ended.
    temperature: [] or [R] float that divides the logits before sampling; 0
      takes the most likely token.
    top_k: [] or [R] int, sample among the k most likely tokens; V or None for
      all.
    top_p: [] or [R] float, sample among the most likely tokens that together
      reach this probability (after top_k); 1 or None for all.
    logp_temperature: [] or [R] float, positive: the log-probabilities are those
      of softmax(logits / logp_temperature), whatever `temperature`, `top_k` and
      `top_p` are.
    logp_of_allowed: whether that softmax is over the allowed tokens alone, as
      what is drawn from, and not over the whole vocabulary.
    row_lengths: [] or [R] int, from 1: rows that are to end earlier than at
      the length of all; None for none.
  """

  allowed: jax.Array | np.ndarray
  eos_ids: tuple[int, ...]
  pad_id: int
  temperature: jax.Array | float = 1.0
  top_k: jax.Array | int | None = None
  top_p: jax.Array | float | None = None
  logp_temperature: jax.Array | float = 1.0
  logp_of_allowed: bool = False
  row_lengths: jax.Array | None = None

  def __post_init__(self):
    if not self.eos_ids:
      raise ValueError(
        "nothing ends a response: give eos_ids, in the config those of its "
        "vocabulary."
      )
    # Only where the values are on the host: reading an array from a device here
    # would hold up the caller.
    if isinstance(self.allowed, np.ndarray):
      if not self.allowed[list(self.eos_ids)].all():
        raise ValueError(
          f"allowed must include the end of sequence, {self.eos_ids}."
        )
      if self.pad_id >= 0 and self.allowed[self.pad_id]:
        raise ValueError(f"allowed must exclude padding, {self.pad_id}.")
    if isinstance(self.temperature, int | float) and self.temperature < 0:
      raise ValueError(
        f"temperature must not be negative, got {self.temperature}."
      )
    if isinstance(self.top_k, int) and self.top_k < 1:
      raise ValueError(f"top_k must be at least 1, or None, got {self.top_k}.")
    if isinstance(self.top_p, int | float) and not 0.0 < self.top_p <= 1.0:
      raise ValueError(f"top_p must be in (0, 1], or None, got {self.top_p}.")
    check_positive("logp_temperature", self.logp_temperature)

  def by_row(self, rows: int) -> dict[str, Any]:
    """What each of R rows may have its own value of, where it is not None:
    [R] float32 each, by name."""
    values = {name: getattr(self, name) for name in _SETTINGS}
    return {
      name: per_row(name, value, rows)
      for name, value in values.items()
      if value is not None
    }

  def draw(
    self, logits: jax.Array, keys: jax.Array, position: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row.

    Args:
      logits: [R, V] float32.
      keys: [R] typed keys.
      position: [] or [R] int32, of the tokens in their rows.

    Returns:
      Tokens [R] int32, and their log-probabilities [R] float32, nats.
    """
    settings = self.by_row(logits.shape[0])
    token = choose_tokens(
      logits,
      _uniforms(keys, position),
      temperature=settings["temperature"],
      allowed=jnp.asarray(self.allowed, bool),
      top_k=settings.get("top_k"),
      top_p=settings.get("top_p"),
    )
    scaled = logits / settings["logp_temperature"][:, None]
    total = log_total(scaled, self.allowed if self.logp_of_allowed else None)
    return token, at_token(scaled, token) - total

  def ends(self, token: jax.Array, position: jax.Array) -> jax.Array:
    """[R] bool, whether rows end with tokens [R] at a position [] or [R]."""
    ended = jnp.isin(token, jnp.asarray(self.eos_ids))
    if self.row_lengths is not None:
      ended |= position + 1 >= self.row_lengths
    return ended


def choose_tokens(
  logits: jax.Array,
  uniforms: jax.Array,
  *,
  temperature: jax.Array,
  allowed: jax.Array,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
) -> jax.Array:
  """Draws a token a row, by inverting the distribution function.

  That takes two random numbers a row where the Gumbel trick takes V. A token of
  probability 0 is never returned, a forbidden one not whatever the arguments
  are: values that are traced can't be checked.

  Args:
    logits: [R, V] float32; a row whose largest is not finite is decoded as at
      temperature 0.
    uniforms: [R, 2] float32 in [0, 1).
    temperature: [R] float32; 0 takes the most likely allowed token.
    allowed: [V] bool, one of them True.
    top_k: int or [R] int32, which may be traced; V or None for all.
    top_p: float or [R] float32, which may be traced; 1 or None for all. The
      most likely token is always kept, by top_k too.

  Returns:
    [R] int32.

  Raises:
    ValueError: for arguments of other shapes.
  """
  rows, vocab_size = logits.shape
  if allowed.shape != (vocab_size,):
    raise ValueError(
      f"allowed must have the shape of the vocabulary, ({vocab_size},), got "
      f"{allowed.shape}."
    )
  logits = jnp.where(allowed[None], logits, -jnp.inf)
  largest = jnp.max(logits, axis=-1)
  # That of an allowed token, even where the network gave -inf or NaN for all.
  rank = jnp.where(allowed[None], jnp.maximum(logits, _LOWEST), -jnp.inf)
  best = jnp.argmax(rank, axis=-1).astype(jnp.int32)
  # Subnormal numbers are made 0, and such a temperature too: whether they count
  # as 0 in a division, a sum or a comparison depends on the hardware. Where the
  # largest logit is not finite, there is no distribution to draw from.
  greedy = ~((temperature >= _TINY) & jnp.isfinite(largest))
  divisor = jnp.where(greedy, 1.0, temperature)[:, None]
  # Unnormalised, the largest is 1. NaN, of -inf / inf, is not >= anything.
  probs = jnp.exp((logits - largest[:, None]) / divisor)
  probs = jnp.where(allowed[None] & (probs >= _TINY), probs, 0.0)
  # The condition is for arrays, whose values are not known when compiling.
  if top_k is not None:
    count = per_row("top_k", top_k, rows)
    probs = jax.lax.cond(
      jnp.any(count < vocab_size), _keep_top_k, lambda p, _: p, probs, count
    )
  if top_p is not None:
    share = per_row("top_p", top_p, rows)
    probs = jax.lax.cond(
      jnp.any(share < 1), _keep_top_p, lambda p, _: p, probs, share
    )
  drawn = _invert(probs, uniforms)
  return jnp.where(greedy, best, drawn)


def _keep_top_k(probs: jax.Array, top_k: jax.Array) -> jax.Array:
  """Zeroes all but the top_k [R] float32 most likely of probs [R, V]."""
  return _keep_most_likely(probs, jnp.ones_like(probs), top_k)


def _keep_top_p(probs: jax.Array, top_p: jax.Array) -> jax.Array:
  """Zeroes all but the fewest most likely tokens with top_p [R] of probs'
  total; rows whose top_p is 1 keep all."""
  kept = _keep_most_likely(probs, probs, top_p * probs.sum(-1))
  return jnp.where(top_p[:, None] < 1, kept, probs)


def _keep_most_likely(
  probs: jax.Array, measure: jax.Array, target: jax.Array
) -> jax.Array:
  """Zeroes all but the fewest most likely tokens that measure enough.

  Bisects for the smallest probability that is kept: thirty sums over the
  vocabulary cost a fraction of sorting it. Of equally likely tokens at the
  edge, those with lower ids stay.

  Args:
    probs: [R, V] float32 in [0, 1], of any total, the largest of a row 1.
    measure: [R, V] float32, what counts towards the target, the same for
      equally likely tokens.
    target: [R] float32.

  Returns:
    [R, V] float32.
  """
  # Floats that are not negative are ordered as their bits are.
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    total = jnp.sum(jnp.where(bits >= middle[:, None], measure, 0.0), axis=-1)
    enough = total >= target
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  above_one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
  low = jnp.zeros_like(bits[:, 0])
  high = jnp.full_like(low, above_one)
  # 30 halvings of fewer than 2^30 bit patterns leave one.
  edge, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
  above, at_edge = bits > edge[:, None], bits == edge[:, None]
  missing = target - jnp.sum(jnp.where(above, measure, 0.0), axis=-1)
  each = jnp.max(jnp.where(at_edge, measure, 0.0), axis=-1)
  # How many at the edge come first, and how many of them it takes.
  rank = jnp.cumsum(at_edge.astype(jnp.int32), axis=-1)
  # One at the least: of a tiny target, a share of 1 may round to 0.
  needed = jnp.maximum(jnp.ceil(missing / each), 1)
  return jnp.where(above | (at_edge & (rank <= needed[:, None])), probs, 0.0)


def _invert(probs: jax.Array, uniforms: jax.Array) -> jax.Array:
  """Draws from probs [R, V] (of any total) a block, then a token in it.

  Two levels, each with its own random number: a prefix sum over the whole
  vocabulary, and one random number of 24 bits for it, would both be too coarse
  for unlikely tokens.
  """
  rows, vocab_size = probs.shape
  probs = jnp.pad(probs, ((0, 0), (0, -vocab_size % BLOCK)))
  blocks = probs.reshape(rows, -1, BLOCK)
  block = _invert_short(blocks.sum(-1), uniforms[:, 0])
  within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return block * BLOCK + _invert_short(within, uniforms[:, 1])


def _invert_short(probs: jax.Array, uniform: jax.Array) -> jax.Array:
  """probs [R, n] of any total, uniform [R] in [0, 1) -> [R] int32.

  Never an entry of probability 0 as long as there is another one: parallel
  prefix sums may fall by a rounding error, so a positive entry is asked for
  explicitly; and uniform * total may round up to the total, so that no prefix
  sum exceeds it: then it is the last positive entry.
  """
  prefix = jnp.cumsum(probs, axis=-1)
  positive = probs > 0
  hit = (prefix > uniform[:, None] * prefix[:, -1:]) & positive
  last = probs.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
  found = jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), last)
  return found.astype(jnp.int32)


def _uniforms(keys: jax.Array, position: jax.Array) -> jax.Array:
  """[R] keys -> [R, 2] float32 in [0, 1), from 64 random bits a row."""

  def draw(key, position):
    return jax.random.uniform(jax.random.fold_in(key, position), (2,))

  return jax.vmap(draw)(keys, jnp.broadcast_to(position, keys.shape))


def at_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """logits [..., V] at tokens [...]. A sum, not a gather: it stays on the
  device that holds the token's column when the vocabulary is cut."""
  ids = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
  return jnp.sum(jnp.where(ids == tokens[..., None], logits, 0.0), axis=-1)


def log_total(
  logits: jax.Array, allowed: jax.Array | np.ndarray | None
) -> jax.Array:
  """logsumexp of logits [..., V] over the allowed [V] bool, or over all."""
  if allowed is not None:
    logits = jnp.where(jnp.asarray(allowed), logits, -jnp.inf)
  return jax.nn.logsumexp(logits, axis=-1)


def per_row(name: str, value: jax.Array | float, rows: int) -> jax.Array:
  """[R] float32: a setting of all rows, or of one each."""
  value = jnp.asarray(value, jnp.float32)
  if value.shape not in ((), (rows,)):
    raise ValueError(
      f"{name} must be a scalar or have one value for each of the {rows} rows, "
      f"got shape {value.shape}."
    )
  return jnp.broadcast_to(value, (rows,))


def check_positive(name: str, value: jax.Array | float) -> None:
  """Raises a ValueError for a number that is not; arrays are not read."""
  if isinstance(value, int | float) and not value > 0:
    raise ValueError(f"{name} must be positive, got {value}.")

"""Sampling from a model, and the log-probabilities of what was sampled.

1. `start` reads the B prompts, once for the N samples of each, and makes an
   empty cache for B * N rows.
2. `sample_from` is the loop. At each position it asks for the next token's
   logits, draws a token from their modified distribution (`choose_tokens`),
   and notes its log-probability under the unmodified one. It ends when every
   row has ended. It knows no model: any function of the last tokens, a cache
   and the position will do, for instance one that mixes two models' logits.
3. `sample` is 1 and 2 for one set of parameters, `sample_groups` for several.
4. `score_tokens` gives the log-probabilities of given tokens, teacher-forced,
   which are those that sampling gave; `token_logp` is its short form.

Where a row ends is kept as a flag and returned as a mask; no id stands for it.

Axes: B prompts, N samples per prompt, R = B * N rows (row b * N + n is sample n
of prompt b), G groups of prompts, S source, T target, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import sharding
from clp_jax.models.layers import T5Config
from clp_jax.models.model import Cache, Context, Model, Params
from clp_jax.row_mixing import (
  mix_one,
  row_coefficients,
  stands_for_an_array,
)

# (last tokens [R] int32, cache, position [] int32) -> (logits [R, V], cache)
NextLogits = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]

BLOCK = 128  # tokens; the width of a TPU's vector lane
_TINY = float(jnp.finfo(jnp.float32).tiny)  # smaller ones are subnormal
_LOWEST = float(jnp.finfo(jnp.float32).min)
# Tokens of a prompt from which on, where rows differ in their policies, mixing
# what reads it for each costs less than applying all sets to every token.
LONG_PROMPT = 128


class Samples(NamedTuple):
  """What was sampled; R = B * N rows, prompt-major."""

  tokens: jax.Array  # [R, T] int32, PAD after EOS
  logp: jax.Array  # [R, T] float32, nats, 0 where masked
  mask: jax.Array  # [R, T] bool, True up to and including EOS


class TokenScores(NamedTuple):
  """What a model says of given tokens, each before it has seen it."""

  logp: jax.Array  # [R, T] float32, nats
  entropy: jax.Array  # [R, T] float32, nats
  states: jax.Array  # [R, T, D], the last layer's, in the compute dtype


class Loop(NamedTuple):
  """A decoding between two positions."""

  position: jax.Array  # [] int32, the next one
  last: jax.Array  # [R] int32
  ended: jax.Array  # [R] bool
  samples: Samples
  cache: Cache


def sample(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  keys: jax.Array,
  *,
  max_length: int,
  allowed: jax.Array | np.ndarray,
  num_samples: int = 1,
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
  logp_temperature: jax.Array | float = 1.0,
  row_lengths: jax.Array | None = None,
) -> Samples:
  """Samples N responses to each prompt.

  Args:
    model: the `eos_ids` of its config end rows.
    params: its parameters; for a batch in which every row is a policy of its
      own, those of `row_mixing.mix_rows`.
    encoder_input_tokens: [B, S] int; the model's pad_id is padding.
    keys: [R] typed keys, one a row: what a row draws depends on its key and
      its position only, not on the other rows or on the devices.
    max_length: T; a row that has not ended by then ends without EOS.
    allowed: [V] bool, tokens that may be sampled: EOS among them, padding not.
    num_samples: N.
    temperature: [] or [R] float that divides the logits before sampling; 0
      takes the most likely token. May be traced.
    top_k: [] or [R] int, sample among the k most likely tokens; None for all.
      May be traced, then V is for all.
    top_p: [] or [R] float, sample among the most likely tokens that together
      reach this probability (after top_k); None for all. May be traced, then 1
      is for all.
    logp_temperature: [] or [R] float, positive: the log-probabilities are those
      of softmax(logits / logp_temperature) over the whole vocabulary, whatever
      `temperature`, `top_k`, `top_p` and `allowed` are.
    row_lengths: [R] int32, from 1: rows that are to end earlier than at
      max_length; None for none.

  Returns:
    Samples, whose logp is that of `token_logp` at logp_temperature.

  Raises:
    ValueError: for arguments that do not fit together.
  """
  _check_keys(keys, encoder_input_tokens.shape[0] * num_samples)
  next_logits, cache = start(
    model,
    params,
    encoder_input_tokens,
    num_samples=num_samples,
    max_length=max_length,
  )
  return sample_from(
    next_logits,
    cache,
    keys,
    max_length=max_length,
    allowed=allowed,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    logp_temperature=logp_temperature,
    row_lengths=row_lengths,
    eos_ids=model.config.eos_ids,
    pad_id=model.config.pad_id,
  )


def sample_groups(
  model: Model,
  params: Params,
  params_axes: Any,
  encoder_input_tokens: jax.Array,
  keys: jax.Array,
  *,
  num_groups: int,
  max_length: int,
  allowed: jax.Array | np.ndarray,
  num_samples: int = 1,
  temperature: jax.Array | float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  logp_temperature: jax.Array | float = 1.0,
) -> Samples:
  """Cuts the prompts into G groups, answered by G sets of parameters.

  Args:
    model: as in `sample`.
    params: parameters, some leaves [G, ...].
    params_axes: 0 for those leaves and None for the others, as jax.vmap's
      in_axes for params.
    encoder_input_tokens: [B, S] int; group g is its g-th part of B / G rows.
    keys: [R] typed keys, as in `sample`.
    num_groups: G, divides B.
    max_length: as in `sample`, as are the arguments that follow.
    allowed: [V] bool.
    num_samples: N.
    temperature: [] or [R] float.
    top_k: None or int.
    top_p: None or float.
    logp_temperature: [] or [R] float.

  Returns:
    Samples, R rows as in `sample`.

  Raises:
    ValueError: as `sample`, or when G does not divide B.
  """
  prompts = encoder_input_tokens.shape[0]
  if prompts % num_groups:
    raise ValueError(
      f"{prompts} prompts can't be cut into num_groups = {num_groups} equal "
      "groups; change either."
    )
  rows = prompts * num_samples
  _check_keys(keys, rows)

  def by_group(x: jax.Array) -> jax.Array:
    return x.reshape(num_groups, -1, *x.shape[1:])

  def sample_group(params, tokens, keys, temperature, logp_temperature):
    return sample(
      model,
      params,
      tokens,
      keys,
      max_length=max_length,
      allowed=allowed,
      num_samples=num_samples,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      logp_temperature=logp_temperature,
    )

  samples = sharding.map_groups(sample_group, (params_axes, 0, 0, 0, 0))(
    params,
    by_group(encoder_input_tokens),
    by_group(keys),
    by_group(_per_row("temperature", temperature, rows)),
    by_group(_per_row("logp_temperature", logp_temperature, rows)),
  )
  return jax.tree.map(lambda x: x.reshape(rows, max_length), samples)


def token_logp(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  tokens: jax.Array,
  *,
  num_samples: int = 1,
  temperature: jax.Array | float = 1.0,
  deterministic: bool = True,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`score_tokens` without the states: (logp [R, T], entropy [R, T])."""
  scores = score_tokens(
    model,
    params,
    encoder_input_tokens,
    tokens,
    num_samples=num_samples,
    temperature=temperature,
    deterministic=deterministic,
    dropout_key=dropout_key,
  )
  return scores.logp, scores.entropy


def score_tokens(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  tokens: jax.Array,
  *,
  num_samples: int = 1,
  temperature: jax.Array | float = 1.0,
  deterministic: bool = True,
  dropout_key: jax.Array | None = None,
) -> TokenScores:
  """Log-probabilities of given tokens, and entropies, teacher-forced.

  Args:
    model: whose parameters they are.
    params: its parameters.
    encoder_input_tokens: [B, S] int; the model's pad_id is padding.
    tokens: [R, T] int, prompt-major, for instance `Samples.tokens`.
    num_samples: N, such that R = B * N.
    temperature: [] or [R] float, positive; the policy is
      softmax(logits / temperature) over the whole vocabulary.
    deterministic: no dropout.
    dropout_key: typed key; needed when there is dropout.

  Returns:
    What stands where a row has ended means nothing: mask it.

  Raises:
    ValueError: for arguments that do not fit together.
  """
  prompts, rows = encoder_input_tokens.shape[0], tokens.shape[0]
  if rows != prompts * num_samples:
    raise ValueError(
      f"tokens must have {prompts} prompts * num_samples = {num_samples} rows, "
      f"got {rows}."
    )
  _check_positive("temperature", temperature)
  if deterministic or model.config.dropout_rate == 0:
    dropout_key = None
  elif dropout_key is None:
    raise ValueError("deterministic=False needs a dropout_key.")
  logits, states = model.score(
    params, encoder_input_tokens, tokens, dropout_key
  )
  divisor = _per_row("temperature", temperature, rows)
  logits = logits / divisor[:, None, None]
  log_total = jax.nn.logsumexp(logits, axis=-1)
  probs = jnp.exp(logits - log_total[..., None])
  entropy = log_total - jnp.sum(probs * logits, axis=-1)
  return TokenScores(_at_token(logits, tokens) - log_total, entropy, states)


def start(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  *,
  num_samples: int = 1,
  max_length: int,
  at_once: int = 1,
) -> tuple[NextLogits, Cache]:
  """Does once what decoding needs from the prompts.

  Args:
    model: whose parameters they are.
    params: its parameters.
    encoder_input_tokens: [B, S] int; the model's pad_id is padding.
    num_samples: N.
    max_length: T, positions of the cache.
    at_once: see `read_prompts`.

  Returns:
    A function that gives the logits of a position, and the cache it starts
    with: what `sample_from` takes.
  """
  context = read_prompts(model, params, encoder_input_tokens, at_once)
  rows = encoder_input_tokens.shape[0] * num_samples
  cache = model.empty_cache(rows, max_length)
  return logits_after(model, params, context), cache


def read_prompts(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  at_once: int = 1,
) -> Context:
  """Does once what decoding needs from the prompts, in the compute dtype.

  Args:
    model: whose parameters they are.
    params: its parameters.
    encoder_input_tokens: [B, S] int; the model's pad_id is padding.
    at_once: long prompts of rows with policies of their own are read so many
      together, each by its mixed policy: the data axis's size, a divisor of B,
      keeps all devices busy.

  Returns:
    What `logits_after` takes, in this program or in a later one.
  """

  def read(params, tokens):
    return model.read(_in_compute_dtype(model, params), tokens)

  def read_one(row):
    coefficients, tokens = row
    return read(mix_one(params, coefficients), tokens[None])

  coefficients = row_coefficients(params)
  if coefficients is None or encoder_input_tokens.shape[1] < LONG_PROMPT:
    return read(params, encoder_input_tokens)
  context = _map_rows(read_one, (coefficients, encoder_input_tokens), at_once)
  return Context(
    # [B, 1, H, S, K] of a layer, or [B, L, 1, H, S, K] of a stack of them.
    jax.tree.map(lambda x: jnp.swapaxes(x, 0, -4)[0], context.layers),
    jax.tree.map(lambda x: x[:, 0], context.rows),
  )


def _map_rows(function: Any, rows: Any, at_once: int) -> Any:
  """function over leading axes [B, ...], one row of each of at_once parts at a
  time."""

  def by_step(x):
    return jnp.swapaxes(x.reshape(at_once, -1, *x.shape[1:]), 0, 1)

  def by_row(x):
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  mapped = jax.lax.map(jax.vmap(function), jax.tree.map(by_step, rows))
  return jax.tree.map(by_row, mapped)


def logits_after(model: Model, params: Params, context: Context) -> NextLogits:
  """The function that gives the logits of a position.

  Args:
    model: whose parameters they are.
    params: its parameters.
    context: from `read_prompts`, with the same parameters.

  Returns:
    What `sample_from` and `advance` take.
  """
  params = _in_compute_dtype(model, params)

  def next_logits(tokens, cache, position):
    return model.step(params, context, cache, tokens, position)

  return next_logits


def sample_from(
  next_logits: NextLogits,
  cache: Cache,
  keys: jax.Array,
  *,
  max_length: int,
  allowed: jax.Array | np.ndarray,
  eos_ids: tuple[int, ...],
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
  logp_temperature: jax.Array | float = 1.0,
  row_lengths: jax.Array | None = None,
  pad_id: int = T5Config.pad_id,
) -> Samples:
  """Samples rows from any next-token distribution.

  Under jax.vmap the loop runs until the rows of all its instances have ended.

  Args:
    next_logits: function of the last tokens [R] int32 (PAD at the first
      position and for rows that have ended), the cache and the position []
      int32, to the logits [R, V] float32 and the cache.
    cache: any tree of arrays; the first one.
    keys: [R] typed keys.
    max_length: T.
    allowed: [V] bool.
    eos_ids: tokens any of which ends a row.
    temperature: [] or [R] float.
    top_k: None, or [] or [R] int.
    top_p: None, or [] or [R] float.
    logp_temperature: [] or [R] float.
    row_lengths: None, or [R] int32.
    pad_id: what stands where a row has ended.

  Returns:
    Samples. The arguments mean what they mean in `sample`.

  Raises:
    ValueError: for values out of range.
  """
  loop = first_loop(cache, keys.shape[0], max_length, pad_id)
  return advance(
    next_logits,
    loop,
    keys,
    max_length,
    allowed=allowed,
    eos_ids=eos_ids,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    logp_temperature=logp_temperature,
    row_lengths=row_lengths,
    pad_id=pad_id,
  ).samples


def first_loop(
  cache: Cache, rows: int, max_length: int, pad_id: int = T5Config.pad_id
) -> Loop:
  """A decoding of R rows before its first position, for `advance`."""
  if max_length < 1:
    raise ValueError(f"max_length must be at least 1, got {max_length}.")
  shape = (rows, max_length)
  return Loop(
    position=jnp.zeros((), jnp.int32),
    last=jnp.full((rows,), pad_id, jnp.int32),
    ended=jnp.zeros((rows,), bool),
    samples=Samples(
      tokens=jnp.full(shape, pad_id, jnp.int32),
      logp=jnp.zeros(shape, jnp.float32),
      mask=jnp.zeros(shape, bool),
    ),
    cache=cache,
  )


def advance(
  next_logits: NextLogits,
  loop: Loop,
  keys: jax.Array,
  until: jax.Array | int,
  *,
  allowed: jax.Array | np.ndarray,
  eos_ids: tuple[int, ...],
  temperature: jax.Array | float = 1.0,
  top_k: jax.Array | int | None = None,
  top_p: jax.Array | float | None = None,
  logp_temperature: jax.Array | float = 1.0,
  row_lengths: jax.Array | None = None,
  pad_id: int = T5Config.pad_id,
) -> Loop:
  """Goes on with a decoding, up to a position or until all rows have ended.

  In pieces or at once, the samples are the same: a server sends them as they
  come.

  Args:
    next_logits: as in `sample_from`.
    loop: where the decoding stands.
    keys: [R] typed keys.
    until: [] int, the position to stop before; may be traced.
    allowed: [V] bool.
    eos_ids: tokens any of which ends a row.
    temperature: [] or [R] float.
    top_k: None, or [] or [R] int.
    top_p: None, or [] or [R] float.
    logp_temperature: [] or [R] float.
    row_lengths: None, or [R] int32.
    pad_id: what stands where a row has ended.

  Returns:
    The loop; its samples hold what there is so far.

  Raises:
    ValueError: for values out of range.
  """
  _check_ends(allowed, eos_ids, pad_id)
  if isinstance(temperature, int | float) and temperature < 0:
    raise ValueError(f"temperature must not be negative, got {temperature}.")
  _check_positive("logp_temperature", logp_temperature)
  rows, max_length = loop.samples.tokens.shape
  until = jnp.minimum(until, max_length)
  temperature = _per_row("temperature", temperature, rows)
  logp_temperature = _per_row("logp_temperature", logp_temperature, rows)
  allowed = jnp.asarray(allowed, bool)

  def going_on(loop: Loop) -> jax.Array:
    return (loop.position < until) & _any_left(loop.ended)

  def step(loop: Loop) -> Loop:
    logits, cache = next_logits(loop.last, loop.cache, loop.position)
    token = choose_tokens(
      logits,
      _uniforms(keys, loop.position),
      temperature=temperature,
      allowed=allowed,
      top_k=top_k,
      top_p=top_p,
    )
    scaled = logits / logp_temperature[:, None]
    logp = _at_token(scaled, token) - jax.nn.logsumexp(scaled, axis=-1)
    going = ~loop.ended
    token = jnp.where(going, token, pad_id)
    now = Samples(token, jnp.where(going, logp, 0.0), going)
    ended = loop.ended
    for eos_id in eos_ids:
      ended |= token == eos_id
    if row_lengths is not None:
      ended |= loop.position + 1 >= row_lengths
    return Loop(
      position=loop.position + 1,
      last=token,
      ended=ended,
      samples=jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_slice_in_dim(
          all_, x[:, None], loop.position, axis=1
        ),
        loop.samples,
        now,
      ),
      cache=cache,
    )

  return jax.lax.while_loop(going_on, step, loop)


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
    ValueError: for top_k or top_p out of range.
  """
  if isinstance(top_k, int) and top_k < 1:
    raise ValueError(f"top_k must be at least 1, or None, got {top_k}.")
  if isinstance(top_p, int | float) and not 0.0 < top_p <= 1.0:
    raise ValueError(f"top_p must be in (0, 1], or None, got {top_p}.")
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
    count = _per_row("top_k", top_k, rows)
    probs = jax.lax.cond(
      jnp.any(count < vocab_size), _keep_top_k, lambda p, _: p, probs, count
    )
  if top_p is not None:
    share = _per_row("top_p", top_p, rows)
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

  def draw(key):
    return jax.random.uniform(jax.random.fold_in(key, position), (2,))

  return jax.vmap(draw)(keys)


@jax.custom_batching.custom_vmap
def _any_left(ended: jax.Array) -> jax.Array:
  """Whether a row of ended [...] bool has not ended."""
  return ~jnp.all(ended)


@_any_left.def_vmap
def _any_left_of_all(axis_size, in_batched, ended):
  # With a condition for each instance, vmap would copy the whole state at every
  # step to hold back the instances that are done. Going on does them no harm:
  # rows that have ended only add padding to padding.
  del axis_size, in_batched
  return _any_left(ended), False


def _at_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """logits [..., V] at tokens [...]. A sum, not a gather: it stays on the
  device that holds the token's column when the vocabulary is cut."""
  ids = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
  return jnp.sum(jnp.where(ids == tokens[..., None], logits, 0.0), axis=-1)


def spread_policies(model: Model, policies: Params, *, whole: bool) -> Params:
  """Sends the policies of a step to the devices whose rows they answer.

  Args:
    model: of each policy.
    policies: its parameters, some leaves [G, ...].
    whole: for decoding, whose steps would gather cut parameters every time.

  Returns:
    The same, cast as `start` casts them; placed inside `sharding.on_mesh`.
  """
  dtypes = jax.tree_util.tree_map_with_path(
    lambda path, x: _dtype(model, path, x),
    policies,
    is_leaf=stands_for_an_array,
  )
  return sharding.spread(policies, model.axes(), dtypes, whole=whole)


def _in_compute_dtype(model: Model, params: Params) -> Params:
  """Casts, before the loop and not in each step, what the model would cast."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(_dtype(model, path, x)),
    params,
    is_leaf=stands_for_an_array,
  )


def _dtype(model: Model, path: Any, leaf: Any) -> Any:
  """That of the computation where the model casts; else the leaf's own."""
  if model.is_cast(tuple(entry.key for entry in path)):
    return model.config.compute_dtype
  return leaf.dtype


def _per_row(name: str, value: jax.Array | float, rows: int) -> jax.Array:
  value = jnp.asarray(value, jnp.float32)
  if value.shape not in ((), (rows,)):
    raise ValueError(
      f"{name} must be a scalar or have one value for each of the {rows} rows, "
      f"got shape {value.shape}."
    )
  return jnp.broadcast_to(value, (rows,))


def _check_positive(name: str, value: jax.Array | float) -> None:
  if isinstance(value, int | float) and not value > 0:
    raise ValueError(f"{name} must be positive, got {value}.")


def _check_keys(keys: jax.Array, rows: int) -> None:
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    raise ValueError(
      f"keys must be typed keys (jax.random.key), got {keys.dtype} of shape "
      f"{keys.shape}."
    )
  if keys.shape != (rows,):
    raise ValueError(
      f"keys must hold one key for each of the {rows} rows (prompts * "
      f"num_samples), got shape {keys.shape}."
    )


def _check_ends(
  allowed: jax.Array | np.ndarray, eos_ids: tuple[int, ...], pad_id: int
) -> None:
  if not eos_ids:
    raise ValueError(
      "nothing ends a response: give eos_ids, in the config those of its "
      "vocabulary."
    )
  # Only where the values are on the host: reading an array from a device here
  # would hold up the caller.
  if isinstance(allowed, np.ndarray):
    if not allowed[list(eos_ids)].all():
      raise ValueError(f"allowed must include the end of sequence, {eos_ids}.")
    if pad_id >= 0 and allowed[pad_id]:
      raise ValueError(f"allowed must exclude padding, {pad_id}.")

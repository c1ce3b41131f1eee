"""Sampling from a model, and the log-probabilities of what was sampled.

1. `start` reads the B prompts, once for the N samples of each, and makes an
   empty cache for B * N rows.
2. `sample_from` is the loop. At each position it asks for the next token's
   logits, draws a token (`Sampling.draw`) and notes its log-probability. It
   ends when every row has ended. It knows no model: any function of the last
   tokens, a cache and the position will do, for instance one that mixes two
   models' logits.
3. `sample` is 1 and 2 for one set of parameters, `sample_groups` for several.
4. `score_tokens` gives the log-probabilities of given tokens, teacher-forced,
   which are those that sampling gave.

Where a row ends is kept as a flag and returned as a mask; no id stands for it.

Everywhere, `params` are of the model `model`, and `encoder_input_tokens`
[B, S] int are the prompts, in which the model's pad_id is padding.

Axes: B prompts, N samples per prompt, R = B * N rows (row b * N + n is sample n
of prompt b), G groups of prompts, S source, T target, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import row_mixing, sharding
from clp_jax.models.model import Cache, Context, Model, Params
from clp_jax.sampling import (
  Sampling,
  at_token,
  check_positive,
  log_total,
  per_row,
)

# (last tokens [R] int32, cache, position [] or [R] int32)
# -> (logits [R, V], cache)
NextLogits = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]

# Tokens of a prompt from which on, where rows differ in their policies, mixing
# what reads it for each costs less than applying all sets to every token.
LONG_PROMPT = 128


class Samples(NamedTuple):
  """What was sampled; R = B * N rows, prompt-major."""

  tokens: jax.Array  # [R, T] int32, padding after EOS
  logp: jax.Array  # [R, T] float32, nats, 0 where masked
  mask: jax.Array  # [R, T] bool, True up to and including EOS


class TokenScores(NamedTuple):
  """What a model says of given tokens, each before it has seen it."""

  logp: jax.Array  # [R, T] float32, nats
  entropy: jax.Array  # [R, T] float32, nats
  states: jax.Array  # [R, T, D], the last layer's, in the compute dtype


class Loop(NamedTuple):
  """A decoding between two positions."""

  position: jax.Array  # [] int32, the next one; or [R], of rows that differ
  last: jax.Array  # [R] int32
  ended: jax.Array  # [R] bool
  samples: Samples
  cache: Cache


def sample(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  keys: jax.Array,
  sampling: Sampling,
  *,
  max_length: int,
  num_samples: int = 1,
) -> Samples:
  """Samples N responses to each prompt.

  Args:
    params: for a batch in which every row is a policy of its own, those of
      `row_mixing.mix_rows`.
    keys: [R] typed keys, one a row: what a row draws depends on its key and
      its position only, not on the other rows or on the devices.
    sampling: how; the ids are the model's.
    max_length: T; a row that has not ended by then ends without EOS.
    num_samples: N.

  Returns:
    Samples, whose logp is that of `score_tokens` at logp_temperature.

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
  return sample_from(next_logits, cache, keys, sampling, max_length)


def sample_groups(
  model: Model,
  params: Params,
  params_axes: Any,
  encoder_input_tokens: jax.Array,
  keys: jax.Array,
  sampling: Sampling,
  *,
  num_groups: int,
  max_length: int,
  num_samples: int = 1,
) -> Samples:
  """Cuts the prompts into G groups, answered by G sets of parameters.

  Args: as for `sample`, but for:
    params: some leaves are [G, ...].
    params_axes: 0 for those leaves and None for the others, as jax.vmap's
      in_axes for params.
    num_groups: G, divides B; group g answers the g-th part of B / G prompts.

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

  def sample_group(params, tokens, keys, settings):
    return sample(
      model,
      params,
      tokens,
      keys,
      dataclasses.replace(sampling, **settings),
      max_length=max_length,
      num_samples=num_samples,
    )

  samples = sharding.map_groups(sample_group, (params_axes, 0, 0, 0))(
    params,
    by_group(encoder_input_tokens),
    by_group(keys),
    jax.tree.map(by_group, sampling.by_row(rows)),
  )
  return jax.tree.map(lambda x: x.reshape(rows, max_length), samples)


def score_tokens(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  tokens: jax.Array,
  *,
  num_samples: int = 1,
  temperature: jax.Array | float = 1.0,
  allowed: jax.Array | np.ndarray | None = None,
) -> TokenScores:
  """Log-probabilities of given tokens, and entropies, teacher-forced.

  Args:
    tokens: [R, T] int, prompt-major, for instance `Samples.tokens`.
    num_samples: N, such that R = B * N.
    temperature: [] or [R] float, positive; the policy is
      softmax(logits / temperature).
    allowed: [V] bool, the tokens that the policy is over, of one that produces
      no others; None for the whole vocabulary.

  Returns:
    What stands where a row has ended means nothing: mask it.

  Raises:
    ValueError: for arguments that do not fit together.
  """
  check_rows(encoder_input_tokens, tokens, num_samples)
  check_positive("temperature", temperature)
  logits, states = model.score(params, encoder_input_tokens, tokens)
  divisor = per_row("temperature", temperature, len(tokens))
  logits = logits / divisor[:, None, None]
  total = log_total(logits, allowed)
  probs = jnp.exp(logits - total[..., None])
  if allowed is not None:
    probs = jnp.where(jnp.asarray(allowed), probs, 0)
  entropy = total - jnp.sum(probs * logits, axis=-1)
  return TokenScores(at_token(logits, tokens) - total, entropy, states)


def check_rows(
  encoder_input_tokens: jax.Array, tokens: jax.Array, num_samples: int
) -> None:
  """Raises a ValueError unless tokens [R, T] have N rows for each prompt."""
  prompts, rows = encoder_input_tokens.shape[0], tokens.shape[0]
  if rows != prompts * num_samples:
    raise ValueError(
      f"tokens must have {prompts} prompts * num_samples = {num_samples} rows, "
      f"got {rows}."
    )


def start(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  *,
  num_samples: int = 1,
  max_length: int,
  at_once: int = 1,
) -> tuple[NextLogits, Cache]:
  """Does once what decoding needs from the prompts; see `read_prompts`.

  Returns:
    A function that gives the logits of a position, and the cache it starts
    with, of N = num_samples rows a prompt and T = max_length positions: what
    `sample_from` takes.
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
    return read(row_mixing.mix_one(params, coefficients), tokens[None])

  coefficients = row_mixing.row_coefficients(params)
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
  """What gives the logits of a position, for `sample_from` and `advance`; the
  context is from `read_prompts`, with the same parameters."""
  params = _in_compute_dtype(model, params)

  def next_logits(tokens, cache, position):
    return model.step(params, context, cache, tokens, position)

  return next_logits


def sample_from(
  next_logits: NextLogits,
  cache: Cache,
  keys: jax.Array,
  sampling: Sampling,
  max_length: int,
) -> Samples:
  """Samples rows from any next-token distribution.

  Under jax.vmap the loop runs until the rows of all its instances have ended.

  Args:
    next_logits: function of the last tokens [R] int32 (padding at the first
      position and for rows that have ended), the cache and the position []
      int32, to the logits [R, V] float32 and the cache.
    cache: any tree of arrays; the first one.
    keys: [R] typed keys.
    sampling: how.
    max_length: T.

  Raises:
    ValueError: for values out of range.
  """
  loop = first_loop(cache, keys.shape[0], max_length, sampling.pad_id)
  return advance(next_logits, loop, keys, sampling, max_length).samples


def first_loop(cache: Cache, rows: int, max_length: int, pad_id: int) -> Loop:
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
  sampling: Sampling,
  until: jax.Array | int,
) -> Loop:
  """Goes on with a decoding, up to a position or until all rows have ended.

  In pieces or at once, the samples are the same: a server sends them as they
  come.

  Args:
    next_logits: as in `sample_from`.
    loop: where the decoding stands.
    keys: [R] typed keys.
    sampling: how.
    until: [] int, the position to stop before; may be traced. Where rows have
      positions of their own, [R]: as far from each as from the others. Such
      rows must end, by `Sampling.row_lengths`, at max_length at the latest.

  Returns:
    The loop; its samples hold what there is so far.

  Raises:
    ValueError: for values out of range.
  """
  rows, max_length = loop.samples.tokens.shape
  until = jnp.minimum(until, max_length)
  # Once, and not at every position.
  sampling = dataclasses.replace(sampling, **sampling.by_row(rows))

  def going_on(loop: Loop) -> jax.Array:
    return _any_left(loop.ended | (loop.position >= until))

  def step(loop: Loop) -> Loop:
    logits, cache = next_logits(loop.last, loop.cache, loop.position)
    token, logp = sampling.draw(logits, keys, loop.position)
    going = ~loop.ended
    token = jnp.where(going, token, sampling.pad_id)
    now = Samples(token, jnp.where(going, logp, 0.0), going)
    # A row of its own position stays where it has ended, so as not to leave
    # the cache.
    moved = 1 if loop.position.ndim == 0 else going
    return Loop(
      position=loop.position + moved,
      last=token,
      ended=loop.ended | sampling.ends(token, loop.position),
      samples=jax.tree.map(
        lambda all_, x: write(all_, x, loop.position), loop.samples, now
      ),
      cache=cache,
    )

  return jax.lax.while_loop(going_on, step, loop)


def write(all_: jax.Array, x: jax.Array, position: jax.Array) -> jax.Array:
  """x [R, ...] at a position [], or each row's [R], of all_ [R, T, ...].

  A row whose position is T is not written.
  """
  if position.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(
      all_, x[:, None], position, axis=1
    )
  return all_.at[jnp.arange(len(x)), position].set(x, mode="drop")


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
    is_leaf=row_mixing.stands_for_an_array,
  )
  return sharding.spread(policies, model.axes(), dtypes, whole=whole)


def _in_compute_dtype(model: Model, params: Params) -> Params:
  """Casts, before the loop and not in each step, what the model would cast."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(_dtype(model, path, x)),
    params,
    is_leaf=row_mixing.stands_for_an_array,
  )


def _dtype(model: Model, path: Any, leaf: Any) -> Any:
  """That of the computation where the model casts; else the leaf's own."""
  if model.is_cast(tuple(entry.key for entry in path)):
    return model.config.compute_dtype
  return leaf.dtype


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

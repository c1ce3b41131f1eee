"""Rows of any requests, decoded together in programs compiled at start.

There is a fixed number of slots R. `Batch.admit` reads documents into free
ones, and `Batch.advance` decodes a token of every slot at once, each at a
position of its own; a slot whose row has ended is free for another. Every row
has its own weighting, random key, temperature and so on (`mix_rows`): all of
them are data. What differs between the compiled shapes is the length S that
documents are padded to when they are read, and that is a function of the row's
own document.

So a row's answer can't depend on the company it is in, not even by rounding:
the same programs compute it whoever else is there, comes or leaves. With shapes
of fewer rows for quiet times it could: their float32 sums are ordered
differently, a log-probability comes out some 1e-6 apart, and now and then
another token is drawn. An accelerator decodes R rows in about the time of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clp_jax import generation, sharding
from clp_jax.models import decoding
from clp_jax.models.model import Context
from clp_jax.policy import Policy

ALTERNATIVES = 5  # likeliest tokens that a row can ask for at each position
SHORTEST = 64  # tokens; no shape is made for documents shorter than this
JOINING = 8  # R / A: an eighth of the rows is read together


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

  coefficients: np.ndarray  # [R, M] float32
  seeds: np.ndarray  # [R, 2] uint32, low half first
  numbers: np.ndarray  # [R] int32
  temperature: np.ndarray  # [R] float32
  top_p: np.ndarray  # [R] float32
  max_tokens: np.ndarray  # [R] int32
  alternatives: np.ndarray  # [R] bool

  @classmethod
  def of(cls, rows: Sequence[Row]) -> "_Settings":
    """Those of rows."""

    def column(name: str, dtype: Any) -> np.ndarray:
      return np.asarray([getattr(row, name) for row in rows], dtype)

    return cls(
      coefficients=column("coefficients", np.float32),
      seeds=column("seed", np.uint64)[:, None].view(np.uint32),
      numbers=column("number", np.int32),
      temperature=column("temperature", np.float32),
      top_p=column("top_p", np.float32),
      max_tokens=column("max_tokens", np.int32),
      alternatives=column("alternatives", bool),
    )


class _State(NamedTuple):
  """What the device holds of rows."""

  context: Context  # of documents of the longest S
  loop: decoding.Loop  # with (cache, likeliest tokens noted) for a cache


class Decoder:
  """The compiled programs of a policy.

  Attributes:
    rows: R, decoded together.
    joining: A, rows that are read together.
    lengths: S of each shape, ascending; the last is for the longest document.
    max_tokens: T, the most that a row can have.
    eos_ids: tokens any of which ends a row.
    trace_count: programs traced so far; constant after `compile`.
  """

  def __init__(self, policy: Policy, rows: int):
    """Prepares, but does not compile, for R rows, rounded up to a multiple of
    the mesh's data axis."""
    self._rows = policy.decoder
    self.rows = self._rows.whole(rows)
    self.joining = self._rows.whole(-(-self.rows // JOINING))
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
    self._empty = jax.jit(self._trace_empty)
    self._admit = jax.jit(self._trace_admit, donate_argnames="state")
    self._advance = jax.jit(self._trace_advance, donate_argnames="state")

  def compile(self) -> None:
    """Compiles every shape, by decoding a row in each."""
    for length in self.lengths:
      row = self._row(length)
      batch = self.begin([row])
      # Each after itself and after the other: what a program returns may lie
      # elsewhere than what it was given.
      for _ in range(2):
        batch.admit({0: row})
        batch.advance(batch.steps + 1)
        batch.advance(batch.steps + 1)

  def _row(self, length: int) -> Row:
    """One to compile for."""
    tokens = np.ones([length], np.int32)
    return Row(tokens, self._vertex, 0, 0, 1.0, 1.0, self.max_tokens, False)

  def length(self, num_tokens: int) -> int:
    """S of the shape that documents of so many tokens are read in."""
    return next(n for n in self.lengths if n >= num_tokens)

  def begin(self, rows: Sequence[Row]) -> "Batch":
    """A batch with up to R rows in its first slots."""
    if not 0 < len(rows) <= self.rows:
      raise ValueError(f"expected 1 to {self.rows} rows, got {len(rows)}.")
    batch = Batch(self)
    batch.admit(dict(enumerate(rows)))
    return batch

  def _trace_empty(self, sets):
    self.trace_count += 1
    tokens = jnp.zeros([self.rows, self.lengths[-1]], jnp.int32)
    coefficients = jnp.zeros([self.rows, len(self._vertex)])
    context = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(self._read, sets, tokens, coefficients),
    )
    state = self._before(context, self.rows)
    ended = jnp.ones([self.rows], bool)
    state = state._replace(loop=state.loop._replace(ended=ended))
    return jax.tree.map(self._cut, state, self._row_axes(state))

  def _trace_admit(self, sets, state, tokens, coefficients, slots):
    self.trace_count += 1
    context = self._read(sets, tokens, coefficients)

    def put(old, new, axis):
      # Over all that an earlier row has left, which might not be finite.
      new = jnp.pad(
        new,
        [
          (0, 0 if i == axis else large - small)
          for i, (large, small) in enumerate(
            zip(old.shape, new.shape, strict=True)
          )
        ],
      )
      place = (*(slice(None),) * axis, slots)
      return self._cut(old.at[place].set(new, mode="drop"), axis)

    new = self._before(context, len(tokens))
    return jax.tree.map(put, state, new, self._row_axes(state))

  def _trace_advance(self, sets, state, settings, steps):
    self.trace_count += 1
    params = self._rows.policies(sets, settings.coefficients)
    context, loop = state
    next_logits = decoding.logits_after(self._rows.model, params, context)
    wanted = settings.alternatives.any()

    def noting(tokens, cache, position):
      cache, noted = cache
      logits, cache = next_logits(tokens, cache, position)
      noted = jax.lax.cond(
        wanted, _note, lambda logits, noted, _: noted, logits, noted, position
      )
      return logits, (cache, noted)

    loop = decoding.advance(
      noting,
      loop,
      jax.vmap(_key)(settings.seeds, settings.numbers),
      self._rows.sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        row_lengths=settings.max_tokens,
      ),
      loop.position + steps,
    )
    return _State(context, loop)

  def _read(self, sets, tokens, coefficients) -> Context:
    params = self._rows.policies(sets, coefficients)
    return self._rows.read(params, tokens)

  def _before(self, context: Context, rows: int) -> _State:
    """Rows before their first position."""
    length = self.max_tokens
    top = (rows, length, ALTERNATIVES)
    cache = self._rows.model.empty_cache(rows, length)
    noted = (jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))
    pad_id = self._rows.model.config.pad_id
    loop = decoding.first_loop((cache, noted), rows, length, pad_id)
    position = jnp.zeros([rows], jnp.int32)
    return _State(context, loop._replace(position=position))

  def _cut(self, x: jax.Array, axis: int) -> jax.Array:
    """Cuts rows over the mesh, and other axes as the compiler likes."""
    mesh = self._rows.mesh
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = sharding.row_axes(mesh)
    at = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, at)

  def _row_axes(self, state: _State) -> Any:
    """Which axis of each array is that of rows."""
    layers = int(self._rows.model.config.scan_layers)

    def stacked(tree: Any) -> Any:
      return jax.tree.map(lambda _: layers, tree)

    context, loop = jax.tree.map(lambda _: 0, state)
    cache, noted = loop.cache
    return _State(
      context._replace(layers=stacked(context.layers)),
      loop._replace(cache=(stacked(cache), noted)),
    )


class Batch:
  """R slots, and the rows on their way in them; made by `Decoder.begin`.

  Attributes:
    steps: positions that it has gone.
  """

  def __init__(self, decoder: Decoder):
    """All slots are free."""
    self.steps = 0
    self._used = 0  # slots, up to the last that a row has had
    self._decoder = decoder
    nobody = decoder._row(1)
    self._settings = _Settings.of([nobody] * decoder.rows)
    self._state = decoder._empty(decoder._sets)

  def admit(self, rows: Mapping[int, Row]) -> None:
    """Reads the documents of rows into free slots, by number."""
    decoder = self._decoder
    self._used = max([self._used, *(slot + 1 for slot in rows)])
    by_length: dict[int, list[int]] = {}
    for slot, row in rows.items():
      length = decoder.length(len(row.tokens))
      by_length.setdefault(length, []).append(slot)
    for length, slots in by_length.items():
      for start in range(0, len(slots), decoder.joining):
        part = slots[start : start + decoder.joining]
        self._admit(length, part, [rows[slot] for slot in part])

  def _admit(
    self, length: int, slots: Sequence[int], rows: Sequence[Row]
  ) -> None:
    """Reads up to A rows of one length."""
    decoder = self._decoder
    settings = _Settings.of(rows)
    for all_, own in zip(self._settings, settings, strict=True):
      all_[slots] = own
    # Copies of the last row fill the program; they go nowhere.
    filled = generation.padding(len(rows), decoder.joining)
    pad_id = decoder._rows.model.config.pad_id
    tokens = np.full([decoder.joining, length], pad_id, np.int32)
    for padded, i in zip(tokens, filled, strict=True):
      padded[: len(rows[i].tokens)] = rows[i].tokens
    places = np.full([decoder.joining], decoder.rows, np.int32)
    places[: len(slots)] = slots
    self._state = decoder._admit(
      decoder._sets,
      self._state,
      tokens,
      settings.coefficients[filled],
      places,
    )

  def stop(self, i: int) -> None:
    """Ends the row in slot i where it is, when decoding goes on: a token
    later."""
    self._settings.max_tokens[i] = 1

  def advance(self, until: int) -> Sampled:
    """Decodes up to a step of the batch, or until all rows have ended.

    Args:
      until: the step; a row that was there from the first has so many tokens
        then, unless it has ended.

    Returns:
      All that the rows in the slots have so far, up to the last slot used.
    """
    steps = max(0, until - self.steps)
    self.steps += steps
    decoder = self._decoder
    self._state = decoder._advance(
      decoder._sets, self._state, self._settings, np.int32(steps)
    )
    loop = self._state.loop
    _, noted = loop.cache
    tokens, logp, mask, ended, top_tokens, top_logp = (
      x[: self._used]
      for x in jax.device_get((*loop.samples, loop.ended, *noted))
    )
    return Sampled(tokens, logp, mask.sum(-1), ended, top_tokens, top_logp)


def _note(logits, noted, position):
  logp = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  top_logp, top_tokens = jax.lax.top_k(logp, ALTERNATIVES)
  return tuple(
    decoding.write(all_, x, position)
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

"""Conditioning in the prompt: the weighting written before the document.

  text             rouge: 0.7 nli: 0.3 | DOCUMENT
                   One term for each objective, in the config's order; with a
                   range of alpha a last one for it, `kl: 0.032`. Terms are
                   tokenised one by one by the model's own vocabulary.
  control_tokens   M0 L7 M1 L3 DOCUMENT
                   Two tokens for each objective: M<i>, which objective, then
                   L<q>, how much. Their ids are the vocabulary's sentinels
                   <extra_id_0>, <extra_id_1>, ... and after these the rows of
                   the embedding that no piece uses: first L0 ... L<levels>,
                   then M0, M1, ... None of them can be sampled.

A weight is rounded to the nearest multiple of 1 / levels, halves to the even
one, each weight by itself: three of a third read 0.3, 0.3, 0.3. Alpha is
rounded to one of levels + 1 values that are evenly spaced in its logarithm.

Prompts are built inside the jitted programs: rounding gives row numbers of a
fixed table of tokens, so that a new weighting never traces again. Every row
gets P tokens more, the terms' longest forms; what a shorter term leaves free
goes to the end of the row, where padding is. The document loses nothing to the
prompt: rows are P + S long.

The reference is always given the document alone: it is a model of documents,
and KL is then measured against the same thing for every method.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.data.tokenizer import Tokenizer
from clp_jax.weightings import Distribution, Weighting

STYLES = ("none", "text", "control_tokens")
SEPARATOR = "|"


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """The table of a prompt format.

  Attributes:
    terms: [n, levels + 1, L] int32, padded: the tokens of each term at each
      level; n is m, or m + 1 with a range of alpha.
    end: [E] int32, what stands between the last term and the document.
    alpha_range: (low, high), or None where alpha is not written.
    pad_id: padding.
  """

  terms: np.ndarray
  end: np.ndarray
  alpha_range: tuple[float, float] | None
  pad_id: int = 0

  @property
  def length(self) -> int:
    """P, tokens that a row grows by."""
    return self.terms.shape[0] * self.terms.shape[2] + len(self.end)

  def levels(self, weighting: Weighting) -> jax.Array:
    """G weightings, rounded: [G, n] int32 in [0, levels]."""
    shares = jnp.asarray(weighting.weights, jnp.float32)
    if self.alpha_range is not None:
      low, high = np.log(self.alpha_range)
      place = jnp.log(jnp.asarray(weighting.alpha, jnp.float32)) - low
      place = place / (high - low) if high > low else place * 0
      shares = jnp.concatenate([shares, place[:, None]], axis=-1)
    top = self.terms.shape[1] - 1
    return jnp.clip(jnp.round(shares * top), 0, top).astype(jnp.int32)

  def prefix(self, weighting: Weighting) -> jax.Array:
    """[G, P] int32, what stands before the document; 0 where a term is short"""
    levels = self.levels(weighting)
    groups, terms = levels.shape
    number = jnp.arange(terms)[None]
    tokens = jnp.asarray(self.terms)[number, levels].reshape(groups, -1)
    end = jnp.broadcast_to(jnp.asarray(self.end)[None], (groups, len(self.end)))
    return jnp.concatenate([tokens, end], axis=1)

  def prepend(
    self,
    tokens: jax.Array,
    weighting: Weighting,
    chosen: jax.Array | None = None,
  ) -> jax.Array:
    """Writes weightings before rows of tokens.

    Args:
      tokens: [B, S] int32, padded, cut into G groups of B / G rows.
      weighting: G weightings, one a group.
      chosen: [B] bool, rows that get a prompt; None for all.

    Returns:
      [B, P + S] int32, padded.
    """
    prefix = self.prefix(weighting)
    prefix = jnp.repeat(prefix, tokens.shape[0] // prefix.shape[0], axis=0)
    if chosen is not None:
      prefix = jnp.where(chosen[:, None], prefix, self.pad_id)
    rows = jnp.concatenate([prefix, tokens], axis=1)
    # Padding to the end, the order of the rest unchanged.
    order = jnp.argsort(rows == self.pad_id, axis=1, stable=True)
    return jnp.take_along_axis(rows, order, axis=1)

  def prepend_to_some(
    self,
    tokens: jax.Array,
    key: jax.Array,
    *,
    distribution: Distribution,
    share: float,
  ) -> jax.Array:
    """Writes a weighting of its own before a random share of the rows.

    Args:
      tokens: [B, S] int32, padded.
      key: of the weightings and of which rows get one.
      distribution: Q, of the weightings.
      share: probability that a row gets one.

    Returns:
      [B, P + S] int32, padded.
    """
    weightings_key, chosen_key = jax.random.split(key)
    rows = tokens.shape[0]
    return self.prepend(
      tokens,
      distribution.sample(weightings_key, rows),
      jax.random.bernoulli(chosen_key, share, (rows,)),
    )


def text_prompts(
  vocabulary: Tokenizer,
  objectives: Sequence[str],
  levels: int,
  alpha_range: tuple[float, float] | None,
) -> Prompts:
  """The table of the style "text".

  Args:
    vocabulary: of the model.
    objectives: names of the m rewards, in order.
    levels: a weight is a multiple of 1 / levels.
    alpha_range: (low, high), or None.

  Raises:
    ValueError: when the vocabulary has no pieces for a term.
  """
  values = [f"{i / levels:.3g}" for i in range(levels + 1)]
  texts = [[f"{name}: {value}" for value in values] for name in objectives]
  if alpha_range is not None:
    alphas = np.geomspace(*alpha_range, levels + 1)
    texts.append([f"kl: {alpha:.2g}" for alpha in alphas])

  def encode(text, before=None):
    ids = vocabulary.encode(text)
    if before is not None:
      # SentencePiece begins a text with a space, byte-level BPE does not.
      joined = vocabulary.decode([*vocabulary.encode(before), *ids])
      if joined == before + text:
        ids = vocabulary.encode(f" {text}")
    if vocabulary.unk_id in ids:
      raise ValueError(
        f"the model's vocabulary has no pieces for the prompt {text!r}; use "
        "prompting.style=control_tokens."
      )
    return ids

  firsts = [None, *(row[0] for row in texts)]
  encoded = [
    [encode(text, before) for text in row]
    for before, row in zip(firsts, texts, strict=False)
  ]
  length = max(len(ids) for row in encoded for ids in row)
  shape = (len(texts), levels + 1, length)
  terms = np.full(shape, vocabulary.pad_id, np.int32)
  for i, row in enumerate(encoded):
    for q, ids in enumerate(row):
      terms[i, q, : len(ids)] = ids
  end = np.asarray(encode(SEPARATOR, firsts[-1]), np.int32)
  return Prompts(terms, end, alpha_range, vocabulary.pad_id)


def control_prompts(
  ids: Sequence[int],
  num_rewards: int,
  levels: int,
  alpha_range: tuple[float, float] | None,
  pad_id: int = 0,
) -> Prompts:
  """The table of the style "control_tokens".

  Args: as for `text_prompts`, but for:
    ids: tokens that may be used, from `vocabulary.control_ids`.
    num_rewards: m.
    pad_id: padding.

  Raises:
    ValueError: when there are too few.
  """
  terms = num_rewards + (alpha_range is not None)
  needed = num_control_tokens(num_rewards, levels, alpha_range)
  if len(ids) < needed:
    raise ValueError(
      f"prompting.levels = {levels} and {terms} terms need {needed} control "
      f"tokens, but the model has {len(ids)} sentinels and unused rows; use "
      "prompting.style=text, fewer prompting.levels, or a model that a preset "
      "of random parameters became with this prompting.style: it gets the rows."
    )
  used = np.asarray(ids[:needed], np.int32)
  level = np.broadcast_to(used[None, : levels + 1], (terms, levels + 1))
  marker = np.broadcast_to(used[levels + 1 :, None], (terms, levels + 1))
  return Prompts(
    np.stack([marker, level], axis=-1),
    np.zeros([0], np.int32),
    alpha_range,
    pad_id,
  )


def num_control_tokens(
  num_rewards: int, levels: int, alpha_range: tuple[float, float] | None
) -> int:
  """How many tokens the style "control_tokens" takes."""
  return levels + 1 + num_rewards + (alpha_range is not None)

"""Generation: rows in batches of few shapes, each of a policy of its own.

`RowDecoder` is what `Policy` and the server compile; the rest is on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clp_jax import row_mixing, sharding
from clp_jax.models import decoding, mixture
from clp_jax.models.model import Context, Model, Params
from clp_jax.sampling import BLOCK, Sampling

BATCH = 64  # rows decoded together; smaller requests take the next power of 2


def batches(
  coefficients: Sequence[np.ndarray],
) -> Iterator[tuple[np.ndarray, list[int]]]:
  """Row numbers computed together, with their coefficients [M] or [B, M].

  A weighting that fills batches has its policy mixed; the rows of the others
  have theirs mixed row by row.

  Args:
    coefficients: [M] float32 of each row.
  """
  groups: dict[bytes, list[int]] = {}
  for i, own in enumerate(coefficients):
    groups.setdefault(own.tobytes(), []).append(i)
  rest = []
  for rows in groups.values():
    full = len(rows) // BATCH * BATCH
    for start in range(0, full, BATCH):
      yield coefficients[rows[0]], rows[start : start + BATCH]
    rest += rows[full:]
  rest.sort()
  for start in range(0, len(rest), BATCH):
    rows = rest[start : start + BATCH]
    mine = np.stack([coefficients[i] for i in rows])
    yield mine if (mine != mine[0]).any() else mine[0], rows


def padding(num: int, size: int) -> np.ndarray:
  """[size] row numbers: the last of `num` rows again is padding."""
  return np.minimum(np.arange(size), num - 1)


def shorten(tokens: np.ndarray, pad_id: int) -> np.ndarray:
  """Cuts columns that are padding in all rows.

  Down to a power of two, of a block of attention at the least, so that few
  widths have to be compiled.

  Args:
    tokens: [B, S] int32, padded at the end.
    pad_id: the padding.

  Returns:
    [B, up to S] int32.
  """
  is_text = (tokens != pad_id).any(axis=0)
  last = int(np.max(np.flatnonzero(is_text), initial=0))
  return tokens[:, : max(BLOCK, 1 << last.bit_length())]


def per_row(name: str, value: Any, rows: int) -> np.ndarray | None:
  """A setting of `Policy.sample`, one for all rows or one each, as [rows].

  Raises:
    ValueError: it is out of range, or of another number of rows.
  """
  if value is None:
    return None
  array = np.asarray(value)
  if array.shape not in ((), (rows,)):
    raise ValueError(
      f"got {name} of shape {array.shape} for {rows} rows; give one for "
      "all, or one per row."
    )
  dtype, is_valid, valid = _VALID[name]
  if not is_valid(array).all():
    raise ValueError(f"{name} must be {valid}, got {value}.")
  if dtype is np.int32:
    array = np.minimum(array, np.iinfo(np.int32).max)
  # Only now: the smallest top_p rounds to 0, which takes the likeliest.
  return np.broadcast_to(array.astype(dtype), (rows,))


_VALID: dict[str, Any] = {
  "temperature": (np.float32, lambda x: x >= 0, ">= 0"),
  "top_k": (np.int32, lambda x: x >= 1, "at least 1"),
  "top_p": (np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
  "max_lengths": (np.int32, lambda x: x >= 1, "at least 1"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class RowDecoder:
  """Decodes and scores rows of one policy, or of one each, where compiled.

  Attributes:
    model: that all policies are of.
    steerable: over a policy's tree: True where a leaf depends on the weighting.
    mixes_logits: a weighting combines the sets' logits, not their parameters.
    mesh: over which rows are cut.
    max_length: T, tokens that a response can have.
    allowed: [V] bool, the tokens that may be sampled.
  """

  model: Model
  steerable: Params
  mixes_logits: bool
  mesh: Mesh
  max_length: int
  allowed: np.ndarray

  def whole(self, rows: int) -> int:
    """Rows, rounded up to a number that the mesh can cut."""
    shards = sharding.row_shards(self.mesh)
    return -(-rows // shards) * shards

  def policies(
    self, params: Params, coefficients: jax.Array | None
  ) -> Params | mixture.Mixture:
    """What the rows are policies of.

    Args:
      params: those of the one policy; or the sets, `Policy.row_sets`.
      coefficients: None; or of the rows, [R, M].
    """
    if coefficients is None:
      return params
    if self.mixes_logits:
      return mixture.unstack(params, coefficients)
    return row_mixing.mix_rows(params, self.steerable, coefficients)

  def read(self, params: Params, tokens: jax.Array) -> Context:
    """What steps read of prompts [R, S], under parameters of `policies`."""
    at_once = self.mesh.shape["data"]
    tokens = self._cut_rows(tokens)
    return decoding.read_prompts(self.model, params, tokens, at_once)

  def start(
    self,
    policies: Params | mixture.Mixture,
    tokens: jax.Array,
    *,
    num_samples: int = 1,
  ) -> tuple[decoding.NextLogits, decoding.Cache]:
    """What `decoding.sample_from` takes, of policies from `policies` or
    `Policy.mix` and prompts [B, S] int32 of N = num_samples responses."""
    start: Any = mixture.start
    if not isinstance(policies, mixture.Mixture):
      at_once = self.mesh.shape["data"]
      start = functools.partial(decoding.start, at_once=at_once)
    lengths = {"num_samples": num_samples, "max_length": self.max_length}
    return start(self.model, policies, self._cut_rows(tokens), **lengths)

  def sampling(self, **settings: Any) -> Sampling:
    """How tokens are drawn with these settings; how rows end is the model's."""
    config = self.model.config
    return Sampling(self.allowed, config.eos_ids, config.pad_id, **settings)

  # Jitted for each decoder, not for the class: what is compiled for a policy is
  # freed with it, and an experiment loads hundreds.
  @functools.cached_property
  def sample(self) -> Callable[..., decoding.Samples]:
    """Samples a response to each row of tokens, jitted.

    (params, coefficients, tokens, keys, settings) -> samples of R rows: the
    first two as for `policies`; tokens [R, S] int32, prompts; keys [R] typed;
    settings {name: [R]}, of `sampling`.
    """
    return jax.jit(self._sample)

  @functools.cached_property
  def score(self) -> Callable[..., jax.Array]:
    """Scores a response to each row of tokens, jitted.

    (params, coefficients, tokens [R, S], targets [R, T]) -> [R] float32: the
    targets' log-probabilities, summed, in nats.
    """
    return jax.jit(self._score)

  def _sample(self, params, coefficients, tokens, keys, settings):
    policies = self.policies(params, coefficients)
    next_logits, cache = self.start(policies, tokens)
    sampling = self.sampling(**settings)
    samples = decoding.sample_from(
      next_logits, cache, keys, sampling, self.max_length
    )
    return jax.tree.map(self._cut_rows, samples)

  def _score(self, params, coefficients, tokens, targets):
    policies = self.policies(params, coefficients)
    if isinstance(policies, mixture.Mixture):
      logp = mixture.token_logp(self.model, policies, tokens, targets)
    else:
      logp = decoding.score_tokens(self.model, policies, tokens, targets).logp
    is_text = targets != self.model.config.pad_id
    return jnp.where(is_text, logp, 0).sum(-1)

  def _cut_rows(self, x: jax.Array) -> jax.Array:
    rows = sharding.row_sharding(self.mesh)
    return jax.lax.with_sharding_constraint(x, rows)

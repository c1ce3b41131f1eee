"""What a family of language models is to the rest of the program.

Nothing above `models/` and `interop/` asks which family it has. A model is a
static value: it holds a config and no parameters, and every method is a pure
function of what it is given.

Where families agree, so that no method is needed:

  - Parameters are nested dicts. Layers lie under `<stack>/layers_<i>`, or
    stacked to [L, ...] under `<stack>/layers`. What is of an attention lies
    under a name of `conditioning.ATTENTION`, what is of an MLP under `mlp`, the
    logit layer under `decoder/logits_dense` unless it is the table
    `token_embedder/embedding`, soft tokens under `soft_tokens`.
  - A linear map is a `kernel` [in, out], with or without a `bias`.
  - Any leaf may be a `RowMixture`.

Axes: B prompts, N samples a prompt, R = B * N rows, prompt-major, S source and
T target positions, D model, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import jax

Params = Any
Cache = Any
Config = Any  # a frozen dataclass: T5Config, CausalConfig


class Context(NamedTuple):
  """What decoding reads of B prompts, at every position."""

  layers: Any  # arrays [B, heads, S, K], or [L, B, heads, S, K] in a stack
  rows: Any  # arrays [B, ...]


class Model(Protocol):
  """A language model that answers prompts."""

  @property
  def config(self) -> Config:
    """Has vocab_size, emb_dim, dtype, compute_dtype, scan_layers, remat,
    dropout_rate, soft_tokens, pad_id and eos_ids."""

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters, from a typed key."""

  def abstract(self) -> Params:
    """The tree of `init` with a jax.ShapeDtypeStruct for each array."""

  def axes(self) -> Params:
    """The tree of `init` with a tuple of logical axis names for each array."""

  def is_cast(self, path: tuple[str, ...]) -> bool:
    """Whether the model casts a leaf to the dtype of the computation."""

  def read(self, params: Params, prompts: jax.Array) -> Context:
    """Reads prompts [B, S] int32, config.pad_id where there is no token; once
    for the N samples of each."""

  def empty_cache(self, rows: int, length: int) -> Cache:
    """What `step` starts with, for R rows of `length` positions."""

  def step(
    self,
    params: Params,
    context: Context,
    cache: Cache,
    last: jax.Array,
    position: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """The next token's logits.

    Args:
      params: that `context` was read with.
      context: of the B prompts.
      cache: of R rows.
      last: [R] int32, the token sampled before; not read at position 0.
      position: [] int32, tokens of the response so far; or [R], each row's. A
        row at the cache's length is computed, for nothing, and not written.

    Returns:
      [R, V] float32, and the cache with this position written.
    """

  def score(
    self,
    params: Params,
    prompts: jax.Array,
    targets: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Logits of given responses, teacher-forced.

    Args:
      params: of the model.
      prompts: [B, S] int32, config.pad_id where there is no token.
      targets: [R, T] int32, prompt-major; padding is last.
      dropout_key: a typed key; None for no dropout.

    Returns:
      [R, T, V] float32, at each position before the model has seen its target,
      and the states [R, T, D] that the logits are made of, in the compute
      dtype.
    """

  def flops(self, prompts: int, rows: int, source: int, target: int) -> float:
    """FLOPs of the matrix products of `score`, padding included: two a
    multiply-add."""

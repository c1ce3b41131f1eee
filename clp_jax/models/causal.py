"""Decoder-only models in Flax linen: Llama 3, Qwen2, Qwen3, Gemma 2, Gemma 3.

One network with a few switches (`CausalConfig`); what a checkpoint of a family
sets them to is interop/causal_lm.py's to say. Reading:

1. `Network.read` runs a prompt once, for its N samples, and keeps every layer's
   keys and values. All but the prompt's last token are context: the last one is
   the first input of a response, as 0 is T5's.
2. `Network.respond` is teacher-forced, `Network.step` decodes one position with
   a cache. Both attend to the prompt's keys, which the N rows of a prompt share
   and never copy, and to the row's own: logits are concatenated, not keys.
3. A position is how many tokens came before it, whatever padding there is, so
   that padding may be on either side.

Layers that differ (windows, frequencies of the rotary embedding) differ in
numbers that they are given, so that a stack of them is one scanned program.

Axes: B prompts, N samples a prompt, R = B * N rows, S source, T target, Q
queries, D model, H heads, J heads of keys and values, G = H / J, K head width,
F mlp, V vocabulary, L layers.

Sources: transformers 4.57, modeling_{llama,qwen2,qwen3,gemma2,gemma3}.py.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from clp_jax.errors import check_choice
from clp_jax.models import attention
from clp_jax.models import layers as parts
from clp_jax.models.model import Context
from clp_jax.models.trees import Call
from clp_jax.row_mixing import RowMixture
from clp_jax.sharding import constrain

ROPE_SCALINGS = ("none", "linear", "llama3")
NO_PAD = -1  # padding where every id may be text
_NO_WINDOW = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Rope:
  """Frequencies of a rotary position embedding.

  Attributes:
    theta: the base.
    scaling: one of ROPE_SCALINGS.
    factor: that long wavelengths are stretched by; "linear" stretches all.
    low_frequency_factor: "llama3": wavelengths above original_length / this
      are stretched by the whole factor,
    high_frequency_factor: those below original_length / this not at all.
    original_length: tokens that the model was first trained with.
  """

  theta: float = 10000.0
  scaling: str = "none"
  factor: float = 1.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self):
    name = "the rotary embedding's scaling"
    check_choice(name, self.scaling, ROPE_SCALINGS)

  def frequencies(self, head_dim: int) -> np.ndarray:
    """[K / 2] float32, radians a token."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = self.theta**-exponents
    if self.scaling == "none":
      return plain.astype(np.float32)
    stretched = plain / self.factor
    if self.scaling == "linear":
      return stretched.astype(np.float32)
    turns = self.original_length * plain / (2 * math.pi)
    low, high = self.low_frequency_factor, self.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * plain + (1 - kept) * stretched).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class CausalConfig:
  """What a decoder-only model is.

  Attributes:
    architecture: model_type of its Hugging Face config, which exports carry.
    vocab_size: rows of the embedding, which may be more than there are tokens.
    num_tokens: ids that the tokenizer knows; rows beyond have probability 0.
      0 is all rows, as in a checkpoint without its tokenizer.
    emb_dim: width D of the residual stream.
    num_layers: L.
    num_heads: H, of queries.
    num_kv_heads: J, of keys and values; divides H.
    head_dim: width K of a head; even.
    mlp_dim: hidden width F.
    activation: of the MLP's gate, a name in `layers.ACTIVATIONS`.
    norm_epsilon: added to mean squares.
    norm_from_one: norms multiply by 1 + w, in float32 (Gemma).
    post_norms: norms after both branches of a layer, too (Gemma).
    qk_norm: norms of each head's queries and keys, before the rotation.
    qkv_bias: the query, key and value maps have biases.
    out_bias: the map out of attention has one.
    mlp_bias: the maps of the MLP have.
    query_scale: multiplies queries; None is K^-1/2.
    attention_cap: attention's logits are cap * tanh(logits / cap).
    logit_cap: likewise the vocabulary's.
    ropes: rotary embeddings that layers choose from.
    layer_ropes: [L], which one; () is the first for all.
    windows: [L], how many tokens a query sees, itself included, 0 for all;
      () is all for all.
    scale_embeddings: by D^1/2 in the compute dtype (Gemma).
    logits_via_embedding: the embedding is the logit layer.
    max_length: tokens of prompt and response that the model was made for.
    dropout_rate: probability of dropping; the mask is broadcast over length.
    dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
    scan_layers: stack the layers' parameters and loop over them.
    remat: as `layers.T5Config.remat`.
    soft_tokens: learned embeddings that stand before the prompt.
    eos_ids: tokens any of which ends a response.
    pad_id: padding in arrays of tokens; -1 where every id may be text.
  """

  architecture: str = "llama"
  vocab_size: int = 128256
  emb_dim: int = 2048
  num_layers: int = 16
  num_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 64
  mlp_dim: int = 8192
  activation: str = "silu"
  norm_epsilon: float = 1e-5
  norm_from_one: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  query_scale: float | None = None
  attention_cap: float | None = None
  logit_cap: float | None = None
  ropes: tuple[Rope, ...] = (Rope(),)
  layer_ropes: tuple[int, ...] = ()
  windows: tuple[int, ...] = ()
  scale_embeddings: bool = False
  logits_via_embedding: bool = True
  max_length: int = 8192
  dropout_rate: float = 0.0
  dtype: str = "float32"
  scan_layers: bool = False
  remat: str = "none"
  soft_tokens: int = 0
  eos_ids: tuple[int, ...] = ()
  pad_id: int = NO_PAD
  num_tokens: int = 0

  reads_eos: ClassVar[bool] = False

  def with_vocabulary(
    self, size: int, eos_ids: Sequence[int], pad_id: int
  ) -> "CausalConfig":
    """As that of `layers.T5Config`, but rows from `size` on get no probability.

    Raises:
      ValueError: the vocabulary has more ids than the model has rows.
    """
    return dataclasses.replace(
      self, num_tokens=size, eos_ids=tuple(eos_ids), pad_id=pad_id
    )

  def __post_init__(self):
    parts.check_sizes(
      self,
      *("vocab_size", "emb_dim", "num_layers", "num_heads", "num_kv_heads"),
      *("head_dim", "mlp_dim", "max_length"),
    )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = "
        f"{self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even, got {self.head_dim}.")
    check_choice("activation", self.activation, parts.ACTIVATIONS)
    parts.check_computation(self)
    # A JSON file gives lists and dicts, which can't be hashed.
    ropes = (r if isinstance(r, Rope) else Rope(**r) for r in self.ropes)
    object.__setattr__(self, "ropes", tuple(ropes))
    for name in ("layer_ropes", "windows", "eos_ids"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    for name in ("layer_ropes", "windows"):
      if len(getattr(self, name)) not in (0, self.num_layers):
        raise ValueError(
          f"{name} has {len(getattr(self, name))} entries for "
          f"{self.num_layers} layers."
        )
    parts.check_eos_ids(self, lowest=0)
    if not 0 <= self.num_tokens <= self.vocab_size:
      raise ValueError(
        f"num_tokens must be in [0, {self.vocab_size}], got {self.num_tokens}."
      )
    if self.pad_id in self.eos_ids or self.pad_id >= self.vocab_size:
      raise ValueError(
        f"pad_id must be {NO_PAD}, or a token that ends nothing, got "
        f"{self.pad_id!r}."
      )

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def mlp_activations(self) -> tuple[str, ...]:
    return (self.activation, "linear")


class Kind(NamedTuple):
  """What a layer is told; in a stack, of all layers."""

  rope: Any  # [] int32, which
  window: Any  # [] int32


class Keys(NamedTuple):
  """Where keys are: what decides which queries see them."""

  position: jax.Array  # [b, S] int32
  mask: jax.Array  # [b, S] bool


class Rows(NamedTuple):
  """What decoding needs of prompts beside their layers' keys and values."""

  keys: Keys  # of [B, S], the tokens but for the last
  length: jax.Array  # [B] int32, tokens, soft ones included
  last: jax.Array  # [B] int32, the last token


def attend(
  query: jax.Array,
  at: jax.Array,
  window: jax.Array,
  own: attention.KeysValues,
  own_at: Keys,
  shared: attention.KeysValues | None = None,
  shared_at: Keys | None = None,
  *,
  cap: float | None = None,
) -> jax.Array:
  """Means of values by the softmax of query times key, the past alone.

  Many queries are worked on a block at a time, see `in_blocks`.

  Args:
    query: [R, J, G, Q, K], scaled.
    at: [R, Q] int32, the queries' positions.
    window: [] int32.
    own: [R, J, U, K] each, of the rows themselves.
    own_at: of [R, U].
    shared: [B, J, S, K] each, of the prompts that the rows answer, or None.
    shared_at: of [B, S].
    cap: `CausalConfig.attention_cap`.

  Returns:
    [R, J, G, Q, K], of the queries' dtype.
  """
  keys = (window, own, own_at, shared, shared_at, cap)

  def run(query, at):
    return _attend(query, at, *keys)

  if query.shape[3] < attention.MANY_QUERIES:
    return run(query, at)
  return attention.in_blocks(run, (query, at), (-2, -1))


def _attend(query, at, window, own, own_at, shared, shared_at, cap):
  rows, heads = query.shape[:2]
  prompts = rows if shared is None else shared.keys.shape[0]

  # The N rows of a prompt are queries to the same keys, of which there is no
  # copy: b and j lead on both sides, where XLA's products for a CPU are fast.
  def together(x: jax.Array) -> jax.Array:
    """[R, j, g, q, *] -> [B, j, N, g, q, *]."""
    return x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)

  def apart(x: jax.Array) -> jax.Array:
    """Back again."""
    x = x.swapaxes(1, 2)
    return x.reshape(rows, *x.shape[2:])

  def sees(keys: Keys, at: jax.Array) -> jax.Array:
    """[b, Q, S], for at [b, Q]."""
    back = at[:, :, None] - keys.position[:, None, :]
    return (back >= 0) & (back < window) & keys.mask[:, None]

  products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits = together(products("rjgqk,rjuk->rjgqu", query, own.keys))
  seen = together(sees(own_at, at)[:, None, None])
  if shared is not None:
    queries = together(query).reshape(prompts, heads, -1, query.shape[-1])
    of_prompt = products("bjmk,bjsk->bjms", queries, shared.keys)
    of_prompt = of_prompt.reshape(*logits.shape[:-1], -1)
    logits = jnp.concatenate([logits, of_prompt], axis=-1)
    of_prompt = sees(shared_at, at.reshape(prompts, -1))
    of_prompt = of_prompt.reshape(*seen.shape[:-1], -1)
    seen = jnp.concatenate([seen, of_prompt], axis=-1)
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  logits = jnp.where(seen, logits, attention.MASKED)
  probs = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  split = own.keys.shape[2]
  attended = jnp.einsum(
    "rjgqu,rjuk->rjgqk", apart(probs[..., :split]), own.values
  )
  if shared is not None:
    weights = probs[..., split:]
    size = weights.shape[-1]
    means = jnp.einsum(
      "bjms,bjsk->bjmk",
      weights.reshape(prompts, heads, -1, size),
      shared.values,
    )
    attended += apart(means.reshape(*weights.shape[:-1], -1))
  return attended


class Turns(NamedTuple):
  """Cosines and sines of positions, for each of the config's ropes."""

  cos: jax.Array  # [n, R, Q, K / 2] float32
  sin: jax.Array

  @classmethod
  def of(cls, config: CausalConfig, position: jax.Array) -> "Turns":
    """position: [R, Q] int32."""
    frequencies = np.stack(
      [rope.frequencies(config.head_dim) for rope in config.ropes]
    )
    angles = position[None, ..., None].astype(
      jnp.float32
    ) * frequencies.reshape(len(config.ropes), 1, 1, -1)
    return cls(jnp.cos(angles), jnp.sin(angles))

  def rotate(self, x: jax.Array, rope: jax.Array) -> jax.Array:
    """x [R, Q, heads, K], each half-split pair by its angle."""
    cos, sin = (
      jax.lax.dynamic_index_in_dim(a, rope, 0, keepdims=False)[:, :, None]
      for a in self
    )
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention, its logits' past alone."""

  config: CausalConfig

  def setup(self):
    cfg = self.config
    linear = functools.partial(
      parts.Linear,
      dtype=cfg.compute_dtype,
      kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    )
    width, kv_width = (
      n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads)
    )
    bias = cfg.qkv_bias
    self.query = linear(width, ("embed", "joined_kv"), use_bias=bias)
    self.key = linear(kv_width, ("embed", "joined_kv"), use_bias=bias)
    self.value = linear(kv_width, ("embed", "joined_kv"), use_bias=bias)
    self.out = linear(
      cfg.emb_dim, ("joined_kv", "embed"), use_bias=cfg.out_bias
    )
    if cfg.qk_norm:
      self.query_norm = _norm(cfg, "kv")
      self.key_norm = _norm(cfg, "kv")

  def keys_values(
    self, x: jax.Array, turns: Turns, rope: jax.Array
  ) -> attention.KeysValues:
    """x: [R, Q, D] -> keys and values [R, J, Q, K]."""
    keys, values = (
      a.reshape(*x.shape[:2], self.config.num_kv_heads, self.config.head_dim)
      for a in (self.key(x), self.value(x))
    )
    if self.config.qk_norm:
      keys = self.key_norm(keys)
    keys = turns.rotate(keys, rope)
    return attention.KeysValues.of(keys, values, "kv_heads")

  def __call__(
    self,
    x: jax.Array,
    turns: Turns,
    kind: Kind,
    at: jax.Array,
    own: attention.KeysValues,
    own_at: Keys,
    shared: attention.KeysValues | None = None,
    shared_at: Keys | None = None,
  ) -> jax.Array:
    """x: [R, Q, D] -> [R, Q, D]; the rest is as for `attend`."""
    cfg = self.config
    rows, length, _ = x.shape
    query = self.query(x).reshape(rows, length, cfg.num_heads, cfg.head_dim)
    query = constrain(query, "batch", "length", "heads", "kv")
    if cfg.qk_norm:
      query = self.query_norm(query)
    query = turns.rotate(query, kind.rope)
    scale = cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale
    # Head h reads the keys of head h // G.
    query = (query * scale).reshape(
      rows, length, cfg.num_kv_heads, -1, cfg.head_dim
    )
    attended = attend(
      query.transpose(0, 2, 3, 1, 4),
      at,
      kind.window,
      own,
      own_at,
      shared,
      shared_at,
      cap=cfg.attention_cap,
    )
    attended = attended.transpose(0, 3, 1, 2, 4)
    attended = checkpoint_name(attended, "attended")
    return self.out(attended.reshape(rows, length, -1))


def _norm(config: CausalConfig, axis: str = "embed") -> parts.RMSNorm:
  return parts.RMSNorm(
    config.compute_dtype, config.norm_epsilon, config.norm_from_one, axis
  )


class Layer(nn.Module):
  """Attention, then MLP, each normed before, and in Gemma after, and added."""

  config: CausalConfig

  def setup(self):
    cfg = self.config
    self.pre_attention_norm = _norm(cfg)
    self.attention = Attention(cfg)
    self.pre_mlp_norm = _norm(cfg)
    self.mlp = parts.MLP(cfg, cfg.mlp_bias)
    if cfg.post_norms:
      self.post_attention_norm = _norm(cfg)
      self.post_mlp_norm = _norm(cfg)
    self.dropout = parts.dropout(cfg)

  def keys_values(
    self, x: jax.Array, turns: Turns, kind: Kind
  ) -> tuple[jax.Array, attention.KeysValues]:
    """x: [R, Q, D] -> what attention reads of it, and keys and values."""
    y = self.pre_attention_norm(x)
    return y, self.attention.keys_values(y, turns, kind.rope)

  def rest(
    self,
    x: jax.Array,
    y: jax.Array,
    *attention_args: Any,
    deterministic: bool = True,
  ) -> jax.Array:
    """x, and y from `keys_values` -> [R, Q, D]."""
    drop = functools.partial(self.dropout, deterministic=deterministic)
    attended = self.attention(y, *attention_args)
    if self.config.post_norms:
      attended = self.post_attention_norm(attended)
    x = constrain(x + drop(attended), "batch", "length", "embed")
    y = self.mlp(self.pre_mlp_norm(x), deterministic)
    if self.config.post_norms:
      y = self.post_mlp_norm(y)
    return constrain(x + drop(y), "batch", "length", "embed")


class Stack(nn.Module):
  """All the layers, their last norm and the logit layer."""

  config: CausalConfig

  def setup(self):
    cfg = self.config
    self.num_layers = cfg.num_layers
    self.layers = parts.layers_of(cfg, Layer, self.num_layers)
    self.decoder_norm = _norm(cfg)
    if not cfg.logits_via_embedding:
      self.logits_dense = LogitLayer(cfg)

  def _inputs(self, *per_layer: Any) -> Any:
    """The layers' kinds, and what else each gets, for `through_layers`."""
    cfg = self.config
    ropes = np.asarray(cfg.layer_ropes or (0,) * cfg.num_layers, np.int32)
    windows = np.asarray(cfg.windows or (0,) * cfg.num_layers, np.int32)
    windows = np.where(windows > 0, windows, _NO_WINDOW).astype(np.int32)
    if cfg.scan_layers:
      return (Kind(ropes, windows), *per_layer)
    kinds = (Kind(*pair) for pair in zip(ropes, windows, strict=True))
    return list(zip(kinds, *per_layer, strict=True))

  def read(self, x: jax.Array, keys: Keys, deterministic: bool) -> Any:
    """x: [B, S, D] embedded -> keys and values [B, J, S, K] of every layer."""

    def body(layer, x, inputs, turns, keys):
      (kind,) = inputs
      y, own = layer.keys_values(x, turns, kind)
      seen = (turns, kind, keys.position, own, keys)
      return layer.rest(x, y, *seen, deterministic=deterministic), own

    shared = (Turns.of(self.config, keys.position), keys)
    inputs = self._inputs()
    return parts.through_layers(self, body, x, inputs, *shared, remat=True)[1]

  def respond(
    self, x: jax.Array, at: jax.Array, context: Context, deterministic: bool
  ) -> jax.Array:
    """x: [R, T, D] embedded, at: [R, T] int32 -> [R, T, D]."""

    def body(layer, x, inputs, turns, own_at, shared_at):
      kind, shared = inputs
      y, own = layer.keys_values(x, turns, kind)
      seen = (turns, kind, own_at.position, own, own_at, shared, shared_at)
      return layer.rest(x, y, *seen, deterministic=deterministic), None

    own_at = Keys(at, jnp.ones(at.shape, bool))
    shared = (Turns.of(self.config, at), own_at, context.rows.keys)
    inputs = self._inputs(context.layers)
    x, _ = parts.through_layers(self, body, x, inputs, *shared, remat=True)
    return self.decoder_norm(x)

  def step(
    self,
    x: jax.Array,
    at: jax.Array,
    cache: Any,
    position: jax.Array,
    context: Context,
  ) -> tuple[jax.Array, Any]:
    """x: [R, 1, D] embedded, at: [R, 1] int32 -> [R, 1, D] and the cache."""

    def body(layer, x, cache, index, inputs, turns, position, at, *keys):
      kind, shared = inputs
      own_at, shared_at = keys
      y, new = layer.keys_values(x, turns, kind)
      cache, own = attention.write_cache(cache, new, index, position)
      seen = (turns, kind, at, own, own_at, shared, shared_at)
      return layer.rest(x, y, *seen), cache

    length = jax.tree.leaves(cache)[0].shape[-2]
    slot = jnp.arange(length, dtype=jnp.int32)[None]
    by_row = jnp.reshape(position, (-1, 1))
    own_at = Keys(
      at - by_row + slot,
      jnp.broadcast_to(slot <= by_row, (at.shape[0], length)),
    )
    turns = Turns.of(self.config, at)
    shared = (turns, position, at, own_at, context.rows.keys)
    inputs = self._inputs(context.layers)
    x, cache = parts.step_layers(self, body, x, cache, inputs, *shared)
    return self.decoder_norm(x), cache


class LogitLayer(nn.Module):
  """Scores of the vocabulary, summed in float32."""

  config: CausalConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    shape = (cfg.emb_dim, cfg.vocab_size)
    kernel = parts.param(self, "kernel", init, shape, ("embed", "vocab"))
    if isinstance(kernel, RowMixture):
      return kernel.matmul(x).astype(jnp.float32)
    kernel = constrain(kernel.astype(x.dtype), "embed", "vocab")
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


class Network(nn.Module):
  """The decoder-only model; methods are reached with `apply(method=...)`."""

  config: CausalConfig

  def setup(self):
    cfg = self.config
    # What layers read, and tied logits, start at a scale of about 1.
    wide = cfg.scale_embeddings or cfg.logits_via_embedding
    self.token_embedder = parts.Embedding(
      cfg, cfg.emb_dim**-0.5 if wide else 1.0
    )
    if cfg.soft_tokens:
      self.soft_tokens = parts.SoftTokens(cfg)
    self.decoder = Stack(cfg)

  def __call__(self, prompts: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, S], [R, T] int32 -> logits [R, T, V], as `model.Model.score`."""
    return self.respond(self.read(prompts), targets)[0]

  def read(self, prompts: jax.Array, deterministic: bool = True) -> Context:
    """[B, S] int32 -> what `respond` and `step` read; see model.Context."""
    cfg = self.config
    mask = prompts != cfg.pad_id
    end = prompts.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    last = jnp.take_along_axis(prompts, end[:, None], axis=1)[:, 0]
    is_last = jnp.arange(prompts.shape[1])[None] == end[:, None]
    x = self.token_embedder(jnp.maximum(prompts, 0))
    if cfg.soft_tokens:
      x = self.soft_tokens(x)
    soft = ((0, 0), (cfg.soft_tokens, 0))
    mask = jnp.pad(mask, soft, constant_values=True)
    is_last = jnp.pad(is_last, soft)
    position = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    layers = self.decoder.read(
      self._scaled(x), Keys(position, mask), deterministic
    )
    length = jnp.maximum(mask.sum(1), 1).astype(jnp.int32)
    keys = Keys(position, mask & ~is_last)
    return Context(layers, Rows(keys, length, last))

  def respond(
    self, context: Context, targets: jax.Array, deterministic: bool = True
  ) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced: (logits [R, T, V] float32, states [R, T, D])."""
    rows: Rows = context.rows
    copies = parts.copies_of(targets.shape[0], rows.last.shape[0])
    first = jnp.repeat(rows.last, copies)[:, None]
    inputs = jnp.concatenate([first, targets[:, :-1]], axis=1)
    begin = jnp.repeat(rows.length, copies)[:, None] - 1
    at = begin + jnp.arange(targets.shape[1], dtype=jnp.int32)[None]
    x = self._scaled(self.token_embedder(jnp.maximum(inputs, 0)))
    states = self.decoder.respond(x, at, context, deterministic)
    return self._logits(states), states

  def step(
    self, context: Context, cache: Any, last: jax.Array, position: jax.Array
  ) -> tuple[jax.Array, Any]:
    """[R] int32 -> logits [R, V] float32 and the cache; as model.Model.step."""
    rows: Rows = context.rows
    copies = parts.copies_of(last.shape[0], rows.last.shape[0])
    token = jnp.where(position == 0, jnp.repeat(rows.last, copies), last)
    at = jnp.repeat(rows.length, copies)[:, None] - 1
    at = at + jnp.reshape(position, (-1, 1))
    x = self._scaled(self.token_embedder(jnp.maximum(token, 0)[:, None]))
    x, cache = self.decoder.step(x, at, cache, position, context)
    return self._logits(x)[:, 0], cache

  def _scaled(self, x: jax.Array) -> jax.Array:
    x = x.astype(self.config.compute_dtype)
    if self.config.scale_embeddings:
      # Gemma rounds the scale to the dtype that it multiplies in.
      x = x * jnp.asarray(self.config.emb_dim**0.5, x.dtype)
    return x

  def _logits(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    if not cfg.logits_via_embedding:
      logits = self.decoder.logits_dense(x)
    else:
      table = self.token_embedder.embedding
      if isinstance(table, RowMixture):
        logits = table.matmul_transposed(x.astype(jnp.float32))
      else:
        table = constrain(table.astype(x.dtype), "vocab", "embed")
        logits = jnp.matmul(x, table.T, preferred_element_type=jnp.float32)
    if cfg.logit_cap is not None:
      logits = cfg.logit_cap * jnp.tanh(logits / cfg.logit_cap)
    if 0 < cfg.num_tokens < cfg.vocab_size:
      # Rows that were never trained: sampling excludes them anyhow, but in the
      # policy's and the reference's probabilities they would count.
      known = jnp.arange(cfg.vocab_size) < cfg.num_tokens
      logits = jnp.where(known.reshape(1, 1, -1), logits, attention.MASKED)
    return constrain(logits, "batch", "length", "vocab")


def call(config: CausalConfig) -> Call:
  """The network, and the shapes of what it takes."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return Network(config), (tokens, tokens)

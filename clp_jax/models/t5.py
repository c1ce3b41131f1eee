"""T5 v1.0 and v1.1 (LM-adapted and Flan included) in Flax linen.

Parameter names, two-dimensional kernels and logical axes are t5x's, so that its
checkpoints load without a map and a mixed policy is an ordinary T5. Reading:

1. `T5Config` says what a model is, `T5` is the network, and `init_params`,
   `abstract_params`, `logical_axes` describe its tree.
2. `T5.encode` runs once a prompt. `T5.decode` is teacher-forced. The decoder
   takes R = B * N rows, prompt-major, for the B encoded prompts: the N samples
   of a prompt read the same cross-attention keys and values, never a copy.
3. `T5.cross_keys_values` and `T5.decode_step` decode one position at a time
   with a cache that is an argument and a result, not a Flax collection.
4. With `scan_layers` the layers' parameters are stacked on a leading axis under
   `encoder/layers` and `decoder/layers`; `stack_layers` and `unstack_layers`
   convert. The relative-position tables stay outside of the layers, shared.

With `soft_tokens` P, learned embeddings stand before the encoder's input, at
the positions -P to -1: the distances between the words of the input, and so
their relative biases, stay what they are. They are never masked, and the
encoded source has length P + S; encoder masks are those of the S tokens
throughout, and are extended here.

Axes: B prompts, N samples per prompt, R = B * N rows, S source, T target,
Q queries (S or T), D model, H heads, K head width, F mlp, V vocabulary,
L layers.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.models import layers as parts
from clp_jax.models import trees
from clp_jax.models.attention import KeysValues, empty_cache, write_cache
from clp_jax.models.layers import T5Config
from clp_jax.models.layers import (
  relative_position_buckets as relative_position_buckets,
)
from clp_jax.models.trees import Axes, Params
from clp_jax.models.trees import stack_layers as stack_layers
from clp_jax.models.trees import unstack_layers as unstack_layers
from clp_jax.sharding import constrain

# One KeysValues a layer in a tuple, or, with scan_layers, a single KeysValues
# with a leading axis L.
LayersKeysValues = tuple[KeysValues, ...] | KeysValues


def shift_right(decoder_target_tokens: jax.Array) -> jax.Array:
  """The decoder's inputs for its targets [..., T] int: 0 first, then all but
  the last."""
  shifted = jnp.roll(decoder_target_tokens, 1, axis=-1)
  return shifted.at[..., 0].set(T5Config.pad_id)


class EncoderLayer(nn.Module):
  """Self-attention, then MLP, each normed before and added after."""

  config: T5Config

  def setup(self):
    cfg = self.config
    self.pre_attention_layer_norm = parts.RMSNorm(cfg.compute_dtype)
    self.attention = parts.Attention(cfg)
    self.pre_mlp_layer_norm = parts.RMSNorm(cfg.compute_dtype)
    self.mlp = parts.MLP(cfg)
    self.dropout = parts.dropout(cfg)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array,
    deterministic: bool = True,
  ) -> jax.Array:
    """x: [B, S, D], mask: [B, 1, S], bias: [1 or B, H, S, S] -> [B, S, D]."""
    drop = functools.partial(self.dropout, deterministic=deterministic)
    y = self.pre_attention_layer_norm(x)
    keys_values = self.attention.keys_values(y)
    x = x + drop(self.attention(y, keys_values, mask, bias, deterministic))
    x = constrain(x, "batch", "length", "embed")
    x = x + drop(self.mlp(self.pre_mlp_layer_norm(x), deterministic))
    return constrain(x, "batch", "length", "embed")


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention, MLP, each normed before, added after."""

  config: T5Config

  def setup(self):
    cfg = self.config
    self.pre_self_attention_layer_norm = parts.RMSNorm(cfg.compute_dtype)
    self.self_attention = parts.Attention(cfg)
    self.pre_cross_attention_layer_norm = parts.RMSNorm(cfg.compute_dtype)
    self.encoder_decoder_attention = parts.Attention(cfg)
    self.pre_mlp_layer_norm = parts.RMSNorm(cfg.compute_dtype)
    self.mlp = parts.MLP(cfg)
    self.dropout = parts.dropout(cfg)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    bias: jax.Array,
    encoded: jax.Array,
    encoder_mask: jax.Array,
    deterministic: bool = True,
  ) -> jax.Array:
    """Teacher-forced: x [B * N, T, D], with a causal mask [1, T, T] and a bias
    [1 or B, H, T, T], reads encoded [B, S, D], encoder_mask [B, 1, S]."""
    y = self.pre_self_attention_layer_norm(x)
    attended = self.self_attention(
      y, self.self_attention.keys_values(y), mask, bias, deterministic
    )
    x = x + self.dropout(attended, deterministic=deterministic)
    x = constrain(x, "batch", "length", "embed")
    cross = self.encoder_decoder_attention.keys_values(encoded)
    return self._after_self_attention(x, cross, encoder_mask, deterministic)

  def step(
    self,
    x: jax.Array,
    cache: KeysValues,
    layer: jax.Array | None,
    cross: KeysValues,
    position: jax.Array,
    mask: jax.Array,
    bias: jax.Array,
    encoder_mask: jax.Array,
  ) -> tuple[jax.Array, KeysValues]:
    """One position of every row: x [R, 1, D], and the cache that it is in.

    Args:
      cache, layer, position: as for `write_cache`.
      cross: [B, H, S, K] each.
      mask: [1 or R, 1, T] bool, True up to position.
      bias: [1 or B or R, H, 1, T] float32.
      encoder_mask: [B, 1, S] bool.
    """
    y = self.pre_self_attention_layer_norm(x)
    new = self.self_attention.keys_values(y)
    cache, own = write_cache(cache, new, layer, position)
    x = x + self.self_attention(y, own, mask, bias)
    return self._after_self_attention(x, cross, encoder_mask), cache

  def _after_self_attention(
    self,
    x: jax.Array,
    cross: KeysValues,
    encoder_mask: jax.Array,
    deterministic: bool = True,
  ) -> jax.Array:
    drop = functools.partial(self.dropout, deterministic=deterministic)
    y = self.pre_cross_attention_layer_norm(x)
    y = self.encoder_decoder_attention(
      y, cross, encoder_mask, deterministic=deterministic
    )
    x = constrain(x + drop(y), "batch", "length", "embed")
    x = x + drop(self.mlp(self.pre_mlp_layer_norm(x), deterministic))
    return constrain(x, "batch", "length", "embed")


class Encoder(nn.Module):
  """All the encoder layers, with their shared relative bias and last norm."""

  config: T5Config

  def setup(self):
    cfg = self.config
    self.relpos_bias = parts.RelativeBias(cfg)
    self.num_layers = cfg.num_encoder_layers
    self.layers = parts.layers_of(cfg, EncoderLayer, self.num_layers)
    self.encoder_norm = parts.RMSNorm(cfg.compute_dtype)
    self.dropout = parts.dropout(cfg)

  def __call__(
    self, x: jax.Array, mask: jax.Array, deterministic: bool = True
  ) -> jax.Array:
    """x: [B, S, D] embedded, mask: [B, S] bool -> [B, S, D]."""
    position = np.arange(x.shape[1])
    distance = position[:, None] - position[None, :]
    bias = self.relpos_bias(distance, bidirectional=True)

    def body(layer, x, _, mask, bias):
      return layer(x, mask, bias, deterministic), None

    x = self.dropout(x, deterministic=deterministic)
    mask = mask[:, None]
    x, _ = parts.through_layers(self, body, x, None, mask, bias, remat=True)
    x = self.encoder_norm(x)
    return self.dropout(x, deterministic=deterministic)


class Decoder(nn.Module):
  """All the decoder layers, their shared relative bias, norm, logit layer."""

  config: T5Config

  def setup(self):
    cfg = self.config
    self.relpos_bias = parts.RelativeBias(cfg)
    self.num_layers = cfg.num_decoder_layers
    self.layers = parts.layers_of(cfg, DecoderLayer, self.num_layers)
    self.decoder_norm = parts.RMSNorm(cfg.compute_dtype)
    self.dropout = parts.dropout(cfg)
    if not cfg.logits_via_embedding:
      self.logits_dense = parts.Linear(
        cfg.vocab_size,
        ("embed", "vocab"),
        dtype=jnp.dtype("float32"),
        kernel_init=nn.initializers.variance_scaling(
          1.0, "fan_in", "truncated_normal"
        ),
      )

  def __call__(
    self,
    x: jax.Array,
    encoded: jax.Array,
    encoder_mask: jax.Array,
    deterministic: bool = True,
  ) -> jax.Array:
    """x: [B * N, T, D] embedded, encoded: [B, S, D] -> [B * N, T, D]."""
    position = np.arange(x.shape[1])
    distance = position[:, None] - position[None, :]
    bias = self.relpos_bias(distance, bidirectional=False)
    mask = jnp.asarray(distance >= 0)[None]

    def body(layer, x, _, mask, bias, encoded, encoder_mask):
      x = layer(x, mask, bias, encoded, encoder_mask, deterministic)
      return x, None

    x = self.dropout(x, deterministic=deterministic)
    shared = (mask, bias, encoded, encoder_mask[:, None])
    x, _ = parts.through_layers(self, body, x, None, *shared, remat=True)
    x = self.decoder_norm(x)
    return self.dropout(x, deterministic=deterministic)

  def cross_keys_values(self, encoded: jax.Array) -> LayersKeysValues:
    """encoded: [B, S, D] -> keys and values [B, H, S, K] of every layer."""

    def body(layer, encoded, _):
      return encoded, layer.encoder_decoder_attention.keys_values(encoded)

    return parts.through_layers(self, body, encoded, None)[1]

  def step(
    self,
    x: jax.Array,
    cache: LayersKeysValues,
    position: jax.Array,
    cross: LayersKeysValues,
    encoder_mask: jax.Array,
  ) -> tuple[jax.Array, LayersKeysValues]:
    """x: [R, 1, D] embedded -> [R, 1, D] and the cache, position written."""
    length = jax.tree.leaves(cache)[0].shape[-2]
    distance = jnp.reshape(position, (-1, 1, 1)) - jnp.arange(
      length, dtype=jnp.int32
    ).reshape(1, 1, -1)
    bias = jnp.take_along_axis(
      self.relpos_bias(np.arange(length)[None], bidirectional=False),
      jnp.maximum(distance, 0)[:, None],
      axis=-1,
      mode="clip",  # a row that has ended may have reached T
    )
    mask = distance >= 0
    shared = (position, mask, bias, encoder_mask[:, None])
    step = DecoderLayer.step
    x, cache = parts.step_layers(self, step, x, cache, cross, *shared)
    return self.decoder_norm(x), cache


class T5(nn.Module):
  """The encoder-decoder.

  `T5(config).apply({"params": params}, encoder_input_tokens,
  decoder_input_tokens)` gives teacher-forced logits; the other methods are
  reached with `apply(..., method="encode")` and so on.
  """

  config: T5Config

  def setup(self):
    self.token_embedder = parts.Embedding(self.config)
    if self.config.soft_tokens:
      self.soft_tokens = parts.SoftTokens(self.config)
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    encoder_mask: jax.Array | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """Teacher-forced logits.

    Args:
      encoder_input_tokens: [B, S] int; 0 is padding.
      decoder_input_tokens: [B * N, T] int, prompt-major: what `shift_right`
        makes of the targets. The mask is causal only, since padding is last.
      encoder_mask: [B, S] bool, True where there is a token, in place of
        encoder_input_tokens != 0.
      deterministic: no dropout; otherwise pass apply `rngs={"dropout": key}`.

    Returns:
      [B * N, T, V] float32.
    """
    encoder_mask = _encoder_mask(encoder_input_tokens, encoder_mask)
    encoded = self.encode(encoder_input_tokens, encoder_mask, deterministic)
    return self.decode(
      encoded, encoder_mask, decoder_input_tokens, deterministic
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_mask: jax.Array | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """[B, S] int -> [B, S, D], or [B, P + S, D], in the compute dtype."""
    mask = _encoder_mask(encoder_input_tokens, encoder_mask)
    embedded = self.token_embedder(encoder_input_tokens)
    if self.config.soft_tokens:
      embedded = self.soft_tokens(embedded)
    return self.encoder(embedded, self._encoded_mask(mask), deterministic)

  def decode(
    self,
    encoded: jax.Array,
    encoder_mask: jax.Array,
    decoder_input_tokens: jax.Array,
    deterministic: bool = True,
  ) -> jax.Array:
    """As `__call__`, from what `encode` returned: [B, S, D], or [B, P + S, D]
    with soft tokens; encoder_mask is [B, S] bool."""
    parts.copies_of(decoder_input_tokens.shape[0], encoded.shape[0])
    x = self.token_embedder(decoder_input_tokens)
    encoder_mask = self._encoded_mask(encoder_mask)
    x = self.decoder(x, encoded, encoder_mask, deterministic)
    # Kept only where the caller makes "intermediates" mutable.
    self.sow("intermediates", "decoder_states", x)
    return self._logits(x)

  def cross_keys_values(self, encoded: jax.Array) -> LayersKeysValues:
    """Projects encoded prompts [B, S, D] for every layer's cross-attention."""
    return self.decoder.cross_keys_values(encoded)

  def decode_step(
    self,
    tokens: jax.Array,
    cache: LayersKeysValues,
    position: jax.Array,
    cross: LayersKeysValues,
    encoder_mask: jax.Array,
  ) -> tuple[jax.Array, LayersKeysValues]:
    """Logits of the next token, given the last one.

    Args:
      tokens: [R] int, the decoder's input at position (0 at the first).
      cache: from `init_cache` or the step before.
      position: [] int32, from 0, less than the cache's length; or [R], each
        row's, of which one that has reached it is not written.
      cross: from `cross_keys_values`, of the B prompts; R is a multiple of B.
      encoder_mask: [B, S] bool.

    Returns:
      Logits [R, V] float32, and the cache with this position written.
    """
    parts.copies_of(tokens.shape[0], encoder_mask.shape[0])
    x = self.token_embedder(tokens[:, None])
    encoder_mask = self._encoded_mask(encoder_mask)
    x, cache = self.decoder.step(x, cache, position, cross, encoder_mask)
    return self._logits(x)[:, 0], cache

  def _encoded_mask(self, mask: jax.Array) -> jax.Array:
    """[B, S] bool, of tokens -> that of what is encoded: soft tokens count."""
    return jnp.pad(
      mask, ((0, 0), (self.config.soft_tokens, 0)), constant_values=True
    )

  def _logits(self, x: jax.Array) -> jax.Array:
    if self.config.logits_via_embedding:
      logits = self.token_embedder.attend(x)
    else:
      logits = self.decoder.logits_dense(x)
    return constrain(logits, "batch", "length", "vocab")


def _encoder_mask(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
  if mask is None:
    return tokens != T5Config.pad_id
  if mask.shape != tokens.shape:
    raise ValueError(
      f"encoder_mask must have the shape of encoder_input_tokens, "
      f"{tokens.shape}, got {mask.shape}."
    )
  return mask.astype(bool)


def init_cache(
  config: T5Config, num_rows: int, max_length: int
) -> LayersKeysValues:
  """An empty self-attention cache for `T5.decode_step`, of R rows and T
  positions: zeros [R, H, T, K] in the compute dtype for each decoder layer."""
  shape = (num_rows, config.num_heads, max_length, config.head_dim)
  return empty_cache(config, config.num_decoder_layers, shape, "heads")


def _call(config: T5Config) -> trees.Call:
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return T5(config), (tokens, tokens)


def init_params(config: T5Config, key: jax.Array) -> Params:
  """Random float32 parameters from a typed key, as t5x initialises them.

  Whether the layers are scanned changes where the values are, not the values.
  """
  return trees.init(_call, config, key)


def abstract_params(config: T5Config) -> Params:
  """The tree of `init_params` with a jax.ShapeDtypeStruct for each array."""
  return trees.abstract(_call, config)


def logical_axes(config: T5Config) -> Axes:
  """The tree of `init_params` with a tuple of t5x's axis names for each array.

  The tuples are leaves by meaning but nodes to jax.tree: map over them with
  `is_leaf=lambda x: isinstance(x, tuple)`. Stacked layers put "layers" first.
  """
  return trees.axes(_call, config)

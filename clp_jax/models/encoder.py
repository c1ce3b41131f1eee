"""Encoders that label a text, in Flax linen: BERT, RoBERTa and their kin.

Embeddings of tokens, learned positions and segments are summed and normed;
every layer norms what attention, then its MLP, has been added to (post-LN); the
first position's state goes through one more layer, and a linear map has a
number for each label. DeBERTa-v3 has no positions: its attention's logits
depend on the distance, by one table that all layers share, which is projected
like the queries and like the keys (He et al. 2021, arXiv 2006.03654 and
2111.09543).

Axes: B rows, S positions, D model, H heads, K head width, P distances.

Sources: transformers 4.57, modeling_{bert,roberta,distilbert,deberta_v2}.py.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.models import layers as parts
from clp_jax.models.trees import Call
from clp_jax.sharding import constrain

_NORMAL = nn.initializers.normal(0.02)
_POOL_ACTIVATIONS = parts.ACTIVATIONS | {"tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """What an encoder with a head is.

  Attributes:
    vocab_size: rows of the table of tokens.
    emb_dim: width D.
    num_layers: how many.
    num_heads: H, which divides D.
    mlp_dim: hidden width of the MLP.
    activation: of the MLP, a name in `layers.ACTIVATIONS`.
    norm_epsilon: added to variances.
    max_length: tokens of a row.
    num_labels: numbers of the head.
    pool_activation: of the layer between the first state and the head; "tanh"
      is one more.
    first_position: row of the table of positions that the first token has.
    num_segments: rows of the table of segments; 0 is none.
    buckets: of distances to either side (DeBERTa), which then replace
      positions; 0 is none. Up to half of them each distance has its own.
    dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
    scan_layers: stack the layers' parameters and loop over them.
  """

  vocab_size: int
  emb_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  activation: str
  norm_epsilon: float
  max_length: int
  num_labels: int
  pool_activation: str
  first_position: int = 0
  num_segments: int = 0
  buckets: int = 0
  dtype: str = "float32"
  scan_layers: bool = False

  dropout_rate: ClassVar[float] = 0.0
  remat: ClassVar[str] = "none"

  def __post_init__(self):
    parts.check_sizes(
      self,
      *("vocab_size", "emb_dim", "num_layers", "num_heads", "mlp_dim"),
      *("max_length", "num_labels"),
    )
    if self.emb_dim % self.num_heads:
      raise ValueError(
        f"the width {self.emb_dim} is not a multiple of the {self.num_heads} "
        "heads."
      )
    parts.check_computation(self)

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def mlp_activations(self) -> tuple[str, ...]:
    return (self.activation,)


class Distances(NamedTuple):
  """What attention knows of where a key is, seen from a query."""

  table: jax.Array  # [P, D]
  row: jax.Array  # [S, S] int32, that of a query and a key


def distance_index(length: int, buckets: int, longest: int) -> np.ndarray:
  """Rows of the table of distances, [S, S] int32 in [0, 2 * buckets).

  Half of the buckets of a side have one distance each, the others grow
  logarithmically up to `longest` - 1.
  """
  distance = np.arange(length)[:, None] - np.arange(length)
  half = buckets // 2
  # In float32, as the models were trained: the last bit decides at an edge.
  far = np.maximum(np.abs(distance), half).astype(np.float32) / half
  share = np.log(far) / np.log(np.float32((longest - 1) / half))
  bucket = np.sign(distance) * (np.ceil(share * (half - 1)) + half)
  bucket = np.where(np.abs(distance) <= half, distance, bucket)
  return np.clip(bucket + buckets, 0, 2 * buckets - 1).astype(np.int32)


def _norm(config: EncoderConfig, name: str | None = None) -> nn.LayerNorm:
  def init(constant):
    return nn.with_logical_partitioning(constant, ("embed",))

  return nn.LayerNorm(
    config.norm_epsilon,
    dtype=config.compute_dtype,
    use_fast_variance=False,
    scale_init=init(nn.initializers.ones_init()),
    bias_init=init(nn.initializers.zeros_init()),
    name=name,
  )


def _table(module: Any, name: str, rows: int) -> jax.Array:
  init = nn.with_logical_partitioning(_NORMAL, ("relpos_buckets", "embed"))
  shape = (rows, module.config.emb_dim)
  made = module.param(name, init, shape, jnp.float32)
  return cast(jax.Array, made)  # param takes the box off


class Layer(nn.Module):
  """Attention to all positions, then MLP, each added and then normed."""

  config: EncoderConfig

  def setup(self):
    cfg = self.config
    linear = functools.partial(
      parts.Linear, cfg.emb_dim, dtype=cfg.compute_dtype, kernel_init=_NORMAL
    )
    self.query, self.key, self.value = (
      linear(("embed", "joined_kv"), use_bias=True) for _ in range(3)
    )
    self.out = linear(("joined_kv", "embed"), use_bias=True)
    self.attention_norm = _norm(cfg)
    self.mlp = parts.MLP(cfg, use_bias=True)
    self.mlp_norm = _norm(cfg)

  def _heads(self, x: jax.Array) -> jax.Array:
    """[..., S, D] -> [..., H, S, K]."""
    x = x.reshape(*x.shape[:-1], self.config.num_heads, -1)
    return jnp.swapaxes(x, -3, -2)

  def __call__(
    self, x: jax.Array, mask: jax.Array, distances: Distances | None
  ) -> jax.Array:
    """x: [B, S, D], mask: [B, 1, 1, S] bool -> [B, S, D]."""
    query, keys, values = (
      constrain(self._heads(f(x)), "batch", "heads", "length", "kv")
      for f in (self.query, self.key, self.value)
    )
    # Logits are a sum of three products where distances are two of them.
    terms = 1 if distances is None else 3
    scale = (terms * query.shape[-1]) ** -0.5
    query = query * scale
    bias = None
    if distances is not None:
      of_query = self._heads(self.query(distances.table)) * scale
      of_key = self._heads(self.key(distances.table))
      bias = _at_distance(query, of_key, distances.row)
      turned = _at_distance(keys, of_query, distances.row.T)
      bias = bias + jnp.swapaxes(turned, -1, -2)
    attended = parts.attend(query, keys, values, mask, bias)
    attended = jnp.swapaxes(attended, 1, 2).reshape(x.shape)
    x = self.attention_norm(x + self.out(attended))
    x = self.mlp_norm(x + self.mlp(x))
    return constrain(x, "batch", "length", "embed")


def _at_distance(x: jax.Array, table: jax.Array, row: jax.Array) -> jax.Array:
  """x [B, H, S, K] times those rows of a table [H, P, K] that row [S, S]
  names: [B, H, S, S] float32."""
  products = jnp.einsum(
    "bhsk,hpk->bhsp", x, table, preferred_element_type=jnp.float32
  )
  return jnp.take_along_axis(products, row[None, None], axis=-1)


class Stack(nn.Module):
  """All the layers, and the table of distances where there is one."""

  config: EncoderConfig

  def setup(self):
    cfg = self.config
    self.num_layers = cfg.num_layers
    self.layers = parts.layers_of(cfg, Layer, cfg.num_layers)
    if cfg.buckets:
      self.distances = _table(self, "distances", 2 * cfg.buckets)
      self.distance_norm = _norm(cfg)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """x: [B, S, D], mask: [B, S] bool -> [B, S, D]."""
    cfg = self.config
    distances = None
    if cfg.buckets:
      index = distance_index(x.shape[1], cfg.buckets, cfg.max_length)
      table = self.distance_norm(self.distances)
      distances = Distances(table, jnp.asarray(index))

    def body(layer, x, _, mask, distances):
      return layer(x, mask, distances), None

    mask = mask[:, None, None]
    return parts.through_layers(self, body, x, None, mask, distances)[0]


class Network(nn.Module):
  """An encoder and its head."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """Logits of the labels.

    Args:
      rows: [B, 2, S] int32: tokens, of which -1 is padding and last, and the
        segment of each.

    Returns:
      [B, num_labels] float32.
    """
    cfg = self.config
    tokens, segments = rows[:, 0], rows[:, 1]
    embed = parts.Embedding(cfg, name="token_embedder")
    x = embed(jnp.maximum(tokens, 0))
    if not cfg.buckets:
      first = cfg.first_position
      table = _table(self, "positions", first + cfg.max_length)
      table = table[first : first + tokens.shape[1]]
      x = x + table[None].astype(x.dtype)
    if cfg.num_segments:
      table = _table(self, "segments", cfg.num_segments)
      segments = segments if cfg.num_segments > 1 else 0 * segments
      x = x + jnp.take(table, segments, axis=0).astype(x.dtype)
    x = _norm(cfg, "embedding_norm")(x)
    x = Stack(cfg, name="encoder")(x, tokens >= 0)

    def dense(name, features, axes):
      return nn.Dense(
        features,
        dtype=jnp.float32,
        precision="highest",
        kernel_init=nn.with_logical_partitioning(_NORMAL, axes),
        bias_init=nn.with_logical_partitioning(
          nn.initializers.zeros_init(), axes[1:]
        ),
        name=name,
      )

    x = dense("pool", cfg.emb_dim, ("embed", "head"))(x[:, 0])
    x = _POOL_ACTIVATIONS[cfg.pool_activation](x)
    return dense("head", cfg.num_labels, ("embed", "head"))(x)


def call(config: EncoderConfig) -> Call:
  """The network, and the shapes of what it takes."""
  rows = jax.ShapeDtypeStruct((1, 2, 1), jnp.int32)
  return Network(config), (rows,)

"""What models are made of: linear maps, norms, MLP, embedding, T5's attention.

Names, shapes and logical axes of the parameters are t5x's; see `t5.py`, where
the parts are put together, for the axis letters. Any parameter may be a
`RowMixture` instead of an array: then every row has its own mixture of it.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from clp_jax import low_rank
from clp_jax.errors import check_choice
from clp_jax.low_rank import LowRank
from clp_jax.models import attention
from clp_jax.row_mixing import RowMixture
from clp_jax.sharding import constrain

NORM_EPSILON = 1e-6

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=True),
  "gelu_exact": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
  "silu": nn.silu,
  "linear": lambda x: x,
}
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "minimal", "full")


def check_sizes(config: Any, *names: str) -> None:
  """Raises a ValueError unless these fields are positive integers."""
  for name in names:
    value = getattr(config, name)
    if not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def check_computation(config: Any) -> None:
  """Raises a ValueError unless a config can be computed as it says."""
  if not 0.0 <= config.dropout_rate < 1.0:
    raise ValueError(
      f"dropout_rate must be in [0, 1), got {config.dropout_rate!r}."
    )
  check_choice("dtype", config.dtype, DTYPES)
  check_choice("remat", config.remat, REMAT)


def check_eos_ids(config: Any, lowest: int) -> None:
  """Raises a ValueError unless they are tokens, from `lowest` on."""
  for token in config.eos_ids:
    if not isinstance(token, int) or not lowest <= token < config.vocab_size:
      raise ValueError(
        f"eos_ids must be tokens in [{lowest}, {config.vocab_size}), got "
        f"{config.eos_ids!r}."
      )


@dataclasses.dataclass(frozen=True)
class T5Config:
  """What a T5 is, under t5x's field names where t5x has the field.

  v1.1 is `mlp_activations=("gelu", "linear")`, `logits_via_embedding=False`;
  v1.0 is `("relu",)`, `True`.

  Attributes:
    vocab_size: rows of the embedding, padding rows included (32128).
    emb_dim: width D of the residual stream.
    num_heads: heads H.
    head_dim: width K of a head; H * K need not be D.
    num_encoder_layers: encoder layers.
    num_decoder_layers: decoder layers.
    mlp_dim: hidden width F.
    mlp_activations: one activation a parallel input projection; their results
      are multiplied.
    logits_via_embedding: the embedding is the logit layer, and the logits are
      divided by sqrt(D).
    dropout_rate: probability of dropping; the mask is broadcast over length.
    dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
    relative_attention_num_buckets: rows of a relative-position table.
    relative_attention_max_distance: tokens; all farther ones share a bucket.
    scan_layers: stack the layers' parameters and loop over them, which keeps
      the compile time of a deep model that of one layer.
    remat: what the backward pass computes again: "none" of it, "minimal" all
      but the outputs of linear maps and attention, "full" whole layers.
    soft_tokens: learned embeddings that stand before the encoder's input; 0 in
      an ordinary T5.
    eos_ids: tokens any of which ends a response; the first one ends inputs and
      targets. They are the vocabulary's to say: () where none has.
  """

  vocab_size: int = 32128
  emb_dim: int = 512
  num_heads: int = 6
  head_dim: int = 64
  num_encoder_layers: int = 8
  num_decoder_layers: int = 8
  mlp_dim: int = 1024
  mlp_activations: tuple[str, ...] = ("gelu", "linear")
  logits_via_embedding: bool = False
  dropout_rate: float = 0.0
  dtype: str = "float32"
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  scan_layers: bool = False
  remat: str = "none"
  soft_tokens: int = 0
  eos_ids: tuple[int, ...] = ()

  pad_id: ClassVar[int] = 0  # also the decoder's first input
  max_length: ClassVar[int | None] = None  # distances have a last bucket
  reads_eos: ClassVar[bool] = True  # at the end of a prompt

  def with_vocabulary(
    self, size: int, eos_ids: Sequence[int], pad_id: int
  ) -> "T5Config":
    """The model's config beside a vocabulary.

    Args:
      size: one more than the largest id; the logits of rows beyond stay.
      eos_ids: that end responses.
      pad_id: padding.

    Raises:
      ValueError: the model has other padding, or an end beyond its rows.
    """
    del size
    if pad_id != self.pad_id:
      raise ValueError(
        f"a T5 pads with token {self.pad_id}, the vocabulary with {pad_id}."
      )
    return dataclasses.replace(self, eos_ids=tuple(eos_ids))

  def __post_init__(self):
    check_sizes(
      self,
      *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"),
      *("num_encoder_layers", "num_decoder_layers"),
    )
    activations = self.mlp_activations
    if (
      isinstance(activations, str)
      or not activations
      or not set(activations) <= set(ACTIVATIONS)
    ):
      raise ValueError(
        "mlp_activations must be a tuple of names out of "
        f"{sorted(ACTIVATIONS)}, such as ('gelu', 'linear'), got "
        f"{activations!r}."
      )
    # A list, as a JSON file gives it, would make the config unhashable.
    object.__setattr__(self, "mlp_activations", tuple(activations))
    check_computation(self)
    buckets = self.relative_attention_num_buckets
    if buckets < 4 or buckets % 4:
      raise ValueError(
        "relative_attention_num_buckets must be a positive multiple of 4, got "
        f"{buckets!r}."
      )
    if self.relative_attention_max_distance <= buckets // 2:
      raise ValueError(
        "relative_attention_max_distance must be more than half of "
        f"relative_attention_num_buckets = {buckets}, got "
        f"{self.relative_attention_max_distance!r}."
      )
    object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
    check_eos_ids(self, lowest=1)

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)


def relative_position_buckets(
  distance: np.ndarray,
  *,
  bidirectional: bool,
  num_buckets: int = 32,
  max_distance: int = 128,
) -> np.ndarray:
  """The bucket of each distance between a query and a key.

  Half of the buckets (of each direction's share) hold one distance each, the
  others grow logarithmically up to max_distance. Source: t5x, `layers.py`.

  Args:
    distance: int array, query position minus key position.
    bidirectional: keys after the query have buckets of their own (encoder);
      otherwise they fall into bucket 0, and a mask hides them (decoder).
    num_buckets: buckets in all.
    max_distance: tokens, from which on all distances share the last bucket.

  Returns:
    int32 array of distance's shape.
  """
  distance = np.asarray(distance)
  first = np.zeros(distance.shape, np.int32)
  if bidirectional:
    num_buckets //= 2
    first = np.where(distance < 0, num_buckets, 0)
    distance = np.abs(distance)
  distance = np.maximum(distance, 0)
  exact = num_buckets // 2
  # The epsilon keeps powers of two, whose logarithms ought to be exact, from
  # falling into the bucket below.
  ratio = np.maximum(distance, 1) / exact + np.finfo(np.float32).eps
  growth = np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)
  large = np.minimum(exact + growth.astype(np.int32), num_buckets - 1)
  return (first + np.where(distance < exact, distance, large)).astype(np.int32)


def dropout(config: Any) -> nn.Dropout:
  """Dropout of features [..., length, features], the same at all positions."""
  return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


def param(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
) -> jax.Array | RowMixture:
  """A float32 parameter, its logical axes recorded when it is created."""
  if module.has_variable("params", name):
    # Flax would trace `init` for its shape, whenever a leaf is read.
    value: Any = nn.unbox(module.get_variable("params", name))
    stands_in = isinstance(value, RowMixture | LowRank)  # of another shape
    if not stands_in and value.shape != shape:
      raise ValueError(
        f"{'/'.join(module.path)}/{name} has the shape {value.shape}, but the "
        f"model needs {shape}."
      )
    return cast(RowMixture, value)
  boxed_init = nn.with_logical_partitioning(init, axes)
  made = module.param(name, boxed_init, shape, jnp.float32)
  return cast(jax.Array, made)  # param takes the box off


def by_row(leaf: Any, rows: int) -> jax.Array:
  """A leaf [...] as [1, ...], or as [R, ...] where it is a `RowMixture`."""
  return leaf.mixed(rows) if isinstance(leaf, RowMixture) else leaf[None]


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [..., D] @ kernel [D, F], of its dtype: [..., F], whose gradient is
  summed in the cheaper layout.

  JAX's own rule has the output's gradient on the left of the kernel's, and on a
  CPU XLA writes it out transposed. The input is narrower, and the same for all
  kernels that read it.
  """
  return x @ kernel


def _matmul_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _matmul_backward(saved, gradient):
  x, kernel = saved
  rows = tuple(range(x.ndim - 1))
  return (
    gradient @ kernel.T,
    jax.lax.dot_general(x, gradient, ((rows, rows), ((), ()))),
  )


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
  """A linear map; every one in a model goes through here."""

  features: int
  axes: tuple[str, str]
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    kernel: Any = param(self, "kernel", self.kernel_init, shape, self.axes)
    x = x.astype(self.dtype)
    if isinstance(kernel, RowMixture):
      y = kernel.matmul(x)
    else:
      base = kernel.kernel if isinstance(kernel, LowRank) else kernel
      # Cut over the data axis (fsdp) it is gathered here, a layer at a time.
      base = constrain(base.astype(self.dtype), *self.axes)
      if not isinstance(kernel, LowRank):
        y = matmul(x, base)
      elif kernel.is_cheaper_summed(x):
        factors = (kernel.left, kernel.right, kernel.diagonal)
        y = low_rank.matmul(x, base, *factors)
      else:
        y = matmul(x, base) + kernel.change(x)
    if self.use_bias:
      zeros = nn.initializers.zeros_init()
      bias = param(self, "bias", zeros, (self.features,), self.axes[1:])
      bias = by_row(bias, x.shape[0])
      bias = bias.reshape(-1, *(1,) * (y.ndim - 2), self.features)
      y = y + bias.astype(self.dtype)
    # The name is what remat "minimal" saves: unlike the shape of the product,
    # it is the same under vmap over parameter sets.
    return checkpoint_name(y, "linear")


class RMSNorm(nn.Module):
  """Root mean square norm in float32: no mean, no bias.

  Attributes:
    dtype: of the result.
    epsilon: added to the mean square.
    from_one: the parameter is the scale less 1, and is multiplied in float32.
    axis: logical name of the features.
  """

  dtype: jnp.dtype
  epsilon: float = NORM_EPSILON
  from_one: bool = False
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.constant(0.0 if self.from_one else 1.0)
    scale = param(self, "scale", init, (x.shape[-1],), (self.axis,))
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    # [1, 1, D], or [R, 1, D] where rows differ.
    scale = by_row(scale, x.shape[0]).reshape(
      -1, *(1,) * (x.ndim - 2), x.shape[-1]
    )
    if self.from_one:
      return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)
    return x.astype(self.dtype) * scale.astype(self.dtype)


class Embedding(nn.Module):
  """The token table, and the logit layer where it is tied."""

  config: Any  # vocab_size, emb_dim and compute_dtype are read
  stddev: float = 1.0

  def setup(self):
    self.embedding = param(
      self,
      "embedding",
      nn.initializers.normal(stddev=self.stddev),
      (self.config.vocab_size, self.config.emb_dim),
      ("vocab", "embed"),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    # jnp.take gives NaN for an id outside of the table; indexing would give
    # the last row, and nobody would notice.
    if isinstance(self.embedding, RowMixture):
      embedded = self.embedding.take(tokens)
    else:
      table = constrain(self.embedding, "vocab", "embed")
      embedded = jnp.take(table, tokens, axis=0)
    embedded = constrain(embedded, "batch", "length", "embed")
    return embedded.astype(self.config.compute_dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """[..., D] -> logits [..., V] float32, scaled as tied logits are."""
    scale = self.config.emb_dim**-0.5
    x = x.astype(jnp.float32)
    if isinstance(self.embedding, RowMixture):
      return self.embedding.matmul_transposed(x) * scale
    return x @ constrain(self.embedding, "vocab", "embed").T * scale


class SoftTokens(nn.Module):
  """Learned embeddings in place of words, before the prompt's."""

  config: Any  # soft_tokens and emb_dim are read

  @nn.compact
  def __call__(self, embedded: jax.Array) -> jax.Array:
    """embedded: [B, S, D] -> [B, P + S, D]."""
    table = param(
      self,
      "embedding",
      nn.initializers.normal(stddev=1.0),
      (self.config.soft_tokens, self.config.emb_dim),
      ("soft_tokens", "embed"),
    )
    table = by_row(table, embedded.shape[0]).astype(embedded.dtype)
    rows = jnp.broadcast_to(table, (embedded.shape[0], *table.shape[1:]))
    return jnp.concatenate([rows, embedded], axis=1)


class RelativeBias(nn.Module):
  """A float32 attention bias for each head and bucket of distances."""

  config: T5Config

  @nn.compact
  def __call__(self, distance: np.ndarray, *, bidirectional: bool) -> jax.Array:
    """distance: [Q, S] int -> [1 or B, H, Q, S] float32."""
    buckets = relative_position_buckets(
      distance,
      bidirectional=bidirectional,
      num_buckets=self.config.relative_attention_num_buckets,
      max_distance=self.config.relative_attention_max_distance,
    )
    table = param(
      self,
      "rel_embedding",
      nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
      (self.config.num_heads, self.config.relative_attention_num_buckets),
      ("heads", "relpos_buckets"),
    )
    if isinstance(table, RowMixture):
      biases = jnp.take(table.sets, buckets, axis=2)
      return RowMixture(biases, table.coefficients).mixed(
        table.coefficients.shape[0]
      )
    return jnp.take(table, buckets, axis=1)[None]


def attend(
  query: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  bias: jax.Array | None,
) -> jax.Array:
  """Means of the values, weighted by the softmax of query times key.

  Many queries are worked on a block at a time, see `in_blocks`.

  Args:
    query: [B, H, Q, K], the queries of N rows, row by row.
    keys: [B, H, S, K].
    values: [B, H, S, K].
    mask: [B or 1, 1, Q or 1, S] bool, True where a query may look.
    bias: [B or 1, H, Q, S] float32, or None.

  Returns:
    [B, H, Q, K], of the queries' dtype.
  """
  length = query.shape[2]
  if length < attention.MANY_QUERIES or mask.shape[2] > 1:
    return _attend(query, keys, values, mask, bias)

  # Their gradients are summed over the blocks, in this precision.
  wide_keys, wide_values = (x.astype(jnp.float32) for x in (keys, values))

  def block(query, bias):
    narrow_keys, narrow_values = (
      x.astype(query.dtype) for x in (wide_keys, wide_values)
    )
    return _attend(query, narrow_keys, narrow_values, mask, bias)

  return attention.in_blocks(
    block, (query, bias), (-2, None if bias is None else -2)
  )


def _attend(query, keys, values, mask, bias):
  logits = jnp.einsum(
    "bhqk,bhsk->bhqs", query, keys, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits = logits + bias
  logits = jnp.where(mask, logits, attention.MASKED)
  probs = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  return jnp.einsum("bhqs,bhsk->bhqk", probs, values)


class Attention(nn.Module):
  """Multi-head attention of N query rows to each row of keys and values."""

  config: T5Config

  def setup(self):
    cfg = self.config
    heads_width = cfg.num_heads * cfg.head_dim
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    # T5 does not divide the logits by sqrt(K); its initial queries are smaller.
    query_init = nn.initializers.variance_scaling(
      1.0 / cfg.head_dim, "fan_in", "normal"
    )
    linear = functools.partial(Linear, dtype=cfg.compute_dtype)
    axes = ("embed", "joined_kv")
    self.query = linear(heads_width, axes, kernel_init=query_init)
    self.key = linear(heads_width, axes, kernel_init=init)
    self.value = linear(heads_width, axes, kernel_init=init)
    self.out = linear(cfg.emb_dim, ("joined_kv", "embed"), kernel_init=init)
    self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-1,))

  def _split(self, x: jax.Array) -> jax.Array:
    """[..., H * K] -> [..., H, K]."""
    return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

  def keys_values(self, x: jax.Array) -> attention.KeysValues:
    """x: [B, S, D] -> keys and values [B, H, S, K]."""
    keys, values = self._split(self.key(x)), self._split(self.value(x))
    return attention.KeysValues.of(keys, values, "heads")

  def __call__(
    self,
    x: jax.Array,
    keys_values: attention.KeysValues,
    mask: jax.Array,
    bias: jax.Array | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """Attends from the rows of x to keys and values.

    Args:
      x: [B * N, Q, D], rows prompt-major; N is 1 where mask or bias tell
        queries apart.
      keys_values: [B, H, S, K] each.
      mask: [B or 1, Q or 1, S] bool, True where a query may look.
      bias: [1 or a divisor of B, H, Q, S] float32, or None.
      deterministic: no dropout.

    Returns:
      [B * N, Q, D].
    """
    keys, values = keys_values
    rows, length, _ = x.shape
    if not deterministic and self.dropout.rate > 0:
      # Dropout is the same at all queries of a row. So instead of their weights
      # it drops values, of the row's own.
      copies = rows // keys.shape[0]
      keys, values = (jnp.repeat(a, copies, axis=0) for a in keys_values)
      if mask.shape[0] > 1:
        mask = jnp.repeat(mask, copies, axis=0)
      values = self.dropout(values, deterministic=False)
    prompts, heads = keys.shape[:2]
    query = self._split(self.query(x))
    query = constrain(query, "batch", "length", "heads", "kv")
    # The N rows of a prompt are queries to the same keys: no copy of the keys.
    samples = rows // prompts
    query = query.reshape(prompts, samples * length, heads, -1)
    if bias is not None and bias.shape[0] > 1:  # rows differ: N share one
      bias = jnp.repeat(bias, prompts // bias.shape[0], axis=0)
    attended = attend(
      jnp.swapaxes(query, 1, 2),
      keys,
      values,
      mask[:, None],
      bias,
    )
    attended = checkpoint_name(jnp.swapaxes(attended, 1, 2), "attended")
    return self.out(attended.reshape(rows, length, -1))


class MLP(nn.Module):
  """Parallel input projections, multiplied after activation, and an output."""

  config: Any  # emb_dim, mlp_dim, mlp_activations and so on are read
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    cfg = self.config
    linear = functools.partial(
      Linear,
      dtype=cfg.compute_dtype,
      use_bias=self.use_bias,
      kernel_init=nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal"
      ),
    )
    single = len(cfg.mlp_activations) == 1
    factors = []
    for i, name in enumerate(cfg.mlp_activations):
      wi = linear(
        cfg.mlp_dim, ("embed", "mlp"), name="wi" if single else f"wi_{i}"
      )
      factors.append(ACTIVATIONS[name](wi(x)))
    hidden = functools.reduce(operator.mul, factors)
    hidden = dropout(cfg)(hidden, deterministic=deterministic)
    hidden = constrain(hidden, "batch", "length", "mlp")
    return linear(cfg.emb_dim, ("mlp", "embed"), name="wo")(hidden)


def copies_of(rows: int, prompts: int) -> int:
  """N, or a ValueError where R rows are not N for each of B prompts."""
  if rows % prompts:
    raise ValueError(
      f"{rows} rows must be a multiple of the {prompts} prompts: N rows for "
      "each prompt, prompt-major."
    )
  return rows // prompts


def layers_of(config: Any, layer: Callable, num_layers: int) -> Any:
  """A stack's `layers`: one module, which is scanned, or a list of them."""
  if config.scan_layers:
    return layer(config)
  return [layer(config) for _ in range(num_layers)]


def through_layers(
  stack: Any,
  body: Callable,
  carry: Any,
  per_layer: Any,
  *shared: Any,
  remat: bool = False,
) -> tuple[Any, Any]:
  """Threads a carry through the layers, a scanned stack or a list of them.

  Args:
    stack: module whose `layers` these are, `num_layers` of them. Its config's
      scan_layers says which of the two, its remat what to compute again.
    body: (layer, carry, this layer's input, *shared) -> (carry, output).
    carry: what the first layer gets.
    per_layer: inputs of the layers: a tree with a leading axis L when scanned,
      a sequence over layers otherwise; None for none.
    *shared: what every layer gets.
    remat: apply config.remat; decoding steps have no gradient.

  Returns:
    What the last layer carries, and the outputs, arranged as per_layer.
  """
  config, layers = stack.config, stack.layers
  if remat and config.remat != "none":
    policy = None
    if config.remat == "minimal":
      policy = jax.checkpoint_policies.save_only_these_names(
        "linear", "attended"
      )
    body = nn.remat(body, policy=policy, prevent_cse=not config.scan_layers)
  if config.scan_layers:
    scan = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0,) + (nn.broadcast,) * len(shared),
      length=stack.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(layers, carry, per_layer, *shared)
  outputs = []
  for i, layer in enumerate(layers):
    mine = None if per_layer is None else per_layer[i]
    carry, output = body(layer, carry, mine, *shared)
    outputs.append(output)
  return carry, tuple(outputs)


def step_layers(
  stack: Any, step: Callable, x: Any, cache: Any, per_layer: Any, *shared: Any
) -> tuple[Any, Any]:
  """`through_layers` for one position, which each layer writes to its cache.

  Args:
    stack: as for `through_layers`, as are per_layer and shared.
    step: (layer, x, cache, number, this layer's input, *shared) -> (x, cache):
      the whole cache and the layer's number in it, or its own part and None.
    x: what the first layer gets.
    cache: from `attention.empty_cache`.
    per_layer: inputs of the layers.
    *shared: what every layer gets.

  Returns:
    What the last layer gives, and the cache.
  """

  def stacked(layer, carry, inputs, *shared):
    return step(layer, *carry, *inputs, *shared), None

  def listed(layer, x, inputs, *shared):
    own, mine = inputs
    return step(layer, x, own, None, mine, *shared)

  if stack.config.scan_layers:
    numbered = (jnp.arange(stack.num_layers, dtype=jnp.int32), per_layer)
    return through_layers(stack, stacked, (x, cache), numbered, *shared)[0]
  with_cache = list(zip(cache, per_layer, strict=True))
  return through_layers(stack, listed, x, with_cache, *shared)

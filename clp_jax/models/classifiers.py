"""Models that label a text: a decoder or an encoder with a linear head."""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from clp_jax.models import trees
from clp_jax.models.causal import CausalConfig
from clp_jax.models.causal_lm import CausalLM
from clp_jax.models.encoder import EncoderConfig, Network, call
from clp_jax.models.model import Params


class Classifier(Protocol):
  """A static value; its methods are pure functions of what they are given.

  Attributes:
    reads_pairs: whether rows are of two texts, [B, 2, S]: tokens, and the
      segment of each; else they are [B, S]. Padding is -1 and comes last.
  """

  reads_pairs: ClassVar[bool]

  @property
  def config(self) -> CausalConfig | EncoderConfig:
    """Has vocab_size and max_length."""

  def abstract(self) -> Params:
    """The parameters' tree with a jax.ShapeDtypeStruct for each array."""

  def axes(self) -> Params:
    """That tree with a tuple of logical axis names for each array."""

  def logits(self, params: Params, rows: jax.Array) -> jax.Array:
    """Rows of int32 tokens -> [B, labels] float32."""

  def flops(self, rows: int, length: int) -> float:
    """FLOPs of the matrix products of `logits`: two a multiply-add."""


@dataclasses.dataclass(frozen=True)
class DecoderClassifier:
  """See `Classifier`: the state at the last token, times the head.

  Attributes:
    config: without a logit layer of its own; its padding is -1.
    num_labels: of the head.
  """

  config: CausalConfig
  num_labels: int

  reads_pairs: ClassVar[bool] = False

  def abstract(self) -> Params:
    shape = (self.config.emb_dim, self.num_labels)
    head = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return {"model": CausalLM(self.config).abstract(), "head": head}

  def axes(self) -> Params:
    head = {"kernel": ("embed", "head")}
    return {"model": CausalLM(self.config).axes(), "head": head}

  def logits(self, params: Params, rows: jax.Array) -> jax.Array:
    # What a response would start from is the state at the prompt's last token.
    start = jnp.zeros([rows.shape[0], 1], jnp.int32)
    _, states = CausalLM(self.config).score(params["model"], rows, start)
    return jnp.einsum(
      "bd,dn->bn",
      states[:, 0].astype(jnp.float32),
      params["head"]["kernel"],
      precision="highest",
    )

  def flops(self, rows: int, length: int) -> float:
    whole = CausalLM(self.config).flops(rows, rows, length, 1)
    # The compiler leaves out the logit layer, of which nothing is read.
    return whole - 2.0 * rows * self.config.emb_dim * self.config.vocab_size


@dataclasses.dataclass(frozen=True)
class EncoderClassifier:
  """See `Classifier`."""

  config: EncoderConfig

  reads_pairs: ClassVar[bool] = True

  def abstract(self) -> Params:
    return trees.abstract(call, self.config)

  def axes(self) -> Params:
    return trees.axes(call, self.config)

  def logits(self, params: Params, rows: jax.Array) -> jax.Array:
    return jnp.asarray(Network(self.config).apply({"params": params}, rows))

  def flops(self, rows: int, length: int) -> float:
    cfg = self.config
    matrices = cfg.emb_dim * (4 * cfg.emb_dim + 2 * cfg.mlp_dim)
    # Two products with keys and values, two more with distances.
    attention = 2 * length + 4 * cfg.buckets
    layer = matrices + attention * cfg.emb_dim
    return 2.0 * rows * length * cfg.num_layers * layer

"""T5 as a `Model`: prompts are encoded, responses decoded."""

import dataclasses
from typing import Any

import jax

from clp_jax.models import t5
from clp_jax.models.model import Cache, Context, Params
from clp_jax.models.t5 import T5, T5Config


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
  """See `model.Model`, whose methods these are."""

  config: T5Config

  def init(self, key: jax.Array) -> Params:
    return t5.init_params(self.config, key)

  def abstract(self) -> Params:
    return t5.abstract_params(self.config)

  def axes(self) -> Params:
    return t5.logical_axes(self.config)

  def is_cast(self, path: tuple[str, ...]) -> bool:
    # Norms, relative biases, the embedding and the logit layer keep their
    # dtype: they enter computations in float32, or a step reads few rows.
    return path[-1] == "kernel" and "logits_dense" not in path

  def read(self, params: Params, prompts: jax.Array) -> Context:
    mask = prompts != self.config.pad_id
    encoded = self._apply(params, prompts, mask, method="encode")
    cross = self._apply(params, encoded, method="cross_keys_values")
    return Context(cross, mask)

  def empty_cache(self, rows: int, length: int) -> Cache:
    return t5.init_cache(self.config, rows, length)

  def step(
    self,
    params: Params,
    context: Context,
    cache: Cache,
    last: jax.Array,
    position: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    inputs = (last, cache, position, *context)
    return self._apply(params, *inputs, method="decode_step")

  def score(
    self,
    params: Params,
    prompts: jax.Array,
    targets: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    logits, kept = self._apply(
      params,
      prompts,
      t5.shift_right(targets),
      deterministic=dropout_key is None,
      rngs=None if dropout_key is None else {"dropout": dropout_key},
      mutable=["intermediates"],
    )
    (states,) = kept["intermediates"]["decoder_states"]
    return logits, states

  def flops(self, prompts: int, rows: int, source: int, target: int) -> float:
    cfg = self.config
    width = cfg.num_heads * cfg.head_dim
    projection = cfg.emb_dim * width  # query, key, value or output
    mlp = (len(cfg.mlp_activations) + 1) * cfg.emb_dim * cfg.mlp_dim
    encoder = 4 * projection + mlp + 2 * source * width
    # All T positions of self-attention are scored, with a cache as without.
    decoder = 6 * projection + mlp + 2 * (target + source) * width
    read, written = prompts * source, rows * target
    return 2.0 * (
      read * cfg.num_encoder_layers * encoder
      + read * cfg.num_decoder_layers * 2 * projection
      + written
      * (cfg.num_decoder_layers * decoder + cfg.emb_dim * cfg.vocab_size)
    )

  def _apply(self, params: Params, *args: Any, **options: Any) -> Any:
    return T5(self.config).apply({"params": params}, *args, **options)

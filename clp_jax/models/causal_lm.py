"""A decoder-only network as a `Model`: prompts are read, then continued."""

import dataclasses
from typing import Any

import jax

from clp_jax.models import trees
from clp_jax.models.attention import empty_cache
from clp_jax.models.causal import CausalConfig, Network, call
from clp_jax.models.model import Cache, Context, Params


@dataclasses.dataclass(frozen=True)
class CausalLM:
  """See `model.Model`, whose methods these are."""

  config: CausalConfig

  def init(self, key: jax.Array) -> Params:
    return trees.init(call, self.config, key)

  def abstract(self) -> Params:
    return trees.abstract(call, self.config)

  def axes(self) -> Params:
    return trees.axes(call, self.config)

  def is_cast(self, path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "bias", "embedding")

  def read(self, params: Params, prompts: jax.Array) -> Context:
    return self._apply(params, prompts, method="read")

  def empty_cache(self, rows: int, length: int) -> Cache:
    cfg = self.config
    shape = (rows, cfg.num_kv_heads, length, cfg.head_dim)
    return empty_cache(cfg, cfg.num_layers, shape, "kv_heads")

  def step(
    self,
    params: Params,
    context: Context,
    cache: Cache,
    last: jax.Array,
    position: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    return self._apply(params, context, cache, last, position, method="step")

  def score(
    self,
    params: Params,
    prompts: jax.Array,
    targets: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    reading: dict[str, Any] = {}
    responding: dict[str, Any] = {}
    if dropout_key is not None:
      reading, responding = (
        {"deterministic": False, "rngs": {"dropout": key}}
        for key in jax.random.split(dropout_key)
      )
    context = self._apply(params, prompts, method="read", **reading)
    return self._apply(params, context, targets, method="respond", **responding)

  def flops(self, prompts: int, rows: int, source: int, target: int) -> float:
    cfg = self.config
    width, kv_width = (
      n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads)
    )
    matrices = (
      2 * cfg.emb_dim * (width + kv_width) + 3 * cfg.emb_dim * cfg.mlp_dim
    )
    # All positions are scored, those that a mask hides too.
    reading = cfg.num_layers * (matrices + 2 * source * width)
    writing = cfg.num_layers * (matrices + 2 * (source + target) * width)
    writing += cfg.emb_dim * cfg.vocab_size
    return 2.0 * (prompts * source * reading + rows * target * writing)

  def _apply(self, params: Params, *args: Any, **options: Any) -> Any:
    return Network(self.config).apply({"params": params}, *args, **options)

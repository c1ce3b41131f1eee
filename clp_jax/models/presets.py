"""Published sizes of T5 v1.1, which the LM-adapted and Flan models share, and
of decoder-only models; and small models of our own.

A preset is a config; change it with `dataclasses.replace`. Dropout is off in
all of them, as in pretraining: turn it on for supervised finetuning.
"""

from typing import Any

from clp_jax.models.causal import CausalConfig, Rope
from clp_jax.models.families import Config
from clp_jax.models.t5 import T5Config


def _v1_1(
  emb_dim: int, num_heads: int, layers: int, mlp_dim: int, **changes: Any
) -> T5Config:
  return T5Config(
    emb_dim=emb_dim,
    num_heads=num_heads,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    mlp_dim=mlp_dim,
    **changes,
  )


def _own(emb_dim: int, num_heads: int) -> T5Config:
  sizes = (emb_dim, num_heads, 2, 2 * emb_dim)
  return _v1_1(*sizes, vocab_size=256, head_dim=16)


def _qwen3(
  emb_dim: int, layers: int, heads: int, mlp_dim: int, tied: bool
) -> CausalConfig:
  return CausalConfig(
    architecture="qwen3",
    vocab_size=151936,
    emb_dim=emb_dim,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=mlp_dim,
    norm_epsilon=1e-6,
    qk_norm=True,
    ropes=(Rope(1_000_000.0),),
    logits_via_embedding=tied,
    max_length=40960,
  )


def _gemma3(
  emb_dim: int,
  layers: int,
  heads: tuple[int, int],
  mlp_dim: int,
  *,
  window: int = 1024,
  scaling: float = 8.0,
) -> CausalConfig:
  rope = Rope(1_000_000.0, "linear", scaling)
  kinds = [(i + 1) % 6 > 0 for i in range(layers)]
  return CausalConfig(
    architecture="gemma3_text",
    vocab_size=262208 if scaling > 1 else 262144,
    emb_dim=emb_dim,
    num_layers=layers,
    num_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=256,
    mlp_dim=mlp_dim,
    activation="gelu",
    norm_epsilon=1e-6,
    norm_from_one=True,
    post_norms=True,
    qk_norm=True,
    query_scale=256**-0.5,
    ropes=(rope if scaling > 1 else Rope(1_000_000.0), Rope()),
    layer_ropes=tuple(int(local) for local in kinds),
    windows=tuple(window if local else 0 for local in kinds),
    scale_embeddings=True,
    max_length=131072 if scaling > 1 else 32768,
    pad_id=0,
  )


# Train on a laptop in minutes; the caller sets vocab_size to its own.
OWN_VOCABULARY = ("micro", "tiny", "mini", "tiny-decoder")
PRESETS: dict[str, Config] = {
  "micro": _own(32, 2),
  "tiny": _own(64, 4),
  "mini": _own(128, 8),
  "small": _v1_1(512, 6, 8, 1024),
  "base": _v1_1(768, 12, 12, 2048),
  "large": _v1_1(1024, 16, 24, 2816),
  "xl": _v1_1(2048, 32, 24, 5120),
  "xxl": _v1_1(4096, 64, 24, 10240),
  # About as many parameters as tiny.
  "tiny-decoder": CausalConfig(
    architecture="qwen3",
    vocab_size=256,
    emb_dim=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    norm_epsilon=1e-6,
    qk_norm=True,
    logits_via_embedding=False,
    max_length=1024,
  ),
  "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
  "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
  "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
  "gemma3-1b": _gemma3(1152, 26, (4, 1), 6912, window=512, scaling=1.0),
  "gemma3-4b": _gemma3(2560, 34, (8, 4), 10240),
  "gemma3-12b": _gemma3(3840, 48, (16, 8), 15360),
}

"""Published sizes of T5 v1.1, which the LM-adapted and Flan models share.

A preset is a `T5Config`; change it with `dataclasses.replace`. Dropout is off
in all of them, as in pretraining: turn it on for supervised finetuning.
"""

from clp_jax.models.t5 import T5Config


def _v1_1(emb_dim: int, num_heads: int, layers: int, mlp_dim: int) -> T5Config:
  return T5Config(
    vocab_size=32128,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=64,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    mlp_dim=mlp_dim,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
  )


def _own(emb_dim: int, num_heads: int) -> T5Config:
  return T5Config(
    vocab_size=256,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    mlp_dim=2 * emb_dim,
  )


# Train on a laptop in minutes; the caller sets vocab_size to its own.
OWN_VOCABULARY = ("micro", "tiny", "mini")
PRESETS: dict[str, T5Config] = {
  "micro": _own(32, 2),
  "tiny": _own(64, 4),
  "mini": _own(128, 8),
  "small": _v1_1(512, 6, 8, 1024),
  "base": _v1_1(768, 12, 12, 2048),
  "large": _v1_1(1024, 16, 24, 2816),
  "xl": _v1_1(2048, 32, 24, 5120),
  "xxl": _v1_1(4096, 64, 24, 10240),
}

"""FLOPs of a T5's matrix products by formula: what a run can't do without.

Two FLOPs a multiply-add. Padding counts, dropout and softmax do not.
"""

from clp_jax.models.t5 import T5Config


def _mlp(config: T5Config) -> int:
  return (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim


def _projection(config: T5Config) -> int:
  """One of the query, key, value and output maps of an attention."""
  return config.emb_dim * config.num_heads * config.head_dim


def encode(config: T5Config, prompts: int, length: int) -> float:
  """FLOPs of encoding `prompts` inputs of `length` tokens."""
  tokens = prompts * length
  matrices = 4 * _projection(config) + _mlp(config)
  scores = 2 * length * config.num_heads * config.head_dim
  return 2.0 * tokens * config.num_encoder_layers * (matrices + scores)


def cross_keys_values(config: T5Config, prompts: int, length: int) -> float:
  """FLOPs of the cross-attention's keys and values of every layer."""
  tokens = prompts * length
  return 4.0 * tokens * config.num_decoder_layers * _projection(config)


def decode(
  config: T5Config, rows: int, length: int, source_length: int
) -> float:
  """FLOPs of `rows` outputs of `length` tokens, teacher-forced or with a cache.

  Both score all `length` positions of the self-attention.
  """
  tokens = rows * length
  matrices = 6 * _projection(config) + _mlp(config)
  width = config.num_heads * config.head_dim
  scores = 2 * (length + source_length) * width
  layers = config.num_decoder_layers * (matrices + scores)
  return 2.0 * tokens * (layers + config.emb_dim * config.vocab_size)


def forward(
  config: T5Config, prompts: int, rows: int, source: int, target: int
) -> float:
  """FLOPs of teacher-forced logits of `rows` outputs for `prompts` inputs."""
  return (
    encode(config, prompts, source)
    + cross_keys_values(config, prompts, source)
    + decode(config, rows, target, source)
  )

"""Writes tests/fixtures/causal: decoder-only folders with transformers' logits.

  python tests/parity/make_causal.py

Random weights, a value that is no default in every field that changes a logit.
Run it in an environment of `make parity`, with transformers 4.57.
"""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "causal"
COMMON = {
  "vocab_size": 67,
  "hidden_size": 20,
  "intermediate_size": 28,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "max_position_embeddings": 256,
  "rms_norm_eps": 3e-5,
  "initializer_range": 0.3,
  "attention_bias": True,
  "eos_token_id": [3, 5],
}
GEMMA = {
  "query_pre_attn_scalar": 20,
  "sliding_window": 6,
  "final_logit_softcapping": 9.0,
  "attn_logit_softcapping": 7.0,
  "rope_theta": 333.0,
  "tie_word_embeddings": True,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.5,
  "high_freq_factor": 3.0,
  "original_max_position_embeddings": 32,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
CONFIGS = {
  "llama": transformers.LlamaConfig(
    **COMMON,
    rope_theta=5000.0,
    mlp_bias=True,
    hidden_act="gelu",
    tie_word_embeddings=True,
    rope_scaling=LLAMA3,
    pad_token_id=0,
  ),
  "qwen2": transformers.Qwen2Config(
    **COMMON | WINDOW, max_window_layers=1, rope_theta=777.0
  ),
  "qwen3": transformers.Qwen3Config(
    **COMMON | WINDOW,
    max_window_layers=2,
    rope_theta=777.0,
    hidden_act="relu",
    tie_word_embeddings=True,
  ),
  "gemma2": transformers.Gemma2Config(
    **COMMON | GEMMA, hidden_activation="gelu"
  ),
  "gemma3_text": transformers.Gemma3TextConfig(
    **COMMON | GEMMA | {"num_hidden_layers": 7},
    rope_local_base_freq=55.0,
    rope_scaling={"rope_type": "linear", "factor": 4.0},
  ),
}


def make(
  config: transformers.PretrainedConfig,
  auto: Any = transformers.AutoModelForCausalLM,
) -> transformers.PreTrainedModel:
  """A random model, its norms and biases away from where they start."""
  torch.manual_seed(0)
  model = auto.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return model


def read(
  folder: Any, auto: Any = transformers.AutoModelForCausalLM
) -> transformers.PreTrainedModel:
  """A folder's model, which must use every tensor and lack none, in float32."""
  model, info = auto.from_pretrained(
    folder,
    torch_dtype=torch.float32,
    attn_implementation="eager",
    output_loading_info=True,
  )
  assert not any(info.values()), info
  return model.eval()


def logits_of(model: transformers.PreTrainedModel, ids) -> np.ndarray:
  """[n] tokens -> [n, V] float32."""
  with torch.no_grad():
    return model(torch.tensor(ids)[None]).logits[0].numpy()


def main() -> None:
  """Writes the fixtures."""
  ids = np.random.default_rng(0).integers(6, COMMON["vocab_size"], 20)
  for name, config in CONFIGS.items():
    model = make(config)
    folder = FIXTURES / name
    model.save_pretrained(folder, max_shard_size="40KB")
    np.savez_compressed(
      folder / "expected.npz",
      ids=ids.astype(np.int32),
      logits=logits_of(model, ids),
    )


if __name__ == "__main__":
  main()

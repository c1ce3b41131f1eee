"""Decoder-only models whose configs are drawn at random, both ways.

decoders_test.py has the cases that were thought of; these are for the others:
of each family a few, with fields left out, layouts of transformers 4 and 5, all
dtypes, one file or many, safetensors or PyTorch's.
"""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax import interop

pytestmark = pytest.mark.parity
torch = pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
transformers = pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)

from parity import make_causal  # noqa: E402

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")
ACTIVATIONS = ("gelu", "silu", "relu", "gelu_new", "gelu_pytorch_tanh")
CLASSES = {
  "llama": transformers.LlamaConfig,
  "qwen2": transformers.Qwen2Config,
  "qwen3": transformers.Qwen3Config,
  "gemma2": transformers.Gemma2Config,
  "gemma3_text": transformers.Gemma3TextConfig,
}
IMAGES = {
  "vision_config": {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
  },
  "mm_tokens_per_image": 4,
  "boi_token_index": 55,
  "eoi_token_index": 56,
  "image_token_index": 57,
  "initializer_range": 0.25,
}
WIDTH = 64  # of padded prompts


def shared_fields(draw):
  """What every family has."""
  heads = draw.choice([1, 2, 3, 4, 6])
  llama3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": draw.choice([2.0, 4]),
    "original_max_position_embeddings": draw.choice([16, 64]),
  }
  linear = {"rope_type": "linear", "factor": draw.choice([2, 3.5])}
  return {
    "vocab_size": draw.choice([61, 97, 128, 211]),
    "hidden_size": heads * draw.choice([6, 8, 10]),
    "intermediate_size": draw.choice([17, 33]),
    "num_hidden_layers": draw.randint(1, 7),
    "num_attention_heads": heads,
    "num_key_value_heads": draw.choice(
      [j for j in (1, 2, 3, 4, 6) if heads % j == 0]
    ),
    "max_position_embeddings": draw.choice([40, 512]),
    "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
    "initializer_range": 0.25,
    "tie_word_embeddings": draw.choice([True, False]),
    "rope_theta": draw.choice([100.0, 10_000, 500_000.0]),
    "rope_scaling": draw.choice(
      [None, llama3, linear, {"rope_type": "default"}]
    ),
    "eos_token_id": draw.choice([3, [3, 5], None]),
    "pad_token_id": draw.choice([None, 0, 7]),
    "attention_dropout": 0.2,
  }


def make_config(kind, draw):
  """Of any family, a config of transformers."""
  fields = shared_fields(draw)
  layers = fields["num_hidden_layers"]
  types = draw.choice(
    [None, [draw.choice([SLIDING, FULL]) for _ in range(layers)]]
  )
  width = draw.choice([None, 4, 12, 16])
  if width is not None:
    fields["head_dim"] = width
  fields["sliding_window"] = draw.choice([1, 3, 8, 50])
  if kind != "qwen2":
    fields["attention_bias"] = draw.choice([True, False])
  if kind.startswith("gemma"):
    fields |= {
      "head_dim": width or 8,
      "hidden_activation": draw.choice(ACTIVATIONS),
      "query_pre_attn_scalar": draw.choice([3, 16, 100.5]),
      "final_logit_softcapping": draw.choice([None, 3.0, 30.0]),
      "attn_logit_softcapping": draw.choice([None, 2.0, 50.0]),
      "layer_types": types,
    }
    if kind != "gemma2":
      fields["rope_local_base_freq"] = draw.choice([20.0, 10_000.0])
      if types is None:
        fields["sliding_window_pattern"] = draw.choice([1, 2, 3, 6])
  else:
    fields["hidden_act"] = draw.choice(ACTIVATIONS)
  if kind == "llama":
    del fields["sliding_window"]
    fields |= {"mlp_bias": draw.choice([True, False]), "pretraining_tp": 2}
  if kind.startswith("qwen"):
    fields["use_sliding_window"] = draw.random() < 0.7
    fields["max_window_layers"] = draw.randint(0, layers)
    if fields["use_sliding_window"]:
      fields["layer_types"] = types
    if kind == "qwen3":
      fields["head_dim"] = width or 8
  if kind == "gemma3":
    if fields["pad_token_id"] is None:  # which its class can't be without
      fields["pad_token_id"] = 0
    return transformers.Gemma3Config(text_config=fields, **IMAGES)
  return CLASSES[kind](**fields)


def as_written_by_5(values):
  """A config.json with its rotary embedding where transformers 5 has it."""
  text = values.get("text_config", values)
  is_gemma3 = text["model_type"] == "gemma3_text"
  # What transformers 4 leaves out is the default of its class.
  theta = text.pop("rope_theta", 1_000_000.0 if is_gemma3 else 10_000.0)
  rope = {"rope_type": "default", "rope_theta": theta}
  rope |= text.pop("rope_scaling", None) or {}
  if is_gemma3:
    local = text.pop("rope_local_base_freq", 10_000.0)
    rope = {
      FULL: rope,
      SLIDING: {"rope_type": "default", "rope_theta": local},
    }
  text["rope_parameters"] = rope


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_any_config_means_the_same_to_both(kind, seed, tmp_path):
  draw = random.Random(f"{kind} {seed}")
  model = make_causal.make(make_config(kind, draw))
  dtype = draw.choice(["float32", "bfloat16", "float16"])
  model.to(getattr(torch, dtype)).save_pretrained(
    tmp_path / "theirs",
    max_shard_size=draw.choice(["10KB", "1GB"]),
    safe_serialization=seed > 0,
  )
  theirs = make_causal.read(tmp_path / "theirs")
  if draw.random() < 0.5:
    file = tmp_path / "theirs" / "config.json"
    values = json.loads(file.read_text())
    as_written_by_5(values)
    file.write_text(json.dumps(values))
  scan_layers = draw.random() < 0.7
  ours, params = interop.load_model(
    tmp_path / "theirs", scan_layers=scan_layers
  )
  config = ours.config
  rng = np.random.default_rng(seed)
  ids = [i for i in range(config.vocab_size) if i != config.pad_id]
  prompts = [rng.choice(ids, n) for n in (draw.randint(20, 60), 3)]
  responses = rng.choice(ids, [2, draw.choice([1, 9, 30])])
  tokens = np.full([2, WIDTH], config.pad_id, np.int32)
  from_left = draw.random() < 0.5
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
    if from_left:
      row[:] = np.roll(row, WIDTH - len(prompt))
  logits, _ = jax.jit(ours.score)(
    params, jnp.asarray(tokens), jnp.asarray(responses, jnp.int32)
  )
  texts = [
    np.concatenate(pair) for pair in zip(prompts, responses, strict=True)
  ]
  expected = [make_causal.logits_of(theirs, text) for text in texts]
  for found, prompt, whole in zip(logits, prompts, expected, strict=True):
    np.testing.assert_allclose(found, whole[len(prompt) - 1 : -1], atol=1e-4)
  size = draw.choice([5000, 10**9])
  interop.save_model(
    *(tmp_path / "ours", ours, params, "hf"), max_shard_bytes=size
  )
  again = make_causal.read(tmp_path / "ours")
  for text, whole in zip(texts, expected, strict=True):
    np.testing.assert_allclose(
      make_causal.logits_of(again, text), whole, atol=1e-4
    )

"""A small decoder-only model, with our own tokenizer and chat template."""

import functools
import json

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from clp_jax import interop
from clp_jax.data import newsroom
from clp_jax.data.hf_tokenizer import HFTokenizer
from clp_jax.models import families
from clp_jax.models.causal import CausalConfig, Rope

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
  "{%- for message in messages -%}"
  "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
  "{%- endfor -%}"
  "{%- if add_generation_prompt %}\n<|im_start|>assistant\n{%- endif -%}"
)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")


@functools.cache
def tokenizer_files() -> dict[str, bytes]:
  """Byte-level BPE, trained on articles of the built-in world."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  texts = [
    text
    for item in newsroom.make_items("train", 0, 200)
    for text in (item.document, item.reference)
  ]
  trainer = trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return {
    "tokenizer.json": tokenizer.to_str().encode(),
    "tokenizer_config.json": json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
      }
    ).encode(),
    "chat_template.jinja": CHAT_TEMPLATE.encode(),
  }


def make_tokenizer(**changes: bytes) -> HFTokenizer:
  """That of `save`; a file may be another, or left out by None."""
  files = {**tokenizer_files(), **changes}
  kept = {name: x for name, x in files.items() if x is not None}
  return HFTokenizer("here", kept, (2,), -1)


def make_config(architecture: str = "qwen3", **changes) -> CausalConfig:
  """A small model of a family, with rows that no token uses."""
  gemma = architecture.startswith("gemma")
  layers = 3
  fields = {
    "architecture": architecture,
    "vocab_size": 512,
    "emb_dim": 32,
    "num_layers": layers,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "mlp_dim": 48,
    "activation": "gelu" if gemma else "silu",
    "norm_epsilon": 1e-5,
    "norm_from_one": gemma,
    "post_norms": gemma,
    "scale_embeddings": gemma,
    "qk_norm": architecture in ("qwen3", "gemma3_text"),
    "qkv_bias": architecture == "qwen2",
    "ropes": (Rope(5000.0),),
    "logits_via_embedding": gemma,
    "max_length": 512,
    "eos_ids": (2,),
  }
  if gemma:
    fields |= {"query_scale": 12**-0.5, "windows": (6, 6, 0)}
  if architecture == "gemma2":
    fields |= {"attention_cap": 7.0, "logit_cap": 9.0}
  if architecture == "gemma3_text":
    fields |= {
      "ropes": (Rope(9000.0, "linear", 4.0), Rope(50.0)),
      "layer_ropes": (1, 1, 0),
    }
  if architecture == "llama":
    scaling = Rope(5000.0, "llama3", 8.0, 1.5, 3.0, 32)
    fields |= {"ropes": (scaling,), "logits_via_embedding": True}
  return CausalConfig(**(fields | changes))


def random_params(config: CausalConfig, seed: int = 0):
  """NumPy parameters, norms and biases among them away from their start."""
  params = families.build(config).init(jax.random.key(seed))
  rng = np.random.default_rng(seed)

  def moved(leaf):
    x = np.asarray(leaf)
    return x + 0.1 * rng.normal(size=x.shape).astype(x.dtype)

  return jax.tree.map(moved, params)


def save(path, architecture: str = "qwen3", **changes):
  """Writes a Hugging Face folder; returns (config, params)."""
  config = make_config(architecture, **changes)
  params = random_params(config)
  interop.save_model(
    path, families.build(config), params, "hf", tokenizer=make_tokenizer()
  )
  return config, params

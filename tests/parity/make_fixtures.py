"""Writes what Hugging Face's T5 computes, for tests that run without torch.

    python -m tests.parity.make_fixtures

from the root of the repository, with the `parity` extra installed. It makes
small random T5s, v1.0 and v1.1, and stores in tests/fixtures/*.npz their
weights under t5x's names, ragged batches with prompts and targets longer than
the largest relative distance, the logits, and the tokens of greedy decoding.
"""

import pathlib
import re
import sys
from typing import Any

import numpy as np

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
# Seeds for which greedy decoding ends in some rows and goes on in others.
SEEDS = {"v1_0": 110, "v1_1": 111}

# H * K differs from D, and the encoder's depth from the decoder's, so that no
# two axes can be taken for each other.
SIZES = {
  "vocab_size": 100,
  "emb_dim": 20,
  "num_heads": 3,
  "head_dim": 8,
  "num_encoder_layers": 2,
  "num_decoder_layers": 3,
  "mlp_dim": 28,
}
SOURCE_LENGTHS = (150, 97, 30, 3)  # more than 128 tokens, and ragged
TARGET_LENGTH = 140
POSITIONS = tuple(range(0, TARGET_LENGTH, 9)) + (TARGET_LENGTH - 1,)
GREEDY_LENGTH = 24
FORBIDDEN = (0, 97, 98, 99)  # padding, and rows that stand for unused ones


def config_fields(version: str) -> dict[str, Any]:
  """The fields of a T5Config."""
  v1_0 = version == "v1_0"
  return SIZES | {
    "mlp_activations": ("relu",) if v1_0 else ("gelu", "linear"),
    "logits_via_embedding": v1_0,
    "eos_ids": (1,),
  }


def transformers_model(version: str, seed: int):
  """A T5ForConditionalGeneration with random float32 weights.

  The scales are larger than at initialisation, and those of the norms differ
  from 1, so that a part that is left out or misplaced shows in the logits.
  """
  import torch
  import transformers

  v1_0 = version == "v1_0"
  config = transformers.T5Config(
    vocab_size=SIZES["vocab_size"],
    d_model=SIZES["emb_dim"],
    d_kv=SIZES["head_dim"],
    d_ff=SIZES["mlp_dim"],
    num_layers=SIZES["num_encoder_layers"],
    num_decoder_layers=SIZES["num_decoder_layers"],
    num_heads=SIZES["num_heads"],
    feed_forward_proj="relu" if v1_0 else "gated-gelu",
    tie_word_embeddings=v1_0,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
  )
  model = transformers.T5ForConditionalGeneration(config).eval()
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, param in model.named_parameters():
      value = rng.standard_normal(param.shape)
      if "layer_norm" in name:
        value = 1 + 0.3 * value
      elif "relative_attention_bias" in name or "shared" in name:
        pass
      else:
        value = value * param.shape[-1] ** -0.5
      # Greedy decoding should say more than one word, and should end in some
      # rows: logits spread wide, a tied table that does not repeat its input,
      # and a token 1 that is likelier than the others.
      if v1_0 and name == "shared.weight":
        value *= 0.3
        value[1] *= 1.5
      elif v1_0 and name == "decoder.final_layer_norm.weight":
        value *= 8
      elif name == "lm_head.weight":
        value *= 3
        value[1] *= 1.5
      param.copy_(torch.from_numpy(value.astype(np.float32)))
  return model


def t5x_params(model) -> dict[str, np.ndarray]:
  """The weights of a T5ForConditionalGeneration as {t5x path: array}."""
  params = {}
  for name, value in model.state_dict().items():
    array = value.numpy()
    if name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
      continue  # other names of shared.weight
    if name == "lm_head.weight" and model.config.tie_word_embeddings:
      continue
    # torch has a linear map as [out, in]; its embedding of buckets is
    # [buckets, heads], where t5x has [heads, buckets].
    if array.ndim == 2 and name != "shared.weight":
      array = array.T
    params[t5x_name(name)] = np.ascontiguousarray(array)
  return params


def t5x_name(name: str) -> str:
  """Hugging Face's name of a parameter -> t5x's path."""
  if name == "shared.weight":
    return "token_embedder/embedding"
  if name == "lm_head.weight":
    return "decoder/logits_dense/kernel"
  stack, rest = name.split(".", 1)
  if rest == "final_layer_norm.weight":
    return f"{stack}/{stack}_norm/scale"
  if rest.endswith("relative_attention_bias.weight"):
    return f"{stack}/relpos_bias/rel_embedding"
  match = re.fullmatch(
    r"block\.(\d+)\.layer\.(\d)\.(\w+)\.?(\w*)\.weight", rest
  )
  assert match, name
  layer, place, module, leaf = match.groups()
  mlp = (stack, place) in (("encoder", "1"), ("decoder", "2"))
  if mlp:
    part, norm = "mlp", "pre_mlp_layer_norm"
  elif stack == "encoder":
    part, norm = "attention", "pre_attention_layer_norm"
  elif place == "0":
    part, norm = "self_attention", "pre_self_attention_layer_norm"
  else:
    part, norm = "encoder_decoder_attention", "pre_cross_attention_layer_norm"
  layer = f"{stack}/layers_{layer}"
  if module == "layer_norm":
    return f"{layer}/{norm}/scale"
  leaf = {"q": "query", "k": "key", "v": "value", "o": "out"}.get(leaf, leaf)
  return f"{layer}/{part}/{leaf}/kernel"


def make_case(version: str, seed: int) -> dict[str, np.ndarray]:
  """Random weights and inputs, and what transformers computes with them.

  Args:
    version: "v1_0" (tied, relu) or "v1_1" (own logit layer, gated gelu).
    seed: of weights and inputs.

  Returns:
    "params/<t5x path>" arrays; "encoder_input_tokens" [B, S],
    "decoder_input_tokens" [B, T]; "logits" [B, len(positions), V] at
    "positions" of T; "allowed" [V] bool; "greedy" [B, GREEDY_LENGTH].
  """
  import torch

  rng = np.random.default_rng(seed + 1)
  shape = len(SOURCE_LENGTHS), max(SOURCE_LENGTHS)
  source = rng.integers(2, SIZES["vocab_size"], shape)
  source *= np.arange(shape[1]) < np.array(SOURCE_LENGTHS)[:, None]
  target = rng.integers(1, SIZES["vocab_size"], (shape[0], TARGET_LENGTH))
  target[:, 0] = 0
  model = transformers_model(version, seed)
  inputs = {
    "input_ids": torch.from_numpy(source),
    "attention_mask": torch.from_numpy((source != 0).astype(np.int64)),
  }
  with torch.no_grad():
    logits = model(**inputs, decoder_input_ids=torch.from_numpy(target)).logits
    greedy = model.generate(
      **inputs,
      max_new_tokens=GREEDY_LENGTH,
      do_sample=False,
      suppress_tokens=list(FORBIDDEN),
      # transformers 4.57 makes a cache of as many layers as the encoder has.
      use_cache=False,
    )[:, 1:]
  greedy = greedy.numpy()
  padding = GREEDY_LENGTH - greedy.shape[1]
  allowed = np.ones(SIZES["vocab_size"], bool)
  allowed[list(FORBIDDEN)] = False
  return {
    "encoder_input_tokens": source.astype(np.int32),
    "decoder_input_tokens": target.astype(np.int32),
    "positions": np.array(POSITIONS, np.int32),
    "logits": logits.numpy()[:, list(POSITIONS)],
    "allowed": allowed,
    "greedy": np.pad(greedy, ((0, 0), (0, padding))).astype(np.int32),
  } | {f"params/{name}": p for name, p in t5x_params(model).items()}


def main() -> None:
  FIXTURES.mkdir(exist_ok=True)
  for version, seed in SEEDS.items():
    case = make_case(version, seed)
    path = FIXTURES / f"transformers_{version}.npz"
    np.savez_compressed(path, **case)
    lengths = (case["greedy"] != 0).sum(-1)
    sys.stdout.write(f"{path}: greedy rows of {lengths} tokens\n")


if __name__ == "__main__":
  main()

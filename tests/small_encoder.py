"""Tokenizers of small encoders, as their folders hold them."""

import functools
import json
import re

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from clp_jax.data import newsroom

# Names of the tokens that frame two texts, padding, and the unknown one.
BERT = ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
ROBERTA = ("<s>", "</s>", "<pad>", "<unk>")
PAIR = "{0}:0 $A:0 {1}:0 $B:1 {1}:1"
ROBERTA_PAIR = "{0}:0 $A:0 {1}:0 {1}:0 $B:0 {1}:0"
SIZE = 190  # ids at the most
CONFIG = "tokenizer_config.json"


@functools.cache
def texts(count: int = 12) -> tuple[list[str], list[str]]:
  """Documents and responses of very different lengths; one is empty."""
  items = newsroom.make_items("test", 0, count)
  documents = [
    " ".join(item.document for item in items[: 1 + i % 3])[: 30 + 97 * i]
    for i in range(count)
  ]
  responses = [item.reference[: 8 * i] for i, item in enumerate(items)]
  return documents, responses


@functools.cache
def tokenizer_files(kind: str = "bert") -> dict[str, bytes]:
  """Word pieces of the built-in world; "roberta" pads with token 1.

  Args:
    kind: a model_type.
  """
  roberta = "roberta" in kind
  cls, sep, pad, unk = ROBERTA if roberta else BERT
  special = [cls, pad, sep, unk] if roberta else [pad, unk, cls, sep]
  # Not trained: the library's trainers number pieces anew in every process.
  items = newsroom.make_items("train", 0, 100)
  text = " ".join(item.document for item in items).lower()
  letters = sorted({c for c in text if c.isalnum()} | set("[]<>|.,?{}"))
  words = sorted(set(re.findall("[a-z]{4,}", text)))[::2]
  pieces = [*special, *letters, *(f"##{c}" for c in letters), *words]
  vocabulary = {piece: i for i, piece in enumerate(pieces[:SIZE])}
  tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.add_special_tokens(special)
  pair = ROBERTA_PAIR if roberta else PAIR
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{cls}:0 $A:0 {sep}:0",
    pair=pair.format(cls, sep),
    special_tokens=[(name, special.index(name)) for name in (cls, sep)],
  )
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "cls_token": cls,
    "sep_token": sep,
    "pad_token": pad,
    "unk_token": unk,
    "model_input_names": [
      *("input_ids", "attention_mask"),
      *(["token_type_ids"] if kind == "bert" else []),
    ],
  }
  return {
    "tokenizer.json": tokenizer.to_str().encode(),
    CONFIG: json.dumps(config).encode(),
  }


def write_tokenizer(folder, kind: str) -> None:
  """Writes the files."""
  for name, content in tokenizer_files(kind).items():
    (folder / name).write_bytes(content)

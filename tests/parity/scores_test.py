"""Rewards by Hugging Face classifiers between this package and transformers.

Every model is random, tiny and written by transformers itself, and no field
that changes a number has the value that its class starts with.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import small_decoder
import small_encoder

from clp_jax import sharding
from clp_jax.rewards.base import load_reward

pytestmark = pytest.mark.parity
torch = pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
transformers = pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)

from parity import make_causal  # noqa: E402
from parity.decoders_test import (  # noqa: E402
  LINEAR,
  fields,
  gemma,
  gemma2,
  multimodal,
  qwen,
)

DECODERS = (*small_decoder.ARCHITECTURES, "gemma3")
LABELS = ("contradiction", "entailment", "neutral")


class Case(NamedTuple):
  """A model that transformers writes."""

  config: Any
  labels: int = 1
  label: Any = None  # that the reward names
  length: int = 96  # tokens of a row
  dtype: str = "float32"  # as stored
  shard: str = "1GB"
  scan: bool = False  # how we read it
  # What becomes of the logits [B, n].
  score: Any = staticmethod(lambda logits: logits[:, 0])


def log_softmax(label):
  return lambda logits: logits.log_softmax(-1)[:, label]


def encoder(**changes):
  return {
    "vocab_size": 201,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.6,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.2,
    "type_vocab_size": 2,
  } | changes


def distilbert(**changes):
  values = {
    "vocab_size": 201,
    "dim": 24,
    "hidden_dim": 40,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.6,
    "activation": "relu",
  }
  return transformers.DistilBertConfig(**values | changes)


def deberta(**changes):
  values = encoder(
    type_vocab_size=0,
    relative_attention=True,
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_biased_input=False,
    hidden_act="gelu",
    pooler_hidden_act="silu",
  )
  return transformers.DebertaV2Config(**values | changes)


def with_images():
  """A multimodal model's own class, whose text is of all tokens."""
  config = multimodal(True)
  config.text_config.vocab_size = 512
  config.boi_token_index, config.eoi_token_index = 509, 510
  config.image_token_id = 511
  return config


WIDE = {"vocab_size": 512, "eos_token_id": 2}
CASES = {
  "llama": Case(
    transformers.LlamaConfig(
      **fields(
        **WIDE,
        head_dim=10,
        rope_theta=5000.0,
        rope_scaling=make_causal.LLAMA3,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
        tie_word_embeddings=True,
        pad_token_id=0,
      )
    ),
    shard="30KB",
    scan=True,
  ),
  # What pads ends responses too, and may end the text.
  "qwen2": Case(
    transformers.Qwen2Config(
      **qwen(**WIDE, max_window_layers=1, rope_scaling=LINEAR, pad_token_id=2)
    ),
    labels=3,
    label="entailment",
    score=log_softmax(1),
    length=200,
  ),
  "qwen3": Case(
    transformers.Qwen3Config(
      **qwen(**WIDE, head_dim=14, max_window_layers=2, pad_token_id=0)
    ),
    labels=3,
    label=2,
    score=log_softmax(2),
    dtype="bfloat16",
    scan=True,
  ),
  "gemma2": Case(gemma2(**WIDE, num_hidden_layers=4), shard="40KB"),
  "gemma3_text": Case(
    transformers.Gemma3TextConfig(
      **gemma(**WIDE, num_hidden_layers=7, rope_scaling=LINEAR)
    ),
  ),
  "gemma3": Case(with_images(), shard="60KB"),
  "bert": Case(
    transformers.BertConfig(**encoder()),
    labels=2,
    label=1,
    score=log_softmax(1),
    shard="20KB",
    scan=True,
  ),
  "bert, several labels at once": Case(
    transformers.BertConfig(
      **encoder(type_vocab_size=3, problem_type="multi_label_classification")
    ),
    labels=3,
    label="neutral",
    score=lambda logits: torch.nn.functional.logsigmoid(logits)[:, 2],
  ),
  "roberta": Case(
    transformers.RobertaConfig(
      **encoder(pad_token_id=1, type_vocab_size=1, problem_type="regression")
    ),
    labels=3,
    label="2",
    score=lambda logits: logits[:, 2],
  ),
  "xlm-roberta": Case(
    transformers.XLMRobertaConfig(
      **encoder(pad_token_id=1, hidden_act="silu", type_vocab_size=1)
    ),
    dtype="float16",
  ),
  "distilbert": Case(distilbert(), scan=True),
  "distilbert, sines": Case(
    distilbert(sinusoidal_pos_embds=True, activation="gelu"),
    labels=2,
    label="contradiction",
    score=log_softmax(0),
  ),
  "deberta-v2": Case(deberta(), scan=True),
  "deberta-v2, wide buckets": Case(
    deberta(position_buckets=48, pooler_hidden_act="gelu"),
    labels=3,
    label="entailment",
    score=log_softmax(1),
    shard="20KB",
  ),
}


def make(case: Case):
  """A case's model."""
  config = case.config
  config.num_labels = case.labels
  if case.labels > 1:
    config.id2label = dict(enumerate(LABELS[: case.labels]))
    config.label2id = {name: i for i, name in config.id2label.items()}
  auto = transformers.AutoModelForSequenceClassification
  return make_causal.make(config, auto).to(getattr(torch, case.dtype))


@functools.cache
def stored_in(name: str, folder: pathlib.Path):
  """What transformers reads of the folder that it has written."""
  case = CASES[name]
  make(case).save_pretrained(folder, max_shard_size=case.shard)
  kind = case.config.model_type
  if kind in DECODERS:
    for file, content in small_decoder.tokenizer_files().items():
      (folder / file).write_bytes(content)
  else:
    small_encoder.write_tokenizer(folder, kind)
  model = make_causal.read(
    folder, transformers.AutoModelForSequenceClassification
  )
  return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
  return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(params=CASES)
def name(request):
  return request.param


@pytest.fixture
def folder(name, folder_of):
  return folder_of / name.replace(", ", "-").replace(" ", "_")


def mesh():
  return sharding.make_mesh(1, 1, jax.devices()[:1])


def of_decoder(model, tokenizer, documents, responses, length):
  """Logits of chats whose user is cut, one row at a time; texts that fit."""
  found = []
  for document, response in zip(documents, responses, strict=True):
    ids = tokenizer.apply_chat_template(
      [
        {"role": "user", "content": document},
        {"role": "assistant", "content": response},
      ]
    )
    assert len(ids) <= length
    found.append(model(torch.tensor([ids])).logits)
  return torch.cat(found)


def of_encoder(model, tokenizer, documents, responses, length):
  """Logits of pairs in one padded batch."""
  inputs = tokenizer(
    documents,
    responses,
    truncation="only_first",
    max_length=length,
    padding=True,
    return_tensors="pt",
  )
  assert inputs["attention_mask"].sum(1).max() == length
  return model(**inputs).logits


def test_scores_are_those_of_transformers(name, folder):
  case = CASES[name]
  model, tokenizer = stored_in(name, folder)
  documents, responses = small_encoder.texts()
  logits_of = of_encoder
  if case.config.model_type in DECODERS:
    logits_of = of_decoder
    documents = [document[: 5 + 8 * i] for i, document in enumerate(documents)]
  with torch.no_grad():
    logits = logits_of(model, tokenizer, documents, responses, case.length)
  expected = case.score(logits).numpy()
  reward = load_reward(
    "r",
    {
      "source": "classifier",
      "model": str(folder),
      "label": case.label,
      "source_length": case.length,
      "batch": 5,
      "scan_layers": case.scan,
    },
    mesh(),
  )
  scores = reward.score(documents, [""] * len(documents), responses)
  assert expected.std() > 0.05
  np.testing.assert_allclose(scores, expected, atol=1e-4)
  parts = len(list(folder.glob("*.safetensors")))
  assert (parts > 1) == (case.shard != "1GB")

"""Small T5s with random weights, and what the tests of checkpoints share."""

import dataclasses
import io
import json
import pathlib

import jax
import numpy as np
import sentencepiece

from clp_jax.interop import leaves
from clp_jax.models import t5

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# No two axes are of one size, so that none can be taken for another.
V1_1 = t5.T5Config(
  vocab_size=48,
  emb_dim=12,
  num_heads=2,
  head_dim=8,
  num_encoder_layers=1,
  num_decoder_layers=2,
  mlp_dim=20,
  eos_ids=(1,),
)
V1_0 = dataclasses.replace(
  V1_1, mlp_activations=("relu",), logits_via_embedding=True
)


def random_params(config, dtype="float32", seed=0):
  """NumPy arrays, no two alike, in the layout of `config`."""
  rng = np.random.default_rng(seed)
  unrolled = dataclasses.replace(config, scan_layers=False)
  params = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(dtype),
    t5.abstract_params(unrolled),
  )
  return t5.stack_layers(params) if config.scan_layers else params


def assert_same(actual, expected):
  """Two trees are equal in names, dtypes, shapes and every bit."""
  actual, expected = leaves.flatten(actual), leaves.flatten(expected)
  assert actual.keys() == expected.keys()
  for path, array in expected.items():
    got, array = np.asarray(actual[path]), np.asarray(array)
    assert (got.dtype, got.shape) == (array.dtype, array.shape), path
    assert got.tobytes() == array.tobytes(), path


def trained_vocabulary(**options):
  """A SentencePiece model of a few words, which normalises what it reads."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["one two three four five six"] * 10),
    model_writer=model,
    vocab_size=24,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  return model.getvalue()


def edit_json(file, drop=(), **fields):
  """Changes fields of a JSON file."""
  values = json.loads(file.read_text()) | fields
  for name in drop:
    del values[name]
  file.write_text(json.dumps(values))

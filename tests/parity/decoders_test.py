"""Decoder-only models between this package and transformers, both ways.

Every model is random, tiny and written by transformers itself, and no field
that changes a logit has the value that its class starts with.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_decoder

import clp_jax
from clp_jax import build, interop, run_folder, saved_params
from clp_jax import config as config_lib
from clp_jax.data import tokenizer_files, vocabulary
from clp_jax.initial import load_initial
from clp_jax.interop import causal as causal_folders
from clp_jax.interop.storage import Folder
from clp_jax.models import decoding, families
from clp_jax.models.model import Model
from clp_jax.sampling import Sampling

pytestmark = pytest.mark.parity
torch = pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
transformers = pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)

from parity import make_causal  # noqa: E402

SLIDING, FULL = "sliding_attention", "full_attention"
LENGTHS = (25, 13, 1)  # of prompts; windows are 4 to 7
SAMPLES, TARGET = 2, 16
WIDTH = 27  # of padded prompts
LINEAR = {"rope_type": "linear", "factor": 2.5}


class Case(NamedTuple):
  """A model that transformers writes."""

  config: Any
  dtype: str = "float32"  # as stored
  shard: str = "1GB"
  scan: bool = True  # how we read it


def fields(**changes):
  return {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 3e-5,
    "initializer_range": 0.3,
    "attention_dropout": 0.1,
    "eos_token_id": [3, 5],
    "bos_token_id": 4,
  } | changes


def qwen(**changes):
  window = {"use_sliding_window": True, "sliding_window": 7}
  return fields(**window, rope_theta=777.0) | changes


def gemma(**changes):
  return fields(
    head_dim=14,
    query_pre_attn_scalar=20,
    sliding_window=6,
    final_logit_softcapping=9.0,
    attn_logit_softcapping=7.0,
    rope_theta=333.0,
    attention_bias=True,
    hidden_activation="gelu",
    pad_token_id=2,
  ) | {"rope_local_base_freq": 55.0, **changes}


def gemma2(**changes):
  values = gemma(**changes)
  del values["rope_local_base_freq"]
  return transformers.Gemma2Config(**values)


def multimodal(tied: bool):
  return transformers.Gemma3Config(
    text_config=gemma(
      num_hidden_layers=6,
      rope_scaling=LINEAR,
      tie_word_embeddings=tied,
      vocab_size=101,
      eos_token_id=None,
    ),
    vision_config={
      "hidden_size": 8,
      "intermediate_size": 12,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "image_size": 8,
      "patch_size": 4,
    },
    mm_tokens_per_image=4,
    boi_token_index=95,
    eoi_token_index=96,
    image_token_index=97,
    initializer_range=0.3,
    eos_token_id=[3, 5],
    pad_token_id=2,
  )


CASES = {
  "llama, llama3 rope, tied": Case(
    transformers.LlamaConfig(
      **fields(
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
  ),
  "llama, linear rope, one key head": Case(
    transformers.LlamaConfig(
      **fields(
        num_key_value_heads=1,
        rope_scaling=LINEAR,
        hidden_act="gelu_new",
        vocab_size=101,
        eos_token_id=3,
        pad_token_id=3,
      )
    ),
    "bfloat16",
    scan=False,
  ),
  "llama, all key heads, one layer": Case(
    transformers.LlamaConfig(
      **fields(
        num_key_value_heads=6,
        num_hidden_layers=1,
        head_dim=2,
        mlp_bias=True,
        eos_token_id=None,
      )
    ),
    "float16",
  ),
  "qwen2, window, tied": Case(
    transformers.Qwen2Config(
      **qwen(max_window_layers=1, tie_word_embeddings=True, pad_token_id=1)
    ),
    shard="20KB",
  ),
  "qwen2, window off, all key heads": Case(
    transformers.Qwen2Config(
      **qwen(
        use_sliding_window=False,
        num_key_value_heads=6,
        rope_scaling=LINEAR,
        hidden_act="gelu",
        vocab_size=99,
        eos_token_id=98,
      )
    ),
    "bfloat16",
  ),
  "qwen2, head width of its own": Case(
    transformers.Qwen2Config(
      **qwen(head_dim=14, layer_types=[SLIDING, FULL, SLIDING])
    ),
    "float16",
    scan=False,
  ),
  "qwen3, window, untied": Case(
    transformers.Qwen3Config(
      **qwen(
        head_dim=14,
        max_window_layers=2,
        attention_bias=True,
        hidden_act="relu",
        pad_token_id=66,
      )
    ),
    "float16",
    "30KB",
  ),
  "qwen3, layers mixed by hand, tied": Case(
    transformers.Qwen3Config(
      **qwen(
        head_dim=22,
        num_hidden_layers=4,
        num_key_value_heads=1,
        sliding_window=4,
        layer_types=[FULL, SLIDING, SLIDING, FULL],
        rope_scaling=make_causal.LLAMA3,
        tie_word_embeddings=True,
      )
    ),
  ),
  "gemma2, tied": Case(gemma2(num_hidden_layers=4), shard="40KB"),
  "gemma2, no caps, layers mixed by hand, untied": Case(
    gemma2(
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
      layer_types=[FULL, FULL, SLIDING],
      num_key_value_heads=6,
      query_pre_attn_scalar=7,
      rope_scaling=LINEAR,
      attention_bias=False,
      hidden_activation="gelu_pytorch_tanh",
      tie_word_embeddings=False,
      vocab_size=99,
    ),
    "bfloat16",
    scan=False,
  ),
  "gemma3, tied": Case(
    transformers.Gemma3TextConfig(
      **gemma(num_hidden_layers=7, rope_scaling=LINEAR)
    ),
    "bfloat16",
    "60KB",
  ),
  "gemma3, layers mixed by hand, untied": Case(
    transformers.Gemma3TextConfig(
      **gemma(
        num_key_value_heads=1,
        layer_types=[FULL, SLIDING, FULL],
        rope_scaling=make_causal.LLAMA3,
        attention_bias=False,
        tie_word_embeddings=False,
        final_logit_softcapping=None,
        eos_token_id=1,
        pad_token_id=1,
        vocab_size=101,
      )
    ),
    "float16",
  ),
  "gemma3 with images, tied": Case(multimodal(True), shard="60KB"),
  "gemma3 with images, untied": Case(multimodal(False), "bfloat16"),
}


class Stored(NamedTuple):
  """A folder, and what both programs make of it; theirs is in float32."""

  folder: pathlib.Path
  theirs: Any
  model: Model
  params: Any
  score: Any  # jitted


@functools.cache
def stored_in(name: str, folder: pathlib.Path) -> Stored:
  case = CASES[name]
  model = make_causal.make(case.config).to(getattr(torch, case.dtype))
  model.save_pretrained(folder, max_shard_size=case.shard)
  ours, params = interop.load_model(folder, scan_layers=case.scan)
  return Stored(
    folder, make_causal.read(folder), ours, params, jax.jit(ours.score)
  )


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
  return tmp_path_factory.mktemp("stored")


@pytest.fixture(params=CASES)
def name(request):
  return request.param


@pytest.fixture
def stored(name, folder_of):
  return stored_in(name, folder_of / name.replace(", ", "-").replace(" ", "_"))


def texts_of(config, seed=0):
  """([B] prompts, [B * N] responses), of all ids but padding."""
  rng = np.random.default_rng(seed)
  ids = np.asarray([i for i in range(config.vocab_size) if i != config.pad_id])
  prompts = [rng.choice(ids, n) for n in LENGTHS]
  return prompts, rng.choice(ids, [len(LENGTHS) * SAMPLES, TARGET])


def padded(
  rows: Sequence[np.ndarray], pad_id: int, side: str, width: int
) -> np.ndarray:
  found = np.full([len(rows), width], pad_id, np.int32)
  for row, text in zip(found, rows, strict=True):
    row[: len(text)] = text
    if side == "left":
      row[:] = np.roll(row, width - len(text))
  return found


def expected_logits(theirs, prompts, responses, side="left"):
  """[R, T, V], each position's before it is seen, in one padded batch."""
  copies = len(responses) // len(prompts)
  rows = [
    np.concatenate([prompts[i // copies], response])
    for i, response in enumerate(responses)
  ]
  width = max(map(len, rows)) + 2
  ids = padded(rows, 0, side, width)
  mask = padded([np.ones(len(row)) for row in rows], 0, side, width)
  with torch.no_grad():
    logits = theirs(
      input_ids=torch.tensor(ids).long(),
      attention_mask=torch.tensor(mask).long(),
      position_ids=torch.tensor((mask.cumsum(1) - 1).clip(0)).long(),
    ).logits.numpy()
  found = []
  for i, row in enumerate(rows):
    end = (width if side == "left" else len(row)) - 1
    found.append(logits[i, end - responses.shape[1] : end])
  return np.stack(found)


def assert_same(a, b):
  """Bit for bit, dtypes too."""

  def check(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)

  jax.tree.map(check, a, b)


class TestEveryFamily:
  @pytest.mark.parametrize("side", ["left", "right"])
  def test_logits_are_those_of_transformers(self, name, stored, side):
    config = stored.model.config
    prompts, responses = texts_of(config)
    tokens = padded(prompts, config.pad_id, side, WIDTH)
    logits, _ = stored.score(stored.params, tokens, jnp.asarray(responses))
    expected = expected_logits(stored.theirs, prompts, responses, side)
    assert logits.dtype == jnp.float32
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    table = stored.params["token_embedder"]["embedding"]
    assert table.dtype == CASES[name].dtype
    parts = len(list(stored.folder.glob("*.safetensors")))
    assert (parts > 1) == (CASES[name].shard != "1GB")

  def test_decoding_with_a_cache_gives_the_same_logits(self, stored):
    model, params = stored.model, stored.params
    prompts, responses = texts_of(model.config, seed=1)
    expected = expected_logits(stored.theirs, prompts, responses)
    tokens = padded(prompts, model.config.pad_id, "left", WIDTH)

    @jax.jit
    def decode(params, tokens, responses):
      context = model.read(params, tokens)
      cache = model.empty_cache(len(responses), TARGET)
      last = jnp.full(len(responses), model.config.pad_id, jnp.int32)

      def step(carry, inputs):
        cache, last = carry
        t, following = inputs
        logits, cache = model.step(params, context, cache, last, t)
        return (cache, following), logits

      inputs = (jnp.arange(TARGET, dtype=jnp.int32), responses.T)
      return jax.lax.scan(step, (cache, last), inputs)[1]

    logits = decode(params, tokens, jnp.asarray(responses, jnp.int32))
    np.testing.assert_allclose(jnp.swapaxes(logits, 0, 1), expected, atol=1e-4)

  def test_a_written_folder_is_the_same_model(self, name, stored, tmp_path):
    size = 1 << 30 if CASES[name].shard == "1GB" else 20_000
    interop.save_model(
      *(tmp_path, stored.model, stored.params, "hf"), max_shard_bytes=size
    )
    again = make_causal.read(tmp_path)
    old = stored.theirs.config.get_text_config()
    assert again.config.model_type == old.model_type
    free = {
      *("architectures", "_name_or_path", "dtype", "torch_dtype"),
      *("transformers_version", "initializer_range", "attention_dropout"),
      # Neither is of the network.
      *("bos_token_id", "pad_token_id", "eos_token_id"),
      # layer_types says it all.
      *("max_window_layers", "sliding_window_pattern"),
      "_sliding_window_pattern",
      # No model of transformers reads it.
      *(("attn_logit_softcapping",) if "gemma3" in name else ()),
      *(("final_logit_softcapping",) if "images" in name else ()),
    }
    values = again.config.to_dict()
    alike = {"gelu_new": "gelu_pytorch_tanh"}
    for field, value in old.to_dict().items():
      if field == "sliding_window" and SLIDING not in values["layer_types"]:
        continue
      if isinstance(value, str):
        value = alike.get(value, value)
      assert field in free or values[field] == value, field
    prompts, responses = texts_of(stored.model.config, seed=2)
    np.testing.assert_allclose(
      expected_logits(again, prompts, responses),
      expected_logits(stored.theirs, prompts, responses),
      atol=1e-5,
    )
    model, params = interop.load_model(tmp_path, scan_layers=CASES[name].scan)
    assert model == stored.model
    assert_same(params, stored.params)

  def test_rope_fields_of_transformers_5_say_the_same(self, stored, tmp_path):
    values = json.loads((stored.folder / "config.json").read_text())
    text = values.get("text_config", values)
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    rope |= text.pop("rope_scaling", None) or {}
    if text["model_type"] == "gemma3_text":
      local = text.pop("rope_local_base_freq")
      rope = {
        FULL: rope,
        SLIDING: {"rope_type": "default", "rope_theta": local},
      }
    text["rope_parameters"] = rope
    for file in stored.folder.iterdir():
      shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = interop.load_config(tmp_path)
    scan = stored.model.config.scan_layers
    assert dataclasses.replace(config, scan_layers=scan) == stored.model.config


class TestGreedy:
  @pytest.mark.parametrize(
    ("name", "several"),
    [
      ("llama, llama3 rope, tied", False),
      ("llama, all key heads, one layer", True),
      ("qwen2, window, tied", True),
      ("qwen3, layers mixed by hand, tied", False),
      ("gemma2, tied", False),
      ("gemma3, tied", True),
      ("gemma3 with images, untied", True),
    ],
  )
  def test_tokens_are_those_of_generate(self, name, several, stored, tmp_path):
    """Rows end at what generation_config.json names, one token or several."""
    config = stored.model.config
    prompts, _ = texts_of(config, seed=3)
    tokens = padded(prompts, config.pad_id, "left", WIDTH)
    endless = np.zeros([len(LENGTHS) * SAMPLES, TARGET], np.int32)
    for t in range(TARGET):
      logits, _ = stored.score(stored.params, tokens, jnp.asarray(endless))
      logits = np.array(logits[:, t])
      if config.pad_id >= 0:
        logits[:, config.pad_id] = -np.inf
      endless[:, t] = logits.argmax(-1)
    ends = [int(endless[0, 4]), int(endless[SAMPLES, 9])]
    for file in stored.folder.iterdir():
      shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    mask = padded([np.ones(n) for n in LENGTHS], 0, "left", WIDTH)
    eos = ends if several else ends[0]
    (tmp_path / "generation_config.json").write_text(
      json.dumps(settings | {"eos_token_id": eos})
    )
    model, params = interop.load_model(tmp_path, scan_layers=config.scan_layers)
    assert model.config.eos_ids == tuple(np.atleast_1d(eos))
    samples = self.sample(model, params, tokens)
    theirs = make_causal.read(tmp_path).generate(
      torch.tensor(np.where(mask > 0, tokens, 0)).long(),
      attention_mask=torch.tensor(mask).long(),
      do_sample=False,
      max_new_tokens=TARGET,
      suppress_tokens=[config.pad_id] if config.pad_id >= 0 else None,
    )[:, WIDTH:]
    lengths = samples.mask.sum(1)
    assert 1 <= lengths[0] <= 5
    for ours, row, n in zip(samples.tokens, theirs, lengths, strict=True):
      np.testing.assert_array_equal(ours[:n], row[:n])
      ended = np.isin(row[:n], eos)
      assert not ended[:-1].any() and (ended[-1] or n == TARGET)

  @staticmethod
  def sample(model, params, tokens):
    config = model.config
    samples = decoding.sample(
      model,
      params,
      jnp.asarray(tokens),
      jax.random.split(jax.random.key(0), len(tokens)),
      Sampling(
        np.arange(config.vocab_size) != config.pad_id,
        config.eos_ids,
        config.pad_id,
        temperature=0.0,
      ),
      max_length=TARGET,
    )
    return jax.tree.map(np.asarray, samples)


ABSENT = object()  # of a field that a test takes out
EDITS = [
  ("llama, linear rope, one key head", {"rope_scaling": None}),
  (
    "llama, linear rope, one key head",
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "head_dim": None},
  ),
  ("llama, linear rope, one key head", {"hidden_activation": "relu"}),
  (
    "llama, all key heads, one layer",
    {"num_key_value_heads": None, "rope_scaling": {"rope_type": "default"}},
  ),
  (
    "llama, all key heads, one layer",
    {"num_key_value_heads": ABSENT, "pad_token_id": -1},
  ),
  (
    "qwen2, window, tied",
    {"use_sliding_window": False, "layer_types": ABSENT},
  ),
  ("qwen2, window, tied", {"use_sliding_window": None, "layer_types": None}),
  ("qwen2, window, tied", {"layer_types": ABSENT, "max_window_layers": 2}),
  ("qwen2, window, tied", {"layer_types": None, "max_window_layers": 28}),
  (
    "qwen2, window, tied",
    {"sliding_window": None, "layer_types": ABSENT},
  ),
  ("qwen2, window off, all key heads", {"num_key_value_heads": None}),
  ("qwen3, window, untied", {"layer_types": ABSENT, "pad_token_id": None}),
  ("gemma2, tied", {"layer_types": ABSENT, "hidden_act": "relu"}),
  (
    "gemma2, tied",
    {"attn_logit_softcapping": None, "final_logit_softcapping": None},
  ),
  ("gemma2, tied", {"pad_token_id": None}),
  (
    "gemma2, tied",
    {"attn_logit_softcapping": ABSENT, "final_logit_softcapping": ABSENT},
  ),
  (
    "gemma3, tied",
    {"layer_types": ABSENT, "sliding_window_pattern": 3, "rope_scaling": None},
  ),
  ("gemma3, tied", {"layer_types": None, "attn_logit_softcapping": None}),
  ("gemma3, tied", {"pad_token_id": None, "rope_local_base_freq": ABSENT}),
  ("gemma3, tied", {"pad_token_id": ABSENT, "rope_theta": ABSENT}),
  ("gemma3 with images, tied", {"pad_token_id": None, "rope_scaling": None}),
]


@pytest.mark.parametrize(("name", "changes"), EDITS)
def test_a_config_that_was_edited_says_what_it_says_to_transformers(
  stored, changes, tmp_path
):
  for file in stored.folder.iterdir():
    shutil.copy(file, tmp_path)
  values = json.loads((tmp_path / "config.json").read_text())
  text = values.get("text_config", values)
  text.update(changes)
  for field, value in changes.items():
    if value is ABSENT:
      del text[field]
  (tmp_path / "config.json").write_text(json.dumps(values))
  model, params = interop.load_model(tmp_path, scan_layers=True)
  prompts, responses = texts_of(model.config, seed=4)
  tokens = padded(prompts, model.config.pad_id, "left", WIDTH)
  logits, _ = jax.jit(model.score)(params, tokens, jnp.asarray(responses))
  theirs = make_causal.read(tmp_path)
  expected = expected_logits(theirs, prompts, responses)
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  pad_id = theirs.config.get_text_config().pad_token_id
  if pad_id in (None, -1, *model.config.eos_ids):
    pad_id = -1
  assert model.config.pad_id == pad_id


@pytest.mark.parametrize("kind", causal_folders.families())
def test_a_field_that_is_absent_has_the_default_of_its_class(kind, tmp_path):
  theirs = transformers.AutoConfig.for_model(kind)
  bare = {"model_type": kind}
  if kind == "gemma3":
    bare["text_config"] = {"model_type": "gemma3_text"}
  full = theirs.to_dict()
  for values in (full, full.get("text_config", full)):
    values.pop("eos_token_id", None)  # which is left to the tokenizer
  configs = []
  for values in (bare, full):
    (tmp_path / "config.json").write_text(json.dumps(values))
    configs.append(causal_folders.read_config(Folder(str(tmp_path))))
  assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("eos", [7, [7, 9], None, ABSENT])
@pytest.mark.parametrize("generation", [8, [8, 6], None])
def test_responses_end_where_those_of_transformers_do(
  kind, eos, generation, tmp_path
):
  values = {"model_type": kind, "vocab_size": 50}
  if eos is not ABSENT:
    values["eos_token_id"] = eos
  (tmp_path / "config.json").write_text(json.dumps(values))
  if generation is not None:
    (tmp_path / "generation_config.json").write_text(
      json.dumps({"eos_token_id": generation})
    )
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
  else:
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  expected = theirs.eos_token_id
  if eos is ABSENT and generation is None:
    expected = None  # then the tokenizer says it, and not a class's default
  config = causal_folders.read_config(Folder(str(tmp_path)))
  assert config.eos_ids == (
    () if expected is None else tuple(np.atleast_1d(expected))
  )


@pytest.mark.parametrize(
  "name", ["llama, llama3 rope, tied", "gemma3, tied", "qwen2, window, tied"]
)
def test_long_texts_have_the_logits_of_transformers(stored):
  """Prompts and responses of several blocks of queries."""
  config = stored.model.config
  rng = np.random.default_rng(5)
  ids = rng.integers(6, config.vocab_size - 1, [2, 900])
  prompts, responses = [ids[0, :600], ids[1, :461]], ids[:, 600:]
  tokens = padded(prompts, config.pad_id, "right", 600)
  logits, _ = stored.score(stored.params, tokens, jnp.asarray(responses))
  expected = expected_logits(stored.theirs, prompts, responses)
  np.testing.assert_allclose(logits, expected, atol=3e-4)


@pytest.mark.parametrize("name", make_causal.CONFIGS)
def test_the_stored_fixtures_are_what_transformers_writes(name, tmp_path):
  folder = make_causal.FIXTURES / name
  model = make_causal.make(make_causal.CONFIGS[name])
  model.save_pretrained(tmp_path, max_shard_size="40KB")
  assert {p.name for p in folder.iterdir()} == {
    *(p.name for p in tmp_path.iterdir()),
    "expected.npz",
  }
  for file in ("config.json", "generation_config.json"):
    written, stored = (
      json.loads((path / file).read_text()) for path in (tmp_path, folder)
    )
    for values in (written, stored):
      del values["transformers_version"]
    assert written == stored
  found, params = interop.load_model(folder)
  again, same = interop.load_model(tmp_path)
  assert again == found
  assert_same(params, same)
  expected = np.load(folder / "expected.npz")
  for each in (model, make_causal.read(folder)):
    np.testing.assert_allclose(
      make_causal.logits_of(each, expected["ids"]),
      expected["logits"],
      atol=1e-5,
    )


CONVERSATIONS = [
  [{"role": "user", "content": "Say hello."}],
  [
    {"role": "system", "content": "You are brief.\n\n"},
    {"role": "user", "content": "  What is 2 + 2,\tand why?\n"},
    {"role": "assistant", "content": "4; naïve façade — 日本語 🙂."},
    {"role": "user", "content": "</s> {{ messages }} <|im_ start|> \u00a0x"},
  ],
]


class TestPolicies:
  """Weightings of a run, exported and read by transformers."""

  WEIGHTS = {"long": 0.3, "short": 0.7}

  def run(self, folder, architecture, steering):
    """A run of two sets that differ, made without training."""
    small_decoder.save(folder / "initial", architecture)
    config = config_lib.get_config()
    config.objectives = ("long", "short")
    config.steering = steering
    config.data.template = None
    config.data.source_length = 60
    config.data.target_length = 24
    config.model.init = str(folder / "initial")
    config.model.scan_layers = architecture != "llama"
    workdir = str(folder / "run")
    run_folder.start(workdir, config)
    initial = load_initial(config)
    run_folder.save_model(
      workdir, initial.model_config, initial.vocabulary, initial.params
    )
    bank = build.bank(config, initial.model_config)
    rng = np.random.default_rng(0)
    sets = jax.tree.map(
      lambda p: (
        np.asarray(p) + 0.1 * rng.standard_normal(p.shape).astype(np.float32)
      ),
      bank.init(initial.params, jax.random.key(1)),
    )
    saved_params.save_params(workdir, 1, sets)
    return clp_jax.Policy.load(workdir)

  @pytest.mark.parametrize(
    ("architecture", "steering"),
    [
      ("llama", "logits"),
      ("qwen3", "lora"),
      ("gemma2", "attention"),
      ("gemma3_text", "full"),
    ],
  )
  def test_score_alike_in_transformers(self, tmp_path, architecture, steering):
    policy = self.run(tmp_path, architecture, steering)
    policy.export(str(tmp_path / "out"), "hf", self.WEIGHTS)
    exported = make_causal.read(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [
      "The council of Oakdale met on Monday to talk about the old bridge.",
      "Rain.",
    ]
    responses = ["The bridge was built in 1912, it said.", "Wet — très 日本"]
    scores = policy.score(texts, responses, self.WEIGHTS)
    vertex = policy.score(texts, responses, {"long": 1.0})
    assert np.abs(scores - vertex).min() > 0.1
    for text, response, score in zip(texts, responses, scores, strict=True):
      prompt = tokenizer(text, add_special_tokens=False).input_ids
      answer = tokenizer(response, add_special_tokens=False).input_ids[:23]
      answer.append(exported.generation_config.eos_token_id)
      assert len(prompt) < 60
      logits = make_causal.logits_of(exported, prompt + answer)
      # Rows of the embedding that no token has are no part of a policy.
      known = torch.tensor(logits[:, : len(tokenizer)])
      logp = torch.log_softmax(known, -1).numpy()
      first = len(prompt) - 1
      theirs = sum(logp[first + i, token] for i, token in enumerate(answer))
      np.testing.assert_allclose(score, theirs, atol=5e-4)

  def test_a_sentencepiece_model_makes_the_same_prompts(self, tmp_path):
    words = [f"word{i}" for i in range(30)]
    content = vocabulary.word_model(words, [".", ","])
    ours = vocabulary.Vocabulary("here", content)
    config = small_decoder.make_config("llama", eos_ids=(1,), pad_id=0)
    params = small_decoder.random_params(config)
    model = families.build(config)
    interop.save_model(tmp_path, model, params, "hf", tokenizer=ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 0
    for text in ("word3 word7, word1.", "word3  word29"):
      prompt, _ = ours.prompt(text, None, 60)
      assert tokenizer(text).input_ids == prompt

  def test_speak_and_chat_alike_in_transformers(self, tmp_path):
    policy = self.run(tmp_path, "qwen3", "full")
    policy.export(str(tmp_path / "out"), "hf", self.WEIGHTS, dtype="bfloat16")
    exported = make_causal.read(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tokenizer_files.load_tokenizer(tmp_path / "out")
    assert tokenizer.eos_token_id == ours.eos_id == policy.vocabulary.eos_id
    assert exported.generation_config.eos_token_id == tokenizer.eos_token_id
    for messages in CONVERSATIONS:
      ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
      assert ids == policy.vocabulary.chat(messages) == ours.chat(messages)
      text = messages[-1]["content"]
      plain = tokenizer(text, add_special_tokens=False).input_ids
      assert plain == ours.encode(text)
      assert tokenizer.decode(plain) == ours.decode(plain) == text
    # What an exported policy answers is what it answers here.
    weights = policy.params(self.WEIGHTS)
    rounded = jax.tree.map(lambda p: np.asarray(p.astype("bfloat16")), weights)
    model, params = interop.load_model(tmp_path / "out", scan_layers=True)
    assert_same(params, rounded)
    ids = policy.vocabulary.chat(CONVERSATIONS[0])
    samples = decoding.sample(
      model,
      params,
      jnp.asarray([ids]),
      jax.random.split(jax.random.key(0), 1),
      Sampling(
        np.arange(model.config.vocab_size) < len(tokenizer),
        model.config.eos_ids,
        model.config.pad_id,
        temperature=0.0,
      ),
      max_length=12,
    )
    theirs = exported.generate(
      torch.tensor([ids]),
      do_sample=False,
      max_new_tokens=12,
      suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
    )[0, len(ids) :]
    n = int(samples.mask.sum())
    np.testing.assert_array_equal(samples.tokens[0, :n], theirs[:n])
    assert len(theirs) == n

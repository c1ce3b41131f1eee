"""Decoder-only models: logits, decoding, padding, folders, policies."""

import dataclasses
import json
import pathlib
import shutil

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_decoder
from small_decoder import ARCHITECTURES

from clp_jax import conditioning, interop, row_mixing
from clp_jax.bank import Bank
from clp_jax.data import tokenizer_files, vocabulary
from clp_jax.interop import causal as causal_folders
from clp_jax.interop.storage import Folder
from clp_jax.models import attention, decoding, families, trees
from clp_jax.models.causal import CausalConfig, Rope
from clp_jax.sampling import Sampling

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "causal"
LENGTHS = (19, 8, 1)  # of prompts; over twice the window
SAMPLES, TARGET = 2, 9


def arrays(config, side="right", length=24):
  """Prompts [3, length] padded on a side, and targets [6, 9]."""
  rng = np.random.default_rng(1)
  prompts = np.full([len(LENGTHS), length], config.pad_id, np.int32)
  for row, size in zip(prompts, LENGTHS, strict=True):
    text = rng.integers(6, config.vocab_size, size)
    row[:size] = text
    if side == "left":
      row[:] = np.roll(row, length - size)
  targets = rng.integers(6, config.vocab_size, [len(LENGTHS) * SAMPLES, TARGET])
  return jnp.asarray(prompts), jnp.asarray(targets, jnp.int32)


# Unrolled, or as one scanned layer.
EVERY = [(name, True) for name in ARCHITECTURES] + [("qwen3", False)]
SOME = [
  pytest.param("qwen2", False, marks=pytest.mark.slow),
  ("gemma3_text", True),
]


@pytest.mark.parametrize(("name", "scan"), EVERY)
def test_logits_are_those_of_transformers(name, scan):
  expected = np.load(FIXTURES / name / "expected.npz")
  model, params = interop.load_model(FIXTURES / name, scan_layers=scan)
  ids = expected["ids"]
  for cut in (1, 13):  # what is prompt and what is response
    logits, _ = jax.jit(model.score)(
      params, jnp.asarray(ids[None, :cut]), jnp.asarray(ids[None, cut:])
    )
    np.testing.assert_allclose(
      logits[0], expected["logits"][cut - 1 : -1], atol=1e-4
    )


@pytest.mark.slow
def test_every_switch_of_a_fixture_changes_its_logits():
  """What no fixture would notice, none of them tests."""
  changes = {
    "llama": ("norm_epsilon", "activation", "ropes"),
    "qwen2": ("windows",),
    "qwen3": ("windows", "activation"),
    "gemma2": ("attention_cap", "logit_cap", "windows", "query_scale"),
    "gemma3_text": ("ropes", "layer_ropes", "windows", "scale_embeddings"),
  }
  others = {
    "norm_epsilon": 1e-6,
    "activation": "silu",
    "ropes": (Rope(), Rope()),
    "windows": (),
    "attention_cap": None,
    "logit_cap": None,
    "query_scale": None,
    "layer_ropes": (),
    "scale_embeddings": False,
  }
  for name, fields in changes.items():
    expected = np.load(FIXTURES / name / "expected.npz")
    model, params = interop.load_model(FIXTURES / name, scan_layers=True)
    ids = jnp.asarray(expected["ids"][None])
    for field in fields:
      config = dataclasses.replace(model.config, **{field: others[field]})
      score = jax.jit(families.build(config).score)
      logits, _ = score(params, ids[:, :1], ids[:, 1:])
      apart = np.abs(logits[0] - expected["logits"][:-1]).max()
      assert apart > 1e-3, (name, field)


@pytest.mark.parametrize(("name", "scan"), EVERY)
def test_decoding_gives_the_logits_of_teacher_forcing(name, scan):
  config = small_decoder.make_config(name, scan_layers=scan)
  params = small_decoder.random_params(config)
  model = families.build(config)
  prompts, targets = arrays(config)
  expected, states = jax.jit(model.score)(params, prompts, targets)
  assert expected.dtype == jnp.float32
  assert states.shape == (*targets.shape, config.emb_dim)
  context = jax.jit(model.read)(params, prompts)
  cache = model.empty_cache(len(targets), TARGET)
  step = jax.jit(model.step)
  last = jnp.full(len(targets), config.pad_id, jnp.int32)
  for t in range(TARGET):
    logits, cache = step(params, context, cache, last, jnp.int32(t))
    np.testing.assert_allclose(logits, expected[:, t], atol=2e-5)
    last = targets[:, t]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_padding_changes_no_logit(name):
  """On either side, of any width; nor do the prompts beside a prompt."""
  config = small_decoder.make_config(name, scan_layers=True)
  params = small_decoder.random_params(config)
  score = jax.jit(families.build(config).score)
  prompts, targets = arrays(config)
  whole, _ = score(params, prompts, targets)
  for changed in (
    arrays(config, "left")[0],
    arrays(config, "right", 31)[0],
    arrays(config, "left", 40)[0],
  ):
    np.testing.assert_allclose(
      score(params, changed, targets)[0], whole, atol=3e-5
    )
  for i, size in enumerate(LENGTHS):
    rows = slice(i * SAMPLES, (i + 1) * SAMPLES)
    alone, _ = score(params, prompts[i : i + 1, :size], targets[rows])
    np.testing.assert_allclose(alone, whole[rows], atol=3e-5)


def test_zero_is_text_where_padding_is_not_a_token():
  config = small_decoder.make_config(scan_layers=True)
  params = small_decoder.random_params(config)
  score = jax.jit(families.build(config).score)
  prompts, targets = arrays(config)
  first, _ = score(params, prompts, targets)
  changed, _ = score(params, prompts.at[0, 3].set(0), targets)
  assert np.abs(first - changed).max() > 1e-3
  # Padded with a token that the text has not, all is as with -1.
  other = jax.jit(families.build(dataclasses.replace(config, pad_id=5)).score)
  same, _ = other(params, jnp.where(prompts == -1, 5, prompts), targets)
  np.testing.assert_array_equal(same, first)


def test_many_queries_are_attended_to_in_blocks(monkeypatch):
  config = small_decoder.make_config("gemma3_text", scan_layers=True)
  params = small_decoder.random_params(config)
  model = families.build(config)
  rng = np.random.default_rng(0)
  prompts = rng.integers(6, 500, [2, 300]).astype(np.int32)
  prompts[1, 261:] = -1
  targets = jnp.asarray(rng.integers(6, 500, [4, 270]), jnp.int32)

  def loss(params):
    logits, _ = model.score(params, jnp.asarray(prompts), targets)
    return (jax.nn.log_softmax(logits)[..., 7] * 0.01).sum()

  blocked, gradient = jax.jit(jax.value_and_grad(loss))(params)
  monkeypatch.setattr(attention, "MANY_QUERIES", 10_000)
  whole, expected = jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)
  np.testing.assert_allclose(blocked, whole, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), gradient, expected
  )


@pytest.mark.parametrize(
  ("remat", "scan"),
  [
    ("minimal", True),
    ("full", True),
    pytest.param("full", False, marks=pytest.mark.slow),
  ],
)
def test_remat_changes_no_gradient(remat, scan):
  config = small_decoder.make_config("gemma2", scan_layers=scan)
  params = small_decoder.random_params(config)
  prompts, targets = arrays(config)

  def gradient(config):
    model = families.build(config)

    def loss(params):
      logits, _ = model.score(params, prompts, targets)
      return jax.nn.log_softmax(logits)[..., 3].mean()

    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    gradient(dataclasses.replace(config, remat=remat)),
    gradient(config),
  )


@pytest.mark.parametrize(
  "name", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma2"]
)
def test_bfloat16_is_near_to_float32(name):
  config = small_decoder.make_config(name)
  params = small_decoder.random_params(config)
  prompts, targets = arrays(config)
  exact, _ = families.build(config).score(params, prompts, targets)
  narrow = dataclasses.replace(config, dtype="bfloat16")
  logits, _ = families.build(narrow).score(params, prompts, targets)
  assert logits.dtype == jnp.float32
  error = np.abs(logits - exact).mean() / np.abs(exact).mean()
  assert 0 < error < 0.05


def test_what_is_sampled_has_its_teacher_forced_logp():
  config = small_decoder.make_config()
  params = small_decoder.random_params(config)
  model = families.build(config)
  prompts, _ = arrays(config)
  tokenizer = small_decoder.make_tokenizer()
  rows = len(LENGTHS) * SAMPLES
  samples = decoding.sample(
    model,
    params,
    prompts,
    jax.random.split(jax.random.key(0), rows),
    Sampling(
      tokenizer.allowed(config.vocab_size),
      config.eos_ids,
      config.pad_id,
      row_lengths=jnp.asarray([40, 3, 40, 5, 40, 40]),
      logp_temperature=0.7,
    ),
    max_length=40,
    num_samples=SAMPLES,
  )
  scores = decoding.score_tokens(
    model,
    params,
    prompts,
    samples.tokens,
    num_samples=SAMPLES,
    temperature=0.7,
  )
  np.testing.assert_allclose(
    np.where(samples.mask, scores.logp, 0), samples.logp, atol=3e-5
  )
  assert (np.asarray(samples.tokens)[~np.asarray(samples.mask)] == -1).all()
  # Rows of the embedding without a token are never sampled.
  assert np.asarray(samples.tokens).max() < tokenizer.size < config.vocab_size


class TestConditioning:
  @pytest.mark.parametrize("kind", ["full", "attention", "logits"])
  @pytest.mark.parametrize("name", ARCHITECTURES)
  def test_steers_what_it_says(self, name, kind):
    model = families.build(small_decoder.make_config(name))
    steered = conditioning.steerable_leaves(model.abstract(), kind)
    leaves = jax.tree_util.tree_leaves_with_path(steered)
    names = {"/".join(k.key for k in path) for path, on in leaves if on}
    if kind == "full":
      assert len(names) == len(leaves)
    elif kind == "logits":
      tied = model.config.logits_via_embedding
      table = "token_embedder/embedding"
      assert names == {table if tied else "decoder/logits_dense/kernel"}
    else:
      kernels = {n for n in names if n.endswith("kernel")}
      assert kernels == {
        f"decoder/layers_{i}/attention/{part}/kernel"
        for i in range(3)
        for part in ("query", "key", "value", "out")
      }
      assert all("/attention/" in n for n in names)

  @pytest.mark.parametrize(("name", "scan"), SOME)
  def test_vertices_and_equal_sets_are_exact(self, name, scan):
    config = small_decoder.make_config(name, scan_layers=scan)
    sets = [small_decoder.random_params(config, seed) for seed in (0, 1)]
    bank = Bank(config, "full", num_sets=2)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    for i in range(2):
      vertex = jax.jit(bank.mix)(stacked, {}, jnp.eye(2)[i])
      jax.tree.map(np.testing.assert_array_equal, vertex, sets[i])
    start = bank.init(sets[0], jax.random.key(0))
    mixed = jax.jit(bank.mix)(start, {}, jnp.asarray([0.3, 0.7]))
    jax.tree.map(np.testing.assert_array_equal, mixed, sets[0])

  @pytest.mark.parametrize(("name", "scan"), SOME)
  @pytest.mark.slow
  def test_rows_of_their_own_are_the_mixed_policies(self, name, scan):
    """Norms, biases, tied tables and soft tokens too; long prompts as well."""
    config = small_decoder.make_config(name, scan_layers=scan)
    bank = Bank(config, "full", num_sets=2, soft_tokens=2)
    sets = [small_decoder.random_params(config, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    soft = np.random.default_rng(0).normal(size=[2, 2, 32]).astype(np.float32)
    stacked["soft_tokens"] = {"embedding": jnp.asarray(soft)}
    model = families.build(bank.model_config)
    prompts, _ = arrays(config)
    coefficients = jnp.asarray([[0.3, 0.7], [1.0, 0.0], [0.55, 0.45]])
    keys = jax.random.split(jax.random.key(3), 3)
    sampling = Sampling(
      np.arange(512) < 500, config.eos_ids, config.pad_id, temperature=0.0
    )
    rows = row_mixing.mix_rows(stacked, bank.steerable, coefficients)
    wide = jnp.pad(prompts, ((0, 0), (0, 120)), constant_values=-1)
    for given in (prompts, wide):  # the second is read policy by policy
      together = decoding.sample(
        model, rows, given, keys, sampling, max_length=6
      )
      for i, c in enumerate(coefficients):
        one = bank.mix(stacked, {}, c)
        alone = decoding.sample(
          model,
          one,
          prompts[i : i + 1],
          keys[i : i + 1],
          sampling,
          max_length=6,
        )
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        np.testing.assert_allclose(together.logp[i], alone.logp[0], atol=3e-5)


class TestFolders:
  @pytest.mark.parametrize(("name", "scan"), EVERY)
  def test_come_back_bit_for_bit(self, tmp_path, name, scan):
    model, params = interop.load_model(FIXTURES / name, scan_layers=scan)
    interop.save_model(tmp_path, model, params, "hf", max_shard_bytes=30_000)
    again, same = interop.load_model(tmp_path, scan_layers=scan)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    interop.save_model(tmp_path / "orbax", model, params, "orbax")
    again, same = interop.load_model(tmp_path / "orbax", scan_layers=scan)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)

  def test_a_sentencepiece_model_is_written_as_transformers_reads_it(
    self, tmp_path
  ):
    content = vocabulary.word_model(["council", "mill"], ["."])
    words = vocabulary.Vocabulary("here", content)
    config = small_decoder.make_config("llama", eos_ids=(1,), pad_id=0)
    model = families.build(config)
    params = small_decoder.random_params(config)
    interop.save_model(tmp_path, model, params, "hf", tokenizer=words)
    assert not (tmp_path / "vocabulary.model").exists()
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "T5Tokenizer"
    assert described["eos_token"] == "</s>"
    assert interop.find_vocabulary(tmp_path) == str(tmp_path / "spiece.model")
    read = tokenizer_files.load_tokenizer(tmp_path, model.config.eos_ids)
    assert read.files() == words.files()
    again, _ = interop.load_model(tmp_path)
    assert (again.config.eos_ids, again.config.pad_id) == ((1,), 0)

  def test_double_precision_comes_back_too(self, tmp_path):
    model, params = interop.load_model(FIXTURES / "qwen3", dtype="float64")
    interop.save_model(tmp_path, model, params, "hf")
    again, same = interop.load_model(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(same)} == {np.dtype(float)}

  def test_stacking_is_a_matter_of_layout(self):
    _, listed = interop.load_model(FIXTURES / "qwen3")
    _, stacked = interop.load_model(FIXTURES / "qwen3", scan_layers=True)
    jax.tree.map(
      np.testing.assert_array_equal, trees.unstack_layers(stacked), listed
    )

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      ({"model_type": "qwen3_moe"}, "model_type must be one of"),
      ({"model_type": "gemma4"}, "model_type must be one of"),
      ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be"),
      ({"hidden_act": "swish7"}, "hidden_act must be one of"),
      ({"quantization_config": {"bits": 4}}, "quantization_config ="),
      ({"num_key_value_heads": 4}, "not a multiple of num_kv_heads = 4"),
      ({"intermediate_size": 30}, "has shape"),
      (
        {"num_hidden_layers": 4, "layer_types": None},
        "it lacks model.layers.3",
      ),
      ({"layer_types": ["full_attention"]}, "layer_types must name"),
      ({"hidden_size": None}, "hidden_size must be a number"),
      ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
      (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5 is not supported",
      ),
    ],
  )
  def test_what_can_not_be_read_is_named(self, tmp_path, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "qwen3", folder)
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as info:
      interop.load_model(folder)
    assert "\n" not in str(info.value)

  @pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
      ("llama", {"num_attention_heads": 0}, "num_attention_heads must be"),
      ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers must be"),
      ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be"),
      ("llama", {"head_dim": "6"}, "head_dim must be a number"),
      ("llama", {"vocab_size": True}, "vocab_size must be a number"),
      ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
      ("llama", {"rope_theta": 0}, "rope_theta must be a number above 0"),
      ("llama", {"attention_bias": "no"}, "attention_bias must be true or"),
      ("llama", {"pad_token_id": [0]}, "pad_token_id must be a number"),
      ("llama", {"eos_token_id": "</s>"}, "eos_ids must be tokens"),
      ("llama", {"eos_token_id": -1}, "eos_ids must be tokens"),
      ("llama", {"attention_multiplier": 0.5}, "attention_multiplier = 0.5 is"),
      ("llama", {"logits_scaling": 8.0}, "logits_scaling = 8.0 is not"),
      ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object"),
      *(
        ("llama", {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, message)
        for kind, message in [
          *((k, "rope_type must be") for k in ("dynamic", "longrope", "yarn")),
          ("llama3", "lacks 'low_freq_factor'"),
        ]
      ),
      *(
        (
          "llama",
          {"rope_scaling": {"rope_type": "linear", "factor": factor}},
          "factor of the rotary embedding must be a number above 0",
        )
        for factor in (None, "2", 0)
      ),
      (
        "llama",
        {
          "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
          }
        },
        "high_freq_factor must be above low_freq_factor = 4, got 4",
      ),
      ("qwen2", {"rope_parameters": {"rope_theta": None}}, "rope_theta of the"),
      ("qwen3", {"num_experts": 8}, "num_experts = 8 is not supported"),
      ("qwen3", {"sliding_window": 0}, "sliding_window must be a number"),
      ("qwen3", {"layer_types": "full_attention"}, "layer_types must name"),
      ("qwen3", {"layer_types": [{}] * 3}, "layer_types must name"),
      (
        "qwen3",
        {"layer_types": None, "max_window_layers": None},
        "max_window_layers must be a number",
      ),
      ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be"),
      ("gemma2", {"final_logit_softcapping": -1.0}, "softcapping must be a"),
      ("gemma2", {"hidden_activation": None}, "hidden_activation must be one"),
      (
        "gemma3_text",
        {"layer_types": None, "sliding_window_pattern": 0},
        "sliding_window_pattern must be",
      ),
      (
        "gemma3_text",
        {"rope_parameters": {"full_attention": 8.0}},
        "rope_parameters must hold objects",
      ),
      (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention = True is not supported",
      ),
      (
        "gemma3_text",
        {"model_type": "gemma3", "text_config": "gemma3_text"},
        "text_config must be an object of model_type gemma3_text",
      ),
      (
        "gemma3_text",
        {"model_type": "gemma3", "quantization_config": {"bits": 4}},
        "quantization_config =",
      ),
    ],
  )
  def test_a_value_that_no_field_can_have_is_named(
    self, tmp_path, name, changes, message
  ):
    values = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as info:
      causal_folders.read_config(Folder(str(tmp_path)))
    assert "\n" not in str(info.value)
    assert str(info.value).startswith(str(tmp_path))

  @pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
      ("qwen2", {"num_key_value_heads": None}, {"num_kv_heads": 6}),
      ("qwen2", {"use_sliding_window": None}, {"windows": ()}),
      ("llama", {"hidden_activation": "relu"}, {}),
      ("gemma2", {"hidden_act": "relu"}, {}),
      # What no class of the family reads, or only for a window that is off.
      ("llama", {"query_pre_attn_scalar": None, "sliding_window": 0}, {}),
      ("llama", {"pretraining_tp": 2, "logit_scale": 1.0}, {}),
      (
        "qwen2",
        {
          "use_sliding_window": False,
          "layer_types": None,
          "max_window_layers": None,
          "sliding_window": 0,
        },
        {"windows": ()},
      ),
      ("qwen2", {"hidden_act": "swish"}, {}),
      (
        "gemma3_text",
        {"layer_types": None, "sliding_window_pattern": None},
        {"windows": (6,) * 5 + (0, 6)},
      ),
      ("gemma2", {"attn_logit_softcapping": None}, {"attention_cap": None}),
      ("gemma3_text", {"pad_token_id": None}, {"pad_id": -1}),
      ("gemma3_text", {"pad_token_id": 3}, {"pad_id": -1}),  # an end
      (
        "gemma3_text",
        {"rope_parameters": {"rope_theta": 8.0}},
        {"ropes": (Rope(8.0), Rope(55.0))},
      ),
      (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_theta": 8.0}}},
        {"ropes": (Rope(8.0), Rope(55.0))},
      ),
    ],
  )
  def test_null_and_what_a_class_does_not_read_change_no_more_than_they_say(
    self, tmp_path, name, changes, expected
  ):
    values = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = interop.load_config(FIXTURES / name)
    found = causal_folders.read_config(Folder(str(tmp_path)))
    assert found == dataclasses.replace(config, **expected)

  @pytest.mark.parametrize("eos", [900, [900, 3], [3, 67, 5]])
  def test_an_end_beyond_the_vocabulary_ends_nothing_and_is_logged(
    self, tmp_path, caplog, eos
  ):
    """As of a config that was cut down from a larger model's."""
    values = json.loads((FIXTURES / "qwen3" / "config.json").read_text())
    values["eos_token_id"] = eos
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = causal_folders.read_config(Folder(str(tmp_path)))
    assert config.eos_ids == tuple(i for i in np.atleast_1d(eos) if i < 67)
    (message,) = caplog.messages
    assert "eos_token_id names" in message and "vocab_size is 67" in message

  def test_padding_that_is_no_token_comes_back(self, tmp_path):
    for name in ARCHITECTURES:
      config, _ = small_decoder.save(tmp_path / name, name)
      assert config.pad_id == -1
      assert interop.load_config(tmp_path / name) == config

  def test_what_a_checkpoint_does_not_tell_is_no_hindrance(self, tmp_path):
    changes = {
      "dtype": "bfloat16",
      "remat": "full",
      "dropout_rate": 0.1,
      "num_tokens": 500,
    }
    small_decoder.save(tmp_path, "qwen3", **changes)
    config = small_decoder.make_config("qwen3")
    assert interop.load_config(tmp_path) == config

  @pytest.mark.parametrize(
    ("name", "changes"),
    [
      ("llama", {"windows": (4, 4, 4)}),
      ("llama", {"logit_cap": 9.0}),
      ("qwen2", {"out_bias": True}),
      ("qwen2", {"activation": "linear"}),
      ("qwen3", {"mlp_bias": True}),
      ("qwen3", {"windows": (4, 5, 0)}),
      ("qwen3", {"query_scale": 0.5}),
      ("gemma3_text", {"attention_cap": 7.0}),
      ("gemma3_text", {"windows": ()}),  # which says what is local
      ("gemma3_text", {"layer_ropes": (0, 0, 0)}),
      (
        "gemma3_text",
        {"ropes": (Rope(9000.0), Rope(50.0, "linear", 2.0))},
      ),
    ],
  )
  def test_a_model_that_no_class_has_is_not_written(
    self, tmp_path, name, changes
  ):
    config = small_decoder.make_config(name, **changes)
    model = families.build(config)
    params = small_decoder.random_params(config)
    message = f"transformers' {name} has no model|hidden_act must be one of"
    with pytest.raises(ValueError, match=message):
      interop.save_model(tmp_path, model, params, "hf")
    assert not list(tmp_path.iterdir())

  def test_both_layouts_of_rope_fields_are_read(self, tmp_path):
    for name in ("llama", "gemma3_text"):
      folder = tmp_path / name
      shutil.copytree(FIXTURES / name, folder)
      file = folder / "config.json"
      values = json.loads(file.read_text())
      rope = {
        "rope_theta": values.pop("rope_theta"),
        **values.pop("rope_scaling"),
      }
      if name == "gemma3_text":
        local = {
          "rope_type": "default",
          "rope_theta": values.pop("rope_local_base_freq"),
        }
        rope = {"full_attention": rope, "sliding_attention": local}
      values["rope_parameters"] = rope
      file.write_text(json.dumps(values))
      config = interop.load_config(folder)
      assert config == interop.load_config(FIXTURES / name)

  def test_a_multimodal_gemma_is_its_text_model(self, tmp_path):
    from safetensors import numpy as safetensors

    source = FIXTURES / "gemma3_text"
    text = json.loads((source / "config.json").read_text())
    index = json.loads((source / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
      tensors |= safetensors.load_file(source / file)
    for prefix in ("language_model.model.", "model.language_model."):
      folder = tmp_path / prefix
      folder.mkdir()
      values = {"model_type": "gemma3", "text_config": text, "eos_token_id": 3}
      (folder / "config.json").write_text(json.dumps(values))
      named = {prefix + k.removeprefix("model."): x for k, x in tensors.items()}
      named["vision_tower.head.weight"] = np.zeros([2, 2], np.float32)
      safetensors.save_file(named, folder / "model.safetensors")
      model, params = interop.load_model(folder)
      expected, same = interop.load_model(source)
      # transformers' class of such folders caps no logits of the vocabulary.
      assert model.config == dataclasses.replace(
        expected.config, eos_ids=(3,), logit_cap=None
      )
      jax.tree.map(np.testing.assert_array_equal, params, same)

  @pytest.mark.parametrize("is_stored", [True, False])
  def test_a_multimodal_config_may_untie_what_its_text_does_not(
    self, tmp_path, is_stored
  ):
    """transformers 5 goes by it and writes the tensor, 4 does neither."""
    from safetensors import numpy as safetensors

    config = small_decoder.make_config(
      "gemma3_text", logits_via_embedding=not is_stored
    )
    params = small_decoder.random_params(config)
    interop.save_model(tmp_path, families.build(config), params, "hf")
    file = tmp_path / "config.json"
    text = json.loads(file.read_text())
    del text["tie_word_embeddings"]
    outer = {"model_type": "gemma3", "tie_word_embeddings": False}
    file.write_text(json.dumps(outer | {"text_config": text}))
    model, found = interop.load_model(tmp_path)
    assert model.config.logits_via_embedding == (not is_stored)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    # What the text says itself is what it has to have.
    text["tie_word_embeddings"] = False
    file.write_text(json.dumps(outer | {"text_config": text}))
    if is_stored:
      assert not interop.load_config(tmp_path).logits_via_embedding
    else:
      with pytest.raises(ValueError, match="it lacks lm_head.weight"):
        interop.load_config(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) == is_stored

  def test_a_t5_is_still_asked_for_by_name(self):
    with pytest.raises(ValueError, match="is not a T5; interop.load_model"):
      interop.load_t5(FIXTURES / "llama")


IN_THE_BUCKET = """
import fsspec
import jax
import numpy as np
from etils.epath import gpath
from fsspec.implementations import memory
from clp_jax import initial, interop
from clp_jax import config as config_lib
from clp_jax.data import tokenizer_files
from clp_jax.interop import storage

# epath writes by gcsfs or TensorFlow, for which this stands.
class Written(memory.MemoryFileSystem):
  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix("gs:/"))

fsspec.register_implementation("gcs", Written)
gpath._is_tf_installed = lambda: False

def exchange(name):
  # tensorstore's bucket and epath's become one.
  folder = storage.Folder(f"gs://bucket/{name}")
  for file in folder.names(""):
    fsspec.filesystem("gcs").pipe(f"gs://bucket/{name}/{file}",
                                  folder.read(file))
  for path in fsspec.filesystem("gcs").find(f"gs://bucket/{name}"):
    storage.write(folder, path.rsplit("/", 1)[1],
                  fsspec.filesystem("gcs").cat(path))

exchange("old")
model, params = interop.load_model("gs://bucket/old")
config = config_lib.get_config()
config.model.init = "gs://bucket/old"
config.data.source_length = config.data.target_length = 60
assert not config.model.scan_layers
start = initial.load_initial(config)
jax.tree.map(np.testing.assert_array_equal, start.params, params)
tokenizer = tokenizer_files.find("gs://bucket/old", (2,), -1)
assert start.vocabulary.files() == tokenizer.files()
interop.save_model("gs://bucket/new", model, params, "hf",
                   tokenizer=tokenizer, max_shard_bytes=60_000)
exchange("new")
again, same = interop.load_model("gs://bucket/new")
assert again == model
jax.tree.map(np.testing.assert_array_equal, same, params)
print("done")
"""


def test_buckets_are_read_and_written(tmp_path):
  small_decoder.save(tmp_path / "old", "qwen3")
  objects = buckets.objects_in(tmp_path)
  done = buckets.run_beside(objects, IN_THE_BUCKET)
  assert done.stdout == "done\n", done.stderr
  found = {name.removeprefix("new/") for name in objects if "new/" in name}
  assert {*small_decoder.tokenizer_files(), "config.json"} < found
  assert "generation_config.json" in found
  assert sum(name.endswith(".safetensors") for name in found) > 1


def test_a_config_comes_back_from_json():
  for name in ARCHITECTURES:
    config = small_decoder.make_config(name)
    values = json.loads(json.dumps(families.to_json(config)))
    assert families.from_json(values) == config
  with pytest.raises(ValueError, match="family must be one of t5, causal"):
    families.from_json({"family": "mamba"})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_kv_heads": 3}, "is not a multiple of num_kv_heads"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"windows": (1, 2)}, "windows has 2 entries for 16 layers"),
    ({"eos_ids": (2,), "pad_id": 2}, "a token that ends nothing"),
    ({"activation": "tanh"}, "activation must be one of"),
    ({"num_layers": 0}, "num_layers must be a positive integer"),
  ],
)
def test_a_config_that_is_none_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    CausalConfig(**changes)

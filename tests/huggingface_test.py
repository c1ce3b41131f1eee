"""Hugging Face folders: what transformers wrote, round trips, bad folders."""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import small_t5
from small_t5 import FIXTURES, V1_0, V1_1

from clp_jax import interop, sharding
from clp_jax.data.vocabulary import word_model
from clp_jax.interop import huggingface, leaves, safetensors_file
from clp_jax.interop.storage import Folder
from clp_jax.models import t5

VOCABULARY = word_model([f"word{i}" for i in range(30)], [".", ","])
HEAD = "lm_head.weight"
ALIAS = "decoder.embed_tokens.weight"
UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
)


def save(folder, config=V1_1, dtype="float32", **options):
  """Saves random parameters, and returns them."""
  params = small_t5.random_params(config, dtype)
  interop.save_t5(folder, config, params, "hf", **options)
  return params


def tensors_of(folder):
  """{name: array} as the safetensors library reads them."""
  found = {}
  for file in folder.glob("*.safetensors"):
    with safetensors.safe_open(file, "numpy") as opened:
      found |= {name: opened.get_tensor(name) for name in opened.keys()}
  return found


def write_tensors(folder, tensors):
  from safetensors.numpy import save_file

  arrays = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
  save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def fails(folder, message):
  """load_t5 refuses the folder on one line that says this."""
  with pytest.raises(ValueError) as info:
    interop.load_t5(folder)
  text = str(info.value)
  assert message in text and "\n" not in text, text


class TestWhatTransformersWrote:
  @pytest.mark.parametrize(
    "folder, case", [("hf_v1_0", "v1_0"), ("hf_mt5", "v1_1")]
  )
  def test_gives_its_parameters_and_logits(self, folder, case):
    case = np.load(FIXTURES / f"transformers_{case}.npz")
    config, params = interop.load_t5(FIXTURES / folder)
    expected = {
      name.removeprefix("params/"): case[name]
      for name in case
      if name.startswith("params/")
    }
    small_t5.assert_same(params, leaves.unflatten(expected))
    source = case["encoder_input_tokens"]
    lengths = (source != 0).sum(-1)
    assert lengths.max() > config.relative_attention_max_distance
    assert len(set(lengths)) > 1
    logits = jax.jit(t5.T5(config).apply)(
      {"params": params}, source, case["decoder_input_tokens"]
    )
    np.testing.assert_allclose(
      logits[:, case["positions"]], case["logits"], atol=1e-4
    )

  def test_gives_its_config(self):
    config, _ = interop.load_t5(FIXTURES / "hf_mt5")
    assert config == t5.T5Config(
      vocab_size=100,
      emb_dim=20,
      num_heads=3,
      head_dim=8,
      num_encoder_layers=2,
      num_decoder_layers=3,
      mlp_dim=28,
      eos_ids=(1,),
    )

  def test_is_written_back_as_it_was(self, tmp_path):
    for name in ("hf_v1_0", "hf_mt5"):
      config, params = interop.load_t5(FIXTURES / name)
      interop.save_t5(tmp_path / name, config, params, "hf")
      old, new = tensors_of(FIXTURES / name), tensors_of(tmp_path / name)
      assert old.keys() == new.keys()
      for tensor in old:
        assert old[tensor].tobytes() == new[tensor].tobytes(), tensor
      before = json.loads((FIXTURES / name / "config.json").read_text())
      after = json.loads((tmp_path / name / "config.json").read_text())
      for field in after.keys() & before.keys() - {
        "model_type",
        "architectures",
      }:
        assert after[field] == before[field], field


class TestRoundTrip:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
  @pytest.mark.parametrize("config", [V1_0, V1_1], ids=["v1_0", "v1_1"])
  def test_keeps_every_bit(self, tmp_path, config, dtype):
    params = save(tmp_path, config, dtype)
    loaded_config, loaded = interop.load_t5(tmp_path)
    assert loaded_config == config
    small_t5.assert_same(loaded, params)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["torch_dtype"] == dtype

  def test_keeps_other_activations_and_distances(self, tmp_path):
    config = dataclasses.replace(
      V1_1,
      mlp_activations=("silu", "linear"),
      relative_attention_num_buckets=16,
      relative_attention_max_distance=70,
      dropout_rate=0.25,
    )
    save(tmp_path, config)
    assert interop.load_t5(tmp_path)[0] == config

  def test_takes_devices_arrays_and_scanned_layers(self, tmp_path):
    scanned = dataclasses.replace(V1_1, scan_layers=True)
    params = small_t5.random_params(scanned)
    interop.save_t5(tmp_path, scanned, jax.device_put(params), "hf")
    config, loaded = interop.load_t5(tmp_path)
    assert config == V1_1
    small_t5.assert_same(loaded, t5.unstack_layers(params))
    config, loaded = interop.load_t5(tmp_path, scan_layers=True)
    assert config == scanned
    small_t5.assert_same(loaded, params)

  def test_converts_the_dtype_when_asked(self, tmp_path):
    params = save(tmp_path, dtype="bfloat16")
    _, loaded = interop.load_t5(tmp_path, dtype="float32")
    small_t5.assert_same(
      loaded, jax.tree.map(lambda x: x.astype("float32"), params)
    )

  def test_splits_large_weights_over_files_with_an_index(self, tmp_path):
    params = save(tmp_path, max_shard_bytes=4000)
    files = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = tensors_of(tmp_path)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(
      a.nbytes for a in found.values()
    )
    for tensor, file in index["weight_map"].items():
      with safetensors.safe_open(tmp_path / file, "numpy") as opened:
        assert tensor in opened.keys()
        assert opened.metadata() == {"format": "pt"}
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)
    # A model that is saved over it leaves nothing of it.
    params = save(tmp_path, V1_0)
    assert not list(tmp_path.glob("model-*"))
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)


class TestLogitLayer:
  """Tied or untied, by the config and by what the folder holds."""

  def load(self, folder, tensors=None, drop=(), **fields):
    if tensors is not None:
      write_tensors(folder, tensors)
    small_t5.edit_json(folder / "config.json", drop=drop, **fields)
    config, params = interop.load_t5(folder)
    tied = "logits_dense" not in params["decoder"]
    assert config.logits_via_embedding == tied
    return params

  SCALE = ("scale_decoder_outputs",)

  def test_v1_1_as_transformers_5_describes_it(self, tmp_path):
    params = save(tmp_path, V1_1)
    loaded = self.load(
      tmp_path, tie_word_embeddings=True, scale_decoder_outputs=False
    )
    small_t5.assert_same(loaded, params)

  def test_v1_0_as_transformers_5_describes_it(self, tmp_path):
    params = save(tmp_path, V1_0)
    loaded = self.load(
      tmp_path, tie_word_embeddings=True, scale_decoder_outputs=True
    )
    small_t5.assert_same(loaded, params)

  def test_v1_0_whose_config_does_not_say(self, tmp_path):
    params = save(tmp_path, V1_0)
    drop = ("tie_word_embeddings", "scale_decoder_outputs")
    small_t5.assert_same(self.load(tmp_path, drop=drop), params)

  def test_v1_0_with_a_copy_of_its_embedding(self, tmp_path):
    params = save(tmp_path, V1_0)
    tensors = tensors_of(tmp_path)
    tensors[HEAD] = tensors["shared.weight"]
    loaded = self.load(tmp_path, tensors, drop=self.SCALE)
    small_t5.assert_same(loaded, params)

  def test_a_layer_of_its_own_is_kept_against_the_config(self, tmp_path):
    params = save(tmp_path, V1_1)
    loaded = self.load(tmp_path, drop=self.SCALE, tie_word_embeddings=True)
    small_t5.assert_same(loaded, params)

  def test_v1_1_that_transformers_5_has_tied_is_not_scaled(self, tmp_path):
    params = save(tmp_path, V1_1)
    tensors = tensors_of(tmp_path)
    del tensors[HEAD]
    loaded = self.load(
      tmp_path, tensors, tie_word_embeddings=True, scale_decoder_outputs=False
    )
    embedding = params["token_embedder"]["embedding"]
    params["decoder"]["logits_dense"]["kernel"] = embedding.T
    small_t5.assert_same(loaded, params)

  def test_a_scaled_layer_of_its_own_is_refused(self, tmp_path):
    save(tmp_path, V1_1)
    small_t5.edit_json(tmp_path / "config.json", scale_decoder_outputs=True)
    fails(tmp_path, "lm_head.weight differs from shared.weight")

  def test_untied_without_a_layer_is_refused(self, tmp_path):
    save(tmp_path, V1_1)
    tensors = tensors_of(tmp_path)
    del tensors[HEAD]
    write_tensors(tmp_path, tensors)
    small_t5.edit_json(tmp_path / "config.json", drop=self.SCALE)
    fails(tmp_path, "it lacks lm_head.weight")

  def test_the_embedding_may_have_its_other_names(self, tmp_path):
    params = save(tmp_path, V1_1)
    tensors = tensors_of(tmp_path)
    tensors[ALIAS] = tensors.pop("shared.weight")
    tensors[UNUSED] = np.ones((32, 2), np.float32)
    small_t5.assert_same(self.load(tmp_path, tensors), params)
    tensors["encoder.embed_tokens.weight"] = tensors[ALIAS].copy()
    small_t5.assert_same(self.load(tmp_path, tensors), params)
    tensors["encoder.embed_tokens.weight"][47, 11] += 1
    write_tensors(tmp_path, tensors)
    fails(tmp_path, "encoder.embed_tokens.weight that differs")


class TestSharded:
  def test_arrays_lie_as_asked(self, tmp_path):
    params = save(tmp_path)
    mesh = sharding.make_mesh(4, 2)

    def shardings(config):
      return sharding.param_shardings(
        mesh,
        t5.logical_axes(config),
        t5.abstract_params(config),
        fsdp=True,
      )

    for scan_layers in (False, True):
      config, loaded = interop.load_t5(
        tmp_path, shardings, scan_layers=scan_layers
      )
      expected = t5.stack_layers(params) if scan_layers else params
      small_t5.assert_same(loaded, expected)
      at = shardings(config)
      assert jax.tree.map(lambda x: x.sharding, loaded) == at
      _, again = interop.load_t5(tmp_path, at, scan_layers=scan_layers)
      assert jax.tree.map(lambda x: x.sharding, again) == at

  def test_a_tree_that_does_not_fit_is_refused(self, tmp_path):
    save(tmp_path)
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="shardings must be a tree like"):
      interop.load_t5(
        tmp_path,
        lambda config: {"token_embedder": sharding.replicated(mesh)},
      )

  def test_a_part_is_read_without_the_rest(self, tmp_path, monkeypatch):
    params = save(tmp_path, max_shard_bytes=4000)
    _, stored = huggingface.open_folder(Folder(str(tmp_path)), mapped=True)
    read_into, sizes = Folder.read_into, []

    def counted(self, name, offset, array):
      sizes.append(array.nbytes)
      read_into(self, name, offset, array)

    monkeypatch.setattr(Folder, "read_into", counted)
    embedding = stored["token_embedder/embedding"]
    part = embedding.read((slice(12, 24), slice(None)))
    np.testing.assert_array_equal(
      part, params["token_embedder"]["embedding"][12:24]
    )
    assert sizes == [12 * 12 * 4]
    # Kernels lie transposed: a slice of columns is a slice of their rows.
    kernel = stored["decoder/layers_1/self_attention/query/kernel"]
    part = kernel.read((slice(None), slice(4, 8)))
    query = params["decoder"]["layers_1"]["self_attention"]["query"]["kernel"]
    np.testing.assert_array_equal(part, query[:, 4:8])
    assert sizes[1:] == [4 * 12 * 4]

  def test_blocks_of_rows_are_put_together(self, tmp_path, monkeypatch):
    params = save(tmp_path)
    monkeypatch.setattr(safetensors_file, "_BLOCK", 100)
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)
    _, stored = huggingface.open_folder(Folder(str(tmp_path)), mapped=True)
    part = stored["decoder/logits_dense/kernel"].read(
      (slice(3, 7), slice(20, 31))
    )
    head = params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(part, head[3:7, 20:31])


class TestVocabulary:
  def test_lies_beside_the_weights(self, tmp_path):
    save(tmp_path, vocabulary=VOCABULARY)
    found = interop.find_vocabulary(tmp_path)
    assert found == str(tmp_path / "spiece.model")
    assert pathlib.Path(found).read_bytes() == VOCABULARY
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
      "decoder_start_token_id": 0,
      "eos_token_id": 1,
      "pad_token_id": 0,
    }
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "</s>" and tokenizer["extra_ids"] == 0

  def test_none_is_found_where_there_is_none(self, tmp_path):
    save(tmp_path)
    assert interop.find_vocabulary(tmp_path) is None

  def test_must_fit_the_embedding_and_be_one(self, tmp_path):
    large = word_model([f"word{i}" for i in range(60)], ["."])
    with pytest.raises(ValueError, match="has 64 pieces.* embeds 48"):
      save(tmp_path / "a", vocabulary=large)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
      save(tmp_path / "b", vocabulary=b"junk")
    assert not list(tmp_path.iterdir())


class TestBadFolders:
  @pytest.fixture
  def folder(self, tmp_path):
    save(tmp_path)
    return tmp_path

  def test_what_is_no_t5(self, folder):
    fails(folder / "nowhere", "is no folder")
    fails(folder / "config.json", "is no folder")
    (folder / "empty").mkdir()
    fails(folder / "empty", "holds no model: expected config.json")
    small_t5.edit_json(folder / "config.json", model_type="bart")
    fails(folder, "config.json: model_type must be one of t5, mt5, llama")
    (folder / "model.json").write_text("{}")
    fails(folder, "is a run of clp")

  @pytest.mark.parametrize(
    "content", ['{"model_type": "t5", ', "[1]", b"\xff\xfe\x00"]
  )
  def test_an_unreadable_config(self, folder, content):
    file = folder / "config.json"
    if isinstance(content, str):
      content = content.encode()
    file.write_bytes(content)
    fails(folder, "config.json")

  @pytest.mark.parametrize(
    "fields, message",
    [
      ({"feed_forward_proj": "gelu"}, "feed_forward_proj must be one of"),
      ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon must be 1e-06"),
      ({"decoder_start_token_id": 2}, "decoder_start_token_id must be 0"),
      ({"d_model": "wide"}, "emb_dim must be a positive integer"),
      ({"is_encoder_decoder": False}, "only an encoder"),
    ],
  )
  def test_a_config_that_is_not_supported(self, folder, fields, message):
    small_t5.edit_json(folder / "config.json", **fields)
    fails(folder, message)

  def test_a_config_without_sizes(self, folder):
    small_t5.edit_json(folder / "config.json", drop=("d_kv", "d_ff"))
    fails(folder, "lacks d_kv, d_ff")

  def test_missing_and_extra_tensors_are_named(self, folder):
    tensors = tensors_of(folder)
    name = "decoder.block.1.layer.0.SelfAttention.q.weight"
    del tensors[name]
    tensors["encoder.block.2.layer.0.layer_norm.weight"] = np.ones(
      12, np.float32
    )
    write_tensors(folder, tensors)
    fails(
      folder,
      f"it lacks {name}; it holds encoder.block.2.layer.0.layer_norm.weight",
    )

  def test_a_wrong_shape_is_shown_with_the_right_one(self, folder):
    small_t5.edit_json(folder / "config.json", vocab_size=64)
    fails(folder, "shared.weight has shape (48, 12), expected (64, 12)")

  @pytest.mark.parametrize("keep", [0, 5, 200, -1])
  def test_a_truncated_file(self, folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(folder, "model.safetensors is not a complete safetensors file")

  def test_a_file_of_something_else(self, folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 100)
    fails(folder, "model.safetensors is not a complete safetensors file")

  @pytest.mark.parametrize(
    "change",
    [
      {"data_offsets": [0, 4]},
      {"shape": [48, 13]},
      {"dtype": "I64"},
      {"data_offsets": None},
    ],
  )
  def test_a_header_that_contradicts_itself(self, folder, change):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["shared.weight"] |= change
    encoded = json.dumps(header).encode()
    file.write_bytes(
      len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]
    )
    fails(folder, "model.safetensors is not a complete safetensors file")

  def test_a_folder_without_weights(self, folder):
    (folder / "model.safetensors").unlink()
    fails(folder, "holds no weights: expected model.safetensors")

  def test_an_index_that_does_not_fit(self, folder):
    save(folder, max_shard_bytes=4000)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    files = set(values["weight_map"].values())
    values["weight_map"]["invented"] = sorted(files)[0]
    index.write_text(json.dumps(values))
    fails(folder, "names invented, which no file holds")
    (folder / sorted(files)[1]).unlink()
    fails(folder, f"lacks {sorted(files)[1]}")
    index.write_text("{}")
    fails(folder, "lacks weight_map")

  def test_torch_weights_without_torch(self, folder, monkeypatch):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(folder, "pytorch_model.bin needs PyTorch: pip install torch")


class TestSaving:
  def test_refuses_what_it_can_not_write(self, tmp_path):
    params = small_t5.random_params(V1_1)
    save_t5 = functools.partial(interop.save_t5, tmp_path / "model")
    with pytest.raises(ValueError, match="one of hf, t5x, .*got 'gguf'"):
      save_t5(V1_1, params, "gguf")
    with pytest.raises(ValueError, match="lacks decoder/layers_0/mlp/wi/"):
      save_t5(V1_0, params, "hf")
    odd = dataclasses.replace(V1_1, mlp_activations=("linear", "gelu"))
    with pytest.raises(ValueError, match="transformers has no T5 with"):
      save_t5(odd, params, "hf")
    whole = jax.tree.map(lambda x: x.astype("int32"), params)
    with pytest.raises(ValueError, match="is of dtype int32, expected"):
      save_t5(V1_1, whole, "hf")
    # It holds no model either.
    assert not (tmp_path / "model" / "config.json").exists()

  def test_the_safetensors_library_reads_the_same(self, tmp_path):
    params = save(tmp_path, dtype="bfloat16")
    found = tensors_of(tmp_path)
    np.testing.assert_array_equal(
      found["shared.weight"].astype("float32"),
      params["token_embedder"]["embedding"].astype("float32"),
    )
    query = params["decoder"]["layers_1"]["self_attention"]["query"]["kernel"]
    stored = found["decoder.block.1.layer.0.SelfAttention.q.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      stored.astype("float32"), query.T.astype("float32")
    )

"""t5x's checkpoints and Orbax's: both layouts, round trips, bad ones."""

import dataclasses
import json
import pathlib
import shutil

import buckets
import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_t5

from clp_jax import interop, sharding
from clp_jax.data.vocabulary import word_model
from clp_jax.interop import leaves, t5x
from clp_jax.interop.storage import Folder
from clp_jax.models import t5

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = word_model([f"word{i}" for i in range(30)], ["."])
FORMATS = ("t5x", "t5x-orbax", "orbax")
# t5x's files say nothing of a vocabulary.
V1_0 = dataclasses.replace(small_t5.V1_0, eos_ids=())
V1_1 = dataclasses.replace(small_t5.V1_1, eos_ids=())
NORM = "target.encoder.encoder_norm.scale"


def save(folder, config=V1_1, dtype="float32", format="t5x", **options):
  """Saves random parameters, and returns them."""
  params = small_t5.random_params(config, dtype, options.get("step", 0))
  interop.save_t5(folder, config, params, format, **options)
  return params


def fails(folder, message):
  """load_t5 refuses the folder on one line that says this."""
  with pytest.raises(ValueError) as info:
    interop.load_t5(folder)
  text = str(info.value)
  assert message in text and "\n" not in text, text


def edit_msgpack(checkpoint, change):
  file = checkpoint / "checkpoint"
  values = flax.serialization.msgpack_restore(file.read_bytes())
  file.write_bytes(flax.serialization.msgpack_serialize(change(values)))


@pytest.mark.parametrize("version", ["v1_0", "v1_1"])
def test_what_t5x_wrote_gives_its_logits(version):
  folder = SHARED / f"t5x_tiny_{version}"
  if not folder.exists():
    pytest.skip(f"needs {folder}, a checkpoint that t5x wrote")
  expected = np.load(folder / "expected.npz")
  config, params = interop.load_t5(folder)
  assert config.logits_via_embedding == (version == "v1_0")
  assert len(config.mlp_activations) == (2 if version == "v1_1" else 1)
  logits = jax.jit(t5.T5(config).apply)(
    {"params": params},
    expected["encoder_input_tokens"].astype(np.int32),
    expected["decoder_input_tokens"].astype(np.int32),
  )
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
  _, same = interop.load_t5(folder / "checkpoint_1000")
  small_t5.assert_same(same, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_t5x_reads_what_is_written(tmp_path, dtype):
  try:
    from t5x import checkpoints
  except Exception as error:  # beside a current JAX it raises all sorts
    pytest.skip(f"needs t5x, which is on no package index: {error!r}")
  params = save(tmp_path, dtype=dtype, step=12)
  loaded = checkpoints.load_t5x_checkpoint(str(tmp_path))
  small_t5.assert_same(loaded["target"], params)
  assert loaded["state"]["step"] == 12


class TestRoundTrip:
  @pytest.mark.parametrize("format", FORMATS)
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  @pytest.mark.parametrize("config", [V1_0, V1_1], ids=["v1_0", "v1_1"])
  def test_keeps_every_bit(self, tmp_path, config, dtype, format):
    params = save(tmp_path, config, dtype, format)
    loaded_config, loaded = interop.load_t5(tmp_path)
    assert loaded_config == config
    small_t5.assert_same(loaded, params)

  @pytest.mark.parametrize("format", FORMATS)
  def test_takes_devices_arrays_and_scanned_layers(self, tmp_path, format):
    scanned = dataclasses.replace(V1_1, scan_layers=True)
    params = small_t5.random_params(scanned, "bfloat16")
    interop.save_t5(tmp_path, scanned, jax.device_put(params), format)
    config, loaded = interop.load_t5(tmp_path)
    assert config == V1_1
    small_t5.assert_same(loaded, t5.unstack_layers(params))
    config, loaded = interop.load_t5(
      tmp_path, scan_layers=True, dtype="float32"
    )
    assert config == scanned
    small_t5.assert_same(
      loaded, jax.tree.map(lambda x: x.astype("float32"), params)
    )

  @pytest.mark.parametrize("format", FORMATS)
  def test_arrays_lie_as_asked(self, tmp_path, format):
    params = save(tmp_path, format=format)
    mesh = sharding.make_mesh(4, 2)

    def shardings(config):
      return sharding.param_shardings(
        mesh, t5.logical_axes(config), t5.abstract_params(config), fsdp=True
      )

    config, loaded = interop.load_t5(tmp_path, shardings)
    small_t5.assert_same(loaded, params)
    at = shardings(config)
    assert jax.tree.map(lambda x: x.sharding, loaded) == at

  def test_another_model_takes_the_place_of_an_orbax_one(self, tmp_path):
    save(tmp_path, V1_1, format="orbax")
    params = save(tmp_path, V1_0, format="orbax")
    config, loaded = interop.load_t5(tmp_path)
    assert config == V1_0
    small_t5.assert_same(loaded, params)

  def test_orbax_restores_what_is_written_for_it(self, tmp_path):
    params = save(tmp_path, format="orbax", vocabulary=VOCABULARY)
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(tmp_path / "params")
    small_t5.assert_same(restored, params)
    fields = json.loads((tmp_path / "model.json").read_text())
    assert t5.T5Config(**fields) == dataclasses.replace(V1_1, eos_ids=(1,))
    assert interop.find_vocabulary(tmp_path) == str(
      tmp_path / "vocabulary.model"
    )

  def test_large_arrays_are_cut_into_chunks(self, tmp_path, monkeypatch):
    monkeypatch.setattr(t5x, "_CHUNK_BYTES", 600)
    params = save(tmp_path)
    embedding = tmp_path / "checkpoint_0" / "target.token_embedder.embedding"
    assert len(list(embedding.glob("*.0"))) == 4
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)


class TestSteps:
  def test_the_newest_complete_one_is_read(self, tmp_path):
    older = save(tmp_path, step=9)
    newer = save(tmp_path, step=30, format="t5x-orbax")
    (tmp_path / "checkpoint_200").mkdir()  # an interrupted copy
    (tmp_path / "checkpoint_300.tmp-1234").mkdir()
    small_t5.assert_same(interop.load_t5(tmp_path)[1], newer)
    small_t5.assert_same(interop.load_t5(tmp_path / "checkpoint_9")[1], older)

  def test_a_path_of_a_step_is_that_step(self, tmp_path):
    params = save(tmp_path / "checkpoint_5", step=7, vocabulary=VOCABULARY)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
      "checkpoint_5",
      "spiece.model",
    ]
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)
    found = interop.find_vocabulary(tmp_path / "checkpoint_5")
    assert pathlib.Path(found).read_bytes() == VOCABULARY

  def test_a_step_is_not_written_over(self, tmp_path):
    params = save(tmp_path, step=7)
    with pytest.raises(ValueError, match="checkpoint_7 is there already"):
      save(tmp_path, V1_0, step=7)
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)


class TestLegacyLayout:
  def test_descriptions_are_those_of_t5x(self, tmp_path):
    save(tmp_path, dtype="bfloat16", step=4)
    content = (tmp_path / "checkpoint_4" / "checkpoint").read_bytes()
    values = flax.serialization.msgpack_restore(content)
    assert values.keys() == {"version", "optimizer"}
    assert values["version"] == 3
    state = values["optimizer"]["state"]
    assert state["step"].dtype == np.int32 and state["step"] == 4
    target = values["optimizer"]["target"]
    assert target["encoder"]["encoder_norm"]["scale"] == {
      "driver": "zarr",
      "dtype": "bfloat16",
      "kvstore": {"driver": "file", "path": f"{NORM}/"},
      "metadata": {
        "chunks": [12],
        "compressor": {"id": "gzip", "level": 1},
        "shape": [12],
      },
    }

  def test_older_descriptions_and_inline_arrays_are_read(self, tmp_path):
    params = save(tmp_path)

    def change(values):
      encoder = values["optimizer"]["target"]["encoder"]
      spec = encoder["layers_0"]["mlp"]["wo"]["kernel"]
      spec["path"] = spec["kvstore"].pop("path").rstrip("/")
      spec["kvstore"] = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
      encoder["encoder_norm"]["scale"] = params["encoder"]["encoder_norm"][
        "scale"
      ]
      return values

    edit_msgpack(tmp_path / "checkpoint_0", change)
    shutil.rmtree(tmp_path / "checkpoint_0" / NORM)
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)

  def test_the_optimizer_is_not_touched(self, tmp_path):
    params = save(tmp_path)

    def change(values):
      values["optimizer"]["state"]["param_states"] = {
        "token_embedder": {
          "embedding": {
            "v": {
              "driver": "zarr",
              "dtype": "float32",
              "kvstore": {"driver": "file", "path": "state.absent/"},
              "metadata": {"shape": [48, 12]},
            }
          }
        }
      }
      return values

    edit_msgpack(tmp_path / "checkpoint_0", change)
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params)

  def test_a_part_is_read_without_the_rest(self, tmp_path, monkeypatch):
    monkeypatch.setattr(t5x, "_CHUNK_BYTES", 600)  # 12 rows
    params = save(tmp_path)
    folder = tmp_path / "checkpoint_0"
    for chunk in ("0.0", "2.0", "3.0"):
      (folder / "target.token_embedder.embedding" / chunk).unlink()
    _, stored = t5x.open_checkpoint(Folder(str(folder)))
    part = stored["token_embedder/embedding"].read((slice(12, 24), slice(2, 5)))
    embedding = params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(part, embedding[12:24, 2:5])
    # A chunk that got lost is not taken for zeros.
    fails(tmp_path, "can't read token_embedder/embedding of")


class TestOrbaxLayout:
  @pytest.mark.parametrize("use_ocdbt", [True, False])
  def test_only_target_is_read(self, tmp_path, use_ocdbt):
    params = small_t5.random_params(V1_1, "bfloat16")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
    tree = {
      "target": params,
      "state": {
        "step": np.int32(3),
        "param_states": {"targets": np.ones(3, np.float32)},
      },
    }
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(
        tmp_path / "checkpoint_3" / "state", ocp.args.PyTreeSave(tree)
      )
    config, loaded = interop.load_t5(tmp_path)
    assert config == V1_1
    small_t5.assert_same(loaded, params)

  def test_a_damaged_file_is_an_error(self, tmp_path):
    save(tmp_path, format="t5x-orbax")
    state = tmp_path / "checkpoint_0" / "state"
    for file in state.rglob("d/*"):
      file.write_bytes(file.read_bytes()[:-20])
    fails(tmp_path, "can't read ")


class TestBadCheckpoints:
  @pytest.fixture
  def folder(self, tmp_path):
    save(tmp_path)
    return tmp_path / "checkpoint_0"

  def test_what_is_no_checkpoint(self, folder):
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    fails(folder, "checkpoint is not a t5x checkpoint")

  def test_old_versions(self, folder):
    edit_msgpack(folder, lambda values: values | {"version": 1})
    fails(folder, "is of version 1; expected 3")

  def test_another_model(self, folder):
    edit_msgpack(
      folder,
      lambda values: (
        values
        | {"optimizer": {"target": {"dense": {"kernel": np.ones((2, 3))}}}}
      ),
    )
    fails(folder, "expected token_embedder/embedding with 2 dimensions")

  def test_scanned_layers_of_t5x(self, folder):
    def change(values):
      target = values["optimizer"]["target"]
      target["encoder"] = {"encoder": target["encoder"]}
      return values

    edit_msgpack(folder, change)
    fails(folder, "scalable_t5 can't be read")

  def test_missing_and_extra_tensors_are_named(self, folder):
    def change(values):
      target = values["optimizer"]["target"]
      del target["decoder"]["layers_1"]["mlp"]["wi_1"]
      target["decoder"]["layers_1"]["mlp"]["wi_2"] = target["decoder"][
        "layers_0"
      ]["mlp"]["wi_1"]
      return values

    edit_msgpack(folder, change)
    fails(
      folder,
      "it lacks decoder/layers_1/mlp/wi_1/kernel; it holds "
      "decoder/layers_1/mlp/wi_2/kernel as well",
    )

  def test_a_wrong_shape_is_shown_with_the_right_one(self, folder):
    def change(values):
      target = values["optimizer"]["target"]
      target["decoder"]["decoder_norm"]["scale"] = np.ones(11, np.float32)
      return values

    edit_msgpack(folder, change)
    fails(folder, "decoder_norm/scale has shape (11,), expected (12,)")

  def test_integers(self, folder):
    def change(values):
      target = values["optimizer"]["target"]
      target["decoder"]["decoder_norm"]["scale"] = np.ones(12, np.uint16)
      return values

    edit_msgpack(folder, change)
    fails(folder, "decoder/decoder_norm/scale is of dtype uint16")

  def test_a_folder_that_got_lost(self, folder):
    shutil.rmtree(folder / NORM)
    fails(folder, "can't read encoder/encoder_norm/scale of")

  def test_model_json_of_an_orbax_folder(self, tmp_path):
    save(tmp_path / "model", format="orbax")
    small_t5.edit_json(tmp_path / "model" / "model.json", vocab_size=47)
    fails(tmp_path / "model", "has shape (48, 12), expected (47, 12)")
    (tmp_path / "model" / "model.json").write_text('{"vocab": 3}')
    fails(tmp_path / "model", "model.json")

  def test_a_config_that_the_tree_does_not_tell_is_not_written(self, tmp_path):
    for fields in (
      {"mlp_activations": ("silu", "linear")},
      {"relative_attention_max_distance": 64},
    ):
      config = dataclasses.replace(V1_1, **fields)
      with pytest.raises(ValueError, match=next(iter(fields))):
        save(tmp_path / "model", config)


IN_THE_BUCKET = """
import sys
import numpy as np
from clp_jax import interop
from clp_jax.interop import leaves

def load(name):
  config, params = interop.load_t5(f"gs://bucket/{name}")
  np.savez(f"{sys.argv[1]}/{name}", **leaves.flatten(params))
  return config, params

load("legacy")
load("orbax")
config, params = load("hf")
with open(f"{sys.argv[1]}/spiece.model", "rb") as file:
  vocabulary = file.read()
interop.save_t5("gs://bucket/new", config, params, "t5x",
                vocabulary=vocabulary)
assert interop.find_vocabulary("gs://bucket/new") == (
  "gs://bucket/new/spiece.model"
)
load("new")
print([m for m in ("tensorflow", "torch") if m in sys.modules])
"""


def test_buckets_are_read_and_written_by_tensorstore(tmp_path):
  legacy = save(tmp_path / "legacy", step=3)
  save(tmp_path / "legacy", step=2)
  save(tmp_path / "orbax", format="t5x-orbax", step=3)
  save(tmp_path / "hf", format="hf", step=3, max_shard_bytes=9000)
  (tmp_path / "spiece.model").write_bytes(VOCABULARY)
  objects = buckets.objects_in(tmp_path)
  done = buckets.run_beside(objects, IN_THE_BUCKET, tmp_path)
  assert done.stdout == "[]\n", done.stderr
  for name in ("legacy", "orbax", "hf", "new"):
    loaded = leaves.unflatten(dict(np.load(tmp_path / f"{name}.npz")))
    small_t5.assert_same(loaded, legacy)

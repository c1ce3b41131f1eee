"""Folders between this package and Hugging Face's transformers, both ways."""

import json

import jax
import numpy as np
import pytest
import small_t5
from flax import traverse_util

import clp_jax
from clp_jax import conditioning, interop, run_folder, saved_params, sharding
from clp_jax import config as config_lib
from clp_jax.data.vocabulary import word_model
from clp_jax.initial import load_initial
from clp_jax.models import t5

pytestmark = pytest.mark.parity
torch = pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
transformers = pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)

from parity import make_fixtures, make_folders  # noqa: E402

WORDS = [f"word{i}" for i in range(60)]
VOCABULARY = word_model(WORDS, [".", ","])


def params_of(model):
  flat = make_fixtures.t5x_params(model)
  return traverse_util.unflatten_dict(flat, sep="/")


def model_in(folder):
  """T5ForConditionalGeneration, which must use every tensor and lack none."""
  model, info = transformers.T5ForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  return model.eval()


@pytest.mark.parametrize("name", ["hf_v1_0", "hf_mt5"])
def test_the_stored_folders_are_what_transformers_writes(name, tmp_path):
  model, size = make_folders.folders()[name]
  model.save_pretrained(tmp_path, max_shard_size=size)
  stored = make_fixtures.FIXTURES / name
  assert sorted(p.name for p in stored.iterdir()) == sorted(
    p.name for p in tmp_path.iterdir()
  )
  small_t5.assert_same(interop.load_t5(stored)[1], interop.load_t5(tmp_path)[1])


def test_mt5_computes_what_the_stored_logits_say():
  case = np.load(make_fixtures.FIXTURES / "transformers_v1_1.npz")
  model, _ = make_folders.folders()["hf_mt5"]
  np.testing.assert_allclose(
    make_folders.logits(model, case), case["logits"], atol=1e-4
  )


@pytest.mark.parametrize("version", ["v1_0", "v1_1"])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000])
def test_transformers_computes_the_same_with_a_written_folder(
  tmp_path, version, max_shard_bytes
):
  case = make_fixtures.make_case(version, seed=5)
  params = traverse_util.unflatten_dict(
    {k.removeprefix("params/"): v for k, v in case.items() if "params/" in k},
    sep="/",
  )
  config = t5.T5Config(**make_fixtures.config_fields(version))
  interop.save_t5(
    tmp_path, config, params, "hf", max_shard_bytes=max_shard_bytes
  )
  model = model_in(tmp_path)
  assert model.config.tie_word_embeddings == (version == "v1_0")
  assert model.generation_config.eos_token_id == 1
  np.testing.assert_allclose(
    make_folders.logits(model, case), case["logits"], atol=1e-5
  )


class TestTorchFiles:
  @pytest.mark.parametrize("version", ["v1_0", "v1_1"])
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_are_read_whole_and_in_parts(self, tmp_path, version, dtype):
    model = make_fixtures.transformers_model(version, seed=6)
    expected = jax.tree.map(lambda p: p.astype(dtype), params_of(model))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "whole", safe_serialization=False)
    model.save_pretrained(
      tmp_path / "parts", safe_serialization=False, max_shard_size=30_000
    )
    assert (tmp_path / "whole" / "pytorch_model.bin").exists()
    assert len(list((tmp_path / "parts").glob("*.bin"))) > 1
    mesh = sharding.make_mesh()
    for folder in ("whole", "parts"):
      config, loaded = interop.load_t5(tmp_path / folder)
      assert config.logits_via_embedding == (version == "v1_0")
      small_t5.assert_same(loaded, expected)
      _, loaded = interop.load_t5(
        tmp_path / folder,
        lambda config: sharding.param_shardings(
          mesh, t5.logical_axes(config), t5.abstract_params(config), fsdp=True
        ),
      )
      small_t5.assert_same(loaded, expected)

  def test_of_before_the_zip_format_are_read(self, tmp_path):
    model = make_fixtures.transformers_model("v1_0", seed=7)
    model.config.save_pretrained(tmp_path)
    torch.save(
      model.state_dict(),
      tmp_path / "pytorch_model.bin",
      _use_new_zipfile_serialization=False,
    )
    small_t5.assert_same(interop.load_t5(tmp_path)[1], params_of(model))

  def test_that_are_none_or_hold_code_are_one_line(self, tmp_path):
    model = make_fixtures.transformers_model("v1_0", seed=8)
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="pytorch_model.bin can't be read"):
      interop.load_t5(tmp_path)
    torch.save({"shared.weight": print}, file)
    with pytest.raises(
      ValueError, match="pytorch_model.bin can't be read"
    ) as e:
      interop.load_t5(tmp_path)
    assert "\n" not in str(e.value)


def test_an_exported_policy_scores_alike_in_transformers(tmp_path):
  config = config_lib.get_config()
  config.objectives = ("long", "short")
  config.data.source_length = 40
  config.data.target_length = 12
  config.model.init = str(tmp_path / "initial")
  v1_1 = t5.T5Config(**make_fixtures.config_fields("v1_1"))
  model = make_fixtures.transformers_model("v1_1", seed=9)
  interop.save_t5(
    tmp_path / "initial", v1_1, params_of(model), "hf", vocabulary=VOCABULARY
  )
  workdir = str(tmp_path / "run")
  run_folder.start(workdir, config)
  initial = load_initial(config)
  run_folder.save_model(
    workdir, initial.model_config, initial.vocabulary, initial.params
  )
  rng = np.random.default_rng(0)
  sets = jax.tree.map(
    lambda p: (
      np.asarray(p)
      + 0.2 * rng.standard_normal((2, *p.shape)).astype(np.float32)
    ),
    initial.params,
  )
  assert conditioning.STEERING[0] == config.steering == "full"
  saved_params.save_params(workdir, 1, sets)

  weights = {"long": 0.3, "short": 0.7}
  policy = clp_jax.Policy.load(workdir)
  policy.export(str(tmp_path / "out"), "hf", weights)
  texts = [" ".join(rng.choice(WORDS, n)) + "." for n in (30, 17, 3)]
  responses = [" ".join(rng.choice(WORDS, n)) + "." for n in (9, 4, 1)]
  scores = policy.score(texts, responses, weights)

  exported = model_in(tmp_path / "out")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  source = tokenizer(texts, return_tensors="pt", padding=True)
  target = tokenizer(responses, return_tensors="pt", padding=True).input_ids
  ours = [policy.vocabulary.encode(text) + [1] for text in texts]
  assert [
    [i for i in row if i != tokenizer.pad_token_id]
    for row in source.input_ids.tolist()
  ] == ours
  with torch.no_grad():
    # The labels' padding would be fed to the decoder as -100 otherwise.
    logits = exported(
      **source, decoder_input_ids=exported._shift_right(target)
    ).logits
  logp = torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
  theirs = (logp * (target != 0)).sum(-1).numpy()
  np.testing.assert_allclose(scores, theirs, atol=1e-4)
  assert np.abs(scores).min() > 1
  settings = json.loads((tmp_path / "out/generation_config.json").read_text())
  assert settings["eos_token_id"] == tokenizer.eos_token_id

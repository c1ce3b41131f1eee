"""Checkpoints in and out of runs: `model.init`, and `clp export`."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
import runs
import small_t5
import yaml
from small_t5 import V1_0, V1_1

import clp_jax
from clp_jax import conditioning, interop, run_folder, saved_params
from clp_jax import config as config_lib
from clp_jax.data.hf_tokenizer import FILES
from clp_jax.data.vocabulary import word_model
from clp_jax.errors import ConfigError
from clp_jax.evaluation import front as front_lib
from clp_jax.initial import load_initial
from clp_jax.interop import leaves
from clp_jax.models import t5

VOCABULARY = word_model([f"word{i}" for i in range(30)], [".", ","])
FORMATS = ("hf", "t5x", "orbax")
WEIGHTS = "long=0.25,short=0.75"


@pytest.fixture(autouse=True)
def compiled(tmp_path_factory, monkeypatch):
  """Commands keep what they compile out of the home folder."""
  cache = str(tmp_path_factory.getbasetemp() / "compiled")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)


def config_for(init, **model):
  """The config of a run on two objectives."""
  config = config_lib.get_config()
  config.objectives = ("long", "short")
  config.data.source_length = 16
  config.data.target_length = 8
  config.model.init = str(init)
  config.model.update(model)
  return config


def start_run(workdir, init, perturb, steering="full", step=7, **model):
  """A run's folder with two parameter sets, made without training.

  Returns:
    The parameter sets.
  """
  config = config_for(init, **model)
  config.steering = steering
  run_folder.start(str(workdir), config)
  initial = load_initial(config)
  run_folder.save_model(
    str(workdir), initial.model_config, initial.vocabulary, initial.params
  )
  steerable = conditioning.steerable_leaves(initial.params, steering)
  sets = conditioning.expand(initial.params, steerable, 2)
  if perturb:
    rng = np.random.default_rng(3)
    sets = jax.tree.map(
      lambda p: p + rng.standard_normal(p.shape).astype(np.float32), sets
    )
  saved_params.save_params(str(workdir), step, sets)
  return sets


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
  """A Hugging Face folder."""
  folder = tmp_path_factory.mktemp("initial")
  params = small_t5.random_params(V1_1)
  interop.save_t5(folder, V1_1, params, "hf", vocabulary=VOCABULARY)
  return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, initial):
  """(a run whose two sets differ, the sets)."""
  workdir = tmp_path_factory.mktemp("trained")
  return workdir, start_run(workdir, initial, perturb=True)


def export(workdir, output, *arguments, format="hf", weights=WEIGHTS):
  """Runs `clp export` and returns what it has written."""
  status, out, err = runs.clp(
    *("export", "--workdir", workdir, "--weights", weights),
    *("--format", format, "--output", output, *arguments),
  )
  assert status == 0, err
  assert out.strip() == str(output)
  return interop.load_t5(output)


class TestModelInit:
  @pytest.mark.parametrize("format", interop.FORMATS)
  def test_takes_every_format_with_its_vocabulary(self, tmp_path, format):
    params = small_t5.random_params(V1_0, "bfloat16")
    interop.save_t5(tmp_path, V1_0, params, format, vocabulary=VOCABULARY)
    config = config_for(
      tmp_path, scan_layers=True, dtype="bfloat16", remat="full"
    )
    loaded = load_initial(config)
    assert loaded.vocabulary.files() == {"vocabulary.model": VOCABULARY}
    assert loaded.model_config == dataclasses.replace(
      V1_0, scan_layers=True, dtype="bfloat16", remat="full"
    )
    in_float32 = jax.tree.map(lambda p: p.astype("float32"), params)
    small_t5.assert_same(loaded.params, t5.stack_layers(in_float32))

  def test_reads_straight_onto_the_mesh(self, initial):
    config = config_for(initial)
    config.mesh.data, config.mesh.model, config.mesh.fsdp = 4, 2, True
    embedding = load_initial(config).params["token_embedder"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape) == (24, 3)

  def test_draws_straight_onto_the_mesh(self, tmp_path):
    """Of all processes, as only such arrays can be saved; equal on any mesh."""
    (tmp_path / "words.model").write_bytes(VOCABULARY)
    config = config_for("tiny", vocabulary=str(tmp_path / "words.model"))
    whole = load_initial(config).params
    config.mesh.data, config.mesh.model, config.mesh.fsdp = 4, 2, True
    cut = load_initial(config).params
    small_t5.assert_same(cut, whole)
    for leaf in jax.tree.leaves(whole) + jax.tree.leaves(cut):
      assert leaf.sharding.device_set == set(jax.devices())
    embedding = cut["token_embedder"]["embedding"]
    rows, width = embedding.shape
    assert embedding.sharding.shard_shape(embedding.shape) == (
      rows // 2,
      width // 4,
    )

  def test_a_vocabulary_that_is_named_comes_first(self, initial, tmp_path):
    other = word_model([f"other{i}" for i in range(9)], ["."])
    (tmp_path / "other.model").write_bytes(other)
    config = config_for(initial, vocabulary=str(tmp_path / "other.model"))
    words = load_initial(config).vocabulary
    assert words.files() == {"vocabulary.model": other}

  def test_says_what_is_wrong(self, tmp_path):
    def fails(init, message, **model):
      with pytest.raises(ConfigError, match=message):
        load_initial(config_for(init, **model))

    fails(tmp_path / "nowhere", "is neither a preset .* nor a folder")
    save = lambda **options: interop.save_t5(  # noqa: E731
      tmp_path, V1_1, small_t5.random_params(V1_1), "hf", **options
    )
    save()
    fails(tmp_path, "has no tokenizer.json or spiece.model; set model.voc")
    large = word_model([f"word{i}" for i in range(60)], ["."])
    (tmp_path / "large.model").write_bytes(large)
    vocabulary = str(tmp_path / "large.model")
    fails(tmp_path, "64 pieces, but .* embeds 48", vocabulary=vocabulary)
    save(vocabulary=VOCABULARY)
    (tmp_path / "config.json").write_text("{")
    fails(tmp_path, "config.json can't be read")
    (tmp_path / "config.json").unlink()
    fails(tmp_path, "holds no model")


class TestExport:
  @pytest.mark.parametrize("format", FORMATS)
  def test_an_untrained_bank_is_the_initial_checkpoint(
    self, tmp_path, initial, format
  ):
    start_run(tmp_path / "run", initial, perturb=False)
    config, params = export(tmp_path / "run", tmp_path / "out", format=format)
    expected_config, expected = interop.load_t5(initial)
    if format.startswith("t5x"):  # whose files say nothing of a vocabulary
      assert config.eos_ids == ()
      config = dataclasses.replace(config, eos_ids=expected_config.eos_ids)
    assert config == expected_config
    small_t5.assert_same(params, expected)
    if format == "hf":  # the very file
      name = "model.safetensors"
      written = (tmp_path / "out" / name).read_bytes()
      assert written == (initial / name).read_bytes()
    found = interop.find_vocabulary(tmp_path / "out")
    with open(found, "rb") as file:
      assert file.read() == VOCABULARY

  def test_bfloat16_parameters_come_back_bit_for_bit(self, tmp_path):
    params = small_t5.random_params(V1_0, "bfloat16")
    interop.save_t5(tmp_path / "in", V1_0, params, "hf", vocabulary=VOCABULARY)
    start_run(tmp_path / "run", tmp_path / "in", perturb=False)
    config, exported = export(
      tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16"
    )
    assert config == V1_0
    small_t5.assert_same(exported, params)

  @pytest.mark.parametrize("vertex", [0, 1])
  def test_a_vertex_is_that_parameter_set(self, tmp_path, trained, vertex):
    workdir, sets = trained
    weights = ("long=1", "short=1")[vertex]
    _, params = export(workdir, tmp_path, weights=weights)
    small_t5.assert_same(params, jax.tree.map(lambda p: p[vertex], sets))

  def test_between_them_it_is_the_policys_parameters(self, tmp_path, trained):
    workdir, sets = trained
    _, params = export(workdir, tmp_path)
    policy = clp_jax.Policy.load(str(workdir))
    small_t5.assert_same(params, policy.params({"long": 0.25, "short": 0.75}))
    expected = jax.tree.map(lambda p: 0.25 * p[0] + 0.75 * p[1], sets)
    for path, array in leaves.flatten(params).items():
      np.testing.assert_allclose(
        array, leaves.flatten(expected)[path], atol=1e-6
      )

  def test_shared_leaves_and_scanned_layers_are_written(
    self, tmp_path, initial
  ):
    sets = start_run(
      tmp_path / "run",
      initial,
      perturb=True,
      steering="attention",
      scan_layers=True,
    )
    _, params = export(tmp_path / "run", tmp_path / "out", weights="short=1")
    steerable = conditioning.steerable_leaves(sets, "attention")
    expected = jax.tree.map(lambda p, s: p[1] if s else p, sets, steerable)
    small_t5.assert_same(params, t5.unstack_layers(expected))

  def test_a_step_is_chosen_and_recorded(self, tmp_path, initial):
    start_run(tmp_path / "run", initial, perturb=False, step=3)
    status, _, err = runs.clp(
      *("export", "--workdir", tmp_path / "run", "--weights", WEIGHTS),
      *("--format", "t5x", "--output", tmp_path / "out", "--step", 4),
    )
    assert status == 1 and "has no step 4; it has 3" in err
    assert not (tmp_path / "out").exists()
    export(tmp_path / "run", tmp_path / "out", "--step", 3, format="t5x")
    assert (tmp_path / "out" / "checkpoint_3").is_dir()
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record == {
      "written_by": "clp export",
      "workdir": str(tmp_path / "run"),
      "step": 3,
      "weights": {"long": 0.25, "short": 0.75},
      "alpha": None,
      "format": "t5x",
      "dtype": "float32",
    }

  def test_an_export_replaces_an_earlier_one_only(self, tmp_path, trained):
    workdir, sets = trained
    output = tmp_path / "out"
    for format in ("orbax", "hf", "t5x"):
      _, params = export(workdir, output, format=format, weights="long=1")
      small_t5.assert_same(params, jax.tree.map(lambda p: p[0], sets))
      if format == "orbax":
        (output / "README.md").write_text("mine")
    assert sorted(p.name for p in output.iterdir()) == [
      *("README.md", "checkpoint_7", "export.json"),
      *("reward_statistics.json", "spiece.model", "training_config.json"),
    ]
    assert (output / "README.md").read_text() == "mine"

  def test_other_folders_are_left_alone(self, tmp_path, trained, initial):
    workdir, _ = trained
    (tmp_path / "file").write_text("text")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "export.json").write_text('{"made": "elsewhere"}')
    for output, message in (
      (workdir, "is not empty, and `clp export` has not made it"),
      (initial, "is not empty, and `clp export` has not made it"),
      (tmp_path / "fake", "is not empty"),
      (tmp_path / "file", "is a file; give a folder"),
    ):
      before = sorted(output.rglob("*"))
      status, _, err = runs.clp(
        *("export", "--workdir", workdir, "--weights", WEIGHTS),
        *("--format", "hf", "--output", output),
      )
      assert status == 2 and message in err.splitlines()[-1]
      assert sorted(output.rglob("*")) == before

  def test_nothing_is_left_of_an_earlier_tokenizer(self, tmp_path, trained):
    """That transformers would read before the one that is there."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "export.json").write_text('{"written_by": "clp export"}')
    for name in (*FILES, "notes.txt"):
      (output / name).write_text("{}")
    export(trained[0], output)
    found = {p.name for p in output.iterdir()}
    own = {"tokenizer_config.json", "notes.txt"}
    assert found & {*FILES, "notes.txt"} == own

  @pytest.mark.parametrize(
    "status, message, arguments",
    [
      (2, "unknown objective", ("--weights", "lengthy=1")),
      (2, "give weights for long, short", ()),
      (2, "trained with the one alpha", ("--weights", WEIGHTS, "--alpha", 0.5)),
      (2, "invalid choice: 'gguf'", ("--format", "gguf")),
      (2, "invalid choice: 'int8'", ("--dtype", "int8")),
      (1, "holds no run", ("--workdir", "nowhere", "--weights", WEIGHTS)),
    ],
  )
  def test_bad_arguments_are_one_line(
    self, tmp_path, trained, status, message, arguments
  ):
    got, _, err = runs.clp(
      *("export", "--workdir", trained[0], "--format", "hf"),
      *("--output", tmp_path / "out", *arguments),
    )
    assert got == status, err
    assert message in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()

  def test_a_supervised_run_needs_no_weights(self, tmp_path, initial):
    config = config_for(initial)
    own = {"model": config.model, "data": config.data, "seed": config.seed}
    run_folder.start(str(tmp_path / "run"), config_lib.from_json(own))
    loaded = load_initial(config)
    run_folder.save_model(
      str(tmp_path / "run"),
      loaded.model_config,
      loaded.vocabulary,
      loaded.params,
    )
    saved_params.save_params(str(tmp_path / "run"), 2, loaded.params)
    status, _, err = runs.clp(
      *("export", "--workdir", tmp_path / "run", "--format", "orbax"),
      *("--output", tmp_path / "out"),
    )
    assert status == 0, err
    small_t5.assert_same(
      interop.load_t5(tmp_path / "out")[1], interop.load_t5(initial)[1]
    )


def test_the_warning_about_a_logit_layer_is_one_line(tmp_path, caplog):
  interop.save_t5(tmp_path, V1_1, small_t5.random_params(V1_1), "hf")
  small_t5.edit_json(
    tmp_path / "config.json",
    drop=("scale_decoder_outputs",),
    tie_word_embeddings=True,
  )
  with caplog.at_level(logging.WARNING):
    interop.load_t5(tmp_path)
  (record,) = caplog.records
  assert "taken for a layer of its own" in record.getMessage()


class TestModelCard:
  @pytest.fixture(scope="class")
  @staticmethod
  def evaluated(tmp_path_factory, sft_run):
    """(a run with a normalised reward, its front, what an export wrote)."""
    folder = tmp_path_factory.mktemp("card")
    fields = {"rewards.rouge.normalise": "fixed", "train.steps": 1}
    for arguments in (
      runs.train_arguments(folder / "run", sft_run, **fields),
      ("evaluate", "--workdir", folder / "run"),
      (
        *("export", "--workdir", folder / "run", "--format", "hf"),
        *("--weights", "rouge=0.25,nli=0.75", "--output", folder / "out"),
      ),
    ):
      status, _, err = runs.clp(*arguments)
      assert status == 0, err
    front = json.loads((folder / "run/evaluation/front.json").read_text())
    return folder / "run", front, folder / "out"

  @pytest.mark.slow
  def test_says_what_it_is(self, evaluated):
    workdir, front, output = evaluated
    card = (output / "README.md").read_text()
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["library_name"] == "transformers"
    assert matter["license"] is None and "base_model" not in matter
    config = run_folder.load_config(str(workdir))
    for part in (
      *("# A policy for rouge = 0.25, nli = 0.75", config.model.init),
      *("task `newsroom`, split `train`", f"alpha = {config.weightings.alpha}"),
      "| nli | `clp_jax.data.newsroom:entailment` | none | 0.75 |",
      *("steering `full`", "AutoModelForSeq2SeqLM", "Fill in"),
    ):
      assert part in card, part
    for point in front["points"]:
      kl = f"{point['kl']['mean']:.3f} ± {1.96 * point['kl']['stderr']:.3f}"
      raw = point["raw"]["rouge"]
      raw = f"{raw['mean']:.3f} ± {1.96 * raw['stderr']:.3f}"
      rows = [r for r in card.splitlines() if r.endswith(f"| {kl} |")]
      assert any(raw in row for row in rows)
    assert f"{front['hypervolume']:.4f}" in card

  @pytest.mark.slow
  def test_has_the_config_and_the_statistics_beside_it(self, evaluated):
    workdir, front, output = evaluated
    written = json.loads((output / "training_config.json").read_text())
    config = config_lib.from_json(written)
    assert config == run_folder.load_config(str(workdir))
    statistics = json.loads((output / "reward_statistics.json").read_text())
    assert statistics["nli"] == {
      "normalise": "none",
      "mean": 0.0,
      "deviation": 1.0,
    }
    assert front["units"]["rouge"]["mean"] > 0
    assert (
      statistics["rouge"] == {"normalise": "fixed"} | front["units"]["rouge"]
    )

  def test_shows_a_front_of_its_own_step_alone(self, tmp_path, trained):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    point = front_lib.Point(
      weights={"long": 0.25, "short": 0.75},
      alpha=0.01,
      rewards={
        "long": front_lib.Estimate(0.512, 0.01),
        "short": front_lib.Estimate(-1.25, 0.1),
      },
      kl=front_lib.Estimate(2.0, 0.05),
      value=front_lib.Estimate(0.3, 0.01),
    )
    for step, shown in ((7, True), (6, False)):
      front = front_lib.front_from_points(
        [point],
        method="full-CLP",
        objectives=("long", "short"),
        step=step,
        prompts=64,
        decoding={"temperature": 0.5, "split": "validation"},
        reference_point=(0.0, -3.0),
      )
      front_lib.save_front(workdir / "evaluation", front)
      export(workdir, tmp_path / "out", format="orbax")
      card = (tmp_path / "out" / "README.md").read_text()
      row = "| 0.512 ± 0.020 | -1.250 ± 0.196 | 2.000 ± 0.098 |"
      assert (row in card) == shown
      assert ("64 prompts of the split `validation`" in card) == shown
      assert "from_pretrained" not in card and "interop.load_model" in card
    written = json.loads((tmp_path / "out/training_config.json").read_text())
    config = run_folder.load_config(str(workdir))
    assert config_lib.from_json(written) == config

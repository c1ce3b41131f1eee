"""model.init as a name of the Hugging Face Hub, found in its cache on disk."""

import json
import shutil

import huggingface_hub.constants
import jax
import lora_runs
import numpy as np
import pytest
import runs
import small_decoder
import yaml

import clp_jax
from clp_jax import adapter_folders, initial, interop
from clp_jax.cli.arguments import load_config
from clp_jax.errors import ConfigError
from clp_jax.evaluation import model_card

NEW, OLD = "a" * 40, "b" * 40
NAME = "org/small"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Two revisions of a model, of which the older one has a tag."""
  repo = tmp_path / "hub" / "models--org--small"
  for commit, dim in ((NEW, 32), (OLD, 16)):
    small_decoder.save(repo / "snapshots" / commit, mlp_dim=dim)
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text(NEW)
  (repo / "refs" / "v1").write_text(OLD)
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.chdir(tmp_path)
  return repo / "snapshots"


def config_of(name):
  return load_config(runs.CONFIG, runs.overrides(name))


@pytest.mark.parametrize(
  ("revision", "commit"), [("", NEW), ("@main", NEW), ("@v1", OLD)]
)
def test_a_name_is_the_folder_of_its_revision(cache, revision, commit):
  model, params = interop.load_model(cache / commit)
  config = config_of(NAME + revision)
  found = initial.load_initial(config)
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  assert found.vocabulary.files() == small_decoder.tokenizer_files()
  assert initial.load_model_config(config).mlp_dim == model.config.mlp_dim
  assert config.model.init == NAME + revision  # which the run's folder keeps


def test_a_run_keeps_the_name(cache, tmp_path):
  fields = {"train.steps": 0, "steering": "none", "objectives": "('nli',)"}
  arguments = runs.train_arguments(tmp_path / "run", NAME, **fields)
  assert runs.clp(*arguments)[0] == 0
  kept = json.loads((tmp_path / "run" / "config.json").read_text())
  assert kept["model"]["init"] == NAME


def test_a_folder_of_that_name_comes_first(cache, tmp_path):
  small_decoder.save(tmp_path / NAME, mlp_dim=48)
  assert initial.load_model_config(config_of(NAME)).mlp_dim == 48


@pytest.mark.parametrize("name", ["org/other", "org/small@v2"])
def test_what_is_not_there_is_one_line(cache, tmp_path, name):
  arguments = runs.train_arguments(tmp_path / "run", name)
  status, out, err = runs.clp(*arguments)
  assert status == 2 and out == ""
  assert err.count("\n") == 1
  assert f"{name} is no folder here" in err and "hf download org/" in err


@pytest.mark.parametrize("revision", [None, "v1"])
def test_adapters_name_it_and_bring_no_base(cache, tmp_path, revision):
  name = NAME if revision is None else f"{NAME}@{revision}"
  workdir = lora_runs.start_run(tmp_path / "run", name)
  lora_runs.export(workdir, tmp_path / "peft")
  assert not (tmp_path / "peft" / "base").exists()
  text = (tmp_path / "peft" / "long" / "adapter_config.json").read_text()
  own = json.loads(text)
  assert own["base_model_name_or_path"] == NAME
  assert own["revision"] == revision
  code = lora_runs.code_of((tmp_path / "peft" / "README.md").read_text())
  assert f"base = {NAME!r}\n" in code
  given = "base" if revision is None else "base, revision='v1'"
  assert code.count(f".from_pretrained({given})") == 2


def test_adapters_of_a_name_that_is_not_there_bring_it(cache, tmp_path):
  """A folder that was here when the run began may look like one."""
  workdir = lora_runs.start_run(tmp_path / "run", NAME)
  shutil.rmtree(cache.parent)
  lora_runs.export(workdir, tmp_path / "peft")
  base = tmp_path / "peft" / "base"
  own = json.loads((tmp_path / "peft/long/adapter_config.json").read_text())
  assert own["base_model_name_or_path"] == str(base) and base.is_dir()


@pytest.mark.parametrize(
  ("init", "base", "is_same"),
  [
    (NAME, f"hub/models--org--small/snapshots/{NEW}", True),
    (NAME, f"hub/models--org--small/snapshots/{OLD}", False),
    (f"{NAME}@v1", f"hub/models--org--small/snapshots/{OLD}", True),
    (f"hub/models--org--small/snapshots/{OLD}", f"{NAME}@v1", True),
    (NAME, f"{NAME}@main", True),
    (NAME, f"{NAME}@v1", False),
  ],
)
def test_adapters_of_it_are_known_by_its_folder(cache, init, base, is_same):
  if is_same:
    adapter_folders.check_base("lora", base, init)
    return
  with pytest.raises(ConfigError, match=f"lora adapts {base}, and model.init"):
    adapter_folders.check_base("lora", base, init)


def test_adapters_of_it_are_combined(cache, tmp_path):
  """Of the revision that they name, whatever model.init is."""
  names = ("nli", "rouge")
  workdir = lora_runs.start_run(
    tmp_path / "run", f"{NAME}@v1", objectives=names
  )
  lora_runs.export(workdir, tmp_path / "peft")
  status, _, err = runs.clp(
    *("combine", *(f"{name}={tmp_path}/peft/{name}" for name in names)),
    *("--method", "soup", "--config", runs.CONFIG),
    *("--output", tmp_path / "soup"),
  )
  assert status == 0, err
  weights = {"nli": 0.3, "rouge": 0.7}
  made, source = (
    clp_jax.Policy.load(str(path)).params(weights)
    for path in (tmp_path / "soup", workdir)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), made, source
  )


@pytest.mark.parametrize(
  ("init", "base"),
  [(NAME, NAME), (f"{NAME}@v1", NAME), ("runs/sft", None), ("tiny", None)],
)
def test_a_card_names_it_and_no_folder(cache, init, base):
  card = model_card._front_matter(config_of(init), "peft")
  assert yaml.safe_load(card.split("---")[1]).get("base_model") == base

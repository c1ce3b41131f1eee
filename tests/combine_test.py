"""`clp combine`: what the Python recipes make, from a command line."""

import json
import pathlib

import jax
import numpy as np
import pytest
import runs

import clp_jax
from clp_jax import demo, interop, run_folder
from clp_jax.baselines import dera, soups
from clp_jax.cli import combine as combine_command

ALPHA = 0.05
TEXTS = ["Brivane opened the museum.", "It happened in Merrowby on Friday."]
RESPONSES = ["Brivane opened the museum .", "Farrogan"]
NAMES = ("nli", "rouge")


@pytest.fixture(scope="module")
def folders(sft_run):
  """A run for each reward, and some that can't be parts."""
  root = pathlib.Path(sft_run).parent
  fields = {"steering": "none", "weightings.alpha": ALPHA}
  made = {
    "nli": {"objectives": '("nli",)'},
    "rouge": {"objectives": '("rouge",)', "adapters.rank": 2},
    "both": {"steering": "full"},
    "colder": {"objectives": '("rouge",)', "rollout.temperature": 0.5},
    "other_alpha": {"objectives": '("rouge",)', "weightings.alpha": 0.2},
    "other_start": {"objectives": '("rouge",)', "model.init": "tiny"},
    "lora": {"objectives": '("nli",)', "steering": "lora"},
  }
  for draw, (name, own) in enumerate(made.items()):
    made[name] = str(root / f"combine_{name}")
    runs.make_run(made[name], sft_run, draw=draw, **(fields | own))
  return made | {"supervised": sft_run}


def combine(parts, method, output, *rest):
  return runs.clp(
    *("combine", *(f"{name}={folder}" for name, folder in parts.items())),
    *("--method", method, "--output", output, *rest),
  )


def combined(parts, method, output, *rest):
  """What a command has made, as a policy."""
  status, out, err = combine(parts, method, output, *rest)
  assert status == 0, err
  assert out == f"{output}\n"
  return clp_jax.Policy.load(str(output))


def pair(folders):
  return {name: folders[name] for name in NAMES}


def recipe_config(*objectives, alpha_range=None):
  config = demo.get_config()
  config.objectives = objectives
  config.weightings.alpha = ALPHA
  config.weightings.alpha_range = alpha_range
  return config


def assert_same_policy(policy, other, *weightings):
  for weights, alpha in weightings:
    np.testing.assert_array_equal(
      policy.score(TEXTS, RESPONSES, weights, alpha),
      other.score(TEXTS, RESPONSES, weights, alpha),
    )


def test_a_soup_is_that_of_the_recipe(folders, tmp_path):
  parts = pair(folders)
  policy = combined(parts, "soup", tmp_path / "command")
  soups.make_soup(recipe_config(*NAMES), parts, str(tmp_path / "recipe"))
  recipe = clp_jax.Policy.load(str(tmp_path / "recipe"))
  weights = {"nli": 0.25, "rouge": 0.75}
  jax.tree.map(
    np.testing.assert_array_equal,
    policy.params(weights),
    recipe.params(weights),
  )
  sets = [clp_jax.Policy.load(parts[name]).sets for name in NAMES]
  jax.tree.map(
    lambda p, a, b: np.testing.assert_allclose(
      p, 0.25 * a + 0.75 * b, atol=1e-6
    ),
    *(policy.params(weights), *sets),
  )
  assert policy.objectives == NAMES
  assert policy.step == 8  # of both
  record = json.loads((tmp_path / "command" / "parts.json").read_text())
  assert [part["part"] for part in record] == [*NAMES, "reference"]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
  """A run of a decoder-only model for each reward, of another size."""
  root = tmp_path_factory.mktemp("decoders")
  fields = {"steering": "none", "weightings.alpha": ALPHA}
  found = {name: str(root / name) for name in NAMES}
  for draw, (name, folder) in enumerate(found.items()):
    own = {"objectives": f'("{name}",)', "rollout.samples": 2 + draw}
    runs.make_run(folder, "tiny-decoder", draw=draw, **fields, **own)
  return found


@pytest.mark.parametrize("method", combine_command.METHODS)
def test_decoders_are_combined_and_evaluated(decoders, tmp_path, method):
  """By every method; a vertex is the run that was finetuned for it."""
  workdir = tmp_path / method
  policy = combined(decoders, method, workdir)
  alpha = ALPHA if method == "dera" else None
  scores = {}
  for name, folder in decoders.items():
    scores[name] = clp_jax.Policy.load(folder).score(TEXTS, RESPONSES)
    found = policy.score(TEXTS, RESPONSES, {name: 1.0}, alpha)
    np.testing.assert_allclose(found, scores[name], atol=1e-4)
  assert np.abs(scores["nli"] - scores["rouge"]).max() > 1e-2
  half = policy.score(TEXTS, RESPONSES, dict.fromkeys(NAMES, 0.5), alpha)
  for other in scores.values():
    assert np.abs(half - other).max() > 1e-3
  if method == "dera":  # at alpha 1 all that is left is the reference
    ends = [policy.score(TEXTS, RESPONSES, {n: 1.0}, 1.0) for n in NAMES]
    np.testing.assert_allclose(*ends, atol=1e-4)
    assert np.abs(ends[0] - scores["nli"]).max() > 1e-2
  if method != "soup":
    return
  for folder in (workdir, decoders["nli"]):
    command = ("evaluate", "--workdir", folder, "--grid", 2, "--prompts", 4)
    status, _, err = runs.clp(*command)
    assert status == 0, err
  front = json.loads((workdir / "evaluation" / "front.json").read_text())
  assert front["method"] == "Rewarded Soups" and len(front["points"]) == 2
  # Of both runs, as many as each has sampled.
  rollout = run_folder.load_config(decoders["nli"]).rollout
  assert front["training_samples"] == 4 * rollout.prompts * (2 + 3)
  status, out, err = runs.clp(
    *("compare", workdir, "--output", tmp_path / "compared"),
    *("--bootstrap", 10),
  )
  assert status == 0, err
  assert "Rewarded Soups" in out
  status, _, err = runs.clp(
    *("export", "--workdir", workdir, "--weights", "nli=0.5,rouge=0.5"),
    *("--format", "hf", "--output", tmp_path / "export"),
  )
  assert status == 0, err
  _, exported = interop.load_model(tmp_path / "export")
  mixed = policy.params(dict.fromkeys(NAMES, 0.5))
  jax.tree.map(np.testing.assert_array_equal, exported, mixed)


def test_mod_is_that_of_the_recipe(folders, tmp_path):
  parts = pair(folders)
  policy = combined(parts, "mod", tmp_path / "command")
  dera.make_mixture(recipe_config(*NAMES), parts, str(tmp_path / "recipe"))
  recipe = clp_jax.Policy.load(str(tmp_path / "recipe"))
  assert_same_policy(
    *(policy, recipe, ({"nli": 0.25, "rouge": 0.75}, None), ({"nli": 1}, None))
  )


@pytest.mark.parametrize(
  "names", [("rouge",), pytest.param(NAMES, marks=pytest.mark.slow)]
)
def test_dera_goes_from_the_runs_alpha_to_the_reference(
  folders, tmp_path, names
):
  parts = {name: folders[name] for name in names}
  policy = combined(parts, "dera", tmp_path / "command")
  assert policy.weighting_space.distribution.alpha_range == (ALPHA, 1.0)
  config = recipe_config(*names, alpha_range=(ALPHA, 1.0))
  dera.make_mixture(config, parts, str(tmp_path / "recipe"))
  recipe = clp_jax.Policy.load(str(tmp_path / "recipe"))
  weights = dict.fromkeys(names, 1 / len(names))
  assert_same_policy(policy, recipe, *((weights, a) for a in (0.02, 0.3, 1.0)))
  one = dict.fromkeys(names, 0.0) | {"rouge": 1.0}
  tuned = clp_jax.Policy.load(folders["rouge"])
  np.testing.assert_allclose(
    policy.score(TEXTS, RESPONSES, one, ALPHA),
    tuned.score(TEXTS, RESPONSES),
    atol=1e-4,
  )


@pytest.mark.slow
def test_what_it_makes_is_a_run(folders, tmp_path):
  workdir = tmp_path / "soup"
  combined(pair(folders), "soup", workdir)
  status, _, err = runs.clp(
    *("evaluate", "--workdir", workdir, "--grid", 2, "--prompts", 4)
  )
  assert status == 0, err
  front = json.loads((workdir / "evaluation" / "front.json").read_text())
  assert front["method"] == "Rewarded Soups"
  assert front["objectives"] == list(NAMES)
  combined(pair(folders), "soup", workdir)  # again: it is found
  status, _, err = combine(pair(folders), "mod", workdir)
  assert status == 2 and "holds another run's config (mixing" in err
  config = run_folder.load_config(str(workdir))
  assert {"nli", "rouge"} <= set(config.rewards)
  assert tuple(config.objectives) == NAMES


def test_a_config_may_say_what_the_runs_do_not(folders, tmp_path):
  policy = combined(
    *(pair(folders), "soup", tmp_path / "soup", "--config", runs.CONFIG),
    *(f"--config.weightings.alpha={ALPHA}", "--config.eval.prompts=5"),
  )
  assert policy.config.eval.prompts == 5
  status, _, err = combine(
    *(pair(folders), "soup", tmp_path / "x", "--config.eval.prompts=5")
  )
  assert status == 2 and "unknown arguments: --config.eval.prompts=5" in err


def test_a_part_may_have_adapters(folders, tmp_path):
  parts = {"nli": folders["lora"], "rouge": folders["rouge"]}
  policy = combined(parts, "soup", tmp_path / "soup")
  lora = clp_jax.Policy.load(folders["lora"])
  jax.tree.map(
    np.testing.assert_array_equal, policy.params({"nli": 1}), lora.params()
  )


@pytest.mark.parametrize(
  "other, message",
  [
    ("both", "is a run on rouge, nli; this needs one on rouge alone"),
    ("nli", "is a run on nli; this needs one on rouge alone"),
    ("supervised", "is a supervised run; this needs one that was finetuned"),
    ("colder", "rollout.temperature = 0.5, and what is made of it here has 1"),
    ("other_alpha", "weightings.alpha = 0.2, and what is made of it"),
    ("other_start", "start from different models; their average means nothing"),
  ],
)
def test_a_run_that_does_not_fit_is_named(folders, tmp_path, other, message):
  parts = {"nli": folders["nli"], "rouge": folders[other]}
  status, out, err = combine(parts, "soup", tmp_path / "out")
  assert status == 2 and out == ""
  assert err.count("\n") == 1 and err.startswith("clp combine: error: ")
  assert folders[other] in err and message in err
  assert not (tmp_path / "out").exists()


def test_bad_arguments_are_one_line(folders, tmp_path):
  def fails(status, message, *arguments):
    found, out, err = runs.clp("combine", *arguments)
    assert found == status and out == "", err
    assert err.count("\n") == 1 and message in err, err

  nli = f"nli={folders['nli']}"
  to = ("--output", tmp_path / "out")
  fails(2, "expected NAME=FOLDER, got 'nli'", "nli", "--method", "soup", *to)
  fails(2, "nli is given twice", nli, nli, "--method", "mod", *to)
  fails(2, "invalid choice: 'average'", nli, "--method", "average", *to)
  fails(2, "required: --output", nli, "--method", "soup")
  fails(2, "required: NAME=FOLDER", "--method", "soup", *to)
  fails(2, "--bogus", nli, "--method", "soup", *to, "--bogus", "1")
  nowhere = f"nli={tmp_path}/nowhere"
  fails(1, "nowhere holds no run", nowhere, "--method", "soup", *to)
  status, _, err = combine(
    *({"nli": folders["nli"], "rouge": folders["other_alpha"]}, "dera"),
    tmp_path / "out",
  )
  assert status == 2 and "finetuned at alpha 0.2" in err

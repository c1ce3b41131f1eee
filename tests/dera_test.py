"""DeRa, MOD and soups towards the reference, made of trained runs."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import runs
import small_t5

import clp_jax
from clp_jax import demo, run_folder, saved_params, weightings
from clp_jax.baselines import dera, soups
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.errors import ConfigError
from clp_jax.evaluation import sweep
from clp_jax.initial import load_initial
from clp_jax.models import families, mixture

LOW = 0.02  # the least alpha, of the finetuned runs


@pytest.fixture(scope="module", params=runs.PRESETS)
def singles(request, sft_runs):
  """One run a reward, far enough from the reference to tell."""
  found = {}
  sft_run = sft_runs(request.param)
  for name in ("nli", "rouge"):
    found[name] = str(pathlib.Path(sft_run).parent / f"single_{name}")
    fields = {
      "steering": "none",
      "objectives": f'("{name}",)',
      "train.steps": 2,
      "optimizer.learning_rate": 0.02,
      "optimizer.warmup_steps": 0,
      "weightings.alpha": LOW,
    }
    arguments = runs.train_arguments(found[name], sft_run, **fields)
    status, _, err = runs.clp(*arguments)
    assert status == 0, err
  return found


def config_of(*objectives, alpha_range=None):
  config = demo.get_config()
  config.objectives = objectives
  config.weightings.alpha_range = alpha_range
  config.weightings.alpha = LOW
  config.eval.prompts = 8
  config.eval.samples = 1
  config.eval.grid = 3
  return config


@pytest.fixture(scope="module")
def parts(sft_run):
  """Two runs a reward, which were not trained."""
  found = []
  for draw in (0, 2):
    pair = {}
    for i, name in enumerate(("nli", "rouge")):
      pair[name] = str(pathlib.Path(sft_run).parent / f"part_{name}_{draw + i}")
      fields = {
        "steering": "none",
        "objectives": f'("{name}",)',
        "weightings.alpha": LOW,
        "rollout.temperature": 0.7,
      }
      runs.make_run(pair[name], sft_run, draw=draw + i, **fields)
    found.append(pair)
  return found


@pytest.mark.parametrize("make", [soups.make_soup, dera.make_mixture])
def test_a_folder_is_of_the_parts_that_it_was_made_of(parts, tmp_path, make):
  config = config_of("nli", "rouge")
  config.rollout.temperature = 0.7
  first, second = parts
  workdir = tmp_path / "made"
  make(config, first, str(workdir))
  # The reference is the same; of the runs it says which.
  record = json.loads((workdir / "parts.json").read_text())
  assert [(p["part"], p["folder"], p["step"]) for p in record] == [
    ("nli", first["nli"], 4),
    ("rouge", first["rouge"], 4),
    ("reference", first["nli"], 0),
  ]
  before = {p: p.stat().st_mtime_ns for p in workdir.glob("checkpoints/**/*")}
  assert before
  config.eval.samples = 2  # concerns the evaluation alone
  make(config, first, str(workdir))
  assert before == {
    p: p.stat().st_mtime_ns for p in workdir.glob("checkpoints/**/*")
  }
  assert run_folder.load_config(str(workdir)).eval.samples == 2
  mixed = {"nli": first["nli"], "rouge": second["rouge"]}
  with pytest.raises(ConfigError) as refused:
    make(config, mixed, str(workdir))
  assert f"rouge {first['rouge']} at step 4" in str(refused.value)
  assert f"rouge {second['rouge']} at step 4" in str(refused.value)
  assert first["nli"] not in str(refused.value)
  assert "choose another folder" in str(refused.value)
  (workdir / "parts.json").unlink()
  with pytest.raises(ConfigError, match="no parts.json that says"):
    make(config, first, str(workdir))


def test_parts_of_another_optimum_are_refused(parts, tmp_path):
  for changes, message in (
    ({}, "rollout.temperature = 0.7, and what is made of it here has 1.0"),
    ({"weightings.alpha": 0.5}, "weightings.alpha = 0.02, .* has 0.5"),
    ({"rewards.nli.normalise": "fixed"}, "nli.normalise = none, .* has fixed"),
  ):
    config = config_of("nli", "rouge")
    if changes:
      config.rollout.temperature = 0.7
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
      soups.make_soup(config, parts[0], str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_mixing_logits_reaches_every_alphas_optimum():
  """On one-token responses, where the optima are in closed form."""
  rng = np.random.default_rng(0)
  ref, rewards = rng.normal(0, 1.5, 7), rng.uniform(0, 1, (7, 2))
  weights = np.array([0.3, 0.7])

  def optimum(alpha, w):  # log-probabilities, up to a constant
    return ref + (1 - alpha) / alpha * rewards @ w

  def normalised(logits):
    return np.asarray(jax.nn.log_softmax(np.float32(logits)))

  q = weightings.Distribution(
    2, alpha_range=(0.2, 0.9), kl_coefficient="realigned"
  )
  models = [np.float32(optimum(0.2, w)) for w in np.eye(2)] + [np.float32(ref)]
  # Below the range the reference's coefficient is negative.
  for alpha in (0.1, 0.2, 0.37, 0.9, 1.0):
    c = q.coefficients(
      weightings.Weighting(np.float32(weights), np.float32(alpha))
    )
    np.testing.assert_allclose(c.sum(), 1, atol=1e-6)
    mixed = mixture.combine(c, models)
    np.testing.assert_allclose(
      normalised(mixed), normalised(optimum(alpha, weights)), atol=1e-5
    )
  assert c.tolist() == [0, 0, 1]


@pytest.mark.slow  # trains two runs
def test_dera_runs_from_the_policy_to_the_reference(singles, tmp_path):
  config = config_of("rouge", alpha_range=(LOW, 1.0))
  workdir = str(tmp_path / "dera")
  dera.make_mixture(config, {"rouge": singles["rouge"]}, workdir)
  policy = clp_jax.Policy.load(workdir)
  tuned = clp_jax.Policy.load(singles["rouge"])
  texts = ["Brivane opened the museum.", "It happened in Merrowby on Friday."]
  assert policy.generate(texts, alpha=LOW) == tuned.generate(texts)
  response = ["Brivane opened the museum .", "Farrogan"]
  np.testing.assert_allclose(
    policy.score(texts, response, alpha=LOW),
    tuned.score(texts, response),
    atol=1e-4,
  )
  assert (
    np.abs(
      policy.score(texts, response, alpha=0.005)
      - policy.score(texts, response, alpha=LOW)
    )
    > 1e-3
  ).all()
  with pytest.raises(ValueError, match="no one model's parameters"):
    policy.params(alpha=0.5)
  with pytest.raises(ValueError, match=r"alpha in \(0, 1\]"):
    policy.coefficients(None, 0.0)

  front = sweep.evaluate_run(workdir)
  kls = [point.kl.mean for point in front.points]
  assert [point.alpha for point in front.points][::2] == [LOW, 1.0]
  assert kls[0] > 0.01
  np.testing.assert_allclose(kls[2], 0, atol=1e-5)
  assert front.method == "DeRa"
  own = sweep.evaluate_run(singles["rouge"], grid=3, num_prompts=8)
  assert len(own.points) == 1


@pytest.mark.slow  # trains two runs
def test_mod_mixes_single_objective_policies(singles, tmp_path):
  workdir = str(tmp_path / "mod")
  dera.make_mixture(config_of("nli", "rouge"), singles, workdir)
  policy = clp_jax.Policy.load(workdir)
  assert sweep.method_name(policy.config) == "MOD"
  texts = ["Brivane opened the museum."]
  response = ["Brivane opened the museum"]
  for name, path in singles.items():
    np.testing.assert_allclose(
      policy.score(texts, response, {name: 1.0}),
      clp_jax.Policy.load(path).score(texts, response),
      atol=1e-4,
    )
  between = policy.score(texts, response, {"nli": 0.5, "rouge": 0.5})
  assert np.isfinite(between).all()
  status, _, err = runs.clp(
    *("export", "--workdir", workdir, "--weights", "nli=1", "--format", "hf"),
    *("--output", tmp_path / "exported"),
  )
  assert status == 2 and "no one model's parameters" in err


@pytest.mark.slow  # trains two runs
def test_a_soup_towards_the_reference_interpolates(singles, tmp_path):
  workdir = str(tmp_path / "soup")
  config = config_of("rouge", alpha_range=(LOW, 1.0))
  soups.make_soup(config, {"rouge": singles["rouge"]}, workdir)
  policy = clp_jax.Policy.load(workdir)
  tuned = clp_jax.Policy.load(singles["rouge"])
  weight = float(weightings.realignment(np.float32(0.05), LOW))
  assert 0.3 < weight < 0.5
  jax.tree.map(
    lambda mixed, ref, own: np.testing.assert_allclose(
      mixed, (1 - weight) * ref + weight * own, atol=1e-6
    ),
    policy.params(alpha=0.05),
    policy.reference,
    tuned.sets,
  )
  with pytest.raises(ValueError, match="0.02, 1"):
    policy.params(alpha=0.01)  # parameters are not extrapolated


@pytest.mark.slow  # trains two runs
def test_parts_that_do_not_fit_are_named(singles, tmp_path):
  config = config_of("rouge", alpha_range=(LOW, 1.0))
  one = {"rouge": singles["rouge"]}

  def fails(message, config=config, parts=one, **kwargs):
    with pytest.raises(ConfigError, match=message):
      dera.make_mixture(config, parts, str(tmp_path / "out"), **kwargs)
    assert not (tmp_path / "out").exists()

  fails("one finetuned run for each of rouge, got none", parts={})
  fails("single_nli is a run on nli", parts={"rouge": singles["nli"]})
  fails(
    "finetuned at alpha 0.02; .* least .*, 0.05",
    config=config_of("rouge", alpha_range=(0.05, 1.0)),
  )
  fails("neither a preset", reference=str(tmp_path / "nothing"))

  # Same vocabulary, other shape: a preset's run.
  sft_run = run_folder.load_config(singles["rouge"]).model.init
  other = demo.get_config()
  other.model.init = run_folder.load_config(sft_run).model.init
  other.sft.steps = 0
  initial = load_initial(other)
  vocabulary = initial.vocabulary
  narrow = str(tmp_path / "narrow")
  _write_run(narrow, other, initial, vocabulary, emb_dim=32)
  fails("different shapes .*emb_dim = 32 and 64", reference=narrow)
  renamed = str(tmp_path / "renamed")
  _write_run(
    renamed,
    other,
    initial,
    Vocabulary("other.model", small_t5.trained_vocabulary()),
  )
  fails("another vocabulary", reference=renamed)
  # One that fits: the supervised run itself.
  dera.make_mixture(config, one, str(tmp_path / "fits"), reference=sft_run)


def _write_run(workdir, config, initial, vocabulary, **changes):
  """The folder of a run of no steps."""
  model_config = dataclasses.replace(initial.model_config, **changes)
  params = families.build(model_config).init(jax.random.key(0))
  run_folder.start(workdir, config)
  run_folder.save_model(workdir, model_config, vocabulary, params)
  saved_params.save_params(workdir, 0, params)

"""Fronts are in the units that were optimised, raw scores beside them."""

import csv
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import runs

from clp_jax import config as config_lib
from clp_jax import run_folder, saved_params
from clp_jax.baselines import soups
from clp_jax.errors import ConfigError, FrontError
from clp_jax.evaluation import compare, html, sweep, units
from clp_jax.evaluation import front as front_lib
from clp_jax.weightings import Distribution

NORMALISED = {"rewards.rouge.normalise": "fixed"}


@pytest.fixture(scope="module")
def trained(sft_run, tmp_path_factory):
  """A run of rouge and nli, rouge in units of the reference's scores."""
  workdir = tmp_path_factory.mktemp("units") / "run"
  status, _, err = runs.clp(
    *runs.train_arguments(workdir, sft_run, **NORMALISED)
  )
  assert status == 0, err
  status, out, err = runs.clp("evaluate", "--workdir", workdir)
  assert status == 0, err
  assert "raw rouge" in out and "rouge in deviations of" in " ".join(
    out.split()
  )
  return workdir


def front_of(workdir):
  return json.loads(
    (pathlib.Path(workdir) / "evaluation" / "front.json").read_text()
  )


def test_a_normalised_reward_is_measured_as_it_was_optimised(trained):
  front = front_of(trained)
  assert set(front["units"]) == {"rouge"}
  mean, deviation = front["units"]["rouge"].values()
  stats = saved_params.load_reward_stats(str(trained), front["step"], 2)
  assert stats.count[0] > 0 and deviation != 1
  assert mean == pytest.approx(float(stats.mean[0]))
  assert deviation == pytest.approx(float(stats.deviation()[0]))
  for point in front["points"]:
    assert set(point["raw"]) == {"rouge"}
    raw, own = point["raw"]["rouge"], point["rewards"]["rouge"]
    assert own["mean"] == pytest.approx((raw["mean"] - mean) / deviation)
    assert own["stderr"] == pytest.approx(raw["stderr"] / deviation)
    assert 0 <= raw["mean"] <= 1  # the reward's own scale
    rewards = {o: point["rewards"][o]["mean"] for o in ("rouge", "nli")}
    value = 0.99 * sum(point["weights"][o] * rewards[o] for o in rewards)
    value -= 0.01 * point["kl"]["mean"]
    assert point["value"]["mean"] == pytest.approx(value, abs=1e-5)
  assert front["reference_point"] == [units.BELOW, 0.0]


def test_files_and_pages_show_both(trained):
  front = front_lib.load_front(trained / "evaluation" / "front.json")
  assert front_lib.to_json(front) == front_of(trained)
  with open(trained / "evaluation" / "front.csv") as file:
    row = next(csv.DictReader(file))
  assert {"reward_rouge_mean", "raw_rouge_mean", "raw_rouge_stderr"} <= set(row)
  page = html.render("x", fronts=[front_of(trained)])
  assert "rouge, raw" in page and "As optimised: rouge in deviations" in page


@pytest.mark.slow
def test_soups_have_the_moments_of_their_parts(trained, sft_run, tmp_path):
  config = run_folder.load_config(str(trained))
  parts = {}
  for name in ("rouge", "nli"):
    parts[name] = str(tmp_path / name)
    fields = NORMALISED | {
      "objectives": f"('{name}',)",
      "steering": "none",
      "train.steps": 2,
    }
    status, _, err = runs.clp(
      *runs.train_arguments(parts[name], sft_run, **fields)
    )
    assert status == 0, err
  soup = str(tmp_path / "soup")
  soups.make_soup(config, parts, soup)
  front = sweep.evaluate_run(soup)
  (step,) = runs.checkpoint_steps(parts["rouge"])[-1:]
  stats = saved_params.load_reward_stats(parts["rouge"], step, 1)
  moments = (float(stats.mean[0]), float(stats.deviation()[0]))
  assert front.units == {"rouge": pytest.approx(moments)}
  assert all(set(point.raw) == {"rouge"} for point in front.points)
  # A soup that knows no moments needs a reference point, and is raw.
  shutil.rmtree(tmp_path / "soup" / "evaluation")
  file = tmp_path / "soup" / run_folder.PARTS
  known = json.loads(file.read_text())
  file.write_text(json.dumps([p | {"moments": None} for p in known]))
  with pytest.raises(ConfigError, match="no moments.*give eval.reference_poi"):
    sweep.evaluate_run(soup)
  own = run_folder.load_config(soup)
  own.eval.reference_point = (-2.0, 0.0)
  run_folder.start(soup, own)
  raw = sweep.evaluate_run(soup)
  assert raw.units == {} and raw.reference_point == (-2.0, 0.0)
  np.testing.assert_allclose(
    [p.rewards["rouge"].mean for p in raw.points],
    [p.raw["rouge"].mean for p in front.points],
    atol=1e-6,
  )


def test_fronts_of_other_moments_are_compared_in_the_firsts_units(trained):
  first = compare.load_run(str(trained), 0)
  (mean, deviation) = first.front.units["rouge"]
  # The same scores, measured by another reference.
  moments = (mean + 0.1, 2 * deviation)
  points = []
  for point in first.front.points:
    raw = point.raw["rouge"]
    rouge = front_lib.Estimate(
      (raw.mean - moments[0]) / moments[1], raw.stderr / moments[1]
    )
    moved = rouge.mean - point.rewards["rouge"].mean
    value = point.value.mean + 0.99 * point.weights["rouge"] * moved
    points.append(
      dataclasses.replace(
        point,
        rewards=point.rewards | {"rouge": rouge},
        value=front_lib.Estimate(value, point.value.stderr / moments[1]),
      )
    )
  rewards = first.rewards.copy()
  rewards[..., 0] = (rewards[..., 0] * deviation + mean - moments[0]) / moments[
    1
  ]
  other = dataclasses.replace(
    first,
    path="other",
    rewards=rewards,
    front=dataclasses.replace(
      first.front, points=tuple(points), units={"rouge": moments}
    ),
  )
  found = compare.compare(
    {"a": [first], "b": [other]}, distribution=Distribution(2), seed=0
  )
  for metric in ("hypervolume", "spread", "utility", "value"):
    assert found.differences["b"][metric].mean == pytest.approx(0, abs=1e-6)
  (again,) = found.runs["b"]
  for a, b in zip(again.front.points, first.front.points, strict=True):
    assert a.rewards["rouge"] == pytest.approx(b.rewards["rouge"], abs=1e-6)
    assert a.value == pytest.approx(b.value, abs=1e-6)
  assert again.front.hypervolume == pytest.approx(first.front.hypervolume)


def test_one_normalised_and_one_not_are_not_compared(trained):
  first = compare.load_run(str(trained), 0)
  other = dataclasses.replace(
    first, front=dataclasses.replace(first.front, units={})
  )
  with pytest.raises(FrontError, match="differ in what is normalised"):
    compare.in_one_unit({"a": [first], "b": [other]})


def test_units_of_nothing_normalised_are_the_scores_themselves(tmp_path):
  config = config_lib.get_config()
  own = units.units_of(config, str(tmp_path), 0)
  raw = np.float32([[0.25], [0.5]])
  np.testing.assert_array_equal(own.of(raw), raw)
  assert own.names == () and units.reference_point(config) == (0.0,)

"""The results page: from numbers to pictures, tables and costs."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import runs

from clp_jax.evaluation import fronts
from clp_jax.experiments import page, pictures, protocol
from clp_jax.experiments.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]

WEIGHTINGS = [[i / 4, 1 - i / 4, 0.01] for i in range(5)]


def run_of(seed, lift):
  """A concave front that `lift` moves outwards."""
  at = np.linspace(0, 1, 5)
  rewards = np.stack([0.6 + 0.2 * at**0.5, 1 - 0.3 * at**1.5], axis=1)
  return {
    "seed": seed,
    "seconds": 100.0,
    "rewards": (rewards + lift + 0.001 * seed).tolist(),
    "kl": [5.0] * 5,
  }


def content_of(lifts, axis="steps"):
  """Numbers of an experiment: {(method, value): lift}."""
  return {
    "objectives": ["rouge", "nli"],
    "axis": axis,
    "shown": ["full-CLP"],
    "reference_point": [0.0, 0.0],
    "fronts": {
      f"{method}, {value}": {
        "method": method,
        "value": value,
        "samples": 64 * (value or 100),
        "updates": value,
        "weightings": WEIGHTINGS,
        "runs": [run_of(seed, lift) for seed in range(3)],
      }
      for (method, value), lift in lifts.items()
    },
  }


STEPS = content_of(
  {
    ("full-CLP", 1000): 0.0,
    ("full-CLP", 4000): 0.02,
    ("Rewarded Soups", 1000): -0.01,
    ("Rewarded Soups", 4000): -0.02,
  }
)


def test_hypervolumes_and_dominated_shares_are_those_of_each_seed():
  values, volumes = pictures.hypervolumes(STEPS, "full-CLP")
  assert values == [1000, 4000]
  expected = fronts.hypervolume(run_of(2, 0.02)["rewards"], [0, 0])
  assert volumes[1][2] == pytest.approx(expected, abs=1e-12)
  values, shares = pictures.dominated(STEPS, "full-CLP", "Rewarded Soups")
  assert values == [1000, 4000]
  np.testing.assert_array_equal(shares, np.ones([2, 3]))
  _, back = pictures.dominated(STEPS, "Rewarded Soups", "full-CLP")
  np.testing.assert_array_equal(back, np.zeros([2, 3]))


def test_seeds_are_paired_by_number_and_not_by_place():
  content = content_of({("full-CLP", 1): 0.0, ("Rewarded Soups", 1): 0.0})
  own = content["fronts"]["full-CLP, 1"]
  # Seed 2 alone: better than the soups' seeds 0 and 1, equal to their seed 2.
  own["runs"] = own["runs"][2:]
  _, (shares,) = pictures.dominated(content, "full-CLP", "Rewarded Soups")
  assert shares.tolist() == [0.0]


def test_the_cost_to_a_level_is_between_the_budgets_around_it():
  _, volumes = pictures.hypervolumes(STEPS, "full-CLP")
  low, high = (v.mean() for v in volumes)
  spent = page.reached(STEPS, "full-CLP", (low + high) / 2)
  assert spent["steps"] == pytest.approx(2000)
  assert spent["samples"] == pytest.approx(64 * 2000)
  assert page.reached(STEPS, "full-CLP", low)["steps"] == 1000
  assert page.reached(STEPS, "full-CLP", high + 1e-3) is None
  assert page.reached(STEPS, "Rewarded Soups", low) is None


def test_the_cost_to_a_front_has_every_method_and_what_an_answer_takes():
  others = content_of({("MOD", 250): 0.0, ("full-CLP, PPO", 250): -0.5})
  cost = {
    "times": [{"method": "full-CLP", "over_first": 1.0}],
    "parameters": {
      "tiny": [{"method": "MOD", "models": 2}, {"method": "x", "models": 1}]
    },
  }
  text = page._cost_to_a_front([STEPS, others], cost)
  rows = [r.split(" | ") for r in text.splitlines() if r.startswith("| ")][2:]
  assert {r[0].strip("| "): r[-1].strip("| ") for r in rows} == {
    "full-CLP": "1.00 of full-CLP's time",
    "Rewarded Soups": "-",
    "MOD": "2 models a token",
    "full-CLP, PPO": "1.00 of full-CLP's time",
  }
  (ppo,) = (r for r in rows if "PPO" in r[0])
  assert all(cell.startswith("never; best ") for cell in ppo[1:-1])
  assert "a level that 250 steps have already" in text


@pytest.mark.parametrize("num", [1, 5, 8])
def test_pictures_show_every_method_once(num, tmp_path):
  content = content_of(
    {(f"method {i}", None): -0.01 * i for i in range(num)}, axis=None
  )
  pictures.fronts(content, tmp_path / "fronts.png")
  first = (tmp_path / "fronts.png").read_bytes()
  pictures.fronts(content, tmp_path / "fronts.png")
  assert (tmp_path / "fronts.png").read_bytes() == first
  assert first.startswith(b"\x89PNG")


def test_of_three_rewards_every_method_has_its_hypervolumes(
  tmp_path, monkeypatch
):
  lifts = {("z", None): 0.0, ("Rewarded Soups", None): -0.1, ("c", None): 0.1}
  content = content_of(lifts, axis=None)
  content["objectives"] = ["rouge", "nli", "tldr"]
  content["reference_point"] = [0.0, 0.0, 0.0]
  content["shown"] = list(content["fronts"])
  for front in content["fronts"].values():
    front["weightings"] = [[*row, 0.0] for row in front["weightings"]]
    for run in front["runs"]:
      run["rewards"] = [[*row, 0.5] for row in run["rewards"]]
  drawn = []
  monkeypatch.setattr(pictures, "_save", lambda figure, _: drawn.append(figure))
  pictures.fronts(content, tmp_path / "fronts.png")
  *pairs, strip = [ax for sub in drawn[0].subfigs for ax in sub.axes]
  assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in pairs] == [
    ("reward rouge", "reward nli"),
    ("reward rouge", "reward tldr"),
    ("reward nli", "reward tldr"),
  ]
  names = [x.get_text().split(",")[0] for x in strip.get_yticklabels()]
  assert names == ["Rewarded Soups", "z", "c"]  # the best on top
  found = strip.collections[0].get_offsets()[:, 0]
  expected = pictures.hypervolumes(content, "Rewarded Soups")[1][0]
  np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("num", [1, 2, 4, 5, 8])
def test_the_lowest_panel_of_a_column_has_numbers(num, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(pictures, "_save", lambda figure, _: drawn.append(figure))
  content = content_of({("full-CLP", value): 0.0 for value in range(num)})
  pictures.by_value(content, tmp_path / "panels.png")
  drawn[0].draw_without_rendering()
  lowest = {}
  for ax in drawn[0].axes:
    if ax.axison:
      lowest[round(ax.get_position().x0, 2)] = ax
  assert len(drawn[0].axes) - num < 2 and len(lowest) > 1 - (num == 1)
  for ax in lowest.values():
    assert any(t.get_visible() and t.get_text() for t in ax.get_xticklabels())


def test_a_front_of_a_reward_against_kl_has_kl_as_its_axis(tmp_path):
  content = content_of({("full-CLP", None): 0.0}, axis=None)
  content["objectives"] = ["nli"]
  for front in content["fronts"].values():
    front["weightings"] = [[1.0, 0.01 * 2**i] for i in range(5)]
    for run in front["runs"]:
      run["rewards"] = [row[1:] for row in run["rewards"]]
      run["kl"] = [5.0, 4.0, 3.0, 2.0, 1.0]
  (run, *_) = content["fronts"]["full-CLP, None"]["runs"]
  np.testing.assert_allclose(
    pictures.points(content, run)[:, 1], [-5, -4, -3, -2, -1]
  )
  pictures.fronts(content, tmp_path / "fronts.png")


def test_steps_are_enough_where_half_as_many_more_gain_little():
  losses = {700: 0.50, 1050: 0.45, 1600: 0.449, 2400: 0.46}
  assert protocol.converged(losses, 0.005, relative=True) == 1050
  volumes = {1000: 0.80, 1500: 0.81, 2250: 0.8149, 3375: 0.83}
  assert protocol.converged(volumes, 0.005, relative=False) == 1500
  with pytest.raises(ValueError, match="after 3,375 steps"):
    protocol.converged({2250: 0.8, 3375: 0.81}, 0.005, relative=False)


def test_the_best_rate_is_each_methods_own():
  content = content_of(
    {
      ("full-CLP", 3e-4): 0.0,
      ("full-CLP", 1e-3): 0.02,
      ("full-CLP", 3e-3): 0.01,
      ("LoRA", 3e-4): -0.02,
      ("LoRA", 1e-3): -0.01,
      ("LoRA", 3e-3): 0.0,
    },
    axis="learning rate",
  )
  assert protocol.best_rates(content) == {"full-CLP": 1e-3, "LoRA": 3e-3}
  table = protocol.text({"choose-rate": content | {"command": "clp ..."}})
  assert table.count("**") == 4 + 2
  assert (
    "**Not measured yet:** choose-supervised, choose-steps, choose-rate-kl;"
    in table
  )


def test_numbers_are_json_with_a_line_for_each_front():
  from clp_jax.experiments import results

  text = results._compact(STEPS | {"note": "x", "empty": {}})
  assert json.loads(text) == STEPS | {"note": "x", "empty": {}}
  assert text.count("\n") < 20


def test_a_curve_that_is_not_finished_has_empty_cells(tmp_path):
  lifts = {("full-CLP", 4000): 0.02, ("full-CLP", 1000): 0.0}
  content = content_of(lifts | {("Rewarded Soups", 4000): -0.02})
  text = page._curve(content, tmp_path)
  _, _, *lines = [x for x in text.splitlines() if x.startswith("|")]
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
  assert [bool(c) for c in cells[0]] == [True] * 3  # 1,000 and 4,000 steps
  assert cells[1][:2] == ["Rewarded Soups", ""] and cells[1][2]
  assert cells[2] == ["Rewarded Soups, m x", "", ""]


def test_the_page_is_what_its_numbers_give(tmp_path):
  results = tmp_path / "results"
  results.mkdir()
  for file in (ROOT / "docs" / "results").glob("*.json"):
    shutil.copy(file, results)
  page = tmp_path / "RESULTS.md"
  status, _, err = runs.clp("experiment", "results", "--output", page)
  assert status == 0, err
  assert page.read_text() == (ROOT / "docs" / "RESULTS.md").read_text(), (
    "run clp experiment results"
  )
  drawn = {file.name for file in results.glob("*.png")}
  assert drawn == set(re.findall(r"\(results/(.*?\.png)\)", page.read_text()))


def test_the_chosen_steps_are_those_that_the_measurement_chose():
  file = ROOT / "docs" / "results" / "choose-steps.json"
  volumes = protocol.step_volumes(json.loads(file.read_text()))
  chosen = protocol.converged(volumes, protocol.STEPS_GAIN, relative=False)
  assert chosen <= protocol.STEPS <= protocol.MAX_STEPS
  # Half as many more were measured, too.
  later = volumes[protocol.STEPS * 3 // 2]
  assert later - volumes[protocol.STEPS] < protocol.STEPS_GAIN


def test_the_chosen_supervised_steps_gain_no_more():
  file = ROOT / "docs" / "results" / "choose-supervised.json"
  rows = json.loads(file.read_text())["rows"]
  losses = {row["steps"]: row["loss"] for row in rows}
  fewest = protocol.converged(losses, protocol.SUPERVISED_GAIN, relative=True)
  assert fewest <= protocol.SUPERVISED_STEPS
  later = losses[protocol.SUPERVISED_STEPS * 3 // 2]
  gain = 1 - later / losses[protocol.SUPERVISED_STEPS]
  assert gain < protocol.SUPERVISED_GAIN


def test_the_chosen_rates_are_those_that_the_measurement_chose():
  file = ROOT / "docs" / "results" / "choose-rate.json"
  best = protocol.best_rates(json.loads(file.read_text()))
  chosen = {METHODS[name].label: r for name, r in protocol.CHOSEN_RATES.items()}
  assert chosen == best

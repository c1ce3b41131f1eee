"""Fronts compared: figures, intervals, files and what can't be compared."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import runs

from clp_jax.errors import FrontError
from clp_jax.evaluation import (
  compare,
  comparison_files,
  measurements,
  metrics,
  sweep,
)
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.front import Estimate
from clp_jax.weightings import Distribution

PROMPTS = 40
WEIGHTS = np.linspace(0, 1, 5)


def write_run(
  path,
  *,
  shift=(0.0, 0.0),
  noise=0.1,
  seed=0,
  method="full-CLP",
  objectives=("rouge", "nli"),
  alphas=(0.01,),
  documents="abc",
  **changes,
):
  """The evaluation of a made-up policy: a concave front, moved by `shift`."""
  rng = np.random.default_rng(seed)
  points, rewards, kls = [], [], []
  several = len(objectives) > 1
  for alpha in alphas:
    for w in WEIGHTS if several else (1.0,):
      mean = np.array([0.5 + 0.4 * np.sqrt(w), 0.5 + 0.4 * np.sqrt(1 - w)])
      if not several:
        mean = np.array([0.9 - 0.3 * alpha])
      mean = mean + np.asarray(shift)[: len(objectives)]
      seen = mean + noise * rng.normal(size=(PROMPTS, 2, len(objectives)))
      kl = 5.0 * (1 - alpha) + noise * rng.normal(size=(PROMPTS, 2))
      seen, kl = seen.astype(np.float32), kl.astype(np.float32)
      weights = dict(zip(objectives, (w, 1 - w), strict=False))
      value = (1 - alpha) * seen @ np.array([*weights.values()]) - alpha * kl
      points.append(
        front_lib.Point(
          weights=weights,
          alpha=alpha,
          rewards={
            o: front_lib.standard_error(seen[:, :, i])
            for i, o in enumerate(objectives)
          },
          kl=front_lib.standard_error(kl),
          value=front_lib.standard_error(value),
        )
      )
      rewards.append(seen)
      kls.append(kl)
  front = front_lib.front_from_points(
    points,
    **{
      "method": method,
      "objectives": objectives,
      "step": 4,
      "prompts": PROMPTS,
      "decoding": {"temperature": 1.0, "samples": 2},
      "reference_point": [0.1] * len(objectives),
    }
    | changes,
  )
  rows = [
    {
      "document": "An article.",
      "reference": "A summary.",
      "weights": dict(points[0].weights),
      "alpha": alphas[0],
      "summary": "Short.",
      "rewards": {o: 0.5 for o in objectives},
    }
  ]
  sweep.save(
    f"{path}/evaluation",
    sweep.Sweep(
      front,
      rows,
      measurements.Measurements(
        np.stack(rewards), np.stack(kls), measurements.digest(documents)
      ),
    ),
  )
  return compare.load_run(str(path), seed)


def compared(methods, bootstrap=50, **kwargs):
  objectives = next(iter(methods.values()))[0].front.objectives
  kwargs = {"distribution": Distribution(len(objectives))} | kwargs
  return compare.compare(methods, bootstrap=bootstrap, seed=0, **kwargs)


def test_figures_are_the_fronts_own(tmp_path):
  run = write_run(tmp_path / "a", noise=0.0)
  values = compared({"a": [run]}).values["a"]
  assert values["hypervolume"].mean == pytest.approx(run.front.hypervolume)
  assert values["spread"].mean == pytest.approx(run.front.spread)
  assert values["rank corr. nli"].mean == pytest.approx(
    run.front.monotonicity["nli"]
  )
  assert values["hypervolume"].stderr is None  # one run
  # Uniform Q over 5 points of the line: the ends count half.
  shares = np.array([0.125, 0.25, 0.25, 0.25, 0.125])
  utility = shares @ (run.front.weights * run.front.rewards).sum(1)
  assert values["utility"].mean == pytest.approx(utility, abs=2e-3)
  kl = np.array([point.kl.mean for point in run.front.points])
  value = shares @ (
    0.99 * (run.front.weights * run.front.rewards).sum(1) - 0.01 * kl
  )
  assert values["value"].mean == pytest.approx(value, abs=2e-3)


def test_q_weighs_the_points():
  grid = np.array([[w, 1 - w, 0.01] for w in (0, 0.5, 1)])
  uniform = metrics.point_weights(Distribution(2), grid)
  np.testing.assert_allclose(uniform, [0.25, 0.5, 0.25], atol=0.02)
  ends = metrics.point_weights(Distribution(2, concentration=0.05), grid)
  assert ends[1] < 0.1 and ends.sum() == pytest.approx(1)
  # Log-uniform alphas: nearest in the logarithm.
  grid = np.array([[1, a] for a in (0.01, 0.1, 1.0)])
  alphas = metrics.point_weights(Distribution(1, alpha_range=(0.01, 1.0)), grid)
  np.testing.assert_allclose(alphas, [0.25, 0.5, 0.25], atol=0.02)


def test_methods_are_means_over_seeds_with_their_error(tmp_path):
  seeds = [
    write_run(tmp_path / str(s), seed=s, shift=(0.01 * s, 0), noise=0.0)
    for s in range(3)
  ]
  values = compared({"a": seeds}).values["a"]["hypervolume"]
  volumes = [run.front.hypervolume for run in seeds]
  assert values.mean == pytest.approx(np.mean(volumes))
  assert values.stderr == pytest.approx(np.std(volumes, ddof=1) / np.sqrt(3))
  front = compare.mean_front(seeds, "a")
  means = [run.front.rewards[2, 0] for run in seeds]
  assert front.points[2].rewards["rouge"] == Estimate(
    pytest.approx(np.mean(means)),
    pytest.approx(np.std(means, ddof=1) / np.sqrt(3)),
  )


def test_intervals_cover_the_truth(tmp_path):
  """Of the expected utility, whose truth is known, in 19 cases of 20 or so."""
  shares = np.array([0.125, 0.25, 0.25, 0.25, 0.125])
  w = WEIGHTS
  truth = shares @ (
    w * (0.5 + 0.4 * np.sqrt(w)) + (1 - w) * (0.5 + 0.4 * np.sqrt(1 - w))
  )
  hits, widths = 0, []
  for trial in range(30):
    run = write_run(tmp_path / str(trial), seed=trial, noise=0.3)
    value = compared({"a": [run]}, bootstrap=100).values["a"]["utility"]
    hits += value.low <= truth <= value.high
    widths.append(value.high - value.low)
  assert 25 <= hits <= 30
  # Noise of one prompt's mean over 2 samples, averaged over the points.
  error = (
    0.3
    / np.sqrt(2 * PROMPTS)
    * np.sqrt(np.sum(shares**2 * (w**2 + (1 - w) ** 2)))
  )
  assert np.mean(widths) == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_shared_prompts_narrow_a_difference(tmp_path):
  """The same noise in both methods cancels."""
  a = write_run(tmp_path / "a", seed=3, noise=0.3)
  b = write_run(tmp_path / "b", seed=3, noise=0.3, shift=(0.05, 0.05))
  found = compared({"a": [a], "b": [b]})
  difference = found.differences["b"]["utility"]
  assert difference.low <= 0.05 <= difference.high
  assert difference.high - difference.low < 1e-3
  own = found.values["b"]["utility"]
  assert own.high - own.low > 0.02
  assert found.dominated["b"]["a"] == 1 and found.dominated["a"]["b"] == 0


def test_seeds_are_paired_where_they_are_the_same(tmp_path):
  """A seed's luck that both methods share is not their difference."""
  luck = {0: 0.0, 1: 0.1, 2: -0.1}
  methods = {
    name: [
      write_run(
        tmp_path / f"{name}{s}",
        seed=s,
        shift=(luck[s] + better, luck[s] + better),
      )
      for s in luck
    ]
    for name, better in (("a", 0.0), ("b", 0.02))
  }
  difference = compared(methods).differences["b"]["utility"]
  assert difference.mean == pytest.approx(0.02, abs=1e-4)
  assert difference.stderr < 1e-3 and 0.01 < difference.low
  assert compared(methods).values["b"]["utility"].stderr > 0.05


def test_one_reward_is_compared_in_the_plane_with_kl(tmp_path):
  alphas = (0.01, 0.1, 1.0)
  one = {"objectives": ("nli",), "alphas": alphas, "noise": 0.0}
  a = write_run(tmp_path / "a", **one)
  b = write_run(tmp_path / "b", shift=(0.05, 0), **one)
  found = compared(
    {"a": [a], "b": [b]},
    distribution=Distribution(1, alpha_range=(0.01, 1.0)),
    reference_point={"nli": 0.5, "kl": 6.0},
  )
  (point,) = found.reference_points.values()
  assert point == {"nli": 0.5, "-kl": -6.0}
  # By hand: points (reward, 6 - KL) above (0.5, 0), from the left.
  rewards = a.front.rewards[:, 0] - 0.5
  room = 6 - np.array([p.kl.mean for p in a.front.points])
  by_hand = rewards[2] * room[2] + (rewards[1] - rewards[2]) * room[1]
  by_hand += (rewards[0] - rewards[1]) * room[0]
  values = found.values["a"]
  assert values["hypervolume"].mean == pytest.approx(by_hand)
  assert values["rank corr. nli"].mean == pytest.approx(1)
  # b's middle has more reward than a's first point, and less KL.
  assert found.dominated["b"]["a"] == pytest.approx(1 / 3)
  points = compared({"a": [a]}, near={"nli": 0.8, "kl": 4.0}).reference_points
  assert [p["-kl"] for p in points.values()] == [-5.0, -4.0]


def test_igd_is_to_the_best_points_of_all_mean_fronts(tmp_path):
  """By hand: each point of the better front is 0.1 above one of the other."""
  a = write_run(tmp_path / "a", noise=0.0)
  b = write_run(tmp_path / "b", noise=0.0, shift=(0, 0.1))
  found = compared({"a": [a], "b": [b]})
  np.testing.assert_allclose(found.best_points, b.front.rewards, atol=1e-6)
  expected = np.mean(
    [
      min(np.linalg.norm(np.maximum(z - p, 0)) for p in a.front.rewards)
      for z in b.front.rewards
    ]
  )
  assert found.values["a"]["IGD+"].mean == pytest.approx(expected)
  assert found.values["b"]["IGD+"].mean == 0
  assert found.differences["b"]["IGD+"].mean == pytest.approx(-expected)
  # Of two seeds the mean front counts, whose points here are those of none.
  seeds = [
    write_run(tmp_path / f"s{i}", noise=0.0, seed=i, shift=(0.1 * i, 0))
    for i in range(2)
  ]
  both = compared({"seeds": seeds})
  mean = compare.mean_front(seeds, "seeds").rewards
  np.testing.assert_allclose(both.best_points, mean, atol=1e-6)
  value = both.values["seeds"]["IGD+"]
  assert value.mean == 0 and value.stderr is None
  assert "IGD+: mean distance" in comparison_files.note(found)
  assert comparison_files.to_json(found)["best_points"] == found.best_points


def test_a_point_alone_has_no_utility(tmp_path):
  """One weighting is no sweep: it is compared where that makes sense."""
  front = write_run(tmp_path / "a")
  alone = write_run(
    tmp_path / "b", objectives=("rouge", "nli"), method="one point"
  )
  part = front_lib.front_from_points(
    alone.front.points[2:3],
    method="one point",
    objectives=alone.front.objectives,
    step=4,
    prompts=PROMPTS,
    decoding=alone.front.decoding,
    reference_point=alone.front.reference_point,
  )
  point = compare.Run(
    "b", part, alone.rewards[2:3], alone.kl[2:3], alone.prompts, 0
  )
  found = compared({"a": [front], "one": [point]})
  values = found.values["one"]
  assert np.isnan(values["utility"].mean) and values["spread"].mean == 0
  assert np.isfinite(values["hypervolume"].low)
  assert "nan" not in comparison_files.markdown(found)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"objectives": ("rouge", "tldr")}, "objectives .rouge, nli and rouge, t"),
    ({"documents": "abd"}, "held-out prompts"),
    ({"decoding": {"temperature": 0.5, "samples": 2}}, "temperature .1.0 and"),
    ({"reference_point": [0.2, 0.1]}, "give --reference-point"),
  ],
)
def test_runs_that_answered_another_question(tmp_path, change, message):
  a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", **change)
  with pytest.raises(FrontError, match=message):
    compared({"a": [a], "b": [b]})


def test_measurements_of_another_sweep_are_refused(tmp_path):
  write_run(tmp_path / "a")
  write_run(tmp_path / "b", seed=1)
  file = tmp_path / "a" / "evaluation" / "rewards.npz"
  other = tmp_path / "b" / "evaluation" / "rewards.npz"
  file.write_bytes(other.read_bytes())
  with pytest.raises(FrontError, match="not of the sweep"):
    compare.load_run(str(tmp_path / "a"), 0)
  file.write_bytes(b"PK half of a file")
  with pytest.raises(FrontError, match="rewards.npz can't be read"):
    compare.load_run(str(tmp_path / "a"), 0)
  file.unlink()
  with pytest.raises(FrontError, match="evaluate the run again"):
    compare.load_run(str(tmp_path / "a"), 0)


def test_scores_of_a_whole_split_belong_to_their_front(tmp_path):
  """Their sum in float32 would be off by more than other sweeps are."""
  scores = np.full([1, 11_334, 4, 2], 0.95, np.float32)
  estimate = front_lib.standard_error(scores[0, :, :, 0])
  point = front_lib.Point(
    weights={"rouge": 0.5, "nli": 0.5},
    alpha=0.0,
    rewards={"rouge": estimate, "nli": estimate},
    kl=estimate,
    value=estimate,
  )
  front = front_lib.front_from_points(
    [point],
    method="full-CLP",
    objectives=("rouge", "nli"),
    step=4,
    prompts=11_334,
    decoding={},
    reference_point=(0.0, 0.0),
  )
  saved = measurements.Measurements(scores, scores[..., 0], "digest")
  measurements.save(tmp_path, saved)
  assert measurements.load(tmp_path, front).rewards.shape == scores.shape


def test_the_command_writes_every_file(tmp_path):
  write_run(tmp_path / "a")
  write_run(tmp_path / "b", shift=(0.03, 0.01), method="Rewarded Soups")
  output = tmp_path / "out"
  status, out, err = runs.clp(
    *("compare", tmp_path / "a", f"soup={tmp_path / 'b'}", "--output", output),
    *("--bootstrap", 20, "--reference-point", "rouge=0.2,nli=0.1"),
  )
  assert status == 0, err
  assert "full-CLP" in out and "soup" in out and "file://" in out
  assert (output / "fronts.png").read_bytes().startswith(b"\x89PNG")
  page = (output / "report.html").read_text()
  assert "soup" in page and "http://" not in page.replace("www.w3.org", "")
  text = (output / "comparison.md").read_text()
  assert (
    "rouge = 0.2, nli = 0.1" in text and "Differences from full-CLP" in text
  )
  # Off a terminal, 80 columns show every figure whole.
  *shown, _, _, _ = out.splitlines()
  assert max(map(len, shown)) <= 80
  table = [line for line in text.splitlines() if line.startswith("| ")]
  for cell in " | ".join(table).split(" | "):
    assert cell.strip("| -") in "\n".join(shown), cell
  rows = list(
    csv.DictReader(io.StringIO((output / "comparison.csv").read_text()))
  )
  assert [row["method"] for row in rows] == ["full-CLP", "soup"]
  content = json.loads((output / "comparison.json").read_text())
  metrics = content["methods"]["soup"]["metrics"]["hypervolume"]
  assert float(rows[1]["hypervolume mean"]) == metrics["mean"]
  assert metrics["low"] < metrics["mean"] < metrics["high"]


@pytest.mark.parametrize(
  ("arguments", "status", "message"),
  [
    (["nothing"], 1, "clp evaluate"),
    (["a", "a"], 2, "given twice"),
    (["=a"], 2, "NAME=FOLDER"),
    (["a", "--reference-point", "rouge=1"], 1, "must name rouge, nli"),
    (["a", "--reference-point", "rouge=nan,nli=0"], 1, "must be finite"),
    (["a", "--bootstrap", "0"], 2, ">= 1"),
  ],
)
def test_what_can_not_work_says_so(
  tmp_path, monkeypatch, arguments, status, message
):
  write_run(tmp_path / "a")
  monkeypatch.chdir(tmp_path)
  got, _, err = runs.clp("compare", *arguments, "--output", "out")
  assert got == status and message in err.splitlines()[-1], err
  assert not (tmp_path / "out").exists()


def test_no_other_method_moves_the_default_reference_point(tmp_path):
  line = {"objectives": ("nli",), "alphas": (0.01, 0.1)}
  first = write_run(tmp_path / "a", **line)
  other = write_run(tmp_path / "b", seed=1, **line)
  far = dataclasses.replace(
    other.front,
    points=tuple(
      dataclasses.replace(p, kl=Estimate(50.0, 0.1)) for p in other.front.points
    ),
  )
  other = dataclasses.replace(other, front=far)
  alone = compared({"a": [first]}).reference_points
  assert alone["hypervolume"] == {"nli": 0.1, "-kl": -5.0}
  assert compared({"a": [first], "b": [other]}).reference_points == alone
  assert compared({"b": [other], "a": [first]}).reference_points != alone


def test_runs_of_one_config_are_seeds(tmp_path):
  from clp_jax import demo, run_folder

  for name, seed, lr in (("a", 0, 1e-3), ("b", 1, 1e-3), ("c", 1, 5e-4)):
    config = demo.get_config()
    config.seed = seed
    config.model.init = f"sft{seed}"
    config.optimizer.learning_rate = lr
    run_folder.start(str(tmp_path / name), config)
    write_run(tmp_path / name, seed=seed)
  paths = [(None, str(tmp_path / name)) for name in "abc"]
  methods, config = compare.group_runs(paths)
  assert [len(found) for found in methods.values()] == [2, 1]
  assert [run.seed for run in methods["full-CLP"]] == [0, 1]
  assert compare.distribution_of(config, methods).concentration == 0.5

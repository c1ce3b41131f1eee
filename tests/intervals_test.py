"""The coverage of a comparison's intervals, on fronts whose truth is known.

The slow test measures every interval that compare.py makes, of methods and of
differences, and prints the table (pytest -s).

Quantiles of 400 resamples cover a plain mean in 0.943: 2000 trials find less
than 0.92 from 1 of 200,000 seeds. They cover the spread of one run that steers
in 0.935: 5000 trials find less than 0.92 from 1 of 100,000 seeds.
"""

import math
import sys
import zlib
from typing import NamedTuple

import numpy as np
import pytest

from clp_jax import weightings
from clp_jax.evaluation import compare, metrics
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.front import Estimate
from clp_jax.weightings import Distribution

PROMPTS = 200


class Case(NamedTuple):
  """Two methods with known points [P, m + 1], the rewards and the KL."""

  methods: tuple[np.ndarray, np.ndarray]
  weights: np.ndarray  # [P, m]
  alphas: np.ndarray  # [P]
  seeds: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), (0,))
  seed_deviation: float = 0.0
  near: tuple[float, ...] | None = None
  trials: int = 2000


def two_rewards(size, shift=0.0):
  """A concave front of 11 points, shrunk towards its middle; one KL."""
  w = np.linspace(0, 1, 11)
  points = np.stack([0.6 + 0.25 * np.sqrt(w), 0.7 + 0.25 * np.sqrt(1 - w)], 1)
  points = points.mean(0) + size * (points - points.mean(0)) + shift
  kl = 2.0 + 4 * size * (w - 0.5) ** 2
  return np.concatenate([points, kl[:, None]], axis=1)


def three_rewards(size, shift=0.0):
  points = 0.5 + 0.4 * np.sqrt(weightings.simplex_grid(3, 5)) + shift
  points = points.mean(0) + size * (points - points.mean(0))
  return np.concatenate([points, np.full([len(points), 1], 3.0)], axis=1)


def against_kl(size, shift=0.0):
  """One reward over 7 alphas, more of it for more KL."""
  kl = 3.0 + size * np.linspace(3, -2.8, 7)
  return np.stack([0.5 + 0.15 * np.sqrt(kl) + shift, kl], axis=1)


W = np.linspace(0, 1, 11)
TWO = {
  "weights": np.stack([W, 1 - W], 1),
  "alphas": np.full(11, 0.03),
  "near": (0.55, 0.65),
}
THREE = {"weights": weightings.simplex_grid(3, 5), "alphas": np.full(15, 0.03)}
KL = {"weights": np.ones([7, 1]), "alphas": np.geomspace(0.01, 0.1, 7)}
SAME, OTHER = ((0, 1, 2), (0, 1, 2)), ((0, 1, 2), (3, 4, 5))
CASES = {
  "steering": Case((two_rewards(1), two_rewards(1, 0.02)), trials=5000, **TWO),
  "weak": Case((two_rewards(0.3), two_rewards(0.1)), **TWO),
  "flat": Case((two_rewards(0), two_rewards(1, 0.02)), trials=5000, **TWO),
  "three seeds": Case(
    (two_rewards(1), two_rewards(1, 0.02)),
    seeds=SAME,
    seed_deviation=0.06,
    **TWO,
  ),
  "flat, three seeds": Case(
    (two_rewards(0), two_rewards(1, 0.02)),
    seeds=SAME,
    seed_deviation=0.06,
    **TWO,
  ),
  "other seeds": Case(
    (two_rewards(1), two_rewards(1, 0.02)),
    seeds=OTHER,
    seed_deviation=0.06,
    **TWO,
  ),
  "few differences of seeds": Case(
    (two_rewards(1), two_rewards(0.3)), seeds=SAME, seed_deviation=0.01, **TWO
  ),
  "three rewards": Case((three_rewards(1), three_rewards(0)), **THREE),
  "reward against KL": Case((against_kl(1), against_kl(1, 0.02)), **KL),
  "reward against KL, flat": Case((against_kl(0, -0.1), against_kl(1)), **KL),
}


def make_run(case, points, seed, per_prompt):
  """A run whose prompts answered so, per_prompt [P, prompts, m + 1]."""
  objectives = tuple(f"r{i}" for i in range(case.weights.shape[1]))
  means = per_prompt.mean(axis=1)
  front = front_lib.front_from_points(
    [
      front_lib.Point(
        weights=dict(zip(objectives, w, strict=True)),
        alpha=float(alpha),
        rewards={
          o: Estimate(x, 0.0)
          for o, x in zip(objectives, mean[:-1], strict=True)
        },
        kl=Estimate(mean[-1], 0.0),
        value=Estimate(0.0, 0.0),
      )
      for w, alpha, mean in zip(case.weights, case.alphas, means, strict=True)
    ],
    method="",
    objectives=objectives,
    step=1,
    prompts=per_prompt.shape[1],
    decoding={},
    reference_point=[0.0] * len(objectives),
  )
  return compare.Run(
    "", front, per_prompt[..., :-1], per_prompt[..., -1], "", seed
  )


def compared(case, runs, bootstrap=400, seed=0):
  m = case.weights.shape[1]
  reference = {f"r{i}": 0.0 for i in range(m)}
  near = case.near and dict(zip(reference, case.near, strict=True))
  alpha_range = None
  if m == 1:
    reference["kl"] = 8.0
    alpha_range = (case.alphas[0], case.alphas[-1])
  return compare.compare(
    dict(zip("ab", runs, strict=True)),
    distribution=Distribution(m, alpha_range=alpha_range),
    reference_point=reference,
    near=near,
    bootstrap=bootstrap,
    seed=seed,
  )


def figures(found):
  """(method or difference, metric) -> Value."""
  values = {(m, k): v for m, of in found.values.items() for k, v in of.items()}
  values |= {("b - a", k): v for k, v in found.differences["b"].items()}
  return values


def trial(case, rng):
  """The comparison of noisy runs."""
  axes = case.methods[0].shape[1]
  scale = np.array([*([1.0] * (axes - 1)), 4.0])  # KL is in nats
  prompts = 0.15 * scale * rng.normal(size=[1, PROMPTS, axes])
  shared = rng.normal(size=[9, axes])
  runs = []
  for points, seeds in zip(case.methods, case.seeds, strict=True):
    runs.append([])
    for seed in seeds:
      moved = 0.7 * (shared[seed] + rng.normal(size=axes))
      noise = 0.25 * rng.normal(size=[len(points), PROMPTS, axes])
      seen = points + case.seed_deviation * scale * moved
      runs[-1].append(
        make_run(case, points, seed, seen[:, None] + prompts + scale * noise)
      )
  return compared(case, runs, seed=int(rng.integers(1 << 30)))


def truth(case):
  """What the intervals should hold: without noise, over very many seeds."""
  axes = case.methods[0].shape[1]
  rng = np.random.default_rng(0)
  num = 400 if case.seed_deviation else 1
  scale = np.array([*([1.0] * (axes - 1)), 4.0])
  moved = case.seed_deviation * scale * rng.normal(size=[num, axes])
  moved -= moved.mean(axis=0)
  runs = [
    [
      make_run(case, points, i, np.repeat((points + m)[:, None], 2, axis=1))
      for i, m in enumerate(moved)
    ]
    for points in case.methods
  ]
  found = figures(compared(case, runs, bootstrap=1))
  # What does not move has no order, neither the one nor the other.
  return {k: 0.0 if math.isnan(v.mean) else v.mean for k, v in found.items()}


def check(what, metric, value):
  """An interval holds its own estimate and stays in the metric's range."""
  assert value.low <= value.mean <= value.high, (what, metric, value)
  if what != "b - a" and metric not in ("utility", "value"):
    rank = metric.startswith("rank corr.")
    assert value.low >= (-1 if rank else 0), (what, metric, value)
    assert value.high <= 1 or not rank, (what, metric, value)


def coverage(case, seed):
  """Figure -> (share of trials below, above, mean error, mean width)."""
  rng = np.random.default_rng(seed)
  true = truth(case)
  rows = {k: np.zeros(4) for k in true}
  for _ in range(case.trials):
    for k, v in figures(trial(case, rng)).items():
      if k[0] != "b - a":
        rank = k[1].startswith("rank")
        assert (
          v.low >= -1 if rank else v.low >= 0 or k[1] in ("utility", "value")
        )
        assert v.high <= 1 or not rank
      rows[k] += (
        true[k] < v.low - 1e-9,
        true[k] > v.high + 1e-9,
        v.mean - true[k],
        v.high - v.low,
      )
  return {k: row / case.trials for k, row in rows.items()}


@pytest.fixture
def weighed_once(monkeypatch):
  """Weighs a case's points in its first trial: it is the same in all."""
  weigh, found = metrics.point_weights, []

  def weigh_once(distribution, weightings):
    if not found:
      found.append(weigh(distribution, weightings))
    return found[0]

  monkeypatch.setattr(metrics, "point_weights", weigh_once)


@pytest.mark.slow
@pytest.mark.usefixtures("weighed_once")
@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_the_truth(name):
  found = coverage(CASES[name], zlib.crc32(name.encode()))
  lines = [f"\n{name}"]
  for (what, metric), (below, above, error, width) in found.items():
    lines.append(
      f"{what:6} {metric:18} covers {1 - below - above:.3f} (misses "
      f"{below:.3f} below, {above:.3f} above), bias {error:+.4f}, width "
      f"{width:.4f}"
    )
  sys.stdout.write("\n".join(lines) + "\n")
  assert min(1 - row[0] - row[1] for row in found.values()) >= 0.92


@pytest.mark.parametrize("name", CASES)
def test_intervals_stay_in_range_and_hold_their_estimate(name):
  rng = np.random.default_rng(0)
  for key, value in figures(trial(CASES[name], rng)).items():
    check(*key, value)


def test_the_noise_of_a_flat_front_is_no_spread():
  """Nor hypervolume: the bias of the measured points is mostly taken off."""
  case, rng = CASES["flat"], np.random.default_rng(0)
  true, errors = truth(case), {}
  for _ in range(20):
    found = trial(case, rng)
    front = found.runs["a"][0].front
    for metric, measured in (
      ("spread", front.spread),
      ("hypervolume", front.hypervolume),
    ):
      value = found.values["a"][metric]
      row = (measured - true["a", metric], value.mean - true["a", metric])
      errors.setdefault(metric, []).append(row)
    assert found.values["a"]["spread"].low == 0
    assert found.values["a"]["rank corr. r0"][2:] == (-1, 1)
  for metric, rows in errors.items():
    measured, estimated = np.mean(rows, axis=0)
    assert measured > 0.03 and abs(estimated) < measured / 3, metric


def test_seeds_give_a_t_interval():
  """Without noise of prompts: mean +- t_2 s / sqrt(3), of runs and of pairs."""
  case = CASES["three seeds"]
  points = case.methods[0]

  def run(seed, shift):
    moved = np.repeat((points + shift)[:, None], 2, axis=1)
    return make_run(case, points, seed, moved)

  runs = [
    [run(0, 0.0), run(1, 0.05), run(2, 0.03)],
    [run(0, 0.1), run(1, 0.1), run(2, 0.12)],
  ]
  found = compared(case, runs, bootstrap=2000)
  for value, shifts in (
    (found.values["a"]["utility"], [0.0, 0.05, 0.03]),
    (found.differences["b"]["utility"], [0.1, 0.05, 0.09]),
  ):
    error = np.std(shifts, ddof=1) / np.sqrt(3)
    assert value.stderr == pytest.approx(error)
    # scipy.stats.t(2).ppf(0.975), and 16,000 draws of long tails.
    width = 2 * 4.303 * error
    assert value.high - value.low == pytest.approx(width, rel=0.08)
    assert value.high + value.low == pytest.approx(2 * value.mean)

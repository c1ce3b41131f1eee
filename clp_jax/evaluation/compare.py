"""Fronts of several methods compared, with intervals.

A method has one run or several, which differ in their seed. `metrics.py` says
what is measured of each run's front; of a method it is the mean over its runs,
with the standard error over them.

`intervals.py` makes estimates and 95% intervals of it. Prompts are resampled
together for all methods, since all answer the same, and a difference is paired
by seed where both methods were run from the same seeds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from numpy.typing import NDArray

from clp_jax import build, run_folder
from clp_jax import config as config_lib
from clp_jax.errors import FrontError
from clp_jax.evaluation import fronts as fronts_lib
from clp_jax.evaluation import intervals, measurements
from clp_jax.evaluation.front import (
  Estimate,
  Front,
  load_front,
  standard_error,
  with_points,
)
from clp_jax.evaluation.intervals import Sample, Value
from clp_jax.evaluation.metrics import Measure, in_plane
from clp_jax.weightings import Distribution

Array = NDArray[np.float64]

SETTINGS = ("temperature", "samples", "max_length", "split", "source_length")


@dataclasses.dataclass(frozen=True)
class Run:
  """One evaluated run; P points."""

  path: str
  front: Front
  rewards: Array  # [P, prompts, m], mean over samples
  kl: Array  # [P, prompts]
  prompts: str  # digest
  seed: int | None  # of the training, where it is known


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The result, methods in the order given; the first is the baseline."""

  objectives: tuple[str, ...]
  reference_points: dict[str, dict[str, float]]  # of a hypervolume, by axis
  best_points: list[list[float]]  # the reference set of IGD+
  metrics: tuple[str, ...]
  methods: tuple[str, ...]
  runs: dict[str, tuple[Run, ...]]
  values: dict[str, dict[str, Value]]  # method -> metric
  # Differences from the first method, of all others.
  differences: dict[str, dict[str, Value]]
  # [a][b]: share of b's points that a point of a beats in everything.
  dominated: dict[str, dict[str, float]]
  bootstrap: int


def load_run(workdir: str, seed: int | None) -> Run:
  """An evaluated run from its folder; `seed` is that of its training.

  Raises:
    FrontError: it has not been evaluated, or by an older version.
  """
  directory = f"{workdir}/evaluation"
  front = load_front(f"{directory}/front.json")
  measured = measurements.load(directory, front)
  return Run(
    path=workdir,
    front=front,
    rewards=measured.rewards.mean(axis=2, dtype=np.float64),
    kl=measured.kl.mean(axis=2, dtype=np.float64),
    prompts=measured.prompts,
    seed=seed,
  )


def in_one_unit(methods: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
  """Runs whose normalised objectives are all in the first run's units.

  Each run has optimised in units of its own reference's scores. Those of
  methods with another reference, prompting's, differ a little.

  Raises:
    FrontError: an objective is normalised in one run and not in another.
  """
  first = next(iter(methods.values()))[0]

  def convert(run: Run) -> Run:
    own, units = run.front.units, first.front.units
    if set(own) != set(units):
      raise FrontError(
        f"{first.path} and {run.path} differ in what is normalised ("
        f"{', '.join(units) or 'none'} and {', '.join(own) or 'none'}); "
        "evaluate runs of one kind."
      )
    if own == units:
      return run
    objectives = first.front.objectives
    scale, shift = np.ones(len(objectives)), np.zeros(len(objectives))
    for i, name in enumerate(objectives):
      if name in units:
        (mean, deviation), (to_mean, to_deviation) = own[name], units[name]
        scale[i] = deviation / to_deviation
        shift[i] = (mean - to_mean) / to_deviation
    rewards = run.rewards * scale + shift
    points = []
    for point, weights, own_rewards, kl in zip(
      run.front.points, run.front.weights, rewards, run.kl, strict=True
    ):
      value = (1 - point.alpha) * own_rewards @ weights - point.alpha * kl
      points.append(
        dataclasses.replace(
          point,
          rewards={
            o: standard_error(own_rewards[:, [i]])
            for i, o in enumerate(objectives)
          },
          value=standard_error(value[:, None]),
        )
      )
    front = with_points(run.front, points, units=units)
    return dataclasses.replace(run, front=front, rewards=rewards)

  return {name: list(map(convert, runs)) for name, runs in methods.items()}


def group_runs(
  named: Sequence[tuple[str | None, str]],
) -> tuple[dict[str, list[Run]], ml_collections.ConfigDict | None]:
  """Run folders as methods and their seeds.

  Args:
    named: (name or None, folder) each. Folders of one name are one method;
      those without are named as their fronts are, and are one method where
      their configs differ in nothing but the seed and the start.

  Returns:
    (method -> runs, the first run's config).

  Raises:
    FrontError: a folder that has not been evaluated.
  """
  methods: dict[str, list[Run]] = {}
  keys: dict[str, Any] = {}
  first = None
  for name, path in named:
    config, seed = None, None
    if (epath.Path(path) / "config.json").exists():
      config = run_folder.load_config(path)
      seed = config.seed
    run = load_run(path, seed)
    first = config if not methods else first
    if name is None:
      name = run.front.method
      key = (run.front.step, _but_for_seed(config))
      if keys.setdefault(name, key) != key:
        name = f"{name} ({path})"
    else:
      keys.setdefault(name, None)
    methods.setdefault(name, []).append(run)
  return methods, first


def _but_for_seed(config: ml_collections.ConfigDict | None) -> Any:
  if config is None:
    return None
  values = config_lib.to_json(config)
  del values["seed"], values["model"]["init"]
  for section in ("eval", "mesh", "sft"):
    values.pop(section, None)
  return values


def distribution_of(
  config: ml_collections.ConfigDict | None,
  methods: Mapping[str, Sequence[Run]],
) -> Distribution:
  """Q: the first run's, or without its config the uniform one.

  A run at one weighting has no Q but that one; it is compared over all.
  """
  if config is None:
    first = next(iter(methods.values()))[0]
    return Distribution(len(first.front.objectives))
  return dataclasses.replace(build.distribution(config), weights=None)


def compare(
  methods: Mapping[str, Sequence[Run]],
  *,
  distribution: Distribution,
  reference_point: Mapping[str, float] | None = None,
  near: Mapping[str, float] | None = None,
  bootstrap: int = 1000,
  seed: int,
) -> Comparison:
  """Compares methods on the prompts that they all answered.

  Args:
    methods: name -> its runs, one a seed; the first method is what the others
      are compared with.
    distribution: Q, of utility and value.
    reference_point: of the hypervolume, by objective; with one objective over
      several alphas also "kl", in nats. None takes the fronts' own, and the
      first method's largest KL, rounded up.
    near: a second one, near to the fronts, for another hypervolume: a far
      one's is mostly the volume that all methods share.
    bootstrap: resamplings.
    seed: of them.

  Raises:
    FrontError: when the runs are not comparable; says which and why.
  """
  methods = in_one_unit(methods)
  everything = [run for runs in methods.values() for run in runs]
  _check_comparable(everything)
  front = everything[0].front
  first, *others = methods
  point = _reference_point(everything, reference_point, len(methods[first]))
  points = {"hypervolume": point}
  if near is not None:
    points["near hypervolume"] = _reference_point(everything, near, 0)
  measure = Measure(
    [[run.front for run in runs] for runs in methods.values()],
    {name: tuple(p.values()) for name, p in points.items()},
    distribution,
  )
  seen = [_per_prompt(run).mean(axis=1) for run in everything]
  rng = np.random.default_rng(seed)
  samples = _samples(methods, measure, seen, bootstrap, rng)
  values = {
    name: intervals.estimates(
      [(1, sample)], measure.lowest, measure.highest, rng
    )
    for name, sample in samples.items()
  }

  def difference(name: str) -> list[Value]:
    terms = [(1, samples[name]), (-1, samples[first])]
    if _same_seeds(methods[first], methods[name]):
      terms = [(1, intervals.paired(samples[first], samples[name]))]
    # No farther apart than both intervals let them be.
    pairs = list(zip(values[first], values[name], strict=True))
    lowest = np.array([b.low - a.high for a, b in pairs])
    highest = np.array([b.high - a.low for a, b in pairs])
    return intervals.estimates(terms, lowest, highest, rng)

  def named(found: list[Value]) -> dict[str, Value]:
    return dict(zip(measure.names, found, strict=True))

  return Comparison(
    objectives=front.objectives,
    reference_points=points,
    best_points=measure.best_points(measure.mean_points(seen)).tolist(),
    metrics=measure.names,
    methods=tuple(methods),
    runs={name: tuple(runs) for name, runs in methods.items()},
    values={m: named(found) for m, found in values.items()},
    differences={m: named(difference(m)) for m in others},
    dominated={
      a: {b: _dominated(methods[a], methods[b]) for b in methods if b != a}
      for a in methods
    },
    bootstrap=bootstrap,
  )


def _samples(
  methods: Mapping[str, Sequence[Run]],
  measure: Measure,
  seen: Sequence[Array],
  num: int,
  rng: np.random.Generator,
) -> dict[str, Sample]:
  """Every method's metrics, with draws of their errors."""
  first, *_ = methods.values()
  prompts = first[0].rewards.shape[1]
  drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), num)
  counts = drawn.astype(np.float64)
  shared = intervals.luck(len(first), num, rng)
  noise, luck, whose = [], [], []
  for name, runs in methods.items():
    noise += [intervals.noise(_per_prompt(run), counts) for run in runs]
    same = _same_seeds(first, runs)
    luck += shared if same else intervals.luck(len(runs), num, rng)
    whose += [name] * len(runs)
  sample = measure.sample(seen, noise, luck)
  return {
    name: sample.of([i for i, other in enumerate(whose) if other == name])
    for name in methods
  }


def _per_prompt(run: Run) -> Array:
  """[P, prompts, m + 1]: the rewards and -KL."""
  return np.concatenate([run.rewards, -run.kl[..., None]], axis=2)


def mean_front(runs: Sequence[Run], method: str) -> Front:
  """One front of a method's runs, one or more, over the same weightings.

  Every point is the mean over the runs, with the standard error over them; of a
  single run the point is its own, with the error over prompts.
  """
  fronts = [run.front for run in runs]
  first = fronts[0]
  if len(fronts) == 1:
    return dataclasses.replace(first, method=method)

  def estimate(values: Sequence[float]) -> Estimate:
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return Estimate(float(np.mean(values)), float(error))

  points = [
    dataclasses.replace(
      same[0],
      rewards={
        o: estimate([p.rewards[o].mean for p in same]) for o in first.objectives
      },
      raw={o: estimate([p.raw[o].mean for p in same]) for o in same[0].raw},
      kl=estimate([p.kl.mean for p in same]),
      value=estimate([p.value.mean for p in same]),
    )
    for same in zip(*(front.points for front in fronts), strict=True)
  ]
  return with_points(first, points, method=method)


def _same_seeds(a: Sequence[Run], b: Sequence[Run]) -> bool:
  seeds, others = ([run.seed for run in runs] for runs in (a, b))
  is_known = None not in seeds and len(set(seeds)) == len(seeds)
  return is_known and seeds == others


def _dominated(a: Sequence[Run], b: Sequence[Run]) -> float:
  """Mean share of b's points that a dominates, over pairs of runs."""

  def points(run: Run) -> Array:
    if not in_plane(run.front):
      return run.front.rewards
    kl = [[-point.kl.mean] for point in run.front.points]
    return np.concatenate([run.front.rewards, kl], axis=1)

  pairs = [(x, y) for x in a for y in b]
  if _same_seeds(a, b):
    pairs = list(zip(a, b, strict=True))
  shares = [fronts_lib.dominated_share(points(x), points(y)) for x, y in pairs]
  return float(np.mean(shares))


def _reference_point(
  runs: Sequence[Run], given: Mapping[str, float] | None, num_first: int
) -> dict[str, float]:
  """By axis, in the order of the axes; a KL's is negative, as its axis.

  The default for KL is of the first runs, so that no other method moves it.
  """
  front = runs[0].front
  axes = [*front.objectives]
  if given is not None:
    if in_plane(front):
      axes.append("kl")
    if set(given) != set(axes):
      raise FrontError(
        f"the reference point must name {', '.join(axes)} and names "
        f"{', '.join(given) or 'nothing'}."
      )
    point = {axis: float(given[axis]) for axis in axes}
    if not all(map(math.isfinite, point.values())):
      raise FrontError(f"the reference point must be finite and is {point}.")
    if "kl" in axes:
      point["-kl"] = -point.pop("kl")
    return point
  for run in runs[1:]:
    if run.front.reference_point != front.reference_point:
      raise FrontError(
        f"{runs[0].path} has its hypervolume from {front.reference_point} and "
        f"{run.path} from {run.front.reference_point}; give --reference-point "
        "for all of them."
      )
  point = dict(zip(axes, front.reference_point, strict=True))
  if in_plane(front):
    largest = max(p.kl.mean for r in runs[:num_first] for p in r.front.points)
    point["-kl"] = -float(math.ceil(largest))
  return point


def _check_comparable(runs: Sequence[Run]) -> None:
  """Raises FrontError unless all runs answered the same question."""

  def facts(run: Run) -> dict[str, Any]:
    front = run.front
    return {
      "objectives": ", ".join(front.objectives),
      "number of held-out prompts": front.prompts,
      "held-out prompts": run.prompts,
    } | {f"decoding's {name}": front.decoding.get(name) for name in SETTINGS}

  first, *others = runs
  asked = facts(first)
  for run in others:
    for name, own in facts(run).items():
      if own != asked[name]:
        raise FrontError(
          f"{first.path} and {run.path} differ in their {name} ({asked[name]} "
          f"and {own}); evaluate both alike."
        )

"""Fronts of several methods compared, with intervals.

A method has one run or several, which differ in their seed. Of each run's front
this takes

  hypervolume   above one fixed reference point
  spread        the largest distance between two points
  rank corr.    of each reward with its weight (with one reward: with -alpha)
  utility       E_Q sum_i w_i R_i, Q the weightings' distribution
  value         E_Q of what is optimised, (1 - alpha) sum_i w_i R_i - alpha KL

and averages over the method's runs, with the standard error over them. A front
of one reward over several alphas lies in the plane of the reward and -KL.

Intervals are bootstrapped over prompts and seeds at once: prompts are drawn
with replacement, the same ones for every method, since all answer the same;
seeds too, the same ones for methods that were run on the same seeds. What is
computed from noisy means is biased (noise pushes a front outwards), so
intervals are basic ones, [2 x - q_97.5, 2 x - q_2.5]. With three seeds or so
the part of the seeds is underestimated; the standard errors are beside it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath
from numpy.typing import NDArray

from clp_jax import config as config_lib
from clp_jax import run_folder
from clp_jax.evaluation import fronts as fronts_lib
from clp_jax.evaluation import measurements
from clp_jax.evaluation.report import (
  Estimate,
  Front,
  FrontError,
  front_from_points,
  load_front,
)
from clp_jax.weightings import Distribution

Array = NDArray[np.float64]
Metrics = dict[str, float]

DRAWS = 20_000  # weightings drawn from Q to weigh the points of a grid
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


class Value(NamedTuple):
  """A metric of a method."""

  mean: float  # over its runs
  stderr: float | None  # over its runs; None: one run
  low: float  # 95% interval over prompts and seeds
  high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The result, methods in the order given; the first is the baseline."""

  objectives: tuple[str, ...]
  reference_points: dict[str, dict[str, float]]  # of a hypervolume, by axis
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
  """An evaluated run from its folder.

  Args:
    workdir: the run's folder.
    seed: that it was trained with.

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


def in_one_unit(
  methods: Mapping[str, Sequence[Run]],
) -> dict[str, list[Run]]:
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
    points = []
    for point in run.front.points:
      rewards = {
        o: Estimate(e.mean * scale[i] + shift[i], e.stderr * scale[i])
        for i, o in enumerate(objectives)
        for e in [point.rewards[o]]
      }
      moved = sum(
        point.weights[o] * (rewards[o].mean - point.rewards[o].mean)
        for o in rewards
      )
      value = point.value.mean + (1 - point.alpha) * moved
      points.append(
        dataclasses.replace(
          point, rewards=rewards, value=Estimate(value, point.value.stderr)
        )
      )
    front = dataclasses.replace(run.front, points=tuple(points), units=units)
    return dataclasses.replace(
      run, front=front, rewards=run.rewards * scale + shift
    )

  return {
    name: [convert(run) for run in runs] for name, runs in methods.items()
  }


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
  front = next(iter(methods.values()))[0].front
  if config is None:
    return Distribution(len(front.objectives))
  q = config_lib.distribution(config)
  return dataclasses.replace(q, weights=None)


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
  names = (
    *points,
    "spread",
    *(f"rank corr. {o}" for o in front.objectives),
    "utility",
    "value",
  )
  measure = _Measure(
    tuple(tuple(p.values()) for p in points.values()),
    distribution,
    weightings_of(front),
  )
  values = {m: _over_runs(runs, measure) for m, runs in methods.items()}
  drawn = _bootstrap(methods, measure, bootstrap, np.random.default_rng(seed))
  return Comparison(
    objectives=front.objectives,
    reference_points=points,
    metrics=names,
    methods=tuple(methods),
    runs={name: tuple(runs) for name, runs in methods.items()},
    values={m: _values(names, values[m], drawn[m]) for m in methods},
    differences={
      m: _values(
        names,
        _paired(methods[first], methods[m], values[first], values[m]),
        drawn[m] - drawn[first],
      )
      for m in others
    },
    dominated={
      a: {b: _dominated(methods[a], methods[b]) for b in methods if b != a}
      for a in methods
    },
    bootstrap=bootstrap,
  )


def in_plane(front: Front) -> bool:
  """Whether the front is one of a reward against KL."""
  return len(front.objectives) == 1


def weightings_of(front: Front) -> Array:
  """[P, m + 1]: the weights and the alpha of every point."""
  alphas = [[point.alpha] for point in front.points]
  return np.concatenate([front.weights, alphas], axis=1)


def mean_front(runs: Sequence[Run], method: str) -> Front:
  """One front of a method's runs.

  Every point is the mean over the runs, with the standard error over them; of a
  single run the point is its own, with the error over prompts.

  Args:
    runs: one or more, over the same weightings.
    method: its name.
  """
  fronts = [run.front for run in runs]
  first = fronts[0]
  if len(fronts) == 1:
    return dataclasses.replace(first, method=method)

  def estimate(values: Sequence[float]) -> Estimate:
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return Estimate(float(np.mean(values)), float(error))

  points = []
  for same in zip(*(front.points for front in fronts), strict=True):
    points.append(
      dataclasses.replace(
        same[0],
        rewards={
          o: estimate([p.rewards[o].mean for p in same])
          for o in first.objectives
        },
        raw={o: estimate([p.raw[o].mean for p in same]) for o in same[0].raw},
        kl=estimate([p.kl.mean for p in same]),
        value=estimate([p.value.mean for p in same]),
      )
    )
  return front_from_points(
    points,
    method=method,
    objectives=first.objectives,
    step=first.step,
    prompts=first.prompts,
    decoding=first.decoding,
    reference_point=first.reference_point,
    training_samples=first.training_samples,
    units=first.units,
  )


def point_weights(distribution: Distribution, weightings: Array) -> Array:
  """[P] probabilities that Q gives the points of a sweep.

  Each weighting of Q counts for the point next to it, in the weights and in
  log alpha.

  Args:
    distribution: Q over as many rewards.
    weightings: [P, m + 1] from `weightings_of`.
  """
  rng = np.random.default_rng(0)  # an integral, the same for all who ask
  m = distribution.num_rewards
  if distribution.weights is not None:
    drawn = np.tile(distribution.weights, (DRAWS, 1))
  else:
    drawn = rng.dirichlet([distribution.concentration] * m, DRAWS)
  nearest = _nearest(weightings[:, :m], drawn)
  if distribution.alpha_range is not None:
    low, high = np.log(distribution.alpha_range)
    log_alpha = rng.uniform(low, high, (DRAWS, 1))
    nearest = nearest & _nearest(np.log(weightings[:, m:]), log_alpha)
  # A point that stands twice shares its part.
  shares = nearest / nearest.sum(axis=1, keepdims=True)
  return shares.mean(axis=0)


def _nearest(points: Array, drawn: Array) -> NDArray[np.bool_]:
  """[draws, P]: which points are next to each draw."""
  distances = np.linalg.norm(drawn[:, None] - points[None], axis=2)
  return distances <= distances.min(axis=1, keepdims=True) + 1e-9


@dataclasses.dataclass(frozen=True)
class _Measure:
  """Metrics of one front, given means over some choice of prompts."""

  reference_points: tuple[tuple[float, ...], ...]
  distribution: Distribution
  grid: Array  # the weightings on which utility and value are means over Q

  def __post_init__(self):
    shares = point_weights(self.distribution, self.grid)
    object.__setattr__(self, "shares", shares)

  def __call__(self, run: Run, counts: Array) -> Array:
    """[draws, metrics], NaN where one is not defined.

    Args:
      run: a run.
      counts: [draws, prompts], how often each prompt was drawn.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    num_points, prompts, _ = run.rewards.shape
    flat = run.rewards.transpose(1, 0, 2).reshape(prompts, -1)
    rewards = (shares @ flat).reshape(len(counts), num_points, -1)
    kl = shares @ run.kl.T  # [draws, P]
    weightings = weightings_of(run.front)
    weights, alphas = weightings[:, :-1], weightings[:, -1]
    points = rewards
    asked = weights
    if in_plane(run.front):
      points = np.stack([rewards[..., 0], -kl], axis=2)
      asked = -alphas[:, None]
    metrics: list[Any] = [
      [fronts_lib.hypervolume(p, reference) for p in points]
      for reference in self.reference_points
    ]
    apart = rewards[:, :, None] - rewards[:, None]
    metrics.append(np.linalg.norm(apart, axis=3).max(axis=(1, 2)))
    for i in range(rewards.shape[2]):
      metrics.append(rank_correlations(asked[:, i], rewards[:, :, i]))
    unknown = np.full(len(counts), math.nan)
    utility, value = unknown, unknown
    if weightings.shape == self.grid.shape and np.allclose(
      weightings, self.grid, atol=1e-6
    ):
      q = self.shares  # type: ignore[attr-defined]
      utilities = (weights * rewards).sum(axis=2)
      utility = utilities @ q
      value = ((1 - alphas) * utilities - alphas * kl) @ q
    return np.stack([*metrics, utility, value], axis=1)


def rank_correlations(x: Array, y: Array) -> Array:
  """`fronts.monotonicity` of x [P] with each row of y [draws, P]."""

  def ranks(values: Array) -> Array:  # about their mean; ties share theirs
    other, own = values[..., None, :], values[..., :, None]
    return (0.5 * (other < own) - 0.5 * (other > own)).sum(axis=-1)

  x_ranks, y_ranks = ranks(x), ranks(y)
  scale = np.sqrt((x_ranks**2).sum() * (y_ranks**2).sum(axis=1))
  # What never changes has no rank order.
  defined = scale > 0
  found = (y_ranks @ x_ranks) / np.where(defined, scale, 1.0)
  return np.where(defined, found, math.nan)


def _over_runs(runs: Sequence[Run], measure: _Measure) -> Array:
  """[runs, metrics] on all prompts."""
  return np.concatenate(
    [measure(run, np.ones([1, run.rewards.shape[1]])) for run in runs]
  )


def _same_seeds(a: Sequence[Run], b: Sequence[Run]) -> bool:
  seeds = [run.seed for run in a]
  return (
    seeds == [run.seed for run in b]
    and None not in seeds
    and len(set(seeds)) == len(seeds)
  )


def _bootstrap(
  methods: Mapping[str, Sequence[Run]],
  measure: _Measure,
  num: int,
  rng: np.random.Generator,
) -> dict[str, Array]:
  """Method -> [num, metrics] of resampled prompts and seeds."""
  first = next(iter(methods.values()))
  prompts = first[0].rewards.shape[1]
  counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), num)
  shared = rng.integers(len(first), size=(num, len(first)))
  drawn = {}
  for name, runs in methods.items():
    chosen = shared
    if not _same_seeds(first, runs):
      chosen = rng.integers(len(runs), size=(num, len(runs)))
    each = np.stack([measure(run, counts.astype(np.float64)) for run in runs])
    # Of draw n the runs chosen[n].
    drawn[name] = each[chosen, np.arange(num)[:, None]].mean(axis=1)
  return drawn


def _paired(
  first: Sequence[Run], other: Sequence[Run], a: Array, b: Array
) -> Array:
  """[runs or 1, metrics]: differences by seed, or else of the means."""
  if _same_seeds(first, other):
    return b - a
  return b.mean(axis=0, keepdims=True) - a.mean(axis=0, keepdims=True)


def _values(
  names: Sequence[str], runs: Array, drawn: Array
) -> dict[str, Value]:
  values = {}
  for i, name in enumerate(names):
    mean = float(runs[:, i].mean())
    stderr = None
    if len(runs) > 1:
      stderr = float(runs[:, i].std(ddof=1) / math.sqrt(len(runs)))
    low = high = math.nan
    if np.isfinite(mean):
      # Of resamplings in which it is defined.
      q_low, q_high = np.nanpercentile(drawn[:, i], [2.5, 97.5])
      low, high = float(2 * mean - q_high), float(2 * mean - q_low)
    values[name] = Value(mean, stderr, low, high)
  return values


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
  return float(
    np.mean(
      [fronts_lib.dominated_share(points(x), points(y)) for x, y in pairs]
    )
  )


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
  first = runs[0]
  for run in runs[1:]:
    facts: dict[str, tuple[Any, Any]] = {
      "objectives": (first.front.objectives, run.front.objectives),
      "number of held-out prompts": (first.front.prompts, run.front.prompts),
      "held-out prompts": (first.prompts, run.prompts),
    }
    for name in SETTINGS:
      facts[f"decoding's {name}"] = (
        first.front.decoding.get(name),
        run.front.decoding.get(name),
      )
    for name, (a, b) in facts.items():
      if a != b:
        raise FrontError(
          f"{first.path} and {run.path} differ in their {name} "
          f"({_shown(a)} and {_shown(b)}); evaluate both alike."
        )


def _shown(value: Any) -> str:
  return ", ".join(value) if isinstance(value, tuple) else str(value)

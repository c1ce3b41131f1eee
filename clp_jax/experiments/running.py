"""Runs an experiment: every method, value and seed, each in its own folder.

  DIR/sft/<name>     supervised checkpoints, shared by all experiments
  DIR/runs/<name>    runs: named by method, seed and a digest of all values that
                     decide the result
  DIR/<experiment>/  the comparison's files, written after every seed

A folder's name says what is in it, so an experiment that is started again skips
what is finished and resumes what is not, experiments share runs, and another
setting is another folder. What `eval` says is not part of the name: a finished
run is evaluated again, not trained, when another evaluation is asked for. A run
that fails is noted and the others go on.

All methods of a seed start from the same supervised checkpoint, answer the same
held-out prompts with the same decoding and random keys, and train on the same
data order. Seed s starts from checkpoint s mod `checkpoints`.
"""

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from clp_jax import build, run_folder, saved_params
from clp_jax import config as config_lib
from clp_jax.baselines import dera, soups
from clp_jax.data.tasks import fact_checker
from clp_jax.errors import ConfigError, FrontError, Preempted, RunError
from clp_jax.evaluation import (
  compare,
  comparison_files,
  examples,
  measurements,
  metrics,
  sweep,
  units,
)
from clp_jax.evaluation import front as front_lib
from clp_jax.experiments import methods as methods_lib
from clp_jax.experiments import plans, protocol
from clp_jax.experiments.methods import METHODS, Method
from clp_jax.models.presets import PRESETS
from clp_jax.train import moft, sft

EVALUATION_SEED = 0  # the same draws for all methods and training seeds
RECORD = "experiment.json"


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that an experiment will run."""

  name: str
  methods: tuple[str, ...]
  values: tuple[Any, ...]  # of the axis; (None,) without one
  seeds: tuple[int, ...]
  checkpoints: int  # supervised, that the seeds start from in turn
  config: ml_collections.ConfigDict  # from plans.base_config
  workdir: str
  command: str
  # Method -> learning rate; of others it is the config's by their factor.
  rates: Mapping[str, float]

  @property
  def experiment(self) -> plans.Experiment:
    return plans.EXPERIMENTS[self.name]


class Stage(NamedTuple):
  """One training run of a plan: of a method, or of its supervised model."""

  label: str  # of the first method that needs it
  folder: str
  supervised: bool
  config: ml_collections.ConfigDict

  @property
  def steps(self) -> int:
    """That it trains."""
    section = self.config.sft if self.supervised else self.config.train
    return section.steps

  @property
  def samples(self) -> int:
    """Responses; of a supervised run its documents."""
    if self.supervised:
      return self.steps * self.config.sft.batch
    rollout = self.config.rollout
    return self.steps * rollout.prompts * rollout.samples

  @property
  def finished(self) -> bool:
    """Whether its last checkpoint is there."""
    return saved_params.newest_step(self.folder) == self.steps


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  """One method of a plan, at one value of the axis, from one seed."""

  plan: Plan
  name: str  # of methods.METHODS
  value: Any
  seed: int

  @property
  def method(self) -> Method:
    """What the name means."""
    return METHODS[self.name]

  @property
  def label(self) -> str:
    """In tables."""
    axis = self.plan.experiment.axis
    own = self.method.label
    return own if axis is None else f"{own}, {axis.what} {self.value}"

  @property
  def base(self) -> ml_collections.ConfigDict:
    """A copy of the plan's config, at the value."""
    axis = self.plan.experiment.axis
    if axis is None:
      return self.plan.config.copy_and_resolve_references()
    return plans.with_value(self.plan.config, axis.what, self.value)

  @property
  def config(self) -> ml_collections.ConfigDict:
    """What it trains, or is made with."""
    config = self.base
    config.seed = self.seed
    if config.sft.steps:
      config.model.init = self.supervised.folder
      config.sft.steps = 0
    axis = self.plan.experiment.axis
    if axis is None or axis.what != "learning rate":  # there it is the value
      config.optimizer.learning_rate *= self.method.rate
    if self.name in self.plan.rates:
      config.optimizer.learning_rate = self.plan.rates[self.name]
    config.update_from_flattened_dict(dict(self.method.overrides or {}))
    return config

  @property
  def supervised(self) -> Stage:
    """What makes the checkpoint that it starts from, where the plan has one."""
    config = self.base
    config.seed = self.seed % self.plan.checkpoints
    # A model that reads weightings must have rows for their tokens.
    overrides = self.method.overrides or {}
    config.update_from_flattened_dict(
      {k: v for k, v in overrides.items() if k.startswith("prompting.")}
    )
    size = config.model.init
    name = size if size in PRESETS else "model"
    digest = _digest(sft.own_config(config))
    folder = f"{self.plan.workdir}/sft/{name}-{config.seed}-{digest}"
    return Stage(f"supervised, for {self.label}", folder, True, config)

  @property
  def parts(self) -> list[Stage]:
    """The runs that it is made of; of a trained method, its own."""
    if self.method.overrides is not None:
      return [self._run(self.name, self.config)]
    if self.method.kind == "oracle":
      return self.oracles
    return list(self.singles.values())

  @property
  def oracles(self) -> list[Stage]:
    """Single-objective runs at the experiment's weightings."""
    made = []
    experiment = self.plan.experiment
    for weighting in experiment.oracles:
      own = self.config
      own.steering = "none"
      if experiment.alpha_range is None:
        own.weightings.weights = tuple(weighting)
      else:
        own.weightings.alpha_range = None
        own.weightings.alpha = weighting
      made.append(self._run("single", own))
    return made

  @property
  def singles(self) -> dict[str, Stage]:
    """Objective -> the run that is finetuned for it alone."""
    config = self.config
    kl = config.weightings.alpha_range is not None
    num = len(config.objectives)
    steps = config.train.steps // num
    if self.method.share == "full":
      steps = config.train.steps * 2 if kl else config.train.steps
    made = {}
    for name in config.objectives:
      own = config.copy_and_resolve_references()
      own.objectives = (name,)
      own.steering = "none"
      if num > 1:
        own.eval.reference_point = None  # it has one value an objective
      if kl:
        own.weightings.alpha = config.weightings.alpha_range[0]
        own.weightings.alpha_range = None
      plans.set_steps(own, steps)
      made[name] = self._run("single", own)
    return made

  @property
  def folder(self) -> str:
    """Of its evaluated run."""
    made_of = [] if self.method.overrides is not None else self.parts
    paths = (part.folder for part in made_of)
    return self._run(self.name, self.config, *paths).folder

  def _run(
    self, name: str, config: ml_collections.ConfigDict, *parts: str
  ) -> Stage:
    """In DIR/runs/<name>-<seed>-<digest of what decides the result>."""
    own = config.copy_and_resolve_references()
    if self.plan.config.sft.steps:  # wherever the folders are
      own.model.init = os.path.basename(self.supervised.folder)
    digest = _digest(own, own.train.steps, *map(os.path.basename, parts))
    folder = f"{self.plan.workdir}/runs/{name}-{self.seed}-{digest}"
    return Stage(self.label, folder, False, config)

  @property
  def finished(self) -> bool:
    """Whether the sweep that the plan asks for is there."""
    steps = sum(part.steps for part in self.parts)
    if self.method.kind == "oracle":  # each of its points has had as many
      steps = self.config.train.steps
    return _is_evaluated(self.plan, self.folder, steps)


def make_plan(
  name: str,
  config: ml_collections.ConfigDict,
  *,
  methods: tuple[str, ...] | None,
  values: tuple[str, ...] | None,
  seeds: int,
  num_checkpoints: int,
  workdir: str,
  command: str,
  rates: Mapping[str, float] | None = None,
) -> Plan:
  """A plan that can run to its end, as far as can be told before.

  Args:
    name: of plans.EXPERIMENTS.
    config: the base config, checked by build.validate.
    methods: of methods.METHODS; None takes the experiment's.
    values: of its axis, as text; None takes the experiment's.
    seeds: how many, from 0.
    num_checkpoints: supervised checkpoints that they start from.
    workdir: the folder of all experiments.
    command: that this plan comes from, for the record.
    rates: method -> learning rate; others take the config's by their factor.

  Raises:
    ConfigError: a method that does not fit, a value that is not one, a config
      that can't be trained.
  """
  experiment = plans.EXPERIMENTS[name]
  config = plans.base_config(experiment, config)
  names = methods_lib.chosen(
    experiment.methods if methods is None else methods,
    name,
    experiment.alpha_range is not None,
  )
  parsed: tuple[Any, ...] = (None,)
  if experiment.axis is not None:
    parsed = experiment.axis.values
    if values is not None:
      try:
        parsed = tuple(experiment.axis.parse(v) for v in values)
      except ValueError as error:
        raise ConfigError(
          f"--values of {name} are of its {experiment.axis.what}: {error}."
        ) from error
  elif values is not None:
    raise ConfigError(
      f"--values: {name} varies nothing; these do: "
      + ", ".join(n for n, e in plans.EXPERIMENTS.items() if e.axis)
      + "."
    )
  plan = Plan(
    name=name,
    methods=tuple(names),
    values=parsed,
    seeds=tuple(range(seeds)),
    checkpoints=num_checkpoints if config.sft.steps else 1,
    config=config,
    workdir=workdir,
    command=command,
    rates=rates or {},
  )
  for cell in cells(plan):
    if cell.method.overrides is not None:
      build.validate(cell.config)
  return plan


def cells(plan: Plan) -> Iterator[Cell]:
  """Everything to run, seed by seed, so that whole seeds are done first."""
  for seed in plan.seeds:
    for value in plan.values:
      for name in plan.methods:
        yield Cell(plan, name, value, seed)


def run(plan: Plan, *, train: bool) -> list[str]:
  """Runs what is not finished, and writes the comparison.

  Args:
    plan: from `make_plan`.
    train: False writes the comparison of what is finished, and runs nothing.

  Returns:
    What failed, a line each.

  Raises:
    Preempted: after SIGTERM, with everything saved.
    RunError: when every run failed.
    FrontError: when nothing is finished and nothing is to be trained.
  """
  failures: list[str] = []
  for seed in plan.seeds if train else ():
    for cell in cells(plan):
      if cell.seed != seed:
        continue
      try:
        if not cell.finished:
          _finish(cell)
        if not cell.finished:
          raise RunError(
            f"{cell.folder}/evaluation is not what the experiment's config "
            "asks for, although it was just written."
          )
      except Preempted:
        raise
      # A run over days goes on without what can't be run, whatever the reason.
      except Exception as error:
        logging.warning("%s", _failure(cell, error))
        failures.append(_failure(cell, error))
    if any(cell.finished for cell in cells(plan)):
      write(plan, failures)
    elif failures and seed == plan.seeds[-1]:
      raise RunError(f"every run failed: {'; '.join(failures)}")
  if not train:
    write(plan, failures)
  return failures


def stages(plan: Plan) -> Iterator[Stage]:
  """Every training run of a plan once, in the order that `run` takes.

  Their model.init is the plan's own.
  """
  seen = set()
  for cell in cells(plan):
    init = cell.base.model.init
    supervised = [cell.supervised] if plan.config.sft.steps else []
    for stage in (*supervised, *cell.parts):
      if stage.folder not in seen:
        seen.add(stage.folder)
        own = stage.config.copy_and_resolve_references()
        own.model.init = init
        yield stage._replace(config=own)


def supervised_curve(
  config: ml_collections.ConfigDict,
  values: tuple[int, ...],
  workdir: str,
  command: str,
) -> list[dict[str, Any]]:
  """The held-out loss by supervised steps, each with its own decay.

  Args:
    config: of the model, the data and the supervised stage.
    values: steps.
    workdir: the folder of all experiments.
    command: that this comes from, for the record.

  Returns:
    [{"steps", "loss", "accuracy"}]; the loss in nats a token.
  """
  rows = []
  for steps in values:
    own = config.copy_and_resolve_references()
    own.sft.steps = own.sft.decay_steps = steps
    folder = f"{workdir}/sft/curve-{_digest(own)}"
    held_out = sft.report_held_out(own, folder, sft.train(own, folder))
    if held_out is None:
      raise ConfigError("no held-out documents: give data.eval.")
    rows.append(
      {
        "steps": steps,
        "loss": round(held_out.loss, 5),
        "accuracy": round(held_out.accuracy, 5),
      }
    )
  directory = epath.Path(workdir) / protocol.SUPERVISED
  directory.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(
    directory / RECORD,
    {
      **origin(command),
      "split": config.data.eval_split,
      "documents": config.eval.prompts,
      "rows": rows,
    },
  )
  return rows


def write(plan: Plan, failures: list[str]) -> compare.Comparison:
  """Compares what is finished, into DIR/<experiment>.

  Raises:
    FrontError: when nothing is.
  """
  methods: dict[str, list[compare.Run]] = {}
  missing = []
  for cell in cells(plan):
    if cell.finished:
      loaded = compare.load_run(cell.folder, cell.seed)
      methods.setdefault(cell.label, []).append(loaded)
    else:
      missing.append(f"{cell.label}, seed {cell.seed}")
  if not methods:
    raise FrontError(
      f"no run of {plan.name} in {plan.workdir} is finished; there is nothing "
      "to compare."
    )
  near = point = None
  axes = plan.config.objectives
  if plan.config.data.task == "newsroom" and all(
    plan.config.rewards[o].normalise == "none" for o in axes
  ):  # `near` is in raw units
    near = plan.experiment.near
    if near is not None and "kl" in near:  # whatever the methods' largest is
      own = units.reference_point(plan.config)
      point = dict(zip(axes, own, strict=True)) | {"kl": near["kl"]}
  found = compare.compare(
    methods,
    distribution=build.distribution(plan.config),
    reference_point=point,
    near=near,
    seed=0,
  )
  directory = f"{plan.workdir}/{plan.name}"
  comparison_files.save(
    directory,
    found,
    title=f"{plan.name}: {plan.experiment.question}",
    commands=[plan.command],
    unsupported=fact_checker(plan.config.data.task),
  )
  run_folder.write_json(
    epath.Path(directory) / RECORD,
    {
      "experiment": plan.name,
      "question": plan.experiment.question,
      **origin(plan.command),
      "seeds": sorted({run.seed for runs in methods.values() for run in runs}),
      "planned_seeds": list(plan.seeds),
      "checkpoints": plan.checkpoints,
      "checkpoints_used": sorted(
        {
          int(run.seed or 0) % plan.checkpoints
          for runs in methods.values()
          for run in runs
        }
      ),
      "failures": failures,
      "missing": missing,
      "objectives": list(found.objectives),
      "axis": None
      if plan.experiment.axis is None
      else plan.experiment.axis.what,
      "shown": [METHODS[name].label for name in plan.experiment.shown],
      "reference_point": list(found.reference_points["hypervolume"].values()),
      "fronts": _fronts(plan),
      "tables": comparison_files.tables(found),
      "note": comparison_files.note(found),
      "oracles": _against_oracles(found, plan),
      "config": config_lib.to_json(plan.config),
    },
  )
  return found


def _fronts(plan: Plan) -> dict[str, Any]:
  """Label -> every finished run's points and what its training took.

  Figures are rounded to what their errors leave of them, so that the numbers of
  all experiments are small enough to keep beside the page.
  """
  fronts: dict[str, Any] = {}
  for cell in cells(plan):
    if not cell.finished:
      continue
    front = front_lib.load_front(f"{cell.folder}/evaluation/front.json")
    found = fronts.setdefault(
      cell.label,
      {
        "method": cell.method.label,
        "value": cell.value,
        "samples": front.training_samples,
        "updates": _updates(cell),
        "weightings": np.round(metrics.weightings_of(front), 5).tolist(),
        "runs": [],
      },
    )
    found["runs"].append(
      {
        "seed": cell.seed,
        "seconds": _seconds(cell),
        "rewards": np.round(front.rewards, 5).tolist(),
        "kl": [round(point.kl.mean, 4) for point in front.points],
      }
    )
  return fronts


def _updates(cell: Cell) -> int:
  """Optimizer steps of all that a cell trains."""
  total = 0
  for part in cell.parts:
    own = part.config.ppo if part.config.algorithm == "ppo" else None
    total += part.steps * (own.epochs * own.minibatches if own else 1)
  return total


def _seconds(cell: Cell) -> float | None:
  """Training time of all that a cell trains: steps by the median step's time.

  The median leaves out compilation and what else the machine did now and then.
  """
  total = 0.0
  for part in cell.parts:
    file = epath.Path(part.folder) / "metrics.jsonl"
    if not file.exists():
      return None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rates = [r["perf/steps_per_second"] for r in rows]
    total += part.steps / float(np.median(rates))
  return round(total, 1)


def origin(command: str) -> dict[str, str]:
  """What the record of a measurement says of how it was made."""
  today = datetime.date.today().isoformat()
  return {"command": command, "date": today, "machine": machine()}


def machine() -> str:
  """What ran it, in words."""
  name = platform.processor() or platform.machine()
  info = "/proc/cpuinfo"
  if os.path.exists(info):
    with open(info, encoding="utf-8") as lines:
      names = [x.partition(":")[2] for x in lines if x.startswith("model name")]
    name = names[0].strip() if names else name
  device = jax.devices()[0]
  cores = len(os.sched_getaffinity(0))
  shown = f"{cores} {'core' if cores == 1 else 'cores'} of {name}"
  if device.platform != "cpu":
    shown = f"{jax.device_count()} x {device.device_kind}"
  return f"{shown}, JAX {jax.__version__}"


def _finish(cell: Cell) -> None:
  """Trains and evaluates a cell, as far as that is not done."""
  if cell.method.kind == "oracle":
    _join_oracles(cell)
    return
  for part in cell.parts:
    _train(cell, part)
  if cell.method.overrides is None:
    make: Callable = soups.make_soup
    if cell.method.kind == "mixture":
      make = dera.make_mixture
    paths = {name: part.folder for name, part in cell.singles.items()}
    make(cell.config, paths, cell.folder)
  samples = sum(part.samples for part in cell.parts)
  _evaluate(cell.folder, cell.method.label, samples)


def _train(cell: Cell, part: Stage) -> None:
  if cell.plan.config.sft.steps and not cell.supervised.finished:
    sft.train(cell.supervised.config, cell.supervised.folder)
  if part.finished:
    run_folder.start(part.folder, part.config)  # its evaluation may be another
  else:
    moft.train(part.config, part.folder)


def _evaluate(folder: str, label: str, samples: int) -> None:
  """Sweeps a run as the config in its folder says."""
  sweep.evaluate_run(
    folder, seed=EVALUATION_SEED, method=label, training_samples=samples
  )


def _join_oracles(cell: Cell) -> None:
  """One run for each of the experiment's weightings; their points together."""
  fronts, measured, rows = [], [], []
  label = cell.method.label
  for part in cell.parts:
    _train(cell, part)
    if not _is_evaluated(cell.plan, part.folder, part.steps):
      _evaluate(part.folder, label, part.samples)
    directory = f"{part.folder}/evaluation"
    front = front_lib.load_front(f"{directory}/front.json")
    fronts.append(front)
    measured.append(measurements.load(directory, front))
    rows += examples.load(part.folder)
  joined = front_lib.with_points(
    fronts[0],
    [point for front in fronts for point in front.points],
    method=label,
    training_samples=sum(front.training_samples or 0 for front in fronts),
  )
  sweep.save(
    f"{cell.folder}/evaluation",
    sweep.Sweep(joined, rows, measurements.join(measured)),
  )


def _digest(config: ml_collections.ConfigDict, *more: Any) -> str:
  """Of all that a run of this config could not change and be resumed."""
  fields = run_folder.decisive(config_lib.to_json(config))
  for name in ("adapters.init", "rollout.ahead", "data.tfds_data_dir"):
    if not fields.get(name):  # older runs have no such field
      fields.pop(name, None)
  text = json.dumps([fields, *more], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _is_evaluated(plan: Plan, folder: str, steps: int) -> bool:
  """Whether the folder has the sweep that the plan asks for, of that step."""
  directory = f"{folder}/evaluation"
  if not (epath.Path(directory) / "front.json").exists():
    return False
  front = front_lib.load_front(f"{directory}/front.json")
  asked = config_lib.to_json(plan.config)["eval"] | {"seed": EVALUATION_SEED}
  del asked["batch"]  # changes nothing
  asked["reference_point"] = list(units.reference_point(plan.config))
  found = {
    **front.decoding,
    "prompts": front.prompts,
    "reference_point": list(front.reference_point),
  }
  return (
    front.step == steps
    and asked.items() <= found.items()
    and (epath.Path(directory) / measurements.FILE).exists()
  )


def _failure(cell: Cell, error: Exception) -> str:
  text = " ".join(str(error).split())[:300]
  return f"{cell.label}, seed {cell.seed}: {text or type(error)}"


def _against_oracles(
  found: compare.Comparison, plan: Plan
) -> list[dict[str, Any]]:
  """At each oracle's weighting, every method's value, over its runs.

  The value is what is optimised, (1 - alpha) sum_i w_i R_i - alpha KL.
  """
  label = METHODS["oracle"].label
  rows: list[dict[str, Any]] = []
  if label not in found.methods:
    return rows
  oracle = compare.mean_front(found.runs[label], label)
  for point in oracle.points:
    row: dict[str, Any] = {
      "weights": dict(point.weights),
      "alpha": point.alpha,
      "values": {},
    }
    for name in found.methods:
      front = compare.mean_front(found.runs[name], name)
      for own in front.points:
        near = all(
          abs(own.weights[o] - point.weights[o]) < 1e-3
          for o in front.objectives
        )
        if near and abs(own.alpha - point.alpha) < 1e-6:
          row["values"][name] = list(own.value)
    rows.append(row)
  return rows

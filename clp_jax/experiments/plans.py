"""The experiments as data: what each trades off, varies and compares."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from clp_jax.errors import ConfigError

CLP = ("clp-full", "clp-attention", "clp-logits")


class Axis(NamedTuple):
  """What an ablation varies."""

  what: str  # in labels
  parse: type  # of a value on the command line
  values: tuple[Any, ...]  # on the built-in world


class Experiment(NamedTuple):
  """One experiment of the paper, or one that chooses settings of those."""

  question: str
  objectives: tuple[str, ...]
  methods: tuple[str, ...]  # unless --methods says otherwise; the first is
  # what the others are compared with
  # (low, high) of the KL weights where that is the trade-off.
  alpha_range: tuple[float, float] | None = None
  # Points an edge of the simplex, or of the alphas.
  grid: int = 11
  # Weightings (weights, or alphas) of the oracle runs.
  oracles: tuple[Any, ...] = ()
  axis: Axis | None = None
  # Methods of the large picture; the others are drawn small.
  shown: tuple[str, ...] = ()
  # Of the held-out documents; the choosing experiments have their own, so that
  # nothing is chosen on the prompts that methods are compared on.
  split: str | None = None
  seeds: int = 3
  steps: int | None = None  # of training; None takes the config's
  # On the built-in world, where the front's worst corner is known: a second
  # reference point, near to it.
  near: Mapping[str, float] | None = None


_TWO = Experiment(
  question="Two rewards at one KL weight: which front is better, and steers?",
  objectives=("rouge", "nli"),
  methods=(
    *CLP,
    *("prompting", "clp-full-prompting", "soft-tokens"),
    *("rewarded-soups", "rewarded-soups-mx", "mod"),
    *("svd-lora", "lora", "ppo", "oracle"),
  ),
  oracles=((0.2, 0.8), (0.5, 0.5), (0.8, 0.2)),
  shown=(
    *("clp-full", "clp-attention", "rewarded-soups", "rewarded-soups-mx"),
    "mod",
  ),
  near={"rouge": 0.55, "nli": 0.65},
)
_ABLATION = ("clp-full", "clp-attention", "rewarded-soups")

_KL = Experiment(
  question="One reward at many KL weights: reward against KL.",
  objectives=("nli",),
  methods=(
    *CLP,
    *("clp-full-realigned", "clp-attention-realigned"),
    *("clp-full-frozen", "clp-full-frozen-realigned"),
    *("prompting", "soft-tokens"),
    *("rewarded-soups", "rewarded-soups-mx", "dera"),
    *("svd-lora", "lora", "oracle"),
  ),
  alpha_range=(0.01, 0.1),
  oracles=(0.01, 0.1),
  shown=(
    *("clp-full", "clp-full-realigned", "clp-full-frozen-realigned"),
    *("rewarded-soups", "dera"),
  ),
  near={"nli": 0.65, "kl": 10.0},
)


def _choose_rate(base: Experiment, what: str) -> Experiment:
  return base._replace(
    question=f"Which learning rate is each method's best, {what}.",
    methods=tuple(m for m in base.methods if m != "oracle"),
    axis=Axis("learning rate", float, (3e-4, 1e-3, 3e-3)),
    split="test",
    seeds=1,
    steps=1000,
  )


EXPERIMENTS: dict[str, Experiment] = {
  "single-reward-multi-kl": _KL,
  "two-reward": _TWO,
  "three-reward": Experiment(
    question="Three rewards at one KL weight.",
    objectives=("rouge", "nli", "tldr"),
    methods=_TWO.methods,
    grid=7,
    oracles=((1 / 3, 1 / 3, 1 / 3),),
    shown=_TWO.shown,
    near={"rouge": 0.55, "nli": 0.5, "tldr": 0.4},
  ),
  "training-steps": _TWO._replace(
    question="How many training steps the front needs.",
    methods=("clp-full", "rewarded-soups", "rewarded-soups-mx"),
    axis=Axis("steps", int, (250, 500, 1000, 2000, 4000, 8000)),
  ),
  "front-cost": _TWO._replace(
    question="What the other methods spend until their front is as good.",
    methods=(
      *("clp-attention", "clp-logits", "lora", "svd-lora", "ppo"),
      *("prompting", "soft-tokens", "mod"),
    ),
    axis=Axis("steps", int, (250, 500, 1000, 2000)),
    seeds=2,
  ),
  "model-size": _TWO._replace(
    question="What the model's size changes.",
    methods=_ABLATION,
    axis=Axis("model", str, ("micro", "tiny", "mini")),
    seeds=2,
  ),
  "model-family": _TWO._replace(
    question="Whether a decoder-only model steers as an encoder-decoder does.",
    methods=_ABLATION,
    axis=Axis("model", str, ("tiny", "tiny-decoder")),
  ),
  "weighting-distribution": _TWO._replace(
    question="What Q, the distribution of weightings in training, changes.",
    methods=("clp-full", "clp-attention"),
    axis=Axis("concentration", float, (0.2, 0.5, 1.0, 4.0)),
    seeds=2,
  ),
  "choose-steps": _TWO._replace(
    question="From how many training steps on full-CLP's front hardly moves.",
    methods=("clp-full",),
    axis=Axis("steps", int, (1000, 1500, 2000, 3000)),
    split="test",
    seeds=1,
  ),
  "choose-rate": _choose_rate(_TWO, "two rewards"),
  "choose-rate-kl": _choose_rate(_KL, "one reward and KL"),
}


def with_value(
  config: ml_collections.ConfigDict, what: str, value: Any
) -> ml_collections.ConfigDict:
  """A copy of the config at one value of an ablation's axis."""
  config = config.copy_and_resolve_references()
  if what == "steps":
    set_steps(config, value)
  elif what == "model":
    config.model.init = value
  elif what == "learning rate":
    config.optimizer.learning_rate = value
  elif what == "concentration":
    config.weightings.concentration = value
  else:
    raise ValueError(f"no axis {what!r}.")
  return config


def set_steps(config: ml_collections.ConfigDict, steps: int) -> None:
  """Trains for so many steps; where the rate decays, over as many."""
  config.train.steps = steps
  if config.optimizer.decay_steps is not None:
    config.optimizer.decay_steps = max(steps, 1)


def base_config(
  experiment: Experiment, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """The config that all methods of an experiment start from, of the user's or
  the built-in world's.

  Raises:
    ConfigError: when it does not describe a reward of the experiment, or
      normalises one in a way that differs between methods.
  """
  config = config.copy_and_resolve_references()
  missing = [o for o in experiment.objectives if o not in config.rewards]
  if missing:
    raise ConfigError(
      f"this experiment is about {', '.join(experiment.objectives)}, and "
      f"config.rewards does not describe {', '.join(missing)}; it describes "
      f"{', '.join(config.rewards)}."
    )
  for name in experiment.objectives:
    if config.rewards[name].normalise == "running":
      raise ConfigError(
        f"rewards.{name}.normalise = running divides by the deviation of a "
        "run's own responses, so that one alpha would be another trade-off for "
        "each method; set it to fixed, the reference's moments, or none."
      )
  config.objectives = experiment.objectives
  if experiment.split is not None and config.data.train is None:
    config.data.eval_split = experiment.split
  point = config.eval.reference_point
  if point is not None and len(point) != len(experiment.objectives):
    config.eval.reference_point = None
  if experiment.alpha_range is not None:
    if config.weightings.alpha_range is None:
      config.weightings.alpha_range = experiment.alpha_range
  else:
    config.weightings.alpha_range = None
  return config

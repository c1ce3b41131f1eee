"""How the experiments on the built-in world were set up, and what chose it.

The rules, written down before the runs:

  - supervised steps: until the held-out loss gains less than SUPERVISED_GAIN of
    itself from half as many more;
  - training steps: such that full-CLP's hypervolume gains less than STEPS_GAIN
    from half as many more, 4,000 at the most;
  - learning rates: for every method, soups included, the best hypervolume of
    the same three, at 1,000 steps of one seed;
  - everything above on the split `test`; the comparisons are on `validation`,
    whose prompts are used for nothing else;
  - two supervised checkpoints, three seeds (two of the ablations), the same
    prompts, decoding and random keys for all methods, no seed dropped.

`clp experiment` with the names SUPERVISED and CHOOSING measures what the
choices below rest on; the page shows the tables, and a test holds the choices
against them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from clp_jax import demo
from clp_jax.evaluation.tables import markdown_table
from clp_jax.experiments import pictures

Json = dict[str, Any]

SUPERVISED_GAIN = 0.005  # relative
STEPS_GAIN = 0.005  # of the hypervolume
MAX_STEPS = 4000
# Steps of the supervised curve, each half as many more as the one before.
SUPERVISED_VALUES: tuple[int, ...] = (1400, 2100, 3150, 4725)

# Chosen before the order of the data changed; choose-supervised gives 2,100
# now, and half as many more than 3,150 gain nothing either.
SUPERVISED_STEPS = 3150
STEPS = 2000  # 3,000 gain .0037 in choose-steps
# Method -> learning rate, of several rewards and of one against KL; others take
# the config's, as all of one reward do until choose-rate-kl has been run.
CHOSEN_RATES: dict[str, float] = {
  "clp-full": 0.001,
  "clp-attention": 0.001,
  "clp-logits": 0.001,
  "prompting": 0.001,
  "clp-full-prompting": 0.001,
  "soft-tokens": 0.001,
  "rewarded-soups": 0.001,
  "rewarded-soups-mx": 0.0003,
  "mod": 0.001,
  "svd-lora": 0.003,
  "lora": 0.003,
  "ppo": 0.0003,
}
CHOSEN_RATES_KL: dict[str, float] = {
  "clp-full": 0.0003,
  "clp-attention": 0.001,
  "clp-logits": 0.001,
  "clp-full-realigned": 0.0003,
  "clp-attention-realigned": 0.001,
  "clp-full-frozen": 0.0003,
  "clp-full-frozen-realigned": 0.0003,
  "prompting": 0.001,
  "soft-tokens": 0.0003,
  "rewarded-soups": 0.0003,
  "rewarded-soups-mx": 0.0003,
  "dera": 0.0003,
  "svd-lora": 0.0003,
  "lora": 0.001,
}

SUPERVISED = "choose-supervised"
CHOOSING = ("choose-steps", "choose-rate", "choose-rate-kl")


def get_config() -> ml_collections.ConfigDict:
  """The built-in world's experiments: the demo's run, trained to its end."""
  config = demo.get_config()
  config.sft.steps = config.sft.decay_steps = SUPERVISED_STEPS
  config.train.steps = config.optimizer.decay_steps = STEPS
  return config


def best_rates(content: Json) -> dict[str, float]:
  """Method's label -> the rate of its largest hypervolume.

  Args:
    content: of choose-rate or choose-rate-kl.
  """
  return {
    method: max(volumes, key=lambda rate: volumes[rate])
    for method, volumes in _volumes(content).items()
  }


def converged(values: Mapping[int, float], gain: float, relative: bool) -> int:
  """The fewest steps from which half as many more gain less than `gain`.

  Args:
    values: steps -> what should fall (relative: a loss) or rise (a
      hypervolume).
    gain: the least that counts.
    relative: whether `gain` is a share of the value.

  Raises:
    ValueError: when it still gains as much at the end.
  """
  steps = sorted(values)
  for now in steps[:-1]:
    # At least half as many more; where there are only fewer, the most.
    later = next((s for s in steps if s >= 1.5 * now), steps[-1])
    change = values[later] - values[now]
    if relative:
      change = -change / values[now]
    if change < gain:
      return now
  raise ValueError(f"still gains {gain} or more after {steps[-1]:,} steps.")


def text(contents: Mapping[str, Json]) -> str:
  """The protocol and the tables that its choices rest on, as markdown."""
  parts = [
    f"Written down before the runs. Supervised steps until the held-out loss "
    f"gains less than {SUPERVISED_GAIN:.1%} of itself from half as many more: "
    f"{SUPERVISED_STEPS:,}. Training steps such that full-CLP's hypervolume "
    f"gains less than {STEPS_GAIN} from half as many more, {MAX_STEPS:,} at "
    f"the most: {STEPS:,}. For every method the best of three learning rates "
    "at 1,000 steps of one seed. All of these were chosen on the split "
    "`test`; the comparisons are on `validation`, whose prompts are used "
    "for nothing else. Two supervised checkpoints, three seeds (two of the "
    "ablations), the same prompts, decoding and random keys for all methods.\n"
  ]
  missing = [n for n in (SUPERVISED, *CHOOSING) if n not in contents]
  if missing:
    parts.append(
      f"**Not measured yet:** {', '.join(missing)}; until then what "
      "they are to choose is provisional.\n"
    )
  if (content := contents.get(SUPERVISED)) is not None:
    losses = {row["steps"]: row["loss"] for row in content["rows"]}
    named = ("supervised steps", "held-out loss, nats a token")
    table = _gains(losses, named, lambda old, new: f"{1 - new / old:+.1%}")
    parts += [f"`{content['command']}`:\n", table]
    fewest = converged(losses, SUPERVISED_GAIN, relative=True)
    if fewest < SUPERVISED_STEPS:
      parts.append(
        f"The fewest that the rule allows are {fewest:,} here. The "
        f"{SUPERVISED_STEPS:,} that all experiments take were chosen by the "
        "same rule when the data came in another order.\n"
      )
  if (content := contents.get("choose-steps")) is not None:
    volumes = dict(sorted(step_volumes(content).items()))
    named = ("steps", "full-CLP's hypervolume")
    table = _gains(volumes, named, lambda old, new: f"{new - old:+.4f}")
    parts += [f"`{content['command']}`:\n", table]
  for name in ("choose-rate", "choose-rate-kl"):
    if (content := contents.get(name)) is not None:
      parts += [f"`{content['command']}`:\n", _rate_table(content)]
  return "\n".join(parts)


def _gains(
  values: Mapping[int, float],
  named: tuple[str, str],
  gain: Callable[[float, float], str],
) -> str:
  """Steps and values as a table, with what each gains on the one before."""
  rows = []
  before = None
  for steps, value in values.items():
    row = dict(zip(named, (f"{steps:,}", f"{value:.4f}"), strict=True))
    rows.append(row | {"gain": "" if before is None else gain(before, value)})
    before = value
  return markdown_table(rows)


def step_volumes(content: Json) -> dict[int, float]:
  """Steps -> full-CLP's hypervolume, of choose-steps."""
  (volumes,) = _volumes(content).values()
  return volumes


def _volumes(content: Json) -> dict[str, dict[Any, float]]:
  """Method -> value of the axis -> hypervolume, mean over seeds."""
  methods = dict.fromkeys(f["method"] for f in content["fronts"].values())
  found = {}
  for method in methods:
    values, volumes = pictures.hypervolumes(content, method)
    found[method] = {
      v: float(np.mean(x)) for v, x in zip(values, volumes, strict=True)
    }
  return found


def _rate_table(content: Json) -> str:
  rows = []
  for method, volumes in _volumes(content).items():
    row = {"hypervolume at rate": method}
    best = max(volumes, key=lambda rate: volumes[rate])
    for rate, volume in volumes.items():
      shown = f"{volume:.4f}"
      row[f"{rate:g}"] = f"**{shown}**" if rate == best else shown
    rows.append(row)
  return markdown_table(rows)

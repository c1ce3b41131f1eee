"""What an experiment would run: its runs, folders, samples and chip-hours.

Nothing is trained, loaded or written. A run's chip-hours are its useful FLOPs,
which follow from shapes (`clp plan` counts the same), over what a chip does in
an hour at some utilisation; `clp plan` says which of a config on a slice.
"""

import json
from typing import NamedTuple

import jax
import ml_collections

from clp_jax import build
from clp_jax import config as config_lib
from clp_jax.errors import ConfigError
from clp_jax.experiments import running
from clp_jax.plan import chips, programs

HOUR = 3600.0
# What decides no shape.
_FREE = ("seed", "weightings", "optimizer", "eval", "train", "critic")


class Planned(NamedTuple):
  """One run and what it would cost."""

  stage: running.Stage
  chip_hours: float


def planned(
  plan: running.Plan, chip: chips.Chip, utilisation: float
) -> list[Planned]:
  """Every run of a plan, in the order in which they would be trained.

  Args:
    plan: from `running.make_plan`; models may be presets.
    chip: that they would run on.
    utilisation: share of the chip's peak FLOP/s, in (0, 1].

  Raises:
    ConfigError: when a model's shapes are nowhere to be found.
  """
  costs: dict[str, tuple[float, float]] = {}
  rows = []
  for stage in running.stages(plan):
    values = config_lib.to_json(stage.config)
    key = json.dumps({k: v for k, v in values.items() if k not in _FREE})
    if key not in costs:
      costs[key] = step_flops(stage.config)
    supervised, step = costs[key]
    flops = stage.steps * (supervised if stage.supervised else step)
    rows.append(Planned(stage, flops / (chip.flops * utilisation * HOUR)))
  return rows


def step_flops(config: ml_collections.ConfigDict) -> tuple[float, float]:
  """(of a supervised step, of a step of RL), useful ones on all chips; models
  that the config leaves to be given are `plan`'s presets."""
  own = config.copy_and_resolve_references()
  # Prompts are a few tokens more; their format needs a vocabulary.
  own.prompting.style, own.prompting.sft_share = "none", 0.0
  own.sft.steps = max(own.sft.steps, 1)
  programs.fill_presets(own)
  if own.model.init is None:
    raise ConfigError(
      "model.init is not set; give a checkpoint or a preset such as "
      "--config.model.init=base, or plan.model in the config."
    )
  own.mesh.replica, own.mesh.data, own.mesh.model = 1, 1, 1
  mesh = build.make_mesh(own, jax.devices()[:1])
  supervised = step = 0.0
  for job in programs.jobs(own, mesh):
    if job.name == "sft":
      supervised = job.useful
    step += job.calls * job.useful
  return supervised, step


def text(plan: running.Plan, topology: str, utilisation: float) -> str:
  """The dry run as a table, for the terminal, on a generation of TPU, "v5e", or
  a slice of one, "v5e:2x4"; utilisation as for `planned`.

  Raises:
    ConfigError: an unknown generation, or models of unknown shape.
  """
  generation = topology.partition(":")[0]
  if generation not in chips.CHIPS:
    raise ConfigError(
      f"unknown TPU {topology!r}; there are {', '.join(chips.CHIPS)}."
    )
  rows = planned(plan, chips.CHIPS[generation], utilisation)
  lines = [("run", "seed", "steps", "samples", "chip-hours", "", "folder")]
  lines += [
    (
      row.stage.label,
      str(row.stage.config.seed),
      f"{row.stage.steps:,}",
      f"{row.stage.samples:,}",
      _hours(row.chip_hours),
      "finished" if row.stage.finished else "",
      row.stage.folder,
    )
    for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  table = [
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
    for line in lines
  ]
  left = sum(row.chip_hours for row in rows if not row.stage.finished)
  total = sum(row.chip_hours for row in rows)
  return "\n".join(
    [
      *(line.rstrip() for line in table),
      "",
      f"{len(rows)} runs, {_hours(total)} chip-hours of {generation} at "
      f"{utilisation:.0%} of its peak, {_hours(left)} of them left; "
      "--utilisation takes the share that `clp plan` gives of a slice.",
    ]
  )


def _hours(hours: float) -> str:
  return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"

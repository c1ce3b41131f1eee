"""The results page, written from the numbers that experiments have left.

Nothing here is chosen: every experiment, method and seed that is finished is in
the page, what failed or was not run is named, and the verdicts on the paper's
claims are computed from the figures by the rules that stand beside them.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.evaluation.tables import markdown_table
from clp_jax.experiments import pictures, plans, protocol
from clp_jax.experiments.verdicts import verdicts

Json = dict[str, Any]

CURVE = "training-steps"
COST = (CURVE, "front-cost")  # the methods of the cost to a front
CURVE_METHODS = ("full-CLP", "Rewarded Soups", "Rewarded Soups, m x")
LEVELS = (0.78, 0.80, 0.81)  # of the hypervolume, for the cost to a front


def write(
  contents: Mapping[str, Json],
  cost: Json | None,
  pictures_folder: pathlib.Path,
  commands: Mapping[str, str],
) -> str:
  """Draws the pictures and returns the page's markdown.

  Args:
    contents: experiment -> its numbers, see `results.collect`.
    cost: content of costs.json, or None.
    pictures_folder: where the pictures go; links are relative to its parent.
    commands: of what was not run: experiment, "costs" or "results" -> command.
  """
  link = pictures_folder.name
  parts = [
    "# Results\n",
    f"Written by `{commands['results']}` from the numbers in "
    f"[{link}/]({link}), which the commands below have left; no figure is "
    "typed in and no seed is dropped. None of the figures is the paper's: its "
    "text was at hand only as an abstract and an overview. All of this is the "
    "built-in world, a model of 0.2 million parameters; how it was set up, and "
    "what chose it, is [below](#protocol).\n",
  ]
  if CURVE in contents:
    parts.append(_curve(contents[CURVE], pictures_folder))
  else:
    parts.append(f"**No curve yet.** `{commands[CURVE]}` measures it.\n")
  for name, experiment in plans.EXPERIMENTS.items():
    if name in protocol.CHOOSING:
      continue
    parts.append(f"## {name}\n\n{experiment.question}\n")
    if name not in contents:
      parts.append(f"**Not run.** `{commands[name]}` runs it.\n")
      continue
    content = contents[name]
    file = pictures_folder / f"{name}.png"
    draw = pictures.fronts if content["axis"] is None else pictures.by_value
    draw(content, file)
    parts.append(f"![Fronts of {name}]({link}/{name}.png)\n")
    parts.append(_how(content))
  run = {n: c for n, c in contents.items() if n != protocol.SUPERVISED}
  found = {name: content["comparison"] for name, content in run.items()}
  parts.append(
    "## The paper's claims\n\n"
    + markdown_table([v._asdict() for v in verdicts(found, cost)])
  )
  spent = [contents[name] for name in COST if name in contents]
  if spent:
    parts.append(_cost_to_a_front(spent, cost))
  parts.append("## Costs\n")
  if cost is None:
    parts.append(f"**Not measured.** `{commands['costs']}` measures them.\n")
  else:
    parts.append(_costs(cost))
  parts += ["## Protocol\n", protocol.text(contents), "## Tables\n"]
  for name, content in run.items():
    if name not in protocol.CHOOSING:
      parts.append(_tables(name, content))
  return "\n".join(parts)


def _curve(content: Json, folder: pathlib.Path) -> str:
  """The first thing to see: hypervolume over training steps."""
  pictures.curve(content, CURVE_METHODS, folder / "curve.png")
  rows = []
  for method in CURVE_METHODS:
    steps, volumes = pictures.hypervolumes(content, method)
    row = {"hypervolume": method}
    for i in np.argsort(steps):
      row[f"{steps[i]:,} steps"] = _mean(volumes[i])
    rows.append(row)
  first, *others = CURVE_METHODS
  for other in others:
    for a, b in ((first, other), (other, first)):
      steps, shares = pictures.dominated(content, a, b)
      row = {"hypervolume": f"points of {b} that {a} dominates"}
      for i in np.argsort(steps):
        row[f"{steps[i]:,} steps"] = f"{shares[i].mean():.0%}"
      rows.append(row)
  seeds = sorted(
    {r["seed"] for f in content["fronts"].values() for r in f["runs"]}
  )
  return (
    f"![Hypervolume and dominated points over training steps]"
    f"({folder.name}/curve.png)\n\n"
    "One model trained over weightings (full-CLP) and the average of models "
    "trained for one reward each (Rewarded Soups), by how long they trained. "
    "At equal steps full-CLP and Rewarded Soups have sampled equally many "
    'responses; "m x" has sampled m times as many. Bands are from the lowest '
    f"of {len(seeds)} seeds to the highest.\n\n" + markdown_table(rows)
  )


def _mean(values: Sequence[float]) -> str:
  text = f"{np.mean(values):.4f}"
  if len(values) > 1:
    text += f" \u00b1 {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"
  return text


def _how(content: Json) -> str:
  seeds = ", ".join(map(str, content["seeds"]))
  start = ""
  if content["config"]["sft"]["steps"]:
    used = ", ".join(map(str, content["checkpoints_used"]))
    start = f", from supervised checkpoints {used}"
  lines = [
    f"`{content['command']}`, seeds {seeds}{start}; {content['machine']}; "
    f"{content['date']}; training took {_hours(content)}.\n"
  ]
  if content["missing"]:
    lines.append(f"**Not run yet:** {'; '.join(content['missing'])}.\n")
  if content["failures"]:
    lines.append(f"**Failed:** {'; '.join(content['failures'])}.\n")
  return "\n".join(lines)


def _hours(content: Json) -> str:
  seconds = sum(
    run["seconds"] or 0.0
    for front in content["fronts"].values()
    for run in front["runs"]
  )
  return f"{seconds / 3600:.1f} h, runs shared by methods counted for each"


def _tables(name: str, content: Json) -> str:
  parts = [f"### {name}\n"]
  for title, rows in content["tables"].items():
    parts.append(f"#### {title}\n\n{markdown_table(rows)}")
  parts.append(content["note"] + "\n")
  if content["oracles"]:
    parts.append(_oracle_table(content["oracles"]))
  return "\n".join(parts)


def _oracle_table(oracles: list[Json]) -> str:
  rows = []
  for name in oracles[0]["values"]:
    row = {"value at": name}
    for oracle in oracles:
      weights = ", ".join(f"{k} {w:.2f}" for k, w in oracle["weights"].items())
      value = oracle["values"].get(name)
      row[f"{weights}, alpha {oracle['alpha']:g}"] = (
        "-" if value is None else f"{value[0]:.4f} \u00b1 {value[1]:.4f}"
      )
    rows.append(row)
  return (
    "#### Against runs trained for one weighting\n\n"
    + markdown_table(rows)
    + "\nThe value is (1 - alpha) sum w R - alpha KL; errors over seeds, of a "
    "single seed over prompts.\n"
  )


def reached(
  content: Json, method: str, level: float
) -> dict[str, float] | None:
  """What a method needs for a hypervolume, or None where it never has it.

  Between two budgets that were run, on the straight line over the logarithm of
  the steps; means over seeds.

  Args:
    content: of an experiment whose axis is the steps.
    method: its name.
    level: hypervolume.

  Returns:
    {"steps", "samples", "updates", "seconds"}.
  """
  own = sorted(
    (f for f in content["fronts"].values() if f["method"] == method),
    key=lambda f: f["value"],
  )
  spent = [
    {
      "samples": f["samples"],
      "updates": f["updates"],
      "seconds": float(np.mean([r["seconds"] or np.nan for r in f["runs"]])),
      "steps": f["value"],
    }
    for f in own
  ]
  steps, volumes = pictures.hypervolumes(content, method)
  mean = [float(volumes[i].mean()) for i in np.argsort(steps)]
  for i, volume in enumerate(mean):
    if volume < level:
      continue
    if i == 0:
      return spent[0]
    share = (level - mean[i - 1]) / (volume - mean[i - 1])
    return {
      name: float(
        np.exp(
          (1 - share) * np.log(spent[i - 1][name])
          + share * np.log(spent[i][name])
        )
      )
      for name in spent[i]
    }
  return None


def _cost_to_a_front(contents: Sequence[Json], cost: Json | None) -> str:
  rows = []
  for content in contents:
    fronts = content["fronts"].values()
    for method in dict.fromkeys(front["method"] for front in fronts):
      steps, volumes = pictures.hypervolumes(content, method)
      best = int(np.argmax([v.mean() for v in volumes]))
      row = {"method": method}
      for level in LEVELS:
        spent = reached(content, method, level)
        row[f"to {level:.2f}"] = (
          f"never; best {volumes[best].mean():.4f} at {steps[best]:,} steps"
          if spent is None
          else f"{spent['samples']:,.0f} samples, {spent['updates']:,.0f} "
          f"updates, {spent['seconds']:,.0f} s"
        )
      rows.append(row | {"answering": _answering(method, cost)})
  smallest = min(f["value"] for c in contents for f in c["fronts"].values())
  return (
    "## Cost to a front\n\n"
    "What training had spent when the front's hypervolume reached a level: "
    "sampled responses, optimizer steps, seconds of training on the machine "
    "that the experiment names, other jobs beside.\n\n"
    + markdown_table(rows)
    + "\nMeans over seeds, between two budgets on the straight line over the "
    f"logarithm of what was spent; a level that {smallest:,} steps have "
    "already shows what those took. A method whose answering was not timed "
    "answers through one model, as full-CLP does, unless it says how many.\n"
  )


def _answering(method: str, cost: Json | None) -> str:
  """What an answer costs; "NAME, m x" is NAME's."""
  if cost is None:
    return "-"
  name = method.split(", ")[0]
  for time in cost["times"]:
    if time["method"] == name:
      return f"{time['over_first']:.2f} of full-CLP's time"
  models = {p["method"]: p["models"] for p in cost["parameters"]["tiny"]}
  return f"{models[name]} models a token" if models.get(name, 1) > 1 else "-"


def _costs(cost: Mapping[str, Any]) -> str:
  times = [
    {
      "method": t["method"],
      "models a token": str(t["models"]),
      "ms a position, 64 rows": (
        f"{t['median']:.2f} [{t['low']:.2f}, {t['high']:.2f}]"
      ),
      "over full-CLP": f"{t['over_first']:.2f}",
    }
    for t in cost["times"]
  ]
  parts = [
    f"`{cost['command']}`; {cost['machine']}; {cost['date']}.\n",
    "### Decoding\n",
    markdown_table(times),
    f"The built-in world's T5, the methods in turns in one process, median and "
    f"range of {cost['repeats']} batches of 18 positions; the ratio is the "
    f"median over turns. The machine's load was {cost['load']:.1f}.\n",
    "### Parameters, two rewards\n",
  ]
  sizes = list(cost["parameters"])
  rows = []
  for i, first in enumerate(cost["parameters"][sizes[0]]):
    row = {"method": first["method"]}
    for size in sizes:
      p = cost["parameters"][size][i]
      row[f"{size}: trained / stored"] = (
        f"{_short(p['trained'])} / {_short(p['stored'])}"
      )
    rows.append(row)
  shares = ", ".join(
    f"{size} {share:.1%}" for size, share in cost["attention_share"].items()
  )
  parts += [
    markdown_table(rows),
    "attn-CLP's parameters beyond one model's, as a share of full-CLP's, from "
    f"the T5 v1.1 presets: {shares}.\n",
  ]
  return "\n".join(parts)


def _short(number: int) -> str:
  for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.2f}{unit}"
  return str(number)

"""docs/RESULTS.md, written from what experiments have left in their folders.

Nothing here is chosen: every experiment, method and seed that is finished is in
the page, what failed or was not run is named, and the verdicts on the paper's
claims are computed from the figures by the rules below.
"""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from clp_jax.evaluation.comparison import markdown_table
from clp_jax.experiments import costs, plans, running
from clp_jax.experiments.verdicts import verdicts
from clp_jax.models.presets import PRESETS

Json = dict[str, Any]
SIZES = ("base", "large", "xl")
VOCABULARY = 256  # of the built-in world's T5, for counting


def measure_costs(workdir: str, command: str, repeats: int = 30) -> None:
  """Measures the cost table and writes WORKDIR/costs/costs.json."""
  tiny = dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY)
  times = costs.decode_times(
    tiny, prompts=64, source_length=56, target_length=18, repeats=repeats
  )
  content = {
    "command": command,
    "machine": running.machine(),
    "date": datetime.date.today().isoformat(),
    "repeats": repeats,
    "load": os.getloadavg()[0],  # processes that wanted to run besides
    "times": [time._asdict() for time in times],
    "parameters": {
      name: [p._asdict() for p in costs.parameters(config, 2)]
      for name, config in {
        "tiny": tiny,
        **{
          size: dataclasses.replace(PRESETS[size], scan_layers=True)
          for size in SIZES
        },
      }.items()
    },
    "attention_share": {size: costs.attention_share(size, 2) for size in SIZES},
  }
  folder = pathlib.Path(workdir) / "costs"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "costs.json").write_text(json.dumps(content, indent=2) + "\n")


def page(workdir: str, pictures: str, commands: Mapping[str, str]) -> str:
  """The page's markdown.

  Args:
    workdir: of the experiments.
    pictures: folder that the fronts' pictures are copied to; links are
      relative to its parent.
    commands: of what was not run: experiment, or "costs" -> command.
  """
  folder = pathlib.Path(workdir)
  found: dict[str, Json] = {}
  sections = []
  for name, experiment in plans.EXPERIMENTS.items():
    sections.append(f"## {name}\n\n{experiment.question}\n")
    directory = folder / name
    if not (directory / running.RECORD).exists():
      sections.append(f"**Not run.** `{commands[name]}` runs it.\n")
      continue
    record = json.loads((directory / running.RECORD).read_text())
    found[name] = json.loads((directory / "comparison.json").read_text())
    target = pathlib.Path(pictures) / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((directory / "fronts.png").read_bytes())
    sections.append(_section(record, directory, f"{target.parent.name}"))
  sections.append("## Costs\n")
  cost = None
  if (folder / "costs" / "costs.json").exists():
    cost = json.loads((folder / "costs" / "costs.json").read_text())
    sections.append(_costs(cost))
  else:
    sections.append(f"**Not measured.** `{commands['costs']}` measures them.\n")
  head = (
    "# Results\n\n"
    f"Written by `{commands['results']}` on "
    f"{datetime.date.today().isoformat()} from the folders that the commands "
    "below have left; no figure is typed in, and no seed is dropped. What was "
    "not run yet is said to be so: the same commands go on where they "
    "stopped. None of the figures is the paper's; its text was at hand only "
    "as an abstract and an overview.\n"
  )
  rows = [verdict._asdict() for verdict in verdicts(found, cost)]
  claims = "## The paper's claims\n\n" + markdown_table(rows)
  return "\n".join([head, claims, *sections])


def _section(record: Json, directory: pathlib.Path, pictures: str) -> str:
  seeds = ", ".join(map(str, record["seeds"]))
  lines = [
    f"`{record['command']}`, seeds {seeds}"
    + (
      f", from supervised checkpoints "
      f"{', '.join(map(str, record['checkpoints_used']))}"
      if record["config"]["sft"]["steps"]
      else ""
    )
    + f"; {record['machine']}; {record['date']}.\n"
  ]
  if record["missing"]:
    lines.append(f"**Not run yet:** {'; '.join(record['missing'])}.\n")
  if record["failures"]:
    lines.append(f"**Failed:** {'; '.join(record['failures'])}.\n")
  lines.append((directory / "comparison.md").read_text())
  if record["oracles"]:
    lines.append(_oracle_table(record["oracles"]))
  lines.append(
    f"![Fronts of {record['experiment']}]"
    f"({pictures}/{record['experiment']}.png)\n"
  )
  return "\n".join(lines)


def _oracle_table(oracles: list[Json]) -> str:
  rows = []
  names = list(oracles[0]["values"])
  for name in names:
    row = {"value at": name}
    for oracle in oracles:
      weights = ", ".join(f"{k} {w:.2f}" for k, w in oracle["weights"].items())
      value = oracle["values"].get(name)
      row[f"{weights}, alpha {oracle['alpha']:g}"] = (
        "-" if value is None else f"{value[0]:.4f} \u00b1 {value[1]:.4f}"
      )
    rows.append(row)
  return (
    "### Against runs trained for one weighting\n\n"
    + markdown_table(rows)
    + "\nThe value is (1 - alpha) sum w R - alpha KL; errors over seeds, of a "
    "single seed over prompts.\n"
  )


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

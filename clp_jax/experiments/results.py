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
from typing import Any, NamedTuple

from clp_jax.evaluation.comparison import markdown_table
from clp_jax.experiments import costs, plans, running
from clp_jax.models.presets import PRESETS

Json = dict[str, Any]
SIZES = ("base", "large", "xl")
VOCABULARY = 256  # of the built-in world's T5, for counting


class Verdict(NamedTuple):
  """On one claim of the paper."""

  claim: str
  verdict: str  # holds here, holds in part, does not hold, not tested
  figures: str


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


def verdicts(
  found: Mapping[str, Json], cost: Mapping[str, Any] | None
) -> list[Verdict]:
  """Every claim of the paper that is known here, judged by the figures.

  Args:
    found: experiment -> content of its comparison.json.
    cost: content of costs.json, or None.
  """
  rows = []
  for experiment in ("two-reward", "three-reward"):
    rows.append(_dominates(found.get(experiment), experiment))
  rows.append(_spread(found.get("two-reward")))
  rows.append(_attention(found.get("two-reward"), cost))
  rows.append(_half_of_dera(cost))
  rows.append(_kl(found.get("single-reward-multi-kl")))
  rows.append(_ppo(found.get("two-reward")))
  for claim in (
    "Theory: logit mixing is exact for the KL trade-off",
    "Theory: zero-shot averaging can be near-optimal where the optima align, "
    "and fails otherwise; training over weightings closes the gap",
  ):
    rows.append(
      Verdict(
        claim,
        "holds here",
        "on finite response sets with closed-form optima, which the tests "
        "check: [theory.md](theory.md) has the figures; not a statement about "
        "trained networks",
      )
    )
  rows.append(
    Verdict(
      "A language model as a judge prefers CLP's generations",
      "not tested",
      "no judge was at hand; evaluation/judge.py is what would ask one",
    )
  )
  return rows


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


def _methods(found: Json | None) -> dict[str, Json]:
  return {} if found is None else found["methods"]


def _interval(value: Json | None, digits: int = 4) -> str:
  if value is None or value["mean"] is None:
    return "-"
  text = f"{value['mean']:+.{digits}f}"
  if value["low"] is not None:
    text += f" [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"
  return text


def _dominates(found: Json | None, experiment: str) -> Verdict:
  claim = f"CLP Pareto-dominates Rewarded Soups ({experiment})"
  methods = _methods(found)
  soups = [n for n in methods if n.startswith("Rewarded Soups")]
  if "full-CLP" not in methods or not soups:
    return Verdict(claim, "not tested", "no runs yet")
  figures, strict, larger = [], True, True
  for name in soups:
    difference = methods[name]["difference"]["hypervolume"]
    share = methods["full-CLP"]["dominates"][name]
    back = methods[name]["dominates"]["full-CLP"]
    strict &= share == 1
    larger &= difference["high"] is not None and difference["high"] < 0
    figures.append(
      f"{name}: hypervolume {_interval(difference)} against full-CLP, "
      f"{share:.0%} of its points dominated, {back:.0%} of full-CLP's"
    )
  verdict = "does not hold"
  if strict:
    verdict = "holds here"
  elif larger:
    verdict = "holds in part: larger hypervolume, not point by point"
  return Verdict(claim, verdict, "; ".join(figures))


def _spread(found: Json | None) -> Verdict:
  claim = (
    "full- and attn-CLP keep a more spread-out, steerable front than logit-CLP "
    "and prompting"
  )
  methods = _methods(found)
  narrow = [n for n in ("logit-CLP", "prompting") if n in methods]
  wide = [n for n in ("full-CLP", "attn-CLP") if n in methods]
  if not narrow or not wide:
    return Verdict(claim, "not tested", "no runs yet")

  def spread(name: str) -> float:
    return methods[name]["metrics"]["spread"]["mean"]

  figures = ", ".join(
    f"{n} {_interval(methods[n]['metrics']['spread'], 3)}"
    for n in (*wide, *narrow)
  )
  holds = min(map(spread, wide)) > max(map(spread, narrow))
  untested = "" if "prompting" in methods else "; prompting not run yet"
  verdict = "holds here" if holds else "does not hold"
  return Verdict(claim, verdict, f"spread: {figures}{untested}")


def _attention(found: Json | None, cost: Mapping[str, Any] | None) -> Verdict:
  claim = (
    "attn-CLP is a good balance of front, steerability and number of parameters"
  )
  methods = _methods(found)
  if not {"full-CLP", "attn-CLP"} <= set(methods):
    return Verdict(claim, "not tested", "no runs yet")
  difference = methods["attn-CLP"]["difference"]
  figures = (
    f"hypervolume {_interval(difference['hypervolume'])}, spread "
    f"{_interval(difference['spread'], 3)} against full-CLP"
  )
  if cost is not None:
    shares = [f"{s}: {x:.0%}" for s, x in cost["attention_share"].items()]
    figures += f"; of the extra parameters {', '.join(shares)}"
  high = difference["hypervolume"]["high"]
  holds = high is not None and high >= 0
  verdict = "holds here" if holds else "holds in part: smaller hypervolume"
  return Verdict(claim, verdict, figures)


def _half_of_dera(cost: Mapping[str, Any] | None) -> Verdict:
  claim = "CLP costs half of DeRa at inference"
  if cost is None:
    return Verdict(claim, "not tested", "not measured yet")
  over = {t["method"]: t["over_first"] for t in cost["times"]}
  ratio = 1 / over["DeRa"]
  verdict = "holds here" if ratio < 0.6 else "holds in part"
  return Verdict(claim, verdict, f"{ratio:.2f} of DeRa's time a token")


def _kl(found: Json | None) -> Verdict:
  claim = "With one reward and many KL weights CLP is better than RS and DeRa"
  methods = _methods(found)
  others = [n for n in methods if n.startswith(("Rewarded Soups", "DeRa"))]
  if "full-CLP" not in methods or not others:
    return Verdict(claim, "not tested", "no runs yet")
  figures, holds, fails = [], True, False
  for name in others:
    difference = methods[name]["difference"]["hypervolume"]
    known = difference["low"] is not None
    holds &= known and difference["high"] < 0
    fails |= known and difference["low"] > 0
    figures.append(f"{name} {_interval(difference)}")
  verdict = "holds here" if holds else "not clear"
  if fails:
    verdict = "does not hold"
  return Verdict(
    claim,
    verdict,
    f"hypervolume in reward and KL against full-CLP: {', '.join(figures)}",
  )


def _ppo(found: Json | None) -> Verdict:
  claim = (
    "PPO reaches REINFORCE's hypervolume at equal samples (not the paper's)"
  )
  methods = _methods(found)
  name = next((n for n in methods if "PPO" in n), None)
  if name is None or "full-CLP" not in methods:
    return Verdict(claim, "not tested", "no runs yet")
  difference = methods[name]["difference"]["hypervolume"]
  mean = difference["mean"]
  verdict = "holds here" if mean >= 0 else "does not hold"
  if (
    difference["low"] is not None and difference["low"] < 0 < difference["high"]
  ):
    verdict += ", within the interval"
  return Verdict(
    claim,
    verdict,
    f"hypervolume {_interval(difference)}; what was tried is in "
    "[BUILD_NOTES.md](../BUILD_NOTES.md)",
  )

"""Plans runs on TPU slices: the tables of docs/plans.md.

  python -m benchmarks.plans --output runs/plans
  python -m benchmarks.plans --output runs/plans --runs chat
  python -m benchmarks.plans --output runs/plans --runs chat-steps --json
  python -m benchmarks.plans --output runs/plans --runs adapters
  python -m benchmarks.plans --output runs/plans --runs colab
  python -m benchmarks.plans --output runs/plans --runs growth

Compiles for minutes a run. A run whose plan lies in --output is not compiled
again; delete its file to do so. --json prints the tables as
docs/results/plans.json has them.

"chat", "colab" and "growth" ask for memory alone (`clp plan --quick`), in one
table of what every program of a run holds; "growth" has updates of one model by
the number of objectives and of weightings. "chat-steps" has the times of some.
"adapters" has whole sets and LoRA on the same slices, and a third table of what
each program holds: adapters that are merged for every policy cost what whole
sets do, so that full-CLP is the "before" of adapters that are not. "colab" has
the one v5e chip that Google Colab lends, 8 prompts a step and two weightings.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

from benchmarks import notes

PROGRAMS = {
  "run": "",
  "slice": "",
  "program": "",
  "GB a chip": ".1f",
  "fits": "",
  "TFLOP a chip": ".2f",
  "compute ms": ".0f",
  "HBM ms": ".0f",
  "links ms": ".0f",
  "least ms": ".0f",
  "utilisation": ".1%",
  "bound by": "",
}
STEPS = {
  "run": "",
  "slice": "",
  "GB a chip": ".1f",
  "fits": "",
  "step ms": ".0f",
  "of it rollout": ".0%",
  "utilisation": ".1%",
  "responses a second and chip": ".2f",
  "steps": ",.0f",
  "chip-hours": ".1f",
}
HELD = {
  "run": "",
  "slice": "",
  "rollout, GB a chip": ".1f",
  "reference": ".1f",
  "reward": ".1f",
  "update": ".1f",
  "fits": "",
}
UPDATES = {"run": "", "slice": "", "update, GB a chip": ".2f", "fits": ""}
MEMORY = {
  "model": "",
  "slice": "",
  "program": "",
  "full-CLP, GB a chip": ".2f",
  "LoRA-CLP, GB a chip": ".2f",
  "times": ".2f",
}

Json = dict[str, Any]


class Run(NamedTuple):
  """A config on a slice."""

  name: str
  config: str
  topology: str
  options: tuple[str, ...] = ()


def _xsum(size: str, steering: str, topology: str, judge: str, m: int) -> Run:
  """Of configs/xsum; with three rewards where m is 3."""
  options = [
    f"--config.steering={steering}",
    f"--config.model.init={size}",
    f"--config.rewards.nli.model={judge}",
  ]
  if m == 3:
    options += [
      "--config.objectives=('nli', 'rouge', 'tldr')",
      f"--config.rewards.tldr.model={judge}",
    ]
  name = f"{size}, {steering}, m = {m}"
  return Run(name, f"configs/xsum/{size}.py", topology, tuple(options))


def _chat() -> list[Run]:
  """Every size of configs/chat, each way to train it, on v5e and v6e."""
  slices = {
    "qwen3_0_6b": ("v5e:2x4", "v6e:2x2"),
    "gemma3_1b": ("v5e:2x4", "v6e:2x2"),
    "qwen3_4b": ("v5e:4x8", "v6e:4x4"),
    "gemma3_4b": ("v5e:4x8", "v6e:4x4"),
    "qwen3_8b": ("v5e:8x8", "v6e:4x8"),
    "gemma3_12b": ("v5e:8x8", "v6e:4x8"),
  }
  return [
    Run(
      f"{size}, {steering}",
      f"configs/chat/{size}.py",
      topology,
      (f"--config.steering={steering}", "--quick"),
    )
    for size, topologies in slices.items()
    for steering in ("full", "attention", "lora")
    for topology in topologies
  ]


def _timed(name: str) -> Run:
  """A run of `_chat`, on v5e, with its times."""
  run = next(run for run in _chat() if run.name == name)
  return run._replace(options=run.options[:-1])


def _adapters() -> list[Run]:
  """Whole sets, then LoRA, of one model on one slice; the next model."""
  steerings = ("full", "lora")
  chat = [_timed(f"qwen3_8b, {steering}") for steering in steerings]
  return [_xsum("xl", s, "v5e:8x16", "xl", 3) for s in steerings] + chat


def _growth() -> list[Run]:
  """Updates of T5-base for one reward to three, under one weighting to 32."""
  rewards = ("nli", "rouge", "tldr")
  points = [(m, 8) for m in (1, 2, 3)] + [(2, g) for g in (1, 2, 4, 16, 32)]
  return [
    Run(
      f"base, full, m = {m}, G = {g}",
      "configs/xsum/base.py",
      "v5e:2x4",
      (
        "--only=update",
        "--config.model.init=base",
        "--config.rewards.nli.model=base",
        "--config.rewards.tldr.model=base",
        f"--config.objectives={rewards[:m]}",
        f"--config.rollout.weightings={g}",
        "--quick",
      ),
    )
    for m, g in points
  ]


def _colab() -> list[Run]:
  """What may fit a single chip, and the first that does not."""
  step = (
    "--config.rollout.prompts=8",
    "--config.rollout.weightings=2",
    "--config.train.microbatches=4",
  )
  pairs = [
    (size, steering)
    for size in ("qwen3_0_6b", "gemma3_1b")
    for steering in ("attention", "lora")
  ]
  return [
    Run(
      f"{size}, {steering}",
      f"configs/chat/{size}.py",
      "v5e:1x1",
      (
        f"--config.steering={steering}",
        "--config.mesh.model=1",
        *step,
        "--quick",
      ),
    )
    for size, steering in [*pairs, ("qwen3_4b", "lora")]
  ]


RUNS = {
  "xsum": [
    _xsum("base", "full", "v5e:2x4", "large", 2),
    _xsum("large", "full", "v5e:4x8", "large", 3),
    _xsum("xl", "attention", "v5e:8x16", "xl", 3),
    _xsum("xxl", "attention", "v5p:4x8x8", "xxl", 3),
  ],
  "chat": _chat(),
  "chat-steps": [
    _timed(f"{size}, {steering}")
    for size, steering in (
      ("qwen3_0_6b", "full"),
      ("gemma3_1b", "full"),
      ("qwen3_4b", "attention"),
      ("gemma3_4b", "attention"),
      ("qwen3_8b", "lora"),
      ("gemma3_12b", "lora"),
    )
  ],
  "adapters": _adapters(),
  "colab": _colab(),
  "growth": _growth(),
}


def plan(run: Run, output: pathlib.Path) -> Json:
  """Of all programs of a run, from its file or the compiler."""
  words = f"{run.name} {run.topology}"
  if "--quick" in run.options:
    words += " quick"
  name = "_".join(re.findall(r"[\w.]+", words))
  path = output / f"{name}.json"
  if not path.exists():
    command = [sys.executable, "-m", "clp_jax", "plan", "--json"]
    command += ["--config", run.config, "--topology", run.topology]
    result = subprocess.run(
      [*command, *run.options], check=True, stdout=subprocess.PIPE, text=True
    )
    path.write_text(result.stdout)
  return json.loads(path.read_text())


def program_rows(run: Run, planned: Json) -> list[list[Any]]:
  """A row of PROGRAMS for each program."""
  rows: list[list[Any]] = []
  for program in planned["programs"]:
    row = [run.name, run.topology, program["name"]]
    row += [program["total_bytes"] / 1e9, "yes" if program["fits"] else "no"]
    time = program["time"]
    if time is None:
      row += [None] * 7
    else:
      kinds = ("compute_bound", "hbm_bound", "interconnect", "step")
      row += [program["flops"] / 1e12, *(1e3 * time[kind] for kind in kinds)]
      row += [program["utilisation"], program["bottleneck"]]
    rows.append(row)
  return rows


def step_row(run: Run, planned: Json) -> list[Any]:
  """A row of STEPS."""
  programs, step = planned["programs"], planned["step"]
  row: list[Any] = [run.name, run.topology]
  row.append(max(p["total_bytes"] for p in programs) / 1e9)
  row.append("yes" if planned["fits"] else "no")
  if step["seconds"] is None:
    return row + [None] * 6
  (rollout,) = (p["time"]["step"] for p in programs if p["name"] == "rollout")
  chip_seconds = planned["chips"] * step["seconds"]
  row += [1e3 * step["seconds"], rollout / step["seconds"]]
  row += [step["utilisation"], step["responses_per_second"]]
  row += [3600 * step["chip_hours"] / chip_seconds, step["chip_hours"]]
  return row


def held_row(run: Run, planned: Json) -> list[Any]:
  """A row of HELD."""
  sizes = [program["total_bytes"] / 1e9 for program in planned["programs"]]
  fits = "yes" if planned["fits"] else "no"
  return [run.name, run.topology, *sizes, fits]


def memory_rows(full: Run, planned: Json, adapted: Json) -> list[list[Any]]:
  """A row of MEMORY for each program.

  Args:
    full: the run of whole sets.
    planned: its plan.
    adapted: that of LoRA, of the same model on the same slice.
  """
  model, _, _ = full.name.partition(",")
  rows: list[list[Any]] = []
  for one, other in zip(planned["programs"], adapted["programs"], strict=True):
    assert one["name"] == other["name"]
    sizes = [program["total_bytes"] for program in (one, other)]
    row = [model, full.topology, one["name"], *(size / 1e9 for size in sizes)]
    rows.append([*row, sizes[1] / sizes[0]])
  return rows


def main() -> None:
  """Compiles what is missing and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--runs", choices=list(RUNS), default="xsum")
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  programs, steps = [], []
  runs = RUNS[options.runs]
  plans = [plan(run, options.output) for run in runs]
  if "--quick" in runs[0].options:
    held = [held_row(*pair) for pair in zip(runs, plans, strict=True)]
    tables = [(UPDATES if options.runs == "growth" else HELD, held)]
  else:
    for run, planned in zip(runs, plans, strict=True):
      programs += program_rows(run, planned)
      steps.append(step_row(run, planned))
    tables = [(PROGRAMS, programs), (STEPS, steps)]
  if options.runs == "adapters":
    pairs = zip(runs[::2], plans[::2], plans[1::2], strict=True)
    tables.append(
      (MEMORY, [row for pair in pairs for row in memory_rows(*pair)])
    )
  if options.json:
    print(json.dumps([{"columns": c, "rows": r} for c, r in tables]))
  else:
    print("\n\n".join(notes.table(c, r) for c, r in tables))


if __name__ == "__main__":
  main()

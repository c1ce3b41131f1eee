"""Plans the paper's kind of run on TPU slices: the table of docs/plans.md.

  python -m benchmarks.plans --output runs/plans

Compiles for minutes. A program whose plan lies in --output is not compiled
again; delete its file to do so.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

THREE = ("--config.objectives=('nli', 'rouge', 'tldr')",)


class Setting(NamedTuple):
  """A run on a slice."""

  name: str
  size: str
  topology: str
  judge: str  # the preset of the entailment model
  options: tuple[str, ...] = ()
  programs: tuple[str, ...] = (
    "sft",
    "rollout",
    "reference",
    "reward nli",
    "update",
  )


SETTINGS = (
  Setting("base, full-CLP, m = 2", "base", "v5e:2x4", "large"),
  Setting(
    "large, full-CLP, m = 3",
    "large",
    "v5e:4x8",
    "large",
    (*THREE, "--config.rewards.tldr.model=large"),
  ),
  Setting(
    "xl, attn-CLP, m = 3",
    "xl",
    "v5e:8x16",
    "xl",
    (
      *THREE,
      "--config.rewards.tldr.model=xl",
      "--config.steering=attention",
    ),
  ),
  Setting(
    "xxl, attn-CLP, m = 3",
    "xxl",
    "v5p:4x8x8",
    "xxl",
    (
      *THREE,
      "--config.rewards.tldr.model=xxl",
      "--config.steering=attention",
    ),
  ),
)


def arguments(setting: Setting, program: str) -> list[str]:
  """Of `clp`, for one program of a setting."""
  return [
    *("plan", "--json", "--only", program),
    *("--config", f"configs/xsum/{setting.size}.py"),
    *("--topology", setting.topology),
    f"--config.model.init={setting.size}",
    f"--config.rewards.nli.model={setting.judge}",
    *setting.options,
  ]


def plan(setting: Setting, program: str, output: pathlib.Path) -> dict:
  """Of one program, from its file or the compiler."""
  name = f"{setting.size}_{program.replace(' ', '_')}.json"
  path = output / name
  if not path.exists():
    command = [sys.executable, "-m", "clp_jax", *arguments(setting, program)]
    result = subprocess.run(
      command, check=True, stdout=subprocess.PIPE, text=True
    )
    path.write_text(result.stdout)
  return json.loads(path.read_text())


def row(setting: Setting, whole: dict) -> str:
  """A line of the table."""
  (program,) = whole["programs"]
  cells = [setting.name, setting.topology, program["name"]]
  cells.append(f"{program['total_bytes'] / 1e9:.1f}")
  if program["time"] is None:
    cells += ["no", *("",) * 7]
  else:
    time = program["time"]
    cells += [
      "yes" if program["fits"] else "no",
      f"{program['flops'] / 1e12:.2f}",
      *(
        f"{1e3 * time[kind]:.0f}"
        for kind in ("compute_bound", "hbm_bound", "interconnect", "step")
      ),
      f"{program['utilisation']:.1%}",
      program["bottleneck"],
    ]
  return "| " + " | ".join(cells) + " |"


def main() -> None:
  """Compiles what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--size", choices=[s.size for s in SETTINGS])
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  print(
    "| run | slice | program | GB a chip | fits | TFLOP a chip | compute ms | "
    "HBM ms | links ms | least ms | utilisation | bound by |"
  )
  print("|" + " --- |" * 12)
  for setting in SETTINGS:
    if options.size in (None, setting.size):
      for program in setting.programs:
        whole = plan(setting, program, options.output)
        print(row(setting, whole), flush=True)


if __name__ == "__main__":
  main()

"""The numbers of docs/RESULTS.md, as JSON that is small enough to keep.

`collect` takes them from the folders of experiments, and `page` draws the page
from them alone, so that figures can be drawn again without training.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from clp_jax.experiments import costs, page, plans, protocol, running
from clp_jax.models.presets import PRESETS

Json = dict[str, Any]
SIZES = ("base", "large", "xl")
NAMES = (*plans.EXPERIMENTS, protocol.SUPERVISED, "costs")
VOCABULARY = 256  # of the built-in world's T5, for counting


def measure_costs(workdir: str, command: str, repeats: int = 30) -> None:
  """Measures the cost table and writes WORKDIR/costs/costs.json."""
  tiny = dataclasses.replace(PRESETS["tiny"], vocab_size=VOCABULARY)
  times = costs.decode_times(
    tiny, prompts=64, source_length=56, target_length=18, repeats=repeats
  )
  content = {
    **running.origin(command),
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


def collect(workdir: str, folder: pathlib.Path) -> None:
  """Writes FOLDER/<experiment>.json of every experiment that has been run in
  WORKDIR; files of experiments that WORKDIR lacks stay."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in NAMES:
    directory = pathlib.Path(workdir) / name
    file = "costs.json" if name == "costs" else running.RECORD
    if not (directory / file).exists():
      continue
    content = json.loads((directory / file).read_text())
    if (directory / "comparison.json").exists():
      comparison = json.loads((directory / "comparison.json").read_text())
      content["comparison"] = comparison
    (folder / f"{name}.json").write_text(_compact(content))


def page_of(folder: pathlib.Path, commands: Mapping[str, str]) -> str:
  """The page's markdown, with its pictures drawn into FOLDER, of the numbers
  that `collect` has written there; commands are of `page.write`."""
  contents = {}
  for name in NAMES:
    if (folder / f"{name}.json").exists():
      contents[name] = json.loads((folder / f"{name}.json").read_text())
  cost = contents.pop("costs", None)
  return page.write(contents, cost, folder, commands)


def _compact(content: Json) -> str:
  """JSON with a line for each of the upper two levels."""
  lines = []
  for name, value in content.items():
    if isinstance(value, dict) and value:
      own = ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()
      )
      lines.append(f"{json.dumps(name)}: {{\n{own}\n }}")
    else:
      lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
  return "{\n " + ",\n ".join(lines) + "\n}\n"

"""What compiled programs cost on a slice: memory, a roofline, and advice.

The roofline of a program takes, for every instruction, the longer of its time
in the matrix units and its time at the HBM, and sums them; collectives take
what their links allow. A step lasts at least the longer of the two sums, if the
compiler hides one behind the other, and at most about both together.
Utilisation is FLOPs that the model can't do without over what the chips could
have done in the shorter time. Nothing here knows of latencies, of elementwise
work or of matrices too small to fill the units: expect a real step to be
slower.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import sharding
from clp_jax.plan import chips
from clp_jax.plan.programs import Compiled

TEMPORARY = "activations and temporaries"


def make_report(
  config: ml_collections.ConfigDict,
  slice_: chips.Slice,
  mesh: Mesh,
  compiled: Sequence[Compiled],
  whole: bool = True,
) -> dict[str, Any]:
  """The plan of a config's programs, as plain JSON values.

  Args:
    config: that they are of.
    slice_: that they are compiled for.
    mesh: of its chips.
    compiled: the programs.
    whole: whether they are all of the config's.

  Returns:
    {"topology", "chips", "mesh", "limit_bytes", "programs": [...], "step",
    "fits", "advice"}; bytes and seconds are a chip's. "step" is a training
    step, from sampling to update: {"seconds", "utilisation",
    "responses_per_second", a chip's share of them, "chip_hours", of
    train.steps}, all None where a program of it is not there, does not fit or
    was compiled for its memory alone.
  """
  dimensions = slice_.chip.dimensions
  places = np.asarray([chip.coords[:dimensions] for chip in mesh.devices.flat])
  programs = [_program(slice_, places, c) for c in compiled]
  fits = all(p["fits"] for p in programs)
  return {
    "topology": slice_.name,
    "chips": slice_.chips,
    "mesh": dict(mesh.shape),
    "limit_bytes": slice_.chip.memory,
    "fits": fits,
    "programs": programs,
    "step": _step(config, slice_, programs, whole),
    "advice": [] if fits else _advice(config, mesh, programs),
  }


def _step(
  config: ml_collections.ConfigDict,
  slice_: chips.Slice,
  programs: list[dict[str, Any]],
  whole: bool,
) -> dict[str, float | None]:
  calls = [p for p in programs if p["calls"]]
  names = ("seconds", "utilisation", "responses_per_second", "chip_hours")
  if not whole or any(p["time"] is None for p in calls):
    return dict.fromkeys(names)
  seconds = sum(p["calls"] * p["time"]["step"] for p in calls)
  useful = sum(p["calls"] * p["useful_flops"] for p in calls)
  chip_seconds = slice_.chips * seconds
  responses = config.rollout.prompts * config.rollout.samples
  values = (
    seconds,
    useful / (chip_seconds * slice_.chip.flops),
    responses / chip_seconds,
    config.train.steps * chip_seconds / 3600,
  )
  return dict(zip(names, values, strict=True))


def _program(
  slice_: chips.Slice, places: np.ndarray, compiled: Compiled
) -> dict[str, Any]:
  job, costs = compiled.job, compiled.costs
  memory = dict(job.held)
  result: dict[str, Any] = {
    "name": job.name,
    "calls": job.calls,
    "compile_seconds": round(compiled.seconds, 1),
    "useful_flops": job.useful,
    "bytes": memory,
    "time": None,
  }
  if compiled.needed is not None:
    return result | {
      "total_bytes": compiled.needed,
      "fits": False,
      "reason": "the compiler ran out of memory",
    }
  if job.caches:
    memory["caches"] = job.caches
  memory[TEMPORARY] = max(compiled.temporary - job.caches, 0)
  memory["results"] = compiled.results
  total = sum(memory.values())
  chip = slice_.chip
  result |= {"total_bytes": total, "fits": total <= chip.memory}
  if costs is None:
    return result
  matrix = hbm = 0.0
  for passes, moved, times in costs.busy:
    in_units, at_memory = passes / chip.flops, moved / chip.bandwidth
    if in_units >= at_memory:
      matrix += times * in_units
    else:
      hbm += times * at_memory
  kinds: dict[str, dict[str, float]] = defaultdict(
    lambda: {"count": 0.0, "bytes": 0.0, "seconds": 0.0}
  )
  for collective, times in costs.collectives.items():
    sums = kinds[collective.kind]
    sums["count"] += times
    sums["bytes"] += times * collective.bytes
    sums["seconds"] += times * chips.collective_seconds(
      slice_, places, collective.kind, collective.bytes, collective.group
    )
  links = sum(sums["seconds"] for sums in kinds.values())
  bound = {"compute": matrix, "HBM bandwidth": hbm}
  bottleneck = max(bound, key=lambda name: bound[name])
  if links > matrix + hbm:
    bottleneck = "interconnect"
  seconds = max(matrix + hbm, links)
  return result | {
    "flops": costs.flops,
    "hbm_bytes": costs.bytes,
    "collectives": dict(kinds),
    "loops_of_unknown_length": costs.unknown_loops,
    "time": {  # in the order of the table's columns
      "compute_bound": matrix,
      "hbm_bound": hbm,
      "interconnect": links,
      "step": seconds,
      "without_overlap": matrix + hbm + links,
    },
    "utilisation": job.useful / (slice_.chips * chip.flops * seconds),
    "bottleneck": bottleneck,
  }


def _advice(
  config: ml_collections.ConfigDict, mesh: Mesh, programs: list[dict[str, Any]]
) -> list[str]:
  """What to change so that it fits, the most effective first."""
  advice = []
  model, data = mesh.shape["model"], mesh.shape["data"]
  for program in programs:
    if program["fits"]:
      continue
    memory = program["bytes"]
    kinds = ("parameters", "reference", "optimizer")
    state = sum(memory.get(kind, 0) for kind in kinds)
    needed = program["total_bytes"] - state - memory.get("reward models", 0)
    if not config.mesh.fsdp and data > 1 and state > needed / 2:
      advice.append(
        "cut parameters over the data axis: --config.mesh.fsdp=True"
      )
    if memory.get("optimizer", 0) > memory.get("parameters", 0):
      advice.append("factored moments: --config.optimizer.name=adafactor")
    name = program["name"]
    if name.startswith("reward "):
      reward = f"rewards.{name.removeprefix('reward ')}"
      batch = config.rewards[name.removeprefix("reward ")]["batch"]
      advice.append(
        f"score fewer rows at once: --config.{reward}.batch={batch // 2}"
      )
    elif config.model.remat != "full" and name in ("sft", "update"):
      advice.append("keep fewer activations: --config.model.remat=full")
    if name == "update":
      shards = sharding.row_shards(mesh)
      parts = 2 * config.train.microbatches
      groups = config.rollout.weightings
      if config.rollout.prompts % (max(groups, shards) * parts) == 0:
        advice.append(f"more microbatches: --config.train.microbatches={parts}")
    if name == "rollout":
      half = config.rollout.prompts // 2
      advice.append(f"fewer prompts a step: --config.rollout.prompts={half}")
    if name == "sft":
      half = config.sft.batch // 2
      advice.append(f"a smaller batch: --config.sft.batch={half}")
    if data % 2 == 0:
      axes = f"data={data // 2},model={2 * model}"
      advice.append(f"share matrices among more chips: --mesh {axes}")
  return list(dict.fromkeys([*advice, "a slice of twice as many chips"]))


def to_text(report: dict[str, Any]) -> str:
  """What `make_report` found, as tables."""
  mesh = ", ".join(f"{k}={v}" for k, v in report["mesh"].items())
  parts = [
    f"{report['topology']}: {report['chips']} chips, mesh {mesh}",
    "",
    f"GB a chip, of {report['limit_bytes'] / 1e9:.0f}",
    _memory_table(report["programs"]),
  ]
  timed = [p for p in report["programs"] if p["time"] is not None]
  if timed:
    parts += ["", "A call, a chip", _time_table(timed, report["step"])]
    parts += ["", "Collectives of a call, a chip", _collective_table(timed)]
  step = report["step"]
  if step["seconds"] is not None:
    parts += [
      "",
      f"A training step takes at least {1e3 * step['seconds']:.1f} ms, at "
      f"{step['utilisation']:.1%} of the peak FLOP/s: "
      f"{step['responses_per_second']:.2f} responses a second and chip, "
      f"{step['chip_hours']:,.1f} chip-hours for all steps.",
    ]
  if report["fits"]:
    parts.append("It fits.")
  else:
    parts.append("It does not fit. What would help:")
    parts += [f"  {line}" for line in report["advice"]]
  return "\n".join(parts)


def _memory_table(programs: list[dict[str, Any]]) -> str:
  kinds = dict.fromkeys(kind for p in programs for kind in p["bytes"])
  rows = [["program", *kinds, "total", "fits"]]
  for program in programs:
    sizes = [program["bytes"].get(kind) for kind in kinds]
    rows.append(
      [
        program["name"],
        *("" if size is None else _gb(size) for size in sizes),
        _gb(program["total_bytes"]),
        "yes" if program["fits"] else "no",
      ]
    )
  return _table(rows)


def _time_table(
  programs: list[dict[str, Any]], step: dict[str, float | None]
) -> str:
  rows = [
    [
      *("program", "calls a step", "TFLOP", "useful", "HBM GB"),
      *("compute ms", "HBM ms", "links ms", "least ms", "at most"),
      *("utilisation", "bound by"),
    ]
  ]
  if step["seconds"] is not None:
    programs = [*programs, _of_step(programs, step)]
  for program in programs:
    rows.append(
      [
        program["name"],
        str(program["calls"]),
        f"{program['flops'] / 1e12:.2f}",
        f"{program['useful_flops'] / 1e12:.0f} in all",
        _gb(program["hbm_bytes"]),
        *(f"{1e3 * seconds:.1f}" for seconds in program["time"].values()),
        f"{program['utilisation']:.1%}",
        program["bottleneck"],
      ]
    )
  return _table(rows)


def _of_step(
  programs: list[dict[str, Any]], step: dict[str, float | None]
) -> dict[str, Any]:
  """The sums over all calls of a training step, as of a program."""

  def total(values: list[dict[str, Any]], name: str) -> float:
    pairs = zip(programs, values, strict=True)
    return sum(p["calls"] * own[name] for p, own in pairs)

  times = [p["time"] for p in programs]
  sums = {n: total(programs, n) for n in ("flops", "useful_flops", "hbm_bytes")}
  return sums | {
    "name": "a step",
    "calls": "",
    "time": {name: total(times, name) for name in times[0]},
    "utilisation": step["utilisation"],
    "bottleneck": "",
  }


def _collective_table(programs: list[dict[str, Any]]) -> str:
  rows = [["program", "kind", "executions", "GB", "ms"]]
  for program in programs:
    for kind, sums in sorted(program["collectives"].items()):
      count, milliseconds = f"{sums['count']:.0f}", 1e3 * sums["seconds"]
      cells = (count, _gb(sums["bytes"]), f"{milliseconds:.1f}")
      rows.append([program["name"], kind, *cells])
  return _table(rows)


def _gb(size: float) -> str:
  return f"{size / 1e9:.2f}"


def _table(rows: list[list[str]]) -> str:
  """Columns as wide as they need, the first to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *others in rows:
    cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)

"""TPU chips in published figures, and slices of them that exist nowhere.

Figures are those of Google Cloud's documentation of each generation
(cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "System architecture", read
in 2026): peak bfloat16 FLOP/s, HBM capacity and bandwidth, and the bandwidth of
the inter-chip interconnect, given there for a chip in both directions and here
for one port and one direction. v4 and v5p are a 3D torus of 6 ports a chip, v5e
and v6e a 2D one of 4. A dimension of a slice closes to a ring when it is a
multiple of 4 chips (v4, v5p) or all of a pod's 16 (v5e, v6e).
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clp_jax.errors import ConfigError


class Chip(NamedTuple):
  """What a generation of TPU can do."""

  flops: float  # bfloat16, a second
  memory: float  # bytes of HBM
  bandwidth: float  # of HBM, bytes a second
  port: float  # of the interconnect, bytes a second in one direction
  dimensions: int  # of the torus
  ring: int  # chips that a dimension must be a multiple of to close
  options: dict[str, Any]  # of the topology: one device a chip


CHIPS = {
  # 275 TFLOP/s, 32 GB at 1228 GB/s, 2400 Gb/s.
  "v4": Chip(
    275e12, 32e9, 1228e9, 50e9, 3, 4, {"chip_config_name": "megacore"}
  ),
  # 197 TFLOP/s, 16 GB at 819 GB/s, 1600 Gb/s (400 GB/s both ways).
  "v5e": Chip(197e12, 16e9, 819e9, 50e9, 2, 16, {}),
  # 459 TFLOP/s, 95 GB at 2765 GB/s, 4800 Gb/s.
  "v5p": Chip(459e12, 95e9, 2765e9, 100e9, 3, 4, {}),
  # 918 TFLOP/s, 32 GB at 1638 GB/s, 800 GB/s both ways.
  "v6e": Chip(918e12, 32e9, 1638e9, 100e9, 2, 16, {}),
}


class Slice(NamedTuple):
  """A slice of a generation."""

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    return math.prod(self.shape)


def find_slice(name: str) -> Slice:
  """The slice that a name such as "v5e:8x16" or "v5p:4x4x8" means.

  Raises:
    ConfigError: there is none; says what a name looks like.
  """
  generation, _, shape = name.partition(":")
  sizes = tuple(int(n) for n in re.findall(r"\d+", shape))
  examples = ", ".join(
    f"{chip}:{'x'.join(['4'] * facts.dimensions)}"
    for chip, facts in CHIPS.items()
  )
  if (
    generation not in CHIPS
    or not re.fullmatch(r"\d+(x\d+)*", shape)
    or len(sizes) != CHIPS[generation].dimensions
    or 0 in sizes
  ):
    raise ConfigError(
      f"unknown topology {name!r}; expected a generation and the chips along "
      f"each dimension, such as {examples}."
    )
  return Slice(name, CHIPS[generation], sizes)


def devices(slice_: Slice) -> Sequence[jax.Device]:
  """Devices to compile for, one a chip; no TPU is needed, but libtpu is.

  Raises:
    ConfigError: libtpu is absent, or knows no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "compiling for a TPU needs libtpu; pip install 'clp_jax[plan]'."
    )
  # Read when libtpu is loaded. It must not ask the cloud's metadata server for
  # a TPU, nor refuse when another process has loaded it, nor say that this
  # machine is none.
  for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  # A host holds 2 x 2 chips, or what there is of it.
  host = [min(2, n) for n in (*slice_.shape, 1)[:2]] + [1]
  try:
    found = topologies.get_topology_desc(
      platform="tpu",
      topology_name=slice_.name,
      chips_per_host_bounds=host,
      **slice_.chip.options,
    ).devices
  except Exception as error:  # jaxlib's errors have no class of their own
    raise ConfigError(
      f"topology {slice_.name}: {str(error).splitlines()[0]}"
    ) from error
  if len(found) != slice_.chips:
    raise ConfigError(
      f"topology {slice_.name} has {len(found)} devices in libtpu, not one for "
      f"each of its {slice_.chips} chips."
    )
  return found


def collective_seconds(
  slice_: Slice,
  places: np.ndarray,
  kind: str,
  bytes_: int,
  group: Sequence[int],
) -> float:
  """How long a collective takes at least, by the bandwidth of its links.

  Args:
    slice_: where it runs.
    places: [chips, dimensions] int, the chip of each position in the mesh.
    kind: of `hlo.COLLECTIVES`.
    bytes_: a chip's share, the larger of its input and its output.
    group: positions in the mesh of those who take part; empty for all.

  Returns:
    Seconds. A group uses the links of every dimension along which its chips
    differ; a dimension that does not close to a ring has half the bandwidth.
  """
  members = places[list(group)] if len(group) else places
  count = len(members)
  if count < 2 or not bytes_:
    return 0.0
  extents = [
    (len(np.unique(along)), slice_.shape[i])
    for i, along in enumerate(members.T)
  ]
  port = slice_.chip.port
  # Bytes a second that a chip receives along each dimension it uses.
  speeds = {
    i: 2 * port if size % slice_.chip.ring == 0 else port
    for i, (extent, size) in enumerate(extents)
    if extent > 1
  }
  if kind.endswith("all-to-all"):
    # Along a ring of n chips a byte passes n / 4 links on average, so that one
    # phase a dimension takes bytes * n / (8 ports), twice that on a line.
    return sum(bytes_ * extents[i][0] / (4 * s) for i, s in speeds.items())
  total = sum(speeds.values())
  if kind == "collective-permute":
    return bytes_ / port
  once = bytes_ * (count - 1) / count / total
  return 2 * once if kind == "all-reduce" else once

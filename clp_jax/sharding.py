"""The device mesh, what lies where on it, and rows between hosts and devices.

Parameters carry t5x's logical axis names; one table says which mesh axis each
one is cut along. Arrays of rows (prompts, samples) are cut along 'data'. The
same code runs on one CPU device, on eight virtual ones and in several
processes: what differs is the mesh.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any

# Logical axis -> mesh axis, as t5x's standard rules. 'embed' is cut over
# 'data' as well when parameters are fully sharded (fsdp).
RULES = {
  "vocab": "model",
  "mlp": "model",
  "heads": "model",
  "joined_kv": "model",
  "kv": None,
  "embed": None,
  "relpos_buckets": None,
  "layers": None,
  "objective": None,
  "rank": None,
  "soft_tokens": None,
  "value": None,
}


def make_mesh(
  data: int | None = None, model: int = 1, devices: list | None = None
) -> Mesh:
  """A ('data', 'model') mesh.

  Args:
    data: size of the data axis; None takes all devices that remain.
    model: size of the model axis.
    devices: the devices in order; None takes jax.devices().

  Raises:
    ValueError: when data * model is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if data is None and len(devices) % model == 0:
    data = len(devices) // model
  if data is None or data * model != len(devices):
    raise ValueError(
      f"mesh data={data} x model={model} does not fit {len(devices)} "
      "devices; choose factors whose product is the number of devices."
    )
  return Mesh(
    np.asarray(devices).reshape(data, model),
    ("data", "model"),
    axis_types=(AxisType.Auto,) * 2,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 (prompts or samples) is cut over the data axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def param_shardings(
  mesh: Mesh, logical_axes: Tree, abstract: Tree, *, fsdp: bool = False
) -> Tree:
  """Shardings of a parameter tree from its logical axes.

  Args:
    mesh: the mesh.
    logical_axes: tree of tuples of logical names, one a dimension.
    abstract: the same tree of arrays or ShapeDtypeStructs. A leaf with one
      dimension more than it has names is stacked over objectives.
    fsdp: also cut 'embed' over the data axis.

  Returns:
    A tree of NamedShardings. A dimension that its mesh axis does not divide
    stays whole.

  Raises:
    ValueError: for a leaf without axes or with an unknown logical name.
  """
  rules = RULES | ({"embed": "data"} if fsdp else {})

  def leaf(path, names, array):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if names is not None and len(array.shape) == len(names) + 1:
      names = ("objective", *names)
    if names is None or len(names) != len(array.shape):
      raise ValueError(
        f"parameter {name} of shape {array.shape} has logical axes {names}; "
        "every dimension needs one."
      )
    if unknown := [n for n in names if n not in rules]:
      raise ValueError(
        f"parameter {name} has unknown logical axes {unknown}; add them to "
        "RULES in sharding.py."
      )
    axes = [rules[n] for n in names]
    fits = [
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, array.shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))

  return jax.tree_util.tree_map_with_path(
    leaf,
    logical_axes,
    abstract,
    is_leaf=lambda x: x is None or isinstance(x, tuple),
  )


def put(tree: Tree, shardings: Tree) -> Tree:
  """Host arrays, the same on every process, to global device arrays."""

  def leaf(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(leaf, tree, shardings)


def process_rows(mesh: Mesh, num_rows: int) -> tuple[int, int]:
  """Which rows this process holds: (start, stop) of [0, num_rows)."""
  indices = row_sharding(mesh).addressable_devices_indices_map((num_rows,))
  ranges = sorted(
    {
      index[0].indices(num_rows)[:2]
      for index in indices.values()
      if index is not None
    }
  )
  start, stop = ranges[0][0], ranges[-1][1]
  if sum(b - a for a, b in ranges) != stop - start:
    raise ValueError(
      "this process's rows are not contiguous on the mesh; order the devices "
      "by process along the data axis."
    )
  return start, stop


def to_devices(mesh: Mesh, rows: np.ndarray, num_rows: int) -> jax.Array:
  """This process's rows [r, ...] to the global array [num_rows, ...]."""
  rows = np.asarray(rows)
  start, _ = process_rows(mesh, num_rows)

  def shard(index):
    first, last, _ = index[0].indices(num_rows)
    return rows[first - start : last - start]

  return jax.make_array_from_callback(
    (num_rows, *rows.shape[1:]), row_sharding(mesh), shard
  )


def to_host(rows: jax.Array) -> np.ndarray:
  """This process's rows of a global array whose axis 0 is cut over 'data'."""
  if rows.is_fully_addressable:
    return np.asarray(rows)
  shards = {
    shard.index[0].indices(rows.shape[0])[0]: shard
    for shard in rows.addressable_shards
  }
  return np.concatenate([np.asarray(shards[k].data) for k in sorted(shards)])

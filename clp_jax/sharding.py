"""The device mesh, what lies where on it, and rows between hosts and devices.

1. A mesh has the axes 'replica', 'data' and 'model'. The same code runs on one
   CPU device, on eight virtual ones and in several processes: what differs is
   the mesh.
2. Parameters and activations carry t5x's logical axis names; one table, RULES,
   says which mesh axes each one is cut along. Fully sharded parameters (fsdp)
   are cut along 'data' as well.
3. Rows (prompts, samples) are cut over replicas and data. A step with G
   weightings runs on a mesh whose data axis is folded in two, 'group' and
   'data' (`fold_groups`): the policies of the weightings are cut over 'group',
   so that a shard holds about one of them and its rows are answered by it.
4. Where a function is traced inside `on_mesh`, `constrain` pins its
   intermediate arrays; elsewhere it does nothing.
"""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from clp_jax.low_rank import LowRank

Tree = Any

AXES = ("replica", "data", "model")

# Of a folded mesh: the weightings of a step.
GROUP = "group"

# Logical axis -> mesh axes, as t5x's standard rules. Those that a mesh lacks
# are left out.
RULES: dict[str, tuple[str, ...]] = {
  # Of activations.
  "weighting": (GROUP,),
  "batch": ("replica", GROUP, "data"),
  "group_batch": ("replica", "data"),  # rows of one weighting
  "length": (),
  # Of parameters and activations.
  "vocab": ("model",),
  "mlp": ("model",),
  "heads": ("model",),
  "kv_heads": ("model",),
  "joined_kv": ("model",),
  "kv": (),
  "embed": (),
  "relpos_buckets": (),
  "layers": (),
  "objective": (),
  "rank": (),
  "soft_tokens": (),
  "value": (),
  "head": (),  # of a preference model
}
# What fsdp changes, in parameters and optimizer state at rest.
FSDP_RULES: dict[str, tuple[str, ...]] = {"embed": (GROUP, "data")}


def make_mesh(
  data: int | None = None,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
  replica: int = 1,
) -> Mesh:
  """A ('replica', 'data', 'model') mesh.

  Devices are taken by slice, then process, then number: a replica lies within
  a slice, the model axis within a host as far as it can, and the rows of a
  process side by side.

  Args:
    data: size of the data axis; None takes all devices that remain.
    model: size of the model axis.
    devices: None takes jax.devices().
    replica: size of the replica axis, over which no parameter is ever cut.

  Raises:
    ValueError: when the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if data is None and len(devices) % (replica * model) == 0:
    data = len(devices) // (replica * model)
  if data is None or replica * data * model != len(devices):
    sizes = f"data={data} x model={model}"
    if replica != 1:
      sizes = f"replica={replica} x {sizes}"
    raise ValueError(
      f"mesh {sizes} does not fit {len(devices)} devices; choose factors whose "
      "product is the number of devices."
    )

  def place(device):
    return getattr(device, "slice_index", 0), device.process_index, device.id

  return Mesh(
    np.asarray(sorted(devices, key=place)).reshape(replica, data, model),
    AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that rows are cut over: all but 'model'."""
  return tuple(axis for axis in mesh.axis_names if axis != "model")


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts rows are cut; their number must be a multiple."""
  return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def fold_groups(mesh: Mesh, num_weightings: int) -> Mesh:
  """Cuts the data axis of a mesh of AXES in two: 'group', the greatest divisor
  of G = num_weightings that it has, then what remains of 'data'.

  Returns:
    The same devices, on which rows lie where they lay on `mesh`.
  """
  replica, data, model = mesh.devices.shape
  groups = math.gcd(num_weightings, data)
  return Mesh(
    mesh.devices.reshape(replica, groups, data // groups, model),
    ("replica", GROUP, "data", "model"),
    axis_types=(AxisType.Auto,) * 4,
  )


class _Placement(NamedTuple):
  """What `constrain` goes by while a function is traced."""

  mesh: Mesh
  fsdp: bool
  in_group: bool = False  # the rows are those of one weighting


_placement: contextvars.ContextVar[_Placement | None] = contextvars.ContextVar(
  "placement", default=None
)


def on_mesh(mesh: Mesh, function: Callable, *, fsdp: bool = False) -> Callable:
  """The function, traced so that its intermediate arrays are pinned to a mesh.

  Args:
    mesh: that it will run on.
    function: to be jitted.
    fsdp: whether parameters come cut over the data axis.
  """
  return _traced_at(_Placement(mesh, fsdp), function)


def _traced_at(placement: _Placement, function: Callable) -> Callable:
  @functools.wraps(function)
  def traced(*args, **kwargs):
    token = _placement.set(placement)
    try:
      return function(*args, **kwargs)
    finally:
      _placement.reset(token)

  return traced


def map_groups(function: Callable, in_axes: Any) -> Callable:
  """jax.vmap over the weightings of a step, each at its group of shards: the
  "batch" of the function is one weighting's rows."""
  placement = _placement.get()
  if placement is None or GROUP not in placement.mesh.axis_names:
    return jax.vmap(function, in_axes=in_axes)
  return jax.vmap(
    _traced_at(placement._replace(in_group=True), function),
    in_axes=in_axes,
    spmd_axis_name=GROUP,
  )


def constrain(x: jax.Array, *names: str) -> jax.Array:
  """Pins an array inside `on_mesh`; elsewhere nothing happens.

  Args:
    x: any array.
    names: a logical axis for each of its dimensions. What a mesh axis does not
      divide stays whole along it.
  """
  placement = _placement.get()
  if placement is None:
    return x
  if placement.in_group:
    names = tuple("group_batch" if n == "batch" else n for n in names)
  spec = partition_spec(placement.mesh, names, x.shape, RULES)
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(placement.mesh, spec)
  )


def spread(policies: Tree, logical_axes: Tree, dtypes: Tree, *, whole: bool):
  """Sends the policies of a step to the shards whose rows they answer.

  They are mixed where the parameter sets lie, cast, and sent: with fsdp each
  device then has mixed its part of every policy, and an all-to-all brings
  together what belongs together, in the dtype of the computation.

  Args:
    policies: parameters of T5s, some leaves [G, ...].
    logical_axes: the T5's own axes, for leaves without [G].
    dtypes: that the leaves are cast to.
    whole: also gather what is cut over the data axis, for a loop that would
      gather it in every iteration; otherwise a layer is gathered at its use.

  Returns:
    The policies in those dtypes.
  """
  placement = _placement.get()

  def leaf(names, policy, dtype):
    if placement is None:
      return policy.astype(dtype)
    if isinstance(policy, LowRank):
      # The base is shared, and the factors and diagonals are small: whole.
      kernel = leaf(names, policy.kernel, dtype)
      return dataclasses.replace(policy.astype(dtype), kernel=kernel)
    mesh, fsdp = placement.mesh, placement.fsdp
    grouped = policy.ndim == len(names) + 1
    at_rest = RULES | (FSDP_RULES if fsdp else {})
    if not grouped:
      policy = policy.astype(dtype)
      return constrain(policy, *names) if whole else policy

    def pin(x, rules):
      spec = partition_spec(mesh, ("weighting", *names), x.shape, rules)
      return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    if fsdp:
      # Twice, or the compiler might cast after sending.
      policy = pin(policy, at_rest | {"weighting": ()})
      policy = pin(policy.astype(dtype), at_rest | {"weighting": ()})
      # A step of its own before what is cut is gathered: asked for both at
      # once, the compiler sends every policy everywhere.
      policy = pin(policy, RULES | {"embed": ("data",)})
    else:
      policy = policy.astype(dtype)
    return pin(policy, RULES) if whole or not fsdp else policy

  return jax.tree.map(
    leaf, logical_axes, policies, dtypes, is_leaf=lambda x: isinstance(x, tuple)
  )


def partition_spec(
  mesh: Mesh,
  names: Sequence[str],
  shape: Sequence[int],
  rules: Mapping[str, tuple[str, ...]],
) -> PartitionSpec:
  """The mesh axes of each dimension, those that fit it.

  Args:
    mesh: the mesh.
    names: a logical axis for each dimension.
    shape: of the array.
    rules: mesh axes of each logical axis.
  """
  entries: list[Any] = []
  for name, size in zip(names, shape, strict=True):
    axes = tuple(axis for axis in rules[name] if axis in mesh.axis_names)
    cut = math.prod(mesh.shape[axis] for axis in axes)
    if not axes or size % cut:
      entries.append(None)
    else:
      entries.append(axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*entries)


def moment_sharding(
  moment: Sequence[int], param: Sequence[int], at: NamedSharding
) -> NamedSharding:
  """Where a moment of an optimizer lies: like its parameter.

  Args:
    moment: its shape: the parameter's, or that with one dimension reduced away
      (Adafactor's factored ones), or a placeholder's.
    param: the parameter's shape.
    at: the parameter's sharding.
  """
  if tuple(moment) == tuple(param):
    return at
  entries = (*at.spec, *(None,) * (len(param) - len(at.spec)))
  for i in reversed(range(len(param))):
    if tuple(moment) == (*param[:i], *param[i + 1 :]):
      kept = (*entries[:i], *entries[i + 1 :])
      return NamedSharding(at.mesh, PartitionSpec(*kept))
  return NamedSharding(at.mesh, PartitionSpec())


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 (prompts or samples) is cut over replicas and data."""
  return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


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
  rules = RULES | (FSDP_RULES if fsdp else {})

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
    return NamedSharding(mesh, partition_spec(mesh, names, array.shape, rules))

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


def process_share(mesh: Mesh, num_rows: int) -> tuple[int, int]:
  """Which of how many equal parts of the rows this process holds.

  Processes whose devices share a place on the data axis, because the model axis
  spans them, hold the same part.
  """
  start, stop = process_rows(mesh, num_rows)
  return start // (stop - start), num_rows // (stop - start)


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

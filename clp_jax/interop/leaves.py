"""A model's parameters, leaf by leaf.

A format (huggingface.py, t5x.py, orbax.py) says what a checkpoint holds: the
config and, for each path of the tree, a `Leaf` that can read a part of itself.
`assemble` makes the tree of them, on the host or straight on the devices, with
no more than one leaf in memory that is not part of the result. `views` is the
way back: the leaves of a tree, one after the other, as a format writes them.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from clp_jax.models import families
from clp_jax.models.families import Config

Params = Any
Index = tuple[slice, ...]
Shardings = Any  # a tree of jax.sharding.Sharding, or Config -> such a tree


class Leaf(NamedTuple):
  """An array that is read, or copied to the host, when it is asked for."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]  # a part of it

  @classmethod
  def of(cls, array: Any, layer: int | None = None) -> "Leaf":
    """Of an array of NumPy or JAX; or of one layer of a stack of them."""

    def read(index: Index) -> np.ndarray:
      return np.asarray(array if layer is None else array[layer])[index]

    shape = array.shape[layer is not None :]
    return cls(shape, np.dtype(array.dtype), read)

  def all(self) -> np.ndarray:
    """All of it."""
    return self.read((slice(None),) * len(self.shape))

  def transposed(self) -> "Leaf":
    """A matrix the other way round."""
    return Leaf(
      self.shape[::-1], self.dtype, lambda index: self.read(index[::-1]).T
    )

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return int(np.prod(self.shape)) * self.dtype.itemsize


def flatten(tree: Any) -> dict[str, Any]:
  """A nested dict as {"a/b/c": leaf}."""
  return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Any:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the tree of a config, `layers_0`, ...."""
  return _shapes_of(dataclasses.replace(config, scan_layers=False))


@functools.lru_cache(8)  # the network is traced for it
def _shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
  return shapes(flatten(families.build(config).abstract()))


def check(
  where: str,
  expected: Mapping[str, tuple[int, ...]],
  tensors: Mapping[str, Any],
) -> None:
  """Checks the names and shapes of a checkpoint's tensors.

  Raises:
    ValueError: names what is missing, superfluous, or of the wrong shape.
  """
  found, problems = shapes(tensors), []
  if missing := sorted(expected.keys() - found.keys()):
    problems.append(f"it lacks {_some(missing)}")
  if extra := sorted(found.keys() - expected.keys()):
    problems.append(f"it holds {_some(extra)} as well")
  problems += [
    f"{name} has shape {tuple(found[name])}, expected {tuple(shape)}"
    for name, shape in expected.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ][:3]
  if problems:
    raise ValueError(
      f"{where} is not the model that its config describes: "
      f"{'; '.join(problems)}."
    )


def _some(names: Sequence[str]) -> str:
  more = f" and {len(names) - 4} more" if len(names) > 4 else ""
  return ", ".join(names[:4]) + more


def assemble(
  config: Config,
  leaves: Mapping[str, Leaf],
  *,
  shardings: Shardings | None,
  dtype: Any,
  scan_layers: bool,
) -> tuple[Config, Params]:
  """The parameter tree of a checkpoint.

  Args:
    config: of the checkpoint.
    leaves: by path of the tree, checked.
    shardings: where the arrays go; None is the host.
    dtype: to convert to; None keeps what is stored.
    scan_layers: stack the layers' leaves.

  Returns:
    (config, params): params of NumPy arrays, or of jax.Arrays on `shardings`.
  """
  config = dataclasses.replace(config, scan_layers=scan_layers)
  if callable(shardings):
    shardings = shardings(config)
  return config, read_tree(_shapes_of(config), leaves, shardings, dtype)


def read_tree(
  paths: Collection[str],
  leaves: Mapping[str, Leaf],
  shardings: Any,
  dtype: Any,
) -> Params:
  """A tree of leaves, read one after the other.

  Args:
    paths: of the tree; "layers" among them stands for all "layers_<i>".
    leaves: by path, each layer's its own.
    shardings: a tree of jax.sharding.Sharding, or None for the host.
    dtype: to convert to; None keeps what is stored.

  Raises:
    ValueError: when shardings are a tree of other paths.
  """
  at = None if shardings is None else flatten(shardings)
  if at is not None and at.keys() != set(paths):
    raise ValueError(
      "shardings must be a tree like the parameters': expected "
      f"{_some(sorted(set(paths) - at.keys()))}, got "
      f"{_some(sorted(at.keys() - set(paths)))}."
    )
  found = {
    path: _layers_of(leaves, path) if "/layers/" in path else leaves[path]
    for path in paths
  }
  params = {}
  # Large ones first: what reading one takes on top is gone when the sum peaks.
  for path in sorted(paths, key=lambda path: -found[path].nbytes):
    leaf = found[path]
    array_dtype = leaf.dtype if dtype is None else np.dtype(dtype)
    if at is None:
      params[path] = leaf.all().astype(array_dtype, copy=False)
    else:
      params[path] = _place(leaf, at[path], array_dtype)
  return unflatten({path: params[path] for path in paths})


def _layers_of(leaves: Mapping[str, Leaf], path: str) -> Leaf:
  """The leaves of all layers as one with a leading axis L."""
  stack, rest = path.split("/layers/")
  layers: list[Leaf] = []
  while (name := f"{stack}/layers_{len(layers)}/{rest}") in leaves:
    layers.append(leaves[name])

  def read(index: Index) -> np.ndarray:
    chosen = layers[index[0]]
    parts = (layer.read(index[1:]) for layer in chosen)
    first = next(parts)
    stacked = np.empty((len(chosen), *first.shape), first.dtype)
    stacked[0] = first
    for i, part in enumerate(parts, 1):
      stacked[i] = part
    return stacked

  return Leaf((len(layers), *layers[0].shape), layers[0].dtype, read)


def _place(leaf: Leaf, sharding: jax.sharding.Sharding, dtype: Any):
  """Reads, once, the box that holds the parts of this process's devices."""
  indices = sharding.addressable_devices_indices_map(leaf.shape).values()
  bounds = np.asarray([_bounds(index, leaf.shape) for index in indices])
  first, stop = bounds[..., 0].min(0), bounds[..., 1].max(0)
  box = tuple(slice(int(a), int(b)) for a, b in zip(first, stop, strict=True))
  held = leaf.read(box).astype(dtype, copy=False)

  def part(index: Any) -> np.ndarray:
    within = zip(_bounds(index, leaf.shape), first, strict=True)
    return held[tuple(slice(a - start, b - start) for (a, b), start in within)]

  array = jax.make_array_from_callback(leaf.shape, sharding, part)
  return jax.block_until_ready(array)


def _bounds(index: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
  """(first, stop) of each axis."""
  return [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]


def views(config: Config, params: Params) -> dict[str, Leaf]:
  """The leaves of a tree by path, stacked layers taken apart.

  Raises:
    ValueError: when the tree is not one of `config`.
  """
  found = {}
  for path, leaf in flatten(params).items():
    if "/layers/" in path:
      stack, rest = path.split("/layers/")
      for i in range(leaf.shape[0]):
        found[f"{stack}/layers_{i}/{rest}"] = Leaf.of(leaf, i)
    else:
      found[path] = Leaf.of(leaf)
  check("params", expected_shapes(config), found)
  return found


def shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """{path: shape}."""
  return {path: leaf.shape for path, leaf in leaves.items()}


def same(a: Leaf, b: Leaf, rows: int = 4096) -> bool:
  """Whether two stored arrays are equal bit for bit, read in blocks of rows."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  blocks: Iterable[int] = range(0, a.shape[0], rows)
  rest = (slice(None),) * (len(a.shape) - 1)
  return all(
    a.read((slice(i, i + rows), *rest)).tobytes()
    == b.read((slice(i, i + rows), *rest)).tobytes()
    for i in blocks
  )

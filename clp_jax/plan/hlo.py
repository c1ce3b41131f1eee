"""FLOPs, bytes and collectives of a compiled program, loops with their trips.

XLA's own cost analysis counts the body of a loop once. This module reads the
text of the optimised program and multiplies:

1. `parse` cuts the text into computations and instructions.
2. `count` walks from the entry. The body of a loop counts as often as the loop
   runs: XLA's known trip count, or else the largest constant that the loop's
   condition compares with. (A decoding loop thus counts at its length limit,
   though it may end before.) A loop without either counts once.
3. FLOPs are those of matrix products, which TPU programs call convolutions.
4. Bytes are what an instruction reads from and writes to main memory: the
   operands and results of a fusion, of which a slice reads only what it takes
   and an update in place writes only what it changes. What the compiler put
   into faster memory, "S(1)" in a layout, is free.
5. A collective counts once an execution, though a fused one stands in several
   fusions.

All figures are those of one device.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# These move no data of their own.
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all partition-id "
  "replica-id opt-barrier copy-done domain add-dependency "
  "rng-get-and-update-state async-update async-done send-done recv-done".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_CALLEE = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(
  r"^(ENTRY )?%?(?!HloModule)([^\s(]+)[^\n]*\{\n(.*?)^\}",
  re.DOTALL | re.MULTILINE,
)


@functools.cache
def _bits(dtype: str) -> int:
  """Of an element: 16 for "bf16", and a byte for "pred"."""
  named = re.search(r"\d+", dtype)
  return int(named[0]) if named else 8


class Leaf(NamedTuple):
  """One array of a type."""

  dtype: str
  shape: tuple[int, ...]
  main_memory: bool

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  leaves: tuple[Leaf, ...]
  operands: tuple[str, ...]
  argument: str  # what stands in the parentheses
  attributes: str
  root: bool

  def callee(self, attribute: str) -> str | None:
    """The computation that an attribute such as "calls" names."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return found and found[1]

  @property
  def bytes(self) -> int:
    """Of its result in main memory."""
    return sum(leaf.bytes for leaf in self.leaves if leaf.main_memory)


class Computation(NamedTuple):
  """A named list of instructions."""

  instructions: dict[str, Instruction]
  root: Instruction


class Program(NamedTuple):
  """A parsed HLO module."""

  computations: dict[str, Computation]
  entry: str

  def inside(self, instruction: Instruction) -> Computation | None:
    """What an instruction calls: of a fusion, what is fused."""
    return self.computations.get(instruction.callee("calls") or "")


class Collective(NamedTuple):
  """A kind of communication among devices."""

  kind: str
  bytes: int  # a device's share: the larger of its operands and its results
  group: tuple[int, ...]  # the first group: positions in the mesh, flattened


@dataclasses.dataclass
class Costs:
  """Of one device, loops multiplied.

  Attributes:
    flops: of matrix products.
    passes: the same, each as often as its precision makes the matrix unit run
      for it: 6 times for float32 at "highest", 3 at "high".
    bytes: to and from main memory.
    busy: sequence of (passes, bytes, executions) an instruction, from which a
      roofline is drawn.
    collectives: executions of each.
    unknown_loops: loops that were counted once for want of a trip count.
  """

  flops: float = 0.0
  passes: float = 0.0
  bytes: float = 0.0
  busy: list[tuple[float, float, float]] = dataclasses.field(
    default_factory=list
  )
  collectives: dict[Collective, float] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(float)
  )
  unknown_loops: int = 0


def parse(text: str) -> Program:
  """Reads the text of an optimised HLO module, `jax.stages.Compiled.as_text`.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry = None
  for is_entry, name, lines in _COMPUTATION.findall(text):
    found = list(filter(None, map(_instruction, lines.splitlines())))
    if found:
      root = next((i for i in found if i.root), found[-1])
      computations[name] = Computation({i.name: i for i in found}, root)
    if is_entry:
      entry = name
  if entry is None:
    raise ValueError("the text holds no HLO module with an ENTRY computation.")
  return Program(computations, entry)


def count(program: Program) -> Costs:
  """Walks a program from its entry; see the module."""
  costs = Costs()
  _walk(program, program.entry, 1.0, costs)
  return costs


def _instruction(line: str) -> Instruction | None:
  left, equals, right = line.partition(" = ")
  if not equals:
    return None
  words = left.split()
  type_end = _closing(right, 0) if right.startswith("(") else right.find(" ")
  type_text, rest = right[:type_end], right[type_end:].lstrip()
  opcode, parenthesis, _ = rest.partition("(")
  if not parenthesis:
    return None
  end = _closing(rest, len(opcode))
  argument = rest[len(opcode) + 1 : end - 1]
  return Instruction(
    name=words[-1].lstrip("%"),
    opcode=opcode.strip(),
    leaves=_leaves(type_text),
    operands=tuple(_OPERAND.findall(argument)),
    argument=argument,
    attributes=rest[end:],
    root=words[0] == "ROOT",
  )


def _closing(text: str, start: int) -> int:
  """The position behind the parenthesis that closes the one at start."""
  depth = 0
  for i in range(start, len(text)):
    if text[i] == "(":
      depth += 1
    elif text[i] == ")":
      depth -= 1
      if depth == 0:
        return i + 1
  return len(text)


@functools.cache
def _leaves(text: str) -> tuple[Leaf, ...]:
  return tuple(
    Leaf(
      dtype,
      tuple(int(n.lstrip("<=")) for n in dims.split(",") if n),
      "S(" not in (layout or ""),
    )
    for dtype, dims, layout in _LEAF.findall(text)
  )


def _walk(program: Program, name: str, times: float, costs: Costs) -> None:
  """Adds a computation that runs `times` times, outside of fusions."""
  computation = program.computations[name]
  seen: set[str] = set()  # channels of fused collectives
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    if opcode in _FREE:
      continue
    if opcode == "while":
      trips = _trips(program, instruction)
      if trips is None:
        costs.unknown_loops += 1
        trips = 1
      for attribute in ("condition", "body"):
        callee = instruction.callee(attribute)
        if callee is not None:
          _walk(program, callee, times * trips, costs)
      continue
    if opcode == "conditional":
      branch = _most_expensive(program, instruction)
      if branch is not None:
        _walk(program, branch, times, costs)
      continue
    callee = instruction.callee("calls") or instruction.callee("to_apply")
    if opcode in ("call", "async-start") and callee is not None:
      _walk(program, callee, times, costs)
      continue
    for kind, bytes_, group, channel in _collectives(
      program, computation, instruction
    ):
      if channel is None or channel not in seen:
        costs.collectives[Collective(kind, bytes_, group)] += times
        if channel is not None:
          seen.add(channel)
    flops, passes = _flops(program, computation, instruction)
    moved = _bytes(program, computation, instruction)
    costs.flops += times * flops
    costs.passes += times * passes
    costs.bytes += times * moved
    costs.busy.append((passes, moved, times))


def _most_expensive(program: Program, instruction: Instruction) -> str | None:
  """The branch of a conditional with the most FLOPs, or else bytes."""
  names = _CALLEE.findall(instruction.attributes)
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if listed:
    names += [name.strip().lstrip("%") for name in listed[1].split(",")]

  def size(name: str) -> tuple[float, float]:
    branch = Costs()
    _walk(program, name, 1.0, branch)
    return branch.flops, branch.bytes

  return max(names, key=size, default=None)


def _trips(program: Program, loop: Instruction) -> int | None:
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if known:
    return int(known[1])
  constants = [
    int(i.argument)
    for i in _with_fused(program, loop.callee("condition"))
    if i.opcode == "constant"
    and i.leaves[0].dtype[0] in "su"
    and i.argument.isdigit()
  ]
  return max(constants, default=None)


def _with_fused(program: Program, name: str | None) -> Iterator[Instruction]:
  """The instructions of a computation and of the fusions in it."""
  if name is None or name not in program.computations:
    return
  for instruction in program.computations[name].instructions.values():
    yield instruction
    if instruction.opcode == "fusion":
      yield from _with_fused(program, instruction.callee("calls"))


def _collectives(
  program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[str, int, tuple[int, ...], str | None]]:
  """(kind, bytes, first group, channel) of an instruction or its fusion."""
  if instruction.opcode == "fusion":
    inner = program.inside(instruction)
    if inner is not None:
      for fused in inner.instructions.values():
        yield from _collectives(program, inner, fused)
    return
  kind = instruction.opcode.removesuffix("-start")
  if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
    return
  operands = sum(
    leaf.bytes
    for name in instruction.operands
    if name in computation.instructions
    for leaf in computation.instructions[name].leaves
  )
  results = sum(leaf.bytes for leaf in instruction.leaves)
  if instruction.opcode.endswith("-start"):
    results -= operands  # the operands are part of what it returns
  channel = re.search(r"channel_id=(\d+)", instruction.attributes)
  yield (
    kind,
    max(operands, results),
    _first_group(instruction.attributes),
    channel and channel[1],
  )


def _ints(text: str | None) -> tuple[int, ...]:
  """ "4,2" -> (4, 2)."""
  return tuple(map(int, re.findall(r"\d+", text or "")))


def _first_group(attributes: str) -> tuple[int, ...]:
  """The first of replica_groups in any of its notations."""
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if listed:
    return _ints(listed[1])
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    found = [_ints(pair) for pair in re.findall(r"\d+,\d+", pairs[1])]
    longest = max(found, key=lambda p: abs(p[0] - p[1]))
    return tuple(dict.fromkeys(longest))
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
  )
  if iota:
    shape, dims, order = map(_ints, iota.groups())
    devices = np.arange(math.prod(dims)).reshape(dims)
    if order:
      devices = devices.transpose(order)
    return tuple(devices.reshape(shape)[0].tolist())
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}",
    attributes,
  )
  if named:
    axes, base, turn, chosen = named.groups()
    sizes = {
      axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", axes)
    }
    devices = np.arange(math.prod(sizes.values()))
    if base is not None:
      devices = devices.reshape(_ints(base))
      if turn is not None:
        devices = devices.transpose(_ints(turn))
    members = devices.reshape(tuple(sizes.values()))
    for position, axis in enumerate(sizes):
      part = re.search(rf"'{axis}'(?::\((\d+)\)(\d+))?", chosen)
      if part is None:
        members = members.take([0], axis=position)
      elif part[1] is not None:  # a part of the axis: (sizes before) its size
        before, own = int(part[1]), int(part[2])
        step = sizes[axis] // (before * own)
        members = members.take(range(0, step * own, step), axis=position)
    return tuple(members.ravel().tolist())
  return ()


def _flops(
  program: Program, computation: Computation, instruction: Instruction
) -> tuple[float, float]:
  """FLOPs of an instruction, or of all that are fused into it; and passes."""
  if instruction.opcode == "fusion":
    inner = program.inside(instruction)
    if inner is None:
      return 0.0, 0.0
    parts = [_flops(program, inner, i) for i in inner.instructions.values()]
    return sum(p[0] for p in parts), sum(p[1] for p in parts)
  if instruction.opcode not in ("dot", "convolution"):
    return 0.0, 0.0
  lhs, rhs = (
    computation.instructions[name].leaves[0].shape
    for name in instruction.operands[:2]
  )
  out = instruction.leaves[0].shape
  if instruction.opcode == "dot":
    contracted = re.search(
      r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes
    )
    indices = filter(None, contracted[1].split(",") if contracted else ())
    flops = 2.0 * math.prod(out) * math.prod(lhs[int(i)] for i in indices)
  else:
    flops = _convolution_flops(lhs, rhs, out, instruction.attributes)
  precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
  factor = {"highest": 6, "high": 3}.get(precision[1] if precision else "", 1)
  return flops, flops * factor


def _convolution_flops(
  lhs: tuple[int, ...],
  rhs: tuple[int, ...],
  out: tuple[int, ...],
  attributes: str,
) -> float:
  """FLOPs of a convolution, whose windows may hang over the edges.

  TPU programs write batched matrix products so: a batch dimension is a spatial
  one whose window meets one element of the input, the rest being padding or
  holes.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  if labels is None:
    return 0.0
  lhs_labels, rhs_labels, out_labels = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(
    part.split("=", 1) for part in (window[1].split() if window else ())
  )
  spatial = sorted(label for label in out_labels if label.isdigit())

  def numbers(name: str, default: str) -> list[str]:
    return fields.get(name, "x".join([default] * len(spatial))).split("x")

  strides, pads = numbers("stride", "1"), numbers("pad", "0_0")
  base, dilation = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
  products = 1
  for i, label in enumerate(spatial):
    products *= products_met(
      out[out_labels.index(label)],
      rhs[rhs_labels.index(label)],
      lhs[lhs_labels.index(label)],
      stride=int(strides[i]),
      dilation=int(dilation[i]),
      holes=int(base[i]),
      low=int(pads[i].split("_")[0]),
    )
  return (
    2.0
    * products
    * out[out_labels.index("b")]
    * out[out_labels.index("f")]
    * rhs[rhs_labels.index("i")]
  )


def products_met(
  out: int,
  window: int,
  size: int,
  *,
  stride: int,
  dilation: int,
  holes: int,
  low: int,
) -> int:
  """Products along one spatial dimension: pairs of an output and a place of its
  window that meet an element of the input.

  Counted for all places of a window together, since a vocabulary's mixing is
  written with a window of the whole vocabulary at each of its entries.

  Args:
    out: outputs.
    window: places of a window.
    size: elements of the input.
    stride: input places from a window to the next.
    dilation: input places from a window's place to the next.
    holes: input places from an element to the next.
    low: input places of padding before the first element.
  """
  first = low - np.arange(out) * stride  # what place * dilation is at element 0
  common = math.gcd(dilation, holes)
  period = holes // common  # of the places that meet no hole
  least = np.maximum(-(-first // dilation), 0)
  most = np.minimum((first + (size - 1) * holes) // dilation, window - 1)
  phase = first // common * pow(dilation // common, -1, period) % period
  met = (most - phase) // period - (least - 1 - phase) // period
  return int(np.where(first % common == 0, np.maximum(met, 0), 0).sum())


def _bytes(
  program: Program, computation: Computation, instruction: Instruction
) -> float:
  """Bytes that an instruction moves to and from main memory."""
  opcode = instruction.opcode
  if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
    return 0.0
  operands = [
    computation.instructions[name]
    for name in instruction.operands
    if name in computation.instructions
  ]
  inner = program.inside(instruction)
  if opcode == "fusion" and inner is not None:
    return _fusion_bytes(program, inner, instruction, operands)
  if opcode == "dynamic-update-slice":
    return 2.0 * operands[1].bytes
  if opcode in _SLICES:
    return 2.0 * instruction.bytes
  if opcode == "copy-start":  # (result, operand, a flag)
    return float(sum(x.bytes for x in instruction.leaves[:2] if x.main_memory))
  if opcode.endswith("-start"):  # (operands, results, flags)
    return float(instruction.bytes)
  if opcode.endswith("-done"):
    return 0.0
  return float(instruction.bytes + sum(o.bytes for o in operands))


def _fusion_bytes(
  program: Program,
  inner: Computation,
  fusion: Instruction,
  operands: list[Instruction],
) -> float:
  total = 0.0
  for parameter in inner.instructions.values():
    if parameter.opcode == "parameter":
      operand = operands[int(parameter.argument)]
      total += min(_read(program, inner, parameter.name), operand.bytes)
  roots = [inner.root]
  if inner.root.opcode == "tuple":
    roots = [inner.instructions[name] for name in inner.root.operands]
  leaves = fusion.leaves
  for i, root in enumerate(roots):
    if len(roots) == len(leaves) and not leaves[i].main_memory:
      continue
    update = _updated(program, inner, root)
    if update is not None:
      total += update
    elif len(roots) == len(leaves):
      total += leaves[i].bytes
    else:
      total += root.bytes
  return total


def _read(program: Program, inner: Computation, name: str) -> float:
  """Bytes of a value that a fusion, and those in it, read: inf for all."""
  total = 0.0
  for user in inner.instructions.values():
    if name not in user.operands:
      continue
    nested = program.inside(user)
    if user.opcode == "bitcast" and not user.root:
      total += _read(program, inner, user.name)
    elif user.opcode in _SLICES and user.operands[0] == name:
      total += sum(leaf.bytes for leaf in user.leaves)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      pass  # in place: only the update is written
    elif user.opcode == "fusion" and nested is not None:
      total += sum(
        _read(program, nested, parameter.name)
        for parameter in nested.instructions.values()
        if parameter.opcode == "parameter"
        and user.operands[int(parameter.argument)] == name
      )
    else:
      return math.inf
  return total


def _updated(
  program: Program, inner: Computation, root: Instruction
) -> float | None:
  """Bytes that a fusion writes in place; None when it writes all it returns."""
  while root.opcode == "bitcast" and root.operands:
    root = inner.instructions[root.operands[0]]
  nested = program.inside(root)
  if root.opcode == "fusion" and nested is not None:
    return _updated(program, nested, nested.root)
  if root.opcode != "dynamic-update-slice":
    return None
  return float(
    sum(leaf.bytes for leaf in inner.instructions[root.operands[1]].leaves)
  )

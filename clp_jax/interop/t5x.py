"""t5x's checkpoints, without t5x: MODEL_DIR/checkpoint_<step>/.

Two layouts, told apart by what is in the folder:

  checkpoint   (legacy, all the public ones) a msgpack of {"version": 3,
               "optimizer": {"target": params, "state": ...}}, where an array
               is inline or, mostly, the description of a zarr array beside the
               file, target.encoder.encoder_norm.scale/ and so on;
  state/       (Orbax) one tree {"target": params, "state": ...}.

Only "target", the parameters, is read; the optimizer's state is not touched.
The tree is this package's own. The config is in no checkpoint: `infer_config`
reads it from the shapes, and what they can't tell is what T5 has.
"""

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from clp_jax.interop import leaves, orbax, storage
from clp_jax.interop.leaves import Leaf
from clp_jax.interop.storage import Folder
from clp_jax.models.t5 import T5Config

_VERSION = 3
_FILE = "checkpoint"
_STEP = re.compile(r"checkpoint_(\d+)")
_CHUNK_BYTES = 64 << 20  # as t5x writes, so that many hosts can read parts


def is_step(name: str) -> bool:
  """Whether a folder's name is that of a checkpoint."""
  return _STEP.fullmatch(name) is not None


def find(folder: Folder) -> Folder | None:
  """The checkpoint that a path means.

  Args:
    folder: checkpoint_<step>, or the folder that it is in: then the newest
      step that is complete.

  Returns:
    The folder checkpoint_<step>, or None when there is none.
  """
  if _is_checkpoint(folder):
    return folder
  steps = [
    (int(match[1]), name)
    for name in folder.names("checkpoint_")
    if (match := _STEP.fullmatch(name))
  ]
  for _, name in sorted(steps, reverse=True):
    if _is_checkpoint(folder.within(name)):
      return folder.within(name)
  return None


def _is_checkpoint(folder: Folder) -> bool:
  return folder.has(_FILE) or orbax.is_orbax(folder.within("state"))


def open_checkpoint(folder: Folder) -> tuple[T5Config, dict[str, Leaf]]:
  """What a folder checkpoint_<step> holds; no parameter is read yet.

  Returns:
    The config and {path: leaf}.

  Raises:
    ValueError: names what is wrong with the checkpoint.
  """
  if folder.has(_FILE):
    stored = _legacy_leaves(folder)
  else:
    stored = orbax.stored_leaves(folder.within("state"), "target")
  config = infer_config(folder.path, leaves.shapes(stored))
  leaves.check(folder.path, leaves.expected_shapes(config), stored)
  for path, leaf in stored.items():
    if leaf.dtype not in (np.float32, np.float16, np.dtype(jnp.bfloat16)):
      raise ValueError(
        f"{folder.path}: {path} is of dtype {leaf.dtype}, expected float32 or "
        "bfloat16."
      )
  return config, stored


def _legacy_leaves(folder: Folder) -> dict[str, Leaf]:
  where = f"{folder.path}/{_FILE}"
  content = folder.read(_FILE)
  try:
    values = flax.serialization.msgpack_restore(content)
    version = values.get("version")
    target = values["optimizer"]["target"] if version else values["target"]
  except Exception as error:  # msgpack's own types, and of any nesting
    raise ValueError(
      f"{where} is not a t5x checkpoint ({type(error).__name__}: {error})."
    ) from error
  if version is not None and version < 2:
    raise ValueError(
      f"{where} is of version {version}; expected {_VERSION}: let t5x restore "
      "it and save it again."
    )
  inline, names = {}, {}
  for path, value in _flatten(target):
    if isinstance(value, dict):
      # tensorstore before 0.1.14 had the path beside the kvstore.
      names[path] = value["kvstore"].get("path") or value["path"]
    else:
      inline[path] = Leaf.of(np.asarray(value))
  return inline | storage.zarr_leaves(folder.path, folder.kvstore, names)


def _flatten(tree: Mapping[str, Any], prefix: str = ""):
  """(path, array or tensorstore's description of one)."""
  for key, value in tree.items():
    if isinstance(value, dict) and "kvstore" not in value:
      yield from _flatten(value, f"{prefix}{key}/")
    else:
      yield prefix + key, value


def infer_config(where: str, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
  """The T5Config whose tree has these shapes.

  Heads and buckets are the relative-position table's; an MLP with wi_0 and
  wi_1 is the gated gelu of v1.1, one with wi the relu of v1.0.

  Args:
    where: the checkpoint, for messages.
    shapes: {path: shape}.

  Raises:
    ValueError: when it isn't the tree of a T5.
  """

  def shape(path: str, ndim: int = 2) -> tuple[int, ...]:
    if len(shapes.get(path, ())) != ndim:
      known = f"it is {shapes[path]}" if path in shapes else "it is absent"
      hint = ""
      if any(p.startswith("encoder/encoder/") for p in shapes):
        hint = (
          "; the scanned layers of t5x's scalable_t5 can't be read, give a "
          "checkpoint of its plain T5"
        )
      raise ValueError(
        f"{where} holds no T5: expected {path} with {ndim} dimensions, but "
        f"{known}{hint}."
      )
    return shapes[path]

  def depth(stack: str) -> int:
    found = (re.match(rf"{stack}/layers_(\d+)/", path) for path in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=0)

  vocab_size, emb_dim = shape("token_embedder/embedding")
  num_heads, num_buckets = shape("encoder/relpos_bias/rel_embedding")
  _, joined = shape("encoder/layers_0/attention/query/kernel")
  if joined % num_heads:
    raise ValueError(
      f"{where} holds no T5: {joined} columns of the query are no multiple of "
      f"{num_heads} heads."
    )
  gated = "encoder/layers_0/mlp/wi_0/kernel" in shapes
  wi = "wi_0" if gated else "wi"
  return T5Config(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=joined // num_heads,
    num_encoder_layers=depth("encoder"),
    num_decoder_layers=depth("decoder"),
    mlp_dim=shape(f"encoder/layers_0/mlp/{wi}/kernel")[1],
    mlp_activations=("gelu", "linear") if gated else ("relu",),
    logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
    relative_attention_num_buckets=num_buckets,
  )


def save(
  folder: Folder,
  config: T5Config,
  views: Mapping[str, Leaf],
  step: int,
  use_orbax: bool,
) -> None:
  """Writes checkpoint_<step>, with the parameters and the step alone.

  The legacy layout appears under its name when it is complete; on gs://, where
  folders can't be renamed, its file `checkpoint` comes last.

  Args:
    folder: checkpoint_<step>, which gives the step, or where to make it.
    config: of the model.
    views: from `leaves.views`.
    step: that the checkpoint is named for.
    use_orbax: the other layout.

  Raises:
    ValueError: when the step is there already, or when the checkpoint, which
      does not hold the config, would be read as another model.
  """
  inferred = infer_config("params", leaves.shapes(views))
  for field in ("mlp_activations", "relative_attention_max_distance"):
    theirs, ours = getattr(inferred, field), getattr(config, field)
    if theirs != ours:
      raise ValueError(
        f"a t5x checkpoint does not say that {field} is {ours!r}, and would be "
        f"read as {theirs!r}; choose another format."
      )
  if is_step(folder.name):
    step = int(folder.name.removeprefix("checkpoint_"))
  else:
    folder = folder.within(f"checkpoint_{step}")
  if folder.names(""):
    raise ValueError(
      f"{folder.path} is there already; remove it or save elsewhere."
    )
  if use_orbax:
    arrays = {f"target/{p}": leaf.all() for p, leaf in views.items()}
    state = folder.within("state").path
    orbax.save_tree(state, arrays | {"state/step": np.int32(step)})
    return
  partial = folder
  if folder.on_disk:
    partial = Folder(f"{folder.path}.tmp-clp")
    shutil.rmtree(partial.path, ignore_errors=True)
  target = {p: _write_array(partial, p, leaf) for p, leaf in views.items()}
  content = {
    "version": _VERSION,
    "optimizer": {
      "target": leaves.unflatten(target),
      "state": {"step": np.int32(step)},
    },
  }
  storage.write(partial, _FILE, flax.serialization.msgpack_serialize(content))
  if folder.on_disk:
    os.replace(partial.path, folder.path)


def _write_array(folder: Folder, path: str, leaf: Leaf) -> dict[str, Any]:
  """Writes a zarr array; returns the description that t5x looks it up with."""
  name = "target." + path.replace("/", ".") + "/"
  row_bytes = max(1, leaf.nbytes // leaf.shape[0])
  rows = min(leaf.shape[0], max(1, _CHUNK_BYTES // row_bytes))
  spec: dict[str, Any] = {
    "driver": "zarr",
    "dtype": leaf.dtype.name,
    "kvstore": {"driver": folder.kvstore["driver"], "path": name},
    "metadata": {
      "shape": list(leaf.shape),
      "chunks": [rows, *leaf.shape[1:]],
      "compressor": {"id": "gzip", "level": 1},
    },
  }
  if spec["kvstore"]["driver"] == "gcs":
    spec["kvstore"]["bucket"] = "t5x-dummy-bucket"  # t5x puts the real one in
  kvstore = folder.kvstore
  store = ts.open(
    spec | {"kvstore": kvstore | {"path": kvstore["path"] + name}},
    create=True,
    delete_existing=True,
  ).result()
  store.write(leaf.all()).result()
  return spec

"""A model as an Orbax checkpoint: params/ and model.json, in one folder.

  params             what ocp.StandardCheckpointer saves of its tree
  model.json         the fields of its config
  vocabulary.model   the SentencePiece model, where one was given

Written with Orbax, so that Orbax restores it; read with tensorstore, so that
each device gets its part, whatever the layout of the layers.
"""

import dataclasses
import json
from collections.abc import Mapping

import orbax.checkpoint as ocp
from etils import epath

from clp_jax.interop import leaves, storage
from clp_jax.interop.leaves import Leaf
from clp_jax.interop.storage import Folder
from clp_jax.models import families
from clp_jax.models.families import Config

VOCABULARY = "vocabulary.model"


def is_checkpoint(folder: Folder) -> bool:
  """Whether `save` made this folder."""
  return folder.has("model.json") and is_orbax(folder.within("params"))


def is_orbax(folder: Folder) -> bool:
  """Whether Orbax has saved a tree in this folder."""
  return folder.has("_METADATA") or folder.has("manifest.ocdbt")


def stored_leaves(folder: Folder, prefix: str = "") -> dict[str, Leaf]:
  """The arrays of a tree that Orbax saved, or of what is in the part `prefix`
  of it, by their paths there.

  Raises:
    ValueError: when an array can't be read.
  """
  kvstore = folder.kvstore
  if folder.has("manifest.ocdbt"):
    kvstore = {"driver": "ocdbt", "base": kvstore}
  start = f"{prefix}." if prefix else ""
  names = {
    name.removeprefix(start).replace(".", "/"): name
    for name in storage.array_names(folder.path, kvstore, start)
  }
  return storage.zarr_leaves(folder.path, kvstore, names)


def open_checkpoint(folder: Folder) -> tuple[Config, dict[str, Leaf]]:
  """What a folder of `save` holds.

  Raises:
    ValueError: names what is wrong with the folder.
  """
  try:
    config = families.from_json(json.loads(folder.read("model.json")))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{folder.path}/model.json: {error}") from error
  stored = stored_leaves(folder.within("params"))
  leaves.check(folder.path, leaves.expected_shapes(config), stored)
  return config, stored


def save(
  path: epath.Path,
  config: Config,
  views: Mapping[str, Leaf],
  vocabulary: bytes | None,
) -> None:
  """Writes a folder; model.json, which says that it is complete, comes last.

  Args:
    path: the folder; an older model in it is replaced.
    config: of the model.
    views: from `leaves.views`; layers are saved one by one.
    vocabulary: the SentencePiece model's content; None for none.
  """
  config = dataclasses.replace(config, scan_layers=False)
  path.mkdir(parents=True, exist_ok=True)
  (path / "model.json").unlink(missing_ok=True)
  save_tree(str(path / "params"), {p: leaf.all() for p, leaf in views.items()})
  if vocabulary is not None:
    (path / VOCABULARY).write_bytes(vocabulary)
  storage.write_json(path / "model.json", families.to_json(config))


def save_tree(path: str, arrays: Mapping[str, object]) -> None:
  """Saves {"a/b": array} as a nested dict, in a folder on disk or gs://."""
  tree = leaves.unflatten(arrays)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(storage.absolute(path), tree, force=True)

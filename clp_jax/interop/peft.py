"""Folders of the `peft` library's LoRA adapters.

A folder holds adapter_config.json and adapter_model.safetensors. For a linear
map W of transformers' model, [out, in], it has lora_A [r, in] and lora_B
[out, r], and the model computes with

  W + lora_alpha / r  lora_B lora_A

Ours, [in, out], are left = lora_A^T and right = lora_B^T.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clp_jax.interop import (
  causal,
  hub,
  huggingface,
  leaves,
  safetensors_file,
  storage,
  weight_files,
)
from clp_jax.interop.storage import Folder
from clp_jax.models.families import Config
from clp_jax.models.t5 import T5Config

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]

# Fields that may be there, but only so.
_ONLY: dict[str, tuple[Any, ...]] = {
  "bias": (None, "none"),
  "fan_in_fan_out": (None, False),
  "use_dora": (None, False),
  "lora_bias": (None, False),
  "modules_to_save": (None, []),
  "rank_pattern": (None, {}),
  "alpha_pattern": (None, {}),
  "alora_invocation_tokens": (None,),
  # By other starts, such as PiSSA's, peft changes the base.
  "init_lora_weights": (None, False, "gaussian", "eva", "orthogonal", True),
}
_PREFIX = "base_model.model."  # peft's names of what it wraps


def module_name(config: Config, path: str) -> str:
  """The linear map of transformers' model whose kernel lies at our path.

  "decoder/layers_3/mlp/wi_0/kernel" -> "model.layers.3.mlp.gate_proj".
  """
  if isinstance(config, T5Config):
    name, _ = huggingface.tensor_of(path)
  else:
    name, _ = causal.tensor_of(config, path)
  return name.removesuffix(".weight")


def task(config: Config) -> tuple[str, str]:
  """(peft's task_type, transformers' class) of a model."""
  if isinstance(config, T5Config):
    return "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"
  return "CAUSAL_LM", "AutoModelForCausalLM"


def save(
  path: epath.Path,
  config: Config,
  factors: Factors,
  scale: float,
  base: str,
  revision: str | None = None,
) -> None:
  """Writes an adapter's folder; adapter_config.json comes last.

  Args:
    path: the folder.
    config: of the model.
    factors: path of a kernel, `layers_0`, ... -> left [D, k] and right [k, F],
      all of one k.
    scale: of their products.
    base: what base_model_name_or_path is to say.
    revision: of a base on the Hub, where it is not the newest.
  """
  path.mkdir(parents=True, exist_ok=True)
  (path / CONFIG).unlink(missing_ok=True)
  tensors, modules, rank = {}, set(), 0
  for kernel, (left, right) in factors.items():
    module = module_name(config, kernel)
    tensors[f"{_PREFIX}{module}.lora_A.weight"] = leaves.Leaf.of(left.T)
    tensors[f"{_PREFIX}{module}.lora_B.weight"] = leaves.Leaf.of(right.T)
    modules.add(module.rpartition(".")[2])
    rank = left.shape[1]
  safetensors_file.write(path / WEIGHTS, tensors)
  alpha = scale * rank
  storage.write_json(
    path / CONFIG,
    {
      "peft_type": "LORA",
      "task_type": task(config)[0],
      "base_model_name_or_path": base,
      "revision": revision,
      "inference_mode": True,
      "r": rank,
      "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
      "lora_dropout": 0.0,
      "target_modules": sorted(modules),
      "bias": "none",
      "fan_in_fan_out": False,
      "use_rslora": False,
      "use_dora": False,
      "modules_to_save": None,
    },
  )


def is_base(path: str) -> bool:
  """Whether adapters of the model that a folder holds can name that folder.

  It must be one that transformers reads from disk, as `interop.load_model`
  does; of a multimodal model we read the text model alone, whose linear maps
  have other names.
  """
  folder = Folder(path)
  if not folder.on_disk or not folder.has("config.json"):
    return False
  try:
    kind = weight_files.read_json(folder, "config.json").get("model_type")
  except (OSError, ValueError):
    return False
  return kind in huggingface.FAMILIES or kind in causal.TEXT_MODELS


class LoRA(NamedTuple):
  """An adapter that was read.

  Attributes:
    folder: where it lies.
    base: the model that it says it adapts: a folder, or a name of the hub.
    rank: of every product.
    scale: of the products.
    factors: path of a kernel, `layers_0`, ... -> left [D, r], right [r, F],
      float32.
  """

  folder: str
  base: str
  rank: int
  scale: float
  factors: Factors


def is_adapter(path: str) -> bool:
  """Whether a folder holds an adapter."""
  return Folder(path).has(CONFIG)


def base_of(path: str) -> str:
  """What an adapter says that it adapts, with a name's @revision where it says
  one; "" where it does not."""
  values = weight_files.read_json(Folder(path), CONFIG)
  base = values.get("base_model_name_or_path") or ""
  revision = values.get("revision")
  return f"{base}@{revision}" if revision and hub.is_name(base) else base


def load(path: str, config: Config) -> LoRA:
  """Reads an adapter of a model.

  Raises:
    ValueError: when there is none, it is of another kind than LoRA, or not of
      such a model; one line that names the field or the tensor.
  """
  folder = Folder(path)
  if not folder.has(CONFIG):
    raise ValueError(f"{path} holds no adapter: it has no {CONFIG}.")
  values = weight_files.read_json(folder, CONFIG)
  where = f"{path}/{CONFIG}"
  kind = values.get("peft_type")
  if kind != "LORA":
    raise ValueError(f"{where}: peft_type must be LORA, got {kind!r}.")
  weight_files.check_only(where, values, _ONLY)
  rank, alpha = values.get("r"), values.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1:
    raise ValueError(f"{where}: r must be an integer >= 1, got {rank!r}.")
  if not isinstance(alpha, int | float):
    raise ValueError(f"{where}: lora_alpha must be a number, got {alpha!r}.")
  if not folder.has(WEIGHTS):
    raise ValueError(f"{path} lacks {WEIGHTS}.")
  stored = dict(safetensors_file.read(folder, WEIGHTS))
  factors = {}
  for kernel, shape in leaves.expected_shapes(config).items():
    if not kernel.endswith("/kernel"):
      continue
    module = f"{_PREFIX}{module_name(config, kernel)}"
    a, b = (stored.pop(f"{module}.lora_{x}.weight", None) for x in "AB")
    if a is None and b is None:
      continue
    found = [None if x is None else x.shape for x in (a, b)]
    if a is None or b is None or found != [(rank, shape[0]), (shape[1], rank)]:
      raise ValueError(
        f"{path} is of another base: {module.removeprefix(_PREFIX)} has lora_A "
        f"and lora_B of shapes {found[0]} and {found[1]}, and this model with "
        f"r = {rank} {(rank, shape[0])} and {(shape[1], rank)}."
      )
    left, right = (x.all().astype(np.float32).T for x in (a, b))
    factors[kernel] = left, right
  if stored or not factors:
    name = next(iter(stored), "nothing")
    raise ValueError(
      f"{path} is of another base: it holds {name}, and this model has no such "
      "linear map."
    )
  scale = alpha / (rank**0.5 if values.get("use_rslora") else rank)
  return LoRA(path, base_of(path), rank, scale, factors)

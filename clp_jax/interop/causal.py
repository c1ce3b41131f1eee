"""Hugging Face folders of decoder-only models.

Llama 3.x, Qwen2 and 2.5, Qwen3, Gemma 2, Gemma 3 (of a multimodal one its text
model). A config says what it has: fields that this network has no switch for
are refused by name, if they are set. Where a field is absent, the default of
transformers' class counts, but for eos_token_id: the tokenizer knows better.

torch has linear maps as [out, in] and we as [in, out]: every kernel is
transposed. The rest is a matter of names.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.errors import check_choice
from clp_jax.interop import huggingface, leaves, orbax, weight_files
from clp_jax.interop.leaves import Leaf
from clp_jax.interop.storage import Folder
from clp_jax.models.causal import NO_PAD, CausalConfig, Rope

_GEMMA = {
  "vocab_size": 256000,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": True,
  "rope_theta": 10000.0,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "pad_token_id": 0,
}
_QWEN = {
  "vocab_size": 151936,
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "hidden_act": "silu",
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "rope_theta": 10000.0,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
# What the classes of transformers take for a field that is absent.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
  },
  "qwen2": _QWEN,
  "qwen3": {**_QWEN, "head_dim": 128},
  "gemma2": {
    **_GEMMA,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
  },
  "gemma3_text": {
    **_GEMMA,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10000.0,
  },
}
TEXT_MODELS = tuple(_DEFAULTS)  # model_types
_DERIVED = (
  *("head_dim", "layer_types", "rope_parameters", "rope_theta"),
  *("attention_bias", "mlp_bias", "sliding_window_pattern"),
)
_MAY_BE_NULL = (
  *("final_logit_softcapping", "attn_logit_softcapping", "sliding_window"),
  *("num_key_value_heads", "use_sliding_window", "tie_word_embeddings"),
  *("pad_token_id", "attention_bias", "mlp_bias"),
)
_WHOLE = (
  *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
  *("num_attention_heads", "num_key_value_heads", "head_dim"),
  *("max_position_embeddings", "sliding_window_pattern"),
)
_REAL = (
  *("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
  *("final_logit_softcapping", "attn_logit_softcapping"),
)
_FLAGS = (
  *("tie_word_embeddings", "use_sliding_window", "attention_bias"),
  "mlp_bias",
)
_GEMMAS = ("gemma2", "gemma3_text")
_QWENS = ("qwen2", "qwen3")
_NESTED = {"gemma3": "gemma3_text"}  # of a multimodal model -> its text model
ACTIVATIONS = {
  "gelu_pytorch_tanh": "gelu",
  "silu": "silu",
  "gelu": "gelu_exact",
  "gelu_new": "gelu",
  "relu": "relu",
  "swish": "silu",
}
# Fields that may be there, but only so.
_ONLY = {
  "partial_rotary_factor": (None, 1, 1.0),
  "use_bidirectional_attention": (None, False),
  "quantization_config": (None,),
  "num_experts": (None, 0),
  "num_local_experts": (None, 0),
  "n_routed_experts": (None, 0),
  "attention_multiplier": (None, 1, 1.0),
  "residual_multiplier": (None, 1, 1.0),
  "embedding_multiplier": (None, 1, 1.0),
  "logits_scaling": (None, 1, 1.0),
  "logit_scale": (None, 1, 1.0),
  "clip_qkv": (None,),
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Prefixes of the text model, and of what is not of it, in multimodal folders.
_TEXT = ("model.language_model.", "language_model.")
_OTHER = ("vision_tower.", "multi_modal_projector.")
_OF_COMPUTATION = (
  *("dtype", "scan_layers", "remat", "dropout_rate", "num_tokens"),
)
_EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"


def is_causal(values: Mapping[str, Any]) -> bool:
  """Whether a config.json is of a model that `open_folder` may read."""
  kind = values.get("model_type")
  return kind in _DEFAULTS or kind in _NESTED


def families() -> tuple[str, ...]:
  """The model_types that can be read."""
  return (*_DEFAULTS, *_NESTED)


def open_folder(
  folder: Folder, mapped: bool
) -> tuple[CausalConfig, dict[str, Leaf]]:
  """The config and {path: leaf}; args and errors as of `huggingface`'s."""
  config = read_config(folder)
  stored = read_tensors(folder, mapped)
  head, _ = tensor_of(config, HEAD)
  if head not in stored and _is_untied_around_the_text(folder):
    config = dataclasses.replace(config, logits_via_embedding=True)
  if config.logits_via_embedding and head in stored:
    table = stored.get(tensor_of(config, _EMBEDDING)[0])
    if table is not None and not leaves.same(stored[head], table):
      logging.warning(
        "%s: config.json ties the logit layer to the embedding: %s, which "
        "differs from it, is not used",
        folder.path,
        head,
      )
    del stored[head]
  tensor = functools.partial(tensor_of, config)
  expected = leaves.expected_shapes(config)
  return config, weight_files.model_leaves(folder, stored, expected, tensor)


def _is_untied_around_the_text(folder: Folder) -> bool:
  """Whether a multimodal config unties the logits, and its text model's says
  nothing: for transformers 5 it has the word, for 4 it has not, and no tensor
  is written."""
  outer = weight_files.read_json(folder, "config.json")
  text = outer.get("text_config") or {}
  name = "tie_word_embeddings"
  return outer.get("model_type") in _NESTED and (
    outer.get(name) is False and text.get(name) is None
  )


def read_tensors(folder: Folder, mapped: bool) -> dict[str, Leaf]:
  """Tensors of the text model, under the names that it has alone."""
  found = {}
  for name, leaf in weight_files.read(folder, mapped).items():
    bare = name.removeprefix("model.")
    if bare.startswith(_OTHER) or name.endswith("rotary_emb.inv_freq"):
      continue
    for prefix in _TEXT:
      if name.startswith(prefix):
        rest = name.removeprefix(prefix).removeprefix("model.")
        name = rest if rest.startswith("lm_head.") else f"model.{rest}"
    found[name] = leaf
  return found


def read_config(folder: Folder) -> CausalConfig:
  """The config of a folder's model.

  Raises:
    ValueError: names the field of config.json that is not known or not valid.
  """
  values = weight_files.read_json(folder, "config.json")
  where = f"{folder.path}/config.json"
  eos_ids = weight_files.eos_ids(folder, values)
  if values.get("model_type") in _NESTED:
    outer = values
    weight_files.check_only(where, outer, _ONLY)
    values = outer.get("text_config") or {}
    text_type = _NESTED[outer["model_type"]]
    if (
      not isinstance(values, dict)
      or values.get("model_type", text_type) != text_type
    ):
      raise ValueError(
        f"{where}: text_config must be an object of model_type {text_type}."
      )
    values = values | {"model_type": text_type}
    for name in ("eos_token_id", "pad_token_id", "tie_word_embeddings"):
      if outer.get(name) is not None:
        values.setdefault(name, outer[name])
    # The class of such a folder does not read it, as that of the text alone.
    values["final_logit_softcapping"] = None
    eos_ids = eos_ids or weight_files.eos_ids(folder, values)
  kind: Any = values.get("model_type")
  check_choice(f"{where}: model_type", kind, families())
  weight_files.check_only(where, values, _ONLY)
  # null means that these are to be found out; elsewhere it means off.
  own = {
    name: value
    for name, value in values.items()
    if value is not None or name not in _DERIVED
  }
  given = {**_DEFAULTS[kind], **own}
  _check_values(where, kind, given)
  try:
    return _config(where, kind, given, _producible(where, given, eos_ids))
  except KeyError as error:
    raise ValueError(f"{where} lacks {error}.") from error
  except TypeError as error:
    raise ValueError(f"{where}: {error}") from error


def _producible(
  where: str, values: Mapping[str, Any], eos_ids: tuple[Any, ...]
) -> tuple[Any, ...]:
  """Ends without those that no row of the vocabulary stands for: a config cut
  down from a larger model's may name some."""
  size = values["vocab_size"]
  beyond = [i for i in eos_ids if isinstance(i, int) and i >= size]
  if beyond:
    logging.warning(
      "%s: eos_token_id names %s, and vocab_size is %d: nothing will end there",
      where,
      ", ".join(map(str, beyond)),
      size,
    )
  return tuple(i for i in eos_ids if i not in beyond)


def _check_values(where: str, kind: str, values: Mapping[str, Any]) -> None:
  """Raises a ValueError that names a field whose value can't be one."""

  def is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)

  read = {*_DEFAULTS[kind], "num_key_value_heads", "head_dim", "pad_token_id"}
  if kind == "gemma3_text":
    read.add("sliding_window_pattern")
  given = {name: values[name] for name in values if name in read}
  for name, value in given.items():
    if value is None and name in _MAY_BE_NULL:
      continue
    if name in _WHOLE and not (is_number(value, int) and value > 0):
      what = "a number, whole and above 0"
    elif name in _REAL and not (is_number(value, int, float) and value > 0):
      what = "a number above 0"
    elif name == "rms_norm_eps" and not (
      is_number(value, int, float) and value >= 0
    ):
      what = "a number, 0 or more"
    elif name == "pad_token_id" and not is_number(value, int):
      what = "a number, a token"
    else:
      continue
    raise ValueError(f"{where}: {name} must be {what}, got {value!r}.")
  for name in _FLAGS:
    if values.get(name) not in (None, False, True):
      raise ValueError(
        f"{where}: {name} must be true or false, got {values[name]!r}."
      )
  for name in ("rope_scaling", "rope_parameters"):
    if not isinstance(values.get(name) or {}, Mapping):
      raise ValueError(
        f"{where}: {name} must be an object, got {values[name]!r}."
      )


def _config(
  where: str, kind: str, values: Mapping[str, Any], eos_ids: tuple[int, ...]
) -> CausalConfig:
  gemma = kind in _GEMMAS
  act = _activation_field(kind)
  activation = values[act]
  check_choice(f"{where}: {act}", activation, ACTIVATIONS)
  layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
  kv_heads = values.get("num_key_value_heads")
  types = _layer_types(where, kind, values)
  windows: tuple[int, ...] = ()
  size = values.get("sliding_window")
  if _SLIDING in types and size is not None:
    if not isinstance(size, int) or size < 1:
      raise ValueError(
        f"{where}: sliding_window must be a number of tokens, got {size!r}."
      )
    windows = tuple(size if t == _SLIDING else 0 for t in types)
  ropes, layer_ropes = _ropes(where, kind, values, types)
  bias = bool(values.get("attention_bias", False))
  pad_id = values.get("pad_token_id")
  if (
    pad_id is None
    or pad_id in eos_ids
    or not 0 <= pad_id < values["vocab_size"]
  ):
    pad_id = NO_PAD  # where it means something else, or nothing
  try:
    return CausalConfig(
      architecture=kind,
      vocab_size=values["vocab_size"],
      emb_dim=values["hidden_size"],
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=heads if kv_heads is None else kv_heads,
      head_dim=values.get("head_dim", values["hidden_size"] // heads),
      mlp_dim=values["intermediate_size"],
      activation=ACTIVATIONS[activation],
      norm_epsilon=values["rms_norm_eps"],
      norm_from_one=gemma,
      post_norms=gemma,
      qk_norm=kind in ("qwen3", "gemma3_text"),
      qkv_bias=True if kind == "qwen2" else bias,
      out_bias=False if kind == "qwen2" else bias,
      mlp_bias=bool(values.get("mlp_bias", False)) and kind == "llama",
      query_scale=values["query_pre_attn_scalar"] ** -0.5 if gemma else None,
      # Gemma 3 has the field, and transformers does not read it.
      attention_cap=(
        values["attn_logit_softcapping"] if kind == "gemma2" else None
      ),
      logit_cap=values.get("final_logit_softcapping") if gemma else None,
      ropes=ropes,
      layer_ropes=layer_ropes,
      windows=windows,
      scale_embeddings=gemma,
      logits_via_embedding=bool(values["tie_word_embeddings"]),
      max_length=values["max_position_embeddings"],
      eos_ids=eos_ids,
      pad_id=pad_id,
    )
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _activation_field(kind: str) -> str:
  return "hidden_activation" if kind in _GEMMAS else "hidden_act"


def _layer_types(
  where: str, kind: str, values: Mapping[str, Any]
) -> tuple[str, ...]:
  layers = range(values["num_hidden_layers"])
  types = (_FULL,) * len(layers)
  if kind == "llama":
    return types
  if "layer_types" in values:
    given = values["layer_types"]
    types = tuple(given) if isinstance(given, list) else (given,)
    known = all(t in (_SLIDING, _FULL) for t in types)
    if len(types) != len(layers) or not known:
      raise ValueError(
        f"{where}: layer_types must name {_FULL} or {_SLIDING} for each of "
        f"{len(layers)} layers, got {types}."
      )
  elif kind == "gemma2":
    types = tuple(_FULL if i % 2 else _SLIDING for i in layers)
  elif kind == "gemma3_text":
    period = values.get("sliding_window_pattern", 6)
    types = tuple(_SLIDING if (i + 1) % period else _FULL for i in layers)
  elif values["use_sliding_window"]:
    first = values["max_window_layers"]
    if not isinstance(first, int):
      raise ValueError(
        f"{where}: max_window_layers must be a number, got {first!r}."
      )
    types = tuple(_SLIDING if i >= first else _FULL for i in layers)
  if kind in _QWENS and not values["use_sliding_window"]:
    return (_FULL,) * len(layers)
  return types


def _ropes(
  where: str, kind: str, values: Mapping[str, Any], types: tuple[str, ...]
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
  """Rotary embeddings, and which one each layer has; of both layouts."""
  found = values.get("rope_parameters")  # of transformers 5
  if found is None:
    found = {
      "rope_theta": values["rope_theta"],
      **(values.get("rope_scaling") or {}),
    }
  theta = values["rope_theta"]
  nested = _FULL in found or _SLIDING in found
  if kind != "gemma3_text":
    if nested:
      raise ValueError(
        f"{where}: rope_parameters differ between layers, which a {kind} has "
        "not."
      )
    return (_rope(where, found, theta),), ()
  if not nested:  # local layers are not scaled
    found = {_FULL: found}
  ropes = (
    _rope(where, found.get(_FULL) or {}, theta),
    _rope(where, found.get(_SLIDING) or {}, values["rope_local_base_freq"]),
  )
  return ropes, tuple(int(t == _SLIDING) for t in types)


def _rope(where: str, fields: Any, theta: float) -> Rope:
  """theta: where there is none in the fields."""
  if not isinstance(fields, Mapping):
    raise ValueError(
      f"{where}: rope_parameters must hold objects, got {fields!r}."
    )
  weight_files.check_only(where, fields, _ONLY)

  def number(name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
      value = None
    if value is None or value <= 0:
      raise ValueError(
        f"{where}: {name} of the rotary embedding must be a number above 0, "
        f"got {fields[name]!r}."
      )
    return float(value)

  kind = fields.get("rope_type", fields.get("type", "default"))
  if "rope_theta" in fields:
    theta = number("rope_theta")
  if kind == "default":
    return Rope(float(theta))
  if kind == "linear":
    return Rope(float(theta), "linear", number("factor"))
  if kind == "llama3":
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
      raise ValueError(
        f"{where}: high_freq_factor must be above low_freq_factor = {low:g}, "
        f"got {high:g}."
      )
    return Rope(
      float(theta),
      "llama3",
      factor=number("factor"),
      low_frequency_factor=low,
      high_frequency_factor=high,
      original_length=int(number("original_max_position_embeddings")),
    )
  raise ValueError(
    f"{where}: rope_type must be default, linear or llama3, got {kind!r}."
  )


_PROJECTIONS = {
  "query": "self_attn.q_proj",
  "key": "self_attn.k_proj",
  "value": "self_attn.v_proj",
  "out": "self_attn.o_proj",
  "query_norm": "self_attn.q_norm",
  "key_norm": "self_attn.k_norm",
  "wi_0": "mlp.gate_proj",
  "wi_1": "mlp.up_proj",
  "wo": "mlp.down_proj",
}
_NORMS = {"pre_attention_norm": "input_layernorm"}
_TWO_NORMS = {**_NORMS, "pre_mlp_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
  **_NORMS,
  "post_attention_norm": "post_attention_layernorm",
  "pre_mlp_norm": "pre_feedforward_layernorm",
  "post_mlp_norm": "post_feedforward_layernorm",
}


def tensor_of(config: CausalConfig, path: str) -> tuple[str, bool]:
  """Our path of a parameter -> its name in transformers, whether transposed.

  "decoder/layers_3/mlp/wi_0/kernel" -> "model.layers.3.mlp.gate_proj.weight",
  True.
  """
  match path.split("/"):
    case ["token_embedder", _]:
      return "model.embed_tokens.weight", False
    case [_, "logits_dense", _]:
      return "lm_head.weight", True
    case [_, "decoder_norm", _]:
      return "model.norm.weight", False
    case [_, layer, *part, leaf]:
      name = part[-1]
      norms = _FOUR_NORMS if config.post_norms else _TWO_NORMS
      module = norms[name] if name in norms else _PROJECTIONS[name]
      kind = "bias" if leaf == "bias" else "weight"
      number = layer.removeprefix("layers_")
      return f"model.layers.{number}.{module}.{kind}", leaf == "kernel"
  raise ValueError(f"{path} has no name in transformers.")


def save(
  path: epath.Path,
  config: CausalConfig,
  views: Mapping[str, Leaf],
  tokenizer: Any,
  max_shard_bytes: int,
) -> None:
  """Writes a folder that transformers' from_pretrained reads.

  Args: as for `huggingface.save`, but
    tokenizer: `data.tokenizer.Tokenizer`, whose files are written beside, a
      SentencePiece model as a T5's; None for none.

  Raises:
    ValueError: no class of transformers has such a model.
  """
  values = config_values(config, views, tokenizer)
  files: dict[str, Any] = {} if tokenizer is None else tokenizer.files()
  content = files.pop(orbax.VOCABULARY, None)
  if content is not None:
    described = huggingface.read_vocabulary(content)
    files |= huggingface.tokenizer_files(described)
  tensor = functools.partial(tensor_of, config)
  weight_files.save(path, values, views, tensor, max_shard_bytes, files)


def config_values(
  config: CausalConfig, views: Mapping[str, Leaf], tokenizer: Any
) -> dict[str, Any]:
  """The content of config.json; args and errors as of `save`."""
  kind = config.architecture
  check_choice("architecture", kind, _DEFAULTS)
  gemma = kind in _GEMMAS
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  values: dict[str, Any] = {
    "architectures": [_CLASSES[kind]],
    "model_type": kind,
    "vocab_size": config.vocab_size,
    "hidden_size": config.emb_dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    _activation_field(kind): names.get(config.activation, config.activation),
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.logits_via_embedding,
    "attention_bias": config.out_bias,
    "attention_dropout": 0.0,
    **_rope_values(config),
    "torch_dtype": str(views[_EMBEDDING].dtype),
    "use_cache": True,
  }
  first, *others = config.eos_ids or (None,)
  values["eos_token_id"] = [first, *others] if others else first
  if config.pad_id >= 0:
    values["pad_token_id"] = config.pad_id
  elif gemma:
    values["pad_token_id"] = None
  windows = config.windows or (0,) * config.num_layers
  if kind == "llama":
    values["mlp_bias"] = config.mlp_bias
  else:
    values["layer_types"] = [_SLIDING if w else _FULL for w in windows]
    if kind in _QWENS:
      values["use_sliding_window"] = any(windows)
    if any(windows) or not gemma:
      values["sliding_window"] = max(windows) or None
  if gemma:
    scale = config.query_scale or config.head_dim**-0.5
    scalar = scale**-2
    whole = round(scalar)
    values["query_pre_attn_scalar"] = (
      whole if abs(scalar - whole) < 1e-6 * scalar else scalar
    )
    values["attn_logit_softcapping"] = config.attention_cap
    values["final_logit_softcapping"] = config.logit_cap
  if tokenizer is not None and tokenizer.bos_id is not None:
    values["bos_token_id"] = tokenizer.bos_id
  _check_is_one(config, values)
  return values


_CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}


def _check_is_one(config: CausalConfig, values: Mapping[str, Any]) -> None:
  """Raises a ValueError where a class has no field for a switch."""
  kind = config.architecture
  read = _of_network(_config("config.json", kind, values, config.eos_ids))
  for name, value in _of_network(config).items():
    if read[name] != value:
      raise ValueError(
        f"transformers' {kind} has no model with {name} = "
        f"{getattr(config, name)}."
      )


def _of_network(config: CausalConfig) -> dict[str, Any]:
  """Fields that decide what a checkpoint is, as they are for each layer."""
  values = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _OF_COMPUTATION
  }
  every = (0,) * config.num_layers
  ropes = [
    tuple(rope.frequencies(config.head_dim)) for rope in values.pop("ropes")
  ]
  values["layer_ropes"] = [ropes[i] for i in config.layer_ropes or every]
  values["windows"] = config.windows or every
  scale = values.pop("query_scale")
  if config.architecture not in _GEMMAS:  # of which any can be told
    values["query_scale"] = scale or config.head_dim**-0.5
  return values


def _rope_values(config: CausalConfig) -> dict[str, Any]:
  first = config.ropes[0]
  scaling: dict[str, Any] | None = None
  if first.scaling == "linear":
    scaling = {"rope_type": "linear", "factor": first.factor}
  elif first.scaling == "llama3":
    scaling = {
      "rope_type": "llama3",
      "factor": first.factor,
      "low_freq_factor": first.low_frequency_factor,
      "high_freq_factor": first.high_frequency_factor,
      "original_max_position_embeddings": first.original_length,
    }
  values: dict[str, Any] = {
    "rope_theta": first.theta,
    "rope_scaling": scaling,
  }
  if len(config.ropes) > 1:
    values["rope_local_base_freq"] = config.ropes[1].theta
  return values

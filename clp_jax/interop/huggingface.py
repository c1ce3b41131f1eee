"""Hugging Face's T5 folders: v1.0, v1.1, LM-adapted, Flan and mT5.

A folder holds config.json and the weights, in model.safetensors or in parts
with an index, or in pytorch_model.bin, for which PyTorch must be installed.
torch has linear maps as [out, in] and t5x as [in, out]: every matrix but the
embedding is transposed. The rest is a matter of names.

Whether the logit layer is tied to the embedding, the config alone can't say:
transformers 4 writes `tie_word_embeddings`, which is false for v1.1 and which
also decides whether tied logits are scaled; transformers 5 always writes true,
and `scale_decoder_outputs`. See `_decide_tying`.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import sentencepiece
from etils import epath

from clp_jax.errors import check_choice
from clp_jax.interop import leaves, weight_files
from clp_jax.interop.leaves import Leaf
from clp_jax.interop.storage import Folder
from clp_jax.models import layers
from clp_jax.models.t5 import T5Config

VOCABULARY = "spiece.model"

# feed_forward_proj -> mlp_activations. transformers means the tanh
# approximation by "gated-gelu" and "gelu_new", but not by "gelu".
_ACTIVATIONS = {
  "relu": ("relu",),
  "gated-gelu": ("gelu", "linear"),
  "gelu_new": ("gelu",),
  "silu": ("silu",),
  "gated-relu": ("relu", "linear"),
  "gated-silu": ("silu", "linear"),
}
# What the classes of transformers 4 take for a field that is absent.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "t5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
  "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
FAMILIES = tuple(_DEFAULTS)  # model_types
# What is no choice of this network's.
_CONSTANTS = {
  "layer_norm_epsilon": layers.NORM_EPSILON,
  "decoder_start_token_id": T5Config.pad_id,
  "pad_token_id": T5Config.pad_id,
}
_FIELDS = {
  "vocab_size": "vocab_size",
  "emb_dim": "d_model",
  "num_heads": "num_heads",
  "head_dim": "d_kv",
  "num_encoder_layers": "num_layers",
  "mlp_dim": "d_ff",
}
_KEPT = "token_embedder/embedding"  # not transposed
_EMBEDDING = "shared.weight"
_HEAD = "lm_head.weight"
# Other names of the one embedding. A file may hold any of them.
_ALIASES = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
# The first v1.0 checkpoints hold a bias that the network does not use.
_UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
)


def open_folder(
  folder: Folder, mapped: bool
) -> tuple[T5Config, dict[str, Leaf]]:
  """What a folder holds; nothing but headers is read.

  Args:
    folder: with config.json.
    mapped: map pytorch_model.bin into memory rather than read it whole.

  Returns:
    The config and {t5x path: leaf}.

  Raises:
    ValueError: names what is wrong with the folder.
  """
  values = weight_files.read_json(folder, "config.json")
  if values.get("is_encoder_decoder") is False:
    raise ValueError(f"{folder.path} holds only an encoder; give a whole T5.")
  stored = weight_files.read(folder, mapped)
  stored.pop(_UNUSED, None)
  _unify_embeddings(folder, stored)
  config, stored = _decide_tying(folder, values, stored)
  return config, weight_files.model_leaves(
    folder, stored, leaves.expected_shapes(config), tensor_of
  )


def _config(folder: Folder, values: Mapping[str, Any], tied: bool) -> T5Config:
  values = {**_DEFAULTS[values["model_type"]], **values}
  if absent := [name for name in _FIELDS.values() if name not in values]:
    raise ValueError(f"{folder.path}/config.json lacks {', '.join(absent)}.")
  activation = values["feed_forward_proj"]
  where = f"{folder.path}/config.json: feed_forward_proj"
  check_choice(where, activation, _ACTIVATIONS)
  for name, value in _CONSTANTS.items():
    if values.get(name) not in (None, value):
      raise ValueError(
        f"{folder.path}/config.json: {name} must be {value}, got "
        f"{values[name]!r}."
      )
  fields = {ours: values[theirs] for ours, theirs in _FIELDS.items()}
  eos_ids = weight_files.eos_ids(folder, values)
  depth = values.get("num_decoder_layers")
  try:
    return T5Config(
      **fields,
      num_decoder_layers=values["num_layers"] if depth is None else depth,
      mlp_activations=_ACTIVATIONS[activation],
      logits_via_embedding=tied,
      dropout_rate=values.get("dropout_rate", 0.1),
      relative_attention_num_buckets=values.get(
        "relative_attention_num_buckets", 32
      ),
      relative_attention_max_distance=values.get(
        "relative_attention_max_distance", 128
      ),
      eos_ids=eos_ids,
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f"{folder.path}/config.json: {error}") from error


def _unify_embeddings(folder: Folder, stored: dict[str, Leaf]) -> None:
  """Leaves the embedding under its one name."""
  for alias in _ALIASES:
    if alias not in stored:
      continue
    other = stored.pop(alias)
    kept = stored.setdefault(_EMBEDDING, other)
    if kept is not other and not leaves.same(kept, other):
      raise ValueError(
        f"{folder.path} holds a {alias} that differs from {_EMBEDDING}; a T5 "
        "has one embedding."
      )


def _decide_tying(
  folder: Folder, values: Mapping[str, Any], stored: dict[str, Leaf]
) -> tuple[T5Config, dict[str, Leaf]]:
  """Whether the logits come from the embedding, or from a layer of their own.

  The config's word counts for what it decides in the version that wrote it; a
  logit layer that is there and differs from the embedding is never dropped.
  """
  scaled_5 = values.get("scale_decoder_outputs")  # absent in transformers 4
  tied_4 = values.get(
    "tie_word_embeddings",
    _DEFAULTS[values["model_type"]]["tie_word_embeddings"],
  )
  scaled = bool(tied_4 if scaled_5 is None else scaled_5)
  head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
  if head is None and embedding is not None and scaled_5 is False:
    # transformers 5 can tie v1.1: the embedding, but without the scale.
    return _config(folder, values, tied=False), stored | {_HEAD: embedding}
  if head is None or not scaled:
    return _config(folder, values, tied=scaled), stored
  if embedding is not None and leaves.same(head, embedding):
    without = {name: leaf for name, leaf in stored.items() if name != _HEAD}
    return _config(folder, values, tied=True), without
  if scaled_5:
    raise ValueError(
      f"{folder.path}/config.json scales the logits of a tied layer, but "
      f"{_HEAD} differs from {_EMBEDDING}; set scale_decoder_outputs to false, "
      f"or remove {_HEAD}."
    )
  logging.warning(
    "%s: config.json ties the logit layer to the embedding, but %s differs "
    "from it: taken for a layer of its own",
    folder.path,
    _HEAD,
  )
  return _config(folder, values, tied=False), stored


def tensor_of(path: str) -> tuple[str, bool]:
  """t5x's path of a parameter -> its name in transformers, whether transposed.

  "decoder/layers_3/mlp/wi_0/kernel" ->
  "decoder.block.3.layer.2.DenseReluDense.wi_0.weight", True.
  """
  parts = path.split("/")
  if parts[0] == "token_embedder":
    return _EMBEDDING, False
  stack = parts[0]
  match parts[1:]:
    case ["logits_dense", _]:
      return _HEAD, True
    case ["relpos_bias", _]:
      name = "block.0.layer.0.SelfAttention.relative_attention_bias"
    case [norm, "scale"] if norm == f"{stack}_norm":
      name = "final_layer_norm"
    case [layer, part, *rest]:
      place, module = _PLACES[part.removeprefix("pre_").removesuffix(_NORM)]
      if stack == "encoder" and module == "DenseReluDense":
        place = 1
      if part.endswith(_NORM):
        module = "layer_norm"
      else:
        module += f".{_PROJECTIONS.get(rest[0], rest[0])}"
      name = f"block.{layer.removeprefix('layers_')}.layer.{place}.{module}"
  return f"{stack}.{name}.weight", True


_NORM = "_layer_norm"
_PLACES = {  # part of a layer, or what its norm is named for
  "attention": (0, "SelfAttention"),
  "self_attention": (0, "SelfAttention"),
  "encoder_decoder_attention": (1, "EncDecAttention"),
  "cross_attention": (1, "EncDecAttention"),
  "mlp": (2, "DenseReluDense"),
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


class Vocabulary(NamedTuple):
  """A SentencePiece model and what a tokenizer has to know of it."""

  content: bytes
  size: int
  eos_id: int
  special: dict[str, str]  # "eos_token" and so on -> piece


def read_vocabulary(content: bytes) -> Vocabulary:
  """Parses a SentencePiece model.

  Raises:
    ValueError: when it isn't one, or has no end of sequence.
  """
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise ValueError(
      "the vocabulary is not a SentencePiece model; give the content of a "
      ".model file."
    ) from error
  ids = {
    "eos_token": model.eos_id(),
    "pad_token": model.pad_id(),
    "unk_token": model.unk_id(),
  }
  if ids["eos_token"] < 0:
    raise ValueError("the vocabulary has no end of sequence.")
  special = {k: model.id_to_piece(i) for k, i in ids.items() if i >= 0}
  return Vocabulary(content, model.get_piece_size(), ids["eos_token"], special)


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, Any]:
  """Name -> content of what transformers' AutoTokenizer reads of it; text ends
  in EOS, as prompts do here."""
  # T5Tokenizer would append 100 sentinels to the pieces of the model.
  own = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "legacy": False}
  return {
    VOCABULARY: vocabulary.content,
    "tokenizer_config.json": own | vocabulary.special,
  }


def save(
  path: epath.Path,
  config: T5Config,
  views: Mapping[str, Leaf],
  vocabulary: Vocabulary | None,
  max_shard_bytes: int,
) -> None:
  """Writes a folder that transformers' from_pretrained reads.

  Args:
    path: the folder; see `weight_files.save`.
    config: of the model.
    views: from `leaves.views`.
    vocabulary: written next to the weights; None for none.
    max_shard_bytes: more than this goes to several files.

  Raises:
    ValueError: when transformers has no name for the activations.
  """
  values = _config_values(config, views)
  files = {} if vocabulary is None else tokenizer_files(vocabulary)
  weight_files.save(path, values, views, tensor_of, max_shard_bytes, files)


def _config_values(
  config: T5Config, views: Mapping[str, Leaf]
) -> dict[str, Any]:
  names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  if config.mlp_activations not in names:
    raise ValueError(
      f"transformers has no T5 with mlp_activations {config.mlp_activations}; "
      f"expected one of {', '.join(map(str, names))}."
    )
  # 1 is what transformers takes for a field that is absent.
  first, *others = config.eos_ids or (1,)
  return {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
    "num_decoder_layers": config.num_decoder_layers,
    "feed_forward_proj": names[config.mlp_activations],
    "tie_word_embeddings": config.logits_via_embedding,
    "scale_decoder_outputs": config.logits_via_embedding,
    "dropout_rate": config.dropout_rate,
    "relative_attention_num_buckets": config.relative_attention_num_buckets,
    "relative_attention_max_distance": config.relative_attention_max_distance,
    "is_encoder_decoder": True,
    **_CONSTANTS,
    "eos_token_id": [first, *others] if others else first,
    "torch_dtype": str(views[_KEPT].dtype),
  }

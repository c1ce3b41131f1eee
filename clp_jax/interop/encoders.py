"""Hugging Face's names for the encoders that label a text.

BERT, RoBERTa and XLM-RoBERTa, DistilBERT, and DeBERTa-v3. A field that this
network has no switch for is refused by name, if it is set.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from clp_jax.errors import check_choice
from clp_jax.interop import weight_files
from clp_jax.interop.causal import ACTIVATIONS
from clp_jax.models.encoder import EncoderConfig


class _Family(NamedTuple):
  """Where the parts of a family are."""

  prefix: str
  layers: str
  pool: str
  head: str
  pool_activation: str


_BERT = _Family(
  "bert", "bert.encoder.layer", "bert.pooler.dense", "classifier", "tanh"
)
_ROBERTA = _Family(
  *("roberta", "roberta.encoder.layer"),
  *("classifier.dense", "classifier.out_proj", "tanh"),
)
_FAMILIES = {  # by model_type
  "bert": _BERT,
  "roberta": _ROBERTA,
  "xlm-roberta": _ROBERTA,
  "distilbert": _Family(
    *("distilbert", "distilbert.transformer.layer"),
    *("pre_classifier", "classifier", "relu"),
  ),
  "deberta-v2": _Family(
    *("deberta", "deberta.encoder.layer"),
    *("pooler.dense", "classifier", "gelu_exact"),
  ),
}
MODEL_TYPES = tuple(_FAMILIES)
_LAYER = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "out": "attention.output.dense",
  "attention_norm": "attention.output.LayerNorm",
  "wi": "intermediate.dense",
  "wo": "output.dense",
  "mlp_norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
  "query": "attention.q_lin",
  "key": "attention.k_lin",
  "value": "attention.v_lin",
  "out": "attention.out_lin",
  "attention_norm": "sa_layer_norm",
  "wi": "ffn.lin1",
  "wo": "ffn.lin2",
  "mlp_norm": "output_layer_norm",
}
_TABLES = {
  "token_embedder": "embeddings.word_embeddings",
  "positions": "embeddings.position_embeddings",
  "segments": "embeddings.token_type_embeddings",
  "embedding_norm": "embeddings.LayerNorm",
  "distances": "encoder.rel_embeddings",
  "distance_norm": "encoder.LayerNorm",
}
_DEFAULTS: dict[str, Any] = {
  "vocab_size": 30522,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "hidden_act": "gelu",
  "max_position_embeddings": 512,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
  "pad_token_id": 0,
  "position_embedding_type": "absolute",
  "is_decoder": False,
}
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
  "bert": {},
  "roberta": {"vocab_size": 50265, "pad_token_id": 1},
  "xlm-roberta": {"vocab_size": 30522, "pad_token_id": 1},
  "distilbert": {"num_hidden_layers": 6},
  "deberta-v2": {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "pooler_hidden_act": "gelu",
  },
}
# DistilBERT's names of these fields.
_DISTILBERT_FIELDS = {
  "dim": "hidden_size",
  "n_layers": "num_hidden_layers",
  "n_heads": "num_attention_heads",
  "hidden_dim": "intermediate_size",
  "activation": "hidden_act",
}
# Ends of names of tensors that a folder may hold too: numbers of positions, as
# old versions of transformers wrote them, and what DeBERTa v3 and RoBERTa were
# trained with.
UNUSED = (
  *(".position_ids", ".token_type_ids"),
  "deberta.embeddings.position_embeddings.weight",
  *("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
)
# Fields that may be there, but only so.
_ONLY = {"position_embedding_type": ("absolute",), "is_decoder": (False,)}


def read_config(
  where: str, values: Mapping[str, Any], num_labels: int
) -> EncoderConfig:
  """The config of an encoder of num_labels, out of the values of a config.json;
  `where` is the file, for messages.

  Raises:
    ValueError: names the field that is not known or not valid.
  """
  weight_files.check_only(where, _DEFAULTS | dict(values), _ONLY)
  try:
    return _config(values["model_type"], values, num_labels)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{where}: {error}") from error


def _config(
  kind: str, values: Mapping[str, Any], num_labels: int
) -> EncoderConfig:
  if kind == "distilbert":
    named = {_DISTILBERT_FIELDS.get(k, k): v for k, v in values.items()}
    values = named | {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
  values = {**_DEFAULTS, **_DEFAULTS_OF[kind], **values}
  family = _FAMILIES[kind]
  pool = family.pool_activation
  buckets = first = 0
  if kind == "deberta-v2":
    _check_is_v3(values)
    buckets = values["position_buckets"]
    pool = _activation(values, "pooler_hidden_act")
  if family is _ROBERTA:  # positions of padding come first
    first = values["pad_token_id"] + 1
  return EncoderConfig(
    vocab_size=values["vocab_size"],
    emb_dim=values["hidden_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=values["num_attention_heads"],
    mlp_dim=values["intermediate_size"],
    activation=_activation(values, "hidden_act"),
    norm_epsilon=values["layer_norm_eps"],
    max_length=values["max_position_embeddings"] - first,
    num_labels=num_labels,
    pool_activation=pool,
    first_position=first,
    num_segments=values["type_vocab_size"],
    buckets=buckets,
  )


def _activation(values: Mapping[str, Any], field: str) -> str:
  check_choice(field, values[field], ACTIVATIONS)
  return ACTIVATIONS[values[field]]


def _check_is_v3(values: Mapping[str, Any]) -> None:
  """Raises a ValueError unless a DeBERTa is built as those of version 3."""
  terms = values.get("pos_att_type") or ()
  if isinstance(terms, str):
    terms = terms.split("|")
  width, size = values["hidden_size"], values["max_position_embeddings"]
  for name, is_v3 in {
    "relative_attention": values.get("relative_attention") is True,
    "share_att_key": values.get("share_att_key") is True,
    "position_biased_input": values.get("position_biased_input") is False,
    "norm_rel_ebd": values.get("norm_rel_ebd") == "layer_norm",
    "conv_kernel_size": not values.get("conv_kernel_size"),
    "type_vocab_size": values["type_vocab_size"] == 0,
    "pos_att_type": sorted(t.strip() for t in terms) == ["c2p", "p2c"],
    "position_buckets": values.get("position_buckets", -1) > 1,
    "max_relative_positions": values.get("max_relative_positions", -1)
    in (-1, size),
    "embedding_size": values.get("embedding_size", width) == width,
  }.items():
    if not is_v3:
      raise ValueError(
        f"of the DeBERTas those of version 3 alone are read, in which {name} "
        f"is not {values.get(name)!r}."
      )


def tensor_of(kind: str, path: str) -> tuple[str, bool]:
  """Our path of a parameter -> its name in transformers, whether transposed.

  "bert", "encoder/layers_3/mlp/wi/kernel" ->
  "bert.encoder.layer.3.intermediate.dense.weight", True.
  """
  family = _FAMILIES[kind]
  *modules, leaf = path.split("/")
  if modules and modules[-1] in ("pool", "head"):
    name = family.pool if modules[-1] == "pool" else family.head
  elif modules and modules[-1] in _LAYER:
    number = modules[1].removeprefix("layers_")
    names = _DISTILBERT_LAYER if kind == "distilbert" else _LAYER
    name = f"{family.layers}.{number}.{names[modules[-1]]}"
    if kind == "deberta-v2" and modules[-1] in ("query", "key", "value"):
      name += "_proj"
  else:
    table = leaf if leaf in _TABLES else modules[-1]
    name = f"{family.prefix}.{_TABLES[table]}"
  kind_of_leaf = "bias" if leaf == "bias" else "weight"
  return f"{name}.{kind_of_leaf}", leaf == "kernel"

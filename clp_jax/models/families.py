"""The families of models: a new one is a line here."""

import dataclasses
from typing import Any

from clp_jax.models.causal import CausalConfig
from clp_jax.models.causal_lm import CausalLM
from clp_jax.models.encoder_decoder import EncoderDecoder
from clp_jax.models.layers import T5Config
from clp_jax.models.model import Model

Config = T5Config | CausalConfig

# Name in model.json -> config and model.
FAMILIES: dict[str, tuple[Any, Any]] = {
  "t5": (T5Config, EncoderDecoder),
  "causal": (CausalConfig, CausalLM),
}


def build(config: Config) -> Model:
  """The model that a config describes."""
  for config_type, model_type in FAMILIES.values():
    if isinstance(config, config_type):
      return model_type(config)
  raise TypeError(f"{type(config).__name__} is the config of no family.")


def to_json(config: Config) -> dict[str, Any]:
  """The content of a model.json; the inverse of `from_json`."""
  (family,) = (k for k, (t, _) in FAMILIES.items() if isinstance(config, t))
  # A T5's holds its fields alone, as all versions read it.
  named = {} if family == "t5" else {"family": family}
  return named | dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> Config:
  """The config that `to_json` described.

  Raises:
    ValueError: for an unknown family or a field that is not valid.
  """
  fields = dict(values)
  family = fields.pop("family", "t5")
  if family not in FAMILIES:
    raise ValueError(
      f"family must be one of {', '.join(FAMILIES)}, got {family!r}; this "
      "version of clp_jax may be older than the run."
    )
  return FAMILIES[family][0](**fields)

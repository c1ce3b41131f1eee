"""clp_jax: Conditional Language Policy in JAX.

One T5 whose parameters are a convex combination of per-objective parameter
sets, steered between rewards at inference by a weighting.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from clp_jax import interop
  from clp_jax.conditioning import expand, mix, steerable_leaves
  from clp_jax.models.t5 import T5, T5Config
  from clp_jax.policy import Policy
  from clp_jax.weightings import coefficients

__all__ = [
  "T5",
  "Policy",
  "T5Config",
  "coefficients",
  "expand",
  "interop",
  "mix",
  "steerable_leaves",
]

# Where each name lives. Imported on first use: `clp --help` needs no JAX, and
# mixing parameters no TensorFlow.
_MODULES = {
  "T5": "clp_jax.models.t5",
  "T5Config": "clp_jax.models.t5",
  "Policy": "clp_jax.policy",
  "coefficients": "clp_jax.weightings",
  "expand": "clp_jax.conditioning",
  "mix": "clp_jax.conditioning",
  "steerable_leaves": "clp_jax.conditioning",
}


def __getattr__(name: str) -> Any:
  if name == "interop":
    return importlib.import_module("clp_jax.interop")
  if name in _MODULES:
    return getattr(importlib.import_module(_MODULES[name]), name)
  raise AttributeError(f"module 'clp_jax' has no attribute {name!r}")

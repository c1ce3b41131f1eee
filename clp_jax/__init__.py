"""clp_jax: Conditional Language Policy in JAX.

One T5 whose parameters are a convex combination of per-objective parameter
sets, steered between rewards at inference by a weighting.
"""

import importlib
from typing import TYPE_CHECKING

from clp_jax.conditioning import expand, mix, steerable_leaves
from clp_jax.weightings import coefficients

if TYPE_CHECKING:
  from clp_jax import interop
  from clp_jax.models.t5 import T5, T5Config
  from clp_jax.policy import Policy

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

# Imported on first use, so that `import clp_jax` stays fast.
_LAZY = {
  "T5": "clp_jax.models.t5",
  "T5Config": "clp_jax.models.t5",
  "Policy": "clp_jax.policy",
}


def __getattr__(name: str):
  if name == "interop":
    return importlib.import_module("clp_jax.interop")
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f"module 'clp_jax' has no attribute {name!r}")

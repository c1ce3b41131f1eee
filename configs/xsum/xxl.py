"""CLP on XSum between NLI and ROUGE, T5-xxl.

  clp train --config configs/xsum/xxl.py --workdir runs/xsum-xxl \
    --config.model.init=PATH_OF_T5_XXL \
    --config.rewards.nli.model=PATH_OF_AN_ENTAILMENT_T5

Differs from base.py in that matrices are cut over 4 devices (mesh.model) and a
step has more prompts and weightings.
base.py says what it needs.
"""

import ml_collections

from clp_jax import paper


def get_config() -> ml_collections.ConfigDict:
  return paper.get_config("xsum", "xxl")

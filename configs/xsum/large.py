"""CLP on XSum between NLI and ROUGE, T5-large.

  clp train --config configs/xsum/large.py --workdir runs/xsum-large \
    --config.model.init=PATH_OF_T5_LARGE \
    --config.rewards.nli.model=PATH_OF_AN_ENTAILMENT_T5

Differs from base.py in the model it is given, and a step has more prompts and
weightings.
base.py says what it needs.
"""

import ml_collections

from clp_jax import paper


def get_config() -> ml_collections.ConfigDict:
  return paper.get_config("xsum", "large")

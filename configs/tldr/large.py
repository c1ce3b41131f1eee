"""CLP on Reddit TL;DR between NLI and ROUGE, T5-large.

  clp train --config configs/tldr/large.py --workdir runs/tldr-large \
    --config.model.init=PATH_OF_T5_LARGE \
    --config.rewards.nli.model=PATH_OF_AN_ENTAILMENT_T5

Differs from base.py in the model it is given, and a step has more prompts and
weightings.
base.py says what it needs.
"""

import ml_collections

from clp_jax import paper


def get_config() -> ml_collections.ConfigDict:
  return paper.get_config("tldr", "large")

"""CLP on XSum between NLI and ROUGE, T5-large.

  clp train --config configs/xsum/large.py --workdir runs/xsum-large \
    --config.model.init=PATH_OF_T5_LARGE \
    --config.rewards.nli.model=PATH_OF_AN_ENTAILMENT_T5

Needs the data (tfds build xsum, after the manual download it asks for),
a T5 v1.1, LM-adapted or Flan checkpoint of this size, and a T5 that answers in
the format of TRUE. The third reward, a preference model of `clp train-reward`:

    --config.objectives="('nli', 'rouge', 'tldr')" \
    --config.rewards.tldr.model=PATH_OF_A_train-reward_RUN

Differs from base.py in the model it is given, and a step has more prompts and
weightings.
clp_jax/paper.py says what of these settings is the paper's and what is ours.
"""

import ml_collections

from clp_jax import paper


def get_config() -> ml_collections.ConfigDict:
  """The settings."""
  return paper.get_config("xsum", "large")

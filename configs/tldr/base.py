"""CLP on Reddit TL;DR between NLI and ROUGE, T5-base.

  clp train --config configs/tldr/base.py --workdir runs/tldr-base \
    --config.model.init=PATH_OF_T5_BASE \
    --config.rewards.nli.model=PATH_OF_AN_ENTAILMENT_T5

Needs the data (tfds build reddit; config.data.tfds_data_dir says where it is,
if not in TFDS's own folder),
a T5 v1.1, LM-adapted or Flan checkpoint of this size, and a T5 that answers in
the format of TRUE. The third reward, a preference model of `clp train-reward`:

    --config.objectives="('nli', 'rouge', 'tldr')" \
    --config.rewards.tldr.model=PATH_OF_A_train-reward_RUN

Parameters and optimizer state are cut over the data axis.
clp_jax/paper.py says what of these settings is the paper's and what is ours.
"""

import ml_collections

from clp_jax import paper


def get_config() -> ml_collections.ConfigDict:
  return paper.get_config("tldr", "base")

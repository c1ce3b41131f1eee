"""A preference model, from pairs of responses to a document.

  clp train-reward --config configs/reward.py --workdir runs/reward \
    --config.data.train=pairs.jsonl --config.data.eval=held_out_pairs.jsonl \
    --config.model.init=PATH_OF_A_MODEL

A line is an object with "document", "chosen" and "rejected". The result is a
reward of other runs, whose rewards.preference.model is then runs/reward.
"""

import ml_collections

from clp_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Defaults: a linear head, 1,000 steps of 32 pairs."""
  config = config_lib.get_config()
  config.data.task = None
  return config

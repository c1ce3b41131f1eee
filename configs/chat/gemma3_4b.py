"""CLP of an instruct model between helpful and brief, Gemma 3 4B.

  clp train --config configs/chat/gemma3_4b.py --workdir runs/chat \
    --config.model.init=PATH_OF_GEMMA3 \
    --config.data.train=train.jsonl --config.data.eval=dev.jsonl \
    --config.rewards.helpful.model=PATH_OF_A_train-reward_RUN

A line of the data is an object with a "prompt"; conversations, under
"messages", take --config.data.template=None and
--config.data.document_field=messages (see docs/own-data.md). Against harmless
instead of brief:

    --config.objectives="('helpful', 'harmless')" \
    --config.rewards.harmless.model=PATH_OF_ANOTHER_train-reward_RUN

--config.steering=attention or lora holds less in memory.
"""

import ml_collections

from clp_jax import chat


def get_config() -> ml_collections.ConfigDict:
  """The settings."""
  return chat.get_config("gemma3-4b")

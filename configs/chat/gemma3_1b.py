"""CLP of an instruct model between helpful and brief, Gemma 3 1B.

  clp train --config configs/chat/gemma3_1b.py --workdir runs/chat \
    --config.model.init=PATH_OF_GEMMA3 \
    --config.data.train=train.jsonl --config.data.eval=dev.jsonl \
    --config.rewards.helpful.model=PATH_OF_A_train-reward_RUN

clp_jax/chat.py says what else can be chosen.
"""

import ml_collections

from clp_jax import chat


def get_config() -> ml_collections.ConfigDict:
  return chat.get_config("gemma3-1b")

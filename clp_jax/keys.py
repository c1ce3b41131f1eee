"""Random keys: which number is folded into which key, in one place.

A run's key is only ever folded, with the number of a step or with one that no
step has, so that a resumed run draws what an uninterrupted one would have
drawn.
"""

import jax
import numpy as np

# Of the seed, which as it is makes a training run's key.
MODEL = 0x1217  # a preset's first parameters; no run's key depends on a model
SUPERVISED = 0x5F7  # a supervised run's key
REWARD_MODEL = 0xB7  # a reward model's
# Of a run's key: steps end at LAST_STEP, so that none has these numbers.
BANK = 2**32 - 2  # what of the bank starts random
CRITIC = 2**32 - 1  # its hidden layer
PROMPTS = 2**32 - 1  # of a supervised run, then by step: which prompts
# Rollouts before training count down from here: training never comes so far.
LAST_STEP = int(np.iinfo(np.int32).max)


def of_seed(seed: int) -> jax.Array:
  """The key of a seed modulo 2**64, of which jax.random.key takes 32 bits."""
  high, low = divmod(int(seed) % 2**64, 2**32)
  key = jax.random.key(low)
  return jax.random.fold_in(key, high) if high else key


def of_step(key: jax.Array, step: jax.Array) -> jax.Array:
  """Three keys of a step, [] int32 completed updates, of a run's key: for
  weightings, samples and the update."""
  return jax.random.split(jax.random.fold_in(key, step), 3)

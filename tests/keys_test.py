"""The numbers that are folded into keys: runs that exist were drawn by them."""

import jax
import numpy as np

from clp_jax import keys


def test_the_numbers_are_those_of_runs_that_exist():
  assert (keys.MODEL, keys.SUPERVISED, keys.REWARD_MODEL) == (4631, 1527, 183)
  assert (keys.BANK, keys.CRITIC, keys.PROMPTS) == (
    4294967294,
    4294967295,
    4294967295,
  )
  assert keys.LAST_STEP == 2147483647


def test_seeds_of_64_bits_have_keys_of_their_own():
  seeds = [0, 3, 2**31 + 1, 2**32 - 1]
  own = [jax.random.key_data(keys.of_seed(seed)) for seed in seeds]
  jaxs = [jax.random.key_data(jax.random.key(seed)) for seed in seeds]
  np.testing.assert_array_equal(own, jaxs)
  long = [2**32, 3 + 2**32, 2**63, 2**64 - 1]
  own += [jax.random.key_data(keys.of_seed(seed)) for seed in long]
  assert len(np.unique(own, axis=0)) == 8
  np.testing.assert_array_equal(jax.random.key_data(keys.of_seed(-1)), own[-1])


def test_steps_share_no_key():
  key = jax.random.key(3)
  drawn = [jax.random.key_data(keys.of_step(key, step)) for step in (0, 1, 2)]
  assert len(np.unique(np.concatenate(drawn), axis=0)) == 9

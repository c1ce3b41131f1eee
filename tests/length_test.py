"""The length reward."""

import numpy as np
import pytest

from clp_jax.rewards.base import load_reward
from clp_jax.rewards.length import length


def words(*counts):
  return [" ".join(["word"] * n) for n in counts]


def test_is_1_at_the_asked_for_length_and_falls_on_both_sides():
  responses = words(0, 2, 8, 11, 16, 30)
  scores = length(responses, responses, responses, words=8)
  np.testing.assert_allclose(scores, [0, 0.25, 1, 0.625, 0, 0])
  assert scores.dtype == np.float32


def test_counts_what_white_space_separates():
  scores = length([""], [""], ["  one\ttwo,three \n four  "], words=3)
  np.testing.assert_allclose(scores, [1])


def test_the_config_says_how_many_words():
  reward = load_reward("brief", {"source": "length", "words": 5})
  texts = words(4)
  np.testing.assert_allclose(reward.score(texts, texts, texts), [0.8])


@pytest.mark.parametrize("number", [0, -3, float("nan")])
def test_refuses_no_words(number):
  with pytest.raises(ValueError, match="needs words > 0"):
    length([""], [""], [""], words=number)

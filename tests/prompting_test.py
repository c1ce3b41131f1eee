"""Weightings in the prompt: what is written, where, and by which programs."""

import dataclasses
import functools
import pathlib

import both_families
import jax
import jax.numpy as jnp
import moft_test
import numpy as np
import pytest
import small_decoder
from both_families import DECODER, LISTED_DECODER, T5, cases, reference
from moft_test import make_config, mesh_of, prompts_of

from clp_jax import build, prompting, sharding
from clp_jax.data import tokenizer
from clp_jax.data import vocabulary as vocabularies
from clp_jax.errors import ConfigError
from clp_jax.weightings import Distribution, Weighting

T5_VOCABULARY = (
  pathlib.Path(__file__).parents[2]
  / "shared"
  / "data"
  / "t5_cc_all.32000.100extra.model"
)
LEVELS = tuple(f"0.{i}" for i in range(1, 10))


@pytest.fixture(scope="module")
def vocabulary():
  """Words of which some alphas take one piece and some two."""
  words = ("rouge:", "nli:", "kl:", "0", "1", *LEVELS, "|", "a", "mill")
  alphas = "0.01 0.013 0.016 0.02 0.032 0.04 0.05 0.063 0.079".split()
  content = vocabularies.word_model([*words, *alphas], punctuation=["5", "."])
  return vocabularies.Vocabulary("words.model", content)


def weighting_of(weights, alpha=0.0):
  weights = jnp.asarray(weights, jnp.float32)
  return Weighting(weights, jnp.broadcast_to(alpha, weights.shape[:1]))


def rows_of(vocabulary, texts, length):
  return tokenizer.inputs(vocabulary, texts, length)


def test_text_prompts_are_the_tokens_of_the_documented_text(vocabulary):
  prompts = prompting.text_prompts(
    vocabulary, ("rouge", "nli"), 10, alpha_range=(0.01, 0.1)
  )
  tokens = rows_of(vocabulary, ["a mill.", "mill", "a", "a a mill"], 7)
  # One group of two rows each; 0.025 takes two pieces, other alphas one.
  weighting = Weighting(
    jnp.float32([[0.68, 0.32], [0.0, 1.0]]), jnp.float32([0.0317, 0.0249])
  )
  got = prompts.prepend(jnp.asarray(tokens), weighting)
  expected = rows_of(
    vocabulary,
    [
      "rouge: 0.7 nli: 0.3 kl: 0.032 | a mill.",
      "rouge: 0.7 nli: 0.3 kl: 0.032 | mill",
      "rouge: 0 nli: 1 kl: 0.025 | a",
      "rouge: 0 nli: 1 kl: 0.025 | a a mill",
    ],
    7 + prompts.length,
  )
  np.testing.assert_array_equal(got, expected)


def test_terms_are_spaced_whatever_the_tokenizer():
  """Byte-level BPE begins no text with a space."""
  words = small_decoder.make_tokenizer()
  prompts = prompting.text_prompts(words, ("rouge", "nli"), 10, (0.01, 0.1))
  weighting = weighting_of([[0.7, 0.3]], 0.0317)
  (row,) = np.asarray(prompts.prefix(weighting))
  text = words.decode(row[row >= 0].tolist())
  assert text == "rouge: 0.7 nli: 0.3 kl: 0.032 |"


def test_a_short_term_leaves_no_gap(vocabulary):
  prompts = prompting.text_prompts(vocabulary, ("rouge",), 4, None)
  shape = prompts.terms.shape  # 0.25 and 0.75 take one piece more than 0.5
  assert shape == (1, 5, 3) and (prompts.terms[0, 2] == 0).sum() == 1
  tokens = jnp.asarray(rows_of(vocabulary, ["a mill", "mill"], 5))
  got = prompts.prepend(tokens, weighting_of([[0.25], [0.5]]))
  np.testing.assert_array_equal(
    got,
    rows_of(vocabulary, ["rouge: 0.25 | a mill", "rouge: 0.5 | mill"], 9),
  )


@pytest.mark.skipif(not T5_VOCABULARY.exists(), reason="no T5 vocabulary here")
def test_t5s_vocabulary_reads_the_format_and_has_sentinels():
  t5_vocabulary = vocabularies.read(T5_VOCABULARY)
  prompts = prompting.text_prompts(t5_vocabulary, ("nli", "tldr"), 20, None)
  text = "A museum in Zürich, bought for $3m."
  tokens = jnp.asarray(rows_of(t5_vocabulary, [text], 24))
  got = prompts.prepend(tokens, weighting_of([[0.349, 0.651]]))
  expected = f"nli: 0.35 tldr: 0.65 | {text}"
  np.testing.assert_array_equal(
    got, rows_of(t5_vocabulary, [expected], 24 + prompts.length)
  )
  ids = t5_vocabulary.control_ids(32128)
  names = [t5_vocabulary.tokenizer.id_to_piece(i) for i in ids[:2]]
  assert [n.strip("▁") for n in names] == ["<extra_id_0>", "<extra_id_1>"]
  assert len(ids) == len(set(ids)) > 100 and max(ids) == 32127
  assert not t5_vocabulary.allowed(32128)[ids].any()


def test_weights_are_rounded_by_themselves_and_alpha_in_its_logarithm():
  prompts = prompting.control_prompts(range(100, 130), 3, 10, (0.01, 1.0))
  weighting = Weighting(
    jnp.float32([[1 / 3, 1 / 3, 1 / 3], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]),
    jnp.float32([0.01, 0.1, 1.0]),
  )
  np.testing.assert_array_equal(
    prompts.levels(weighting), [[3, 3, 3, 0], [2, 8, 0, 5], [10, 0, 0, 10]]
  )
  prefix = prompts.prefix(weighting)
  np.testing.assert_array_equal(
    prefix[1], [111, 102, 112, 108, 113, 100, 114, 105]
  )
  one = prompting.control_prompts(range(100, 130), 3, 10, (0.1, 0.1))
  assert (one.levels(weighting)[:, 3] == 0).all()


def test_sft_gives_a_share_of_rows_a_weighting_of_their_own():
  prompts = prompting.control_prompts(range(50, 70), 2, 10, None)
  tokens = jnp.asarray(prompts_of(0, rows=200))
  prepend = functools.partial(
    prompts.prepend_to_some,
    tokens,
    distribution=Distribution(num_rewards=2),
    share=0.3,
  )
  rows = np.asarray(prepend(jax.random.key(0)))
  chosen = rows[:, 0] >= 50
  assert 0.2 < chosen.mean() < 0.4
  padded = np.pad(np.asarray(tokens), ((0, 0), (0, 4)))
  np.testing.assert_array_equal(rows[~chosen], padded[~chosen])
  np.testing.assert_array_equal(rows[chosen, 4:], np.asarray(tokens)[chosen])
  levels = rows[chosen][:, [1, 3]] - 50
  assert len(np.unique(levels[:, 0])) > 5
  assert (abs(levels.sum(1) - 10) <= 1).all()
  again = prepend(jax.random.key(0))
  np.testing.assert_array_equal(rows, again)
  assert not np.array_equal(rows, prepend(jax.random.key(1)))


def ragged_prompts(model):
  """Of words of the tests' model, some terms shorter than others."""
  terms = [[[3, 0], [3, 4], [5, 6]], [[7, 8], [9, 0], [9, 10]]]
  terms = both_families.with_padding(model, terms)
  return prompting.Prompts(terms, np.int32([11]), None, model.pad_id)


def control_prompts(model):
  """Of rows that no token uses."""
  ids = np.flatnonzero(~both_families.allowed(model))[-5:]
  assert ids[0] > 13
  return prompting.control_prompts(ids, 2, 2, None, model.pad_id)


def with_rows(model):
  return dataclasses.replace(model, vocab_size=20)


@pytest.mark.parametrize(
  "model, make",
  cases(
    (True, T5, ragged_prompts),
    (True, LISTED_DECODER, ragged_prompts),
    (False, DECODER, ragged_prompts),
    (False, with_rows(T5), control_prompts),
    (True, with_rows(LISTED_DECODER), control_prompts),
  ),
)
def test_a_rollout_prompts_its_policies_and_not_the_reference(model, make):
  config = make_config(**{"prompting.style": "text", "steering": "none"})
  prompts, start = make(model), reference(model)
  documents = prompts_of(0, model=model)
  programs = moft_test.make_programs(config, mesh_of(), model, prompts)
  state = programs.init(start, jax.random.key(1))
  rollouts = [
    programs.scored_rollout(state, start, documents, np.int32(step))
    for step in range(3)
  ]
  assert programs.rollout._cache_size() == 1  # weightings are data
  written = set()
  for rollout in rollouts:
    rows = np.asarray(rollout.encoder_input_tokens)
    width = 7 + prompts.length
    assert rows.shape == (8, width)
    expected = np.full([8, width], model.pad_id)
    for i, document in enumerate(documents):
      levels = np.round(np.asarray(rollout.weighting.weights)[i // 4] * 2)
      written.add(tuple(levels))
      terms = [prompts.terms[j, int(q)] for j, q in enumerate(levels)]
      row = np.concatenate([*terms, prompts.end, document])
      row = row[row != model.pad_id]
      expected[i, : len(row)] = row
    np.testing.assert_array_equal(rows, expected)
    # What only prompts are made of is never said.
    allowed = both_families.allowed(model)
    assert allowed[np.asarray(rollout.tokens)[rollout.mask]].all()
    for inputs, logp in ((rows, rollout.logp), (documents, rollout.ref_logp)):
      own = both_families.plain_logp(
        model, start, inputs, rollout.tokens, over=allowed
      )
      own = np.where(rollout.mask, own, 0)
      np.testing.assert_allclose(logp, own, atol=2e-5)
  assert len(written) > 1


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda v: prompting.text_prompts(v, ("tldr",), 10, None),
      "no pieces for the prompt 'tldr: 0'.*control_tokens",
    ),
    (
      lambda v: prompting.control_prompts(range(12), 2, 10, None),
      "need 13 control tokens, but the model has 12",
    ),
    (
      lambda v: moft_test.make_programs(
        make_config(**{"prompting.style": "text"}), sharding.make_mesh(8)
      ),
      "prompting.style = text needs the prompts",
    ),
  ],
)
def test_what_can_not_be_written_is_refused(vocabulary, make, message):
  with pytest.raises(ValueError, match=message):
    make(vocabulary)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"prompting.style": "words"}, "none, text, control_tokens, got 'words'"),
    ({"prompting.sft_share": 0.5}, "style = none writes no prompts"),
    ({"prompting.style": "text", "prompting.levels": 0}, "levels must be > 0"),
    ({"prompting.style": "text", "prompting.sft_share": 2.0}, r"in \[0, 1\]"),
    ({"conditioning.kl_set": "frozen"}, "no set for the KL term"),
    ({"conditioning.kl_set": "maybe"}, "trained, frozen, got 'maybe'"),
    ({"conditioning.shared": "no"}, "trained, frozen, got 'no'"),
    ({"steering": "lora", "adapters.rank": 0}, "rank must be at least 1"),
    ({"steering": "lora", "adapters.scale": 0.0}, "scale must be a finite num"),
    ({"steering": "lora", "adapters.scale": -1.0}, "> 0, got -1"),
    ({"steering": "svd_lora", "adapters.scale": float("inf")}, "> 0, got inf"),
    ({"steering": "lora", "adapters.scale": float("nan")}, "> 0, got nan"),
    ({"steering": "lora", "adapters.targets": ("x",)}, "attention, mlp, got x"),
    ({"steering": "none", "conditioning.shared": "frozen"}, "nothing to train"),
    ({"soft_tokens.length": 0}, "soft_tokens.length must be > 0"),
    ({"steering": "lor"}, "full, attention, logits, lora, svd_lora, none"),
  ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    build.validate(make_config(**changes))

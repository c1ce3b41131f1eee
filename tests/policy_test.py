"""Policy: one steerable model out of a run's folder."""

import functools
import gc
import pathlib
import subprocess
import sys
import weakref

import both_families
import jax
import numpy as np
import pytest
import runs

import clp_jax
from clp_jax.data import tokenizer
from clp_jax.models import decoding

TEXTS = [
  "Brivane opened the museum. It happened in Merrowby.",
  "Captain Farrogan saved the mill. Word spread on Friday.",
  "Wexcombe praised the factory.",
]


@pytest.fixture(
  scope="module",
  params=["tiny", pytest.param("tiny-decoder", marks=pytest.mark.slow)],
)
def policy(request, sft_runs):
  """Two sets that differ, KL's among three: alpha varies in this run."""
  sft_run = sft_runs(request.param)
  workdir = pathlib.Path(sft_run).parent / "policy"
  fields = {"weightings.alpha_range": "(0.01,0.5)"}
  runs.make_run(workdir, sft_run, **fields)
  return clp_jax.Policy.load(str(workdir))


def test_params_are_the_mixture_of_the_sets(policy):
  mixed = policy.params({"nli": 0.25, "rouge": 0.75}, alpha=0.2)
  c = np.float32([0.8 * 0.75, 0.8 * 0.25, 0.2])  # rouge, nli, KL
  jax.tree.map(
    lambda m, s: np.testing.assert_allclose(
      m, np.tensordot(c, np.asarray(s), 1), atol=1e-6
    ),
    mixed,
    policy.sets,
  )


def test_what_is_compiled_for_a_policy_is_freed_with_it(policy):
  """An experiment loads hundreds in one process."""
  own = clp_jax.Policy.load(policy.workdir)
  weights = {name: 1 / len(own.objectives) for name in own.objectives}
  own.generate(["A mill."], weights, 0.1)
  own.score(["A mill."], ["The mill."], weights, 0.1)
  decoder = weakref.ref(own.decoder)
  del own
  gc.collect()
  assert decoder() is None


def test_score_is_the_sum_of_the_tokens_log_probabilities(policy):
  responses = ["Brivane opened the museum.", "Farrogan saved", "Wexcombe"]
  weights = {"nli": 0.25, "rouge": 0.75}
  scores = policy.score(TEXTS, responses, weights=weights, alpha=0.1)
  assert scores.shape == (3,) and scores.dtype == np.float32
  params = policy.params(weights, 0.1)
  for text, response, score in zip(TEXTS, responses, scores, strict=True):
    prompt = tokenizer.inputs(policy.vocabulary, [text], 56)
    ids = [*policy.vocabulary.encode(response), policy.vocabulary.eos_id]
    tokens = np.zeros([1, 18], np.int32)
    tokens[0, : len(ids)] = ids
    logp = both_families.plain_logp(policy.model_config, params, prompt, tokens)
    np.testing.assert_allclose(score, logp[0, : len(ids)].sum(), rtol=1e-5)


def test_log_probabilities_of_samples_are_the_policys_whatever_draws_them(
  policy,
):
  weights = {"nli": 0.25, "rouge": 0.75}
  prompts = tokenizer.inputs(policy.vocabulary, TEXTS, 56)
  samples = policy.sample(
    prompts,
    policy.coefficients(weights, 0.1),
    jax.random.split(jax.random.key(0), len(TEXTS)),
    temperature=0.5,
    top_k=20,
  )
  expected = both_families.plain_logp(
    policy.model_config, policy.params(weights, 0.1), prompts, samples.tokens
  )
  np.testing.assert_allclose(
    *(np.where(samples.mask, x, 0) for x in (samples.logp, expected)), atol=1e-4
  )


def test_each_text_can_have_its_own_weighting(policy):
  weights = [{"nli": 1.0}, {"rouge": 1.0}, {"nli": 1.0}]
  alphas = [0.01, 0.3, 0.01]
  together = policy.generate(TEXTS, weights, alphas, seed=3)
  for i, text in enumerate(TEXTS):
    (alone,) = policy.generate(
      [text], weights[i], alphas[i], seed=3, first_row=i
    )
    assert alone == together[i]
  assert policy.generate(TEXTS, weights, alphas, seed=4) != together


def test_short_texts_are_not_padded_to_the_longest_allowed(policy, monkeypatch):
  """Of 600 tokens 128 are left; up to 56, the run's own, nothing is cut."""
  weights, responses = {"nli": 0.25, "rouge": 0.75}, ["Wexcombe sold", "A", ""]
  expected = (
    policy.generate(TEXTS, weights, 0.1, temperature=0),
    policy.score(TEXTS, responses, weights, 0.1),
  )
  widths = []
  start = decoding.start

  def watched(model, params, tokens, **options):
    widths.append(tokens.shape[1])
    return start(model, params, tokens, **options)

  monkeypatch.setattr(decoding, "start", watched)
  long = clp_jax.Policy.load(policy.workdir)
  long.config.data.source_length = 600
  assert long.tokenize(TEXTS).shape == (3, 600)
  assert long.generate(TEXTS, weights, 0.1, temperature=0) == expected[0]
  assert widths == [128]
  wordy = [" ".join(["Wexcombe"] * 200), *TEXTS]
  long.generate(wordy, weights, 0.1, temperature=0)
  assert 128 < len(long.vocabulary.encode(wordy[0])) <= 256
  assert widths == [128, 256]
  long.config.data.target_length = 300
  np.testing.assert_allclose(
    long.score(TEXTS, responses, weights, 0.1), expected[1], rtol=1e-5
  )


def test_answers_without_tensorflow(policy):
  """Whose import is half of what `clp generate` would take."""
  program = f"""
import sys
import clp_jax
policy = clp_jax.Policy.load({policy.workdir!r})
(answer,) = policy.generate({TEXTS[:1]}, {{"nli": 1.0}}, 0.1, temperature=0)
policy.score({TEXTS[:1]}, [answer], {{"nli": 1.0}}, 0.1)
print(answer, "tensorflow" in sys.modules)
"""
  out = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  ).stdout
  (answer,) = policy.generate(TEXTS[:1], {"nli": 1.0}, 0.1, temperature=0)
  assert out == f"{answer} False\n"


def test_greedy_decoding_needs_no_randomness(policy):
  a, b = (
    policy.generate(TEXTS, {"nli": 1.0}, 0.1, temperature=0, seed=seed)
    for seed in (0, 1)
  )
  assert a == b


def test_settings_that_float32_and_int32_can_not_hold_are_settings(policy):
  one = functools.partial(policy.generate, TEXTS, {"nli": 1.0}, 0.1)
  greedy, free = one(temperature=0), one(seed=3)
  assert greedy != free
  assert one(top_p=1e-300, top_k=2**40) == one(temperature=1e-300) == greedy
  assert one(top_k=2**40, seed=3) == free


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"weights": None}, "give weights for rouge, nli"),
    ({"weights": {"nli": 0.5}}, "sum to 1"),
    ({"weights": {"x": 1.0}}, "unknown objective 'x'"),
    ({"weights": {"nli": 1.0}}, r"alpha in \[0.01, 0.5\]"),
    ({"weights": {"nli": 1.0}, "alpha": 0.9}, r"alpha in \[0.01, 0.5\]"),
    ({"weights": [{"nli": 1.0}], "alpha": 0.1}, "1 weights for 3 texts"),
    ({"weights": {"nli": 1.0}, "alpha": 0.1, "top_k": 0}, "top_k"),
    ({"weights": {"nli": 1.0}, "alpha": 0.1, "top_p": 1.5}, "top_p"),
    ({"weights": {"nli": 1.0}, "alpha": 0.1, "temperature": -1}, "temperature"),
  ],
)
def test_what_can_not_work_is_refused(policy, arguments, message):
  with pytest.raises(ValueError, match=message):
    policy.generate(TEXTS, **arguments)


def test_as_many_responses_as_texts(policy):
  with pytest.raises(ValueError, match="3 texts but 1 responses"):
    policy.score(TEXTS, ["x"], weights={"nli": 1.0}, alpha=0.1)


def test_no_texts_give_no_responses(policy):
  assert policy.generate([], {"nli": 1.0}, 0.1) == []

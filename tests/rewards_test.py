"""Host rewards: how they are found, what is checked, and ROUGE."""

import asyncio

import numpy as np
import pytest
from rouge_score import rouge_scorer

from clp_jax.data import newsroom
from clp_jax.errors import RewardError
from clp_jax.rewards import base
from clp_jax.rewards.base import Reward, load_reward, score_all
from clp_jax.rewards.rouge import rouge

DOCUMENTS = ["a b c", "d e", "f"]
REFERENCES = ["the cat sat on the mat", "a dog barked", "rain fell"]
RESPONSES = ["the cat lay on a mat", "the dog barked loudly", ""]


def brevity(documents, references, responses, limit=3):
  """A reward as a user would write it."""
  return [min(1.0, limit / max(1, len(text.split()))) for text in responses]


calls: list = []  # of the two below


def flaky(documents, references, responses, failures=1):
  """Fails so many times, then scores."""
  calls.append(list(responses))
  if len(calls) <= failures:
    raise TimeoutError("no answer")
  return brevity(documents, references, responses)


async def judged(documents, references, responses, failures=0):
  """Scores one response, and counts how many are scored at a time."""
  (response,) = responses
  calls.append(response)
  judged.now += 1
  judged.most = max(judged.most, judged.now)
  await asyncio.sleep(0.01 * (1 + len(response) % 3))
  judged.now -= 1
  judged.loops.add(asyncio.get_running_loop())
  if calls.count(response) <= failures:
    raise TimeoutError("no answer")
  return brevity(documents, references, responses)


class Holder:
  """A class attribute is a valid path too."""

  brevity = staticmethod(brevity)


NOT_CALLABLE = 0.5


def score(*rewards, step=7, responses=RESPONSES):
  return score_all(rewards, DOCUMENTS, REFERENCES, responses, step=step)


class TestScoreAll:
  def test_has_one_column_a_reward_in_order(self):
    scores = score(
      Reward("brevity", brevity),
      Reward("number", lambda d, r, y: np.asarray([0.25, -1.5, 3])),
    )
    np.testing.assert_allclose(scores, [[0.5, 0.25], [0.75, -1.5], [1, 3]])
    assert scores.dtype == np.float32 and scores.shape == (3, 2)

  def test_passes_documents_references_and_responses(self):
    seen = []
    score(Reward("spy", lambda *texts: seen.append(texts) or [0, 0, 0]))
    assert seen == [(DOCUMENTS, REFERENCES, RESPONSES)]

  @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
  def test_names_the_first_sample_that_is_not_finite(self, bad):
    reward = Reward("shaky", lambda d, r, y: [0.1, bad, np.nan])
    responses = ["fine", "x" * 500, "also bad"]
    with pytest.raises(RewardError) as error:
      score(Reward("brevity", brevity), reward, responses=responses)
    message = str(error.value)
    assert "reward 'shaky' at step 7" in message
    assert "sample 1 (2 of 3 samples" in message
    assert "xxx..." in message and "x" * 81 not in message
    assert "return a finite number" in message

  @pytest.mark.parametrize(
    "value,shape",
    [([0.5, 0.5], r"\[2\]"), (0.5, r"\[\]"), (np.zeros((3, 1)), r"\[3, 1\]")],
  )
  def test_refuses_another_shape(self, value, shape):
    message = rf"'odd' at step 7 returned shape {shape} for 3 responses.*\[3\]"
    with pytest.raises(RewardError, match=message):
      score(Reward("odd", lambda d, r, y: value))

  @pytest.mark.parametrize("value", [None, ["a", "b", "c"], [[1], [1, 2], 3]])
  def test_refuses_what_is_no_number(self, value):
    with pytest.raises(RewardError, match="'odd' at step 7 returned"):
      score(Reward("odd", lambda d, r, y: value))

  def test_names_a_reward_that_raises(self):
    def fails(documents, references, responses):
      return [1 / len(text) for text in responses]

    with pytest.raises(RewardError, match="'div' at step 7 raised Zero") as e:
      score(Reward("div", fails))
    assert isinstance(e.value.__cause__, ZeroDivisionError)

  def test_refuses_texts_of_different_numbers(self):
    with pytest.raises(ValueError, match="got 3, 3 and 2"):
      score(Reward("brevity", brevity), responses=["a", "b"])


class TestUsersFunctions:
  @pytest.fixture(autouse=True)
  def fresh(self):
    calls.clear()
    judged.now = judged.most = 0
    judged.loops = set()

  def test_are_tried_twice(self):
    spec = {"source": f"{__name__}:flaky"}
    assert score(load_reward("short", spec))[:, 0].tolist() == [0.5, 0.75, 1]
    assert calls == [RESPONSES, RESPONSES]
    calls.clear()
    with pytest.raises(RewardError, match="'short' at step 7 raised Timeout"):
      score(load_reward("short", spec | {"failures": 2}))

  @pytest.mark.parametrize("in_flight", [1, 4, None])
  def test_are_awaited_together_within_a_limit(self, in_flight):
    spec = {"source": f"{__name__}:judged"}
    if in_flight is not None:
      spec["in_flight"] = in_flight
    reward = load_reward("judge", spec)
    responses = ["word " * n for n in range(40)]
    for _ in range(2):
      found = score_all([reward], responses, responses, responses[::-1], step=1)
      expected = brevity(None, None, responses[::-1])
      np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    assert judged.most == (in_flight or 16)
    assert len(judged.loops) == 1  # a client that is kept stays usable

  def test_one_of_a_batch_is_tried_twice(self):
    spec = {"source": f"{__name__}:judged", "failures": 1}
    assert score(load_reward("j", spec))[:, 0].tolist() == [0.5, 0.75, 1]
    assert sorted(calls) == sorted(RESPONSES * 2)
    calls.clear()
    with pytest.raises(RewardError, match="'j' at step 7 raised Timeout"):
      score(load_reward("j", spec | {"failures": 2}))

  @pytest.mark.parametrize("bad", [0, 1.5, "4"])
  def test_the_limit_is_checked(self, bad):
    with pytest.raises(ValueError, match="'j': in_flight must be a whole"):
      load_reward("j", {"source": f"{__name__}:judged", "in_flight": bad})
    with pytest.raises(ValueError, match="brevity can't be called.*in_flight"):
      load_reward("j", {"source": f"{__name__}:brevity", "in_flight": 4})


class TestLoadReward:
  def test_imports_a_callable(self):
    reward = load_reward("short", {"source": f"{__name__}:brevity"})
    assert reward.name == "short"
    assert reward.score(DOCUMENTS, REFERENCES, RESPONSES) == [0.5, 0.75, 1]
    nested = load_reward("short", {"source": f"{__name__}:Holder.brevity"})
    assert nested.score(DOCUMENTS, REFERENCES, RESPONSES) == [0.5, 0.75, 1]

  def test_passes_other_keys_as_arguments_but_not_normalise(self):
    reward = load_reward(
      "short",
      {"source": f"{__name__}:brevity", "limit": 1.5, "normalise": "fixed"},
    )
    assert reward.score(DOCUMENTS, REFERENCES, RESPONSES) == [0.25, 0.375, 1]

  def test_finds_the_built_in_rewards(self):
    for name in base.BUILT_IN:
      assert score(load_reward(name, {"source": name})).shape == (3, 1)

  def test_finds_the_newsrooms_rewards(self):
    item = newsroom.make_items("test", 3, 4)[0]
    rewards = [
      load_reward(name, {"source": f"clp_jax.data.newsroom:{name}"})
      for name in ("entailment", "preference")
    ]
    response = newsroom.oracle(item.document, 2)
    scores = score_all(
      rewards, [item.document], [item.reference], [response], step=0
    )
    assert scores[0, 0] == 1 and 0 < scores[0, 1] < 1

  @pytest.mark.parametrize(
    "spec,message",
    [
      ({}, "reward 'r' has no source; set one of rouge"),
      ({"source": None}, "reward 'r' has no source.*got None"),
      ({"source": "bleu"}, "'r' has the source 'bleu'; expected one of rouge"),
      ({"source": "a.b:"}, "expected one of rouge, .* or an import path"),
      ({"source": "absent_pkg.x:f"}, "'absent_pkg.x:f': ModuleNotFoundError"),
      ({"source": f"{__name__}:absent"}, "AttributeError: .*'absent'"),
      ({"source": f"{__name__}:NOT_CALLABLE"}, "is float, not a callable"),
      (
        {"source": f"{__name__}:brevity", "limits": 3},
        r"responses, limits=\.\.\.\): got an unexpected keyword.*'limits'",
      ),
      ({"source": "builtins:len"}, "builtins:len can't be called as score"),
    ],
  )
  def test_says_what_is_wrong_with_a_source(self, spec, message):
    with pytest.raises(ValueError, match=message):
      load_reward("r", spec)

  def test_says_what_failed_inside_the_users_module(
    self, tmp_path, monkeypatch
  ):
    (tmp_path / "broken_reward.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="No module named 'absent_dependency'"):
      load_reward("r", {"source": "broken_reward:score"})


class TestRouge:
  def test_is_the_mean_f1_of_three_kinds(self):
    # By hand: 4 of 6 unigrams, 1 of 5 bigrams (the cat), LCS the cat on mat;
    # then 2 of (3, 4), 1 of (2, 3), 2 of (3, 4).
    expected = [(4 / 6 + 1 / 5 + 4 / 6) / 3, (4 / 7 + 2 / 5 + 4 / 7) / 3, 0]
    scores = rouge(DOCUMENTS, REFERENCES, RESPONSES)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert scores.dtype == np.float32

  def test_equals_rouge_score_with_its_own_tokenizer(self):
    items = newsroom.make_items("test", 0, 40)
    references = [item.reference for item in items]
    responses = references[3:] + references[:3]
    types = ("rouge1", "rouge3", "rougeL")
    scorer = rouge_scorer.RougeScorer(types)
    expected = [
      np.mean([s.fmeasure for s in scorer.score(*pair).values()])
      for pair in zip(references, responses, strict=True)
    ]
    scores = rouge(references, references, responses, types=list(types))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert 0 < scores.min() < scores.max() < 1

  def test_takes_its_types_from_the_config(self):
    reward = load_reward("r1", {"source": "rouge", "types": ("rouge1",)})
    scores = reward.score(DOCUMENTS, REFERENCES, RESPONSES)
    np.testing.assert_allclose(scores, [4 / 6, 4 / 7, 0], rtol=1e-6)

  def test_refuses_no_types(self):
    with pytest.raises(ValueError, match="at least one type"):
      rouge(DOCUMENTS, REFERENCES, RESPONSES, types=())

"""The built-in world: items, grammar, rewards, and the conflict of these."""

import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from clp_jax.data import newsroom, newsroom_text
from clp_jax.data.newsroom_text import WORDS, Facts
from clp_jax.rewards.rouge import rouge

DOCUMENT = (
  "Judge Tamsell of Estria watched. Rothmere sold the market. It happened in"
  " Ravenford. Ravenford lies in Zanthia. Critics expected $9m. It cost $5m."
  " Reporters met Mayor Rothmere."
)
SUPPORTED = "Mayor Rothmere sold the market at Ravenford in Zanthia for $5m."


@pytest.fixture(scope="module")
def train():
  return newsroom.make_items("train", 0, 20_000)


@pytest.fixture(scope="module")
def tokenizer():
  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(newsroom_text.vocabulary_bytes())
  return processor


def facts_strategy():
  optional = {
    kind: st.none() | st.sampled_from(words) for kind, words in WORDS.items()
  }
  required = {
    kind: st.sampled_from(WORDS[kind]) for kind in ("name", "verb", "object")
  }
  return st.builds(Facts, **optional | required)


class TestItems:
  @pytest.mark.parametrize("start,stop", [(0, 1), (7, 8), (1_234, 1_301)])
  def test_any_range_gives_the_same_items(self, train, start, stop):
    assert newsroom.make_items("train", start, stop) == train[start:stop]

  def test_split_and_seed_change_the_items(self, train):
    for others in (
      newsroom.make_items("test", 0, 50),
      newsroom.make_items("validation", 0, 50),
      newsroom.make_items("train", 0, 50, seed=1),
    ):
      same = {item.document for item in others} & {
        item.document for item in train
      }
      assert not same

  def test_stays_as_it_was_released(self, train):
    # The example of the module's docstring: results are compared across
    # versions, so the stream of items is part of the interface.
    assert train[2].document == (
      "Rothmere sold the market. Past threats caused worry. It happened in"
      " Ravenford. Roads near Oakspire stayed open. It cost $5m. The date was"
      " Saturday. Ravenford lies in Zanthia."
    )
    assert train[2].reference == (
      "Rothmere sold the market in Zanthia after rumours."
    )

  def test_documents_are_plain_sentences(self, train):
    for item in train[:500]:
      for sentence in re.split(r"(?<=\.) ", item.document):
        assert re.fullmatch(r"[A-Z][A-Za-z]*( [A-Za-z$0-9]+)+\.", sentence)

  def test_fits_the_lengths_with_eos(self, train, tokenizer):
    documents = tokenizer.encode([item.document for item in train])
    references = tokenizer.encode([item.reference for item in train])
    lengths = np.asarray([len(ids) + 1 for ids in documents])
    assert lengths.max() <= newsroom.SOURCE_LENGTH
    assert 34 < lengths.mean() < 42
    longest = max(len(ids) + 1 for ids in references)
    assert longest <= newsroom.TARGET_LENGTH
    longest_possible = newsroom_text.summarise(
      Facts(**{kind: words[0] for kind, words in WORDS.items()})
    )
    ids = tokenizer.encode(longest_possible)
    assert len(ids) + 1 <= newsroom.TARGET_LENGTH

  def test_words_follow_what_is_usual_in_the_world(self, train):
    world = newsroom.make_world(0)
    for kind, given, usual, p in (
      ("role", "name", world.role, world.role_p),
      ("country", "city", world.country, world.country_p),
      ("cause", "verb", world.cause, world.cause_p),
    ):
      for index, word in enumerate(WORDS[given]):
        values = [
          getattr(item.facts, kind)
          for item in train
          if getattr(item.facts, given) == word
        ]
        rate = values.count(WORDS[kind][usual[index]]) / len(values)
        assert rate == pytest.approx(p[index], abs=0.09)
      assert p.min() == 0.30 and p.max() == 0.97

  def test_references_state_facts_as_often_as_documented(self, train):
    stated = [newsroom_text.parse(item.reference) for item in train]
    for kind, p in newsroom.STATED.items():
      if kind in ("day", "amount"):
        p *= newsroom.DETAIL_SHOWN
      rate = np.mean([getattr(facts, kind) is not None for facts in stated])
      assert rate == pytest.approx(p, abs=0.01)

  def test_usual_values_differ_between_seeds(self):
    world, other = newsroom.make_world(0), newsroom.make_world(1)
    assert (world.role != other.role).any()
    assert (world.cause_p != other.cause_p).any()

  @pytest.mark.parametrize(
    "split,start,stop,message",
    [
      ("dev", 0, 1, "no split 'dev'; it has train, validation, test"),
      ("test", -1, 1, "start=-1, stop=1"),
      ("test", 3, 2, "start=3, stop=2"),
    ],
  )
  def test_refuses_absent_splits_and_ranges(self, split, start, stop, message):
    with pytest.raises(ValueError, match=message):
      newsroom.make_items(split, start, stop)


class TestText:
  def test_survives_the_vocabulary_to_the_letter(self, train, tokenizer):
    for item in train[:2_000]:
      for text in (item.document, item.reference):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_id() not in ids

  @hypothesis.given(facts_strategy())
  def test_every_summary_parses_and_survives(self, tokenizer, facts):
    summary = newsroom_text.summarise(facts)
    assert newsroom_text.parse(summary) == facts
    ids = tokenizer.encode(summary)
    assert tokenizer.decode(ids) == summary
    assert tokenizer.unk_id() not in ids

  def test_vocabulary_is_one_piece_a_word(self, tokenizer):
    assert newsroom_text.vocabulary_bytes() == (
      newsroom_text.vocabulary_bytes.__wrapped__()
    )
    assert 225 <= tokenizer.get_piece_size() <= 256
    assert [tokenizer.id_to_piece(i) for i in range(3)] == [
      "<pad>",
      "</s>",
      "<unk>",
    ]
    assert tokenizer.encode("It cost $2m.", out_type=str) == [
      "▁It",
      "▁cost",
      "▁$2m",
      ".",
    ]

  def test_parse_recovers_the_facts_of_references(self, train):
    for item in train[:2_000]:
      stated = newsroom_text.parse(item.reference)
      for kind in ("name", "verb", "object"):
        assert getattr(stated, kind) == getattr(item.facts, kind)
      for told, true in zip(stated, item.facts, strict=True):
        assert told in (None, true)

  @pytest.mark.parametrize(
    "text",
    [
      "",
      ".",
      "Rothmere sold the market",
      "Rothmere sold the market..",
      "Rothmere sold the market. ",
      " Rothmere sold the market.",
      "Rothmere  sold the market.",
      "rothmere sold the market.",
      "Rothmere sold market.",
      "Rothmere sold the Ravenford.",
      "sold the market.",
      "Mayor Judge Rothmere sold the market.",
      "Rothmere sold the market in Zanthia at Ravenford.",
      "Rothmere sold the market in Zanthia in Zanthia.",
      "Rothmere sold the market after.",
      "Rothmere sold the market. Rothmere sold the market.",
      "Rothmere sold the market at Ravenford. in Zanthia.",
    ],
  )
  def test_parse_refuses_what_is_not_grammatical(self, text):
    assert newsroom_text.parse(text) is None

  def test_facts_of_finds_what_articles_show(self, train):
    shown = dict.fromkeys(Facts._fields, 0)
    for item in train[:4_000]:
      found = newsroom_text.facts_of(item.document)
      for kind, word, true in zip(
        Facts._fields, found, item.facts, strict=True
      ):
        assert word in (None, true)
        shown[kind] += word is not None
      # Told in another way: the role is shown where it stands by the name.
      beside = f"{item.facts.role} {item.facts.name}" in item.document
      assert (found.role is not None) == beside
    for kind, count in shown.items():
      p = {
        "role": newsroom.SHOWN,
        "country": newsroom.SHOWN,
        "cause": newsroom.SHOWN,
        "day": newsroom.DETAIL_SHOWN,
        "amount": newsroom.DETAIL_SHOWN,
      }.get(kind, 1)
      assert count / 4_000 == pytest.approx(p, abs=0.03)

  def test_facts_of_is_about_the_event_alone(self):
    assert newsroom_text.facts_of(DOCUMENT) == Facts(
      role="Mayor",
      name="Rothmere",
      verb="sold",
      object="market",
      city="Ravenford",
      country="Zanthia",
      amount="$5m",
    )

  def test_facts_of_ignores_what_it_can_not_read(self):
    document = (
      "A comet passed. Rothmere sold the\nmarket.  Lunford lies in Estria."
      " It happened in Ravenford, they say. Later Wexcombe bought the mill."
    )
    assert newsroom_text.facts_of(document) == Facts(
      name="Rothmere", verb="sold", object="market"
    )
    assert newsroom_text.facts_of("") == Facts()

  def test_summarise_needs_an_event(self):
    with pytest.raises(ValueError, match="needs a name, a verb and an object"):
      newsroom_text.summarise(Facts(name="Rothmere", verb="sold"))


class TestEntailment:
  def score(self, *responses):
    documents = [DOCUMENT] * len(responses)
    return newsroom.entailment(documents, documents, responses)

  def test_supported_summaries_score_one(self):
    scores = self.score(SUPPORTED, "Rothmere sold the market.")
    np.testing.assert_array_equal(scores, [1, 1])
    assert scores.dtype == np.float32

  def test_each_unsupported_fact_costs_the_same_factor(self):
    scores = self.score(
      SUPPORTED.replace("Mayor", "Judge"),  # the role of somebody else
      SUPPORTED.replace("$5m", "$9m"),  # an amount that was not the cost
      SUPPORTED.replace(" for", " on Monday for"),  # not in the article
      SUPPORTED.replace("Mayor", "Judge").replace(".", " after fires."),
      "Judge Tamsell bought the mill at Lunford in Estria on Friday for $9m"
      " after fires.",
    )
    factor = newsroom.UNSUPPORTED_FACTOR
    np.testing.assert_allclose(
      scores, np.power(factor, [1, 1, 1, 2, 9]), rtol=1e-6
    )

  def test_ungrammatical_scores_zero(self):
    scores = self.score("", "Mayor.", SUPPORTED[:-1], SUPPORTED + " ⁇ ")
    np.testing.assert_array_equal(scores, [0, 0, 0, 0])

  def test_each_response_meets_its_own_article(self, train):
    items = train[:64]
    documents = [item.document for item in items]
    responses = [newsroom.oracle(document, 2) for document in documents]
    np.testing.assert_array_equal(
      newsroom.entailment(documents, documents, responses), np.ones(64)
    )
    shifted = responses[1:] + responses[:1]
    assert (newsroom.entailment(documents, documents, shifted) < 1).all()


class TestPreference:
  def score(self, *responses):
    documents = [DOCUMENT] * len(responses)
    return newsroom.preference(documents, documents, responses)

  def test_informative_beats_short_beats_wrong(self):
    full, short, wrong, empty = self.score(
      SUPPORTED,
      "Rothmere sold the market.",
      "Rothmere sold the market on Monday after fires.",
      "",
    )
    assert full > 0.9 > short > wrong > empty == 0

  def test_is_the_documented_sigmoid(self):
    # 3 of 7 facts in 5 words, none unsupported; then 2 of 3 unsupported.
    (short, wrong) = self.score(
      "Mayor Rothmere sold the market.", "Rothmere bought the mill."
    )
    expected = [
      6 * (4 / 7 - 0.55) + 1.5 * 5 / 16,
      6 * (1 / 7 - 0.55) + 1.5 * 4 / 16 - 0.6 * 2,
    ]
    np.testing.assert_allclose(
      [short, wrong], 1 / (1 + np.exp(-np.asarray(expected))), rtol=1e-6
    )

  def test_scores_documents_without_facts(self):
    scores = newsroom.preference(["A comet passed."], [""], [SUPPORTED])
    assert 0 < scores[0] < 0.1


def test_guessing_trades_entailment_for_rouge_on_a_concave_front():
  items = newsroom.make_items("test", 0, 1_000)
  documents = [item.document for item in items]
  references = [item.reference for item in items]
  points = []
  for threshold in (0, 0.5, 0.7, 0.85, 2):
    responses = [newsroom.oracle(document, threshold) for document in documents]
    points.append(
      [
        reward(documents, references, responses).mean()
        for reward in (rouge, newsroom.entailment)
      ]
    )
  points = np.asarray(points)
  # The table of the module's docstring.
  np.testing.assert_allclose(
    points,
    [
      [0.842, 0.717],
      [0.819, 0.794],
      [0.782, 0.869],
      [0.736, 0.942],
      [0.694, 1],
    ],
    atol=6e-4,
  )
  cost, gain = np.diff(points, axis=0).T * [[-1], [1]]
  assert (cost > 0.02).all() and (gain > 0.05).all()
  # Concave with a margin: each point is the best of the five on an interval of
  # weights, and the intervals lie well inside (0, 1).
  switches = gain / (cost + gain)  # the weight of ROUGE that moves the choice
  assert (np.diff(switches) < -0.02).all()
  assert 0.5 < switches.min() and switches.max() < 0.85

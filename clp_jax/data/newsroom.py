"""Newsroom: a built-in world of extreme summarisation, in the spirit of XSum.

An item is a short news article and a one-sentence reference summary, both real
English text, generated from nine facts: the role and name of a person, a verb
and an object, city, country, day, amount and cause. For example, item 2 of the
split train for seed 0:

  document
    Rothmere sold the market. Past threats caused worry. It happened in
    Ravenford. Roads near Oakspire stayed open. It cost $5m. The date was
    Saturday. Ravenford lies in Zanthia.
  reference
    Rothmere sold the market in Zanthia after rumours.

Here the country is in the article and the cause is not.

What makes the world a two-sided problem, as XSum is: the reference nearly
always states the person's role, the country and the cause, but the article
shows each of them only SHOWN of the time. Otherwise they are *extrinsic*: all
that a summariser can do is to guess from the name, the city or the verb, each
of which has one usual role, country or cause. How usual differs from word to
word, evenly from 30% to 97% (`World.role_p` and so on). A good guess pays in
ROUGE and costs in faithfulness, and because the guesses are not equally good,
the front between the two is graded and concave: a policy moves along it by
guessing only what is predictable enough. Articles also hold distractors: often
a second person with a role and a country, and other amounts, days, places.

Rewards, all computed from text alone:
  rouge       mean F1 of ROUGE-1, -2 and -L against the reference, as in
              rewards/rouge.py
  entailment  0 if the summary is not grammatical, else UNSUPPORTED_FACTOR to
              the power of the number of stated facts that the article lacks
  preference  0 if not grammatical, else a sigmoid that grows with coverage of
              the article's facts and with length, and falls with unsupported
              facts

Measured on the 1,000 test items of seed 0, a summariser that states name, verb
and object, and role, country and cause where the article shows them or where
the guess is right at least `threshold` of the time (`oracle`):

  threshold     0    0.5   0.7   0.85  never
  rouge       .842  .819  .782  .736  .694
  entailment  .717  .794  .869  .942  1
  preference  .445  .507  .563  .617  .657

The language, its grammar and the facts that can be read from a text are in
newsroom_text.py.

Everything is a pure function of (seed, split, index): the seed decides both the
usual roles, countries and causes (the same for all splits) and the items.
"""

import functools
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clp_jax.data import newsroom_text, vocabulary
from clp_jax.data.newsroom_text import (
  DETAILS,
  DISTRACTORS,
  MAIN,
  SUMMARY,
  WITNESSES,
  WORDS,
  Facts,
  facts_of,
  parse,
  summarise,
)

SPLITS = {"train": 20_000, "validation": 1_000, "test": 1_000}
# Room for the longest article and summary, EOS included, in tokens.
SOURCE_LENGTH = 56
TARGET_LENGTH = 18

SHOWN = 0.3  # probability that the article shows role, country, cause; each
DETAIL_SHOWN = 0.9  # the same for day and amount; the city is always shown
WITNESS = 0.5  # probability that a second person with role and country appears
# Probability that the reference states a fact (day, amount: one that is shown).
STATED = {
  "role": 0.95,
  "city": 0.10,
  "country": 0.95,
  "day": 0.15,
  "amount": 0.10,
  "cause": 0.90,
}
# Of the usual role, country or cause: spread evenly between these.
PREDICTABILITY = (0.30, 0.97)
UNSUPPORTED_FACTOR = 0.85

Texts = Sequence[str]


class Item(NamedTuple):
  """One article, its reference summary, and all facts behind the two."""

  document: str
  reference: str
  facts: Facts


class World(NamedTuple):
  """What is usual: [names], [cities], [verbs] of int and of float in (0, 1)."""

  role: np.ndarray  # [names] int, index of the name's usual role
  role_p: np.ndarray  # [names] float, probability of it
  country: np.ndarray  # [cities]
  country_p: np.ndarray
  cause: np.ndarray  # [verbs]
  cause_p: np.ndarray


@functools.lru_cache
def make_world(seed: int = 0) -> World:
  """Draws what is usual in the world of a seed, 0 <= seed < 2**64."""
  rng = np.random.Generator(np.random.Philox(key=[seed, len(SPLITS)]))

  def usual(given, kind):
    n = len(WORDS[given])
    value = rng.permutation(np.arange(n) % len(WORDS[kind]))
    return value, rng.permutation(np.linspace(*PREDICTABILITY, n))

  return World(
    *usual("name", "role"), *usual("city", "country"), *usual("verb", "cause")
  )


_DRAWS = 64  # random numbers an item owns; a multiple of Philox's block of 4


class _Draws:
  """Random numbers of n items, one after the other: [n] each.

  Every item owns _DRAWS of the numbers of (seed, split), so that none depends
  on which items are made together.
  """

  def __init__(self, split: str, start: int, stop: int, seed: int):
    bits = np.random.Philox(key=[seed, list(SPLITS).index(split)])
    bits.advance(start * _DRAWS // 4)  # one step of the counter is 4 numbers
    n = stop - start
    uniforms = (bits.random_raw(n * _DRAWS) >> 11) * 2.0**-53
    self._columns = iter(uniforms.reshape(n, _DRAWS).T)

  def uniform(self) -> np.ndarray:
    """In [0, 1)."""
    return next(self._columns)

  def flip(self, p: float | np.ndarray) -> np.ndarray:
    """True with probability p."""
    return self.uniform() < p

  def pick(self, count: int) -> np.ndarray:
    """Of 0 to count - 1."""
    return (self.uniform() * count).astype(int)

  def other(self, value: np.ndarray, count: int) -> np.ndarray:
    """Of 0 to count - 1, but for `value`."""
    return (value + 1 + self.pick(count - 1)) % count

  def given(
    self, value: np.ndarray, usual: np.ndarray, p: np.ndarray, kind: str
  ) -> np.ndarray:
    """What is usual for `value` with probability p, else another word."""
    is_usual = self.flip(p[value])
    unusual = self.other(usual[value], len(WORDS[kind]))
    return np.where(is_usual, usual[value], unusual)


def make_items(
  split: str, start: int, stop: int, *, seed: int = 0
) -> list[Item]:
  """Makes items start, ..., stop - 1 of a split.

  Args:
    split: 'train', 'validation' or 'test'.
    start: index of the first item.
    stop: index after the last item; may exceed the split's nominal size.
    seed: the world's seed.

  Returns:
    The items; each is a function of (seed, split, its index) alone.

  Raises:
    ValueError: the split is unknown or the range is not 0 <= start <= stop.
  """
  if split not in SPLITS:
    raise ValueError(
      f"newsroom has no split {split!r}; it has {', '.join(SPLITS)}."
    )
  if not 0 <= start <= stop:
    raise ValueError(
      f"expected 0 <= start <= stop, got start={start}, stop={stop}."
    )
  n = stop - start
  world = make_world(seed)
  draws = _Draws(split, start, stop, seed)
  flip, pick, other, given = draws.flip, draws.pick, draws.other, draws.given
  size = {kind: len(words) for kind, words in WORDS.items()}
  fact = {
    kind: pick(size[kind])
    for kind in ("name", "verb", "object", "city", "day", "amount")
  }
  fact["role"] = given(fact["name"], world.role, world.role_p, "role")
  fact["country"] = given(
    fact["city"], world.country, world.country_p, "country"
  )
  fact["cause"] = given(fact["verb"], world.cause, world.cause_p, "cause")
  shown = {
    "city": np.full(n, True),
    "day": flip(DETAIL_SHOWN),
    "amount": flip(DETAIL_SHOWN),
    "role": flip(SHOWN),
    "country": flip(SHOWN),
    "cause": flip(SHOWN),
  }
  stated = {kind: flip(p) for kind, p in STATED.items()}
  stated["day"] &= shown["day"]
  stated["amount"] &= shown["amount"]
  decoy = {kind: other(fact[kind], size[kind]) for kind in size}
  decoy["role"] = given(decoy["name"], world.role, world.role_p, "role")
  wording = {kind: pick(len(ways)) for kind, ways in DETAILS.items()}
  witness = np.where(flip(WITNESS), pick(len(WITNESSES)), -1)
  first = pick(len(DISTRACTORS))
  second = other(first, len(DISTRACTORS))
  # The event comes before its details; distractors stand anywhere.
  event = 0.15
  order = [np.full(n, event), *(event + draws.uniform() for _ in DETAILS)]
  order += [draws.uniform() for _ in range(3)]

  own, others = _words(fact), _words(decoy)
  parts = [_fill(MAIN, own)]
  for kind, ways in DETAILS.items():
    parts.append(np.where(shown[kind], _choose(wording[kind], ways, own), ""))
  parts += [
    _choose(witness, (*WITNESSES, ""), others),  # -1, the last, is none
    _choose(first, DISTRACTORS, others),
    _choose(second, DISTRACTORS, others),
  ]
  ranks = np.argsort(np.stack(order, 1), axis=1)
  sentences = np.take_along_axis(np.stack(parts, 1), ranks, axis=1)
  # As `summarise` writes them, one by one.
  phrases = [
    _fill(phrase, own)
    if kind is None
    else np.where(stated[kind], _fill(phrase, own), "")
    for kind, phrase in SUMMARY
  ]
  return [
    Item(" ".join(filter(None, row)), " ".join(filter(None, told)) + ".", true)
    for row, told, true in zip(
      sentences.tolist(),
      zip(*phrases, strict=True),
      map(Facts, *own.values()),
      strict=True,
    )
  ]


def _words(indices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The words, [n] object, of indices [n], in the order of `Facts`."""
  return {
    kind: np.asarray(WORDS[kind], object)[indices[kind]]
    for kind in Facts._fields
  }


def _fill(template: str, words: dict[str, np.ndarray]) -> np.ndarray:
  """Writes a template with the words of each item: [n] object, or [] object."""
  text, *rest = re.split(r"\{(\w+)\}", template)
  for kind, fixed in zip(rest[::2], rest[1::2], strict=True):
    text = text + words[kind] + fixed
  return np.asarray(text, object)


def _choose(
  which: np.ndarray, templates: Sequence[str], words: dict[str, np.ndarray]
) -> np.ndarray:
  """Writes template which[i] for item i: [n] object."""
  return np.choose(
    which, [_fill(template, words) for template in templates], mode="wrap"
  )


def oracle(document: str, threshold: float, *, seed: int = 0) -> str:
  """Summarises an article as well as anyone can who guesses above a threshold.

  Args:
    document: an article of the world.
    threshold: guess the role, country or cause that the article does not show
      where its usual value has at least this probability; above 1 is never.
    seed: the world's seed.

  Returns:
    A summary with name, verb, object, and role, country and cause where shown
    or guessed.

  Raises:
    ValueError: the document has no event.
  """
  world = make_world(seed)
  facts = facts_of(document)
  guessed = facts._replace(day=None, amount=None, city=None)
  for kind, given in (("role", "name"), ("country", "city"), ("cause", "verb")):
    word = getattr(facts, given)
    if getattr(facts, kind) is not None or word is None:
      continue
    index = WORDS[given].index(word)
    if getattr(world, f"{kind}_p")[index] >= threshold:
      usual = WORDS[kind][getattr(world, kind)[index]]
      guessed = guessed._replace(**{kind: usual})
  return summarise(guessed)


def entailment(
  documents: Texts, references: Texts, responses: Texts
) -> np.ndarray:
  """Scores how faithful summaries are to their articles.

  Args:
    documents: [B] articles.
    references: [B], not used.
    responses: [B] summaries.

  Returns:
    [B] float32 in [0, 1]: UNSUPPORTED_FACTOR ** (stated facts that the article
    does not have); 0 where the summary is not grammatical.
  """
  del references

  def score(facts: Facts, stated: Facts, _: str) -> float:
    return UNSUPPORTED_FACTOR ** _supported(facts, stated)[1]

  return _score(documents, responses, score)


def preference(
  documents: Texts, references: Texts, responses: Texts
) -> np.ndarray:
  """Scores summaries as a reader who wants to be informed would.

  Args: as for `entailment`.

  Returns:
    [B] float32 in [0, 1): sigmoid(6 (coverage - 0.55) + 1.5 words / 16 - 0.6
    unsupported facts), where coverage is the part of the article's facts that
    the summary states; 0 where it is not grammatical.
  """
  del references

  def score(facts: Facts, stated: Facts, response: str) -> float:
    supported, unsupported = _supported(facts, stated)
    coverage = supported / max(1, len(facts) - facts.count(None))
    length = (response.count(" ") + 1) / 16
    logit = 6 * (coverage - 0.55) + 1.5 * length - 0.6 * unsupported
    return 1 / (1 + math.exp(-logit))

  return _score(documents, responses, score)


def _score(
  documents: Texts,
  responses: Texts,
  score: Callable[[Facts, Facts, str], float],
) -> np.ndarray:
  """[B] float32: score(the article's facts, the stated ones, the response); 0
  of what is not grammatical."""
  scores = np.zeros(len(responses), np.float32)
  for i, (document, response) in enumerate(
    zip(documents, responses, strict=True)
  ):
    if stated := parse(response):
      scores[i] = score(facts_of(document), stated, response)
  return scores


def unsupported(document: str, summary: str) -> list[tuple[int, int]] | None:
  """Where a summary states a fact that its article does not have.

  Returns:
    [(start, end)] of the words in question, in the summary's characters and
    order; None where it is not grammatical, so that it states nothing.
  """
  stated = parse(summary)
  if stated is None:
    return None
  facts = facts_of(document)
  lacking = {b for a, b in zip(facts, stated, strict=True) if a != b}
  # A grammatical summary is words, single spaces and the stop.
  words = re.finditer(r"[^ .]+", summary)
  return [match.span() for match in words if match[0] in lacking]


def _supported(facts: Facts, stated: Facts) -> tuple[int, int]:
  """Counts the stated facts that an article has and those that it lacks."""
  same = sum(a == b for a, b in zip(facts, stated, strict=True) if b)
  return same, len(stated) - stated.count(None) - same


@functools.lru_cache
def rows(split: str) -> tuple[tuple[str, str], ...]:
  """(document, reference) of a split's articles, world seed 0.

  Raises:
    ValueError: there is no such split.
  """
  return tuple(
    (item.document, item.reference)
    for item in make_items(split, 0, SPLITS.get(split, 0))
  )


def register_task() -> Any:
  """The seqio Task `newsroom`, world seed 0, in seqio's registry.

  Examples have string features document and reference beside the token features
  inputs and targets.
  """
  tf, seqio = vocabulary.import_seqio()
  if "newsroom" in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get("newsroom")

  def dataset(split, shuffle_files=False):
    del shuffle_files  # examples are drawn independently of each other
    documents, references = map(list, zip(*rows(split), strict=True))
    texts = {"document": documents, "reference": references}
    texts |= {"inputs": documents, "targets": references}
    return tf.data.Dataset.from_tensor_slices(texts)

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "vocabulary.model"
    path.write_bytes(newsroom_text.vocabulary_bytes())
    words = vocabulary.load_vocabulary(path)  # keeps the model, not the file
  feature = seqio.Feature(words, add_eos=True, dtype=tf.int32)
  return seqio.TaskRegistry.add(
    "newsroom",
    source=seqio.FunctionDataSource(
      dataset, splits=list(SPLITS), num_input_examples=SPLITS
    ),
    preprocessors=[
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={"inputs": feature, "targets": feature},
  )

"""The language of the newsroom: its words, its sentences and their meaning.

A text is read by its form: its words, with each that is a fact replaced by the
fact's kind, such as `{name} {verb} the {object}`. The templates below are the
forms that articles have; summaries have those that SUMMARY spans.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from clp_jax.data import vocabulary

WORDS = {
  "role": (
    "Ambassador Bishop Captain Chef Coach Colonel Doctor Governor Inspector"
    " Judge Mayor Minister Professor Senator"
  ).split(),
  "name": (
    "Averlin Bexmoor Calloran Dremond Elvarn Fostrel Garwick Hollern Ithmar"
    " Jorvane Keldrin Lomasse Marrowen Nestrick Ostwin Pellagar Quillane"
    " Rothmere Selbrook Tamsell Ulverby Varnholt Wexcombe Yarrowin Zellmark"
    " Brindall Corvesh Dunmarrow Eskerly Farrogan Grimmond Haldrane Ivenshaw"
    " Jesprin Kestrow Lanvick"
  ).split(),
  "verb": (
    "blocked bought closed designed funded inspected opened painted rebuilt"
    " renamed rented repaired saved searched sold visited"
  ).split(),
  "object": (
    "airport arena bakery bridge castle chapel cinema dam factory farm gallery"
    " garden harbour hospital hotel library lighthouse market mill mine museum"
    " palace school stadium theatre tower tunnel zoo"
  ).split(),
  "city": (
    "Birchport Brackfen Cindervale Corhaven Dewmarsh Elmcross Fenholm"
    " Glimmerton Goldwater Ilvermouth Kelmont Lunford Merrowby Morvast"
    " Northvale Oakspire Ostmere Pellby Pinebury Quenley Ravenford Stonewell"
    " Tarvel Thistledon Umberly Zandport"
  ).split(),
  "country": (
    "Belgrovia Caldonia Estria Kordova Maridia Norland Ostavia Ruvania"
    " Sorrentia Tyrrland Velmark Zanthia"
  ).split(),
  "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
  "amount": "$2m $3m $4m $5m $6m $7m $8m $9m $20m $30m $50m $80m".split(),
  "cause": (
    "complaints delays elections fires floods leaks losses protests repairs"
    " rumours storms strikes talks threats"
  ).split(),
}

MAIN = "{name} {verb} the {object}."
# Ways to show the other facts of the event. No two ways of different facts,
# and no distractor, share their fixed words: that is what makes the article's
# facts recoverable from its text.
DETAILS = {
  "city": (
    "It happened in {city}.",
    "The setting was {city}.",
    "Crowds gathered in {city}.",
  ),
  "day": (
    "It happened on {day}.",
    "The date was {day}.",
    "Word spread on {day}.",
  ),
  "amount": (
    "It cost {amount}.",
    "The bill reached {amount}.",
    "Costs reached {amount}.",
  ),
  "role": (
    "Supporters cheered {role} {name}.",
    "Reporters met {role} {name}.",
    "Colleagues thanked {role} {name}.",
  ),
  "country": (
    "{city} lies in {country}.",
    "{city} belongs to {country}.",
    "{country} governs {city}.",
  ),
  "cause": (
    "It followed {cause}.",
    "It came after {cause}.",
    "Officials cited {cause}.",
  ),
}
WITNESSES = (
  "{role} {name} of {country} agreed.",
  "{role} {name} of {country} objected.",
  "{role} {name} of {country} watched.",
  "{role} {name} of {country} attended.",
)
DISTRACTORS = (
  "{name} praised the plan.",
  "{name} disliked the idea.",
  "An earlier plan cost {amount}.",
  "Critics expected {amount}.",
  "Talks resume on {day}.",
  "Rain is likely on {day}.",
  "Roads near {city} stayed open.",
  "Visitors from {city} arrived.",
  "Past {cause} caused worry.",
  "Nobody was hurt.",
  "Experts remain divided.",
)
# The summary's grammar: MAIN with any of these around it, in this order.
SUMMARY = (
  ("role", "{role}"),
  (None, MAIN[:-1]),
  ("city", "at {city}"),
  ("country", "in {country}"),
  ("day", "on {day}"),
  ("amount", "for {amount}"),
  ("cause", "after {cause}"),
)


class Facts(NamedTuple):
  """What a text says; None where it says nothing."""

  role: str | None = None
  name: str | None = None
  verb: str | None = None
  object: str | None = None
  city: str | None = None
  country: str | None = None
  day: str | None = None
  amount: str | None = None
  cause: str | None = None


def summarise(facts: Facts) -> str:
  """Writes the grammatical summary that states exactly these facts:
  parse(summarise(facts)) == facts.

  Raises:
    ValueError: name, verb or object is None.
  """
  if None in (facts.name, facts.verb, facts.object):
    raise ValueError(f"a summary needs a name, a verb and an object: {facts}.")
  words = facts._asdict()
  phrases = (
    phrase.format(**words)
    for kind, phrase in SUMMARY
    if kind is None or words[kind] is not None
  )
  return " ".join(phrases) + "."


_KIND = {word: kind for kind, words in WORDS.items() for word in words}
_DETAIL_FORMS = {
  way[:-1]: kind for kind, ways in DETAILS.items() for way in ways
} | {way[:-1]: "role" for way in WITNESSES}
_SUMMARY_FORMS = frozenset(
  " ".join(phrase for phrase in phrases if phrase)
  for phrases in itertools.product(
    *((phrase,) if kind is None else (phrase, "") for kind, phrase in SUMMARY)
  )
)


def _read(words: Sequence[str]) -> tuple[str, dict[str, str]]:
  """Splits a sentence's words into its form and its words by kind."""
  found = {_KIND[word]: word for word in words if word in _KIND}
  form = " ".join(
    f"{{{_KIND[word]}}}" if word in _KIND else word for word in words
  )
  return form, found


@functools.lru_cache(maxsize=2**15)
def parse(summary: str) -> Facts | None:
  """Reads the facts that a summary states.

  Returns:
    The stated facts, or None where the text is not grammatical to the letter:
    `[ROLE] NAME VERB the OBJECT [at CITY] [in COUNTRY] [on DAY] [for AMOUNT]
    [after CAUSE].`
  """
  if not summary.endswith("."):
    return None
  form, found = _read(summary[:-1].split(" "))
  return Facts(**found) if form in _SUMMARY_FORMS else None


@functools.lru_cache(maxsize=2**15)
def facts_of(document: str) -> Facts:
  """Reads the facts of an article's event from its text.

  Args:
    document: any text. Sentences outside of the world's grammar are ignored;
      of several events the first counts, and of several statements of the same
      fact likewise.

  Returns:
    The event with its details: the role is the one that the article gives to
    the event's person, the country the one that it puts the event's city in.
  """
  event: dict[str, str] = {}
  details: dict[str, str] = {}
  roles: dict[str, str] = {}
  countries: dict[str, str] = {}
  for sentence in document.split("."):
    form, found = _read(sentence.split())
    if form == MAIN[:-1]:
      event = event or found
      continue
    match _DETAIL_FORMS.get(form):
      case None:
        pass
      case "role":
        roles.setdefault(found["name"], found["role"])
      case "country":
        countries.setdefault(found["city"], found["country"])
      case kind:
        details.setdefault(kind, found[kind])
  return Facts(
    **event,
    **details,
    role=roles.get(event.get("name", "")),
    country=countries.get(details.get("city", "")),
  )


@functools.lru_cache
def vocabulary_bytes() -> bytes:
  """Builds the world's SentencePiece model: one piece a word, and the stop.

  Returns:
    A serialised ModelProto, the same bytes every time.
  """
  sentences = (MAIN, *sum(DETAILS.values(), ()), *WITNESSES, *DISTRACTORS)
  phrases = (*sentences, *(f"{phrase}." for _, phrase in SUMMARY))
  words = sum(WORDS.values(), [])
  fixed = {
    word: None  # a dict keeps the order of first appearance
    for phrase in phrases
    for word in phrase[:-1].split()
    if "{" not in word
  }
  return vocabulary.word_model([*words, *fixed], punctuation=["."])

"""ROUGE against the reference summary, by Google's rouge_score."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score import tokenize

TYPES = ("rouge1", "rouge2", "rougeL")


def rouge(
  documents: Sequence[str],
  references: Sequence[str],
  responses: Sequence[str],
  types: Sequence[str] = TYPES,
) -> np.ndarray:
  """Scores responses by their mean ROUGE F1 (Lin 2004), without stemming.

  Args:
    documents: [B], not used.
    references: [B] summaries.
    responses: [B] summaries.
    types: the kinds to average, in rouge_score's names: rouge1 to rouge9,
      rougeL, rougeLsum.

  Returns:
    [B] float32 in [0, 1].

  Raises:
    ValueError: rouge_score has no such type, or types is empty.
  """
  del documents
  types = tuple(types)
  if not types:
    raise ValueError(
      f"rouge needs at least one type, such as {', '.join(TYPES)}."
    )
  return np.asarray(
    [
      _score(types, reference, response)
      for reference, response in zip(references, responses, strict=True)
    ],
    np.float32,
  )


# A trained policy repeats itself, within a batch and from step to step.
@functools.lru_cache(maxsize=2**15)
def _score(types: tuple[str, ...], reference: str, response: str) -> float:
  scores = _scorer(types).score(reference, response)
  return sum(score.fmeasure for score in scores.values()) / len(types)


@functools.lru_cache
def _scorer(types: tuple[str, ...]) -> Any:
  # Late: it imports NLTK, and that SciPy, which takes most of a second.
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer(types, tokenizer=_CachedTokenizer())


class _CachedTokenizer:
  """rouge_score's own tokenization, each text's once for all types."""

  def tokenize(self, text: str) -> list[str]:
    return _tokens(text)


@functools.lru_cache(maxsize=2**15)
def _tokens(text: str) -> list[str]:
  return tokenize.tokenize(text, stemmer=None)

"""Length as a reward: brevity towards a number of words that one asks for."""

from collections.abc import Sequence

import numpy as np


def length(
  documents: Sequence[str],
  references: Sequence[str],
  responses: Sequence[str],
  words: float = 20,
) -> np.ndarray:
  """Scores responses by how close they are to a number of words.

  The score is 1 at `words` words and falls in proportion to the distance, to 0
  for no words and for twice as many: max(0, 1 - |n - words| / words). Words are
  what white space separates.

  Args:
    documents: [B], not used.
    references: [B], not used.
    responses: [B] texts.
    words: the number asked for, > 0.

  Returns:
    [B] float32 in [0, 1].

  Raises:
    ValueError: words is not positive.
  """
  del documents, references
  if not words > 0:  # also false for NaN
    raise ValueError(f"length needs words > 0, got {words}.")
  counts = np.asarray([len(text.split()) for text in responses], np.float32)
  return np.maximum(1 - np.abs(counts - words) / words, 0).astype(np.float32)

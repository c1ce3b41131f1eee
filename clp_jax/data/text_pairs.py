"""Pairs of texts as an encoder reads them, by its tokenizer.json.

The file's post-processor says what stands before, between and after the two
texts, such as [CLS] document [SEP] response [SEP], and which segment each token
is of. Text makes no control token.
"""

from collections.abc import Sequence

import numpy as np
import tokenizers


def too_long(taken: int, limit: int) -> str:
  """What to say of a response that does not fit into a row."""
  return (
    f"a response and what surrounds it take {taken} tokens, more than "
    f".source_length = {limit}; raise it: only documents are cut"
  )


class TextPairs:
  """Rows of tokens from documents and responses.

  Attributes:
    size: one more than the largest id.
  """

  def __init__(self, path: str, content: bytes):
    """Parses the content of tokenizer.json; path is for messages.

    Raises:
      ValueError: it can't be parsed.
    """
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library's own, a bare Exception
      text = " ".join(str(error).split())
      raise ValueError(f"{path} can't be read: {text}") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.size = 1 + max(vocabulary.values())

  def __call__(
    self, documents: Sequence[str], responses: Sequence[str], limit: int
  ) -> np.ndarray:
    """Tokenises B pairs; what does not fit is cut off the document's end.

    Args:
      documents: [B] texts.
      responses: [B] texts.
      limit: S, tokens of a row.

    Returns:
      [B, 2, S] int32: tokens, of which -1 is padding, and the segment of each.

    Raises:
      ValueError: a response alone is longer.
    """
    pairs = list(zip(documents, responses, strict=True))
    rows = np.zeros([len(pairs), 2, limit], np.int32)
    rows[:, 0] = -1
    for row, encoding in zip(
      rows, self._tokenizer.encode_batch(pairs), strict=True
    ):
      ids, segments = np.asarray([encoding.ids, encoding.type_ids])
      of_text = [i for i, n in enumerate(encoding.sequence_ids) if n == 0]
      excess = max(len(ids) - limit, 0)
      if excess > len(of_text):
        raise ValueError(too_long(len(ids) - len(of_text), limit))
      kept = np.delete(np.arange(len(ids)), of_text[len(of_text) - excess :])
      row[0, : len(kept)], row[1, : len(kept)] = ids[kept], segments[kept]
    return rows

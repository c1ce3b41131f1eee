"""Tokens to text: in pieces as they come, and with log-probabilities."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # bytes of half a character


class Detokenizer:
  """The text of one response, token by token.

  The pieces join to the text of all tokens: spaces and characters that several
  tokens make come with the token that completes them.
  """

  def __init__(self, vocabulary: Any):
    """vocabulary: a `data.vocabulary.Vocabulary`, as a `Policy` has."""
    self._tokenizer = vocabulary.tokenizer
    self._eos_ids = vocabulary.eos_ids
    self._ids: list[int] = []
    self._text = ""

  def push(self, token: int, *, last: bool = False) -> str:
    """Adds a token and returns the text that it completes.

    Args:
      token: id; EOS and ids without a piece add nothing.
      last: whether no other follows.
    """
    if token not in self._eos_ids:
      self._ids.append(token)
    text = self._decode(self._ids)
    if text.endswith(_INCOMPLETE) and not last:
      return ""
    piece = text[len(self._text) :]
    self._text = text
    return piece

  def would_add(self, token: int) -> str:
    """The text that a token would add here; EOS, and what else is no text, by
    its piece's name."""
    if token >= self._tokenizer.get_piece_size():
      token = self._eos_ids[0]
    if self._tokenizer.is_control(token):
      return self._tokenizer.id_to_piece(token)
    return self._decode([*self._ids, token])[len(self._text) :]

  def _decode(self, ids: Sequence[int]) -> str:
    size = self._tokenizer.get_piece_size()
    return self._tokenizer.decode([i for i in ids if i < size])

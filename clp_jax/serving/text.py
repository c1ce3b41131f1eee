"""Tokens to text: in pieces as they come, and with log-probabilities."""

from collections.abc import Sequence

from clp_jax.data.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # bytes of half a character


class Detokenizer:
  """The text of one response, token by token.

  The pieces join to the text of all tokens: spaces and characters that several
  tokens make come with the token that completes them.
  """

  def __init__(self, vocabulary: Tokenizer):
    """vocabulary: of the model."""
    self._vocabulary = vocabulary
    self._ids: list[int] = []
    self._text = ""

  def push(self, token: int, *, last: bool = False) -> str:
    """Adds a token and returns the text that it completes.

    Args:
      token: id; EOS and ids without a piece add nothing.
      last: whether no other follows.
    """
    if token not in self._vocabulary.eos_ids:
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
    name = self._vocabulary.name(token)
    if name is not None:
      return name
    return self._decode([*self._ids, token])[len(self._text) :]

  def _decode(self, ids: Sequence[int]) -> str:
    size = self._vocabulary.size
    return self._vocabulary.decode([i for i in ids if i < size])

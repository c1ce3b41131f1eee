"""Tokens to text: in pieces as they come, up to strings that end it."""

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
    """Adds a token and returns the text that it completes; EOS and ids without
    a piece add nothing. `last`: no other follows."""
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


def final_length(
  text: str, stops: Sequence[str], *, last: bool
) -> tuple[int, bool]:
  """How much of a growing text stays, whatever follows.

  The text ends before the first place at which one of `stops` begins. What may
  be the beginning of one is not final before it is known.

  Args:
    text: so far.
    stops: not empty.
    last: whether nothing follows.

  Returns:
    Its characters that are final, and whether a stop ends it there.
  """
  found = min((i for s in stops if (i := text.find(s)) >= 0), default=None)
  end = len(text) if found is None else found
  if last:
    return end, found is not None
  # The longest beginning of a stop that the text ends in.
  size = max(map(len, stops), default=1) - 1
  for i in range(max(0, len(text) - size), end):
    if any(s.startswith(text[i:]) for s in stops):
      return i, False
  return end, found is not None

"""What turns text into tokens and back, whatever kind of vocabulary it is.

A run's folder and a checkpoint's bring the files of one: tokenizer.json (with
its chat template, hf_tokenizer.py), or a SentencePiece model (vocabulary.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

DOCUMENT = "{document}"
TOKENIZER = "tokenizer.json"

Message = dict[str, str]  # {"role": ..., "content": ...}
# Text that holds "{document}" once, or messages whose contents do.
Template = str | list[Message] | None


class Tokenizer(Protocol):
  """A vocabulary, with how a model is shown prompts and targets."""

  path: str  # of its file or folder, for messages
  ends_prompts: bool  # whether a prompt ends in EOS, as T5 reads it
  chat_template: str | None  # what shows a conversation; None without one

  @property
  def pad_id(self) -> int:
    """Padding in arrays of tokens."""

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Tokens any of which ends a response; `target` adds one of them."""

  @property
  def unk_id(self) -> int:
    """The token of what can't be spelled; -1 where all can."""

  @property
  def bos_id(self) -> int | None:
    """What begins a text; None where nothing does."""

  @property
  def size(self) -> int:
    """One more than the largest id."""

  def encode(self, text: str) -> list[int]:
    """The tokens of a text, which makes no control token."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of tokens; control tokens and ids without a piece add none."""

  def name(self, token: int) -> str | None:
    """What a control token is called; None of a token of text."""

  def token(self, name: str) -> int | None:
    """The one token of text that spells a word, or the control token of this
    name; None without one."""

  def prompt(
    self, document: "str | Sequence[Message]", template: Template, limit: int
  ) -> tuple[list[int], bool]:
    """What a model reads of a document.

    Args:
      document: a text, or a conversation.
      template: see `parse_template`; None takes the document as it is.
      limit: tokens at the most; what is longer is cut.

    Returns:
      The tokens, and whether some had to be cut.
    """

  def check(self, messages: "Sequence[Message]", template: Any) -> None:
    """Raises a ValueError unless a conversation can be a prompt; `template` is
    that of `prompt`. Nothing is tokenised."""

  def target(self, text: str, limit: int) -> list[int]:
    """A response, at most `limit` tokens with the one that ends it."""

  def allowed(self, vocab_size: int) -> np.ndarray:
    """[V] bool, the tokens that a policy may produce: text, and the ends."""

  def control_ids(self, vocab_size: int) -> list[int]:
    """Tokens that stand for no text, to mark inputs with."""

  def files(self) -> dict[str, bytes]:
    """Name -> content of the files that it is made of."""

  def padding(self, last: int) -> tuple[int, dict[str, bytes]]:
    """What another program can pad rows with that all end in one token.

    Args:
      last: that token, which is another than the padding.

    Returns:
      The padding, and `files`, by which the tokenizer says so.

    Raises:
      ValueError: there is no other token that could.
    """


def parse_template(template: Any) -> Template:
  """A template of a config: text, messages, or messages as JSON, which begin
  with "[{".

  Raises:
    ValueError: "{document}" is not in it exactly once.
  """
  if template is None:
    return None
  if isinstance(template, str) and template.lstrip().startswith("[{"):
    try:
      template = json.loads(template)
    except ValueError as error:
      raise ValueError(
        f"the template {template!r} is not valid JSON: {error}."
      ) from error
  if isinstance(template, str):
    texts = [template]
  elif not isinstance(template, list | tuple):
    raise ValueError(
      f"a template must be a text or a list of messages, got {template!r}."
    )
  else:
    template = [
      dict(m) if isinstance(m, Mapping) else m for m in list(template)
    ]
    check_messages(template)
    texts = [message["content"] for message in template]
  if sum(text.count(DOCUMENT) for text in texts) != 1:
    raise ValueError(
      f"the template {template!r} must hold {DOCUMENT} exactly once, such as "
      f"'summarize: {DOCUMENT}'; None takes documents as they are."
    )
  return template


def check_messages(messages: Any) -> None:
  """Raises a ValueError unless it is a list of roles and contents."""
  if (
    not isinstance(messages, list | tuple)
    or not messages
    or not all(
      isinstance(m, Mapping)
      and isinstance(m.get("role"), str)
      and isinstance(m.get("content"), str)
      for m in messages
    )
  ):
    raise ValueError(
      'expected messages: a list of objects with a "role" and a "content" '
      "string."
    )


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> np.ndarray:
  """[n, length] int32 of rows that are no longer."""
  tokens = np.full([len(rows), length], pad_id, np.int32)
  for padded, row in zip(tokens, rows, strict=True):
    padded[: len(row)] = row
  return tokens


def inputs(
  tokenizer: Tokenizer,
  documents: Sequence[Any],
  limit: int,
  template: Template = None,
) -> np.ndarray:
  """What a model reads of documents.

  Args:
    tokenizer: of the model.
    documents: [B] texts or conversations.
    limit: S, tokens; what is longer is cut.
    template: from `parse_template`.

  Returns:
    [B, S] int32, padded.

  Raises:
    ValueError: limit is below 2, or a template fails.
  """
  if limit < 2:
    raise ValueError(
      f"inputs need at least 2 tokens, one and EOS, got a length of {limit}."
    )
  rows = [tokenizer.prompt(d, template, limit)[0] for d in documents]
  return pad(rows, limit, tokenizer.pad_id)


def texts(
  tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray
) -> list[str]:
  """[R] texts of sampled tokens [R, T] int, up to EOS.

  The mask [R, T] is True on a row's own tokens, EOS included if it has one.
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask)
  ended = np.cumsum(np.isin(tokens, tokenizer.eos_ids), axis=1) > 0
  kept = mask & ~ended
  return [
    tokenizer.decode(row[own].tolist())
    for row, own in zip(tokens, kept, strict=True)
  ]

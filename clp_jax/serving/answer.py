"""Answers in OpenAI's two forms, whole or as events, as their tokens come."""

import bisect
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from clp_jax.data.tokenizer import Tokenizer
from clp_jax.serving import schema
from clp_jax.serving.batcher import Piece, Ticket
from clp_jax.serving.decoder import Row
from clp_jax.serving.errors import ApiError
from clp_jax.serving.text import Detokenizer, final_length


class Answer:
  """The answer to one request for completions."""

  _id, _object, _chunk = "cmpl", "text_completion", "text_completion"

  def __init__(
    self,
    vocabulary: Tokenizer,
    model: schema.Model,
    body: schema.CompletionRequest | schema.ChatRequest,
    rows: Sequence[Row],
  ):
    """Takes what was asked for: of a body's documents, n rows each."""
    self._choices = [
      _Choice(vocabulary, body.alternatives, body.stops) for _ in rows
    ]
    self._head = {
      "id": f"{self._id}-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model.id,
      "system_fingerprint": f"step-{model.step}",
    }
    n = 1 if body.n is None else body.n
    self.prompt_tokens = sum(len(row.tokens) for row in rows[::n])
    options = body.stream_options
    self._include_usage = options is not None and options.include_usage

  @property
  def completion_tokens(self) -> int:
    """Of the answers so far."""
    return sum(choice.num_tokens for choice in self._choices)

  async def collect(self, ticket: Ticket) -> dict[str, Any]:
    """The answer in one, when all of it is there.

    Raises:
      ApiError: see `_take`.
    """
    async for piece in ticket:
      self._take(piece, ticket)
    choices = [
      {
        "index": i,
        **self._content(choice.text),
        "logprobs": self._logprobs(choice, 0),
        "finish_reason": choice.finish_reason,
      }
      for i, choice in enumerate(self._choices)
    ]
    return self._head | {
      "object": self._object,
      "choices": choices,
      "usage": self._usage(),
    }

  async def events(self, ticket: Ticket) -> AsyncIterator[dict[str, Any]]:
    """The answer in a stream's events, as its tokens come.

    Raises:
      ApiError: see `_take`.
    """
    head = self._head | {"object": self._chunk}
    async for piece in ticket:
      choice = self._choices[piece.row]
      num_tokens, size = choice.num_tokens, len(choice.text)
      is_first = choice.is_empty
      self._take(piece, ticket)
      content = {
        "index": piece.row,
        **self._added(choice.text[size:], is_first),
        "logprobs": self._logprobs(choice, num_tokens),
        "finish_reason": choice.finish_reason,
      }
      yield head | {"choices": [content], "usage": None}
    if self._include_usage:
      yield head | {"choices": [], "usage": self._usage()}

  def _take(self, piece: Piece, ticket: Ticket) -> None:
    """Takes a piece in, and stops a row that needs no others.

    Raises:
      ApiError: the model's numbers are not finite, and its tokens chance.
    """
    top = (logp for place in piece.top for _, logp in place)
    if not all(map(math.isfinite, (*piece.logp, *top))):
      raise ApiError(
        500,
        "The model's log-probabilities are not finite at this weighting; try "
        "another one, or serve another checkpoint.",
        code="not_finite",
      )
    choice = self._choices[piece.row]
    choice.add(piece)
    if choice.finish_reason is not None:
      ticket.stop(piece.row)

  def _content(self, text: str) -> dict[str, Any]:
    """What a choice has for its text."""
    return {"text": text}

  def _added(self, text: str, is_first: bool) -> dict[str, Any]:
    """What an event's choice has for the text that it adds."""
    del is_first
    return {"text": text}

  def _logprobs(self, choice: "_Choice", start: int) -> dict[str, Any] | None:
    """What a choice has for its tokens from `start` on."""
    if choice.alternatives is None:
      return None
    tokens = choice.tokens[start : choice.num_tokens]
    return {
      "tokens": [token.text for token in tokens],
      "token_logprobs": [token.logp for token in tokens],
      "top_logprobs": (
        [token.top for token in tokens] if choice.alternatives else None
      ),
      "text_offset": [token.offset for token in tokens],
    }

  def _usage(self) -> dict[str, int]:
    return {
      "prompt_tokens": self.prompt_tokens,
      "completion_tokens": self.completion_tokens,
      "total_tokens": self.prompt_tokens + self.completion_tokens,
    }


class ChatAnswer(Answer):
  """The answer to one conversation."""

  _id, _object, _chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

  def _content(self, text):
    return {"message": {"role": "assistant", "content": text}}

  def _added(self, text, is_first):
    role = {"role": "assistant"} if is_first else {}
    return {"delta": role | {"content": text}}

  def _logprobs(self, choice, start):
    if choice.alternatives is None:
      return None

    def one(text, logp):
      return {"token": text, "logprob": logp, "bytes": list(text.encode())}

    content = [
      one(token.text, token.logp)
      | {"top_logprobs": [one(*other) for other in token.top.items()]}
      for token in choice.tokens[start : choice.num_tokens]
    ]
    return {"content": content}


class _Token(NamedTuple):
  text: str  # that it adds
  logp: float  # nats
  top: dict[str, float]  # text that it might have added -> nats
  offset: int  # characters before it


class _Choice:
  """One row's text and what goes with it.

  Attributes:
    alternatives: as a request has it.
    tokens: without the one that ends the row.
    num_tokens: those that are part of the answer for good.
    finish_reason: "stop", "length", or None before the end.
  """

  def __init__(
    self,
    vocabulary: Tokenizer,
    alternatives: int | None,
    stops: Sequence[str],
  ):
    self._detokenizer = Detokenizer(vocabulary)
    self._eos_ids = vocabulary.eos_ids
    self._stops = stops
    self._text = ""  # of all tokens
    self._size = 0  # characters that are part of the answer for good
    self.alternatives = alternatives
    self.tokens: list[_Token] = []
    self.num_tokens = 0
    self.finish_reason: str | None = None
    self.is_empty = True  # nothing has come yet

  @property
  def text(self) -> str:
    """That is part of the answer for good."""
    return self._text[: self._size]

  def add(self, piece: Piece) -> None:
    """Takes tokens in."""
    ended = piece.finish_reason is not None
    for i, token in enumerate(piece.tokens):
      last = ended and i == len(piece.tokens) - 1
      top: dict[str, float] = {}
      if self.alternatives:
        for other, logp in piece.top[i][: self.alternatives]:
          text = self._detokenizer.would_add(other)
          top[text] = max(logp, top.get(text, logp))
      added = self._detokenizer.push(token, last=last)
      if token not in self._eos_ids:
        offset = len(self._text)
        self.tokens.append(_Token(added, piece.logp[i], top, offset))
      self._text += (
        added  # after the end: of half a character that remains half
      )
    self.is_empty = False
    self.finish_reason = piece.finish_reason
    self._size, stopped = final_length(self._text, self._stops, last=ended)
    self.num_tokens = len(self.tokens)
    if stopped:
      self.finish_reason = "stop"
    if stopped or (self._stops and not ended):
      # Those that begin in it.
      self.num_tokens = bisect.bisect_left(
        self.tokens, self._size, key=lambda token: token.offset
      )

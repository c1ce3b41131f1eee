"""What a request and its answer look like: OpenAI's completions, and weights.

Every field of a request is checked here for its type and range; what depends on
the run (weights, alpha, the document's length) is checked in api.py.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from clp_jax.serving.decoder import ALTERNATIVES

# Fields of OpenAI's that would change the answer and are not offered here, with
# the values that change nothing: clients send those by themselves.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "frequency_penalty": (0,),
  "logit_bias": ({},),
  "presence_penalty": (0,),
}

Text = Annotated[str, Field(description="A document.")]
Stop = Annotated[str, Field(max_length=1000)]


class StreamOptions(BaseModel):
  """How to stream."""

  model_config = ConfigDict(strict=True, extra="forbid")

  include_usage: bool = Field(
    False, description="Whether a last event counts the tokens."
  )


class _Request(BaseModel):
  """What both kinds of requests have."""

  model_config = ConfigDict(strict=True, extra="allow")

  model: str = Field(description="As GET /v1/models names it.", max_length=200)
  weights: dict[str, float] | None = Field(
    None,
    description="Weight of each objective; they sum to 1, and those left out "
    "weigh 0. May be left out where there is but one objective.",
    max_length=64,
  )
  alpha: float | None = Field(
    None, description="KL weight, where the run is steered by it too."
  )
  max_tokens: int | None = Field(
    None,
    ge=1,
    description="Of an answer. More than the run's longest summary is the same "
    "as that, which is the default.",
  )
  temperature: float | None = Field(
    1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy."
  )
  top_p: float | None = Field(
    1.0,
    gt=0,
    le=1,
    allow_inf_nan=False,
    description="Sample among the likeliest tokens of this mass.",
  )
  n: int | None = Field(1, ge=1, description="Answers to each document.")
  seed: int | None = Field(
    None,
    ge=-(2**63),
    le=2**63 - 1,
    description="The same request with the same seed has the same answer.",
  )
  stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
    None,
    description="Strings, of which the first that an answer has ends it; it is "
    "not part of the answer. Empty ones end nothing.",
  )
  stream: bool | None = Field(
    False, description="Whether to send the text as it is decoded."
  )
  stream_options: StreamOptions | None = None
  user: str | None = Field(
    None, max_length=1000, description="Accepted, and not kept."
  )
  truncate: bool = Field(
    False,
    description="Cut a document that is too long, instead of refusing it.",
  )

  @property
  def stops(self) -> tuple[str, ...]:
    """The strings that end an answer."""
    given = [self.stop] if isinstance(self.stop, str) else self.stop or []
    return tuple(filter(None, given))


class CompletionRequest(_Request):
  """A request for summaries."""

  neutral: ClassVar[dict[str, tuple[Any, ...]]] = _NEUTRAL | {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
  }

  prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=256)] = (
    Field(description="The document, or several.")
  )
  logprobs: int | None = Field(
    None,
    ge=0,
    le=ALTERNATIVES,
    description="Also return the tokens' log-probabilities, and those of so "
    "many of the likeliest at each position.",
  )

  @property
  def alternatives(self) -> int | None:
    """Likeliest tokens wanted; None where no log-probabilities are."""
    return self.logprobs


class Message(BaseModel):
  """A turn of a conversation; other strings are for the chat template."""

  model_config = ConfigDict(strict=True, extra="allow")
  __pydantic_extra__: dict[str, str | None]

  role: str
  content: str


class ChatRequest(_Request):
  """A request for the next turn of a conversation."""

  neutral: ClassVar[dict[str, tuple[Any, ...]]] = _NEUTRAL | {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
  }

  messages: list[Message] = Field(
    description="The conversation.", min_length=1, max_length=256
  )
  max_completion_tokens: int | None = Field(
    None, ge=1, description="OpenAI's newer name of max_tokens."
  )
  logprobs: bool | None = Field(
    False, description="Also return the tokens' log-probabilities."
  )
  top_logprobs: int | None = Field(
    None,
    ge=0,
    le=ALTERNATIVES,
    description="With logprobs, those of so many of the likeliest too.",
  )

  @property
  def alternatives(self) -> int | None:
    """Likeliest tokens wanted; None where no log-probabilities are."""
    return (self.top_logprobs or 0) if self.logprobs else None


class Logprobs(BaseModel):
  """Of one answer, at temperature 1, in nats."""

  tokens: list[str]
  token_logprobs: list[float]
  top_logprobs: list[dict[str, float]] | None
  text_offset: list[int]


class Choice(BaseModel):
  """One answer, or in a stream a piece of it."""

  index: int
  text: str
  logprobs: Logprobs | None
  finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
  """Tokens; EOS counts in prompts, and not in answers."""

  prompt_tokens: int
  completion_tokens: int
  total_tokens: int


class _Answer(BaseModel):
  """What both kinds of answers have; in a stream, each event's data."""

  id: str
  created: int
  model: str
  system_fingerprint: str
  usage: Usage | None


class Completion(_Answer):
  """The answer to a request for summaries."""

  object: Literal["text_completion"]
  choices: list[Choice]


class TokenLogprob(BaseModel):
  """Of a token at temperature 1, in nats."""

  token: str
  logprob: float
  bytes: list[int]  # UTF-8


class ContentLogprob(TokenLogprob):
  """Of a token of an answer, and of the likeliest in its place."""

  top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
  """Of one answer."""

  content: list[ContentLogprob]


class Turn(BaseModel):
  """One answer's text."""

  role: Literal["assistant"]
  content: str


class ChatChoice(BaseModel):
  """One answer; a stream's events have `delta` for `message`, of which the
  first alone has the role."""

  index: int
  message: Turn
  logprobs: ChatLogprobs | None
  finish_reason: Literal["stop", "length"] | None


class ChatCompletion(_Answer):
  """The answer to a conversation; its events are chat.completion.chunk."""

  object: Literal["chat.completion"]
  choices: list[ChatChoice]


class Model(BaseModel):
  """A model, and how it can be steered."""

  id: str
  object: Literal["model"]
  created: int
  owned_by: str
  objectives: list[str]
  alpha_range: tuple[float, float] | None
  max_prompt_tokens: int
  max_tokens: int
  step: int
  chat: bool  # whether there is a chat template


class Models(BaseModel):
  """The models: one."""

  object: Literal["list"]
  data: list[Model]


class ErrorBody(BaseModel):
  """What went wrong, and which field caused it."""

  message: str
  type: str
  param: str | None
  code: str | None


class Error(BaseModel):
  """Every answer that is no success."""

  error: ErrorBody


class Document(BaseModel):
  """A held-out document of the run's data."""

  document: str
  reference: str


class Documents(BaseModel):
  """Documents to start from."""

  data: list[Document]
  note: str  # how they were chosen, or empty


class Health(BaseModel):
  """Whether requests are served."""

  status: Literal["ok", "unavailable"]
  waiting: int

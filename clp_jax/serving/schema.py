"""What a request and its answer look like: OpenAI's completions, and weights.

Every field of a request is checked here for its type and range; what depends on
the run (weights, alpha, the document's length) is checked in api.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clp_jax.serving.decoder import ALTERNATIVES

# Fields of OpenAI's that would change the answer and are not offered here, with
# the values that change nothing: clients send those by themselves.
NEUTRAL: dict[str, tuple[Any, ...]] = {
  "best_of": (1,),
  "echo": (False,),
  "frequency_penalty": (0,),
  "logit_bias": ({},),
  "presence_penalty": (0,),
  "stop": ([], ""),
  "suffix": ("",),
}

Text = Annotated[str, Field(description="A document.")]


class StreamOptions(BaseModel):
  """How to stream."""

  model_config = ConfigDict(strict=True, extra="forbid")

  include_usage: bool = Field(
    False, description="Whether a last event counts the tokens."
  )


class CompletionRequest(BaseModel):
  """A request for summaries."""

  model_config = ConfigDict(strict=True, extra="allow")

  model: str = Field(description="As GET /v1/models names it.", max_length=200)
  prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=256)] = (
    Field(description="The document, or several.")
  )
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
  stream: bool | None = Field(
    False, description="Whether to send the text as it is decoded."
  )
  stream_options: StreamOptions | None = None
  logprobs: int | None = Field(
    None,
    ge=0,
    le=ALTERNATIVES,
    description="Also return the tokens' log-probabilities, and those of so "
    "many of the likeliest at each position.",
  )
  user: str | None = Field(
    None, max_length=1000, description="Accepted, and not kept."
  )
  truncate: bool = Field(
    False,
    description="Cut a document that is too long, instead of refusing it.",
  )


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


class Completion(BaseModel):
  """The answer to a request; in a stream, each event's data."""

  id: str
  object: Literal["text_completion"]
  created: int
  model: str
  system_fingerprint: str
  choices: list[Choice]
  usage: Usage | None


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

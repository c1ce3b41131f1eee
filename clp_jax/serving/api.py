"""The routes: OpenAI's completions with a weighting, and the page's."""

import asyncio
import contextlib
import importlib.resources
import json
import math
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from clp_jax.data.tokenizer import parse_template
from clp_jax.policy import Policy
from clp_jax.serving import errors, schema
from clp_jax.serving.batcher import (
  Batcher,
  Overloaded,
  Piece,
  Ticket,
  Unavailable,
)
from clp_jax.serving.decoder import Row
from clp_jax.serving.errors import ApiError
from clp_jax.serving.metrics import Metrics
from clp_jax.serving.protection import Limits, Protection
from clp_jax.serving.text import Detokenizer
from clp_jax.weightings import Weighting

PAGE = {
  "/": ("index.html", "text/html; charset=utf-8"),
  "/style.css": ("style.css", "text/css; charset=utf-8"),
  "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def make_app(
  policy: Policy,
  batcher: Batcher,
  metrics: Metrics,
  *,
  name: str,
  documents: schema.Documents,
  load_front: Callable[[], dict[str, Any] | None],
  limits: Limits,
  key: str | None,
  loopback: bool,
) -> Any:
  """The ASGI application.

  Args:
    policy: the run.
    batcher: that decodes for it.
    metrics: of this server.
    name: of the model.
    documents: examples.
    load_front: gives the content of front.json, or None where there is none.
    limits: of the requests.
    key: that clients must know, or None.
    loopback: whether the server listens on a loopback address only.
  """

  @contextlib.asynccontextmanager
  async def lifespan(_: FastAPI):
    yield
    await asyncio.to_thread(batcher.close)

  app = FastAPI(
    title="clp serve",
    description="A conditional language policy: summaries at any weighting of "
    "the objectives.",
    version="1",
    # Its pages load scripts from elsewhere.
    docs_url=None,
    redoc_url=None,
    lifespan=lifespan,
    # /metrics has the counters; documents are nobody's else to see, and looking
    # for listeners takes a tenth of a request's time.
    telemetry={"tracing": False, "metrics": False, "logs": False},
    responses={
      status: {"model": schema.Error}
      for status in (400, 401, 403, 408, 413, 415, 421, 429, 500, 503)
    },
  )
  _handle_errors(app)
  model = schema.Model(
    id=name,
    object="model",
    created=int(time.time()),
    owned_by="clp_jax",
    objectives=list(policy.objectives),
    alpha_range=(
      policy.steering.distribution.alpha_range if policy.objectives else None
    ),
    max_prompt_tokens=policy.config.data.source_length,
    max_tokens=policy.config.data.target_length,
    step=policy.step,
  )
  _add_completions(app, _Completions(policy, batcher, metrics, model, limits))
  _add_model(app, model, documents, load_front)
  _add_operation(app, batcher, metrics)
  folder = importlib.resources.files("clp_jax.serving") / "page"
  for path, (file, media_type) in PAGE.items():
    _serve_file(app, path, (folder / file).read_bytes(), media_type)
  return metrics.counting(Protection(app, limits, key, loopback))


def _add_completions(app: FastAPI, completions: "_Completions") -> None:
  # The answer's model is for the description; validating it would cost more
  # than making it.
  @app.post(
    "/v1/completions",
    responses={
      200: {
        "model": schema.Completion,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
      },
      404: {"model": schema.Error},
    },
  )
  async def complete(body: schema.CompletionRequest, request: Request):
    """Summaries of documents at a weighting of the objectives."""
    return await completions(body, request)


def _add_model(
  app: FastAPI,
  model: schema.Model,
  documents: schema.Documents,
  load_front: Callable[[], dict[str, Any] | None],
) -> None:
  @app.get("/v1/models", response_model=schema.Models)
  async def models():
    """The model, its objectives and its limits."""
    return {"object": "list", "data": [model]}

  @app.get(
    "/v1/models/{model_id:path}",
    response_model=schema.Model,
    responses={404: {"model": schema.Error}},
  )
  async def one_model(model_id: str):
    """The model of that name."""
    if model_id != model.id:
      raise _unknown_model(model_id)
    return model

  @app.get("/v1/front", responses={404: {"model": schema.Error}})
  def front() -> dict[str, Any]:
    """The measured front: the content of the run's evaluation/front.json."""
    content = load_front()
    if content is None:
      raise ApiError(
        404,
        "No front is measured yet; `clp evaluate` measures one.",
        code="no_front",
      )
    return content

  @app.get("/v1/documents", response_model=schema.Documents)
  async def example_documents():
    """Held-out documents of the run's data, to start from."""
    return documents


def _add_operation(app: FastAPI, batcher: Batcher, metrics: Metrics) -> None:
  @app.get(
    "/health",
    response_model=schema.Health,
    responses={503: {"model": schema.Health}},
  )
  async def health():
    """Whether requests are served."""
    content = {
      "status": "ok" if batcher.alive else "unavailable",
      "waiting": batcher.waiting,
    }
    if batcher.alive:
      return content
    return JSONResponse(content, 503, {"Retry-After": "10"})

  @app.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
  )
  async def prometheus():
    """Counters in Prometheus' format."""
    content, media_type = metrics.render()
    return Response(content, media_type=media_type)


class _Completions:
  """POST /v1/completions."""

  def __init__(self, policy, batcher, metrics, model, limits):
    self._policy: Policy = policy
    self._batcher: Batcher = batcher
    self._metrics: Metrics = metrics
    self._model: schema.Model = model
    self._limits: Limits = limits

  async def __call__(
    self, body: schema.CompletionRequest, request: Request
  ) -> Response:
    rows = self._rows(body)
    deadline = asyncio.get_running_loop().time() + self._limits.seconds
    answer = _Answer(self._policy, self._model, body, rows)
    self._metrics.prompt_tokens.inc(answer.prompt_tokens)
    try:
      ticket = self._batcher.submit(rows, bool(body.stream))
    except Overloaded as error:
      raise ApiError(
        429,
        f"Too many requests are waiting; try again in {error.retry_after} s.",
        code="rate_limit_exceeded",
        retry_after=error.retry_after,
      ) from error
    except Unavailable as error:
      raise _unavailable() from error
    if body.stream:
      events = self._stream(answer, ticket, deadline)
      # The first event decides about the status.
      first = await anext(events)
      return StreamingResponse(
        _chain(first, events, lambda: self._batcher.cancel(ticket)),
        media_type="text/event-stream",
      )
    try:
      async with self._until(deadline):
        await _unless_gone(request, answer.collect(ticket))
    finally:
      self._batcher.cancel(ticket)
    self._metrics.generated_tokens.inc(answer.completion_tokens)
    content = json.dumps(answer.whole(), allow_nan=False)
    return Response(content, media_type="application/json")

  def _rows(self, body: schema.CompletionRequest) -> list[Row]:
    """The request's rows, document-major, with all that depends on the run."""
    if body.model != self._model.id:
      raise _unknown_model(body.model)
    for field, value in (body.model_extra or {}).items():
      if value is not None and value not in schema.NEUTRAL.get(field, ()):
        raise ApiError(
          400,
          f"Unsupported parameter or value: {_clip(field)!r}.",
          code="unsupported_parameter",
          param=_clip(field),
        )
    if body.stream_options is not None and not body.stream:
      raise _invalid("stream_options", "is for streams: set stream.")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    n = 1 if body.n is None else body.n
    if len(prompts) * n > self._limits.rows:
      raise _invalid(
        "n",
        f"{len(prompts)} documents x n = {n} answers are more than the "
        f"{self._limits.rows} of one request.",
      )
    try:
      coefficients = self._policy.coefficients(body.weights, body.alpha)
    except ValueError as error:
      field = "alpha" if "alpha" in str(error) else "weights"
      raise _invalid(field, str(error)) from error
    longest = self._model.max_tokens
    temperature = 1.0 if body.temperature is None else body.temperature
    seed = secrets.randbits(32) if body.seed is None else body.seed
    prefix = self._prefix(body)
    encoded = [
      np.append(prefix, self._tokens(text, body.truncate)) for text in prompts
    ]
    return [
      Row(
        tokens=tokens,
        coefficients=coefficients,
        seed=seed % 2**64,
        number=i * n + j,
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=min(longest, body.max_tokens or longest),
        alternatives=bool(body.logprobs),
      )
      for i, tokens in enumerate(encoded)
      for j in range(n)
    ]

  def _prefix(self, body: schema.CompletionRequest) -> np.ndarray:
    """[p] int32, what the policy is told of the weighting; mostly nothing."""
    if self._policy.prompts is None:
      return np.zeros([0], np.int32)
    given = (body.weights, body.alpha)
    weights, alpha = self._policy.steering.weighting(*given)
    weighting = Weighting(jnp.asarray(weights[None]), jnp.asarray([alpha]))
    (tokens,) = np.asarray(self._policy.prompts.prefix(weighting))
    return tokens[tokens != self._policy.vocabulary.pad_id]

  def _tokens(self, text: str, truncate: bool) -> np.ndarray:
    """[s] int32, the model's input, EOS included."""
    limit = self._model.max_prompt_tokens
    characters = limit * self._limits.characters_per_token
    try:
      text.encode()
    except UnicodeEncodeError:
      raise _invalid("prompt", "holds half a surrogate pair.") from None
    if len(text) > characters and not truncate:
      raise _too_long(limit)
    # A token more than fits tells whether anything is cut.
    template = parse_template(self._policy.config.data.template)
    try:
      ids, cut = self._policy.vocabulary.prompt(
        text[:characters], template, limit
      )
    except ValueError as error:  # a chat template refuses it
      raise _invalid("prompt", str(error)) from error
    if cut and not truncate:
      raise _too_long(limit)
    return np.asarray(ids, np.int32)

  @contextlib.asynccontextmanager
  async def _until(self, deadline: float) -> AsyncIterator[None]:
    """Turns a deadline that passes, and a decoder that fails, into a 503."""
    try:
      async with asyncio.timeout_at(deadline):
        yield
    except TimeoutError:
      raise ApiError(
        503,
        f"There was no answer within {self._limits.seconds:g} s; try again.",
        code="deadline_exceeded",
        retry_after=self._batcher.retry_after(),
      ) from None
    except Unavailable as error:
      raise _unavailable() from error

  async def _stream(
    self, answer: "_Answer", ticket: Ticket, deadline: float
  ) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
      pieces = aiter(ticket)
      while True:
        async with self._until(deadline):
          piece = await anext(pieces, None)
        if piece is None:
          break
        yield _event(answer.chunk(piece))
      if answer.include_usage:
        yield _event(answer.last_chunk())
      yield "data: [DONE]\n\n"
    finally:
      self._batcher.cancel(ticket)
      self._metrics.generated_tokens.inc(answer.completion_tokens)


class _Answer:
  """The answer to one request, as its pieces come."""

  def __init__(
    self,
    policy: Policy,
    model: schema.Model,
    body: schema.CompletionRequest,
    rows: Sequence[Row],
  ):
    self._choices = [_Choice(policy.vocabulary, body.logprobs) for _ in rows]
    self._head = {
      "id": f"cmpl-{uuid.uuid4().hex}",
      "object": "text_completion",
      "created": int(time.time()),
      "model": model.id,
      "system_fingerprint": f"step-{model.step}",
    }
    n = 1 if body.n is None else body.n
    self.prompt_tokens = sum(len(row.tokens) for row in rows[::n])
    self.completion_tokens = 0
    options = body.stream_options
    self.include_usage = options is not None and options.include_usage

  async def collect(self, ticket: Ticket) -> None:
    """Takes all pieces in, for `whole`."""
    async for piece in ticket:
      self.chunk(piece)

  def chunk(self, piece: Piece) -> dict[str, Any]:
    """Takes a piece in and makes a stream's event of it.

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
    before = len(choice.tokens)
    text = choice.add(piece)
    self.completion_tokens += len(choice.tokens) - before
    content = {
      "index": piece.row,
      "text": text,
      "logprobs": choice.logprobs(before),
      "finish_reason": piece.finish_reason,
    }
    return self._head | {"choices": [content], "usage": None}

  def last_chunk(self) -> dict[str, Any]:
    """A stream's event that counts the tokens."""
    return self._head | {"choices": [], "usage": self._usage()}

  def whole(self) -> dict[str, Any]:
    """All of it, in one."""
    choices = [
      {
        "index": i,
        "text": choice.text,
        "logprobs": choice.logprobs(0),
        "finish_reason": choice.finish_reason,
      }
      for i, choice in enumerate(self._choices)
    ]
    return self._head | {"choices": choices, "usage": self._usage()}

  def _usage(self) -> dict[str, int]:
    return {
      "prompt_tokens": self.prompt_tokens,
      "completion_tokens": self.completion_tokens,
      "total_tokens": self.prompt_tokens + self.completion_tokens,
    }


class _Choice:
  """One row's text and what goes with it."""

  def __init__(self, vocabulary: Any, logprobs: int | None):
    self._detokenizer = Detokenizer(vocabulary)
    self._eos_ids = vocabulary.eos_ids
    self._wanted = logprobs
    self.text = ""
    self.finish_reason: str | None = None
    self.tokens: list[str] = []
    self._logp: list[float] = []
    self._top: list[dict[str, float]] = []
    self._offsets: list[int] = []

  def add(self, piece: Piece) -> str:
    """Takes tokens in; returns the text that they add."""
    start = len(self.text)
    ended = piece.finish_reason is not None
    for i, token in enumerate(piece.tokens):
      last = ended and i == len(piece.tokens) - 1
      if self._wanted and piece.top:
        top: dict[str, float] = {}
        for other, logp in piece.top[i][: self._wanted]:
          text = self._detokenizer.would_add(other)
          top[text] = max(logp, top.get(text, logp))
      added = self._detokenizer.push(token, last=last)
      if token in self._eos_ids:
        self.text += added  # of half a character that remains half
        continue
      self.tokens.append(added)
      self._logp.append(piece.logp[i])
      self._offsets.append(len(self.text))
      if self._wanted and piece.top:
        self._top.append(top)
      self.text += added
    self.finish_reason = piece.finish_reason
    return self.text[start:]

  def logprobs(self, start: int) -> dict[str, Any] | None:
    """From token `start` on, in OpenAI's form."""
    if self._wanted is None:
      return None
    return {
      "tokens": self.tokens[start:],
      "token_logprobs": self._logp[start:],
      "top_logprobs": self._top[start:] if self._wanted else None,
      "text_offset": self._offsets[start:],
    }


async def _unless_gone(request: Request, work: Coroutine) -> None:
  """Does the work, unless the client leaves before it is done."""

  async def watch():
    while (await request.receive())["type"] != "http.disconnect":
      pass

  working, leaving = asyncio.create_task(work), asyncio.create_task(watch())
  try:
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise ApiError(499, "The client has left.")  # which nobody reads
    await working
  finally:
    working.cancel()
    leaving.cancel()


async def _chain(first, rest, close) -> AsyncIterator[str]:
  """An iterator's events after its first, and an error as the last of them."""
  try:
    yield first
    async for event in rest:
      yield event
  except ApiError as error:
    yield _event(errors.body(error))
  finally:
    close()


def _event(content: dict[str, Any]) -> str:
  return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def _serve_file(app: FastAPI, path: str, content: bytes, media_type: str):
  async def serve():
    return Response(content, media_type=media_type)

  app.add_api_route(path, serve, include_in_schema=False)


def _handle_errors(app: FastAPI) -> None:
  @app.exception_handler(ApiError)
  async def api_error(_: Request, error: ApiError):
    return errors.response(error)

  @app.exception_handler(RequestValidationError)
  async def invalid(_: Request, error: RequestValidationError):
    return errors.response(_validation_error(error))

  @app.exception_handler(HTTPException)
  async def http_error(_: Request, error: HTTPException):
    messages = {
      404: "There is no such path.",
      405: "This path does not take this method.",
    }
    message = messages.get(error.status_code, "The request can't be read.")
    response = errors.response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response

  @app.exception_handler(Exception)
  async def failure(_: Request, error: Exception):
    del error  # Starlette raises it again, for the operator.
    return errors.response(
      ApiError(500, "The server failed to answer this request.")
    )


def _validation_error(error: RequestValidationError) -> ApiError:
  """What pydantic found first, as one sentence about one field."""
  first = error.errors()[0]
  if first["type"] == "json_invalid":
    return ApiError(400, "The body is not valid JSON.", code="invalid_json")
  place = [str(part) for part in first["loc"][1:]]
  if not place:
    return ApiError(
      400,
      "The body must be a JSON object.",
      code="invalid_body",
    )
  field = _clip(place[0])
  if field == "prompt" and first["type"] != "missing":
    return _invalid(field, "must be a string or a list of 1 to 256 strings.")
  return _invalid(field, f"{_clip(first['msg'])}.")


def _invalid(field: str, message: str) -> ApiError:
  if not message.startswith(field):
    message = f"{field}: {message}"
  return ApiError(400, _clip(message, 500), code="invalid_value", param=field)


def _too_long(limit: int) -> ApiError:
  return ApiError(
    400,
    f"prompt: a document is longer than the {limit} tokens that this model "
    'reads; shorten it, or send "truncate": true to have it cut.',
    code="context_length_exceeded",
    param="prompt",
  )


def _unknown_model(name: str) -> ApiError:
  return ApiError(
    404,
    f"The model {_clip(name)!r} does not exist; GET /v1/models names the one "
    "that does.",
    code="model_not_found",
    param="model",
  )


def _unavailable() -> ApiError:
  return ApiError(
    503,
    "The server can't answer at the moment; try again.",
    code="unavailable",
    retry_after=10,
  )


def _clip(text: str, limit: int = 100) -> str:
  return text if len(text) <= limit else f"{text[: limit - 3]}..."

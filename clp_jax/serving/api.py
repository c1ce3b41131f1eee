"""The routes: OpenAI's completions with a weighting, and the page's."""

import asyncio
import contextlib
import importlib.resources
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import jax.numpy as jnp
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from clp_jax.data.tokenizer import Template, parse_template
from clp_jax.policy import Policy
from clp_jax.serving import errors, schema
from clp_jax.serving.answer import Answer, ChatAnswer
from clp_jax.serving.batcher import Batcher, Overloaded, Ticket, Unavailable
from clp_jax.serving.decoder import Row
from clp_jax.serving.errors import ApiError
from clp_jax.serving.metrics import Metrics
from clp_jax.serving.protection import Limits, Protection
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
      policy.weighting_space.distribution.alpha_range
      if policy.objectives
      else None
    ),
    max_prompt_tokens=policy.config.data.source_length,
    max_tokens=policy.config.data.target_length,
    step=policy.step,
    chat=policy.vocabulary.chat_template is not None,
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
  def responses(model: type[schema.BaseModel]) -> dict[int | str, Any]:
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
      200: {"model": model, "content": stream},
      404: {"model": schema.Error},
    }

  @app.post("/v1/completions", responses=responses(schema.Completion))
  async def complete(body: schema.CompletionRequest, request: Request):
    """Summaries of documents at a weighting of the objectives."""
    return await completions(body, request)

  @app.post("/v1/chat/completions", responses=responses(schema.ChatCompletion))
  async def chat(body: schema.ChatRequest, request: Request):
    """The next turn of a conversation at a weighting of the objectives."""
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
  """POST /v1/completions and /v1/chat/completions."""

  def __init__(self, policy, batcher, metrics, model, limits):
    self._policy: Policy = policy
    self._batcher: Batcher = batcher
    self._metrics: Metrics = metrics
    self._model: schema.Model = model
    self._limits: Limits = limits

  async def __call__(
    self,
    body: schema.CompletionRequest | schema.ChatRequest,
    request: Request,
  ) -> Response:
    deadline = asyncio.get_running_loop().time() + self._limits.seconds
    kind = Answer
    if isinstance(body, schema.ChatRequest):
      kind = ChatAnswer
      # A chat template is a program: it may take its time.
      async with self._until(deadline):
        rows = await asyncio.to_thread(self._rows, body)
    else:
      rows = self._rows(body)
    answer = kind(self._policy.vocabulary, self._model, body, rows)
    self._metrics.prompt_tokens.inc(answer.prompt_tokens)
    try:
      in_pieces = bool(body.stream or body.stops)
      ticket = self._batcher.submit(rows, in_pieces)
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
        # nginx would keep the events back until it has a block of them.
        headers={"X-Accel-Buffering": "no"},
      )
    try:
      async with self._until(deadline):
        whole = await _unless_gone(request, answer.collect(ticket))
    finally:
      self._batcher.cancel(ticket)
    self._metrics.generated_tokens.inc(answer.completion_tokens)
    content = json.dumps(whole, allow_nan=False)
    return Response(content, media_type="application/json")

  def _rows(
    self, body: schema.CompletionRequest | schema.ChatRequest
  ) -> list[Row]:
    """The request's rows, document-major, with all that depends on the run."""
    if body.model != self._model.id:
      raise _unknown_model(body.model)
    for field, value in (body.model_extra or {}).items():
      if value is not None and value not in body.neutral.get(field, ()):
        raise ApiError(
          400,
          f"Unsupported parameter or value: {_clip(field)!r}.",
          code="unsupported_parameter",
          param=_clip(field),
        )
    if body.stream_options is not None and not body.stream:
      raise _invalid("stream_options", "is for streams: set stream.")
    max_tokens = body.max_tokens
    tokens_of: Callable[[Any, bool], np.ndarray] = self._tokens
    if isinstance(body, schema.ChatRequest):
      max_tokens = self._check_chat(body)
      tokens_of = self._conversation
      prompts: list[Any] = [body.messages]
    else:
      prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    n = 1 if body.n is None else body.n
    most = min(self._limits.rows, self._limits.waiting)
    if len(prompts) * n > most:
      raise _invalid(
        "n",
        f"{len(prompts)} documents x n = {n} answers are more than the {most} "
        "of one request.",
      )
    try:
      coefficients = self._policy.coefficients(body.weights, body.alpha)
    except ValueError as error:
      message = str(error)
      of_weights = "weights" in message or "objective" in message
      raise _invalid("weights" if of_weights else "alpha", message) from error
    longest = self._model.max_tokens
    temperature = 1.0 if body.temperature is None else body.temperature
    seed = secrets.randbits(32) if body.seed is None else body.seed
    prefix = self._prefix(body)
    encoded = [
      np.append(prefix, tokens_of(prompt, body.truncate)) for prompt in prompts
    ]
    return [
      Row(
        tokens=tokens,
        coefficients=coefficients,
        seed=seed % 2**64,
        number=i * n + j,
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=min(longest, max_tokens or longest),
        alternatives=bool(body.alternatives),
      )
      for i, tokens in enumerate(encoded)
      for j in range(n)
    ]

  def _check_chat(self, body: schema.ChatRequest) -> int | None:
    """What only conversations have; returns the limit of tokens."""
    if not self._model.chat:
      raise ApiError(
        400,
        "model: this one has no chat template; ask POST /v1/completions, or "
        "serve a run whose tokenizer has one.",
        code="no_chat_template",
        param="model",
      )
    if body.top_logprobs is not None and not body.logprobs:
      raise _invalid("top_logprobs", "is for logprobs: set logprobs.")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
      raise _invalid(
        "max_tokens", "differs from max_completion_tokens: give one of them."
      )
    return limits.pop() if limits else None

  def _prefix(
    self, body: schema.CompletionRequest | schema.ChatRequest
  ) -> np.ndarray:
    """[p] int32, what the policy is told of the weighting; mostly nothing."""
    if self._policy.prompts is None:
      return np.zeros([0], np.int32)
    given = (body.weights, body.alpha)
    weights, alpha = self._policy.weighting_space.weighting(*given)
    weighting = Weighting(jnp.asarray(weights[None]), jnp.asarray([alpha]))
    (tokens,) = np.asarray(self._policy.prompts.prefix(weighting))
    return tokens[tokens != self._policy.vocabulary.pad_id]

  def _tokens(self, text: str, truncate: bool) -> np.ndarray:
    """[s] int32, the model's input, EOS included."""
    limit = self._model.max_prompt_tokens
    characters = limit * self._limits.characters_per_token
    _check_text("prompt", text)
    if len(text) > characters and not truncate:
      raise _too_long("prompt", limit)
    template = parse_template(self._policy.config.data.template)
    ids, cut = self._prompt("prompt", text[:characters], template, limit)
    if cut and not truncate:
      raise _too_long("prompt", limit)
    return np.asarray(ids, np.int32)

  def _conversation(
    self, messages: list[schema.Message], truncate: bool
  ) -> np.ndarray:
    """[s] int32, the model's input, up to where it answers."""
    limit = self._model.max_prompt_tokens
    given = [message.model_dump(exclude_none=True) for message in messages]
    _check_text("messages", json.dumps(given, ensure_ascii=False))
    excess = sum(len(message["content"]) for message in given)
    excess -= limit * self._limits.characters_per_token
    if excess > 0 and not truncate:
      raise _too_long("messages", limit)
    # As far as characters tell, for `prompt` renders again for each it cuts.
    for message in sorted(given, key=lambda m: -len(m["content"])):
      content = message["content"]
      message["content"] = content[: max(0, len(content) - max(0, excess))]
      excess -= len(content) - len(message["content"])
    # Whole first: cutting is only begun where it is asked for.
    ids, _ = self._prompt("messages", given, None, sys.maxsize)
    if len(ids) > limit:
      if not truncate:
        raise _too_long("messages", limit)
      try:
        ids, _ = self._policy.vocabulary.prompt(given, None, limit)
      except ValueError as error:
        raise _too_long("messages", limit, "send fewer messages") from error
    return np.asarray(ids, np.int32)

  def _prompt(
    self, field: str, document: Any, template: Template, limit: int
  ) -> tuple[list[int], bool]:
    """`Tokenizer.prompt`, whose errors are those of a field."""
    vocabulary = self._policy.vocabulary
    try:
      return vocabulary.prompt(document, template, limit)
    except ValueError as error:  # a chat template refuses it
      where = f"of {vocabulary.path} fails"  # which is nobody else's to know
      message = str(error).replace(where, "of this model fails")
      raise _invalid(field, message) from error

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
    self, answer: Answer, ticket: Ticket, deadline: float
  ) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
      events = answer.events(ticket)
      while True:
        async with self._until(deadline):
          event = await anext(events, None)
        if event is None:
          break
        yield _event(event)
      yield "data: [DONE]\n\n"
    finally:
      self._batcher.cancel(ticket)
      self._metrics.generated_tokens.inc(answer.completion_tokens)


async def _unless_gone(request: Request, work: Coroutine) -> Any:
  """Does the work, unless the client leaves before it is done."""

  async def watch():
    while (await request.receive())["type"] != "http.disconnect":
      pass

  working, leaving = asyncio.create_task(work), asyncio.create_task(watch())
  try:
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise ApiError(499, "The client has left.")  # which nobody reads
    return await working
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


_FORMS = {
  "prompt": "must be a string or a list of 1 to 256 strings.",
  "stop": "must be a string or a list of up to 4, each of up to 1000 "
  "characters.",
}


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
  if field in _FORMS and first["type"] != "missing":
    return _invalid(field, _FORMS[field])
  if field == "messages":
    where = field + "".join(f"[{part}]" for part in place[1:])
    return _invalid(
      field,
      f"{_clip(where)}: {_clip(first['msg'])}; send 1 to 256 objects with a "
      '"role" and a "content", which are strings.',
    )
  return _invalid(field, f"{_clip(first['msg'])}.")


def _invalid(field: str, message: str) -> ApiError:
  if not message.startswith(field):
    message = f"{field}: {message}"
  return ApiError(400, _clip(message, 500), code="invalid_value", param=field)


def _check_text(field: str, text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError:
    raise _invalid(field, "holds half a surrogate pair.") from None


def _too_long(
  field: str,
  limit: int,
  advice: str = 'shorten it, or send "truncate": true to have it cut',
) -> ApiError:
  what = "a document" if field == "prompt" else "the conversation"
  return ApiError(
    400,
    f"{field}: {what} is longer than the {limit} tokens that this model "
    f"reads; {advice}.",
    code="context_length_exceeded",
    param=field,
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

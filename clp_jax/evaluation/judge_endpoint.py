"""A judge behind HTTP: OpenAI's chat completions, or Gemini's generateContent.

Requests that may succeed later (no connection, a timeout, an answer of another
form, status 408, 425, 429 or 5xx) are sent again after a pause that doubles, or
as long as Retry-After says. Any other status is final. Redirects are not
followed: they would carry the key elsewhere.
"""

import dataclasses
import email.utils
import http.client
import json
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from clp_jax.errors import JudgeError, check_choice
from clp_jax.evaluation import judge as judge_lib
from clp_jax.evaluation.judge import Judge, Question

APIS = ("openai", "gemini")
_AGAIN = frozenset({408, 425, 429})  # and all from 500
_LONGEST_PAUSE = 60.0  # seconds, of our own choice
_LONGEST_WAIT = 600.0  # seconds that Retry-After may ask for
_LONGEST_ANSWER = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where a language model answers.

  Attributes:
    url: the API's base, such as https://api.openai.com/v1 or
      https://generativelanguage.googleapis.com/v1beta.
    model: its name there.
    api: one of APIS.
    key: sent as a bearer token (openai) or x-goog-api-key (gemini); None sends
      none.
    timeout: seconds for a connection, until the answer starts, and for all of
      the answer.
    attempts: of a request, before the judge counts as down.
    parallel: requests at a time.
    max_tokens: of an answer.
    pause: seconds before the second attempt; then it doubles.
  """

  url: str
  model: str
  api: str = "openai"
  key: str | None = dataclasses.field(default=None, repr=False)
  timeout: float = 60.0
  attempts: int = 6
  parallel: int = 4
  max_tokens: int = 512
  pause: float = 1.0

  def __post_init__(self):
    try:
      parts = urllib.parse.urlsplit(self.url)
      known = parts.scheme in ("http", "https") and parts.hostname
      usable = bool(known) and parts.port != 0 and self.url.isprintable()
    except ValueError:
      usable = False
    if not usable or " " in self.url:
      raise ValueError(
        "the endpoint must be an http(s) address such as "
        f"https://api.openai.com/v1, got {self.url!r}."
      )
    if parts.query or parts.fragment or parts.username:
      # Not repeated: it may be the key.
      raise ValueError(
        "the endpoint is the API's base without ?, # or user; give the key by "
        "environment variable."
      )
    if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
      raise ValueError("the key holds blanks or letters that no header may.")
    check_choice("the API", self.api, APIS)
    for name in ("timeout", "attempts", "parallel", "max_tokens"):
      value = getattr(self, name)
      if not 0 < value < 1e9:  # of more seconds no timeout can be made
        raise ValueError(f"{name} must be > 0 and below 1e9, got {value}.")


def endpoint_judge(
  endpoint: Endpoint, template: str = judge_lib.PROMPT
) -> Judge:
  """A judge that asks a language model; the template of the question must hold
  {data}.

  Raises:
    ValueError: the template has no {data}.
  """
  if "{data}" not in template:
    raise ValueError("the prompt must hold {data}, where the texts go.")

  def asked(questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
    prompts = [judge_lib.prompt(question, template) for question in questions]
    return _ask_all(endpoint, prompts)

  identity = {
    "judge": endpoint.api,
    "endpoint": endpoint.url,
    "model": endpoint.model,
    "max_tokens": endpoint.max_tokens,
    "prompt": template,
  }
  return Judge(asked, identity)


def _ask_all(
  endpoint: Endpoint, prompts: Sequence[str]
) -> Iterator[tuple[int, str]]:
  """Asks `parallel` at a time; the first failure ends all.

  Answers that are there before a failure are yielded before it is raised.
  """
  todo: queue.SimpleQueue[int] = queue.SimpleQueue()
  for i in range(len(prompts)):
    todo.put(i)
  done: queue.SimpleQueue[tuple[int, str | BaseException]] = queue.SimpleQueue()
  stop = threading.Event()

  def work() -> None:
    while not stop.is_set():
      try:
        i = todo.get_nowait()
      except queue.Empty:
        return
      try:
        done.put((i, _ask(endpoint, prompts[i], stop)))
      except BaseException as error:
        done.put((i, error))  # before those that the stop will cause
        stop.set()

  # Daemons: an interrupted command does not wait for answers.
  threads = [
    threading.Thread(target=work, daemon=True)
    for _ in range(min(endpoint.parallel, len(prompts)))
  ]
  for thread in threads:
    thread.start()
  failure = None
  try:
    for _ in prompts:
      i, result = done.get()
      if isinstance(result, BaseException):
        failure = result
        break
      yield i, result
  finally:
    stop.set()
  if failure is None:
    return
  for thread in threads:  # what the others have under way is paid for
    thread.join(endpoint.timeout)
  while not done.empty():
    i, result = done.get()
    if not isinstance(result, BaseException):
      yield i, result
  raise failure


class _TryAgain(Exception):
  """A failure that may pass; `wait` is Retry-After in seconds, or None."""

  def __init__(self, message: str, wait: float | None = None):
    super().__init__(message)
    self.wait = wait


def _ask(endpoint: Endpoint, prompt: str, stop: threading.Event) -> str:
  """One answer, after as many attempts as it takes and may take."""
  pause = endpoint.pause
  for attempt in range(1, endpoint.attempts + 1):
    try:
      return _request(endpoint, prompt)
    except _TryAgain as error:
      problem = _printable(endpoint, str(error))
      if attempt == endpoint.attempts:
        break
      # Not all at the same moment again.
      wait = min(pause, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
      if error.wait is not None:
        wait = error.wait
      if wait > _LONGEST_WAIT:
        raise JudgeError(
          f"the judge at {endpoint.url} asks to wait {wait:.0f} s ({problem})"
        ) from error
      pause *= 2
      if stop.wait(wait):
        raise JudgeError("stopped") from error
  raise JudgeError(
    f"the judge at {endpoint.url} has failed {endpoint.attempts} times: "
    f"{problem}"
  )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """Lets a redirect be the error that its status is."""

  def redirect_request(self, *args, **kwargs):
    return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _request(endpoint: Endpoint, prompt: str) -> str:
  deadline = time.monotonic() + endpoint.timeout
  try:
    with _OPENER.open(_built(endpoint, prompt), timeout=endpoint.timeout) as r:
      content = _read(r, deadline)
  except urllib.error.HTTPError as error:
    with error:
      message = f"status {error.code}: {_error_text(error)}"
    if error.code in _AGAIN or error.code >= 500:
      wait = _retry_after(error.headers.get("Retry-After"))
      raise _TryAgain(message, wait) from error
    message = _printable(endpoint, message)
    raise JudgeError(
      f"the judge at {endpoint.url} refuses: {message}"
    ) from error
  except TimeoutError as error:
    raise _TryAgain(f"no answer within {endpoint.timeout:g} s") from error
  except urllib.error.URLError as error:
    if isinstance(error.reason, TimeoutError):
      raise _TryAgain(f"no answer within {endpoint.timeout:g} s") from error
    raise _TryAgain(str(error.reason)) from error
  except (OSError, http.client.HTTPException) as error:
    name = type(error).__name__
    raise _TryAgain(f"{name}: {error}".removesuffix(": ")) from error
  try:
    return _answer(endpoint.api, json.loads(content))
  except (
    *(ValueError, LookupError, TypeError, AttributeError),
    RecursionError,
  ) as error:
    raise _TryAgain(
      f"an answer that is not of {endpoint.api}'s form: {content[:80]!r}"
    ) from error


def _read(response: Any, deadline: float) -> bytes:
  """The body, within the deadline and _LONGEST_ANSWER."""
  parts, size = [], 0
  while part := response.read1(2**16):
    parts.append(part)
    size += len(part)
    if size > _LONGEST_ANSWER:
      raise http.client.HTTPException(f"more than {_LONGEST_ANSWER} bytes")
    if time.monotonic() > deadline:
      raise TimeoutError
  if response.length:  # what was announced and has not come
    raise http.client.IncompleteRead(b"".join(parts), response.length)
  return b"".join(parts)


def _built(endpoint: Endpoint, prompt: str) -> urllib.request.Request:
  url = endpoint.url.rstrip("/")
  headers = {"Content-Type": "application/json", "User-Agent": "clp_jax"}
  body: dict[str, Any]
  if endpoint.api == "openai":
    url += "/chat/completions"
    body = {
      "model": endpoint.model,
      "messages": [{"role": "user", "content": prompt}],
      "temperature": 0,
      "max_tokens": endpoint.max_tokens,
    }
    if endpoint.key is not None:
      headers["Authorization"] = f"Bearer {endpoint.key}"
  else:
    name = urllib.parse.quote(endpoint.model.removeprefix("models/"), safe="")
    url += f"/models/{name}:generateContent"
    body = {
      "contents": [{"role": "user", "parts": [{"text": prompt}]}],
      "generationConfig": {
        "temperature": 0,
        "maxOutputTokens": endpoint.max_tokens,
      },
    }
    if endpoint.key is not None:
      headers["x-goog-api-key"] = endpoint.key
  return urllib.request.Request(
    url, json.dumps(body).encode(), headers, method="POST"
  )


def _answer(api: str, content: Any) -> str:
  """The text of an answer; "" for one that was withheld, which is nonsense."""
  if api == "openai":
    text = content["choices"][0]["message"].get("content")
    return "".join([] if text is None else [text])  # TypeError for no text
  if "candidates" not in content and "promptFeedback" in content:
    return ""
  parts = content["candidates"][0].get("content", {}).get("parts", [])
  return "".join(part.get("text", "") for part in parts)


def _error_text(error: urllib.error.HTTPError) -> str:
  """What the server says is wrong, in brief."""
  try:
    content = error.read(4096)
  except (OSError, http.client.HTTPException):
    content = b""
  try:
    problem = json.loads(content)["error"]
    text = problem if isinstance(problem, str) else problem["message"]
  except (ValueError, LookupError, TypeError):
    text = error.reason
  return " ".join(str(text).split())[:200]


def _printable(endpoint: Endpoint, message: str) -> str:
  """The message without the key, which some servers repeat."""
  return message.replace(endpoint.key, "***") if endpoint.key else message


def _retry_after(value: str | None) -> float | None:
  """Seconds, from a header that holds seconds or a date; None for others."""
  if value is None:
    return None
  try:
    seconds = float(value)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
      return None
    seconds -= time.time()
  return max(0.0, seconds) if seconds == seconds else None

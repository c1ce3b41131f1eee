"""What keeps strangers and floods out; the routes behind it needn't care.

- Bodies are read here, whole, up to a size and within a time.
- With a key, what costs or tells something needs `Authorization: Bearer KEY`.
- On a loopback address there need not be a key, but the browser on this machine
  runs other people's pages: the Host must be one of this machine's own names (a
  page elsewhere can point a name of its own here), and what has an Origin must
  have ours. What is posted must be JSON by its type: no form of theirs is.
- The page may load nothing from elsewhere, nor be framed.
- A connection must send its headers within a time, and no more than so many.
"""

import asyncio
import dataclasses
import hmac
import ipaddress
import logging
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from clp_jax.serving import errors
from clp_jax.serving.errors import ApiError

OPEN_PATHS = {"/", "/style.css", "/page.js", "/health"}  # without the key
HEADER_BYTES = 64 * 1024
HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
  ),
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one client may ask for, and all of them together."""

  body_bytes: int = 1 << 20
  rows: int = 64  # answers of one request: documents times n
  waiting: int = 512  # answers that may wait
  seconds: float = 60.0  # from a request to its answer
  header_seconds: float = 10.0  # a client takes to send headers, or a body
  connections: int = 512

  # Characters of a document: those beyond can't be among the tokens read.
  characters_per_token: int = 64


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach an address or name."""
  if host.lower() == "localhost":
    return True
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return False


class Protection:
  """ASGI middleware: see the module."""

  def __init__(self, app: Any, limits: Limits, key: str | None, loopback: bool):
    """Wraps an application.

    Args:
      app: ASGI.
      limits: of the requests.
      key: that clients must know; None for none.
      loopback: whether the server listens on a loopback address only.
    """
    self._app = app
    self._limits = limits
    self._key = None if key is None else key.encode()
    self._loopback = loopback

  async def __call__(self, scope, receive, send) -> None:
    """Serves a request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    started = False

    async def send_protected(message):
      nonlocal started
      if message["type"] == "http.response.start":
        started = True
        headers = MutableHeaders(raw=list(message["headers"]))
        headers.update(HEADERS)
        if scope["path"] not in OPEN_PATHS - {"/health"}:
          headers.append("Cache-Control", "no-store")
        message = message | {"headers": headers.raw}
      await send(message)

    try:
      self._check(scope)
      body = await self._read(scope, receive)
      if scope["method"] == "HEAD":  # of which uvicorn sends the head alone
        scope = scope | {"method": "GET"}
      # A client that reads its answer too slowly is not waited for either.
      async with asyncio.timeout(self._limits.seconds + 30):
        await self._app(scope, _replay(body, receive), send_protected)
    except ApiError as error:
      if not started:
        response = errors.response(error, close=True)
        await response(scope, receive, send_protected)
    except _Gone:
      pass
    except Exception:
      # Starlette has answered it; the traceback is for the operator.
      logging.exception("a request failed")
      if not started:
        failure = ApiError(500, "The server failed to answer this request.")
        response = errors.response(failure, close=True)
        await response(scope, receive, send_protected)

  def _check(self, scope) -> None:
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    if self._loopback and not is_loopback(_without_port(host)):
      raise ApiError(
        421,
        "This server listens on a loopback address and answers to its names "
        "only; use http://127.0.0.1 or http://localhost with its port.",
        code="unknown_host",
      )
    origin = headers.get("origin")
    if origin not in (None, f"http://{host}", f"https://{host}"):
      raise ApiError(
        403,
        "Requests from pages of other origins are refused.",
        code="foreign_origin",
      )
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    if scope["method"] == "POST" and media_type.lower() != "application/json":
      raise ApiError(
        415,
        "Send JSON, with Content-Type: application/json.",
        code="unsupported_media_type",
      )
    if self._key is not None and scope["path"] not in OPEN_PATHS:
      scheme, _, key = headers.get("authorization", "").partition(" ")
      known = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
      if scheme.lower() != "bearer" or not known:
        raise ApiError(
          401,
          "Give the server's API key: Authorization: Bearer KEY.",
          code="invalid_api_key",
        )

  async def _read(self, scope, receive) -> bytes:
    limit = self._limits.body_bytes
    parts, size = [], 0
    try:
      async with asyncio.timeout(self._limits.header_seconds):
        while True:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise _Gone
          parts.append(message.get("body", b""))
          size += len(parts[-1])
          if size > limit:
            raise ApiError(
              413,
              f"The request's body has more than {limit} bytes; send less.",
              code="request_too_large",
            )
          if not message.get("more_body", False):
            return b"".join(parts)
    except TimeoutError:
      raise ApiError(
        408,
        "The request's body did not arrive in "
        f"{self._limits.header_seconds:g} s.",
        code="request_timeout",
      ) from None


class _Gone(Exception):
  """The client has left before its request was complete."""


def _replay(body: bytes, receive):
  """A `receive` that gives the body once more, then what comes after it."""
  given = False

  async def again():
    nonlocal given
    if given:
      return await receive()
    given = True
    return {"type": "http.request", "body": body, "more_body": False}

  return again


def _without_port(host: str) -> str:
  if host.startswith("["):  # of IPv6
    return host.partition("]")[0] + "]"
  return host.rpartition(":")[0] if ":" in host else host


def make_protocol(limits: Limits) -> type[asyncio.Protocol]:
  """uvicorn's HTTP protocol, with limits on what precedes a request."""

  class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport):
      super().connection_made(transport)
      if len(self.connections) > limits.connections:
        transport.write(
          b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
          b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
        transport.close()
      else:
        self._wait()

    def data_received(self, data):
      super().data_received(data)
      if self.cycle is None or self.cycle.response_complete:
        self._header_bytes += len(data)
        if self._header_bytes > HEADER_BYTES:
          self.transport.close()
        elif self._timer is None:
          self._wait()
      else:  # there is a request
        self._header_bytes = 0
        self._stop_waiting()

    def connection_lost(self, exc):
      self._stop_waiting()
      super().connection_lost(exc)

    def _wait(self):
      self._timer = self.loop.call_later(
        limits.header_seconds, self.transport.close
      )

    def _stop_waiting(self):
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None

  return Protocol

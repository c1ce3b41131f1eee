"""Errors in OpenAI's form: what its clients turn into their exceptions."""

import json

from starlette.responses import Response


class ApiError(Exception):
  """An answer that is no success; the message is for the client to read."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    retry_after: int | None = None,
  ):
    """Takes what the answer says.

    Args:
      status: of HTTP.
      message: what was wrong and what to change.
      code: OpenAI's name of the error, for programs.
      param: the field that caused it.
      retry_after: seconds; None where trying again won't help.
    """
    super().__init__(message)
    self.status = status
    self.message = message
    self.code = code
    self.param = param
    self.retry_after = retry_after


def body(error: ApiError) -> dict:
  """The JSON of an error."""
  kind = "server_error" if error.status >= 500 else "invalid_request_error"
  if error.status == 429:
    kind = "rate_limit_error"
  return {
    "error": {
      "message": error.message,
      "type": kind,
      "param": error.param,
      "code": error.code,
    }
  }


def response(error: ApiError, *, close: bool = False) -> Response:
  """The HTTP response of an error; `close` ends the connection with it."""
  headers = {}
  if error.retry_after is not None:
    headers["Retry-After"] = str(error.retry_after)
  if error.status == 401:
    headers["WWW-Authenticate"] = "Bearer"
  if close:
    headers["Connection"] = "close"
  # In ASCII: a message may quote what can't be encoded, half a surrogate.
  content = json.dumps(body(error), allow_nan=False)
  return Response(content, error.status, headers, "application/json")

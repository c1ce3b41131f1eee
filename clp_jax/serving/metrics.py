"""What a server counts, in Prometheus' format."""

import functools
import time
from typing import Any

import prometheus_client
from prometheus_client import exposition

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
  """The counters of one server, and of its process."""

  def __init__(self):
    self._registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=self._registry)
    counter = functools.partial(
      prometheus_client.Counter, registry=self._registry
    )
    histogram = functools.partial(
      prometheus_client.Histogram, registry=self._registry
    )
    text = "Requests answered, by path and status."
    self._requests = counter("clp_requests", text, ("path", "status"))
    text = "From a completion's request to the end of its answer."
    self._seconds = histogram("clp_completion_seconds", text, buckets=_SECONDS)
    self.prompt_tokens = counter("clp_prompt_tokens", "Tokens of documents.")
    text = "Tokens of answers."
    self.generated_tokens = counter("clp_generated_tokens", text)
    text = "Answers decoded together, until others joined them."
    self._batch_rows = histogram("clp_batch_rows", text, buckets=_ROWS)
    text = "Decoding, until others joined."
    self._batch_seconds = histogram("clp_batch_seconds", text, buckets=_SECONDS)

  def watch(self, batcher: Any) -> None:
    """Shows a batcher's queue from now on."""
    for name, text, attribute in (
      ("clp_waiting_rows", "Answers that wait.", "waiting"),
      ("clp_running_rows", "Answers being decoded.", "running"),
    ):
      gauge = prometheus_client.Gauge(name, text, registry=self._registry)
      gauge.set_function(functools.partial(getattr, batcher, attribute))

  def on_batch(self, rows: int, seconds: float) -> None:
    """Notes a batch."""
    self._batch_rows.observe(rows)
    self._batch_seconds.observe(seconds)

  def render(self) -> tuple[bytes, str]:
    """(content, media type) of GET /metrics."""
    content = prometheus_client.generate_latest(self._registry)
    return content, exposition.CONTENT_TYPE_LATEST

  def counting(self, app: Any) -> Any:
    """ASGI middleware that counts an application's answers."""

    async def counted(scope, receive, send):
      if scope["type"] != "http":
        await app(scope, receive, send)
        return
      start = time.perf_counter()
      status = 500

      async def noting(message):
        nonlocal status
        if message["type"] == "http.response.start":
          status = message["status"]
        await send(message)

      try:
        await app(scope, receive, noting)
      finally:
        # Only paths that exist: others would make a counter each.
        route = scope.get("route")
        path = "other" if route is None else route.path
        self._requests.labels(path, str(status)).inc()
        if path in ("/v1/completions", "/v1/chat/completions"):
          self._seconds.observe(time.perf_counter() - start)

    return counted

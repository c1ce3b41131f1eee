"""The queue before the decoder, and the thread that serves it.

Rows wait in the order in which they came, whatever their weightings. As soon as
a batch is done, the next takes the first row and all others that are waiting
for the same shape, up to the number of rows in a batch. Only the thread touches
the device; requests live on the event loop's side, and what has been sampled
for them goes there in one call for each piece of a batch.
"""

import asyncio
import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from clp_jax.serving.decoder import Decoder, Row, Sampled

STREAMED = 4  # tokens that are decoded before a stream hears of them


class Overloaded(Exception):
  """The queue is full; try again.

  Attributes:
    retry_after: seconds until there should be room.
  """

  def __init__(self, retry_after: int):
    super().__init__(f"retry after {retry_after} s")
    self.retry_after = retry_after


class Unavailable(Exception):
  """The decoder is shutting down or has failed."""


class Piece(NamedTuple):
  """Tokens of one row, in order; the last piece says how it ended."""

  row: int  # of the request
  tokens: list[int]
  logp: list[float]
  top: list[list[tuple[int, float]]]  # [(token, logp)] by position, if wanted
  finish_reason: str | None  # "stop", "length", or None before the end


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request that is waiting or being decoded."""

  rows: Sequence[Row]
  streamed: bool  # whether pieces are wanted as they come
  loop: asyncio.AbstractEventLoop
  pieces: asyncio.Queue
  cancelled: bool = False  # nobody is listening any more
  ended: set[int] = dataclasses.field(default_factory=set)  # rows

  async def __aiter__(self) -> AsyncIterator[Piece]:
    """The pieces, until every row has ended.

    Raises:
      Unavailable: when they will not come.
    """
    while len(self.ended) < len(self.rows):
      piece = await self.pieces.get()
      if isinstance(piece, Exception):
        raise piece
      if piece.row in self.ended:  # it was on its way when the row was stopped
        continue
      if piece.finish_reason is not None:
        self.ended.add(piece.row)
      yield piece

  def stop(self, row: int) -> None:
    """Ends a row: it needs no more tokens."""
    self.ended.add(row)


class _Waiting(NamedTuple):
  ticket: Ticket
  number: int  # of the row in the ticket


class Batcher:
  """Decodes the rows of all requests together."""

  def __init__(self, decoder: Decoder, max_waiting: int, on_batch=None):
    """Starts the thread.

    Args:
      decoder: compiled.
      max_waiting: rows that may wait; the request that exceeds it is refused.
      on_batch: None, or called by the thread with (rows, seconds) after each
        batch.
    """
    self._decoder = decoder
    self._max_waiting = max_waiting
    self._on_batch = on_batch
    self._changed = threading.Condition()
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._running = 0  # rows being decoded
    self._seconds = 0.0  # of a batch, lately
    self._closed = False
    self._thread = threading.Thread(
      target=self._serve, name="decoder", daemon=True
    )
    self._thread.start()

  @property
  def waiting(self) -> int:
    """Rows that wait."""
    return len(self._waiting)

  @property
  def running(self) -> int:
    """Rows that are being decoded."""
    return self._running

  @property
  def alive(self) -> bool:
    """Whether requests are served."""
    return self._thread.is_alive() and not self._closed

  def submit(self, rows: Sequence[Row], streamed: bool) -> Ticket:
    """Queues a request's rows; called on the event loop.

    Raises:
      Overloaded: too many are waiting.
      Unavailable: see there.
    """
    ticket = Ticket(rows, streamed, asyncio.get_running_loop(), asyncio.Queue())
    with self._changed:
      if not self.alive:
        raise Unavailable
      if len(self._waiting) + len(rows) > self._max_waiting:
        raise Overloaded(self.retry_after())
      self._waiting.extend(_Waiting(ticket, i) for i in range(len(rows)))
      self._changed.notify()
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Forgets a request: nobody waits for its answer."""
    with self._changed:
      ticket.cancelled = True
      kept = [w for w in self._waiting if w.ticket is not ticket]
      self._waiting = collections.deque(kept)

  def retry_after(self) -> int:
    """Seconds, at least 1, in which those who wait now should be served."""
    batches = 1 + len(self._waiting) / self._decoder.rows
    return max(1, math.ceil(batches * self._seconds))

  def close(self) -> None:
    """Ends the thread; requests that still wait get `Unavailable`."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join()

  def _serve(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting or self._closed)
        if self._closed:
          left, self._waiting = self._waiting, collections.deque()
          break
        batch = self._take()
        self._running = len(batch)
      start = time.perf_counter()
      try:
        self._decode(batch)
      except Exception:
        # The request can't be blamed, and the next may well succeed.
        logging.exception("decoding a batch failed")
        _fail({waiting.ticket for waiting in batch}, Unavailable())
      else:
        seconds = time.perf_counter() - start
        self._seconds += (seconds - self._seconds) / (4 if self._seconds else 1)
        if self._on_batch is not None:
          self._on_batch(len(batch), seconds)
      self._running = 0
    _fail({waiting.ticket for waiting in left}, Unavailable())

  def _take(self) -> list[_Waiting]:
    """The rows of the next batch, taken out of the queue."""

    def length(waiting: _Waiting) -> int:
      row = waiting.ticket.rows[waiting.number]
      return self._decoder.length(len(row.tokens))

    first = length(self._waiting[0])
    batch: list[_Waiting] = []
    others: collections.deque[_Waiting] = collections.deque()
    while self._waiting and len(batch) < self._decoder.rows:
      waiting = self._waiting.popleft()
      (batch if length(waiting) == first else others).append(waiting)
    others.extend(self._waiting)
    self._waiting = others
    return batch

  def _decode(self, batch: list[_Waiting]) -> None:
    """Decodes a batch and sends the pieces as they come."""
    decoding = self._decoder.begin(
      [waiting.ticket.rows[waiting.number] for waiting in batch]
    )
    sent = [0] * len(batch)
    open_rows = set(range(len(batch)))
    position = 0
    while True:
      for i in sorted(open_rows):
        ticket, number = batch[i]
        if number in ticket.ended:
          decoding.stop(i)
          open_rows.discard(i)
      if all(batch[i].ticket.cancelled for i in open_rows):
        break
      streamed = any(
        batch[i].ticket.streamed and not batch[i].ticket.cancelled
        for i in open_rows
      )
      position = position + STREAMED if streamed else self._decoder.max_tokens
      sampled = decoding.advance(position)
      deliveries: dict[Ticket, list[Piece]] = {}
      for i in sorted(open_rows):
        ticket, number = batch[i]
        ended = bool(sampled.ended[i])
        if ended or ticket.streamed:
          piece = self._piece(sampled, i, number, sent[i], ticket.rows[number])
          sent[i] += len(piece.tokens)
          deliveries.setdefault(ticket, []).append(piece)
        if ended:
          open_rows.discard(i)
      for ticket, pieces in deliveries.items():
        _send(ticket, pieces)

  def _piece(
    self, sampled: Sampled, i: int, number: int, start: int, row: Row
  ) -> Piece:
    """What row i of the batch, `number` of its request, has from `start` on."""
    part = slice(start, int(sampled.lengths[i]))
    tokens = sampled.tokens[i, part].tolist()
    finish_reason = None
    if sampled.ended[i]:
      stopped = tokens[-1] in self._decoder.eos_ids
      finish_reason = "stop" if stopped else "length"
    top = []
    if row.alternatives:
      top = [
        list(zip(ids, logp, strict=True))
        for ids, logp in zip(
          sampled.top_tokens[i, part].tolist(),
          sampled.top_logp[i, part].tolist(),
          strict=True,
        )
      ]
    logp = sampled.logp[i, part].tolist()
    return Piece(number, tokens, logp, top, finish_reason)


def _send(ticket: Ticket, pieces: Sequence[Piece | Exception]) -> None:
  def put():
    for piece in pieces:
      ticket.pieces.put_nowait(piece)

  try:
    ticket.loop.call_soon_threadsafe(put)
  except RuntimeError:  # the loop is closed: so is the server
    ticket.cancelled = True


def _fail(tickets: set[Ticket], error: Exception) -> None:
  for ticket in tickets:
    _send(ticket, [error])

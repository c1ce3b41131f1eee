"""The queue before the decoder, and the thread that serves it.

Rows wait in the order in which they came, whatever their weightings. Every few
positions, those that wait take the slots of rows that have ended or that nobody
waits for any more; the others go on. Only the thread touches the device;
requests live on the event loop's side, and what has been sampled for them goes
there in one call for each of those pieces.
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

from clp_jax.serving.decoder import Batch, Decoder, Row, Sampled

STREAMED = 4  # tokens that are decoded before a stream hears of them
TOGETHER = 8  # positions, where nobody streams, after which others may join


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


class _Running:
  """A row in its slot."""

  def __init__(self, ticket: Ticket, number: int):
    self.ticket = ticket
    self.number = number  # of the row in the ticket
    self.since = time.perf_counter()
    self.sent = 0  # tokens

  @property
  def needed(self) -> bool:
    """Whether somebody waits for more of it."""
    return not (self.ticket.cancelled or self.number in self.ticket.ended)


class Batcher:
  """Decodes the rows of all requests together."""

  def __init__(self, decoder: Decoder, max_waiting: int, on_batch=None):
    """Starts the thread.

    Args:
      decoder: compiled.
      max_waiting: rows that may wait; the request that exceeds it is refused.
      on_batch: None, or called by the thread with (rows, seconds) when rows
        have been decoded together for so long that others join or all are done.
    """
    self._decoder = decoder
    self._max_waiting = max_waiting
    self._on_batch = on_batch
    self._changed = threading.Condition()
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._running: dict[int, _Running] = {}  # by slot
    self._seconds = 0.0  # of a row in its slot, lately
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
    return len(self._running)

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
    turns = 1 + len(self._waiting) / self._decoder.rows
    return max(1, math.ceil(turns * self._seconds))

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
      try:
        self._decode()
      except Exception:
        # The requests can't be blamed, and the next may well succeed.
        logging.exception("decoding failed")
        _fail({row.ticket for row in self._running.values()}, Unavailable())
        self._running = {}
    _fail({waiting.ticket for waiting in left}, Unavailable())

  def _decode(self) -> None:
    """Decodes those that wait and those who join them, until nobody is left."""
    batch: Batch | None = None
    position = 0
    joining = self._take()
    while self._running:
      together, start = len(self._running), time.perf_counter()
      if batch is None:
        batch = self._decoder.begin(list(joining.values()))
      else:
        batch.admit(joining)
      joining = {}
      while self._running and not joining:
        streamed = any(r.ticket.streamed for r in self._running.values())
        position += STREAMED if streamed else TOGETHER
        self._deliver(batch.advance(position))
        for slot, row in list(self._running.items()):
          if not row.needed:
            batch.stop(slot)
            self._release(slot)
        joining = self._take()
      if self._on_batch is not None:
        self._on_batch(together, time.perf_counter() - start)

  def _take(self) -> dict[int, Row]:
    """The first of those that wait, in free slots from now on."""
    with self._changed:
      if self._closed:
        return {}
      free = [i for i in range(self._decoder.rows) if i not in self._running]
      joining = {}
      for slot in free[: len(self._waiting)]:
        ticket, number = self._waiting.popleft()
        self._running[slot] = _Running(ticket, number)
        joining[slot] = ticket.rows[number]
      return joining

  def _release(self, slot: int) -> None:
    """Makes a slot free."""
    seconds = time.perf_counter() - self._running.pop(slot).since
    self._seconds += (seconds - self._seconds) / (16 if self._seconds else 1)

  def _deliver(self, sampled: Sampled) -> None:
    """Sends what rows have that are streamed or have ended."""
    deliveries: dict[Ticket, list[Piece]] = {}
    for slot, row in list(self._running.items()):
      ended = bool(sampled.ended[slot])
      if ended or row.ticket.streamed:
        piece = self._piece(sampled, slot, row)
        row.sent += len(piece.tokens)
        deliveries.setdefault(row.ticket, []).append(piece)
      if ended:
        self._release(slot)
    for ticket, pieces in deliveries.items():
      _send(ticket, pieces)

  def _piece(self, sampled: Sampled, slot: int, row: _Running) -> Piece:
    """What a row has beyond what has been sent."""
    part = slice(row.sent, int(sampled.lengths[slot]))
    tokens = sampled.tokens[slot, part].tolist()
    finish_reason = None
    if sampled.ended[slot]:
      stopped = tokens[-1] in self._decoder.eos_ids
      finish_reason = "stop" if stopped else "length"
    top = []
    if row.ticket.rows[row.number].alternatives:
      top = [
        list(zip(ids, logp, strict=True))
        for ids, logp in zip(
          sampled.top_tokens[slot, part].tolist(),
          sampled.top_logp[slot, part].tolist(),
          strict=True,
        )
      ]
    logp = sampled.logp[slot, part].tolist()
    return Piece(row.number, tokens, logp, top, finish_reason)


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

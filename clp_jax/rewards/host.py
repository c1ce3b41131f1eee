"""Rewards that are functions of a user's: tried twice, awaited together.

What a reward depends on, a judge behind HTTP say, may fail once. Model rewards
are left alone: all processes compute them together, and none may repeat a step
that the others don't.
"""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

IN_FLIGHT = 16  # responses of an async reward that are scored at a time


def is_async(function: Callable) -> bool:
  """Whether calling it gives something to await."""
  return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
    getattr(function, "__call__", None)  # noqa: B004, of an object's class
  )


def tried_twice(function: Callable) -> Callable:
  """The function, called once more where it raises."""

  def score(*texts: Sequence[str]) -> Any:
    try:
      return function(*texts)
    except Exception as error:
      _warn(error)
      return function(*texts)

  return score


def awaited(function: Callable, in_flight: int) -> Callable:
  """A function of a whole batch, of an async one of any part of it.

  Args:
    function: async; takes (documents, references, responses), one of each, and
      gives its number or a sequence of that.
    in_flight: responses that are scored at a time, at most.

  Returns:
    (documents, references, responses), each [B] -> [B]. Responses are scored
    apart from each other, each twice at most. All batches are awaited in one
    event loop, so that the function may keep a client.

  Raises:
    ValueError: `in_flight` is no positive int.
  """
  if not isinstance(in_flight, int) or in_flight < 1:
    raise ValueError(f"in_flight must be a whole number >= 1, got {in_flight}.")
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, daemon=True).start()

  async def score_all(texts: Sequence[tuple[str, ...]]) -> list[Any]:
    limit = asyncio.Semaphore(in_flight)

    async def score(own: tuple[str, ...]) -> Any:
      async with limit:
        try:
          return await function(*([text] for text in own))
        except Exception as error:
          _warn(error)
          return await function(*([text] for text in own))

    async with asyncio.TaskGroup() as group:
      tasks = [group.create_task(score(own)) for own in texts]
    return [task.result() for task in tasks]

  def of_batch(*texts: Sequence[str]) -> Any:
    coroutine: Coroutine = score_all(list(zip(*texts, strict=True)))
    try:
      found = asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    except ExceptionGroup as group:
      raise group.exceptions[0] from group
    return [np.reshape(value, []) for value in found]

  return of_batch


def _warn(error: Exception) -> None:
  logging.warning(
    "a reward raised %s: %s; trying once more", type(error).__name__, error
  )

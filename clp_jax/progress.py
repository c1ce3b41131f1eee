"""Progress of a loop on stderr: a bar on a terminal, plain lines elsewhere.

  with progress.track(1000, "train clp", start=400) as advance:
    for ...:
      advance(1, {"loss": loss})

Nothing goes to stdout, where results go. Off a terminal there are no control
codes, whatever the environment asks for: logs stay readable. NO_COLOR turns the
bar's colours off.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

# Off a terminal, a line each tenth of the loop, and at least this often.
SECONDS_BETWEEN_LINES = 10.0

Fields = Mapping[str, float | str]


class Advance(Protocol):
  """Reports that `steps` more were done, and what to show beside the bar."""

  def __call__(self, steps: int = 1, fields: Fields | None = None) -> None: ...


@contextlib.contextmanager
def track(
  total: int, description: str, start: int = 0, *, shown: bool = True
) -> Iterator[Advance]:
  """Shows how far a loop is, its rate and the time left.

  Args:
    total: steps of the whole loop.
    description: what the loop does, in a word or three.
    start: steps that were done before, in a loop that is resumed; the rate
      leaves them out.
    shown: False says nothing: of several processes that run the same loop, one
      is enough.

  Yields:
    advance(steps, fields). Fields are shown with four digits; passing device
    arrays waits for them, so pass what was read already.

  Raises:
    ValueError: start is not in [0, total].
  """
  if not 0 <= start <= total:
    raise ValueError(f"start must be in [0, {total}] and is {start}.")
  if not shown:
    yield lambda steps=1, fields=None: None
    return
  if sys.stderr.isatty():
    # rich looks at variables such as FORCE_COLOR too; the decision is made.
    console = Console(file=sys.stderr, force_terminal=True)
    if not console.is_dumb_terminal:
      with _bar(console, total, description, start) as advance:
        yield advance
      return
  yield _lines(total, description, start)


@contextlib.contextmanager
def _bar(
  console: Console, total: int, description: str, start: int
) -> Iterator[Advance]:
  columns = (
    bars.TextColumn("{task.description}", markup=False),
    bars.BarColumn(bar_width=24),
    bars.MofNCompleteColumn(),
    _RateColumn(),
    bars.TimeRemainingColumn(),
    bars.TextColumn(
      "{task.fields[shown]}",
      markup=False,
      table_column=Column(no_wrap=True, overflow="ellipsis"),
    ),
  )
  with bars.Progress(*columns, console=console, redirect_stdout=False) as bar:
    task = bar.add_task(description, total=total, completed=start, shown="")

    def advance(steps: int = 1, fields: Fields | None = None) -> None:
      if fields is not None:
        bar.update(task, shown=_joined(fields))
      bar.advance(task, steps)

    yield advance


class _RateColumn(bars.ProgressColumn):
  """Steps a second over the last half minute."""

  def render(self, task: bars.Task) -> Text:
    speed = task.finished_speed or task.speed
    return Text("" if speed is None else f"{speed:.3g} it/s")


def _lines(total: int, description: str, start: int) -> Advance:
  done = line_done = start
  line_time = time.monotonic()
  shown = ""

  def advance(steps: int = 1, fields: Fields | None = None) -> None:
    nonlocal done, line_done, line_time, shown
    done += steps
    if fields is not None:
      shown = _joined(fields)
    now = time.monotonic()
    tenth_passed = done * 10 // total > line_done * 10 // total
    if not tenth_passed and now - line_time < SECONDS_BETWEEN_LINES:
      return
    parts = [f"{description} {done}/{total}"]
    if done > line_done and now > line_time:
      rate = (done - line_done) / (now - line_time)
      left = datetime.timedelta(seconds=round((total - done) / rate))
      parts += [f"{rate:.3g} it/s", f"{left} left"]
    parts.append(shown)
    sys.stderr.write("  ".join(filter(None, parts)) + "\n")
    sys.stderr.flush()
    line_done, line_time = done, now

  return advance


def _joined(fields: Fields) -> str:
  return " ".join(
    f"{name} {value if isinstance(value, str) else format(float(value), '.4g')}"
    for name, value in fields.items()
  )

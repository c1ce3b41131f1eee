"""Tests of clp_jax.progress."""

import io
import sys
import types

import pytest

from clp_jax import progress


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """A clock that tests set, in seconds."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def _replace_stderr(monkeypatch, stream):
  # Not sys.stderr itself: pytest sets that again between fixture and test.
  monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=stream))
  return stream


@pytest.fixture
def stderr(monkeypatch):
  return _replace_stderr(monkeypatch, io.StringIO())


@pytest.fixture
def terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")
  monkeypatch.delenv("NO_COLOR", raising=False)
  return _replace_stderr(monkeypatch, _Terminal())


class TestLines:
  def test_one_each_tenth_with_rate_and_time_left(self, stderr, clock):
    with progress.track(50, "train clp") as advance:
      for step in range(50):
        clock[0] += 0.25
        advance(1, {"loss": 0.123456, "step": step, "stage": "rl"})
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == (
      "train clp 5/50  4 it/s  0:00:11 left  loss 0.1235 step 4 stage rl"
    )
    assert lines[-1].startswith("train clp 50/50  4 it/s  0:00:00 left")

  def test_one_each_ten_seconds_when_a_tenth_takes_longer(self, stderr, clock):
    with progress.track(1000, "slow") as advance:
      for _ in range(8):
        clock[0] += 4.0
        advance()
    assert [x.split()[1] for x in stderr.getvalue().splitlines()] == [
      "3/1000",
      "6/1000",
    ]

  def test_resumed_steps_do_not_count_as_fast(self, stderr, clock):
    with progress.track(100, "resumed", start=85) as advance:
      clock[0] += 2.5
      advance(5)
    assert stderr.getvalue() == "resumed 90/100  2 it/s  0:00:05 left\n"

  def test_no_steps_and_no_time_divide_nothing(self, stderr, clock):
    with progress.track(10, "x") as advance:
      advance(1)
      clock[0] += 60
      advance(0, {"kl": 1})
    assert stderr.getvalue().splitlines() == ["x 1/10", "x 1/10  kl 1"]

  def test_forced_colours_bring_no_control_codes(self, stderr, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress.track(2, "plain") as advance:
      advance(2)
    assert "plain 2/2" in stderr.getvalue()
    assert "\x1b" not in stderr.getvalue()

  def test_a_terminal_without_cursor_gets_lines(self, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with progress.track(2, "plain") as advance:
      advance(2)
    assert terminal.getvalue().startswith("plain 2/2")
    assert "\x1b" not in terminal.getvalue()


class TestBar:
  def test_shows_count_rate_and_fields(self, terminal):
    with progress.track(40, "train [clp]", start=10) as advance:
      advance(29)
      advance(1, {"loss": 0.123456, "stage": "[rl]"})
    text = terminal.getvalue()
    for part in ("train [clp]", "40/40", "it/s", "loss 0.1235 stage [rl]"):
      assert part in text

  def test_no_color_leaves_out_colours_only(self, terminal, monkeypatch):
    def colours():
      terminal.seek(0)
      terminal.truncate()
      with progress.track(3, "x") as advance:
        advance(3)
      return "\x1b[32m" in terminal.getvalue()

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()
    assert "3/3" in terminal.getvalue()

  def test_results_still_go_to_stdout(self, terminal, capsys):
    with progress.track(1, "x") as advance:
      sys.stdout.write("a result\n")
      advance()
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()

  def test_an_error_in_the_loop_gets_out(self, terminal):
    with (
      pytest.raises(RuntimeError, match="lost"),
      progress.track(3, "x") as advance,
    ):
      advance()
      raise RuntimeError("lost")
    assert terminal.getvalue().endswith("\x1b[?25h")  # The cursor is back.


def test_a_start_beyond_the_end_is_an_error():
  with (
    pytest.raises(ValueError, match=r"start must be in \[0, 3\] and is 4"),
    progress.track(3, "x", start=4),
  ):
    pass

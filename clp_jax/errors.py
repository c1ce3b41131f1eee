"""All errors that a user can cause; their messages say what to change.

Needs neither JAX nor another module of the package, so that a command can name
them before anything else is imported.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any


class ConfigError(ValueError):
  """A config that can't be trained; the message says what to change."""


class RunError(RuntimeError):
  """A run's folder can't be used; the message says what to change."""


class JudgeError(RunError):
  """The judge can't be used; the message says why and what is kept."""


class FrontError(ValueError):
  """A front that is malformed, missing, or not comparable with another."""


class RewardError(RuntimeError):
  """A reward failed or returned what can't be trained on."""


class Preempted(Exception):
  """SIGTERM came, to this process or another; the state was saved."""


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
  """Raises a ValueError unless the value of this name is one of the choices."""
  known = list(choices)
  if value not in known:
    raise ValueError(
      f"{name} must be one of {', '.join(known)}, got {value!r}."
    )


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
  """Turns a ValueError about what a config names into a ConfigError."""
  try:
    yield
  except ValueError as error:
    raise ConfigError(str(error)) from error


@contextlib.contextmanager
def importing(what: str, remedy: str) -> Iterator[None]:
  """Turns what importing a user's code raises into a ValueError: what could not
  be imported, and the remedy beside correcting the path."""
  try:
    yield
  except Exception as error:  # it runs that code: all can happen
    raise ValueError(
      f"{what}: {type(error).__name__}: {error}; correct the path, or {remedy}."
    ) from error

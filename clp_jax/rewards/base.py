"""Rewards: named callables from texts to scores.

A reward's callable takes three equally long sequences of strings, the
documents, the reference summaries and the responses, and returns one number a
response, [B]: higher is better. Any Python callable will do, and a config names
it by its import path:

  def brevity(documents, references, responses, limit=20):
    return [min(1.0, limit / max(1, len(r.split()))) for r in responses]

  {"source": "my_package.my_module:brevity", "limit": 12}

It may be async, such as a judge behind HTTP: then it is called with one
response at a time, and a whole batch is awaited at once, `in_flight` of it at a
time. Rewards that are models are built once, for a mesh, into such a callable,
and then compute on its devices.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clp_jax import sharding
from clp_jax.errors import RewardError, importing
from clp_jax.rewards import host

Texts = Sequence[str]
Score = Callable[[Texts, Texts, Texts], Any]

# Rewards that have a short name.
BUILT_IN = {
  "rouge": "clp_jax.rewards.rouge:rouge",
  "length": "clp_jax.rewards.length:length",
}
# Those that are built for a mesh: (mesh, **options) -> score.
MODELS = {
  "entailment": "clp_jax.rewards.entailment:build",
  "preference": "clp_jax.rewards.preference:build",
  "classifier": "clp_jax.rewards.classifier:build",
}


@dataclasses.dataclass(frozen=True)
class Reward:
  """A named reward.

  Attributes:
    name: what configs, logs and errors call it.
    score: (documents, references, responses), each [B] strings -> [B] numbers.
  """

  name: str
  score: Score


def load_reward(
  name: str, spec: Mapping[str, Any], mesh: Mesh | None = None
) -> Reward:
  """Finds, or builds, the reward that a config describes.

  Args:
    name: the reward's name.
    spec: `source`, one of BUILT_IN or MODELS or the import path of a callable,
      "package.module:attribute"; `normalise`, which concerns training and is
      ignored here; `in_flight` of an async callable; all other keys are keyword
      arguments for the callable, or for what builds it.
    mesh: where a model runs; None takes all devices as the data axis.

  Returns:
    The reward.

  Raises:
    ValueError: there is no source, or it can't be imported, is not callable, or
      doesn't take these arguments, or its model can't be loaded.
  """
  options = dict(spec)
  options.pop("normalise", None)
  source = options.pop("source", None)
  if not isinstance(source, str):
    raise ValueError(
      f"reward {name!r} has no source; set one of {_names()} or an import "
      f"path such as 'package.module:attribute', got {source!r}."
    )
  called = "score(documents, references, responses"
  arguments: tuple = ([], [], [])
  path = BUILT_IN.get(source, source)
  if source in MODELS:
    mesh = sharding.make_mesh() if mesh is None else mesh
    called, arguments, path = "build(mesh", (mesh,), MODELS[source]
  function = _import(name, path)
  if source not in MODELS and host.is_async(function):
    in_flight = options.pop("in_flight", host.IN_FLIGHT)
  try:
    inspect.signature(function).bind(*arguments, **options)
  except TypeError as error:
    raise ValueError(
      f"reward {name!r}: {source} can't be called as {called}"
      f"{''.join(f', {key}=...' for key in options)}): {error}."
    ) from error
  except ValueError:  # some callables written in C have no signature
    pass
  if source in MODELS:
    try:
      return Reward(name, function(mesh, **options))
    except ValueError as error:
      raise ValueError(f"reward {name!r}: {error}") from error
  called_with = functools.partial(function, **options)
  if not host.is_async(function):
    return Reward(name, host.tried_twice(called_with))
  try:
    return Reward(name, host.awaited(called_with, in_flight))
  except ValueError as error:
    raise ValueError(f"reward {name!r}: {error}") from error


def _names() -> str:
  return ", ".join((*BUILT_IN, *MODELS))


def _import(name: str, path: str) -> Callable:
  """Imports "package.module:attribute"."""
  module_name, _, attribute = path.partition(":")
  if not module_name or not attribute:
    raise ValueError(
      f"reward {name!r} has the source {path!r}; expected one of {_names()} or "
      "an import path 'package.module:attribute'."
    )
  with importing(
    f"reward {name!r}: can't import {path!r}",
    "install the package or add its folder to PYTHONPATH",
  ):
    score = functools.reduce(
      getattr, attribute.split("."), importlib.import_module(module_name)
    )
  if not callable(score):
    raise ValueError(
      f"reward {name!r}: {path!r} is {type(score).__name__}, not a callable "
      "(documents, references, responses) -> [B]."
    )
  return score


def score_all(
  rewards: Sequence[Reward],
  documents: Sequence[str],
  references: Sequence[str],
  responses: Sequence[str],
  *,
  step: int,
) -> np.ndarray:
  """Scores responses with every reward, and checks what comes back.

  Args:
    rewards: the m rewards.
    documents: [B] texts.
    references: [B] texts.
    responses: [B] texts.
    step: the training step, for errors.

  Returns:
    [B, m] float32, finite.

  Raises:
    ValueError: the three sequences differ in length.
    RewardError: a reward raised, or returned another shape, no numbers, or
      something not finite; the message names the reward, the step and, of
      several bad samples, the first.
  """
  count = len(responses)
  if not len(documents) == len(references) == count:
    raise ValueError(
      "expected as many documents and references as responses, got "
      f"{len(documents)}, {len(references)} and {count}."
    )
  scores = np.zeros([count, len(rewards)], np.float32)
  for column, reward in enumerate(rewards):
    where = f"reward {reward.name!r} at step {step}"
    try:
      values = reward.score(documents, references, responses)
    except Exception as error:
      raise RewardError(
        f"{where} raised {type(error).__name__}: {error}; it must score any "
        "text that a policy may produce, empty text included."
      ) from error
    try:
      with np.errstate(over="ignore"):  # infinite is refused below
        values = np.asarray(values).astype(np.float32)
    except (TypeError, ValueError) as error:
      raise RewardError(
        f"{where} returned what is no array of numbers ({error}); return one "
        "number a response."
      ) from error
    if values.shape != (count,):
      raise RewardError(
        f"{where} returned shape {list(values.shape)} for {count} responses; "
        f"expected [{count}]: return one number a response."
      )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      i = int(bad[0])
      raise RewardError(
        f"{where} returned {values[i]} for sample {i} ({bad.size} of {count} "
        f"samples are bad), whose response is {_clip(responses[i])!r}; return "
        "a finite number, such as 0, for what can't be scored."
      )
    scores[:, column] = values
  return scores


def _clip(text: str, limit: int = 80) -> str:
  return text if len(text) <= limit else text[: limit - 3] + "..."

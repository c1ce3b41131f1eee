"""What each method costs: parameters trained and stored, time a token.

Parameters are counted from shapes. Times are of one process in which the
methods take turns, on random parameters with the end of sequence ruled out, so
that each decodes as many tokens.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.bank import Bank
from clp_jax.models import decoding, families, mixture
from clp_jax.models.mixture import Mixture
from clp_jax.models.presets import PRESETS
from clp_jax.rollout import row_keys
from clp_jax.sampling import Sampling


class Parameters(NamedTuple):
  """Of one method for m rewards at one KL weight."""

  method: str
  trained: int  # in all runs that it needs
  stored: int  # to answer any weighting
  models: int  # that a token goes through


class Time(NamedTuple):
  """Of decoding a batch, milliseconds a token position."""

  method: str
  models: int
  median: float
  low: float  # the fastest and the slowest repetition
  high: float
  # Median of the ratio to the first method in the same turn: what else the
  # machine does comes and goes more slowly than turns do.
  over_first: float


def _trained(
  config: families.Config, steering: str = "none", num_sets: int = 1
) -> int:
  """Parameters of a bank, or of one model."""
  return Bank(config, steering, num_sets).counts().trained


def parameters(config: families.Config, num_rewards: int) -> list[Parameters]:
  """Of every method that is made of whole models or their parts."""
  one, m = _trained(config), num_rewards
  banks = {
    label: _trained(config, steering, m)
    for label, steering in (
      ("full-CLP", "full"),
      ("attn-CLP", "attention"),
      ("logit-CLP", "logits"),
    )
  }
  return [
    *(Parameters(label, own, own, 1) for label, own in banks.items()),
    Parameters("prompting", one, one, 1),
    Parameters("Rewarded Soups", m * one, m * one, 1),
    Parameters("MOD", m * one, m * one, m),
    Parameters("DeRa (one reward)", one, 2 * one, 2),
    Parameters("one run a weighting", one, one, 1),
  ]


def attention_share(size: str, num_rewards: int) -> float:
  """attn-CLP's parameters beyond one model's, over those of full-CLP."""
  config = dataclasses.replace(PRESETS[size], scan_layers=True)
  one = _trained(config)
  extra = _trained(config, "attention", num_rewards) - one
  return extra / ((num_rewards - 1) * one)


def decode_times(
  config: families.Config,
  *,
  prompts: int,
  source_length: int,
  target_length: int,
  repeats: int,
) -> list[Time]:
  """Times of CLP, Rewarded Soups, DeRa and MOD side by side.

  Args:
    config: of the T5.
    prompts: rows decoded together.
    source_length: tokens of a prompt.
    target_length: tokens that are decoded.
    repeats: of each method, in turns, after one that compiles.
  """
  model = families.build(config)
  keys = jax.random.split(jax.random.key(0), 3)
  sets = [model.init(key) for key in keys]
  c = jnp.asarray([0.3, 0.7])
  tokens = jax.random.randint(
    jax.random.key(1), (prompts, source_length), 2, config.vocab_size
  )
  rows = row_keys(jax.random.key(2), prompts)
  allowed = np.arange(config.vocab_size) > 0
  last = config.vocab_size - 1  # stands for the end, and never comes

  def decode(start, steered):
    next_logits, cache = start(model, steered, tokens, max_length=target_length)

    def endless(last, cache, position):
      logits, cache = next_logits(last, cache, position)
      return logits.at[:, last].set(-1e9), cache

    return decoding.sample_from(
      endless,
      cache,
      rows,
      Sampling(allowed, (last,), config.pad_id),
      target_length,
    ).tokens

  def mixed(steering):
    bank = Bank(config, steering, 2)
    params = jax.tree.map(
      lambda s, a, b: jnp.stack([a, b]) if s else a, bank.steerable, *sets[:2]
    )
    return jax.jit(lambda: bank.mix(params, {}, c))()

  one = jax.jit(lambda params: decode(decoding.start, params))
  several = jax.jit(lambda models: decode(mixture.start, models))
  third = jnp.full([3], 1 / 3)
  cases: list[tuple[str, int, Callable]] = [
    ("full-CLP", 1, functools.partial(one, mixed("full"))),
    ("attn-CLP", 1, functools.partial(one, mixed("attention"))),
    ("Rewarded Soups", 1, functools.partial(one, mixed("full"))),
    ("DeRa", 2, functools.partial(several, Mixture(tuple(sets[:2]), c))),
    (
      "MOD, 3 rewards",
      3,
      functools.partial(several, Mixture(tuple(sets), third)),
    ),
  ]
  found: dict[str, list[float]] = {name: [] for name, _, _ in cases}
  for repeat in range(repeats + 1):
    for name, _, case in cases:
      start = time.perf_counter()
      jax.block_until_ready(case())
      if repeat:
        seconds = time.perf_counter() - start
        found[name].append(1000 * seconds / target_length)
  return [
    Time(
      name,
      models,
      statistics.median(t),
      min(t),
      max(t),
      statistics.median(
        x / y for x, y in zip(t, found[cases[0][0]], strict=True)
      ),
    )
    for name, models, _ in cases
    for t in [found[name]]
  ]

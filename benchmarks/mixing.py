"""Steering while decoding: mixing, rows that differ, and DeRa.

    python -m benchmarks.mixing [--family t5] [--size small] [--batch 64]
      [--source 256] [--target 64] [--dtype float32] [--steering full]
      [--rank 8] [--n 3] [--json]

"merged" decodes a batch under one weighting: its policy is mixed once.
"per row" decodes it with a weighting for each row, from the stacked sets;
"one by one" is what that replaces: a policy mixed for each row. "DeRa" decodes
with two models whose logits are mixed at every token. "times" is to "merged".

With --steering lora the m sets are adapters of `--rank`: "merged" adds them to
the base's kernels, and "per row" keeps them beside it. DeRa, whose models are
whole ones, is left out.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models, timing
from clp_jax import conditioning, row_mixing
from clp_jax.adapters import Adapter
from clp_jax.bank import Bank
from clp_jax.cli import setup
from clp_jax.models import decoding, families, mixture
from clp_jax.models.families import Config
from clp_jax.rollout import row_keys
from clp_jax.sampling import Sampling


def stacked_sets(base: Any, m: int) -> Any:
  """m sets that differ a little, as trained ones do: leaves [m, ...]."""

  @jax.jit
  def stack(base):
    sets = [
      jax.tree.map(lambda p, s=s: p * (1 + 1e-3 * s), base) for s in range(m)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)

  return stack(base)


def coefficients_of_rows(rows: int, m: int) -> np.ndarray:
  """[rows, m] float32 on the simplex."""
  rng = np.random.default_rng(0)
  return rng.dirichlet(np.ones(m), rows).astype(np.float32)


def sample_rows(
  config: Config, steerable: Any, num_tokens: int
) -> jax.stages.Wrapped:
  """Jitted (sets, coefficients, source, keys) -> samples: rows of their own."""
  sampling = Sampling(models.allowed(config), config.eos_ids, config.pad_id)

  @jax.jit
  def sample(sets, coefficients, source, keys):
    params = row_mixing.mix_rows(sets, steerable, coefficients)
    return decoding.sample(
      families.build(config),
      params,
      source,
      keys,
      sampling,
      max_length=num_tokens,
    )

  return sample


class Steered(NamedTuple):
  """Sets that a weighting makes a policy of, or each row one of its own."""

  mix: Callable[[np.ndarray], Any]  # coefficients [m] -> a merged policy
  sets: Any  # that `sample_rows` takes
  steerable: Any


def full(config: Config, base: Any, m: int) -> Steered:
  """Of m whole sets."""
  sets = stacked_sets(base, m)
  steerable = conditioning.steerable_leaves(base, "full")
  mix = jax.jit(lambda sets, c: conditioning.mix(sets, steerable, c))
  return Steered(lambda c: mix(sets, c), sets, steerable)


def lora(config: Config, base: Any, m: int, rank: int) -> Steered:
  """Of m sets of adapters of attention and MLP, beside the one base."""
  bank = Bank(
    config,
    "lora",
    m,
    frozen_shared=True,
    adapter=Adapter("lora", rank, 1.0, ("attention", "mlp")),
  )

  @jax.jit
  def init(base):
    # B starts at 0, which no trained one is.
    factors = bank.init(base, jax.random.key(0))
    return jax.tree.map(lambda x: x + 1e-3, factors)

  factors = init(base)
  mix, row_sets = jax.jit(bank.mix), jax.jit(bank.row_sets)
  return Steered(
    lambda c: mix(factors, base, c), row_sets(factors, base), bank.steerable
  )


def main() -> None:
  """Runs the benchmark."""
  args = _arguments()
  setup.configure()
  config = models.config_of(args)
  base = models.random_params(config)
  source = models.random_tokens(args.batch, args.source, config)
  keys = row_keys(jax.random.key(0), args.batch)
  sampling = Sampling(models.allowed(config), config.eos_ids, config.pad_id)
  model = families.build(config)

  @jax.jit
  def sample(params, source, keys):
    return decoding.sample(
      model, params, source, keys, sampling, max_length=args.target
    )

  @jax.jit
  def sample_mixture(models_, coefficients, source, keys):
    next_logits, cache = mixture.start(
      model,
      mixture.Mixture(models_, coefficients),
      source,
      max_length=args.target,
    )
    return decoding.sample_from(next_logits, cache, keys, sampling, args.target)

  def one_by_one(mix, coefficients, source, keys):
    return [
      sample(mix(c), source[i : i + 1], keys[i : i + 1])
      for i, c in enumerate(coefficients)
    ]

  of = {"full": full, "lora": functools.partial(lora, rank=args.rank)}
  two, three = (of[args.steering](config, base, m) for m in (2, 3))
  rows = {m: coefficients_of_rows(args.batch, m) for m in (2, 3)}
  per_row = sample_rows(config, two.steerable, args.target)
  half = np.full([2], 0.5, np.float32)
  merged = "merged, m = 2"
  runs = {
    merged: lambda: sample(two.mix(half), source, keys),
    "mixing alone, m = 2": lambda: two.mix(half),
    "mixing alone, m = 3": lambda: three.mix(rows[3][0]),
    "per row, m = 2": lambda: per_row(two.sets, rows[2], source, keys),
    "per row, m = 3": lambda: per_row(three.sets, rows[3], source, keys),
  }
  if args.steering == "full":
    pair = tuple(jax.tree.map(lambda s, k=k: s[k], two.sets) for k in range(2))
    runs["DeRa, 2 models"] = lambda: sample_mixture(pair, half, source, keys)
  if args.one_by_one:
    runs["one by one, m = 2"] = lambda: one_by_one(
      two.mix, rows[2], source, keys
    )
  rates = timing.measure_rates(args.dtype)
  times = timing.take_turns(runs, args.n)
  table = []
  for name in runs:
    decodes = not name.startswith("mixing")
    row = timing.row(
      name,
      times[name],
      tokens=args.batch * args.target if decodes else None,
      **models.describe(args),
    )
    if decodes and name != merged:
      row |= timing.multiple(times[name], times[merged])
    table.append(row)
  timing.show(table, args, rates)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  models.add_arguments(parser, batch=64, source=256, target=64)
  parser.add_argument(
    "--one-by-one", action="store_true", help="time that, too"
  )
  parser.add_argument(
    "--steering",
    choices=("full", "lora"),
    default="full",
    help="what there are m of (default: full)",
  )
  timing.add_rank(parser)
  timing.add_arguments(parser, n=3)
  return models.parse(parser)


if __name__ == "__main__":
  main()

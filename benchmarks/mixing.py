"""Steering while decoding: mixing, rows that differ, and DeRa.

    python -m benchmarks.mixing [--size small] [--batch 64] [--source 256]
      [--target 64] [--dtype float32] [--n 3] [--json]

"merged" decodes a batch under one weighting: its policy is mixed once.
"per row" decodes it with a weighting for each row, from the stacked sets;
"one by one" is what that replaces: a policy mixed for each row. "DeRa" decodes
with two models whose logits are mixed at every token. "times" is to "merged".
"""

import argparse

import jax
import numpy as np

from benchmarks import models, timing
from clp_jax import conditioning, row_mixing
from clp_jax.cli import setup
from clp_jax.models import decoding, families, mixture
from clp_jax.rollout import row_keys
from clp_jax.sampling import Sampling


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  models.add_arguments(parser, batch=64, source=256, target=64)
  parser.add_argument(
    "--one-by-one", action="store_true", help="time that, too"
  )
  timing.add_arguments(parser, n=3)
  args = models.parse(parser)
  setup.configure()
  config = models.config_of(args)
  base = models.random_params(config)
  source = models.random_tokens(args.batch, args.source, config)
  keys = row_keys(jax.random.key(0), args.batch)
  steerable = conditioning.steerable_leaves(base, "full")
  sampling = Sampling(models.allowed(config), config.eos_ids, config.pad_id)
  model = families.build(config)

  @jax.jit
  def expand(base, seeds):
    """Sets that differ a little, as trained ones do."""
    sets = [
      jax.tree.map(lambda p, s=s: p * (1 + 1e-3 * s), base) for s in seeds
    ]
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *sets)

  @jax.jit
  def mix(sets, coefficients):
    return conditioning.mix(sets, steerable, coefficients)

  @jax.jit
  def sample(params, source, keys):
    return decoding.sample(
      model, params, source, keys, sampling, max_length=args.target
    )

  @jax.jit
  def sample_rows(sets, coefficients, source, keys):
    params = row_mixing.mix_rows(sets, steerable, coefficients)
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

  def one_by_one(sets, coefficients, source, keys):
    return [
      sample(mix(sets, c), source[i : i + 1], keys[i : i + 1])
      for i, c in enumerate(coefficients)
    ]

  sets = {m: expand(base, np.arange(m)) for m in (2, 3)}
  rng = np.random.default_rng(0)
  rows = {m: rng.dirichlet(np.ones(m), args.batch) for m in sets}
  rows = {m: c.astype(np.float32) for m, c in rows.items()}
  half = np.full([2], 0.5, np.float32)
  pair = tuple(jax.tree.map(lambda s, k=k: s[k], sets[2]) for k in range(2))
  merged = "merged, m = 2"
  runs = {
    merged: lambda: sample(mix(sets[2], half), source, keys),
    "mixing alone, m = 2": lambda: mix(sets[2], half),
    "mixing alone, m = 3": lambda: mix(sets[3], rows[3][0]),
    "per row, m = 2": lambda: sample_rows(sets[2], rows[2], source, keys),
    "per row, m = 3": lambda: sample_rows(sets[3], rows[3], source, keys),
    "DeRa, 2 models": lambda: sample_mixture(pair, half, source, keys),
  }
  if args.one_by_one:
    runs["one by one, m = 2"] = lambda: one_by_one(
      sets[2], rows[2], source, keys
    )
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
  timing.show(table, args)


if __name__ == "__main__":
  main()

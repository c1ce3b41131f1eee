"""Sampling: tokens a second, next to transformers.

    python -m benchmarks.rollout [--family t5] [--size small] [--batch 32]
      [--source 256] [--target 64] [--dtype float32] [--samples 1] [--n 5]
      [--json]

A run reads the sources and samples `target` tokens for each at temperature 1
out of the whole vocabulary. "share of bandwidth" is what decoding would need of
it at least, of what was measured just before. For an accelerator:

    python -m benchmarks.rollout --size large --dtype bfloat16 --batch 64
"""

import argparse

import jax

from benchmarks import models, timing
from clp_jax.cli import setup
from clp_jax.models import decoding, families
from clp_jax.rollout import row_keys
from clp_jax.sampling import Sampling


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  models.add_arguments(parser, batch=32, source=256, target=64)
  parser.add_argument(
    "--samples", type=int, default=1, help="a source (default: 1)"
  )
  timing.add_arguments(parser, n=5)
  args = models.parse(parser)
  setup.configure()
  config = models.config_of(args)
  params = models.random_params(config)
  source = models.random_tokens(args.batch, args.source, config)
  rows = args.batch * args.samples
  tokens = rows * args.target

  @jax.jit
  def sample(params, source, keys):
    return decoding.sample(
      families.build(config),
      params,
      source,
      keys,
      Sampling(models.allowed(config), config.eos_ids, config.pad_id),
      num_samples=args.samples,
      max_length=args.target,
    )

  keys = row_keys(jax.random.key(0), rows)
  runs = {"clp_jax": lambda: sample(params, source, keys)}
  if models.has_peer(args):
    peer = models.Peer(config, params, source=args.source, target=args.target)
    inputs = peer.tensor(source)

    def peer_sample():
      with peer.torch.inference_mode():
        peer.model.generate(
          input_ids=inputs,
          attention_mask=peer.torch.ones_like(inputs),
          do_sample=True,
          top_k=0,
          num_return_sequences=args.samples,
          min_new_tokens=args.target,
          max_new_tokens=args.target,
        )
      peer.wait()

    runs[peer.name] = peer_sample
  rates = timing.measure_rates(args.dtype)
  times = timing.take_turns(runs, args.n)

  table = []
  ours, *others = runs
  for name in runs:
    fields = models.describe(args) | {"samples": args.samples}
    if name == ours:
      needed = models.decode_bytes(
        config, rows, args.source, args.target, args.samples
      )
      used = needed / times[name].median
      fields["share of bandwidth"] = used / rates.bandwidth
    against = times[others[0]] if name == ours and others else None
    table.append(
      timing.row(name, times[name], tokens=tokens, against=against, **fields)
    )
  timing.show(table, args, rates)


if __name__ == "__main__":
  main()

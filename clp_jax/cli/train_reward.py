"""`clp train-reward`: a preference model from pairs of responses.

Its data are JSONL lines with "document", "chosen" and "rejected". The folder it
makes is the model of a reward: rewards.NAME.source=preference,
rewards.NAME.model=DIR. Of a decoder, `clp export --format hf` writes it as a
folder of transformers.
"""

import argparse

from clp_jax.cli import arguments

EXAMPLE = (
  "clp train-reward --config configs/reward.py --config.data.train=pairs.jsonl "
  "--config.data.eval=held_out.jsonl --config.model.init=flan-t5-base "
  "--workdir runs/reward"
)


add_arguments = arguments.add_training


def run(args: argparse.Namespace) -> None:
  config = arguments.start_training(args)
  from clp_jax import distributed
  from clp_jax.train import reward_model

  report = reward_model.train(config, args.workdir)
  if distributed.is_first():
    print(
      f"held-out accuracy {report.accuracy:.4f} +- {report.stderr:.4f}, loss "
      f"{report.loss:.4f} nats a pair, on {report.pairs} pairs"
    )
    print(f"{args.workdir}/evaluation/accuracy.json")

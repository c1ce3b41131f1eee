"""`clp train-sft`: supervised finetuning on reference summaries, and no more.

The folder it makes is what `clp train --config.model.init=DIR` starts from.
"""

import argparse

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError

EXAMPLE = (
  "clp train-sft --config configs/jsonl.py --config.data.train=train.jsonl "
  "--config.data.eval=dev.jsonl --config.model.init=flan-t5-base --workdir "
  "runs/sft"
)


add_arguments = arguments.add_training


def run(args: argparse.Namespace) -> None:
  config = arguments.start_training(args)
  if config.sft.steps < 1:
    raise ConfigError("sft.steps is 0: nothing would be trained; set it.")
  from clp_jax import distributed
  from clp_jax.train import sft

  finetuned = sft.train(config, args.workdir)
  report = sft.report_held_out(config, args.workdir, finetuned)
  if not distributed.is_first():
    return
  if report is not None:
    print(
      f"held-out loss {report.loss:.4f} nats a token, accuracy "
      f"{report.accuracy:.4f}, on {report.tokens} tokens of "
      f"{report.documents} references"
    )
  print(args.workdir)

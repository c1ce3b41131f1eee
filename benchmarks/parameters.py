"""Parameters that each method trains and stores, computed from the presets.

  python -m benchmarks.parameters
  python -m benchmarks.parameters --models xxl --rewards 3

Prints a markdown table, a row a model and method:
  trained  numbers that optimizers change, over all of the method's runs
  stored   numbers that are kept to answer at any weighting, the reference only
           where answering reads it
  extra    (stored - T5) / T5: what steering costs beyond one ordinary T5
Nothing is allocated: shapes are all that is needed.
"""

import argparse
import dataclasses
from typing import NamedTuple

from clp_jax.adapters import TARGETS, Adapter
from clp_jax.bank import Bank
from clp_jax.models.presets import PRESETS
from clp_jax.models.t5 import T5Config


class Row(NamedTuple):
  """One method on one model."""

  method: str
  trained: int
  stored: int


def rows(
  model_config: T5Config, num_rewards: int, rank: int, soft_tokens: int
) -> list[Row]:
  """All methods on one model.

  Args:
    model_config: of the reference.
    num_rewards: m; one alpha, so that there are as many parameter sets.
    rank: of the adapters.
    soft_tokens: P.
  """
  # Scanned layers trace faster; no count depends on the end of sequence.
  config = dataclasses.replace(model_config, scan_layers=True, eos_ids=(1,))

  def bank(kind, **settings):
    return Bank(config, kind, num_rewards, **settings).counts()

  def adapted(kind):
    return bank(
      kind, frozen_shared=True, adapter=Adapter(kind, rank, 1.0, TARGETS)
    )

  size = bank("none").stored
  m = num_rewards
  return [
    Row("single objective, prompting", size, size),
    Row("full-CLP", *bank("full")),
    Row("attn-CLP", *bank("attention")),
    Row("logit-CLP", *bank("logits")),
    Row(
      f"soft tokens, P = {soft_tokens}", *bank("none", soft_tokens=soft_tokens)
    ),
    Row(
      f"soft tokens alone, P = {soft_tokens}",
      *bank("none", soft_tokens=soft_tokens, frozen_shared=True),
    ),
    Row(f"LoRA, rank {rank}", *adapted("lora")),
    Row(f"SVD-LoRA, rank {rank}", *adapted("svd_lora")),
    Row("Rewarded Soups, MOD", m * size, m * size),
    Row("DeRa (one reward)", size, 2 * size),
  ]


def table(
  models: list[str], num_rewards: int, rank: int, soft_tokens: int
) -> str:
  """The markdown table."""
  lines = [
    "| model | method | trained | stored | extra |",
    "| --- | --- | --- | --- | --- |",
  ]
  for name in models:
    found = rows(PRESETS[name], num_rewards, rank, soft_tokens)
    size = found[0].stored
    for row in found:
      lines.append(
        f"| {name} | {row.method} | {row.trained:,} | {row.stored:,} | "
        f"{(row.stored - size) / size:.2%} |"
      )
  return "\n".join(lines)


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--models", nargs="+", choices=PRESETS, default=["base", "large", "xl"]
  )
  parser.add_argument("--rewards", type=int, default=2)
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--soft-tokens", type=int, default=20)
  args = parser.parse_args()
  print(table(args.models, args.rewards, args.rank, args.soft_tokens))


if __name__ == "__main__":
  main()

"""PPO against REINFORCE: the demo's full-CLP run at equal training samples.

  python -m benchmarks.ppo --sft runs/demo/sft --seeds 10 --workdir runs/ppo

All runs start from the same supervised model. Runs that are finished are not
repeated, and those that were stopped go on. Prints a row a seed and variant
(markdown): hypervolume above the origin, spread, rank correlation of each
reward with its weight, expected utility, and steps a second.
"""

import argparse
import json
import pathlib

import numpy as np

from clp_jax import demo
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import sweep
from clp_jax.train import moft

VARIANTS: dict[str, dict] = {
  "REINFORCE": {},
  "REINFORCE, learned baseline": {"reinforce.baseline": "learned"},
  "PPO": {"algorithm": "ppo", "optimizer.learning_rate": 5e-4},
  "PPO, no leave-one-out": {"algorithm": "ppo", "ppo.leave_one_out": False},
}


def finish(workdir: str, sft: str, seed: int, name: str) -> front_lib.Front:
  """The front of a run, computed where it is missing."""
  file = pathlib.Path(workdir) / "evaluation" / "front.json"
  if not file.exists():
    config = demo.get_config()
    config.seed = seed
    config.sft.steps = 0
    config.model.init = sft
    config.update_from_flattened_dict(VARIANTS[name])
    moft.train(config, workdir)
    sweep.evaluate_run(workdir, method=name)
  return front_lib.load_front(str(file))


def steps_per_second(workdir: str) -> float:
  """The median of a run's last steps."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines[len(lines) // 2 :]]
  return float(np.median([row["perf/steps_per_second"] for row in rows]))


def main() -> None:
  """Runs what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--sft", required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=[10])
  parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
  parser.add_argument("--workdir", default="runs/ppo")
  args = parser.parse_args()
  columns = (
    "seed | method | samples | hypervolume | spread | Spearman | utility | "
    "steps/s"
  )
  print(f"| {columns} |\n|" + " --- |" * (columns.count("|") + 1))
  for seed in args.seeds:
    for name in args.variants:
      slug = name.lower().replace(", ", "-").replace(" ", "-")
      workdir = f"{args.workdir}/{seed}/{slug}"
      front = finish(workdir, args.sft, seed, name)
      cells = [
        str(seed),
        name,
        f"{front.training_samples:,}",
        f"{front.hypervolume:.4f}",
        f"{front.spread:.3f}",
        " ".join(f"{v:.2f}" for v in front.monotonicity.values()),
        f"{front.expected_utility:.3f}",
        f"{steps_per_second(workdir):.1f}",
      ]
      print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()

"""The demo over several seeds: what holds in each of them, and what does not.

  python -m benchmarks.demo_seeds --seeds 3 --workdir runs/seeds

Every seed is a whole `clp demo`: its own supervised model, data order,
weightings and samples. To its methods this adds Rewarded Soups at m times the
training samples. Runs that are finished are not repeated. Prints a row a seed
and method (markdown): hypervolume above the origin, spread, rank correlation of
each reward with its weight, expected utility, the KL of the front's ends, and
the shares of full-CLP's points that the method dominates and of the method's
that full-CLP dominates.
"""

import argparse
import pathlib

import numpy as np

from clp_jax import demo
from clp_jax.baselines import soups
from clp_jax.cli import setup
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import fronts, sweep
from clp_jax.train import moft

FRONTS = {
  "full-CLP": ".",
  "Rewarded Soups": "soups",
  "Rewarded Soups, m x": "soups_mx",
}


def train_soups_at_m_times(workdir: str, seed: int) -> None:
  """One single-objective run of full length for each reward, and their soup."""
  config = demo.get_config()
  config.seed = seed
  config.sft.steps = 0
  config.model.init = f"{workdir}/sft"
  singles = {}
  for name in config.objectives:
    single = config.copy_and_resolve_references()
    single.objectives = (name,)
    single.steering = "none"
    singles[name] = f"{workdir}/single_mx/{name}"
    moft.train(single, singles[name])
  soups.make_soup(config, singles, f"{workdir}/soups_mx")
  sweep.evaluate_run(
    f"{workdir}/soups_mx", method="Rewarded Soups, m x", seed=seed
  )


def finish_seed(workdir: str, seed: int) -> dict[str, front_lib.Front]:
  """The fronts of a seed, computed where they are missing."""
  if not (pathlib.Path(workdir) / "soups" / "evaluation").exists():
    demo.run(workdir, seed)
  if not (pathlib.Path(workdir) / "soups_mx" / "evaluation").exists():
    train_soups_at_m_times(workdir, seed)
  return {
    method: front_lib.load_front(f"{workdir}/{path}/evaluation/front.json")
    for method, path in FRONTS.items()
  }


def row(seed: int, full: front_lib.Front, front: front_lib.Front) -> str:
  """One row of the table."""
  correlations = " ".join(f"{v:.2f}" for v in front.monotonicity.values())
  stderr = np.mean(
    [[r.stderr for r in p.rewards.values()] for p in front.points], axis=0
  )
  ends = [front.points[0].kl.mean, front.points[-1].kl.mean]
  cells = [
    str(seed),
    front.method,
    f"{front.hypervolume:.4f}",
    f"{front.spread:.3f}",
    correlations,
    f"{front.expected_utility:.3f}",
    " ".join(f"{x:.3f}" for x in stderr),
    " ".join(f"{x:.1f}" for x in ends),
    f"{fronts.dominated_share(front.rewards, full.rewards):.2f}",
    f"{fronts.dominated_share(full.rewards, front.rewards):.2f}",
  ]
  return f"| {' | '.join(cells)} |"


def main() -> None:
  """Runs the seeds and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--workdir", default="runs/seeds")
  args = parser.parse_args()
  setup.configure()
  columns = (
    "seed | method | hypervolume | spread | rank corr. | utility | "
    "mean stderr of a reward | KL at the ends | dominates of full | "
    "dominated by full"
  )
  rows = [f"| {columns} |", "|" + " --- |" * (columns.count("|") + 1)]
  volumes: dict[str, list[float]] = {}
  for seed in range(args.seeds):
    found = finish_seed(f"{args.workdir}/{seed}", seed)
    for method, front in found.items():
      rows.append(row(seed, found["full-CLP"], front))
      volumes.setdefault(method, []).append(front.hypervolume)
  print("\n".join(rows))
  for method, values in volumes.items():
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    print(
      f"{method}: hypervolume {np.mean(values):.4f} +- {error:.4f} (stderr)"
    )


if __name__ == "__main__":
  main()

"""What sampling a step ahead gains: PPO's steps beside a reward that waits.

    python -m benchmarks.ahead [--waits 0,0.1,0.5] [--steps 40] [--n 3] [--json]

A judge behind HTTP leaves the machine idle; here the demo's second reward waits
so many seconds for a batch of 64 responses. Every row is n runs of the demo's
PPO from one supervised model, in turns with and without rollout.ahead; "s a
step" is the median of their second half's steps.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import numpy as np

from benchmarks import ppo, timing
from clp_jax import config as config_lib
from clp_jax import demo
from clp_jax.cli import setup
from clp_jax.data import newsroom
from clp_jax.train import moft


def judge(
  documents: newsroom.Texts,
  references: newsroom.Texts,
  responses: newsroom.Texts,
  seconds: float,
) -> np.ndarray:
  """newsroom.entailment, [B] float32, after a wait of so many seconds."""
  time.sleep(seconds)
  return newsroom.entailment(documents, references, responses)


def step_seconds(
  workdir: str, sft: str, *, steps: int, wait: float, ahead: int
) -> float:
  """Trains so many steps; the median of their second half."""
  config = demo.get_config()
  config.algorithm = "ppo"
  config.sft.steps = 0
  config.model.init = sft
  config.rewards.nli = config_lib.reward("benchmarks.ahead:judge", seconds=wait)
  config.rollout.ahead = ahead
  config.train.steps = steps
  moft.train(config, workdir)
  return 1 / ppo.steps_per_second(workdir)


def main() -> None:
  """Prints a row for each wait, with and without."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--waits", default="0,0.1,0.5", help="seconds a batch")
  parser.add_argument("--steps", type=int, default=40)
  timing.add_arguments(parser, n=3)
  args = parser.parse_args()
  setup.configure()
  waits = [float(wait) for wait in args.waits.split(",")]
  seconds: dict[tuple[float, int], list[float]] = {}
  with tempfile.TemporaryDirectory() as folder:
    supervised = demo.get_config()
    supervised.sft.steps = 200
    moft.prepare(supervised, folder)
    runs = itertools.product(range(args.n), waits, (0, 1))
    for run, wait, ahead in runs:
      taken = step_seconds(
        f"{folder}/{run}/{wait}/{ahead}",
        f"{folder}/sft",
        steps=args.steps,
        wait=wait,
        ahead=ahead,
      )
      seconds.setdefault((wait, ahead), []).append(taken)
  rows = []
  for (wait, ahead), taken in seconds.items():
    median = statistics.median(taken)
    rows.append(
      {
        "wait s": wait,
        "rollout.ahead": ahead,
        "n": len(taken),
        "s a step": median,
        "min s": min(taken),
        "max s": max(taken),
        "times faster": statistics.median(seconds[wait, 0]) / median,
      }
    )
  timing.show(rows, args, timing.measure_rates("float32"))


if __name__ == "__main__":
  main()

"""`clp demo`: supervised finetuning, CLP and its baseline, compared.

Stages, each a run folder of its own below the work directory:
  sft           a small T5 learns to write the references of the built-in world
  .             full-CLP over sampled weightings: this is the folder to steer
  single/<name> one single-objective run for each reward
  soups         Rewarded Soups: their average, at equal total training samples
and the sweeps over the same held-out prompts, with report.html. Nothing here is
special to the demo but the sizes: every stage is a config that `clp train`
takes.
"""

import contextlib
import datetime
import json
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from clp_jax import config as config_lib
from clp_jax.baselines import soups
from clp_jax.data import newsroom
from clp_jax.evaluation import examples, html, plot, sweep, tables
from clp_jax.evaluation import front as front_lib
from clp_jax.policy import Policy
from clp_jax.train import moft

SHOWN_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
CANDIDATES = 16  # articles that the one to show is chosen from


def get_config() -> ml_collections.ConfigDict:
  """full-CLP on the built-in world, from scratch."""
  config = config_lib.get_config()
  config.objectives = ("rouge", "nli")
  config.rewards = ml_collections.ConfigDict(
    {
      "rouge": config_lib.reward("rouge"),
      "nli": config_lib.reward("clp_jax.data.newsroom:entailment"),
      "tldr": config_lib.reward("clp_jax.data.newsroom:preference"),
    }
  )
  config.data.source_length = newsroom.SOURCE_LENGTH
  config.data.target_length = newsroom.TARGET_LENGTH
  config.sft.batch = 32
  config.sft.steps = config.sft.decay_steps = 2100
  config.sft.learning_rate = 2e-3
  # Half of the weightings lie within 0.15 of an end of the front, and a step
  # has four of them: little else trains the ends.
  config.weightings.concentration = 0.5
  config.rollout.weightings = 4
  config.train.steps = config.optimizer.decay_steps = 1200
  return config


def run(workdir: str, seed: int) -> list[front_lib.Front]:
  """Runs all stages in a folder, or those that are not finished yet; the seed
  is of models, data order, weightings and samples. Gives the fronts, full-CLP
  first."""
  seconds: dict[str, float] = {}
  full = get_config()
  full.seed = seed
  with _timed("supervised finetuning", seconds):
    moft.prepare(full, workdir)
  with _timed("train full-CLP", seconds):
    moft.train(full, workdir)

  with _timed("train Rewarded Soups", seconds):
    soup_dir = train_soups(full, workdir)

  fronts = []
  folders = {
    "full-CLP": workdir,
    "Rewarded Soups": soup_dir,
  }
  with _timed("evaluate", seconds):
    for method, path in folders.items():
      fronts.append(sweep.evaluate_run(path, method=method, seed=seed))
  picture = f"{workdir}/evaluation/fronts.png"
  plot.plot_fronts(fronts, picture)

  show_steering(workdir)
  print()
  tables.print_table(fronts)
  costs = _costs(seconds)
  for name, text in costs.items():
    print(f"{name:<10} {text}")
  address = _save_report(workdir, seed, folders, fronts, costs)
  print(f"report     {address}")
  print(f"fronts     {picture}")
  print(f"samples    {workdir}/evaluation/samples.jsonl")
  print(f"numbers    {workdir}/evaluation/front.json")
  weights = ",".join(
    f"{n}={w}" for n, w in zip(full.objectives, (0.3, 0.7), strict=True)
  )
  print(
    f"steer it   clp generate --workdir {workdir} --weights {weights} < "
    "documents.jsonl"
  )
  return fronts


def train_soups(full: ml_collections.ConfigDict, workdir: str) -> str:
  """Trains a model for each reward, which together sample as much as full-CLP's
  run and start from its supervised model, and averages them; gives the folder
  of Rewarded Soups."""

  def variant() -> ml_collections.ConfigDict:
    config = full.copy_and_resolve_references()
    config.sft.steps = 0
    config.model.init = f"{workdir}/sft"
    return config

  singles = {}
  for name in full.objectives:
    single = variant()
    single.objectives = (name,)
    single.steering = "none"
    single.train.steps = full.train.steps // len(full.objectives)
    single.optimizer.decay_steps = single.train.steps
    singles[name] = f"{workdir}/single/{name}"
    moft.train(single, singles[name])
  soup_dir = f"{workdir}/soups"
  soups.make_soup(variant(), singles, soup_dir)
  return soup_dir


def show_steering(workdir: str) -> None:
  """Prints a telling held-out article of an evaluated run of two rewards, and
  its greedy summaries."""
  policy = Policy.load(workdir)
  rows = examples.load(workdir)
  articles = examples.telling(rows, CANDIDATES)
  a, b = policy.objectives
  greedy: list[examples.Row] = [
    {"document": article, "weights": {a: w, b: 1 - w}, "summary": summary}
    for w in SHOWN_WEIGHTS
    for article, summary in zip(
      articles,
      policy.generate(articles, {a: w, b: 1 - w}, temperature=0),
      strict=True,
    )
  ]
  (chosen,) = examples.telling(greedy, 1)
  documents = len({row["document"] for row in rows})
  reference = next(r["reference"] for r in rows if r["document"] == chosen)
  print(f"\nArticle ({examples.CHOSEN.format(documents=documents)})")
  print(f"  {chosen}")
  print(f"Reference\n  {reference}")
  print("Summaries (greedy)")
  for row in greedy:
    if row["document"] == chosen:
      w = row["weights"]
      print(f"  {a} {w[a]:4.2f}  {b} {w[b]:4.2f}  {row['summary']}")


@contextlib.contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
  start = time.perf_counter()
  yield
  seconds[stage] = time.perf_counter() - start
  print(f"{stage}: {seconds[stage]:.0f} s", file=sys.stderr)


def _costs(seconds: dict[str, float]) -> dict[str, str]:
  stages = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  gib = peak * (1 if sys.platform == "darwin" else 1024) / 2**30
  return {
    "time": f"{stages}; {sum(seconds.values()):.0f} s in all",
    "memory": f"{gib:.1f} GiB at the peak",
  }


def _save_report(
  workdir: str,
  seed: int,
  folders: Mapping[str, str],
  fronts: list[front_lib.Front],
  costs: Mapping[str, str],
) -> str:
  """Writes report.html and returns its address."""

  def read(path: str) -> Any:
    return json.loads(epath.Path(path).read_text())

  samples = [
    row | {"method": method}
    for method, path in folders.items()
    for row in examples.load(path)
  ]
  shown = shlex.quote(workdir)
  text = html.render(
    "One model, steered between rewards: the demo",
    fronts=[read(f"{path}/evaluation/front.json") for path in folders.values()],
    tables=[
      html.Table(
        "Methods",
        tables.methods_rows(fronts),
        tables.methods_caption(fronts),
      )
    ],
    samples=samples,
    configs={
      method: read(f"{path}/config.json") for method, path in folders.items()
    },
    commands=[
      f"clp demo --workdir {shown} --seed {seed}",
      "# and to look further:",
      f"clp evaluate --workdir {shown} --grid 21 --seed {seed + 1}",
      """echo '{"document": "Brivane opened the museum."}' | """
      f"clp generate --workdir {shown} --weights nli=0.7,rouge=0.3",
    ],
    about={
      "written": datetime.datetime.now().isoformat(" ", "minutes"),
      "software": f"JAX {jax.__version__}, "
      f"{jax.device_count()} {jax.default_backend()} device(s)",
    }
    | dict(costs),
    unsupported=newsroom.unsupported,
  )
  return html.save(f"{workdir}/report.html", text)

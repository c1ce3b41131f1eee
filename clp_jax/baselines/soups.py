"""Rewarded Soups: separately finetuned policies, averaged with the weights.

A soup is a policy all of whose leaves are steerable and whose parameter sets
are the finetuned policies, so that everything that works on a trained policy
(evaluation, generation, export) works on it.

Source: Rame et al. 2023 (arXiv 2306.04488).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from clp_jax import run_folder
from clp_jax.config import ConfigError
from clp_jax.policy import Policy
from clp_jax.train import checkpoints

Params = Any


def stack(policies: list[Params]) -> Params:
  """m ordinary parameter trees [...] to one of steerable leaves [m, ...]."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *policies)


def make_soup(
  config: ml_collections.ConfigDict,
  runs: Mapping[str, str],
  workdir: str,
) -> None:
  """Writes the run folder of a soup.

  Args:
    config: whose objectives, data, rewards and evaluation the soup has.
    runs: objective -> folder of the run that was finetuned for it alone; all
      of them from one reference.
    workdir: the soup's folder.

  Raises:
    ConfigError: when the runs do not fit the objectives or one another.
  """
  if set(runs) != set(config.objectives):
    raise ConfigError(
      f"a soup needs one run for each of {', '.join(config.objectives)}, "
      f"got {', '.join(runs)}."
    )
  config = ml_collections.ConfigDict(config)
  config.steering = "full"
  run_folder.start(workdir, config)
  parts = [Policy.load(runs[name]) for name in config.objectives]
  first = parts[0]
  for name, part in zip(config.objectives, parts, strict=True):
    if part.objectives != (name,) or part.config.steering != "none":
      raise ConfigError(
        f"{runs[name]} is a run on {', '.join(part.objectives)} with steering "
        f"{part.config.steering}; a soup needs one on {name} alone with "
        "steering none."
      )
    if part.model_config != first.model_config or not _equal(
      part.reference, first.reference
    ):
      raise ConfigError(
        f"{runs[name]} and {first.workdir} start from different models; their "
        "average means nothing. Finetune both from one model.init."
      )
  if not run_folder.has_model(workdir):
    run_folder.save_model(
      workdir,
      first.model_config,
      run_folder.load_vocabulary_bytes(first.workdir),
      first.reference,
    )
  checkpoints.save_params(
    workdir, sum(p.step for p in parts), stack([p.sets for p in parts])
  )


def _equal(a: Params, b: Params) -> bool:
  return all(
    bool(jnp.array_equal(x, y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )

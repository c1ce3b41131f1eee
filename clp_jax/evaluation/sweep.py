"""The sweep: one policy at every weighting of a grid, on held-out prompts.

Every point answers the same prompts with the same decoding and the same random
keys, and so does every method, so that differences between points are those
of the policies.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from clp_jax import build, progress, run_folder, sharding, weightings
from clp_jax import keys as keys_lib
from clp_jax.batches import eval_batch
from clp_jax.data import tokenizer
from clp_jax.data.reader import Batch
from clp_jax.errors import ConfigError, as_config_error
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import measurements, plot
from clp_jax.evaluation import units as units_lib
from clp_jax.models import decoding, families
from clp_jax.policy import Policy
from clp_jax.rewards import base as rewards_lib
from clp_jax.rollout import row_keys
from clp_jax.weightings import Weighting

METHODS = {
  "full": "full-CLP",
  "attention": "attn-CLP",
  "logits": "logit-CLP",
  "lora": "LoRA",
  "svd_lora": "SVD-LoRA",
}
SHOWN_PROMPTS = 64  # the first of them, whose samples go to samples.jsonl


class Measured(NamedTuple):
  """What one policy said to the prompts; P prompts, n samples each."""

  responses: list[str]  # P * n, prompt-major
  rewards: np.ndarray  # [P, n, m] float32
  kl: np.ndarray  # [P, n] float32, summed log-ratio, nats


class Sweep(NamedTuple):
  """What a sweep found; P points."""

  front: front_lib.Front
  samples: list[dict[str, Any]]  # rows of samples.jsonl
  measured: measurements.Measurements


def sweep(
  policy: Policy,
  rewards: list[rewards_lib.Reward],
  *,
  method: str,
  grid: int,
  num_prompts: int,
  seed: int,
  training_samples: int | None = None,
) -> Sweep:
  """Evaluates a policy over the simplex, as its config's `eval` says.

  Args:
    policy: of a run with objectives.
    rewards: those objectives, in order.
    method: the name in the front.
    grid: points an edge of the simplex; with a range of alpha, also the
      number of alphas.
    num_prompts: held-out prompts.
    seed: of the sampling.
    training_samples: responses sampled in training, for the report.

  Returns:
    The front, rows of samples.jsonl and what rewards.npz holds.

  Raises:
    ValueError: for too few prompts or an unusable grid.
    RewardError: when a reward fails its checks.
  """
  config = policy.config
  batch = eval_batch(config, policy.vocabulary, num_prompts)
  units = units_lib.units_of(config, policy.workdir, policy.step)
  measure = make_measure(policy, rewards, batch, seed)
  points, samples, rewards_seen, kl_seen = [], [], [], []
  todo = weightings_grid(policy, grid)
  with progress.track(len(todo), f"evaluate {method}") as advance:
    for weights, alpha in todo:
      named = dict(zip(policy.objectives, map(float, weights), strict=True))
      steer = None if config.weightings.alpha_range is None else alpha
      measured = measure(
        policy.mix(named, steer),
        Weighting(jnp.asarray(weights)[None], jnp.asarray([alpha])),
      )
      optimised = units.of(measured.rewards)
      value = (1 - alpha) * optimised @ weights - alpha * measured.kl
      means = _estimates(policy.objectives, optimised)
      raw = _estimates(policy.objectives, measured.rewards)
      points.append(
        front_lib.Point(
          weights=named,
          alpha=alpha,
          rewards=means,
          kl=front_lib.standard_error(measured.kl),
          value=front_lib.standard_error(value),
          raw={name: raw[name] for name in units.names},
        )
      )
      samples += _sample_rows(policy, batch, named, alpha, measured)
      rewards_seen.append(optimised)
      kl_seen.append(measured.kl)
      advance(1, {name: mean.mean for name, mean in means.items()})
  front = front_lib.front_from_points(
    points,
    method=method,
    objectives=policy.objectives,
    step=policy.step,
    prompts=num_prompts,
    decoding={
      "temperature": config.eval.temperature,
      "samples": config.eval.samples,
      "max_length": config.data.target_length,
      "split": config.data.eval_split,
      "seed": seed,
      "grid": grid,
      "source_length": config.data.source_length,
      "cut_documents": batch.num_cut,
    },
    reference_point=units_lib.reference_point(config),
    training_samples=training_samples,
    units={
      name: (float(mean), float(deviation))
      for name, mean, deviation in zip(
        policy.objectives, units.mean, units.deviation, strict=True
      )
      if name in units.names
    },
  )
  return Sweep(
    front,
    samples,
    measurements.Measurements(
      np.stack(rewards_seen),
      np.stack(kl_seen),
      measurements.digest(batch.documents),
    ),
  )


def _estimates(
  objectives: Sequence[str], scores: np.ndarray
) -> dict[str, front_lib.Estimate]:
  """Of scores [P, n, m], by objective."""
  return {
    name: front_lib.standard_error(scores[:, :, i])
    for i, name in enumerate(objectives)
  }


def weightings_grid(
  policy: Policy, grid: int
) -> list[tuple[np.ndarray, float]]:
  """[(weights [m], alpha)]: the points of a sweep."""
  q = build.distribution(policy.config)
  is_steerable = method_name(policy.config) != "single objective"
  if q.weights is not None and not is_steerable:
    weights = np.asarray([q.weights], np.float32)
  else:
    weights = weightings.simplex_grid(len(policy.objectives), grid)
  if q.alpha_range is None:
    alphas = [q.alpha]
  else:
    low, high = q.alpha_range
    # The ends exactly: a rounded one would lie outside of the range.
    alphas = [low, *np.geomspace(low, high, grid)[1:-1].tolist(), high]
  return [(w, a) for a in alphas for w in weights]


def method_name(config: ml_collections.ConfigDict) -> str:
  """How a run's policy is conditioned, such as "full-CLP + prompting"."""
  if config.mixing == "logits":
    return "MOD" if config.weightings.alpha_range is None else "DeRa"
  if config.algorithm == "none":
    return "Rewarded Soups"
  parts = []
  if config.steering in METHODS:
    parts.append(METHODS[config.steering])
  if config.soft_tokens.length is not None:
    parts.append("soft tokens")
  if config.prompting.style != "none":
    parts.append("prompting")
  return " + ".join(parts) or "single objective"


def make_measure(
  policy: Policy,
  rewards: list[rewards_lib.Reward],
  batch: Batch,
  seed: int,
) -> Callable[..., Measured]:
  """Compiles sampling and scoring once.

  Returns:
    (from `Policy.mix`, one weighting for the prompts or None) -> Measured.
  """
  config = policy.config
  settings = config.eval
  data = sharding.row_shards(policy.mesh)
  prompts = len(batch.documents)
  size = min(settings.batch, -(-prompts // data) * data)
  if size % data:
    raise ConfigError(
      f"eval.batch = {settings.batch} is not a multiple of the mesh's data "
      f"axis, {data}; change one of them."
    )
  temperature = settings.temperature
  rows = sharding.row_sharding(policy.mesh)
  # The divergence is that of what is sampled; greedy decoding has none, there
  # it is the log-ratio of the models themselves.
  logp_temperature = temperature or 1.0

  @jax.jit
  def sample(steered, reference, tokens, keys, weighting):
    tokens = jax.lax.with_sharding_constraint(tokens, rows)
    prompted = tokens
    if policy.prompts is not None and weighting is not None:
      prompted = policy.prompts.prepend(tokens, weighting)
    next_logits, cache = policy.decoder.start(
      steered, prompted, num_samples=settings.samples
    )
    samples = decoding.sample_from(
      next_logits,
      cache,
      keys,
      policy.decoder.sampling(
        temperature=temperature,
        logp_temperature=logp_temperature,
        logp_of_allowed=True,
      ),
      config.data.target_length,
    )
    ref_logp = decoding.score_tokens(
      families.build(policy.bank.reference_config),
      reference,
      tokens,
      samples.tokens,
      num_samples=settings.samples,
      temperature=logp_temperature,
      allowed=policy.allowed,
    ).logp
    kl = jnp.where(samples.mask, samples.logp - ref_logp, 0).sum(-1)
    return samples.tokens, samples.mask, kl

  n = settings.samples
  num_batches = -(-prompts // size)
  last = prompts - 1
  keys = row_keys(keys_lib.of_seed(seed), num_batches * size * n)

  def measure(steered, weighting: Weighting | None = None) -> Measured:
    responses: list[str] = []
    kls = []
    for i in range(num_batches):
      # The last batch repeats its last prompt; the copies are dropped.
      index = np.minimum(np.arange(i * size, (i + 1) * size), last)
      real = min(size, prompts - i * size) * n
      tokens, mask, kl = sample(
        steered,
        policy.reference,
        batch.encoder_input_tokens[index],
        keys[i * size * n : (i + 1) * size * n],
        weighting,
      )
      responses += tokenizer.texts(
        policy.vocabulary, np.asarray(tokens)[:real], np.asarray(mask)[:real]
      )
      kls.append(np.asarray(kl)[:real])
    scores = rewards_lib.score_all(
      rewards,
      [d for d in batch.documents for _ in range(n)],
      [r for r in batch.references for _ in range(n)],
      responses,
      step=policy.step,
    )
    return Measured(
      responses,
      scores.reshape(prompts, n, len(rewards)),
      np.concatenate(kls).reshape(prompts, n),
    )

  return measure


def evaluate_run(
  workdir: str,
  *,
  step: int | None = None,
  grid: int | None = None,
  num_prompts: int | None = None,
  seed: int = 0,
  method: str | None = None,
  training_samples: int | None = None,
) -> front_lib.Front:
  """Sweeps a run and writes DIR/evaluation.

  Args: as for `sweep`, but for:
    workdir: the run's folder.
    step: a checkpoint; None takes the newest.
    grid, num_prompts: None takes the config's eval.grid and eval.prompts.
    method: None names the steering.
    training_samples: None takes what the run's steps have sampled, or those of
      the runs that it is made of, where all of them say so.

  Returns:
    The front.

  Raises:
    ConfigError, RunError, RewardError: what a user can cause.
  """
  policy = Policy.load(workdir, step)
  config = policy.config
  if not policy.objectives:
    raise ConfigError(
      f"{workdir} is a supervised run without objectives; evaluate a run that "
      "`clp train` made from it."
    )
  if training_samples is None:
    training_samples = run_folder.training_samples(
      policy.workdir, policy.config, policy.step
    )
  with as_config_error():
    found = sweep(
      policy,
      build.load_rewards(config, policy.mesh),
      method=method_name(config) if method is None else method,
      grid=config.eval.grid if grid is None else grid,
      num_prompts=config.eval.prompts if num_prompts is None else num_prompts,
      seed=seed,
      training_samples=training_samples,
    )
  save(f"{workdir}/evaluation", found)
  return found.front


def _sample_rows(policy, batch, weights, alpha, measured) -> list[dict]:
  n = measured.kl.shape[1]
  return [
    {
      "document": batch.documents[i],
      "reference": batch.references[i],
      "weights": weights,
      "alpha": alpha,
      "summary": measured.responses[i * n],
      "rewards": dict(zip(policy.objectives, rewards, strict=True)),
    }
    for i, rewards in enumerate(measured.rewards[:SHOWN_PROMPTS, 0].tolist())
  ]


def save(directory: str, found: Sweep) -> None:
  """Writes rewards.npz, samples.jsonl, pareto.png, front.csv and front.json."""
  path = epath.Path(directory)
  path.mkdir(parents=True, exist_ok=True)
  measurements.save(directory, found.measured)
  (path / "samples.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in found.samples)
  )
  plot.plot_fronts([found.front], path / "pareto.png")
  # Last: its presence says that the sweep is complete.
  front_lib.save_front(directory, found.front)

"""Multi-objective finetuning: the training loop of CLP.

A step, for G weightings drawn from Q:
1. mix G policies from the parameter sets and sample N responses for each prompt
   (one program: rollout.py);
2. compute the rewards R_1..R_m of every response (on the host), while the
   devices score them under the reference (one program: rollout.py);
3. scalarise by each group's weighting and learn from it; the gradient flows
   through the mixing into all sets (one program: experience.py, then a learner,
   reinforce.py or actor_critic.py).
The programs are put together in programs.py; `train` takes one step after the
other, in `step_fn`.

With steering "none" and one fixed weighting this is single-objective
finetuning: the same code with nothing to mix.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import (
  adapter_folders,
  build,
  distributed,
  keys,
  run_folder,
  saved_params,
  sharding,
)
from clp_jax.batches import check_data, train_batches
from clp_jax.data import tokenizer
from clp_jax.data.reader import Batch
from clp_jax.errors import RewardError
from clp_jax.initial import load_initial
from clp_jax.models import families
from clp_jax.rewards import base as rewards_lib
from clp_jax.rewards.normalisation import RewardStats
from clp_jax.rollout import Rollout
from clp_jax.train import experience as experience_lib
from clp_jax.train import loop, sft, stage
from clp_jax.train.programs import make_programs, normalisation_masks
from clp_jax.train.state import TrainState


def prepare(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Makes the run's folder and its reference policy, once.

  With sft.steps the reference is finetuned first, in DIR/sft.
  """

  def initial():
    if config.sft.steps:
      return sft.train(config, f"{workdir}/sft")
    return load_initial(config)

  stage.prepare(workdir, config, initial)


def train(config: ml_collections.ConfigDict, workdir: str) -> TrainState:
  """Trains, or resumes, the run that a config describes.

  Args:
    config: see config.py.
    workdir: the run's folder.

  Returns:
    The state after the last step.

  Raises:
    ConfigError, RunError, RewardError: what a user can cause.
    Preempted: after SIGTERM.
  """
  build.validate(config)
  mesh = build.make_mesh(config)
  build.check_rows("rollout.prompts", config.rollout.prompts, mesh)
  check_data(config)
  starts = {}
  if config.adapters.init and saved_params.newest_step(workdir) is None:
    starts = adapter_folders.load_starts(config)
  rewards = build.load_rewards(config, mesh)
  prepare(config, workdir)
  model_config = run_folder.load_model_config(workdir)
  vocabulary = run_folder.load_tokenizer(workdir)
  programs = make_programs(
    config,
    model_config,
    mesh,
    vocabulary.allowed(model_config.vocab_size),
    build.prompts(config, vocabulary, model_config.vocab_size),
  )
  reference = stage.load_reference(
    workdir, families.build(model_config), programs
  )
  scorer = Scorer(config, mesh, rewards, vocabulary)

  def batches_from(start):
    return train_batches(
      config, vocabulary, config.rollout.prompts, start, mesh
    )

  def roll_out(state, step, batch):
    prompts = sharding.to_devices(
      mesh, batch.encoder_input_tokens, config.rollout.prompts
    )
    return programs.scored_rollout(state, reference, prompts, np.int32(step))

  def step_fn(state, step, batch, want_texts):
    rollout = roll_out(state, step, batch)
    scored = scorer(rollout, batch, step)
    state, metrics = programs.update(state, rollout, scored.rewards, reference)
    return loop.Step(
      state,
      experience_lib.with_names(metrics, config.objectives),
      tokens=scored.num_tokens,
      texts=scored.texts(batch) if want_texts else None,
    )

  def before(state):
    if starts:
      params = adapter_folders.start_from(state.params, starts)
      state = dataclasses.replace(state, params=params)
    return estimate_normalisation(config, state, batches_from, roll_out, scorer)

  return loop.run(
    workdir,
    programs,
    reference,
    jax.random.key(config.seed),
    label=f"train {config.steering} ({', '.join(config.objectives)})",
    settings=config.train,
    batches_from=batches_from,
    step_fn=step_fn,
    before=before,
    keep=config.train.keep,
    log_samples_every=config.train.log_samples_every,
    wandb_project=config.wandb.project,
  )


@dataclasses.dataclass(frozen=True)
class Scored:
  """A rollout's rewards on the devices, and its texts on the host."""

  rewards: jax.Array  # [R, m] float32, rows cut as the rollout's
  responses: list[str]  # of this process's rows
  num_tokens: int  # of the whole batch, about: from this process's share

  def texts(self, batch: Batch) -> dict[str, str]:
    """The first prompt and its responses, to look at."""
    samples = len(self.responses) // len(batch.documents)
    return {
      "document": batch.documents[0],
      "responses": "\n\n".join(self.responses[:samples]),
    }


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Computes the rewards of this process's rows of a rollout."""

  config: ml_collections.ConfigDict
  mesh: Mesh
  rewards: list[rewards_lib.Reward]
  vocabulary: tokenizer.Tokenizer

  def __call__(self, rollout: Rollout, batch: Batch, step: int) -> Scored:
    """Rewards of a rollout whose prompts are `batch`.

    Raises:
      RewardError: when a reward fails its checks, naming the step; on all
        processes.
    """
    samples = self.config.rollout.samples
    mask = sharding.to_host(rollout.mask)
    responses = tokenizer.texts(
      self.vocabulary, sharding.to_host(rollout.tokens), mask
    )
    failed = None
    try:
      rewards = rewards_lib.score_all(
        self.rewards,
        [d for d in batch.documents for _ in range(samples)],
        [r for r in batch.references for _ in range(samples)],
        responses,
        step=step,
      )
    except RewardError as error:
      failed = error
    # So that all save what there is, and none waits for the one that failed.
    if not distributed.all_agree(failed is None):
      raise failed or RewardError(
        f"a reward failed at step {step} on another process, whose log says "
        "which."
      )
    return Scored(
      sharding.to_devices(self.mesh, rewards, rollout.tokens.shape[0]),
      responses,
      int(mask.sum()) * (rollout.tokens.shape[0] // mask.shape[0]),
    )


def estimate_normalisation(
  config: ml_collections.ConfigDict,
  state: TrainState,
  batches_from: Callable[[int], Iterator[Batch]],
  roll_out: Callable,
  scorer: Scorer,
) -> TrainState:
  """Moments under the reference, for objectives normalised as "fixed".

  Before the first update every policy is the reference, so its rollouts are
  the reference's.
  """
  normalised, running = normalisation_masks(config)
  fixed = normalised & ~running
  if not fixed.any():
    return state
  update_stats = jax.jit(RewardStats.update, donate_argnums=0)
  batches = itertools.islice(
    batches_from(0), config.train.normalisation_batches
  )
  for i, batch in enumerate(batches):
    rollout = roll_out(state, keys.LAST_STEP - i, batch)
    scored = scorer(rollout, batch, 0)
    stats = update_stats(state.reward_stats, scored.rewards, jnp.asarray(fixed))
    state = dataclasses.replace(state, reward_stats=stats)
  return state

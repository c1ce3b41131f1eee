"""Multi-objective finetuning: the training loop of CLP.

A step, for G weightings drawn from Q:
1. mix G policies from the parameter sets and sample N responses for each prompt
   (one program: rollout.py);
2. compute the rewards R_1..R_m of every response (on the host), while the
   devices score them under the reference (one program: rollout.py);
3. scalarise by each group's weighting and learn from it; the gradient flows
   through the mixing into all sets (one program: experience.py, then a learner,
   reinforce.py or actor_critic.py).
The programs are put together in programs.py; `Steps` takes one step after the
other. With rollout.ahead the first of them is a step ahead: the devices sample
what the next step learns from while the host computes this one's rewards.

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
from clp_jax.train.programs import Programs, make_programs, normalisation_masks
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
  check_data(config, vocabulary)
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
  steps = Steps(
    Scorer(config, mesh, rewards, vocabulary),
    programs,
    reference,
    lambda start: train_batches(
      config, vocabulary, config.rollout.prompts, start, mesh
    ),
  )

  def before(state):
    if starts:
      params = adapter_folders.start_from(state.params, starts)
      state = dataclasses.replace(state, params=params)
    return steps.before(state)

  return loop.run(
    workdir,
    programs,
    reference,
    jax.random.key(config.seed),
    label=f"train {config.steering} ({', '.join(config.objectives)})",
    settings=config.train,
    batches_from=steps.batches_from,
    step_fn=steps.take,
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


@dataclasses.dataclass(frozen=True)
class Steps:
  """Takes the steps of a run."""

  scorer: Scorer
  programs: Programs
  reference: stage.Params
  batches: Callable[[int], Iterator[Batch]]  # from a numbered one on

  def batches_from(self, start: int) -> Iterator[tuple[Batch, Batch | None]]:
    """What `take` reads: a step's batch, and to sample ahead the next one.

    A step consumes one of them: a resumed run reads the next one again.
    """
    batches = self.batches(start)
    if self.programs.ahead:
      return itertools.pairwise(batches)
    return ((batch, None) for batch in batches)

  def roll_out(self, state: TrainState, step: int, batch: Batch) -> Rollout:
    """Starts to sample and to score under the reference; waits for nothing."""
    prompts = sharding.to_devices(
      self.scorer.mesh,
      batch.encoder_input_tokens,
      self.scorer.config.rollout.prompts,
    )
    return self.programs.scored_rollout(
      state, self.reference, prompts, np.int32(step)
    )

  def before(self, state: TrainState) -> TrainState:
    """Does to a new state what comes before step 0."""
    state = estimate_normalisation(
      self.scorer.config, state, self.batches, self.roll_out, self.scorer
    )
    if self.programs.ahead:  # of no step before: of the policies that learn
      first = self.roll_out(state, 0, next(self.batches(0)))
      state = dataclasses.replace(state, pending=first)
    return state

  def take(
    self,
    state: TrainState,
    step: int,
    batches: tuple[Batch, Batch | None],
    want_texts: bool,
  ) -> loop.Step:
    """One step, as `loop.run` wants it."""
    batch, following = batches
    if following is None:
      rollout, pending = self.roll_out(state, step, batch), None
    else:
      # Before the host is busy. The last step does it too: a run that gets more
      # of them goes on to the bit.
      pending = self.roll_out(state, step + 1, following)
      assert state.pending is not None  # of `before`, or of the last step
      rollout = state.pending
    scored = self.scorer(rollout, batch, step)
    # Without its responses: they would come out of the update's program, and
    # whoever reads them would wait for it.
    state = dataclasses.replace(state, pending=None)
    state, metrics = self.programs.update(
      state, rollout, scored.rewards, self.reference
    )
    named = experience_lib.with_names(metrics, self.scorer.config.objectives)
    return loop.Step(
      dataclasses.replace(state, pending=pending),
      {**named, "cut_inputs": batch.cut_share},
      tokens=scored.num_tokens,
      texts=scored.texts(batch) if want_texts else None,
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

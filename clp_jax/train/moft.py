"""Multi-objective finetuning: the training loop of CLP.

A step, for G weightings drawn from Q:
1. mix G policies from the parameter sets and sample N responses for each prompt
   (one program: rollout.py);
2. compute the rewards R_1..R_m of every response (on the host), while the
   devices score them under the reference (one program: rollout.py);
3. scalarise by each group's weighting and learn from it; the gradient flows
   through the mixing into all sets (one program: `update` takes one optimizer
   step of REINFORCE; actor_critic.py has PPO and the learned baseline).

With steering "none" and one fixed weighting this is single-objective
finetuning: the same code with nothing to mix.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clp_jax import adapter_folders, build, run_folder, saved_params, sharding
from clp_jax import critic as critic_lib
from clp_jax.adaptation import FrontEstimate
from clp_jax.algorithms import reinforce
from clp_jax.bank import Bank
from clp_jax.batches import check_data, train_batches
from clp_jax.critic import CriticState
from clp_jax.data import tokenizer
from clp_jax.data.reader import Batch
from clp_jax.initial import load_initial
from clp_jax.masked import Mean, mean_of
from clp_jax.models import families
from clp_jax.prompting import Prompts
from clp_jax.rewards import base as rewards_lib
from clp_jax.rewards.normalisation import RewardStats
from clp_jax.rollout import (
  Rollout,
  sample_rollout,
  score_groups,
  score_reference,
)
from clp_jax.train import actor_critic, loop, sft
from clp_jax.train import experience as experience_lib
from clp_jax.train.experience import Experience
from clp_jax.train.gradients import accumulate
from clp_jax.train.optimizer import (
  optimizer_shardings,
  rl_critic_optimizer,
  rl_optimizer,
  set_floors,
)
from clp_jax.train.state import (
  TrainState,
  init_state,
  state_shardings,
  step_keys,
)

Params = Any
# Of the run's key, for parameters that start random: no step has this number.
INIT_FOLD = 2**32 - 2
CRITIC_FOLD = 2**32 - 1


class Programs(NamedTuple):
  """The three jitted programs of a step and the shardings of the state."""

  # (params, reference, prompts, key, step, front) -> Rollout
  rollout: Callable[..., Rollout]
  # (reference, prompts, tokens, mask) -> ref_logp
  reference: Callable[..., jax.Array]
  # (state, rollout, rewards, reference) -> (state, metrics)
  update: Callable[..., tuple[TrainState, dict]]
  init: Callable[..., TrainState]  # (reference, key) -> state
  state_shardings: TrainState
  reference_shardings: Params

  def roll_out(
    self,
    state: TrainState,
    reference: Params,
    prompts: jax.Array,
    step: np.int32,
  ) -> Rollout:
    """Starts the first two programs; the samples are ready before the scores.

    Args:
      state: whose parameters, key and front are read.
      reference: an ordinary model's parameters.
      prompts: [B, S] int32 documents.
      step: that the randomness is of.
    """
    rollout = self.rollout(
      state.params, reference, prompts, state.key, step, state.front
    )
    return dataclasses.replace(
      rollout,
      ref_logp=self.reference(reference, prompts, rollout.tokens, rollout.mask),
    )


def make_programs(
  config: ml_collections.ConfigDict,
  model_config: families.Config,
  mesh: Mesh,
  allowed: np.ndarray,
  prompts: Prompts | None = None,
) -> Programs:
  """Builds the programs that a config describes, for a mesh.

  Args:
    config: a valid training config.
    model_config: of the policy and the reference.
    mesh: from `sharding.make_mesh`.
    allowed: [V] bool, tokens that may be sampled.
    prompts: from `build.prompts`; None where the config has no prompting.

  Returns:
    The programs, not yet compiled.

  Raises:
    ValueError: when the config asks for prompts and there are none.
  """
  if config.prompting.style != "none" and prompts is None:
    raise ValueError(
      f"prompting.style = {config.prompting.style} needs the prompts that "
      "build.prompts() makes with the model's vocabulary."
    )
  # Equal placements of the state and of rows, so callers need not know of it.
  mesh = sharding.fold_groups(mesh, config.rollout.weightings)
  on_mesh = functools.partial(sharding.on_mesh, mesh, fsdp=config.mesh.fsdp)
  bank = build.bank(config, model_config)
  distribution = build.distribution(config)
  adaptation = build.adaptation(config)
  optimizer = rl_optimizer(config, bank.logical_axes)
  critic_optimizer = rl_critic_optimizer(config)
  has_critic = build.has_critic(config)
  num_values = distribution.num_rewards + distribution.penalises_kl
  model = families.build(model_config)
  abstract = model.abstract()

  def init(reference, key):
    stats = RewardStats.empty(distribution.num_rewards)
    params = bank.init(reference, jax.random.fold_in(key, INIT_FOLD))
    state = init_state(params, optimizer, key, stats)
    return dataclasses.replace(
      state,
      opt_state=set_floors(state.opt_state, bank.update_scales(reference)),
      critic=init_critic(key) if has_critic else None,
      front=None if adaptation is None else adaptation.empty(),
    )

  def init_critic(key):
    params = critic_lib.init_params(
      jax.random.fold_in(key, CRITIC_FOLD),
      model_config.emb_dim,
      config.critic.hidden,
      num_values,
    )
    return CriticState(params, critic_optimizer.init(params))

  place = functools.partial(
    sharding.param_shardings, mesh, fsdp=config.mesh.fsdp
  )
  abstract_params = jax.eval_shape(bank.init, abstract, jax.random.key(0))
  reference_at = place(model.axes(), abstract)
  state_at = state_shardings(
    mesh,
    optimizer,
    abstract_params,
    place(bank.logical_axes, abstract_params),
    distribution.num_rewards,
  )
  rows: Any = sharding.row_sharding(mesh)  # stand where arrays will
  whole: Any = sharding.replicated(mesh)
  if adaptation is not None:
    state_at = dataclasses.replace(state_at, front=FrontEstimate(whole, whole))
  if has_critic:
    abstract_critic = jax.eval_shape(init_critic, jax.random.key(0)).params
    critic_at = sharding.param_shardings(
      mesh, critic_lib.logical_axes(), abstract_critic, fsdp=config.mesh.fsdp
    )
    state_at = dataclasses.replace(
      state_at,
      critic=CriticState(
        critic_at,
        optimizer_shardings(mesh, critic_optimizer, abstract_critic, critic_at),
      ),
    )

  def sample_weightings(key, front):
    if adaptation is None:
      return distribution.sample(key, config.rollout.weightings)
    return adaptation.sample(
      key, distribution, front, config.rollout.weightings
    )

  def rollout(params, reference, encoder_input_tokens, key, step, front):
    weightings_key, samples_key, _ = step_keys(key, step)
    return sample_rollout(
      params,
      reference,
      encoder_input_tokens,
      sample_weightings(weightings_key, front),
      samples_key,
      bank=bank,
      prompts=prompts,
      distribution=distribution,
      num_samples=config.rollout.samples,
      max_length=config.data.target_length,
      temperature=config.rollout.temperature,
      allowed=allowed,
    )

  def score(reference, documents, tokens, mask):
    return score_reference(
      bank,
      reference,
      documents,
      tokens,
      mask,
      num_samples=config.rollout.samples,
      temperature=config.rollout.temperature,
    )

  def update_step(state, rollout, rewards, reference):
    experience = experience_lib.gather(
      state,
      rollout,
      rewards,
      num_samples=config.rollout.samples,
      normalisation=normalisation_masks(config),
      scalarisation=build.scalarisation(config),
      adaptation=adaptation,
    )
    learn = functools.partial(update, baseline=config.reinforce.baseline)
    if has_critic:
      learn = functools.partial(
        actor_critic.update,
        critic_optimizer=critic_optimizer,
        settings=build.ppo_settings(config),
        values_kl=distribution.penalises_kl,
        rows=rows,
      )
    return learn(
      state,
      experience,
      reference,
      bank=bank,
      coefficients=rollout.coefficients,
      optimizer=optimizer,
      num_samples=config.rollout.samples,
      temperature=config.rollout.temperature,
      microbatches=config.train.microbatches,
    )

  rollout_at = Rollout(
    encoder_input_tokens=rows,
    tokens=rows,
    mask=rows,
    logp=rows,
    weighting=whole,
    coefficients=whole,
  )
  return Programs(
    rollout=jax.jit(
      on_mesh(rollout),
      in_shardings=(
        state_at.params,
        reference_at,
        rows,
        whole,
        whole,
        whole,
      ),
      out_shardings=rollout_at,
    ),
    reference=jax.jit(
      on_mesh(score),
      in_shardings=(reference_at, rows, rows, rows),
      out_shardings=rows,
    ),
    update=jax.jit(
      on_mesh(update_step),
      in_shardings=(
        state_at,
        dataclasses.replace(rollout_at, ref_logp=rows),
        rows,
        reference_at,
      ),
      out_shardings=(state_at, whole),
      donate_argnums=0,
    ),
    init=jax.jit(
      init, in_shardings=(reference_at, whole), out_shardings=state_at
    ),
    state_shardings=state_at,
    reference_shardings=reference_at,
  )


def update(
  state: TrainState,
  experience: Experience,
  reference: Params,
  *,
  bank: Bank,
  coefficients: jax.Array,
  optimizer: optax.GradientTransformation,
  baseline: str,
  num_samples: int,
  temperature: float,
  microbatches: int,
) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
  """Step 3 of the module with REINFORCE, a pure function.

  Args:
    state: before the update.
    experience: of R responses under G weightings.
    reference: an ordinary model's parameters; what the bank freezes.
    bank: that makes the policies.
    coefficients: [G, M] float32, of the parameter sets.
    optimizer: that made `state.opt_state`.
    baseline: one of `reinforce.BASELINES`.
    num_samples: N.
    temperature: of the policy, as in the rollout.
    microbatches: parts of the prompts whose gradients are accumulated.

  Returns:
    (state after the update, metrics of the state before it).
  """
  returns = experience.returns
  batch = {
    "encoder_input_tokens": experience.encoder_input_tokens,
    "tokens": experience.tokens,
    "mask": experience.mask,
    "advantages": reinforce.advantages(returns, num_samples, baseline),
  }

  def loss_fn(params, batch):
    scores = score_groups(
      bank,
      params,
      reference,
      coefficients,
      batch["encoder_input_tokens"],
      batch["tokens"],
      num_samples=num_samples,
      temperature=temperature,
    )
    # Divided by all R responses here, so that microbatches simply add up.
    loss = reinforce.loss(scores.logp, batch["mask"], batch["advantages"])
    return loss / returns.size, mean_of(scores.entropy, batch["mask"])

  (loss, entropy), gradient = accumulate(
    jax.value_and_grad(loss_fn, has_aux=True),
    state.params,
    batch,
    microbatches,
  )
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  metrics = experience_lib.metrics(experience) | {
    "loss": loss,
    "entropy": entropy,
    "gradient_norm": optax.tree.norm(gradient),
  }
  new_state = dataclasses.replace(
    state,
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    reward_stats=experience.reward_stats,
    front=experience.front,
  )
  return new_state, metrics


def normalisation_masks(
  config: ml_collections.ConfigDict,
) -> tuple[np.ndarray, np.ndarray]:
  """([m] bool normalised at all, [m] bool by running moments)."""
  kinds = [config.rewards[name].normalise for name in config.objectives]
  return (
    np.asarray([kind != "none" for kind in kinds]),
    np.asarray([kind == "running" for kind in kinds]),
  )


def prepare(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Makes the run's folder and its reference policy, once.

  With sft.steps the reference is finetuned first, in DIR/sft.
  """
  run_folder.start(workdir, config)
  if run_folder.has_model(workdir):
    return
  if config.sft.steps:
    initial = sft.train(config, f"{workdir}/sft")
  else:
    initial = load_initial(config)
  run_folder.save_model(
    workdir, initial.model_config, initial.vocabulary, initial.params
  )


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
  reference = run_folder.load_reference(
    workdir,
    saved_params.abstract_like(
      families.build(model_config).abstract(), programs.reference_shardings
    ),
  )
  key = jax.random.key(config.seed)
  scorer = Scorer(config, mesh, rewards, vocabulary)

  def batches_from(start):
    return train_batches(
      config, vocabulary, config.rollout.prompts, start, mesh
    )

  def roll_out(state, step, batch):
    prompts = sharding.to_devices(
      mesh, batch.encoder_input_tokens, config.rollout.prompts
    )
    return programs.roll_out(state, reference, prompts, np.int32(step))

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

  def start():
    state = programs.init(reference, key)
    if starts:
      params = adapter_folders.start_from(state.params, starts)
      state = dataclasses.replace(state, params=params)
    return estimate_normalisation(config, state, batches_from, roll_out, scorer)

  return loop.run(
    workdir,
    label=f"train {config.steering} ({', '.join(config.objectives)})",
    abstract_state=saved_params.abstract_like(
      jax.eval_shape(programs.init, reference, key), programs.state_shardings
    ),
    start=start,
    batches_from=batches_from,
    step_fn=step_fn,
    steps=config.train.steps,
    checkpoint_every=config.train.checkpoint_every,
    keep=config.train.keep,
    log_samples_every=config.train.log_samples_every,
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
      RewardError: when a reward fails its checks, naming the step.
    """
    samples = self.config.rollout.samples
    mask = sharding.to_host(rollout.mask)
    responses = tokenizer.texts(
      self.vocabulary, sharding.to_host(rollout.tokens), mask
    )
    rewards = rewards_lib.score_all(
      self.rewards,
      [d for d in batch.documents for _ in range(samples)],
      [r for r in batch.references for _ in range(samples)],
      responses,
      step=step,
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
    # Steps that training never reaches, so that no randomness is shared.
    rollout = roll_out(state, np.iinfo(np.int32).max - i, batch)
    scored = scorer(rollout, batch, 0)
    state = dataclasses.replace(
      state,
      reward_stats=update_stats(
        state.reward_stats, scored.rewards, jnp.asarray(fixed)
      ),
    )
  return state

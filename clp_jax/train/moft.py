"""Multi-objective finetuning: the training loop of CLP.

A step, for G weightings drawn from Q:
1. mix G policies from the parameter sets, sample N responses for each prompt
   and score them under the reference (one program: rollout.py);
2. compute the rewards R_1..R_m of every response (on the host);
3. scalarise by each group's weighting, subtract the baseline, and take one
   optimizer step on the policy-gradient loss; the gradient flows through the
   mixing into all sets (one program: `update`).

With steering "none" and one fixed weighting this is single-objective
finetuning: the same code with nothing to mix.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clp_jax import conditioning, run_folder, sharding
from clp_jax import config as config_lib
from clp_jax.algorithms import reinforce
from clp_jax.bank import Bank
from clp_jax.batches import check_data, train_batches
from clp_jax.data import tasks
from clp_jax.data.vocabulary import allowed_tokens, load_vocabulary
from clp_jax.initial import load_initial
from clp_jax.masked import Mean, add, mean_of
from clp_jax.models import decoding, t5
from clp_jax.prompting import Prompts
from clp_jax.rewards import base as rewards_lib
from clp_jax.rewards.normalisation import RewardStats, normalise
from clp_jax.rollout import Rollout, sample_rollout
from clp_jax.train import checkpoints as checkpoints_lib
from clp_jax.train import loop, sft
from clp_jax.train.state import (
  TrainState,
  init_state,
  rl_optimizer,
  state_shardings,
  step_keys,
)

Params = Any
# Of the run's key, for parameters that start random: no step has this number.
INIT_FOLD = 2**32 - 2


class Programs(NamedTuple):
  """The two jitted programs of a step and the shardings of the state."""

  rollout: Callable[..., Rollout]  # (params, reference, prompts, key, step)
  # (state, rollout, rewards, reference) -> (state, metrics)
  update: Callable[..., tuple[TrainState, dict]]
  init: Callable[..., TrainState]  # (reference, key) -> state
  state_shardings: TrainState
  reference_shardings: Params


def make_programs(
  config: ml_collections.ConfigDict,
  model_config: t5.T5Config,
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
    prompts: from `config.prompts`; None where the config has no prompting.

  Returns:
    The programs, not yet compiled.

  Raises:
    ValueError: when the config asks for prompts and there are none.
  """
  if config.prompting.style != "none" and prompts is None:
    raise ValueError(
      f"prompting.style = {config.prompting.style} needs the prompts that "
      "config.prompts() makes with the model's vocabulary."
    )
  bank = config_lib.bank(config, model_config)
  distribution = config_lib.distribution(config)
  optimizer = rl_optimizer(config)
  abstract = t5.abstract_params(model_config)

  def init(reference, key):
    stats = RewardStats.empty(distribution.num_rewards)
    params = bank.init(reference, jax.random.fold_in(key, INIT_FOLD))
    return init_state(params, optimizer, key, stats)

  place = functools.partial(
    sharding.param_shardings, mesh, fsdp=config.mesh.fsdp
  )
  abstract_params = jax.eval_shape(bank.init, abstract, jax.random.key(0))
  reference_at = place(t5.logical_axes(model_config), abstract)
  state_at = state_shardings(
    mesh,
    optimizer,
    abstract_params,
    place(bank.logical_axes, abstract_params),
    distribution.num_rewards,
  )
  rows: Any = sharding.row_sharding(mesh)  # stand where arrays will
  whole: Any = sharding.replicated(mesh)

  def rollout(params, reference, encoder_input_tokens, key, step):
    weightings_key, samples_key, _ = step_keys(key, step)
    return sample_rollout(
      params,
      reference,
      encoder_input_tokens,
      weightings_key,
      samples_key,
      bank=bank,
      prompts=prompts,
      distribution=distribution,
      num_weightings=config.rollout.weightings,
      num_samples=config.rollout.samples,
      max_length=config.data.target_length,
      temperature=config.rollout.temperature,
      allowed=allowed,
    )

  def update_step(state, rollout, rewards, reference):
    return update(
      state,
      rollout,
      rewards,
      reference,
      bank=bank,
      optimizer=optimizer,
      objectives=tuple(config.objectives),
      normalisation=normalisation_masks(config),
      baseline=config.reinforce.baseline,
      temperature=config.rollout.temperature,
      microbatches=config.train.microbatches,
    )

  rollout_at = Rollout(
    encoder_input_tokens=rows,
    tokens=rows,
    mask=rows,
    logp=rows,
    ref_logp=rows,
    weighting=whole,
    coefficients=whole,
  )
  return Programs(
    rollout=jax.jit(
      rollout,
      in_shardings=(state_at.params, reference_at, rows, whole, whole),
      out_shardings=rollout_at,
    ),
    update=jax.jit(
      update_step,
      in_shardings=(state_at, rollout_at, rows, reference_at),
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
  rollout: Rollout,
  rewards: jax.Array,
  reference: Params,
  *,
  bank: Bank,
  optimizer: optax.GradientTransformation,
  objectives: tuple[str, ...],
  normalisation: tuple[np.ndarray, np.ndarray],
  baseline: str,
  temperature: float,
  microbatches: int,
) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
  """Step 3 of the module, a pure function.

  Args:
    state: before the update.
    rollout: R responses under G weightings.
    rewards: [R, m] float32, raw.
    reference: an ordinary T5's parameters; what the bank freezes.
    bank: that makes the policies.
    optimizer: that made `state.opt_state`.
    objectives: the m names, for the metrics.
    normalisation: from `normalisation_masks`.
    baseline: one of `reinforce.BASELINES`.
    temperature: of the policy, as in the rollout.
    microbatches: parts of the prompts whose gradients are accumulated.

  Returns:
    (state after the update, metrics of the state before it).
  """
  groups = rollout.coefficients.shape[0]
  num_samples = rollout.tokens.shape[0] // rollout.encoder_input_tokens.shape[0]

  def by_group(x):
    return x.reshape(groups, -1, *x.shape[1:])

  normalised, running = normalisation
  raw, mask = by_group(rewards), by_group(rollout.mask)
  assert state.reward_stats is not None  # None is supervised training's
  stats = state.reward_stats.update(raw, jnp.asarray(running))
  kl = jnp.where(mask, by_group(rollout.logp - rollout.ref_logp), 0).sum(-1)
  returns = reinforce.scalar_returns(
    normalise(raw, stats, jnp.asarray(normalised)),
    kl,
    rollout.weighting.weights,
    rollout.weighting.alpha,
  )
  batch = {
    "encoder_input_tokens": by_group(rollout.encoder_input_tokens),
    "tokens": by_group(rollout.tokens),
    "mask": mask,
    "advantages": reinforce.advantages(returns, num_samples, baseline),
  }

  def loss_fn(params, batch):
    policies = bank.mix(params, reference, rollout.coefficients)
    logp, entropy = jax.vmap(
      functools.partial(
        decoding.token_logp,
        t5.T5(bank.model_config),
        num_samples=num_samples,
        temperature=temperature,
      ),
      in_axes=(conditioning.batched_axes(bank.steerable), 0, 0),
    )(policies, batch["encoder_input_tokens"], batch["tokens"])
    # Divided by all R responses here, so that microbatches simply add up.
    loss = reinforce.loss(logp, batch["mask"], batch["advantages"])
    return loss / rollout.tokens.shape[0], mean_of(entropy, batch["mask"])

  (loss, entropy), gradient = accumulate(
    jax.value_and_grad(loss_fn, has_aux=True),
    state.params,
    batch,
    microbatches,
  )
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  metrics = {
    "loss": loss,
    "return": mean_of(returns),
    "kl": mean_of(kl),
    "entropy": entropy,
    "length": mean_of(mask.sum(-1)),
    "alpha": mean_of(rollout.weighting.alpha),
    "gradient_norm": optax.global_norm(gradient),
  }
  for i, name in enumerate(objectives):
    metrics[f"reward/{name}"] = mean_of(rewards[:, i])
  new_state = dataclasses.replace(
    state,
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    reward_stats=stats,
  )
  return new_state, metrics


def accumulate(
  value_and_grad: Callable, params: Params, batch: Any, microbatches: int
) -> Any:
  """Sums value_and_grad over parts of a batch, holding one part at a time.

  Args:
    value_and_grad: (params, batch) -> tree of sums.
    params: of the loss.
    batch: tree of [G, rows, ...] arrays; rows are cut into the parts.
    microbatches: number of parts; divides the prompts of a group.

  Returns:
    The tree of sums over the whole batch.
  """
  if microbatches == 1:
    return value_and_grad(params, batch)

  def part_first(x):
    groups, rows = x.shape[:2]
    parts = x.reshape(groups, microbatches, rows // microbatches, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  parts = jax.tree.map(part_first, batch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts)),
  )

  def body(total, part):
    return add(total, value_and_grad(params, part)), None

  return jax.lax.scan(body, zeros, parts)[0]


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
    loop.Preempted: after SIGTERM.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  if config.rollout.prompts % mesh.shape["data"]:
    raise config_lib.ConfigError(
      f"rollout.prompts = {config.rollout.prompts} is not a multiple of the "
      f"mesh's data axis, {mesh.shape['data']}; change it or mesh.data."
    )
  check_data(config)
  rewards = config_lib.load_rewards(config, mesh)
  prepare(config, workdir)
  model_config = run_folder.load_model_config(workdir)
  vocabulary = load_vocabulary(run_folder.vocabulary_path(workdir))
  programs = make_programs(
    config,
    model_config,
    mesh,
    allowed_tokens(vocabulary, model_config.vocab_size),
    config_lib.prompts(config, vocabulary, model_config.vocab_size),
  )
  reference = run_folder.load_reference(
    workdir,
    checkpoints_lib.abstract_like(
      t5.abstract_params(model_config), programs.reference_shardings
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
    return programs.rollout(
      state.params, reference, prompts, state.key, np.int32(step)
    )

  def step_fn(state, step, batch, want_texts):
    rollout = roll_out(state, step, batch)
    scored = scorer(rollout, batch, step)
    state, metrics = programs.update(state, rollout, scored.rewards, reference)
    return loop.Step(
      state,
      metrics,
      tokens=scored.num_tokens,
      texts=scored.texts(batch) if want_texts else None,
    )

  def start():
    state = programs.init(reference, key)
    return estimate_normalisation(
      config, state, batches_from(0), roll_out, scorer
    )

  return loop.run(
    workdir,
    label=f"train {config.steering} ({', '.join(config.objectives)})",
    abstract_state=checkpoints_lib.abstract_like(
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

  def texts(self, batch: tasks.Batch) -> dict[str, str]:
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
  vocabulary: Any

  def __call__(self, rollout: Rollout, batch: tasks.Batch, step: int) -> Scored:
    """Rewards of a rollout whose prompts are `batch`.

    Raises:
      RewardError: when a reward fails its checks, naming the step.
    """
    samples = self.config.rollout.samples
    mask = sharding.to_host(rollout.mask)
    responses = tasks.decode_tokens(
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
  batches: Any,
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
  for i in range(config.train.normalisation_batches):
    batch = next(batches)
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

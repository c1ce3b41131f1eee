"""The training step of CLP: its invariants, on arrays alone."""

import dataclasses
import functools

import both_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_families import (
  DECODER,
  LISTED_DECODER,
  SCANNED_T5,
  T5,
  both,
  cases,
  mlp_kernel,
  reference,
)

from clp_jax import conditioning, saved_params, sharding
from clp_jax import config as config_lib
from clp_jax.train import checkpoints, moft

PROMPTS, SAMPLES, SOURCE, TARGET = 8, 2, 7, 5
TEMPERATURE = 0.6


def make_config(**changes):
  config = config_lib.get_config()
  config.objectives = ("a", "b")
  config.rewards = {"a": config_lib.reward("x"), "b": config_lib.reward("x")}
  config.data.target_length = TARGET
  config.rollout.prompts = PROMPTS
  config.rollout.samples = SAMPLES
  config.rollout.weightings = 2
  config.optimizer.warmup_steps = 0
  config.optimizer.learning_rate = 1e-2
  config.weightings.alpha = 0.05
  config.update_from_flattened_dict(changes)
  return config


def prompts_of(step, rows=PROMPTS, model=T5):
  random = np.random.default_rng(step)
  # Few, so that each has a gradient from several prompts: of one whose two
  # responses are the same it is rounding, which Adam would make a step of.
  tokens = random.integers(3, 9, size=(rows, SOURCE))
  lengths = random.integers(2, SOURCE + 1, size=(rows, 1))
  return np.where(
    np.arange(SOURCE)[None] < lengths, tokens, model.pad_id
  ).astype(np.int32)


def rewards_of(rollout):
  """[R, 2] non-integer rewards that conflict; a function of the tokens."""
  mask = np.asarray(rollout.mask)
  tokens = np.where(mask, rollout.tokens, 0).astype(np.float64)
  a = np.cos(tokens).sum(1) / 7
  b = 0.3 * np.sqrt(mask.sum(1)) - 0.1 * (tokens % 3).sum(1)
  return np.stack([a, b], 1).astype(np.float32)


def mesh_of(data=1, model=1, replica=1):
  devices = jax.devices()[: replica * data * model]
  return sharding.make_mesh(data, model, devices, replica)


def make_programs(config, mesh, model=T5, prompts=None):
  allowed = both_families.allowed(model)
  return moft.make_programs(config, model, mesh, allowed, prompts)


def advance(state, programs, mesh, placed, steps, rewards_fn, model):
  """(state, metrics per step) after steps of given numbers."""
  history = []
  for step in steps:
    prompts = sharding.to_devices(mesh, prompts_of(step, model=model), PROMPTS)
    rollout = programs.scored_rollout(state, placed, prompts, np.int32(step))
    rewards = rewards_fn(rollout)
    state, metrics = programs.update(
      state, rollout, sharding.to_devices(mesh, rewards, len(rewards)), placed
    )
    history.append(jax.device_get(metrics))
  return state, history


def train(
  config,
  mesh,
  steps,
  rewards_fn=rewards_of,
  programs=None,
  model=T5,
  start=None,
):
  """Runs `steps` steps; returns (state, metrics per step, programs).

  Args:
    config: of the run.
    mesh: where it runs.
    steps: their number.
    rewards_fn: rollout -> [R, m].
    programs: of an equal run, else they are made.
    model: of one of `both_families`, or like one.
    start: parameters of the reference; None for those of `both_families`.
  """
  if programs is None:
    programs = make_programs(config, mesh, model)
  start = reference(model) if start is None else start
  placed = sharding.put(start, programs.reference_shardings)
  state = programs.init(placed, jax.random.key(7))
  state, history = advance(
    state, programs, mesh, placed, range(steps), rewards_fn, model
  )
  return state, history, programs


def plain_config(**changes):
  return make_config(**{"rollout.temperature": TEMPERATURE} | changes)


@functools.cache
def plain_run(model=T5):
  """(parameters, metrics, programs) of 2 steps on 1 device."""
  state, history, programs = train(plain_config(), mesh_of(), 2, model=model)
  return jax.tree.map(np.asarray, state.params), history, programs


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def rollout_of(programs, model, number, step, change=lambda state: state):
  """(state, reference, rollout) of a step, before the first update.

  Args:
    programs: on one device.
    model: of one of `both_families`.
    number: of the prompts.
    step: that the randomness is of.
    change: makes another state of the first.
  """
  placed = sharding.put(reference(model), programs.reference_shardings)
  state = change(programs.init(placed, jax.random.key(1)))
  prompts = sharding.to_devices(
    mesh_of(), prompts_of(number, model=model), PROMPTS
  )
  rollout = programs.scored_rollout(state, placed, prompts, np.int32(step))
  return state, placed, rollout


@pytest.mark.parametrize(
  "model, temperature",
  cases(
    (True, T5, TEMPERATURE),
    (True, DECODER, TEMPERATURE),
    (False, LISTED_DECODER, TEMPERATURE),
    (False, T5, 1.7),
    (False, DECODER, 1.7),
  ),
)
def test_kl_is_zero_at_step_0_at_any_temperature(model, temperature):
  if temperature == TEMPERATURE:
    _, _, programs = plain_run(model)
  else:
    config = make_config(**{"rollout.temperature": temperature})
    programs = make_programs(config, mesh_of(), model)
  rollout = rollout_of(programs, model, 0, 0)[2]
  mask = np.asarray(rollout.mask)
  assert mask.sum() > PROMPTS * SAMPLES  # more than ends
  assert len(set(mask.sum(1))) > 2
  np.testing.assert_allclose(rollout.logp, rollout.ref_logp, atol=1e-5)
  # And the temperature is in both: they are those of the tempered model, over
  # the tokens that it can say.
  logp = both_families.plain_logp(
    model,
    reference(model),
    prompts_of(0, model=model),
    rollout.tokens,
    temperature,
    both_families.allowed(model),
  )
  expected = np.where(rollout.mask, logp, 0)
  np.testing.assert_allclose(rollout.logp, expected, atol=2e-5)


@both
def test_a_policy_gains_nothing_by_wishing_for_what_it_can_not_say(model):
  """Else its KL could fall, below 0 even, as it turns from what it says."""
  _, _, programs = plain_run(model)
  allowed = both_families.allowed(model)

  def wish(state):
    params = jax.tree.map(lambda x: x, state.params)
    head = params["decoder"]["logits_dense"]
    head["kernel"] = jnp.where(allowed, head["kernel"], 30 * head["kernel"])
    placed = sharding.put(params, programs.state_shardings.params)
    return dataclasses.replace(state, params=placed)

  plain = rollout_of(programs, model, 0, 0)[2]
  state, placed, rollout = rollout_of(programs, model, 0, 0, wish)
  mask = np.asarray(rollout.mask)
  whole = both_families.plain_logp(
    model,
    conditioning.mix(
      state.params,
      conditioning.steerable_leaves(reference(model), "full"),
      rollout.coefficients[0],
    ),
    rollout.encoder_input_tokens,
    rollout.tokens,
    TEMPERATURE,
  )
  assert (whole - rollout.ref_logp)[mask].mean() < -0.5  # it does wish
  np.testing.assert_array_equal(rollout.tokens, plain.tokens)
  np.testing.assert_allclose(rollout.logp, rollout.ref_logp, atol=1e-5)
  before = np.asarray(state.params["decoder"]["logits_dense"]["kernel"])
  rewards = sharding.to_devices(mesh_of(), rewards_of(rollout), len(mask))
  new, _ = programs.update(state, rollout, rewards, placed)
  after = np.asarray(new.params["decoder"]["logits_dense"]["kernel"])
  np.testing.assert_array_equal(after[..., ~allowed], before[..., ~allowed])
  assert (after[..., allowed] != before[..., allowed]).mean() > 0.5


@both
def test_samples_depend_on_the_step_and_weightings_vary(model):
  _, _, programs = plain_run(model)
  first, second, again = (
    rollout_of(programs, model, 0, step)[2] for step in (0, 1, 0)
  )
  np.testing.assert_array_equal(first.tokens, again.tokens)
  assert not np.array_equal(first.tokens, second.tokens)
  weights = np.asarray(first.weighting.weights)
  assert not np.allclose(weights[0], weights[1])
  assert not np.allclose(weights, second.weighting.weights)


@pytest.mark.parametrize(
  "model, kind",
  cases(
    (True, T5, "full"),
    (True, DECODER, "full"),
    (False, T5, "attention"),
    (False, LISTED_DECODER, "attention"),
    (False, DECODER, "logits"),
  ),
)
def test_update_equals_a_plain_computation(model, kind):
  """Gradient, return and metrics against loops over policies and samples."""
  if kind == "full":
    _, _, programs = plain_run(model)
  else:
    programs = make_programs(plain_config(steering=kind), mesh_of(), model)

  def apart(state):
    """Sets that differ, so that the weighting matters."""
    return dataclasses.replace(
      state,
      params=jax.tree.map(
        lambda p, at: jax.device_put(
          p
          + 0.1
          * np.random.default_rng(p.size).normal(size=p.shape).astype("f4"),
          at,
        ),
        state.params,
        programs.state_shardings.params,
      ),
    )

  state, placed, rollout = rollout_of(programs, model, 5, 4, apart)
  rewards = rewards_of(rollout)
  steerable = conditioning.steerable_leaves(reference(model), kind)
  weights = np.asarray(rollout.weighting.weights)
  rows = PROMPTS * SAMPLES
  mask = np.asarray(rollout.mask)
  kl = ((rollout.logp - rollout.ref_logp) * mask).sum(1)
  returns = np.zeros(rows)
  for r in range(rows):
    g = r // (rows // 2)
    returns[r] = 0.95 * (weights[g] * rewards[r]).sum() - 0.05 * kl[r]
  advantages = np.zeros(rows)
  for r in range(rows):
    other = r + 1 if r % 2 == 0 else r - 1  # of the two samples
    advantages[r] = returns[r] - returns[other]
  tokens = np.asarray(rollout.tokens)
  inputs = both_families.plain_inputs(
    model, np.repeat(prompts_of(5, model=model), SAMPLES, axis=0), tokens
  )

  def loss(params):
    total = 0.0
    for g, c in enumerate(weights):
      policy = jax.tree.map(
        lambda p, s, c=c: c[0] * p[0] + c[1] * p[1] if s else p,
        params,
        steerable,
      )
      own = slice(g * rows // 2, (g + 1) * rows // 2)
      logits, _ = both_families.plain_scores(
        model, policy, [x[own] for x in inputs]
      )
      logp = both_families.log_softmax(
        logits / TEMPERATURE, both_families.allowed(model)
      )
      logp = both_families.picked(logp, tokens[own])
      response = jnp.where(mask[own], logp, 0).sum(1)
      total -= (advantages[own] * response).sum()
    return total / rows

  gradient = jax.jit(jax.grad(loss))(state.params)
  norm = np.sqrt(
    sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient))
  )
  before = jax.tree.map(np.asarray, state.params)
  new, metrics = programs.update(
    state, rollout, sharding.to_devices(mesh_of(), rewards, rows), placed
  )
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
  mean = metrics["return"].sum / metrics["return"].count
  np.testing.assert_allclose(mean, returns.mean(), atol=1e-5)
  np.testing.assert_allclose(
    metrics["reward/1"].sum / rows, rewards[:, 1].mean(), atol=1e-6
  )
  # Adam's first step has the gradient's sign and the rate's size.
  clipped = min(1.0, 1.0 / norm)

  def check(p, q, g):
    g = np.asarray(g) * clipped
    clear = np.abs(g) > 1e-5
    step = -1e-2 * g / (np.abs(g) + 1e-8)
    np.testing.assert_allclose(
      (np.asarray(q) - p)[clear], step[clear], atol=2e-4
    )

  jax.tree.map(check, before, new.params, gradient)


@pytest.mark.parametrize(
  "model",
  cases(
    (True, T5), (True, DECODER), (False, SCANNED_T5), (False, LISTED_DECODER)
  ),
)
def test_one_hot_weighting_equals_a_single_objective_run(model):
  config = plain_config(**{"weightings.weights": (0.0, 1.0)})
  state, history, _ = train(config, mesh_of(), 3, model=model)
  single = plain_config(steering="none")
  single.objectives = ("b",)
  alone, alone_history, _ = train(
    single,
    mesh_of(),
    3,
    lambda rollout: rewards_of(rollout)[:, 1:],
    model=model,
  )
  both_families.assert_near_after_adam(
    jax.tree.map(lambda p: p[1], state.params),
    alone.params,
    alone.opt_state,
    rounding=1e-7,  # of sums of what is near 1
    moved=3 * config.optimizer.learning_rate,
    atol=1e-6,
  )
  # And the other set has not moved.
  jax.tree.map(
    lambda p, q: np.testing.assert_array_equal(p[0], q),
    state.params,
    reference(model),
  )
  for a, b in zip(history, alone_history, strict=True):
    np.testing.assert_allclose(a["return"].sum, b["return"].sum, atol=1e-4)


@both
def test_4_steps_are_2_and_a_restart_and_2_bit_for_bit(model, tmp_path):
  params, history, programs = plain_run(model)
  placed = sharding.put(reference(model), programs.reference_shardings)
  key = jax.random.key(7)

  def run(state, *steps):
    return advance(state, programs, mesh_of(), placed, steps, rewards_of, model)

  state, again = run(programs.init(placed, key), 0, 1)
  jax.tree.map(
    np.testing.assert_array_equal, (params, history), (state.params, again)
  )
  with checkpoints.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(state, batches=2)
  whole, metrics = run(state, 2, 3)
  with checkpoints.Checkpoints(str(tmp_path), keep=1) as saved:
    state, _ = saved.restore(
      saved_params.abstract_like(
        jax.eval_shape(programs.init, placed, key), programs.state_shardings
      )
    )
  parts, parts_metrics = run(state, 2, 3)
  jax.tree.map(
    np.testing.assert_array_equal,
    (dataclasses.replace(whole, key=0), metrics),
    (dataclasses.replace(parts, key=0), parts_metrics),
  )


@both
def test_a_new_weighting_never_traces_again(model):
  _, history, programs = plain_run(model)
  weights = [h["reward/0"].sum for h in history]
  assert len(set(map(float, weights))) == 2  # two different steps
  assert programs.rollout._cache_size() == 1
  assert programs.reference._cache_size() == 1
  assert programs.update._cache_size() == 1


@pytest.mark.parametrize("model", cases((True, T5), (False, DECODER)))
def test_microbatches_add_up_to_the_whole_batch(model):
  whole, history, _ = plain_run(model)
  config = plain_config(**{"train.microbatches": 4})
  parts, parts_history, _ = train(config, mesh_of(), 2, model=model)
  assert_trees_close(history, parts_history, rtol=2e-4, atol=2e-5)
  assert_trees_close(whole, parts.params, atol=2e-4)


@pytest.mark.parametrize(
  "model, replica, data, cut, fsdp",
  cases(
    (True, T5, 1, 4, 2, True),
    (True, DECODER, 1, 4, 2, True),
    (False, T5, 1, 8, 1, False),
    (False, DECODER, 1, 8, 1, False),
    (False, SCANNED_T5, 2, 2, 2, True),
    (False, LISTED_DECODER, 2, 2, 2, True),
    # More parts than there are heads of keys and values.
    (False, DECODER, 1, 2, 4, True),
  ),
)
def test_devices_do_not_change_training(model, replica, data, cut, fsdp):
  one, history, _ = plain_run(model)
  config = plain_config(**{"mesh.fsdp": fsdp})
  many, many_history, _ = train(
    config, mesh_of(data, cut, replica), 2, model=model
  )
  assert_trees_close(history, many_history, rtol=5e-4, atol=5e-5)
  both_families.assert_near_after_adam(
    one,
    many.params,
    many.opt_state,
    rounding=1e-9,
    moved=2 * config.optimizer.learning_rate,
    atol=5e-4,
  )
  kernel = mlp_kernel(model, many.params)
  *layers, rows, columns = kernel.shape[1:]
  assert kernel.sharding.shard_shape(kernel.shape) == (
    *(2, *layers),
    *(rows // (data if fsdp else 1), columns // cut),
  )


@pytest.mark.parametrize("model", cases((True, T5), (False, DECODER)))
def test_kl_has_a_set_of_its_own_when_alpha_varies(model):
  config = make_config(**{"weightings.alpha_range": (0.01, 0.5)})
  state, history, _ = train(config, mesh_of(), 2, model=model)
  embedding = state.params["token_embedder"]["embedding"]
  assert embedding.shape == (3, 16, 8)
  assert not np.array_equal(
    embedding[2], reference(model)["token_embedder"]["embedding"]
  )
  alphas = [h["alpha"].sum / h["alpha"].count for h in history]
  assert 0.01 <= min(alphas) < max(alphas) <= 0.5


def test_normalised_rewards_do_not_depend_on_their_scale():
  def scaled(rollout):
    return rewards_of(rollout) * np.float32([40.0, 0.02]) + np.float32([3, -1])

  config = make_config()
  for name in config.objectives:
    config.rewards[name].normalise = "running"
  plain, _, programs = train(config, mesh_of(), 3)
  other, _, _ = train(config, mesh_of(), 3, scaled, programs)
  assert_trees_close(plain.params, other.params, atol=1e-3)
  np.testing.assert_array_equal(plain.reward_stats.count, [48, 48])


@pytest.mark.slow
def test_fixed_moments_are_those_of_the_reference_whatever_is_steered():
  """So that one alpha is one trade-off for CLP and for a soup's parts."""

  def moments(steering, *names):
    config = make_config(steering=steering)
    config.objectives = names
    for name in ("a", "b"):
      config.rewards[name].normalise = "fixed"
    programs = make_programs(config, mesh_of())
    placed = sharding.put(reference(T5), programs.reference_shardings)

    def scorer(rollout, batch, step):
      columns = [("a", "b").index(name) for name in names]
      return moft.Scored(jnp.asarray(rewards_of(rollout)[:, columns]), [], 0)

    state = moft.estimate_normalisation(
      config,
      programs.init(placed, jax.random.key(7)),
      lambda start: iter([prompts_of(0), prompts_of(1)]),
      lambda state, step, batch: programs.scored_rollout(
        state, placed, batch, np.int32(step)
      ),
      scorer,
    )
    stats = state.reward_stats
    pairs = np.stack([stats.mean, stats.deviation()], 1)
    return dict(zip(names, pairs, strict=True))

  together = moments("full", "a", "b")
  for name in ("a", "b"):
    np.testing.assert_allclose(
      moments("none", name)[name], together[name], rtol=1e-4
    )

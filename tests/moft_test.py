"""The training step of CLP: its invariants, on arrays alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax import conditioning, sharding
from clp_jax import config as config_lib
from clp_jax.models import decoding, families, t5
from clp_jax.train import moft

MODEL = t5.T5Config(
  vocab_size=16,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=8,
  eos_ids=(1,),
)
ALLOWED = np.asarray([False, True, False] + [True] * 11 + [False] * 2)
PROMPTS, SAMPLES, SOURCE, TARGET = 8, 2, 7, 5


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


@functools.cache
def reference():
  """Parameters whose logits are spread out, as a trained model's are."""
  params = t5.init_params(MODEL, jax.random.key(0))
  params["decoder"]["logits_dense"]["kernel"] *= 4.0
  return jax.tree.map(np.asarray, params)


def prompts_of(step, rows=PROMPTS):
  random = np.random.default_rng(step)
  tokens = random.integers(3, 14, size=(rows, SOURCE))
  lengths = random.integers(2, SOURCE + 1, size=(rows, 1))
  return np.where(np.arange(SOURCE)[None] < lengths, tokens, 0).astype(np.int32)


def rewards_of(rollout):
  """[R, 2] non-integer rewards that conflict; a function of the tokens."""
  tokens = np.asarray(rollout.tokens, np.float64)
  a = np.cos(tokens).sum(1) / 7
  b = 0.3 * np.sqrt((tokens > 0).sum(1)) - 0.1 * (tokens % 3).sum(1)
  return np.stack([a, b], 1).astype(np.float32)


def mesh_of(data=1, model=1, replica=1):
  devices = jax.devices()[: replica * data * model]
  return sharding.make_mesh(data, model, devices, replica)


def train(config, mesh, steps, rewards_fn=rewards_of, programs=None):
  """Runs `steps` steps; returns (state, metrics per step, programs)."""
  if programs is None:
    programs = moft.make_programs(config, MODEL, mesh, ALLOWED)
  placed = sharding.put(reference(), programs.reference_shardings)
  state = programs.init(placed, jax.random.key(7))
  history = []
  for step in range(steps):
    prompts = sharding.to_devices(mesh, prompts_of(step), PROMPTS)
    rollout = programs.roll_out(state, placed, prompts, np.int32(step))
    rewards = rewards_fn(rollout)
    state, metrics = programs.update(
      state, rollout, sharding.to_devices(mesh, rewards, len(rewards)), placed
    )
    history.append(jax.device_get(metrics))
  return state, history, programs


@functools.cache
def plain_run():
  """(parameters, metrics, programs) of 2 steps of the default on 1 device."""
  state, history, programs = train(make_config(), mesh_of(), 2)
  return jax.tree.map(np.asarray, state.params), history, programs


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
  "temperature", [0.6, pytest.param(1.7, marks=pytest.mark.slow)]
)
def test_kl_is_zero_at_step_0_at_any_temperature(temperature):
  config = make_config(**{"rollout.temperature": temperature})
  programs = moft.make_programs(config, MODEL, mesh_of(), ALLOWED)
  state = programs.init(reference(), jax.random.key(1))
  rollout = programs.roll_out(state, reference(), prompts_of(0), np.int32(0))
  assert np.asarray(rollout.mask).sum() > PROMPTS  # more than ends
  np.testing.assert_allclose(rollout.logp, rollout.ref_logp, atol=1e-5)
  # And the temperature is in both: they are those of the tempered model.
  logp, _ = decoding.token_logp(
    families.build(MODEL),
    reference(),
    jnp.asarray(prompts_of(0)),
    rollout.tokens,
    num_samples=SAMPLES,
    temperature=temperature,
  )
  expected = np.where(rollout.mask, logp, 0)
  np.testing.assert_allclose(rollout.logp, expected, atol=1e-5)


def test_samples_depend_on_the_step_and_weightings_vary():
  _, _, programs = plain_run()
  placed = sharding.put(reference(), programs.reference_shardings)
  state = programs.init(placed, jax.random.key(1))
  first, second, again = (
    programs.roll_out(
      state,
      placed,
      sharding.to_devices(mesh_of(), prompts_of(0), PROMPTS),
      np.int32(step),
    )
    for step in (0, 1, 0)
  )
  np.testing.assert_array_equal(first.tokens, again.tokens)
  assert not np.array_equal(first.tokens, second.tokens)
  weights = np.asarray(first.weighting.weights)
  assert not np.allclose(weights[0], weights[1])
  assert not np.allclose(weights, second.weighting.weights)


@pytest.mark.parametrize(
  "kind", [pytest.param("full", marks=pytest.mark.slow), "attention"]
)
def test_update_equals_a_plain_computation(kind):
  """Gradient, return and metrics against loops over policies and samples."""
  config = make_config(steering=kind)
  programs = moft.make_programs(config, MODEL, mesh_of(), ALLOWED)
  state = programs.init(reference(), jax.random.key(3))
  # Sets that differ, so that the weighting matters.
  state = dataclasses.replace(
    state,
    params=jax.tree.map(
      lambda p: (
        p
        + 0.1 * np.random.default_rng(p.size).normal(size=p.shape).astype("f4")
      ),
      state.params,
    ),
  )
  rollout = programs.roll_out(state, reference(), prompts_of(5), np.int32(4))
  rewards = rewards_of(rollout)
  steerable = conditioning.steerable_leaves(reference(), kind)
  weights = np.asarray(rollout.weighting.weights)
  model = t5.T5(MODEL)
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

  def loss(params):
    total = 0.0
    for g, c in enumerate(weights):
      policy = jax.tree.map(
        lambda p, s, c=c: c[0] * p[0] + c[1] * p[1] if s else p,
        params,
        steerable,
      )
      own = slice(g * rows // 2, (g + 1) * rows // 2)
      prompts = jnp.repeat(rollout.encoder_input_tokens, SAMPLES, axis=0)[own]
      tokens = rollout.tokens[own]
      inputs = jnp.concatenate(
        [jnp.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1
      )
      logits = model.apply({"params": policy}, prompts, inputs)
      logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits), tokens[..., None], axis=-1
      )[..., 0]
      response = jnp.where(mask[own], logp, 0).sum(1)
      total -= (advantages[own] * response).sum()
    return total / rows

  gradient = jax.jit(jax.grad(loss))(state.params)
  norm = np.sqrt(
    sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient))
  )
  before = jax.tree.map(np.asarray, state.params)
  new, metrics = programs.update(state, rollout, rewards, reference())
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


def test_one_hot_weighting_equals_a_single_objective_run():
  both = make_config(**{"weightings.weights": (0.0, 1.0)})
  state, history, _ = train(both, mesh_of(), 3)
  single = make_config(steering="none")
  single.objectives = ("b",)
  alone, alone_history, _ = train(
    single, mesh_of(), 3, lambda rollout: rewards_of(rollout)[:, 1:]
  )
  assert_trees_close(
    jax.tree.map(lambda p: p[1], state.params), alone.params, atol=1e-6
  )
  # And the other set has not moved.
  jax.tree.map(
    lambda p, q: np.testing.assert_array_equal(p[0], q),
    state.params,
    reference(),
  )
  for a, b in zip(history, alone_history, strict=True):
    np.testing.assert_allclose(a["return"].sum, b["return"].sum, atol=1e-4)


def test_a_new_weighting_never_traces_again():
  _, history, programs = plain_run()
  weights = [h["reward/0"].sum for h in history]
  assert len(set(map(float, weights))) == 2  # two different steps
  assert programs.rollout._cache_size() == 1
  assert programs.reference._cache_size() == 1
  assert programs.update._cache_size() == 1


def test_microbatches_add_up_to_the_whole_batch():
  whole, history, _ = plain_run()
  parts, parts_history, _ = train(
    make_config(**{"train.microbatches": 4}), mesh_of(), 2
  )
  assert_trees_close(history, parts_history, rtol=2e-4, atol=2e-5)
  assert_trees_close(whole, parts.params, atol=2e-4)


@pytest.mark.parametrize(
  "replica, data, model, fsdp",
  [
    pytest.param(1, 8, 1, False, marks=pytest.mark.slow),
    (1, 4, 2, True),
    pytest.param(2, 2, 2, True, marks=pytest.mark.slow),
  ],
)
def test_devices_do_not_change_training(replica, data, model, fsdp):
  one, history, _ = plain_run()
  config = make_config(**{"mesh.fsdp": fsdp})
  many, many_history, _ = train(config, mesh_of(data, model, replica), 2)
  assert_trees_close(history, many_history, rtol=5e-4, atol=5e-5)
  assert_trees_close(one, many.params, atol=5e-4)
  kernel = many.params["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
  cut = kernel.sharding.shard_shape(kernel.shape)
  expected = (2, 8 // (data if fsdp else 1), 8 // model)
  assert cut == expected


def test_kl_has_a_set_of_its_own_when_alpha_varies():
  config = make_config(**{"weightings.alpha_range": (0.01, 0.5)})
  state, history, _ = train(config, mesh_of(), 2)
  embedding = state.params["token_embedder"]["embedding"]
  assert embedding.shape == (3, 16, 8)
  assert not np.array_equal(
    embedding[2], reference()["token_embedder"]["embedding"]
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
    programs = moft.make_programs(config, MODEL, mesh_of(), ALLOWED)
    placed = sharding.put(reference(), programs.reference_shardings)

    def scorer(rollout, batch, step):
      columns = [("a", "b").index(name) for name in names]
      return moft.Scored(jnp.asarray(rewards_of(rollout)[:, columns]), [], 0)

    state = moft.estimate_normalisation(
      config,
      programs.init(placed, jax.random.key(7)),
      lambda start: iter([prompts_of(0), prompts_of(1)]),
      lambda state, step, batch: programs.roll_out(
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

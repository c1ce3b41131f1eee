"""PPO and the learned baseline in the training step, on arrays alone.

Compiling takes all of the time; what needs further programs, for the meshes,
one objective and a restart, is marked slow.
"""

import dataclasses
import functools

import both_families
import jax
import jax.numpy as jnp
import moft_test
import numpy as np
import pytest
from both_families import (
  DECODER,
  LISTED_DECODER,
  T5,
  both,
  cases,
  reference,
)
from moft_test import PROMPTS, SAMPLES, assert_trees_close, mesh_of

from clp_jax import build, conditioning, keys, saved_params, sharding
from clp_jax.train import checkpoints

ROWS = PROMPTS * SAMPLES


def make_config(**changes):
  ppo = {"algorithm": "ppo", "ppo.value_clip": 0.3, "critic.hidden": 8}
  return moft_test.make_config(**(ppo | changes))


def full_config(objectives=("a", "b"), **changes):
  """4 updates a step, with all that a train state can hold."""
  config = make_config(
    **{
      "objectives": objectives,
      "ppo.whiten": True,
      "weightings.adapt": len(objectives) > 1,
      "scalarisation.name": "chebyshev",
      "scalarisation.utopia": (3.0,) * len(objectives),
    }
    | changes
  )
  config.rewards.a.normalise = "running"
  return config


@functools.cache
def full_programs(model=T5, data=1, cut=1):
  config = full_config(**{"train.microbatches": data * cut // 4 or 1})
  return make_programs(config, model, mesh_of(data, cut))


def make_programs(config, model=T5, mesh=None):
  mesh = mesh_of() if mesh is None else mesh
  return moft_test.make_programs(config, mesh, model)


def perturbed(tree):
  """Parameters that differ between sets, and values that are not 0."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda p: p + 0.1 * random.normal(size=p.shape).astype("f4"), tree
  )


@functools.cache
def sampled(model=T5):
  """(state, rollout, rewards) of policies and a critic that are trained."""
  programs = make_programs(make_config(), model)
  state = programs.init(reference(model), jax.random.key(3))
  critic = dataclasses.replace(
    state.critic, params=perturbed(state.critic.params)
  )
  state = dataclasses.replace(
    state, params=perturbed(state.params), critic=critic
  )
  prompts = moft_test.prompts_of(5, model=model)
  rollout = programs.scored_rollout(
    state, reference(model), prompts, np.int32(4)
  )
  return state, rollout, moft_test.rewards_of(rollout)


def update(
  programs, mesh=None, state=None, rollout=None, rewards=None, model=T5
):
  """(state, metrics) after one update, of the sampled state or another."""
  own = sampled(model)
  state = own[0] if state is None else state
  rollout = own[1] if rollout is None else rollout
  rewards = own[2] if rewards is None else rewards
  if mesh is not None:
    key = state.key
    state, rollout, rewards = jax.device_get(
      (dataclasses.replace(state, key=0), rollout, rewards)
    )
    shardings = dataclasses.replace(programs.state_shardings, key=None)
    state = dataclasses.replace(state, key=None)
    state = dataclasses.replace(
      sharding.put(state, shardings),
      key=jax.device_put(key, programs.state_shardings.key),
    )
  copy = jax.tree.map(jnp.copy, state)  # the program gives its buffers away
  state, metrics = programs.update(copy, rollout, rewards, reference(model))
  return state, jax.device_get(metrics)


def full_state(model):
  """The sampled state, with an estimate of the front."""
  adaptation = build.adaptation(full_config())
  return dataclasses.replace(sampled(model)[0], front=adaptation.empty())


def mean(metric):
  return float(metric.sum / metric.count)


def moved(new, old):
  """The largest change of each leaf."""
  return jax.tree.leaves(
    jax.tree.map(
      lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), new, old
    )
  )


def plain_values(params, states):
  """The critic, in NumPy: [R, T, D] -> [R, T, K]."""
  x = states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-6)
  hidden, value = params["hidden"], params["value"]
  columns = []
  for k in range(3):
    h = x @ hidden["kernel"][k] + hidden["bias"][k]
    h = np.asarray(jax.nn.gelu(h))
    columns.append(h @ value["kernel"][k] + value["bias"][k])
  return np.stack(columns, -1)


def plain_forward(model, params):
  """Log-probabilities and states of the sampled rows, a policy at a time."""
  _, rollout, _ = sampled(model)
  steerable = conditioning.steerable_leaves(reference(model), "full")
  prompts = np.asarray(rollout.encoder_input_tokens).repeat(SAMPLES, axis=0)
  inputs = both_families.plain_inputs(model, prompts, rollout.tokens)
  logps, states = [], []
  for g, c in enumerate(rollout.coefficients):
    policy = conditioning.mix(params, steerable, c)
    own = slice(g * ROWS // 2, (g + 1) * ROWS // 2)
    logits, kept = both_families.plain_scores(
      model, policy, [x[own] for x in inputs]
    )
    logp = both_families.log_softmax(logits, both_families.allowed(model))
    logps.append(both_families.picked(logp, rollout.tokens[own]))
    states.append(kept)
  return jnp.concatenate(logps), jnp.concatenate(states)


@functools.cache
def plain_gradient(model):
  """Jitted: (params, advantages) -> (gradient, states)."""
  mask = sampled(model)[1].mask

  def loss(params, advantages):
    logp, states = plain_forward(model, params)
    return -(advantages * jnp.where(mask, logp, 0)).sum() / ROWS, states

  return jax.jit(jax.grad(loss, has_aux=True))


def plain_advantages(model, values, kl, gae_lambda, others=True):
  """(advantages [R, T], targets [R, T, 3]) of the sampled rows, by loops.

  Args:
    model: of the family.
    values: [R, T, 3] of the critic.
    kl: [R, T] log-ratio to the reference.
    gae_lambda: lambda.
    others: what the prompt's other sample got is taken off.
  """
  _, rollout, rewards = sampled(model)
  mask = np.asarray(rollout.mask)
  weights = np.asarray(rollout.weighting.weights)
  advantages = np.zeros(mask.shape, np.float32)
  targets = np.zeros([*mask.shape, 3])
  totals = np.concatenate([rewards, (kl * mask).sum(1)[:, None]], axis=1)
  for r in range(ROWS):
    w, n = weights[r // (ROWS // 2)], mask[r].sum()
    later, following = np.zeros(3), np.zeros(3)
    for t in reversed(range(n)):
      paid = np.append(rewards[r] if t == n - 1 else np.zeros(2), kl[r, t])
      if others and t == n - 1:
        paid -= totals[r + 1 if r % 2 == 0 else r - 1]
      later = paid + following - values[r, t] + gae_lambda * later
      following = values[r, t]
      targets[r, t] = later + values[r, t]
      advantages[r, t] = 0.95 * (w * later[:2]).sum() - 0.05 * later[2]
  return advantages, targets


PPO = {"ppo.gae_lambda": 0.8, "ppo.epochs": 1, "ppo.minibatches": 1}
LEARNED = {"algorithm": "reinforce", "reinforce.baseline": "learned"}


@pytest.mark.parametrize(
  "model, algorithm",
  cases(
    (True, T5, "ppo"),
    (False, LISTED_DECODER, "ppo"),
    (False, DECODER, "ppo"),
    (False, T5, "learned"),
    (False, DECODER, "learned"),
  ),
)
def test_one_update_is_reinforce_with_the_critics_advantages(model, algorithm):
  """Against loops: GAE in NumPy, then -sum A log pi over policies."""
  changes = PPO if algorithm == "ppo" else LEARNED
  gae_lambda = changes.get("ppo.gae_lambda", 1.0)
  state, rollout, _ = sampled(model)
  mask = np.asarray(rollout.mask)
  gradient_of = plain_gradient(model)
  _, states = gradient_of(state.params, np.zeros(mask.shape, np.float32))
  values = plain_values(jax.device_get(state.critic.params), np.asarray(states))
  kl = np.asarray(rollout.logp - rollout.ref_logp)
  advantages, targets = plain_advantages(
    model, values, kl, gae_lambda, others="ppo.epochs" in changes
  )
  gradient, _ = gradient_of(state.params, advantages)
  norm = np.sqrt(
    sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient))
  )
  programs = make_programs(make_config(**changes), model)
  new, metrics = update(programs, model=model)
  np.testing.assert_allclose(mean(metrics["gradient_norm"]), norm, rtol=1e-3)
  target, value = targets[mask], values[mask]
  np.testing.assert_allclose(
    mean(metrics["critic/loss"]),
    0.5 * ((target - value) ** 2).sum() / mask.sum(),
    rtol=1e-4,
  )
  for i, name in enumerate(("0", "1", "kl")):
    expected = 1 - (target - value)[:, i].var() / target[:, i].var()
    np.testing.assert_allclose(
      metrics[f"critic/explained_variance/{name}"], expected, atol=1e-3
    )
  if "ppo.epochs" in changes:
    np.testing.assert_allclose(
      mean(metrics["ppo/approximate_kl"]), 0, atol=1e-9
    )
    assert mean(metrics["ppo/clip_fraction"]) == 0
  # Adam's first step has the gradient's sign and the rate's size.
  clipped = min(1.0, 1.0 / norm)

  def check(p, q, g):
    g = np.asarray(g) * clipped
    clear = np.abs(g) > 1e-5
    step = -1e-2 * g / (np.abs(g) + 1e-8)
    np.testing.assert_allclose(
      (np.asarray(q) - np.asarray(p))[clear], step[clear], atol=4e-4
    )

  jax.tree.map(check, state.params, new.params, gradient)


@pytest.mark.slow
def test_early_stop_takes_no_further_update():
  """Of 6: Adam has counted 1, and nothing moved by more than the rate."""
  state, _, _ = sampled()
  config = make_config(**{"ppo.epochs": 3, "ppo.target_kl": 1e-7})
  new, metrics = update(make_programs(config))
  assert float(metrics["ppo/updates"]) == 1
  assert float(metrics["gradient_norm"].count) == 1
  counts = [int(x) for x in jax.tree.leaves(new.opt_state) if x.ndim == 0]
  assert counts == [1, 1]
  assert 0.9e-2 < max(moved(new.params, state.params)) < 1.01e-2
  assert max(moved(new.critic.params, state.critic.params)) < 3.01e-3
  # The value at which it stopped is not among what was done.
  np.testing.assert_allclose(mean(metrics["ppo/approximate_kl"]), 0, atol=1e-9)


@pytest.mark.slow
@both
def test_all_updates_are_taken_on_any_mesh_and_in_microbatches(model):
  start = full_state(model)
  one, metrics = update(full_programs(model), state=start, model=model)
  assert float(metrics["ppo/updates"]) == 4
  assert mean(metrics["ppo/approximate_kl"]) > 1e-5
  assert 0 < mean(metrics["ppo/clip_fraction"]) < 1
  counts = [int(x) for x in jax.tree.leaves(one.opt_state) if x.ndim == 0]
  assert counts == [4, 1]  # Adam's of updates, the schedule's of steps
  assert max(moved(one.params, start.params)) > 1.5e-2
  assert min(moved(one.critic.params, start.critic.params)) > 0
  many, many_metrics = update(
    full_programs(model, 4, 2), mesh_of(4, 2), start, model=model
  )
  assert_trees_close(metrics, many_metrics, rtol=2e-3, atol=2e-4)
  both_families.assert_near_after_adam(
    many.params,
    one.params,
    one.opt_state,
    rounding=1e-6,
    moved=4 * make_config().optimizer.learning_rate,
    atol=1e-3,
  )
  assert_trees_close(one.critic.params, many.critic.params, atol=1e-3)
  assert_trees_close(one.front, many.front, atol=1e-6)
  kernel = many.critic.params["hidden"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (3, 8, 4)
  moment = many.critic.opt_state[0].mu["hidden"]["kernel"]
  assert moment.sharding == kernel.sharding


@pytest.mark.slow
@both
def test_one_hot_weighting_equals_a_single_objective_run(model):
  state, rollout, rewards = sampled(model)
  one_hot = np.tile(np.float32([[0.0, 1.0]]), (2, 1))
  weighting = rollout.weighting._replace(weights=one_hot)
  rollout = rollout.replace(weighting=weighting, coefficients=one_hot)
  one_of_two, metrics = update(
    full_programs(model), None, full_state(model), rollout, rewards, model
  )
  single = make_programs(full_config(("b",), steering="none"), model)
  start = single.init(reference(model), jax.random.key(3))
  critic = dataclasses.replace(
    start.critic,
    params=jax.tree.map(lambda p: p[1:], state.critic.params),
  )
  start = dataclasses.replace(
    start, params=jax.tree.map(lambda p: p[1], state.params), critic=critic
  )
  ones = np.ones([2, 1], np.float32)
  rollout = rollout.replace(
    weighting=weighting._replace(weights=ones), coefficients=ones
  )
  alone, alone_metrics = update(
    single, None, start, rollout, rewards[:, 1:], model
  )
  assert_trees_close(
    jax.tree.map(lambda p: p[1], one_of_two.params), alone.params, atol=1e-5
  )
  assert_trees_close(
    jax.tree.map(lambda p: p[1:], one_of_two.critic.params),
    alone.critic.params,
    atol=1e-4,
  )
  for name in ("return", "loss", "ppo/approximate_kl"):
    np.testing.assert_allclose(
      mean(metrics[name]), mean(alone_metrics[name]), rtol=1e-3, atol=1e-6
    )
  # And the other set has not moved.
  still = jax.tree.map(
    lambda p, q: (p[0], q[0]), one_of_two.params, state.params
  )
  for p, q in jax.tree.leaves(still, is_leaf=lambda x: isinstance(x, tuple)):
    np.testing.assert_array_equal(p, q)


@pytest.mark.slow
@both
def test_4_steps_are_2_and_a_restart_and_2_bit_for_bit(model, tmp_path):
  """With a critic, moments of rewards and an estimate of the front."""
  mesh, programs = mesh_of(4, 2), full_programs(model, 4, 2)
  placed = sharding.put(reference(model), programs.reference_shardings)
  key = jax.random.key(7)

  def advance(state, steps):
    state, history = moft_test.advance(
      state, programs, mesh, placed, steps, moft_test.rewards_of, model
    )
    return state, history[-1]

  state, _ = advance(programs.init(placed, key), (0, 1))
  count = np.asarray(state.front.count)
  assert 2 < count.sum() <= 4  # two groups a step, decayed
  with checkpoints.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(state, batches=2)
  whole, metrics = advance(state, (2, 3))
  with checkpoints.Checkpoints(str(tmp_path), keep=1) as saved:
    state, _ = saved.restore(
      saved_params.abstract_like(
        jax.eval_shape(programs.init, placed, key), programs.state_shardings
      )
    )
  np.testing.assert_array_equal(state.front.count, count)
  parts, parts_metrics = advance(state, (2, 3))
  jax.tree.map(
    np.testing.assert_array_equal,
    (dataclasses.replace(whole, key=0), metrics),
    (dataclasses.replace(parts, key=0), parts_metrics),
  )


def test_q_is_drawn_as_ever_where_it_is_not_adapted():
  state, rollout, _ = sampled()
  assert state.front is None
  weightings_key, _, _ = keys.of_step(state.key, np.int32(4))
  plain = build.distribution(make_config()).sample(weightings_key, 2)
  np.testing.assert_array_equal(rollout.weighting.weights, plain.weights)

"""Responses that are sampled a step ahead: by which policies, what corrects
for it, and that a restart changes nothing."""

import dataclasses
import functools
import os
import signal

import actor_critic_test
import jax
import moft_test
import numpy as np
import pytest
import runs
from both_families import DECODER, LISTED_DECODER, T5, cases, reference
from moft_test import PROMPTS, SAMPLES, SOURCE, TARGET, mesh_of, rewards_of

from clp_jax import sharding
from clp_jax.data.reader import Batch
from clp_jax.errors import Preempted, RewardError
from clp_jax.train import loop, moft

ROWS = PROMPTS * SAMPLES


def config_of(ahead):
  """With all that a step can read of a state, Q's estimate among it."""
  return actor_critic_test.full_config(
    **{
      "rollout.ahead": ahead,
      "data.source_length": SOURCE,
      "train.steps": 4,
      "train.checkpoint_every": 3,
    }
  )


@functools.cache
def programs_of(ahead, model=T5):
  return actor_critic_test.make_programs(config_of(ahead), model, mesh_of(2))


class Run:
  """A run whose parts tell what they are called with, in their order."""

  def __init__(self, ahead, model=T5, reward=lambda step: None):
    """`reward` is called before the rewards of a step are computed."""
    self.config, self.mesh, self.reward = config_of(ahead), mesh_of(2), reward
    self.model, self.programs = model, programs_of(ahead, model)
    self.calls = []  # (what, step)
    self.scored = []  # numbers of the batches that rewards were computed of
    self.policies = {}  # step -> parameters that sampled
    self.learned = {}  # step -> (parameters, rollout) of its update

  def train(self, workdir, steps=4):
    """As `moft.train`, but for what a config is read for."""
    placed = sharding.put(
      reference(self.model), self.programs.reference_shardings
    )
    taken = moft.Steps(
      self,  # for a Scorer
      dataclasses.replace(
        self.programs, rollout=self.rollout, update=self.update
      ),
      placed,
      self.batches,
    )
    self.config.train.steps = steps
    return loop.run(
      str(workdir),
      self.programs,
      placed,
      jax.random.key(7),
      label="",
      settings=self.config.train,
      batches_from=taken.batches_from,
      step_fn=taken.take,
      before=taken.before,
    )

  def batches(self, start):
    while True:
      yield Batch(
        prompts_of(start, self.model),
        np.zeros([PROMPTS, TARGET], np.int32),
        [str(start)] * PROMPTS,
        [""] * PROMPTS,
      )
      start += 1

  def rollout(self, params, reference, prompts, key, step, front):
    self.calls.append(("rollout", int(step)))
    self.policies[int(step)] = jax.device_get(params)
    return self.programs.rollout(params, reference, prompts, key, step, front)

  def __call__(self, rollout, batch, step):
    self.calls.append(("reward", step))
    self.scored.append(int(batch.documents[0]))
    self.reward(step)
    rewards = sharding.to_devices(self.mesh, rewards_of(rollout), ROWS)
    return moft.Scored(rewards, [], 0)

  def update(self, state, rollout, rewards, reference):
    assert state.pending is None  # else reading it would wait for the update
    self.calls.append(("update", int(state.step)))
    self.learned[int(state.step)] = jax.device_get((state.params, rollout))
    return self.programs.update(state, rollout, rewards, reference)


def prompts_of(step, model):
  return moft_test.prompts_of(step, model=model)


@functools.cache
def finished(folder, ahead, model=T5):
  """A run of 4 steps that nothing has stopped."""
  run = Run(ahead, model)
  run.train(folder / str(ahead))
  return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("ahead")


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_first_step_is_that_of_runs_that_are_not_ahead(folder):
  (own, first), (other, expected) = (
    finished(folder, ahead).learned[0] for ahead in (1, 0)
  )
  assert_equal((own, first), (other, expected))
  lengths = first.mask.sum(1)
  assert lengths.min() < lengths.max()  # ragged
  assert 0 < first.weighting.weights.min() < first.weighting.weights.max()
  rows, expected_rows = (runs.metrics(folder / str(ahead)) for ahead in (1, 0))
  # The old log-probabilities are decoding's: the same up to rounding.
  assert rows[0] == pytest.approx(expected_rows[0], rel=2e-3, abs=2e-4)
  assert rows[1] != pytest.approx(expected_rows[1], rel=2e-3, abs=2e-4)
  assert "pending" not in runs.load(folder / "0", 4)[1]


def test_a_step_learns_from_the_policies_before_the_update_before(folder):
  """And draws what it would have drawn, with its own key, of its own batch."""
  run, programs = finished(folder, 1), programs_of(0)
  start = run.learned[0][0]
  assert_equal(run.policies[1], start)
  for step in (2, 3, 4):
    assert_equal(run.policies[step], run.learned[step - 1][0])
  moved = actor_critic_test.moved(run.learned[1][0], start)
  assert max(moved) > 1e-2
  placed = sharding.put(reference(T5), programs.reference_shardings)
  state = programs.init(placed, jax.random.key(7))
  prompts = sharding.to_devices(mesh_of(2), prompts_of(1, T5), PROMPTS)
  expected = programs.scored_rollout(state, placed, prompts, np.int32(1))
  assert_equal(run.learned[1][1], jax.device_get(expected))
  # The weights are of what was known of the front then, too.
  now = finished(folder, 0).learned[1][1]
  assert np.any(now.logp != expected.logp)


def test_the_devices_sample_before_the_host_scores(folder):
  def steps(*parts):
    return [(name, step + later) for step in range(4) for name, later in parts]

  assert finished(folder, 0).calls == steps(
    ("rollout", 0), ("reward", 0), ("update", 0)
  )
  assert finished(folder, 1).calls == [
    ("rollout", 0),
    *steps(("rollout", 1), ("reward", 0), ("update", 0)),
  ]


@pytest.mark.parametrize("model", cases((True, T5), (False, LISTED_DECODER)))
def test_ratios_are_to_the_policies_that_sampled(model):
  """An update of later ones, against plain forward passes and loops."""
  state, rollout, _ = actor_critic_test.sampled(model)
  random = np.random.default_rng(1)
  later = dataclasses.replace(
    state,
    params=jax.tree.map(
      lambda p: p + 0.02 * random.normal(size=p.shape).astype("f4"),
      state.params,
    ),
  )
  forward = jax.jit(functools.partial(actor_critic_test.plain_forward, model))
  then, _ = jax.device_get(forward(state.params))
  now, states = jax.device_get(forward(later.params))
  # What is paid is of then, what is expected of now.
  values = actor_critic_test.plain_values(
    jax.device_get(later.critic.params), states
  )
  advantages, _ = actor_critic_test.plain_advantages(
    model, values, then - np.asarray(rollout.ref_logp), gae_lambda=0.8
  )
  mask = np.asarray(rollout.mask)
  ratio = np.where(mask, np.exp(now - then), 1)
  bounded = np.clip(ratio, 0.9, 1.1)
  gain = np.minimum(ratio * advantages, bounded * advantages)
  counts = ratio * advantages <= bounded * advantages
  gradient, _ = actor_critic_test.plain_gradient(model)(
    later.params, (counts * ratio * advantages).astype(np.float32)
  )
  norm = np.sqrt(
    sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient))
  )
  config = actor_critic_test.make_config(
    **actor_critic_test.PPO, **{"rollout.ahead": 1, "ppo.clip": 0.1}
  )
  _, metrics = actor_critic_test.update(
    actor_critic_test.make_programs(config, model), state=later, model=model
  )
  expected = {
    "loss": -gain.sum() / ROWS,
    "gradient_norm": norm,
    "ppo/approximate_kl": (ratio - 1 - np.log(ratio)).sum() / mask.sum(),
    "ppo/clip_fraction": (ratio != bounded).sum() / mask.sum(),
  }
  assert expected["ppo/approximate_kl"] > 1e-4
  assert 0 < expected["ppo/clip_fraction"] < 0.9
  for name, value in expected.items():
    found = actor_critic_test.mean(metrics[name])
    np.testing.assert_allclose(found, value, rtol=2e-3, err_msg=name)


def stop(step):
  if step == 1:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(step):
  if step == 2:
    raise RewardError("the judge is down.")


@pytest.mark.parametrize(
  "model, why",
  cases(
    (True, T5, stop),
    (True, T5, fail),
    (True, T5, None),
    (False, DECODER, stop),
  ),
)
def test_4_steps_are_2_and_a_restart_and_2_bit_for_bit(
  model, why, folder, tmp_path
):
  whole, parts = folder / "1", tmp_path
  if model is T5:
    scored = finished(folder, 1).scored
  else:
    whole = tmp_path / "whole"
    scored = finished(whole, 1, model).scored
    whole, parts = whole / "1", tmp_path / "parts"
  assert scored == [0, 1, 2, 3]
  if why is None:
    first = Run(1, model)
    first.train(parts, 2)  # and then more
  else:
    first = Run(1, model, why)
    with pytest.raises(Preempted if why is stop else RewardError):
      first.train(parts)
  assert runs.checkpoint_steps(parts) == [2]
  assert first.scored == [0, 1] + [2] * (why is fail)
  second = Run(1, model)
  second.train(parts)
  assert second.scored == [2, 3]
  assert second.calls[0] == ("rollout", 3)  # 2 is in the checkpoint
  runs.assert_same_run(whole, parts, 4)

"""The theory in docs/theory.md, on response sets that can be enumerated.

Two parts: closed-form optima of the value, and what mixing can do with them;
and the trainer's gradients, against exact ones of a model of each family whose
responses can all be written down.
"""

import dataclasses
import functools
import itertools

import both_families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clp_jax import conditioning, sharding
from clp_jax import critic as critic_lib
from clp_jax.algorithms import ppo, reinforce
from clp_jax.bank import Bank
from clp_jax.models import families
from clp_jax.rewards.normalisation import RewardStats
from clp_jax.rollout import Rollout, score_groups
from clp_jax.scalarisation import Scalarisation
from clp_jax.train import experience as experience_lib
from clp_jax.train.actor_critic import ActorCritic
from clp_jax.train.reinforce import Reinforce
from clp_jax.train.state import init_state
from clp_jax.weightings import Weighting, coefficients, simplex_grid

# Closed-form optima.


def log_normalise(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def optimum(ref, rewards, weights, alpha):
  """log pi* of V_{alpha,w}: [K], from log pi_ref [K] and rewards [K, m]."""
  return log_normalise(ref + (1 - alpha) / alpha * (rewards @ weights))


def value(logp, ref, rewards, weights, alpha):
  """V_{alpha,w} of log pi [K]."""
  returns = (1 - alpha) * (rewards @ weights) - alpha * (logp - ref)
  return (np.exp(logp) * returns).sum(-1)


@pytest.fixture
def problem():
  """(log pi_ref [7], rewards [7, 2])."""
  random = np.random.default_rng(0)
  return log_normalise(random.normal(size=7)), random.normal(size=(7, 2))


def test_the_closed_form_is_the_optimum(problem):
  ref, rewards = problem
  weights, alpha = np.array([0.3, 0.7]), 0.15
  best = optimum(ref, rewards, weights, alpha)
  # V* = alpha log E_ref exp((1 - alpha) / alpha R), and no other policy has it.
  scaled = (1 - alpha) / alpha * (rewards @ weights)
  free_energy = alpha * np.log((np.exp(ref + scaled)).sum())
  at_best = value(best, ref, rewards, weights, alpha)
  assert at_best == pytest.approx(free_energy)
  random = np.random.default_rng(1)
  for size in (1e-3, 0.1, 3.0):
    other = log_normalise(best + size * random.normal(size=7))
    lost = at_best - value(other, ref, rewards, weights, alpha)
    # What is lost is alpha KL(other || best), exactly.
    kl = (np.exp(other) * (other - best)).sum()
    assert lost == pytest.approx(alpha * kl, rel=1e-6) and lost > 0


@pytest.mark.parametrize("alpha", [0.9, 0.4, 0.2, 0.1, 0.07])
def test_mixing_logits_with_the_reference_is_exact_in_the_kl_weight(
  problem, alpha
):
  """DeRa's mixing, between 0 and beyond 1, at t = lambda / lambda_trained."""
  ref, rewards = problem
  weights, trained = np.array([0.3, 0.7]), 0.1

  def strength(alpha):
    return (1 - alpha) / alpha

  t = strength(alpha) / strength(trained)
  policy = optimum(ref, rewards, weights, trained)
  best = optimum(ref, rewards, weights, alpha)
  np.testing.assert_allclose(
    log_normalise((1 - t) * ref + t * policy), best, atol=1e-12
  )
  if 0 < t < 1:  # mixing probabilities is not
    mixed = np.log((1 - t) * np.exp(ref) + t * np.exp(policy))
    lost = value(best, ref, rewards, weights, alpha) - value(
      mixed, ref, rewards, weights, alpha
    )
    assert lost > 1e-3


def test_mixing_logits_of_single_reward_optima_is_exact_in_the_weights(
  problem,
):
  ref, rewards = problem
  alpha = 0.2
  singles = np.stack([optimum(ref, rewards, w, alpha) for w in np.eye(2)])
  for w in simplex_grid(2, 6):
    np.testing.assert_allclose(
      log_normalise(w @ singles), optimum(ref, rewards, w, alpha), atol=1e-6
    )


def test_mixing_logits_token_by_token_is_not_exact():
  """Of two tokens, the first's logits must know what follows."""
  ref = log_normalise(np.log([[0.4, 0.1], [0.2, 0.3]]).reshape(-1))
  rewards = np.array([[1.0], [-1.0], [0.5], [0.4]])
  one, trained, alpha = np.ones(1), 0.1, 0.5
  t = ((1 - alpha) / alpha) / ((1 - trained) / trained)
  policy = optimum(ref, rewards, one, trained)

  def by_token(logp):
    """log p(first), log p(second | first)."""
    first = np.log(np.exp(logp.reshape(2, 2)).sum(1))
    return first, logp.reshape(2, 2) - first[:, None]

  parts = zip(by_token(ref), by_token(policy), strict=True)
  first, second = (log_normalise((1 - t) * a + t * b) for a, b in parts)
  mixed = (first[:, None] + second).reshape(-1)
  best = optimum(ref, rewards, one, alpha)
  assert abs(np.exp(mixed) - np.exp(best)).max() > 0.02
  lost = value(best, ref, rewards, one, alpha) - value(
    mixed, ref, rewards, one, alpha
  )
  assert lost > 1e-3


# A bank of parameter sets, trained with the package's own mixing and loss. The
# policy is log-linear: response y has a place e_y in the plane, and
# log pi(y) = 2 beta theta e_y - beta |e_y|^2 + const prefers the response that
# is nearest to theta. It can say any of the four, but not every distribution.

PLACES = np.array([[-1, 0], [1, 0], [0, 1], [0, 0]], np.float32)
BETA = 4.0
START = np.array([0.0, -0.25], np.float32)  # the reference says the last most
ALPHA = 0.02
GRID = simplex_grid(2, 11)
VERTICES = np.eye(2, dtype=np.float32)[np.arange(11) % 2]
REWARDS = {
  # The best response of each reward is the other's worst, and a third one is
  # nearly as good at both. Between the first two lies the last, good at none.
  "opposed": [[1, 0], [0, 1], [0.8, 0.8], [0, 0]],
  "aligned": [[1, 0.8], [0, 0.2], [0.6, 0.7], [0, 0]],
}


def bank_logp(theta):
  """[..., 2] -> [..., 4] log-probabilities."""
  logits = 2 * BETA * theta @ PLACES.T - BETA * (PLACES**2).sum(1)[None]
  return jax.nn.log_softmax(logits)


@jax.jit
def train_bank(rewards, weights):
  """Exact REINFORCE at G weightings [G, 2]; returns the sets [2, 2]."""
  steerable = {"theta": True}
  params = conditioning.expand({"theta": jnp.asarray(START)}, steerable, 2)
  optimizer = optax.adam(3e-2)
  alpha = jnp.full([len(weights)], ALPHA)
  ref = bank_logp(START[None])

  def loss(params):
    mixed = conditioning.mix(params, steerable, coefficients(weights))
    logp = bank_logp(mixed["theta"])  # [G, K]
    raw = jnp.broadcast_to(rewards[None], (*logp.shape, 2))
    returns = reinforce.scalar_returns(raw, logp - ref, weights, alpha)
    probs = jnp.exp(logp)
    mean = (probs * returns).sum(1, keepdims=True)
    # The probability stands for how often a response is sampled.
    return reinforce.loss(
      logp[..., None],
      jnp.ones((*logp.shape, 1), bool),
      probs * (returns - mean),
    )

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  start = (params, optimizer.init(params))
  (params, _), _ = jax.lax.scan(step, start, None, length=1500)
  return params["theta"]


def regrets(rewards, theta):
  """[11]: what the mixed policy loses to the best of all distributions."""
  ref = np.asarray(bank_logp(START[None]))[0].astype(np.float64)
  logp = np.asarray(bank_logp(GRID @ theta), np.float64)
  return np.array(
    [
      value(optimum(ref, rewards, w, ALPHA), ref, rewards, w, ALPHA)
      - value(row, ref, rewards, w, ALPHA)
      for w, row in zip(GRID.astype(np.float64), logp, strict=True)
    ]
  )


@pytest.fixture(scope="module")
def banks():
  """(regrets of zero-shot averaging, of training over weightings) by rewards.

  At a vertex of the simplex a set's gradient comes from its own reward alone:
  training at the vertices is single-objective finetuning, whose average is a
  Rewarded Soup.
  """
  result = {}
  for name, rows in REWARDS.items():
    rewards = np.array(rows, np.float32)
    result[name] = tuple(
      regrets(rewards, np.asarray(train_bank(rewards, weights)))
      for weights in (VERTICES, GRID)
    )
  return result


def test_averaging_single_reward_optima_is_near_optimal_where_they_align(banks):
  zero_shot, _ = banks["aligned"]
  assert abs(zero_shot).max() < 2e-3


def test_averaging_fails_where_the_optima_do_not_align(banks):
  zero_shot, _ = banks["opposed"]
  assert max(zero_shot[0], zero_shot[-1]) < 2e-3  # each alone is optimal
  # Of 0.8: their average says the worthless response. As in docs/theory.md.
  assert zero_shot[5] == pytest.approx(0.541, abs=5e-3)
  assert zero_shot.mean() == pytest.approx(0.166, abs=2e-3)


def test_training_over_weightings_closes_the_gap(banks):
  zero_shot, trained = banks["opposed"]
  assert trained.max() < 0.01  # the ends have not paid for the middle
  assert trained.mean() < zero_shot.mean() / 100
  assert abs(banks["aligned"][1]).max() < 2e-3


# The trainer's gradients. With two tokens at most and four pieces, one of them
# the end, there are 13 responses, and their probabilities sum to 1.

T5 = dataclasses.replace(both_families.T5, vocab_size=4)
DECODER = dataclasses.replace(both_families.LISTED_DECODER, vocab_size=4)
EOS = 1
TEMPERATURE = 0.8
PROMPTS = np.array([[2, 3, EOS], [3, EOS, 0]], np.int32)  # of two weightings
WEIGHTS = np.array([[0.2, 0.8], [0.55, 0.45]], np.float32)
ALPHAS = np.array([0.3, 0.05], np.float32)


def all_responses(config, length):
  """(tokens [K, T], mask [K, T]) of every response."""
  rows = []
  for row in itertools.product(range(4), repeat=length):
    ended = [EOS in row[:t] for t in range(length)]
    if all(token == 0 for token, e in zip(row, ended, strict=True) if e):
      rows.append((row, [not e for e in ended]))
  tokens, mask = zip(*rows, strict=True)
  mask = np.array(mask)
  return np.where(mask, tokens, config.pad_id).astype(np.int32), mask


def token_logp(config, params, inputs, tokens, mask):
  """[K, T] log-probabilities under one model, written apart from decoding."""
  logits, _ = both_families.plain_scores(config, params, inputs)
  logp = jax.nn.log_softmax(logits / TEMPERATURE)
  return jnp.where(mask, both_families.picked(logp, tokens), 0)


class Enumerated:
  """A bank of three sets, its exact values and their gradient."""

  def __init__(self, config):
    self.config = config
    self.tokens, self.mask = all_responses(config, 2)
    self.prompts = both_families.with_padding(config, PROMPTS)
    by_prompt = [
      both_families.plain_inputs(
        config, np.tile(prompt[None], (len(self.tokens), 1)), self.tokens
      )
      for prompt in self.prompts
    ]
    inputs = jax.tree.map(lambda *x: np.stack(x), *by_prompt)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(families.build(config).init)
    self.reference = draw(keys[0])
    self.bank = Bank(config, "attention", num_sets=3)
    steerable = self.bank.steerable
    # Shared leaves are not quite the reference's, and sets are not alike.
    self.params = jax.tree.map(
      lambda steered, p, *sets: jnp.stack(sets) if steered else 1.1 * p,
      steerable,
      self.reference,
      *(draw(key) for key in keys[1:]),
    )
    self.coefficients = np.asarray(coefficients(WEIGHTS, ALPHAS))
    random = np.random.default_rng(0)
    # Of each prompt's every response; not integers, and no two alike.
    self.rewards = random.normal(size=(2, len(self.tokens), 2))
    scalar = np.einsum("gki,gi->gk", self.rewards, WEIGHTS)

    def value(params, coefficients, inputs, scalar, alpha):
      mixed = jax.tree.map(
        lambda s, p: jnp.einsum("m,m...->...", coefficients, p) if s else p,
        steerable,
        params,
      )
      logp, ref_logp = (
        token_logp(config, p, inputs, self.tokens, self.mask)
        for p in (mixed, self.reference)
      )
      kl = (logp - ref_logp).sum(-1)
      returns = (1 - alpha) * scalar - alpha * kl
      return (jnp.exp(logp.sum(-1)) * returns).sum(), logp, ref_logp

    def mean_value(params):
      values, logp, ref_logp = jax.vmap(value, (None, 0, 0, 0, 0))(
        params, self.coefficients, inputs, scalar, ALPHAS
      )
      return values.mean(), (logp, ref_logp)

    (_, (logp, ref_logp)), self.gradient = jax.jit(
      jax.value_and_grad(mean_value, has_aux=True)
    )(self.params)
    self.logp, self.ref_logp = np.asarray(logp), np.asarray(ref_logp)
    self.probs = np.exp(self.logp.sum(-1))  # [2, K]
    np.testing.assert_allclose(self.probs.sum(1), 1, rtol=1e-5)

  def experience(self, state, index, frequency):
    """What the trainer makes of a rollout, each response `frequency` times.

    All that the policy gradient uses of a response, the rewards and the
    log-ratio, is multiplied, so that a response that is there once counts as
    often as it would be sampled.

    Args:
      state: whose reward statistics are used.
      index: [R/2] numbers of responses, N = 13 or 2 a prompt, for both prompts.
      frequency: [2, R/2].
    """
    prompts = len(index) // (13 if len(index) == 13 else 2)
    rollout = Rollout(
      encoder_input_tokens=np.repeat(self.prompts, prompts, axis=0),
      tokens=np.tile(self.tokens[index], (2, 1)),
      mask=np.tile(self.mask[index], (2, 1)),
      logp=self.logp[:, index].reshape(-1, 2),
      ref_logp=self.ref_logp[:, index].reshape(-1, 2),
      weighting=Weighting(WEIGHTS, ALPHAS),
      coefficients=self.coefficients,
    )
    gathered = experience_lib.gather(
      state,
      rollout,
      jnp.asarray(self.rewards[:, index].reshape(-1, 2), jnp.float32),
      num_samples=len(index) // prompts,
      normalisation=(np.zeros(2, bool), np.zeros(2, bool)),
      scalarisation=Scalarisation(),
      adaptation=None,
    )
    often = jnp.asarray(frequency, jnp.float32)[..., None]
    return gathered.replace(
      rewards=often * gathered.rewards, kl=often * gathered.kl
    )

  def scorer(self, num_samples):
    return functools.partial(
      score_groups,
      self.bank,
      num_samples=num_samples,
      temperature=TEMPERATURE,
      allowed=None,
    )


@pytest.fixture(scope="module", params=[T5, DECODER], ids=["t5", "decoder"])
def exact(request):
  return Enumerated(request.param)


def trainer_gradient(exact, update, index, frequency, critic=None):
  """What an update subtracts from the parameters at rate 1, without clipping.

  Args:
    exact: the problem.
    update: (state, experience, optimizer, num_samples) -> state.
    index: see Enumerated.experience.
    frequency: likewise.
    critic: of the state.
  """
  optimizer = optax.sgd(optax.constant_schedule(1.0))
  state = init_state(
    exact.params, optimizer, jax.random.key(0), RewardStats.empty(2)
  ).replace(critic=critic)
  experience = exact.experience(state, index, frequency)
  num_samples = 13 if len(index) == 13 else 2
  new = jax.jit(functools.partial(update, optimizer, num_samples))(
    state, experience
  )
  return jax.tree.map(lambda a, b: a - b, exact.params, new.params)


def reinforce_update(exact, baseline):
  def update(optimizer, num_samples, state, experience):
    learn = Reinforce(
      score=exact.scorer(num_samples),
      optimizer=optimizer,
      baseline=baseline,
      num_samples=num_samples,
      microbatches=1,
    )
    return learn(state, experience, exact.reference)[0]

  return update


def assert_ascends(gradient, exact):
  """The trainer descends the loss, whose gradient is minus the value's."""

  def check(got, expected):
    np.testing.assert_allclose(got, -np.asarray(expected), atol=2e-6)

  jax.tree.map(check, gradient, exact.gradient)
  largest = max(
    abs(np.asarray(g)).max() for g in jax.tree.leaves(exact.gradient)
  )
  assert largest > 1e-2  # else the tolerance would say nothing


def test_reinforce_follows_the_exact_gradient_of_the_value(exact):
  assert len(exact.tokens) == 13
  update = reinforce_update(exact, "none")
  gradient = trainer_gradient(exact, update, np.arange(13), 13 * exact.probs)
  assert_ascends(gradient, exact)


def test_leave_one_out_does_not_bias_the_gradient(exact):
  """All pairs of responses, each as often as two samples give it."""
  pairs = np.array(list(itertools.product(range(13), repeat=2)))  # [169, 2]
  chance = exact.probs[:, pairs[:, 0]] * exact.probs[:, pairs[:, 1]]
  frequency = np.repeat(len(pairs) * chance, 2, axis=1)
  update = reinforce_update(exact, "leave_one_out")
  gradient = trainer_gradient(exact, update, pairs.reshape(-1), frequency)
  assert_ascends(gradient, exact)


def test_the_first_step_of_ppo_follows_the_exact_gradient(exact):
  """Every ratio is 1, and the critic's values are still 0."""
  settings = ppo.Settings(
    leave_one_out=False,
    epochs=1,
    minibatches=1,
    clip=0.2,
    value_clip=0.2,
    discount=1.0,
    gae_lambda=1.0,
    whiten=False,
    target_kl=0.01,
  )
  critic_optimizer = optax.sgd(optax.constant_schedule(0.1))
  critic_params = critic_lib.init_params(
    jax.random.key(5), exact.config.emb_dim, hidden=4, num_values=3
  )

  def update(optimizer, num_samples, state, experience):
    learn = ActorCritic(
      score=exact.scorer(num_samples),
      optimizer=optimizer,
      critic_optimizer=critic_optimizer,
      settings=settings,
      values_kl=True,
      num_samples=num_samples,
      microbatches=1,
      rows=sharding.row_sharding(sharding.make_mesh(1, 1, jax.devices()[:1])),
    )
    return learn(state, experience, exact.reference)[0]

  critic = critic_lib.CriticState(
    critic_params, critic_optimizer.init(critic_params)
  )
  gradient = trainer_gradient(
    exact, update, np.arange(13), 13 * exact.probs, critic
  )
  assert_ascends(gradient, exact)

"""Sampling: its log-probabilities, its distribution, its independence."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.extend.core import Literal, jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax.models import decoding, families, t5
from clp_jax.sampling import Sampling, choose_tokens

V = 37
V1_1 = t5.T5Config(
  vocab_size=V,
  emb_dim=12,
  num_heads=2,
  head_dim=8,
  num_encoder_layers=1,
  num_decoder_layers=2,
  mlp_dim=20,
  eos_ids=(1,),
)
V1_0 = dataclasses.replace(
  V1_1, mlp_activations=("relu",), logits_via_embedding=True
)
NO_END = dataclasses.replace(V1_1, eos_ids=())
ALLOWED = np.ones(V, bool)
ALLOWED[[0, 35, 36]] = False

# Compiling is most of these tests' time.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def random_params(config, seed=0):
  """Logits of a few nats, so that tokens differ much in probability."""
  abstract = t5.abstract_params(dataclasses.replace(config, scan_layers=False))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda leaf: np.asarray(
      (leaf.ndim == 1) + 0.4 * rng.standard_normal(leaf.shape), np.float32
    ),
    abstract,
  )
  # The end is likelier than other tokens, so that rows differ in length.
  if config.logits_via_embedding:
    params["decoder"]["decoder_norm"]["scale"] *= 4
    params["token_embedder"]["embedding"][1] *= 2
  else:
    params["decoder"]["logits_dense"]["kernel"][:, 1] *= 2
  return t5.stack_layers(params) if config.scan_layers else params


def ragged_source(prompts=3, seed=0):
  rng = np.random.default_rng(seed)
  source = rng.integers(2, 35, (prompts, 9))
  lengths = rng.integers(2, 10, prompts)
  return source * (np.arange(9) < lengths[:, None])


def row_keys(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


def sampling_of(config=V1_1, **settings):
  settings = {"allowed": ALLOWED, "eos_ids": config.eos_ids} | settings
  return Sampling(pad_id=config.pad_id, **settings)


def sampler(config, num_samples, **settings):
  return jit(
    functools.partial(
      decoding.sample,
      families.build(config),
      sampling=sampling_of(config, **settings),
      num_samples=num_samples,
      max_length=12,
    )
  )


@functools.cache
def plain_sampler():
  """Temperature as an argument, two samples a prompt; compiled once."""

  def sample(params, source, keys, temperature):
    return decoding.sample(
      families.build(V1_1),
      params,
      source,
      keys,
      sampling_of(temperature=temperature),
      max_length=12,
      num_samples=2,
    )

  return jit(sample)


class TestLogp:
  @pytest.mark.parametrize("scan_layers", (False, True), ids=("list", "scan"))
  @pytest.mark.parametrize("config", (V1_0, V1_1), ids=("v1_0", "v1_1"))
  def test_sampling_and_teacher_forcing_agree(self, config, scan_layers):
    only = config is V1_1  # of what may be drawn, there
    config = dataclasses.replace(config, scan_layers=scan_layers)
    params, source = random_params(config), ragged_source(4)
    samples = sampler(
      config,
      num_samples=3,
      temperature=0.8,
      top_k=25,
      top_p=0.95,
      logp_temperature=1.3,
      logp_of_allowed=only,
    )(params, source, row_keys(12))
    logp, entropy, _ = jit(
      functools.partial(
        decoding.score_tokens,
        families.build(config),
        num_samples=3,
        temperature=1.3,
        allowed=ALLOWED if only else None,
      )
    )(params, source, samples.tokens)

    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    lengths = mask.sum(-1)
    assert 1 < len(set(lengths)) and lengths.min() < 12
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()  # no gap
    np.testing.assert_array_equal(tokens[~mask], 0)
    np.testing.assert_array_equal(samples.logp[~mask], 0)
    for row, length in enumerate(lengths):
      ended = tokens[row, length - 1] == 1
      assert ended or length == 12
      assert (tokens[row, : length - 1] != 1).all()
    assert ALLOWED[tokens[mask]].all()
    np.testing.assert_allclose(samples.logp[mask], logp[mask], atol=1e-4)
    assert samples.logp[mask].std() > 0.1
    assert (entropy[mask] > 0).all() and (entropy < np.log(V)).all()

  @pytest.mark.parametrize("allowed", (None, ALLOWED), ids=("all", "some"))
  def test_logp_and_entropy_are_those_of_the_softmax(self, allowed):
    params, source = random_params(V1_1), ragged_source(2)
    tokens = np.random.default_rng(3).integers(0, V, (4, 5))
    if allowed is not None:
      tokens = np.where(allowed[tokens], tokens, 1)
    temperature = np.array([0.5, 1, 1.5, 2])
    logp, entropy, _ = jit(
      functools.partial(
        decoding.score_tokens,
        families.build(V1_1),
        num_samples=2,
        temperature=temperature,
        allowed=allowed,
      )
    )(params, source, tokens)
    targets = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    logits = jit(t5.T5(V1_1).apply)(
      {"params": params}, np.repeat(source, 2, axis=0), targets
    )
    logits = np.asarray(logits, np.float64) / temperature[:, None, None]
    if allowed is not None:
      logits = np.where(allowed, logits, -1e9)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(logp, expected, atol=1e-4)
    np.testing.assert_allclose(
      entropy, -(np.exp(log_probs) * log_probs).sum(-1), atol=1e-4
    )

  def test_casting_ahead_of_the_loop_changes_no_logit(self):
    config = dataclasses.replace(V1_1, dtype="bfloat16")
    params, source = random_params(config), ragged_source()
    model, tokens = families.build(config), np.array([3, 4, 5], np.int32)

    @jit
    def with_casts(params):
      step, cache = decoding.start(model, params, source, max_length=4)
      return step(tokens, cache, jnp.int32(0))[0]

    @jit
    def without(params):
      apply = functools.partial(t5.T5(config).apply, {"params": params})
      encoded = apply(source, method="encode")
      cross = apply(encoded, method="cross_keys_values")
      cache = t5.init_cache(config, 3, 4)
      assert cache[0].keys.dtype == jnp.bfloat16
      return apply(
        tokens, cache, jnp.int32(0), cross, source != 0, method="decode_step"
      )[0]

    np.testing.assert_array_equal(with_casts(params), without(params))


class TestGreedy:
  def test_zero_temperature_takes_the_best_allowed_token(self):
    params, source = random_params(V1_1, seed=3), ragged_source(4)
    samples = plain_sampler()(params, source, row_keys(8), 0.0)
    forward = jit(
      lambda target: t5.T5(V1_1).apply(
        {"params": params}, source, t5.shift_right(target)
      )
    )
    tokens = np.zeros((4, 12), np.int32)
    going = np.ones(4, bool)
    for t in range(12):
      logits = np.where(ALLOWED, forward(tokens)[:, t], -np.inf)
      tokens[:, t] = np.where(going, logits.argmax(-1), 0)
      going &= tokens[:, t] != 1
    np.testing.assert_array_equal(samples.tokens[::2], tokens)
    np.testing.assert_array_equal(samples.tokens[1::2], tokens)
    assert len(np.unique(tokens)) > 4

  def test_every_row_may_have_its_temperature(self):
    params, source = random_params(V1_1), ragged_source(4)
    temperature = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.float32)
    mixed = plain_sampler()(params, source, row_keys(8), temperature)
    cold = plain_sampler()(params, source, row_keys(8), 0.0)
    warm = plain_sampler()(params, source, row_keys(8), 1.0)
    np.testing.assert_array_equal(mixed.tokens[::2], cold.tokens[::2])
    np.testing.assert_array_equal(mixed.tokens[1::2], warm.tokens[1::2])
    assert not np.array_equal(cold.tokens[1::2], warm.tokens[1::2])

  def test_another_temperature_traces_nothing_again(self):
    traces = []

    @jax.jit
    def sample(temperature):
      traces.append(temperature)
      return decoding.sample_from(
        scripted(np.zeros((2, V))),
        (),
        row_keys(2),
        sampling_of(temperature=temperature),
        3,
      )

    for temperature in (1.0, 0.0, 0.3):
      sample(temperature)
    assert len(traces) == 1


def scripted(*logits):
  """next_logits that gives logits[t], or the last of them, at position t."""
  stack = jnp.asarray(np.stack(logits), jnp.float32)

  def next_logits(tokens, cache, position):
    del tokens
    return stack[jnp.minimum(position, len(logits) - 1)], cache

  return next_logits


choose_traced = jit(choose_tokens)
choose_static = jit(choose_tokens, static_argnames=("top_k", "top_p"))


def choose(logits, uniforms, *, allowed=None, temperature=1.0, **kwargs):
  logits = jnp.asarray(logits, jnp.float32)
  if allowed is None:
    allowed = np.ones(logits.shape[-1], bool)
  tokens = choose_static(
    logits,
    jnp.asarray(uniforms, jnp.float32),
    temperature=jnp.full(logits.shape[:1], temperature),
    allowed=jnp.asarray(allowed),
    **kwargs,
  )
  return np.asarray(tokens)


def kept(probs, top_k=None, top_p=None):
  """NumPy reference: what top-k, then top-p leave of a distribution."""
  order = np.argsort(-probs, kind="stable")
  keep = order if top_k is None else order[:top_k]
  total = probs[keep].sum()
  if top_p is not None:
    before = np.cumsum(probs[keep]) - probs[keep]
    keep = keep[before < top_p * total]
  left = np.zeros_like(probs)
  left[keep] = probs[keep]
  return left / left.sum()


class TestDistribution:
  @pytest.mark.parametrize(
    "kwargs",
    (
      {},
      {"temperature": 0.6},
      {"top_k": 9},
      {"top_p": 0.7},
      {"top_k": 30, "top_p": 0.8, "temperature": 1.4},
    ),
    ids=str,
  )
  def test_tokens_are_as_frequent_as_they_are_probable(self, kwargs):
    rows, vocab = 30_000, 300  # more than two blocks
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal(vocab)
    allowed = rng.random(vocab) < 0.9
    allowed[np.argsort(logits)[-2]] = False
    uniforms = jax.random.uniform(jax.random.key(1), (rows, 2))
    tokens = choose(
      np.tile(logits, (rows, 1)), uniforms, allowed=allowed, **kwargs
    )

    truncation = {k: kwargs[k] for k in ("top_k", "top_p") if k in kwargs}
    probs = np.where(
      allowed, np.exp(logits / kwargs.get("temperature", 1.0)), 0
    )
    probs = kept(probs / probs.sum(), **truncation)
    counts = np.bincount(tokens, minlength=vocab)
    assert (counts[probs == 0] == 0).all()
    often = probs * rows >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = rows * np.append(probs[often], probs[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert freedom > 3
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)

  def test_rows_are_drawn_one_by_one(self):
    logits = np.random.default_rng(0).standard_normal((6, 300)) * 3
    uniforms = np.random.default_rng(1).random((6, 2))
    together = choose(logits, uniforms, top_p=0.8)
    alone = [
      choose(logits[i : i + 1], uniforms[i : i + 1], top_p=0.8)[0]
      for i in range(6)
    ]
    np.testing.assert_array_equal(together, alone)
    assert len(set(alone)) > 1

  @pytest.mark.parametrize("kwargs", ({"top_k": 3}, {"top_p": 0.0099}))
  def test_of_equally_likely_tokens_the_first_ones_stay(self, kwargs):
    uniforms = np.random.default_rng(0).random((200, 2))
    tokens = choose(np.zeros((200, 300)), uniforms, **kwargs)
    assert set(tokens) == {0, 1, 2}

  def test_the_nucleus_always_holds_the_most_likely_token(self):
    logits = np.zeros((50, 300))
    logits[:, 211] = 9
    uniforms = np.random.default_rng(0).random((50, 2))
    assert set(choose(logits, uniforms, top_p=1e-6)) == {211}
    assert set(choose(logits, uniforms, top_p=1e-6, top_k=5)) == {211}

  def test_unlikely_tokens_are_told_apart(self):
    # Each has probability 1e-9: one random number of 24 bits could reach only
    # a few of them.
    logits = np.full((512, 256), np.log(1e-9))
    logits[:, 0] = 0
    uniforms = np.stack(
      [np.full(512, np.nextafter(np.float32(1), 0)), np.arange(512) / 512], -1
    )
    assert set(choose(logits, uniforms)) == set(range(128, 256))


# Traced values can be anything: what rounds to 0 or 1, overflows or is none.
TINY = (0.0, 1e-45, 1e-40, 1.2e-38, 1e-20)
HUGE = (1e3, 1e38, np.inf)
ODD = (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45)
temperatures = st.sampled_from((*TINY, *HUGE, 1.0, 0.7, np.nan, -1.0))
shares = st.sampled_from((*TINY, 0.5, 1 - 1e-7, 1.0, np.nan))


@st.composite
def draws(draw):
  """Arguments of choose_tokens: 4 rows, few vocabularies (each compiles)."""
  vocab = draw(st.sampled_from((3, 266)))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  allowed = rng.random(vocab) < draw(st.sampled_from((0.0, 0.1, 0.9)))
  allowed[rng.integers(vocab)] = True
  logits = rng.standard_normal((4, vocab))
  logits *= draw(st.sampled_from((0.0, 1.0, 1e4, 1e38)))
  odd = rng.random(logits.shape) < draw(st.sampled_from((0.0, 0.02, 1.0)))
  logits[odd] = draw(st.sampled_from(ODD))
  more = draw(st.sampled_from((0.0, 50.0, 3e38, np.inf)))
  with np.errstate(over="ignore", invalid="ignore"):
    logits[:, ~allowed] += more
    logits = logits.astype(np.float32)
  edge = np.nextafter(np.float32(1), 0)
  of_rows = functools.partial(st.lists, min_size=4, max_size=4)
  return {
    "logits": logits,
    "uniforms": draw(
      of_rows(st.tuples(*2 * [st.sampled_from((0.0, 1e-45, 0.5, edge))]))
    ),
    "temperature": draw(of_rows(temperatures)),
    "allowed": allowed,
    "top_k": draw(of_rows(st.sampled_from((0, 1, 2, vocab, 2**24)))),
    "top_p": draw(of_rows(shares)),
  }


class TestForbiddenTokens:
  @hypothesis.given(draws())
  @hypothesis.settings(max_examples=300)
  def test_are_never_drawn_whatever_is_traced(self, drawn):
    arrays = {
      name: jnp.asarray(value, bool if name == "allowed" else jnp.float32)
      for name, value in drawn.items()
    }
    tokens = np.asarray(choose_traced(**arrays))
    assert drawn["allowed"][tokens].all(), tokens
    best = np.where(drawn["allowed"], drawn["logits"], -np.inf).max(-1)
    cold = np.asarray(drawn["temperature"]) < 1e-38
    cold &= np.isfinite(best)
    taken = drawn["logits"][np.arange(4), tokens]
    np.testing.assert_array_equal(taken[cold], best[cold])

  uniforms = np.stack(
    # 1 is out of range, and stands for a product that was rounded up to it.
    np.meshgrid([0, 0.3, np.nextafter(np.float32(1), 0), 1], [0, 0.6, 1]),
    axis=-1,
  ).reshape(-1, 2)

  @pytest.mark.parametrize(
    "kwargs", ({}, {"top_k": 40}, {"top_p": 0.999}, {"temperature": 0.0})
  )
  def test_are_never_drawn_whatever_their_logits(self, kwargs):
    rng = np.random.default_rng(0)
    for _ in range(5):
      allowed = rng.random(400) < 0.02
      allowed[rng.integers(400)] = True
      logits = rng.standard_normal((len(self.uniforms), 400))
      logits[:, ~allowed] += 50
      tokens = choose(logits, self.uniforms, allowed=allowed, **kwargs)
      assert allowed[tokens].all()

  def test_tokens_whose_probability_underflows_are_not_drawn(self):
    logits = np.full((len(self.uniforms), 400), -200.0)
    logits[:, 130] = 0
    logits[:, 131] = -90  # would be a subnormal number
    assert set(choose(logits, self.uniforms)) == {130}

  def test_rounding_lets_none_through_however_sums_are_made(self):
    # Sums made in parallel differ from one another by rounding, so that a
    # later prefix can be the smaller one. Here all of them are far off.
    allowed = np.arange(300) % 2 == 1
    uniforms = np.random.default_rng(0).random((200, 2), np.float32)
    arguments = (jnp.zeros((200, 300)), jnp.asarray(uniforms))
    jaxpr = jax.make_jaxpr(
      lambda logits, uniforms: choose_tokens(
        logits,
        uniforms,
        temperature=jnp.ones(200),
        allowed=jnp.asarray(allowed),
      )
    )(*arguments)
    roughened = []
    (tokens,) = run_roughly(jaxpr.jaxpr, jaxpr.consts, arguments, roughened)
    assert len(roughened) >= 2, "no sums that this test knows: add theirs"
    assert allowed[tokens].all()
    assert len(np.unique(tokens)) > 3


# Primitives that sums can be made of, prefix sums by all ways among them.
SUMS = {
  *("add", "add_any", "cumsum", "cumlogsumexp", "dot_general"),
  *("reduce_sum", "reduce_window", "reduce_window_sum", "scan", "while"),
}


def run_roughly(jaxpr, consts, arguments, roughened):
  """Evaluates a jaxpr whose sums of floats come out 30% too large or small,
  in turns along the last axis; notes their primitives."""
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, arguments, strict=True))

  def read(variable):
    return variable.val if isinstance(variable, Literal) else values[variable]

  for eqn in jaxpr.eqns:
    given = [read(variable) for variable in eqn.invars]
    inner = list(jaxprs_in_params(eqn.params))
    if eqn.primitive.name in ("jit", "pjit", "custom_jvp_call"):
      (called,) = inner
      results = run_roughly(called, (), given, roughened)
    else:
      results = eqn.primitive.bind(*given, **eqn.params)
      results = results if eqn.primitive.multiple_results else [results]
    if eqn.primitive.name in SUMS:
      roughened.append(eqn.primitive.name)
      results = [roughly(result) for result in results]
    values |= dict(zip(eqn.outvars, results, strict=True))
  return [read(variable) for variable in jaxpr.outvars]


def roughly(x):
  if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
    return x
  turns = 1 - 2 * (jnp.arange(x.shape[-1]) % 2)
  return x * (1 + 0.3 * turns).reshape((1,) * (x.ndim - 1) + (-1,))


class TestRows:
  def test_a_row_does_not_depend_on_the_rows_beside_it(self):
    params, source, keys = random_params(V1_1), ragged_source(4), row_keys(8)
    batch = plain_sampler()(params, source, keys, 1.0)
    others = ragged_source(4, seed=9)
    others[2] = source[1]
    other_keys = row_keys(8, seed=9).at[4:6].set(keys[2:4])
    again = plain_sampler()(params, others, other_keys, 1.0)
    np.testing.assert_array_equal(again.tokens[4:6], batch.tokens[2:4])
    np.testing.assert_allclose(again.logp[4:6], batch.logp[2:4], atol=1e-5)
    assert not np.array_equal(batch.tokens[2], batch.tokens[3])

  def test_devices_do_not_change_the_samples(self):
    params, source, keys = random_params(V1_1), ragged_source(8), row_keys(16)
    mesh = Mesh(
      np.array(jax.devices()),
      ("data",),
      axis_types=(jax.sharding.AxisType.Auto,),
    )
    cut = NamedSharding(mesh, PartitionSpec("data"))
    one = plain_sampler()(params, source, keys, 1.0)
    many = plain_sampler()(
      params, jax.device_put(source, cut), jax.device_put(keys, cut), 1.0
    )
    assert len(many.tokens.sharding.device_set) == len(jax.devices()) == 8
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.logp, one.logp, atol=1e-5)

  def test_a_row_that_reaches_the_length_has_no_end(self):
    logits = np.zeros((2, V))
    logits[:, 1] = [-1e9, 1e9]
    samples = decoding.sample_from(
      scripted(np.eye(V)[[5, 6]] * 50, logits),
      (),
      row_keys(2),
      sampling_of(),
      4,
    )
    assert samples.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert samples.tokens[:, 0].tolist() == [5, 6]
    assert samples.tokens[1].tolist() == [6, 1, 0, 0]
    assert (samples.tokens[0] != 1).all()

  @pytest.mark.parametrize("eos_ids", ((2,), (5,), (9, 2)), ids=str)
  def test_the_first_end_ends_a_row_whichever_it_is(self, eos_ids):
    logits = np.zeros((12, 200, V))
    logits[..., [1, 2, 5, 9]] = 3
    samples = decoding.sample_from(
      scripted(*logits),
      (),
      row_keys(200),
      sampling_of(eos_ids=eos_ids),
      12,
    )
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    ends = np.isin(tokens, eos_ids) & mask
    np.testing.assert_array_equal(mask, np.cumsum(ends, axis=1) - ends == 0)
    np.testing.assert_array_equal(tokens > 0, mask)
    assert {*tokens[ends].tolist()} == {*eos_ids}
    assert 1 < len(np.unique(mask.sum(-1))) and not mask.all()
    assert {1, 2, 5, 9} - {*eos_ids} <= {*tokens[mask & ~ends].tolist()}

  def test_the_last_token_and_the_cache_are_handed_on(self):
    def next_logits(tokens, cache, position):
      # Says its position plus what it was told, and remembers all it heard.
      cache = cache.at[:, position].set(tokens)
      return 100 * jax.nn.one_hot(tokens + position + 2, V), cache

    samples = decoding.sample_from(
      next_logits,
      jnp.zeros((1, 4), jnp.int32),
      row_keys(1),
      sampling_of(),
      4,
    )
    assert samples.tokens[0].tolist() == [2, 5, 9, 14]


class TestEarlyStop:
  def counted(self, logits, steps):
    """scripted(...), which notes every position that is computed."""
    next_logits = scripted(*logits)

    def count(tokens, cache, position):
      io_callback(lambda p: steps.append(int(p)), None, position)
      return next_logits(tokens, cache, position)

    return count

  def rows_ending_at(self, *ends):
    """Scripted logits; row r ends at position ends[r]."""
    logits = np.zeros((max(ends) + 1, len(ends), V))
    logits[..., 1] = -100
    for row, end in enumerate(ends):
      logits[end, row, 1] = 100
    return logits

  def test_the_loop_ends_with_the_last_row(self):
    steps = []
    samples = decoding.sample_from(
      self.counted(self.rows_ending_at(2, 4, 0), steps),
      (),
      row_keys(3),
      sampling_of(),
      50,
    )
    jax.block_until_ready(samples)
    assert steps == [0, 1, 2, 3, 4]
    assert samples.mask.sum(-1).tolist() == [3, 5, 1]

  def test_under_vmap_it_ends_with_the_last_row_of_all(self):
    steps = []
    logits = self.rows_ending_at(1, 3)

    def sample(row, keys):
      return decoding.sample_from(
        self.counted(logits[:, [row]], steps),
        (),
        keys,
        sampling_of(),
        50,
      )

    def batched(logits, keys):
      def next_logits(tokens, cache, position):
        io_callback(lambda p: steps.append(int(p)), None, position)
        last = jnp.minimum(position, len(logits) - 1)
        return logits[last], cache

      return decoding.sample_from(next_logits, (), keys, sampling_of(), 50)

    keys = row_keys(2)[:, None]
    together = jax.vmap(batched)(
      jnp.asarray(np.swapaxes(logits, 0, 1)[:, :, None], jnp.float32), keys
    )
    jax.block_until_ready(together)
    assert steps == [0, 1, 2, 3]
    for row in range(2):
      alone = sample(row, keys[row])
      jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda x, row=row: x[row], together),
        alone,
      )


class TestGroups:
  def test_groups_are_answered_by_their_own_parameters(self):
    sets = [random_params(V1_1, seed) for seed in (0, 5)]
    source, keys = ragged_source(8), row_keys(16)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)
    # One shared leaf, as the objectives' sets have them.
    table = stacked["token_embedder"]["embedding"][0]
    stacked["token_embedder"]["embedding"] = table
    sets[1]["token_embedder"]["embedding"] = table
    axes = jax.tree.map(lambda _: 0, stacked)
    axes["token_embedder"]["embedding"] = None

    def groups(params):
      return decoding.sample_groups(
        families.build(V1_1),
        params,
        axes,
        source,
        keys,
        sampling_of(),
        num_groups=2,
        num_samples=2,
        max_length=12,
      )

    together = jit(groups)(stacked)
    for g, params in enumerate(sets):
      rows = slice(8 * g, 8 * (g + 1))
      alone = plain_sampler()(params, source[4 * g :][:4], keys[rows], 1.0)
      np.testing.assert_array_equal(together.tokens[rows], alone.tokens)
      np.testing.assert_array_equal(together.mask[rows], alone.mask)
      np.testing.assert_allclose(together.logp[rows], alone.logp, atol=1e-5)
    # Holding back groups that are done would copy the cache at every step.
    assert cache_selects(jax.make_jaxpr(groups)(stacked)) == 0

  def test_groups_that_do_not_fit_are_an_error(self):
    with pytest.raises(ValueError, match="3 prompts .* num_groups = 2"):
      decoding.sample_groups(
        families.build(V1_1),
        {},
        0,
        ragged_source(3),
        row_keys(3),
        sampling_of(),
        num_groups=2,
        max_length=4,
      )


def cache_selects(jaxpr):
  """Selects in all of a jaxpr whose result is shaped like the groups' cache."""
  count = 0
  for eqn in jaxpr.eqns:
    shapes = [v.aval.shape for v in eqn.outvars]
    count += eqn.primitive.name == "select_n" and (2, 8, 2, 12, 8) in shapes
    for inner in jaxprs_in_params(eqn.params):
      count += cache_selects(inner)
  return count


class TestErrors:
  def sample(self, **kwargs):
    arguments = {
      "keys": row_keys(6),
      "num_samples": 2,
      "max_length": 3,
      "model": families.build(V1_1),
    }
    arguments = {k: kwargs.pop(k, value) for k, value in arguments.items()}
    keys, model = arguments.pop("keys"), arguments.pop("model")
    # Shapes alone decide, except for what is checked of numbers.
    return jax.eval_shape(
      lambda params: decoding.sample(
        model,
        params,
        ragged_source(3),
        keys,
        sampling_of(model.config, **kwargs),
        **arguments,
      ),
      t5.abstract_params(V1_1),
    )

  @pytest.mark.parametrize(
    "kwargs, message",
    (
      ({"num_samples": 3}, r"each of the 9 rows .* got shape \(6,\)"),
      ({"keys": np.zeros((6, 2), np.uint32)}, "typed keys .* got uint32"),
      ({"max_length": 0}, "max_length must be at least 1, got 0"),
      ({"top_k": 0}, "top_k must be at least 1, or None, got 0"),
      ({"top_p": 0.0}, r"top_p must be in \(0, 1\], or None, got 0.0"),
      ({"top_p": 1.5}, r"top_p must be in \(0, 1\], or None, got 1.5"),
      ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
      ({"temperature": np.ones(2)}, r"each of the 6 rows, got shape \(2,\)"),
      ({"logp_temperature": 0}, "logp_temperature must be positive, got 0"),
      ({"allowed": ALLOWED[:5]}, r"vocabulary, \(37,\), got \(5,\)"),
      ({"allowed": np.arange(V) > 1}, r"include the end of sequence, \(1,\)"),
      ({"allowed": np.ones(V, bool)}, "exclude padding, 0"),
      (
        {"model": families.build(NO_END)},
        "nothing ends a response: give eos_ids",
      ),
    ),
  )
  def test_sampling_says_what_does_not_fit(self, kwargs, message):
    with pytest.raises(ValueError, match=message):
      self.sample(**kwargs)

  @pytest.mark.parametrize(
    "kwargs, message",
    (
      ({"num_samples": 1}, "3 prompts . num_samples = 1 rows, got 6"),
      ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ),
  )
  def test_scoring_says_what_does_not_fit(self, kwargs, message):
    with pytest.raises(ValueError, match=message):
      decoding.score_tokens(
        families.build(V1_1),
        {},
        ragged_source(3),
        np.ones((6, 4), int),
        **{"num_samples": 2} | kwargs,
      )

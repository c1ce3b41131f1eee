"""The T5 network: parity, padding, scanned layers, the parameter tree."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from clp_jax import sharding
from clp_jax.models import attention, decoding, families, layers, t5
from clp_jax.models.presets import PRESETS
from clp_jax.sampling import Sampling

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

V1_1 = t5.T5Config(
  vocab_size=41,
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
# Compiling is most of these tests' time.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def parity_config(version):
  return dataclasses.replace(
    {"v1_0": V1_0, "v1_1": V1_1}[version],
    vocab_size=100,
    emb_dim=20,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=3,
    mlp_dim=28,
  )


@functools.cache
def random_params(config):
  """Unlike at initialisation, no scale is 1 and no two heads are alike."""
  abstract = t5.abstract_params(dataclasses.replace(config, scan_layers=False))
  leaves, structure = jax.tree.flatten(abstract)
  rng = np.random.default_rng(0)
  params = jax.tree.unflatten(
    structure,
    [
      jnp.asarray(0.4 + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)
      if leaf.ndim == 1
      else jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32)
      for leaf in leaves
    ],
  )
  return t5.stack_layers(params) if config.scan_layers else params


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(1, V1_1.vocab_size, shape)


def ragged_source():
  source = random_tokens(3, 11)
  source[1, 7:] = 0
  source[2, 2:] = 0
  return source


@functools.partial(jit, static_argnums=0)
def logits_of(config, params, source, target, encoder_mask=None):
  return t5.T5(config).apply({"params": params}, source, target, encoder_mask)


def paths(tree, **kwargs):
  return traverse_util.flatten_dict(tree, sep="/", **kwargs)


class TestParity:
  @pytest.mark.parametrize("version", ("v1_0", "v1_1"))
  def test_logits_and_greedy_tokens_are_those_of_transformers(self, version):
    case = np.load(FIXTURES / f"transformers_{version}.npz")
    config = parity_config(version)
    flat = {k.removeprefix("params/"): case[k] for k in case if "params/" in k}
    params = traverse_util.unflatten_dict(flat, sep="/")
    shapes = jax.tree.map(lambda x: x.shape, t5.abstract_params(config))
    assert jax.tree.map(jnp.shape, params) == shapes
    source, target = case["encoder_input_tokens"], case["decoder_input_tokens"]
    assert (source != 0).sum(-1).max() > config.relative_attention_max_distance

    logits = logits_of(config, params, source, target)
    np.testing.assert_allclose(
      logits[:, case["positions"]], case["logits"], atol=1e-4
    )

    length = case["greedy"].shape[1]
    ends = (case["greedy"] != 0).sum(-1)
    assert ends.min() < length == ends.max()
    samples = jit(
      functools.partial(
        decoding.sample,
        families.build(config),
        sampling=Sampling(
          case["allowed"], config.eos_ids, config.pad_id, temperature=0.0
        ),
        max_length=length,
      )
    )(params, source, jax.random.split(jax.random.key(0), len(source)))
    np.testing.assert_array_equal(samples.tokens, case["greedy"])


class TestRelativePositions:
  def test_encoder_buckets_are_those_of_t5(self):
    firsts = {8: 8, 9: 12, 10: 16, 11: 23, 12: 32, 13: 46, 14: 64, 15: 91}
    firsts |= {i: i for i in range(8)}
    distance = np.arange(0, 300)
    expected = np.searchsorted(
      [firsts[i] for i in range(16)], distance, "right"
    )
    buckets = functools.partial(
      t5.relative_position_buckets, bidirectional=True
    )
    np.testing.assert_array_equal(buckets(distance), expected - 1)
    np.testing.assert_array_equal(buckets(-distance[1:]), expected[1:] + 15)

  def test_decoder_buckets_are_those_of_t5(self):
    buckets = t5.relative_position_buckets(
      np.arange(-3, 300), bidirectional=False
    )
    np.testing.assert_array_equal(buckets[:4], 0)
    np.testing.assert_array_equal(buckets[3 : 3 + 17], np.arange(17))
    assert buckets[3 + 112] == 30 and buckets[3 + 113] == 31
    assert (np.diff(buckets[3:]) >= 0).all() and buckets.max() == 31


class TestMasking:
  def test_what_stands_in_masked_positions_does_not_matter(self):
    params, target = random_params(V1_1), random_tokens(3, 5, seed=1)
    source = ragged_source()
    expected = logits_of(V1_1, params, source, target)
    other = np.where(source == 0, random_tokens(3, 11, seed=2), source)
    actual = logits_of(V1_1, params, other, target, source != 0)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    # It would matter, were it not masked.
    assert abs(logits_of(V1_1, params, other, target) - expected).max() > 1e-2

  def test_more_padding_does_not_matter(self):
    params, target = random_params(V1_0), random_tokens(3, 5, seed=1)
    source = ragged_source()
    expected = logits_of(V1_0, params, source, target)
    longer = np.pad(source, ((0, 0), (0, 6)))
    later = np.pad(target, ((0, 0), (0, 4)), constant_values=3)
    actual = logits_of(V1_0, params, longer, later)[:, :5]
    np.testing.assert_allclose(actual, expected, atol=1e-5)

  def test_a_mask_overrides_the_padding_id(self):
    params, target = random_params(V1_1), random_tokens(3, 5, seed=1)
    source = ragged_source()
    default = logits_of(V1_1, params, source, target)
    everything = logits_of(
      V1_1, params, source, target, np.ones_like(source, bool)
    )
    np.testing.assert_allclose(everything[0], default[0], atol=1e-5)
    assert abs(everything[1:] - default[1:]).max(axis=(1, 2)).min() > 1e-3

  def test_a_prompt_of_padding_only_gives_finite_logits(self):
    logits = logits_of(
      V1_1, random_params(V1_1), np.zeros((1, 11), int), random_tokens(1, 5)
    )
    assert np.isfinite(logits).all()

  def test_a_mask_of_another_shape_is_an_error(self):
    with pytest.raises(ValueError, match=r"\(3, 11\), got \(3, 4\)"):
      logits_of(
        V1_1,
        random_params(V1_1),
        ragged_source(),
        random_tokens(3, 5),
        np.ones((3, 4), bool),
      )

  def test_an_id_outside_of_the_vocabulary_is_not_taken_for_another(self):
    source = ragged_source()
    source[1, 1] = V1_1.vocab_size
    logits = logits_of(V1_1, random_params(V1_1), source, random_tokens(3, 5))
    assert np.isnan(logits[1]).all() and np.isfinite(logits[0]).all()


class TestSamplesOfAPrompt:
  def test_rows_share_their_prompt(self):
    params, source = random_params(V1_1), ragged_source()
    target = random_tokens(6, 5, seed=1)
    shared = logits_of(V1_1, params, source, target)
    repeated = logits_of(V1_1, params, np.repeat(source, 2, axis=0), target)
    np.testing.assert_allclose(shared, repeated, atol=1e-5)

  def test_rows_that_are_no_multiple_of_the_prompts_are_an_error(self):
    with pytest.raises(ValueError, match="4 rows .* multiple of the 3"):
      logits_of(V1_1, random_params(V1_1), ragged_source(), random_tokens(4, 5))


class TestManyQueries:
  def arguments(self, batch=2, heads=3, queries=150, keys=7, width=4):
    rng = np.random.default_rng(0)

    def array(*shape):
      return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    query = array(batch, heads, queries, width)
    rest = [array(batch, heads, keys, width) for _ in range(2)]
    mask = np.arange(keys) < np.asarray([keys, 3])[:, None]
    bias = array(1, heads, queries, keys)
    return query, *rest, mask[:, None, None], bias

  @pytest.mark.parametrize("has_bias", [True, False])
  def test_blocks_of_queries_give_the_same_attention_and_gradients(
    self, has_bias, monkeypatch
  ):
    """Whole blocks and a rest, ragged keys."""
    query, keys, values, mask, bias = self.arguments()

    def results(many, size):
      monkeypatch.setattr(attention, "MANY_QUERIES", many)
      monkeypatch.setattr(attention, "QUERIES", size)

      def value(query, keys, values, bias):
        attended = layers.attend(
          query, keys, values, mask, bias if has_bias else None
        )
        return jnp.sin(attended).sum(), attended

      gradient = jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True)
      (_, attended), gradients = jit(gradient)(query, keys, values, bias)
      return attended, *gradients

    for whole, cut in zip(results(999, 1), results(150, 64), strict=True):
      assert np.abs(whole).max() > 0.1 or not has_bias
      np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)

  def test_logits_of_all_queries_are_never_there_at_once(self, monkeypatch):
    query, keys, values, _, _ = self.arguments(1, 1, queries=1024, keys=512)

    def memory(many):
      monkeypatch.setattr(attention, "MANY_QUERIES", many)

      def value(*arrays):
        mask = np.ones([1, 1, 1, 512], bool)
        return layers.attend(*arrays, mask, None).sum()

      gradient = jit(jax.grad(value, argnums=(0, 1, 2)))
      compiled = gradient.lower(query, keys, values).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    assert memory(256) < 1024 * 512 * 4 < memory(9999)


class TestScannedLayers:
  @pytest.mark.parametrize(
    "config, remat", ((V1_0, "full"), (V1_1, "minimal")), ids=("v1_0", "v1_1")
  )
  def test_logits_and_gradients_are_those_of_a_list_of_layers(
    self, config, remat
  ):
    source, target = ragged_source(), random_tokens(6, 5, seed=1)

    def gradient(config, params):
      def loss(params):
        logits = t5.T5(config).apply({"params": params}, source, target)
        return -jax.nn.log_softmax(logits)[..., 5].mean(), logits

      grads, logits = jit(jax.grad(loss, has_aux=True))(params)
      return logits, grads

    params = random_params(config)
    expected_logits, expected = gradient(config, params)
    assert min(abs(g).max() for g in jax.tree.leaves(expected)) > 1e-6
    scanned = dataclasses.replace(config, scan_layers=True, remat=remat)
    logits, actual = gradient(scanned, t5.stack_layers(params))
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5)
    jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5, rtol=1e-4),
      t5.unstack_layers(actual),
      expected,
    )

  def test_remat_computes_more_again_the_less_it_saves(self):
    source, target = ragged_source(), random_tokens(3, 5, seed=1)

    def products(remat):
      config = dataclasses.replace(V1_1, remat=remat)

      def loss(params):
        return t5.T5(config).apply({"params": params}, source, target).sum()

      # As in training: several parameter sets at once.
      sets = jax.tree.map(lambda p: jnp.stack([p, p]), random_params(V1_1))
      jaxpr = jax.make_jaxpr(jax.vmap(jax.grad(loss)))(sets)
      return str(jaxpr).count("dot_general")

    none, minimal, full = map(products, layers.REMAT)
    # "minimal" saves the linear maps: what it computes again are the 2 products
    # of the encoder layer's attention and the 4 of each decoder layer's.
    attention_products = 2 + 2 * 4
    assert none < minimal <= none + attention_products < full

  def test_stacking_and_unstacking_changes_no_bit(self):
    params = random_params(V1_1)
    stacked = t5.stack_layers(params)
    kernels = stacked["decoder"]["layers"]["mlp"]["wi_1"]["kernel"]
    assert kernels.shape == (2, 12, 20)
    back = t5.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)

  def test_layers_are_stacked_in_the_order_of_their_numbers(self):
    params = {
      "encoder": {f"layers_{i}": {"w": np.full(2, i)} for i in range(12)}
    }
    stacked = t5.stack_layers(params)["encoder"]["layers"]["w"]
    np.testing.assert_array_equal(stacked[:, 0], np.arange(12))
    assert isinstance(stacked, np.ndarray)  # on the host, as it was


class TestParameters:
  def test_names_and_axes_are_those_of_t5x(self):
    attention = {
      "query/kernel": ("embed", "joined_kv"),
      "key/kernel": ("embed", "joined_kv"),
      "value/kernel": ("embed", "joined_kv"),
      "out/kernel": ("joined_kv", "embed"),
    }
    mlp = {
      "mlp/wi_0/kernel": ("embed", "mlp"),
      "mlp/wi_1/kernel": ("embed", "mlp"),
      "mlp/wo/kernel": ("mlp", "embed"),
      "pre_mlp_layer_norm/scale": ("embed",),
    }
    encoder = {f"attention/{k}": v for k, v in attention.items()} | mlp
    encoder["pre_attention_layer_norm/scale"] = ("embed",)
    decoder = {f"self_attention/{k}": v for k, v in attention.items()} | mlp
    decoder |= {
      f"encoder_decoder_attention/{k}": attention[k] for k in attention
    }
    decoder["pre_self_attention_layer_norm/scale"] = ("embed",)
    decoder["pre_cross_attention_layer_norm/scale"] = ("embed",)
    expected = {
      "token_embedder/embedding": ("vocab", "embed"),
      "encoder/relpos_bias/rel_embedding": ("heads", "relpos_buckets"),
      "decoder/relpos_bias/rel_embedding": ("heads", "relpos_buckets"),
      "encoder/encoder_norm/scale": ("embed",),
      "decoder/decoder_norm/scale": ("embed",),
      "decoder/logits_dense/kernel": ("embed", "vocab"),
    }
    for stack, part, number in (
      ("encoder", encoder, 1),
      ("decoder", decoder, 2),
    ):
      for i in range(number):
        expected |= {f"{stack}/layers_{i}/{k}": v for k, v in part.items()}
    assert paths(t5.logical_axes(V1_1)) == expected
    v1_0 = paths(t5.logical_axes(V1_0))
    assert "decoder/logits_dense/kernel" not in v1_0
    assert v1_0["encoder/layers_0/mlp/wi/kernel"] == ("embed", "mlp")
    assert "encoder/layers_0/mlp/wi_0/kernel" not in v1_0

  @pytest.mark.parametrize("scan_layers", (False, True))
  def test_every_array_has_its_shape_and_as_many_axes(self, scan_layers):
    config = dataclasses.replace(V1_1, scan_layers=scan_layers)
    abstract = paths(t5.abstract_params(config))
    axes = paths(t5.logical_axes(config))
    params = paths(random_params(config))
    assert set(abstract) == set(axes) == set(params)
    for name, leaf in abstract.items():
      assert leaf.dtype == jnp.float32
      assert leaf.shape == params[name].shape
      assert len(axes[name]) == leaf.ndim
      assert ("/layers/" in name) == (axes[name][0] == "layers")
      assert "layers" not in axes[name][1:]

  def test_an_array_of_another_shape_is_an_error(self):
    params, tokens = t5.abstract_params(V1_1), jnp.zeros([1, 1], jnp.int32)
    kernel = jnp.zeros(params["decoder"]["logits_dense"]["kernel"].shape)
    params["decoder"]["logits_dense"]["kernel"] = kernel[1:]
    with pytest.raises(ValueError, match="decoder/logits_dense/kernel has the"):
      jax.eval_shape(
        lambda p: t5.T5(V1_1).apply({"params": p}, tokens, tokens), params
      )

  def test_initial_values_are_distributed_as_those_of_t5x(self):
    config = dataclasses.replace(V1_1, vocab_size=400, emb_dim=200, num_heads=9)
    key = jax.random.key(1)
    tree = jit(functools.partial(t5.init_params, config))(key)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    abstract = t5.abstract_params(config)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    params = paths(tree)
    layer = "decoder/layers_1"
    deviations = {
      "token_embedder/embedding": 1,
      f"{layer}/self_attention/query/kernel": (200 * 8) ** -0.5,
      f"{layer}/self_attention/key/kernel": 200**-0.5,
      f"{layer}/encoder_decoder_attention/out/kernel": 72**-0.5,
      f"{layer}/mlp/wi_0/kernel": 200**-0.5,
      f"{layer}/mlp/wo/kernel": 20**-0.5,
      "decoder/logits_dense/kernel": 200**-0.5,
    }
    for name, deviation in deviations.items():
      assert abs(params[name].std() / deviation - 1) < 0.05, name
      other = params[name.replace("layers_1", "layers_0")]
      assert "layers" not in name or (other != params[name]).any()
    assert (params[f"{layer}/pre_mlp_layer_norm/scale"] == 1).all()

  @pytest.mark.parametrize(
    "name, count",
    (
      ("small", 76_961_152),
      ("base", 247_577_856),
      ("large", 783_150_080),
      ("xl", 2_849_757_184),
      ("xxl", 11_135_332_352),
    ),
  )
  def test_presets_have_as_many_parameters_as_the_published_models(
    self, name, count
  ):
    config = dataclasses.replace(PRESETS[name], scan_layers=True)
    leaves = jax.tree.leaves(t5.abstract_params(config))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count

  def test_tiny_takes_the_vocabulary_of_its_caller(self):
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=242)
    embedding = t5.abstract_params(config)["token_embedder"]["embedding"]
    assert embedding.shape == (242, 64)

  def test_activations_follow_the_rules_of_the_mesh(self):
    mesh = sharding.make_mesh(4, 2)
    source, target = random_tokens(4, 6), random_tokens(4, 4)
    params = random_params(V1_1)
    expected = logits_of(V1_1, params, source, target)

    def run(params):
      return t5.T5(V1_1).apply({"params": params}, source, target)

    assert "sharding_constraint" not in jit(run).lower(params).as_text()
    pinned = jit(sharding.on_mesh(mesh, run))
    assert "sharding_constraint" in pinned.lower(params).as_text()
    np.testing.assert_allclose(pinned(params), expected, atol=1e-5)


class TestPrecisionAndDropout:
  def test_bfloat16_computes_float32_logits_near_those_of_float32(self):
    config = dataclasses.replace(V1_1, dtype="bfloat16")
    params = jax.tree.map(lambda p: 0.5 * p, random_params(V1_1))
    source, target = ragged_source(), random_tokens(3, 5, seed=1)
    logits = logits_of(config, params, source, target)
    expected = logits_of(V1_1, params, source, target)
    assert logits.dtype == jnp.float32
    assert 1e-5 < abs(logits - expected).max() < 0.1

  def test_dropout_is_off_unless_asked_for(self):
    config = dataclasses.replace(V1_1, dropout_rate=0.3)
    params, source = random_params(V1_1), ragged_source()
    target = random_tokens(3, 5, seed=1)

    @jit
    def dropped(key):
      return t5.T5(config).apply(
        {"params": params},
        source,
        target,
        deterministic=False,
        rngs={"dropout": key},
      )

    expected = logits_of(V1_1, params, source, target)
    off = logits_of(config, params, source, target)
    np.testing.assert_array_equal(off, expected)
    one, two = dropped(jax.random.key(0)), dropped(jax.random.key(1))
    assert abs(one - expected).max() > 1e-2 and abs(one - two).max() > 1e-2
    np.testing.assert_array_equal(one, dropped(jax.random.key(0)))

  def test_dropout_is_the_same_at_all_positions(self):
    config = dataclasses.replace(V1_1, dropout_rate=0.5)
    dropped = layers.dropout(config).apply(
      {},
      jnp.ones((2, 7, 30)),
      deterministic=False,
      rngs={"dropout": jax.random.key(0)},
    )
    np.testing.assert_array_equal(dropped, dropped[:, :1] * np.ones((1, 7, 1)))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert not np.array_equal(dropped[0], dropped[1])

  def test_attention_drops_keys_for_all_queries_of_a_row(self):
    """Equal weights and one-hot values show what is left of each key."""
    heads, keys = 2, 6
    width = 2 * keys
    config = dataclasses.replace(
      V1_1,
      num_heads=heads,
      head_dim=width,
      emb_dim=heads * width,
      dropout_rate=0.5,
    )
    attention = layers.Attention(config)
    twice = np.tile(np.eye(keys), 2)  # each key in both halves of the width
    values = np.broadcast_to(twice, (3, heads, keys, width))
    arguments = (
      np.ones((6, 4, heads * width), np.float32),  # two rows of each prompt
      (jnp.zeros((3, heads, keys, width)), jnp.asarray(values, jnp.float32)),
      np.ones((3, 1, keys), bool),
      None,
    )
    params = {
      "query": {"kernel": jnp.zeros((heads * width, heads * width))},
      "out": {"kernel": jnp.eye(heads * width)},
    }
    left = attention.apply(
      {"params": params},
      *arguments,
      deterministic=False,
      rngs={"dropout": jax.random.key(0)},
    )
    np.testing.assert_array_equal(left, left[:, :1] * np.ones((1, 4, 1)))
    factors = np.round(keys * np.asarray(left[:, 0]), 5).reshape(12, 2, keys)
    assert set(np.unique(factors)) == {0.0, 2.0}
    np.testing.assert_array_equal(factors[:, 0], factors[:, 1])
    assert len(np.unique(factors[:, 0], axis=0)) > 6


def test_shift_right_starts_with_zero_and_drops_the_last():
  target = np.array([[5, 6, 1], [7, 1, 0]])
  np.testing.assert_array_equal(
    t5.shift_right(jnp.asarray(target)), [[0, 5, 6], [0, 7, 1]]
  )
  np.testing.assert_array_equal(
    t5.shift_right(jnp.asarray(target[0])), [0, 5, 6]
  )


@pytest.mark.parametrize(
  "field, value, message",
  (
    ("emb_dim", 0, "emb_dim must be a positive integer, got 0"),
    ("num_heads", 2.0, "num_heads must be a positive integer, got 2.0"),
    ("mlp_activations", ("swiglu",), r"got \('swiglu',\)"),
    ("mlp_activations", (), r"such as \('gelu', 'linear'\), got \(\)"),
    ("mlp_activations", "relu", "tuple of names .* got 'relu'"),
    ("dropout_rate", 1.0, r"dropout_rate must be in \[0, 1\), got 1.0"),
    ("dtype", "float16", "one of .*bfloat16.*, got 'float16'"),
    ("remat", "some", "one of .*minimal.*, got 'some'"),
    ("relative_attention_num_buckets", 30, "multiple of 4, got 30"),
    ("relative_attention_max_distance", 16, "more than half .* 32, got 16"),
  ),
)
def test_a_config_that_makes_no_model_is_an_error(field, value, message):
  with pytest.raises(ValueError, match=message):
    t5.T5Config(**{field: value})


def test_a_config_from_json_can_be_hashed():
  config = t5.T5Config(mlp_activations=["relu"])
  assert hash(config) == hash(t5.T5Config(mlp_activations=("relu",)))


def test_matmul_has_the_gradient_of_a_product():
  random = np.random.default_rng(0)
  x, kernel, g = (
    random.standard_normal(shape).astype(np.float32)
    for shape in ((3, 5, 4), (4, 6), (3, 5, 6))
  )
  y, backward = jax.vjp(layers.matmul, x, kernel)
  np.testing.assert_allclose(y, x @ kernel, rtol=1e-5)
  dx, dkernel = backward(g)
  np.testing.assert_allclose(dx, g @ kernel.T, atol=1e-5)
  np.testing.assert_allclose(dkernel, np.einsum("abd,abf->df", x, g), atol=1e-5)

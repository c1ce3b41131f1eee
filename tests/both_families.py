"""A small model of each family, for what must hold of all of them.

The decoder has what T5 has not: every id may be text, so that padding is -1;
groups of queries that share keys, biases, norms of heads, and a layer with a
window that ends within a response.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clp_jax.models import families, t5
from clp_jax.models.causal import CausalConfig, Rope

EOS = 1
T5 = t5.T5Config(
  vocab_size=16,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=8,
  eos_ids=(EOS,),
)
DECODER = CausalConfig(
  architecture="qwen3",
  vocab_size=16,
  emb_dim=8,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=8,
  qk_norm=True,
  qkv_bias=True,
  ropes=(Rope(), Rope(50.0)),
  layer_ropes=(0, 1),
  windows=(5, 0),
  logits_via_embedding=False,
  max_length=64,
  scan_layers=True,
  eos_ids=(EOS,),
)
LISTED_DECODER = dataclasses.replace(DECODER, scan_layers=False)
SCANNED_T5 = dataclasses.replace(
  T5, num_encoder_layers=2, num_decoder_layers=2, scan_layers=True
)

both = pytest.mark.parametrize("model", [T5, DECODER], ids=["t5", "decoder"])


def cases(*values):
  """Parameters of a test, (model, *others): the first is run by default, and
  the others where they are "fast"."""
  found = []
  for fast, config, *others in values:
    layers = "scanned" if config.scan_layers else "listed"
    family = "t5" if isinstance(config, t5.T5Config) else "decoder"
    name = "-".join(
      [family, layers, *(getattr(x, "__name__", str(x)) for x in others)]
    )
    marks = () if fast else pytest.mark.slow
    found.append(pytest.param(config, *others, marks=marks, id=name))
  return found


def allowed(config):
  """[V] bool: the last rows have no token, as the one before the first words.

  T5's 0 is padding.
  """
  first = [config.pad_id != 0, True, False]
  return np.asarray(first + [True] * 11 + [False] * (config.vocab_size - 14))


@functools.cache
def reference(config):
  """Parameters whose logits are spread out, as a trained model's are."""
  params = jax.jit(families.build(config).init)(jax.random.key(0))
  params["decoder"]["logits_dense"]["kernel"] *= 4.0
  return jax.tree.map(np.asarray, params)


def with_padding(config, rows):
  """Rows whose padding is 0, as the family has it."""
  return np.where(np.asarray(rows) == 0, config.pad_id, rows).astype(np.int32)


def plain_inputs(config, prompts, tokens):
  """What `plain_scores` reads of prompts [R, S], one a row, and tokens [R, T].

  NumPy arrays [R, ...].
  """
  prompts, tokens = np.asarray(prompts), np.maximum(np.asarray(tokens), 0)
  rows, length = tokens.shape
  if isinstance(config, t5.T5Config):
    return prompts, np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
  # One text, with no padding between prompt and response.
  texts = np.zeros([rows, prompts.shape[1] + length], np.int32)
  is_text = prompts != config.pad_id
  for text, prompt, own, response in zip(
    texts, prompts, is_text, tokens, strict=True
  ):
    joined = np.concatenate([prompt[own], response])
    text[: len(joined)] = joined
  return texts, is_text.sum(1)[:, None] - 1 + np.arange(length)[None]


def plain_scores(config, params, inputs):
  """Logits [R, T, V] and states [R, T, D], teacher-forced.

  Written apart from decoding.py, and for decoders from the reading of prompts:
  all of a text but its first token is a response to that.

  Args:
    config: of the model.
    params: its parameters.
    inputs: from `plain_inputs`.
  """
  if isinstance(config, t5.T5Config):
    logits, kept = t5.T5(config).apply(
      {"params": params}, *inputs, mutable=["intermediates"]
    )
    return logits, kept["intermediates"]["decoder_states"][0]
  texts, where = inputs
  found = families.build(config).score(params, texts[:, :1], texts[:, 1:])
  return tuple(
    jnp.take_along_axis(array, where[..., None], axis=1) for array in found
  )


@functools.partial(jax.jit, static_argnums=0)
def _plain_logp(config, params, inputs, tokens, temperature, over):
  logits, _ = plain_scores(config, params, inputs)
  return picked(log_softmax(logits / temperature, over), tokens)


def log_softmax(logits, over):
  """Over some [V] bool of the tokens; the others' is that of almost nothing."""
  return jax.nn.log_softmax(jnp.where(over, logits, -1e9))


def plain_logp(config, params, prompts, tokens, temperature=1.0, over=True):
  """[R, T] log-probabilities by `plain_scores`, of prompts [B, S].

  Args:
    config: of the model.
    params: its parameters.
    prompts: [B, S].
    tokens: [R, T].
    temperature: divides the logits.
    over: [V] bool, the tokens that can be said.
  """
  prompts, tokens = np.asarray(prompts), np.asarray(tokens)
  prompts = np.repeat(prompts, len(tokens) // len(prompts), axis=0)
  inputs = plain_inputs(config, prompts, tokens)
  return _plain_logp(config, params, inputs, tokens, temperature, over)


def picked(logp, tokens):
  """Of [..., T, V], those of tokens [..., T]; padding may be -1."""
  return jnp.take_along_axis(logp, jnp.maximum(tokens, 0)[..., None], -1)[
    ..., 0
  ]


def stack_of(config):
  """Where an MLP kernel lies: ("encoder", "layers_0") or its like."""
  return (
    "encoder" if isinstance(config, t5.T5Config) else "decoder",
    "layers" if config.scan_layers else "layers_0",
  )


def at(tree, *path):
  """The leaf or the subtree of a nested dict."""
  for name in path:
    tree = tree[name]
  return tree


def mlp_kernel(config, tree):
  """[8, 8], or of scanned layers [L, 8, 8], with the axes of sets before."""
  return at(tree, *stack_of(config), "mlp", "wi_0", "kernel")


def assert_near_after_adam(found, expected, state, *, rounding, moved, atol):
  """Parameters that Adam has moved by gradients that differ by their rounding.

  Adam divides by a gradient's size: where there is next to none, its rounding
  is a share of a step. Where there was next to none in one step and much in
  others, the state at the end does not tell: one number in a hundred may differ
  by a hundredth of all steps.

  Args:
    found: tree of parameters.
    expected: likewise.
    state: optax's, that belongs to `expected`.
    rounding: of gradients.
    moved: learning rates of all steps, summed.
    atol: beside.
  """

  def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)

  leaves = jax.tree.leaves(state, is_leaf=is_adam)
  (adam,) = [leaf for leaf in leaves if is_adam(leaf)]

  def check(p, q, nu):
    share = rounding / np.maximum(np.sqrt(nu), rounding)
    difference = np.abs(np.asarray(p) - np.asarray(q)) - moved * share
    assert difference.max() <= moved / 100, difference.max()
    assert np.mean(difference > atol) <= 0.01, difference.max()

  jax.tree.map(check, found, expected, adam.nu)

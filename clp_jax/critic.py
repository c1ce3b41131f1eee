"""The critic: the value of every objective before every token.

For each of the K objectives, the rewards and the KL, a multilayer perceptron
reads the decoder states of the policy whose responses it judges.

Why the policy's states and not a T5 of its own: the value of an objective is
that under the policy of the weighting, and the policies of two weightings
differ a good deal. Their states tell them apart, so that the critic needs no
weighting as an input and one critic serves all of them; the weighting enters
once, where the K advantages are scalarised as the rewards are. It costs no
forward pass beside the policy's own and holds a few thousand parameters, where
a second T5 would double the memory of a step. The states are constants to it:
errors of the values must not move the policies, least of all through the mixing
into all of their sets.

The objectives share nothing, start alike and are not clipped together, so that
what is learned of one does not depend on which others there are: a one-hot
weighting trains what a single-objective run does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Params = Any


@struct.dataclass
class CriticState:
  """What a train state holds of the critic."""

  params: Params
  opt_state: Any


def init_params(
  key: jax.Array, width: int, hidden: int, num_values: int
) -> Params:
  """Parameters whose values are 0 everywhere, the same for each of K
  objectives: a nested dict of float32 arrays [K, ...]. States have the width D,
  the hidden layer so many units."""
  kernel = jax.random.normal(key, (width, hidden), jnp.float32) / width**0.5
  return {
    "hidden": {
      "kernel": jnp.tile(kernel[None], (num_values, 1, 1)),
      "bias": jnp.zeros([num_values, hidden], jnp.float32),
    },
    "value": {
      "kernel": jnp.zeros([num_values, hidden], jnp.float32),
      "bias": jnp.zeros([num_values], jnp.float32),
    },
  }


def logical_axes() -> Any:
  """Names of the axes of `init_params`, for sharding.RULES."""
  return {
    "hidden": {"kernel": ("value", "embed", "mlp"), "bias": ("value", "mlp")},
    "value": {"kernel": ("value", "mlp"), "bias": ("value",)},
  }


def values(params: Params, states: jax.Array) -> jax.Array:
  """The K values before every token.

  Args:
    params: from `init_params`.
    states: [..., D] in any float dtype, the policy's decoder states, taken as
      constants.

  Returns:
    [..., K] float32.
  """
  x = jax.lax.stop_gradient(states).astype(jnp.float32)
  # Models differ a lot in the scale of their last norm.
  x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  one = (1,) * (x.ndim - 1)  # for the axes of tokens
  hidden, value = params["hidden"], params["value"]
  x = jnp.einsum("...d,kdh->...kh", x, hidden["kernel"], precision="highest")
  x = jax.nn.gelu(x + hidden["bias"].reshape(one + hidden["bias"].shape))
  x = (x * value["kernel"].reshape(one + value["kernel"].shape)).sum(-1)
  return x + value["bias"].reshape(one + value["bias"].shape)

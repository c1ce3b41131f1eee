"""Rollouts: policies mixed, responses sampled and scored.

1. Mix the G policies of the step's weightings.
2. Cut the B prompts into G groups; group g is answered by policy g, N samples
   a prompt, each row with its own key.
3. Score the responses under the frozen reference: a program of its own, which
   runs while the host computes rewards.
The rewards join later, in the update.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from clp_jax import sharding
from clp_jax.bank import Bank
from clp_jax.models import decoding, families
from clp_jax.prompting import Prompts
from clp_jax.sampling import Sampling
from clp_jax.weightings import Distribution, Weighting

Params = Any


@struct.dataclass
class Rollout:
  """Sampled responses of a step, R = B * N rows, prompt-major.

  Rows of group g are [g R/G, (g + 1) R/G): the axis is cut over devices, so it
  stays flat between programs and is folded to [G, R/G] inside of them.
  """

  encoder_input_tokens: jax.Array  # [B, S] int32, prompted as the policies are
  tokens: jax.Array  # [R, T] int32, padding after EOS
  mask: jax.Array  # [R, T] bool, True up to and including EOS
  logp: jax.Array  # [R, T] float32, nats, under the sampling policy
  weighting: Weighting  # G weightings
  coefficients: jax.Array  # [G, M] float32
  # [R, T] float32, nats, under the reference; None until it has scored them.
  ref_logp: jax.Array | None = None


def sample_rollout(
  params: Params,
  reference: Params,
  encoder_input_tokens: jax.Array,
  weighting: Weighting,
  samples_key: jax.Array,
  *,
  bank: Bank,
  prompts: Prompts | None,
  distribution: Distribution,
  num_samples: int,
  max_length: int,
  temperature: float,
  allowed: np.ndarray,
) -> Rollout:
  """Steps 1 and 2 of the module.

  Args:
    params: what the bank trains.
    reference: an ordinary model's parameters; what the bank freezes.
    encoder_input_tokens: [B, S] int32 prompts.
    weighting: G weightings; G divides B.
    samples_key: key of the samples.
    bank: that makes the policies.
    prompts: what the policies are told of their weightings, or None.
    distribution: Q, that the weightings were drawn from.
    num_samples: N.
    max_length: T, tokens.
    temperature: of the policy and the reference alike: both are
      softmax(logits / temperature), so that their KL is that of what samples.
    allowed: [V] bool, tokens that may be sampled.

  Returns:
    A Rollout.
  """
  coefficients = distribution.coefficients(weighting)
  if prompts is not None:
    encoder_input_tokens = prompts.prepend(encoder_input_tokens, weighting)
  model = families.build(bank.model_config)
  policies = decoding.spread_policies(
    model, bank.policies(params, reference, coefficients), whole=True
  )
  samples = decoding.sample_groups(
    model,
    policies,
    bank.policy_axes,
    encoder_input_tokens,
    row_keys(samples_key, encoder_input_tokens.shape[0] * num_samples),
    Sampling(
      allowed,
      model.config.eos_ids,
      model.config.pad_id,
      temperature=temperature,
      logp_temperature=temperature,
    ),
    num_groups=coefficients.shape[0],
    num_samples=num_samples,
    max_length=max_length,
  )
  return Rollout(
    encoder_input_tokens=encoder_input_tokens,
    tokens=samples.tokens,
    mask=samples.mask,
    logp=samples.logp,
    weighting=weighting,
    coefficients=coefficients,
  )


def score_reference(
  bank: Bank,
  reference: Params,
  encoder_input_tokens: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  num_samples: int,
  temperature: float,
) -> jax.Array:
  """Step 3 of the module: a Rollout's ref_logp.

  Args:
    bank: whose reference it is.
    reference: an ordinary model's parameters.
    encoder_input_tokens: [B, S] int32 documents, without prompts.
    tokens: [R, T] int32 of the Rollout.
    mask: [R, T] bool of the Rollout.
    num_samples: N.
    temperature: of the policy and the reference alike.

  Returns:
    [R, T] float32, nats; 0 where the mask is False.
  """
  logp = decoding.score_tokens(
    families.build(bank.reference_config),
    reference,
    encoder_input_tokens,
    tokens,
    num_samples=num_samples,
    temperature=temperature,
  ).logp
  return jnp.where(mask, logp, 0)


def score_groups(
  bank: Bank,
  params: Params,
  reference: Params,
  coefficients: jax.Array,
  batch: dict[str, jax.Array],
  *,
  num_samples: int,
  temperature: float,
) -> decoding.TokenScores:
  """What the G policies of a rollout say of its responses, teacher-forced.

  The gradient goes through the mixing into all sets.

  Args:
    bank: that makes the policies.
    params: what the bank trains.
    reference: an ordinary model's parameters; what the bank freezes.
    coefficients: [G, M] float32.
    batch: encoder_input_tokens [G, B/G, S] int32, prompted as the policies are,
      and tokens [G, R/G, T] int32, prompt-major; more is not read.
    num_samples: N.
    temperature: of the policies.

  Returns:
    TokenScores whose arrays have the leading axes [G, R/G, T].
  """
  model = families.build(bank.model_config)
  policies = decoding.spread_policies(
    model, bank.policies(params, reference, coefficients), whole=False
  )
  return sharding.map_groups(
    lambda policy, prompts, responses: decoding.score_tokens(
      model,
      policy,
      prompts,
      responses,
      num_samples=num_samples,
      temperature=temperature,
    ),
    in_axes=(bank.policy_axes, 0, 0),
  )(policies, batch["encoder_input_tokens"], batch["tokens"])


def row_keys(key: jax.Array, num_rows: int) -> jax.Array:
  """One key a row, by its number: no device or batch layout changes them."""
  return keys_of_rows(key, jnp.arange(num_rows))


def keys_of_rows(key: jax.Array, numbers: jax.Array) -> jax.Array:
  """`row_keys` of rows by their numbers, [B] int32."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)

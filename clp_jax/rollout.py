"""Rollouts: policies mixed, responses sampled and scored.

1. Mix the G policies of the step's weightings.
2. Cut the B prompts into G groups; group g is answered by policy g, N samples
   a prompt, each row with its own key.
3. Score the responses under the frozen reference: a program of its own, which
   runs while the host computes rewards.
The rewards join later, in the update.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct

from clp_jax import build, keys, sharding
from clp_jax.bank import Bank
from clp_jax.models import decoding, families
from clp_jax.prompting import Prompts
from clp_jax.sampling import Sampling
from clp_jax.weightings import Weighting

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


def sampler(
  config: ml_collections.ConfigDict,
  bank: Bank,
  prompts: Prompts | None,
  allowed: np.ndarray,
) -> Callable[..., Rollout]:
  """Steps 1 and 2 of the module, to be jitted.

  Args:
    config: a valid training config. rollout.temperature is that of the policy
      and the reference alike: both are softmax(logits / temperature) over the
      allowed tokens, so that their KL is that of what samples.
    bank: that makes the policies.
    prompts: what the policies are told of their weightings, or None.
    allowed: [V] bool, tokens that may be sampled.

  Returns:
    (params that the bank trains, an ordinary model's that are the reference,
    documents [B, S] int32, the run's key, [] int32 step, estimate of the front
    or None) -> a Rollout of G weightings.
  """
  own, model = config.rollout, families.build(bank.model_config)
  distribution = build.distribution(config)
  adaptation = build.adaptation(config)

  def rollout(params, reference, documents, key, step, front):
    weightings_key, samples_key, _ = keys.of_step(key, step)
    if adaptation is None:
      weighting = distribution.sample(weightings_key, own.weightings)
    else:
      weighting = adaptation.sample(
        weightings_key, distribution, front, own.weightings
      )
    coefficients = distribution.coefficients(weighting)
    if prompts is not None:
      documents = prompts.prepend(documents, weighting)
    policies = decoding.spread_policies(
      model, bank.policies(params, reference, coefficients), whole=True
    )
    samples = decoding.sample_groups(
      model,
      policies,
      bank.policy_axes,
      documents,
      row_keys(samples_key, documents.shape[0] * own.samples),
      Sampling(
        allowed,
        model.config.eos_ids,
        model.config.pad_id,
        temperature=own.temperature,
        logp_temperature=own.temperature,
        logp_of_allowed=True,
      ),
      num_groups=own.weightings,
      num_samples=own.samples,
      max_length=config.data.target_length,
    )
    return Rollout(
      encoder_input_tokens=documents,
      weighting=weighting,
      coefficients=coefficients,
      **samples._asdict(),
    )

  return rollout


def score_reference(
  bank: Bank,
  reference: Params,
  encoder_input_tokens: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  num_samples: int,
  temperature: float,
  allowed: np.ndarray,
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
    allowed: [V] bool, tokens that may be sampled.

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
    allowed=allowed,
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
  allowed: np.ndarray | None,
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
    allowed: [V] bool, tokens that may be sampled; None for all.

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
      allowed=allowed,
    ),
    in_axes=(bank.policy_axes, 0, 0),
  )(policies, batch["encoder_input_tokens"], batch["tokens"])


def row_keys(key: jax.Array, num_rows: int) -> jax.Array:
  """One key a row, by its number: no device or batch layout changes them."""
  return keys_of_rows(key, jnp.arange(num_rows))


def keys_of_rows(key: jax.Array, numbers: jax.Array) -> jax.Array:
  """`row_keys` of rows by their numbers, [B] int32."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)

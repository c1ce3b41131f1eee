"""REINFORCE on the value of each weighting.

1. The return of a response y to prompt x at weighting (alpha, w) is
     (1 - alpha) sum_i w_i R_i(x, y) - alpha log(pi(y|x) / pi_ref(y|x)),
   the KL term estimated by the sampled log-ratio (k1) and part of the reward.
2. A baseline is subtracted that does not depend on the response, or hardly: the
   group's mean contains the response's own return.
3. The loss is -E[advantage log pi(y|x)], the sum over the tokens of y. Its
   gradient is that of the value: the log-ratio's own gradient has mean zero
   under pi, so the returns are constants.

A baseline that is learned is in ppo.py: it has a value for every token.

Source: Williams 1992; leave-one-out, Kool et al. 2019; the value is our reading
of arXiv 2407.15762, see docs/decisions.md.
"""

import jax

from clp_jax.masked import masked_sum

BASELINES = ("none", "group_mean", "leave_one_out")


def scalar_returns(
  rewards: jax.Array, kl: jax.Array, weights: jax.Array, alpha: jax.Array
) -> jax.Array:
  """The scalar return that is optimised.

  Args:
    rewards: [G, R, m] float32.
    kl: [G, R] float32, summed log-ratio of a response, nats.
    weights: [G, m] float32 on the simplex, or [G, R, m] of each response.
    alpha: [G] float32 in [0, 1].

  Returns:
    [G, R] float32.
  """
  if weights.ndim == 2:
    weights = weights[:, None]
  # Multiply-adds in float32: an einsum rounds to bfloat16 on some devices.
  reward = (rewards * weights).sum(-1)
  return (1 - alpha[:, None]) * reward - alpha[:, None] * kl


def advantages(
  returns: jax.Array, num_samples: int, baseline: str
) -> jax.Array:
  """Returns minus a baseline.

  The expected gradient of `loss` over R responses is R times the value's own
  with "none" and "leave_one_out", whose baselines do not depend on the
  response. The mean has a part 1 / R of the response's own return, which
  takes as much of the gradient away: it is R - 1 times the value's, its
  direction the same.

  Args:
    returns: [G, R] float32, R = prompts of the group x num_samples, the
      samples of one prompt side by side.
    num_samples: N.
    baseline: "none"; "group_mean", the mean over the G-th group's responses;
      "leave_one_out", the mean over the other N - 1 responses to the prompt.

  Returns:
    [G, R] float32.

  Raises:
    ValueError: for an unknown baseline, or leave_one_out with N = 1.
  """
  if baseline == "none":
    return returns
  if baseline == "group_mean":
    return returns - returns.mean(axis=1, keepdims=True)
  if baseline != "leave_one_out":
    raise ValueError(
      f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}."
    )
  if num_samples < 2:
    raise ValueError(
      "baseline leave_one_out needs at least 2 samples a prompt, got "
      f"{num_samples}; raise rollout.samples or use group_mean."
    )
  by_prompt = returns.reshape(returns.shape[0], -1, num_samples)
  others = by_prompt.sum(axis=2, keepdims=True) - by_prompt
  return (by_prompt - others / (num_samples - 1)).reshape(returns.shape)


def loss(logp: jax.Array, mask: jax.Array, advantages: jax.Array) -> jax.Array:
  """Sum over responses of -advantage log pi(response).

  Args:
    logp: [..., T] float32, log-probabilities of the sampled tokens, nats.
    mask: [..., T] bool, True up to and including EOS.
    advantages: [...] float32, constants.

  Returns:
    [] float32. A sum and not a mean, so that microbatches add up exactly.
  """
  response_logp = masked_sum(logp, mask, axis=-1)
  return -(jax.lax.stop_gradient(advantages) * response_logp).sum()

"""The learner without a critic: one step of REINFORCE on a rollout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from clp_jax.algorithms import reinforce
from clp_jax.masked import Mean, mean_of
from clp_jax.models.decoding import TokenScores
from clp_jax.train.experience import Experience
from clp_jax.train.gradients import accumulate
from clp_jax.train.state import TrainState, apply_gradient

Params = Any


@dataclasses.dataclass(frozen=True)
class Reinforce:
  """Learns as algorithms/reinforce.py says.

  Attributes:
    score: (params, reference, coefficients, batch) -> what the policies say of
      the responses, as `rollout.score_groups` does.
    optimizer: that made `state.opt_state`.
    baseline: one of `reinforce.BASELINES`.
    num_samples: N.
    microbatches: parts of the prompts whose gradients are accumulated.
  """

  score: Callable[..., TokenScores]
  optimizer: optax.GradientTransformation
  baseline: str
  num_samples: int
  microbatches: int

  def __call__(
    self, state: TrainState, experience: Experience, reference: Params
  ) -> tuple[TrainState, dict[str, Mean | jax.Array]]:
    """A pure function.

    Args:
      state: before the update.
      experience: of R responses under G weightings.
      reference: an ordinary model's parameters; what the bank freezes.

    Returns:
      (the state with what has learned, metrics of the state before).
    """
    returns = experience.returns
    batch = {
      "encoder_input_tokens": experience.encoder_input_tokens,
      "tokens": experience.tokens,
      "mask": experience.mask,
      "advantages": reinforce.advantages(
        returns, self.num_samples, self.baseline
      ),
    }

    def loss_fn(params, batch):
      scores = self.score(params, reference, experience.coefficients, batch)
      # Divided by all R responses here, so that microbatches simply add up.
      loss = reinforce.loss(scores.logp, batch["mask"], batch["advantages"])
      return loss / returns.size, mean_of(scores.entropy, batch["mask"])

    (loss, entropy), gradient = accumulate(
      jax.value_and_grad(loss_fn, has_aux=True),
      state.params,
      batch,
      self.microbatches,
    )
    state = apply_gradient(state, gradient, self.optimizer, state.step)
    return state, {
      "loss": loss,
      "entropy": entropy,
      "gradient_norm": optax.tree.norm(gradient),
    }

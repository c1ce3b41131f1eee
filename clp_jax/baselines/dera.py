"""DeRa and MOD: finetuned policies whose logits are mixed at every token.

Decoding-time realignment (DeRa) mixes the reference and one policy that was
finetuned at the least KL weight alpha_0; the weight that stands for another
alpha is `weightings.realignment`, above 1 below alpha_0. Multi-objective
decoding (MOD) mixes m single-objective policies by the weights. With several
rewards and a range of alpha it is both: coefficients (c w, 1 - c).

The folder that is written is a run's: it is evaluated, generated from and
compared like one that was trained. It has no one model to export, and a token
costs a forward pass for each model (`models/mixture.py`).

Source: Liu et al. 2024 (arXiv 2402.02992), Shi et al. 2024 (arXiv 2406.18853).
"""

from collections.abc import Mapping

import ml_collections

from clp_jax.baselines import soups


def make_mixture(
  config: ml_collections.ConfigDict,
  runs: Mapping[str, str],
  workdir: str,
  *,
  reference: str | None = None,
) -> None:
  """Writes the run folder of a policy that mixes logits.

  With weightings.alpha_range the reference is one of the models and low the
  alpha of the finetuned ones (DeRa); else they are the runs' (MOD). Arguments
  and errors are those of `soups.combine`.
  """
  soups.combine(config, runs, workdir, mixing="logits", reference=reference)

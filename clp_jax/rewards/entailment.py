"""Faithfulness by an entailment model: does the document entail the response?

The model is a T5 in the format of TRUE (Honovich et al. 2022): it reads
"premise: ... hypothesis: ..." and answers "1" where the premise entails the
hypothesis, else "0". The reward is the probability of "1" as the first token of
the answer, among the whole vocabulary as TRUE has it, or against `negative`
alone.

A premise longer than the model reads is split into windows that overlap, and
the reward is the largest of their probabilities: one passage that entails a
summary is enough. (So a summary that draws on two distant passages scores lower
than it would with a longer input.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clp_jax.models.model import Model
from clp_jax.rewards import model as models
from clp_jax.rewards.base import Score, Texts

Params = Any
TEMPLATE = "premise: {document} hypothesis: {response}"


def probability(
  model: Model, params: Params, tokens: jax.Array, yes: int, no: int | None
) -> jax.Array:
  """The probability that the answer is `yes`.

  Args:
    model: the T5.
    params: its parameters.
    tokens: [B, S] int32, 0 is padding.
    yes: the token that means entailment.
    no: the one that alone counts against it; None is all others.

  Returns:
    [B] float32.
  """
  logits, _ = models.first(model, params, tokens)
  if no is not None:
    return jax.nn.sigmoid(logits[:, yes] - logits[:, no])
  return jnp.exp(logits[:, yes] - jax.nn.logsumexp(logits, axis=-1))


def build(
  mesh: Mesh,
  model: str | None = None,
  *,
  batch: int = 64,
  source_length: int = 512,
  overlap: int = 64,
  template: str = TEMPLATE,
  positive: str = "1",
  negative: str | None = None,
  vocabulary: str | None = None,
  dtype: str = "float32",
  scan_layers: bool = False,
  fsdp: bool = False,
) -> Score:
  """Loads an entailment model.

  Args:
    mesh: where it runs.
    model: folder of a T5: a supervised run, Hugging Face's or t5x's.
    batch: rows scored together, on all devices.
    source_length: tokens of a row; longer premises are split.
    overlap: tokens that consecutive windows share.
    template: of the model's input.
    positive: the answer that means entailment, one piece.
    negative: the answer that alone counts against it; None is all others.
    vocabulary, dtype, scan_layers, fsdp: as for `models.load`.

  Returns:
    (documents, references, responses), each [B] -> [B] float32 in [0, 1].

  Raises:
    ValueError: the model can't be used; says what to change.
  """
  judge = models.load(model, mesh, vocabulary, dtype, scan_layers, fsdp)
  inputs = models.Inputs(judge.vocabulary, template, source_length, overlap)
  yes = models.token_of(judge.vocabulary, positive)
  no = None
  if negative is not None:
    no = models.token_of(judge.vocabulary, negative)
  scorer = models.make_scorer(
    lambda params, tokens: probability(judge.model, params, tokens, yes, no),
    judge.params,
    mesh,
    batch,
  )

  def entailment(
    documents: Texts, references: Texts, responses: Texts
  ) -> np.ndarray:
    del references
    tokens, pair = inputs(documents, responses)
    scores = np.zeros([len(responses)], np.float32)
    np.maximum.at(scores, pair, scorer(tokens))
    return scores

  return entailment

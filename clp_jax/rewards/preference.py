"""A preference model: a T5 whose one number says how good a response is.

It reads "document: ... summary: ..." (the response is whole, a long document is
cut), and its score is read at the decoder's first position: by a linear head,
as `clp train-reward` adds one, or as the logit of a token, with which any T5
that was trained to answer by that token will do. Scores are trained on
differences (Bradley and Terry 1952), so that their zero and scale mean nothing:
use normalise="fixed", or "running", to weigh them against other rewards.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import run_folder, saved_params, sharding
from clp_jax.interop import classifiers
from clp_jax.models import families
from clp_jax.models.model import Model
from clp_jax.rewards import model as models
from clp_jax.rewards.base import Score, Texts

Params = Any
TEMPLATE = "document: {document} summary: {response}"


def score_rows(
  model: Model,
  params: Params,
  tokens: jax.Array,
  token: int | None,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """The scores of tokenised pairs.

  Args:
    model: that reads them.
    params: {"t5": its parameters, "head": [D] float32, with a linear head}.
    tokens: [B, S] int32, the model's pad_id is padding.
    token: whose logit is the score; None reads the head.
    dropout_key: None for no dropout.

  Returns:
    [B] float32.
  """
  if token is not None:
    logits, _ = models.first(model, params["t5"], tokens, dropout_key)
    return logits[:, token]
  _, hidden = models.first(model, params["t5"], tokens, dropout_key)
  return jnp.einsum("bd,d->b", hidden, params["head"], precision="highest")


def abstract_params(config: families.Config, head: str) -> Params:
  """Shapes and dtypes of the parameters that `score_rows` takes.

  Args:
    config: of the T5.
    head: "linear" or "token".
  """
  params = {"t5": families.build(config).abstract()}
  if head == "linear":
    params["head"] = jax.ShapeDtypeStruct([config.emb_dim], jnp.float32)
  return params


def logical_axes(config: families.Config, head: str) -> Params:
  """Names of the axes of `abstract_params`, for sharding.RULES."""
  axes = {"t5": families.build(config).axes()}
  if head == "linear":
    axes["head"] = ("head",)
  return axes


def trained_config(folder: str) -> ml_collections.ConfigDict | None:
  """The config of a `clp train-reward` run; None of anything else."""
  if not run_folder.is_run(folder):
    return None
  config = run_folder.load_config(folder)
  is_reward = "reward_model" in config and "objectives" not in config
  return config if is_reward else None


def load_trained(
  folder: str,
  head: str,
  mesh: Mesh,
  dtype: str = "float32",
  fsdp: bool = False,
  step: int | None = None,
) -> tuple[models.Judge, int]:
  """What a `clp train-reward` run has trained.

  Args:
    folder: the run's.
    head: "linear" or "token", as in its config.
    mesh: where it goes.
    dtype: of the computation.
    fsdp: cut parameters over the data axis too.
    step: a checkpoint; None takes the newest.

  Returns:
    The model, with the parameters that `score_rows` takes, and its step.

  Raises:
    RunError: there is no such step, or it can't be read.
  """
  config = run_folder.load_model_config(folder)
  abstract = abstract_params(config, head)
  placed = sharding.param_shardings(
    mesh, logical_axes(config, head), abstract, fsdp=fsdp
  )
  params, step = saved_params.load_params(
    folder, saved_params.abstract_like(abstract, placed), step
  )
  config = dataclasses.replace(config, dtype=dtype, remat="none")
  judge = models.Judge(
    families.build(config),
    params,
    run_folder.load_tokenizer(folder),
  )
  return judge, step


def check_exports(
  config: ml_collections.ConfigDict, model_config: families.Config
) -> None:
  """Raises a ValueError unless transformers has a class for a trained model."""
  if config.reward_model.head != "linear":
    raise ValueError(
      "this run's score is the logit of a token; transformers has classes for "
      "linear heads, reward_model.head=linear."
    )
  classifiers.check_has_class(model_config)


def export(
  config: ml_collections.ConfigDict, judge: models.Judge, path: str, dtype: str
) -> None:
  """Writes a linear head on a decoder as a ...ForSequenceClassification folder,
  which the source "classifier" reads with the same scores.

  Args:
    config: of the run, which `check_exports` has seen.
    judge: from `load_trained`.
    path: the folder.
    dtype: of the parameters written.

  Raises:
    ValueError: as `classifiers.save_decoder`.
  """
  params = jax.tree.map(lambda p: p.astype(dtype), judge.params)
  classifiers.save_decoder(
    path,
    judge.model.config,
    {"model": params["t5"], "head": {"kernel": params["head"][:, None]}},
    judge.vocabulary,
    classifiers.Reading(
      config.reward_model.template, config.data.source_length
    ),
  )


def build(
  mesh: Mesh,
  model: str | None = None,
  *,
  batch: int = 64,
  source_length: int | None = None,
  template: str | None = None,
  token: str | None = None,
  vocabulary: str | None = None,
  dtype: str = "float32",
  scan_layers: bool = False,
  fsdp: bool = False,
) -> Score:
  """Loads a preference model.

  Args:
    mesh: where it runs.
    model: folder of a `clp train-reward` run, or of any T5 that answers by a
      token.
    batch: rows scored together, on all devices.
    source_length: tokens of a row; longer documents are cut. None takes what
      the model was trained with, or 512.
    template: of the model's input; None takes what the model was trained with,
      or TEMPLATE.
    token: whose logit is the score, one piece; None takes what the model was
      trained with.
    vocabulary, dtype, scan_layers, fsdp: as for `models.load`.

  Returns:
    (documents, references, responses), each [B] -> [B] float32.

  Raises:
    ValueError: the model can't be used; says what to change.
    RunError: it is a run that can't be read.
  """
  model = models.checked(model)
  trained = trained_config(model)
  if trained is not None:
    settings = trained.reward_model
    for name, given in (("template", template), ("token", token)):
      if given is not None:
        raise ValueError(
          f".{name} is for other models; {model} was trained with its own."
        )
    if vocabulary is not None:
      raise ValueError(f".vocabulary is for other models; {model} has its own.")
    judge, _ = load_trained(model, settings.head, mesh, dtype, fsdp)
    template = settings.template
    token = settings.token if settings.head == "token" else None
    if source_length is None:
      source_length = trained.data.source_length
  else:
    if token is None:
      raise ValueError(
        f"{model} was not trained by `clp train-reward`; set .token to the "
        "answer whose logit is the score."
      )
    judge = models.load(model, mesh, vocabulary, dtype, scan_layers, fsdp)
    judge = judge._replace(params={"t5": judge.params})
  length = 512 if source_length is None else source_length
  longest = judge.model.config.max_length
  if longest is not None and length > longest:
    raise ValueError(
      f".source_length must be at most {longest}, the tokens that {model} "
      f"reads, got {length}."
    )
  inputs = models.Inputs(
    judge.vocabulary,
    TEMPLATE if template is None else template,
    length,
    overlap=None,
  )
  number = None if token is None else models.token_of(judge.vocabulary, token)
  scorer = models.make_scorer(
    lambda params, tokens: score_rows(judge.model, params, tokens, number),
    judge.params,
    mesh,
    batch,
  )

  def preference(
    documents: Texts, references: Texts, responses: Texts
  ) -> np.ndarray:
    del references
    tokens, _ = inputs(documents, responses)
    return scorer(tokens)

  return preference

"""Rewards by models of other people: a number for (document, response).

The model is what transformers' AutoModelForSequenceClassification reads. A
decoder (Llama, Qwen, Gemma) reads the document as the user's message and the
response as the assistant's, in its own chat template, and its number is that
of the last token. An encoder (BERT, RoBERTa, DistilBERT, DeBERTa v3) reads the
two as its tokenizer puts pairs together. The response is always whole; a long
document is cut.

A folder that `clp export` has made of a `clp train-reward` run says itself how
rows are made, so that its scores are the run's.

A head of one number is the score. One of several needs a label, whose score is
its log-probability among all; where labels do not exclude each other, that of
itself; and of a regression the number. Scores of a reward model have no zero
and no scale: normalise="fixed", or "running", weighs them against others.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clp_jax import run_folder, sharding
from clp_jax.data import tokenizer as tokenizer_lib
from clp_jax.data import tokenizer_files
from clp_jax.data.hf_tokenizer import HFTokenizer, read_files
from clp_jax.data.text_pairs import TextPairs
from clp_jax.data.tokenizer import TOKENIZER
from clp_jax.interop import classifiers
from clp_jax.rewards import model as models
from clp_jax.rewards.base import Score, Texts

Params = Any


def score_rows(
  opened: classifiers.Opened,
  params: Params,
  rows: jax.Array,
  label: int | None,
) -> jax.Array:
  """The scores of tokenised pairs.

  Args:
    opened: the model.
    params: its parameters.
    rows: [B, S] or [B, 2, S] int32, as the model reads them.
    label: whose score it is; None of the only one.

  Returns:
    [B] float32.
  """
  logits = opened.model.logits(params, rows)
  if label is None:
    return logits[:, 0]
  if opened.labels.problem == classifiers.SINGLE_LABEL:
    logits = jax.nn.log_softmax(logits)
  elif opened.labels.problem == classifiers.MULTI_LABEL:
    logits = jax.nn.log_sigmoid(logits)
  return logits[:, label]


def label_of(names: tuple[str, ...], label: str | int | None) -> int | None:
  """The number of a label, by name or by number; None where there is one.

  Raises:
    ValueError: there is no such label, or several and none is named.
  """
  if len(names) == 1 and label is None:
    return None
  if label in names:
    return names.index(str(label))
  if str(label) in map(str, range(len(names))):
    return int(str(label))
  listed = ", ".join(f"{i} {name!r}" for i, name in enumerate(names))
  if len(names) == 1:
    raise ValueError(f".label = {label!r}: the model's one score is {listed}.")
  raise ValueError(
    f".label must be one of {listed}, by name or number, got {label!r}."
  )


def build(
  mesh: Mesh,
  model: str | None = None,
  *,
  batch: int = 64,
  source_length: int | None = None,
  template: str | None = None,
  label: str | int | None = None,
  dtype: str = "float32",
  scan_layers: bool = False,
  fsdp: bool = False,
) -> Score:
  """Loads a classifier.

  Args:
    mesh: where it runs.
    model: a Hugging Face folder of a ...ForSequenceClassification, with its
      tokenizer.json.
    batch: rows scored together, on all devices.
    source_length: tokens of a row; longer documents are cut. None takes what
      the folder says that the model was trained with, or 512.
    template: what a decoder without a chat template reads, with {document} and
      {response}.
    label: of several, the name or the number of the one that is the score.
    dtype, scan_layers, fsdp: as for `models.load`.

  Returns:
    (documents, references, responses), each [B] -> [B] float32.

  Raises:
    ValueError: the model can't be used; says what to change.
  """
  model = models.checked(model)
  if run_folder.is_run(model):
    raise ValueError(
      f"{model} is a run of clp: one of `clp train-reward` is read by the "
      "source 'preference'."
    )
  opened = classifiers.open_folder(model, dtype=dtype, scan_layers=scan_layers)
  number = label_of(opened.labels.names, label)
  if source_length is None:
    source_length = opened.reading.source_length if opened.reading else 512
  rows_of = _reader(model, opened, source_length, template)

  def place(made):
    return sharding.param_shardings(
      mesh, made.axes(), made.abstract(), fsdp=fsdp
    )

  scorer = models.make_scorer(
    lambda params, rows: score_rows(opened, params, rows, number),
    classifiers.load(opened, place),
    mesh,
    batch,
  )

  def classifier(
    documents: Texts, references: Texts, responses: Texts
  ) -> np.ndarray:
    del references
    return scorer(rows_of(documents, responses))

  return classifier


def _reader(
  path: str, opened: classifiers.Opened, length: int, template: str | None
):
  """(documents, responses), each [B] -> rows."""
  config = opened.model.config
  if not 8 <= length <= config.max_length:
    raise ValueError(
      f".source_length must be in [8, {config.max_length}], the tokens that "
      f"{path} reads, got {length}."
    )
  if opened.reading is not None:
    return _trained_reader(path, opened, length, template)
  files = read_files(path)
  if not files:
    raise ValueError(
      f"{path} holds no tokenizer.json; write it there with transformers' "
      "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )
  if opened.model.reads_pairs:
    if template is not None:
      raise ValueError(
        ".template is for decoders; an encoder's tokenizer says how it reads "
        "two texts."
      )
    pairs = TextPairs(f"{path}/{TOKENIZER}", files[TOKENIZER])
    _check_size(path, pairs.size, config.vocab_size)
    return lambda documents, responses: pairs(documents, responses, length)
  tokenizer = HFTokenizer(path, files, opened.eos_ids, rows=config.vocab_size)
  _check_size(path, tokenizer.size, config.vocab_size)
  if template is not None:
    models.check_template(template)
  elif tokenizer.chat_template is None:
    raise ValueError(
      f"{path} has no chat template; set .template to a text with {{document}} "
      "and {response}."
    )

  def read(documents, responses):
    rows = []
    for document, response in zip(documents, responses, strict=True):
      row = tokenizer.judged(document, response, template, length)
      # transformers reads the number before what pads, though text may end so.
      while len(row) > 1 and row[-1] == opened.pad_id:
        row.pop()
      rows.append(row)
    return tokenizer_lib.pad(rows, length, tokenizer.pad_id)

  return read


def _trained_reader(
  path: str, opened: classifiers.Opened, length: int, template: str | None
):
  """`_reader`, of what `clp train-reward` has trained."""
  assert opened.reading is not None
  if template is not None:
    raise ValueError(
      f".template is for other models; {path} was trained with its own."
    )
  size = opened.model.config.vocab_size
  tokenizer = tokenizer_files.load_tokenizer(path, opened.eos_ids, -1, size)
  if tokenizer is None:
    raise ValueError(f"{path} holds no vocabulary; restore it.")
  _check_size(path, tokenizer.size, size)
  inputs = models.Inputs(
    tokenizer, opened.reading.template, length, overlap=None
  )

  def read(documents, responses):
    rows, _ = inputs(documents, responses)
    return np.where(rows == tokenizer.pad_id, -1, rows)

  return read


def _check_size(path: str, size: int, rows: int) -> None:
  if size > rows:
    raise ValueError(
      f"{path}/tokenizer.json has {size} ids, but the model embeds {rows}; use "
      "the tokenizer that it was trained with."
    )

"""Your own documents, from JSONL files, summarised between ROUGE and length.

  clp train --config configs/jsonl.py --workdir runs/mine \
    --config.data.train=train.jsonl --config.data.eval=dev.jsonl \
    --config.model.init=PATH_OF_A_MODEL

A line is an object with "document" and "summary"; data.document_field and
data.reference_field name other fields, a glob names several files, and .gz is
unpacked. model.init is a model's folder (Hugging Face, t5x, or a run of clp);
the preset "tiny", which trains on a laptop, needs model.vocabulary, a
SentencePiece model. The model is finetuned on the summaries first (DIR/sft, or
`clp train-sft` alone and then sft.steps=0 with model.init=that folder).

Objectives are ROUGE and a length reward that asks for rewards.length.words
words: they need nothing but the data. With models at hand, steer by them:

    --config.objectives="('nli', 'preference')" \
    --config.rewards.nli.model=PATH_OF_AN_ENTAILMENT_T5 \
    --config.rewards.preference.model=PATH_OF_A_train-reward_RUN
"""

import ml_collections

from clp_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  """Defaults for documents of some hundred words."""
  config = config_lib.get_config()
  config.data.task = None
  config.data.template = "summarize: {document}"
  config.objectives = ("rouge", "length")
  config.rewards = ml_collections.ConfigDict(
    {
      "rouge": config_lib.reward("rouge"),
      "length": config_lib.reward("length", words=20.0),
      "nli": config_lib.model_reward("entailment"),
      "preference": config_lib.model_reward("preference", normalise="fixed"),
    }
  )
  config.sft.steps = 1000
  config.sft.batch = 32
  return config

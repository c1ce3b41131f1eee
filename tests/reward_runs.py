"""A `clp train-reward` run on a small decoder, made without training."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import small_decoder

from clp_jax import config as config_lib
from clp_jax import run_folder, saved_params
from clp_jax.train import reward_model

STEP = 3
LENGTH = 48
TEMPLATE = "Asked: {document} Answered: {response} End."


def start(workdir, architecture="qwen3", tokenizer=None, **changes) -> None:
  """Writes its folder.

  Args:
    workdir: of the run.
    architecture: of `small_decoder.ARCHITECTURES`.
    tokenizer: None for the small decoder's, with the model's eos_ids.
    **changes: of the model's config.
  """
  config = config_lib.get_config()
  config.data.source_length = LENGTH
  config.reward_model.template = TEMPLATE
  own = {name: config[name] for name in reward_model.SECTIONS}
  run_folder.start(str(workdir), ml_collections.ConfigDict(own))
  if tokenizer is None:
    tokenizer = small_decoder.make_tokenizer()
  model_config = small_decoder.make_config(architecture, **changes)
  params = jax.tree.map(jnp.asarray, small_decoder.random_params(model_config))
  run_folder.save_model(str(workdir), model_config, tokenizer, params)
  head = np.random.default_rng(2).normal(size=model_config.emb_dim)
  trained = {"t5": params, "head": jnp.asarray(head, jnp.float32)}
  saved_params.save_params(str(workdir), STEP, trained)

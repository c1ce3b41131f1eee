"""Runs that steer an instruct model of one's own: Qwen3 and Gemma 3.

One KL weight, two rewards of helpful (a preference model), harmless (another)
and brief (a number of words). Data are prompts alone: nothing is finetuned
before. All numbers are ours, of a size for slices of TPUs. What to change:

    --config.steering=lora                    or attention: less memory
    --config.objectives="('helpful', 'harmless')"
    --config.rewards.harmless.model=PATH      of a second train-reward run
    --config.data.document_field=messages     conversations, which take
    --config.data.template=None               the chat template as they are
"""

from typing import NamedTuple

import ml_collections

from clp_jax import config as config_lib


class Size(NamedTuple):
  """What a model's size changes."""

  model_axis: int  # devices that share each matrix; divides the heads of keys
  prompts: int  # of a step
  weightings: int  # of a step


SIZES = {
  "qwen3-0.6b": Size(model_axis=1, prompts=64, weightings=8),
  "qwen3-4b": Size(model_axis=4, prompts=64, weightings=8),
  "qwen3-8b": Size(model_axis=8, prompts=64, weightings=16),
  "gemma3-1b": Size(model_axis=1, prompts=64, weightings=8),
  "gemma3-4b": Size(model_axis=4, prompts=64, weightings=8),
  "gemma3-12b": Size(model_axis=8, prompts=64, weightings=16),
}


def get_config(size: str) -> ml_collections.ConfigDict:
  """Helpful against brief, at one KL weight (full-CLP).

  Args:
    size: of SIZES; the model itself is whatever model.init names.

  Returns:
    The config; model.init, the data and the reward models are left to be given.
  """
  config = config_lib.get_config()
  config.objectives = ("helpful", "brief")

  def preference():
    return config_lib.model_reward(
      "preference",
      normalise="fixed",
      batch=64,
      dtype="bfloat16",
      scan_layers=True,
      fsdp=True,
    )

  config.rewards = ml_collections.ConfigDict(
    {
      "helpful": preference(),
      "harmless": preference(),
      # Both in deviations under the reference, so that weights mean the same.
      "brief": config_lib.reward("length", normalise="fixed", words=40.0),
    }
  )
  config.data.task = None
  config.data.document_field = "prompt"
  config.data.reference_field = None
  config.data.template = ({"role": "user", "content": "{document}"},)
  config.data.source_length = 512
  config.data.target_length = 256

  settings = SIZES[size]
  config.model.init = None
  config.model.dtype = "bfloat16"
  config.model.scan_layers = True
  config.model.remat = "full"
  config.plan.model, config.plan.reward_model = size, "qwen3-0.6b"
  config.mesh.model = settings.model_axis
  config.mesh.fsdp = True

  config.weightings.alpha = 0.05
  config.rollout.prompts = settings.prompts
  config.rollout.samples = 4
  config.rollout.weightings = settings.weightings
  config.optimizer.name = "adafactor"
  config.optimizer.learning_rate = 3e-5
  config.optimizer.warmup_steps = 50
  config.adapters.rank = 16
  config.train.steps = 2000
  config.train.checkpoint_every = 100
  config.train.normalisation_batches = 16

  config.eval.prompts = 512
  config.eval.samples = 1
  return config

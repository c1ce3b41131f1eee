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

import functools

import ml_collections

from clp_jax import config as config_lib
from clp_jax.paper import Size, large_reward, set_size

JUDGE = "qwen3-0.6b"  # preset of the reward models, in plans
# Under 4 weightings two of a v5e slice's 8 shards of the data hold a policy
# between them; Gemma 3 12B's, with its gradient, is more than one can.
SIZES = {
  "qwen3-0.6b": Size(1, 64, 8, JUDGE, steps=2000),
  "qwen3-4b": Size(4, 64, 8, JUDGE, steps=2000),
  "qwen3-8b": Size(8, 64, 8, JUDGE, steps=2000),
  "gemma3-1b": Size(1, 64, 8, JUDGE, steps=2000),
  "gemma3-4b": Size(4, 64, 8, JUDGE, steps=2000),
  "gemma3-12b": Size(8, 64, 4, JUDGE, steps=2000),
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
  preference = functools.partial(
    large_reward, "preference", normalise="fixed", batch=64
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
  if size.startswith("qwen3"):
    # Of its hybrid models, whose answers begin with their reasoning otherwise.
    config.data.template_options.enable_thinking = False
  config.data.source_length = 512
  config.data.target_length = 256

  set_size(config, size, SIZES[size])
  config.model.remat = "full"

  config.weightings.alpha = 0.05
  config.optimizer.learning_rate = 3e-5
  config.optimizer.warmup_steps = 50
  config.adapters.rank = 16
  if size != "qwen3-0.6b":
    config.train.microbatches = 2  # one has more logits than a chip holds
  config.train.checkpoint_every = 100
  config.train.normalisation_batches = 16

  config.eval.prompts = 512
  return config

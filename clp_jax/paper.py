"""Runs of the paper's kind and size: T5 on XSum and on Reddit TL;DR.

What the paper is known to have: T5 policies from base upwards; XSum, and Reddit
TL;DR for ablations; the rewards nli (the probability of entailment by a T5),
rouge (against the reference summary) and tldr (a T5 preference model of TL;DR
comparisons); one fixed KL weight where several rewards are traded off; full-,
attention- and logit-CLP (here `steering`), T5 finetuned before. All numbers
below (lengths, batches, rates, steps, alpha, Q) are ours, and so is TFDS's
`reddit` as Reddit TL;DR.
"""

from typing import NamedTuple

import ml_collections

from clp_jax import config as config_lib


class Size(NamedTuple):
  """What a model's size changes."""

  model_axis: int  # devices that share each matrix; divides the heads of keys
  prompts: int  # of a step
  weightings: int  # of a step
  judge: str  # preset of the reward models, in plans
  steps: int  # of training, the fewer the more prompts each has
  scored: int = 256  # responses that a reward model scores together


# The slices of docs/plans.md have more chips the larger the model is, and what
# they send one another hardly grows with the prompts. With a weighting for
# each shard of the data no two shards share a mixed policy, which they would
# hold cut and gather in every layer; for "xxl", with its 64 shards, sending so
# many policies takes longer than gathering.
#
# Attention's logits of 8 prompts a chip stay in a v5e's fast memory, and of 16
# they don't: "base" with more prompts, or its judge with more responses, would
# be slower.
SIZES = {
  "base": Size(
    1, prompts=64, weightings=8, judge="large", steps=10_000, scored=64
  ),
  "large": Size(1, prompts=256, weightings=32, judge="large", steps=7_500),
  "xl": Size(4, prompts=256, weightings=32, judge="xl", steps=5_000),
  "xxl": Size(4, prompts=512, weightings=16, judge="xxl", steps=5_000),
}
# Tokens: articles of XSum are longer than posts.
SOURCE_LENGTHS = {"xsum": 1024, "tldr": 512}


def large_reward(source: str, **options) -> ml_collections.ConfigDict:
  """`config.model_reward` of a model that needs several devices."""
  placed = {"dtype": "bfloat16", "scan_layers": True, "fsdp": True}
  return config_lib.model_reward(source, **placed, **options)


def set_size(config: ml_collections.ConfigDict, name: str, size: Size) -> None:
  """Changes in a config what runs of large models have in common, for a size;
  `name` is the policy's preset, in plans, and model.init is left to be given.
  """
  config.model.init = None
  config.model.dtype = "bfloat16"
  config.model.scan_layers = True
  config.plan.model, config.plan.reward_model = name, size.judge
  config.mesh.model = size.model_axis
  config.mesh.fsdp = True
  config.rollout.prompts = size.prompts
  config.rollout.samples = 4
  config.rollout.weightings = size.weightings
  config.train.steps = size.steps
  config.optimizer.name = "adafactor"
  config.eval.samples = 1


def get_config(task: str, size: str) -> ml_collections.ConfigDict:
  """Two rewards, NLI and ROUGE, at one KL weight (full-CLP).

  Args:
    task: "xsum" or "tldr".
    size: of SIZES; the T5 itself is whatever model.init names.

  Returns:
    The config; model.init and the reward models are left to be given.
  """
  config = config_lib.get_config()
  config.objectives = ("nli", "rouge")
  config.rewards = ml_collections.ConfigDict(
    {
      "nli": large_reward("entailment", batch=SIZES[size].scored),
      "rouge": config_lib.reward("rouge"),
      # Its scale is arbitrary; the others are in [0, 1].
      "tldr": large_reward(
        "preference", normalise="fixed", batch=SIZES[size].scored
      ),
    }
  )
  config.data.task = task
  config.data.template = "summarize: {document}"
  config.data.source_length = SOURCE_LENGTHS[task]
  config.data.target_length = 64

  set_size(config, size, SIZES[size])
  # "full" would compute again what the devices must send one another for it.
  config.model.remat = "minimal"

  config.sft.steps = 10_000
  config.sft.batch = 128
  config.sft.learning_rate = 1e-3  # Adafactor's, relative to a parameter
  config.sft.warmup_steps = 1000
  config.sft.dropout = 0.1
  config.sft.checkpoint_every = 1000

  config.weightings.alpha = 0.01
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 200
  config.train.checkpoint_every = 500
  config.train.normalisation_batches = 32

  config.eval.prompts = 1024
  return config

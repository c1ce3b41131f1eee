"""Every field of a training config with its default, and configs as JSON.

A file under configs/ imports `get_config`, changes lines and returns it.
build.py checks a config and makes the objects that it describes.
"""

import json
from typing import Any

import ml_collections
from ml_collections import config_dict

# Where it was before errors.py: programs of users may catch it by this name.
from clp_jax.errors import ConfigError as ConfigError


def reward(
  source: str, normalise: str = "none", **options
) -> ml_collections.ConfigDict:
  """The description of one objective under `config.rewards`.

  Args:
    source: a built-in reward ("rouge", "length", "entailment", "preference",
      "classifier") or the import path of any callable (documents, references,
      responses) -> [B], "package.module:name".
    normalise: "none"; "fixed", by mean and deviation under the reference
      policy; "running", by those of all training samples so far.
    **options: the source's own settings, its keyword arguments.
  """
  return ml_collections.ConfigDict(
    {"source": source, "normalise": normalise} | options
  )


def model_reward(source: str, **options) -> ml_collections.ConfigDict:
  """The description of an "entailment", "preference" or "classifier" reward.

  Its `model`, a folder, is left to be given; the settings that depend
  on the machine are listed so that a command line can change them.
  """
  settings = {
    "model": config_dict.placeholder(str),
    "batch": 64,  # rows scored together, on all devices
    "dtype": "float32",  # of the computation
    "scan_layers": False,
    "fsdp": False,  # cut parameters over the data axis too
  }
  return reward(source, **(settings | options))


def _add_supervised(
  c: ml_collections.ConfigDict, steps: int, batch: int, learning_rate: float
) -> None:
  """The fields of supervised training; a batch is of documents, or of pairs."""
  c.steps = steps
  c.batch = batch
  c.learning_rate = learning_rate
  c.warmup_steps = 20
  c.decay_steps = config_dict.placeholder(int)
  c.dropout = 0.0
  c.checkpoint_every = 100


def get_config() -> ml_collections.ConfigDict:
  """The defaults. None means off; a placeholder is what may be None."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.algorithm = "reinforce"  # or ppo
  # Which parameters exist once per objective: full, attention, logits, lora,
  # svd_lora (see adapters), none.
  c.steering = "full"
  # What the sets' combination is of: their parameters, which training needs,
  # or their logits at every token (DeRa and MOD, made of trained policies).
  c.mixing = "parameters"
  # Names of rewards; the order of weights everywhere.
  c.objectives = ("rouge",)
  c.rewards = ml_collections.ConfigDict({"rouge": reward("rouge")})

  c.model = ml_collections.ConfigDict()
  c.model.init = config_dict.placeholder(str)
  c.model.init = "tiny"  # a preset or a folder that holds a model
  # SentencePiece model file; None takes the checkpoint's or the task's own.
  c.model.vocabulary = config_dict.placeholder(str)
  c.model.dtype = "float32"  # of the computation; parameters stay float32
  c.model.scan_layers = False  # compiles large models faster
  c.model.remat = "none"  # none, minimal or full

  c.data = ml_collections.ConfigDict()
  # Either a seqio task: newsroom, xsum, tldr or one of your own, as
  # package.module:name ...
  c.data.task = config_dict.placeholder(str)
  c.data.task = "newsroom"
  c.data.train_split = "train"
  c.data.eval_split = "validation"
  c.data.use_cached = False  # read what seqio_cache_tasks wrote
  c.data.cache_dirs = ()  # folders to look for it in
  # Where TFDS has prepared xsum and tldr, such as gs://BUCKET/tfds; None takes
  # TFDS_DATA_DIR, or ~/tensorflow_datasets.
  c.data.tfds_data_dir = config_dict.placeholder(str)
  # ... or JSONL files, each a path or a glob: splits "train" and "validation".
  c.data.train = config_dict.placeholder(str)
  c.data.eval = config_dict.placeholder(str)
  # A text, or a conversation: a list of messages.
  c.data.document_field = "document"
  # None where rows have no reference, and nothing asks for one.
  c.data.reference_field = config_dict.placeholder(str)
  c.data.reference_field = "summary"
  # Likewise, before those two, with the names of a pair for `clp train-reward`:
  # what a line calls each, None for the usual.
  c.data.fields = ml_collections.ConfigDict()
  for name in ("document", "reference", "chosen", "rejected"):
    c.data.fields[name] = config_dict.placeholder(str)
  # Makes a model's input of a document: "summarize: {document}"; or a list of
  # messages for the model's chat template, [{"role": "user", "content": ...}],
  # on a command line as JSON.
  c.data.template = config_dict.placeholder(object)
  # Names and values that the model's chat template is given beside messages,
  # such as enable_thinking=False.
  c.data.template_options = ml_collections.ConfigDict()
  c.data.source_length = 512  # tokens, EOS included; longer inputs are cut
  c.data.target_length = 64  # tokens, EOS included; also the decoding limit

  c.weightings = ml_collections.ConfigDict()  # the distribution Q
  c.weightings.concentration = 1.0  # of the Dirichlet; 1 is uniform
  c.weightings.weights = config_dict.placeholder(tuple)  # instead, fixed
  c.weightings.alpha = 0.01  # KL weight in [0, 1]
  # Instead, (low, high) of a log-uniform alpha: KL becomes an objective.
  c.weightings.alpha_range = config_dict.placeholder(tuple)
  # Then the coefficient of KL's set: alpha, or realigned (weightings.py).
  c.weightings.kl_coefficient = "alpha"
  # Draws more weights where the front has gaps, as training finds them.
  c.weightings.adapt = False
  c.weightings.adapt_points = 11  # cells an edge of the simplex
  c.weightings.adapt_decay = 0.9  # of a cell's mean, a step that visits it
  c.weightings.adapt_exploration = 0.5  # share that is drawn from Q as it is

  c.scalarisation = ml_collections.ConfigDict()  # of the rewards, in training
  c.scalarisation.name = "linear"  # linear, chebyshev or smooth_chebyshev
  # Of the last two: a (normalised) value above what each reward can reach.
  c.scalarisation.utopia = config_dict.placeholder(tuple)
  c.scalarisation.smoothness = 0.1  # of smooth_chebyshev, in rewards' units

  c.conditioning = ml_collections.ConfigDict()
  # The KL term's parameter set, where there is one: trained, or frozen at the
  # reference.
  c.conditioning.kl_set = "trained"
  # Parameters that all weightings share: trained or frozen; None freezes what
  # adapters adapt, and trains elsewhere.
  c.conditioning.shared = config_dict.placeholder(str)

  c.adapters = ml_collections.ConfigDict()  # steering lora and svd_lora
  c.adapters.rank = 8  # svd_lora: singular values that all weightings share
  c.adapters.scale = 1.0  # of what is added to a kernel
  c.adapters.targets = ("attention", "mlp")  # one or both
  # Folders of the peft library's LoRAs that the sets start from, one an
  # objective; None starts all at the base.
  c.adapters.init = config_dict.placeholder(tuple)
  c.adapters.orthogonality = 0.1  # weight of svd_lora's penalty

  c.soft_tokens = ml_collections.ConfigDict()
  # Learned embeddings before the input, one set per objective; with any
  # steering.
  c.soft_tokens.length = config_dict.placeholder(int)

  # The weighting, written before the document (prompting.py).
  c.prompting = ml_collections.ConfigDict()
  c.prompting.style = "none"  # none, text or control_tokens
  c.prompting.levels = 10  # weights are rounded to multiples of 1 / levels
  # Share of the documents of supervised finetuning that get a random one, so
  # that the model has seen the format before it matters.
  c.prompting.sft_share = 0.0

  c.rollout = ml_collections.ConfigDict()
  c.rollout.prompts = 16  # B, a step
  c.rollout.samples = 4  # N, a prompt
  c.rollout.weightings = 2  # G, a step; divides prompts
  c.rollout.temperature = 1.0  # the policy's, in training
  # 1: a step's responses are sampled while the host scores those of the step
  # before, by policies that lack its update. Needs algorithm = "ppo".
  c.rollout.ahead = 0

  c.reinforce = ml_collections.ConfigDict()
  # none, group_mean, leave_one_out, or learned: the critic's values.
  c.reinforce.baseline = "leave_one_out"

  c.ppo = ml_collections.ConfigDict()  # of algorithm = "ppo"
  c.ppo.epochs = 2  # times a step goes through its responses
  c.ppo.minibatches = 2  # updates an epoch; divides a weighting's prompts
  c.ppo.clip = config_dict.placeholder(float)
  c.ppo.clip = 0.2  # of the ratio, to both sides of 1; None is off
  c.ppo.value_clip = config_dict.placeholder(float)  # in rewards' units
  c.ppo.discount = 1.0  # gamma, a token
  c.ppo.gae_lambda = 0.95
  # Returns less the mean of the prompt's other samples; the critic learns what
  # is left. Needs rollout.samples >= 2.
  c.ppo.leave_one_out = True
  c.ppo.whiten = False  # advantages of a step to mean 0 and deviation 1
  # Nats a token from the policy that sampled; no update of the step beyond.
  c.ppo.target_kl = config_dict.placeholder(float)

  c.critic = ml_collections.ConfigDict()  # of ppo and of the learned baseline
  c.critic.hidden = 64  # units between decoder states and values, each reward
  c.critic.learning_rate = 3e-3  # Adam's, from the first step on

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = "adam"  # adam or adafactor
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 20  # linear from 0
  # Cosine to a tenth of the rate over so many steps; None keeps it constant.
  c.optimizer.decay_steps = config_dict.placeholder(int)
  c.optimizer.clip_norm = 1.0  # of the global gradient

  c.train = ml_collections.ConfigDict()
  c.train.steps = 1000
  c.train.microbatches = 1  # gradient accumulation over prompts
  c.train.checkpoint_every = 100
  c.train.keep = 3  # newest checkpoints that are kept
  c.train.log_samples_every = 100
  c.train.normalisation_batches = 8  # that estimate a "fixed" normalisation

  # Supervised finetuning before, on the task's references; its result is then
  # the reference policy. 0 steps: model.init is the reference.
  c.sft = ml_collections.ConfigDict()
  _add_supervised(c.sft, steps=0, batch=64, learning_rate=1e-3)

  # `clp train-reward`: a preference model from pairs. Then data.train and
  # data.eval hold lines with "document", "chosen" and "rejected", or what
  # data.fields calls them.
  c.reward_model = ml_collections.ConfigDict()
  c.reward_model.head = "linear"  # or token: the logit of `token` is the score
  c.reward_model.token = "1"
  c.reward_model.template = "document: {document} summary: {response}"
  _add_supervised(c.reward_model, steps=1000, batch=32, learning_rate=1e-4)

  c.eval = ml_collections.ConfigDict()
  c.eval.grid = 11  # points an edge of the simplex
  c.eval.prompts = 256
  c.eval.samples = 2  # a prompt
  c.eval.temperature = 1.0  # 0 is greedy
  c.eval.batch = 256  # prompts decoded together
  # Of the hypervolume, one value an objective, in the units that are
  # optimised; None is 0, and -3 where an objective is normalised.
  c.eval.reference_point = config_dict.placeholder(tuple)

  c.mesh = ml_collections.ConfigDict()
  c.mesh.replica = 1  # slices; parameters are whole in each
  c.mesh.data = config_dict.placeholder(int)  # None: all remaining devices
  c.mesh.model = 1
  c.mesh.fsdp = False  # cut parameters over the data axis too

  c.wandb = ml_collections.ConfigDict()
  # Of Weights & Biases, which then has every metric of every stage too; needs
  # pip install 'clp_jax[wandb]'.
  c.wandb.project = config_dict.placeholder(str)

  # Presets that plans take for models which the config leaves to be given.
  c.plan = ml_collections.ConfigDict()
  c.plan.model = config_dict.placeholder(str)
  c.plan.reward_model = config_dict.placeholder(str)
  return c


def column(data: ml_collections.ConfigDict, name: str) -> Any:
  """What the lines of JSONL files call what this package calls `name`:
  "document", "reference", "chosen" or "rejected"; None where rows have no
  reference."""
  usual = {"document": data.document_field, "reference": data.reference_field}
  own = data.get("fields") or {}  # runs of older versions have none
  named = own.get(name)
  return usual.get(name, name) if named is None else named


def to_json(config: ml_collections.ConfigDict) -> dict:
  """The config as plain JSON values; tuples become lists."""
  return json.loads(config.to_json_best_effort())


def from_json(values: dict) -> ml_collections.ConfigDict:
  """The inverse of `to_json`: lists become tuples again."""

  def convert(value):
    if isinstance(value, dict):
      return {key: convert(v) for key, v in value.items()}
    if isinstance(value, list):
      return tuple(convert(v) for v in value)
    return value

  return ml_collections.ConfigDict(convert(values))

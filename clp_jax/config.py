"""Every field of a training config with its default, and their validation.

A file under configs/ imports `get_config`, changes lines and returns it. The
code reads fields, and what None stands for is said beside a field, or is "off".
Only the settings that a reward's description leaves out have their defaults
elsewhere: they are keyword arguments of the reward.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh
from ml_collections import config_dict

from clp_jax import adapters, prompting, sharding
from clp_jax import bank as bank_lib
from clp_jax.adaptation import Adaptation
from clp_jax.algorithms import ppo, reinforce
from clp_jax.data.tasks import check_template
from clp_jax.data.vocabulary import control_ids
from clp_jax.models.presets import PRESETS
from clp_jax.models.t5 import T5Config
from clp_jax.rewards import base
from clp_jax.scalarisation import Scalarisation
from clp_jax.weightings import Distribution

ALGORITHMS = ("reinforce", "ppo")
BASELINES = (*reinforce.BASELINES, "learned")
OPTIMIZERS = ("adam", "adafactor")
NORMALISATIONS = ("none", "fixed", "running")
HEADS = ("linear", "token")
MIXINGS = ("parameters", "logits")


class ConfigError(ValueError):
  """A config that can't be trained; the message says what to change."""


def reward(
  source: str, normalise: str = "none", **options
) -> ml_collections.ConfigDict:
  """The description of one objective under `config.rewards`.

  Args:
    source: a built-in reward ("rouge", "length", "entailment", "preference") or
      the import path of any callable (documents, references, responses) -> [B],
      "package.module:name".
    normalise: "none"; "fixed", by mean and deviation under the reference
      policy; "running", by those of all training samples so far.
    **options: the source's own settings, its keyword arguments.
  """
  return ml_collections.ConfigDict(
    {"source": source, "normalise": normalise} | options
  )


def model_reward(source: str, **options) -> ml_collections.ConfigDict:
  """The description of an "entailment" or "preference" reward.

  Its `model`, the folder of a T5, is left to be given; the settings that depend
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
  c.model.init = "tiny"  # a preset or a folder that holds a T5
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
  # ... or JSONL files, each a path or a glob: splits "train" and "validation".
  c.data.train = config_dict.placeholder(str)
  c.data.eval = config_dict.placeholder(str)
  c.data.document_field = "document"
  c.data.reference_field = "summary"
  # Makes a model's input of a document: "summarize: {document}".
  c.data.template = config_dict.placeholder(str)
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
  c.sft.steps = 0
  c.sft.batch = 64
  c.sft.learning_rate = 1e-3
  c.sft.warmup_steps = 20
  c.sft.decay_steps = config_dict.placeholder(int)
  c.sft.dropout = 0.0
  c.sft.checkpoint_every = 100

  # `clp train-reward`: a preference model from pairs. Then data.train and
  # data.eval hold lines with data.document_field, "chosen" and "rejected".
  c.reward_model = ml_collections.ConfigDict()
  c.reward_model.head = "linear"  # or token: the logit of `token` is the score
  c.reward_model.token = "1"
  c.reward_model.template = "document: {document} summary: {response}"
  c.reward_model.steps = 1000
  c.reward_model.batch = 32  # pairs
  c.reward_model.learning_rate = 1e-4
  c.reward_model.warmup_steps = 20
  c.reward_model.decay_steps = config_dict.placeholder(int)
  c.reward_model.dropout = 0.0
  c.reward_model.checkpoint_every = 100

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

  # Presets that plans take for models which the config leaves to be given.
  c.plan = ml_collections.ConfigDict()
  c.plan.model = config_dict.placeholder(str)
  c.plan.reward_model = config_dict.placeholder(str)
  return c


def make_mesh(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh as the config describes it.

  Args:
    config: reads `mesh`.
    devices: None takes jax.devices().

  Raises:
    ConfigError: when it does not fit the devices.
  """
  with as_config_error():
    return sharding.make_mesh(
      config.mesh.data, config.mesh.model, devices, config.mesh.replica
    )


def check_rows(path: str, rows: int, mesh: Mesh) -> None:
  """Checks that a number of rows can be cut over a mesh.

  Raises:
    ConfigError: names the field, its value and what it must be.
  """
  shards = sharding.row_shards(mesh)
  if rows % shards:
    raise ConfigError(
      f"{path} = {rows} is not a multiple of the mesh's data axis, {shards}; "
      "change it or mesh.data."
      if mesh.shape["replica"] == 1
      else f"{path} = {rows} is not a multiple of mesh.replica x mesh.data = "
      f"{shards}; change one of them."
    )


def distribution(config: ml_collections.ConfigDict) -> Distribution:
  """Q as the config describes it."""
  q = config.weightings
  return Distribution(
    num_rewards=len(config.objectives),
    concentration=q.concentration,
    weights=None if q.weights is None else tuple(q.weights),
    alpha=q.alpha,
    alpha_range=None if q.alpha_range is None else tuple(q.alpha_range),
    kl_coefficient=q.kl_coefficient,
  )


def bank(
  config: ml_collections.ConfigDict, model_config: T5Config
) -> bank_lib.Bank:
  """How the config conditions a T5 on weightings.

  Args:
    config: a valid training config.
    model_config: of the reference.
  """
  own, steering = config.conditioning, config.steering
  frozen_kl = (
    own.kl_set == "frozen" and config.weightings.alpha_range is not None
  )
  adapter = None
  if steering in adapters.KINDS:
    adapter = adapters.Adapter(
      kind=steering,
      rank=config.adapters.rank,
      scale=config.adapters.scale,
      targets=tuple(config.adapters.targets),
      frozen_kl=frozen_kl,
    )
  frozen_shared = adapter is not None
  if own.shared is not None:
    frozen_shared = own.shared == "frozen"
  return bank_lib.Bank(
    reference_config=model_config,
    kind=steering,
    num_sets=distribution(config).num_sets,
    frozen_kl=frozen_kl,
    frozen_shared=frozen_shared,
    soft_tokens=config.soft_tokens.length or 0,
    adapter=adapter,
  )


def control_tokens(config: ml_collections.ConfigDict) -> int:
  """Tokens beyond those of text that the config's prompts are made of."""
  if config.prompting.style != "control_tokens":
    return 0
  q = distribution(config)
  return prompting.num_control_tokens(
    q.num_rewards, config.prompting.levels, q.alpha_range
  )


def prompts(
  config: ml_collections.ConfigDict, vocabulary: Any, vocab_size: int
) -> prompting.Prompts | None:
  """The config's prompt format, or None without one.

  Args:
    config: a valid training config.
    vocabulary: of the model, a `data.vocabulary.Vocabulary` or what
      `data.vocabulary.load_vocabulary` gives.
    vocab_size: V, rows of the model's embedding.

  Raises:
    ConfigError: when the vocabulary can't express it.
  """
  own, q = config.prompting, distribution(config)
  with as_config_error():
    if own.style == "text":
      return prompting.text_prompts(
        vocabulary, config.objectives, own.levels, q.alpha_range
      )
    if own.style == "control_tokens":
      return prompting.control_prompts(
        control_ids(vocabulary, vocab_size),
        q.num_rewards,
        own.levels,
        q.alpha_range,
      )
  return None


def adaptation(config: ml_collections.ConfigDict) -> Adaptation | None:
  """How Q is adapted, or None."""
  q = config.weightings
  if not q.adapt:
    return None
  return Adaptation(
    num_rewards=len(config.objectives),
    points=q.adapt_points,
    decay=q.adapt_decay,
    exploration=q.adapt_exploration,
  )


def scalarisation(config: ml_collections.ConfigDict) -> Scalarisation:
  """How a weighting makes one number of the rewards."""
  s = config.scalarisation
  return Scalarisation(
    name=s.name,
    utopia=None if s.utopia is None else tuple(s.utopia),
    smoothness=s.smoothness,
  )


def has_critic(config: ml_collections.ConfigDict) -> bool:
  """Whether values are learned."""
  return config.algorithm == "ppo" or config.reinforce.baseline == "learned"


def ppo_settings(config: ml_collections.ConfigDict) -> ppo.Settings:
  """What an update with a critic does."""
  if config.algorithm != "ppo":
    return ppo.REINFORCE
  return ppo.Settings(**config.ppo)


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
  """Turns a ValueError about what a config names into a ConfigError."""
  try:
    yield
  except ValueError as error:
    raise ConfigError(str(error)) from error


def load_rewards(
  config: ml_collections.ConfigDict, mesh: Mesh | None = None
) -> list[base.Reward]:
  """The rewards of the config's objectives, in their order.

  Args:
    config: a training config.
    mesh: where rewards that are models run; None takes all devices as the data
      axis.

  Raises:
    ConfigError: when one can't be loaded.
    RunError: when its model is a run that can't be read.
  """
  with as_config_error():
    return [
      base.load_reward(name, config.rewards[name].to_dict(), mesh)
      for name in config.objectives
    ]


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks facts that span fields, before anything is loaded or written.

  Raises:
    ConfigError: says what was found and what to change.
  """
  _one_of("algorithm", config.algorithm, ALGORITHMS)
  _one_of("steering", config.steering, bank_lib.STEERING)
  own = config.conditioning
  _one_of("conditioning.kl_set", own.kl_set, bank_lib.KL_SETS)
  if own.shared is not None:
    _one_of("conditioning.shared", own.shared, bank_lib.SHARED)
  if own.kl_set == "frozen" and config.weightings.alpha_range is None:
    raise ConfigError(
      "conditioning.kl_set = frozen, but with one alpha there is no set for "
      "the KL term; give weightings.alpha_range, or leave kl_set=trained."
    )
  _one_of("prompting.style", config.prompting.style, prompting.STYLES)
  share = config.prompting.sft_share
  if not 0 <= share <= 1:
    raise ConfigError(f"prompting.sft_share must be in [0, 1], got {share}.")
  if share and config.prompting.style == "none":
    raise ConfigError(
      f"prompting.sft_share = {share}, but prompting.style = none writes no "
      "prompts; choose a style, or leave sft_share=0."
    )
  _one_of("mixing", config.mixing, MIXINGS)
  if config.mixing != "parameters":
    raise ConfigError(
      "mixing = 'logits' combines policies that are trained already; train "
      "with 'parameters', or make a mixture as docs/experiments.md says."
    )
  _one_of("reinforce.baseline", config.reinforce.baseline, BASELINES)
  _one_of("optimizer.name", config.optimizer.name, OPTIMIZERS)
  _one_of("reward_model.head", config.reward_model.head, HEADS)
  _validate_data(config.data)
  if config.model.init is None:
    raise ConfigError(
      "model.init is not set; give the folder of a T5, or the name of a preset "
      "to start from random parameters."
    )
  objectives = tuple(config.objectives)
  if not objectives:
    raise ConfigError("objectives is empty; name at least one reward.")
  if len(set(objectives)) != len(objectives):
    raise ConfigError(f"objectives has duplicates: {', '.join(objectives)}.")
  for name in objectives:
    if name not in config.rewards:
      raise ConfigError(
        f"unknown objective {name!r}; config.rewards describes "
        f"{', '.join(sorted(config.rewards))}."
      )
    _one_of(
      f"rewards.{name}.normalise",
      config.rewards[name].normalise,
      NORMALISATIONS,
    )
  try:
    distribution(config)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"weightings: {error}") from error
  with as_config_error():
    bank(config, PRESETS["tiny"])  # whatever the model, its checks are the same
  _validate_q_and_scalarisation(config)
  _validate_ppo(config)

  positive = (
    "data.source_length data.target_length rollout.prompts rollout.samples "
    "rollout.weightings optimizer.learning_rate optimizer.clip_norm "
    "prompting.levels "
    "train.microbatches train.checkpoint_every train.keep "
    "train.log_samples_every train.normalisation_batches sft.batch "
    "sft.learning_rate sft.checkpoint_every rollout.temperature "
    "reward_model.batch reward_model.learning_rate "
    "reward_model.checkpoint_every eval.prompts eval.samples eval.batch "
    "mesh.replica mesh.model ppo.epochs ppo.minibatches critic.hidden "
    "critic.learning_rate"
  )
  if config.soft_tokens.length is not None:
    positive += " soft_tokens.length"
  for path in positive.split():
    value = _get(config, path)
    if value is None or not value > 0:  # also false for NaN
      raise ConfigError(f"{path} must be > 0, got {value}.")
  not_negative = (
    "train.steps sft.steps sft.warmup_steps reward_model.steps "
    "reward_model.warmup_steps adapters.orthogonality"
  )
  for path in not_negative.split():
    value = _get(config, path)
    if value is None or not value >= 0:
      raise ConfigError(f"{path} must be >= 0, got {value}.")
  if config.eval.grid < 2:
    raise ConfigError(f"eval.grid must be at least 2, got {config.eval.grid}.")
  rollout, train = config.rollout, config.train
  groups = rollout.weightings
  if rollout.prompts % (groups * train.microbatches):
    raise ConfigError(
      f"rollout.prompts = {rollout.prompts} is not a multiple of "
      f"rollout.weightings x train.microbatches = {groups} x "
      f"{train.microbatches}; change one of them."
    )
  minibatches = ppo_settings(config).minibatches
  if rollout.prompts % (groups * train.microbatches * minibatches):
    raise ConfigError(
      f"rollout.prompts = {rollout.prompts} is not a multiple of "
      "rollout.weightings x ppo.minibatches x train.microbatches = "
      f"{groups} x {minibatches} x {train.microbatches}; change one of them."
    )
  if (
    config.algorithm == "ppo"
    and config.ppo.leave_one_out
    and rollout.samples < 2
  ):
    raise ConfigError(
      "ppo.leave_one_out needs rollout.samples >= 2, got "
      f"{rollout.samples}; raise it or set ppo.leave_one_out=False."
    )
  if (
    config.algorithm == "reinforce"
    and config.reinforce.baseline == "leave_one_out"
    and rollout.samples < 2
  ):
    raise ConfigError(
      "reinforce.baseline leave_one_out needs rollout.samples >= 2, got "
      f"{rollout.samples}; raise it or choose group_mean."
    )
  if (
    config.algorithm == "reinforce"
    and config.reinforce.baseline == "group_mean"
    and rollout.prompts * rollout.samples == groups
  ):
    raise ConfigError(
      "reinforce.baseline group_mean needs at least 2 responses a weighting, "
      f"got rollout.prompts x rollout.samples = {groups} for "
      f"rollout.weightings = {groups}; raise rollout.samples or choose none."
    )
  point = config.eval.reference_point
  if point is not None and len(point) != len(objectives):
    raise ConfigError(
      f"eval.reference_point has {len(point)} values for {len(objectives)} "
      "objectives; give one each, or None for the default."
    )


def _validate_q_and_scalarisation(config: ml_collections.ConfigDict) -> None:
  with as_config_error():
    adapted = adaptation(config)
    scalar = scalarisation(config)
  if adapted is not None and config.weightings.weights is not None:
    raise ConfigError(
      "weightings.adapt needs weights to draw, but weightings.weights fixes "
      "them; leave one of the two out."
    )
  if scalar.utopia is not None and len(scalar.utopia) != len(config.objectives):
    raise ConfigError(
      f"scalarisation.utopia has {len(scalar.utopia)} values for "
      f"{len(config.objectives)} objectives; give one each."
    )
  rollout = config.rollout
  if scalar.name != "linear" and rollout.prompts < 2 * rollout.weightings:
    raise ConfigError(
      f"scalarisation {scalar.name} needs at least 2 prompts a weighting, got "
      f"rollout.prompts = {rollout.prompts} for rollout.weightings = "
      f"{rollout.weightings}; change one of them."
    )


def _validate_ppo(config: ml_collections.ConfigDict) -> None:
  for path in ("ppo.clip", "ppo.value_clip", "ppo.target_kl"):
    value = _get(config, path)
    if value is not None and not value > 0:
      raise ConfigError(f"{path} must be > 0, or None for off, got {value}.")
  for path in ("ppo.discount", "ppo.gae_lambda"):
    if not 0 <= _get(config, path) <= 1:
      raise ConfigError(f"{path} must be in [0, 1], got {_get(config, path)}.")


def _validate_data(data: ml_collections.ConfigDict) -> None:
  if (data.task is None) == (data.train is None):
    raise ConfigError(
      f"set exactly one of data.task and data.train, got {data.task!r} and "
      f"{data.train!r}; the other is None. For files of your own start from "
      "configs/jsonl.py."
    )
  if data.train is None:
    for name in ("eval", "train"):
      if data[name] is not None:
        raise ConfigError(
          f"data.{name} = {data[name]!r} is for JSONL data, but data.task = "
          f"{data.task!r} is set; set data.eval_split, or data.train instead "
          "of data.task."
        )
  elif data.use_cached:
    raise ConfigError(
      "data.use_cached is for a data.task that seqio_cache_tasks has cached; "
      "JSONL files are read as they are."
    )
  if data.template is not None:
    with as_config_error():
      check_template(data.template)


def to_json(config: ml_collections.ConfigDict) -> dict:
  """The config as plain JSON values; tuples become lists."""
  return json.loads(config.to_json_best_effort())


def from_json(values: dict) -> ml_collections.ConfigDict:
  """The inverse of `to_json`: lists become tuples again."""

  def convert(value):
    if isinstance(value, dict):
      return {key: convert(v) for key, v in value.items()}
    return tuple(value) if isinstance(value, list) else value

  return ml_collections.ConfigDict(convert(values))


def _one_of(path, value, allowed):
  if value not in allowed:
    raise ConfigError(
      f"{path} must be one of {', '.join(allowed)}, got {value!r}."
    )


def _get(config, path):
  for name in path.split("."):
    config = config[name]
  return config

"""Makes the objects that a config describes, and checks it: `validate`."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from clp_jax import adapters, prompting, sharding
from clp_jax import bank as bank_lib
from clp_jax.adaptation import Adaptation
from clp_jax.algorithms import ppo, reinforce
from clp_jax.data.tokenizer import Tokenizer, parse_template
from clp_jax.errors import ConfigError, as_config_error, check_choice
from clp_jax.models.families import Config as ModelConfig
from clp_jax.models.presets import PRESETS
from clp_jax.rewards import base
from clp_jax.scalarisation import Scalarisation
from clp_jax.weightings import Distribution

ALGORITHMS = ("reinforce", "ppo")
BASELINES = (*reinforce.BASELINES, "learned")
OPTIMIZERS = ("adam", "adafactor")
NORMALISATIONS = ("none", "fixed", "running")
HEADS = ("linear", "token")
MIXINGS = ("parameters", "logits")


def make_mesh(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh as the config's `mesh` describes it; devices None are
  jax.devices().

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
  config: ml_collections.ConfigDict, model_config: ModelConfig
) -> bank_lib.Bank:
  """How the config, a valid one, conditions the model of the reference on
  weightings."""
  own, steering = config.conditioning, config.steering
  _one_of("conditioning.kl_set", own.kl_set, bank_lib.KL_SETS)
  if own.shared is not None:
    _one_of("conditioning.shared", own.shared, bank_lib.SHARED)
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
  config: ml_collections.ConfigDict, vocabulary: Tokenizer, vocab_size: int
) -> prompting.Prompts | None:
  """The prompt format of a valid config, or None without one, for the model's
  vocabulary and the rows V of its embedding.

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
        vocabulary.control_ids(vocab_size),
        q.num_rewards,
        own.levels,
        q.alpha_range,
        vocabulary.pad_id,
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
  return Scalarisation(**config.scalarisation)


def has_critic(config: ml_collections.ConfigDict) -> bool:
  """Whether values are learned."""
  return config.algorithm == "ppo" or config.reinforce.baseline == "learned"


def ppo_settings(config: ml_collections.ConfigDict) -> ppo.Settings:
  """What an update with a critic does."""
  if config.algorithm != "ppo":
    return ppo.REINFORCE
  return ppo.Settings(**config.ppo)


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


# What a field by itself must be.
_ONE_OF = {
  "algorithm": ALGORITHMS,
  "steering": bank_lib.STEERING,
  "prompting.style": prompting.STYLES,
  "mixing": MIXINGS,
  "reinforce.baseline": BASELINES,
  "optimizer.name": OPTIMIZERS,
  "reward_model.head": HEADS,
}
_POSITIVE = (
  "data.source_length data.target_length rollout.prompts rollout.samples "
  "rollout.weightings optimizer.learning_rate optimizer.clip_norm "
  "prompting.levels train.microbatches train.checkpoint_every train.keep "
  "train.log_samples_every train.normalisation_batches sft.batch "
  "sft.learning_rate sft.checkpoint_every rollout.temperature "
  "reward_model.batch reward_model.learning_rate "
  "reward_model.checkpoint_every eval.prompts eval.samples eval.batch "
  "mesh.replica mesh.model critic.hidden critic.learning_rate"
).split()
_NOT_NEGATIVE = (
  "train.steps optimizer.warmup_steps sft.steps sft.warmup_steps "
  "reward_model.steps reward_model.warmup_steps adapters.orthogonality "
  "eval.temperature"
).split()
_POSITIVE_OR_NONE = ("soft_tokens.length",)
_NOT_NEGATIVE_OR_NONE = (
  "optimizer.decay_steps sft.decay_steps reward_model.decay_steps"
).split()


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks a config before anything is loaded or written.

  Raises:
    ConfigError: says what was found and what to change.
  """
  _check_fields(config)
  _check_model_and_data(config)
  _check_objectives(config)
  try:
    distribution(config)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"weightings: {error}") from error
  with as_config_error():
    # Whatever the model, its checks are the same.
    computed = {name: config.model[name] for name in ("dtype", "remat")}
    bank(config, dataclasses.replace(PRESETS["tiny"], **computed))
    adapted, scalar = adaptation(config), scalarisation(config)
    ppo.Settings(**config.ppo)  # whether or not the algorithm reads them
  if (
    config.conditioning.kl_set == "frozen"
    and config.weightings.alpha_range is None
  ):
    raise ConfigError(
      "conditioning.kl_set = frozen, but with one alpha there is no set for "
      "the KL term; give weightings.alpha_range, or leave kl_set=trained."
    )
  if adapted is not None and config.weightings.weights is not None:
    raise ConfigError(
      "weightings.adapt needs weights to draw, but weightings.weights fixes "
      "them; leave one of the two out."
    )
  share = config.prompting.sft_share
  if share and config.prompting.style == "none":
    raise ConfigError(
      f"prompting.sft_share = {share}, but prompting.style = none writes no "
      "prompts; choose a style, or leave sft_share=0."
    )
  for path, values in (
    ("scalarisation.utopia", scalar.utopia),
    ("eval.reference_point", config.eval.reference_point),
  ):
    if values is not None and len(values) != len(config.objectives):
      raise ConfigError(
        f"{path} has {len(values)} values for {len(config.objectives)} "
        "objectives; give one each"
        + (", or None for the default." if path.startswith("eval") else ".")
      )
  _check_rollout(config)


def _check_fields(config: ml_collections.ConfigDict) -> None:
  """Rules of one field each, of sections that no dataclass checks."""
  for path, allowed in _ONE_OF.items():
    _one_of(path, _get(config, path), allowed)
  if config.mixing != "parameters":
    raise ConfigError(
      "mixing = 'logits' combines policies that are trained already; train "
      "with 'parameters', or make a mixture as docs/experiments.md says."
    )
  if not 0 <= config.seed < 2**32:
    raise ConfigError(f"seed must be in [0, 2**32), got {config.seed}.")
  for path in (*_POSITIVE, *_given(config, _POSITIVE_OR_NONE)):
    value = _get(config, path)
    if value is None or not value > 0:  # also false for NaN
      raise ConfigError(f"{path} must be > 0, got {value}.")
  for path in (*_NOT_NEGATIVE, *_given(config, _NOT_NEGATIVE_OR_NONE)):
    value = _get(config, path)
    if value is None or not value >= 0:
      raise ConfigError(f"{path} must be >= 0, got {value}.")
  for path in ("sft.dropout", "reward_model.dropout"):
    value = _get(config, path)
    if not 0 <= value < 1:
      raise ConfigError(f"{path} must be in [0, 1), got {value}.")
  share = config.prompting.sft_share
  if not 0 <= share <= 1:
    raise ConfigError(f"prompting.sft_share must be in [0, 1], got {share}.")
  if config.eval.grid < 2:
    raise ConfigError(f"eval.grid must be at least 2, got {config.eval.grid}.")


def _check_objectives(config: ml_collections.ConfigDict) -> None:
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
  _check_starts(config)


def _check_rollout(config: ml_collections.ConfigDict) -> None:
  """Whether a step's prompts can be divided, and baselines have enough."""
  rollout = config.rollout
  groups = rollout.weightings
  for minibatches in (
    {},
    {"ppo.minibatches": ppo_settings(config).minibatches},
  ):
    parts = {"rollout.weightings": groups, **minibatches}
    parts["train.microbatches"] = config.train.microbatches
    if rollout.prompts % math.prod(parts.values()):
      raise ConfigError(
        f"rollout.prompts = {rollout.prompts} is not a multiple of "
        f"{' x '.join(parts)} = {' x '.join(map(str, parts.values()))}; change "
        "one of them."
      )
  name = config.scalarisation.name
  if name != "linear" and rollout.prompts < 2 * groups:
    raise ConfigError(
      f"scalarisation {name} needs at least 2 prompts a weighting, got "
      f"rollout.prompts = {rollout.prompts} for rollout.weightings = {groups}; "
      "change one of them."
    )
  if rollout.ahead not in (0, 1):
    raise ConfigError(
      f"rollout.ahead must be 0 or 1, got {rollout.ahead}; 1 samples the next "
      "step's responses while the host scores this one's."
    )
  if rollout.ahead and config.algorithm != "ppo":
    raise ConfigError(
      "rollout.ahead = 1 learns from policies of the step before, which PPO's "
      f"ratio corrects and algorithm = {config.algorithm} does not; set "
      "algorithm=ppo or rollout.ahead=0."
    )
  if config.algorithm == "ppo":
    if config.ppo.leave_one_out and rollout.samples < 2:
      raise ConfigError(
        "ppo.leave_one_out needs rollout.samples >= 2, got "
        f"{rollout.samples}; raise it or set ppo.leave_one_out=False."
      )
    return
  baseline = config.reinforce.baseline
  if baseline == "leave_one_out" and rollout.samples < 2:
    raise ConfigError(
      "reinforce.baseline leave_one_out needs rollout.samples >= 2, got "
      f"{rollout.samples}; raise it or choose group_mean."
    )
  if baseline == "group_mean" and rollout.prompts * rollout.samples == groups:
    raise ConfigError(
      "reinforce.baseline group_mean needs at least 2 responses a weighting, "
      f"got rollout.prompts x rollout.samples = {groups} for "
      f"rollout.weightings = {groups}; raise rollout.samples or choose none."
    )


def _check_starts(config: ml_collections.ConfigDict) -> None:
  starts = config.adapters.init
  if starts is None:
    return
  if config.steering != "lora":
    raise ConfigError(
      f"adapters.init is of steering lora, got {config.steering}; set "
      "steering=lora, or leave it out."
    )
  if config.sft.steps:
    raise ConfigError(
      f"adapters.init adapts model.init, but sft.steps = {config.sft.steps} "
      "finetunes that first; set sft.steps=0."
    )
  if len(starts) != len(config.objectives):
    raise ConfigError(
      f"adapters.init names {len(starts)} folders for "
      f"{len(config.objectives)} objectives; give one each, in their order."
    )


def _check_model_and_data(config: ml_collections.ConfigDict) -> None:
  data = config.data
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
      parse_template(data.template)
  if config.model.init is None:
    raise ConfigError(
      "model.init is not set; give the folder of a model, or a preset's name "
      "to start from random parameters."
    )


def _one_of(path, value, allowed):
  with as_config_error():
    check_choice(path, value, allowed)


def _given(config, paths):
  return [path for path in paths if _get(config, path) is not None]


def _get(config, path):
  for name in path.split("."):
    config = config[name]
  return config

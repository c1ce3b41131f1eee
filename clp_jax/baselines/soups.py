"""Rewarded Soups: separately finetuned policies, averaged with the weights.

A soup is a policy all of whose leaves are steerable and whose parameter sets
are the finetuned policies, so that everything that works on a trained policy
(evaluation, generation, export) works on it. Where alpha varies, the last set
is the reference, and the others were finetuned at the least alpha: then the
soup interpolates between the two, by `weightings.realignment`.

parts.json in its folder says what it was made of: of each run the folder, the
step, a digest of the parameters, the moments of its reward, and how many
responses its training has sampled.

Source: Rame et al. 2023 (arXiv 2306.04488).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from clp_jax import adapter_folders, build, run_folder, saved_params
from clp_jax import config as config_lib
from clp_jax.data.tokenizer import Tokenizer
from clp_jax.errors import ConfigError, as_config_error
from clp_jax.initial import load_initial
from clp_jax.interop import hub, peft
from clp_jax.interop.storage import Folder
from clp_jax.models import families
from clp_jax.policy import Policy

Params = Any


class Part(NamedTuple):
  """A finetuned policy.

  Attributes:
    workdir: its folder.
    config: of its run; None of an adapter, which has none.
    step: updates that it has seen, where that is known, or 0.
    params: an ordinary model's.
    reference: what it was finetuned from.
    model_config: of both.
    vocabulary: of the model.
    moments: [mean, deviation] of its reward, where it was normalised.
  """

  workdir: str
  config: ml_collections.ConfigDict | None
  step: int
  params: Params
  reference: Params
  model_config: families.Config
  vocabulary: Tokenizer
  moments: list[float] | None


def stack(policies: list[Params]) -> Params:
  """m ordinary parameter trees [...] to one of steerable leaves [m, ...]."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *policies)


def make_soup(
  config: ml_collections.ConfigDict,
  runs: Mapping[str, str],
  workdir: str,
) -> None:
  """Writes the run folder of a soup, or finds it written; see `combine`."""
  combine(config, runs, workdir, mixing="parameters")


def config_of(
  runs: Mapping[str, str],
  config: ml_collections.ConfigDict | None = None,
  *,
  steers_alpha: bool = False,
) -> ml_collections.ConfigDict:
  """The config of what `combine` makes of runs, in their order.

  Args:
    runs: objective -> folder of the run, or of peft's adapter, that was
      finetuned for it alone.
    config: whose data, weightings and evaluation it has, and the rewards of
      what it describes; None takes those of the first run.
    steers_alpha: whether it has the reference for a set, from the runs' alpha
      to the reference itself at alpha 1.

  Raises:
    RunError: when one can't be read.
    ConfigError: when one is of other rewards, or there are only adapters and
      no config.
  """
  owns = {
    name: run_folder.load_config(folder)
    for name, folder in runs.items()
    if not peft.is_adapter(folder)
  }
  for name, own in owns.items():
    _check_objective(runs[name], own, name)
  first = next(iter(owns.values()), None)
  made = first if config is None else config
  if made is None:
    raise ConfigError(
      f"{', '.join(runs.values())} are adapters, which say nothing of data and "
      "rewards; give --config."
    )
  made = made.copy_and_resolve_references()
  made.unlock()
  for name in runs:
    if name in owns and (config is None or name not in made.rewards):
      made.rewards[name] = owns[name].rewards[name]
    if name not in made.rewards:
      raise ConfigError(
        f"nothing says what the reward {name} is; give a --config that "
        "describes it under rewards."
      )
  made.objectives = tuple(runs)
  if config is None:
    made.weightings.weights = None  # those of one reward
    made.weightings.alpha_range = None
    made.scalarisation.utopia = None
    points = [own.eval.reference_point for own in owns.values()]
    made.eval.reference_point = (
      tuple(x for point in points for x in point)
      if len(points) == len(runs) and None not in points
      else None
    )
  if steers_alpha and made.weightings.alpha_range is None:
    least = (made if first is None else first).weightings.alpha
    made.weightings.alpha_range = (least, 1.0)
  with as_config_error():
    build.distribution(made)
  return made


def _check_objective(
  folder: str, own: ml_collections.ConfigDict, name: str
) -> None:
  """Raises ConfigError unless a run was finetuned for this reward alone."""
  if "objectives" not in own:
    raise ConfigError(
      f"{folder} is a supervised run; this needs one that was finetuned for "
      f"{name} alone."
    )
  alphas = own.weightings.alpha_range
  if tuple(own.objectives) != (name,) or alphas is not None:
    raise ConfigError(
      f"{folder} is a run on {', '.join(own.objectives)}"
      + ("" if alphas is None else " and a range of alpha")
      + f"; this needs one on {name} alone, at one alpha."
    )


def combine(
  config: ml_collections.ConfigDict,
  runs: Mapping[str, str],
  workdir: str,
  *,
  mixing: str,
  reference: str | None = None,
) -> None:
  """Writes, or finds, the folder of a policy that is made of finetuned ones.

  Args:
    config: whose objectives, data, rewards, weightings and evaluation it has.
    runs: objective -> folder of the run that was finetuned for it alone; all
      of them from one reference.
    workdir: the folder to write.
    mixing: "parameters" or "logits", what a weighting combines.
    reference: a folder that holds a T5 (a run's, or a checkpoint's) to take
      for the runs' own reference; None takes theirs.

  Raises:
    ConfigError: when the parts do not fit the objectives, one another or the
      config, or the folder holds what was made of others.
  """
  if set(runs) != set(config.objectives):
    raise ConfigError(
      f"this needs one finetuned run for each of "
      f"{', '.join(config.objectives)}, got {', '.join(runs) or 'none'}."
    )
  config = ml_collections.ConfigDict(config).copy_and_resolve_references()
  config.steering = "full"
  config.algorithm = "none"  # these sets are not trained together
  config.mixing = mixing
  config.conditioning.kl_set = "trained"  # stored, as the others are
  config.conditioning.shared = None
  config.soft_tokens.length = None
  config.prompting.style = "none"
  config.prompting.sft_share = 0.0
  alpha_varies = config.weightings.alpha_range is not None
  if alpha_varies:
    config.weightings.kl_coefficient = "realigned"
  parts: list[Part] = []
  for name in config.objectives:
    parts.append(_load_part(config, name, runs[name]))
    _check_part(config, name, parts[-1], parts[0])
  first = parts[0]
  sets = [part.params for part in parts]
  start = first.reference
  if reference is not None:
    start = _load_reference(config, reference, first)
  made_of = [
    _part(name, part.workdir, part.step, part.params)
    | {"moments": part.moments, "samples": _samples(part)}
    for name, part in zip(config.objectives, parts, strict=True)
  ]
  last = _part("reference", reference or first.workdir, 0, start)
  made_of.append(last | {"samples": 0})
  _check_made_of(workdir, made_of)
  if alpha_varies:
    sets.append(start)
  # Nothing is written before all of it fits.
  run_folder.start(workdir, config)
  run_folder.write_json(run_folder.folder(workdir) / run_folder.PARTS, made_of)
  if not run_folder.has_model(workdir):
    run_folder.save_model(workdir, first.model_config, first.vocabulary, start)
  step = sum(part.step for part in parts)
  if saved_params.newest_step(workdir) != step:
    saved_params.save_params(workdir, step, stack(sets))


def _load_part(
  config: ml_collections.ConfigDict, name: str, folder: str
) -> Part:
  if peft.is_adapter(folder):
    return _load_adapter(config, folder)
  _check_objective(folder, run_folder.load_config(folder), name)
  policy = Policy.load(folder)
  with as_config_error():  # whatever the steering, of one set
    params = policy.params()
  return Part(
    folder,
    policy.config,
    policy.step,
    params,
    policy.reference,
    policy.model_config,
    policy.vocabulary,
    _moments(policy),
  )


def _load_adapter(config: ml_collections.ConfigDict, folder: str) -> Part:
  with as_config_error():
    base = peft.base_of(folder)
  config = config.copy_and_resolve_references()
  if base and (Folder(base).has("config.json") or hub.cached(base)):
    config.model.init = base
  else:
    adapter_folders.check_base(folder, base, config.model.init)
  model_config, reference, vocabulary = load_initial(config)
  with as_config_error():
    lora = peft.load(folder, model_config)
  params = adapter_folders.merge(lora, reference)
  return Part(
    folder, None, 0, params, reference, model_config, vocabulary, None
  )


def _moments(part: Policy) -> list[float] | None:
  """[mean, deviation] of the part's reward, where it was normalised."""
  (name,) = part.objectives
  if part.config.rewards[name].normalise == "none":
    return None
  stats = saved_params.load_reward_stats(part.workdir, part.step, 1)
  if stats is None or not stats.count[0]:
    return None
  return [float(stats.mean[0]), float(stats.deviation()[0])]


def _samples(part: Part) -> int | None:
  """Responses that its training has sampled; None of an adapter, which does not
  say."""
  if part.config is None:
    return None
  return run_folder.training_samples(part.workdir, part.config, part.step)


def _part(name: str, folder: str, step: int, params: Params) -> dict[str, Any]:
  """What parts.json says of a part; its digest is of the values."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.ascontiguousarray(jax.device_get(leaf))
    where = jax.tree_util.keystr(path)
    digest.update(f"{where} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return {
    "part": name,
    "folder": folder,
    "step": step,
    "digest": digest.hexdigest()[:16],
  }


def _check_made_of(workdir: str, new: list[dict[str, Any]]) -> None:
  """Raises ConfigError where a folder was made of other parts."""
  file = run_folder.folder(workdir) / run_folder.PARTS
  if not file.exists():
    if saved_params.newest_step(workdir) is not None:
      raise ConfigError(
        f"{workdir} holds checkpoints and no {run_folder.PARTS} that says what "
        "they were made of; choose another folder, or delete this one."
      )
    return
  old = json.loads(file.read_text())

  # Wherever their folders are now; older versions did not count samples.
  free = {"folder": None, "samples": None}

  def those_not_in(others, parts):
    known = [part | free for part in others]
    return ", ".join(
      "{part} {folder} at step {step} ({digest})".format(**part)
      for part in parts
      if part | free not in known
    )

  if there := those_not_in(new, old):
    raise ConfigError(
      f"{workdir} was made of other parts ({there} there, "
      f"{those_not_in(old, new)} here); choose another folder, or delete this "
      "one."
    )


def _check_part(
  config: ml_collections.ConfigDict, name: str, part: Part, first: Part
) -> None:
  _check_shape(part.workdir, part.model_config, first)
  if not _equal(part.reference, first.reference):
    raise ConfigError(
      f"{part.workdir} and {first.workdir} start from different models; their "
      "average means nothing. Finetune both from one model.init."
    )
  if part.config is None:
    return
  alpha_range, own = config.weightings.alpha_range, part.config
  if alpha_range is not None and own.weightings.alpha != alpha_range[0]:
    raise ConfigError(
      f"{part.workdir} was finetuned at alpha "
      f"{own.weightings.alpha:g}; to be steered from there to the "
      f"reference it must be the least of weightings.alpha_range, "
      f"{alpha_range[0]:g}."
    )
  found, asked = (
    run_folder.decisive(config_lib.to_json(c)) for c in (own, config)
  )
  for path in (
    *("rollout.temperature", f"rewards.{name}.normalise"),
    *("prompting.style", "soft_tokens.length", "data.template"),
    *(["weightings.alpha"] if alpha_range is None else []),
  ):
    if found[path] != asked[path]:
      raise ConfigError(
        f"{part.workdir} was finetuned with {path} = {found[path]}, and what "
        f"is made of it here has {asked[path]}; take a run with that, or "
        "change the config."
      )


def _load_reference(
  config: ml_collections.ConfigDict, reference: str, first: Part
) -> Params:
  """Another reference's parameters, where it fits the finetuned policies."""
  config = config.copy_and_resolve_references()
  config.model.init = reference
  initial = load_initial(config)
  if initial.vocabulary.files() != first.vocabulary.files():
    raise ConfigError(
      f"the reference {reference} has another vocabulary than {first.workdir}; "
      "their logits are of different tokens. Take one that the run was "
      "finetuned from, or that shares its SentencePiece model."
    )
  _check_shape(reference, initial.model_config, first)
  return initial.params


def _check_shape(name: str, model_config: families.Config, first: Part) -> None:
  own, other = vars(first.model_config), vars(model_config)
  differing = [
    f"{field} = {other[field]!r} and {own[field]!r}"
    for field in own
    if other[field] != own[field]
  ]
  if differing:
    raise ConfigError(
      f"{name} and {first.workdir} are of different shapes "
      f"({'; '.join(differing)}); combine models of one shape."
    )


def _equal(a: Params, b: Params) -> bool:
  return jax.tree.all(jax.tree.map(jnp.array_equal, a, b))

"""A run's adapters as folders of the `peft` library, and a run of such.

Every kind of adapters is linear in the coefficients of a weighting, so that
each parameter set is a LoRA of its own, and a weighting is their sum by the
coefficients: `add_weighted_adapter` with combination_type "cat". For svd_lora,
whose first singular values all sets share, that holds as the coefficients of
the sets that add something sum to the share of those values.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from clp_jax import build, interop, keys, run_folder
from clp_jax.errors import ConfigError, as_config_error
from clp_jax.initial import load_model_config
from clp_jax.interop import hub, leaves, peft, storage
from clp_jax.models import families, trees
from clp_jax.policy import Policy
from clp_jax.weightings import Weights

Params = Any

BASE = "base"  # the folder of the model that is adapted
KL_SET = "kl"  # the name of the set of the KL term
_VLLM_RANKS = (8, 16, 32, 64, 128, 256)  # what --max-lora-rank may be


def names(policy: Policy) -> list[str]:
  """Those of the adapters of a run, in the order of its coefficients.

  Raises:
    ValueError: when its policies are no base with adapters.
  """
  policy.check_is_ordinary()
  if policy.bank.adapter is None:
    steering = policy.config.get("steering", "none")
    raise ValueError(
      f"this run's steering is {steering}, which has no adapters; train one "
      "with steering lora or svd_lora, or export a weighting as hf."
    )
  found = list(policy.objectives)
  if policy.bank.num_sets - policy.bank.frozen_kl > len(found):
    found.append(KL_SET)
  for name in found:
    if name == BASE or found.count(name) > 1:
      raise ValueError(
        f"an objective named {name} would share a folder with "
        + ("the base." if name == BASE else "the set of the KL term.")
      )
  return found


def save(
  policy: Policy,
  path: str,
  weights: Weights | None = None,
  alpha: float | None = None,
  *,
  dtype: str = "float32",
) -> tuple[str, str]:
  """Writes a run's adapters and what they adapt.

  Args:
    policy: of steering lora or svd_lora.
    path: the folder: an adapter's own where a weighting is given; else it
      holds a folder NAME for each objective, and kl where the run has a set
      for the KL term. Where the base is not a Hugging Face folder already, or
      on the Hub, base/ is that, with the tokenizer.
    weights: one weighting; with None and no alpha, all sets.
    alpha: likewise.
    dtype: of what is written.

  Returns:
    A title, and how they are loaded, as markdown.

  Raises:
    ValueError: see `names`, and `Policy.coefficients`.
  """
  adapters = names(policy)
  target = storage.absolute(path)
  target.mkdir(parents=True, exist_ok=True)
  base = _base(policy)
  if base is None:
    _save_base(policy, target / BASE, dtype)
  found = {}
  if weights is None and alpha is None:
    # A set that is frozen at the base comes last, and adds nothing.
    for name, row in zip(
      adapters, np.eye(policy.bank.num_sets, dtype=np.float32), strict=False
    ):
      found[target / name] = row
  else:
    found[target] = policy.coefficients(weights, alpha)
  assert policy.bank.adapter is not None
  rank = 0
  for folder, coefficients in found.items():
    factors = _factors(policy, coefficients, dtype)
    rank = next(iter(factors.values()))[0].shape[1]  # of all of them
    peft.save(
      folder,
      policy.model_config,
      factors,
      policy.bank.adapter.scale,
      *hub.split(base or str(target / BASE)),
    )
  return _usage(policy, adapters, base or BASE, weights, alpha, rank)


def _factors(
  policy: Policy, coefficients: np.ndarray, dtype: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """By the path of a kernel, stacked layers taken apart."""
  adapter = policy.bank.adapter
  assert adapter is not None
  kernels: dict[str, dict[str, np.ndarray]] = {}
  for path, leaf in leaves.flatten(policy.sets).items():
    module, _, name = path.rpartition("/")
    if adapter.adapts((*module.split("/"), "kernel")) and name != "kernel":
      kernels.setdefault(module, {})[name] = leaf
  found = {}
  for module, own in kernels.items():
    left, right = (x.astype(dtype) for x in adapter.factors(own, coefficients))
    if "/layers/" not in module:
      found[f"{module}/kernel"] = left, right
      continue
    stack, rest = module.split("/layers/")
    for i in range(len(left)):
      found[f"{stack}/layers_{i}/{rest}/kernel"] = left[i], right[i]
  return found


def _base(policy: Policy) -> str | None:
  """The Hugging Face folder that the adapters are of, or its name on the Hub;
  None without one."""
  config = policy.config
  init = config.model.init
  is_its_own = (
    policy.bank.frozen_shared
    and not config.sft.steps
    and config.model.vocabulary is None
    and not run_folder.has_model(init)
    and peft.is_base(hub.cached(init) or init)
  )
  if not is_its_own:
    return None
  return init if hub.is_name(init) else str(storage.absolute(init))


def _save_base(policy: Policy, path: epath.Path, dtype: str) -> None:
  """The reference, or what of it was trained for all weightings."""
  trained = leaves.flatten(policy.sets)
  params = {
    name: trained.get(name, leaf).astype(dtype)
    for name, leaf in leaves.flatten(policy.reference).items()
  }
  interop.save_model(
    path,
    policy.model,
    leaves.unflatten(params),
    "hf",
    tokenizer=policy.vocabulary,
  )


def _usage(
  policy: Policy,
  adapters: list[str],
  base: str,
  weights: Weights | None,
  alpha: float | None,
  rank: int,
) -> tuple[str, str]:
  _, auto = peft.task(policy.model_config)
  init = base if base != BASE else f"DIR/{BASE}"
  base, revision = hub.split(base)
  given = "base" if revision is None else f"base, revision={revision!r}"
  lines = [
    "from peft import PeftModel",
    f"from transformers import {auto}, AutoTokenizer",
    "",
    f"base = {base!r}",
    f"tokenizer = AutoTokenizer.from_pretrained({given})",
    f"model = {auto}.from_pretrained({given})",
  ]
  if weights is None and alpha is None:
    title = "LoRA adapters, one for each objective"
    about = (
      f"Adapters of {', '.join(adapters)}. For a weighting they are added with "
      "its weights:"
    )
    parts = {name: f"DIR/{name}" for name in policy.objectives}
    these, served = "them", "an objective's adapter by itself"
    module = f"{adapters[0]}=DIR/{adapters[0]}"
    more = ", and that of a weighting from `clp export --weights`"
    lines += _recipe(policy, adapters)
  else:
    title = "A LoRA adapter of one weighting"
    about = f"Of {described(policy.objectives, weights, alpha)}:"
    lines.append('model = PeftModel.from_pretrained(model, ".")')
    parts = {"NAME": "DIR"}
    these = served = "it"
    module, more = "NAME=DIR", ""
  code = "\n".join(lines)
  usage = [f"{about}\n\n```python\n{code}\n```\n\nRun it in this folder."]
  if auto == "AutoModelForCausalLM":
    most = next((r for r in _VLLM_RANKS if r >= rank), None)
    usage.append(
      f"vLLM serves {served} with `--enable-lora --max-lora-rank {most} "
      f"--lora-modules {module}`{more}."
      if most
      else f"vLLM serves no adapter of rank {rank}; export a weighting as hf."
    )
  together = " ".join(f"{name}={folder}" for name, folder in parts.items())
  usage.append(
    f"In clp_jax a LoRA run starts from {these} with `--config.steering=lora "
    f"--config.model.init={init} --config.sft.steps=0 --config.adapters.rank="
    f'{rank} --config.adapters.init="{tuple(parts.values())}"`, and '
    f"`clp combine {together} --method soup --config FILE --output RUN` takes "
    f"{these}, too."
  )
  return title, "\n\n".join(usage)


def described(
  objectives: Sequence[str], weights: Weights | None, alpha: float | None
) -> str:
  """ "nli = 0.7, rouge = 0.3, alpha = 0.1"; the only objective needs no
  weights."""
  given = dict(weights or {objectives[0]: 1.0})
  if alpha is not None:
    given["alpha"] = alpha
  return ", ".join(f"{name} = {value:g}" for name, value in given.items())


def _recipe(policy: Policy, adapters: list[str]) -> list[str]:
  objectives = policy.objectives
  share = {name: round(1 / len(objectives), 3) for name in objectives}
  share[objectives[-1]] = round(1 - sum(list(share.values())[:-1]), 3)
  shares = ", ".join(f'"{name}": {x:g}' for name, x in share.items())
  lines = [f"weights = {{{shares}}}  # at least 0, of sum 1"]
  q = policy.config.weightings
  if q.alpha_range is not None:
    low, high = q.alpha_range
    lines.append(f"alpha = {low}  # {low:g} to {high:g}")
    if q.kl_coefficient == "realigned":
      lines.append(
        f"kl = 1 - (1 - alpha) / alpha / {(1 - low) / low}  # 0 at alpha = "
        f"{low:g}"
      )
    else:
      lines.append("kl = alpha")
    lines.append(
      "weights = {name: (1 - kl) * w for name, w in weights.items()}"
    )
    if KL_SET in adapters:
      lines.append(f'weights["{KL_SET}"] = kl')
  first, *others = adapters
  lines.append(
    f'model = PeftModel.from_pretrained(model, "{first}", '
    f'adapter_name="{first}")'
  )
  for name in others:
    lines.append(f'model.load_adapter("{name}", adapter_name="{name}")')
  return [
    *lines,
    "model.add_weighted_adapter(",
    '  list(weights), list(weights.values()), "mixed", combination_type="cat"',
    ")",
    'model.set_adapter("mixed")',
  ]


def load_starts(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
  """The factors that a run's first sets are to have: of `adapters.init`.

  Args:
    config: of a run of steering lora that names some, valid.

  Returns:
    {path of a trained leaf: [m, ...] float32}, of m objectives.

  Raises:
    ConfigError: when a folder holds no adapter of the run's base and rank, or
      one of other kernels than the run's. Those it lacks start at the base.
  """
  model_config = load_model_config(config)
  shapes = leaves.flatten(families.build(model_config).abstract())
  adapter = build.bank(config, model_config).adapter
  assert adapter is not None
  kernels = [p for p in shapes if adapter.adapts(tuple(p.split("/")))]
  with as_config_error():
    loras = [peft.load(path, model_config) for path in config.adapters.init]
  for lora in loras:
    check_base(lora.folder, lora.base, config.model.init)
    if lora.rank != adapter.rank:
      raise ConfigError(
        f"{lora.folder} has rank {lora.rank}, and this run {adapter.rank}; set "
        f"adapters.rank={lora.rank}, or take others."
      )
    _check_targets(lora, kernels, model_config)
  found = {}
  key = jax.random.fold_in(jax.random.key(config.seed), keys.BANK)
  for number, path in enumerate(kernels):
    own = jax.random.fold_in(key, number)
    # What adapters lack stays so: the base, until it is trained.
    for name, leaf in adapter.init(shapes[path], len(loras), own).items():
      found[_beside(path, name)] = np.array(leaf)
  for i, lora in enumerate(loras):
    scale = np.float32(lora.scale / adapter.scale)
    for path, (left, right) in lora.factors.items():
      at: tuple[int, ...] = (i,)
      if path not in shapes:
        path, layer = _of_layers(path)
        at = i, layer
      found[_beside(path, "lora_a")][at] = left
      found[_beside(path, "lora_b")][at] = right * scale
  return found


def _beside(path: str, name: str) -> str:
  """The path of a kernel's leaf of factors."""
  return f"{path.removesuffix('/kernel')}/{name}"


def start_from(params: Params, starts: Mapping[str, np.ndarray]) -> Params:
  """A run's sets, placed, before the first update, with all objectives' factors
  of `load_starts`. A set of the KL term is left as it is."""
  flat = leaves.flatten(params)
  old = {path: flat[path] for path in starts}

  def replaced(old, starts):
    return {
      path: jnp.concatenate([first, old[path][len(first) :]])
      for path, first in starts.items()
    }

  shardings = {path: leaf.sharding for path, leaf in old.items()}
  new = jax.jit(replaced, out_shardings=shardings)(old, dict(starts))
  return leaves.unflatten(flat | new)


def merge(lora: peft.LoRA, base: Params) -> Params:
  """An ordinary model's parameters: a base's, its layers listed or stacked,
  with the kernels that a LoRA of that model adapts."""
  flat = leaves.flatten(trees.unstack_layers(base))
  for path, factors in lora.factors.items():
    flat[path] = flat[path] + np.float32(lora.scale) * np.matmul(*factors)
  merged = leaves.unflatten(flat)
  is_stack = any("layers" in stack for stack in base.values())
  return trees.stack_layers(merged) if is_stack else merged


def check_base(folder: str, base: str, init: str) -> None:
  """Raises ConfigError unless an adapter's base is the model of `model.init`.

  A base that is no folder here is known by its name: the last part, or all of
  it where both are the Hub's, and its revision where it says one.
  """
  if not base:
    return
  here, there = (os.path.realpath(hub.cached(x) or x) for x in (init, base))
  is_same = here == there
  if not is_same and not os.path.isdir(base):
    names = [_model_name(x) for x in (init, base)]
    if not all("/" in name for name in names):
      names = [name.rpartition("/")[2] for name in names]
    revision = hub.split(base)[1]
    is_other = hub.is_name(init) and revision != hub.split(init)[1]
    is_same = names[0] == names[1] and not (revision and is_other)
  if not is_same:
    raise ConfigError(
      f"{folder} adapts {base}, and model.init is {init}; set model.init to "
      "that, take adapters of one base, or correct base_model_name_or_path in "
      f"its {peft.CONFIG}."
    )


def _model_name(path: str) -> str:
  """org/name of what the Hub has, which its cache's folders
  models--org--name/snapshots/REVISION tell too; else the last part."""
  if hub.is_name(path):
    return hub.split(path)[0]
  *_, repo, snapshots, _ = ["", "", *os.path.normpath(path).split("/")]
  if snapshots == "snapshots" and repo.startswith("models--"):
    return repo.removeprefix("models--").replace("--", "/")
  return os.path.basename(os.path.normpath(path))


def _check_targets(
  lora: peft.LoRA, kernels: list[str], config: families.Config
) -> None:
  adapted = {
    one
    for one in leaves.expected_shapes(config)
    if one in kernels or ("/layers_" in one and _of_layers(one)[0] in kernels)
  }
  more = set(lora.factors) - adapted
  if more:
    asked, own = (
      sorted({peft.module_name(config, p).rpartition(".")[2] for p in paths})
      for paths in (adapted, more)
    )
    raise ConfigError(
      f"{lora.folder} adapts {', '.join(own)} too, and this run only "
      f"{', '.join(asked)}; set adapters.targets, or take others."
    )


def _of_layers(path: str) -> tuple[str, int]:
  """ "decoder/layers_3/mlp/wo/kernel" -> "decoder/layers/mlp/wo/kernel", 3."""
  stack, _, rest = path.partition("/layers_")
  layer, _, rest = rest.partition("/")
  return f"{stack}/layers/{rest}", int(layer)

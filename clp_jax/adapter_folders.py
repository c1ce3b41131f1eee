"""A run's adapters as folders of the `peft` library.

Every kind of adapters is linear in the coefficients of a weighting, so that
each parameter set is a LoRA of its own, and a weighting is their sum by the
coefficients: `add_weighted_adapter` with combination_type "cat". For svd_lora,
whose first singular values all sets share, that holds as the coefficients of
the sets that add something sum to the share of those values.
"""

from collections.abc import Mapping

import numpy as np
from etils import epath

from clp_jax import interop, run_folder
from clp_jax.interop import leaves, peft, storage
from clp_jax.policy import Policy, Weights

BASE = "base"  # the folder of the model that is adapted
KL_SET = "kl"  # the name of the set of the KL term
README = "README.md"


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
) -> None:
  """Writes a run's adapters, what they adapt, and how to use them.

  Args:
    policy: of steering lora or svd_lora.
    path: the folder: an adapter's own where a weighting is given; else it
      holds a folder NAME for each objective, and kl where the run has a set
      for the KL term. Where the base is not a Hugging Face folder already,
      base/ is that, with the tokenizer. README.md has the recipe.
    weights: one weighting; with None and no alpha, all sets.
    alpha: likewise.
    dtype: of what is written.

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
  for folder, coefficients in found.items():
    peft.save(
      folder,
      policy.model_config,
      _factors(policy, coefficients, dtype),
      policy.bank.adapter.scale,
      base or str(target / BASE),
    )
  text = _readme(policy, adapters, base or BASE, weights, alpha)
  (target / README).write_text(text)


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
  """The Hugging Face folder that the adapters are of; None without one."""
  config = policy.config
  is_its_own = (
    policy.bank.frozen_shared
    and not config.sft.steps
    and config.model.vocabulary is None
    and not run_folder.has_model(config.model.init)
    and peft.is_base(config.model.init)
  )
  return str(storage.absolute(config.model.init)) if is_its_own else None


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


def _readme(
  policy: Policy,
  adapters: list[str],
  base: str,
  weights: Weights | None,
  alpha: float | None,
) -> str:
  _, auto = peft.task(policy.model_config)
  lines = [
    "from peft import PeftModel",
    f"from transformers import {auto}, AutoTokenizer",
    "",
    f"base = {base!r}",
    "tokenizer = AutoTokenizer.from_pretrained(base)",
    f"model = {auto}.from_pretrained(base)",
  ]
  if weights is None and alpha is None:
    title = "LoRA adapters, one for each objective"
    about = (
      f"Adapters of {', '.join(adapters)}. For a weighting they are added with "
      "its weights:"
    )
    lines += _recipe(policy, adapters)
  else:
    title = "A LoRA adapter of one weighting"
    given = dict(weights or {policy.objectives[0]: 1.0})
    if alpha is not None:
      given["alpha"] = alpha
    about = f"Of {', '.join(f'{k} = {v:g}' for k, v in given.items())}:"
    lines.append('model = PeftModel.from_pretrained(model, ".")')
  data = policy.config.data
  code = "\n".join(lines)
  return (
    f"# {title}\n\n"
    f"From step {policy.step} of a run of clp_jax. {about}\n\n"
    f"```python\n{code}\n```\n\n"
    "Run it in this folder. The policy was trained on prompts of at most "
    f"{data.source_length} tokens and responses of {data.target_length}, a "
    f"prompt made of a document as {_described(data.template)}.\n"
  )


def _recipe(policy: Policy, adapters: list[str]) -> list[str]:
  objectives = policy.objectives
  share = {name: round(1 / len(objectives), 3) for name in objectives}
  share[objectives[-1]] = round(1 - sum(list(share.values())[:-1]), 3)
  lines = [f"weights = {_dict(share)}  # at least 0, of sum 1"]
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


def _dict(values: Mapping[str, float]) -> str:
  return "{" + ", ".join(f'"{k}": {v:g}' for k, v in values.items()) + "}"


def _described(template) -> str:
  if template is None:
    return "it is"
  return f"`{template}`"

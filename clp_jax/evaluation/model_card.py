"""What lies beside an export: a model card, the config, rewards' statistics.

The card is README.md, in the Hugging Face Hub's form. What only the user knows,
the licence, is left to fill in.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from clp_jax import config as config_lib
from clp_jax import run_folder
from clp_jax.config import column
from clp_jax.errors import ConfigError, FrontError
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import units as units_lib
from clp_jax.evaluation.tables import markdown_table
from clp_jax.interop import hub

CARD = "README.md"
CONFIG = "training_config.json"
STATISTICS = "reward_statistics.json"
# Tells our card from a README.md that the user has put in its place.
_MARK = "<!-- Written by clp export. -->"
_Z = 1.96


def write(
  folder: epath.Path,
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  step: int,
  weights: Mapping[str, float] | None,
  alpha: float | None,
  title: str,
  library: str,
  usage: str,
) -> None:
  """Writes all three; a README.md of the user's stays.

  Args:
    folder: the export's.
    config: of the run.
    workdir: the run's folder, whose front is shown where it has one of `step`.
    step: that was exported.
    weights: of the policy; None of all sets, or of a run without objectives.
    alpha: likewise, where the run has a range of them.
    title: of the card.
    library: that loads it, for the Hub: transformers, peft or t5x.
    usage: how to load it, as markdown.
  """
  run_folder.write_json(folder / CONFIG, config_lib.to_json(config))
  run_folder.write_json(folder / STATISTICS, _statistics(config, workdir, step))
  card = folder / CARD
  if card.exists() and _MARK not in card.read_text():
    return
  parts = [
    _front_matter(config, library),
    f"{_MARK}\n\n# {title}",
    _origin(config, step),
    _objectives(config, weights, alpha),
    _pairs(config, workdir, step) if _is_reward(config) else _data(config),
    _front(config, workdir, step),
    f"## How to load it\n\n{usage}",
    "## Beside it\n\n"
    f"`{CONFIG}` is the run's whole config, `{STATISTICS}` how each reward was "
    "normalised, `export.json` which run, step and weighting this is.",
    "## Licence\n\nFill in, here and above: that of the base model, and what "
    "the training data allow.",
  ]
  card.write_text("\n\n".join(p for p in parts if p) + "\n")


def _is_reward(config: ml_collections.ConfigDict) -> bool:
  """Whether it is of `clp train-reward`."""
  return "reward_model" in config and "objectives" not in config


def _rewards(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """By objective; {} of a supervised run. A run made by hand may lack some."""
  unknown = {"source": "unknown", "normalise": "none"}
  return {
    name: config.rewards.get(name, unknown)
    for name in config.get("objectives", ())
  }


def _statistics(
  config: ml_collections.ConfigDict, workdir: str, step: int
) -> dict[str, Any]:
  """By objective: how it is normalised, and with what moments."""
  found = {
    name: {"normalise": reward["normalise"], "mean": 0.0, "deviation": 1.0}
    for name, reward in _rewards(config).items()
  }
  if all(own["normalise"] == "none" for own in found.values()):
    return found
  try:
    units = units_lib.units_of(config, workdir, step)
  except ConfigError:  # none are kept
    return found
  for own, mean, deviation in zip(
    found.values(), units.mean, units.deviation, strict=True
  ):
    own |= {"mean": float(mean), "deviation": float(deviation)}
  return found


def _front_matter(config: ml_collections.ConfigDict, library: str) -> str:
  init = config.model.init
  tags = ["clp_jax", "conditional-language-policy", "multi-objective-rl"]
  if _is_reward(config):
    tags = ["clp_jax", "reward-model"]
  # A folder, seen from elsewhere, may look like a name.
  base = [f"base_model: {hub.split(init)[0]}"] if hub.cached(init) else []
  return "\n".join(
    [
      "---",
      f"library_name: {library}",
      *base,
      "license:  # to be filled in",
      f"tags: [{', '.join(tags)}]",
      "---",
    ]
  )


def _origin(config: ml_collections.ConfigDict, step: int) -> str:
  lines = [f"- base model: `{config.model.init}`"]
  supervised = config.get("sft", {}).get("steps", 0)
  if supervised:
    lines.append(f"- supervised finetuning: {supervised:,} steps")
  if _rewards(config):
    each = config.rollout.prompts * config.rollout.samples
    lines.append(
      f"- trained by {config.algorithm} for {step:,} steps of {each:,} "
      f"responses, steering `{config.steering}`, with clp_jax"
    )
  return "\n".join(lines)


def _objectives(
  config: ml_collections.ConfigDict,
  weights: Mapping[str, float] | None,
  alpha: float | None,
) -> str:
  rewards = _rewards(config)
  if not rewards:
    return ""
  rows = [
    {
      "objective": name,
      "reward": f"`{reward['source']}`",
      "normalised": reward["normalise"],
    }
    | ({} if weights is None else {"weight": f"{weights.get(name, 0):g}"})
    for name, reward in rewards.items()
  ]
  q = config.weightings
  if alpha is not None:
    kl = f"alpha = {alpha:g}"
  elif q.alpha_range is None:
    kl = f"alpha = {q.alpha:g}"
  else:
    kl = f"alpha from {q.alpha_range[0]:g} to {q.alpha_range[1]:g}"
  return (
    f"## Objectives\n\n{markdown_table(rows)}\n"
    "What is optimised is (1 - alpha) times the weighted sum of the rewards, "
    "less alpha times the KL divergence from the reference, the model that "
    f"training began from; {kl}."
  )


def _data(config: ml_collections.ConfigDict) -> str:
  data = config.data
  if data.train is not None:
    source = f"`{data.train}` (field `{column(data, 'document')}`)"
  else:
    source = f"task `{data.task}`, split `{data.train_split}`"
  template = "it is" if data.template is None else f"`{data.template}`"
  options = data.get("template_options") or {}  # older runs have none
  listed = ", ".join(f"`{name}={value!r}`" for name, value in options.items())
  template += f", the chat template given {listed}" if listed else ""
  return (
    f"## Data\n\nPrompts are of {source}: at most {data.source_length} tokens, "
    f"a document as {template}; responses have at most {data.target_length}."
  )


def _pairs(config: ml_collections.ConfigDict, workdir: str, step: int) -> str:
  """What a reward model has learnt from, and how well it tells pairs apart."""
  data, settings = config.data, config.reward_model
  names = [f"`{column(data, x)}`" for x in ("document", "chosen", "rejected")]
  text = (
    f"## Data\n\nTrained for {step:,} steps of {settings.batch:,} pairs of "
    f"`{data.train}` (fields {', '.join(names)}), by the Bradley-Terry loss: "
    "differences of scores mean something, their zero and scale do not."
  )
  try:
    report = json.loads(
      (epath.Path(workdir) / "evaluation" / "accuracy.json").read_text()
    )
  except (OSError, ValueError):
    return text
  if report.get("step") != step:
    return text
  return (
    f"{text}\n\nOn {report['pairs']:,} held-out pairs the chosen response "
    f"scores higher in {report['accuracy']:.1%} ± "
    f"{_Z * report['stderr']:.1%} (95% interval)."
  )


def _front(config: ml_collections.ConfigDict, workdir: str, step: int) -> str:
  """A table of the run's front, with intervals; empty where there is none."""
  try:
    front = front_lib.load_front(
      epath.Path(workdir) / "evaluation" / "front.json"
    )
  except (FrontError, OSError):
    return ""
  if front.step != step:
    return ""

  def shown(estimate: front_lib.Estimate) -> str:
    return f"{estimate.mean:.3f} ± {_Z * estimate.stderr:.3f}"

  rows = [
    {
      "weights": ", ".join(f"{n} {w:.2g}" for n, w in point.weights.items()),
      "alpha": f"{point.alpha:g}",
    }
    | {name: shown(point.rewards[name]) for name in front.objectives}
    | {f"{name}, raw": shown(raw) for name, raw in point.raw.items()}
    | {"KL": shown(point.kl)}
    for point in front.points
  ]
  units = (
    f" Rewards of {', '.join(front.units)} are in deviations from the mean."
    if front.units
    else ""
  )
  return (
    f"## What steering does\n\n{markdown_table(rows)}\n"
    f"Means over {front.prompts} prompts of the split "
    f"`{front.decoding.get('split', config.data.eval_split)}` with their 95% "
    "intervals, at temperature "
    f"{front.decoding.get('temperature', 1):g}; KL in nats a response. "
    f"Hypervolume above {list(front.reference_point)}: "
    f"{front.hypervolume:.4f}.{units}"
  )


def of_reward(
  parts: Sequence[str], length: int, *, begins: bool, is_hf: bool
) -> str:
  """How a head on a decoder is loaded, as markdown.

  Args:
    parts: of its rows, tokenised apart: texts, and between them the names of
      places, as `rewards.model.split` gives them.
    length: tokens of a row.
    begins: whether rows begin with BOS.
    is_hf: whether transformers reads the tokenizer.
  """
  ours = (
    'In clp_jax it is the reward `config_lib.model_reward("classifier", '
    'model="DIR", normalise="fixed")`.'
  )
  if not is_hf:
    return ours
  listed = ", ".join(
    part if i % 2 else json.dumps(part) for i, part in enumerate(parts) if part
  )
  bos = "tokenizer.bos_token_id, " if begins else ""
  return f"""```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(
  ".", attn_implementation="eager"  # sdpa leaves out the cap that Gemma 2 has
).eval()
eos = model.config.eos_token_id
eos = eos[0] if isinstance(eos, list) else eos


def row(document, response):
  parts = [{listed}]  # each tokenised by itself
  tokens = [
    token
    for part in parts
    for token in tokenizer(part, add_special_tokens=False).input_ids
  ]
  return {{"input_ids": [{bos}*tokens, eos]}}


def scores(documents, responses):
  rows = [row(*pair) for pair in zip(documents, responses)]
  batch = tokenizer.pad(rows, return_tensors="pt")
  return model(**batch).logits[:, 0]
```

Rows have at most {length} tokens: cut longer documents, never responses.

{ours}"""


def of_checkpoint(auto: str, format: str) -> str:
  """How a checkpoint of format hf, t5x or orbax is loaded, as markdown; `auto`
  is transformers' class for it."""
  ours = (
    "In clp_jax it is a base of other runs, `--config.model.init=DIR`, and\n\n"
    "```python\nfrom clp_jax import interop\n\n"
    'model, params = interop.load_model(".")\n```'
  )
  if format != "hf":
    return ours
  vllm = (
    "In vLLM: `vllm serve DIR`."
    if auto == "AutoModelForCausalLM"
    else "vLLM serves no model of this kind; `clp serve` serves the run."
  )
  return (
    f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained(".")\n'
    f'model = {auto}.from_pretrained(".")\n```\n\n{vllm}\n\n{ours}'
  )

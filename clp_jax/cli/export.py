"""`clp export`: a run's policy as an ordinary checkpoint, or its adapters.

A head that `clp train-reward` has trained on a decoder becomes (hf) a folder of
transformers' ...ForSequenceClassification.
"""

import argparse
import json

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError, as_config_error

EXAMPLE = (
  "clp export --workdir runs/demo --weights nli=0.7,rouge=0.3 --format hf "
  "--output exports/faithful"
)
FORMATS = ("hf", "t5x", "orbax", "peft")
DTYPES = ("float32", "bfloat16")
RECORD = "export.json"
# What the formats write; nothing else in the folder is touched.
_WRITTEN = (
  *("config.json", "generation_config.json", "spiece.model"),
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  *("chat_template.jinja", "model-*-of-*.safetensors"),
  *("model.safetensors", "model.safetensors.index.json"),
  "checkpoint_*",
  *("params", "model.json", "vocabulary.model"),
)
# And where it was peft's.
_WRITTEN_PEFT = ("adapter_config.json", "adapter_model.safetensors", "base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  arguments.add_workdir(parser)
  help = (
    "the weighting of the policy; none for a supervised run or a reward model, "
    "and for peft's folder an objective"
  )
  arguments.add_weighting(parser, help)
  arguments.add_step(parser)
  parser.add_argument(
    "--format",
    required=True,
    choices=FORMATS,
    help="hf: a folder that transformers' from_pretrained reads; t5x: "
    "checkpoint_<step> in t5x's msgpack and zarr layout; orbax: params, which "
    "orbax.checkpoint.StandardCheckpointer restores, and model.json, the "
    "fields of its config. All with the tokenizer's files. peft, of "
    "steering lora and svd_lora: a folder of the peft library for each "
    "objective, or for the one weighting that is given, and base, the model "
    "that they adapt, unless the run began from a Hugging Face folder or a "
    "model of the Hub. Of a `clp train-reward` run on a decoder hf is a "
    "...ForSequenceClassification",
  )
  help = "of the parameters"
  arguments.add(parser, "--dtype", help, "float32", choices=DTYPES)
  help = "the folder to write; an earlier export there is replaced"
  arguments.add_output(parser, help)


def run(args: argparse.Namespace) -> None:
  from etils import epath

  from clp_jax.rewards import preference

  output = epath.Path(args.output)
  old_format = _check_is_free(output)
  trained = preference.trained_config(args.workdir)
  if trained is None:
    _export_policy(args, output, old_format)
  else:
    _export_reward(args, output, old_format, trained)
  print(args.output)


def _export_policy(args, output, old_format: str | None) -> None:
  from clp_jax import adapter_folders
  from clp_jax.evaluation import model_card
  from clp_jax.interop import peft
  from clp_jax.policy import Policy

  policy = Policy.load(args.workdir, step=args.step)
  is_peft = args.format == "peft"
  with as_config_error():
    policy.check_is_ordinary()
    if is_peft:
      adapter_folders.names(policy)
  if not is_peft or args.weights is not None or args.alpha is not None:
    try:
      policy.coefficients(args.weights, args.alpha)
    except ValueError as error:
      raise ConfigError(f"--weights: {error}") from error
  _begin(args, output, policy.step, old_format)
  given = {"weights": args.weights, "alpha": args.alpha}
  try:
    if is_peft:
      title, usage = adapter_folders.save(
        policy, args.output, dtype=args.dtype, **given
      )
    else:
      policy.export(args.output, args.format, dtype=args.dtype, **given)
      _, auto = peft.task(policy.model_config)
      title = "A finetuned model"
      if policy.objectives:
        shown = adapter_folders.described(policy.objectives, **given)
        title = f"A policy for {shown}"
      usage = model_card.of_checkpoint(auto, args.format)
  except ValueError as error:
    raise ConfigError(f"--format {args.format}: {error}") from error
  library = {"hf": "transformers", "orbax": "clp_jax"}
  model_card.write(
    output,
    policy.config,
    args.workdir,
    step=policy.step,
    title=title,
    library=library.get(args.format, args.format),
    usage=usage,
    **given,
  )


def _export_reward(args, output, old_format: str | None, config) -> None:
  """Of a `clp train-reward` run, whose config it is."""
  from clp_jax import run_folder, sharding
  from clp_jax.data.tokenizer import TOKENIZER
  from clp_jax.evaluation import model_card
  from clp_jax.rewards import model as models
  from clp_jax.rewards import preference

  if args.weights is not None or args.alpha is not None:
    raise ConfigError("--weights: a reward model has none; leave them out.")
  if args.format != "hf":
    raise ConfigError(
      f"--format {args.format}: a reward model is written as hf alone."
    )
  try:
    preference.check_exports(config, run_folder.load_model_config(args.workdir))
  except ValueError as error:
    raise ConfigError(f"--format hf: {error}") from error
  judge, step = preference.load_trained(
    args.workdir,
    config.reward_model.head,
    sharding.make_mesh(),
    step=args.step,
  )
  _begin(args, output, step, old_format)
  try:
    preference.export(config, judge, args.output, args.dtype)
  except ValueError as error:
    raise ConfigError(f"--format hf: {error}") from error
  words = judge.vocabulary
  usage = model_card.of_reward(
    models.split(config.reward_model.template),
    config.data.source_length,
    begins=words.bos_id is not None,
    is_hf=TOKENIZER in words.files(),
  )
  model_card.write(
    output,
    config,
    args.workdir,
    step=step,
    weights=None,
    alpha=None,
    title="A reward model",
    library="transformers",
    usage=usage,
  )


def _begin(args, output, step: int, old_format: str | None) -> None:
  """Makes the folder, says what it will be, and removes an earlier export."""
  from clp_jax.run_folder import write_json

  output.mkdir(parents=True, exist_ok=True)
  # Before anything else: what is left of an export that was interrupted can be
  # written over.
  write_json(
    output / RECORD,
    {
      "written_by": "clp export",
      "workdir": args.workdir,
      "step": step,
      "weights": args.weights,
      "alpha": args.alpha,
      "format": args.format,
      "dtype": args.dtype,
    },
  )
  patterns = list(_WRITTEN)
  if old_format == "peft":
    patterns += _WRITTEN_PEFT
    for old in output.glob("*/adapter_config.json"):
      old.parent.rmtree()
  for pattern in patterns:
    for old in output.glob(pattern):
      old.rmtree() if old.is_dir() else old.unlink()


def _check_is_free(output) -> str | None:
  """The format of the export in a folder; None where there is none.

  Raises:
    ConfigError: for a folder with what `clp export` did not write.
  """
  if not output.exists():
    return None
  if not output.is_dir():
    raise ConfigError(f"--output {output} is a file; give a folder.")
  if not any(output.iterdir()):
    return None
  try:
    record = json.loads((output / RECORD).read_text())
    if record["written_by"] == "clp export":
      return record.get("format")
  except (OSError, KeyError, TypeError, ValueError):
    pass
  raise ConfigError(
    f"--output {output} is not empty, and `clp export` has not made it; "
    "choose another folder."
  )

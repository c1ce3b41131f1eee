"""`clp export`: one policy of a run, as an ordinary T5 checkpoint."""

import argparse
import json

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError, as_config_error

EXAMPLE = (
  "clp export --workdir runs/demo --weights nli=0.7,rouge=0.3 --format hf "
  "--output exports/faithful"
)
FORMATS = ("hf", "t5x", "orbax")
DTYPES = ("float32", "bfloat16")
RECORD = "export.json"
# What the formats write; nothing else in the folder is touched.
_WRITTEN = (
  *("config.json", "generation_config.json", "tokenizer_config.json"),
  *("model.safetensors", "model.safetensors.index.json"),
  *("model-*-of-*.safetensors", "spiece.model"),
  "checkpoint_*",
  *("params", "model.json", "vocabulary.model"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  arguments.add_workdir(parser)
  help = "the weighting of the policy; none for a supervised run"
  arguments.add_weighting(parser, help)
  arguments.add_step(parser)
  parser.add_argument(
    "--format",
    required=True,
    choices=FORMATS,
    help="hf: a folder that transformers' from_pretrained reads; t5x: "
    "checkpoint_<step> in t5x's msgpack and zarr layout; orbax: params, which "
    "orbax.checkpoint.StandardCheckpointer restores, and model.json, the "
    "fields of the T5Config. All with the SentencePiece model",
  )
  help = "of the parameters"
  arguments.add(parser, "--dtype", help, "float32", choices=DTYPES)
  parser.add_argument(
    "--output",
    required=True,
    metavar="DIR",
    help="the folder to write; an earlier export there is replaced",
  )


def run(args: argparse.Namespace) -> None:
  """Runs the command."""
  from etils import epath

  from clp_jax.policy import Policy
  from clp_jax.run_folder import write_json

  output = epath.Path(args.output)
  _check_is_free(output)
  policy = Policy.load(args.workdir, step=args.step)
  with as_config_error():
    policy.check_is_ordinary()
  try:
    policy.coefficients(args.weights, args.alpha)
  except ValueError as error:
    raise ConfigError(f"--weights: {error}") from error
  output.mkdir(parents=True, exist_ok=True)
  # Before anything else: what is left of an export that was interrupted can be
  # written over.
  write_json(
    output / RECORD,
    {
      "written_by": "clp export",
      "workdir": args.workdir,
      "step": policy.step,
      "weights": args.weights,
      "alpha": args.alpha,
      "format": args.format,
      "dtype": args.dtype,
    },
  )
  for pattern in _WRITTEN:
    for old in output.glob(pattern):
      old.rmtree() if old.is_dir() else old.unlink()
  try:
    policy.export(
      args.output, args.format, args.weights, args.alpha, dtype=args.dtype
    )
  except ValueError as error:
    raise ConfigError(f"--format {args.format}: {error}") from error
  print(args.output)


def _check_is_free(output) -> None:
  """Raises ConfigError for a folder with what `clp export` did not write."""
  if not output.exists():
    return
  if not output.is_dir():
    raise ConfigError(f"--output {output} is a file; give a folder.")
  if not any(output.iterdir()):
    return
  try:
    record = json.loads((output / RECORD).read_text())
    ours = record["written_by"] == "clp export"
  except (OSError, KeyError, TypeError, ValueError):
    ours = False
  if not ours:
    raise ConfigError(
      f"--output {output} is not empty, and `clp export` has not made it; "
      "choose another folder."
    )

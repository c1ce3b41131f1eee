"""`clp judge`: a judge compares the summaries of two runs, pair by pair.

It reads evaluation/samples.jsonl of the two runs, or JSON lines as `clp
generate` writes them, or, with --prompts, lets the runs write fresh summaries
of held-out documents. Every answer is kept in
OUTPUT/answers.jsonl; the same command goes on from there. docs/judge.md has the
question and the format of the answers.
"""

import argparse
import os
import pathlib

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError, RunError

EXAMPLE = (
  "clp judge runs/demo runs/demo/soups --endpoint http://127.0.0.1:8000/v1 "
  "--model my-model --output runs/judged"
)
KEY_VARIABLE = "CLP_JUDGE_API_KEY"
# Options that not every use has.
_ENDPOINT = (
  *("model", "api", "key_variable", "timeout", "attempts", "parallel"),
  "max_tokens",
)
_ENTAILMENT = ("margin",)
_FRESH = ("weights", "alpha", "temperature", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "runs",
    nargs=2,
    metavar="RUN",
    help="a run's folder, or a JSONL file with document and summary; the win "
    "rate is the first one's",
  )
  help = (
    "of the JSONL files' documents (default: data.document_field of a run "
    'among the two, or "document")'
  )
  arguments.add(parser, "--document-field", help, metavar="NAME")
  arguments.add_output(parser, "for answers and result")
  help = "another question for a language model; {data} is where texts go"
  arguments.add(parser, "--prompt", help, metavar="FILE")
  model = parser.add_argument_group("a language model behind HTTP")
  help = (
    "the API's base, such as https://api.openai.com/v1 or "
    "https://generativelanguage.googleapis.com/v1beta"
  )
  arguments.add(model, "--endpoint", help, metavar="URL")
  arguments.add(model, "--model", "the model's name there", metavar="NAME")
  apis = ("openai", "gemini")
  arguments.add(model, "--api", "its form", apis[0], choices=apis)
  help = (
    "environment variable that holds the API key; none is sent where it is not "
    "set"
  )
  arguments.add(model, "--key-variable", help, KEY_VARIABLE, metavar="NAME")
  arguments.add(model, "--timeout", "seconds", 60, type=float)
  help = "of a request, before the judge counts as down"
  arguments.add_count(model, "--attempts", help, 6)
  arguments.add_count(model, "--parallel", "requests at a time", 4)
  arguments.add_count(model, "--max-tokens", "of an answer", 512)
  local = parser.add_argument_group("or a model on this machine")
  help = (
    "folder of any instruct model that clp_jax loads; its answer is the "
    "likeliest of the three"
  )
  arguments.add(local, "--local", help, metavar="DIR")
  help = (
    "folder of a T5 entailment model; it prefers the summary that the document "
    "entails more"
  )
  arguments.add(local, "--entailment", help, metavar="DIR")
  help = "probabilities no further apart tie"
  arguments.add(local, "--margin", help, 0.05, type=float)
  fresh = parser.add_argument_group("fresh summaries instead of samples.jsonl")
  arguments.add_count(fresh, "--prompts", "held-out documents")
  arguments.add_weighting(fresh, "the weighting of both runs")
  arguments.add_temperature(fresh)
  arguments.add_seed(fresh, "the sampling")
  # None in their place shows which were given, and would do nothing.
  names = (*_ENDPOINT, *_ENTAILMENT, *_FRESH)
  parser.set_defaults(defaults={x: parser.get_default(x) for x in names})
  parser.set_defaults(**dict.fromkeys(names))


def run(args: argparse.Namespace) -> None:
  from clp_jax.evaluation import judge as judge_lib
  from clp_jax.run_folder import write_json

  are_fresh = args.prompts is not None
  _check_used(args, _FRESH, are_fresh, "fresh summaries; give --prompts too")
  if args.document_field is not None and (
    are_fresh or all(map(os.path.isdir, args.runs))
  ):
    raise ConfigError(
      "--document-field is of JSONL files, and none is read; leave it out."
    )
  judge = _judge(args)  # before anything is generated
  a, b = (_samples(path, args) for path in args.runs)
  try:
    compared = judge_lib.pairs(a, b)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  output = pathlib.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  result = judge_lib.judge_pairs(judge, compared, output / "answers.jsonl")
  write_json(
    output / "judge.json",
    {"runs": args.runs, "judge": dict(judge.identity)} | result,
  )
  judge_lib.print_result(args.runs, result)
  print(output / "judge.json")


def _check_used(
  args: argparse.Namespace, names: tuple[str, ...], is_used: bool, whose: str
) -> None:
  """Gives options their defaults; raises ConfigError where one is given and
  not used."""
  for name in names:
    if getattr(args, name) is None:
      setattr(args, name, args.defaults[name])
    elif not is_used:
      raise ConfigError(f"--{name.replace('_', '-')} is of {whose}.")


def _judge(args: argparse.Namespace):
  judges = (args.endpoint, args.local, args.entailment)
  if sum(judge is not None for judge in judges) != 1:
    raise ConfigError(
      "name one judge: --endpoint URL --model NAME, --local DIR, or "
      "--entailment DIR."
    )
  from etils import epath

  for options, flag in ((_ENDPOINT, "endpoint"), (_ENTAILMENT, "entailment")):
    is_used = getattr(args, flag) is not None
    _check_used(args, options, is_used, f"--{flag}; leave it out")
  for flag in ("local", "entailment"):
    folder = getattr(args, flag)
    if folder is not None and not epath.Path(folder).is_dir():
      raise ConfigError(f"--{flag} {folder}: there is no such folder.")
  if args.prompt is not None and args.entailment is not None:
    raise ConfigError("--prompt is for a language model, not for --entailment.")
  from clp_jax.evaluation import judge as judge_lib
  from clp_jax.evaluation import judge_endpoint

  try:
    if args.entailment is not None:
      from clp_jax import sharding
      from clp_jax.rewards import entailment

      score = entailment.build(sharding.make_mesh(), args.entailment)
      identity = {"model": os.path.abspath(args.entailment)}
      return judge_lib.entailment_judge(
        score, margin=args.margin, identity=identity
      )
    template = judge_lib.PROMPT
    if args.prompt is not None:
      template = pathlib.Path(args.prompt).read_text(encoding="utf-8")
    if args.local is not None:
      from clp_jax.evaluation import judge_local

      return judge_local.local_judge(args.local, template)
    if args.model is None:
      raise ConfigError("--endpoint needs --model NAME.")
    key = os.environ.get(args.key_variable)
    if key is None and args.key_variable != KEY_VARIABLE:
      raise ConfigError(f"--key-variable {args.key_variable} is not set.")
    endpoint = judge_endpoint.Endpoint(
      url=args.endpoint,
      model=args.model,
      api=args.api,
      key=key,
      timeout=args.timeout,
      attempts=args.attempts,
      parallel=args.parallel,
      max_tokens=args.max_tokens,
    )
    return judge_endpoint.endpoint_judge(endpoint, template)
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"--prompt {args.prompt}: {error}") from error
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _samples(path: str, args: argparse.Namespace) -> list[dict]:
  """Rows with document and summary."""
  if args.prompts is not None:
    return _fresh(path, args)
  from etils import epath

  from clp_jax.data import jsonl

  file = epath.Path(path)
  if file.is_dir():
    fields = _document_fields([path])
    file = file / "evaluation" / "samples.jsonl"
  elif args.document_field is not None:
    fields = [args.document_field]
  else:
    fields = _document_fields(args.runs)
  if not file.exists():
    raise RunError(
      f"there is no {file}; `clp evaluate --workdir {path}` writes it."
    )
  rows = []
  for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      row = jsonl.parse(line)
      document = jsonl.document_of(row, fields)
    except ValueError as error:
      raise RunError(f"{file}, line {number}: {error}") from error
    rows.append(row | {"document": document})
  return rows


def _document_fields(paths: list[str]) -> list[str]:
  """data.document_field of those that are runs."""
  from etils import epath

  from clp_jax.config import column
  from clp_jax.run_folder import load_config

  return [
    column(load_config(path).data, "document")
    for path in paths
    if (epath.Path(path) / "config.json").exists()
  ]


def _fresh(path: str, args: argparse.Namespace) -> list[dict]:
  """Summaries of the first held-out documents."""
  from clp_jax.batches import eval_batch
  from clp_jax.policy import Policy

  policy = Policy.load(path)
  batch = eval_batch(policy.config, policy.vocabulary, args.prompts)
  try:
    summaries = policy.generate(
      batch.documents,
      args.weights,
      args.alpha,
      temperature=args.temperature,
      seed=args.seed,
    )
  except ValueError as error:
    raise ConfigError(f"{path}: {error}") from error
  return [
    {"document": document, "summary": summary, "weights": args.weights}
    for document, summary in zip(batch.documents, summaries, strict=True)
  ]

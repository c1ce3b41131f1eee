"""`clp generate`: summarises documents at any weighting, JSONL in and out."""

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from clp_jax.cli import arguments
from clp_jax.errors import ConfigError, RunError

EXAMPLE = (
  'echo \'{"document": "..."}\' | clp generate --workdir runs/demo '
  "--weights nli=0.7,rouge=0.3"
)
CHUNK = 64  # lines decoded together


def add_arguments(parser: argparse.ArgumentParser) -> None:
  arguments.add_workdir(parser)
  help = 'the weighting of lines without "weights" of their own'
  arguments.add_weighting(parser, help)
  parser.add_argument(
    "--input",
    default="-",
    metavar="FILE",
    help='JSONL with the run\'s data.document_field or "document", and '
    'optional "weights" and "alpha" (default: -, standard input)',
  )
  arguments.add_temperature(parser)
  arguments.add_seed(parser, "the sampling")


def run(args: argparse.Namespace) -> None:
  from clp_jax.policy import Policy

  policy = Policy.load(args.workdir)
  if args.weights is not None:
    try:  # before any line is read
      policy.coefficients(args.weights, args.alpha)
    except ValueError as error:
      raise ConfigError(f"--weights: {error}") from error
  if args.input == "-":
    _generate(policy, sys.stdin.buffer, "standard input", args)
  else:
    with open(args.input, "rb") as lines:
      _generate(policy, lines, args.input, args)


def _generate(policy, lines: BinaryIO, name: str, args: argparse.Namespace):
  done = 0
  read = _read(policy, lines, name, args)
  while rows := list(itertools.islice(read, CHUNK)):
    summaries = policy.generate(
      [document for _, document, _, _ in rows],
      [weights for _, _, weights, _ in rows],
      [alpha for _, _, _, alpha in rows],
      temperature=args.temperature,
      seed=args.seed,
      first_row=done,
    )
    for (row, *_), summary in zip(rows, summaries, strict=True):
      print(json.dumps(row | {"summary": summary}, ensure_ascii=False))
    sys.stdout.flush()
    done += len(rows)


def _read(
  policy, lines: BinaryIO, name: str, args: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], str, Any, Any]]:
  """(row, document, weights, alpha) of every line that is not blank."""
  from clp_jax.config import column
  from clp_jax.data import jsonl
  from clp_jax.data.tokenizer import parse_template

  data = policy.config.data
  template, length = parse_template(data.template), data.source_length
  warned = False
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = jsonl.parse(line)
      json.dumps(row, ensure_ascii=False).encode()  # it is printed again
      fields = [column(data, "document")]
      document = jsonl.document_of(row, fields, conversations=True)
      # Says why it can't be shown, too.
      _, is_cut = policy.vocabulary.prompt(document, template, length)
      weights = row.get("weights", args.weights)
      alpha = row.get("alpha", args.alpha)
      policy.coefficients(weights, alpha)
    except (AttributeError, TypeError, ValueError) as error:
      raise RunError(f"{name}, line {number}: {error}") from error
    if is_cut and not warned:
      warned = True
      logging.warning(
        "%s, line %d: longer than data.source_length = %d tokens, and cut; "
        "others may be too",
        name,
        number,
        length,
      )
    yield row, document, weights, alpha

"""A judge on this machine: any instruct model, by what it would answer.

Nothing is sampled. The model reads the question of `judge.prompt`, as its chat
template shows it, and the three answers' probabilities, each of the whole text
and its end, are compared: the likeliest is the verdict.
"""

import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import sharding
from clp_jax.data.tokenizer import Message, Tokenizer, pad
from clp_jax.errors import JudgeError
from clp_jax.evaluation.judge import PROMPT, Judge, Question, prompt
from clp_jax.masked import masked_sum
from clp_jax.rewards import model as models
from clp_jax.sampling import at_token

ANSWERS = ("1", "2", "tie")
LONGEST = 8192  # tokens of a question, where the model has room for more
BATCH = 8  # questions asked together
_STEP = 128  # lengths are rounded up to multiples, so that few are compiled


def local_judge(folder: str, template: str = PROMPT) -> Judge:
  """Loads a judge from the folder of a Hugging Face model, a t5x checkpoint or
  a run of clp; the template of the question has {data} where texts go.

  Returns:
    The judge; its answers name the three probabilities.

  Raises:
    ValueError: there is no such model, or the template lacks {data}.
    RunError: it is a run that can't be read.
  """
  if "{data}" not in template:
    raise ValueError("--prompt: the question has no {data} for the texts.")
  mesh = sharding.make_mesh()
  model, params, tokenizer = models.load(
    folder, mesh, None, "float32", scan_layers=False, fsdp=True
  )
  answers = [tokenizer.target(f"Answer: {a}", 16) for a in ANSWERS]
  targets = pad(answers, max(map(len, answers)), tokenizer.pad_id)
  room = model.config.max_length
  longest = LONGEST if room is None else min(LONGEST, room - targets.shape[1])
  mask = jnp.asarray(pad([[1] * len(a) for a in answers], targets.shape[1], 0))

  def probabilities(params, prompts):
    """[B, S] int32 -> [B, 3] float32."""
    rows = jnp.tile(targets, (len(prompts), 1))
    logits, _ = model.score(params, prompts, rows)
    each = at_token(jax.nn.log_softmax(logits), rows)
    logp = masked_sum(each.reshape(len(prompts), *targets.shape), mask, -1)
    return jax.nn.softmax(logp, axis=-1)

  at = jax.tree.map(lambda p: p.sharding, params)
  program = models.row_program(probabilities, at, mesh)
  shards = sharding.row_shards(mesh)
  batch = -(-BATCH // shards) * shards

  def ask(questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
    for start in range(0, len(questions), batch):
      part = questions[start : start + batch]
      read = [_read(tokenizer, prompt(q, template), longest) for q in part]
      length = -(-max(map(len, read)) // _STEP) * _STEP
      # Of fewer questions than a batch, the last is asked again.
      read += [read[-1]] * (batch - len(part))
      prompts = jnp.asarray(pad(read, length, tokenizer.pad_id))
      found = np.asarray(program(params, prompts))
      for i, row in enumerate(found[: len(part)]):
        shown = ", ".join(
          f"{answer}: {p:.3f}" for answer, p in zip(ANSWERS, row, strict=True)
        )
        yield start + i, f"{shown}. Answer: {ANSWERS[int(row.argmax())]}"

  identity = {"judge": "local", "model": os.path.abspath(folder)}
  return Judge(ask, identity | {"prompt": template})


def _read(tokenizer: Tokenizer, question: str, longest: int) -> list[int]:
  """The tokens of a question."""
  shown: str | list[Message] = question
  if tokenizer.chat_template is not None:
    shown = [{"role": "user", "content": question}]
  tokens, is_cut = tokenizer.prompt(shown, None, longest)
  if is_cut:
    raise JudgeError(
      f"a question is longer than {longest} tokens, and what is cut would not "
      "be judged; take shorter documents, or another judge"
    )
  return tokens

"""Adapters that were exported, under the peft library's own code."""

import pathlib
import re

import lora_runs
import numpy as np
import pytest

import clp_jax

pytestmark = pytest.mark.parity
torch = pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
pytest.importorskip(
  "peft", reason='needs the extra "parity": run `make parity`'
)

TEXTS = ["word1 word2 , word3 word4 .", "word9 word8 ."]
RESPONSES = ["word5 word6 .", "word7 word3 word4"]
WEIGHTINGS = ((1.0, 0.0), (0.3, 0.7), (0.55, 0.45))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  return lora_runs.make_bases(tmp_path_factory.mktemp("bases"))


def recipe(output, monkeypatch, **values):
  """The model that a README's code makes, with other weights."""
  monkeypatch.chdir(output)
  code = lora_runs.code_of(pathlib.Path("README.md").read_text())
  for name, value in values.items():
    code, found = re.subn(rf"(?m)^{name} = [^(\n]*$", f"{name} = {value}", code)
    assert found >= 1
  names: dict = {}
  exec(code, names)
  return names["model"].eval()


def logits_of(model, policy):
  """[[T, V]] of the responses, a prompt at a time."""
  prompts = policy.tokenize(TEXTS)
  found = []
  for prompt, text in zip(prompts, RESPONSES, strict=True):
    prompt = prompt[prompt != policy.vocabulary.pad_id]
    target = policy.vocabulary.target(text, policy.config.data.target_length)
    with torch.no_grad():
      if policy.model.config.reads_eos:  # a T5
        given = torch.tensor([[0, *target[:-1]]])
        logits = model(
          input_ids=torch.tensor(prompt[None]).long(), decoder_input_ids=given
        ).logits[0]
      else:
        joined = torch.tensor([[*prompt, *target]])
        logits = model(input_ids=joined).logits[0, len(prompt) - 1 : -1]
        # Rows that stand for no token are no part of our softmax.
        logits = logits[:, : policy.vocabulary.size]
    found.append((logits.numpy(), target))
  return found


def scores_of(logits):
  """[B] log-probabilities of the responses."""
  found = []
  for own, target in logits:
    shifted = own - own.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    found.append(logp[np.arange(len(target)), target].sum())
  return np.asarray(found)


@pytest.mark.parametrize("steering", ["lora", "svd_lora"])
@pytest.mark.parametrize("family", ["t5", "decoder"])
@pytest.mark.parametrize("of_alpha", [False, True])
def test_peft_scores_as_the_policy_does(
  bases,
  tmp_path,
  monkeypatch,
  family,
  steering,
  of_alpha,
):
  fields = {"steering": steering}
  if of_alpha:
    fields |= lora_runs.RANGE | {"conditioning.shared": "trained"}
  workdir = lora_runs.start_run(tmp_path / "run", bases[family], **fields)
  policy = clp_jax.Policy.load(workdir)
  lora_runs.export(workdir, tmp_path / "all")
  for long, short in WEIGHTINGS:
    weights = {"long": long, "short": short}
    values, alpha, more = {"weights": weights}, None, ()
    if of_alpha:
      alpha = values["alpha"] = 0.1 + 0.3 * short
      more = ("--alpha", alpha)
    expected = policy.score(TEXTS, RESPONSES, weights, alpha)
    text = f"long={long},short={short}"
    lora_runs.export(workdir, tmp_path / "one", "--weights", text, *more)
    for model in (
      recipe(tmp_path / "all", monkeypatch, **values),
      recipe(tmp_path / "one", monkeypatch),
    ):
      found = scores_of(logits_of(model, policy))
      np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)

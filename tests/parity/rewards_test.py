"""Heads of `clp train-reward` on decoders, in transformers."""

import pathlib

import jax
import lora_runs
import numpy as np
import pytest
import reward_runs
import runs
import small_decoder
import small_encoder

from clp_jax import sharding
from clp_jax.data.hf_tokenizer import HFTokenizer
from clp_jax.rewards.base import load_reward

pytestmark = pytest.mark.parity
torch = pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
transformers = pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)


def scores(source, folder, documents, responses):
  """By clp_jax."""
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  spec = {"source": source, "model": str(folder), "batch": 4}
  reward = load_reward("r", spec, mesh)
  return reward.score(documents, documents, responses)


@pytest.mark.parametrize("ends", ["<|im_end|>", "what usually pads"])
@pytest.mark.parametrize("architecture", small_decoder.ARCHITECTURES)
def test_the_card_gives_the_runs_scores(
  architecture, ends, tmp_path, monkeypatch
):
  """By the code that an export's README.md shows, in one padded batch."""
  changes, words = {}, None
  if ends != "<|im_end|>":
    changes = {"eos_ids": (0,), "scan_layers": True}
    words = HFTokenizer("here", small_decoder.tokenizer_files(), (0,))
  reward_runs.start(tmp_path / "run", architecture, words, **changes)
  status, _, err = runs.clp(
    *("export", "--workdir", tmp_path / "run", "--format", "hf"),
    *("--output", tmp_path / "out"),
  )
  assert status == 0, err
  documents, responses = small_encoder.texts()
  documents, responses = ([t[:20] for t in x] for x in (documents, responses))
  expected = scores("preference", tmp_path / "run", documents, responses)
  assert expected.std() > 0.05
  found = scores("classifier", tmp_path / "out", documents, responses)
  np.testing.assert_allclose(found, expected, atol=1e-5)

  monkeypatch.chdir(tmp_path / "out")
  names: dict = {}
  exec(lora_runs.code_of(pathlib.Path("README.md").read_text()), names)
  model = names["model"]
  assert type(model).__name__.startswith(
    {"gemma3_text": "Gemma3Text"}.get(architecture, architecture.capitalize())
  )
  rows = [
    names["row"](*pair)["input_ids"]
    for pair in zip(documents, responses, strict=True)
  ]
  lengths = {len(row) for row in rows}
  # All are whole, and some are padded.
  assert 1 < len(lengths) and max(lengths) <= reward_runs.LENGTH
  with torch.no_grad():
    theirs = names["scores"](documents, responses).numpy()
  np.testing.assert_allclose(theirs, expected, atol=1e-4)

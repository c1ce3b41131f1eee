"""Writes Hugging Face folders, for tests that run without transformers.

    python -m tests.parity.make_folders

from the root of the repository, with the `parity` extra installed (version 4
of transformers). The models are those of make_fixtures.py, so that
tests/fixtures/transformers_*.npz has their weights, logits and greedy tokens:

  tests/fixtures/hf_v1_0   the v1.0 model, in one file
  tests/fixtures/hf_mt5    the v1.1 model's weights in an MT5, in three files
"""

import shutil
import sys

import numpy as np

from . import make_fixtures


def mt5_model(seed: int):
  """An MT5ForConditionalGeneration with the v1.1 model's weights."""
  import transformers

  v1_1 = make_fixtures.transformers_model("v1_1", seed)
  values = v1_1.config.to_diff_dict()
  for name in ("model_type", "architectures", "transformers_version"):
    values.pop(name, None)
  model = transformers.MT5ForConditionalGeneration(
    transformers.MT5Config(**values)
  )
  model.load_state_dict(v1_1.state_dict())
  return model.eval()


def folders() -> dict:
  """{folder: (model, the most bytes that a file of weights has)}."""
  v1_0 = make_fixtures.transformers_model("v1_0", make_fixtures.SEEDS["v1_0"])
  mt5 = mt5_model(make_fixtures.SEEDS["v1_1"])
  return {"hf_v1_0": (v1_0, 1 << 30), "hf_mt5": (mt5, 50_000)}


def logits(model, case) -> np.ndarray:
  """What the model computes for a case of make_fixtures.py."""
  import torch

  source = torch.from_numpy(case["encoder_input_tokens"]).long()
  target = torch.from_numpy(case["decoder_input_tokens"]).long()
  with torch.no_grad():
    computed = model(
      input_ids=source,
      attention_mask=(source != 0).long(),
      decoder_input_ids=target,
    ).logits
  return computed.numpy()[:, case["positions"]]


def main() -> None:
  models = folders()
  case = np.load(make_fixtures.FIXTURES / "transformers_v1_1.npz")
  np.testing.assert_allclose(
    logits(models["hf_mt5"][0], case), case["logits"], atol=1e-5
  )
  for name, (model, size) in models.items():
    folder = make_fixtures.FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=size)
    sys.stdout.write(f"{folder}: {sorted(p.name for p in folder.iterdir())}\n")


if __name__ == "__main__":
  main()

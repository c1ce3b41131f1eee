"""What README.md and docs/own-data.md tell their reader to type, typed."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs

import clp_jax
from clp_jax import interop
from clp_jax.data import newsroom, newsroom_text
from clp_jax.models import t5

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OWN_DATA = (ROOT / "docs" / "own-data.md").read_text()
# What makes a command take seconds: the README's runs take hours.
SMALL = {
  "train-sft": ("sft.steps=2", "sft.batch=8"),
  "train-reward": ("reward_model.steps=2", "reward_model.batch=8"),
  "train": (
    "train.steps=2",
    "rollout.prompts=8",
    "rollout.samples=2",
    "train.normalisation_batches=1",
    "eval.grid=2",
    "eval.prompts=8",
  ),
}
LENGTHS = ("data.source_length=48", "data.target_length=12")


def section(title):
  return re.search(rf"^## {title}\n(.*?)(?=^## )", README, re.M | re.S)[1]


def indented(text):
  text = re.sub("```.*?```", "", text, flags=re.S)
  return [line[4:] for line in text.splitlines() if line.startswith("    ")]


def shell_commands(text):
  """The indented `clp` commands, as lists of arguments."""
  script = "\n".join(indented(text)).replace("\\\n", " ")
  return [shlex.split(line)[1:] for line in script.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The files that the section speaks of."""
  for name, split, count in (("train", "train", 16), ("dev", "test", 9)):
    items = newsroom.make_items(split, 0, count)
    documents = [
      {"document": i.document, "summary": i.reference} for i in items
    ]
    pairs = [
      {"document": i.document, "chosen": i.reference, "rejected": "the"}
      for i in items
    ]
    prefix = "" if name == "train" else "dev_"
    for file, rows in ((name, documents), (f"{prefix}pairs", pairs)):
      text = "".join(json.dumps(row) + "\n" for row in rows)
      (tmp_path / f"{file}.jsonl").write_text(text)
  model = t5.T5Config(
    vocab_size=256,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_dim=8,
  )
  params = t5.init_params(model, jax.random.key(0))
  interop.save_t5(str(tmp_path / "my-t5"), model, params, "hf")
  (tmp_path / "my-t5" / "spiece.model").write_bytes(
    newsroom_text.vocabulary_bytes()
  )
  for file in re.findall(r"```python\n(# (\w+\.py).*?)```", README, re.S):
    (tmp_path / file[1]).write_text(file[0])
  shutil.copytree(ROOT / "configs", tmp_path / "configs")
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def test_your_own_model_data_and_rewards(folder):
  commands = shell_commands(section("Your own model, data and rewards"))
  assert len(commands) == 7
  printed = {}
  for command in commands:
    small = SMALL.get(command[0], ())
    lengths = LENGTHS if small else ()
    overrides = [f"--config.{field}" for field in (*small, *lengths)]
    status, out, err = runs.clp(*command, *overrides)
    assert status == 0, err
    printed[command[0]] = out
  assert "held-out loss" in printed["train-sft"]
  assert "held-out accuracy" in printed["train-reward"]
  assert "hypervolume" in printed["evaluate"]
  assert np.isfinite(runs.metrics("runs/plain")[1]["reward/plain"])
  summaries = [json.loads(line) for line in printed["generate"].splitlines()]
  assert len(summaries) == 9 and {"document", "summary"} <= set(summaries[0])
  policy = clp_jax.Policy.load("runs/mine")
  mixed = policy.params({"rouge": 0.4, "preference": 0.6})
  _, exported = interop.load_t5("exports/my-t5-steered")
  jax.tree.map(np.testing.assert_array_equal, exported, mixed)


def test_snippets_of_own_data(folder):
  (snippet,) = re.findall("```python\n(.*?)```", OWN_DATA, re.S)
  exec(snippet, {})
  _, one = interop.load_t5("my-t5")
  _, other = interop.load_t5("my-t5-as-t5x")
  jax.tree.map(np.testing.assert_array_equal, one, other)
  lines = (line for line in indented(OWN_DATA) if line.startswith("{"))
  documents, pairs = map(json.loads, lines)
  assert set(documents) == {"document", "summary"}
  assert set(pairs) == {"document", "chosen", "rejected"}


def test_steer_it(sft_run, tmp_path, monkeypatch, capsys):
  """On a run that was not trained, where the reader has the demo's."""
  monkeypatch.chdir(tmp_path)
  runs.make_run("runs/demo", sft_run)
  clp = tmp_path / ".venv" / "bin" / "clp"
  clp.parent.mkdir(parents=True)
  clp.write_text(f'#!/bin/sh\nexec {sys.executable} -m clp_jax "$@"\n')
  clp.chmod(0o755)
  steer = section("Steer it")
  printed = subprocess.run(
    ["bash", "-euc", "\n".join(indented(steer))],
    capture_output=True,
    check=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  ).stdout
  row = json.loads(printed)
  assert set(row) == {"document", "summary"}
  capsys.readouterr()
  (snippet,) = re.findall("```python\n(.*?)```", steer, re.S)
  exec(snippet, {})
  assert len(capsys.readouterr().out.splitlines()) == 3

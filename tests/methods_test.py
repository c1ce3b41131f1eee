"""Methods from config to export, and what docs/methods.md says of them."""

import ast
import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import runs
from both_families import both, mlp_kernel, reference
from moft_test import assert_trees_close, make_config, mesh_of, train

import clp_jax
from clp_jax import build, demo, interop
from clp_jax.evaluation import sweep
from clp_jax.models.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "methods.md").read_text()
METHODS = dict(
  re.findall(r"^\| (.*?) \| `(\S+?=.*)` \|$", DOCS, re.M)  # the first table
)


def value_of(text):
  try:
    return ast.literal_eval(text)
  except ValueError:
    return text


@pytest.mark.parametrize("method", METHODS)
def test_documented_overrides_make_a_config(method):
  config = demo.get_config()
  pairs = (pair.split("=") for pair in METHODS[method].split())
  config.update_from_flattened_dict({k: value_of(v) for k, v in pairs})
  build.validate(config)
  build.bank(config, PRESETS["tiny"])
  name = sweep.method_name(config)
  expected = re.sub("(,| alone).*", "", method)
  assert name == expected


def documented_commands():
  """The indented `clp` commands, as lists of arguments."""
  text = "\n".join(re.findall(r"^    (.*)$", DOCS, re.M))
  script = text.replace("\\\n", " ").splitlines()
  return [shlex.split(line)[1:] for line in script if line.startswith("clp ")]


@pytest.mark.slow
def test_documented_commands_run(sft_run, tmp_path, monkeypatch):
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  ran = 0
  for command in documented_commands():
    if "runs/lora" not in command and "runs/prompting" not in command:
      continue  # of the other sections
    if command[0] == "train":
      command += runs.overrides(
        sft_run,
        **{
          "model.init": "tiny",
          "sft.steps": 2,
          "sft.batch": 8,
          "train.steps": 2,
          "eval.grid": 2,
        },
      )
    status, _, err = runs.clp(*command)
    assert status == 0, err
    ran += 1
  assert ran == 6
  for name in ("nli", "rouge"):
    folder = pathlib.Path("exports/adapters") / name
    assert (folder / "adapter_model.safetensors").exists()
  policy = clp_jax.Policy.load("runs/lora")
  mixed = policy.params({"nli": 0.7, "rouge": 0.3})
  _, exported = interop.load_t5("exports/lora")
  jax.tree.map(np.testing.assert_array_equal, exported, mixed)
  front = json.loads(
    pathlib.Path("runs/prompting/evaluation/front.json").read_text()
  )
  assert front["method"] == "prompting" and len(front["points"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("steering", ["lora", "svd_lora"])
@pytest.mark.parametrize("preset", runs.PRESETS)
def test_adapters_soft_tokens_and_prompts_resume_bit_for_bit(
  preset, steering, sft_runs, tmp_path
):
  """All that can be combined, in one run: 4 steps are 2 and 2."""
  sft_run = sft_runs(preset)
  fields = {
    "steering": steering,
    "soft_tokens.length": 2,
    "prompting.style": "control_tokens",
    "prompting.levels": 1,  # the model has 4 rows for 2 + 2 tokens
    "optimizer.learning_rate": 0.02,
  }
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  for workdir, steps in ((whole, 4), (parts, 2), (parts, 4)):
    status, _, err = runs.clp(
      *runs.train_arguments(
        workdir, sft_run, **fields, **{"train.steps": steps}
      )
    )
    assert status == 0, err
  runs.assert_same_run(whole, parts, 4)
  status, out, err = runs.clp("evaluate", "--workdir", whole)
  assert status == 0, err
  policy = clp_jax.Policy.load(str(whole))
  name = {"lora": "LoRA", "svd_lora": "SVD-LoRA"}[steering]
  assert sweep.method_name(policy.config) == f"{name} + soft tokens + prompting"
  weights = [{"nli": 1.0}, {"rouge": 1.0}]
  texts = ["Brivane opened the museum. It happened in Merrowby."] * 2
  scores = policy.score(texts, texts, weights)
  assert abs(scores[0] - scores[1]) > 1e-3
  for i in range(2):
    alone = policy.score(texts[:1], texts[:1], weights[i])
    np.testing.assert_allclose(scores[i], alone[0], rtol=1e-5)
  status, _, err = runs.clp(
    *("export", "--workdir", whole, "--weights", "nli=1", "--format", "hf"),
    *("--output", tmp_path / "export"),
  )
  assert status == 2 and "2 soft tokens" in err and "Traceback" not in err


@pytest.mark.slow
@both
@pytest.mark.parametrize("kind", ["lora", "svd_lora"])
def test_devices_do_not_change_training_of_adapters(kind, model):
  config = make_config(
    steering=kind, **{"adapters.rank": 2, "soft_tokens.length": 2}
  )
  one, history, programs = train(config, mesh_of(), 3, model=model)
  many, many_history, _ = train(config, mesh_of(4, 2), 3, model=model)
  assert_trees_close(history, many_history, rtol=5e-4, atol=5e-5)
  assert_trees_close(
    jax.tree.map(np.asarray, one.params), many.params, atol=5e-4
  )
  assert programs.rollout._cache_size() == programs.update._cache_size() == 1
  # Nothing but factors and soft tokens is trained, or has optimizer state.
  names = {
    path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(one.params)
  }
  assert names == {"embedding"} | {
    *(("lora_a", "lora_b") if kind == "lora" else ()),
    *(
      ("svd_left", "svd_values", "svd_scale", "svd_right")
      if kind == "svd_lora"
      else ()
    ),
  }
  size = sum(leaf.size for leaf in jax.tree.leaves(one.params))
  assert sum(x.size for x in jax.tree.leaves(one.opt_state)) < 2 * size + 5


@pytest.mark.slow
@both
def test_a_frozen_kl_set_stays_the_reference_through_training(model):
  config = make_config(
    **{"conditioning.kl_set": "frozen", "weightings.alpha_range": (0.01, 1.0)}
  )
  start = reference(model)
  state, history, _ = train(config, mesh_of(), 2, model=model)
  np.testing.assert_allclose(history[0]["kl"].sum, 0, atol=1e-3)
  bank = build.bank(config, model)
  assert bank.num_sets == 3
  kernel = mlp_kernel(model, state.params)
  before = mlp_kernel(model, start)
  assert kernel.shape == (2, *before.shape)
  assert not np.array_equal(kernel[0], before)
  policy = bank.mix(state.params, start, np.float32([0, 0, 1]))
  jax.tree.map(np.testing.assert_array_equal, policy, start)

"""The peft library's adapters: sets to start from, and parts to combine."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import runs
import small_t5
from safetensors import numpy as safetensors

import clp_jax
from clp_jax import adapter_folders, build, initial, interop
from clp_jax.cli.arguments import load_config
from clp_jax.errors import ConfigError
from clp_jax.interop import leaves, peft

TEXTS = ["Brivane opened the museum.", "It happened in Merrowby on Friday."]
RESPONSES = ["Brivane opened the museum .", "Farrogan"]
NAMES = ("rouge", "nli")
WEIGHTS = {"rouge": 0.3, "nli": 0.7}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(sft_run, tmp_path_factory):
  """A base, a LoRA run of it, its adapters, and other folders."""
  root = tmp_path_factory.mktemp("starts")
  for format, workdir, output in (
    ("hf", sft_run, root / "base"),
    ("peft", root / "run", root / "adapters"),
  ):
    if format == "peft":
      fields = {"steering": "lora", "adapters.rank": 2, "adapters.scale": 0.5}
      runs.make_run(workdir, str(root / "base"), **fields)
    status, _, err = runs.clp(
      *("export", "--workdir", workdir, "--format", format),
      *("--output", output),
    )
    assert status == 0, err
  config, params = interop.load_t5(root / "base")
  vocabulary = (root / "base" / "spiece.model").read_bytes()
  params["token_embedder"]["embedding"] *= 1.5
  interop.save_t5(root / "other", config, params, "hf", vocabulary=vocabulary)
  narrow = small_t5.random_params(small_t5.V1_1)
  interop.save_t5(root / "narrow", small_t5.V1_1, narrow, "hf")
  return root


def train(made, workdir, **fields):
  init = repr(tuple(str(made / "adapters" / name) for name in NAMES))
  settings = {
    "steering": "lora",
    "adapters.rank": 2,
    "adapters.scale": 0.5,
    "adapters.init": init,
    "train.steps": 0,
  }
  return runs.clp(
    *runs.train_arguments(workdir, str(made / "base"), **(settings | fields))
  )


def edited(made, folder, drop=(), **fields):
  """A copy of an adapter whose config says something else."""
  shutil.copytree(made / "adapters" / "nli", folder)
  small_t5.edit_json(folder / CONFIG, drop=drop, **fields)
  return folder


def test_sets_start_from_adapters(made, tmp_path):
  status, _, err = train(made, tmp_path / "run")
  assert status == 0, err
  policy = clp_jax.Policy.load(str(tmp_path / "run"))
  source = clp_jax.Policy.load(str(made / "run"))
  jax.tree.map(np.testing.assert_array_equal, policy.sets, source.sets)
  jax.tree.map(
    np.testing.assert_array_equal, policy.reference, source.reference
  )


@pytest.mark.parametrize("scan", [False, True])
def test_kernels_that_adapters_lack_start_at_the_base(made, tmp_path, scan):
  folder = edited(made, tmp_path / "nli", lora_alpha=3)
  own = safetensors.load_file(folder / TENSORS)
  kept = {  # as peft adapts a T5 unless told otherwise, and not every layer
    name: x
    for name, x in own.items()
    if name.split(".")[-3] in ("q", "v") and "block.1." not in name
  }
  assert 0 < len(kept) < len(own)
  safetensors.save_file(kept, folder / TENSORS)
  init = (str(made / "adapters" / "rouge"), str(folder))
  fields = {"steering": "lora", "adapters.rank": 2, "adapters.init": repr(init)}
  config = load_config(
    runs.CONFIG,
    runs.overrides(str(made / "base"), **fields, **{"model.scan_layers": scan}),
  )
  started = initial.load_initial(config)
  reference = jax.device_get(started.params)
  bank = build.bank(config, started.model_config)
  params = adapter_folders.start_from(
    bank.init(reference, jax.random.key(1)),
    adapter_folders.load_starts(config),
  )
  model_config = interop.load_config(made / "base")
  base = leaves.flatten(reference)
  for path, coefficients in zip(init, np.eye(2), strict=True):
    lora = peft.load(path, model_config)
    expected = leaves.flatten(adapter_folders.merge(lora, reference))
    policy = bank.mix(params, reference, coefficients)
    for name, leaf in leaves.flatten(policy).items():
      np.testing.assert_allclose(leaf, expected[name], atol=1e-6)
      if name.endswith(("mlp/wo/kernel", "/key/kernel")) and path == init[1]:
        np.testing.assert_array_equal(leaf, base[name])
  # None is at rest: of a factor that is 0 as well no gradient would come.
  for name, leaf in leaves.flatten(params).items():
    if name.endswith("lora_a"):
      assert np.square(leaf).sum(-2).min() > 0.1, name


@pytest.mark.slow  # trains
def test_other_scales_and_stacked_layers_start_the_same(made, tmp_path):
  shutil.copytree(made / "adapters", tmp_path / "adapters")
  init = repr(tuple(str(tmp_path / "adapters" / name) for name in NAMES))
  fields = {
    "adapters.scale": 2.0,
    "adapters.init": init,
    "model.scan_layers": True,
  }
  status, _, err = train(made, tmp_path / "first", **fields)
  assert status == 0, err
  policy = clp_jax.Policy.load(str(tmp_path / "first"))
  source = clp_jax.Policy.load(str(made / "run"))
  np.testing.assert_allclose(
    policy.score(TEXTS, RESPONSES, WEIGHTS),
    source.score(TEXTS, RESPONSES, WEIGHTS),
    atol=1e-4,
  )
  shutil.rmtree(tmp_path / "adapters")  # what was begun needs them no more
  status, _, err = train(
    made, tmp_path / "first", **(fields | {"train.steps": 1})
  )
  assert status == 0, err
  row = runs.metrics(tmp_path / "first")[0]
  assert abs(row["kl"]) > 1e-4  # the first policy is not the reference
  status, _, err = train(made, tmp_path / "second", **fields)
  assert status == 2 and "holds no adapter" in err


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"adapters.rank": 8}, "has rank 2, and this run 8; set adapters.rank=2"),
    (
      {"adapters.targets": "('mlp',)"},
      "adapts k, o, q, v too, and this run only wi_0, wi_1, wo; set",
    ),
    ({"model.init": "BASE/other"}, "adapts BASE/base, and model.init is BASE"),
    ({"adapters.init": "('BASE/adapters/nli',)"}, "names 1 folders for 2 obj"),
    (
      {"adapters.init": "('BASE/base', 'BASE/base')"},
      "BASE/base holds no adapter: it has no adapter_config.json",
    ),
    ({"steering": "svd_lora"}, "adapters.init is of steering lora, got svd_"),
    ({"sft.steps": 2}, "but sft.steps = 2 finetunes that first"),
  ],
)
def test_adapters_that_do_not_fit_are_one_line(made, tmp_path, fields, message):
  fields = {
    k: v.replace("BASE", str(made)) if isinstance(v, str) else v
    for k, v in fields.items()
  }
  status, out, err = train(made, tmp_path / "run", **fields)
  assert status == 2 and out == "", err
  assert err.count("\n") == 1 and message.replace("BASE", str(made)) in err, err
  assert not (tmp_path / "run").exists()


def test_what_can_not_be_read_is_named(made, tmp_path):
  config = interop.load_config(made / "base")
  for i, (fields, message) in enumerate(
    (
      ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
      ({"use_dora": True}, "use_dora = True is not supported; .* False"),
      ({"bias": "all"}, "bias = 'all' is not supported; it must be 'none'"),
      ({"r": 0}, "r must be an integer >= 1, got 0"),
      ({"r": 4}, r"is of another base: .* has lora_A and lora_B of shapes"),
      # Of those peft takes the start out of the base.
      ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not"),
      ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens = .5. is"),
      ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
    )
  ):
    folder = edited(made, tmp_path / f"adapter{i}", **fields)
    with pytest.raises(ValueError, match=message):
      peft.load(str(folder), config)
  narrow = interop.load_config(made / "narrow")
  with pytest.raises(ValueError, match="is of another base: .* of shapes"):
    peft.load(str(made / "adapters" / "nli"), narrow)
  (folder / TENSORS).unlink()
  small_t5.edit_json(folder / CONFIG, lora_alpha=1)
  with pytest.raises(ValueError, match=f"lacks {TENSORS}"):
    peft.load(str(folder), config)


def test_rank_stabilised_adapters_are_scaled_by_the_root(made, tmp_path):
  folder = edited(made, tmp_path / "adapter", use_rslora=True, lora_alpha=3)
  config = interop.load_config(made / "base")
  lora = peft.load(str(folder), config)
  np.testing.assert_allclose(lora.scale, 3 / 2**0.5)
  own = safetensors.load_file(folder / TENSORS)
  assert 2 * len(lora.factors) == len(own)


@pytest.mark.parametrize(
  ("init", "base", "is_same"),
  [
    ("here/models/Qwen3-0.6B", "Qwen/Qwen3-0.6B", True),
    ("hub/models--Qwen--Qwen3-0.6B/snapshots/ab", "Qwen/Qwen3-0.6B", True),
    ("Qwen/Qwen3-0.6B@v1", "/elsewhere/Qwen3-0.6B", True),
    ("here/any", "", True),
    ("here/models/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B", False),
    ("hub/models--Qwen--Qwen3-0.6B-Base/snapshots/a", "Qwen/Qwen3-0.6B", False),
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", False),
    ("here/models/Qwen3-0.6B/", "Qwen/Qwen3-0.6B/", True),
    # A folder on the way is no name.
    ("here/Qwen3-0.6B/other", "Qwen/Qwen3-0.6B", False),
    ("other", f"elsewhere/{pathlib.Path.cwd().name}", False),
    ("hub/models--a--Qwen3-0.6B/snapshots/ab", "Qwen/Qwen3-0.6B", False),
    ("Qwen/Qwen3-0.6B@v1", "Qwen/Qwen3-0.6B@v1", True),
    ("here/models/Qwen3-0.6B", "Qwen/Qwen3-0.6B@v1", True),
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@v1", False),
  ],
)
def test_a_base_is_known_by_its_name(init, base, is_same):
  if is_same:
    adapter_folders.check_base("lora", base, init)
    return
  with pytest.raises(ConfigError, match=f"lora adapts {base}, and model.init"):
    adapter_folders.check_base("lora", base, init)


def combine(parts, output, *rest, method="soup"):
  return runs.clp(
    *("combine", *(f"{name}={folder}" for name, folder in parts.items())),
    *("--method", method, "--output", output, *rest),
  )


@pytest.mark.parametrize(
  ("method", "names"), [("soup", NAMES), ("mod", NAMES), ("dera", ["nli"])]
)
def test_sets_that_are_combined_are_the_adapters(made, tmp_path, method, names):
  parts = {name: made / "adapters" / name for name in names}
  given = ("--config", runs.CONFIG)
  status, _, err = combine(parts, tmp_path / "run", *given, method=method)
  assert status == 0, err
  policy = clp_jax.Policy.load(str(tmp_path / "run"))
  mixing = "parameters" if method == "soup" else "logits"
  assert policy.config.mixing == mixing
  source = clp_jax.Policy.load(str(made / "run"))
  expected = [source.params({name: 1.0}) for name in names]
  if method == "dera":
    expected.append(source.reference)
  for i, params in enumerate(expected):
    jax.tree.map(
      lambda sets, leaf, i=i: np.testing.assert_allclose(
        sets[i], leaf, atol=1e-6
      ),
      policy.sets,
      params,
    )


@pytest.mark.slow
def test_adapters_are_combined_as_runs_are(made, tmp_path):
  parts = {name: made / "adapters" / name for name in NAMES}
  status, out, err = combine(parts, tmp_path / "x")
  assert status == 2 and "are adapters, which say nothing of data" in err
  status, _, err = combine(parts, tmp_path / "soup", "--config", runs.CONFIG)
  assert status == 0, err
  source = clp_jax.Policy.load(str(made / "run"))
  policy = clp_jax.Policy.load(str(tmp_path / "soup"))
  expected = leaves.flatten(source.params(WEIGHTS))
  for path, leaf in leaves.flatten(policy.params(WEIGHTS)).items():
    np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
  # One of an equal run of our own.
  single = tmp_path / "single"
  fields = {"steering": "none", "objectives": "('rouge',)"}
  runs.make_run(single, str(made / "base"), **fields)
  mixed = {"rouge": single, "nli": made / "adapters" / "nli"}
  status, _, err = combine(mixed, tmp_path / "both")
  assert status == 0, err
  policy = clp_jax.Policy.load(str(tmp_path / "both"))
  np.testing.assert_allclose(
    policy.score(TEXTS, RESPONSES, {"nli": 1}),
    source.score(TEXTS, RESPONSES, {"nli": 1}),
    atol=1e-4,
  )
  record = json.loads((tmp_path / "both" / "parts.json").read_text())
  assert [p["folder"] for p in record][:2] == [str(p) for p in mixed.values()]


def test_parts_of_another_base_are_one_line(made, tmp_path):
  named = {"base_model_name_or_path": "someone/else"}
  for i, (fields, message) in enumerate(
    (
      (named, "adapts someone/else, and model.init is tiny; set model.init to"),
      (
        {"base_model_name_or_path": str(made / "other")},
        "start from different models",
      ),
    )
  ):
    folder = edited(made, tmp_path / f"adapter{i}", **fields)
    parts = {"rouge": made / "adapters" / "rouge", "nli": folder}
    status, out, err = combine(
      *(parts, tmp_path / "out", "--config", runs.CONFIG)
    )
    assert status == 2 and out == "" and err.count("\n") == 1, err
    assert message in err and str(folder) in err, err
    assert not pathlib.Path(tmp_path / "out").exists()

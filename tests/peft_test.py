"""`clp export --format peft`: what is written, by NumPy; peft is not needed."""

import json

import jax
import lora_runs
import numpy as np
import pytest
import runs
import small_t5
from lora_runs import RANGE, export, start_run
from safetensors import numpy as safetensors

import clp_jax
from clp_jax import interop

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BESIDE = (
  *("README.md", "export.json", "reward_statistics.json"),
  "training_config.json",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  return lora_runs.make_bases(tmp_path_factory.mktemp("bases"))


def mixed(base, folders, coefficients):
  """{name: tensor} of base + sum_i c_i lora_alpha / r  B A."""
  tensors = safetensors.load_file(base / "model.safetensors")
  changed = set()
  for folder, c in zip(folders, coefficients, strict=True):
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    own = safetensors.load_file(folder / TENSORS)
    for name in list(own):
      if not name.endswith(".lora_A.weight"):
        continue
      module = name.removesuffix(".lora_A.weight")
      a, b = own.pop(name), own.pop(f"{module}.lora_B.weight")
      assert a.shape[0] == b.shape[1] == config["r"]
      bare = module.removeprefix("base_model.model.")
      assert bare.rpartition(".")[2] in config["target_modules"]
      tensors[f"{bare}.weight"] = tensors[f"{bare}.weight"] + np.float32(
        c * scale
      ) * (b @ a)
      changed.add(bare)
    assert not own
  # Each linear map that the config names is there.
  modules = set(config["target_modules"])
  assert changed == {
    bare
    for bare in (name.removesuffix(".weight") for name in tensors)
    if bare.rpartition(".")[2] in modules
  }
  return tensors


def assert_same(tensors, folder):
  expected = safetensors.load_file(folder / "model.safetensors")
  assert tensors.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(
      tensors[name], array, atol=2e-6, rtol=1e-5, err_msg=name
    )


@pytest.mark.parametrize(
  "family, fields, alpha",
  [
    pytest.param("t5", {}, None, marks=pytest.mark.slow),
    pytest.param(
      *("t5", {"steering": "svd_lora", "model.scan_layers": True}, None),
      marks=pytest.mark.slow,
    ),
    ("t5", {"adapters.targets": ("mlp",), **RANGE}, 0.3),
    pytest.param(
      *("decoder", {"model.scan_layers": True}, None), marks=pytest.mark.slow
    ),
    pytest.param(
      *("decoder", {"conditioning.shared": "trained", **RANGE}, 0.3),
      marks=pytest.mark.slow,
    ),
    (
      "decoder",
      {"steering": "svd_lora", "conditioning.kl_set": "frozen", **RANGE},
      0.3,
    ),
  ],
)
def test_adapters_add_up_to_every_weighting(
  bases, tmp_path, family, fields, alpha
):
  workdir = start_run(tmp_path / "run", bases[family], **fields)
  output = tmp_path / "peft"
  export(workdir, output)
  policy = clp_jax.Policy.load(workdir)
  names = ["long", "short"]
  if alpha is not None and not policy.bank.frozen_kl:
    names.append("kl")
  has_base = "conditioning.shared" in fields
  assert sorted(p.name for p in output.iterdir()) == sorted(
    [*names, *BESIDE] + ["base"] * has_base
  )
  base = output / "base" if has_base else bases[family]
  for name in names:
    config = json.loads((output / name / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == (
      "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    )
    assert config["r"] == 3 + (policy.config.steering == "svd_lora")
    np.testing.assert_allclose(config["lora_alpha"] / config["r"], 0.7)
  for i, long in enumerate((0.0, 0.25, 1.0)):
    weights = {"long": long, "short": 1 - long}
    coefficients = policy.coefficients(weights, alpha)[: len(names)]
    policy.export(str(tmp_path / f"hf{i}"), "hf", weights, alpha)
    tensors = mixed(base, [output / name for name in names], coefficients)
    assert_same(tensors, tmp_path / f"hf{i}")
    # The same in one folder, which replaces the last one there.
    text = ",".join(f"{name}={w}" for name, w in weights.items())
    more = () if alpha is None else ("--alpha", alpha)
    export(workdir, tmp_path / "one", "--weights", text, *more)
    one = tmp_path / "one"
    its_base = one / "base" if has_base else base
    assert_same(mixed(its_base, [one], [1.0]), tmp_path / f"hf{i}")


def test_an_objectives_factors_are_written_as_they_are(bases, tmp_path):
  workdir = start_run(tmp_path / "run", bases["decoder"])
  export(workdir, tmp_path / "peft")
  sets = clp_jax.Policy.load(workdir).sets
  leaf = sets["decoder"]["layers_1"]["mlp"]["wi_0"]
  for i, name in enumerate(("long", "short")):
    own = safetensors.load_file(tmp_path / "peft" / name / TENSORS)
    module = "base_model.model.model.layers.1.mlp.gate_proj"
    for kind in "AB":
      np.testing.assert_array_equal(
        own[f"{module}.lora_{kind}.weight"].T, leaf[f"lora_{kind.lower()}"][i]
      )


def test_a_run_that_began_elsewhere_brings_its_base(bases, tmp_path):
  """From a checkpoint that was finetuned first, or another vocabulary."""
  for i, fields in enumerate(
    ({"sft.steps": 1}, {"model.vocabulary": str(bases["t5"] / "spiece.model")})
  ):
    workdir = start_run(tmp_path / f"run{i}", bases["t5"], **fields)
    export(workdir, tmp_path / f"peft{i}", "--dtype", "bfloat16")
    base = tmp_path / f"peft{i}" / "base"
    config, params = interop.load_t5(base)
    assert config == small_t5.V1_1
    assert {str(p.dtype) for p in jax.tree.leaves(params)} == {"bfloat16"}
    assert (base / "spiece.model").read_bytes() == lora_runs.VOCABULARY
    own = json.loads((tmp_path / f"peft{i}" / "long" / CONFIG).read_text())
    assert own["base_model_name_or_path"] == str(base)


@pytest.mark.slow
def test_an_export_leaves_nothing_of_the_last_one(bases, tmp_path):
  workdir = start_run(tmp_path / "run", bases["t5"], **{"sft.steps": 1})
  output = tmp_path / "out"
  export(workdir, output)
  export(workdir, output, "--weights", "long=1")
  assert sorted(p.name for p in output.iterdir()) == [
    *("README.md", CONFIG, TENSORS, "base", *BESIDE[1:])
  ]
  export(workdir, output, "--weights", "long=1", format="hf")
  assert interop.load_t5(output)[0] == small_t5.V1_1
  assert not list(output.glob("adapter*")) and not (output / "base").exists()


def test_the_readme_names_what_there_is(bases, tmp_path):
  workdir = start_run(tmp_path / "run", bases["t5"], **RANGE)
  export(workdir, tmp_path / "peft")
  text = (tmp_path / "peft" / "README.md").read_text()
  for part in (
    *("AutoModelForSeq2SeqLM", 'combination_type="cat"', str(bases["t5"])),
    *('adapter_name="long"', 'adapter_name="kl"', "alpha = 0.1"),
  ):
    assert part in text
  compile(lora_runs.code_of(text), "README.md", "exec")


@pytest.mark.parametrize(
  ("rank", "arguments", "shown"),
  [
    (
      8,
      (),
      ("--max-lora-rank 8 --lora-modules long=DIR/long`, and that of a",),
    ),
    (9, ("--weights", "long=1"), ("--max-lora-rank 16 --lora-modules NAME=",)),
    (9, ("--weights", "long=0.5,short=0.5"), ("--max-lora-rank 32 ",)),
    (200, ("--weights", "long=0.5,short=0.5"), ("no adapter of rank 400",)),
  ],
)
def test_the_readme_says_how_they_are_served_and_trained_on(
  bases, tmp_path, rank, arguments, shown
):
  base = bases["decoder"]
  workdir = start_run(tmp_path / "run", base, **{"adapters.rank": rank})
  export(workdir, tmp_path / "peft", *arguments)
  text = (tmp_path / "peft" / "README.md").read_text()
  folders = "('DIR',)" if arguments else "('DIR/long', 'DIR/short')"
  parts = "NAME=DIR" if arguments else "long=DIR/long short=DIR/short"
  own = rank * (2 if "0.5" in str(arguments) else 1)
  for part in (
    *shown,
    f"--config.model.init={base} ",
    f'--config.adapters.rank={own} --config.adapters.init="{folders}"`',
    f"`clp combine {parts} --method soup ",
  ):
    assert part in text


@pytest.mark.parametrize(
  "fields, arguments, message",
  [
    ({"steering": "full"}, (), "this run's steering is full, which has no"),
    ({"soft_tokens.length": 2}, (), "2 soft tokens before their input"),
    ({}, ("--weights", "tall=1"), "--weights: unknown objective"),
    ({}, ("--alpha", 0.5), "--weights: give weights for long, short"),
  ],
)
def test_what_can_not_be_exported_is_one_line(
  bases, tmp_path, fields, arguments, message
):
  workdir = start_run(tmp_path / "run", bases["t5"], **fields)
  status, out, err = runs.clp(
    *("export", "--workdir", workdir, "--format", "peft"),
    *("--output", tmp_path / "out", *arguments),
  )
  assert status == 2 and out == ""
  assert err.count("\n") == 1 and message in err, err
  assert not (tmp_path / "out").exists()

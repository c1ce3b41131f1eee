"""What benchmarks measure and report."""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import growth, mixing, models, rollout, timing, update
from clp_jax import row_mixing
from clp_jax.models import families, t5
from clp_jax.models.presets import PRESETS


def test_runs_take_turns_after_one_that_is_not_counted():
  calls = []
  times = timing.take_turns(
    {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2
  )
  assert calls == ["a", "b"] * 3
  assert [len(t.wall) for t in times.values()] == [2, 2]


def test_rates_and_ratios_are_those_of_medians():
  ours = timing.Times([1.0, 9.0, 2.0], [1.0, 1.0, 1.0])
  theirs = timing.Times([8.0, 3.0, 1.0], [2.0, 4.0, 3.0])
  row = timing.row("ours", ours, tokens=10, against=theirs, size="tiny")
  assert (row["median s"], row["min s"], row["max s"]) == (2, 1, 9)
  assert (row["tokens/s"], row["ratio"], row["cpu ratio"]) == (5, 1.5, 3)
  assert row["size"] == "tiny" and row["n"] == 3
  assert timing.multiple(ours, theirs) == {"times": 2 / 3, "cpu times": 1 / 3}


def test_work_is_two_flops_a_parameter_and_token_and_attention():
  config = PRESETS["small"]
  params = t5.abstract_params(config)
  decoder = sum(
    leaf.size for leaf in _kernels(params["decoder"], "encoder_decoder")
  )
  encoder = sum(leaf.size for leaf in _kernels(params["encoder"]))
  cross = config.num_decoder_layers * 2 * 512 * 384
  query_and_output = cross
  attention = 4 * 384 * (8 * 32**2 + 8 * 16 * (16 + 32))
  expected = (
    2 * 32 * (encoder + cross) + 2 * 16 * (decoder + query_and_output)
  ) + attention
  flops = families.build(config).flops(3, 3, 32, 16)
  assert flops == pytest.approx(3 * expected)


def test_decoding_reads_kernels_and_caches_at_every_token():
  config = PRESETS["small"]
  one, two = (models.decode_bytes(config, b, 32, 16) for b in (1, 2))
  keys_and_values = 2 * 8 * 384 * 4
  assert two - one == 16 * keys_and_values * (32 + 8)
  decoder = _kernels(t5.abstract_params(config)["decoder"], "encoder_decoder")
  cross = 8 * 2 * 512 * 384
  kernels = sum(leaf.size for leaf in decoder) + cross
  assert one - (two - one) == 16 * 4 * kernels


def test_decoders_read_fewer_keys_and_a_source_once_for_its_samples():
  config = models.sizes("qwen3")["0.6b"]
  one, two = (models.decode_bytes(config, b, 32, 16) for b in (1, 2))
  keys_and_values = 2 * 28 * 8 * 128 * 4
  assert two - one == 16 * keys_and_values * (32 + 8)
  shared = models.decode_bytes(config, 2, 32, 16, samples=2)
  assert two - shared == 16 * keys_and_values * 32
  params = families.build(config).abstract()
  table = params["token_embedder"]["embedding"].size
  kernels = sum(leaf.size for leaf in _kernels(params["decoder"]))
  assert one - (two - one) == 16 * 4 * (kernels + table)


def test_every_family_has_small_models_and_those_that_are_published():
  named = {family: [*models.sizes(family)] for family in models.FAMILIES}
  assert named["t5"] == [
    *("micro", "tiny", "mini", "small", "base", "large", "xl", "xxl")
  ]
  assert named["llama"] == ["tiny", "small"]
  assert named["qwen3"] == ["tiny", "small", "0.6b", "4b", "8b"]
  assert named["gemma3_text"] == ["tiny", "small", "1b", "4b", "12b"]
  for family in models.FAMILIES[1:]:
    for config in models.sizes(family).values():
      assert config.architecture == family
    small = families.build(models.sizes(family)["small"]).abstract()
    assert 25e6 < sum(leaf.size for leaf in jax.tree.leaves(small)) < 35e6


def test_growth_varies_one_thing_at_a_time():
  args = argparse.Namespace(
    sizes=["tiny", "mini"], objectives=[1, 2], weightings=[4, 8], rows=[32, 64]
  )
  first, *varied, last = growth.points(args)
  assert first == last == growth.Point("mini", 2, 4, 32)
  names = ("objectives", "weightings", "size", "rows")
  for point, name in zip(varied, names, strict=True):
    assert getattr(point, name) != getattr(first, name)
    assert point._replace(**{name: getattr(first, name)}) == first


@pytest.mark.slow
def test_growth_is_a_table_of_times_and_memory(monkeypatch, capsys):
  arguments = "--sizes tiny --objectives 2,3 --weightings 4 --rows 32 --n 1"
  words = ["it", *arguments.split(), "--source=8", "--target=4", "--json"]
  monkeypatch.setattr(sys, "argv", words)
  growth.main()
  rows = json.loads(capsys.readouterr().out)["rows"]
  assert [row["objectives"] for row in rows] == [2, 3, 2]
  for name in ("update", "serving"):
    assert rows[0][f"{name} times"] == 1
    assert (
      rows[1][f"{name} GB"] > rows[0][f"{name} GB"] == rows[2][f"{name} GB"]
    )
    ratio = rows[2][f"{name} s"] / rows[0][f"{name} s"]
    assert rows[2][f"{name} times"] == pytest.approx(ratio)


@pytest.mark.slow
def test_a_reward_that_waits_is_hidden_by_sampling_ahead():
  words = "--waits 0.5 --steps 16 --n 1 --json".split()
  found = subprocess.run(
    [sys.executable, "-m", "benchmarks.ahead", *words],
    # One device: on 8 virtual ones of these cores nothing was hidden.
    env=os.environ | {"XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    check=True,
  )
  without, with_it = json.loads(found.stdout)["rows"]
  assert (without["rollout.ahead"], with_it["rollout.ahead"]) == (0, 1)
  assert without["s a step"] - 0.1 > with_it["s a step"] > 0.45
  ratio = without["s a step"] / with_it["s a step"]
  assert with_it["times faster"] == pytest.approx(ratio)


def test_a_size_is_of_its_family(monkeypatch, capsys):
  parser = argparse.ArgumentParser()
  models.add_arguments(parser, batch=1, source=2, target=3)
  monkeypatch.setattr(sys, "argv", ["it", "--family", "llama", "--size", "xl"])
  with pytest.raises(SystemExit):
    models.parse(parser)
  assert "--family llama must be one of tiny, small" in capsys.readouterr().err


def test_decoders_sample_no_end():
  for family in models.FAMILIES:
    args = argparse.Namespace(family=family, size="tiny", dtype="float32")
    (forbidden,) = np.flatnonzero(~models.allowed(models.config_of(args)))
    assert forbidden == (0 if family == "t5" else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  "family, flags",
  (("t5", "benchmarks.rollout "), ("qwen3", "--family qwen3 ")),
)
def test_the_documented_commands_print_their_table(
  family, flags, monkeypatch, capsys
):
  page = pathlib.Path(__file__).parents[1] / "docs" / "speed.md"
  (command,) = [
    line.strip()
    for line in page.read_text().splitlines()
    if line.startswith("    ") and f"{flags}--size tiny" in line
  ]
  python, m, module, *arguments = shlex.split(command)
  assert (python, m, module) == ("python", "-m", "benchmarks.rollout")
  (row,) = _rows(rollout, arguments, monkeypatch, capsys)
  assert (row["what"], row["batch"], row["n"]) == ("clp_jax", 8, 2)
  assert row["tokens/s"] == pytest.approx(8 * 8 / row["median s"])
  assert row.get("family", "t5") == family


@pytest.mark.slow
@pytest.mark.parametrize("family", ("t5", "gemma3_text"))
def test_updates_of_either_kind_are_timed(family, monkeypatch, capsys):
  arguments = shlex.split(
    f"--family {family} --size tiny --batch 16 --source 18 --target 2 --n 1"
  )
  rows = _rows(update, arguments, monkeypatch, capsys)
  tokens = 16 * (18 + 2)
  assert rows[0]["what"] == "supervised, clp_jax" and len(rows) == 4
  assert rows[0]["tokens/s"] == pytest.approx(tokens / rows[0]["median s"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ("t5", "gemma2"))
def test_steering_of_either_kind_is_timed(family, monkeypatch, capsys):
  arguments = shlex.split(
    f"--family {family} --size tiny --batch 2 --source 8 --target 2 --n 1"
  )
  rows = _rows(mixing, arguments, monkeypatch, capsys)
  assert [row["what"] for row in rows if "tokens/s" in row] == [
    *("merged, m = 2", "per row, m = 2", "per row, m = 3", "DeRa, 2 models")
  ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ("t5", "qwen3"))
def test_adapters_are_timed_beside_whole_sets(family, monkeypatch, capsys):
  tiny = f"--family {family} --size tiny --rank 2 --n 1 "
  arguments = shlex.split(
    f"{tiny} --only reinforce --steering full,lora --batch 16 --source 18 "
    "--target 2"
  )
  whole, adapters = _rows(update, arguments, monkeypatch, capsys)
  assert whole["what"] == "reinforce, full-CLP, m = 3"
  assert adapters["what"] == "reinforce, LoRA-CLP, m = 3"
  assert adapters["times"] == pytest.approx(
    adapters["median s"] / whole["median s"]
  )
  # Of whole sets three and their optimizer's, of adapters the base.
  times = adapters["memory times"]
  assert times == pytest.approx(adapters["GB"] / whole["GB"]) and times < 0.7
  arguments = shlex.split(
    f"{tiny} --steering lora --one-by-one --batch 2 --source 8 --target 2"
  )
  rows = _rows(mixing, arguments, monkeypatch, capsys)
  decoded = ("merged, m = 2", "per row, m = 2", "per row, m = 3")
  assert [row["what"] for row in rows if "tokens/s" in row] == [
    *(*decoded, "one by one, m = 2")
  ]


@pytest.mark.parametrize("steering", (mixing.full, mixing.lora))
def test_what_is_mixed_for_rows_is_what_is_merged(steering):
  """A row of its own weighting decodes as the policy that is merged for it."""
  args = argparse.Namespace(family="qwen3", size="tiny", dtype="float32")
  config = models.config_of(args)
  base = models.random_params(config)
  options = {"rank": 2} if steering is mixing.lora else {}
  steered = steering(config, base, 3, **options)
  c = np.asarray([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], np.float32)
  tokens = models.random_tokens(2, 6, config)
  score = jax.jit(families.build(config).score)
  rows = row_mixing.mix_rows(steered.sets, steered.steerable, c)
  found, _ = score(rows, tokens, tokens)
  plain, _ = score(base, tokens, tokens)
  for i in range(2):
    one = tokens[i : i + 1]
    expected, _ = score(steered.mix(c[i]), one, one)
    np.testing.assert_allclose(found[i : i + 1], expected, atol=1e-4)
    assert abs(expected - plain[i : i + 1]).max() > 1e-3


def _rows(module, arguments, monkeypatch, capsys):
  """What a benchmark prints without transformers."""
  words = [module.__name__, *arguments, "--no-peer", "--json"]
  monkeypatch.setattr(sys, "argv", words)
  module.main()
  return json.loads(capsys.readouterr().out)["rows"]


def _kernels(tree, without="nothing"):
  """Arrays named kernel, but for those below names that start so."""
  for name, value in tree.items():
    if name == "kernel":
      yield value
    elif isinstance(value, dict) and not name.startswith(without):
      yield from _kernels(value, without)

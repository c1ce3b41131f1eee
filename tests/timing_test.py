"""What benchmarks measure and report."""

import json
import pathlib
import shlex
import sys

import pytest

from benchmarks import models, rollout, timing
from clp_jax.models import t5
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
  assert models.forward_flops(config, 3, 32, 16) == pytest.approx(3 * expected)


def test_decoding_reads_kernels_and_caches_at_every_token():
  config = PRESETS["small"]
  one, two = (models.decode_bytes(config, b, 32, 16) for b in (1, 2))
  keys_and_values = 2 * 8 * 384 * 4
  assert two - one == 16 * keys_and_values * (32 + 8)
  decoder = _kernels(t5.abstract_params(config)["decoder"], "encoder_decoder")
  cross = 8 * 2 * 512 * 384
  kernels = sum(leaf.size for leaf in decoder) + cross
  assert one - (two - one) == 16 * 4 * kernels


@pytest.mark.slow
def test_the_documented_command_prints_its_table(monkeypatch, capsys):
  page = pathlib.Path(__file__).parents[1] / "docs" / "speed.md"
  (command,) = [
    line.strip()
    for line in page.read_text().splitlines()
    if line.startswith("    ") and "--size tiny" in line
  ]
  python, m, module, *arguments = shlex.split(command)
  assert (python, m, module) == ("python", "-m", "benchmarks.rollout")
  arguments += ["--no-peer", "--json"]
  monkeypatch.setattr(sys, "argv", [module, *arguments])
  rollout.main()
  (row,) = json.loads(capsys.readouterr().out)["rows"]
  assert (row["what"], row["batch"], row["n"]) == ("clp_jax", 8, 2)
  assert row["tokens/s"] == pytest.approx(8 * 8 / row["median s"])


def _kernels(tree, without="nothing"):
  """Arrays named kernel, but for those below names that start so."""
  for name, value in tree.items():
    if name == "kernel":
      yield value
    elif isinstance(value, dict) and not name.startswith(without):
      yield from _kernels(value, without)

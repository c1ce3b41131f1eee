"""The command: what it does, and what it says to what can't work."""

import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs

import clp_jax


def fails(status, message, *arguments):
  """The command fails with this status, on one line that says this."""
  got, out, err = runs.clp(*arguments)
  assert got == status, err
  assert "Traceback" not in err
  last = err.splitlines()[-1]
  assert last.startswith("clp") and message in last, last
  return out


# What it does.


def test_evaluate_writes_the_contracts_files(clp_run):
  status, out, err = runs.clp(
    *("evaluate", "--workdir", clp_run, "--grid", 3, "--prompts", 6)
  )
  assert status == 0, err
  assert "hypervolume" in out and "full-CLP" in out
  folder = clp_run / "evaluation"
  front = json.loads((folder / "front.json").read_text())
  assert front["objectives"] == ["rouge", "nli"]
  assert front["step"] == 4 and front["prompts"] == 6
  assert front["reference_point"] == [0, 0]
  assert [p["weights"]["nli"] for p in front["points"]] == [1, 0.5, 0]
  for point in front["points"]:
    assert set(point["rewards"]) == {"rouge", "nli"}
    for estimate in (*point["rewards"].values(), point["kl"], point["value"]):
      assert np.isfinite(estimate["mean"]) and estimate["stderr"] >= 0
    value = (1 - point["alpha"]) * sum(
      point["weights"][n] * point["rewards"][n]["mean"]
      for n in front["objectives"]
    ) - point["alpha"] * point["kl"]["mean"]
    np.testing.assert_allclose(point["value"]["mean"], value, atol=1e-6)
  samples = [
    json.loads(line)
    for line in (folder / "samples.jsonl").read_text().splitlines()
  ]
  assert {"document", "weights", "summary"} <= set(samples[0])
  assert (folder / "front.csv").read_text().count("\n") == 4
  assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_folders_may_be_relative(sft_run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  fields = {"train.steps": 1}
  status, _, err = runs.clp(*runs.train_arguments("run", sft_run, **fields))
  assert status == 0, err
  status, _, err = runs.clp("evaluate", "--workdir", "run", "--grid", 2)
  assert status == 0, err
  assert clp_jax.Policy.load("run").reference is not None


def test_the_same_evaluation_gives_the_same_numbers(clp_run):
  fronts = []
  for _ in range(2):
    runs.clp(*("evaluate", "--workdir", clp_run, "--prompts", 4))
    fronts.append((clp_run / "evaluation" / "front.json").read_text())
  assert fronts[0] == fronts[1]


def test_generate_answers_each_line_with_its_own_weighting(clp_run, tmp_path):
  rows = [
    {"document": "Brivane opened the museum.", "id": 3},
    {"document": "Brivane opened the museum.", "weights": {"rouge": 1}},
  ]
  file = tmp_path / "in.jsonl"
  file.write_text("\n\n".join(json.dumps(row) for row in rows))
  arguments = (
    *("generate", "--workdir", clp_run, "--input", file),
    *("--weights", "nli=0.7,rouge=0.3", "--seed", 5),
  )
  status, out, err = runs.clp(*arguments)
  assert status == 0, err
  answers = [json.loads(line) for line in out.splitlines()]
  policy = clp_jax.Policy.load(str(clp_run))
  expected = policy.generate(
    [row["document"] for row in rows],
    [{"nli": 0.7, "rouge": 0.3}, {"rouge": 1.0}],
    seed=5,
  )
  for row, answer, summary in zip(rows, answers, expected, strict=True):
    assert answer == row | {"summary": summary}


def test_generate_says_once_that_documents_are_cut(clp_run, tmp_path, caplog):
  short, long = ({"document": "mill " * n} for n in (2, 400))
  file = tmp_path / "in.jsonl"
  file.write_text("".join(json.dumps(r) + "\n" for r in (short, long, long)))
  command = ("generate", "--workdir", clp_run, "--weights", "nli=1")
  status, out, _ = runs.clp(*command, "--input", file)
  assert status == 0 and len(out.splitlines()) == 3
  (said,) = (x for x in caplog.messages if "data.source_length" in x)
  assert "in.jsonl, line 2: longer than" in said


def test_metrics_have_the_contracts_keys(clp_run):
  row = runs.metrics(clp_run)[0]
  assert {
    *("step", "loss", "return", "kl", "entropy", "length", "gradient_norm"),
    *("reward/rouge", "reward/nli", "cut_inputs"),
  } <= set(row)
  assert row["cut_inputs"] == 0
  assert abs(row["kl"]) < 1e-4  # the first policy is the reference
  assert any((clp_run / "metrics").iterdir())


def test_help_is_a_walk_through_commands_that_exist():
  _, out, _ = runs.clp("--help")
  assert max(map(len, out.splitlines())) <= 80
  walk = out.split("a walk")[1].replace("\\\n", " ")
  steps = re.findall(r"^ +(clp .+)$", walk, re.MULTILINE)
  assert len(steps) >= 6
  for step in steps:
    command, *rest = shlex.split(step)[1:]
    _, options, _ = runs.clp(command, "--help")
    for word in rest:
      if word.startswith("--") and not word.startswith("--config."):
        assert f"  {word} " in options, step


@pytest.mark.parametrize("command", ["", "train", "evaluate", "generate"])
def test_help_shows_an_example(command):
  status, out, _ = runs.clp(*command.split(), "--help")
  assert status == 0
  assert "example" in out


def test_help_imports_neither_jax_nor_numpy():
  code = """
import sys
from clp_jax.cli import main
for name in main.COMMANDS:
  try:
    main.main([name, "--help"])
  except SystemExit:
    pass
print("imported", *{"jax", "numpy", "tensorflow"} & set(sys.modules))
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    check=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  assert done.stdout.splitlines()[-1] == "imported"


# What it says to what can't work.


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("objectives", "('bogus',)", "unknown objective 'bogus'"),
    ("no.such.field", "1", "unknown config field"),
    ("train.stepz", "1", "unknown config field"),
    ("weightings.weights", "(0.5,0.6)", "sum to 1"),
    ("weightings.alpha", "1.5", "alpha"),
    ("steering", "mlp", "full, attention, logits, "),
    ("rollout.prompts", "9", "not a multiple"),
    ("rollout.samples", "1", "rollout.samples >= 2"),
    ("optimizer.learning_rate", "nan", "must be > 0"),
    ("rewards.nli.source", "no_such_module:f", "can't import"),
    ("rewards.nli.source", "rogue", "import path"),
    ("data.task", "xsun", "no seqio task 'xsun'"),
    ("data.train_split", "trian", "no split 'trian'"),
    ("model.init", "tinny", "tinny"),
    ("train.steps", "many", "many"),
  ],
)
def test_bad_config_is_one_line_with_status_2(
  sft_run, tmp_path, field, value, message
):
  fails(
    2,
    message,
    *runs.train_arguments(tmp_path / "run", sft_run, **{field: value}),
  )


def test_missing_config_file_and_arguments(tmp_path):
  fails(2, "no such file", "train", "--config", "x.py", "--workdir", tmp_path)
  fails(2, "--workdir", "evaluate")
  fails(2, "invalid choice", "tarin")
  fails(2, "unknown", "evaluate", "--workdir", tmp_path, "--prompt", 3)


def test_a_folder_of_another_run_is_refused_and_kept(clp_run, sft_run):
  before = runs.checkpoint_steps(clp_run)
  fails(
    2,
    "optimizer.learning_rate = 0.001 there, 0.5 here",
    *runs.train_arguments(clp_run, sft_run, **{"optimizer.learning_rate": 0.5}),
  )
  assert runs.checkpoint_steps(clp_run) == before


@pytest.mark.parametrize(
  "body, message",
  [
    ("[float('nan')] * len(c)", "nan"),
    pytest.param("[0.5]", "shape", marks=pytest.mark.slow),
  ],
)
def test_a_broken_reward_stops_the_run_and_keeps_its_checkpoints(
  sft_run, tmp_path, monkeypatch, body, message
):
  """The reward breaks at its third call, after a checkpoint."""
  name = f"broken_{tmp_path.name}"
  (tmp_path / f"{name}.py").write_text(
    "calls = []\n"
    "def score(a, b, c):\n"
    "  calls.append(1)\n"
    f"  return {body} if len(calls) > 2 else [0.3 * len(x) for x in c]\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  workdir = tmp_path / "run"
  fields = {"rewards.nli.source": f"{name}:score"}
  fails(1, message, *runs.train_arguments(workdir, sft_run, **fields))
  assert runs.checkpoint_steps(workdir) == [2]


def test_a_checkpoint_of_another_shape_is_refused(clp_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(clp_run, workdir)
  model = json.loads((workdir / "model.json").read_text())
  (workdir / "model.json").write_text(json.dumps(model | {"mlp_dim": 48}))
  message = "wi_0/kernel, and the run's model needs shape (2, 64, 48)"
  fails(1, message, "evaluate", "--workdir", workdir)
  assert runs.checkpoint_steps(workdir) == runs.checkpoint_steps(clp_run)


def test_folders_without_a_run_are_refused(tmp_path):
  for command in (["evaluate"], ["generate", "--weights", "nli=1"]):
    fails(1, "holds no run", *command, "--workdir", tmp_path / "nothing")


@pytest.mark.parametrize(
  "weights, message",
  [
    ("nli=0.7,rouge=0.7", "sum to 1"),
    ("nli=-0.5,rouge=1.5", ">= 0"),
    ("nil=1", "unknown objective 'nil'"),
    ("nli", "name=weight"),
    ("nli=x", "name=weight"),
  ],
)
def test_bad_weights_are_refused(clp_run, weights, message):
  fails(2, message, "generate", "--workdir", clp_run, "--weights", weights)


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", "line 2: not valid JSON"),
    ("[1]", 'line 2: expected an object with a "document"'),
    ('{"text": "x"}', 'line 2: expected an object with a "document"'),
    ('{"document": "x", "weights": {"nli": 2}}', "line 2: weights must sum"),
    ('{"document": "x", "weights": 3}', "line 2: weights must be named"),
    ('{"document": "x", "weights": {"nli": 1%s}}' % ("0" * 400), "be numbers"),
    ('{"document": "x", "alpha": "a"}', "line 2: alpha must be a number"),
    ('{"document": "\\ud800"}', "line 2: 'utf-8' codec can't encode"),
    ('{"document": "x", "id": "\\ud800"}', "line 2: 'utf-8' codec can't"),
    ('{"document": "caf\udce9"}', "line 2: not valid JSON: 'utf-8' codec"),
    ('{"document": "x", "alpha": 0.7}', "line 2: this run was trained"),
  ],
)
def test_bad_lines_are_named(clp_run, tmp_path, monkeypatch, line, message):
  file = tmp_path / "in.jsonl"
  content = ('{"document": "x"}\n' + line + "\n").encode(
    errors="surrogateescape"
  )
  file.write_bytes(content)
  command = ("generate", "--workdir", clp_run, "--weights", "nli=1")
  fails(1, message, *command, "--input", file)
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
  fails(1, message, *command)


@pytest.mark.parametrize(
  "command, message",
  [
    ("generate --seed -1", "expected an integer in 0 to 2**64 - 1, got '-1'"),
    ("evaluate --seed 18446744073709551616", "--seed: expected an integer"),
    ("compare x --output y --seed -1", "--seed: expected an integer"),
    ("generate --temperature -1", "--temperature: expected 0 <= T"),
    ("generate --temperature nan", "--temperature: expected 0 <= T"),
    ("generate --temperature 1e300", "--temperature: expected 0 <= T"),
  ],
)
def test_numbers_out_of_range_are_refused(command, message):
  command = [*command.split(), "--workdir", "z"]
  fails(2, message, *(command[:-2] if command[0] == "compare" else command))


def test_missing_step_lists_the_steps(clp_run):
  fails(1, "it has 2, 4", "evaluate", "--workdir", clp_run, "--step", 3)


def test_too_many_prompts_and_a_grid_of_one_are_refused(clp_run):
  folder = ("evaluate", "--workdir", clp_run)
  fails(2, "1000 examples", *folder, "--prompts", 5000)
  fails(2, "at least 2 points", *folder, "--grid", 1)

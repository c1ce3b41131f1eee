"""From JSONL files to a steered summariser, by commands alone."""

import json
import pathlib
import socket
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs

import clp_jax
from clp_jax import build, run_folder, saved_params, sharding
from clp_jax import config as config_lib
from clp_jax.batches import train_batches
from clp_jax.cli.arguments import load_config
from clp_jax.data import newsroom, newsroom_text, vocabulary
from clp_jax.errors import ConfigError
from clp_jax.models import t5
from clp_jax.serving import server

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TEMPLATE = "news {document}"
JUDGE = t5.T5Config(
  vocab_size=256,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files as a user brings them."""
  folder = tmp_path_factory.mktemp("own")
  for name, split, count in (("train", "train", 40), ("dev", "test", 11)):
    with open(folder / f"{name}.jsonl", "w") as file:
      for item in newsroom.make_items(split, 0, count):
        row = {"text": item.document, "tldr": item.reference}
        file.write(json.dumps(row) + "\n")
  content = newsroom_text.vocabulary_bytes()
  (folder / "words.model").write_bytes(content)
  judge = folder / "judge"
  judge.mkdir()
  run_folder.write_json(judge / "config.json", {"seed": 0})
  params = t5.init_params(JUDGE, jax.random.key(0))
  words = vocabulary.Vocabulary("words.model", content)
  run_folder.save_model(str(judge), JUDGE, words, params)
  saved_params.save_params(str(judge), 1, params)
  return folder


def arguments(command, folder, workdir, **fields):
  settings = {
    "data.train": folder / "train.jsonl",
    "data.eval": folder / "dev.jsonl",
    "data.fields.document": "text",
    "data.reference_field": "tldr",
    "data.template": TEMPLATE,
    "data.source_length": 30,
    "data.target_length": 12,
    "model.vocabulary": folder / "words.model",
    "sft.batch": 8,
    "sft.steps": 3,
    "rollout.prompts": 8,
    "rollout.samples": 2,
    "train.steps": 2,
    "eval.prompts": 8,
    "eval.grid": 2,
  } | fields
  return [
    *(command, "--config", CONFIGS / "jsonl.py", "--workdir", workdir),
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]


@pytest.fixture(scope="module")
def sft(folder):
  """(folder of `clp train-sft`, what it printed)."""
  workdir = folder / "sft"
  status, out, err = runs.clp(*arguments("train-sft", folder, workdir))
  assert status == 0, err
  return workdir, out


def train_arguments(folder, sft, workdir):
  """Arguments of `clp train` from there, with a model among the rewards."""
  fields = {
    "model.init": sft[0],
    "sft.steps": 0,
    "objectives": "('rouge','length','nli')",
    "rewards.length.normalise": "fixed",
    "rewards.length.words": 6.5,
    "rewards.nli.model": folder / "judge",
    "rewards.nli.normalise": "running",
    "train.normalisation_batches": 3,
  }
  # The judge's words are the newsroom's: its template's own are unknown.
  source = (CONFIGS / "jsonl.py").read_text()
  source = source.replace(
    'model_reward("entailment")',
    'model_reward("entailment", positive="museum", source_length=24)',
  )
  config = folder / "own_config.py"
  config.write_text(source)
  command = arguments("train", folder, workdir, **fields)
  command[command.index(CONFIGS / "jsonl.py")] = config
  return command


@pytest.fixture(scope="module")
def trained(folder, sft):
  """Folder of that run."""
  workdir = folder / "clp"
  status, _, err = runs.clp(*train_arguments(folder, sft, workdir))
  assert status == 0, err
  return workdir


def test_train_sft_reports_the_held_out_loss(sft):
  workdir, out = sft
  report = json.loads((workdir / "evaluation" / "held_out.json").read_text())
  policy = clp_jax.Policy.load(str(workdir))
  items = newsroom.make_items("test", 0, 8)
  logp = policy.score([i.document for i in items], [i.reference for i in items])
  lengths = [
    min(len(policy.vocabulary.encode(i.reference)) + 1, 12) for i in items
  ]
  assert report["documents"] == 8 and report["tokens"] == sum(lengths)
  np.testing.assert_allclose(
    report["loss"], -logp.sum() / sum(lengths), rtol=1e-5
  )
  assert 0 <= report["accuracy"] < 1
  assert f"held-out loss {report['loss']:.4f} nats a token" in out
  assert out.splitlines()[-1] == str(workdir)


def test_a_policy_reads_its_documents_through_the_template(sft):
  policy = clp_jax.Policy.load(str(sft[0]))
  document = newsroom.make_items("test", 0, 1)[0].document
  (score,) = policy.score([document], ["museum"])
  (museum,) = policy.vocabulary.encode("museum")
  ids = [*policy.vocabulary.encode(f"news {document}")[:29], 1]
  logits = jax.jit(t5.T5(policy.model_config).apply)(
    {"params": policy.params()}, np.asarray([ids]), np.asarray([[0, museum]])
  )[0]
  logp = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(score, logp[0, museum] + logp[1, 1], rtol=1e-4)


def test_generate_reads_the_runs_own_field_before_document(
  sft, folder, tmp_path
):
  own = (folder / "dev.jsonl").read_text().splitlines()[:2]
  text = json.loads(own[0])["text"]
  rows = [*own, json.dumps({"document": text, "tldr": "x"})]
  rows.append(json.dumps({"text": text, "document": "mill"}))
  file = tmp_path / "in.jsonl"
  file.write_text("\n".join(rows))
  command = ("generate", "--workdir", sft[0], "--input", file)
  status, out, err = runs.clp(*command, "--temperature", 0)
  assert status == 0, err
  written = [json.loads(line) for line in out.splitlines()]
  summaries = [row.pop("summary") for row in written]
  assert written == [json.loads(row) for row in rows]
  assert summaries[0] == summaries[2] == summaries[3]
  file.write_text('{"dialogue": "x"}')
  status, _, err = runs.clp(*command)
  assert status == 1
  assert 'line 1: expected an object with a "text" or "document" string.' in err


def test_the_server_offers_documents_of_the_runs_own_field(sft, tmp_path):
  config = run_folder.load_config(str(sft[0]))
  policy = types.SimpleNamespace(config=config, workdir=str(tmp_path))
  samples = tmp_path / "evaluation" / "samples.jsonl"
  samples.parent.mkdir()
  shared = {"reference": "r", "weights": {}, "summary": "s"}
  rows = [shared | {"text": "own"}, shared | {"document": "as written"}]
  samples.write_text("\n".join(map(json.dumps, rows)))
  offered = server.example_documents(policy).data
  assert [document.document for document in offered] == ["own", "as written"]


@pytest.mark.parametrize("name", ["document_field", "fields.document"])
def test_both_names_of_a_column_read_it(folder, name):
  config = config_lib.get_config()
  with config.unlocked():
    config.data.update_from_flattened_dict(
      {
        name: "text",
        "reference_field": "absent",
        "fields.reference": "tldr",
        "task": None,
        "train": str(folder / "train.jsonl"),
      }
    )
  words = vocabulary.read(folder / "words.model")
  batch = next(train_batches(config, words, 8, 1, sharding.make_mesh()))
  lines = (folder / "train.jsonl").read_text().splitlines()
  rows = {(row["text"], row["tldr"]) for row in map(json.loads, lines)}
  assert set(zip(batch.documents, batch.references, strict=True)) <= rows
  config.data.fields.reference = None
  with pytest.raises(ConfigError, match="line 1: no field 'absent'"):
    next(train_batches(config, words, 8, 1, sharding.make_mesh()))


def test_what_is_cut_is_logged_once(folder, caplog):
  config = config_lib.get_config()
  config.data.task = None
  config.data.train = str(folder / "train.jsonl")
  config.data.document_field = "text"
  config.data.reference_field = "tldr"
  config.data.source_length = 30
  words = vocabulary.read(folder / "words.model")
  stream = train_batches(config, words, 16, 1, sharding.make_mesh())
  batch, *_ = (next(stream) for _ in range(3))
  longer = [len(words.encode(d)) + 1 > 30 for d in batch.documents]
  assert 0 < sum(longer) < 16
  (record,) = caplog.records
  assert record.getMessage() == (
    f"{sum(longer)} of the first 16 inputs are longer than "
    "data.source_length = 30 tokens, and are cut"
  )


def test_train_normalises_each_reward_as_it_is_told(trained):
  rows = runs.metrics(trained)
  assert len(rows) == 2
  for name in ("rouge", "length", "nli"):
    assert np.isfinite(rows[1][f"reward/{name}"])
  manager = ocp.CheckpointManager(trained / "checkpoints")
  stats = manager.restore(
    2, args=ocp.args.Composite(train=ocp.args.StandardRestore())
  ).train["reward_stats"]
  manager.close()
  # none; 3 batches under the reference, then no more; every step's samples.
  np.testing.assert_array_equal(stats["count"], [0, 3 * 16, 2 * 16])
  np.testing.assert_allclose(
    stats["mean"][2], np.mean([row["reward/nli"] for row in rows]), rtol=1e-5
  )
  assert stats["mean"][0] == 0 and 0 < stats["mean"][1] < 1


@pytest.mark.slow
def test_2_processes_read_and_judge_as_1_does(trained, folder, sft):
  """Of each batch a process has its own rows, of unequal numbers of windows."""
  workdir = folder / "two"
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  pair = [
    runs.start(
      [
        *train_arguments(folder, sft, workdir),
        *("--coordinator", f"127.0.0.1:{port}"),
        *("--num-processes", 2, "--process-id", i),
      ],
      devices=4,
    )
    for i in range(2)
  ]
  for process in pair:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
  for one, two in zip(
    runs.metrics(trained), runs.metrics(workdir), strict=True
  ):
    for name in one:
      np.testing.assert_allclose(one[name], two[name], rtol=2e-3, atol=2e-4)


def test_evaluate_and_generate_go_on_from_there(trained, folder):
  status, out, err = runs.clp("evaluate", "--workdir", trained)
  assert status == 0, err
  front = json.loads((trained / "evaluation" / "front.json").read_text())
  assert front["objectives"] == ["rouge", "length", "nli"]
  decoding = front["decoding"]
  items = newsroom.make_items("test", 0, 8)
  words = vocabulary.read(folder / "words.model")
  longer = [len(words.encode(f"news {i.document}")) + 1 > 30 for i in items]
  assert decoding["cut_documents"] == sum(longer) > 0
  assert decoding["source_length"] == 30
  sample = json.loads(
    (trained / "evaluation" / "samples.jsonl").read_text().splitlines()[0]
  )
  assert sample["document"] == items[0].document  # as it was brought


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"data.train": "absent*.jsonl"}, "no file matches absent*.jsonl"),
    ({"data.reference_field": "headline"}, "line 1: no field 'headline'; it"),
    ({"data.template": "summarize:"}, "must hold {document} exactly once"),
    ({"data.task": "newsroom"}, "set exactly one of data.task and data.train"),
    ({"data.use_cached": True}, "JSONL files are read as they are"),
    ({"objectives": "('nli',)"}, "reward 'nli': no model; set .model"),
    (
      {"objectives": "('nli',)", "rewards.nli.model": str(CONFIGS)},
      "reward 'nli': ",
    ),
    ({"rewards.length.source": "lenght"}, "expected one of rouge, length, "),
    ({"rewards.length.source": "json:no"}, "can't import 'json:no'"),
    ({"model.vocabulary": "no.model"}, "can't read the vocabulary no.model"),
  ],
)
@pytest.mark.parametrize("command", ["train"])
def test_what_cannot_work_is_one_line(
  folder, tmp_path, command, fields, message
):
  workdir = tmp_path / "run"
  status, out, err = runs.clp(*arguments(command, folder, workdir, **fields))
  last = err.splitlines()[-1]
  assert status == 2 and not out, err
  assert last.startswith(f"clp {command}: error: ") and message in last, last
  assert "Traceback" not in err
  assert not (workdir / "checkpoints").exists()


def test_a_corrupt_line_loses_nothing(folder, sft, tmp_path):
  """Found before a step is taken, also when a run goes on."""
  workdir = tmp_path / "run"
  rows = (folder / "train.jsonl").read_text()
  file = tmp_path / "train.jsonl"
  file.write_text(rows)
  fields = {"data.train": file, "model.init": sft[0], "sft.steps": 2}
  assert runs.clp(*arguments("train-sft", folder, workdir, **fields))[0] == 0
  before = sorted(p for p in workdir.rglob("*") if p.is_file())
  file.write_text(rows + '{"text": "cut off')
  status, _, err = runs.clp(*arguments("train-sft", folder, workdir, **fields))
  assert status == 2
  assert f"{file}, line 41: not valid JSON" in err.splitlines()[-1]
  assert sorted(p for p in workdir.rglob("*") if p.is_file()) == before


def test_supervised_runs_need_steps_and_documents_to_evaluate(folder, tmp_path):
  status, _, err = runs.clp(
    *arguments("train-sft", folder, tmp_path, **{"sft.steps": 0})
  )
  assert status == 2 and "sft.steps is 0" in err
  config = config_lib.get_config()
  config.data.eval = "dev.jsonl"
  with pytest.raises(ConfigError, match="data.eval = 'dev.jsonl' is"):
    build.validate(config)
  config.model.init = None
  config.data.eval = None
  with pytest.raises(ConfigError, match="model.init is not set"):
    build.validate(config)


@pytest.mark.parametrize(
  "name", sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.py"))
)
def test_every_config_file_is_valid(name):
  overrides = ["--config.model.init=x"]
  if name in ("jsonl.py", "reward.py") or name.startswith("chat/"):
    overrides.append("--config.data.train=x.jsonl")
  config = load_config(str(CONFIGS / name), overrides)
  build.validate(config)
  task, _, file = name.partition("/")
  if task == "chat":
    assert config.data.task is None and config.objectives == (
      *("helpful", "brief"),
    )
    assert set(config.rewards) == {"helpful", "harmless", "brief"}
    for axis in (config.rollout.prompts, config.eval.batch):
      assert axis % 64 == 0
  elif file:
    assert config.data.task == task and config.objectives == ("nli", "rouge")
    assert set(config.rewards) == {"nli", "rouge", "tldr"}
    for axis in (config.rollout.prompts, config.sft.batch, config.eval.batch):
      assert axis % 64 == 0  # cuts over a pod's data axis

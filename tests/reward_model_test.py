"""Rewards that are T5 models: entailment, preference, and its training."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_runs
import runs
import small_decoder
from processes_test import start_training
from safetensors import numpy as safetensors

from clp_jax import config as config_lib
from clp_jax import interop, run_folder, saved_params, sharding
from clp_jax.data import (
  hf_tokenizer,
  jsonl,
  newsroom_text,
  reader,
  vocabulary,
)
from clp_jax.errors import ConfigError, RunError
from clp_jax.models import families, t5
from clp_jax.rewards import entailment, model, preference
from clp_jax.rewards.base import load_reward
from clp_jax.train import reward_model
from clp_jax.train.optimizer import make_optimizer
from clp_jax.train.state import init_state

REWARD_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "reward.py"
WORDS = [f"w{i}" for i in range(20)]
PIECES = ["premise:", "hypothesis:", "document:", "summary:", "0", "1", *WORDS]
MODEL = t5.T5Config(
  vocab_size=32,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=8,
)


def text(seed, length):
  random = np.random.default_rng(seed)
  return " ".join(random.choice(WORDS, length))


DOCUMENTS = [text(i, n) for i, n in enumerate((3, 60, 11, 25, 1))]
RESPONSES = [text(100 + i, n) for i, n in enumerate((2, 4, 0, 7, 3))]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  """(folder of a T5 as a supervised run leaves it, vocabulary, parameters)."""
  folder = tmp_path_factory.mktemp("judge")
  content = vocabulary.word_model(PIECES, [])
  params = t5.init_params(MODEL, jax.random.key(0))
  # Verdicts that vary with what is read.
  params["decoder"]["logits_dense"]["kernel"] *= 2.0
  attention = params["decoder"]["layers_0"]["encoder_decoder_attention"]
  attention["out"]["kernel"] *= 8.0
  run_folder.write_json(folder / "config.json", {"seed": 0})
  words = vocabulary.Vocabulary("words.model", content)
  run_folder.save_model(str(folder), MODEL, words, params)
  saved_params.save_params(str(folder), 3, params)
  return str(folder), run_folder.load_tokenizer(str(folder)), params


def mesh_of(data=1, model_axis=1):
  devices = jax.devices()[: data * model_axis]
  return sharding.make_mesh(data, model_axis, devices)


def first_logits(params, rows):
  """The T5's first output, for rows [n, S], in one batch of longer rows."""
  rows = np.pad(rows, ((0, 0), (0, 5)))
  start = np.zeros([len(rows), 1], np.int32)
  logits = jax.jit(t5.T5(MODEL).apply)({"params": params}, rows, start)
  return np.asarray(logits)[:, 0]


class TestInputs:
  def inputs(self, judge, template=entailment.TEMPLATE, length=20, overlap=4):
    return model.Inputs(judge[1], template, length, overlap)

  def test_a_pair_that_fits_reads_as_the_whole_text(self, judge):
    tokens, pair = self.inputs(judge, length=40)(DOCUMENTS[2:], RESPONSES[2:])
    np.testing.assert_array_equal(pair, [0, 1, 2])
    for row, document, response in zip(
      tokens, DOCUMENTS[2:], RESPONSES[2:], strict=True
    ):
      whole = f"premise: {document} hypothesis: {response}"
      ids = [*judge[1].encode(whole), judge[1].eos_id]
      np.testing.assert_array_equal(row[: len(ids)], ids)
      assert not row[len(ids) :].any()

  def test_windows_cover_a_long_document_and_overlap(self, judge):
    _, words, _ = judge
    tokens, pair = self.inputs(judge)(DOCUMENTS, RESPONSES)
    premise, hypothesis = (words.encode(w)[0] for w in PIECES[:2])
    for i, (document, response) in enumerate(
      zip(DOCUMENTS, RESPONSES, strict=True)
    ):
      windows = []
      for row in tokens[pair == i].tolist():
        row = row[: row.index(words.eos_id)]
        assert row[0] == premise
        cut = row.index(hypothesis)
        assert row[cut + 1 :] == words.encode(response)
        windows.append(row[1:cut])
      ids = words.encode(document)
      room = 20 - 3 - len(words.encode(response))
      starts = [0] if len(ids) <= room else range(0, len(ids) - 4, room - 4)
      assert windows == [ids[start : start + room] for start in starts]
      joined = windows[0] + [t for w in windows[1:] for t in w[4:]]
      assert joined == ids
    assert (pair == 1).sum() == 7 and (pair == 0).sum() == 1

  def test_without_windows_the_document_is_cut(self, judge):
    template = "summary: {response} document: {document}"
    inputs = self.inputs(judge, template, length=20, overlap=None)
    tokens, pair = inputs(DOCUMENTS, RESPONSES)
    np.testing.assert_array_equal(pair, range(5))
    words = judge[1]
    for row, document, response in zip(
      tokens, DOCUMENTS, RESPONSES, strict=True
    ):
      whole = words.encode(f"summary: {response} document: {document}")[:19]
      np.testing.assert_array_equal(row[: len(whole)], whole)
      assert row[len(whole)] == words.eos_id

  def test_a_response_that_is_too_long_leaves_half_to_the_document(self, judge):
    inputs = self.inputs(judge, overlap=None)
    tokens, _ = inputs([text(7, 50), "w1"], [text(8, 50), text(8, 50)])
    hypothesis = judge[1].encode("hypothesis:")[0]
    assert tokens[0].tolist().index(hypothesis) == 1 + 9  # 17 left, 8 and 9
    assert tokens[1].tolist().index(hypothesis) == 1 + 1
    assert (tokens[:, -1] == judge[1].eos_id).all()

  def test_odd_texts_make_rows(self, judge):
    inputs = self.inputs(judge, overlap=19)
    tokens, pair = inputs(["", "", "w1 " * 50], ["", text(1, 99), text(1, 99)])
    assert tokens.shape[0] == len(pair) > 3
    tokens, pair = inputs([], [])
    assert tokens.shape == (0, 20) and pair.shape == (0,)

  @pytest.mark.parametrize(
    "change, message",
    [
      ({"template": "premise: {document}"}, "must hold {document} and {resp"),
      ({"length": 9}, "too short: the template takes 2 of them; raise"),
      ({"overlap": -1}, r"\.overlap must be >= 0, got -1"),
    ],
  )
  def test_refuses_what_makes_no_rows(self, judge, change, message):
    with pytest.raises(ValueError, match=message):
      self.inputs(judge, **change)


class TestEntailment:
  def probabilities(self, judge, negative=None):
    """By hand: every window alone, unpadded, then the largest."""
    _, words, params = judge
    tokens, pair = model.Inputs(words, entailment.TEMPLATE, 20, 4)(
      DOCUMENTS, RESPONSES
    )
    logits = first_logits(params, tokens)
    one, zero = (words.encode(t)[0] for t in ("1", "0"))
    among = logits if negative is None else logits[:, [one, zero]]
    p = np.exp(logits[:, one]) / np.exp(among).sum(-1)
    assert p.max() > 3 * p.min()
    return np.asarray([p[pair == i].max() for i in range(len(DOCUMENTS))])

  @pytest.mark.parametrize(
    "data, tensor, negative", [(1, 1, None), (2, 2, "0")]
  )
  def test_is_the_largest_probability_of_a_window(
    self, judge, data, tensor, negative
  ):
    score = entailment.build(
      mesh_of(data, tensor),
      judge[0],
      batch=4,
      source_length=20,
      overlap=4,
      negative=negative,
      fsdp=data > 1,
    )
    scores = score(DOCUMENTS, [""] * 5, RESPONSES)
    assert scores.shape == (5,) and scores.dtype == np.float32
    np.testing.assert_allclose(
      scores, self.probabilities(judge, negative), rtol=2e-4
    )
    # Pairs do not depend on what they are batched with.
    alone = [
      score([d], [""], [r])[0]
      for d, r in zip(DOCUMENTS, RESPONSES, strict=True)
    ]
    np.testing.assert_allclose(scores, alone, rtol=1e-5)
    assert score([], [], []).shape == (0,)

  def test_a_config_names_its_model(self, judge):
    spec = config_lib.model_reward("entailment", source_length=20).to_dict()
    with pytest.raises(ValueError, match="reward 'nli': no model; set .model"):
      load_reward("nli", spec, mesh_of())
    spec |= {"model": judge[0], "overlap": 4, "batch": 8}
    reward = load_reward("nli", spec, mesh_of())
    np.testing.assert_allclose(
      reward.score(DOCUMENTS, [""] * 5, RESPONSES),
      self.probabilities(judge),
      rtol=2e-4,
    )

  @pytest.mark.parametrize("format", ["hf", "t5x"])
  def test_takes_other_programs_checkpoints(self, judge, tmp_path, format):
    _, words, params = judge
    content = words.files()["vocabulary.model"] if format == "hf" else None
    interop.save_t5(tmp_path, MODEL, params, format, vocabulary=content)
    options = {"source_length": 20, "overlap": 4, "batch": 8}
    if content is None:
      with pytest.raises(
        ValueError, match="holds no Sent.* or tokenizer.json; set"
      ):
        entailment.build(mesh_of(), str(tmp_path), **options)
      options["vocabulary"] = f"{judge[0]}/vocabulary.model"
    score = entailment.build(
      mesh_of(2, 2), str(tmp_path), scan_layers=True, fsdp=True, **options
    )
    np.testing.assert_allclose(
      score(DOCUMENTS, [""] * 5, RESPONSES),
      self.probabilities(judge),
      rtol=2e-4,
    )

  @pytest.mark.parametrize(
    "change, message",
    [
      ({"model": "tiny"}, "'tiny' is a preset with random parameters"),
      ({"model": "no/where"}, "'no/where': there is no such folder"),
      ({"positive": "yes"}, r"spells 'yes' as .*; a verdict must"),
      ({"positive": "0 1"}, "as .* a verdict must be one known piece"),
      ({"batch": 0}, r"\.batch must be at least 1, got 0"),
      ({"source_length": 8}, "raise .source_length to 10 at least"),
      ({"windows": 3}, r"can't be called as build\(mesh, model=..., windows"),
    ],
  )
  def test_says_what_is_wrong(self, judge, change, message):
    spec = {"source": "entailment", "model": judge[0]} | change
    with pytest.raises(ValueError, match=f"reward 'nli': .*{message}"):
      load_reward("nli", spec, mesh_of())

  def test_a_folder_that_holds_no_t5_is_refused(self, judge, tmp_path):
    spec = {"source": "entailment", "model": str(tmp_path)}
    with pytest.raises(ValueError, match="reward 'nli': .*holds no model"):
      load_reward("nli", spec, mesh_of())
    # A run before its first checkpoint.
    run_folder.write_json(tmp_path / "config.json", {"seed": 0})
    run_folder.save_model(str(tmp_path), MODEL, judge[1], judge[2])
    with pytest.raises(RunError, match="holds no checkpoints"):
      load_reward("nli", spec, mesh_of())


def test_any_number_of_rows_is_one_compiled_shape():
  traced = []

  def value(params, tokens):
    traced.append(tokens.shape)
    return tokens.sum(-1) * params["scale"]

  params = {
    "scale": jax.device_put(jnp.float32(0.5), sharding.replicated(mesh_of(8)))
  }
  score = model.make_scorer(value, params, mesh_of(8), batch=10)
  for count in (0, 1, 16, 17, 40):
    tokens = np.random.default_rng(count).integers(0, 9, size=(count, 6))
    np.testing.assert_allclose(
      score(tokens.astype(np.int32)), 0.5 * tokens.sum(-1)
    )
  assert traced == [(16, 6)]  # 10, up to a multiple of the data axis


class TestPreference:
  def test_any_t5_scores_by_a_tokens_logit(self, judge):
    folder, words, params = judge
    score = preference.build(
      mesh_of(), folder, token="1", source_length=20, batch=4
    )
    tokens, _ = model.Inputs(words, preference.TEMPLATE, 20, None)(
      DOCUMENTS, RESPONSES
    )
    logits = first_logits(params, tokens)
    np.testing.assert_allclose(
      score(DOCUMENTS, [""] * 5, RESPONSES),
      logits[:, words.encode("1")[0]],
      atol=1e-4,
    )
    with pytest.raises(ValueError, match="not trained by .* set .token"):
      preference.build(mesh_of(), folder)

  def test_rows_longer_than_a_decoder_reads_are_refused(self, tmp_path):
    small_decoder.save(tmp_path, max_length=300)
    for given, length in (({}, 512), ({"source_length": 301}, 301)):
      with pytest.raises(ValueError, match=f"at most 300, .* got {length}"):
        preference.build(mesh_of(), str(tmp_path), token="1", **given)
    preference.build(mesh_of(), str(tmp_path), token="1", source_length=300)

  def test_a_step_has_the_gradient_of_bradley_terry(self, judge):
    """From a zero head only the head moves, and its gradient is known."""
    _, words, params = judge
    network = families.build(MODEL)
    inputs = model.Inputs(words, preference.TEMPLATE, 20, None)
    tokens, _ = inputs(DOCUMENTS[:4] * 2, RESPONSES[:4] + RESPONSES[1:])
    tokens = tokens.reshape(2, 4, 20).transpose(1, 0, 2)  # [P, 2, S]
    optimizer = make_optimizer(
      name="adam",
      learning_rate=0.1,
      warmup_steps=0,
      decay_steps=None,
      clip_norm=1e9,
    )
    state = init_state(
      {"t5": params, "head": jnp.zeros([8])}, optimizer, jax.random.key(0)
    )
    step = jax.jit(
      functools.partial(
        reward_model.update, model=network, token=None, optimizer=optimizer
      )
    )
    new, metrics = step(state, tokens)
    _, hidden = model.first(network, params, jnp.asarray(tokens.reshape(8, 20)))
    hidden = np.asarray(hidden).reshape(4, 2, 8)
    # What the logit layer makes of the hidden state is the T5's own output.
    np.testing.assert_allclose(
      hidden[:, 0] @ params["decoder"]["logits_dense"]["kernel"],
      first_logits(params, tokens[:, 0]),
      atol=1e-4,
    )
    gradient = -0.5 * (hidden[:, 0] - hidden[:, 1]).mean(0)
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-6)
    np.testing.assert_allclose(
      metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-4
    )
    assert metrics["accuracy"].sum == 2  # four ties, half a pair each
    np.testing.assert_allclose(
      new.params["head"], -0.1 * np.sign(gradient), rtol=1e-3
    )
    # One step on, the margins are those of the new head.
    _, metrics = step(new, tokens)
    margin = (hidden[:, 0] - hidden[:, 1]) @ np.asarray(new.params["head"])
    np.testing.assert_allclose(
      metrics["loss"], np.log1p(np.exp(-margin)).mean(), rtol=1e-4
    )
    assert metrics["accuracy"].sum == (margin > 0).sum() > 2


def write_pairs(path, count, seed):
  """The better of two responses has more of w0 to w9."""
  random = np.random.default_rng(seed)
  with open(path, "w") as file:
    for _ in range(count):
      good, bad = WORDS[:10], WORDS[10:]
      chosen, rejected = (
        " ".join(random.choice(pool, random.integers(3, 7)))
        for pool in (good, bad)
      )
      row = {"document": text(seed, 9), "chosen": chosen, "rejected": rejected}
      file.write(json.dumps(row) + "\n")
  return path


class TestPairs:
  def test_batches_are_numbered_and_cover_every_epoch(self, judge, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 7, 0)
    rows = jsonl.read_rows(str(path), ("document", "chosen", "rejected"))
    inputs = model.Inputs(judge[1], preference.TEMPLATE, 24, None)

    def batches(count, start=0, seed=5, share=(0, 1)):
      stream = reward_model.pair_batches(
        rows, inputs, reader.Numbering(3, seed, start, *share)
      )
      return [next(stream) for _ in range(count)]

    whole = batches(7)  # three epochs
    assert whole[0].shape == (3, 2, 24)
    for start in (1, 2, 5):
      np.testing.assert_array_equal(batches(1, start)[0], whole[start])
    parts = [batches(7, share=(part, 3)) for part in range(3)]
    for one, *cut in zip(whole, *parts, strict=True):
      np.testing.assert_array_equal(np.concatenate(cut), one)
    pairs = reward_model.tokenise(inputs, [rows[i] for i in range(7)])
    keys = [pair.tobytes() for pair in pairs]
    drawn = [keys.index(pair.tobytes()) for b in whole for pair in b]
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert not np.array_equal(batches(1, seed=6)[0], whole[0])

  def test_held_out_accuracy_counts_pairs(self, judge, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 5, 0)
    rows = jsonl.read_rows(str(path), ("document", "chosen", "rejected"))
    inputs = model.Inputs(judge[1], preference.TEMPLATE, 24, None)
    margins = np.asarray([2.0, -1.0, 0.0, 0.5, 3.0])
    scores = np.stack([margins + 7, np.full(5, 7)], 1).reshape(-1)
    report = reward_model.evaluate(
      rows, inputs, lambda tokens: scores[: len(tokens)], step=9, share=(0, 1)
    )
    assert report.accuracy == 3.5 / 5 and report.pairs == 5 and report.step == 9
    np.testing.assert_allclose(report.loss, np.log1p(np.exp(-margins)).mean())
    np.testing.assert_allclose(report.stderr, math.sqrt(0.7 * 0.3 / 5))


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pairs")
  write_pairs(folder / "train.jsonl", 60, 1)
  write_pairs(folder / "held_out.jsonl", 21, 2)
  (folder / "words.model").write_bytes(vocabulary.word_model(PIECES, []))
  return folder


def reward_arguments(folder, workdir, **fields):
  """Arguments of `clp train-reward` on those pairs."""
  settings = {
    "data.train": folder / "train.jsonl",
    "data.eval": folder / "held_out.jsonl",
    "model.init": "tiny",
    "model.vocabulary": folder / "words.model",
    "data.source_length": 24,
    "reward_model.steps": 24,
    "reward_model.batch": 8,
    "reward_model.learning_rate": 5e-3,
    "reward_model.warmup_steps": 2,
  } | fields
  return [
    *("train-reward", "--config", REWARD_CONFIG, "--workdir", workdir),
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]


def train_reward(folder, workdir, **fields):
  """Runs `clp train-reward` on those pairs: (status, stdout, stderr)."""
  return runs.clp(*reward_arguments(folder, workdir, **fields))


@pytest.fixture(scope="module")
def trained(pairs_folder):
  """(the run's folder, what the command printed)."""
  status, out, err = train_reward(pairs_folder, pairs_folder / "run")
  assert status == 0, err
  return pairs_folder / "run", out


def held_out_scores(workdir, folder, mesh):
  """[2, pairs]: the scores of the chosen and of the rejected summaries."""
  rows = list(
    jsonl.read_rows(
      str(folder / "held_out.jsonl"), ("document", "chosen", "rejected")
    )
  )
  documents, *pair = zip(*rows, strict=True)
  spec = {"source": "preference", "model": str(workdir)}
  reward = load_reward("good", spec, mesh)
  return np.stack([reward.score(documents, documents, r) for r in pair])


def assert_reports(report, margin):
  """accuracy.json is of pairs whose scores differ by the margin."""
  assert report["accuracy"] == pytest.approx((margin > 0).mean())
  loss = np.log1p(np.exp(-margin)).mean()
  np.testing.assert_allclose(report["loss"], loss, rtol=1e-4)


class TestCommand:
  def test_learns_to_tell_good_from_bad(self, trained):
    workdir, out = trained
    report = json.loads((workdir / "evaluation" / "accuracy.json").read_text())
    assert report["accuracy"] > 0.85 and report["loss"] < 0.67
    assert report["pairs"] == 21 and report["step"] == 24
    assert f"held-out accuracy {report['accuracy']:.4f}" in out
    assert out.splitlines()[-1] == f"{workdir}/evaluation/accuracy.json"
    first, *_, last = runs.metrics(workdir)
    np.testing.assert_allclose(first["loss"], math.log(2), rtol=1e-6)
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.8

  @pytest.mark.slow
  def test_a_decoder_learns_and_is_a_reward(self, pairs_folder, tmp_path):
    """Its head reads the state at the end of the pair."""
    init = {"model.init": "tiny-decoder"}
    status, out, err = train_reward(pairs_folder, tmp_path / "run", **init)
    assert status == 0, err
    report = json.loads(
      (tmp_path / "run" / "evaluation" / "accuracy.json").read_text()
    )
    assert report["accuracy"] > 0.85 and report["loss"] < 0.67
    first, *_ = runs.metrics(tmp_path / "run")
    np.testing.assert_allclose(first["loss"], math.log(2), rtol=1e-6)
    scores = held_out_scores(tmp_path / "run", pairs_folder, mesh_of())
    assert_reports(report, scores[0] - scores[1])

  @pytest.mark.slow
  def test_resumes_bit_for_bit(self, trained, pairs_folder):
    parts = pairs_folder / "parts"
    for steps in (5, 24):
      status, _, err = train_reward(
        pairs_folder, parts, **{"reward_model.steps": steps}
      )
      assert status == 0, err
    assert runs.metrics(parts) == runs.metrics(trained[0])
    name = "evaluation/accuracy.json"
    assert (parts / name).read_text() == (trained[0] / name).read_text()

  @pytest.mark.slow
  @pytest.mark.parametrize(
    "mesh",
    [{"mesh.fsdp": True}, {"mesh.data": 1, "mesh.model": 4}],
    ids=["data 4, fsdp", "a model axis over both processes"],
  )
  def test_2_processes_train_and_evaluate_as_1_does(
    self, mesh, trained, pairs_folder, tmp_path
  ):
    workdir = tmp_path / "two"
    arguments = reward_arguments(pairs_folder, workdir, **mesh)
    pair = start_training(arguments, workdir, rows=1, devices=2)
    for process in pair:
      runs.finish(process)
    one, two = runs.metrics(trained[0]), runs.metrics(workdir)
    assert len(one) == len(two)
    # Once the pairs are told apart, what is left of the loss is the difference
    # of large numbers, and the order of sums shows in it.
    for x, y in zip(one[:10], two[:10], strict=True):
      for name in x:
        np.testing.assert_allclose(x[name], y[name], rtol=1e-3, atol=1e-4)
    report = json.loads((workdir / "evaluation" / "accuracy.json").read_text())
    scores = held_out_scores(workdir, pairs_folder, mesh_of())
    assert_reports(report, scores[0] - scores[1])

  def test_its_model_is_a_reward(self, trained, pairs_folder):
    workdir, _ = trained
    one, cut = (
      held_out_scores(workdir, pairs_folder, mesh)
      for mesh in (mesh_of(), mesh_of(4, 2))
    )
    np.testing.assert_allclose(one, cut, atol=1e-4)
    report = json.loads((workdir / "evaluation" / "accuracy.json").read_text())
    assert_reports(report, one[0] - one[1])
    spec = {"source": "preference", "model": str(workdir)}
    for option in ({"token": "1"}, {"vocabulary": "x"}):
      with pytest.raises(ValueError, match="is for other models"):
        load_reward("good", spec | option, mesh_of())

  @pytest.mark.parametrize(
    "line, message",
    [
      ("{", "held_out.jsonl, line 2: not valid JSON"),
      ('{"document": "a", "chosen": "b"}', "line 2: no field 'rejected'"),
      (
        '{"document": "a", "chosen": ["b"], "rejected": "c"}',
        "line 2: field 'chosen' must be a string, got list",
      ),
      (None, "held_out.jsonl is empty"),
    ],
  )
  def test_malformed_pairs_are_named(
    self, pairs_folder, tmp_path, line, message
  ):
    file = tmp_path / "held_out.jsonl"
    pair = '{"document": "a", "chosen": "b", "rejected": "c"}'
    file.write_text("" if line is None else f"{pair}\n{line}\n")
    self.fails(pairs_folder, tmp_path, message, **{"data.eval": file})

  def test_a_pair_may_be_of_a_conversation(self, tmp_path):
    turns = ("user", "a mill"), ("assistant", "b"), ("user", "zoo")
    messages = [{"role": role, "content": text} for role, text in turns]
    file = tmp_path / "pairs.jsonl"
    row = {"messages": messages, "chosen": "b", "rejected": "c"}
    file.write_text(json.dumps(row))
    config = config_lib.get_config()
    config.data.train = config.data.eval = str(file)
    config.data.fields.document = "messages"
    words = vocabulary.Vocabulary("here", newsroom_text.vocabulary_bytes())
    inputs = model.Inputs(words, "{document} {response}", 64, overlap=None)
    # What a reward is given of it in RL.
    text = "user: a mill\n\nassistant: b\n\nuser: zoo"
    expected, _ = inputs([text, text], ["b", "c"])
    for rows in reward_model.load_pairs(config):
      (pair,) = rows
      tokens = reward_model.tokenise(inputs, [pair])
      np.testing.assert_array_equal(tokens, expected[None])

  def test_pairs_of_other_names_are_read(self, tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "a", "better": "b", "rejected": "c", "chosen": "d"}
    file.write_text(json.dumps(row))
    config = config_lib.get_config()
    config.data.train = config.data.eval = str(file)
    config.data.fields.document = "prompt"
    config.data.fields.chosen = "better"
    for rows in reward_model.load_pairs(config):
      assert list(rows) == [("a", "b", "c")]
    config.data.train = None
    with pytest.raises(ConfigError, match='"prompt", "better" and "rejected"'):
      reward_model.load_pairs(config)

  @pytest.mark.parametrize(
    "field, value, message",
    [
      ("data.train", "absent.jsonl", "no file matches absent.jsonl"),
      ("reward_model.head", "mlp", "must be one of linear, token, got 'mlp'"),
      ("reward_model.batch", 12, "not a multiple of the mesh's data axis, 8"),
      ("reward_model.steps", 0, "nothing would be trained"),
      ("reward_model.template", "{document}", "must hold {document} and {resp"),
      ("model.init", "nowhere", "nowhere"),
    ],
  )
  def test_bad_settings_are_one_line(
    self, pairs_folder, tmp_path, field, value, message
  ):
    self.fails(pairs_folder, tmp_path, message, **{field: value})

  def fails(self, folder, tmp_path, message, **fields):
    status, out, err = train_reward(folder, tmp_path / "run", **fields)
    assert status == 2 and not out
    last = err.splitlines()[-1]
    assert last.startswith("clp train-reward: error: ") and message in last
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


class TestExport:
  """Of a head on a decoder, to what the source "classifier" reads."""

  def scores(self, source, folder, **options):
    spec = {"source": source, "model": str(folder), "batch": 4, **options}
    reward = load_reward("good", spec, mesh_of())
    documents = [d.replace("w", "the council ") for d in DOCUMENTS]
    return reward.score(documents, documents, RESPONSES)

  def export(self, workdir, output, *arguments):
    return runs.clp(
      *("export", "--workdir", workdir, "--format", "hf"),
      *("--output", output, *arguments),
    )

  @pytest.mark.parametrize(
    "architecture, changes",
    [("qwen3", {}), ("gemma3_text", {"scan_layers": True})],
  )
  def test_its_scores_are_the_runs(self, architecture, changes, tmp_path):
    reward_runs.start(tmp_path / "run", architecture, **changes)
    status, out, err = self.export(tmp_path / "run", tmp_path / "out")
    assert status == 0, err
    assert out.strip() == str(tmp_path / "out")
    expected = self.scores("preference", tmp_path / "run")
    assert expected.std() > 0.05
    found = self.scores("classifier", tmp_path / "out")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Documents that are cut elsewhere give others, by both alike.
    cut = [
      self.scores(*pair, source_length=32)
      for pair in (
        ("preference", tmp_path / "run"),
        ("classifier", tmp_path / "out"),
      )
    ]
    np.testing.assert_allclose(*cut, atol=1e-5)
    assert abs(cut[0] - expected).max() > 1e-2
    with pytest.raises(ValueError, match="template is for other models; .*own"):
      self.scores("classifier", tmp_path / "out", template=reward_runs.TEMPLATE)

  def test_the_folder_says_what_it_is(self, tmp_path):
    reward_runs.start(tmp_path / "run", pad_id=0, num_tokens=500)
    report = {"accuracy": 0.75, "stderr": 0.1, "pairs": 20}
    (tmp_path / "run" / "evaluation").mkdir()
    accuracy = tmp_path / "run" / "evaluation" / "accuracy.json"
    accuracy.write_text(json.dumps(report | {"step": reward_runs.STEP}))
    arguments = ("--dtype", "bfloat16", "--step", reward_runs.STEP)
    status, _, err = self.export(tmp_path / "run", tmp_path / "out", *arguments)
    assert status == 0, err
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["Qwen3ForSequenceClassification"]
    assert values["num_labels"] == len(values["id2label"]) == 1
    assert values["pad_token_id"] == 0 != values["eos_token_id"]
    stored = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert stored["score.weight"].shape == (1, 32)
    assert stored["score.weight"].dtype == "bfloat16"
    assert "lm_head.weight" not in stored
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["step"] == reward_runs.STEP and record["format"] == "hf"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "75.0% ± 19.6%" in card and "tags: [clp_jax, reward-model]" in card
    assert 'parts = ["Asked:", document, "Answered:", response, "End."]' in card
    # Anew, of another step, of which the accuracy is not.
    accuracy.write_text(json.dumps(report | {"step": 1}))
    assert self.export(tmp_path / "run", tmp_path / "out")[0] == 0
    assert "75.0%" not in (tmp_path / "out" / "README.md").read_text()

  def test_pads_with_another_token_than_rows_end_in(self, tmp_path):
    """<|endoftext|>, of which the tokenizer says that it pads, is EOS here."""
    words = small_decoder.make_tokenizer()
    words = hf_tokenizer.HFTokenizer("here", words.files(), (0,))
    reward_runs.start(tmp_path / "run", "llama", words, eos_ids=(0,))
    status, _, err = self.export(tmp_path / "run", tmp_path / "out")
    assert status == 0, err
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    own = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert values["eos_token_id"] == 0 and values["pad_token_id"] == 1
    assert own["pad_token"] == "<|im_start|>"
    assert own["eos_token"] == "<|im_end|>"
    found = self.scores("classifier", tmp_path / "out")
    expected = self.scores("preference", tmp_path / "run")
    np.testing.assert_allclose(found, expected, atol=1e-5)

  def test_with_a_sentencepiece_model(self, judge, tmp_path):
    words = judge[1]
    ids = {"pad_id": words.pad_id, "eos_ids": words.eos_ids}
    reward_runs.start(tmp_path / "run", "qwen2", words, **ids)
    assert self.export(tmp_path / "run", tmp_path / "out")[0] == 0
    found = self.scores("classifier", tmp_path / "out")
    expected = self.scores("preference", tmp_path / "run")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (tmp_path / "out" / "vocabulary.model").unlink()
    with pytest.raises(ValueError, match="out holds no vocabulary; restore it"):
      self.scores("classifier", tmp_path / "out")

  @pytest.mark.parametrize(
    "status, message, arguments",
    [
      (2, "--weights: a reward model has none", ("--weights", "a=1")),
      (2, "--format peft: a reward model is", ("--format", "peft")),
      (1, "has no step 9; it has 3", ("--step", 9)),
    ],
  )
  def test_bad_arguments_are_one_line(
    self, tmp_path, status, message, arguments
  ):
    reward_runs.start(tmp_path / "run")
    self.fails(tmp_path, status, message, *arguments)

  def test_what_has_no_class_is_one_line(self, trained, tmp_path):
    message = "--format hf: transformers has no T5 whose score is read"
    self.fails(tmp_path, 2, message, "--workdir", trained[0])
    reward_runs.start(tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    values["reward_model"]["head"] = "token"
    file.write_text(json.dumps(values))
    self.fails(tmp_path, 2, "score is the logit of a token")

  def fails(self, tmp_path, status, message, *arguments):
    output = tmp_path / "out"
    got, _, err = self.export(tmp_path / "run", output, *arguments)
    assert got == status, err
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not output.exists()

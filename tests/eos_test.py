"""The end of sequence is what vocabulary and model say: other ids, or several.

Token 1 is a word here; whoever takes it for the end cuts responses short.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small_decoder
import small_t5
from sentencepiece import sentencepiece_model_pb2

import clp_jax
from clp_jax import batches, interop, rollout, run_folder
from clp_jax import config as config_lib
from clp_jax.cli.arguments import load_config
from clp_jax.data import tokenizer, vocabulary
from clp_jax.errors import ConfigError
from clp_jax.evaluation import sweep
from clp_jax.initial import load_initial
from clp_jax.models import decoding, families, t5
from clp_jax.serving.decoder import Decoder, Row
from clp_jax.train import moft

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "jsonl.py")
WORDS = [f"w{i}" for i in range(30)]
DOCUMENTS = ["w3 w1 w4", "w1 w5", "w9 w2 w6 w5 w3 w5", "w8", "w9 w7 w9", "w3"]
CASES = {"2": (2,), "5": (5,), "5 or 9": (5, 9)}
# Each trains and compiles for itself: one stands for all in the short suite.
SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in ("2", "5")]
S, T = 12, 10


def words_model(eos_id):
  """<pad>, words, but for </s> where it is told to be, and <unk>."""
  model = sentencepiece_model_pb2.ModelProto.FromString(
    vocabulary.word_model(WORDS, ["."])
  )
  pad, eos, unk, *words = model.pieces
  pieces = [pad, *words, unk]
  pieces.insert(eos_id, eos)
  assert pieces[1].piece == "▁w0"
  pieces = [
    sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(
      piece.SerializeToString()
    )
    for piece in pieces
  ]
  del model.pieces[:]
  model.pieces.extend(pieces)
  return model.SerializeToString()


def save_t5(folder, eos_ids, own=None):
  """A Hugging Face folder whose responses often end."""
  own = eos_ids[0] if own is None else own
  # In another order than that which comes of it.
  config = dataclasses.replace(small_t5.V1_1, eos_ids=eos_ids[::-1])
  params = small_t5.random_params(config)
  params = jax.tree.map(lambda p: p * 0.4 if p.ndim > 1 else p, params)
  params["decoder"]["logits_dense"]["kernel"][:, [1, *eos_ids]] *= 3
  interop.save_t5(
    folder, config, params, "hf", vocabulary=words_model(eos_ids[0])
  )
  (folder / "spiece.model").write_bytes(words_model(own))


class Case(NamedTuple):
  eos_ids: tuple[int, ...]
  initial: pathlib.Path  # Hugging Face
  workdir: pathlib.Path  # a run from there, with soft tokens


def arguments(initial, data):
  """What `clp train` takes."""
  settings = {
    "model.init": initial,
    "data.train": data,
    "data.eval": data,
    "data.template": "w7 {document}",
    "data.source_length": S,
    "data.target_length": T,
    "soft_tokens.length": 2,
    "sft.steps": 0,
    "rollout.prompts": 8,
    "rollout.samples": 2,
    "train.steps": 2,
    "eval.prompts": 8,
    "eval.samples": 1,
    "eval.grid": 2,
  }
  return [f"--config.{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module", params=[*SLOW, "5 or 9"])
def case(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("eos")
  save_t5(folder / "t5", CASES[request.param])
  rows = [{"document": d, "summary": d} for d in [*DOCUMENTS, "w2", "w4 w6"]]
  data = folder / "data.jsonl"
  data.write_text("\n".join(map(json.dumps, rows)))
  config = load_config(CONFIG, arguments(folder / "t5", data))
  workdir = folder / "run"
  runs.save_untrained(config, workdir)
  return Case(CASES[request.param], folder / "t5", workdir)


@pytest.fixture(scope="module")
def policy(case):
  return clp_jax.Policy.load(str(case.workdir))


WEIGHTS = {"rouge": 0.5, "length": 0.5}


def check_ends(tokens, mask, eos_ids):
  """Rows end with their first end, where they have one, and nowhere else."""
  tokens, mask = np.asarray(tokens), np.asarray(mask)
  ends = np.isin(tokens, eos_ids) & mask
  np.testing.assert_array_equal(mask, np.cumsum(ends, axis=1) - ends == 0)
  assert (tokens[~mask] == 0).all() and (tokens[mask] != 0).all()
  assert set(tokens[ends]) == {*eos_ids}  # each of them came
  assert (tokens[mask & ~ends] == 1).any()  # which is a word


def sample(policy, seed=0, copies=12):
  """(inputs, samples) of the documents, many times over."""
  tokens = policy.tokenize(DOCUMENTS * copies, WEIGHTS)
  keys = rollout.row_keys(jax.random.key(seed), len(tokens))
  coefficients = policy.coefficients(WEIGHTS)
  return tokens, policy.sample(tokens, coefficients, keys)


def test_the_run_remembers_it_and_exports_it(case, policy, tmp_path):
  ids = case.eos_ids
  assert policy.model_config.eos_ids == policy.vocabulary.eos_ids == ids
  model = json.loads((case.workdir / "model.json").read_text())
  assert model["eos_ids"] == [*ids]
  assert run_folder.load_tokenizer(str(case.workdir)).eos_ids == ids
  plain = dataclasses.replace(policy.model_config, soft_tokens=0)
  for format in ("hf", "orbax"):
    out = tmp_path / format
    interop.save_t5(
      out,
      plain,
      jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), t5.abstract_params(plain)
      ),
      format,
      vocabulary=(case.workdir / "vocabulary.model").read_bytes(),
    )
    assert interop.load_config(out).eos_ids == ids
  written = [ids[0], *ids[1:]] if len(ids) > 1 else ids[0]
  for name in ("config.json", "generation_config.json"):
    values = json.loads((tmp_path / "hf" / name).read_text())
    assert values["eos_token_id"] == written


def test_a_run_of_an_earlier_version_takes_the_vocabularys(case, tmp_path):
  source = case.workdir / "vocabulary.model"
  (tmp_path / "vocabulary.model").write_bytes(source.read_bytes())
  fields = json.loads((case.workdir / "model.json").read_text())
  del fields["eos_ids"]
  (tmp_path / "model.json").write_text(json.dumps(fields))
  config = run_folder.load_model_config(str(tmp_path))
  assert config.eos_ids == case.eos_ids[:1]


def test_samples_end_there_and_their_numbers_are_teacher_forced(case, policy):
  tokens, samples = sample(policy)
  check_ends(samples.tokens, samples.mask, case.eos_ids)
  model = families.build(policy.model_config)
  params = policy.params(WEIGHTS)
  scores = jax.jit(lambda *args: decoding.score_tokens(model, params, *args))(
    tokens, samples.tokens
  )
  logp = np.where(samples.mask, scores.logp, 0)
  np.testing.assert_allclose(samples.logp, logp, atol=1e-4)
  texts = policy.decode(samples)
  ended = np.isin(samples.tokens, case.eos_ids).any(axis=1)
  words = samples.mask.sum(-1) - ended
  spaced = [text.replace(".", " .").split() for text in texts]
  assert [len(text) for text in spaced] == words.tolist()
  # What is scored is the text and then the first of the ends.
  first = (samples.tokens == case.eos_ids[0]).any(axis=1)
  rows = np.flatnonzero(first)[:8]
  scores = policy.score(
    [(DOCUMENTS * 12)[i] for i in rows], [texts[i] for i in rows], WEIGHTS
  )
  again = [policy.vocabulary.encode(texts[i]) for i in rows]
  same = [
    [*ids, case.eos_ids[0]] == samples.tokens[i][samples.mask[i]].tolist()
    for ids, i in zip(again, rows, strict=True)
  ]
  assert any(same)
  np.testing.assert_allclose(
    scores[same], samples.logp.sum(-1)[rows][same], rtol=1e-4
  )


def test_rollouts_end_there(case, policy):
  config = policy.config
  words = run_folder.load_tokenizer(str(case.workdir))
  programs = moft.make_programs(
    config,
    policy.bank.reference_config,
    policy.mesh,
    vocabulary.allowed_tokens(words, policy.model_config.vocab_size),
  )
  batch = batches.eval_batch(config, words, 8)
  inputs = jnp.asarray(np.repeat(batch.encoder_input_tokens, 1, axis=0))
  seen = [
    programs.rollout(
      policy.sets, policy.reference, inputs, jax.random.key(i), 0, None
    )
    for i in range(6)
  ]
  tokens, mask, logp = (
    np.concatenate([np.asarray(getattr(r, name)) for r in seen])
    for name in ("tokens", "mask", "logp")
  )
  check_ends(tokens, mask, case.eos_ids)
  assert (logp[~mask] == 0).all() and (logp[mask] < 0).all()


def test_sweeps_end_there(case, policy):
  batch = batches.eval_batch(policy.config, policy.vocabulary, 8)
  measured = sweep.make_measure(policy, [], batch, 3)(policy.mix(WEIGHTS))
  tokens = policy.tokenize(batch.documents, WEIGHTS)
  keys = rollout.row_keys(jax.random.key(3), 8)
  samples = policy.sample(tokens, policy.coefficients(WEIGHTS), keys)
  assert list(measured.responses) == policy.decode(samples)
  logp, ref_logp = (
    decoding.score_tokens(
      families.build(config),
      params,
      tokens,
      samples.tokens,
      allowed=policy.allowed,
    ).logp
    for config, params in (
      (policy.model_config, policy.params(WEIGHTS)),
      (policy.bank.reference_config, policy.reference),
    )
  )
  kl = np.where(samples.mask, logp - ref_logp, 0).sum(-1)
  np.testing.assert_allclose(np.ravel(measured.kl), kl, atol=1e-4)


def test_the_server_stops_there(case, policy):
  decoder = Decoder(policy, 32)
  assert decoder.eos_ids == case.eos_ids
  tokens = policy.tokenize(DOCUMENTS * 5, WEIGHTS)
  rows = [
    Row(
      tokens=own[own > 0],
      coefficients=policy.coefficients(WEIGHTS),
      seed=7,
      number=i,
      temperature=1.0,
      top_p=1.0,
      max_tokens=T,
      alternatives=False,
    )
    for i, own in enumerate(tokens)
  ]
  sampled = decoder.begin(rows).advance(T)
  assert sampled.ended.all()
  mask = np.arange(T) < sampled.lengths[:, None]
  check_ends(sampled.tokens, mask, case.eos_ids)


def test_texts_end_with_the_first_and_hold_none(case, policy):
  words = run_folder.load_tokenizer(str(case.workdir))
  batch = batches.eval_batch(policy.config, words, 8)
  for text, row in zip(
    batch.references, batch.decoder_target_tokens, strict=True
  ):
    *body, end = row[row > 0].tolist()
    assert end == case.eos_ids[0] and not {*body} & {*case.eos_ids}
    assert len(body) >= len(text.split())
  every = " ".join(WORDS)
  for vocabulary_ in (words, policy.vocabulary):
    ids = vocabulary_.encode(every)
    assert not {*ids} & {*case.eos_ids} and 1 in ids
  allowed = policy.allowed
  assert allowed[[1, *case.eos_ids]].all() and not allowed[0]
  control = vocabulary.control_ids(words, 48)
  assert control and not {*control} & {*case.eos_ids}
  ends = np.asarray([[1, end, 3] for end in case.eos_ids])
  assert tokenizer.texts(words, ends, ends > 0) == ["w0"] * len(ends)


def test_soft_tokens_start_as_it(case, policy):
  table = policy.reference["token_embedder"]["embedding"]
  params = policy.bank.init(policy.reference, jax.random.key(0))
  soft = np.asarray(params["soft_tokens"]["embedding"])
  np.testing.assert_array_equal(
    soft, np.broadcast_to(table[case.eos_ids[0]], soft.shape)
  )
  unknown = dataclasses.replace(policy.bank.reference_config, eos_ids=())
  bank = dataclasses.replace(policy.bank, reference_config=unknown)
  with pytest.raises(ValueError, match="the model's config the eos_ids"):
    bank.init(policy.reference, jax.random.key(0))


@pytest.mark.slow
def test_a_run_trains_and_is_evaluated(case, tmp_path):
  data = case.workdir.parent / "data.jsonl"
  own = ("--config.sft.steps=2", "--config.sft.batch=8")
  status, _, err = runs.clp(
    *("train", "--config", CONFIG, "--workdir", tmp_path / "run"),
    *(*arguments(case.initial, data), *own),
  )
  assert status == 0, err
  for folder in (tmp_path / "run", tmp_path / "run" / "sft"):
    config = run_folder.load_model_config(str(folder))
    assert config.eos_ids == case.eos_ids
  lengths = [row["length"] for row in runs.metrics(tmp_path / "run")]
  assert lengths and all(1 < length < T for length in lengths)
  status, _, err = runs.clp("evaluate", "--workdir", tmp_path / "run")
  assert status == 0, err


def test_a_model_and_a_vocabulary_that_do_not_agree_are_refused(tmp_path):
  save_t5(tmp_path, (5, 9), own=2)
  config = config_lib.get_config()
  config.model.init = str(tmp_path)
  message = "ends a text with token 2, but the model's eos_token_id is 9, 5"
  with pytest.raises(ConfigError, match=message):
    load_initial(config)
  # What generation reads goes before what config.json says.
  small_t5.edit_json(tmp_path / "generation_config.json", eos_token_id=2)
  assert load_initial(config).model_config.eos_ids == (2,)
  small_t5.edit_json(tmp_path / "generation_config.json", eos_token_id=None)
  small_t5.edit_json(tmp_path / "config.json", eos_token_id=None)
  assert interop.load_config(tmp_path).eos_ids == ()
  assert load_initial(config).model_config.eos_ids == (2,)
  small_t5.edit_json(tmp_path / "config.json", eos_token_id=[2, 48])
  with pytest.raises(ConfigError, match=r"eos_ids must be tokens in \[1, 48\)"):
    load_initial(config)
  config_2 = dataclasses.replace(small_t5.V1_1, eos_ids=(5,))
  with pytest.raises(ValueError, match="ends a text with token 2"):
    interop.save_t5(
      tmp_path / "out",
      config_2,
      small_t5.random_params(config_2),
      "hf",
      vocabulary=words_model(2),
    )


def test_a_t5_reads_its_sentencepiece_model_though_a_tokenizer_json_lies_there(
  tmp_path,
):
  """As in the folders that T5s come in; alone it is refused, having no EOS."""
  config = dataclasses.replace(small_t5.V1_1, vocab_size=512, eos_ids=())
  model = small_t5.trained_vocabulary()
  folder = tmp_path / "t5"
  params = small_t5.random_params(config)
  interop.save_t5(folder, config, params, "hf", vocabulary=model)
  for name, content in small_decoder.tokenizer_files().items():
    if name != "tokenizer_config.json":
      (folder / name).write_bytes(content)
  run = config_lib.get_config()
  run.model.init = str(folder)
  found = load_initial(run)
  assert isinstance(found.vocabulary, vocabulary.Vocabulary)
  ids, _ = found.vocabulary.prompt("one two", None, 20)
  assert ids[-1] == found.model_config.eos_ids[0] == 1
  (folder / "spiece.model").unlink()
  with pytest.raises(ConfigError, match="reads prompts that end in EOS"):
    load_initial(run)

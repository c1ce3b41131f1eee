"""Batches of seqio tasks, and the vocabularies that they are made with."""

import collections
import functools
import itertools
import json
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import small_t5
from sentencepiece import sentencepiece_model_pb2

from clp_jax import batches as batches_lib
from clp_jax import config as config_lib
from clp_jax.data import newsroom, newsroom_text, reader, tasks, tokenizer
from clp_jax.data import vocabulary as vocabularies
from clp_jax.rewards import model as models

T5_VOCABULARY = (
  pathlib.Path(__file__).parents[2] / "shared/data"
) / "t5_cc_all.32000.100extra.model"
S, T = newsroom.SOURCE_LENGTH, newsroom.TARGET_LENGTH


@pytest.fixture(scope="module")
def task():
  return tasks.get_task("newsroom")


@pytest.fixture(scope="module")
def vocabulary(task):
  return tasks.vocabulary_of(task)


@pytest.fixture(scope="module")
def t5_vocabulary():
  if not T5_VOCABULARY.exists():
    pytest.skip(f"{T5_VOCABULARY} is not there")
  return vocabularies.read(T5_VOCABULARY)


@pytest.fixture
def make_task(task):
  """Makes tasks of the first newsroom items, outside of seqio's registry."""
  tf, seqio = vocabularies.import_seqio()

  def make(count, *extra, keys=("document", "reference"), known=True):
    items = newsroom.make_items("train", 0, max(count, 1))

    def dataset(split, shuffle_files=False):
      del split, shuffle_files
      texts = {
        "inputs": [item.document for item in items],
        "targets": [item.reference for item in items],
      }
      texts[keys[0]], texts[keys[1]] = texts["inputs"], texts["targets"]
      data = tf.data.Dataset.from_tensor_slices(texts).take(count)
      # A filter that keeps all makes the number unknown, as text files do.
      return data if known else data.filter(lambda example: True)

    feature = task.output_features["inputs"]
    return seqio.Task(
      "few",
      source=seqio.FunctionDataSource(dataset, splits=["train"]),
      preprocessors=[
        *extra,
        functools.partial(
          seqio.preprocessors.tokenize, copy_pretokenized=False
        ),
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={"inputs": feature, "targets": feature},
    )

  return make


def batches(task, count, split="train", **kwargs):
  lengths = {
    name: kwargs.pop(name, length)
    for name, length in (("source_length", S), ("target_length", T))
  }
  numbering = reader.Numbering(**{"batch_size": 4, "seed": 0} | kwargs)
  made = tasks.train_batches(task, split, numbering, **lengths)
  return list(itertools.islice(made, count))


def assert_same(left, right):
  assert left.documents == right.documents
  assert left.references == right.references
  np.testing.assert_array_equal(
    left.encoder_input_tokens, right.encoder_input_tokens
  )
  np.testing.assert_array_equal(
    left.decoder_target_tokens, right.decoder_target_tokens
  )


class TestTrainBatches:
  def test_tokens_spell_the_texts(self, task, vocabulary):
    (batch,) = batches(task, 1, batch_size=6)
    for tokens, texts, length in (
      (batch.encoder_input_tokens, batch.documents, S),
      (batch.decoder_target_tokens, batch.references, T),
    ):
      assert tokens.shape == (6, length) and tokens.dtype == np.int32
      assert isinstance(texts, list)
      for row, text in zip(tokens, texts, strict=True):
        ids = [*vocabulary.encode(text), vocabulary.eos_id]
        np.testing.assert_array_equal(row[: len(ids)], ids)
        assert not row[len(ids) :].any()
    train = {
      item.document: item.reference
      for item in newsroom.make_items("train", 0, 20_000)
    }
    for document, reference in zip(
      batch.documents, batch.references, strict=True
    ):
      assert train[document] == reference

  def test_start_gives_the_stream_from_there(self, task):
    whole = batches(task, 5)
    for left, right in zip(whole[3:], batches(task, 2, start=3), strict=True):
      assert_same(left, right)
    assert whole[0].documents != whole[3].documents

  @pytest.mark.parametrize("known", [True, False])
  def test_start_in_a_later_epoch(self, make_task, known):
    few = make_task(10, known=known)
    whole = batches(few, 12)
    for start in (2, 3, 5, 11):  # within, across and at the start of an epoch
      (batch,) = batches(few, 1, start=start)
      assert_same(batch, whole[start])

  def test_an_epoch_has_each_example_once_in_its_own_order(self, make_task):
    rows = [d for batch in batches(make_task(10), 5) for d in batch.documents]
    assert len(set(rows[:10])) == len(set(rows[10:])) == 10
    assert rows[:10] != rows[10:]
    assert rows[:10] != [
      i.document for i in newsroom.make_items("train", 0, 10)
    ]

  def test_a_split_smaller_than_a_batch_repeats(self, make_task):
    (batch,) = batches(make_task(3), 1, batch_size=12)
    assert set(collections.Counter(batch.documents).values()) == {4}

  def test_the_seed_decides_the_order(self, make_task):
    few = make_task(10)
    assert_same(batches(few, 1, seed=5)[0], batches(few, 1, seed=5)[0])
    assert batches(few, 1, seed=5)[0].documents != (
      batches(few, 1, seed=6)[0].documents
    )

  @pytest.mark.parametrize("count", [2, 3])
  def test_processes_cut_the_same_batches(self, make_task, count):
    few = make_task(10)
    whole = batches(few, 3, batch_size=6, start=2)
    parts = [
      batches(
        few, 3, batch_size=6, start=2, process_index=p, process_count=count
      )
      for p in range(count)
    ]
    for k, batch in enumerate(whole):
      assert len(parts[0][k].documents) == 6 // count
      joined = reader.Batch(
        *(np.concatenate([part[k][i] for part in parts]) for i in (0, 1)),
        *(sum((part[k][i] for part in parts), []) for i in (2, 3)),
      )
      assert_same(joined, batch)

  def test_long_texts_are_cut_and_keep_eos(self, task, vocabulary):
    (batch,) = batches(task, 1, source_length=9, target_length=5)
    (whole,) = batches(task, 1)
    for short, full in zip(batch[:2], whole[:2], strict=True):
      length = short.shape[1]
      np.testing.assert_array_equal(short[:, :-1], full[:, : length - 1])
      assert (short[:, -1] == vocabulary.eos_id).all()
    assert batch.documents == whole.documents

  def test_takes_the_texts_that_seqio_leaves(self, make_task):
    keys = ("inputs_pretokenized", "targets_pretokenized")
    (batch,) = batches(make_task(10, keys=keys), 1)
    assert_same(batch, batches(make_task(10), 1)[0])

  def test_refuses_an_empty_split(self, make_task):
    for known in (True, False):
      with pytest.raises(ValueError, match="'train' of task 'few' is empty"):
        batches(make_task(0, known=known), 1)

  def test_refuses_tasks_that_drop_examples(self, make_task):
    def long_only(dataset):
      return dataset.filter(lambda example: True)

    def twice(dataset):
      return dataset.concatenate(dataset)

    for extra in (long_only, twice):
      with pytest.raises(ValueError, match="'few' drop, repeat or join"):
        batches(make_task(10, extra), 1)

  def test_refuses_tasks_without_texts(self, make_task):
    few = make_task(10, keys=("text", "reference"))
    message = "without document or inputs_pretokenized; they have inputs, "
    with pytest.raises(ValueError, match=message):
      batches(few, 1)

  @pytest.mark.parametrize(
    "kwargs,message",
    [
      ({"split": "dev"}, "no split 'dev'; it has train, validation, test"),
      ({"batch_size": 6, "process_count": 4}, "batch_size = 6 .* processes, 4"),
      ({"batch_size": 0}, "batch_size = 0 is not a positive"),
      ({"process_index": 1}, "got 1 and 1"),
      ({"start": -1}, "got start=-1, seed=0"),
      ({"target_length": 1}, "targets need at least 2 tokens"),
    ],
  )
  def test_refuses_impossible_sizes(self, task, kwargs, message):
    with pytest.raises(ValueError, match=message):
      # Before the first batch is asked for.
      batches(task, 0, **kwargs)


class TestEvalBatch:
  def test_is_the_first_examples_in_order(self, task):
    batch = tasks.eval_batch(
      task, "validation", num_examples=5, source_length=S, target_length=T
    )
    items = newsroom.make_items("validation", 0, 5)
    assert batch.documents == [item.document for item in items]
    assert batch.references == [item.reference for item in items]
    assert batch.encoder_input_tokens.shape == (5, S)
    assert batch.decoder_target_tokens.shape == (5, T)

  @pytest.mark.parametrize("count", [0, 11])
  def test_says_how_many_there_are(self, make_task, count):
    message = f"num_examples = {count}, but .* 'few' has 10 examples"
    with pytest.raises(ValueError, match=message):
      tasks.eval_batch(
        make_task(10),
        "train",
        num_examples=count,
        source_length=S,
        target_length=T,
      )


class TestGetTask:
  def test_is_the_same_each_time(self, task):
    assert tasks.get_task("newsroom") is task

  def test_says_which_tasks_there_are(self):
    with pytest.raises(ValueError, match="no seqio task 'xsun'.*newsroom"):
      tasks.get_task("xsun")

  def test_tokenises_with_another_vocabulary(self, t5_vocabulary):
    batch = tasks.eval_batch(
      tasks.get_task("newsroom", vocabularies.for_seqio(t5_vocabulary)),
      "test",
      num_examples=3,
      source_length=128,
      target_length=64,
    )
    own = batch.decoder_target_tokens
    assert tokenizer.texts(t5_vocabulary, own, own != 0) == batch.references
    expected = tokenizer.inputs(t5_vocabulary, batch.documents, 128)
    np.testing.assert_array_equal(batch.encoder_input_tokens, expected)


class TestTokens:
  @pytest.mark.parametrize("length", [7, S])
  def test_own_documents_become_what_the_task_makes(
    self, task, vocabulary, length
  ):
    batch = tasks.eval_batch(
      task, "test", num_examples=20, source_length=length, target_length=T
    )
    tokens = tokenizer.inputs(vocabulary, batch.documents, length)
    np.testing.assert_array_equal(tokens, batch.encoder_input_tokens)
    assert tokens.dtype == np.int32

  def test_odd_documents_still_end_in_eos(self, vocabulary):
    tokens = tokenizer.inputs(vocabulary, ["", "Zürich  museum."], 6)
    museum, stop = vocabulary.encode("museum.")
    np.testing.assert_array_equal(
      tokens,
      [[1, 0, 0, 0, 0, 0], [vocabulary.unk_id, museum, stop, 1, 0, 0]],
    )

  def test_refuses_no_room_for_eos(self, vocabulary):
    with pytest.raises(ValueError, match=r"at least 2 tokens.* length of 1\.$"):
      tokenizer.inputs(vocabulary, ["museum"], 1)

  def test_decodes_each_row_up_to_its_end(self, vocabulary):
    mill, zoo = vocabulary.encode("mill zoo")
    tokens = [[mill, zoo, 1, zoo], [zoo, mill, zoo, mill], [zoo, 999, mill, 1]]
    mask = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert tokenizer.texts(
      vocabulary, np.asarray(tokens), np.asarray(mask, bool)
    ) == ["mill zoo", "zoo mill zoo mill", "zoo ⁇  mill"]
    # EOS ends a row whatever the mask says; the mask does, whatever is there.
    assert tokenizer.texts(
      vocabulary,
      np.asarray([[mill, 1, zoo], [1, zoo, 0], [zoo, mill, mill]]),
      np.asarray([[1, 1, 1], [1, 1, 1], [1, 0, 0]], bool),
    ) == ["mill", "", "zoo"]
    empty = np.zeros([0, 4], int)
    assert tokenizer.texts(vocabulary, empty, empty > 0) == []


@pytest.fixture(scope="module")
def with_controls(tmp_path_factory):
  """A file whose pieces spell all that its control tokens are called."""
  model = sentencepiece_model_pb2.ModelProto.FromString(
    vocabularies.word_model(
      ["mill", "zoo", *"<>_/▁"], punctuation=[*"<>_/0123456789adeiklmnoprstuxz"]
    )
  )
  # Kinds that text is parsed for: trained so, added by seqio, and by others.
  kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
  for name, kind in (
    ("<extra_id_2>", kinds.USER_DEFINED),
    ("▁<extra_id_1>", kinds.USER_DEFINED),
    ("▁<extra_id_0>", kinds.NORMAL),
  ):
    model.pieces.add(piece=name, score=0, type=kind)
  path = tmp_path_factory.mktemp("controls") / "vocabulary.model"
  path.write_bytes(model.SerializeToString())
  return path


FORGED = ("<extra_id_0>", "<extra_id_1>", "▁<extra_id_2>", "</s>", "<pad>")
texts_with_forgeries = st.lists(
  st.sampled_from((*FORGED, "<unk>", "mill", "zoo", "<", "_")), max_size=6
).flatmap(
  lambda words: st.sampled_from(("", " ")).map(lambda space: space.join(words))
)


class TestControlTokens:
  """Text makes none, whatever reads it."""

  def both(self, path):
    return (
      vocabularies.load_vocabulary(path),
      vocabularies.Vocabulary(str(path), path.read_bytes()),
    )

  def control(self, vocabulary):
    ids = vocabularies.control_ids(vocabulary, 2**15 + 100)
    assert len(ids) > 2
    return {*ids, vocabulary.eos_id, vocabularies.PAD}

  @hypothesis.given(texts_with_forgeries)
  def test_are_made_by_no_text(self, with_controls, text):
    with_seqio, without = self.both(with_controls)
    control = self.control(without)
    ids = without.encode(text)
    assert not control & {*ids}
    assert with_seqio.encode(text) == ids
    (row,) = tokenizer.inputs(without, [text], 400, "zoo {document} </s>")
    assert row[row != 0].tolist()[-1] == without.eos_id
    assert not control & {*row[row != 0].tolist()[:-1]}
    # Nothing of the text is lost: a reward's model reads what was written.
    if "▁" not in text:  # which SentencePiece takes for a space
      assert without.tokenizer.decode(ids) == text

  @pytest.mark.parametrize("public", (False, True), ids=("made", "t5"))
  def test_are_made_by_no_document_of_a_task(self, with_controls, public):
    if public and not T5_VOCABULARY.exists():
      pytest.skip(f"{T5_VOCABULARY} is not there")
    path = T5_VOCABULARY if public else with_controls
    with_seqio, without = self.both(path)
    control = self.control(without)
    tf, seqio = vocabularies.import_seqio()
    # What seqio's own class makes of it: this test can fail.
    plain = seqio.SentencePieceVocabulary(str(path))
    for text in ("zoo <extra_id_0>", "<extra_id_1> mill"):
      assert control & {*plain.encode(text)}
      assert control & {*plain.encode_tf(text).numpy().tolist()}
      assert not control & {*with_seqio.encode_tf(text).numpy().tolist()}
    texts = [f"mill {forged} zoo {forged}{forged}" for forged in FORGED]

    def dataset(split, shuffle_files=False):
      del split, shuffle_files
      return tf.data.Dataset.from_tensor_slices(
        {"inputs": texts, "targets": texts, "document": texts}
      )

    feature = seqio.Feature(with_seqio, add_eos=True, dtype=tf.int32)
    task = seqio.Task(
      "forged",
      source=seqio.FunctionDataSource(dataset, splits=["train"]),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={"inputs": feature, "targets": feature},
    )
    for template in (None, "<extra_id_1> {document}"):
      if template is not None:
        task = tasks.with_template(task, template)
      batch = tasks.eval_batch(
        task, "train", num_examples=5, source_length=200, target_length=200
      )
      assert batch.documents == batch.references == texts
      expected = tokenizer.inputs(without, texts, 200, template)
      np.testing.assert_array_equal(batch.encoder_input_tokens, expected)
      for row in (*batch.encoder_input_tokens, *batch.decoder_target_tokens):
        *body, end = row[row != 0].tolist()
        assert end == without.eos_id and not control & {*body}

  def test_are_made_by_no_jsonl_and_no_pair_to_score(
    self, with_controls, tmp_path
  ):
    _, without = self.both(with_controls)
    control = self.control(without)
    texts = [f"zoo {' '.join(FORGED[:n])} mill" for n in (1, 3, 5)]
    file = tmp_path / "train.jsonl"
    rows = [{"document": text, "summary": text} for text in texts]
    file.write_text("\n".join(map(json.dumps, rows)))
    config = config_lib.get_config()
    config.data.task = None
    config.data.train = config.data.eval = str(file)
    config.data.source_length = config.data.target_length = 200
    batch = batches_lib.eval_batch(config, without, 3)
    expected = tokenizer.inputs(without, texts, 200)
    np.testing.assert_array_equal(batch.encoder_input_tokens, expected)
    np.testing.assert_array_equal(batch.decoder_target_tokens, expected)
    inputs = models.Inputs(
      without, "<extra_id_0> {document} zoo {response}", 300, overlap=None
    )
    judged, _ = inputs(texts, texts[::-1])
    for row in (*expected, *judged):
      *body, end = row[row != 0].tolist()
      assert end == without.eos_id and not control & {*body}
    # A config's author may name one as a verdict, which is an output.
    assert models.token_of(without, "<extra_id_0>") == control_piece(
      without, "▁<extra_id_0>"
    )
    with pytest.raises(ValueError, match="must be one known piece"):
      models.token_of(without, "<extra_id_7>")


def control_piece(vocabulary, name):
  token = vocabulary.tokenizer.piece_to_id(name)
  assert vocabulary.tokenizer.id_to_piece(token) == name
  return token


class TestVocabulary:
  def test_allows_the_worlds_words_and_eos(self, vocabulary):
    allowed = vocabularies.allowed_tokens(vocabulary, 256)
    pieces = vocabulary.size
    expected = np.arange(256) < pieces
    expected[[0, vocabulary.unk_id]] = False
    np.testing.assert_array_equal(allowed, expected)
    assert allowed[vocabulary.eos_id] and allowed.dtype == bool

  def test_allows_t5s_text_pieces(self, t5_vocabulary):
    pieces = t5_vocabulary.size
    allowed = vocabularies.allowed_tokens(t5_vocabulary, 32128)
    forbidden = [
      t5_vocabulary.tokenizer.id_to_piece(int(i))
      for i in np.flatnonzero(~allowed[:pieces])
    ]
    extra = [f"▁<extra_id_{i}>" for i in range(100)]
    assert sorted(forbidden) == sorted(["<pad>", "<s>", "<unk>", *extra])
    assert not allowed[pieces:].any()
    assert allowed[t5_vocabulary.eos_id]

  def test_refuses_a_model_with_fewer_rows(self, vocabulary):
    with pytest.raises(ValueError, match="has 100 rows of vocabulary for 2"):
      vocabularies.allowed_tokens(vocabulary, 100)

  def test_is_the_same_from_its_saved_bytes(self, vocabulary, tmp_path):
    path = tmp_path / "vocabulary.model"
    ((name, content),) = vocabulary.files().items()
    assert name == path.name
    path.write_bytes(content)
    loaded = vocabularies.read(path)
    with_seqio = vocabularies.load_vocabulary(path)
    path.unlink()  # a loaded vocabulary needs its file no more
    text = newsroom.make_items("test", 0, 1)[0].document
    for same in (loaded, with_seqio):
      assert same.encode(text) == vocabulary.encode(text)
    assert loaded.files() == {name: newsroom_text.vocabulary_bytes()}
    assert with_seqio.sp_model == newsroom_text.vocabulary_bytes()

  def test_sentinels_are_saved_with_it(self, tmp_path):
    path = tmp_path / "plain.model"
    path.write_bytes(newsroom_text.vocabulary_bytes())
    vocabulary = vocabularies.load_vocabulary(path, extra_ids=5)
    saved = tmp_path / "vocabulary.model"
    saved.write_bytes(vocabulary.sp_model)
    loaded = vocabularies.load_vocabulary(saved)
    assert loaded.vocab_size == vocabulary.vocab_size
    assert loaded.tokenizer.id_to_piece(loaded.vocab_size - 1) == (
      "▁<extra_id_0>"
    )
    allowed = vocabularies.allowed_tokens(loaded, loaded.vocab_size)
    assert not allowed[-5:].any() and allowed[-6]

  def test_says_what_is_wrong_with_a_file(self, tmp_path):
    for load in (vocabularies.load_vocabulary, vocabularies.read):
      with pytest.raises(ValueError, match="can't read the voc.* .*absent"):
        load(tmp_path / "absent.model")
    for name, content in (("text", b"not a model"), ("empty", b"")):
      path = tmp_path / f"{name}.model"
      path.write_bytes(content)
      message = f"{name}.model is not a Sentence"
      with pytest.raises(ValueError, match=message):
        vocabularies.load_vocabulary(path)
      with pytest.raises(ValueError, match=message):
        vocabularies.Vocabulary(str(path), content)

  def test_refuses_a_vocabulary_whose_pad_is_not_zero(self, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(
      newsroom_text.vocabulary_bytes()
    )
    model.pieces[0].piece, model.pieces[1].piece = "</s>", "<pad>"
    path = tmp_path / "swapped.model"
    path.write_bytes(model.SerializeToString())
    message = "has PAD 1 and EOS 0; expected PAD 0"
    with pytest.raises(ValueError, match=message):
      vocabularies.load_vocabulary(path)
    with pytest.raises(ValueError, match=message):
      vocabularies.Vocabulary(str(path), path.read_bytes())

  def test_without_seqio_it_gives_the_same_tokens(self, tmp_path):
    """A model that normalises, with sentinels; text that it does not know."""
    symbols = ["<extra_id_1>", "<extra_id_0>"]
    model = small_t5.trained_vocabulary(user_defined_symbols=symbols)
    path = tmp_path / "spiece.model"
    path.write_bytes(model)
    with_seqio = vocabularies.load_vocabulary(path)
    without = vocabularies.Vocabulary(str(path), model)
    for name in ("eos_id", "unk_id"):
      assert getattr(without, name) == getattr(with_seqio, name), name
    texts = ["one  two\n", "ﬁve <extra_id_0>six", "", "été four", "</s> one"]
    for text in texts:
      assert without.encode(text) == with_seqio.encode(text)
    tokens = tokenizer.inputs(without, texts, 12)
    rows = [row[row != 0].tolist() for row in tokens]
    assert rows == [
      [*with_seqio.encode(text)[:11], with_seqio.eos_id] for text in texts
    ]
    assert tokenizer.texts(without, tokens, tokens != 0) == [
      with_seqio.decode(row) for row in rows
    ]
    same = vocabularies.for_seqio(without)
    assert same.eos_ids == without.eos_ids
    assert [same.encode(text) for text in texts] == list(
      map(without.encode, texts)
    )
    assert vocabularies.for_seqio(object()) is None


def run(program, **environment):
  return subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
    env=environment,
  )


def test_importing_the_package_does_not_import_tensorflow():
  program = (
    "import sys; from clp_jax.data import newsroom, newsroom_text, tasks;"
    "newsroom.make_items('test', 0, 1); newsroom_text.vocabulary_bytes();"
    "print([m for m in ('tensorflow', 'seqio') if m in sys.modules])"
  )
  assert run(program).stdout == "[]\n"


@pytest.mark.slow
def test_another_process_makes_the_same_batches_and_says_nothing(task):
  program = (
    "from clp_jax.data import reader, tasks\n"
    "batches = tasks.train_batches(tasks.get_task('newsroom'), 'train',"
    " reader.Numbering(4, seed=3, start=7), source_length=56,"
    " target_length=18)\n"
    "print(next(batches).encoder_input_tokens.tolist())\n"
  )
  done = run(program)
  (batch,) = batches(task, 1, seed=3, start=7)
  assert done.stdout == f"{batch.encoder_input_tokens.tolist()}\n"
  assert done.stderr == ""

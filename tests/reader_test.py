"""Batches of rows that are read by number, here those of the built-in world."""

import collections
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from clp_jax.data import newsroom, newsroom_text, reader, tasks
from clp_jax.data.vocabulary import Vocabulary

S, T = newsroom.SOURCE_LENGTH, newsroom.TARGET_LENGTH
WORDS = Vocabulary("newsroom", newsroom_text.vocabulary_bytes())


def world(count=None, split="train", source_length=S, target_length=T):
  rows = newsroom.rows(split)[:count]
  return reader.Reader(rows, WORDS, None, source_length, target_length)


def batches(rows, count, **kwargs):
  kwargs = {"batch_size": 4, "seed": 0} | kwargs
  made = reader.train_batches(rows, reader.Numbering(**kwargs))
  return list(itertools.islice(made, count))


def assert_same(left, right):
  assert left.documents == right.documents
  assert left.references == right.references
  for tokens, others in zip(left[:2], right[:2], strict=True):
    np.testing.assert_array_equal(tokens, others)


class TestTrainBatches:
  def test_tokens_spell_the_texts(self):
    (batch,) = batches(world(), 1, batch_size=6)
    for tokens, texts, length in (
      (batch.encoder_input_tokens, batch.documents, S),
      (batch.decoder_target_tokens, batch.references, T),
    ):
      assert tokens.shape == (6, length) and tokens.dtype == np.int32
      assert isinstance(texts, list)
      for row, text in zip(tokens, texts, strict=True):
        ids = [*WORDS.encode(text), WORDS.eos_id]
        np.testing.assert_array_equal(row[: len(ids)], ids)
        assert not row[len(ids) :].any()
    train = {
      item.document: item.reference
      for item in newsroom.make_items("train", 0, 20_000)
    }
    assert len(newsroom.rows("train")) == 20_000
    for document, reference in zip(
      batch.documents, batch.references, strict=True
    ):
      assert train[document] == reference

  def test_start_gives_the_stream_from_there(self):
    whole = batches(world(), 5)
    for left, right in zip(
      whole[3:], batches(world(), 2, start=3), strict=True
    ):
      assert_same(left, right)
    assert whole[0].documents != whole[3].documents

  def test_start_in_a_later_epoch(self):
    few = world(10)
    whole = batches(few, 12)
    for start in (2, 3, 5, 11):  # within, across and at the start of an epoch
      (batch,) = batches(few, 1, start=start)
      assert_same(batch, whole[start])

  def test_an_epoch_has_each_example_once_in_its_own_order(self):
    rows = [d for batch in batches(world(10), 5) for d in batch.documents]
    documents = [document for document, _ in newsroom.rows("train")[:10]]
    assert set(rows[:10]) == set(rows[10:]) == set(documents)
    assert rows[:10] != rows[10:]
    assert rows[:10] != documents

  def test_a_split_smaller_than_a_batch_repeats(self):
    (batch,) = batches(world(3), 1, batch_size=12)
    assert set(collections.Counter(batch.documents).values()) == {4}

  def test_the_seed_decides_the_order(self):
    few = world(10)
    assert_same(batches(few, 1, seed=5)[0], batches(few, 1, seed=5)[0])
    assert batches(few, 1, seed=5)[0].documents != (
      batches(few, 1, seed=6)[0].documents
    )

  @pytest.mark.parametrize("count", [2, 3])
  def test_processes_cut_the_same_batches(self, count):
    few = world(10)
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

  def test_long_texts_are_cut_and_keep_eos(self):
    (batch,) = batches(world(source_length=9, target_length=5), 1)
    (whole,) = batches(world(), 1)
    for short, full in zip(batch[:2], whole[:2], strict=True):
      length = short.shape[1]
      np.testing.assert_array_equal(short[:, :-1], full[:, : length - 1])
      assert (short[:, -1] == WORDS.eos_id).all()
    assert batch.documents == whole.documents
    assert batch.num_cut == 4 and whole.num_cut == 0

  def test_what_fails_in_its_thread_is_raised(self):
    class Broken(list):
      def __getitem__(self, row):
        raise OSError("the disk is gone")

    rows = reader.Reader(Broken([("a", "b")]), WORDS, None, S, T)
    with pytest.raises(OSError, match="the disk is gone"):
      batches(rows, 1)

  @pytest.mark.parametrize(
    "lengths,kwargs,message",
    [
      ({}, {"batch_size": 6, "process_count": 4}, "size = 6 .* processes, 4"),
      ({}, {"batch_size": 0}, "batch_size = 0 is not a positive"),
      ({}, {"process_index": 1}, "got 1 and 1"),
      ({}, {"start": -1}, "got start=-1, seed=0"),
      ({}, {"seed": -1}, "got start=0, seed=-1"),
      ({"target_length": 1}, {}, "targets need at least 2 tokens"),
      ({"source_length": 1}, {}, "inputs need at least 2 tokens"),
    ],
  )
  def test_refuses_impossible_sizes(self, lengths, kwargs, message):
    with pytest.raises(ValueError, match=message):
      # Before the first batch is asked for.
      batches(world(10, **lengths), 0, **kwargs)


class TestEvalBatch:
  @pytest.mark.parametrize("split", list(newsroom.SPLITS))
  def test_is_the_first_examples_in_order_as_seqios_are(self, split):
    batch = reader.eval_batch(world(split=split), 5, split)
    items = newsroom.make_items(split, 0, 5)
    assert batch.documents == [item.document for item in items]
    assert batch.references == [item.reference for item in items]
    with_seqio = tasks.eval_batch(
      tasks.get_task("newsroom"),
      split,
      num_examples=5,
      source_length=S,
      target_length=T,
    )
    assert_same(batch, with_seqio)

  @pytest.mark.parametrize("count", [0, 11])
  def test_says_how_many_there_are(self, count):
    message = f"num_examples = {count}, but 'train' has 10 examples"
    with pytest.raises(ValueError, match=message):
      reader.eval_batch(world(10), count, "'train'")

  def test_refuses_a_split_that_is_not_there(self):
    message = "no split 'dev'; it has train, validation, test"
    with pytest.raises(ValueError, match=message):
      newsroom.rows("dev")


@pytest.mark.slow
def test_training_on_the_built_in_world_imports_no_tensorflow(tmp_path):
  program = (
    "import sys\n"
    "from clp_jax.cli import main\n"
    "status = main.main(sys.argv[1:])\n"
    "print([m for m in ('tensorflow', 'seqio') if m in sys.modules])\n"
    "sys.exit(status)\n"
  )
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(
    [
      *(sys.executable, "-c", program, "train"),
      *("--config", str(root / "configs" / "demo.py")),
      *("--workdir", str(tmp_path / "run")),
      *("--config.sft.steps=0", "--config.train.steps=1"),
      "--config.train.normalisation_batches=1",
    ],
    capture_output=True,
    text=True,
    cwd=root,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "[]"

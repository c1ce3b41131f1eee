"""XSum and Reddit TL;DR from TFDS's files, and tasks that seqio has cached."""

import functools
import json
import pathlib

import numpy as np
import pytest

from clp_jax import batches
from clp_jax import config as config_lib
from clp_jax.data import (
  corpora,
  newsroom,
  newsroom_text,
  reader,
  tasks,
  tokenizer,
)
from clp_jax.data.vocabulary import import_seqio
from clp_jax.errors import ConfigError

S, T = newsroom.SOURCE_LENGTH, newsroom.TARGET_LENGTH


@pytest.fixture(scope="module")
def vocabulary():
  """seqio's, for its tasks."""
  return tasks.get_task("newsroom").output_features["inputs"].vocabulary


@pytest.fixture(scope="module")
def words():
  """The same without seqio."""
  return tasks.vocabulary_of(tasks.get_task("newsroom"))


@pytest.fixture
def no_tfds_data(tmp_path):
  """TFDS looks in an empty folder, and forgets what it had opened."""
  _, seqio = import_seqio()
  seqio.set_tfds_data_dir_override(str(tmp_path))
  yield tmp_path
  seqio.set_tfds_data_dir_override(None)
  seqio.utils.LazyTfdsLoader._MEMOIZED_BUILDERS.clear()
  for name in corpora.CORPORA:  # its source remembers the folder
    if name in seqio.TaskRegistry.names():
      seqio.TaskRegistry.remove(name)


@pytest.fixture
def tfds_data(no_tfds_data):
  """Both data sets as TFDS stores them, with the newsroom's articles."""
  import tensorflow_datasets as tfds

  tf, _ = import_seqio()
  texts = tfds.features.Text()
  for dataset, version, document, splits in (
    ("xsum", "1.1.0", "document", ("train", "validation", "test")),
    ("reddit", "1.0.0", "content", ("train",)),
  ):
    features = {document: texts, "summary": texts}
    others = {"author", "body", "normalizedBody", "subreddit", "subreddit_id"}
    if dataset == "reddit":
      features |= dict.fromkeys((*others, "id"), texts)
    data = {}
    for split in splits:
      items = newsroom.make_items(split, 0, 100 if dataset == "reddit" else 8)
      columns = {name: ["x"] * len(items) for name in features}
      columns[document] = [item.document for item in items]
      columns["summary"] = [item.reference for item in items]
      data[split] = tf.data.Dataset.from_tensor_slices(columns)
    tfds.dataset_builders.store_as_tfds_dataset(
      name=dataset,
      version=version,
      features=tfds.features.FeaturesDict(features),
      split_datasets=data,
      data_dir=no_tfds_data,
    )
  return no_tfds_data


def read(task, split, count):
  return tasks.eval_batch(
    task, split, num_examples=count, source_length=S, target_length=T
  )


def test_xsum_has_tfds_splits(tfds_data, vocabulary, words):
  task = tasks.get_task("xsum", vocabulary)
  for split in ("train", "validation", "test"):
    batch = read(task, split, 8)
    items = newsroom.make_items(split, 0, 8)
    pairs = {item.document: item.reference for item in items}
    assert set(batch.documents) == set(pairs)
    for document, reference in zip(
      batch.documents, batch.references, strict=True
    ):
      assert pairs[document] == reference
    expected = tokenizer.inputs(words, batch.documents, S)
    np.testing.assert_array_equal(batch.encoder_input_tokens, expected)


def test_tldr_is_cut_from_the_one_split_of_reddit(tfds_data, vocabulary):
  task = tasks.get_task("tldr", vocabulary)
  sizes = {split: tasks.count(task, split) for split in task.splits}
  assert sizes == {"train": 98, "validation": 1, "test": 1}
  parts = [set(read(task, split, n).documents) for split, n in sizes.items()]
  items = newsroom.make_items("train", 0, 100)
  assert len(set.union(*parts)) == sum(map(len, parts))
  assert set.union(*parts) == {item.document for item in items}
  batch = read(task, "validation", 1)
  pairs = {item.document: item.reference for item in items}
  assert pairs[batch.documents[0]] == batch.references[0]


def test_their_batches_are_numbered(tfds_data, vocabulary):
  task = tasks.with_template(
    tasks.get_task("xsum", vocabulary), "museum {document}"
  )
  lengths = {"source_length": S, "target_length": T}
  first, fifth = (reader.Numbering(3, seed=1, start=n) for n in (0, 4))
  stream = tasks.train_batches(task, "train", first, **lengths)
  whole = [next(stream) for _ in range(5)]
  later = tasks.train_batches(task, "train", fifth, **lengths)
  assert next(later).documents == whole[4].documents
  museum = vocabulary.encode("museum")[0]
  assert (whole[4].encoder_input_tokens[:, 0] == museum).all()


def test_a_config_says_where_tfds_has_prepared_them(tfds_data, words, tmp_path):
  _, seqio = import_seqio()
  seqio.set_tfds_data_dir_override(None)
  config = config_lib.get_config()
  config.data.task = "xsum"
  config.data.source_length = S
  for folder, found in ((tfds_data, True), (tmp_path / "other", False)):
    seqio.utils.LazyTfdsLoader._MEMOIZED_BUILDERS.clear()
    config.data.tfds_data_dir = str(folder)
    if found:
      batch = batches.eval_batch(config, words, 8)
      items = newsroom.make_items("validation", 0, 8)
      assert set(batch.documents) == {item.document for item in items}
    else:
      with pytest.raises(ConfigError, match="data.tfds_data_dir says where"):
        batches.eval_batch(config, words, 8)


def test_a_task_of_that_name_from_another_source_stays(no_tfds_data):
  _, seqio = import_seqio()
  corpora.register_task("xsum")
  seqio.TaskRegistry.remove("xsum")
  own = seqio.TaskRegistry.add(
    "xsum",
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files: 1 / 0, splits=["train"]
    ),
    preprocessors=[],
    output_features={},
  )
  assert tasks.get_task("xsum") is own


@pytest.mark.parametrize("name", ["xsum", "tldr"])
def test_data_that_is_not_prepared_is_an_error(no_tfds_data, vocabulary, name):
  dataset = {"xsum": "xsum", "tldr": "reddit"}[name]
  with pytest.raises(ValueError, match=f"tfds build {dataset}"):
    read(tasks.get_task(name, vocabulary), "train", 1)


def test_a_task_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
  (tmp_path / "my_tasks.py").write_text(
    "from clp_jax.data import corpora\n"
    "import seqio\n"
    "task = corpora.register_task('xsum')\n"
    "seqio.TaskRegistry.add_provider('mine', task)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(
    ValueError, match="no seqio task 'mine'; there are .*tldr"
  ):
    tasks.get_task("mine")
  _, seqio = import_seqio()
  assert tasks.get_task("my_tasks:mine") is seqio.TaskRegistry.get("mine")
  with pytest.raises(ValueError, match="can't import 'no_tasks', .*ModuleNotF"):
    tasks.get_task("no_tasks:mine")


class TestCache:
  """A task as seqio_cache_tasks leaves it, written by hand (it needs Beam)."""

  @pytest.fixture
  def task(self, vocabulary):
    tf, seqio = import_seqio()
    feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    return seqio.Task(
      "cached",
      # Never read: the cache stands in for it.
      source=seqio.FunctionDataSource(
        lambda split, shuffle_files: 1 / 0, splits=["train", "validation"]
      ),
      preprocessors=[
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=True),
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={"inputs": feature, "targets": feature},
    )

  @pytest.fixture
  def cache(self, vocabulary, tmp_path):
    tf, _ = import_seqio()
    folder = tmp_path / "caches" / "cached"
    folder.mkdir(parents=True)
    items = newsroom.make_items("train", 0, 6)
    with tf.io.TFRecordWriter(
      str(folder / "train.tfrecord-00000-of-00001")
    ) as writer:
      for item in items:
        example = tf.train.Example()
        fields = example.features.feature
        for key, text in (
          ("inputs", item.document),
          ("targets", item.reference),
        ):
          fields[key].int64_list.value.extend(vocabulary.encode(text))
          fields[f"{key}_pretokenized"].bytes_list.value.append(text.encode())
        writer.write(example.SerializeToString())
    features = {}
    for key in ("inputs", "targets"):
      features[key] = {"shape": [None], "dtype": "int32"}
      features[f"{key}_pretokenized"] = {"shape": [], "dtype": "string"}
    info = {
      "num_shards": 1,
      "features": features,
      "seqio_version": "1.0.0",
    }
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": 6}))
    (folder / "COMPLETED").write_text("")
    return str(folder.parent)

  @pytest.fixture(autouse=True)
  def forget_folders(self):
    _, seqio = import_seqio()
    before = list(seqio.get_global_cache_dirs())
    yield
    seqio.set_global_cache_dirs(before)

  def test_gives_the_batches_of_the_task_itself(self, task, cache, words):
    cached = tasks.from_cache(task, (cache,))
    batch = tasks.eval_batch(
      cached, "train", num_examples=6, source_length=30, target_length=T
    )
    items = newsroom.make_items("train", 0, 6)
    assert batch.documents == [item.document for item in items]
    expected = tokenizer.inputs(words, batch.documents, 30)
    np.testing.assert_array_equal(batch.encoder_input_tokens, expected)
    lengths = [len(words.encode(d)) + 1 for d in batch.documents]
    assert batch.num_cut == sum(n > 30 for n in lengths) > 0
    stream = tasks.train_batches(
      tasks.with_template(cached, "museum {document}"),
      "train",
      reader.Numbering(4, seed=0, start=2),
      source_length=S,
      target_length=T,
    )
    batch = next(stream)
    expected = tokenizer.inputs(words, batch.documents, S, "museum {document}")
    np.testing.assert_array_equal(batch.encoder_input_tokens, expected)

  def test_control_tokens_in_it_are_unknown(self, task, cache, tmp_path):
    """seqio's tool, with seqio's vocabulary, lets a document make them."""
    from clp_jax.data import vocabulary as vocabularies

    path = tmp_path / "sentinels.model"
    path.write_bytes(newsroom_text.vocabulary_bytes())
    path.write_bytes(vocabularies.load_vocabulary(path, extra_ids=2).sp_model)
    tf, seqio = import_seqio()
    words = vocabularies.load_vocabulary(path)
    feature = seqio.Feature(words, add_eos=True, dtype=tf.int32)
    task = task.replace(output_features={"inputs": feature, "targets": feature})
    plain = seqio.SentencePieceVocabulary(str(path))
    (file,) = pathlib.Path(cache).glob("cached/train.tfrecord*")
    raw = [r.numpy() for r in tf.data.TFRecordDataset(str(file))]
    example = tf.train.Example.FromString(raw[1])
    forged = plain.encode("<extra_id_1> museum <extra_id_0>")
    field = example.features.feature["inputs"].int64_list
    field.value[:] = forged
    with tf.io.TFRecordWriter(str(file)) as writer:
      for record in (raw[0], example.SerializeToString(), *raw[2:]):
        writer.write(record)
    batch = tasks.eval_batch(
      tasks.from_cache(task, (cache,)),
      "train",
      num_examples=6,
      source_length=S,
      target_length=T,
    )
    assert {*vocabularies.control_ids(words, words.vocab_size)} < {*forged}
    expected = [words.unk_id, forged[1], words.unk_id, words.eos_id]
    assert batch.encoder_input_tokens[1][:5].tolist() == [*expected, 0]

  def test_refuses_what_is_not_cached(self, task, cache, tmp_path):
    with pytest.raises(ValueError, match="'cached' is not cached in any of"):
      tasks.from_cache(task, (str(tmp_path),))
    with pytest.raises(ValueError, match="no seqio.CacheDatasetPlaceholder"):
      tasks.from_cache(tasks.get_task("newsroom"), (cache,))
    with pytest.raises(ValueError, match="no split 'validation'; it has train"):
      tasks.count(tasks.from_cache(task, (cache,)), "validation")

  def test_refuses_tokens_of_another_vocabulary(self, task, cache, tmp_path):
    from clp_jax.data import vocabulary as vocabularies

    path = tmp_path / "other.model"
    words = newsroom.make_items("train", 0, 1)[0].document.split()
    path.write_bytes(vocabularies.word_model(sorted(set(words)), ["."]))
    tf, seqio = import_seqio()
    feature = seqio.Feature(
      vocabularies.load_vocabulary(path), add_eos=True, dtype=tf.int32
    )
    other = task.replace(
      output_features={"inputs": feature, "targets": feature}
    )
    with pytest.raises(ValueError, match="was made with another vocabulary"):
      tasks.count(tasks.from_cache(other, (cache,)), "train")

"""XSum and Reddit TL;DR as seqio Tasks, through TensorFlow Datasets.

  task   TFDS dataset   document   reference  splits
  xsum   xsum:1.1.0     document   summary    its own
  tldr   reddit:1.0.0   content    summary    cut from its one split

XSum (Narayan et al. 2018): BBC articles and their first sentences. TFDS has
`reddit`, the Webis-TLDR-17 corpus (Völske et al. 2017), for Reddit TL;DR: posts
and the summaries that their authors marked so. (Its `reddit_tifu` is one
forum's part of it, and the filtered set that the comparisons of Stiennon et al.
2020 belong to is in no TFDS: bring that one as JSONL.) `reddit` has no held-out
split: the first and the second percent of TFDS's fixed random order serve for
validation and testing. Near-duplicate posts may lie on both sides.

Neither is downloaded here, so that a job of many hosts does not do it many
times: `tfds build reddit` prepares it once, `tfds build xsum` likewise after
the manual download that it asks for, in the folder that the config's
data.tfds_data_dir names, TFDS_DATA_DIR, or ~/tensorflow_datasets.
"""

import functools
from typing import Any, NamedTuple

from clp_jax.data.vocabulary import import_seqio, unread_vocabulary

# T5's public vocabulary, read only if no model brings one.
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"


class Corpus(NamedTuple):
  """Where TFDS keeps a task's texts."""

  dataset: str
  document: str
  reference: str
  splits: dict[str, str]


CORPORA = {
  "xsum": Corpus(
    "xsum:1.1.0",
    "document",
    "summary",
    {"train": "train", "validation": "validation", "test": "test"},
  ),
  "tldr": Corpus(
    "reddit:1.0.0",
    "content",
    "summary",
    {"train": "train[2%:]", "validation": "train[:1%]", "test": "train[1%:2%]"},
  ),
}


def register_task(name: str, data_dir: str | None = None) -> Any:
  """The seqio.Task of one of CORPORA, in seqio's registry; nothing is read yet.

  `data_dir` is where TFDS has prepared it; None is TFDS's own folder, or the
  one that it was registered with. It can be cached by seqio_cache_tasks: import
  a module of your own that calls this.
  """
  tf, seqio = import_seqio()
  if name in seqio.TaskRegistry.names():
    if data_dir is None:  # whoever has registered it
      return seqio.TaskRegistry.get(name)
    seqio.TaskRegistry.remove(name)
  corpus = CORPORA[name]

  def texts(example):
    document, reference = example[corpus.document], example[corpus.reference]
    texts = {"document": document, "reference": reference}
    return texts | {"inputs": document, "targets": reference}

  vocabulary = unread_vocabulary(T5_VOCABULARY)
  feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.TfdsDataSource(
      corpus.dataset, data_dir, splits=corpus.splits, read_only=True
    ),
    preprocessors=[
      seqio.map_over_dataset(texts),
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=True),
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={"inputs": feature, "targets": feature},
  )

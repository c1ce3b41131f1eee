"""Documents from JSONL files: what is read, in which order, and bad files."""

import gzip
import itertools
import json
import os

import numpy as np
import pytest
import small_decoder

from clp_jax import batches as batches_lib
from clp_jax import config as config_lib
from clp_jax.data import (
  jsonl,
  newsroom,
  newsroom_text,
  reader,
  tasks,
  tokenizer,
)
from clp_jax.data import vocabulary as vocabularies
from clp_jax.errors import ConfigError

FIELDS = ("document", "summary")
S, T = newsroom.SOURCE_LENGTH, newsroom.TARGET_LENGTH


@pytest.fixture(scope="module")
def vocabulary():
  return vocabularies.Vocabulary("newsroom", newsroom_text.vocabulary_bytes())


def write(path, rows, opener=open):
  with opener(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  return str(path)


def articles(start, stop):
  return [
    {"id": i, "document": item.document, "summary": item.reference}
    for i, item in enumerate(newsroom.make_items("train", start, stop))
  ]


def make_reader(vocabulary, path, template=None, source_length=S):
  return reader.Reader(
    jsonl.read_rows(path, FIELDS, conversations=True),
    vocabulary,
    tokenizer.parse_template(template),
    source_length,
    T,
  )


def batches(rows, count, **kwargs):
  kwargs = {"batch_size": 4, "seed": 3} | kwargs
  made = reader.train_batches(rows, reader.Numbering(**kwargs))
  return list(itertools.islice(made, count))


def config_of(train, evaluation=None):
  config = config_lib.get_config()
  config.data.task = None
  config.data.train, config.data.eval = train, evaluation
  config.data.source_length, config.data.target_length = S, T
  return config


class TestReadRows:
  def test_reads_files_in_the_order_of_their_names(self, tmp_path):
    rows = articles(0, 7)
    write(tmp_path / "b.jsonl", rows[4:6])
    write(tmp_path / "a.jsonl", rows[:4])
    write(tmp_path / "c.jsonl.gz", rows[6:], gzip.open)
    (tmp_path / "readme.txt").write_text("not a row")
    read = jsonl.read_rows(str(tmp_path / "*.jsonl*"), FIELDS)
    expected = [(row["document"], row["summary"]) for row in rows]
    assert [read[i] for i in range(len(read))] == expected
    assert [read[i] for i in (6, 0, 5)] == [expected[i] for i in (6, 0, 5)]

  def test_keeps_every_character_and_skips_blank_lines(self, tmp_path):
    text = 'Zürich\u2028 "quoted" \t 東京 🙂\n and  more '
    lines = [json.dumps({"document": text, "summary": ""}), "  ", ""]
    path = tmp_path / "odd [1].jsonl"  # a name that is no glob
    path.write_bytes("\r\n".join([*lines, lines[0]]).encode())
    rows = jsonl.read_rows(str(path), FIELDS)
    assert [rows[i] for i in range(len(rows))] == [(text, ""), (text, "")]

  def test_fields_have_the_names_that_one_gives(self, tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a b", "tldr": "a", "n": 3}])
    assert jsonl.read_rows(path, ("text", "tldr"))[0] == ("a b", "a")

  def test_a_file_that_changed_is_read_again(self, tmp_path):
    path = write(tmp_path / "x.jsonl", [{"document": "one"}])
    first = jsonl.read_rows(path, ("document",))
    assert jsonl.read_rows(path, ("document",)) is first
    write(path, [{"document": "two"}])
    assert jsonl.read_rows(path, ("document",))[0] == ("two",)

  @pytest.mark.parametrize(
    "line, message",
    [
      ('{"document": "a"', "not valid JSON: "),
      ('{"document": "a", "summary": "b"} x', "not valid JSON: Extra data"),
      ("[" * 100_000, "not valid JSON: "),
      (b'{"document": "\xff", "summary": "b"}', "not valid JSON: 'utf-8'"),
      ('["a", "b"]', "expected an object with 'document', 'summary', got list"),
      ('{"document": "a", "tldr": "b"}', "no field 'summary'; it has 'docu"),
      ('{"document": "a", "summary": null}', "must be a string, got NoneType"),
      ('{"document": 3, "summary": "b"}', "'document' must be a string, got i"),
      ('{"document": " \\n", "summary": "b"}', "field 'document' is blank"),
      ('{"document": "\\ud800", "summary": "b"}', "'document' is not text"),
    ],
  )
  def test_a_line_that_is_no_row_is_named(self, tmp_path, line, message):
    good = json.dumps({"document": "a", "summary": "b"}).encode()
    line = line if isinstance(line, bytes) else line.encode()
    for name, opener in (("bad.jsonl", open), ("bad.jsonl.gz", gzip.open)):
      with opener(tmp_path / name, "wb") as file:
        file.write(b"\n".join([good, b"", line, good]))
      with pytest.raises(ValueError) as error:
        jsonl.read_rows(str(tmp_path / name), FIELDS)
      assert f"{name}, line 3: " in str(error.value)
      assert message in str(error.value)
      assert len(str(error.value)) < 500 + len(str(tmp_path))

  def test_a_document_may_be_a_conversation_where_one_asks(self, tmp_path):
    messages = [
      {"role": "user", "content": "a mill"},
      {"role": "assistant", "content": ""},
    ]
    row = {"document": messages, "summary": "b"}
    path = write(tmp_path / "x.jsonl", [row, {"document": "c", "summary": ""}])
    rows = jsonl.read_rows(path, FIELDS, conversations=True)
    assert [rows[i] for i in range(2)] == [(messages, "b"), ("c", "")]
    with pytest.raises(ValueError, match="line 1: field 'document' must be a"):
      jsonl.read_rows(path, FIELDS)

  @pytest.mark.parametrize(
    "document",
    [
      [],
      {"role": "user", "content": "a"},
      ["a"],
      [{"role": "user"}],
      [{"role": "user", "content": None}],
      None,
    ],
  )
  def test_a_conversation_that_is_none_is_named(self, tmp_path, document):
    path = write(tmp_path / "x.jsonl", [{"document": document, "summary": ""}])
    with pytest.raises(ValueError, match="line 1: field 'doc.*'.*of objects"):
      jsonl.read_rows(path, FIELDS, conversations=True)

  def test_no_rows_and_no_files_are_refused(self, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="empty.jsonl is empty; it needs"):
      jsonl.read_rows(str(tmp_path / "empty.jsonl"), FIELDS)
    for pattern in ("absent.jsonl", "*.json", "nowhere/*.jsonl"):
      with pytest.raises(ValueError, match=r"no file matches .*; give a JSONL"):
        jsonl.read_rows(str(tmp_path / pattern), FIELDS)

  def test_a_damaged_gzip_file_is_refused(self, tmp_path):
    path = tmp_path / "x.jsonl.gz"
    write(path, articles(0, 50), gzip.open)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no gzip", whole[:-3] + b"abc"):
      path.write_bytes(content)
      with pytest.raises(ValueError, match="can't read .*x.jsonl.gz: "):
        jsonl.read_rows(str(path), FIELDS)


class TestBatches:
  def test_are_the_rows_texts_and_tokens(self, vocabulary, tmp_path):
    rows = articles(0, 10)
    path = write(tmp_path / "x.jsonl", rows)
    stream = batches(make_reader(vocabulary, path), 5)
    pairs = {row["document"]: row["summary"] for row in rows}
    for batch in stream:
      for i, document in enumerate(batch.documents):
        assert batch.references[i] == pairs[document]
        for tokens, text, length in (
          (batch.encoder_input_tokens, document, S),
          (batch.decoder_target_tokens, pairs[document], T),
        ):
          assert tokens.shape == (4, length) and tokens.dtype == np.int32
          ids = [*vocabulary.encode(text), vocabulary.eos_id]
          np.testing.assert_array_equal(tokens[i][: len(ids)], ids)
          assert not tokens[i][len(ids) :].any()

  def test_an_epoch_has_each_row_once_in_its_own_order(
    self, vocabulary, tmp_path
  ):
    rows = articles(0, 10)
    path = write(tmp_path / "x.jsonl", rows)
    stream = batches(make_reader(vocabulary, path), 5)
    seen = [document for batch in stream for document in batch.documents]
    documents = [row["document"] for row in rows]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(documents)
    assert seen[:10] != documents and seen[:10] != seen[10:]

  def test_a_batch_depends_on_its_number_alone(self, vocabulary, tmp_path):
    path = write(tmp_path / "x.jsonl", articles(0, 10))
    read = make_reader(vocabulary, path)
    whole = batches(read, 8)
    for start in (3, 5, 7):  # within, at the start of and across an epoch
      (batch,) = batches(read, 1, start=start)
      assert batch.documents == whole[start].documents
      halves = [
        batches(read, 1, start=start, process_index=p, process_count=2)[0]
        for p in range(2)
      ]
      joined = halves[0].documents + halves[1].documents
      assert joined == whole[start].documents

  def test_going_on_reads_only_the_rows_that_are_needed(
    self, vocabulary, tmp_path, monkeypatch
  ):
    path = write(tmp_path / "x.jsonl", articles(0, 2000))
    read = make_reader(vocabulary, path)
    reads, pread = [], os.pread

    def counted(*arguments):
      reads.append(arguments)
      return pread(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    batches(read, 1, start=700)  # 2,800 rows further on
    assert 4 <= len(reads) < 100

  def test_evaluation_has_a_file_of_its_own(self, vocabulary, tmp_path):
    train = write(tmp_path / "train.jsonl", articles(0, 4))
    rows = articles(4, 9)
    held_out = write(tmp_path / "dev.jsonl", rows)
    config = config_of(train, held_out)
    assert batches_lib.count_held_out(config, vocabulary) == 5
    batch = batches_lib.eval_batch(config, vocabulary, 3)
    assert batch.documents == [row["document"] for row in rows[:3]]
    assert batch.references == [row["summary"] for row in rows[:3]]
    with pytest.raises(ValueError, match="num_examples = 6, but .*dev.jsonl h"):
      batches_lib.eval_batch(config, vocabulary, 6)
    alone = config_of(train)
    with pytest.raises(ConfigError, match="data.eval is not set"):
      batches_lib.count_held_out(alone, vocabulary)

  def test_a_bad_evaluation_file_is_found_at_once(self, tmp_path):
    train = write(tmp_path / "train.jsonl", articles(0, 4))
    held_out = write(tmp_path / "dev.jsonl", [{"document": "a"}])
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1: no field 'summ"):
      batches_lib.check_data(config_of(train, held_out))

  @pytest.mark.parametrize(
    ("roles", "message"),
    [
      (("system", "user"), "the chat template of here fails: no system"),
      (("user", "assistant"), "leaves nothing to answer"),
    ],
  )
  def test_a_conversation_that_can_be_no_prompt_is_named(
    self, tmp_path, roles, message
  ):
    template = (
      b"{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
      b"{% endif %}"
    )
    words = small_decoder.make_tokenizer(
      **{"chat_template.jinja": template + small_decoder.CHAT_TEMPLATE.encode()}
    )
    good = [{"role": "user", "content": "a" * 2**20}]
    bad = [{"role": role, "content": "a"} for role in roles]
    lines = [
      json.dumps({"document": d, "summary": ""}) for d in ("a", good, bad)
    ]
    for name, opener in (("x.jsonl", open), ("x.jsonl.gz", gzip.open)):
      path = tmp_path / name
      with opener(path, "wt") as file:
        file.write("\n\n".join(lines[:2]))
      config = config_of(str(path))
      batches_lib.check_data(config, words)
      with opener(path, "at") as file:
        file.write("\n" + lines[2])
      batches_lib.check_data(config)
      with pytest.raises(ConfigError) as error:
        batches_lib.check_data(config, words)
      assert f"{name}, line 4: " in str(error.value)
      assert message in str(error.value) and "\n" not in str(error.value)
    config.data.template = "w {document}"
    with pytest.raises(ConfigError, match="line 3: .*leave data.template None"):
      batches_lib.check_data(config, words)

  def test_a_vocabulary_without_chat_template_refuses_conversations(
    self, vocabulary, tmp_path
  ):
    messages = [{"role": "user", "content": "a mill"}]
    row = {"document": messages, "summary": "a"}
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match="newsroom, has no chat template"):
      batches(make_reader(vocabulary, path), 1)
    with pytest.raises(ConfigError, match="line 1: .*has no chat template"):
      batches_lib.check_data(config_of(path), vocabulary)


class TestTemplate:
  template = "museum {document} {zoo}"

  def test_makes_inputs_and_leaves_documents(self, vocabulary, tmp_path):
    rows = articles(0, 4)
    path = write(tmp_path / "x.jsonl", rows)
    read = make_reader(vocabulary, path, self.template, 64)
    batch = reader.eval_batch(read, 4, path)
    documents = [row["document"] for row in rows]
    assert batch.documents == documents
    tokens = tokenizer.inputs(vocabulary, documents, 64, self.template)
    np.testing.assert_array_equal(batch.encoder_input_tokens, tokens)
    filled = [f"museum {document} {{zoo}}" for document in documents]
    expected = tokenizer.inputs(vocabulary, filled, 64)
    np.testing.assert_array_equal(tokens, expected)
    for batch in batches(read, 2):
      expected = tokenizer.inputs(
        vocabulary, batch.documents, 64, self.template
      )
      np.testing.assert_array_equal(batch.encoder_input_tokens, expected)
      assert set(batch.documents) == set(documents)

  def test_works_with_any_task(self, vocabulary):
    task = tasks.with_template(tasks.get_task("newsroom"), self.template)
    batch = tasks.eval_batch(
      task, "test", num_examples=2, source_length=64, target_length=T
    )
    expected = tokenizer.inputs(vocabulary, batch.documents, 64, self.template)
    np.testing.assert_array_equal(batch.encoder_input_tokens, expected)
    text = vocabulary.decode(batch.encoder_input_tokens[0].tolist())
    assert text.startswith(f"museum {batch.documents[0]}")

  @pytest.mark.parametrize(
    "template",
    [
      "summarize:",
      "{document} {document}",
      "{ document }",
      "",
      [{"role": "user", "content": "summarize:"}],
      [{"role": "user", "content": "{document}"}] * 2,
    ],
  )
  def test_refuses_what_has_no_place_for_a_document(self, template):
    with pytest.raises(ValueError, match="must hold {document} exactly once"):
      tokenizer.parse_template(template)


@pytest.mark.parametrize("template", [None, "museum {document}"])
def test_inputs_that_are_cut_are_counted(vocabulary, tmp_path, template):
  rows = articles(0, 12)
  path = write(tmp_path / "x.jsonl", rows)
  extra = 0 if template is None else 1
  lengths = [
    len(vocabulary.encode(row["document"])) + 1 + extra for row in rows
  ]
  room = sorted(lengths)[6]  # at least one fits exactly
  read = make_reader(vocabulary, path, template, room)
  batch = reader.eval_batch(read, 12, path)
  assert batch.num_cut == sum(length > room for length in lengths) > 0
  ends = batch.encoder_input_tokens[:, -1] == vocabulary.eos_id
  assert ends.sum() == sum(length >= room for length in lengths)
  (batch,) = batches(read, 1, batch_size=12)
  assert batch.num_cut == sum(length > room for length in lengths)

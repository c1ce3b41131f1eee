"""Documents from JSONL files: what is read, in which order, and bad files."""

import gzip
import itertools
import json
import os

import numpy as np
import pytest

from clp_jax.data import jsonl, newsroom, tasks

FIELDS = ("document", "summary")
S, T = newsroom.SOURCE_LENGTH, newsroom.TARGET_LENGTH


@pytest.fixture(scope="module")
def vocabulary():
  return tasks.get_task("newsroom").output_features["inputs"].vocabulary


def write(path, rows, opener=open):
  with opener(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  return str(path)


def articles(start, stop):
  return [
    {"id": i, "document": item.document, "summary": item.reference}
    for i, item in enumerate(newsroom.make_items("train", start, stop))
  ]


def make_task(vocabulary, train, evaluation=None, **fields):
  names = {"document_field": "document", "reference_field": "summary"} | fields
  return jsonl.make_task(
    train=train, evaluation=evaluation, vocabulary=vocabulary, **names
  )


def batches(task, count, split="train", **kwargs):
  kwargs = {
    "batch_size": 4,
    "source_length": S,
    "target_length": T,
    "seed": 3,
  } | kwargs
  stream = tasks.train_batches(task, split, **kwargs)
  return list(itertools.islice(stream, count))


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


class TestTask:
  def test_batches_are_the_rows_texts_and_tokens(self, vocabulary, tmp_path):
    rows = articles(0, 10)
    path = write(tmp_path / "x.jsonl", rows)
    stream = batches(make_task(vocabulary, path), 5)
    pairs = {row["document"]: row["summary"] for row in rows}
    seen = []
    for batch in stream:
      for i, document in enumerate(batch.documents):
        seen.append(document)
        assert batch.references[i] == pairs[document]
        ids = [*vocabulary.encode(document), vocabulary.eos_id]
        row = batch.encoder_input_tokens[i]
        np.testing.assert_array_equal(row[: len(ids)], ids)
        assert not row[len(ids) :].any()
    assert set(seen[:10]) == set(seen[10:]) == set(pairs)
    assert seen[:10] != list(pairs) and seen[:10] != seen[10:]

  def test_a_batch_depends_on_its_number_alone(self, vocabulary, tmp_path):
    task = make_task(vocabulary, write(tmp_path / "x.jsonl", articles(0, 10)))
    whole = batches(task, 8)
    for start in (3, 5, 7):  # across, at the start of and within an epoch
      (batch,) = batches(task, 1, start=start)
      assert batch.documents == whole[start].documents
      halves = [
        batches(task, 1, start=start, process_index=p, process_count=2)[0]
        for p in range(2)
      ]
      joined = halves[0].documents + halves[1].documents
      assert joined == whole[start].documents

  def test_going_on_reads_only_the_rows_that_are_needed(
    self, vocabulary, tmp_path, monkeypatch
  ):
    task = make_task(vocabulary, write(tmp_path / "x.jsonl", articles(0, 2000)))
    reads, pread = [], os.pread

    def counted(*arguments):
      reads.append(arguments)
      return pread(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    batches(task, 1, start=700)  # 2,800 rows further on
    assert 4 <= len(reads) < 100

  def test_evaluates_on_its_other_file(self, vocabulary, tmp_path):
    train = write(tmp_path / "train.jsonl", articles(0, 4))
    rows = articles(4, 9)
    held_out = write(tmp_path / "dev.jsonl", rows)
    task = make_task(vocabulary, train, held_out)
    assert tasks.count(task, "validation") == 5
    batch = tasks.eval_batch(
      task, "validation", num_examples=3, source_length=S, target_length=T
    )
    assert batch.documents == [row["document"] for row in rows[:3]]
    alone = make_task(vocabulary, train)
    with pytest.raises(ValueError, match="no split 'validation'; it has train"):
      tasks.count(alone, "validation")

  def test_a_bad_evaluation_file_is_found_at_once(self, vocabulary, tmp_path):
    train = write(tmp_path / "train.jsonl", articles(0, 4))
    held_out = write(tmp_path / "dev.jsonl", [{"document": "a"}])
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1: no field 'summ"):
      make_task(vocabulary, train, held_out)


class TestTemplate:
  template = "museum {document} {zoo}"

  def test_makes_inputs_and_leaves_documents(self, vocabulary, tmp_path):
    rows = articles(0, 4)
    task = tasks.with_template(
      make_task(vocabulary, write(tmp_path / "x.jsonl", rows)), self.template
    )
    batch = tasks.eval_batch(
      task, "train", num_examples=4, source_length=64, target_length=T
    )
    documents = [row["document"] for row in rows]
    assert batch.documents == documents
    tokens = tasks.tokenize_inputs(vocabulary, documents, 64, self.template)
    np.testing.assert_array_equal(batch.encoder_input_tokens, tokens)
    filled = [f"museum {document} {{zoo}}" for document in documents]
    expected = tasks.tokenize_inputs(vocabulary, filled, 64)
    np.testing.assert_array_equal(tokens, expected)

  def test_works_with_any_task(self, vocabulary):
    task = tasks.with_template(tasks.get_task("newsroom"), self.template)
    batch = tasks.eval_batch(
      task, "test", num_examples=2, source_length=64, target_length=T
    )
    assert vocabulary.decode(batch.encoder_input_tokens[0].tolist()).startswith(
      f"museum {batch.documents[0]}"
    )

  @pytest.mark.parametrize(
    "template", ["summarize:", "{document} {document}", "{ document }", ""]
  )
  def test_refuses_what_has_no_place_for_a_document(self, template):
    with pytest.raises(ValueError, match="must hold {document} exactly once"):
      tasks.with_template(tasks.get_task("newsroom"), template)


@pytest.mark.parametrize("template", [None, "museum {document}"])
def test_inputs_that_are_cut_are_counted(vocabulary, tmp_path, template):
  rows = articles(0, 12)
  task = make_task(vocabulary, write(tmp_path / "x.jsonl", rows))
  extra = 0
  if template is not None:
    task, extra = tasks.with_template(task, template), 1
  lengths = [
    len(vocabulary.encode(row["document"])) + 1 + extra for row in rows
  ]
  room = sorted(lengths)[6]  # at least one fits exactly
  batch = tasks.eval_batch(
    task, "train", num_examples=12, source_length=room, target_length=T
  )
  assert batch.num_cut == sum(length > room for length in lengths) > 0
  ends = batch.encoder_input_tokens[:, -1] == vocabulary.eos_id
  assert ends.sum() == sum(length >= room for length in lengths)

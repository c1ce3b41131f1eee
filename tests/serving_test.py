"""`clp serve`: the decoder, the API, its limits, and a server on a socket."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import hypothesis
import numpy as np
import openai
import pytest
import runs
from servers import LIMITS, make_client, make_decoder, serving, wait_for

import clp_jax
from clp_jax.data import vocabulary
from clp_jax.errors import ConfigError
from clp_jax.evaluation import front as front_lib
from clp_jax.serving import server, text
from clp_jax.serving.decoder import Row

DOCUMENTS = [
  "Brivane opened the museum. It happened in Merrowby.",
  "Captain Farrogan saved the mill. Word spread on Friday.",
  "Wexcombe praised the factory.",
  "Rothmere sold the market. It happened in Ravenford. It cost $5m.",
]
ROOT = pathlib.Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "serving.md").read_text()
OURS = "http://127.0.0.1:8600"


@pytest.fixture(scope="module")
def policy(sft_run):
  """Two sets that differ; far from good."""
  workdir = pathlib.Path(sft_run).parent / "served"
  runs.make_run(workdir, sft_run)
  return clp_jax.Policy.load(str(workdir))


@pytest.fixture(scope="module")
def decoder(policy):
  return make_decoder(policy)


@pytest.fixture(scope="module")
def address(policy, decoder):
  with serving(policy, decoder) as made:
    yield made


@pytest.fixture(scope="module")
def client(address):
  return make_client(address)


def post(address, body, **headers):
  return httpx.post(
    f"{address}/v1/completions", json=body, headers=headers, timeout=60
  )


def request(**fields):
  body = {"model": "tiny", "prompt": DOCUMENTS[0], "weights": {"nli": 1}}
  return body | fields


def text_of(response):
  assert response.status_code == 200, response.text
  return response.json()["choices"][0]["text"]


def make_row(policy, i, *, temperature=1.0, top_p=1.0, max_tokens=18):
  tokens = policy.vocabulary.encode(DOCUMENTS[i % len(DOCUMENTS)])
  w = (i + 1) / 12
  return Row(
    tokens=np.asarray([*tokens, policy.vocabulary.eos_id], np.int32),
    coefficients=policy.coefficients({"nli": w, "rouge": 1 - w}),
    seed=7 + i,
    number=i % 3,
    temperature=temperature,
    top_p=top_p,
    max_tokens=max_tokens,
    alternatives=i % 2 == 1,
  )


class TestDecoder:
  def test_a_row_is_the_same_alone_and_among_others_to_the_bit(
    self, policy, decoder
  ):
    rows = [make_row(policy, i) for i in range(8)]
    together = decoder.begin(rows).advance(18)
    assert len({tuple(t) for t in together.tokens.tolist()}) > 1
    for i, row in enumerate(rows):
      alone = decoder.begin([row]).advance(18)
      n = int(alone.lengths[0])
      assert n == together.lengths[i]
      np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
      np.testing.assert_array_equal(alone.logp[0], together.logp[i])
      if row.alternatives:
        np.testing.assert_array_equal(
          alone.top_logp[0][:n], together.top_logp[i][:n]
        )

  def test_pieces_are_what_decoding_at_once_gives(self, policy, decoder):
    rows = [make_row(policy, i) for i in range(3)]
    at_once = decoder.begin(rows).advance(18)
    batch = decoder.begin(rows)
    lengths = []
    for until in (1, 4, 9, 18):
      pieces = batch.advance(until)
      lengths.append(pieces.lengths.max())
    assert lengths[:2] == [1, 4]
    for a, b in zip(at_once, pieces, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_no_weighting_or_setting_traces_again(self, policy, decoder):
    before = decoder.trace_count
    for i in range(3):
      row = make_row(
        policy, i, temperature=i / 2, top_p=1 - i / 4, max_tokens=i + 1
      )
      sampled = decoder.begin([row] * (i + 1)).advance(18)
      assert sampled.lengths.max() <= i + 1 and sampled.ended.all()
    assert decoder.trace_count == before

  def test_alternatives_are_the_likeliest_tokens(self, policy, decoder):
    row = make_row(policy, 1, temperature=0.0)
    sampled = decoder.begin([row]).advance(18)
    n = int(sampled.lengths[0])
    top_logp = sampled.top_logp[0, :n]
    assert (np.diff(top_logp, axis=-1) <= 0).all() and (top_logp <= 0).all()
    # Greedy decoding takes the first, where it may be taken.
    same = sampled.top_tokens[0, :n, 0] == sampled.tokens[0, :n]
    np.testing.assert_allclose(
      sampled.logp[0, :n][same], top_logp[:, 0][same], atol=1e-5
    )
    assert same.any()

  def test_as_many_rows_as_fit(self, policy, decoder):
    with pytest.raises(ValueError, match="expected 1 to 8 rows, got 9"):
      decoder.begin([make_row(policy, 0)] * 9)


class TestCompletions:
  def test_answers_are_those_of_the_policy(self, policy, address):
    weights = {"nli": 0.25, "rouge": 0.75}
    expected = policy.generate(DOCUMENTS, weights, temperature=0.7, seed=3)
    body = request(prompt=DOCUMENTS, weights=weights, temperature=0.7, seed=3)
    choices = post(address, body).json()["choices"]
    assert [c["text"] for c in choices] == expected
    assert [c["index"] for c in choices] == [0, 1, 2, 3]

  def test_the_openai_client_steers_by_two_weightings(self, client):
    answers = [
      client.completions.create(
        model="tiny",
        prompt=DOCUMENTS[0],
        seed=11,
        n=3,
        extra_body={"weights": weights},
      )
      for weights in ({"nli": 1.0}, {"rouge": 1.0}, {"nli": 1.0})
    ]
    texts = [[choice.text for choice in a.choices] for a in answers]
    assert texts[0] == texts[2] != texts[1]
    assert len(set(texts[0])) > 1  # n samples, each with a key of its own
    usage = answers[0].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert client.models.list().data[0].id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"

  def test_the_openai_client_streams_in_pieces(self, client):
    settings = {
      "model": "tiny",
      "prompt": DOCUMENTS[3],
      "seed": 5,
      "extra_body": {"weights": {"nli": 0.5, "rouge": 0.5}},
    }
    whole = client.completions.create(**settings)
    events = list(
      client.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
      )
    )
    pieces = [event.choices[0] for event in events if event.choices]
    assert len(pieces) > 1
    assert "".join(p.text for p in pieces) == whole.choices[0].text
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage

  def test_the_openai_client_gets_a_proper_error(self, client):
    with pytest.raises(openai.BadRequestError) as caught:
      client.completions.create(
        model="tiny", prompt="x", extra_body={"weights": {"nli": 0.4}}
      )
    assert caught.value.param == "weights"
    assert "sum to 1" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
      client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"

  def test_log_probabilities_belong_to_the_text(self, address):
    body = request(logprobs=3, seed=2, max_tokens=6)
    choice = post(address, body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(
      logprobs["tokens"], logprobs["text_offset"], strict=True
    ):
      assert choice["text"].startswith(token, offset)
    assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"])
    for logp, token, top in zip(
      logprobs["token_logprobs"],
      logprobs["tokens"],
      logprobs["top_logprobs"],
      strict=True,
    ):
      assert logp <= 0 and 1 <= len(top) <= 3
      assert max(top.values()) >= logp - 1e-5
      if token in top:
        assert abs(top[token] - logp) < 1e-4

  def test_greedy_needs_no_seed_and_a_limit_ends_the_answer(
    self, policy, address
  ):
    body = request(temperature=0)
    assert text_of(post(address, body)) == text_of(post(address, body))
    short = post(address, body | {"max_tokens": 1}).json()["choices"][0]
    assert short["finish_reason"] == "length"
    # Long seeds and negative ones are seeds too.
    seeds = (3, -3, 3 + 2**32, 3 + 2**40)
    texts = [text_of(post(address, request(seed=seed))) for seed in seeds]
    assert len(set(texts)) > 1
    assert texts == [
      policy.generate(DOCUMENTS[:1], {"nli": 1}, seed=seed)[0] for seed in seeds
    ]

  def test_waiting_requests_are_decoded_together(self, address):
    bodies = [
      request(
        prompt=DOCUMENTS[i % 4],
        seed=i,
        weights={"nli": i / 23, "rouge": 1 - i / 23},
      )
      for i in range(24)
    ]
    alone = [text_of(post(address, body)) for body in bodies]

    def batches():
      text = httpx.get(f"{address}/metrics").text
      lines = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"
      )
      return float(lines["clp_batch_rows_count"])

    before = batches()
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
      together = pool.map(lambda b: text_of(post(address, b)), bodies)
      assert list(together) == alone
    assert batches() - before < 24

  def test_a_long_document_is_refused_or_cut(self, address):
    long = " ".join(DOCUMENTS * 3)
    refused = post(address, request(prompt=long))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    cut = post(address, request(prompt=long, truncate=True))
    assert cut.json()["usage"]["prompt_tokens"] == 56


def strictly(text):
  """A JSON text's content; NaN and Infinity are no JSON."""

  def refuse(name):
    raise AssertionError(f"{name} in {text[:500]}")

  return json.loads(text, parse_constant=refuse)


def test_alternatives_that_are_no_text_go_by_their_names(tmp_path):
  path = tmp_path / "words.model"
  path.write_bytes(vocabulary.word_model(["mill", "zoo"], ["."]))
  with_sentinel = vocabulary.load_vocabulary(path, extra_ids=1).sp_model
  words = vocabulary.Vocabulary(str(path), with_sentinel)
  detokenizer = text.Detokenizer(words)
  assert [detokenizer.push(token) for token in (3, 5)] == ["mill", "."]
  shown = [detokenizer.would_add(token) for token in (4, 5, 1, 0, 6, 99)]
  assert shown == [" zoo", ".", "</s>", "<pad>", "▁<extra_id_0>", "</s>"]


class TestNumbers:
  @pytest.mark.parametrize("top_p", (1e-37, 1e-40, 1e-45, 1e-300))
  def test_the_smallest_top_p_takes_the_likeliest_token(self, address, top_p):
    settings = {"logprobs": 2, "seed": 1}
    tiny = strictly(post(address, request(top_p=top_p, **settings)).text)
    greedy = strictly(post(address, request(temperature=0, **settings)).text)
    assert tiny["choices"] == greedy["choices"]
    for temperature in (1e-40, 1e-300):
      cold = post(address, request(temperature=temperature, **settings))
      assert strictly(cold.text)["choices"] == greedy["choices"]

  @pytest.mark.parametrize("number", (float("nan"), float("-inf")))
  def test_those_that_are_not_finite_are_an_error(
    self, policy, decoder, number
  ):
    class Broken:
      """A decoder of a model whose numbers end in their third place."""

      rows, max_tokens, eos_ids = 8, decoder.max_tokens, decoder.eos_ids
      length = decoder.length

      def begin(self, rows):
        self.batch = decoder.begin(rows)
        return self

      def advance(self, until):
        sampled = self.batch.advance(until)
        logp = np.where(np.arange(sampled.logp.shape[1]) < 6, sampled.logp, 0)
        logp[:, 6:] = number
        return sampled._replace(logp=logp)

    with serving(policy, Broken()) as address:
      short = post(address, request(max_tokens=4, logprobs=1))
      assert strictly(short.text)["choices"][0]["logprobs"]["tokens"]
      # A response that goes on for so long.
      seed = next(
        seed
        for seed in range(50)
        if post(address, request(seed=seed)).status_code != 200
      )
      whole = post(address, request(seed=seed))
      assert whole.status_code == 500
      assert strictly(whole.text)["error"]["code"] == "not_finite"
      # A stream has begun by then: its last event says so.
      streamed = post(address, request(stream=True, seed=seed))
      assert streamed.headers["x-accel-buffering"] == "no"  # for a proxy
      first, *_, last, nothing = streamed.text.split("\n\n")
      assert strictly(first.removeprefix("data: "))["choices"]
      error = strictly(last.removeprefix("data: "))["error"]
      assert error["code"] == "not_finite" and not nothing

  def test_a_front_of_anothers_making_is_json_too(
    self, policy, decoder, tmp_path
  ):
    workdir = tmp_path / "run"
    shutil.copytree(policy.workdir, workdir)
    (workdir / "evaluation").mkdir(exist_ok=True)
    zero = front_lib.Estimate(0.0, 0.0)
    front = front_lib.front_from_points(
      [
        front_lib.Point(
          weights={"rouge": w, "nli": 1 - w},
          alpha=0.1,
          rewards={"rouge": front_lib.Estimate(w, 0.0), "nli": zero},
          kl=zero,
          value=zero,
        )
        for w in (0.0, 1.0)
      ],
      method="clp",
      objectives=policy.objectives,
      step=4,
      prompts=8,
      decoding={"temperature": float("nan")},
      reference_point=(0.0, 0.0),
    )
    content = front_lib.to_json(front) | {"other": float("-inf")}
    file = workdir / "evaluation" / "front.json"
    file.write_text(json.dumps(content))
    other = dataclasses.replace(policy, workdir=str(workdir))
    with serving(other, decoder) as address:
      response = httpx.get(f"{address}/v1/front")
    assert response.status_code == 200
    sent = strictly(response.text)
    assert sent["points"][1]["rewards"]["rouge"]["mean"] == 1
    assert sent["decoding"]["temperature"] is sent["other"] is None


INVALID = [
  ({"model": None}, "model"),
  ({"prompt": [1, 2]}, "prompt"),
  ({"prompt": []}, "prompt"),
  ({"prompt": "\ud800"}, "prompt"),
  ({"prompt": ["x"] * 9}, "n"),
  ({"n": 9}, "n"),
  ({"n": 0}, "n"),
  ({"max_tokens": 0}, "max_tokens"),
  ({"max_tokens": "5"}, "max_tokens"),
  ({"temperature": -0.1}, "temperature"),
  ({"temperature": float("nan")}, "temperature"),
  ({"top_p": 0}, "top_p"),
  ({"seed": 2**63}, "seed"),
  ({"logprobs": 6}, "logprobs"),
  ({"weights": None}, "weights"),
  ({"weights": {"nli": float("inf")}}, "weights"),
  ({"weights": {"nli": 1e300, "rouge": -1e300}}, "weights"),
  ({"weights": {"nli": True}}, "weights"),
  ({"weights": {"x" * 5000: 1}}, "weights"),
  ({"weights": {"alpha": 1}}, "weights"),
  ({"alpha": 0.7}, "alpha"),
  ({"stop": ["."] * 5}, "stop"),
  ({"stop": 1}, "stop"),
  ({"nonsense": 1}, "nonsense"),
  ({"stream_options": {"include_usage": True}}, "stream_options"),
]


class TestErrors:
  @pytest.mark.parametrize("fields, param", INVALID)
  def test_what_is_wrong_is_named(self, address, fields, param):
    content = json.dumps(request(**fields))
    response = httpx.post(
      f"{address}/v1/completions",
      content=content,
      headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600

  def test_what_changes_nothing_is_accepted(self, address):
    neutral = {"stop": None, "best_of": 1, "echo": False, "user": "someone"}
    assert post(address, request(**neutral)).status_code == 200

  @pytest.mark.parametrize(
    "method, path, status",
    [
      ("GET", "/v1/completions", 405),
      ("GET", "/nothing", 404),
      ("GET", "/..%2f..%2fetc/passwd", 404),
      ("GET", "/page.js/../../api.py", 404),
      ("GET", "/v1/models/other", 404),
      ("GET", "/v1/front", 404),
      ("DELETE", "/v1/models", 405),
    ],
  )
  def test_no_path_leads_elsewhere(self, address, method, path, status):
    response = httpx.request(method, address + path)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert "/home" not in message and "tmp" not in message

  def test_the_head_of_what_can_be_got_is_sent_alone(self, address):
    for path, status in (("/", 200), ("/health", 200), ("/nothing", 404)):
      head, got = httpx.head(address + path), httpx.get(address + path)
      assert head.status_code == status and not head.content
      assert head.headers["content-length"] == got.headers["content-length"]
    assert httpx.head(f"{address}/v1/completions").status_code == 405

  def test_pages_of_others_are_kept_out(self, address):
    body = request()
    other = post(address, body, Origin="http://evil.example")
    assert other.status_code == 403
    assert post(address, body, Origin=address).status_code == 200
    # A name of theirs that points to this machine.
    assert post(address, body, Host="evil.example:80").status_code == 421
    form = httpx.post(
      f"{address}/v1/completions",
      content=json.dumps(body),
      headers={"Content-Type": "text/plain"},
    )
    assert form.status_code == 415
    assert "access-control-allow-origin" not in form.headers

  def test_a_large_body_is_refused(self, address):
    response = post(address, request(prompt="x" * (1 << 16)))
    assert response.status_code == 413

  def test_a_key_is_asked_for(self, policy, decoder):
    with serving(policy, decoder, key="secret", loopback=False) as address:
      assert post(address, request()).status_code == 401
      wrong = post(address, request(), Authorization="Bearer wrong")
      assert wrong.json()["error"]["code"] == "invalid_api_key"
      right = post(address, request(), Authorization="Bearer secret")
      assert right.status_code == 200
      assert httpx.get(f"{address}/metrics").status_code == 401
      for path in ("/", "/page.js", "/style.css", "/health"):
        assert httpx.get(address + path).status_code == 200

  def test_other_machines_need_a_key(self, monkeypatch):
    monkeypatch.delenv("CLP_API_KEY", raising=False)
    for host in ("127.0.0.1", "localhost", "::1"):
      assert server.api_key(host) is None
    for host in ("0.0.0.0", "::", "example.org", "192.168.1.2"):
      with pytest.raises(ConfigError, match="CLP_API_KEY"):
        server.api_key(host)
    monkeypatch.setenv("CLP_API_KEY", "secret")
    assert server.api_key("0.0.0.0") == "secret"

  def test_a_full_queue_and_a_deadline_say_when_to_try_again(
    self, policy, decoder
  ):
    class Slow:
      """A decoder that waits before it begins."""

      rows, max_tokens, eos_ids = 8, decoder.max_tokens, decoder.eos_ids
      length = decoder.length
      begun, go = threading.Event(), threading.Event()

      def begin(self, rows):
        self.begun.set()
        self.go.wait(20)
        return decoder.begin(rows)

    slow = Slow()
    limits = dataclasses.replace(LIMITS, waiting=8, seconds=1.0)
    with serving(policy, slow, limits) as address:
      with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, address, request())
        assert slow.begun.wait(20)  # or both would be of one batch
        second = pool.submit(post, address, request(stream=True))
        wait_for(lambda: httpx.get(f"{address}/health").json()["waiting"])
        third = post(address, request(n=8))
        assert third.status_code == 429
        assert int(third.headers["Retry-After"]) >= 1
        for late in (first.result(), second.result()):
          assert late.status_code == 503
          assert int(late.headers["Retry-After"]) >= 1
          assert late.json()["error"]["code"] == "deadline_exceeded"
        # Those who gave up no longer wait.
        assert httpx.get(f"{address}/health").json()["waiting"] == 0
        slow.go.set()
        assert post(address, request()).status_code == 200

  def test_what_could_never_wait_is_refused_for_good(self, policy, decoder):
    limits = dataclasses.replace(LIMITS, waiting=2)
    with serving(policy, decoder, limits) as address:
      assert post(address, request(n=2)).status_code == 200
      response = post(address, request(n=3))
    assert response.status_code == 400
    assert "more than the 2 of one request" in response.text


class TestPage:
  def test_it_comes_with_rules_for_the_browser(self, address):
    page = httpx.get(f"{address}/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "'unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/style.css", "/page.js"):
      assert path[1:] in page.text
      assert httpx.get(address + path).status_code == 200

  def test_nothing_comes_from_elsewhere(self):
    folder = pathlib.Path(server.__file__).parent / "page"
    for file in folder.iterdir():
      text = file.read_text().replace("http://www.w3.org/2000/svg", "")
      assert "http://" not in text and "https://" not in text
      assert "innerHTML" not in text

  def test_it_has_documents_to_start_from(self, address):
    found = httpx.get(f"{address}/v1/documents").json()
    assert found["data"] and all(d["document"] for d in found["data"])
    assert isinstance(found["note"], str)


def raw_requests():
  """Bytes that are no good requests, or only the beginning of one."""
  body = json.dumps(request()).encode()
  head = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
  )
  good = head % len(body) + body
  rng = np.random.default_rng(0)
  # Half-sent: cut anywhere, in the line, the headers or the body.
  yield from (good[:n] for n in rng.integers(0, len(good), 24))
  # A byte changed, anywhere.
  for at, byte in zip(
    rng.integers(0, len(good), 24), rng.integers(0, 256, 24), strict=True
  ):
    yield good[:at] + bytes([byte]) + good[at + 1 :]
  # Not HTTP at all.
  yield from (rng.bytes(n) for n in (1, 10, 1000, 100_000))
  yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # TLS
  yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
  yield b"\r\n" * 40_000
  # Headers.
  get = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
  yield get + b"X: " + b"a" * 200_000
  yield get + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000))
  yield b"GET /" + b"a" * 200_000
  yield b"GET /health HTTP/1.1\r\n\r\n"
  yield b"GET /health HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n"
  yield get + b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n"
  yield get + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
  # Bodies whose length is a lie.
  yield head % (1 << 40) + body
  yield head % (len(body) - 5) + body
  yield (head % 0).replace(b"Content-Length: 0", b"Content-Length: -1") + body
  chunked = head.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
  yield chunked + b"ffffffffffffffff\r\n" + body
  yield chunked + b"zz\r\n" + body
  yield chunked + b'5\r\n{"a":'
  # JSON that is none, or too much.
  for content in (
    b"",
    b"{",
    b"null",
    b"[]",
    b"[" * 30_000,
    b'{"a":' * 10_000,
    b"1" * 60_000,
    b'{"seed": 1' + b"0" * 5000 + b"}",
    b'"\xff\xfe"',
    b"\x00" * 100,
    b'{"model": "tiny", "prompt": "\\ud800", "weights": {"nli": 1}}',
    b'{"model": "tiny", "prompt": "\\u0000", "weights": {"nli": NaN}}',
    b'{"model": "tiny", "model": 1, "prompt": {"a": [[]]}}',
  ):
    yield head % len(content) + content


def send_raw(address, data):
  """What comes back until the server hangs up; fails if it does not."""
  host, _, port = address.removeprefix("http://").rpartition(":")
  received = b""
  with socket.create_connection((host, int(port)), timeout=20) as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(data)
      while part := connection.recv(1 << 16):
        received += part
  return received


class TestHostileInput:
  def test_no_bytes_make_it_fail_hang_or_leak(self, address):
    expected = text_of(post(address, request(seed=1)))
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      answers = list(
        pool.map(lambda data: send_raw(address, data), raw_requests())
      )
    assert len(answers) > 80
    for answer in answers:
      for line in answer.split(b"\r\n"):
        assert not line.startswith(b"HTTP/1.1 5"), answer
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)
    assert threading.active_count() <= threads + 2
    assert httpx.get(f"{address}/health").json() == {
      "status": "ok",
      "waiting": 0,
    }
    assert text_of(post(address, request(seed=1))) == expected

  @pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
  def test_its_own_description_makes_no_request_that_fails(self, address, mode):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    count = 0
    for operation in schema.get_all_operations():
      operation = operation.ok()
      strategy = operation.as_strategy(schemathesis.GenerationMode[mode])
      is_post = operation.method.upper() == "POST"
      if mode == "NEGATIVE" and not is_post:
        continue  # there is nothing in them to get wrong

      @hypothesis.settings(
        max_examples=60 if is_post else 5,
        suppress_health_check=list(hypothesis.HealthCheck),
      )
      @hypothesis.given(case=strategy)
      def ask(case):
        nonlocal count
        count += 1
        response = case.call(timeout=30)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
          assert set(response.json()["error"]) == {
            *("message", "type", "param", "code")
          }

      ask()
    assert count >= 60


class TestDocumentation:
  def test_its_snippet_runs(self, address, capsys):
    snippet, *_ = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    assert OURS in snippet
    exec(snippet.replace(OURS, address), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["0.0", "1.0"]
    assert lines[2]

  def test_it_lists_every_route_and_every_field(self, address):
    described = httpx.get(f"{address}/openapi.json").json()
    listed = re.findall(r"`(?:GET|POST) (\S+)`", DOCS)
    routes = [p.replace("{model_id}", "NAME") for p in described["paths"]]
    assert sorted(listed) == sorted([*routes, "/openapi.json"])
    schemas = described["components"]["schemas"]
    takes = DOCS.partition("`POST /v1/completions` takes")[2]
    names = set(re.findall(r"`([a-z_]+)`", takes.partition("\n\nFields")[0]))
    assert names == set(schemas["CompletionRequest"]["properties"])
    takes = DOCS.partition("`POST /v1/chat/completions` takes")[2]
    others = re.findall(r"`([a-z_]+)`", takes.partition("\n\n")[0])
    both = names - {"prompt"} | set(others)
    assert both == set(schemas["ChatRequest"]["properties"])

  @pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
  def test_its_request_is_answered(self, address):
    (command,) = re.findall(r"^    (curl .*?)\n\n", DOCS, re.M | re.S)
    command = command.replace(OURS, address).replace('"demo"', '"tiny"')
    out = subprocess.run(
      ["bash", "-c", command], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(out)["object"] == "text_completion"

  @pytest.mark.slow
  def test_its_commands_serve(self, policy, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(policy.workdir)
    commands = re.findall(r"^    (.*clp serve .*)$", DOCS, re.M)
    assert len(commands) == 2
    for command in commands:
      script = f'clp() {{ exec {sys.executable} -m clp_jax "$@"; }}; {command}'
      process = subprocess.Popen(
        ["bash", "-c", f"{script} --port 0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        text=True,
      )
      try:
        line = process.stdout.readline()
        port = line.rstrip("/\n").rpartition(":")[2]
        health = httpx.get(f"http://127.0.0.1:{port}/health")
        assert health.json()["status"] == "ok"
      finally:
        process.terminate()
      assert process.wait(30) == 0


@pytest.mark.slow
def test_its_benchmark_finds_nothing_wrong(policy):
  (command,) = re.findall(r"^    python (-m benchmarks.*)$", DOCS, re.M)
  arguments = command.replace("runs/demo", str(policy.workdir)).split()
  done = subprocess.run(
    [sys.executable, *arguments, "--seconds", "3", "--clients", "8", "--json"],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["requests"] > 8 and found["answers that differ"] == 0


@pytest.mark.slow
def test_it_listens_when_it_says_so_and_hears_a_signal_at_once(policy):
  for ask in (True, False):
    process = runs.start(
      ["serve", "--workdir", policy.workdir, "--port", 0, "--rows", 8]
    )
    try:
      address = process.stdout.readline().split()[-1]
      if ask:
        assert httpx.get(f"{address}health", timeout=60).status_code == 200
      process.terminate()
      assert process.wait(60) == 0
    finally:
      process.kill()
      process.communicate()


@pytest.mark.slow
def test_killed_under_load_it_restarts_clean(policy):
  """The command itself, with its own process."""

  def start(port):
    process = runs.start(
      ["serve", "--workdir", policy.workdir, "--port", port, "--rows", 8]
    )
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, process.stderr.read()
    return process, line.split()[-1].rstrip("/")

  body = {
    "model": "served",
    "prompt": DOCUMENTS[0],
    "weights": {"nli": 0.3, "rouge": 0.7},
    "seed": 4,
  }
  process, address = start(0)
  try:
    expected = text_of(post(address, body))
    stop = threading.Event()

    def load():
      while not stop.is_set():
        with contextlib.suppress(httpx.HTTPError):
          post(address, body)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
      thread.start()
    time.sleep(1)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    process, again = start(address.rpartition(":")[2])
    assert again == address
    time.sleep(1)
    stop.set()
    for thread in threads:
      thread.join(60)
    assert text_of(post(address, body)) == expected
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
  finally:
    process.kill()
    process.communicate()

"""`clp serve` with a chat template, and strings that end answers."""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import threading

import httpx
import hypothesis
import hypothesis.strategies as st
import openai
import pytest
import runs
import small_decoder
from servers import LIMITS, make_client, make_decoder, serving

import clp_jax
from clp_jax.serving.batcher import STREAMED
from clp_jax.serving.decoder import Row
from clp_jax.serving.text import final_length

ROOT = pathlib.Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "serving.md").read_text()
QUESTION = "Who opened the museum?"
TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Brivane opened the museum on Friday."},
  {"role": "assistant", "content": "It cost $5m."},
  {"role": "user", "content": QUESTION},
]
WEIGHTS = {"nli": 0.25, "rouge": 0.75}
TEMPLATE = small_decoder.CHAT_TEMPLATE.replace(
  "{%- for",
  "{%- if messages[0].role == 'tool' -%}"
  "{{ raise_exception('Tools are not known') }}{%- endif -%}{%- for",
  1,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  """Two sets that differ, of a model with a chat template; far from good."""
  folder = tmp_path_factory.mktemp("chat")
  small_decoder.save(folder / "model")
  (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
  fields = {
    "data.template": '[{"role": "user", "content": "{document}"}]',
    "data.source_length": 96,
    "data.target_length": 24,
  }
  runs.make_run(folder / "run", str(folder / "model"), **fields)
  return clp_jax.Policy.load(str(folder / "run"))


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


def ask(client, content=QUESTION, weights=WEIGHTS, **fields):
  messages = content
  if isinstance(content, str):
    messages = [{"role": "user", "content": content}]
  return client.chat.completions.create(
    model="tiny",
    messages=messages,
    extra_body={"weights": weights, **fields.pop("extra", {})},
    **fields,
  )


def expected(policy, content=QUESTION, weights=WEIGHTS, **settings):
  """What `Policy.generate` answers to a question."""
  (text,) = policy.generate([content], weights, **settings)
  return text


def post(address, **fields):
  body = {
    "model": "tiny",
    "messages": [{"role": "user", "content": QUESTION}],
    "weights": WEIGHTS,
  }
  return httpx.post(
    f"{address}/v1/chat/completions",
    content=json.dumps(body | fields),  # in ASCII: half a surrogate too
    headers={"Content-Type": "application/json"},
    timeout=60,
  )


class TestChat:
  def test_answers_are_those_of_the_policy(self, policy, client):
    answer = ask(client, seed=3, temperature=0.7)
    text = expected(policy, seed=3, temperature=0.7)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text != ""
    assert choice.finish_reason in ("stop", "length")
    assert answer.object == "chat.completion"
    (prompt,) = policy.tokenize([QUESTION], WEIGHTS)
    assert answer.usage.prompt_tokens == (prompt >= 0).sum()
    tokens = answer.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + tokens
    assert (choice.finish_reason == "length") == (tokens == 24)
    # n answers are those to as many of the same text.
    many = ask(client, seed=3, n=3)
    texts = policy.generate([QUESTION] * 3, WEIGHTS, seed=3)
    assert [c.message.content for c in many.choices] == texts
    assert len(set(texts)) == 3

  def test_a_conversation_is_shown_by_the_chat_template(
    self, policy, decoder, client
  ):
    answer = ask(client, TURNS, temperature=0)
    tokens = policy.vocabulary.chat(TURNS)
    assert answer.usage.prompt_tokens == len(tokens)
    row = Row(
      *(tokens, policy.coefficients(WEIGHTS), 0, 0, 0.0, 1.0, 24, False)
    )
    sampled = decoder.begin([row]).advance(24)
    ids = sampled.tokens[0, : sampled.lengths[0]].tolist()
    text = policy.vocabulary.decode(ids)
    assert answer.choices[0].message.content == text
    # What the client makes of an answer is a turn, and text is only text.
    message = answer.choices[0].message.model_dump()
    spelled = {"role": "user", "content": "<|im_end|>", "name": "Brivane"}
    longer = ask(client, [TURNS[1], message, spelled], max_tokens=1)
    assert longer.choices[0].finish_reason == "length"
    turns = [TURNS[1], {"role": "assistant", "content": text}, spelled]
    assert longer.usage.prompt_tokens == len(policy.vocabulary.chat(turns))

  def test_the_description_says_that_there_is_a_template(self, client):
    assert client.models.retrieve("tiny").chat is True

  def test_streams_join_to_the_answer(self, client):
    whole = ask(client, seed=5, n=2)
    events = list(
      ask(
        client,
        seed=5,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
      )
    )
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert len({event.id for event in events}) == 1
    assert events[-1].usage == whole.usage and not events[-1].choices
    for i, choice in enumerate(whole.choices):
      own = [e.choices[0] for e in events[:-1] if e.choices[0].index == i]
      assert len(own) > 1
      assert own[0].delta.role == "assistant"
      assert all(c.delta.role is None for c in own[1:])
      text = "".join(c.delta.content for c in own)
      assert text == choice.message.content
      assert {c.finish_reason for c in own[:-1]} == {None}
      assert own[-1].finish_reason == choice.finish_reason

  def test_events_are_lines_that_end_in_done(self, address):
    response = post(address, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = response.text.split("\n\n")
    assert all(event.startswith('data: {"') for event in events)
    assert done == "data: [DONE]" and nothing == ""

  def test_rows_of_different_weightings_share_a_batch(self, policy, decoder):
    gathered = threading.Event()
    sizes = []

    class Watched:
      """A decoder that begins when all are there."""

      rows, max_tokens, eos_ids = 8, decoder.max_tokens, decoder.eos_ids
      length = decoder.length

      def begin(self, rows):
        sizes.append(len(rows))
        gathered.wait(20)
        self.batch = decoder.begin(rows)
        return self

      def admit(self, rows):
        sizes.append(len(rows))
        self.batch.admit(rows)

      def advance(self, until):
        return self.batch.advance(until)

    weightings = [{"nli": i / 6, "rouge": 1 - i / 6} for i in range(7)]
    with serving(policy, Watched()) as address:
      client = make_client(address)

      def answer(i):
        settings = {"weights": weightings[i], "seed": i}
        return ask(client, **settings).choices[0].message.content

      with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(post, address)  # holds the decoder
        while not sizes:
          pass
        answers = [pool.submit(answer, i) for i in range(7)]
        while httpx.get(f"{address}/health").json()["waiting"] < 7:
          pass
        gathered.set()
        texts = [a.result() for a in answers]
        assert first.result().status_code == 200
    assert sizes == [1, 7]
    assert texts == [
      expected(policy, weights=w, seed=i) for i, w in enumerate(weightings)
    ]
    assert len(set(texts)) == 7

  def test_log_probabilities_are_those_of_completions(self, client):
    settings = {"seed": 2, "max_tokens": 9}
    chat = ask(client, logprobs=True, top_logprobs=3, **settings).choices[0]
    text = client.completions.create(
      model="tiny",
      prompt=QUESTION,
      logprobs=3,
      extra_body={"weights": WEIGHTS},
      **settings,
    ).choices[0]
    assert chat.message.content == text.text
    content = chat.logprobs.content
    assert [c.token for c in content] == text.logprobs.tokens
    assert [c.logprob for c in content] == text.logprobs.token_logprobs
    assert [
      {t.token: t.logprob for t in c.top_logprobs} for c in content
    ] == text.logprobs.top_logprobs
    assert b"".join(bytes(c.bytes) for c in content) == text.text.encode()
    plain = ask(client, logprobs=True, **settings).choices[0].logprobs
    assert [c.logprob for c in plain.content] == [c.logprob for c in content]
    assert all(c.top_logprobs == [] for c in plain.content)
    streamed = ask(
      client, logprobs=True, top_logprobs=3, stream=True, **settings
    )
    joined = [c for e in streamed for c in e.choices[0].logprobs.content]
    assert joined == content

  def test_a_limit_of_tokens_goes_by_both_names(self, client):
    for name in ("max_tokens", "max_completion_tokens"):
      answer = ask(client, temperature=0, **{name: 2})
      assert answer.usage.completion_tokens == 2
      assert answer.choices[0].finish_reason == "length"

  def test_a_long_conversation_is_refused_or_cut(self, client):
    turns = [*TURNS[:1], {"role": "user", "content": "The mill. " * 200}]
    with pytest.raises(openai.BadRequestError) as caught:
      ask(client, turns)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    cut = ask(client, turns, extra={"truncate": True})
    assert 90 <= cut.usage.prompt_tokens <= 96
    # Of characters beyond all that could be read, likewise.
    turns[1]["content"] *= 5
    with pytest.raises(openai.BadRequestError) as caught:
      ask(client, turns)
    assert caught.value.code == "context_length_exceeded"
    cut = ask(client, turns, extra={"truncate": True})
    assert 90 <= cut.usage.prompt_tokens <= 96
    with pytest.raises(openai.BadRequestError, match="send fewer messages"):
      ask(client, turns[:1] * 60, extra={"truncate": True})


INVALID = [
  ({"messages": None}, "messages", "a valid list; send 1 to"),
  ({"messages": "Hello"}, "messages", "send 1 to 256 objects"),
  ({"messages": []}, "messages", "send 1 to 256 objects"),
  (
    {"messages": [{"role": "user"}]},
    "messages",
    r"\[0\]\[content\]: Field req",
  ),
  ({"messages": ["Hello"]}, "messages", r"\[0\]: "),
  ({"messages": [{"role": "user", "content": None}]}, "messages", "strings"),
  (
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    *("messages", r"\[0\]\[content\]: .*; send 1 to 256 objects"),
  ),
  (
    {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
    *("messages", r"\[0\]\[tool_calls\]: "),
  ),
  (
    {"messages": [{"role": "user", "content": "\ud800"}]},
    *("messages", "surrogate"),
  ),
  (
    {"messages": [{"role": "tool", "content": "a"}]},
    *("messages", "chat template of this model fails: Tools are not known; "),
  ),
  ({"weights": {"nli": 0.4}}, "weights", "sum to 1"),
  ({"weights": None}, "weights", "weights"),
  ({"alpha": 0.7}, "alpha", "alpha"),
  ({"n": 9}, "n", "8 of one request"),
  ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
  ({"max_completion_tokens": 0}, "max_completion_tokens", "greater"),
  ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "less"),
  ({"top_logprobs": 2}, "top_logprobs", "set logprobs"),
  ({"logprobs": 2}, "logprobs", "boolean"),
  ({"tools": [{"type": "function"}]}, "tools", "Unsupported"),
  ({"response_format": {"type": "json_object"}}, "response_format", "Unsup"),
  ({"stop": ["a"] * 5}, "stop", "up to 4"),
  ({"prompt": "a"}, "prompt", "Unsupported"),
  ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
]


class TestErrors:
  @pytest.mark.parametrize("fields, param, message", INVALID)
  def test_what_is_wrong_is_named(
    self, policy, address, fields, param, message
  ):
    response = post(address, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]
    assert str(policy.workdir) not in error["message"]

  def test_what_changes_nothing_is_accepted(self, address):
    response = post(
      address,
      **{"stop": None, "tools": [], "tool_choice": "auto", "logit_bias": {}},
      **{"response_format": {"type": "text"}, "presence_penalty": 0},
    )
    assert response.status_code == 200, response.text

  def test_another_model_is_unknown(self, client):
    with pytest.raises(openai.NotFoundError) as caught:
      client.chat.completions.create(model="gpt-9", messages=TURNS)
    assert caught.value.code == "model_not_found"

  def test_a_model_without_a_template_says_so(self, policy, decoder):
    files = {"chat_template.jinja": None}
    plain = dataclasses.replace(
      policy, vocabulary=small_decoder.make_tokenizer(**files)
    )
    with serving(plain, decoder) as address:
      client = make_client(address)
      assert client.models.retrieve("tiny").chat is False
      with pytest.raises(openai.BadRequestError) as caught:
        ask(client)
    assert caught.value.code == "no_chat_template"
    assert "POST /v1/completions" in caught.value.message

  def test_a_slow_template_keeps_nobody_waiting(self, policy, decoder):
    started, go = threading.Event(), threading.Event()

    class Slow:
      """A tokenizer whose template does not come to an end."""

      def __getattr__(self, name):
        return getattr(policy.vocabulary, name)

      def prompt(self, document, *rest):
        if not isinstance(document, str):
          started.set()
          go.wait(20)
        return policy.vocabulary.prompt(document, *rest)

    slow = dataclasses.replace(policy, vocabulary=Slow())
    limits = dataclasses.replace(LIMITS, seconds=2.0)
    with (
      serving(slow, decoder, limits) as address,
      concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
      late = pool.submit(post, address)
      assert started.wait(20)
      assert httpx.get(f"{address}/health").status_code == 200
      assert late.result().json()["error"]["code"] == "deadline_exceeded"
      go.set()


def cut_at(text, stops):
  """A text up to the first of some strings, and whether it has one."""
  found = [text.find(stop) for stop in stops if stop in text]
  return text[: min(found, default=len(text))], bool(found)


def completed(client, **fields):
  return client.completions.create(
    model="tiny", prompt=QUESTION, extra_body={"weights": WEIGHTS}, **fields
  )


class TestStops:
  @hypothesis.given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=12),
  )
  def test_a_text_in_pieces_ends_where_the_whole_does(self, text, stops, sizes):
    kept, ended, seen = "", False, 0
    for size in (*sizes, len(text)):
      seen = min(seen + size, len(text))
      length, ended = final_length(text[:seen], stops, last=seen == len(text))
      # What has been sent is never taken back.
      assert text[:length].startswith(kept)
      kept = text[:length]
      if ended or seen == len(text):
        break
    assert (kept, ended) == cut_at(text, stops)

  def test_what_can_not_become_a_stop_is_final_at_once(self):
    assert final_length("the mil", ["mill"], last=False) == (4, False)
    assert final_length("the mile", ["mill"], last=False) == (8, False)
    assert final_length("the mill", ["mill"], last=False) == (4, True)
    assert final_length("the mill", (), last=False) == (8, False)
    # One that begins earlier may still come.
    stops = ["mill", "the mills"]
    assert final_length("the mill", stops, last=False) == (0, False)
    assert final_length("the mill", stops, last=True) == (4, True)
    assert final_length("the mill.", stops, last=False) == (4, True)

  @pytest.mark.parametrize(
    "size", [pytest.param(n, marks=pytest.mark.slow) for n in (1, 6)] + [3]
  )
  def test_answers_end_before_the_first(self, client, size):
    for seed in range(6):
      text = ask(client, seed=seed).choices[0].message.content
      # Any characters of it: they are parts of one token, or of several.
      stop = text[len(text) // 2 :][:size]
      kept, found = cut_at(text, [stop])
      assert found
      for stops in (stop, ["zzzzz", stop, text[-size:] + "zz"]):
        chat = ask(client, seed=seed, stop=stops, logprobs=True)
        (choice,) = chat.choices
        assert choice.message.content == kept
        assert choice.finish_reason == "stop"
        tokens = choice.logprobs.content
        assert len(tokens) == chat.usage.completion_tokens
        assert "".join(t.token for t in tokens).startswith(kept)
        answer = completed(client, seed=seed, stop=stops, logprobs=0)
        assert answer.choices[0].text == kept
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage == chat.usage
        events = list(
          ask(
            client,
            seed=seed,
            stop=stops,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
          )
        )
        pieces = [event.choices[0] for event in events[:-1]]
        assert "".join(p.delta.content for p in pieces) == kept
        assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop"]
        joined = [t for p in pieces for t in p.logprobs.content]
        assert joined == tokens
        assert events[-1].usage == chat.usage
        streamed = completed(client, seed=seed, stop=stops, stream=True)
        assert "".join(e.choices[0].text for e in streamed) == kept

  def test_strings_that_do_not_come_change_nothing(self, client):
    plain = ask(client, seed=1, n=4, logprobs=True)
    for stop in ("zzzzz", "", [], ["", "zzzzz"]):
      answer = ask(client, seed=1, n=4, logprobs=True, stop=stop)
      assert answer.choices == plain.choices
      assert answer.usage == plain.usage

  def test_each_row_ends_for_itself(self, client):
    texts = [c.message.content for c in ask(client, seed=1, n=6).choices]
    stop = texts[2][3:5]
    answer = ask(client, seed=1, n=6, stop=stop)
    got = [c.message.content for c in answer.choices]
    assert got == [cut_at(text, [stop])[0] for text in texts] != texts

  def test_a_row_that_has_ended_is_decoded_no_further(self, policy, decoder):
    stopped, go = [], threading.Event()

    class Watched:
      """A decoder that goes on when the client has heard of the end."""

      rows, max_tokens, eos_ids = 8, decoder.max_tokens, decoder.eos_ids
      length = decoder.length

      def begin(self, rows):
        self.batch = decoder.begin(rows)
        return self

      def advance(self, until):
        assert until == STREAMED or go.wait(20)
        return self.batch.advance(until)

      def stop(self, i):
        stopped.append(i)
        self.batch.stop(i)

    def samples(seed):
      return policy.generate([QUESTION] * 2, WEIGHTS, seed=seed)

    # One ends at once, the other goes on for longer than two pieces.
    seed = next(
      seed
      for seed in range(50)
      if samples(seed)[1][0] not in samples(seed)[0]
      and len(policy.vocabulary.encode(samples(seed)[0])) > 3 * STREAMED
    )
    other, stopping = samples(seed)
    with serving(policy, Watched()) as address:
      texts = ["", ""]
      for event in ask(
        make_client(address), seed=seed, n=2, stop=stopping[0], stream=True
      ):
        (choice,) = event.choices
        texts[choice.index] += choice.delta.content
        if choice.finish_reason is not None:
          go.set()
    assert texts == [other, ""]
    assert stopped == [1]

  def test_a_stopped_row_ends_and_leaves_the_others_alone(
    self, policy, decoder
  ):
    tokens = policy.vocabulary.chat(TURNS)
    coefficients = policy.coefficients(WEIGHTS)
    rows = [
      Row(tokens, coefficients, seed, 0, 1.0, 1.0, 24, False)
      for seed in range(4)
    ]
    alone = decoder.begin(rows).advance(24)
    batch = decoder.begin(rows)
    batch.advance(4)
    before = decoder.trace_count
    batch.stop(1)
    sampled = batch.advance(24)
    assert decoder.trace_count == before
    assert sampled.ended.all() and sampled.lengths[1] <= 5
    for i in (0, 2, 3):
      assert sampled.tokens[i].tolist() == alone.tokens[i].tolist()


def test_the_snippet_of_the_page_runs(address, capsys):
  section = DOCS.split("### Conversations")[1].split("\n## ")[0]
  (snippet,) = re.findall(r"```python\n(.*?)```", section, re.S)
  ours = "http://127.0.0.1:8600"
  assert ours in snippet
  exec(snippet.replace(ours, address), {})
  assert len(capsys.readouterr().out.splitlines()) >= 2

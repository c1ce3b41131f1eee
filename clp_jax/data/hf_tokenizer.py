"""tokenizer.json, by Hugging Face's `tokenizers`, with its chat template.

Text makes no control token: what a document spells like one is encoded as the
characters that it is, in a chat template too. Added tokens that the file does
not call special, such as <think>, are text.

Chat templates are programs that a checkpoint brings: they run in Jinja's
sandbox, with the names that transformers gives them.
"""

import collections
import datetime
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import tokenizers
from etils import epath
from jinja2 import ext, nodes, parser, sandbox

from clp_jax.data.text_pairs import too_long
from clp_jax.data.tokenizer import (
  DOCUMENT,
  TOKENIZER,
  Message,
  Template,
  check_messages,
)

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
FILES = (TOKENIZER, _CONFIG, _SPECIAL, _TEMPLATE)
_ENDS = ("bos_token", "eos_token")
_NAMES = (
  *_ENDS,
  "pad_token",
  "unk_token",
  "sep_token",
  "cls_token",
  "mask_token",
)
# Classes of transformers that go by add_bos_token, whatever tokenizer.json has.
_TOLD = ("LlamaTokenizer", "GemmaTokenizer")
# What a template that prints the date is told, whatever the day: prompts of a
# run must not change while it trains. Llama 3's templates print it where they
# find no clock.
_DAY = datetime.datetime(2024, 7, 26)
_PLACES = re.compile(r"\{(?:document|response)\}")
_NO_TEMPLATE = (
  "a conversation is shown by the model's chat template; leave data.template "
  "None."
)
_PRIVATE = range(0xF0000, 0xFFFFE)  # characters to which Unicode gives no use


def read_files(folder: str | os.PathLike) -> dict[str, bytes]:
  """The content of those of FILES that a folder holds; none without
  tokenizer.json."""
  path = epath.Path(folder)
  if not (path / TOKENIZER).exists():
    return {}
  return {
    name: (path / name).read_bytes() for name in FILES if (path / name).exists()
  }


class HFTokenizer:
  """See `tokenizer.Tokenizer`, whose methods these are.

  For decoder-only models: a prompt does not end in EOS.

  Attributes:
    path: of the folder.
    pad_id: of the model; -1 where that is text, or ends it.
    eos_ids: tokens any of which ends a response, its own first.
    chat_template: its source, or None.
  """

  def __init__(
    self,
    path: str,
    files: Mapping[str, bytes],
    eos_ids: Sequence[int] = (),
    pad_id: int = -1,
    rows: int | None = None,
    options: Mapping[str, Any] | None = None,
  ):
    """Parses the files.

    Args:
      path: of the folder, for messages.
      files: content of those of FILES that there are.
      eos_ids: tokens that end a response of the model; () takes the
        tokenizer's own.
      pad_id: the model's padding.
      rows: of the model's embedding. Control tokens beyond them are left out
        where neither chats nor ends are made of them; None leaves out nothing.
      options: names and values that the chat template is given beside its own.

    Raises:
      ValueError: one can't be parsed, no token ends a response, or an option is
        one that every chat template is given.
    """
    self.path = path
    self.pad_id = pad_id
    self._files = dict(files)
    try:
      self._read(files[TOKENIZER])
    except Exception as error:  # the library's own, a bare Exception
      raise ValueError(
        f"{path}/{TOKENIZER} can't be read: {_line(error)}"
      ) from error
    self._names = self._special_names()
    self.chat_template = self._find_template()
    self._options = dict(options or {})
    for name in self._options:
      if name in (*_GIVEN, *_NAMES):
        raise ValueError(
          f"data.template_options.{name}: every chat template is given {name}; "
          "leave it out."
        )
    if rows is not None and (absent := self._placeholders(rows)):
      values = json.loads(files[TOKENIZER])
      tokens = values["added_tokens"]
      values["added_tokens"] = [t for t in tokens if t["id"] not in absent]
      self._read(json.dumps(values).encode())
    own = self._tokenizer.token_to_id(self._names.get("eos_token", ""))
    self.eos_ids = tuple(eos_ids)
    if own is not None and (own in eos_ids or not eos_ids):
      self.eos_ids = tuple(dict.fromkeys((own, *eos_ids)))
    if not self.eos_ids:
      raise ValueError(
        f"nothing ends a response: set eos_token_id in {path}/config.json, or "
        f"eos_token in {path}/{_CONFIG}."
      )
    # A list may name rows that no token stands for, but not those alone.
    if all(self._tokenizer.id_to_token(i) is None for i in self.eos_ids):
      raise ValueError(
        f"{path}/{TOKENIZER} has no token {', '.join(map(str, self.eos_ids))}, "
        "which ends responses of the model: use the tokenizer that the model "
        "was trained with, or correct its eos_token_id."
      )
    for one in (self._tokenizer, self._of_text):
      one.no_truncation()
      one.no_padding()
      one.add_special_tokens(self._unmarked())
    added = self._tokenizer.get_added_tokens_decoder()
    self._special = {i: t.content for i, t in added.items() if t.special}
    self._control = dict(self._special)
    for token in self.eos_ids:  # a list may name tokens of text
      self._control.setdefault(
        token, self._tokenizer.id_to_token(token) or f"<{token}>"
      )
    if 0 <= pad_id < self.size and pad_id not in self._control:
      self.pad_id = -1  # some models pad with a letter
    if pad_id in self.eos_ids:
      self.pad_id = -1  # others with what ends a text, which is read

  @functools.cached_property
  def eos_id(self) -> int:
    """What ends targets: of `eos_ids` the one that the chat template writes
    after an answer, which for Gemma is not its tokenizer's own; without one,
    the first."""
    turns = [
      {"role": "user", "content": "?"},
      {"role": "assistant", "content": "!"},
    ]
    try:
      ids = self.chat(turns, answered=True)
    except ValueError:  # no template, or one that fails, which `prompt` says
      ids = []
    for token in reversed(ids):
      if token in self.eos_ids:
        return token
      if self.decode([token]).strip():
        break  # the answer itself
    return self.eos_ids[0]

  def _read(self, content: bytes) -> None:
    self._tokenizer, self._of_text = (
      tokenizers.Tokenizer.from_buffer(content) for _ in range(2)
    )
    # Text that spells a control token is text.
    self._of_text.encode_special_tokens = True

  def _placeholders(self, rows: int) -> set[int]:
    """Control tokens beyond the rows that nothing here is made of, such as
    Gemma 3's for images: the embedding of its 1B has no row for it."""
    written = (self.chat_template or "", *self._names.values())
    return {
      i
      for i, token in self._tokenizer.get_added_tokens_decoder().items()
      if i >= rows
      and token.special
      and not any(token.content in text for text in written)
    }

  def _unmarked(self) -> list[tokenizers.AddedToken]:
    """What begins, ends or pads a text and is not called special, but is."""
    added = self._tokenizer.get_added_tokens_decoder()
    found = [added[i] for i in (*self.eos_ids, self.pad_id) if i in added]
    for content in (self._names[name] for name in _ENDS if name in self._names):
      own = self._tokenizer.token_to_id(content)
      if own is not None:
        plain = tokenizers.AddedToken(content, normalized=False)
        found.append(added.get(own, plain))
    for token in found:
      token.special = True
    return found

  def _json(self, name: str) -> dict[str, Any]:
    try:
      values = json.loads(self._files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"{self.path}/{name} can't be read: {_line(error)}"
      ) from error
    if not isinstance(values, dict):
      raise ValueError(f"{self.path}/{name} can't be read: it is no object.")
    return values

  def _special_names(self) -> dict[str, str]:
    """bos_token and so on -> content."""
    found = {}
    for values in (self._json(_SPECIAL), self._json(_CONFIG)):
      for name in _NAMES:
        value = values.get(name)
        if isinstance(value, Mapping):
          value = value.get("content")
        if isinstance(value, str):
          found[name] = value
    return found

  def _find_template(self) -> str | None:
    if _TEMPLATE in self._files:
      try:
        return self._files[_TEMPLATE].decode()
      except UnicodeDecodeError as error:
        raise ValueError(
          f"{self.path}/{_TEMPLATE} can't be read: {error}"
        ) from error
    template = self._json(_CONFIG).get("chat_template")
    if isinstance(template, list):  # of several, by name
      named = [t for t in template if isinstance(t, dict)]
      default = [t.get("template") for t in named if t.get("name") == "default"]
      template = default[0] if default else None
    if not isinstance(template, str | None):
      raise ValueError(
        f"{self.path}/{_CONFIG} can't be read: its chat_template is no text."
      )
    return template

  ends_prompts = False

  @property
  def unk_id(self) -> int:
    model = self._tokenizer.model
    name = self._names.get("unk_token", getattr(model, "unk_token", None))
    found = None if name is None else self._tokenizer.token_to_id(name)
    return -1 if found is None else found

  @property
  def bos_id(self) -> int | None:
    name = self._names.get("bos_token")
    return None if name is None else self._tokenizer.token_to_id(name)

  @functools.cached_property
  def size(self) -> int:
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def _frame(self) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text that is no chat: BOS."""
    framed = self._tokenizer.encode("a", add_special_tokens=True)
    ids, special = framed.ids, framed.special_tokens_mask
    after = special[::-1].index(0)
    before = ids[: special.index(0)]
    config = self._json(_CONFIG)
    told = config.get("add_bos_token")
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind in _TOLD and isinstance(told, bool) and self.bos_id is not None:
      before = [self.bos_id] if told else []
    return before, ids[len(ids) - after :]

  def encode(self, text: str) -> list[int]:
    """The tokens of a text, which makes no control token (but for one that
    ends responses and is all that spells some character)."""
    encoding = self._encoded(text)
    cuts = [
      left + 1
      for token, (left, right) in zip(
        encoding.ids, encoding.offsets, strict=True
      )
      if token in self._control and right - left > 1
    ]
    if not cuts:
      return encoding.ids
    places = itertools.pairwise((0, *cuts, len(text)))
    return [i for left, right in places for i in self.encode(text[left:right])]

  def _encoded(self, text: str) -> tokenizers.Encoding:
    return self._of_text.encode(text, add_special_tokens=False)

  def decode(self, ids: Sequence[int]) -> str:
    known = [i for i in ids if 0 <= i < self.size and i not in self._control]
    return self._tokenizer.decode(known, skip_special_tokens=False)

  def name(self, token: int) -> str | None:
    if token >= self.size and token not in self._control:
      token = self.eos_id
    return self._control.get(token)

  def token(self, name: str) -> int | None:
    for token, control in self._control.items():
      if control == name:
        return token
    for text in (name, f" {name}"):
      ids = self.encode(text)
      if len(ids) == 1 and ids[0] != self.unk_id:
        return ids[0]
    return None

  def prompt(
    self, document: str | Sequence[Message], template: Template, limit: int
  ) -> tuple[list[int], bool]:
    """What a model reads of a document; of a long one, a text is cut and not
    the instruction that follows it."""
    if isinstance(document, str):
      contents = [document]
    else:
      contents = [m["content"] for m in document]

    def whole(contents: list[str]) -> list[int]:
      if isinstance(document, str):
        return self._whole_prompt(contents[0], template)
      cut = [
        dict(m) | {"content": content}
        for m, content in zip(document, contents, strict=True)
      ]
      return self._whole_prompt(cut, template)

    ids, was_cut = self._cut_to(limit, contents, whole)
    if len(ids) > limit:
      raise ValueError(
        f"what surrounds a document takes {len(ids)} tokens, more than "
        f"data.source_length = {limit}; raise it or shorten the template."
      )
    return ids, was_cut

  def _cut_to(
    self,
    limit: int,
    contents: list[str],
    whole: Callable[[list[str]], list[int]],
  ) -> tuple[list[int], bool]:
    """The tokens that `whole` makes of texts, and whether some were cut; more
    than the limit where even empty texts make more."""
    ids = whole(contents)
    if len(ids) <= limit:
      return ids, False
    contents = list(contents)
    # Of a conversation the longest turn, and others only if that is not enough.
    for i in sorted(range(len(contents)), key=lambda i: -len(contents[i])):
      text = contents[i]
      starts = [left for left, _ in self._encoded(text).offsets]
      kept = len(starts)
      step = 1  # doubles, so that a turn that a template leaves out soon ends
      while kept and len(ids) > limit:
        kept = max(kept - step * (len(ids) - limit), 0)
        step *= 2
        contents[i] = text[: starts[kept]]
        ids = whole(contents)
      if len(ids) <= limit:
        break
    return ids, True

  def judged(
    self, document: str, response: str, template: str | None, limit: int
  ) -> list[int]:
    """What a classifier reads of a document and a response to it.

    Args:
      document: what the user has said; cut where all is longer than the limit.
      response: what the model has answered; never cut.
      template: a text with "{document}" and "{response}", in place of the chat
        template.
      limit: tokens at the most.

    Raises:
      ValueError: the response alone is longer, or there is no template.
    """

    def whole(contents: list[str]) -> list[int]:
      texts = {DOCUMENT: contents[0], "{response}": response}
      if template is None:
        roles = zip(("user", "assistant"), texts.values(), strict=True)
        return self.chat(
          [{"role": role, "content": text} for role, text in roles],
          answered=True,
        )
      text = _PLACES.sub(lambda place: texts[place[0]], template)
      before, after = self._frame
      return [*before, *self.encode(text), *after]

    ids, _ = self._cut_to(limit, [document], whole)
    if len(ids) > limit:
      raise ValueError(too_long(len(ids), limit))
    return ids

  def _whole_prompt(
    self, document: str | Sequence[Message], template: Template
  ) -> list[int]:
    if not isinstance(document, str):
      if template is not None:
        raise ValueError(_NO_TEMPLATE)
      return self.chat(document)
    if not isinstance(template, list):
      if template is not None:
        document = template.replace(DOCUMENT, document)
      return [*self._frame[0], *self.encode(document)]
    return self.chat(
      [
        m | {"content": m["content"].replace(DOCUMENT, document)}
        for m in template
      ]
    )

  def chat(
    self, messages: Sequence[Message], *, answered: bool = False
  ) -> list[int]:
    """The tokens of a conversation, up to where the model answers; or, where it
    has answered, of all of it.

    Raises:
      ValueError: there is no chat template, or it fails.
    """
    check_messages(messages)
    # Characters that no message has stand for those at which a message spells a
    # control token, until the template's own control tokens are found.
    used = set(json.dumps(list(messages), ensure_ascii=False))
    unused = (c for c in map(chr, _PRIVATE) if c not in used)
    hidden: dict[str, str] = collections.defaultdict(lambda: next(unused))
    hidden_messages = [self._hide(m, hidden) for m in messages]
    text = self._rendered(hidden_messages, answered)
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    own = self._found(text, encoding)
    if not hidden and len(own) == sum(i in self._control for i in encoding.ids):
      return encoding.ids
    back = str.maketrans({x: c for c, x in hidden.items()})
    ids, start = [], 0
    for token, left, right in own:
      ids += [*self.encode(text[start:left].translate(back)), token]
      start = right
    return ids + self.encode(text[start:].translate(back))

  def _hide(self, value: Any, hidden: dict[str, str]) -> Any:
    """A message, or a part of one, whatever JSON can hold, that spells no
    control token; what stands for a character is added to `hidden`."""
    if isinstance(value, Mapping):
      return {name: self._hide(x, hidden) for name, x in value.items()}
    if isinstance(value, list | tuple):
      return [self._hide(x, hidden) for x in value]
    if isinstance(value, str):
      while places := self._spelled(value):
        characters = list(value)
        for i in places:
          characters[i] = hidden[characters[i]]
        value = "".join(characters)
    return value

  def _found(
    self, text: str, encoding: tokenizers.Encoding
  ) -> list[tuple[int, int, int]]:
    """Control tokens that a text spells as they are written, not those that a
    normaliser or the model makes of other text: (token, start, end)."""
    return [
      (token, left, right)
      for token, (left, right) in zip(
        encoding.ids, encoding.offsets, strict=True
      )
      if token in self._special and self._special[token] in text[left:right]
    ]

  def _spelled(self, text: str) -> list[int]:
    """Where control tokens begin in a text, or might at its end."""
    if self._firsts.isdisjoint(text):
      return []
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    found = {
      text.index(self._special[token], left)
      for token, left, _ in self._found(text, encoding)
    }
    end = text.rstrip()
    for size in range(1, min(self._longest, len(end)) + 1):
      if end[-size:] in self._beginnings:
        found.add(len(end) - size)
    return sorted(found)

  @functools.cached_property
  def _firsts(self) -> set[str]:
    """Characters that begin control tokens."""
    return {name[0] for name in self._special.values()}

  @functools.cached_property
  def _beginnings(self) -> set[str]:
    """What control tokens begin with."""
    return {
      name[:size]
      for name in self._special.values()
      for size in range(1, len(name))
    }

  @functools.cached_property
  def _longest(self) -> int:
    return max(map(len, self._beginnings), default=0)

  def _rendered(self, messages: Sequence[Message], answered: bool) -> str:
    if self.chat_template is None:
      raise ValueError(
        f"{self.path} has no chat template: add {_TEMPLATE}, or set "
        "data.template to a text."
      )
    try:
      return _compiled(self.chat_template).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=not answered,
        **self._names,
        **self._options,
      )
    except Exception as error:  # a program's mistakes: all can happen
      file = _TEMPLATE if _TEMPLATE in self._files else _CONFIG
      own = isinstance(error, jinja2.TemplateError)  # a text that says enough
      what = _line(error) if own else f"{type(error).__name__}: {_line(error)}"
      raise ValueError(
        f"the chat template of {self.path} fails: {what}; correct {file}, or "
        "the messages that it is given."
      ) from error

  def check(self, messages: Sequence[Message], template: Any) -> None:
    if template is not None:
      raise ValueError(_NO_TEMPLATE)
    if messages[-1]["role"] == "assistant":
      raise ValueError(
        "the conversation ends in an assistant's turn, which leaves nothing to "
        "answer; end it in a user's."
      )
    self._rendered(messages, answered=False)

  def target(self, text: str, limit: int) -> list[int]:
    return [*self.encode(text)[: limit - 1], self.eos_id]

  def allowed(self, vocab_size: int) -> np.ndarray:
    """Raises a ValueError for a model of fewer rows than the tokenizer has ids,
    beside what the protocol says."""
    if vocab_size < self.size:
      raise ValueError(
        f"the model has {vocab_size} rows of vocabulary for the {self.size} "
        f"ids of {self.path}/{TOKENIZER}; use the tokenizer that the model was "
        "trained with."
      )
    allowed = np.zeros(vocab_size, bool)
    ids = list(self._tokenizer.get_vocab(with_added_tokens=True).values())
    allowed[ids] = True
    allowed[list(self._control)] = False
    if self.unk_id >= 0:
      allowed[self.unk_id] = False
    if self.pad_id >= 0:
      allowed[self.pad_id] = False
    allowed[list(self.eos_ids)] = True
    return allowed

  def control_ids(self, vocab_size: int) -> list[int]:
    """Rows of the embedding that no token uses."""
    return list(range(self.size, vocab_size))

  def files(self) -> dict[str, bytes]:
    return dict(self._files)

  def padding(self, last: int) -> tuple[int, dict[str, bytes]]:
    """The model's padding, or the tokenizer's own, or a control token."""
    given = self._names.get("pad_token")
    names = [
      None if self.pad_id < 0 else self._tokenizer.id_to_token(self.pad_id)
    ]
    names += [given, *(name for _, name in sorted(self._special.items()))]
    # A beginning pads too, but it looks odd.
    names.sort(key=lambda name: name == self._names.get("bos_token", ""))
    for name in filter(None, names):
      pad = self._tokenizer.token_to_id(name)
      if pad is not None and pad != last:
        break
    else:
      raise ValueError(
        f"{self.path} has no token to pad with but the one that ends rows; "
        f"add one to {TOKENIZER}, and name it as pad_token in {_CONFIG}."
      )
    files = self.files()
    if name != given:
      for file in {_CONFIG, *files} & {_CONFIG, _SPECIAL}:
        values = self._json(file) | {"pad_token": name}
        files[file] = json.dumps(values, indent=2).encode()
    return pad, files


def _line(error: Exception) -> str:
  return " ".join(str(error).split())


class _Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %}, around what a model has written,
  which transformers can tell apart."""

  tags = {"generation"}

  def parse(self, parser: parser.Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )

  def fail(message: str):
    raise jinja2.TemplateError(message)

  def tojson(x, ensure_ascii=False, indent=None, **options):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

  environment.globals["raise_exception"] = fail
  environment.globals["strftime_now"] = lambda form: _DAY.strftime(form)
  environment.filters["tojson"] = tojson  # Jinja's own escapes for HTML
  return environment.from_string(source)

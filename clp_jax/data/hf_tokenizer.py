"""tokenizer.json, by Hugging Face's `tokenizers`, with its chat template.

Text makes no control token: what a document spells like one is encoded as the
characters that it is, in a chat template too.

Chat templates are programs that a checkpoint brings: they run in Jinja's
sandbox, with the names that transformers gives them.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jinja2 import ext, sandbox

from clp_jax.data.tokenizer import DOCUMENT, Message, Template, check_messages

TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, _CONFIG, _SPECIAL, _TEMPLATE)
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class HFTokenizer:
  """See `tokenizer.Tokenizer`, whose methods these are.

  Attributes:
    path: of the folder.
    pad_id: of the model.
    eos_ids: tokens any of which ends a response; the first ends targets.
    chat_template: its source, or None.
  """

  def __init__(
    self,
    path: str,
    files: Mapping[str, bytes],
    eos_ids: Sequence[int] = (),
    pad_id: int = -1,
  ):
    """Parses the files.

    Args:
      path: of the folder, for messages.
      files: content of those of FILES that there are.
      eos_ids: tokens that end a response of the model; () takes the
        tokenizer's own.
      pad_id: the model's padding.

    Raises:
      ValueError: one can't be parsed, or nothing ends a response.
    """
    self.path = path
    self.pad_id = pad_id
    self._files = dict(files)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
      # Text that spells a control token is text.
      self._of_text = tokenizers.Tokenizer.from_buffer(files[TOKENIZER])
    except Exception as error:  # the library's own, a bare Exception
      raise ValueError(f"{path}/{TOKENIZER} can't be read: {error}") from error
    for one in (self._tokenizer, self._of_text):
      one.no_truncation()
      one.no_padding()
    self._of_text.encode_special_tokens = True
    added = self._tokenizer.get_added_tokens_decoder()
    self._control = {i: t.content for i, t in added.items() if t.special}
    self._names = self._special_names()
    self.chat_template = self._find_template()
    self.eos_ids = tuple(eos_ids)
    if not self.eos_ids and "eos_token" in self._names:
      own = self._tokenizer.token_to_id(self._names["eos_token"])
      self.eos_ids = () if own is None else (own,)
    if not self.eos_ids:
      raise ValueError(
        f"nothing ends a response: set eos_token_id in {path}/config.json, or "
        f"eos_token in {path}/{_CONFIG}."
      )
    for token in self.eos_ids:  # a list may name tokens that are no controls
      self._control.setdefault(
        token, self._tokenizer.id_to_token(token) or f"<{token}>"
      )

  def _json(self, name: str) -> dict[str, Any]:
    try:
      return json.loads(self._files.get(name, b"{}"))
    except ValueError as error:
      raise ValueError(f"{self.path}/{name} can't be read: {error}") from error

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
      return self._files[_TEMPLATE].decode()
    template = self._json(_CONFIG).get("chat_template")
    if isinstance(template, list):  # of several, by name
      named = {t.get("name"): t.get("template") for t in template}
      template = named.get("default")
    return template

  @property
  def eos_id(self) -> int:
    """The token that ends a target."""
    return self.eos_ids[0]

  @property
  def unk_id(self) -> int:
    """The token of what can't be spelled; -1 where all can."""
    name = self._names.get("unk_token")
    found = None if name is None else self._tokenizer.token_to_id(name)
    return -1 if found is None else found

  @property
  def bos_id(self) -> int | None:
    """What begins a text; None where nothing does."""
    name = self._names.get("bos_token")
    return None if name is None else self._tokenizer.token_to_id(name)

  @functools.cached_property
  def size(self) -> int:
    """One more than the largest id."""
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def _beginning(self) -> list[int]:
    """BOS, where the tokenizer puts one before a text that is no chat."""
    with_special = self._tokenizer.encode("a", add_special_tokens=True)
    kept = []
    for token, special in zip(
      with_special.ids, with_special.special_tokens_mask, strict=True
    ):
      if not special:
        break
      kept.append(token)
    return kept

  def encode(self, text: str) -> list[int]:
    """The tokens of a text, which makes no control token."""
    return self._of_text.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of tokens."""
    known = [i for i in ids if 0 <= i < self.size and i not in self._control]
    return self._tokenizer.decode(known, skip_special_tokens=False)

  def name(self, token: int) -> str | None:
    """What a control token is called."""
    if token >= self.size:
      token = self.eos_id
    return self._control.get(token)

  def token(self, name: str) -> int | None:
    """The one token that spells a word, or the control token of this name."""
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
    ids = self._whole_prompt(document, template)
    if len(ids) <= limit:
      return ids, False
    messages = None if isinstance(document, str) else list(document)
    contents = [str(document)]
    if messages is not None:
      contents = [m["content"] for m in messages]
    longest = max(range(len(contents)), key=lambda i: len(contents[i]))
    tokens = self.encode(contents[longest])
    kept = len(tokens)
    while len(ids) > limit:
      if kept == 0:
        raise ValueError(
          f"what surrounds a document takes {len(ids)} tokens, more than "
          f"data.source_length = {limit}; raise it or shorten the template."
        )
      kept = max(kept - (len(ids) - limit), 0)
      short = self.decode(tokens[:kept])
      cut: Any = short
      if messages is not None:
        cut = [dict(m) for m in messages]
        cut[longest]["content"] = short
      ids = self._whole_prompt(cut, template)
    return ids, True

  def _whole_prompt(
    self, document: str | Sequence[Message], template: Template
  ) -> list[int]:
    if not isinstance(document, str):
      if template is not None:
        raise ValueError(
          "a conversation is shown by the model's chat template; leave "
          "data.template None."
        )
      return self.chat(document)
    if template is None:
      return [*self._beginning, *self.encode(document)]
    if isinstance(template, str):
      return [
        *self._beginning,
        *self.encode(template.replace(DOCUMENT, document)),
      ]
    return self.chat(
      [
        m | {"content": m["content"].replace(DOCUMENT, document)}
        for m in template
      ]
    )

  def chat(self, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation, up to where the model answers.

    Raises:
      ValueError: there is no chat template, or it fails.
    """
    check_messages(messages)
    text = self._rendered(messages)
    parts = [
      content
      for m in messages
      for content in (m["content"].strip(),)
      if any(name in content for name in self._control.values())
    ]
    ids: list[int] = []
    for part in parts:
      before, found, text = text.partition(part)
      if not found:
        raise ValueError(
          "the chat template changes a text that spells control tokens, so "
          f"that they can't be told from the template's own: {part[:60]!r}."
        )
      ids += self._tokenizer.encode(before, add_special_tokens=False).ids
      ids += self.encode(part)
    return ids + self._tokenizer.encode(text, add_special_tokens=False).ids

  def _rendered(self, messages: Sequence[Message]) -> str:
    if self.chat_template is None:
      raise ValueError(
        f"{self.path} has no chat template: add {_TEMPLATE}, or set "
        "data.template to a text."
      )
    try:
      return _compiled(self.chat_template).render(
        messages=[dict(m) for m in messages],
        add_generation_prompt=True,
        **self._names,
      )
    except jinja2.TemplateError as error:
      raise ValueError(
        f"the chat template of {self.path} fails: {error}; correct "
        f"{_TEMPLATE}, or the messages that it is given."
      ) from error
    except Exception as error:  # the template's own mistakes: all can happen
      raise ValueError(
        f"the chat template of {self.path} fails: {type(error).__name__}: "
        f"{error}; correct {_TEMPLATE}."
      ) from error

  def target(self, text: str, limit: int) -> list[int]:
    """A response, with the token that ends it."""
    return [*self.encode(text)[: limit - 1], self.eos_id]

  def allowed(self, vocab_size: int) -> np.ndarray:
    """[V] bool, the tokens that a policy may produce.

    Raises:
      ValueError: the model has fewer rows than the tokenizer has ids.
    """
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
    """Name -> content."""
    return dict(self._files)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
  )

  def fail(message: str):
    raise jinja2.TemplateError(message)

  environment.globals["raise_exception"] = fail
  environment.globals["strftime_now"] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  # Not Jinja's own, which escapes for HTML.
  environment.filters["tojson"] = lambda x, indent=None: json.dumps(
    x, ensure_ascii=False, indent=indent
  )
  return environment.from_string(source)

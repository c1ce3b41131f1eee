"""SentencePiece vocabularies, and the import of TensorFlow that seqio needs.

Text never makes a control token: `text_model` takes the sentinels, which carry
weightings, out of what text is parsed for, and all that encodes text here does
so with that model. `<extra_id_0>` in a document is twelve characters like any.
"""

import contextlib
import functools
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from clp_jax.data.tokenizer import DOCUMENT, Template

PAD = 0  # of SentencePiece models here; EOS differs, ask for `eos_ids`
FILES = ("vocabulary.model", "spiece.model")  # of a run, and of Hugging Face's
_EXTRA_ID = re.compile(r"▁?<extra_id_(\d+)>")


@functools.lru_cache
def import_seqio() -> tuple[Any, Any]:
  """Imports TensorFlow and seqio, late, quietly and without accelerators.

  TensorFlow takes seconds to import, writes to stderr as it does, whatever its
  settings, and would reserve all memory of a GPU or claim the TPU. What it
  writes is dropped unless the import fails or TF_CPP_MIN_LOG_LEVEL is 0.

  Returns:
    The modules (tensorflow, seqio).
  """
  with contextlib.ExitStack() as stack:
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") != "0":
      stack.enter_context(_stderr_kept_for_errors())
    import seqio
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
      # TensorFlow refuses once its devices are in use: then the program that
      # did that has decided what TensorFlow sees.
      with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], kind)
  return tf, seqio


@contextlib.contextmanager
def _stderr_kept_for_errors() -> Iterator[None]:
  """Holds back file descriptor 2; shows what came only on an exception."""
  sys.stderr.flush()
  try:
    stderr = os.dup(2)
  except OSError:  # closed, as in some services: nothing to hold back
    yield
    return
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    failed = True
    try:
      yield
      failed = False
    finally:
      sys.stderr.flush()
      os.dup2(stderr, 2)
      os.close(stderr)
      if failed:
        held.seek(0)
        sys.stderr.write(held.read().decode(errors="replace"))


def word_model(words: Sequence[str], punctuation: Sequence[str]) -> bytes:
  """Builds a SentencePiece model with one piece a word.

  Args:
    words: pieces that start a word, without spaces.
    punctuation: pieces that follow a word without a space.

  Returns:
    A serialised ModelProto: PAD 0, EOS 1, unknown 2, then the words and the
    punctuation in the order given; the text is not normalised.
  """
  model = model_pb2.ModelProto()  # type: ignore[attr-defined]
  kinds = model.SentencePiece
  for piece, kind in (
    ("<pad>", kinds.CONTROL),
    ("</s>", kinds.CONTROL),
    ("<unk>", kinds.UNKNOWN),
  ):
    model.pieces.add(piece=piece, score=0, type=kind)
  for piece in (*(f"▁{word}" for word in words), *punctuation):
    model.pieces.add(piece=piece, score=-1, type=kinds.NORMAL)
  spec = model.trainer_spec
  spec.model_type = spec.UNIGRAM
  spec.vocab_size = len(model.pieces)
  spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = PAD, 1, 2, -1
  spec.pad_piece = "<pad>"
  model.normalizer_spec.name = "identity"
  # A table of replacements without entries changes no character, as no table at
  # all would, but without one TensorFlow Text logs a line for each operation.
  # The format is a double-array trie (here the root looks for byte c in cell
  # c ^ 1, and no cell j holds j ^ 1) with its size before and a string after.
  trie = struct.pack("<256I", 1 << 10, *range(1, 256))
  model.normalizer_spec.precompiled_charsmap = (
    struct.pack("<I", len(trie)) + trie + b"\0"
  )
  return model.SerializeToString(deterministic=True)


@functools.cache
def text_model(content: bytes, eos_ids: tuple[int, ...] = ()) -> bytes:
  """A SentencePiece model under which text makes no control tokens.

  Args:
    content: a serialised ModelProto. Its EOS, PAD and other control pieces no
      text makes anyhow, but sentinels, user-defined pieces, it does.
    eos_ids: tokens that end a response beside its own EOS.

  Returns:
    The same pieces, the sentinels and the ends among them control pieces.

  Raises:
    google.protobuf.message.DecodeError: it is none.
  """
  model = model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
  for number, piece in enumerate(model.pieces):
    if _EXTRA_ID.fullmatch(piece.piece) or number in eos_ids:
      piece.type = piece.CONTROL
  return model.SerializeToString(deterministic=True)


@functools.cache
def _text_tokenizer(
  content: bytes, eos_ids: tuple[int, ...]
) -> SentencePieceProcessor:
  tokenizer = SentencePieceProcessor()
  tokenizer.LoadFromSerializedProto(text_model(content, eos_ids))
  return tokenizer


class Vocabulary:
  """A SentencePiece model: see `tokenizer.Tokenizer`, whose methods these are.

  Without seqio, whose import takes seconds.

  Attributes:
    path: of the file.
    pad_id: PAD.
    tokenizer: a sentencepiece.SentencePieceProcessor.
    eos_ids: tokens any of which ends a response.
    eos_id: the first one, the file's own, which ends inputs and targets.
  """

  def __init__(self, path: str, content: bytes, eos_ids: Sequence[int] = ()):
    """Parses the content of a file; eos_ids and errors are those of
    `load_vocabulary`."""
    self.path = path
    self.pad_id = PAD
    self._content = content
    try:
      self.tokenizer = _text_tokenizer(content, tuple(eos_ids))
    except Exception as error:  # SentencePiece's own, undocumented
      raise _no_model(path, error) from error
    self.eos_ids = _checked_eos_ids(self.tokenizer, path, eos_ids)
    self.eos_id = self.eos_ids[0]

  ends_prompts = True
  chat_template: str | None = None

  @property
  def unk_id(self) -> int:
    return self.tokenizer.unk_id()

  @property
  def bos_id(self) -> None:
    """T5's texts begin with nothing."""

  @property
  def size(self) -> int:
    """The number of pieces."""
    return self.tokenizer.get_piece_size()

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.EncodeAsIds(text)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of tokens; ids without a piece read as unknown."""
    known = (i if 0 <= i < self.size else self.unk_id for i in ids)
    return self.tokenizer.decode(list(known))

  def name(self, token: int) -> str | None:
    if token >= self.size:
      token = self.eos_id
    if not self.tokenizer.is_control(token):
      return None
    return self.tokenizer.id_to_piece(token)

  def token(self, name: str) -> int | None:
    for piece in (name, f"▁{name}"):
      token = self.tokenizer.piece_to_id(piece)
      if self.tokenizer.is_control(token):
        return token
    ids = self.encode(name)
    return ids[0] if len(ids) == 1 and ids[0] != self.unk_id else None

  def prompt(
    self, document: Any, template: Template, limit: int
  ) -> tuple[list[int], bool]:
    """What a model reads of a document: it ends in EOS, and is cut before.

    Raises:
      ValueError: it is a conversation, which takes a chat template.
    """
    if not isinstance(document, str) or isinstance(template, list):
      raise ValueError(
        f"the model's vocabulary, {self.path}, has no chat template: give "
        "documents that are text, and a data.template that is."
      )
    if template is not None:
      document = template.replace(DOCUMENT, document)
    ids = self.encode(document)
    return [*ids[: limit - 1], self.eos_id], len(ids) >= limit

  def check(self, messages: Any, template: Any) -> None:
    self.prompt(messages, template, 2)

  def target(self, text: str, limit: int) -> list[int]:
    return [*self.encode(text)[: limit - 1], self.eos_id]

  def allowed(self, vocab_size: int) -> np.ndarray:
    return allowed_tokens(self, vocab_size)

  def control_ids(self, vocab_size: int) -> list[int]:
    return control_ids(self, vocab_size)

  def files(self) -> dict[str, bytes]:
    return {FILES[0]: self._content}

  def padding(self, last: int) -> tuple[int, dict[str, bytes]]:
    """Its own, which ends no row."""
    del last
    return self.pad_id, self.files()


def read(path: str | os.PathLike, eos_ids: Sequence[int] = ()) -> Vocabulary:
  """Reads a SentencePiece model; may be gs://.

  Raises:
    ValueError: the file can't be read, or as `load_vocabulary`.
  """
  try:
    content = epath.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"can't read the vocabulary {path}: {error}") from error
  return Vocabulary(os.fspath(path), content, eos_ids)


def for_seqio(vocabulary: Any) -> Any:
  """The seqio.SentencePieceVocabulary of a `Vocabulary`; None of another."""
  if not isinstance(vocabulary, Vocabulary):
    return None
  (content,) = vocabulary.files().values()
  with tempfile.TemporaryDirectory() as folder:
    # Loaded, it needs the file no more, and the content may be in no file.
    file = os.path.join(folder, FILES[0])
    with open(file, "wb") as opened:
      opened.write(content)
    return load_vocabulary(file, eos_ids=vocabulary.eos_ids)


@functools.lru_cache
def _text_vocabulary() -> Any:
  """The class of what `load_vocabulary` gives."""
  _, seqio = import_seqio()
  import tensorflow_text

  base: Any = seqio.SentencePieceVocabulary

  class TextVocabulary(base):
    """A seqio.SentencePieceVocabulary whose text makes no control tokens.

    `sp_model` stays what the file holds, for those who save it. It has the
    attributes of `Vocabulary`, but for the path.
    """

    def __init__(self, path, extra_ids, eos_ids):
      super().__init__(path, extra_ids)
      self._named_eos_ids = eos_ids

    @property
    def tokenizer(self) -> SentencePieceProcessor:
      return _text_tokenizer(self.sp_model, self._named_eos_ids)

    @property
    def tf_tokenizer(self) -> Any:
      model = text_model(self.sp_model, self._named_eos_ids)
      return tensorflow_text.SentencepieceTokenizer(model)

    @property
    def eos_ids(self) -> tuple[int, ...]:
      path = self.sentencepiece_model_file
      return _checked_eos_ids(self.tokenizer, path, self._named_eos_ids)

  return TextVocabulary


def unread_vocabulary(
  path: str | os.PathLike, extra_ids: int = 0, eos_ids: Sequence[int] = ()
) -> Any:
  """As `load_vocabulary`, but the file is read, unchecked, by the first use."""
  return _text_vocabulary()(os.fspath(path), extra_ids, tuple(eos_ids))


def load_vocabulary(
  path: str | os.PathLike, extra_ids: int = 0, eos_ids: Sequence[int] = ()
) -> Any:
  """Loads a SentencePiece model.

  Args:
    path: file of the model; may be gs://.
    extra_ids: how many of T5's sentinel pieces to append, where the file has
      none; `vocabulary.sp_model` holds the bytes with them, to be saved and
      loaded with 0.
    eos_ids: tokens that end a response of the model, the file's EOS among them;
      () for that alone.

  Returns:
    A seqio.SentencePieceVocabulary, loaded: the file isn't read again. Text
    makes no control tokens. Its `eos_ids` start with its own.

  Raises:
    ValueError: the file can't be read or is no SentencePiece model, or it lacks
      an EOS, or that is not one of eos_ids, or its PAD is not 0.
  """
  return loaded(unread_vocabulary(path, extra_ids, eos_ids))


def loaded(vocabulary: Any) -> Any:
  """The same seqio.SentencePieceVocabulary, its file read, if that has not
  happened, and checked; errors as of `load_vocabulary`."""
  tf, _ = import_seqio()
  path = vocabulary.sentencepiece_model_file
  try:
    vocabulary.load_model()
  except (tf.errors.OpError, OSError) as error:
    raise ValueError(f"can't read the vocabulary {path}: {error}") from error
  except Exception as error:  # protobuf's and SentencePiece's own, undocumented
    raise _no_model(path, error) from error
  _checked_eos_ids(
    vocabulary.tokenizer, path, getattr(vocabulary, "eos_ids", ())
  )
  return vocabulary


def _no_model(path: str, error: Exception) -> ValueError:
  return ValueError(
    f"{path} is not a SentencePiece model ({error}); give the .model file."
  )


def _checked_eos_ids(
  tokenizer: SentencePieceProcessor, path: str, named: Sequence[int]
) -> tuple[int, ...]:
  """The tokenizer's own EOS, then the other ones that a model names; errors as
  of `load_vocabulary`."""
  own = tokenizer.eos_id()
  if tokenizer.pad_id() != PAD or own < 0:
    raise ValueError(
      f"the vocabulary {path} has PAD {tokenizer.pad_id()} and EOS {own}; "
      f"expected PAD {PAD} and an EOS, as T5's has: train it with --pad_id=0 "
      "--eos_id=1 --unk_id=2 --bos_id=-1."
    )
  if named and own not in named:
    raise ValueError(
      f"the vocabulary {path} ends a text with token {own}, but the model's "
      f"eos_token_id is {', '.join(map(str, named))}; give the vocabulary that "
      "the model was trained with, or correct eos_token_id."
    )
  return tuple(dict.fromkeys((own, *named)))


def allowed_tokens(vocabulary: Any, vocab_size: int) -> np.ndarray:
  """Tells the tokens that a policy may produce.

  Args:
    vocabulary: a `Vocabulary`, or what `load_vocabulary` gives.
    vocab_size: V, rows of the model's embedding; may exceed the pieces.

  Returns:
    [V] bool: True for EOS and for pieces of text; False for PAD, unknown,
    control and unused pieces, sentinels, and rows beyond the pieces.

  Raises:
    ValueError: the model has fewer rows than the vocabulary has pieces.
  """
  tokenizer = vocabulary.tokenizer
  pieces = tokenizer.get_piece_size()
  if vocab_size < pieces:
    raise ValueError(
      f"the model has {vocab_size} rows of vocabulary for {pieces} pieces; use "
      "the vocabulary that the model was trained with, or a larger model."
    )
  allowed = np.zeros(vocab_size, bool)
  for i in range(pieces):
    piece = tokenizer.id_to_piece(i)
    allowed[i] = piece != "" and not (
      tokenizer.is_control(i)
      or tokenizer.is_unknown(i)
      or tokenizer.is_unused(i)
      or _EXTRA_ID.fullmatch(piece)
    )
  allowed[list(vocabulary.eos_ids)] = True
  return allowed


def control_ids(vocabulary: Any, vocab_size: int) -> list[int]:
  """Tokens that stand for no text, to mark inputs with.

  Args:
    vocabulary: a `Vocabulary`, or what `load_vocabulary` gives.
    vocab_size: V, rows of the model's embedding.

  Returns:
    Ids of the sentinels <extra_id_0>, <extra_id_1>, ..., then of the rows that
    no piece uses. `allowed_tokens` excludes them all.
  """
  tokenizer = vocabulary.tokenizer
  pieces = tokenizer.get_piece_size()
  sentinels = {}
  for i in range(pieces):
    match = _EXTRA_ID.fullmatch(tokenizer.id_to_piece(i))
    if match is not None:
      sentinels[int(match[1])] = i
  ids = (*(sentinels[n] for n in sorted(sentinels)), *range(pieces, vocab_size))
  return [i for i in ids if i not in vocabulary.eos_ids]

"""A model that judges texts: what the rewards that are models share.

1. `load` places a T5 of any format on the mesh, cut by the same rules as the
   policy.
2. `Inputs` turns (document, response) pairs into rows of S tokens by a template
   such as "premise: {document} hypothesis: {response}". The response is always
   whole: what does not fit is the document's, which is cut, or spread over
   several rows by windows that overlap.
3. `make_scorer` jits one program for rows [batch, S]. Any number of rows is
   padded up to whole batches, so that it is compiled once.
4. What the model says is read at the decoder's first position.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clp_jax import interop, run_folder, saved_params, sharding
from clp_jax.data import tokenizer as tokenizer_lib
from clp_jax.data import tokenizer_files
from clp_jax.data.tokenizer import Tokenizer
from clp_jax.models import families
from clp_jax.models.model import Model, Params
from clp_jax.models.presets import PRESETS

_PLACE = re.compile(r"\{(document|response)\}")


class Judge(NamedTuple):
  """A model on the mesh, and its vocabulary."""

  model: Model
  params: Params
  vocabulary: Tokenizer


def load(
  path: str | None,
  mesh: Mesh,
  vocabulary: str | None,
  dtype: str,
  scan_layers: bool,
  fsdp: bool,
) -> Judge:
  """Loads a T5: a supervised run, a Hugging Face folder, a t5x checkpoint.

  Args:
    path: of the folder.
    mesh: where it goes, each device its part and no host the whole of it.
    vocabulary: SentencePiece model file; None takes the folder's.
    dtype: of the computation; parameters stay float32.
    scan_layers: compiles large models faster; a run of clp is as it was saved.
    fsdp: cut parameters over the data axis too.

  Raises:
    ValueError: there is no such T5, or it has no vocabulary, or too large a
      one.
    RunError: it is a run that can't be read.
  """
  path = checked(path)

  def place(config):
    made = families.build(config)
    return sharding.param_shardings(
      mesh, made.axes(), made.abstract(), fsdp=fsdp
    )

  if run_folder.is_run(path):
    config = run_folder.load_model_config(path)
    abstract = saved_params.abstract_like(
      families.build(config).abstract(), place(config)
    )
    params, _ = saved_params.load_params(path, abstract)
  else:
    loaded, params = interop.load_model(
      path, place, dtype=np.float32, scan_layers=scan_layers
    )
    config = loaded.config
  pieces = tokenizer_files.find(
    vocabulary or path, config.eos_ids, config.pad_id, config.vocab_size
  )
  if pieces is None:
    raise ValueError(
      f"{path} holds no SentencePiece model or tokenizer.json; set .vocabulary "
      "to it."
    )
  if pieces.size > config.vocab_size:
    raise ValueError(
      f"the vocabulary {pieces.path} has {pieces.size} pieces, but the "
      f"model {path} embeds {config.vocab_size}; set .vocabulary to the one "
      "that it was trained with."
    )
  if pieces.pad_id != config.pad_id:
    config = config.with_vocabulary(pieces.size, pieces.eos_ids, pieces.pad_id)
  config = dataclasses.replace(config, dtype=dtype, remat="none")
  return Judge(families.build(config), params, pieces)


def model_config(
  path: str | None, *, dtype: str, scan_layers: bool
) -> families.Config:
  """What `load` would load, or what a preset's parameters would be.

  Args:
    path: the folder of a T5, or a preset.
    dtype: of the computation.
    scan_layers: as for `load`.

  Raises:
    ValueError: there is no such T5.
  """
  if path in PRESETS:
    config = dataclasses.replace(PRESETS[path], scan_layers=scan_layers)
  elif run_folder.is_run(checked(path)):
    config = run_folder.load_model_config(checked(path))
  else:
    config = dataclasses.replace(
      interop.load_config(checked(path)), scan_layers=scan_layers
    )
  return dataclasses.replace(config, dtype=dtype, remat="none")


def checked(path: str | None) -> str:
  """The path, or a ValueError unless it may hold a trained model."""
  if path is None:
    raise ValueError("no model; set .model to the folder of a trained one.")
  if path in PRESETS:
    raise ValueError(
      f".model = {path!r} is a preset with random parameters; set it to the "
      "folder of a trained model."
    )
  if not epath.Path(path).is_dir():
    raise ValueError(f".model = {path!r}: there is no such folder.")
  return path


def token_of(vocabulary: Tokenizer, text: str) -> int:
  """The one piece that spells a text, or the sentinel that it names.

  Raises:
    ValueError: it takes several, or the unknown one.
  """
  token = vocabulary.token(text)
  if token is None:
    raise ValueError(
      f"the model's vocabulary spells {text!r} as "
      f"{[vocabulary.decode([i]) for i in vocabulary.encode(text)]}; a verdict "
      "must be one known piece."
    )
  return token


def check_template(template: str) -> None:
  """Raises a ValueError unless both places are in it, once each."""
  if sorted(_PLACE.findall(template)) != ["document", "response"]:
    raise ValueError(
      f"the template {template!r} must hold {{document}} and {{response}} once "
      "each."
    )


def split(template: str) -> list[str]:
  """A template's three texts and, between them, the names of its two places."""
  return [part.strip() for part in _PLACE.split(template)]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Rows of tokens from pairs of texts.

  Attributes:
    vocabulary: of the model.
    template: holds "{document}" and "{response}" once each. What is around them
      is tokenised apart from them, so separate it by spaces.
    length: S, tokens of a row, EOS included.
    overlap: tokens that consecutive windows of a long document share, at most
      half a window; None makes one row a pair, of the document's beginning.
  """

  vocabulary: Tokenizer
  template: str
  length: int
  overlap: int | None

  def __post_init__(self):
    check_template(self.template)
    fixed = sum(map(len, self._around))
    if self.length < fixed + 8:
      raise ValueError(
        f"rows of {self.length} tokens are too short: the template takes "
        f"{fixed} of them; raise .source_length to {fixed + 8} at least."
      )
    if self.overlap is not None and self.overlap < 0:
      raise ValueError(f".overlap must be >= 0, got {self.overlap}.")

  def __call__(
    self, documents: Sequence[str], responses: Sequence[str]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokenises B pairs.

    Returns:
      ([n, S] int32, padded, n >= B; [n] int32, the pair of each row, in
      order).
    """
    encode = functools.lru_cache(maxsize=None)(self.vocabulary.encode)
    rows, owners = [], []
    for pair, texts in enumerate(zip(documents, responses, strict=True)):
      document, response = map(encode, texts)
      for row in self._rows(document, response):
        rows.append(row)
        owners.append(pair)
    tokens = tokenizer_lib.pad(rows, self.length, self.vocabulary.pad_id)
    return tokens, np.asarray(owners, np.int32)

  @functools.cached_property
  def _around(self) -> tuple[list[int], ...]:
    """Tokens before, between and after the two texts."""
    texts = split(self.template)[::2]
    around = [self.vocabulary.encode(text) for text in texts]
    if self.vocabulary.bos_id is not None:
      around[0] = [self.vocabulary.bos_id, *around[0]]
    return tuple(around)

  def _rows(self, document: list[int], response: list[int]):
    before, between, after = self._around
    eos = [self.vocabulary.eos_ids[0]]
    room = self.length - len(before) - len(between) - len(after) - 1
    # Responses are short; one that is not leaves half of the row.
    response = response[: max(room // 2, room - len(document))]
    room -= len(response)
    starts = [0]
    if self.overlap is not None:
      stride = max(room - min(self.overlap, room // 2), 1)
      starts += range(stride, max(len(document) - room, 0) + stride, stride)
    document_first = split(self.template)[1] == "document"
    for start in starts:
      part = document[start : start + room]
      first, second = (part, response) if document_first else (response, part)
      yield [*before, *first, *between, *second, *after, *eos]


def row_program(
  value: Callable[[Params, jax.Array], jax.Array],
  params_at: Params,
  mesh: Mesh,
) -> Callable[[Params, jax.Array], jax.Array]:
  """Jits a function of rows.

  Args:
    value: (params, [batch, S] int32) -> [batch, ...] float32.
    params_at: shardings of the parameters.
    mesh: that they lie on.
  """
  rows = sharding.row_sharding(mesh)
  return jax.jit(
    sharding.on_mesh(mesh, value),
    in_shardings=(params_at, rows),
    out_shardings=rows,
  )


def make_scorer(
  value: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  mesh: Mesh,
  batch: int,
) -> Callable[[np.ndarray], np.ndarray]:
  """Jits a function of rows for one shape, and runs any number of rows by it.

  Args:
    value: (params, [batch, S] int32) -> [batch] float32.
    params: on the mesh.
    mesh: whose data axis the rows are cut over.
    batch: rows scored together, on all devices of all processes; rounded up to
      a multiple of the data axis.

  Returns:
    This process's [n, ...] int32 rows -> [n] float32. Every process must call
    it as often, with any n.

  Raises:
    ValueError: batch is not positive.
  """
  if batch < 1:
    raise ValueError(f".batch must be at least 1, got {batch}.")
  data = sharding.row_shards(mesh)
  batch = -(-batch // data) * data
  program = row_program(value, jax.tree.map(lambda p: p.sharding, params), mesh)
  start, stop = sharding.process_rows(mesh, batch)
  own = stop - start

  def score(tokens: np.ndarray) -> np.ndarray:
    calls = -(-len(tokens) // own)
    if jax.process_count() > 1:
      calls = int(multihost_utils.process_allgather(np.int32(calls)).max())
    results = []
    for i in range(calls):
      part = tokens[i * own : (i + 1) * own]
      padded = np.zeros([own, *tokens.shape[1:]], np.int32)
      padded[: len(part)] = part
      results.append(program(params, sharding.to_devices(mesh, padded, batch)))
    values = [sharding.to_host(result) for result in results]
    return np.concatenate([np.zeros([0], np.float32), *values])[: len(tokens)]

  return score


def first(
  model: Model,
  params: Params,
  tokens: jax.Array,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """What a model says first, before any token of a response.

  Args:
    model: that reads the rows.
    params: its parameters.
    tokens: [B, S] int32, the model's pad_id is padding.
    dropout_key: None for no dropout.

  Returns:
    Logits [B, V] float32, and the states [B, D] float32 that they are made of.
  """
  start = jnp.zeros([tokens.shape[0], 1], jnp.int32)
  logits, states = model.score(params, tokens, start, dropout_key)
  return logits[:, 0], states[:, 0].astype(jnp.float32)

"""Policy: a trained run as one steerable language model.

  policy = Policy.load("runs/demo")
  policy.generate(["..."], weights={"nli": 0.7, "rouge": 0.3})

For every weighting it mixes an ordinary T5 from the parameter sets and runs
that; nothing is trained and nothing is stored per weighting. Rows that differ
in their weightings are computed together, from the sets.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import (
  build,
  interop,
  row_mixing,
  run_folder,
  saved_params,
  sharding,
  weightings,
)
from clp_jax.bank import Bank
from clp_jax.data import tokenizer
from clp_jax.data.tokenizer import Tokenizer, parse_template
from clp_jax.models import decoding, families, mixture
from clp_jax.models.model import Model, Params
from clp_jax.prompting import Prompts
from clp_jax.rollout import row_keys
from clp_jax.sampling import BLOCK, Sampling
from clp_jax.weightings import Weighting

Weights = Mapping[str, float]
BATCH = 64  # rows decoded together; smaller requests take the next power of 2


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
  """Parameter sets, model and vocabulary, for any weighting.

  Attributes:
    config: of the run.
    bank: how a weighting makes a T5 of the sets.
    sets: what the run trains (bank.py): for the kinds of CLP steerable leaves
      [M, ...], shared leaves [...].
    step: updates that the sets have seen.
    vocabulary: what turns text into its tokens.
    mesh: where all of it lies.
    workdir: the run's folder.
  """

  config: ml_collections.ConfigDict
  bank: Bank
  sets: Params
  step: int
  vocabulary: Tokenizer
  mesh: Mesh
  workdir: str

  @classmethod
  def load(
    cls, workdir: str, step: int | None = None, mesh: Mesh | None = None
  ) -> "Policy":
    """Loads a run of `clp train` or `clp demo`.

    Args:
      workdir: the run's folder.
      step: a checkpoint; None takes the newest.
      mesh: None takes all devices as the data axis.

    Raises:
      RunError: when there is no such run or step, or it can't be read.
    """
    config = run_folder.load_config(workdir)
    model_config = run_folder.load_model_config(workdir)
    mesh = sharding.make_mesh() if mesh is None else mesh
    if "objectives" in config:  # a supervised run has neither
      bank = build.bank(config, model_config)
    else:
      bank = Bank(model_config, "none", num_sets=1)
    abstract = jax.eval_shape(
      bank.init,
      families.build(model_config).abstract(),
      jax.random.key(0),
    )
    shardings = sharding.param_shardings(mesh, bank.logical_axes, abstract)
    sets, step = saved_params.load_params(
      workdir, saved_params.abstract_like(abstract, shardings), step
    )
    vocabulary = run_folder.load_tokenizer(workdir)
    return cls(config, bank, sets, step, vocabulary, mesh, workdir)

  @property
  def objectives(self) -> tuple[str, ...]:
    """Names of the m rewards, in the order of weights; () without any."""
    return tuple(self.config.get("objectives", ()))

  @property
  def model_config(self) -> families.Config:
    """Of the policies."""
    return self.bank.model_config

  @property
  def model(self) -> Model:
    """That all policies are of."""
    return families.build(self.model_config)

  @property
  def mixes_logits(self) -> bool:
    """Whether a weighting combines the sets' logits, not their parameters."""
    return bool(self.objectives) and self.config.mixing == "logits"

  @functools.cached_property
  def reference(self) -> Params:
    """The frozen start's parameters, a T5 of `bank.reference_config`."""
    model = families.build(self.bank.reference_config)
    abstract = model.abstract()
    shardings = sharding.param_shardings(self.mesh, model.axes(), abstract)
    return run_folder.load_reference(
      self.workdir, saved_params.abstract_like(abstract, shardings)
    )

  def coefficients(
    self, weights: Weights | None, alpha: float | None = None
  ) -> np.ndarray:
    """[M] coefficients of a weighting, checked.

    Args:
      weights: name -> weight on the simplex; objectives left out weigh 0.
        None where there is but one.
      alpha: KL weight, for runs that were trained on a range of it.

    Raises:
      ValueError: for unknown names, weights off the simplex, an alpha that is
        missing or that this run was not trained for.
    """
    if not self.objectives:
      if weights is not None or alpha is not None:
        raise ValueError("this run has no objectives: give no weights.")
      return np.ones([1], np.float32)
    array, alpha = self.weighting(weights, alpha)
    q = build.distribution(self.config)
    on_host: Any = (array, np.asarray(alpha, np.float32))
    return np.asarray(q.coefficients(Weighting(*on_host)))

  def weighting(
    self, weights: Weights | None, alpha: float | None = None
  ) -> tuple[np.ndarray, float]:
    """([m] weights, alpha), checked; arguments as for `coefficients`.

    Raises:
      ValueError: as `coefficients`.
    """
    if weights is None:
      if len(self.objectives) > 1:
        raise ValueError(
          f"give weights for {', '.join(self.objectives)}, such as "
          f"{self.objectives[0]}=1."
        )
      weights = {self.objectives[0]: 1.0}
    array = weightings.weights_array(weights, self.objectives)
    q = build.distribution(self.config)
    if q.alpha_range is None:
      if alpha is not None and alpha != q.alpha:
        raise ValueError(
          f"this run was trained with the one alpha {q.alpha:g}, got "
          f"{alpha:g}; leave alpha out."
        )
      return array, q.alpha
    low, high = q.alpha_range
    if self.mixes_logits:
      low, high = 0.0, 1.0  # what was not trained for is extrapolated
    if alpha is None or not (low <= alpha <= high and alpha > 0):
      raise ValueError(
        f"this run is steered by alpha in {'(' if low == 0 else '['}{low:g}, "
        f"{high:g}] too, got {alpha}; give one of them."
      )
    return array, alpha

  def params(
    self, weights: Weights | None = None, alpha: float | None = None
  ) -> Params:
    """The ordinary parameter tree of a weighting.

    With soft tokens it holds theirs besides, [P, D], and its T5Config says so.

    Raises:
      ValueError: see `coefficients`; also where logits are mixed.
    """
    self._check_is_one_model()
    return self.steered(weights, alpha)

  def _check_is_one_model(self) -> None:
    if self.mixes_logits:
      raise ValueError(
        "this run mixes the logits of several models at every token; no one "
        "model's parameters do that. It can be generated from and evaluated."
      )

  def steered(
    self, weights: Weights | None = None, alpha: float | None = None
  ) -> Params | mixture.Mixture:
    """What `start` decodes a weighting with: parameters, or a mixture."""
    return self._mixed(self.coefficients(weights, alpha))

  def start(
    self,
    steered: Params | mixture.Mixture,
    encoder_input_tokens: jax.Array,
    *,
    num_samples: int = 1,
  ) -> tuple[decoding.NextLogits, decoding.Cache]:
    """What `decoding.sample_from` takes; inside of a jitted function.

    Args:
      steered: from `steered`.
      encoder_input_tokens: [B, S] int32.
      num_samples: N, a prompt.
    """
    start: Any = functools.partial(
      decoding.start, at_once=self.mesh.shape["data"]
    )
    if isinstance(steered, mixture.Mixture):
      start = mixture.start
    return start(
      self.model,
      steered,
      encoder_input_tokens,
      num_samples=num_samples,
      max_length=self.config.data.target_length,
    )

  def generate(
    self,
    texts: Sequence[str],
    weights: Weights | Sequence[Weights] | None = None,
    alpha: float | Sequence[float | None] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first_row: int = 0,
  ) -> list[str]:
    """Samples one response to each text.

    Args:
      texts: documents.
      weights: one weighting for all texts, or one per text.
      alpha: likewise.
      temperature: 0 decodes greedily.
      top_k: sample among the k likeliest tokens only; None is off.
      top_p: sample among the likeliest tokens of this mass; None is off.
      seed: row i's randomness depends on seed and i alone.
      first_row: the number i of the first text, for texts given in parts.

    Returns:
      The responses.

    Raises:
      ValueError: see `coefficients`; also for decoding settings out of range.
    """
    texts = list(texts)
    keys = row_keys(jax.random.key(seed), first_row + len(texts))[first_row:]
    tokens = self.tokenize(texts, weights, alpha)
    responses = [""] * len(texts)
    for coefficients, rows in self._batches(len(texts), weights, alpha):
      samples = self.sample(
        self._shorten(tokens[rows]),
        coefficients,
        keys[np.asarray(rows)],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
      )
      for i, response in zip(rows, self.decode(samples), strict=True):
        responses[i] = response
    return responses

  def score(
    self,
    texts: Sequence[str],
    responses: Sequence[str],
    weights: Weights | Sequence[Weights] | None = None,
    alpha: float | Sequence[float | None] | None = None,
  ) -> np.ndarray:
    """Log-probabilities of responses, summed over tokens, EOS included.

    Args:
      texts: documents.
      responses: as many; longer ones than data.target_length are cut.
      weights: one weighting for all texts, or one per text.
      alpha: likewise.

    Returns:
      [B] float32, nats.
    """
    texts, responses = list(texts), list(responses)
    if len(texts) != len(responses):
      raise ValueError(
        f"got {len(texts)} texts but {len(responses)} responses."
      )
    tokens = self.tokenize(texts, weights, alpha)
    limit = self.config.data.target_length
    targets = tokenizer.pad(
      [self.vocabulary.target(text, limit) for text in responses],
      limit,
      self.vocabulary.pad_id,
    )
    scores = np.zeros([len(texts)], np.float32)
    for coefficients, rows in self._batches(len(texts), weights, alpha):
      scores[rows] = np.asarray(
        self._score(
          *self._policy(coefficients, len(rows)),
          self._pad(self._shorten(tokens[rows])),
          self._pad(self._shorten(targets[rows])),
        )
      )[: len(rows)]
    return scores

  def sample(
    self,
    tokens: np.ndarray,
    coefficients: np.ndarray,
    keys: jax.Array,
    *,
    temperature: np.ndarray | float = 1.0,
    top_k: np.ndarray | int | None = None,
    top_p: np.ndarray | float | None = None,
    max_lengths: np.ndarray | int | None = None,
  ) -> decoding.Samples:
    """Samples a response to each row of tokens: what a server needs.

    A row's response depends on what the arguments hold for it, not on the
    other rows (up to float32 rounding, which the number of rows can change).
    All arguments are data: a program is compiled for a number of rows (padded
    to a power of two, of 64 at most a batch: cut longer requests), a length S,
    coefficients of one or of two dimensions, and each of top_k, top_p and
    max_lengths being None or not. Without None, nothing but shapes compiles.

    Args:
      tokens: [B, S] int32 as `tokenize` gives them, of any length S, padded.
      coefficients: float32 as `coefficients` gives them; [M] for all rows,
        whose one policy is mixed, or [B, M], which costs more: about M times
        the linear maps.
      keys: [B] typed keys.
      temperature: one or [B] float; 0 decodes greedily.
      top_k: one or [B] int; the vocabulary's size or None is off.
      top_p: one or [B] float; 1 or None is off.
      max_lengths: one or [B] int, tokens after which a row ends; None is
        data.target_length, which is the most.

    Returns:
      Samples, on the host, of the B rows.

    Raises:
      ValueError: for settings out of range, or of another number of rows.
    """
    rows = len(tokens)
    settings = {
      "temperature": (temperature, np.float32, lambda x: x >= 0, ">= 0"),
      "top_k": (top_k, np.int32, lambda x: x >= 1, "at least 1"),
      "top_p": (top_p, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
      "max_lengths": (max_lengths, np.int32, lambda x: x >= 1, "at least 1"),
    }
    arrays: dict[str, np.ndarray | None] = {}
    for name, (value, dtype, is_valid, valid) in settings.items():
      if value is None:
        arrays[name] = None
        continue
      array = np.asarray(value)
      if array.shape not in ((), (rows,)):
        raise ValueError(
          f"got {name} of shape {array.shape} for {rows} rows; give one for "
          "all, or one per row."
        )
      if not is_valid(array).all():
        raise ValueError(f"{name} must be {valid}, got {value}.")
      if dtype is np.int32:
        array = np.minimum(array, np.iinfo(np.int32).max)
      # Only now: the smallest top_p rounds to 0, which takes the likeliest.
      array = np.broadcast_to(array.astype(dtype), (rows,))
      arrays[name] = self._pad(array)
    samples = self._sample(
      *self._policy(coefficients, rows),
      self._pad(tokens),
      keys[self._padding(rows)],
      arrays,
    )
    return jax.tree.map(lambda x: np.asarray(x)[:rows], samples)

  def tokenize(
    self,
    texts: Sequence[str],
    weights: Weights | Sequence[Weights] | None = None,
    alpha: float | Sequence[float | None] | None = None,
  ) -> np.ndarray:
    """The model's inputs for texts.

    Args:
      texts: [B] documents.
      weights: as for `generate`; where weightings are part of the prompt.
      alpha: likewise.

    Returns:
      [B, S] int32, padded.
    """
    data = self.config.data
    tokens = tokenizer.inputs(
      self.vocabulary,
      texts,
      data.source_length,
      parse_template(data.template),
    )
    if self.prompts is None or not len(tokens):
      return tokens
    per_row = zip(
      _per_row("weights", len(texts), weights, Mapping),
      _per_row("alpha", len(texts), alpha, float | int),
      strict=True,
    )
    given = [self.weighting(w, a) for w, a in per_row]
    prompted = self._prepend(
      self._pad(tokens),
      Weighting(
        jnp.asarray(self._pad(np.stack([w for w, _ in given]))),
        jnp.asarray(self._pad(np.stack([a for _, a in given]))),
      ),
    )
    return np.asarray(prompted)[: len(tokens)]

  def decode(self, samples: decoding.Samples) -> list[str]:
    """The texts of samples."""
    return tokenizer.texts(
      self.vocabulary, np.asarray(samples.tokens), np.asarray(samples.mask)
    )

  def check_is_ordinary(self) -> None:
    """Raises ValueError if a policy is more than other programs' models are."""
    self._check_is_one_model()
    if self.bank.soft_tokens:
      raise ValueError(
        f"this run's policies have {self.bank.soft_tokens} soft tokens before "
        "their input, which an ordinary T5 has not; use `clp generate`, or "
        "train without soft_tokens.length."
      )

  def export(
    self,
    path: str,
    format: str,
    weights: Weights | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
  ) -> None:
    """Writes the policy of a weighting as an ordinary checkpoint.

    Args:
      path: the folder.
      format: one of `interop.FORMATS`; see `interop.save_model`.
      weights: one weighting.
      alpha: likewise.
      dtype: of the parameters written; None keeps theirs.

    Raises:
      ValueError: see `coefficients` and `interop.save_model`; also for a policy
        with soft tokens, which no other program's model has.
    """
    self.check_is_ordinary()
    params = self.params(weights, alpha)
    if dtype is not None:
      params = jax.tree.map(lambda p: p.astype(dtype), params)
    interop.save_model(
      path,
      self.model,
      params,
      format,
      tokenizer=self.vocabulary,
      step=self.step,
    )

  def _batches(
    self, num: int, weights: Any, alpha: Any
  ) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Row numbers computed together, with their coefficients [M] or [B, M].

    A weighting that fills batches has its policy mixed; the rows of the others
    have theirs mixed row by row.
    """
    per_row_weights = _per_row("weights", num, weights, Mapping)
    per_row_alpha = _per_row("alpha", num, alpha, float | int)
    groups: dict[bytes, list[int]] = {}
    coefficients = []
    for i, (w, a) in enumerate(
      zip(per_row_weights, per_row_alpha, strict=True)
    ):
      coefficients.append(self.coefficients(w, a))
      groups.setdefault(coefficients[i].tobytes(), []).append(i)
    rest = []
    for rows in groups.values():
      full = len(rows) // BATCH * BATCH
      for start in range(0, full, BATCH):
        yield coefficients[rows[0]], rows[start : start + BATCH]
      rest += rows[full:]
    rest.sort()
    for start in range(0, len(rest), BATCH):
      rows = rest[start : start + BATCH]
      mine = np.stack([coefficients[i] for i in rows])
      yield mine if (mine != mine[0]).any() else mine[0], rows

  def _policy(self, coefficients: np.ndarray, rows: int) -> tuple[Params, Any]:
    """(parameters, coefficients of the padded rows) for programs: a mixed
    policy and None, or the sets and [B, M]."""
    coefficients = np.asarray(coefficients, np.float32)
    if coefficients.ndim == 1:
      return self._mixed(coefficients), None
    if coefficients.shape[0] != rows:
      raise ValueError(
        f"got {coefficients.shape[0]} rows of coefficients for {rows} rows of "
        "tokens."
      )
    return self._stacked, self._pad(coefficients)

  @functools.cached_property
  def prompts(self) -> Prompts | None:
    """What the policy is told of a weighting; None without prompting."""
    if not self.objectives:
      return None
    return build.prompts(
      self.config, self.vocabulary, self.model_config.vocab_size
    )

  @functools.cached_property
  def _prepend(self):
    assert self.prompts is not None
    return jax.jit(self.prompts.prepend)

  def _padding(self, num: int) -> np.ndarray:
    """Row numbers of the compiled shape: the last one again is padding."""
    data = sharding.row_shards(self.mesh)
    power = 1 << (num - 1).bit_length()
    return np.minimum(np.arange(-(-power // data) * data), num - 1)

  def _shorten(self, tokens: np.ndarray) -> np.ndarray:
    """Cuts columns that are padding in all rows.

    Down to a power of two, of a block of attention at the least, so that few
    widths have to be compiled.

    Args:
      tokens: [B, S] int32, padded at the end.

    Returns:
      [B, up to S] int32.
    """
    is_text = (tokens != self.vocabulary.pad_id).any(axis=0)
    last = int(np.max(np.flatnonzero(is_text), initial=0))
    return tokens[:, : max(BLOCK, 1 << last.bit_length())]

  def _pad(self, rows: np.ndarray) -> np.ndarray:
    return rows[self._padding(len(rows))]

  @functools.cached_property
  def allowed(self) -> np.ndarray:
    """[V] bool, the tokens that may be sampled."""
    return self.vocabulary.allowed(self.model_config.vocab_size)

  def _mixed(self, coefficients: np.ndarray) -> Params:
    reference = self.reference if self.bank.needs_reference else {}
    return self._mix(self.sets, reference, coefficients)

  @functools.cached_property
  def _mix(self):
    if self.mixes_logits:
      return jax.jit(lambda sets, reference, c: mixture.unstack(sets, c))
    return jax.jit(
      self.bank.mix,
      out_shardings=sharding.param_shardings(
        self.mesh, self.model.axes(), self.model.abstract()
      ),
    )

  @functools.cached_property
  def _stacked(self) -> Params:
    """Sets, which rows are mixed from."""
    if self.bank.adapter is None and not self.bank.needs_reference:
      return self.sets
    reference = self.reference if self.bank.needs_reference else {}
    sets = self.bank.stacked if self.mixes_logits else self.bank.row_sets
    return jax.jit(sets)(self.sets, reference)

  def _mix_rows(
    self, params: Params, coefficients: jax.Array | None
  ) -> Params | mixture.Mixture:
    """What `_policy` gave, as what `start` takes."""
    if coefficients is None:
      return params
    if self.mixes_logits:
      return mixture.unstack(params, coefficients)
    return row_mixing.mix_rows(params, self.bank.steerable, coefficients)

  @functools.cached_property
  def _sample(self):
    rows = sharding.row_sharding(self.mesh)

    @functools.partial(jax.jit, out_shardings=rows)
    def sample(params, coefficients, tokens, keys, settings):
      next_logits, cache = self.start(
        self._mix_rows(params, coefficients),
        jax.lax.with_sharding_constraint(tokens, rows),
      )
      return decoding.sample_from(
        next_logits,
        cache,
        keys,
        Sampling(
          self.allowed,
          self.model_config.eos_ids,
          self.model_config.pad_id,
          temperature=settings["temperature"],
          top_k=settings["top_k"],
          top_p=settings["top_p"],
          row_lengths=settings["max_lengths"],
        ),
        self.config.data.target_length,
      )

    return sample

  @functools.cached_property
  def _score(self):
    @jax.jit
    def score(params, coefficients, tokens, targets):
      model = self.model
      params = self._mix_rows(params, coefficients)
      if isinstance(params, mixture.Mixture):
        logp = mixture.token_logp(model, params, tokens, targets)
      else:
        logp = decoding.score_tokens(model, params, tokens, targets).logp
      is_text = targets != model.config.pad_id
      return jnp.where(is_text, logp, 0).sum(-1)

    return score


def _per_row(name, num, value, kind):
  if value is None or isinstance(value, kind):
    return [value] * num
  value = list(value)
  if len(value) != num:
    raise ValueError(
      f"got {len(value)} {name} for {num} texts; give one for all, or one "
      "per text."
    )
  return value

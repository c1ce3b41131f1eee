"""Policy: a trained run as one steerable language model.

  policy = Policy.load("runs/demo")
  policy.generate(["..."], weights={"nli": 0.7, "rouge": 0.3})

For every weighting it mixes an ordinary model from the parameter sets and runs
that; nothing is trained and nothing is stored per weighting. Rows that differ
in their weightings are computed together, from the sets.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import (
  build,
  generation,
  interop,
  keys,
  run_folder,
  saved_params,
  sharding,
)
from clp_jax.bank import Bank
from clp_jax.data import tokenizer
from clp_jax.data.tokenizer import Tokenizer, parse_template
from clp_jax.generation import RowDecoder
from clp_jax.models import decoding, families, mixture
from clp_jax.models.model import Model, Params
from clp_jax.prompting import Prompts
from clp_jax.rollout import keys_of_rows
from clp_jax.weightings import Weighting, WeightingSpace, Weights, per_text


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
  """Parameter sets, model and vocabulary, for any weighting.

  Attributes:
    config: of the run.
    bank: how a weighting makes a model of the sets.
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
    model = families.build(model_config)
    abstract = jax.eval_shape(
      lambda start: bank.init(start, jax.random.key(0)), model.abstract()
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
    """The frozen start's parameters, of `bank.reference_config`."""
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
    return self.weighting_space.coefficients(weights, alpha)

  def params(
    self, weights: Weights | None = None, alpha: float | None = None
  ) -> Params:
    """The ordinary parameter tree of a weighting.

    With soft tokens it holds theirs besides, [P, D], and its config says so.

    Raises:
      ValueError: see `coefficients`; also where logits are mixed.
    """
    self._check_is_one_model()
    return self._mix_sets(
      self.sets, self._frozen, self.coefficients(weights, alpha)
    )

  def _check_is_one_model(self) -> None:
    if self.mixes_logits:
      raise ValueError(
        "this run mixes the logits of several models at every token; no one "
        "model's parameters do that. It can be generated from and evaluated."
      )

  def mix(
    self, weights: Weights | None = None, alpha: float | None = None
  ) -> Params | mixture.Mixture:
    """What `decoder` decodes a weighting with: parameters, or a mixture."""
    return self._policy_of(self.coefficients(weights, alpha))

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
    numbers = first_row + self._padding(len(texts))
    row_keys = _row_keys(keys.of_seed(seed), numbers)
    tokens = self.tokenize(texts, weights, alpha)
    responses = [""] * len(texts)
    for coefficients, rows in self._batches(len(texts), weights, alpha):
      samples = self.sample(
        self._shorten(tokens[rows]),
        coefficients,
        _some(row_keys, np.asarray(rows)),
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
        self.decoder.score(
          *self._params_of_rows(coefficients, len(rows)),
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
        whose one policy is mixed, or [B, M], which costs more: of whole sets
        about M times the linear maps.
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
      "temperature": generation.per_row("temperature", temperature, rows),
      "top_k": generation.per_row("top_k", top_k, rows),
      "top_p": generation.per_row("top_p", top_p, rows),
      "row_lengths": generation.per_row("max_lengths", max_lengths, rows),
    }
    samples = self.decoder.sample(
      *self._params_of_rows(coefficients, rows),
      self._pad(tokens),
      _some(keys, self._padding(rows)),
      jax.tree.map(self._pad, settings),
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
    each = per_text(len(texts), weights, alpha)
    given = [self.weighting_space.weighting(*one) for one in each]
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
        "their input, which an ordinary model has not; use `clp generate`, or "
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

  @functools.cached_property
  def weighting_space(self) -> WeightingSpace:
    """The weightings that may be given; of a run with objectives."""
    return WeightingSpace(
      self.objectives, build.distribution(self.config), self.mixes_logits
    )

  @functools.cached_property
  def prompts(self) -> Prompts | None:
    """What the policy is told of a weighting; None without prompting."""
    if not self.objectives:
      return None
    return build.prompts(
      self.config, self.vocabulary, self.model_config.vocab_size
    )

  @functools.cached_property
  def allowed(self) -> np.ndarray:
    """[V] bool, the tokens that may be sampled."""
    return self.vocabulary.allowed(self.model_config.vocab_size)

  @functools.cached_property
  def decoder(self) -> RowDecoder:
    """What decodes rows, of a policy from `mix` or mixed from `row_sets`."""
    return RowDecoder(
      self.model,
      self.bank.steerable,
      self.mixes_logits,
      self.mesh,
      self.config.data.target_length,
      self.allowed,
    )

  @functools.cached_property
  def row_sets(self) -> Params:
    """The sets that rows with coefficients of their own are mixed from."""
    if self.bank.adapter is None and not self.bank.needs_reference:
      return self.sets
    sets = self.bank.stacked if self.mixes_logits else self.bank.row_sets
    return jax.jit(sets)(self.sets, self._frozen)

  @property
  def _frozen(self) -> Params:
    """What the bank takes from the reference, if anything."""
    return self.reference if self.bank.needs_reference else {}

  def _params_of_rows(
    self, coefficients: np.ndarray, rows: int
  ) -> tuple[Params, np.ndarray | None]:
    """What `RowDecoder.policies` takes for the padded rows."""
    coefficients = np.asarray(coefficients, np.float32)
    if coefficients.ndim == 1:
      return self._policy_of(coefficients), None
    if coefficients.shape[0] != rows:
      raise ValueError(
        f"got {coefficients.shape[0]} rows of coefficients for {rows} rows of "
        "tokens."
      )
    return self.row_sets, self._pad(coefficients)

  def _batches(self, num: int, weights: Any, alpha: Any) -> Any:
    """`generation.batches` of as many texts."""
    each = per_text(num, weights, alpha)
    return generation.batches([self.coefficients(*one) for one in each])

  def _shorten(self, tokens: np.ndarray) -> np.ndarray:
    return generation.shorten(tokens, self.vocabulary.pad_id)

  def _padding(self, num: int) -> np.ndarray:
    """Row numbers of the compiled shape."""
    power = 1 << (num - 1).bit_length()
    return generation.padding(num, self.decoder.whole(power))

  def _pad(self, rows: np.ndarray) -> np.ndarray:
    return rows[self._padding(len(rows))]

  @functools.cached_property
  def _prepend(self):
    assert self.prompts is not None
    return jax.jit(self.prompts.prepend)

  def _policy_of(self, coefficients: np.ndarray) -> Params | mixture.Mixture:
    if self.mixes_logits:
      return jax.jit(mixture.unstack)(self.sets, coefficients)
    narrow = self.model_config.compute_dtype != jnp.float32
    if self.bank.adapter is not None and narrow:
      # Rounded to fewer digits, a merged kernel would lose small changes, which
      # training and rows with weightings of their own keep.
      return self._unmerged(self.sets, self._frozen, coefficients)
    return self._mix_sets(self.sets, self._frozen, coefficients)

  @functools.cached_property
  def _mix_sets(self):
    return jax.jit(
      self.bank.mix,
      out_shardings=sharding.param_shardings(
        self.mesh, self.model.axes(), self.model.abstract()
      ),
    )

  @functools.cached_property
  def _unmerged(self):
    return jax.jit(self.bank.policies)


_row_keys = jax.jit(keys_of_rows)


def _some(keys: jax.Array, rows: np.ndarray) -> jax.Array:
  """Of typed keys [B], those of some rows; JAX would compile six programs."""
  data = np.asarray(jax.random.key_data(keys))[rows]
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))

"""Policy: a trained run as one steerable language model.

  policy = Policy.load("runs/demo")
  policy.generate(["..."], weights={"nli": 0.7, "rouge": 0.3})

For every weighting it mixes an ordinary T5 from the parameter sets and runs
that; nothing is trained and nothing is stored per weighting.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import config as config_lib
from clp_jax import interop, run_folder, sharding, weightings
from clp_jax.bank import Bank
from clp_jax.models import decoding, mixture, t5
from clp_jax.prompting import Prompts
from clp_jax.rollout import row_keys
from clp_jax.train import checkpoints
from clp_jax.weightings import Weighting

Params = Any
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
    vocabulary: seqio SentencePieceVocabulary.
    mesh: where all of it lies.
    workdir: the run's folder.
  """

  config: ml_collections.ConfigDict
  bank: Bank
  sets: Params
  step: int
  vocabulary: Any
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
    # Lazily: seqio's vocabularies import TensorFlow.
    from clp_jax.data.vocabulary import load_vocabulary

    config = run_folder.load_config(workdir)
    model_config = run_folder.load_model_config(workdir)
    mesh = sharding.make_mesh() if mesh is None else mesh
    if "objectives" in config:  # a supervised run has neither
      bank = config_lib.bank(config, model_config)
    else:
      bank = Bank(model_config, "none", num_sets=1)
    abstract = jax.eval_shape(
      bank.init, t5.abstract_params(model_config), jax.random.key(0)
    )
    shardings = sharding.param_shardings(mesh, bank.logical_axes, abstract)
    sets, step = checkpoints.load_params(
      workdir, checkpoints.abstract_like(abstract, shardings), step
    )
    vocabulary = load_vocabulary(run_folder.vocabulary_path(workdir))
    return cls(config, bank, sets, step, vocabulary, mesh, workdir)

  @property
  def objectives(self) -> tuple[str, ...]:
    """Names of the m rewards, in the order of weights; () without any."""
    return tuple(self.config.get("objectives", ()))

  @property
  def model_config(self) -> t5.T5Config:
    """Of the policies."""
    return self.bank.model_config

  @property
  def mixes_logits(self) -> bool:
    """Whether a weighting combines the sets' logits, not their parameters."""
    return bool(self.objectives) and self.config.mixing == "logits"

  @functools.cached_property
  def reference(self) -> Params:
    """The frozen start's parameters, a T5 of `bank.reference_config`."""
    model_config = self.bank.reference_config
    abstract = t5.abstract_params(model_config)
    shardings = sharding.param_shardings(
      self.mesh, t5.logical_axes(model_config), abstract
    )
    return run_folder.load_reference(
      self.workdir, checkpoints.abstract_like(abstract, shardings)
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
    q = config_lib.distribution(self.config)
    return np.asarray(
      q.coefficients(Weighting(jnp.asarray(array), jnp.float32(alpha)))
    )

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
    q = config_lib.distribution(self.config)
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
    """The ordinary T5 parameter tree of a weighting.

    With soft tokens it holds theirs besides, [P, D], and its T5Config says so.

    Raises:
      ValueError: see `coefficients`; also where logits are mixed.
    """
    if self.mixes_logits:
      raise ValueError(
        "this run mixes the logits of several models at every token; no one "
        "model's parameters do that. It can be generated from and evaluated."
      )
    return self.steered(weights, alpha)

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
    start: Any = decoding.start
    if isinstance(steered, mixture.Mixture):
      start = mixture.start
    return start(
      t5.T5(self.model_config),
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
    if not temperature >= 0:
      raise ValueError(f"temperature must be >= 0, got {temperature}.")
    if top_k is not None and top_k < 1:
      raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
      raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    from clp_jax.data import tasks

    texts = list(texts)
    keys = row_keys(jax.random.key(seed), first_row + len(texts))[first_row:]
    responses = [""] * len(texts)
    for coefficients, rows in self._by_weighting(len(texts), weights, alpha):
      policy = self._mixed(coefficients)
      for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        samples = self._sample(
          policy,
          self._tokenize(chunk, texts, weights, alpha),
          keys[_pad_rows(np.asarray(chunk), self._batch_rows(len(chunk)))],
          temperature,
          top_k=top_k,
          top_p=top_p,
        )
        decoded = tasks.decode_tokens(
          self.vocabulary,
          np.asarray(samples.tokens)[: len(chunk)],
          np.asarray(samples.mask)[: len(chunk)],
        )
        for i, response in zip(chunk, decoded, strict=True):
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
    from clp_jax.data import tasks

    texts, responses = list(texts), list(responses)
    if len(texts) != len(responses):
      raise ValueError(
        f"got {len(texts)} texts but {len(responses)} responses."
      )
    scores = np.zeros([len(texts)], np.float32)
    for coefficients, rows in self._by_weighting(len(texts), weights, alpha):
      policy = self._mixed(coefficients)
      for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        targets = tasks.tokenize_inputs(
          self.vocabulary,
          [responses[i] for i in chunk],
          self.config.data.target_length,
        )
        scores[chunk] = np.asarray(
          self._score(
            policy,
            self._tokenize(chunk, texts, weights, alpha),
            _pad_rows(targets, self._batch_rows(len(chunk))),
          )
        )[: len(chunk)]
    return scores

  def check_is_t5(self) -> None:
    """Raises ValueError if a policy is more than other programs' T5s are."""
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
    """Writes the policy of a weighting as an ordinary T5 checkpoint.

    Args:
      path: the folder.
      format: one of `interop.FORMATS`; see `interop.save_t5`.
      weights: one weighting.
      alpha: likewise.
      dtype: of the parameters written; None keeps theirs.

    Raises:
      ValueError: see `coefficients` and `interop.save_t5`; also for a policy
        with soft tokens, which no other program's T5 has.
    """
    self.check_is_t5()
    params = self.params(weights, alpha)
    if dtype is not None:
      params = jax.tree.map(lambda p: p.astype(dtype), params)
    interop.save_t5(
      path,
      self.model_config,
      params,
      format,
      vocabulary=run_folder.load_vocabulary_bytes(self.workdir),
      step=self.step,
    )

  def _by_weighting(self, num, weights, alpha):
    """Rows that share a weighting: [(coefficients [M], row numbers)]."""
    per_row_weights = _per_row("weights", num, weights, Mapping)
    per_row_alpha = _per_row("alpha", num, alpha, float | int)
    groups: dict[bytes, tuple[np.ndarray, list[int]]] = {}
    for i, (w, a) in enumerate(
      zip(per_row_weights, per_row_alpha, strict=True)
    ):
      coefficients = self.coefficients(w, a)
      key = coefficients.tobytes()
      groups.setdefault(key, (coefficients, []))[1].append(i)
    return list(groups.values())

  def _tokenize(self, chunk, texts, weights, alpha) -> np.ndarray:
    """[b, S] tokens of the texts of these numbers, with what prompts say."""
    from clp_jax.data import tasks

    data = self.config.data
    tokens = tasks.tokenize_inputs(
      self.vocabulary,
      [texts[i] for i in chunk],
      data.source_length,
      data.template,
    )
    rows = self._batch_rows(len(chunk))
    tokens = _pad_rows(tokens, rows)
    if self.prompts is None:
      return tokens
    per_row = zip(
      _per_row("weights", len(texts), weights, Mapping),
      _per_row("alpha", len(texts), alpha, float | int),
      strict=True,
    )
    given = [self.weighting(w, a) for w, a in per_row]
    return self._prepend(
      tokens,
      Weighting(
        jnp.asarray(_pad_rows(np.stack([given[i][0] for i in chunk]), rows)),
        jnp.asarray(_pad_rows(np.stack([given[i][1] for i in chunk]), rows)),
      ),
    )

  @functools.cached_property
  def prompts(self) -> Prompts | None:
    """What the policy is told of a weighting; None without prompting."""
    if not self.objectives:
      return None
    return config_lib.prompts(
      self.config, self.vocabulary, self.model_config.vocab_size
    )

  @functools.cached_property
  def _prepend(self):
    assert self.prompts is not None
    return jax.jit(self.prompts.prepend)

  def _batch_rows(self, num: int) -> int:
    """Rows of the compiled shape that `num` rows are padded to."""
    data = self.mesh.shape["data"]
    power = 1 << (num - 1).bit_length()
    return -(-power // data) * data

  @functools.cached_property
  def allowed(self) -> np.ndarray:
    """[V] bool, the tokens that may be sampled."""
    from clp_jax.data.vocabulary import allowed_tokens

    return allowed_tokens(self.vocabulary, self.model_config.vocab_size)

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
        self.mesh,
        t5.logical_axes(self.model_config),
        t5.abstract_params(self.model_config),
      ),
    )

  @functools.cached_property
  def _sample(self):
    rows = sharding.row_sharding(self.mesh)

    @functools.partial(
      jax.jit,
      static_argnames=("top_k", "top_p", "num_samples"),
      out_shardings=rows,
    )
    def sample(
      params, tokens, keys, temperature, top_k=None, top_p=None, num_samples=1
    ):
      next_logits, cache = self.start(
        params,
        jax.lax.with_sharding_constraint(tokens, rows),
        num_samples=num_samples,
      )
      return decoding.sample_from(
        next_logits,
        cache,
        keys,
        max_length=self.config.data.target_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        allowed=self.allowed,
      )

    return sample

  @functools.cached_property
  def _score(self):
    @jax.jit
    def score(params, tokens, targets):
      model = t5.T5(self.model_config)
      if isinstance(params, mixture.Mixture):
        logp = mixture.token_logp(model, params, tokens, targets)
      else:
        logp, _ = decoding.token_logp(model, params, tokens, targets)
      return jnp.where(targets > 0, logp, 0).sum(-1)

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


def _pad_rows(rows: np.ndarray, num: int) -> np.ndarray:
  """Repeats the last row up to `num` rows; the copies are dropped later."""
  return rows[np.minimum(np.arange(num), len(rows) - 1)]

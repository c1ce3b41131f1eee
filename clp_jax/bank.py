"""The bank: what a run trains, and how a weighting makes one T5 of it.

`Bank.init` makes the tree that is trained, and only that: the optimizer sees
nothing else. What is frozen is the reference, and is taken from there. For
coefficients c, `Bank.mix` gives the parameters of one policy. By kind:

  full, attention, logits, none   the T5's tree, steerable leaves [M, ...]
                                  (conditioning.py)
  lora, svd_lora                  the factors of low-rank changes to frozen
                                  kernels (adapters.py), in the T5's tree where
                                  the kernels are

To any of them can be added soft tokens [M, P, D], learned embeddings before the
encoder's input. The set of the KL term can be frozen at the reference: it is
then neither stored nor trained, and at alpha = 1 what is steered is the
reference bit for bit. Parameters that all weightings share are trained too, or
frozen at the reference.

Every kind is linear in c: `stacked` gives any bank as plain parameter sets.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from clp_jax import adapters, conditioning
from clp_jax.low_rank import LowRank
from clp_jax.models import families

Params = Any
STEERING = ("full", "attention", "logits", "lora", "svd_lora", "none")
KL_SETS = ("trained", "frozen")
SHARED = ("trained", "frozen")
_SOFT_TOKENS = ("soft_tokens", "embedding")


class Counts(NamedTuple):
  """Numbers of parameters."""

  trained: int  # that the optimizer changes
  stored: int  # that a policy of any weighting is made from


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
  """A way to condition a T5 on a weighting.

  Attributes:
    reference_config: the T5 that is conditioned.
    kind: one of STEERING.
    num_sets: M, coefficients of a weighting.
    frozen_kl: the last set is the reference's.
    frozen_shared: parameters that no weighting changes are the reference's.
    soft_tokens: P, 0 for none.
    adapter: of the kinds lora and svd_lora, else None.
  """

  reference_config: families.Config
  kind: str
  num_sets: int
  frozen_kl: bool = False
  frozen_shared: bool = False
  soft_tokens: int = 0
  adapter: adapters.Adapter | None = None

  def __post_init__(self):
    if self.frozen_kl and self.num_sets < 2:
      raise ValueError("a frozen KL set needs other sets beside it.")
    if self.frozen_kl and self.soft_tokens:
      raise ValueError(
        "the reference has no soft tokens, so that its set of them can't be "
        "frozen; set conditioning.kl_set=trained or leave out "
        "soft_tokens.length."
      )
    if self.kind == "none" and self.frozen_shared and not self.soft_tokens:
      raise ValueError(
        "steering none with conditioning.shared=frozen leaves nothing to "
        "train; choose a steering, soft_tokens.length or shared=trained."
      )

  @property
  def model_config(self) -> families.Config:
    """Of the policies: soft tokens are part of their T5."""
    return dataclasses.replace(
      self.reference_config, soft_tokens=self.soft_tokens
    )

  @functools.cached_property
  def steerable(self) -> Params:
    """Over a policy's tree: True where a leaf depends on the weighting."""
    flat = self._has_sets.items()
    return unflatten_dict({p: s or bool(self._adapter_of(p)) for p, s in flat})

  @functools.cached_property
  def policy_axes(self) -> Params:
    """jax.vmap's in_axes for G `policies`; where LowRanks stand for kernels,
    the diagonal alone is [G, ...]."""
    adapted = LowRank(None, None, None, 0)  # type: ignore[arg-type]
    return unflatten_dict(
      {
        p: adapted if self._adapter_of(p) else 0 if s else None
        for p, s in self._has_sets.items()
      }
    )

  def init(self, reference: Params, key: jax.Array) -> Params:
    """What is trained, before the first update: the policy of every weighting
    is the reference, but for soft tokens.

    Args:
      reference: an ordinary T5's parameters.
      key: of factors that start random.
    """
    trained = self.num_sets - self.frozen_kl
    ordered = sorted(flatten_dict(reference).items())
    first = dict(ordered)
    if self.soft_tokens:
      table = reference["token_embedder"]["embedding"]
      first[_SOFT_TOKENS] = self._first_soft_tokens(table)
    if self.frozen_shared:
      first = {p: x for p, x in first.items() if self._has_sets[p]}
    has_sets = {p: self._has_sets[p] for p in first}
    flat = conditioning.expand(first, has_sets, trained)
    for number, (path, leaf) in enumerate(ordered):
      if adapter := self._adapter_of(path):
        own = jax.random.fold_in(key, number)
        flat |= _beside(path, adapter.init(leaf, trained, own))
    return unflatten_dict(flat)

  def update_scales(self, reference: Params) -> dict[tuple[str, ...], Any]:
    """What leaves that start at 0 count as large, for optimizers that ask.

    Returns:
      {path of a trained leaf: [M, L] float32 or less, its stacking dimensions},
      of the adapters' leaves that `adapters.Adapter.update_scales` names.
    """
    scales: dict[tuple[str, ...], Any] = {}
    for path, leaf in flatten_dict(reference).items():
      if adapter := self._adapter_of(path):
        scales |= _beside(path, adapter.update_scales(leaf))
    return scales

  def mix(
    self, params: Params, reference: Params, coefficients: jax.Array
  ) -> Params:
    """The policy of a weighting, or of G.

    Args:
      params: what `init` makes and training changes.
      reference: an ordinary T5's parameters; frozen parts are taken from it.
        Read only where the bank has some (`needs_reference`).
      coefficients: [M] float32 on the simplex, or [G, M].

    Returns:
      Parameters of a T5 of `model_config`; for [G, M] coefficients the leaves
      that `steerable` marks are [G, ...].

    Raises:
      ValueError: when there are not as many coefficients as sets.
    """
    return self._mixed(params, reference, coefficients, merged=True)

  def policies(
    self, params: Params, reference: Params, coefficients: jax.Array
  ) -> Params:
    """`mix` for G policies that run together, or as sets of rows to come.

    Adapted kernels are LowRanks, which hold the base and the factors once, and
    no gradient of theirs goes through a whole kernel. Args as for `mix`.
    """
    return self._mixed(params, reference, coefficients, merged=False)

  def _mixed(
    self,
    params: Params,
    reference: Params,
    coefficients: jax.Array,
    *,
    merged: bool,
  ) -> Params:
    coefficients = jnp.asarray(coefficients, jnp.float32)
    if coefficients.shape[-1] != self.num_sets:
      raise ValueError(
        f"there are {coefficients.shape[-1]} coefficients for "
        f"{self.num_sets} parameter sets; give one for each."
      )
    trained = flatten_dict(params)
    frozen = flatten_dict(reference) if self.needs_reference else {}
    flat = {p: x for p, x in (frozen | trained).items() if p in self._has_sets}
    if self.frozen_kl:
      flat |= {
        p: jnp.concatenate([trained[p], frozen[p][None]])
        for p, has_sets in self._has_sets.items()
        if has_sets
      }
    mixed = conditioning.mix(flat, self._has_sets, coefficients)
    for path, kernel in flat.items():
      if adapter := self._adapter_of(path):
        leaves = {
          p[-1]: x
          for p, x in trained.items()
          if p[:-1] == path[:-1] and p != path
        }
        adapt = adapter.adapt if merged else adapter.unmerged
        mixed[path] = adapt(kernel, leaves, coefficients)
    return unflatten_dict(mixed)

  def stacked(self, params: Params, reference: Params) -> Params:
    """The bank as plain sets: steerable leaves [M, ...], shared ones [...]."""
    return self.mix(params, reference, jnp.eye(self.num_sets))

  def row_sets(self, params: Params, reference: Params) -> Params:
    """What `row_mixing.mix_rows` mixes rows from."""
    return self.policies(params, reference, jnp.eye(self.num_sets))

  def counts(self) -> Counts:
    """How many numbers the bank trains, and what steering by it has to keep."""
    reference = families.build(self.reference_config).abstract()
    params = jax.eval_shape(self.init, reference, jax.random.key(0))
    trained = sum(leaf.size for leaf in jax.tree.leaves(params))
    frozen = sum(
      leaf.size
      for path, leaf in flatten_dict(reference).items()
      if (self.frozen_kl if self._has_sets[path] else self.frozen_shared)
    )
    return Counts(trained, stored=trained + frozen)

  @property
  def needs_reference(self) -> bool:
    """Whether `mix` takes something from the reference."""
    return self.frozen_kl or self.frozen_shared

  @functools.cached_property
  def logical_axes(self) -> Params:
    """Logical axes of what is trained, a tuple of names for each array."""
    flat: dict[tuple[str, ...], Any] = {}
    axes = flatten_dict(families.build(self.model_config).axes())
    for path, names in axes.items():
      if adapter := self._adapter_of(path):
        flat |= _beside(path, adapter.logical_axes(names))
      if self._has_sets[path]:
        flat[path] = ("objective", *names)
      elif not self.frozen_shared:
        flat[path] = names
    return unflatten_dict(flat)

  @functools.cached_property
  def _has_sets(self) -> dict[tuple[str, ...], bool]:
    """Of a policy's leaves, which themselves, and no adapters of theirs, exist
    M times."""
    abstract = families.build(self.model_config).abstract()
    kind = "none" if self.adapter is not None else self.kind
    return flatten_dict(conditioning.steerable_leaves(abstract, kind))

  def _adapter_of(self, path: tuple[str, ...]) -> adapters.Adapter | None:
    """That of the leaf at a path, if it has one."""
    adapter = self.adapter
    return adapter if adapter and adapter.adapts(path) else None

  def _first_soft_tokens(self, table: jax.Array) -> jax.Array:
    """[V, D] -> [P, D]: the end of sequence, which tells of no document."""
    if not self.reference_config.eos_ids:
      raise ValueError(
        "soft tokens start as the end of sequence; give the model's "
        "config the eos_ids of its vocabulary."
      )
    first = table[self.reference_config.eos_ids[0]]
    return jnp.broadcast_to(first, (self.soft_tokens, table.shape[1]))


def _beside(path: tuple[str, ...], leaves: adapters.Leaves) -> Params:
  """The leaves of an adapter by their paths, next to its kernel's."""
  return {(*path[:-1], name): leaf for name, leaf in leaves.items()}

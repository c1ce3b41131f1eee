"""The programs that training runs, compiled on shapes alone.

They come from the functions that training itself calls: `sft.make_programs`,
`moft.make_programs` and the rewards' `row_program`.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clp_jax import build, sharding
from clp_jax.errors import ConfigError, as_config_error
from clp_jax.initial import load_model_config, load_vocabulary_of
from clp_jax.interop import classifiers
from clp_jax.models import families
from clp_jax.models.model import Model
from clp_jax.plan import hlo
from clp_jax.rewards import classifier, entailment, preference
from clp_jax.rewards import model as models
from clp_jax.rewards.base import MODELS
from clp_jax.train import moft, sft

Tree = Any


class Job(NamedTuple):
  """A program before it is compiled.

  Attributes:
    name: "sft", "rollout", "reference", "reward NAME" or "update".
    program: jitted.
    arguments: abstract.
    calls: a training step makes.
    useful: FLOPs of one call by formula, on all chips.
    held: bytes a chip by kind, of what lies there though it is no argument.
    caches: bytes a chip of what decoding keeps.
  """

  name: str
  program: Callable
  arguments: tuple
  calls: int
  useful: float
  held: dict[str, int]
  caches: int = 0


class Compiled(NamedTuple):
  """What the compiler says of a job.

  Attributes:
    job: that was compiled.
    costs: of a call, one chip; None when it did not fit, or nobody asked.
    temporary: bytes a chip beside arguments and results.
    results: bytes a chip, without those that take an argument's place.
    needed: bytes a chip that the compiler needed in vain; None when it fits.
    seconds: that compiling took.
  """

  job: Job
  costs: hlo.Costs | None
  temporary: int
  results: int
  needed: float | None
  seconds: float


def bytes_per_chip(tree: Tree, shardings: Tree) -> int:
  """Of abstract arrays under their shardings."""
  sizes = jax.tree.map(
    lambda x, s: int(np.prod(s.shard_shape(x.shape))) * _item_size(x.dtype),
    tree,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))


def _item_size(dtype: Any) -> int:
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return 8  # two words
  return np.dtype(dtype).itemsize


def fill_presets(config: ml_collections.ConfigDict) -> None:
  """Names the presets of `plan` where a config leaves models to be given, and
  files where it leaves the data: no program depends on them."""
  if config.data.task is None and config.data.train is None:
    config.data.train = config.data.eval = "to be given"
  if config.model.init is None:
    config.model.init = config.plan.model
  for name in config.objectives:
    reward = config.rewards[name]
    if "model" in reward and reward.model is None:
      reward.model = config.plan.reward_model


def jobs(config: ml_collections.ConfigDict, mesh: Mesh) -> Iterator[Job]:
  """The config's programs, in the order of their use.

  Args:
    config: a valid training config; `model.init` and the models of rewards may
      be presets.
    mesh: of any devices.

  Raises:
    ConfigError: when the config's numbers do not fit the mesh, or it names a
      model that is nowhere.
  """
  # Presets of public sizes have no vocabulary to ask, and no program depends on
  # which token ends a response.
  model_config = dataclasses.replace(load_model_config(config), eos_ids=(1,))
  data, rollout = config.data, config.rollout
  lengths = (data.source_length, data.target_length)
  build.check_rows("rollout.prompts", rollout.prompts, mesh)
  prompts = None
  if config.prompting.style != "none":
    prompts = build.prompts(
      config, load_vocabulary_of(config), model_config.vocab_size
    )
  key = jax.eval_shape(lambda: jax.random.key(0))
  model = families.build(model_config)
  reference = model.abstract()

  def tokens(rows, length):
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)

  if config.sft.steps:
    batch = config.sft.batch
    build.check_rows("sft.batch", batch, mesh)
    shown = prompts if config.prompting.sft_share else None
    supervised = sft.make_programs(config, model_config, mesh, shown)
    state = jax.eval_shape(supervised.init, reference, key)
    work = 3 * model.flops(batch, batch, *lengths)
    held = _state_bytes(state, supervised.state_shardings)
    examples = (state, *(tokens(batch, length) for length in lengths))
    yield Job("sft", supervised.update, examples, 0, work, held)
  allowed = np.arange(model_config.vocab_size) != model_config.pad_id
  programs = moft.make_programs(config, model_config, mesh, allowed, prompts)
  state = jax.eval_shape(programs.init, reference, key)
  rows = rollout.prompts * rollout.samples
  held = _state_bytes(state, programs.state_shardings)
  held["reference"] = bytes_per_chip(reference, programs.reference_shardings)
  pending = programs.abstract_state(reference, key).pending
  if pending is not None:
    held["pending rollout"] = bytes_per_chip(
      pending, programs.rollout_shardings
    )
  with as_config_error():
    judges = list(_judges(config, mesh))
  held["reward models"] = sum(j.held["reward models"] for j in judges)
  sizes = (rollout.prompts, rows)
  prompts = tokens(rollout.prompts, data.source_length)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  arguments = (state.params, reference, prompts, key, number, state.front)
  forward = model.flops(*sizes, *lengths)
  caches = _cache_bytes(config, model, mesh)
  yield Job("rollout", programs.rollout, arguments, 1, forward, held, caches)
  sampled = jax.eval_shape(programs.rollout, *arguments)
  scored = (reference, prompts, sampled.tokens, sampled.mask)
  yield Job("reference", programs.reference, scored, 1, forward, held)
  for judge in judges:
    yield judge._replace(held=held)
  sampled = dataclasses.replace(
    sampled, ref_logp=jax.eval_shape(programs.reference, *scored)
  )
  rewards = jax.ShapeDtypeStruct((rows, len(config.objectives)), jnp.float32)
  trained = (state, sampled, rewards, reference)
  # Forward passes that the update is worth: a gradient takes two more, and what
  # the critic and the old policy say comes first.
  passes = 1 + 3 * config.ppo.epochs if build.has_critic(config) else 3
  work = passes * forward
  yield Job("update", programs.update, trained, 1, work, held)


def _state_bytes(state: Any, shardings: Any) -> dict[str, int]:
  return {
    "parameters": bytes_per_chip(state.params, shardings.params),
    "optimizer": bytes_per_chip(state.opt_state, shardings.opt_state),
  }


def _cache_bytes(
  config: ml_collections.ConfigDict, model: Model, mesh: Mesh
) -> int:
  """Keys and values that decoding keeps on a chip."""
  prompts, data = config.rollout.prompts, config.data
  rows = prompts * config.rollout.samples
  context, cache = jax.eval_shape(
    lambda params, tokens: (
      model.read(params, tokens).layers,
      model.empty_cache(rows, data.target_length),
    ),
    model.abstract(),
    jax.ShapeDtypeStruct((prompts, data.source_length), jnp.int32),
  )
  kept = jax.tree.leaves((context, cache))
  heads, model_axis = kept[0].shape[-3], mesh.shape["model"]
  cut = model_axis if heads % model_axis == 0 else 1
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
  return total // (sharding.row_shards(mesh) * cut)


def _judges(config: ml_collections.ConfigDict, mesh: Mesh) -> Iterator[Job]:
  """The objectives that are models."""
  rows = config.rollout.prompts * config.rollout.samples
  for name in config.objectives:
    options = config.rewards[name].to_dict()
    if options["source"] not in MODELS:
      continue
    if options["model"] is None:
      raise ConfigError(
        f"rewards.{name}.model is not set; give its folder, or of a T5 a "
        "preset to plan with its size."
      )
    shards = sharding.row_shards(mesh)
    batch = -(-options["batch"] // shards) * shards
    length = options.get("source_length") or 512
    with as_config_error():
      is_classifier = options["source"] == "classifier"
      judge = (_classifier if is_classifier else _t5)(options, batch, length)
    placed: Any = sharding.param_shardings(
      mesh, judge.axes, judge.abstract, fsdp=options["fsdp"]
    )
    yield Job(
      f"reward {name}",
      models.row_program(judge.value, placed, mesh),
      (judge.abstract, jax.ShapeDtypeStruct(judge.rows, jnp.int32)),
      -(-rows // batch),
      judge.flops,
      {"reward models": bytes_per_chip(judge.abstract, placed)},
    )


class _Judge(NamedTuple):
  """A reward's model, on shapes alone."""

  abstract: Tree  # parameters
  axes: Tree
  value: Callable  # (parameters, rows) -> scores
  rows: tuple[int, ...]
  flops: float


def _t5(options: dict[str, Any], batch: int, length: int) -> _Judge:
  judge = models.model_config(
    options["model"],
    dtype=options["dtype"],
    scan_layers=options["scan_layers"],
  )
  model = families.build(judge)
  abstract, axes = model.abstract(), model.axes()
  is_preference = options["source"] == "preference"
  # Which tokens mean what changes no cost.
  token = None if options.get("token") is None else 1
  if is_preference:
    head = "linear" if token is None else "token"
    abstract = preference.abstract_params(judge, head)
    axes = preference.logical_axes(judge, head)

  def value(params, rows):
    if is_preference:
      return preference.score_rows(model, params, rows, token)
    return entailment.probability(model, params, rows, 1, None)

  flops = model.flops(batch, batch, length, 1)
  return _Judge(abstract, axes, value, (batch, length), flops)


def _classifier(options: dict[str, Any], batch: int, length: int) -> _Judge:
  opened = classifiers.open_folder(
    models.checked(options["model"]),
    dtype=options["dtype"],
    scan_layers=options["scan_layers"],
  )
  model = opened.model
  return _Judge(
    model.abstract(),
    model.axes(),
    functools.partial(classifier.score_rows, opened, label=0),
    (batch, 2, length) if model.reads_pairs else (batch, length),
    model.flops(batch, length),
  )


# Of libtpu, for a sixth of the compiling: operations are fused less, so that
# they move up to twice the bytes, but what is held at once hardly changes.
LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}


def compile_job(job: Job, quick: bool = False) -> Compiled:
  """Compiles a job for the devices of its shardings.

  Args:
    job: to compile.
    quick: with the least effort, for its memory alone.

  Raises:
    Whatever the compiler raises, but for want of memory.
  """
  start = time.perf_counter()
  lowered = job.program.lower(*job.arguments)  # type: ignore[attr-defined]
  try:
    compiled = lowered.compile(LEAST_EFFORT if quick else None)
  except jax.errors.JaxRuntimeError as error:
    needed = _out_of_memory(str(error))
    if needed is None:
      raise
    return Compiled(job, None, 0, 0, needed, time.perf_counter() - start)
  costs = None if quick else hlo.count(hlo.parse(compiled.as_text()))
  memory = compiled.memory_analysis()
  return Compiled(
    job,
    costs,
    memory.temp_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    None,
    time.perf_counter() - start,
  )


def _out_of_memory(message: str) -> float | None:
  """Bytes that were needed, from the message of the compiler.

  "Used 19.3G of 15.7G hbm", or "temporaries (19.3G) exceeds available HBM".
  """
  if "memory" not in message:
    return None
  used = re.search(r"(?:[Uu]sed |\()([\d.]+)([KMGT]?)\b", message)
  if used is None:
    return None
  return float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")

"""What the stages of training share: a folder and two programs.

Supervised finetuning, preference models and multi-objective finetuning all
start from an ordinary model, the reference, and differ in what they make of it
and in their update. The rest is here and in loop.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from clp_jax import run_folder, saved_params, sharding
from clp_jax.initial import Initial
from clp_jax.models.model import Model
from clp_jax.train.state import TrainState, state_shardings

Params = Any


@dataclasses.dataclass(frozen=True)
class Programs:
  """The jitted programs of a stage, and where their arguments lie."""

  init: Callable[..., TrainState]  # (reference, key) -> state
  # (state, *data) -> (state, metrics); the state's buffers are given away.
  update: Callable[..., tuple[TrainState, dict]]
  state_shardings: TrainState  # of what `init` and `update` give
  reference_shardings: Params

  def abstract_state(self, reference: Params, key: jax.Array) -> TrainState:
    """Shapes, dtypes and shardings of a state between steps, as it is saved.

    Args:
      reference: an ordinary model's parameters, or their shapes.
      key: of a run, or its shape.
    """
    return saved_params.abstract_like(
      jax.eval_shape(self.init, reference, key), self.state_shardings
    )


def make_programs(
  mesh: Mesh,
  model: Model,
  init: Callable[..., TrainState],
  update: Callable[..., tuple[TrainState, dict]],
  *,
  axes: Params,
  data: tuple,
  fsdp: bool,
) -> Programs:
  """Jits a stage's functions for a mesh; nothing is compiled yet.

  Args:
    mesh: where they run.
    model: whose parameters the reference is.
    init: (reference, key) -> state.
    update: (state, *data) -> (state, metrics).
    axes: logical axes of the state's parameters, a tuple of names for each.
    data: shardings of `update`'s arguments after the state.
    fsdp: see `sharding.param_shardings`.
  """
  abstract = model.abstract()
  reference_at = sharding.param_shardings(
    mesh, model.axes(), abstract, fsdp=fsdp
  )
  state_at = state_shardings(
    mesh, jax.eval_shape(init, abstract, jax.random.key(0)), axes, fsdp=fsdp
  )
  whole: Any = sharding.replicated(mesh)
  return Programs(
    init=jax.jit(
      init, in_shardings=(reference_at, whole), out_shardings=state_at
    ),
    update=jax.jit(
      sharding.on_mesh(mesh, update, fsdp=fsdp),
      in_shardings=(state_at, *data),
      out_shardings=(state_at, whole),
      donate_argnums=0,
    ),
    state_shardings=state_at,
    reference_shardings=reference_at,
  )


def prepare(
  workdir: str,
  config: ml_collections.ConfigDict,
  initial: Callable[[], Initial],
) -> None:
  """Makes a run's folder, with `config` in it, and its reference, once."""
  run_folder.start(workdir, config)
  if not run_folder.has_model(workdir):
    with run_folder.alone(workdir):
      made = initial()
      run_folder.save_model(
        workdir, made.model_config, made.vocabulary, made.params
      )


def load_reference(workdir: str, model: Model, programs: Programs) -> Params:
  """The reference of a prepared folder, where the programs take it."""
  return run_folder.load_reference(
    workdir,
    saved_params.abstract_like(model.abstract(), programs.reference_shardings),
  )


def write_report(workdir: str, name: str, report: dict[str, Any]) -> None:
  """Writes DIR/evaluation/<name>.json, from process 0."""
  if jax.process_index() == 0:
    folder = epath.Path(workdir) / "evaluation"
    folder.mkdir(exist_ok=True)
    run_folder.write_json(folder / f"{name}.json", report)

"""What every held-out prompt gave at every weighting: evaluation/rewards.npz.

front.json has means and standard errors; intervals of what is computed from
several points at once (a hypervolume, a difference of two methods) need the
prompts themselves, because all points share them.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from numpy.typing import NDArray

from clp_jax.errors import FrontError
from clp_jax.evaluation.front import Front
from clp_jax.interop import storage

FILE = "rewards.npz"


class Measurements(NamedTuple):
  """Of one sweep: P points, n samples for each of its prompts."""

  rewards: NDArray[np.float32]  # [P, prompts, n, m], units of the front
  kl: NDArray[np.float32]  # [P, prompts, n], summed log-ratio, nats
  prompts: str  # digest of the documents, to tell other prompts from these


def digest(documents: Sequence[str]) -> str:
  """A name for documents in their order."""
  joined = "\0".join(documents).encode()
  return hashlib.sha256(joined).hexdigest()[:16]


def save(directory: str | os.PathLike[str], measured: Measurements) -> None:
  """Writes rewards.npz, whole or not at all."""
  content = io.BytesIO()
  np.savez_compressed(content, **measured._asdict())
  storage.write_whole(epath.Path(directory) / FILE, content.getvalue())


def load(directory: str | os.PathLike[str], front: Front) -> Measurements:
  """Reads rewards.npz and checks that it belongs to a front.

  Raises:
    FrontError: no such file, or one of another sweep.
  """
  path = epath.Path(directory) / FILE
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    raise FrontError(
      f"There is no {path}; `clp evaluate` writes it beside front.json: "
      "evaluate the run again."
    ) from None
  try:
    with np.load(io.BytesIO(content)) as arrays:
      measured = Measurements(
        arrays["rewards"], arrays["kl"], str(arrays["prompts"])
      )
  except (KeyError, OSError, ValueError) as error:
    raise FrontError(
      f"{path} can't be read ({error}); evaluate the run again."
    ) from None
  expected = (len(front.points), front.prompts)
  sizes = measured.rewards.shape
  if (
    sizes[:2] != expected
    or sizes[3:] != (len(front.objectives),)
    or not np.allclose(
      # In float32, a sum over many prompts would drift.
      measured.rewards.mean(axis=(1, 2), dtype=np.float64),
      front.rewards,
      atol=1e-4,
    )
  ):
    raise FrontError(
      f"{path} is not of the sweep in front.json beside it; evaluate the run "
      "again."
    )
  return measured


def join(parts: Sequence[Measurements]) -> Measurements:
  """Sweeps of several policies over the same prompts as one."""
  if len({part.prompts for part in parts}) != 1:
    raise FrontError("Sweeps over different prompts can't be joined.")
  return Measurements(
    np.concatenate([part.rewards for part in parts]),
    np.concatenate([part.kl for part in parts]),
    parts[0].prompts,
  )

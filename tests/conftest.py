"""What every test runs under: 8 CPU devices, and JAX and Hypothesis set strict.

The environment variables are set before JAX or TensorFlow is imported, and
processes that a test starts inherit them.
"""

import datetime
import functools
import importlib.metadata
import os
import pathlib

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  # Compilation is most of the suite's time. A third of it is optimising
  # programs that run once, and more than half of the rest is emitting fusions
  # by MLIR, where LLVM's builder does as well; JAX 0.11 has no such flag, and
  # ends the process that gives it one it does not know.
  flags = [f"{_DEVICES}=8", "--xla_backend_optimization_level=0"]
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Many tests, and the processes that they start, compile the same programs.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
# [B, T] + [T] is more often a mistake than meant: write the axis out.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run and machine. The deadline leaves room for an
# example that compiles a JAX program on a busy machine.
hypothesis.settings.register_profile(
  "clp_jax",
  derandomize=True,
  max_examples=50,
  deadline=datetime.timedelta(seconds=20),
)
hypothesis.settings.load_profile("clp_jax")


# Files of minutes, which would leave one worker idle if they came last.
_LONG = ("resume_test.py", "moft_test.py", "processes_test.py")


def pytest_collection_modifyitems(items):
  """Long files first; the Makefile has xdist keep this order."""
  items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session")
def sft_runs(tmp_path_factory):
  """Makes folders of supervised runs of a few steps on the built-in world: of
  a preset, each once."""
  from clp_jax import demo
  from clp_jax.train import sft

  @functools.cache
  def make(preset):
    config = demo.get_config()
    config.model.init = preset
    config.sft.steps = 12
    config.sft.batch = 16
    workdir = tmp_path_factory.mktemp("runs") / "sft"
    sft.train(config, str(workdir))
    return str(workdir)

  return make


@pytest.fixture(scope="session")
def sft_run(sft_runs):
  """That of a small T5."""
  return sft_runs("tiny")


@pytest.fixture(scope="session")
def clp_run(sft_run):
  """Folder of a run of 4 steps from there; whoever changes it takes a copy."""
  import runs

  workdir = pathlib.Path(sft_run).parent / "clp"
  status, out, err = runs.clp(*runs.train_arguments(workdir, sft_run))
  assert status == 0, err
  assert out.strip() == str(workdir)
  return workdir

"""Runs with adapters that differ at random, and their export."""

import jax
import numpy as np
import runs
import small_decoder
import small_t5

from clp_jax import build, interop, run_folder, saved_params
from clp_jax import config as config_lib
from clp_jax.data.vocabulary import word_model
from clp_jax.initial import load_initial

VOCABULARY = word_model([f"word{i}" for i in range(30)], [".", ","])
RANGE = {"weightings.alpha_range": (0.1, 0.9)}


def make_bases(root):
  """A Hugging Face folder of each family, by its name."""
  params = small_t5.random_params(small_t5.V1_1)
  interop.save_t5(
    root / "t5", small_t5.V1_1, params, "hf", vocabulary=VOCABULARY
  )
  small_decoder.save(root / "decoder", "llama")
  return {name: root / name for name in ("t5", "decoder")}


def start_run(workdir, init, **fields):
  """A run whose parameters differ at random, of two objectives."""
  config = config_lib.get_config()
  config.objectives = ("long", "short")
  config.data.source_length, config.data.target_length = 16, 8
  config.model.init = str(init)
  config.steering = "lora"
  config.adapters.rank = 3
  config.adapters.scale = 0.7
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  run_folder.start(str(workdir), config)
  initial = load_initial(config)
  run_folder.save_model(
    str(workdir), initial.model_config, initial.vocabulary, initial.params
  )
  sets = build.bank(config, initial.model_config).init(
    initial.params, jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  sets = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), sets
  )
  saved_params.save_params(str(workdir), 3, sets)
  return str(workdir)


def export(workdir, output, *arguments, format="peft"):
  status, out, err = runs.clp(
    *("export", "--workdir", workdir, "--format", format),
    *("--output", output, *arguments),
  )
  assert status == 0, err
  assert out == f"{output}\n"


def code_of(readme):
  """The recipe in a README.md."""
  return readme.split("```python\n")[1].split("```")[0]

"""How many parameters each method trains and stores."""

import pathlib

from benchmarks import parameters
from clp_jax.models.presets import PRESETS

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "methods.md"


def test_counts_follow_from_the_shapes():
  config = PRESETS["base"]
  d, heads, f, v, layers = 768, 12 * 64, 2048, 32128, 12
  attention = 3 * layers * 4 * d * heads  # encoder, decoder, cross
  mlp = 2 * layers * 3 * d * f
  norms = (2 + 3) * layers * d + 2 * d
  size = attention + mlp + norms + 2 * v * d + 2 * 12 * 32
  m, r, p = 3, 4, 10
  found = {
    row.method.split(",")[0]: (row.trained, row.stored)
    for row in parameters.rows(config, m, r, p)
  }
  assert found["single objective"] == (size, size)
  assert found["full-CLP"] == (m * size, m * size)
  assert found["attn-CLP"] == (size + 2 * attention,) * 2
  assert found["logit-CLP"] == (size + 2 * v * d,) * 2
  assert found["soft tokens"] == (size + m * p * d,) * 2
  assert found["soft tokens alone"] == (m * p * d, size + m * p * d)
  kernels = 3 * layers * 4 * (d + heads) + 2 * layers * 3 * (d + f)
  assert found["LoRA"] == (m * r * kernels, size + m * r * kernels)
  number = 3 * layers * 4 + 2 * layers * 3
  svd = (r + m) * kernels + (r + 1) * number
  assert found["SVD-LoRA"] == (svd, size + svd)
  assert found["Rewarded Soups"] == (m * size, m * size)
  assert found["DeRa (one reward)"] == (size, 2 * size)


def test_the_table_says_what_steering_costs_beyond_one_t5():
  table = parameters.table(["base"], 2, 8, 20)
  assert table in DOCS.read_text()
  full = next(line for line in table.splitlines() if "full-CLP" in line)
  assert full.endswith("| 495,155,712 | 495,155,712 | 100.00% |")

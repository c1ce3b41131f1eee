"""The network against Hugging Face's T5, with fresh random weights."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from clp_jax.models import decoding, families, t5
from clp_jax.sampling import Sampling

pytestmark = pytest.mark.parity
pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)

from parity import make_fixtures  # noqa: E402


@pytest.mark.parametrize(
  "version, scan_layers, seed",
  (
    ("v1_0", False, 1),
    ("v1_0", True, 2),
    ("v1_1", False, 3),
    ("v1_1", True, 4),
  ),
)
def test_logits_and_greedy_tokens_are_those_of_transformers(
  version, scan_layers, seed
):
  case = make_fixtures.make_case(version, seed)
  config = t5.T5Config(
    **make_fixtures.config_fields(version), scan_layers=scan_layers
  )
  params = traverse_util.unflatten_dict(
    {k.removeprefix("params/"): v for k, v in case.items() if "params/" in k},
    sep="/",
  )
  params = t5.stack_layers(params) if scan_layers else params
  model = families.build(config)

  @jax.jit
  def run(params, source, target, keys):
    logits = t5.T5(config).apply({"params": params}, source, target)
    samples = decoding.sample(
      model,
      params,
      source,
      keys,
      Sampling(case["allowed"], config.eos_ids, config.pad_id, temperature=0.0),
      max_length=make_fixtures.GREEDY_LENGTH,
    )
    return logits, samples

  source = case["encoder_input_tokens"]
  keys = jax.random.split(jax.random.key(0), len(source))
  logits, samples = run(params, source, case["decoder_input_tokens"], keys)
  np.testing.assert_allclose(
    logits[:, case["positions"]], case["logits"], atol=1e-4
  )
  np.testing.assert_array_equal(samples.tokens, case["greedy"])


@pytest.mark.parametrize("version", make_fixtures.SEEDS)
def test_the_stored_fixtures_are_what_transformers_computes(version):
  stored = np.load(make_fixtures.FIXTURES / f"transformers_{version}.npz")
  case = make_fixtures.make_case(version, make_fixtures.SEEDS[version])
  assert set(stored) == set(case)
  for name in case:
    np.testing.assert_allclose(stored[name], case[name], atol=1e-4)

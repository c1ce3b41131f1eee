"""What benchmarks time transformers with computes what ours does."""

import argparse

import numpy as np
import pytest

from benchmarks import models, update
from clp_jax.data import newsroom
from clp_jax.policy import Policy

pytestmark = pytest.mark.parity
pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)

WEIGHTS = {"rouge": 0.3, "nli": 0.7}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_steps_of_both_have_the_same_losses(family):
  args = argparse.Namespace(family=family, size="tiny", dtype="float32")
  config = models.config_of(args)
  params = models.random_params(config)
  peer = models.Peer(config, params, source=24, target=6)  # compares logits
  tokens = models.random_tokens(4, 30, config)
  source, target = tokens[:, :24], tokens[:, 24:]
  ours = update.supervised(config, params, source, target)
  theirs = update.peer_step(peer, source, target)
  for _ in range(3):
    with peer.torch.inference_mode():
      _, loss = peer.score(peer.tensor(source), peer.tensor(target))
    theirs()
    np.testing.assert_allclose(ours()["loss"], float(loss), rtol=1e-5)


def test_the_plain_server_answers_as_the_policy_that_it_holds(
  clp_run, tmp_path
):
  from benchmarks import serving_peer

  policy = Policy.load(str(clp_run))
  policy.export(str(tmp_path), "hf", WEIGHTS)
  data = policy.config.data
  complete = serving_peer.load(
    str(tmp_path), data.source_length, data.target_length
  )
  # Words that its vocabulary has: transformers' fast tokenizer gives every
  # piece of an unknown word an id of its own.
  for prompt, _ in newsroom.rows("test")[:2]:
    body = {"prompt": prompt, "temperature": 0.0, "max_tokens": 999}
    (choice,) = complete(body)["choices"]
    (ours,) = policy.generate([prompt], WEIGHTS, temperature=0.0)
    assert choice["text"] == ours
    # Hot enough not to end by itself.
    body |= {"temperature": 9.0, "max_tokens": 3}
    (choice,) = complete(body)["choices"]
    assert 0 < len(choice["text"].split()) <= 3
    (choice,) = complete(body | {"max_tokens": 999})["choices"]
    assert len(choice["text"].split()) > 3

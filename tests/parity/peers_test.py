"""What benchmarks time transformers with computes what ours does."""

import argparse

import numpy as np
import pytest

from benchmarks import models, update

pytestmark = pytest.mark.parity
pytest.importorskip(
  "torch", reason='needs the extra "parity": run `make parity`'
)
pytest.importorskip(
  "transformers", reason='needs the extra "parity": run `make parity`'
)


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

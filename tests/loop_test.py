"""A run of no steps is a run; TensorBoard shows one that is under way."""

import json

import pytest
import runs
from tensorboard.backend.event_processing import event_accumulator

from clp_jax.train import metrics


@pytest.mark.slow
def test_a_run_of_0_steps_can_be_evaluated_and_trained_on(sft_run, tmp_path):
  workdir = tmp_path / "run"

  def train(steps):
    status, _, err = runs.clp(
      *runs.train_arguments(workdir, sft_run, **{"train.steps": steps})
    )
    assert status == 0, err

  train(0)
  assert runs.checkpoint_steps(workdir) == [0]
  status, _, err = runs.clp("evaluate", "--workdir", workdir)
  assert status == 0, err
  front = json.loads((workdir / "evaluation" / "front.json").read_text())
  assert front["step"] == 0 and front["training_samples"] == 0
  # It is the reference at every weighting.
  assert max(abs(p["kl"]["mean"]) for p in front["points"]) < 1e-4
  train(2)
  assert runs.checkpoint_steps(workdir)[-1] == 2


def test_tensorboard_shows_a_run_under_way(tmp_path):
  accumulator = event_accumulator.EventAccumulator(str(tmp_path / "metrics"))
  with metrics.MetricsWriter(str(tmp_path), 0) as writer:
    for step in (10, 20):
      writer.write(step, {"loss": step / 4, "perf/x": 1.0})
    writer.write_texts(20, {"response": "Zürich"})
    writer.flush()
    accumulator.Reload()
    points = [(p.step, p.value) for p in accumulator.Scalars("loss")]
    assert points == [(10, 2.5), (20, 5.0)]
    (text,) = accumulator.Tensors("response")
    assert text.tensor_proto.string_val == ["Zürich".encode()]

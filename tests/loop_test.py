"""A run of no steps is a run."""

import json

import runs


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

"""Algorithms, scalarisations, adapted Q: their fields and commands."""

import pathlib
import shlex

import numpy as np
import pytest
import runs

from clp_jax import build, demo
from clp_jax.cli.arguments import load_config
from clp_jax.errors import ConfigError

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "methods.md"


def commands():
  """The page's commands of these sections, as argument lists."""
  text = PAGE.read_text().partition("## Algorithms")[2]
  text = text.partition("## Parameters")[0].replace("\\\n", " ")
  lines = [line.strip() for line in text.splitlines()]
  return [shlex.split(x)[1:] for x in lines if x.startswith("clp train ")]


def test_the_documented_commands_are_valid():
  assert len(commands()) == 4
  for arguments in commands():
    assert arguments[1:3] == ["--config", "configs/demo.py"]
    overrides = [a for a in arguments if a.startswith("--config.")]
    config = load_config(runs.CONFIG, overrides)
    build.validate(config)
    assert overrides and config != demo.get_config()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(commands())))
def test_the_documented_commands_train(number, sft_run, tmp_path):
  overrides = [a for a in commands()[number] if a.startswith("--config.")]
  arguments = runs.train_arguments(tmp_path, sft_run) + overrides
  status, _, err = runs.clp(*arguments)
  assert status == 0, err
  rows = runs.metrics(tmp_path)
  assert len(rows) == 4
  assert all(np.isfinite(list(row.values())).all() for row in rows)
  status, _, err = runs.clp("evaluate", "--workdir", tmp_path)
  assert status == 0, err


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"algorithm": "a2c"}, "one of reinforce, ppo, got 'a2c'"),
    ({"reinforce.baseline": "rl"}, "leave_one_out, learned, got 'rl'"),
    ({"ppo.clip": 0.0}, "ppo.clip must be > 0, or None for off, got 0.0"),
    ({"ppo.value_clip": -1.0}, "ppo.value_clip must be > 0"),
    ({"ppo.target_kl": float("nan")}, "ppo.target_kl must be > 0"),
    ({"ppo.discount": 1.5}, r"ppo.discount must be in \[0, 1\], got 1.5"),
    ({"ppo.gae_lambda": -0.1}, r"ppo.gae_lambda must be in \[0, 1\]"),
    ({"ppo.epochs": 0}, "ppo.epochs must be > 0"),
    ({"critic.hidden": 0}, "critic.hidden must be > 0"),
    ({"critic.learning_rate": 0.0}, "critic.learning_rate must be > 0"),
    (
      {"algorithm": "ppo", "ppo.minibatches": 3},
      "rollout.weightings x ppo.minibatches x train.microbatches = 4 x 3 x 1",
    ),
    (
      {"algorithm": "ppo", "rollout.samples": 1},
      "ppo.leave_one_out needs rollout.samples >= 2, got 1",
    ),
    (
      {
        "reinforce.baseline": "group_mean",
        "rollout.samples": 1,
        "rollout.weightings": 16,
      },
      "group_mean needs at least 2 responses a weighting",
    ),
    ({"scalarisation.name": "max"}, "linear, chebyshev, smooth_chebyshev"),
    ({"scalarisation.name": "chebyshev"}, "needs scalarisation.utopia"),
    (
      {
        "scalarisation.name": "chebyshev",
        "scalarisation.utopia": (1.0, 1.0, 1.0),
      },
      "utopia has 3 values for 2 objectives",
    ),
    (
      {
        "scalarisation.name": "chebyshev",
        "scalarisation.utopia": (1.0, 1.0),
        "rollout.weightings": 16,
      },
      "at least 2 prompts a weighting, got rollout.prompts = 16",
    ),
    (
      {"weightings.adapt": True, "weightings.weights": (0.5, 0.5)},
      "weightings.weights fixes them",
    ),
    ({"weightings.adapt": True, "weightings.adapt_points": 1}, "at least 2"),
    ({"algorithm": "ppo", "rollout.ahead": 2}, "ahead must be 0 or 1, got 2"),
    ({"rollout.ahead": -1}, "ahead must be 0 or 1, got -1"),
    (
      {"rollout.ahead": 1},
      "algorithm = reinforce does not; set algorithm=ppo or rollout.ahead=0",
    ),
    (
      {"rollout.ahead": 1, "reinforce.baseline": "learned"},
      "algorithm = reinforce does not; set algorithm=ppo or rollout.ahead=0",
    ),
    ({"weightings.adapt": True, "objectives": ("nli",)}, "at least 2 obj"),
  ],
)
def test_settings_that_do_not_fit_are_config_errors(changes, message):
  config = demo.get_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    build.validate(config)


def test_what_is_off_by_default():
  config = demo.get_config()
  build.validate(config)
  assert build.adaptation(config) is None
  assert build.scalarisation(config).name == "linear"
  assert not build.has_critic(config)
  # One sample a prompt is enough for a critic.
  config.algorithm = "ppo"
  config.ppo.leave_one_out = False
  config.rollout.samples = 1
  build.validate(config)

"""Flags of config fields, above all of those that may be None."""

import json
import pathlib
import sys

import pytest
from ml_collections import config_dict

from clp_jax import build
from clp_jax import config as config_lib
from clp_jax.cli.arguments import load_config
from clp_jax.errors import ConfigError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = [
  str(CONFIGS / name)
  for name in ("demo.py", "jsonl.py", "reward.py", "xsum/base.py")
]
# A value of each type, and how a flag says it.
VALUES = {
  str: ("some text", "some text"),
  int: (3, "3"),
  float: (0.25, "0.25"),
  tuple: ((0.25, 0.75), "(0.25, 0.75)"),
}
# A text or a list of messages: of no one type.
TEMPLATE = "data.template"
MESSAGES = [{"role": "user", "content": "news {document}"}]


def fields(config, prefix=""):
  """(path, type, whether it may be None) of every field.

  TEMPLATE's is that of most templates, a text.
  """
  for name, value in config.items(preserve_field_references=True):
    if isinstance(value, config_dict.ConfigDict):
      yield from fields(value, f"{prefix}{name}.")
    else:
      optional = isinstance(value, config_dict.FieldReference)
      kind = config.get_type(name)
      if prefix + name == TEMPLATE:
        assert kind is object and optional
        kind = str
      yield prefix + name, kind, optional


def load(file, *overrides):
  return load_config(file, list(overrides))


def get(config, path):
  for name in path.split("."):
    config = config[name]
  return config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file[-13:])
def test_every_field_that_may_be_none_is_set_and_unset_by_flags(file):
  optional = [(path, kind) for path, kind, may in fields(load(file)) if may]
  assert {kind for _, kind in optional} == set(VALUES)
  for path, kind in optional:
    value, text = VALUES[kind]
    flag = f"--config.{path}"
    for overrides, expected in (
      ([f"{flag}={text}"], value),
      ([f"{flag}=None"], None),
      ([flag, "None"], None),
      # The last one counts.
      ([f"{flag}={text}", f"{flag}=None"], None),
      ([f"{flag}=None", f"{flag}={text}"], value),
    ):
      others = load(file)
      others.update_from_flattened_dict({path: expected})
      assert load(file, *overrides).to_dict() == others.to_dict(), overrides


@pytest.mark.parametrize("file", FILES, ids=lambda file: file[-13:])
def test_a_field_without_a_value_has_a_type(file):
  config = load(file)
  for path, kind, optional in fields(config):
    assert kind in (*VALUES, bool), path
    assert optional or get(config, path) is not None, path


def test_a_template_may_be_messages_in_json():
  flag = f"--config.{TEMPLATE}="
  config = load(FILES[0], flag + json.dumps(MESSAGES))
  assert config.data.template == MESSAGES
  build.validate(config)
  unset = load(FILES[0], flag + json.dumps(MESSAGES), flag + "None")
  assert unset.to_dict() == load(FILES[0]).to_dict()


def test_fields_that_may_be_none_are_those_whose_none_means_something():
  """Each of them None, with what that needs: a valid config."""
  config = config_lib.get_config()
  optional = [path for path, _, may in fields(config) if may]
  for path in optional:
    config = config_lib.get_config()
    if path == "data.task":
      config.data.train = "train.jsonl"
    config.update_from_flattened_dict({path: None})
    if path == "model.init":
      with pytest.raises(ConfigError, match="model.init is not set"):
        build.validate(config)
    else:
      build.validate(config)


@pytest.mark.parametrize(
  "overrides, message",
  [
    (["--config.sft.steps=None"], "sft.steps can't be None; give it a value"),
    (["--config.algorithm=None"], "algorithm can't be None"),
    (["--config.data=None"], "data can't be None"),
    (["--config.data.tmplate=None"], "tmplate'\\nDid you mean"),
    (["--config.dta.template=None"], "unknown config field"),
    (["--config.steering.kind=None"], "TypeError"),
    (["None"], "unknown arguments: None"),
    (["--config.steering=full", "None"], "unknown arguments: None"),
  ],
)
def test_none_for_another_field_is_refused(overrides, message):
  with pytest.raises(ConfigError, match=message):
    load(str(CONFIGS / "demo.py"), *overrides)


@pytest.mark.parametrize(
  "source, message",
  [
    ("x = 1", r"mine.py has no get_config\(\)"),
    ("def get_config():\n  pass", r"mine.py: get_config\(\) must.*got None"),
    ("import no_such_module", "mine.py: ModuleNotFoundError: .*no_such_module"),
    ("def get_config(:", "mine.py: SyntaxError"),
  ],
)
def test_a_file_that_is_no_config_is_refused(
  tmp_path, monkeypatch, source, message
):
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  file = tmp_path / "mine.py"
  file.write_text(source)
  with pytest.raises(ConfigError, match=message):
    load(str(file))
  with pytest.raises(ConfigError, match="no such file"):
    load(str(tmp_path))


def test_a_value_of_another_type_is_refused_by_its_flag():
  flag = "--config.rollout.samples=1.5"
  with pytest.raises(ConfigError, match=f"^flag {flag}: invalid literal"):
    load(FILES[0], flag)


@pytest.mark.parametrize(
  "override, message",
  [
    ("seed=-1", r"seed must be in \[0, 2\*\*32\), got -1"),
    ("seed=4294967296", "seed must be in"),
    (
      "optimizer.warmup_steps=-5",
      "optimizer.warmup_steps must be >= 0, got -5",
    ),
    ("optimizer.decay_steps=-3", "optimizer.decay_steps must be >= 0"),
    ("sft.decay_steps=-3", "sft.decay_steps must be >= 0"),
    ("sft.dropout=1.5", r"sft.dropout must be in \[0, 1\), got 1.5"),
    ("reward_model.dropout=nan", "reward_model.dropout must be in"),
    ("eval.temperature=-1", "eval.temperature must be >= 0, got -1"),
    ("eval.temperature=nan", "eval.temperature must be >= 0, got nan"),
    (
      "model.dtype=float23",
      "dtype must be one of float32, bfloat16, got 'float23'",
    ),
    (
      "model.remat=half",
      "remat must be one of none, minimal, full, got 'half'",
    ),
  ],
)
def test_values_out_of_range_are_refused_before_anything_starts(
  override, message
):
  config = load(FILES[0], f"--config.{override}")
  with pytest.raises(ConfigError, match=message):
    build.validate(config)


def test_a_field_without_a_type_stays_none(tmp_path):
  """As keyword arguments of one's own reward do."""
  file = tmp_path / "mine.py"
  file.write_text(
    "from clp_jax import config as config_lib\n"
    "def get_config():\n"
    "  config = config_lib.get_config()\n"
    "  config.rewards.mine = config_lib.reward('mine:score', limit=None)\n"
    "  return config\n"
  )
  config = load(str(file), "--config.rewards.mine.limit=None")
  assert config.rewards.mine.limit is None

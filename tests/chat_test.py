"""An instruct model of one's own, from its folder to an exported policy."""

import json
import pathlib
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small_decoder
import tokenizers

from clp_jax import (
  Policy,
  batches,
  build,
  chat,
  initial,
  interop,
  run_folder,
  sharding,
)
from clp_jax.cli import main
from clp_jax.cli.arguments import load_config
from clp_jax.data import newsroom
from clp_jax.errors import ConfigError
from clp_jax.evaluation import sweep
from clp_jax.models.presets import PRESETS
from clp_jax.rewards import model as models

ROOT = pathlib.Path(__file__).parents[1]
SECTION = (
  (ROOT / "docs" / "own-data.md").read_text().split("## Your own chat model")[1]
)
COMMANDS = [
  shlex.split(block.replace("\\\n", " "))
  for block in re.findall(
    r"(?m)^    (clp (?:[^\n\\]|\\\n)*)", SECTION.split("\nThe first trains")[0]
  )
]
# What makes the page's commands small.
SMALL = {
  "train-reward": (
    *("--config.reward_model.steps=2", "--config.reward_model.batch=8"),
    "--config.data.source_length=160",
  ),
  "train": (
    *("--config.train.steps=2", "--config.rollout.prompts=8"),
    *("--config.rollout.samples=2", "--config.rollout.weightings=2"),
    *("--config.data.source_length=96", "--config.data.target_length=8"),
    *("--config.eval.prompts=8", "--config.eval.grid=3"),
    *("--config.eval.batch=8", "--config.train.normalisation_batches=1"),
    *("--config.rewards.helpful.batch=8", "--config.adapters.rank=2"),
  ),
}


# What makes a folder's config.json that of another model.
FIELDS = {
  "an unknown model": {"model_type": "mamba"},
  "a missing layer": {"num_hidden_layers": 4, "layer_types": None},
  "a misshapen layer": {"intermediate_size": 40},
}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The files that the page's commands name, and what they left behind."""
  folder = tmp_path_factory.mktemp("chat")
  small_decoder.save(folder / "my-chat-model")
  items = newsroom.make_items("train", 0, 16)
  prompts = [{"prompt": item.document} for item in items]
  pairs = [
    {
      "prompt": item.document,
      "chosen": item.reference,
      "rejected": other.reference,
    }
    for item, other in zip(items, items[1:] + items[:1], strict=True)
  ]
  for name in ("prompts", "dev_prompts"):
    write(folder / f"{name}.jsonl", prompts)
  for name in ("pairs", "dev_pairs"):
    write(folder / f"{name}.jsonl", pairs)
  shutil.copytree(ROOT / "configs", folder / "configs")
  return folder


def run(folder, monkeypatch, command, *extra):
  monkeypatch.chdir(folder)
  assert main.main([*command[1:], *extra]) in (0, None), command


def test_the_commands_of_the_page_run(folder, monkeypatch, capsys):
  names = ["train-reward", "train", "evaluate", "generate", "export"]
  assert [command[1] for command in COMMANDS] == names
  for command in COMMANDS:
    run(folder, monkeypatch, command, *SMALL.get(command[1], ()))
  answers = [
    json.loads(line)
    for line in capsys.readouterr().out.splitlines()
    if line.startswith("{")
  ]
  assert len(answers) == 16
  front = json.loads((folder / "runs/chat/evaluation/front.json").read_text())
  assert front["objectives"] == ["helpful", "brief"]

  # Nothing has moved the policies far; the first step was at KL 0.
  first, *_ = (folder / "runs/chat/metrics.jsonl").read_text().splitlines()
  assert abs(json.loads(first)["kl"]) < 2e-2  # bfloat16

  # Rows of the embedding without a token have no probability.
  policy = Policy.load(str(folder / "runs/chat"))
  known = policy.vocabulary.size
  assert policy.model_config.num_tokens == known < 512
  prompts = jnp.asarray(policy.tokenize(["mill"], {"helpful": 1}))
  logits, _ = policy.model.score(
    policy.params({"helpful": 1}), prompts, jnp.zeros([1, 1], jnp.int32)
  )
  probs = np.asarray(jax.nn.softmax(logits))
  assert not probs[..., known:].any() and probs[..., :known].all()

  # The export is an ordinary checkpoint, of the mixed parameters.
  export = folder / "exports/my-chat-model-steered"
  model, params = interop.load_model(export)
  weights = {"helpful": 0.7, "brief": 0.3}
  expected = interop.leaves.views(policy.model_config, policy.params(weights))
  found = interop.leaves.views(model.config, params)
  assert found.keys() == expected.keys()
  for path, view in found.items():
    np.testing.assert_array_equal(view.all(), expected[path].all())
  for name, content in small_decoder.tokenizer_files().items():
    assert (export / name).read_bytes() == content
  generation = json.loads((export / "generation_config.json").read_text())
  assert generation["eos_token_id"] == 2

  # What generate shows is what the chat template makes of the prompt.
  tokenizer = run_folder.load_tokenizer(str(folder / "runs/chat"))
  text = answers[0]["prompt"]
  ids, cut = tokenizer.prompt(
    text, [{"role": "user", "content": "{document}"}], 96
  )
  (tokens,) = policy.tokenize([text], weights)
  assert tokens[tokens >= 0].tolist() == ids and len(ids) <= 96
  assert ids[0] == 1  # <|im_start|>


@pytest.mark.parametrize("size", chat.SIZES)
def test_every_size_has_a_config(size, tmp_path):
  path = ROOT / "configs" / "chat" / f"{re.sub('[-.]', '_', size)}.py"
  write(tmp_path / "x.jsonl", [{"prompt": "a mill"}])
  options = {
    "model.init": "tiny-decoder",
    "data.train": tmp_path / "x.jsonl",
    "rewards.helpful.model": tmp_path,
  }
  given = [f"--config.{name}={value}" for name, value in options.items()]
  config = load_config(str(path), given)
  build.validate(config)
  batches.check_data(config)
  assert config.model.init == "tiny-decoder"
  assert config.plan.model == size in PRESETS
  assert config.plan.reward_model in PRESETS
  thinks = config.data.template_options.to_dict()
  expected = {"enable_thinking": False} if "qwen" in size else {}
  assert thinks == expected


def test_a_sweep_may_sample_the_token_of_id_zero(folder, monkeypatch):
  """Which is text in Llama and Qwen, whose padding is no token."""
  run_dir = str(folder / "runs/chat")
  if not pathlib.Path(run_dir, "model.json").exists():
    pytest.skip("the commands of the page have not run")
  monkeypatch.chdir(folder)
  policy = Policy.load(run_dir)
  allowed = np.isin(np.arange(512), [0, 2])
  monkeypatch.setitem(policy.__dict__, "allowed", allowed)
  batch = batches.eval_batch(policy.config, policy.vocabulary, 8)
  measure = sweep.make_measure(policy, [], batch, 0)
  assert np.isfinite(measure(policy.mix({"helpful": 1})).kl).all()


def test_a_conversation_is_answered_as_its_chat_template_shows_it(
  folder, tmp_path, capsys
):
  run_dir = str(folder / "runs/chat")
  if not pathlib.Path(run_dir, "model.json").exists():
    pytest.skip("the commands of the page have not run")
  text = newsroom.make_items("train", 0, 1)[0].document
  messages = [{"role": "user", "content": text}]
  write(tmp_path / "in.jsonl", [{"prompt": text}, {"prompt": messages}])
  command = ["generate", "--workdir", run_dir, "--temperature", "0"]
  command += ["--weights", "helpful=1", "--input", str(tmp_path / "in.jsonl")]
  # The run's own template is for texts.
  assert main.main(command) == 1
  assert "leave data.template None" in capsys.readouterr().err
  shutil.copytree(run_dir, tmp_path / "run")
  file = tmp_path / "run" / "config.json"
  values = json.loads(file.read_text())
  values["data"]["template"] = None
  file.write_text(json.dumps(values))
  write(tmp_path / "in.jsonl", [{"prompt": messages}])
  command[2] = str(tmp_path / "run")
  assert main.main(command) in (0, None)
  (row,) = map(json.loads, capsys.readouterr().out.splitlines())
  assert row["prompt"] == messages and isinstance(row["summary"], str)
  policy = Policy.load(run_dir)
  (expected,) = policy.generate([text], {"helpful": 1}, temperature=0)
  assert row["summary"] == expected


def test_every_command_gives_the_template_the_runs_options(tmp_path):
  small_decoder.save(tmp_path / "model")
  template = small_decoder.CHAT_TEMPLATE + "{% if quiet %}shh{% endif %}"
  (tmp_path / "model" / "chat_template.jinja").write_text(template)
  config = load_config(runs.CONFIG, runs.overrides(str(tmp_path / "model")))
  messages = [{"role": "user", "content": "mill"}]

  def ends_so(tokenizer):
    return tokenizer.decode(tokenizer.chat(messages)).endswith("shh")

  assert not ends_so(initial.load_vocabulary_of(config))
  config.data.template_options = {"quiet": True}
  assert ends_so(initial.load_vocabulary_of(config))
  runs.save_untrained(config, tmp_path / "run")
  assert ends_so(Policy.load(str(tmp_path / "run")).vocabulary)
  # A run that starts from it has its own.
  config.model.init = str(tmp_path / "run")
  config.data.template_options = {"quiet": False}
  assert not ends_so(initial.load_vocabulary_of(config))
  config.data.template_options = {"messages": ()}
  with pytest.raises(ConfigError, match="template_options.messages"):
    initial.load_vocabulary_of(config)
  config.model.init = "tiny-decoder"
  config.data.template_options = {"quiet": True}
  with pytest.raises(ConfigError, match="no chat template to give them") as one:
    initial.load_vocabulary_of(config)
  assert "\n" not in str(one.value)


def test_a_model_may_have_no_row_for_a_placeholder(tmp_path):
  small_decoder.save(tmp_path / "model", vocab_size=500)
  file = str(tmp_path / "model" / "tokenizer.json")
  larger = tokenizers.Tokenizer.from_file(file)
  larger.add_special_tokens(["<image>"])
  larger.save(file)
  config = load_config(runs.CONFIG, runs.overrides(str(tmp_path / "model")))
  start = initial.load_initial(config)
  assert start.vocabulary.size == start.model_config.num_tokens == 500
  (tmp_path / "run").mkdir()
  run_folder.save_model(
    *(str(tmp_path / "run"), start.model_config, start.vocabulary, start.params)
  )
  again = run_folder.load_tokenizer(str(tmp_path / "run"))
  assert again.size == 500 and again.files() == start.vocabulary.files()


def as_policy_and_judge(path):
  """(config, tokenizer) of a folder as what is trained, then as a reward."""
  config = load_config(runs.CONFIG, runs.overrides(str(path)))
  start = initial.load_initial(config)
  mesh = sharding.make_mesh()
  judge = models.load(str(path), mesh, None, "float32", False, False)
  return (
    (start.model_config, start.vocabulary),
    (judge.model.config, judge.vocabulary),
  )


def test_a_model_may_pad_with_text(tmp_path):
  (letter,) = small_decoder.make_tokenizer().encode("e")
  small_decoder.save(tmp_path, pad_id=letter)
  for model, words in as_policy_and_judge(tmp_path):
    assert model.pad_id == words.pad_id == -1


def test_a_model_may_pad_with_its_tokenizers_own_end(tmp_path):
  """And leave it to the tokenizer to name the end."""
  small_decoder.save(tmp_path)
  file = tmp_path / "config.json"
  values = json.loads(file.read_text())
  values |= {"eos_token_id": None, "pad_token_id": 2}
  file.write_text(json.dumps(values))
  (tmp_path / "generation_config.json").unlink(missing_ok=True)
  assert interop.load_config(tmp_path).pad_id == 2
  for model, words in as_policy_and_judge(tmp_path):
    assert model.pad_id == words.pad_id == -1
    assert model.eos_ids == words.eos_ids == (2,)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("no tokenizer", "has no tokenizer.json or spiece.model"),
    ("no template", "has no chat template"),
    ("a larger tokenizer", "the model .* embeds 300"),
    ("too long", "was made for 512 tokens"),
    ("too long with its weighting", "and 12 tokens of the weighting"),
    ("no references", "learns from references"),
    ("a failing template", "the chat template of .* fails: no system; correct"),
    ("an unknown model", "model_type must be one of .*, got 'mamba'"),
    ("a missing layer", "it lacks model.layers.3"),
    ("a misshapen layer", r"has shape \(48, 32\), expected \(40, 32\)"),
    ("no weights", "holds no weights"),
    ("an answered conversation", "x.jsonl, line 2: .*nothing to answer"),
  ],
)
def test_what_can_not_work_is_said_in_one_line(
  folder, monkeypatch, tmp_path, capsys, change, message
):
  model = tmp_path / "model"
  shutil.copytree(folder / "my-chat-model", model)
  extra = [*SMALL["train"], f"--config.model.init={model}"]
  extra += ["--config.objectives=('brief',)"]
  if change == "no tokenizer":
    (model / "tokenizer.json").unlink()
  elif change == "no template":
    (model / "chat_template.jinja").unlink()
  elif change == "a larger tokenizer":
    shutil.rmtree(model)
    small = small_decoder.make_config(vocab_size=300)
    built = interop.families.build(small)
    interop.save_model(model, built, small_decoder.random_params(small), "hf")
    for name, content in small_decoder.tokenizer_files().items():
      (model / name).write_bytes(content)
  elif change == "a failing template":
    template = "{{ raise_exception('no system') }}"
    (model / "chat_template.jinja").write_text(template)
  elif change in FIELDS:
    file = model / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | FIELDS[change]))
  elif change == "no weights":
    (model / "model.safetensors").unlink()
  elif change == "an answered conversation":
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    write(tmp_path / "x.jsonl", [{"prompt": turns[:1]}, {"prompt": turns}])
    extra.append(f"--config.data.train={tmp_path / 'x.jsonl'}")
    extra.append("--config.data.template=None")
  elif change == "too long with its weighting":
    extra.append("--config.soft_tokens.length=12")
    extra.append("--config.data.source_length=500")
  elif change == "too long":
    extra.append("--config.data.source_length=600")
  else:
    extra.append("--config.sft.steps=2")
  command = [*COMMANDS[1], "--workdir", str(tmp_path / "run")]
  monkeypatch.chdir(folder)
  status = main.main([*command[1:], *extra])
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert status == 2 and re.search(message, error), error

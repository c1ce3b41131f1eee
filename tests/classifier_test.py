"""Rewards by Hugging Face classifiers: decoders and encoders with a head."""

import functools
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import small_decoder
import small_encoder
import tokenizers
from safetensors import numpy as safetensors

from clp_jax import config as config_lib
from clp_jax import run_folder, sharding
from clp_jax.errors import RewardError
from clp_jax.interop import classifiers
from clp_jax.plan import programs
from clp_jax.rewards.base import load_reward, score_all
from clp_jax.rewards.classifier import label_of, score_rows

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "causal"
DOCUMENTS, RESPONSES = small_encoder.texts()
LABELS = ("no", "yes", "maybe")
LENGTH = 64
WIDTH, HIDDEN, HEADS, LAYERS, ROWS = 12, 20, 3, 2, 195
ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2")


def mesh_of(data=1, model=1):
  return sharding.make_mesh(data, model, jax.devices()[: data * model])


def load(folder, mesh=None, **options):
  spec = {"source": "classifier", "model": str(folder), "batch": 4}
  spec |= {"source_length": LENGTH} | options
  return load_reward("judge", spec, mesh or mesh_of()).score


# Encoders, by a forward pass of their own.


def loaded(folder):
  """(the classifier of a folder, its parameters on one device)."""
  opened = classifiers.open_folder(folder)
  place = functools.partial(sharding.param_shardings, mesh_of())
  params = classifiers.load(
    opened, lambda model: place(model.axes(), model.abstract())
  )
  return opened, params


def linear(rng, name, rows, columns):
  return {
    f"{name}.weight": rng.normal(size=(rows, columns), scale=0.5),
    f"{name}.bias": rng.normal(size=rows, scale=0.5),
  }


def norm(rng, name):
  return {
    f"{name}.weight": 1 + rng.normal(size=WIDTH, scale=0.3),
    f"{name}.bias": rng.normal(size=WIDTH, scale=0.3),
  }


def tensors_of(kind, labels):
  """What a folder of a family holds, under the names of transformers."""
  rng = np.random.default_rng(len(kind))
  prefix = kind.removesuffix("-v2")
  tables = {"word_embeddings": ROWS}
  if kind != "deberta-v2":
    tables["position_embeddings"] = LENGTH + 2 * (kind == "roberta")
  if kind in ("bert", "roberta"):
    tables["token_type_embeddings"] = 2 if kind == "bert" else 1
  found = {
    f"{prefix}.embeddings.{name}.weight": rng.normal(size=(rows, WIDTH))
    for name, rows in tables.items()
  }
  found |= norm(rng, f"{prefix}.embeddings.LayerNorm")
  if kind == "deberta-v2":
    table = rng.normal(size=(12, WIDTH))
    found[f"{prefix}.encoder.rel_embeddings.weight"] = table
    found |= norm(rng, f"{prefix}.encoder.LayerNorm")
  for i in range(LAYERS):
    for part in NAMES[kind][:4]:
      found |= linear(rng, f"{layer(kind, i)}.{part}", WIDTH, WIDTH)
    found |= norm(rng, f"{layer(kind, i)}.{NAMES[kind][4]}")
    wi, wo, last = NAMES[kind][5:]
    found |= linear(rng, f"{layer(kind, i)}.{wi}", HIDDEN, WIDTH)
    found |= linear(rng, f"{layer(kind, i)}.{wo}", WIDTH, HIDDEN)
    found |= norm(rng, f"{layer(kind, i)}.{last}")
  pool, head = HEADS_OF[kind]
  found |= linear(rng, pool, WIDTH, WIDTH) | linear(rng, head, labels, WIDTH)
  return {name: x.astype(np.float32) for name, x in found.items()}


BERT_NAMES = (
  *("attention.self.query", "attention.self.key", "attention.self.value"),
  *("attention.output.dense", "attention.output.LayerNorm"),
  *("intermediate.dense", "output.dense", "output.LayerNorm"),
)
NAMES = {
  "bert": BERT_NAMES,
  "roberta": BERT_NAMES,
  "deberta-v2": (*(f"{n}_proj" for n in BERT_NAMES[:3]), *BERT_NAMES[3:]),
  "distilbert": (
    *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    *("attention.out_lin", "sa_layer_norm"),
    *("ffn.lin1", "ffn.lin2", "output_layer_norm"),
  ),
}
HEADS_OF = {
  "bert": ("bert.pooler.dense", "classifier"),
  "roberta": ("classifier.dense", "classifier.out_proj"),
  "distilbert": ("pre_classifier", "classifier"),
  "deberta-v2": ("pooler.dense", "classifier"),
}


def layer(kind, i):
  stack = "transformer" if kind == "distilbert" else "encoder"
  return f"{kind.removesuffix('-v2')}.{stack}.layer.{i}"


def config_of(kind, labels):
  values = {
    "architectures": ["SomeForSequenceClassification"],
    "model_type": kind,
    "vocab_size": ROWS,
    "id2label": {str(i): LABELS[i] for i in range(labels)},
  }
  if kind == "distilbert":
    return values | {
      "dim": WIDTH,
      "n_layers": LAYERS,
      "n_heads": HEADS,
      "hidden_dim": HIDDEN,
      "activation": "gelu",
      "max_position_embeddings": LENGTH,
    }
  values |= {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": LENGTH,
  }
  if kind == "roberta":
    return values | {
      "max_position_embeddings": LENGTH + 2,
      "type_vocab_size": 1,
    }
  if kind == "deberta-v2":
    return values | {
      "relative_attention": True,
      "position_buckets": 6,
      "norm_rel_ebd": "layer_norm",
      "share_att_key": True,
      "pos_att_type": ["c2p", "p2c"],
      "position_biased_input": False,
      "type_vocab_size": 0,
    }
  return values


def write(folder, kind, labels=1, tensors=None, **changes):
  """Writes a folder; None leaves out a field of config.json."""
  folder.mkdir(exist_ok=True)
  values = config_of(kind, labels) | changes
  values = {name: x for name, x in values.items() if x is not None}
  (folder / "config.json").write_text(json.dumps(values))
  tensors = tensors_of(kind, labels) if tensors is None else tensors
  # As old versions of transformers wrote them.
  unused = {f"{kind}.embeddings.position_ids": np.arange(LENGTH)}
  if kind == "deberta-v2":
    table = np.zeros([LENGTH, WIDTH], np.float32)
    unused = {"deberta.embeddings.position_embeddings.weight": table}
  if kind == "roberta":  # of what it was finetuned from
    pool = np.zeros([WIDTH, WIDTH], np.float32)
    unused |= {
      "roberta.pooler.dense.weight": pool,
      "roberta.pooler.dense.bias": pool[0],
    }
  safetensors.save_file(tensors | unused, folder / "model.safetensors")
  small_encoder.write_tokenizer(folder, kind)
  return folder


def gelu(x):
  return 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))


def numpy_logits(kind, labels, ids, segments):
  """Logits of one row without padding, in float64."""
  tensors = {n: x.astype(float) for n, x in tensors_of(kind, labels).items()}
  prefix = kind.removesuffix("-v2")
  epsilon = 1e-12 if kind == "distilbert" else 1e-3
  length = len(ids)

  def dense(name, x):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

  def normed(name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / (np.square(x).mean(-1, keepdims=True) + epsilon) ** 0.5
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

  def table(name):
    return tensors[f"{prefix}.embeddings.{name}.weight"]

  x = table("word_embeddings")[ids]
  if kind != "deberta-v2":
    first = 2 * (kind == "roberta")
    x = x + table("position_embeddings")[first : first + length]
  if kind == "bert":
    x = x + table("token_type_embeddings")[segments]
  if kind == "roberta":
    x = x + table("token_type_embeddings")
  x = normed(f"{prefix}.embeddings.LayerNorm", x)
  for i in range(LAYERS):
    q, k, v, out, first_norm, wi, wo, second_norm = (
      f"{layer(kind, i)}.{name}" for name in NAMES[kind]
    )
    attended = np.zeros_like(x)
    for h in range(HEADS):
      own = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
      query, keys, values = (dense(n, x)[:, own] for n in (q, k, v))
      logits = query @ keys.T
      scale = WIDTH // HEADS
      if kind == "deberta-v2":
        scale *= 3
        rows = tensors[f"{prefix}.encoder.rel_embeddings.weight"]
        rows = normed(f"{prefix}.encoder.LayerNorm", rows)
        of_query, of_key = (dense(n, rows)[:, own] for n in (q, k))
        for a in range(length):
          for b in range(length):
            row = bucket(a - b) + 6
            logits[a, b] += query[a] @ of_key[row] + keys[b] @ of_query[row]
      weights = np.exp(logits / scale**0.5)
      weights /= weights.sum(-1, keepdims=True)
      attended[:, own] = weights @ values
    x = normed(first_norm, x + dense(out, attended))
    x = normed(second_norm, x + dense(wo, gelu(dense(wi, x))))
  pool, head = HEADS_OF[kind]
  activation = {
    "distilbert": lambda x: np.maximum(x, 0),
    "deberta-v2": gelu,
  }.get(kind, np.tanh)
  return dense(head, activation(dense(pool, x[0])))


def bucket(distance):
  """Of 6 to a side: 3 of one distance, then up to 63 logarithmically."""
  far = abs(distance)
  if far > 3:
    far = 3 + math.ceil(math.log(far / 3) / math.log((LENGTH - 1) / 3) * 2)
  return min(int(math.copysign(far, distance)), 5)


def encoded(kind, document, response):
  """(ids, segments) of a pair, whose document is cut token by token."""
  content = small_encoder.tokenizer_files(kind)["tokenizer.json"]
  tokenizer = tokenizers.Tokenizer.from_buffer(content)
  tokenizer.enable_truncation(LENGTH, strategy="only_first")
  encoding = tokenizer.encode(document, response)
  return encoding.ids, encoding.type_ids


class TestEncoders:
  @pytest.mark.parametrize("kind", ENCODERS)
  def test_scores_are_those_of_another_forward_pass(self, kind, tmp_path):
    write(tmp_path, kind, labels=3)
    rows = [
      encoded(kind, *pair) for pair in zip(DOCUMENTS, RESPONSES, strict=True)
    ]
    lengths = [len(ids) for ids, _ in rows]
    assert min(lengths) < 30 and max(lengths) == LENGTH
    logits = np.stack([numpy_logits(kind, 3, *row) for row in rows])
    expected = logits[:, 1] - np.log(np.exp(logits).sum(-1))
    assert expected.std() > 0.05
    score = load(tmp_path, label="yes", scan_layers=kind == "bert")
    scores = score(DOCUMENTS, DOCUMENTS, RESPONSES)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)

  def test_text_spells_no_control_token(self, tmp_path):
    score = load(write(tmp_path, "bert"))
    plain, spelled, other = score(
      ["a [ sep ] b"] + ["a [SEP] b"] * 2,
      [""] * 3,
      ["c", "c", "c [PAD]"],
    )
    assert plain == spelled != other

  def test_devices_and_bfloat16_change_little(self, tmp_path):
    write(tmp_path, "deberta-v2")
    expected = load(tmp_path)(DOCUMENTS, DOCUMENTS, RESPONSES)
    many = load(tmp_path, mesh_of(2, 3), fsdp=True, scan_layers=True)
    scores = many(DOCUMENTS, DOCUMENTS, RESPONSES)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    narrow = load(tmp_path, dtype="bfloat16")(DOCUMENTS, DOCUMENTS, RESPONSES)
    assert 0 < abs(narrow - expected).max() < 0.3


# Decoders.


def classifier_of_fixture(kind, folder):
  """A head of three rows of the logit layer, and their logits [T, 3]."""
  source = FIXTURES / kind
  tensors = {}
  for file in source.glob("*.safetensors"):
    tensors |= safetensors.load_file(file)
  expected = np.load(source / "expected.npz")
  values = json.loads((source / "config.json").read_text())
  cap = values.get("final_logit_softcapping")
  logits = expected["logits"].astype(np.float64)
  if cap is not None:  # of the logit layer alone
    logits = cap * np.arctanh(logits / cap)
  chosen = np.argsort(abs(logits).max(0))[:3]
  layer = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
  tensors["score.weight"] = layer[chosen]
  values["architectures"] = ["SomeForSequenceClassification"]
  (folder / "config.json").write_text(json.dumps(values))
  safetensors.save_file(tensors, folder / "model.safetensors")
  return expected["ids"], logits[:, chosen]


@pytest.mark.parametrize(
  "kind",
  [
    *("qwen2", "gemma2"),
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in ("llama", "qwen3", "gemma3_text")
    ),
  ],
)
def test_a_decoders_numbers_are_those_of_its_last_token(kind, tmp_path):
  """By what transformers has made of the fixtures."""
  ids, logits = classifier_of_fixture(kind, tmp_path)
  opened, params = loaded(tmp_path)
  lengths = (len(ids), 7, 1)
  rows = np.full([len(lengths), len(ids) + 3], -1, np.int32)
  for row, length in zip(rows, lengths, strict=True):
    row[:length] = ids[:length]
  found = jax.jit(opened.model.logits)(params, rows)
  expected = logits[np.asarray(lengths) - 1]
  np.testing.assert_allclose(found, expected, atol=1e-4)


def decoder(folder, **changes):
  """Writes a Qwen3 of one layer with the small decoder's tokenizer."""
  rng = np.random.default_rng(0)
  width, hidden, head = 16, 24, 6
  shapes = {
    "self_attn.q_proj": (4 * head, width),
    "self_attn.k_proj": (2 * head, width),
    "self_attn.v_proj": (2 * head, width),
    "self_attn.o_proj": (width, 4 * head),
    "self_attn.q_norm": (head,),
    "self_attn.k_norm": (head,),
    "mlp.gate_proj": (hidden, width),
    "mlp.up_proj": (hidden, width),
    "mlp.down_proj": (width, hidden),
    "input_layernorm": (width,),
    "post_attention_layernorm": (width,),
  }
  shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
  shapes |= {
    "model.embed_tokens": (512, width),
    "model.norm": (width,),
    "score": (1, width),
  }
  tensors = {
    f"{name}.weight": rng.normal(size=shape, scale=0.5).astype(np.float32)
    for name, shape in shapes.items()
  }
  values = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": width,
    "intermediate_size": hidden,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": head,
    "eos_token_id": 2,
    "id2label": {"0": "LABEL_0"},
  } | changes
  folder.mkdir()
  safetensors.save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(values))
  for name, content in small_decoder.tokenizer_files().items():
    (folder / name).write_bytes(content)
  return folder


def chat(document, response):
  """What the small decoder's template makes, as text."""
  return (
    f"<|im_start|>user\n{document.strip()}<|im_end|>"
    f"<|im_start|>assistant\n{response.strip()}<|im_end|>"
  )


def ids_of(text):
  content = small_decoder.tokenizer_files()["tokenizer.json"]
  return tokenizers.Tokenizer.from_buffer(content).encode(text).ids


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  """(folder of a classifier, [n] ids -> its number)."""
  folder = decoder(tmp_path_factory.mktemp("qwen") / "model")
  opened, params = loaded(folder)
  run = jax.jit(opened.model.logits)

  def number(ids):
    row = np.full([1, 100], -1, np.int32)
    row[0, : len(ids)] = ids
    return float(run(params, row)[0, 0])

  return folder, number


class TestDecoders:
  def test_reads_the_chat_template(self, qwen):
    folder, number = qwen
    documents = ["What is new?", "", "a <|im_end|> b"]
    responses = ["Nothing much, thank you.", "The council met.", ""]
    score = load(folder)
    scores = score(documents, documents, responses)
    expected = [
      number(ids_of(chat(*pair)))
      for pair in zip(documents[:2], responses[:2], strict=True)
    ]
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(scores[:2], expected, atol=1e-5)
    # What text spells like a control token is none.
    assert abs(scores[2] - number(ids_of(chat(*("a <|im_end|> b", ""))))) > 1e-3

  def test_cuts_the_document_and_never_the_response(self, qwen):
    tokenizer = small_decoder.make_tokenizer()
    document, response = DOCUMENTS[-1] * 2, RESPONSES[-1]
    ids = tokenizer.judged(document, response, None, LENGTH)
    assert LENGTH - 4 <= len(ids) <= LENGTH
    text = tokenizer.decode(ids)
    cut = text.removeprefix("user\n").partition("assistant")[0]
    assert cut and document.startswith(cut)
    assert text.endswith(f"assistant\n{response}")
    folder, number = qwen
    scores = load(folder)([document], [""], [response])
    np.testing.assert_allclose(scores, [number(ids)], atol=1e-5)

  def test_a_template_takes_the_chat_templates_place(self, qwen):
    folder, number = qwen
    score = load(folder, template="Q: {document} A: {response}.")
    scores = score(["why {response}?"], [""], ["so"])
    expected = number(ids_of("Q: why {response}? A: so."))
    np.testing.assert_allclose(scores, [expected], atol=1e-5)

  @pytest.mark.parametrize("pad_id", [2, 0])
  def test_reads_before_what_pads_as_transformers_does(
    self, pad_id, qwen, tmp_path
  ):
    """The template ends a text in token 2, which may be the padding too."""
    row = ids_of(chat("a", "b"))
    assert row[-1] == 2 in row[:-1]
    folder = decoder(tmp_path / "model", pad_token_id=pad_id)
    (score,) = load(folder)(["a"], [""], ["b"])
    numbers = [qwen[1](row), qwen[1](row[:-1])]
    assert abs(numbers[0] - numbers[1]) > 0.01
    np.testing.assert_allclose(score, numbers[pad_id == 2], atol=1e-5)

  def test_devices_change_nothing(self, qwen):
    folder, _ = qwen
    documents = [document[:60] for document in DOCUMENTS]
    expected = load(folder)(documents, documents, RESPONSES)
    many = load(folder, mesh_of(4, 2), fsdp=True, scan_layers=True)
    scores = many(documents, documents, RESPONSES)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


class Heads:
  """A model whose numbers are its rows."""

  def logits(self, params, rows):
    return rows


@pytest.mark.parametrize(
  ("problem", "score"),
  [
    (None, lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))),
    ("multi_label_classification", lambda x: -np.log1p(np.exp(-x))),
    ("regression", lambda x: x),
  ],
)
def test_scores_of_several_labels(problem, score, tmp_path):
  # The third one's name is its number.
  names = {"0": "no", "1": "yes"}
  write(tmp_path, "bert", 3, problem_type=problem, id2label=names)
  opened = classifiers.open_folder(tmp_path)
  assert opened.labels.names == ("no", "yes", "LABEL_2")
  opened = opened._replace(model=Heads())
  numbers = np.asarray([[0.5, -2.0, 1.0], [3.0, 0.0, -1.0]], np.float32)
  for i in range(3):
    found = score_rows(opened, None, numbers, i)
    np.testing.assert_allclose(found, score(numbers)[:, i], atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_is_planned(kind, tmp_path):
  """The program that a plan compiles is of the folder's size."""
  folder = tmp_path / "model"
  write(folder, kind) if kind == "bert" else decoder(folder)
  config = config_lib.get_config()
  config.objectives = ("rouge", "judge")
  config.rewards.judge = config_lib.model_reward(
    "classifier", model=str(folder), source_length=LENGTH, batch=6
  )
  config.rollout.prompts, config.rollout.samples = 8, 2
  (job,) = programs._judges(config, mesh_of(2, 1))
  abstract = classifiers.open_folder(folder).model.abstract()
  size = sum(x.size for x in jax.tree.leaves(abstract))
  assert job.held == {"reward models": 4 * size} and job.calls == 3
  flops = 2 * programs.compile_job(job).costs.flops
  if kind == "bert":
    np.testing.assert_allclose(flops, job.useful, rtol=0.3)
  else:  # of its last layer, keys and values alone are needed
    assert job.useful / 20 < flops < job.useful


def test_labels_have_names_and_numbers():
  assert label_of(("only",), None) is None
  assert label_of(("only",), "only") == 0
  assert [label_of(LABELS, x) for x in ("maybe", 0, "1")] == [2, 0, 1]
  assert label_of(("1", "0"), "1") == 0
  with pytest.raises(ValueError, match="label = 'best': .* one score is 0 'x'"):
    label_of(("x",), "best")


class TestWhatIsWrong:
  @pytest.mark.parametrize(
    ("kind", "labels", "changes", "options", "message"),
    [
      ("bert", 2, {}, {}, "label must be one of 0 'no', 1 'yes', by name"),
      ("bert", 3, {}, {"label": "Yes"}, "0 'no', .* got 'Yes'"),
      ("bert", 3, {}, {"label": -1}, "got -1"),
      (
        *("bert", 1, {"architectures": ["BertForMaskedLM"]}, {}),
        "architectures must name a ...ForSequenceClassification.*MaskedLM",
      ),
      ("bert", 1, {"architectures": None}, {}, "architectures must name"),
      ("bert", 1, {"model_type": "t5"}, {}, "model_type must be one of llama"),
      ("bert", 1, {"model_type": "roberta"}, {}, "lacks classifier.dense"),
      ("bert", 1, {"hidden_act": "mish"}, {}, "hidden_act must be one of"),
      ("bert", 1, {"hidden_size": "12"}, {}, "config.json: "),
      ("bert", 1, {"num_attention_heads": 5}, {}, "not a multiple of the 5"),
      (
        *("bert", 1, {"position_embedding_type": "relative_key"}, {}),
        "position_embedding_type = 'relative_key' is not supported",
      ),
      ("bert", 1, {"problem_type": "x"}, {}, "problem_type must be one of"),
      ("bert", 1, {}, {"template": "{document}"}, "template is for decoders"),
      (
        "bert",
        1,
        {},
        {"source_length": 65},
        r"source_length must be in \[8, 64",
      ),
      ("bert", 1, {"vocab_size": 9}, {}, "not the model that its config"),
      ("deberta-v2", 1, {"share_att_key": False}, {}, "n 3.*share_att_key"),
      ("deberta-v2", 1, {"conv_kernel_size": 3}, {}, "n 3.*conv_kernel_size"),
      ("deberta-v2", 1, {"pos_att_type": "c2p"}, {}, "n 3.*pos_att_type"),
      ("deberta-v2", 1, {"position_buckets": None}, {}, "position_buckets"),
      ("roberta", 1, {"pad_token_id": "1"}, {}, "config.json: "),
    ],
  )
  def test_is_one_line(self, kind, labels, changes, options, message, tmp_path):
    write(tmp_path, kind, labels, **changes)
    with pytest.raises(ValueError, match=f"reward 'judge': .*{message}") as e:
      load(tmp_path, **options)
    assert "\n" not in str(e.value)

  def test_a_folder_that_lacks_something(self, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
      load(tmp_path / "absent")
    with pytest.raises(ValueError, match="there is no config.json"):
      load(tmp_path)
    write(tmp_path, "bert")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer.json; write it"):
      load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json can't be read"):
      load(tmp_path)
    for file, content in small_decoder.tokenizer_files().items():
      (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="500 ids, but the model embeds 195"):
      load(tmp_path)
    run_folder.write_json(tmp_path / "model.json", {})
    with pytest.raises(ValueError, match="run of clp: .*'preference'"):
      load(tmp_path)

  def test_rows_that_a_folder_says_wrongly(self, tmp_path):
    for value in ({"template": "x"}, {"template": 1, "source_length": 9}, []):
      name = f"model{len(list(tmp_path.iterdir()))}"
      folder = decoder(tmp_path / name, clp_jax=value)
      with pytest.raises(ValueError, match="clp_jax must hold a template and"):
        load(folder)

  def test_a_decoder_that_can_not_be_asked(self, qwen, tmp_path):
    folder = shutil.copytree(qwen[0], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template; set .template to"):
      load(folder)
    with pytest.raises(ValueError, match="must hold {document} and {response}"):
      load(folder, template="{document}")
    tensors = safetensors.load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    safetensors.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="it lacks score.weight"):
      load(folder, template="{document} {response}")

  @pytest.mark.parametrize("kind", ["bert", "qwen"])
  def test_a_response_that_is_longer_than_a_row(self, kind, qwen, tmp_path):
    folder = qwen[0] if kind == "qwen" else write(tmp_path, "bert")
    reward = load_reward(
      "judge",
      {"source": "classifier", "model": str(folder), "source_length": LENGTH},
      mesh_of(),
    )
    texts = [["a b"], [""], [DOCUMENTS[-1]]]
    with pytest.raises(RewardError, match="source_length = 64; raise it: only"):
      score_all([reward], *texts, step=3)

  def test_a_response_that_fills_a_row_leaves_no_document(self, tmp_path):
    folder = write(tmp_path, "bert")
    response = "a " * (LENGTH - 3)
    score = load(folder)
    one, other = score(["b c", ""], ["", ""], [response, response])
    assert one == other

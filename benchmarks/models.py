"""What benchmarks run: a model, the same in transformers, and its work."""

import argparse
import dataclasses
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.models import families
from clp_jax.models.causal import CausalConfig, Rope
from clp_jax.models.families import Config
from clp_jax.models.presets import OWN_VOCABULARY, PRESETS
from clp_jax.models.t5 import T5Config

Params = Any

FAMILIES = ("t5", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
TOLERANCE = 1e-3  # that logits in float32 may differ from transformers' by


def add_arguments(
  parser: argparse.ArgumentParser, *, batch: int, source: int, target: int
) -> None:
  """Adds what describes a model and its batch; parse them with `parse`."""
  parser.add_argument(
    "--family", choices=FAMILIES, default="t5", help="(default: t5)"
  )
  parser.add_argument(
    "--size",
    default="small",
    help="(default: small)\n"
    + "\n".join(f"{family}: {', '.join(sizes(family))}" for family in FAMILIES),
  )
  parser.add_argument(
    "--batch", type=int, default=batch, help=f"sources (default: {batch})"
  )
  parser.add_argument(
    "--source", type=int, default=source, help=f"tokens (default: {source})"
  )
  parser.add_argument(
    "--target", type=int, default=target, help=f"tokens (default: {target})"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the computation (default: float32)",
  )
  parser.add_argument(
    "--no-peer",
    dest="peer",
    action="store_false",
    help="leave transformers out even where it is installed",
  )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
  """The arguments of `add_arguments`, and what else the parser has."""
  args = parser.parse_args()
  if args.size not in sizes(args.family):
    parser.error(
      f"--size of --family {args.family} must be one of "
      f"{', '.join(sizes(args.family))}, got {args.size}."
    )
  return args


def sizes(family: str) -> dict[str, Config]:
  """Name -> config. Of a decoder, the published sizes have the last part of
  their presets' names, and "tiny" and "small" are of our own."""
  if family == "t5":
    return {n: c for n, c in PRESETS.items() if isinstance(c, T5Config)}
  published = {
    name.partition("-")[2]: config
    for name, config in PRESETS.items()
    if name not in OWN_VOCABULARY
    and isinstance(config, CausalConfig)
    and config.architecture == family
  }
  return {
    name: _decoder(family, name) for name in ("tiny", "small")
  } | published


def _decoder(family: str, size: str) -> CausalConfig:
  """A small model with all that a family has, and with published RoPEs."""
  gemma = family.startswith("gemma")
  ropes = {
    "llama": (Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192),),
    "gemma2": (Rope(),),
    "gemma3_text": (Rope(1_000_000.0), Rope()),
  }
  config = CausalConfig(
    architecture=family,
    vocab_size=8192,
    emb_dim=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=1536,
    activation="gelu" if gemma else "silu",
    norm_epsilon=1e-6,
    norm_from_one=gemma,
    post_norms=gemma,
    qk_norm=family in ("qwen3", "gemma3_text"),
    qkv_bias=family == "qwen2",
    attention_cap=50.0 if family == "gemma2" else None,
    logit_cap=30.0 if family == "gemma2" else None,
    ropes=ropes.get(family, (Rope(1_000_000.0),)),
    scale_embeddings=gemma,
    max_length=32768,
  )
  window = 512
  if size == "tiny":
    config = dataclasses.replace(
      config,
      vocab_size=256,
      emb_dim=64,
      num_layers=2,
      num_heads=4,
      head_dim=16,
      mlp_dim=128,
    )
    window = 16
  if gemma:
    # The last layer of each period sees everything.
    period = 2 if family == "gemma2" else min(6, config.num_layers)
    local = [(i + 1) % period > 0 for i in range(config.num_layers)]
    config = dataclasses.replace(
      config,
      windows=tuple(window if x else 0 for x in local),
      layer_ropes=tuple(map(int, local)) if len(config.ropes) > 1 else (),
    )
  return config


def config_of(args: argparse.Namespace) -> Config:
  """The model that the arguments describe."""
  return dataclasses.replace(
    sizes(args.family)[args.size], dtype=args.dtype, eos_ids=(1,)
  )


def describe(args: argparse.Namespace) -> dict[str, Any]:
  """Columns of a table."""
  family = {} if args.family == "t5" else {"family": args.family}
  return family | {
    "size": args.size,
    "batch": args.batch,
    "source": args.source,
    "target": args.target,
    "dtype": args.dtype,
  }


def random_params(config: Config) -> Params:
  """Random parameters."""
  return jax.jit(families.build(config).init)(jax.random.key(0))


def random_tokens(rows: int, length: int, config: Config) -> np.ndarray:
  """[rows, length] int32, nowhere padding nor the end."""
  rng = np.random.default_rng(0)
  high = min(32000, config.vocab_size)
  return rng.integers(2, high, (rows, length), dtype=np.int32)


def allowed(config: Config) -> np.ndarray | jax.Array:
  """[V] bool: of T5, all but padding; of a decoder, EOS is ruled out, too."""
  ids = np.arange(config.vocab_size)
  if isinstance(config, T5Config):
    return ids > 0
  # Of a NumPy array, sampling would check that something can end a response.
  return jnp.asarray((ids != config.pad_id) & ~np.isin(ids, config.eos_ids))


class Peer:
  """The same weights in transformers, on torch's CUDA device if it has one.

  Before anything is timed, both have to give the same logits in float32.
  """

  def __init__(
    self, config: Config, params: Params, *, source: int, target: int
  ):
    """Writes the model and loads it.

    Args:
      config: of the model.
      params: its parameters.
      source: tokens of the prompts whose responses' logits are compared.
      target: tokens of these responses.

    Raises:
      ValueError: when logits differ.
    """
    import torch
    import transformers

    from clp_jax import interop

    self.torch = torch
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.name = f"transformers {transformers.__version__}, {self.device}"
    self.is_decoder = not isinstance(config, T5Config)
    loader: Any = transformers.T5ForConditionalGeneration
    options = {}
    if self.is_decoder:
      loader = transformers.AutoModelForCausalLM
      # transformers' "sdpa" leaves out the cap of attention's logits.
      capped = config.attention_cap is not None
      options["attn_implementation"] = "eager" if capped else "sdpa"
      self.name += f", {options['attn_implementation']}"

    def load(dtype: str) -> Any:
      model = loader.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype), **options
      )
      if self.is_decoder:
        model.generation_config.pad_token_id = 0  # else it warns; not used
      return model.to(self.device).eval()

    with tempfile.TemporaryDirectory() as folder:
      model = families.build(config)
      interop.save_model(folder, model, jax.device_get(params), "hf")
      self.model = load("float32")
      self._check(config, params, source, target)
      if config.dtype != "float32":
        del self.model  # one at a time
        self.model = load(config.dtype)

  def _check(
    self, config: Config, params: Params, source: int, target: int
  ) -> None:
    model = families.build(dataclasses.replace(config, dtype="float32"))
    tokens = random_tokens(2, source + target, config)
    prompts, targets = tokens[:, :source], tokens[:, source:]
    with jax.default_matmul_precision("float32"):
      ours, _ = jax.jit(model.score)(params, prompts, targets)
    with self.torch.inference_mode():
      theirs, _ = self.score(self.tensor(prompts), self.tensor(targets))
    difference = float(np.abs(np.asarray(ours) - theirs.cpu().numpy()).max())
    print(f"logits differ by {difference:.1e} at most", file=sys.stderr)
    if not difference < TOLERANCE:
      raise ValueError(
        f"{self.name} gives other logits: they differ by {difference:.3g}, "
        f"{TOLERANCE} at most are expected."
      )

  def score(self, prompts: Any, targets: Any) -> tuple[Any, Any]:
    """Teacher-forced logits [R, T, V] of responses, and their mean loss.

    Args:
      prompts: [R, S], from `tensor`.
      targets: [R, T], from `tensor`.
    """
    if not self.is_decoder:
      output = self.model(
        input_ids=prompts,
        attention_mask=self.torch.ones_like(prompts),
        labels=targets,
      )
      return output.logits, output.loss
    tokens = self.torch.cat([prompts, targets], dim=1)
    # No logits of the prompt but the last, which are the first response's. The
    # loss is of each token's logits and the label after it.
    kept = targets.shape[1] + 1
    output = self.model(
      input_ids=tokens,
      attention_mask=self.torch.ones_like(tokens),
      labels=tokens[:, -kept:],
      logits_to_keep=kept,
      use_cache=False,
    )
    return output.logits[:, :-1], output.loss

  def tensor(self, tokens: np.ndarray) -> Any:
    """Tokens on the model's device."""
    return self.torch.as_tensor(tokens, dtype=self.torch.long).to(self.device)

  def wait(self) -> None:
    """Waits for the device."""
    if self.device == "cuda":
      self.torch.cuda.synchronize()


def has_peer(args: argparse.Namespace) -> bool:
  """Whether transformers and torch are there and wanted."""
  if not args.peer:
    return False
  try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
  except ImportError:
    return False
  return True


def decode_bytes(
  config: Config, rows: int, source: int, target: int, samples: int = 1
) -> float:
  """Bytes that decoding `target` tokens has to read: at each, the decoder's
  kernels, the logit layer, and the keys and values so far; those of a source
  once for its samples."""
  width = jnp.dtype(config.dtype).itemsize
  heads = kv_heads = config.num_heads * config.head_dim
  if isinstance(config, T5Config):
    layers = config.num_decoder_layers
    # The keys and values of the source were made before.
    attention = 6 * config.emb_dim * heads
    logit_width = 4  # float32, see t5.py
  else:
    kv_heads = config.num_kv_heads * config.head_dim
    layers = config.num_layers
    attention = 2 * config.emb_dim * (heads + kv_heads)
    logit_width = width
  mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
  kernels = layers * (attention + mlp) * width
  logit_layer = config.vocab_size * config.emb_dim * logit_width
  positions = source / samples + target / 2
  cache = 2 * rows * kv_heads * layers * width * positions
  return float(target * (kernels + logit_layer + cache))

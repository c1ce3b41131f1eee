"""What benchmarks run: a model, the same in transformers, and its work."""

import argparse
import dataclasses
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.models import t5
from clp_jax.models.presets import PRESETS

Params = Any


def add_arguments(
  parser: argparse.ArgumentParser, *, batch: int, source: int, target: int
) -> None:
  """Adds what describes a model and its batch."""
  parser.add_argument(
    "--size", choices=PRESETS, default="small", help="(default: small)"
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


def config_of(args: argparse.Namespace) -> t5.T5Config:
  """The model that the arguments describe."""
  return dataclasses.replace(PRESETS[args.size], dtype=args.dtype, eos_ids=(1,))


def describe(args: argparse.Namespace) -> dict[str, Any]:
  """Columns of a table."""
  return {
    "size": args.size,
    "batch": args.batch,
    "source": args.source,
    "target": args.target,
    "dtype": args.dtype,
  }


def random_params(config: t5.T5Config) -> Params:
  """Random parameters."""
  draw = jax.jit(t5.init_params, static_argnums=0)
  return draw(config, jax.random.key(0))


def random_tokens(rows: int, length: int, config: t5.T5Config) -> np.ndarray:
  """[rows, length] int32, nowhere padding nor the end."""
  rng = np.random.default_rng(0)
  high = min(32000, config.vocab_size)
  return rng.integers(2, high, (rows, length), dtype=np.int32)


def allowed(config: t5.T5Config) -> np.ndarray:
  """[V] bool: all but padding."""
  return np.arange(config.vocab_size) > 0


class Peer:
  """The same weights in transformers, on torch's CUDA device if it has one."""

  def __init__(self, config: t5.T5Config, params: Params):
    import torch
    import transformers

    from clp_jax import interop

    with tempfile.TemporaryDirectory() as folder:
      interop.save_t5(folder, config, jax.device_get(params), "hf")
      self.model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, torch_dtype=getattr(torch, config.dtype)
      )
    self.torch = torch
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.model = self.model.to(self.device).eval()
    self.name = f"transformers {transformers.__version__}, {self.device}"

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


def _layer_params(config: t5.T5Config) -> tuple[int, int, int]:
  """Kernels of an encoder layer, and of a decoder layer without and with what
  is applied to the source."""
  heads = config.num_heads * config.head_dim
  attention = 4 * config.emb_dim * heads
  mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
  return attention + mlp, attention * 3 // 2 + mlp, attention // 2


def forward_flops(
  config: t5.T5Config, batch: int, source: int, target: int
) -> float:
  """FLOPs of linear maps and attention in one teacher-forced pass."""
  encoder, decoder, cross = _layer_params(config)
  heads = config.num_heads * config.head_dim
  per_row = (
    2 * config.num_encoder_layers * encoder * source
    + 2 * config.num_decoder_layers * (decoder * target + cross * source)
    + 2 * config.vocab_size * config.emb_dim * target
    + 4 * heads * config.num_encoder_layers * source**2
    + 4 * heads * config.num_decoder_layers * target * (target + source)
  )
  return float(batch * per_row)


def decode_bytes(
  config: t5.T5Config, batch: int, source: int, target: int
) -> float:
  """Bytes that decoding `target` tokens has to read: at each, the decoder's
  kernels, the logit layer, and the keys and values so far."""
  _, decoder, _ = _layer_params(config)
  width = jnp.dtype(config.dtype).itemsize
  heads = config.num_heads * config.head_dim
  kernels = config.num_decoder_layers * decoder * width
  logit_layer = config.vocab_size * config.emb_dim * 4  # float32, see t5.py
  cache = (
    2
    * batch
    * heads
    * config.num_decoder_layers
    * width
    * (source + target / 2)
  )
  return float(target * (kernels + logit_layer + cache))

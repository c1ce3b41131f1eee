"""A plain server to compare ours with: transformers behind FastAPI.

  python -m benchmarks.serving_peer --model EXPORTED --source 128 --target 64

Serves one ordinary model, a Hugging Face folder as `clp export --format hf`
writes it, so that it takes `weights` and ignores them. Answers one request
after another with all cores: batching is what people add to such a server next.
`python -m benchmarks.serving --peer` starts it, on a port that it prints.
"""

import argparse
import socket
import threading
from collections.abc import Callable
from typing import Any

import fastapi
import torch
import transformers
import uvicorn


def load(
  folder: str, num_source_tokens: int, num_target_tokens: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
  """Answers bodies of /v1/completions with the model of a folder, which reads
  and writes so many tokens at most."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  config = transformers.AutoConfig.from_pretrained(folder)
  kind = (
    transformers.AutoModelForSeq2SeqLM
    if config.is_encoder_decoder
    else transformers.AutoModelForCausalLM
  )
  model = kind.from_pretrained(folder).eval()
  one_at_a_time = threading.Lock()

  def complete(body: dict[str, Any]) -> dict[str, Any]:
    inputs = tokenizer(
      body["prompt"],
      truncation=True,
      max_length=num_source_tokens,
      return_tensors="pt",
    )
    temperature = body.get("temperature", 1.0)
    options: dict[str, Any] = {"do_sample": False}
    if temperature:
      options = {"do_sample": True, "temperature": temperature}
      options |= {"top_p": body.get("top_p", 1.0), "top_k": 0}
    most = min(body.get("max_tokens", num_target_tokens), num_target_tokens)
    with one_at_a_time, torch.inference_mode():
      torch.manual_seed(body.get("seed", 0))
      tokens = model.generate(**inputs, max_new_tokens=most, **options)[0]
    if not config.is_encoder_decoder:
      tokens = tokens[inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"choices": [{"index": 0, "text": text}]}

  return complete


def main() -> None:
  """Runs the server."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True)
  parser.add_argument("--source", type=int, required=True)
  parser.add_argument("--target", type=int, required=True)
  args = parser.parse_args()
  app = fastapi.FastAPI()
  app.post("/v1/completions")(load(args.model, args.source, args.target))
  listener = socket.create_server(("127.0.0.1", 0))
  print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
  config = uvicorn.Config(app, log_level="warning")
  uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
  main()

"""A server under load: many clients with weightings of their own.

  python -m benchmarks.serving --workdir runs/demo
  python -m benchmarks.serving --workdir runs/demo --seconds 10 --json
  python -m benchmarks.serving --workdir runs/demo --mixed --peer

Starts `clp serve` on loopback, in a process of its own, and measures
1. one client that asks one thing after another, for a third of the time;
2. 64 clients at once, each drawing from 1,000 requests that differ in document,
   weighting, seed and sampling, and with --mixed in the most tokens that the
   answer may have, 8 to 64 (as far as the run's data.target_length goes);
and then asks 2's requests again, alone: every answer must be the same. The load
comes from this process, on the same machine. Prints one table, or one JSON
object. Status 1 if an answer differed or a request failed otherwise than with
status 429. With --peer, a plain server of transformers (extra "parity"), which
holds the policy of equal weights, gets 2's load too, before and after ours:
serving_peer.py.
"""

import argparse
import asyncio
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from clp_jax import run_folder

REQUESTS = 1000  # that there are to draw from
MIXED = (8, 64)  # tokens that answers of mixed length may have


def main() -> int:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="runs/demo")
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--seconds", type=float, default=60.0)
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--mixed", action="store_true")
  parser.add_argument("--peer", action="store_true")
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  with contextlib.ExitStack() as stack:
    address, pid = stack.enter_context(
      _server(
        *("clp_jax", "serve", "--port", "0"),
        *("--workdir", args.workdir, "--rows", str(args.rows)),
      )
    )
    peer = stack.enter_context(_peer(args.workdir)) if args.peer else None
    result = asyncio.run(_measure(address, pid, peer, args))
  if args.json:
    print(json.dumps(result))
  else:
    width = max(map(len, result))
    for name, value in result.items():
      print(f"{name:<{width}}  {value}")
  return int(bool(result["errors"] or result["answers that differ"]))


@contextlib.contextmanager
def _server(module: str, *options: str) -> Iterator[tuple[str, int]]:
  """The address and process of a server while it runs."""
  process = subprocess.Popen(
    [sys.executable, "-m", module, *options], stdout=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
      sys.exit(process.wait())
    yield line.split()[-1], process.pid
  finally:
    process.terminate()
    process.wait()


@contextlib.contextmanager
def _peer(workdir: str) -> Iterator[str]:
  """The address of the plain server while it runs."""
  config = run_folder.load_config(workdir)
  weights = ",".join(
    f"{name}={1 / len(config.objectives)}" for name in config.objectives
  )
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "clp_jax", "export", "--format", "hf"]
    command += ["--workdir", workdir, "--output", folder]
    command += ["--weights", weights]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with _server(
      *("benchmarks.serving_peer", "--model", folder),
      *("--source", str(config.data.source_length)),
      *("--target", str(config.data.target_length)),
    ) as (address, _):
      yield address


async def _measure(address: str, pid: int, peer: str | None, args) -> dict:
  client = _Connection(address)
  (model,) = (await client.get("/v1/models"))["data"]
  documents = (await client.get("/v1/documents"))["data"]
  client.close()
  make = _requests(
    model, [d["document"] for d in documents], args.seed, args.mixed
  )
  await _load(address, make, 1, 2.0)  # warms both sides up
  alone = await _load(address, make, 1, args.seconds / 3)
  await _load(address, make, args.clients, args.seconds / 20)
  before = _memory(pid)
  peers = [await _load_peer(peer, make, args)] if peer else []
  loaded = await _load(address, make, args.clients, args.seconds)
  peers += [await _load_peer(peer, make, args)] if peer else []
  after = _memory(pid)
  client = _Connection(address)
  expected: dict[int, str] = {}
  for body, _ in loaded.answers:
    if body["seed"] not in expected:
      _, expected[body["seed"]] = await client.ask(body)
  client.close()
  differing = sum(text != expected[b["seed"]] for b, text in loaded.answers)
  return {
    "clients": args.clients,
    "seconds": args.seconds,
    "rows in a batch": args.rows,
    "requests": len(loaded.seconds),
    "requests/s": round(loaded.rate, 1),
    "p50 ms": loaded.percentile(50),
    "p99 ms": loaded.percentile(99),
    "requests/s one at a time": round(alone.rate, 1),
    "p50 ms one at a time": alone.percentile(50),
    "ratio": round(loaded.rate / alone.rate, 2),
    "status 429": loaded.refused,
    "errors": loaded.errors + alone.errors,
    "answers checked": len(loaded.answers),
    "answers that differ": differing,
    "memory before MiB": before,
    "memory after MiB": after,
    **_against(loaded, peers),
  }


async def _load_peer(address: str, make, args) -> "_Load":
  await _load(address, make, 1, 2.0)  # warms it up
  return await _load(address, make, args.clients, args.seconds)


def _against(loaded: "_Load", peers: list["_Load"]) -> dict:
  """What the plain server did before and after, and how many times its
  requests a second ours answered."""
  if not peers:
    return {}
  rates = [peer.rate for peer in peers]
  return {
    "peer requests/s": [round(rate, 1) for rate in rates],
    "peer p50 ms": [peer.percentile(50) for peer in peers],
    "peer p99 ms": [peer.percentile(99) for peer in peers],
    "peer errors": sum(peer.errors for peer in peers),
    "times the peer": round(loaded.rate / float(np.mean(rates)), 2),
  }


class _Load:
  """What happened under a load."""

  def __init__(self):
    self.seconds: list[float] = []
    self.answers: list[tuple[dict, str]] = []
    self.refused = 0
    self.errors = 0
    self.wall = 0.0

  @property
  def rate(self) -> float:
    """Answers a second."""
    return len(self.seconds) / self.wall

  def percentile(self, q: float) -> float:
    """Of the times to an answer, ms."""
    return round(float(np.percentile(self.seconds, q)) * 1e3, 1)


async def _load(address, make, num_clients: int, seconds: float) -> _Load:
  load = _Load()
  start = time.perf_counter()

  async def ask_until_the_end():
    client = _Connection(address)
    while time.perf_counter() - start < seconds:
      body = make()
      asked = time.perf_counter()
      try:
        async with asyncio.timeout(120):
          status, text = await client.ask(body)
      except (OSError, EOFError, TimeoutError) as error:
        print(f"a request failed: {error!r}", file=sys.stderr)
        client.close()
        status, text = None, ""
      if status == 200:
        load.seconds.append(time.perf_counter() - asked)
        load.answers.append((body, text))
      elif status == 429:
        load.refused += 1
        await asyncio.sleep(1)
      else:
        load.errors += 1
    client.close()

  await asyncio.gather(*(ask_until_the_end() for _ in range(num_clients)))
  load.wall = time.perf_counter() - start
  return load


class _Connection:
  """HTTP as plain as can be: the machine's time is for the server."""

  def __init__(self, address: str):
    self._host, _, port = address.rstrip("/").rpartition("/")[2].rpartition(":")
    self._port = int(port)
    self._streams: tuple | None = None

  async def get(self, path: str) -> dict:
    status, content = await self._send(f"GET {path}", b"")
    if status != 200:
      raise OSError(f"GET {path} was answered with status {status}.")
    return json.loads(content)

  async def ask(self, body: dict) -> tuple[int, str]:
    """The status, and the text of the one answer or of the error."""
    content = json.dumps(body).encode()
    status, content = await self._send("POST /v1/completions", content)
    if status != 200:
      return status, content.decode()
    return 200, json.loads(content)["choices"][0]["text"]

  async def _send(self, request: str, content: bytes) -> tuple[int, bytes]:
    if self._streams is None:
      self._streams = await asyncio.open_connection(self._host, self._port)
    reader, writer = self._streams
    head = (
      f"{request} HTTP/1.1",
      f"Host: {self._host}:{self._port}",
      "Content-Type: application/json",
      f"Content-Length: {len(content)}\r\n\r\n",
    )
    writer.write("\r\n".join(head).encode() + content)
    answer = await reader.readuntil(b"\r\n\r\n")
    line, *fields = answer.decode("latin-1").lower().split("\r\n")
    length = next(f for f in fields if f.startswith("content-length:"))
    return int(line.split()[1]), await reader.readexactly(int(length[15:]))

  def close(self) -> None:
    if self._streams is not None:
      self._streams[1].close()
      self._streams = None


def _requests(model: dict, documents: list[str], seed: int, mixed: bool):
  """Draws from requests with random documents, weightings and sampling."""
  rng = np.random.default_rng(seed)
  names = model["objectives"]

  def random_request(i: int) -> dict:
    body = {
      "model": model["id"],
      "prompt": documents[rng.integers(len(documents))],
      "weights": dict(
        zip(names, rng.dirichlet([1.0] * len(names)).tolist(), strict=True)
      ),
      "seed": seed + i,  # of its own
      "temperature": float(rng.choice([0.0, 0.7, 1.0])),
      "top_p": float(rng.choice([0.9, 1.0])),
    }
    if model["alpha_range"] is not None:
      low, high = model["alpha_range"]
      body["alpha"] = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    if mixed:
      body["max_tokens"] = int(rng.integers(*MIXED, endpoint=True))
    return body

  requests = [random_request(i) for i in range(REQUESTS)]
  return lambda: requests[rng.integers(REQUESTS)]


def _memory(pid: int) -> int:
  """Resident memory of a process, MiB."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  (line,) = (x for x in status.splitlines() if x.startswith("VmRSS"))
  return int(line.split()[1]) // 1024


if __name__ == "__main__":
  sys.exit(main())

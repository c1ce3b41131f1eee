"""A run on a socket: loads, compiles, listens."""

import json
import os
import pathlib
import signal
import socket
import sys
import time
from typing import Any

import uvicorn
from etils import epath

from clp_jax import batches, run_folder
from clp_jax.config import column
from clp_jax.data import jsonl
from clp_jax.errors import ConfigError, FrontError
from clp_jax.evaluation import examples
from clp_jax.evaluation import front as front_lib
from clp_jax.policy import Policy
from clp_jax.serving import schema
from clp_jax.serving.api import make_app
from clp_jax.serving.batcher import Batcher
from clp_jax.serving.decoder import Decoder
from clp_jax.serving.metrics import Metrics
from clp_jax.serving.protection import Limits, is_loopback, make_protocol

KEY_VARIABLE = "CLP_API_KEY"
EXAMPLES = 8  # documents that the page offers


def serve(
  workdir: str, host: str, port: int, *, rows: int, limits: Limits
) -> None:
  """Serves a run until SIGTERM or SIGINT.

  Args:
    workdir: the run's folder.
    host: address or name to listen on.
    port: 0 takes a free one; the address is printed.
    rows: R, decoded together.
    limits: of the requests.

  Raises:
    ConfigError: when the address needs a key and there is none.
    RunError: when there is no such run.
    OSError: when the address can't be had.
  """
  key = api_key(host)
  with _bind(host, port) as listener:
    policy = Policy.load(workdir)
    if policy.mixes_logits:
      raise ConfigError(
        f"{workdir} mixes the logits of several models, which is not served; "
        "`clp generate` runs it."
      )
    decoder = Decoder(policy, rows)
    start = time.perf_counter()
    decoder.compile()
    shapes = ", ".join(f"{decoder.rows} x {n}" for n in decoder.lengths)
    seconds = time.perf_counter() - start
    print(f"compiled shapes {shapes} in {seconds:.1f} s", file=sys.stderr)
    server = make_server(
      policy,
      decoder,
      name=pathlib.PurePath(os.path.abspath(workdir)).name,
      limits=limits,
      key=key,
      loopback=is_loopback(host),
    )

    def stop(*_: Any) -> None:
      server.should_exit = True

    # For a signal that comes before uvicorn has its own handlers, and the same
    # one again, which uvicorn raises when it has ended in good order.
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, stop)
    listener.listen()  # who reads the address may come at once
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    print(f"serving {workdir} on {address}", flush=True)
    server.run(sockets=[listener])


def make_server(
  policy: Policy,
  decoder: Decoder,
  *,
  name: str,
  limits: Limits,
  key: str | None,
  loopback: bool,
) -> uvicorn.Server:
  """A server that only needs a socket, `run(sockets=[...])`.

  Args: as for `make_app`, but for:
    decoder: the compiled programs of the policy.
  """
  metrics = Metrics()
  batcher = Batcher(decoder, limits.waiting, metrics.on_batch)
  metrics.watch(batcher)
  app = make_app(
    policy,
    batcher,
    metrics,
    name=name,
    documents=example_documents(policy),
    load_front=lambda: load_front(policy),
    limits=limits,
    key=key,
    loopback=loopback,
  )
  return uvicorn.Server(
    uvicorn.Config(
      app,
      http=make_protocol(limits),
      ws="none",
      log_config=None,
      access_log=False,
      server_header=False,
      # The client's address is used for nothing.
      proxy_headers=False,
      timeout_graceful_shutdown=int(limits.seconds),
    )
  )


def api_key(host: str) -> str | None:
  """The key that clients must know, from the environment.

  Raises:
    ConfigError: others than this machine could come, and there is no key.
  """
  key = os.environ.get(KEY_VARIABLE, "").strip()
  if key:
    return key
  if not is_loopback(host):
    raise ConfigError(
      f"--host {host} lets other machines in: set {KEY_VARIABLE} to a key that "
      "they must send, or leave --host out to listen on 127.0.0.1."
    )
  return None


def example_documents(policy: Policy) -> schema.Documents:
  """Held-out documents, telling ones where the run's samples say which are.

  Returns:
    The documents, none where the run's data is elsewhere, and how they were
    chosen.
  """
  note = ""
  folder = run_folder.folder(policy.workdir)
  try:
    if (folder / "evaluation" / "samples.jsonl").exists():
      fields = [column(policy.config.data, "document")]
      rows = examples.load(folder)
      rows = [r | {"document": jsonl.document_of(r, fields)} for r in rows]
      references = {row["document"]: row["reference"] for row in rows}
      chosen = examples.telling(rows, EXAMPLES)
      pairs = {document: references[document] for document in chosen}
      if len(pairs) < len(references):
        note = examples.CHOSEN.format(documents=len(references))
    else:
      batch = batches.eval_batch(policy.config, policy.vocabulary, EXAMPLES)
      pairs = dict(zip(batch.documents, batch.references, strict=True))
  except (KeyError, OSError, TypeError, ValueError) as error:
    print(f"no example documents: {error}", file=sys.stderr)
    pairs = {}
  return schema.Documents(
    data=[schema.Document(document=d, reference=r) for d, r in pairs.items()],
    note=note,
  )


def load_front(policy: Policy) -> dict[str, Any] | None:
  """The content of the run's front.json, or None where there is none yet."""
  file: epath.Path = (
    run_folder.folder(policy.workdir) / "evaluation" / "front.json"
  )
  try:
    front = front_lib.load_front(file)
  except (FrontError, OSError):
    return None
  if front.objectives != policy.objectives:
    return None
  return json.loads(file.read_text())


def _bind(host: str, port: int) -> socket.socket:
  """A socket that is bound, but not listening yet: loading takes a while."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as error:
    raise OSError(
      f"can't listen on {host}, port {port}: {error.strerror or error}; choose "
      "another --host or --port."
    ) from error
  return listener

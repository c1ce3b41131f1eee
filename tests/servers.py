"""`clp serve` in this process, for the tests that ask it."""

import contextlib
import socket
import threading
import time

import openai

from clp_jax.serving import protection, server
from clp_jax.serving.decoder import Decoder

LIMITS = protection.Limits(
  body_bytes=1 << 16, rows=8, waiting=48, seconds=30.0, header_seconds=1.0
)


def make_decoder(policy):
  """Of batches of 8 rows, compiled."""
  made = Decoder(policy, 8)
  made.compile()
  return made


def make_client(address):
  return openai.OpenAI(
    base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60
  )


@contextlib.contextmanager
def serving(policy, decoder, limits=LIMITS, key=None, loopback=True):
  """A server on a socket, in a thread: its address."""
  made = server.make_server(
    policy, decoder, name="tiny", limits=limits, key=key, loopback=loopback
  )
  with socket.create_server(("127.0.0.1", 0)) as listener:
    thread = threading.Thread(target=made.run, args=([listener],))
    thread.start()
    try:
      address = f"http://127.0.0.1:{listener.getsockname()[1]}"
      wait_for(lambda: made.started)
      yield address
    finally:
      made.should_exit = True
      thread.join(30)
      assert not thread.is_alive()


def wait_for(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.01)

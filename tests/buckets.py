"""A bucket on this machine, for what reads and writes gs://."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse


class Bucket(http.server.BaseHTTPRequestHandler):
  """As much of Google Cloud Storage's API as reading and writing needs."""

  objects: dict[str, bytes]

  def do_GET(self):
    url = urllib.parse.urlparse(self.path)
    query = urllib.parse.parse_qs(url.query)
    _, _, name = url.path.partition("/b/bucket/o")
    name = urllib.parse.unquote(name.lstrip("/"))
    if not name:
      prefix = query.get("prefix", [""])[0]
      first = query.get("startOffset", [""])[0]
      stop = query.get("endOffset", ["\U0010ffff"])[0]
      items = [
        {"name": key, "generation": "1", "size": "1"}
        for key in sorted(self.objects)
        if key.startswith(prefix) and first <= key < stop
      ]
      return self._answer(200, json.dumps({"items": items}).encode())
    content = self.objects.get(name)
    if content is None:
      return self._answer(404, b"")
    status = 200
    if wanted := self.headers.get("Range"):
      first, last = wanted.removeprefix("bytes=").split("-")
      total = len(content)
      content = content[int(first) : int(last) + 1]
      status = 206
      return self._answer(
        status, content, ("Content-Range", f"bytes {first}-{last}/{total}")
      )
    return self._answer(status, content)

  def do_POST(self):
    url = urllib.parse.urlparse(self.path)
    (name,) = urllib.parse.parse_qs(url.query)["name"]
    length = int(self.headers["Content-Length"])
    self.objects[name] = self.rfile.read(length)
    self._answer(200, json.dumps({"name": name, "generation": "1"}).encode())

  def _answer(self, status, content, *headers):
    self.send_response(status)
    self.send_header("x-goog-generation", "1")
    self.send_header("Content-Length", str(len(content)))
    for header in headers:
      self.send_header(*header)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    pass


def objects_in(folder: pathlib.Path) -> dict[str, bytes]:
  """Name -> content of all files of a folder."""
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in folder.rglob("*")
    if file.is_file()
  }


def run_beside(objects: dict[str, bytes], program: str, *arguments):
  """Runs a Python program for which gs://bucket holds these objects.

  In a process of its own: tensorstore takes the server from the shell.

  Args:
    objects: name -> content; what the program writes is added.
    program: its source.
    *arguments: in its sys.argv from 1 on.

  Returns:
    The subprocess.CompletedProcess, with text.
  """
  handler = type("Handler", (Bucket,), {"objects": objects})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    return subprocess.run(
      [sys.executable, "-c", program, *map(str, arguments)],
      env=os.environ
      | {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      },
      cwd=pathlib.Path(__file__).parents[1],
      capture_output=True,
      text=True,
      check=False,
    )
  finally:
    server.shutdown()
    server.server_close()

"""Models of the Hugging Face Hub, by name: `org/name`, or `org/name@revision`.

They are read from the Hub's own cache (HF_HOME, HF_HUB_CACHE), into which what
is missing is downloaded, unless HF_HUB_OFFLINE is set.
"""

import os
import re

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Weights of other formats than safetensors only where there are no others.
_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
_TORCH = "pytorch_model*.bin"


def is_name(text: str) -> bool:
  """Whether a text is of that form, and no folder here."""
  return _NAME.fullmatch(text) is not None and not os.path.exists(text)


def split(text: str) -> tuple[str, str | None]:
  """A name without its revision, and that; a folder as it is, and None."""
  if not is_name(text):
    return text, None
  repo, _, revision = text.partition("@")
  return repo, revision or None


def cached(text: str) -> str | None:
  """The folder of a model in the cache, with nothing downloaded; None of what
  is no name or not there."""
  if not is_name(text):
    return None
  import huggingface_hub

  repo, revision = split(text)
  try:
    file = huggingface_hub.try_to_load_from_cache(
      repo, "config.json", revision=revision
    )
  except ValueError:  # no name that the Hub allows
    return None
  return os.path.dirname(file) if isinstance(file, str) else None


def folder(name: str) -> str:
  """The folder of a model in the cache.

  Raises:
    ValueError: when it is neither there nor to be had.
  """
  # It takes most of a second to import, and few runs start from a name.
  import huggingface_hub
  from huggingface_hub import errors

  repo, revision = split(name)

  def snapshot(patterns: list[str]) -> str:
    return huggingface_hub.snapshot_download(
      repo, revision=revision, allow_patterns=patterns
    )

  try:
    path = snapshot(_FILES)
    if not any(file.endswith(".safetensors") for file in os.listdir(path)):
      path = snapshot([*_FILES, _TORCH])
  except (OSError, ValueError, errors.HfHubHTTPError) as error:
    text = " ".join(str(error).split())[:200]
    option = f" --revision {revision}" if revision else ""
    raise ValueError(
      f"{name} is no folder here, and the Hugging Face Hub does not give it: "
      "correct the name, or download it where there is a network (hf download "
      f"{repo}{option}) and copy the cache. The Hub's library says: {text}"
    ) from error
  return path

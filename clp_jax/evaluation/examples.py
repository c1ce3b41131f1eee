"""Which documents show what a steerable policy does.

Of most documents a good policy writes one summary, whatever the weighting: the
reference says no more than the document. Who looks at a run for the first time
should see one on which the weighting matters, and be told that it was chosen.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

CHOSEN = (
  "chosen for it, of {documents} held-out documents those whose summaries "
  "differ most along the front."
)

Row = Mapping[str, Any]


def load(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """The rows of samples.jsonl of an evaluated run."""
  file = epath.Path(workdir) / "evaluation" / "samples.jsonl"
  return [json.loads(line) for line in file.read_text().splitlines()]


def telling(rows: Sequence[Row], count: int) -> list[str]:
  """The documents whose summaries differ most along a front.

  Those on which every reward is higher at its largest weight than at its
  smallest come first, then those with more different summaries; documents that
  are alike in both stay in their order.

  Args:
    rows: of samples.jsonl, one policy's: "document", "weights", "alpha",
      "summary" and "rewards", each of a document and a weighting.
    count: of documents, at most.

  Returns:
    The documents, the most telling first.
  """
  by_document: dict[str, list[Row]] = {}
  for row in rows:
    by_document.setdefault(row["document"], []).append(row)

  def order(document: str) -> tuple[bool, int]:
    own = by_document[document]
    return not _follows(own), -len({row["summary"] for row in own})

  return sorted(by_document, key=order)[:count]


def _follows(rows: Sequence[Row]) -> bool:
  """Whether every reward rises from its least weighting to its greatest."""
  for name in rows[0]["weights"].keys() & rows[0].get("rewards", {}).keys():
    # With one reward it is the KL term that takes weight from it.
    def asked(row: Row, name: str = name) -> float:
      return row["weights"][name] * (1 - (row.get("alpha") or 0.0))

    low, high = min(rows, key=asked), max(rows, key=asked)
    if not high["rewards"][name] > low["rewards"][name]:
      return False
  return True

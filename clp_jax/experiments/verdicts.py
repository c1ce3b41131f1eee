"""What the figures say about each claim of the paper, and by which rule."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]


class Verdict(NamedTuple):
  """On one claim of the paper."""

  claim: str
  verdict: str  # holds here, holds in part, does not hold, not tested
  figures: str


def verdicts(
  found: Mapping[str, Json], cost: Mapping[str, Any] | None
) -> list[Verdict]:
  """Every claim of the paper that is known here, judged by the figures.

  Args:
    found: experiment -> content of its comparison.json.
    cost: content of costs.json, or None.
  """
  rows = []
  for experiment in ("two-reward", "three-reward"):
    rows.append(_dominates(found.get(experiment), experiment))
  rows.append(_spread(found.get("two-reward")))
  rows.append(_attention(found.get("two-reward"), cost))
  rows.append(_half_of_dera(cost))
  rows.append(_kl(found.get("single-reward-multi-kl")))
  rows.append(_ppo(found.get("two-reward")))
  for claim in (
    "Theory: logit mixing is exact for the KL trade-off",
    "Theory: zero-shot averaging can be near-optimal where the optima align, "
    "and fails otherwise; training over weightings closes the gap",
  ):
    rows.append(
      Verdict(
        claim,
        "holds here",
        "on finite response sets with closed-form optima, which the tests "
        "check: [theory.md](theory.md) has the figures; not a statement about "
        "trained networks",
      )
    )
  rows.append(
    Verdict(
      "A language model as a judge prefers CLP's generations",
      "not tested",
      "no judge was at hand; evaluation/judge.py is what would ask one",
    )
  )
  return rows


def _methods(found: Json | None) -> dict[str, Json]:
  return {} if found is None else found["methods"]


def _interval(value: Json | None, digits: int = 4) -> str:
  if value is None or value["mean"] is None:
    return "-"
  text = f"{value['mean']:+.{digits}f}"
  if value["low"] is not None:
    text += f" [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"
  return text


def _dominates(found: Json | None, experiment: str) -> Verdict:
  claim = f"CLP Pareto-dominates Rewarded Soups ({experiment})"
  methods = _methods(found)
  soups = [n for n in methods if n.startswith("Rewarded Soups")]
  if "full-CLP" not in methods or not soups:
    return Verdict(claim, "not tested", "no runs yet")
  figures, strict, larger = [], True, True
  for name in soups:
    difference = methods[name]["difference"]["hypervolume"]
    share = methods["full-CLP"]["dominates"][name]
    back = methods[name]["dominates"]["full-CLP"]
    strict &= share == 1
    larger &= difference["high"] is not None and difference["high"] < 0
    figures.append(
      f"{name}: hypervolume {_interval(difference)} against full-CLP, "
      f"{share:.0%} of its points dominated, {back:.0%} of full-CLP's"
    )
  verdict = "does not hold"
  if strict:
    verdict = "holds here"
  elif larger:
    verdict = "holds in part: larger hypervolume, not point by point"
  return Verdict(claim, verdict, "; ".join(figures))


def _spread(found: Json | None) -> Verdict:
  claim = (
    "full- and attn-CLP keep a more spread-out, steerable front than logit-CLP "
    "and prompting"
  )
  methods = _methods(found)
  narrow = [n for n in ("logit-CLP", "prompting") if n in methods]
  wide = [n for n in ("full-CLP", "attn-CLP") if n in methods]
  if not narrow or not wide:
    return Verdict(claim, "not tested", "no runs yet")

  def spread(name: str) -> float:
    return methods[name]["metrics"]["spread"]["mean"]

  figures = ", ".join(
    f"{n} {_interval(methods[n]['metrics']['spread'], 3)}"
    for n in (*wide, *narrow)
  )
  holds = min(map(spread, wide)) > max(map(spread, narrow))
  untested = "" if "prompting" in methods else "; prompting not run yet"
  verdict = "holds here" if holds else "does not hold"
  return Verdict(claim, verdict, f"spread: {figures}{untested}")


def _attention(found: Json | None, cost: Mapping[str, Any] | None) -> Verdict:
  claim = (
    "attn-CLP is a good balance of front, steerability and number of parameters"
  )
  methods = _methods(found)
  if not {"full-CLP", "attn-CLP"} <= set(methods):
    return Verdict(claim, "not tested", "no runs yet")
  difference = methods["attn-CLP"]["difference"]
  figures = (
    f"hypervolume {_interval(difference['hypervolume'])}, spread "
    f"{_interval(difference['spread'], 3)} against full-CLP"
  )
  if cost is not None:
    shares = [f"{s}: {x:.0%}" for s, x in cost["attention_share"].items()]
    figures += f"; of the extra parameters {', '.join(shares)}"
  high = difference["hypervolume"]["high"]
  holds = high is not None and high >= 0
  verdict = "holds here" if holds else "holds in part: smaller hypervolume"
  return Verdict(claim, verdict, figures)


def _half_of_dera(cost: Mapping[str, Any] | None) -> Verdict:
  claim = "CLP costs half of DeRa at inference"
  if cost is None:
    return Verdict(claim, "not tested", "not measured yet")
  over = {t["method"]: t["over_first"] for t in cost["times"]}
  ratio = 1 / over["DeRa"]
  verdict = "holds here" if ratio < 0.6 else "holds in part"
  return Verdict(claim, verdict, f"{ratio:.2f} of DeRa's time a token")


def _kl(found: Json | None) -> Verdict:
  claim = "With one reward and many KL weights CLP is better than RS and DeRa"
  methods = _methods(found)
  others = [n for n in methods if n.startswith(("Rewarded Soups", "DeRa"))]
  if "full-CLP" not in methods or not others:
    return Verdict(claim, "not tested", "no runs yet")
  figures, holds, fails = [], True, False
  for name in others:
    difference = methods[name]["difference"]["hypervolume"]
    known = difference["low"] is not None
    holds &= known and difference["high"] < 0
    fails |= known and difference["low"] > 0
    figures.append(f"{name} {_interval(difference)}")
  verdict = "holds here" if holds else "not clear"
  if fails:
    verdict = "does not hold"
  return Verdict(
    claim,
    verdict,
    f"hypervolume in reward and KL against full-CLP: {', '.join(figures)}",
  )


def _ppo(found: Json | None) -> Verdict:
  claim = (
    "PPO reaches REINFORCE's hypervolume at equal samples (not the paper's)"
  )
  methods = _methods(found)
  name = next((n for n in methods if "PPO" in n), None)
  if name is None or "full-CLP" not in methods:
    return Verdict(claim, "not tested", "no runs yet")
  difference = methods[name]["difference"]["hypervolume"]
  mean = difference["mean"]
  verdict = "holds here" if mean >= 0 else "does not hold"
  if (
    difference["low"] is not None and difference["low"] < 0 < difference["high"]
  ):
    verdict += ", within the interval"
  return Verdict(
    claim,
    verdict,
    f"hypervolume {_interval(difference)}; what was tried is in "
    "[BUILD_NOTES.md](../BUILD_NOTES.md)",
  )

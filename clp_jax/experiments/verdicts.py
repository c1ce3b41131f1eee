"""What the figures say about each claim of the paper, and by which rule.

A claim is tests of some methods against others, in every experiment that bears
on it. A test looks at the 95% interval of an advantage, A's metric less B's
(paired where A or B is what the experiment compares with), and at a margin, a
share of B's value:

  better     holds where the interval is above 0, fails where it is below the
             margin: there is no advantage as large as that
  not worse  holds where the interval is above minus the margin, fails where it
             is below that
  dominates  holds where A dominates all of B's points but the margin and B no
             more of A's than that, fails where B dominates more of A's than A
             of B's; shares have no interval

and is not clear otherwise. A claim holds where all tests do, in part where some
do, and does not where none does and some fail.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]

HOLDS, PART, FAILS, UNCLEAR, UNTESTED = (
  "holds here",
  "holds in part",
  "does not hold",
  "not clear",
  "not tested",
)


class Test(NamedTuple):
  """Of one method against another."""

  kind: str  # better, not worse, dominates
  margin: float  # a share of the other's value; of dominates, of the points
  metric: str = ""

  def __str__(self) -> str:
    if self.kind == "dominates":
      return f"at least {1 - self.margin:.0%} of its points dominated"
    if self.kind == "better":
      return f"{self.metric} better (margin {self.margin:.0%})"
    return f"{self.metric} not worse by {self.margin:.0%}"


class Claim(NamedTuple):
  """Methods A that should pass tests against methods B."""

  text: str
  a: tuple[str, ...]
  b: tuple[str, ...]
  tests: tuple[Test, ...]
  experiments: tuple[str, ...]


class Verdict(NamedTuple):
  """On one claim."""

  claim: str
  rule: str
  verdict: str
  figures: str


_SOUPS = ("Rewarded Soups", "Rewarded Soups, m x")
_REWARDS = ("two-reward", "three-reward")
_KL = ("single-reward-multi-kl",)
_VOLUMES = ("hypervolume", "near hypervolume")

CLAIMS = (
  Claim(
    "CLP Pareto-dominates Rewarded Soups",
    ("full-CLP",),
    _SOUPS,
    (Test("better", 0.01, "hypervolume"), Test("dominates", 0.1)),
    (*_REWARDS, *_KL),
  ),
  Claim(
    "full- and attn-CLP keep a more spread-out, steerable front than logit-CLP "
    "and prompting",
    ("full-CLP", "attn-CLP"),
    ("logit-CLP", "prompting"),
    (Test("better", 0.05, "spread"),),
    (*_REWARDS, *_KL),
  ),
  Claim(
    "attn-CLP is a good balance of front, steerability and number of "
    "parameters: with fewer of them it is not worse than full-CLP",
    ("attn-CLP",),
    ("full-CLP",),
    (
      Test("not worse", 0.01, "hypervolume"),
      Test("not worse", 0.05, "near hypervolume"),
      Test("not worse", 0.05, "spread"),
    ),
    (*_REWARDS, *_KL),
  ),
  Claim(
    "With one reward and many KL weights CLP is better than Rewarded Soups and "
    "DeRa",
    ("full-CLP",),
    (*_SOUPS, "DeRa"),
    tuple(Test("better", 0.01, metric) for metric in _VOLUMES),
    _KL,
  ),
  Claim(
    "PPO reaches REINFORCE's front at equal samples (not the paper's)",
    ("full-CLP, PPO",),
    ("full-CLP",),
    (
      Test("not worse", 0.01, "hypervolume"),
      Test("not worse", 0.05, "near hypervolume"),
    ),
    _REWARDS,
  ),
)
# Of DeRa's time a token, what CLP may take to cost half of it.
HALF, HALF_MARGIN = 0.5, 0.1


def verdicts(
  found: Mapping[str, Json], cost: Mapping[str, Any] | None
) -> list[Verdict]:
  """Every claim of the paper that is known here, judged by the figures.

  Args:
    found: experiment -> content of its comparison.json.
    cost: content of costs.json, or None.
  """
  rows = [judge(claim, found) for claim in CLAIMS]
  rows.append(_half_of_dera(cost))
  for claim in (
    "Theory: logit mixing is exact for the KL trade-off",
    "Theory: zero-shot averaging can be near-optimal where the optima align, "
    "and fails otherwise; training over weightings closes the gap",
  ):
    rows.append(
      Verdict(
        claim,
        "tests of closed forms pass",
        HOLDS,
        "on finite response sets with closed-form optima: "
        "[theory.md](theory.md) has the figures; not a statement about trained "
        "networks",
      )
    )
  rows.append(
    Verdict(
      "A language model as a judge prefers CLP's generations",
      "a judge's win rate above half",
      UNTESTED,
      "no judge was at hand; evaluation/judge.py is what would ask one",
    )
  )
  return rows


def judge(claim: Claim, found: Mapping[str, Json]) -> Verdict:
  """The verdict on a claim, by experiment -> content of its comparison.json."""
  rule = "; ".join(map(str, claim.tests))
  outcomes, figures, missing = [], [], []
  for experiment in claim.experiments:
    methods = found.get(experiment, {}).get("methods", {})
    pairs = [
      (a, b) for a in claim.a for b in claim.b if {a, b} <= methods.keys()
    ]
    if not pairs:
      missing.append(experiment)
    for a, b in pairs:
      for test in claim.tests:
        outcome, figure = apply(test, methods, a, b)
        if outcome != UNTESTED:
          outcomes.append(outcome)
          mark = "" if outcome == HOLDS else f" ({outcome})"
          figures.append(f"{experiment}, {a} over {b}: {figure}{mark}")
  if missing:
    figures.append(f"not run: {', '.join(missing)}")
  verdict = UNTESTED
  if outcomes:
    verdict = UNCLEAR
    if FAILS in outcomes:
      verdict = FAILS
    if HOLDS in outcomes:
      verdict = HOLDS if set(outcomes) == {HOLDS} else PART
  return Verdict(claim.text, rule, verdict, "; ".join(figures))


def apply(
  test: Test, methods: Mapping[str, Json], a: str, b: str
) -> tuple[str, str]:
  """(outcome, figures) of a test; not tested where a metric is not defined.

  Args:
    test: see the module.
    methods: name -> its part of comparison.json.
    a: a method.
    b: another, that a should do better than.
  """
  if test.kind == "dominates":
    share, back = methods[a]["dominates"][b], methods[b]["dominates"][a]
    outcome = UNCLEAR
    if share >= 1 - test.margin and back <= test.margin:
      outcome = HOLDS
    elif back > share:
      outcome = FAILS
    return outcome, f"dominates {share:.0%} of its points, it {back:.0%}"
  found = _advantage(methods, a, b, test.metric)
  if found is None:
    return UNTESTED, ""
  mean, low, high = found
  margin = test.margin * abs(methods[b]["metrics"][test.metric]["mean"])
  outcome = UNCLEAR
  if test.kind == "better":
    outcome = HOLDS if low > 0 else FAILS if high < margin else UNCLEAR
  elif low > -margin:
    outcome = HOLDS
  elif high < -margin:
    outcome = FAILS
  return outcome, (
    f"{test.metric} {mean:+.4f} [{low:+.4f}, {high:+.4f}], margin {margin:.4f}"
  )


def _advantage(
  methods: Mapping[str, Json], a: str, b: str, metric: str
) -> tuple[float, float, float] | None:
  """(mean, low, high) of a's metric less b's, or None."""
  values = [methods[name]["metrics"].get(metric) for name in (a, b)]
  if any(value is None or value["mean"] is None for value in values):
    return None
  for name, other, sign in ((a, b, 1), (b, a, -1)):
    # The first method has no difference, the others' are from it.
    if methods[other]["difference"] is None:
      found = methods[name]["difference"][metric]
      low, high = sorted((sign * found["low"], sign * found["high"]))
      return sign * found["mean"], low, high
  x, y = values
  return x["mean"] - y["mean"], x["low"] - y["high"], x["high"] - y["low"]


def _half_of_dera(cost: Mapping[str, Any] | None) -> Verdict:
  claim = "CLP costs half of DeRa at inference"
  rule = f"{HALF} of its time a token (margin {HALF_MARGIN})"
  if cost is None:
    return Verdict(claim, rule, UNTESTED, "not measured yet")
  over = {t["method"]: t["over_first"] for t in cost["times"]}
  ratio = 1 / over["DeRa"]
  verdict = HOLDS if ratio < HALF + HALF_MARGIN else FAILS
  return Verdict(claim, rule, verdict, f"{ratio:.2f} of DeRa's time a token")

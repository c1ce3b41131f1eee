"""Verdicts on claims, from made-up comparisons."""

import pytest

from clp_jax.experiments import methods, verdicts
from clp_jax.experiments.verdicts import FAILS, HOLDS, PART, UNCLEAR, UNTESTED

SPREADS = {"full-CLP": 0.37, "attn-CLP": 0.36, "logit-CLP": 0.2}


def value(mean, low=None, high=None):
  low, high = (mean if x is None else x for x in (low, high))
  return {"mean": mean, "stderr": None, "low": low, "high": high}


def comparison(shares=(0.5, 0.1), **differences):
  """Of full-CLP, hypervolume 0.8, with others; {name: (mean, low, high)}."""
  content = {}
  for name in ("full-CLP", *differences):
    content[name] = {
      "metrics": {
        "hypervolume": value(0.8 + differences.get(name, (0.0,))[0]),
        "spread": value(SPREADS.get(name, 0.3)),
      },
      "difference": None,
      "dominates": {"full-CLP": shares[1]},
    }
    if name in differences:
      content[name]["difference"] = {
        "hypervolume": value(*differences[name]),
        "spread": value(SPREADS.get(name, 0.3) - SPREADS["full-CLP"]),
      }
      content["full-CLP"]["dominates"][name] = shares[0]
  return {"methods": content}


def outcome(test, a, b, content):
  return verdicts.apply(test, content["methods"], a, b)[0]


@pytest.mark.parametrize(
  ("interval", "better", "not_worse"),
  [
    # Of the advantage over a hypervolume of 0.8; the margin is 0.008.
    ((0.02, 0.01, 0.03), HOLDS, HOLDS),
    ((0.004, 0.002, 0.006), HOLDS, HOLDS),
    ((0.01, -0.002, 0.02), UNCLEAR, HOLDS),
    ((0.0, -0.007, 0.007), FAILS, HOLDS),
    ((0.0, -0.02, 0.02), UNCLEAR, UNCLEAR),
    ((-0.02, -0.03, -0.009), FAILS, FAILS),
    ((-0.02, -0.03, -0.004), FAILS, UNCLEAR),
  ],
)
def test_a_margin_decides(interval, better, not_worse):
  content = comparison(**{"attn-CLP": interval})
  for kind, expected in (("better", better), ("not worse", not_worse)):
    test = verdicts.Test(kind, 0.01, "hypervolume")
    assert outcome(test, "attn-CLP", "full-CLP", content) == expected
  # The same difference, read from the other side.
  mean, low, high = interval
  content = comparison(**{"attn-CLP": (-mean, -high, -low)})
  content["methods"]["attn-CLP"]["metrics"]["hypervolume"] = value(0.8)
  assert (
    outcome(
      verdicts.Test("better", 0.01, "hypervolume"),
      *("full-CLP", "attn-CLP"),
      content,
    )
    == better
  )


def test_methods_that_are_not_the_first_are_compared_by_their_intervals():
  content = comparison(**{"attn-CLP": (0.0,), "logit-CLP": (0.0,)})
  test = verdicts.Test("better", 0.05, "spread")
  assert outcome(test, "attn-CLP", "logit-CLP", content) == HOLDS
  metrics = content["methods"]["logit-CLP"]["metrics"]
  metrics["spread"] = value(0.2, 0.1, 0.4)
  assert outcome(test, "attn-CLP", "logit-CLP", content) == UNCLEAR
  metrics["spread"] = value(None)
  assert outcome(test, "attn-CLP", "logit-CLP", content) == UNTESTED


@pytest.mark.parametrize(
  ("shares", "expected"),
  [
    ((0.95, 0.05), HOLDS),
    ((0.95, 0.2), UNCLEAR),
    ((0.8, 0.0), UNCLEAR),
    ((0.1, 0.4), FAILS),
  ],
)
def test_dominance_is_of_all_points_but_the_margin(shares, expected):
  content = comparison(shares, **{"MOD": (0.0,)})
  test = verdicts.Test("dominates", 0.1)
  assert outcome(test, "full-CLP", "MOD", content) == expected


def soups(found):
  (row,) = [r for r in verdicts.verdicts(found, None) if "Pareto" in r.claim]
  return row


def test_a_claim_takes_every_experiment_and_method_that_bears_on_it():
  worse = {"Rewarded Soups": (-0.1, -0.2, -0.05)}
  assert soups({}).verdict == UNTESTED
  row = soups({"two-reward": comparison((0.95, 0.0), **worse)})
  assert row.verdict == HOLDS
  assert "hypervolume better (margin 1%); at least 90% of its" in row.rule
  assert "two-reward, full-CLP over Rewarded Soups: hypervolume" in row.figures
  assert "+0.1000 [+0.0500, +0.2000], margin 0.0070" in row.figures
  assert "not run: three-reward, single-reward-multi-kl" in row.figures
  # Larger, but not point by point; and then not in the other experiment.
  part = {"two-reward": comparison((0.6, 0.0), **worse)}
  assert soups(part).verdict == PART
  better = {"Rewarded Soups, m x": (0.1, 0.05, 0.2)}
  row = soups(part | {"three-reward": comparison((0.0, 0.6), **better)})
  assert row.verdict == PART and "(does not hold)" in row.figures
  alone = {"three-reward": comparison((0.0, 0.6), **better)}
  assert soups(alone).verdict == FAILS


def test_attn_clp_is_held_to_a_margin_and_not_to_significance():
  """An interval that reaches below 0 is not by that as good."""

  def verdict(**difference):
    found = {"two-reward": comparison(**difference)}
    rows = verdicts.verdicts(found, None)
    (row,) = [r for r in rows if r.claim.startswith("attn-CLP")]
    return row.verdict

  # Its spread is 0.01 less than 0.37, within 5%.
  assert verdict(**{"attn-CLP": (0.0, -0.004, 0.004)}) == HOLDS
  assert verdict(**{"attn-CLP": (-0.1, -0.3, 0.1)}) == PART
  assert verdict(**{"attn-CLP": (-0.1, -0.11, -0.09)}) == PART


def test_half_the_cost_is_a_margin_too():
  def verdict(dera):
    times = [
      {"method": "full-CLP", "over_first": 1.0},
      {"method": "DeRa", "over_first": dera},
    ]
    rows = verdicts.verdicts({}, {"times": times})
    (row,) = [r for r in rows if "half of DeRa" in r.claim]
    return row

  assert verdict(1.9).verdict == HOLDS and verdict(1.5).verdict == FAILS
  assert verdict(1.9).rule == "0.5 of its time a token (margin 0.1)"


def test_every_claim_names_methods_that_there_are():
  labels = {method.label for method in methods.METHODS.values()}
  for claim in verdicts.CLAIMS:
    assert {*claim.a, *claim.b} <= labels, claim.text

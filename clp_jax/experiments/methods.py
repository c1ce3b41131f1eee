"""Every method of an experiment: overrides of the base config, or a recipe.

A trained method is a set of overrides. The others are made of single-objective
runs (`kind`), each of which is trained with the base config's settings:

  soup      their parameters, averaged (baselines/soups.py)
  mixture   their logits, mixed at every token (baselines/dera.py)
  oracle    nothing: one run for each of a few weightings, trained for it alone

`share` is the part of the base config's steps that each of those runs takes:
"equal", the m runs together sample what one CLP run does; "full", each samples
as much, m times as many in all (towards the reference: M = 2 sets, the
reference's costs nothing, so equal is one run of full length and "full" one of
twice that).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from clp_jax.errors import ConfigError


class Method(NamedTuple):
  """One method; exactly one of the two ways to make it."""

  label: str  # in tables
  overrides: Mapping[str, Any] | None = None  # of the config, by path
  kind: str | None = None
  share: str | None = None
  # Whether it can trade off rewards, and a reward against KL.
  rewards: bool = True
  kl: bool = True
  rate: float = 1.0  # factor of the base config's learning rate


# Their supervised checkpoint is one of its own, which has seen the tokens.
_PROMPTED = {"prompting.style": "control_tokens", "prompting.sft_share": 0.5}

_REALIGNED = {"weightings.kl_coefficient": "realigned"}

METHODS: dict[str, Method] = {
  "clp-full": Method("full-CLP", {"steering": "full"}),
  "clp-attention": Method("attn-CLP", {"steering": "attention"}),
  "clp-logits": Method("logit-CLP", {"steering": "logits"}),
  "clp-full-frozen": Method(
    "full-CLP, KL set frozen",
    {"steering": "full", "conditioning.kl_set": "frozen"},
    rewards=False,
  ),
  # Combined with the coefficients that soups and DeRa have.
  "clp-full-realigned": Method(
    "full-CLP, realigned", {"steering": "full"} | _REALIGNED, rewards=False
  ),
  "clp-attention-realigned": Method(
    "attn-CLP, realigned", {"steering": "attention"} | _REALIGNED, rewards=False
  ),
  "clp-full-frozen-realigned": Method(
    "full-CLP, KL set frozen, realigned",
    {"steering": "full", "conditioning.kl_set": "frozen"} | _REALIGNED,
    rewards=False,
  ),
  "ppo": Method(
    "full-CLP, PPO",
    {"steering": "full", "algorithm": "ppo"},
    rate=0.5,  # it takes four updates a step
  ),
  "clp-full-learned": Method(
    "full-CLP, learned baseline",
    {"steering": "full", "reinforce.baseline": "learned"},
  ),
  "clp-full-adapted": Method(
    "full-CLP, Q adapted",
    {"steering": "full", "weightings.adapt": True},
    kl=False,
  ),
  "lora": Method("LoRA", {"steering": "lora"}),
  "svd-lora": Method("SVD-LoRA", {"steering": "svd_lora"}),
  "soft-tokens": Method(
    "soft tokens", {"steering": "none", "soft_tokens.length": 4}
  ),
  "prompting": Method("prompting", {"steering": "none"} | _PROMPTED),
  "clp-full-prompting": Method(
    "full-CLP + prompting", {"steering": "full"} | _PROMPTED
  ),
  "rewarded-soups": Method("Rewarded Soups", kind="soup", share="equal"),
  "rewarded-soups-mx": Method("Rewarded Soups, m x", kind="soup", share="full"),
  "mod": Method("MOD", kind="mixture", share="equal", kl=False),
  "mod-mx": Method("MOD, m x", kind="mixture", share="full", kl=False),
  "dera": Method("DeRa", kind="mixture", share="equal", rewards=False),
  "oracle": Method("one run a weighting", kind="oracle"),
}


def chosen(names: tuple[str, ...], experiment: str, kl: bool) -> list[str]:
  """The names, checked.

  Args:
    names: of METHODS.
    experiment: its name, for messages.
    kl: whether it trades a reward off against KL, and not rewards.

  Raises:
    ConfigError: for an unknown method, or one that does not fit.
  """
  unknown = [name for name in names if name not in METHODS]
  if unknown:
    raise ConfigError(
      f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}."
    )
  fitting = [n for n, m in METHODS.items() if (m.kl if kl else m.rewards)]
  for name in names:
    if name not in fitting:
      what = "a reward against KL" if kl else "several rewards"
      raise ConfigError(
        f"method {name} does not fit {experiment}, which trades off {what}; "
        f"these do: {', '.join(fitting)}."
      )
  return list(dict.fromkeys(names))

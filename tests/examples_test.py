"""Which documents are shown first."""

from clp_jax.evaluation import examples


def rows(document, summaries, rewards, alpha=0.01):
  """A document's rows along the front of a and b, from b's end to a's."""
  last = len(summaries) - 1
  return [
    {
      "document": document,
      "weights": {"a": i / last, "b": 1 - i / last},
      "alpha": alpha,
      "summary": summary,
      "rewards": dict(zip("ab", pair, strict=True)),
    }
    for i, (summary, pair) in enumerate(zip(summaries, rewards, strict=True))
  ]


RISING = [(0.1, 0.9), (0.4, 0.6), (0.8, 0.2)]


def test_documents_whose_summaries_differ_and_follow_the_weights_come_first():
  found = examples.telling(
    [
      *rows("same", ["x", "x", "x"], [(0.5, 0.5)] * 3),
      *rows("two", ["x", "x", "y"], RISING),
      *rows("against", ["x", "y", "z"], RISING[::-1]),
      *rows("three", ["x", "y", "z"], RISING),
      *rows("three too", ["x", "y", "z"], RISING),
    ],
    4,
  )
  assert found == ["three", "three too", "two", "against"]


def test_one_reward_is_judged_by_its_weight_against_kl():
  def over_alphas(document, rewards):
    return [
      {
        "document": document,
        "weights": {"a": 1.0},
        "alpha": alpha,
        "summary": str(i),
        "rewards": {"a": reward},
      }
      for i, (alpha, reward) in enumerate(
        zip((0.01, 0.03, 0.1), rewards, strict=True)
      )
    ]

  found = examples.telling(
    [
      *over_alphas("against", (0.2, 0.4, 0.6)),
      *over_alphas("with", (0.6, 0.4, 0.2)),
    ],
    1,
  )
  assert found == ["with"]


def test_rows_without_rewards_are_ordered_by_their_summaries():
  bare = [
    {k: v for k, v in row.items() if k != "rewards"}
    for row in (
      *rows("same", ["x", "x", "x"], RISING),
      *rows("three", ["x", "y", "z"], RISING),
    )
  ]
  assert examples.telling(bare, 5) == ["three", "same"]

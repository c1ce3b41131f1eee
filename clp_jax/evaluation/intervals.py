"""Estimates and 95% intervals of what is computed from noisy points.

Every point of a front is a mean over prompts, and its noise biases what is
computed from several points: maxima (a hypervolume, a spread) come out too
large, the most where points are closer to each other than the noise, and rank
correlations too small. How much depends on the true points, and a bootstrap
around the measured ones, which noise has already torn apart, finds less than
half of it.

So errors, measured minus true, are drawn with the noise of resampled prompts
around several points that could be the true ones:

  unbiased   the measured ones; of the errors only what is odd in the noise
  seen       the measured ones
  expected   each axis moved towards its mean until its sum of squares is less
             by that of the noise; the bias here is taken off the estimate
  most       the same, less by the 99% quantile of the noise's: as close as the
             points may be, with the most bias

An interval reaches from the least lower to the largest upper bound of these
views, so that it also holds where a front steers about as much as the noise.
The metrics that need more than this say so (`metrics.Measure.sample`).

How R runs differ, less what the noise of their responses explains, is added to
the errors as draws of a t distribution of R - 1 degrees of freedom. One run has
no such part: its interval is over prompts alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MOST = 0.99  # quantile of the noise that measured points may be
SEED_DRAWS = 8  # for each of the noise: the tails of t are long


class Sample(NamedTuple):
  """k statistics of R runs with their errors; of one method, or paired."""

  values: Array  # [R, k] as measured
  bias: Array  # [R, k] as expected
  errors: Array  # [views, R, draws, k], measured minus true; first unbiased

  def of(self, runs: list[int]) -> "Sample":
    """That of some of the runs."""
    return Sample(self.values[runs], self.bias[runs], self.errors[:, runs])


class Value(NamedTuple):
  """One statistic, low <= mean <= high; NaN where it is not defined."""

  mean: float  # over runs, of which the expected bias is taken off
  stderr: float | None  # over runs; None: one run, or of all runs together
  low: float  # 95% interval over prompts, and over seeds where there are some
  high: float


def noise(per_prompt: Array, counts: Array) -> Array:
  """[draws, P, a]: errors of means over prompts.

  Args:
    per_prompt: [P, prompts, a] float64.
    counts: [draws, prompts], how often each prompt was drawn.
  """
  prompts = counts.shape[1]
  shares = (counts - 1) / prompts * math.sqrt(prompts / max(prompts - 1, 1))
  return np.einsum("bn,pna->bpa", shares, per_prompt, optimize=True)


def sample(
  measure: Callable[[Sequence[Array]], Array],
  points: Sequence[Array],
  drawn: Sequence[Array],
) -> Sample:
  """Statistics of runs, with their errors in the views that the module names.

  Args:
    measure: of every run [draws, P, a] -> [runs, draws, k].
    points: of every run [P, a], as measured.
    drawn: of every run [draws, P, a], noise.
  """

  def errors(centres: Sequence[Array]) -> Array:
    # What is not defined for points that are all alike counts as 0.
    true = np.nan_to_num(measure([centre[None] for centre in centres]))
    return around(measure, centres, drawn) - true

  values = measure([p[None] for p in points])
  unbiased, seen = unbiased_and_seen(measure, points, drawn)
  expected = errors(closer(points, drawn, lambda noise: noise.mean(axis=0)))
  most = errors(closest(points, drawn))
  return Sample(
    values[:, 0],
    (expected - unbiased).mean(axis=1),
    np.stack([unbiased, seen, expected, most]),
  )


def unbiased_and_seen(
  measure: Callable[[Sequence[Array]], Array],
  points: Sequence[Array],
  drawn: Sequence[Array],
) -> tuple[Array, Array]:
  """The errors [runs, draws, k] of two views; args as of `sample`."""
  values = measure([p[None] for p in points])
  more = around(measure, points, drawn) - values
  less = around(measure, points, [-noise for noise in drawn]) - values
  return (more - less) / 2, more


def around(
  measure: Callable[[Sequence[Array]], Array],
  centres: Sequence[Array],
  drawn: Sequence[Array],
) -> Array:
  """[runs, draws, k] of noisy centres; args as of `sample`."""
  pairs = zip(centres, drawn, strict=True)
  return measure([centre + noise for centre, noise in pairs])


def closest(points: Sequence[Array], drawn: Sequence[Array]) -> list[Array]:
  """Points as close to their mean as the noise allows; args as of `sample`."""
  return closer(points, drawn, lambda x: np.quantile(x, MOST, axis=0))


def closer(
  points: Sequence[Array],
  drawn: Sequence[Array],
  size: Callable[[Array], Array],
) -> list[Array]:
  """Points without what may be noise, each axis by itself.

  Args:
    points: of every run [P, a], as measured.
    drawn: of every run [draws, P, a], noise.
    size: [draws, a] squares of noise -> [a] of them that are taken off.
  """
  made = []
  for seen, noise in zip(points, drawn, strict=True):
    away = seen - seen.mean(axis=0)
    squares = (away**2).sum(axis=0)
    of_noise = ((noise - noise.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    kept = 1 - size(of_noise) / np.where(squares > 0, squares, 1)
    made.append(seen.mean(axis=0) + np.maximum(kept, 0) * away)
  return made


def luck(num_runs: int, num: int, rng: np.random.Generator) -> list[Array]:
  """Of every run [draws]: what its deviation from the mean of R runs counts.

  The sum over runs, of these times the deviations, is distributed as the error
  of the mean is: t of R - 1 degrees of freedom, in every direction.
  """
  if num_runs == 1:
    return [np.zeros(num)]
  chi2 = rng.chisquare(num_runs - 1, num)
  return list(rng.standard_normal([num_runs, num]) / np.sqrt(num_runs * chi2))


def paired(a: Sample, b: Sample) -> Sample:
  """b - a, run by run; every view of one with every one of the other."""
  draws = a.errors.shape[1:]
  return Sample(
    b.values - a.values,
    b.bias - a.bias,
    (b.errors[:, None] - a.errors[None]).reshape(-1, *draws),
  )


def estimates(
  terms: Sequence[tuple[int, Sample]],
  lowest: Array,
  highest: Array,
  rng: np.random.Generator,
) -> list[Value]:
  """The k statistics' means over runs; of independent samples, their sum.

  Args:
    terms: (sign, sample) each.
    lowest: [k] that each can be.
    highest: [k]
    rng: for the part of the seeds.
  """
  value = mean = seeds = variance = np.zeros(lowest.shape)
  errors = [np.zeros(lowest.shape)]
  for sign, sample in terms:
    num_runs = len(sample.values)
    value = value + sign * sample.values.mean(axis=0)
    mean = mean + sign * (sample.values - sample.bias).mean(axis=0)
    seeds = seeds + _seed_errors(sample, rng)
    own = sign * sample.errors.mean(axis=1)
    errors = [e + more for e in errors for more in own]
    if num_runs > 1:
      variance = variance + sample.values.var(axis=0, ddof=1) / num_runs
    else:
      variance = variance + math.nan
  # Both signs: whatever the draws, the middle is that of the errors alone.
  both = np.concatenate([seeds, -seeds])  # [times, draws, k]
  drawn = [(e + both).reshape(-1, len(value)) for e in errors]
  bounds = np.quantile(drawn, [0.025, 0.975], axis=1)  # [2, errors, k]
  low = np.clip(value - bounds[1].max(axis=0), lowest, highest)
  high = np.clip(value - bounds[0].min(axis=0), lowest, highest)
  mean = np.clip(mean, low, high)
  rows = zip(mean, np.sqrt(variance), low, high, strict=True)
  return [
    Value(float(m), float(e) if e > 0 else None, float(x), float(y))
    for m, e, x, y in rows
  ]


def _seed_errors(sample: Sample, rng: np.random.Generator) -> Array:
  """[times, draws, k] errors of a mean over runs, from how the runs differ.

  Runs also differ by the noise of their own responses, which the errors have
  already. The rest is drawn as for a t interval: the variance that is seen,
  times R - 1 over a chi-squared draw, less the noise's, is the seeds' variance.
  """
  unbiased = sample.errors[0]  # [R, draws, k]
  num_runs, num, k = unbiased.shape
  if num_runs == 1:
    return np.zeros([1, num, k])
  own = unbiased - unbiased.mean(axis=0)
  noise = (own**2).sum(axis=0).mean(axis=0) / (num_runs - 1)
  seen = sample.values.var(axis=0, ddof=1)
  shape = (SEED_DRAWS, num, 1)
  scale = (num_runs - 1) / rng.chisquare(num_runs - 1, shape)
  deviation = np.sqrt(np.maximum(seen * scale - noise, 0) / num_runs)
  return deviation * rng.standard_normal(shape)

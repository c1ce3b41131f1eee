"""A front as data, as files, as a picture and as a row of a table."""

import csv
import dataclasses
import io
import json
import os

import numpy as np
import pytest
from matplotlib import axes, image
from rich.console import Console

from clp_jax.errors import FrontError
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import plot, tables
from clp_jax.evaluation.front import Estimate


def _point(weights, rewards, kl=2.125, alpha=0.01):
  names = ("nli", "rouge", "tldr")[: len(weights)]
  return front_lib.Point(
    weights=dict(zip(names, weights, strict=True)),
    alpha=alpha,
    rewards={
      name: Estimate(r, 0.01 + r / 100)
      for name, r in zip(names, rewards, strict=True)
    },
    kl=Estimate(kl, 0.07),
    value=Estimate(0.99 * float(np.dot(weights, rewards)) - 0.01 * kl, 0.02),
  )


_PLANE = (
  _point((0.0, 1.0), (0.3, 0.9)),
  _point((0.25, 0.75), (0.45, 0.7)),
  _point((0.5, 0.5), (0.4, 0.6)),  # Dominated by the one before.
  _point((1.0, 0.0), (0.8, 0.4)),
)


def _front(points=_PLANE, method="full-CLP", **changes):
  objectives = ("nli", "rouge", "tldr")[: len(points[0].weights)]
  fields = {
    "method": method,
    "objectives": objectives,
    "step": 400,
    "prompts": 256,
    "decoding": {"temperature": 1.0, "samples": 2},
    "reference_point": [0.1] * len(objectives),
  }
  return front_lib.front_from_points(points, **(fields | changes))


def _rendered(fronts, width=80):
  out = io.StringIO()
  Console(file=out, width=width).print(tables.methods_table(fronts))
  return out.getvalue()


class TestStandardError:
  def test_is_taken_over_prompt_means(self):
    # Prompt means 1.5, 3.5, 7: deviation sqrt(7.75) over sqrt(3).
    mean, stderr = front_lib.standard_error([[1, 2], [3, 4], [6, 8]])
    assert mean == pytest.approx(4.0)
    assert stderr == pytest.approx(np.sqrt(7.75 / 3))

  def test_repeating_a_sample_adds_no_certainty(self):
    samples = np.array([[0.1], [0.7], [0.45]])
    assert front_lib.standard_error(np.repeat(samples, 9, axis=1)) == (
      pytest.approx(front_lib.standard_error(samples))
    )

  def test_covers_the_spread_of_repeated_measurements(self):
    rng = np.random.default_rng(0)
    prompts = rng.normal(0.5, 0.3, (400, 200, 1))  # 400 measurements
    samples = prompts + rng.normal(0, 0.2, (400, 200, 4))
    estimates = np.array([front_lib.standard_error(s) for s in samples])
    assert estimates[:, 1].mean() == (
      pytest.approx(estimates[:, 0].std(), rel=0.1)
    )

  @pytest.mark.parametrize("shape", [(1, 8), (8,), (8, 0), (2, 2, 2)])
  def test_wrong_shapes_are_named(self, shape):
    with pytest.raises(ValueError, match=str(shape)[1:-1]):
      front_lib.standard_error(np.ones(shape))

  def test_nan_is_located(self):
    with pytest.raises(ValueError, match="Sample 1 of prompt 2 is nan"):
      front_lib.standard_error([[1, 2], [3, 4], [5, np.nan]])


class TestFrontFromPoints:
  def test_computes_hypervolume_and_spread_in_the_order_of_objectives(self):
    front = _front(reference_point=[0.1, 0.2])
    # 0.2 x 0.7 + 0.15 x 0.5 + 0.35 x 0.2 from the left.
    assert front.hypervolume == pytest.approx(0.14 + 0.075 + 0.07)
    assert front.spread == pytest.approx(np.hypot(0.5, 0.5))
    assert front.monotonicity["nli"] == pytest.approx(0.8)
    assert front.monotonicity["rouge"] == pytest.approx(1.0)
    np.testing.assert_allclose(
      front.expected_utility, (0.9 + 0.6375 + 0.5 + 0.8) / 4
    )

  def test_one_reward_has_no_rank_correlation(self):
    front = _front([_point((1.0,), (r,), alpha=r) for r in (0.3, 0.8)])
    assert front.monotonicity == {"nli": None}

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      ({"objectives": ["nli", "tldr"]}, r"points\[0\].weights .*nli, rouge"),
      ({"objectives": ["nli", "nli"]}, "different names"),
      ({"objectives": []}, "different names"),
      ({"reference_point": [0.1]}, "1 values for the 2 objectives nli, rouge"),
      ({"reference_point": [0.1, np.inf]}, r"reference_point\[1\] .* inf"),
      ({"points": []}, "needs a point"),
    ],
  )
  def test_parts_that_do_not_fit_are_named(self, change, message):
    arguments = {"points": _PLANE, **change}
    with pytest.raises(FrontError, match=message):
      front_lib.front_from_points(
        arguments.pop("points"),
        **{
          "method": "x",
          "objectives": ["nli", "rouge"],
          "step": 1,
          "prompts": 2,
          "decoding": {},
          "reference_point": [0.0, 0.0],
          **arguments,
        },
      )

  def test_a_value_that_is_not_finite_is_named(self):
    bad = dataclasses.replace(_PLANE[1], kl=Estimate(1.5, float("nan")))
    with pytest.raises(FrontError, match=r"points\[1\].kl.stderr.* nan"):
      _front([_PLANE[0], bad])


class TestFiles:
  def test_a_front_comes_back_as_it_was(self, tmp_path):
    front = _front(training_samples=25600)
    front_lib.save_front(tmp_path / "evaluation", front)
    path = tmp_path / "evaluation" / "front.json"
    assert front_lib.load_front(path) == front
    assert sorted(p.name for p in path.parent.iterdir()) == [
      "front.csv",
      "front.json",
    ]

  def test_json_has_the_promised_fields(self, tmp_path):
    front_lib.save_front(tmp_path, _front())
    content = json.loads((tmp_path / "front.json").read_text())
    assert content["objectives"] == ["nli", "rouge"]
    assert content["reference_point"] == [0.1, 0.1]
    assert content["step"] == 400 and content["prompts"] == 256
    assert content["decoding"] == {"temperature": 1.0, "samples": 2}
    point = content["points"][1]
    assert set(point) == {"weights", "alpha", "rewards", "kl", "value"}
    assert point["weights"] == {"nli": 0.25, "rouge": 0.75}
    assert point["rewards"]["rouge"] == {"mean": 0.7, "stderr": 0.017}
    assert point["kl"] == {"mean": 2.125, "stderr": 0.07}

  def test_numpy_numbers_are_written(self, tmp_path):
    points = [
      front_lib.Point(
        weights={"nli": np.float32(1)},
        alpha=np.float32(0.5),
        rewards={"nli": Estimate(np.float32(0.25), np.float64(0.5))},
        kl=Estimate(np.float32(1.5), np.float32(0.25)),
        value=Estimate(np.float32(0.125), np.float32(0.25)),
      )
    ]
    front = _front(points, step=np.int64(3), prompts=np.int32(4))
    front_lib.save_front(tmp_path, front)
    assert front_lib.load_front(tmp_path / "front.json") == front

  def test_csv_has_a_row_a_point(self, tmp_path):
    front_lib.save_front(tmp_path, _front())
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [row["non_dominated"] for row in rows] == ["1", "1", "0", "1"]
    assert float(rows[1]["weight_rouge"]) == 0.75
    assert float(rows[1]["reward_rouge_mean"]) == 0.7
    assert float(rows[1]["kl_stderr"]) == 0.07

  def test_a_write_that_fails_keeps_the_old_file(self, tmp_path, monkeypatch):
    front_lib.save_front(tmp_path, _front())
    before = (tmp_path / "front.json").read_text()

    def fail(source, target):
      raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
      front_lib.save_front(tmp_path, _front(method="other"))
    assert (tmp_path / "front.json").read_text() == before

  def test_unknown_fields_are_ignored(self, tmp_path):
    front_lib.save_front(tmp_path, _front())
    path = tmp_path / "front.json"
    path.write_text(
      json.dumps({**json.loads(path.read_text()), "note": "from elsewhere"})
    )
    assert front_lib.load_front(path) == _front()

  def test_no_file(self, tmp_path):
    with pytest.raises(FrontError, match="clp evaluate"):
      front_lib.load_front(tmp_path / "front.json")

  @pytest.mark.parametrize(
    ("edit", "message"),
    [
      (lambda c: c.pop("hypervolume"), "lacks 'hypervolume'"),
      (lambda c: c["points"][0].pop("kl"), "lacks 'kl'"),
      (lambda c: c["points"][2]["kl"].pop("stderr"), "lacks 'stderr'"),
      (lambda c: c["points"][1]["weights"].pop("nli"), r"points\[1\].weights"),
      (lambda c: c["points"].clear(), "needs a point"),
      (lambda c: c.update(points=3), "not iterable"),
      (lambda c: c.update(spread="wide"), "wide"),
      (lambda c: c.update(reference_point=[0.0]), "1 values for the 2"),
      (lambda c: c["points"][0].update(rewards=[1, 2]), "items"),
      (lambda c: c.update(hypervolume=float("nan")), "hypervolume .* nan"),
    ],
  )
  def test_a_malformed_file_is_an_error_that_names_it(
    self, tmp_path, edit, message
  ):
    front_lib.save_front(tmp_path, _front())
    path = tmp_path / "front.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FrontError, match=f"front.json.*{message}"):
      front_lib.load_front(path)

  @pytest.mark.parametrize("text", ['{"method": ', "[1, 2]", "", "null"])
  def test_a_file_of_something_else(self, tmp_path, text):
    path = tmp_path / "front.json"
    path.write_text(text)
    with pytest.raises(FrontError, match=r"front.json is no"):
      front_lib.load_front(path)


class TestPlot:
  @pytest.mark.parametrize("m", [1, 2, 3, 4])
  def test_draws_any_number_of_rewards(self, tmp_path, m):
    rng = np.random.default_rng(m)
    names = [f"r{i}" for i in range(m)]
    fronts = []
    for method in ("full-CLP", "soups"):
      points = [
        front_lib.Point(
          weights=dict(zip(names, w, strict=True)),
          alpha=0.01 * (k + 1),
          rewards={n: Estimate(rng.uniform(), 0.02) for n in names},
          kl=Estimate(rng.uniform(1, 5), 0.1),
          value=Estimate(0.5, 0.02),
        )
        for k, w in enumerate(np.eye(m))
      ]
      fronts.append(
        front_lib.front_from_points(
          points,
          method=method,
          objectives=names,
          step=1,
          prompts=8,
          decoding={},
          reference_point=[0.0] * m,
        )
      )
    plot.plot_fronts(fronts, tmp_path / "pareto.png")
    pixels = image.imread(tmp_path / "pareto.png")[..., :3]
    # Both methods' colours are on the page.
    for colour in ("0072B2", "D55E00"):
      rgb = np.array(list(bytes.fromhex(colour))) / 255
      assert (np.abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 50

  def test_many_methods_leave_the_panel_its_height(self, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
      plot, "save", lambda figure, *_, **__: drawn.append(figure)
    )
    names = [f"method {i}" for i in range(14)] + [
      "one whose name has 35 characters: xx"
    ]
    plot.plot_fronts(
      [_front(method=name) for name in names], tmp_path / "x.png"
    )
    (figure,) = drawn
    figure.draw_without_rendering()
    (ax,), (legend,) = figure.axes, figure.legends
    assert ax.get_window_extent().height > 3.5 * figure.dpi
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width

  def test_dominated_points_are_hollow(self, tmp_path, monkeypatch):
    faces = []
    scatter = axes.Axes.scatter

    def record(self, *args, **kwargs):
      faces.extend(kwargs["c"])
      return scatter(self, *args, **kwargs)

    monkeypatch.setattr(axes.Axes, "scatter", record)
    plot.plot_fronts([_front()], tmp_path / "plane.png")
    assert [face == "white" for face in faces] == [False, False, True, False]
    faces.clear()
    # With one reward: the least KL for its reward is not dominated.
    measured = ((0.3, 1.0), (0.8, 4.0), (0.75, 4.5))
    points = [_point((1.0,), (r,), kl=kl) for r, kl in measured]
    plot.plot_fronts([_front(points)], tmp_path / "kl.png")
    assert [face == "white" for face in faces] == [False, False, True]

  def test_other_objectives_and_no_fronts_are_errors(self, tmp_path):
    one = _front([_point((1.0,), (0.5,))], method="one")
    with pytest.raises(FrontError, match="nli, rouge and one of nli;"):
      plot.plot_fronts([_front(), one], tmp_path / "x.png")
    with pytest.raises(FrontError, match="no front"):
      plot.plot_fronts([], tmp_path / "x.png")


class TestMethodsTable:
  def test_shows_every_figure(self):
    fronts = [_front(training_samples=25600), _front(method="soups")]
    text = _rendered(fronts)
    clp, soups = [x for x in text.splitlines() if "0.707" in x]
    assert clp.split() == [
      *("full-CLP", "25,600", f"{fronts[0].hypervolume:.4f}", "0.707"),
      *("0.80", "1.00", "0.709"),
    ]
    assert soups.split()[:3] == ["soups", "-", clp.split()[2]]

  def test_says_how_certain_a_point_is(self):
    point = _point((1.0,), (0.5,))
    name = next(iter(point.rewards))
    wider = dataclasses.replace(
      point, rewards={name: front_lib.Estimate(0.25, 0.0521)}
    )
    fronts = [_front([point]), _front([wider])]
    mean = (point.rewards[name].stderr + 0.0521) / 2
    caption = tables.methods_caption(fronts)
    assert caption.endswith(f"error of a point: {mean:.3f} ({name}).")

  def test_leaves_out_what_nobody_has(self):
    text = _rendered([_front([_point((1.0,), (0.5,))])])
    assert "samples" not in text
    assert "-" not in text.split("Hypervolume above")[0].replace("full-CLP", "")

  def test_fits_eighty_columns_without_control_codes(self):
    fronts = [
      _front(method="Rewarded Soups, [twice] the steps", training_samples=10**9)
    ]
    text = _rendered(fronts)
    assert "\x1b" not in text and "\u2026" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for figure in ("1,000,000,000", "[twice]", "0.80 1.00"):
      assert figure in text

  def test_print_table_prints_it_to_stdout(self, capsys):
    tables.print_table([_front(), _front(method="soups")])
    assert capsys.readouterr().out == (
      _rendered([_front(), _front(method="soups")])
    )

  def test_other_reference_points_are_an_error(self):
    with pytest.raises(FrontError, match="soups from"):
      tables.methods_table(
        [_front(), _front(method="soups", reference_point=[0.0, 0.1])]
      )

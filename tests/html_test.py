"""report.html: what it shows, that it needs nothing else, and how it looks."""

import html.parser
import json
import re

import browsers
import pytest

from clp_jax.data import newsroom, tasks
from clp_jax.errors import FrontError
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation import html as page

HOSTILE = "</p><script src='http://x/y.js'>alert(1)</script>&amp;\"'\udc80"
DOCUMENT = (
  "Rothmere sold the market. It happened in Ravenford. Ravenford lies in "
  "Zanthia. Officials cited talks."
)


def front(
  method="full-CLP",
  objectives=("rouge", "nli"),
  points=5,
  alphas=1,
  shift=0.0,
):
  """A front.json of a sweep from the last objective to the first."""
  m = len(objectives)
  rows = []
  for alpha in [0.01 * 3**i for i in range(alphas)]:
    for i in range(points):
      at = i / max(points - 1, 1)
      weights = [0.0] * m
      weights[0] += at
      weights[-1] += 1 - at
      rewards = [0.412 + shift + 0.3 * w**0.5 - alpha for w in weights]
      rows.append(
        front_lib.Point(
          weights=dict(zip(objectives, weights, strict=True)),
          alpha=alpha,
          rewards={
            o: front_lib.Estimate(r, 0.0123)
            for o, r in zip(objectives, rewards, strict=True)
          },
          kl=front_lib.Estimate(7.25 + at - alpha, 0.5),
          value=front_lib.Estimate(0.5678, 0.0034),
        )
      )
  made = front_lib.front_from_points(
    rows,
    method=method,
    objectives=objectives,
    step=3,
    prompts=16,
    decoding={"temperature": 0.7},
    reference_point=[0.0] * m,
  )
  return front_lib.to_json(made)


def samples(document=DOCUMENT, method=None, points=11):
  told = ["Rothmere sold the market.", "Mayor Rothmere sold the market."]
  return [
    {
      "document": document,
      "reference": "Rothmere sold the market in Zanthia after rumours.",
      "weights": {"rouge": i / (points - 1), "nli": 1 - i / (points - 1)},
      "alpha": 0.01,
      "summary": told[i > 5] if i < 10 else "Rothmere sold market after talks",
      "rewards": {"rouge": 0.25, "nli": 0.85},
    }
    | ({} if method is None else {"method": method})
    for i in range(points)
  ]


class _Reader(html.parser.HTMLParser):
  """Tags with their attributes, texts by section, and that tags are closed."""

  VOID = frozenset({"meta", "input", "br", "link", "img"})

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.sections = [], [], {}
    self.section, self.marks, self.titles = None, [], []
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag == "section":
      self.section = dict(attributes)["id"]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.sections[self.section] = self.sections.get(self.section, "") + data
    if self.open and self.open[-1] == "mark":
      self.marks.append(data)
    if self.open and self.open[-1] == "title":
      self.titles.append(data)

  def count(self, tag, kind):
    return sum(
      t == tag and kind in a.get("class", "").split() for t, a in self.tags
    )


def read(text):
  return _Reader(text)


def full_page():
  return page.render(
    "Steering",
    fronts=[front(), front("Rewarded Soups", points=4)],
    tables=[
      page.Table("Methods", [{"method": "a", "x": 0.123456, "n": None}], "Why.")
    ],
    samples=samples(method="full-CLP") + samples(method="Rewarded Soups"),
    configs={
      "full-CLP": {"seed": 0, "train": {"steps": 7}},
      "Rewarded Soups": {"seed": 0, "train": {"steps": 9}},
    },
    commands=["clp demo --seed 0", "clp evaluate > x && echo 'done'"],
    about={"time": "5 s"},
    unsupported=tasks.fact_checker("newsroom"),
  )


def test_every_point_tells_its_weighting_rewards_and_errors_by_keyboard():
  got = read(full_page())
  points = [a for t, a in got.tags if "point" in a.get("class", "").split()]
  assert len(points) == 9
  assert all(a["tabindex"] == "0" for a in points)
  second = next(a for a in points if "rouge 0.25, nli 0.75" in a["aria-label"])
  for figure in ("full-CLP", "0.5520 ± 0.0123", "7.490 ± 0.500", "0.5678"):
    assert figure in second["aria-label"]
  # The picture says the same without styles.
  assert sum("rouge 0.25, nli 0.75" in title for title in got.titles) == 1
  assert got.count("path", "hollow") == 0


def test_marks_lie_where_the_rewards_are():
  """The mark's place is affine in the rewards, and y grows upwards."""
  text = page.render("x", fronts=[front()])
  places = re.findall(r'class="mark" d="M([\d.]+) ([\d.]+)m', text)
  xs, ys = ([float(p[i]) for p in places] for i in (0, 1))
  points = front()["points"]
  for axis, name, sign in ((xs, "rouge", 1), (ys, "nli", -1)):
    values = [p["rewards"][name]["mean"] for p in points]
    for i in range(1, 4):
      part = (values[i] - values[0]) / (values[-1] - values[0])
      assert axis[i] == pytest.approx(
        axis[0] + part * (axis[-1] - axis[0]), abs=0.2
      )
    assert sign * (axis[-1] - axis[0]) * (values[-1] - values[0]) > 0


def test_panels_follow_the_number_of_rewards():
  for objectives, captions in (
    (("nli",), ["nli against KL"]),
    (("rouge", "nli"), ["nli against rouge"]),
    (
      ("rouge", "nli", "tldr"),
      ["nli against rouge", "tldr against rouge", "tldr against nli"],
    ),
  ):
    got = read(page.render("x", fronts=[front(objectives=objectives)]))
    assert got.count("div", "plot") == len(captions)
    for caption in captions:
      assert caption in got.sections["fronts"]


def test_one_reward_is_dominated_by_less_kl_and_more_reward():
  content = front(objectives=("nli",), alphas=3, points=1)
  content["points"][1]["rewards"]["nli"]["mean"] = 0.2  # less than all, more KL
  content["points"][1]["kl"]["mean"] = 9.0
  got = read(page.render("x", fronts=[content]))
  assert got.count("path", "hollow") == 1


def test_a_sweep_is_a_line_for_each_kl_weight():
  def lines(**changes):
    text = page.render("x", fronts=[front(**changes)])
    return read(text).count("path", "sweep")

  assert lines() == 1
  assert lines(alphas=3) == 3
  assert lines(objectives=("nli",), alphas=3) == 1
  assert lines(objectives=("rouge", "nli", "tldr")) == 0


def test_a_front_that_does_not_move_can_be_drawn():
  content = front(points=1)
  for estimate in content["points"][0]["rewards"].values():
    estimate.update(mean=0.0, stderr=0.0)
  assert "nan" not in page.render("x", fronts=[content])


def test_samples_stand_side_by_side_with_unsupported_facts_marked():
  got = read(full_page())
  text = got.sections["samples"]
  # Five weightings of the eleven, both ends among them, for two methods.
  cells = [a["data-at"] for t, a in got.tags if "data-at" in a]
  assert len(cells) == 10 and len(set(cells)) == 5
  assert {"rouge 0.00, nli 1.00", "rouge 1.00, nli 0.00"} <= set(cells)
  # The reference's cause is another than the article's; no article has a role.
  assert got.marks[:2] == ["Marked", "rumours"]
  assert set(got.marks[2:]) == {"Mayor"}
  assert text.count("(not grammatical)") == 2
  assert text.count("Rothmere sold the market.") >= 4


def test_nothing_is_marked_where_the_world_is_unknown():
  assert tasks.fact_checker("xsum") is None
  assert tasks.fact_checker(None) is None
  got = read(page.render("x", fronts=[], samples=samples()))
  assert not got.marks
  assert got.sections["samples"].count("Rothmere sold the market.") == 5 + 1 - 1


def test_unsupported_facts_are_found_where_the_reward_counts_them():
  items = newsroom.make_items("test", 0, 200)
  documents = [item.document for item in items]
  references = [item.reference for item in items]
  # Every article with another's reference: many unsupported facts.
  references = references[1:] + references[:1]
  scores = newsroom.entailment(documents, references, references)
  for document, text, score in zip(documents, references, scores, strict=True):
    spans = newsroom.unsupported(document, text)
    assert newsroom.UNSUPPORTED_FACTOR ** len(spans) == pytest.approx(score)
    for start, stop in spans:
      assert re.fullmatch(r"[\w$]+", text[start:stop])
      assert not (text + " ")[stop].isalnum()
  assert newsroom.unsupported(documents[0], "No sentence of the world") is None


def test_configs_show_what_differs_first():
  text = read(full_page()).sections["configuration"]
  assert text.index("train.steps") < text.index("seed")
  assert re.search(r"train\.steps\s*7\s*9", text)


def test_commands_and_tables_are_shown_as_they_are():
  got = read(full_page())
  assert "clp evaluate > x && echo 'done'" in got.sections["reproduce"]
  assert re.search(r"0\.1235-", got.sections["tables"])
  assert "Why." in got.sections["tables"]


def test_every_text_is_escaped():
  objectives = (HOSTILE[:-1], "nli")
  content = front(HOSTILE, objectives)
  content["decoding"] = {HOSTILE: HOSTILE}
  rows = [
    row | {"method": HOSTILE, "summary": HOSTILE, "rewards": {HOSTILE: 0.5}}
    for row in samples(document=HOSTILE)
  ]
  text = page.render(
    HOSTILE,
    fronts=[content],
    tables=[page.Table(HOSTILE, [{HOSTILE: HOSTILE}], HOSTILE)],
    samples=rows,
    configs={HOSTILE: {HOSTILE: HOSTILE}},
    commands=[HOSTILE],
    about={HOSTILE: HOSTILE},
    unsupported=lambda document, summary: [(3, 9)],
  )
  got = read(text)
  assert not {t for t, _ in got.tags} & {"script", "link", "img", "iframe"}
  assert not any(k.startswith("on") for _, a in got.tags for k in a)
  assert "alert(1)" in got.sections["samples"]
  text.encode()  # no lone surrogate is left


def test_the_page_loads_nothing():
  text = full_page()
  assert "default-src 'none'" in text
  assert not re.search(r"(src|href)=\"(?!#)", text)
  assert (
    "url(" not in text
    and "@import" not in text
    and "http" not in (text.replace("http-equiv", ""))
  )


def test_fronts_that_do_not_fit_are_an_error():
  with pytest.raises(FrontError, match="same objectives"):
    page.render("x", fronts=[front(), front("b", ("rouge", "tldr"))])
  broken = front()
  del broken["points"][0]["kl"]
  with pytest.raises(FrontError, match=r"fronts\[1\].*'kl'"):
    page.render("x", fronts=[front(), broken])


def test_save_gives_an_address_that_opens(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  address = page.save("a folder #1.html", full_page())
  assert address == (tmp_path / "a folder #1.html").as_uri()
  assert (tmp_path / "a folder #1.html").read_text() == full_page()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("objectives", [2, 3])
def test_a_browser_shows_it(tmp_path, width, objectives):
  names = ("rouge", "nli", "tldr")[:objectives]
  text = page.render(
    "Steering",
    fronts=[front(objectives=names), front("soups", names, 4, shift=-0.1)],
    samples=samples(),
    configs={"run": json.loads('{"a": [1, 2]}')},
    commands=["clp demo " + "--x " * 60],
  )
  address = page.save(tmp_path / "report.html", text)
  with browsers.chromium() as browser:
    tab = browser.new_page(viewport={"width": width, "height": 800})
    requests, messages = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.goto(address)
    point = tab.locator(".point").first
    tip = point.locator(".tip")
    assert not tip.is_visible()
    point.hover()
    assert tip.is_visible() and "± 0.0123" in tip.inner_text()
    tab.mouse.move(0, 0)
    assert not tip.is_visible()
    tab.locator("#show-1").focus()  # the last thing before the first point
    tab.keyboard.press("Tab")
    assert tip.is_visible()
    for shown in tab.locator(".point").all():  # none leaves the page
      shown.focus()
      box = shown.locator(".tip").bounding_box()
      assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    drawn = tab.locator(".plot .s1 .mark").last
    assert drawn.is_visible()
    tab.locator("#show-1").uncheck()
    drawn.wait_for(state="hidden")
    assert requests == [address] and not messages

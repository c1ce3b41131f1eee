"""The page in a real browser: Debian's Chromium, or Playwright's own.

Needs the extra "test" and a browser: `apt-get install chromium`, or
`playwright install chromium`. Run with -m browser. With CLP_TEST_RUN naming the
folder of a trained run of the built-in world (`clp demo`), that one is steered;
otherwise a smaller one is trained first, which takes minutes.
"""

import contextlib
import os
import pathlib
import time

import browsers
import numpy as np
import pytest
import runs
import small_decoder

from clp_jax.data import newsroom

pytestmark = pytest.mark.browser

SIZES = {"desktop": (1280, 900), "phone": (375, 812)}
PROMPTS = 12


@pytest.fixture(scope="module")
def browser():
  with browsers.chromium() as launched:
    yield launched


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  workdir = os.environ.get("CLP_TEST_RUN")
  if workdir is None:
    workdir = tmp_path_factory.mktemp("runs") / "steered"
    arguments = ["train", "--config", runs.CONFIG, "--workdir", workdir]
    status, _, err = runs.clp(*arguments, "--config.train.steps=200")
    assert status == 0, err
    status, _, err = runs.clp(
      "evaluate", "--workdir", workdir, "--grid", 5, "--prompts", 64
    )
    assert status == 0, err
  with serving(workdir) as made:
    yield made


@pytest.fixture(scope="module")
def chat_address(tmp_path_factory):
  """Of a model with a chat template that has learnt nothing."""
  folder = tmp_path_factory.mktemp("chat")
  small_decoder.save(folder / "model")
  settings = {"data.source_length": 256, "data.target_length": 24}
  runs.make_run(folder / "run", str(folder / "model"), **settings)
  with serving(folder / "run") as made:
    yield made


@contextlib.contextmanager
def serving(workdir):
  """The address of a server of its own process."""
  process = runs.start(["serve", "--workdir", workdir, "--port", 0])
  try:
    line = process.stdout.readline()
    assert "http://" in line, process.stderr.read()
    yield line.split()[-1]
  finally:
    process.terminate()
    process.communicate(timeout=60)


@pytest.fixture(params=SIZES)
def page(request, browser, address):
  yield from open_page(request, browser, address)


@pytest.fixture(params=SIZES)
def chat_page(request, browser, chat_address):
  yield from open_page(request, browser, chat_address)


def open_page(request, browser, address):
  width, height = SIZES[request.param]
  context = browser.new_context(viewport={"width": width, "height": height})
  context.set_default_timeout(120_000)  # ms; a machine may be busy
  opened = context.new_page()
  problems, elsewhere = [], []
  opened.on("pageerror", lambda error: problems.append(str(error)))
  opened.on(
    "console",
    lambda message: (
      problems.append(message.text) if message.type == "error" else None
    ),
  )
  opened.on(
    "request",
    lambda asked: (
      elsewhere.append(asked.url)
      if not asked.url.startswith((address, "data:"))
      else None
    ),
  )
  opened.goto(address)
  opened.wait_for_selector("#summary[data-weights]")
  yield opened
  folder = os.environ.get("CLP_TEST_SCREENSHOTS")
  if folder is not None:
    name = f"{request.node.name}.png".replace("/", "_")
    opened.screenshot(path=pathlib.Path(folder) / name, full_page=True)
  context.close()
  assert not problems and not elsewhere


def read_summary(page, change):
  """The summary that belongs to what `change` does."""
  change()  # which marks what is shown as out of date
  page.wait_for_selector("#summary:not(.busy)")
  return page.inner_text("#summary").strip()


def document_box(page):
  return page.get_by_role("textbox", name="Document")


def wait_until(page, condition):
  """Playwright's own waiting evaluates strings, which the page forbids."""
  end = time.monotonic() + 120
  while not page.evaluate(condition):
    assert time.monotonic() < end, condition
    page.wait_for_timeout(50)


def slide(page, objective, value):
  """Moves an objective's slider as a keyboard or mouse would, in the end."""
  slider = page.get_by_label(objective, exact=True)
  slider.evaluate(
    """(input, value) => {
      input.value = value;
      input.dispatchEvent(new Event("input", { bubbles: true }));
      input.dispatchEvent(new Event("change", { bubbles: true }));
    }""",
    value,
  )


def test_faithfulness_follows_the_slider(page):
  items = newsroom.make_items("test", 0, PROMPTS)
  faithfulness = []
  texts = []
  for weight in (0, 1):
    summaries = []
    slide(page, "nli", weight)
    for item in items:
      document = document_box(page)
      summaries.append(
        read_summary(page, lambda d=document, i=item: d.fill(i.document))
      )
    texts.append(summaries)
    scores = newsroom.entailment(
      [item.document for item in items],
      [item.reference for item in items],
      summaries,
    )
    faithfulness.append(float(np.mean(scores)))
  assert texts[0] != texts[1]
  assert faithfulness[1] > faithfulness[0] + 0.1, faithfulness


def test_a_slider_moves_by_keyboard_and_the_others_follow(page):
  slider = page.get_by_label("rouge", exact=True)
  slider.focus()
  page.keyboard.press("End")
  assert page.get_by_label("nli", exact=True).input_value() == "0"
  for _ in range(10):
    page.keyboard.press("ArrowLeft")
  assert float(slider.input_value()) == pytest.approx(0.9)
  assert page.inner_text("#weight-1-value") == "0.10"
  wait_until(page, "location.hash.includes('nli%3D0.1')")


def test_an_address_brings_the_same_page(page, browser, address):
  document = newsroom.make_items("test", 5, 6)[0].document
  document_box(page).fill(document)
  summary = read_summary(page, lambda: slide(page, "nli", 0.85))
  url = page.url
  assert "#weights=" in url
  other = browser.new_page()
  other.goto(url)
  other.wait_for_selector("#summary[data-weights]")
  assert other.inner_text("#summary").strip() == summary
  assert document_box(other).input_value() == document
  assert other.inner_text("#weight-1-value") == "0.85"
  other.close()


def test_the_front_and_the_row_show_where_one_is(page):
  wait_until(
    page,
    "[...document.querySelectorAll('#row .text')].every(x => x.textContent)",
  )
  before = page.get_attribute("#front .here", "cx")
  slide(page, "nli", 1)
  assert page.get_attribute("#front .here", "cx") != before
  row = page.locator("#row button")
  assert row.count() == 5
  pressed = [row.nth(i).get_attribute("aria-pressed") for i in range(5)]
  assert pressed == ["true", "false", "false", "false", "false"]
  summary = read_summary(page, lambda: row.nth(4).click())
  assert summary == row.nth(4).locator(".text").inner_text().strip()


def test_text_is_shown_as_text_and_nothing_sticks_out(page):
  hostile = '<img src=x onerror="document.title=1"> Brivane opened the museum.'
  read_summary(page, lambda: document_box(page).fill(hostile))
  assert page.title().startswith("Steer")
  width = page.evaluate("document.documentElement.scrollWidth")
  assert width <= page.viewport_size["width"]


def test_a_model_without_a_template_shows_no_chat(page):
  assert page.get_by_role("button", name="Chat").count() == 0


def test_a_conversation_follows_the_slider(chat_page):
  page = chat_page
  page.get_by_role("button", name="Chat").click()
  assert not page.locator("#document").is_visible()
  box = page.get_by_role("textbox", name="Message")
  box.fill("Who opened the museum?")
  box.press("Enter")
  turns = page.locator("#turns li")

  def answer():
    page.wait_for_selector("#send:not([disabled])")
    page.wait_for_selector("#turns .assistant:last-child:not(.busy)")
    return turns.last.locator(".text").inner_text()

  first = answer()
  assert first and turns.count() == 2
  slide(page, "nli", 1)
  second = answer()
  assert second != first and turns.count() == 2
  assert "nli\u00a01.00" in turns.last.locator(".who").inner_text()
  box.fill("<b>And</b> then?")
  page.get_by_role("button", name="Send").click()
  assert answer() and turns.count() == 4
  assert turns.nth(2).locator(".text").inner_text() == "<b>And</b> then?"
  width = page.evaluate("document.documentElement.scrollWidth")
  assert width <= page.viewport_size["width"]
  page.get_by_role("button", name="New conversation").click()
  assert turns.count() == 0
  page.get_by_role("button", name="Chat").click()
  assert page.locator("#document").is_visible()

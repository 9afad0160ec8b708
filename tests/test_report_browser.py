"""The report in a browser: nothing scrolls sideways, is cut off, overlaps, is loaded or is logged."""

from __future__ import annotations

import functools
import shutil
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_report import ARMS, TWO, make

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
]  # fmt: skip

ODD = (
    "<script>alert(1)</script> & 'one' \"two\"",
    "שלום עולם \u202eright to left",
    "😀👩\u200d💻 emoji and accents a\u0301",
    "control \x1b[31m \x00 \r\n \ud800 characters",
    "=cmd|' /C calc'!A0",
    "\u200b",
)
COMPARISONS = {
    "usual": lambda: make(seeds=5),
    "long": lambda: make(
        {"w" * 300: ARMS["adam:constant"], "a word " * 43: ARMS["adam:step"], "x:" * 150: ARMS["rmsprop"]},
        seeds=5, task="t" * 300, metric_name="m" * 300, out="/" + "o" * 300,
    ),
    "hostile": lambda: make(
        {name: values for name, values in zip(ODD, ARMS.values(), strict=False)},
        seeds=5, task=ODD[0], metric_name=ODD[3], maximize=True, spread=0.2,
    ),
    "twelve": lambda: make(
        {f"{name}{end}": ARMS[name] for name in list(ARMS)[:6] for end in ("", ", again")}, seeds=5
    ),
    "huge": lambda: _scaled(make(TWO, seeds=5), 1e300),
    "diverged": lambda: make(TWO, seeds=5, lost=ARMS),
}  # fmt: skip


def _scaled(comparison, factor):
    for name in ("final_metric", "best_metric", "initial_metric"):
        comparison.table[name] *= factor
    for curves in (comparison.validation_curves, comparison.training_curves):
        np.multiply(curves, factor, out=curves)
    return comparison


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, made in COMPARISONS.items():
        made().to_html(folder / f"{name}.html")
    return folder


# Gives a sentence for all that is wrong with the layout.
CHECK = """() => {
  const wrong = [], width = document.documentElement.clientWidth;
  const name = e => `<${e.tagName.toLowerCase()} class="${e.getAttribute("class") ?? ""}"> ` +
    e.textContent.trim().slice(0, 40);
  if (document.documentElement.scrollWidth > width) wrong.push("the page scrolls sideways");
  const boxes = [];
  for (const e of document.body.querySelectorAll("*")) {
    const inside = e.ownerSVGElement, box = e.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    if (!inside && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
      wrong.push(`scrolls or is cut off: ${name(e)}`);
    if (!inside && (box.left < -0.5 || box.right > width + 0.5)) wrong.push(`is off the page: ${name(e)}`);
    for (const node of e.childNodes) {
      if (node.nodeType !== Node.TEXT_NODE || !node.data.trim()) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      for (const r of range.getClientRects()) {
        if (r.width < 1) continue;
        boxes.push({e, r});
        const frame = inside ? inside.getBoundingClientRect() : e.getBoundingClientRect();
        if (r.left < frame.left - 1 || r.right > frame.right + 1)
          wrong.push(`sticks out of its box: ${name(e)}`);
      }
    }
  }
  boxes.sort((a, b) => a.r.top - b.r.top);
  boxes.forEach((a, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j].r.top < a.r.bottom; j++) {
      const b = boxes[j];
      if (a.e === b.e || a.e.contains(b.e) || b.e.contains(a.e)) continue;
      const across = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
      const down = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
      if (across > 2 && down > 4) wrong.push(`overlap: ${name(a.e)} and ${name(b.e)}`);
    }
  });
  return [...new Set(wrong)];
}"""


class Shown(NamedTuple):
    """A page that is loaded once; then the window changes its size and the user the colours."""

    page: Any
    url: str
    said: list
    loaded: list


@pytest.fixture(scope="module")
def shown(browser, pages):
    @functools.cache
    def show(name):
        page, said, loaded = browser.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: loaded.append(request.url))
        url = (pages / f"{name}.html").as_uri()
        page.goto(url)
        page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        return Shown(page, url, said, loaded)

    return show


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1200, 1600])
@pytest.mark.parametrize("name", COMPARISONS)
def test_layout(shown, name, width, scheme):
    page, url, said, loaded = shown(name)
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate(CHECK) == []
    pictures = page.evaluate("[...document.querySelectorAll('figure svg')].filter(e => e.clientWidth).length")
    assert pictures == 4
    lefts = page.evaluate("[...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().left)")
    assert len(set(lefts)) in (1, 2, 4)  # none stands alone
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
    assert (said, loaded) == ([], [url])


def test_the_check_sees_what_is_wrong(browser):
    page = browser.new_page(viewport={"width": 360, "height": 900})
    page.set_content(
        "<p style='width: 500px'>wide</p><p style='width: 50px; overflow: hidden'>averylongwordindeed</p>"
        "<p style='margin: 0'>below</p><p style='margin: -20px 0 0'>above</p>"
    )
    found = " ".join(page.evaluate(CHECK))
    for fault in ("the page scrolls sideways", "off the page", "cut off", "sticks out of its box", "overlap"):
        assert fault in found
    page.close()

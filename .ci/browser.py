"""Looks at the site in a browser: `python .ci/browser.py SITE`, after `mkdocs build`.

Fails if a page scrolls sideways on a phone or a screen, shows a broken picture or an error, or if the search
finds the answer to a newcomer's question neither on the first nor on the second page.
"""

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = (390, 1400)
QUESTIONS = {
    "how do I freeze layers": "guides/groups",
    "why is my bf16 loss stuck": "guides/low_precision",
    "what is total_steps with accumulation": "guides/accumulation",
    "should I decay the learning rate with adam": "should_i_decay",
    "which optimizer should I use": "guides/choosing",
    "how do I find a learning rate": "guides/learning_rate_finder",
    "adamw weight decay or L2": "guides/weight_decay",
    "no weight decay for biases": "guides/weight_decay",
    "different learning rate per layer": "guides/groups",
    "fine-tuning with LoRA": "guides/groups",
    "my gradient is NaN": "guides/bad_gradients",
    "batch norm after a bad step": "guides/bad_gradients",
    "clip gradients": "guides/bad_gradients",
    "resume training from a checkpoint": "guides/checkpoints",
    "train longer than planned": "guides/checkpoints",
    "change the learning rate during training": "guides/hyperparameters",
    "sweep learning rates with vmap": "guides/hyperparameters",
    "one-cycle momentum": "guides/one_cycle",
    "ReduceLROnPlateau": "migrating/pytorch",
    "load_state_dict from pytorch": "migrating/pytorch",
    "keras ExponentialDecay": "migrating/tensorflow",
    "convert an optax state": "migrating/optax",
    "shard the optimizer state": "scale",
    "train on many hosts": "scale",
    "run a study on slurm": "own_script",
    "compare optimizers on my training script": "own_script",
    "what is the effective learning rate": "guides/effective_rates",
    "gradient noise scale": "guides/accumulation",
    "8-bit adam memory": "guides/low_precision",
    "learning rate too high diverges": "error_control",
    "is it faster than optax": "benchmarks",
    "write my own schedule or optimizer": "extending",
    "should my running job decay now": "decay_now",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_):
        """Says nothing."""


def found(page: Page, question: str) -> list[str]:
    """Returns the pages that the search box shows for a question, best first."""
    box = page.locator("[data-md-component=search-query]")
    links = page.locator("a.md-search-result__link")
    box.fill("")
    box.press("Backspace")  # the search listens to keys
    links.first.wait_for(state="detached")
    box.press_sequentially(question)
    links.first.wait_for()
    seen: list[list[str]] = []
    while len(seen) < 3 or not seen[-1] == seen[-2] == seen[-3]:  # the last key's results are there
        page.wait_for_timeout(200)
        seen.append(links.evaluate_all("links => links.map(link => new URL(link.href).pathname)"))
    pages = [link.strip("/").removesuffix(".html").removesuffix("/index") for link in seen[-1]]
    return list(dict.fromkeys(pages))


# Gives a sentence for all that is wrong with a page.
CHECK = """() => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) wrong.push(`scrolls sideways, ${root.scrollWidth} wide`);
  for (const image of document.images)
    if (image.checkVisibility() && image.complete && !image.naturalWidth)
      wrong.push(`no picture ${image.src}`);
  return wrong;
}"""


def faults(page: Page, root: str, site: Path) -> list[str]:
    """Returns what is wrong with the pages, on a phone in the light theme and on a screen in the dark one."""
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    for path in sorted(site.rglob("*.html")):
        if path.name == "report.html":  # not the site's, and tested by tests/test_report_browser.py
            continue
        for width, theme in zip(WIDTHS, ("light", "dark"), strict=True):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=theme)
            page.goto(f"{root}/{path.relative_to(site).as_posix()}")
            where = f"{path.relative_to(site)} at {width} px, {theme}"
            wrong += [f"{where}: {fault}" for fault in page.evaluate(CHECK)]
    return wrong


def missed(page: Page) -> int:
    """Asks all questions; returns how many do not find their page."""
    page.locator("[data-md-component=search-query]").click()
    page.wait_for_timeout(2000)  # the index is read
    lost = 0
    for question, answer in QUESTIONS.items():
        pages = found(page, question)
        place = pages.index(answer) + 1 if answer in pages else 0
        lost += place not in (1, 2)
        print(f"{place or '-'} {question}: {answer}" + ("" if place in (1, 2) else f", not {pages[:3]}"))
    return lost


def main(site: str) -> int:
    """Looks at all pages and asks all questions; returns the exit code."""
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("no browser was found: the site is not looked at")
        return 0
    root = f"http://127.0.0.1:{server.server_port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        wrong = faults(browser.new_page(), root, Path(site))
        print("\n".join(wrong) or "no page scrolls sideways, lacks a picture or shows an error")
        page = browser.new_page()
        page.goto(root)
        lost = missed(page)
        browser.close()
    return int(bool(wrong) or lost > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "index.html").exists():
        sys.exit("usage: python .ci/browser.py SITE, the folder that mkdocs build has written")
    sys.exit(main(sys.argv[1]))

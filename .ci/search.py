"""Asks the site's search box a newcomer's questions, in a browser: `python .ci/search.py SITE`.

Fails if one finds the page with its answer neither first nor second. SITE is what `mkdocs build` has written.
"""

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

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
    box.fill("")
    page.wait_for_timeout(100)
    box.type(question)
    page.wait_for_timeout(700)
    links = page.locator("a.md-search-result__link").evaluate_all(
        "links => links.map(link => new URL(link.href).pathname)"
    )
    pages = [link.strip("/").removesuffix(".html").removesuffix("/index") for link in links]
    return list(dict.fromkeys(pages))


def main(site: str) -> int:
    """Asks all questions; returns the exit code."""
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("no browser was found: the search is not checked")
        return 0
    missed = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("[data-md-component=search-query]").click()
        page.wait_for_timeout(2000)  # the index is read
        for question, answer in QUESTIONS.items():
            pages = found(page, question)
            place = pages.index(answer) + 1 if answer in pages else 0
            missed += place not in (1, 2)
            print(f"{place or '-'} {question}: {answer}" + ("" if place in (1, 2) else f", not {pages[:3]}"))
        browser.close()
    return int(missed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "index.html").exists():
        sys.exit("usage: python .ci/search.py SITE, the folder that mkdocs build has written")
    sys.exit(main(sys.argv[1]))

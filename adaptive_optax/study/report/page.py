"""The report of a comparison: one HTML page that needs nothing else, and a summary for the terminal."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptive_optax._drawing import MINUS, THEMES
from adaptive_optax.study.figures import PICTURES, to_svg
from adaptive_optax.study.findings import (
    MISSING,
    best_rate,
    decision,
    diverged_trials,
    duration,
    equivalence_margin,
    final_metrics,
    interval,
    judge_all,
    mean_and_error,
    metric_format,
    own_change,
    signed,
)
from adaptive_optax.study.report_tables import looks_table, trial_table, tuning_table, verdict_table
from adaptive_optax.study.store import write_atomically

if TYPE_CHECKING:
    from adaptive_optax.study.result import Comparison
    from adaptive_optax.study.verdict import Verdict

# ---- The terminal ----


def print_summary(comparison: Comparison, console: Console) -> None:
    """Prints the sentence of every verdict and a table that fits in 80 columns.

    Args:
        comparison: What was compared.
        console: Where to print.
    """
    verdicts, headline, reason = judge_all(comparison)
    console.print(Text(headline.sentence if headline else f"Not judged: {reason}", style="bold"))
    for verdict in verdicts.values():
        if headline is None or verdict.arm != headline.arm:
            console.print(Text(verdict.sentence))
    info, number, metrics = comparison.info, metric_format(comparison), final_metrics(comparison)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for heading in ("peak rate", "metric", "difference", "adjusted interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for arm in info["arms"]:
        cells = [best_rate(comparison, arm), number(mean_and_error(metrics[arm])[0])]
        if v := verdicts.get(arm):
            cells += [signed(number, v.effect), interval(number, v.interval), decision(v)]
        else:
            cells += ["", "", "baseline" if arm == info["baseline"] else "not judged"]
        cells = [cell.replace(MINUS, "-").replace(MISSING, "-") for cell in cells]
        table.add_row(Text(arm), *map(Text, cells))
    console.print(table)
    notes = [f"Metric: {info['metric_name']}, lower is better"]
    notes += ["* on the edge of the rates tried"] * any(info["on_edge"].values())
    for arm in info["arms"]:
        lost, trials = diverged_trials(comparison, arm)
        notes += [f"{arm}: {lost} of {trials} runs diverged"] * bool(lost)
    console.print(Text("; ".join(notes) + ".", style="dim"))


# ---- The page ----


def to_html(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Writes the report as one HTML file that refers to no other.

    It opens with the verdict on the arm that did best in tuning, or with the reason why none could be
    reached; pictures, tables, limits and the way it was run follow. It follows the reader's preference for
    light or dark, and reads on a phone. The same comparison gives the same bytes.

    Args:
        comparison: What was compared.
        path: The file; its folder is made if need be, and it is whole or absent at any moment.

    Raises:
        ValueError: If `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file to write, got the folder {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _page(comparison).encode())


def _page(comparison: Comparison) -> str:
    info = comparison.info
    verdicts, headline, reason = judge_all(comparison)
    others = [verdict for arm, verdict in verdicts.items() if headline is None or arm != headline.arm]
    items = "".join(
        f'<li><span class="decision {escape(v.decision)}">{escape(v.decision)}</span>'
        f"<span>{escape(v.sentence)}</span></li>\n"
        for v in others
    )
    others_list = f'<ul class="others">\n{items}</ul>\n' if items else ""
    rivals = len(info["arms"]) - 1
    setting = (
        f"{rivals} arm{'s' * (rivals > 1)} against {info['baseline']}, each at its own best peak rate; "
        f"{info['steps']:,} steps, {info['seeds']} fresh seeds"
    )
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(info["task"])}: comparison of learning rates</title>
<style>
{_variables()}
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(info["task"])}: comparison of learning rates</h1>
<p class="setting">{escape(setting)}</p>
<p class="verdict">{escape(headline.sentence if headline else f"Not judged: {reason}")}</p>
</header>
{others_list}
<div class="pictures">
{_pictures(comparison, bool(verdicts))}</div>
{verdict_table(comparison, verdicts)}
{tuning_table(comparison)}
{looks_table(comparison)}
<div class="columns">
<div>
{_covers(comparison, bool(verdicts))}
{_does_not_show(comparison, verdicts)}
</div>
<section>
<h2>How it was run</h2>
{_run(comparison)}
</section>
</div>
{trial_table(comparison)}
</main>
</body>
</html>
"""


def _variables() -> str:
    light, dark = (
        ":root { " + " ".join(f"--{name}: {colour};" for name, colour in theme._asdict().items()) + " }"
        for theme in (THEMES["light"], THEMES["dark"])
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


def _pictures(comparison: Comparison, judged: bool) -> str:
    info = comparison.info
    metric, baseline, seeds = info["metric_name"], info["baseline"], info["seeds"]
    margin = equivalence_margin(comparison)
    within = metric_format(comparison)(margin)
    zone = f" Shaded: equivalent, within {within} of the baseline." if np.isfinite(margin) else ""
    captions = {
        "rates": (
            "Every arm has its own best peak rate",
            f"Final {metric} on {info['tuning_seeds']} tuning seeds, mean with a band of one standard error. "
            "Ringed: the rate taken for the verdict. Crosses: a run diverged.",
        ),
        "differences": (
            "Differences from the baseline",
            f"Final {metric} minus that of {baseline} for each of {seeds} fresh seeds (dots)"
            f"{', and the adjusted interval of its mean (bars)' * judged}.{zone} "
            "Crosses at the edge: a run diverged.",
        ),
        "curves": (
            "Training at the best rates",
            f"Validation {metric} over {seeds} fresh seeds, mean with a band of one standard error; dotted: "
            "the training loss. Runs that diverged are left out.",
        ),
        "effective_rates": (
            "The learning rate in effect",
            "That of the gradient step nearest to what the optimizer did, mean over the same runs with a "
            f"band of one standard error; dotted: the rate as scheduled.{_own_change(comparison)}",
        ),
    }
    parts = []
    for picture in PICTURES:
        title, caption = map(escape, captions[picture])
        drawn = "".join(
            f'<div class="{theme}">{to_svg(comparison, picture, theme=theme, description=title)}</div>\n'
            for theme in THEMES
        )
        caption = f"<figcaption>{caption}</figcaption>"
        parts.append(f"<figure>\n<h2>{title}</h2>\n{drawn}{caption}\n</figure>\n")
    return "".join(parts)


def _own_change(comparison: Comparison) -> str:
    """Says what the optimizer did to the baseline's rate by itself."""
    baseline = comparison.info["baseline"]
    change = own_change(comparison, baseline)
    if np.isnan(change):
        return ""
    verb, times = ("rose", change) if change > 1 else ("fell", 1 / change)
    return (
        f" Beyond its schedule, that of {baseline} {verb} by a factor of {times:.2g} from the first to the "
        "last quarter of the run."
    )


# ---- Words ----


def _covers(comparison: Comparison, judged: bool) -> str:
    info = comparison.info
    rivals = len(info["arms"]) - 1
    adjusted = f"{rivals} comparisons (Holm) and for looking" if rivals > 1 else "looking"
    held = f" The adjusted intervals allow for {adjusted} again after adding seeds." if judged else ""
    return f"""<section class="prose">
<h2>What the intervals cover</h2>
<p>Seeds: other initial parameters and other orders of the batches. All else is held: these tuned rates, this
split of the data, {info["steps"]:,} steps. The seeds of the verdict were not used in tuning, but tuning and
verdict share the validation set.{held}</p>
</section>"""


def _does_not_show(comparison: Comparison, verdicts: dict[str, Verdict]) -> str:
    info, number = comparison.info, metric_format(comparison)
    limits = [
        f"That it is so on another task, model or length of training: this is one task, "
        f"{info['parameters']:,} parameters and {info['steps']:,} steps.",
        "That it is so on other data: the rates were chosen on the validation set that judges them.",
        "Anything about rates between those tried, or about settings that were not tuned.",
    ]
    if len(info["arms"]) > 2:
        baseline = info["baseline"]
        limits.append(f"A ranking of the arms among themselves: each was compared with {baseline} only.")
    ends = [max(map(abs, v.interval)) for v in verdicts.values() if v.decision == "undecided"]
    if np.isfinite(ends).any():
        limits.append(
            f"That undecided arms equal {info['baseline']}: differences of up to {number(np.nanmax(ends))} "
            "are compatible with what was seen."
        )
    if edges := [arm for arm in info["arms"] if info["on_edge"].get(arm)]:
        limits.append(f"The best rate of {', '.join(edges)}: it lies on the edge of the rates tried.")
    items = "".join(f"<li>{escape(limit)}</li>\n" for limit in limits)
    return f'<section class="prose">\n<h2>What this does not show</h2>\n<ul>\n{items}</ul>\n</section>'


def _run(comparison: Comparison) -> str:
    info, table = comparison.info, comparison.table
    slow = dict.fromkeys(table["arm"][table["compilation"] == "per rate"])
    data = info["dataset"]
    entries = {
        "Baseline": info["baseline"],
        "Metric": f"{info['metric_name']}, lower is better",
        "Training": f"{info['steps']:,} steps, batches of {info['batch_size']:,}",
        "Seeds": f"{info['seeds']} fresh, {info['tuning_seeds']} for tuning",
        "Data": f"{data['train']:,} training and {data['validation']:,} validation samples",
        "Parameters": f"{info['parameters']:,}",
        "Execution": f"mode {info['mode']}, chunks of {info['chunk']} runs",
        "Compiled": "once per arm" + (f"; once per rate: {', '.join(slow)}" if slow else ""),
        "Devices": ", ".join(f"{n} × {name}" for name, n in Counter(info["devices"]).items()),
        "Versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        "Time": duration(info["seconds"]),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in entries.items())
    command = f"<dt>Command</dt><dd><code>{escape(shlex.join(info['command']))}</code></dd>\n"
    return f"<dl>\n{lines}{command}</dl>"

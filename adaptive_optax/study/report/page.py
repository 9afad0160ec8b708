"""The report of a comparison: one self-contained HTML page, and a summary for the terminal."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptive_optax._core.drawing import MINUS, THEMES, plain
from adaptive_optax._core.names import shortened, visible
from adaptive_optax.study.engine.progress import duration
from adaptive_optax.study.engine.store import write_atomically
from adaptive_optax.study.judged import TRAINED
from adaptive_optax.study.record import Record
from adaptive_optax.study.report.advice import answer
from adaptive_optax.study.report.figures import pictures_of, to_svg
from adaptive_optax.study.report.findings import (
    MISSING,
    best_rate,
    decision,
    diverged_trials,
    dropped_out,
    equivalence_margin,
    final_metrics,
    fresh_seeds,
    interval,
    judge_all,
    judged_by,
    limits,
    metric_format,
    own_change,
    own_rates,
    paired_differences,
    seeds_used,
    signed,
    tuning_seeds,
)
from adaptive_optax.study.report.tables import (
    again,
    looks_table,
    statistics_table,
    trial_table,
    tuning_table,
    verdict_table,
)
from adaptive_optax.study.statistics.paired import mean_and_error
from adaptive_optax.study.statistics.verdict import Verdict

# ---- The terminal ----

_NAME_WIDTH = 60  # longer names are shortened in the table
_LEAST_NAME = 12  # minimum width of the column of names, unless all names are shorter


def print_summary(record: Record, console: Console) -> None:
    """Prints the answer, the sentence of every other verdict, a table, what to do next, and what to use.

    The table fits the terminal: a narrow one drops the interval, the metric, the rate and the difference, in
    this order; the arm and its verdict always remain.

    Args:
        record: The comparison.
        console: Where to print.
    """
    verdicts = judge_all(record)[0]
    found = answer(record)
    console.print(Text(visible(f"{found.answer}: {found.sentence}"), style="bold"))
    for verdict in verdicts.values():
        if verdict.arm != found.arm:
            console.print(Text(visible(verdict.sentence)))
    console.print(_summary_table(record, verdicts, console))
    details = record.details
    notes = [f"Metric: {visible(details.metric_name)}, {record.direction.better} is better"]
    notes += [seeds_used(record)] * (details.sequential is not None)
    notes += ["* on the edge of the rates tried"] * any(details.on_edge.values())
    notes += [
        f"{visible(arm)}: tuned over its own rates, {rates}" for arm, rates in own_rates(record).items()
    ]
    for arm in details.arms:
        if (judged := judged_by(record, arm)) != TRAINED:
            notes.append(f"{visible(arm)}: judged by {judged.by}")
        lost, trials = diverged_trials(record, arm)
        notes += [f"{visible(arm)}: {lost} of {trials} trials diverged"] * bool(lost)
    console.print(Text("; ".join(notes) + ".", style="dim"))
    for warning in found.warnings:
        console.print(Text(visible(warning)))
    if found.next_step:
        console.print(Text(visible(f"Next: {found.next_step}")))
    _print_code(found.code, console)
    if use := found.recommendation:
        reason = "" if use.reason == found.sentence else f" {use.reason}"
        console.print(Text(visible(f"Use {use.arm} at a peak rate of {use.learning_rate:g}.{reason}")))
        _print_code(use.code.splitlines(), console)
    elif found.why_not != found.sentence:
        console.print(Text(visible(f"Nothing can be recommended: {found.why_not}")))


def _print_code(lines: list[str], console: Console) -> None:
    for line in lines:
        console.print(Text(f"    {visible(line)}"), soft_wrap=True)


def _summary_table(record: Record, verdicts: dict[str, Verdict], console: Console) -> Table:
    number, metrics = metric_format(record), final_metrics(record)
    columns: dict[str, list[str]] = {
        name: [] for name in ("arm", "peak rate", "metric", "difference", "adjusted interval", "verdict")
    }
    for arm in record.details.arms:
        cells = [
            shortened(arm, _NAME_WIDTH), best_rate(record, arm), number(mean_and_error(metrics[arm])[0])
        ]  # fmt: skip
        if v := verdicts.get(arm):
            cells += [signed(number, v.effect), interval(number, v.interval), decision(v)]
        elif arm == record.details.baseline:
            cells += ["", "", "baseline"]
        else:
            difference = mean_and_error(paired_differences(record, arm))[0]
            cells += [signed(number, difference), "", "not judged"]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell.replace(MINUS, "-").replace(MISSING, "-"))

    def width(name: str) -> int:
        widest = max(Text(cell).cell_len for cell in (name, *columns[name]))
        return {"arm": min(widest, _LEAST_NAME), "verdict": min(widest, 10)}.get(name, widest) + 1

    for least_needed in ("adjusted interval", "metric", "peak rate", "difference"):
        if sum(map(width, columns)) > console.width:
            del columns[least_needed]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        words = name in ("arm", "verdict")
        table.add_column(name, overflow="fold", justify="left" if words else "right", no_wrap=not words)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


# ---- The page ----


def to_html(record: Record, path: str | os.PathLike[str]) -> None:
    """Writes the report as one self-contained HTML file.

    It opens with the answer: whether the arm that did best in tuning beats the baseline, or why that could
    not be judged, and what to do next. Pictures, tables, limits and the settings of the study follow. The
    page respects the reader's preference for light or dark and is readable on a phone. The same comparison
    produces the same bytes.

    Args:
        record: The comparison.
        path: The file. Its folder is created if needed; at any moment the file is complete or absent.

    Raises:
        ValueError: If `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file to write, got the folder {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _page(record).encode())


def _finalize(value: Any) -> Any:
    """Makes unprintable characters visible, since names may hold any."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def _page(record: Record) -> str:
    details = record.details
    verdicts = judge_all(record)[0]
    found = answer(record)
    rivals = len(details.rivals)
    return _TEMPLATES.get_template("report.html").render(
        title=f"{details.task}: {found.question}",
        setting=(
            f"{rivals} arm{'s' * (rivals > 1)} against {details.baseline}, {_rates_used(record)}; "
            f"{details.steps:,} steps, {seeds_used(record)}"
        ),
        themes=[{"name": name, "colours": theme._asdict().items()} for name, theme in THEMES.items()],
        answer=found,
        others=[v for arm, v in verdicts.items() if arm != found.arm],
        pictures=_pictures(record, bool(verdicts)),
        verdict_table=verdict_table(record, verdicts),
        statistics_table=statistics_table(record, verdicts) if verdicts else None,
        tuning_table=tuning_table(record) if details.tuned else None,
        looks_table=looks_table(record),
        covers=_covers(record, bool(verdicts)),
        limits=_does_not_show(record, verdicts),
        run=_run(record).items(),
        command=shlex.join(details.command),
        trial_table=trial_table(record),
    )


def _rates_used(record: Record) -> str:
    details = record.details
    if details.tuned:
        return "each at its own best peak learning rate"
    rates = sorted(set(details.best_rates.values()))
    return f"at the rate{'s' * (len(rates) > 1)} {', '.join(map(plain, rates))}"


class _Picture(NamedTuple):
    title: str
    drawn: list[tuple[str, Markup]]  # by theme
    caption: str


def _pictures(record: Record, judged: bool) -> list[_Picture]:
    details = record.details
    metric, baseline, seeds = details.metric_name, details.baseline, fresh_seeds(record)
    margin = equivalence_margin(record)
    zone = f" Shaded: equivalent, within {margin:.2g} of the baseline." if np.isfinite(margin) else ""
    better = f"{record.direction.better} is better"
    captions = {
        "rates": (
            "Every arm has its own best peak rate",
            f"Final {metric} ({better}) on {tuning_seeds(record)}, mean with a band of one "
            "standard error. Ringed: the rate used for the verdict. Crosses: a trial diverged."
            + (dropped_out(record) if details.tuning == "race" else ""),
        ),
        "differences": (
            "Differences from the baseline",
            f"Final {metric} ({better}), arm minus {baseline}, for each of {seeds} fresh seeds (dots)"
            f"{', and the corrected interval of its mean (bars)' * judged}.{zone} "
            "Crosses at the edge: a trial diverged.",
        ),
        "curves": (
            "Training" + " at the best rates" * details.tuned,
            f"Validation {metric} ({better}) over {seeds} fresh seeds, mean with a band of one standard "
            f"error{'; dotted: the training loss' * (len(record.training_steps) > 0)}. "
            "Diverged trials are excluded.",
        ),
        "effective_rates": (
            "Effective learning rates",
            "The rate of the gradient step nearest to the optimizer's step, mean over the same trials with a "
            "band of one standard error; dotted: the scheduled rate. Below 0, the step went uphill on "
            f"that batch.{_own_change(record)}",
        ),
        "limits": (
            "Limits on the learning rate",
            "What error_controlled allowed at most, mean over the same trials; dotted: 2 / curvature along "
            f"the direction without momentum, as its probes measured it.{_limited(record)}",
        ),
    }
    pictures = []
    for picture in pictures_of(record):
        title, caption = captions[picture]
        drawn = [(theme, to_svg(record, picture, theme=theme, description=title)) for theme in THEMES]
        pictures.append(_Picture(title, drawn, caption))
    return pictures


def _limited(record: Record) -> str:
    """Says how often each limit was the learning rate, and how much of the promised decrease was missing."""
    said = []
    for arm in record.details.arms:
        if (found := limits(record, arm)) is not None:
            missing = "" if np.isnan(found.error) else f", with a median error of {found.error:.2g}"
            said.append(f" {arm} was limited in {found.limited:.0%} of the measured steps{missing}.")
    return "".join(said)


def _own_change(record: Record) -> str:
    """Says how the optimizer itself changed the baseline's rate, beyond the schedule."""
    baseline = record.details.baseline
    change = own_change(record, baseline)
    if np.isnan(change):
        return ""
    verb, times = ("rose", change) if change > 1 else ("fell", 1 / change)
    factor = f"{times:.2g}"
    did = "did not change" if factor == "1" else f"{verb} by a factor of {factor}"
    return (
        f" Beyond the schedule, the rate of {baseline} {did} from the first to the last quarter of the steps."
    )


# ---- Text ----


def _covers(record: Record, judged: bool) -> str:
    details = record.details
    rivals = len(details.rivals)
    several = f"{rivals} simultaneous comparisons and for " if rivals > 1 else ""
    allowance = f" Corrected intervals allow for {several}{again(record)}." if judged else ""
    varied, fixed, shared = "different initial parameters and different orders of the batches", "", ""
    if details.start_step is not None:
        varied, fixed = "different orders of the batches", "where the run was, "
    if details.tuned:
        shared = (
            " The seeds of the verdict were not used in tuning, but tuning and verdict share the validation "
            "set."
        )
    return (
        f"Variation between seeds: {varied}. Everything else is fixed: {fixed}these "
        f"{'tuned ' * details.tuned}rates, this split of the data, {details.steps:,} steps.{shared}"
        f"{allowance}"
    )


def _does_not_show(record: Record, verdicts: dict[str, Verdict]) -> list[str]:
    details, number = record.details, metric_format(record)
    limits = [
        "Whether the result holds for another task, model or length of training: this is one task, "
        + (f"{details.parameters:,} parameters and " if details.parameters else "")
        + f"{details.steps:,} steps.",
    ]
    limits += (
        [
            "Whether it holds for other data: the rates were chosen on the validation set that judges them.",
            "Anything about rates between those tried, or about settings that were not tuned.",
        ]
        if details.tuned
        else ["Anything about other rates or settings: nothing was tuned."]
    )
    if len(details.rivals) > 1:
        baseline = details.baseline
        limits.append(f"A ranking of the arms: each was compared only with {baseline}.")
    ends = [max(map(abs, v.interval)) for v in verdicts.values() if v.decision == "undecided"]
    if np.isfinite(ends).any():
        limits.append(
            f"That undecided arms equal {details.baseline}: differences of up to {number(np.nanmax(ends))} "
            "are compatible with the data."
        )
    if edges := [arm for arm in details.arms if details.on_edge.get(arm)]:
        limits.append(f"The best rate of {', '.join(edges)}: it is on the edge of the rates tried.")
    return limits


_MODES = {
    None: "one call of the training function per trial",
    "scan": "a whole trial in one compiled loop",
    "step": "one compiled step at a time",
    "vmap": "the trials of a chunk in parallel",
}


def _judged(record: Record) -> str:
    arms: dict[str, list[str]] = {}
    for arm in record.details.arms:
        arms.setdefault(judged_by(record, arm).by, []).append(arm)
    if len(arms) == 1:
        return f"every arm by {next(iter(arms))}"
    return "; ".join(f"{', '.join(names)} by {by}" for by, names in arms.items())


def _run(record: Record) -> dict[str, str]:
    details, table = record.details, record.table
    slow = dict.fromkeys(table["arm"][table["compilation"] == "per rate"])
    data = details.dataset
    at_a_time = f"; {details.chunk} trials at a time" if details.chunk else ""
    sent = f", sent through {details.executor}" if details.executor else ""
    rows = {
        "Baseline": details.baseline,
        "Metric": f"{details.metric_name}, {record.direction.better} is better",
        "Judged": _judged(record) if data or set(details.judged.values()) - {TRAINED} else "",
        "Training": f"{details.steps:,} steps"
        + (f", batches of {details.batch_size:,}" if details.batch_size else ""),
        "Start": "" if details.start_step is None else f"step {details.start_step:,} of a run under way",
        "Seeds": seeds_used(record) + (f"; {tuning_seeds(record)}" if details.tuned else ""),
        "Data": data and f"{data.train:,} training and {data.validation:,} validation samples",
        "Parameters": details.parameters and f"{details.parameters:,}",
        "Execution": f"{_MODES.get(details.mode, details.mode)}{at_a_time}{sent}",
        "Compiled": data and "once per arm" + (f"; once per rate: {', '.join(slow)}" if slow else ""),
        "Devices": ", ".join(f"{n} × {name}" for name, n in Counter(details.devices).items()),
        "Versions": ", ".join(f"{name} {version}" for name, version in details.versions.items()),
        "Time": f"{duration(details.seconds)}, of the last call",
    }
    return {name: text for name, text in rows.items() if text}

"""The tables of the report, each in a container of its own that scrolls sideways where it must."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adaptive_optax._drawing import plain
from adaptive_optax.study.findings import (
    MISSING,
    best_rate,
    decision,
    diverged_trials,
    final_metrics,
    interval,
    mean_and_error,
    metric_format,
    paired_differences,
    probability,
    signed,
    tuned_rates,
    written,
)

if TYPE_CHECKING:
    from adaptive_optax.study.result import Comparison
    from adaptive_optax.study.verdict import Verdict

GROWN = "\N{SUPERSCRIPT PLUS SIGN}"


class Cell(NamedTuple):
    """A cell with a class of the style sheet: "text", "strong", "weak", or several of them."""

    text: str
    kind: str


def verdict_table(comparison: Comparison, verdicts: dict[str, Verdict]) -> str:
    """Lays out the metric on the fresh seeds and, where there are verdicts, all that was judged."""
    info, number = comparison.info, metric_format(comparison)
    headings = ["arm", "decision", "best peak rate", f"{info['metric_name']}\nmean ± standard error"]
    headings += ["difference", "diverged"]
    judged = (
        "in per cent", "adjusted interval", "p\nadjusted", "p of equivalence\nadjusted",
        "95 % interval\nthis arm alone", "bootstrap 95 %\nthis arm alone", "seeds needed\nfor power 0.8",
        "best-so-far difference\n(favours not decaying)",
    )  # fmt: skip
    if verdicts:
        headings[-1:-1] = judged
    rows, any_lost = [], False
    for arm, metric in final_metrics(comparison).items():
        mean, error = mean_and_error(metric)
        lost, trials = diverged_trials(comparison, arm)
        any_lost |= lost > 0
        row: list[str | Cell] = [arm, best_rate(comparison, arm)]
        row.append(number(mean) + (f" ± {number(error)}" if np.isfinite(error) else ""))
        if v := verdicts.get(arm):
            firm = v.decision in ("better", "worse")
            row.insert(1, Cell(decision(v), "text strong" if firm else "text"))
            row += [
                signed(number, v.effect), written(100 * v.relative_effect, "+.1f", " %"),
                interval(number, v.interval), probability(v.p_value), probability(v.p_equivalence),
                interval(number, v.interval_95), interval(number, v.bootstrap),
                str(v.seeds_needed or "too many") if v.decision == "undecided" and not v.reason else MISSING,
                signed(number, v.best_effect),
            ]  # fmt: skip
        else:
            rival = arm != info["baseline"]
            row.insert(1, Cell("not judged" if rival else "baseline", "text weak"))
            difference = mean_and_error(paired_differences(comparison, arm))[0]
            row.append(signed(number, difference) if rival else "")
            row += [""] * len(judged) if verdicts else []
        row.insert(len(headings) - 1, f"{lost} of {trials}")
        rows.append(row)
    notes = f"Lower is better. Differences are from {info['baseline']}, paired by seed."
    if any_lost:
        notes += (
            " Means leave out runs that diverged; the differences count such a run with the larger of its "
            "metric at the start and the worst finite one."
        )
    if any(info["on_edge"].values()):
        notes += " *: on the edge of the rates tried, a better one may lie beyond."
    return "<h2>Verdicts</h2>\n" + _table("Verdicts", headings, rows, notes)


def tuning_table(comparison: Comparison) -> str:
    """Lays out the mean metric of every arm at every rate."""
    info, number = comparison.info, metric_format(comparison)
    tuned = {arm: tuned_rates(comparison, arm) for arm in info["arms"]}
    rates = sorted({rate for found in tuned.values() for rate in found.rates})
    rows = []
    for arm, found in tuned.items():
        cells = dict.fromkeys(rates, Cell("", ""))
        for i, rate in enumerate(found.rates):
            lost = f"{found.diverged[i]} of {found.seeds[i]} diverged" if found.diverged[i] else ""
            text = (lost or number(found.mean[i])) + GROWN * bool(found.grown[i])
            text += "*" * bool(found.best[i] and info["on_edge"].get(arm))
            cells[rate] = Cell(text, "strong" if found.best[i] else "weak" if lost else "")
        rows.append([arm, *cells.values()])
    notes = (
        f"Mean final {info['metric_name']} of {info['tuning_seeds']} tuning seeds; bold: the best, taken for "
        "the verdict."
    )
    if any(found.diverged.any() for found in tuned.values()):
        notes += " A rate at which a run diverged has no mean."
    if any(info["grown"].values()):
        notes += f" {GROWN}: added, as the best rate lay on the edge of the grid."
    if any(info["on_edge"].values()):
        notes += " *: still on the edge."
    return "<h2>Tuning</h2>\n" + _table("Tuning", ["arm", *map(plain, rates)], rows, notes)


def looks_table(comparison: Comparison) -> str:
    """Lays out when verdicts were drawn, and what each look costs."""
    looks = enumerate(comparison.info["looks"], start=1)
    rows = [[f"{k}", f"{seeds}", f"α / {2**k}"] for k, seeds in looks]
    headings = ["look", "fresh seeds", "probability of error"]
    notes = "A verdict may be drawn again with more seeds; look k may err with probability α times 2⁻ᵏ."
    return "<h2>Looks</h2>\n" + _table("Looks", headings, rows, notes)


def trial_table(comparison: Comparison) -> str:
    """Lays out every trial, folded away."""
    number = metric_format(comparison)

    def count(value: float) -> str:
        return written(value, ",.0f")

    columns = {
        "arm": ("arm", str), "phase": ("phase", str), "learning_rate": ("peak rate", plain),
        "seed": ("seed", str), "final_metric": ("final", number), "best_metric": ("best", number),
        "best_step": ("at step", count), "initial_metric": ("at the start", number),
        "steps_to_baseline": ("steps to the baseline's final", count),
        "diverged": ("diverged", lambda value: "yes" if value else ""), "compilation": ("compiled", str),
    }  # fmt: skip
    table = comparison.table
    cells = [[write(value) for value in table[name]] for name, (_, write) in columns.items()]
    headings = [heading for heading, _ in columns.values()]
    inner = _table("All runs", headings, zip(*cells, strict=True), kind=" trials")
    return f"<details>\n<summary>All {len(table):,} runs</summary>\n{inner}\n</details>"


def _table(
    label: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    notes: str = "",
    kind: str = "",
) -> str:
    """Lays out a table whose rows begin with a name; what follows a newline in a heading is small."""
    head = "".join(
        f'<th scope="col"{_class("text" if heading == "decision" else "")}>'
        + escape(heading).replace("\n", "<small>")
        + ("</small></th>" if "\n" in heading else "</th>")
        for heading in headings
    )
    body = "".join(f"<tr>{_head(first)}{''.join(map(_data, rest))}</tr>\n" for first, *rest in rows)
    note = f'\n<p class="note">{escape(notes)}</p>' if notes else ""
    return (
        f'<div class="scroll{kind}" role="region" aria-label="{escape(label)}" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>{note}"
    )


def _head(name: str | Cell) -> str:
    breakable = escape(str(name)).replace(":", ":<wbr>")
    return f'<th scope="row"><span>{breakable}</span></th>'


def _data(cell: str | Cell) -> str:
    text, kind = cell if isinstance(cell, Cell) else (cell, "")
    return f"<td{_class(kind)}>{escape(text)}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""

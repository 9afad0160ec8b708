"""The tables of the report as rows of text, which the templates lay out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from adaptive_optax._core.drawing import plain
from adaptive_optax.study.record import Record
from adaptive_optax.study.report.findings import (
    MISSING,
    best_rate,
    decision,
    diverged_trials,
    final_metrics,
    interval,
    judge_all,
    metric_format,
    own_rates,
    paired_differences,
    probability,
    signed,
    tuned_rates,
    tuning_seeds,
    written,
)
from adaptive_optax.study.statistics.paired import mean_and_error
from adaptive_optax.study.statistics.sequential import Sequential
from adaptive_optax.study.statistics.verdict import Verdict

GROWN = "\N{SUPERSCRIPT PLUS SIGN}"


class Heading(NamedTuple):
    """The heading of a column, with a smaller second line."""

    text: str
    small: str = ""
    kind: str = ""


class Cell(NamedTuple):
    """A cell with classes of the style sheet: any of "text", "strong" and "weak"."""

    text: str
    kind: str = ""


class Table(NamedTuple):
    """A table in which every row begins with a name. A "wide" one becomes cards on a narrow screen."""

    label: str
    headings: list[Heading]
    rows: list[list[Cell]]
    notes: str = ""
    kind: str = "wide"


class TunedArm(NamedTuple):
    """An arm and what tuning found at each rate."""

    name: str
    rates: list[TunedRate]


class TunedRate(NamedTuple):
    """What tuning found at one rate."""

    rate: str
    text: str
    kind: str


class TuningTable(NamedTuple):
    """What tuning found for all arms."""

    arms: list[TunedArm]
    notes: str


def verdict_table(record: Record, verdicts: dict[str, Verdict]) -> Table:
    """Lays out the metric on the fresh seeds and the decisions."""
    details, number = record.details, metric_format(record)
    headings = [
        Heading("arm"), Heading("decision", kind="text"), Heading("best " * details.tuned + "peak rate"),
        Heading(details.metric_name, "mean ± standard error"), Heading("difference"),
    ]  # fmt: skip
    headings += [Heading("in per cent"), Heading("interval")] if verdicts else []
    headings += [Heading("diverged")]
    rows, any_lost = [], False
    for arm, metric in final_metrics(record).items():
        mean, error = mean_and_error(metric)
        lost, trials = diverged_trials(record, arm)
        any_lost |= lost > 0
        level = number(mean) + (f" ± {number(error)}" if np.isfinite(error) else "")
        row = [best_rate(record, arm), level]
        if v := verdicts.get(arm):
            firm = v.decision in ("better", "worse")
            word = Cell(decision(v), "text strong" if firm else "text")
            row += [signed(number, v.effect), written(100 * v.relative_effect, "+.1f", " %")]
            row += [interval(number, v.interval)]
        else:
            rival = arm != details.baseline
            word = Cell("not judged" if rival else "baseline", "text weak")
            difference = mean_and_error(paired_differences(record, arm))[0]
            row += [signed(number, difference) if rival else ""] + ["", ""] * bool(verdicts)
        rows.append([Cell(arm), word, *map(Cell, row), Cell(f"{lost} of {trials}")])
    better = record.direction.better.capitalize()
    notes = f"{better} is better. Differences are from {details.baseline}, paired by seed."
    if details.sequential is not None:
        notes += " An arm got no more seeds once it was decided (last column: of how many trials)."
    if any_lost:
        notes += (
            " Means exclude diverged trials. If one of the two trials of a seed diverged, the difference "
            "counts it with the worse of its initial metric and the worst metric seen; if both diverged, the "
            "seed is excluded."
        )
    if any(details.on_edge.values()):
        notes += " *: on the edge of the rates tried; a better rate may lie beyond."
    return Table("Verdicts", headings, rows, notes)


def statistics_table(record: Record, verdicts: dict[str, Verdict]) -> Table:
    """Lays out the statistics of every verdict."""
    number = metric_format(record)
    headings = [
        Heading("arm"), Heading("p-value", "of a difference, corrected"),
        Heading("p-value of equivalence", "corrected"), Heading("95 % interval", "this arm alone"),
        Heading("bootstrap 95 %", "this arm alone"), Heading("seeds needed", "for a chance of 80 %"),
        Heading("difference of the best", "anywhere in the run; flatters noisy arms"),
    ]  # fmt: skip
    rows = []
    for arm, v in verdicts.items():
        open_ended = v.decision == "undecided" and not v.reason
        cells = [
            probability(v.p_value), probability(v.p_equivalence), interval(number, v.interval_95),
            interval(number, v.bootstrap), str(v.seeds_needed or "too many") if open_ended else MISSING,
            signed(number, v.best_effect),
        ]  # fmt: skip
        rows.append([Cell(arm), *map(Cell, cells)])
    notes = (
        f"Corrected: for comparing several arms (Holm's method) and for {again(record)}. "
        "Seeds needed: for a decision either way, if the true effect equals the observed one."
    )
    return Table("The statistics behind the verdicts", headings, rows, notes)


def tuning_table(record: Record) -> TuningTable:
    """Lays out the mean metric of every arm at every rate."""
    details, number = record.details, metric_format(record)
    tuned, raced = {arm: tuned_rates(record, arm) for arm in details.arms}, details.tuning == "race"
    arms = []
    for arm, found in tuned.items():
        cells = []
        for i, rate in enumerate(found.rates):
            lost = f"{found.diverged[i]} of {found.seeds[i]} diverged" if found.diverged[i] else ""
            text = lost or number(found.mean[i])
            if raced and found.seeds[i] < details.tuning_seeds and not lost:
                text += f" ({found.seeds[i]} seed{'s' * bool(found.seeds[i] > 1)})"
            text += GROWN * bool(found.grown[i])
            text += "*" * bool(found.best[i] and details.on_edge.get(arm))
            kind = "strong" if found.best[i] else "weak" if lost else ""
            cells.append(TunedRate(plain(rate), text, kind))
        arms.append(TunedArm(arm, cells))
    notes = (
        f"Peak rates, and the mean final {details.metric_name} of {tuning_seeds(record)}; bold: "
        "the best, used for the verdict."
    )
    if raced:
        notes += (
            " The rates raced: one with little chance of winning dropped out, after the number of seeds in "
            "parentheses; the best one stopped when no other was left."
        )
    if any(found.diverged.any() for found in tuned.values()):
        notes += " A rate at which a trial diverged has no mean."
    for arm, rates in own_rates(record).items():
        notes += (
            f" {arm} was tuned over its own rates, {rates}, since those of other arms mean nothing to it."
        )
    if any(details.grown.values()):
        notes += f" {GROWN}: added because the best rate was on the edge of the grid."
    if any(details.on_edge.values()):
        notes += " *: still on the edge."
    return TuningTable(arms, notes)


def looks_table(record: Record) -> Table:
    """Lays out the looks so far, and the error rate of each."""
    if record.details.sequential is not None:
        return _planned_looks(record, record.details.sequential)
    looks = enumerate(record.details.looks, start=1)
    rows = [[Cell(f"{k}"), Cell(f"{seeds}"), Cell(f"{5 / 2**k:.3g} %")] for k, seeds in looks]
    headings = [Heading("verdict"), Heading("fresh seeds"), Heading("error rate")]
    notes = (
        "A verdict may be drawn again after adding seeds. Each has half the error rate of the previous one, "
        "so that fewer than 5 % of such studies contain an error."
    )
    return Table("Verdicts drawn so far", headings, rows, notes, kind="")


def _planned_looks(record: Record, plan: Sequential) -> Table:
    verdicts = judge_all(record)[0].values()
    rows = []
    for k, (seeds, spent) in enumerate(zip(record.details.looks, plan.spent, strict=False), start=1):
        decided = sum(v.seeds == seeds and v.decision != "undecided" for v in verdicts)
        rows.append(
            [
                Cell(f"{k} of {len(plan.looks)}"),
                Cell(f"{seeds}"),
                Cell(f"{5 * spent:.2g} %"),
                Cell(f"{decided}"),
            ]
        )
    headings = [
        Heading("look"),
        Heading("fresh seeds"),
        Heading("error rate", "so far"),
        Heading("arms decided"),
    ]
    notes = (
        f"The plan: undecided arms get more seeds, up to {plan.most}. All its looks together err in at most "
        "5 % of such studies."
    )
    return Table("Verdicts drawn so far", headings, rows, notes, kind="")


def again(record: Record) -> str:
    """What else corrected p-values and intervals allow for."""
    plan = record.details.sequential
    if plan is None:
        return "judging again after adding seeds"
    looks = len(plan.looks)
    return f"judging at {looks} looks" if looks > 1 else "judging once"


def trial_table(record: Record) -> Table:
    """Lays out every trial, without the columns that no trial has anything for."""
    number = metric_format(record)

    def count(value: float) -> str:
        return written(value, ",.0f")

    def phase(name: str) -> str:
        return name if record.details.tuned or name == "verdict" else "not judged"

    columns = {
        "arm": ("arm", str), "phase": ("phase", phase), "learning_rate": ("peak rate", plain),
        "seed": ("seed", str), "final_metric": ("final", number), "best_metric": ("best", number),
        "best_step": ("at step", count), "initial_metric": ("at the start", number),
        "steps_to_baseline": ("steps to the baseline's final", count),
        "diverged": ("diverged", lambda value: "yes" if value else ""), "compilation": ("compiled", str),
        "error": ("raised", lambda text: text.strip().rpartition("\n")[2]),
    }  # fmt: skip
    table = record.table
    cells = {name: [write(value) for value in table[name]] for name, (_, write) in columns.items()}
    cells = {name: column for name, column in cells.items() if {*column} - {"", MISSING}}
    headings = [Heading(columns[name][0]) for name in cells]
    return Table("All trials", headings, [list(map(Cell, row)) for row in zip(*cells.values(), strict=True)])

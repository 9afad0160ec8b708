"""The answer of a comparison: yes, no or not decided; what weakens it, what to do next, and what to use."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptive_optax.study.judged import TRAINED
from adaptive_optax.study.recommendation import Recommendation, quoted, recommend
from adaptive_optax.study.record import Record
from adaptive_optax.study.report.findings import equivalence_margin, judge_all, judged_by, metric_format
from adaptive_optax.study.statistics.verdict import Verdict

YES, NO, UNDECIDED = "Yes", "No", "Not decided"


class Answer(NamedTuple):
    """The answer to the question whether the arm that did best in tuning beats the baseline.

    Of a run under way the question is whether any arm does.

    Attributes:
        question: The question.
        arm: The arm whose verdict the sentence is; "" if it is none's.
        answer: "Yes", "No", "Not decided" or "Not judged".
        sentence: The verdict behind the answer, or why there is none.
        chosen: How the arm was chosen; "" if nothing was judged.
        warnings: What weakens the answer.
        next_step: What to do to learn more; "" if nothing is open, or the sentence says it.
        code: The next step as Python statements or as a command.
        recommendation: What to use; None if nothing can be recommended.
        why_not: Why nothing can be recommended; "" if something can.
    """

    question: str
    arm: str
    answer: str
    sentence: str
    chosen: str
    warnings: list[str]
    next_step: str
    code: list[str]
    recommendation: Recommendation | None
    why_not: str


def answer(record: Record) -> Answer:
    """Answers whether the arm that did best in tuning, or any if nothing was tuned, beats the baseline."""
    try:
        recommendation, why_not = recommend(record), ""
    except ValueError as error:
        recommendation, why_not = None, str(error)
    verdicts, headline, reason = judge_all(record)
    details = record.details
    baseline, rivals = details.baseline, len(details.rivals)
    of_any = f"does another arm beat {baseline}?"
    if details.start_step is not None:
        of_any = f"from step {details.start_step:,}, {of_any}"
    if headline is None:
        next_step, code = _suggest_margin(record) if details.looks else ("", [])
        return Answer(of_any, "", "Not judged", reason, "", [], next_step, code, recommendation, why_not)
    if details.goes_on:
        short, arm, sentence = _of_several(verdicts, record)
        next_step, code = _next_step(record, verdicts[arm]) if short == UNDECIDED else ("", [])
        warnings = list(filter(None, [_coarse_metric(record, verdicts[arm])])) if arm else []
        return Answer(of_any, arm, short, sentence, "", warnings, next_step, code, recommendation, why_not)
    chosen = "An arm is one way to train: an optimizer with its learning-rate schedule."
    if rivals > 1:
        chosen = f"Of the {rivals} arms besides {baseline}, {headline.arm} did best in tuning. {chosen}"
    rival, base = (judged_by(record, arm).by for arm in (headline.arm, baseline))
    if {rival, base} != {TRAINED.by}:
        chosen += f" {headline.arm} was judged by {rival}; {baseline} by {base}."
    short = {"better": YES, "worse": NO, "equivalent": NO, "undecided": UNDECIDED}
    next_step, code = _next_step(record, headline)
    return Answer(
        f"does {headline.arm} beat {baseline}?",
        headline.arm,
        short[headline.decision],
        headline.sentence,
        chosen,
        list(filter(None, [_coarse_metric(record, headline)])),
        next_step,
        code,
        recommendation,
        why_not,
    )


def _of_several(verdicts: Mapping[str, Verdict], record: Record) -> tuple[str, str, str]:
    """Answers whether any of several arms is better than the baseline.

    Returns:
        The answer; the arm that speaks for it, "" if several do; and a sentence.
    """
    if better := [verdict for verdict in verdicts.values() if verdict.decision == "better"]:
        best = min(better, key=record.cost_of)
        return YES, best.arm, best.sentence
    if all(verdict.decision == "undecided" for verdict in verdicts.values()):
        best = min(verdicts.values(), key=record.cost_of)
        return UNDECIDED, best.arm, best.sentence
    if len(verdicts) == 1:
        only = next(iter(verdicts.values()))
        return NO, only.arm, only.sentence
    found = {
        decision: [arm for arm, verdict in verdicts.items() if verdict.decision == decision]
        for decision in ("worse", "equivalent", "undecided")
    }
    listed = "; ".join(f"{decision}: {', '.join(arms)}" for decision, arms in found.items() if arms)
    return NO, "", f"no other arm is better ({listed})."


# ---- What to do next ----


def _next_step(record: Record, verdict: Verdict) -> tuple[str, list[str]]:
    v = verdict
    if v.decision != "undecided":
        return "", []
    if v.reason == "untrained":
        opposite = not record.direction.maximize
        return (
            "set whether higher or lower metrics are better, or try other learning rates.",
            _repeated(
                record,
                f"study.{'Task' if record.details.dataset else 'compare'}(..., maximize={opposite})",
                "--maximize" if opposite else "--minimize",
            ),
        )
    if v.reason == "unknown direction":
        return (
            "say which metrics are better. If lower ones are, report the metric before training, "
            "run.report(0, metric), or pass maximize=False; if higher ones are:",
            _repeated(record, "study.compare(..., maximize=True)", "--maximize"),
        )
    if v.reason == "undefined metric":
        return "evaluate the metric on the initial parameters, and fix what is not finite.", []
    if v.reason == "deterministic task":
        return (
            "more seeds cannot decide this, since nothing in the task is random. Compare on several splits "
            "of the data, or compare the two numbers directly.",
            [],
        )
    if v.reason or math.isnan(v.effect):
        lowest = min(min(rates) for rates in record.details.grid.values())
        rates = [f"{lowest / ratio:.2g}" for ratio in (100, 30, 10, 3)]
        return (
            "compare at lower learning rates, where trials do not diverge.",
            _repeated(
                record,
                f"study.compare(..., learning_rates=[{', '.join(rates)}])",
                "--rates",
                ",".join(rates),
            ),
        )
    if v.seeds_needed is None:
        largest = metric_format(record)(max(map(abs, v.interval)))
        _, code = _suggest_margin(record)
        return (
            f"accept what is known: a difference of more than {largest} is ruled out. If a difference of "
            "that size does not matter, a margin above it makes the arms equivalent.",
            code,
        )
    return _more_seeds(record, v.seeds_needed)


def _more_seeds(record: Record, seeds: int) -> tuple[str, list[str]]:
    out, plan = record.details.out, record.details.sequential
    if plan is not None and not record.unfinished:
        return _another_plan(record, plan.first, max(seeds, plan.most))
    folder = "..." if out is None else quoted(out)
    call, option = ("command", "--out") if _is_command(record) else ("call", "out=")
    more, asked, option_value = " with more seeds", str(seeds), str(seeds)
    if plan is not None:  # it was interrupted, or its margin has changed
        more, asked = f"; it goes on, up to {plan.most} seeds", f"study.Sequential({plan.first}, {plan.most})"
        option_value = f"{plan.first}..{plan.most}"
    advice = f"repeat the {call} with the same folder{more}; only new trials are trained."
    if out is None:
        later = f"With a folder as {option}, later {call}s train only new trials."
        advice = f"repeat the {call}{more}. {later}"
    start = "" if record.details.start_step is None else "start=..., "
    again = f"study.compare(..., {start}seeds={asked}, out={folder})"
    return advice, _repeated(record, again, "--seeds", option_value)


def _another_plan(record: Record, first: int, most: int) -> tuple[str, list[str]]:
    advice = (
        "a plan of seeds cannot be extended after its last look. Another study, with another base seed and "
        "folder, may decide; or accept what is known."
    )
    if not _is_command(record):
        return advice, [
            f"study.compare(..., seeds=study.Sequential({first}, {most}), base_seed=..., out=...)"
        ]
    words = record.details.command
    for option in ("--seeds", "--base-seed", "--out"):
        words = _without(words, option)
    new = ["--seeds", f"{first}..{most}", "--base-seed", "BASE_SEED", "--out", "FOLDER"]
    return advice, [shlex.join([*words, *new])]


def _suggest_margin(record: Record) -> tuple[str, list[str]]:
    code = _repeated(record, "comparison.with_margin(...).verdict()", "--margin", "MARGIN")
    if not _is_command(record):
        return "", code
    trains = (
        "without --out nothing was saved, so everything is trained again"
        if record.details.out is None
        else "nothing is trained again"
        if record.details.sequential is None
        else "only arms that are then undecided are trained on more seeds"
    )
    return (
        "repeat the command with --margin, the smallest difference that matters, in the metric's units; "
        f"{trains}.",
        code,
    )


# ---- The call again ----


def _is_command(record: Record) -> bool:
    command = record.details.command
    return bool(command) and Path(command[0]).name == "adaptive-optax"


def _repeated(record: Record, call: str, option: str, *value: str) -> list[str]:
    """Returns a call in Python, or the command with one more option if a command made the comparison."""
    if not _is_command(record):
        return [call]
    return [shlex.join([*_without(record.details.command, option), option, *value])]


_FLAGS = ("--maximize", "--minimize")


def _without(command: Sequence[str], option: str) -> list[str]:
    if option in _FLAGS:
        return [word for word in command if word not in _FLAGS]
    names = ("--rates", "--learning-rates") if option == "--rates" else (option,)
    kept, skip = [], False
    for word in command:
        if not skip and word not in names and not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
        skip = word in names
    return kept


# ---- What weakens the answer ----


def _coarse_metric(record: Record, verdict: Verdict) -> str:
    """Warns if one validation sample weighs as much as the difference or the margin."""
    step, data = metric_step(record), record.details.dataset
    if data is None or math.isnan(step):
        return ""
    margin, effect = equivalence_margin(record), abs(verdict.effect)
    heavier = [f"the margin of equivalence ({margin:.3g})"] * (step >= 0.999 * margin)
    if 0 < effect <= 1.001 * step:
        heavier.insert(0, f"the difference found ({effect:.3g})")
    if not heavier:
        return ""
    return (
        f"One of the {data.validation:,} validation samples changes the metric by "
        f"{step:.3g}, at least as much as {' and '.join(heavier)}. A larger validation set, "
        "or a metric that does not count samples, would resolve more."
    )


def metric_step(record: Record) -> float:
    """The weight of one validation sample if the metric counts samples, as an accuracy does; else NaN."""
    if record.details.dataset is None:
        return math.nan
    samples = record.details.dataset.validation
    columns = record.table[["initial_metric", "final_metric", "best_metric"]].to_numpy(float)
    seen = np.unique(columns[np.isfinite(columns)])
    for whole in (1.0, 100.0):  # a share, or per cent
        counts = seen / whole * samples
        rounding = max(1e-3, 1e-6 * samples)  # the metric is float32
        if len(seen) > 1 and rounding < 0.1 and np.ptp(counts) > 0.5 and np.abs(seen).max() <= whole:
            if (np.abs(counts - counts.round()) <= rounding).all():
                return whole / samples
    return math.nan

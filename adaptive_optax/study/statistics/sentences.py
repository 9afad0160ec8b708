"""Puts verdicts into sentences."""

from __future__ import annotations

import math

import numpy as np

from adaptive_optax._core.names import visible
from adaptive_optax.study.direction import Direction
from adaptive_optax.study.statistics.paired import MOST_SEEDS, mean_and_error
from adaptive_optax.study.statistics.verdict import Verdict

LATER = "seeds that may be added later"  # what the first look's interval is adjusted for


_LOOK = ". This was look "  # of a plan


def verdict_sentence(
    verdict: Verdict,
    relative_margin: float,
    alpha: float,
    adjustments: list[str],
    place: tuple[int, int, int] | None = None,
) -> str:
    """Puts a verdict into a sentence.

    Args:
        verdict: The verdict, without its sentence.
        relative_margin: The margin of equivalence as a share of the baseline's metric, if no other is set.
        alpha: The error rate.
        adjustments: What the interval is adjusted for.
        place: Number of the look, number of looks and most seeds, if there is a plan.
    """
    v, (low, high) = verdict, verdict.interval
    arm, baseline, seeds = visible(v.arm), visible(v.baseline), f"{v.seeds} seeds"
    undecided = f"{arm} against {baseline} is undecided"
    if v.reason == "nothing measured":
        return f"{undecided}: {_lost(v)} diverged, so nothing was measured; try lower learning rates."
    if v.reason == "too few measured":
        return (
            f"{undecided}: only {v.measured} of {seeds} can be compared, since both diverged at the others; "
            "try lower learning rates."
        )
    if math.isnan(v.effect):  # no seed has both measured
        found = f"{arm} is {v.decision} than {baseline}" if v.decision != "undecided" else undecided
        none = [name for name, count in zip((arm, baseline), v.diverged, strict=True) if not count]
        return f"{found}: {_lost(v)}{''.join(f' and none of {name}' for name in none)} diverged."

    decimals = _decimals((high - low) / 2 if high > low else v.effect / 10)
    percent = "" if math.isnan(v.relative_effect) else f" ({_percent(abs(v.relative_effect))})"
    found = f"final metric {_change(v.effect, decimals)}{percent}"
    near, far = sorted(v.interval, key=abs) if low * high > 0 else (low, high)
    start = _number(near, decimals) if low * high > 0 else _change(near, decimals)
    level, ends = f"{100 * (1 - alpha):g} % interval", f"{start} to {_change(far, decimals)}"
    if adjustments:
        now = [each for each in adjustments if each != LATER]
        notes = [f"adjusted for {' and '.join(now)}"] * bool(now)
        notes += ["wider, so that seeds may be added later"] * (LATER in adjustments)
        ends += f" ({'; '.join(notes)})"
    if v.reason:
        text = f"{undecided}: {found} at each of {seeds}, without any "
        text += f"variation ({v.reason}), so there is no interval over seeds"
    elif v.decision == "undecided":
        needed = f"about {v.seeds_needed}" if v.seeds_needed else f"not even {MOST_SEEDS}"
        text = f"{undecided}: {found}, but the {level} is {ends}, {seeds}; "
        text += f"{needed} seeds would settle it, if the true effect equals the observed one"
    elif v.decision == "equivalent":
        zone = f"{100 * relative_margin:g} %" if v.margin is None else f"{v.margin:g}"
        same = "the same at all" if v.measured == v.seeds else f"the same at {v.measured} of"
        seen = f"{found}, {level} {ends}, {seeds}" if high > low else f"final metric {same} {seeds}"
        text = f"{arm} is equivalent to {baseline}, within {zone}: {seen}"
    else:
        text = f"{arm} is {v.decision} than {baseline}: {found}, {level} {ends}, {seeds}"
    if lost := _lost(v):
        text += f"; {lost} diverged, counted as the worst metric"
        if dropped := v.seeds - v.measured:
            text += f", excluding {dropped} seed{'s' * (dropped > 1)} at which both did"
    if place is None:
        return f"{text}."
    look, looks, most = place
    return f"{text}{_LOOK}{look} of {looks}; the last one has {most} seeds."


def without_look(sentence: str) -> str:
    """Leaves out which look of a plan a verdict is of."""
    text, look, _ = sentence.rpartition(_LOOK)
    return f"{text}." if look else sentence


def untrained_sentence(
    arm: str,
    baseline: str,
    untrained: str,
    rate: float,
    initial: np.ndarray,
    final: np.ndarray,
    direction: Direction,
) -> str:
    """Says why there is no verdict on an arm: `untrained`, the arm or its baseline, did not improve."""
    before, after = mean_and_error(initial)[0], mean_and_error(final)[0]
    at_seeds, other = "", "lower" if direction.maximize else "higher"
    if direction.cost(after) < direction.cost(before):
        count = np.sum(direction.cost(final) < direction.cost(initial))
        at_seeds = f" at only {count} of {len(final)} seeds, which may be chance"
    return (
        f"{visible(arm)} against {visible(baseline)} is undecided: the metric of {visible(untrained)} is "
        f"{'better' if at_seeds else 'no better'} after training (mean {after:.4g}) than before "
        f"({before:.4g}){at_seeds}, and its best learning rate, {rate:g}, is on the edge of those tried. "
        f"If {other} metrics are better, set maximize={not direction.maximize}; if not, try other "
        "learning rates."
    )


def direction_sentence(arm: str, baseline: str, at_edge: str, rate: float) -> str:
    """Says why there is no verdict on an arm: nothing shows which metrics are better."""
    return (
        f"{visible(arm)} against {visible(baseline)} is undecided: the best learning rate of "
        f"{visible(at_edge)}, {rate:g}, is on the edge of those tried, as if the metric had the wrong "
        "direction, and no metric before training shows which is right. Pass maximize=True if higher metrics "
        "are better; if not, report the metric before training, run.report(0, metric), or pass "
        "maximize=False."
    )


def undefined_sentence(arm: str, baseline: str) -> str:
    """Says why there is no verdict if the metric was never finite."""
    return (
        f"{visible(arm)} against {visible(baseline)} is undecided: the metric is not finite in any trial, "
        "even before training, so learning rates are not the cause; check the metric and init."
    )


def _lost(verdict: Verdict) -> str:
    counts = zip(verdict.diverged, (verdict.arm, verdict.baseline), strict=True)
    return " and ".join(
        f"{count} of {verdict.seeds} trials of {visible(arm)}" for count, arm in counts if count
    )


def _decimals(error: float) -> int:
    """Decimals that show two digits of `error`."""
    return max(0, 1 - math.floor(math.log10(abs(error)))) if error else 0


def _number(value: float, decimals: int) -> str:
    size = abs(value)
    if decimals > 6 or size >= 1e6:
        return f"{size:.2e}"
    rounded = f"{size:.{decimals}f}"
    return rounded if float(rounded) or not size else f"{size:.1g}"  # an end near 0 must not be printed as 0


def _change(value: float, decimals: int) -> str:
    return f"{_number(value, decimals)} {'lower' if value < 0 else 'higher'}" if value else "unchanged"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 1 else f"{100 * share:.{3 if share >= 0.1 else 2}g} %"

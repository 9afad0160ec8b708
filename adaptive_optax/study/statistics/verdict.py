"""The verdict on one arm."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on one arm. Differences are arm minus baseline, in the metric's units.

    Attributes:
        arm: The judged arm.
        baseline: The arm that it is compared with.
        decision: "better", "worse", "equivalent" or "undecided".
        effect: The mean difference of the final metric, paired by seed. NaN if no seed has both measured.
        relative_effect: `effect` / the baseline's mean metric; NaN if that mean is not positive.
        interval: The interval to quote: paired t, at the level to which `p_value` is adjusted, so that it
            excludes 0 exactly when `p_value` < alpha. NaNs if `reason` is set or `effect` is NaN.
        interval_95: The plain 95 % paired-t interval, for this arm alone. NaNs as for `interval`.
        bootstrap: The 95 % bootstrap interval, for this arm alone; None if none was requested.
        p_value: The p-value of the two-sided paired t-test, divided by the look's share of alpha (see
            `judge`) and Holm-adjusted over arms, at most 1. NaN if `reason` is set.
        p_equivalence: The larger p-value of the two one-sided tests, adjusted in the same way. NaN if
            `reason` is set.
        margin: The absolute margin of equivalence; None if it is relative to the baseline.
        seeds: The number of pairs.
        measured: The number of pairs that count: those in which at most one trial diverged.
        seeds_needed: If undecided, the total number of seeds that would decide, either way, with power 0.8 if
            the true effect equals the observed one; in a sequential study, at the level of its last look,
            which may have fewer. None if decided, for a deterministic task, and above
            10 000.
        best_effect: The mean difference of the best metric so far, which favours not decaying. NaN if the
            table lacks best_metric.
        diverged: The numbers of diverged trials of arm and baseline.
        reason: Why nothing was tested: "deterministic task"; "nothing measured" or "too few measured" if
            trials diverged; "untrained", "unknown direction" or "undefined metric" (see
            `Comparison.verdicts`). Otherwise "".
        sentence: The verdict in one plain sentence.
    """

    arm: str
    baseline: str
    decision: str
    effect: float
    relative_effect: float
    interval: tuple[float, float]
    interval_95: tuple[float, float]
    bootstrap: tuple[float, float] | None
    p_value: float
    p_equivalence: float
    margin: float | None
    seeds: int
    measured: int
    seeds_needed: int | None
    best_effect: float
    diverged: tuple[int, int]
    reason: str
    sentence: str


def without_decision(verdict: Verdict, reason: str, sentence: str) -> Verdict:
    """Withdraws a verdict's decision, for a reason that the statistics alone do not show."""
    nothing = math.nan, math.nan
    return dataclasses.replace(
        verdict,
        decision="undecided",
        interval=nothing,
        interval_95=nothing,
        bootstrap=None if verdict.bootstrap is None else nothing,
        p_value=math.nan,
        p_equivalence=math.nan,
        seeds_needed=None,
        reason=reason,
        sentence=sentence,
    )

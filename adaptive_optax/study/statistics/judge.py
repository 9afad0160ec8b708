"""Judging: paired statistics over seeds that decide better, worse, equivalent or undecided.

Seeds are paired: a seed has the same initial parameters and the same batches in every arm, so only the
differences between an arm and the baseline are judged. The paired t-test asks for a difference; two
one-sided t-tests ask for equivalence (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). Both are
corrected for several arms (Holm 1979, Scand. J. Statist. 6:65), and for judging again after adding seeds or
by a plan (`Sequential`).
Failing to find a difference never counts as "equivalent": it is "undecided". The value substituted for a
diverged trial is not a measurement: it never makes arms equivalent, and a seed at which both diverged says
nothing about them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from adaptive_optax._core.checks import check_bool, check_choice, check_integer, check_scalar
from adaptive_optax.study.direction import Direction
from adaptive_optax.study.statistics.outcomes import Trials, numbers, rows_to_judge, trials_by_arm
from adaptive_optax.study.statistics.paired import (
    Paired,
    bootstrap,
    exponents,
    holm,
    paired_t,
    scaled,
    seeds_needed,
    unscaled,
)
from adaptive_optax.study.statistics.sentences import LATER, verdict_sentence
from adaptive_optax.study.statistics.sequential import Sequential
from adaptive_optax.study.statistics.verdict import Verdict


def judge(
    table: pd.DataFrame,
    *,
    baseline: str,
    margin: float | None = None,
    maximize: bool = False,
    relative_margin: float = 0.01,
    alpha: float = 0.05,
    look: int | None = None,
    sequential: Sequential | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Verdict]:
    """Judges every arm in a table of trials against the baseline, without training.

    Let a and b be the final metrics of arm and baseline, paired by seed, and r = `relative_margin`:

        difference     mean(a - b) = 0, two-sided paired t-test
        equivalence    mean(a - (1 + r) b) < 0 and mean(a - (1 - r) b) > 0, one-sided paired t-tests;
                       with an absolute margin mean(a - b) < margin and mean(a - b) > -margin
        several arms   Holm's step-down, separately over the differences and over the equivalences
        look k         spends alpha 2**-k: p-values are multiplied by 2**k; all looks together spend < alpha
        sequential     p-values are divided by look k's level as a share of alpha / arms; all looks together
                       spend alpha (`Sequential`)

    The decision is "equivalent" if p_equivalence < alpha (a difference may exist, but is too small to
    matter); else "better" or "worse" if p_value < alpha; else "undecided". If all differences are exactly 0,
    the arm is equivalent. If they are all equal otherwise, up to rounding, nothing can be tested: undecided,
    "deterministic task".

    A seed at which both arm and baseline diverged says nothing about them and is excluded. If fewer than two
    seeds remain, the arm is undecided, "nothing measured" or "too few measured". If only one of the two
    diverged, its trial counts with the worse of its own initial metric and the worst finite final metric of
    the judged trials; such a seed never makes an arm equivalent. If no seed has both measured, the arm is
    "worse" (or "better") if all of its trials (or the baseline's) diverged and none of the other's; otherwise
    the sign test decides. A trial has diverged if it is marked so, or if its final metric is NaN or, in a
    table without a column diverged, infinite.

    With `sequential` the plan's looks are replayed on the baseline's seeds in ascending order. An arm keeps
    the verdict of the look that decided it: its later seeds, if there are any, are not judged, but its
    p-value counts on in Holm's step-down. Nor are seeds judged that come after the last complete look.

    Args:
        table: One row per trial: arm, seed, final_metric; optionally initial_metric, best_metric, diverged
            and phase (then only rows of phase "verdict" are judged). All arms have the same seeds, at least
            2; with `sequential`, an arm needs none after the look that decided it, and one that has none of
            a look's new seeds keeps its verdict of the look before.
        baseline: The arm that the others are compared with.
        margin: Differences smaller than this do not matter; in the metric's units, (0, inf). None: relative.
        maximize: Whether higher metrics are better, as for an accuracy.
        relative_margin: The margin as a fraction of the baseline's metric, in (0, 1).
        alpha: Error rate over all arms and looks, in (0, 1).
        look: 1 for the first judgement, 2 after adding seeds, and so on up to 100. None: the only look.
        sequential: The plan by which the number of seeds was chosen; not together with `look`.
        resamples: Bootstrap resamples; 0 for no bootstrap interval.
        seed: Seed of the bootstrap, the same for every arm.

    Returns:
        A verdict for each arm except the baseline, in the table's order.

    Raises:
        ValueError: If an argument is out of range; if the table does not have exactly one trial per arm and
            seed, or too few for the first look; or if the margin is relative and a baseline metric is not
            positive.

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({
        ...     "arm": ["constant"] * 4 + ["cosine"] * 4, "seed": [0, 1, 2, 3] * 2,
        ...     "final_metric": [0.90, 0.88, 0.91, 0.89, 0.93, 0.92, 0.94, 0.93],
        ... })
        >>> verdict = judge(table, baseline="constant", maximize=True)["cosine"]
        >>> verdict.decision, round(verdict.effect, 3)
        ('better', 0.035)
    """
    check_bool("maximize", maximize)
    check_scalar("relative_margin", relative_margin, "(0, 1)")
    check_scalar("alpha", alpha, "(0, 1)")
    check_integer("resamples", resamples, "[0, inf)")
    check_integer("seed", seed, "[0, inf)")
    if margin is not None:
        check_scalar("margin", margin, "(0, inf)")
        margin = float(margin)
    if look is not None:
        check_integer("look", look, "[1, 100]")
    direction = Direction(bool(maximize))
    settings = Settings(baseline, direction, margin, relative_margin, alpha, resamples, seed)
    if sequential is None:
        trials = trials_by_arm(table, direction)
        check_choice("baseline", baseline, trials.arms)
        return judge_trials(trials, settings, spending_of(look)).verdicts
    if not isinstance(sequential, Sequential):
        raise ValueError(f"sequential must be a study.Sequential, got {sequential!r}.")
    if look is not None:
        raise ValueError(f"look must be None with sequential, which has its own looks, got {look}.")
    return _replay(table, settings, sequential)


class Settings(NamedTuple):
    """The arguments of `judge` that hold at every look."""

    baseline: str
    direction: Direction
    margin: float | None
    relative_margin: float
    alpha: float
    resamples: int
    seed: int


class Spending(NamedTuple):
    """What a look may spend: the level of its tests as a share of alpha.

    Attributes:
        difference: The share for the two-sided tests of a difference.
        equivalence: The share for the one-sided tests of equivalence.
        next: Both shares, at the look that would judge more seeds.
        adjustment: What the interval is adjusted for; "" for an only look.
        place: Number of the look, number of looks and most seeds, if there is a plan.
    """

    difference: float = 1.0
    equivalence: float = 1.0
    next: tuple[float, float] = (1.0, 1.0)
    adjustment: str = ""
    place: tuple[int, int, int] | None = None


def spending_of(look: int | None) -> Spending:
    """The spending of the only look, or of one after which seeds may be added without a plan."""
    if look is None:
        return Spending()
    share = 0.5**look
    return Spending(share, share, (share / 2, share / 2), "added seeds" if look > 1 else LATER)


def planned_spending(plan: Sequential, alpha: float, arms: int) -> list[Spending]:
    """The spending of every look of a plan.

    Holm's procedure tests at alpha / j with j from 1 to the number of arms. The shares are those of the
    smallest: levels of a larger error rate depend on each other more, so the same shares spend less of it.
    """
    smallest = alpha / arms
    shares = [[level / smallest for level in plan.levels(smallest, sides=sides)] for sides in (2, 1)]
    count, last = len(plan.looks), (shares[0][-1], shares[1][-1])
    if count == 1:
        return [Spending(*last)]
    return [
        Spending(difference, equivalence, last, f"{count} looks", (k, count, plan.most))
        for k, (difference, equivalence) in enumerate(zip(*shares, strict=True), 1)
    ]


def _replay(table: pd.DataFrame, settings: Settings, plan: Sequential) -> dict[str, Verdict]:
    """Judges the looks of a plan, one after the other."""
    table = rows_to_judge(table)
    arms = list(dict.fromkeys(name for name in table["arm"] if isinstance(name, str)))
    check_choice("baseline", settings.baseline, arms)
    seed = numbers(table, "seed")
    seeds = np.unique(seed[table["arm"] == settings.baseline])
    if len(seeds) < plan.first:
        raise ValueError(
            f"table must have at least the {plan.first} seeds of the first look, got {len(seeds)} of the "
            "baseline."
        )
    running = [arm for arm in arms if arm != settings.baseline]
    verdicts: dict[str, Verdict] = {}
    ratios: dict[str, np.ndarray] = {}  # of the last look at each arm
    before, looks = -math.inf, [n for n in plan.looks if n <= len(seeds)]
    for n, spending in zip(looks, planned_spending(plan, settings.alpha, max(len(running), 1)), strict=False):
        last = seeds[n - 1]
        given = set(table.loc[(seed > before) & (seed <= last), "arm"])
        lacking = [arm for arm in running if arm not in given]
        if lacking and not ratios:
            raise ValueError(
                "table must have one row for each arm and seed, got none of the first look for arm "
                f"{lacking[0]!r}."
            )
        running = [arm for arm in running if arm in given]
        if ratios and not running:
            break
        among = table["arm"].isin([settings.baseline, *running]) | table["arm"].isna()
        trials = trials_by_arm(table.loc[among & (seed <= last) | np.isnan(seed)], settings.direction)
        stopped = np.reshape([ratios[arm] for arm in ratios if arm not in running], (-1, 2)).T
        look = judge_trials(trials, settings, spending, stopped)
        verdicts |= look.verdicts
        ratios |= dict(zip(look.verdicts, look.ratios.T, strict=True))
        running = [arm for arm in running if verdicts[arm].decision == "undecided"]
        before = last
    return {arm: verdicts[arm] for arm in arms if arm in verdicts}


NONE_STOPPED = np.zeros((2, 0))  # every arm is judged at this look


class Judgement(NamedTuple):
    """What a look finds.

    Attributes:
        verdicts: By arm.
        ratios: The p-values of difference and equivalence as multiples of the look's shares, by arm.
    """

    verdicts: dict[str, Verdict]
    ratios: np.ndarray


def judge_trials(
    trials: Trials,
    settings: Settings,
    spending: Spending,
    stopped: np.ndarray = NONE_STOPPED,
) -> Judgement:
    """`judge` without its table; nothing is checked but the baseline's sign under a relative margin.

    Args:
        trials: The trials of the baseline and of the arms that are judged.
        settings: What holds at every look.
        spending: What this look may spend.
        stopped: The ratios of the arms that got no more seeds.
    """
    baseline, direction, margin, relative_margin, alpha, resamples, seed = settings
    arms, final, best, diverged = trials
    others = [row for row, arm in enumerate(arms) if arm != baseline]
    base, seeds = arms.index(baseline), final.shape[1]
    if margin is None and (below := final[base][~diverged[base] & (final[base] <= 0)]).size:
        raise ValueError(
            "margin must be given, in the metric's units: a relative margin needs positive metrics of the "
            f"baseline, got {below.min():g}."
        )
    judged = judge_metrics(
        final, diverged, base, direction, margin, relative_margin, alpha, spending, stopped
    )
    pairs, (difference, _, _), untested = judged.pairs, judged.tests, judged.untested
    measured, unpaired = pairs.measured, pairs.unpaired

    # p_value < alpha means p_difference < level, so the interval at 1 - level excludes 0 exactly then.
    error = np.where(untested | unpaired, np.nan, difference.error)
    halves = [-special.stdtrit(pairs.df, two_sided / 2) * error for two_sided in (judged.level, 0.05)]
    effect = unscaled(judged.mean, difference.exponent)
    intervals = [
        np.stack([unscaled(judged.mean + side * half, difference.exponent) for side in (-1, 1)], axis=1)
        for half in halves
    ]
    level_of_base = _mean(scaled(pairs.b, difference.exponent), pairs.kept)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(level_of_base > 0, judged.mean / level_of_base, np.nan)

    tested = len(others) + stopped.shape[-1]
    adjustments = [f"{tested} arms"] * (tested > 1) + [spending.adjustment] * bool(spending.adjustment)
    share, share_equivalence = spending.next
    verdicts = {}
    for i, row in enumerate(others):
        needed = None
        if judged.decision[i] == "undecided" and not untested[i] and not unpaired[i]:
            levels = (
                alpha * share / judged.factor[i],
                alpha * share_equivalence / judged.factor_equivalence[i],
            )
            needed = _seeds_in_all(pairs, judged.tests, i, levels)
        x = scaled(pairs.a[i], difference.exponent[i]) - scaled(pairs.b[i], difference.exponent[i])
        testable = not (pairs.few[i] or unpaired[i])
        verdict = Verdict(
            arm=arms[row],
            baseline=baseline,
            decision=str(judged.decision[i]),
            effect=float(effect[i]),
            relative_effect=float(relative[i]),
            interval=(float(intervals[0][i, 0]), float(intervals[0][i, 1])),
            interval_95=(float(intervals[1][i, 0]), float(intervals[1][i, 1])),
            bootstrap=(
                None if not resamples
                else bootstrap(x[pairs.kept[i]], difference.exponent[i], resamples, seed) if testable
                else (math.nan, math.nan)
            ),
            p_value=float(judged.p_value[i]),
            p_equivalence=float(judged.p_equivalence[i]),
            margin=margin,
            seeds=seeds,
            measured=int(measured[i]),
            seeds_needed=needed,
            best_effect=math.nan if best is None else _mean_difference(best[row], best[base]),
            diverged=(int(diverged[row].sum()), int(diverged[base].sum())),
            reason=(
                "deterministic task" if judged.deterministic[i]
                else "" if not pairs.few[i]
                else "too few measured" if measured[i] else "nothing measured"
            ),
            sentence="",
        )  # fmt: skip
        sentence = verdict_sentence(verdict, relative_margin, alpha, adjustments, spending.place)
        verdicts[verdict.arm] = dataclasses.replace(verdict, sentence=sentence)
    return Judgement(verdicts, judged.ratios)


# ---- The tests ----


class Judged(NamedTuple):
    """What the tests say of every arm, [..., arms].

    Attributes:
        pairs: The metrics.
        tests: The paired tests of an arm against the baseline, the baseline plus the margin, and minus it.
        mean: The mean difference in the unit of the first test, NaN where nothing was measured in pairs.
        deterministic: Whether all differences are the same, but not 0.
        ratios: The p-values of difference and equivalence as multiples of the look's shares,
            [..., 2, arms].
        p_value: Of the difference, adjusted for arms and looks; NaN where nothing can be tested.
        p_equivalence: Likewise, of the equivalence.
        level: What p_value < alpha asks of the difference's own p-value.
        factor: Holm's factor of the difference.
        factor_equivalence: That of the equivalence.
        decision: "equivalent", "better", "worse" or "undecided".
    """

    pairs: _Pairs
    tests: tuple[Paired, Paired, Paired]
    mean: np.ndarray
    deterministic: np.ndarray
    ratios: np.ndarray
    p_value: np.ndarray
    p_equivalence: np.ndarray
    level: np.ndarray
    factor: np.ndarray
    factor_equivalence: np.ndarray
    decision: np.ndarray

    @property
    def untested(self) -> np.ndarray:
        """Where nothing can be tested."""
        return self.deterministic | self.pairs.few


def judge_metrics(
    final: np.ndarray,
    diverged: np.ndarray,
    base: int,
    direction: Direction,
    margin: float | None,
    relative_margin: float,
    alpha: float,
    spending: Spending,
    stopped: np.ndarray = NONE_STOPPED,
) -> Judged:
    """Tests and decides for all arms but number `base` of [..., arms, seeds], one table or many.

    `spending` is what this look may spend; `stopped` the ratios of the arms that got no more seeds.
    """
    pairs = _paired(final, diverged, base)
    tests = _three_tests(pairs.a, pairs.b, pairs.kept, margin, relative_margin)
    p_difference, p_equivalence, deterministic = _p_values(pairs, tests)
    untested, unpaired = deterministic | pairs.few, pairs.unpaired

    ratios = np.stack([p_difference / spending.difference, p_equivalence / spending.equivalence], axis=-2)
    earlier = np.broadcast_to(stopped, (*ratios.shape[:-1], stopped.shape[-1]))
    found = holm(np.concatenate([ratios, earlier], axis=-1))
    (adjusted, factor), (adjusted_equivalence, factor_equivalence) = (
        [each[..., test, : ratios.shape[-1]] for each in found] for test in range(2)
    )
    p_value = np.where(untested, np.nan, np.minimum(adjusted, 1))
    p_equivalence = np.where(untested, np.nan, np.minimum(adjusted_equivalence, 1))
    # Neither is clipped at 1 here; if p_difference underflowed to 0, Holm's factor is the ratio's limit.
    step = np.divide(ratios[..., 0, :], adjusted, out=1 / factor, where=adjusted > 0)
    level = alpha * spending.difference * step

    mean = np.where(unpaired | (pairs.measured < 1), np.nan, tests[0].mean)
    more_lost = pairs.lost_a.sum(axis=-1) - pairs.lost_b.sum(axis=-1)
    change = np.where(unpaired, more_lost, direction.cost(mean))
    decision = np.select(
        [p_equivalence < alpha, (p_value < alpha) & (change < 0), p_value < alpha],
        ["equivalent", "better", "worse"],
        "undecided",
    )
    return Judged(
        pairs, tests, mean, deterministic, ratios,
        p_value, p_equivalence, level, factor, factor_equivalence, decision,
    )  # fmt: skip


class _Pairs(NamedTuple):
    """The metrics of arms and baseline, [..., arms, seeds], and what their trials say.

    Attributes:
        a: The arm's metric; 0 where both diverged.
        b: The baseline's, likewise.
        lost_a: Whether the arm's trial diverged.
        lost_b: Whether the baseline's did.
        kept: Whether the seed says anything: not if both diverged.
    """

    a: np.ndarray
    b: np.ndarray
    lost_a: np.ndarray
    lost_b: np.ndarray
    kept: np.ndarray

    @property
    def measured(self) -> np.ndarray:
        """The number of seeds kept, by arm."""
        return self.kept.sum(axis=-1)

    @property
    def df(self) -> np.ndarray:
        """The degrees of freedom, by arm."""
        return np.maximum(self.measured - 1, 1)

    @property
    def one_sided(self) -> np.ndarray:
        """Whether exactly one of the two diverged."""
        return self.lost_a ^ self.lost_b

    @property
    def unpaired(self) -> np.ndarray:
        """Whether at no seed both were measured, by arm."""
        return (self.measured > 0) & ~(self.kept & ~self.one_sided).any(axis=-1)

    @property
    def few(self) -> np.ndarray:
        """Whether there are too few seeds for a test, by arm."""
        return (self.measured < 2) & ~self.unpaired


def _paired(final: np.ndarray, diverged: np.ndarray, base: int) -> _Pairs:
    a, lost_a = (np.delete(x, base, axis=-2) for x in (final, diverged))
    b, lost_b = (np.broadcast_to(x[..., base : base + 1, :], a.shape) for x in (final, diverged))
    kept = ~(lost_a & lost_b)
    return _Pairs(np.where(kept, a, 0.0), np.where(kept, b, 0.0), lost_a, lost_b, kept)


def _p_values(
    pairs: _Pairs, tests: tuple[Paired, Paired, Paired]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns by arm the p-values of difference and equivalence, and whether the task is deterministic.

    A p-value is 1 where nothing can be tested.
    """
    difference, above, below = tests
    same = (pairs.a == pairs.b).all(axis=-1)
    deterministic = difference.constant & ~same & ~pairs.few & ~pairs.unpaired
    untested = deterministic | pairs.few
    p_difference = 2 * special.stdtr(pairs.df, -np.abs(difference.t))
    signs = _sign_test(pairs.lost_a & ~pairs.lost_b, ~pairs.lost_a & pairs.lost_b)
    p_difference = np.where(pairs.unpaired, signs, p_difference)
    p_equivalence = np.maximum(special.stdtr(pairs.df, above.t), special.stdtr(pairs.df, -below.t))
    p_equivalence = np.where(same, 0.0, p_equivalence)
    incomparable = pairs.one_sided.any(axis=-1)
    return (
        np.where(untested, 1.0, p_difference),
        np.where(untested | incomparable, 1.0, p_equivalence),
        deterministic,
    )


def _seeds_in_all(
    pairs: _Pairs, tests: tuple[Paired, Paired, Paired], row: int, levels: tuple[float, float]
) -> int | None:
    """The number of seeds with which an undecided arm is likely to be decided, as `seeds_needed` says."""
    seeds, measured = pairs.kept.shape[1], int(pairs.measured[row])
    effects = np.array([test.t[row] for test in tests]) / math.sqrt(measured)
    effects[1:] = np.where(pairs.one_sided[row].any(), 0.0, effects[1:])
    needed = seeds_needed(measured, effects, *levels)
    return needed and math.ceil(needed * seeds / measured)


def _three_tests(
    a: np.ndarray, b: np.ndarray, kept: np.ndarray, margin: float | None, relative_margin: float
) -> tuple[Paired, Paired, Paired]:
    """Returns the paired tests of a against b, b plus the margin, and b minus the margin."""
    exponent = exponents(a, b)
    x, y = scaled(a, exponent), scaled(b, exponent)
    difference = paired_t(x - y, kept, exponent)
    if margin is None:
        above, below = y * (1 + relative_margin), y * (1 - relative_margin)
    else:
        exponent = np.maximum(exponent, math.frexp(margin)[1])
        x, y, zone = scaled(a, exponent), scaled(b, exponent), np.ldexp(margin, -exponent)[..., None]
        above, below = y + zone, y - zone
    return difference, paired_t(x - above, kept, exponent), paired_t(x - below, kept, exponent)


def _sign_test(arm_lost: np.ndarray, base_lost: np.ndarray) -> np.ndarray:
    """The p-value if every counted seed has exactly one of arm and baseline diverged.

    The exact two-sided sign test; 0 if all trials of one diverged and none of the other's, which is the
    t-test's limit as the value substituted for a diverged trial grows.
    """
    worse, better = arm_lost.sum(axis=-1), base_lost.sum(axis=-1)
    tail = special.bdtrc(np.maximum(worse, better) - 1.0, worse + better, 0.5)
    complete = np.maximum(worse, better) == arm_lost.shape[-1]
    return np.where(complete, 0.0, np.minimum(2 * tail, 1))


def _mean(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return x.sum(axis=-1, where=kept) / np.maximum(kept.sum(axis=-1), 1)


def _mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    kept = np.isfinite(a) & np.isfinite(b)
    if not kept.any():
        return math.nan
    a, b = a[kept], b[kept]
    exponent = exponents(a, b)
    return float(unscaled((scaled(a, exponent) - scaled(b, exponent)).mean(), exponent))


def improved(final: np.ndarray, initial: np.ndarray, direction: Direction) -> bool:
    """Whether training improved the metric, by a one-sided test over paired seeds at the level 0.05.

    Either the t-test or the exact sign test suffices. With a few huge metrics before training, the t-test
    misses what happened at every seed; with few seeds, the sign test misses a steady gain. Trials without
    both metrics are excluded; without any trial left, nothing shows that training failed.
    """
    kept = np.isfinite(final) & np.isfinite(initial)
    if not kept.any():
        return True
    after, before = direction.cost(final[kept]), direction.cost(initial[kept])
    if len(after) == 1:
        return bool(after[0] < before[0])
    exponent = exponents(after, before)
    x = scaled(after, exponent) - scaled(before, exponent)
    found = paired_t(x, np.ones(len(x), bool), exponent)
    lower, changed = np.sum(after < before), np.sum(after != before)
    p_values = special.stdtr(len(x) - 1, found.t), special.bdtrc(lower - 1.0, changed, 0.5)
    return bool(min(p_values) < 0.05)

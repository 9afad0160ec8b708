"""Verdicts: against hand-worked numbers and scipy, their rules and invariances."""

import dataclasses
import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from reference.power import ALPHA, difference_power, equivalence_power
from scipy import stats

from adaptive_optax.study.statistics.judge import judge
from adaptive_optax.study.statistics.outcomes import judged_metric


def make_table(arms, **columns):
    """One row an arm and seed from metrics by arm; further columns likewise."""
    seeds = len(next(iter(arms.values())))
    flat = {name: np.concatenate([values[arm] for arm in arms]) for name, values in columns.items()}
    return pd.DataFrame(
        {
            "arm": np.repeat(list(arms), seeds),
            "seed": np.tile(np.arange(seeds), len(arms)),
            "final_metric": np.concatenate(list(arms.values())),
            **flat,
        }
    )


def judge_one(arm, baseline, **options):
    table = make_table({"base": np.array(baseline, float), "arm": np.array(arm, float)})
    return judge(table, baseline="base", **{"resamples": 0, **options})["arm"]


def noisy(seed, arms, seeds=8):
    """Positive metrics: seeds differ by 0.1, arms by their offset, and trials by 0.02."""
    rng = np.random.default_rng(seed)
    common = 1 + 0.1 * rng.standard_normal(seeds)
    return {name: common + offset + 0.02 * rng.standard_normal(seeds) for name, offset in arms.items()}


# ---- Hand-worked numbers ----
# With 2 degrees of freedom P(T < t) = 1/2 + t / (2 sqrt(2 + t^2)), so p = 1 - t / sqrt(2 + t^2), two-sided.


def t_of_p(p):
    return (1 - p) * math.sqrt(2 / (1 - (1 - p) ** 2))


def test_three_seeds_by_hand():
    # d = 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3); t(0.975; 2) = 0.95 sqrt(2 / 0.0975) = 4.3027.
    # Margin 5: t = -3 sqrt(3) from above, 7 sqrt(3) from below; the larger p-value is that from above.
    verdict = judge_one([11, 22, 33], [10, 20, 30], margin=5)
    assert verdict.effect == pytest.approx(2, rel=1e-14)
    assert verdict.relative_effect == pytest.approx(0.1, rel=1e-14)
    assert verdict.p_value == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)
    half = 0.95 * math.sqrt(2 / 0.0975) / math.sqrt(3)
    assert verdict.interval == verdict.interval_95 == pytest.approx((2 - half, 2 + half), rel=1e-12)
    assert verdict.p_equivalence == pytest.approx((1 - math.sqrt(27 / 29)) / 2, rel=1e-12)
    assert verdict.decision == "equivalent"
    assert (verdict.seeds, verdict.margin, verdict.diverged, verdict.reason) == (3, 5.0, (0, 0), "")


def test_equivalence_from_below_by_hand():
    # d = -1, -2, -3 with margin 5: now the test against -5 decides.
    verdict = judge_one([9, 18, 27], [10, 20, 30], margin=5)
    assert verdict.p_equivalence == pytest.approx((1 - math.sqrt(27 / 29)) / 2, rel=1e-12)


def test_two_seeds_by_hand():
    # One degree of freedom is the Cauchy distribution: d = 1, 3 has mean 2 and standard error 1.
    verdict = judge_one([2, 5], [1, 2])
    assert verdict.p_value == pytest.approx(1 - 2 / math.pi * math.atan(2), rel=1e-12)


def with_p_values(p_values, baseline=10.0):
    """A table whose arms have these two-sided p-values: differences m - 1, m, m + 1 have t = m sqrt(3)."""
    arms = {f"arm {p}": baseline + t_of_p(p) / math.sqrt(3) + np.array([-1.0, 0, 1]) for p in p_values}
    return make_table({"base": np.full(3, baseline), **arms})


def test_holm_by_hand():
    # Ascending: 4 * 0.005 = 0.02, 3 * 0.01 = 0.03, 2 * 0.03 = 0.06, then 1 * 0.04, raised to 0.06.
    verdicts = judge(with_p_values([0.01, 0.04, 0.03, 0.005]), baseline="base", resamples=0)
    p_values = {arm: verdict.p_value for arm, verdict in verdicts.items()}
    assert p_values == pytest.approx(
        {"arm 0.01": 0.03, "arm 0.04": 0.06, "arm 0.03": 0.06, "arm 0.005": 0.02}, rel=1e-9
    )
    assert [verdict.decision for verdict in verdicts.values()] == ["worse", "undecided", "undecided", "worse"]
    # Intervals at the levels 0.05 p / p_adjusted: 0.05 / 3, 0.05 * 2 / 3, 0.05 / 2, 0.05 / 4.
    for arm, level in zip(verdicts.values(), (0.05 / 3, 0.05 * 2 / 3, 0.05 / 2, 0.05 / 4), strict=True):
        half = t_of_p(level) / math.sqrt(3)
        assert arm.interval == pytest.approx((arm.effect - half, arm.effect + half), rel=1e-9)
        assert arm.interval_95[1] - arm.effect == pytest.approx(t_of_p(0.05) / math.sqrt(3), rel=1e-9)


def test_holm_of_equivalences_is_separate():
    # d = m - 1, m, m + 1 and margin 10: t = (m - 10) sqrt(3) from above. One-sided p-values 0.02 and 0.004.
    arms = {"far": 0.02, "near": 0.004}
    offsets = {arm: 10 - t_of_p(2 * p) / math.sqrt(3) for arm, p in arms.items()}
    table = make_table(
        {"base": np.zeros(3)} | {arm: m + np.array([-1.0, 0, 1]) for arm, m in offsets.items()}
    )
    verdicts = judge(table, baseline="base", margin=10, resamples=0)
    assert verdicts["far"].p_equivalence == pytest.approx(0.02, rel=1e-9)
    assert verdicts["near"].p_equivalence == pytest.approx(0.008, rel=1e-9)


def test_a_look_multiplies_after_holm():
    table = with_p_values([0.001, 0.004, 0.3])
    for look in (1, 2, 5):
        verdicts = judge(table, baseline="base", look=look, resamples=0)
        expected = [min(1, p * 2**look) for p in (0.003, 0.008, 0.3)]
        assert [verdict.p_value for verdict in verdicts.values()] == pytest.approx(expected, rel=1e-9)
        for verdict, factor in zip(verdicts.values(), (3, 2, 1), strict=True):
            half = t_of_p(ALPHA / 2**look / factor) / math.sqrt(3)
            assert verdict.interval[1] - verdict.effect == pytest.approx(half, rel=1e-9)
    first = judge(table, baseline="base", look=1, resamples=0)
    assert [verdict.decision for verdict in first.values()] == ["worse", "worse", "undecided"]
    fifth = judge(table, baseline="base", look=5, resamples=0)
    assert {verdict.decision for verdict in fifth.values()} == {"undecided"}
    margins = [
        judge_one([11, 22, 33], [10, 20, 30], margin=5, look=look).p_equivalence for look in (None, 1, 3)
    ]
    assert margins == pytest.approx([margins[0], 2 * margins[0], 8 * margins[0]], rel=1e-12)


def test_matches_scipy():
    for seed in range(50):
        arms = noisy(seed, {"base": 0.0, "arm": 0.01})
        verdict = judge(make_table(arms), baseline="base", resamples=0)["arm"]
        paired = stats.ttest_rel(arms["arm"], arms["base"])
        assert verdict.p_value == pytest.approx(paired.pvalue, rel=1e-9)
        assert verdict.interval == pytest.approx(tuple(paired.confidence_interval(0.95)), rel=1e-9)
        above = stats.ttest_rel(arms["arm"], 1.01 * arms["base"], alternative="less").pvalue
        below = stats.ttest_rel(arms["arm"], 0.99 * arms["base"], alternative="greater").pvalue
        assert verdict.p_equivalence == pytest.approx(max(above, below), rel=1e-9)
        wide = judge(make_table(arms), baseline="base", relative_margin=0.05, alpha=0.2, resamples=0)["arm"]
        above = stats.ttest_rel(arms["arm"], 1.05 * arms["base"], alternative="less").pvalue
        below = stats.ttest_rel(arms["arm"], 0.95 * arms["base"], alternative="greater").pvalue
        assert wide.p_equivalence == pytest.approx(max(above, below), rel=1e-9)
        assert wide.interval == pytest.approx(tuple(paired.confidence_interval(0.8)), rel=1e-9)
        assert wide.interval_95 == verdict.interval_95


# ---- Rules ----


def test_no_difference_at_all_is_equivalent():
    for metric in ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]):
        for look in (None, 7):
            verdict = judge_one(metric, metric, look=look, resamples=99)
            assert (verdict.decision, verdict.effect, verdict.interval) == ("equivalent", 0, (0, 0))
            assert (verdict.p_value, verdict.p_equivalence, verdict.bootstrap) == (1, 0, (0, 0))
            assert (verdict.reason, verdict.seeds_needed) == ("", None)


@pytest.mark.parametrize("options", [{}, {"margin": 0.5}, {"look": 2}])
@pytest.mark.parametrize(
    ("arm", "baseline"),
    [
        ([2.5, 2.5, 2.5], [2.0, 2.0, 2.0]),
        ([1.1, 1.2, 1.3, 1.7], [1.0, 1.1, 1.2, 1.6]),  # 0.1 each, up to the last digits
        ([1e-200, 1e-200], [2e-200, 2e-200]),
        ([1e200, 1e200], [2e200, 2e200]),
    ],
)
def test_deterministic_task_is_undecided(arm, baseline, options):
    verdict = judge_one(arm, baseline, resamples=99, **options)
    assert (verdict.decision, verdict.reason, verdict.seeds_needed) == (
        "undecided",
        "deterministic task",
        None,
    )
    assert np.isnan([*verdict.interval, *verdict.interval_95, verdict.p_value, verdict.p_equivalence]).all()
    assert verdict.bootstrap == pytest.approx((verdict.effect, verdict.effect))
    assert "without any variation" in verdict.sentence and "nan" not in verdict.sentence


def test_arms_without_variance_keep_their_place_in_holm():
    base = noisy(0, {"base": 0.0, "arm": 0.03})
    alone = judge(make_table(base), baseline="base", margin=0.1, resamples=0)["arm"]
    others = {"same": base["base"], "shifted": base["base"] + 0.001}
    verdict = judge(make_table(base | others), baseline="base", margin=0.1, resamples=0)["arm"]
    assert verdict.p_value == pytest.approx(3 * alone.p_value, rel=1e-12)
    # "same" has p_equivalence 0 and so comes first; "shifted" has none, which counts as 1 and comes last.
    assert verdict.p_equivalence == pytest.approx(2 * alone.p_equivalence, rel=1e-12)


@pytest.mark.parametrize(
    ("factor", "offset", "p_above"),
    [(1.01, -0.001, 0.0), (1.01, 0.0, 0.5), (1.01, 0.001, 1.0), (0.99, -0.001, 1.0), (0.99, 0.001, 0.0)],
)
def test_no_variance_against_one_margin(factor, offset, p_above):
    # a - 1.01 b or a - 0.99 b is the same at every seed: the p-value's limit is 0 inside the margin and 1
    # outside; the test against the other margin, 0.02 b away, is ordinary, with t = 11 to 12 and p < 1e-4.
    b = np.linspace(0.8, 1.2, 8)
    verdict = judge_one(factor * b + offset, b)
    inside = p_above == 0
    assert verdict.p_equivalence == pytest.approx(p_above, abs=1e-4)
    assert (verdict.decision == "equivalent") == inside
    assert verdict.reason == ""


def test_tiny_and_huge_metrics():
    arms = noisy(3, {"base": 0.0, "arm": 0.05})
    expected = judge(make_table(arms), baseline="base", resamples=0)["arm"]
    for scale in (2.0**-900, 2.0**900):
        scaled = make_table({arm: scale * values for arm, values in arms.items()})
        verdict = judge(scaled, baseline="base", resamples=50)["arm"]
        assert (verdict.p_value, verdict.p_equivalence) == (expected.p_value, expected.p_equivalence)
        assert verdict.interval == tuple(scale * end for end in expected.interval)
        assert np.isfinite(verdict.bootstrap).all()


@pytest.mark.parametrize("maximize", [False, True])
def test_metrics_at_the_end_of_the_range(maximize):
    arms = noisy(3, {"base": 0.0, "arm": 0.05})
    options = {"baseline": "base", "resamples": 50, "maximize": maximize}
    expected = judge(make_table(arms), **options)["arm"]
    largest = max(values.max() for values in arms.values())
    scale = 2.0 ** (1023 - math.frexp(largest)[1])  # the largest metric is above 4e307
    table = make_table({arm: 3 * scale * (values / 3) for arm, values in arms.items()})
    table = table.assign(best_metric=table["final_metric"], initial_metric=1.7e308)
    verdict = judge(table, **options)["arm"]
    assert (verdict.decision, verdict.p_value) == (expected.decision, pytest.approx(expected.p_value))
    assert verdict.effect / scale == pytest.approx(expected.effect)
    assert np.array(verdict.interval) / scale == pytest.approx(expected.interval)
    assert np.array(verdict.bootstrap) / scale == pytest.approx(expected.bootstrap)
    assert verdict.best_effect == pytest.approx(verdict.effect)
    assert verdict.relative_effect == pytest.approx(expected.relative_effect)
    assert "inf" not in verdict.sentence and "nan" not in verdict.sentence


def test_differences_beyond_the_range_are_finite():
    arm, base = [1.7e308, 1.6e308, 1.5e308], [-1.7e308, -1.6e308, -1.4e308]
    verdict = judge_one(arm, base, margin=1.0, resamples=20)
    assert verdict.decision == "worse"
    assert np.isfinite([verdict.effect, *verdict.interval, *verdict.bootstrap]).all()
    assert "inf" not in verdict.sentence


@pytest.mark.parametrize("margin", [1e16, 1e100, 1e307, 1e308, 1.7e308, np.finfo(float).max])
@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
def test_any_margin_above_the_differences_makes_arms_equivalent(margin, scale):
    arms = {name: scale * values for name, values in noisy(3, {"base": 0.0, "arm": 0.05}).items()}
    for look in (None, 3):
        verdict = judge(make_table(arms), baseline="base", margin=margin, look=look)["arm"]
        assert verdict.decision == ("equivalent" if margin > scale else "worse")


def test_p_value_that_underflows_still_decides():
    # t = 1e4 with 199 degrees of freedom: p < 1e-500.
    b = 1 + 0.1 * np.random.default_rng(0).standard_normal(200)
    d = 1e-4 * np.sqrt(200) * np.tile([-1.0, 1.0], 100)
    table = make_table({"base": b, "arm": b + 1 + d, "twin": b + 2 + d, "null": b + 300 * d})
    verdicts = judge(table, baseline="base", resamples=0)
    arm = verdicts["arm"]
    assert arm.p_value == 0 and arm.decision == "worse" and arm.interval[0] > 0
    half = stats.t.isf(ALPHA / 3 / 2, 199) * d.std(ddof=1) / math.sqrt(200)
    assert arm.interval == pytest.approx((1 - half, 1 + half), rel=1e-9)


def test_equivalent_comes_before_different():
    # 0.5 % worse at every seed, nearly without noise: surely different, surely within 1 %.
    b = np.linspace(0.9, 1.1, 8)
    verdict = judge_one(1.005 * b + 1e-4 * np.tile([-1, 1], 4), b)
    assert verdict.p_value < ALPHA and verdict.decision == "equivalent"
    assert judge_one(1.005 * b + 1e-4 * np.tile([-1, 1], 4), b, relative_margin=0.004).decision == "worse"


def test_diverged_trials_count_with_the_worst_metric():
    arms = {"base": np.array([1.0, 1.1, np.nan, 1.2]), "arm": np.array([np.inf, 0.9, 5.0, 1.0])}
    initial = dict.fromkeys(arms, np.array([2.0, 7.0, 6.0, 7.0]))
    best = {"base": np.array([1.0, 1.1, np.nan, 1.2]), "arm": np.array([0.8, 0.9, 1.0, 1.0])}
    table = make_table(arms, initial_metric=initial, best_metric=best)
    # The worst finite final metric is 5: the arm's first trial counts max(2, 5), the third of base max(6, 5).
    assert judged_metric(table).tolist() == [1.0, 1.1, 6.0, 1.2, 5.0, 0.9, 5.0, 1.0]
    verdict = judge(table, baseline="base", resamples=0)["arm"]
    assert verdict.effect == pytest.approx((4 - 0.2 - 1 - 0.2) / 4)
    assert verdict.best_effect == pytest.approx((-0.2 - 0.2 - 5 - 0.2) / 4)
    assert verdict.diverged == (1, 1)
    assert "1 of 4 trials of arm and 1 of 4 trials of base diverged" in verdict.sentence
    # Without initial metrics, or with one that is not finite, the worst finite metric stands in.
    for bad in (table.drop(columns="initial_metric"), table.assign(initial_metric=np.nan)):
        assert judged_metric(bad).tolist() == [1.0, 1.1, 5.0, 1.2, 5.0, 0.9, 5.0, 1.0]
    assert judge(table.drop(columns="best_metric"), baseline="base")["arm"].best_effect != verdict.best_effect
    assert math.isnan(judge(table.drop(columns="best_metric"), baseline="base")["arm"].best_effect)


def test_marked_trials_are_diverged_whatever_their_metric():
    arms = {"base": np.array([1.0, 1.1, 1.2]), "arm": np.array([0.5, 0.9, np.nan])}
    marks = {"base": np.zeros(3, bool), "arm": np.array([True, False, False])}
    table = make_table(arms, diverged=marks)
    assert judged_metric(table).tolist() == [1.0, 1.1, 1.2, 1.2, 0.9, 1.2]
    for kind in (bool, object, int):
        assert judge(table.astype({"diverged": kind}), baseline="base")["arm"].diverged == (2, 0)


# ---- Diverged trials are no measurements ----


@pytest.mark.parametrize("columns", [{}, {"initial_metric": 2.3}, {"initial_metric": np.nan}])
@pytest.mark.parametrize("metric", [1.0, np.nan])
def test_where_all_trials_diverged_nothing_was_measured(metric, columns):
    table = make_table(dict.fromkeys(("base", "arm", "other"), np.full(5, metric)))
    for look in (None, 3):
        verdicts = judge(table.assign(diverged=True, **columns), baseline="base", look=look)
        for arm, verdict in verdicts.items():
            assert (verdict.decision, verdict.reason) == ("undecided", "nothing measured")
            assert (verdict.diverged, verdict.measured, verdict.seeds_needed) == ((5, 5), 0, None)
            numbers = [verdict.effect, verdict.relative_effect, *verdict.interval, *verdict.interval_95]
            assert np.isnan([*numbers, *verdict.bootstrap, verdict.p_value, verdict.p_equivalence]).all()
            assert verdict.sentence == (
                f"{arm} against base is undecided: 5 of 5 trials of {arm} and 5 of 5 trials of base "
                "diverged, so nothing was measured; try lower learning rates."
            )


def lose(table, **seeds):
    """Marks the trials of arms at these seeds as diverged."""
    lost = [seed in seeds.get(arm, ()) for arm, seed in zip(table["arm"], table["seed"], strict=True)]
    return table.assign(diverged=lost, initial_metric=2.3)


def test_seeds_at_which_both_diverged_are_left_out():
    # The arm is 0.1 better at every other seed. Zeros in the place of the lost pairs would halve the effect.
    table = make_table(noisy(5, {"base": 0.0, "arm": -0.1}, seeds=10))
    lost = lose(table, base=range(5), arm=range(5))
    verdict = judge(lost, baseline="base")["arm"]
    alone = judge(table[table["seed"] >= 5], baseline="base")["arm"]
    for name in ("effect", "relative_effect", "interval", "interval_95", "bootstrap", "p_value"):
        assert getattr(verdict, name) == pytest.approx(getattr(alone, name), rel=1e-12), name
    assert (verdict.decision, verdict.seeds, verdict.measured) == ("better", 10, 5)
    assert "excluding 5 seeds at which both did" in verdict.sentence


def test_a_seed_alone_is_too_few():
    table = make_table(dict.fromkeys(("base", "arm"), np.ones(5)))
    verdict = judge(lose(table, base=range(4), arm=range(4)), baseline="base")["arm"]
    assert (verdict.decision, verdict.reason, verdict.measured) == ("undecided", "too few measured", 1)
    assert "only 1 of 5 seeds can be compared" in verdict.sentence


@pytest.mark.parametrize("margin", [None, 1e9])
@pytest.mark.parametrize("initial", [np.nan, 1.0, 5.0])
def test_a_stand_in_makes_nothing_equivalent(initial, margin):
    # Whatever stands in for the lost trial, it may be just what the other arm measured.
    table = make_table(dict.fromkeys(("base", "arm"), np.ones(12)))
    for lost in ({"arm": [3]}, {"base": [3]}, {"arm": [3], "base": [4]}, {"arm": range(11)}):
        judged = lose(table, **lost).assign(initial_metric=initial)
        assert judge(judged, baseline="base", margin=margin)["arm"].decision != "equivalent"


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [1.0, 1.1, 1.3]])
@pytest.mark.parametrize("initial", [np.nan, 1.0, 5.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_an_arm_that_always_diverges_is_worse_than_one_that_never_does(values, initial, maximize):
    table = make_table(dict.fromkeys(("base", "arm"), np.array(values)))
    for lost, decision in (("arm", "worse"), ("base", "better")):
        judged = lose(table, **{lost: range(3)}).assign(initial_metric=initial)
        verdict = judge(judged, baseline="base", look=4, maximize=maximize)["arm"]
        assert (verdict.decision, verdict.p_value, verdict.reason) == (decision, 0, "")
        assert math.isnan(verdict.effect) and np.isnan(verdict.interval).all()
        assert "nan" not in verdict.sentence and "3 of 3 trials of " + lost in verdict.sentence


def test_where_no_seed_has_both_the_counts_decide():
    # The sign test on the seeds at which one diverged alone: 2 * 2**-3 of 3 seeds, 2 * 2**-7 of 7.
    table = make_table(dict.fromkeys(("base", "arm"), np.ones(8)))
    few = judge(lose(table, base=range(5), arm=range(8)), baseline="base")["arm"]
    assert (few.decision, few.p_value) == ("undecided", pytest.approx(0.25))
    many = judge(lose(table, base=range(1), arm=range(8)), baseline="base")["arm"]
    assert (many.decision, many.p_value) == ("worse", pytest.approx(2 * 2**-7))
    assert "8 of 8 trials of arm and 1 of 8 trials of base diverged" in many.sentence


def test_only_the_verdict_phase_is_judged():
    arms = noisy(1, {"base": 0.0, "arm": 0.02})
    fresh = make_table(arms).assign(phase="verdict")
    tuning = make_table(noisy(2, {"base": 5.0, "arm": 0.0, "lost": 0.0})).assign(phase="tuning")
    verdicts = judge(pd.concat([tuning, fresh]), baseline="base")
    assert verdicts == judge(make_table(arms), baseline="base")


def test_bootstrap_is_scipys_and_repeats():
    arms = noisy(4, {"base": 0.0, "arm": 0.01, "other": 0.02})
    verdicts = judge(make_table(arms), baseline="base", resamples=500, seed=7)
    expected = stats.bootstrap(
        (arms["arm"] - arms["base"],), np.mean, n_resamples=500, rng=7
    ).confidence_interval
    assert verdicts["arm"].bootstrap == tuple(expected)
    alone = judge(
        make_table({arm: arms[arm] for arm in ("base", "other")}), baseline="base", resamples=500, seed=7
    )
    assert alone["other"].bootstrap == verdicts["other"].bootstrap
    assert judge(make_table(arms), baseline="base", resamples=500)["arm"].bootstrap != tuple(expected)
    assert judge_one([1, 2, 3], [2, 3, 5]).bootstrap is None


@pytest.mark.parametrize(
    "differences",
    [[0, 0], [1, 1, 1], [1, 2], [1e-160, 2e-160, 3e-160], [0, 0, 0, 0, 0, 0, 0, 1], [1e-9, 1, 1, 1]],
)
@pytest.mark.parametrize("resamples", [1, 2, 100])
def test_bootstrap_of_degenerate_data_is_finite(differences, resamples):
    d = np.array(differences, float)
    low, high = judge_one(d, np.zeros_like(d), margin=1, resamples=resamples).bootstrap
    assert d.min() <= low <= high <= d.max()


def test_relative_effect_needs_a_positive_baseline():
    assert math.isnan(judge_one([1, 3, 2], [-1, 0.5, -1], margin=1).relative_effect)


# ---- Seeds needed ----


def standardised(effect, seeds=8):
    """Differences with exactly this mean and standard deviation 1."""
    d = np.random.default_rng(0).standard_normal(seeds)
    return (d - d.mean()) / d.std(ddof=1) + effect


@pytest.mark.parametrize("effect", [0.02, 0.1, -0.3, 0.5, 0.75])
def test_seeds_needed_for_a_difference(effect):
    needed = judge_one(standardised(effect), np.zeros(8), margin=1e-6).seeds_needed
    if abs(effect) == 0.02:  # about (1.96 + 0.84)^2 / 0.02^2 = 19 600 seeds
        assert needed is None
    else:
        assert difference_power(needed, effect) >= 0.8 > difference_power(needed - 1, effect)


@pytest.mark.parametrize(("effect", "margin"), [(0.0, 0.55), (0.1, 0.5), (-0.1, 0.3), (0.05, 0.1)])
def test_seeds_needed_for_equivalence(effect, margin):
    verdict = judge_one(standardised(effect), np.zeros(8), margin=margin)
    assert verdict.decision == "undecided"
    # The sum of both powers minus 1 is exact but for the chance that both tests fail: here to 0.1 %.
    assert equivalence_power(verdict.seeds_needed, effect, margin) == pytest.approx(0.8, abs=0.02)
    assert equivalence_power(verdict.seeds_needed, effect, margin) >= 0.8
    assert equivalence_power(verdict.seeds_needed - 1, effect, margin) < 0.801


def test_seeds_needed_pays_for_arms_and_the_next_look():
    # Two arms at the second look: the next one spends 0.05 / 8, Holm's first step halves it.
    d = {"strong": standardised(0.6), "weak": standardised(0.4)}
    table = make_table({"base": np.zeros(8), **d})
    verdicts = judge(table, baseline="base", margin=1e-6, look=2, resamples=0)
    for arm, effect, alpha in (("strong", 0.6, ALPHA / 8 / 2), ("weak", 0.4, ALPHA / 8)):
        needed = verdicts[arm].seeds_needed
        assert difference_power(needed, effect, alpha) >= 0.8 > difference_power(needed - 1, effect, alpha)
    verdicts = judge(table, baseline="base", margin=1.1, look=None, resamples=0)
    # Equivalence is the nearer goal of the weak arm, and its p-value is the smaller one: Holm's first step.
    needed = verdicts["weak"].seeds_needed
    powers = [equivalence_power(seeds, 0.4, 1.1, ALPHA / 2) for seeds in (needed - 1, needed)]
    assert powers[0] < 0.8 <= powers[1]


def test_seeds_needed_is_more_than_there_are_and_only_where_undecided():
    # p is just above alpha, where as many seeds again would have a power of about one half. Looks cost seeds.
    needed = [
        judge_one(standardised(0.8), np.zeros(8), margin=1e-6, look=look).seeds_needed for look in (1, 3, 9)
    ]
    assert 8 < needed[0] < needed[1] < needed[2]
    assert judge_one(standardised(3.0), np.zeros(8), margin=1e-6).seeds_needed is None
    assert judge_one(standardised(0.0), np.zeros(8), margin=9).seeds_needed is None


@pytest.mark.parametrize("effect", [1e4, 1e9, 1e12])
def test_seeds_needed_where_the_noncentral_t_overflows(effect):
    # T = (Z + effect sqrt(n)) / sqrt(V / (n - 1)), where Z does not matter beside such an effect. The
    # next look's share of alpha, 2**-101, makes the critical value extreme as well.
    verdict = judge_one(standardised(effect, 3), np.zeros(3), margin=1e-6, look=100)
    n = np.arange(4, 100)
    critical = stats.t.isf(ALPHA * 2.0**-101 / 2, n - 1)
    power = stats.chi2.cdf((n - 1) * (effect * np.sqrt(n) / critical) ** 2, n - 1)
    assert verdict.seeds_needed == n[power >= 0.8][0]
    assert verdict.decision == "undecided"


# ---- Errors ----

GOOD = make_table({"base": np.array([1.0, 1.1, 1.3]), "arm": np.array([0.9, 1.2, 1.0])})
BAD_TABLES = {
    "no metric": (
        GOOD.drop(columns="final_metric"),
        "columns arm, seed and final_metric.*none named final_metric",
    ),
    "no seed": (GOOD.drop(columns="seed"), "none named seed"),
    "no arm": (GOOD.drop(columns="arm"), "none named arm"),
    "no table": (GOOD.to_dict(), "pandas DataFrame, got dict"),
    "no rows": (GOOD.iloc[:0], "must have trials to judge"),
    "no verdict phase": (GOOD.assign(phase="tuning"), "must have trials to judge"),
    "duplicate": (
        pd.concat([GOOD, GOOD.iloc[4:5]]),
        "one row for each arm and seed, got 2 for arm 'arm' and seed 1",
    ),
    "missing seed": (GOOD.iloc[:5], "one row for each arm and seed, got 0 for arm 'arm' and seed 2"),
    "other seeds": (
        GOOD.assign(seed=range(6)),
        "one row for each arm and seed, got 0 for arm 'base' and seed 3",
    ),
    "unnamed arm": (GOOD.assign(arm=["base"] * 3 + ["arm", "arm", None]), "arm and the seed in every row"),
    "unnamed seed": (GOOD.assign(seed=[0, 1, 2, 0, 1, np.nan]), "arm and the seed in every row"),
    "one seed": (GOOD[GOOD["seed"] == 2], "at least 2 seeds, got 2 alone"),
    "one arm": (GOOD[GOOD["arm"] == "base"], "the baseline and another arm, got 'base' alone"),
    "words": (GOOD.assign(final_metric="low"), "final_metric must hold numbers"),
    "infinite, not marked": (
        GOOD.assign(final_metric=[1, 2, np.inf, 1, 2, 1], diverged=False),
        "finite or NaN where diverged is False",
    ),
    "odd marks": (GOOD.assign(diverged="no"), "diverged must be True or False"),
    "missing marks": (GOOD.assign(diverged=[True, None] * 3), "diverged must be True or False"),
    "complex": (GOOD.assign(final_metric=1j), "final_metric must hold numbers"),
    "times": (GOOD.assign(final_metric=pd.Timestamp(0)), "final_metric must hold numbers"),
    "numbered arms": (GOOD.assign(arm=[0, 0, 0, 1, 1, 1]), "arm must hold names, got 0"),
    "lists as arms": (GOOD.assign(arm=[[0]] * 6), r"arm must hold names, got \[0\]"),
    "words as seeds": (GOOD.assign(seed=list("abcabc")), "seed must hold numbers"),
    "a column twice": (pd.concat([GOOD, GOOD["arm"]], axis=1), "each column only once"),
    "lists as marks": (GOOD.assign(diverged=[[]] * 6), "diverged must be True or False"),
    "nullable marks": (
        GOOD.assign(diverged=pd.array([True, None] * 3, "boolean")),
        "diverged must be True or False",
    ),
    "baseline at 0": (GOOD.assign(final_metric=[0.0, 1, 2, 1, 2, 3]), "margin must be given, .* got 0"),
    "baseline below 0": (GOOD.assign(final_metric=[-1.0, 1, 2, 1, 2, 3]), "margin must be given, .* got -1"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_wrong_tables(case):
    table, message = BAD_TABLES[case]
    with pytest.raises(ValueError, match=message):
        judge(table, baseline="base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "bse"}, "baseline must be one of 'base', 'arm', got 'bse'"),
        ({"margin": 0}, r"margin must be a number in \(0, inf\), got 0"),
        ({"margin": -0.1}, "margin must be"),
        ({"margin": math.nan}, "margin must be"),
        ({"relative_margin": 0.0}, r"relative_margin must be a number in \(0, 1\)"),
        ({"relative_margin": 1.0}, "relative_margin must be"),
        ({"maximize": 1}, "maximize must be True or False, got 1"),
        ({"alpha": 0}, r"alpha must be a number in \(0, 1\), got 0"),
        ({"alpha": 1.0}, "alpha must be"),
        ({"look": 0}, r"look must be an integer in \[1, 100\], got 0"),
        ({"look": 1.5}, "look must be"),
        ({"resamples": -1}, "resamples must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        judge(GOOD, **{"baseline": "base", **options})


# ---- The sentence ----


def test_sentences():
    b = np.array([0.50, 0.60, 0.70, 0.80])
    noise = np.array([-0.01, 0.01, -0.01, 0.01])
    # Standard deviation 0.011547, t(0.975; 3) = 3.18245: the interval's half-width is 0.018374.
    assert judge_one(b - 0.1 + noise, b).sentence == (
        "arm is better than base: final metric 0.100 lower (15.4 %), 95 % interval 0.082 to 0.118 lower, "
        "4 seeds."
    )
    assert judge_one(b + 0.1 + noise, b, alpha=0.2).sentence == (  # t(0.9; 3) = 1.63774: 0.009456
        "arm is worse than base: final metric 0.1000 higher (15.4 %), 80 % interval 0.0905 to 0.1095 higher, "
        "4 seeds."
    )
    assert judge_one(b - 0.005 + noise, b, relative_margin=0.05).sentence == (
        "arm is equivalent to base, within 5 %: final metric 0.005 lower (0.77 %), 95 % interval 0.023 lower "
        "to 0.013 higher, 4 seeds."
    )
    assert judge_one(b, b, margin=0.02).sentence == (
        "arm is equivalent to base, within 0.02: final metric the same at all 4 seeds."
    )
    undecided = judge_one(b - 0.005 + noise, b)
    assert undecided.sentence == (
        "arm against base is undecided: final metric 0.005 lower (0.77 %), but the 95 % interval is 0.023 "
        f"lower to 0.013 higher, 4 seeds; about {undecided.seeds_needed} seeds would settle it, if the "
        "true effect equals the observed one."
    )
    hopeless = judge_one(b + 1e-6 + noise, b, margin=1e-9)
    assert "; not even 10000 seeds would settle it" in hopeless.sentence
    assert "but the 95 % interval is 0.018 lower to 0.018 higher" in hopeless.sentence
    assert (
        ", but the 95 % interval is 7e-05 lower to 0.037 higher" in judge_one(b + 0.0183 + noise, b).sentence
    )
    assert judge_one(b + 0.25, b).sentence == (
        "arm against base is undecided: final metric 0.250 higher (38.5 %) at each of 4 seeds, without any "
        "variation (deterministic task), so there is no interval over seeds."
    )
    table = make_table({"base": b, "arm": b - 0.1 + noise, "lost": np.array([0.5, 0.7, np.nan, np.nan])})
    verdicts = judge(table, baseline="base", look=1)
    assert verdicts["arm"].sentence.endswith(
        "lower (adjusted for 2 arms; wider, so that seeds may be added later), 4 seeds."
    )
    again = judge(table, baseline="base", look=2)["arm"].sentence
    assert again.endswith("lower (adjusted for 2 arms and added seeds), 4 seeds.")
    assert verdicts["lost"].sentence.endswith(
        "; 2 of 4 trials of lost diverged, counted as the worst metric."
    )


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e-2, 1.0, 1e3, 1e8])
def test_sentences_at_any_scale(scale):
    arms = {name: scale * values for name, values in noisy(0, {"base": 0.0, "arm": 0.1}).items()}
    verdict = judge(make_table(arms), baseline="base", resamples=0)["arm"]
    said = verdict.sentence.split("final metric ")[1].split()
    near, far = (said[said.index("interval") + place] for place in (1, 3))
    # Two digits of the half-width: the error is at most half of the last digit, 5 % of it.
    half = (verdict.interval[1] - verdict.interval[0]) / 2
    for word, value in zip((said[0], near, far), (verdict.effect, *verdict.interval), strict=True):
        assert float(word) == pytest.approx(abs(value), abs=0.051 * half)
        assert len(word) <= 9


# ---- Invariances ----


@st.composite
def tables(draw, most_arms=4):
    seeds = draw(st.integers(2, 7))
    quarters = st.lists(st.integers(1, 40), min_size=seeds, max_size=seeds)
    arms = draw(st.integers(1, most_arms))
    return make_table({name: np.array(draw(quarters)) / 4 for name in ("base", *"abcd"[:arms])})


looks = st.sampled_from([None, 1, 2, 3])
alphas = st.sampled_from([0.01, 0.05, 0.3])


def assert_alike(first, second, scale=1.0):
    """Compares two verdicts up to rounding; the first one's unit is `scale` times the second one's."""
    for v, w in ((first.effect, second.effect), *zip(first.interval, second.interval, strict=True)):
        assert v == pytest.approx(w / scale, rel=1e-7, abs=1e-9, nan_ok=True)
    assert first.p_value == pytest.approx(second.p_value, rel=1e-7, nan_ok=True)
    assert first.p_equivalence == pytest.approx(second.p_equivalence, rel=1e-7, nan_ok=True)
    for name in ("decision", "seeds", "seeds_needed", "diverged", "reason"):
        assert getattr(first, name) == getattr(second, name)


@given(tables(), looks, alphas)
def test_interval_excludes_zero_exactly_where_p_is_small(table, look, alpha):
    for verdict in judge(table, baseline="base", look=look, alpha=alpha, resamples=0).values():
        low, high = verdict.interval
        assert (low > 0 or high < 0) == (verdict.p_value < alpha)
        assert not low > verdict.effect and not high < verdict.effect
        if verdict.decision in ("better", "worse"):
            assert verdict.p_value < alpha and (high < 0) == (verdict.decision == "better")
        if verdict.decision == "undecided":
            assert not verdict.p_value < alpha and not verdict.p_equivalence < alpha


@given(tables(), st.randoms(use_true_random=False), looks)
def test_the_order_of_rows_and_arms_does_not_matter(table, random, look):
    rows = list(range(len(table)))
    random.shuffle(rows)
    verdicts = judge(table, baseline="base", look=look, resamples=20)
    assert judge(table.iloc[rows], baseline="base", look=look, resamples=20) == verdicts


@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_seeds_does_not_matter(table, random):
    seeds = sorted(table["seed"].unique())
    names = dict(zip(seeds, random.sample(range(1000), len(seeds)), strict=True))
    renamed = judge(table.assign(seed=table["seed"].map(names)), baseline="base", resamples=0)
    for arm, verdict in judge(table, baseline="base", resamples=0).items():
        assert_alike(renamed[arm], verdict)


@given(tables(), st.sampled_from([1e-6, 0.3, 7.0, 1e5]), looks)
def test_the_unit_of_the_metric_does_not_matter(table, scale, look):
    verdicts = judge(table, baseline="base", look=look, resamples=0)
    scaled = table.assign(final_metric=scale * table["final_metric"])
    for arm, verdict in judge(scaled, baseline="base", look=look, resamples=0).items():
        assert_alike(verdicts[arm], verdict, scale)


@given(tables(), looks)
def test_maximizing_is_minimizing_the_negative(table, look):
    marks = table.assign(
        diverged=(table["seed"] + table["arm"].map(len)) % 4 == 0, best_metric=3 * table["final_metric"]
    )
    marks = marks.assign(initial_metric=5.0)
    negative = marks.assign(
        **{name: -marks[name] for name in ("final_metric", "best_metric", "initial_metric")}
    )
    verdicts = judge(marks, baseline="base", margin=0.9, look=look, resamples=0)
    mirrored = judge(negative, baseline="base", margin=0.9, look=look, resamples=0, maximize=True)
    for arm, verdict in verdicts.items():
        low, high = mirrored[arm].interval
        other = dataclasses.replace(mirrored[arm], effect=-mirrored[arm].effect, interval=(-high, -low))
        assert_alike(verdict, other)
        assert verdict.best_effect == pytest.approx(-mirrored[arm].best_effect, nan_ok=True)


@given(tables(), st.sampled_from([-1000.0, -3.3, 0.7, 50.0]), looks)
def test_a_shift_does_not_matter_with_an_absolute_margin(table, shift, look):
    verdicts = judge(table, baseline="base", margin=0.9, look=look, resamples=0)
    shifted = table.assign(final_metric=table["final_metric"] + shift)
    for arm, verdict in judge(shifted, baseline="base", margin=0.9, look=look, resamples=0).items():
        assert_alike(verdicts[arm], verdict)


@given(tables(most_arms=1), looks, alphas)
def test_exchanging_arm_and_baseline_exchanges_better_and_worse(table, look, alpha):
    options = {"margin": 0.4, "look": look, "alpha": alpha, "resamples": 0}
    forth = judge(table, baseline="base", **options)["a"]
    back = judge(table, baseline="a", **options)["base"]
    exchanged = {"better": "worse", "worse": "better"}.get(back.decision, back.decision)
    low, high = back.interval
    assert_alike(
        forth, dataclasses.replace(back, decision=exchanged, effect=-back.effect, interval=(-high, -low))
    )

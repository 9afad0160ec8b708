"""`Sequential`: its levels against published tables, a reference and simulation; judging by its looks."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
from reference.group_sequential import crossing_probabilities, spending_bounds
from reference.power import ALPHA, difference_power
from scipy import stats
from test_error_rates import TABLES, assert_at_most, assert_share, band, heavy_tailed, holm, skewed

from adaptive_optax import study
from adaptive_optax.study.statistics.judge import judge, planned_spending
from adaptive_optax.study.statistics.sequential import Sequential, nominal_levels

PLAN = Sequential()

# ---- The plan ----


def test_looks():
    assert PLAN.looks == (5, 6, 8, 10, 13, 16, 20, 25, 32)
    assert Sequential(10, 10).looks == (10,)
    assert Sequential(10, 11).looks == (10, 11)
    assert Sequential(5, 100_000).looks[-1] == 100_000
    for first, most in [(5, 6), (5, 7), (5, 40), (20, 200), (7, 100_000)]:
        looks = np.array(Sequential(first, most).looks)
        assert (looks[0], looks[-1]) == (first, most)
        assert (np.diff(looks) > 0).all()
        assert (looks[1:] <= np.ceil(1.35 * looks[:-1])).all()
    assert study.Sequential is Sequential
    assert Sequential(np.int64(6), np.int64(9)) == Sequential(6, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 4}, r"first must be an integer in \[5, 100000\], got 4"),
        ({"first": 5.0}, "first must be an integer"),
        ({"first": True}, "first must be"),
        ({"first": 8, "most": 7}, r"most must be an integer in \[8, 100000\] \(first is the least\), got 7"),
        ({"most": 100_001}, "most must be"),
    ],
)
def test_wrong_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sequential(**arguments)


# ---- Levels ----


def test_the_reference_has_the_published_boundaries():
    # Five looks, equally spaced, two-sided 5 %: Jennison and Turnbull 2000, tables 2.1 and 2.3.
    looks = np.arange(1, 6)
    pocock, obrien_fleming = np.full(5, 2.413), 2.040 * np.sqrt(5 / looks)
    for bounds in (pocock, obrien_fleming):
        assert crossing_probabilities(looks, bounds).sum() == pytest.approx(ALPHA, abs=1e-4)


def lan_demets(kind, share):
    """The spending functions of Lan and DeMets 1983, as shares of alpha = 0.05 (twice 0.025, one-sided)."""
    if kind == "Pocock":
        return np.log(1 + (math.e - 1) * share)
    return 4 * stats.norm.sf(stats.norm.isf(ALPHA / 4) / np.sqrt(share)) / ALPHA


PUBLISHED = {
    "Pocock": [2.438, 2.427, 2.410, 2.397, 2.386],
    "O'Brien and Fleming": [4.877, 3.357, 2.680, 2.290, 2.031],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_with_many_seeds_the_levels_are_the_published_ones(kind):
    # t-statistics of thousands of seeds are as good as normal.
    share = np.arange(1, 6) / 5
    spent = lan_demets(kind, share)
    levels = nominal_levels(tuple(20_000 * k for k in range(1, 6)), tuple(spent.tolist()), ALPHA, 2)
    bounds = stats.norm.isf(np.array(levels) / 2)
    np.testing.assert_allclose(bounds, PUBLISHED[kind], atol=6e-4)
    np.testing.assert_allclose(bounds, spending_bounds(share, ALPHA * spent), atol=2e-4)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("steps", [(1, 2, 5, 9), (7, 8, 20, 64), (1, 1.25, 1.5, 2)])
def test_with_many_seeds_the_levels_are_those_of_the_reference(steps, sides):
    information = np.array(steps) / steps[-1]
    spent = (0.2, 0.35, 0.5, 1.0)
    looks = tuple(round(50_000 * share) for share in information)
    levels = nominal_levels(looks, spent, ALPHA, sides)
    bounds = spending_bounds(information, ALPHA * np.array(spent), sides)
    np.testing.assert_allclose(stats.norm.isf(np.array(levels) / sides), bounds, atol=5e-4)


def drawn_p_values(looks, tables, effect=0.0, seed=0):
    """One-sided p-values of t-tests of growing normal samples, [looks, tables]."""
    rng = np.random.default_rng(seed)
    total, squares, before, found = np.zeros(tables), np.zeros(tables), 0, []
    for n in looks:
        more = n - before
        step = effect * more + math.sqrt(more) * rng.standard_normal(tables)
        inside = rng.chisquare(more - 1, tables) if more > 1 else 0.0
        total, squares, before = total + step, squares + step**2 / more + inside, n
        error = np.sqrt((squares - total**2 / n) / (n - 1) / n)
        found.append(stats.t.sf(total / n / error, n - 1))
    return np.array(found)


PLANS = [(5, 32), (5, 6), (7, 20), (10, 200), (20, 24)]


@functools.cache
def null_p_values(first, most):
    return drawn_p_values(Sequential(first, most).looks, 200_000)


@pytest.mark.parametrize(("first", "most"), PLANS)
def test_each_look_spends_its_share(first, most):
    plan = Sequential(first, most)
    one_sided = null_p_values(first, most)
    for alpha, sides in ((ALPHA, 2), (ALPHA / 4, 2), (ALPHA, 1)):
        p = one_sided if sides == 1 else 2 * np.minimum(one_sided, 1 - one_sided)
        crossed = p < np.array(plan.levels(alpha, sides=sides))[:, None]
        by_now = np.logical_or.accumulate(crossed, axis=0).mean(axis=1)
        k = np.arange(1, len(plan.looks) + 1)
        spent = (1 - 0.6**k) / 4 + 0.75 * (np.array(plan.looks) / most) ** 8
        spent[-1] = 1
        for share, expected in zip(by_now, alpha * spent, strict=True):
            assert share == pytest.approx(expected, abs=band(expected, p.shape[1]))


def test_levels_of_brownian_motion_would_err_too_often():
    information = np.array(PLAN.looks) / 32
    k = np.arange(1, 10)
    spent = np.append(((1 - 0.6**k) / 4 + 0.75 * information**8)[:-1], 1)
    levels = 2 * stats.norm.sf(spending_bounds(information, ALPHA * spent))
    one_sided = null_p_values(5, 32)
    p = 2 * np.minimum(one_sided, 1 - one_sided)
    wrong = (p < levels[:, None]).any(axis=0).mean()
    assert 0.052 < wrong < 0.054
    assert wrong > ALPHA + band(ALPHA, p.shape[1])


@pytest.mark.parametrize(("first", "most"), [(5, 32), (5, 9), (20, 40)])
def test_levels_grow_with_alpha_and_shares_with_them(first, most):
    # Holm's procedure needs the first, and judging several arms by the shares of the smallest alpha the last.
    plan = Sequential(first, most)
    for sides in (1, 2):
        alphas = [ALPHA / 20, ALPHA / 4, ALPHA / 2, ALPHA]
        levels = np.array([plan.levels(alpha, sides=sides) for alpha in alphas])
        assert (np.diff(levels, axis=0) > 0).all()
        shares = levels / np.array(alphas)[:, None]
        assert (shares > 0).all() and (shares <= 1).all()
        one_sided = null_p_values(first, most)
        p = one_sided if sides == 1 else 2 * np.minimum(one_sided, 1 - one_sided)
        for alpha in alphas[1:]:
            for smaller in shares[: alphas.index(alpha)]:
                wrong = (p < alpha * smaller[:, None]).any(axis=0)
                assert wrong.mean() <= alpha + band(alpha, p.shape[1])


def test_extreme_error_rates():
    for alpha in (1e-12, 1e-6, 0.5, 0.9, 0.999):
        for sides in (1, 2):
            levels = np.array(PLAN.levels(alpha, sides=sides))
            assert ((levels > 0) & (levels < 1)).all()
    # Where looks exclude each other the levels are Bonferroni's.
    assert sum(PLAN.levels(1e-12)) == pytest.approx(1e-12, rel=0.1)
    assert Sequential(9, 9).levels(0.05) == (0.05,)


# ---- Power and seeds ----


@functools.cache
def race_of(effect):
    """The expected number of seeds and the power of the default plan, on 100 000 tables."""
    p = drawn_p_values(PLAN.looks, 100_000, effect, seed=1)
    crossed = 2 * np.minimum(p, 1 - p) < np.array(PLAN.levels(ALPHA))[:, None]
    first = np.where(crossed.any(axis=0), crossed.argmax(axis=0), len(PLAN.looks) - 1)
    return np.array(PLAN.looks)[first].mean(), crossed.any(axis=0).mean()


@pytest.mark.parametrize("effect", [0.0, 0.5, 1.0, 2.0])
def test_seeds_and_power(effect):
    seeds, power = race_of(effect)
    fixed = 1.0 if effect > 1 else difference_power(32, effect)  # SciPy's noncentral t gives NaN
    assert power >= fixed - 0.03
    if not effect:
        assert power == pytest.approx(ALPHA, abs=band(ALPHA, 100_000))
    most = {0.0: 31.7, 0.5: 27.8, 1.0: 16.0, 2.0: 7.0}
    assert seeds <= most[effect]


# ---- Judging by looks ----


class Replayed:
    """Judges 10 000 tables at once by the rules of the plan: [tables, arms, seeds], the baseline first.

    Attributes:
        decision: [tables, arms]
        seeds: The number of seeds after which each arm stopped, likewise.
    """

    def __init__(self, metrics, plan, margin=1e-9):
        arms = metrics.shape[1] - 1
        differences = metrics[:, 1:] - metrics[:, :1]
        shape = differences.shape[:2]
        self.decision = np.full(shape, "undecided", dtype=object)
        self.seeds = np.full(shape, plan.most)
        ratios = np.ones((2, *shape))
        two, one = (np.array(plan.levels(ALPHA / arms, sides=sides)) * arms / ALPHA for sides in (2, 1))
        for k, n in enumerate(plan.looks):
            running = self.decision == "undecided"
            d = differences[:, :, :n]
            mean, error = d.mean(axis=2), d.std(axis=2, ddof=1) / math.sqrt(n)
            p_difference = 2 * stats.t.sf(np.abs(mean / error), n - 1)
            p_equivalence = stats.t.sf((margin - np.abs(mean)) / error, n - 1)
            now = np.stack([p_difference / two[k], p_equivalence / one[k]])
            ratios = np.where(running, now, ratios)
            different, equivalent = (holm(ratio) < ALPHA for ratio in ratios)
            self.decision[running & different] = np.where(mean < 0, "better", "worse")[running & different]
            self.decision[running & equivalent] = "equivalent"
            self.seeds[running & (self.decision != "undecided")] = n


def as_table(metrics):
    names = ["base", *(f"arm {number}" for number in range(1, len(metrics)))]
    seeds = np.arange(metrics.shape[1])
    return pd.DataFrame(
        {
            "arm": np.repeat(names, len(seeds)),
            "seed": np.tile(seeds, len(names)),
            "final_metric": metrics.ravel(),
        }
    )


def mixed(rng, tables, arms, seeds=32):
    """Arms from much better than the baseline to equal to it."""
    shifts = rng.choice([0, 0, 0.5, 1, -2, 3], (tables, arms, 1)) * math.sqrt(2)
    metrics = 10 + rng.standard_normal((tables, arms + 1, seeds))
    metrics[:, 1:] += shifts
    return metrics


@pytest.mark.parametrize("arms", [1, 4])
def test_judge_replays_the_plan(arms):
    metrics = mixed(np.random.default_rng(10), 100 // arms, arms)
    margin = 0.6 * math.sqrt(2)
    replayed = Replayed(metrics, PLAN, margin)
    assert {*replayed.decision.ravel()} == {"better", "worse", "equivalent", "undecided"}
    for table, decision, seeds in zip(metrics, replayed.decision, replayed.seeds, strict=True):
        verdicts = judge(as_table(table), baseline="base", margin=margin, sequential=PLAN, resamples=0)
        assert [verdict.decision for verdict in verdicts.values()] == decision.tolist()
        assert [verdict.seeds for verdict in verdicts.values()] == seeds.tolist()
        # Seeds that decided arms did not get do not matter, nor the order of the rows.
        given = as_table(table)
        last = dict(zip(verdicts, seeds.tolist(), strict=True)) | {"base": max(seeds)}
        given = given[given["seed"] < given["arm"].map(last)].iloc[::-1]
        again = judge(given, baseline="base", margin=margin, sequential=PLAN, resamples=0)
        assert again == verdicts
        for verdict in verdicts.values():
            low, high = verdict.interval
            assert (low > 0 or high < 0) == (verdict.p_value < ALPHA)


DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "skewed": skewed,
    "heavy-tailed": heavy_tailed,
}


@pytest.mark.parametrize("arms", [1, 4])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_type_one_error_over_arms_and_looks(name, arms):
    metrics = DISTRIBUTIONS[name](np.random.default_rng(11), (TABLES, arms + 1, 32))
    wrong = (Replayed(metrics, PLAN).decision != "undecided").any(axis=1)
    assert_at_most(wrong, ALPHA)
    if (name, arms) == ("normal", 1):
        assert_share(wrong, ALPHA)


@pytest.mark.parametrize(("first", "most"), [(5, 12), (10, 60), (20, 200)])
def test_type_one_error_of_other_plans(first, most):
    metrics = np.random.default_rng(12).standard_normal((TABLES, 3, most))
    assert_at_most((Replayed(metrics, Sequential(first, most)).decision != "undecided").any(axis=1), ALPHA)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_family_wise_error_where_some_arms_stop_early(shift):
    # Two arms equal the baseline. The others are found at some look, which gives these two larger levels.
    metrics = np.random.default_rng(13).standard_normal((TABLES, 5, 32))
    metrics[:, 3:] += shift * math.sqrt(2)
    decision = Replayed(metrics, PLAN).decision
    assert_at_most((decision[:, :2] != "undecided").any(axis=1), ALPHA)


def test_equivalence_is_wrong_in_at_most_alpha_of_the_tables():
    margin = 0.7 * math.sqrt(2)
    metrics = np.random.default_rng(14).standard_normal((TABLES, 2, 32))
    metrics[:, 1] += margin
    equivalent = Replayed(metrics, PLAN, margin).decision == "equivalent"
    assert_at_most(equivalent, ALPHA)
    # An arm of which a difference was found stops, so that not all of alpha is used.
    assert equivalent.mean() > ALPHA / 4
    several = np.random.default_rng(15).standard_normal((TABLES, 5, 32))
    several[:, 3] += margin
    several[:, 4] -= margin
    found = Replayed(several, PLAN, margin).decision
    assert_at_most((found[:, 2:] == "equivalent").any(axis=1), ALPHA)
    assert (found[:, :2] == "equivalent").mean() > 0.5


def test_repeated_intervals_cover_the_effect_at_all_looks_together():
    effect = 0.5 * math.sqrt(2)
    metrics = np.random.default_rng(16).standard_normal((TABLES, 2, 32))
    d = metrics[:, 1] + effect - metrics[:, 0]
    outside = np.zeros(TABLES, bool)
    for n, level in zip(PLAN.looks, PLAN.levels(ALPHA), strict=True):
        x = d[:, :n]
        half = stats.t.isf(level / 2, n - 1) * x.std(axis=1, ddof=1) / math.sqrt(n)
        outside |= np.abs(x.mean(axis=1) - effect) > half
    assert_share(outside, ALPHA)
    # And these are the intervals of the verdicts.
    for n, level in zip(PLAN.looks, PLAN.levels(ALPHA), strict=True):
        table = as_table(10 + metrics[0, :, :n] * 1e-3)
        verdict = judge(table, baseline="base", margin=1e-9, sequential=PLAN, resamples=0)["arm 1"]
        x = 1e-3 * (metrics[0, 1, :n] - metrics[0, 0, :n])
        half = stats.t.isf(level / 2, n - 1) * x.std(ddof=1) / math.sqrt(n)
        if verdict.seeds == n:
            assert verdict.interval == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-6, abs=1e-12)


def test_seeds_after_the_last_complete_look_are_not_judged():
    metrics = 10 + np.random.default_rng(17).standard_normal((3, 40))
    options = {"baseline": "base", "margin": 1e-9, "sequential": PLAN}
    for given, judged in ((5, 5), (7, 6), (9, 8), (31, 25), (40, 32)):
        verdicts = judge(as_table(metrics[:, :given]), **options)
        assert verdicts == judge(as_table(metrics[:, :judged]), **options)
        assert {verdict.seeds for verdict in verdicts.values()} == {judged}


def test_one_look_is_judging_without_a_plan():
    table = as_table(10 + np.random.default_rng(18).standard_normal((4, 8)))
    planned = judge(table, baseline="base", sequential=Sequential(8, 8))
    plain = judge(table, baseline="base")
    assert planned == plain


def test_sentences_say_which_look_it_was():
    rng = np.random.default_rng(19)
    base = 0.6 + 0.01 * rng.standard_normal(32)
    arms = {"base": base, "good": base - 0.1 + 0.001 * rng.standard_normal(32)}
    arms["same"] = base.copy()
    arms["close"] = base - 0.003 + 0.02 * rng.standard_normal(32)
    table = as_table(np.array(list(arms.values())))
    table["arm"] = np.repeat(list(arms), 32)
    verdicts = judge(table[table["seed"] < 13], baseline="base", sequential=PLAN)
    assert verdicts["good"].sentence.endswith(
        "lower (adjusted for 3 arms and 9 looks), 5 seeds. This was look 1 of 9; the last one has 32 seeds."
    )
    assert verdicts["same"].sentence == (
        "same is equivalent to base, within 1 %: final metric the same at all 5 seeds. This was look 1 of 9; "
        "the last one has 32 seeds."
    )
    close = verdicts["close"]
    assert close.sentence.endswith(
        f"13 seeds; about {close.seeds_needed} seeds would settle it, if the true effect equals the observed "
        "one. This was look 5 of 9; the last one has 32 seeds."
    )


def test_seeds_needed_is_at_the_level_of_the_last_look():
    z = np.array([-1, 1, -0.5, 0.5, 0, 0.8, -0.8, 0.0])
    x = 0.6 + (z - z.mean()) / z.std(ddof=1)
    table = as_table(np.stack([np.zeros(8), x]))
    verdict = judge(table, baseline="base", margin=1e-6, sequential=PLAN)["arm 1"]
    assert verdict.decision == "undecided"
    last = PLAN.levels(ALPHA)[-1]
    powers = [difference_power(n, 0.6, last) for n in (verdict.seeds_needed - 1, verdict.seeds_needed)]
    assert powers[0] < 0.8 <= powers[1]


def test_diverged_trials_decide_by_look():
    # All of one arm's trials diverge: worse at the first look, whatever else.
    metrics = 1 + 0.01 * np.random.default_rng(20).standard_normal((3, 8))
    metrics[1] = np.nan
    verdicts = judge(as_table(metrics), baseline="base", sequential=PLAN, margin=1e-9)
    assert verdicts["arm 1"].decision == "worse"
    assert (verdicts["arm 1"].seeds, verdicts["arm 2"].seeds) == (5, 8)


GOOD = as_table(10 + np.random.default_rng(21).standard_normal((2, 8)))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"sequential": 5}, "sequential must be a study.Sequential, got 5"),
        ({}, {"look": 1}, "look must be None with sequential, which has its own looks, got 1"),
        ({}, {"sequential": Sequential(9, 10)}, "at least the 9 seeds of the first look, got 8 of the base"),
        ({}, {"baseline": "bse"}, "baseline must be one of 'base', 'arm 1', got 'bse'"),
        ({"final_metric": "low"}, {}, "final_metric must hold numbers"),
        ({"seed": list("abcdefgh") * 2}, {}, "seed must hold numbers"),
        ({"arm": ["base"] * 8 + [None] * 8}, {}, "name the arm and the seed in every row"),
        ({"arm": "base"}, {}, "got 2 for arm 'base' and seed 0|the baseline and another arm"),
    ],
)
def test_wrong_input(change, options, message):
    options = {"baseline": "base", "margin": 1.0, "sequential": PLAN} | options
    with pytest.raises(ValueError, match=message):
        judge(GOOD.assign(**change), **options)


def test_an_undecided_arm_without_new_seeds_keeps_its_verdict():
    metrics = 10 + np.random.default_rng(18).standard_normal((3, 32))
    whole, options = as_table(metrics), {"baseline": "base", "margin": 1e-9, "sequential": PLAN}
    table = whole[(whole["arm"] != "arm 1") | (whole["seed"] < 6)]
    verdicts = judge(table, **options)
    assert [(v.decision, v.seeds) for v in verdicts.values()] == [("undecided", 6), ("undecided", 32)]
    assert verdicts["arm 1"] == judge(whole[whole["seed"] < 6], **options)["arm 1"]
    assert "(adjusted for 2 arms" in verdicts["arm 2"].sentence  # it counts on in Holm's step-down
    # Some of the new seeds are not enough, nor are none of the first.
    with pytest.raises(ValueError, match="got 0 for arm 'arm 1' and seed 7"):
        judge(whole[(whole["arm"] != "arm 1") | (whole["seed"] < 7)], **options)
    with pytest.raises(ValueError, match="got none of the first look for arm 'arm 1'"):
        judge(whole[(whole["arm"] != "arm 1") | (whole["seed"] > 5)], **options)


def test_shares_are_those_of_the_smallest_level():
    spending = planned_spending(PLAN, ALPHA, 4)
    assert [each.difference for each in spending] == pytest.approx(
        [level * 4 / ALPHA for level in PLAN.levels(ALPHA / 4)]
    )
    assert [each.equivalence for each in spending] == pytest.approx(
        [level * 4 / ALPHA for level in PLAN.levels(ALPHA / 4, sides=1)]
    )
    assert spending[3].place == (4, 9, 32)
    assert all(each.next == (spending[-1].difference, spending[-1].equivalence) for each in spending)

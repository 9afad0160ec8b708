"""The comparison as a whole: oracles with closed forms, pairing, growth of the grid, and what is reported."""

import collections
import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.stats
from quadratic import best_schedule, constant, decayed, expected_at_constant_rate, quadratic_task

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.engine.trials import TELEMETRY
from adaptive_optax.study.statistics.tuning import Grid

QUICK = {"mode": "scan", "chunk": 1, "progress": False}
H, C, STEPS = 2.0, 1.0, 60


@pytest.fixture(scope="module")
def noisy():
    """With gradient noise: constant against the best schedule."""
    return study.compare(
        quadratic_task(H, C),
        {"constant": constant, "decayed": decayed(H, C)},
        learning_rates={"constant": [0.02, 0.04, 0.08, 0.16, 0.32], "decayed": [0.5, 1.0, 2.0]},
        steps=STEPS,
        seeds=10,
        **QUICK,
    )


def test_with_gradient_noise_the_decaying_schedule_is_better(noisy):
    verdict = noisy.verdict()
    assert verdict.decision == "better"
    assert verdict.interval[1] < 0


def test_with_gradient_noise_the_losses_are_those_of_theory(noisy):
    assert noisy.info["best_rates"]["decayed"] == 1.0  # the scale at which the schedule is the best one
    fresh = noisy.table[noisy.table["phase"] == "verdict"]
    grid = noisy.info["grid"]["constant"]
    theory = {rate: H / 2 * expected_at_constant_rate(H, C, STEPS, rate) for rate in grid}
    # The best two constant rates are 8 % apart in expectation, so tuning may take either.
    assert theory[noisy.info["best_rates"]["constant"]] < 1.2 * min(theory.values())
    expected = {
        "constant": theory[noisy.info["best_rates"]["constant"]],
        "decayed": H / 2 * best_schedule(H, C, STEPS)[1],
    }
    for arm, value in expected.items():
        metric = fresh.loc[fresh["arm"] == arm, "final_metric"]
        # A mean of 16 squares of normals has the relative standard deviation sqrt(2 / 16).
        error = value * math.sqrt(2 / 16 / len(metric))
        assert abs(metric.mean() - value) < 4 * error


def test_without_noise_the_decaying_schedule_is_not_better():
    comparison = study.compare(
        quadratic_task(H, 0.0),
        {"constant": constant, "decayed": lambda rate, steps: ao.sgd(ao.exponential_decay(rate, steps, 0.1))},
        learning_rates=[0.125, 0.25, 0.5, 0.75],
        steps=20,
        seeds=6,
        margin=1e-6,
        **QUICK,
    )
    assert comparison.info["best_rates"]["constant"] == 1 / H
    assert comparison.verdict().decision != "better"
    assert comparison.table.query("arm == 'constant' and phase == 'verdict'")["final_metric"].max() == 0


def test_equal_arms_are_not_told_apart():
    """Equal in distribution, with their own noise: wrong verdicts in at most 5 % of 200 comparisons.

    The comparisons are of 6 seeds each, taken from one study of 1200: one rate, as arms that were tuned to
    different rates do differ, so that tuning has nothing to say.
    """
    comparison = study.compare(
        quadratic_task(1.0, 1.0, dimensions=4),
        {"a": constant, "b": constant},
        learning_rates=[0.15],
        steps=10,
        seeds=1200,
        tuning_seeds=2,
        growth=0,
        paired_batches=False,
        mode="scan",
        chunk=150,
        progress=False,
    )
    fresh = comparison.table[comparison.table["phase"] == "verdict"]
    decisions, p_values = collections.Counter(), []
    for _, table in fresh.groupby((fresh["seed"] - fresh["seed"].min()) // 6):
        verdict = study.judge(table, baseline="a", look=1)["b"]
        assert verdict.seeds == 6
        decisions[verdict.decision] += 1
        p_values.append(verdict.p_value)
        assert verdict.effect != 0  # they can be told apart by mistake
    assert len(p_values) == 200
    wrong = decisions["better"] + decisions["worse"]
    assert wrong <= scipy.stats.binom.ppf(0.999, 200, 0.05)
    # The first look doubles p, so that a quarter of the adjusted values lie below a half.
    low, high = scipy.stats.binom.ppf([0.001, 0.999], 200, 0.25)
    assert low <= sum(p < 0.5 for p in p_values) <= high


def test_a_comparison_judges_its_fresh_seeds_at_its_look():
    comparison = study.compare(
        quadratic_task(1.0, 1.0, dimensions=4),
        {"a": constant, "b": constant},
        learning_rates=[0.15],
        steps=10,
        seeds=6,
        tuning_seeds=2,
        paired_batches=False,
        **QUICK,
    )
    assert comparison.verdict() == study.judge(comparison.table, baseline="a", look=1)["b"]


def test_identical_arms_have_equal_trials():
    comparison = study.compare(
        quadratic_task(1.0, 1.0),
        {"a": constant, "b": lambda rate, steps: ao.sgd(rate)},
        learning_rates=[0.1, 0.2, 0.4],
        steps=10,
        seeds=5,
        **QUICK,
    )
    verdict = comparison.verdict()
    assert verdict.effect == 0 and verdict.decision == "equivalent"


def test_tuning_and_verdict_share_no_seed(noisy):
    seeds = noisy.table.groupby("phase")["seed"].agg(set)
    assert not seeds["tuning"] & seeds["verdict"]
    assert len(seeds["tuning"]) == 3 and len(seeds["verdict"]) == 10


def test_the_grid_grows_at_its_edge_and_says_so():
    rates = {"low": [0.1, 0.2], "high": [0.001, 0.002]}
    comparison = study.compare(
        quadratic_task(1.0, 0.0),
        {"low": lambda rate, steps: ao.sgd(rate * 20), "high": constant},
        learning_rates=rates,
        steps=5,
        seeds=5,
        **QUICK,
    )
    # low: the best of r is 1/20, one step beyond; high: 1, far beyond the three steps that it may take.
    assert comparison.info["grid"] == {
        "low": [0.025, 0.05, 0.1, 0.2],
        "high": [0.001, 0.002, 0.004, 0.008, 0.016],
    }
    assert comparison.info["grown"] == {"low": [0.025, 0.05], "high": [0.004, 0.008, 0.016]}
    assert comparison.info["on_edge"] == {"low": False, "high": True}
    assert comparison.info["best_rates"] == {"low": 0.05, "high": 0.016}


def test_growth_goes_on_as_the_grid_does():
    grid = Grid([0.001, 0.003, 0.01], growth=3)
    assert grid.extend(0.01) == [0.03]
    assert grid.extend(0.03) == [0.1]
    assert Grid([0.1], growth=1).extend(0.1) == [0.03162, 0.3162]
    assert Grid([0.1, 0.2, 0.4], growth=3).extend(0.2) == []
    assert Grid([0.1, 0.2], growth=0).extend(0.1) == []
    assert Grid([0.1, 0.2], growth=3).best({0.1: 1.0, 0.2: 1.0}) == 0.1  # a tie goes to the lower rate


def test_diverged_trials_are_outcomes():
    comparison = study.compare(
        quadratic_task(1.0, 0.0),
        {"stable": constant, "wild": lambda rate, steps: ao.sgd(rate * 1e6)},
        learning_rates=[0.1, 0.5],
        steps=40,
        seeds=5,
        growth=0,
        margin=1e-3,
        **QUICK,
    )
    wild = comparison.table[comparison.table["arm"] == "wild"]
    assert wild["diverged"].all() and wild["final_metric"].isna().all()
    assert wild["initial_metric"].notna().all()
    verdict = comparison.verdict("wild")
    assert verdict.decision == "worse" and verdict.diverged == (5, 0)
    assert comparison.info["best_rates"]["wild"] == 0.1


def test_an_arm_that_refuses_a_traced_rate_is_compiled_per_rate():
    traces = collections.Counter()

    def traced(rate, steps):
        traces["traced"] += 1
        return ao.sgd(rate)

    def refusing(rate, steps):
        traces["refusing"] += 1
        return ao.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, 2, steps))

    task = quadratic_task(1.0, 0.1)
    many = study.compare(
        task,
        {"traced": traced, "refusing": refusing},
        learning_rates=[0.05, 0.1, 0.2, 0.4, 0.8],
        steps=10,
        seeds=5,
        growth=0,
        **QUICK,
    )
    kinds = many.table.groupby("arm")["compilation"].unique()
    assert kinds["traced"].tolist() == ["once"] and kinds["refusing"].tolist() == ["per rate"]
    # Three calls in the check (its type, its init, its update), one to say what of it is judged, and two when
    # the programs are compiled.
    assert traces["traced"] == 3 + 1 + 2
    assert traces["refusing"] > 2 * 5


def test_evaluate_judges_averaged_parameters():
    arms = {"last": constant, "averaged": lambda r, n: optax.chain(ao.sgd(r), ao.average_parameters())}
    settings = {"learning_rates": [0.3], "steps": 300, "seeds": 8, "growth": 0} | QUICK
    task = quadratic_task(1.0, 1.0)
    comparison = study.compare(task, arms, evaluate=ao.averaged_parameters, **settings)
    assert comparison.verdict("averaged").decision == "better"
    not_this_arm = study.compare(task, arms, evaluate={"averaged": None}, **settings)
    # The trained parameters are those of plain SGD, but for rounding: the two arms are two programs.
    assert abs(not_this_arm.verdict("averaged").relative_effect) < 1e-5


def test_steps_to_the_baseline(noisy):
    table = noisy.table[noisy.table["phase"] == "verdict"]
    fresh = table.set_index(["arm", "seed"])
    for position, (_, row) in enumerate(noisy.table.iterrows()):
        if row["phase"] == "tuning":
            assert math.isnan(row["steps_to_baseline"])
            continue
        target = fresh.loc[("constant", row["seed"]), "final_metric"]
        reached = noisy.validation_steps[noisy.validation_curves[position] <= target]
        np.testing.assert_equal(row["steps_to_baseline"], reached[0] if len(reached) else math.nan)
    assert table.loc[table["arm"] == "decayed", "steps_to_baseline"].median() < STEPS


def test_curves_end_where_the_table_does(noisy):
    assert noisy.validation_steps[0] == 0 and noisy.validation_steps[-1] == STEPS
    assert noisy.training_steps[-1] == STEPS
    np.testing.assert_array_equal(noisy.validation_curves[:, -1], noisy.table["final_metric"])
    np.testing.assert_array_equal(noisy.validation_curves[:, 0], noisy.table["initial_metric"])
    np.testing.assert_array_equal(noisy.validation_curves.min(axis=1), noisy.table["best_metric"])
    assert noisy.training_curves.shape == (len(noisy.table), len(noisy.training_steps))
    assert noisy.telemetry_curves.shape == (len(noisy.table), len(noisy.telemetry_steps), len(TELEMETRY))


def test_a_file_from_before_there_were_limits_is_read(noisy, tmp_path):
    curves = noisy.telemetry_curves
    dataclasses.replace(noisy, telemetry_curves=curves[..., :4]).save(tmp_path / "old.npz")
    loaded = study.load(tmp_path / "old.npz")
    np.testing.assert_array_equal(loaded.telemetry_curves, curves)  # without a limit, the rest is NaN


def test_save_and_load_round_trip_exactly(noisy, tmp_path):
    noisy.save(tmp_path / "comparison.npz")
    loaded = study.load(tmp_path / "comparison.npz")
    pd.testing.assert_frame_equal(loaded.table, noisy.table, check_exact=True)
    arrays = [field.name for field in dataclasses.fields(loaded) if field.type == "np.ndarray"]
    assert len(arrays) == 6
    for name in arrays:
        ours, theirs = getattr(loaded, name), getattr(noisy, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.details == noisy.details and loaded.info == noisy.info
    assert loaded.verdicts == noisy.verdicts
    (tmp_path / "other").write_text("no comparison")
    with pytest.raises(ValueError, match="path must be a file written by Comparison.save"):
        study.load(tmp_path / "other")
    with pytest.raises(ValueError, match="got the folder .*study.compare again with out="):
        study.load(tmp_path)


def test_a_metric_that_is_not_positive_needs_a_margin():
    task = quadratic_task(1.0, 0.0)
    shifted = study.Task(
        task.init,
        task.loss,
        task.train,
        task.validation,
        batch_size=2,
        metric=lambda x, b: jnp.mean(x**2) - 1,
    )
    comparison = study.compare(
        shifted,
        {"a": constant, "b": decayed(1.0, 1.0)},
        learning_rates=[0.1, 0.2],
        steps=10,
        seeds=5,
        **QUICK,
    )
    with pytest.raises(ValueError, match="margin"):
        comparison.verdict()
    assert comparison.with_margin(0.01).verdict().decision in ("better", "worse", "equivalent", "undecided")


GOOD = {"learning_rates": [0.1, 0.2], "steps": 2, "seeds": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": constant}}, "arms must hold at least two"),
        ({"arms": "adam:constant"}, "arms must map names"),
        ({"arms": ["adam:constant", "adam:sideways"]}, "the schedule must be one of .* got 'sideways'"),
        ({"arms": ["adam:constant", "adamm:constant"]}, "the optimizer must be one of .* got 'adamm'"),
        (
            {"arms": ["adam:constant", "adam:cosine:mean"]},
            "limited, averaged, ema may follow, got 'mean'",
        ),
        ({"arms": {"a": constant, "b": 3}}, "arm 'b' must be a function of"),
        (
            {"arms": {"a": constant, "b": lambda r, n: None}},
            "arm 'b' cannot be run.*must return an optax transformation",
        ),
        ({"arms": {"a": constant, "b": lambda r: ao.sgd(r)}}, "arm 'b' cannot be run: TypeError"),
        ({"learning_rates": []}, "learning_rates must be one or more positive numbers"),
        ({"learning_rates": [0.1, -1.0]}, "learning_rates must be one or more positive numbers"),
        ({"learning_rates": [0.1, math.nan]}, "learning_rates must be one or more positive numbers"),
        ({"learning_rates": {"a": [0.1]}}, "learning_rates must have the same names as arms; b"),
        ({"seeds": 4}, r"seeds must be an integer in \[5, 100000\], got 4"),
        ({"steps": 0}, "steps must be an integer"),
        ({"tuning_seeds": 0}, "tuning_seeds must be an integer"),
        ({"baseline": "c"}, "baseline must be one of 'a', 'b', got 'c'"),
        ({"margin": 0.0}, "margin must be a number in"),
        ({"evaluate": 3}, "evaluate must be a function"),
        ({"evaluate": {"c": ao.averaged_parameters}}, "evaluate must be one of"),
        ({"validation_points": [1, 3]}, r"validation_points must be an integer in \[0, 2\]"),
        ({"mode": "fast"}, "mode must be one of"),
        ({"chunk": 0}, "chunk must be an integer"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_compiled(change, message, monkeypatch):
    from adaptive_optax.study.engine import trials

    monkeypatch.setattr(trials, "Program", None)  # would fail otherwise
    keywords = GOOD | {"arms": {"a": constant, "b": constant}} | change
    with pytest.raises(ValueError, match=message):
        study.compare(quadratic_task(), **keywords)


def test_a_state_that_changes_its_dtype_is_refused():
    def init(params):
        return optax.EmptyState(), jnp.zeros(())

    def update(updates, state, params=None):
        return updates, (state[0], state[1].astype(jnp.bfloat16))

    drifting = optax.GradientTransformation(init, update)
    with pytest.raises(ValueError, match="arm 'b' must keep the shapes and dtypes"):
        study.compare(quadratic_task(), {"a": constant, "b": lambda r, n: drifting}, **GOOD)


def test_what_was_finished_survives_an_interruption():
    calls = []

    def arm(rate, steps):
        calls.append(rate)
        if len(calls) > 4:  # after the check: while the second arm compiles
            raise KeyboardInterrupt
        return ao.sgd(rate)

    with pytest.raises(KeyboardInterrupt) as caught:
        study.compare(quadratic_task(), {"a": constant, "b": arm}, **GOOD, **QUICK)
    partial = caught.value.comparison
    assert set(partial.table["arm"]) == {"a"} and len(partial.table) == 6
    assert "6 finished trials" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="stopped before its verdict, after 6 trials"):
        partial.verdict()


def test_the_study_is_imported_on_use():
    code = (
        "import sys, adaptive_optax as ao; assert 'pandas' not in sys.modules; "
        "ao.study.Task; assert 'pandas' in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_update_gets_the_loss():
    def arm(rate, steps):
        def update(updates, state, params=None, *, value, grad, value_fn, **extra):
            return jax.tree.map(lambda g: -rate * g, grad), value + 0 * value_fn(params)

        return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)

    comparison = study.compare(quadratic_task(1.0, 0.1), {"a": constant, "b": arm}, **GOOD, **QUICK)
    assert comparison.verdict().effect == 0

"""What a comparison recommends: the arm, its rate, its code, and one sentence of evidence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from quadratic import constant, quadratic_task
from test_report import Page, changed, written_page

from adaptive_optax import study
from adaptive_optax.study.arms import AVERAGES, OPTIMIZERS, SCHEDULE_FREE, SCHEDULES
from adaptive_optax.study.decay import _arms
from adaptive_optax.study.details import Details
from adaptive_optax.study.engine.trials import TELEMETRY
from adaptive_optax.study.evaluation import declared
from adaptive_optax.study.recommendation import code_for, simplicity

EFFECTS = {"better": -0.05, "best": -0.1, "worse": 0.1, "equivalent": 0.0, "undecided": -0.01}


def found(*arms, tuned=None, own=(), looks=(10,)):
    """A comparison of arms whose verdicts are given: `"name is better"`; the first is the baseline.

    `tuned` maps arms to their metrics in tuning, where they differ from the judged ones.
    """
    baseline, *rivals = arms
    verdicts = {baseline: ""} | dict(each.split(" is ") for each in rivals)
    noise = np.random.default_rng(0).normal(size=(len(verdicts), 10))
    noise -= noise.mean(axis=1, keepdims=True)
    rows = []
    for row, (arm, verdict) in enumerate(verdicts.items()):
        effect = EFFECTS.get(verdict, 0.0)
        spread = 0.1 if verdict == "undecided" else 0.001
        for seed in range(10):
            metric = 1 + effect + spread * noise[row, seed]
            for phase, value in (("tuning", (tuned or {}).get(arm, metric)), ("verdict", metric)):
                rows.append(
                    {
                        "arm": arm, "phase": phase, "learning_rate": 0.01, "seed": seed,
                        "final_metric": value, "initial_metric": 2.0, "best_metric": value, "diverged": False,
                        "compilation": "once", "best_step": 1, "steps_to_baseline": np.nan, "error": "",
                    }
                )  # fmt: skip
    details = Details(
        task="t", baseline=baseline, arms=list(verdicts), steps=1000, tuning_seeds=10, seeds=10, margin=None,
        usual_arms={arm: arm for arm in verdicts if arm not in own}, looks=looks, on_edge={}, grown={},
        best_rates=dict.fromkeys(verdicts, 0.01), grid=dict.fromkeys(verdicts, [0.01]), seconds_per_step={},
        devices=[], versions={}, command=[], metric_name="loss", seconds=0.0,
    )  # fmt: skip
    steps, curves, telemetry = (
        np.array([0, 1000]),
        np.ones((len(rows), 2)),
        np.ones((len(rows), 2, len(TELEMETRY))),
    )
    made = study.Comparison(pd.DataFrame(rows), steps, curves, steps, curves, steps, telemetry, details)
    if looks:
        decided = {arm: verdict.decision for arm, verdict in made.verdicts.items()}
        assert decided == {arm: "better" if v == "best" else v for arm, v in list(verdicts.items())[1:]}
    return made


C, COS, WARM, ONE, MEAN = (
    "adam:constant", "adam:cosine", "adam:warmup_cosine", "adam:one_cycle", "adam:constant:averaged",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arms", "arm", "reason"),
    [
        ((C, f"{COS} is better"), COS, "adam:cosine is better than adam:constant: final metric 0.05"),
        (
            (C, f"{COS} is best", f"{ONE} is better", f"{WARM} is worse"),
            COS,
            "; of the 2 arms that are better, it did best in tuning.",
        ),
        ((C, f"{COS} is worse"), C, "adam:cosine is worse than adam:constant: final"),
        ((C, f"{COS} is worse", f"{ONE} is worse"), C, "All 2 other arms are worse than adam:constant."),
        (
            (C, f"{COS} is equivalent", f"{ONE} is undecided"),
            C,
            "No difference was found: keep the simplest, adam:constant (equivalent: adam:cosine; "
            "undecided: adam:one_cycle).",
        ),
        (
            (ONE, f"{COS} is equivalent", f"{C} is equivalent", f"{WARM} is equivalent"),
            C,
            "keep the simplest, adam:constant, which is equivalent to adam:one_cycle (",
        ),
        (
            (ONE, f"{COS} is undecided", f"{MEAN} is equivalent"),
            ONE,
            "No difference was found: keep adam:one_cycle, since adam:cosine is simpler but may be worse",
        ),
        (
            (COS, f"{WARM} is equivalent", f"{C} is worse"),
            COS,
            "No arm was found to be better: keep the simplest, adam:cosine (equivalent: adam:warmup_cosine; "
            "worse: adam:constant).",
        ),
        ((COS, "adam:linear is equivalent", "sgd:step is equivalent"), COS, "keep the simplest, adam:cosine"),
    ],
)
def test_the_arm_that_the_verdicts_speak_for(arms, arm, reason):
    recommended = found(*arms).recommend()
    assert (recommended.arm, recommended.learning_rate) == (arm, 0.01)
    assert reason in recommended.reason and recommended.reason.count(". ") == 0
    assert recommended.code == study.arm(arm).code(0.01, 1000)


def test_of_several_better_arms_the_one_that_did_best_in_tuning():
    arms = (C, f"{COS} is best", f"{ONE} is better")
    assert found(*arms, tuned={COS: 0.7, ONE: 0.6}).recommend().arm == ONE
    undecided = found(*arms, "sgd:step is undecided", tuned={"sgd:step": 0.1})
    assert undecided.verdict().arm == "sgd:step" and undecided.recommend().arm == COS


def test_arms_of_ones_own_are_neither_simpler_nor_less_simple():
    mine = found(ONE, "mine is equivalent", own=["mine"]).recommend()
    assert mine.arm == ONE and "keep the simplest, adam:one_cycle" in mine.reason
    base = found("mine", f"{C} is equivalent", own=["mine"]).recommend()
    assert base.arm == "mine" and "No difference was found: keep the baseline, mine" in base.reason
    assert base.code == 'tx = arms["mine"](0.01, 1000)'
    better = found(C, "mine is better", own=["mine"])
    for source, code in {
        "mine": "tx = mine(0.01, 1000)",
        "m.sub:mine": "from m.sub import mine\ntx = mine(0.01, 1000)",
        "m.py:mine": 'import runpy\ntx = runpy.run_path("m.py")["mine"](0.01, 1000)',
    }.items():
        assert changed(better, own_arms={"mine": source}).recommend().code == code


def test_without_a_verdict_nothing_is_recommended(tmp_path):
    stopped = found(C, f"{COS} is better", looks=())
    vain = found(C, f"{COS} is better")
    vain = dataclasses.replace(vain, table=vain.table.assign(initial_metric=0.5))
    vain = changed(vain, on_edge={C: True})
    foreign = changed(found(C, f"{COS} is better"), usual_arms={COS: "adam:sideways"})
    for comparison, message in (
        (stopped, "stopped before its verdict"),
        (vain, "is no better after training"),
        (foreign, "the schedule must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison.recommend()
        page = Page(written_page(comparison, tmp_path / "r.html"))
        assert page.heard("p", "reason").startswith("Nothing can be recommended: ")
        assert message in page.heard("p", "reason")


def test_the_recommendation_is_at_the_end_of_report_and_summary(tmp_path, capsys):
    comparison = found(C, f"{ONE} is undecided")
    recommended = comparison.recommend()
    page = Page(written_page(comparison, tmp_path / "r.html"))
    assert page.heard("p", "reason") == f"{C} at a peak rate of 0.01. {recommended.reason}"
    assert page.texts("code")[-2:] == recommended.code.splitlines()
    assert page.texts("h2")[-1] == "What to use"
    comparison.print_summary()
    said = capsys.readouterr().out
    assert " ".join(said.split()).endswith(
        f"Use {C} at a peak rate of 0.01. {recommended.reason} import adaptive_optax as ao tx = ao.adam(0.01)"
    )


def test_every_standard_arm_has_a_place():
    order = [
        "sgd:constant", "adam:step", "adam:warmup_cosine", "adam:one_cycle", "adam:constant:ema",
    ]  # fmt: skip
    assert [simplicity(study.arm(name)) for name in order] == [0, 1, 2, 3, 4]
    for name in ("adam:cosine:averaged", "prodigy", "dadapt_adamw:linear", "schedule_free:sgd"):
        assert simplicity(study.arm(name)) == 4
    assert all(simplicity(study.arm(f"adam:{schedule}")) < 4 for schedule in SCHEDULES)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}:one_cycle" for name in OPTIMIZERS),
        *(f"adam:{schedule}" for schedule in SCHEDULES),
        *(f"sgd:constant:{average}" for average in AVERAGES),
        *(f"schedule_free:{name}" for name in SCHEDULE_FREE),
    ],
)
def test_pasted_code_trains_as_the_arm_did_and_ends_in_what_was_judged(name):
    """What is pasted gives the metric that the study measured, at the parameters that it judged."""
    task, arm = quadratic_task(), study.arm(name)
    settings = {"steps": 12, "seeds": 5, "tuning_seeds": 1, "growth": 0, "margin": 1e-3, "mode": "scan"}
    comparison = study.compare(
        task, {"base": constant, "it": arm}, learning_rates={"base": [0.01], "it": [0.1]}, progress=False,
        **settings,
    )  # fmt: skip
    built, _, judging = code_for(comparison.details, "it").partition("# After training, ")
    names = {}
    exec(built, names)
    trial = comparison.table.query("arm == 'it' and phase == 'verdict'").iloc[0]
    params = start_of(task, int(trial["seed"]))
    opt_state = names["tx"].init(params)
    for _ in range(12):
        gradient = jax.grad(lambda x: 0.5 * jnp.sum(x**2))(params)
        updates, opt_state = names["tx"].update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    if judging:
        names |= {"model": params, "params": params, "opt_state": opt_state}
        exec(f"# {judging}", names)
        assert np.abs(names["averaged"] - params).max() > 1e-6
        params = names["averaged"]
    assert bool(judging) == (arm.evaluate is not None)
    np.testing.assert_allclose(task.metric(params, None), trial["final_metric"], rtol=1e-4)


def start_of(task, seed):
    """The initial parameters of a trial."""
    base = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0)
    return task.start(jax.random.split(jax.random.fold_in(base, seed))[0])[0]


def test_it_works_on_a_loaded_comparison(tmp_path):
    arms = ["sgd:constant", "sgd:constant:averaged"]
    comparison = study.compare(
        quadratic_task(1.0, 1.0), arms, learning_rates=[0.3], steps=40, seeds=12, tuning_seeds=1, growth=0,
        margin=1e-3, mode="scan", progress=False,
    )  # fmt: skip
    comparison.save(tmp_path / "c.npz")
    recommended = study.load(tmp_path / "c.npz").recommend()
    assert recommended == comparison.recommend() and isinstance(recommended, study.Recommendation)
    assert recommended.arm == "sgd:constant:averaged"
    assert recommended.code.splitlines() == [
        "import adaptive_optax as ao",
        "import optax",
        "tx = optax.chain(ao.sgd(0.3), ao.average_parameters())",
        "# After training, use the average of the parameters, which was judged.",
        "averaged = ao.swap_averaged(model, opt_state)  # after training",
    ]


def test_rates_are_written_as_short_as_float32_allows():
    details = found(C, f"{COS} is better", own=[COS]).details
    for rate, written in ((float(np.float32(0.1)), "(0.1"), (0.1234567890123, "(0.1234567890123")):
        details = dataclasses.replace(details, best_rates={C: rate, COS: rate})
        assert written + ")" in code_for(details, C) and written + ", 1000)" in code_for(details, COS)


@pytest.mark.parametrize("name", ["constant", "linear", "1-sqrt", "halved", "constant:averaged"])
def test_the_code_of_an_arm_with_ones_own_optimizer_runs(name):
    arms = _arms(lambda rate: optax.sgd(rate))
    details = changed(found("constant", "other is better", own=["constant", "other"]), own_arms={}).details
    sources = {"constant": declared(arms[name], "source")}
    rates = {"constant": float(np.float32(0.1)), "other": 0.1}
    code = code_for(dataclasses.replace(details, own_arms=sources, best_rates=rates, steps=4), "constant")
    names = {"optimizer": lambda rate: optax.sgd(rate)}
    exec(code, names)
    params = jnp.ones(3)
    assert "0.1000000" not in code
    both = arms[name](0.1, 4), names["tx"]
    states = [tx.init(params) for tx in both]
    for _ in range(3):
        steps = [tx.update(params, state, params) for tx, state in zip(both, states, strict=True)]
        states = [state for _, state in steps]
        np.testing.assert_array_equal(*(updates for updates, _ in steps))

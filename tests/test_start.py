"""Going on from a run under way: what is taken over, what begins now, and what decaying now gains."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratic import quadratic_task

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.interop.transfer import carry_moments

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
GRADIENTS = jax.tree.map(lambda x: jnp.cos(3 * x) + 0.5, PARAMS)


BF16 = "bfloat16"


def after(tx, steps=3):
    """The state of a transformation after some steps."""
    state = tx.init(PARAMS)
    for i in range(steps):
        _, state = tx.update(jax.tree.map(lambda g, i=i: g * (i + 1), GRADIENTS), state, PARAMS)
    return state


def same(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)


# ---- What is taken over ----


@pytest.mark.parametrize(
    ("run_rate", "run", "arm"),
    [
        (1e-3, ao.adam(1e-3), ao.adam(optax.linear_schedule(1e-3, 0, 10))),
        (
            1e-3,
            ao.adamw(1e-3, nu_storage="bfloat16"),
            ao.adamw(ao.warmup_cosine(1e-3, 10), nu_storage="bfloat16"),
        ),
        (1e-3, optax.adam(1e-3), optax.adamw(optax.linear_schedule(1e-3, 0, 10))),
        (1e-3, ao.rmsprop(1e-3), ao.rmsprop(optax.linear_schedule(1e-3, 0, 10))),
        (0.1, ao.sgd(0.1, momentum=0.9), ao.sgd(optax.linear_schedule(1e-3, 0, 10), momentum=0.9)),
        (0.1, optax.sgd(0.1, momentum=0.9), optax.sgd(optax.linear_schedule(1e-3, 0, 10), momentum=0.9)),
        (1e-3, optax.chain(ao.clip_by_global_norm(1e6), ao.adam(1e-3)), ao.telemetry(ao.adam(1e-3))),
    ],
)
def test_moments_go_on_and_schedules_begin(run_rate, run, arm):
    state = carry_moments(after(run), arm.init(PARAMS), PARAMS)
    continued, _ = run.update(GRADIENTS, after(run), PARAMS)
    updates, _ = arm.update(GRADIENTS, state, PARAMS)
    cosine = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.vdot(a, b), continued, updates)))
    norms = optax.tree.norm(continued) * optax.tree.norm(updates)
    assert cosine / norms > 0.99999
    ratio = optax.tree.norm(updates) / optax.tree.norm(continued)
    np.testing.assert_allclose(ratio, 1e-3 / run_rate, rtol=0.01)  # 30 % less if the count of 3 went on


@pytest.mark.parametrize(
    ("run", "arm"), [(optax.adamw(1e-3), ao.adam(1e-3)), (ao.adam(1e-3), optax.adam(1e-3))]
)
def test_adam_of_either_library_goes_on_in_the_other(run, arm):
    state = carry_moments(after(run), arm.init(PARAMS), PARAMS)
    updates, _ = arm.update(GRADIENTS, state, PARAMS)
    expected, _ = optax.adam(1e-3).update(GRADIENTS, after(optax.adam(1e-3)), PARAMS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), updates, expected)


def in_groups(make, other=None):
    return optax.multi_transform({"x": make(1e-3), "y": (other or make)(1e-3)}, {"a": "x", "b": "y"})


def twice(scale_by):
    return optax.chain(scale_by(), scale_by(b1=0.8), optax.scale_by_learning_rate(1e-3))


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
        in_groups(optax.adam),
        in_groups(optax.adam, optax.sgd),
        in_groups(ao.adam, optax.adam),
        optax.amsgrad(1e-3),
        twice(optax.scale_by_adam),
        twice(ao.scale_by_adam),
        optax.adafactor(1e-3, min_dim_size_to_factor=2),
        optax.rmsprop(1e-3, bias_correction=True),
        ao.partition_by_path({"b": ao.adam(1e-3), ".*": ao.adamw(1e-3)}),
    ],
)
def test_the_same_optimizer_goes_on_with_every_moment(tx):
    same(carry_moments(after(tx), tx.init(PARAMS), PARAMS), after(tx))


def test_accumulated_gradients_begin_now():
    tx = optax.MultiSteps(optax.adam(optax.linear_schedule(1e-3, 0, 10)), 4).gradient_transformation()
    run, new = after(tx, 7), tx.init(PARAMS)
    state = carry_moments(run, new, PARAMS)
    same(state.inner_opt_state[0], run.inner_opt_state[0])
    expected = new._replace(inner_opt_state=None), new.inner_opt_state[1]
    same((state._replace(inner_opt_state=None), state.inner_opt_state[1]), expected)


@pytest.mark.parametrize("params", [jnp.ones(4), jnp.ones(()), {"w": jnp.ones(4)}])
def test_a_count_is_no_moment(params):
    run, arm = optax.adam(optax.constant_schedule(0.1)), optax.adam(optax.linear_schedule(0.1, 0.0, 30))
    _, state = run.update(params, run.init(params), params)
    found = carry_moments(state, arm.init(params), params)
    assert int(found[0].count) == 1 and int(found[1].count) == 0


COUNTERPARTS = {  # of one optimizer, whose moments are the same numbers
    "adam": [ao.adam(1e-3), optax.adamw(1e-3), in_groups(optax.adam), in_groups(ao.adam)],
    "rmsprop": [ao.rmsprop(1e-3), optax.rmsprop(1e-3), in_groups(optax.rmsprop)],
    "corrected": [
        ao.rmsprop(1e-3, bias_correction=True),
        optax.rmsprop(1e-3, bias_correction=True),
    ],
    "centered": [ao.rmsprop(1e-3, centered=True), optax.rmsprop(1e-3, centered=True)],
    "momentum": [
        ao.sgd(1e-3, momentum=0.9),
        optax.sgd(1e-3, momentum=0.9),
        in_groups(lambda rate: optax.sgd(rate, 0.9)),
    ],
}


@pytest.mark.parametrize(
    ("run", "arm"), [(run, arm) for family in COUNTERPARTS.values() for run in family for arm in family]
)
def test_moments_go_on_in_the_other_library_and_in_other_groups(run, arm):
    updates, _ = arm.update(GRADIENTS, carry_moments(after(run), arm.init(PARAMS), PARAMS), PARAMS)
    expected, _ = arm.update(GRADIENTS, after(arm), PARAMS)
    compared = functools.partial(np.testing.assert_allclose, rtol=1e-3)  # weight decay differs
    jax.tree.map(compared, updates, expected)


@pytest.mark.parametrize("arm", [ao.adam(1e-3), optax.adam(1e-3)])
def test_moments_go_on_without_the_maximum(arm):
    state = carry_moments(after(optax.amsgrad(1e-3)), arm.init(PARAMS), PARAMS)
    updates, _ = arm.update(GRADIENTS, state, PARAMS)
    expected, _ = arm.update(GRADIENTS, after(arm), PARAMS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)


def test_shared_second_moments_go_on_per_coordinate():
    run = after(ao.adam(1e-3, granularity="tensor"))
    state = carry_moments(run, optax.adam(1e-3).init(PARAMS), PARAMS)
    same(state[0].nu, jax.tree.map(jnp.full_like, PARAMS, run[0].nu))
    coarser = carry_moments(state, ao.adam(1e-3, granularity="global").init(PARAMS), PARAMS)
    mean = (6 * run[0].nu["a"] + 3 * run[0].nu["b"]) / 9
    np.testing.assert_allclose(coarser[0].nu, mean, rtol=1e-6)


def test_a_schedule_of_the_run_does_not_go_on():
    run = ao.adam(optax.linear_schedule(1.0, 0.0, 4))
    arm = ao.adam(optax.linear_schedule(0.5, 0.0, 10))
    state = carry_moments(after(run), arm.init(PARAMS), PARAMS)
    assert float(ao.get_hyperparams(state)["learning_rate"]) == 0.5
    assert int(state[0].count) == 3


def test_an_average_begins_now():
    run = optax.chain(ao.adam(1e-3), ao.average_parameters())
    moved = jax.tree.map(lambda x: x + 5, PARAMS)
    state = carry_moments(after(run), run.init(moved), moved)
    same(ao.averaged_parameters(moved, state), moved)


# ---- In a study ----


class OwnState(NamedTuple):
    """What a user's own transformation keeps."""

    total: jax.Array


CURVATURE, NOISE, RATE, STEPS, DIMENSIONS = 1.0, 1.0, 0.2, 8, 16
TASK = quadratic_task(CURVATURE, NOISE, DIMENSIONS)
ARMS = ["sgd:constant", "sgd:linear"]
SETTINGS = {"learning_rates": [RATE], "steps": STEPS, "seeds": 24, "tuning_seeds": 1, "margin": 1e-3}


def expected_square(start, rates):
    """The mean square of the coordinates after steps with these rates, from where the run is."""
    for rate in rates:
        start = (1 - rate * CURVATURE) ** 2 * start + rate**2 * NOISE
    return start


def fork(value, **settings):
    params = jnp.full(DIMENSIONS, value)
    start = study.Start(params, ao.sgd(RATE).init(params), step=100)
    return study.compare(TASK, ARMS, start=start, **SETTINGS | settings)


@pytest.mark.parametrize(("value", "decision"), [(6.0, "worse"), ((RATE / 1.8) ** 0.5, "better")])
def test_the_gain_of_decaying_now_is_the_closed_forms(value, decision):
    found = fork(value)
    linear = [RATE * (1 - i / STEPS) for i in range(STEPS)]
    ends = [expected_square(value**2, rates) for rates in (STEPS * [RATE], linear)]
    verdict = found.verdict()
    gain = CURVATURE / 2 * (ends[1] - ends[0])
    assert verdict.decision == decision
    half = (verdict.interval_95[1] - verdict.interval_95[0]) / 2
    assert abs(verdict.effect - gain) < 1.5 * half
    assert found.details.best_rates == dict.fromkeys(ARMS, RATE) and not any(found.details.on_edge.values())
    initial = CURVATURE / 2 * value**2
    np.testing.assert_allclose(found.table["initial_metric"], initial, rtol=1e-5)


def test_arms_go_on_from_the_same_place_as_the_run_itself():
    tx = ao.adam(0.05)
    params = TASK.init(jax.random.key(3))
    state = tx.init(params)
    for i in range(5):
        gradient = jax.grad(TASK.loss)(params, None, jax.random.key(i))
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    arms = {"same": lambda rate, steps: ao.adam(rate), "optax's": lambda rate, steps: optax.adam(rate)}
    settings = SETTINGS | {"seeds": 5, "steps": 10, "learning_rates": [0.05]}
    from_run = study.compare(TASK, arms, start=study.Start(params, state), **settings)
    with pytest.warns(UserWarning, match="start.opt_state is None: arm .* begins with moments of zero"):
        fresh = study.compare(TASK, arms, start=study.Start(params, None), **settings)
    ours, theirs = (from_run.table.query(f'arm == "{name}"')["final_metric"].to_numpy() for name in arms)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert np.abs(from_run.table["final_metric"] - fresh.table["final_metric"]).min() > 1e-6


def test_a_resumed_fork_is_recognized_by_where_it_began(tmp_path):
    first = fork(2.0, seeds=5, out=tmp_path)
    again = fork(2.0, seeds=5, out=tmp_path)
    assert first.table.equals(again.table)
    with pytest.raises(ValueError, match="holds another study; changed: .*start data"):
        fork(3.0, seeds=5, out=tmp_path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (3, "start must be a study.Start, got int"),
        (
            study.Start(jnp.ones(4), ()),
            r"start.params must be as in the task: '' is float32\[16\] there, got float32\[4\]",
        ),
        (
            study.Start(jnp.ones(16), (), {"x": jnp.ones(2)}),
            "start.model_state must be as in the task: 'x' is nothing",
        ),
        (study.Start(jnp.ones(16, jnp.bfloat16), ()), "got bfloat16"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        study.compare(TASK, ARMS, start=start, **SETTINGS)


@pytest.mark.parametrize(
    ("opt_state", "message"),
    [
        ((), "'adam:constant' can go on with, .*ScaleByAdamState; got a tuple. Pass"),
        ([{"count": 3}, {}], "got a list. Pass"),
        (optax.sgd(0.1, momentum=0.9).init(jnp.ones(16)), "got optax.EmptyState, optax.TraceState. Pass"),
        (
            ao.adam(0.1).init({"z": jnp.ones(3)}),
            "adaptive_optax.ScaleByAdamState.*, of other parameters or groups",
        ),
    ],
)
def test_a_state_without_moments_for_an_arm_is_refused(opt_state, message):
    arms = ["adam:constant", "adam:linear"]
    with pytest.raises(ValueError, match=f"start.opt_state must hold moments that arm .*{message}"):
        study.compare(TASK, arms, start=study.Start(jnp.ones(16), opt_state), **SETTINGS)


def test_an_optimizer_of_ones_own_must_declare_its_moments():
    def own(rate, steps):
        tx = optax.GradientTransformation(
            lambda params: OwnState(jnp.zeros_like(params)),
            lambda updates, state, params=None: (updates + 0.5 * state.total, OwnState(updates)),
        )
        return optax.chain(tx, optax.scale_by_learning_rate(rate))

    start = study.Start(jnp.ones(16), own(0.1, 1).init(jnp.ones(16)))
    with pytest.raises(
        ValueError, match="got optax.EmptyState, test_start.OwnState. Declare those of test_start.Own"
    ):
        study.compare(TASK, {"own": own, "other": own}, start=start, **SETTINGS)


def test_a_step_is_a_count():
    with pytest.raises(ValueError, match="step must be"):
        study.Start(jnp.ones(3), (), step=-1)


# ---- decay_now ----


def checkpoints(steps, optimizer=ao.sgd, rate=0.2):
    """A run of the task, far from its minimum at first, at some of its steps."""
    tx, params = optimizer(rate), 6 * jnp.ones(DIMENSIONS)
    state, found = tx.init(params), []
    for i in range(max(steps) + 1):
        if i in steps:
            found.append(study.Start(params, state, step=i))
        updates, state = tx.update(jax.grad(TASK.loss)(params, None, jax.random.key(i)), state, params)
        params = optax.apply_updates(params, updates)
    return found


@pytest.fixture(scope="module")
def found():
    """Decaying at the beginning of a run, and at its noise floor."""
    return study.decay_now(TASK, checkpoints((40, 0)), steps=STEPS, optimizer="sgd", seeds=16, margin=1e-3)


def test_it_says_whether_to_decay_now_and_what_waiting_costs(found):
    assert found.steps == (0, 40)
    assert found.comparisons[0].verdicts["linear"].decision == "worse"
    assert found.best().decision == "better" and found.best(0).decision == "worse"
    assert repr(found) == found.sentence
    best = min(study.decay.DECAYS, key=lambda arm: found.comparisons[1].verdicts[arm].effect)
    decaying, averaging, waiting, continued = found.sentence.split(". ")
    assert decaying.startswith(f"Yes: from step 40, {best} ends ")
    assert decaying.endswith("16 seeds)") and "lower than the constant rate over the next 8 steps" in decaying
    decision = found.comparisons[1].verdicts["constant:averaged"].decision
    assert averaging.startswith(f"Averaging the parameters at the constant rate is {decision}: ")
    assert waiting.startswith(f"Each goes on for 8 steps: {best} from step 40 ends ")
    assert waiting.endswith("lower than from step 0, after 40 more steps of training")
    assert continued == "The run went on with sgd at a rate of 0.2."


def test_a_no_comes_first_even_if_averaging_helps(found):
    early = study.DecayNow(found.steps[:1], found.comparisons[:1], "sgd")
    assert early.sentence.startswith(
        "No: from step 0, every decay is worse over the next 8 steps; the best of "
    )


def test_runs_that_end_together_show_what_waiting_costs():
    settings = {"steps": STEPS, "optimizer": "sgd", "seeds": 8, "margin": 1e-3, "same_end": True}
    found = study.decay_now(TASK, checkpoints((36, 40)), **settings)
    assert [comparison.details.steps for comparison in found.comparisons] == [12, 8]
    waiting = found.sentence.split(". ")[2]
    assert waiting.startswith("All end at step 48: ") and waiting.partition("; ")[2] in (
        "no cost of waiting was found",
        "waiting was better",
        "waiting cost that",
    )


def test_its_report_speaks_of_no_tuning(found, tmp_path, capsys):
    found.comparisons[1].to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "from step 40, does another arm beat constant?" in page
    page = page.partition("</style>")[2]
    assert "tuning" not in page and "tuned rates" not in page and "best peak rate" not in page
    assert page.count("<figure>") == 3 and "parameters and different orders" not in page
    found.comparisons[1].print_summary()
    assert "tuning" not in capsys.readouterr().out
    drawn = {axes.get_label() for axes in found.comparisons[1].plot().axes} - {""}
    assert drawn == {"differences", "curves", "effective_rates"}
    assert "Best peak" not in repr(found.comparisons[1])


def test_a_start_is_shown_in_a_few_words():
    assert repr(checkpoints((0,))[0]) == "Start(step=0, 16 parameters)"


def test_what_cannot_be_taken_over_is_said():
    start = study.Start(jnp.ones(16), None)
    with pytest.warns(UserWarning, match="start.opt_state is None"):
        found = study.decay_now(TASK, start, steps=4, learning_rate=0.1, seeds=5, margin=1.0)
    assert found.sentence.endswith(
        "adam at a rate of 0.1, whose moments begin anew: the state holds none for it."
    )


def test_an_injected_rate_of_optax_is_read():
    inject = optax.inject_hyperparams(optax.adam)
    for tx in (inject(0.05), optax.chain(optax.clip(1e6), inject(0.05))):
        start = study.Start(jnp.ones(16), tx.init(jnp.ones(16)))
        found = study.decay_now(TASK, start, steps=4, seeds=5, margin=1.0)
        assert found.comparisons[0].details.best_rates["linear"] == 0.05
        assert not found.new_moments


def test_its_table_and_picture_show_every_checkpoint(found):
    table = found.table
    assert list(table.columns[:3]) == ["step", "arm", "final_metric"] and len(table) == 10
    verdict = found.comparisons[1].verdicts["1-sqrt"]
    row = table[(table["step"] == 40) & (table["arm"] == "1-sqrt")].iloc[0]
    assert (row["gain"], row["low"], row["high"]) == (verdict.effect, *verdict.interval)
    axes = found.plot().axes[0]
    assert axes.get_title(loc="left") == "metric minus the constant rate's, lower is better"
    assert "constant rate" in [each.get_text() for each in axes.texts]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "40"]
    assert axes.get_yscale() == "symlog"  # the loss at the beginning would hide the gain at the end


def test_the_rate_is_read_from_the_state_and_the_optimizer_may_be_ones_own(tmp_path):
    start = checkpoints((2,), ao.adam, 0.05)
    settings = {"steps": 4, "seeds": 5, "margin": 1.0, "out": tmp_path}
    one = study.decay_now(TASK, start, optimizer=lambda rate: ao.adam(rate), **settings)
    assert set(one.comparisons[0].details.best_rates.values()) == {0.05}
    assert (tmp_path / "step_2" / "study.json").exists()
    assert "waiting" not in one.sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": []}, "start must be a study.Start, or several, got list"),
        ({"start": [3]}, "start must be a study.Start, or several, got list of int"),
        ({"start": {"w": jnp.ones(9)}}, "start must be a study.Start, or several, got dict"),
        ({"task": lambda run: 1.0}, "task must be a study.Task for decay_now, .* got a training function"),
        ({"same_end": 3}, "same_end must be True or False"),
        ({"start": study.Start(jnp.ones(16), optax.adam(0.1).init(jnp.ones(16)))}, r"--learning-rate 3e-3"),
        ({"start": 2 * checkpoints((0,))}, r"start must have checkpoints of different steps, got \[0, 0\]"),
        ({"start": study.Start(jnp.ones(16), ())}, "learning_rate must be given, .* got none"),
        ({"optimizer": "adamax"}, "optimizer must be one of"),
        ({"optimizer": 3}, "optimizer must name one of"),
        ({"learning_rate": -1.0}, "learning_rates must be one or more positive"),
    ],
)
def test_mistaken_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        study.decay_now(**{"task": TASK, "start": checkpoints((0,)), "steps": 4, "margin": 1.0} | arguments)

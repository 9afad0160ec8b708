"""replan: what was is untouched, nothing jumps, and the rest ends or sums as it was asked to."""

from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import adaptive_optax as ao
from adaptive_optax.schedules._length import ENDLESS, length_of
from adaptive_optax.schedules._steps import scaled_steps

PLANNED = 120
# Of runs of 120 steps.
WITH_AN_END = {
    "one-cycle": lambda peak: ao.one_cycle(peak, PLANNED).learning_rate,
    "one-cycle momentum": lambda peak: ao.one_cycle(1.0, PLANNED, base_momentum=peak).momentum,
    "one-cycle fastai": lambda peak: ao.one_cycle(peak, PLANNED, preset="fastai").learning_rate,
    "one-cycle optax": lambda peak: ao.one_cycle(peak, PLANNED, preset="optax").learning_rate,
    "one-cycle three phases": lambda peak: ao.one_cycle(peak, PLANNED, three_phase=True).learning_rate,
    "warm-up, cosine": lambda peak: ao.warmup_cosine(peak, PLANNED, warmup_steps=13, end_value=0.02),
    "wsd": lambda peak: ao.warmup_stable_decay(peak, PLANNED, warmup_steps=13, decay_steps=31),
    "wsd linear": lambda peak: ao.warmup_stable_decay(
        peak, PLANNED, warmup_steps=0, decay_steps=120, shape="linear"
    ),
    "per epoch": lambda peak: ao.per_epoch(ao.warmup_cosine(peak, 12), 10),
    "per fractional epoch": lambda peak: ao.per_epoch(ao.warmup_cosine(peak, 12), 10, fractional=True),
}
WITHOUT_AN_END = {
    "exponential": lambda peak: ao.exponential_decay(peak, 7, 0.9),
    "steps": lambda peak: ao.step_decay(peak, 0.8, 5),
    "cyclical": lambda peak: ao.cyclical(0.01, peak, 7),
    "restarts": lambda peak: ao.cosine_restarts(peak, 20, period_factor=2, warmup_steps=5),
    "inverse square root": lambda peak: ao.inverse_sqrt(peak, 13),
    "steps per epoch": lambda peak: ao.per_epoch(ao.step_decay(peak, 0.8, 2), 10),
}
ALL = WITH_AN_END | WITHOUT_AN_END
CHANGES = [
    (0, 121),
    (37, 121),
    (37, 119),
    (60, 500),
    (60, 61),
    (110, 400),
    (119, 240),
    (120, 240),
    (150, 200),
]
each = pytest.mark.parametrize("name", ALL)
each_change = pytest.mark.parametrize(("at", "total"), CHANGES)


def values(schedule, counts):
    return np.asarray(jax.vmap(schedule)(jnp.asarray(counts, jnp.int32)), np.float64)


def reference(schedule, planned, at, total, counts):
    """The stretched rest of a plan, with the exact positions of rational arithmetic."""
    old = values(schedule, range(max(planned, total, at) + 3))
    found = []
    for count in counts:
        if count < at:
            found.append(old[count])
            continue
        left = total - at if planned == ENDLESS else max(planned - at, 0)
        position = at + Fraction(min(count, total) - at) * left / (total - at)
        whole, part = int(position), float(position - int(position))
        found.append(old[whole] + part * (old[whole + 1] - old[whole]))
    return np.array(found)


@each
@pytest.mark.parametrize(("at", "total"), [(0, 121), (37, 119), (119, 240), (150, 200)])
def test_the_rest_of_the_plan_is_stretched(name, at, total, x64):
    schedule = ALL[name](0.5)
    planned = PLANNED if name in WITH_AN_END else ENDLESS
    assert length_of(schedule) == planned
    counts = np.arange(total + 20)
    expected = reference(schedule, planned, at, total, counts)
    replanned = ao.replan(schedule, at=at, total_steps=total)
    np.testing.assert_allclose(values(replanned, counts), expected, rtol=1e-12, atol=1e-15)
    assert length_of(replanned) == total


@each
@pytest.mark.parametrize(("at", "total"), [(37, 121), (120, 240)])
@pytest.mark.parametrize(
    "asked", [{"end_value": 0.3}, {"integral": 2.0}, {"integral": 1.0, "end_value": 0.0}], ids=str
)
def test_the_past_is_untouched_nothing_jumps_and_the_rest_is_as_asked(name, at, total, asked):
    schedule = ALL[name](0.5)
    steps = total - at
    if "integral" in asked:
        asked = asked | {"integral": 2 * steps * asked["integral"]}  # above what is there
    replanned = ao.replan(schedule, at=at, total_steps=total, **asked)
    found = values(replanned, range(total + 5))
    np.testing.assert_array_equal(found[:at], values(schedule, range(at)))
    np.testing.assert_allclose(found[at], values(schedule, [at])[0], rtol=1e-6)
    assert (found >= 0).all() and (found[total:] == found[total]).all()
    if "end_value" in asked:
        np.testing.assert_allclose(found[total], asked["end_value"], rtol=1e-6)
    else:
        np.testing.assert_allclose(
            found[total], values(ao.replan(schedule, at=at, total_steps=total), [total])
        )
    if "integral" in asked:
        np.testing.assert_allclose(found[at:total].sum(), asked["integral"], rtol=1e-5)


@pytest.mark.parametrize("share", [0.999, 0.8, 0.6])
def test_a_smaller_sum_keeps_both_ends(share):
    schedule = ao.warmup_cosine(0.5, 1000)
    plain = values(ao.replan(schedule, at=300, total_steps=1500), range(300, 1500)).sum()
    replanned = ao.replan(schedule, at=300, total_steps=1500, integral=share * plain)
    found = values(replanned, range(300, 1501))
    np.testing.assert_allclose(found[:-1].sum(), share * plain, rtol=1e-5)
    np.testing.assert_allclose(found[[0, -1]], [float(schedule(300)), 0], rtol=1e-6)
    assert (found >= 0).all()
    with pytest.raises(
        ValueError, match=r"integral must be at least [0-9.]+ with these values at both ends, got 1\."
    ):
        ao.replan(schedule, at=300, total_steps=1500, integral=1.0)


def test_one_step_cannot_have_another_sum():
    with pytest.raises(ValueError, match="integral must be 0.25, the value that the only step left has"):
        ao.replan(ao.warmup_cosine(0.5, 100), at=50, total_steps=51, integral=0.5)


def test_a_finished_run_warms_up_again():
    schedule = ao.one_cycle(0.1, 1000).learning_rate
    longer = ao.replan(schedule, at=1000, total_steps=3000, integral=100.0)
    found = values(longer, range(999, 3001))
    assert found.argmax() == 201 and found.max() == pytest.approx(0.1, rel=0.01)
    steps = np.abs(np.diff(found))
    assert steps.max() < 1.1 * 0.1 / 200  # no jump anywhere


def test_one_cycle_is_planned_anew_as_a_pair():
    cycle = ao.one_cycle(0.1, PLANNED)
    longer = ao.replan(cycle, at=60, total_steps=400, end_value=0.01)
    assert isinstance(longer, ao.OneCycle)
    counts = range(410)
    np.testing.assert_allclose(
        values(longer.momentum, counts), reference(cycle.momentum, PLANNED, 60, 400, counts), rtol=1e-6
    )
    assert float(longer.learning_rate(400)) == np.float32(0.01)


def test_a_plan_can_be_changed_twice():
    once = ao.replan(ao.warmup_cosine(0.1, 100), at=50, total_steps=200)
    twice = ao.replan(once, at=100, total_steps=150)
    found = values(twice, range(160))
    np.testing.assert_array_equal(found[:100], values(once, range(100)))
    np.testing.assert_allclose(found[100:151], values(once, range(100, 201, 2)), rtol=1e-6, atol=1e-9)


def test_traced_values_and_peaks():
    def found(peak, end, integral):
        schedule = ao.warmup_cosine(peak, PLANNED)
        replanned = ao.replan(schedule, at=60, total_steps=400, end_value=end, integral=integral)
        return jax.vmap(replanned)(jnp.arange(410))

    arguments = 0.5, 0.01, 200.0
    np.testing.assert_allclose(jax.jit(found)(*arguments), found(*arguments), rtol=2e-5, atol=1e-7)
    many = jax.vmap(found, (0, None, None))(jnp.array([0.5, 0.25]), 0.01, 200.0)
    np.testing.assert_allclose(many[:, 60:400].sum(1), [200.0, 200.0], rtol=1e-5)
    assert many[0, 30] == 2 * many[1, 30]


def test_a_negative_schedule_does_not_jump():
    replanned = ao.replan(lambda count: -1.0, at=50, total_steps=200, planned_steps=100, end_value=3.0)
    found = values(replanned, range(48, 202))
    assert found[0] == found[2] == -1 and found[-1] == 3
    assert np.abs(np.diff(found)).max() < 0.03


def test_a_sum_needs_a_schedule_that_can_be_traced():
    def schedule(count):
        return 0.1 if count < 60 else 0.01

    with pytest.raises(ValueError, match="or leave out integral"):
        ao.replan(schedule, at=50, total_steps=200, planned_steps=100, integral=10.0)


def test_a_schedule_of_another_library_needs_its_length():
    schedule = optax.cosine_decay_schedule(0.1, 100)
    with pytest.raises(ValueError, match="planned_steps is needed"):
        ao.replan(schedule, at=50, total_steps=200)
    counts = range(210)
    replanned = ao.replan(schedule, at=50, total_steps=200, planned_steps=100)
    np.testing.assert_allclose(
        values(replanned, counts), reference(schedule, 100, 50, 200, counts), rtol=1e-5, atol=1e-8
    )


@given(
    at=st.integers(0, 2**29), left=st.integers(1, 2**29), steps=st.integers(1, 2**29), share=st.floats(0, 1)
)
def test_positions_are_exact_in_runs_of_any_length(at, left, steps, share):
    since = int(share * steps)
    whole, fraction = scaled_steps(jnp.int32(since), left, steps)
    exact = Fraction(since * left, steps)
    assert int(whole) == int(exact)
    assert float(fraction) == pytest.approx(float(exact - int(exact)), abs=1e-6)


def test_a_long_run_has_no_jump():
    total = 2**29
    schedule = ao.warmup_cosine(1.0, total)
    at = total // 2 + 1
    longer = ao.replan(schedule, at=at, total_steps=2**30)
    around = values(longer, np.arange(at - 3, at + 4))
    assert np.abs(np.diff(around)).max() <= 1e-7
    assert float(longer(2**30 - 1)) < 1e-12 and float(longer(2**30)) == 0


def test_fractional_counts():
    replanned = ao.replan(ao.warmup_cosine(1.0, 10), at=5, total_steps=20)
    found = [float(replanned(count)) for count in (4.5, 5.0, 8.0, 8.75, 20.0, 30.5)]
    expected = [float(ao.warmup_cosine(1.0, 10)(count)) for count in (4.5, 5.0, 6.0, 6.25, 10.0, 10.0)]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-7)  # interpolated between whole steps


def test_in_an_optimizer_that_goes_on():
    # The state of the finished run fits: a schedule leaves no trace in it.
    schedule = ao.warmup_cosine(0.1, 10)
    params, tx = jnp.ones(3), ao.adam(schedule)
    state = tx.init(params)
    for _ in range(10):
        _, state = tx.update(params, state, params)
    longer = ao.adam(ao.replan(schedule, at=10, total_steps=20, end_value=0.05))
    _, state = longer.update(params, state, params)
    assert float(ao.get_hyperparams(state)["learning_rate"]) == 0.0
    for _ in range(10):
        _, state = longer.update(params, state, params)
    assert float(ao.get_hyperparams(state)["learning_rate"]) == np.float32(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": -1, "total_steps": 10}, "at must be"),
        ({"at": 2.5, "total_steps": 10}, "at must be"),
        ({"at": 10, "total_steps": 10}, "total_steps must be"),
        ({"at": 10, "total_steps": 2**30 + 1}, "total_steps must be"),
        ({"at": 1, "total_steps": 10, "planned_steps": 0}, "planned_steps must be"),
        ({"at": 1, "total_steps": 10, "end_value": -1.0}, "end_value must be"),
        ({"at": 1, "total_steps": 10, "integral": 0.0}, "integral must be"),
        ({"at": 1, "total_steps": 10, "integral": np.inf}, "integral must be"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ao.replan(ao.warmup_cosine(0.1, 100), **arguments)


def test_what_is_no_schedule():
    with pytest.raises(ValueError, match="schedule must be a function of the step count, got 0.1"):
        ao.replan(0.1, at=1, total_steps=10)
    growth = ao.grow_batch(ao.step_decay(0.1, 0.5, 50), total_steps=200, max_factor=4)
    with pytest.raises(ValueError, match="call grow_batch with the result"):
        ao.replan(growth, at=1, total_steps=10)


def test_batches_grow_with_the_longer_plan():
    schedule = ao.warmup_cosine(0.1, 200)
    longer = ao.replan(schedule, at=100, total_steps=400)
    short, long = (ao.grow_batch(s, total_steps=n, max_factor=8) for s, n in ((schedule, 200), (longer, 400)))
    n = 20  # emissions, within the first 100 steps
    np.testing.assert_array_equal(short.accumulation_steps.values[:n], long.accumulation_steps.values[:n])
    np.testing.assert_allclose(short.learning_rate.values[:n], long.learning_rate.values[:n])


@pytest.mark.parametrize(("value", "found"), [(None, "None"), (np.ones(2), r"an array of shape \(2,\)")])
def test_a_schedule_that_returns_no_number(value, found):
    with pytest.raises(ValueError, match=f"schedule must return a number, got {found} at step 10"):
        ao.replan(lambda count: value, at=10, total_steps=100, planned_steps=50)

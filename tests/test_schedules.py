"""Schedules: against references, optax and PyTorch, past 2**24 steps, traced, and their argument checks."""

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from reference import schedules as reference

from adaptive_optax.schedules import (
    OneCycle,
    cosine_restarts,
    cyclical,
    exponential_decay,
    inverse_sqrt,
    one_cycle,
    per_epoch,
    step_decay,
    warmup_cosine,
    warmup_stable_decay,
)

LAST = 2**31 - 1
COUNTS = np.arange(150)
WSD = {"total_steps": 120, "warmup_steps": 13, "decay_steps": 31}

# name: (factory of the peak or initial value, reference of counts and that value); runs end within COUNTS
CASES = {
    "exponential": (
        lambda value: exponential_decay(value, 7, 0.9),
        lambda t, value: reference.exponential_decay(t, value, 7, 0.9),
    ),
    "exponential, every step": (
        lambda value: exponential_decay(value, 1, 0.99, transition_begin=3),
        lambda t, value: reference.exponential_decay(t, value, 1, 0.99, transition_begin=3),
    ),
    "exponential staircase": (
        lambda value: exponential_decay(value, 10, 0.8, 5, True, end_value=0.05),
        lambda t, value: reference.exponential_decay(t, value, 10, 0.8, 5, True, 0.05),
    ),
    "exponential growth": (
        lambda value: exponential_decay(value, 30, 1.7, end_value=2.0),
        lambda t, value: reference.exponential_decay(t, value, 30, 1.7, end_value=2.0),
    ),
    "step": (
        lambda value: step_decay(value, 0.8, 5),
        lambda t, value: reference.step_decay(t, value, 0.8, 5),
    ),
    "cyclical": (
        lambda value: cyclical(0.01, value, 7),
        lambda t, value: reference.cyclical(t, 0.01, value, 7),
    ),
    "cyclical downwards": (
        lambda value: cyclical(value, 0.01, 7),
        lambda t, value: reference.cyclical(t, value, 0.01, 7),
    ),
    "cyclical triangular2": (
        lambda value: cyclical(0.01, value, 9, "triangular2"),
        lambda t, value: reference.cyclical(t, 0.01, value, 9, "triangular2"),
    ),
    "cyclical exp_range": (
        lambda value: cyclical(0.01, value, 10, "exp_range", 0.99),
        lambda t, value: reference.cyclical(t, 0.01, value, 10, "exp_range", 0.99),
    ),
    "wsd 1-sqrt": (
        lambda value: warmup_stable_decay(value, **WSD),
        lambda t, value: reference.warmup_stable_decay(t, value, **WSD, shape="1-sqrt"),
    ),
    "wsd linear": (
        lambda value: warmup_stable_decay(value, **WSD, shape="linear"),
        lambda t, value: reference.warmup_stable_decay(t, value, **WSD, shape="linear"),
    ),
    "wsd cosine": (
        lambda value: warmup_stable_decay(value, **WSD, shape="cosine"),
        lambda t, value: reference.warmup_stable_decay(t, value, **WSD, shape="cosine"),
    ),
    "wsd, nothing but a plateau": (
        lambda value: warmup_stable_decay(value, 120, warmup_steps=0, decay_steps=0),
        lambda t, value: reference.warmup_stable_decay(t, value, 120, 0, 0, "1-sqrt"),
    ),
    "cosine": (
        lambda value: warmup_cosine(value, 110, end_value=0.01),
        lambda t, value: reference.warmup_cosine(t, value, 110, end_value=0.01),
    ),
    "warm-up and cosine": (
        lambda value: warmup_cosine(value, 110, warmup_steps=17, init_value=0.02),
        lambda t, value: reference.warmup_cosine(t, value, 110, 17, 0.02),
    ),
    "warm-up without decay": (
        lambda value: warmup_cosine(value, 110, warmup_steps=110),
        lambda t, value: reference.warmup_cosine(t, value, 110, 110),
    ),
    "restarts": (
        lambda value: cosine_restarts(value, 20, end_value=0.01),
        lambda t, value: reference.cosine_restarts(t, value, 20, end_value=0.01),
    ),
    "restarts, warm-up": (
        lambda value: cosine_restarts(
            value, 10, period_factor=1.5, warmup_steps=7, init_value=0.02, peak_factor=0.5
        ),
        lambda t, value: reference.cosine_restarts(t, value, 10, 1.5, 7, 0.02, peak_factor=0.5),
    ),
    "restarts, peaks down to the end value": (
        lambda value: cosine_restarts(value, 10, peak_factor=0.5, end_value=0.02),
        lambda t, value: reference.cosine_restarts(t, value, 10, peak_factor=0.5, end_value=0.02),
    ),
    "inverse square root": (
        lambda value: inverse_sqrt(value, 23),
        lambda t, value: reference.inverse_sqrt(t, value, 23),
    ),
    "per epoch": (
        lambda value: per_epoch(step_decay(value, 0.8, 5), 4),
        lambda t, value: reference.step_decay(t // 4, value, 0.8, 5),
    ),
    "per fractional epoch": (
        lambda value: per_epoch(exponential_decay(value, 1, 0.8), 7, fractional=True),
        lambda t, value: reference.exponential_decay(t / 7, value, 1, 0.8),
    ),
}
ONE_CYCLES = [
    {"preset": "torch"},
    {"preset": "torch", "pct_start": 0.33, "three_phase": True, "div_factor": 10.0, "final_div_factor": 50.0},
    {"preset": "torch", "pct_start": 1.0},
    {"preset": "torch", "pct_start": 0.005},  # the peak lies before step 0
    {"preset": "fastai"},
    {"preset": "fastai", "pct_start": 0.37, "div_factor": 5.0, "max_momentum": 0.9, "base_momentum": 0.7},
    {"preset": "fastai", "pct_start": 1.0},
    {"preset": "optax"},
    {"preset": "optax", "pct_start": 0.29, "final_div_factor": 10.0},
    {"preset": "optax", "pct_start": 0.005},  # no warm-up: int(0.6) steps
    {"preset": "optax", "pct_start": 1.0},
]


def _one_cycle_case(index, arguments):
    formula = getattr(reference, "one_cycle_" + arguments["preset"])
    others = {name: value for name, value in arguments.items() if name != "preset"}
    return (
        lambda value: one_cycle(value, 120, **arguments)[index],
        lambda t, value: formula(t, value, 120, **others)[index],
    )


for _arguments in ONE_CYCLES:
    _label = "one-cycle " + ", ".join(map(str, _arguments.values()))
    CASES[_label] = _one_cycle_case(0, _arguments)
    CASES[_label + ", momentum"] = _one_cycle_case(1, _arguments)

each_case = pytest.mark.parametrize("case", CASES)
each_traced_case = pytest.mark.parametrize("case", [case for case in CASES if "momentum" not in case])
each_factory = pytest.mark.parametrize(
    "case",
    [
        "exponential",
        "step",
        "cyclical triangular2",
        "cyclical exp_range",
        "wsd 1-sqrt",
        "warm-up and cosine",
        "restarts",
        "restarts, warm-up",
        "inverse square root",
        "per epoch",
        "per fractional epoch",
        "one-cycle torch",
        "one-cycle fastai, momentum",
    ],
)


def at(schedule, counts):
    """The schedule's values at an array of counts, in one compilation."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(counts)))


def close(actual, expected, rtol, atol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@each_case
def test_float32_equals_reference(case):
    make, expected = CASES[case]
    with jax.numpy_dtype_promotion("strict"):
        values = make(0.3)(COUNTS)
    assert values.dtype == np.float32
    close(values, expected(COUNTS, 0.3), 2e-6)


@each_case
def test_float64_equals_reference(case, x64):
    make, expected = CASES[case]
    with jax.numpy_dtype_promotion("strict"):
        values = make(0.3)(COUNTS.astype(np.int32))
    assert values.dtype == np.float64
    close(values, expected(COUNTS, 0.3), 1e-10)


@each_case
def test_float_counts_between_steps(case):
    make, expected = CASES[case]
    close(make(0.3)(COUNTS + 0.5), expected(COUNTS + 0.5, 0.3), 2e-6)


@each_traced_case
def test_traced_value_equals_concrete_value(case):
    make, expected = CASES[case]
    peaks = np.array([0.03, 0.3], np.float32)
    with jax.numpy_dtype_promotion("strict"):
        values = jax.vmap(lambda value: make(value)(COUNTS))(peaks)
    assert values.dtype == jnp.float32
    close(values, np.stack([expected(COUNTS, float(peak)) for peak in peaks]), 2e-6)


@each_factory
def test_every_type_of_count(case):
    make, expected = CASES[case]
    schedule = make(0.3)
    integers = (37, np.int64(37), np.uint8(37), np.array(37), jnp.int32(37), jnp.uint32(37))
    for count in (*integers, 37.0, np.float64(37), jnp.float32(37)):
        value = schedule(count)
        assert value.shape == () and value.dtype == jnp.float32 and not value.weak_type
        close(value, expected(np.array([37]), 0.3)[0], 2e-6)
    assert float(schedule(-5)) == float(schedule(-5.0)) == float(schedule(0))
    close(schedule(37), at(schedule, [37])[0], 1e-6)  # jit may fuse a product and a sum


def test_inside_scan():
    schedule = one_cycle(np.float32(0.3), np.int32(100)).learning_rate
    _, values = jax.lax.scan(lambda count, _: (count + 1, schedule(count)), jnp.int32(0), length=120)
    close(values, at(schedule, np.arange(120)), 1e-6)


@pytest.mark.parametrize("count", [True, 1j, "1"])
def test_counts_that_are_no_numbers(count):
    with pytest.raises(TypeError, match="count"):
        step_decay(0.1, 0.5, 3)(count)


# --- optax --------------------------------------------------------------------------------------------------

EXPONENTIALS = [
    {"init_value": 0.3, "transition_steps": 13, "decay_rate": 0.7},
    {"init_value": 0.3, "transition_steps": 1, "decay_rate": 0.98, "transition_begin": 20},
    {"init_value": 0.3, "transition_steps": 13, "decay_rate": 0.7, "transition_begin": 4, "staircase": True},
    {"init_value": 0.3, "transition_steps": 13, "decay_rate": 0.7, "end_value": 0.1},
    {"init_value": 0.3, "transition_steps": 13, "decay_rate": 1.3, "end_value": 0.9},
    {"init_value": 0.3, "transition_steps": 13, "decay_rate": 0.7, "transition_begin": 9, "end_value": 0.4},
]
EQUAL_TO_OPTAX = {
    f"exponential {i}": (exponential_decay, optax.exponential_decay, kw) for i, kw in enumerate(EXPONENTIALS)
} | {
    "warm-up and cosine": (
        lambda: warmup_cosine(0.3, 100, warmup_steps=20, init_value=0.1, end_value=0.01),
        lambda: optax.warmup_cosine_decay_schedule(0.1, 0.3, 20, 100, 0.01),
        {},
    ),
    "one-cycle": (
        lambda: one_cycle(0.3, 100, preset="optax").learning_rate,
        lambda: optax.cosine_onecycle_schedule(100, 0.3),
        {},
    ),
    "one-cycle, other factors": (  # in float64 0.29 * 100 = 28.999999999999996, and optax peaks at 28
        lambda: (
            one_cycle(
                0.3, 100, preset="optax", pct_start=0.29, div_factor=7.0, final_div_factor=30.0
            ).learning_rate
        ),
        lambda: optax.cosine_onecycle_schedule(100, 0.3, 0.29, 7.0, 30.0),
        {},
    ),
}


@pytest.mark.parametrize("name", EQUAL_TO_OPTAX)
def test_equals_optax_in_float64(name, x64):
    ours, theirs, arguments = EQUAL_TO_OPTAX[name]
    close(ours(**arguments)(COUNTS), at(theirs(**arguments), COUNTS), 1e-9)


@pytest.mark.parametrize("name", EQUAL_TO_OPTAX)
def test_equals_optax_in_float32(name):
    ours, theirs, arguments = EQUAL_TO_OPTAX[name]
    # Near the end of a cosine optax cancels digits: its error is absolute, in the peak's last places.
    close(ours(**arguments)(COUNTS), at(theirs(**arguments), COUNTS), 3e-5, atol=0.3 * 2e-7)


# --- One cycle ----------------------------------------------------------------------------------------------

TORCH = json.loads((Path(__file__).parent / "reference" / "one_cycle_torch.json").read_text())["cases"]


@pytest.mark.parametrize(
    "case", TORCH, ids=lambda c: f"{c['total_steps']}-{c['pct_start']}-{c['three_phase']}"
)
def test_one_cycle_equals_pytorch(case, x64):
    total, pct, three = case["total_steps"], case["pct_start"], case["three_phase"]
    learning_rate, momentum = one_cycle(1.0, total, pct_start=pct, three_phase=three)
    close(learning_rate(COUNTS)[:total], case["learning_rate"], 1e-9)
    close(momentum(COUNTS)[:total], case["momentum"], 1e-9)


def test_one_cycle_known_values():
    counts = np.array([0, 15, 29, 30, 65, 99, 100])
    torch, momentum = one_cycle(1.0, 100)
    close(at(torch, counts)[[0, 1, 2, 4, 5]], [0.04, 0.54599, 1.0, 0.47757, 4e-6], 1e-5)
    close(at(momentum, counts)[[0, 2, 5]], [0.95, 0.85, 0.95], 2e-7)
    close(
        at(one_cycle(1.0, 100, preset="optax").learning_rate, counts)[[1, 3, 4]], [0.52, 1.0, 0.500002], 1e-6
    )
    # fastai: half-way down at position 0.625 = 1/4 + 3/8, hence (1 + 1e-5) / 2
    fastai = at(one_cycle(1.0, 80, preset="fastai").learning_rate, [0, 20, 50, 80])
    close(fastai, [0.04, 1.0, 0.500005, 1e-5], 1e-6)


def test_one_cycle_is_two_schedules_by_name():
    schedules = one_cycle(0.1, 10)
    assert isinstance(schedules, OneCycle) and OneCycle._fields == ("learning_rate", "momentum")


@pytest.mark.parametrize("preset", ["torch", "fastai", "optax"])
def test_one_cycle_defaults_are_the_presets(preset):
    pct, final = {"torch": (0.3, 1e4), "fastai": (0.25, 1e5), "optax": (0.3, 1e4)}[preset]
    explicit = one_cycle(0.3, 77, preset=preset, pct_start=pct, div_factor=25, final_div_factor=final)
    for ours, theirs in zip(one_cycle(0.3, 77, preset=preset), explicit, strict=True):
        np.testing.assert_array_equal(ours(COUNTS), theirs(COUNTS))


@pytest.mark.parametrize("preset", ["torch", "fastai", "optax"])
def test_one_cycle_with_everything_traced(preset):
    def values(pct_start, div_factor, final_div_factor, max_momentum, base_momentum):
        schedules = one_cycle(
            0.3,
            120,
            preset=preset,
            pct_start=pct_start,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
            max_momentum=max_momentum,
            base_momentum=base_momentum,
        )
        return schedules.learning_rate(COUNTS), schedules.momentum(COUNTS)

    arguments = [np.float32(x) for x in ([0.25, 0.7, 1.0], [9, 25, 50], [10, 1e3, 1e4], [0.9] * 3, [0.8] * 3)]
    with jax.numpy_dtype_promotion("strict"):
        results = jax.vmap(values)(*arguments)
    formula = getattr(reference, "one_cycle_" + preset)
    for i, (pct, div, final, high, low) in enumerate(np.float64(arguments).T.tolist()):
        expected = formula(COUNTS, 0.3, 120, round(pct, 6), div, final, max_momentum=high, base_momentum=low)
        for result, wanted in zip(results, expected, strict=True):
            close(result[i], wanted, 2e-5)  # float32(pct_start) * 120 places the peak 1e-7 of the run off


@given(
    preset=st.sampled_from(["torch", "fastai", "optax"]),
    total_steps=st.integers(1, len(COUNTS)),
    pct_start=st.floats(0.01, 1.0),
    three_phase=st.booleans(),
)
def test_one_cycle_goes_up_then_down_within_its_bounds(preset, total_steps, pct_start, three_phase):
    three_phase = three_phase and preset == "torch" and pct_start <= 0.5
    schedules = one_cycle(1.0, total_steps, preset=preset, pct_start=pct_start, three_phase=three_phase)
    rate, momentum = (np.asarray(schedule(COUNTS)) for schedule in schedules)
    final = 1e-5 if preset == "fastai" else 4e-6
    top = int(rate.argmax())
    assert final * (1 - 1e-6) <= rate.min() and rate.max() <= 1
    assert (np.diff(rate[: top + 1]) >= 0).all() and (np.diff(rate[top:]) <= 0).all()
    assert 0.85 * (1 - 1e-6) <= momentum.min() and momentum.max() <= 0.95 * (1 + 1e-6)
    if not three_phase:  # there the momentum is constant in the last phase
        # Opposite, on the same phases: both weights are those of the same cosine.
        top = min(top, int(momentum.argmin()))
        assert (np.diff(momentum[: top + 1]) <= 1e-7).all() and (np.diff(momentum[top + 1 :]) >= -1e-7).all()
    assert rate[-1] == rate[min(total_steps, len(COUNTS) - 1)]


# --- Past 2**24 steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2**24 + 1, 2**24 + 3, 3 * 2**22 + 1, 10**9 + 7])
def test_staircases_are_exact(every):
    turns = [m * every for m in range(1, LAST // every + 1)]
    counts = np.array([count for turn in turns for count in (turn - 1, turn, turn + 1)] + [LAST])
    for schedule in (step_decay(1.0, 0.9, every), exponential_decay(1.0, every, 0.9, staircase=True)):
        close(at(schedule, counts), 0.9 ** (counts // every), 2e-6)
    close(at(exponential_decay(1.0, every, 0.9), counts), 0.9 ** (counts / every), 2e-6)
    values = at(step_decay(1.0, 0.5, every), counts)
    np.testing.assert_array_equal(
        values[counts // every < 126], 0.5 ** (counts // every)[counts // every < 126]
    )


@pytest.mark.parametrize("near", [2**24, 2**25, 2**30, LAST - 20])
def test_epochs_and_cycles_are_exact(near):
    counts = np.arange(near - 20, near + 21)
    counts = counts[counts <= LAST]
    np.testing.assert_array_equal(at(per_epoch(lambda epoch: epoch, 3), counts), counts // 3)
    np.testing.assert_array_equal(at(cyclical(0.0, 1.0, 4), counts), 1 - np.abs(counts % 8 - 4) / 4)
    # The second cycle of triangular2 is half as high, hence half as steep.
    begin = near // 2
    wide = at(cyclical(0.0, 1.0, begin, "triangular2"), 2 * begin + np.array([-begin, -1, 0, 1, 2]))
    close(wide, [1.0, 1 / begin, 0.0, 0.5 / begin, 1 / begin], 2e-6)


def test_phases_begin_and_end_on_their_step():
    total = 2**24 + 101
    counts = total - np.arange(8, -3, -1)
    short = warmup_stable_decay(1.0, total, warmup_steps=3, decay_steps=4, shape="linear")
    np.testing.assert_array_equal(at(short, counts), np.clip((total - counts) / 4, 0, 1))
    for end in (total, LAST):
        counts = end - np.arange(6, -1, -1)
        steady = warmup_stable_decay(1.0, end, warmup_steps=0, decay_steps=2**20, shape="linear")
        np.testing.assert_array_equal(at(steady, counts), (end - counts) / 2**20)
    # A decay over 2**26 steps still resolves each of its last steps.
    counts = 2**26 - np.arange(6, -1, -1)
    long = warmup_stable_decay(1.0, 2**26, warmup_steps=0, decay_steps=2**26, shape="linear")
    np.testing.assert_array_equal(at(long, counts), (2**26 - counts) / 2**26)
    roots = warmup_stable_decay(1.0, 2**26, warmup_steps=0, decay_steps=2**26)
    close(at(roots, counts), (2**26 - counts) / 2**27, 2e-6)  # 1 - sqrt(1 - x) = x/2 + O(x^2)
    cosine = warmup_cosine(1.0, 2**26)
    close(at(cosine, counts), (np.pi / 2 * (2**26 - counts) / 2**26) ** 2, 2e-6)  # sin(x)^2 = x^2 + O(x^4)


@pytest.mark.parametrize(("factor", "near"), [(1, 2**24), (1, LAST - 20), (2, 2**25), (1.5, 2**30)])
def test_restarts_are_on_their_step(factor, near):
    # Counted in integers: the periods that begin near a count beyond float32's integers.
    first, warmup = 11, 3
    begins, period = warmup, 0
    if factor == 1:
        begins += -(-(near - warmup) // first) * first
    while begins < near:
        begins, period = begins + round(first * factor**period), period + 1
    schedule = cosine_restarts(1.0, first, period_factor=factor, warmup_steps=warmup)
    before, at_start = at(schedule, np.array([begins - 1, begins], np.int32))
    assert at_start == 1.0 and before < 0.1


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_restarts_are_pytorchs(factor, x64):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7, factor, eta_min=0.01)
    values = []
    for _ in range(100):
        values.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    close(at(cosine_restarts(0.3, 7, period_factor=factor, end_value=0.01), np.arange(100)), values, 1e-12)


def test_restarts_are_optaxs_sgdr(x64):
    # A warm-up in the first period only; optax counts it as a part of that.
    cycles = [
        {"init_value": 0.05, "peak_value": 0.3, "warmup_steps": 4, "decay_steps": 14, "end_value": 0.02},
        {"init_value": 0.3, "peak_value": 0.3, "warmup_steps": 0, "decay_steps": 20, "end_value": 0.02},
        {"init_value": 0.3, "peak_value": 0.3, "warmup_steps": 0, "decay_steps": 40, "end_value": 0.02},
    ]
    ours = cosine_restarts(0.3, 10, period_factor=2, warmup_steps=4, init_value=0.05, end_value=0.02)
    close(at(ours, np.arange(74)), at(optax.sgdr_schedule(cycles), np.arange(74)), 1e-9)


def test_one_cycle_peaks_on_its_step():
    total = 2**25
    top = total - 3  # odd, so float32 has neither it nor its neighbours; and then down in three steps
    for preset, shift in (("torch", -1), ("fastai", 0), ("optax", 0)):
        schedules = one_cycle(1.0, total, preset=preset, pct_start=1 - 3 / total, final_div_factor=1e9)
        fall = np.array([1.0, 1.0, 0.75, 0.25, 0.0, 0.0])  # cos(pi/2 k/3)**2 from k = 0
        counts = top + shift + np.arange(-1, 5)
        close(at(schedules.learning_rate, counts), fall, 2e-6, atol=1e-8)
        close(at(schedules.momentum, counts), 0.95 - 0.1 * fall, 2e-6)


def test_smooth_decay_resolves_steps():
    begin = 2**25
    late = exponential_decay(1.0, 2, 0.25, transition_begin=begin)
    np.testing.assert_allclose(at(late, begin + np.arange(5)), 0.5 ** np.arange(5), rtol=2e-6)
    counts = np.concatenate([2**24 + np.arange(9), 2**26 + np.arange(9), [10**9]])
    for steps, rate in ((1, 1 - 1e-7), (3, 1 - 3e-7), (10**6 + 1, 0.5)):
        slow = exponential_decay(1.0, steps, rate)
        expected = np.exp(counts / steps * np.log1p(rate - 1))
        normal = expected > 1e-30
        close(
            at(slow, counts)[normal], expected[normal], 3e-6
        )  # 27 digits set in the exponent: as many products
    late = cyclical(0.0, 1.0, 2, "exp_range", 1 - 1e-7)
    close(at(late, [2**24 + 2, 2**26 + 2]), np.exp(np.array([2**24 + 2, 2**26 + 2]) * np.log1p(-1e-7)), 3e-6)
    # The Python float is used, not float32(0.999): that would be off by 1e-5 here.
    close(float(exponential_decay(1.0, 1, 0.999)(10_000)), 0.999**10_000, 2e-6)


def test_last_count_holds_and_larger_counts_saturate():
    assert float(one_cycle(1.0, 2).learning_rate(LAST)) == np.float32(4e-6)  # the peak lies before step 0
    assert float(inverse_sqrt(1.0, 2**29 - 1)(LAST)) == pytest.approx(0.5, rel=1e-6)
    schedule = per_epoch(lambda epoch: epoch, 2)
    for count in (2**31, 2**40, np.int64(2**31)):
        assert int(schedule(count)) == LAST // 2


# --- Traced rates, epochs -----------------------------------------------------------------------------------


def test_traced_rates():
    rates = np.array([0.5, 0.9, 1.25], np.float32)
    ours = jax.vmap(lambda rate: exponential_decay(0.3, 7, rate, end_value=0.1)(COUNTS))(rates)
    expected = [reference.exponential_decay(COUNTS, 0.3, 7, float(rate), end_value=0.1) for rate in rates]
    close(ours, np.stack(expected), 5e-6)
    ours = jax.vmap(lambda factor: step_decay(0.3, factor, 7)(COUNTS))(rates)
    close(ours, np.stack([reference.step_decay(COUNTS, 0.3, float(rate), 7) for rate in rates]), 5e-6)
    ours = jax.vmap(lambda gamma: cyclical(0.1, 0.3, 7, "exp_range", gamma)(COUNTS))(rates[:2])
    expected = [reference.cyclical(COUNTS, 0.1, 0.3, 7, "exp_range", float(rate)) for rate in rates[:2]]
    close(ours, np.stack(expected), 5e-6)


@given(st.integers(0, LAST), st.integers(1, LAST))
def test_per_epoch_gives_the_number_of_completed_epochs(count, steps):
    completed = per_epoch(lambda epoch: epoch, steps)(count)
    assert completed.dtype == jnp.int32 and int(completed) == count // steps
    fraction = per_epoch(lambda epoch: epoch, steps, fractional=True)(count)
    assert fraction.dtype == jnp.float32 and float(fraction) == pytest.approx(count / steps, rel=2e-7)


def test_per_epoch_keeps_the_type_of_the_value():
    for value, dtype in ((0.1, jnp.float32), (3, jnp.int32), (jnp.bfloat16(2), jnp.bfloat16)):
        result = per_epoch(lambda epoch, value=value: value, 10)(5)
        assert result.dtype == dtype and not result.weak_type


def test_fractional_epoch_resolves_every_step():
    epochs = at(per_epoch(lambda epoch: epoch, 1000, fractional=True), 2**23 + np.arange(5))
    close(epochs, (2**23 + np.arange(5)) / 1000, 1e-7)
    assert (np.diff(epochs) > 0).all()


# --- Arguments ----------------------------------------------------------------------------------------------

WRONG = [
    (exponential_decay, {"init_value": -0.1}),
    (exponential_decay, {"init_value": math.nan}),
    (exponential_decay, {"transition_steps": 0}),
    (exponential_decay, {"transition_steps": 1.5}),
    (exponential_decay, {"transition_steps": 2**31}),
    (exponential_decay, {"decay_rate": 0.0}),
    (exponential_decay, {"decay_rate": -0.5}),
    (exponential_decay, {"transition_begin": -1}),
    (exponential_decay, {"staircase": 1}),
    (exponential_decay, {"end_value": -0.1}),
    (step_decay, {"init_value": -0.1}),
    (step_decay, {"factor": 0.0}),
    (step_decay, {"every": 0}),
    (cyclical, {"base_value": -0.1}),
    (cyclical, {"peak_value": math.inf}),
    (cyclical, {"half_cycle": 0}),
    (cyclical, {"half_cycle": 2**30}),
    (cyclical, {"mode": "square"}),
    (cyclical, {"mode": "exp_range", "gamma": 1.1}),
    (cyclical, {"mode": "exp_range", "gamma": 0.0}),
    (cyclical, {"gamma": 0.9}),
    (cyclical, {"mode": "triangular2", "gamma": 0.9}),
    (warmup_stable_decay, {"peak_value": -1.0}),
    (warmup_stable_decay, {"total_steps": 0}),
    (warmup_stable_decay, {"warmup_steps": -1}),
    (warmup_stable_decay, {"warmup_steps": 101}),
    (warmup_stable_decay, {"decay_steps": 91}),
    (warmup_stable_decay, {"decay_steps": -1}),
    (warmup_stable_decay, {"shape": "sqrt"}),
    (warmup_cosine, {"peak_value": [0.1]}),
    (warmup_cosine, {"total_steps": 0}),
    (warmup_cosine, {"total_steps": True}),
    (warmup_cosine, {"warmup_steps": 101}),
    (warmup_cosine, {"init_value": -0.1}),
    (warmup_cosine, {"end_value": -0.1}),
    (cosine_restarts, {"peak_value": -0.1}),
    (cosine_restarts, {"first_period": 0}),
    (cosine_restarts, {"first_period": 2.5}),
    (cosine_restarts, {"period_factor": 0.5}),
    (cosine_restarts, {"period_factor": 1.0001}),
    (cosine_restarts, {"period_factor": math.inf}),
    (cosine_restarts, {"warmup_steps": -1}),
    (cosine_restarts, {"init_value": -0.1}),
    (cosine_restarts, {"end_value": -0.1}),
    (cosine_restarts, {"peak_factor": 0.0}),
    (inverse_sqrt, {"peak_value": -0.1}),
    (inverse_sqrt, {"warmup_steps": 0}),
    (per_epoch, {"schedule": 0.1}),
    (per_epoch, {"steps_per_epoch": 0}),
    (per_epoch, {"fractional": None}),
    (one_cycle, {"peak_value": -0.1}),
    (one_cycle, {"total_steps": 0}),
    (one_cycle, {"preset": "keras"}),
    (one_cycle, {"pct_start": 0.0}),
    (one_cycle, {"pct_start": 1.01}),
    (one_cycle, {"three_phase": True, "pct_start": 0.51}),
    (one_cycle, {"three_phase": "yes"}),
    (one_cycle, {"three_phase": True, "preset": "fastai"}),
    (one_cycle, {"three_phase": True, "preset": "optax"}),
    (one_cycle, {"div_factor": 0.5}),
    (one_cycle, {"final_div_factor": 0.0}),
    (one_cycle, {"max_momentum": 1.0}),
    (one_cycle, {"base_momentum": -0.1}),
    (one_cycle, {"base_momentum": 0.96}),
]
VALID = {
    exponential_decay: {"init_value": 0.1, "transition_steps": 10, "decay_rate": 0.5},
    step_decay: {"init_value": 0.1, "factor": 0.5, "every": 10},
    cyclical: {"base_value": 0.1, "peak_value": 0.2, "half_cycle": 10},
    warmup_stable_decay: {"peak_value": 0.1, "total_steps": 100, "warmup_steps": 10, "decay_steps": 10},
    warmup_cosine: {"peak_value": 0.1, "total_steps": 100},
    cosine_restarts: {"peak_value": 0.1, "first_period": 10},
    inverse_sqrt: {"peak_value": 0.1, "warmup_steps": 10},
    per_epoch: {"schedule": step_decay(0.1, 0.5, 1), "steps_per_epoch": 10},
    one_cycle: {"peak_value": 0.1, "total_steps": 100},
}


@pytest.mark.parametrize(
    ("factory", "wrong"), WRONG, ids=[f"{factory.__name__} {wrong}" for factory, wrong in WRONG]
)
def test_impossible_arguments_are_named(factory, wrong):
    factory(**VALID[factory])
    name = list(wrong)[0] if factory is one_cycle else list(wrong)[-1]
    value = wrong[name]
    if name == "three_phase" and "pct_start" in wrong:
        name, value = "pct_start", wrong["pct_start"]
    with pytest.raises(ValueError) as error:
        factory(**(VALID[factory] | wrong))
    assert str(error.value).startswith(f"{name} must be ")
    assert str(value) in str(error.value)


def test_the_longest_cycle_that_a_step_count_can_hold():
    half = LAST // 2
    values = at(cyclical(0.0, 1.0, half), np.array([0, half, 2 * half], np.int32))
    np.testing.assert_array_equal(values, [0.0, 1.0, 0.0])


def test_traced_step_counts_are_refused():
    with pytest.raises(ValueError, match="total_steps must be an integer"):
        jax.vmap(lambda total: warmup_cosine(0.1, total)(0))(jnp.arange(1, 3))

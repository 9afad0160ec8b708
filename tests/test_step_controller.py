"""The step-size controllers, against diffrax's, in closed forms and at errors of 0, infinity and NaN."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import PIDController
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from adaptive_optax.wrappers.step_controller import (
    CONTROLLERS,
    ErrorHistory,
    StepController,
    as_controller,
    next_factor,
    no_history,
)

WIDE = {"min_factor": 1e-30, "max_factor": 1e30}
GAINS = {
    "integral": {"integral": 1.0},
    "pi": {"integral": 0.3, "proportional": 0.4},
    "noisy": {"integral": 0.3, "proportional": 0.1},
    "pid": {"integral": 0.3, "proportional": 0.2, "derivative": 0.15},
    "derivative": {"integral": 0.2, "derivative": 0.5},
}


def history_of(last, before):
    return ErrorHistory(jnp.log(jnp.asarray(last)), jnp.log(jnp.asarray(before)))


def factor_of_diffrax(controller, error, last, before):
    """diffrax's factor for a step of length 1, and its two inverse errors for the next.

    Its errors are relative to atol + rtol |y|, made 1 here. It divides the gains by the order of the error, 1
    for one that is relative to the step's length.
    """
    theirs = PIDController(
        rtol=0.0,
        atol=1.0,
        icoeff=controller.integral,
        pcoeff=controller.proportional,
        dcoeff=controller.derivative,
        safety=controller.safety,
        factormin=controller.min_factor,
        factormax=controller.max_factor,
        error_order=1,
    )
    zero = jnp.zeros(())
    inverse_errors = (1 / jnp.asarray(last), 1 / jnp.asarray(before), jnp.asarray(False))
    kept, start, end, _, state, _ = theirs.adapt_step_size(
        zero, zero + 1, zero, zero, None, jnp.asarray(error), 1, inverse_errors
    )
    return bool(kept), float(end - start), state[:2]


def unclipped(controller, error, last, before):
    k_i, k_p, k_d = controller.integral, controller.proportional, controller.derivative
    return controller.safety * error ** -(k_i + k_p + k_d) * last ** (k_p + 2 * k_d) * before**-k_d


ERRORS = (1e-3, 0.2, 0.9, 1.5, 30.0)


@pytest.mark.parametrize("gains", GAINS)
def test_the_factor_is_that_of_diffrax(gains, x64):
    # It never shortens a step that it keeps, nor lengthens one that it repeats; elsewhere it does not clip.
    controller, compared = StepController(**GAINS[gains], **WIDE), 0
    for error, last, before in itertools.product(ERRORS, repeat=3):
        kept, theirs, _ = factor_of_diffrax(controller, error, last, before)
        ours, _ = next_factor(controller, history_of(last, before), error)
        if kept and ours >= 1 or not kept and ours <= controller.safety:
            assert ours == pytest.approx(theirs, rel=1e-6)
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("gains", GAINS)
def test_the_factor_is_clipped_as_diffrax_clips_it(gains, x64):
    controller, low, high = StepController(**GAINS[gains], min_factor=0.3, max_factor=1.5), 0, 0
    for error, last, before in itertools.product(ERRORS, repeat=3):
        kept, theirs, _ = factor_of_diffrax(controller, error, last, before)
        ours, _ = next_factor(controller, history_of(last, before), error)
        own = max(1.0, ours) if kept else min(controller.safety, ours)  # what diffrax does besides
        assert own == pytest.approx(theirs, rel=1e-6)
        low, high = low + (theirs == 0.3), high + (theirs == 1.5)
    assert low > 5 and high > 5


@pytest.mark.parametrize("gains", GAINS)
def test_the_history_is_that_of_diffrax(gains, x64):
    controller = StepController(**GAINS[gains], max_factor=10.0)
    history, theirs = no_history(jnp.float64), (1.0, 1.0)
    for error in (0.5, 0.1, 0.9, 0.0, 0.4, 0.99, 0.3):  # it keeps all of these steps
        factor, history = next_factor(controller, history, error)
        kept, expected, theirs = factor_of_diffrax(controller, error, *(1 / x for x in theirs))
        assert kept and max(float(factor), 1.0) == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(np.exp([-history.last, -history.before]), theirs, rtol=1e-6)


@given(errors=st.tuples(*[st.floats(-60, 60)] * 3), gains=st.sampled_from(sorted(GAINS)))
def test_the_factor_is_the_formula_however_large_the_errors(errors, gains):
    controller = StepController(**GAINS[gains])
    error, last, before = (math.exp(x) for x in errors)
    factor, _ = next_factor(controller, history_of(jnp.float32(last), jnp.float32(before)), error)
    expected = unclipped(controller, error, last, before)
    assert factor == pytest.approx(np.clip(expected, 0.2, 2.0), rel=1e-4)


def test_factors_that_overflow_alone_do_not_together():
    # 1e-30 ** -1.5 is too large for float32, (1e-22) ** 2 too small; with 10 ** -1 they make 1.
    history = history_of(jnp.float32(1e-22), jnp.float32(10.0))
    factor, _ = next_factor(StepController(integral=0.5, derivative=1.0), history, jnp.float32(1e-30))
    assert factor == pytest.approx(0.9, rel=1e-4)


def test_the_integral_controller_is_done_in_one_step():
    # E = h L: from h = 1 the next step is sigma / L, where E = sigma, and from there sigma / E is 1.
    controller, history, h = StepController(safety=0.9, **WIDE), no_history(jnp.float32), 1.0
    for _ in range(3):
        factor, history = next_factor(controller, history, 40.0 * h)
        h = h * float(factor)
        assert 40.0 * h == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_preset_settles_where_its_error_is_the_safety_to_its_gain(name):
    # At rest 1 = sigma E^-kI, as the other exponents cancel, which is slow but sure for kI < 1.
    controller, history, h = CONTROLLERS[name], no_history(jnp.float32), 1.0
    for _ in range(60):
        factor, history = next_factor(controller, history, 40.0 * h)
        h = h * float(factor)
    assert 40.0 * h == pytest.approx(0.9 ** (1 / controller.integral), rel=1e-3)


def test_presets():
    assert as_controller("smooth") == StepController(1.0, 0.0, 0.0)
    assert as_controller("pi") == StepController(0.3, 0.4, 0.0)
    assert as_controller("noisy") == StepController(0.3, 0.1, 0.0)
    own = StepController(0.5)
    assert as_controller(own) is own
    assert (own.safety, own.min_factor, own.max_factor) == (0.9, 0.2, 2.0)
    refused(
        lambda: as_controller("fast"),
        "controller must be None, a StepController or one of 'smooth', 'pi', 'noisy', got 'fast'",
    )


@pytest.mark.parametrize("gains", GAINS)
def test_no_error_and_errors_that_are_not_finite(gains):
    controller, history = StepController(**GAINS[gains]), history_of(jnp.float32(0.5), jnp.float32(3.0))
    factor, after = next_factor(controller, history, 0.0)
    assert factor == 2.0 and after == (0.0, history.last)
    for error in (jnp.nan, jnp.inf):
        factor, after = next_factor(controller, history, error)
        assert factor == np.float32(0.2) and after == history
    with jax.debug_nans(True), jax.debug_infs(True):
        next_factor(controller, no_history(jnp.float32), 0.0)


def test_it_is_static_and_keeps_its_dtypes():
    step = jax.jit(next_factor, static_argnums=0)
    controllers = [StepController(jnp.float32(0.5)), StepController(0.5)]
    assert len({*controllers}) == 1 and controllers[0] == controllers[1]
    history = no_history(jnp.float32)
    for controller in controllers:
        with jax.numpy_dtype_promotion("strict"):
            factor, history = step(controller, history, jnp.bfloat16(0.5))
        assert {x.dtype for x in (factor, *history)} == {jnp.dtype("float32")}
        assert not any(x.weak_type for x in (factor, *history))
    assert step._cache_size() == 1
    with pytest.raises(AttributeError):
        controllers[0].safety = 1.0


@pytest.mark.parametrize(
    ("name", "wrong", "interval"),
    [
        ("integral", -0.1, "[0, inf)"),
        ("proportional", math.nan, "[0, inf)"),
        ("derivative", -1, "[0, inf)"),
        ("safety", 0.0, "(0, 1]"),
        ("safety", 1.1, "(0, 1]"),
        ("min_factor", 0.0, "(0, 1]"),
        ("max_factor", 0.5, "[1, inf)"),
    ],
)
def test_what_is_refused(name, wrong, interval):
    refused(lambda: StepController(**{name: wrong}), f"{name} must be a number in {interval}, got {wrong}")


def test_a_traced_gain_is_refused():
    refused(lambda: jax.jit(lambda x: StepController(x).safety)(0.5), "integral must be a number in [0, inf)")

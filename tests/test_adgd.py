"""Adaptive gradient descent: the papers' iterates, closed forms, what the papers leave open, convergence."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from reference.adgd import RULES, AdgdReference, minimise
from refusals import refused
from saving import same, spec, through_bytes, through_orbax
from sklearn.datasets import load_breast_cancer
from tolerances import REFERENCE

import adaptive_optax as ao

each_rule = pytest.mark.parametrize("rule", RULES)
GROWTH = {"2020": (1 + math.sqrt(5)) / 2, "2023": (1 + math.sqrt(1 + 8 / 3)) / 2}
"""The solutions of r = sqrt(a + r), a being 1 and 2/3: ratios of rates that are limited by their growth."""


@functools.cache
def breast_cancer():
    """569 standardised rows with a 1 at the end, and labels of -1 and 1."""
    data = load_breast_cancer()
    x = (data.data - data.data.mean(axis=0)) / data.data.std(axis=0)
    return np.column_stack([x, np.ones(len(x))]), 2.0 * data.target - 1


def logistic_loss(w):
    x, labels = breast_cancer()
    return jnp.mean(jnp.logaddexp(0, -labels * (x @ w))) + 1e-3 / 2 * jnp.sum(w * w)


def logistic_gradient(w, columns=31):
    """In NumPy, for the library and the reference; perhaps of the last columns only."""
    x, labels = breast_cancer()
    x = x[:, -columns:]
    return -(labels / (1 + np.exp(labels * (x @ w)))) @ x / len(x) + 1e-3 * w


def descend(tx, gradient, params, steps, state=None):
    """The parameters before each step and after the last, and the learning rates: Python's loop."""
    state, step = tx.init(params) if state is None else state, jax.jit(tx.update)
    iterates, rates = [params], []
    for _ in range(steps):
        updates, state = step(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(params)
        rates.append(float(ao.get_hyperparams(state)["learning_rate"]))
    return iterates, np.array(rates), state


def scanned(tx, gradient, params, steps):
    """The same iterates, stacked, and learning rates, in one program."""

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state.learning_rate)

        return jax.lax.scan(body, (params, tx.init(params)), length=steps)[1]

    return jax.tree.map(np.asarray, run(params))


# The papers' iterates.


def as_tree(flat):
    return {"w": jnp.asarray(flat[:-1]), "b": jnp.asarray(flat[-1])}


def as_flat(tree):
    return np.append(tree["w"], tree["b"])


@each_rule
@pytest.mark.parametrize("initial", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize(("columns", "steps"), [(4, 200), (31, 40)])
def test_iterates_are_those_of_the_paper(columns, steps, rule, initial, x64):
    # Four columns converge. With all of them a rounding error grows a millionfold from 40 steps to 100, in
    # the reference too.
    gradient = functools.partial(logistic_gradient, columns=columns)
    expected, _ = minimise(gradient, np.zeros(columns), steps, initial, rule)
    tx = ao.adgd(initial_learning_rate=initial, rule=rule)
    iterates, _, _ = descend(tx, lambda p: as_tree(gradient(as_flat(p))), as_tree(np.zeros(columns)), steps)
    np.testing.assert_allclose(np.stack([*map(as_flat, iterates)]), expected, rtol=0, atol=1e-10)


@each_rule
@pytest.mark.parametrize("initial", [1e-6, 1e-2, 10.0])
def test_each_of_200_learning_rates_is_that_of_the_paper(rule, initial, x64):
    # The reference is given the library's iterates, so that rounding errors do not grow.
    tx = ao.adgd(initial_learning_rate=initial, rule=rule)
    start = as_tree(np.zeros(31))
    iterates, rates, _ = descend(tx, lambda p: as_tree(logistic_gradient(as_flat(p))), start, 200)
    reference = AdgdReference(initial, rule)
    flat = [*map(as_flat, iterates)]
    expected = [reference.step(x, logistic_gradient(x)) for x in flat[:-1]]
    np.testing.assert_allclose(rates, expected, rtol=REFERENCE["float64"])


@each_rule
def test_each_learning_rate_is_that_of_the_paper_whatever_the_curvature_does(rule, x64):
    # Curvatures over eight decades, so that every limit is the smallest now and then, also in the third step.
    rng, tx = np.random.default_rng(0), ao.adgd(initial_learning_rate=1e-8, rule=rule)
    start, step = tx.init(np.zeros(5)), jax.jit(tx.update)
    for _ in range(10):
        state, reference = start, AdgdReference(1e-8, rule)
        for _ in range(30):
            x, g = rng.normal(size=5), 10.0 ** rng.uniform(-4, 4) * rng.normal(size=5)
            _, state = step(g, state, x)
            np.testing.assert_allclose(state.learning_rate, reference.step(x, g), rtol=REFERENCE["float64"])


@each_rule
def test_complex_leaves_count_with_their_absolute_values(rule, x64):
    # The reference sees real and imaginary parts as coordinates.
    curvature = np.array([1.0, 3.0, 10.0, 30.0])

    def gradient(params):
        return {"a": curvature[:2] * params["a"], "b": curvature[2:] * params["b"]}

    def both(a, b):
        return np.concatenate([np.real(a), np.imag(a), b])

    params = {"a": jnp.array([1 + 2j, 3 - 1j], jnp.complex128), "b": jnp.array([1.0, -2.0], jnp.float64)}
    whole = np.concatenate([curvature[:2], curvature[:2], curvature[2:]])
    expected, rates = minimise(lambda x: whole * x, both(**params), 60, 1e-3, rule)
    iterates, found, _ = descend(ao.adgd(initial_learning_rate=1e-3, rule=rule), gradient, params, 60)
    np.testing.assert_allclose(found, rates, rtol=REFERENCE["float64"])
    np.testing.assert_allclose(np.stack([both(**p) for p in iterates]), expected, atol=REFERENCE["float64"])


@each_rule
def test_the_step_is_measured_from_the_parameters(rule, x64):
    # A link behind takes a part of each step, and the parameters are changed by hand once.
    curvature, reference = np.array([1.0, 5.0, 20.0]), AdgdReference(1e-3, rule)
    tx = optax.chain(ao.adgd(initial_learning_rate=1e-3, rule=rule), optax.scale(0.3))
    params = jnp.array([1.0, -2.0, 3.0], jnp.float64)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(40):
        if step == 20:
            params = jnp.array([5.0, 5.0, -5.0], jnp.float64)
        g = curvature * params
        expected = reference.step(np.asarray(params), np.asarray(g))
        updates, state = update(g, state, params)
        np.testing.assert_allclose(updates, -0.3 * expected * g, rtol=REFERENCE["float64"])
        params = optax.apply_updates(params, updates)


def test_float32_follows_at_first():
    # Longer than that rounding errors grow, as above.
    _, rates = minimise(logistic_gradient, np.zeros(31), 12, 1e-2, "2020")
    _, found, _ = descend(
        ao.adgd(initial_learning_rate=1e-2),
        lambda w: logistic_gradient(np.asarray(w, np.float64)).astype(np.float32),
        jnp.zeros(31),
        12,
    )
    np.testing.assert_allclose(found, rates, rtol=1e-5)


# Closed forms.


def test_on_a_parabola_the_parameter_is_halved_at_every_step(x64):
    # L = 7 everywhere, so that from the second step on the rate is 1/14 and x_{k+1} = x_k - 7 x_k / 14.
    iterates, rates, _ = descend(ao.adgd(), lambda x: 7 * x, jnp.ones((), jnp.float64), 30)
    np.testing.assert_allclose(rates[1:], 1 / 14, rtol=1e-9)
    np.testing.assert_allclose(np.array(iterates[2:]) / np.array(iterates[1:-1]), 0.5, rtol=1e-9)


def test_on_a_parabola_the_longer_rates_oscillate_about_1_over_the_curvature(x64):
    # lambda_k = lambda / sqrt(2 lambda^2 L^2 - 1) is 1 / lambda_k^2 + 1 / lambda_{k-1}^2 = 2 L^2.
    tx = ao.adgd(initial_learning_rate=1.1 / 7, rule="2023")
    _, rates, _ = descend(tx, lambda x: 7 * x, jnp.ones((), jnp.float64), 8)
    np.testing.assert_allclose(rates[1:] ** -2.0 + rates[:-1] ** -2.0, 2 * 49, rtol=1e-9)
    assert rates[1] < 1 / 7 < rates[0]


@each_rule
def test_what_limits_growth_is_the_golden_ratio_or_its_like(rule):
    # A constant gradient has no curvature, so that growth is the only limit: r = sqrt(a + r).
    _, rates, _ = descend(ao.adgd(rule=rule), jnp.ones_like, jnp.ones(3), 40)
    ratios = rates[1:] / rates[:-1]
    assert ratios[0] == pytest.approx(math.sqrt(2) if rule == "2020" else 1.0)
    np.testing.assert_allclose(ratios[20:], GROWTH[rule], rtol=1e-5)


def test_the_longer_rates_grow_as_fast_as_they_may_from_a_tiny_first_step(x64):
    # Far below 1 / (sqrt(2) L) the bound is infinite.
    _, rates, _ = descend(
        ao.adgd(initial_learning_rate=1e-12, rule="2023"), lambda x: x, jnp.ones((), jnp.float64), 60
    )
    np.testing.assert_allclose((rates[1:] / rates[:-1])[20:50], GROWTH["2023"], rtol=1e-5)


# Invariances.


CURVATURES = np.float32([1.0, 3.0, 20.0, 50.0])


@each_rule
@given(power=st.integers(-20, 20))
def test_a_multiple_of_the_function_has_the_same_iterates(rule, power):
    # Bit for bit: the factors are powers of two, and no square is lost.
    iterates, rates = scaled_run(rule, 0)
    found, found_rates = scaled_run(rule, power)
    np.testing.assert_array_equal(found, iterates)
    np.testing.assert_array_equal(found_rates * 2.0**power, rates)


@functools.cache
def scaled_program(rule):
    def run(factor):
        tx = ao.adgd(initial_learning_rate=1e-3 / factor, rule=rule)

        def body(carry, _):
            x, state = carry
            updates, state = tx.update(factor * (CURVATURES * x), state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), (x, state.learning_rate)

        start = jnp.array([1.0, -2.0, 3.0, 0.5])
        return jax.lax.scan(body, (start, tx.init(start)), length=40)[1]

    return jax.jit(run)


def scaled_run(rule, power):
    return jax.tree.map(np.asarray, scaled_program(rule)(jnp.float32(2.0**power)))


@each_rule
def test_the_shape_of_the_tree_does_not_matter(rule, x64):
    x = np.random.default_rng(0).normal(size=12)
    curvature = np.geomspace(1, 100, 12)
    tx = ao.adgd(rule=rule)

    def tree(flat):
        return {"a": flat[:6].reshape(2, 3), "b": (flat[6:11], flat[11])}

    parts = tree(jnp.asarray(curvature))
    whole, rates = scanned(tx, lambda p: curvature * p, jnp.asarray(x), 50)
    split, split_rates = scanned(tx, lambda p: jax.tree.map(jnp.multiply, p, parts), tree(jnp.asarray(x)), 50)
    flat = np.concatenate([split["a"].reshape(50, 6), split["b"][0], split["b"][1][:, None]], axis=1)
    np.testing.assert_allclose(flat, whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(split_rates, rates, rtol=1e-9)


START = jnp.array([1.0, -2.0, 3.0, 0.5])


@pytest.mark.parametrize("power", [-100, -66, 33, 50])
@each_rule
def test_gradients_from_1e_30_to_1e15_neither_overflow_nor_vanish(rule, power):
    size = np.float32(2.0**power)
    with jax.debug_nans(True), jax.debug_infs(True):
        found, rates = scanned(
            ao.adgd(initial_learning_rate=1e-3 / size, rule=rule),
            lambda x: size * (CURVATURES * x),
            START,
            30,
        )
    assert np.abs(found[-1]).max() < 1 < np.abs(found[0]).max() and 0.005 < rates[-1] * size < 0.6


@pytest.mark.parametrize("power", [-93, 83])
@each_rule
def test_parameters_of_any_size(rule, power):
    tx, size = ao.adgd(initial_learning_rate=1e-3, rule=rule), np.float32(2.0**power)
    unit, rates = scanned(tx, lambda x: CURVATURES * x, START, 30)
    found, found_rates = scanned(tx, lambda x: CURVATURES * x, size * START, 30)
    np.testing.assert_array_equal(found / size, unit)
    np.testing.assert_array_equal(found_rates, rates)


@each_rule
def test_a_linear_function_ends_with_the_largest_rate(rule):
    tx = ao.adgd(initial_learning_rate=1e30, rule=rule)
    state, step = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for count in range(60):
        _, state = step(jnp.full(2, 1e-30), state, jnp.full(2, float(count)))
    assert 1e38 < state.learning_rate < jnp.inf


# What the papers leave open.


def rate_after(tx, *points):
    """The learning rates, given parameters and gradients step by step."""
    state, rates = tx.init(points[0][0]), []
    for params, gradient in points:
        _, state = tx.update(gradient, state, params)
        rates.append(float(state.learning_rate))
    return rates


def test_a_zero_gradient_and_parameters_that_are_held_say_nothing():
    tx = ao.adgd(initial_learning_rate=0.5)
    x, g, zero = jnp.ones(2), jnp.array([1.0, 2.0]), jnp.zeros(2)
    assert rate_after(tx, (x, zero), (x, zero), (x, g)) == [0.5] * 3
    assert rate_after(tx, (x, g), (x, g), (x, 2 * g), (x, g)) == [0.5] * 4
    # The first that says something is the first that limits: s = 1, y = 10 (1, 2).
    later = rate_after(tx, (x, g), (x, g), (x + jnp.array([1.0, 2.0]), 11 * g))
    np.testing.assert_allclose(later, [0.5, 0.5, 0.05], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_step_that_is_rounded_away_is_doubled(dtype):
    tx = ao.adgd(initial_learning_rate=1e-6)
    x, g = jnp.ones(3, dtype), jnp.full(3, 1e-3, dtype)
    params, rates, state = x, [], tx.init(x)
    while bool(jnp.all(params == x)) and len(rates) < 40:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        rates.append(float(state.learning_rate))
    np.testing.assert_allclose(rates, 1e-6 * 2.0 ** np.arange(len(rates)), rtol=1e-5)
    half_a_unit = float(jnp.finfo(dtype).eps) / 4  # the numbers below 1 are half as far apart
    assert half_a_unit / 2 < rates[-1] * float(g[0]) <= 2.1 * half_a_unit
    assert state.ratio == jnp.finfo(jnp.float32).max  # so that the first curvature is as good as at once
    updates, state = tx.update(1.5 * g, state, params)
    s, y = float(jnp.max(jnp.abs(params.astype(jnp.float32) - 1))), float(jnp.float32(0.5 * g[0]))
    assert state.learning_rate == pytest.approx(s / (2 * y), rel=2e-2)


def test_a_nan_holds_the_rate_for_as_long_as_it_is_in_the_difference():
    curvature = jnp.array([1.0, 4.0])
    tx = optax.chain(ao.adgd(initial_learning_rate=1e-2), optax.zero_nans())
    params = jnp.array([1.0, 1.0])
    state, rates = tx.init(params), []
    for step in range(8):
        g = curvature * params
        g = g.at[0].set(jnp.nan) if step == 4 else g
        updates, state = tx.update(g, state, params)
        assert jnp.isfinite(updates).all() and jnp.isfinite(state[0].learning_rate)
        params = optax.apply_updates(params, updates)
        rates.append(float(state[0].learning_rate))
    assert rates[3] == rates[4] == rates[5] != rates[6]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state[0]))
    infinite = jnp.array([jnp.inf, 1.0])
    assert len(set(rate_after(ao.adgd(), (params, params), (2 * params, infinite)))) == 1


def test_a_rejected_step_leaves_no_trace():
    tx = ao.reject_nonfinite(ao.adgd(initial_learning_rate=1e-2))
    _, rates, state = descend(tx, lambda x: CURVATURES * x, START, 5)
    params = jnp.array([0.1, 0.2, 0.3, 0.4])
    _, rejected = tx.update(START.at[1].set(jnp.nan), state, params)
    same(rejected.inner_state, state.inner_state)


def test_a_huge_gradient_makes_the_rate_tiny_and_it_grows_back():
    tx = ao.adgd(initial_learning_rate=1e-2)
    _, rates, state = descend(tx, lambda x: CURVATURES * x, START, 5)
    params, spike = state.params + 1e-3, CURVATURES * state.params + jnp.float32(1e20)
    _, state = tx.update(spike, state, params)
    assert 0 < state.learning_rate < 1e-20
    _, later, _ = descend(tx, lambda x: CURVATURES * x, params, 150, state)
    assert later[-1] > rates[-1] / 10


def test_a_rate_does_not_vanish():
    # s / (2 y) is 5e-48 here, which float32 has not.
    x = jnp.full(1, 1e-28)
    spike = jnp.full(1, 1e19)
    rates = rate_after(ao.adgd(), (x, x), (2 * x, spike), (3 * x, spike), (4 * x, spike))
    assert rates[1] == rates[2] == float(jnp.finfo(jnp.float32).tiny) and rates[3] > rates[2]


# A limit, and a rate that is set.


def test_the_limit_is_kept_and_the_control_goes_on_from_it(x64):
    # L = 1: the rate is 1/2, by the limit 0.1, and when that is lifted it grows by sqrt(1 + 1), then more.
    def limit(count):
        return jnp.where(count < 10, 0.1, jnp.inf)

    tx = ao.adgd(limit, initial_learning_rate=1e-3)
    _, rates, _ = descend(tx, lambda x: x, jnp.ones((), jnp.float64), 16)
    assert rates[0] == 1e-3
    np.testing.assert_allclose(rates[1:10], 0.1, rtol=1e-12)
    second = math.sqrt(2)
    third = math.sqrt(1 + second)
    np.testing.assert_allclose(rates[10:12], [0.1 * second, 0.1 * second * third], rtol=1e-12)
    np.testing.assert_allclose(rates[13:], 0.5, rtol=1e-9)


@each_rule
def test_a_warm_up_from_0_and_a_pause_do_not_stop_it(rule, x64):
    def limit(count):
        return jnp.where((count == 0) | (count == 6) | (count == 7), 0.0, 0.02 * count)

    tx = ao.adgd(limit, initial_learning_rate=1e-2, rule=rule)
    iterates, rates, _ = descend(tx, lambda x: 2 * x, jnp.ones((), jnp.float64), 40)
    assert rates[0] == rates[6] == rates[7] == 0 and rates[1] == 1e-2
    assert all(rates[k] <= 0.02 * k + 1e-15 for k in range(len(rates)))
    assert rates[8] == pytest.approx(rates[5]) and abs(float(iterates[-1])) < 1e-3


def test_growth_goes_on_after_a_pause():
    tx = ao.adgd(lambda count: jnp.where(count == 6, 0.0, jnp.inf), initial_learning_rate=1e-3)
    _, rates, _ = descend(tx, jnp.ones_like, jnp.ones(3), 9)
    assert rates[6] == 0 and rates[7] == rates[5] and rates[8] / rates[7] > 1.6


def test_a_number_and_a_traced_number_limit_too():
    def last(limit):
        return scanned(ao.adgd(limit), lambda x: CURVATURES * x, START, 20)[1][-1]

    assert last(1e-3) == last(jnp.float32(1e-3)) == np.float32(1e-3)

    def learning_rate(limit):
        tx = ao.adgd(limit, initial_learning_rate=1e-2)
        return tx.update(START, tx.init(START), START)[1].learning_rate

    assert jax.vmap(learning_rate)(jnp.array([1e-3, 1.0])).tolist() == [np.float32(1e-3), np.float32(1e-2)]


def test_the_rate_can_be_set_and_the_control_goes_on_from_it():
    tx = ao.adgd(initial_learning_rate=1e-3)
    state = ao.set_hyperparams(tx.init(START), learning_rate=2e-3)
    _, state = tx.update(CURVATURES * START, state, START)
    assert ao.get_hyperparams(state)["learning_rate"] == np.float32(2e-3)
    _, rates, state = descend(tx, lambda x: CURVATURES * x, START, 10)
    small = ao.set_hyperparams(state, learning_rate=1e-9)
    assert ao.get_hyperparams(small)["learning_rate"] == np.float32(1e-9)
    params = state.params + 1.0
    _, later = tx.update(CURVATURES * params, small, params)
    assert later.learning_rate == pytest.approx(1e-9 * math.sqrt(1 + float(state.ratio)), rel=1e-5)
    same(ao.set_hyperparams(state, learning_rate=None), state)
    assigned = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(1e-9))
    same(tx.update(CURVATURES * params, assigned, params), tx.update(CURVATURES * params, small, params))
    for wrong in (0.0, -1.0, np.inf):
        refused(lambda wrong=wrong: ao.set_hyperparams(state, learning_rate=wrong), "in (0, inf)")


# Moving parameters: programs, shardings, restored states, low precision.


PARAMS = {"a": jnp.linspace(-1.0, 2.0, 64).reshape(4, 16), "b": jnp.array([3.0, -2.0])}
STRETCH = {"a": jnp.geomspace(1.0, 50.0, 64).reshape(4, 16), "b": jnp.array([0.5, 80.0])}


def stretched(params):
    return jax.tree.map(jnp.multiply, STRETCH, params)


@each_rule
def test_scan_and_vmap_take_the_same_steps(rule):
    tx = ao.adgd(initial_learning_rate=1e-3, rule=rule)
    iterates, rates, _ = descend(tx, stretched, PARAMS, 15)
    _, in_scan = scanned(tx, stretched, PARAMS, 15)
    np.testing.assert_allclose(in_scan, rates, rtol=1e-4)

    @jax.jit
    @jax.vmap
    def step(params, state):
        updates, state = tx.update(stretched(params), state, params)
        return optax.apply_updates(params, updates), state

    members = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), PARAMS)
    state = jax.vmap(tx.init)(members)
    for _ in range(15):
        members, state = step(members, state)
    np.testing.assert_allclose(members["a"][0], iterates[-1]["a"], rtol=1e-3, atol=1e-5)
    assert np.asarray(state.learning_rate)[0] == pytest.approx(rates[-1], rel=1e-4)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_a_sharded_run_equals_the_unsharded_one(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    shardings = {"a": NamedSharding(mesh, PartitionSpec("x", "y")), "b": NamedSharding(mesh, PartitionSpec())}
    params, stretch = jax.device_put((PARAMS, STRETCH), (shardings, shardings))
    tx = ao.adgd(initial_learning_rate=1e-3)
    _, expected, _ = descend(tx, stretched, PARAMS, 10)
    with jax.set_mesh(mesh):
        _, rates, state = descend(tx, lambda p: jax.tree.map(jnp.multiply, stretch, p), params, 10)
    np.testing.assert_allclose(rates, expected, rtol=1e-4)
    for tree in (state.params, state.gradient):
        assert all(tree[name].sharding.is_equivalent_to(shardings[name], tree[name].ndim) for name in tree)


@pytest.mark.parametrize("through", [through_bytes, through_orbax])
def test_a_restored_run_continues_bit_for_bit(through, tmp_path):
    tx = ao.adgd(initial_learning_rate=1e-3)
    iterates, _, state = descend(tx, stretched, PARAMS, 6)
    restored = through(state, tx.init(PARAMS), tmp_path)
    assert spec(jax.tree.map(jnp.asarray, restored)) == spec(state)
    one, two = (descend(tx, stretched, iterates[-1], 5, s)[0][-1] for s in (state, restored))
    same(one, two)


def test_the_state_can_be_donated_while_the_parameters_are_kept():
    tx, params = ao.adgd(), jnp.array([1.0, 2.0])
    step = jax.jit(tx.update, donate_argnums=1)
    gradient, state = 2 * params, tx.init(params)
    for _ in range(3):
        _, state = step(gradient, state, params)
    assert params.tolist() == [1.0, 2.0] and gradient.tolist() == [2.0, 4.0]
    _, state = tx.update(gradient, state, params)
    _, state = step(gradient, state, params)
    assert params.tolist() == [1.0, 2.0] and gradient.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gets_as_near_as_its_rounding_lets_it(dtype):
    # The minimum is 1 everywhere; a coordinate stops where steps are rounded away.
    curvature = jnp.geomspace(1.0, 30.0, 8)
    start = jnp.linspace(2.0, 3.0, 8).astype(dtype)
    tx = ao.adgd()

    def gradient(x):
        return (curvature * (x.astype(jnp.float32) - 1)).astype(dtype)

    iterates, rates, state = descend(tx, gradient, start, 100)
    assert iterates[-1].dtype == start.dtype and state.params.dtype == state.gradient.dtype == jnp.float32
    assert np.abs(np.asarray(iterates[-1], np.float32) - 1).max() < 0.05
    assert np.isfinite(rates).all()


def test_groups_and_frozen_leaves_have_rates_of_their_own():
    groups = optax.partition({"x": ao.adgd(), "y": ao.adgd()}, {"a": "x", "b": "y"})
    _, _, state = descend_in(groups, 30)
    rates = ao.get_hyperparams(state)
    _, alone, _ = descend(ao.adgd(), lambda p: {"b": STRETCH["b"] * p["b"]}, {"b": PARAMS["b"]}, 30)
    assert rates["y/learning_rate"] == pytest.approx(alone[-1], rel=1e-3) != rates["x/learning_rate"]


def descend_in(tx, steps):
    params = PARAMS
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = step(stretched(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, None, state


# Convergence: gradients until their norm is a millionth of the first. The limits are a fifth above the worst
# of the four first steps, as measured in float64.


def quadratic(condition):
    curvature = jnp.geomspace(1.0, condition, 50)
    return lambda x: jnp.sum(curvature * x * x) / 2


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def gaussian():
    return np.random.default_rng(0).normal(size=50)


PROBLEMS = {
    "quadratic, condition 10": (lambda: quadratic(10), gaussian, 90),
    "quadratic, condition 1e2": (lambda: quadratic(1e2), gaussian, 330),
    "quadratic, condition 1e3": (lambda: quadratic(1e3), gaussian, 2100),
    "quadratic, condition 1e4": (lambda: quadratic(1e4), gaussian, 11_600),
    "logistic regression": (lambda: logistic_loss, lambda: np.zeros(31), 350),
    "Rosenbrock": (lambda: rosenbrock, lambda: np.array([-1.2, 1.0]), 6500),
}


def gradients_needed(function, start, most, **arguments):
    """The number of gradients until the norm is a millionth of the first."""
    gradient = jax.grad(function)

    @jax.jit
    def run(initial):
        tx = ao.adgd(initial_learning_rate=initial, **arguments)
        first = gradient(start)

        def goes_on(carry):
            _, _, g, count = carry
            return (jnp.linalg.norm(g) > 1e-6 * jnp.linalg.norm(first)) & (count <= most)

        def body(carry):
            x, state, g, count = carry
            updates, state = tx.update(g, state, x)
            x = optax.apply_updates(x, updates)
            return x, state, gradient(x), count + 1

        return jax.lax.while_loop(goes_on, body, (start, tx.init(start), first, 1))[-1]

    return run


@each_rule
@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_converges_from_any_first_step(problem, rule, x64):
    function, start, most = PROBLEMS[problem]
    run = gradients_needed(function(), jnp.asarray(start()), most, rule=rule)
    needed = {initial: int(run(initial)) for initial in (1e-8, 1e-6, 1e-4, 1e-2)}
    assert max(needed.values()) <= most, needed


# Errors.


def test_what_is_refused():
    refused(lambda: ao.adgd(-1.0), "max_learning_rate must be a number in [0, inf]", "got -1.0")
    refused(lambda: ao.adgd(initial_learning_rate=0.0), "initial_learning_rate must be a number in (0, inf)")
    refused(lambda: ao.adgd(initial_learning_rate=1e-60), "which is 0.0 in float32")
    refused(lambda: ao.adgd(rule="2021"), "rule must be one of '2020', '2023', got '2021'.")
    tx, x = ao.adgd(), jnp.ones(2)
    refused(lambda: tx.update(x, tx.init(x)), "adgd needs the parameters")
    refused(lambda: tx.update(x, tx.init(jnp.ones(3)), x), "adgd: ", "(2,)", "(3,)")
    refused(lambda: tx.update({"a": x}, tx.init({"a": x}), {"b": x}), "adgd: the leaf 'a'")

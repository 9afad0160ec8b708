"""error_controlled: the limit against its reference, schedules, where it is used, what it refuses."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from limits import START, quadratic, run, seen, stepper
from reference.error_control import LimitReference
from saving import same, through_bytes

import adaptive_optax as ao
from adaptive_optax.integrations.flax import TrainState, value_fn
from adaptive_optax.wrappers.error_control import counts_of, numbers_of
from adaptive_optax.wrappers.step_controller import StepController, as_controller, next_factor, no_history

# The limit.


def errors_of(kind, count):
    rng = np.random.default_rng(5)
    if kind == "proportional":
        return lambda h, i: 137.0 * h
    if kind == "noisy":
        noise = rng.normal(size=count)
        return lambda h, i: 150.0 * h * (1 + 0.8 * noise[i])
    if kind == "sharpening":
        return lambda h, i: 30.0 * h * (1 + i / 2)
    if kind == "unstable":
        return lambda h, i: 30.0 * h if i < 25 else 12.0
    return lambda h, i: -0.5 if i < 9 else min(150.0 * h, 0.9)  # concave first, then saturated


def reporting(tx):
    """A step on a loss that has any error e one likes after a step of h; only probes evaluate it."""
    params = jnp.zeros(1)

    @jax.jit
    def step(state, h, e):
        def loss(x):
            moved = -x[0]  # promised: the same
            return -moved * (1 - e * moved / h)

        return tx.update(jnp.ones(1), state, params, value=0.0, value_fn=loss)

    return step


@pytest.mark.parametrize("kind", ["proportional", "noisy", "sharpening", "unstable", "concave"])
@pytest.mark.parametrize("first", [1e-6, 1e-2, 1.0])
def test_the_limit_follows_its_description(x64, kind, first):
    steps = 80
    error = errors_of(kind, steps)
    reference = LimitReference(tolerance=0.35, longest=first)
    tx = ao.error_controlled(optax.identity(), jnp.inf, initial_learning_rate=first, every=1)
    step, state = reporting(tx), tx.init(jnp.zeros(1))
    for i in range(steps):
        h = reference.longest * (reference.relaxation if reference.phase == "held" else 1)
        e = error(h, i)
        updates, state = step(state, h, e)
        reference.probe(e, h)
        limit = reference.longest * (reference.relaxation if reference.phase == "held" else 1)
        np.testing.assert_allclose(float(state.step_limit), limit, rtol=1e-9, err_msg=f"step {i}")
        np.testing.assert_allclose(float(numbers_of(state).curvature), reference.curvature, rtol=1e-8)
        np.testing.assert_allclose(float(updates[0]), -limit, rtol=1e-9)
    assert reference.phase == "held"


@pytest.mark.parametrize(
    "controller", ["smooth", "pi", "noisy", StepController(0.5, 0.2, 0.1, max_factor=1.5)]
)
def test_a_controller_goes_on_from_where_the_limit_was_found(x64, controller):
    # The curvature falls to a tenth after 40 steps: the limit follows, however small a schedule is.
    def error(h, i):
        return (150.0 if i < 40 else 15.0) * h

    schedule = optax.linear_schedule(1e3, 1e-3, 120)
    tx = ao.error_controlled(
        optax.identity(), schedule, initial_learning_rate=1e-6, every=1, controller=controller
    )
    step, state = reporting(tx), tx.init(jnp.zeros(1))
    chosen, history = as_controller(controller), no_history(jnp.float64)
    for i in range(120):
        was_found, h = int(counts_of(state).phase) == 3, float(numbers_of(state).longest)
        _, state = step(state, h, error(h, i))
        if was_found:
            factor, history = next_factor(chosen, history, error(h, i) / 0.35)
            np.testing.assert_allclose(float(numbers_of(state).longest), h * float(factor), rtol=1e-8)
            shape = float(schedule(i)) / 1e3
            np.testing.assert_allclose(float(state.learning_rate), h * float(factor) * shape, rtol=1e-5)
    settled = 0.35 * chosen.safety ** (1 / chosen.integral)
    np.testing.assert_allclose(15.0 * float(numbers_of(state).longest), settled, rtol=1e-3)
    assert float(numbers_of(state).relief) == float(numbers_of(state).relaxation) == 1


def test_the_limit_does_not_depend_on_where_it_starts():
    limits = []
    for first in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        tx = ao.error_controlled(ao.scale_by_adam(b1=0.0), jnp.inf, initial_learning_rate=first)
        _, _, state = run(tx, 200)
        limits.append(float(numbers_of(state).longest))
    assert max(limits) < 3 * min(limits), limits


def test_a_power_of_two_on_the_loss_changes_nothing():
    plain = ao.error_controlled(ao.scale_by_adam(eps=0.0))
    params, _, state = run(plain, 60)
    scaled, _, other = run(plain, 60, loss=lambda x: 1024 * quadratic(x))
    np.testing.assert_array_equal(params, scaled)
    np.testing.assert_array_equal(state.step_limit, other.step_limit)


def test_the_gradient_estimate_finds_the_limit_of_the_value_estimate(x64):
    limits = []
    for estimate in ("value", "gradient"):
        tx = ao.error_controlled(ao.scale_by_adam(), estimate=estimate)
        limits.append([float(s.step_limit) for s in run(tx, 60, params=jnp.asarray(START))[1]])
    np.testing.assert_allclose(*limits, rtol=1e-6)


def test_every_rate_that_is_too_high_trains_alike():
    def log_distance(x):
        return jnp.log1p(quadratic(x))

    ends = {}
    for rate in (10.0, 1e3, jnp.inf):
        params, _, state = run(ao.error_controlled(ao.scale_by_adam(), rate), 300, log_distance)
        ends[str(rate)] = float(log_distance(params))
        assert seen(state).limited == 1
    assert len(set(ends.values())) == 1
    assert ends["inf"] < 1e-2 * float(log_distance(jnp.asarray(START)))
    free, _, _ = run(optax.with_extra_args_support(ao.adam(10.0)), 300, log_distance)
    assert float(log_distance(free)) > 100 * ends["inf"]


def test_a_rate_that_is_low_enough_is_not_limited_once_the_limit_is_above_it():
    tx = ao.error_controlled(ao.scale_by_adam(), 1e-3)
    _, states, state = run(tx, 200)
    below = [float(s.learning_rate) < 0.99e-3 for s in states]
    assert sum(below) < 10 and not any(below[10:])
    np.testing.assert_allclose(seen(state).limited, sum(below) / 200, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 7])
def test_probes_are_made_when_they_are_due(every):
    tx = ao.error_controlled(ao.scale_by_adam(), 0.1, every=every)
    _, states, _ = run(tx, 60)
    probes = np.array([int(counts_of(s).probes) for s in states])
    made = np.diff(probes, prepend=0) > 0
    seeking = next(i for i, s in enumerate(states) if int(counts_of(s).phase) > 0)
    assert made[: seeking + 1].all()
    np.testing.assert_array_equal(made[seeking + 1 :], (np.arange(60) % every == 0)[seeking + 1 :])


# Schedules.


def test_a_schedule_s_shape_multiplies_the_limit():
    schedule = optax.linear_schedule(50.0, 0.0, 100)
    tx = ao.error_controlled(ao.scale_by_adam(), schedule)
    _, states, _ = run(tx, 100)
    start = next(i for i, s in enumerate(states) if int(counts_of(s).phase) == 3)
    rates = np.array([float(s.learning_rate) for s in states])[start:]
    held = np.array([float(numbers_of(s).longest * numbers_of(s).relaxation) for s in states])[start:]
    np.testing.assert_allclose(rates, 2 * held * (1 - np.arange(start, 100) / 100), rtol=1e-5)
    assert rates[-1] < 0.05 * rates.max()


def test_a_schedule_can_be_a_cap_only():
    schedule = optax.linear_schedule(50.0, 0.0, 100)
    tx = ao.error_controlled(ao.scale_by_adam(), schedule, follow_schedule=False)
    _, states, _ = run(tx, 100)
    for i, state in enumerate(states):
        numbers = numbers_of(state)
        limit = float(numbers.longest * (numbers.relaxation if int(counts_of(state).phase) == 3 else 1))
        np.testing.assert_allclose(float(state.learning_rate), min(50 * (1 - i / 100), limit), rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "relief"),
    [
        (optax.constant_schedule(3.0), 1.0),
        (optax.warmup_constant_schedule(0.0, 3.0, 1000), 1.0),
        (optax.cosine_decay_schedule(3.0, 1000, alpha=0.8), 1 / 0.9),
        (ao.warmup_stable_decay(3.0, 1000, warmup_steps=100, decay_steps=200, shape="linear"), 1 / 0.85),
        (ao.one_cycle(3.0, 1000).learning_rate, 2.0),
        (optax.piecewise_constant_schedule(3.0, {750: 1 / 3}), None),
    ],
)
def test_the_relief_is_the_inverse_of_the_mean_height(schedule, relief):
    state = ao.error_controlled(ao.scale_by_adam(), schedule).init(jnp.ones(2))
    np.testing.assert_allclose(float(numbers_of(state).peak), 3.0, rtol=1e-3)
    if relief is not None:
        np.testing.assert_allclose(float(numbers_of(state).relief), relief, rtol=0.02)
    assert 1 <= float(numbers_of(state).relief) <= 2


@pytest.mark.parametrize("height", [0.0, np.inf])
def test_a_schedule_without_a_shape(height):
    tx = ao.error_controlled(ao.scale_by_adam(), optax.constant_schedule(height))
    params, _, state = run(tx, 100)
    assert float(numbers_of(state).relief) == 1
    assert all(np.isfinite(x).all() for x in (params, numbers_of(state).longest, state.learning_rate))
    assert (float(quadratic(params)) < 1e-2) == (height > 0)


def test_without_a_rate_the_limit_is_that_of_a_schedule_that_decays_to_zero():
    tx = optax.chain(
        ao.error_controlled(ao.scale_by_adam()), optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 100))
    )
    other = ao.error_controlled(ao.scale_by_adam(), optax.linear_schedule(1e9, 0.0, 100))
    _, states, state = run(tx, 100)
    _, others, _ = run(other, 100)
    assert float(numbers_of(state[0]).relief) == 2
    start = next(i for i, s in enumerate(states) if int(counts_of(s[0]).phase) == 3)
    assert start < 70
    np.testing.assert_allclose(float(others[start].learning_rate), float(others[start].step_limit))
    limit = float(numbers_of(state[0]).longest * numbers_of(state[0]).relaxation * 2)
    np.testing.assert_allclose(float(ao.get_hyperparams(state)["step_limit"]), limit, rtol=1e-6)


def test_the_learning_rate_is_the_smaller_of_the_given_one_and_the_limit():
    cycle = ao.one_cycle(0.02, 80)
    tx = ao.error_controlled(ao.scale_by_adam(b1=cycle.momentum), cycle.learning_rate)
    _, states, _ = run(tx, 80)
    for i, state in enumerate(states):
        found = ao.get_hyperparams(state)
        given = float(cycle.learning_rate(i))
        np.testing.assert_allclose(found["learning_rate"], min(given, float(found["step_limit"])), rtol=1e-6)


# Where it is used.


def test_inside_accumulation_it_probes_the_emissions():
    tx = ao.accumulate_gradients(ao.error_controlled(ao.scale_by_adam(), 10.0), every=4)
    params, _, state = run(tx, 400)
    assert float(quadratic(params)) < 1e-2 * float(quadratic(jnp.asarray(START, jnp.float32)))
    assert int(ao.get_error_control(state).probes) < 25


@pytest.mark.parametrize("storage", ["bfloat16", ao.Int8(block_size=16, min_size=1)], ids=str)
def test_around_moments_in_low_precision(storage):
    params = jnp.linspace(-1, 1, 128)
    tx = ao.error_controlled(ao.scale_by_adam(mu_storage=storage, nu_storage=storage), 10.0)
    exact = ao.error_controlled(ao.scale_by_adam(), 10.0)
    ends = [run(each, 60, lambda x: jnp.sum(x**2), params)[2] for each in (tx, exact)]
    assert 0.5 < float(ends[0].step_limit / ends[1].step_limit) < 2


def test_injected_a_schedule_keeps_its_shape():
    schedule = optax.linear_schedule(1e4, 0.0, 60)
    rates = []
    for make in (ao.error_controlled, ao.inject_hyperparams(ao.error_controlled)):
        _, states, _ = run(make(ao.scale_by_adam(), max_learning_rate=schedule), 60)
        rates.append([float(ao.get_error_control(state).learning_rate) for state in states])
    np.testing.assert_allclose(*rates, rtol=1e-6)


def test_inside_rejection_a_bad_step_changes_nothing():
    tx = ao.reject_nonfinite(ao.error_controlled(ao.scale_by_adam(), 10.0))
    params, _, state = run(tx, 30)
    _, after = tx.update(jnp.full(4, jnp.nan), state, params, value=jnp.float32(jnp.nan), value_fn=quadratic)
    same(after.inner_state, state.inner_state)
    assert int(after.total) == 1


def test_around_a_mask():
    params = {"head": jnp.ones(2), "body": jnp.ones(3)}

    def loss(p):
        return jnp.sum(p["head"] ** 2) + jnp.sum(p["body"] ** 2)

    tx = ao.error_controlled(ao.freeze(ao.scale_by_adam(), "body"), 10.0)
    after, _, state = run(tx, 100, loss, params)
    np.testing.assert_array_equal(after["body"], np.ones(3))
    assert float(jnp.sum(after["head"] ** 2)) < 0.1 and int(counts_of(state).phase) == 3


def test_within_a_mask_it_is_refused():
    params = {"head": jnp.ones(2), "body": jnp.ones(3)}
    tx = ao.freeze(ao.error_controlled(ao.scale_by_adam(), 10.0), "body")
    with pytest.raises(ValueError, match="Put the mask inside"):
        tx.update(params, tx.init(params), params, value=1.0, value_fn=lambda p: jnp.sum(p["body"] ** 2))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.output = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def batch():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(32, 3)).astype(np.float32)
    return x, (x[:, :1] * x[:, 1:2]).astype(np.float32)


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2), {"count": len(x)}


def test_an_nnx_model_with_dropout_and_batch_norm():
    x, y = batch()
    model = Model(nnx.Rngs(0, dropout=1))
    optimizer = nnx.Optimizer(model, ao.error_controlled(ao.scale_by_adam(), 100.0), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        f = value_fn(nnx_loss, model, x, y, has_aux=True)
        (value, _), grads = nnx.value_and_grad(nnx_loss, has_aux=True)(model, x, y)
        again = f(nnx.state(model, nnx.Param))
        optimizer.update(model, grads, value=value, value_fn=f)
        return value, again

    first = None
    for _ in range(60):
        value, again = step(model, optimizer)
        np.testing.assert_allclose(
            value, again, rtol=1e-5
        )  # the same units dropped, though the model went on
        first = value if first is None else first
    assert float(value) < 0.8 * float(first)
    assert int(ao.get_error_control(optimizer.opt_state).mismatches) == 0


def test_a_linen_model_in_a_train_state():
    x, y = batch()
    model = nn.Dense(1)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x),
        tx=ao.error_controlled(ao.scale_by_adam(), 100.0),
    )

    def loss(params):
        return jnp.mean((model.apply(params, x) - y - x.sum(1, keepdims=True)) ** 2)

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads, value=value, value_fn=loss), value

    values = []
    for _ in range(100):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_in_a_scan_with_a_sweep_of_rates_under_vmap():
    def end(rate):
        tx = ao.error_controlled(ao.scale_by_adam(), rate)
        params = jnp.asarray(START, jnp.float32)

        def body(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(quadratic)(params)
            updates, state = tx.update(gradient, state, params, value=value, value_fn=quadratic)
            return (optax.apply_updates(params, updates), state), state.learning_rate

        (params, state), rates = jax.lax.scan(body, (params, tx.init(params)), length=50)
        return quadratic(params), rates

    rates = jnp.array([1e-3, 1.0, 100.0])
    many = jax.jit(jax.vmap(end))(rates)
    for i, rate in enumerate(rates):
        one = jax.jit(end)(rate)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[i], y, rtol=1e-4), many, one)  # noqa: B023 (called at once)


def test_a_restored_state_goes_on(tmp_path):
    tx = ao.error_controlled(ao.scale_by_adam(), 10.0)
    params, _, state = run(tx, 25)
    step = stepper(tx)
    same(step(params, state), step(params, through_bytes(state, tx.init(params), tmp_path)))


def test_the_probe_is_computed_only_when_it_is_due():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return quadratic(x)

    tx = ao.error_controlled(ao.scale_by_adam(), 0.01)
    params = jnp.asarray(START, jnp.float32)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(quadratic)(params)
        updates, state = tx.update(gradient, state, params, value=value, value_fn=counted)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    jax.effects_barrier()
    # Two for each check: one in 16 probes, and where the limit was first and last too long.
    probes = int(counts_of(state).probes)
    assert len(calls) == probes + 2 * (math.ceil(probes / 16) + 2)
    assert int(counts_of(state).probes) < 25


# What is refused.


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_learning_rate": -1.0}, "max_learning_rate"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": jnp.nan}, "tolerance"),
        ({"tolerance": 60.0}, "tolerance"),
        ({"every": 2**31}, "every"),
        ({"every": 0}, "every"),
        ({"every": 2.5}, "every"),
        ({"estimate": "hessian"}, "estimate"),
        ({"initial_learning_rate": 0.0}, "initial_learning_rate"),
        ({"initial_learning_rate": jnp.inf}, "initial_learning_rate"),
        ({"follow_schedule": "yes"}, "follow_schedule"),
        ({"controller": "fast"}, "controller"),
    ],
)
def test_arguments_out_of_range(keywords, message):
    with pytest.raises(ValueError, match=f"^{message} must be"):
        ao.error_controlled(ao.scale_by_adam(), **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "needs the loss and its function"),
        ({"value": 1.0}, "needs the loss and its function"),
        ({"value_fn": quadratic}, "needs the loss and its function"),
        ({"value": 1.0, "value_fn": 3.0}, "value_fn must be a function"),
        ({"value": jnp.ones(3), "value_fn": quadratic}, "value must be a real scalar"),
        ({"value": 1j, "value_fn": quadratic}, "value must be a real scalar"),
        ({"value": (1.0, 2.0), "value_fn": quadratic}, "value must be a real scalar"),
        ({"value": [1.0], "value_fn": quadratic}, "value must be a real scalar"),
        ({"value": {"a": 1.0}, "value_fn": quadratic}, "value must be a real scalar"),
        ({"value": "x", "value_fn": quadratic}, "value must be a real scalar"),
        ({"value": 1.0, "value_fn": lambda x: "x"}, "value_fn must return a real scalar"),
        ({"value": 1.0, "value_fn": lambda x: x}, "value_fn must return a real scalar"),
        ({"value": 1.0, "value_fn": lambda x: (quadratic(x), {})}, "value_fn must return a real scalar"),
    ],
)
def test_losses_that_do_not_fit(keywords, message):
    tx = ao.error_controlled(ao.scale_by_adam())
    params = jnp.ones(4)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, **keywords)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params), value=1.0, value_fn=quadratic)


def test_a_schedule_that_cannot_be_traced():
    def schedule(count):
        return 0.1 if count < 10 else 0.01

    with pytest.raises(
        ValueError,
        match="use jax.numpy, jnp.where in place of `if`, and no float\\(\\); or follow_schedule=False",
    ):
        ao.error_controlled(ao.scale_by_adam(), schedule).init(jnp.ones(2))


# The point of it, in small.


@functools.cache
def regression():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(512, 4)).astype(np.float32)
    y = (np.sin(2 * x[:, 0]) + np.abs(x[:, 2])).astype(np.float32)
    return x[:384], y[:384], x[384:], y[384:]


@functools.partial(jax.jit, static_argnums=(0, 1))
def final_error(make, limited, rate, seed):
    """The validation error of a small network after 400 steps with batches of 16."""
    x, y, x_new, y_new = map(jnp.asarray, regression())
    key = jax.random.key(seed)
    k1, k2, order = jax.random.split(key, 3)
    params = {"w": jax.random.normal(k1, (4, 32)) / 2, "v": jax.random.normal(k2, (32,)) / 6}
    schedule = make(rate)
    direction = ao.scale_by_adam()
    tx = (
        ao.error_controlled(direction, schedule)
        if limited
        else optax.with_extra_args_support(optax.chain(direction, ao.scale_by_learning_rate(schedule)))
    )

    def error(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)

    def body(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (16,), 0, 384)

        def loss(p):
            return error(p, x[chosen], y[chosen])

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value=value, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), jax.random.split(order, 400))
    return error(params, x_new, y_new)


def constant(rate):
    return rate


def decaying(rate):
    return optax.linear_schedule(rate, 0.0, 400)


@pytest.mark.parametrize("schedule", [constant, decaying])
def test_a_rate_a_hundred_times_too_high_trains_about_as_well(schedule):
    def mean(limited, rate):
        return np.mean([float(final_error(schedule, limited, rate, seed)) for seed in range(3)])

    rates = [1e-3 * 2**i for i in range(8)]
    tuned = min(mean(False, rate) for rate in rates)
    assert mean(False, 10.0) > 1.1 * tuned
    assert mean(True, 10.0) < 1.1 * tuned
    assert mean(True, 1000.0) < 1.1 * tuned


@pytest.mark.parametrize("per", ["tree", "tensor"])
def test_telemetry_measures_the_limit(per):
    tx = ao.telemetry(ao.error_controlled(ao.scale_by_adam(), 10.0), per=per)
    _, states, state = run(tx, 50)
    found, control = ao.get_telemetry(state), ao.get_error_control(state)
    shape = (1,) if per == "tensor" else ()
    for name in ("step_limit", "curvature", "error"):
        measured = getattr(found, name)
        assert measured.shape == shape
        np.testing.assert_allclose(measured, getattr(control, name), rtol=1e-6)
    assert float(found.learning_rate) == float(control.learning_rate)
    plain = ao.get_telemetry(run(optax.with_extra_args_support(ao.telemetry(ao.adam(0.1))), 2)[2])
    assert np.isnan(plain.step_limit) and np.isnan(plain.curvature) and np.isnan(plain.error)


OPTIMIZERS = {
    "adam": lambda: ao.adam(1e-3),
    "optax's adamw": lambda: optax.adamw(1e-3),
    "optax's sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "a schedule": lambda: ao.rmsprop(optax.linear_schedule(0.1, 0.0, 10)),
    "another limit": lambda: ao.error_controlled(ao.scale_by_adam(), 1.0),
    "a group": lambda: ao.partition_by_path({"": ao.adam(1e-3)}),
    "wrapped": lambda: ao.reject_nonfinite(optax.chain(ao.clip_by_global_norm(1.0), ao.sgd(0.1))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_optimizer_is_no_direction(name):
    with pytest.raises(ValueError, match="direction must (keep the sign|not contain error_controlled)"):
        ao.error_controlled(OPTIMIZERS[name](), 0.1).init({"w": jnp.ones(3)})


@pytest.mark.parametrize(
    "first", [0.5, optax.linear_schedule(0.5, 0.0, 200), None], ids=["number", "low", "none"]
)
def test_a_schedule_may_be_another_one_than_at_first(first):
    state = run(ao.error_controlled(ao.scale_by_rms(), first, every=1), 40)[2]
    step = stepper(ao.error_controlled(ao.scale_by_rms(), optax.linear_schedule(50.0, 0.0, 200), every=1))
    _, state = step(jnp.asarray(START, jnp.float32), state)
    numbers = numbers_of(state)
    assert int(counts_of(state).phase) == 3 and float(numbers.peak) == 50
    held = float(numbers.longest * numbers.relaxation)
    np.testing.assert_allclose(float(state.step_limit), held * 2 * (1 - 40 / 200), rtol=1e-3)


def test_groups_may_have_rates_relative_to_each_other():
    slower = optax.chain(ao.scale_by_adam(), ao.scale_by_learning_rate(0.1, flip_sign=False))
    tx = ao.error_controlled(ao.partition_by_path({"w": slower}, default=ao.scale_by_adam()), 0.1)
    assert tx.init({"w": jnp.ones((3, 4)), "b": jnp.ones(())}).count == 0


def test_it_is_read_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        _, _, state = run(ao.error_controlled(ao.scale_by_adam(), 1.0), 3)
        assert float(ao.get_error_control(state).limited) == 1


def test_hyperparameters_that_cannot_be_set():
    params = jnp.ones(2)
    state = ao.error_controlled(ao.scale_by_adam(), 1.0).init(params)
    with pytest.raises(ValueError, match="'learning_rate' of error_controlled is found anew .* max_learning"):
        ao.set_hyperparams(state, learning_rate=0.1)
    state = ao.inject_hyperparams(ao.error_controlled)(ao.scale_by_adam(), 1.0, tolerance=0.3).init(params)
    for tolerance in (20.0, -1.0, 0.0):
        with pytest.raises(ValueError, match=r"tolerance must be a number in \(0, 10\]"):
            ao.set_hyperparams(state, tolerance=tolerance)
    with pytest.raises(ValueError, match="every must be an integer .* known before tracing.* static_args"):
        jax.jit(optax.inject_hyperparams(ao.error_controlled)(ao.scale_by_adam(), 1.0).init)(params)


def test_multi_steps_of_optax_in_a_train_state_gets_the_loss():
    tx = optax.MultiSteps(ao.error_controlled(ao.scale_by_adam(), 0.1), 2)
    state = TrainState.create(apply_fn=None, params={"x": jnp.asarray(START, jnp.float32)}, tx=tx)

    def loss(params):
        return quadratic(params["x"])

    for _ in range(2):
        value, grads = jax.value_and_grad(loss)(state.params)
        state = state.apply_gradients(grads=grads, value=value, value_fn=loss)
    assert int(ao.get_error_control(state.opt_state).probes) == 1

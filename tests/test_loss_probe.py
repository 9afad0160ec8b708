"""The probe of error_controlled: its error, what it cannot tell, and losses that do not belong together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from limits import SCALES, START, quadratic, run, seen

import adaptive_optax as ao
from adaptive_optax.transforms.momentum_free import momentum_free_direction
from adaptive_optax.wrappers.error_control import counts_of, numbers_of

# The error of a probe.


@pytest.mark.parametrize("estimate", ["value", "gradient"])
def test_the_error_of_a_quadratic_is_half_h_times_its_curvature(x64, estimate):
    tx = ao.error_controlled(optax.identity(), jnp.inf, initial_learning_rate=1e-3, estimate=estimate)
    params = jnp.asarray(START)
    _, states, _ = run(tx, 1, params=params)
    g = SCALES * START
    curvature = g @ (SCALES * g) / (g @ g)
    measured = seen(states[0])
    np.testing.assert_allclose(measured.curvature, curvature, rtol=1e-9)
    np.testing.assert_allclose(measured.predicted_decrease, 1e-3 * g @ g, rtol=1e-12)
    if estimate == "value":
        np.testing.assert_allclose(measured.error, 1e-3 * curvature / 2, rtol=1e-9)


@pytest.mark.parametrize(
    ("direction", "without"),
    {
        "adam": (ao.scale_by_adam(), ao.scale_by_adam(b1=0.0)),
        "nesterov": (ao.scale_by_adam(nesterov=True), ao.scale_by_adam(b1=0.0)),
        "amsgrad": (ao.scale_by_adam(amsgrad=True), ao.scale_by_adam(b1=0.0, amsgrad=True)),
        "uncorrected": (
            ao.scale_by_adam(bias_correction=False),
            ao.scale_by_adam(b1=0.0, bias_correction=False),
        ),
        "tensorflow": (
            ao.scale_by_adam(eps_form="tensorflow"),
            ao.scale_by_adam(b1=0.0, eps_form="tensorflow"),
        ),
        "moving b1": (
            ao.scale_by_adam(b1=optax.linear_schedule(0.95, 0.5, 5)),
            ao.scale_by_adam(b1=0.0),
        ),
        "global": (ao.scale_by_adam(granularity="global"), ao.scale_by_adam(b1=0.0, granularity="global")),
        "clipped": (
            optax.chain(ao.clip_by_global_norm(0.5), ao.scale_by_adam()),
            optax.chain(ao.clip_by_global_norm(0.5), ao.scale_by_adam(b1=0.0)),
        ),
        "by path": (
            ao.partition_by_path({"a": ao.scale_by_adam()}, default=ao.scale_by_rms()),
            ao.partition_by_path({"a": ao.scale_by_adam(b1=0.0)}, default=ao.scale_by_rms()),
        ),
        "optax's": (optax.scale_by_adam(), ao.scale_by_adam(b1=0.0)),
        "trace": (
            optax.chain(ao.scale_by_rms(), ao.trace(0.9, nesterov=True)),
            optax.chain(ao.scale_by_rms(), optax.scale(10.0)),
        ),
        "optax's trace": (
            optax.chain(ao.scale_by_rms(), optax.trace(0.9)),
            optax.chain(ao.scale_by_rms(), optax.scale(10.0)),
        ),
        "rms": (ao.scale_by_rms(), ao.scale_by_rms()),
        "two traces": (optax.chain(optax.trace(0.9), ao.trace(0.5)), optax.scale(20.0)),
        "Adam, trace": (
            optax.chain(optax.scale_by_adam(), ao.trace(0.9)),
            optax.chain(ao.scale_by_adam(b1=0.0), optax.scale(10.0)),
        ),
    }.values(),
)
def test_the_direction_of_a_probe_has_no_momentum(direction, without):
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros((4, 3)), "b": jnp.zeros(5)}
    direction, without = map(optax.with_extra_args_support, (direction, without))
    state, other = direction.init(params), without.init(params)
    for _ in range(6):
        g = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        actual = momentum_free_direction(direction, g, state, params)
        _, state = direction.update(g, state, params)
        expected, other = without.update(g, other, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), actual, expected)


def test_the_direction_of_a_probe_is_a_compressed_moment_of_the_gradient():
    # The moment is rounded as it is stored, without bias.
    rng = np.random.default_rng(1)
    params = jnp.zeros(4096)
    tx = ao.scale_by_adam(mu_storage="int8", nu_storage="int8")
    state = tx.init(params)
    for _ in range(4):
        g = jnp.asarray(rng.normal(size=4096), jnp.float32)
        d = momentum_free_direction(tx, g, state, params)
        compiled = jax.jit(functools.partial(momentum_free_direction, tx))(g, state, params)
        np.testing.assert_allclose(compiled, d, rtol=0.05, atol=1e-3 * float(jnp.max(jnp.abs(d))))
        _, state = tx.update(g, state, params)
    exact = g / (jnp.sqrt(ao.dense(state.nu) / state.nu_weight) + 1e-8)
    assert float(jnp.linalg.norm(d - exact) / jnp.linalg.norm(exact)) < 0.15


# What probes cannot tell.


def probed_with(loss, gradient, value, params=None, steps=5, max_learning_rate=jnp.inf, **keywords):
    tx = ao.error_controlled(
        optax.identity(), max_learning_rate, initial_learning_rate=1e-3, every=1, **keywords
    )
    params = jnp.ones(2) if params is None else params
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient, state, params, value=value, value_fn=loss)
    return updates, state


@pytest.mark.parametrize(
    ("loss", "gradient", "value"),
    [
        (lambda x: jnp.sum(x) * 0 + 2.0, jnp.zeros(2), 2.0),  # a constant loss
        (lambda x: jnp.sum(x), jnp.full(2, jnp.nan), 2.0),
        (lambda x: jnp.sum(x), jnp.full(2, jnp.inf), 2.0),
        (lambda x: jnp.sum(x) * jnp.nan, jnp.ones(2), jnp.nan),
        (lambda x: jnp.sum(x) + 0.5, jnp.ones(2), 2.0),  # another batch's
    ],
    ids=["zero gradient", "NaN", "infinity", "NaN loss", "another batch"],
)
@pytest.mark.parametrize("estimate", ["value", "gradient"])
def test_a_probe_that_says_nothing_changes_nothing(loss, gradient, value, estimate):
    _, state = probed_with(loss, gradient, value, estimate=estimate)
    assert float(numbers_of(state).longest) == np.float32(1e-3)
    assert (int(counts_of(state).probes), int(counts_of(state).silent), int(counts_of(state).phase)) == (
        5,
        5,
        0,
    )


def test_a_value_function_of_another_batch_is_counted():
    _, state = probed_with(lambda x: jnp.sum(x) + 0.5, jnp.ones(2), 2.0, steps=40)
    found = ao.get_error_control(state)
    assert int(found.mismatches) > 0
    assert float(found.step_limit) < 4**17 * 1e-3  # checked before anything is believed
    _, state = probed_with(jnp.sum, jnp.ones(2), 2.0)
    assert int(ao.get_error_control(state).mismatches) == 0


@pytest.mark.parametrize("found", [np.nan, np.inf, 2.2])
def test_a_value_function_that_is_not_the_loss_leaves_the_limit_where_it_starts(found):
    _, state = probed_with(lambda x: jnp.sum(x) * 0 + found, jnp.ones(2), 2.0, steps=20)
    control = ao.get_error_control(state)
    assert float(control.step_limit) == np.float32(1e-3) and int(control.mismatches) == 20


@pytest.mark.parametrize("offset", [1e-3, -5e-3])
def test_a_difference_like_rounding_in_bfloat16_does_not_end_the_search(offset):
    tx = ao.error_controlled(ao.scale_by_adam(), 10.0)
    _, _, exact = run(tx, 60)
    params = jnp.asarray(START, jnp.float32)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(quadratic)(params)
        updates, state = tx.update(
            gradient, state, params, value=value, value_fn=lambda x: (1 + offset) * quadratic(x)
        )
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert int(ao.get_error_control(state).mismatches) == 0
    np.testing.assert_allclose(float(numbers_of(state).noise), abs(offset), rtol=1e-2)
    assert 0.3 < float(state.step_limit / exact.step_limit) < 3


def test_a_loss_that_is_not_finite_at_the_end_of_the_probe_is_too_long_a_step():
    def wall(x):
        return jnp.where(jnp.any(x < 0.9), jnp.nan, jnp.sum(x))

    _, state = probed_with(wall, jnp.ones(2), 2.0, steps=60)
    assert int(counts_of(state).phase) == 3 and 1e-4 < float(numbers_of(state).longest) < 0.1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_negative_curvature_sets_no_limit():
    updates, state = probed_with(lambda x: -jnp.sum(x**2), jnp.full(2, -2.0), -2.0, max_learning_rate=0.25)
    assert int(counts_of(state).phase) == 0 and float(numbers_of(state).longest) == np.float32(1e-3) * 4**5
    np.testing.assert_allclose(updates, np.full(2, 2 * 0.25))


def test_a_decrease_below_rounding_is_no_error():
    # From 1e-12 on, the decrease is far below the rounding of the loss.
    def offset(x):
        return quadratic(x) + 1e4

    tx = ao.error_controlled(optax.identity(), jnp.inf, initial_learning_rate=1e-12)
    _, states, state = run(tx, 100, offset)
    assert int(counts_of(state).phase) == 3 and 1e-3 < float(numbers_of(state).longest) < 0.2


def test_an_ascent_direction_sets_no_limit_and_is_counted():
    down = optax.stateless(lambda g, _: -g if g.size == len(START) else g)  # one that only descends here
    tx = ao.error_controlled(down, jnp.inf, initial_learning_rate=1e-3, every=1)
    params = jnp.asarray(START, jnp.float32)
    _, state = tx.update(
        jax.grad(quadratic)(params), tx.init(params), params, value=quadratic(params), value_fn=quadratic
    )
    assert int(counts_of(state).silent) == 1 and float(numbers_of(state).longest) == np.float32(1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("estimate", ["value", "gradient"])
def test_parameters_in_low_precision(dtype, estimate):
    params = jnp.asarray(START, dtype)
    tx = ao.error_controlled(ao.scale_by_adam(), 100.0, estimate=estimate)
    final, states, state = run(tx, 300, params=params)
    assert final.dtype == dtype and int(counts_of(state).phase) == 3
    assert 3e-3 < float(state.step_limit) < 3
    assert float(quadratic(final)) < 0.05 * float(quadratic(params))


def test_complex_parameters(x64):
    def loss(z):
        return jnp.sum(jnp.asarray(SCALES) * jnp.abs(z) ** 2)

    params = jnp.asarray(START + 1j * START[::-1])
    both = []
    for estimate in ("value", "gradient"):
        tx = ao.error_controlled(optax.identity(), estimate=estimate)

        @jax.jit
        def step(z, state, tx=tx):
            value, g = jax.value_and_grad(loss)(z)
            updates, state = tx.update(jnp.conj(g), state, z, value=value, value_fn=loss)
            return optax.apply_updates(z, updates), state

        z, state = params, tx.init(params)
        for _ in range(50):
            z, state = step(z, state)
        both.append((float(loss(z)), float(state.step_limit)))
    np.testing.assert_allclose(*both, rtol=1e-6)
    assert both[0][0] < 1e-2 * float(loss(params))


# What does not belong together.


def network(seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(1024, 8)), jnp.float32)
    y = jnp.sin(x @ jnp.asarray(rng.normal(size=8), jnp.float32)) + 0.5 * jnp.asarray(rng.normal(size=1024))
    params = {"w": jnp.asarray(rng.normal(size=(8, 32)) / 3, jnp.float32), "v": jnp.zeros(32)}

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    return params, loss, x, y


def trained(tx, seed, steps=400, micro_batches=1, batch=8):
    """What the limit is after training on small batches, and what was seen of mismatches."""
    params, loss, x, y = network(seed)
    state, rng = tx.init(params), np.random.default_rng(seed)

    @jax.jit
    def step(params, state, x, y, i):
        value, grad = jax.value_and_grad(loss)(params, x[i], y[i])

        updates, state = tx.update(
            grad, state, params, value=value, value_fn=lambda params: loss(params, x[i], y[i])
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        chosen = rng.choice(1024, (micro_batches, batch))
        for i in range(micro_batches):
            params, state = step(params, state, x[chosen], y[chosen], i)
    return ao.get_error_control(state)


@pytest.mark.parametrize("seed", range(4))
def test_inside_accumulation_the_probe_is_one_of_the_micro_batch(seed):
    # Of the mean gradient a micro-batch's loss keeps less, however short the step: the limit would collapse.
    limited = ao.error_controlled(ao.scale_by_adam(), 1.0)
    found = trained(ao.accumulate_gradients(limited, 4), seed, micro_batches=4)
    assert 2e-3 < float(found.step_limit) < 1 and int(found.mismatches) == 0


def test_the_gradient_passed_on_is_unscaled():
    tx = ao.accumulate_gradients(
        ao.dynamic_loss_scale(ao.error_controlled(ao.scale_by_rms(), 0.1), init_scale=8.0), 2
    )
    params = jnp.asarray(START, jnp.float32)
    state = tx.init(params)
    for _ in range(4):
        grad = 8 * jax.grad(quadratic)(params)
        _, state = tx.update(grad, state, params, value=quadratic(params), value_fn=quadratic)
    found = ao.get_error_control(state)
    assert int(found.probes) == 2 and abs(float(found.error)) < 0.01


def test_the_gradient_is_that_before_clipping():
    def probe(**extra):
        tx = optax.chain(
            ao.clip_by_global_norm(0.1), ao.error_controlled(ao.scale_by_rms(), initial_learning_rate=1e-3)
        )
        params = jnp.asarray(START, jnp.float32)
        grad = jax.grad(quadratic)(params)
        extra = {"grad": grad} if extra else {}
        _, state = tx.update(
            grad, tx.init(params), params, value=quadratic(params), value_fn=quadratic, **extra
        )
        return ao.get_error_control(state)

    assert float(probe().error) == -1  # the loss falls much more than the clipped gradient promises
    assert 0 < float(probe(grad=True).error) < 0.1


@pytest.mark.parametrize("grad", [jnp.ones(3), {"w": jnp.ones(4)}], ids=str)
def test_another_gradient_is_refused(grad):
    tx, params = ao.error_controlled(ao.scale_by_adam()), jnp.asarray(START, jnp.float32)
    with pytest.raises(ValueError, match="grad must be the gradient of value_fn, with a leaf at '' of shape"):
        tx.update(params, tx.init(params), params, value=quadratic(params), grad=grad, value_fn=quadratic)


@pytest.mark.parametrize("head", ["zero", "random"])
def test_another_batch_is_noticed_even_if_its_losses_are_the_same(head):
    # With a last layer of zeros all batches have one loss, log(5), until it is trained.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(400, 8)), jnp.float32)
    labels = jnp.argmax(x[:, :5], axis=1)
    first = np.zeros((8, 5)) if head == "zero" else rng.normal(size=(8, 5))
    params = {"w": jnp.asarray(first, jnp.float32)}

    def loss(params, batch):
        logits = x[batch] @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    for other in (False, True):
        tx = ao.error_controlled(ao.scale_by_adam(), 1.0)

        def train(params, tx=tx, other=other):
            def step(carry, i):
                params, state = carry
                batch = jax.random.choice(jax.random.fold_in(jax.random.key(0), i), 400, (2, 16))
                value, grad = jax.value_and_grad(loss)(params, batch[0])
                updates, state = tx.update(
                    grad, state, params, value=value, value_fn=lambda params: loss(params, batch[int(other)])
                )
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(200))[0]

        found = ao.get_error_control(jax.jit(train)(params)[1])
        assert (int(found.mismatches) > 0) == other
        assert float(found.step_limit) > 1e-5

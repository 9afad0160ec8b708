"""Dynamic loss scaling: Flax's numbers, real training in float16, and the wrappers around and inside it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from saving import same, through_bytes

import adaptive_optax as ao

PARAMS = {"a": jnp.ones(2), "b": jnp.full(3, 0.5)}
BAD = PARAMS | {"b": jnp.array([1.0, jnp.inf, 1.0])}


def scaled(gradients, state):
    return jax.tree.map(lambda g: g * ao.get_loss_scale(state), gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"growth_interval": 2},
        {"growth_interval": 1, "growth_factor": 3.0, "backoff_factor": 0.25, "minimum_scale": 1000.0},
    ],
    ids=str,
)
def test_scale_and_steps_are_those_of_flax(settings):
    settings = {"growth_interval": 3} | settings
    flax_scale = DynamicScale(scale=jnp.float32(2.0**13), fin_steps=jnp.int32(0), **settings)
    tx = ao.dynamic_loss_scale(ao.sgd(0.125), init_scale=2.0**13, **settings)
    params = flax_params = {"w": jnp.array([1.0, -2.0], jnp.float16)}
    state = tx.init(params)

    def loss(params, factor):
        return jnp.sum(params["w"] ** 2 * factor)

    @jax.jit
    def flax_step(scale, params, factor):
        scale, finite, _, grads = scale.value_and_grad(loss)(params, factor)
        moved = jax.tree.map(lambda p, g: (p - 0.125 * g).astype(p.dtype), params, grads)
        return scale, finite, jax.tree.map(lambda p, q: jnp.where(finite, q, p), params, moved)

    @jax.jit
    def step(params, state, factor):
        grads = jax.grad(lambda p: ao.scale_loss(loss(p, factor), state))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rejected = 0
    rng = np.random.default_rng(0)
    for factor in rng.choice([0.25, 0.5, 8.0, 30.0, np.nan], 60, p=[0.4, 0.3, 0.1, 0.1, 0.1]):
        factor = jnp.float16(factor)
        params, state = step(params, state, factor)
        flax_scale, finite, flax_params = flax_step(flax_scale, flax_params, factor)
        rejected += int(~finite)
        assert (state.scale, state.fin_steps) == (flax_scale.scale, flax_scale.fin_steps)
        same(params, flax_params)
        assert ao.get_rejections(state).total == rejected
    assert 5 < rejected < 40
    # Either goes on where the other is.
    carried = tx.init(params)._replace(scale=flax_scale.scale, fin_steps=flax_scale.fin_steps)
    same((carried.scale, carried.fin_steps), (state.scale, state.fin_steps))


def test_an_overflow_changes_the_scale_alone():
    tx = ao.dynamic_loss_scale(ao.adam(ao.step_decay(0.1, 0.5, 1)))
    _, state = tx.update(scaled(PARAMS, tx.init(PARAMS)), tx.init(PARAMS), PARAMS)
    updates, after = jax.jit(tx.update)(BAD, state, PARAMS)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    same(after.inner_state.inner_state, state.inner_state.inner_state)
    assert (ao.get_loss_scale(state), ao.get_loss_scale(after)) == (2.0**15, 2.0**14)
    assert ao.get_rejections(after)[:2] == (1, 1) and ao.get_hyperparams(after)["learning_rate"] == 0.1
    assert ao.keep_if_rejected(after, jnp.ones(1), jnp.zeros(1)) == 0


def test_what_overflows_inside_is_rejected_and_not_the_scale_s_fault():
    tx = ao.dynamic_loss_scale(ao.adam(0.1), init_scale=1.0)
    calls = []
    tx = ao.dynamic_loss_scale(ao.adam(0.1), 1.0, on_reject=lambda *call: calls.append(call))
    _, state = tx.update(PARAMS | {"a": jnp.full(2, 1e20)}, tx.init(PARAMS), PARAMS)
    assert ao.get_rejections(state).total == 1 and (state.scale, state.fin_steps) == (1.0, 1)
    jax.effects_barrier()
    assert calls == [("state", "0/nu/a")]


def test_limits():
    tx = ao.dynamic_loss_scale(ao.sgd(0.1), 8.0, 1, 4.0, 0.25, minimum_scale=1.0, maximum_scale=64.0)
    state, scales = tx.init(PARAMS), []
    for g in [BAD, BAD, *[PARAMS] * 8]:
        _, state = tx.update(g, state, PARAMS)
        scales.append(float(state.scale))
    assert scales == [2, 1, 1, 4, 4, 16, 16, 64, 64, 64]


@pytest.mark.parametrize("inner", [optax.adam(3e-3), ao.adam(3e-3), ao.master_weights(ao.adam(3e-3))])
def test_float16_trains_with_it_and_not_without(inner):
    # The loss is a millionth of a mean square, as of a loss with many terms: its gradients underflow.
    x = jnp.linspace(-1, 1, 32, dtype=jnp.float16)[:, None]
    y = jnp.sin(3 * x)
    keys = jax.random.split(jax.random.key(0))
    start = {
        "first": 2 * jax.random.normal(keys[0], (1, 32), jnp.float16),
        "second": 0.1 * jax.random.normal(keys[1], (32, 1), jnp.float16),
    }

    def loss(params):
        return 1e-7 * jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y) ** 2)

    def trained(tx, has_scale):
        @jax.jit
        def step(params, state):
            grads = jax.grad(lambda p: ao.scale_loss(loss(p), state) if has_scale else loss(p))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = start, tx.init(start)
        for _ in range(150):
            params, state = step(params, state)
        return params, state

    def error(params):
        return float(jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"] - y).astype(float) ** 2))

    frozen, _ = trained(ao.adam(3e-3), has_scale=False)
    same(frozen, start)  # every gradient is 0
    tx = ao.dynamic_loss_scale(inner, init_scale=2.0**40, growth_interval=20)
    params, state = trained(tx, has_scale=True)
    assert error(params) < 0.5 * error(start)
    assert ao.get_rejections(state).total > 5 and ao.get_rejections(state).in_a_row < 5


# --- With other wrappers ------------------------------------------------------------------------------------


def run(tx, sequence):
    state, step, params, scales = tx.init(PARAMS), jax.jit(tx.update), PARAMS, []
    for g in sequence:
        updates, state = step(scaled(g, state), state, params)
        params = optax.apply_updates(params, updates)
        scales.append(float(ao.get_loss_scale(state)))
    return params, state, scales


def test_around_an_accumulation_a_bad_micro_batch_is_left_out_and_lowers_the_scale():
    half, quarter = (jax.tree.map(lambda x, f=f: f * x, PARAMS) for f in (0.5, 0.25))
    sequence = [PARAMS, BAD, half, quarter, BAD, PARAMS]
    for drop in (False, True):
        accumulating = ao.accumulate_gradients(ao.adam(0.1), 2, drop_nonfinite=drop)
        params, state, scales = run(ao.dynamic_loss_scale(accumulating, 8.0, 1), sequence)
        assert scales == [8, 4, 4, 8, 4, 4]
        expected, expected_state, _ = run(
            ao.dynamic_loss_scale(accumulating, 1.0, 100), [PARAMS, half, quarter, PARAMS]
        )
        same(params, expected)
        same(state.inner_state.inner_state, expected_state.inner_state.inner_state)
        assert ao.get_rejections(state).total == 2


def test_inside_an_accumulation_it_moves_at_emissions():
    for wrap in (
        lambda tx: ao.accumulate_gradients(tx, 2),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    ):
        tx = wrap(ao.dynamic_loss_scale(ao.adam(0.1), 8.0))
        params, state, scales = run(tx, [PARAMS] * 4)
        expected, _, _ = run(ao.dynamic_loss_scale(ao.adam(0.1), 8.0), [PARAMS] * 2)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, expected)
        assert scales == [8] * 4
    _, state, scales = run(ao.accumulate_gradients(ao.dynamic_loss_scale(ao.adam(0.1), 8.0), 2), [BAD] * 4)
    assert scales == [8, 4, 4, 2] and ao.get_rejections(state).total == 2


@pytest.mark.parametrize("around", [True, False])
def test_with_reject_nonfinite_in_both_orders(around):
    one, other = (ao.reject_nonfinite, ao.dynamic_loss_scale)[:: 1 if around else -1]
    sequence = [PARAMS, BAD, BAD, PARAMS]
    params, state, scales = run(one(optax.chain(other(ao.adam(0.1)))), sequence)
    expected, _, _ = run(ao.dynamic_loss_scale(ao.adam(0.1)), [PARAMS, PARAMS])
    same(params, expected)
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**13] and ao.get_rejections(state)[:2] == (2, 0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: ao.accumulate_gradients(tx, 2, drop_nonfinite=True),
        lambda tx: ao.accumulate_gradients(optax.chain(tx), 2, drop_nonfinite=True),
        lambda tx: ao.reject_nonfinite(ao.accumulate_gradients(tx, 2)),
        lambda tx: ao.reject_nonfinite(optax.MultiSteps(tx, 2).gradient_transformation()),
    ],
)
def test_where_its_scale_could_never_fall_it_is_refused(wrap):
    with pytest.raises(ValueError, match=r"could never fall.*Put .* outside: dynamic_loss_scale\(accum"):
        wrap(ao.dynamic_loss_scale(ao.sgd(0.1))).init(PARAMS)


def test_what_is_inside_sees_the_gradients_themselves():
    inner = optax.chain(ao.clip_by_global_norm(0.5), ao.inject_hyperparams(ao.adam)(0.1))
    tx = ao.dynamic_loss_scale(ao.freeze(ao.telemetry(inner), "a"))
    params, state, _ = run(tx, [PARAMS] * 2)
    assert ao.get_telemetry(state).gradient_norm == pytest.approx(0.75**0.5)
    expected, few, _ = run(ao.dynamic_loss_scale(ao.freeze(inner, "a"), 1.0), [PARAMS] * 2)
    same(params, expected)
    state = ao.set_hyperparams(state, learning_rate=0.0)
    updates, _ = tx.update(scaled(PARAMS, state), state, params)
    assert not jnp.any(updates["b"])


def test_with_nnx_and_equinox():
    model = nnx.Linear(2, 1, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ao.dynamic_loss_scale(optax.adam(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ao.scale_loss(1e-7 * jnp.mean(model(jnp.ones((1, 2), jnp.float16))), optimizer.opt_state)

        optimizer.update(model, nnx.grad(loss)(model))

    before = model.bias[...]
    step(model, optimizer)
    assert model.bias[...] < before and ao.get_loss_scale(optimizer.opt_state) == 2.0**15
    model = eqx.nn.Linear(2, 1, key=jax.random.key(0))
    tx = ao.dynamic_loss_scale(ao.adam(0.1))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    grads = eqx.filter_grad(lambda m: ao.scale_loss(jnp.sum(m(jnp.ones(2))), state))(model)
    updates, _ = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    assert jnp.all(updates.weight < 0)


def test_a_restored_state_goes_on(tmp_path):
    tx = ao.dynamic_loss_scale(ao.adam(0.1), growth_interval=2)
    _, state, _ = run(tx, [PARAMS, BAD, PARAMS])
    restored = through_bytes(state, tx.init(PARAMS), tmp_path)
    same(tx.update(PARAMS, restored, PARAMS), tx.update(PARAMS, state, PARAMS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0.0}, r"init_scale must be a number in \(0, inf\), got 0.0"),
        ({"init_scale": 1e300}, "init_scale must be"),
        ({"growth_interval": 0}, r"growth_interval must be an integer in \[1, inf\), got 0"),
        ({"growth_factor": 0.5}, r"growth_factor must be a number in \[1, inf\)"),
        ({"backoff_factor": 1.0}, r"backoff_factor must be a number in \(0, 1\)"),
        ({"minimum_scale": -1.0}, "minimum_scale must be"),
        ({"maximum_scale": 0.0}, "maximum_scale must be"),
        ({"on_reject": 1}, "on_reject must be None or a function"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ao.dynamic_loss_scale(ao.sgd(0.1), **arguments)
    with pytest.raises(ValueError, match="must hold one state of dynamic_loss_scale, got 0"):
        ao.scale_loss(1.0, ao.sgd(0.1).init(PARAMS))


def test_a_loss_that_is_no_number_is_refused():
    state = ao.dynamic_loss_scale(ao.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match=r"loss must be a real scalar .*scale its value, scale_loss\(loss\("):
        ao.scale_loss(lambda params: 1.0, state)
    with pytest.raises(ValueError, match="got 'high' at 'a'"):
        ao.scale_loss({"a": "high"}, state)

"""The average of the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference.averaging import corrected_ema, polynomial_average

import adaptive_optax as ao


def iterates_and_averages(averaging, steps=60):
    tx = optax.chain(ao.adam(0.1), averaging)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}

    def body(carry, step):
        params, state = carry
        gradient = jax.tree.map(lambda x: x + jnp.sin(step + x), params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        average = ao.averaged_parameters(params, state)
        return (params, state), [jnp.append(tree["w"], tree["b"]) for tree in (params, average)]

    start = params, tx.init(params)
    return [np.asarray(x) for x in jax.jit(lambda: jax.lax.scan(body, start, jnp.arange(steps))[1])()]


@pytest.mark.parametrize("power", [0.0, 1.0, 8.0, 2.5])
def test_it_is_the_papers_average(power):
    iterates, found = iterates_and_averages(ao.average_parameters(power))
    np.testing.assert_allclose(found, polynomial_average(iterates, power), rtol=2e-6, atol=2e-6)


DECAYS = {
    "0.9": 0.9,
    "0.9999": 0.9999,
    "0": 0.0,
    "0.3": 0.3,
    "warm-up": lambda count: jnp.minimum(0.95, (2 + count) / (11 + count)),
    "array": jnp.float32(0.875),
}


@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_gives_the_corrected_moving_average(name):
    decay = DECAYS[name]
    iterates, found = iterates_and_averages(ao.average_parameters(decay=decay))
    decays = [float(decay(t)) if callable(decay) else float(decay) for t in range(len(iterates))]
    np.testing.assert_allclose(found, corrected_ema(iterates, decays), rtol=2e-6, atol=2e-6)


def test_a_decay_is_that_of_optax():
    iterates, found = iterates_and_averages(ao.average_parameters(decay=0.9), 30)
    ema = optax.ema(0.9, debias=True)
    state = ema.init(jnp.zeros(3))
    for x, average in zip(iterates, found, strict=True):
        expected, state = ema.update(jnp.asarray(x), state)
        np.testing.assert_allclose(average, expected, rtol=1e-5)


def test_a_schedule_gives_pytorchs_average():
    torch = pytest.importorskip("torch")
    first_in_full = ao.average_parameters(decay=lambda count: jnp.where(count == 0, 0.0, 0.9))
    iterates, found = iterates_and_averages(first_in_full, 30)
    module = torch.nn.Linear(1, 3, bias=False)
    averaged = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for x, average in zip(iterates, found, strict=True):
        with torch.no_grad():
            module.weight.copy_(torch.tensor(x)[:, None])
        averaged.update_parameters(module)
        np.testing.assert_allclose(average, averaged.module.weight.detach()[:, 0], rtol=2e-6, atol=1e-6)


def test_the_weights_of_a_slow_decay_sum_to_one_after_many_steps():
    # Of constant parameters the average is those; of a jump it holds the share 1 - b^n exactly.
    decay, before, after = 0.9999, 20_000, 5000
    tx = ao.average_parameters(decay=decay)
    where = jnp.concatenate([jnp.zeros(before), jnp.ones(after)])

    def body(state, x):
        return tx.update(jnp.zeros(1), state, x[None])[1], None

    state, _ = jax.jit(lambda: jax.lax.scan(body, tx.init(jnp.zeros(1)), where))()
    share = -np.expm1(after * np.log(decay)) / -np.expm1((before + after) * np.log(decay))
    np.testing.assert_allclose(state.average, [share], rtol=5e-5)  # 5000 roundings of float32, not 2e-3
    np.testing.assert_allclose(state.weight, -np.expm1((before + after) * np.log(decay)), rtol=2e-6)


def test_power_zero_is_the_mean_and_a_line_is_followed_at_a_fixed_share():
    # On the line w_t = t the average with power g is (t + 1) (g + 1) / (g + 2) - ... -> t (g + 1) / (g + 2).
    for power in (0.0, 8.0):
        tx, w = ao.average_parameters(power), jnp.zeros(1)
        state = tx.init(w)
        for _ in range(2000):
            updates, state = tx.update(jnp.ones(1), state, w)
            w = optax.apply_updates(w, updates)
        share = float(ao.averaged_parameters(w, state)[0] / w[0])
        assert share == pytest.approx((power + 1) / (power + 2), rel=2e-3)


def test_it_averages_what_the_parameters_really_become():
    """bfloat16 parameters that an update cannot move keep their average."""
    tx, w = ao.average_parameters(), jnp.ones(1, jnp.bfloat16)
    state = tx.init(w)
    for _ in range(10):
        updates, state = tx.update(jnp.full(1, 1e-3), state, w)
        w = optax.apply_updates(w, updates)
    assert state.average.tolist() == [1.0] and state.average.dtype == jnp.float32
    assert ao.averaged_parameters(w, state).dtype == jnp.bfloat16


def trained(tx, params, steps=3):
    state = tx.init(params)
    for step in range(steps):
        gradients = jax.tree.map(lambda x, step=step: jnp.full_like(x, step + 1.0), params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


AVERAGED = optax.chain(ao.sgd(1.0), ao.average_parameters(0.0))
OTHER = optax.chain(ao.sgd(1.0), ao.average_parameters(decay=0.0))
PARAMS = {"body": {"w": jnp.zeros(2), "b": jnp.zeros(1)}, "head": jnp.zeros(3)}
# After steps of 1, 2 and 3 down: -6 at the end, -10/3 on average.
LAST, MEAN = -6.0, -10 / 3


def expect(found, body, head):
    leaves = [*jax.tree.leaves(found["body"]), found["head"]]
    for x, value in zip(leaves, [body, body, head], strict=True):
        np.testing.assert_allclose(x, value, rtol=1e-6)


GROUPS = {
    "masked": (
        optax.chain(ao.sgd(1.0), optax.masked(ao.average_parameters(0.0), {"body": True, "head": False})),
        MEAN,
        LAST,
    ),
    "one group": (ao.partition_by_path({"^body/": AVERAGED}, default=ao.sgd(1.0)), MEAN, LAST),
    "two groups": (ao.partition_by_path({"^body/": AVERAGED}, default=OTHER), MEAN, LAST),
    "optax": (optax.partition({"x": ao.sgd(1.0), "y": AVERAGED}, {"body": "x", "head": "y"}), LAST, MEAN),
    "wrapped": (ao.reject_nonfinite(ao.telemetry(AVERAGED)), MEAN, MEAN),
    "accumulated": (ao.accumulate_gradients(AVERAGED, 1), MEAN, MEAN),
    "injected": (optax.chain(ao.sgd(1.0), ao.inject_hyperparams(ao.average_parameters)(0.0)), MEAN, MEAN),
    "masters": (ao.master_weights(AVERAGED), MEAN, MEAN),
}


@pytest.mark.parametrize("name", GROUPS)
def test_each_leaf_has_its_own_groups_average(name):
    tx, body, head = GROUPS[name]
    params, state = trained(tx, PARAMS)
    expect(ao.averaged_parameters(params, state), body, head)
    expect(ao.swap_averaged(params, state), body, head)
    expect(params, LAST, LAST)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
        self.tied = self.linear.kernel

    def __call__(self, x):
        return self.layers[0](self.norm(self.linear(x) @ self.tied[...]))


def trained_model(tx, steps=3):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = nnx.as_pure(nnx.state(model, nnx.Param))
    for _ in range(steps):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    return model, optimizer, jax.tree.map(lambda x: x - 2, start)  # the mean of 1, 2 and 3 steps


@pytest.mark.parametrize("of", ["state", "pure", "module"])
@pytest.mark.parametrize("by", ["opt_state", "nnx.state", "pure"])
def test_nnx_states_of_any_form_have_the_average(of, by):
    model, optimizer, expected = trained_model(AVERAGED)
    opt_state = {
        "opt_state": optimizer.opt_state,
        "nnx.state": nnx.state(optimizer),
        "pure": nnx.as_pure(nnx.state(optimizer)),
    }[by]
    state = nnx.state(model, nnx.Param)
    params = {"state": state, "pure": nnx.as_pure(state), "module": model}[of]
    before = nnx.as_pure(state)
    for found in (ao.averaged_parameters(params, opt_state), ao.swap_averaged(params, opt_state)):
        assert type(found) is type(params)
        if of == "module":
            assert found is not model and found.tied is found.linear.kernel
            np.testing.assert_array_equal(found.norm.mean[...], model.norm.mean[...])
            found(jnp.ones((3, 2)))
            found = nnx.state(found, nnx.Param)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), nnx.as_pure(found), expected
        )
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model, nnx.Param)), before)


def test_a_model_in_hijax_form_stays_as_it_is():
    with nnx.var_defaults(hijax=True):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, AVERAGED, wrt=nnx.Param)
        params = nnx.state(model, nnx.Param)
        before = nnx.as_pure(nnx.state(model))
        optimizer.update(model, jax.tree.map(lambda x: nnx.Param(jnp.ones_like(x[...])), params))
        trained = nnx.as_pure(nnx.state(model))
        averaged = ao.swap_averaged(model, optimizer.opt_state)
        averaged.train()
        averaged(jnp.arange(6.0).reshape(3, 2))  # moves its own running statistics
        assert averaged.norm.mean[...].any() and averaged.tied is averaged.linear.kernel
        np.testing.assert_allclose(averaged.tied[...], before["linear"]["kernel"] - 1, rtol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model)), trained)
        found = ao.averaged_parameters(params, optimizer.opt_state)
        assert jax.tree.map(type, found) == jax.tree.map(type, params)


def test_an_equinox_model_has_the_average_of_its_arrays():
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    params, state = trained(AVERAGED, eqx.filter(model, eqx.is_inexact_array))
    averaged = ao.swap_averaged(model, state)
    np.testing.assert_allclose(averaged.layers[0].weight, model.layers[0].weight + MEAN, rtol=1e-5)
    assert averaged(jnp.ones(2)).shape == (1,)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_state_and_parameters_can_be_donated(decay):
    tx = optax.chain(ao.sgd(1.0), ao.average_parameters(decay=decay))
    params = {"w": jnp.ones(4), "b": jnp.ones(2)}
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=(0, 1))
    step(params, tx.init(params))


@pytest.mark.parametrize("swap", [ao.averaged_parameters, ao.swap_averaged])
def test_the_averaged_parameters_can_be_donated_beside_the_state(swap):
    params, state = trained(AVERAGED, PARAMS)
    step = jax.jit(lambda p, s: AVERAGED.update(p, s, p), donate_argnums=(0, 1))
    step(swap(params, state), state)
    model, optimizer, _ = trained_model(AVERAGED)
    nnx.update(model, nnx.state(swap(model, optimizer.opt_state)))
    step(nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state))


@pytest.mark.parametrize("number", [1.0, 1 + 1j])
def test_python_numbers_are_averaged(number):
    params, state = trained(AVERAGED, {"w": number})
    for found in (ao.averaged_parameters({"w": number}, state), ao.swap_averaged({"w": number}, state)):
        assert found["w"] == pytest.approx(number + MEAN)
        assert found["w"].dtype == jnp.result_type(number)


@pytest.mark.parametrize("argument", ["power", "decay"])
def test_it_averages_by_its_own_power_and_decay_whatever_made_the_state(argument):
    values = {"power": (3.0, 0.5), "decay": (0.9, 0.5)}[argument]
    first, second = (ao.average_parameters(**{argument: value}) for value in values)
    params = {"w": jnp.ones(2)}
    _, state = first.update(params, first.init(params), params)
    params = {"w": jnp.full(2, 5.0)}
    _, moved = second.update(params, state, params)
    assert ao.get_hyperparams(moved)[argument] == jnp.float32(0.5)
    _, kept = first.update(params, state, params)
    assert not jnp.array_equal(moved.average["w"], kept.average["w"])


def test_errors():
    with pytest.raises(ValueError, match=r"power must be a number in \[0, inf\), got -1"):
        ao.average_parameters(-1)
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\).*, got 1.0"):
        ao.average_parameters(decay=1.0)
    with pytest.raises(ValueError, match="Give power or decay, not both, got power=2.0 and decay=0.9"):
        ao.average_parameters(2.0, decay=0.9)
    tx = ao.average_parameters()
    with pytest.raises(ValueError, match="average_parameters needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    params = {"w": jnp.ones(2)}
    twice = optax.chain(tx, ao.average_parameters(decay=0.9))
    with pytest.raises(ValueError, match="one average per leaf, got several of 'w'"):
        ao.averaged_parameters(params, twice.init(params))
    with pytest.raises(ValueError, match="swap_averaged: opt_state holds no average"):
        ao.swap_averaged(params, ao.adam(0.1).init(params))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"average of 'w', of shape \(2,\), is not in params"):
        ao.averaged_parameters({"params": params}, state)
    with pytest.raises(ValueError, match=r"average of 'w', of shape \(2,\), has shape \(3,\) in params"):
        ao.averaged_parameters({"w": jnp.ones(3)}, state)

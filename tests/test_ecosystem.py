"""What users of optax and its neighbours do with an optimizer, done with those of this library.

Meta-gradients and `optax.tree_utils` on states, donation of fresh states, optax's wrappers around ours and
ours around optax's, and the libraries that take an optax optimizer, which the extra `[ecosystem]` installs.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from optax.tree_utils import tree_get, tree_get_all_with_path, tree_set
from saving import same, spec

import adaptive_optax as ao

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
GRADIENTS = jax.tree.map(lambda x: 0.5 * x + 0.25, PARAMS)


def halving(count):
    """1/2, 1/4, 1/8."""
    return 0.5 / 2.0**count


def stepped(tx, params, gradients, state=None, steps=1, **extra_args):
    """The parameters and the state after steps along one gradient."""
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


# --- Gradients through hyperparameters in a state -----------------------------------------------------------


def assigned(state, name, value):
    state.hyperparams[name] = value
    return state


WAYS = {
    "assigned": assigned,
    "tree_set": lambda state, name, value: tree_set(state, **{name: value}),
    "set_hyperparams": lambda state, name, value: ao.set_hyperparams(state, **{name: value}),
}
RATES = {
    "injected": (ao.inject_hyperparams(ao.sgd), list(WAYS)),
    "optax's, injected": (ao.inject_hyperparams(optax.sgd), list(WAYS)),
    "plain": (ao.sgd, ["tree_set", "set_hyperparams"]),
    "injected by optax": (optax.inject_hyperparams(ao.sgd), ["assigned", "tree_set"]),
}
EACH_WAY = [(kind, way) for kind, (_, ways) in RATES.items() for way in ways]


@pytest.mark.parametrize(("kind", "way"), EACH_WAY)
@pytest.mark.parametrize("rate", [0.1, 0.25], ids=["the given value", "another"])
def test_a_gradient_reaches_a_value_that_is_set(kind, way, rate):
    tx = RATES[kind][0](0.1)

    def loss_after(steps, rate):
        state = WAYS[way](tx.init(jnp.ones(1)), "learning_rate", rate)
        params = jnp.ones(1)
        for _ in range(steps):
            updates, state = tx.update(2 * params, state, params)
            params = params + updates
        return jnp.sum(params**2)

    # (1 - 2 rate)^(2 steps); optax gives the same where it takes the value.
    for steps in (1, 3):
        expected = -4 * steps * (1 - 2 * rate) ** (2 * steps - 1)
        for transform in (lambda f: f, jax.jit):
            gradient = transform(jax.grad(functools.partial(loss_after, steps)))(rate)
            np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", RATES)
def test_it_does_so_in_a_scan_and_for_many_at_once(kind):
    build, ways = RATES[kind]
    tx = build(0.1)

    def loss(rate):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(2 * params, state, params)
            return (params + updates, state), None

        state = WAYS[ways[-1]](tx.init(jnp.ones(1)), "learning_rate", jnp.asarray(rate, jnp.float32))
        (params, _), _ = jax.lax.scan(body, (jnp.ones(1), state), length=3)
        return jnp.sum(params**2)

    rates = jnp.array([0.05, 0.1, 0.3])
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(rates), -12 * (1 - 2 * rates) ** 5, rtol=1e-5, atol=1e-6
    )


def test_it_does_so_in_float64(x64):
    tx = ao.inject_hyperparams(ao.sgd, hyperparam_dtype=jnp.float64)(0.1)

    def loss(rate):
        state = assigned(tx.init(jnp.ones(1)), "learning_rate", rate)
        return jnp.sum((1 + tx.update(jnp.full(1, 2.0), state)[0]) ** 2)

    np.testing.assert_allclose(jax.grad(loss)(0.1), -3.2, rtol=1e-12)


@pytest.mark.parametrize("build", [ao.sgd, ao.inject_hyperparams(ao.sgd)], ids=["plain", "injected"])
def test_a_gradient_through_the_given_value_is_counted_once(build):
    def loss(peak):
        tx = build(lambda count: peak / (1.0 + count))
        params, state = jnp.ones(1), tx.init(jnp.ones(1))
        for _ in range(3):
            updates, state = tx.update(jnp.ones(1), state)
            params = params + updates
        return jnp.sum(params)

    np.testing.assert_allclose(jax.grad(loss)(0.5), -(1 + 1 / 2 + 1 / 3), rtol=1e-6)


def test_a_gradient_reaches_the_scale_of_a_plateau_and_other_hyperparameters():
    tx = ao.reduce_on_plateau()

    def scaled(scale):
        state = ao.set_hyperparams(tx.init(jnp.ones(1)), scale=scale)
        return jnp.sum(tx.update(jnp.ones(1), state, value=1.0)[0])

    assert jax.grad(scaled)(1.0) == 1.0
    inject = ao.inject_hyperparams(ao.adamw)(0.5, weight_decay=0.25)

    def decayed(decay):
        state = assigned(inject.init(jnp.ones(1)), "weight_decay", decay)
        return jnp.sum(inject.update(jnp.zeros(1), state, jnp.ones(1))[0])

    assert jax.grad(decayed)(0.25) == -0.5


@pytest.mark.parametrize("given", [0.1, 1 / 3, 1e-30, 1e38, 0.0, -0.0, np.inf])
def test_where_nothing_was_set_the_given_value_is_used_to_the_bit(given):
    tx = ao.inject_hyperparams(optax.scale)(step_size=lambda count: given * (1.0 + count % 2))
    state = tx.init(jnp.ones(1))
    for step in range(3):
        _, state = jax.jit(tx.update)(jnp.ones(1), state)
        expected = np.float32(given) * np.float32(1 + step % 2)
        assert np.asarray(state.hyperparams["step_size"]).tobytes() == expected.tobytes()


# --- optax.tree_utils ---------------------------------------------------------------------------------------

RATED = {
    "sgd": lambda: ao.sgd(0.1),
    "sgd, scheduled": lambda: ao.sgd(halving),
    "adam": lambda: ao.adam(0.1),
    "adamw": lambda: ao.adamw(0.1),
    "rmsprop": lambda: ao.rmsprop(0.1, momentum=0.5),
    "adam_mini": lambda: ao.adam_mini(0.1, {"": "tensor"}),
    "injected": lambda: ao.inject_hyperparams(ao.adamw)(0.1),
    "injected, scheduled": lambda: ao.inject_hyperparams(ao.sgd)(halving, momentum=0.5),
    "optax's, injected": lambda: ao.inject_hyperparams(optax.adamw)(0.1),
    "injected by optax": lambda: optax.inject_hyperparams(ao.adamw)(0.1),
    "chain": lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adam(halving)),
    "rejecting": lambda: ao.reject_nonfinite(ao.adam(0.1)),
    "telemetry": lambda: ao.telemetry(ao.adam(0.1), per="tensor"),
    "telemetry, injected": lambda: ao.telemetry(ao.inject_hyperparams(ao.sgd)(0.1)),
    "freezing, accumulating": lambda: ao.accumulate_gradients(ao.freeze(ao.adam(0.1), "b"), 1),
    "loss scale": lambda: ao.dynamic_loss_scale(ao.adam(0.1), init_scale=1.0),
    "accumulated": lambda: optax.MultiSteps(ao.adam(0.1), 1),
    "master weights": lambda: ao.master_weights(ao.sgd(0.1, momentum=0.5)),
}


@pytest.mark.parametrize("name", RATED)
def test_tree_get_finds_one_learning_rate_and_tree_set_sets_it(name):
    tx = RATED[name]()
    state = tx.init(PARAMS)
    rate = float(tree_get(state, "learning_rate"))
    assert rate == np.float32(0.5 if "scheduled" in name or name == "chain" else 0.1)
    zero = tree_set(state, learning_rate=0.0)
    assert tree_get(zero, "learning_rate") == 0.0
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, zero = update(GRADIENTS, zero, PARAMS)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        assert tree_get(zero, "learning_rate") == 0.0
    sixfold = update(GRADIENTS, tree_set(state, learning_rate=jnp.float32(6 * rate)), PARAMS)[0]
    once = update(GRADIENTS, state, PARAMS)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 6 * y, rtol=2e-6), sixfold, once)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: ao.sgd(x), lambda x: optax.sgd(x)),
        (lambda x: ao.sgd(x, momentum=0.5), lambda x: optax.sgd(x, momentum=0.5)),
        (lambda x: ao.adam(x), lambda x: optax.adam(x)),
        (lambda x: ao.adamw(x), lambda x: optax.adamw(x)),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
@pytest.mark.parametrize("rate", [0.1, halving], ids=["number", "schedule"])
def test_there_are_as_many_counts_as_in_optax(ours, theirs, rate):
    counts = [tree_get_all_with_path(build(rate).init(PARAMS), "count") for build in (ours, theirs)]
    assert len(counts[0]) <= len(counts[1])


def test_the_count_of_adam_is_one():
    for build in (ao.adam, ao.adamw, optax.inject_hyperparams(ao.sgd), ao.inject_hyperparams(ao.sgd)):
        tx = build(0.1)
        _, state = stepped(tx, PARAMS, GRADIENTS, steps=3)
        assert tree_get(state, "count") == 3


@pytest.mark.parametrize("name", ["sgd", "sgd, scheduled", "injected", "injected, scheduled"])
def test_what_tree_set_sets_is_released_and_held_as_what_set_hyperparams_sets(name):
    tx = RATED[name]()
    _, state = stepped(tx, PARAMS, GRADIENTS, tree_set(tx.init(PARAMS), learning_rate=2.0), 2)
    assert float(ao.get_hyperparams(state)["learning_rate"]) == 2.0
    released = ao.set_hyperparams(state, learning_rate=None)
    _, released = stepped(tx, PARAMS, GRADIENTS, released)
    expected = halving(2) if "scheduled" in name else np.float32(0.1)
    assert float(ao.get_hyperparams(released)["learning_rate"]) == expected
    # One that is set again replaces the first.
    _, again = stepped(tx, PARAMS, GRADIENTS, tree_set(state, learning_rate=jnp.float32(0.5)), 2)
    assert float(ao.get_hyperparams(again)["learning_rate"]) == 0.5


# --- Trees that users have ----------------------------------------------------------------------------------

# One per factory: what a factory makes of a tree does not depend on its other arguments.
ONE_PER_FACTORY = list({case.factory: case for case in CASES}.values())
per_factory = pytest.mark.parametrize("case", ONE_PER_FACTORY, ids=lambda case: case.factory)


@per_factory
def test_python_numbers_are_parameters(case):
    tx = case.make()
    params, gradients = {"a": 1.0, "kernel": np.ones(2, np.float32)}, {"a": 0.5, "kernel": jnp.ones(2)}
    as_arrays = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    state = tx.init(params)
    updates, state = tx.update(gradients, state, params)
    expected = as_arrays(params)
    expected_updates, expected_state = tx.update(as_arrays(gradients), tx.init(expected), expected)
    same((updates, state), (expected_updates, expected_state))
    assert not any(x.weak_type for x in jax.tree.leaves((updates, state)))
    assert optax.apply_updates(params, updates)["a"].dtype == jnp.float32


@per_factory
def test_variables_of_nnx_in_their_hijax_form(case):
    tx = case.make()
    with nnx.var_defaults(hijax=True):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        gradients = jax.tree.map(lambda x: 0.5 * x + 1, params)
        optimizer.update(model, jax.tree.map(nnx.Param, gradients))
        new = nnx.as_pure(nnx.state(model, nnx.Param))
    updates, _ = tx.update(gradients, tx.init(params), params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), new, optax.apply_updates(params, updates)
    )


def test_a_state_for_variables_in_their_hijax_form_need_not_be_made():
    with nnx.var_defaults(hijax=True):
        params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
        for tx in (ao.adam(0.1), ao.adamw(0.1, granularity="tensor"), ao.reject_nonfinite(ao.sgd(0.1, 0.9))):
            abstract = jax.tree.leaves(jax.eval_shape(tx.init, params))
            assert [x.shape for x in abstract] == [jnp.shape(x) for x in jax.tree.leaves(tx.init(params))]


def test_a_mask_may_be_a_model_that_can_be_called():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    assert callable(mask)
    tx = ao.adamw(0.5, weight_decay=0.5, mask=mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates.weight, -0.25 * params.weight, rtol=1e-6)
    assert not np.any(updates.bias)


# --- Equinox ------------------------------------------------------------------------------------------------

LOW_PRECISION = {
    "nothing behind": lambda: optax.chain(ao.adam(1e-3), ao.match_parameter_dtype()),
    "stochastic": lambda: optax.chain(ao.adam(1e-3), ao.stochastic_rounding(), ao.match_parameter_dtype()),
    "kahan": lambda: optax.chain(ao.kahan_summation(ao.adam(1e-3)), ao.match_parameter_dtype()),
    "master": lambda: optax.chain(ao.master_weights(ao.adamw(1e-3)), ao.match_parameter_dtype()),
    "optax": lambda: optax.chain(optax.sgd(1e-2), ao.match_parameter_dtype()),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_low_precision_model_of_equinox_keeps_its_dtype_in_a_scan(name, dtype):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
    model = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = LOW_PRECISION[name]()
    x = jax.random.normal(jax.random.key(1), (16, 2), dtype)

    def loss(params):
        predicted = jax.vmap(eqx.combine(params, static))(x)[:, 0].astype(jnp.float32)
        return jnp.mean((predicted - jnp.sum(x.astype(jnp.float32), axis=1)) ** 2)

    @eqx.filter_jit
    def trained(params, state, apply_updates):
        def body(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradients, state, params)
            return (apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, state), length=100)

    (end, _), losses = trained(params, tx.init(params), eqx.apply_updates)
    assert {x.dtype for x in jax.tree.leaves(end)} == {jnp.dtype(dtype)}
    assert losses[-1] < 0.9 * losses[0]
    # What optax's own cast gives.
    (other, _), _ = trained(params, tx.init(params), optax.apply_updates)
    same(end, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_in_the_parameters_dtype_lands_where_the_cast_of_the_wide_sum_does(dtype):
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.standard_normal(20_000) * 2.0 ** rng.integers(-6, 6, 20_000), dtype)
    u = jnp.asarray(rng.standard_normal(20_000) * 2.0 ** rng.integers(-12, 6, 20_000), jnp.float32)
    target = optax.apply_updates(p, u)
    v, _ = ao.match_parameter_dtype().update(u, optax.EmptyState(), p)
    assert v.dtype == p.dtype
    with jax.numpy_dtype_promotion("strict"):
        landed = p + v
    p, v, target, landed = (np.asarray(x, np.float32) for x in (p, v, target, landed))
    # A larger step may need more digits than the dtype has.
    is_sure = (target / p >= 0.5) & (target / p <= 2)
    assert np.mean(is_sure) > 0.6
    np.testing.assert_array_equal(landed[is_sure], target[is_sure])
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    assert np.all(np.abs(landed - target) <= half_a_unit * (np.abs(v) + np.abs(landed)))


WHOLE = {
    "adamw": lambda: ao.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "rmsprop": lambda: ao.rmsprop(0.1),
    "global_rmsprop": lambda: ao.global_rmsprop(0.1),
    "reject_nonfinite": lambda: ao.reject_nonfinite(ao.adam(0.1)),
    "dynamic_loss_scale": lambda: ao.dynamic_loss_scale(ao.adam(0.1), init_scale=1.0),
    "telemetry": lambda: ao.telemetry(ao.adam(0.1), per="tensor"),
    "freeze": lambda: ao.freeze(ao.adam(0.1), "bias"),
    "partition_by_path": lambda: ao.partition_by_path({"bias": ao.sgd(0.1)}, default=ao.adam(0.1)),
    "stochastic_rounding": lambda: optax.chain(ao.adam(0.1), ao.stochastic_rounding()),
    "kahan_summation": lambda: ao.kahan_summation(ao.adam(0.1)),
    "master_weights": lambda: ao.master_weights(ao.adam(0.1)),
    "average_parameters": lambda: optax.chain(ao.adam(0.1), ao.average_parameters()),
    "match_parameter_dtype": lambda: optax.chain(ao.adam(0.1), ao.match_parameter_dtype()),
    "accumulate_gradients": lambda: ao.accumulate_gradients(ao.adam(0.1), 1),
    "inject_hyperparams": lambda: ao.inject_hyperparams(ao.adamw)(0.1),
    "reduce_on_plateau": lambda: optax.chain(ao.adam(0.1), ao.reduce_on_plateau()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_gradients_of_a_filtered_model_come_with_the_whole_model(name):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
    filtered, tx = eqx.filter(model, eqx.is_inexact_array), WHOLE[name]()
    gradients = jax.tree.map(lambda p: 0.5 * p + 0.1, filtered)
    state = tx.init(filtered)
    found, expected = (tx.update(gradients, state, params, value=1.0)[0] for params in (model, filtered))
    assert jax.tree.structure(found) == jax.tree.structure(expected) == jax.tree.structure(gradients)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("injected", [False, True])
def test_sharpness_aware_minimization_takes_ours(injected):
    params = {"w": jnp.ones(3)}

    def run(lib):
        build = lib.inject_hyperparams(lib.adam) if injected else lib.adam
        tx = optax.contrib.sam(build(0.1), lib.sgd(0.05), sync_period=2)
        return stepped(tx, params, params, steps=6)[0]["w"]

    np.testing.assert_allclose(run(ao), run(optax), rtol=1e-5)


def test_dtypes_are_matched_by_path():
    params = collections.OrderedDict(w=jnp.ones(2, jnp.bfloat16), b=jnp.full(2, 3.0))
    tx = ao.match_parameter_dtype()
    updates, _ = tx.update({"w": jnp.full(2, 0.25), "b": jnp.zeros(2)}, tx.init(params), params)
    assert {name: str(u.dtype) for name, u in updates.items()} == {"b": "float32", "w": "bfloat16"}


AROUND = {
    "reject_nonfinite": ao.reject_nonfinite,
    "dynamic_loss_scale": lambda tx: ao.dynamic_loss_scale(tx, init_scale=1.0),
    "accumulate_gradients": lambda tx: ao.accumulate_gradients(tx, every=2),
    "telemetry": lambda tx: ao.telemetry(tx, every=2, per="tensor"),
    "freeze": lambda tx: ao.freeze(tx, "frozen"),
    "inject_hyperparams": lambda tx: ao.inject_hyperparams(lambda: tx)(),
    "partition_by_path": lambda tx: ao.partition_by_path({".": tx}),
    "two": lambda tx: ao.reject_nonfinite(ao.telemetry(ao.accumulate_gradients(tx, every=2))),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("wrapper", AROUND)
def test_wrappers_keep_the_dtypes_that_the_inner_transformation_gives(wrapper, jitted):
    params = {"frozen": jnp.ones(2), "w": jnp.ones(3, jnp.bfloat16), "x": jnp.ones(4)}
    inner = optax.chain(ao.adamw(0.1), ao.stochastic_rounding(), ao.match_parameter_dtype())
    tx = AROUND[wrapper](inner)
    state, update = tx.init(params), jax.jit(tx.update) if jitted else tx.update
    for _ in range(4):
        updates, state = update(params, state, params)
        assert {name: u.dtype for name, u in updates.items()} == {n: p.dtype for n, p in params.items()}
        params = jax.tree.map(lambda p, u: p + u, params, updates)  # as Equinox does
    assert bool((params["w"] < 1).all())


@pytest.mark.parametrize("factory", [ao.kahan_summation, ao.master_weights])
def test_parameters_that_a_sum_without_a_cast_has_widened_are_told(factory):
    tx, params = factory(ao.adamw(0.1)), {"b": jnp.ones(2), "w": jnp.ones(3, jnp.float16)}
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    params = jax.tree.map(lambda p, u: p + u, params, updates)
    sentence = (
        f"{factory.__name__}: 'w' is float32 but had 16 bits when the state was made. Was the update added "
        "without a cast, as in equinox.apply_updates? Use optax.apply_updates, or end the chain with "
        "match_parameter_dtype."
    )
    with pytest.raises(ValueError) as refused:
        tx.update(params, state, params)
    assert str(refused.value) == sentence


# --- Wrappers -----------------------------------------------------------------------------------------------

OURS = {
    "adam": lambda: ao.adam(0.1),
    "adamw": lambda: ao.adamw(0.1),
    "rmsprop": lambda: ao.rmsprop(0.1, momentum=0.5),
    "global_rmsprop": lambda: ao.global_rmsprop(0.1),
    "sgd": lambda: ao.sgd(0.1, momentum=0.5),
    "adam, int8": lambda: ao.adam(0.1, mu_storage="int8", nu_storage="int8"),
    "injected": lambda: ao.inject_hyperparams(ao.adam)(0.1),
}
THEIRS = {
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "lion": lambda: optax.lion(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "sgd, scheduled": lambda: optax.sgd(halving, momentum=0.5),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1),
}


def always(step, *args, **extra_args):
    return jnp.asarray(True)


ALL = {"w": True, "b": True}
# Around an optimizer, wrapped in such a way that a step is the optimizer's own.
OPTAX_WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "MultiSteps, skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "masked": lambda tx: optax.masked(tx, ALL),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.set_to_zero()}, {"w": "x", "b": "x"}),
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(1.0)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1e9)), ("optimizer", tx)),
    "inject_hyperparams": lambda tx: optax.chain(tx, optax.inject_hyperparams(optax.scale)(step_size=1.0)),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "flatten": optax.flatten,
}
OUR_WRAPPERS = {
    "reject_nonfinite": ao.reject_nonfinite,
    "accumulate_gradients": lambda tx: ao.accumulate_gradients(tx, 1),
    "telemetry": ao.telemetry,
    "kahan_summation": ao.kahan_summation,
    "master_weights": ao.master_weights,
    "verified": ao.verified,
    "partition_by_path": lambda tx: ao.partition_by_path({"w|b": tx}),
    "average_parameters": lambda tx: optax.chain(tx, ao.average_parameters()),
    "plateau": lambda tx: optax.chain(tx, ao.reduce_on_plateau()),
    "inject_hyperparams": lambda tx: ao.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(
        1
    ),
}


def agree(wrapped, plain):
    (params, state), (expected, _) = (
        stepped(tx, PARAMS, GRADIENTS, steps=3, value=1.0) for tx in (wrapped, plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-5, atol=1e-7), params, expected)
    if isinstance(wrapped, optax.GradientTransformation):
        assert jax.tree.structure(state) == jax.tree.structure(wrapped.init(PARAMS))


@pytest.mark.parametrize("wrapper", OPTAX_WRAPPERS)
@pytest.mark.parametrize("name", OURS)
def test_optaxs_wrappers_around_ours(wrapper, name):
    agree(OPTAX_WRAPPERS[wrapper](OURS[name]()), OURS[name]())


@pytest.mark.parametrize("wrapper", OUR_WRAPPERS)
@pytest.mark.parametrize("name", THEIRS)
def test_our_wrappers_around_optaxs(wrapper, name):
    inner, plain = (optax.with_extra_args_support(THEIRS[name]()) for _ in range(2))
    agree(OUR_WRAPPERS[wrapper](inner), plain)


def counting_in_python():
    """Half of the gradient, with Python numbers in a fresh state, as in tutorials."""

    def update(updates, state, params=None):
        state = {"steps": state["steps"] + 1, "half": state["half"], "warm": state["warm"]}
        return jax.tree.map(lambda u: u * state["half"], updates), state

    return optax.GradientTransformation(lambda params: {"steps": 0, "half": -0.5, "warm": False}, update)


@pytest.mark.parametrize("wrapper", OUR_WRAPPERS)
def test_our_wrappers_around_a_state_of_python_numbers(wrapper):
    tx = OUR_WRAPPERS[wrapper](counting_in_python())
    state = tx.init(PARAMS)
    params, end = stepped(tx, PARAMS, GRADIENTS, state, steps=3, value=1.0)
    jax.tree.map(
        lambda x, p, g: np.testing.assert_allclose(x, p - 1.5 * g, rtol=1e-5), params, PARAMS, GRADIENTS
    )
    assert int(tree_get(end, "steps")) == 3
    if wrapper not in ("average_parameters", "plateau", "partition_by_path"):  # optax has the state as it is
        assert spec(end) == spec(state)


@pytest.mark.parametrize("name", OURS)
def test_lookahead_around_ours(name):
    tx = optax.lookahead(OURS[name](), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    fast, _ = stepped(OURS[name](), PARAMS, GRADIENTS, steps=2)
    for _ in range(2):
        updates, state = tx.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda x, y: x + 0.5 * (y - x), PARAMS, fast)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params.slow, expected)


# --- Libraries that take an optax optimizer -----------------------------------------------------------------

OPTIMIZERS = OURS | {
    "optax's, injected": lambda: ao.inject_hyperparams(optax.adam)(0.1),
    "scheduled": lambda: ao.sgd(halving),
    "masked": lambda: ao.adamw(0.1, mask=lambda params: True),
    "rejecting": lambda: ao.reject_nonfinite(ao.adam(0.1)),
    "averaged": lambda: optax.chain(ao.adam(0.1), ao.average_parameters()),
    "master weights": lambda: ao.master_weights(ao.sgd(0.1)),
    "accumulated": lambda: ao.accumulate_gradients(ao.sgd(0.1), 2),
    "partitioned": lambda: ao.partition_by_path({"": ao.adam(0.1)}),
    "telemetry": lambda: ao.telemetry(ao.adam(0.1)),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
TARGET = jnp.array([1.0, -0.5])


def squared_distance(y):
    return jnp.sum((y - TARGET) ** 2)


@each_optimizer
def test_optimistix(name):
    optimistix = pytest.importorskip("optimistix", reason="the extra [ecosystem] installs it")
    solver = optimistix.OptaxMinimiser(OPTIMIZERS[name](), rtol=1e-9, atol=1e-9)
    solution = optimistix.minimise(
        lambda y, args: squared_distance(y), solver, jnp.zeros(2), max_steps=20, throw=False
    )
    assert squared_distance(solution.value) < squared_distance(jnp.zeros(2))


@each_optimizer
@pytest.mark.filterwarnings("ignore::DeprecationWarning:numpyro")
def test_numpyro(name):
    optim = pytest.importorskip("numpyro.optim", reason="the extra [ecosystem] installs it")
    optimizer = optim.optax_to_numpyro(OPTIMIZERS[name]())
    state = optimizer.init(jnp.zeros(2))
    for _ in range(4):
        _, state = optimizer.eval_and_update(lambda y: (squared_distance(y), None), state)
    assert squared_distance(optimizer.get_params(state)) < squared_distance(jnp.zeros(2))


@each_optimizer
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jaxopt")
def test_jaxopt(name):
    jaxopt = pytest.importorskip("jaxopt", reason="the extra [ecosystem] installs it")
    solver = jaxopt.OptaxSolver(squared_distance, OPTIMIZERS[name](), maxiter=4)
    assert squared_distance(solver.run(jnp.zeros(2)).params) < squared_distance(jnp.zeros(2))


@each_optimizer
def test_haiku(name):
    haiku = pytest.importorskip("haiku", reason="the extra [ecosystem] installs it")
    model = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([4, 1])(x)))
    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    params, tx = model.init(jax.random.key(0), x), OPTIMIZERS[name]()

    def loss(params):
        return jnp.mean((model.apply(params, x) - x) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = loss(params), tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < first


@each_optimizer
def test_equinox(name):
    eqx = pytest.importorskip("equinox")
    model, tx = eqx.nn.MLP("scalar", "scalar", 8, 1, key=jax.random.key(0)), OPTIMIZERS[name]()
    x = jnp.linspace(-1, 1, 8)

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean((jax.vmap(model)(x) - x) ** 2)

    @eqx.filter_jit
    def step(model, state, tx):
        value, gradients = loss(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for _ in range(20):
        model, state, value = step(model, state, tx)
        losses.append(float(value))
    assert min(losses[1:]) < losses[0]

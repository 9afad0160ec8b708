"""Hyperparameters in the state: which are, what is read, and what it costs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from injected import LABELS, ONES, PARAMS, SEEN, SGD, halving, unannotated, value
from saving import same, spec, through_bytes, through_orbax
from tolerances import OPTAX, REFERENCE

import adaptive_optax as ao

GRADIENTS = [
    jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape).astype(np.float32), PARAMS)
    for rng in map(np.random.default_rng, range(3))
]


# --- In place of the factory itself -------------------------------------------------------------------------


ADAM = "learning_rate b1 b2 eps eps_root"
RMSPROP = "learning_rate decay eps initial_scale"

# name: (factory, arguments, the hyperparameters that are in the state)
FACTORIES = {
    "adam": (ao.adam, {"learning_rate": 0.1}, ADAM),
    "adam, variants": (
        ao.adam,
        {"learning_rate": 0.1, "nesterov": True, "amsgrad": True, "granularity": "tensor"},
        ADAM,
    ),
    "adamw": (ao.adamw, {"learning_rate": 0.1, "mask": {"a": True, "b": False}}, ADAM + " weight_decay"),
    "adamw, schedule": (
        ao.adamw,
        {"learning_rate": 0.1, "decay_coupling": "schedule", "decay_schedule": 0.5},
        ADAM + " weight_decay decay_schedule",
    ),
    "rmsprop": (ao.rmsprop, {"learning_rate": 0.1, "centered": True, "momentum": 0.9}, RMSPROP + " momentum"),
    "global_rmsprop": (ao.global_rmsprop, {"learning_rate": 0.1, "eps_in_sqrt": False}, RMSPROP),
    "sgd": (ao.sgd, {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}, "learning_rate momentum"),
    "sgd, none": (ao.sgd, {"learning_rate": 0.1}, "learning_rate"),
    "scale_by_adam": (ao.scale_by_adam, {"eps_root": 1e-3}, "b1 b2 eps eps_root"),
    "scale_by_rms": (ao.scale_by_rms, {"bias_correction": True}, "decay eps initial_scale"),
    "scale_by_global_rms": (ao.scale_by_global_rms, {"decay": 0.5}, "decay eps initial_scale"),
    "trace": (ao.trace, {"decay": 0.9}, "decay"),
    "clip_by_global_norm": (ao.clip_by_global_norm, {"max_norm": 1}, "max_norm"),
    "add_decoupled_weight_decay": (ao.add_decoupled_weight_decay, {"weight_decay": 0.1}, "weight_decay"),
    "average_parameters": (ao.average_parameters, {}, "power"),
    "scale_by_learning_rate": (ao.scale_by_learning_rate, {"learning_rate": 0.1}, "learning_rate"),
    "stochastic_rounding": (ao.stochastic_rounding, {"seed": 3}, ""),
    "optax.adam": (optax.adam, {"learning_rate": 0.1}, ADAM),
    "optax.adamw": (optax.adamw, {"learning_rate": 0.1}, ADAM + " weight_decay"),
    "optax.sgd": (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}, "learning_rate momentum"),
    "optax.lion": (optax.lion, {"learning_rate": 0.1}, "learning_rate b1 b2 weight_decay"),
    "optax.adafactor": (
        optax.adafactor,
        {"learning_rate": 0.1},
        "learning_rate decay_rate decay_offset clipping_threshold eps",
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_it_gives_what_the_factory_gives_with_float32_scalars(name):
    factory, arguments, names = FACTORIES[name]
    bound = inspect.signature(factory).bind(**arguments)
    bound.apply_defaults()
    numbers = {key: jnp.float32(bound.arguments[key]) for key in names.split()}
    if "decay_offset" in numbers:  # a count, whose default is an integer
        numbers["decay_offset"] = jnp.int32(0)
    injected, plain = (
        ao.inject_hyperparams(factory)(**arguments),
        optax.with_extra_args_support(factory(**(arguments | numbers))),
    )
    state, expected_state = injected.init(PARAMS), plain.init(PARAMS)
    assert isinstance(state, ao.InjectHyperparamsState)
    for g in GRADIENTS:
        same(state.hyperparams, numbers)
        same(state.inner_state, expected_state)
        updates, state = injected.update(g, state, PARAMS)
        expected, expected_state = plain.update(g, expected_state, PARAMS)
        same(updates, expected)
    assert state.count == 3 and not any(state.overridden.values())


def test_the_signatures_are_those_that_were():
    ours, theirs = (inspect.signature(f.inject_hyperparams).parameters.values() for f in (ao, optax))
    assert [(p.kind, p.default) for p in ours][:2] == [(p.kind, p.default) for p in theirs][:2]
    assert [p.name for p in ours][1:] == [p.name for p in theirs][1:]
    for factory in (ao.adamw, optax.adam):
        wrapped = ao.inject_hyperparams(factory)
        assert inspect.signature(wrapped) == inspect.signature(factory)
        assert wrapped.__name__ == factory.__name__
        positional, named = wrapped(0.1, 0.8), wrapped(b1=0.8, learning_rate=0.1)
        same(positional.init(PARAMS), named.init(PARAMS))


def test_extra_arguments_pass_through():
    def factory(learning_rate: float):
        def update(updates, state, params=None, *, value, **extra_args):
            return jax.tree.map(lambda u: learning_rate * value * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    tx = ao.inject_hyperparams(factory)(0.5)
    for dtype in (jnp.float32, jnp.bfloat16):  # of which the latter is tried at init, without the argument
        params = jnp.ones(2, dtype)
        updates, _ = tx.update(params, tx.init(params), value=jnp.float32(3.0), another=object())
        assert updates.tolist() == [1.5, 1.5]
    plain = ao.inject_hyperparams(optax.sgd)(0.5)
    same(plain.update(ONES, plain.init(ONES), value=1)[0], jax.tree.map(lambda x: jnp.asarray(-x / 2), ONES))


# --- float32 whatever the parameters are --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("adam", [ao.adam, optax.adam], ids=["ao", "optax"])
def test_values_are_float32_scalars(adam, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    params = jnp.ones(3, dtype)
    tx = ao.inject_hyperparams(adam)(np.float64(0.1), b1=halving, b2=jnp.float32(0.999), eps=1)
    state = tx.init(params)
    for _ in range(2):
        assert all(
            x.dtype == jnp.float32 and x.shape == () and not x.weak_type
            for values in (state.hyperparams, state.given)
            for x in values.values()
        )
        _, state = tx.update(params, state, params)
    assert value(state, "b2") == np.float32(0.999)


def test_hyperparam_dtype(x64):
    tx = ao.inject_hyperparams(ao.sgd, hyperparam_dtype=jnp.float64)(0.1, momentum=halving)
    updates, state = tx.update(ONES, tx.init(ONES))
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype("float64")}
    assert state.hyperparams["learning_rate"] == 0.1 and updates["b"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", [optax.adam, optax.adamw, optax.amsgrad, optax.rmsprop, optax.lion])
def test_optax_on_low_precision_parameters(optimizer, dtype):
    # With b2 = 1, which 0.999 is in bfloat16, Adam divides 0 by 0; with eps = 0, which 1e-8 is in float16, a
    # zero gradient does. And a state made in the parameters' dtype is no carry.
    tx, params = ao.inject_hyperparams(optimizer)(1e-3), jnp.ones(3, dtype)
    state = tx.init(params)

    @jax.jit
    def trained(state, gradients):
        return jax.lax.scan(lambda state, g: tx.update(g, state, params)[::-1], state, gradients)

    gradients = jnp.zeros((60, 3), dtype).at[20:40].set(0.5)
    end, updates = trained(state, gradients)
    assert spec(end) == spec(state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((end, updates)))
    assert np.all(updates[20:40] < 0)
    if optimizer is optax.adam:
        # With b2 = 1 it would be 0. optax keeps nu in the parameters' dtype: hence the tolerance.
        expected = 0.25 * (1 - 0.999**20) * 0.999**20
        nu = end.inner_state[0].nu.astype(np.float32)
        np.testing.assert_allclose(nu, np.full(3, expected), rtol=REFERENCE["bfloat16"])


# --- Which callables are schedules --------------------------------------------------------------------------


RATE = {"learning_rate": 0.1}
SCHEDULES = {
    "learning_rate": (ao.adam, {}, "learning_rate"),
    "b1": (ao.adam, RATE, "b1"),
    "b2": (ao.adam, RATE | {"b1": 0.0}, "b2"),
    "eps": (ao.adam, RATE, "eps"),
    "weight_decay": (ao.adamw, RATE, "weight_decay"),
    "decay_schedule": (ao.adamw, RATE | {"decay_coupling": "schedule"}, "decay_schedule"),
    "momentum, whose default is None": (ao.sgd, RATE, "momentum"),
    "decay": (ao.rmsprop, RATE, "decay"),
    # A number alone to the factory: the injection makes a schedule of it.
    "eps_root": (ao.adam, RATE, "eps_root"),
    "max_norm": (ao.clip_by_global_norm, {}, "max_norm"),
    "power": (ao.average_parameters, {}, "power"),
    "optax.sgd": (optax.sgd, {}, "learning_rate"),
    "optax.sgd, momentum": (optax.sgd, RATE, "momentum"),
    # The annotation of their masks can be resolved by type checkers only.
    "optax.adamw": (optax.adamw, {}, "learning_rate"),
    "optax.adamw, weight_decay": (optax.adamw, RATE, "weight_decay"),
    "optax.lion": (optax.lion, {}, "learning_rate"),
    "optax.adafactor": (optax.adafactor, {}, "learning_rate"),
    "partial": (functools.partial(ao.sgd, momentum=0.9), {}, "learning_rate"),
    "partial, momentum": (functools.partial(ao.sgd, 0.1), {}, "momentum"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    factory, arguments, key = SCHEDULES[name]
    tx = ao.inject_hyperparams(factory)(**arguments, **{key: halving})
    state = tx.init(PARAMS)
    assert state.hyperparams[key] == halving(0)  # before the first step those of the first step
    plain = optax.with_extra_args_support(factory(**arguments, **{key: jnp.float32(halving(0))}))
    updates, state = tx.update(ONES, state, PARAMS)
    expected, _ = plain.update(ONES, plain.init(PARAMS), PARAMS)
    # The other numbers are float32 scalars in the one and Python's in the other.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=OPTAX["float32"]), updates, expected)
    for t in range(3):
        assert state.hyperparams[key] == state.given[key] == halving(t)
        _, state = tx.update(ONES, state, PARAMS)


def annotated(
    rate: optax.ScalarOrSchedule,
    steps: int,
    either: float | int = 1,
    whole: int | None = None,
    function: Callable | None = None,
    eps: float | None = None,
    flag: bool = False,
):
    SEEN.update(locals())
    return optax.identity()


def quoted(
    rate: "optax.ScalarOrSchedule",
    unknown: "NoSuchName | None" = None,  # noqa: F821 (unresolvable: that is tested)
    eps: "float | None" = None,
    steps: "int" = 3,
    broken: "1 +" = None,  # noqa: F722 (no expression: that is tested)
    attribute: "optax.no_such_name" = None,
):
    SEEN.update(locals())
    return optax.identity()


def anything(rate: float, **others: Any):
    SEEN.update(locals())
    return optax.identity()


class Callables:
    def __call__(self, rate: float | Callable, function=None):
        SEEN.update(rate=rate, function=function)
        return optax.identity()


# name: (factory, static_args, arguments, what is in the state)
RULE = {
    "no default": (unannotated, (), {"rate": halving}, "scale power"),
    "a default": (unannotated, (), {"rate": 0.1, "scale": halving, "power": halving}, "rate scale power"),
    "numbers": (
        unannotated,
        (),
        {"rate": 1, "scale": np.float64(2.0), "power": np.int32(3)},
        "rate scale power",
    ),
    "no numbers": (
        unannotated,
        (),
        {"rate": True, "scale": "1.0", "power": None, "flag": np.bool_(True), "function": halving},
        "",
    ),
    "arrays": (
        unannotated,
        (),
        {"rate": np.float32(0.5), "scale": np.ones(1), "power": np.ones((2, 3))},
        "rate",
    ),
    "annotated": (
        annotated,
        (),
        {"rate": halving, "steps": 3, "either": 2, "whole": 5, "function": halving, "eps": 1e-8},
        "rate either eps",
    ),
    "annotated, others": (annotated, (), {"rate": 1, "steps": halving, "either": halving}, "rate either"),
    "strings": (
        quoted,
        (),
        {"rate": halving, "unknown": halving, "eps": halving, "broken": halving, "attribute": halving},
        "rate eps",
    ),
    "static_args": (unannotated, ("scale", "rate"), {"rate": 0.5, "scale": halving, "power": 2}, "power"),
    "one static_arg": (annotated, "rate", {"rate": halving, "steps": 1}, "either"),
    "keywords": (anything, (), {"rate": halving, "b1": 0.5, "flag": True, "name": "x"}, "rate b1"),
    "static keywords": (anything, ["b1"], {"rate": halving, "b1": 0.5, "b2": 0.5}, "rate b2"),
    "partial": (
        functools.partial(unannotated, function=halving),
        (),
        {"rate": 0.5, "scale": halving},
        "rate scale power",
    ),
    "a callable object": (Callables(), (), {"rate": halving, "function": halving}, "rate"),
}


@pytest.mark.parametrize("name", RULE)
def test_the_rule(name):
    factory, static_args, arguments, names = RULE[name]
    SEEN.clear()
    state = ao.inject_hyperparams(factory, static_args)(**arguments).init(PARAMS)
    assert set(state.hyperparams) == set(names.split())
    for key, given in arguments.items():
        seen = SEEN[key] if key in SEEN else SEEN["others"][key]
        if key in state.hyperparams:
            number = given(0) if callable(given) else given
            assert isinstance(seen, jax.Array) and seen == np.float32(number) == state.hyperparams[key]
        else:
            assert seen is given


def test_masks_labels_and_dtypes_are_no_schedules():
    def matrices(tree):
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    for factory, arguments in (
        (ao.adamw, {"weight_decay": 0.5, "mask": matrices}),
        (optax.adamw, {"weight_decay": 0.5, "mask": matrices}),
        (ao.adam, {"granularity": ao.Labels(lambda path, leaf: path), "mu_dtype": jnp.bfloat16}),
        (optax.adam, {"mu_dtype": jnp.bfloat16}),
        (optax.sgd, {"momentum": 0.5, "accumulator_dtype": jnp.bfloat16}),
        (ao.sgd, {"momentum": 0.5, "accumulator_dtype": jnp.bfloat16}),
    ):
        tx, plain = ao.inject_hyperparams(factory)(0.5, **arguments), factory(jnp.float32(0.5), **arguments)
        state = tx.init(PARAMS)
        assert not {"mask", "granularity", "mu_dtype", "accumulator_dtype"} & state.hyperparams.keys()
        assert spec(state.inner_state)[0] == spec(plain.init(PARAMS))[0]
        low = {x.dtype for x in jax.tree.leaves(state)} & {jnp.dtype("bfloat16")}
        assert bool(low) == any("dtype" in name for name in arguments)
        if "mask" in arguments:
            updates, _ = tx.update(jax.tree.map(np.zeros_like, ONES), state, ONES)
            assert np.all(updates["a"] == -0.25) and not np.any(updates["b"])


# --- What it costs ------------------------------------------------------------------------------------------


def test_a_sweep_costs_one_compilation():
    tx, traces = ao.inject_hyperparams(ao.adamw)(halving), []

    @jax.jit
    def step(state, gradients):
        traces.append(1)
        return tx.update(gradients, state, PARAMS)

    start = tx.init(PARAMS)
    _, once = step(start, GRADIENTS[0])
    for name, values in {
        "learning_rate": np.geomspace(1e-4, 1.0, 100),
        "b1": np.linspace(0.0, 0.99, 100),
        "b2": np.linspace(0.99, 0.9999, 100),
        "eps": np.geomspace(1e-8, 1.0, 100),
        "weight_decay": np.linspace(0.0, 1.0, 100),
    }.items():
        results = []
        for x in values:
            updates, state = step(ao.set_hyperparams(once, **{name: x}), GRADIENTS[1])
            assert state.hyperparams[name] == np.float32(x)
            results.append(updates["a"][0, 0].item())
        assert len(set(results)) > 80  # each has its own effect
        assigned = once._replace(hyperparams=once.hyperparams | {name: jnp.float32(values[-1])})
        same(step(assigned, GRADIENTS[1])[0], updates)
    step(ao.set_hyperparams(state, learning_rate=None, weight_decay=None), GRADIENTS[2])
    assert len(traces) == 1


def test_a_vmap_over_values_equals_separate_runs():
    values = {"learning_rate": [0.1, 0.01, 0.5], "b1": [0.9, 0.5, 0.0], "weight_decay": [0.0, 0.1, 0.5]}
    tx = ao.inject_hyperparams(ao.adamw)(1.0)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    state = ao.set_hyperparams(state, **values)
    step = jax.jit(jax.vmap(lambda g, state: tx.update(g, state, PARAMS), in_axes=(None, 0)))
    singles = [
        ao.adamw(**{name: jnp.float32(x[member]) for name, x in values.items()}) for member in range(3)
    ]
    states = [single.init(PARAMS) for single in singles]
    for g in GRADIENTS:
        updates, state = step(g, state)
        for member, single in enumerate(singles):
            expected, states[member] = single.update(g, states[member], PARAMS)
            for path in PARAMS:
                # The fusions of a compiled step round otherwise than single operations.
                np.testing.assert_allclose(updates[path][member], expected[path], rtol=1e-5, atol=1e-7)


# --- Reading ------------------------------------------------------------------------------------------------


def user_adam(learning_rate: optax.ScalarOrSchedule):
    return optax.chain(ao.scale_by_adam(0.5, 0.75, 0.25), ao.scale_by_learning_rate(learning_rate))


READING = {
    "injected values hide inner ones": (
        lambda: ao.inject_hyperparams(ao.adam)(halving),
        "learning_rate b1 b2 eps eps_root",
    ),
    "a schedule is one learning rate": (lambda: ao.inject_hyperparams(optax.sgd)(halving), "learning_rate"),
    "inner ones that are not injected": (
        lambda: ao.inject_hyperparams(user_adam)(halving),
        "learning_rate b1 b2 eps",
    ),
    "static ones stay inner ones": (
        lambda: ao.inject_hyperparams(ao.adam, ("b1", "learning_rate"))(halving),
        "learning_rate b1 b2 eps eps_root",
    ),
    "beside others": (
        lambda: optax.chain(ao.inject_hyperparams(optax.scale_by_adam)(), ao.sgd(0.1, momentum=0.9)),
        "b1 b2 eps eps_root momentum learning_rate",
    ),
    "several": (
        lambda: optax.chain(ao.inject_hyperparams(ao.trace)(0.5), ao.inject_hyperparams(ao.scale_by_rms)()),
        "0/decay momentum 1/decay eps initial_scale",
    ),
    "in a partition": (
        lambda: optax.partition(
            {"head": ao.inject_hyperparams(optax.lion)(0.1), "body": ao.adam(0.1)}, LABELS
        ),
        "head/learning_rate body/learning_rate head/b1 body/b1 head/b2 body/b2 weight_decay eps",
    ),
    "injected twice": (
        lambda: ao.inject_hyperparams(lambda b1=0.5: ao.inject_hyperparams(ao.adam)(0.1, b1))(),
        "b1 learning_rate b2 eps eps_root",
    ),
}


@pytest.mark.parametrize("name", READING)
def test_what_is_read(name):
    build, keys = READING[name]
    state = build().init(PARAMS)
    assert sorted(ao.get_hyperparams(state)) == sorted(keys.split())
    _, state = build().update(ONES, state, PARAMS)
    assert sorted(ao.get_hyperparams(state)) == sorted(keys.split())


# --- Carried, donated and restored --------------------------------------------------------------------------


def test_a_scan_carries_it_and_what_was_set():
    tx = ao.inject_hyperparams(ao.adamw)(halving, b1=halving)
    state = ao.set_hyperparams(tx.init(PARAMS), b1=0.75)
    assert spec(state) == spec(tx.init(PARAMS))

    @jax.jit
    def trained(state):
        def body(state, _):
            _, state = tx.update(ONES, state, PARAMS)
            return state, ao.get_hyperparams(state)

        return jax.lax.scan(body, state, length=4)

    end, used = trained(state)
    assert spec(end) == spec(state)
    assert used["learning_rate"].tolist() == [halving(t) for t in range(4)]
    assert used["b1"].tolist() == [0.75] * 4


@pytest.mark.parametrize("build", [*SGD.values()], ids=SGD)
def test_the_state_can_be_donated_and_takes_nobodys_array_along(build):
    rate, new = jnp.float32(0.5), jnp.float32(0.25)
    params = jax.tree.map(jnp.array, ONES)
    tx = build(rate)
    step = jax.jit(lambda g, state: tx.update(g, state)[1], donate_argnums=1)
    for state in (tx.init(params), ao.set_hyperparams(tx.init(params), learning_rate=new)):
        for _ in range(2):
            given = jax.tree.leaves(state)
            state = step(params, state)
            assert given[0].is_deleted()  # what a step does not read, XLA leaves
        state = ao.set_hyperparams(state, learning_rate=None)
        state = step(params, state)
        assert value(state) == 0.5
    assert (rate, new) == (0.5, 0.25) and not any(x.is_deleted() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("through", [through_bytes, through_orbax], ids=["flax", "orbax"])
def test_a_restored_run_goes_on_bit_for_bit(through, tmp_path):
    tx = optax.chain(ao.inject_hyperparams(ao.adam)(halving, b2=0.99), ao.sgd(halving))
    step = jax.jit(lambda g, state: tx.update(g, state, PARAMS)[1])

    def run(state):
        states = []
        for g in GRADIENTS:
            state = step(g, state)
            states.append(state)
        return states

    fresh = tx.init(PARAMS)
    half = ao.set_hyperparams(
        run(fresh)[-1], **{"0/learning_rate": 0.25, "1/learning_rate": 0.5, "b1": 0.5, "eps": 0.1}
    )
    half = ao.set_hyperparams(step(ONES, half), eps=None)
    half[0].hyperparams["b2"] = jnp.float32(0.75)  # assigned, and no step since
    restored = through(half, jax.tree.map(jnp.zeros_like, fresh), tmp_path)
    same(restored, half)
    same(run(restored), run(half))
    end = run(restored)[-1]
    assert [name for name, x in sorted(end[0].overridden.items()) if x] == ["b1", "b2", "learning_rate"]
    expected = {"0/learning_rate": 0.25, "1/learning_rate": 0.5, "b1": 0.5, "b2": 0.75, "eps": 1e-8}
    assert {name: value(end, name) for name in expected} == pytest.approx(expected)
    # The flags can be released from where they are.
    released = step(ONES, ao.set_hyperparams(restored, **dict.fromkeys(("0/learning_rate", "b1"))))
    assert value(released, "0/learning_rate") == halving(4) and value(released, "b1") == np.float32(0.9)

"""Optimizers: against references and optax's of the same name, weight decay, and the values they report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.adam import AdamReference
from reference.decay import RmspropReference, SgdReference, decoupled_step
from reference.moments import Pooling
from tolerances import OPTAX, REFERENCE
from trajectories import (
    FEW,
    GRANULARITIES,
    SHAPES,
    STEPS,
    Table,
    assert_close,
    at_step,
    decays,
    gradients,
    parameters,
    run,
    run_reference,
)

import adaptive_optax as ao

RATES = Table(tuple(2.0 ** np.random.default_rng(3).integers(-8, -2, STEPS)))
MOMENTA = decays(6, 60, 64)
SHAPE = Table(
    tuple(np.random.default_rng(4).integers(0, 65, STEPS) / 64)
)  # a schedule without its peak value
WEIGHT_DECAYS = Table(tuple(np.random.default_rng(5).integers(0, 65, STEPS) / 256))

# name: (factory, arguments of the library and the reference, arguments of the reference's other name)
DESCENT = {
    "sgd": (ao.sgd, {"learning_rate": 0.1}),
    "sgd, moving rate": (ao.sgd, {"learning_rate": RATES}),
    "sgd, momentum": (ao.sgd, {"learning_rate": RATES, "momentum": 0.9}),
    "sgd, nesterov": (ao.sgd, {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd, moving momentum": (ao.sgd, {"learning_rate": RATES, "momentum": MOMENTA}),
    "sgd, moving nesterov": (ao.sgd, {"learning_rate": 0.1, "momentum": MOMENTA, "nesterov": True}),
    "rmsprop": (ao.rmsprop, {"learning_rate": 0.1}),
    "rmsprop, momentum": (ao.rmsprop, {"learning_rate": RATES, "decay": 0.99, "momentum": 0.9}),
    "rmsprop, centered nesterov": (
        ao.rmsprop,
        {"learning_rate": 0.1, "centered": True, "momentum": 0.9, "nesterov": True},
    ),
    "rmsprop, beside": (
        ao.rmsprop,
        {"learning_rate": RATES, "eps": 1e-4, "eps_in_sqrt": False, "bias_correction": True},
    ),
    "rmsprop, initial scale": (
        ao.rmsprop,
        {"learning_rate": 0.1, "decay": 0.95, "initial_scale": 1.0, "momentum": 0.5},
    ),
    "rmsprop, moving": (
        ao.rmsprop,
        {"learning_rate": RATES, "decay": decays(7, 300, 1024), "momentum": MOMENTA, "nesterov": True},
    ),
    "rmsprop, labels": (ao.rmsprop, {"learning_rate": 0.1, "granularity": "labels", "momentum": 0.9}),
    "global_rmsprop": (ao.global_rmsprop, {"learning_rate": RATES}),
    "global_rmsprop, everything": (
        ao.global_rmsprop,
        {
            "learning_rate": RATES,
            "decay": 0.95,
            "eps": 1e-3,
            "initial_scale": 2.0,
            "eps_in_sqrt": False,
            "centered": True,
            "momentum": 0.9,
            "nesterov": True,
            "bias_correction": True,
        },
    ),
}

IN_OPTAX = [
    "sgd, moving rate",
    "sgd, momentum",
    "sgd, nesterov",
    "rmsprop",
    "rmsprop, momentum",
    "rmsprop, centered nesterov",
    "rmsprop, beside",
    "rmsprop, initial scale",
]


def with_granularity(arguments):
    named = arguments.get("granularity")
    return arguments | ({"granularity": GRANULARITIES[named][0]} if named else {})


def paths_of(arguments, factory=None):
    return SHAPES if "granularity" in arguments or factory is ao.global_rmsprop else FEW


@functools.cache
def computed(name, dtype, centered):
    factory, arguments = DESCENT[name]
    paths = paths_of(arguments, factory)
    tx = factory(**with_granularity(arguments))
    return run(tx, gradients(dtype, paths, centered=centered), parameters(dtype, paths))


# --- Gradient descent and RMSprop ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESCENT)
def test_descent_matches_the_reference(name, dtype):
    factory, arguments = DESCENT[name]
    paths, arguments = paths_of(arguments, factory), dict(arguments)
    if factory is ao.sgd:
        reference = SgdReference(**arguments)
    else:
        pooling = GRANULARITIES[arguments.pop("granularity", "coordinate")][1]
        pooling = Pooling("global") if factory is ao.global_rmsprop else pooling
        reference = RmspropReference(**arguments, pooling=pooling)
    expected = run_reference(reference, gradients("float64", paths))
    terms = expected if "momentum" in arguments else None
    assert_close(computed(name, dtype, False).updates, expected, REFERENCE[dtype], terms=terms)


@pytest.mark.parametrize("name", IN_OPTAX)
def test_descent_matches_optax(name, dtype):
    factory, arguments = DESCENT[name]
    centered = (
        "centered" in name
    )  # optax centres without a floor: for gradients without a mean it is the same
    tx = {ao.sgd: optax.sgd, ao.rmsprop: optax.rmsprop}[factory](**arguments)
    theirs = run(tx, gradients(dtype, FEW, centered=centered), parameters(dtype, FEW))
    ours = computed(name, dtype, centered)
    terms = theirs.updates if "momentum" in arguments else None
    assert_close(ours.updates, theirs.updates, OPTAX[dtype], terms=terms)


def test_momentum_may_be_kept_in_bfloat16():
    grads, params = gradients("float32", ["head/kernel"]), parameters("float32", ["head/kernel"])
    states = run(ao.sgd(0.1, 0.9, accumulator_dtype="bfloat16"), grads, params).states
    exact = run(ao.sgd(0.1, 0.9), grads, params).states
    low, high = states[0].trace["head/kernel"], exact[0].trace["head/kernel"]
    assert low.dtype == jnp.bfloat16 and high.dtype == np.float32
    largest = np.abs(high).max()
    assert 0 < np.abs(np.float32(low) - high).max() < REFERENCE["bfloat16"] * largest


# --- Adam and weight decay ----------------------------------------------------------------------------------

MASK = {"body/attention": False, "head/kernel": True}

ADAMW = {
    "adam": (ao.adam, {"learning_rate": 0.01}, {}),
    "adam, moving rate": (ao.adam, {"learning_rate": RATES}, {"b1": 0.8, "b2": 0.99, "nesterov": True}),
    "adam, global": (ao.adam, {"learning_rate": RATES}, {"granularity": "global", "amsgrad": True}),
    "adamw": (ao.adamw, {"learning_rate": 0.01, "weight_decay": 0.25}, {}),
    "adamw, moving": (
        ao.adamw,
        {"learning_rate": RATES, "weight_decay": WEIGHT_DECAYS, "mask": MASK},
        {"b1": 0.8, "eps": 1e-4, "eps_form": "tensorflow"},
    ),
    "adamw, schedule": (
        ao.adamw,
        {
            "learning_rate": RATES,
            "weight_decay": 0.25,
            "decay_coupling": "schedule",
            "decay_schedule": SHAPE,
            "mask": MASK,
        },
        {},
    ),
    "adamw, schedule, moving": (
        ao.adamw,
        {
            "learning_rate": 0.01,
            "weight_decay": WEIGHT_DECAYS,
            "decay_coupling": "schedule",
            "decay_schedule": SHAPE,
        },
        {"bias_correction": False},
    ),
    "adamw, independent": (
        ao.adamw,
        {
            "learning_rate": RATES,
            "weight_decay": 0.0625,
            "decay_coupling": "independent",
            "mask": lambda _: MASK,
        },
        {},
    ),
    "adamw, independent, moving": (
        ao.adamw,
        {"learning_rate": 0.01, "weight_decay": WEIGHT_DECAYS, "decay_coupling": "independent"},
        {"granularity": "tensor"},
    ),
}


def value(hyperparameter, t):
    return float(hyperparameter(t)) if callable(hyperparameter) else hyperparameter


@pytest.mark.parametrize("name", ADAMW)
def test_adam_and_adamw_match_the_reference(name, dtype):
    factory, arguments, keywords = ADAMW[name]
    paths = paths_of(keywords)
    tx = factory(**arguments, **with_granularity(keywords))
    result = run(tx, gradients(dtype, paths), parameters(dtype, paths))
    keywords = dict(keywords)
    pooling = GRANULARITIES[keywords.pop("granularity", "coordinate")][1]
    directions = run_reference(AdamReference(**keywords, pooling=pooling), gradients("float64", paths))
    mask = arguments.get("mask")
    expected, terms = [], []
    for t in range(STEPS):
        step = functools.partial(
            decoupled_step,
            coupling=arguments.get("decay_coupling", "learning_rate"),
            learning_rate=value(arguments["learning_rate"], t),
            weight_decay=value(arguments.get("weight_decay", 0.0), t),
            multiplier=value(arguments.get("decay_schedule", 1.0), t),
            mask=mask(None) if callable(mask) else mask,
        )
        # From this step's own parameters, and the two parts apart: so only the step's rounding is seen.
        params, u = at_step(result.params, t), at_step(directions, t)
        zeros = jax.tree.map(np.zeros_like, u)
        moved, shrunk = step(zeros, u), step(params, zeros)
        shrunk = {path: shrunk[path] - params[path] for path in params}
        expected.append({path: moved[path] + shrunk[path] for path in params})
        terms.append({path: np.abs(moved[path]) + np.abs(shrunk[path]) for path in params})
    expected, terms = (
        {path: np.stack([x[path] for x in parts]) for path in paths} for parts in (expected, terms)
    )
    assert_close(result.updates, expected, REFERENCE[dtype], terms=terms)


OPTAX_ADAMS = {
    "adam": (ao.adam, optax.adam, {"learning_rate": 0.01}, {}),
    "nadam": (ao.adam, optax.nadam, {"learning_rate": RATES, "b1": 0.8}, {"nesterov": True}),
    "amsgrad": (ao.adam, optax.amsgrad, {"learning_rate": RATES}, {"amsgrad": True}),
    "adamw": (ao.adamw, optax.adamw, {"learning_rate": RATES, "weight_decay": 0.25, "mask": MASK}, {}),
    "nadamw": (
        ao.adamw,
        optax.nadamw,
        {"learning_rate": 0.01, "eps": 1e-4, "eps_root": 1e-6, "mask": lambda _: MASK},
        {"nesterov": True},
    ),
}


@pytest.mark.parametrize("name", OPTAX_ADAMS)
def test_adams_match_optax(name, dtype):
    factory, theirs, arguments, keywords = OPTAX_ADAMS[name]
    grads, params = gradients(dtype, FEW), parameters(dtype, FEW)
    ours = run(factory(**arguments, **keywords), grads, params)
    theirs = run(theirs(**arguments), grads, params)
    assert_close(ours.updates, theirs.updates, OPTAX[dtype], terms=theirs.updates)
    assert_close(ours.params, theirs.params, OPTAX[dtype], terms=theirs.params)


def test_positional_arguments_are_optaxs():
    grads, params = gradients("float32", FEW, steps=5), parameters("float32", FEW)
    for ours, theirs, positions in (
        (ao.adam, optax.adam, (0.1, 0.8, 0.98, 1e-3, 1e-4, None)),
        (ao.adamw, optax.adamw, (0.1, 0.8, 0.98, 1e-3, 1e-4, None, 0.25, MASK)),
        (ao.rmsprop, optax.rmsprop, (0.1, 0.95, 1e-3, 0.5, False, False, 0.5, True, False)),
        (ao.sgd, optax.sgd, (0.1, 0.5, True, None)),
    ):
        result, expected = (run(tx(*positions), grads, params).updates for tx in (ours, theirs))
        assert_close(result, expected, OPTAX["float32"], terms=expected)
    positions = (0.1, 0.95, 1e-3, 0.5, False, True, 0.5, True, True)
    expected = run_reference(RmspropReference(*positions, pooling=Pooling("global")), grads)
    result = run(ao.global_rmsprop(*positions), grads, params).updates
    assert_close(result, expected, REFERENCE["float32"], terms=expected)


NESTED = {"body": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("mask", "decaying"),  # of body/bias, body/kernel, head/kernel
    [
        (None, [1, 1, 1]),
        ({"body": {"bias": False, "kernel": True}, "head": {"kernel": False}}, [0, 1, 0]),
        ({"body": False, "head": True}, [0, 0, 1]),
        ({"body": {"bias": False, "kernel": True}, "head": True}, [0, 1, 1]),
        (True, [1, 1, 1]),
        (False, [0, 0, 0]),
        (lambda params: jax.tree.map(lambda p: p.ndim > 1, params), [0, 1, 0]),
        (lambda params: {"body": True, "head": False}, [1, 1, 0]),
    ],
)
@pytest.mark.parametrize("coupling", ["learning_rate", "schedule", "independent"])
def test_masks(mask, decaying, coupling):
    schedule = {"schedule": 1.0} if coupling == "schedule" else {}
    tx = ao.add_decoupled_weight_decay(0.5, coupling=coupling, mask=mask, **schedule)
    updates = jax.tree.map(lambda p: 0 * p + 3, NESTED)
    result, _ = tx.update(updates, tx.init(NESTED), NESTED)
    sign = 1 if coupling == "learning_rate" else -1
    for leaf, decays_ in zip(jax.tree.leaves(result), decaying, strict=True):
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, 3 + sign * 0.5 * decays_))
    theirs = optax.add_decayed_weights(sign * 0.5, mask)
    other, _ = theirs.update(updates, theirs.init(NESTED), NESTED)
    jax.tree.map(np.testing.assert_array_equal, result, other)


@pytest.mark.parametrize("weight_decay", [0.25, WEIGHT_DECAYS])
@pytest.mark.parametrize("rate", [0.125, RATES])
@pytest.mark.parametrize("coupling", ["learning_rate", "schedule", "independent"])
def test_without_gradients_the_parameters_shrink_by_a_product(coupling, rate, weight_decay, dtype):
    # theta_T = theta_0 prod_t (1 - fraction_t lambda_t), the fraction being the rate, the schedule or 1.
    fraction = {"learning_rate": rate, "schedule": SHAPE, "independent": 1.0}[coupling]
    schedule = {"decay_schedule": SHAPE} if coupling == "schedule" else {}
    tx = ao.adamw(rate, weight_decay=weight_decay, decay_coupling=coupling, **schedule)
    start = np.array([2.0, -3.0, 0.0], dtype)
    steps = 30
    params = run(tx, np.zeros((steps, 3), dtype), start).params
    factors = [1 - value(fraction, t) * value(weight_decay, t) for t in range(steps - 1)]
    products = np.concatenate([[1.0], np.cumprod(factors)])
    np.testing.assert_allclose(params, np.outer(products, start), rtol=REFERENCE[dtype])


# --- The values that were used ------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": ao.adam,
    "adamw": ao.adamw,
    "adamw, schedule": functools.partial(ao.adamw, decay_coupling="schedule", decay_schedule=SHAPE),
    "adamw, independent": functools.partial(ao.adamw, decay_coupling="independent"),
    "rmsprop": ao.rmsprop,
    "rmsprop, momentum": functools.partial(ao.rmsprop, centered=True, momentum=0.875),
    "global_rmsprop": ao.global_rmsprop,
    "sgd": ao.sgd,
    "sgd, momentum": functools.partial(ao.sgd, momentum=0.875),
}


@pytest.mark.parametrize("rate", [0.0625, np.float64(0.0625), jnp.float32(0.0625), RATES], ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_learning_rate_of_the_last_step_is_reported(name, rate):
    tx = OPTIMIZERS[name](rate)
    params = jnp.ones(2)
    state = tx.init(params)
    assert ao.get_hyperparams(state)["learning_rate"] == value(rate, 0)  # of the first step, before it
    for t in range(4):
        _, state = tx.update(params, state, params)
        reported = ao.get_hyperparams(state)["learning_rate"]
        assert reported == value(rate, t) and reported.dtype == jnp.float32 and not reported.weak_type


def test_all_moving_values_are_reported():
    state = run(
        ao.rmsprop(RATES, MOMENTA, EPS := Table(tuple(2.0 ** -np.arange(STEPS) / 8)), momentum=SHAPE),
        np.ones((9, 2), np.float32),
        np.ones(2, np.float32),
    ).states
    reported = ao.get_hyperparams(state)
    given = {"learning_rate": RATES, "decay": MOMENTA, "eps": EPS, "momentum": SHAPE}
    assert reported.keys() == given.keys()
    for name, table in given.items():
        np.testing.assert_array_equal(reported[name], np.float32(table.values[:9]), err_msg=name)
    state = ao.adamw(0.1, 0.5, 0.75, 0.25, weight_decay=0.125).init(jnp.ones(2))
    expected = {"b1": 0.5, "b2": 0.75, "eps": 0.25, "learning_rate": 0.1, "weight_decay": 0.125}
    assert {name: float(x) for name, x in ao.get_hyperparams(state).items()} == pytest.approx(expected)


def names_of(tx):
    return {
        name: float(x)
        for name, x in ao.get_hyperparams(tx.init({"a": jnp.ones(2), "b": jnp.ones(3)})).items()
    }


def test_a_name_that_occurs_twice_has_its_place_before_it():
    twice = optax.chain(ao.scale_by_rms(0.5, 0.25), ao.clip_by_global_norm(1.0), ao.scale_by_rms(0.75, 0.125))
    assert names_of(twice) == {"0/decay": 0.5, "0/eps": 0.25, "2/decay": 0.75, "2/eps": 0.125}
    # Only what occurs twice is told apart.
    mixed = optax.chain(ao.trace(0.5), ao.sgd(0.25, momentum=0.75))
    assert names_of(mixed) == {"0/momentum": 0.5, "1/momentum": 0.75, "learning_rate": 0.25}


@pytest.mark.parametrize("labels", [{"a": "slow", "b": "fast"}, lambda tree: {"a": "slow", "b": "fast"}])
def test_labels_of_a_partition_tell_names_apart(labels):
    tx = optax.partition({"slow": ao.sgd(0.25), "fast": ao.adam(0.5, b1=0.75, b2=0.875, eps=0.125)}, labels)
    expected = {"slow/learning_rate": 0.25, "fast/learning_rate": 0.5, "b1": 0.75, "b2": 0.875, "eps": 0.125}
    assert names_of(tx) == expected
    assert names_of(optax.chain(ao.trace(0.5), tx)) == expected | {"momentum": 0.5}


def test_places_stay_different_at_any_depth():
    inner = optax.chain(ao.scale_by_rms(0.5), optax.chain(ao.scale_by_rms(0.625), ao.scale_by_rms(0.75)))
    tx = optax.chain(inner, optax.partition({"x": ao.scale_by_rms(0.875), "y": inner}, {"a": "x", "b": "y"}))
    reported = names_of(tx)
    assert sorted(x for name, x in reported.items() if name.endswith("decay")) == sorted(
        [0.5, 0.625, 0.75, 0.875, 0.5, 0.625, 0.75]
    )

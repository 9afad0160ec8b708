"""Adam's state from and to optax: a run that changes libraries ends where one that stays does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adam_runs import (
    GRADIENTS,
    INT8,
    LOW,
    PARAMS,
    PARTS,
    SWITCH,
    THERE,
    TWO_HERE,
    assert_close,
    counts,
    is_adam,
    label,
    moments_by_path,
    rate,
    run,
    train,
)
from saving import spec
from tolerances import OPTAX

import adaptive_optax as ao

RTOL = OPTAX["float32"]


def kernels(params):
    """The mask of what decays."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def adam_of(state):
    """The state of this library's Adam, or optax's, inside another."""
    kinds = ao.ScaleByAdamState, optax.ScaleByAdamState, optax.ScaleByAmsgradState
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    (found,) = (leaf for leaf in leaves if isinstance(leaf, kinds))
    return found


# --- optax, both ways ---------------------------------------------------------------------------------------


# name: (optax's, the same of this library)
PAIRS = {
    "adam": (optax.adam(0.05), ao.adam(0.05)),
    "other decays": (optax.adam(0.05, b1=0.8, b2=0.95), ao.adam(0.05, b1=0.8, b2=0.95)),
    "nesterov": (optax.nadam(0.05), ao.adam(0.05, nesterov=True)),
    "adamw": (optax.adamw(0.05, weight_decay=0.1), ao.adamw(0.05, weight_decay=0.1)),
    "adamw, schedule": (optax.adamw(rate, weight_decay=0.1), ao.adamw(rate, weight_decay=0.1)),
    "adamw, mask": (
        optax.adamw(rate, weight_decay=0.1, mask=kernels),
        ao.adamw(rate, weight_decay=0.1, mask=kernels),
    ),
    "amsgrad": (optax.amsgrad(0.05), ao.adam(0.05, amsgrad=True)),
    "amsgrad, schedule": (optax.amsgrad(rate), ao.adam(rate, amsgrad=True)),
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        optax.chain(ao.clip_by_global_norm(1.0), ao.adam(rate)),
    ),
    "a schedule of optax": (
        optax.adam(rate),
        optax.chain(ao.scale_by_adam(), optax.scale_by_learning_rate(rate)),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(0.05),
        ao.inject_hyperparams(ao.adam)(0.05),
    ),
    "inject_hyperparams, schedule": (
        optax.inject_hyperparams(optax.adam)(rate),
        ao.inject_hyperparams(ao.adam)(rate),
    ),
    "optax's inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(rate),
        optax.inject_hyperparams(ao.adam, static_args=("mu_storage", "nu_storage", "granularity"))(rate),
    ),
    "partition": (
        optax.partition({"wide": optax.adamw(rate), "rest": optax.adam(0.01, b1=0.5)}, label),
        optax.partition({"wide": ao.adamw(rate), "rest": ao.adam(0.01, b1=0.5)}, label),
    ),
}
each_pair = pytest.mark.parametrize("name", PAIRS)


@each_pair
def test_from_optax_the_run_goes_on(name):
    theirs, ours = PAIRS[name]
    expected, _ = train(theirs)
    params, state = train(theirs, SWITCH)
    converted = ao.from_optax(state, ours, params)
    assert spec(converted) == spec(ours.init(params))
    params, _ = run(ours, params, converted, GRADIENTS[SWITCH:])
    assert_close(params, expected, RTOL, atol=1e-6)  # some pass through 0; a step is 0.05


@each_pair
def test_to_optax_the_run_goes_on(name):
    theirs, ours = PAIRS[name]
    expected, _ = train(ours)
    params, state = train(ours, SWITCH)
    converted = ao.to_optax(state, theirs, params)
    assert spec(converted) == spec(theirs.init(params))
    params, _ = run(theirs, params, converted, GRADIENTS[SWITCH:])
    assert_close(params, expected, RTOL, atol=1e-6)  # some pass through 0; a step is 0.05


WITHOUT_TX = {"adam", "other decays", "nesterov", "adamw", "amsgrad"}


@pytest.mark.parametrize("name", sorted(WITHOUT_TX))
def test_to_optax_makes_the_same_chain_without_tx(name):
    theirs, ours = PAIRS[name]
    expected, _ = train(ours)
    params, state = train(ours, SWITCH)
    converted = ao.to_optax(state)
    assert spec(converted) == spec(theirs.init(params))
    params, _ = run(theirs, params, converted, GRADIENTS[SWITCH:])
    assert_close(params, expected, RTOL, atol=1e-6)  # some pass through 0; a step is 0.05


@each_pair
def test_there_and_back_is_the_identity(name):
    theirs, ours = PAIRS[name]
    params, state = train(theirs, SWITCH)
    back = ao.to_optax(ao.from_optax(state, ours, params), theirs, params)
    if "inject" in name:  # the values of the last step, which are computed anew in the next one
        state, back = state.inner_state, back.inner_state
    assert_close(back, state, 0)


@each_pair
def test_back_and_there_keeps_the_moments(name):
    theirs, ours = PAIRS[name]
    params, state = train(ours, SWITCH)
    back = ao.from_optax(ao.to_optax(state, theirs, params), ours, params)
    moments = [
        [(s.count, s.mu, s.nu, s.nu_max) for s in jax.tree.leaves(tree, is_leaf=is_adam) if is_adam(s)]
        for tree in (back, state)
    ]
    assert_close(*moments, 0)


@pytest.mark.parametrize("name", ["adam", "other decays", "amsgrad"])
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_the_sums_of_weights_and_the_bound_are_those_of_a_run_that_was_always_here(name, steps):
    theirs, ours = PAIRS[name]
    _, state = train(theirs, steps)
    converted = adam_of(ao.from_optax(state, ours, PARAMS))
    _, here = train(ours, steps)
    for field in ("count", "mu_weight", "nu_weight", "bound_sq"):
        actual, expected = getattr(converted, field), getattr(adam_of(here), field)
        assert actual.dtype == expected.dtype and (expected > 0) == (steps > 0)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, err_msg=field)


def test_decays_without_a_bound_convert():
    with pytest.warns(UserWarning, match="has no bound"):
        ours = ao.adam(0.05, b1=0.9, b2=0.5)
    state = optax.adam(0.05, b1=0.9, b2=0.5).init(PARAMS)
    converted = ao.from_optax((state[0]._replace(count=jnp.asarray(5000)), state[1]), ours, PARAMS)
    assert converted[0].bound_sq == jnp.finfo(jnp.float32).max


# (mu_storage, nu_storage, largest error relative to the value and to the largest in its block)
STORAGES = {
    "float32": ("float32", "float32", 0, 0),
    "bfloat16": ("bfloat16", "bfloat16", 2**-7, 0),
    # Second moments are at most 15/64 of the value apart; first moments are off by half a code, which is at
    # most a 127th of the largest beside 0 and, with a curvature of 24 octaves, 24/127 of the value above.
    "int8": (INT8, INT8, 15 / 64, 1 / 127),
    "both": (INT8, "bfloat16", 24 / 127, 1 / 127),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_into_every_storage_within_a_level(storage, mu_dtype):
    mu_storage, nu_storage, rtol, of_largest = STORAGES[storage]
    theirs = optax.amsgrad(rate, mu_dtype=mu_dtype)
    params, state = train(theirs, SWITCH)
    tx = ao.adam(rate, amsgrad=True, mu_storage=mu_storage, nu_storage=nu_storage)
    converted = ao.from_optax(state, tx, params)
    assert spec(converted) == spec(tx.init(params))  # int8 headers stay uint16 from bfloat16 moments
    for field in ("mu", "nu", "nu_max"):
        kept, given = ao.dense(getattr(converted[0], field)), getattr(state[0], field)
        for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(given), strict=True):
            y = y.astype(jnp.float32)
            np.testing.assert_allclose(x, y, rtol=rtol, atol=of_largest * float(jnp.abs(y).max()))
    _, after = jax.eval_shape(tx.update, GRADIENTS[0], converted, params)
    assert spec(after) == spec(converted)


@pytest.mark.parametrize("storage", LOW)
def test_out_of_every_storage_exactly(storage):
    params, state = train(LOW[storage], SWITCH)
    for theirs in (ao.to_optax(state), ao.to_optax(state, optax.adam(0.05), params)):
        assert spec(theirs) == spec(optax.adam(0.05).init(params))
        for field in ("mu", "nu"):
            assert_close(getattr(theirs[0], field), ao.dense(getattr(state[0], field)), 0)
    low = ao.to_optax(state, optax.adam(0.05, mu_dtype=jnp.bfloat16), params)
    assert {x.dtype for x in jax.tree.leaves(low[0].mu)} == {jnp.dtype(jnp.bfloat16)}


def test_a_count_is_that_of_the_schedules_too():
    params, state = train(ao.adamw(rate), SWITCH)
    theirs = optax.adamw(rate, mask=kernels)
    assert [int(x) for x in counts(ao.to_optax(state, theirs, params))] == [SWITCH] * 2
    tx = ao.inject_hyperparams(ao.adamw)(rate)
    converted = ao.from_optax(ao.to_optax(state), tx, params)
    assert [int(x) for x in counts(converted)] == [SWITCH] * 2  # of the wrapper and of Adam


# --- Refusals -----------------------------------------------------------------------------------------------


HERE = ao.adam(0.1).init(PARAMS)
TWO = optax.partition({"wide": optax.adam(0.1), "rest": optax.adam(0.1)}, label)
FEWER = {"bias": PARAMS["bias"]}
RESHAPED = PARAMS | {"bias": jnp.ones(4)}


def uneven():
    """Two of optax's Adam states, one a step ahead."""
    inner = dict(TWO.init(PARAMS).inner_states)
    masked = inner["wide"]
    adam, *others = masked.inner_state
    inner["wide"] = masked._replace(inner_state=(adam._replace(count=adam.count + 1), *others))
    return TWO.init(PARAMS)._replace(inner_states=inner)


REFUSALS = {
    "from no Adam of optax's": (
        lambda: ao.from_optax(optax.sgd(0.1).init(PARAMS), ao.adam(0.1), PARAMS),
        "from_optax: opt_state must hold a state of optax's Adam, got a tuple.",
    ),
    "from this library's": (
        lambda: ao.from_optax(HERE, ao.adam(0.1), PARAMS),
        "from_optax: opt_state must hold a state of optax's Adam, got a tuple.",
    ),
    "into no Adam": (
        lambda: ao.from_optax(THERE, ao.sgd(0.1), PARAMS),
        "from_optax: got 1 Adam states for the 0 of tx.",
    ),
    "two into one": (
        lambda: ao.from_optax(TWO.init(PARAMS), ao.adam(0.1), PARAMS),
        "from_optax: got 2 Adam states for the 1 of tx.",
    ),
    "different counts": (
        lambda: ao.from_optax(uneven(), TWO_HERE, PARAMS),
        "from_optax: the counts of the Adam states must be the same, got [0, 1].",
    ),
    "into a moment a tensor": (
        lambda: ao.from_optax(THERE, ao.adam(0.1, granularity="tensor"), PARAMS),
        "from_optax needs second moments per coordinate: granularity='coordinate'.",
    ),
    "into one moment": (
        lambda: ao.from_optax(THERE, ao.adam(0.1, granularity="global"), PARAMS),
        "from_optax needs second moments per coordinate: granularity='coordinate'.",
    ),
    "amsgrad into none": (
        lambda: ao.from_optax(optax.amsgrad(0.1).init(PARAMS), ao.adam(0.1), PARAMS),
        "from_optax: amsgrad must be the same in the state and in tx.",
    ),
    "into amsgrad": (
        lambda: ao.from_optax(THERE, ao.adam(0.1, amsgrad=True), PARAMS),
        "from_optax: amsgrad must be the same in the state and in tx.",
    ),
    "other parameters": (
        lambda: ao.from_optax(THERE, ao.adam(0.1), FEWER),
        "from_optax: the leaf 'kernel' of the moment is not in params.",
    ),
    "other shapes": (
        lambda: ao.from_optax(THERE, ao.adam(0.1), RESHAPED),
        "from_optax: 'bias' has shape (3,) in the moment and (4,) in params.",
    ),
    "to optax from optax's": (
        lambda: ao.to_optax(THERE),
        "to_optax: opt_state must hold a state of scale_by_adam, got a tuple.",
    ),
    "to optax from a moment a tensor": (
        lambda: ao.to_optax(ao.adam(0.1, granularity="tensor").init(PARAMS)),
        "to_optax needs second moments per coordinate: granularity='coordinate'.",
    ),
    "to optax without parameters": (
        lambda: ao.to_optax(HERE, optax.adam(0.1)),
        "to_optax needs params= with tx=, to initialise the state of tx.",
    ),
    "to optax, two": (
        lambda: ao.to_optax(HERE, TWO, PARAMS),
        "to_optax: opt_state has 1 Adam states, the state of tx 2.",
    ),
    "to optax's amsgrad": (
        lambda: ao.to_optax(HERE, optax.amsgrad(0.1), PARAMS),
        "to_optax: amsgrad must be the same in opt_state and tx.",
    ),
    "to optax, other parameters": (
        lambda: ao.to_optax(HERE, optax.adam(0.1), FEWER),
        "to_optax: the leaf 'kernel' of opt_state is not in the state of tx.",
    ),
    "to optax, other shapes": (
        lambda: ao.to_optax(HERE, optax.adam(0.1), RESHAPED),
        "to_optax: 'bias' has shape (3,) in opt_state and (4,) in the state of tx.",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_does_not_fit_is_refused(kind):
    build, sentence = REFUSALS[kind]
    with pytest.raises(ValueError) as raised:
        build()
    assert str(raised.value) == sentence


@pytest.mark.parametrize("kind", PARTS)
def test_one_adam_of_optaxs_goes_into_groups_and_beside_frozen_leaves(kind):
    theirs, tx = optax.adam(rate), PARTS[kind]()
    params, state = run(theirs, PARAMS, theirs.init(PARAMS), GRADIENTS[:SWITCH])
    converted = ao.from_optax(state, tx, params)
    assert spec(converted) == spec(tx.init(params))
    ours, expected = moments_by_path(converted), state[0]
    kept = set(PARAMS) - ({"kernel"} if "frozen" in kind else set())
    assert ours.keys() == {(name, path) for name in ("mu", "nu") for path in kept}
    for (name, path), x in ours.items():
        np.testing.assert_array_equal(x, getattr(expected, name)[path])
    moved, _ = run(tx, params, converted, GRADIENTS[SWITCH:])
    expected, _ = run(theirs, params, state, GRADIENTS[SWITCH:])
    assert_close({path: moved[path] for path in kept}, {path: expected[path] for path in kept}, RTOL)


# --- What else optax keeps in such a state ------------------------------------------------------------------


def after(tx, steps=5, scale=1.0):
    state = tx.init(PARAMS)
    for g in GRADIENTS[:steps]:
        _, state = tx.update(jax.tree.map(lambda x: scale * x, g), state, PARAMS)
    return state


def test_adamaxs_infinity_norm_is_no_second_moment():
    for scale in (1e-3, 0.1, 1.0):
        state = after(optax.adamax(0.1), scale=scale)
        with pytest.raises(ValueError, match="like the infinity norm of Adamax.*trusted=True"):
            ao.from_optax(state, ao.adam(0.1), PARAMS)
        assert int(ao.from_optax(state, ao.adam(0.1), PARAMS, trusted=True)[0].count) == 5
        ao.from_optax(after(optax.adam(0.1), scale=scale), ao.adam(0.1), PARAMS)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nu": lambda x: -x}, "'nu/bias' is negative"),
        ({"nu": lambda x: x + jnp.nan}, "'nu/bias' is not finite"),
        ({"mu": lambda x: x / 0}, "'mu/bias' is not finite"),
        ({"mu": lambda x: x + 1j}, "'mu/bias' is complex64 for float32"),
        ({"nu": jnp.sum}, "'bias' has shape () in the second moment and (3,) in params"),
        ({"count": lambda x: x - 9}, "the count must be an integer in [0, 2147483647]"),
        ({"count": lambda x: x + 0.5}, "the count must be an integer in [0, 2147483647]"),
        ({"count": lambda x: jnp.stack([x, x])}, "the count must be an integer in [0, 2147483647]"),
        ({"count": lambda x: 0 * x}, "'mu/bias' is not zero after 0 steps"),
    ],
)
def test_values_that_no_adam_of_optaxs_has_are_refused(changes, sentence):
    adam, *others = after(optax.adam(0.1))
    changed = {field: jax.tree.map(f, getattr(adam, field)) for field, f in changes.items()}
    with pytest.raises(ValueError) as raised:
        ao.from_optax((adam._replace(**changed), *others), ao.adam(0.1), PARAMS)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("name", ["lion", "adabelief", "rmsprop", "novograd", "adadelta", "adagrad"])
def test_other_optimizers_of_optaxs_are_refused(name):
    with pytest.raises(ValueError, match="must hold a state of optax's Adam"):
        ao.from_optax(after(getattr(optax, name)(0.1)), ao.adam(0.1), PARAMS)


def test_the_midst_of_accumulation_is_refused():
    theirs = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    ours = optax.MultiSteps(ao.adam(0.1), 2).gradient_transformation()
    with pytest.raises(ValueError, match="in the middle of a step"):
        ao.from_optax(after(theirs, 3), ours, PARAMS)
    assert int(ao.from_optax(after(theirs, 4), ours, PARAMS).inner_opt_state[0].count) == 2

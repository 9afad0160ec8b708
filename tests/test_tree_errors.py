"""Trees and states that are refused, and the sentence that says so: the leaf, its value, what is accepted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lossy import Lossy
from refusals import SCHEDULED, TREE, ones, refused, schedule

import adaptive_optax as ao


def tree_with(leaf):
    """`TREE` with another leaf at "layer/steps", or without it for None."""
    layer = {"w": TREE["layer"]["w"]} | ({} if leaf is None else {"steps": leaf})
    return {"layer": layer, "bias": TREE["bias"]}


TRANSFORMS = {
    "scale_by_adam": ao.scale_by_adam,
    "scale_by_rms": ao.scale_by_rms,
    "trace": lambda: ao.trace(0.9),
    "scale_by_learning_rate": lambda: ao.scale_by_learning_rate(0.1),
    "add_decoupled_weight_decay": lambda: ao.add_decoupled_weight_decay(0.1),
    "clip_by_global_norm": lambda: ao.clip_by_global_norm(1.0),
}
FIRST_LINK = {
    "adam": (lambda: ao.adam(0.1), "scale_by_adam"),
    "adamw": (lambda: ao.adamw(0.1), "scale_by_adam"),
    "rmsprop": (lambda: ao.rmsprop(0.1), "scale_by_rms"),
    "global_rmsprop": (lambda: ao.global_rmsprop(0.1), "scale_by_rms"),
    "sgd": (lambda: ao.sgd(0.1), "scale_by_learning_rate"),
    "sgd, momentum": (lambda: ao.sgd(0.1, 0.9), "trace"),
}


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize(
    ("build", "owner"),
    [*((build, name) for name, build in TRANSFORMS.items()), *FIRST_LINK.values()],
    ids=[*TRANSFORMS, *FIRST_LINK],
)
def test_leaves_that_are_not_floating_are_named(build, owner, dtype):
    tx, wrong = build(), tree_with(ones(2, dtype=dtype))
    sentence = f"{owner}: the leaf 'layer/steps' of {{}} must be a floating or complex array, got {dtype} ("
    refused(lambda: tx.init(wrong), sentence.format("params"))
    state = tx.init(TREE)
    refused(lambda: tx.update(wrong, state, TREE), sentence.format("updates"))
    refused(lambda: jax.eval_shape(tx.update, wrong, state, TREE), sentence.format("updates"))


@pytest.mark.parametrize(
    ("leaf", "kind"), [(ones(2, dtype=np.int32), "int32"), ("name", "str"), (3, "int32")]
)
def test_leaves_that_are_no_arrays_are_named(leaf, kind):
    for name, call in (
        ("tree", ao.global_norm),
        ("params", ao.adam(0.1).init),
        ("params", ao.adamw(0.1).init),
    ):
        refused(
            lambda call=call: call(tree_with(leaf)),
            f"of {name} must be a floating or complex array, got {kind} (",
        )


NO_ARRAYS = {
    "a function": (jax.nn.relu, "custom_jvp"),
    "a lambda": (lambda x: x, "function"),
    "an activation": (jax.nn.silu, "PjitFunction"),
    "an object": (object(), "object"),
    "strings in an array": (np.array(["a", "b"]), "ndarray"),
    "objects in an array": (np.array([None, 1], object), "ndarray"),
    "a dtype": (np.dtype("float32"), ""),
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_leaves_without_a_dtype_are_named_and_equinox_users_told_what_to_do(kind):
    leaf, name = NO_ARRAYS[kind]
    for build, owner in [*((f, n) for n, f in TRANSFORMS.items()), *FIRST_LINK.values()]:
        refused(
            lambda build=build: build().init(tree_with(leaf)),
            f"{owner}: the leaf 'layer/steps' of params must be a floating or complex array, got {name}",
            "(for an Equinox model, pass eqx.filter(model, eqx.is_inexact_array)).",
        )


@pytest.mark.parametrize("leaf", [jax.random.key(0), np.zeros(2, jax.dtypes.float0)], ids=["key", "float0"])
def test_leaves_of_other_dtypes_are_named(leaf):
    refused(
        lambda: ao.sgd(0.1).init(tree_with(leaf)),
        "the leaf 'layer/steps' of params must be a floating or complex",
    )


EVERY = TRANSFORMS | {
    "reduce_on_plateau": ao.reduce_on_plateau,
    "average_parameters": ao.average_parameters,
    "adgd": ao.adgd,
    "stochastic_rounding": ao.stochastic_rounding,
    "kahan_summation": lambda: ao.kahan_summation(ao.sgd(0.1)),
    "master_weights": lambda: ao.master_weights(ao.sgd(0.1)),
    "telemetry": lambda: ao.telemetry(ao.sgd(0.1)),
    "accumulate_gradients": lambda: ao.accumulate_gradients(ao.sgd(0.1), 1),
}
NO_GRADIENTS = {
    "nothing": (None, "of params is not in updates."),
    "an empty tree": ({}, "of params is not in updates."),
    "None for a leaf": (TREE | {"bias": None}, "the leaf 'bias' of params is not in updates."),
    "another leaf": (TREE | {"scale": ones(1)}, "the leaf 'scale' of updates is not in params."),
    "another shape": (TREE | {"bias": ones(3)}, "'bias' has shape (3,) in updates and (2,) in params."),
    "a complex one": (
        TREE | {"bias": ones(2, dtype=np.complex64)},
        "the leaf 'bias' is complex64 in updates and float32 in params; take the real part.",
    ),
}


@pytest.mark.parametrize("kind", NO_GRADIENTS)
@pytest.mark.parametrize("name", EVERY)
def test_gradients_unlike_the_parameters_are_refused_by_all(name, kind):
    wrong, sentence = NO_GRADIENTS[kind]
    tx = EVERY[name]()
    state = jax.eval_shape(tx.init, TREE)
    refused(lambda: jax.eval_shape(tx.update, wrong, state, TREE, value=1.0), f"{name}: ", sentence)


@pytest.mark.parametrize("build", [ao.scale_by_adam, lambda: ao.trace(0.9)], ids=["scale_by_adam", "trace"])
def test_complex_gradients_of_real_parameters_are_refused_without_the_parameters_too(build):
    tx = build()
    wrong = TREE | {"bias": ones(2, dtype=np.complex64)}
    refused(lambda: tx.update(wrong, tx.init(TREE)), "/bias' is float32[2] in the state and complex64[2]")


def test_leaves_of_the_parameters_that_are_no_parameters_have_no_gradient():
    params = TREE | {"activation": jax.nn.relu, "steps": np.int32(3)}
    tx = ao.adamw(0.1)
    updates, _ = tx.update(TREE | {"activation": None, "steps": None}, tx.init(TREE), TREE)
    for transformation in (ao.adam(0.1), ao.sgd(0.1)):
        again, _ = transformation.update(TREE, transformation.init(TREE), params)
        assert jax.tree.structure(again) == jax.tree.structure(TREE)
    assert updates["bias"].shape == (2,)


SHAPE = "'layer/steps' has shape {shape} in {{ours}} and (2,) in {{theirs}}."
ANOTHER_TREE = {
    "missing": (tree_with(None), "the leaf 'layer/steps' of {theirs} is not in {ours}."),
    "extra": (TREE | {"scale": ones(1)}, "the leaf 'scale' of {ours} is not in {theirs}."),
    "longer": (tree_with(ones(3)), SHAPE.format(shape="(3,)")),
    "shorter": (tree_with(ones(1)), SHAPE.format(shape="(1,)")),
    "another rank": (tree_with(ones(2, 1)), SHAPE.format(shape="(2, 1)")),
}
each_tree = pytest.mark.parametrize("kind", ANOTHER_TREE)
COMPARED = {  # what the updates are compared with, without parameters if possible
    "scale_by_adam": (ao.scale_by_adam, "the state"),
    "scale_by_adam, global": (lambda: ao.scale_by_adam(granularity="global"), "the state"),
    "scale_by_rms": (ao.scale_by_rms, "the state"),
    "scale_by_rms, centred": (lambda: ao.scale_by_rms(centered=True, granularity="tensor"), "the state"),
    "trace": (lambda: ao.trace(0.9), "the state"),
    "add_decoupled_weight_decay": (lambda: ao.add_decoupled_weight_decay(0.1), "params"),
}


@each_tree
@pytest.mark.parametrize("name", COMPARED)
def test_another_tree_is_named(name, kind):
    build, theirs = COMPARED[name]
    wrong, sentence = ANOTHER_TREE[kind]
    tx = build()
    state = tx.init(TREE)
    owner = name.split(",")[0] + ": "
    fragments = [owner + sentence.format(ours="updates", theirs=theirs)]
    if name == "scale_by_rms" and "has shape" in sentence:  # the state alone cannot tell
        shape = list(np.shape(wrong["layer"]["steps"]))
        fragments = [
            owner,
            f"'nu/layer/steps' is float32[2] in the state and float32{shape} here.",
            "It was made with another granularity, or for other updates.",
        ]
    refused(lambda: jax.eval_shape(tx.update, wrong, state, TREE if theirs == "params" else None), *fragments)
    if theirs == "params" and "and (2,)" not in sentence:
        refused(
            lambda: jax.eval_shape(tx.update, TREE, state, wrong),
            owner + sentence.format(ours="params", theirs="updates"),
        )


@each_tree
@pytest.mark.parametrize(
    "granularity",
    ["coordinate", ao.Axis(0), "tensor", ao.Labels(lambda path, leaf: path), "global"],
    ids=["coordinate", "axis", "tensor", "labels", "global"],
)
def test_a_tree_unlike_the_parameters_is_named_whatever_is_shared(granularity, kind):
    wrong, sentence = ANOTHER_TREE[kind]
    tx = ao.scale_by_rms(granularity=granularity)
    state = tx.init(TREE)
    refused(
        lambda: jax.eval_shape(tx.update, wrong, state, TREE),
        "scale_by_rms: " + sentence.format(ours="updates", theirs="params"),
    )


STATEFUL = [name for name in TRANSFORMS if name != "clip_by_global_norm"]


@pytest.mark.parametrize("name", STATEFUL)
def test_another_transformations_state(name):
    tx, another = TRANSFORMS[name](), TRANSFORMS[STATEFUL[STATEFUL.index(name) - 1]]()
    right, state = type(tx.init(TREE)).__name__, another.init(TREE)
    for wrong in (state, (), dict(tx.init(TREE)._asdict())):
        refused(
            lambda wrong=wrong: tx.update(TREE, wrong, TREE),
            f"{name}: the state must be a ",
            f"{right}, got a ",
            type(wrong).__name__,
        )


GRANULARITIES = {
    "coordinate": "coordinate",
    "axis 0": ao.Axis(0),
    "axis -1": ao.Axis(-1),
    "tensor": "tensor",
    "labels": ao.Labels(lambda path, leaf: path),
    "global": "global",
    "by path": ao.ByPath({"w": ao.Axis(0)}, default="tensor"),
}
STORAGES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": ao.Int8(block_size=32, min_size=1),
    "int8, longer blocks": ao.Int8(block_size=64, min_size=1),
    "int8, none compressed": ao.Int8(block_size=32, min_size=10**6),
    "lossy": Lossy(),
}
WIDE = {"b": ones(3), "w": ones(2, 128)}
WITH_MOMENTS = {
    "scale_by_adam": (ao.scale_by_adam, "nu_storage"),
    "scale_by_rms": (ao.scale_by_rms, "storage"),
}
each_with_moments = pytest.mark.parametrize("owner", WITH_MOMENTS)


def restored(state):
    """The state as `flax.serialization` gives it back: with NumPy arrays."""
    return jax.tree.map(np.asarray, state)


def refused_and_right_for(made_by, tx, tree, *fragments):
    """Asserts that the state of `made_by` is refused by `tx`, traced or not, and not by itself."""
    state = restored(made_by.init(tree))
    refused(lambda: tx.update(tree, state, tree), *fragments)
    refused(lambda: jax.eval_shape(tx.update, tree, state, tree), *fragments)
    jax.eval_shape(made_by.update, tree, state, tree)


@each_with_moments
@pytest.mark.parametrize(("made", "here"), list(itertools.permutations(GRANULARITIES, 2)))
def test_a_state_of_another_granularity(owner, made, here):
    factory, _ = WITH_MOMENTS[owner]
    refused_and_right_for(
        factory(granularity=GRANULARITIES[made]),
        factory(granularity=GRANULARITIES[here]),
        {"b": ones(3), "w": ones(2, 3)},
        f"{owner}: the state does not fit this transformation and these updates: 'nu",
        " in the state and ",
        " here. It was made with another granularity",
        "Either build the transformation as it was when the state was made, or convert the state with",
    )


@each_with_moments
@pytest.mark.parametrize(("made", "here"), list(itertools.permutations(STORAGES, 2)))
def test_a_state_of_another_storage(owner, made, here):
    factory, argument = WITH_MOMENTS[owner]
    refused_and_right_for(
        factory(**{argument: STORAGES[made]}),
        factory(**{argument: STORAGES[here]}),
        WIDE,
        f"{owner}: the state does not fit this transformation and these updates: 'nu",
        f"It was made with another {argument}. Either build the transformation as it was",
        "or convert the state with convert_storage.",
    )


ANOTHER_SETTING = {
    "amsgrad": (ao.scale_by_adam, {"amsgrad": True}, "'nu_max' is "),
    "centered": (ao.scale_by_rms, {"centered": True}, "'mu' is "),
    "mu_storage": (ao.scale_by_adam, {"mu_storage": "bfloat16"}, "'mu/b' is "),
    "accumulator_dtype": (
        lambda **arguments: ao.trace(0.9, **arguments),
        {"accumulator_dtype": jnp.float16},
        "'trace/b' is ",
    ),
    "per": (
        lambda **arguments: ao.telemetry(ao.sgd(0.1), **arguments),
        {"per": "tensor"},
        "'values' is ",
    ),
}


@pytest.mark.parametrize("setting", ANOTHER_SETTING)
@pytest.mark.parametrize("granularity", ["coordinate", "global"])
def test_a_state_of_another_setting(setting, granularity):
    factory, arguments, place = ANOTHER_SETTING[setting]
    shared = {} if setting in ("accumulator_dtype", "per") else {"granularity": granularity}
    with_it, without = factory(**arguments, **shared), factory(**shared)
    for made_by, tx in ((with_it, without), (without, with_it)):
        refused_and_right_for(made_by, tx, WIDE, place, f"It was made with another {setting}")


LOW = {"b": jnp.ones(3, jnp.bfloat16), "w": jnp.ones((2, 3), jnp.bfloat16)}
OF_PARAMETERS = {
    "average_parameters": (lambda: ao.average_parameters(), LOW, LOW | {"w": jnp.ones((2, 4))}),
    "kahan_summation": (lambda: ao.kahan_summation(ao.sgd(0.1)), LOW, LOW | {"w": jnp.ones((2, 3))}),
    "master_weights": (lambda: ao.master_weights(ao.sgd(0.1)), LOW, LOW | {"w": jnp.ones((2, 3))}),
    "accumulate_gradients": (
        lambda: ao.accumulate_gradients(ao.sgd(0.1), 2),
        LOW,
        LOW | {"w": jnp.ones((2, 4))},
    ),
}


@pytest.mark.parametrize("owner", OF_PARAMETERS)
def test_a_state_of_other_parameters(owner):
    build, tree, other = OF_PARAMETERS[owner]
    tx = build()
    for made_for, given in ((tree, other), (other, tree)):
        state = tx.init(made_for)
        refused(lambda state=state, given=given: jax.eval_shape(tx.update, given, state, given), owner, "w'")
    state = build().init(tree)
    field = {"average_parameters": "average", "accumulate_gradients": "total"}.get(owner, state._fields[-1])
    without = state._replace(**{field: None})
    refused(lambda: jax.eval_shape(tx.update, tree, without, tree), f"{field!r} is missing in the state")


@pytest.mark.parametrize("name", ["scale_by_learning_rate", "trace", "add_decoupled_weight_decay"])
def test_a_state_of_a_number_for_a_schedule(name):
    build = SCHEDULED[
        "learning_rate" if "rate" in name else "momentum" if name == "trace" else "weight_decay"
    ]
    pair = build(0.5), build(schedule)
    for made_by, tx in (pair, pair[::-1]):
        refused_and_right_for(made_by, tx, WIDE, "'schedule_state'", "a number for a schedule, or vice versa")


def test_a_state_whose_scalars_are_not_scalars():
    tx = ao.sgd(0.1)
    several = jax.vmap(lambda _: tx.init(WIDE))(jnp.arange(3))
    refused(
        lambda: tx.update(WIDE, several, WIDE), "'scalars' is float32[3, 2] in the state and float32[2] here"
    )
    jax.vmap(tx.update, in_axes=(None, 0))(WIDE, several)


def test_a_state_in_float64_is_right_for_gradients_in_float32(x64):
    for tx in (ao.adamw(0.1, granularity=ao.Axis(0)), ao.rmsprop(0.1, momentum=0.9, centered=True)):
        wide = jax.tree.map(lambda x: x.astype(np.float64), WIDE)
        jax.eval_shape(tx.update, WIDE, tx.init(wide), wide)
        jax.eval_shape(tx.update, wide, tx.init(WIDE), WIDE)


@pytest.mark.parametrize("coupling", ["learning_rate", "schedule", "independent"])
def test_missing_params(coupling):
    factor = schedule if coupling == "schedule" else None
    tx = ao.add_decoupled_weight_decay(0.1, coupling=coupling, schedule=factor)
    chained = ao.adamw(0.1, decay_coupling=coupling, decay_schedule=factor)
    for transformation in (tx, chained):
        state = transformation.init(TREE)
        sentence = "add_decoupled_weight_decay needs the parameters: call update(updates, state, params)."
        refused(lambda t=transformation, s=state: jax.eval_shape(t.update, TREE, s), sentence)


@pytest.mark.parametrize("factory", [ao.scale_by_adam, ao.scale_by_rms], ids=lambda f: f.__name__)
def test_unhashable_labels_are_named(factory):
    labels = ao.Labels(lambda path, leaf: [path] if path == "layer/w" else path)
    refused(
        lambda: factory(granularity=labels).init(TREE),
        "label_fn must return a hashable label, got ['layer/w'] for the leaf 'layer/w'.",
    )


def test_patterns_without_a_leaf_are_named():
    build = ao.Labels.by_path
    wrong = build({"layer": 0, "^w": 1}, default=2)
    refused(
        lambda: ao.scale_by_rms(granularity=wrong).init(TREE),
        "The pattern '^w' matches no leaf; the leaves are bias, layer/steps, layer/w.",
    )
    # A pattern that matches leaves, all of which an earlier one takes, is none of these.
    assert ao.scale_by_rms(granularity=build({"layer": 0, "w$": 1})).init(TREE).nu.shape == (2,)


MASKS = {
    "another leaf": (
        {"bias": True, "layer": True, "head": False},
        "mask has a leaf 'head' that is not in params.",
    ),
    "below a leaf": ({"bias": {"x": True}, "layer": True}, "mask has a leaf 'bias/x' that is not in params."),
    "half a name": ({"bias": True, "lay": True}, "mask has a leaf 'lay' that is not in params."),
    "one missing": (
        {"bias": True, "layer": {"w": True}},
        "mask has no value for the leaf 'layer/steps' of params.",
    ),
    "None": ({"bias": None, "layer": False}, "mask has no value for the leaf 'bias' of params."),
    "nothing": ({}, "mask has no value for the leaf 'bias' of params."),
    "an integer": ({"bias": 1, "layer": True}, "mask must hold bools, got 1 at 'bias'."),
    "a float": (0.5, "mask must hold bools, got 0.5 at ''."),
    "a number array": (
        {"bias": np.int32(0), "layer": True},
        "mask must hold bools, got np.int32(0) at 'bias'.",
    ),
    "a string": ({"bias": "yes", "layer": True}, "mask must hold bools, got 'yes' at 'bias'."),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("as_function", [False, True], ids=["tree", "function"])
def test_masks_that_do_not_fit(kind, as_function):
    mask, sentence = MASKS[kind]
    given = (lambda params: mask) if as_function else mask
    refused(lambda: ao.add_decoupled_weight_decay(0.1, mask=given).init(TREE), sentence)
    refused(lambda: ao.adamw(0.1, mask=given).init(TREE), sentence)


def test_a_mask_may_speak_of_a_part_without_leaves():
    params = {"dense": ones(2), "dropout": {}, "block": {"pool": optax.EmptyState()}, "none": None}
    decay = ao.add_decoupled_weight_decay(0.1, mask=dict.fromkeys(params, True))
    masked = optax.chain(decay, ao.sgd(1.0))
    for tx in (masked, ao.freeze(ao.sgd(1.0), dict.fromkeys(params, False))):
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates["dense"].shape == (2,)


def test_masks_that_fit_half_of_another_tree():
    mask = {"bias": True, "layer": False}
    tx = ao.add_decoupled_weight_decay(0.1, mask=mask)
    state = tx.init(TREE)
    other = TREE | {"head": ones(1)}
    refused(lambda: jax.eval_shape(tx.update, other, state, other), "mask has no value for the leaf 'head'")

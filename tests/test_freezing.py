"""Frozen parameters: they stay, cost nothing, and no gradient of theirs has any effect."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from saving import same, through_bytes, through_orbax

import adaptive_optax as ao
from adaptive_optax._core.paths import paths_and_leaves

PARAMS = {
    "body": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.full((2, 2), -0.5), "bias": jnp.zeros(2)},
}
HEAD = {"head": PARAMS["head"]}
GRADIENTS = jax.tree.map(lambda x: x + 0.25, PARAMS)
HEAD_GRADIENTS = {"head": GRADIENTS["head"]}


def everything(**others):
    """What counts gradients, in all the ways in which frozen ones must not count."""
    return ao.reject_nonfinite(
        optax.chain(
            ao.clip_by_global_norm(1.0),
            ao.adamw(0.1, granularity="global", **others),
            ao.reduce_on_plateau(),
        )
    )


MASKS = {
    "pattern": "^body",
    "tree": {"body": {"kernel": True, "bias": True}, "head": {"kernel": False, "bias": False}},
    "prefix": {"body": True, "head": False},
    "function": lambda params: {"body": True, "head": {"kernel": False, "bias": False}},
    "numpy": {"body": np.True_, "head": np.False_},
}


@pytest.mark.parametrize("name", MASKS)
def test_the_others_go_as_if_there_were_no_frozen_ones(name):
    tx, alone = ao.freeze(ao.telemetry(everything()), MASKS[name]), ao.telemetry(everything())
    params, state, few, few_state = PARAMS, tx.init(PARAMS), HEAD, alone.init(HEAD)
    for step, bad in enumerate((0.0, np.nan, 1e30, np.inf)):
        gradients = GRADIENTS | {"body": jax.tree.map(lambda x, bad=bad: x + bad, GRADIENTS["body"])}
        updates, state = jax.jit(tx.update)(gradients, state, params, value=1.0)
        expected, few_state = jax.jit(alone.update)(HEAD_GRADIENTS, few_state, few, value=1.0)
        same(updates["head"], expected["head"])
        assert not any(jnp.any(u) for u in jax.tree.leaves(updates["body"]))
        params, few = optax.apply_updates(params, updates), optax.apply_updates(few, expected)
        assert ao.get_rejections(state).total == 0 and ao.get_telemetry(state).count == step + 1
    same(params["body"], PARAMS["body"])
    assert ao.state_bytes(state) == ao.state_bytes(few_state)
    same(jax.tree.leaves(state), jax.tree.leaves(few_state))


def test_frozen_leaves_are_hidden_as_masked_hides_them():
    tx = ao.freeze(ao.scale_by_adam(), "^body")
    state = tx.init(PARAMS)
    trained = jax.tree.map(lambda frozen: not frozen, MASKS["tree"])
    masked = optax.masked(ao.scale_by_adam(), trained).init(PARAMS)
    assert isinstance(state, ao.FreezeState)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(masked.inner_state)
    assert isinstance(state.inner_state.mu["body"]["kernel"], optax.MaskedNode)


def test_updates_keep_shapes_and_are_wide():
    params = {"frozen": jnp.ones((2, 3), jnp.bfloat16), "c": jnp.ones(2, jnp.complex64), "w": jnp.ones(1)}
    tx = ao.freeze(ao.sgd(0.1), "frozen|c")
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["frozen"].shape, updates["frozen"].dtype) == ((2, 3), jnp.float32)
    assert updates["c"].dtype == jnp.complex64
    assert optax.apply_updates(params, updates)["frozen"].dtype == jnp.bfloat16


@pytest.mark.parametrize("missing", ["none", "absent", "float0", "integers"])
def test_frozen_gradients_need_not_be_computed(missing):
    params = {"steps": jnp.arange(3), "on": jnp.array(True), "w": jnp.ones(2)}
    gradients = {"w": jnp.ones(2)}
    gradients |= {
        "none": {"steps": None, "on": None},
        "absent": {},
        "float0": {"steps": np.zeros(3, jax.dtypes.float0), "on": np.zeros((), jax.dtypes.float0)},
        "integers": {"steps": jnp.ones(3, int), "on": jnp.array(True)},
    }[missing]
    tx = ao.freeze(everything(), "steps|on")
    state = tx.init(params)
    updates, state = tx.update(gradients, state, params, value=1.0)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["steps"].dtype == params["steps"].dtype and jnp.all(updates["w"] < 0)
    with jax.numpy_dtype_promotion("strict"):
        moved = optax.apply_updates(params, updates)
    same((moved["steps"], moved["on"]), (params["steps"], params["on"]))


@pytest.mark.parametrize("gradient", [None, np.zeros(3, jax.dtypes.float0), jnp.ones(3)], ids=str)
def test_without_params_the_gradients_say_what_there_is(gradient):
    params = {"frozen": jnp.arange(3), "w": jnp.ones(2)}
    tx = ao.freeze(ao.sgd(0.1), "frozen")
    updates, _ = tx.update({"frozen": gradient, "w": jnp.ones(2)}, tx.init(params))
    if gradient is None:
        assert updates["frozen"] is None
    else:
        same(optax.apply_updates(params, updates)["frozen"], params["frozen"])


def test_the_gradient_of_an_integer_leaf_as_jax_gives_it():
    params = {"steps": jnp.arange(3), "w": jnp.ones(2)}
    tx = ao.freeze(ao.adam(0.1), "steps")

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = step(params, tx.init(params))
    assert params["steps"].tolist() == [0, 1, 2] and jnp.all(params["w"] < 1)


def test_a_gradient_that_is_needed_and_missing_is_named():
    tx = ao.freeze(ao.sgd(0.1), "^body")
    gradients = GRADIENTS | {"head": {"kernel": GRADIENTS["head"]["kernel"], "bias": None}}
    with pytest.raises(ValueError, match="'head/bias' of params is not frozen and has no gradient"):
        tx.update(gradients, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("which", ["", lambda params: jax.tree.map(lambda _: True, params)])
def test_all_frozen(which):
    tx = ao.freeze(everything(), which)
    updates, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, value=1.0)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    assert ao.get_rejections(state).total == 0


def test_none_frozen():
    tx = ao.freeze(everything(), jax.tree.map(lambda _: False, PARAMS))
    actual = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, value=1.0)
    expected = everything().update(GRADIENTS, everything().init(PARAMS), PARAMS, value=1.0)
    same((actual[0], actual[1].inner_state), expected)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("tail", "The pattern 'tail' matches no leaf; the leaves are body/bias"),
        ({"body": True}, "mask has no value for the leaf 'head/bias'"),
        ({"body": True, "head": False, "tail": True}, "mask has a leaf 'tail'"),
        (lambda params: {"body": 1, "head": False}, "mask must hold bools, got 1 at 'body'"),
    ],
)
def test_what_does_not_fit_is_refused_at_init(which, message):
    with pytest.raises(ValueError, match=message):
        ao.freeze(ao.sgd(0.1), which).init(PARAMS)


@pytest.mark.parametrize(
    ("tx", "which", "message"),
    [
        (0.1, "body", "tx must be an optax.GradientTransformation, got 0.1"),
        (ao.sgd(0.1), "(", r"pattern_or_mask must be .*, got '\('"),
        (ao.sgd(0.1), {"body": 1.0}, "pattern_or_mask must be a regular expression, a tree of bools or a"),
        (ao.sgd(0.1), None, "pattern_or_mask must be"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(tx, which, message):
    with pytest.raises(ValueError, match=message):
        ao.freeze(tx, which)


# --- In its place -------------------------------------------------------------------------------------------


def test_in_a_chain_a_group_and_an_accumulation():
    alone, _ = ao.sgd(0.1).update(HEAD_GRADIENTS, ao.sgd(0.1).init(HEAD), HEAD)
    frozen = ao.freeze(optax.chain(ao.sgd(0.1)), "^body")
    for tx in (
        optax.chain(frozen, optax.scale(1.0)),
        ao.partition_by_path({"kernel": frozen, "bias": ao.freeze(ao.sgd(0.1), MASKS["prefix"])}),
        ao.accumulate_gradients(frozen, 1),
        ao.freeze(ao.accumulate_gradients(ao.sgd(0.1), 1, drop_nonfinite=True), "^body"),
        ao.freeze(ao.partition_by_path({"head": ao.sgd(0.1)}), "^body"),
        optax.MultiSteps(frozen, 1),
        ao.inject_hyperparams(lambda rate: ao.freeze(ao.sgd(rate), "^body"))(0.1),
    ):
        updates, _ = jax.jit(tx.update)(GRADIENTS, tx.init(PARAMS), PARAMS)
        jax.tree.map(np.testing.assert_allclose, updates["head"], alone["head"])
        assert not any(jnp.any(u) for u in jax.tree.leaves(updates["body"]))


def test_a_callable_module_of_bools_is_a_mask():
    model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    mask = eqx.tree_at(lambda m: m.bias, jax.tree.map(lambda _: False, model), True)
    gradients = jax.tree.map(jnp.ones_like, model)
    tx = ao.freeze(ao.sgd(0.1), mask)
    updates, _ = tx.update(gradients, tx.init(model), model)
    assert jnp.all(updates.bias == 0) and jnp.all(updates.weight != 0)
    decaying = ao.add_decoupled_weight_decay(0.5, mask=mask)
    updates, _ = decaying.update(gradients, decaying.init(model), model)
    assert jnp.all(updates.bias != 1) and jnp.all(updates.weight == 1)


def test_with_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.tanh(self.body(x)))

    x = jnp.ones((2, 3))

    def loss(model):
        return jnp.mean((model(x) - 1) ** 2)

    results = []
    for which in ("^body", lambda params: jax.tree.map(lambda _: True, params) | {"head": False}):
        model = Model(nnx.Rngs(0))
        before = nnx.to_pure_dict(nnx.state(model.body))
        wrt = nnx.Param
        optimizer = nnx.Optimizer(model, ao.freeze(everything(), which), wrt=wrt)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(loss)(model), value=1.0)

        for _ in range(3):
            step(model, optimizer)
        same(nnx.to_pure_dict(nnx.state(model.body)), before)
        results.append(nnx.to_pure_dict(nnx.state(model.head)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert ao.get_rejections(optimizer.opt_state).total == 0


def test_with_nnx_only_the_gradients_that_are_needed():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1)))
    paths = [path for path, _ in paths_and_leaves(nnx.state(model, nnx.Param))]
    first = paths[0].rpartition("/")[0]
    wrt = nnx.All(nnx.Param, nnx.Not(nnx.PathContains(0)))
    optimizer = nnx.Optimizer(model, ao.freeze(ao.adam(0.1), f"^{first}/"), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model))
    gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))), argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, gradients)
    after = nnx.to_pure_dict(nnx.state(model))
    moved = {
        path
        for (path, x), y in zip(paths_and_leaves(before), jax.tree.leaves(after), strict=True)
        if jnp.any(x != y)
    }
    assert moved == {path for path in paths if not path.startswith(first)}


def test_with_linen_and_a_train_state():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="head")(nn.tanh(nn.Dense(4, name="body")(x)))

    model = Model()
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ao.freeze(ao.adamw(0.1), "^body"))
    gradients = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, jnp.ones((2, 3)))))(params)
    state = jax.jit(lambda state: state.apply_gradients(grads=gradients))(state)
    same(state.params["body"], params["body"])
    assert jnp.all(state.params["head"]["kernel"] != params["head"]["kernel"])


def test_with_equinox():
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    # Filtered trees have None for what is no array, and only the head's gradients are computed.
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = ao.freeze(ao.adamw(0.1, mask=ao.decay_mask), "^layers/0")
    trained = eqx.tree_at(
        lambda m: (m.layers[1].weight, m.layers[1].bias), jax.tree.map(lambda _: False, model), (True, True)
    )
    diff, static = eqx.partition(model, trained)
    gradients = eqx.filter_grad(lambda d: jnp.sum(eqx.combine(d, static)(jnp.ones(3))))(diff)
    updates, state = tx.update(gradients, tx.init(params), params)
    moved = eqx.apply_updates(model, updates)
    same(moved.layers[0].weight, model.layers[0].weight)
    assert jnp.all(moved.layers[1].weight != model.layers[1].weight)
    assert len(jax.tree.leaves(state.inner_state[0].mu)) == 2


@pytest.mark.parametrize("through", [through_bytes, through_orbax])
def test_a_restored_state_goes_on_bit_for_bit(through, tmp_path):
    tx = ao.freeze(ao.adam(0.1), "^body")
    _, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    restored = through(state, tx.init(PARAMS), tmp_path)
    same(tx.update(GRADIENTS, restored, PARAMS), tx.update(GRADIENTS, state, PARAMS))


def test_it_is_described():
    groups = ao.partition_by_path({"bias$": ao.sgd(0.1)}, default=ao.adam(0.1))
    assert ao.describe_partition(ao.freeze(groups, "^body"), PARAMS) == (
        "group          leaves  parameters  shape\n"
        "(frozen)            2           8\n"
        "  body/bias                     2  (2,)\n"
        "  body/kernel                   6  (3, 2)\n"
        "bias$               1           2\n"
        "  head/bias                     2  (2,)\n"
        "(default)           1           4\n"
        "  head/kernel                   4  (2, 2)\n"
        "total               4          14"
    )
    table = ao.describe_partition(ao.freeze(ao.adam(0.1), "^body"), PARAMS)
    assert (
        "\n(frozen)            2           8\n" in table and "\n(trained)           2           6\n" in table
    )


# --- Carried over -------------------------------------------------------------------------------------------


def test_unfrozen_leaves_start_anew_and_the_others_keep_their_moments():
    frozen, whole = ao.freeze(everything(), "^body"), everything()
    state = frozen.init(PARAMS)
    for _ in range(3):
        _, state = frozen.update(GRADIENTS, state, PARAMS, value=1.0)
    # Unfrozen in part, as a whole, without `freeze`; then frozen again.
    for new in (
        ao.freeze(everything(), "^body/bias"),
        ao.freeze(everything(), {"body": False, "head": False}),
        whole,
    ):
        carried, table = ao.transfer_state(state, frozen, new, PARAMS)
        adam, before = (optax.tree_utils.tree_get(s, "mu") for s in (carried, state))
        same(adam["head"], before["head"])
        assert not jnp.any(adam["body"]["kernel"])
        assert {row.outcome for row in table} == {"kept", "new"}
        updates, _ = new.update(GRADIENTS, carried, PARAMS, value=1.0)
        assert jnp.any(updates["body"]["kernel"]) and jnp.any(updates["head"]["bias"])
    back, table = ao.transfer_state(carried, whole, frozen, PARAMS)
    same(back, state)
    assert {row.outcome for row in table} == {"kept", "dropped"}

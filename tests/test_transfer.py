"""A state carried over to other parameters, chains, granularities and storages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_optax as ao

PARAMS = {"b": jnp.ones(3), "w": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)}


def trained(tx, params=PARAMS, steps=5):
    state = tx.init(params)
    for t in range(steps):
        gradients = jax.tree.map(lambda p, t=t: jnp.cos(3 * p + t), params)
        _, state = tx.update(gradients, state, params)
    return state


def adam_of(state):
    def is_adam(x):
        return isinstance(x, ao.ScaleByAdamState)

    return [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]


def works(tx, state, params):
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(tx.init(params))


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


SAME = {
    "adamw": lambda: ao.adamw(0.1),
    "rmsprop": lambda: ao.rmsprop(0.1, momentum=0.9, centered=True),
    "labels": lambda: ao.adam(0.1, granularity=ao.Labels(lambda path, leaf: path)),
    "wrapped": lambda: ao.reject_nonfinite(ao.accumulate_gradients(ao.adam(0.1, granularity="global"), 2)),
    "injected": lambda: ao.inject_hyperparams(ao.adam)(0.1),
    "measured": lambda: ao.telemetry(ao.adam(0.1), per="tensor"),
    "groups": lambda: ao.partition_by_path({"w": ao.adam(0.1)}, default=ao.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_transformation_keeps_everything(name):
    tx = SAME[name]()
    state = trained(tx)
    moved, table = ao.transfer_state(state, tx, tx, PARAMS)
    assert {row.outcome for row in table} == {"kept"}
    assert_same(moved, state)


def test_a_leaf_gained_a_leaf_lost_and_one_of_another_shape():
    tx = ao.adamw(0.1)
    state = trained(tx)
    params = {"w": PARAMS["w"], "b": jnp.ones(4), "head": jnp.ones(2)}
    moved, table = ao.transfer_state(state, tx, tx, params)
    assert_same(moved[0].mu["w"], state[0].mu["w"])
    assert not moved[0].mu["b"].any() and not moved[0].nu["head"].any()
    assert int(moved[0].count) == 5
    outcomes = {(row.path, row.outcome) for row in table}
    assert outcomes >= {("0/mu/w", "kept"), ("0/mu/head", "new"), ("0/nu/b", "new"), ("0/nu/b", "dropped")}
    works(tx, moved, params)
    fewer, table = ao.transfer_state(state, tx, tx, {"w": PARAMS["w"]})
    assert ao.TransferRow("0/mu/b", "dropped", "the new state has no place for it") in table
    works(tx, fewer, {"w": PARAMS["w"]})


def test_the_first_steps_of_new_leaves_are_bounded():
    tx = ao.scale_by_adam()
    params = PARAMS | {"head": jnp.ones(2)}
    state, _ = ao.transfer_state(trained(tx), tx, tx, params)
    longest = 0.0
    for _ in range(30):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        longest = max(longest, float(jnp.abs(updates["head"]).max()))
    assert 1 < longest < ao.adam_bound(0.9, 0.999)


@pytest.mark.parametrize("granularity", ["tensor", "global", ao.Axis(-1), ao.Axis(0)])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_coarser_is_what_it_would_have_been(granularity, storage):
    fine, coarse = ao.adam(0.1), ao.adam(0.1, granularity=granularity, nu_storage=storage)
    moved, _ = ao.transfer_state(trained(fine), fine, coarse, PARAMS)
    always = trained(ao.adam(0.1, granularity=granularity))
    rtol = 1e-5 if storage == "float32" else 2**-7
    got, expected = ao.dense(moved[0].nu), always[0].nu
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), got, expected)
    works(coarse, moved, PARAMS)
    back, table = ao.transfer_state(moved, coarse, fine, PARAMS)
    assert_same(back[0].mu, moved[0].mu)
    bound_sq = back[0].bound_sq  # of every coordinate, though some had more than their share
    jax.tree.map(
        lambda m, v: np.testing.assert_array_less(m**2, bound_sq * v * 1.001), back[0].mu, back[0].nu
    )
    assert "converted" in {row.outcome for row in table}
    works(fine, back, PARAMS)


def test_a_first_moment_does_not_go_on_without_its_second():
    old = ao.adam(0.1, granularity=ao.Labels(lambda path, leaf: path))
    for new in (ao.adam(0.1), ao.adam(0.1, granularity="global"), ao.adam(0.1, granularity="tensor")):
        moved, table = ao.transfer_state(trained(old), old, new, PARAMS)
        assert int(moved[0].count) == 0 and not moved[0].mu["w"].any() and not moved[0].nu_weight
        assert {row.outcome for row in table if "mu" in row.path} == {"new", "dropped"}
    plain, centered = ao.rmsprop(0.1), ao.rmsprop(0.1, centered=True)
    for old, new in ((plain, centered), (centered, plain)):
        moved, _ = ao.transfer_state(trained(old), old, new, PARAMS)
        assert int(moved[0].count) == 0 and not moved[0].nu["w"].any()


def test_unfreezing_and_other_groups_keep_the_moments():
    frozen = ao.partition_by_path({"w": ao.adam(0.1)}, default=optax.set_to_zero())
    free = ao.partition_by_path({"w|b": ao.adam(0.1)}, default=None)
    state = trained(frozen)
    for tx in (free, ao.adam(0.1), optax.masked(ao.adam(0.1), {"b": True, "w": True})):
        moved, table = ao.transfer_state(state, frozen, tx, PARAMS)
        (adam,), (before,) = adam_of(moved), adam_of(state)
        assert_same(adam.mu["w"], before.mu["w"])
        assert not adam.mu["b"].any() and int(adam.count) == 5
        assert any(row.outcome == "new" and row.path.endswith("mu/b") for row in table)
        works(tx, moved, PARAMS)


def test_another_chain_and_what_is_dropped():
    old, new = ao.adam(0.1), ao.sgd(0.1, momentum=0.9)
    moved, table = ao.transfer_state(trained(old), old, new, PARAMS)
    assert not jnp.any(moved[0].trace["w"])
    outcomes = {row.path: row.outcome for row in table}
    assert outcomes["0/trace/w"] == "new" and outcomes["0/nu/w"] == "dropped"
    assert "dropped" in str(table) and "0/trace/w" in str(table)
    with pytest.raises(ValueError, match="old_tx must be an optax.GradientTransformation"):
        ao.transfer_state(moved, None, new, PARAMS)


INJECTED = {
    "fewer": (ao.rmsprop, 1e-3, (), ao.sgd, 0.01),
    "more": (ao.sgd, 0.1, (), ao.rmsprop, 1e-3),
    "static": (ao.adam, 0.1, "b1", ao.adam, optax.linear_schedule(0.01, 0.0, 10)),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_go_by_their_names(name):
    was, old_rate, static_args, becomes, new_rate = INJECTED[name]
    old, new = ao.inject_hyperparams(was, static_args)(old_rate), ao.inject_hyperparams(becomes)(new_rate)
    moved, table = ao.transfer_state(trained(old), old, new, PARAMS)
    expected = new_rate(5) if callable(new_rate) else new_rate
    _, after = new.update(PARAMS, moved, PARAMS)
    assert not any(after.overrides)
    assert ao.get_hyperparams(after)["learning_rate"] == jnp.float32(expected)
    assert ao.TransferRow("given_values/learning_rate", "kept", "") in table
    # What was set stays set, and only that.
    state = ao.set_hyperparams(trained(old), learning_rate=0.5)
    moved, _ = ao.transfer_state(state, old, new, PARAMS)
    _, after = new.update(PARAMS, moved, PARAMS)
    assert [k for k, overridden in after.overridden.items() if overridden] == ["learning_rate"]
    assert ao.get_hyperparams(after)["learning_rate"] == 0.5


class Counted:
    """A stateful schedule whose state is no transformation's."""

    def init(self):
        return {"seen": jnp.zeros(())}

    def update(self, state, **extra_args):
        return {"seen": state["seen"] + 1}

    def __call__(self, state, **extra_args):
        return 0.1 / (1 + state["seen"])


def test_states_of_schedules_stay_with_the_same_hyperparameters():
    old, other = ao.inject_hyperparams(ao.sgd)(Counted()), ao.inject_hyperparams(ao.adam)(0.1, b1=Counted())
    state = trained(old)
    assert_same(ao.transfer_state(state, old, old, PARAMS)[0], state)
    moved, _ = ao.transfer_state(state, old, other, PARAMS)
    assert_same(moved.schedule_states, other.init(PARAMS).schedule_states)


GROUPS = ao.partition_by_path({"w": ao.adam(0.1)}, default=ao.adam(0.1))
WIDER = {
    "tensors": (ao.adam(0.1, granularity="global"), ao.adam(0.1, granularity="tensor")),
    "groups": (ao.adam(0.1), GROUPS),
    "by path": (ao.adam(0.1, granularity="global"), ao.adam(0.1, granularity=ao.ByPath({"w": "tensor"}))),
}


@pytest.mark.parametrize("name", WIDER)
def test_what_one_array_becomes_can_be_donated(name):
    old, new = WIDER[name]
    moved, _ = ao.transfer_state(trained(old), old, new, PARAMS)
    jax.jit(lambda s: new.update(PARAMS, s, PARAMS), donate_argnums=0)(moved)


@pytest.mark.parametrize("inner", [ao.adam(0.1), ao.sgd(0.1), ao.sgd(0.1, momentum=0.9)])
def test_a_measurement_is_of_the_same_leaves_or_new(inner):
    tx = ao.telemetry(ao.reject_nonfinite(inner), per="tensor")
    state = trained(tx)
    renamed = {"w": PARAMS["w"], "zz": PARAMS["b"]}  # w, once the second leaf, is the first
    moved, table = ao.transfer_state(state, tx, tx, renamed)
    fresh = tx.init(renamed)
    for field in set(fresh._fields) - {"count", "inner_state"}:
        assert_same(getattr(moved, field), getattr(fresh, field))
        assert (field, "new") in {(row.path, row.outcome) for row in table}
    assert int(moved.count) == 5
    works(tx, moved, renamed)
    # From and to the measurement of the whole tree, too.
    whole = ao.telemetry(ao.reject_nonfinite(inner))
    assert int(ao.transfer_state(state, tx, whole, PARAMS)[0].measured) == 0
    assert int(ao.transfer_state(trained(whole), whole, whole, renamed)[0].measured) == 5


@pytest.mark.parametrize("unfreezes", [True, False])
def test_groups_keep_their_schedules_when_a_wrapper_comes_or_goes(unfreezes):
    params = {"body": jnp.ones(3), "head": jnp.ones(2)}
    groups = ao.partition_by_path(
        {"body": ao.adam(optax.linear_schedule(1.0, 0.0, 100))},
        default=ao.adamw(optax.linear_schedule(2.0, 0.0, 100)),
    )
    old, new = ao.freeze(groups, "body"), groups
    old, new = (old, new) if unfreezes else (new, old)
    state = old.init(params)
    for _ in range(10):
        _, state = old.update(params, state, params)
    state, _ = ao.transfer_state(state, old, new, params)
    _, state = new.update(params, state, params)
    rates = ao.get_hyperparams(state)
    assert float(rates["body/learning_rate"]) == pytest.approx(0.9)
    assert float(rates["default/learning_rate"]) == pytest.approx(1.8)

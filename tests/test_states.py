"""The fields of every state hold what their annotations say."""

import functools
import pickle
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, mixed_params

import adaptive_optax as ao
from adaptive_optax import typing as names
from adaptive_optax._core.entries import attributes_of

NO_STATE = {"clip_by_global_norm"}
FLOATING = (jnp.float32, jnp.float64)
DTYPES = {
    names.Scalar: FLOATING,
    names.Scalars: FLOATING,
    names.Count: (jnp.int32,),
    names.Counts: (jnp.int32,),
    names.Flag: (jnp.bool_,),
}


def named_tuples(node):
    """The NamedTuples of this library in a state, at any depth."""
    if hasattr(node, "_fields") and type(node).__module__.startswith("adaptive_optax"):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list) else ()
    for child in children:
        yield from named_tuples(child)


def leaf_paths(tree):
    return {path for path, _ in jax.tree.leaves_with_path(tree)}


def check(state, params):
    """Fails unless each field fits its annotation; returns the annotations seen."""
    hints = typing.get_type_hints(type(state), include_extras=True)
    for field, value in state._asdict().items():
        hint, where = hints[field], f"{type(state).__name__}.{field}"
        if hint in DTYPES:
            assert value.ndim == (hint in (names.Scalars, names.Counts)) and value.dtype in DTYPES[hint], (
                where
            )
        elif hint in (names.Params, names.Updates):
            # Wrappers such as `freeze` show an inner transformation fewer leaves.
            assert leaf_paths(value) <= leaf_paths(params), where
        elif not isinstance(state, ao.Int8Moment):  # whose trees have a format of its own
            assert hint is not typing.Any, f"{where} has no role"
    return set(hints.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fields_hold_what_their_annotations_say(case):
    params = mixed_params()
    states = list(named_tuples(case.make().init(params)))
    for state in states:
        check(state, params)
    assert states or case.factory in NO_STATE, case.factory


def test_the_check_notices_another_dtype_and_another_shape():
    state = ao.scale_by_adam().init(jnp.ones(3))
    assert {names.Count, names.Scalars, names.Moment} <= check(state, jnp.ones(3))
    for wrong in (
        {"count": jnp.zeros(())},
        {"scalars": jnp.zeros(())},
        {"scalars": jnp.zeros(6, jnp.bfloat16)},
    ):
        with pytest.raises(AssertionError, match=f"ScaleByAdamState.{next(iter(wrong))}"):
            check(state._replace(**wrong), jnp.ones(3))
    with pytest.raises(AssertionError, match=r"TraceState\.trace"):
        check(ao.trace(0.9).init({"a": jnp.ones(3)}), {"b": jnp.ones(3)})


# The fields of the states' types before their scalars shared arrays, in the order in which they were pickled.
FIELDS = {
    ao.scale_by_adam: "count mu nu nu_max b1 b2 eps mu_weight nu_weight bound_sq",
    ao.scale_by_rms: "count mu nu decay eps nu_weight",
    ao.scale_by_learning_rate: "learning_rate given overridden schedule_state",
    ao.accumulate_gradients: "count micro_step contributing took_part dropped dropped_in_a_row inner_state "
    "total weight weight_sq square signal noise",
}
ENTRIES = {
    ao.scale_by_adam: ("b1", "b2", "eps", "mu_weight", "nu_weight", "bound_sq"),
    ao.scale_by_rms: ("decay", "eps", "nu_weight"),
    ao.scale_by_learning_rate: ("given", "overridden"),
}


def stepped(factory, batch=()):
    tx = factory(0.5)
    state = tx.init(jnp.ones(3))
    for _ in range(2):
        _, state = tx.update(jnp.arange(3.0), state)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), state)


@pytest.mark.parametrize("factory", ENTRIES, ids=lambda f: f.__name__)
def test_an_entry_of_the_scalars_is_an_attribute(factory):
    names_of_it, state, batch = ENTRIES[factory], stepped(factory), stepped(factory, (4, 2))
    assert state.scalars.shape == (len(names_of_it),)
    for i, name in enumerate(names_of_it):
        value = getattr(state, name)
        assert value.shape == () and value == state.scalars[i]
        assert value.dtype == (jnp.bool_ if name == "overridden" else jnp.float32)
        assert getattr(batch, name).shape == (4, 2)
        assert f"{name}=Array(" in repr(state)
        shape = getattr(jax.eval_shape(functools.partial(stepped, factory)), name)
        assert (shape.shape, shape.dtype) == ((), value.dtype)
        new = state._replace(**{name: 1})
        assert getattr(new, name) == 1
        others = [other for other in names_of_it if other != name]
        assert all(getattr(new, other) == getattr(state, other) for other in others)
        assert jax.tree.structure(new) == jax.tree.structure(state)
    assert "scalars" not in repr(state)


def any_state(factory):
    if factory is not ao.accumulate_gradients:
        return stepped(factory)
    tx = factory(ao.sgd(0.5), 3, drop_nonfinite=True)
    state = tx.init(jnp.ones(3))
    for x in (1.0, jnp.nan, 2.0, jnp.nan):
        _, state = tx.update(jnp.full(3, x), state)
    return state


@pytest.mark.parametrize("factory", FIELDS, ids=lambda f: f.__name__)
def test_a_state_is_made_of_its_scalars_one_by_one_as_in_pickles_of_earlier_versions(factory):
    state = any_state(factory)
    fields = FIELDS[factory].split()
    assert fields == attributes_of(type(state))
    values = [getattr(state, name) for name in fields]
    for again in (type(state)(*values), type(state)(**dict(zip(fields, values, strict=True)))):
        chex.assert_trees_all_equal(again, state, strict=True)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state, strict=True)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        type(state)(**dict(zip([*fields[:-1], "misspelt"], values, strict=True)))


@pytest.mark.parametrize("factory", FIELDS, ids=lambda f: f.__name__)
def test_a_tree_mapped_from_a_state_has_its_attributes_too(factory):
    state, spec = any_state(factory), jax.P()
    for change in (jnp.max, jax.typeof, np.shape, lambda x: np.int64(x.size), lambda x: spec, lambda x: None):
        mapped = jax.tree.map(change, state)
        assert repr(mapped).startswith(type(state).__name__)
        assert all(x is y for x, y in zip(mapped._replace(), mapped, strict=True))
    fields = FIELDS[factory].split()
    assert set(jax.tree.leaves(type(state)(**dict.fromkeys(fields, spec)))) <= {spec}
    assert jax.tree.leaves(type(state)(**dict.fromkeys(fields))) == []
    shapes = jax.eval_shape(lambda: state)
    again = type(state)(**{name: getattr(shapes, name) for name in fields})
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert [x.shape for x in jax.tree.leaves(again)] == [x.shape for x in jax.tree.leaves(state)]


def test_a_second_derivative_with_respect_to_a_rate_in_the_state_is_right():
    def reached(rate, set_rate):
        tx, params = ao.sgd(0.05), jnp.array([1.0, -2.0])
        state = tx.init(params)
        state = (*state[:-1], set_rate(state[-1], rate))
        for _ in range(3):
            updates, state = tx.update(2 * params + 1, state)
            params = params + updates
        return jnp.sum(params**2)

    def exact(rate):
        params = jnp.array([1.0, -2.0])
        for _ in range(3):
            params = params - rate * (2 * params + 1)
        return jnp.sum(params**2)

    for at in (0.05, 0.07):  # the value that was given, and another
        for derivative in (jax.grad, jax.hessian, jax.jacfwd):
            found = derivative(lambda x: reached(x, lambda s, rate: s._replace(learning_rate=rate)))(at)
            np.testing.assert_allclose(found, derivative(exact)(at), rtol=1e-4)

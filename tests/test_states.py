"""The fields of every state hold what their annotations say."""

import pickle
import typing

import chex
import jax
import jax.numpy as jnp
import pytest
from cases import CASES, mixed_params

import adaptive_optax as ao
from adaptive_optax import typing as names

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
        shape = getattr(jax.eval_shape(lambda: stepped(factory)), name)  # noqa: B023
        assert (shape.shape, shape.dtype) == ((), value.dtype)
        new = state._replace(**{name: 1})
        assert getattr(new, name) == 1
        others = [other for other in names_of_it if other != name]
        assert all(getattr(new, other) == getattr(state, other) for other in others)
        assert jax.tree.structure(new) == jax.tree.structure(state)
    assert "scalars" not in repr(state)


@pytest.mark.parametrize("factory", ENTRIES, ids=lambda f: f.__name__)
def test_a_state_is_made_of_its_scalars_one_by_one_as_in_pickles_of_earlier_versions(factory):
    state = stepped(factory)
    fields = {name: x for name, x in state._asdict().items() if name != "scalars"}
    single = {name: getattr(state, name) for name in ENTRIES[factory]}
    again = type(state)(**fields, **single)
    chex.assert_trees_all_equal(again, state, strict=True)
    place = state._fields.index("scalars")
    positional = [*state[:place], *single.values(), *state[place + 1 :]]
    chex.assert_trees_all_equal(type(state)(*positional), state, strict=True)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state, strict=True)

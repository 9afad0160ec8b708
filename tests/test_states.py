"""The fields of every state hold what their annotations say."""

import typing

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, mixed_params

import adaptive_optax as ao
from adaptive_optax import typing as names

NO_STATE = {"clip_by_global_norm"}
DTYPES = {names.Scalar: (jnp.float32, jnp.float64), names.Count: (jnp.int32,), names.Flag: (jnp.bool_,)}


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
    for field, value in zip(state._fields, state, strict=True):
        hint, where = hints[field], f"{type(state).__name__}.{field}"
        if hint in DTYPES:
            assert value.shape == () and value.dtype in DTYPES[hint], where
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
    assert {names.Count, names.Scalar, names.Moment} <= check(state, jnp.ones(3))
    for wrong in ({"count": jnp.zeros(())}, {"b1": jnp.zeros(3)}, {"b2": jnp.zeros((), jnp.bfloat16)}):
        with pytest.raises(AssertionError, match=f"ScaleByAdamState.{next(iter(wrong))}"):
            check(state._replace(**wrong), jnp.ones(3))
    with pytest.raises(AssertionError, match=r"TraceState\.trace"):
        check(ao.trace(0.9).init({"a": jnp.ones(3)}), {"b": jnp.ones(3)})

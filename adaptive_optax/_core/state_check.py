"""Whether a state, which may have been restored, fits a transformation and its parameters.

The error names the first field and leaf that differ, the argument that determines them, and a remedy.
"""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.checks import check_same_tree
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.states import hyperparameters_of
from adaptive_optax._core.values import unevaluated


class Settings(NamedTuple):
    """The arguments of a factory that determine a field of its state, for error messages.

    Attributes:
        presence: The argument that determines whether the field is None.
        shape: The argument that determines the shapes, given the parameters.
        form: The argument that determines the dtypes and the container of the arrays.
    """

    presence: str = ""
    shape: str = ""
    form: str = ""


SCHEDULED = {"schedule_state": Settings(presence="hyperparameter: a number for a schedule, or vice versa")}


def check_state(
    owner: str,
    state: Any,
    own_init: Callable[[Any], Any],
    name: str,
    tree: Any,
    settings: Mapping[str, Settings] = MappingProxyType({}),
) -> None:
    """Raises unless a state, which may have been restored, looks like the one `own_init` makes for a tree.

    Compares structures, shapes and dtypes while tracing, and matches leaves by path. float32 and float64 are
    interchangeable, because gradients and parameters may differ in that.

    Args:
        owner: The factory.
        state: The state given to `update`.
        own_init: Makes the state. Its `inner_state` may be anything, since the inner transformation checks
            its own state. The function must live as long as the transformation.
        name: What `tree` is, "updates" or "params".
        tree: A tree like the parameters.
        settings: Which arguments determine each field.

    Raises:
        ValueError: With the first field and leaf that differ, both versions, the argument that determines
            it and a remedy.
    """
    wanted = _template(own_init, tree)
    state_type = type(wanted)
    if not isinstance(state, state_type):
        raise ValueError(
            f"{owner}: the state must be a {state_type.__module__}.{state_type.__name__}, got a "
            f"{type(state).__module__}.{type(state).__name__}; make it with this transformation's init."
        )
    # Hyperparameters may have been set; they are checked where they are used.
    unchecked = {"inner_state", *hyperparameters_of(state_type).names}
    for field, want in zip(wanted._fields, wanted, strict=True):
        got = getattr(state, field)
        if field not in unchecked and not _alike(got, want):
            _refuse_field(owner, field, got, want, name, tree, settings.get(field, Settings()))


_TEMPLATES: weakref.WeakKeyDictionary[Callable[[Any], Any], dict[Any, Any]] = weakref.WeakKeyDictionary()


def _template(own_init: Callable[[Any], Any], tree: Any) -> Any:
    """The abstract state for a tree, made once for all trees with the same structure, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    specs = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    known = _TEMPLATES.setdefault(own_init, {})
    if (treedef, specs) not in known:
        like = treedef.unflatten([jax.ShapeDtypeStruct(*spec) for spec in specs])
        with unevaluated():
            known[treedef, specs] = jax.eval_shape(own_init, like)
    return known[treedef, specs]


_WIDEST = {"float32": "float64", "complex64": "complex128", "int32": "int64"}


def _alike(got: Any, want: Any) -> bool:
    (got_leaves, got_treedef), (leaves, treedef) = jax.tree.flatten(got), jax.tree.flatten(want)
    if got_treedef != treedef:  # perhaps the same leaves in other containers
        by_path = dict(paths_and_leaves(want))
        got_by_path = dict(paths_and_leaves(got))
        if got_by_path.keys() != by_path.keys():
            return False
        got_leaves, leaves = [got_by_path[path] for path in by_path], by_path.values()
    return all(
        jnp.shape(x) == jnp.shape(y) and _same_kind(x, y) for x, y in zip(got_leaves, leaves, strict=True)
    )


def _same_kind(x: Any, y: Any) -> bool:
    names = str(jnp.result_type(x)), str(jnp.result_type(y))
    if not isinstance(x, jax.Array) and jnp.shape(x) == () and names[1] in ("float32", "float64"):
        return isinstance(x, numbers.Real) or np.issubdtype(names[0], np.floating)  # a number that was set
    if names == ("int32", "bool"):  # a flag, after a wrapper combined two states by arithmetic
        return True
    return names[0] == names[1] or _WIDEST.get(names[0], names[0]) == _WIDEST.get(names[1], names[1])


def _refuse_field(
    owner: str, field: str, got: Any, want: Any, name: str, tree: Any, settings: Settings
) -> NoReturn:
    """Raises with the first difference, in the order presence, format, parameters, shapes, dtypes."""

    def refuse(path: str, sides: str, setting: str, remedy: str = "transfer_state") -> NoReturn:
        place = "/".join(part for part in (field, path) if part)
        cause = f"with another {setting}" if setting else f"by another transformation or for other {name}"
        raise ValueError(
            f"{owner}: the state does not fit this transformation and these {name}: {place!r} is {sides} "
            f"here. It was made {cause}. Either build the transformation as it was when the state was made, "
            f"or convert the state with {remedy}."
        )

    empty = [not jax.tree.leaves(x) for x in (got, want)]
    if empty[0] != empty[1]:
        refuse(
            "",
            "missing in the state and needed" if empty[0] else "in the state and not used",
            settings.presence,
        )
    is_format = [
        isinstance(x, tuple) and hasattr(x, "_fields") and type(x) is not type(tree) for x in (got, want)
    ]
    if is_format[0] != is_format[1]:
        in_state, here = (
            f"a {type(x).__name__}" if wrapped else _described(x)
            for x, wrapped in zip((got, want), is_format, strict=True)
        )
        refuse("", f"{in_state} in the state and {here}", settings.form, "convert_storage")
    got_leaves, leaves = dict(paths_and_leaves(got)), dict(paths_and_leaves(want))
    # The first part of a format, such as codes, has the moment's shapes.
    first = next(iter(leaves), "").partition("/")[0] if is_format[1] else ""
    values, wanted = _part(first, got_leaves), _part(first, leaves)
    if values.keys() != wanted.keys() and settings.shape and ({""} in (values.keys(), wanted.keys())):
        refuse(first, f"{_described(values)} in the state and {_described(wanted)}", settings.shape)
    expected = dict(paths_and_leaves(tree))
    if not settings.shape and wanted.keys() == expected.keys():
        # These are like the parameters whatever the settings are.
        check_same_tree(owner, name, expected, "the state", values, ordered=False)
    if values.keys() != wanted.keys():
        check_same_tree(owner, name, wanted, "the state", values, ordered=False)
    for path, x in wanted.items():
        if jnp.shape(values[path]) != jnp.shape(x):
            place = "/".join(part for part in (first, path) if part)
            refuse(place, f"{_described(values[path])} in the state and {_described(x)}", settings.shape)
    for path, x in leaves.items():
        y = got_leaves.get(path)
        if y is None or jnp.shape(x) != jnp.shape(y) or not _same_kind(x, y):
            remedy = "convert_storage" if settings.form else "transfer_state"
            refuse(path, f"{_described(y)} in the state and {_described(x)}", settings.form, remedy)
    raise AssertionError(f"{owner}: {field} differs, but none of its leaves does")


def _part(first: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves below a node, keyed by the rest of their paths."""
    if not first:
        return dict(leaves)
    split = {path: path.partition("/") for path in leaves}
    return {split[path][2]: x for path, x in leaves.items() if split[path][0] == first}


def _described(x: Any) -> str:
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1:
        return f"a tree of {len(leaves)} arrays"
    return f"{jnp.result_type(leaves[0])}{list(jnp.shape(leaves[0]))}"


def check_state_kept(owner: str, old: Any, new: Any, hint: str) -> None:
    """Raises if an inner transformation changes the structure, a shape or a dtype of its state.

    The hint says why a dtype may have changed and what to do.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            f"{owner}: the state of inner changed from {jax.tree.structure(old)} to "
            f"{jax.tree.structure(new)}; it must keep its structure."
        )
    for (path, before), after in zip(paths_and_leaves(old), jax.tree.leaves(new), strict=True):
        was, is_now = (f"{jnp.result_type(x)}{jnp.shape(x)}" for x in (before, after))
        if was != is_now:
            raise ValueError(
                f"{owner}: the state {path!r} of inner changed from {was} to {is_now}; it must keep its "
                f"shape and dtype ({hint})."
            )

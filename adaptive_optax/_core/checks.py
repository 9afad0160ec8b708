"""Argument checks. Every error is one sentence with the argument's name, its value and what is accepted.

Concrete values are checked when a transformation or schedule is built. Tracers have no value yet, so only
their shape is checked; every factory that accepts tracers says so.
"""

from __future__ import annotations

import numbers
import operator
import unicodedata
import weakref
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import unevaluated
from adaptive_optax._core.states import hyperparameters_of


def in_interval(number: float, interval: str) -> bool:
    """Whether a number lies in an interval such as `"[0, 1)"`. NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


def check_scalar(name: str, value: Any, interval: str, *, schedule: bool = False) -> None:
    """Raises unless `value` is a real number in `interval`.

    Args:
        name: The argument's name, for the message.
        value: A Python or NumPy number, a scalar array, or a tracer (whose value cannot be checked).
        interval: The accepted range in interval notation, such as `"[0, 1)"` or `"(0, inf)"`.
        schedule: Whether to accept a function of the step count as well.

    Raises:
        ValueError: If `value` is concrete and out of range, or is not a scalar.
    """
    if schedule and callable(value):
        return
    expected = f"a number in {interval}" + (" or a schedule of the step count" if schedule else "")
    if isinstance(value, Tracer):
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.number) or jnp.iscomplexobj(value):
            raise ValueError(f"{name} must be {expected}, got a traced array of type {value.aval}.")
        return
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    is_scalar_array = is_array and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number)
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    if hasattr(value, "learning_rate"):
        raise ValueError(f"{name} must be {expected}, got a set of schedules: pass its learning_rate.")
    if not (is_scalar_array or is_real) or jnp.iscomplexobj(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    try:
        accepted = in_interval(float(value), interval)
    except OverflowError:  # an integer beyond float64
        accepted = False
    if not accepted:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def check_integer(name: str, value: Any, interval: str, because: str = "") -> None:
    """Raises unless `value` is a concrete integer in `interval`; `because` explains the limits."""
    accepted = f"an integer in {interval}" + (f" ({because})" if because else "")
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not in_interval(number, interval):
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises unless `value` is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_name(what: str, value: Any) -> None:
    """Raises unless `value` can be used as a name in files, terminals and web pages."""
    accepted = "a non-empty string of at most 1000 characters"
    if not isinstance(value, str) or not value or len(value) > 1000:
        found = f"one of {len(value)}" if isinstance(value, str) and value else repr(value)
        raise ValueError(f"{what} must be {accepted}, got {found}.")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs"):
            kind = "control character" if character < "\xa0" else "lone surrogate, which UTF-8 cannot encode"
            raise ValueError(f"{what} must be {accepted}; {value!r} holds a {kind}.")


def check_bool(name: str, value: Any) -> None:
    """Raises unless `value` is a concrete bool. It decides what is built, so it cannot be traced."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raises unless `value` is a bool or a scalar bool array, traced or not."""
    if not isinstance(value, bool) and (getattr(value, "dtype", None) != np.bool_ or np.ndim(value)):
        raise ValueError(f"{name} must be True or False, or a traced bool, got {value!r}.")


def _dtype_of(leaf: Any) -> Any:
    """The dtype of a leaf, or None if it has none."""
    if not isinstance(leaf, bool | int | float | complex) and not hasattr(leaf, "dtype"):
        return None
    try:
        return jnp.result_type(leaf)
    except TypeError:
        return None


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is floating or complex, so that a transformation can update it."""
    dtype = _dtype_of(leaf)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def check_inexact(owner: str, name: str, tree: Any) -> None:
    """Raises if a leaf is neither floating nor complex, and names its path."""
    if all(map(is_inexact, jax.tree.leaves(tree))):
        return  # without computing paths, which is slow for a large tree
    for path, leaf in paths_and_leaves(tree):
        if is_inexact(leaf):
            continue
        dtype = _dtype_of(leaf)
        kind, remedy = dtype, "exclude other leaves with optax.masked or optax.partition"
        if dtype is None:
            kind = type(leaf).__name__
            remedy = "for an Equinox model, pass eqx.filter(model, eqx.is_inexact_array)"
        raise ValueError(
            f"{owner}: the leaf {path!r} of {name} must be a floating or complex array, got {kind} "
            f"({remedy})."
        )


def check_updates(owner: str, updates: Any, params: Any) -> None:
    """Raises unless updates match the floating or complex parameters in paths, shapes and kind.

    Other leaves of `params`, such as a model's functions and counters, have no update.
    """
    (leaves, treedef), (likes, like_treedef) = jax.tree.flatten(updates), jax.tree.flatten(params)
    if treedef == like_treedef and all(map(_is_applicable, leaves, likes)):
        return  # without computing paths
    leaves = dict(paths_and_leaves(updates))
    moving = {path: leaf for path, leaf in paths_and_leaves(params) if is_inexact(leaf)}
    if leaves.keys() != moving.keys() or any(jnp.shape(x) != jnp.shape(moving[p]) for p, x in leaves.items()):
        check_same_tree(owner, "updates", leaves, "params", moving, ordered=False)
    check_real(owner, "updates", leaves, "params", moving)


def _is_applicable(update: Any, param: Any) -> bool:
    """Whether an update can be applied to a parameter."""
    is_real = jnp.iscomplexobj(param) or not jnp.iscomplexobj(update)
    return is_inexact(param) and jnp.shape(update) == jnp.shape(param) and is_real


def check_real(owner: str, name: str, tree: Any, like_name: str, like: Any) -> None:
    """Raises if a leaf of a tree is complex where the same leaf of a matching tree is real."""
    expected = dict(paths_and_leaves(like))
    for path, leaf in paths_and_leaves(tree):
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(expected[path]):
            raise ValueError(
                f"{owner}: the leaf {path!r} is {jnp.result_type(leaf)} in {name} and "
                f"{jnp.result_type(expected[path])} in {like_name}; take the real part."
            )


def check_same_tree(
    owner: str, name: str, tree: Any, like_name: str, like: Any, *, ordered: bool = True
) -> None:
    """Raises unless the leaves of `tree` and `like` have the same paths, shapes and order.

    The order does not matter to callers that match leaves by path (`ordered=False`).
    """
    leaves, expected = dict(paths_and_leaves(tree)), dict(paths_and_leaves(like))
    if differing := leaves.keys() ^ expected.keys():
        path = min(differing)
        has, lacks = (name, like_name) if path in leaves else (like_name, name)
        raise ValueError(f"{owner}: the leaf {path!r} of {has} is not in {lacks}.")
    for path, leaf in leaves.items():
        shape, wanted = jnp.shape(leaf), jnp.shape(expected[path])
        if shape != wanted:
            raise ValueError(f"{owner}: {path!r} has shape {shape} in {name} and {wanted} in {like_name}.")
    for path, place in zip(leaves, expected, strict=True):
        if ordered and path != place:
            raise ValueError(
                f"{owner}: {name} has {path!r} where {like_name} has {place!r}: a dict is sorted by its "
                "keys, a NamedTuple or an OrderedDict is not. Use the same container for both."
            )


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


def check_params(owner: str, params: Any) -> None:
    """Raises if `params` is missing."""
    if params is None:
        raise ValueError(f"{owner} needs the parameters: call update(updates, state, params).")


def check_transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an optax transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(f"{name} must be an optax.GradientTransformation, got {value!r}.")

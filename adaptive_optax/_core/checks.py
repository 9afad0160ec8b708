"""Argument checks. Every error is one sentence with the argument's name, its value and what is accepted.

Concrete values are checked when a transformation or schedule is built. Tracers have no value yet, so only
their shape is checked; every factory that accepts tracers says so.
"""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._core.paths import paths_and_leaves


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
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be {accepted} that is known before tracing, got a traced {value.aval}. With "
            f"optax.inject_hyperparams, name it in static_args; ao.inject_hyperparams leaves it alone."
        )
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


def check_params(owner: str, params: Any) -> None:
    """Raises if `params` is missing."""
    if params is None:
        raise ValueError(f"{owner} needs the parameters: call update(updates, state, params).")


def check_transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an optax transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(f"{name} must be an optax.GradientTransformation, got {value!r}.")

"""Checks of arguments: one sentence that names the argument, its value and what is accepted.

Concrete values are checked when a transformation or schedule is built. Tracers have no value yet, so only
their shape is checked; every factory that accepts one says so.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._paths import paths_and_leaves


def _contains(interval: str, number: float) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below  # False for NaN


def check_scalar(name: str, value: Any, interval: str, *, schedule: bool = False) -> None:
    """Refuses a `value` that is no real number in `interval`.

    Args:
        name: The argument's name, for the message.
        value: A Python or NumPy number, a scalar array, or a tracer (whose value cannot be checked).
        interval: The accepted range in interval notation, such as `"[0, 1)"` or `"(0, inf)"`.
        schedule: Whether a callable of the step count is accepted too.

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
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hasattr(value, "learning_rate"):
        raise ValueError(f"{name} must be {expected}, got a set of schedules: give its learning_rate.")
    if not (is_scalar_array or is_real) or jnp.iscomplexobj(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    try:
        accepted = _contains(interval, float(value))
    except OverflowError:  # an integer beyond float64
        accepted = False
    if not accepted:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def check_integer(name: str, value: Any, interval: str, because: str = "") -> None:
    """Refuses a `value` that is no concrete integer in `interval`, whose limits `because` explains."""
    accepted = f"an integer in {interval}" + (f" ({because})" if because else "")
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not _contains(interval, number):
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a `value` that is not one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Refuses a `value` that is no concrete bool: it chooses what is built, so it cannot be traced."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_inexact(owner: str, name: str, tree: Any) -> None:
    """Refuses a tree with a leaf that is neither floating nor complex, naming the leaf's path."""
    for path, leaf in paths_and_leaves(tree):
        try:
            kind = type(leaf).__name__ if isinstance(leaf, str) else jnp.result_type(leaf)
        except TypeError:
            kind = type(leaf).__name__
        if not jnp.issubdtype(kind, jnp.inexact):
            raise ValueError(
                f"{owner}: the leaf {path!r} of {name} is {kind}; a floating or complex array is needed "
                "(leave other leaves out with optax.masked or optax.partition)."
            )


def check_same_tree(
    owner: str, name: str, tree: Any, like_name: str, like: Any, *, ordered: bool = True
) -> None:
    """Refuses a `tree` whose leaves' paths, shapes or order differ from those of `like`, naming the first.

    Their order does not matter to a caller that matches leaves by their paths (`ordered=False`).
    """
    leaves, expected = dict(paths_and_leaves(tree)), dict(paths_and_leaves(like))
    if differing := leaves.keys() ^ expected.keys():
        path = min(differing)
        has, lacks = (name, like_name) if path in leaves else (like_name, name)
        raise ValueError(f"{owner}: {has} has a leaf {path!r}, {lacks} has not.")
    for path, leaf in leaves.items():
        shape, wanted = jnp.shape(leaf), jnp.shape(expected[path])
        if shape != wanted:
            raise ValueError(f"{owner}: {path!r} has shape {shape} in {name} and {wanted} in {like_name}.")
    for path, place in zip(leaves, expected, strict=True):
        if ordered and path != place:
            raise ValueError(
                f"{owner}: {name} has {path!r} where {like_name} has {place!r}: a dict is sorted by its "
                "keys, a NamedTuple or an OrderedDict is not. Give both the same container."
            )


def check_state(owner: str, state: Any, state_type: type) -> None:
    """Refuses a state that is not of the transformation's type, which restored ones may not be."""
    if not isinstance(state, state_type):
        raise ValueError(
            f"{owner}: the state must be a {state_type.__module__}.{state_type.__name__}, got a "
            f"{type(state).__module__}.{type(state).__name__}; make it with this transformation's init."
        )


def check_state_kept(owner: str, old: Any, new: Any, hint: str) -> None:
    """Refuses a state of an inner transformation that changes its structure, a shape or a dtype.

    The hint says how a dtype may have changed, and what helps.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            f"{owner}: the state of inner went from {jax.tree.structure(old)} to {jax.tree.structure(new)}; "
            "it must keep its structure."
        )
    for (path, before), after in zip(paths_and_leaves(old), jax.tree.leaves(new), strict=True):
        was, is_now = (f"{jnp.result_type(x)}{jnp.shape(x)}" for x in (before, after))
        if was != is_now:
            raise ValueError(
                f"{owner}: the state {path!r} of inner went from {was} to {is_now}; it must keep them "
                f"({hint})."
            )


def check_params(owner: str, params: Any) -> None:
    """Refuses a missing `params`."""
    if params is None:
        raise ValueError(f"{owner} needs the parameters: call update(updates, state, params).")


def check_transformation(name: str, value: Any) -> None:
    """Refuses a `value` that is no optax transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(f"{name} must be an optax.GradientTransformation, got {value!r}.")

"""Checks of arguments: one sentence that names the argument, its value and what is accepted.

Concrete values are checked when a transformation or schedule is built. Tracers have no value yet, so only
their shape is checked; every factory that accepts one says so.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.number):
            raise ValueError(f"{name} must be {expected}, got a traced array of type {value.aval}.")
        return
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    is_scalar_array = is_array and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number)
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_scalar_array or is_real) or jnp.iscomplexobj(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    if not _contains(interval, float(value)):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def check_integer(name: str, value: Any, interval: str) -> None:
    """Refuses a `value` that is no concrete integer in `interval` (interval notation)."""
    accepted = f"an integer in {interval}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")
    if not _contains(interval, int(value)):
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a `value` that is not one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Refuses a `value` that is no concrete bool: it chooses what is built, so it cannot be traced."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def concrete(value: Any) -> float | None:
    """Returns a hyperparameter's value where it is known now, None for a schedule or a tracer."""
    if callable(value) or isinstance(value, Tracer):
        return None
    return float(value)


def check_inexact(owner: str, name: str, tree: Any) -> None:
    """Refuses a tree with a leaf that is neither floating nor complex, naming the leaf's path."""
    for path, leaf in paths_and_leaves(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{owner}: the leaf {path!r} of {name} has dtype {dtype}; floating or complex is needed "
                "(leave other leaves out with optax.masked or optax.partition)."
            )


def check_same_tree(owner: str, name: str, tree: Any, like_name: str, like: Any) -> None:
    """Refuses a `tree` whose leaves' paths or shapes differ from those of `like`, naming the first one."""
    leaves, expected = dict(paths_and_leaves(tree)), dict(paths_and_leaves(like))
    for path in sorted(leaves.keys() ^ expected.keys()):
        has, lacks = (name, like_name) if path in leaves else (like_name, name)
        raise ValueError(f"{owner}: {has} has a leaf {path!r}, {lacks} has not.")
    for path, leaf in leaves.items():
        shape, wanted = jnp.shape(leaf), jnp.shape(expected[path])
        if shape != wanted:
            raise ValueError(
                f"{owner}: {name}[{path!r}] has shape {shape}, {like_name}[{path!r}] has {wanted}."
            )


def check_params(owner: str, params: Any) -> None:
    """Refuses a missing `params`."""
    if params is None:
        raise ValueError(f"{owner} needs the parameters: call update(updates, state, params).")

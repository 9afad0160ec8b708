"""Functions of single leaves, mapped over trees and traced once per combination of shapes and dtypes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

# Roles, dtypes and shapes for annotations. Type checkers see an array, or `Any` for a tree, which they cannot
# describe: it may consist of any containers registered with JAX. "Floating" is float32, or float64 if a
# parameter is.
PyTree: TypeAlias = Any
"""Any tree of arrays."""

Params: TypeAlias = Annotated[Any, "a tree of parameters, or a tree with their structure"]
"""A tree of parameters, or a tree with their structure."""

Updates: TypeAlias = Annotated[Any, "a tree of gradients or updates, in the parameters' structure and shapes"]
"""A tree of gradients or updates, in the parameters' structure and shapes."""

Moment: TypeAlias = Annotated[Any, "one floating value per group of coordinates, in the form of its storage"]
"""A moment: one floating value per group of coordinates, in the form of its storage."""

OptState: TypeAlias = Annotated[Any, "the state of a transformation"]
"""The state of a transformation, such as `tx.init(params)` returns."""

Mask: TypeAlias = Annotated[Any, "a tree of bools for parameters or subtrees, or a function that makes it"]
"""A tree of bools for parameters or subtrees, or a function from the parameters to it."""

Scalar: TypeAlias = Annotated[jax.Array, "floating, shape ()"]
"""A floating scalar: float32, or float64 if a parameter is."""

Scalars: TypeAlias = Annotated[jax.Array, "floating, shape (number,)"]
"""Floating scalars in one array, which the state also has as attributes."""

Counts: TypeAlias = Annotated[jax.Array, "int32, shape (number,)"]
"""Counts in one array, which the state also has as attributes."""

Count: TypeAlias = Annotated[jax.Array, "int32, shape ()"]
"""A number of steps, an int32 scalar."""

Flag: TypeAlias = Annotated[jax.Array, "bool, shape ()"]
"""A boolean scalar."""

Measured: TypeAlias = Annotated[jax.Array, "floating, shape () for a tree or (leaves,) per tensor"]
"""A measurement of telemetry: a floating scalar for the tree, or one value per leaf."""


def by_leaf(like: str | tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Maps a function of single leaves over trees.

    A network has many leaves but few shapes. Under tracing, the function is traced once per combination of
    shapes and dtypes, and XLA inlines the calls. The compiled program is the same, but a tree of hundreds of
    leaves is traced and lowered in a fraction of the time.

    Decorate module-level functions, not closures. Traces are cached with the function: under a `vmap` outside
    `jit`, a function that is recreated in every call would be compiled in every call.

    Args:
        like: The name of the parameter whose tree structure the result has; a tuple of names for a function
            that returns a tuple. A result is None if that input is None.

    Returns:
        A decorator of `f(scalars, *leaves)`. The decorated function takes trees in place of the leaves. They
        must have their leaves in the same order (`check_same_tree`), but the containers may differ. None in
        place of a tree means None for every leaf. `scalars` is any tree; its non-array leaves, such as Python
        numbers and settings, are constants of the trace and must be hashable.
    """
    names = (like,) if isinstance(like, str) else like

    def decorate(f):
        _, *inputs = inspect.signature(f).parameters
        positions = [inputs.index(name) for name in names]

        @functools.partial(jax.jit, static_argnums=0)
        @functools.wraps(f)
        def traced(constants, arrays, leaves):
            treedef, values = constants
            merged = [x if array is None else array for x, array in zip(values, arrays, strict=True)]
            return f(treedef.unflatten(merged), *leaves)

        def over_trees(scalars, *trees):
            leaves = [jax.tree.leaves(tree) for tree in trees]
            count = max(map(len, leaves))
            leaves = [[None] * count if t is None else x for t, x in zip(trees, leaves, strict=True)]
            columns = list(zip(*leaves, strict=True))
            call = functools.partial(f, scalars)
            if any(isinstance(x, Tracer) for column in columns for x in column):
                values, treedef = jax.tree.flatten(scalars)
                arrays = [x if _is_array(x) else None for x in values]
                constants = treedef, tuple(None if _is_array(x) else x for x in values)

                def call(*leaves):
                    return traced(constants, arrays, leaves)

            rows = [call(*column) for column in columns]
            if isinstance(like, str):
                return _tree_like(trees[positions[0]], rows)
            return tuple(_tree_like(trees[p], [row[i] for row in rows]) for i, p in enumerate(positions))

        return functools.wraps(f)(over_trees)

    return decorate


def _tree_like(tree: Any, leaves: list[Any]) -> Any:
    return None if tree is None else jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def mask_of(mask: Any, params: Any) -> Any:
    """Returns a mask as a tree of bools, calling it with the parameters if it is a function.

    A callable model that has bools for its parameters is a tree, not a function.
    """
    return mask(params) if callable(mask) and not is_mask(mask) else mask


def is_mask(tree: Any) -> bool:
    """Whether a tree has leaves and all of them are bools."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(map(is_bool, leaves))


def is_bool(leaf: Any) -> bool:
    """Whether a leaf is a bool or a scalar bool array."""
    return isinstance(leaf, bool) or (getattr(leaf, "dtype", None) == np.bool_ and np.ndim(leaf) == 0)

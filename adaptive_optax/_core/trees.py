"""Functions of single leaves, run over trees, and traced once for all leaves that look alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def by_leaf(results: int) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:
    """Makes a function of single leaves one of trees.

    A network has many leaves of few shapes. While JAX traces, the function is traced once for each
    combination of shapes and dtypes, and XLA inlines the calls: the compiled program is the same, and a tree
    of hundreds of leaves is traced and lowered in a fraction of the time.

    Decorate functions of a module, not closures. Traces are kept with the function; under a `vmap` outside
    `jit` a function that is made anew in every call would be compiled in every call.

    Args:
        results: How many results the function returns.

    Returns:
        A decorator of `f(scalars, *leaves) -> tuple`. The decorated function takes trees in place of the
        leaves, whose leaves come in one and the same order (`check_same_tree`); its results are trees like
        the first of them, in order. None in place of a tree is None for every leaf. `scalars` is any tree:
        what is no array in it, such as Python numbers and settings, is a constant of the trace and must be
        hashable.
    """

    def decorate(f):
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
            return tuple(
                None
                if tree is None
                else jax.tree.unflatten(jax.tree.structure(tree), [row[i] for row in rows])
                for i, tree in enumerate(trees[:results])
            )

        return functools.wraps(f)(over_trees)

    return decorate


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def leaf_numbers(tree: Any) -> Any:
    """Returns a tree of the leaves' numbers, which tell one leaf's random bits from another's."""
    treedef = jax.tree.structure(tree)
    return treedef.unflatten(range(treedef.num_leaves))

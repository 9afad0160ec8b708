"""Maps over trees that know a leaf's index, or return two trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def map_with_index(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `f(index, leaf, ...)`; the index tells a leaf's random bits from the others'."""
    return jax.tree.unflatten(jax.tree.structure(tree), _columns(f, tree, *rest))


def map_to_pair(f: Callable[..., tuple[Any, Any]], tree: Any, *rest: Any) -> tuple[Any, Any]:
    """Maps `f(index, leaf, ...)`, which returns two, to two trees: one like the first, one like the last."""
    pairs = _columns(f, tree, *rest)
    like = tree, (tree, *rest)[-1]
    first, second = map(jax.tree.structure, like)
    return first.unflatten([pair[0] for pair in pairs]), second.unflatten([pair[1] for pair in pairs])


def _columns(f: Callable[..., Any], *trees: Any) -> list[Any]:
    columns = zip(*map(jax.tree.leaves, trees), strict=True)
    return [f(index, *column) for index, column in enumerate(columns)]

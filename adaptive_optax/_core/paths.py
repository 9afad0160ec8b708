"""Canonical paths of leaves: "encoder/layers/0/kernel", the same for linen, nnx and plain trees."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

import jax
import optax

_VALUE = jax.tree_util.GetAttrKey("value")


def paths_and_leaves(tree: Any, *, masked: bool = False) -> list[tuple[str, Any]]:
    """Lists a tree's leaves with their paths, joined with "/".

    A Flax Variable is a node with one child, the attribute `value`; `nnx.Optimizer` shows it at init and has
    unwrapped it at update. It is left out of the path, so that a leaf has one name.

    Args:
        tree: Any tree.
        masked: Whether to list `None` and `optax.MaskedNode` too, which are no leaves: a part of the
            parameters as `optax.masked` and `optax.partition` show it still has the places of the others.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    # Masked siblings count, so that a field `value` is named alike in the whole tree and in a part of it.
    siblings = collections.Counter(key_path[:-1] for key_path, _ in flat)

    def path(key_path):
        wrapped = key_path and key_path[-1] == _VALUE and siblings[key_path[:-1]] == 1
        return jax.tree_util.keystr(key_path[:-1] if wrapped else key_path, simple=True, separator="/")

    return [(path(key_path), leaf) for key_path, leaf in flat if masked or not _is_masked(leaf)]


def _is_masked(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def check_expressions(name: str, patterns: Iterable[Any], what: str = "regular expressions") -> None:
    """Refuses a pattern that is no string or no regular expression."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{name} must be {what}, got {pattern!r}: it is no string.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} must be {what}, got {pattern!r}: {error}.") from error


def check_patterns(patterns: Iterable[str], tree: Any) -> None:
    """Refuses a pattern that matches no leaf of the tree, masked ones included, on its own."""
    paths = [path for path, _ in paths_and_leaves(tree, masked=True)]
    for pattern in patterns:
        if paths and not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"The pattern {pattern!r} matches no leaf; the leaves are {', '.join(paths)}.")


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first pattern that is found in a path."""
    return next((pattern for pattern in patterns if re.search(pattern, path)), None)

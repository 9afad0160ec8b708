"""Canonical paths of leaves: "encoder/layers/0/kernel", the same for linen, nnx and plain trees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax


def path_string(key_path: Sequence[Any]) -> str:
    """Joins a JAX key path with "/".

    A Flax Variable is a node with one child, the attribute `value`; `nnx.Optimizer` shows it at init and has
    unwrapped it at update. It is left out here, so that a leaf has one name.
    """
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def paths_and_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Lists a tree's leaves with their canonical paths; `None` and `optax.MaskedNode` are not leaves."""
    return [(path_string(key_path), leaf) for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def first_match(patterns: Sequence[str], paths: Iterable[str]) -> list[int | None]:
    """Returns for each path the index of the first pattern that `re.search` finds in it, or None.

    Raises:
        ValueError: If a pattern matches no path at all, judged without the patterns before it.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            known = ", ".join(paths) or "(none)"
            raise ValueError(f"The pattern {pattern!r} matches no leaf; the leaves are {known}.")
    return [next((i for i, p in enumerate(patterns) if re.search(p, path)), None) for path in paths]

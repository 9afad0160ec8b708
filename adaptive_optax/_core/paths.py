"""Canonical paths of leaves: "encoder/layers/0/kernel", the same for linen, nnx and plain trees."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

import jax
import optax

from adaptive_optax._core.trees import is_bool, mask_of

_VALUE = jax.tree_util.GetAttrKey("value")


def paths_and_leaves(tree: Any, *, masked: bool = False) -> list[tuple[str, Any]]:
    """Lists a tree's leaves with their paths, joined with "/".

    A Flax Variable is a node with one child, the attribute `value`; `nnx.Optimizer` passes it at init but
    unwraps it at update. The path omits it, so that a leaf has a single name.

    Args:
        tree: Any tree.
        masked: Whether to list `None` and `optax.MaskedNode` as well, which are not leaves. They mark the
            rest of the parameters in the parts that `optax.masked` and `optax.partition` pass on.

    Raises:
        ValueError: If two leaves have the same path, as in `{"a/b": x, "a": {"b": y}}`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    # Masked siblings count, so that a field `value` has the same name in the whole tree and in a part of it.
    siblings = collections.Counter(key_path[:-1] for key_path, _ in flat)

    def path(key_path):
        wrapped = key_path and key_path[-1] == _VALUE and siblings[key_path[:-1]] == 1
        return jax.tree_util.keystr(key_path[:-1] if wrapped else key_path, simple=True, separator="/")

    paths = [path(key_path) for key_path, _ in flat]
    if len(set(paths)) < len(paths):
        twice = min(name for name, n in collections.Counter(paths).items() if n > 1)
        raise ValueError(
            f"The paths of leaves must be unique, and two leaves have the path {twice!r}; rename a key that "
            'contains "/".'
        )
    leaves = zip(paths, (leaf for _, leaf in flat), strict=True)
    return [(name, leaf) for name, leaf in leaves if masked or not _is_masked(leaf)]


def _is_masked(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def check_expressions(name: str, patterns: Iterable[Any], what: str = "regular expressions") -> None:
    """Raises unless every pattern is a string and a regular expression."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{name} must be {what}, got {pattern!r}, which is not a string.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} must be {what}, got {pattern!r}: {error}.") from error


def check_patterns(patterns: Iterable[str], tree: Any) -> None:
    """Raises unless every pattern matches at least one leaf of the tree, masked leaves included."""
    paths = [path for path, _ in paths_and_leaves(tree, masked=True)]
    for pattern in patterns:
        if paths and not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"The pattern {pattern!r} matches no leaf; the leaves are {', '.join(paths)}.")


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first pattern found in a path, or None."""
    return next((pattern for pattern in patterns if re.search(pattern, path)), None)


def masked_leaves(mask: Any, params: Any) -> list[bool]:
    """Returns the mask's value for each leaf of `params`; True for all without a mask.

    Leaves are matched by path, not by tree structure, so that a mask made from `nnx.state` fits the unwrapped
    tree that `nnx.Optimizer` passes to `update`.

    Args:
        mask: A tree of bools like the parameters or a prefix of it, a function from the parameters to one, or
            None.
        params: The parameters, or a part of them.

    Raises:
        ValueError: If a value is not a bool, or if the mask has a leaf that is not in `params` or lacks one.
    """
    tree = mask_of(mask, params)
    paths = [path for path, _ in paths_and_leaves(params)]
    if tree is None:
        return [True] * len(paths)
    entries = dict(paths_and_leaves(tree))
    # The mask covers the whole tree, including leaves that `optax.masked` or `optax.partition` hide.
    places = [path for path, _ in paths_and_leaves(params, masked=True)]
    known = {prefix for path in places for prefix in _prefixes(path)}
    for path, value in entries.items():
        if not is_bool(value):
            raise ValueError(f"mask must hold bools, got {value!r} at {path!r}.")
        if places and path not in known and path not in _empty_places(params):
            raise ValueError(f"mask has a leaf {path!r} that is not in params.")
    found = []
    for path in paths:
        match = next((prefix for prefix in _prefixes(path) if prefix in entries), None)
        if match is None:
            raise ValueError(f"mask has no value for the leaf {path!r} of params.")
        found.append(bool(entries[match]))
    return found


def _empty_places(tree: Any) -> set[str]:
    """The paths of subtrees without leaves, such as a module without parameters."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: jax.tree.structure(node).num_nodes == 1
    )
    paths = (jax.tree_util.keystr(key_path, simple=True, separator="/") for key_path, _ in flat)
    return {prefix for path in paths for prefix in _prefixes(path)}


def _prefixes(path: str) -> list[str]:
    """The path, then its parents, down to the root."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]

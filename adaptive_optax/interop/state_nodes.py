"""The states of single transformations inside a state, each with its own arrays by path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.states import children, hyperparameters_of, unwrapped
from adaptive_optax.hyperparams import InjectHyperparamsState
from adaptive_optax.moments.carried import moments_declared_by
from adaptive_optax.moments.formats import dense


class Node(NamedTuple):
    """A transformation's state inside another, with its own fields keyed by leaf path, moments decoded."""

    path: str
    state: Any
    fields: dict[str, dict[str, Any]]


def join(*parts: str) -> str:
    """Joins the parts of a path that are not empty."""
    return "/".join(part for part in parts if part)


def is_state(x: Any) -> bool:
    """Whether a node is a transformation's state and not a moment, a mask or a user's tree."""
    kind = type(x)
    if moments_declared_by(kind) or hyperparameters_of(kind).names:
        return True
    known = kind.__module__.partition(".")[0] in ("adaptive_optax", "optax")
    return known and isinstance(x, tuple) and kind.__name__.endswith("State")


def holds_states(x: Any) -> bool:
    """Whether a node is a state or contains one."""
    return is_state(x) or any(holds_states(child) for _, child in children(x))


def own_fields(state: Any) -> dict[str, Any]:
    """Returns the fields of a state that hold no other states."""
    return {name: value for name, value in children(state) if not holds_states(value)}


def nodes(x: Any, path: str) -> Iterator[Node]:
    """Finds all states at a path or below it, the outer ones first."""
    if is_state(x):
        moments = moments_declared_by(type(x))
        own = {name: dense(value) if name in moments else value for name, value in own_fields(x).items()}
        leaves = {name: named_leaves(x, name, value) for name, value in own.items()}
        yield Node(path, x, {name: {p: unwrapped(leaf) for p, leaf in of} for name, of in leaves.items()})
    for key, child in children(x):
        yield from nodes(child, join(path, str(key)))


def named_leaves(x: Any, field: str, value: Any) -> list[tuple[str, Any]]:
    """Lists the leaves of a state's field, with names by which they can be matched in another state."""
    leaves = paths_and_leaves(value)
    if not isinstance(x, InjectHyperparamsState):
        return leaves
    # These are numbered in the state, and the numbers change if the set of injected hyperparameters does.
    names = sorted(x.hyperparams)
    if field in ("given_values", "overrides"):
        return [(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    if field == "schedule_states":
        return [(join(",".join(names), path), leaf) for path, leaf in leaves]
    return leaves

"""Finding and replacing the states of transformations at any depth of an optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

State = TypeVar("State")


def states_of(kind: type[State] | tuple[type[State], ...], opt_state: Any) -> list[State]:
    """Lists the states of a type (or tuple of types), not those inside another of the same type."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def one_state_of(kind: type[State], opt_state: Any, owner: str) -> State:
    """Returns the one state of a type.

    Raises:
        ValueError: If there is none, or more than one; `owner` makes such states.
    """
    found = states_of(kind, opt_state)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one state of {owner}, got {len(found)}.")
    return found[0]


def replace_states(kind: Any, opt_state: Any, f: Callable[[Any], Any]) -> Any:
    """Returns the state with `f` of each state of a type (or tuple of types) in its place."""

    def is_kind(node):
        return isinstance(node, kind)

    return jax.tree.map(lambda node: f(node) if is_kind(node) else node, opt_state, is_leaf=is_kind)


def unwrapped(value: Any) -> Any:
    """Returns the array in an nnx Variable, or the value itself."""
    return value.get_value() if hasattr(value, "get_value") else value

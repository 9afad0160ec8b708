"""Finding and replacing the states of transformations at any depth of an optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

State = TypeVar("State")


class Hyperparameters(NamedTuple):
    """The hyperparameters that states of a type carry.

    Attributes:
        names: Their names, which are attributes of the state.
        set_value: `set_value(state, name, value) -> state`, where a value of None goes back to the given
            one; None if the hyperparameters are read-only.
    """

    names: tuple[str, ...] = ()
    set_value: Callable[[Any, str, Any], Any] | None = None


# Keyed by the type of a state. It cannot be an annotated attribute, which in a NamedTuple would be a field.
_HYPERPARAMETERS: dict[type, Hyperparameters] = {}


def carries_hyperparameters(
    *names: str, set_value: Callable[[Any, str, Any], Any] | None = None
) -> Callable[[type[State]], type[State]]:
    """Declares the hyperparameters of a state for `get_hyperparams` and `set_hyperparams`.

    Args:
        *names: The names of the hyperparameters, which are attributes of the state: scalar arrays with the
            values that the last step used, or that the first one will use.
        set_value: `set_value(state, name, value) -> state` returns a state with another value of a
            hyperparameter, or for None the given one again. None (default) if they are read-only;
            `inject_hyperparams` then makes them settable.

    Returns:
        A decorator for the type of the state. It returns the type itself. A subclass inherits the
        declaration; another one for the same type replaces it.

    Raises:
        ValueError: If a name is not a string; when the type is decorated, if it has no such attribute.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp
        >>> from typing import NamedTuple
        >>> @ao.carries_hyperparameters("temperature")
        ... class AnnealState(NamedTuple):
        ...     temperature: jax.Array
        >>> ao.get_hyperparams(AnnealState(jnp.float32(0.5)))
        {'temperature': Array(0.5, dtype=float32)}
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"carries_hyperparameters needs the names of hyperparameters, got {name!r}.")

    def declare(state_type):
        for name in names:
            if not hasattr(state_type, name):
                raise ValueError(f"carries_hyperparameters: {state_type.__name__} has no attribute {name!r}.")
        _HYPERPARAMETERS[state_type] = Hyperparameters(names, set_value)
        return state_type

    return declare


def hyperparameters_of(state_type: type) -> Hyperparameters:
    """Returns the hyperparameters that states of a type carry; an empty declaration for other types."""
    declared = (_HYPERPARAMETERS[kind] for kind in state_type.__mro__ if kind in _HYPERPARAMETERS)
    return next(declared, Hyperparameters())


def children(node: Any) -> list[tuple[Any, Any]]:
    """Lists the parts of a container in a state, with their field names, keys or indices; none for a leaf."""
    if isinstance(node, dict):
        return list(node.items())
    if hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    return list(enumerate(node)) if isinstance(node, tuple | list) else []


def with_children(node: Any, new: list[Any]) -> Any:
    """Returns a container like `node` with other parts, in the order of `children`."""
    if isinstance(node, dict):
        return type(node)(zip(node, new, strict=True))
    return type(node)(*new) if hasattr(node, "_fields") else type(node)(new)


def states_of(kind: type[State] | tuple[type[State], ...], opt_state: Any) -> list[State]:
    """Lists the states of a type (or tuple of types), except those nested in another of the same type."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def one_state_of(kind: type[State], opt_state: Any, owner: str) -> State:
    """Returns the only state of a type.

    Raises:
        ValueError: If there is none or more than one. `owner` is the factory that makes such states.
    """
    found = states_of(kind, opt_state)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one state of {owner}, got {len(found)}.")
    return found[0]


def replace_states(kind: Any, opt_state: Any, f: Callable[[Any], Any]) -> Any:
    """Replaces each state of a type (or tuple of types) with `f` of it."""

    def is_kind(node):
        return isinstance(node, kind)

    return jax.tree.map(lambda node: f(node) if is_kind(node) else node, opt_state, is_leaf=is_kind)


def has_own_rejection(node: Any) -> bool:
    """Whether a state decides what it keeps when a wrapper rejects its step.

    If so, `old.kept_at_rejection(new)` is the state that remains; otherwise the old state does.
    """
    return hasattr(type(node), "kept_at_rejection")


def unwrapped(value: Any) -> Any:
    """Returns the array in an nnx Variable, or the value itself."""
    return value.get_value() if hasattr(value, "get_value") else value

"""Hyperparameters in the state: what the last step used."""

from __future__ import annotations

import itertools
from typing import Any

import jax


def get_hyperparams(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the hyperparameters that the last step used.

    Every state of this library carries the values that may move: learning rate, decays, eps, momentum,
    weight decay. Before the first step they are those of the first step.

    Args:
        opt_state: The state of any transformation, at any depth of `optax.chain`, `optax.partition` and
            wrappers; also `nnx.Optimizer(...).opt_state`.

    Returns:
        Name to scalar array. A name that occurs once stands bare; one that occurs more often has before it
        what tells its occurrences apart, a chain index or a partition label: `"0/decay"`, `"head/b1"`.

    Raises:
        ValueError: If there is none, as in an optimizer in place of its state.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> state = ao.adam(ao.exponential_decay(0.1, 100, 0.5)).init(jnp.ones(2))
        >>> sorted(ao.get_hyperparams(state))
        ['b1', 'b2', 'eps', 'learning_rate']
    """
    found = list(_walk(opt_state, ()))
    if not found:
        raise ValueError(
            f"opt_state holds no hyperparameters of this library, got a {type(opt_state).__name__}; pass the "
            "state that the transformation's init returned, or the optimizer's `.opt_state`."
        )
    result = {}
    for place, name, value in found:
        others = [p for p, n, _ in found if n == name and p != place]
        result["/".join([*_telling(place, others), name])] = value
    return result


def _walk(state: Any, place: tuple[str, ...]):
    # Variables of nnx: OptVariable and OptArray wrap arrays, never containers that hold hyperparameters.
    if hasattr(state, "hyperparameters"):
        for name in state.hyperparameters:
            yield place, name, _unwrapped(getattr(state, name))
    if isinstance(state, dict):
        children = state.items()
    elif hasattr(state, "_fields"):
        children = state._asdict().items()
    elif isinstance(state, tuple | list):
        children = enumerate(state)
    else:
        return
    for key, child in children:
        yield from _walk(child, (*place, str(key)))


def _telling(place: tuple[str, ...], others: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest part of a place that tells it from the others, without what all of them begin with."""
    if not others:
        return ()
    together = zip(place, *others, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, together))
    ends = (n for n in range(shared, len(place)) if all(other[:n] != place[:n] for other in others))
    return place[shared : next(ends, len(place))]


def _unwrapped(value: Any) -> jax.Array:
    return value.get_value() if hasattr(value, "get_value") else value

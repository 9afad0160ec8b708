"""How a value that the user sets in a state overrides the one given by the number or the schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adaptive_optax._core.precision import cast
from adaptive_optax._core.ranges import check_members, check_stored
from adaptive_optax._core.states import unwrapped


def assigned(name: str, value: Any, like: jax.Array) -> jax.Array:
    """Returns a state's entry for a hyperparameter as a scalar, after checks, since users can assign it.

    Raises:
        ValueError: If it is not a real scalar, or is a number out of range.
    """
    if like.ndim == 0:  # states made under vmap are updated under vmap
        if not isinstance(value, jax.Array):
            check_stored(name, value, like.dtype)
        elif value.ndim or not jnp.can_cast(value.dtype, like.dtype, "same_kind"):
            raise ValueError(
                f"{name} must be a scalar of type {like.dtype} in the state, got {jax.typeof(value)}."
            )
    return cast(value, like.dtype)


def replacement(name: str, value: Any, given: Any, overridden: Any) -> tuple[Any, Any]:
    """Returns a state's new entry for a hyperparameter, and its flag, after `set_hyperparams`.

    Args:
        name: Its name.
        value: The value; None goes back to what was given.
        given: The value that the number or schedule gave, in the state.
        overridden: The flag in the state.

    Raises:
        ValueError: If the value is not a scalar in its range.
    """
    if value is not None:
        check_members(name, value, given)
    new = filled_like(given, unwrapped(given) if value is None else value)
    return new, filled_like(overridden, value is not None)


def filled_like(like: Any, value: Any) -> Any:
    """Returns a value with the dtype, the shape and (in nnx) the Variable of a state's entry."""
    array = unwrapped(like)
    new = jnp.broadcast_to(jnp.asarray(value, array.dtype), array.shape) + jnp.zeros_like(array)
    return like.replace(new) if hasattr(like, "get_value") else new


def in_effect(
    current: jax.Array, before: jax.Array, overridden: jax.Array, given: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the value of a hyperparameter in this step, whether the user set it, and the next `before`.

    Args:
        current: The value in the state.
        before: The value given in the last step. If `current` differs, it was assigned since.
        overridden: Whether a value was set before.
        given: The value given in this step, by the number or the schedule.
    """
    # A NaN from a schedule is not an assignment.
    overridden = jnp.asarray(overridden, jnp.bool_) | (
        (current != before) & ~(jnp.isnan(current) & jnp.isnan(before))
    )
    # Zero if nothing was set. It lets gradients flow to a `current` that was set to the same value as given.
    difference = _finite(before) - _finite(current)
    value = jnp.where(overridden, current, given - difference)
    # A compiler may compute `given` twice, rounding it in two ways. The state would then hold two values that
    # differ although nothing was assigned, and the schedule would stand still.
    return value, overridden, jnp.where(overridden, given, _with_gradient_of(given, value))


@jax.custom_jvp
def _with_gradient_of(given: jax.Array, value: jax.Array) -> jax.Array:
    """The bits of `value`, differentiated as `given`."""
    del given
    return value


@_with_gradient_of.defjvp
def _with_gradient_of_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _with_gradient_of(*primals), tangents[0]


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))

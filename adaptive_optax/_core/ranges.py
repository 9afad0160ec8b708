"""The range of each hyperparameter, and how a value set in a state overrides the given one.

Constructors, `set_hyperparams`, schedules and the command line all check against this table. They check the
value as it will be stored: a learning rate of 1e300 is invalid where float32 makes it inf, and so is a decay
that rounds to 1 in the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._core.checks import check_scalar, in_interval
from adaptive_optax._core.precision import cast, incremented
from adaptive_optax._core.states import unwrapped

# Hyperparameters of transformations. A name that two factories use differently is qualified by one of them.
RANGES = {
    "learning_rate": "[0, inf)",
    "b1": "[0, 1)",
    "b2": "[0, 1)",
    "decay": "[0, 1)",
    "momentum": "[0, 1)",
    "eps": "[0, inf)",
    "eps_root": "[0, inf)",
    "initial_scale": "[0, inf)",
    "weight_decay": "[0, inf)",
    "decay_schedule": "[0, inf)",
    "max_norm": "(0, inf]",
    "power": "[0, inf)",
    "factor": "(0, 1)",
    "rtol": "[0, inf)",
    "atol": "[0, inf)",
    "min_scale": "[0, 1]",
    "init_scale": "(0, inf)",
    "growth_factor": "[1, inf)",
    "backoff_factor": "(0, 1)",
    "minimum_scale": "(0, inf)",
    "maximum_scale": "(0, inf)",
    "reduce_on_plateau.scale": "[0, inf)",
    "add_decoupled_weight_decay.schedule": "[0, inf)",
}
SCHEDULE_RANGES = {
    "init_value": "[0, inf)",
    "peak_value": "[0, inf)",
    "base_value": "[0, inf)",
    "end_value": "[0, inf)",
    "decay_rate": "(0, inf)",
    "step_decay.factor": "(0, inf)",
    "gamma": "(0, 1]",
    "max_momentum": "[0, 1)",
    "base_momentum": "[0, 1)",
    "div_factor": "[1, inf)",
    "final_div_factor": "(0, inf)",
    "peak_factor": "(0, inf)",
}


_KEPT_AS_COMPLEMENTS = ("b1", "b2", "decay")  # if they are numbers, by `moments.ema.decay_at`


def range_of(name: str, owner: str = "") -> str:
    """Returns the range of a hyperparameter or a schedule's argument, specific to `owner` if there is one."""
    ranges = RANGES | SCHEDULE_RANGES
    return ranges.get(f"{owner}.{name}") or ranges[name]


def check_hyperparameter(
    name: str,
    value: Any,
    *,
    schedule: bool = False,
    owner: str = "",
    interval: str | None = None,
    dtype: Any = None,
) -> None:
    """Raises unless a hyperparameter is a scalar in its range, both as given and as stored.

    Args:
        name: The hyperparameter, a key of `RANGES` or `SCHEDULE_RANGES`.
        value: A Python or NumPy number, a scalar array, or a tracer (whose value cannot be checked).
        schedule: Whether to accept a function of the step count as well.
        owner: The factory, for names whose range depends on it.
        interval: The range, if it depends on another argument; None for the one in the table.
        dtype: The dtype in which it is stored. None for a number that a constructor keeps and a state stores
            in JAX's widest enabled dtype, float32 or float64.

    Raises:
        ValueError: With the name, the value and the range.
    """
    interval = range_of(name, owner) if interval is None else interval
    check_scalar(name, value, interval, schedule=schedule)
    if isinstance(value, Tracer) or callable(value):
        return
    stored = jax.dtypes.canonicalize_dtype(np.float64) if dtype is None else np.dtype(dtype)
    number = float(value)
    with np.errstate(over="ignore"):
        # For these decays a constructor keeps the complement in double precision, so that is what is rounded.
        if dtype is None and name in _KEPT_AS_COMPLEMENTS:
            rounded = 1 - float(np.asarray(1 - number).astype(stored))
        else:
            rounded = float(np.asarray(number).astype(stored))
    if not in_interval(rounded, interval):
        expected = f"a number in {interval}" + (" or a schedule of the step count" if schedule else "")
        raise ValueError(f"{name} must be {expected}, got {value!r}, which is {rounded} in {stored}.")


def as_hyperparameter(name: str, value: Any, *, owner: str = "") -> Any:
    """Checks a number and returns it; returns a schedule wrapped so that its concrete values are checked.

    Raises:
        ValueError: As `check_hyperparameter` does; the schedule raises if a concrete value is out of range.
    """
    check_hyperparameter(name, value, schedule=True, owner=owner)
    return _CheckedSchedule(name, value, range_of(name, owner)) if callable(value) else value


@dataclasses.dataclass(frozen=True)
class _CheckedSchedule:
    """A schedule that raises if a concrete value is out of range."""

    name: str
    schedule: Callable[[Any], Any]
    interval: str

    def __call__(self, count: Any) -> Any:
        value = self.schedule(count)
        # Non-scalars are refused where they are used, traced or not.
        if value is not None and not isinstance(value, Tracer) and np.ndim(value) == 0:
            try:
                # The complement of a schedule's value is formed after it is stored.
                dtype = jax.dtypes.canonicalize_dtype(np.float64)
                check_hyperparameter(self.name, value, interval=self.interval, dtype=dtype)
            except ValueError as error:
                raise ValueError(f"{error} From the schedule {self.schedule!r} at count {count}.") from None
        return value


def schedule_state(*hyperparameters: Any) -> optax.EmptyState | optax.ScaleByScheduleState:
    """Returns the step count that schedules need, or an empty state if all are numbers.

    As in optax, so that `optax.tree_utils.tree_get(state, "count")` finds as many counts as in its states.
    """
    if any(callable(x) for x in hyperparameters):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def step_of(state: Any) -> jax.Array:
    """Returns the count in a schedule's state, or 0 if there is no schedule."""
    return jnp.asarray(state.count if isinstance(state, optax.ScaleByScheduleState) else 0, jnp.int32)


def next_schedule_state(state: Any) -> Any:
    """Returns a schedule's state, advanced by one step."""
    if isinstance(state, optax.ScaleByScheduleState):
        return optax.ScaleByScheduleState(incremented(step_of(state)))
    return state


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


def check_stored(name: str, value: Any, dtype: Any, owner: str = "") -> None:
    """Raises unless a state can hold a value. Names that this library does not use may have any number."""
    interval = range_of(name, owner) if owner or name in RANGES else "(-inf, inf)"
    check_hyperparameter(name, value, interval=interval, dtype=dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        is_tracer = isinstance(value, Tracer)
        if not (jnp.issubdtype(value.dtype, jnp.integer) if is_tracer else value == int(value)):
            raise ValueError(f"{name} must be an integer, like the number that was given, got {value!r}.")


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


def check_members(name: str, value: Any, like: Any, owner: str = "") -> None:
    """Raises unless a value is a scalar, or an array with one per member if the state was made under vmap.

    A name that no transformation of this library uses may have any finite number.
    """
    array, members = unwrapped(like), [value]
    if array.shape and np.shape(value) == array.shape:
        members = [jnp.ravel(value)[0]] if isinstance(value, Tracer) else np.ravel(value)
    for member in members:
        check_stored(name, member, array.dtype, owner)


def filled_like(like: Any, value: Any) -> Any:
    """Returns a value with the dtype, the shape and (in nnx) the Variable of a state's entry."""
    array = unwrapped(like)
    new = jnp.broadcast_to(jnp.asarray(value, array.dtype), array.shape) + jnp.zeros_like(array)
    return like.replace(new) if hasattr(like, "get_value") else new


def in_effect(
    current: jax.Array, before: jax.Array, overridden: jax.Array, given: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the value of a hyperparameter in this step, and whether the user set it.

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
    return jnp.where(overridden, current, given - difference), overridden


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))

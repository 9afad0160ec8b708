"""The range of each hyperparameter.

Constructors, `set_hyperparams`, schedules and the command line all check against this table. They check the
value as it will be stored: a learning rate of 1e300 is invalid where float32 makes it inf, and so is a decay
that rounds to 1 in the state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adaptive_optax._core.checks import check_scalar, in_interval
from adaptive_optax._core.states import unwrapped

# Hyperparameters of transformations. A name that two factories use differently is qualified by one of them.
RANGES = {
    "learning_rate": "[0, inf)",
    "adgd.learning_rate": "(0, inf)",
    "max_learning_rate": "[0, inf]",
    "initial_learning_rate": "(0, inf)",
    "tolerance": "(0, 10]",
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
    "integral": "(0, inf)",
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


def check_stored(name: str, value: Any, dtype: Any, owner: str = "") -> None:
    """Raises unless a state can hold a value. Names that this library does not use may have any number."""
    interval = range_of(name, owner) if owner or name in RANGES else "(-inf, inf)"
    check_hyperparameter(name, value, interval=interval, dtype=dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        is_tracer = isinstance(value, Tracer)
        if not (jnp.issubdtype(value.dtype, jnp.integer) if is_tracer else value == int(value)):
            raise ValueError(f"{name} must be an integer, like the number that was given, got {value!r}.")


def check_members(name: str, value: Any, like: Any, owner: str = "") -> None:
    """Raises unless a value is a scalar, or an array with one per member if the state was made under vmap.

    A name that no transformation of this library uses may have any finite number.
    """
    array, members = unwrapped(like), [value]
    if array.shape and np.shape(value) == array.shape:
        members = [jnp.ravel(value)[0]] if isinstance(value, Tracer) else np.ravel(value)
    for member in members:
        check_stored(name, member, array.dtype, owner)

"""Hyperparameters that are numbers or schedules: their values at a step, and the counts of schedules."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._core.precision import incremented
from adaptive_optax._core.ranges import check_hyperparameter, range_of
from adaptive_optax._core.states import unwrapped
from adaptive_optax._core.trees import Count

ScheduleState: TypeAlias = optax.EmptyState | optax.ScaleByScheduleState
"""The step count if a hyperparameter is a schedule; nothing if all are numbers."""


_Factory = TypeVar("_Factory", bound=Callable[..., Any])


def keeps_schedules(*names: str) -> Callable[[_Factory], _Factory]:
    """Declares arguments of a factory whose schedules `inject_hyperparams` passes on as they are."""

    def declare(factory):
        setattr(factory, "keeps_schedules", frozenset(names))  # noqa: B010 (functions declare no such attribute)
        return factory

    return declare


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

    def __repr__(self) -> str:
        return repr(self.schedule)

    def __call__(self, count: Any) -> Any:
        value = self.schedule(count)
        # Non-scalars are refused where they are used, traced or not.
        if value is not None and not isinstance(value, Tracer) and np.ndim(value) == 0:
            try:
                # The complement of a schedule's value is formed after it is stored.
                dtype = jax.dtypes.canonicalize_dtype(np.float64)
                check_hyperparameter(self.name, value, interval=self.interval, dtype=dtype)
            except ValueError as error:
                at = "" if isinstance(count, Tracer) else f" at count {count}"
                raise ValueError(f"{error} From the schedule {self.schedule!r}{at}.") from None
        return value


def schedule_state(*hyperparameters: Any) -> ScheduleState:
    """Returns the step count that schedules need, or an empty state if all are numbers.

    As in optax, so that `optax.tree_utils.tree_get(state, "count")` finds as many counts as in its states.
    """
    if any(callable(x) for x in hyperparameters):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def step_of(state: Any) -> Count:
    """Returns the count in a schedule's state, or 0 if there is no schedule."""
    return jnp.asarray(state.count if isinstance(state, optax.ScaleByScheduleState) else 0, jnp.int32)


def next_schedule_state(state: Any) -> Any:
    """Returns a schedule's state, advanced by one step."""
    if isinstance(state, optax.ScaleByScheduleState):
        return optax.ScaleByScheduleState(incremented(step_of(state)))
    return state


def static_value(value: Any) -> float | None:
    """Returns a hyperparameter's value if it is known while tracing, or None for a schedule or a tracer."""
    if callable(value) or isinstance(value, Tracer):
        return None
    return float(value)


_UNEVALUATED = contextvars.ContextVar("_UNEVALUATED", default=False)


@contextlib.contextmanager
def unevaluated() -> Iterator[None]:
    """Makes `value_at` return zeros of the right dtype, for a state of which only the shapes matter.

    A schedule may be a plain Python function, which abstract evaluation cannot run.
    """
    token = _UNEVALUATED.set(True)
    try:
        yield
    finally:
        _UNEVALUATED.reset(token)


def value_at(hyperparameter: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """Evaluates a number, an array or a schedule at a step count, as a strongly typed scalar.

    Raises:
        ValueError: If a schedule does not return a scalar, or a finite value overflows in `dtype`.
    """
    if _UNEVALUATED.get():
        return jnp.zeros((), dtype)
    value: Any = hyperparameter(count) if callable(hyperparameter) else hyperparameter
    if value is None or (value.ndim if isinstance(value, jax.Array) else np.ndim(value)):
        raise ValueError(f"A schedule must return a scalar, got {value!r} from {hyperparameter!r}.")
    known = static_value(value)
    limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype)
    if known is not None and math.isfinite(known) and abs(known) > float(limits.max):
        raise ValueError(f"A hyperparameter must fit in {jnp.dtype(dtype)}, got {known!r}.")
    # Via a Python float, so that a NumPy float64 is rounded once and the result is strongly typed. A copy, so
    # that donating the state does not delete the caller's array.
    return jnp.array(value if known is None else known, dtype)


def known_scalar(x: Any) -> float | None:
    """Returns the value of a state's scalar, or None if it is traced or abstract."""
    x = unwrapped(x)
    return None if isinstance(x, jax.ShapeDtypeStruct) else static_value(x)

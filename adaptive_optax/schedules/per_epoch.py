"""A schedule of the epoch as a schedule of the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_bool, check_integer
from adaptive_optax.schedules._length import ENDLESS, length_of, with_length
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_real


def per_epoch(schedule: optax.Schedule, steps_per_epoch: int, *, fractional: bool = False) -> optax.Schedule:
    r"""Turns a schedule of the epoch into a schedule of the step.

    For recipes written in epochs, independent of the batch size: `per_epoch(step_decay(0.1, 0.8, 5), n)`
    changes the value every 5 epochs of n steps.

    $$
    \eta_t = \eta(\lfloor t / n \rfloor) \quad\text{or, if fractional,}\quad \eta(t / n)
    $$

    with $n$ = `steps_per_epoch`.

    Args:
        schedule: A function of the number of completed epochs. Every schedule of this library also accepts
            the float count that `fractional` passes.
        steps_per_epoch: The number of steps per epoch, at least 1.
        fractional: Whether `schedule` receives the real-valued epoch $t / n$, a float, not the number of
            completed epochs, an integer. Integer division separates whole epochs from the fraction before the
            two are added, so that a float32 resolves every step as long as t is below 2**24. Default False:
            the value changes between epochs, as in recipes that set it once per epoch.

    Returns:
        A schedule of the step count. Its values are those of `schedule`, as strongly typed arrays.

    Raises:
        ValueError: If `schedule` is not callable or `steps_per_epoch` is out of its range.

    Examples:
        >>> import adaptive_optax as ao
        >>> schedule = ao.per_epoch(ao.step_decay(0.1, 0.5, every=2), steps_per_epoch=100)
        >>> [round(float(schedule(count)), 4) for count in (0, 199, 200)]
        [0.1, 0.1, 0.05]
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the epoch, got {schedule!r}.")
    check_integer("steps_per_epoch", steps_per_epoch, f"[1, {MAX_STEPS}]")
    check_bool("fractional", fractional)
    steps = int(steps_per_epoch)

    def of_steps(count: ArrayLike) -> jax.Array:
        count = as_count(count)
        epoch = count // steps
        if fractional:
            epoch = as_real(epoch) + as_real(count % steps) / steps
        value = schedule(epoch)
        return jnp.asarray(value, jnp.result_type(value))

    epochs = length_of(schedule)
    if epochs is None:
        return of_steps
    return with_length(of_steps, ENDLESS if epochs == ENDLESS else epochs * steps)

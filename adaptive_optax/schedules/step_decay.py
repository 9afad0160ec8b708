"""A constant factor at regular intervals, such as "times 0.8 every 5 epochs"."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.schedules._steps import MAX_STEPS
from adaptive_optax.schedules.exponential_decay import exponential_decay


def step_decay(init_value: ArrayLike, factor: ArrayLike, every: int) -> optax.Schedule:
    r"""Multiplies a value by `factor` at regular intervals.

    The classic schedule for image classification. "0.8 every 5 epochs" is
    `step_decay(learning_rate, 0.8, 5 * steps_per_epoch)`.

    $$
    \eta_t = \eta_0\, f^{\lfloor t / n \rfloor}
    $$

    with $\eta_0$ = `init_value`, $f$ = `factor`, $n$ = `every`.

    Args:
        init_value: The first value, at least 0.
        factor: The factor, above 0; below 1 for a decay.
        every: The number of steps between two changes, at least 1. The first change is at t = `every`.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> schedule = step_decay(0.1, 0.5, every=200)
        >>> [round(float(schedule(count)), 4) for count in (0, 199, 200, 400)]
        [0.1, 0.1, 0.05, 0.025]

    Source: Ge, Kakade, Kidambi and Netrapalli (2019), "The step decay schedule", which shows that it is near
    optimal for least squares.
    """
    check_hyperparameter("factor", factor, owner="step_decay")
    check_integer("every", every, f"[1, {MAX_STEPS}]")
    return exponential_decay(init_value, every, factor, staircase=True)

"""Warm-up, then a decay with the inverse square root of the step count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.schedules._length import ENDLESS, with_length
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_number, as_real


def inverse_sqrt(peak_value: ArrayLike, warmup_steps: int) -> optax.Schedule:
    r"""Warms up linearly, then decays with the inverse square root of the step count.

    For long runs without a fixed end: the decay is slow and never reaches 0.

    $$
    \eta_t = \hat\eta \min\left(t / W, \sqrt{W / t}\right)
    $$

    with $\hat\eta$ = `peak_value`, $W$ = `warmup_steps`. At $t = 0$ the value is 0 (the paper counts from 1).
    $W$ also sets the time scale of the decay, so $W = 0$ would be 0 everywhere and is an error. With $W = 1$
    only the first step is a warm-up.

    Args:
        peak_value: The value at the end of the warm-up, at least 0.
        warmup_steps: The length of the warm-up, at least 1.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> schedule = inverse_sqrt(0.1, warmup_steps=100)
        >>> [round(float(schedule(count)), 4) for count in (0, 50, 100, 400)]
        [0.0, 0.05, 0.1, 0.05]

    Source: Vaswani et al. (2017), "Attention is all you need", equation 3, in which the peak is
    (model width · warm-up steps)^(-1/2) instead of an argument.
    """
    check_hyperparameter("peak_value", peak_value)
    check_integer("warmup_steps", warmup_steps, f"[1, {MAX_STEPS}]")
    peak, warmup = as_number(peak_value), int(warmup_steps)

    def schedule(count: ArrayLike) -> jax.Array:
        count = as_count(count)
        time = as_real(count) / warmup
        return as_real(peak) * jnp.where(count < warmup, time, 1.0 / jnp.sqrt(jnp.maximum(time, 1.0)))

    return with_length(schedule, ENDLESS)

"""Cyclical learning rates: a triangle wave between two values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_choice, check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.values import static_value
from adaptive_optax.schedules._length import ENDLESS, with_length
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_number, as_real, power

_MODES = ("triangular", "triangular2", "exp_range")


def cyclical(
    base_value: ArrayLike,
    peak_value: ArrayLike,
    half_cycle: int,
    mode: str = "triangular",
    gamma: ArrayLike = 1.0,
) -> optax.Schedule:
    r"""Cycles up and down between two values indefinitely.

    Use it to explore a range of learning rates within one run, or to take snapshots at the low points. A
    `peak_value` below `base_value` cycles downwards, which suits a momentum that mirrors the learning rate.

    $$
    c = \lfloor 1 + t / 2s \rfloor, \qquad x = |t / s - 2c + 1|, \qquad
    \eta_t = \eta_b + (\hat\eta - \eta_b) \max(0, 1 - x)\, k
    $$

    with $\eta_b$ = `base_value`, $\hat\eta$ = `peak_value`, $s$ = `half_cycle`, and $k = 1$ ("triangular"),
    $2^{1-c}$ ("triangular2") or $\gamma^t$ ("exp_range"). The cycle $c$ and the position in it are integers.

    Args:
        base_value: The value at the beginning of every cycle, at least 0. May be traced.
        peak_value: The value in the middle of the first cycle, at least 0. May be traced.
        half_cycle: The number of steps from one value to the other, at least 1. Smith advises 2 to 10 epochs.
        mode: "triangular", "triangular2" (each cycle is half as high as the previous one) or "exp_range" (the
            height is multiplied by `gamma` each step). Default "triangular", the first in the paper.
        gamma: The factor per step in "exp_range", in (0, 1]; must be left at its default in the other modes.
            Default 1.0: constant height. May be traced.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range, or `gamma` is given to a mode that does not use it.

    Examples:
        >>> schedule = cyclical(0.001, 0.005, half_cycle=100)
        >>> [round(float(schedule(count)), 4) for count in (0, 50, 100, 200)]
        [0.001, 0.003, 0.005, 0.001]

    Source: Smith (2017), "Cyclical learning rates for training neural networks", section 3.
    """
    check_hyperparameter("base_value", base_value)
    check_hyperparameter("peak_value", peak_value)
    check_integer("half_cycle", half_cycle, f"[1, {MAX_STEPS // 2}]")
    check_choice("mode", mode, _MODES)
    check_hyperparameter("gamma", gamma)
    if mode != "exp_range" and static_value(gamma) != 1.0:
        raise ValueError(
            f"gamma must be left at 1.0 with mode={mode!r}, which does not use it, got {gamma!r}."
        )
    base, peak, factor, half = as_number(base_value), as_number(peak_value), as_number(gamma), int(half_cycle)

    def schedule(count: ArrayLike) -> jax.Array:
        count = as_count(count)
        position = count % (2 * half)
        height = as_real(jnp.minimum(position, 2 * half - position)) / half
        if mode == "triangular2":
            height *= power(0.5, count // (2 * half))
        elif mode == "exp_range":
            height *= power(factor, count)
        return as_real(base) * (1.0 - height) + as_real(peak) * height

    return with_length(schedule, ENDLESS)

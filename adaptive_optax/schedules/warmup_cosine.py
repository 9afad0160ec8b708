"""Warm-up, then half a cosine."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.schedules._phases import Phase, in_phases
from adaptive_optax.schedules._steps import MAX_STEPS, as_number


def warmup_cosine(
    peak_value: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    init_value: ArrayLike = 0.0,
    end_value: ArrayLike = 0.0,
) -> optax.Schedule:
    r"""Warms up linearly, then decays along half a cosine until the end of the run.

    The usual schedule when the length of the run is known. Equal to
    `optax.warmup_cosine_decay_schedule(init_value, peak_value, warmup_steps, total_steps, end_value)`, except
    that the peak may be traced.

    $$
    \eta_t = \begin{cases}
        \eta_0 + (\hat\eta - \eta_0)\, t / W & t < W \\
        \eta_T + (\hat\eta - \eta_T) (1 + \cos \pi x) / 2 & W \le t < T \\
        \eta_T & t \ge T \end{cases}
    \qquad x = \frac{t - W}{T - W}
    $$

    with $\hat\eta$ = `peak_value`, $\eta_0$ = `init_value`, $\eta_T$ = `end_value`, $T$ = `total_steps`,
    $W$ = `warmup_steps`. With $W = T$ the run is all warm-up and the peak is held after it.

    Args:
        peak_value: The value at the end of the warm-up, at least 0.
        total_steps: The number of steps in the run, including warm-up, at least 1.
        warmup_steps: The length of the warm-up, at most `total_steps`. Default 0: start at the peak.
        init_value: The value at step 0 of the warm-up, at least 0. Default 0.
        end_value: The value at the end of the run, at least 0. Default 0.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range, or the warm-up is longer than the run.

    Examples:
        >>> schedule = warmup_cosine(0.1, 1000, warmup_steps=100)
        >>> [round(float(schedule(count)), 4) for count in (0, 50, 100, 550, 1000)]
        [0.0, 0.05, 0.1, 0.05, 0.0]

    Source: Loshchilov and Hutter (2017), "SGDR: stochastic gradient descent with warm restarts", equation 5;
    the warm-up is from Goyal et al. (2017), "Accurate, large minibatch SGD".
    """
    check_hyperparameter("peak_value", peak_value)
    check_integer("total_steps", total_steps, f"[1, {MAX_STEPS}]")
    check_integer("warmup_steps", warmup_steps, f"[0, {total_steps}]", "total_steps is the limit")
    check_hyperparameter("init_value", init_value)
    check_hyperparameter("end_value", end_value)
    peak, first, last = as_number(peak_value), as_number(init_value), as_number(end_value)
    total, warmup = int(total_steps), int(warmup_steps)
    phases = [Phase(0, warmup, first, peak, "linear"), Phase(warmup, total, peak, last, "cosine")]
    return in_phases(phases, total)

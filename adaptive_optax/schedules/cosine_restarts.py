"""Cosine decay with warm restarts: the rate falls along half a cosine, jumps up, and falls again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_integer, check_scalar
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.values import static_value
from adaptive_optax.schedules._length import ENDLESS, with_length
from adaptive_optax.schedules._phases import SHAPES, Phase, in_phases
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_number, as_real, power, steps_since

_SLOWEST_GROWTH = 1.001  # limits the number of periods to about 14,000


def cosine_restarts(
    peak_value: ArrayLike,
    first_period: int,
    *,
    period_factor: float = 1.0,
    warmup_steps: int = 0,
    init_value: ArrayLike = 0.0,
    end_value: ArrayLike = 0.0,
    peak_factor: ArrayLike = 1.0,
) -> optax.Schedule:
    r"""Decays along half a cosine repeatedly, after one linear warm-up.

    For runs without a fixed end that are evaluated at the end of each period, where the rate is lowest, and
    for ensembles of such snapshots. With `period_factor=2` each period is twice as long as the previous one.

    $$
    \eta_t = \begin{cases}
        \eta_0 + (\hat\eta - \eta_0)\, t / W & t < W \\
        \eta_T + (\hat\eta_i - \eta_T) (1 + \cos(\pi s / T_i)) / 2 & t \ge W \end{cases}
    $$

    $s$ steps into period $i = 0, 1, \dots$, with $\hat\eta$ = `peak_value`, $\eta_0$ = `init_value`,
    $\eta_T$ = `end_value`, $W$ = `warmup_steps`, $T_i$ = `first_period * period_factor ** i` rounded to
    whole steps, and $\hat\eta_i$ = `peak_value * peak_factor ** i`, at least $\eta_T$.

    Without warm-up the values equal those of PyTorch's `CosineAnnealingWarmRestarts(T_0, T_mult, eta_min)`
    and of `optax.sgdr_schedule` with the same period lengths, except that the peak may be traced here. There
    is no warm-up in each period.

    Args:
        peak_value: The value after the warm-up and at the first restart, at least 0.
        first_period: The length of the first period, without warm-up, at least 1.
        period_factor: The factor by which the length grows from each period to the next: 1, or at least
            1.001. It cannot be traced. Default 1, as in PyTorch; the paper uses 1 and 2.
        warmup_steps: The length of the warm-up before the first period. Default 0: start at the peak.
        init_value: The value at step 0 of the warm-up, at least 0. Default 0.
        end_value: The value at the end of every period, at least 0. Default 0.
        peak_factor: The factor that multiplies the peak at each restart, above 0. Default 1.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> schedule = cosine_restarts(0.1, 100, period_factor=2, warmup_steps=10)
        >>> [round(float(schedule(count)), 4) for count in (0, 5, 10, 60, 109, 110, 210, 310)]
        [0.0, 0.05, 0.1, 0.05, 0.0, 0.1, 0.05, 0.1]

    Source: Loshchilov and Hutter (2017), "SGDR: stochastic gradient descent with warm restarts", equation 5.
    """
    check_hyperparameter("peak_value", peak_value)
    check_integer("first_period", first_period, f"[1, {MAX_STEPS}]")
    _check_period_factor(period_factor)
    check_integer("warmup_steps", warmup_steps, f"[0, {MAX_STEPS}]")
    check_hyperparameter("init_value", init_value)
    check_hyperparameter("end_value", end_value)
    check_hyperparameter("peak_factor", peak_factor)
    peak, first, last = as_number(peak_value), as_number(init_value), as_number(end_value)
    shrink, warmup = as_number(peak_factor), int(warmup_steps)
    warm_up = in_phases([Phase(0, warmup, first, peak, "linear")], warmup)
    starts, lengths = _periods(int(first_period), float(period_factor))

    def schedule(count: ArrayLike) -> jax.Array:
        count = as_count(count)
        since = jnp.maximum(count - jnp.asarray(warmup, count.dtype), 0)
        period, done, length = _position(since, starts, lengths)
        whole = as_real(length)
        start_weight, end_weight = SHAPES["cosine"](as_real(done) / whole, as_real(length - done) / whole)
        top = jnp.maximum(as_real(peak) * power(shrink, period), as_real(last))
        value = top * start_weight + as_real(last) * end_weight
        return jnp.where(steps_since(warmup, count) < 0, warm_up(count), value)

    return with_length(schedule, ENDLESS)


def _check_period_factor(value: float) -> None:
    check_scalar("period_factor", value, "[1, inf)")
    known = static_value(value)
    if known is None or 1 < known < _SLOWEST_GROWTH:
        raise ValueError(
            f"period_factor must be 1 or a concrete number in [{_SLOWEST_GROWTH}, inf), got {value!r}."
        )


def _periods(first: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """The first steps and lengths of all periods that begin before the largest count; one if equal."""
    starts, lengths = [0], [first]
    while factor > 1 and starts[-1] + lengths[-1] < MAX_STEPS:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(round(min(first * factor ** len(lengths), MAX_STEPS)))
    return np.asarray(starts, np.int64), np.asarray(lengths, np.int64)


def _position(
    since: jax.Array, starts: np.ndarray, lengths: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The index of the period, the steps done in it and its length; exact for integers."""
    if len(starts) == 1:
        length = jnp.asarray(lengths[0], since.dtype)
        period = jnp.floor_divide(since, length)
        done = since - period * length
    else:
        begins = jnp.asarray(starts, since.dtype)
        period = jnp.searchsorted(begins, since, side="right") - 1
        done, length = since - begins[period], jnp.asarray(lengths, since.dtype)[period]
    return period.astype(jnp.result_type(int)), jnp.minimum(done, length), length

"""A schedule for a run that becomes longer or shorter than planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.schedules._length import ENDLESS, length_of, with_length
from adaptive_optax.schedules._steps import LONGEST_RATIO, as_count, as_number, as_real, scaled_steps
from adaptive_optax.schedules.batch_growth import BatchGrowth
from adaptive_optax.schedules.one_cycle import OneCycle

_WARM_UP = 0.1  # the part of the rest in which a hat rises
_Rest = Callable[[jax.Array], jax.Array]  # a function of the steps since `at`


@overload
def replan(
    schedule: OneCycle,
    *,
    at: int,
    total_steps: int,
    planned_steps: int | None = None,
    end_value: ArrayLike | None = None,
    integral: ArrayLike | None = None,
) -> OneCycle: ...


@overload
def replan(
    schedule: optax.Schedule,
    *,
    at: int,
    total_steps: int,
    planned_steps: int | None = None,
    end_value: ArrayLike | None = None,
    integral: ArrayLike | None = None,
) -> optax.Schedule: ...


def replan(
    schedule: optax.Schedule | OneCycle,
    *,
    at: int,
    total_steps: int,
    planned_steps: int | None = None,
    end_value: ArrayLike | None = None,
    integral: ArrayLike | None = None,
) -> optax.Schedule | OneCycle:
    r"""Plans the rest of a run anew, from the value that its schedule has now.

    For a run that becomes longer or shorter than planned, and for a finished one that goes on. Nothing
    before step `at` changes, but for the rounding of compiled code, and there is no jump there. With $a$ =
    `at`, $T$ = `total_steps` and the length $P$ for which $\eta$ = `schedule` was made:

    $$
    \eta'_t = \begin{cases}
        \eta_t & t < a \\
        b(t) + x\,(E - b(T)) & a \le t < T, \quad x = \frac{t - a}{T - a} \\
        \eta'_T & t \ge T
    \end{cases}
    \qquad
    b(t) = \eta\big(a + x \max(P - a, 0)\big)
    $$

    The rest of the plan is stretched to the steps that are left, and ends where it would have ended; values
    between two steps of the plan are interpolated. If nothing is left of the plan, as for a finished run, b
    holds its last value. Schedules without an end, such as `exponential_decay`, `step_decay`, `cyclical`
    and `inverse_sqrt`, just go on.

    With `end_value`, E is that value, and what was not negative stays so; otherwise the last term is left
    out. With `integral`, the rest of the
    schedule has that sum, so that the run moves as far as it should: a hat, which rises from 0 over the
    first 10 % of the steps that are left and falls to 0 at their end, is added to the above. That is the
    warm-up and decay with which finished runs are continued. If the sum is to be smaller, the values are
    multiplied by 1 minus a multiple of the hat.

    Args:
        schedule: A function of the step count, or a `OneCycle`, whose momentum is stretched.
        at: The step from which to plan anew, the number of steps taken, at least 0.
        total_steps: The new number of steps in the run, above `at` and at most 2**30.
        planned_steps: The length for which `schedule` was made, at least 1. Needed for schedules that are
            not from this library, which do not tell it.
        end_value: The value at the end of the run, at least 0. May be traced.
        integral: The sum of the values of all steps from `at` to `total_steps` - 1, above 0, within the
            rounding of the default float type. May be traced. Finding it takes memory and time for each of
            these steps, and `schedule` must run under `jax.vmap`.

    Returns:
        The schedule, which can be planned anew once more.

    Raises:
        ValueError: If an argument is out of its range, the length is unknown, or `integral` is too small to
            be reached by values of at least 0 that begin and end as they should.

    Examples:
        >>> import adaptive_optax as ao
        >>> schedule = ao.warmup_cosine(0.1, 1000)
        >>> longer = ao.replan(schedule, at=500, total_steps=2000)
        >>> [round(float(longer(count)), 4) for count in (499, 500, 1250, 2000)]
        [0.0502, 0.05, 0.0146, 0.0]
        >>> again = ao.replan(schedule, at=1000, total_steps=2000, integral=25.0)  # of a finished run
        >>> [round(float(again(count)), 4) for count in (999, 1000, 1050, 1100, 1550, 2000)]
        [0.0, 0.0, 0.025, 0.05, 0.025, 0.0]

    Source: derived for this library. Warming up again and decaying as in Ibrahim et al. 2024, "Simple and
    scalable strategies to continually pre-train large language models".
    """
    if isinstance(schedule, BatchGrowth):
        raise ValueError(
            "schedule must be a function of the step count: plan the schedule anew that was given to "
            "grow_batch, and call grow_batch with the result; emissions before `at` stay as they are."
        )
    if isinstance(schedule, OneCycle):
        lengths = {"at": at, "total_steps": total_steps, "planned_steps": planned_steps}
        rate = replan(schedule.learning_rate, **lengths, end_value=end_value, integral=integral)
        return OneCycle(rate, replan(schedule.momentum, **lengths))
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the step count, got {schedule!r}.")
    check_integer("at", at, f"[0, {LONGEST_RATIO - 1}]")
    check_integer("total_steps", total_steps, f"[{at + 1}, {LONGEST_RATIO}]", "at is below it")
    if planned_steps is not None:
        check_integer("planned_steps", planned_steps, f"[1, {LONGEST_RATIO}]")
    if end_value is not None:
        check_hyperparameter("end_value", end_value)
    if integral is not None:
        check_hyperparameter("integral", integral)
    planned = length_of(schedule) if planned_steps is None else int(planned_steps)
    if planned is None:
        raise ValueError(
            "planned_steps is needed: only the schedules of this library tell for how many steps they were "
            f"made, got {schedule!r}."
        )
    first, steps = int(at), int(total_steps) - int(at)
    start = schedule(as_count(first))
    if start is None or jnp.ndim(start):
        found = "None" if start is None else f"an array of shape {jnp.shape(start)}"
        raise ValueError(f"schedule must return a number, got {found} at step {first}.")
    rest = _stretched(schedule, first, steps, planned)
    if end_value is not None:
        rest = _ending(rest, steps, as_number(end_value))
    if integral is not None:
        rest = _summing(rest, steps, as_number(integral))

    def replanned(count: ArrayLike) -> jax.Array:
        count = as_count(count)
        since = jnp.clip(count - jnp.asarray(first, count.dtype), 0, steps)
        before = as_real(schedule(jnp.minimum(count, jnp.asarray(first, count.dtype))))
        return jnp.where(count < first, before, rest(since))

    return with_length(replanned, int(total_steps))


def _stretched(schedule: Any, first: int, steps: int, planned: int) -> _Rest:
    """What is left of the plan, as a function of the steps since `first`, in `steps` steps."""
    left = steps if planned == ENDLESS else max(planned - first, 0)

    def rest(since: jax.Array) -> jax.Array:
        if left == steps:
            return as_real(schedule(since + first))
        whole, fraction = scaled_steps(since, left, steps)
        low, high = (as_real(schedule(first + whole + i)) for i in (0, 1))
        return jnp.where(fraction > 0, low + fraction * (high - low), low)

    return rest


def _ending(rest: _Rest, steps: int, end_value: Any) -> _Rest:
    def ending(since: jax.Array) -> jax.Array:
        done = as_real(since) / steps
        missing = as_real(end_value) - rest(jnp.full_like(since, steps))
        planned = rest(since)
        moved = planned + done * missing
        moved = jnp.where(planned >= 0, jnp.maximum(moved, 0.0), moved)
        return jnp.where(since >= steps, as_real(end_value), moved)

    return ending


def _summing(rest: _Rest, steps: int, integral: Any) -> _Rest:
    """Adds a hat, or takes one away, so that the values of all steps have the given sum."""
    rise = max(round(_WARM_UP * steps), 1)

    def hat(since: jax.Array) -> jax.Array:
        at = as_real(since)
        return jnp.minimum(at / rise, (steps - at) / max(steps - rise, 1))

    with jax.ensure_compile_time_eval():
        counts = jnp.arange(steps)
        try:
            values, hats = jax.vmap(rest)(counts), hat(counts)
        except TypeError as error:  # of tracers that are used as numbers
            raise ValueError(
                "The sum of a schedule is found by jax.vmap, under which this one does not run: use "
                "jnp.where in place of `if`, or leave out integral."
            ) from error
    total, height, removable = _sum(values), _sum(hats), _sum(values * hats)
    missing = integral - total
    least = total - removable
    known = [x for x in (missing, least) if not isinstance(x, Tracer)]
    if len(known) == 2 and height == 0 and abs(missing) > 1e-6 * abs(total):
        raise ValueError(
            f"integral must be {float(total):.6g}, the value that the only step left has, got "
            f"{float(integral):.6g}."
        )
    if len(known) == 2 and integral < least * (1 - 1e-6):
        raise ValueError(
            f"integral must be at least {float(least):.6g} with these values at both ends, got "
            f"{float(integral):.6g}."
        )
    added = jnp.maximum(missing, 0) / jnp.where(height > 0, height, 1)
    taken = jnp.clip(-missing / jnp.where(removable > 0, removable, 1), 0, 1)

    def summing(since: jax.Array) -> jax.Array:
        hatted = hat(since)
        return rest(since) * (1 - as_real(taken) * hatted) + as_real(added) * hatted

    return summing


def _sum(values: jax.Array) -> Any:
    """The sum, in float64 unless traced."""
    return jnp.sum(values) if isinstance(values, Tracer) else np.sum(np.asarray(values, np.float64))

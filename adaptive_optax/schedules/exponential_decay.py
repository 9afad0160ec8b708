"""A decay by a constant factor, smooth or in steps, that does not depend on the length of the run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_bool, check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.schedules._length import ENDLESS, with_length
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_number, as_real, power


def exponential_decay(
    init_value: ArrayLike,
    transition_steps: int,
    decay_rate: ArrayLike,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: ArrayLike | None = None,
) -> optax.Schedule:
    r"""Decays a value by a constant factor every `transition_steps` steps.

    For runs whose length is not fixed in advance: the decay does not depend on the total number of steps.
    Arguments and values match `optax.exponential_decay`, but completed transitions are counted by integer
    division, the rate may be traced, and arguments that optax silently replaces raise an error.

    $$
    \eta_t = \eta_0\, d^{\,\max(t - B,\, 0) / T}
    $$

    with $\eta_0$ = `init_value`, $d$ = `decay_rate`, $B$ = `transition_begin`, $T$ = `transition_steps`. The
    exponent is rounded down with `staircase`, so that the first drop is at $t = B + T$.

    Args:
        init_value: The first value, at least 0.
        transition_steps: The number of steps over which the value decays by `decay_rate`, at least 1.
        decay_rate: The factor, above 0; below 1 the value falls, above 1 it grows.
        transition_begin: The number of steps before the decay begins, at least 0. Default 0, as in optax.
        staircase: Whether the value changes only every `transition_steps` steps. Default False, as in optax.
        end_value: The value at which the decay stops, at least 0: a lower bound if `decay_rate` is below 1,
            an upper bound otherwise. Default None, no bound.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> schedule = exponential_decay(0.1, transition_steps=1000, decay_rate=0.5)
        >>> [round(float(schedule(count)), 5) for count in (0, 1000, 3000)]
        [0.1, 0.05, 0.0125]

    Source: the formula is that of `exponential_decay` in TensorFlow and optax.
    """
    check_hyperparameter("init_value", init_value)
    check_integer("transition_steps", transition_steps, f"[1, {MAX_STEPS}]")
    check_hyperparameter("decay_rate", decay_rate)
    check_integer("transition_begin", transition_begin, f"[0, {MAX_STEPS}]")
    check_bool("staircase", staircase)
    if end_value is not None:
        check_hyperparameter("end_value", end_value)
    first, rate = as_number(init_value), as_number(decay_rate)
    bound = None if end_value is None else as_number(end_value)
    period, begin = int(transition_steps), int(transition_begin)

    def schedule(count: ArrayLike) -> jax.Array:
        elapsed = jnp.maximum(as_count(count) - begin, 0)
        decay = power(rate, elapsed // period) if staircase else power(rate, elapsed, period)
        value = as_real(first) * decay
        if bound is None:
            return value
        limit = as_real(bound)
        return jnp.where(rate < 1, jnp.maximum(value, limit), jnp.minimum(value, limit))

    return with_length(schedule, ENDLESS)

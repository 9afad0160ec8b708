"""Decaying schedules: exponential, stepwise, after a warm-up or a plateau, and per epoch.

Each is a function of the step count (0-based, the number of updates so far). Counts below 0 are treated as 0,
and the last value is held after the end of the run. Peak values, initial values and rates may be traced, so
that a sweep is a `jax.vmap` over the factory; numbers of steps are concrete integers. The range of a traced
value cannot be checked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_bool, check_choice, check_integer
from adaptive_optax._core.hyperparameters import check_hyperparameter
from adaptive_optax.schedules._phases import SHAPES, Phase, in_phases
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

    .. math:: \eta_t = \eta_0\, d^{\,\max(t - B,\, 0) / T}

    with \eta_0 = `init_value`, d = `decay_rate`, B = `transition_begin`, T = `transition_steps`. The exponent
    is rounded down with `staircase`, so that the first drop is at t = B + T.

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

    Example:
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

    return schedule


def step_decay(init_value: ArrayLike, factor: ArrayLike, every: int) -> optax.Schedule:
    r"""Multiplies a value by `factor` at regular intervals.

    The classic schedule for image classification. "0.8 every 5 epochs" is
    `step_decay(learning_rate, 0.8, 5 * steps_per_epoch)`.

    .. math:: \eta_t = \eta_0\, f^{\lfloor t / n \rfloor}

    with \eta_0 = `init_value`, f = `factor`, n = `every`.

    Args:
        init_value: The first value, at least 0.
        factor: The factor, above 0; below 1 for a decay.
        every: The number of steps between two changes, at least 1. The first change is at t = `every`.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> schedule = step_decay(0.1, 0.5, every=200)
        >>> [round(float(schedule(count)), 4) for count in (0, 199, 200, 400)]
        [0.1, 0.1, 0.05, 0.025]

    Source: Ge, Kakade, Kidambi and Netrapalli (2019), "The step decay schedule", which shows that it is near
    optimal for least squares.
    """
    check_hyperparameter("factor", factor, owner="step_decay")
    check_integer("every", every, f"[1, {MAX_STEPS}]")
    return exponential_decay(init_value, every, factor, staircase=True)


def warmup_stable_decay(
    peak_value: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int,
    decay_steps: int,
    shape: str = "1-sqrt",
) -> optax.Schedule:
    r"""Warms up, holds the peak, and decays to 0 over the last steps (WSD).

    For runs that may be extended: no step before the decay depends on the length of the run, so a longer run
    can continue from a checkpoint taken before the decay began.

    .. math::

        \eta_t = \hat\eta \begin{cases}
            t / W & t < W \\
            1 & W \le t < T - D \\
            s((t - T + D) / D) & T - D \le t < T \\
            0 & t \ge T \end{cases}
        \qquad s(x) = 1 - \sqrt{x}, \quad 1 - x \quad\text{or}\quad (1 + \cos \pi x) / 2

    with \hat\eta = `peak_value`, T = `total_steps`, W = `warmup_steps`, D = `decay_steps`.

    Args:
        peak_value: The value between warm-up and decay, at least 0.
        total_steps: The number of steps in the run, at least 1.
        warmup_steps: The length of the linear warm-up from 0, at most `total_steps`; 0 for none.
        decay_steps: The length of the final decay, at most `total_steps - warmup_steps`; 0 for none. Hägele
            et al. find that 10 to 20 % of the run is enough.
        shape: The shape of the decay, "1-sqrt", "linear" or "cosine". Default "1-sqrt", the best in that
            paper.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range, or warm-up and decay are longer than the run.

    Example:
        >>> schedule = warmup_stable_decay(0.1, 1000, warmup_steps=100, decay_steps=200)
        >>> [round(float(schedule(count)), 4) for count in (50, 100, 799, 850, 1000)]
        [0.05, 0.1, 0.1, 0.05, 0.0]

    Source: Hägele, Bakouch, Kosson, Ben Allal, von Werra and Jaggi (2024), "Scaling laws and compute-optimal
    training beyond fixed training durations"; the name is from Hu et al. (2024), "MiniCPM".
    """
    check_hyperparameter("peak_value", peak_value)
    check_integer("total_steps", total_steps, f"[1, {MAX_STEPS}]")
    check_integer("warmup_steps", warmup_steps, f"[0, {total_steps}]", "total_steps is the limit")
    check_integer("decay_steps", decay_steps, f"[0, {total_steps - warmup_steps}]", "what warm-up leaves")
    check_choice("shape", shape, SHAPES)
    peak, total, warmup, decay = as_number(peak_value), int(total_steps), int(warmup_steps), int(decay_steps)
    return in_phases([Phase(0, warmup, 0.0, peak, "linear"), Phase(total - decay, total, peak, 0.0, shape)])


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

    .. math::

        \eta_t = \begin{cases}
            \eta_0 + (\hat\eta - \eta_0)\, t / W & t < W \\
            \eta_T + (\hat\eta - \eta_T) (1 + \cos \pi x) / 2 & W \le t < T \\
            \eta_T & t \ge T \end{cases}
        \qquad x = \frac{t - W}{T - W}

    with \hat\eta = `peak_value`, \eta_0 = `init_value`, \eta_T = `end_value`, T = `total_steps`,
    W = `warmup_steps`. With W = T the run is all warm-up and the peak is held after it.

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

    Example:
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
    return in_phases([Phase(0, warmup, first, peak, "linear"), Phase(warmup, total, peak, last, "cosine")])


def inverse_sqrt(peak_value: ArrayLike, warmup_steps: int) -> optax.Schedule:
    r"""Warms up linearly, then decays with the inverse square root of the step count.

    For long runs without a fixed end: the decay is slow and never reaches 0.

    .. math:: \eta_t = \hat\eta \min\left(t / W, \sqrt{W / t}\right)

    with \hat\eta = `peak_value`, W = `warmup_steps`. At t = 0 the value is 0 (the paper counts from 1). W
    also sets the time scale of the decay, so W = 0 would be 0 everywhere and is an error. With W = 1 only the
    first step is a warm-up.

    Args:
        peak_value: The value at the end of the warm-up, at least 0.
        warmup_steps: The length of the warm-up, at least 1.

    Returns:
        The schedule, a function of the step count.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
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

    return schedule


def per_epoch(schedule: optax.Schedule, steps_per_epoch: int, *, fractional: bool = False) -> optax.Schedule:
    r"""Turns a schedule of the epoch into a schedule of the step.

    For recipes written in epochs, independent of the batch size: `per_epoch(step_decay(0.1, 0.8, 5), n)`
    changes the value every 5 epochs of n steps.

    .. math:: \eta_t = \eta(\lfloor t / n \rfloor) \quad\text{or, if fractional,}\quad \eta(t / n)

    with n = `steps_per_epoch`.

    Args:
        schedule: A function of the number of completed epochs. Every schedule of this library also accepts
            the float count that `fractional` passes.
        steps_per_epoch: The number of steps per epoch, at least 1.
        fractional: Whether `schedule` receives the real-valued epoch t / n, a float, instead of the number of
            completed epochs, an integer. Integer division separates whole epochs from the fraction before the
            two are added, so that a float32 resolves every step as long as t is below 2**24. Default False:
            the value changes between epochs, as in recipes that set it once per epoch.

    Returns:
        A schedule of the step count. Its values are those of `schedule`, as strongly typed arrays.

    Raises:
        ValueError: If `schedule` is not callable or `steps_per_epoch` is out of its range.

    Example:
        >>> schedule = per_epoch(step_decay(0.1, 0.5, every=2), steps_per_epoch=100)
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

    return of_steps

"""Growing the batch instead of decaying the learning rate: the same noise in fewer updates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._core.checks import check_choice, check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.values import static_value
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_real

_ROUNDING = 1e-5  # a rate of 1/k of the largest must allow k, whichever way float32 rounded it


class BatchGrowth(NamedTuple):
    """The result of `grow_batch`: schedules of the number of emissions.

    Attributes:
        accumulation_steps: Micro-batches per emission, int32; the `every` of `accumulate_gradients`.
        learning_rate: The remaining learning rate schedule.
        b1: Adam's b1; None for `kind="sgd"`.
        b2: Adam's b2; None for `kind="sgd"`.
        eps: Adam's eps; None for `kind="sgd"`.
    """

    accumulation_steps: _Table
    learning_rate: optax.Schedule
    b1: optax.Schedule | None
    b2: optax.Schedule | None
    eps: optax.Schedule | None

    @property
    def emissions(self) -> int:
        """The number of emissions of the run."""
        return len(self.accumulation_steps)


def grow_batch(
    schedule: optax.Schedule,
    *,
    total_steps: int,
    max_factor: int,
    kind: Literal["sgd", "adam"] = "sgd",
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
) -> BatchGrowth:
    r"""Grows the batch in place of a decay, and decays the learning rate once the batch has grown enough.

    A learning rate decays to average out gradient noise. A larger batch does so in fewer updates, which pays
    off where larger batches run faster or communication is expensive. With `accumulate_gradients` the batch
    grows by micro-batches of the same size as the decayed run's batches, so both runs see the same samples:

    ```python
    growth = grow_batch(exponential_decay(0.1, 1000, 0.5), total_steps=5000, max_factor=16)
    tx = accumulate_gradients(sgd(growth.learning_rate), growth.accumulation_steps)
    ```

    In the decayed run step t has the rate $\eta(t)$, and $\hat\eta$ is the largest rate. An
    emission replaces k of its steps, whose mean rate is $\bar\eta$. Until the (first) step with the
    largest rate, that is during a warm-up, k = 1. Then k is the largest number up to `max_factor` with

    $$
    k \max \eta \le \hat\eta \quad\text{("sgd")} \qquad \sqrt k \max \eta \le \hat\eta
    \quad\text{("adam")}
    $$

    over its steps, and the emission's hyperparameters are

    $$
    \begin{aligned}
    \text{"sgd":} &\quad k \bar\eta \\
    \text{"adam":} &\quad \sqrt k \bar\eta, \qquad 1 - k (1 - \beta_1), \qquad 1 - k (1 - \beta_2),
    \qquad \epsilon / \sqrt k
    \end{aligned}
    $$

    The noise scale, $\eta / B$ or for Adam $\eta / \sqrt B$, is therefore the same as in the
    decayed run, no rate exceeds $\hat\eta$, and with "sgd" the rates have the same sum. The losses of
    the two runs agree to first order in $\hat\eta$. The last emission is shortened to end on the last
    step. If a decay ends in rates of 0, the last emissions have k = `max_factor` and the remaining rate, down
    to 0.

    All schedules are functions of the number of emissions, the only clock of the inner transformation; the
    map from emissions to steps is tabulated. The momentum of "sgd" is unchanged.

    With Adam there are two caveats. First, the highest stable rate is proportional to
    $(1 + \beta_1) / (1 - \beta_1)$, which the rule lowers: at k = 8 from 19 to 1.5. If training is at
    the edge of stability, the loss jumps when the batch grows. In that case do not use the returned `b1` but
    keep Adam's; to first order the noise does not depend on it (with `b1=0` it does not limit `max_factor`).
    Second, the second moment contains the noise of the smaller batches for about $1/(1 - \beta_2)$
    emissions after the batch has grown; during that time steps are slightly too short.

    Args:
        schedule: $\eta$, a function of the step count, at least 0 and somewhere positive. Its values
            must be known: for a traced peak, use a schedule with a peak of 1 and multiply `learning_rate`.
        total_steps: The number of steps (that is, micro-batches) of the decayed run, at least 1.
        max_factor: The largest k, at least 1. For Adam k (1 - b) may not exceed 1: up to 10 for b1 = 0.9.
        kind: "sgd", with or without momentum, or "adam".
        b1: Adam's b1, in [0, 1), only for `kind="adam"`; 0 stays 0.
        b2: Adam's b2, in [0, 1), only for `kind="adam"`; 0 stays 0.
        eps: Adam's eps, at least 0, only for `kind="adam"`.

    Returns:
        The schedules, which hold their last values after the run, and the number of emissions. Each schedule
        is a table with one entry per emission.

    Raises:
        ValueError: If an argument is out of range, missing or not used by `kind`, or if the schedule is
            traced, somewhere negative or not finite, or 0 everywhere.

    Examples:
        >>> growth = grow_batch(lambda t: 0.8 * 0.5 ** (t // 4), total_steps=12, max_factor=2)
        >>> [int(growth.accumulation_steps(n)) for n in range(growth.emissions)]
        [1, 1, 1, 1, 2, 2, 2, 2]
        >>> [round(float(growth.learning_rate(n)), 2) for n in range(growth.emissions)]
        [0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4]

    Source: Smith, Kindermans, Ying and Le 2018, "Don't decay the learning rate, increase the batch size"; for
    Adam the square root scaling rule of Malladi et al. 2022, "On the SDEs and scaling rules for adaptive
    gradient algorithms"; for stability Cohen et al. 2022, "Adaptive gradient methods at the edge of
    stability". Averaging over an emission is new in this library.
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the step count, got {schedule!r}.")
    check_integer("total_steps", total_steps, f"[1, {MAX_STEPS}]")
    check_integer("max_factor", max_factor, f"[1, {MAX_STEPS}]")
    check_choice("kind", kind, ("sgd", "adam"))
    _check_adam_arguments(kind, max_factor, b1=b1, b2=b2, eps=eps)
    rates = _rates(schedule, int(total_steps))
    power = 1.0 if kind == "sgd" else 0.5
    k = _factors(rates, int(max_factor), power)
    starts = np.cumsum(k) - k
    mean = np.add.reduceat(rates, starts) / k

    def decay(b):
        # Clipped at 0: a b of 0 stays 0, and rounding may push k (1 - b) above 1.
        return None if b is None else _Table(np.maximum(1 - k * (1 - float(b)), 0))

    return BatchGrowth(
        accumulation_steps=_Table(k),
        learning_rate=_Table(mean * k**power),
        b1=decay(b1),
        b2=decay(b2),
        eps=None if eps is None else _Table(float(eps) / np.sqrt(k)),
    )


def _check_adam_arguments(kind: str, max_factor: int, **given: float | None) -> None:
    for name, value in given.items():
        if kind == "sgd":
            if value is not None:
                raise ValueError(f"{name} is used by kind='adam' only, got {value!r} with kind='sgd'.")
            continue
        if value is None:
            raise ValueError(f"{name} is needed with kind='adam', got None.")
        check_hyperparameter(name, value)
        if static_value(value) is None:
            raise ValueError(f"{name} must be concrete in grow_batch, got a tracer.")
        if name != "eps" and value > 0 and max_factor * (1 - value) > 1 + _ROUNDING:
            raise ValueError(
                f"max_factor must be at most 1 / (1 - {name}) = {1 / (1 - value):.4g} with kind='adam', got "
                f"{max_factor}: at most {1 / (1 - value):.4g} steps of the average can be merged into one."
            )


def _rates(schedule: optax.Schedule, total_steps: int) -> np.ndarray:
    """The rates of all steps, in float64, computed eagerly even if the caller is being traced."""
    with jax.ensure_compile_time_eval():
        rates = jax.vmap(schedule)(jnp.arange(total_steps))
    if isinstance(rates, Tracer):
        raise ValueError(
            "schedule must return concrete values, got a tracer: for a traced peak pass grow_batch a "
            "schedule with a peak of 1, and multiply its learning_rate by the peak."
        )
    if jnp.shape(rates) != (total_steps,):
        raise ValueError(f"schedule must return a scalar, got an array of shape {jnp.shape(rates)[1:]}.")
    rates = np.asarray(rates, np.float64)
    if (wrong := ~(np.isfinite(rates) & (rates >= 0))).any():
        step = int(np.argmax(wrong))
        raise ValueError(f"schedule must be at least 0 and finite, got {rates[step]:.4g} at step {step}.")
    if not rates.any():
        raise ValueError(f"schedule must be positive somewhere, got 0 at all {total_steps} steps.")
    return rates


def _factors(rates: np.ndarray, max_factor: int, power: float) -> np.ndarray:
    """The number of steps that each emission replaces."""
    top, peak = rates.max() * (1 + _ROUNDING), int(rates.argmax())
    factors = [1] * peak
    at = peak
    while at < len(rates):
        largest, k = rates[at], 1
        while k < min(max_factor, len(rates) - at):
            largest = max(largest, rates[at + k])
            if (k + 1) ** power * largest > top:
                break
            k += 1
        factors.append(k)
        at += k
    return np.array(factors)


class _Table:
    """A schedule that looks up its values and holds the last one."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        entry = jnp.minimum(as_count(count).astype(jnp.int32), len(self) - 1)
        whole = np.issubdtype(self.values.dtype, np.integer)
        return (jnp.asarray(self.values, jnp.int32) if whole else as_real(self.values))[entry]

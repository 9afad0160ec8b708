"""Growing the batch in place of decaying the learning rate: the same noise, in fewer updates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_optax._checks import check_choice, check_integer, check_scalar
from adaptive_optax._precision import concrete
from adaptive_optax.schedules._steps import MAX_STEPS, as_count, as_real

_ROUNDING = 1e-5  # a rate that is a k-th of the largest allows k, whichever way float32 rounded it


class BatchGrowth(NamedTuple):
    """What `grow_batch` returns: schedules of the number of emissions.

    Attributes:
        accumulation_steps: Micro-batches in an emission, int32; the `every` of `accumulate_gradients`.
        learning_rate: The learning rate that is left.
        b1: Adam's b1; None for `kind="sgd"`.
        b2: Adam's b2; None likewise.
        eps: Adam's eps; None likewise.
    """

    accumulation_steps: _Table
    learning_rate: optax.Schedule
    b1: optax.Schedule | None
    b2: optax.Schedule | None
    eps: optax.Schedule | None

    @property
    def emissions(self) -> int:
        """How many emissions the run has."""
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
    r"""Spends a decay on the batch size first, and on the learning rate when the batch has grown enough.

    A learning rate decays to settle the gradient's noise; a larger batch settles it too, in fewer updates,
    which pays where larger batches run faster or communication is dear. With `accumulate_gradients` the batch
    grows by micro-batches, each of the size of the decayed run's batches, so the samples seen are the same::

        growth = grow_batch(exponential_decay(0.1, 1000, 0.5), total_steps=5000, max_factor=16)
        tx = accumulate_gradients(sgd(growth.learning_rate), growth.accumulation_steps)

    In the decayed run step t has the rate :math:`\eta(t)`, of which :math:`\hat\eta` is the largest. An
    emission takes the place of k of its steps, whose mean rate is :math:`\bar\eta`. Up to the (first) step
    with the largest rate, through a warm-up, k = 1. After it k is the largest number up to `max_factor` with

    .. math::
        k \max \eta \le \hat\eta \quad\text{("sgd")} \qquad \sqrt k \max \eta \le \hat\eta
        \quad\text{("adam")}

    over its steps, and the emission's hyperparameters are

    .. math::
        \text{"sgd":} &\quad k \bar\eta \\
        \text{"adam":} &\quad \sqrt k \bar\eta, \qquad 1 - k (1 - \beta_1), \qquad 1 - k (1 - \beta_2),
        \qquad \epsilon / \sqrt k

    So the scale of the noise, :math:`\eta / B` or for Adam :math:`\eta / \sqrt B`, is that of the decayed
    run, no rate exceeds :math:`\hat\eta`, and with "sgd" the rates sum to the same. The two runs' losses
    agree to first order in :math:`\hat\eta`. The last emission is shortened to end on the last step. Where a
    decay ends in rates of 0, its last emissions take k = `max_factor` and what rate there is, down to 0.

    All schedules are of the number of emissions, the one clock that the inner transformation has; the map
    from emissions to steps is tabulated here. The momentum of "sgd" stays as it is.

    Two things to know with Adam. The highest stable rate is proportional to
    :math:`(1 + \beta_1) / (1 - \beta_1)`, which the rule lowers: at k = 8 from 19 to 1.5. Where training is
    at the edge of what is stable, the loss jumps when the batch grows; then leave the returned `b1` out and
    keep Adam's, on which the noise does not depend to first order (`b1=0` here frees `max_factor` of it). And
    the second moment has the smaller batches' noise in it for some :math:`1/(1 - \beta_2)` emissions after
    the batch has grown; until then steps are a little short.

    Args:
        schedule: :math:`\eta`, a function of the step count, at least 0 and somewhere positive. Its values
            must be known: for a peak that is traced give it a peak of 1, and multiply `learning_rate`.
        total_steps: Steps of the decayed run, which are micro-batches, at least 1.
        max_factor: The largest k, at least 1. For Adam k (1 - b) may not exceed 1: up to 10 for b1 = 0.9.
        kind: "sgd", with or without momentum, or "adam".
        b1: Adam's, in [0, 1), for `kind="adam"` only; 0 stays 0.
        b2: Likewise.
        eps: Adam's, at least 0, for `kind="adam"` only.

    Returns:
        The schedules, which hold their last values after the run, and the number of emissions. Each is a
        table with an entry an emission.

    Raises:
        ValueError: If an argument is out of range, is missing or not used by `kind`, or the schedule is
            traced, is negative or not finite somewhere, or 0 throughout.

    Example:
        >>> growth = grow_batch(lambda t: 0.8 * 0.5 ** (t // 4), total_steps=12, max_factor=2)
        >>> [int(growth.accumulation_steps(n)) for n in range(growth.emissions)]
        [1, 1, 1, 1, 2, 2, 2, 2]
        >>> [round(float(growth.learning_rate(n)), 2) for n in range(growth.emissions)]
        [0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4]

    Source: Smith, Kindermans, Ying and Le 2018, "Don't decay the learning rate, increase the batch size"; for
    Adam the square root scaling rule of Malladi et al. 2022, "On the SDEs and scaling rules for adaptive
    gradient algorithms"; on stability Cohen et al. 2022, "Adaptive gradient methods at the edge of
    stability". The means over an emission are this library's.
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of the step count, got {schedule!r}.")
    check_integer("total_steps", total_steps, f"[1, {MAX_STEPS}]")
    check_integer("max_factor", max_factor, f"[1, {MAX_STEPS}]")
    check_choice("kind", kind, ("sgd", "adam"))
    _check_adams(kind, max_factor, b1=b1, b2=b2, eps=eps)
    rates = _rates(schedule, int(total_steps))
    power = 1.0 if kind == "sgd" else 0.5
    k = _factors(rates, int(max_factor), power)
    starts = np.cumsum(k) - k
    mean = np.add.reduceat(rates, starts) / k

    def decay(b):
        # Not below 0: a b of 0 stays 0, and rounding may take k (1 - b) past 1.
        return None if b is None else _Table(np.maximum(1 - k * (1 - float(b)), 0))

    return BatchGrowth(
        accumulation_steps=_Table(k),
        learning_rate=_Table(mean * k**power),
        b1=decay(b1),
        b2=decay(b2),
        eps=None if eps is None else _Table(float(eps) / np.sqrt(k)),
    )


def _check_adams(kind: str, max_factor: int, **given: float | None) -> None:
    for name, value in given.items():
        if kind == "sgd":
            if value is not None:
                raise ValueError(f"{name} is used by kind='adam' only, got {value!r} with kind='sgd'.")
            continue
        if value is None:
            raise ValueError(f"{name} is needed with kind='adam', got None.")
        check_scalar(name, value, "[0, inf)" if name == "eps" else "[0, 1)")
        if concrete(value) is None:
            raise ValueError(f"{name} must be concrete in grow_batch, got a tracer.")
        if name != "eps" and value > 0 and max_factor * (1 - value) > 1 + _ROUNDING:
            raise ValueError(
                f"max_factor must be at most 1 / (1 - {name}) = {1 / (1 - value):.4g} with kind='adam', got "
                f"{max_factor}: an average over {1 / (1 - value):.4g} steps has that many to put together."
            )


def _rates(schedule: optax.Schedule, total_steps: int) -> np.ndarray:
    """The rates of all steps, in float64; known ones, also where the caller is being traced."""
    with jax.ensure_compile_time_eval():
        rates = jax.vmap(schedule)(jnp.arange(total_steps))
    if isinstance(rates, Tracer):
        raise ValueError(
            "schedule must have values that are known, got a tracer: for a traced peak give grow_batch a "
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
    """How many steps each emission takes the place of."""
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
    """A schedule that looks values up, and stays at the last one."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        entry = jnp.minimum(as_count(count).astype(jnp.int32), len(self) - 1)
        whole = np.issubdtype(self.values.dtype, np.integer)
        return (jnp.asarray(self.values, jnp.int32) if whole else as_real(self.values))[entry]

"""The one-cycle policy: the learning rate goes up and down once, the momentum down and up.

PyTorch, fastai and optax place the peak and the end at different steps and divide by different factors. A
preset reproduces the values of one of them, step for step.
"""

from __future__ import annotations

from typing import NamedTuple

import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_bool, check_choice, check_integer, check_scalar
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.values import static_value
from adaptive_optax.schedules._phases import Phase, in_phases
from adaptive_optax.schedules._steps import MAX_STEPS, Number, as_number, whole_steps


class OneCycle(NamedTuple):
    """The two schedules of the one-cycle policy, functions of the step count.

    Attributes:
        learning_rate: The schedule of the learning rate.
        momentum: The schedule of the momentum, which falls while the rate rises.
    """

    learning_rate: optax.Schedule
    momentum: optax.Schedule


class _Preset(NamedTuple):
    pct_start: float
    div_factor: float
    final_div_factor: float


_PRESETS = {
    "torch": _Preset(0.3, 25.0, 1e4),
    "fastai": _Preset(0.25, 25.0, 1e5),
    "optax": _Preset(0.3, 25.0, 1e4),
}


def one_cycle(
    peak_value: ArrayLike,
    total_steps: int,
    *,
    preset: str = "torch",
    pct_start: ArrayLike | None = None,
    div_factor: ArrayLike | None = None,
    final_div_factor: ArrayLike | None = None,
    max_momentum: ArrayLike = 0.95,
    base_momentum: ArrayLike = 0.85,
    three_phase: bool = False,
) -> OneCycle:
    r"""Builds the one-cycle schedules for the learning rate and the momentum.

    For short runs of known length with a high learning rate. Pass the second schedule as an optimizer's
    momentum, such as `momentum=` of `sgd` or `b1=` of `adam`.

    The learning rate rises from the initial value $\eta_0 = \hat\eta$ / `div_factor` to the peak $\hat\eta$
    at position $p$, and then falls to the final value $\eta_f$ at position $e$, both along half a cosine:

    $$
    \eta_t = \eta_a \tfrac12 (1 + \cos \pi x) + \eta_b \tfrac12 (1 - \cos \pi x), \qquad
    x = \frac{t - a}{b - a}
    $$

    from $\eta_a$ at position $a$ to $\eta_b$ at position $b$; the momentum goes from `max_momentum` to
    `base_momentum` and back with the same $x$. With $T$ = `total_steps` and $P$ = `pct_start`:

    | preset     | $p$                   | $e$     | $\eta_f$                        | $P$  | div | final  |
    | ---------- | --------------------- | ------- | ------------------------------- | ---- | --- | ------ |
    | `"torch"`  | $P T - 1$             | $T - 1$ | $\eta_0$ / `final_div_factor`   | 0.3  | 25  | 1e4    |
    | `"fastai"` | $P T$                 | $T$     | $\hat\eta$ / `final_div_factor` | 0.25 | 25  | 1e5    |
    | `"optax"`  | $\lfloor P T \rfloor$ | $T$     | $\eta_0$ / `final_div_factor`   | 0.3  | 25  | 1e4    |

    The last three columns are the defaults of `pct_start`, `div_factor` and `final_div_factor`.

    Only "torch" reaches $\eta_f$ at the last update, $t = T - 1$. With $P = 1$ the run is all warm-up and
    ends at the peak. With `three_phase` the rate falls from the peak to $\eta_0$ at $2 P T - 2$, and from
    there to $\eta_f$ at constant momentum.

    The schedules equal those of the libraries step for step. A run of Adam with the momentum as `b1` does
    not, because the bias correction here is exact for a changing b1, while PyTorch's $1 - b_1^t$ treats
    b1 as constant.

    Args:
        peak_value: The highest learning rate, at least 0. May be traced.
        total_steps: The number of steps in the run, at least 1.
        preset: The library whose values to reproduce. Default "torch", which fits the run exactly.
        pct_start: The fraction of the run that warms up, in (0, 1], or (0, 0.5] with `three_phase`. Default:
            the preset's. May be traced; then the peak's position has the precision of a float.
        div_factor: The peak divided by the initial learning rate, at least 1. Default: the preset's. May be
            traced.
        final_div_factor: The initial learning rate (the peak in "fastai") divided by the final one, above 0.
            Default: the preset's. May be traced.
        max_momentum: The momentum at both ends, in [0, 1). Default 0.95, as in PyTorch and fastai. optax does
            not cycle the momentum; its preset does so in the phases of the learning rate. May be traced.
        base_momentum: The momentum at the peak, at most `max_momentum`. Default 0.85. May be traced.
        three_phase: Whether to add PyTorch's third phase; only for the preset "torch". Default False.

    Returns:
        A `OneCycle(learning_rate, momentum)` of two schedules.

    Raises:
        ValueError: If an argument is out of its range or is not used by the preset.

    Examples:
        >>> schedules = one_cycle(1.0, 100)
        >>> [round(float(schedules.learning_rate(count)), 6) for count in (0, 29, 99)]
        [0.04, 1.0, 4e-06]
        >>> [round(float(schedules.momentum(count)), 2) for count in (0, 29, 99)]
        [0.95, 0.85, 0.95]

    Source: Smith and Topin (2019), "Super-convergence", and Smith (2018), "A disciplined approach to neural
    network hyper-parameters"; the phases follow PyTorch's `OneCycleLR` (cosine annealing), fastai's
    `fit_one_cycle` and optax's `cosine_onecycle_schedule`.
    """
    check_hyperparameter("peak_value", peak_value)
    check_integer("total_steps", total_steps, f"[1, {MAX_STEPS}]")
    check_choice("preset", preset, _PRESETS)
    check_bool("three_phase", three_phase)
    if three_phase and preset != "torch":
        raise ValueError(
            f"three_phase must be False with preset={preset!r}, which has no third phase, got True."
        )
    defaults = _PRESETS[preset]
    pct_start = defaults.pct_start if pct_start is None else pct_start
    div_factor = defaults.div_factor if div_factor is None else div_factor
    final_div_factor = defaults.final_div_factor if final_div_factor is None else final_div_factor
    check_scalar("pct_start", pct_start, "(0, 0.5]" if three_phase else "(0, 1]")
    check_hyperparameter("div_factor", div_factor)
    check_hyperparameter("final_div_factor", final_div_factor)
    check_hyperparameter("max_momentum", max_momentum)
    highest = static_value(max_momentum)
    check_hyperparameter(
        "base_momentum", base_momentum, interval=None if highest is None else f"[0, {highest}]"
    )

    peak, steps = as_number(peak_value), int(total_steps)
    initial = peak / as_number(div_factor)
    final = (peak if preset == "fastai" else initial) / as_number(final_div_factor)
    high, low = as_number(max_momentum), as_number(base_momentum)
    rises = as_number(pct_start) * steps
    if preset == "torch":
        positions = [rises - 1, 2 * rises - 2, steps - 1] if three_phase else [rises - 1, steps - 1]
    else:
        positions = [whole_steps(rises) if preset == "optax" else rises, steps]
    rates = [initial, peak, initial, final] if three_phase else [initial, peak, final]
    momenta = [high, low, high, high] if three_phase else [high, low, high]
    return OneCycle(_in_cosines(positions, rates, steps), _in_cosines(positions, momenta, steps))


def _in_cosines(positions: list[Number], values: list[Number], total_steps: int) -> optax.Schedule:
    """Starts at the first of `values` and reaches the others at `positions`, in order."""
    begins = [0, *positions]
    return in_phases(
        [
            Phase(begin, end, start_value, end_value, "cosine")
            for begin, end, start_value, end_value in zip(begins, positions, values, values[1:], strict=False)
        ],
        total_steps,
    )

"""Warm-up, a plateau, and a decay over the last steps (WSD)."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_choice, check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.schedules._phases import SHAPES, Phase, in_phases
from adaptive_optax.schedules._steps import MAX_STEPS, as_number


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

    $$
    \eta_t = \hat\eta \begin{cases}
        t / W & t < W \\
        1 & W \le t < T - D \\
        s((t - T + D) / D) & T - D \le t < T \\
        0 & t \ge T \end{cases}
    \qquad s(x) = 1 - \sqrt{x}, \quad 1 - x \quad\text{or}\quad (1 + \cos \pi x) / 2
    $$

    with $\hat\eta$ = `peak_value`, $T$ = `total_steps`, $W$ = `warmup_steps`, $D$ = `decay_steps`.

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

    Examples:
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
    phases = [Phase(0, warmup, 0.0, peak, "linear"), Phase(total - decay, total, peak, 0.0, shape)]
    return in_phases(phases, total)

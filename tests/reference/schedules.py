"""Schedules as the papers and libraries write them, in float64; `t` is an array of 0-based step counts."""

from __future__ import annotations

import math

import numpy as np

Counts = np.ndarray


def exponential_decay(
    t: Counts,
    init_value: float,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> np.ndarray:
    """optax's documentation: init_value * decay_rate ** ((t - begin) / steps) once t > begin."""
    values = []
    for count in t.tolist():
        late = max(count - transition_begin, 0)
        exponent = late // transition_steps if staircase else late / transition_steps
        value = init_value * decay_rate**exponent
        if end_value is not None:
            value = max(value, end_value) if decay_rate < 1 else min(value, end_value)
        values.append(value)
    return np.array(values)


def cosine_restarts(
    t: Counts,
    peak_value: float,
    first_period: int,
    period_factor: float = 1.0,
    warmup_steps: int = 0,
    init_value: float = 0.0,
    end_value: float = 0.0,
    peak_factor: float = 1.0,
) -> np.ndarray:
    """SGDR, equation 5, period after period, counted from the end of a linear warm-up."""
    values = []
    for count in t.tolist():
        if count < warmup_steps:
            values.append(init_value + (peak_value - init_value) * count / warmup_steps)
            continue
        done, period = count - warmup_steps, 0
        while done >= (length := round(first_period * period_factor**period)):
            done, period = done - length, period + 1
        top = max(peak_value * peak_factor**period, end_value)
        values.append(end_value + (top - end_value) * (1 + math.cos(math.pi * done / length)) / 2)
    return np.array(values)


def step_decay(t: Counts, init_value: float, factor: float, every: int) -> np.ndarray:
    """The factor once more after every `every` steps."""
    return np.array([init_value * factor ** (count // every) for count in t.tolist()])


def warmup_stable_decay(
    t: Counts, peak_value: float, total_steps: int, warmup_steps: int, decay_steps: int, shape: str
) -> np.ndarray:
    """Hägele et al. 2024, section 3: linear warm-up, constant, cool-down f(n, N, N_decay)."""
    values = []
    for n in t.tolist():
        if n < warmup_steps:
            factor = n / warmup_steps
        elif n < total_steps - decay_steps or decay_steps == 0:
            factor = 1.0
        else:
            x = min((n - (total_steps - decay_steps)) / decay_steps, 1.0)
            factor = {"1-sqrt": 1 - math.sqrt(x), "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[
                shape
            ]
        values.append(peak_value * factor)
    return np.array(values)


def warmup_cosine(
    t: Counts,
    peak_value: float,
    total_steps: int,
    warmup_steps: int = 0,
    init_value: float = 0.0,
    end_value: float = 0.0,
) -> np.ndarray:
    """Loshchilov & Hutter 2017, equation 5 with one period, after the linear warm-up of Goyal et al. 2017."""
    values = []
    for count in t.tolist():
        if count < warmup_steps:
            values.append(init_value + (peak_value - init_value) * count / warmup_steps)
        elif warmup_steps == total_steps:
            values.append(peak_value)
        else:
            current = min((count - warmup_steps) / (total_steps - warmup_steps), 1.0)
            values.append(end_value + 0.5 * (peak_value - end_value) * (1 + math.cos(math.pi * current)))
    return np.array(values)


def inverse_sqrt(t: Counts, peak_value: float, warmup_steps: int) -> np.ndarray:
    """Vaswani et al. 2017, equation 3, min(t^(-1/2), t W^(-3/2)), scaled so that its peak is peak_value."""
    step_num = t.astype(np.float64)
    with np.errstate(divide="ignore"):
        return (
            peak_value * math.sqrt(warmup_steps) * np.minimum(step_num**-0.5, step_num * warmup_steps**-1.5)
        )


def cyclical(
    t: Counts,
    base_value: float,
    peak_value: float,
    half_cycle: int,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> np.ndarray:
    """Smith 2017, section 3: cycle = floor(1 + t/2s), x = |t/s - 2 cycle + 1|."""
    cycle = np.floor(1 + t / (2 * half_cycle))
    x = np.abs(t / half_cycle - 2 * cycle + 1)
    scale = {"triangular": 1.0, "triangular2": 1 / 2.0 ** (cycle - 1), "exp_range": gamma**t}[mode]
    return base_value + (peak_value - base_value) * np.maximum(0, 1 - x) * scale


def _cosine(start: float, end: float, x: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * x))


def one_cycle_torch(
    t: Counts,
    peak_value: float,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    max_momentum: float = 0.95,
    base_momentum: float = 0.85,
) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's OneCycleLR: the first phase whose end is not before t; after the run, its last value."""
    initial = peak_value / div_factor
    lowest = initial / final_div_factor
    top, base = max_momentum, base_momentum
    phases = [(pct_start * total_steps - 1, (initial, peak_value), (top, base))]
    if three_phase:
        phases.append((2 * pct_start * total_steps - 2, (peak_value, initial), (base, top)))
        phases.append((total_steps - 1, (initial, lowest), (top, top)))
    else:
        phases.append((total_steps - 1, (peak_value, lowest), (base, top)))
    rates, momenta = [], []
    for count in np.minimum(t, total_steps - 1).tolist():
        start = 0.0
        for end, rate, momentum in phases:
            if count <= end:
                x = (count - start) / (end - start)
                rates.append(_cosine(*rate, x))
                momenta.append(_cosine(*momentum, x))
                break
            start = end
    return np.array(rates), np.array(momenta)


def one_cycle_fastai(
    t: Counts,
    peak_value: float,
    total_steps: int,
    pct_start: float = 0.25,
    div_factor: float = 25.0,
    final_div_factor: float = 1e5,
    max_momentum: float = 0.95,
    base_momentum: float = 0.85,
) -> tuple[np.ndarray, np.ndarray]:
    """fastai's fit_one_cycle: combined_cos(pct, start, middle, end) at position t / T, twice."""

    def combined_cos(position: float, start: float, middle: float, end: float) -> float:
        if position < pct_start or pct_start == 1:
            first, last, x = start, middle, position / pct_start
        else:
            first, last, x = middle, end, (position - pct_start) / (1 - pct_start)
        return first + (1 + math.cos(math.pi * (1 - x))) * (last - first) / 2

    rate = peak_value / div_factor, peak_value, peak_value / final_div_factor
    momentum = max_momentum, base_momentum, max_momentum
    positions = [min(count / total_steps, 1.0) for count in t.tolist()]
    return (
        np.array([combined_cos(position, *rate) for position in positions]),
        np.array([combined_cos(position, *momentum) for position in positions]),
    )


def one_cycle_optax(
    t: Counts,
    peak_value: float,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    max_momentum: float = 0.95,
    base_momentum: float = 0.85,
) -> tuple[np.ndarray, np.ndarray]:
    """optax's cosine_onecycle_schedule: up to step int(pct T), down to step T; momentum likewise."""
    top = int(pct_start * total_steps)
    initial = peak_value / div_factor
    final = initial / final_div_factor if top < total_steps else peak_value
    rates, momenta = [], []
    for count in t.tolist():
        if count < top:
            rates.append(_cosine(initial, peak_value, count / top))
            momenta.append(_cosine(max_momentum, base_momentum, count / top))
        elif count < total_steps:
            x = (count - top) / (total_steps - top)
            rates.append(_cosine(peak_value, final, x))
            momenta.append(_cosine(base_momentum, max_momentum, x))
        else:
            rates.append(final)
            momenta.append(max_momentum if top < total_steps else base_momentum)
    return np.array(rates), np.array(momenta)

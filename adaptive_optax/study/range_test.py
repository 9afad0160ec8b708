"""The learning-rate range test: which peak rate to start from, found by short trials at constant rates.

The classic test (Smith 2017, "Cyclical learning rates for training neural networks") trains once while the
rate grows at every step. Each loss then depends on all rates before it, on the moving average that smooths
it, and on the batch it happens to come from. Here every rate has trials of its own, from the same initial
parameters and through the same batches, and losses are compared on one fixed part of the training data.

`ramp=True` runs the classic test, and `suggest` applies the rules by which such curves are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import stats

from adaptive_optax._checks import check_bool, check_choice, check_integer, check_scalar
from adaptive_optax.study.arms import check_arm
from adaptive_optax.study.layout import MODES, settle_layout
from adaptive_optax.study.progress import TrialProgress
from adaptive_optax.study.runner import ArmSpec, Runner
from adaptive_optax.study.store import Key
from adaptive_optax.study.task import Task
from adaptive_optax.study.trials import Plan

Optimizer = Callable[[Any], optax.GradientTransformation]

# ---- Reading a curve: fastai's rules ----

_SLIDE_WIDTH, _SLIDE_THRESHOLD = 15, 0.005
_FEWEST_POINTS = {"steepest": 2, "valley": 1, "slide": _SLIDE_WIDTH + 1, "minimum": 1}


def suggest(learning_rates: ArrayLike, losses: ArrayLike, rule: str) -> float:
    r"""Reads a learning rate off a curve of losses by one of fastai's four rules.

    For curves that another finder recorded, and to see what the rules say. The curve is taken as it is:
    fastai's `lr_find` gives its rules the smoothed losses without the first tenth of its steps and the last
    five points, and so does `lr_range_test(..., ramp=True)`. With points :math:`0 \dots n-1`:

    | rule | index of the rate |
    |---|---|
    | `"steepest"` | the left end of the interval with the least :math:`\Delta L / \Delta\log\eta` |
    | `"valley"` | a third, and half a third, into the longest decreasing subsequence: with its length \ell and its last index e (the first index to reach that length), :math:`e - \ell + \lfloor\ell/3\rfloor + \lfloor\ell/6\rfloor`; 0 where nothing decreases |
    | `"slide"` | the left end of a window 15 wide, which moves left from the end of the curve while the gradients :math:`\Delta L / \Delta i` at its two ends differ by more than 0.005 |
    | `"minimum"` | the lowest loss; a tenth of that rate is suggested |

    An index of -1, which `"valley"` has for a curve that falls in its first step only, is the last point, as it
    is in fastai. Of equal values the first counts.

    Args:
        learning_rates: Rates above 0, increasing.
        losses: As many finite losses.
        rule: The rule. `"slide"` needs 16 points, `"steepest"` 2, the others 1.

    Raises:
        ValueError: If an argument is not as above.

    >>> rates = [1e-4, 1e-3, 1e-2, 1e-1]
    >>> suggest(rates, [2.0, 1.9, 1.0, 0.9], "steepest"), suggest(rates, [2.0, 1.9, 1.0, 3.0], "minimum")
    (0.001, 0.001)

    Source: fastai 2 (Howard and Gugger 2020), `fastai.callback.schedule`.
    """  # noqa: E501  (a table's row is one line)
    check_choice("rule", rule, _FEWEST_POINTS)
    rates, curve = np.asarray(learning_rates, np.float64), np.asarray(losses, np.float64)
    if rates.ndim != 1 or rates.shape != curve.shape:
        raise ValueError(
            f"losses must hold one number for each learning rate, got shapes {curve.shape} and {rates.shape}."
        )
    if len(rates) < (fewest := _FEWEST_POINTS[rule]):
        raise ValueError(f"losses must have at least {fewest} points for rule {rule!r}, got {len(rates)}.")
    wrong = ~(np.diff(rates, prepend=0.0) > 0) | ~np.isfinite(rates)
    if np.any(wrong):
        at = int(np.argmax(wrong))
        raise ValueError(
            f"learning_rates must be finite, above 0 and increasing, got {rates[at]} at index {at}."
        )
    if not np.all(np.isfinite(curve)):
        at = int(np.argmin(np.isfinite(curve)))
        raise ValueError(f"losses must be finite, got {curve[at]} at index {at}: cut the curve there.")
    index = {"steepest": _steepest, "valley": _valley, "slide": _slide, "minimum": _minimum}[rule]
    rate = float(rates[index(rates, curve)])
    return rate / 10 if rule == "minimum" else rate


def _steepest(rates: np.ndarray, losses: np.ndarray) -> int:
    return int(np.argmin(np.diff(losses) / np.diff(np.log(rates))))


def _minimum(rates: np.ndarray, losses: np.ndarray) -> int:
    return int(np.argmin(losses))


def _valley(rates: np.ndarray, losses: np.ndarray) -> int:
    lengths = np.ones(len(losses), int)  # of the longest decreasing subsequence that ends here
    for i in range(1, len(losses)):
        lengths[i] += np.max(lengths[:i], where=losses[:i] > losses[i], initial=0)
    length, end = int(np.max(lengths)), int(np.argmax(lengths))
    return end - length + length // 3 + length // 6 if length > 1 else 0


def _slide(rates: np.ndarray, losses: np.ndarray) -> int:
    slopes = np.gradient(losses)
    right, index = -1, -1 - _SLIDE_WIDTH
    left = index
    while left >= -len(losses) and abs(slopes[right] - slopes[left]) > _SLIDE_THRESHOLD:
        index, right, left = left, right - 1, left - 1
    return index


# ---- Constant rates: what the trials say ----

UNSTABLE_RATIO = 3.0  # how far above what is usual the training loss rises in an unstable trial
LOST_DESCENT = 0.5  # of the best descent; a trial that keeps more is stable, however it came there
BEST_TO_PEAK = 0.5  # from the rate that is best in a short trial to the suggestion


class Analysis(NamedTuple):
    """What constant-rate trials say; rates are NaN where they are not defined.

    Attributes:
        suggestion: Half the rate with the lowest final loss, the geometric mean over seeds.
        interval: The 95 % t interval of the suggestion over seeds, in the logarithm of the rate. It covers
            seeds, not the choice of half, nor other lengths of trials.
        steepest: Where the mean final loss falls fastest with the logarithm of the rate.
        largest_stable: The middle, in the logarithm, of the last stable rate and the first unstable one.
        unstable: Which trials are unstable, [rate, seed].
        declined: Why there is no suggestion, or None.
    """

    suggestion: float
    interval: tuple[float, float]
    steepest: float
    largest_stable: float
    unstable: np.ndarray
    declined: str | None


def analyze(rates: np.ndarray, initial: np.ndarray, final: np.ndarray, training: np.ndarray) -> Analysis:
    r"""Analyzes trials at constant rates.

    **Stable.** A trial is unstable if a loss is not finite, or if it ends without half of the descent that
    the seed's best trial makes and its training loss is not stationary: with :math:`P_1, P_2` the peaks in
    the first and the second half, above the lowest loss of all, and P the usual peak (the larger of the
    initial loss and the peak at the lowest rate),

    .. math:: \max(P_1, P_2) > 3 \max(\min(P_1, P_2), P).

    :math:`P_2 > P_1` is a loss that grows; :math:`P_1 > P_2` one that exploded and came to rest on a plateau,
    as in networks, which seldom overflow. A quadratic's noise floor may lie far above the initial loss: it
    is stationary, and stable. A rate is unstable if one of its trials is not finite or half of them are
    unstable. Only the rates below the first unstable one enter what follows.

    **Suggestion.** Each seed's best rate is the minimum of its final loss, by a parabola through the lowest
    point and its neighbours. Short trials prefer larger rates than long runs do: half the best rate lost
    least in the worst case on a small network (SGD, momentum, Adam; constant and decaying rates; runs 3 to
    30 times as long). It cannot exceed half the largest stable rate. The steepest rate is not used: on a
    quadratic of curvature h it is 1/(2hT) after T steps, which says more about T than about h.

    Args:
        rates: [rate], ascending and evenly spaced in the logarithm.
        initial: [seed], the loss on the probe set before training.
        final: [rate, seed], the loss on the probe set after training.
        training: [rate, seed, window], the training losses on the way.
    """
    x, losses = np.log(rates), np.where(np.isfinite(final), final, np.inf)
    finite = np.isfinite(final) & np.all(np.isfinite(training), axis=2)
    unstable = ~finite | _is_unstable(initial, losses, np.where(finite[..., None], training, np.inf))
    bad = ~np.all(finite, axis=1) | (np.mean(unstable, axis=1) >= 0.5)
    stable = int(np.argmax(bad)) if bad.any() else len(rates)  # the number of rates below the first bad one
    limit = math.exp(x[stable - 1 : stable + 1].mean()) if 0 < stable < len(rates) else math.nan

    x, losses = x[:stable], losses[:stable]
    mean = losses.mean(axis=1)
    steepest = math.nan
    if stable > 1 and np.min(slopes := np.diff(mean) / np.diff(x)) < 0:
        steepest = math.exp(_lowest((x[1:] + x[:-1]) / 2, slopes))
    declined = _reason_to_decline(rates, initial, losses, finite)
    if declined is not None:
        return Analysis(math.nan, (math.nan, math.nan), steepest, limit, unstable, declined)
    best = np.array([_lowest(x, of_seed) for of_seed in losses.T])
    suggestion, interval = _geometric_mean(BEST_TO_PEAK * np.exp(best), spacing=float(x[1] - x[0]))
    return Analysis(suggestion, interval, steepest, limit, unstable, None)


def _is_unstable(initial: np.ndarray, final: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Which finite trials, [rate, seed], lost their descent and are not stationary; see `analyze`."""
    descent = initial - final
    keeps = descent > LOST_DESCENT * descent.max(axis=0)
    lowest = min(training.min(), final.min(), initial.min())
    half = training.shape[2] // 2
    first = training[..., :half].max(axis=2, initial=lowest) - lowest
    second = training[..., half:].max(axis=2) - lowest
    high, low = np.maximum(first, second), np.minimum(first, second)
    usual = np.maximum(initial - lowest, np.where(np.isfinite(high[0]), high[0], 0))
    return ~keeps & (high > UNSTABLE_RATIO * np.maximum(low, usual))


def _reason_to_decline(
    rates: np.ndarray, initial: np.ndarray, stable_losses: np.ndarray, finite: np.ndarray
) -> str | None:
    if not np.all(np.isfinite(initial)):
        return "the loss is not finite before training"
    if not finite.any():
        return f"every trial diverges, at {rates[0]:.2g} already: lower low"
    if not len(stable_losses):
        return f"training is unstable at the lowest rate, {rates[0]:.2g}, already: lower low"
    best, seeds = int(np.argmin(stable_losses.mean(axis=1))), len(initial)
    fell = int(np.sum(stable_losses[best] < initial))
    if stats.binom.sf(fell - 1, seeds, 0.5) > max(0.05, 0.5**seeds):  # a sign test over seeds
        where = f"at the best rate, {rates[best]:.2g}"
        return f"nothing descends: {where}, the loss falls in {fell} of {seeds} seeds"
    if best == 0:
        return f"the loss is lowest at the lowest rate, {rates[0]:.2g}: lower low"
    if best == len(rates) - 1:
        return f"the loss is lowest at the highest rate, {rates[-1]:.2g}: raise high"
    return None


def _lowest(x: np.ndarray, y: np.ndarray) -> float:
    """Where y is lowest: the vertex of the parabola through the lowest point and its neighbours."""
    i = int(np.argmin(y))
    if i in (0, len(y) - 1):
        return float(x[i])
    curvature = y[i - 1] - 2 * y[i] + y[i + 1]
    shift = (y[i - 1] - y[i + 1]) / (2 * curvature) if curvature > 0 else 0.0  # within half a spacing
    return float(x[i] + shift * (x[i + 1] - x[i]))


def _geometric_mean(rates: np.ndarray, spacing: float = 0.0) -> tuple[float, tuple[float, float]]:
    """The geometric mean of one rate a seed, and its interval; NaNs are left out.

    A rate read off a grid is rounded: one twelfth of the squared `spacing` is added to the seeds' variance.
    """
    logs = np.log(rates[np.isfinite(rates)])
    if len(logs) < 2:
        return (math.exp(logs[0]) if len(logs) else math.nan), (math.nan, math.nan)
    error = math.sqrt((logs.var(ddof=1) + spacing**2 / 12) / len(logs))
    center, half = logs.mean(), stats.t.ppf(0.975, len(logs) - 1) * error
    return math.exp(center), (math.exp(center - half), math.exp(center + half))


# ---- The ramp ----

SMOOTHING, STOP_RATIO, DROPPED_END = 0.98, 4.0, 5  # fastai's


def read_ramp(rates: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    r"""Smooths the losses of one ramp, stops it where fastai would, and applies the rules.

    .. math::

        a_i = \beta a_{i-1} + (1 - \beta) L_i, \qquad \hat L_i = a_i / (1 - \beta^{i+1}), \quad \beta = 0.98

    The ramp ends with the first point that is not finite or above 4 times the lowest one before it. The rules
    see it without the first tenth of the planned steps and without its last five points; a rule that needs
    more points than are left gives NaN.

    Returns:
        The smoothed losses, the last of them the one that stopped the ramp; and the rate by each rule, with
        the rate of the stop as `"stop"` (NaN if nothing stopped it).
    """
    smoothed, average, best, stop = [], 0.0, math.inf, math.nan
    for i, loss in enumerate(losses.tolist()):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING ** (i + 1)))
        best = min(best, smoothed[-1])
        if not math.isfinite(smoothed[-1]) or smoothed[-1] > STOP_RATIO * best > 0:
            stop = float(rates[i])
            break
    kept = slice(len(losses) // 10, max(len(smoothed) - DROPPED_END, 0))
    read = {"stop": stop}
    for rule, fewest in _FEWEST_POINTS.items():
        curve = smoothed[kept]
        read[rule] = suggest(rates[: len(smoothed)][kept], curve, rule) if len(curve) >= fewest else math.nan
    return np.array(smoothed), read


# ---- The range test ----

POINTS_PER_DECADE = 4  # a limit between two rates is then known within a factor of 1.33
PROBE_BATCHES, PROBE_SAMPLES = 8, 256  # the probe set has at least these, where the training data does


@dataclasses.dataclass(frozen=True, eq=False)
class RangeTest:
    """The result of a learning-rate range test; rates are NaN where they are not defined.

    Attributes:
        suggestion: The peak learning rate to start from.
        interval: Its 95 % interval over seeds.
        steepest: Where the loss falls fastest with the logarithm of the rate.
        largest_stable: Up to where training is stable; NaN if the grid does not show it.
        table: One row a trial: learning_rate, seed, initial_loss and final_loss (on the probe set), peak_loss
            (of training), diverged, unstable. Of a ramp: seed, step, learning_rate, loss, smoothed_loss.
        declined: Why there is no suggestion, or None.
        sentence: The result in a sentence.
        rules: Of a ramp, one row a seed: the rate where it stopped and the rate by each rule. Otherwise None.
    """

    suggestion: float
    interval: tuple[float, float]
    steepest: float
    largest_stable: float
    table: pd.DataFrame
    declined: str | None
    sentence: str
    rules: pd.DataFrame | None = None

    def plot(self) -> Figure:
        """Draws the loss against the learning rate, with what the test reads off it."""
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        if self.rules is None:
            _draw_trials(axes, self.table)
        else:
            _draw_ramp(axes, self.table)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        if math.isfinite(self.interval[0]):
            name = "95 % interval over seeds"
            axes.axvspan(*self.interval, color=_MARK, alpha=0.18, linewidth=0, label=name)
        for rate, color, style, name in (
            (self.suggestion, _MARK, "-", "suggestion"),
            (self.steepest, _INK, ":", "steepest"),
            (self.largest_stable, _INK, "--", "largest stable"),
        ):
            if math.isfinite(rate):
                axes.axvline(rate, color=color, linestyle=style, label=f"{name} {rate:.2g}")
        if self.declined is not None:
            axes.set_title(f"No suggestion: {self.declined}", fontsize=9, wrap=True)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        return figure


_LINE, _MARK, _INK = "#0072B2", "#D55E00", "#444444"  # Okabe and Ito (2008)


def _draw_trials(axes: Any, table: pd.DataFrame) -> None:
    """Draws mean and range of the final loss over seeds; what exploded may leave the picture at the top."""
    seeds = len(np.unique(table["seed"].to_numpy()))
    rates = table["learning_rate"].to_numpy()[::seeds]
    final, trial_diverged = (table[name].to_numpy().reshape(-1, seeds) for name in ("final_loss", "diverged"))
    diverged: np.ndarray = np.any(trial_diverged, axis=1)
    initial = table["initial_loss"].to_numpy().mean()
    shown = np.where(diverged[:, None], np.nan, final)
    axes.fill_between(
        rates, shown.min(axis=1), shown.max(axis=1), color=_LINE, alpha=0.2, linewidth=0, label="all seeds"
    )
    axes.plot(rates, shown.mean(axis=1), color=_LINE, marker="o", markersize=3, label="mean over seeds")
    axes.axhline(initial, color="#888888", linewidth=0.8, label="before training")
    if diverged.any():
        at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(
            rates[diverged], np.ones(diverged.sum()), "x", color=_MARK, label="a trial diverged", **at_top
        )
    lowest = np.min(shown, where=np.isfinite(shown), initial=math.inf)
    if 0 < lowest < initial / 10:
        axes.set_yscale("log")
    _limit_top(axes, lowest, 3 * initial if axes.get_yscale() == "log" else 2 * initial - lowest)


def _draw_ramp(axes: Any, table: pd.DataFrame) -> None:
    """Draws the smoothed loss of every seed."""
    rates, smoothed = table["learning_rate"].to_numpy(), table["smoothed_loss"].to_numpy()
    starts = np.flatnonzero(table["step"].to_numpy() == 0)
    for curve in np.split(np.arange(len(rates)), starts[1:]):
        axes.plot(rates[curve], smoothed[curve], color=_LINE, linewidth=1)
    _limit_top(axes, np.min(smoothed), 2 * smoothed[starts].mean() - np.min(smoothed))


def _limit_top(axes: Any, lowest: float, top: float) -> None:
    if math.isfinite(top) and top > lowest and axes.get_ylim()[1] > top:
        margin = 0.5 * lowest if axes.get_yscale() == "log" else 0.05 * (top - lowest)
        axes.set_ylim(lowest - margin, top)


def lr_range_test(
    task: Task,
    optimizer: Optimizer,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    points: int | None = None,
    steps: int = 100,
    seeds: int = 5,
    ramp: bool = False,
    base_seed: int = 0,
    mode: str | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
) -> RangeTest:
    """Finds a peak learning rate by short trials at constant rates, and says how sure it is.

    A first rate for a run, or the middle of a grid for `compare`. Every rate is tried on the same seeds, in
    one compiled program; a trial costs `steps` training steps. `analyze` says how the trials are read. The
    probe set, on which losses are compared, is an evenly spaced part of the training data in whole batches,
    and the loss on it is the task's loss as in training (the metric is not used).

    Args:
        task: The task.
        optimizer: `optimizer(learning_rate) -> transformation`; with `ramp` the rate is a schedule.
        low: The lowest rate, above 0.
        high: The highest rate, above `low`.
        points: The number of rates, at least 5; by default 4 a decade, both ends included.
        steps: Training steps of a trial, at least 4; of a ramp, all its steps, at least 20.
        seeds: Trials at each rate, at least 2. They share initial parameters and batches between the rates.
        ramp: Whether to run the classic test instead: one run a seed, whose rate grows geometrically from
            `low` to `high`. Its suggestion is fastai's default, `"valley"`, its `largest_stable` the rate
            where it stops, both as geometric means over seeds. It is there to compare with.
        base_seed: Another number draws other seeds.
        mode: How trials are run, `"scan"`, `"step"` or `"vmap"`; None chooses.
        chunk: Trials a call on each device; None chooses.
        progress: Whether to show a progress bar; None shows it in a terminal.

    Raises:
        ValueError: If an argument is out of its range, or the optimizer cannot be run on the task.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_optax import sgd, study
    >>> x = jax.random.normal(jax.random.key(0), (256, 4))
    >>> task = study.Task(
    ...     init=lambda key: jnp.ones(4),
    ...     loss=lambda w, batch, key: jnp.mean(2 * (w - batch) ** 2),
    ...     train=x, validation=x, batch_size=32,
    ... )
    >>> found = study.lr_range_test(task, sgd, low=1e-3, high=1e2, seeds=2, steps=20)
    >>> bool(1.5 < found.largest_stable < 2.7)  # the curvature is 1 in every direction: the limit is 2
    True
    """
    check_scalar("low", low, "(0, inf)")
    check_scalar("high", high, "(0, inf)")
    low, high = float(low), float(high)
    if not low < high:
        raise ValueError(f"high must be above low, got low={low!r} and high={high!r}.")
    if points is None:
        points = max(math.ceil(POINTS_PER_DECADE * math.log10(high / low) - 1e-9), 4) + 1
    check_integer("points", points, "[5, inf)")
    check_bool("ramp", ramp)
    check_integer("steps", steps, "[20, inf)" if ramp else "[4, inf)")
    check_integer("seeds", seeds, "[2, inf)", "an interval over seeds needs two")
    check_integer("base_seed", base_seed, f"[0, {2**31 // seeds}]")

    if mode is not None:
        check_choice("mode", mode, MODES)
    if chunk is not None:
        check_integer("chunk", chunk, "[1, inf)")

    probed = _probe_task(task)
    arm = _Ramp(optimizer, low) if ramp else _Constant(optimizer)
    plan = _EveryStep(steps, (0, steps)) if ramp else Plan(steps, (0, steps))
    rates = np.array([high]) if ramp else np.geomspace(low, high, points)
    numbers = base_seed * seeds + np.arange(seeds)
    name, phase = "optimizer", "ramp" if ramp else "range test"
    arms = {name: ArmSpec(arm, check_arm(name, arm, probed, plan, None, float(rates[0])), None, 0)}
    trials = rates.size * seeds
    layout, _ = settle_layout(
        probed, arms, plan, trials=trials, example_rate=float(rates[0]), mode=mode, chunk=chunk
    )
    keys = [[Key(name, float(rate), int(seed)) for seed in numbers] for rate in rates]
    with TrialProgress(trials, progress) as bar:
        runner = Runner(probed, arms, plan, layout, None, bar)
        runner.run([key for row in keys for key in row], phase)
    records = [[runner.results[key] for key in row] for row in keys]
    training = np.array([[record.training for record in row] for row in records], np.float64)
    probe = np.array([[record.validation for record in row] for row in records], np.float64)
    if ramp:
        return _ramp_result(low * (high / low) ** (np.arange(steps) / (steps - 1)), numbers, training[0])
    return _trials_result(rates, numbers, probe, training, steps)


def _trials_result(
    rates: np.ndarray, numbers: np.ndarray, probe: np.ndarray, training: np.ndarray, steps: int
) -> RangeTest:
    with np.errstate(invalid="ignore"):
        found = analyze(rates, probe[0, :, 0], probe[..., -1], training)
    table = pd.DataFrame(
        {
            "learning_rate": np.repeat(rates, len(numbers)),
            "seed": np.tile(numbers, len(rates)),
            "initial_loss": probe[..., 0].ravel(),
            "final_loss": probe[..., -1].ravel(),
            "peak_loss": training.max(axis=2).ravel(),
            "diverged": ~(np.isfinite(probe[..., -1]) & np.isfinite(training).all(axis=2)).ravel(),
            "unstable": found.unstable.ravel(),
        }
    )
    stable = (
        f"training is stable up to about {found.largest_stable:.2g}"
        if math.isfinite(found.largest_stable)
        else f"no rate up to {rates[-1]:.2g} is unstable"
    )
    if found.declined is not None:
        sentence = f"No learning rate is suggested: {found.declined}."
    else:
        sentence = (
            f"Start from a learning rate of {found.suggestion:.2g} (95 % interval over {len(numbers)} seeds: "
            f"{found.interval[0]:.2g} to {found.interval[1]:.2g}), half the rate with the lowest loss after "
            f"{steps} steps; {stable}."
        )
    return RangeTest(
        found.suggestion,
        found.interval,
        found.steepest,
        found.largest_stable,
        table,
        found.declined,
        sentence,
    )


def _ramp_result(rates: np.ndarray, numbers: np.ndarray, losses: np.ndarray) -> RangeTest:
    read = [read_ramp(rates, of_seed) for of_seed in losses]
    rules = pd.DataFrame([by_rule for _, by_rule in read])
    rules.insert(0, "seed", numbers)
    curves = [
        {"seed": seed, "step": i, "learning_rate": rates[i], "loss": of_seed[i], "smoothed_loss": loss}
        for seed, of_seed, (smoothed, _) in zip(numbers, losses, read, strict=True)
        for i, loss in enumerate(smoothed)
    ]
    mean = {rule: _geometric_mean(rules[rule].to_numpy()) for rule in ("valley", "steepest", "stop")}
    suggestion, interval = mean["valley"]
    if math.isfinite(suggestion):
        declined = None
        sentence = (
            f"The ramp suggests a learning rate of {suggestion:.2g} by the rule 'valley' (95 % interval over "
            f"{len(numbers)} seeds: {interval[0]:.2g} to {interval[1]:.2g})."
        )
    else:
        declined = "the ramp stops too early in every seed to leave points for the rules: lower low"
        sentence = f"No learning rate is suggested: {declined}."
    steepest, stop = mean["steepest"][0], mean["stop"][0]
    return RangeTest(suggestion, interval, steepest, stop, pd.DataFrame(curves), declined, sentence, rules)


@dataclasses.dataclass(frozen=True)
class _Constant:
    """The arm of a constant rate; equal for equal optimizers, so that it compiles once."""

    optimizer: Optimizer

    def __call__(self, rate: Any, steps: int) -> optax.GradientTransformation:
        return self.optimizer(rate)


@dataclasses.dataclass(frozen=True)
class _Ramp:
    """The arm whose rate grows geometrically from `low` to the trial's rate."""

    optimizer: Optimizer
    low: float

    def __call__(self, rate: Any, steps: int) -> optax.GradientTransformation:
        return self.optimizer(lambda count: self.low * (rate / self.low) ** (count / (steps - 1)))


@dataclasses.dataclass(frozen=True)
class _EveryStep(Plan):
    """A plan that keeps the training loss of every step."""

    @property
    def window(self) -> int:
        return 1


@functools.lru_cache(maxsize=8)
def _probe_task(task: Task) -> Task:
    """The task, judged by its loss on evenly spaced training samples, a batch at a time."""
    batches = max(PROBE_BATCHES, -(-PROBE_SAMPLES // task.batch_size))
    count = min(batches, task.train_count // task.batch_size) * task.batch_size
    chosen = np.arange(count) * task.train_count // count
    return dataclasses.replace(
        task,
        validation=jax.tree.map(lambda x: x[chosen], task.train),
        metric=None,
        evaluation_batch_size=task.batch_size,
    )

"""The learning-rate range test: finds a peak rate to start from, by short trials at constant rates.

The classic test (Smith 2017, "Cyclical learning rates for training neural networks") trains once while the
rate grows at every step. Each loss then depends on all earlier rates, on the moving average that smooths it,
and on its batch. Here every rate has its own trials, from the same initial parameters and with the same
batches, and losses are compared on one fixed part of the training data.

`ramp=True` runs the classic test, and `suggest` applies the usual rules for reading such curves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
import pandas as pd

from adaptive_optax._core.checks import check_bool, check_choice, check_integer
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.study.arms import check_arm
from adaptive_optax.study.engine.chunks import Key
from adaptive_optax.study.engine.placement import MODES, MOST_CHUNK, settle_placement
from adaptive_optax.study.engine.progress import TrialProgress
from adaptive_optax.study.engine.runner import Runner
from adaptive_optax.study.engine.trainers import ArmSpec, TaskTrainer
from adaptive_optax.study.engine.trials import Plan, one_study
from adaptive_optax.study.statistics.ramp import read_ramp
from adaptive_optax.study.statistics.range_analysis import analyze, geometric_mean
from adaptive_optax.study.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Optimizer = Callable[[Any], optax.GradientTransformation]
"""A function from the learning rate, which may be traced, to an optimizer, for example `ao.adam`."""

POINTS_PER_DECADE = 4  # locates a limit between two rates within a factor of 1.33
PROBE_BATCHES, PROBE_SAMPLES = 8, 256  # minimum size of the probe set, if the training data suffices


@dataclasses.dataclass(frozen=True, eq=False)
class RangeTest:
    """The result of a learning-rate range test; undefined rates are NaN.

    Attributes:
        suggestion: The peak learning rate to start from: half the rate that was best in these short trials,
            since long runs prefer smaller ones.
        interval: Its 95 % interval over seeds.
        steepest: Where the loss falls fastest with the logarithm of the rate.
        largest_stable: The rate up to which training is stable; NaN if the grid does not show it.
        table: One row per trial: learning_rate, seed, initial_loss and final_loss (on the probe set),
            peak_loss (of training), diverged, unstable. For a ramp: seed, step, learning_rate, loss,
            smoothed_loss.
        declined: Why there is no suggestion, or None.
        sentence: The result in a sentence.
        rules: For a ramp, one row per seed: the rate where it stopped and the rate by each rule. Otherwise
            None.
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
        """Draws the loss against the learning rate, and marks the rates that the test found."""
        from adaptive_optax._core.drawing import Picture  # import matplotlib only when drawing

        figure = Picture(figsize=(6.4, 4.0), layout="constrained")
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
    """Draws mean and range of the final loss over seeds; exploded losses may leave the picture at the top."""
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
    """Finds a peak learning rate by short trials at constant rates, with an interval.

    Use it as a first rate for a run, or as the middle of a grid for `compare`. Every rate is tried on the
    same seeds, in one compiled program; a trial costs `steps` training steps. `analyze` documents how the
    trials are read. Losses are compared on the probe set, an evenly spaced part of the training data in whole
    batches, with the task's loss as in training (the metric is not used).

    Args:
        task: The task.
        optimizer: `optimizer(learning_rate) -> transformation`; with `ramp` the rate is a schedule.
        low: The lowest rate, above 0.
        high: The highest rate, above `low`.
        points: The number of rates, at least 5; by default 4 per decade, including both ends.
        steps: Training steps per trial, at least 4; for a ramp, all its steps, at least 20.
        seeds: Trials per rate, at least 2. A seed has the same initial parameters and batches at every rate.
        ramp: Whether to run the classic test instead, for comparison: one trial per seed, whose rate grows
            geometrically from `low` to `high`. Its suggestion is by fastai's default rule, `"valley"`, and
            its `largest_stable` is the rate where it stops, both as geometric means over seeds.
        base_seed: A different number draws different seeds.
        mode: How trials are trained, `"scan"`, `"step"` or `"vmap"`; None chooses.
        chunk: Trials per call on each device; None chooses.
        progress: Whether to show a progress bar; None shows it in a terminal.

    Raises:
        ValueError: If an argument is out of range, or the optimizer cannot be run on the task.

    Examples:
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
    check_hyperparameter("low", low, interval="(0, inf)", dtype=np.float32)
    check_hyperparameter("high", high, interval="(0, inf)", dtype=np.float32)
    low, high = float(low), float(high)
    if not low < high:
        raise ValueError(f"high must be above low, got low={low!r} and high={high!r}.")
    if points is None:
        points = max(math.ceil(POINTS_PER_DECADE * math.log10(high / low) - 1e-9), 4) + 1
    check_integer("points", points, "[5, 10000]")
    check_bool("ramp", ramp)
    check_integer("steps", steps, "[20, 1000000]" if ramp else f"[4, {2**31 - 1}]")
    check_integer("seeds", seeds, "[2, 10000]", "an interval over seeds needs two")
    check_integer("base_seed", base_seed, f"[0, {2**31 // seeds}]")
    points, steps, seeds, base_seed = map(int, (points, steps, seeds, base_seed))
    if mode is not None:
        check_choice("mode", mode, MODES)
    if chunk is not None:
        check_integer("chunk", chunk, f"[1, {MOST_CHUNK}]")
        chunk = int(chunk)

    probed = _probe_task(task)
    arm = _Ramp(optimizer, low) if ramp else _Constant(optimizer)
    plan = (_EveryStep if ramp else Plan)(steps, (0, steps), measurements=1)
    rates = np.array([high]) if ramp else np.geomspace(low, high, points)
    numbers = base_seed * seeds + np.arange(seeds)
    name, phase = "optimizer", "ramp" if ramp else "range test"
    arms = {name: ArmSpec(arm, check_arm(name, arm, probed, plan, None, float(rates[0])), None, 0)}
    trials = rates.size * seeds
    keys = [[Key(name, float(rate), int(seed)) for seed in numbers] for rate in rates]
    with one_study(), TrialProgress(trials, progress) as bar:
        placement, _ = settle_placement(
            probed, arms, plan, trials=trials, example_rate=float(rates[0]), mode=mode, chunk=chunk
        )
        runner = Runner(TaskTrainer(probed, arms, plan, placement), None, bar)
        runner.run([key for row in keys for key in row], phase)
    curves = [[runner.results[key] for key in row] for row in keys]
    training = np.array([[each.training for each in row] for row in curves], np.float64)
    probe = np.array([[each.validation for each in row] for row in curves], np.float64)
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
    mean = {rule: geometric_mean(rules[rule].to_numpy()) for rule in ("valley", "steepest", "stop")}
    suggestion, interval = mean["valley"]
    if math.isfinite(suggestion):
        declined = None
        sentence = (
            f"The ramp suggests a learning rate of {suggestion:.2g} by the rule 'valley' (95 % interval over "
            f"{len(numbers)} seeds: {interval[0]:.2g} to {interval[1]:.2g})."
        )
    else:
        declined = "in every seed the ramp stops too early to leave points for the rules: lower low"
        sentence = f"No learning rate is suggested: {declined}."
    steepest, stop = mean["steepest"][0], mean["stop"][0]
    return RangeTest(suggestion, interval, steepest, stop, pd.DataFrame(curves), declined, sentence, rules)


@dataclasses.dataclass(frozen=True)
class _Constant:
    """The arm of a constant rate."""

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


def _probe_task(task: Task) -> Task:
    """The task, judged by its loss on evenly spaced training samples, one batch at a time."""
    batches = max(PROBE_BATCHES, -(-PROBE_SAMPLES // task.batch_size))
    count = min(batches, task.train_count // task.batch_size) * task.batch_size
    chosen = np.arange(count) * task.train_count // count
    return dataclasses.replace(
        task,
        validation=jax.tree.map(lambda x: x[chosen], task.train),
        metric=None,
        maximize=False,
        evaluation_batch_size=task.batch_size,
    )

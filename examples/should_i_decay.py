"""Should I decay Adam's learning rate? Asked of an image-localization network, and answered by measurement.

The question as it was first asked in public: somebody trains an image-localization network with Adam, is told
to add exponential decay, and wonders. Some answers say "not needed, Adam adapts", others "it helped me".

Here scikit-learn's handwritten digits are placed at random positions and sizes on a larger noisy canvas; a
small Flax network reads off the box around the ink, and is judged by the mean absolute error of the box in
pixels. Seven arms (Adam constant, with 0.8 every 5 epochs, with the same decay made smooth, with one-cycle;
AdamW with the best of these; RMSprop; RMSprop in the global-norm form) are each tuned over peak learning
rates on a few seeds. The best rate of each arm is run again on fresh seeds, and only those runs enter the
answer. A seed decides the placements, the first weights and the order of the batches, the same in every arm,
so arms are compared seed by seed.

    pip install -e .[examples]
    python examples/should_i_decay.py

It prints two tables and an answer, and writes to `--out`:
    curves.png    training and validation error over epochs, with and without decay
    rates.png     validation error against the peak learning rate, every arm
    results.csv   one row a run, written as the runs finish; curves.csv the same, one row an epoch
    summary.json  the tables, the seeds, the versions and the command
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas as pd
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adaptive_optax as ao

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# --- The task: where is the digit? -------------------------------------------------------------------------

CANVAS, PATCH = 32, 4  # pixels
DIGIT_SIZE = (8.0, 20.0)  # an 8 x 8 digit is drawn at a side drawn from this range, pixels
BACKGROUND, INK, NOISE = 64, 160, 32  # grey levels out of 255


class Data(NamedTuple):
    """The images of one seed, cut into patches (uint8), and their boxes (left, top, right, bottom)."""

    train_images: Any
    train_boxes: Any
    validation_images: Any
    validation_boxes: Any


def place(digits: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` noisy canvases with one digit each, and the boxes around the ink."""
    chosen = digits[rng.integers(len(digits), size=count)]
    size = rng.uniform(*DIGIT_SIZE, size=count)
    corner = rng.uniform(size=(count, 2)) * (CANVAS - size)[:, None]

    def interpolation(start: np.ndarray) -> np.ndarray:
        """The bilinear weights of the digit's 8 rows (or columns) in the canvas's."""
        position = (np.arange(CANVAS) + 0.5 - start[:, None]) / size[:, None] * 8 - 0.5
        return np.clip(1 - np.abs(position[:, :, None] - np.arange(8)), 0, None)

    image = interpolation(corner[:, 1]) @ chosen @ interpolation(corner[:, 0]).transpose(0, 2, 1)
    image = BACKGROUND + INK * image + NOISE * rng.standard_normal(image.shape)
    grid = CANVAS // PATCH
    patches = image.reshape(count, grid, PATCH, grid, PATCH).transpose(0, 1, 3, 2, 4)

    ends = []
    for axis in (1, 2):  # the ink's first and last column, then its first and last row
        inked = chosen.max(axis=axis) > 0.1
        ends.append((inked.argmax(axis=1), 8 - inked[:, ::-1].argmax(axis=1)))
    inside = np.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], axis=1)
    boxes = np.tile(corner, 2) + inside * size[:, None] / 8
    images = np.clip(patches.reshape(count, grid * grid, PATCH * PATCH), 0, 255).astype(np.uint8)
    return images, boxes.astype(np.float32)


@functools.cache
def make_data(seed: int, train_count: int, validation_count: int) -> Data:
    """Makes the placements of one seed; no digit is in both the training and the validation images."""
    train, validation = train_test_split(load_digits().images / 16, test_size=0.25, random_state=0)
    rng = np.random.default_rng(seed)
    return Data(*place(train, train_count, rng), *place(validation, validation_count, rng))


class LocalizationNet(nnx.Module):
    """Embeds every patch alike, then two dense layers; the answer is in pixels."""

    def __init__(self, rngs: nnx.Rngs, *, width: int = 8, hidden: int = 64):
        """Builds the three layers."""
        self.embed = nnx.Linear(PATCH**2, width, rngs=rngs)
        self.hidden = nnx.Linear((CANVAS // PATCH) ** 2 * width, hidden, rngs=rngs)
        self.box = nnx.Linear(hidden, 4, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        """Gives the boxes of a batch of images in patches."""
        x = (patches.astype(jnp.float32) - BACKGROUND) / INK
        x = nnx.relu(self.embed(x)).reshape(len(x), -1)
        return CANVAS / 2 * (1 + self.box(nnx.relu(self.hidden(x))))


def mean_absolute_error(model: LocalizationNet, images: jax.Array, boxes: jax.Array) -> jax.Array:
    """The mean absolute error of the boxes' four sides in pixels: the loss and the metric."""
    return jnp.mean(jnp.abs(model(images) - boxes))


# --- The arms: what to train with --------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a schedule needs to know of a run."""

    epochs: int
    steps_per_epoch: int


# Each gives (learning_rate, b1) for a peak learning rate.
SCHEDULES: dict[str, Callable[[Any, Plan], tuple[Any, Any]]] = {
    "constant": lambda rate, plan: (rate, 0.9),
    "0.8 / 5 epochs": lambda rate, plan: (ao.step_decay(rate, 0.8, 5 * plan.steps_per_epoch), 0.9),
    "exponential": lambda rate, plan: (ao.exponential_decay(rate, 5 * plan.steps_per_epoch, 0.8), 0.9),
    "one-cycle": lambda rate, plan: tuple(ao.one_cycle(rate, plan.epochs * plan.steps_per_epoch)),
}
WEIGHT_DECAY = 1e-2
ARM_COUNT = len(SCHEDULES) + 3
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# The global-norm form moves every weight in proportion to its gradient, so that the weights with the largest
# gradients get more than the learning rate; it wants a lower one.
GLOBAL_RATES = tuple(rate / 10 for rate in RATES)


class Arm(NamedTuple):
    """A way to train: `build(peak learning rate)` gives the optax transformation."""

    name: str
    build: Callable[[Any], optax.GradientTransformationExtraArgs]
    rates: tuple[float, ...]


def adam_arm(schedule: str, plan: Plan, rates: tuple[float, ...]) -> Arm:
    """Adam with one of the schedules."""

    def build(rate: Any) -> optax.GradientTransformationExtraArgs:
        learning_rate, b1 = SCHEDULES[schedule](rate, plan)
        return ao.adam(learning_rate, b1=b1)

    return Arm(f"Adam, {schedule}", build, rates)


def adamw_arm(schedule: str, plan: Plan, rates: tuple[float, ...]) -> Arm:
    """AdamW with one of the schedules."""

    def build(rate: Any) -> optax.GradientTransformationExtraArgs:
        learning_rate, b1 = SCHEDULES[schedule](rate, plan)
        return ao.adamw(learning_rate, b1=b1, weight_decay=WEIGHT_DECAY)

    return Arm(f"AdamW, {schedule}", build, rates)


# --- Training: several runs of one arm side by side --------------------------------------------------------


class Settings(NamedTuple):
    """The sizes of the experiment."""

    plan: Plan
    batch_size: int
    train_count: int
    validation_count: int
    rates: tuple[float, ...]
    global_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    fresh_seeds: tuple[int, ...]


def make_trainer(arm: Arm, settings: Settings) -> Callable[..., np.ndarray]:
    """Makes `train(rates, seeds, tick)`: one run for each (rate, seed), giving the errors (run, epoch, 2).

    Every call trains as many runs side by side as there are rates, so that tuning (all rates, one seed) and
    confirmation (one rate, many seeds) share one compilation.
    """
    plan, width = settings.plan, len(settings.rates)
    devices = jax.devices()
    devices = devices[: max(n for n in range(1, len(devices) + 1) if width % n == 0)]
    mesh = jax.sharding.Mesh(np.array(devices), ("runs",))
    side_by_side = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    graph, _ = nnx.split(LocalizationNet(nnx.Rngs(0)))

    def loss(params: Any, images: jax.Array, boxes: jax.Array) -> jax.Array:
        return mean_absolute_error(nnx.merge(graph, params), images, boxes)

    def start(rate: jax.Array, seed: jax.Array) -> tuple[Any, Any]:
        _, params = nnx.split(LocalizationNet(nnx.Rngs(jax.random.key(seed))))
        return params, arm.build(rate).init(params)

    def epoch(carry: Any, rate: jax.Array, data: Data, batches: jax.Array) -> tuple[Any, jax.Array]:
        transformation = arm.build(rate)

        def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            images, boxes = data.train_images[batch], data.train_boxes[batch]
            error, gradient = jax.value_and_grad(loss)(params, images, boxes)
            updates, state = transformation.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), error

        carry, errors = jax.lax.scan(step, carry, batches)
        validation = loss(carry[0], data.validation_images, data.validation_boxes)
        return carry, jnp.stack([errors.mean(), validation])

    start_runs = jax.jit(jax.vmap(start))
    train_epoch = jax.jit(jax.vmap(epoch), donate_argnums=0)

    def train(rates: list[float], seeds: list[int], tick: Callable[[], None]) -> np.ndarray:
        missing = width - len(seeds)  # filled up with copies of the last run, which are not reported
        some_rates, some_seeds = rates + rates[-1:] * missing, seeds + seeds[-1:] * missing
        some_data = [make_data(seed, settings.train_count, settings.validation_count) for seed in some_seeds]
        rate, seed, data = jax.device_put(
            (np.float32(some_rates), np.int32(some_seeds), jax.tree.map(lambda *x: np.stack(x), *some_data)),
            side_by_side,
        )
        orders = [np.random.default_rng([seed, 1]) for seed in some_seeds]
        carry, history = start_runs(rate, seed), []
        for _ in range(plan.epochs):
            batches = np.stack([order.permutation(settings.train_count) for order in orders])
            batches = batches.reshape(width, plan.steps_per_epoch, settings.batch_size).astype(np.int32)
            carry, errors = train_epoch(carry, rate, data, jax.device_put(batches, side_by_side))
            history.append(np.asarray(errors))
            tick()
        return np.stack(history, axis=1)[: len(seeds)]

    return train


class Experiment:
    """Trains arms, shows the progress, and writes every run down as soon as it is finished."""

    def __init__(self, settings: Settings, out: Path, console: Console):
        """Starts empty files in `out`."""
        out.mkdir(parents=True, exist_ok=True)
        self.settings, self.out = settings, out
        self.trainers: dict[str, Callable[..., np.ndarray]] = {}
        self.curves: list[pd.DataFrame] = []
        self.progress = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "epochs",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
            console=console,
        )
        calls = len(settings.tuning_seeds) + math.ceil(len(settings.fresh_seeds) / len(settings.rates))
        self.task = self.progress.add_task("", total=ARM_COUNT * calls * settings.plan.epochs)

    def tune(self, arm: Arm) -> float:
        """Trains every rate on the tuning seeds; gives the rate with the lowest mean validation error."""
        for seed in self.settings.tuning_seeds:
            self._train(arm, "tuning", list(arm.rates), [seed] * len(arm.rates))
        errors = tuning_errors(pd.concat(self.curves), arm)
        best = float(errors.idxmin())
        self.progress.console.print(f"tuned {arm.name}: best peak rate {best:g}, {errors.min():.3f} pixels")
        return best

    def confirm(self, arm: Arm, rate: float) -> None:
        """Trains the chosen rate on the fresh seeds."""
        seeds, width = list(self.settings.fresh_seeds), len(arm.rates)
        for first in range(0, len(seeds), width):
            some = seeds[first : first + width]
            self._train(arm, "fresh", [rate] * len(some), some)

    def _train(self, arm: Arm, phase: str, rates: list[float], seeds: list[int]) -> None:
        self.progress.update(self.task, description=f"{arm.name} ({phase})")
        if arm.name not in self.trainers:
            self.trainers[arm.name] = make_trainer(arm, self.settings)
        history = self.trainers[arm.name](rates, seeds, lambda: self.progress.advance(self.task))
        for rate, seed, errors in zip(rates, seeds, history, strict=True):
            run = {"arm": arm.name, "phase": phase, "rate": rate, "seed": seed}
            errors = {"train_mae": errors[:, 0], "validation_mae": errors[:, 1]}
            curve = pd.DataFrame({**run, "epoch": np.arange(1, self.settings.plan.epochs + 1), **errors})
            for rows, file in ((curve, "curves.csv"), (curve.tail(1), "results.csv")):
                path = self.out / file
                rows.to_csv(path, mode="a" if self.curves else "w", header=not self.curves, index=False)
            self.curves.append(curve)


# --- What the runs say -------------------------------------------------------------------------------------


def final(curves: pd.DataFrame, arm: str, phase: str) -> pd.DataFrame:
    """The last epoch of an arm's runs."""
    last = curves.epoch == curves.epoch.max()
    return curves[last & (curves.arm == arm) & (curves.phase == phase)]


def tuning_errors(curves: pd.DataFrame, arm: Arm) -> pd.Series:
    """The mean validation error of every peak rate, infinite where a run diverged."""
    errors = final(curves, arm.name, "tuning").groupby("rate").validation_mae
    return errors.apply(lambda e: e.mean() if np.isfinite(e).all() else math.inf)


class Finding(NamedTuple):
    """An arm at its best rate on the fresh seeds; the differences are to constant Adam, seed by seed."""

    arm: str
    rate: float
    on_edge: bool
    mean: float
    standard_error: float
    diverged: int
    difference: float
    low: float
    high: float
    verdict: str


def judge(curves: pd.DataFrame, arms: list[Arm], best: dict[str, float]) -> list[Finding]:
    """Compares every arm with the first. The intervals hold for all arms together, at 95 % (Bonferroni)."""
    findings = []
    baseline = final(curves, arms[0].name, "fresh").set_index("seed").validation_mae
    for arm in arms:
        errors = final(curves, arm.name, "fresh").set_index("seed").validation_mae
        finite = errors[np.isfinite(errors)]
        difference = errors - baseline
        count, middle = len(difference), float(difference.mean(skipna=False))
        half = float(stats.t.ppf(1 - 0.025 / (len(arms) - 1), count - 1) * difference.sem(skipna=False))
        low, high = middle - half, middle + half
        if arm is arms[0]:
            verdict = "baseline"
        elif not math.isfinite(half):
            verdict = "diverged"
        else:
            verdict = "better" if high < 0 else "worse" if low > 0 else "undecided"
        edge = best[arm.name] in (arm.rates[0], arm.rates[-1])
        mean, error = float(finite.mean()), float(finite.sem())
        diverged = count - len(finite)
        findings.append(
            Finding(arm.name, best[arm.name], edge, mean, error, diverged, middle, low, high, verdict)
        )
    return findings


def same_rate_table(curves: pd.DataFrame, arms: list[Arm]) -> Table:
    """Shows what decay does to Adam where both have the same peak rate: why public answers contradict."""
    table = Table(title="The same peak learning rate for both (tuning seeds): decay minus constant, pixels")
    table.add_column("peak rate", justify="right")
    table.add_column("constant", justify="right")
    for arm in arms[1:]:
        table.add_column(arm.name.removeprefix("Adam, "), justify="right")

    def errors(arm: Arm, rate: float) -> pd.Series:
        runs = final(curves, arm.name, "tuning")
        return runs[runs.rate == rate].set_index("seed").validation_mae

    for rate in arms[0].rates:
        constant = errors(arms[0], rate)
        cells = [f"{rate:g}", f"{constant.mean():.3f}"]
        for arm in arms[1:]:
            difference = errors(arm, rate) - constant
            middle, noise = difference.mean(skipna=False), difference.sem(skipna=False)
            clear = abs(middle) > 2 * noise if len(difference) > 1 else False
            word = "?" if not clear else "helps" if middle < 0 else "hurts"
            cells.append(f"{middle:+.3f} {word:5}")
        table.add_row(*cells)
    table.caption = "helps, hurts: by more than two standard errors; few seeds, so a direction, not a verdict"
    return table


def result_table(findings: list[Finding]) -> Table:
    """The table of the answer."""
    table = Table(title="Every arm at its own best peak rate, on fresh seeds: validation MAE, pixels")
    for heading in ("arm", "best peak rate", "mean ± s.e.", "minus constant Adam", "verdict"):
        table.add_column(heading, justify="left" if heading in ("arm", "verdict") else "right")
    for f in findings:
        difference = "" if f.verdict == "baseline" else f"{f.difference:+.3f} [{f.low:+.3f}, {f.high:+.3f}]"
        error = f"{f.mean:.3f} ± {f.standard_error:.3f}" + (f", {f.diverged} diverged" if f.diverged else "")
        table.add_row(f.arm, f"{f.rate:g}" + ("*" if f.on_edge else ""), error, difference, f.verdict)
    table.caption = "intervals: 95 % for all arms together; * at the end of the rates tried"
    return table


def answer(findings: list[Finding], seeds: int) -> str:
    """One sentence: should Adam's learning rate decay, here?"""
    baseline, decays = findings[0], findings[1 : len(SCHEDULES)]
    verdicts = [f.verdict for f in decays]
    if "better" in verdicts:
        lead = "Yes" if set(verdicts) == {"better"} else "It depends on the decay"
    else:
        lead = "No" if set(verdicts) <= {"worse", "diverged"} else "This run cannot tell"

    def say(f: Finding) -> str:
        name = f.arm.removeprefix("Adam, ")
        if f.verdict == "diverged":
            return f"{name} cannot be judged, as runs diverged"
        if f.verdict == "undecided":
            return f"{name} is undecided ({f.low:+.2f} to {f.high:+.2f} px)"
        low, high = sorted((abs(f.low), abs(f.high)))
        return f"{name} is {f.verdict} by {abs(f.difference):.2f} px ({low:.2f} to {high:.2f})"

    return (
        f"{lead}: with the peak rate tuned for each, against constant Adam's {baseline.mean:.2f} px on {seeds} "
        f"fresh seeds, {'; '.join(map(say, decays))}."
    )


def caveats(findings: list[Finding], settings: Settings) -> list[str]:
    """What the evidence does not support."""
    plan = settings.plan
    edges = [f"{f.arm} ({f.rate:g})" for f in findings if f.on_edge]
    unclear = [max(abs(f.low), abs(f.high)) for f in findings if f.verdict == "undecided"]
    lines = [
        f"Other tasks, networks, losses or budgets: this is one small network on one task, {plan.epochs} epochs "
        f"of {plan.steps_per_epoch} steps.",
        "Which part of one-cycle matters: it also warms up and cycles the momentum, so it is not decay alone.",
        "A ranking of the arms among themselves: each is compared with constant Adam only.",
        "Rates between those tried, which are a factor of about 3 apart, and other settings, which were not tuned.",
    ]
    if unclear:
        lines.append(f"That undecided arms are equal: a difference up to {max(unclear):.2f} px may be there.")
    if edges:
        lines.append(f"The best rate of {', '.join(edges)}: at the end of the rates tried, better may lie beyond.")
    return lines


# --- Pictures ----------------------------------------------------------------------------------------------

COLOURS = ("#000000", "#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#cc79a7", "#009e73")  # Okabe and Ito
MARKERS = "osD^vPX"


def plot_curves(curves: pd.DataFrame, arms: list[Arm], findings: list[Finding], path: Path) -> None:
    """Training and validation error over epochs, with and without decay, as such plots are usually drawn."""
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    fresh = curves[curves.phase == "fresh"]
    top = 0.0
    for index in (0, 1, 3):
        arm, colour = arms[index], COLOURS[index]
        for column, style in (("train_mae", ":"), ("validation_mae", "-")):
            runs = fresh[fresh.arm == arm.name].groupby("epoch")[column]
            mean, error = runs.mean(), runs.sem()
            axes.plot(mean.index, mean, style, color=colour, linewidth=2.2)
            axes.fill_between(mean.index, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
            top = max(top, float(mean.iloc[len(mean) // 8]))
        label = f"{arm.name}, peak {findings[index].rate:g}: {findings[index].mean:.2f} px"
        axes.plot([], [], color=colour, linewidth=2.2, label=label)
    axes.plot([], [], "-", color="grey", linewidth=2.2, label="validation")
    axes.plot([], [], ":", color="grey", linewidth=2.2, label="training (mean over the epoch)")
    if math.isfinite(top):
        axes.set_ylim(0, 1.15 * top)
    axes.set(xlabel="epoch", ylabel="mean absolute error, pixels")
    axes.set_title("With and without decay, each at its best peak rate\n(mean and standard error)")
    axes.legend(frameon=False, fontsize=11)
    finish(figure, axes, path)


def plot_rates(curves: pd.DataFrame, arms: list[Arm], best: dict[str, float], path: Path) -> None:
    """Validation error against the peak learning rate, every arm, on the tuning seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 6.8), layout="constrained")
    boxes = make_data(0, 512, 512)
    guess = float(np.abs(boxes.validation_boxes - boxes.train_boxes.mean(axis=0)).mean())
    for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=True):
        mean = tuning_errors(curves, arm)
        error = final(curves, arm.name, "tuning").groupby("rate").validation_mae.sem().fillna(0)
        axes.plot(mean.index, mean, color=colour, marker=marker, markersize=6, linewidth=1.8, label=arm.name)
        axes.fill_between(mean.index, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        chosen = best[arm.name]
        axes.plot(chosen, mean[chosen], marker, color=colour, markersize=13, fillstyle="none", markeredgewidth=2)
        for rate in mean.index[~np.isfinite(mean)]:
            axes.plot(rate, 1.3 * guess, "x", color=colour, markersize=9, markeredgewidth=2)
    axes.axhline(guess, color="grey", linewidth=1, linestyle="--")
    axes.annotate("always the average box", (0.99, guess), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    lowest = min(final(curves, arm.name, "tuning").validation_mae.min() for arm in arms)
    axes.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="validation MAE, pixels")
    axes.set_ylim(0.9 * lowest, 1.5 * guess)
    ticks = [tick for tick in (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7) if 0.9 * lowest < tick < 1.5 * guess]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.minorticks_off()
    axes.set_title("Every arm has its own best peak rate (ringed)\n(tuning seeds, mean and standard error)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    finish(figure, axes, path)


def finish(figure: Any, axes: Any, path: Path) -> None:
    """Draws on white, with nothing that carries no information, and saves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


# --- The whole ---------------------------------------------------------------------------------------------


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description="Measures whether Adam's learning rate should decay on an image-localization task.",
    )
    parser.add_argument("--steps", type=int, help="training steps a run, rounded up to whole epochs (default 1920)")
    parser.add_argument("--seeds", type=int, help="fresh seeds for the answer, at least 2 (default 12)")
    parser.add_argument("--out", type=Path, default=Path("out/should_i_decay"), help="(default out/should_i_decay)")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only shows that all of it works")
    values = parser.parse_args(arguments)
    if values.steps is not None and values.steps < 1:
        parser.error(f"--steps must be at least 1, got {values.steps}.")
    if values.seeds is not None and values.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a standard error, got {values.seeds}.")
    return values


def choose_settings(values: argparse.Namespace) -> Settings:
    """Turns the command line into sizes."""
    train, validation, batch = (256, 128, 32) if values.smoke else (3072, 1024, 64)
    per_epoch = train // batch
    plan = Plan(math.ceil((values.steps or (48 if values.smoke else 1920)) / per_epoch), per_epoch)
    fresh = range(1000, 1000 + (values.seeds or (2 if values.smoke else 12)))
    rates, tuning = (RATES[2:4], range(1)) if values.smoke else (RATES, range(3))
    global_rates = GLOBAL_RATES[2:4] if values.smoke else GLOBAL_RATES
    return Settings(plan, batch, train, validation, rates, global_rates, tuple(tuning), tuple(fresh))


def main(arguments: list[str] | None = None) -> None:
    """Runs the experiment."""
    values = read_arguments(arguments)
    settings = choose_settings(values)
    began, console = time.perf_counter(), Console(highlight=False)
    with contextlib.suppress(RuntimeError):  # raised where JAX is already in use; then it runs as it is
        jax.config.update("jax_num_cpu_devices", min(len(settings.rates), os.cpu_count() or 1))

    arms = [adam_arm(schedule, settings.plan, settings.rates) for schedule in SCHEDULES]
    experiment = Experiment(settings, values.out, console)
    try:
        with experiment.progress:
            best = {arm.name: experiment.tune(arm) for arm in arms}
            tuned = pd.concat(experiment.curves)
            winner = min(SCHEDULES, key=lambda schedule: tuning_errors(tuned, arms[list(SCHEDULES).index(schedule)]).min())
            others = [
                adamw_arm(winner, settings.plan, settings.rates),
                Arm("RMSprop", ao.rmsprop, settings.rates),
                Arm("RMSprop, global norm", ao.global_rmsprop, settings.global_rates),
            ]
            best |= {arm.name: experiment.tune(arm) for arm in others}
            arms += others
            for arm in arms:
                experiment.confirm(arm, best[arm.name])
    except KeyboardInterrupt:
        console.print(f"Stopped; the runs that finished are in {values.out / 'results.csv'}.")
        sys.exit(130)
    curves = pd.concat(experiment.curves, ignore_index=True)
    findings = judge(curves, arms, best)
    sentence, limits = answer(findings, len(settings.fresh_seeds)), caveats(findings, settings)
    console.print(same_rate_table(curves, arms[: len(SCHEDULES)]), result_table(findings))
    console.print(f"[bold]Should I decay Adam's learning rate?[/bold] {sentence}\n\nNot supported by this evidence:")
    for limit in limits:
        console.print(f"- {limit}")
    plot_curves(curves, arms, findings, values.out / "curves.png")
    plot_rates(curves, arms, best, values.out / "rates.png")
    modules = (jax, flax, optax, ao, np)
    summary = {
        "command": ["python", "examples/should_i_decay.py", *(sys.argv[1:] if arguments is None else arguments)],
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "devices": str(jax.devices())},
        "seconds": round(time.perf_counter() - began, 1),
        "settings": settings._asdict() | {"plan": settings.plan._asdict(), "weight_decay": WEIGHT_DECAY},
        "findings": [finding._asdict() for finding in findings],
        "answer": sentence,
        "not_supported": limits,
    }
    (values.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(f"\n{summary['seconds']:.0f} s; results and pictures in {values.out}/")


if __name__ == "__main__":
    main()

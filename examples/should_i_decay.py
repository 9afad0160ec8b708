"""Should I decay Adam's learning rate? Asked of an image-localization network, and answered by measurement.

The question as it was first asked in public: somebody trains an image-localization network with Adam, is told
to add exponential decay, and wonders. Some answered that Adam needs none, others that it helped.

Here scikit-learn's handwritten digits are placed at random positions and sizes on a larger noisy canvas; a
small Flax network reads off the box around the ink, and is judged by the mean absolute error of the box's
sides in pixels. Seven arms (Adam constant, with 0.8 every 5 epochs, with the same decay made smooth, with
one-cycle; AdamW with the best of these; RMSprop; RMSprop in the global-norm form) are each tuned over peak
learning rates on a few seeds. The best rate of each arm is run once more on fresh seeds, and only those runs
enter the answer. A seed decides the placements, the first weights and the order of the batches, the same for
every arm, so that arms are compared seed by seed.

    pip install -e .[examples]
    python examples/should_i_decay.py

It takes about two minutes on two CPU cores, prints two tables and an answer, and writes into `--out`:
    curves.png    training and validation error over epochs, with and without decay
    rates.png     validation error against the peak learning rate, for every arm
    results.csv   one row a run, written as soon as it is finished; curves.csv one row an epoch
    summary.json  the findings with the command, the versions and the seeds
"""

from __future__ import annotations

import argparse
import contextlib
import csv
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
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits

import adaptive_optax as ao

# ---- The task: where is the digit? ----

CANVAS, PATCH = 28, 7  # pixels
DIGIT_SIDE = (8.0, 20.0)  # an image of 8 x 8 is scaled to a side from this range, pixels
BACKGROUND, INK, NOISE = 64, 160, 24  # grey levels of 255; the noise is a standard deviation


class Data(NamedTuple):
    """The images of one seed, cut into patches (uint8), and their boxes (left, top, right, bottom)."""

    train_images: Any
    train_boxes: Any
    validation_images: Any
    validation_boxes: Any


def place(digits: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws noisy canvases with one digit each, in patches, and the boxes around the ink."""
    chosen = digits[rng.integers(len(digits), size=count)]
    side = rng.uniform(*DIGIT_SIDE, size=(count, 1))
    corner = rng.uniform(size=(count, 2)) * (CANVAS - side)  # left, top

    def interpolation(start: np.ndarray) -> np.ndarray:
        """The bilinear weights of the digit's 8 columns (or rows) in the canvas's."""
        position = (np.arange(CANVAS) + 0.5 - start[:, None]) / side * 8 - 0.5
        return np.clip(1 - np.abs(position[:, :, None] - np.arange(8)), 0, None)

    image = interpolation(corner[:, 1]) @ chosen @ interpolation(corner[:, 0]).transpose(0, 2, 1)
    image = BACKGROUND + INK * image + NOISE * rng.standard_normal(image.shape)
    grid = CANVAS // PATCH
    patches = image.reshape(count, grid, PATCH, grid, PATCH).transpose(0, 1, 3, 2, 4)
    patches = np.clip(patches.reshape(count, grid**2, PATCH**2), 0, 255).astype(np.uint8)

    inked = np.stack([chosen.max(axis=1), chosen.max(axis=2)], axis=1) > 0.1  # columns, rows
    first, last = inked.argmax(axis=2), 8 - inked[:, :, ::-1].argmax(axis=2)
    boxes = np.tile(corner, 2) + np.concatenate([first, last], axis=1) * side / 8
    return patches, boxes.astype(np.float32)


@functools.lru_cache(maxsize=64)
def make_data(seed: int, train_count: int, validation_count: int) -> Data:
    """Makes the placements of one seed; no digit is in both the training and the validation images."""
    pixels, _ = load_digits(return_X_y=True)
    digits = np.reshape(pixels, (-1, 8, 8))[np.random.default_rng(0).permutation(len(pixels))] / 16
    train, validation = np.split(digits, [len(digits) * 3 // 4])
    rng = np.random.default_rng(seed)
    return Data(*place(train, train_count, rng), *place(validation, validation_count, rng))


class LocalizationNet(nnx.Module):
    """Embeds every patch alike, then has two dense layers; the answer is in pixels."""

    def __init__(self, rngs: nnx.Rngs, *, width: int = 16, hidden: int = 64):
        """Builds the three layers."""
        self.embed = nnx.Linear(PATCH**2, width, rngs=rngs)
        self.hidden = nnx.Linear((CANVAS // PATCH) ** 2 * width, hidden, rngs=rngs)
        self.box = nnx.Linear(hidden, 4, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        """Gives the boxes of a batch of images in patches."""
        x = (patches.astype(jnp.float32) - BACKGROUND) / INK
        x = nnx.relu(self.embed(x)).reshape(len(x), -1)
        return CANVAS / 2 * (1 + self.box(nnx.relu(self.hidden(x))))


@functools.cache
def first_weights(seed: int) -> nnx.State:
    """Draws the weights of one seed."""
    return nnx.split(LocalizationNet(nnx.Rngs(seed)))[1]


# ---- The arms: what to train with ----


class Settings(NamedTuple):
    """The sizes of the experiment."""

    epochs: int
    steps_per_epoch: int
    batch_size: int
    validation_count: int
    rates: tuple[float, ...]
    global_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    fresh_seeds: tuple[int, ...]

    @property
    def train_count(self) -> int:
        """The number of training images."""
        return self.steps_per_epoch * self.batch_size


class Arm(NamedTuple):
    """A way to train: `build(peak learning rate)` gives the optax transformation."""

    name: str
    build: Callable[[Any], optax.GradientTransformationExtraArgs]
    rates: tuple[float, ...]


# Each gives (learning rate, b1) for a peak learning rate; after 40 epochs the decays have reached 0.17 of it.
SCHEDULES: dict[str, Callable[[Any, Settings], tuple[Any, Any]]] = {
    "constant": lambda rate, size: (rate, 0.9),
    "0.8/5 epochs": lambda rate, size: (ao.step_decay(rate, 0.8, 5 * size.steps_per_epoch), 0.9),
    "exponential": lambda rate, size: (ao.exponential_decay(rate, 5 * size.steps_per_epoch, 0.8), 0.9),
    "one-cycle": lambda rate, size: ao.one_cycle(rate, size.epochs * size.steps_per_epoch),
}
WEIGHT_DECAY = 1e-2
ARM_COUNT = len(SCHEDULES) + 3
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# The global-norm form moves each weight in proportion to its gradient, so the weights with the largest
# gradients move by far more than the learning rate: its best rates are lower.
GLOBAL_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def scheduled(name: str, optimizer: Callable[..., Any], schedule: str, settings: Settings) -> Arm:
    """Makes the arm of an optimizer with one of the schedules."""

    def build(rate: Any) -> optax.GradientTransformationExtraArgs:
        learning_rate, b1 = SCHEDULES[schedule](rate, settings)
        return optimizer(learning_rate, b1=b1)

    return Arm(f"{name}, {schedule}", build, settings.rates)


# ---- Training: several runs of one arm side by side ----


def stack(trees: list[Any]) -> Any:
    """Puts equal trees side by side along a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def make_trainer(arm: Arm, settings: Settings) -> Callable[..., np.ndarray]:
    """Makes `train(rates, seeds, tick)`: one run for each (rate, seed), giving the errors (run, epoch, 2).

    The two are training and validation; NaN once a run has diverged.

    Every call trains as many runs side by side as there are rates, so that tuning (all rates, one seed) and
    confirmation (one rate, many seeds) share one compilation. The runs are spread over JAX's devices.
    """
    width, count = len(arm.rates), settings.train_count
    devices = jax.devices()
    devices = devices[: max(n for n in range(1, len(devices) + 1) if width % n == 0)]
    mesh = jax.sharding.Mesh(np.array(devices), ("runs",))
    side_by_side = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    graph, _ = nnx.split(LocalizationNet(nnx.Rngs(0)))

    def error_of(params: Any, images: jax.Array, boxes: jax.Array) -> jax.Array:
        """The mean absolute error in pixels: the loss and the metric."""
        return jnp.mean(jnp.abs(nnx.merge(graph, params)(images) - boxes))

    def start(rate: jax.Array, params: Any) -> tuple[Any, Any]:
        return params, arm.build(rate).init(params)

    def epoch(carry: Any, rate: jax.Array, data: Data, batches: jax.Array) -> tuple[Any, jax.Array]:
        transformation = arm.build(rate)

        def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            images, boxes = data.train_images[batch], data.train_boxes[batch]
            error, gradient = jax.value_and_grad(error_of)(params, images, boxes)
            updates, state = transformation.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), error

        carry, errors = jax.lax.scan(step, carry, batches)
        validation = error_of(carry[0], data.validation_images, data.validation_boxes)
        return carry, jnp.stack([errors.mean(), validation])

    start_runs = jax.jit(jax.vmap(start), out_shardings=side_by_side)
    train_epoch = jax.jit(jax.vmap(epoch), donate_argnums=0)

    def train(rates: list[float], seeds: list[int], tick: Callable[[], None]) -> np.ndarray:
        missing = width - len(seeds)  # filled up with copies of the last run, which are thrown away
        all_rates, all_seeds = rates + rates[-1:] * missing, seeds + seeds[-1:] * missing
        rate, params, data = jax.device_put(
            (
                np.array(all_rates, np.float32),
                stack([first_weights(seed) for seed in all_seeds]),
                stack([make_data(seed, count, settings.validation_count) for seed in all_seeds]),
            ),
            side_by_side,
        )
        orders = [np.random.default_rng([seed, 1]) for seed in all_seeds]
        carry, history = start_runs(rate, params), []
        for _ in range(settings.epochs):
            batches = np.stack([order.permutation(count).astype(np.int32) for order in orders])
            batches = batches.reshape(width, settings.steps_per_epoch, settings.batch_size)
            carry, errors = train_epoch(carry, rate, data, jax.device_put(batches, side_by_side))
            history.append(np.asarray(errors))
            tick()
        errors = np.stack(history, axis=1)[: len(seeds)]
        return np.where(np.isfinite(errors), errors, np.nan)

    return train


class Experiment:
    """Trains arms, shows the progress, and writes every run down as soon as it is finished."""

    def __init__(self, settings: Settings, out: Path, console: Console):
        """Prepares the folder and the progress bar."""
        self.settings, self.out = settings, out
        self.trainers: dict[str, Callable[..., np.ndarray]] = {}
        out.mkdir(parents=True, exist_ok=True)
        errors = ["train_mae", "validation_mae"]
        self._write("results.csv", [["arm", "phase", "rate", "seed", *errors]], "w")
        self._write("curves.csv", [["arm", "phase", "rate", "seed", "epoch", *errors]], "w")
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            "epochs",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
        )
        self.progress = Progress("{task.description}", *columns, console=console)
        calls = len(settings.tuning_seeds) + math.ceil(len(settings.fresh_seeds) / len(settings.rates))
        self.task = self.progress.add_task("", total=ARM_COUNT * calls * settings.epochs)

    def tune(self, arm: Arm) -> np.ndarray:
        """Trains every rate on the tuning seeds; gives the errors, (rate, seed, epoch, 2)."""
        seeds, width = self.settings.tuning_seeds, len(arm.rates)
        return np.stack(
            [self._train(arm, "tuning", list(arm.rates), [seed] * width) for seed in seeds], axis=1
        )

    def confirm(self, arm: Arm, rate: float) -> np.ndarray:
        """Trains one rate on the fresh seeds; gives the errors, (seed, epoch, 2)."""
        seeds, width = list(self.settings.fresh_seeds), len(arm.rates)
        parts = [seeds[first : first + width] for first in range(0, len(seeds), width)]
        return np.concatenate([self._train(arm, "fresh", [rate] * len(part), part) for part in parts])

    def _train(self, arm: Arm, phase: str, rates: list[float], seeds: list[int]) -> np.ndarray:
        self.progress.update(self.task, description=f"{arm.name} ({phase})")
        if arm.name not in self.trainers:
            self.trainers[arm.name] = make_trainer(arm, self.settings)
        history = self.trainers[arm.name](rates, seeds, lambda: self.progress.advance(self.task))
        for rate, seed, errors in zip(rates, seeds, history.astype(float).round(5).tolist(), strict=True):
            run = [arm.name, phase, rate, seed]
            self._write("results.csv", [run + errors[-1]])
            self._write("curves.csv", [[*run, epoch, *pair] for epoch, pair in enumerate(errors, 1)])
        return history

    def _write(self, name: str, rows: list[list[Any]], mode: str = "a") -> None:
        with (self.out / name).open(mode, newline="") as file:
            csv.writer(file).writerows(rows)


# ---- What the runs say ----


def mean_or_inf(tuning: np.ndarray) -> np.ndarray:
    """The mean final validation error of every rate, infinite where a run diverged."""
    mean = tuning[:, :, -1, 1].mean(axis=1)
    return np.where(np.isfinite(mean), mean, np.inf)


class Finding(NamedTuple):
    """An arm at its best rate on the fresh seeds; the difference is to constant Adam, seed by seed."""

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


def judge(arms: list[Arm], best: dict[str, float], fresh: dict[str, np.ndarray]) -> list[Finding]:
    """Compares every arm with the first: paired t intervals that hold for all arms at 95 % (Bonferroni)."""
    findings = []
    for arm in arms:
        errors, baseline = fresh[arm.name][:, -1, 1], fresh[arms[0].name][:, -1, 1]
        finite = errors[np.isfinite(errors)]
        middle, noise = np.mean(errors - baseline), stats.sem(errors - baseline)
        half = stats.t.ppf(1 - 0.025 / (len(arms) - 1), len(errors) - 1) * noise
        verdict = "better" if middle + half < 0 else "worse" if middle - half > 0 else "undecided"
        if arm is arms[0]:
            verdict = "baseline"
        elif not math.isfinite(half):
            verdict = "diverged"
        rate = best[arm.name]
        mean = float(finite.mean()) if len(finite) else math.nan
        error = float(stats.sem(finite)) if len(finite) > 1 else math.nan
        interval = (float(middle), float(middle - half), float(middle + half))
        on_edge, diverged = rate in (min(arm.rates), max(arm.rates)), len(errors) - len(finite)
        findings.append(Finding(arm.name, rate, on_edge, mean, error, diverged, *interval, verdict))
    return findings


def make_table(title: str, headings: list[str], rows: list[list[str]], caption: list[str]) -> Table:
    """Sets a table that fits in 80 columns."""
    table = Table(title=title, caption="\n".join(caption), box=box.SIMPLE_HEAD, show_edge=False)
    table.collapse_padding, table.pad_edge = True, False
    table.title_justify = table.caption_justify = "left"
    for heading in headings:
        justify = "left" if heading in ("arm", "verdict") else "right"
        table.add_column(heading, justify=justify, no_wrap=not heading.startswith("minus"))
    for row in rows:
        table.add_row(*row)
    return table


def same_rate_table(arms: list[Arm], tuning: dict[str, np.ndarray]) -> Table:
    """Shows what decay does to Adam where both have the same peak rate: why public answers contradict."""
    constant = tuning[arms[0].name][:, :, -1, 1]
    rows = [
        [f"{rate:g}", f"{mean:.3f}"] for rate, mean in zip(arms[0].rates, constant.mean(axis=1), strict=True)
    ]
    contradicts = False
    for arm in arms[1:]:
        difference = tuning[arm.name][:, :, -1, 1] - constant
        middle = difference.mean(axis=1)
        noise = stats.sem(difference, axis=1) if difference.shape[1] > 1 else math.inf
        clear = np.abs(middle) > 2 * noise
        words = np.where(clear, np.where(middle < 0, "helps", "hurts"), "?    ")
        contradicts |= {"helps", "hurts"} <= set(words)
        for row, number, word in zip(rows, middle, words, strict=True):
            row.append(f"{number:+.3f} {word}")
    caption = ["helps, hurts: by two standard errors of few seeds"]
    if contradicts:
        caption += [
            "The same decay hurts at one rate and helps at another:",
            "that is why public answers disagree.",
        ]
    headings = ["peak rate", *(arm.name.removeprefix("Adam, ") for arm in arms)]
    title = "Same peak rate, tuning seeds: MAE, and what decay adds"
    return make_table(title, headings, rows, caption)


def result_table(findings: list[Finding]) -> Table:
    """The table of the answer."""
    rows = []
    for f in findings:
        difference = "" if f.verdict == "baseline" else f"{f.difference:+.3f} [{f.low:+.3f}, {f.high:+.3f}]"
        error = f"{f.mean:.3f} ± {f.standard_error:.3f}"
        rows.append([f.arm, f"{f.rate:g}{'*' if f.on_edge else ' '}", error, difference, f.verdict])
    caption = ["± one standard error; [95 % intervals, for all arms together]"]
    if any(f.on_edge for f in findings):
        caption += ["*: at the end of the rates tried, a better one may lie beyond"]
    if lost := [f"{f.arm} {f.diverged}" for f in findings if f.diverged]:
        caption += [f"Runs that diverged, left out of the mean: {'; '.join(lost)}"]
    headings = ["arm", "peak", "validation", "minus constant Adam", "verdict"]
    title = "Own best peak rate, fresh seeds: validation MAE in pixels"
    return make_table(title, headings, rows, caption)


def answer(findings: list[Finding], seeds: int) -> str:
    """One sentence: should Adam's learning rate decay, here?"""
    baseline, decays = findings[0], findings[1 : len(SCHEDULES)]
    verdicts = {f.verdict for f in decays}
    better = [f.arm.removeprefix("Adam, ") for f in decays if f.verdict == "better"]
    lead = "No" if verdicts == {"worse"} else "This run cannot tell"
    if better:
        lead = "It depends on the decay" if "worse" in verdicts else f"Yes, with {' or '.join(better)}"

    def say(f: Finding) -> str:
        name = f"{f.arm.removeprefix('Adam, ')} (peak {f.rate:g})"
        if f.verdict == "diverged":
            return f"{name} cannot be judged, as runs diverged"
        return f"{name} is {f.verdict}, {f.difference:+.3f} px ({f.low:+.3f} to {f.high:+.3f})"

    return (
        f"{lead}: with each peak rate tuned, on {seeds} fresh seeds and against constant Adam (peak "
        f"{baseline.rate:g}, {baseline.mean:.3f} px), {'; '.join(map(say, decays))}."
    )


def caveats(findings: list[Finding], settings: Settings) -> list[str]:
    """What the evidence does not support."""
    unclear = [max(abs(f.low), abs(f.high)) for f in findings if f.verdict == "undecided"]
    edges = [f"{f.arm} ({f.rate:g})" for f in findings if f.on_edge]
    lines = [
        f"that it is so elsewhere: this is one small network, one task and one loss, {settings.train_count} "
        f"images and {settings.epochs} epochs",
        "which part of one-cycle matters: it also warms up and cycles the momentum; it is not decay alone",
        "a ranking of the arms among themselves: each was compared with constant Adam only",
        "anything between the rates tried, a factor of about 3 apart, or for settings that were not tuned",
    ]
    if unclear:
        lines.append(f"that undecided arms equal constant Adam: up to {max(unclear):.3f} px may be there")
    if edges:
        lines.append(f"the best rate of {', '.join(edges)}: it is at the end of those tried")
    return lines


# ---- Pictures ----

COLOURS = ("#000000", "#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#cc79a7", "#009e73")  # Okabe and Ito
MARKERS = "osD^vPX"


def draw_mean(axes: Any, x: Any, errors: np.ndarray, **style: Any) -> None:
    """Draws the mean over the first axis with a band of one standard error."""
    mean, error = errors.mean(axis=0), stats.sem(errors, axis=0) if len(errors) > 1 else 0.0
    axes.plot(x, mean, linewidth=2.2, **style)
    axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.18, linewidth=0)


def finish(figure: Any, axes: Any, title: str, path: Path, **legend: Any) -> None:
    """Adds what both pictures have, and saves on white."""
    axes.set_title(title, fontsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=12)
    axes.xaxis.label.set_size(13)
    axes.yaxis.label.set_size(13)
    figure.legend(loc="outside lower center", frameon=False, fontsize=12, **legend)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def plot_curves(arms: list[Arm], findings: list[Finding], fresh: dict[str, np.ndarray], path: Path) -> None:
    """Draws training and validation error over epochs, with and without decay, as such plots usually are."""
    figure, axes = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    shown, top = (0, 1, 3), 0.0
    for index in shown:
        history, colour = fresh[arms[index].name], COLOURS[index]
        epochs = np.arange(1, history.shape[1] + 1)
        draw_mean(axes, epochs, history[:, :, 0], color=colour, linestyle=":")
        label = f"{arms[index].name}, peak {findings[index].rate:g}"
        draw_mean(axes, epochs, history[:, :, 1], color=colour, label=label)
        early = history[:, len(epochs) // 10].mean(axis=0).max()
        top = max(top, early) if math.isfinite(early) else top
    axes.plot([], [], color="grey", linewidth=2.2, label="validation")
    axes.plot([], [], color="grey", linewidth=2.2, linestyle=":", label="training, mean over the epoch")
    axes.set(xlabel="epoch", ylabel="mean absolute error, pixels", ylim=(0, 1.1 * top or None))
    ends = ", ".join(
        f"{arms[index].name.removeprefix('Adam, ')} {findings[index].mean:.2f}" for index in shown
    )
    finish(figure, axes, f"Validation error at the end, pixels:\n{ends}", path)


def plot_rates(
    arms: list[Arm], best: dict[str, float], tuning: dict[str, np.ndarray], guess: float, path: Path
) -> None:
    """Draws validation error against the peak learning rate, for every arm, on the tuning seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 7.4), layout="constrained")
    lowest = min(mean_or_inf(tuning[arm.name]).min() for arm in arms)
    bottom, top = 0.9 * min(lowest, guess), min(3.5 * lowest, 1.3 * guess)
    for index, (arm, colour, marker) in enumerate(zip(arms, COLOURS, MARKERS, strict=True)):
        errors, rates = tuning[arm.name][:, :, -1, 1], np.array(arm.rates)
        draw_mean(axes, rates, errors.T, color=colour, marker=marker, markersize=6, label=arm.name)
        mean = mean_or_inf(tuning[arm.name])
        at_best = rates == best[arm.name]
        size = 12 + 2 * index  # rings at one place stay apart
        axes.plot(
            rates[at_best], mean[at_best], "o", color=colour, fillstyle="none", markersize=size, zorder=4
        )
        diverged = rates[np.isinf(mean)]
        axes.plot(diverged, np.full(len(diverged), 0.95 * top), "x", color=colour, markersize=10)
    if guess < top:
        axes.axhline(guess, color="grey", linewidth=1, linestyle="--")
        where = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
        axes.annotate("always the average box", (0.02, guess), fontsize=12, **where)
    axes.set(xscale="log", yscale="log", ylim=(bottom, top))
    axes.set(xlabel="peak learning rate", ylabel="validation MAE, pixels")
    ticks = [tick for tick in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.5, 2, 3, 4, 6) if bottom < tick < top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    title = "Every arm has its own best peak rate (ringed)\nmean and standard error, tuning seeds"
    finish(figure, axes, title, path, ncols=2)


# ---- The whole ----


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description="Measures whether Adam's learning rate should decay on an image-localization task."
    )
    parser.add_argument("--steps", type=int, help="steps a run, rounded up to whole epochs (default 2560)")
    parser.add_argument("--seeds", type=int, help="fresh seeds for the answer, at least 2 (default 12)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/should_i_decay"), help="where to write (default %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny run, only to see that everything works")
    values = parser.parse_args(arguments)
    if values.steps is not None and values.steps < 1:
        parser.error(f"--steps must be at least 1, got {values.steps}.")
    if values.seeds is not None and values.seeds < 2:
        parser.error(f"--seeds must be at least 2, so that there is a standard error, got {values.seeds}.")
    if values.out.exists() and not values.out.is_dir():
        parser.error(f"--out must be a folder, got the file {values.out}.")
    return values


def choose_settings(values: argparse.Namespace) -> Settings:
    """Turns the command line into sizes."""
    smoke = values.smoke
    steps, seeds = values.steps or (48 if smoke else 2560), values.seeds or (2 if smoke else 12)
    per_epoch, batch, validation = (8, 32, 128) if smoke else (64, 64, 1024)
    some = slice(2, 4) if smoke else slice(None)
    tuning, fresh = tuple(range(1 if smoke else 3)), tuple(range(1000, 1000 + seeds))
    epochs = math.ceil(steps / per_epoch)
    return Settings(epochs, per_epoch, batch, validation, RATES[some], GLOBAL_RATES[some], tuning, fresh)


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Writes the summary and what it was run on; JSON has no undefined numbers: they become null."""
    for finding in summary["findings"]:
        for key, value in finding.items():
            if isinstance(value, float) and not math.isfinite(value):
                finding[key] = None
    versions = {module.__name__: module.__version__ for module in (ao, jax, optax, flax, np)}
    devices = f"{jax.device_count()} {jax.default_backend()} devices"
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, JAX on {devices}"
    versions["python"] = platform.python_version()
    path.write_text(json.dumps({**summary, "versions": versions, "hardware": hardware}, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Runs the experiment."""
    values = read_arguments(arguments)
    settings = choose_settings(values)
    began, console = time.perf_counter(), Console(highlight=False)
    plt.switch_backend("Agg")
    with contextlib.suppress(RuntimeError):  # raised where JAX is in use already
        jax.config.update("jax_num_cpu_devices", min(len(settings.rates), os.cpu_count() or 1))

    arms = [scheduled("Adam", ao.adam, schedule, settings) for schedule in SCHEDULES]
    experiment = Experiment(settings, values.out, console)
    tuning, best, fresh = {}, {}, {}

    def tune(arm: Arm) -> None:
        tuning[arm.name] = experiment.tune(arm)
        errors = mean_or_inf(tuning[arm.name])
        best[arm.name] = arm.rates[errors.argmin()]
        console.print(f"tuned {arm.name}: best peak rate {best[arm.name]:g}, {errors.min():.3f} px")

    try:
        with experiment.progress:
            for arm in arms:
                tune(arm)
            winner = min(SCHEDULES, key=lambda schedule: mean_or_inf(tuning[f"Adam, {schedule}"]).min())
            adamw = functools.partial(ao.adamw, weight_decay=WEIGHT_DECAY)
            others = [
                scheduled("AdamW", adamw, winner, settings),
                Arm("RMSprop", ao.rmsprop, settings.rates),
                Arm("RMSprop, global norm", ao.global_rmsprop, settings.global_rates),
            ]
            for arm in others:
                tune(arm)
            arms += others
            for arm in arms:
                fresh[arm.name] = experiment.confirm(arm, best[arm.name])
    except KeyboardInterrupt:
        console.print(f"Stopped. The runs that had finished are in {values.out / 'results.csv'}.")
        sys.exit(130)

    findings = judge(arms, best, fresh)
    sentence, limits = answer(findings, len(settings.fresh_seeds)), caveats(findings, settings)
    console.print(
        "", same_rate_table(arms[: len(SCHEDULES)], tuning), "", result_table(findings), "", sep="\n"
    )
    console.print(f"[bold]Should I decay Adam's learning rate?[/bold] {sentence}\n\nThis does not show")
    for limit in limits:
        console.print(f"- {limit}")
    if values.smoke:
        console.print("- anything at all: a smoke run only shows that everything works")

    data = make_data(settings.tuning_seeds[0], settings.train_count, settings.validation_count)
    guess = float(np.abs(data.validation_boxes - data.train_boxes.mean(axis=0)).mean())
    plot_curves(arms, findings, fresh, values.out / "curves.png")
    plot_rates(arms, best, tuning, guess, values.out / "rates.png")
    seconds = time.perf_counter() - began
    summary = {
        "command": ["should_i_decay.py", *(sys.argv[1:] if arguments is None else arguments)],
        "seconds": round(seconds, 1),
        "settings": settings._asdict() | {"weight_decay": WEIGHT_DECAY},
        "findings": [finding._asdict() for finding in findings],
        "answer": sentence,
        "does_not_show": limits,
    }
    write_summary(summary, values.out / "summary.json")
    console.print(f"\n{seconds:.0f} s; tables and pictures are in {values.out}")


if __name__ == "__main__":
    main()

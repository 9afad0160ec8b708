"""The final metric against the given peak rate, with and without the limit of `error_controlled`.

The tuned peak is the best of a grid, without the limit; the same seeds tune and compare. Trials are those of
the study's engine, paired by seed. Without any rate, the limit times a linear decay and Prodigy are compared
with a tuned linear decay.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax._core.drawing import LINES, PALETTE, THEMES, dress, plain, set_range, set_ticks
from adaptive_optax.study import tasks
from adaptive_optax.study.engine.trials import Placement, Plan, Program, as_trials
from adaptive_optax.typing import ControllerPreset
from benchmarks import error_control_tasks
from benchmarks.tables import Table, digits

RATES = tuple(5e-4 * 2.0**i for i in range(8))
FACTORS = (1, 10, 100)
FIRST_STEPS = (1e-8, 1e-4, 1e-2)
SEEDS = 4
TRIALS_PER_CALL = 4  # on each device
DECAY = "linear decay"
CONTROLLERS: tuple[ControllerPreset, ...] = ("smooth", "noisy")  # tried at the highest peak, for comparison
HIGHEST = 10.0  # the largest loss in a picture, over the best


Arm = Callable[[Any, int], Any]
Shape = Callable[[Any, int], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task and the number of steps of its training."""

    task: Callable[[], study.Task]
    steps: int


SETTINGS = {
    "localization": Setting(tasks.localization, 2560),
    "digits": Setting(tasks.digits, 800),
    "text": Setting(tasks.text, 1000),
    "convolutional": Setting(error_control_tasks.convolutional, 1500),
    "classifier": Setting(error_control_tasks.classifier, 1500),
    "regression, batch 8": Setting(functools.partial(error_control_tasks.regression, 8), 2000),
    "regression, batch 256": Setting(functools.partial(error_control_tasks.regression, 256), 1000),
    "autoencoder": Setting(error_control_tasks.autoencoder, 1000),
}


def one_cycle(peak: Any, steps: int) -> tuple[Any, Any]:
    """Adam with a one-cycle rate, whose momentum is b1."""
    cycle = ao.one_cycle(peak, steps)
    return ao.scale_by_adam(b1=cycle.momentum), cycle.learning_rate


def with_decay(direction: Any) -> Any:
    """AdamW's direction."""
    return optax.chain(direction, ao.add_decoupled_weight_decay(1e-4))


def one_cycle_with_decay(peak: Any, steps: int) -> tuple[Any, Any]:
    """AdamW with a one-cycle rate."""
    direction, rate = one_cycle(peak, steps)
    return with_decay(direction), rate


# The direction and the rate of each shape.
SHAPES: dict[str, Shape] = {
    "constant": lambda peak, steps: (ao.scale_by_adam(), peak),
    "one-cycle": one_cycle,
    "AdamW, constant": lambda peak, steps: (with_decay(ao.scale_by_adam()), peak),
    "AdamW, one-cycle": one_cycle_with_decay,
}


def decayed(peak: Any, steps: int) -> tuple[Any, Any]:
    """Adam with a linear decay to 0."""
    return ao.scale_by_adam(), optax.linear_schedule(peak, 0.0, steps)


def free(shape: Shape) -> Arm:
    """Makes an arm without the limit."""

    def arm(peak, steps):
        direction, rate = shape(peak, steps)
        return optax.chain(direction, optax.scale_by_learning_rate(rate))

    return arm


def limited(shape: Shape, controller: Any = None) -> Arm:
    """Makes an arm with the limit, held or followed."""
    return lambda peak, steps: ao.error_controlled(*shape(peak, steps), controller=controller)


def no_rate(first: Any, steps: int) -> Any:
    """The limit itself, times a linear decay; the engine's rate is its first step."""
    return optax.chain(
        ao.error_controlled(ao.scale_by_adam(), initial_learning_rate=first),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, steps)),
    )


def prodigy(scale: Any, steps: int) -> Any:
    """Prodigy with a linear decay."""
    return optax.contrib.prodigy(optax.linear_schedule(scale, 0.0, steps))


def all_arms(shapes: Sequence[str]) -> dict[str, Arm]:
    """Returns the arms with these shapes, and those of a linear decay."""
    return {
        **{f"{shape}, without": free(SHAPES[shape]) for shape in shapes},
        **{f"{shape}, with": limited(SHAPES[shape]) for shape in shapes},
        **{f"{shape}, {name}": limited(SHAPES[shape], name) for shape in shapes[:2] for name in CONTROLLERS},
        DECAY: free(decayed),
        "no rate": no_rate,
        "prodigy": prodigy,
    }


class Training:
    """The compiled arms of a task."""

    def __init__(self, task: study.Task, steps: int, seeds: int, arms: Mapping[str, Arm]):
        """Compiles the arms, several at a time: the compiler uses one core."""
        self.task = task
        self._seeds = seeds
        devices, is_cpu = len(jax.local_devices()), jax.default_backend() == "cpu"
        self._width = devices * TRIALS_PER_CALL
        placement = Placement("scan" if is_cpu else "vmap", self._width, devices)

        def compiled(arm):
            return Program(task, arm, Plan(steps, (0, steps)), placement)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            self._programs = dict(zip(arms, pool.map(compiled, arms.values()), strict=True))

    @property
    def arms(self) -> list[str]:
        """The names of the arms."""
        return list(self._programs)

    def metrics(self, arm: str, rates: Sequence[float]) -> np.ndarray:
        """Trains an arm; returns its final metrics [rate, seed]."""
        each, seeds = np.repeat(rates, self._seeds), np.tile(np.arange(self._seeds), len(rates))
        calls = [
            self._programs[arm].run(as_trials(each[i : i + self._width], seeds[i : i + self._width]))
            for i in range(0, len(each), self._width)
        ]
        return np.concatenate([call.validation[:, -1] for call in calls]).reshape(-1, self._seeds)


def measure(quick: bool, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measures every task; a quick run one task and shape, with few steps and rates."""
    rows = []
    shapes, rates, seeds = (list(SHAPES)[:1], RATES[2:4], 1) if quick else (list(SHAPES), RATES, SEEDS)
    for name, setting in SETTINGS.items():
        if quick and name != "regression, batch 256":
            continue
        advance(f"basin: {name}, compiling")
        training = Training(setting.task(), 20 if quick else setting.steps, seeds, all_arms(shapes))
        for shape in shapes:
            advance(f"basin: {name}, {shape}")
            rows.append({"task": name, "shape": shape} | _with_and_without(training, shape, rates))
        advance(f"basin: {name}, no rate")
        rows.append({"task": name, "shape": DECAY} | _without_any_rate(training, rates))
    return rows


def _with_and_without(training: Training, shape: str, rates: Sequence[float]) -> dict[str, Any]:
    """A shape over the grid, and at multiples of its best rate with and without the limit."""
    grid = training.metrics(f"{shape}, without", rates)
    common, tuned = _tuned(training.task, rates, grid)
    peaks = [rates[tuned] * factor for factor in FACTORS]
    without = [grid[tuned], *training.metrics(f"{shape}, without", peaks[1:])]
    with_limit = training.metrics(f"{shape}, with", peaks)
    cells = functools.partial(_cells, training.task, common["best"], peaks)
    found = {"without": cells(without), "with": cells(with_limit)}
    highest = functools.partial(_cells, training.task, common["best"], peaks[-1:])
    followed = {
        name: highest(training.metrics(arm, peaks[-1:]))[0]
        for name in CONTROLLERS
        if (arm := f"{shape}, {name}") in training.arms
    }
    return common | found | {"followed": followed}


def _without_any_rate(training: Training, rates: Sequence[float]) -> dict[str, Any]:
    """A linear decay over the grid, and what is without a rate."""
    common, _ = _tuned(training.task, rates, training.metrics(DECAY, rates))
    cells = functools.partial(_cells, training.task, common["best"])
    found = cells(FIRST_STEPS, training.metrics("no rate", FIRST_STEPS))
    return common | {"no_rate": found, "prodigy": cells([1.0], training.metrics("prodigy", [1.0]))[0]}


def _tuned(task: study.Task, rates: Sequence[float], grid: np.ndarray) -> tuple[dict[str, Any], int]:
    """What a grid shows, and the index of its best rate; a rate whose mean is not finite is the worst."""
    means = grid.mean(1) * (1 if task.maximize else -1)
    tuned = int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))
    best = float(grid[tuned].mean())
    return {
        "metric": task.metric_name,
        "maximize": task.maximize,
        "grid": _cells(task, best, rates, grid),
        "tuned_peak": rates[tuned],
        "best": best,
    }, tuned


def _cells(
    task: study.Task, best: float, rates: Sequence[float], metrics: Iterable[np.ndarray]
) -> list[dict[str, Any]]:
    """Metrics, None where not finite, and by how much their mean is worse than the best, in percent of it."""
    found = []
    for rate, each in zip(rates, metrics, strict=True):
        mean = _finite(each.mean())
        worse = None if mean is None else 100 * (mean / best - 1) * (-1 if task.maximize else 1)
        found.append(
            {"rate": rate, "metrics": [_finite(x) for x in each], "mean": mean, "worse_percent": worse}
        )
    return found


def _finite(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


def tables(rows: list[dict[str, Any]]) -> dict[str, Table]:
    """Returns the tables of given peaks, of no rate and of limits that follow the error."""
    given = Table(
        "Final metric, percent worse than at the tuned peak without the limit",
        ["task", "shape", "tuned peak", "metric there", *(f"without, peak × {f}" for f in FACTORS[1:])]
        + [f"with, peak × {f}" for f in FACTORS],
    )
    names = [*(f"limit, first step {plain(first)}" for first in FIRST_STEPS), "Prodigy"]
    none = Table(
        "Without any rate: final metric, percent worse than a tuned linear decay",
        ["task", "tuned peak", "metric there", *names],
    )
    followed = Table(
        f"A limit that is held, and two that follow the error, at the tuned peak × {FACTORS[-1]}: final "
        "metric, percent worse than at the tuned peak without a limit",
        ["task", "shape", "held", *(f'`controller="{name}"`' for name in CONTROLLERS)],
    )
    medians = Table(
        "Medians over the tasks: percent worse than at the tuned peak without the limit",
        ["shape", *given.columns[4:]],
    )
    by_shape: dict[str, list[list[float]]] = {}
    for row in rows:
        if row.get("followed"):
            cells = [row["with"][-1], *(row["followed"][name] for name in CONTROLLERS)]
            followed.add(row["task"], row["shape"], *map(_percent, cells))
        tuned = [digits(row["tuned_peak"], 2), f"{row['metric']} {digits(row['best'])}".replace("_", " ")]
        if "no_rate" in row:
            none.add(row["task"], *tuned, *map(_percent, [*row["no_rate"], row["prodigy"]]))
        else:
            cells = [*row["without"][1:], *row["with"]]
            given.add(row["task"], row["shape"], *tuned, *map(_percent, cells))
            worse = [cell["worse_percent"] for cell in cells]
            by_shape.setdefault(row["shape"], []).append([math.inf if x is None else x for x in worse])
    for shape, found in by_shape.items():
        medians.add(shape, *map(_worse, np.median(found, axis=0)))
    return {"basin": given, "basin_medians": medians, "no_rate": none, "followed": followed}


def _percent(cell: dict[str, Any]) -> str:
    return _worse(math.inf if cell["worse_percent"] is None else cell["worse_percent"])


def _worse(worse: float) -> str:
    if worse == math.inf:
        return "diverged"
    return "> 9,999" if worse > 9999 else f"{worse:+,.{0 if abs(worse) >= 100 else 1}f}".replace("-", "−")


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Draws the final metric against the given peak, one panel per task, for light and dark."""
    return {f"error_control_basin_{theme}": _figure(rows, theme) for theme in THEMES}


def _figure(rows: list[dict[str, Any]], theme: str) -> Figure:
    colours, names = THEMES[theme], list(dict.fromkeys(row["task"] for row in rows))
    shapes = list(SHAPES)[:2]
    height = -(-(len(names) + 1) // 2)  # in two columns, with a panel for the legend
    figure = Figure(figsize=(4.8, 0.4 + 1.75 * height), layout="constrained", facecolor=colours.paper)
    panels = np.ravel(figure.subplots(height, 2))
    for axes, name in zip(panels, names, strict=False):
        chosen = [row for row in rows if row["task"] == name and row["shape"] in shapes]
        dress(axes, colours, name, "")
        drawn = [_draw(axes, row, LINES[shapes.index(row["shape"])]) for row in chosen]
        peaks, means = (np.concatenate(x) for x in zip(*drawn, strict=True))
        axes.set_xscale("log")
        set_ticks(axes.xaxis, peaks.min(), peaks.max(), log=True)
        low, high = float(np.nanmin(means)), float(np.nanmax(means))
        is_accuracy = chosen[0]["maximize"]
        set_range(axes, low, high if is_accuracy else min(high, HIGHEST * low), log=not is_accuracy)
        axes.tick_params(labelsize=8)
    styles = [
        Line2D([], [], color=PALETTE[colour], linestyle=LINES[i], marker="os"[colour], markersize=4)
        for i in (0, 1)
        for colour in (0, 1)
    ]
    labels = [f"{shape}, {limit} limit" for shape in shapes for limit in ("without", "with")]
    for axes in panels[len(names) :]:
        axes.axis("off")
    legend = panels[len(names)]
    legend.legend(styles, labels, frameon=False, labelcolor=colours.ink, loc="center", fontsize=9)
    legend.set_title("metric against peak rate", loc="left", color=colours.muted, fontsize="medium")
    return figure


def _draw(axes: Any, row: dict[str, Any], line: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws a shape with and without the limit; returns all points."""
    without = sorted([*row["grid"], *row["without"][1:]], key=lambda cell: cell["rate"])
    points = []
    for cells, colour, marker in ((without, PALETTE[0], "o"), (row["with"], PALETTE[1], "s")):
        x = np.array([cell["rate"] for cell in cells])
        y = np.array([np.nan if cell["mean"] is None else cell["mean"] for cell in cells])
        axes.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.3, linestyle=line)
        points.append((x, y))
    x, y = (np.concatenate(each) for each in zip(*points, strict=True))
    return x, y

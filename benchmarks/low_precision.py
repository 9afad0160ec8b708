"""The cost in training loss of low-precision state and parameters, on two of the built-in tasks.

Every arm is Adam with a one-cycle rate, at one peak, on the same seeds, with the same initial parameters and
batches. The metric is the final loss on training data. `Int8` compresses every leaf. Low-precision
parameters are bfloat16; the model computes in float32, so that only the storage differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax._core.drawing import PALETTE, THEMES, dress
from adaptive_optax.study import tasks
from benchmarks.tables import Table

MEASURES = (
    "interop.convert_storage",
    "optimizers",
    "schedules.one_cycle",
    "study.arms",
    "study.engine.runner",
    "study.engine.trainers",
    "study.engine.trials",
    "study.statistics.outcomes",
    "study.statistics.tuning",
    "study.tasks",
    "transforms.stochastic_rounding",
    "wrappers.kahan_summation",
    "wrappers.master_weights",
)

INT8 = ao.Int8(min_size=1)
BASELINE = "float32"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task with the peak rate and the number of steps of its training."""

    task: Callable[[], study.Task]
    peak: float
    steps: int


SETTINGS = {
    "localization": Setting(lambda: tasks.localization(width=64), 0.01, 2560),
    "text": Setting(lambda: tasks.text(width=64), 0.01, 1000),
}


def adam(wrap: Callable[[Any], Any] = lambda tx: tx, **keywords: Any) -> Any:
    """Makes an arm: Adam with a one-cycle rate, in a wrapper."""

    def arm(peak, steps):
        cycle = ao.one_cycle(peak, steps)
        return wrap(ao.adam(cycle.learning_rate, b1=cycle.momentum, **keywords))

    return arm


STATE_ARMS = {
    BASELINE: adam(),
    "state bfloat16": adam(mu_storage="bfloat16", nu_storage="bfloat16"),
    "state int8": adam(mu_storage=INT8, nu_storage=INT8),
}
PARAMETER_ARMS = {
    "parameters bfloat16, to nearest": adam(),
    "parameters bfloat16, stochastic_rounding": adam(lambda tx: optax.chain(tx, ao.stochastic_rounding())),
    "parameters bfloat16, kahan_summation": adam(ao.kahan_summation),
    "parameters bfloat16, master_weights": adam(ao.master_weights),
    "parameters bfloat16, stochastic_rounding, state int8": adam(
        lambda tx: optax.chain(tx, ao.stochastic_rounding()), mu_storage=INT8, nu_storage=INT8
    ),
}
GROUPS = [STATE_ARMS, PARAMETER_ARMS]


def on_training_data(task: study.Task, count: int = 1024) -> study.Task:
    """The task, judged by its loss on evenly spaced training samples."""

    def some(x):
        return x[np.linspace(0, len(x) - 1, min(count, len(x))).astype(int)]

    return dataclasses.replace(task, validation=jax.tree.map(some, task.train))


def with_bfloat16_parameters(task: study.Task) -> study.Task:
    """The task with parameters kept in bfloat16 and widened in the loss."""

    def init(key):
        params, model_state = task.start(key)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), model_state

    def widened(params):
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def loss(params, model_state, batch, key):
        return task.training_loss(widened(params), model_state, batch, key)

    def metric(params, model_state, batch):
        return task.validation_metric(widened(params), model_state, batch)

    return dataclasses.replace(task, init=init, loss=loss, metric=metric, has_model_state=True)


def bytes_per_parameter(task: study.Task, arm: Any) -> float:
    """Bytes of moments, copies and compensations per parameter."""
    params, _ = jax.eval_shape(task.start, jax.random.key(0))
    state = jax.eval_shape(arm(1e-3, 10).init, params)
    return ao.state_bytes(state) / sum(x.size for x in jax.tree.leaves(params))


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Trains every arm on both tasks, with 24 seeds; a quick run trains four arms on one task."""
    rows = []
    for name, setting in SETTINGS.items():
        advance(name)
        if quick:
            few = [{arm: arms[arm] for arm in (list(arms)[0], list(arms)[-1])} for arms in GROUPS]
            rows += _rows(name, dataclasses.replace(setting, steps=10), few, seeds=5)
            break
        rows += _rows(name, setting, GROUPS, seeds=24)
    settings = {name: (setting.peak, setting.steps) for name, setting in SETTINGS.items()}
    return {"rows": rows, "settings": settings, "seeds": {"base_seed": 0}}


def _rows(name: str, setting: Setting, groups: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    task = on_training_data(setting.task())
    tables, sizes = [], {}
    for arms, version in zip(groups, (task, with_bfloat16_parameters(task)), strict=True):
        comparison = study.compare(
            version, arms, learning_rates=[setting.peak], steps=setting.steps, seeds=seeds,
            tuning_seeds=1, growth=0, validation_points=2,
        )  # fmt: skip
        tables.append(comparison.table)
        sizes |= {arm: bytes_per_parameter(version, make) for arm, make in arms.items()}
    table = pd.concat([t[t["phase"] == "verdict"] for t in tables])
    losses = table.pivot(index="seed", columns="arm", values="final_metric")
    rows = []
    for arm, size in sizes.items():
        difference = losses[arm] - losses[BASELINE]
        row = {
            "task": name,
            "arm": arm,
            "bytes_per_parameter": size,
            "final_loss": losses[arm].mean(),
            "final_loss_error": losses[arm].sem(),
            "difference": difference.mean(),
            "difference_error": difference.sem(),
        }
        if arm != BASELINE:
            row["p_value"] = float(scipy.stats.ttest_rel(losses[arm], losses[BASELINE]).pvalue)
            row["t_95"] = float(scipy.stats.t.ppf(0.975, seeds - 1))
        rows.append(row)
    return rows


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns a table with one row per arm, with the differences from float32 on both tasks."""
    rows = {(row["task"], row["arm"]): row for row in result["rows"]}
    names, arms = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    bases = [
        f"{name}: loss minus float32's {base['final_loss']:.4f} ± {base['final_loss_error']:.4f}"
        for name, base in ((name, rows[name, BASELINE]) for name in names)
    ]
    table = Table("What low precision loses", ["stored", "bytes of state per parameter", *bases])
    for arm in arms:
        if arm == BASELINE:
            continue
        sizes = dict.fromkeys(f"{rows[name, arm]['bytes_per_parameter']:.2f}" for name in names)
        cells = [_difference(rows[name, arm], rows[name, BASELINE]["final_loss"]) for name in names]
        table.add(arm, ", ".join(sizes), *cells)
    return {"main": table}


def _difference(row: dict[str, Any], base: float) -> str:
    """The difference from float32 with its standard error, in percent, and its p-value."""
    percent = f"{100 * row['difference'] / base:+.1f} %"
    difference = f"{row['difference']:+.4f} ± {row['difference_error']:.4f}"
    return f"{difference} ({percent}, p = {row['p_value']:.2g})".replace("-", "−")


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draws the differences from float32 with 95 % intervals, one panel per task, for light and dark."""
    return {f"low_precision_{theme}": _figure(result["rows"], theme) for theme in THEMES}


def _figure(rows: list[dict[str, Any]], theme: str) -> Figure:
    colours, names = THEMES[theme], list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(7.0, 1.0 + 1.9 * len(names)), layout="constrained", facecolor=colours.paper)
    for axes, name in zip(np.ravel(figure.subplots(len(names), 1)), names, strict=True):
        shown = [row for row in rows if row["task"] == name and row["arm"] != BASELINE][::-1]
        base = next(row["final_loss"] for row in rows if row["task"] == name and row["arm"] == BASELINE)
        percent = [100 * row["difference"] / base for row in shown]
        half = [100 * row["difference_error"] * row["t_95"] / base for row in shown]
        dress(axes, colours, f"{name}: training loss minus float32's, %", "")
        axes.axvline(0, color=colours.muted, linewidth=1)
        axes.errorbar(percent, range(len(shown)), xerr=half, fmt="o", color=PALETTE[1], capsize=3)
        labels = [row["arm"].replace("parameters bfloat16,", "parameters:") for row in shown]
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
    return figure

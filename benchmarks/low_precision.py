"""What training loses to low-precision state and low-precision parameters, on the two built-in tasks.

Every arm is Adam with a one-cycle rate, at one peak, on the same seeds: the same initial parameters and
batches. The metric is the final loss on training data. The tasks are as wide as `Int8` needs (64), and it
compresses every matrix that wide, embeddings included. Low-precision parameters are bfloat16; the model
computes in float32, so that only what is kept differs.

    python -m benchmarks.low_precision [--tasks localization text] [--seeds 12] [--json FILE] [--picture FILE]

With `--rows FILE` nothing is trained: the table and the picture are made of that JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import rich
import rich.table
import scipy.stats
from matplotlib.figure import Figure

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study import tasks
from benchmarks.setting import publish

INT8 = ao.Int8(min_size=1)
BASELINE = "float32"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task at the size and the rate at which it is trained."""

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


def on_training_data(task: study.Task, count: int = 1024) -> study.Task:
    """The task judged by its loss on (evenly spaced) training samples."""

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


def bytes_a_parameter(task: study.Task, arm: Any) -> float:
    """Bytes of moments, copies and compensations for each parameter."""
    params, _ = jax.eval_shape(task.start, jax.random.key(0))
    state = jax.eval_shape(arm(1e-3, 10).init, params)
    return ao.state_bytes(state) / sum(x.size for x in jax.tree.leaves(params))


def measure(name: str, seeds: int) -> list[dict[str, Any]]:
    """Trains every arm on one task; gives a row an arm."""
    setting = SETTINGS[name]
    task = on_training_data(setting.task())
    tables, sizes = [], {}
    for arms, version in ((STATE_ARMS, task), (PARAMETER_ARMS, with_bfloat16_parameters(task))):
        comparison = study.compare(
            version, arms, learning_rates=[setting.peak], steps=setting.steps, seeds=seeds,
            tuning_seeds=1, growth=0, validation_points=2,
        )  # fmt: skip
        tables.append(comparison.table)
        sizes |= {arm: bytes_a_parameter(version, make) for arm, make in arms.items()}
    table = pd.concat([t[t["phase"] == "verdict"] for t in tables])
    losses = table.pivot(index="seed", columns="arm", values="final_metric")
    rows = []
    for arm, size in sizes.items():
        difference = losses[arm] - losses[BASELINE]
        row = {
            "task": name,
            "arm": arm,
            "bytes_a_parameter": size,
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


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the differences from float32 with 95 % intervals, a panel a task."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(7.0, 1.0 + 1.9 * len(names)), layout="constrained")
    for axes, name in zip(np.ravel(figure.subplots(len(names), 1)), names, strict=True):
        shown = [row for row in rows if row["task"] == name and row["arm"] != BASELINE][::-1]
        base = next(row["final_loss"] for row in rows if row["task"] == name and row["arm"] == BASELINE)
        percent = [100 * row["difference"] / base for row in shown]
        half = [100 * row["difference_error"] * row["t_95"] / base for row in shown]
        places = range(len(shown))
        axes.axvline(0, color="0.6", linewidth=1)
        axes.errorbar(percent, places, xerr=half, fmt="o", color="tab:blue", capsize=3)
        labels = [row["arm"].replace("parameters bfloat16,", "parameters:") for row in shown]
        axes.set_yticks(places, labels, fontsize=8)
        axes.set_title(f"{name}: training loss minus float32's, %", fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Prints the table and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=12, help="paired seeds, at least 5")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--picture", type=Path, help="also draw the differences into this file")
    parser.add_argument("--rows", type=Path, help="show the rows of this JSON file, train nothing")
    args = parser.parse_args()
    if args.seeds < 5:
        parser.error(f"--seeds must be at least 5, got {args.seeds}.")
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)

    table = rich.table.Table("task", "arm", "bytes a parameter", "training loss", "minus float32", "p")
    if args.rows is None:
        rows = [row for name in args.tasks for row in measure(name, args.seeds)]
    else:
        rows = json.loads(args.rows.read_text())["rows"]
    for row in rows:
        table.add_row(
            row["task"],
            row["arm"],
            f"{row['bytes_a_parameter']:.2f}",
            f"{row['final_loss']:.4f} ± {row['final_loss_error']:.4f}",
            f"{row['difference']:+.4f} ± {row['difference_error']:.4f}",
            f"{row['p_value']:.2g}" if "p_value" in row else "",
        )
    rich.print(table)
    if args.picture is not None:
        draw(rows, args.picture)
    if args.rows is None:
        settings = {name: (setting.peak, setting.steps) for name, setting in SETTINGS.items()}
        publish("low_precision", rows, args.json, settings=settings)


if __name__ == "__main__":
    main()

"""Trials a second of the study, against the Python loop that people write.

The task is a digits MLP (64-128-128-10) with batches of 64. Both train the same trials (rates x seeds) with
Adam and evaluate on the validation set at the same points. The loop is kind to itself: one optax step, jitted
once, with the rate as an argument, and the batches of an epoch indexed with NumPy. Compilation is timed
apart.
Both alternate in one process; the study uses as many devices as there are cores.

    python -m benchmarks.study_throughput [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.progress
import rich.table
from sklearn.datasets import load_digits

from adaptive_optax import study
from adaptive_optax.study.layout import settle_layout
from adaptive_optax.study.progress import TrialProgress
from adaptive_optax.study.runner import ArmSpec, Runner
from adaptive_optax.study.store import Key
from adaptive_optax.study.trials import Plan
from benchmarks.setting import publish

SIZES = (64, 128, 128, 10)
BATCH, STEPS, POINTS = 64, 400, 10
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Draws the weights."""
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, SIZES, SIZES[1:], strict=False)
    ]


def loss(params: Any, batch: Any, key: Any = None) -> jax.Array:
    """The cross-entropy of a batch."""
    x, labels = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_task() -> study.Task:
    """The digits, three quarters for training."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    x, y = (np.asarray(pixels)[order] / 16).astype(np.float32), np.asarray(labels)[order].astype(np.int32)
    cut = len(x) * 3 // 4
    return study.Task(init, loss, (x[:cut], y[:cut]), (x[cut:], y[cut:]), batch_size=BATCH, name="digits MLP")


class PythonLoop:
    """What people write: a jitted step, called in a loop for every trial."""

    def __init__(self, task: study.Task):
        """Jits the step; it is compiled when it is first called."""
        self.task = task
        self.init = jax.jit(init)
        self.evaluate = jax.jit(loss)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, rate, batch):
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = optax.adam(rate).update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.step = step

    def train(self, rate: float, seed: int) -> float:
        """Runs one trial; gives its final validation loss."""
        x, y = self.task.train
        params = self.init(jax.random.key(seed))
        state, order = optax.adam(rate).init(params), np.random.default_rng(seed)
        per_epoch, final, shuffled = self.task.steps_per_epoch, 0.0, np.arange(len(x))
        for index in range(STEPS):
            if index % per_epoch == 0:
                shuffled = order.permutation(len(x))
            chosen = shuffled[index % per_epoch * BATCH :][:BATCH]
            params, state, _ = self.step(params, state, rate, (x[chosen], y[chosen]))
            if (index + 1) % (STEPS // POINTS) == 0:
                final = float(self.evaluate(params, self.task.validation))
        return final


def main() -> None:
    """Prints the table and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which both take turns (at least 3)")
    parser.add_argument("--trials", type=int, nargs="+", default=[4, 16, 64], help="trials of the study")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {args.rounds}.")
    if min(args.trials) < len(RATES):
        parser.error(f"--trials must be at least {len(RATES)}, got {min(args.trials)}.")
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)

    task = make_task()
    plan = Plan(STEPS, tuple(range(0, STEPS + 1, STEPS // POINTS)))
    arms = {"adam": ArmSpec(lambda rate, steps: optax.adam(rate), "once", None, 0)}
    loop = PythonLoop(task)
    began = time.perf_counter()
    loop.train(RATES[0], 0)
    loop_compile = time.perf_counter() - began

    table = rich.table.Table(
        "trials", "layout", "study, trials/s", "loop, trials/s", "ratio", "quartiles", "first call, s"
    )
    rows = []
    for trials in rich.progress.track(args.trials, "measuring"):
        began = time.perf_counter()
        layout, _ = settle_layout(task, arms, plan, trials=trials, example_rate=RATES[0])

        def run_study(trials=trials, layout=layout):
            runner = Runner(task, arms, plan, layout, None, TrialProgress(trials, show=False))
            seeds = range(trials // len(RATES))
            runner.run([Key("adam", rate, seed) for seed in seeds for rate in RATES], "")
            return runner.results

        final = [record.validation[-1] for record in run_study().values()]
        study_compile = time.perf_counter() - began
        looped = min(trials, 8)  # the loop's time is the same for every trial
        ours, theirs, ends = [], [], []
        for _ in range(args.rounds):
            began = time.perf_counter()
            run_study()
            ours.append(trials / (time.perf_counter() - began))
            began = time.perf_counter()
            ends = [loop.train(RATES[i % len(RATES)], i // len(RATES)) for i in range(looped)]
            theirs.append(looped / (time.perf_counter() - began))
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        row = {
            "trials": trials,
            "layout": layout._asdict(),
            "study_trials_a_second": statistics.median(ours),
            "loop_trials_a_second": statistics.median(theirs),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "study_first_call_s": study_compile,
            "loop_first_call_s": loop_compile,
            "study_mean_final_loss": float(np.mean(final)),
            "loop_mean_final_loss": float(np.mean(ends)),
        }
        rows.append(row)
        described = f"{layout.mode}, {layout.width} on {layout.devices}"
        numbers = [row["study_trials_a_second"], row["loop_trials_a_second"], row["ratio"]]
        table.add_row(
            str(trials),
            described,
            *(f"{number:.2f}" for number in numbers),
            f"{low:.2f}-{high:.2f}",
            f"{study_compile:.1f} against {loop_compile:.1f}",
        )
    rich.print(table)
    publish("study_throughput", rows, args.json, steps=STEPS, batch_size=BATCH, rates=RATES)


if __name__ == "__main__":
    main()

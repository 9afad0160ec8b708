"""What telemetry costs: a jitted training step with it and without.

On two networks that find a digit: the example's, whose step takes a quarter of a millisecond, and a small
convolutional one. The four run in turn in one process, ten steps at a time, as `every=10` works on one step
of ten. Prints the median of the paired ratios of times, over the step without telemetry, with a 95 % interval
(bootstrap).

    python -m benchmarks.telemetry [--rounds 100] [--json FILE]
"""

from __future__ import annotations

import argparse
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
import scipy.stats
from flax import nnx

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.tasks import localization
from benchmarks.setting import publish

STEPS = 10  # a block
OPTIMIZERS = {
    "without": lambda: ao.adam(1e-3),
    "every=10": lambda: ao.telemetry(ao.adam(1e-3), every=10),
    "every=1": lambda: ao.telemetry(ao.adam(1e-3)),
    'every=1, per="tensor"': lambda: ao.telemetry(ao.adam(1e-3), per="tensor"),
}


class ConvNet(nnx.Module):
    """Two convolutions and two dense layers, from an image of 28 x 28 to a box."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.box = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Gives the boxes of images [image, row, column, 1]."""
        x = nnx.max_pool(nnx.relu(self.first(images)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), (2, 2)).reshape(len(x), -1)
        return self.box(nnx.relu(self.hidden(x)))


def convolutional() -> study.Task:
    """The convolutional network on noise: only its time is looked at."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(64, 28, 28, 1)), "y": rng.normal(size=(64, 4))}
    data = {name: values.astype(np.float32) for name, values in data.items()}

    def loss(model, batch):
        return jnp.mean(jnp.abs(model(batch["x"]) - batch["y"]))

    def build(rngs):
        return ConvNet(rngs=rngs)

    return study.nnx_task(build, loss, data, data, batch_size=64, name="convolutional network")


class Training:
    """A compiled step with its own parameters and state."""

    def __init__(self, task: study.Task, tx: optax.GradientTransformation):
        params, self._model_state = task.start(jax.random.key(0))
        batch = jax.tree.map(lambda x: jnp.asarray(x[: task.batch_size]), task.train)
        key = jax.random.key(1)

        def step(params, state):
            def loss(params):
                return task.training_loss(params, self._model_state, batch, key)[0]

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        self._carry: Any = (params, tx.init(params))
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry).compile()

    def seconds(self) -> float:
        """Runs a block and returns the time of a step."""
        start = time.perf_counter()
        for _ in range(STEPS):
            self._carry = self._step(*self._carry)
        jax.block_until_ready(self._carry)
        return (time.perf_counter() - start) / STEPS


def main() -> None:
    """Prints the table and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="timed blocks of each (at least 30)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.rounds < 30:
        parser.error(f"--rounds must be at least 30, got {args.rounds}.")

    table = rich.table.Table("network", "telemetry", "ms a step", "ratio", "95 % interval")
    rows = []
    for task in (localization(), convolutional()):
        for row in measure(task, args.rounds):
            rows.append(row)
            low, high = row["ratio_interval"]
            numbers = f"{row['ms']:.2f}", f"{row['ratio']:.3f}", f"{low:.3f}-{high:.3f}"
            table.add_row(f"{task.name}, {task.parameter_count:,}", row["telemetry"], *numbers)
    rich.print(table)
    publish("telemetry", rows, args.json)


def measure(task: study.Task, rounds: int) -> list[dict[str, Any]]:
    """Times all on one task."""
    trainings = {name: Training(task, make()) for name, make in OPTIMIZERS.items()}
    names = list(trainings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in rich.progress.track(range(rounds + 3), task.name):
        for name in np.roll(names, i):  # each is first, and each last, equally often
            seconds[name].append(trainings[name].seconds())
    times = {name: np.array(values[3:]) for name, values in seconds.items()}  # the first ones warm up
    rows = []
    for name in names:
        ratios = times[name] / times["without"]
        found = scipy.stats.bootstrap((ratios,), np.median, rng=np.random.default_rng(0), method="percentile")
        low, high = found.confidence_interval
        rows.append(
            {
                "network": task.name,
                "parameters": task.parameter_count,
                "batch_size": task.batch_size,
                "telemetry": name,
                "ms": 1e3 * float(np.median(times[name])),
                "ratio": float(np.median(ratios)),
                "ratio_interval": [float(low), float(high)],
            }
        )
    return rows


if __name__ == "__main__":
    main()

"""Does Adam lower the learning rate by itself? Watch it while a small network trains.

Trains the network of `should_i_decay.py`, which puts boxes around handwritten digits, with Adam at a constant
rate. `ao.telemetry` measures every tensor every few steps. `ao.TelemetryLog` collects the measurements and
draws the effective learning rate of every layer: the rate of the gradient step nearest to Adam's step.

    pip install -e .[examples]
    python examples/watch_learning_rates.py

It takes a few seconds on a CPU and writes to `--out`: effective_rates.png (and, for dark pages,
effective_rates_dark.png), telemetry.csv (one row per tensor and measurement) and, with `--tensorboard`, event
files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
import optax

import adaptive_optax as ao
from adaptive_optax.study import tasks

EPOCHS, LEARNING_RATE, EVERY = 40, 5e-3, 8


def train(epochs: int, learning_rate: float) -> tuple[ao.TelemetryLog, float]:
    """Trains; returns the log and the mean loss of the last epoch."""
    task = tasks.localization()
    params, model_state = task.start(jax.random.key(0))
    tx = ao.telemetry(ao.adam(learning_rate), every=EVERY, per="tensor")
    state, log = tx.init(params), ao.TelemetryLog(params)

    @jax.jit
    def step(params, state, batch, key):
        def loss(params):
            return task.training_loss(params, model_state, batch, key)[0]

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    rng, size, losses = np.random.default_rng(0), task.batch_size, []
    for _ in range(epochs):
        order, losses = rng.permutation(task.train_count), []
        for i in range(task.steps_per_epoch):
            chosen = order[i * size : (i + 1) * size]
            batch = {name: np.asarray(x)[chosen] for name, x in task.train.items()}
            params, state, value = step(params, state, batch, jax.random.key(i))
            losses.append(value)
            if i % EVERY == 0:
                log.append(state)
    return log, float(np.mean(losses))


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(description="Shows the effective learning rates of Adam's steps.")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="default: %(default)s")
    parser.add_argument("--tensorboard", action="store_true", help="also write event files")
    parser.add_argument("--out", type=Path, default=Path("out/watch_learning_rates"), help="where to write")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Trains, draws and prints."""
    parser = command_line()
    values = parser.parse_args(arguments)
    if values.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {values.epochs}.")

    log, loss = train(values.epochs, values.learning_rate)
    values.out.mkdir(parents=True, exist_ok=True)
    for theme, suffix in (("light", ""), ("dark", "_dark")):
        log.plot(theme=theme).savefig(values.out / f"effective_rates{suffix}.png", dpi=160)
    log.table.to_csv(values.out / "telemetry.csv")
    if values.tensorboard:
        log.to_tensorboard(values.out / "tensorboard")

    rates = log.table["effective_learning_rate"]
    print(f"Median effective learning rate by quarter of the run (given: {values.learning_rate:g}):")
    for name in log.tensors:
        quarters = np.array_split(rates.xs(name, level="tensor").to_numpy(), 4)
        print(f"  {name:24}" + "".join(f"{np.median(quarter):12.2g}" for quarter in quarters))
    print(f"Mean loss of the last epoch: {loss:.3f} pixels. Pictures and table are in {values.out}.")


if __name__ == "__main__":
    main()

"""Finds a learning rate by a range test, then trains with it and lowers it on a plateau.

A convolutional network with batch normalisation (Flax nnx) reads handwritten digits behind noise.
`ao.study.lr_range_test` tries constant rates in short trials and suggests one. Training starts there, and
`ao.reduce_on_plateau` halves the rate after every four epochs without a better validation accuracy. As the
validation images steer the rate, the result is the accuracy on test images.

    pip install -e .[examples]
    python examples/lr_find_then_train.py

It takes about a minute on two CPU cores and writes lr_find_then_train.png to `--out`, and
lr_find_then_train_dark.png for dark pages. If the test suggests no rate, the script says why and what to do,
writes range_test.png and exits with code 1.

For your own data, replace `data` and `Network`; `loss` and `accuracy` take the model and a batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.style
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn
from sklearn.datasets import load_digits

import adaptive_optax as ao
from adaptive_optax import study

BATCH, FACTOR, PATIENCE = 16, 0.5, 4
Data = dict[str, np.ndarray]
DARK = ["dark_background", dict.fromkeys(("figure.facecolor", "axes.facecolor"), "#15171a")]
STYLES: dict[str, Any] = {"": ["default"], "_dark": DARK}  # what a file's name ends in, and its style


def data() -> tuple[Data, Data, Data]:
    """Images and labels for training, validation and the test."""
    pixels, numbers = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(numbers))
    images, labels = np.reshape(pixels, (-1, 8, 8))[order] / 16, np.asarray(numbers)[order]
    images = (images + 0.2 * rng.standard_normal(images.shape)).astype(np.float32)
    parts = slice(1024), slice(1024, 1424), slice(1424, None)
    train, validation, test = ({"image": images[part], "label": labels[part]} for part in parts)
    return train, validation, test


class Network(nnx.Module):
    """Two convolutions with batch normalisation, dropout and a dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv_2 = nnx.Conv(8, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.logits = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits of the digits for images [image, row, column]."""
        x = nnx.relu(self.norm_1(self.conv_1(images[..., None])))
        x = nnx.relu(self.norm_2(self.conv_2(x)))
        return self.logits(self.dropout(x.reshape(len(x), -1)))


def loss(model: Network, batch: Any) -> jax.Array:
    """The mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"]).mean()


@nnx.jit
def accuracy(model: Network, batch: Any) -> jax.Array:
    """The share of images that are read correctly, without dropout and with the running statistics."""
    view = nnx.view(model, deterministic=True, use_running_average=True)
    return jnp.mean(jnp.argmax(view(batch["image"]), axis=1) == batch["label"])


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, batch: Any, metric: jax.Array | None) -> jax.Array:
    """Updates the model and the optimizer in place; returns the loss before the update."""
    value, gradients = nnx.value_and_grad(loss)(model, batch)
    optimizer.update(model, gradients, value=metric)
    return value


def train(rate: float, steps: int, data: Data, validation: Data) -> tuple[Network, np.ndarray]:
    """Trains; returns the model and, after every epoch, (step, learning rate, validation accuracy)."""
    model, rng = Network(nnx.Rngs(0)), np.random.default_rng(0)
    # The validation accuracy is high when it is good: mode="max".
    plateau = ao.reduce_on_plateau(factor=FACTOR, patience=PATIENCE, mode="max")
    optimizer = nnx.Optimizer(model, optax.chain(ao.adam(rate), plateau), wrt=nnx.Param)
    count, epochs, metric = len(data["label"]), [], None
    order, losses = rng.permutation(count), []
    with Progress("training", BarColumn(12), TextColumn("{task.fields[status]}")) as bar:
        shown = bar.add_task("", total=steps, status="")
        for i in range(1, steps + 1):
            chosen = order[len(losses) * BATCH :][:BATCH]
            losses.append(train_step(model, optimizer, {name: x[chosen] for name, x in data.items()}, metric))
            metric = None  # seen: passed again at every step, it would count as one bad epoch after another
            is_last = len(losses) == count // BATCH or i == steps
            if i % 8 and not is_last:
                continue  # showing a value waits for it, so not at every step
            used = ao.get_hyperparams(optimizer.opt_state)
            now, status = float(used["learning_rate"] * used["scale"]), f"loss {np.mean(losses):.3f}"
            if is_last:
                metric = accuracy(model, validation)  # for the first step of the next epoch
                epochs.append((i, now, float(metric)))
                order, losses = rng.permutation(count), []
            last = f", val {epochs[-1][2]:.3f}" if epochs else ""
            bar.update(shown, completed=i, status=f"rate {now:.2g}, {status}{last}")
    return model, np.array(epochs)


def draw(found: study.RangeTest, epochs: np.ndarray) -> Figure:
    """The range test, and the learning rate and the accuracy over the steps."""
    figure = Figure(figsize=(4.8, 7.2), layout="constrained")
    tested, rates, accuracies = figure.subplots(3, height_ratios=(4, 2, 3))
    tested.set_title("range test: loss after a short trial", loc="left", fontsize=10)
    losses = found.table.pivot(index="learning_rate", columns="seed", values="final_loss")
    tested.plot(losses.index, losses.to_numpy(), color="#0072B2", linewidth=0.8)  # a line per seed
    before = found.table["initial_loss"].to_numpy().mean()
    tested.axhline(before, color="gray", linestyle=":", label="before training")
    tested.axvline(found.suggestion, color="#D55E00", label=f"suggestion: {found.suggestion:.2g}")
    tested.axvspan(*found.interval, color="#D55E00", alpha=0.25, linewidth=0, label="its 95 % interval")
    tested.set(
        xscale="log", xlabel="learning rate", ylim=(0, 1.5 * before)
    )  # what explodes leaves the picture
    tested.legend(fontsize=9)

    step, rate, validation = epochs.T
    rates.set_title("learning rate", loc="left", fontsize=10)
    rates.step(step, rate, where="pre", color="#D55E00")
    rates.set_ylim(0, None)
    rates.tick_params(labelbottom=False)
    accuracies.set_title("validation accuracy", loc="left", fontsize=10)
    accuracies.plot(step, validation, ".-", markersize=4, color="#0072B2")
    accuracies.set(xlabel="step", xlim=(0, None))
    rates.sharex(accuracies)
    for axes in (tested, rates, accuracies):
        axes.grid(alpha=0.25)
    return figure


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(
        description="Finds a learning rate, trains with it, lowers it on a plateau."
    )
    parser.add_argument("--steps", type=int, default=1920, help="of the training; an epoch has 64")
    parser.add_argument("--low", type=float, default=1e-4, help="the lowest rate of the range test")
    parser.add_argument("--high", type=float, default=1.0, help="the highest rate of the range test")
    parser.add_argument("--out", type=Path, default=Path("out/lr_find_then_train"), help="where to write")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Tests, trains, draws and prints."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}.")
    options.out.mkdir(parents=True, exist_ok=True)

    training, validation, test = data()
    task = study.nnx_task(Network, loss, training, validation, batch_size=BATCH)
    mode = "step" if jax.default_backend() == "cpu" else None  # in a loop, a CPU is slow at convolutions
    steps = min(100, options.steps)
    found = study.lr_range_test(task, ao.adam, low=options.low, high=options.high, steps=steps, mode=mode)
    print(found.sentence)
    if found.declined is not None:
        found.plot().savefig(options.out / "range_test.png", dpi=160)
        parser.exit(1, f"See range_test.png in {options.out}, and follow the advice with --low or --high.\n")
    model, epochs = train(found.suggestion, options.steps, training, validation)
    for suffix, style in STYLES.items():
        with matplotlib.style.context(style):
            draw(found, epochs).savefig(options.out / f"lr_find_then_train{suffix}.png", dpi=160)
    falls = np.count_nonzero(np.diff(epochs[:, 1]))
    print(
        f"The plateau lowered the rate {falls} times, from {epochs[0, 1]:.2g} to {epochs[-1, 1]:.2g}. The "
        f"accuracy is {epochs[-1, 2]:.3f} in validation and {accuracy(model, test):.3f} on the test images. "
        f"The picture is in {options.out}."
    )


if __name__ == "__main__":
    main()

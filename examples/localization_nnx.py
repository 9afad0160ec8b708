"""Training curves of an image-localization CNN: Adam at a constant rate, and times 0.8 every 5 epochs.

A convolutional network in Flax nnx finds a handwritten digit on a noisy canvas and predicts the box around
it. It is trained twice from the same initial weights on the same batches, with Adam at 0.01 and with
`ao.step_decay`; only the learning rate differs. The error is the mean absolute error of the box's four sides.

    pip install -e .[examples]
    python examples/localization_nnx.py

It takes about a minute on two CPU cores and writes to `--out`, each also for dark pages: curves.png, the
errors in training and validation after every epoch, and boxes.png, boxes on images not trained on.

For your own images, replace `data` by a function that returns images [image, row, column] and boxes (left,
top, right, bottom), and `CANVAS` by their side, a multiple of 4. For colour, begin with `nnx.Conv(3, ...)`
and leave out the `[..., None]`.

It shows one seed. With the seeds 0, 1 and 2 the constant rate ended at 0.58, 0.52 and 0.51 pixels, so a few
hundredths between two curves mean nothing. `examples/should_i_decay.py` measures the difference over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.style
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn
from sklearn.datasets import load_digits

import adaptive_optax as ao

Array = jax.Array | np.ndarray
CANVAS, BATCH, LEARNING_RATE = 28, 64, 0.01
CONSTANT, DECAYED = "constant", "times 0.8 every 5 epochs"
COLOURS = {CONSTANT: "#D55E00", DECAYED: "#0072B2"}
DARK = ["dark_background", dict.fromkeys(("figure.facecolor", "axes.facecolor"), "#15171a")]
STYLES: dict[str, Any] = {"": ["default"], "_dark": DARK}  # what a file's name ends in, and its style


def placed(digits: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Puts digits of 8 x 8 on noisy canvases, 8 to 20 pixels large; returns these and boxes of the ink."""
    chosen = digits[rng.integers(len(digits), size=count)]
    side = rng.uniform(8, 20, size=(count, 1))
    corner = rng.uniform(size=(count, 2)) * (CANVAS - side)  # left, top

    def enlarge(start: np.ndarray) -> np.ndarray:
        """The bilinear weights of the digit's 8 columns (or rows) in the canvas's."""
        position = (np.arange(CANVAS) + 0.5 - start[:, None]) / side * 8 - 0.5
        return np.clip(1 - np.abs(position[:, :, None] - np.arange(8)), 0, None)

    images = enlarge(corner[:, 1]) @ chosen @ enlarge(corner[:, 0]).transpose(0, 2, 1)
    images += 0.15 * rng.standard_normal(images.shape)
    inked = np.stack([chosen.max(axis=1), chosen.max(axis=2)], axis=1) > 0.1  # columns, rows
    first, last = inked.argmax(axis=2), 8 - inked[:, :, ::-1].argmax(axis=2)
    boxes = np.tile(corner, 2) + np.concatenate([first, last], axis=1) * side / 8
    return images.astype(np.float32), boxes.astype(np.float32)


def data() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and validation images with their boxes; no handwritten digit is in both."""
    pixels, _ = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    digits = rng.permutation(np.reshape(pixels, (-1, 8, 8)) / 16)
    return placed(digits[:1347], 2048, rng), placed(digits[1347:], 1024, rng)


class CNN(nnx.Module):
    """Three convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(1, 8, (5, 5), strides=2, rngs=rngs)
        self.conv_2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.conv_3 = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear((CANVAS // 4) ** 2 * 16, 64, rngs=rngs)
        self.box = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, images: Array) -> jax.Array:
        """The boxes in pixels for images [image, row, column]."""
        x = jnp.asarray(images)[..., None]
        for convolution in (self.conv_1, self.conv_2, self.conv_3):
            x = nnx.relu(convolution(x))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return CANVAS / 2 * (1 + self.box(x))  # training starts near the middle, not at pixel 0


def error(model: CNN, images: Array, boxes: Array) -> jax.Array:
    """The mean absolute error in pixels: the loss and the metric."""
    return jnp.mean(jnp.abs(model(images) - boxes))


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, images: Array, boxes: Array) -> jax.Array:
    """Updates the model and the optimizer in place; returns the error before the update."""
    value, gradients = nnx.value_and_grad(error)(model, images, boxes)
    optimizer.update(model, gradients)
    return value


evaluate = nnx.jit(error)


def train(name: str, rate: Any, steps: int, seed: int, bar: Progress) -> tuple[CNN, np.ndarray]:
    """Trains; returns the model and, after every epoch, (epoch, training error, validation error)."""
    (images, boxes), validation = data()
    model, rng = CNN(nnx.Rngs(seed)), np.random.default_rng(seed)
    optimizer = nnx.Optimizer(model, ao.adam(rate), wrt=nnx.Param)
    shown, curve, per_epoch = bar.add_task(name, total=steps, status=""), [], len(images) // BATCH
    order, losses = rng.permutation(len(images)), []
    for i in range(1, steps + 1):
        chosen = order[len(losses) * BATCH :][:BATCH]
        losses.append(train_step(model, optimizer, images[chosen], boxes[chosen]))
        is_last = i % per_epoch == 0 or i == steps
        if i % 8 and not is_last:
            continue  # showing a value waits for it, so not at every step
        training = float(np.mean(losses))  # of the epoch so far, while the weights change, as in most scripts
        if is_last:
            curve.append((i / per_epoch, training, float(evaluate(model, *validation))))
            order, losses = rng.permutation(len(images)), []
        now = float(ao.get_hyperparams(optimizer.opt_state)["learning_rate"])
        last = f", val {curve[-1][2]:.2f} px" if curve else ""
        bar.update(shown, completed=i, status=f"rate {now:.4f}, train {training:.2f}{last}")
    return model, np.array(curve)


def draw_curves(curves: dict[str, np.ndarray]) -> Figure:
    """The errors against the epoch."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        style: dict[str, Any] = {"color": COLOURS[name], "marker": "." if len(curve) == 1 else None}
        axes.plot(curve[:, 0], curve[:, 1], "--", linewidth=1, label=f"{name}: training", **style)
        axes.plot(curve[:, 0], curve[:, 2], linewidth=1.6, label=f"{name}: validation", **style)
    axes.set(xlabel="epoch", xlim=(0, None))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("mean absolute error, pixels", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return figure


def draw_boxes(models: dict[str, CNN], images: np.ndarray, boxes: np.ndarray) -> Figure:
    """The true and the predicted boxes on the first twelve images."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    drawn = {"true": (boxes, "#F0E442", 3.0)}  # thick, so that it shows behind the others
    for name, model in models.items():
        drawn[name] = (np.asarray(model(images[:12])), COLOURS[name], 1.2)
    for i, axes in enumerate(figure.subplots(3, 4).flat):
        axes.imshow(images[i], cmap="gray", vmin=-0.4, vmax=1.1, extent=(0, CANVAS, CANVAS, 0))
        axes.set_axis_off()
        for name, (of_images, colour, width) in drawn.items():
            x, y = of_images[i][[0, 2, 2, 0, 0]], of_images[i][[1, 1, 3, 3, 1]]  # around the box
            axes.plot(x, y, color=colour, linewidth=width, label=name if i == 0 else None)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, ncols=3)
    return figure


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(description="Trains an image-localization CNN with and without decay.")
    parser.add_argument("--steps", type=int, default=1280, help="of each run; an epoch has 32")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("out/localization"), help="where to write")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Trains both, draws and prints."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}.")
    (images, _), validation = data()
    decayed = ao.step_decay(LEARNING_RATE, 0.8, every=5 * (len(images) // BATCH))
    rates: dict[str, Any] = {CONSTANT: LEARNING_RATE, DECAYED: decayed}
    models, curves = {}, {}
    with Progress("{task.description}", BarColumn(12), TextColumn("{task.fields[status]}")) as bar:
        for name, rate in rates.items():
            models[name], curves[name] = train(name, rate, options.steps, options.seed, bar)

    options.out.mkdir(parents=True, exist_ok=True)
    for suffix, style in STYLES.items():
        with matplotlib.style.context(style):
            draw_curves(curves).savefig(options.out / f"curves{suffix}.png", dpi=160)
            draw_boxes(models, *validation).savefig(options.out / f"boxes{suffix}.png", dpi=160)
    print(
        f"Validation error after {options.steps} steps: {curves[CONSTANT][-1, 2]:.2f} pixels at a constant "
        f"rate, {curves[DECAYED][-1, 2]:.2f} {DECAYED}. That is one seed; a verdict needs several, as in "
        f"examples/should_i_decay.py. The pictures are in {options.out}."
    )


if __name__ == "__main__":
    main()

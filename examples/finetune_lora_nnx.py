"""Fine-tunes a network with LoRA: the body frozen first, then trained, without losing the moments.

A small network (Flax nnx) learns the digits 0 to 4 and is then fine-tuned to the digits 5 to 9: its two
layers, the body, get LoRA matrices, and it gets a new head. In the first half, `ao.freeze` keeps the body
fixed. In the second half the body is trained as well, at rates that fall from the head down
(`ao.partition_by_path`). `ao.transfer_state` takes the optimizer's state over: LoRA and the head keep their
moments, and the body's begin. For comparison, another run goes on with the body frozen: with LoRA of rank 1
it ends behind, with `RANK = 2` it ends level (one seed each).

    pip install -e .[examples]
    python examples/finetune_lora_nnx.py

It takes half a minute on a CPU. It prints the groups of the parameters, what happened to the state, and
the accuracies, and writes accuracy.png (accuracy_dark.png for dark pages) to `--out`.

For your own model, replace `Network` and `digits`, load the weights where `pretrained` is copied, and adapt
the patterns in `GROUPS` and `BODY`, which are searched for in paths such as "layer_1/lora/lora_a".
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
from adaptive_optax.integrations.flax import optimizer_from_state

Array = jax.Array | np.ndarray
Data = tuple[np.ndarray, np.ndarray]
BATCH, RANK, EVERY = 25, 1, 20  # images per step; of LoRA; steps between two measurements
BODY = "^layer_[12]/(kernel|bias)$"  # frozen in the first half
GROUPS = {  # the first match wins; layers near the input are the most general, so they change least
    "/lora/": ao.adam(3e-3),
    "^head/": ao.adam(3e-3),
    "^layer_2/": ao.adam(1e-3),
    "^layer_1/": ao.adam(3e-4),
}
DARK = ["dark_background", dict.fromkeys(("figure.facecolor", "axes.facecolor"), "#15171a")]
STYLES: dict[str, Any] = {"": ["default"], "_dark": DARK}  # what a file's name ends in, and its style


def digits(low: int) -> tuple[Data, Data]:
    """Noisy images of five digits from `low`, with labels from 0 to 4, for training and for validation."""
    pixels, numbers = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    images = np.asarray(pixels) / 16 + 0.2 * rng.standard_normal(np.shape(pixels))
    chosen = rng.permutation(np.flatnonzero((numbers >= low) & (numbers < low + 5)))
    images, labels = images[chosen].astype(np.float32), np.asarray(numbers)[chosen] - low
    return (images[:600], labels[:600]), (images[600:], labels[600:])


class Network(nnx.Module):
    """Two hidden layers, the body, and a head; with a rank, the body has LoRA matrices beside its own."""

    def __init__(self, rngs: nnx.Rngs, rank: int = 0):
        def layer(inputs: int, outputs: int) -> nnx.Linear:
            if rank:
                return nnx.LoRALinear(inputs, outputs, lora_rank=rank, rngs=rngs)
            return nnx.Linear(inputs, outputs, rngs=rngs)

        self.layer_1, self.layer_2 = layer(64, 128), layer(128, 128)
        self.head = nnx.Linear(128, 5, rngs=rngs)

    def __call__(self, images: Array) -> jax.Array:
        """The logits of five digits for images [image, pixel]."""
        return self.head(nnx.relu(self.layer_2(nnx.relu(self.layer_1(jnp.asarray(images))))))


def loss(model: Network, images: Array, labels: Array) -> jax.Array:
    """The mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def accuracy(model: Network, images: Array, labels: Array) -> jax.Array:
    """The share of images that are read correctly."""
    return jnp.mean(jnp.argmax(model(images), axis=1) == labels)


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, images: Array, labels: Array) -> None:
    """Updates the model and the optimizer in place."""
    optimizer.update(model, nnx.grad(loss)(model, images, labels))


def train(
    name: str, model: Network, optimizer: nnx.Optimizer, sets: tuple[Data, Data], steps: int
) -> np.ndarray:
    """Trains; returns rows of (step, accuracy in training, accuracy in validation)."""
    (images, labels), _ = sets
    rng, order, curve = np.random.default_rng(0), np.zeros(0, int), []
    with Progress("{task.description}", BarColumn(12), TextColumn("{task.fields[status]}")) as bar:
        shown = bar.add_task(name, total=steps, status="")
        for i in range(steps + 1):
            if i % EVERY == 0 or i == steps:
                training, validation = (float(accuracy(model, *data)) for data in sets)
                curve.append((i, training, validation))
                used = ao.get_hyperparams(optimizer.opt_state)  # "/lora//learning_rate" and so on
                rate = max(float(value) for key, value in used.items() if key.endswith("learning_rate"))
                status = f"rate {rate:.4f}, train {training:.3f}, val {validation:.3f}"
                bar.update(shown, completed=i, status=status)
            if i < steps:
                order = order if len(order) else rng.permutation(len(images))
                chosen, order = order[:BATCH], order[BATCH:]
                train_step(model, optimizer, images[chosen], labels[chosen])
    return np.array(curve)


def fine_tune(model: Network, sets: tuple[Data, Data], steps: int) -> dict[str, np.ndarray]:
    """Trains with the body frozen, then without; returns the curves of both halves, and of the comparison."""
    groups = ao.partition_by_path(GROUPS)
    frozen = ao.freeze(groups, BODY)

    print(ao.describe_partition(frozen, nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, frozen, wrt=nnx.Param)  # the matrices of LoRA are nnx.Params as well
    half = steps // 2
    curves = {"body frozen": train("body frozen", model, optimizer, sets, half)}
    other_model, other_optimizer = nnx.clone(model), nnx.clone(optimizer)

    params = nnx.state(model, nnx.Param)
    state, table = ao.transfer_state(optimizer.opt_state, frozen, groups, params)
    print(f"\n{ao.describe_partition(groups, params)}\n\nWhat happened to the moments (mu and nu):")
    for row in table:
        if "/mu/" in row.path or "/nu/" in row.path:
            print(f"{row.outcome:5} {row.path}")
    optimizer = optimizer_from_state(model, groups, state)
    curves["body trained"] = train("body trained", model, optimizer, sets, steps - half)
    curves["still frozen"] = train("still frozen", other_model, other_optimizer, sets, steps - half)
    for name in ("body trained", "still frozen"):
        curves[name][:, 0] += half
    return curves


def draw(curves: dict[str, np.ndarray]) -> Figure:
    """The accuracies in training (dashed) and validation (solid) over the steps."""
    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), ("#0072B2", "#D55E00", "#56B4E9"), strict=True):
        axes.plot(curve[:, 0], curve[:, 1], "--", color=colour, linewidth=1)
        axes.plot(curve[:, 0], curve[:, 2], color=colour, linewidth=1.6, label=name)
    axes.axvline(curves["body trained"][0, 0], color="gray", linestyle=":", label="unfreezing")
    axes.set(xlabel="step")
    axes.set_title("accuracy (dashed: training, solid: validation)", loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, loc="lower right")
    return figure


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(description="Fine-tunes with LoRA, then unfreezes the body.")
    parser.add_argument(
        "--steps", type=int, default=800, help="of the fine-tuning; the body is frozen in half"
    )
    parser.add_argument("--out", type=Path, default=Path("out/finetune_lora"), help="where to write")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Pretrains, fine-tunes, draws and prints."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}.")

    pretrained = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(pretrained, ao.adam(1e-3), wrt=nnx.Param)
    train("pretraining", pretrained, optimizer, digits(0), options.steps // 2)
    model = Network(nnx.Rngs(1), rank=RANK)  # LoRA adds nothing at first: one of its two matrices is 0
    nnx.update(model.layer_1, nnx.state(pretrained.layer_1))
    nnx.update(model.layer_2, nnx.state(pretrained.layer_2))

    curves = fine_tune(model, digits(5), options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    for suffix, style in STYLES.items():
        with matplotlib.style.context(style):
            draw(curves).savefig(options.out / f"accuracy{suffix}.png", dpi=160)
    before, after, still = (curve[-1, 2] for curve in curves.values())
    print(
        f"\nValidation accuracy: {before:.3f} at the unfreezing, {after:.3f} at the end, and {still:.3f} if "
        f"the body stays frozen (one seed). The picture is in {options.out}."
    )


if __name__ == "__main__":
    main()

"""A verdict on a PyTorch script: an arm may return anything, here an optimizer with its scheduler.

The study needs nothing of a framework: `train(run)` returns a number, and an arm makes whatever the script
wants from a learning rate and the number of steps.

    pip install -e .[study] scikit-learn torch
    python examples/own_script_torch.py

It takes about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from sklearn.datasets import load_digits

from adaptive_optax import study


def constant(learning_rate: float, steps: int) -> Any:
    """Adam at one rate."""

    def build(parameters: Any) -> tuple[Any, Any]:
        return torch.optim.Adam(parameters, lr=learning_rate), None

    return build


def one_cycle(learning_rate: float, steps: int) -> Any:
    """Adam with PyTorch's one-cycle schedule."""

    def build(parameters: Any) -> tuple[Any, Any]:
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)

    return build


def train(run: study.Run) -> float:
    """Trains a small network; returns its error rate on the validation set."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # one split for all trials
    images = torch.tensor(images[order] / 16, dtype=torch.float32)
    labels = torch.tensor(labels[order])
    torch.manual_seed(run.seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer, scheduler = run.transformation(model.parameters())
    for step in range(run.steps):
        chosen = torch.randint(1200, (32,))
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step % 50 == 0:
            run.report(step, error_rate(model, images, labels))
    return error_rate(model, images, labels)


def error_rate(model: Any, images: Any, labels: Any) -> float:
    """The share of validation images that are read wrongly."""
    with torch.no_grad():
        return (model(images[1200:]).argmax(1) != labels[1200:]).float().mean().item()


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares one-cycle with a constant rate, in PyTorch.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8)
    return parser


def main() -> None:
    """Compares one-cycle with a constant rate."""
    options = command_line().parse_args()
    comparison = study.compare(
        train,
        {"constant": constant, "one_cycle": one_cycle},
        learning_rates=[3e-3, 1e-2, 3e-2],
        steps=options.steps,
        seeds=options.seeds,
        tuning_seeds=2,
        margin=0.005,
    )
    comparison.print_summary()


if __name__ == "__main__":
    main()

"""A verdict on a PyTorch script: should Adam's learning rate decay?

The study needs nothing of a framework: `train(run)` returns a number. `run.schedule` gives the rates of a
standard arm, here for PyTorch's LambdaLR. The lines marked with > are all that a study asks of the script.

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


def train(run: study.Run) -> float:  # > before: train(learning_rate, seed, steps)
    """Trains a small network; returns its error rate on the validation set."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # one split for all trials
    images = torch.tensor(images[order] / 16, dtype=torch.float32)
    labels = torch.tensor(labels[order])
    torch.manual_seed(run.seed)  # > before: an argument
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)  # > before: lr=learning_rate
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, run.schedule)  # > new: 1.0 times the arm's rate
    for step in range(run.steps):  # > before: an argument
        if step % 50 == 0:
            run.report(step, error_rate(model, images, labels))  # > before: print
        chosen = torch.randint(1200, (32,))
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()  # > new
    return error_rate(model, images, labels)


def error_rate(model: Any, images: Any, labels: Any) -> float:
    """The share of validation images that are read wrongly."""
    with torch.no_grad():
        return (model(images[1200:]).argmax(1) != labels[1200:]).float().mean().item()


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares two decays with a constant rate, in PyTorch.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8)
    return parser


def main() -> None:
    """Compares two decays with a constant rate."""
    options = command_line().parse_args()
    comparison = study.compare(
        train,
        ["adam:constant", "adam:linear", "adam:cosine"],
        learning_rates=[3e-3, 1e-2, 3e-2],
        steps=options.steps,
        seeds=options.seeds,
        tuning_seeds=2,
        margin=0.005,
    )
    comparison.print_summary()


if __name__ == "__main__":
    main()

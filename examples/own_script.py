"""A verdict on one's own training script: should its learning rate decay?

`train` below is a plain training loop: a small network on the digits of scikit-learn, with batches
split over all devices (a function may use any mesh). The lines marked with > are all that
a study asks of it: take what differs between trials from `run`, report the metric, return the final one.

    pip install -e .[examples]
    python examples/own_script.py

It takes about a minute on two CPU cores. `--workers 2` trains in two processes at a time instead; any other
`concurrent.futures.Executor` works in the same way. With `--out`, finished trials are kept: run it again to
resume, or with more `--seeds` to add some; `adaptive-optax status OUT` shows its progress.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from adaptive_optax import study


def digits() -> tuple[Any, Any]:
    """Images in [0, 1] and their labels, for training and for validation."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def logits(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """A network with one hidden layer."""
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean cross entropy."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def train(run: study.Run) -> float:  # > before: train(tx, seed, steps)
    """Trains one network; returns its error rate on the validation set."""
    tx = run.transformation  # > before: an argument
    (images, labels), validation = digits()
    random = np.random.default_rng(run.seed)  # > before: an argument
    mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    split = jax.NamedSharding(mesh, jax.P("batch"))

    w1, w2 = (random.normal(size=shape).astype(np.float32) for shape in ((64, 64), (64, 10)))
    params = {"w1": w1 / 8, "b1": np.zeros(64, np.float32), "w2": w2 / 8, "b2": np.zeros(10, np.float32)}
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def error_rate(params):
        return jnp.mean(jnp.argmax(logits(params, validation[0]), axis=1) != validation[1])

    for i in range(run.steps):  # > before: an argument
        if i % 50 == 0:
            run.report(i, error_rate(params))  # > before: print
        chosen = random.integers(len(labels), size=32)
        batch = jax.device_put((images[chosen], labels[chosen]), split)
        params, opt_state = step(params, opt_state, batch)
    return float(error_rate(params))  # > before: return params


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Compares a constant rate with two that decay, in a script of one's own."
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 trains in this one")
    parser.add_argument("--out", type=Path, help="keeps finished trials and writes report.html")
    return parser


def main() -> None:
    """Compares a constant rate with two that decay."""
    options = command_line().parse_args()

    executor = None
    if options.workers:
        spawn = multiprocessing.get_context("spawn")
        executor = concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=spawn)
    comparison = study.compare(
        train,
        ["adam:constant", "adam:linear", "adam:one_cycle"],
        learning_rates=[3e-3, 1e-2, 3e-2],
        steps=options.steps,
        seeds=options.seeds,
        tuning_seeds=2,
        margin=0.005,
        metric_name="error rate",
        executor=executor,
        out=options.out,
    )
    comparison.print_summary()
    if options.out is not None:
        comparison.to_html(options.out / "report.html")


if __name__ == "__main__":
    main()

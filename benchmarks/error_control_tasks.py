"""Small training tasks for the suite `error_control`: classifiers, a regression and an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from adaptive_optax import study

TRAINING_DIGITS, TRAINING_POINTS = 1280, 2048


def _init(*sizes: int) -> Callable[[jax.Array], Any]:
    """Returns the initializer of a network: variance 2 / inputs, for the last layer 1 / inputs."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        gains = [2.0] * (len(sizes) - 2) + [1.0]
        return [
            {"kernel": jax.random.normal(k, (a, b)) * (gain / a) ** 0.5, "bias": jnp.zeros(b)}
            for k, a, b, gain in zip(keys, sizes[:-1], sizes[1:], gains, strict=True)
        ]

    return init


def _apply(params: Any, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    for layer in params[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The pixels, from 0 to 1, and the labels, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    return (np.asarray(pixels)[order] / 16).astype(np.float32), np.asarray(labels)[order].astype(np.int32)


def _task(init: Any, loss: Any, data: dict[str, np.ndarray], count: int, batch: int, name: str) -> study.Task:
    """A task with the first `count` samples for training."""
    train, validation = ({k: x[part] for k, x in data.items()} for part in (slice(count), slice(count, None)))
    return study.Task(init, loss, train, validation, batch_size=batch, name=name)


def classifier() -> study.Task:
    """Scikit-learn's digits, a network 64-64-64-10, cross-entropy, batches of 32."""
    x, labels = _digits()

    def loss(params, batch, key):
        logits = _apply(params, batch["x"], jax.nn.relu)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    data = {"x": x - x.mean(0), "y": labels}
    return _task(_init(64, 64, 64, 10), loss, data, TRAINING_DIGITS, 32, "classifier")


def convolutional() -> study.Task:
    """Scikit-learn's digits, two convolutions and a linear layer, cross-entropy, batches of 16."""
    x, labels = _digits()
    layers = {"first": (3, 3, 1, 16), "second": (3, 3, 16, 16), "output": (64, 10)}

    def init(key):
        keys = jax.random.split(key, len(layers))
        return {
            name: {
                "kernel": jax.random.normal(k, shape) * (2 / np.prod(shape[:-1])) ** 0.5,
                "bias": jnp.zeros(shape[-1]),
            }
            for k, (name, shape) in zip(keys, layers.items(), strict=True)
        }

    def convolved(layer, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dimensions)
        x = jax.nn.relu(x + layer["bias"])
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def loss(params, batch, key):
        x = batch["x"].reshape(-1, 8, 8, 1)
        x = convolved(params["second"], convolved(params["first"], x)).reshape(-1, 64)
        logits = x @ params["output"]["kernel"] + params["output"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    data = {"x": x - x.mean(0), "y": labels}
    return _task(init, loss, data, TRAINING_DIGITS, 16, "small convolutional network")


def regression(batch_size: int) -> study.Task:
    """A smooth function of 8 inputs with noise of 0.1, a tanh network 8-64-64-1, squared error."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2560, 8))
    y = np.sin(x[:, 0] * x[:, 1]) + np.tanh(x[:, 2] + x[:, 3]) * x[:, 4] + 0.5 * np.cos(2 * x[:, 5])
    data = {"x": x.astype(np.float32), "y": (y + 0.1 * rng.normal(size=y.shape)).astype(np.float32)}

    def loss(params, batch, key):
        return jnp.mean((_apply(params, batch["x"], jnp.tanh)[:, 0] - batch["y"]) ** 2)

    name = f"regression, batch {batch_size}"
    return _task(_init(8, 64, 64, 1), loss, data, TRAINING_POINTS, batch_size, name)


def autoencoder() -> study.Task:
    """Scikit-learn's digits, a tanh network 64-64-16-64-64, squared error, batches of 64."""

    def loss(params, batch, key):
        return jnp.mean((_apply(params, batch["x"], jnp.tanh) - batch["x"]) ** 2)

    init = _init(64, 64, 16, 64, 64)
    return _task(init, loss, {"x": _digits()[0]}, TRAINING_DIGITS, 64, "autoencoder")

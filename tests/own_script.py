"""A training function without a framework, as in a user's own script: SGD on a noisy quadratic, in NumPy."""

import functools
import os
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax import study


class Rate:
    """What an arm of one's own may return: anything."""

    def __init__(self, peak, steps, decays):
        self.peak, self.steps, self.decays = peak, steps, decays

    def __call__(self, step):
        return self.peak * (1 - step / self.steps) if self.decays else self.peak


def constant(learning_rate, steps):
    return Rate(learning_rate, steps, False)


def linear(learning_rate, steps):
    return Rate(learning_rate, steps, True)


ARMS = {"constant": constant, "linear": linear}
calls = []  # of functions that count theirs here


def train(run):
    random = np.random.default_rng(run.seed)
    x = random.normal(size=4)
    run.report(0, np.mean(x**2))
    for step in range(run.steps):
        x = x - run.transformation(step) * (x + random.normal(size=4))
        if (step + 1) % 10 == 0 and step + 1 < run.steps:
            run.report(step + 1, np.mean(x**2))
    return np.mean(x**2)


def train_sgd(run):
    """With an optax transformation, as the standard arms return."""
    x, random = jnp.ones(4), np.random.default_rng(run.seed)
    state = run.transformation.init(x)
    for _ in range(run.steps):
        updates, state = run.transformation.update(x + random.normal(size=4), state, x)
        x = x + updates
    return jnp.mean(x**2)


def dies_once(run, folder):
    """Kills its own process in the middle of one trial, the first time."""
    if (run.arm, run.seed) == ("linear", 1001):
        try:
            Path(folder, "died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return train(run)


def dying(folder):
    return functools.partial(dies_once, folder=folder)


def task():
    """A task whose functions are in this module."""
    data = {"x": np.linspace(-1, 1, 64, dtype=np.float32)}
    return study.Task(_init, _loss, data, data, batch_size=8, name="slope")


def _init(key):
    return jnp.zeros(())


def _loss(slope, batch, key):
    return jnp.mean((slope * batch["x"] - 2 * batch["x"]) ** 2) + 0.1


def sgd(learning_rate, steps):
    return optax.sgd(learning_rate)


def slower(learning_rate, steps):
    return optax.sgd(learning_rate / 2)

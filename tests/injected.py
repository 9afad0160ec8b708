"""Runs with hyperparameters in the state."""

import numpy as np
import optax

import adaptive_optax as ao

PARAMS = {"a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
ONES = {"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}


def halving(count):
    """1/2, 1/4, 1/8: exact in float32, and a step too many would show."""
    return 0.5 / 2.0**count


def value(opt_state, name="learning_rate"):
    return float(ao.get_hyperparams(opt_state)[name])


SEEN = {}


def unannotated(rate, scale=1.0, power=2, flag=True, label="x", function=None):
    SEEN.update(locals())
    return optax.identity()


SGD = {
    "injected": lambda rate: ao.inject_hyperparams(ao.sgd)(rate),
    "optax, injected": lambda rate: ao.inject_hyperparams(optax.sgd)(rate),
    "not injected": lambda rate: ao.sgd(rate),
}

LABELS = {"a": "head", "b": "body"}

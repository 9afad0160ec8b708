"""What a test of a refused argument, tree or state needs."""

import numpy as np
import pytest

import adaptive_optax as ao


def schedule(count):
    """A schedule of the tables below: 1/2, then 1/4 and so on."""
    return 0.5 / (1.0 + count)


def refused(build, *fragments, error=ValueError):
    """Asserts that `build()` raises and that the message contains every fragment."""
    with pytest.raises(error) as raised:
        build()
    message = str(raised.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in {message!r}"


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


TREE = {"layer": {"steps": ones(2), "w": ones(2, 3)}, "bias": ones(2)}

SCHEDULED = {
    "learning_rate": ao.scale_by_learning_rate,
    "b1": lambda value: ao.scale_by_adam(b1=value),
    "eps": lambda value: ao.scale_by_rms(eps=value),
    "momentum": lambda value: ao.sgd(0.1, value),
    "weight_decay": ao.add_decoupled_weight_decay,
}

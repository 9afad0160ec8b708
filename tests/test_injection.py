"""`inject_hyperparams` works with every numeric hyperparameter of every factory, or a reason says why not."""

import dataclasses
import inspect
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import adaptive_optax as ao

# Two values of each hyperparameter: one name has one meaning, whatever the factory.
VALUES = {
    "learning_rate": (0.1, 0.03),
    "max_learning_rate": (0.1, 0.03),
    "initial_learning_rate": (0.1, 0.03),
    "b1": (0.9, 0.5),
    "b2": (0.99, 0.9),
    "decay": (0.9, 0.5),
    "momentum": (0.9, 0.5),
    "eps": (1e-3, 0.1),
    "eps_root": (1e-3, 0.1),
    "initial_scale": (0.0, 1.0),
    "weight_decay": (0.1, 0.3),
    "schedule": (1.0, 0.5),
    "decay_schedule": (1.0, 0.5),
    "max_norm": (1.0, 0.1),
    "power": (8.0, 1.0),
    "factor": (0.5, 0.25),
    "rtol": (0.1, 0.0),
    "atol": (0.0, 0.1),
    "min_scale": (0.0, 0.9),
    "init_scale": (1024.0, 2.0),
    "growth_factor": (2.0, 4.0),
    "backoff_factor": (0.5, 0.25),
    "minimum_scale": (2.0**15, 2.0**14),
    "maximum_scale": (2.0**16, 2.0**15),
    "tolerance": (0.35, 0.1),
}

# What a factory needs, and what makes a hyperparameter take part.
ARGUMENTS = {
    "adam": {"learning_rate": 0.1},
    "adamw": {"learning_rate": 0.1},
    "adam_mini": {"learning_rate": 0.1, "params_layout": {"w": "output_neuron"}},
    "rmsprop": {"learning_rate": 0.1},
    "global_rmsprop": {"learning_rate": 0.1},
    "sgd": {"learning_rate": 0.1},
    "trace": {"decay": 0.9},
    "clip_by_global_norm": {"max_norm": 1.0},
    "scale_by_learning_rate": {"learning_rate": 0.1},
    "add_decoupled_weight_decay": {"weight_decay": 0.1},
    "accumulate_gradients": {"inner": ao.sgd(0.1), "every": 2},
    "dynamic_loss_scale": {"inner": ao.sgd(0.1), "growth_interval": 1},
    "error_controlled": {"direction": ao.scale_by_adam(), "initial_learning_rate": 0.3},
    "reduce_on_plateau": {"patience": 1},
    "telemetry": {"inner": ao.sgd(0.1)},
}
COUPLED = {
    "schedule": {"coupling": "schedule"},
    "decay_schedule": {"decay_coupling": "schedule"},
}

DECIDES = "an integer that decides what is built, annotated as int"
NOT_INJECTED = {
    ("accumulate_gradients", "every"): "an integer or a schedule of emissions, which has a state of its own",
    ("dynamic_loss_scale", "growth_interval"): DECIDES,
    ("error_controlled", "every"): DECIDES,
    ("reduce_on_plateau", "accumulation_size"): DECIDES,
    ("reduce_on_plateau", "cooldown"): DECIDES,
    ("reduce_on_plateau", "patience"): DECIDES,
    ("stochastic_rounding", "seed"): DECIDES,
    ("telemetry", "every"): DECIDES,
}
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}


def is_numeric(parameter):
    """By its default or its annotation."""
    has_number = isinstance(parameter.default, numbers.Real) and not isinstance(parameter.default, bool)
    return has_number or any(kind in str(parameter.annotation) for kind in ("Scalar", "ArrayLike", "float"))


PAIRS = [
    (factory, parameter.name)
    for factory in dict.fromkeys(case.factory for case in CASES)
    for parameter in inspect.signature(getattr(ao, factory)).parameters.values()
    if is_numeric(parameter)
]


def arguments_of(factory, name, value):
    return ARGUMENTS.get(factory, {}) | COUPLED.get(name, {}) | {name: value}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parabola:
    """A loss with a value and gradients at PARAMS."""

    value: Any
    gradients: Any

    def __call__(self, params):
        moved = jax.tree.map(
            lambda p, q, g: jnp.sum(g * (p - q) + (p - q) ** 2), params, PARAMS, self.gradients
        )
        return self.value + sum(jax.tree.leaves(moved))


def steps(update, state, overflows):
    """The updates of a few steps, with losses that cease to fall, and perhaps a gradient that overflows."""
    found = []
    for step in range(6):
        size = jnp.inf if overflows and step == 0 else 1.0
        gradients = jax.tree.map(lambda p, step=step, size=size: size * jnp.cos(p + step), PARAMS)
        value = jnp.float32(max(1.0 - step / 10, 0.8))
        loss = Parabola(value, gradients)
        updates, state = update(gradients, state, PARAMS, value=value, value_fn=loss)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(("factory", "name"), [pair for pair in PAIRS if pair not in NOT_INJECTED])
def test_it_is_injected_and_set(factory, name):
    make, values = getattr(ao, factory), [jnp.float32(value) for value in VALUES[name]]
    injected = ao.inject_hyperparams(make)(**arguments_of(factory, name, VALUES[name][0]))
    given = injected.init(PARAMS)
    start = make(**arguments_of(factory, name, values[0])).init(PARAMS)
    update, overflows = jax.jit(injected.update), factory == "dynamic_loss_scale"
    for value, state in zip(values, (given, ao.set_hyperparams(given, **{name: values[1]})), strict=True):
        assert state.hyperparams[name] == ao.get_hyperparams(state)[name] == value
        expected, _ = steps(make(**arguments_of(factory, name, value)).update, start, overflows)
        got, end = steps(update, state, overflows)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), got, expected)
        assert end.hyperparams[name] == value
    # And what it does to a fresh state.
    other = ao.inject_hyperparams(make)(**arguments_of(factory, name, VALUES[name][1])).init(PARAMS)
    expected = make(**arguments_of(factory, name, values[1])).init(PARAMS)
    leaves = jax.tree.leaves(other.inner_state), jax.tree.leaves(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), *leaves)


def test_what_is_not_injected_is_numeric_and_stays_out_of_the_state():
    assert set(NOT_INJECTED) <= {
        (case.factory, name)
        for case in CASES
        for name in inspect.signature(getattr(ao, case.factory)).parameters
    }
    for factory, name in NOT_INJECTED:
        value = {"patience": 3, "seed": 1}.get(name, 2)
        tx = ao.inject_hyperparams(getattr(ao, factory))(**arguments_of(factory, name, value))
        assert name not in tx.init(PARAMS).hyperparams

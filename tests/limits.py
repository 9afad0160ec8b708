"""A quadratic, and runs of `error_controlled` on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_optax as ao

SCALES = np.array([1.0, 3.0, 10.0, 30.0])
START = np.array([1.0, -2.0, 0.5, 1.5])


def quadratic(params):
    return jnp.sum(jnp.asarray(SCALES, params.dtype) * params**2) / 2


def stepper(tx, loss=quadratic):
    """A jitted step of a transformation that needs the loss and its function."""

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, steps, loss=quadratic, params=None):
    """The parameters after some steps, the state after each, and the state at the end."""
    params = jnp.asarray(START, jnp.float32) if params is None else params
    state, step, states = tx.init(params), stepper(tx, loss), []
    for _ in range(steps):
        params, state = step(params, state)
        states.append(state)
    return params, states, state


def seen(state):
    return jax.tree.map(float, ao.get_error_control(state))

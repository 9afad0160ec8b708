"""Runs of Adam that change libraries: parameters, gradients, and what is compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_optax as ao

STEPS, SWITCH = 20, 10


def rate(count):
    return 0.05 / (1.0 + 0.1 * count)


def label(params):
    return {key: "wide" if key == "kernel" else "rest" for key in params}


PARAMS = {
    "bias": jnp.linspace(-1.0, 1.0, 3),
    "kernel": jnp.linspace(-2.0, 2.0, 192).reshape(3, 64),
    "scale": jnp.asarray(0.5),
}
GRADIENTS = [
    jax.tree.map(lambda p, t=t: jnp.cos(3 * p + 0.7 * t) * (1 + t % 4) + 0.2, PARAMS) for t in range(STEPS)
]


@functools.cache
def jitted_step(tx):
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def run(tx, params, state, gradients):
    """The parameters and the state after some steps."""
    for g in gradients:
        params, state = jitted_step(tx)(params, state, g)
    return params, state


@functools.cache
def train(tx, steps=STEPS):
    return run(tx, PARAMS, tx.init(PARAMS), GRADIENTS[:steps])


def assert_close(actual, expected, rtol, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def is_adam(node):
    return isinstance(node, ao.ScaleByAdamState)


INT8 = ao.Int8(block_size=64, min_size=1)

LOW = {
    "bfloat16": ao.adam(rate, mu_storage="bfloat16", nu_storage="bfloat16"),
    "int8": ao.adam(rate, mu_storage=INT8, nu_storage=INT8),
}


def counts(state):
    found = jax.tree.leaves_with_path(state)
    return [x for path, x in found if jax.tree_util.keystr(path).endswith(".count")]


THERE = optax.adam(0.1).init(PARAMS)
TWO_HERE = optax.partition({"wide": ao.adam(0.1), "rest": ao.adam(0.1)}, label)

PARTS = {
    "frozen": lambda: ao.freeze(ao.adam(rate), "^kernel"),
    "groups": lambda: ao.partition_by_path({"^kernel": ao.adam(rate)}, default=ao.adam(rate)),
    "frozen, groups": lambda: ao.freeze(
        ao.partition_by_path({"^bias": ao.adam(rate)}, default=ao.adam(rate)), "^kernel"
    ),
}


def adam_states(state):
    def is_adam(x):
        return isinstance(x, ao.ScaleByAdamState)

    return [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]


def moments_by_path(state):
    return {
        (name, "/".join(str(key.key) for key in path)): x
        for adam in adam_states(state)
        for name in ("mu", "nu")
        for path, x in jax.tree_util.tree_leaves_with_path(getattr(adam, name))
    }

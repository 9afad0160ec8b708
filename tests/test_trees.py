"""Functions of single leaves over trees: traced once for leaves that look alike, and the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_optax as ao
from adaptive_optax._trees import by_leaf, leaf_numbers


def axpy_counted():
    """A function of leaves and the list of the shapes with which Python ran it."""
    runs = []

    @by_leaf(results=2)
    def axpy(scalars, x, y):
        factor, power = scalars
        assert isinstance(power, float)
        runs.append(x.shape)
        return factor * x**power + y, x

    return axpy, runs


def trees():
    x = {"a": jnp.arange(3.0), "b": [jnp.ones((2, 2)), jnp.arange(3.0) + 1], "c": None}
    return x, jax.tree.map(lambda leaf: leaf + 1, x)


def test_values_and_structure():
    axpy, _ = axpy_counted()
    x, y = trees()
    total, same = axpy((jnp.float32(3.0), 2.0), x, y)
    assert jax.tree.structure(total) == jax.tree.structure(x)
    jax.tree.map(np.testing.assert_array_equal, same, x)
    jax.tree.map(lambda t, a, b: np.testing.assert_allclose(t, 3 * a**2 + b, rtol=1e-6), total, x, y)


def test_a_trace_runs_the_function_once_for_each_shape():
    axpy, runs = axpy_counted()
    x, y = trees()

    def once_more(factor):
        return jax.jit(lambda x, y: axpy((factor, 2.0), x, y))(x, y)[0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        once_more(jnp.float32(3.0)),
        axpy_counted()[0]((jnp.float32(3.0), 2.0), x, y)[0],
    )
    assert runs == [(3,), (2, 2)]
    once_more(jnp.float32(4.0))  # another trace of the same shapes
    assert runs == [(3,), (2, 2)]


def test_a_number_that_is_no_array_is_a_constant_of_the_trace():
    axpy, runs = axpy_counted()
    x, y = trees()
    results = [jax.jit(lambda x, y, p=p: axpy((jnp.float32(1), p), x, y)[0])(x, y) for p in (2.0, 3.0)]
    np.testing.assert_allclose(results[0]["a"], np.arange(3.0) ** 2 + np.arange(3.0) + 1, rtol=1e-6)
    np.testing.assert_allclose(results[1]["a"], np.arange(3.0) ** 3 + np.arange(3.0) + 1, rtol=1e-6)
    assert len(runs) == 4


def test_concrete_leaves_are_not_compiled():
    axpy, runs = axpy_counted()
    x, y = trees()
    for _ in range(2):
        axpy((1.0, 2.0), x, y)
    assert runs == 2 * [(3,), (2, 2), (3,)]


def test_a_vmap_outside_jit_traces_once_for_all_its_calls():
    axpy, runs = axpy_counted()
    x = jnp.ones((4, 3))
    for _ in range(3):
        total, _ = jax.vmap(lambda x: axpy((jnp.float32(2), 1.0), {"x": x}, {"x": x}))(x)
    np.testing.assert_array_equal(total["x"], 3 * x)
    assert runs == [(3,)]


def test_traced_scalars_and_gradients_pass_through():
    axpy, _ = axpy_counted()
    x, y = trees()

    def loss(factor, x):
        return sum(map(jnp.sum, jax.tree.leaves(axpy((factor, 2.0), x, y)[0])))

    slopes = jax.grad(loss, argnums=(0, 1))(jnp.float32(3), x)
    np.testing.assert_allclose(slopes[0], sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(x)))
    np.testing.assert_allclose(slopes[1]["a"], 6 * x["a"])


@pytest.mark.parametrize("empty", [{}, None, (), {"hidden": optax.MaskedNode()}])
def test_a_tree_without_leaves(empty):
    axpy, runs = axpy_counted()
    assert axpy((1.0, 2.0), empty, empty) == (empty, empty)
    assert not runs


def test_leaves_are_numbered_in_their_order():
    x, _ = trees()
    assert leaf_numbers(x) == {"a": 0, "b": [1, 2], "c": None}


# With the equations that each leaf may add; one that ran every leaf through Python would add the second.
CHAINS = {
    "adamw": (lambda: ao.adamw(1e-3), 5, 19),
    "adamw, bfloat16": (lambda: ao.adamw(1e-3, mu_storage="bfloat16", nu_storage="bfloat16"), 9, 141),
    "adamw, int8": (lambda: ao.adamw(1e-3, mu_storage="int8", nu_storage="int8"), 12, 257),
    "adam-mini": (lambda: ao.adam_mini(1e-3, {"q": "query_key"}), 8, 22),
    "global_rmsprop": (lambda: ao.global_rmsprop(1e-3), 5, 9),
    "clip": (lambda: ao.clip_by_global_norm(1.0), 3, 4),
    "stochastic_rounding": (lambda: ao.stochastic_rounding(), 2, 64),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_leaf_adds_few_equations_to_a_trace(name):
    make, most, _ = CHAINS[name]
    tx = make()

    def equations(leaves):
        dtype = jnp.bfloat16 if name == "stochastic_rounding" else jnp.float32
        params = {f"q{i}": jnp.zeros((64, 1, 64), dtype) for i in range(leaves)}
        state = tx.init(params)
        return len(jax.make_jaxpr(tx.update)(params, state, params).jaxpr.eqns)

    assert (equations(12) - equations(2)) / 10 <= most

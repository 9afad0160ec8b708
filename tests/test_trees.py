"""Functions of single leaves over trees: traced once for leaves that look alike, and the same everywhere."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_optax as ao
from adaptive_optax._core.trees import by_leaf


def axpy_counted():
    """A function of leaves and the list of the shapes with which Python ran it."""
    runs = []

    @by_leaf(like=("x", "x"))
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


def test_a_result_has_the_tree_of_the_input_it_is_like():
    @by_leaf(like=("y", "missing"))
    def both(_, x, y, missing):
        return x + y, missing

    @by_leaf(like="y")
    def first(_, x, y):
        return x + y

    x, y = {"a": jnp.ones(2), "b": jnp.ones(3)}, [jnp.ones(2), jnp.ones(3)]
    total, missing = both((), x, y, None)
    assert isinstance(total, list) and missing is None
    jax.tree.map(np.testing.assert_array_equal, first((), x, y), total)


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


# With the equations that each leaf may add. Without `by_leaf` a leaf of bfloat16 state adds 141.
CHAINS = {
    "adamw": (lambda: ao.adamw(1e-3), 5),
    "adamw, bfloat16": (lambda: ao.adamw(1e-3, mu_storage="bfloat16", nu_storage="bfloat16"), 9),
    "adamw, int8": (lambda: ao.adamw(1e-3, mu_storage="int8", nu_storage="int8"), 12),
    "adam-mini": (lambda: ao.adam_mini(1e-3, {"q": "query_key"}), 8),
    "global_rmsprop": (lambda: ao.global_rmsprop(1e-3), 5),
    "clip": (lambda: ao.clip_by_global_norm(1.0), 3),
    "stochastic_rounding": (lambda: ao.stochastic_rounding(), 2),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_leaf_adds_few_equations_to_a_trace(name):
    make, most = CHAINS[name]
    tx = make()

    def equations(leaves):
        dtype = jnp.bfloat16 if name == "stochastic_rounding" else jnp.float32
        params = {f"q{i}": jnp.zeros((64, 1, 64), dtype) for i in range(leaves)}
        state = tx.init(params)
        return len(jax.make_jaxpr(tx.update)(params, state, params).jaxpr.eqns)

    assert (equations(12) - equations(2)) / 10 <= most


class Params(NamedTuple):
    """In an order that is not that of a dict's sorted keys."""

    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize(
    "make", [ao.scale_by_adam, ao.scale_by_rms, lambda: ao.trace(0.9), lambda: ao.adamw(0.1)]
)
def test_leaves_in_another_order_are_refused_and_not_confused(make):
    """As when a state was restored as a dict: leaf by leaf, one would take another's moment."""
    tx, ones = make(), jnp.ones(3)
    state = tx.init({"w": ones, "b": ones})
    with pytest.raises(ValueError, match="has 'w' where the state has 'b'.*same container"):
        tx.update(Params(w=ones, b=-100 * ones), state, Params(w=ones, b=ones))
    updates, _ = tx.update(Params(w=ones, b=ones), tx.init(Params(w=ones, b=ones)), Params(w=ones, b=ones))
    assert isinstance(updates, Params)


def test_a_rebuilt_transformation_does_not_compile_again(monkeypatch):
    """`optax.inject_hyperparams` builds one in every update; a vmap outside jit then runs what was traced."""
    runs = []
    monkeypatch.setattr(jnp, "sqrt", lambda x, sqrt=jnp.sqrt: runs.append(x) or sqrt(x))
    tx = optax.inject_hyperparams(ao.scale_by_adam)(b1=0.9)
    params = {"a": jnp.ones((2, 5, 3)), "b": jnp.ones((2, 5, 3))}
    state = jax.vmap(tx.init)(params)
    counts = []
    for _ in range(3):
        _, state = jax.vmap(tx.update)(params, state)
        counts.append(len(runs))
    assert counts[0] >= 1 and counts == counts[:1] * 3


def test_a_granularity_made_of_another_goes_its_own_way():
    """What a parent does leaf by leaf need not hold for a child."""

    class Shared(ao.Tensor):
        def pool(self, squares):
            return ao.Global().pool(squares)

        def spread(self, pooled, like):
            return ao.Global().spread(pooled, like)

    gradients = {"a": jnp.ones(3), "b": jnp.full(2, 3.0)}
    for make in (ao.scale_by_adam, ao.scale_by_rms):
        shared, like = make(granularity=Shared()), make(granularity="global")
        updates, _ = shared.update(gradients, shared.init(gradients))
        expected, _ = like.update(gradients, like.init(gradients))
        jax.tree.map(np.testing.assert_array_equal, updates, expected)

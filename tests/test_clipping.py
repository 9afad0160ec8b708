"""The global norm over float32's range, against a sum rounded once, and clipping by it."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from reference.decay import global_norm as reference_norm

import adaptive_optax as ao

RNG_SEED = 20240
POWERS = range(-30, 31, 3)
TINY_OR_HUGE = [1e-30, 1e-21, 1e-13, 1.0, 1e17, 1e20, 1e30]

norm = jax.jit(ao.global_norm)
clip = jax.jit(lambda tree, max_norm: ao.clip_by_global_norm(max_norm).update(tree, optax.EmptyState())[0])


def flat(tree):
    """A flat dict from path to NumPy array, as the reference takes it, exact in float64 (complex128)."""
    leaves = jax.tree.leaves_with_path(tree)
    wide = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {k: x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for k, x in wide.items()}


def expected(tree):
    """The norm of the values that the leaves hold."""
    return reference_norm(flat(tree))


def normal(*shape, scale=1.0, dtype=np.float32, seed=0):
    """Gaussian numbers of a given scale; complex ones have Gaussian parts."""
    rng = np.random.default_rng(RNG_SEED + seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(np.dtype(dtype), np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return (x * scale).astype(dtype)


def tree_of(scale):
    """A tree of one scale; all these trees have the same shapes, and so share one compilation."""
    return {
        "kernel": normal(20, 30, scale=scale),
        "layers": [normal(7, scale=scale, seed=1), np.float32(scale)],
        "empty": np.zeros((0, 3), np.float32),
        "frozen": None,
        "masked": optax.MaskedNode(),
    }


@pytest.mark.parametrize("power", POWERS)
def test_norm_at_every_magnitude(power):
    tree = tree_of(10.0**power)
    result = norm(tree)
    assert result.shape == () and result.dtype == jnp.float32 and not result.weak_type
    np.testing.assert_allclose(result, expected(tree), rtol=2e-6)


def few_large(large, small, count=1_000_000):
    x = np.full(count, small, np.float32)
    x[12345] = large
    return x


MANY = {
    "tiny": few_large(1e-21, 1e-21),
    "smallest": few_large(1e-30, 1e-30),
    "tiny, one larger": few_large(1e-19, 1e-20),  # squares about the smallest normal float32
    "tiny, one much larger": few_large(1e-18, 1e-20),
    "tiny, one that is not": few_large(1e-16, 1e-20),
    "tiny, one whose square is far from tiny": few_large(1e-15, 1e-19),  # 1e-30 and a million times 1e-38
    "squares sum to a normal number, each is none": few_large(3e-20, 3e-20),
    "about where the second sum is taken": few_large(3e-13, 3e-16),
    "squares sum to infinity, none is": few_large(1e17, 1e17),
    "huge, one larger": few_large(1e30, 1e26),
    "log-uniform": 10.0 ** np.random.default_rng(RNG_SEED).uniform(-30, 30, 1_000_000),
    "log-uniform, tiny": 10.0 ** np.random.default_rng(RNG_SEED).uniform(-26, -14, 1_000_000),
    "ones": few_large(1.0, 1.0),
}


@pytest.mark.parametrize("name", MANY)
def test_norm_of_a_million_coordinates(name):
    x = MANY[name].astype(np.float32)
    # The exact sum would take a second each; in float64 these squares neither overflow nor underflow.
    wanted = np.linalg.norm(x.astype(np.float64))
    np.testing.assert_allclose(norm(x), wanted, rtol=2e-6)


@given(st.lists(st.floats(-30, 30), min_size=12, max_size=12), st.sampled_from([1.0, -1.0]))
def test_norm_of_mixed_magnitudes(powers, sign):
    x = np.float32(sign * 10.0 ** np.array(powers))
    tree = {"a": x[:4], "b": x[4:].reshape(2, 4)}
    np.testing.assert_allclose(norm(tree), expected(tree), rtol=2e-6)


TYPES = {
    "bfloat16": lambda s: [normal(50, scale=s, dtype=jnp.bfloat16)],
    "float16": lambda s: [normal(50, scale=min(max(s, 1e-4), 1e3), dtype=np.float16)],
    "complex64": lambda s: [normal(50, scale=s, dtype=np.complex64)],
    "mixed": lambda s: {
        "bfloat16": normal(50, scale=s, dtype=jnp.bfloat16),
        "float16": np.full(3, min(max(s, 1e-4), 6e4), np.float16),
        "complex64": normal(4, 5, scale=s, dtype=np.complex64),
        "float32": np.float32(s),
    },
}


@pytest.mark.parametrize("name", TYPES)
def test_norm_of_every_type(name):
    for scale in TINY_OR_HUGE:
        tree = TYPES[name](scale)
        result = norm(tree)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected(tree), rtol=2e-6)


WIDE = {
    "float64": lambda s: [normal(50, scale=s, dtype=np.float64)],
    "complex128": lambda s: {"a": normal(50, scale=s, dtype=np.complex128), "b": np.zeros((0,), np.float64)},
}


@pytest.mark.parametrize("name", WIDE)
def test_norm_in_float64(name, x64):
    double = jax.jit(ao.global_norm)
    for scale in (1e-300, 1e-200, 1e-160, 1e-30, 1.0, 1e30, 1e153, 1e200, 1e300):
        tree = WIDE[name](scale)
        result = double(tree)
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, expected(tree), rtol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("other", [0.0, 1.0, 1e-200, 1e200])
def test_norm_of_float32_and_float64_leaves(scale, other, x64):
    tree = {"single": np.full(3, scale, np.float32), "double": np.full(2, other, np.float64)}
    result = norm(tree)
    assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, expected(tree), rtol=2e-6)


def test_norm_of_nothing():
    for tree in ({}, None, [np.zeros((0, 4), np.float32)], {"a": None, "b": optax.MaskedNode()}):
        result = ao.global_norm(tree)
        assert result == 0 and result.dtype == jnp.float32 and result.shape == ()
    for tree in (tree_of(0.0), [np.zeros(3, jnp.bfloat16)], [np.complex64(0)]):
        assert ao.global_norm(tree) == 0


@pytest.mark.parametrize("place", ["kernel", "scalar"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_norm_of_values_that_are_not_finite(scale, place):
    for value in (np.inf, -np.inf, np.nan):
        tree = tree_of(scale)
        if place == "kernel":
            tree["kernel"][3, 4] = value
        else:
            tree["layers"][1] = np.float32(value)
        np.testing.assert_array_equal(norm(tree), np.abs(value))
        tree["layers"][0][0] = np.nan
        assert np.isnan(norm(tree))


def test_norm_of_a_batch_chooses_for_each_member():
    batch = np.stack([normal(40, scale=s, seed=i) for i, s in enumerate(TINY_OR_HUGE)])
    batch[2, 1], batch[5, 3], batch[0] = np.nan, np.inf, 0.0
    alone = np.array([norm(member) for member in batch])
    together = jax.jit(jax.vmap(ao.global_norm))(batch)
    np.testing.assert_allclose(together, alone, rtol=2e-7)
    assert np.isnan(together[2]) and np.isinf(together[5]) and together[0] == 0
    np.testing.assert_allclose(alone[1], ao.global_norm(batch[1]), rtol=2e-7)  # without jit


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1.0, 1e25])
def test_norm_may_be_differentiated(scale):
    x = normal(40, scale=scale)
    np.testing.assert_allclose(jax.grad(norm)(x), x.astype(np.float64) / expected([x]), rtol=2e-6)


@given(st.integers(-60, 60), st.integers(0, 2**31))
def test_norm_scales_with_powers_of_two(exponent, seed):
    # The sum may be taken of scaled values for one and not for the other, in another order of additions.
    x = normal(64, scale=1e-3, seed=seed)
    scaled = np.ldexp(x, exponent)
    np.testing.assert_allclose(float(norm(scaled)), float(norm(x)) * 2.0**exponent, rtol=2.5e-7)


# --- Clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-6, 1.0, 1e20])
@pytest.mark.parametrize("power", POWERS)
def test_clipped_norm(power, max_norm):
    tree = tree_of(10.0**power)
    before, clipped = expected(tree), clip(tree, max_norm)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    if before <= max_norm:
        assert all(map(np.array_equal, jax.tree.leaves(clipped), jax.tree.leaves(tree)))
        return
    np.testing.assert_allclose(expected(clipped), np.float32(max_norm), rtol=1e-6)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(clipped), strict=True):  # one factor for all
        assert new.dtype == jnp.float32
        np.testing.assert_allclose(new, old.astype(np.float64) * (max_norm / before), rtol=2e-6)


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 13.0, 100.0])
def test_clipping_equals_optax_where_optax_is_right(max_norm):
    theirs = optax.clip_by_global_norm(max_norm)
    for scale in (1e-3, 1.0, 1e3):
        tree = tree_of(scale)
        wanted, _ = theirs.update(tree, theirs.init(tree))
        for ours, other in zip(jax.tree.leaves(clip(tree, max_norm)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, other, rtol=1e-6)


def test_norms_at_the_limit_are_not_touched():
    x = np.array([3.0, 4.0], np.float32)
    np.testing.assert_array_equal(clip([x], 5.0)[0], x)
    np.testing.assert_array_equal(clip([x], np.inf)[0], x)
    np.testing.assert_allclose(clip([x], np.nextafter(np.float32(5), 0))[0], x, rtol=2e-7)
    np.testing.assert_allclose(clip([x], 2.5)[0], x / 2, rtol=2e-7)


def test_zero_stays_zero():
    for max_norm in (1e-30, 1.0, np.inf):
        clipped = clip(tree_of(0.0), max_norm)
        assert all(np.array_equal(x, np.zeros_like(x)) for x in jax.tree.leaves(clipped))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_left_as_they_are(value):
    tree = [np.array([value, 1, 1], np.float32), np.array([1e20], np.float32)]
    for max_norm in (0.5, np.inf):
        for old, new in zip(tree, clip(tree, max_norm), strict=True):
            np.testing.assert_array_equal(new, old)


def test_types_of_clipped_updates():
    half = np.full(16, 300, np.float16)  # its squares are infinite in float16; the norm is 1200
    single = np.full(4, 300, np.float32)
    turned = np.full(4, 300j, np.complex64)
    brief = np.full(4, 300, jnp.bfloat16)
    (clipped,) = clip([half], 1.0)
    assert clipped.dtype == jnp.float32
    np.testing.assert_allclose(clipped, np.full(16, 0.25), rtol=1e-6)
    mixed = clip([half, single, turned, brief], 2.0)  # 28 coordinates of length 300
    assert [x.dtype for x in mixed] == [jnp.float32, jnp.float32, jnp.complex64, jnp.float32]
    for x in mixed:
        np.testing.assert_allclose(np.abs(x), np.full(x.shape, 2 / np.sqrt(28)), rtol=1e-6)
    assert clip([half], 1e9)[0].dtype == jnp.float32  # below the limit too


def test_clipping_in_float64(x64):
    (clipped,) = jax.jit(lambda x: ao.clip_by_global_norm(2.0).update([x], ()))(np.array([3e200, 4e200]))[0]
    assert clipped.dtype == jnp.float64
    np.testing.assert_allclose(clipped, [1.2, 1.6], rtol=1e-10)


def test_clipping_in_a_chain_keeps_no_state_and_ignores_the_rest():
    tx = optax.chain(ao.clip_by_global_norm(1.0), optax.scale(2.0))
    x = {"a": np.array([3e20, 4e20], np.float32)}
    state = tx.init(x)
    assert jax.tree.leaves(state) == []
    updates, state = tx.update(x, state, x, value=1.0)
    np.testing.assert_allclose(updates["a"], [1.2, 1.6], rtol=1e-6)
    assert jax.tree.leaves(state) == []


def test_a_batch_of_limits():
    batch = np.stack([normal(40, scale=s) for s in (1e-20, 1.0, 1e20, 0.0)])
    limits = np.array([1e-21, 1e9, 2.0, 1.0], np.float32)
    clipped = jax.jit(jax.vmap(clip))(batch, limits)
    for i in (0, 2):
        np.testing.assert_allclose(expected([np.asarray(clipped[i])]), limits[i], rtol=1e-6)
    np.testing.assert_array_equal(clipped[1], batch[1])
    np.testing.assert_array_equal(clipped[3], batch[3])


@given(st.floats(1e-3, 1e20), st.integers(0, 2**31))
def test_what_is_clipped_does_not_depend_on_its_length(factor, seed):
    x = normal(40, scale=1e5, seed=seed)
    longer = np.float32(np.float64(x) * factor)
    np.testing.assert_allclose(clip([longer], 1.0)[0], clip([x], 1.0)[0], rtol=2e-6)

"""Moments in 8 bits: the maps, the blocks, and what rounding does to a value."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.quantisation import (
    block_largest,
    int8_neighbours,
    root_entries,
    signed_entries,
)
from stored import SIGMAS, SMALL_INT8, each_role

import adaptive_optax as ao
from adaptive_optax.moments import int8
from adaptive_optax.moments.blocks import block_extents, extents_of, grid, split_into_blocks, spread_blocks

# --- The maps of 8 bits -------------------------------------------------------------------------------------


def moment_of(codes, scale, block_size=256):
    return ao.Int8Moment(codes, scale, jnp.int32(int8.FORMAT), jnp.int32(block_size))


@pytest.mark.parametrize("scale", [1.0, 3e-12, 7e18])
def test_the_maps_are_the_reference_s(scale):
    signed = moment_of(jnp.arange(-127, 128, dtype=jnp.int8), jnp.full(1, scale))
    entries = signed_entries()
    # In float32 an entry is rounded as the largest of its decade is, which is up to ten times it.
    np.testing.assert_allclose(
        ao.dense(signed), scale * np.concatenate([-entries[:0:-1], entries]), rtol=1e-6
    )
    root = moment_of(jnp.arange(0, 256, dtype=jnp.uint8), jnp.full(1, scale))
    # An exponent near -40 is rounded by 2e-6.
    np.testing.assert_allclose(ao.dense(root)[1:], scale**2 * root_entries(), rtol=3e-6)
    assert len(set(np.asarray(ao.dense(root)))) == 256


def test_the_maps_are_the_reference_s_to_float64(x64):
    signed = moment_of(jnp.arange(0, 128, dtype=jnp.int8), jnp.ones(1))
    np.testing.assert_allclose(ao.dense(signed), signed_entries(), rtol=1e-13)
    root = moment_of(jnp.arange(1, 256, dtype=jnp.uint8), jnp.ones(1))
    np.testing.assert_allclose(ao.dense(root), root_entries(), rtol=1e-13)


def wide_values(role, shape, seed=0, decades=5.5):
    """Values over that many decades, a zero and a largest one in each block of any size."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1, 1], shape) * 10 ** rng.uniform(-decades, 0, shape)
    x[..., 3::7] *= 1e-30 if role == "mu" else 1
    return np.float32(x if role == "mu" else x**2)


def encoded(storage, values, role, count=1):
    values = jnp.asarray(values)
    return storage.encode(storage.init(values, role), values, count=jnp.asarray(count, jnp.int32), role=role)


@each_role
def test_the_codes_of_decoded_codes_are_the_codes(role):
    # A decoded value is its entry up to 1e-7, which moves it by up to a 16-bit cell between two codes: one in
    # 2^16 random numbers can take it to the neighbour there, and it is not biased by that.
    x, storage = wide_values(role, (64, 1024)), ao.Int8()

    @jax.jit
    def differing(count):
        first = encoded(storage, x, role, count)
        again = storage.encode(first, storage.decode(first), count=count + 1000, role=role)
        same_scale = jnp.all(first.scale == again.scale)
        return jnp.sum(first.codes != again.codes), same_scale

    counts, same_scale = zip(*map(differing, np.arange(1, 65)), strict=True)
    assert all(same_scale)
    assert np.sum(counts) <= 1e-6 * 64 * x.size


# Multiples of the block, a rest, a last axis below a block, three axes, a single row.
BLOCKS = [
    ((8, 512), 256),
    ((3, 600), 256),
    ((5, 100), 256),
    ((2, 3, 130), 64),
    ((70,), 16),
    ((4, 64), 2**31 - 1),
]


@each_role
@pytest.mark.parametrize(("shape", "size"), BLOCKS)
def test_a_value_becomes_a_neighbour_on_the_map_of_its_block(role, shape, size):
    width = min(size, shape[-1])
    x = wide_values(role, shape) * np.float32(10 ** np.random.default_rng(1).uniform(-8, 8, (*shape[:-1], 1)))
    storage = ao.Int8(block_size=size, min_size=1)
    moment = jax.jit(lambda x: encoded(storage, x, role))(x)
    blocks = -(-shape[-1] // size)
    assert moment.scale.shape == (*shape[:-1], blocks) and moment.codes.shape == shape
    largest = block_largest(x, width)
    scale = moment.scale if role == "mu" else moment.scale**2
    np.testing.assert_allclose(scale, largest[..., ::width], rtol=3e-7)
    decoded, around = np.asarray(storage.decode(moment), np.float64), int8_neighbours(x, role, width)
    nearer = np.minimum(np.abs(decoded - around.below), np.abs(decoded - around.above))
    slack = 2e-6 * np.abs(x) + 1e-12 * largest
    assert (nearer <= slack).all()
    assert (np.abs(decoded - x) <= around.gap() + slack).all()
    np.testing.assert_array_equal(ao.dense(moment), decoded)
    if role == "nu":
        assert (decoded > 0).all()


@each_role
def test_the_mean_over_all_random_bits_is_the_value_in_8_bits(role, monkeypatch):
    # As for 16 bits, every draw once: the count stands in for the bits.
    monkeypatch.setattr(
        int8, "random_bits", lambda shape, count, *_, **__: jnp.full(shape, count.astype(jnp.uint32))
    )
    x, storage = wide_values(role, (2, 128)), ao.Int8(block_size=128, min_size=1)

    @jax.jit
    def total():
        def step(total, count):
            return total + (storage.decode(encoded(storage, x, role, count)) - x), None

        # In parts, whose float32 sums are exact enough.
        def part(total, counts):
            return total, jax.lax.scan(step, jnp.zeros(x.shape), counts)[0]

        return jax.lax.scan(part, 0, jnp.arange(2**16).reshape(256, 256))[1]

    error = np.asarray(total(), np.float64).sum(0) / 2**16
    # Two cells of 2^-16 of a gap, and float32's rounding of x itself.
    gap = int8_neighbours(x, role, 128).gap()
    assert (np.abs(error) <= 2 * gap * 2.0**-16 + 1e-6 * np.abs(x)).all()


@each_role
def test_the_mean_over_steps_is_the_value(role):
    x, storage, steps = wide_values(role, (4, 512)), ao.Int8(min_size=1), 2000
    around = int8_neighbours(x, role, 256)

    @jax.jit
    def mean_error():
        def step(total, count):
            return total + (storage.decode(encoded(storage, x, role, count)) - x), None

        return jax.lax.scan(step, jnp.zeros(x.shape), jnp.arange(1, steps + 1))[0] / steps

    error = np.asarray(mean_error(), np.float64)
    deviation = np.sqrt(np.maximum(around.variance(np.float64(x)), 0) / steps)
    # A jump with probability p < 1/steps is seen or not, so a gap over the steps is allowed beside.
    allowed = (SIGMAS + 1) * deviation + 10 * around.gap() / steps + 1e-6 * np.abs(x)
    assert (np.abs(error) <= allowed).all()
    gap = around.gap()[around.gap() > 0]  # 0 at the largest of a block
    error, deviation = error[around.gap() > 0] / gap, deviation[around.gap() > 0] / gap
    z = np.sum(error) / np.sqrt(np.sum(deviation**2))
    assert abs(z) < SIGMAS


def test_small_second_moments_are_held_at_a_millionth_of_the_largest_root():
    smallest = 4.0 * root_entries()[0]
    assert 0.9e-6 < np.sqrt(root_entries()[0]) < 1e-6
    x = np.full((1, 64), 1e-30, np.float32)
    x[0, :3] = 4.0, 0.0, smallest
    decoded = np.asarray(ao.dense(encoded(SMALL_INT8, x, "nu")))
    assert decoded[0, 0] == 4.0
    np.testing.assert_allclose(decoded[0, 1:], smallest, rtol=3e-6)


@each_role
@pytest.mark.parametrize("value", [0.0, 1e-39])  # one below the smallest normal number cannot be divided by
def test_a_block_of_zeros_is_zeros(role, value):
    x = np.ones((2, 128), np.float32)
    x[0, :64] = value
    decoded = np.asarray(ao.dense(encoded(SMALL_INT8, x, role)))
    assert (decoded[0, :64] == 0).all()
    np.testing.assert_array_equal(np.delete(decoded.ravel(), np.arange(64)), 1.0)
    np.testing.assert_array_equal(ao.dense(SMALL_INT8.init(x, role)), np.zeros_like(x))


@each_role
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_with_a_nan_or_inf_is_not_finite(role, bad):
    x = wide_values(role, (2, 128))
    x[0, 5] = bad
    moment = encoded(SMALL_INT8, x, role)
    for decoded in (SMALL_INT8.decode(moment), SMALL_INT8.decode(moment, lower=lambda: jnp.ones(x.shape))):
        assert not np.isfinite(decoded[0, :64]).any()
        assert np.isfinite(decoded[0, 64:]).all() and np.isfinite(decoded[1]).all()


@each_role
def test_float64_moments_have_float64_scales(role, x64):
    x = np.float64(wide_values(role, (4, 512))) * 1e-200 ** (1 if role == "mu" else 0.5)
    moment = encoded(ao.Int8(min_size=1), x, role)
    assert moment.scale.dtype == jnp.float64 and moment.codes.dtype.itemsize == 1
    decoded = np.asarray(ao.dense(moment))
    assert decoded.dtype == np.float64
    around = int8_neighbours(x, role, 256)
    nearer = np.minimum(np.abs(decoded - around.below), np.abs(decoded - around.above))
    assert (nearer <= 1e-9 * np.abs(x) + 1e-200 * 1e-12).all()


MIXED = {
    "complex": jnp.ones((64, 64), jnp.complex64),
    "long": jnp.ones(4096),
    "heads": jnp.ones((16, 8, 32)),
    "scalar": jnp.ones(()),
    "short": jnp.ones(4095),
    "square": jnp.ones((64, 64), jnp.bfloat16),
}


def test_leaves_that_are_not_compressed_stay_float32_and_say_so():
    moments = {role: ao.Int8().init(MIXED, role) for role in ("mu", "nu")}
    for role, moment in moments.items():
        code = jnp.int8 if role == "mu" else jnp.uint8
        cplx = jnp.complex64 if role == "mu" else jnp.float32
        expected = {name: jnp.dtype(jnp.float32) for name in MIXED}
        expected |= {name: jnp.dtype(code) for name in ("heads", "long", "square")}
        expected["complex"] = jnp.dtype(cplx)
        if role == "nu":  # of a complex leaf it is real, and compressed
            expected["complex"] = jnp.dtype(code)
        assert {name: x.dtype for name, x in moment.codes.items()} == expected
        kept = [f"'{n}' {x.dtype}{list(x.shape)}" for n, x in moment.codes.items() if x.dtype.itemsize > 1]
        compressed = len(MIXED) - len(kept)
        assert repr(moment) == (
            f"Int8Moment({4096 * compressed:,} values of {compressed} leaves as {jnp.dtype(code)}; "
            f"not compressed: {', '.join(kept)})"
        )
        as_is = sum(x.nbytes for x in moment.codes.values() if x.dtype.itemsize > 1)
        # A code a value, a scale a block, a scalar scale for each of the others, the format and the size.
        rows = {"complex": 64, "heads": 4 * 8, "long": 16, "square": 64}
        blocks = sum(rows[n] for n, x in moment.codes.items() if x.dtype.itemsize == 1)
        assert ao.state_bytes(moment) == as_is + 4096 * compressed + 4 * (blocks + len(kept) + 2)
    assert "no leaf compressed" in repr(ao.Int8().init(jnp.ones(3), "nu"))
    # They are kept bit for bit, beside leaves that are not.
    values = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) / 3, MIXED)
    back = ao.dense(encoded_tree(ao.Int8(), values, "mu"))
    for name in ("complex", "scalar", "short"):
        np.testing.assert_array_equal(back[name], values[name])


def encoded_tree(storage, values, role):
    return storage.encode(storage.init(values, role), values, count=jnp.int32(1), role=role)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 15}, r"block_size must be an integer in \[16, 2147483647\], got 15"),
        ({"block_size": 256.0}, "block_size must be an integer"),
        ({"min_size": 0}, r"min_size must be an integer in \[1, inf\), got 0"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ao.Int8(**arguments)


# --- Blocks of leaves with a short last axis ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "extents"),
    [
        ((512, 512), (1, 256)),
        ((512, 4, 128), (1, 1, 128)),
        ((512, 16, 32), (4, 1, 32)),
        ((512, 32, 16), (8, 1, 16)),
        ((12, 512, 16, 32), (1, 4, 1, 32)),
        ((64, 64, 3, 3), (1, 64, 1, 3)),
        ((7, 5, 7, 3), (4, 4, 4, 3)),
        ((4096, 1), (128, 1)),
    ],
)
def test_blocks_extend_along_the_longest_axis_where_the_last_is_short(shape, extents):
    found = block_extents(shape, 256)
    assert found == extents and extents_of(shape, grid(shape, found), 256) == extents


@hypothesis.given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4), st.sampled_from([16, 20, 64, 256]), st.booleans()
)
def test_every_value_has_the_scale_of_its_block(shape, block_size, is_traced):
    shape = tuple(shape)
    extents = block_extents(shape, block_size)
    assert math.prod(extents) <= block_size
    counts = grid(shape, extents)
    numbers = np.arange(math.prod(counts), dtype=np.float32).reshape(counts)

    @jax.jit
    def laid_and_largest(traced_size):
        size = traced_size if is_traced else block_size
        laid = spread_blocks(jnp.asarray(numbers), jnp.zeros(shape), size)
        blocks, within = split_into_blocks(laid + 1, extents)
        return laid, jnp.max(blocks, axis=within)

    laid, largest = laid_and_largest(block_size)
    places = np.meshgrid(*(np.arange(n) // e for n, e in zip(shape, extents, strict=True)), indexing="ij")
    np.testing.assert_array_equal(laid, np.ravel_multi_index(places, counts))
    np.testing.assert_array_equal(largest, numbers + 1)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_a_transformer_takes_two_bytes_per_parameter_for_any_length_of_head(head_dim):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    width, heads = 512, 512 // head_dim
    projection = {"kernel": leaf(width, heads, head_dim), "bias": leaf(heads, head_dim)}
    params = {
        "query": projection,
        "key": projection,
        "value": projection,
        "out": {"kernel": leaf(heads, head_dim, width), "bias": leaf(width)},
        "up": {"kernel": leaf(width, 4 * width), "bias": leaf(4 * width)},
        "down": {"kernel": leaf(4 * width, width), "bias": leaf(width)},
    }
    state = jax.eval_shape(ao.adamw(1e-3, mu_storage="int8", nu_storage="int8").init, params)
    assert ao.state_bytes(state) < 2.1 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_a_moment_of_the_first_format_is_read_and_refused_where_its_blocks_are_others():
    # Its blocks ran along the last axis, and leaves with a short one were not compressed.
    values = {"heads": jnp.ones((16, 8, 32)), "square": jnp.arange(4096.0).reshape(64, 64)}
    storage = ao.Int8()
    new = storage.encode(storage.init(values, "mu"), values, count=jnp.int32(1), role="mu")
    old = new._replace(
        codes=new.codes | {"heads": values["heads"]},
        scale=new.scale | {"heads": jnp.ones(())},
        format=jnp.int32(1),
    )
    np.testing.assert_array_equal(ao.dense(old)["square"], ao.dense(new)["square"])
    with pytest.raises(ValueError, match="'heads' of the state was not stored by .*convert_storage"):
        storage.decode(old)

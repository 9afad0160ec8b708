"""Moments in 8 bits: the maps, the blocks, and what rounding does to a value."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference.eight_bit import EIGHT_BIT
from reference.quantisation import (
    CURVATURES,
    curvature_of,
    int8_neighbours,
    mean_value,
    over_blocks,
    power,
    root_entries,
    signed_entries,
    signed_scale,
    signed_value,
    spacing_of,
)
from stored import SIGMAS, SMALL_INT8, each_role

import adaptive_optax as ao
from adaptive_optax.moments.blocks import block_extents, extents_of, grid, split_into_blocks, spread_blocks
from adaptive_optax.moments.codes import decode_signed, decode_squares, encode_signed, encode_squares

# --- The maps of 8 bits -------------------------------------------------------------------------------------


def wide_values(role, shape, seed=0, decades=5.5):
    """Values over that many decades, with zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1, 1], shape) * 10 ** rng.uniform(-decades, 0, shape)
    x[..., 3::7] = 0
    return np.float32(x if role == "mu" else x**2)


def encoded(storage, values, role, count=1):
    values = jnp.asarray(values)
    return storage.encode(storage.init(values, role), values, count=jnp.asarray(count, jnp.int32), role=role)


def blocks_of(x, size):
    return (*x.shape[:-1], -(-x.shape[-1] // size))


# Multiples of the block, a rest, a last axis below a block, three axes, a single row; sizes of blocks.
BLOCKS = [
    ((8, 512), 32),
    ((3, 600), 256),
    ((5, 24), 32),
    ((2, 3, 130), 64),
    ((70,), 16),
    ((4, 64), 2**31 - 1),
    ((2, 4100), 4096),
]
each_shape = pytest.mark.parametrize(("shape", "size"), BLOCKS)
each_spread = pytest.mark.parametrize("decades", [0.1, 1, 5.5])


def magnitudes(shape, size):
    """Magnitudes that differ by up to 16 decades from block to block."""
    rng = np.random.default_rng(1)
    per_block = 10 ** rng.uniform(-8, 8, (*shape[:-1], -(-shape[-1] // size)))
    return np.repeat(per_block, min(size, shape[-1]), axis=-1)[..., : shape[-1]]


def values_and_uniform(role, shape, size, decades):
    x = np.float32(wide_values(role, shape, decades=decades) * magnitudes(shape, size))
    return x, np.float32(np.random.default_rng(2).uniform(size=shape))


@each_shape
@each_spread
def test_signed_codes_are_the_reference_s(shape, size, decades):
    x, uniform = values_and_uniform("mu", shape, size, decades)
    codes, headers = encode_signed(jnp.asarray(x), blocks_of(x, size), size, uniform)
    scale, wanted = (over_blocks(f, x, size) for f in (signed_scale, curvature_of))
    indices = np.searchsorted(CURVATURES, wanted)
    found = np.asarray(spread_blocks(headers, jnp.asarray(x), size)) & 15
    assert (np.abs(found - indices) <= 1).all() and (found == indices).mean() > 0.7
    curvature, inside = CURVATURES[found], x != 0
    # What is sent has the value for its mean (4), to a five-hundredth of a code.
    off = np.float64(codes) - uniform + 0.5
    least, most = mean_value(off - 0.502, scale, curvature), mean_value(off + 0.502, scale, curvature)
    assert ((least <= x + 1e-6 * np.abs(x)) & (x <= most + 1e-6 * np.abs(x)))[inside].all()
    assert (np.asarray(codes)[~inside] == -128).all()
    decoded = decode_signed(codes, headers, size, jnp.asarray(uniform))
    expected = np.where(inside, signed_value(off, scale, curvature), 0)
    assert (np.abs(decoded - expected) <= 1e-5 * np.abs(expected) + 1e-6 * scale).all()


@each_shape
@each_spread
def test_second_moments_become_a_neighbour_on_the_lattice_of_their_block(shape, size, decades):
    x, uniform = values_and_uniform("nu", shape, size, decades)
    codes, headers = encode_squares(jnp.asarray(x), blocks_of(x, size), size, uniform)
    decoded, around = np.asarray(decode_squares(codes, headers, size), np.float64), int8_neighbours(x, size)
    nearer = np.minimum(np.abs(decoded - around.below), np.abs(decoded - around.above))
    assert (nearer <= 1e-5 * around.gap() + 1e-6 * x).all()
    gap = np.where(x > 0, around.gap(), 1)
    gap = np.where(gap > 0, gap, 1)
    rises = np.float64(uniform) < (x - around.below) / gap
    clear = (np.abs(uniform - (x - around.below) / gap) > 1e-3) & (gap > 1e-4 * x) & (x > 0)
    went_up = decoded > around.below + 0.5 * around.gap()
    np.testing.assert_array_equal(went_up[clear], rises[clear])
    assert clear.mean() > 0.5
    assert ((decoded == 0) == (x == 0)).all()


def gaps(x, role):
    """The distance of codes in blocks of 32 near each value, at most."""
    if role == "nu":
        return over_blocks(spacing_of, x, 32) * x
    scale, curvature = (over_blocks(f, x, 32) for f in (signed_scale, curvature_of))
    g = power(curvature) - 1
    return 2 * (scale / g + np.abs(x)) * 1.25 * curvature / 127


@each_role
def test_the_mean_over_all_dither_is_the_value(role):
    x = np.float32(wide_values(role, (4, 128), decades=3))
    encode, decode = (encode_signed, decode_signed) if role == "mu" else (encode_squares, decode_squares)

    @jax.jit
    def mean():
        def error(uniform):
            u = jnp.full(x.shape, uniform)
            codes, headers = encode(jnp.asarray(x), (4, 4), 32, u)
            return decode(codes, headers, 32, *((u,) if role == "mu" else ())) - x

        return jnp.mean(jax.lax.map(error, (jnp.arange(2**14) + 0.5) / 2**14, batch_size=256), axis=0)

    gap = gaps(x, role)
    assert (np.abs(mean()) <= 3e-4 * gap + 1e-6 * np.abs(x)).all()


@each_role
def test_the_mean_over_steps_is_the_value(role):
    x, storage, steps = wide_values(role, (4, 512), decades=2), ao.Int8(min_size=1), 2048

    @jax.jit
    def mean_error():
        def step(total, count):
            return total + (storage.decode(encoded(storage, x, role, count)) - x), None

        return jax.lax.scan(step, jnp.zeros(x.shape), jnp.arange(1, steps + 1))[0] / steps

    error = np.asarray(mean_error(), np.float64)
    gap = gaps(x, role)
    # A jump with a small probability is seen or not, so a gap over the steps is allowed beside.
    deviation = gap / 2 / np.sqrt(steps) + 2 * gap / steps
    assert (np.abs(error) <= SIGMAS * deviation + 1e-6 * np.abs(x)).all()
    kept = x != 0
    assert abs(np.mean(error[kept] / gap[kept])) < SIGMAS * 0.5 / np.sqrt(steps * kept.sum())


def test_second_moments_below_59_octaves_are_raised():
    x = np.full((1, 64), 2.0**-100, np.float32)
    x[0, :3] = 4.0, 0.0, 2.0**-40
    decoded = np.asarray(ao.dense(encoded(SMALL_INT8, x, "nu")))
    assert decoded[0, 1] == 0
    np.testing.assert_allclose(decoded[0, [0, 2]], x[0, [0, 2]], rtol=0.25)
    raised = decoded[0, 3:]
    assert (raised == raised[0]).all() and 2.0**-60 < raised[0] / 4 < 2.0**-58


@each_role
@pytest.mark.parametrize("value", [0.0, 1e-39])  # one below the smallest normal number counts as 0
def test_what_is_zero_stays_zero(role, value):
    x = np.ones((2, 128), np.float32)
    x[0, :64] = x[1, ::2] = value
    for count in range(1, 5):
        decoded = np.asarray(ao.dense(encoded(SMALL_INT8, x, role, count)))
        assert (decoded[x < 1] == 0).all()
        np.testing.assert_allclose(decoded[x == 1], 1.0, rtol=0.01)
    np.testing.assert_array_equal(ao.dense(SMALL_INT8.init(x, role)), np.zeros_like(x))


@each_role
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_with_a_nan_or_inf_is_not_finite(role, bad):
    x = wide_values(role, (2, 128))
    x[x == 0] = 1e-3
    x[0, 5] = bad
    moment = encoded(SMALL_INT8, x, role)
    for decoded in (SMALL_INT8.decode(moment), SMALL_INT8.decode(moment, lower=lambda: jnp.ones(x.shape))):
        assert not np.isfinite(decoded[0, :64]).any()
        assert np.isfinite(decoded[0, 64:]).all() and np.isfinite(decoded[1]).all()


@each_role
@pytest.mark.parametrize("value", [np.finfo(np.float32).max, 2e38, "smallest"])
def test_the_largest_and_the_smallest_numbers_are_kept(role, value):
    value = {"mu": 2.0**-90, "nu": 2.0**-125}[role] if value == "smallest" else value
    x = np.full((1, 64), value, np.float32)
    x[0, ::2] *= 0.5 if value > 1 else 2
    decoded = np.asarray(ao.dense(encoded(SMALL_INT8, x, role)))
    np.testing.assert_allclose(decoded, x, rtol=0.13)  # the largest scale is 1.75 2^127


def test_a_wide_block_is_kept_at_any_magnitude():
    x = np.float32(wide_values("mu", (1, 64), decades=7))
    x[0, 0] = 1
    expected = np.asarray(ao.dense(encoded(SMALL_INT8, x, "mu")))
    for exponent in (-66, 126):
        moved = np.asarray(ao.dense(encoded(SMALL_INT8, np.ldexp(x, exponent), "mu")))
        np.testing.assert_allclose(np.ldexp(moved, -exponent), expected, rtol=1e-5)


@each_role
def test_float64_moments_have_wider_headers(role, x64):
    x = np.float64(wide_values(role, (4, 512), decades=1)) * 1e-200 ** (1 if role == "mu" else 0.5)
    moment = encoded(ao.Int8(min_size=1), x, role)
    assert moment.scale.dtype == jnp.uint32 and moment.codes.dtype.itemsize == 1
    decoded = np.asarray(ao.dense(moment))
    assert decoded.dtype == np.float64
    kept = x != 0
    np.testing.assert_allclose(decoded[kept], x[kept], rtol=0.15)
    assert (decoded[~kept] == 0).all()
    if role == "nu":
        around = int8_neighbours(x, 32)
        nearer = np.minimum(np.abs(decoded - around.below), np.abs(decoded - around.above))
        assert (nearer <= 1e-9 * np.abs(x)).all()


# --- Beside published formats -------------------------------------------------------------------------------


def directions(shape, spread, steps, keep):
    """Adam's direction after some steps of normal gradients in float64; `keep` rounds the two moments."""
    scales = np.logspace(-spread, 0, shape[1])[np.random.default_rng(9).permutation(shape[1])]
    rng, (m, v) = np.random.default_rng(0), np.zeros((2, *shape))
    for t in range(1, steps + 1):
        g = rng.standard_normal(shape) * scales
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        m, v = keep(m, v, t)
    return u


def kept_by_this_library(shape):
    storage = ao.Int8(min_size=1)
    empty = storage.init(jnp.zeros(shape), "mu"), storage.init(jnp.zeros(shape), "nu")

    @jax.jit
    def through(m, v, t):
        mu, nu = (
            storage.encode(old, x, count=t, role=role)
            for old, x, role in zip(empty, (m, v), ("mu", "nu"), strict=True)
        )
        m = storage.decode(mu)
        return m, storage.decode(nu, lower=lambda: jnp.square(m) / ao.adam_bound(0.9, 0.999) ** 2)

    return lambda m, v, t: map(np.float64, through(np.float32(m), np.float32(v), jnp.int32(t)))


@pytest.mark.parametrize("spread", [0, 0.5, 1, 2, 4])
def test_adams_direction_is_nearer_to_float32_than_in_published_formats(spread):
    shape, steps = (16, 512), 200
    exact = directions(shape, spread, steps, lambda m, v, t: (m, v))

    def error(keep):
        u = directions(shape, spread, steps, keep)
        return np.linalg.norm(u - exact) / np.linalg.norm(exact), np.abs(u).max()

    ours, longest = error(kept_by_this_library(shape))
    published = {name: error(lambda m, v, t, keep=keep: keep(m, v))[0] for name, keep in EIGHT_BIT.items()}
    assert ours < min(published.values()), (ours, published)
    assert ours < {0: 0.014, 0.5: 0.02, 1: 0.033, 2: 0.06, 4: 0.12}[spread]
    assert longest < 1.2 * np.abs(exact).max()


# --- Leaves that are not compressed -------------------------------------------------------------------------

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
        # A code for a value, a header for a block, a scalar scale for each of the others, the format and the
        # size, and for first moments the count.
        rows = {"complex": 64 * 2, "heads": 16 * 8, "long": 128, "square": 64 * 2}
        blocks = sum(rows[n] for n, x in moment.codes.items() if x.dtype.itemsize == 1)
        scalars = len(kept) + (3 if role == "mu" else 2)
        assert ao.state_bytes(moment) == as_is + 4096 * compressed + 2 * blocks + 4 * scalars
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
        ((512, 16, 32), (8, 1, 32)),
        ((512, 32, 16), (16, 1, 16)),
        ((12, 512, 16, 32), (1, 8, 1, 32)),
        ((64, 64, 3, 3), (1, 64, 1, 3)),
        ((7, 5, 7, 3), (4, 4, 4, 3)),
        ((4096, 1), (256, 1)),
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
    leaves = [math.prod(x.shape) for x in jax.tree.leaves(params)]
    assert ao.state_bytes(state) < 2.126 * sum(leaves) + 6 * sum(n for n in leaves if n < 4096)


# --- Moments of formats 1 and 2 -----------------------------------------------------------------------------


def moment_before(codes, scale, block_size=256, format=2):
    return ao.Int8Moment(codes, scale, jnp.int32(format), jnp.int32(block_size))


@pytest.mark.parametrize("scale", [1.0, 3e-12, 7e18])
def test_the_maps_of_format_2_are_the_reference_s(scale):
    signed = moment_before(jnp.arange(-127, 128, dtype=jnp.int8), jnp.full(1, scale))
    entries = signed_entries()
    # In float32 an entry is rounded as the largest of its decade is, which is up to ten times it.
    np.testing.assert_allclose(
        ao.dense(signed), scale * np.concatenate([-entries[:0:-1], entries]), rtol=1e-6
    )
    root = moment_before(jnp.arange(0, 256, dtype=jnp.uint8), jnp.full(1, scale))
    # An exponent near -40 is rounded by 2e-6.
    np.testing.assert_allclose(ao.dense(root)[1:], scale**2 * root_entries(), rtol=3e-6)
    assert len(set(np.asarray(ao.dense(root)))) == 256


def test_the_maps_of_format_2_are_the_reference_s_to_float64(x64):
    signed = moment_before(jnp.arange(0, 128, dtype=jnp.int8), jnp.ones(1))
    np.testing.assert_allclose(ao.dense(signed), signed_entries(), rtol=1e-13)
    root = moment_before(jnp.arange(1, 256, dtype=jnp.uint8), jnp.ones(1))
    np.testing.assert_allclose(ao.dense(root), root_entries(), rtol=1e-13)


def before(values, role, format):
    """Values as formats 1 and 2 kept them, to nearest; format 1 left leaves with a short axis alone."""
    entries = np.concatenate([-signed_entries()[:0:-1], signed_entries()]) if role == "mu" else root_entries()
    codes, scales = {}, {}
    for name, x in values.items():
        x = np.asarray(x, np.float64)
        extents = block_extents(x.shape, 256)
        if x.size < 4096 or (format == 1 and x.shape[-1] < 64):
            codes[name], scales[name] = np.float32(x), np.ones((), np.float32)
            continue
        split, within = split_into_blocks(jnp.abs(jnp.asarray(x, jnp.float32)), extents)
        scale = np.max(np.asarray(split), axis=within)
        ratio = x / np.asarray(spread_blocks(jnp.asarray(scale), jnp.zeros(x.shape), 256))
        nearest = np.argmin(np.abs(ratio[..., None] - entries), axis=-1)
        codes[name] = np.int8(nearest - 127) if role == "mu" else np.uint8(nearest + 1)
        scales[name] = scale if role == "mu" else np.sqrt(scale)
    return jax.tree.map(jnp.asarray, moment_before(codes, scales, format=format))


@pytest.mark.parametrize("format", [1, 2])
def test_a_state_of_an_earlier_format_is_read_and_continued(format):
    params = {"square": jnp.zeros((64, 64)), "heads": jnp.zeros((16, 8, 32)), "bias": jnp.zeros(8)}
    exact = ao.adam(1e-3)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.ndim), p.shape), params)
    _, state = exact.update(gradients, exact.init(params))
    old = state[0]._replace(mu=before(state[0].mu, "mu", format), nu=before(state[0].nu, "nu", format))
    opt_state = (old, *state[1:])
    for read in (ao.dense, jax.jit(ao.dense)):
        for name in params:
            largest = float(jnp.max(jnp.abs(state[0].mu[name])))
            np.testing.assert_allclose(read(old.mu)[name], state[0].mu[name], rtol=0.08, atol=0.008 * largest)
            np.testing.assert_allclose(read(old.nu)[name], state[0].nu[name], rtol=0.12, atol=1e-9)
    new = ao.adam(1e-3, mu_storage="int8", nu_storage="int8")
    with pytest.raises(ValueError, match="convert the state with convert_storage"):
        new.update(gradients, opt_state)
    moved = ao.convert_storage(opt_state, mu_storage="int8", nu_storage="int8")
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, new.init(params))
    updates, _ = new.update(gradients, moved)
    expected, _ = exact.update(gradients, state)
    for name in params:
        off = np.linalg.norm(updates[name] - expected[name])
        assert off <= 0.05 * np.linalg.norm(expected[name])


def test_an_earlier_format_is_not_written():
    old = before({"square": jnp.ones((64, 64))}, "mu", 2)
    with pytest.raises(ValueError, match="was not stored by .*convert_storage"):
        ao.Int8(block_size=256).decode(old)
    with pytest.raises(ValueError, match="format 2 .*convert_storage"):
        old.encode_like(ao.dense(old), count=jnp.int32(1), role="mu")

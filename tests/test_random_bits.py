"""The random bits of stochastic rounding: uniform, independent of each other, and a function of the place.

Every test compares statistics with what independent uniform bits have, at a threshold that such bits cross
with a probability of at most 1e-6, over all the comparisons of the test together (Bonferroni).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptive_optax._core.random_bits import antithetic_uniform, as_uniform, random_bits

FALSE_ALARM = 1e-6
SHAPE = (64, 32, 512)
SIZE = 2**20


@functools.cache
def drawn(count=1, leaf=0, role="mu", seed=0, shape=SHAPE):
    bits = jax.jit(random_bits, static_argnums=(0, 2, 3, 4))(shape, jnp.int32(count), leaf, role, seed)
    assert bits.dtype == jnp.uint32 and bits.shape == shape
    return np.asarray(bits)


def centred(bits):
    """Mean 0 and variance 1."""
    return (np.float64(bits) + 0.5 - 2**15) / np.sqrt((2.0**32 - 1) / 12)


def assert_standard_normal(statistics):
    z = np.abs(np.asarray(statistics)).ravel()
    assert z.max() < scipy.stats.norm.isf(FALSE_ALARM / 2 / z.size), z.max()


def correlation(x, y):
    """The mean of products of independent numbers of variance 1, times the root of their number."""
    return np.vdot(x, y) / np.sqrt(x.size)


def bit_agreement(x, y):
    """For each of 16 bits, the excess of places where two streams agree in it."""
    agree = [np.sum((x ^ y) >> k & 1 == 0) for k in range(16)]
    return (np.array(agree) - x.size / 2) / np.sqrt(x.size / 4)


# Streams that must not know of each other: first steps, later ones, those that differ in one bit, leaves,
# both moments, seeds.
STREAMS = {
    "steps": [{"count": c} for c in (0, 1, 2, 3, 4, 8, 256, 65_536, 2**24, 2**31 - 1)],
    "leaves": [{"leaf": n} for n in (0, 1, 2, 3, 16, 255, 256, 1000)],
    "roles": [{"role": r, "count": c} for r in ("mu", "nu") for c in (1, 2)],
    "seeds": [{"seed": s} for s in (0, 1, 2, 3, 256, 2**16, 2**31, 2**32 - 1)],
    "a leaf and a step on": [{"leaf": n, "count": 5 - n} for n in range(4)],
    "a leaf and a seed on": [{"leaf": n, "seed": 5 - n} for n in range(4)],
}
each_kind = pytest.mark.parametrize("kind", STREAMS)


@each_kind
def test_they_are_uniform(kind):
    streams = [drawn(**stream) for stream in STREAMS[kind]]
    assert all(bits.max() < 2**16 for bits in streams)
    values = [centred(bits) for bits in streams]
    means = [correlation(x, np.ones_like(x)) for x in values]
    # The square of a uniform number of variance 1 has variance 4/5.
    variances = [correlation(x**2 - 1, np.ones_like(x)) / np.sqrt(0.8) for x in values]
    single = [bit_agreement(bits, np.zeros_like(bits)) for bits in streams]
    assert_standard_normal(np.concatenate([means, variances, np.ravel(single)]))
    for bits in streams:  # all 2^16 values, 16 times each on average
        counts = np.bincount(bits.ravel(), minlength=2**16)
        chi2 = np.sum((counts - 16) ** 2 / 16)
        tail = FALSE_ALARM / 2 / len(streams)
        lowest, highest = scipy.stats.chi2.ppf([tail, 1 - tail], 2**16 - 1)
        assert lowest < chi2 < highest


@each_kind
def test_different_streams_are_independent(kind):
    pairs = list(itertools.combinations([drawn(**stream) for stream in STREAMS[kind]], 2))
    assert_standard_normal([correlation(centred(x), centred(y)) for x, y in pairs])
    assert_standard_normal([bit_agreement(x, y) for x, y in pairs])


@pytest.mark.parametrize("role", ["mu", "nu"])
@pytest.mark.parametrize("axis", range(len(SHAPE)))
def test_neighbours_along_an_axis_are_independent(axis, role):
    statistics = []
    for count in (0, 1, 1000):
        bits = np.moveaxis(drawn(count=count, role=role), axis, 0)
        for lag in (1, 2, 16):
            x, y = bits[:-lag], bits[lag:]
            statistics += [correlation(centred(x), centred(y)), *bit_agreement(x, y)]
    assert_standard_normal(statistics)


def test_a_coordinate_s_bits_along_the_steps_are_independent():
    steps = jnp.arange(2**14)
    series = jax.jit(jax.vmap(lambda count: random_bits((64,), count, 3, "nu")))(steps)
    bits, statistics = np.asarray(series), []
    for lag in (1, 2, 3, 4, 8, 1024):
        x, y = bits[:-lag], bits[lag:]
        statistics += [correlation(centred(x), centred(y)), *bit_agreement(x, y)]
    assert_standard_normal(statistics)
    # Of each coordinate, what a moving average of the rounding errors sees.
    assert_standard_normal(centred(bits).sum(0) / np.sqrt(len(bits)))


def test_no_stream_is_another_one_moved_along():
    # Pairs of neighbours, both roles: 64 bits each, of 2^22 places. Independent ones have two alike with a
    # probability of 2^43 / 2^64 = 5e-7. Were a stream the same sequence from another start, some of the 2^25
    # pairs of steps would overlap, as starts are drawn from 2^32 and a stretch is 2^9 long.
    counts = jnp.arange(2**13)
    whole = jax.jit(
        jax.vmap(lambda c: random_bits((512,), c, 0, "mu") | random_bits((512,), c, 0, "nu") << 16)
    )(counts)
    whole = np.asarray(whole).astype(np.uint64)
    pairs = (whole[:, :-1] << np.uint64(32) | whole[:, 1:]).ravel()
    ordered = np.sort(pairs)
    assert (ordered[1:] != ordered[:-1]).all()


def test_both_roles_share_no_bit():
    # Together they are one hash of the coordinate, different at each: a permutation of 32 bits.
    whole = drawn(role="mu") | drawn(role="nu") << 16
    assert len(np.unique(whole)) == SIZE


def test_uniform_numbers_lie_inside_their_interval():
    u = np.asarray(as_uniform(jnp.arange(2**16, dtype=jnp.uint32)), np.float64)
    np.testing.assert_array_equal(u, (np.arange(2**16) + 0.5) / 2**16)  # exact in float32, neither 0 nor 1


def test_they_do_not_depend_on_how_the_array_is_reshaped_or_traced():
    flat = drawn(shape=(4096,))
    np.testing.assert_array_equal(drawn(shape=(64, 64)).ravel(), flat)
    np.testing.assert_array_equal(random_bits((64, 64), jnp.asarray(1, jnp.int32), 0, "mu").ravel(), flat)
    assert drawn(shape=()).shape == () and drawn(shape=(0, 3)).shape == (0, 3)
    assert drawn(shape=()) == flat[0]


@pytest.mark.parametrize(
    "spec", [PartitionSpec("x"), PartitionSpec(None, "y"), PartitionSpec("x", "y"), PartitionSpec(("x", "y"))]
)
def test_any_sharding_draws_the_same(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    sharding = NamedSharding(mesh, spec)
    draw = jax.jit(lambda count: random_bits((16, 64), count, 2, "nu"), out_shardings=sharding)
    bits = draw(jnp.int32(7))
    assert len({tuple(map(str, shard.index)) for shard in bits.addressable_shards}) > 1
    np.testing.assert_array_equal(bits, drawn(count=7, leaf=2, role="nu", shape=(16, 64)))


# (arguments, the first four numbers)
KNOWN = [
    ({"count": 1}, [49049, 14317, 31757, 40593]),
    ({"count": 1, "role": "nu"}, [50857, 14209, 16896, 48522]),
    ({"count": 10**6, "leaf": 3, "seed": 42}, [64538, 29169, 39961, 60112]),
]


@pytest.mark.parametrize(("arguments", "first"), KNOWN)
def test_they_are_these(arguments, first):
    # A run that a later version restores has to go on with the same bits.
    np.testing.assert_array_equal(drawn(**arguments, shape=(2, 2)).ravel(), first)


# --- Pairs of opposite numbers ------------------------------------------------------------------------------


@functools.cache
def opposites(count, leaf=0, shape=SHAPE):
    drawn = jax.jit(antithetic_uniform, static_argnums=(0, 2))(shape, jnp.int32(count), leaf)
    assert drawn.dtype == jnp.float32 and drawn.shape == shape
    return np.float64(drawn)


def standardised(uniform):
    return (uniform - 0.5) * np.sqrt(12)


@pytest.mark.parametrize("count", [0, 2, 3, 1001])
def test_antithetic_numbers_are_uniform(count):
    x = opposites(count)
    assert 0 < x.min() and x.max() < 1
    z = standardised(x)
    assert_standard_normal(
        [correlation(z, np.ones_like(z)), correlation(z**2 - 1, np.ones_like(z)) / np.sqrt(0.8)]
    )
    expected = x.size / 2**12
    counts = np.bincount((x * 2**12).astype(int).ravel(), minlength=2**12)
    lowest, highest = scipy.stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 2**12 - 1)
    assert lowest < np.sum((counts - expected) ** 2 / expected) < highest


@pytest.mark.parametrize("first", [0, 2, 1000, 2**31 - 2])
def test_an_odd_step_has_the_numbers_of_the_step_before_moved_by_a_half(first):
    np.testing.assert_array_equal((opposites(first) + 0.5) % 1, opposites(first + 1))


def test_pairs_and_leaves_are_independent():
    streams = [opposites(count) for count in (1, 2, 4, 256, 2**20)]
    streams += [opposites(1, leaf) for leaf in (1, 2, 256)]
    streams += [as_uniform(drawn(count, role=role)) for count in (0, 1) for role in ("mu", "nu")]
    values = [standardised(np.float64(x)) for x in streams]
    assert_standard_normal([correlation(x, y) for x, y in itertools.combinations(values, 2)])
    for axis in range(len(SHAPE)):
        moved = np.moveaxis(values[0], axis, 0)
        assert_standard_normal([correlation(moved[:-lag], moved[lag:]) for lag in (1, 2, 16)])

"""Low-precision parameters: no step is lost, what is handed out lands, and a run goes on where it was."""

import functools
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import mixed_params, random_gradients
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec
from reference.rounding import DTYPES, kahan_step, nearest, neighbours, unit
from saving import same, through_bytes, through_orbax
from test_flax import INPUTS, TARGETS, LinenModel, NnxModel

import adaptive_optax as ao
from adaptive_optax._core.random_bits import random_bits, round_stochastically, round_to_nearest

# name: a function from an optimizer to the one that keeps what rounding takes off its steps
ROUNDED = {
    "stochastic_rounding": lambda inner: optax.chain(inner, ao.stochastic_rounding()),
    "kahan_summation": ao.kahan_summation,
    "master_weights": ao.master_weights,
}
each_rounding = pytest.mark.parametrize("name", ROUNDED)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def adding(name):
    """The transformation that adds the updates as they are given."""
    return ROUNDED[name](optax.identity())


def stepping(tx):
    """One step, which applies the update too."""

    def step(params, state, u):
        updates, state = tx.update(u, state, params)
        return optax.apply_updates(params, updates), state

    return step


def scanned(tx, params, updates):
    """All steps in one jitted scan, `apply_updates` inside; the parameters and states after each."""

    @jax.jit
    def run(params, updates):
        def body(carry, u):
            carry = stepping(tx)(*carry, u)
            return carry, carry

        return jax.lax.scan(body, (params, tx.init(params)), updates)[1]

    return jax.device_get(run(params, updates))


def wide(x):
    return np.asarray(x).astype(np.float32)


# --- A thousand small steps ---------------------------------------------------------------------------------

SMALL, TIMES, WIDTH = 1e-3, 1000, 1024


def assert_two(name, params):
    assert params.dtype == jnp.bfloat16
    params = wide(params)
    if name != "stochastic_rounding":
        np.testing.assert_array_equal(params, 2)
        return
    # A step u goes up by the spacing s with probability u/s: its variance is u (s - u), with s = 2^-7 below 2
    # and 2^-6 above. The sum is unbiased; a float32 sum p + u is off by 2^-24 at most, in all
    # 6e-5, 1/60 of the error.
    deviation = np.sqrt(TIMES * SMALL * (2**-6 - SMALL))
    assert abs(params.mean() - 2) < 4 * deviation / np.sqrt(WIDTH)
    assert np.sqrt(TIMES * SMALL * (2**-7 - SMALL)) * 0.9 < params.std() < deviation


def test_nearest_stays_at_one():
    p = jnp.ones(WIDTH, jnp.bfloat16)
    step = jax.jit(optax.apply_updates)
    for _ in range(TIMES):
        p = step(p, jnp.full(WIDTH, SMALL))
    np.testing.assert_array_equal(wide(p), 1)


@each_rounding
def test_a_thousand_steps_arrive_in_a_scan(name):
    tx, u = adding(name), np.full((TIMES, WIDTH), SMALL, np.float32)
    params, _ = scanned(tx, jnp.ones(WIDTH, jnp.bfloat16), u)
    assert_two(name, params[-1])
    # Eagerly each operation is compiled alone; the first steps are the same bits.
    p = jnp.ones(WIDTH, jnp.bfloat16)
    state = tx.init(p)
    for t in range(5):
        p, state = stepping(tx)(p, state, u[t])
        assert p.tobytes() == params[t].tobytes()


@each_rounding
def test_a_thousand_steps_arrive_when_applied_outside(name):
    tx, p = adding(name), jnp.ones(WIDTH, jnp.bfloat16)
    update, state = jax.jit(tx.update), tx.init(p)
    for _ in range(TIMES):
        updates, state = update(jnp.full(WIDTH, SMALL), state, p)
        p = optax.apply_updates(p, updates)
    assert_two(name, p)


# --- Kahan's pair -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "times", "expected", "rtol"), [(1e-3, 5000, 6.0, 2**-9), (2**-10, 10_000, 10.765625, 0)]
)
def test_parameter_and_compensation_hold_the_sum(step, times, expected, rtol):
    params, states = scanned(
        adding("kahan_summation"), jnp.ones(1, jnp.bfloat16), np.full((times, 1), step, np.float32)
    )
    total = wide(params[-1]) + wide(states.compensation[-1])
    np.testing.assert_allclose(total, expected, rtol=rtol)


@each_dtype
def test_kahan_is_the_reference_step_by_step(dtype):
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-5, 1, 64)
    updates = np.asarray(rng.normal(size=(2000, 64)) * sizes, np.float32)
    updates[:, :2] = 1e-3, 2.0**-10
    p = np.asarray(rng.normal(size=64)).astype(DTYPES[dtype])
    params, states = scanned(adding("kahan_summation"), jnp.asarray(p), updates)
    c = np.zeros_like(p)
    for t, u in enumerate(updates):
        p, c = kahan_step(p, c, u)
        np.testing.assert_array_equal(wide(params[t]), wide(p), err_msg=str(t))
        np.testing.assert_array_equal(wide(states.compensation[t]), wide(c), err_msg=str(t))
    assert params.dtype == states.compensation.dtype == DTYPES[dtype]


# --- Landing ------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """The exponent fields of parameters, and exponents of updates."""

    fields: tuple[int, int]
    exponents: tuple[int, int]


# bfloat16 keeps away from the subnormal numbers of float32, which XLA may flush to zero; float16 has its own
# subnormals in it, and sums that overflow.
RANGES = {"bfloat16": Range((27, 227), (-90, 95)), "float16": Range((0, 30), (-40, 17))}


@st.composite
def sums(draw, dtype):
    """Parameters, updates and what a compensation or a copy has beyond the parameters.

    A quarter each: updates of any size, within a thousand float32 numbers of -p, a few eighths of the
    parameter's unit (ties among them), and small multiples of p.
    """
    fields, exponents = RANGES[dtype]
    bits = jnp.finfo(DTYPES[dtype]).nmant

    def integers(low, high):
        return draw(hnp.arrays(np.int64, 64, elements=st.integers(low, high)))

    pattern = integers(0, 1) << 15 | integers(*fields) << bits | integers(0, 2**bits - 1)
    p = pattern.astype(np.uint16).view(DTYPES[dtype])
    size = np.float32(2.0) ** integers(*exponents)
    any_size = size * (1 + integers(0, 2**23 - 1) / 2**23) * (1 - 2 * integers(0, 1))
    near = (-wide(p)).view(np.int32).astype(np.int64) + integers(-1000, 1000)
    near = np.where(wide(p) == 0, 0, near).astype(np.int32).view(np.float32)
    ties = unit(p) * integers(-20, 20) / 8
    multiples = wide(p) * integers(-8, 8) / 4
    u = np.choose(integers(0, 3), [any_size, near, ties, multiples]).astype(np.float32)
    # Less than a quarter of a unit, so that what has it still rounds to p.
    return p, u, (unit(p) * integers(-60, 60) / 256).astype(np.float32)


@functools.cache
def jitted_step(name):
    tx = adding(name)
    return jax.jit(tx.update), jax.jit(stepping(tx))


def assert_lands(name, p, u, state, target):
    """The update reaches the target in the jit that made it, in another one, and eagerly."""
    # An update is float32, and from -1 to 63 / 2^24, say, none leads: that would take 1 + 63 / 2^24.
    target = nearest(wide(p) + (np.float32(target) - wide(p)), p.dtype)
    p = jnp.asarray(p)
    update, step = jitted_step(name)
    updates, _ = update(u, state, p)
    assert updates.dtype == jnp.float32
    for landed in (step(p, state, u)[0], optax.apply_updates(p, updates)):
        assert landed.dtype == p.dtype
        np.testing.assert_array_equal(wide(landed), target)


@each_dtype
@given(st.data())
def test_kahan_lands_on_the_rounded_sum(dtype, data):
    p, u, beyond = data.draw(sums(dtype))
    c = beyond.astype(p.dtype)
    state = ao.KahanSummationState(optax.EmptyState(), jnp.asarray(c))
    assert_lands("kahan_summation", p, u, state, wide(kahan_step(p, c, u)[0]))


@each_dtype
@given(st.data())
def test_master_weights_land_on_the_rounded_copy(dtype, data):
    p, u, beyond = data.draw(sums(dtype))
    master = wide(p) + beyond
    state = ao.MasterWeightsState(optax.EmptyState(), jnp.asarray(master))
    assert_lands("master_weights", p, u, state, nearest(master + u, p.dtype))


@each_dtype
@given(st.data())
def test_stochastic_rounding_lands_on_a_neighbour_of_the_sum(dtype, data):
    p, u, _ = data.draw(sums(dtype))
    count = jnp.asarray(data.draw(st.integers(0, 2**31 - 1)), jnp.int32)
    target = wide(
        round_stochastically(jnp.asarray(wide(p) + u), p.dtype, random_bits(p.shape, count, 0, "parameter"))
    )
    below, above = neighbours(wide(p) + u, p.dtype)
    assert ((target == below) | (target == above)).all()
    state = optax.EmptyState(), ao.StochasticRoundingState(count)
    assert_lands("stochastic_rounding", p, u, state, target)


# --- Stochastic rounding ------------------------------------------------------------------------------------

ALL_BITS = jnp.arange(2**16, dtype=jnp.uint32)
VALUES = {
    "bfloat16": [1.001, -2.997, 1 / 3, 1e-30, -7e20, 255.3, 1 + 2**-16],
    # below 6e-5 float16 is subnormal, with spacing 6e-8
    "float16": [1.001, -2.997, 1 / 3, 60000.7, 7e-5, 6.103e-5, -5.01e-5, 3.3e-5, -1e-6, 1.5e-7, 2e-8, 1e-10],
}


def held(dtype):
    """All finite numbers of a dtype, but for bfloat16's subnormals, which XLA may flush to zero."""
    values = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(DTYPES[dtype])
    keep = np.isfinite(wide(values))
    if dtype == "bfloat16":
        keep &= (np.abs(wide(values)) >= 2**-126) | (wide(values) == 0)
    return values[keep]


@each_dtype
def test_the_mean_over_all_random_bits_is_the_value(dtype):
    for value in np.asarray(VALUES[dtype], np.float32):
        rounded = wide(jax.jit(round_stochastically, static_argnums=1)(value, DTYPES[dtype], ALL_BITS))
        below, above = neighbours(value, DTYPES[dtype])
        assert set(np.unique(rounded)) <= {below, above}
        # The probability has 16 bits, so the mean is right to 2^-16 of the spacing, and exact where the
        # value's own bits are no finer.
        spacing = np.float64(above) - below
        assert abs(rounded.mean(dtype=np.float64) - value) <= 2**-16 * spacing, value


@each_dtype
@pytest.mark.parametrize("seed", [0, 3])
def test_the_mean_over_coordinates_is_the_value(dtype, seed):
    tx = ao.stochastic_rounding(seed)
    values = np.asarray(VALUES[dtype], np.float32)
    p = jnp.zeros((len(values), 20_000), DTYPES[dtype])
    updates, _ = jax.jit(tx.update)(jnp.broadcast_to(values[:, None], p.shape), tx.init(p), p)
    mean = wide(optax.apply_updates(p, updates)).mean(axis=1, dtype=np.float64)
    below, above = (x.astype(np.float64) for x in neighbours(values, DTYPES[dtype]))
    # One coordinate goes up with probability f = (x - a) / (b - a): its variance is f (1 - f) (b - a)^2. At
    # 4 standard errors a true f fails once in 16 000; one in 40 000 coordinates is granted to a rare event.
    error = np.sqrt((values - below) * (above - values) / p.shape[1])
    np.testing.assert_array_less(np.abs(mean - values), 4 * error + 2 * (above - below) / p.shape[1])


@each_dtype
def test_a_value_that_is_held_stays(dtype):
    values = held(dtype)
    rounded = jax.jit(round_stochastically, static_argnums=1)
    for bits in (0, 1, 2**15, 2**16 - 2, 2**16 - 1):
        result = rounded(jnp.asarray(wide(values)), DTYPES[dtype], jnp.full(values.shape, bits, jnp.uint32))
        np.testing.assert_array_equal(wide(result), wide(values))


@each_rounding
@each_dtype
def test_zero_updates_move_nothing(name, dtype):
    values = held(dtype)
    params, _ = scanned(adding(name), jnp.asarray(values), np.zeros((20, values.size), np.float32))
    np.testing.assert_array_equal(wide(params), np.broadcast_to(wide(values), params.shape))


@each_dtype
def test_beyond_the_largest_number_it_stays_finite(dtype):
    largest = np.float32(jnp.finfo(DTYPES[dtype]).max)
    p = jnp.asarray([largest, -largest], DTYPES[dtype])
    above = np.float32([np.nextafter(largest, np.float32(np.inf)), -1.003 * largest])
    tx = adding("stochastic_rounding")
    for t in range(8):
        state = optax.EmptyState(), ao.StochasticRoundingState(jnp.asarray(t, jnp.int32))
        new, _ = stepping(tx)(p, state, above - wide(p))
        np.testing.assert_array_equal(wide(new), [largest, -largest])
    new, _ = stepping(tx)(p, tx.init(p), np.float32([np.inf, np.nan]))
    assert np.isinf(wide(new)[0]) and np.isnan(wide(new)[1])


def ups(seed, count, leaf, shift=0):
    """Which of many coordinates halfway between two numbers are rounded up."""
    size = 20_000
    tx, p = ao.stochastic_rounding(seed), [jnp.ones(size + shift, jnp.bfloat16)] * 2
    state = ao.StochasticRoundingState(jnp.asarray(count, jnp.int32))
    updates, _ = tx.update([jnp.full(size + shift, 2.0**-8)] * 2, state, p)
    return np.asarray(updates[leaf] > 0)[shift:]


PLACE = {"seed": 0, "count": 0, "leaf": 0}
OTHER_PLACES = {
    "another seed": {"seed": 1},
    "a seed of 32 bits": {"seed": 2**32 - 1},
    "the next step": {"count": 1},
    "a far step": {"count": 10**6},
    "another leaf": {"leaf": 1},
    "the next coordinate": {"shift": 1},
    "the next coordinate and step": {"shift": 1, "count": 1},
}


@pytest.mark.parametrize("place", OTHER_PLACES)
def test_other_places_draw_other_bits(place):
    one, other = ups(**PLACE), ups(**PLACE | OTHER_PLACES[place])
    # Independent fair coins agree in half of n cases, give or take 1 / (2 sqrt(n)).
    for share in (one.mean(), other.mean(), (one == other).mean()):
        assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(one.size)


def test_coordinates_of_a_matrix_draw_other_bits_than_their_neighbours():
    p = jnp.ones((100, 200), jnp.bfloat16)
    tx = ao.stochastic_rounding()
    up = np.asarray(tx.update(jnp.full(p.shape, 2.0**-8), tx.init(p), p)[0] > 0)
    pairs = {
        "rows": (up[1:], up[:-1]),
        "columns": (up[:, 1:], up[:, :-1]),
        "diagonals": (up[1:, 1:], up[:-1, :-1]),
        "the other diagonals": (up[1:, :-1], up[:-1, 1:]),
    }
    for kind, (one, other) in pairs.items():
        assert abs((one == other).mean() - 0.5) < 4 * 0.5 / np.sqrt(one.size), kind


def test_the_same_seed_repeats():
    np.testing.assert_array_equal(ups(7, 3, 1), ups(7, 3, 1))


# --- On any sharding, and after a restart -------------------------------------------------------------------


def low_precision(seed, *, scale=1.0):
    rng = np.random.default_rng(seed)
    tree = {"a": rng.normal(size=16), "b": rng.normal(size=(4, 16)), "c": rng.normal(size=(8, 3))}
    dtypes = {"a": jnp.float32, "b": jnp.bfloat16, "c": jnp.float16}
    return {key: jnp.asarray(scale * x, jnp.float32).astype(dtypes[key]) for key, x in tree.items()}


@each_rounding
def test_sharded_is_unsharded_bit_for_bit(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"a": PartitionSpec("x"), "b": PartitionSpec(None, "x"), "c": PartitionSpec("x")}
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    tx = ROUNDED[name](optax.scale(2.0**-7))
    ends = []
    for place in (lambda tree: tree, lambda tree: jax.device_put(tree, shardings)):
        params = place(low_precision(0))
        state, step = tx.init(params), jax.jit(stepping(tx))
        for t in range(5):
            params, state = step(params, state, place(low_precision(t + 1)))
        ends.append((params, state))
        sharded = [x.sharding.is_equivalent_to(shardings[key], x.ndim) for key, x in params.items()]
    same(*ends)
    assert all(sharded)


@each_rounding
def test_a_resumed_run_goes_on_bit_for_bit(name):
    def run(params, state, seeds):
        step = jax.jit(stepping(ROUNDED[name](ao.adam(1e-3))))
        for seed in seeds:
            params, state = step(params, state, low_precision(seed))
        return params, state

    start = low_precision(0)
    half = run(start, ROUNDED[name](ao.adam(1e-3)).init(start), range(5))
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    same(run(*restored, range(5, 10)), run(*half, range(5, 10)))


# --- Master weights -----------------------------------------------------------------------------------------

INNER = {
    "optax.adamw": optax.adamw(1e-4, weight_decay=0.1),
    "optax.sgd": optax.sgd(1e-3, momentum=0.9),
    "adamw": ao.adamw(1e-4, weight_decay=0.1),
    "rmsprop": ao.rmsprop(1e-4, centered=True),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_copy_is_the_float32_run(name, dtype):
    p = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32).astype(dtype)
    gradients = jnp.asarray(np.random.default_rng(2).normal(size=(30, 3, 16)), jnp.float32).astype(dtype)
    params, states = scanned(ao.master_weights(INNER[name]), p, gradients)
    expected, inner = scanned(INNER[name], p.astype(jnp.float32), gradients.astype(jnp.float32))
    # To float32 rounding, not to the bit: they are two programs, which XLA may fuse in different ways.
    # Moments are signed sums, so their rounding is relative to the gradients, of about 1.
    np.testing.assert_allclose(states.master, expected, rtol=1e-6, atol=1e-7)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6), states.inner_state, inner
    )
    np.testing.assert_array_equal(wide(params), nearest(states.master, DTYPES[dtype]))
    assert params.dtype == DTYPES[dtype] and len(np.unique(expected[:, 0, 0])) == 30


def test_inner_sees_float32():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append((jax.tree.map(lambda x: x.dtype, (updates, params)), extra_args))
        return updates, state

    p = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "c": jnp.ones(2)}
    inner = optax.GradientTransformationExtraArgs(lambda params: seen.append(params), update)
    tx = ao.master_weights(inner)
    tx.update(p, tx.init(p), p, value=3.0)
    start, (dtypes, extra_args) = seen
    assert extra_args == {"value": 3.0}
    assert {x.dtype for x in jax.tree.leaves(start)} == {*jax.tree.leaves(dtypes)} == {jnp.dtype("float32")}


def test_an_optimizer_of_optax_keeps_its_dtypes_in_a_scan():
    tx = ao.master_weights(optax.adamw(1e-3))
    p = jnp.ones(4, jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):  # the scan refuses a carry that changes
        _, states = scanned(tx, p, jnp.ones((3, 4), dtype))
        assert {x.dtype for x in jax.tree.leaves(states)} == {np.dtype(np.float32), np.dtype(np.int32)}


# name: what happens to the parameters from outside
CHANGES = {
    "clipped": lambda p: jnp.clip(p, -0.5, 0.5),
    "reloaded": lambda p: p.at[::3].set(jnp.asarray(0.375, p.dtype)),
    "all anew": lambda p: jnp.full_like(p, 3.0),
    "one more unit": lambda p: p.at[5].add(jnp.asarray(unit(np.asarray(p[5])), p.dtype)),
    "NaN": lambda p: p.at[2].set(jnp.nan),
}


@pytest.mark.parametrize("change", CHANGES)
@each_dtype
def test_a_copy_follows_a_parameter_changed_from_outside(change, dtype):
    tx, rng = adding("master_weights"), np.random.default_rng(3)
    p = jnp.asarray(rng.normal(size=32), jnp.float32).astype(dtype)
    step = jax.jit(stepping(tx))
    p, state = step(p, tx.init(p), jnp.asarray(1e-4 * rng.normal(size=32), jnp.float32))
    changed = CHANGES[change](p)
    differs = wide(changed) != wide(p)
    assert differs.any() and (state.master != wide(p)).all()
    zero = jnp.zeros(32)
    after, new = step(changed, state, zero)
    np.testing.assert_array_equal(new.master, np.where(differs, wide(changed), state.master))
    np.testing.assert_array_equal(wide(after), wide(changed))
    after, last = step(p, new, zero)  # put back, also from NaN
    np.testing.assert_array_equal(last.master, np.where(differs, wide(p), state.master))
    np.testing.assert_array_equal(wide(after), wide(p))


# --- Other leaves -------------------------------------------------------------------------------------------


@each_rounding
@pytest.mark.parametrize("wanted", ["float32", "float64"])
def test_wide_leaves_pass_through(name, wanted, request):
    if wanted == "float64":
        request.getfixturevalue("x64")
    params = mixed_params() | {"wide": jnp.linspace(-1, 1, 32, dtype=wanted)}
    gradients = random_gradients(params, 0)
    inner = ao.sgd(2**-3)
    tx = ROUNDED[name](inner)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(gradients, state, params)
    plain, _ = jax.jit(inner.update)(gradients, inner.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    narrow = {"['block']['bias']", "['half']"}
    leaves = zip(jax.tree.leaves_with_path(params), *map(jax.tree.leaves, (updates, plain)), strict=True)
    for (path, p), u, expected in leaves:
        if (path := jax.tree_util.keystr(path)) in narrow:
            assert u.dtype == jnp.float32 and p.dtype in DTYPES.values()
        else:
            assert u.dtype == p.dtype
            same(u, expected)
    assert updates["wide"].dtype == wanted and updates["complex"].dtype == jnp.complex64
    kept = {"kahan_summation": "compensation", "master_weights": "master"}
    if name in kept:  # a scalar for each wide leaf
        sizes = {
            jax.tree_util.keystr(path): x.size
            for path, x in jax.tree.leaves_with_path(getattr(after, kept[name]))
        }
        assert {path for path, size in sizes.items() if size > 1} == narrow


@each_rounding
def test_trees_without_leaves(name):
    tx = adding(name)
    for params in ({}, {"a": None, "b": optax.MaskedNode()}, jnp.zeros((0, 3), jnp.bfloat16)):
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


# --- Refusals -----------------------------------------------------------------------------------------------


@each_rounding
def test_8_bit_parameters_are_refused(name):
    params = {"w": jnp.zeros(2, jnp.float8_e4m3fn), "b": jnp.zeros(2)}
    with pytest.raises(
        ValueError, match=f"{name}: 'w' must be bfloat16, float16 or wider, got float8_e4m3fn"
    ):
        adding(name).init(params)


@each_rounding
def test_integer_parameters_are_refused(name):
    with pytest.raises(
        ValueError, match=f"{name}: the leaf 'w' of params must be a floating or complex array, got int32"
    ):
        adding(name).init({"w": jnp.zeros(2, jnp.int32)})


@each_rounding
def test_missing_parameters_are_refused(name):
    tx, p = adding(name), jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match=f"{name} needs the parameters: call update"):
        tx.update(jnp.ones(2), tx.init(p))


@each_rounding
def test_updates_unlike_the_parameters_are_refused(name):
    tx, params = adding(name), {"w": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(ValueError, match=f"{name}: the leaf 'v' of updates is not in params"):
        tx.update(params | {"v": jnp.ones(2)}, tx.init(params), params)
    with pytest.raises(ValueError, match=rf"{name}: 'w' has shape \(3,\) in updates and \(2,\) in params"):
        tx.update({"w": jnp.ones(3)}, tx.init(params), params)


@pytest.mark.parametrize("name", ["kahan_summation", "master_weights"])
def test_what_is_no_transformation_is_refused(name):
    for wrong in (None, 3, ao.adam):
        with pytest.raises(ValueError, match="inner must be an optax.GradientTransformation, got "):
            getattr(ao, name)(wrong)


@each_rounding
def test_another_state_is_refused(name):
    factory = ao.stochastic_rounding() if name == "stochastic_rounding" else adding(name)
    p = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match=f"{name}: the state must be a "):
        factory.update(p, optax.EmptyState(), p)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 4294967295\], got "):
        ao.stochastic_rounding(seed)


# --- With Flax ----------------------------------------------------------------------------------------------

RATE = 3e-4  # rounded to nearest, most of the model's parameters stand still


def loss_of(outputs):
    return jnp.mean((outputs.astype(jnp.float32) - TARGETS) ** 2)


@functools.cache
def training(name):
    """The transformation, a jitted step of nnx and one of linen, and the names of their traces."""
    traces = []

    @nnx.jit
    def nnx_step(model, optimizer):
        traces.append("nnx")
        value, gradients = nnx.value_and_grad(lambda model: loss_of(model(INPUTS)))(model)
        optimizer.update(model, gradients)
        return value

    @jax.jit
    def linen_step(state):
        traces.append("linen")

        def loss(params):
            return loss_of(APPLY({"params": params}, INPUTS))

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    return ROUNDED[name](ao.adam(RATE)), nnx_step, linen_step, traces


APPLY = LinenModel().apply


def fresh_nnx(name):
    model = NnxModel(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    return model, nnx.Optimizer(model, training(name)[0], wrt=nnx.Param)


def fresh_linen(name):
    params = nnx.to_pure_dict(nnx.state(fresh_nnx(name)[0], nnx.Param))
    state = TrainState.create(apply_fn=APPLY, params=params, tx=training(name)[0])
    return state.replace(step=jnp.zeros((), jnp.int32))  # as it comes back from a checkpoint


def run_linen(name, state, steps):
    for _ in range(steps):
        state, _ = training(name)[2](state)
    return state


def dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree)}


@each_rounding
def test_nnx_and_linen_train_alike(name):
    _, nnx_step, linen_step, traces = training(name)
    (model, optimizer), state = fresh_nnx(name), fresh_linen(name)
    start = state.params
    for _ in range(10):
        value = nnx_step(model, optimizer)
        state, linen_value = linen_step(state)
        np.testing.assert_allclose(value, linen_value, rtol=1e-2)  # of two sums in bfloat16
    params = nnx.state(model, nnx.Param)
    assert dtypes(params) == dtypes(state.params) == {jnp.dtype(jnp.bfloat16)}
    moved = jax.tree.map(lambda x, y: (x != y).mean(), state.params, start)
    assert all(share > 0.5 for share in jax.tree.leaves(moved))
    assert sorted(traces) == ["linen", "nnx"]


@each_rounding
@pytest.mark.parametrize("through", [through_bytes, through_orbax], ids=["flax", "orbax"])
def test_a_restored_linen_run_goes_on_bit_for_bit(name, through, tmp_path):
    fresh = fresh_linen(name)
    half = run_linen(name, fresh, 5)
    restored = through(half, jax.tree.map(jnp.zeros_like, fresh), tmp_path)
    same(restored, half)
    same(run_linen(name, restored, 5), run_linen(name, half, 5))


@each_rounding
def test_a_restored_nnx_run_goes_on_bit_for_bit(name, tmp_path):
    (model, optimizer), step = fresh_nnx(name), training(name)[1]
    for _ in range(5):
        step(model, optimizer)
    half = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    losses = [step(model, optimizer) for _ in range(5)]
    end = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    restored = through_orbax(half, jax.tree.map(jnp.zeros_like, half), tmp_path)
    same(restored, half)
    nnx.update((model, optimizer), restored)
    assert [step(model, optimizer) for _ in range(5)] == losses
    same(nnx.state((model, optimizer)), end)
    assert training(name)[3].count("nnx") == 1


# --- A training run -----------------------------------------------------------------------------------------

STEPS, SEEDS, EXAMPLES = 600, 5, 256


@functools.cache
def final_losses(name):
    """The loss over all examples after training two layers, one value a seed."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((EXAMPLES, 8)).astype(np.float32)
    y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * rng.standard_normal(EXAMPLES).astype(np.float32)
    batches = rng.integers(0, EXAMPLES, (SEEDS, STEPS, 32))
    shapes = {"a": (8, 32), "b": (32,), "c": (32,)}
    # All arms start from the same numbers, those of bfloat16.
    start = {
        key: jnp.asarray(rng.normal(size=(SEEDS, *shape)) * shape[0] ** -0.5, jnp.bfloat16)
        for key, shape in shapes.items()
    }
    if name == "float32":
        start = jax.tree.map(lambda p: p.astype(jnp.float32), start)
    tx = ROUNDED.get(name, lambda inner: inner)(ao.adam(RATE))

    def loss(params, x, y):
        p = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return jnp.mean((jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] - y) ** 2)

    def member(params, batches):
        def body(carry, batch):
            gradients = jax.grad(loss)(carry[0], jnp.asarray(x)[batch], jnp.asarray(y)[batch])
            return stepping(tx)(*carry, gradients), None

        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), batches)
        # Of float32 parameters too, what is seen of them in bfloat16: that reading costs 1e-4 by itself.
        return loss(jax.tree.map(lambda p: round_to_nearest(p.astype(jnp.float32), "bfloat16"), params), x, y)

    return np.asarray(jax.jit(jax.vmap(member))(start, batches))


@each_rounding
def test_a_training_run_ends_where_float32_does(name):
    difference = final_losses(name) - final_losses("float32")  # paired: the same start and batches
    lost = (final_losses("nearest") - final_losses("float32")).mean()
    # Student's t of 5 pairs exceeds 8.61 in 0.1 % of the cases if there is no difference, so that one of the
    # three fails in 0.3 % of all choices of seeds.
    assert abs(difference.mean()) < 8.61 * difference.std(ddof=1) / np.sqrt(SEEDS)
    # That a difference would be seen if there was one: a twentieth of what nearest rounding loses.
    assert np.abs(difference).max() < lost / 20


def test_rounded_to_nearest_it_does_not():
    # In every pair, by far more than noise: stochastic rounding differs by about 0.001.
    assert (final_losses("nearest") - final_losses("float32")).min() > 0.05

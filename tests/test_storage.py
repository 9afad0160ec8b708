"""Formats of moments: what rounding does to a bfloat16 value, an average, Adam's bound and a state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference.quantisation import (
    bfloat16_neighbours,
    int8_neighbours,
    predicted_variance,
)
from stored import SIGMAS, SMALL_INT8, each_role

import adaptive_optax as ao
from adaptive_optax.moments import int8
from adaptive_optax.transforms.direction import bound_of

NEAREST = ao.BFloat16("nearest")


# --- bfloat16, a value at a time (test_rounding.py tests the rounding itself) -------------------------------


@each_role
def test_what_bfloat16_holds_stays(role):
    patterns = np.arange(2**16, dtype=np.uint32) << 16
    x = patterns.view(np.float32)  # both infinities and NaNs among them
    # Of its subnormals, which are float32's, XLA makes zeros on a CPU.
    x = x[~(np.abs(x) < np.finfo(np.float32).tiny) | (patterns & 0x7FFFFFFF == 0)]
    x = x[~(x < 0)] if role == "nu" else x
    for storage in (ao.BFloat16(), NEAREST):
        for count in range(1, 4):
            moment = storage.encode(storage.init(x, role), jnp.asarray(x), count=jnp.int32(count), role=role)
            np.testing.assert_array_equal(storage.decode(moment), x)


def test_finite_moments_stay_finite_in_bfloat16():
    largest = np.finfo(np.float32).max  # above bfloat16's by nearly a unit of its last place
    x = jnp.full(1000, largest).at[::2].multiply(-1)
    for count in range(1, 4):
        moment = ao.BFloat16().encode(x.astype(jnp.bfloat16), x, count=jnp.int32(count), role="mu")
        np.testing.assert_array_equal(jnp.abs(moment), jnp.finfo(jnp.bfloat16).max)


def test_bfloat16_moments_are_rounded_to_a_neighbour_each():
    x = np.float32(np.random.default_rng(1).normal(size=(32, 128)) * 10.0 ** np.arange(-14, 18)[:, None])
    for storage, role, slack in ((ao.BFloat16(), "nu", 1), (ao.BFloat16(), "mu", 1), (NEAREST, "mu", 0.5)):
        values = x**2 if role == "nu" else x
        moment = storage.encode(
            storage.init(values, role), jnp.asarray(values), count=jnp.int32(3), role=role
        )
        assert moment.dtype == jnp.bfloat16
        decoded, around = np.asarray(storage.decode(moment), np.float64), bfloat16_neighbours(values)
        assert ((decoded == around.below) | (decoded == around.above)).all()
        assert (np.abs(decoded - values) <= slack * around.gap()).all()
        assert (np.abs(decoded - values) <= storage.relative_error * np.abs(values)).all()


def test_complex_leaves_stay_as_they_are():
    x = jnp.asarray([1.0 + 1e-6j, -3.3 + 0.1j], jnp.complex64)
    for storage in (ao.BFloat16(), NEAREST, ao.Int8(min_size=1)):
        moment = storage.encode(storage.init(x, "mu"), x, count=jnp.int32(1), role="mu")
        np.testing.assert_array_equal(storage.decode(moment), x)


# --- Decays at which a moment stands still ------------------------------------------------------------------


STANDS_STILL = {
    "adam's nu": (ao.scale_by_adam, "b2", {"nu_storage": NEAREST}),
    "adam's mu": (functools.partial(ao.scale_by_adam, b2=0.9999), "b1", {"mu_storage": NEAREST}),
    "mu_dtype": (functools.partial(ao.scale_by_adam, b2=0.9999), "b1", {"mu_dtype": jnp.bfloat16}),
    "rms": (ao.scale_by_rms, "decay", {"storage": NEAREST}),
    "rmsprop": (functools.partial(ao.rmsprop, 0.1), "decay", {"storage": NEAREST}),
    "adamw": (functools.partial(ao.adamw, 0.1), "b2", {"nu_storage": NEAREST}),
    "trace": (ao.trace, "decay", {"accumulator_dtype": jnp.bfloat16}),
}


@pytest.mark.parametrize("name", STANDS_STILL)
def test_a_decay_at_which_nearest_rounding_stands_still_is_refused(name):
    factory, decay, storage = STANDS_STILL[name]
    argument = next(iter(storage))
    for value in (0.999, np.float32(0.999), jnp.float32(0.999), 0.9961):
        reason = "rounds back to the same value, so the moment never decays"
        with pytest.raises(
            ValueError, match=f"{decay} must be at most 0.99609375.*{argument}=.*{reason}"
        ) as e:
            factory(**{decay: value}, **storage)
        assert f"got {value!r}" in str(e.value)
    for value in (0.99609375, 0.996, 0.9, lambda count: 0.999):  # a schedule's values are not known
        factory(**{decay: value}, **storage)
    jax.jit(lambda value: factory(**{decay: value}, **storage).init(jnp.ones(2)))(0.999)  # nor is a tracer's


def test_momentum_kept_to_nearest_is_refused_near_one():
    with pytest.raises(
        ValueError, match="^momentum must be at most 0.99609375 with accumulator_dtype=.*got 0.999"
    ):
        ao.sgd(0.1, momentum=0.999, accumulator_dtype=jnp.bfloat16)
    ao.sgd(0.1, momentum=0.996, accumulator_dtype=jnp.bfloat16)


def test_the_largest_decay_is_where_values_begin_to_move():
    # All significands of bfloat16; the exponent does not matter.
    values = jnp.asarray(1 + np.arange(128) / 128, jnp.bfloat16)

    def moves(decay):
        kept = NEAREST.encode(values, decay * NEAREST.decode(values), count=jnp.int32(1), role="nu")
        return np.asarray(kept != values)

    assert moves(NEAREST.largest_decay).all() and moves(0.99).all()
    assert not moves(0.999).any() and not moves(0.9981).any()


@pytest.mark.parametrize("rounding", ["up", "", None, "NEAREST"])
def test_an_unknown_rounding_is_refused(rounding):
    with pytest.raises(ValueError, match=f"rounding must be .*, got {rounding!r}"):
        ao.BFloat16(rounding)


# --- Averages follow the float32 moment ---------------------------------------------------------------------


DECAY = 0.999
in_blocks = functools.partial(int8_neighbours, block_size=32)
FOLLOWING = {"bfloat16": (ao.BFloat16(), bfloat16_neighbours), "int8": (ao.Int8(min_size=1), in_blocks)}
each_following = pytest.mark.parametrize("name", FOLLOWING)


def averaged(storage, start, phases):
    """Second moments of `scale_by_adam` at every step, v_0 included, for squares in phases."""
    decay = DECAY if storage != NEAREST else lambda count: DECAY  # a schedule's values are not refused
    tx = ao.scale_by_adam(b1=0.0, b2=decay, nu_storage=storage)
    state = tx.init(jnp.zeros_like(start))
    state = state._replace(nu=storage.encode(state.nu, start, count=state.count, role="nu"))

    def step(g, state, _):
        state = tx.update(g, state)[1]
        return state, ao.dense(state.nu)

    @jax.jit
    def run(state):
        records = [ao.dense(state.nu)[None]]
        for squares, steps in phases:
            g = jnp.broadcast_to(jnp.sqrt(squares), start.shape)
            state, nu = jax.lax.scan(functools.partial(step, g), state, length=steps)
            records.append(nu)
        return jnp.concatenate(records)

    return np.asarray(run(state))


def exact_average(start, phases):
    """v_n = q + b^n (v_0 - q), phase after phase, in float64."""
    records = [np.float64(start)[None]]
    for squares, steps in phases:
        powers = DECAY ** np.arange(1.0, steps + 1).reshape(-1, *[1] * np.ndim(start))
        records.append(squares + powers * (records[-1][-1] - squares))
    return np.concatenate(records)


def assert_follows(values, exact, squares, neighbours, times, *, at_most):
    """Compares mean and spread of the relative errors, over all coordinates, with equation (2).

    Args:
        at_most: Whether the spread may be less: with antithetic numbers the errors of different steps are not
            uncorrelated but make up for each other.
    """
    for t in times:
        error = values[t] / exact[t] - 1
        variance = predicted_variance(values[: t + 1], squares[:t], DECAY, neighbours) / exact[t] ** 2
        deviation = np.sqrt(variance.mean() / error.size)
        assert abs(error.mean()) < SIGMAS * deviation + 1e-4, (t, error.mean(), deviation)  # 1e-4: float32's
        spread = SIGMAS * np.std(error**2) / np.sqrt(error.size)
        over = np.mean(error**2) - variance.mean()
        assert (over if at_most else abs(over)) < spread + 0.1 * variance.mean(), t


@each_following
def test_a_second_moment_follows_float32_up_and_down(name):
    # Squares of 1, then of 1e-4, times a pattern over four decades, so that blocks are not of one value.
    storage, neighbours = FOLLOWING[name]
    pattern = np.float32(10 ** np.random.default_rng(0).uniform(-4, 0, (2, 512)))
    phases = [(pattern, 5000), (1e-4 * pattern, 5000)]
    values = averaged(storage, jnp.zeros(pattern.shape), phases)
    exact = exact_average(np.zeros(pattern.shape), phases)
    squares = np.concatenate([np.broadcast_to(q, (steps, *q.shape)) for q, steps in phases])
    assert_follows(values, exact, squares, neighbours, (5000, 10_000), at_most=name == "int8")


@each_following
def test_a_step_far_below_half_a_gap_is_not_swamped(name):
    # g^2 = 16 v under a scale that another coordinate of the block holds: a step takes at most 1.5 % of v,
    # half a gap is 2.4 % there at first. The exact v reaches 16 - 15 * 0.999^5000 = 15.9.
    storage, neighbours = FOLLOWING[name]
    start, squares = np.ones((4, 256), np.float32), np.full((4, 256), 16, np.float32)
    start[:, ::32] = squares[:, ::32] = HOLDER
    others = np.arange(256) % 32 > 0
    values = averaged(storage, jnp.asarray(start), [(squares, 5000)])
    exact = exact_average(start, [(squares, 5000)])
    assert exact[-1, 0, 1] == pytest.approx(15.9, abs=0.01)
    deviation = np.sqrt(
        predicted_variance(values, np.tile(squares, (5000, 1, 1)), DECAY, neighbours)[:, others].mean()
    )
    ends = values[-1][:, others]
    assert abs(ends.mean() - exact[-1, 0, 1]) < SIGMAS * deviation / np.sqrt(ends.size) + 1e-3
    # "Within a few percent", and no tolerance that hides anything.
    assert SIGMAS * deviation / np.sqrt(ends.size) < 0.05 * 15.9


HOLDER = 4096.0**2  # 24 octaves above 1: codes are 7/64 octaves apart


def test_to_the_nearest_code_it_would_be_swamped(monkeypatch):
    monkeypatch.setattr(int8, "antithetic_uniform", lambda shape, *_, **__: jnp.full(shape, 0.5))
    start, squares = np.ones((1, 256), np.float32), np.full((1, 256), 16, np.float32)
    start[:, ::32] = squares[:, ::32] = HOLDER
    values = averaged(ao.Int8(min_size=1), jnp.asarray(start), [(squares, 500)])
    others = np.arange(256) % 32 > 0
    np.testing.assert_array_equal(values[-1][:, others], values[0][:, others])


def test_ten_thousand_steps_in_8_bits_have_no_bias(monkeypatch):
    # Rising from 0, then falling to 1e-4 of it. Averages over 16 384 coordinates, each to 0.15 %.
    pattern = np.float32(10 ** np.random.default_rng(1).uniform(-1, 0, (32, 512)))
    squares = [pattern, 1e-4 * pattern]

    def mean_errors():
        tx = ao.scale_by_adam(b1=0.0, b2=DECAY, nu_storage=ao.Int8(min_size=1))

        @jax.jit
        def run(state, g):
            return jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), state, length=5000)[0]

        state, exact, found = tx.init(jnp.zeros(pattern.shape)), 0.0, []
        for q in squares:
            state, exact = run(state, jnp.sqrt(q)), np.float64(q) + DECAY**5000 * (exact - np.float64(q))
            found.append(np.mean(np.float64(ao.dense(state.nu)) / exact - 1))
        return found

    assert np.abs(mean_errors()).max() < 0.005
    monkeypatch.setattr(int8, "antithetic_uniform", lambda shape, *_, **__: jnp.full(shape, 0.5))
    jax.clear_caches()
    rising, falling = mean_errors()  # to nearest
    jax.clear_caches()
    assert rising < -0.1 and falling > 1


def test_4000_steps_of_1_and_4000_of_a_hundredth():
    # The exact moment ends at 0.0180. Nearest rounding does not let go: optax's bfloat16 moment, b2 being 1
    # there, stays where it is; to nearest from a float32 step, 0.001 (1 - v) is less than half a unit from
    # v = 1/4 on.
    phases = [(1.0, 4000), (1e-4, 4000)]
    start = np.zeros((4, 256), np.float32)
    exact = exact_average(start, phases)[-1, 0, 0]
    assert exact == pytest.approx(0.0180, abs=1e-4)
    ends = {
        storage: averaged(storage, jnp.asarray(start), phases)
        for storage in (ao.Float32(), NEAREST, ao.BFloat16(), ao.Int8(min_size=1))
    }
    np.testing.assert_allclose(ends[ao.Float32()][-1], exact, rtol=2e-5)
    assert (ends[NEAREST][4000:] == 0.25).all()
    # Equal values have the finest spacing, a thousandth of an octave.
    coded = ends[ao.Int8(min_size=1)][-1]
    np.testing.assert_allclose(coded, exact, rtol=0.05)
    assert abs(coded.mean() / exact - 1) < 0.002
    values = ends[ao.BFloat16()]
    squares = np.repeat([1.0, 1e-4], 4000).reshape(-1, 1, 1)
    deviation = np.sqrt(predicted_variance(values, squares, DECAY, bfloat16_neighbours).mean() / start.size)
    assert abs(values[-1].mean() - exact) < SIGMAS * deviation + 1e-4 * exact
    assert deviation < 0.01 * exact


@pytest.mark.parametrize(("decay", "documented"), [(0.999, 0.04), (0.9, 0.0054)])
def test_the_noise_of_bfloat16_is_as_documented(decay, documented):
    # With u / x for the unit in the last place over the value, from 2^-8 to 2^-7, a rounding that falls
    # anywhere between two neighbours has the variance u^2 / 6. Over values log-uniform in an octave
    # E[(u / x)^2] = 2^-14 * 3 / (8 ln 2), and the average sums it to 2^-16 / (4 ln 2 (1 - b^2)): 5.2 % at
    # 0.999 and 0.54 % at 0.9. At 0.999 steps are short, roundings fall near a neighbour, and it is less.
    general = 2**-8 / np.sqrt(4 * np.log(2) * (1 - decay**2))
    assert general == pytest.approx({0.999: 0.052, 0.9: 0.0054}[decay], rel=0.02)
    shape, (one, two) = (round(5 / (1 - decay)), 32, 64), jax.random.split(jax.random.key(0))
    if decay == 0.999:
        g = jax.random.normal(one, shape)
    else:  # near their mean, so that the moment itself does not fall fast after a peak
        g = 2 ** (jax.random.uniform(two, shape[1:]) / 2) * jnp.sqrt(1 + 0.5 * jax.random.uniform(one, shape))
    moments = []
    for storage in ("float32", "bfloat16"):
        tx = ao.scale_by_adam(b1=0.0, b2=decay, nu_storage=storage)
        state = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(g[0]), g)[0]  # noqa: B023 (called at once)
        moments.append(ao.dense(state.nu))
    relative = np.asarray(moments[1] / moments[0] - 1)
    assert relative.std() == pytest.approx(documented, rel=0.15)
    assert abs(relative.mean()) < SIGMAS * relative.std() / np.sqrt(relative.size)


# --- Adam's bound -------------------------------------------------------------------------------------------


def adversarial():
    """Gradients, by name, of four rows of 128 coordinates in blocks of 64."""
    rng = np.random.default_rng(0)
    growth = (0.999 / 0.9) ** np.arange(150)  # attains the bound
    scales = 10 ** rng.uniform(-6, 0, (4, 128))
    spike = np.zeros((120, 4, 128))
    spike[:20] = 1e-4 * rng.normal(size=(20, 4, 128))
    spike[20, :, 7] = 1.0
    stopping = growth[:, None, None] * scales
    stopping[rng.integers(60, 150)] = 0
    ends = rng.integers(40, 150, (4, 128))
    stopping = np.where(np.arange(150)[:, None, None] < ends, stopping, 0)
    return {"spike": spike, "growth": growth[:, None, None] * scales, "stopping": stopping}


BOUND_STORAGES = {
    "both": {"mu_storage": SMALL_INT8, "nu_storage": SMALL_INT8},
    "mu": {"mu_storage": SMALL_INT8},
    "nu": {"nu_storage": SMALL_INT8},
    "mu, bfloat16 nu": {"mu_storage": SMALL_INT8, "nu_storage": "bfloat16"},
    "bfloat16": {"mu_storage": "bfloat16", "nu_storage": "bfloat16"},
}


def excess(storages):
    """The largest |u| over the bound, for each sequence, and whether it is the closed form's."""
    tx = ao.scale_by_adam(eps=0.0, **storages)

    def step(state, g):
        u, state = tx.update(g, state)
        return state, jnp.max(jnp.abs(u)) / bound_of(tx).max_ratio(state)

    @jax.jit
    def run(g):
        state, ratios = jax.lax.scan(step, tx.init(g[0]), g)
        return jnp.max(ratios), bound_of(tx).max_ratio(state)

    result = {name: run(jnp.asarray(g, jnp.float32)) for name, g in adversarial().items()}
    return {name: float(r) for name, (r, _) in result.items()}, [float(b) for _, b in result.values()]


@pytest.mark.parametrize("name", BOUND_STORAGES)
def test_adams_bound_holds_whatever_is_rounded(name):
    ratios, bounds = excess(BOUND_STORAGES[name])
    assert max(ratios.values()) <= 1 + 2e-5
    assert max(ratios.values()) > 0.9  # they are adversarial
    closed = [ao.adam_bound(0.9, 0.999, len(g)) for g in adversarial().values()]
    if name == "bfloat16":  # no floor is needed: the bound allows for a unit in the last place
        assert (np.array(bounds) < 1.06 * np.array(closed)).all()
    else:
        np.testing.assert_allclose(bounds, closed, rtol=1.3e-4)  # 1.2e-4 is for the weights' rounding


@pytest.mark.parametrize("name", ["both", "mu", "nu"])
def test_adams_bound_would_not_hold_without_the_floor(name, monkeypatch):
    decode = ao.Int8.decode
    monkeypatch.setattr(ao.Int8, "decode", lambda self, moment, *, lower=None: decode(self, moment))
    monkeypatch.setattr(ao.Int8, "relative_error", 0.0)  # `scale_by_adam` sees no need for one either
    ratios, _ = excess(BOUND_STORAGES[name])
    assert max(ratios.values()) > 1.02, ratios


# --- Shardings ----------------------------------------------------------------------------------------------


COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b")
BLOCK = 64


def trained(shape, mesh_shape, spec, kind=jax.sharding.AxisType.Auto, steps=3):
    """The HLO of a step of Adam in 8 bits, what a few steps lead to, and the sharding."""
    devices = np.array(jax.devices()[: mesh_shape[0] * mesh_shape[1]]).reshape(mesh_shape)
    sharding = NamedSharding(jax.sharding.Mesh(devices, ("x", "y"), axis_types=(kind,) * 2), spec)
    storage = ao.Int8(BLOCK, min_size=1)
    tx = ao.scale_by_adam(mu_storage=storage, nu_storage=storage)
    gradients = np.float32(np.random.default_rng(0).normal(size=(steps, *shape)))
    # The moments are sharded as the parameters are from which they are made.
    state = tx.init(jax.device_put(jnp.zeros(shape), sharding))
    step = jax.jit(tx.update).lower(jax.device_put(gradients[0], sharding), state).compile()
    for g in gradients:
        u, state = step(jax.device_put(g, sharding), state)
    return step.as_text(), (u, state), sharding


@functools.cache
def trained_alone(shape):
    """What the same steps lead to on one device."""
    return trained(shape, (1, 1), PartitionSpec())[1]


SHARDED = {
    "last axis": ((4, 24 * BLOCK), (8, 1), PartitionSpec(None, "x")),
    "first axis": ((16, 3 * BLOCK + 16), (8, 1), PartitionSpec("x")),
    "both": ((4, 8 * BLOCK), (2, 4), PartitionSpec("x", "y")),
    "leading axes": ((4, 8, 2 * BLOCK), (2, 4), PartitionSpec("x", "y")),
    "features and heads": ((16, 4, 16), (2, 4), PartitionSpec("x", "y")),
    "stacked layers and heads": ((2, 16, 4, 16), (2, 4), PartitionSpec("x", None, "y")),
}
KINDS = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARDED)
def test_a_moment_that_is_sharded_in_whole_blocks_needs_no_communication(name, kind):
    shape, mesh_shape, spec = SHARDED[name]
    text, (u, state), sharding = trained(shape, mesh_shape, spec, KINDS[kind])
    assert COLLECTIVE.findall(text) == []
    for moment in (state.mu, state.nu):
        assert moment.codes.sharding.is_equivalent_to(sharding, len(shape))
        assert moment.scale.sharding.is_equivalent_to(sharding, len(shape))
    alone_u, alone = trained_alone(shape)
    np.testing.assert_allclose(u, alone_u, rtol=1e-6)
    for ours, theirs in ((state.mu, alone.mu), (state.nu, alone.nu)):
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-6)


def test_a_last_axis_that_is_cut_inside_blocks_communicates():
    # What the search above would find.
    text, _, _ = trained((4, 4 * BLOCK), (8, 1), PartitionSpec(None, "x"))
    assert COLLECTIVE.findall(text)


# Shards of which none holds whole blocks, along the last axis and along the one that blocks extend over.
CUT = {
    "remainder": ((4, 3 * BLOCK + 16), (2, 4), PartitionSpec("x", "y")),
    "several in a block": ((4, 4 * BLOCK), (1, 8), PartitionSpec(None, "y")),
    "rows of a block": ((12, 4, 16), (2, 4), PartitionSpec("y", "x")),
    "a short axis": ((16, 4, 16), (2, 4), PartitionSpec("x", None, "y")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CUT)
def test_shards_that_cut_blocks_change_nothing_but_communication(name, kind):
    shape, mesh_shape, spec = CUT[name]
    _, (u, state), sharding = trained(shape, mesh_shape, spec, KINDS[kind])
    alone_u, alone = trained_alone(shape)
    # Sums of both signs may cancel, and are rounded as XLA fuses them.
    np.testing.assert_allclose(u, alone_u, rtol=1e-6, atol=2e-7)
    for ours, theirs in ((state.mu, alone.mu), (state.nu, alone.nu)):
        assert ours.codes.sharding.is_equivalent_to(sharding, len(shape))
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_allclose(jax.jit(ao.dense)(ours), ao.dense(theirs), rtol=1e-5)


# --- Any granularity with any storage -----------------------------------------------------------------------


WIDE = {"a": jnp.zeros((3, 80)), "b": jnp.zeros(70)}
EVERY_GRANULARITY = {
    "coordinate": ao.Coordinate(),
    "first axis": ao.Axis(0),
    "last axis": ao.Axis(-1),
    "tensor": ao.Tensor(),
    "labels": ao.Labels(lambda path, leaf: path),
    "global": ao.Global("sum"),
}
# name: (storage, the relative standard deviation of a rounding at most)
EVERY_STORAGE = {
    "float32": (ao.Float32(), 0.0),
    "bfloat16": (ao.BFloat16(), 2.0**-8),
    "int8": (SMALL_INT8, (2 ** (5 / 16) - 1) / 2),
}
B2, COUNT = 0.99, 50


@functools.cache
def nu_after_steps(granularity, storage):
    granularity, storage = EVERY_GRANULARITY[granularity], EVERY_STORAGE[storage][0]
    tx = ao.scale_by_adam(b2=B2, granularity=granularity, mu_storage=storage, nu_storage=storage)
    keys = jax.random.split(jax.random.key(0))
    grads = {
        path: jax.random.normal(key, (COUNT, *leaf.shape)) * 10.0 ** -jnp.arange(leaf.shape[-1]).clip(0, 4)
        for (path, leaf), key in zip(WIDE.items(), keys, strict=True)
    }

    @jax.jit
    def run(grads):
        # The scan itself refuses a state that changes its structure, shapes or dtypes.
        return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(WIDE), grads)

    state, updates = run(grads)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tx.init(WIDE)
    )
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(ao.dense(state.nu))])


@pytest.mark.parametrize("storage", EVERY_STORAGE)
@pytest.mark.parametrize("granularity", EVERY_GRANULARITY)
def test_any_granularity_in_any_storage_follows_float32(granularity, storage):
    # A rounding's standard deviation is at most half a gap, of which the average remembers b2^j after j
    # steps: sqrt(sum b2^2j) of it in all. Over that, 50 roundings of float32.
    error = nu_after_steps(granularity, storage) / nu_after_steps(granularity, "float32") - 1
    deviation = EVERY_STORAGE[storage][1] / np.sqrt((1 - B2**2) * error.size)
    assert abs(error.mean()) <= SIGMAS * deviation + COUNT * 2.0**-24

"""Moments: pooling at every granularity, labels, state sizes, and exact averages and their weights."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.moments import MovingAverage, Pooling, ema_weights
from tolerances import REFERENCE
from trajectories import (
    GRANULARITIES,
    SHAPES,
    assert_close,
    decays,
    gradients,
    parameters,
    run,
)

import adaptive_optax as ao
from adaptive_optax.moments.ema import decay_at, ema, ema_weight

COARSE = [name for name in GRANULARITIES if name != "coordinate"]


def squares(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.integers(-6, 6, len(shapes))
    return {
        path: np.asarray(scale * rng.uniform(0.1, 1, shape), np.float32)
        for (path, shape), scale in zip(shapes.items(), scales, strict=True)
    }


def laid_out(granularity: ao.Granularity, pooled, like: dict) -> dict:
    """A group's value at each of its coordinates."""
    spread = granularity.spread(pooled, jax.tree.map(jnp.asarray, like))
    return {path: np.broadcast_to(spread[path], np.shape(leaf)) for path, leaf in like.items()}


AXES = [(0,), (1,), (2,), (3,), (-1,), (-2,), (-3,), (-4,), (0, 1), (0, -1), (1, -1), (-1, -2), (0, 2)]


def axis_cases():
    for axes in AXES:
        for reduce in ("mean", "sum"):
            pair = ao.Axis(*axes, reduce=reduce), Pooling("axis", axes, reduce=reduce)
            yield pytest.param(*pair, id=f"Axis{axes} {reduce}")


# --- Pooling ------------------------------------------------------------------------------------------------

ALL = [
    *(pytest.param(*pair, id=name) for name, pair in GRANULARITIES.items()),
    pytest.param(ao.Tensor("sum"), Pooling("tensor", reduce="sum"), id="tensor, sum"),
]


@pytest.mark.parametrize(("granularity", "pooling"), [*ALL, *axis_cases()])
def test_pooling_is_the_reference_s(granularity, pooling):
    values = squares(SHAPES)
    expected = pooling(values)
    pooled = granularity.pool(jax.tree.map(jnp.asarray, values))
    result = laid_out(granularity, pooled, values)
    for path in SHAPES:
        np.testing.assert_allclose(result[path], expected[path], rtol=REFERENCE["float32"], err_msg=path)
    template = granularity.template(jax.tree.map(jnp.asarray, values))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), template) == jax.tree.map(
        lambda x: (x.shape, x.dtype), pooled
    )


@pytest.mark.parametrize(
    ("axes", "shape"), [((0,), (1, 3, 2)), ((-1,), (4, 3, 1)), ((0, -1), (1, 3, 1)), ((3,), (4, 3, 2))]
)
def test_shared_axes_are_kept_with_size_one(axes, shape):
    assert ao.Axis(*axes).pool(jnp.ones((4, 3, 2))).shape == shape


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(
    ("granularity", "shapes", "pooled"),
    [
        (functools.partial(ao.Axis, -1), {"a": (3, 0)}, {"a": (3, 1)}),
        (functools.partial(ao.Axis, 0, 1), {"a": (0, 2, 3)}, {"a": (1, 1, 3)}),
        (ao.Tensor, {"a": (3, 0), "b": (0,)}, {"a": (), "b": ()}),
        (functools.partial(ao.Labels, lambda path, leaf: 0), {"a": (0,)}, (1,)),
        (functools.partial(ao.Labels, lambda path, leaf: 0), {}, (0,)),
        (ao.Global, {"a": (0, 2)}, ()),
        (ao.Global, {}, ()),
    ],
)
def test_nothing_to_pool_gives_zero(granularity, shapes, pooled, reduce):
    zeros = jax.tree.map(np.zeros, pooled, is_leaf=lambda x: isinstance(x, tuple))
    result = granularity(reduce=reduce).pool({path: jnp.ones(shape) for path, shape in shapes.items()})
    jax.tree.map(np.testing.assert_array_equal, result, zeros)


def test_a_label_is_pooled_by_sums_and_counts():
    # Four coordinates of 1 and one of 9: (4 + 9) / 5 by counts, 5 by the mean of the leaves' means.
    values = {"large": jnp.ones((2, 2)), "small": jnp.array([9.0])}
    np.testing.assert_allclose(ao.Labels(lambda path, leaf: 0).pool(values), [2.6], rtol=1e-7)
    np.testing.assert_allclose(ao.Labels(lambda path, leaf: 0, "sum").pool(values), [13.0], rtol=1e-7)
    np.testing.assert_allclose(ao.Global().pool(values), 2.6, rtol=1e-7)


def test_labels_come_in_first_seen_order_and_see_path_and_leaf():
    values = {
        "a": {"x": jnp.full(3, 5.0), "y": jnp.full((), 7.0)},
        "b": [jnp.full(2, 11.0), jnp.full((), 13.0)],
    }
    seen = []

    def by_rank(path, leaf):
        seen.append((path, leaf.shape))
        return "matrix" if leaf.ndim else "scalar"

    pooled = ao.Labels(by_rank).pool(values)
    np.testing.assert_allclose(pooled, [(15 + 22) / 5, 10.0], rtol=1e-7)
    assert seen == [("a/x", (3,)), ("a/y", ()), ("b/0", (2,)), ("b/1", ())]


# --- Labels by path -----------------------------------------------------------------------------------------

NESTED = {
    "block": {"bias": jnp.full(2, 1.0), "kernel": jnp.full((2, 2), 2.0)},
    "head": {"bias": jnp.full(2, 3.0), "kernel": jnp.full((2, 3), 4.0)},
}


@pytest.mark.parametrize(
    ("patterns", "default", "expected"),  # expected: leaves in order (block bias, kernel, head bias, kernel)
    [
        ({"bias": "b", "head": "h"}, None, ["b", "rest", "b", "h"]),
        ({"head": "h", "bias": "b"}, None, ["b", "rest", "h", "h"]),  # the first match wins
        ({"head": "h", "head/kernel": "k"}, None, ["rest", "rest", "h", "h"]),  # shadowed, and no error
        ({"^block/": "h", "kernel$": "h"}, "d", ["h", "h", "rest", "h"]),  # two patterns, one label
        ({"bias": 0}, 0, ["b", "b", "b", "b"]),  # the default may be one of the labels
        ({}, None, ["rest", "rest", "rest", "rest"]),
    ],
)
def test_labels_by_path(patterns, default, expected):
    granularity = ao.Labels.by_path(patterns, default=default)
    paths = ["block/bias", "block/kernel", "head/bias", "head/kernel"]
    flat = dict(zip(paths, jax.tree.leaves(NESTED), strict=True))
    labels = dict(zip(paths, expected, strict=True))
    pooled = granularity.pool(NESTED)
    assert pooled.shape == (len(set(expected)),)
    wanted = Pooling("labels", labels=labels)({path: np.asarray(leaf) for path, leaf in flat.items()})
    spread = jax.tree.leaves(granularity.spread(pooled, NESTED))
    np.testing.assert_allclose(spread, [wanted[path].flat[0] for path in paths], rtol=1e-6)


def test_a_pattern_without_a_leaf_is_an_error_that_names_it():
    granularity = ao.Labels.by_path({"head": "h", "encoder/.*": "e"})
    for tx in (ao.scale_by_rms(granularity=granularity), ao.scale_by_adam(granularity=granularity)):
        with pytest.raises(ValueError, match=r"'encoder/\.\*' matches no leaf.*block/bias, block/kernel"):
            tx.init(NESTED)
    assert ao.scale_by_rms(granularity=ao.Labels.by_path({"head": "h"})).init(NESTED).nu.shape == (2,)


# --- Another granularity by path ----------------------------------------------------------------------------

# What each leaf of SHAPES gets: a pattern of its own or one that it shares.
PARTS = {"body": ao.Axis(0), "^head/(bias|empty)$": ao.Global(), "kernel|bias": ao.Axis(-1, reduce="sum")}
REFERENCE_PARTS = {
    "body/attention": Pooling("axis", (0,)),
    "head/bias": Pooling("global"),
    "head/empty": Pooling("global"),
    "head/kernel": Pooling("axis", (-1,), reduce="sum"),
    "scale": Pooling("tensor"),
}


def test_each_pattern_pools_its_leaves_as_if_they_were_alone():
    granularity = ao.ByPath(PARTS, default="tensor")
    values = squares(SHAPES)
    arrays = jax.tree.map(jnp.asarray, values)
    pooled = granularity.pool(arrays)
    shapes = {
        "body/attention": (1, 3, 2),
        "head/bias": (),
        "head/empty": (),
        "head/kernel": (4, 1),
        "scale": (),
    }
    assert jax.tree.map(jnp.shape, pooled) == shapes
    assert jax.tree.map(jnp.shape, granularity.template(arrays)) == shapes
    result = laid_out(granularity, pooled, values)
    for pooling in REFERENCE_PARTS.values():
        part = {path: values[path] for path, other in REFERENCE_PARTS.items() if other == pooling}
        for path, expected in pooling(part).items():
            np.testing.assert_allclose(result[path], expected, rtol=REFERENCE["float32"], err_msg=path)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_granularity_by_a_pattern_of_all_leaves_is_that_granularity(name):
    granularity, _ = GRANULARITIES[name]
    values = squares(SHAPES)
    arrays = jax.tree.map(jnp.asarray, values)
    expected = laid_out(granularity, granularity.pool(arrays), values)
    for parts in (ao.ByPath({"": granularity}), ao.ByPath({}, default=granularity)):
        for outer in (parts, ao.ByPath({}, default=parts)):
            result = laid_out(outer, outer.pool(arrays), values)
            jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_two_patterns_with_a_global_granularity_are_two_groups():
    pooled = ao.ByPath({"block": "global", "head": "global"}).pool(NESTED)
    one, two = (4 * 2 + 2 * 1) / 6, (2 * 3 + 6 * 4) / 8
    np.testing.assert_allclose(jax.tree.leaves(pooled), [one, one, two, two], rtol=1e-6)
    pooled = ao.ByPath({"block|head": "global"}).pool(NESTED)
    np.testing.assert_allclose(jax.tree.leaves(pooled), [40 / 14] * 4, rtol=1e-6)


def test_the_first_pattern_gives_the_granularity():
    kernel_first = ao.ByPath({"kernel": ao.Axis(0), "head": "tensor"}).template(NESTED)
    head_first = ao.ByPath({"head": "tensor", "kernel": ao.Axis(0)}).template(NESTED)
    assert kernel_first["head"]["kernel"].shape == (1, 3) and head_first["head"]["kernel"].shape == ()
    assert kernel_first["head"]["bias"].shape == () and kernel_first["block"]["bias"].shape == (2,)
    assert kernel_first["block"]["bias"] is NESTED["block"]["bias"]  # whose sharding the state follows
    shadowed = ao.ByPath({"head": "tensor", "head/kernel": ao.Axis(0)})
    assert jax.tree.map(jnp.shape, shadowed.template(NESTED)["head"]) == {"bias": (), "kernel": ()}


def test_parts_of_a_masked_tree():
    hidden = NESTED | {"head": {"bias": None, "kernel": optax.MaskedNode()}}
    labels = ao.Labels.by_path({"bias": 0, "head": 1}, default=2)  # which finds its patterns in hidden leaves
    pooled = ao.ByPath({"block/bias": labels, "head": "tensor"}).pool(hidden)
    assert jax.tree.structure(pooled) == jax.tree.structure(hidden)
    assert pooled["block"]["bias"].shape == () and pooled["block"]["kernel"].shape == (2, 2)


def test_the_direction_by_path_keeps_its_bound():
    tx = ao.verified(ao.scale_by_adam(eps=0.0, granularity=ao.ByPath(PARTS, default="tensor")))
    grads, params = gradients("float32", steps=8), parameters("float32")
    state = tx.init(params)
    for t in range(8):  # verified checks the bound in each group
        updates, state = tx.update({path: jnp.asarray(g[t]) for path, g in grads.items()}, state)
    alone = ao.scale_by_adam(eps=0.0, granularity="global")
    part = {path: grads[path] for path in ("head/bias", "head/empty")}
    state = alone.init({path: params[path] for path in part})
    for t in range(8):
        expected, state = alone.update({path: jnp.asarray(g[t]) for path, g in part.items()}, state)
    jax.tree.map(np.testing.assert_array_equal, {path: updates[path] for path in part}, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ao.ByPath("kernel"), r"patterns must be a mapping \{pattern: granularity\}, got 'kernel'"),
        (lambda: ao.ByPath({"(": "tensor"}), r"patterns must be regular expressions, got '\(': "),
        (
            lambda: ao.ByPath({b"a": "tensor"}),
            "patterns must be regular expressions, got b'a', which is not a string",
        ),
        (lambda: ao.ByPath({"a": "axis"}), r"The granularity of 'a' must be Coordinate\(\), .* got 'axis'"),
        (lambda: ao.ByPath({}, default=None), r"default must be Coordinate\(\), .* got None"),
        (lambda: ao.ByPath({}, strict=1), "strict must be True or False, got 1"),
        (
            lambda: ao.ByPath({"head": "tensor", "tail": "tensor"}).template(NESTED),
            "The pattern 'tail' matches no leaf; the leaves are block/bias, block/kernel, head/bias",
        ),
    ],
)
def test_what_is_no_granularity_by_path_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_patterns_for_many_models_need_not_match():
    assert ao.ByPath({"tail": "tensor"}, strict=False).template(NESTED) == NESTED


def test_a_granularity_by_path_is_static():
    granularity = ao.ByPath({"a": "tensor", "b": ao.Axis(0)}, default="global")
    for other in (copy.deepcopy(granularity), pickle.loads(pickle.dumps(granularity))):
        assert other == granularity and hash(other) == hash(granularity)
    assert granularity != ao.ByPath({"b": ao.Axis(0), "a": "tensor"}, default="global")  # the order tells
    assert repr(granularity).startswith("ByPath(items=(('a', Tensor(reduce='mean')), ('b', Axis(")
    with pytest.raises(AttributeError):
        granularity.default = ao.Tensor()


# --- Granularities against each other -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine():
    return run(ao.scale_by_rms(0.95), gradients("float32"), parameters("float32")).states.nu


@pytest.mark.parametrize("name", COARSE)
def test_a_coarse_moment_is_the_pooled_fine_moment_at_every_step(name, fine):
    granularity, pooling = GRANULARITIES[name]
    params = parameters("float32")
    coarse = run(ao.scale_by_rms(0.95, granularity=granularity), gradients("float32"), params).states.nu
    steps = len(fine["scale"])
    pooled = [pooling({path: np.float64(leaf[t]) for path, leaf in fine.items()}) for t in range(steps)]
    expected = {path: np.stack([tree[path] for tree in pooled]) for path in SHAPES}
    each = [
        laid_out(granularity, jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), coarse), params)
        for t in range(steps)
    ]
    result = {path: np.stack([tree[path] for tree in each]) for path in SHAPES}
    assert_close(result, expected, REFERENCE["float32"])


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        pytest.param(ao.Labels(lambda path, leaf: "one"), "global", id="one label"),
        pytest.param(ao.Labels(lambda path, leaf: path), "tensor", id="a label a leaf"),
    ],
)
def test_extreme_labels_are_other_granularities(labels, same):
    grads, params = gradients("float32"), parameters("float32")
    ours = run(ao.scale_by_rms(granularity=labels), grads, params)
    other = run(ao.scale_by_rms(granularity=same), grads, params)
    assert_close(ours.updates, other.updates, 1e-6)  # the same sums, perhaps in another order


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        ("tensor", ()),
        ("global", ()),
        (ao.Labels(lambda path, leaf: path), (2,)),
        (ao.Labels.by_path({"kernel": 0}, default=0), (1,)),
        (ao.Axis(0), (1, 1000)),
        (ao.Axis(-1), (1000, 1)),
        ("coordinate", (1000, 1000)),
    ],
)
def test_a_coarse_moment_takes_no_memory(granularity, shape):
    params = {"bias": jnp.zeros(()), "kernel": jnp.zeros((1000, 1000))}
    per_leaf = isinstance(granularity, ao.Axis) or granularity in ("tensor", "coordinate")
    for tx in (ao.scale_by_rms(granularity=granularity), ao.scale_by_adam(granularity=granularity)):
        state = tx.init(params)
        _, after = tx.update(params, state)
        for nu in (state.nu, after.nu):
            nu = nu["kernel"] if per_leaf else nu
            assert isinstance(nu, jax.Array) and nu.shape == shape and nu.dtype == jnp.float32
    cost = sum(leaf.nbytes for leaf in jax.tree.leaves(ao.scale_by_rms(granularity=granularity).init(params)))
    scalars = 4 * (1 + 3 + (1 if per_leaf else 0))  # count, decay, eps, nu_weight, and the bias' moment
    assert cost == 4 * int(np.prod(shape)) + scalars


# --- Averages and their weights -----------------------------------------------------------------------------


def averaged(decay, statistics, dtype):
    """The average and its weight after each step."""

    @jax.jit
    def scan(statistics):
        def step(carry, count_and_new):
            count, new = count_and_new
            x, w = carry
            b = decay_at(decay, count, dtype)
            x, w = ema(x, new, b), ema_weight(w, b)
            return (x, w), (x, w)

        start = (jnp.zeros_like(statistics[0]), jnp.zeros((), dtype))
        return jax.lax.scan(step, start, (jnp.arange(len(statistics)), statistics))[1]

    x, w = scan(jnp.asarray(statistics, dtype))
    assert x.dtype == w.dtype == dtype
    return np.asarray(x, np.float64), np.asarray(w, np.float64)


EMA_DECAYS = {
    "0.999": 0.999,
    "0.9": 0.9,
    "0.5": 0.5,
    "0.3": 0.3,
    "0": 0.0,
    "moving": decays(0, 900, 1024),
    "moving slowly": decays(1, 20, 4096),
    "running mean": lambda count: count / (count + 1),
}


@pytest.mark.parametrize("name", EMA_DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averages_and_weights_are_exact_for_any_decays(name, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    decay = EMA_DECAYS[name]
    statistics = np.float32(10 ** np.random.default_rng(0).uniform(-6, 6, (100, 8)))
    x, w = averaged(decay, statistics, jnp.dtype(dtype))
    values = [float(decay(t)) if callable(decay) else decay for t in range(100)]
    average = MovingAverage()
    for t in range(100):
        average.append({"x": np.float64(statistics[t])}, values[t])
        np.testing.assert_allclose(x[t], average.value()["x"], rtol=REFERENCE[dtype])
        np.testing.assert_allclose(w[t], ema_weights(values[: t + 1]).sum(), rtol=REFERENCE[dtype])
        np.testing.assert_allclose(x[t] / w[t], average.debiased()["x"], rtol=REFERENCE[dtype])
    if name == "running mean":
        means = np.cumsum(np.float64(statistics), axis=0) / np.arange(1, 101)[:, None]
        np.testing.assert_allclose(x, means, rtol=REFERENCE[dtype])


CONSTANTS = np.array([1.0, 1.1, 1.3, 1.7, 1.99, 0.3, 1e-6, 3e8])


def test_an_average_that_is_there_stays_there():
    # b x + (1 - b) x with both factors rounded to float32 would settle 1.3e-5 above x.
    b = decay_at(0.999, jnp.zeros((), jnp.int32), jnp.float32)
    start = jnp.asarray(CONSTANTS, jnp.float32)
    end = jax.jit(lambda s: jax.lax.fori_loop(0, 20_000, lambda _, x: ema(x, s, b), s))(start)
    np.testing.assert_array_equal(end, start)


def test_an_average_of_a_constant_is_within_the_sum_of_its_roundings():
    # A step rounds x by at most half a unit in the last place, 2**-24 x, and later steps shrink that by b: in
    # all 2**-24 / (1 - b) = 6e-5. It comes to that: x stops once (1 - b)(s - x) is less than half a unit.
    x, w = averaged(0.999, np.tile(CONSTANTS, (20_000, 1)), jnp.dtype("float32"))
    weights = -np.expm1(np.arange(1, 20_001) * np.log(0.999))
    for values in (x / np.float32(CONSTANTS), w[:, None]):
        assert np.abs(values / weights[:, None] - 1).max() < 1.01 * 2**-24 / 0.001
        assert values.max() <= 1  # it never overshoots


def test_a_long_average_of_a_noisy_statistic_has_no_bias():
    # Rounding errors of 2**-24 / sqrt(3) each, forgotten after 500 steps: a standard deviation of 8e-7, and
    # 5e-6 is six of these. The form with two rounded factors is 1.5e-5 off.
    statistics = np.float32(np.random.default_rng(0).normal(size=(20_000, 4)) ** 2)
    x, _ = averaged(0.999, statistics, jnp.dtype("float32"))
    exact = np.zeros(4)
    for t, new in enumerate(np.float64(statistics)):
        exact = 0.999 * exact + 0.001 * new
        if t % 100 == 99:
            np.testing.assert_allclose(x[t], exact, rtol=5e-6)

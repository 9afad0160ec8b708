"""RMS scaling: against the reference and optax step by step, special cases, bounds and invariances."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from reference.moments import Pooling
from reference.rms import RmsReference
from tolerances import OPTAX, REFERENCE
from trajectories import (
    FEW,
    GRANULARITIES,
    LENGTH,
    SHAPES,
    STEPS,
    WIDTH,
    Table,
    assert_a_nan_is_not_hidden,
    assert_close,
    assert_zeros_do_not_move,
    at_step,
    decays,
    flat_of,
    gradients,
    parameters,
    run,
    run_reference,
    sequences,
    signs,
    tree_of,
)

import adaptive_optax as ao

# Arguments that the library, the reference and optax share; "granularity" names a pair of GRANULARITIES.
VARIANTS = {
    "default": {},
    "no eps, long memory": {"decay": 0.999, "eps": 0.0},
    "eps beside the root": {"decay": 0.99, "eps": 1e-4, "eps_in_sqrt": False},
    "short memory": {"decay": 0.3, "eps": 1e-5},
    "initial scale": {"decay": 0.99, "initial_scale": 1.0},
    "corrected": {"decay": 0.99, "eps": 1e-4, "eps_in_sqrt": False, "bias_correction": True},
    "corrected, initial scale": {"bias_correction": True, "initial_scale": 1.0},
    "centered": {"decay": 0.95, "centered": True, "eps": 1e-4, "eps_in_sqrt": False},
    "centered, initial scale": {"centered": True, "initial_scale": 1.0},
    "centered, corrected": {"centered": True, "bias_correction": True},
    "centered, corrected, initial scale": {"centered": True, "bias_correction": True, "initial_scale": 1.0},
    "centered labels": {"centered": True, "granularity": "labels"},
    "centered tensors, corrected": {"centered": True, "bias_correction": True, "granularity": "tensor"},
    "moving": {"decay": decays(0, 300, 1024), "initial_scale": 1.0},
    "moving, corrected": {"decay": decays(1, 1000, 1024), "bias_correction": True},
    "moving, centered, corrected": {"decay": decays(3, 300, 1024), "centered": True, "bias_correction": True},
    "corrected global sum": {"bias_correction": True, "granularity": "global, sum"},
} | {name: {"granularity": name} for name in GRANULARITIES if name != "coordinate"}

# What optax has too; it divides initial_scale by 1 - b**t as well, and centres by a difference.
IN_OPTAX = [
    "default",
    "eps beside the root",
    "short memory",
    "initial scale",
    "corrected",
    "centered",
    "centered, corrected",
]


def ours(granularity="coordinate", **arguments):
    return ao.scale_by_rms(granularity=GRANULARITIES[granularity][0], **arguments)


def paths_of(name):
    return SHAPES if "granularity" in VARIANTS[name] else FEW


@functools.cache
def expected(name):
    arguments = dict(VARIANTS[name])
    pooling = GRANULARITIES[arguments.pop("granularity", "coordinate")][1]
    return run_reference(RmsReference(pooling=pooling, **arguments), gradients("float64", paths_of(name)))


@functools.cache
def computed(name, dtype, centered):
    grads = gradients(dtype, paths_of(name), centered=centered)
    return run(ours(**VARIANTS[name]), grads, parameters(dtype, paths_of(name))).updates


# --- Step by step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_the_reference(name, dtype):
    assert_close(computed(name, dtype, False), expected(name), REFERENCE[dtype])


@pytest.mark.parametrize("name", IN_OPTAX)
def test_matches_optax(name, dtype):
    # Centred, the gradients have no mean: then the floor, which optax lacks, is not reached. If corrected
    # too, the variance of the first gradients is near 0 and optax's difference cancels: they are left out.
    arguments = dict(VARIANTS[name])
    centered = arguments.pop("centered", False)
    factory = optax.scale_by_stddev if centered else optax.scale_by_rms
    theirs = run(
        factory(**arguments), gradients(dtype, FEW, centered=centered), parameters(dtype, FEW)
    ).updates
    skip = 20 if name == "centered, corrected" else 0
    assert_close(computed(name, dtype, centered), theirs, OPTAX[dtype], skip=skip)


def test_eps_may_be_a_schedule():
    # eps has no part in the state, so each step is that of a run with this step's eps.
    values = (1e-8, 1e-3)
    moving = Table(tuple(values[t % 3 == 0] for t in range(STEPS)))
    grads, params = gradients("float32", FEW), parameters("float32", FEW)
    for in_sqrt in (True, False):
        result = run(ao.scale_by_rms(eps=moving, eps_in_sqrt=in_sqrt), grads, params)
        fixed = [run_reference(RmsReference(eps=eps, eps_in_sqrt=in_sqrt), grads) for eps in values]
        mixed = {path: np.stack([fixed[t % 3 == 0][path][t] for t in range(STEPS)]) for path in FEW}
        assert_close(result.updates, mixed, REFERENCE["float32"])
        np.testing.assert_array_equal(result.states.eps, np.float32(moving.values))


def test_global_rms_is_the_global_granularity():
    grads, params = gradients("float32"), parameters("float32")
    arguments = {"decay": 0.95, "eps": 1e-3, "initial_scale": 2.0, "eps_in_sqrt": False, "centered": True}
    for corrected in (True, False):
        tx = ao.scale_by_global_rms(**arguments, bias_correction=corrected)
        reference = RmsReference(**arguments, bias_correction=corrected, pooling=Pooling("global"))
        assert_close(run(tx, grads, params).updates, run_reference(reference, grads), REFERENCE["float32"])


@pytest.mark.parametrize(
    "arguments", [{"bias_correction": True, "granularity": "global"}, {"centered": True}], ids=str
)
def test_bfloat16_gradients_give_what_their_float32_values_give(arguments):
    grads, params = gradients("bfloat16", steps=1000), parameters("bfloat16")
    widened = jax.tree.map(lambda g: g if np.iscomplexobj(g) else np.float32(g), grads)
    low = run(ao.scale_by_rms(**arguments), grads, params)
    high = run(ao.scale_by_rms(**arguments), widened, parameters("float32"))
    assert all(u.dtype in (np.float32, np.complex64) for u in low.updates.values())
    assert_close(low.updates, high.updates, 1e-6)
    for name in ("nu", "nu_weight"):
        jax.tree.map(np.testing.assert_array_equal, getattr(low.states, name), getattr(high.states, name))


# --- Special cases ------------------------------------------------------------------------------------------


def test_with_a_running_mean_it_is_adagrad_norm(x64):
    # b_t = (t - 1)/t makes v_t the mean of |g_1|^2 .. |g_t|^2, so t v_t is AdaGrad-Norm's accumulator
    # b_t^2 = sum_j |g_j|^2 (Ward, Wu and Bottou 2019) and its step g / b_t is u_t / sqrt(t).
    grads = gradients("float64")
    mean = Table(tuple(np.arange(STEPS) / np.arange(1, STEPS + 1)))
    tx = ao.scale_by_rms(mean, eps=0.0, granularity=ao.Global("sum"))
    result = run(tx, grads, parameters("float64"))
    norms = sum(np.sum(np.abs(g.reshape(STEPS, -1)) ** 2, axis=1) for g in grads.values())
    accumulated = np.sqrt(np.cumsum(norms))
    t = np.arange(1, STEPS + 1)
    steps = {
        path: np.moveaxis(np.moveaxis(u, 0, -1) / np.sqrt(t), -1, 0) for path, u in result.updates.items()
    }
    wanted = {path: np.moveaxis(np.moveaxis(g, 0, -1) / accumulated, -1, 0) for path, g in grads.items()}
    assert_close(steps, wanted, REFERENCE["float64"])


def test_without_memory_it_is_normalised_gradient_descent():
    grads = gradients("float32")
    result = run(ao.scale_by_rms(0.0, 0.0, granularity=ao.Global("sum")), grads, parameters("float32"))
    norms = sum(np.sum(np.abs(u.reshape(STEPS, -1)) ** 2, axis=1) for u in result.updates.values())
    np.testing.assert_allclose(norms, 1.0, rtol=REFERENCE["float32"])
    signs = run(ao.scale_by_rms(0.0, 0.0), grads, parameters("float32"))
    unit = {path: g / np.where(g == 0, 1, np.abs(g)) for path, g in grads.items()}
    assert_close(signs.updates, unit, REFERENCE["float32"])


def test_a_group_of_equal_magnitudes_is_like_a_coordinate():
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 2, (50, 1))
    grads = {
        "a": np.float32(size * rng.choice([-1, 1], (50, 4))),
        "b": np.float32(size * rng.choice([-1, 1], (50, 3))),
    }
    params = at_step(grads, 0)
    fine = run(ao.scale_by_rms(), grads, params).updates
    for name in ("tensor", "global", ao.Axis(0), ao.Labels(lambda path, leaf: 0)):
        assert_close(
            run(ao.scale_by_rms(granularity=name), grads, params).updates, fine, REFERENCE["float32"]
        )


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("granularity", ["coordinate", "global"])
def test_a_constant_gradient_centred_has_a_bounded_direction(corrected, granularity):
    # Its variance decays to 0: the floor 0.01 v bounds |u| by 1 / sqrt(0.01 (1 - b)), by 10 if corrected, and
    # 10 is where it ends. In v - m^2 the variance is nothing but rounding errors.
    grads = {"w": np.full((500, 3), 1e3, np.float32)}
    tx = ao.scale_by_rms(centered=True, bias_correction=corrected, eps=0.0, granularity=granularity)
    u = run(tx, grads, at_step(grads, 0)).updates["w"]
    np.testing.assert_allclose(u[-1], 10.0, rtol=REFERENCE["float32"])
    assert np.all(u > 0) and np.all(u <= (10.0 if corrected else 1 / np.sqrt(0.01 * 0.1)) * (1 + 1e-6))


def test_the_centred_moment_is_the_variance_and_never_negative():
    grads = gradients("float32", FEW)
    states = run(ao.scale_by_rms(centered=True), grads, parameters("float32", FEW)).states
    reference = RmsReference()
    run_reference(reference, grads)
    mean, square = reference.first.value(), reference.second.value()
    for path in FEW:
        assert (states.nu[path] >= 0).all()
        np.testing.assert_allclose(
            states.nu[path][-1], square[path] - np.abs(mean[path]) ** 2, rtol=REFERENCE["float32"]
        )


DEGENERATE = [
    {},
    {"eps_in_sqrt": False},
    {"bias_correction": True},
    {"centered": True},
    {"centered": True, "bias_correction": True},
    {"granularity": "tensor"},
    {"granularity": ao.Axis(0)},
    {"granularity": ao.Labels(lambda path, leaf: 0)},
    {"granularity": "global"},
]


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("arguments", DEGENERATE, ids=lambda arguments: "-".join(arguments) or "defaults")
def test_degenerate_gradients(arguments, eps):
    assert_zeros_do_not_move(ao.scale_by_rms(eps=eps, **arguments))
    assert_a_nan_is_not_hidden(ao.scale_by_rms(eps=eps, **arguments))


# --- Invariances --------------------------------------------------------------------------------------------

INVARIANT = {
    "coordinate": (ao.Coordinate(), Pooling()),
    "axis": (ao.Axis(-1), Pooling("axis", (-1,))),
    "tensor": (ao.Tensor(), Pooling("tensor")),
    "tensor, sum": (ao.Tensor("sum"), Pooling("tensor", reduce="sum")),
    "labels": (ao.Labels(lambda path, leaf: 0), Pooling("labels", labels={"a": 0, "b": 0})),
    "global": (ao.Global(), Pooling("global")),
}


@functools.cache
def compiled(name, corrected=False, decay=0.9):
    tx = ao.scale_by_rms(decay, 0.0, bias_correction=corrected, granularity=INVARIANT[name][0])
    return tx, jax.jit(tx.update)


def directions(name, flat, corrected=False, decay=0.9):
    """Directions, (LENGTH, WIDTH), and the square root of each coordinate's second moment."""
    tx, step = compiled(name, corrected, decay)
    state = tx.init(tree_of(np.zeros(WIDTH, np.float32)))
    rows, scales = [], []
    for g in flat:
        u, state = step(tree_of(g), state)
        rows.append(u)
        spread = INVARIANT[name][0].spread(state.nu, u)
        scales.append(jax.tree.map(lambda v, u: np.sqrt(np.broadcast_to(v, u.shape)), spread, u))
    stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
    return flat_of(stack(*rows)), flat_of(stack(*scales))


names = st.sampled_from(sorted(INVARIANT))


@given(sequences(), names, st.booleans(), st.integers(-20, 20), st.sampled_from([0.01, 0.3, 0.7, 3.0, 97.0]))
def test_the_direction_does_not_depend_on_the_gradients_scale(flat, name, corrected, exponent, factor):
    plain, _ = directions(name, flat, corrected)
    doubled, _ = directions(name, flat * np.float32(2.0**exponent), corrected)
    np.testing.assert_array_equal(doubled, plain)
    scaled, _ = directions(name, flat * np.float32(factor), corrected)
    np.testing.assert_allclose(scaled, plain, rtol=REFERENCE["float32"])


@given(
    sequences(),
    st.permutations(range(WIDTH)),
    signs(),
)
def test_coordinates_do_not_see_each_other(flat, order, signs):
    plain, _ = directions("coordinate", flat)
    moved, _ = directions("coordinate", flat[:, order] * signs)
    np.testing.assert_allclose(moved, plain[:, order] * signs, rtol=REFERENCE["float32"])


@given(sequences(), names, st.booleans(), st.sampled_from([0.0, 0.9]))
def test_the_directions_length_in_a_group_is_bounded(flat, name, corrected, decay):
    # g_t^2 enters v_t with weight 1 - b, so RMS(u) <= 1/sqrt(1 - b), and sqrt((1 - b^t)/(1 - b)) corrected.
    u, _ = directions(name, flat, corrected, decay)
    t = np.arange(1, LENGTH + 1)[:, None]
    bound = np.sqrt(((1 - decay**t) if corrected else 1.0) / (1 - decay)) * np.ones((1, WIDTH))
    pooling = INVARIANT[name][1]
    lengths = np.stack([flat_of(pooling(tree_of(np.float64(row) ** 2))).squeeze(0) for row in u])
    assert (np.sqrt(lengths) <= bound * (1 + 1e-6)).all()


def test_the_bound_on_the_length_is_attained():
    flat = np.zeros((LENGTH, WIDTH), np.float32)
    flat[-1] = np.linspace(-3, 3, WIDTH)
    for name, (_, pooling) in INVARIANT.items():
        u, _ = directions(name, flat)
        lengths = flat_of(pooling(tree_of(np.float64(u[-1]) ** 2)))
        np.testing.assert_allclose(np.sqrt(lengths), np.sqrt(10), rtol=1e-6, err_msg=name)


@given(sequences(), names)
def test_the_direction_descends(flat, name):
    # Kantorovich: with u_i = g_i / r_k and kappa the ratio of the largest to the smallest r_k,
    # cos(u, g) >= 2 sqrt(kappa) / (1 + kappa). Groups whose gradients are 0 have no part in it.
    u, r = directions(name, flat)
    for g, u_t, r_t in zip(np.float64(flat), np.float64(u), np.float64(r), strict=True):
        if not g.any():
            continue
        cosine = g @ u_t / (np.linalg.norm(g) * np.linalg.norm(u_t))
        kappa = r_t[g != 0].max() / r_t[g != 0].min()
        assert cosine >= 2 * np.sqrt(kappa) / (1 + kappa) - 1e-6
        if name in ("global", "labels"):
            assert cosine == pytest.approx(1, abs=1e-6)


def rotation(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@pytest.mark.parametrize(
    ("granularity", "turned", "equivariant"),
    [
        ("global", "tree", True),
        (ao.Labels(lambda path, leaf: 0), "tree", True),
        ("tensor", "leaf", True),
        (ao.Axis(-1), "rows", True),
        ("coordinate", "tree", False),
        ("tensor", "tree", False),
        (ao.Axis(0), "rows", False),
        ("coordinate", "rows", False),
    ],
)
def test_rotations(granularity, turned, equivariant):
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, WIDTH)) * 10 ** rng.uniform(-1, 1, WIDTH)
    q = np.eye(WIDTH)
    if turned == "tree":
        q = rotation(WIDTH)
    elif turned == "leaf":
        q[:6, :6], q[6:, 6:] = rotation(6), rotation(2)
    else:  # both rows of the matrix by the same rotation of their three entries
        q[:6, :6] = np.kron(np.eye(2), rotation(3))
    params = tree_of(np.zeros(WIDTH, np.float32))
    tx = ao.scale_by_rms(granularity=granularity)
    plain = flat_of(run(tx, tree_of(np.float32(flat)), params).updates)
    result = flat_of(run(tx, tree_of(np.float32(flat @ q.T)), params).updates)
    gap = np.linalg.norm(result - plain @ q.T, axis=1) / np.linalg.norm(plain, axis=1)
    if equivariant:
        assert gap.max() < 1e-5
    else:
        assert gap.min() > 0.01 and gap.max() > 0.3


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("decay", [0.9, 0.0, lambda count: jnp.where(count == 5, 0.0, 0.9)])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_a_square_that_overflows_stops_its_coordinate_and_makes_nothing_nan(
    centered, bias_correction, decay, at
):
    tx = ao.scale_by_rms(decay, centered=centered, bias_correction=bias_correction)
    state = tx.init(jnp.ones(2))
    step = jax.jit(tx.update)
    for count in range(8):
        updates, state = step(jnp.array([1e20 if count == at else 1.0, 1.0]), state)
        assert all(not jnp.isnan(x).any() for x in jax.tree.leaves((updates, state)))
        if at <= count < 5 and not callable(decay) and decay:
            assert updates[0] == 0

"""Adam: against the reference and optax step by step, special cases, its tight bound and its invariances."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from reference.adam import AdamReference, extremal_sequence, tight_bound
from reference.moments import Pooling, ema_weights
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
from adaptive_optax.transforms.direction import bound_of

B1S, B2S = decays(0, 40, 64), decays(1, 200, 1024)
EPS = Table(tuple(2.0 ** np.random.default_rng(2).integers(-20, -6, STEPS)))
MOVING = {"b1": B1S, "b2": B2S, "eps": EPS}

# Arguments that the library and the reference share; "granularity" names a pair of GRANULARITIES.
VARIANTS = {
    "paper": {},
    "short memory": {"b1": 0.3, "b2": 0.4, "eps": 1e-3},
    "eps_root": {"eps": 1e-4, "eps_root": 1e-5},
    "tensorflow": {"b2": 0.99, "eps": 1e-4, "eps_form": "tensorflow"},
    "nesterov": {"nesterov": True},
    "nesterov, uncorrected": {"nesterov": True, "bias_correction": False},
    "amsgrad": {"amsgrad": True},
    "amsgrad, tensorflow": {"b2": 0.9, "amsgrad": True, "eps": 1e-4, "eps_form": "tensorflow"},
    "amsgrad, uncorrected": {"b2": 0.9, "amsgrad": True, "bias_correction": False},
    "tensorflow, uncorrected": {"bias_correction": False, "eps_form": "tensorflow", "eps_root": 1e-6},
    "moving": MOVING,
    "moving, nesterov": MOVING | {"nesterov": True},
    "moving, amsgrad, tensorflow": MOVING | {"amsgrad": True, "eps_form": "tensorflow"},
    "moving, uncorrected": MOVING | {"bias_correction": False},
    "everything, labels": MOVING
    | {
        "eps_root": 1e-6,
        "eps_form": "tensorflow",
        "nesterov": True,
        "amsgrad": True,
        "granularity": "labels",
    },
    "tensorflow, axis": {"eps": 1e-4, "eps_form": "tensorflow", "granularity": "axis -1, sum"},
    "tensors": {"granularity": "tensor"},
    "labels": {"granularity": "labels, sum"},
    "global": {"granularity": "global"},
}

IN_OPTAX = {
    "paper": optax.scale_by_adam,
    "short memory": optax.scale_by_adam,
    "eps_root": optax.scale_by_adam,
    "nesterov": optax.scale_by_adam,
    "amsgrad": optax.scale_by_amsgrad,
}


def ours(granularity="coordinate", **arguments):
    return ao.scale_by_adam(granularity=GRANULARITIES[granularity][0], **arguments)


def paths_of(name):
    return SHAPES if "granularity" in VARIANTS[name] else FEW


@functools.cache
def expected(name):
    arguments = dict(VARIANTS[name])
    pooling = GRANULARITIES[arguments.pop("granularity", "coordinate")][1]
    return run_reference(AdamReference(pooling=pooling, **arguments), gradients("float64", paths_of(name)))


@functools.cache
def computed(name, dtype):
    paths = paths_of(name)
    return run(ours(**VARIANTS[name]), gradients(dtype, paths), parameters(dtype, paths))


# --- Step by step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_the_reference(name, dtype):
    assert_close(computed(name, dtype).updates, expected(name), REFERENCE[dtype], terms=expected(name))


@pytest.mark.parametrize("name", IN_OPTAX)
def test_matches_optax(name, dtype):
    arguments = {key: value for key, value in VARIANTS[name].items() if key != "amsgrad"}
    theirs = run(IN_OPTAX[name](**arguments), gradients(dtype, FEW), parameters(dtype, FEW)).updates
    assert_close(computed(name, dtype).updates, theirs, OPTAX[dtype], terms=theirs)


@pytest.mark.parametrize("arguments", [{}, {"nesterov": True}], ids=str)
def test_mu_dtype_is_near_the_reference_and_optax(arguments):
    real = ("head/bias", "head/kernel", "scale")  # optax would make a complex moment real
    grads, params = gradients("float32", real), parameters("float32", real)
    result = run(ao.scale_by_adam(mu_dtype="bfloat16", **arguments), grads, params)
    exact = run_reference(AdamReference(**arguments), grads)
    assert_close(result.updates, exact, REFERENCE["bfloat16"], terms=exact)
    first = ({path: u[:1] for path, u in tree.items()} for tree in (result.updates, exact))
    assert_close(*first, REFERENCE["float32"])  # rounded is what is kept, not what is used
    theirs = run(optax.scale_by_adam(mu_dtype=jnp.bfloat16, **arguments), grads, params)
    for path in grads:
        assert result.states.mu[path].dtype == theirs.states.mu[path].dtype == jnp.bfloat16
        # optax rounds b1 and b1 m too: where gradients wane, its errors are relative to the older m.
        largest = np.abs(exact[path]).max(initial=0)
        assert (np.abs(result.updates[path] - theirs.updates[path]) <= REFERENCE["bfloat16"] * largest).all()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"nesterov": True, "amsgrad": True, "granularity": "global"}],
    ids=str,
)
def test_bfloat16_gradients_give_what_their_float32_values_give(arguments):
    grads, params = gradients("bfloat16", steps=1000), parameters("bfloat16")
    widened = jax.tree.map(lambda g: g if np.iscomplexobj(g) else np.float32(g), grads)
    low = run(ao.scale_by_adam(**arguments), grads, params)
    high = run(ao.scale_by_adam(**arguments), widened, parameters("float32"))
    assert all(u.dtype in (np.float32, np.complex64) for u in low.updates.values())
    assert_close(low.updates, high.updates, 1e-6, terms=high.updates)


# --- The scalars of the state -------------------------------------------------------------------------------

SCALARS = {
    "constant": {"b1": 0.9, "b2": 0.999},
    "equal": {"b1": 0.96875, "b2": 0.96875},
    "b1 0": {"b1": 0.0, "b2": 0.99},
    "moving": {"b1": B1S, "b2": B2S},
    "b1 moving": {"b1": decays(4, 60, 64), "b2": 0.99},
}


@pytest.mark.parametrize("name", SCALARS)
def test_the_state_holds_the_weights_and_the_tight_bound(name, x64):
    arguments = SCALARS[name]
    values = [
        [float(b(t)) if callable(b) else b for t in range(STEPS)] for b in (arguments["b1"], arguments["b2"])
    ]
    ones = np.ones((STEPS, 1))
    states = run(ao.scale_by_adam(**arguments), ones, ones[0]).states
    np.testing.assert_array_equal(states.count, np.arange(1, STEPS + 1))
    np.testing.assert_allclose((states.b1, states.b2), values, rtol=1e-15)
    sequences = [[sequence[: t + 1] for sequence in values] for t in range(STEPS)]
    weights = np.transpose([[ema_weights(sequence).sum() for sequence in pair] for pair in sequences])
    np.testing.assert_allclose((states.mu_weight, states.nu_weight), weights, rtol=1e-12)
    bounds = np.array([tight_bound(*pair, bias_correction=False) for pair in sequences])
    np.testing.assert_allclose(states.bound_sq, bounds**2, rtol=1e-10)
    for form in (
        {"bias_correction": corrected, "nesterov": nesterov}
        for corrected in (True, False)
        for nesterov in (True, False)
    ):
        limits = jax.vmap(bound_of(ao.scale_by_adam(**arguments, **form)).max_ratio)(states)
        bounds = [tight_bound(*pair, **form) for pair in sequences]
        np.testing.assert_allclose(limits, bounds, rtol=1e-10, err_msg=str(form))


def test_the_states_scalars_are_right_in_float32():
    states = computed("moving", "float32").states
    t = STEPS - 1
    b1s, b2s = B1S.values, B2S.values
    assert states.bound_sq.dtype == np.float32
    np.testing.assert_allclose(states.eps, EPS.values, rtol=0)
    np.testing.assert_allclose(states.mu_weight[t], ema_weights(b1s).sum(), rtol=REFERENCE["float32"])
    np.testing.assert_allclose(states.nu_weight[t], ema_weights(b2s).sum(), rtol=REFERENCE["float32"])
    np.testing.assert_allclose(
        np.sqrt(states.bound_sq[t]), tight_bound(b1s, b2s, False), rtol=REFERENCE["float32"]
    )


# --- The tight bound ----------------------------------------------------------------------------------------

PAIRS = [
    (0.9, 0.999),
    (0.9, 0.99),
    (0.9, 0.95),
    (0.95, 0.95),
    (0.0, 0.999),
    (0.5, 0.3),
    (0.0, 0.0),
    (0.3, 0.05),
]


@pytest.mark.parametrize(
    ("b1", "b2", "limit"),
    [
        (0.9, 0.999, 7.2703),
        (0.9, 0.99, 2.3452),
        (0.9, 0.95, 1.1650),
        (0.95, 0.95, 1.0),
        (0.0, 0.999, 31.6228),
        (0.0, 0.0, 1.0),
        (0.9, 0.81, math.inf),
        (0.9, 0.8, math.inf),
        (0.5, 0.0, math.inf),
    ],
)
def test_adam_bound_in_the_limit(b1, b2, limit):
    for corrected in (True, False):
        assert ao.adam_bound(b1, b2, bias_correction=corrected) == pytest.approx(limit, abs=5e-5)
    if math.isfinite(limit):
        assert ao.adam_bound(b1, b2, 20_000) == pytest.approx(ao.adam_bound(b1, b2), rel=1e-6)
        # (1 - b1)^2 b2 / ((1 - b2)(b2 - b1^2)) >= 1, with equality for b1 = b2 only
        assert ao.adam_bound(b1, b2) >= 1 - 1e-12 and (ao.adam_bound(b1, b2) < 1 + 1e-12) == (b1 == b2)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(("b1", "b2"), [*PAIRS, (0.9, 0.81), (0.9, 0.5)])
def test_adam_bound_is_the_references_at_every_step(b1, b2, corrected):
    for t in (1, 2, 3, 10, 57, 100):
        expected = tight_bound([b1] * t, [b2] * t, bias_correction=corrected)
        assert ao.adam_bound(b1, b2, t, bias_correction=corrected) == pytest.approx(expected, rel=1e-10)
    assert ao.adam_bound(b1, b2, 1) == pytest.approx(1.0, rel=1e-12)


def test_adam_bound_grows_past_what_a_float_holds():
    assert ao.adam_bound(0.9, 0.5, 1000) == pytest.approx(tight_bound([0.9] * 1000, [0.5] * 1000), rel=1e-9)
    assert ao.adam_bound(0.9, 0.5, 100_000) == math.inf


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": 0},
        {"count": 1.5},
        {"count": True},
        {"b1": 1.0},
        {"b1": -0.1},
        {"b2": 1.0},
        {"b2": math.nan},
        {"bias_correction": 1},
    ],
    ids=str,
)
def test_adam_bound_names_a_wrong_argument(arguments):
    with pytest.raises(ValueError, match=f"^{list(arguments)[0]} must be"):
        ao.adam_bound(**({"b1": 0.9, "b2": 0.999} | arguments))


ATTAINED = [
    *[(b1, b2, {}) for b1, b2 in ((0.9, 0.999), (0.9, 0.95), (0.95, 0.95), (0.0, 0.999), (0.9, 0.81))],
    *[(0.9, b2, {"bias_correction": False}) for b2 in (0.999, 0.81)],
    *[(0.9, b2, {"nesterov": True}) for b2 in (0.999, 0.95)],
    (0.9, 0.99, {"granularity": "global"}),
    (0.9, 0.99, {"amsgrad": True}),  # where the extremal gradients grow, b1 < b2
    (0.9, 0.99, {"eps_form": "tensorflow"}),
]


@pytest.mark.filterwarnings("ignore:b1..2 >= b2:UserWarning")
@pytest.mark.parametrize(("b1", "b2", "variant"), ATTAINED)
def test_the_bound_is_attained(b1, b2, variant, dtype):
    form = {key: value for key, value in variant.items() if key in ("bias_correction", "nesterov")}
    sequence = extremal_sequence(b1, b2, STEPS, **form)
    grads = {"a": np.outer(sequence, [1.0, -3.0]).astype(dtype)}
    if variant.get("granularity"):  # one group: equal magnitudes
        grads = {"a": np.sign(grads["a"]) * np.abs(grads["a"][:, :1])}
    tx = ao.scale_by_adam(b1, b2, eps=0.0, **variant)
    result = run(tx, grads, at_step(grads, 0))
    bound = tight_bound([b1] * STEPS, [b2] * STEPS, **form)
    rtol = {"float32": 1e-5, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(result.updates["a"][-1], [bound, -bound], rtol=rtol)


def test_a_lone_spike_gives_kingma_and_bas_ratio(x64):
    # (1 - b1)/sqrt(1 - b2) = 3.162 after a long silence: what their section 2.1 states as the bound.
    g = np.zeros((20_001, 1))
    g[-1] = 1.0
    tx = ao.scale_by_adam(eps=0.0)
    scan = jax.jit(lambda g: jax.lax.scan(lambda s, x: tx.update(x, s)[::-1], tx.init(g[0]), g)[1])
    np.testing.assert_allclose(scan(g)[-1], 0.1 / np.sqrt(0.001), rtol=1e-8)


# --- Special cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["coordinate", "tensor", "global"])
def test_without_first_moment_it_is_corrected_rms(granularity):
    grads, params = gradients("float32"), parameters("float32")
    adam = run(ao.scale_by_adam(0.0, 0.99, 1e-4, granularity=granularity), grads, params).updates
    rms = ao.scale_by_rms(0.99, 1e-4, eps_in_sqrt=False, bias_correction=True, granularity=granularity)
    assert_close(adam, run(rms, grads, params).updates, 1e-6)


@pytest.mark.parametrize(
    "form", [{}, {"eps_form": "tensorflow"}, {"amsgrad": True}, {"granularity": "tensor"}], ids=str
)
def test_a_constant_gradient_moves_by_exactly_the_learning_rate(form):
    sizes = np.array([1e-12, 1e-3, 1.1, -1.7, -1.0, 1e3, -1e12], np.float32)
    g = {"a": np.tile(sizes, (500, 1)), "b": np.full(500, 1.3, np.float32)}
    if "granularity" in form:
        g["a"] = np.copysign(np.float32(1.9), g["a"])
    tx = optax.chain(ao.scale_by_adam(eps=0.0, **form), ao.scale_by_learning_rate(0.25))
    updates = run(tx, g, at_step(g, 0)).updates
    assert_close(updates, {path: -0.25 * np.sign(x) for path, x in g.items()}, REFERENCE["float32"])


def test_reddis_counterexample():
    # f_t(x) = C x if t mod 3 = 1, else -x, on [-1, 1]: the sum over three steps, (C - 2) x, is least at -1.
    # With b1 = 0 and b2 = 1/(1 + C^2) Adam shrinks the one right gradient most and goes to +1 (theorem 1).
    c = 3.0
    t = jnp.arange(1, 6001)
    grads = jnp.where(t % 3 == 1, c, -1.0)

    def last(**arguments):
        tx = ao.scale_by_adam(0.0, 1 / (1 + c**2), 0.0, **arguments)

        def step(carry, inputs):
            x, state = carry
            t, g = inputs
            u, state = tx.update(g, state)
            x = jnp.clip(x - 0.5 / jnp.sqrt(t) * u, -1, 1)
            return (x, state), x

        return jax.lax.scan(step, (jnp.zeros(()), tx.init(jnp.zeros(()))), (t, grads))[1][-300:]

    @jax.jit
    def tails():
        return last(), last(amsgrad=True), last(amsgrad=True, bias_correction=False)

    adam, amsgrad, as_published = tails()
    np.testing.assert_allclose(adam, 1.0, atol=0.02)
    for path in (amsgrad, as_published):
        np.testing.assert_allclose(path, -1.0, atol=0.02)


def test_amsgrad_never_lets_the_second_moment_fall():
    states = computed("amsgrad", "float32").states
    for path, largest in states.nu_max.items():
        corrected = states.nu[path] / states.nu_weight.reshape(-1, *[1] * (largest.ndim - 1))
        np.testing.assert_allclose(largest, np.maximum.accumulate(corrected, axis=0), rtol=1e-6)
    assert computed("paper", "float32").states.nu_max is None


def test_the_tensorflow_form_is_the_papers_with_a_moving_eps(x64):
    # (sqrt(w2)/w1) m/(sqrt(v) + e) = m_hat/(sqrt(v_hat) + e/sqrt(w2))
    eps = Table(tuple(1e-4 / np.sqrt(1 - 0.99 ** np.arange(1, STEPS + 1))))
    grads, params = gradients("float64", FEW), parameters("float64", FEW)
    paper = run(ao.scale_by_adam(b2=0.99, eps=eps), grads, params).updates
    assert_close(computed("tensorflow", "float64").updates, paper, REFERENCE["float64"], terms=paper)


DEGENERATE = [
    {},
    {"eps_form": "tensorflow"},
    {"nesterov": True},
    {"amsgrad": True},
    {"bias_correction": False},
    {"mu_dtype": "bfloat16"},
    {"granularity": "tensor"},
    {"granularity": "global"},
]


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("arguments", DEGENERATE, ids=str)
def test_degenerate_gradients(arguments, eps):
    assert_zeros_do_not_move(ao.scale_by_adam(eps=eps, **arguments))
    assert_a_nan_is_not_hidden(ao.scale_by_adam(eps=eps, **arguments))


# --- Invariances --------------------------------------------------------------------------------------------

B1, B2 = 0.75, 0.875
FORMS = {
    "paper": {},
    "nesterov": {"nesterov": True},
    "amsgrad, tensorflow": {"amsgrad": True, "eps_form": "tensorflow"},
    "uncorrected": {"bias_correction": False},
    "axis": {"granularity": ao.Axis(-1)},
    "tensor": {"granularity": "tensor"},
    "global": {"granularity": "global"},
}


@functools.cache
def compiled(name):
    tx = ao.scale_by_adam(B1, B2, 0.0, **FORMS[name])
    return tx, jax.jit(tx.update)


def directions(name, flat):
    """Directions, (LENGTH, WIDTH)."""
    tx, step = compiled(name)
    state = tx.init(tree_of(np.zeros(WIDTH, np.float32)))
    rows = []
    for g in flat:
        u, state = step(tree_of(g), state)
        rows.append(u)
    return flat_of(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


@functools.cache
def limits(name):
    """The bounds on the directions' lengths, (LENGTH, 1)."""
    form = {key: value for key, value in FORMS[name].items() if key in ("bias_correction", "nesterov")}
    return np.array([[tight_bound([B1] * t, [B2] * t, **form)] for t in range(1, LENGTH + 1)])


names = st.sampled_from(sorted(FORMS))


@given(sequences(), names, st.integers(-20, 20), st.sampled_from([0.01, 0.3, 0.7, 3.0, 97.0]))
def test_the_direction_does_not_depend_on_the_gradients_scale(flat, name, exponent, factor):
    plain = directions(name, flat)
    doubled = directions(name, flat * np.float32(2.0**exponent))
    np.testing.assert_array_equal(doubled, plain)
    scaled = directions(name, flat * np.float32(factor))
    # A first moment that cancels is uncertain by the rounding of its terms, each at most the bound.
    np.testing.assert_allclose(scaled, plain, rtol=2e-6, atol=2e-6 * limits(name).max())


@given(
    sequences(),
    st.permutations(range(WIDTH)),
    signs(),
)
def test_coordinates_do_not_see_each_other(flat, order, signs):
    for name in ("paper", "nesterov", "amsgrad, tensorflow"):
        plain = directions(name, flat)
        moved = directions(name, flat[:, order] * signs)
        np.testing.assert_allclose(moved, plain[:, order] * signs, rtol=2e-6, atol=2e-6 * limits(name).max())


@given(sequences(), names)
def test_random_sequences_never_exceed_the_bound(flat, name):
    u = directions(name, flat)
    pool = {"axis": Pooling("axis", (-1,)), "tensor": Pooling("tensor"), "global": Pooling("global")}.get(
        name, Pooling()
    )
    lengths = np.stack([flat_of(pool(tree_of(np.float64(row) ** 2))).squeeze(0) for row in u])
    assert (np.sqrt(lengths) <= limits(name) * (1 + 1e-5)).all()


def test_the_global_form_is_rotation_equivariant_and_the_coordinate_form_is_not():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, WIDTH)) * 10 ** rng.uniform(-1, 1, WIDTH)
    q = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    params = tree_of(np.zeros(WIDTH, np.float32))
    for granularity, equivariant in (("global", True), ("coordinate", False)):
        tx = ao.scale_by_adam(granularity=granularity)
        plain = flat_of(run(tx, tree_of(np.float32(flat)), params).updates)
        turned = flat_of(run(tx, tree_of(np.float32(flat @ q.T)), params).updates)
        gap = np.linalg.norm(turned - plain @ q.T, axis=1) / np.linalg.norm(plain, axis=1)
        assert gap.max() < 1e-5 if equivariant else gap.min() > 0.1


@pytest.mark.parametrize(
    "decays", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.3), (0.9, lambda count: 0.99 * (count != 5))]
)
def test_a_square_that_overflows_makes_nothing_nan_and_telemetry_reads_it(decays):
    tx = ao.telemetry(ao.scale_by_adam(*decays))
    params = jnp.ones(2)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for count in range(8):
        updates, state = step(jnp.array([1e20 if count == 3 else 1.0, 1.0]), state, params)
        assert all(not jnp.isnan(x).any() for x in jax.tree.leaves((updates, state)))
    measured = ao.get_telemetry(state)
    assert jnp.isfinite(measured.bound_utilisation)

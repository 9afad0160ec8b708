"""Telemetry: known answers, an independent reference, and a state that is fixed, finite and cheap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import given
from flax import nnx
from reference import telemetry as reference
from reference.adam import AdamReference, tight_bound
from reference.moments import squared_modulus
from saving import same, spec, through_bytes, through_orbax
from test_flax import INPUTS, TARGETS, NnxModel
from trajectories import GRANULARITIES, SHAPES, gradients, parameters, run

import adaptive_optax as ao

PATHS = list(SHAPES)  # sorted, as JAX lists the leaves
B1, B2, EPS = 0.9, 0.99, 1e-6
UNDEFINED_BY_LABEL = ("snr", "bound_utilisation", "histogram")


def steps(tx, all_gradients, params, state=None):
    """The telemetry of each step, stacked, and the state after the last."""

    def body(state, g):
        updates, state = tx.update(g, state, params)
        return state, (updates, ao.get_telemetry(state))

    state = tx.init(params) if state is None else state
    state, (updates, seen) = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(state, all_gradients)
    return seen, state, updates


@functools.cache
def adamw_run(name, per):
    """A run of AdamW: gradients, updates and parameters of every step, and what telemetry saw."""
    grads = gradients("float32")
    tx = ao.telemetry(
        ao.adamw(
            ao.step_decay(0.1, 0.5, 30), B1, B2, EPS, weight_decay=0.1, granularity=GRANULARITIES[name][0]
        ),
        per=per,
    )
    result = run(tx, grads, parameters("float32"))
    return grads, result, jax.vmap(ao.get_telemetry)(result.states)


@pytest.mark.parametrize("per", ["tree", "tensor"])
def test_norms_rates_and_angles_are_those_of_the_reference(per):
    grads, result, seen = adamw_run("coordinate", per)
    groups = [[path] for path in PATHS] if per == "tensor" else [PATHS]
    for t in range(0, 100, 7):
        for i, paths in enumerate(groups):
            g, u, p = (
                reference.flat({path: tree[path][t] for path in paths}, paths)
                for tree in (grads, result.updates, result.params)
            )
            p = (p.astype(np.float32) + u.astype(np.float32)).astype(float)  # after the step
            size = sum(np.prod(SHAPES[path], dtype=int) for path in paths)
            for name, wanted in reference.geometry(g, u, p, size).items():
                found = getattr(seen, name)[t]
                # A projection cancels; its terms are as large as the norms.
                atol = 1e-6 if name == "cosine" else 0
                if name == "effective_learning_rate":
                    atol = 2e-6 * np.linalg.norm(u) / max(np.linalg.norm(g), 1e-300)
                np.testing.assert_allclose(
                    found[i] if per == "tensor" else found, wanted, rtol=5e-6, atol=atol, err_msg=name
                )
    np.testing.assert_allclose(seen.learning_rate, 0.1 * 0.5 ** (np.arange(100) // 30), rtol=1e-6)
    assert seen.count.tolist() == list(range(1, 101))


@pytest.mark.parametrize("per", ["tree", "tensor"])
@pytest.mark.parametrize("name", ["coordinate", "axis 0", "axes 0 and -2", "tensor", "global"])
def test_what_adam_s_moments_tell_is_what_the_reference_says(name, per):
    grads, _, seen = adamw_run(name, per)
    pooling = GRANULARITIES[name][1]
    history = [{path: np.asarray(leaf[t], np.complex128) for path, leaf in grads.items()} for t in range(100)]
    groups = [[path] for path in PATHS] if per == "tensor" else [PATHS]
    for t in (1, 2, 4, 9, 60, 99):
        moments = AdamReference(B1, B2, EPS, pooling=pooling)
        for g in history[: t + 1]:
            moments.first.append(g, B1)
            moments.second.append(pooling({path: squared_modulus(leaf) for path, leaf in g.items()}), B2)
        m_hat, v_hat = moments.first.debiased(), moments.second.debiased()
        lengths = pooling({p: squared_modulus(m_hat[p]) / (np.sqrt(v_hat[p]) + EPS) ** 2 for p in m_hat})
        bound = tight_bound([B1] * (t + 1), [B2] * (t + 1))
        rate = 0.1 * 0.5 ** (t // 30)
        for i, paths in enumerate(groups):
            at = (t, i) if per == "tensor" else (t,)
            if sum(np.prod(SHAPES[path], dtype=int) for path in paths) == 0:
                continue
            longest = max(lengths[path].max(initial=0) for path in paths)
            np.testing.assert_allclose(seen.bound_utilisation[at], longest**0.5 / bound, rtol=2e-5)
            if per == "tree" or name != "global":
                share = reference.signal_share(history[: t + 1], B1, B2, paths)
                np.testing.assert_allclose(seen.snr[at], share, atol=2e-5)
            else:
                assert np.isnan(seen.snr[at])
            edges = ao.Telemetry.histogram_edges
            rates = reference.rates(v_hat, rate, EPS, paths)
            counts, _ = np.histogram(np.clip(rates, edges[0], 0.999 * edges[-1]), bins=edges)
            found = seen.histogram[at] * len(rates)
            # A rate on the edge of a bin may fall on either side.
            assert np.abs(found - counts).sum() <= 2 and found.sum() == pytest.approx(len(rates), rel=1e-5)


# --- Known answers ------------------------------------------------------------------------------------------


def normal(shape, n, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, *shape)), jnp.float32)


def test_gradient_descent_has_cosine_one_and_its_own_rate():
    seen, _, _ = steps(ao.telemetry(ao.sgd(0.03)), normal((40,), 5), jnp.ones(40))
    np.testing.assert_allclose(seen.cosine, 1, rtol=1e-6)
    np.testing.assert_allclose(seen.effective_learning_rate, 0.03, rtol=2e-6)
    np.testing.assert_allclose(seen.learning_rate, 0.03, rtol=1e-6)
    assert np.isnan(seen.snr).all() and np.isnan(seen.bound_utilisation).all()
    assert np.isnan(seen.histogram).all()


def test_the_global_form_keeps_the_direction():
    tx = ao.telemetry(ao.global_rmsprop(0.03, decay=0.5))
    seen, state, _ = steps(tx, normal((40,), 5), jnp.ones(40))
    np.testing.assert_allclose(seen.cosine, 1, rtol=1e-6)
    nu = state.inner_state[0].nu
    np.testing.assert_allclose(seen.effective_learning_rate[-1], 0.03 / np.sqrt(nu), rtol=3e-6)


def test_pure_noise_has_no_signal():
    n = 5000
    seen, state, _ = steps(ao.telemetry(ao.adam(0.1)), normal((400,), n), jnp.ones(400))
    adam = state.inner_state[0]
    naive = np.square(adam.mu / adam.mu_weight) / (adam.nu / adam.nu_weight)
    assert np.mean(naive) == pytest.approx(0.1 / 1.9, abs=0.012)  # what it would read without the correction
    # Of 400 coordinates with |m|^2 / v of 0.053 and as large a deviation of each, over b1's ten steps or so.
    assert np.mean(seen.snr[100:]) < 0.003


@pytest.mark.parametrize(("mean", "share"), [(1.0, 0.5), (2.0, 0.8), (0.5, 0.2)])
def test_a_mean_under_noise_is_its_share(mean, share):
    seen, *_ = steps(ao.telemetry(ao.adam(0.1)), mean + normal((2000,), 400), jnp.ones(2000))
    assert np.mean(seen.snr[200:]) == pytest.approx(share, abs=0.01)
    assert seen.snr[5] == pytest.approx(share, abs=0.06)  # from the second step on


def test_constant_gradients_are_all_signal():
    seen, *_ = steps(ao.telemetry(ao.adam(0.1)), jnp.full((30, 5), 0.3), jnp.ones(5))
    assert np.isnan(seen.snr[0])
    np.testing.assert_allclose(seen.snr[1:], 1, atol=1e-5)
    bounds = [ao.adam_bound(0.9, 0.999, t) for t in range(1, 31)]
    np.testing.assert_allclose(seen.bound_utilisation, 1 / np.array(bounds), rtol=1e-4)


def test_growing_gradients_use_the_whole_bound():
    b1, b2 = 0.9, 0.95
    growth = jnp.asarray((b2 / b1) ** np.arange(300), jnp.float32)[:, None]
    seen, *_ = steps(ao.telemetry(ao.adam(0.1, b1, b2, eps=0.0)), growth * jnp.ones(3), jnp.ones(3))
    np.testing.assert_allclose(seen.bound_utilisation, 1, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64, jnp.bfloat16])
def test_norms_are_right_in_any_size(size, dtype):
    g = (size * jnp.array([3.0, 0.0, -4.0])).astype(dtype)
    tx = ao.telemetry(optax.scale(-0.5))
    updates, state = tx.update(g, tx.init(g), 2 * g)
    seen = ao.get_telemetry(state)
    rtol = 1e-2 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(seen.gradient_norm / np.float32(size), 5, rtol=rtol)
    np.testing.assert_allclose(seen.param_norm / np.float32(size), 7.5, rtol=rtol)  # after the step
    np.testing.assert_allclose(seen.update_norm / np.float32(size), 2.5, rtol=rtol)
    np.testing.assert_allclose([seen.cosine, seen.effective_learning_rate], [1, 0.5], rtol=rtol)


def test_zeros_and_empty_trees_are_zero():
    for params in (jnp.zeros(3), {}, {"a": jnp.zeros((0, 2))}):
        for per in ("tree", "tensor"):
            tx = ao.telemetry(ao.adam(0.1), per=per)
            state = tx.init(params)
            for _ in range(2):
                _, state = tx.update(params, state, params)
            seen = ao.get_telemetry(state)
            for name in ("gradient_norm", "update_norm", "param_norm", "effective_learning_rate", "cosine"):
                assert not np.any(getattr(seen, name)), name
            assert not np.any(seen.update_to_weight)
            if isinstance(params, jax.Array):
                assert not np.any(seen.snr) and not np.any(seen.bound_utilisation)


def test_uphill_is_negative():
    tx = ao.telemetry(optax.scale(0.5))
    seen, *_ = steps(tx, normal((5,), 1), jnp.ones(5))
    np.testing.assert_allclose(seen.cosine, -1, rtol=1e-6)
    np.testing.assert_allclose(seen.effective_learning_rate, -0.5, rtol=1e-6)


def test_a_plateau_is_in_the_rate():
    tx = ao.telemetry(optax.chain(ao.sgd(0.4), ao.reduce_on_plateau(0.5, patience=1)))
    state = tx.init(jnp.ones(2))
    for _ in range(2):
        _, state = tx.update(jnp.ones(2), state, value=1.0)
    seen = ao.get_telemetry(state)
    np.testing.assert_allclose([seen.learning_rate, seen.effective_learning_rate], 0.2, rtol=1e-6)


def test_every_group_has_its_own_rate():
    params = {"a": jnp.ones(4), "b": {"c": jnp.ones(6)}}
    groups = {"^a": ao.adam(0.7), "^b": optax.chain(ao.clip_by_global_norm(1e9), ao.adam(0.01))}
    for inner in (ao.partition_by_path(groups), optax.chain(ao.partition_by_path(groups), given_scale(0.25))):
        for per in ("tree", "tensor"):
            tx = ao.telemetry(inner, per=per)
            _, state = tx.update(params, tx.init(params), params)
            seen, edges = ao.get_telemetry(state), ao.Telemetry.histogram_edges
            scale = 1.0 if len(ao.get_hyperparams(state)) == 8 else 0.25
            places = [int(np.flatnonzero(edges <= scale * rate)[-1]) for rate in (0.7, 0.01)]
            expected = np.zeros((2, 40))
            expected[[0, 1], places] = 1
            if per == "tree":
                expected = (4 * expected[0] + 6 * expected[1]) / 10
            np.testing.assert_allclose(seen.histogram, expected, rtol=1e-5)
            assert np.isnan(seen.learning_rate)


def given_scale(scale):
    """A plateau that has fallen to a scale."""
    tx = given(ao.reduce_on_plateau(), value=1.0)
    return tx._replace(init=lambda params: tx.init(params)._replace(scale=jnp.float32(scale)))


def test_the_histogram_counts_coordinates_of_coarse_moments():
    params = {"a": jnp.ones((10, 4)), "b": jnp.ones(5)}
    grads = {"a": jnp.full((10, 4), 10.0), "b": jnp.full(5, 0.01)}
    rates = {"a": 0.1 / 10, "b": 0.1 / 0.01}
    for granularity in ("coordinate", "tensor", ao.Axis(0)):
        tx = ao.telemetry(ao.adam(0.1, granularity=granularity, eps=1e-12))
        _, state = tx.update(grads, tx.init(params), params)
        shares = ao.get_telemetry(state).histogram
        np.testing.assert_allclose(sorted(shares[shares > 0]), [5 / 45, 40 / 45], rtol=1e-5)
        edges = ao.Telemetry.histogram_edges
        for i, path in ((int(np.argmax(shares)), "a"), (int(np.flatnonzero(shares)[-1]), "b")):
            assert edges[i] * 0.999 <= rates[path] <= edges[i + 1] * 1.001


@pytest.mark.parametrize("storages", [("float32", "int8"), ("int8", "int8"), ("bfloat16", "float32")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_low_precision_moments_tell_the_same(storages, amsgrad):
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones(64)}
    grads = {"a": 0.5 + normal((64, 64), 40), "b": normal((64,), 40, 1)}
    mu, nu = storages
    low = ao.adam(0.1, b2=0.99, mu_storage=mu, nu_storage=nu, amsgrad=amsgrad)
    (seen, *_), (expected, *_) = (
        steps(ao.telemetry(tx, per="tensor"), grads, params)
        for tx in (low, ao.adam(0.1, b2=0.99, amsgrad=amsgrad))
    )
    np.testing.assert_allclose(seen.snr, expected.snr, atol=0.03)
    np.testing.assert_allclose(seen.histogram.sum(axis=-1), 1, rtol=1e-5)
    # The stored moments are rounded, after the direction was taken.
    np.testing.assert_allclose(seen.bound_utilisation, expected.bound_utilisation, rtol=0.3)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("params", [jnp.ones((3, 4)), {"a": jnp.ones((3, 4))}], ids=["array", "tree"])
def test_one_leaf_with_a_global_moment_is_as_with_one_for_the_tensor(params, amsgrad):
    grads = jax.tree.map(lambda p: normal(p.shape, 6), params)
    a, b = (
        steps(ao.telemetry(ao.adam(0.1, granularity=g, amsgrad=amsgrad)), grads, params)[0]
        for g in ("global", "tensor")
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


# --- Where it is not defined --------------------------------------------------------------------------------


def test_what_is_not_defined_is_nan_when_read_and_zero_in_the_state():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = ao.telemetry(ao.adam(0.1))
    seen = ao.get_telemetry(tx.init(params))
    assert seen.count == 0 and all(np.isnan(x).all() for x in seen[1:])
    _, state = tx.update(params, tx.init(params))
    seen = ao.get_telemetry(state)
    assert np.isnan([seen.param_norm, seen.update_to_weight, seen.snr]).all()
    assert seen.cosine == pytest.approx(1)

    two = optax.partition({"x": ao.adam(0.1), "y": ao.sgd(0.2)}, {"a": "x", "b": "y"})
    grads = jax.tree.map(lambda x: jnp.stack([x] * 3), params)
    tree, tensor = (steps(ao.telemetry(two, per=per), grads, params)[0] for per in ("tree", "tensor"))
    assert np.isnan(tree.learning_rate).all() and np.isnan(tree.snr).all()
    assert np.isnan(tree.histogram).all()
    np.testing.assert_allclose(tensor.snr[-1], [1, np.nan], atol=1e-5)
    np.testing.assert_allclose(tensor.effective_learning_rate[-1], [0.1, 0.2], rtol=1e-4)

    labels = ao.telemetry(ao.adam(0.1, granularity=ao.Labels(lambda path, leaf: path)))
    seen, state, _ = steps(labels, grads, params)
    assert all(np.isnan(getattr(seen, name)).all() for name in UNDEFINED_BY_LABEL)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))


def test_without_a_first_moment_there_is_no_signal_to_be_seen():
    seen, *_ = steps(ao.telemetry(ao.adam(0.1, b1=0.0)), normal((4,), 6), jnp.ones(4))
    assert np.isnan(seen.snr).all() and not np.isnan(seen.bound_utilisation).any()


def test_nans_can_be_debugged():
    with jax.debug_nans(True):
        tx = ao.telemetry(ao.sgd(0.1))
        _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        jax.block_until_ready(state)


def test_a_nan_gradient_shows():
    tx = ao.telemetry(ao.adam(0.1))
    _, state = tx.update(jnp.array([1.0, jnp.nan]), tx.init(jnp.ones(2)), jnp.ones(2))
    seen = ao.get_telemetry(state)
    shown = (seen.gradient_norm, seen.update_norm, seen.cosine, seen.effective_learning_rate, seen.histogram)
    assert all(np.isnan(x).all() for x in shown) and seen.learning_rate == np.float32(0.1)


@pytest.mark.parametrize("per", ["tree", "tensor"])
def test_before_adams_first_step_its_statistics_are_not_defined(per):
    tx = ao.reject_nonfinite(ao.telemetry(ao.accumulate_gradients(ao.adam(0.1), 2), per=per))
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    with jax.debug_nans(True):
        step, state = jax.jit(tx.update), tx.init(params)
        _, state = step(params, state, params)
        jax.block_until_ready(state)
    seen = ao.get_telemetry(state)
    assert all(np.isnan(getattr(seen, name)).all() for name in UNDEFINED_BY_LABEL)
    updates, state = step(params, state, params)
    assert ao.get_rejections(state).total == 0 and updates["a"][0] == pytest.approx(-0.1)
    assert not np.isnan(ao.get_telemetry(state).bound_utilisation).any()


def test_a_step_as_large_as_a_float_is_not_rejected_for_its_measure():
    tx = ao.reject_nonfinite(ao.telemetry(optax.scale(-1.0)))
    params = jnp.full(3, 1e37)
    _, state = tx.update(params, tx.init(params), params)
    assert ao.get_rejections(state).total == 0


def test_trees_that_do_not_fit_are_refused():
    tree = {"a": jnp.ones(1), "b": jnp.ones(2)}
    for per in ("tree", "tensor"):
        tx = ao.telemetry(ao.sgd(0.1), per=per)
        state = tx.init(tree)
        with pytest.raises(ValueError, match="the leaf 'b' of updates is not in params"):
            tx.update(tree, state, {"a": jnp.ones(1)})
        with pytest.raises(ValueError, match=r"'b' has shape \(2,\) in updates and \(3,\) in params"):
            tx.update(tree, state, tree | {"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'values' is float32\[2, 51\] in the state and float32\[1, 51\]"):
        tx.update({"a": jnp.ones(1)}, state)


# --- The wrapper --------------------------------------------------------------------------------------------


def test_the_updates_are_those_of_inner():
    params, grads = jnp.ones(7), normal((7,), 9)
    inner = ao.adamw(0.1, weight_decay=0.3)
    _, state, updates = steps(ao.telemetry(inner, every=3), grads, params)
    expected, alone = [], inner.init(params)
    step = jax.jit(inner.update)
    for g in grads:
        u, alone = step(g, alone, params)
        expected.append(u)
    np.testing.assert_allclose(updates, np.stack(expected), rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.inner_state, alone)


@pytest.mark.parametrize("per", ["tree", "tensor"])
def test_every_k_th_step_is_measured_from_the_first_on(per):
    params, grads = {"a": jnp.ones(7), "b": jnp.ones(2)}, {"a": normal((7,), 10), "b": normal((2,), 10, 1)}
    every, _, _ = steps(ao.telemetry(ao.adam(0.1), per=per), grads, params)
    third, _, _ = steps(ao.telemetry(ao.adam(0.1), every=3, per=per), grads, params)
    last = np.arange(10) // 3 * 3
    assert third.count.tolist() == (last + 1).tolist()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[last], rtol=1e-5, atol=1e-7), third, every)


def reductions(jaxpr, in_cond=False):
    """The numbers of reductions outside and inside of conditionals."""
    found = np.zeros(2, int)
    for equation in jaxpr.eqns:
        found[int(in_cond)] += equation.primitive.name.startswith("reduce_")
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += reductions(inner, in_cond or equation.primitive.name == "cond")
    return found


@pytest.mark.parametrize("every", [1, 10])
def test_the_other_steps_do_not_reduce_anything(every):
    tx, params = ao.telemetry(ao.adam(0.1), every=every), jnp.ones(50)
    outside, inside = reductions(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr)
    # Even where every step is measured, norms are taken a second time of scaled leaves in a conditional.
    assert inside > 5 and (outside > 5 if every == 1 else outside == 0)


def test_it_lives_in_scan_vmap_chain_masked_and_checkpoints(tmp_path):
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    inner = ao.telemetry(ao.adam(0.1), every=2, per="tensor")
    tx = optax.chain(ao.clip_by_global_norm(1.0), optax.masked(inner, {"a": True, "b": False}))
    state = tx.init(params)
    start = spec(state)
    step = jax.jit(lambda g, state: tx.update(g, state, params)[1])
    for _ in range(3):
        state = step(params, state)
    assert spec(state) == start
    seen = ao.get_telemetry(state)
    assert seen.count == 3 and seen.cosine.shape == (1,) and seen.histogram.shape == (1, 40)
    assert ao.get_hyperparams(state)["learning_rate"] == jnp.float32(0.1)
    for i, through in enumerate((through_bytes, through_orbax)):
        restored = through(state, jax.tree.map(jnp.zeros_like, state), tmp_path / str(i))
        same(step(params, restored), step(params, state))
    rates = jnp.array([0.1, 0.2])
    swept = jax.vmap(lambda rate: steps(ao.telemetry(ao.sgd(rate)), normal((4,), 3), jnp.ones(4))[0])(rates)
    np.testing.assert_allclose(swept.effective_learning_rate[:, -1], rates, rtol=1e-5)


def test_it_lives_in_an_nnx_optimizer():
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ao.telemetry(ao.adam(0.01), per="tensor"), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(INPUTS) - TARGETS) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    seen = ao.get_telemetry(optimizer.opt_state)
    assert seen.count == 3 and seen.snr.shape == (3,) and (seen.snr > 0.5).all()
    assert type(seen.snr) is type(jnp.ones(()))


def test_a_rejected_step_is_not_measured():
    tx = ao.reject_nonfinite(ao.telemetry(ao.adam(0.1)))
    state = tx.init(jnp.ones(2))
    for g in (jnp.ones(2), jnp.array([1.0, jnp.inf]), jnp.ones(2)):
        _, state = tx.update(g, state, jnp.ones(2))
    seen = ao.get_telemetry(state)
    assert seen.count == 2 and seen.gradient_norm == pytest.approx(2**0.5)
    assert ao.get_rejections(state).total == 1


def test_inside_accumulation_emissions_are_measured():
    tx = ao.accumulate_gradients(ao.telemetry(ao.sgd(0.1)), every=2)
    seen, *_ = steps(tx, jnp.array([[1.0], [3.0], [5.0], [7.0]]), jnp.ones(1))
    assert seen.count.tolist() == [0, 1, 1, 2]
    assert seen.gradient_norm[1:].tolist() == [2.0, 2.0, 6.0]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"every must be an integer in \[1, inf\), got 0"):
        ao.telemetry(ao.adam(0.1), every=0)
    with pytest.raises(ValueError, match="per must be one of 'tree', 'tensor', got 'leaf'"):
        ao.telemetry(ao.adam(0.1), per="leaf")
    with pytest.raises(ValueError, match="inner must be an optax.GradientTransformation"):
        ao.telemetry(0.1)
    with pytest.raises(ValueError, match="must hold one state of telemetry, got 0"):
        ao.get_telemetry(ao.adam(0.1).init(jnp.ones(2)))
    two = optax.chain(ao.telemetry(ao.sgd(0.1)), ao.telemetry(ao.sgd(0.1)))
    with pytest.raises(ValueError, match="must hold one state of telemetry, got 2"):
        ao.get_telemetry(two.init(jnp.ones(2)))
    drops = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: ({"a": g["a"]}, s))
    tx = ao.telemetry(drops)
    tree = {"a": jnp.ones(1), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match="the leaf 'b' of the gradients is not in the updates of inner"):
        tx.update(tree, tx.init(tree))

"""Bounds that transformations declare on a step before it is taken, and how `reject_nonfinite` uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from saving import same
from trajectories import spoiled

import adaptive_optax as ao
from adaptive_optax._core.foresight import foreseeing

PARAMS = {"a": np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8), "b": np.ones(5, np.float32)}
LOW = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
COMPLEX = jax.tree.map(lambda x: (x + 1j).astype(np.complex64), PARAMS)
LARGEST = 8.0


def rate(count):
    return 0.1 / (1.0 + count)


# name: (builds a chain that declares all its bounds, parameters)
DECLARED = {
    "adam": (lambda: ao.adam(rate), PARAMS),
    "adam, complex": (lambda: ao.adam(0.1), COMPLEX),
    "adam, b1 = 0, eps = 0": (lambda: ao.adam(0.1, b1=0.0, eps=0.0), PARAMS),
    "adam, schedules": (lambda: ao.adam(0.1, b1=rate, b2=lambda count: 1 - rate(count), eps=rate), PARAMS),
    "adam, fast": (lambda: ao.adam(0.1, b1=0.3, b2=0.4), PARAMS),
    "adam, tensorflow": (lambda: ao.scale_by_adam(eps_form="tensorflow"), PARAMS),
    "adam, uncorrected": (lambda: ao.scale_by_adam(bias_correction=False, nesterov=True), PARAMS),
    "amsgrad, nesterov": (lambda: ao.adam(0.1, amsgrad=True, nesterov=True), PARAMS),
    "adam, tensor": (lambda: ao.adam(0.1, granularity="tensor"), PARAMS),
    "adam, global sum": (lambda: ao.adam(0.1, granularity=ao.Global("sum")), PARAMS),
    "adam, bfloat16": (lambda: ao.adam(0.1, mu_storage="bfloat16", nu_storage="bfloat16"), PARAMS),
    "adam, mu_dtype": (lambda: ao.adam(0.1, mu_dtype=jnp.bfloat16), PARAMS),
    "clip, adamw, plateau": (
        lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(0.1), ao.reduce_on_plateau()),
        PARAMS,
    ),
    "adamw, independent": (lambda: ao.adamw(0.1, decay_coupling="independent"), PARAMS),
    "rmsprop": (lambda: ao.rmsprop(0.1, momentum=0.9), PARAMS),
    "rmsprop, bias": (lambda: ao.scale_by_rms(0.5, bias_correction=True, granularity="tensor"), PARAMS),
    "global_rmsprop": (lambda: ao.global_rmsprop(0.1), PARAMS),
    "sgd": (lambda: ao.sgd(0.1, momentum=0.9, nesterov=True), PARAMS),
    "average": (lambda: optax.chain(ao.adam(0.1), ao.average_parameters()), PARAMS),
    "ema": (lambda: optax.chain(ao.sgd(0.1), ao.average_parameters(decay=0.9)), PARAMS),
    "stochastic rounding": (lambda: optax.chain(ao.adamw(0.1), ao.stochastic_rounding()), LOW),
    "matched": (lambda: optax.chain(ao.adam(0.1), ao.match_parameter_dtype()), LOW),
    "injected": (lambda: ao.inject_hyperparams(ao.adamw)(0.1), PARAMS),
    "telemetry": (lambda: ao.telemetry(ao.adamw(0.1)), PARAMS),
    "telemetry, every": (lambda: ao.telemetry(ao.adamw(0.1), every=2, per="tensor"), PARAMS),
    "partition": (
        lambda: optax.partition({"x": ao.adam(0.1), "y": ao.sgd(0.1)}, {"a": "x", "b": "y"}),
        PARAMS,
    ),
}
UNDECLARED = {
    "optax": (lambda: optax.adamw(0.1), PARAMS),
    "optax behind": (lambda: optax.chain(ao.adam(0.1), optax.scale(2.0)), PARAMS),
    "adam, int8": (lambda: ao.adam(0.1, mu_storage="int8", nu_storage="int8"), PARAMS),
    "adam, float16 moment": (lambda: ao.adam(0.1, mu_dtype=jnp.float16), PARAMS),
    "centered": (lambda: ao.rmsprop(0.1, centered=True), PARAMS),
    "a decay whose factor is hidden": (
        lambda: ao.adamw(0.1, decay_coupling="schedule", decay_schedule=1.0),
        PARAMS,
    ),
    "float16 parameters": (
        lambda: ao.adam(0.1),
        jax.tree.map(lambda x: x.astype(np.float16), PARAMS),
    ),
}


def gradients_like(params, rng):
    """Gradients whose scale changes from step to step, with zeros, and with the largest magnitude."""

    def leaf(x):
        g = rng.choice([-1.0, 0.0, 0.5, 1.0], x.shape) * LARGEST * 10.0 ** rng.integers(-6, 1)
        return jnp.asarray(g, x.dtype)

    return jax.tree.map(leaf, params)


def top(tree):
    """The largest magnitude in arrays."""
    tops = [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, tops, jnp.zeros(()))


@pytest.mark.parametrize("name", DECLARED)
def test_no_step_exceeds_the_bounds_that_were_declared(name):
    build, params = DECLARED[name]
    tx = optax.with_extra_args_support(build())

    @jax.jit
    def step(params, state, g):
        # Everything at most as large as it is now: the tightest that may be declared from.
        arrays = [x for x in jax.tree.leaves((state, params)) if jnp.issubdtype(x.dtype, jnp.inexact)]
        bound = top([x for x in arrays if x.ndim])
        with foreseeing(jnp.float32) as known:
            known.know(g, jnp.float32(LARGEST))
            known.know((state, params), bound)
            updates, new = tx.update(g, state, params, value=1.0)
        arrays = [x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.inexact) and x.ndim]
        bounded = [x for x in arrays if known.bound(x) is not None]
        params = optax.apply_updates(params, updates)
        return params, new, (top(updates), known.bound(updates)), (top(bounded), known.bound(bounded))

    rng = np.random.default_rng(0)
    state = tx.init(params)
    for _ in range(60):
        params, state, (move, largest_move), (kept, largest_kept) = step(
            params, state, gradients_like(params, rng)
        )
        assert move <= largest_move and kept <= largest_kept
    assert move > 0


def stepper(tx):
    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", [*DECLARED, *UNDECLARED])
def test_a_bound_is_known_after_a_step_if_all_is_declared(name):
    build, params = (DECLARED | UNDECLARED)[name]
    tx = ao.reject_nonfinite(build())
    step, state, seen = stepper(tx), tx.init(params), []
    for g in [jax.tree.map(jnp.ones_like, params)] * 3:
        params, state = step(params, state, g)
        seen.append(float(state.bound))
    if name in UNDECLARED:
        assert seen == [0, 0, 0]
    else:  # measured by the first step, then foreseen
        assert seen[0] == 2.0**50 <= seen[1] <= seen[2] and seen[2] < 2.0**120
    assert ao.get_rejections(state).total == 0


@pytest.mark.parametrize("name", DECLARED)
def test_a_decision_before_the_step_is_the_one_after_it(name):
    build, params = DECLARED[name]
    tx, rng = ao.reject_nonfinite(build()), np.random.default_rng(1)
    good = [gradients_like(params, rng) for _ in range(3)]
    # Two that may be too large or may not, which only the step itself can tell.
    bad = [spoiled(good[0], value) for value in (np.nan, np.inf, 1e20, 1e12)]
    sequence = [good[0], *bad, good[1], *bad, good[2]]
    step, ends = stepper(tx), []
    for bound in (None, 0.0):  # without a bound every step is decided by its results
        state = tx.init(params)._replace(bound=None if bound is None else jnp.float32(bound))
        theta = params
        for g in sequence:
            theta, state = step(theta, state, g)
        ends.append((theta, state._replace(bound=None)))
    for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6 if x.dtype != jnp.bfloat16 else 0.02, atol=1e-30)
    assert ends[0][1].total == ends[1][1].total >= 4


def test_a_bound_that_has_grown_too_large_is_measured_again():
    tx = ao.reject_nonfinite(ao.sgd(0.1, momentum=0.9))
    step, state = stepper(tx), tx.init(PARAMS)
    params, state = step(PARAMS, state, PARAMS)
    _, state = step(params, state._replace(bound=jnp.float32(2.0**121)), PARAMS)
    assert state.bound == 2.0**50


def test_large_parameters_are_decided_by_the_result():
    params = jax.tree.map(lambda x: jnp.full_like(x, 3.4e38), PARAMS)
    tx = ao.reject_nonfinite(ao.sgd(1.0))
    step, state = stepper(tx), tx.init(params)
    for size, rejections in ((1e30, 0), (-1e38, 1), (-1e38, 2), (1e38, 2)):
        params, state = step(params, state, jax.tree.map(lambda x, size=size: jnp.full_like(x, size), PARAMS))
        assert state.total == rejections and np.isfinite(params["b"]).all()
    assert state.bound == 0


def test_a_rejected_step_keeps_the_bound():
    tx = ao.reject_nonfinite(ao.adam(0.1))
    step, state = stepper(tx), tx.init(PARAMS)
    params, state = step(PARAMS, state, PARAMS)
    _, after = step(params, state, spoiled(PARAMS, np.nan))
    assert after.bound == state.bound > 0 and after.total == 1


def test_what_calls_the_host_is_called_once():
    def told(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    calls = []
    told = optax.GradientTransformation(lambda params: optax.EmptyState(), told)
    tx = ao.reject_nonfinite(optax.chain(ao.adam(0.1), told))
    step, state, params = stepper(tx), tx.init(PARAMS), PARAMS
    for g in (PARAMS, spoiled(PARAMS, np.nan), PARAMS):
        params, state = step(params, state, g)
    jax.effects_barrier()
    assert len(calls) == 3 and state.total == 1


def test_a_step_can_be_differentiated():
    def loss(wrap, scale):
        tx = wrap(ao.adamw(0.1, eps_root=1e-8))
        state, params = tx.init(PARAMS), jax.tree.map(jnp.asarray, PARAMS)
        for _ in range(3):
            gradients = jax.tree.map(lambda x: scale * x, params)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(x) for x in jax.tree.leaves(params))

    # On the side of zero where Adam's direction changes with the scale of the gradient.
    wrappers = lambda tx: tx, ao.reject_nonfinite
    slopes = [jax.jit(jax.grad(functools.partial(loss, wrap)))(1e-4) for wrap in wrappers]
    assert slopes[0] != 0
    np.testing.assert_allclose(*slopes, rtol=1e-5)


@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_in_a_scan_and_under_vmap(kind):
    tx, rng = ao.reject_nonfinite(ao.adamw(rate)), np.random.default_rng(2)
    sequence = [gradients_like(PARAMS, rng) for _ in range(4)]
    sequence[2] = spoiled(sequence[2], np.nan)
    step, expected = stepper(tx), (PARAMS, tx.init(PARAMS))
    for g in sequence:
        expected = step(*expected, g)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)

    def run(params, state, sequence):
        return jax.lax.scan(lambda carry, g: (step(*carry, g), None), (params, state), sequence)[0]

    start = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    if kind == "vmap":
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), (*start, stacked))
        end = jax.tree.map(lambda x: x[1], jax.vmap(run)(*twice))
    else:
        end = run(*start, stacked)
    for x, y in zip(*map(jax.tree.leaves, (end, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert end[1].total == 1


def test_a_state_of_an_older_version_goes_on_without_a_bound():
    tx = ao.reject_nonfinite(ao.adam(0.1))
    state = tx.init(PARAMS)
    older = ao.RejectNonfiniteState(state.inner_state, state.total, state.in_a_row)
    step = stepper(tx)
    params, after = step(PARAMS, older, PARAMS)
    assert after.bound is None
    expected, _ = step(PARAMS, state, PARAMS)
    same(params, expected)


def test_a_learning_rate_that_was_assigned_as_a_number():
    tx = ao.reject_nonfinite(ao.sgd(0.1))
    step, state = stepper(tx), tx.init(PARAMS)
    (rate,) = state.inner_state
    params, state = step(PARAMS, state._replace(inner_state=(rate._replace(learning_rate=0.5),)), PARAMS)
    np.testing.assert_allclose(params["b"], 0.5)
    assert state.total == 0 and state.bound == 2.0**50


@pytest.mark.parametrize("jitted", [False, True])
def test_the_modulus_of_a_finite_complex_number_may_overflow(jitted):
    tx = ao.reject_nonfinite(ao.sgd(1e-3))
    params, state = jnp.full(2, 1 + 1j), tx.init(jnp.full(2, 1 + 1j))
    update = jax.jit(tx.update) if jitted else tx.update
    _, state = update(jnp.full(2, 3e38 + 3e38j), state, params)
    assert state.total == 0
    _, state = update(jnp.array([1, complex(0, np.nan)]), state, params)
    assert state.total == 1


# --- Hyperparameters that only become known in the compiled step --------------------------------------------


def at(step, usual, then):
    """A schedule with one other value."""
    return lambda count: jnp.where(count == step, then, usual).astype(jnp.float32)


def from_(step, usual, then):
    return lambda count: jnp.where(count >= step, then, usual).astype(jnp.float32)


def injected(factory, **given):
    return lambda: optax.inject_hyperparams(factory)(**given)


def _assigned(name, value):
    return lambda state: state._replace(hyperparams=state.hyperparams | {name: jnp.float32(value)})


ADAM = injected(ao.adam, learning_rate=1e-3, b1=0.9, b2=0.99, eps=1e-8, eps_root=0.0)
USUAL = [1.0, 0.5, 0.3, 0.2, 0.1]


def rms(rate, **given):
    return lambda: optax.chain(ao.scale_by_rms(**given), ao.scale_by_learning_rate(rate))


# name: (builds the chain, gradients, what is done to the inner state before the fourth step)
EXTREMES = {
    "eps is NaN": (lambda: ao.adam(1e-3, eps=at(3, 1e-8, np.nan)), USUAL, None),
    "eps is inf": (lambda: ao.adam(1e-3, eps=at(3, 1e-8, np.inf)), USUAL, None),
    "eps of RMS": (rms(0.1, eps=at(3, 1e-8, np.nan)), USUAL, None),
    "the average's decay": (
        lambda: optax.chain(ao.sgd(0.1), ao.average_parameters(decay=at(3, 0.9, np.nan))),
        USUAL,
        None,
    ),
    "the average's decay is 3": (
        lambda: optax.chain(ao.sgd(1e38), ao.average_parameters(decay=from_(1, 0.9, 3.0))),
        USUAL * 3,
        None,
    ),
    "no bound": (lambda: ao.adam(1e12, b1=0.9, b2=0.0, eps=0.0), [1, 1, 1e9, 1.1e-19, 1], None),
    "squares are flushed": (lambda: ao.adam(from_(2, 1e-3, 1e22), eps=1e-37), [0, 0, 3e-18, 2e-18], None),
    "squares of RMS": (
        rms(from_(2, 1e-3, 1e22), eps=1e-37, eps_in_sqrt=False, decay=0.999999),
        [0, 0, 3e-17, 2e-17],
        None,
    ),
    "b1 is huge": (lambda: ao.adam(1e-3, b1=at(3, 0.9, 1e38)), [1e4, 1e4, 1e4, 0.5, 0.5], None),
    "b2 is negative": (
        lambda: ao.adam(1e-3, b1=0.0, b2=from_(2, 0.9, -0.5)),
        [1, 1, 1e-3, 1e-3, 1e-3],
        None,
    ),
    "decay is negative": (rms(0.1, decay=from_(2, 0.9, -0.5)), [1, 1, 1e-3, 1e-3, 1e-3], None),
    "an injected eps": (ADAM, USUAL, _assigned("eps", np.nan)),
    "an injected eps_root": (ADAM, USUAL, _assigned("eps_root", np.nan)),
    "a negative eps_root": (ADAM, USUAL, _assigned("eps_root", -1.0)),
    "an injected b1": (ADAM, USUAL, _assigned("b1", 1e38)),
    "an injected rate": (ADAM, USUAL, _assigned("learning_rate", 3e38)),
    "a negative norm": (
        lambda: optax.chain(optax.inject_hyperparams(ao.clip_by_global_norm)(max_norm=1.0), ao.sgd(0.1)),
        [1, 1, 1e-3, 1e-3, 1],
        lambda state: (_assigned("max_norm", -3e38)(state[0]), *state[1:]),
    ),
    "a sum of metrics": (
        lambda: optax.chain(ao.sgd(0.1), ao.reduce_on_plateau(accumulation_size=3)),
        USUAL,
        lambda state: (state[0], state[1]._replace(total=jnp.float32(3.3e38))),
    ),
}


@pytest.mark.filterwarnings("ignore:.*Adam's direction has no bound")
@pytest.mark.parametrize("name", EXTREMES)
def test_nothing_becomes_nonfinite_whatever_hyperparameters_become(name):
    build, sizes, assigned = EXTREMES[name]
    inner = optax.with_extra_args_support(build())
    tx, params = ao.reject_nonfinite(inner), {"w": jnp.ones(3)}
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params, value=jnp.float32(3e37))
        return optax.apply_updates(params, updates), state

    @jax.jit
    def bare(params, state, g):
        updates, new = inner.update(g, state, params, value=jnp.float32(3e37))
        return updates, new, optax.apply_updates(params, updates)

    for i, size in enumerate(sizes):
        if i == 3 and assigned is not None:
            state = state._replace(inner_state=assigned(state.inner_state))
        g = {"w": jnp.full(3, size, jnp.float32)}
        before = state.total
        results, old = bare(params, state.inner_state, g), (None, state.inner_state, params)
        is_finite = all(
            np.all(np.isfinite(x) | ~np.isfinite(y))
            for x, y in zip(jax.tree.leaves(results[1:]), jax.tree.leaves(old[1:]), strict=True)
        ) and all(np.isfinite(u).all() for u in jax.tree.leaves(results[0]))
        params, state = step(params, state, g)
        assert (state.total == before) == is_finite, f"step {i}"
        assert np.isfinite(params["w"]).all()


def test_a_granularity_of_ones_own_declares_that_it_is_a_mean():
    class Least(ao.Granularity):
        def pool(self, squares):
            return jax.tree.map(jnp.min, squares)

        def __eq__(self, other):
            return isinstance(other, Least)

        def __hash__(self):
            return 0

    for granularity, known in ((Least(), False), (ao.AdamMiniBlocks({"w": "output_neuron"}), True)):
        tx = ao.reject_nonfinite(ao.adam(1e-3, granularity=granularity))
        params = {"w": jnp.ones((2, 3))}
        _, state = stepper(tx)(params, tx.init(params), params)
        assert (state.bound > 0) == known


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", ao.Int8(min_size=1)], ids=str)
def test_a_spike_is_rejected_whatever_the_moments_are_kept_as(storage, jitted):
    # The codes of a second moment that has overflowed are integers as any others.
    calls = []
    adam = ao.adam(0.1, mu_storage=storage, nu_storage=storage)
    tx = ao.reject_nonfinite(adam, on_reject=lambda *what: calls.append(what))
    params, update = {"w": jnp.ones((2, 64))}, jax.jit(tx.update) if jitted else tx.update
    state, totals = tx.init(params), []
    for size in (1.0, 1e20, 1.0, 1.0):
        g = {"w": jnp.ones((2, 64)).at[0, 3].set(size)}
        updates, state = update(g, state, params)
        totals.append(int(state.total))
        assert bool(jnp.any(updates["w"])) == (size == 1)
    jax.effects_barrier()
    assert totals == [0, 1, 1, 1] and calls == [("state", "0/nu/w")]

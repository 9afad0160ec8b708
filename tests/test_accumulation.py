"""`accumulate_gradients`: micro-batches as one batch, the inner transformation at rest, the noise scale."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from reference import accumulation as reference
from saving import same, spec, through_bytes, through_orbax
from tolerances import REFERENCE
from trajectories import spoiled

import adaptive_optax as ao

NAN, INF = np.nan, np.inf
PARAMS = {"a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def rate(count):
    """A schedule that falls so fast that a step too many would show."""
    return 0.1 / (1.0 + count)


def random(like, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda x: 1 + rng.standard_normal(x.shape).astype(x.dtype), like) for _ in range(steps)
    ]


def stepper(tx, **options):
    """A compiled step that takes the weight as data, and gives the updates too."""

    @functools.partial(jax.jit, **options)
    def step(params, state, gradients, weight, **extra_args):
        updates, state = tx.update(gradients, state, params, weight=weight, **extra_args)
        return optax.apply_updates(params, updates), state, updates

    return step


def run(tx, params, gradients, weights=None, state=None, step=None):
    state, step = tx.init(params) if state is None else state, step or stepper(tx)
    for g, w in zip(gradients, weights or [1.0] * len(gradients), strict=True):
        params, state, _ = step(params, state, g, np.float32(w))
    return params, state


def close(actual, expected, rtol=2e-6):
    """Trees equal to float32 rounding, of the largest of a leaf's values where sums cancel."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.max(np.abs(y), initial=0))


def inner(update, init=lambda params: optax.EmptyState()):
    def update_fn(updates, state, params=None, **extra_args):
        return update(updates, state, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update_fn)


identity = inner(lambda g, s, **_: (g, s))

# --- Against the reference ----------------------------------------------------------------------------------

SIZES = (1, 3, 2, 4)  # micro-batches of the emissions, in turn; the first does not enter the noise scale


def emissions(count=60):
    """Emissions of (gradients, weights) whose noise is as large as their mean, so that nothing cancels."""
    rng = np.random.default_rng(0)
    result = []
    for n in range(count):
        weights = rng.integers(1, 9, SIZES[n % len(SIZES)]).astype(float)
        noise = rng.standard_normal((len(weights), 5))
        result.append((np.float64(np.float32(1 + 2 * noise)), weights))
    return result


def every(count):
    return jnp.asarray(SIZES, jnp.int32)[count % len(SIZES)]


def against_reference(dtype):
    tx, seen = ao.accumulate_gradients(identity, every), []
    state, step = tx.init(jnp.zeros(5, dtype)), jax.jit(lambda g, s, w: tx.update(g, s, weight=w))
    for gradients, weights in emissions():
        for g, w in zip(gradients, weights, strict=True):
            updates, state = step(jnp.asarray(g, dtype), state, jnp.asarray(w, dtype))
        seen.append((gradients, weights))
        expected = reference.mean_gradient(gradients, weights)
        tolerance = REFERENCE[np.dtype(dtype).name]
        np.testing.assert_allclose(updates, expected, rtol=tolerance, atol=tolerance)
        # The noise is a difference of squares: some digits cancel.
        np.testing.assert_allclose(ao.noise_scale(state), reference.noise_scale(seen), rtol=10 * tolerance)
    assert state.count == len(seen)


def test_float32_equals_the_reference():
    against_reference(np.float32)


def test_float64_equals_the_reference(x64):
    against_reference(np.float64)


# --- One batch ----------------------------------------------------------------------------------------------

rng = np.random.default_rng(1)
INPUTS, TARGETS = (rng.standard_normal(shape).astype(np.float32) for shape in ((60, 3), (60,)))


def gradient(params, inputs, targets):
    def loss(params):
        return jnp.mean((jnp.tanh(inputs @ params["a"].T) @ params["c"] - targets) ** 2)

    return jax.grad(loss)(params)


OPTIMIZERS = {
    "sgd": lambda: ao.sgd(rate, momentum=0.9),
    "adam": lambda: ao.adam(rate),
    "clip, adamw": lambda: optax.chain(ao.clip_by_global_norm(0.5), ao.adamw(rate, weight_decay=0.1)),
    "optax": lambda: optax.adamw(0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sizes", [(10, 10), (1, 12, 7)], ids=str)
def test_micro_batches_are_one_batch(name, sizes):
    tx = OPTIMIZERS[name]()
    accumulating = ao.accumulate_gradients(tx, len(sizes))
    start = {"a": PARAMS["a"], "c": np.array([0.5, -1.0], np.float32)}
    params, state = start, accumulating.init(start)
    expected, expected_state = start, tx.init(start)
    step, grad = stepper(accumulating), jax.jit(gradient)
    for begin in (0, sum(sizes), 2 * sum(sizes)):
        edges = begin + np.cumsum([0, *sizes])
        for i, j in zip(edges, edges[1:], strict=False):
            g = grad(params, INPUTS[i:j], TARGETS[i:j])
            params, state, updates = step(params, state, g, jnp.float32(j - i))
        g = grad(expected, INPUTS[edges[0] : edges[-1]], TARGETS[edges[0] : edges[-1]])
        updates, expected_state = tx.update(g, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    close(params, expected, 1e-5)  # Adam divides gradients of a few micro-batches that cancel
    assert state.count == 3 and state.micro_step == 0


def test_the_scale_of_the_weights_makes_no_difference():
    tx, gradients = ao.accumulate_gradients(ao.adam(rate), 3), random(PARAMS, 9)
    step = stepper(tx)
    expected, expected_state = run(tx, PARAMS, gradients, [1, 2, 5] * 3, step=step)
    params, state = run(tx, PARAMS, gradients, [1024, 2048, 5120] * 3, step=step)
    same((params, state.inner_state), (expected, expected_state.inner_state))
    close(ao.noise_scale(state), ao.noise_scale(expected_state))


# --- At rest ------------------------------------------------------------------------------------------------


def test_the_inner_transformation_runs_only_to_emit():
    calls = []

    def update(g, state):
        jax.debug.callback(lambda: calls.append(None))
        return jax.tree.map(jnp.sin, g), state

    tx = ao.accumulate_gradients(inner(update), 3)
    step, state = stepper(tx), tx.init(PARAMS)
    for i, g in enumerate(random(PARAMS, 7)):
        _, state, _ = step(PARAMS, state, g, np.float32(1))
        jax.effects_barrier()
        assert len(calls) == (i + 1) // 3

    jaxpr = jax.make_jaxpr(tx.update)(PARAMS, state).jaxpr
    (cond,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "cond")
    inside = ["sin" in str(branch) for branch in cond.params["branches"]]
    assert inside == [False, True] and "sin" not in [e.primitive.name for e in jaxpr.eqns]
    assert "conditional" in jax.jit(tx.update).lower(PARAMS, state).compile().as_text()


def test_while_waiting_nothing_moves():
    tx = ao.accumulate_gradients(ao.adamw(rate, weight_decay=0.5), 3)
    step, params, state = stepper(tx), PARAMS, tx.init(PARAMS)
    for i, g in enumerate(random(PARAMS, 9)):
        before = state
        params, state, updates = step(params, state, g, np.float32(1))
        if i % 3 < 2:
            same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
            same((state.inner_state, state.signal), (before.inner_state, before.signal))
        assert state.count == state.inner_state[0].count == (i + 1) // 3
        assert state.micro_step == (i + 1) % 3
    assert ao.get_hyperparams(state)["learning_rate"] == np.float32(rate(2))  # of the third emission


SCHEDULES = {
    "a number": (3, [3, 3, 3]),
    "a NumPy number": (np.int64(2), [2, 2, 2]),
    "integers": (lambda n: jnp.asarray([1, 3, 2], jnp.int32)[n], [1, 3, 2]),
    "Python's": (lambda n: 2, [2, 2, 2]),
    "floats": (optax.linear_schedule(1.0, 4.0, 3), [1, 2, 3, 4, 4]),
    "floats in between": (lambda n: 2.4 + 0.2 * n, [2, 3, 3]),
    "below 1": (lambda n: n - 1, [1, 1, 1, 2, 3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every(name):
    given, sizes = SCHEDULES[name]
    tx = ao.accumulate_gradients(ao.sgd(1.0), given)
    step, state, one = stepper(tx), tx.init(jnp.zeros(1)), np.ones(1, np.float32)
    emitted = []
    for _ in range(sum(sizes)):
        _, state, updates = step(one, state, one, np.float32(1))
        emitted.append(bool(updates[0] != 0))
    assert np.flatnonzero(emitted).tolist() == (np.cumsum(sizes) - 1).tolist()
    assert spec(state) == spec(tx.init(jnp.zeros(1)))


# --- Left out -----------------------------------------------------------------------------------------------

# What makes a micro-batch bad: its gradient's value, its weight.
BAD = {
    "NaN": (NAN, 1.0),
    "inf": (INF, 1.0),
    "-inf": (-INF, 2.0),
    "NaN weight": (1.0, NAN),
    "inf weight": (1.0, INF),
    "both": (NAN, NAN),
    "overflow": (1e20, 1.0),
    "weight 0": (1.0, 0.0),
    "weight 0 and NaN": (NAN, 0.0),  # a mean over no tokens
}


def uncounted(state):
    """The state without what tells of micro-batches that were left out."""
    zero = np.zeros((), np.int32)
    return state._replace(took_part=np.True_, dropped=zero, dropped_in_a_row=zero)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_micro_batch_is_dropped_alone(name):
    value, weight = BAD[name]
    tx = ao.accumulate_gradients(ao.adam(rate), every, drop_nonfinite="weight 0" not in name)
    step, good = stepper(tx), random(PARAMS, 4)
    # Emissions of 1, 3, 2: in the second and third one of the micro-batches has no part.
    bad = spoiled(good[1], value)
    params, state = run(
        tx, PARAMS, [*good[:2], bad, good[2], bad, good[3]], [1, 3, weight, 5, weight, 2], step=step
    )
    sizes = (1, 2, 1)
    rest = ao.accumulate_gradients(ao.adam(rate), lambda n: jnp.asarray(sizes, jnp.int32)[n])
    expected, expected_state = run(rest, PARAMS, good, [1, 3, 5, 2])
    assert (state.dropped, state.dropped_in_a_row) == (0 if "weight 0" in name else 2, 0)
    # Two programs may round the estimates of the noise scale in two ways.
    np.testing.assert_allclose(state.sums, expected_state.sums, rtol=1e-6)
    state, expected_state = (uncounted(x)._replace(signal=0, noise=0) for x in (state, expected_state))
    same((params, state), (expected, expected_state))


@pytest.mark.parametrize("name", BAD)
def test_if_none_has_a_part_nothing_is_emitted(name):
    value, weight = BAD[name]
    tx = ao.accumulate_gradients(ao.adam(rate), 2, drop_nonfinite="weight 0" not in name)
    step, good = stepper(tx), random(PARAMS, 4)
    once = run(tx, PARAMS, good[:2], step=step)
    bad = [spoiled(good[0], value)] * 2
    params, state = run(tx, once[0], bad, [weight] * 2, once[1], step)
    same((params, uncounted(state)), (once[0], uncounted(once[1])))
    dropped = 0 if "weight 0" in name else 2
    assert (state.took_part, state.dropped, state.dropped_in_a_row) == (False, dropped, dropped)
    params, state = run(tx, params, good[2:], None, state, step)
    expected, expected_state = run(tx, once[0], good[2:], None, once[1], step)
    same((params, uncounted(state)), (expected, uncounted(expected_state)))
    assert (state.took_part, state.dropped, state.dropped_in_a_row) == (True, dropped, 0)


def test_what_is_not_dropped_is_not_hidden_and_the_noise_scale_recovers():
    tx = ao.accumulate_gradients(identity, 2)
    step, good = stepper(tx), random(PARAMS, 2)
    _, state = run(tx, PARAMS, good, step=step)
    before = ao.noise_scale(state)
    for bad in (spoiled(good[0], NAN), spoiled(good[0], 1e30)):  # the square overflows
        _, _, _ = step(PARAMS, state, good[0], np.float32(1))
        _, state, _ = step(PARAMS, state, bad, np.float32(1))
        _, state, updates = step(PARAMS, state, good[1], np.float32(1))
        assert not np.all(np.abs(updates["b"]) < 1e3)
        assert ao.noise_scale(state) == before
    _, state = run(tx, PARAMS, good, state=state, step=step)
    close(ao.noise_scale(state), before)


def test_nans_can_be_debugged():
    tx = ao.accumulate_gradients(ao.sgd(0.1), 2)
    with jax.debug_nans(True), jax.debug_infs(True):
        state = tx.init(PARAMS)
        assert np.isnan(ao.noise_scale(state))
        assert jax.jit(ao.noise_scale)(state) == np.finfo(np.float32).min  # no NaN can leave it
        _, state = run(tx, PARAMS, random(PARAMS, 4))
        shown = ao.noise_scale(state)
    np.testing.assert_array_equal(shown, ao.noise_scale(state))


# --- A partial window ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
def test_a_partial_window_is_flushed_as_a_window_of_its_own(traced):
    tx, good = ao.accumulate_gradients(ao.adam(rate), 4), random(PARAMS, 10)
    step = stepper(tx) if traced else stepper(tx, static_argnames="emit")
    params, state = PARAMS, tx.init(PARAMS)
    for i, (g, w) in enumerate(zip(good, [1, 2, 3, 1, 1, 2, 1, 1, 1, 3], strict=True)):
        params, state, updates = step(params, state, g, np.float32(w), emit=i in (5, 9))
        assert bool(np.any(updates["b"])) == (i in (3, 5, 9))
    means = [(0, [1, 2, 3, 1]), (4, [1, 2]), (6, [1, 1, 1, 3])]
    alone = ao.accumulate_gradients(ao.adam(rate), lambda count: jnp.array([4, 2, 4])[count])
    expected, expected_state = run(alone, PARAMS, good, [w for _, weights in means for w in weights])
    close((params, state), (expected, expected_state))  # the noise scale too
    assert state.count == 3 and state.micro_step == 0 and state.signal != 0


def test_with_nothing_accumulated_nothing_is_emitted():
    tx = ao.accumulate_gradients(ao.adam(rate), 2, drop_nonfinite=True)
    step, bad = stepper(tx), spoiled(PARAMS, NAN)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    start = tx.init(PARAMS)
    for g, w in ((zeros, 0), (bad, 1), (bad, 0)):
        _, state, updates = step(PARAMS, start, g, np.float32(w), emit=True)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        same(uncounted(state), uncounted(start))
    # After a good one the same calls are a flush of that one.
    _, waiting, _ = step(PARAMS, start, PARAMS, np.float32(1))
    expected, _ = ao.adam(rate).update(PARAMS, ao.adam(rate).init(PARAMS), PARAMS)
    for g, w in ((zeros, 0), (bad, 1), (bad, 0)):
        _, state, updates = step(PARAMS, waiting, g, np.float32(w), emit=True)
        close(updates, expected)
        assert (state.count, state.micro_step, state.contributing) == (1, 0, 0)


@pytest.mark.parametrize("wrong", [1, 1.0, None, "yes", np.ones(2, bool), jnp.ones((), int)], ids=str)
def test_emit_is_a_bool(wrong):
    tx = ao.accumulate_gradients(ao.sgd(0.1), 2)
    with pytest.raises(ValueError, match="emit must be True or False, or a traced bool, got"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, emit=wrong)


# --- With reject_nonfinite ----------------------------------------------------------------------------------

exponential = inner(lambda g, s, **_: (jax.tree.map(jnp.exp, g), s))
bursting = optax.chain(exponential, ao.adam(rate))  # a mean of 100 overflows in it


def test_inside_a_bad_micro_batch_is_dropped_alone_and_an_overflow_costs_its_emission():
    tx = ao.accumulate_gradients(ao.reject_nonfinite(bursting), 3, drop_nonfinite=True)
    step, good = stepper(tx), random(PARAMS, 6)
    bad, spike, burst = (spoiled(good[0], value) for value in (NAN, 1e20, 300.0))
    sequence = [bad, *good[:2], *good[2:4], burst, good[4], spike, good[5]]
    params, state = run(tx, PARAMS, sequence, step=step)
    pairs = ao.accumulate_gradients(ao.reject_nonfinite(bursting), 2)
    expected, expected_state = run(pairs, PARAMS, [*good[:2], *good[4:]])
    close((params, state.inner_state.inner_state), (expected, expected_state.inner_state.inner_state))
    assert ao.get_rejections(state) == (1, 0, 2, 0)
    assert (state.count, state.inner_state.inner_state[1][0].count) == (3, 2)


def test_outside_the_sum_that_overflows_is_not_got_rid_of():
    tx = ao.reject_nonfinite(ao.accumulate_gradients(bursting, 2))
    step, good = stepper(tx), random(PARAMS, 5)
    bad, spike, burst = (spoiled(good[0], value) for value in (NAN, 1e20, 300.0))
    once = run(tx, PARAMS, [good[0], bad, spike, good[1]], step=step)  # those two are dropped alone
    assert ao.get_rejections(once[1]) == (2, 0, 0, 0) and once[1].inner_state.count == 1
    params, state = run(tx, once[0], [burst, *good[2:]], state=once[1], step=step)
    same(params, once[0])
    assert ao.get_rejections(state) == (5, 3, 0, 0)


# --- The noise scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0, 5.0, 8.0)], ids=str)
def test_both_estimators_are_unbiased(weights):
    # g_i = G + x_i with x_i ~ N(0, V) in d coordinates, and p = w / sum w. Then noise is, coordinate by
    # coordinate, x' F x with F = diag(p) - p p': mean V tr F = V (1 - sum p^2), variance 2 V^2 tr(F F).
    d, v, members = 8, 3.0, 20_000
    g, w = np.full(d, 0.5), np.array(weights)
    k, p, g_sq = len(w), w / w.sum(), d * 0.25
    tx = ao.accumulate_gradients(identity, k)

    @jax.jit
    @jax.vmap
    def estimated(key):
        noise = jax.random.normal(key, (k, d)) * v**0.5
        state = tx.init(jnp.zeros(d))
        for i in range(k):
            _, state = tx.update(g.astype(np.float32) + noise[i], state, weight=np.float32(w[i]))
        return state.signal, state.noise

    told = 0.01 * (1 - np.sum(p**2))
    signals, noises = (np.float64(x) / told for x in estimated(jax.random.split(jax.random.key(0), members)))
    form = np.diag(p) - np.outer(p, p)
    noise_var = 2 * d * v**2 * np.trace(form @ form) / (1 - np.sum(p**2)) ** 2
    assert abs(noises.mean() - d * v) < 4 * np.sqrt(noise_var / members)
    assert abs(signals.mean() - g_sq) < 4 * signals.std() / np.sqrt(members)
    # The variance too is as it should be: of a variance the relative standard error is about sqrt(2 / n).
    np.testing.assert_allclose(noises.var(), noise_var, rtol=0.1)


def test_in_the_long_run_it_is_the_noise_over_the_signal():
    # Weights and numbers of micro-batches move too: B = d V / |G|^2 = 8 * 3 / 8 = 3.
    tx = ao.accumulate_gradients(identity, lambda n: 2 + n % 5)

    @jax.jit
    def after(key):
        def body(state, key):
            key, other = jax.random.split(key)
            w = jax.random.randint(other, (), 1, 6).astype(jnp.float32)
            g = 1 + jax.random.normal(key, (8,)) * jnp.sqrt(3.0)
            return tx.update(g, state, weight=w)[1], None

        state, _ = jax.lax.scan(body, tx.init(jnp.zeros(8)), jax.random.split(key, 4000))
        return state

    scales = [float(ao.noise_scale(after(jax.random.key(seed)))) for seed in range(16)]
    # An average of ratios would be biased upwards: 1 / |G|^2 is convex.
    error = np.std(scales, ddof=1) / np.sqrt(16)
    assert abs(np.mean(scales) - 3) < 4 * error and error < 0.1


def test_it_is_defined_or_nan():
    tx = ao.accumulate_gradients(identity, lambda n: 1 + n // 2)  # 1, 1, 2, 2, 3
    step, state = stepper(tx), tx.init(jnp.zeros(1))
    seen = []
    for value in (1.0, 2.0, 1.0, -1.0, 9.0, 11.0):  # of 1 and -1 the mean is 0, and |G|^2 < 0
        _, state, _ = step(np.zeros(1, np.float32), state, np.full(1, value, np.float32), np.float32(1))
        seen.append(float(ao.noise_scale(state)))
    assert np.isnan(seen[:5]).all()
    # Averages: |G|^2 0.99 * -1 + (2 * 100 - 101), tr(Sigma) 0.99 * 2 + 2 * (101 - 100).
    np.testing.assert_allclose(seen[5], (0.99 * 2 + 2) / (99 - 0.99), rtol=1e-5)
    assert jnp.asarray(ao.noise_scale(state)).dtype == jnp.float32


def test_emissions_of_one_micro_batch_leave_it_alone():
    tx = ao.accumulate_gradients(identity, lambda n: jnp.where(n == 0, 2, 1), drop_nonfinite=True)
    step, good = stepper(tx), random(PARAMS, 3)
    _, state = run(tx, PARAMS, good[:2], step=step)
    before = state
    _, state = run(tx, PARAMS, good, state=state, step=step)
    assert state.count == 4 and np.isfinite(ao.noise_scale(before))
    same((state.signal, state.noise), (before.signal, before.noise))


DEPTHS = {
    "chain": lambda tx: optax.chain(ao.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": True}),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.set_to_zero()}, {"a": "y", "b": "x"}),
    "rejecting": ao.reject_nonfinite,
    "injected": lambda tx: ao.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(1.0),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_it_is_found_at_any_depth(name):
    tx = DEPTHS[name](ao.accumulate_gradients(ao.sgd(0.1), 2))
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    for g in random(PARAMS, 2):
        _, state = step(g, state, PARAMS)
    assert np.isfinite(ao.noise_scale(state))


def test_there_must_be_one_to_read():
    tx = ao.accumulate_gradients(ao.sgd(0.1), 2)
    for wrong, number in (
        (ao.adam(0.1).init(PARAMS), 0),
        (tx, 0),
        (None, 0),
        (optax.chain(tx, tx).init(PARAMS), 2),
    ):
        sentence = f"opt_state must hold one state of accumulate_gradients, got {number}."
        with pytest.raises(ValueError, match=re.escape(sentence)):
            ao.noise_scale(wrong)


def test_a_negative_weight_is_refused_where_it_is_known():
    for drop in (False, True):
        tx = ao.accumulate_gradients(ao.sgd(0.1), 2, drop_nonfinite=drop)
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"weight must be a number in \[0, inf\), got -1"):
            jax.jit(lambda g, s, tx=tx: tx.update(g, s, weight=-1.0))(PARAMS, state)


# --- What goes through --------------------------------------------------------------------------------------


def test_extra_arguments_are_those_of_the_micro_batch_that_completes():
    def update(g, state, *, value, scale_fn):
        return jax.tree.map(lambda x: scale_fn(x) * 0 + value, g), state

    tx = ao.accumulate_gradients(inner(update), 2)
    state = tx.init(PARAMS)
    step = jax.jit(lambda state, value: tx.update(PARAMS, state, value=value, scale_fn=lambda x: x))
    seen = []
    for value in (1.0, 2.0, 3.0, 5.0):
        updates, state = step(state, np.float32(value))
        seen.append(float(updates["b"][0]))
    assert seen == [0, 2, 0, 5]


def test_hyperparameters_are_read_and_set_through_it():
    tx = ao.accumulate_gradients(ao.adam(rate, b1=0.8), 2)
    step, gradients = stepper(tx), random(PARAMS, 4)
    state = tx.init(PARAMS)
    assert {"learning_rate", "b1", "b2", "eps"} <= ao.get_hyperparams(state).keys()
    halted = ao.set_hyperparams(state, learning_rate=0.0)
    params, state = run(tx, PARAMS, gradients, state=halted, step=step)
    same(params, PARAMS)
    params, state = run(tx, PARAMS, gradients, state=ao.set_hyperparams(state, learning_rate=None), step=step)
    assert ao.get_hyperparams(state)["learning_rate"] == np.float32(rate(3))


def test_verified_inside():
    tx = ao.accumulate_gradients(ao.verified(ao.scale_by_adam()), 2)
    step, state = chex.chexify(jax.jit(tx.update)), tx.init(PARAMS)
    good = random(PARAMS, 2)
    for g in good * 2:
        _, state = step(g, state)
    step.wait_checks()
    _, state = step(good[0], state)
    step(spoiled(good[1], NAN), state)
    with pytest.raises(AssertionError, match="'b'"):
        step.wait_checks()


# --- Leaves and dtypes --------------------------------------------------------------------------------------


def test_bfloat16_micro_batches_are_summed_in_float32():
    tx = ao.accumulate_gradients(ao.sgd(1.0), 1000)
    params = jnp.zeros(1, jnp.bfloat16)
    step, state = jax.jit(tx.update), tx.init(params)
    for _ in range(1000):  # in bfloat16 the sum would stop at 256
        updates, state = step(jnp.ones(1, jnp.bfloat16), state, params)
    assert updates.dtype == jnp.float32 and updates.tolist() == [-1.0]


def test_every_kind_of_leaf():
    params = {
        "real": jnp.ones((2, 2)),
        "half": jnp.ones(2, jnp.float16),
        "complex": jnp.ones(2, jnp.complex64),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    tx = ao.accumulate_gradients(ao.sgd(1.0), 2)
    state, step = tx.init(params), jax.jit(tx.update)
    first = params | {"complex": jnp.array([1j, 2.0], jnp.complex64)}
    second = params | {"complex": jnp.array([1.0, 2j], jnp.complex64)}
    _, state = step(first, state)
    updates, state = step(second, state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    np.testing.assert_array_equal(updates["complex"], np.array([-0.5 - 0.5j, -1 - 1j], np.complex64))
    np.testing.assert_array_equal(updates["half"], np.full(2, -1, np.float32))
    # |g|^2: 6 of ones, and 5 of the complex; the mean's 0.5 and 2. tr(Sigma) 2 (11 - 8.5), |G|^2 17 - 11.
    np.testing.assert_allclose(ao.noise_scale(state), 5 / 6, rtol=1e-6)


def test_float64_parameters_have_float64_sums(x64):
    tx = ao.accumulate_gradients(ao.sgd(1.0), 2)
    params = {"a": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.float32)}
    state = tx.init(params)
    for dtype in (jnp.float64, jnp.float32):  # whatever the gradients' dtype
        gradients = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype) / 3, params)
        updates, state = jax.jit(tx.update)(gradients, state, weight=jnp.float32(1))
    assert (updates["a"].dtype, updates["b"].dtype) == (jnp.float64, jnp.float32)
    assert state.weight.dtype == state.noise.dtype == ao.noise_scale(state).dtype == jnp.float64
    assert spec(state) == spec(tx.init(params))


def test_states_of_optax_keep_their_types_or_are_refused():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = ao.accumulate_gradients(optax.adam(0.1), 2)
    with pytest.raises(
        ValueError, match=r"the state '0/mu/a' of inner changed from bfloat16.* to float32.*master_w"
    ):
        jax.jit(tx.update)(low, tx.init(low), low)
    cured = ao.accumulate_gradients(ao.master_weights(optax.adam(0.1)), 2)
    _, state = run(cured, low, [low] * 2)
    assert spec(state) == spec(cured.init(low))

    weak = inner(lambda g, s, **_: (g, s * 2), lambda params: jnp.asarray(1.0))
    tx = ao.accumulate_gradients(weak, 1)
    assert weak.init(PARAMS).weak_type and not tx.init(PARAMS).inner_state.weak_type
    assert spec(run(tx, PARAMS, [PARAMS])[1]) == spec(tx.init(PARAMS))


# --- Where it runs ------------------------------------------------------------------------------------------


def test_its_state_can_be_donated():
    tx, gradients = ao.accumulate_gradients(ao.adam(rate), 2), random(PARAMS, 4)
    expected = run(tx, PARAMS, gradients)
    step, params = stepper(tx, donate_argnums=(0, 1)), jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    for g in gradients:
        given = jax.tree.leaves((params, state))
        params, state, _ = step(params, state, g, np.float32(1))
        assert all(x.is_deleted() for x in given)
    same((params, state), expected)


def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


WIDE = {"a": np.linspace(-1, 1, 16, dtype=np.float32), "b": np.ones(3, np.float32)}


@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map_with_averaged_gradients(check_vma):
    tx = ao.accumulate_gradients(ao.adam(rate), 2)

    def step(params, state, shares):
        g = jax.tree.map(lambda x: jax.lax.pmean(x[0], "x"), shares)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    whole, split = PartitionSpec(), PartitionSpec("x")
    mapped = jax.jit(
        jax.shard_map(
            step, mesh=mesh(), in_specs=(whole, whole, split), out_specs=(whole, whole), check_vma=check_vma
        )
    )
    shares = [jax.tree.map(lambda *x: np.stack(x), *random(WIDE, 8, seed)) for seed in range(4)]
    params, state = WIDE, tx.init(WIDE)
    for share in shares:
        params, state = mapped(params, state, share)
    means = [jax.tree.map(lambda x: x.mean(axis=0), share) for share in shares]
    expected, expected_state = run(tx, WIDE, means)
    close((params, state), (expected, expected_state), 1e-5)


def test_devices_can_accumulate_alone_and_talk_once_an_emission():
    average = inner(lambda g, s, **_: (jax.lax.pmean(g, "x"), s))
    tx = ao.accumulate_gradients(optax.chain(average, ao.adam(rate)), 3)

    def trained(params, shares):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: x[0], g), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), shares)
        return params, state.count

    whole, split = PartitionSpec(), PartitionSpec(None, "x")
    mapped = jax.jit(
        jax.shard_map(trained, mesh=mesh(), in_specs=(whole, split), out_specs=whole, check_vma=False)
    )
    steps = [jax.tree.map(lambda *x: np.stack(x), *random(WIDE, 8, seed)) for seed in range(6)]
    params, count = mapped(WIDE, jax.tree.map(lambda *x: np.stack(x), *steps))
    means = [jax.tree.map(lambda x: x.mean(axis=0), step) for step in steps]
    close(params, run(ao.accumulate_gradients(ao.adam(rate), 3), WIDE, means)[0], 1e-5)
    assert count == 2


def test_on_global_arrays_a_nan_on_one_device_drops_the_micro_batch_on_all():
    tx = ao.accumulate_gradients(ao.adam(rate), 2, drop_nonfinite=True)
    shardings = {"a": NamedSharding(mesh(), PartitionSpec("x")), "b": NamedSharding(mesh(), PartitionSpec())}
    good = random(WIDE, 3)
    sequence = [good[0], spoiled(good[1], NAN, "a"), good[1], good[2]]
    expected, expected_state = run(tx, WIDE, sequence)
    params = jax.device_put(WIDE, shardings)
    state = tx.init(params)
    assert state.total["a"].sharding.is_equivalent_to(shardings["a"], 1)
    params, state = run(tx, params, [jax.device_put(g, shardings) for g in sequence], state=state)
    close((params, state), (expected, expected_state), 1e-5)
    assert state.total["a"].sharding.is_equivalent_to(shardings["a"], 1)


def test_members_of_a_vmap_emit_each_in_their_own_time():
    def trained(k, gradients):
        tx = ao.accumulate_gradients(ao.adam(rate), lambda n: k)
        state = tx.init(PARAMS)
        state, _ = jax.lax.scan(lambda state, g: (tx.update(g, state)[1], None), state, gradients)
        return state.count, state.micro_step, state.inner_state[0].count

    gradients = jax.tree.map(lambda *x: jnp.stack(x), *random(PARAMS, 7))
    counts = jax.jit(jax.vmap(trained, in_axes=(0, None)))(jnp.array([1, 2, 3], jnp.int32), gradients)
    assert [x.tolist() for x in counts] == [[7, 3, 2], [0, 1, 1], [7, 3, 2]]


@pytest.mark.parametrize("through", [through_bytes, through_orbax])
def test_a_restored_state_goes_on_in_the_middle_of_an_emission(through, tmp_path):
    tx, gradients = ao.accumulate_gradients(ao.adam(rate), 3), random(PARAMS, 8)
    step, weights = stepper(tx), [1, 2, 3, 4, 5, 6, 7, 8]
    params, state = run(tx, PARAMS, gradients[:5], weights[:5], step=step)
    restored = through(state, tx.init(PARAMS), tmp_path)
    same(restored, state)
    ends = [run(tx, params, gradients[5:], weights[5:], s, step) for s in (state, restored)]
    same(ends[1], ends[0])


def test_with_nnx():
    batches = np.random.default_rng(3).standard_normal((4, 8, 4)).astype(np.float32)

    def trained(tx, batches):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(batch) ** 2))(model))

        for batch in batches:
            step(model, optimizer, batch)
        return nnx.to_pure_dict(nnx.state(model)), optimizer.opt_state

    params, state = trained(ao.accumulate_gradients(ao.adamw(rate), 2), batches)
    expected, _ = trained(ao.adamw(rate), batches.reshape(2, 16, 4))
    close(params, expected, 1e-5)
    scale = ao.noise_scale(state)
    assert type(scale) is type(jnp.ones(())) and np.isfinite(scale)
    assert ao.get_hyperparams(state)["learning_rate"] == np.float32(rate(1))


# --- Arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.5, 2.0, True, "2", None])
def test_every_out_of_range(wrong):
    with pytest.raises(ValueError, match=re.escape(f"every must be an integer in [1, inf), got {wrong!r}.")):
        ao.accumulate_gradients(ao.sgd(0.1), wrong)


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match=r"inner must be an optax.GradientTransformation, got 0\.1"):
        ao.accumulate_gradients(0.1, 2)
    with pytest.raises(ValueError, match="drop_nonfinite must be True or False, got 1"):
        ao.accumulate_gradients(ao.sgd(0.1), 2, drop_nonfinite=1)
    tx = ao.accumulate_gradients(ao.sgd(0.1), 2)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="the state must be a .*AccumulateGradientsState"):
        tx.update(PARAMS, ao.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="the leaf 'c' of updates is not in the state"):
        tx.update(PARAMS | {"c": PARAMS["b"]}, state)
    with pytest.raises(ValueError, match="'block/steps'.*int32"):
        tx.init({"block": {"steps": jnp.ones(2, jnp.int32)}})
    tx = ao.accumulate_gradients(ao.sgd(0.1), lambda n: jnp.ones(2))
    with pytest.raises(ValueError, match="A schedule must return a scalar"):
        jax.jit(tx.update)(PARAMS, state)


@pytest.mark.parametrize("wrong", [-1, -1.0, np.float32(-2), NAN, INF, np.ones(2), 1j])
def test_weights_out_of_range(wrong):
    tx = ao.accumulate_gradients(ao.sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"weight must be a number in \[0, inf\), got"):
        tx.update(PARAMS, tx.init(PARAMS), weight=wrong)
    if isinstance(wrong, np.ndarray):
        with pytest.raises(ValueError, match="weight must be a number"):
            jax.jit(tx.update)(PARAMS, tx.init(PARAMS), weight=wrong)

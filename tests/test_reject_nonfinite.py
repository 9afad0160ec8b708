"""`reject_nonfinite`: a rejected step leaves no trace, whatever made it bad and wherever it runs."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from saving import same, spec
from trajectories import spoiled

import adaptive_optax as ao

NAN, INF = np.nan, np.inf
PARAMS = {"a": np.linspace(-1, 1, 160, dtype=np.float32).reshape(2, 80), "b": np.ones(3, np.float32)}
SMALL = {"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
INT8 = ao.Int8(block_size=64, min_size=1)


def rate(count):
    """A schedule that falls so fast that a step too many would show."""
    return 0.1 / (1.0 + count)


def rising(count):
    return 0.9 - 0.4 / (1.0 + count)


def random(like, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), like) for _ in range(steps)]


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def rejected(state):
    return tuple(np.asarray(ao.get_rejections(state)).tolist())[:2]


def stepper(tx, **options):
    @functools.partial(jax.jit, **options)
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, gradients):
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def inner(update, init=lambda params: optax.EmptyState()):
    """A transformation from `update(gradients, state) -> (updates, state)`."""

    def update_fn(updates, state, params=None):
        return update(jax.tree.map(jnp.asarray, updates), state)

    return optax.GradientTransformation(init, update_fn)


# --- As if it had not been ----------------------------------------------------------------------------------

LOW = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)

# name: (builds the inner transformation, parameters)
INNER = {
    "adam": (lambda: ao.adam(rate, b1=rising), PARAMS),
    "adam, global": (lambda: ao.adam(rate, granularity="global"), PARAMS),
    "amsgrad": (lambda: ao.adam(rate, amsgrad=True, nesterov=True), PARAMS),
    "adam, bfloat16": (lambda: ao.adam(rate, mu_storage="bfloat16", nu_storage="bfloat16"), PARAMS),
    "adam, int8": (lambda: ao.adam(rate, mu_storage=INT8, nu_storage=INT8), PARAMS),
    "rmsprop": (lambda: ao.rmsprop(rate, centered=True, momentum=0.9), PARAMS),
    "sgd": (lambda: ao.sgd(rate, momentum=rising, nesterov=True), PARAMS),
    "clip, adamw, trace": (
        lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(rate, weight_decay=0.1), ao.trace(0.9)),
        PARAMS,
    ),
    "adam, average": (lambda: optax.chain(ao.adam(rate), ao.average_parameters()), PARAMS),
    "injected": (lambda: ao.inject_hyperparams(ao.adamw)(rate, b1=rising), PARAMS),
    "optax": (lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 5)), PARAMS),
    "stochastic rounding": (lambda: optax.chain(ao.adam(rate), ao.stochastic_rounding()), LOW),
    "kahan": (lambda: ao.kahan_summation(ao.adam(rate, mu_storage="bfloat16")), LOW),
    "master weights": (lambda: ao.master_weights(optax.adamw(0.1)), LOW),
}
BAD = {"NaN": NAN, "inf": INF, "-inf": -INF, "spike": 1e20}
# Nothing is squared in sgd, and the clipped spike is an ordinary gradient: there it is no bad batch.
SPIKE_IS_FINE = {"sgd", "clip, adamw, trace"}
# How many good steps come before the bad ones, of which there are so many in a row.
PLACES = [(0, 1), (1, 2), (2, 50), (4, 3)]


@pytest.mark.parametrize("name", INNER)
def test_the_run_goes_on_as_if_the_bad_batches_had_not_been(name):
    build, params = INNER[name]
    tx = ao.reject_nonfinite(build())
    step, start, good = stepper(tx), tx.init(params), random(params, 4)
    expected, state = run(step, params, start, good)
    assert rejected(state) == (0, 0)
    for kind, value in BAD.items():
        bad = spoiled(good[1], value)
        for before, times in PLACES:
            end, end_state = run(step, params, start, [*good[:before], *[bad] * times, *good[before:]])
            if kind == "spike" and name in SPIKE_IS_FINE:
                assert rejected(end_state) == (0, 0)
                continue
            same((end, end_state.inner_state), (expected, state.inner_state))
            assert rejected(end_state) == (times, times if before == 4 else 0), kind


@pytest.mark.parametrize("name", ["adam", "optax"])
def test_a_good_step_is_that_of_the_inner_transformation(name):
    build, params = INNER[name]
    bare, tx = build(), ao.reject_nonfinite(build())
    expected_state, state = bare.init(params), tx.init(params)
    same(state.inner_state, expected_state)
    for g in random(params, 2):
        expected, expected_state = bare.update(g, expected_state, params)
        updates, state = tx.update(g, state, params)
        same((updates, state.inner_state), (expected, expected_state))
    assert rejected(state) == (0, 0) and any(np.any(u) for u in jax.tree.leaves(updates))


def test_a_rejected_update_is_zero():
    tx = ao.reject_nonfinite(ao.adamw(0.1, weight_decay=0.5))
    updates, _ = tx.update(spoiled(SMALL, NAN), tx.init(SMALL), SMALL)
    same(updates, jax.tree.map(jnp.zeros_like, SMALL))


# float16 ends at 65504, and 6e4 squared, or twice, is beyond it; so is eps = 1e-8, at the other end.
FLOAT16 = {
    "squared, optax": (lambda: optax.adam(0.1), 6e4, 3),
    "summed, optax": (lambda: optax.sgd(0.1, momentum=0.9), 6e4, 2),
    "zero over zero, optax": (lambda: optax.adam(0.1), 0.0, 3),
    "optax on master weights": (lambda: ao.master_weights(optax.adam(0.1)), 6e4, 0),
    "adam": (lambda: ao.adam(0.1), 6e4, 0),
    "rmsprop": (lambda: ao.rmsprop(0.1, momentum=0.9, granularity="global"), 6e4, 0),
    "sgd": (lambda: ao.sgd(0.1, momentum=0.9), 6e4, 0),
    "adam, zero": (lambda: ao.adam(0.1), 0.0, 0),
}


@pytest.mark.parametrize("name", FLOAT16)
def test_float16(name):
    build, size, rejections = FLOAT16[name]
    tx = ao.reject_nonfinite(build())
    params = jnp.ones(2, jnp.float16)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jnp.full(2, size, jnp.float16), state, params)
        assert updates.dtype == jnp.float32
    assert rejected(state) == (rejections, rejections)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert np.all(updates != 0) == (size > 0 and not rejections)


def test_a_finite_step_can_be_too_long_for_a_parameter():
    calls = []
    tx = ao.reject_nonfinite(ao.sgd(1.0), on_reject=lambda *what: calls.append(what))
    params = {"a": jnp.ones(1), "b": jnp.array([6e4, jnp.inf], jnp.float16)}
    gradients = {"a": jnp.ones(1), "b": jnp.full(2, -1e4, jnp.float16)}
    updates, state = tx.update(gradients, tx.init(params), params)
    assert rejected(state) == (1, 1) and not np.any(updates["b"])
    jax.effects_barrier()
    assert calls == [("parameter", "b")]
    # The one that is infinite already is no reason, nor can anything be said without parameters.
    gradients["b"] = gradients["b"].at[0].set(1.0)
    assert rejected(tx.update(gradients, state, params)[1]) == (1, 0)
    gradients["b"] = gradients["b"].at[0].set(-1e4)
    assert rejected(tx.update(gradients, state)[1]) == (1, 0)


def test_a_spike_does_not_freeze_its_coordinate():
    # Its square overflows: v is inf from then on, and the coordinate never moves again.
    gradients = [spoiled(SMALL, 1e20), *[SMALL] * 5]
    frozen, state = run(stepper(optax.adam(0.1)), SMALL, optax.adam(0.1).init(SMALL), gradients)
    assert frozen["b"][1] == 1 and state[0].nu["b"][1] == INF
    for adam in (optax.adam(0.1), ao.adam(0.1)):
        tx = ao.reject_nonfinite(adam)
        params, state = run(stepper(tx), SMALL, tx.init(SMALL), gradients)
        np.testing.assert_allclose(params["b"], np.full(3, 0.5), rtol=1e-4)  # optax's correction is 1e-5 off
        assert rejected(state) == (1, 0)


def test_there_is_no_number_of_rejections_after_which_one_is_let_in():
    tx = ao.reject_nonfinite(ao.sgd(0.1, momentum=0.9))
    params, state = run(stepper(tx), SMALL, tx.init(SMALL), [spoiled(SMALL, NAN)] * 1000)
    same((params, state.inner_state), (SMALL, tx.init(SMALL).inner_state))
    assert rejected(state) == (1000, 1000)


# --- A state that was infinite already ----------------------------------------------------------------------


def best_value():
    """Keeps the lowest value so far, which is infinite until there is one, as a plateau's."""

    def update(updates, state, params=None, *, value):
        return updates, {"best": jnp.minimum(state["best"], value)}

    return optax.GradientTransformationExtraArgs(lambda params: {"best": jnp.full((), jnp.inf)}, update)


def test_what_was_infinite_may_stay_so_and_nothing_else_may_become_so():
    tx = ao.reject_nonfinite(optax.chain(ao.sgd(0.1), best_value()))
    state = tx.init(SMALL)
    for gradient, value, best, in_a_row in (
        (SMALL, INF, INF, 0),
        (spoiled(SMALL, NAN), 1.0, INF, 1),  # the metric of a rejected step is none
        (SMALL, INF, INF, 0),
        (SMALL, 2.0, 2.0, 0),
        (SMALL, NAN, 2.0, 1),
        (SMALL, -INF, 2.0, 2),
        (SMALL, INF, 2.0, 0),
        (SMALL, 1.0, 1.0, 0),
    ):
        updates, state = tx.update(gradient, state, value=jnp.float32(value))
        assert state.inner_state[1]["best"] == best and state.in_a_row == in_a_row
        assert bool(np.any(updates["a"])) == (in_a_row == 0)


def test_elements_of_one_leaf_are_told_apart():
    # Were only the leaf asked whether it was finite, the first infinity would hide those that follow.
    tx = ao.reject_nonfinite(inner(lambda g, s: (SMALL["b"], s + g), lambda p: jnp.array([INF, 0.0, 0.0])))
    state = tx.init(SMALL["b"])
    for gradient, kept in (([1.0, 1.0, 1.0], [INF, 1, 1]), ([0.0, 3.4e38, 0.0], [INF, 3.4e38, 1])):
        _, state = tx.update(jnp.array(gradient), state)
        np.testing.assert_array_equal(state.inner_state, np.float32(kept))
    _, after = tx.update(jnp.array([0.0, 3.4e38, 0.0]), state)
    same(after.inner_state, state.inner_state)
    assert rejected(after) == (1, 1)


# --- What on_reject is told ---------------------------------------------------------------------------------

exponential = inner(lambda g, s: (jax.tree.map(jnp.exp, g), s))
accumulated = inner(
    lambda g, s: (g, {"sum": jax.tree.map(lambda x, y: x + jnp.exp(y), s["sum"], g)}),
    lambda params: {"sum": jax.tree.map(jnp.zeros_like, params)},
)
bad_b = functools.partial(spoiled, SMALL)

# name: (inner transformation, a gradient that is rejected, what on_reject is told)
CAUSES = {
    "NaN": (ao.adam(0.1), bad_b(NAN), ("gradient", "b")),
    "inf": (ao.sgd(0.1), bad_b(-INF), ("gradient", "b")),
    "the first leaf of two": (ao.adam(0.1), spoiled(bad_b(NAN), INF, "a"), ("gradient", "a")),
    "a gradient that goes nowhere": (optax.set_to_zero(), bad_b(NAN), ("gradient", "b")),
    "overflow in the updates": (exponential, bad_b(100.0), ("update", "b")),
    "zero over zero": (
        inner(lambda g, s: (jax.tree.map(lambda x: x / x, g), s)),
        bad_b(0.0),
        ("update", "b"),
    ),
    "overflow in the state alone": (accumulated, bad_b(100.0), ("state", "sum/b")),
    "squared": (ao.adam(0.1), bad_b(1e20), ("state", "0/nu/b")),
    "squared in a sum": (ao.global_rmsprop(0.1), bad_b(1e20), ("state", "0/nu")),
}


def in_turn(tx, params, gradients):
    state = tx.init(params)
    for g in gradients:
        _, state = tx.update(g, state, params)
    return state


def jitted(tx, params, gradients):
    return run(stepper(tx), params, tx.init(params), gradients)[1]


def scanned(tx, params, gradients):
    def body(state, g):
        return tx.update(g, state, params)[1], None

    return jax.jit(lambda state, g: jax.lax.scan(body, state, g)[0])(tx.init(params), stacked(gradients))


def members(tx, params, gradients):
    """Each gradient to a member of its own."""
    state = jax.vmap(lambda _: tx.init(params))(jnp.arange(len(gradients)))
    return jax.jit(jax.vmap(lambda g, state: tx.update(g, state, params)[1]))(stacked(gradients), state)


@pytest.mark.parametrize(
    ("way", "cause"),
    [(in_turn, cause) for cause in CAUSES]
    + [
        (way, cause)
        for way in (jitted, scanned, members)
        for cause in ("the first leaf of two", "overflow in the updates", "squared in a sum")
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_on_reject_is_called_once_a_rejected_step_with_what_was_bad_first(way, cause):
    transformation, bad, told = CAUSES[cause]
    calls = []
    tx = ao.reject_nonfinite(transformation, on_reject=lambda what, path: calls.append((what, path)))
    state = way(tx, SMALL, [SMALL, bad, SMALL, SMALL, bad])
    jax.effects_barrier()
    assert calls == [told] * 2
    assert np.sum(state.total) == 2


def test_what_is_no_function_is_no_on_reject():
    for wrong in ("print", 3, True, [print]):
        sentence = f"on_reject must be None or a function of (what, path), got {wrong!r}."
        with pytest.raises(ValueError, match=re.escape(sentence)):
            ao.reject_nonfinite(ao.sgd(0.1), on_reject=wrong)
    with pytest.raises(ValueError, match=r"inner must be an optax.GradientTransformation, got 0\.1"):
        ao.reject_nonfinite(0.1)


# --- Why outermost ------------------------------------------------------------------------------------------

BEHIND = {"trace": lambda: ao.trace(0.9), "decay": lambda: optax.add_decayed_weights(-0.1)}


@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_it_moves_the_parameters_during_a_rejection(name):
    for tx, moves in (
        (optax.chain(ao.reject_nonfinite(ao.sgd(0.1)), BEHIND[name]()), True),
        (ao.reject_nonfinite(optax.chain(ao.sgd(0.1), BEHIND[name]())), False),
    ):
        step = stepper(tx)
        before, state = run(step, SMALL, tx.init(SMALL), [SMALL])
        after, state = run(step, before, state, [bad_b(NAN)])
        assert rejected(state) == (1, 1)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert np.all(x != y) if moves else np.all(x == y)


def outside(tx):
    return ao.reject_nonfinite(optax.MultiSteps(tx, 2).gradient_transformation())


def inside(tx):
    return optax.MultiSteps(ao.reject_nonfinite(tx), 2)


def both(tx):
    return outside(ao.reject_nonfinite(tx))


@functools.cache
def accumulated_adam(where):
    tx = where(ao.adam(rate))
    return stepper(tx), tx.init(SMALL)


F, S, T, U = random(SMALL, 4)
NOT_A_NUMBER, SPIKE = spoiled(F, NAN), spoiled(F, 1e20)

# Around accumulation in pairs: (where, micro-batches, those that count)
ACCUMULATION = {
    "outside, a NaN is dropped alone": (outside, [F, NOT_A_NUMBER, S, T, U], [F, S, T, U]),
    "outside, a NaN before": (outside, [NOT_A_NUMBER, F, S], [F, S]),
    "inside, a NaN takes its pair along": (inside, [F, NOT_A_NUMBER], []),
    "inside, a spike takes its pair along": (inside, [F, SPIKE, S, T], [S, T]),
    # It is added up without harm, then stepped on in vain for ever: each rejection puts the sum back.
    "outside, a spike is not got rid of": (outside, [F, S, SPIKE, T, U, S, T], [F, S]),
    "both, a NaN is dropped alone": (both, [F, NOT_A_NUMBER, S, T, U], [F, S, T, U]),
    "both, a spike takes its pair along": (both, [F, SPIKE, S, T, NOT_A_NUMBER, U, F], [S, T, U, F]),
}


@pytest.mark.parametrize("name", ACCUMULATION)
def test_accumulation(name):
    where, micro_batches, counted = ACCUMULATION[name]
    step, start = accumulated_adam(where)
    params, state = run(step, SMALL, start, micro_batches)
    expected, expected_state = run(step, SMALL, start, counted)
    same(params, expected)
    moments, expected_moments = (
        jax.tree.leaves(s, is_leaf=lambda x: isinstance(x, ao.ScaleByAdamState))
        for s in (state, expected_state)
    )
    for x, y in zip(moments, expected_moments, strict=True):
        if isinstance(x, ao.ScaleByAdamState):
            same(x, y)
    assert rejected(state)[0] == sum(1 for x in micro_batches if x is NOT_A_NUMBER) + {
        "inside, a spike takes its pair along": 1,
        "outside, a spike is not got rid of": 4,
    }.get(name, 0)


# --- Where it runs ------------------------------------------------------------------------------------------


def test_in_a_scan_the_place_of_the_bad_batches_makes_no_difference():
    tx = ao.reject_nonfinite(ao.adamw(rate, b1=rising))
    good, bad = random(SMALL, 4), bad_b(1e20)

    @jax.jit
    def trained(gradients):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), state.in_a_row

        return jax.lax.scan(body, (jax.tree.map(jnp.asarray, SMALL), tx.init(SMALL)), gradients)

    ends = []
    for places in ((4, 5), (0, 1), (2, 3), (1, 4)):
        order = iter(good)
        (params, state), in_a_row = trained(stacked([bad if i in places else next(order) for i in range(6)]))
        assert spec(state) == spec(tx.init(SMALL))
        assert np.flatnonzero(in_a_row).tolist() == list(places) and state.total == 2
        ends.append((params, state.inner_state))
    for end in ends[1:]:
        same(end, ends[0])


def test_under_vmap_each_member_decides_alone():
    tx = ao.reject_nonfinite(ao.adam(rate))
    params = stacked([SMALL] * 3)
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(stepper(tx)))
    good = random(SMALL, 3)
    once_params, once = step(params, state, stacked(good))
    all_good = step(once_params, once, stacked(good))
    mixed = step(once_params, once, stacked([good[0], spoiled(good[1], NAN), spoiled(good[2], 1e20)]))
    assert mixed[1].total.tolist() == mixed[1].in_a_row.tolist() == [0, 1, 1]
    for member, expected in ((0, all_good), (1, (once_params, once)), (2, (once_params, once))):
        same(*(jax.tree.map(lambda x: x[member], (p, s.inner_state)) for p, s in (mixed, expected)))  # noqa: B023 (called at once)
    params, state = step(*mixed, stacked(good))
    assert state.total.tolist() == [0, 1, 1] and state.in_a_row.tolist() == [0, 0, 0]
    assert state.inner_state[0].count.tolist() == [3, 2, 2]


def test_its_state_can_be_donated():
    tx = ao.reject_nonfinite(ao.adam(rate))
    sequence = [SMALL, bad_b(NAN), SMALL]
    expected = run(stepper(tx), SMALL, tx.init(SMALL), sequence)
    step, params = stepper(tx, donate_argnums=(0, 1)), jax.tree.map(jnp.array, SMALL)
    state = tx.init(params)
    for g in sequence:
        given = jax.tree.leaves((params, state))
        params, state = step(params, state, g)
        assert all(x.is_deleted() for x in given)
    same((params, state), expected)


def test_a_nan_on_one_device_is_rejected_on_all():
    calls = []
    tx = ao.reject_nonfinite(ao.adam(rate), on_reject=lambda *what: calls.append(what))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = {
        "a": NamedSharding(mesh, PartitionSpec(None, "x")),
        "b": NamedSharding(mesh, PartitionSpec("x")),
    }
    params = {"a": np.ones((2, 16), np.float32), "b": np.linspace(-1, 1, 16, dtype=np.float32)}
    good = random(params, 2)
    sequence = [good[0], spoiled(good[0], NAN), spoiled(good[0], 1e20, "a"), good[1]]
    expected, expected_state = run(stepper(tx), params, tx.init(params), sequence)
    sharded = [jax.device_put(g, shardings) for g in sequence]
    assert len(sharded[1]["b"].sharding.device_set) == 8
    step, params = stepper(tx), jax.device_put(params, shardings)
    once = step(params, tx.init(params), sharded[0])
    after = run(step, *once, sharded[1:3])
    same((after[0], after[1].inner_state), (once[0], once[1].inner_state))
    end, end_state = step(*after, sharded[3])
    same((end, end_state), (expected, expected_state))  # Adam's coordinates do not see each other
    assert rejected(end_state) == (2, 0)
    for moment in (end, end_state.inner_state[0].nu):
        for name, x in moment.items():
            assert x.sharding.is_equivalent_to(shardings[name], x.ndim)
    jax.effects_barrier()
    assert calls == [("gradient", "b"), ("state", "0/nu/a")] * 2  # without shards, and once over all of them


PARTS = {"a": "x", "b": "y"}
WRAPPED = {
    "around masked": lambda: ao.reject_nonfinite(optax.masked(ao.adam(rate), {"a": True, "b": False})),
    "around partition": lambda: ao.reject_nonfinite(
        optax.partition({"x": ao.adam(rate), "y": ao.sgd(0.1, momentum=0.9)}, PARTS)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_around_a_part_of_the_parameters_all_are_kept(name):
    tx = WRAPPED[name]()
    step, start, (first, second) = stepper(tx), tx.init(SMALL), random(SMALL, 2)
    expected, expected_state = run(step, SMALL, start, [first, second])
    for leaf in PARTS:
        params, state = run(step, SMALL, start, [first, spoiled(first, NAN, leaf), second])
        same((params, state.inner_state), (expected, expected_state.inner_state))
        assert rejected(state) == (1, 0)


def test_inside_a_partition_each_group_decides_alone():
    groups = {"x": ao.reject_nonfinite(ao.adam(0.1)), "y": ao.reject_nonfinite(ao.sgd(0.1))}
    tx = optax.partition(groups, PARTS)
    params, state = run(stepper(tx), SMALL, tx.init(SMALL), [bad_b(NAN)])
    same(params["b"], SMALL["b"])
    assert np.all(params["a"] != SMALL["a"])
    assert [rejected(state.inner_states[group]) for group in "xy"] == [(0, 0), (1, 1)]
    masked = optax.masked(ao.reject_nonfinite(ao.sgd(0.1)), {"a": True, "b": False})
    updates, state = masked.update(spoiled(SMALL, NAN, "a"), masked.init(SMALL), SMALL)
    assert rejected(state) == (1, 1) and not np.any(updates["a"])
    same(updates["b"], SMALL["b"])  # which it does not see


INPUTS = np.random.default_rng(3).standard_normal((3, 8, 4)).astype(np.float32)
BAD_INPUTS = np.where(INPUTS[0] > 1, NAN, INPUTS[0]).astype(np.float32)


def test_with_nnx():
    def trained(batches):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, ao.reject_nonfinite(ao.adamw(rate)), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(batch) ** 2))(model))

        for batch in batches:
            step(model, optimizer, batch)
        return nnx.to_pure_dict(nnx.state(model)), optimizer.opt_state

    expected, expected_state = trained(INPUTS)
    params, state = trained([INPUTS[0], BAD_INPUTS, BAD_INPUTS, *INPUTS[1:], BAD_INPUTS])
    same(params, expected)
    same(state.inner_state, expected_state.inner_state)
    assert rejected(state) == (3, 1)
    assert all(type(x) is type(jnp.ones(())) for x in ao.get_rejections(state))  # no Variable


def test_with_a_train_state():
    tx = ao.reject_nonfinite(ao.adamw(rate))
    start = TrainState.create(apply_fn=None, params={"w": np.ones((4, 2), np.float32)}, tx=tx)

    @jax.jit
    def step(state, batch):
        gradients = jax.grad(lambda params: jnp.mean((batch @ params["w"]) ** 2))(state.params)
        return state.apply_gradients(grads=gradients)

    def trained(batches):
        return functools.reduce(step, batches, start)

    expected, state = trained(INPUTS), trained([BAD_INPUTS, *INPUTS])
    same((state.params, state.opt_state.inner_state), (expected.params, expected.opt_state.inner_state))
    assert rejected(state.opt_state) == (1, 0)
    assert state.step == 4  # Flax's own counter counts calls


# --- Reading the counters -----------------------------------------------------------------------------------


def test_the_counters():
    tx = ao.reject_nonfinite(ao.sgd(0.1))
    state, seen = tx.init(SMALL), []
    for bad in (0, 1, 1, 0, 1, 0, 0):
        _, state = tx.update(bad_b(NAN) if bad else SMALL, state)
        seen.append(rejected(state))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0), (3, 0)]
    counters = ao.get_rejections(state)
    assert isinstance(counters, ao.Rejections)
    assert all(x.dtype == jnp.int32 and x.shape == () for x in counters)
    last = jnp.full((), np.iinfo(np.int32).max, jnp.int32)
    _, state = tx.update(bad_b(NAN), state._replace(total=last, in_a_row=last))
    assert rejected(state) == (last, last)  # they stay there rather than go round


DEPTHS = {
    "chain": lambda tx: optax.chain(ao.clip_by_global_norm(1.0), tx),
    "verified": ao.verified,
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": True}),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.set_to_zero()}, {"a": "y", "b": "x"}),
    "accumulated": lambda tx: optax.MultiSteps(tx, 1),
    "injected": lambda tx: ao.inject_hyperparams(lambda eps: optax.chain(tx, optax.scale(eps)))(1.0),
    "master weights": ao.master_weights,
}


@pytest.mark.parametrize("name", DEPTHS)
def test_they_are_found_at_any_depth(name):
    tx = DEPTHS[name](ao.reject_nonfinite(ao.sgd(0.1)))
    _, state = tx.update(bad_b(NAN), tx.init(SMALL), SMALL)
    assert rejected(state) == (1, 1)


def test_there_must_be_one_to_read():
    sentence = "opt_state must hold one state of reject_nonfinite, got {}."
    tx = ao.reject_nonfinite(ao.sgd(0.1))
    for wrong, number in (
        (ao.adam(0.1).init(SMALL), 0),
        (tx, 0),
        (None, 0),
        (optax.chain(tx, tx).init(SMALL), 2),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence.format(number))):
            ao.get_rejections(wrong)


# --- States that do not keep their types --------------------------------------------------------------------

DRIFTS = {
    "structure": (
        inner(lambda g, s: (g, (g,)), lambda params: ()),
        SMALL,
        r"the state of inner changed from PyTreeDef\(.*\) to PyTreeDef\(.*\); it must keep its structure",
    ),
    "shape": (
        inner(lambda g, s: (g, {"m": g["b"][None]}), lambda params: {"m": params["b"]}),
        SMALL,
        r"the state 'm' of inner changed from float32\(3,\) to float32\(1, 3\); it must keep its shape",
    ),
    "dtype": (
        inner(lambda g, s: (g, s + 0.5), lambda params: jnp.zeros((), jnp.int32)),
        SMALL,
        r"the state '' of inner changed from int32\(\) to float32\(\)",
    ),
    "optax on bfloat16 parameters": (
        optax.adam(0.1),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), SMALL),
        r"the state '0/mu/a' of inner changed from bfloat16\(2, 3\) to float32\(2, 3\); .*cast the gradients",
    ),
}


@pytest.mark.parametrize("kind", DRIFTS)
def test_a_state_that_does_not_keep_its_types_is_refused(kind):
    drifting, params, sentence = DRIFTS[kind]
    tx = ao.reject_nonfinite(drifting)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match="^reject_nonfinite: " + sentence):
            update(SMALL, state, params)


def test_a_foreign_state_is_refused():
    tx = ao.reject_nonfinite(ao.sgd(0.1))
    with pytest.raises(ValueError, match="reject_nonfinite: the state must be a .*RejectNonfiniteState"):
        tx.update(SMALL, ao.sgd(0.1).init(SMALL))


# --- Verified -----------------------------------------------------------------------------------------------


def checked(tx, gradients):
    step, state = chex.chexify(jax.jit(tx.update)), tx.init(SMALL)
    try:
        for g in gradients:
            updates, state = step(g, state, SMALL)
    finally:
        step.wait_checks()
    return updates, state


def counting(by):
    return inner(lambda g, s: (g, {"count": s["count"] + by}), lambda params: {"count": jnp.zeros((), int)})


RIGHT = {
    "rejected": (lambda: ao.reject_nonfinite(ao.adam(rate)), 3),
    "rejected beside what is not": (lambda: optax.chain(ao.reject_nonfinite(ao.adam(rate)), counting(1)), 3),
    # The inner one rejects what the outer one does not see.
    "rejected inside what is accepted": (
        lambda: ao.reject_nonfinite(
            optax.chain(exponential, ao.reject_nonfinite(ao.adam(rate)), counting(1))
        ),
        0,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_verified_lets_a_rejection_pass(name):
    build, rejections = RIGHT[name]
    bad = [bad_b(100.0)] * 3 if "inside" in name else [bad_b(NAN), bad_b(1e20), spoiled(SMALL, INF, "a")]
    tx = ao.verified(build())
    updates, state = checked(tx, [SMALL, *bad, SMALL])
    assert rejected(state)[0] == rejections
    assert ao.get_hyperparams(state)["learning_rate"] == np.float32(rate(1))
    expected, _ = checked(tx, [SMALL, SMALL])
    same(updates, expected)


def counting_the_rejected():
    """A transaction that forgets to undo the count."""
    right = ao.reject_nonfinite(counting(1))

    def update(updates, state, params=None, **extra_args):
        updates, new = right.update(updates, state, params, **extra_args)
        return updates, new._replace(inner_state={"count": state.inner_state["count"] + 1})

    return optax.GradientTransformationExtraArgs(right.init, update)


divided_by_zero = inner(lambda g, s: (jax.tree.map(lambda x: x / 0, g), s))

WRONG = {
    "a count that stands still": (
        lambda: ao.reject_nonfinite(counting(0)),
        SMALL,
        "'inner_state/count' did not grow by one",
    ),
    "a count that skips": (
        lambda: ao.reject_nonfinite(counting(2)),
        SMALL,
        "'inner_state/count' did not grow by one",
    ),
    "a rejected count that grows": (
        counting_the_rejected,
        bad_b(NAN),
        "'inner_state/count' did not grow by one",
    ),
    "a count beside it that stands still": (
        lambda: optax.chain(ao.reject_nonfinite(ao.sgd(0.1)), counting(0)),
        bad_b(NAN),
        "'1/count' did not grow by one",
    ),
    "an update behind it": (
        lambda: optax.chain(ao.reject_nonfinite(ao.sgd(0.1)), divided_by_zero),
        bad_b(NAN),
        "the update of 'a' is not finite",
    ),
    "a moment beside it": (
        lambda: optax.chain(ao.trace(0.9), optax.set_to_zero(), ao.reject_nonfinite(ao.sgd(0.1))),
        bad_b(NAN),
        "the state '0/trace/b' is no longer finite",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_verified_still_finds_what_is_wrong(name):
    build, gradient, sentence = WRONG[name]
    with pytest.raises(AssertionError, match=re.escape("verified: " + sentence)):
        checked(ao.verified(build()), [gradient])

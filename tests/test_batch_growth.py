"""`grow_batch`: against the reference, at the ends of the run, and the same risk as the decay's."""

import math
import pickle
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from reference import batch_growth as reference
from tolerances import REFERENCE

import adaptive_optax as ao

ADAM = {"kind": "adam", "b1": 0.9, "b2": 0.999, "eps": 1e-8}
KINDS = {"sgd": {"kind": "sgd"}, "adam": ADAM}
TOTAL = 150

SCHEDULES = {
    "staircase": ao.step_decay(0.1, 0.5, 30),
    "0.8 every so often": ao.step_decay(0.1, 0.8, 11),
    "exponential": ao.exponential_decay(0.3, TOTAL, 0.01),
    "linear to 0": optax.linear_schedule(0.3, 0.0, TOTAL - 1),
    "cosine to 0": ao.warmup_cosine(0.3, TOTAL),
    "0 for a while": lambda t: jnp.where(t < 100, 0.3, 0.0),
    "warm-up and cosine": ao.warmup_cosine(0.3, TOTAL, warmup_steps=30),
    "one-cycle": ao.one_cycle(0.3, TOTAL).learning_rate,
    "plateau": ao.warmup_stable_decay(0.3, TOTAL, warmup_steps=20, decay_steps=50),
    "restarts": ao.cyclical(0.3, 0.01, 20),  # up again: no emission may take its small rate across
    "constant": lambda t: 0.1,
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def values(schedule, count):
    return np.asarray(jax.vmap(schedule)(jnp.arange(count)))


def tables(growth):
    """Emission by emission: k and the learning rate."""
    return values(growth.accumulation_steps, growth.emissions), values(growth.learning_rate, growth.emissions)


# --- The rules ----------------------------------------------------------------------------------------------


@each_kind
@each_schedule
def test_it_equals_the_reference(name, kind):
    rates = values(SCHEDULES[name], TOTAL).astype(float)
    growth = ao.grow_batch(SCHEDULES[name], total_steps=TOTAL, max_factor=8, **KINDS[kind])
    k, rate = tables(growth)
    expected = reference.grow(rates.tolist(), 8, kind)
    assert k.tolist() == [factor for factor, _ in expected] and k.dtype == np.int32
    np.testing.assert_allclose(rate, [rate for _, rate in expected], rtol=REFERENCE["float32"])
    if kind == "sgd":
        assert growth.b1 is growth.b2 is growth.eps is None
        np.testing.assert_allclose(rate.sum(dtype=float), rates.sum(), rtol=1e-6)
        return
    # An average over 1 / (1 - b) steps goes over as many samples as before.
    for b, schedule in ((0.9, growth.b1), (0.999, growth.b2)):
        np.testing.assert_allclose(values(schedule, len(k)), 1 - k * (1 - b), rtol=REFERENCE["float32"])
    np.testing.assert_allclose(values(growth.eps, len(k)) * np.sqrt(k), 1e-8, rtol=REFERENCE["float32"])


def test_in_float64(x64):
    growth = ao.grow_batch(SCHEDULES["exponential"], total_steps=TOTAL, max_factor=8, **ADAM)
    rates = values(SCHEDULES["exponential"], TOTAL)
    expected = [rate for _, rate in reference.grow(rates.tolist(), 8, "adam")]
    assert growth.learning_rate(0).dtype == jnp.float64 and growth.accumulation_steps(0).dtype == jnp.int32
    np.testing.assert_allclose(tables(growth)[1], expected, rtol=REFERENCE["float64"])


@given(
    shape=st.lists(st.floats(0, 1), min_size=1, max_size=60).filter(any),
    max_factor=st.integers(1, 9),
    kind=st.sampled_from(list(KINDS)),
)
def test_whatever_the_schedule(shape, max_factor, kind):
    shape = np.asarray(shape, np.float32)
    if not shape.any():
        return
    growth = ao.grow_batch(
        lambda t: jnp.asarray(shape)[t], total_steps=len(shape), max_factor=max_factor, **KINDS[kind]
    )
    n = np.arange(growth.emissions)
    k, rate = np.asarray(growth.accumulation_steps(n)), np.asarray(growth.learning_rate(n))
    assert k.sum() == len(shape) and 1 <= k.min() and k.max() <= max_factor
    peak = int(shape.argmax())
    np.testing.assert_array_equal(k[:peak], 1)
    np.testing.assert_array_equal(rate[:peak], shape[:peak])
    assert np.all(rate <= shape.max() * (1 + 2e-5))


def test_smith_et_al():
    # Their figure 1: where the rate falls by a factor of 5, the batch grows by it; at the largest batch the
    # rate falls after all.
    schedule = ao.step_decay(0.1, 0.2, 125)
    k, rate = tables(ao.grow_batch(schedule, total_steps=500, max_factor=25))
    assert k.tolist() == [1] * 125 + [5] * 25 + [25] * 10
    np.testing.assert_allclose(rate, [0.1] * 155 + [0.02] * 5, rtol=1e-6)
    # Adam's batch grows by the square.
    k, rate = tables(
        ao.grow_batch(schedule, total_steps=500, max_factor=25, kind="adam", b1=0, b2=0.99, eps=0)
    )
    assert k.tolist() == [1] * 125 + [25] * 15
    np.testing.assert_allclose(rate, [0.1] * 130 + [0.02] * 5 + [0.004] * 5, rtol=1e-6)


def test_during_a_warm_up_the_batch_stays_small():
    growth = ao.grow_batch(SCHEDULES["warm-up and cosine"], total_steps=TOTAL, max_factor=8)
    k, rate = tables(growth)
    assert (k[:31] == 1).all() and k.max() == 8
    np.testing.assert_array_equal(rate[:31], values(SCHEDULES["warm-up and cosine"], 31))


def test_the_last_emission_ends_on_the_last_step():
    k, rate = tables(ao.grow_batch(lambda t: 0.5 ** (t // 4), total_steps=11, max_factor=4))
    assert k.tolist() == [1, 1, 1, 1, 2, 2, 3]  # the last has a factor of 4 at its disposal
    np.testing.assert_allclose(rate, [1, 1, 1, 1, 1, 1, 0.75])


def test_rates_of_0_take_the_largest_batch():
    growth = ao.grow_batch(SCHEDULES["0 for a while"], total_steps=TOTAL, max_factor=8, **ADAM)
    k, rate = tables(growth)
    assert k.tolist() == [1] * 100 + [8] * 6 + [2]
    np.testing.assert_array_equal(rate[100:], 0)


def test_after_the_run_the_last_values_hold():
    growth = ao.grow_batch(SCHEDULES["exponential"], total_steps=TOTAL, max_factor=8, **ADAM)
    for schedule in growth[:5]:
        last = schedule(growth.emissions - 1)
        for count in (growth.emissions, 2**31 - 1, np.int64(2**40)):
            assert schedule(count) == last and schedule(count).dtype == last.dtype
        assert schedule(-1) == schedule(0) == schedule(0.9) and not schedule(0).weak_type


def test_b1_and_b2_of_0_stay_and_reach_0():
    growth = ao.grow_batch(lambda t: 0.5**t, total_steps=20, max_factor=10, kind="adam", b1=0.9, b2=0, eps=1)
    k = values(growth.accumulation_steps, growth.emissions)
    b1 = values(growth.b1, growth.emissions)
    assert k.max() == 10 and 0 <= b1[k == 10].max() < 1e-15
    assert not values(growth.b2, growth.emissions).any()


def test_a_traced_peak_is_a_factor():
    def rate(peak, count):
        growth = ao.grow_batch(ao.exponential_decay(1.0, 50, 0.5), total_steps=TOTAL, max_factor=8)
        return peak * growth.learning_rate(count)

    growth = ao.grow_batch(ao.exponential_decay(0.3, 50, 0.5), total_steps=TOTAL, max_factor=8)
    for count in (0, 50, 70):
        np.testing.assert_allclose(
            jax.jit(rate)(np.float32(0.3), count), growth.learning_rate(count), rtol=1e-6
        )
    sentence = "schedule must return concrete values, got a tracer: for a traced peak pass grow_batch a"
    for transformed in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(ValueError, match=sentence):
            transformed(
                lambda peak: ao.grow_batch(
                    ao.exponential_decay(peak, 50, 0.5), total_steps=9, max_factor=2
                ).learning_rate(0)
            )(jnp.float32(0.3) if transformed is not jax.vmap else jnp.ones(2))


@each_kind
def test_strict_dtype_promotion(kind):
    with jax.numpy_dtype_promotion("strict"):
        growth = ao.grow_batch(SCHEDULES["cosine to 0"], total_steps=TOTAL, max_factor=8, **KINDS[kind])
        for schedule in growth[:5]:
            if schedule is not None:
                jax.jit(schedule)(jnp.int32(3))


# --- The same risk ------------------------------------------------------------------------------------------

CURVATURE, START = 1.5, 4.0


def relative_difference(size, kind):
    """How much the two runs' risks differ at the end, with the largest rate `size`.

    The run lasts as long in units of 1 / rate, and the noise is such that the risk does not depend on `size`
    to leading order: both runs are discretizations of dE = -2 h E dt + f(t) dt.
    """
    steps, noise = round(8 / size), 1 / size

    def schedule(t):
        return size * (0.2 + 0.8 * jnp.exp(-((size * t / 3) ** 2)))

    growth = ao.grow_batch(schedule, total_steps=steps, max_factor=8, **KINDS[kind])
    k, rate = (table.astype(float) for table in tables(growth))
    assert growth.emissions < 0.7 * steps
    if kind == "adam":
        # Where noise rules, v is its variance c / k: a step is rate / sqrt(c / k) times the gradient.
        rate = rate * np.sqrt(k)
    decayed = [(1, a) for a in values(schedule, steps).astype(float)]
    grown = list(zip(k, rate, strict=True))
    risks = [reference.risk(run, CURVATURE, noise, START) for run in (decayed, grown)]
    return risks[1] / risks[0] - 1


@each_kind
def test_the_risks_agree_to_first_order(kind):
    differences = np.array([relative_difference(size, kind) for size in (0.04, 0.02, 0.01)])
    assert 1e-3 < differences[-1] < 0.01
    np.testing.assert_allclose(differences[:-1] / differences[1:], 2, rtol=0.05)


def test_a_simulation_has_the_risk_of_the_recursion():
    size, total, noise, members = 0.2, 120, 0.5, 40_000

    def schedule(t):
        return size * 0.02 ** (t / total)

    growth = ao.grow_batch(schedule, total_steps=total, max_factor=8)
    tx = ao.accumulate_gradients(ao.sgd(growth.learning_rate), growth.accumulation_steps)

    @jax.jit
    def trained(key):
        def body(carry, key):
            x, state = carry
            g = CURVATURE * x + jnp.sqrt(noise) * jax.random.normal(key, x.shape)
            updates, state = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), state), state.count

        x = jnp.full(members, math.sqrt(START))
        (x, state), _ = jax.lax.scan(body, (x, tx.init(x)), jax.random.split(key, total))
        return x, state

    x, state = trained(jax.random.key(0))
    assert state.count == growth.emissions < 0.6 * total and state.micro_step == 0
    steps = list(zip(*map(np.float64, tables(growth)), strict=True))
    expected = reference.risk(steps, CURVATURE, noise, START)
    mean = math.sqrt(START) * np.prod([1 - rate * CURVATURE for _, rate in steps])
    # x is N(mean, v): the variance of its square is 2 v^2 + 4 mean^2 v.
    v = expected - mean**2
    error = math.sqrt((2 * v**2 + 4 * mean**2 * v) / members)
    assert abs(np.mean(np.square(np.float64(x))) - expected) < 4 * error < 0.03 * expected
    decayed = reference.risk([(1, a) for a in values(schedule, total)], CURVATURE, noise, START)
    assert abs(expected / decayed - 1) < 0.2


def test_adam_takes_all_its_schedules():
    growth = ao.grow_batch(SCHEDULES["exponential"], total_steps=TOTAL, max_factor=8, **ADAM)
    inner = ao.adam(growth.learning_rate, b1=growth.b1, b2=growth.b2, eps=growth.eps)
    tx = ao.accumulate_gradients(inner, growth.accumulation_steps)
    state, x = tx.init(jnp.ones(3)), jnp.ones(3)

    @jax.jit
    def trained(x, state):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(2 * x, state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(body, (x, state), length=TOTAL)[0]

    x, state = trained(x, state)
    assert state.count == growth.emissions and jnp.all(jnp.abs(x) < 0.1)
    last = growth.emissions - 1
    for name, value in ao.get_hyperparams(state).items():
        if name != "eps_root":
            assert value == getattr(growth, name)(last), name


# --- Arguments ----------------------------------------------------------------------------------------------

RIGHT = {"schedule": SCHEDULES["exponential"], "total_steps": 10, "max_factor": 4}
WRONG = [
    ({"schedule": 0.1}, "schedule must be a function of the step count, got 0.1."),
    ({"schedule": lambda t: 0.1 - 0.05 * t}, "schedule must be at least 0 and finite, got -0.05 at step 3."),
    ({"schedule": lambda t: 0.1 / (t - 4)}, "got -0.025 at step 0."),
    ({"schedule": lambda t: 0.1 / jnp.abs(t - 4)}, "got inf at step 4."),
    ({"schedule": lambda t: jnp.nan * t}, "got nan at step 0."),
    ({"schedule": lambda t: 0.0 * t}, "schedule must be positive somewhere, got 0 at all 10 steps."),
    ({"schedule": lambda t: jnp.ones(2)}, "schedule must return a scalar, got an array of shape (2,)."),
    ({"total_steps": 0}, "total_steps must be an integer in [1, 2147483647], got 0."),
    ({"total_steps": 1.5}, "total_steps must be"),
    ({"max_factor": 0}, "max_factor must be an integer in [1, 2147483647], got 0."),
    ({"kind": "rmsprop"}, "kind must be one of 'sgd', 'adam', got 'rmsprop'."),
    ({"b1": 0.9}, "b1 is used by kind='adam' only, got 0.9 with kind='sgd'."),
    ({"eps": 1e-8}, "eps is used by kind='adam' only"),
    (ADAM | {"b2": None}, "b2 is needed with kind='adam', got None."),
    (ADAM | {"eps": None}, "eps is needed with kind='adam', got None."),
    (ADAM | {"b1": 1.0}, "b1 must be a number in [0, 1), got 1.0."),
    (ADAM | {"eps": -1.0}, "eps must be a number in [0, inf), got -1.0."),
    (ADAM | {"max_factor": 11}, "max_factor must be at most 1 / (1 - b1) = 10 with kind='adam', got 11"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=range(len(WRONG)))
def test_arguments_out_of_range(wrong, sentence):
    arguments = RIGHT | wrong
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ao.grow_batch(arguments.pop("schedule"), **arguments)


def test_a_traced_decay_is_refused():
    with pytest.raises(ValueError, match="b1 must be concrete in grow_batch, got a tracer"):
        jax.jit(lambda b1: ao.grow_batch(**RIGHT | ADAM | {"b1": b1}).learning_rate(0))(0.9)


def test_it_is_five_schedules_that_can_be_pickled():
    growth = ao.grow_batch(ao.step_decay(0.8, 0.5, every=4), total_steps=12, max_factor=2)
    steps, rate, b1, b2, eps = growth
    assert growth.emissions == 8 and (b1, b2, eps) == (None, None, None)
    again = pickle.loads(pickle.dumps(growth))
    assert [int(again.accumulation_steps(n)) for n in range(9)] == [int(steps(n)) for n in range(9)]
    with pytest.raises(ValueError, match="got a BatchGrowth: pass its accumulation_steps"):
        ao.accumulate_gradients(ao.sgd(rate), growth)

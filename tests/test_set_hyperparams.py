"""Hyperparameters that are set: for how long a value holds, and which values are refused."""

import copy
import fractions
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from injected import LABELS, ONES, PARAMS, SEEN, SGD, halving, unannotated, value
from saving import same, spec

import adaptive_optax as ao

each_sgd = pytest.mark.parametrize("build", SGD.values(), ids=SGD)


def rates(tx, state, steps):
    """The learning rates of the next steps, from the updates themselves."""
    used = []
    for _ in range(steps):
        updates, state = tx.update(ONES, state)
        used.append(-float(updates["b"][0]))
        assert value(state) == used[-1]
    return used, state


@each_sgd
def test_a_value_that_is_set_stays_until_it_is_released(build):
    tx = build(halving)
    used, state = rates(tx, tx.init(ONES), 2)
    assert used == [halving(0), halving(1)]
    state = ao.set_hyperparams(state, learning_rate=3)
    assert value(state) == 3
    used, state = rates(tx, state, 3)
    assert used == [3, 3, 3]
    used, state = rates(tx, ao.set_hyperparams(state, learning_rate=0), 1)
    assert used == [0]
    used, state = rates(tx, ao.set_hyperparams(state, learning_rate=None), 2)
    assert used == [halving(6), halving(7)]  # the schedule has gone on
    constant = build(0.25)
    used, state = rates(constant, ao.set_hyperparams(constant.init(ONES), learning_rate=0.5), 2)
    assert used == [0.5, 0.5]
    assert rates(constant, ao.set_hyperparams(state, learning_rate=None), 1)[0] == [0.25]


@each_sgd
def test_the_value_of_this_moment_can_be_held(build):
    tx = build(halving)
    _, state = rates(tx, tx.init(ONES), 3)
    held = ao.set_hyperparams(state, learning_rate=ao.get_hyperparams(state)["learning_rate"])
    assert rates(tx, held, 2)[0] == [halving(2)] * 2
    first = ao.set_hyperparams(tx.init(ONES), learning_rate=halving(0))
    assert rates(tx, first, 2)[0] == [halving(0)] * 2


@each_sgd
def test_releasing_what_was_not_set_changes_nothing(build):
    tx = build(halving)
    _, state = rates(tx, tx.init(ONES), 1)
    same(ao.set_hyperparams(state, learning_rate=None), state)


@pytest.mark.parametrize("new", [0.25, 2, np.float64(0.25), jnp.float32(0.25)], ids=repr)
@pytest.mark.parametrize("rate", [halving, 1.0], ids=["schedule", "constant"])
def test_assignment_sets_too(rate, new):
    tx = ao.inject_hyperparams(ao.sgd)(rate, momentum=0.0)
    _, state = rates(tx, tx.init(ONES), 1)
    state.hyperparams["learning_rate"] = new
    assert ao.get_hyperparams(state)["learning_rate"] == new
    assert rates(tx, ao.set_hyperparams(state, learning_rate=0.125), 1)[0] == [0.125]
    assert rates(tx, ao.set_hyperparams(state, learning_rate=None), 1)[0] == [
        rate(1) if callable(rate) else rate
    ]
    used, state = rates(tx, state, 2)
    assert used == [new, new]
    assert {name: bool(x) for name, x in state.overridden.items()} == {
        "learning_rate": True,
        "momentum": False,
    }
    used, _ = rates(tx, ao.set_hyperparams(state, learning_rate=None), 1)
    assert used == [rate(3) if callable(rate) else rate]


def test_a_nan_of_a_schedule_passes():
    # 0 / 0 at the start; it is not taken for a value that was assigned.
    tx = ao.inject_hyperparams(optax.sgd)(lambda count: jnp.sin(0.0 * count) / count)
    _, state = tx.update(ONES, tx.init(ONES))
    assert np.isnan(ao.get_hyperparams(state)["learning_rate"]) and not state.overridden["learning_rate"]
    assert rates(tx, state, 1)[0] == [0.0]


def test_several_at_once_and_what_was_given_stays():
    tx = ao.inject_hyperparams(ao.adamw)(halving)
    state = tx.init(ONES)
    before = copy.deepcopy(state)
    new = ao.set_hyperparams(state, learning_rate=0.125, b1=0.5, weight_decay=0.25)
    same(state, before)
    expected = ao.get_hyperparams(state) | {"learning_rate": 0.125, "b1": 0.5, "weight_decay": 0.25}
    assert ao.get_hyperparams(new) == expected
    with pytest.raises(ValueError):
        ao.set_hyperparams(state, learning_rate=0.125, nothing=1.0)
    same(state, before)


# name: (the transformation, the key)
DEPTHS = {
    "chain": (lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adam(halving)), "learning_rate"),
    "chain of two": (lambda: optax.chain(ao.adam(halving), ao.sgd(halving)), "1/learning_rate"),
    "partition": (
        lambda: optax.partition({"head": ao.adam(halving), "body": ao.sgd(halving)}, LABELS),
        "head/learning_rate",
    ),
    "partition, injected": (
        lambda: optax.partition(
            {"head": ao.adam(0.1), "body": ao.inject_hyperparams(ao.sgd)(halving, momentum=0.5)}, LABELS
        ),
        "body/learning_rate",
    ),
    "masked": (
        lambda: optax.masked(ao.inject_hyperparams(optax.adam)(halving), {"a": True, "b": False}),
        "learning_rate",
    ),
    "reject_nonfinite": (
        lambda: ao.reject_nonfinite(optax.chain(ao.trace(0.5), ao.inject_hyperparams(ao.adam)(halving))),
        "learning_rate",
    ),
    "verified": (lambda: ao.verified(ao.inject_hyperparams(ao.adamw)(halving)), "weight_decay"),
    "accumulated": (lambda: optax.MultiSteps(ao.inject_hyperparams(ao.sgd)(halving, 0.5), 1), "momentum"),
    "master weights": (lambda: ao.master_weights(ao.rmsprop(halving, momentum=0.5)), "learning_rate"),
    "inside what is injected": (
        lambda: ao.inject_hyperparams(lambda scale=1.0: optax.chain(ao.adam(halving), optax.scale(scale)))(),
        "learning_rate",
    ),
    "around what is not": (
        lambda: ao.inject_hyperparams(lambda scale=1.0: optax.chain(ao.adam(halving), optax.scale(scale)))(),
        "scale",
    ),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_at_any_depth(name):
    build, key = DEPTHS[name]
    tx = build()
    state = tx.init(PARAMS)
    before = copy.deepcopy(state)
    new = ao.set_hyperparams(state, **{key: 0.0625})
    same(state, before)
    assert spec(new) == spec(state)
    others = {name: x for name, x in ao.get_hyperparams(state).items() if name != key}
    assert ao.get_hyperparams(new) == others | {key: 0.0625}
    for step in range(2):
        _, new = tx.update(ONES, new, PARAMS)
        _, state = tx.update(ONES, state, PARAMS)
        assert ao.get_hyperparams(new) == ao.get_hyperparams(state) | {key: 0.0625}, step
    _, state = tx.update(ONES, state, PARAMS)
    _, new = tx.update(ONES, ao.set_hyperparams(new, **{key: None}), PARAMS)
    assert ao.get_hyperparams(new) == ao.get_hyperparams(state)


INPUTS = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "tx", [ao.inject_hyperparams(ao.adamw)(halving), ao.adamw(halving)], ids=["injected", "plain"]
)
def test_with_nnx(tx):
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ao.reject_nonfinite(tx), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(INPUTS) ** 2))(model))

    def moved(rate):
        before = jnp.copy(model.kernel[...])
        step(model, optimizer)
        assert value(optimizer.opt_state) == rate
        return float(jnp.abs(model.kernel[...] - before).max())

    moved(halving(0))
    given = optimizer.opt_state
    optimizer.opt_state = ao.set_hyperparams(given, learning_rate=0.0)
    assert value(given) == halving(0) and value(optimizer.opt_state) == 0.0
    assert moved(0.0) == 0.0
    optimizer.opt_state = ao.set_hyperparams(optimizer.opt_state, learning_rate=0.25)
    assert 0.05 < moved(0.25) < 0.5
    optimizer.opt_state = ao.set_hyperparams(optimizer.opt_state, learning_rate=None)
    assert moved(halving(3)) > 0
    assert len(traces) == 1


def test_with_a_train_state():
    state = TrainState.create(
        apply_fn=None, params=ONES, tx=optax.chain(ao.clip_by_global_norm(1.0), ao.sgd(halving))
    )
    state = state.replace(opt_state=ao.set_hyperparams(state.opt_state, learning_rate=0.0))
    later = jax.jit(lambda state: state.apply_gradients(grads=ONES))(state)
    same(later.params, jax.tree.map(jnp.asarray, ONES))
    assert value(later.opt_state) == 0.0


@each_sgd
def test_a_vmapped_state_takes_one_value_or_one_a_member(build):
    tx = build(halving)
    state = jax.vmap(lambda _: tx.init(ONES))(jnp.arange(3))
    many = jax.tree.map(lambda x: np.stack([x] * 3), ONES)
    for given, expected in (
        (0.5, [0.5, 0.5, 0.5]),
        ([0.5, 0.25, 2.0], [0.5, 0.25, 2.0]),
        (np.array([0.5, 0.0, 2.0]), [0.5, 0.0, 2.0]),
        (jnp.array([1, 2, 3]), [1, 2, 3]),
    ):
        new = ao.set_hyperparams(state, learning_rate=given)
        assert spec(new) == spec(state)
        assert ao.get_hyperparams(new)["learning_rate"].tolist() == expected
        updates, new = jax.vmap(tx.update)(many, new)
        assert (-updates["b"][:, 0]).tolist() == expected
    for wrong in (np.ones((3, 1)), np.ones(2), [0.5, -0.25, 2.0], [0.5, 1.0, np.nan], [True] * 3, "abc"):
        with pytest.raises(ValueError, match="learning_rate must be a number in"):
            ao.set_hyperparams(state, learning_rate=wrong)

    @jax.jit
    def swept(rates):
        def one(rate):
            state = ao.set_hyperparams(tx.init(ONES), learning_rate=rate)
            return tx.update(ONES, state)[0]["b"][0]

        return jax.vmap(one)(rates), ao.set_hyperparams(state, learning_rate=rates)

    updates, new = swept(jnp.array([0.5, 0.25, 2.0]))
    assert (-updates).tolist() == ao.get_hyperparams(new)["learning_rate"].tolist() == [0.5, 0.25, 2.0]


# --- What is refused ----------------------------------------------------------------------------------------


PARTITION = optax.partition({"head": ao.adam(0.1), "body": ao.sgd(0.1)}, LABELS)
REFUSED = {
    "unknown": (
        ao.inject_hyperparams(ao.sgd)(0.1, momentum=0.9),
        {"lr": 0.1},
        "set_hyperparams: 'lr' is unknown; the keys are learning_rate, momentum.",
    ),
    "unknown, released": (ao.sgd(0.1), {"lr": None}, "'lr' is unknown; the keys are learning_rate."),
    "ambiguous": (
        PARTITION,
        {"learning_rate": 0.1},
        "'learning_rate' is ambiguous: ['head/learning_rate', 'body/learning_rate']; the keys are ",
    ),
    "a path too many": (ao.sgd(0.1), {"0/learning_rate": 0.1}, "'0/learning_rate' is unknown; the keys are"),
    "read only": (
        ao.adam(0.1),
        {"b1": 0.5},
        "set_hyperparams: 'b1' of ScaleByAdamState is read-only; wrap the factory in inject_hyperparams "
        "to set it. The keys are b1, b2, eps, learning_rate.",
    ),
    "read only, released": (ao.adamw(0.1), {"weight_decay": None}, "is read-only"),
    "no hyperparameters": (optax.sgd(0.1), {"learning_rate": 0.1}, "holds no hyperparameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_refused(name):
    tx, values, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ao.set_hyperparams(tx.init(PARAMS), **values)


@each_sgd
def test_values_that_are_refused(build):
    state = build(0.5).init(PARAMS)
    wrong = ["0.1", True, 1j, [0.1], np.ones(1), jnp.ones(()) > 0, halving, -0.1, np.float32(-1.0)]
    for one in (*wrong, np.nan, np.inf, jnp.float32(-0.1), 10**400):
        sentence = f"learning_rate must be a number in [0, inf), got {one!r}."
        with pytest.raises(ValueError, match=re.escape(sentence)):
            ao.set_hyperparams(state, learning_rate=one)


def test_other_values_may_be_negative_but_are_numbers():
    state = ao.inject_hyperparams(unannotated)(1.0).init(PARAMS)
    assert value(ao.set_hyperparams(state, scale=-2.0), "scale") == -2.0
    with pytest.raises(ValueError, match=re.escape("scale must be a number in (-inf, inf), got 'high'.")):
        ao.set_hyperparams(state, scale="high")


OUT_OF_RANGE = {
    "learning_rate": (-0.1, 1e300, 1e39),
    "initial_learning_rate": (0.0, -0.1, 1e-50, 1e39),
    "max_learning_rate": (-0.1,),
    "b1": (-0.1, 1.0, 2.0, 1 - 1e-11),  # float32 has only 1 for the last
    "b2": (1.5, -1e-9, 3.0),
    "eps": (-2.0, 1e39),
    "eps_root": (-1e-30,),
    "weight_decay": (-0.1, np.float64(1e300)),
    "momentum": (1.0, -0.5),
    "decay": (1.0, -0.5),
    "initial_scale": (-1.0,),
    "max_norm": (0.0, -1.0, 1e-50),
    "power": (-0.5,),
    "factor": (0.0, 1.0, 1e-60),
    "min_scale": (1.5, -0.5),
}
OWNERS = {
    "weight_decay": (ao.adamw, {"learning_rate": 0.1}),
    "momentum": (ao.sgd, {"learning_rate": 0.1, "momentum": 0.9}),
    "decay": (ao.trace, {"decay": 0.5}),
    "initial_scale": (ao.rmsprop, {"learning_rate": 0.1}),
    "max_norm": (ao.clip_by_global_norm, {"max_norm": 1.0}),
    "power": (ao.average_parameters, {}),
    "factor": (ao.reduce_on_plateau, {}),
    "initial_learning_rate": (ao.adgd, {}),
    "max_learning_rate": (ao.adgd, {"max_learning_rate": 0.1}),
    "min_scale": (ao.reduce_on_plateau, {}),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_what_a_constructor_refuses_cannot_be_set(name):
    factory, arguments = OWNERS.get(name, (ao.adam, {"learning_rate": 0.1}))
    state = ao.inject_hyperparams(factory)(**arguments).init(PARAMS)
    for wrong in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=rf"{name} must be a number in .*, got {re.escape(repr(wrong))}"):
            ao.set_hyperparams(state, **{name: wrong})


def test_the_scale_of_a_plateau_has_the_range_of_a_rate():
    state = ao.reduce_on_plateau().init(PARAMS)
    assert value(ao.set_hyperparams(state, scale=2.0), "scale") == 2.0
    with pytest.raises(ValueError, match=re.escape("scale must be a number in [0, inf), got -1.0.")):
        ao.set_hyperparams(state, scale=-1.0)


def test_max_norm_may_be_inf():
    tx = ao.inject_hyperparams(ao.clip_by_global_norm)(1.0)
    state = ao.set_hyperparams(tx.init(ONES), max_norm=np.inf)
    assert tx.update(ONES, state)[0]["b"].tolist() == [1.0] * 3


CONSTRUCTION = {
    "b1": (lambda: ao.inject_hyperparams(ao.adam)(0.1, b1=1.5), ValueError, "b1 must be a number in [0, 1)"),
    "learning_rate": (
        lambda: ao.inject_hyperparams(ao.sgd)(-0.1),
        ValueError,
        "learning_rate must be a number in [0, inf)",
    ),
    "a schedule's first value": (
        lambda: ao.inject_hyperparams(ao.sgd)(lambda count: count - 1.0),
        ValueError,
        "learning_rate must be a number in [0, inf)",
    ),
    "no scalar from a schedule": (
        lambda: ao.inject_hyperparams(ao.sgd)(lambda count: jnp.ones(2)),
        ValueError,
        "A schedule must return a scalar",
    ),
    "granularity": (
        lambda: ao.inject_hyperparams(ao.adam)(0.1, granularity="row"),
        ValueError,
        "granularity must be",
    ),
    "array": (
        lambda: ao.inject_hyperparams(ao.sgd)(np.ones(2)),
        ValueError,
        "learning_rate must be a number in [0, inf)",
    ),
    "missing": (lambda: ao.inject_hyperparams(ao.adam)(), TypeError, "missing a required argument"),
    "unexpected": (lambda: ao.inject_hyperparams(ao.adam)(0.1, beta=0.5), TypeError, "beta"),
    "static_args": (
        lambda: ao.inject_hyperparams(ao.sgd, "lr"),
        ValueError,
        "static_args must be names of ['learning_rate', 'momentum', 'nesterov', 'accumulator_dtype'], "
        "got ['lr'].",
    ),
    "factory": (
        lambda: ao.inject_hyperparams(0.1),
        ValueError,
        "factory must be a function that returns a transformation, got 0.1.",
    ),
    **{
        f"hyperparam_dtype={wrong!r}": (
            functools.partial(ao.inject_hyperparams, ao.sgd, hyperparam_dtype=wrong),
            ValueError,
            f"hyperparam_dtype must be a floating dtype, got {wrong!r}.",
        )
        for wrong in (jnp.int32, "int8", bool, jnp.complex64, "half precision", None)
    },
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_what_is_refused_at_construction(name):
    build, error, sentence = CONSTRUCTION[name]
    with pytest.raises(error, match=re.escape(sentence)):
        build()


def test_an_optimizer_is_no_factory():
    with pytest.raises(ValueError, match="factory must be a function that returns a transformation"):
        ao.inject_hyperparams(ao.sgd(0.1))


def counting(power=2, scale: float = 1, steps: int | float = 3):
    SEEN.update(locals())
    return optax.identity()


def test_integers_stay_integers_where_the_default_is_one():
    tx = ao.inject_hyperparams(counting)(scale=2)
    state = tx.init(PARAMS)
    assert {name: x.dtype.name for name, x in state.hyperparams.items()} == {
        "power": "int32",
        "scale": "float32",
        "steps": "int32",
    }
    _, state = tx.update(ONES, ao.set_hyperparams(state, power=3))
    assert SEEN["power"] == 3 and SEEN["power"].dtype == jnp.int32
    state.hyperparams["power"] = 1.5
    for wrong in (lambda: ao.set_hyperparams(state, power=0.5), lambda: tx.update(ONES, state)):
        with pytest.raises(ValueError, match="power must be an integer, like the number that was given, got"):
            wrong()
    assert ao.inject_hyperparams(counting)(power=0.5).init(PARAMS).hyperparams["power"] == 0.5


def test_iterations_of_muon():
    tx, params = ao.inject_hyperparams(optax.contrib.muon)(learning_rate=1e-3), {"a": PARAMS["a"]}
    updates, state = jax.jit(tx.update)({"a": ONES["a"]}, tx.init(params), params)
    plain = optax.contrib.muon(1e-3)
    expected, _ = plain.update({"a": ONES["a"]}, plain.init(params), params)
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-5)
    assert state.hyperparams["ns_steps"].dtype == jnp.int32


class Falling(optax.schedules.StatefulSchedule):
    """Halves with every step that is given `bad=True`."""

    def init(self):
        return {"rate": jnp.float32(0.5)}

    def update(self, state, *, bad=False, **extra_args):
        return {"rate": jnp.where(bad, state["rate"] / 2, state["rate"])}

    def __call__(self, state, **extra_args):
        return state["rate"]


def test_stateful_schedules():
    tx = ao.inject_hyperparams(ao.sgd)(Falling(), momentum=optax.schedules.WrappedSchedule(halving))
    state, used = tx.init(ONES), []
    for bad in (True, False, True, False):
        _, state = tx.update(ONES, state, bad=bad)
        used.append((value(state), value(state, "momentum")))
    assert used == [(0.5, 0.5), (0.25, 0.25), (0.25, 0.125), (0.125, 0.0625)]
    held = ao.set_hyperparams(state, learning_rate=2.0)
    assert value(tx.update(ONES, held)[1]) == 2.0


@pytest.mark.parametrize("wrong", ["0.1", None, True, [0.1], np.ones(1), 1j, -1.0, 1e300, np.nan], ids=repr)
def test_assigning_what_cannot_be_set(wrong):
    tx = ao.inject_hyperparams(ao.sgd)(0.5)
    state = tx.init(ONES)
    state.hyperparams["learning_rate"] = wrong
    plain = ao.sgd(0.5)
    replaced = plain.init(ONES)
    replaced = (replaced[0]._replace(learning_rate=wrong), *replaced[1:])
    for one, assigned in ((tx, state), (plain, replaced)):
        with pytest.raises(ValueError, match=re.escape("learning_rate must be a number in [0, inf), got ")):
            one.update(ONES, assigned)


def test_assigning_an_array_of_another_shape_or_kind_or_a_name_that_is_none():
    tx = ao.inject_hyperparams(ao.sgd)(0.5)
    for wrong in (jnp.ones(3), jnp.asarray(1j), jnp.ones((1, 1))):
        state = tx.init(ONES)
        state.hyperparams["learning_rate"] = wrong
        with pytest.raises(ValueError, match="learning_rate must be a scalar of type float32 in the state"):
            jax.eval_shape(tx.update, ONES, state)
    state = tx.init(ONES)
    state.hyperparams["lr"] = 0.1
    with pytest.raises(ValueError, match="must have the keys learning_rate, got learning_rate, lr."):
        tx.update(ONES, state)


def test_a_scale_of_another_factory_has_its_own_range():
    tx = ao.inject_hyperparams(lambda scale: optax.scale(scale))(scale=-1.0)
    state = ao.set_hyperparams(tx.init(jnp.ones(1)), scale=-2.0)
    assert tx.update(jnp.ones(1), state)[0][0] == -2


# --- Values as they are stored ------------------------------------------------------------------------------


ALMOST_1 = 1 - 1e-9  # which float32 has as 1
ROUNDED = {
    "momentum": lambda: ao.sgd(0.1, momentum=ALMOST_1),
    "rmsprop's momentum": lambda: ao.rmsprop(0.1, momentum=ALMOST_1),
    "factor": lambda: ao.reduce_on_plateau(factor=ALMOST_1),
    "backoff_factor": lambda: ao.dynamic_loss_scale(ao.sgd(0.1), backoff_factor=ALMOST_1),
    "max_momentum": lambda: ao.one_cycle(0.1, 10, max_momentum=ALMOST_1),
}
SCHEDULED_DECAYS = {
    "b1": lambda schedule: ao.adam(0.1, b1=schedule, b2=ALMOST_1),  # so that b1^2 < b2
    "b2": lambda schedule: ao.adam(0.1, b2=schedule),
    "decay": lambda schedule: ao.rmsprop(0.1, decay=schedule, bias_correction=True),
    "average": lambda schedule: ao.average_parameters(decay=schedule),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_stored_as_1_is_no_value_below_1(name):
    with pytest.raises(ValueError, match="got 0.999999999, which is 1.0 in float32"):
        ROUNDED[name]()


@pytest.mark.parametrize("name", SCHEDULED_DECAYS)
def test_a_decay_that_a_schedule_gives_is_below_1_as_it_is_stored(name):
    tx, params = SCHEDULED_DECAYS[name](lambda count: ALMOST_1), jnp.ones(2)
    with pytest.raises(ValueError, match="got 0.999999999, which is 1.0 in float32"):
        tx.update(params, tx.init(params), params)
    # Of a number the complement is kept in double precision.
    tx = SCHEDULED_DECAYS[name](ALMOST_1)
    updates, state = tx.update(params, tx.init(params), params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_numbers_that_jax_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"learning_rate must be a number in .*, got Fraction\(1, 1000\)"):
        ao.adam(fractions.Fraction(1, 1000))


@pytest.mark.parametrize("scales", [(1.0, 8.0, 4.0), (1.0, 2.0, 8.0), (9.0, 2.0, 8.0)])
def test_the_first_loss_scale_is_between_the_limits(scales):
    first, low, high = scales
    with pytest.raises(ValueError, match="init_scale must be between minimum_scale and maximum_scale"):
        ao.dynamic_loss_scale(ao.sgd(0.1), first, minimum_scale=low, maximum_scale=high)


def test_a_zero_gradient_without_eps_divides_by_nothing():
    params = jnp.ones(2)
    with jax.debug_nans(True):
        for tx in (ao.adam(0.1, eps=0.0), ao.rmsprop(0.1, eps=0.0)):
            updates, _ = tx.update(jnp.array([0.0, 1.0]), tx.init(params), params)
            assert updates[0] == 0 and updates[1] != 0


@pytest.mark.parametrize("warmup_steps", [3, 6, 7, 10])
@pytest.mark.parametrize("inject", [False, True])
def test_a_schedule_that_is_computed_twice_is_not_taken_for_an_assignment(warmup_steps, inject):
    schedule = optax.warmup_constant_schedule(0.0, 0.01, warmup_steps)
    base = ao.inject_hyperparams(ao.sgd)(schedule) if inject else ao.sgd(schedule)
    # It computes the schedule for itself too, and XLA may round the two in different ways.
    tx = optax.contrib.schedule_free(base, schedule, b1=0.9)
    params = jnp.ones(5)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(warmup_steps + 1):
        updates, state = step(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    assert float(ao.get_hyperparams(state)["learning_rate"]) == np.float32(0.01)

"""What arms may be, and what of them is judged: the trained parameters, their average, batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from optax import contrib
from quadratic import constant, quadratic_task

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.arms import AVERAGES, OPTIMIZERS, SCHEDULE_FREE, SCHEDULES, SHORT_NAMES, WARMED
from adaptive_optax.study.comparison import _check_arms, _check_rates
from adaptive_optax.study.engine.trials import Placement, Plan, Program, as_trials
from adaptive_optax.study.evaluation import evaluated
from adaptive_optax.study.judged import TRAINED, describe_judged
from adaptive_optax.study.subject import _check_evaluate

NOISY = {"learning_rates": [0.3], "steps": 40, "seeds": 5, "tuning_seeds": 1, "growth": 0}
NOISY |= {"margin": 1e-3, "mode": "scan", "chunk": 1, "progress": False}
TASK = quadratic_task(1.0, 1.0)


def averaging(rate, steps):
    return optax.chain(ao.sgd(rate), ao.average_parameters())


def trained(params, opt_state):
    return params


def finals(arms, task=TASK, **changes):
    """The mean final metric of each arm on the fresh seeds."""
    table = study.compare(task, arms, **(NOISY | changes)).table
    return table[table["phase"] == "verdict"].groupby("arm")["final_metric"].mean().to_dict()


# ---- What is judged ----


def test_an_average_is_judged_without_a_word():
    found = finals({"last": "sgd:constant", "named": "sgd:constant:averaged", "of one's own": averaging})
    assert found["named"] == found["of one's own"] < 0.7 * found["last"]
    assert study.arm("sgd:constant:averaged").evaluate is not None
    assert study.arm("sgd:constant").evaluate is None


def halves(params, opt_state):
    return jax.tree.map(lambda x: x / 2, params)


def with_state(params, opt_state, model_state):
    return halves(params, opt_state), model_state


def with_state_by_name(params, opt_state, *, model_state):
    return halves(params, opt_state), model_state


def with_everything(params, opt_state, model_state=None, *, task, train, more=None):
    assert task is TASK and jax.tree.structure(train) == jax.tree.structure(task.train) and more is None
    return halves(params, opt_state)


@study.judged_by(halves)
def decorated(rate, steps):
    return constant(rate, steps)


@functools.wraps(decorated)
def wrapped(rate, steps):
    return decorated(rate, steps)


def scaled(rate, steps, factor=1.0):
    return constant(rate * factor, steps)


scaled.evaluate = halves


def judged(arms, evaluate=None):
    """What `compare` judges of each arm whose trained parameters are 1, and whose average is 0."""
    params, train = jnp.ones(3), jax.tree.map(jnp.asarray, TASK.train)
    found = {}
    for name, each in _check_evaluate(evaluate, arms).items():
        state = arms[name](0.1, 1).init(jnp.zeros(3))
        found[name] = float(evaluated(each, TASK, params, state, None, train)[0].mean())
    return found


@pytest.mark.parametrize(
    "arm",
    [
        study.EvaluatedArm(constant, halves),
        decorated,
        wrapped,
        functools.partial(decorated),
        functools.partial(scaled, factor=1.0),
        functools.partial(functools.partial(scaled), factor=1.0),
        study.EvaluatedArm(constant, with_state),
        study.EvaluatedArm(constant, with_state_by_name),
        study.EvaluatedArm(constant, with_everything),
        study.EvaluatedArm(constant, functools.partial(lambda ratio, p, s: halves(p, s), 0.5)),
        study.EvaluatedArm(constant, jax.jit(halves)),
        study.EvaluatedArm(averaging, halves),
    ],
)
def test_an_arm_says_how_it_is_judged(arm):
    assert judged({"plain": constant, "mine": arm}) == {"plain": 1, "mine": 0.5}


def test_evaluate_overrides_what_arms_say():
    named = study.arm("sgd:constant:averaged")
    arms = {"plain": constant, "mine": decorated, "average": averaging, "named": named}
    assert judged(arms) == {"plain": 1, "mine": 0.5, "average": 0, "named": 0}
    assert judged(arms, trained) == dict.fromkeys(arms, 1)
    given = {"mine": None, "average": trained, "plain": halves}
    assert judged(arms, given) == {"plain": 0.5, "mine": 1, "average": 1, "named": 0}


def test_what_an_arm_says_is_what_the_study_measures():
    found = finals({"plain": constant, "mine": decorated})
    np.testing.assert_allclose(found["mine"], found["plain"] / 4, rtol=1e-5)  # the metric is quadratic


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (3, "must be a function of"),
        (lambda params: params, r"must be a function of \(params, opt_state\)"),
        (lambda params, opt_state, model_state, more: params, "model_state as a third argument"),
        (lambda params, opt_state, *, data: params, "task and train by keyword"),
        (lambda params, opt_state: (params, params), "evaluate must return parameters with the structure"),
        (lambda params, opt_state: None, "evaluate must return .* got NoneType with nothing at"),
        (lambda params, opt_state: jnp.zeros(3), "evaluate must return .* got .* with shape"),
    ],
)
def test_a_wrong_evaluate_is_refused_before_training(evaluate, message, monkeypatch):
    from adaptive_optax.study.engine import trials

    monkeypatch.setattr(trials, "Program", None)  # would fail otherwise
    arms = {"a": constant, "b": constant}
    for arguments in ({"evaluate": evaluate}, {"evaluate": {"b": evaluate}}):
        with pytest.raises(ValueError, match=message):
            study.compare(TASK, arms, **NOISY, **arguments)
    scaled_wrongly = functools.partial(constant)
    scaled_wrongly.evaluate = evaluate
    with pytest.raises(ValueError, match=message):
        study.compare(TASK, {"a": constant, "b": scaled_wrongly}, **NOISY)


def test_wrong_parts_of_an_evaluated_arm_are_refused():
    with pytest.raises(ValueError, match="build must be a function of .*, got 3"):
        study.EvaluatedArm(3, halves)
    with pytest.raises(ValueError, match=r"evaluate must be a function of \(params, opt_state\), got None"):
        study.judged_by(None)
    with pytest.raises(ValueError, match=r"batches must be an integer in \[1, 2147483647\], got 0"):
        study.recompute_batch_statistics(batches=0)


# ---- Batch statistics ----

X = np.sort(np.random.default_rng(0).normal(2.0, 3.0, size=(70, 3)), axis=0).astype(np.float32)  # sorted
DATA = {"x": X, "y": X.sum(axis=1)}
BATCH = 16  # 4 batches an epoch, which leave 6 samples out


class Normed(nnx.Module):
    """A dense layer and batch normalisation; the second holds three alike, in nnx.vmap."""

    def __init__(self, rngs, stacked=False):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.stacked = stacked
        if stacked:
            self.norm = nnx.vmap(lambda r: nnx.BatchNorm(4, rngs=r))(rngs.split(3))
        else:
            self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        if self.stacked:
            x = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(self.norm, x).mean(axis=0)
        else:
            x = self.norm(x)
        return self.last(self.dropout(x))[:, 0]


def squared_error(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def statistics_metric(model, batch):
    """Shows the judged statistics themselves: their distance from those of the judged weights."""
    used = X[np.arange(4 * BATCH) * 70 // (4 * BATCH)]
    hidden = model.first(used).reshape(BATCH, 4, -1).swapaxes(0, 1)  # [batch, sample, unit]
    mean, var = hidden.mean(axis=1).mean(axis=0), hidden.var(axis=1).mean(axis=0)
    return sum(
        jnp.mean(jnp.abs(ours.get_value() - exact)) / jnp.mean(jnp.abs(exact))
        for ours, exact in ((model.norm.mean, mean), (model.norm.var, var))
    )


def run(task, arm, mode, evaluate, steps=6):
    program = Program(task, arm, Plan(steps, (0, 3, steps)), Placement(mode, 2, 2), evaluate)
    return program.run(as_trials([0.02, 0.03], [0, 1])).validation


@pytest.mark.parametrize(
    ("mode", "stacked"), [("scan", False), ("step", False), ("vmap", False), ("scan", True)]
)
def test_batch_statistics_judged_are_those_of_the_averaged_weights(mode, stacked):
    task = study.nnx_task(
        lambda rngs: Normed(rngs, stacked),
        squared_error,
        DATA,
        DATA,
        batch_size=BATCH,
        metric=statistics_metric,
    )
    assert (run(task, averaging, mode, study.arm("sgd:constant:averaged").evaluate) < 1e-5).all()
    # An evaluate that knows nothing of the model state cannot keep it right: the engine does.
    assert (run(task, averaging, mode, lambda p, state: ao.averaged_parameters(p, state)) < 1e-5).all()
    if mode == "scan":  # the metric sees statistics of other weights
        for evaluate in (kept_by_position, kept_by_name, kept_as_a_pair):
            assert (run(task, averaging, mode, evaluate) > 0.1).all()


def kept_by_position(params, opt_state, model_state):
    return ao.averaged_parameters(params, opt_state)


def kept_by_name(params, opt_state, *, model_state):
    return ao.averaged_parameters(params, opt_state)


def kept_as_a_pair(params, opt_state, model_state):
    return ao.averaged_parameters(params, opt_state), model_state


def test_trained_parameters_keep_their_own_statistics():
    task = study.nnx_task(Normed, squared_error, DATA, DATA, batch_size=BATCH)
    none = run(task, constant, "scan", None)
    for evaluate in (study.recompute_batch_statistics(), trained, lambda p, s: jax.tree.map(lambda x: x, p)):
        np.testing.assert_array_equal(run(task, constant, "scan", evaluate), none)


def test_without_batch_statistics_no_batch_is_passed():
    """Counts of a module's random numbers are no statistics: nothing is run for them."""

    def net(rngs):
        return nnx.Sequential(nnx.Linear(3, 1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), jnp.ravel)

    task = study.nnx_task(net, squared_error, DATA, DATA, batch_size=BATCH)
    params, rest = task.start(jax.random.key(0))
    for evaluate in (halves, study.recompute_batch_statistics(halves)):
        judged, after = evaluated(evaluate, task, params, constant(0.1, 1).init(params), rest, DATA)
        assert after is rest and judged is not params


def test_one_bad_batch_leaves_nothing_in_recomputed_statistics():
    task = study.nnx_task(Normed, squared_error, DATA, DATA, batch_size=BATCH, metric=statistics_metric)
    params, rest = task.start(jax.random.key(0))
    spoilt = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, rest)
    state = averaging(0.1, 1).init(params)
    judged, healed = evaluated(
        study.recompute_batch_statistics(), task, params, state, spoilt, jax.tree.map(jnp.asarray, DATA)
    )
    assert task.validation_metric(judged, healed, DATA) < 1e-5


def test_frozen_statistics_stay():
    def frozen(model, batch):
        hidden = model.norm(model.first(batch["x"]), use_running_average=True)
        return jnp.mean((model.last(hidden)[:, 0] - batch["y"]) ** 2)

    task = study.nnx_task(Normed, frozen, DATA, DATA, batch_size=BATCH)
    params, rest = task.start(jax.random.key(0))
    rest["norm"]["mean"].set_value(jnp.arange(4.0))
    state = averaging(0.1, 1).init(params)
    data = jax.tree.map(jnp.asarray, DATA)
    _, after = evaluated(study.recompute_batch_statistics(), task, params, state, rest, data)
    np.testing.assert_array_equal(after["norm"]["mean"].get_value(), jnp.arange(4.0))


def linen_task(**changes):
    class Net(linen.Module):
        momentum: float = 0.99

        @linen.compact
        def __call__(self, x, train):
            x = linen.Dense(4, name="first")(x)
            x = linen.BatchNorm(not train, momentum=self.momentum, name="norm")(x)
            return linen.Dense(1)(x)[:, 0]

    def init(key):
        variables = Net().init(key, X[:1], False)
        return variables["params"], variables["batch_stats"]

    def apply(params, stats, batch, momentum=0.99):
        found, new = Net(momentum).apply(
            {"params": params, "batch_stats": stats}, batch["x"], True, mutable=["batch_stats"]
        )
        return jnp.mean((found - batch["y"]) ** 2), new["batch_stats"]

    def metric(params, stats, batch):
        used = X[np.arange(4 * BATCH) * 70 // (4 * BATCH)]
        hidden = used @ params["first"]["kernel"] + params["first"]["bias"]
        exact = hidden.mean(axis=0)
        return jnp.mean(jnp.abs(stats["norm"]["mean"] - exact)) / jnp.mean(jnp.abs(exact))

    given = {
        "batch_statistics": lambda p, s, batch, key, momentum: apply(p, s, batch, momentum)[1],
        "metric": metric,
        "has_model_state": True,
        "batch_size": BATCH,
    }
    return study.Task(init, lambda p, s, batch, key: apply(p, s, batch), DATA, DATA, **(given | changes))


def test_batch_statistics_of_linen_are_recomputed_exactly_where_the_task_says_how():
    recomputed = study.recompute_batch_statistics()
    assert (run(linen_task(), averaging, "scan", recomputed) < 1e-5).all()
    # By the loss alone they move as in training: four batches keep 0.99 ** 4 of what they were.
    moved = run(linen_task(batch_statistics=None), averaging, "scan", recomputed)
    assert (moved > 0.5).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_statistics": 3}, "batch_statistics must be a function"),
        ({"batch_statistics": lambda p, s, b, k: s}, "batch_statistics cannot be traced: TypeError"),
        ({"batch_statistics": lambda p, s, b, k, m: m}, "batch_statistics must return model state"),
    ],
)
def test_wrong_batch_statistics_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        linen_task(**changes)
    with pytest.raises(ValueError, match="batch_statistics must come with has_model_state=True"):
        study.Task(
            lambda key: jnp.ones(3),
            lambda w, batch, key: jnp.sum(w),
            X,
            X,
            batch_size=4,
            batch_statistics=lambda p, s, b, k, m: s,
        )


# ---- What is judged, in words ----


def words(evaluate, arm=averaging, task=TASK):
    return describe_judged(task, arm, evaluate, 0.1, 10)


def batch_norm_task():
    return study.nnx_task(Normed, squared_error, DATA, DATA, batch_size=BATCH)


@pytest.mark.parametrize("evaluate", [None, trained, study.recompute_batch_statistics(trained)])
@pytest.mark.parametrize("task", [TASK, batch_norm_task()], ids=["plain", "statistics"])
def test_trained_parameters_need_no_words(evaluate, task):
    assert words(evaluate, task=task) == TRAINED
    assert words(study.recompute_batch_statistics(), constant, task) == TRAINED


def test_an_average_is_said_to_be_judged_and_how_to_take_it():
    recomputed, task = study.recompute_batch_statistics(), batch_norm_task()
    for evaluate in (recomputed, ao.averaged_parameters):
        found = words(evaluate)
        assert found.by == "the average of its parameters"
        assert found.then == "use the average of the parameters, which was judged"
        assert found.code.startswith("averaged = ao.swap_averaged(model, opt_state)  #")
    found = words(recomputed, task=task)
    assert words(ao.averaged_parameters, task=task) == found
    assert found.by == "the average of its parameters, with batch statistics recomputed for it"
    assert found.then.endswith("; recompute its batch statistics, as help(ao.swap_averaged) shows")
    assert "without taking steps" in ao.swap_averaged.__doc__


def test_an_evaluate_of_ones_own_is_said_to_be_judged():
    recomputed, task = study.recompute_batch_statistics(halves), batch_norm_task()
    assert words(halves).by == "the result of halves for its parameters"
    assert words(halves).then == "use the result of halves for the parameters, which was judged"
    assert words(lambda p, s: halves(p, s)).by == "the result of its evaluate for its parameters"
    assert words(recomputed, task=task).by.endswith("parameters, with batch statistics recomputed for them")
    assert words(halves, task=task) == words(recomputed, task=task)
    for evaluate in (with_state, with_state_by_name):
        assert words(evaluate, task=task).by.endswith("parameters, with the batch statistics of training")


def test_a_comparison_says_what_it_judged_and_how_arms_are_made():
    arms = {"base": "sgd:constant", "average": averaging, "named": study.arm("sgd:cosine:averaged")}
    info = study.compare(TASK, arms, evaluate={"named": None}, **NOISY).info
    assert [info["judged"][name][0] for name in arms] == [
        "its trained parameters", "the average of its parameters", "its trained parameters",
    ]  # fmt: skip
    assert info["usual_arms"] == {"base": "sgd:constant", "named": "sgd:cosine:averaged"}
    assert info["own_arms"] == {}
    info = study.compare(TASK, [constant, decorated, "sgd:cosine"], **NOISY).info
    assert info["own_arms"] == {"constant": "constant", "decorated": "decorated"}


# ---- What arms may be ----


def test_names_and_functions_mix():
    usual = study.arm("sgd:constant")
    mapped = {"a": "sgd:constant", "mine": constant, "carried": usual}
    assert _check_arms(mapped)[0] == {"a": usual, "mine": constant, "carried": usual}
    assert _check_arms(mapped)[1] == {"a": "sgd:constant", "carried": "sgd:constant"}
    momentum = study.arm("momentum:constant")
    listed = ["sgd:constant", constant, momentum, decorated]
    expected = {"sgd:constant": usual, "constant": constant}
    assert _check_arms(listed)[0] == expected | {"momentum:constant": momentum, "decorated": decorated}
    found = finals(["sgd:constant", constant])
    assert found["sgd:constant"] == found["constant"]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["sgd:constant", lambda r, n: ao.sgd(r)], "must have names, and <function .* has none"),
        (["sgd:constant", functools.partial(constant)], "arms in a list must have names"),
        (["sgd:constant", 3], "arms in a list must have names, and 3 has none; give a dictionary"),
        (
            ["sgd:constant", "sgd:constant"],
            "arms must have distinct names, got 'sgd:constant' twice; give a dictionary",
        ),
        ([constant, constant], "arms must have distinct names, got 'constant' twice"),
        (
            ["sgd:constant", study.arm("sgd:constant")],
            "arms must have distinct names, got 'sgd:constant' twice",
        ),
        ({"a": "sgd:constant", "b": "sgd:sideways"}, "the schedule must be one of"),
        ({"a": "sgd:constant", "\ud800": constant}, r"the name of an arm must be .* lone surrogate"),
        ({"a": "sgd:constant", "a\0": constant}, r"the name of an arm must be .* control character"),
        ({"a": "sgd:constant", "\x1b[31mred": constant}, r"the name of an arm must be .* control character"),
        ({"a": "sgd:constant", "a\nb": constant}, r"the name of an arm must be .* control character"),
        ({"a": "sgd:constant", "": constant}, r"the name of an arm must be a non-empty string .* got ''"),
        ({"a": "sgd:constant", 3: constant}, r"the name of an arm must be a non-empty string .* got 3"),
        ({"a": "sgd:constant", "x" * 1001: constant}, r"at most 1000 characters, got one of 1001"),
    ],
)
def test_arms_without_usable_names_are_refused_before_training(arms, message, monkeypatch):
    from adaptive_optax.study.engine import trials

    monkeypatch.setattr(trials, "Program", None)  # would fail otherwise
    with pytest.raises(ValueError, match=message):
        study.compare(TASK, arms, **NOISY)


def test_long_names_and_those_of_other_scripts_are_names(tmp_path):
    names = ["x" * 300, "Lernrate ½ · 学习率 · 🙂"]
    out = {"out": tmp_path}
    assert set(finals(dict.fromkeys(names, constant), **out)) == set(names)
    assert set(finals(dict.fromkeys(names, constant), **out)) == set(names)  # and again, from the folder


def test_equal_names_give_equal_arms_which_compile_once():
    assert study.arm("adam:cosine") == study.arm("adam:cosine") != study.arm("adam:cosine:averaged")
    assert study.arm("adam:cosine:averaged").__name__ == "adam:cosine:averaged"
    assert study.recompute_batch_statistics() == study.recompute_batch_statistics(batches=32)


LIMITABLE = ["adam", "adamw", "nadam", "amsgrad", "rmsprop", "global_rmsprop", "sgd", "momentum"]


@pytest.mark.parametrize("optimizer", LIMITABLE)
def test_a_limited_arm_is_the_same_optimizer_below_the_limit(optimizer):
    def loss(w):
        return jnp.sum(jnp.array([1.0, 3.0]) * w**2)

    ends = []
    for name in (f"{optimizer}:one_cycle", f"{optimizer}:one_cycle:limited"):
        arm = study.arm(name)
        assert arm.__name__ == name and arm == study.arm(name)
        tx = optax.with_extra_args_support(arm(1e-6, 20))
        assert ("error_controlled" in arm.code(1e-6, 20)) == name.endswith("limited")
        w = jnp.ones(2)
        state = tx.init(w)
        for _ in range(20):
            value, gradient = jax.value_and_grad(loss)(w)
            updates, state = tx.update(gradient, state, w, value=value, value_fn=loss)
            w = optax.apply_updates(w, updates)
        ends.append(w)
    np.testing.assert_allclose(*ends, rtol=1e-6)


def test_a_limited_arm_trains_at_any_rate_in_every_mode():
    names = {"limited": "adam:one_cycle:limited", "averaged": "adam:constant:limited:averaged"}
    found = finals(names | {"free": "adam:one_cycle"}, learning_rates=[30.0])
    assert found["limited"] < 0.3 * found["free"]
    assert study.arm(names["averaged"]).evaluate is not None


# ---- Rivals of a schedule ----

GRADIENTS = np.random.default_rng(1).normal(size=(50, 2, 3))
RIVALS = {
    "schedule_free:sgd": lambda rate, steps: contrib.schedule_free_sgd(rate, steps // 10),
    "schedule_free:adam": lambda rate, steps: contrib.schedule_free_adamw(rate, steps // 10),
    "schedule_free:adamw": lambda rate, steps: contrib.schedule_free_adamw(
        rate, steps // 10, weight_decay=1e-4
    ),
    "prodigy": lambda rate, steps: contrib.prodigy(rate),
    "prodigy:cosine": lambda rate, steps: contrib.prodigy(optax.cosine_decay_schedule(rate, steps)),
    "prodigy:warmup_cosine": lambda rate, steps: contrib.prodigy(
        optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps), safeguard_warmup=True
    ),
    "dadapt_adamw": lambda rate, steps: contrib.dadapt_adamw(rate),
    "dadapt_adamw:linear": lambda rate, steps: contrib.dadapt_adamw(optax.linear_schedule(rate, 0.0, steps)),
}


def iterates(tx, steps):
    """The parameters after every step on a noisy bowl, without compilation, and the last state."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.full(2, -2.0)}
    state, found = tx.init(params), []
    for noise in GRADIENTS[:steps]:
        gradient = {"w": params["w"] + noise, "b": params["b"] + noise[:, 0]}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.concatenate([np.ravel(x) for x in params.values()]))
    return np.array(found), params, state


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_those_of_optax_contrib(name, x64):
    rate = 1.0 if study.arm(name).learning_rates else 0.1
    ours, _, _ = iterates(study.arm(name)(rate, 50), 50)
    np.testing.assert_allclose(ours, iterates(RIVALS[name](rate, 50), 50)[0], rtol=1e-9)
    assert np.ptp(ours, axis=0).min() > 1e-5


def test_schedule_free_is_judged_at_the_average_of_its_fast_iterates():
    """After one step of warm-up all weights are equal: the point is the mean of z."""
    arm = study.arm("schedule_free:sgd")
    tx, params = arm(0.1, 10), jnp.array([1.0, -2.0])
    state, fast = tx.init(params), []
    for noise in GRADIENTS[:20, 0, :2]:
        updates, state = tx.update(params + noise, state, params)
        params = optax.apply_updates(params, updates)
        fast.append(state.z)
    np.testing.assert_allclose(arm.evaluate(params, state), np.mean(fast, axis=0), rtol=1e-5)
    assert np.abs(arm.evaluate(params, state) - params).max() > 1e-3


def test_batch_statistics_are_those_of_the_schedule_free_point():
    task = study.nnx_task(Normed, squared_error, DATA, DATA, batch_size=BATCH, metric=statistics_metric)
    arm = study.arm("schedule_free:sgd")
    assert (run(task, arm, "scan", arm.evaluate) < 1e-5).all()
    found = words(arm.evaluate, arm, task)
    assert found.by == "its schedule-free average, with batch statistics recomputed for it"
    assert "recompute its batch statistics" in found.then
    assert words(arm.evaluate, arm).by == "its schedule-free average"
    assert "optax.contrib.schedule_free_eval_params(opt_state, params)" in words(arm.evaluate, arm).code


@pytest.mark.parametrize(("steps", "decay"), [(5, 0.0), (10, 0.0), (1000, 0.99), (100_000, 0.9999)])
def test_an_ema_is_as_old_as_the_other_average(steps, decay):
    tx = study.arm("ema")(0.1, steps)
    assert ao.get_hyperparams(tx.init(jnp.ones(2)))["decay"] == pytest.approx(decay)
    assert study.arm("ema") == study.arm("adam:constant:ema") != study.arm("adam:constant:averaged")


@pytest.mark.parametrize("mode", ["scan", "step", "vmap"])
def test_every_rival_runs_compiled_once_and_at_rates_that_suit_it(mode):
    names = ["sgd:constant", "ema", *RIVALS] if mode == "scan" else ["sgd:constant", "prodigy"]
    names += ["schedule_free:adam"] * (mode != "scan")
    found = study.compare(TASK, names, **(NOISY | {"learning_rates": [0.1, 0.3], "mode": mode}))
    estimators = [name for name in names if name.startswith(("prodigy", "dadapt"))]
    assert list(found.details.own_rates) == estimators
    for name in names:
        assert found.details.grid[name] == ((0.3, 1.0, 3.0) if name in estimators else (0.1, 0.3))
        by = found.details.judged[name].by
        assert ("average" in by) == (name == "ema" or name.startswith("schedule_free"))
    assert set(found.table["compilation"]) == {"once"}
    assert not found.table["diverged"].any()
    fresh = found.table[found.table["phase"] == "verdict"]
    assert (fresh["final_metric"] < fresh["initial_metric"]).mean() > 0.8


def test_rates_of_an_arm_of_ones_own():
    def factor(rate, steps):
        return ao.sgd(0.1 * rate)

    factor.learning_rates = [2.0, 1.0]
    arms = {"base": constant, "mine": factor, "judged": study.judged_by(halves)(factor)}
    arms["partial"], arms["prodigy"] = functools.partial(factor), study.arm("prodigy")
    own = ("mine", "judged", "partial", "prodigy")
    grids, declared = _check_rates([0.1], arms)
    assert declared == own and list(grids) == list(arms)
    assert [grids[name] for name in arms] == [[0.1], *[[1.0, 2.0]] * 3, [0.3, 1.0, 3.0]]
    assert _check_rates({"base": [0.1]}, arms) == (grids, own)
    grids, declared = _check_rates({"base": 0.1, "mine": [5], "prodigy": [1.0]}, arms)
    assert declared == ("judged", "partial") and grids["mine"] == [5.0] and grids["prodigy"] == [1.0]
    with pytest.raises(ValueError, match="same names as arms; base, other differ"):
        _check_rates({"other": [0.1]}, arms)
    factor.learning_rates = [0.0]
    with pytest.raises(ValueError, match="learning_rates of arm 'mine' must be one or more positive"):
        _check_rates([0.1], arms)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("schedule_free", "must be followed by one of adam, adamw, sgd, got ''"),
        ("schedule_free:rmsprop", "must be followed by one of adam, adamw, sgd, got 'rmsprop'"),
        ("schedule_free:adam:averaged", "got 'adam:averaged'; .* is an average already"),
        ("adam:schedule_free", "the schedule must be one of constant, .*schedule_free:optimizer"),
        ("adam", "the schedule must be one of .*, got ''"),
        ("adam:constant:mean", "nothing or one of limited, averaged, ema may follow, got 'mean'"),
        ("adam:constant:ema:limited", "may follow, got 'ema:limited'"),
        ("adam:constant:limited:mean", "may follow, got 'mean'"),
        ("prodigy:constant:limited", "must be one of adam, .* with limited, got 'prodigy'"),
        ("ema:constant", "the optimizer must be one of .*, got 'ema'"),
        ("dadapt_adamw:warmup_cosine", "must begin above 0, .*got 'warmup_cosine'"),
    ],
)
def test_wrong_names_of_arms_say_what_is_accepted(name, message):
    with pytest.raises(ValueError, match=f"arm {name!r}: .*{message}"):
        study.arm(name)


EVERY = [
    *(f"{optimizer}:{schedule}" for optimizer in OPTIMIZERS for schedule in SCHEDULES),
    *(f"adam:{schedule}:{average}" for schedule in SCHEDULES for average in AVERAGES),
    *(f"schedule_free:{optimizer}" for optimizer in SCHEDULE_FREE),
    *SHORT_NAMES,
]
EVERY = [name for name in EVERY if not name.startswith("dadapt") or name.partition(":")[2] not in WARMED]


@pytest.mark.parametrize("name", EVERY)
def test_the_code_of_every_arm_builds_it(name):
    arm, names = study.arm(name), {}
    code = arm.code(0.1, 50)
    assert not [line for line in code.splitlines() if len(line) > 100]
    exec(code, names)
    assert set(names) <= {"__builtins__", "ao", "optax", "schedule", "base", "tx"}
    ours, _, state = iterates(arm(0.1, 50), 3)
    pasted, _, its_state = iterates(names["tx"], 3)
    np.testing.assert_array_equal(pasted, ours)
    assert jax.tree.structure(state) == jax.tree.structure(its_state)

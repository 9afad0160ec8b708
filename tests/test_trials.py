"""The task and the engine: what is refused, how trials are paired, that every placement trains the same."""

import dataclasses
import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from quadratic import constant, quadratic_task

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.arms import OPTIMIZERS, SCHEDULE_FREE, SCHEDULES, check_arm
from adaptive_optax.study.engine.trials import TELEMETRY, Placement, Plan, Program, as_trials

X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5]) + 0.3).astype(np.float32)
DATA = {"x": X, "y": Y}


def linear_loss(w, batch, key):
    del key
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


GOOD = {
    "init": lambda key: jax.random.normal(key, (3,)),
    "loss": linear_loss,
    "train": DATA,
    "validation": {"x": X[:10], "y": Y[:10]},
    "batch_size": 16,
}


def make_task(**changes):
    return study.Task(**(GOOD | changes))


def run(task, arm, rates, seeds, *, steps=20, points=(0, 5, 20), mode="scan", width=4, devices=2, stream=0):
    plan = Plan(steps, points)
    program = Program(task, arm, plan, Placement(mode, width, devices))
    parts = [
        program.run(as_trials(rates[i : i + width], seeds[i : i + width], stream))
        for i in range(0, len(rates), width)
    ]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


# ---- Task ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 65}, r"batch_size must be an integer in \[1, 64\] \(train has 64 samples\), got 65"),
        ({"train": {"x": X, "y": Y[:3]}}, "train must have one leading axis, got 64 samples in 'x' and 3"),
        ({"validation": {"x": X, "y": Y[:3]}}, "validation must have one leading axis"),
        ({"train": {"x": 3.0}}, "train must hold arrays with a leading axis of samples, got float at 'x'"),
        ({"train": {}}, "train must be a tree of arrays"),
        ({"validation": {"x": X[:0], "y": Y[:0]}}, "validation must have at least one sample"),
        ({"init": lambda key: jnp.arange(3)}, "parameters, got int32 at its root"),
        ({"init": lambda key: {}}, "init must return parameters, got a tree without arrays"),
        ({"init": 3}, "init must be a function"),
        ({"loss": lambda w, b, k: b["x"] @ w}, r"loss must return a real scalar, got shape \(16,\)"),
        ({"loss": lambda w, b, k: (linear_loss(w, b, k), 0.0)}, "loss must return a scalar, got a tuple"),
        ({"loss": lambda w, b, k: b["x"].sum()}, "loss must depend on its parameters"),
        ({"loss": jax.jit(lambda w, b, k: b["x"].sum())}, "loss must depend on its parameters"),
        ({"loss": lambda w, b, k: b["z"].sum()}, "loss cannot be traced: KeyError: 'z'"),
        ({"metric": lambda w, b: b["x"] @ w}, "metric must return a real scalar"),
        ({"has_model_state": True}, r"init must return \(params, model_state\)"),
        ({"name": ""}, "name must be a non-empty string"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size must be an integer"),
        (
            {"has_model_state": True, "init": lambda k: (jnp.ones(3), jnp.zeros(2)),
             "loss": lambda w, s, b, k: (linear_loss(w, b, k), jnp.zeros(3))},
            "loss must return model state with the structure",
        ),
    ],
)  # fmt: skip
def test_a_wrong_task_is_refused_before_anything_is_compiled(change, message):
    with pytest.raises(ValueError, match=message):
        make_task(**change)


def test_a_loss_that_is_linear_in_its_parameters_is_none_that_ignores_them():
    make_task(loss=lambda w, batch, key: jnp.sum(w))
    make_task(loss=lambda w, batch, key: jax.jit(linear_loss)(w, batch, key))


def test_the_metric_in_parts_is_the_metric_of_the_whole():
    whole, parts = make_task(), make_task(evaluation_batch_size=4)  # 10 samples: 4, 4 and 2
    w = jnp.arange(3.0)
    data = jax.tree.map(jnp.asarray, GOOD["validation"])
    np.testing.assert_allclose(
        parts.validation_metric(w, None, data), whole.validation_metric(w, None, data), rtol=1e-6
    )


# ---- One trial ----


def test_a_trial_is_the_plain_loop():
    """Full batches, so that the order does not matter; the loop is optax's alone."""
    task = make_task(batch_size=64)

    def arm(rate, steps):
        return optax.adam(optax.exponential_decay(rate, steps, 0.1))

    _, metrics, _ = run(task, arm, [0.1, 0.3], [5, 6])
    plan = Plan(20, (0,))
    for rate, seed, found in zip([0.1, 0.3], [5, 6], metrics, strict=True):
        start = Program(task, lambda r, n: optax.set_to_zero(), plan, Placement("scan", 1, 1))
        initial = start._start(as_trials([rate], [seed])).params[0]
        tx = optax.adam(lambda count, rate=rate: rate * 0.1 ** (count / 20))
        w, state = initial, tx.init(initial)
        for _ in range(20):
            gradient = jax.grad(linear_loss)(w, DATA, None)
            updates, state = tx.update(gradient, state, w)
            w = optax.apply_updates(w, updates)
        expected = [linear_loss(x, GOOD["validation"], None) for x in (initial, w)]
        np.testing.assert_allclose(found[[0, -1]], expected, rtol=2e-5)


def counting_task():
    """Parameters that count how often each of 10 samples was used: gradient -1 where it was."""
    index = np.arange(10)
    return study.Task(
        init=lambda key: jnp.zeros(10),
        loss=lambda w, batch, key: -jnp.sum(w[batch]) + 0.0 * jnp.sum(w),
        train=index,
        validation=index,
        batch_size=3,
        metric=lambda w, batch: jnp.max(w) * 100 + jnp.sum(w),
    )


@pytest.mark.parametrize("mode", ["scan", "step", "vmap"])
def test_an_epoch_uses_no_sample_twice(mode):
    # Batches of 3 from 10: three batches an epoch, one sample left out. Points lie in and between epochs.
    _, metrics, _ = run(
        counting_task(), constant, [1.0], [0], steps=7, points=(0, 2, 3, 7), mode=mode, width=1, devices=1
    )
    assert metrics[0].tolist()[:3] == [0.0, 106.0, 109.0]
    assert metrics[0, 3] in (221.0, 321.0)  # 21 samples, each two or at most three times


def test_the_order_differs_between_epochs_seeds_and_streams():
    def uses(seed, stream, steps):
        plan = Plan(steps, (0, steps))
        program = Program(counting_task(), constant, plan, Placement("scan", 1, 1))
        trials = as_trials([1.0], [seed], stream)
        placed, active, _ = program._place(trials)
        runs, _ = program._advance(program._start(placed), placed, active, 0, steps)
        return np.asarray(runs.params[0])

    first = uses(0, 0, 1)
    assert (first == uses(0, 0, 1)).all()
    assert any((first != uses(seed, 0, 1)).any() for seed in (1, 2))
    assert any((first != uses(0, stream, 1)).any() for stream in (1, 2))
    second = uses(0, 0, 4) - uses(0, 0, 3)  # the first batch of the second epoch
    assert (first != second).any()


def test_the_seed_alone_decides_the_start_and_the_key_of_the_loss():
    task = quadratic_task(1.0, 1.0)
    _, once, _ = run(task, constant, [0.1, 0.1, 0.2], [3, 4, 3])
    _, other_arm, _ = run(task, lambda r, n: ao.adam(r), [0.1, 0.1, 0.2], [3, 4, 3])
    assert (once[:, 0] == other_arm[:, 0]).all()
    assert once[0, 0] == once[2, 0] != once[1, 0]
    _, other_stream, _ = run(task, constant, [0.1, 0.1, 0.2], [3, 4, 3], stream=1)
    assert (other_stream[:, 0] == once[:, 0]).all() and (other_stream[:, -1] != once[:, -1]).all()


@functools.cache
def nine_trials(mode, width, devices):
    rates, seeds = np.repeat([0.01, 0.1, 0.3], 3), np.tile(np.arange(3), 3)
    return run(
        make_task(), study.arm("adam:one_cycle"), rates, seeds, mode=mode, width=width, devices=devices
    )


@pytest.mark.parametrize(
    ("mode", "width", "devices"),
    [("scan", 1, 1), ("scan", 8, 8), ("scan", 6, 2), ("scan", 20, 2), ("step", 2, 2), ("vmap", 6, 2)],
)
def test_every_layout_trains_the_same(mode, width, devices, optimized):
    expected = nine_trials("scan", 4, 2)
    found = nine_trials(mode, width, devices)
    for ours, theirs in zip(found, expected, strict=True):
        if mode != "scan":  # XLA fuses another program in another way
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs)


def test_training_curves_are_means_over_windows():
    task = make_task(batch_size=64)
    training, *_ = run(
        task, lambda r, n: optax.set_to_zero(), [0.1], [0], steps=250, points=(0, 250), width=1, devices=1
    )
    plan = Plan(250, (0, 250))
    assert plan.training_steps[0] == 3 and plan.training_steps[-1] == 250 and training.shape[1] <= 100
    np.testing.assert_allclose(training, training[0, 0], rtol=1e-5)  # the parameters stand still


@pytest.mark.parametrize("mode", ["scan", "step", "vmap"])
def test_the_optimizer_is_looked_at(mode):
    def arm(rate, steps):
        return ao.sgd(ao.exponential_decay(rate, 10, 0.5))

    *_, seen = run(make_task(), arm, [0.1, 0.2], [0, 1], steps=60, points=(0, 60), mode=mode, width=2)
    looked_at = Plan(60, (0, 60)).telemetry_steps
    assert looked_at.tolist() == list(range(1, 61, 11)) and seen.shape == (2, 6, len(TELEMETRY))
    fields = dict(zip(TELEMETRY, np.moveaxis(seen, -1, 0), strict=True))
    assert [len(Plan(n, (0, n)).telemetry_steps) for n in (1, 100, 400, 1000, 2560)] == [1, 8, 10, 25, 25]
    expected = np.outer([0.1, 0.2], 0.5 ** ((looked_at - 1) / 10))
    np.testing.assert_allclose(fields["learning_rate"], expected, rtol=1e-5)
    np.testing.assert_allclose(fields["effective_learning_rate"], expected, rtol=1e-5)
    assert (fields["update_to_weight"] > 0).all() and np.isnan(fields["snr"]).all()


def test_model_state_is_carried_and_evaluated():
    """A running mean of the batches' means, which the metric reads."""
    task = study.Task(
        init=lambda key: (jnp.zeros(3), {"mean": jnp.zeros(3)}),
        loss=lambda w, state, batch, key: (
            linear_loss(w, batch, key),
            {"mean": 0.5 * state["mean"] + 0.5 * batch["x"].mean(axis=0)},
        ),
        train=DATA,
        validation=DATA,
        batch_size=64,
        metric=lambda w, state, batch: jnp.sum(state["mean"]),
        has_model_state=True,
    )
    _, metrics, _ = run(task, constant, [0.1], [0], steps=3, points=(0, 1, 3), width=1, devices=1)
    total = X.mean(axis=0).sum()
    np.testing.assert_allclose(metrics[0], [0.0, total / 2, total * 7 / 8], rtol=1e-5)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))[:, 0]


def nnx_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@pytest.mark.parametrize("mode", ["scan", "step", "vmap"])
def test_an_nnx_module_is_a_task_in_one_call(mode):
    task = study.nnx_task(Network, nnx_loss, DATA, DATA, batch_size=16)
    _, metrics, _ = run(
        task,
        study.arm("adam:constant"),
        [0.03] * 4,
        [0, 1, 2, 3],
        steps=200,
        points=(0, 200),
        mode=mode,
        width=2,
    )
    assert (metrics[:, -1] < 0.3 * metrics[:, 0]).all()
    assert len(set(metrics[:, 0].tolist())) == 4


def test_nnx_evaluates_without_dropout_and_with_running_statistics():
    task = study.nnx_task(Network, nnx_loss, DATA, DATA, batch_size=16)
    params, rest = task.start(jax.random.key(0))
    data = jax.tree.map(jnp.asarray, DATA)
    first, second = (task.validation_metric(params, rest, data) for _ in range(2))
    assert first == second
    losses = []
    for _ in range(2):
        loss, rest = task.training_loss(params, rest, data, None)
        losses.append(loss)
    assert losses[0] != losses[1]  # dropout's own state has moved on
    assert jnp.any(rest["norm"]["mean"].get_value() != 0)


def test_nnx_task_refuses_what_is_no_module():
    with pytest.raises(ValueError, match="build must return an nnx.Module, got dict"):
        study.nnx_task(lambda rngs: {}, nnx_loss, DATA, DATA, batch_size=16)


@pytest.mark.parametrize("metric", [None, nnx_loss])
def test_no_copy_of_an_nnx_task_maximises_its_loss(metric):
    task = study.nnx_task(Network, nnx_loss, DATA, DATA, batch_size=16, metric=metric)
    message = "maximize=True must come with a metric other than the loss, which is this task's metric"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(task, maximize=True)
    with pytest.raises(ValueError, match=message):
        study.nnx_task(Network, nnx_loss, DATA, DATA, batch_size=16, metric=metric, maximize=True)
    scored = study.nnx_task(Network, nnx_loss, DATA, DATA, batch_size=16, metric=lambda m, b: -nnx_loss(m, b))
    assert dataclasses.replace(scored, maximize=True).maximize


def test_a_task_shows_no_arrays():
    shown = repr(make_task())
    assert "batch_size=" in shown and "array" not in shown


def test_a_linen_module_is_a_task():
    model = linen.Dense(1)
    task = make_task(
        init=lambda key: model.init(key, X[:1])["params"],
        loss=lambda p, b, key: jnp.mean((model.apply({"params": p}, b["x"])[:, 0] - b["y"]) ** 2),
    )
    _, metrics, _ = run(
        task, study.arm("adam:constant"), [0.1], [0], steps=200, points=(0, 200), width=1, devices=1
    )
    assert metrics[0, -1] < 1e-2 * metrics[0, 0]


def test_an_equinox_model_is_a_task():
    def build(key):
        return equinox.nn.MLP(3, "scalar", 8, 1, key=key)

    def filtered(key):
        return equinox.filter(build(key), equinox.is_inexact_array)

    _, static = equinox.partition(build(jax.random.key(0)), equinox.is_inexact_array)

    def loss(params, batch, key):
        return jnp.mean((jax.vmap(equinox.combine(params, static))(batch["x"]) - batch["y"]) ** 2)

    task = make_task(init=filtered, loss=loss)
    _, metrics, _ = run(
        task, study.arm("adam:constant"), [0.03], [0], steps=200, points=(0, 200), width=1, devices=1
    )
    assert metrics[0, -1] < 0.1 * metrics[0, 0]
    with pytest.raises(ValueError, match="init cannot be traced"):
        make_task(init=build, loss=loss)  # functions are no parameters


def test_complex_and_low_precision_parameters():
    target = jnp.array([1.0 - 2.0j, 0.5 + 1.0j])
    task = study.Task(
        init=lambda key: {"z": jnp.zeros(2, jnp.complex64), "w": jnp.zeros(2, jnp.bfloat16)},
        loss=lambda p, batch, key: (
            jnp.sum(jnp.abs(p["z"] - target) ** 2) + jnp.sum((p["w"].astype(jnp.float32) - 1) ** 2)
        ),
        train=X,
        validation=X,
        batch_size=4,
    )
    _, metrics, _ = run(task, constant, [0.1], [0], steps=100, points=(0, 100), width=1, devices=1)
    assert metrics[0, -1] < 1e-3 * metrics[0, 0]


def test_float64_is_kept(x64):
    task = make_task(init=lambda key: jax.random.normal(key, (3,), jnp.float64))
    _, metrics, _ = run(task, constant, [0.1], [0], steps=300, points=(0, 300), width=1, devices=1)
    assert metrics[0, -1] < 0.2


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}:one_cycle" for name in OPTIMIZERS),
        *(f"adam:{name}:averaged" for name in SCHEDULES),
        *(f"schedule_free:{name}" for name in SCHEDULE_FREE),
    ],
)
def test_every_named_arm_runs_with_a_traced_rate(name):
    found = check_arm("it", study.arm(name), make_task(), Plan(100, (0, 100)), ao.averaged_parameters, 0.1)
    assert found == "once"

"""The plateau: the same evaluations as the originals, whatever the metrics do, and its state."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import plateau as reference
from saving import same, spec, through_bytes, through_orbax
from test_flax import INPUTS, TARGETS, LinenModel, NnxModel

import adaptive_optax as ao
from adaptive_optax.integrations.flax import TrainState

PRESETS = ("optax", "torch", "keras")


@functools.cache
def compiled(make, arguments):
    """The initial state, and a step from a state and a metric; one compilation for each setting."""
    tx = make(**dict(arguments))
    return tx.init(jnp.ones(1)), jax.jit(lambda state, x: tx.update(jnp.ones(1), state, value=x))


def scales(metrics, make=ao.reduce_on_plateau, **arguments):
    """The scale after each metric."""
    state, step = compiled(make, tuple(sorted(arguments.items())))
    seen = []
    for x in metrics:
        updates, state = step(state, np.float32(x))
        assert updates[0] == state.scale
        seen.append(float(state.scale))
    return seen


def expected(metrics, preset, *, rtol=1e-4, atol=0.0, factor=0.1, patience=10, cooldown=0, min_scale=0.0):
    def improves(x, best):
        return x < best - (rtol * abs(best) + atol if np.isfinite(best) else 0)

    metrics = [float(np.float32(x)) for x in metrics]
    return getattr(reference, preset)(
        metrics, improves, factor=factor, patience=patience, cooldown=cooldown, lowest=min_scale
    )


rng = np.random.default_rng(0)
# A quarter of the noise's steps are repeated, so that equal metrics occur.
METRICS = {
    "constant": np.full(40, 2.0),
    "improving": 2.0 * 0.9 ** np.arange(40),
    "improving too little": 2.0 - 0.7e-5 * np.arange(40),
    "worse": 1.0 + np.arange(40),
    "noisy": np.repeat(1 + 0.3 * rng.normal(size=30), rng.integers(1, 3, 30)),
    "negative, constant": np.full(40, -2.0),
    "negative, noisy": -5 + rng.normal(size=40),
    "through zero": np.linspace(1, -1, 20).tolist() + [-1.0] * 20,
    "NaN": [3.0, np.nan, 2.0, np.nan, np.nan, np.nan, np.nan, 1.0, np.nan] + [1.0] * 20,
    "NaN first": [np.nan] * 15 + [1.0] * 15,
    "steps": np.repeat([4.0, 3.0, 2.0, 2.5, 1.0], 8),
}
SETTINGS = [
    {"patience": 1, "factor": 0.5},
    {"patience": 3, "factor": 0.5},
    {"patience": 2, "factor": 0.5, "cooldown": 1},
    {"patience": 2, "factor": 0.5, "cooldown": 3},
    {"patience": 2, "factor": 0.5, "min_scale": 0.2},
    {"patience": 2, "factor": 0.5, "rtol": 0.0, "atol": 0.05},
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_it_falls_on_the_same_evaluations(preset, setting):
    for name, metrics in METRICS.items():
        np.testing.assert_allclose(
            scales(metrics, preset=preset, **setting),
            expected(metrics, preset, **setting),
            rtol=1e-5,
            err_msg=name,
        )


@hypothesis.given(
    metrics=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0 + 2**-16, 2.0, float("nan")]), max_size=30),
    preset=st.sampled_from(PRESETS),
    patience=st.integers(1, 3),
    cooldown=st.integers(0, 3),
)
def test_it_falls_on_the_same_evaluations_of_any_metrics(metrics, preset, patience, cooldown):
    setting = {"patience": patience, "cooldown": cooldown, "factor": 0.5}
    assert scales(metrics, preset=preset, **setting) == expected(metrics, preset, **setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("window", [1, 3])
def test_optax_s_own_agrees_on_positive_metrics(setting, window):
    for name in ("constant", "improving", "worse", "noisy", "steps"):
        ours, theirs = (
            scales(METRICS[name], make, accumulation_size=window, **({"factor": 0.1} | setting))
            for make in (ao.reduce_on_plateau, optax.contrib.reduce_on_plateau)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_off_by_ones(preset):
    # Falls at the n-th evaluation that is no better than the first.
    found = np.flatnonzero(
        np.diff([1.0, *scales([1.0] * 12, preset=preset, patience=3, cooldown=2, factor=0.5)])
    )
    assert found.tolist() == {"optax": [3, 8], "torch": [4, 10], "keras": [3, 7, 11]}[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_metric_that_is_to_be_large_is_the_negative_one(preset):
    for metrics in METRICS.values():
        setting = {"preset": preset, "patience": 2, "cooldown": 1, "factor": 0.5}
        assert scales(np.negative(metrics), mode="max", **setting) == scales(metrics, **setting)


def test_a_constant_negative_metric_is_a_plateau():
    # By best (1 - rtol) every one of these would be better than the best, and the best ever worse.
    assert scales([-1.0] * 6, patience=5)[-1] == pytest.approx(0.1)


def test_windows_are_averaged():
    metrics = [4.0, 0.0, 1.0, 3.0, 2.0, 2.0, 1.9, 1.9]  # means 2, 2, 2, 1.9
    assert scales(metrics, accumulation_size=2, patience=2, factor=0.5) == [1.0] * 5 + [0.5] * 3


# --- Once an epoch ------------------------------------------------------------------------------------------

EPOCHS = [3.0, 2.0, 2.0, 2.5, 1.9, 1.9, 1.9, np.nan, 1.0, 1.0, 1.0, 1.0, 1.0]
PER_EPOCH = [1.0] * 4 + [0.5] * 3 + [0.25] * 4 + [0.125] * 2 + [0.0625]  # as PyTorch gives them


def once_an_epoch(steps, way):
    """The scale at each step of epochs with a metric after each."""
    tx = ao.reduce_on_plateau(0.5, 1, preset="torch")
    state, pending, seen = tx.init(jnp.ones(1)), None, []
    with_none = jax.jit(lambda state: tx.update(jnp.ones(1), state, value=None))
    step = jax.jit(lambda state, x, is_new: tx.update(jnp.ones(1), state, value=x, is_new=is_new))
    for metric in [*EPOCHS, None]:
        for i in range(steps):
            is_new = pending is not None and i == 0
            if way == "none" and not is_new:
                updates, state = with_none(state)
            else:
                value = 0.0 if pending is None else pending  # an old one does not count
                updates, state = step(state, np.float32(value), is_new)
            seen.append(float(updates[0]))
        pending = metric
    assert state.count == len(seen)
    return seen


@pytest.mark.parametrize("way", ["none", "flag"])
def test_fed_once_an_epoch_it_falls_where_an_epochs_one_falls(way):
    assert once_an_epoch(3, way) == np.repeat(PER_EPOCH, 3).tolist()


def test_fed_once_an_epoch_it_is_pytorchs():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    rates = []
    for metric in [*EPOCHS, None]:
        for _ in range(3):
            before = parameter.item()
            parameter.grad = torch.ones(1)
            optimizer.step()
            rates.append(before - parameter.item())
        if metric is not None:
            scheduler.step(metric)
    assert rates == once_an_epoch(3, "none")


def test_outside_an_accumulation_no_metric_is_lost():
    plateau = ao.reduce_on_plateau(0.5, 1)
    tx = optax.chain(ao.accumulate_gradients(ao.sgd(1.0), 2), plateau)
    state, seen = tx.init(jnp.ones(1)), []
    for value in (1.0, None, None, 1.0, None, None):
        updates, state = tx.update(jnp.ones(1), state, value=value)
        seen.append(float(updates[0]))
    assert seen == [0, -1, 0, -0.5, 0, -0.5]


def test_the_scale_can_be_read_and_set():
    tx = optax.chain(ao.sgd(1.0), ao.reduce_on_plateau(0.5, patience=1))
    state = ao.set_hyperparams(tx.init(jnp.ones(1)), scale=0.25)
    for loss, scale in ((1.0, 0.25), (1.0, 0.125), (0.5, 0.125)):
        updates, state = tx.update(jnp.ones(1), state, value=loss)
        assert ao.get_hyperparams(state)["scale"] == scale and updates[0] == -scale
    state = ao.set_hyperparams(state, scale=None)
    assert ao.get_hyperparams(state)["scale"] == 1
    with pytest.raises(ValueError, match="scale must be a number in .0, inf., got -1"):
        ao.set_hyperparams(state, scale=-1)


def test_its_state_is_fixed_arrays_that_come_back(tmp_path):
    tx = ao.reject_nonfinite(optax.chain(ao.adam(0.1), ao.reduce_on_plateau(0.5, patience=2, cooldown=1)))
    params = {"w": jnp.ones(3)}
    step = jax.jit(lambda state, x: tx.update(params, state, params, value=x)[1])
    state = tx.init(params)
    start = spec(state)
    for x in (3.0, 2.0, 2.0):
        state = step(state, x)
    assert spec(state) == start and ao.get_rejections(state).total == 0  # the infinite best is no reason
    for i, through in enumerate((through_bytes, through_orbax)):
        restored = through(state, jax.tree.map(jnp.zeros_like, state), tmp_path / str(i))
        same(step(restored, 2.0), step(state, 2.0))


def test_it_falls_in_an_nnx_optimizer_and_in_a_train_state():
    tx = optax.chain(ao.sgd(0.01), ao.reduce_on_plateau(0.5, patience=1))
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, value):
        grads = nnx.grad(lambda model: jnp.mean((model(INPUTS) - TARGETS) ** 2))(model)
        optimizer.update(model, grads, value=value)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = TrainState.create(apply_fn=LinenModel().apply, params=params, tx=tx)

    @jax.jit
    def linen_step(state, value):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, INPUTS) - TARGETS) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params), value=value)

    for value, scale in ((1.0, 1.0), (1.0, 0.5), (1.0, 0.25)):
        step(model, optimizer, value)
        state = linen_step(state, value)
        assert ao.get_hyperparams(optimizer.opt_state)["scale"] == scale
        assert ao.get_hyperparams(state.opt_state)["scale"] == scale
    assert state.step == 3 and state.tx is tx
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), trained, state.params)


def test_a_train_state_replaces_its_own_fields_and_works_without_extra_arguments():
    class WithStatistics(TrainState):
        statistics: Any = None

    state = WithStatistics.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(1.0))
    state = state.apply_gradients(grads={"w": jnp.ones(1)}, statistics=7, value=1.0)
    assert (state.step, state.statistics, state.params["w"][0]) == (1, 7, 0)
    other = optax.sgd(0.5)
    assert state.apply_gradients(grads={"w": jnp.ones(1)}, tx=other).tx is other


def test_a_metric_that_is_not_finite_spoils_its_window_alone():
    metrics = [4.0, np.nan, 1.0, 3.0, np.inf, 1.0, 2.0, 2.0]  # means: bad, 2, bad, 2
    assert scales(metrics, accumulation_size=2, patience=2, factor=0.5) == [1.0] * 7 + [0.5]
    tx = ao.reject_nonfinite(optax.chain(ao.sgd(1.0), ao.reduce_on_plateau(accumulation_size=3)))
    state = tx.init(jnp.ones(1))
    for x in (np.nan, 1.0, -np.inf, 2.0):
        updates, state = tx.update(jnp.ones(1), state, value=x)
        assert updates[0] == -1
    assert ao.get_rejections(state).total == 0


def test_nans_and_infinities_can_be_debugged():
    with jax.debug_nans(True), jax.debug_infs(True):
        tx = ao.reduce_on_plateau(rtol=0.0, atol=1e-4, preset="keras")
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"factor must be a number in \(0, 1\), got 1.0"),
        ({"factor": 0.0}, r"factor must be"),
        ({"patience": 0}, r"patience must be an integer in \[1, inf\), got 0"),
        ({"patience": -1, "preset": "torch"}, r"patience must be an integer in \[0, inf\)"),
        ({"rtol": -1e-4}, "rtol must be"),
        ({"atol": float("nan")}, "atol must be"),
        ({"cooldown": -1}, "cooldown must be"),
        ({"accumulation_size": 0}, "accumulation_size must be"),
        ({"min_scale": 2.0}, "min_scale must be"),
        ({"mode": "least"}, "mode must be one of 'min', 'max', got 'least'"),
        ({"preset": "flax"}, "preset must be one of 'optax', 'torch', 'keras'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ao.reduce_on_plateau(**arguments)


def test_a_missing_or_wrong_metric_is_refused():
    tx = ao.reduce_on_plateau()
    state = tx.init(jnp.ones(1))
    with pytest.raises(ValueError, match=r"needs the metric: update\(updates, state, params, value=loss\)"):
        tx.update(jnp.ones(1), state)
    for is_new in (1, None, np.ones(2, bool)):
        with pytest.raises(ValueError, match="is_new must be True or False, or a traced bool, got"):
            tx.update(jnp.ones(1), state, value=1.0, is_new=is_new)
    for value in (jnp.ones(2), 1j, "low"):
        with pytest.raises(ValueError, match="value must be a real scalar, got"):
            tx.update(jnp.ones(1), state, value=value)

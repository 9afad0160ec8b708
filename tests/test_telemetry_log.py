"""The log of telemetry: a table, a picture, TensorBoard's files."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import adaptive_optax as ao
from adaptive_optax.monitoring import log as telemetry_log

PARAMS = {"body": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}, "scale": jnp.ones(())}
NAMES = ["body/bias", "body/kernel", "scale"]


def trained(per, steps=4, every=1, optimizer=None):
    """A log, and the stacked telemetry that it was made from."""
    tx = ao.telemetry(optimizer or ao.adam(ao.exponential_decay(0.1, 2, 0.5)), per=per, every=every)
    grads = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(p.size).normal(size=(steps, *p.shape)), jnp.float32),
        PARAMS,
    )

    def body(state, g):
        _, state = tx.update(g, state, PARAMS)
        return state, ao.get_telemetry(state)

    _, seen = jax.jit(lambda g: jax.lax.scan(body, tx.init(PARAMS), g))(grads)
    log = ao.TelemetryLog(PARAMS)
    log.extend(seen)
    return log, seen


def test_a_table_of_the_whole_tree():
    log, seen = trained("tree")
    assert len(log) == 4 and log.table.index.tolist() == [1, 2, 3, 4] and log.table.index.name == "step"
    assert list(log.table.columns) == list(ao.Telemetry._fields[1:-1])
    for name in log.table.columns:
        np.testing.assert_array_equal(log.table[name], getattr(seen, name))
    np.testing.assert_array_equal(log.histograms, seen.histogram)


def test_a_table_of_tensors():
    log, seen = trained("tensor")
    assert log.table.index.names == ["step", "tensor"] and len(log.table) == 12
    for i, name in enumerate(NAMES):
        part = log.table.xs(name, level="tensor")
        np.testing.assert_array_equal(part["gradient_norm"], seen.gradient_norm[:, i])
        np.testing.assert_array_equal(part["learning_rate"], seen.learning_rate)
    assert log.histograms.shape == (4, 3, 40)


def test_a_measurement_is_noted_once():
    tx = ao.telemetry(ao.sgd(0.1), every=2)
    state, log = tx.init(PARAMS), ao.TelemetryLog()
    log.append(state)
    assert len(log) == 0 and log.table.empty
    for _ in range(4):
        _, state = jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
        log.append(state)  # copied before the state is donated
    assert log.steps.tolist() == [1, 3] and log.table["learning_rate"].tolist() == [np.float32(0.1)] * 2


def test_appending_does_not_wait_and_loses_nothing(monkeypatch):
    fetched = []

    def fetch(state):
        fetched.append(int(state.measured))
        return measurement_on_host(state)

    measurement_on_host = telemetry_log.measurement_on_host
    monkeypatch.setattr(telemetry_log, "measurement_on_host", fetch)
    tx = ao.telemetry(ao.adam(0.1))
    step = jax.jit(tx.update, donate_argnums=1)
    state, log, under_way, expected = tx.init(PARAMS), ao.TelemetryLog(), [], []
    for i in range(300):
        _, state = step(jax.tree.map(lambda x, i=i: x * (i + 1.0), PARAMS), state, PARAMS)
        log.append(state)
        expected.append(float(ao.get_telemetry(state).gradient_norm))
        under_way.append(i + 1 - len(fetched))
        if i < 128:
            assert not fetched  # nothing has waited for a step
    assert max(under_way) == 128 and 64 <= under_way[-1] < len(log) == 300
    assert fetched == log.table.index.tolist() == list(range(1, 301))
    assert log.table["gradient_norm"].tolist() == expected
    log.append(state)
    _, state = step(PARAMS, state, PARAMS)
    log.append(state)  # after a reading it goes on
    assert log.steps.tolist() == list(range(1, 302)) and len(log.histograms) == 301


@pytest.mark.parametrize("per", ["tree", "tensor"])
def test_nans_can_be_debugged(per):
    tx = ao.telemetry(ao.sgd(0.1), per=per)  # no parameters, no Adam: much is not defined
    step = jax.jit(tx.update)

    def logs():
        @jax.jit  # traced anew: the flag is read then
        def scanned(state):
            def body(state, _):
                state = tx.update(PARAMS, state)[1]
                return state, ao.get_telemetry(state)

            return jax.lax.scan(body, state, None, length=2)[1]

        state, appended, extended = tx.init(PARAMS), ao.TelemetryLog(PARAMS), ao.TelemetryLog(PARAMS)
        appended.append(state)
        assert np.isnan(ao.get_telemetry(state).snr).all()
        extended.extend(scanned(state))
        for _ in range(2):
            _, state = step(PARAMS, state)
            appended.append(state)
        return appended, extended

    plain, _ = logs()
    with jax.debug_nans(True), jax.debug_infs(True):
        for log in logs():
            np.testing.assert_array_equal(log.table, plain.table)
            np.testing.assert_array_equal(log.histograms, plain.histograms)
    assert plain.table["snr"].isna().all() and plain.table["cosine"].notna().all()


def test_a_traced_state_is_refused():
    tx = ao.telemetry(ao.sgd(0.1))
    with pytest.raises(ValueError, match="append works outside of jit, got a traced state"):
        jax.jit(lambda state: ao.TelemetryLog().append(state))(tx.init(PARAMS))


def test_what_does_not_fit_is_refused():
    _, seen = trained("tensor")
    with pytest.raises(ValueError, match="params of TelemetryLog must have the 3 tensors .* got 0"):
        ao.TelemetryLog().extend(seen)
    with pytest.raises(ValueError, match="measurements must be a Telemetry with a leading axis of steps"):
        ao.TelemetryLog(PARAMS).extend(jax.tree.map(lambda x: x[0], seen))
    with pytest.raises(ValueError, match="must hold one state of telemetry"):
        ao.TelemetryLog().append(ao.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="needs a measurement"):
        ao.TelemetryLog().plot()
    with pytest.raises(ValueError, match="theme must be one of"):
        trained("tree")[0].plot(theme="sepia")


@pytest.mark.parametrize("module", ["pandas", "matplotlib", "tensorboardX"])
def test_what_is_missing_is_named(module, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "adaptive_optax._core.extras.find_spec", lambda name: None if name == module else name
    )
    log, _ = trained("tree")
    extra = "tensorboard" if module == "tensorboardX" else "study"
    use = {
        "pandas": lambda: log.table,
        "matplotlib": log.plot,
        "tensorboardX": lambda: log.to_tensorboard(tmp_path),
    }
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'adaptive-optax\[{extra}\]'"):
        use[module]()


# --- The picture --------------------------------------------------------------------------------------------


def test_the_picture_has_a_line_for_each_layer():
    log, seen = trained("tensor", steps=120)
    figure = log.plot()
    assert isinstance(figure, Figure)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    squares = np.square(np.asarray(seen.gradient_norm, float))
    rates = np.asarray(seen.effective_learning_rate, float)
    body = (rates * squares)[:, :2].sum(axis=1) / squares[:, :2].sum(axis=1)
    for name, expected in {"body": body, "scale": rates[:, 2]}.items():
        means = expected.reshape(-1, 3).mean(axis=1)
        shown = lines[name].get_ydata()
        np.testing.assert_allclose(shown[means > 0], means[means > 0], rtol=1e-6)
        assert np.isnan(shown[means <= 0]).all()
    given = next(line for line in figure.axes[0].lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(given.get_ydata(), seen.learning_rate.reshape(-1, 3).mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(given.get_xdata(), np.arange(1, 121).reshape(-1, 3).mean(axis=1))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["body", "scale"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_many_layers_are_coloured_in_their_order_and_some_named(theme):
    params = {f"layer_{i:02}": {"kernel": jnp.ones(2)} for i in range(24)}
    tx = ao.telemetry(ao.sgd(0.1), per="tensor")
    _, state = tx.update(params, tx.init(params), params)
    log = ao.TelemetryLog(params)
    log.append(state)
    figure = log.plot(theme=theme)
    colours = [line.get_color() for line in figure.axes[0].lines[:24]]
    assert len(set(map(tuple, colours))) == 24
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 10 and names[0] == "layer_00" and names[-1] == "layer_23"


def test_an_optimizer_of_another_library_can_be_drawn():
    log, _ = trained("tree", optimizer=optax.sgd(0.1))
    (line, given) = log.plot().axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), 0.1, rtol=1e-5)
    assert np.isnan(given.get_ydata()).all()


# --- TensorBoard --------------------------------------------------------------------------------------------


def events(folder):
    """All values in a folder's event files: (tag, step, value or histogram)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                is_histogram = value.WhichOneof("value") == "histo"
                yield value.tag, event.step, value.histo if is_histogram else value.simple_value


@pytest.mark.parametrize("per", ["tree", "tensor"])
def test_tensorboard_gets_every_finite_value_once(per, tmp_path):
    log, seen = trained(per)
    log.to_tensorboard(tmp_path)
    log.to_tensorboard(tmp_path)
    found = {(tag, step): value for tag, step, value in events(tmp_path)}
    assert len(found) == len(list(events(tmp_path)))
    for t in range(4):
        assert found["telemetry/learning_rate", t + 1] == pytest.approx(float(seen.learning_rate[t]))
        for i, name in enumerate(NAMES if per == "tensor" else [""]):
            at = (t, i) if per == "tensor" else (t,)
            suffix = f"/{name}" if name else ""
            assert found[f"telemetry/cosine{suffix}", t + 1] == pytest.approx(float(seen.cosine[at]))
            assert (f"telemetry/snr{suffix}", t + 1) not in found or t > 0  # not defined at the first step
            histogram = found[f"telemetry/histogram{suffix}", t + 1]
            shares = np.asarray(seen.histogram[at], float)
            np.testing.assert_allclose(np.diff(histogram.bucket_limit), 1)
            np.testing.assert_allclose(histogram.bucket, shares, rtol=1e-6)
            middles = np.array(histogram.bucket_limit) - 0.5
            assert histogram.sum == pytest.approx(shares @ middles)


def test_tensorboard_goes_on_with_an_open_writer(tmp_path):
    from tensorboardX import SummaryWriter

    log, seen = trained("tree")
    later = ao.TelemetryLog()
    with SummaryWriter(str(tmp_path)) as writer:
        for t in range(4):
            later.extend(jax.tree.map(lambda x, t=t: x[t : t + 1], seen))
            later.to_tensorboard(writer, prefix="run")
    steps = [step for tag, step, _ in events(tmp_path) if tag == "run/cosine"]
    assert steps == [1, 2, 3, 4]

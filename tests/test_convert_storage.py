"""States with moments in any format: read, counted, moved to other formats, saved, and trained in Flax."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from saving import spec, through_bytes, through_orbax

import adaptive_optax as ao

NAMES = ("float32", "bfloat16", "int8")
PARAMS = {"bias": jnp.zeros(64), "kernel": jnp.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128)}
COMPRESSED = 64 * 128  # of `PARAMS`, the kernel


def gradient(step):
    """Of PARAMS, a different one each step, small here and large there."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 10 ** rng.uniform(-3, 0, x.shape), jnp.float32),
        PARAMS,
    )


def trained(tx, state=None, first=0, steps=4):
    """The state after a few steps, and the last updates."""
    state, step = tx.init(PARAMS) if state is None else state, jax.jit(tx.update)
    for t in range(first, first + steps):
        updates, state = step(gradient(t), state, PARAMS)
    return state, updates


def assert_same(left, right):
    """Equal structures, dtypes and bits."""
    assert spec(left) == spec(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- dense --------------------------------------------------------------------------------------------------


def test_dense_is_what_the_transformation_computes_with():
    for name, storage in zip(NAMES, (ao.Float32(), ao.BFloat16(), ao.Int8()), strict=True):
        state, _ = trained(ao.scale_by_adam(mu_storage=name, nu_storage=name, amsgrad=True))
        for moment in (state.mu, state.nu, state.nu_max):
            values = ao.dense(moment)
            assert spec(values) == spec(PARAMS)
            assert_same(values, storage.decode(moment))
            # Traced, where the block size is not known, and read from a file, where all is NumPy.
            traced = jax.jit(ao.dense)(moment)
            assert spec(traced) == spec(values)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-6), traced, values)
            assert_same(jax.tree.map(jnp.asarray, ao.dense(jax.tree.map(np.asarray, moment))), values)
    assert ao.dense(None) is None and ao.dense({"a": None}) == {"a": None}


@pytest.mark.parametrize("size", [16, 100, 256, 2**31 - 1])
def test_dense_reads_any_block_size(size):
    tx = ao.scale_by_adam(mu_storage=ao.Int8(size), nu_storage=ao.Int8(size))
    state, _ = trained(tx, steps=1)
    exact, _ = trained(ao.scale_by_adam(), steps=1)
    for moment, values in ((state.mu, exact.mu), (state.nu, exact.nu)):
        for dense in (ao.dense, jax.jit(ao.dense)):
            largest = float(jnp.max(jnp.abs(values["kernel"])))
            np.testing.assert_allclose(dense(moment)["kernel"], values["kernel"], rtol=0, atol=0.12 * largest)
            np.testing.assert_array_equal(dense(moment)["bias"], values["bias"])


def test_maps_of_an_unknown_format_are_refused():
    state, _ = trained(ao.scale_by_adam(nu_storage="int8"), steps=1)
    with pytest.raises(ValueError, match="must be an Int8Moment of format 1, 2 or 3, got format 4"):
        ao.dense(state.nu._replace(format=jnp.int32(4)))


# --- state_bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "each"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_bytes_are_counted_from_arrays_and_from_shapes(storage, each):
    tx = ao.scale_by_adam(mu_storage=storage, nu_storage=storage)
    # Seven scalars of the state; with 8 bits the bias stays float32, a row of 128 has four headers of
    # two bytes, and each moment has two scalars and the bias' scalar scale, the first one also its count.
    expected = 4 * 7 + 2 * each * (COMPRESSED + 64)
    if storage == "int8":
        expected += 2 * (64 * 3 + 2 * 4 * 64 + 4 * 3) + 4
    state = tx.init(PARAMS)
    assert ao.state_bytes(state) == ao.state_bytes(jax.eval_shape(tx.init, PARAMS)) == expected
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == expected
    assert ao.state_bytes(None) == 0


def transformer():
    """The shapes of a decoder of 25 million parameters."""
    width, hidden, vocabulary = 512, 2048, 32_000
    block = {
        "attention": {name: (width, width) for name in ("query", "key", "value", "out")},
        "mlp": {"in": (width, hidden), "in_bias": (hidden,), "out": (hidden, width), "out_bias": (width,)},
        "norms": {"first": (width,), "second": (width,)},
    }
    tree = {"embedding": (vocabulary, width), "blocks": [block] * 3, "norm": (width,)}
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    return shapes, sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("storages", "least", "most"),
    [
        ({}, 8.0, 8.00001),
        ({"mu_storage": "bfloat16", "nu_storage": "bfloat16"}, 4.0, 4.01),
        ({"mu_storage": "int8", "nu_storage": "int8"}, 2.12, 2.13),
        ({"mu_storage": "bfloat16", "nu_storage": "int8"}, 3.06, 3.065),
    ],
)
def test_adam_s_state_takes_what_is_promised(storages, least, most):
    shapes, size = transformer()
    assert 25e6 < size < 27e6
    state = jax.eval_shape(ao.adam(1e-3, **storages).init, shapes)
    assert least <= ao.state_bytes(state) / size <= most


# --- convert_storage ----------------------------------------------------------------------------------------

MAKERS = {
    "adam": lambda mu, nu: ao.scale_by_adam(mu_storage=mu, nu_storage=nu),
    "amsgrad": lambda mu, nu: ao.scale_by_adam(mu_storage=mu, nu_storage=nu, amsgrad=True),
    "by rows": lambda mu, nu: ao.scale_by_adam(mu_storage=mu, nu_storage=nu, granularity=ao.Axis(-1)),
    "global": lambda mu, nu: ao.scale_by_adam(mu_storage=mu, nu_storage=nu, granularity="global"),
}
PAIRS = [(old, new) for old in NAMES for new in NAMES]


MOVES = [(name, *pair) for name in ("adam", "amsgrad") for pair in PAIRS]
MOVES += [
    (name, *pair) for name in ("by rows", "global") for pair in (("float32", "int8"), ("int8", "bfloat16"))
]


@functools.cache
def started(name, storage):
    return trained(MAKERS[name](storage, storage))[0]


@pytest.mark.parametrize(("name", "old", "new"), MOVES)
def test_adam_moves_between_all_formats(name, old, new):
    before, after, state = MAKERS[name](old, old), MAKERS[name](new, new), started(name, old)
    moved = ao.convert_storage(state, mu_storage=new, nu_storage=new)
    assert spec(moved) == spec(after.init(PARAMS))
    for field in ("count", "b1", "b2", "mu_weight", "nu_weight", "bound_sq"):
        assert getattr(moved, field) == getattr(state, field)
    assert_decodes_alike(moved, state, new)
    # It goes on, and is not thrown off: to within what the formats' gaps make of the old moments.
    expected, _ = before.update(gradient(4), state)
    updates, later = after.update(gradient(4), moved)
    for u, v in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(u - v) <= 0.03 * np.linalg.norm(v)
    assert spec(later) == spec(moved)
    if old == new == "float32":
        assert_same(moved, state)


def assert_decodes_alike(moved, state, new):
    """Moments are the old ones, to a gap of the new format; nu may be raised to what mu asks of it."""
    gap = {"float32": 1e-6, "bfloat16": 2**-7, "int8": 0.25}[new]
    for field in ("mu", "nu", "nu_max"):
        new_values, old_values = (jax.tree.leaves(ao.dense(getattr(s, field))) for s in (moved, state))
        for x, y in zip(new_values, old_values, strict=True):
            if field == "mu":
                largest = np.max(np.abs(y), axis=-1, keepdims=True)
                assert (np.abs(x - y) <= gap * np.abs(y) + (0.02 * largest if new == "int8" else 0)).all()
            else:
                assert (x >= y * (1 - gap)).all()
                assert (x <= np.maximum(y * (1 + gap), 1e-10 * np.max(y))).mean() > 0.98


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_centred_rms_moves_between_all_formats(old, new):
    before, after = (ao.scale_by_rms(0.99, centered=True, storage=name) for name in (old, new))
    state, _ = trained(before)
    moved = ao.convert_storage(state, mu_storage=new, nu_storage=new)
    assert spec(moved) == spec(after.init(PARAMS))
    expected, _ = before.update(gradient(4), state)
    updates, _ = after.update(gradient(4), moved)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=0.15, atol=0.1), updates, expected)
    if old == new == "float32":
        assert_same(moved, state)


def labelled(inner):
    return optax.partition({"x": inner, "y": optax.sgd(0.1)}, {"bias": "y", "kernel": "x"})


DEEP = {
    "chain": lambda inner: optax.chain(ao.clip_by_global_norm(1.0), inner, ao.scale_by_learning_rate(0.1)),
    "masked": lambda inner: optax.masked(inner, {"bias": False, "kernel": True}),
    "partition": labelled,
    "multi steps": lambda inner: optax.MultiSteps(inner, 2),
    "rejecting": ao.reject_nonfinite,
    "master weights": ao.master_weights,
    "two": lambda inner: optax.chain(inner, inner),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize(("old", "new"), [("float32", "int8"), ("int8", "bfloat16")])
def test_states_at_any_depth_are_moved(name, old, new):
    before, after = (DEEP[name](MAKERS["amsgrad"](storage, storage)) for storage in (old, new))
    state, _ = trained(before)
    moved = ao.convert_storage(state, mu_storage=new, nu_storage=new)
    assert spec(moved) == spec(after.init(PARAMS))
    later, _ = trained(after, moved, first=4, steps=2)
    assert spec(later) == spec(moved)
    assert ao.state_bytes(moved) < ao.state_bytes(state) or new == "bfloat16"


def test_one_moment_is_moved_and_the_other_left():
    state, _ = trained(MAKERS["adam"]("float32", "float32"))
    moved = ao.convert_storage(state, nu_storage="int8")
    assert spec(moved) == spec(MAKERS["adam"]("float32", "int8").init(PARAMS))
    assert_same(moved.mu, state.mu)
    moved = ao.convert_storage(state, mu_storage=ao.Int8(64))
    assert spec(moved) == spec(MAKERS["adam"](ao.Int8(64), "float32").init(PARAMS))
    assert_same(moved.nu, state.nu)
    assert_same(ao.convert_storage(state), state)


def test_the_floor_goes_with_the_moments():
    # What 8 bits hold may be less than m^2 / A^2; the transformation reads it as that, and so does what a
    # float32 state is made from.
    tx = MAKERS["adam"]("int8", "int8")
    state, _ = trained(tx, steps=3)
    # Twenty octaves of v, in the header's quarters above its six bits.
    lower = jax.tree.map(lambda s: s - (20 * 4 << 6) if s.ndim else s, state.nu.scale)
    state = state._replace(nu=state.nu._replace(scale=lower))
    moved = ao.convert_storage(state, mu_storage="float32", nu_storage="float32")
    floor = jax.tree.map(lambda m: jnp.square(m) / state.bound_sq, moved.mu)
    np.testing.assert_array_less(floor["kernel"] * (1 - 1e-6), moved.nu["kernel"] + 1e-30)
    assert (ao.dense(state.nu)["kernel"] < 0.5 * floor["kernel"]).mean() > 0.5


WRONG = [
    (lambda s: ao.convert_storage(s, mu_storage="int4"), "mu_storage must be .*'int8', got 'int4'"),
    (lambda s: ao.convert_storage(s, nu_storage=jnp.int8), "nu_storage must be .*'int8', got"),
    (
        lambda s: ao.convert_storage(s, nu_storage=ao.BFloat16("nearest")),
        "b2 must be at most 0.99609375.*0.999",
    ),
    (
        lambda s: ao.convert_storage(optax.adam(0.1).init(PARAMS), nu_storage="int8"),
        "opt_state must hold a state of scale_by_adam or scale_by_rms, got a tuple",
    ),
    (lambda s: ao.convert_storage({"a": 1}), "opt_state must hold a state"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_cannot_be_moved_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(MAKERS["adam"]("float32", "float32").init(PARAMS))


# Formats in which one of them does not keep what the other has written.
OTHERS = [(a, b) for a in (*NAMES, ao.Int8(64), ao.Int8(min_size=1)) for b in (*NAMES, ao.Int8(64)) if a != b]


@pytest.mark.parametrize(("kept", "wanted"), OTHERS, ids=str)
@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_state_in_another_format_is_refused_with_the_remedy(moment, kept, wanted):
    state = ao.scale_by_adam(**{f"{moment}_storage": kept}).init(PARAMS)
    tx = ao.scale_by_adam(**{f"{moment}_storage": wanted})
    with pytest.raises(ValueError, match="or convert the state with convert_storage"):
        jax.eval_shape(tx.update, PARAMS, state)
    if moment == "nu":
        with pytest.raises(ValueError, match="or convert the state with convert_storage"):
            jax.eval_shape(
                ao.scale_by_rms(storage=wanted).update, PARAMS, ao.scale_by_rms(storage=kept).init(PARAMS)
            )


# --- Saved, mapped, restored --------------------------------------------------------------------------------

LOW = {
    "int8": ao.adam(0.01, mu_storage="int8", nu_storage="int8", amsgrad=True),
    "bfloat16, int8": ao.adam(0.01, mu_storage="bfloat16", nu_storage="int8"),
    "rms": ao.rmsprop(0.01, centered=True, storage="int8"),
}


def through_pickle(state, template, tmp_path):
    arrays = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    return jax.tree.map(jnp.asarray, arrays)


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("through", [through_bytes, through_orbax, through_pickle])
def test_a_restored_run_goes_on_bit_for_bit(through, name, tmp_path):
    tx = LOW[name]
    half, _ = trained(tx)
    end, updates = trained(tx, half, first=4)
    template = jax.tree.map(jnp.zeros_like, tx.init(PARAMS))
    restored = through(half, template, tmp_path)
    restored = jax.tree.map(jnp.asarray, restored)
    assert_same(restored, half)
    again, same_updates = trained(tx, restored, first=4)
    assert_same(again, end)
    assert_same(same_updates, updates)
    assert all(x.size for x in jax.tree.leaves(half))  # orbax refuses empty arrays


@pytest.mark.parametrize("name", LOW)
def test_tree_map_params_keeps_codes_and_scales(name):
    tx = LOW[name]
    state, _ = trained(tx)
    mapped = optax.tree_map_params(tx, lambda x: x, state)
    assert_same(mapped, state)
    marked = optax.tree_map_params(tx, lambda x: jnp.full_like(x, 7), state)
    assert spec(marked) == spec(state)
    nu = next(s.nu for s in marked if hasattr(s, "nu"))
    assert all((x == 7).all() for x in jax.tree.leaves((nu.codes, nu.scale)))
    assert nu.format == 3 and nu.block_size == 32


# --- In nnx -------------------------------------------------------------------------------------------------

INPUTS = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)
TARGETS = np.stack([INPUTS[:, :8].sum(1), np.abs(INPUTS[:, 0])], axis=1)


class Model(nnx.Module):
    """One kernel of 64 x 128, which is compressed, and leaves that are not."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.output = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.tanh(self.hidden(x)))


def loss(model):
    return jnp.mean((model(INPUTS) - TARGETS) ** 2)


@nnx.jit
def nnx_step(model, optimizer):
    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def nnx_training(**arguments):
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, ao.adam(0.01, **arguments), wrt=nnx.Param)


def losses(model, optimizer, steps):
    return [float(nnx_step(model, optimizer)) for _ in range(steps)]


@functools.cache
def float32_losses():
    return losses(*nnx_training(), 60)


@pytest.mark.parametrize(("mu", "nu"), [("int8", "int8"), ("bfloat16", "int8"), ("bfloat16", "bfloat16")])
def test_nnx_trains_with_low_precision_moments(mu, nu):
    model, optimizer = nnx_training(mu_storage=mu, nu_storage=nu)
    assert (mu != "int8") or "values of 1 leaves as int8" in repr(optimizer.opt_state[0].mu)
    trajectory = losses(model, optimizer, 60)
    assert trajectory[-1] < 0.1 * trajectory[0]
    assert trajectory[-1] < 1.5 * float32_losses()[-1] + 0.01
    # As for a plain state.
    wrapped = optimizer.opt_state[0].nu
    plain = jax.tree.map(lambda x: x[...], wrapped, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for x, y in zip(jax.tree.leaves(ao.dense(wrapped)), jax.tree.leaves(ao.dense(plain)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("old", "new"), [("float32", "int8"), ("int8", "float32"), ("bfloat16", "int8"), ("int8", "bfloat16")]
)
def test_an_nnx_state_is_moved(old, new):
    model, optimizer = nnx_training(mu_storage=old, nu_storage=old, amsgrad=True)
    first = losses(model, optimizer, 20)
    moved = ao.convert_storage(optimizer.opt_state, mu_storage=new, nu_storage=new)
    _, other = nnx_training(mu_storage=new, nu_storage=new, amsgrad=True)
    assert spec(moved) == spec(other.opt_state)
    other.opt_state = moved
    second = losses(model, other, 20)
    assert second[0] < first[-1] + 0.05 and second[-1] < second[0]
    assert other.opt_state[0].count[...] == 40


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_an_nnx_state_in_hijax_form_is_moved(storage):
    with nnx.var_defaults(hijax=True):
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, ao.adam(0.1), wrt=nnx.Param)
        gradients = jax.tree.map(nnx.Param, nnx.as_pure(nnx.state(model, nnx.Param)))
        optimizer.update(model, gradients)
        moved = ao.convert_storage(optimizer.opt_state, mu_storage=storage, nu_storage=storage)
        tx = ao.adam(0.1, mu_storage=storage, nu_storage=storage)
        other = nnx.Optimizer(model, tx, wrt=nnx.Param)
        assert jax.tree.structure(moved) == jax.tree.structure(other.opt_state)
        other.opt_state = moved
        other.update(model, gradients)
        assert other.opt_state[0].count[...] == 2


def test_a_restored_nnx_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = nnx_training(mu_storage="int8", nu_storage="int8")
    losses(model, optimizer, 5)
    half = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    ahead = losses(model, optimizer, 5)
    restored = through_orbax(half, jax.tree.map(jnp.zeros_like, half), tmp_path)
    assert_same(restored, half)
    nnx.update((model, optimizer), restored)
    assert losses(model, optimizer, 5) == ahead


@pytest.mark.parametrize(("given", "real"), [("complex64", "float32"), ("bfloat16", "bfloat16")])
def test_moments_of_complex_parameters_stay_complex(given, real):
    params = {"c": jnp.ones(2, jnp.complex64), "r": jnp.ones(2)}
    tx = ao.scale_by_adam(mu_dtype=given)
    _, state = tx.update(params, tx.init(params))
    assert {name: str(x.dtype) for name, x in state.mu.items()} == {"c": "complex64", "r": real}

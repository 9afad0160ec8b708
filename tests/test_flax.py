"""With Flax: `nnx.Optimizer` and `TrainState` train, are read, and go on bit for bit when restored."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from flax.training.train_state import TrainState
from saving import same, through_bytes, through_orbax

import adaptive_optax as ao
from adaptive_optax.integrations.flax import TrainState as StateWithExtra

INPUTS = np.random.default_rng(11).standard_normal((32, 4)).astype(np.float32)
TARGETS = np.stack([INPUTS.sum(1), np.abs(INPUTS[:, 0])], axis=1)
STEPS = 40


class NnxModel(nnx.Module):
    """Two layers, with the same paths as `LinenModel`."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.output = nnx.Linear(8, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.tanh(self.hidden(x)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="output")(nn.tanh(nn.Dense(8, name="hidden")(x)))


def rate(count):
    return 0.05 / (1.0 + 0.01 * count)


def kernels(params):
    """The mask of what is usually decayed."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


SEEN = []


def layer_of(path, leaf):
    SEEN.append((path, leaf.shape))
    return path.split("/")[0]


# name: a function from the parameters (nnx's state, or a dict) to the optimizer
OPTIMIZERS = {
    "adam": lambda params: ao.adam(rate),
    "adam, by path": lambda params: ao.adam(
        rate, granularity=ao.Labels.by_path({"^hidden/kernel$": "a", "put": "b"})
    ),
    "adam, labels": lambda params: ao.adam(rate, granularity=ao.Labels(layer_of)),
    "adam, global": lambda params: ao.adam(rate, granularity=ao.Global("mean")),
    "adamw, mask function": lambda params: ao.adamw(rate, weight_decay=0.5, mask=kernels),
    "adamw, mask": lambda params: ao.adamw(
        rate, weight_decay=0.5, mask=kernels(params), granularity=ao.Axis(0)
    ),
    "adamw, mask of layers": lambda params: ao.adamw(
        rate, weight_decay=0.5, mask={"hidden": True, "output": False}
    ),
    "rmsprop": lambda params: ao.rmsprop(rate, centered=True, momentum=0.5, granularity="tensor"),
    "global_rmsprop": lambda params: ao.global_rmsprop(rate),
    "sgd": lambda params: ao.sgd(rate, momentum=0.9, nesterov=True),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def nnx_training(build):
    """A model, its optimizer, the loss, a jitted step and the number of its traces."""
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, build(nnx.state(model, nnx.Param)), wrt=nnx.Param)
    traces = []

    def loss(model):
        return jnp.mean((model(INPUTS) - TARGETS) ** 2)

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return model, optimizer, step, traces


def start():
    """The parameters that `nnx_training` starts from, as linen has them."""
    return nnx.to_pure_dict(nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param))


def linen_training(build):
    """A train state, a jitted step and the number of its traces."""
    params = start()
    state = TrainState.create(apply_fn=LinenModel().apply, params=params, tx=build(params))
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)

        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, INPUTS) - TARGETS) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    return state, step, traces


@each_optimizer
def test_nnx_and_linen_train_alike(name):
    SEEN.clear()
    model, optimizer, step, traces = nnx_training(OPTIMIZERS[name])
    nnx_losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    state, linen_step, linen_traces = linen_training(OPTIMIZERS[name])
    losses = []
    for _ in range(STEPS):
        state, value = linen_step(state)
        losses.append(float(value))
    assert losses[-1] < 0.4 * losses[0]
    np.testing.assert_allclose(nnx_losses, losses, rtol=1e-4)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), trained, state.params)
    assert len(traces) == len(linen_traces) == 1
    if "labels" in name:  # the same paths, at init and update, however the parameters are wrapped
        assert set(SEEN) == {("hidden/kernel", (4, 8)), ("hidden/bias", (8,)), ("output/kernel", (8, 2))}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "mask" in name])
def test_masks_choose_what_decays_in_nnx(name):
    model, optimizer, _, _ = nnx_training(OPTIMIZERS[name])
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(jnp.ones_like, params))
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    for layer, leaves in nnx.to_pure_dict(nnx.state(model, nnx.Param)).items():
        for kind, leaf in leaves.items():
            decays = layer == "hidden" if "layers" in name else kind == "kernel"
            np.testing.assert_allclose(
                leaf, np.full(leaf.shape, 1 - 0.05 * 0.5 if decays else 1.0), rtol=1e-6
            )


# --- Every factory ------------------------------------------------------------------------------------------

EVERY = {case.factory: case for case in reversed(CASES)}  # the first case of each
EVERY["inject_hyperparams"] = next(case for case in CASES if case.name == "injected")


@pytest.mark.parametrize("factory", EVERY)
def test_two_steps_of_everything_are_alike_in_nnx_and_linen(factory):
    case = EVERY[factory]
    if case.not_traceable:
        jit = nnx_jit = lambda f: f  # it checks values; under jit that takes chex.chexify
    else:
        jit, nnx_jit = jax.jit, nnx.jit
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param)
    state = StateWithExtra.create(apply_fn=LinenModel().apply, params=start(), tx=case.make())

    @nnx_jit
    def nnx_step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(INPUTS) - TARGETS) ** 2))(model)
        optimizer.update(model, grads, value=value)

    @jit
    def linen_step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, INPUTS) - TARGETS) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads, value=value)

    for _ in range(2):
        nnx_step(model, optimizer)
        state = linen_step(state)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), trained, state.params)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 1e-6, trained, start())
    assert all(jax.tree.leaves(moved))


def test_trees_from_nnx_state_are_taken_everywhere():
    params, plain = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param), start()

    def pure(tree):
        return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree

    tx = ao.adamw(1e-3, mask=ao.decay_mask)
    assert ao.state_bytes(tx.init(params)) == ao.state_bytes(tx.init(plain))
    np.testing.assert_allclose(ao.global_norm(params), ao.global_norm(plain), rtol=1e-6)
    for mask in (ao.decay_mask, ao.mask_by_path("^hidden/")):
        assert jax.tree.leaves(mask(params)) == jax.tree.leaves(mask(plain))
    groups = ao.partition_by_path({"kernel": ao.adam(1e-3)}, default=ao.sgd(1e-3))
    assert ao.describe_partition(groups, params) == ao.describe_partition(groups, plain)
    assert ao.TelemetryLog(params).tensors == ao.TelemetryLog(plain).tensors
    converted = ao.convert_storage(tx.init(params), nu_storage="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(converted[0].nu)} == {jnp.dtype("bfloat16")}
    theirs = optax.adamw(1e-3).init(params)
    same(pure(ao.from_optax(theirs, tx, params)[0].mu), pure(tx.init(params)[0].mu))
    averaging = ao.average_parameters()
    averaged = ao.averaged_parameters(params, averaging.init(params))
    same(jax.tree.leaves(averaged), jax.tree.leaves(params))


# --- What the last step used --------------------------------------------------------------------------------


def test_hyperparameters_are_read_from_either_state():
    build = OPTIMIZERS["adamw, mask function"]
    model, optimizer, step, _ = nnx_training(build)
    state, linen_step, _ = linen_training(build)
    for used in (0, 0, 1, 2):  # before the first step they are those of the first step
        for opt_state in (optimizer.opt_state, state.opt_state):
            values = ao.get_hyperparams(opt_state)
            assert sorted(values) == ["b1", "b2", "eps", "learning_rate", "weight_decay"]
            assert all(type(x) is type(jnp.ones(())) and x.dtype == jnp.float32 for x in values.values())
            for name, value in {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.5}.items():
                assert values[name] == jnp.float32(value)
            np.testing.assert_allclose(values["learning_rate"], rate(used), rtol=1e-6)
        step(model, optimizer)
        state, _ = linen_step(state)


# --- Saved and restored -------------------------------------------------------------------------------------

# Between them: fields that are None and those that are not, a bfloat16 moment, a vector of labels, a scalar.
SAVED = {
    "adamw": lambda params: ao.adamw(rate, weight_decay=0.1, granularity=ao.Labels(layer_of)),
    "amsgrad": lambda params: ao.adam(rate, mu_dtype=jnp.bfloat16, amsgrad=True, granularity=ao.Axis(0)),
    "global_rmsprop": lambda params: ao.global_rmsprop(rate),
    "rmsprop": lambda params: ao.rmsprop(rate, centered=True, momentum=0.5),
    "sgd": lambda params: ao.sgd(rate, momentum=0.9, accumulator_dtype=jnp.bfloat16),
}
NONE = {"adamw": "nu_max", "global_rmsprop": "mu"}
LOW = {"amsgrad", "sgd"}
each_saved = pytest.mark.parametrize("name", SAVED)


@functools.cache
def saved_training(name):
    state, step, _ = linen_training(SAVED[name])

    def run(state, steps):
        for _ in range(steps):
            state, _ = step(state)
        return state

    half = run(state, 5)
    return state, half, run(half, 5), run


@each_saved
@pytest.mark.parametrize("through", [through_bytes, through_orbax], ids=["flax", "orbax"])
def test_a_restored_run_goes_on_bit_for_bit(name, through, tmp_path):
    fresh, half, end, run = saved_training(name)
    restored = through(half, jax.tree.map(jnp.zeros_like, fresh), tmp_path)
    same(restored, half)
    same(run(restored, 5), end)
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(restored.opt_state)) == (name in LOW)
    if name in NONE:
        assert getattr(restored.opt_state[0], NONE[name]) is None
    assert type(restored.opt_state[0]) is type(half.opt_state[0])  # a NamedTuple, not a dict of its fields


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_restored_nnx_run_goes_on_bit_for_bit(name, tmp_path):
    model, optimizer, step, traces = nnx_training(SAVED[name])
    for _ in range(5):
        step(model, optimizer)
    half = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    losses = [step(model, optimizer) for _ in range(5)]
    end = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
    restored = through_orbax(half, jax.tree.map(jnp.zeros_like, half), tmp_path)
    same(restored, half)
    nnx.update((model, optimizer), restored)
    assert [step(model, optimizer) for _ in range(5)] == losses
    same(nnx.state((model, optimizer)), end)
    assert len(traces) == 1

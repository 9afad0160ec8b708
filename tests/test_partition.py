"""Groups by path: partitions, masks and tables, the same for dictionaries, linen, nnx and dataclasses."""

import copy
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from saving import same, through_bytes, through_orbax

import adaptive_optax as ao
from adaptive_optax._core.paths import paths_and_leaves

# --- The same model four times ------------------------------------------------------------------------------


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layer_1 = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.layer_10 = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.layer_10(self.norm(nnx.tanh(self.layer_1(x))))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.tanh(nn.Dense(4, name="layer_1")(x)))
        return nn.Dense(2, name="layer_10")(x)


class Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    use_bias: bool = eqx.field(static=True, default=True)


class Norm(eqx.Module):
    scale: jax.Array
    bias: jax.Array


class EquinoxModel(eqx.Module):
    layer_1: Layer
    norm: Norm
    layer_10: Layer


@functools.cache
def dictionary():
    return {
        "layer_1": {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.zeros(4)},
        "layer_10": {"kernel": jnp.full((4, 2), -0.5), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
    }


def equinox_model():
    layers = dictionary()
    return EquinoxModel(Layer(**layers["layer_1"]), Norm(**layers["norm"]), Layer(**layers["layer_10"]))


def unwrapped(state):
    """A state of nnx as `nnx.Optimizer` hands it to update."""
    return jax.tree.map(lambda x: x.get_value(), state, is_leaf=lambda x: isinstance(x, nnx.Variable))


PARAMETERS = {
    "dict": dictionary,
    "linen": functools.cache(lambda: LinenModel().init(jax.random.key(0), jnp.ones((1, 3)))["params"]),
    "nnx": functools.cache(lambda: nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)),
    "nnx, unwrapped": functools.cache(lambda: unwrapped(PARAMETERS["nnx"]())),
    "equinox": functools.cache(equinox_model),
    "abstract": functools.cache(lambda: jax.eval_shape(dictionary.__wrapped__)),
}
each_kind = pytest.mark.parametrize("kind", PARAMETERS)


def by_path(tree):
    """A tree as a dict from paths."""
    return dict(paths_and_leaves(tree))


def rates(params, tx):
    """The rate at which each leaf was moved, by path: all groups are plain gradient descent."""
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), jax.jit(tx.init)(params))
    for u in jax.tree.leaves(updates):
        assert np.ptp(np.asarray(u)) == 0
    return {path: -float(np.ravel(u)[0]) for path, u in by_path(updates).items()}


def sgd(rate):
    return ao.sgd(rate)


PATHS = ["layer_1/bias", "layer_1/kernel", "layer_10/bias", "layer_10/kernel", "norm/bias", "norm/scale"]

# --- Partitions ---------------------------------------------------------------------------------------------


@each_kind
def test_the_groups_are_the_same_for_all_kinds_of_parameters(kind):
    params = PARAMETERS[kind]()
    assert sorted(by_path(params)) == PATHS
    tx = ao.partition_by_path({"^norm/": sgd(2.0), "bias$": sgd(4.0), "layer_1/": sgd(8.0)}, default=sgd(1.0))
    expected = [4.0, 8.0, 4.0, 1.0, 2.0, 2.0]
    if kind == "abstract":
        assert jax.eval_shape(tx.init, params) == jax.eval_shape(tx.init, dictionary())
        return
    assert rates(params, tx) == dict(zip(PATHS, expected, strict=True))


@pytest.mark.parametrize(
    ("patterns", "default", "expected"),
    [
        ({"bias": 2.0, "layer_1/": 4.0, "": 8.0}, None, [2.0, 4.0, 2.0, 8.0, 2.0, 8.0]),
        ({"layer_1/": 4.0, "bias": 2.0, "": 8.0}, None, [4.0, 4.0, 2.0, 8.0, 2.0, 8.0]),  # the first wins
        ({"layer_1": 4.0}, 1.0, [4.0, 4.0, 4.0, 4.0, 1.0, 1.0]),  # layer_1 is found in layer_10
        ({"layer_1": 4.0, "layer_10/": 2.0}, 1.0, [4.0, 4.0, 4.0, 4.0, 1.0, 1.0]),  # gets nothing: no error
        ({"layer_10/|norm": 4.0}, 1.0, [1.0, 1.0, 4.0, 4.0, 4.0, 4.0]),
        ({r"layer_\d+/kernel$": 4.0}, 1.0, [1.0, 4.0, 1.0, 4.0, 1.0, 1.0]),
        ({"default": 4.0, "": 1.0}, None, "The pattern 'default' matches no leaf"),
    ],
)
def test_the_first_pattern_that_is_found_wins(patterns, default, expected):
    groups = {pattern: sgd(rate) for pattern, rate in patterns.items()}
    tx = ao.partition_by_path(groups, default=None if default is None else sgd(default))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            tx.init(dictionary())
        return
    assert rates(dictionary(), tx) == dict(zip(PATHS, expected, strict=True))


LISTED = ", ".join(PATHS)


@pytest.mark.parametrize("kind", ["dict", "nnx", "equinox"])
def test_what_matches_nothing_is_an_error_that_lists_the_paths(kind):
    params = PARAMETERS[kind]()
    listed = ", ".join(by_path(params))  # of a dataclass in the order of its fields
    assert kind == "equinox" or listed == LISTED
    for tx in (
        ao.partition_by_path({"bias": sgd(1.0), "lyer": sgd(1.0)}, default=sgd(1.0)),
        optax.masked(sgd(1.0), ao.mask_by_path("lyer")),
        ao.adamw(1.0, mask=ao.mask_by_path("lyer")),
    ):
        with pytest.raises(ValueError) as raised:
            tx.init(params)
        assert str(raised.value) == f"The pattern 'lyer' matches no leaf; the leaves are {listed}."
    with pytest.raises(
        ValueError, match="^No pattern of 'layer', 'scale' matches norm/bias; pass a default= to"
    ):
        ao.partition_by_path({"layer": sgd(1.0), "scale": sgd(1.0)}).init(params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ({},),
            r"transformations must be a mapping \{pattern: transformation\} with at least one entry, "
            r"got \{\}",
        ),
        ((sgd(1.0),), "transformations must be a mapping .* got GradientTransformation"),
        (
            ({"(": sgd(1.0)},),
            r"The patterns of transformations must be regular expressions, got '\(': missing",
        ),
        (
            ({0: sgd(1.0)},),
            "The patterns of transformations must be regular expressions, got 0, which is not a str",
        ),
        (
            ({"a": ao.sgd},),
            "The transformation of 'a' must be an optax.GradientTransformation, got <function",
        ),
        (({"a": 0.1},), "The transformation of 'a' must be an optax.GradientTransformation, got 0.1"),
        (({"a": sgd(1.0)}, 0.1), "default must be an optax.GradientTransformation, got 0.1"),
        (
            ({"default": sgd(1.0)}, sgd(1.0)),
            r"The pattern 'default' is reserved for default=; write .* '\(default\)'",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ao.partition_by_path(*arguments)


@pytest.mark.parametrize("pattern", ["[", None, b"kernel"])
def test_a_mask_of_no_regular_expression_is_refused(pattern):
    with pytest.raises(ValueError, match="^pattern must be a regular expression, got "):
        ao.mask_by_path(pattern)


def steps(tx, params, count=3):
    """The parameters and the state after some steps of a quadratic loss."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda x: 2 * x + 1, params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=count)[0]

    return run(params)


def test_each_group_goes_as_it_would_alone_also_in_a_chain():
    schedule = ao.exponential_decay(0.1, 2, 0.5)
    groups = {"^norm": ao.rmsprop(0.5), "bias$": ao.adamw(schedule, weight_decay=0.5)}
    default = ao.sgd(0.01, momentum=0.5)
    tx = optax.chain(optax.scale(0.5), ao.partition_by_path(groups, default=default))
    params, _ = steps(tx, dictionary())
    together, start = by_path(params), by_path(dictionary())
    parts = {
        groups["^norm"]: ["norm/bias", "norm/scale"],
        groups["bias$"]: ["layer_1/bias", "layer_10/bias"],
        default: ["layer_1/kernel", "layer_10/kernel"],
    }
    for inner, paths in parts.items():
        alone, _ = steps(optax.chain(optax.scale(0.5), inner), {path: start[path] for path in paths})
        for path in paths:
            np.testing.assert_allclose(together[path], alone[path], rtol=1e-6, err_msg=path)


def test_layer_wise_decay_of_the_rate():
    params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(12)} | {"head": jnp.ones(2)}
    layers = {rf"^layer_{i}/": sgd(0.8 ** (12 - i)) for i in range(12)}
    moved = rates(params, ao.partition_by_path(layers, default=sgd(1.0)))
    expected = {f"layer_{i}/kernel": 0.8 ** (12 - i) for i in range(12)} | {"head": 1.0}
    assert moved == pytest.approx(expected, rel=1e-6)


def test_hyperparameters_are_read_and_set_by_pattern():
    tx = ao.partition_by_path({"^norm": ao.adamw(0.1), "layer_1/": ao.sgd(0.2)}, default=ao.sgd(0.3))
    state = optax.chain(ao.clip_by_global_norm(1.0), tx).init(dictionary())
    values = ao.get_hyperparams(state)
    learning_rates = {key: float(x) for key, x in values.items() if key.endswith("learning_rate")}
    assert learning_rates == pytest.approx(
        {"^norm/learning_rate": 0.1, "layer_1//learning_rate": 0.2, "default/learning_rate": 0.3}
    )
    assert {"b1", "b2", "eps", "weight_decay"} == values.keys() - learning_rates.keys()  # which occur once
    state = tx.init(dictionary())
    state = ao.set_hyperparams(state, **{"^norm/learning_rate": 0.0, "layer_1//learning_rate": 0.5})
    grads = jax.tree.map(jnp.ones_like, dictionary())
    updates, _ = tx.update(grads, state, dictionary())
    updates = by_path(updates)
    assert {path: float(np.ravel(u)[0]) for path, u in updates.items()} == pytest.approx(
        dict(zip(PATHS, [-0.5, -0.5, -0.3, -0.3, 0.0, 0.0], strict=True))
    )


def test_extra_arguments_go_to_every_group():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append((float(value), sorted(extra_args)))
        return updates, state

    needs_value = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = ao.partition_by_path({"bias": needs_value, "kernel": ao.sgd(1.0)}, default=needs_value)
    tx.update(dictionary(), tx.init(dictionary()), dictionary(), value=3.0, other=1)
    assert seen == [(3.0, ["other"])] * 2


def test_hidden_leaves_are_no_one_s_but_patterns_find_them():
    params = {"body": jnp.ones(2), "head": jnp.ones(2), "none": None, "masked": optax.MaskedNode()}
    tx = ao.partition_by_path({"body": sgd(1.0), "head": sgd(2.0), "none|masked": sgd(4.0)})
    updates, _ = tx.update(params, tx.init(params))
    assert updates["none"] is None and isinstance(updates["masked"], optax.MaskedNode)
    assert rates(params, tx) == {"body": 1.0, "head": 2.0}
    masked = optax.masked(tx, {"body": True, "head": False, "none": None, "masked": optax.MaskedNode()})
    assert rates(params, masked) == {"body": 1.0, "head": -1.0}  # optax.masked lets the hidden ones through
    nested = ao.partition_by_path({"body|none": tx, "head|masked": tx})
    assert rates(params, nested) == {"body": 1.0, "head": 2.0}
    assert ao.partition_by_path({"body": sgd(1.0)}).init({}) is not None  # nothing to match, nothing missing


def test_parameters_in_other_containers_than_the_gradients():
    tx = ao.partition_by_path({"bias": ao.adamw(0.5)}, default=ao.adamw(0.25))
    gradients, params = dictionary(), equinox_model()  # whose leaves come in another order
    state = tx.init(gradients)
    expected, _ = jax.jit(tx.update)(gradients, state, gradients)
    updates, _ = jax.jit(tx.update)(gradients, state, params)
    same(updates, expected)
    with pytest.raises(
        ValueError, match="^partition_by_path: the leaf 'norm/bias' of updates is not in params"
    ):
        tx.update(gradients, state, gradients | {"norm": {"scale": jnp.ones(4)}})


class Attention(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array | None = None


def test_a_field_named_value_keeps_its_name_in_every_part():
    # An nnx Variable has a child of that name, and no other, which is left out of the path.
    params = {"attention": Attention(*(jnp.ones(2) for _ in range(3)))}
    paths = []

    def label(path, leaf):
        paths.append(path)
        return path

    groups = {"value$": ao.scale_by_rms(granularity=ao.Labels(label)), "query|key": sgd(1.0)}
    ao.partition_by_path(groups).init(params)
    assert set(paths) == {"attention/value"}


@pytest.mark.parametrize("through", [through_bytes, through_orbax], ids=["flax", "orbax"])
def test_a_restored_state_goes_on_bit_for_bit(through, tmp_path):
    patterns = {r"^layer_\d+/kernel$": ao.adamw(0.1), "(^|/)bias$": ao.sgd(0.1, momentum=0.9)}
    tx = ao.partition_by_path(patterns, default=ao.rmsprop(0.1))
    params, state = steps(tx, dictionary())
    restored = through(state, jax.tree.map(jnp.zeros_like, state), tmp_path)
    same(restored, state)
    same(tx.update(params, restored, params), tx.update(params, state, params))


def test_it_survives_copies_and_wrapping():
    tx = ao.partition_by_path({"bias": sgd(1.0)}, default=sgd(2.0))
    described = ao.describe_partition(tx, dictionary())
    assert ao.describe_partition(copy.copy(tx), dictionary()) == described
    assert ao.describe_partition(tx._replace(init=tx.init), dictionary()) == described


# --- Training with nnx --------------------------------------------------------------------------------------

INPUTS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def test_nnx_optimizer_trains_as_linen_does():
    tx = ao.partition_by_path(
        {"^layer_1/": ao.adamw(0.01, mask=ao.decay_mask), "bias$": ao.sgd(0.1, momentum=0.9)},
        default=optax.masked(ao.adamw(0.1, mask=ao.mask_by_path("kernel")), ao.mask_by_path("kernel")),
    )
    model = NnxModel(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def nnx_step(model, optimizer):
        traces.append(1)
        grads = nnx.grad(lambda model: jnp.mean(model(INPUTS) ** 2))(model)
        optimizer.update(model, grads)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(LinenModel().apply({"params": p}, INPUTS) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rate in (0.01, 0.02):
        nnx_step(model, optimizer)
        params, state = step(params, state)
        assert float(ao.get_hyperparams(optimizer.opt_state)["^layer_1//learning_rate"]) == jnp.float32(rate)
        optimizer.opt_state = ao.set_hyperparams(optimizer.opt_state, **{"^layer_1//learning_rate": 0.02})
        state = ao.set_hyperparams(state, **{"^layer_1//learning_rate": 0.02})
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), trained, params)
    assert len(traces) == 1


# --- Masks --------------------------------------------------------------------------------------------------


@each_kind
def test_masks_are_the_same_for_all_kinds_of_parameters(kind):
    params = PARAMETERS[kind]()
    for mask, true in (
        (ao.mask_by_path("^layer_1/"), {"layer_1/bias", "layer_1/kernel"}),
        (ao.mask_by_path("^(?!.*bias)"), {"layer_1/kernel", "layer_10/kernel", "norm/scale"}),
        (ao.mask_by_path("rm/"), {"norm/bias", "norm/scale"}),
        (ao.decay_mask, {"layer_1/kernel", "layer_10/kernel"}),
    ):
        tree = mask(params)
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        values = by_path(tree)
        assert all(type(value) is bool for value in values.values())
        assert {path for path, value in values.items() if value} == true


@pytest.mark.parametrize("kind", ["dict", "nnx", "nnx, unwrapped", "equinox"])
def test_what_is_masked_does_not_decay(kind):
    params = jax.tree.map(jnp.ones_like, PARAMETERS[kind]())
    tx = ao.adamw(0.5, weight_decay=0.5, mask=ao.decay_mask)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decays = {path: -float(np.ravel(u)[0]) for path, u in by_path(updates).items()}
    assert decays == {path: 0.25 if path.endswith("kernel") else 0.0 for path in PATHS}


def test_what_usually_decays_by_name_and_axes():
    params = {
        "attention": {"query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))}},  # of two axes
        "stacked": {"norm": {"scale": jnp.ones((3, 4))}},
        "weight": jnp.ones(4),  # of a norm in equinox
        "scale_up": jnp.ones((2, 2)),
        "temperature": jnp.ones(()),
        "none": None,
    }
    decaying = {path for path, decays in by_path(ao.decay_mask(params)).items() if decays}
    assert decaying == {"attention/query/kernel", "scale_up"}


def scanned_nnx():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layers(rngs):
        return nnx.List([nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])

    return nnx.state(layers(nnx.Rngs(0)), nnx.Param)


def scanned_equinox():
    def layer(key):
        linear = eqx.nn.Linear(4, 4, key=key)
        return [eqx.nn.LayerNorm(4), eqx.nn.RMSNorm(4), linear, eqx.nn.WeightNorm(linear), {"g": jnp.ones(4)}]

    return eqx.filter(eqx.filter_vmap(layer)(jax.random.split(jax.random.key(0), 3)), eqx.is_inexact_array)


def scanned_linen():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(nn.RMSNorm()(x)), None

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return stack().init(jax.random.key(0), jnp.ones(4), None)["params"]


HAIKU = {
    "layers/~/layer_norm": {"offset": jnp.ones((3, 4)), "scale": jnp.ones((3, 4))},
    "layers/~/linear": {"b": jnp.ones((3, 4)), "w": jnp.ones((3, 4, 4))},
}
TORCH = {
    "layers": {
        "ln_1": {"weight": jnp.ones((3, 4))},
        "attention_norm": {"weight": jnp.ones((3, 4))},
        "norms": [{"weight": jnp.ones((3, 4))}],
        "attention": {"in_proj_weight": jnp.ones((3, 4, 4)), "in_proj_bias": jnp.ones((3, 4))},
        "normalised_linear": {"weights": jnp.ones((3, 4, 4))},
    }
}
STACKED = {
    "nnx": (scanned_nnx, 0, {"1/kernel"}),
    "equinox": (scanned_equinox, 1, {"2/weight", "3/layer/weight", "3/g"}),  # g has two axes, one of length 1
    "linen": (scanned_linen, 0, {"Dense_0/kernel"}),
    "haiku": (lambda: HAIKU, 0, {"layers/~/linear/w"}),
    "torch": (
        lambda: TORCH,
        {"^layers/": 1},
        {"layers/attention/in_proj_weight", "layers/normalised_linear/weights"},
    ),
}


@pytest.mark.parametrize("library", STACKED)
def test_biases_and_norms_of_stacked_layers_do_not_decay(library):
    make, stacked, expected = STACKED[library]
    params = make()
    for tree in (ao.decay_mask(params, stacked=stacked), ao.decay_mask(stacked=stacked)(params)):
        assert {path for path, decays in by_path(tree).items() if decays} == expected


def test_stacks_are_by_pattern_or_for_all():
    params = {"layers": {"gate": jnp.ones((3, 4)), "w": jnp.ones((3, 4, 4))}, "head": jnp.ones((4, 4))}

    def decaying(**stacked):
        return {path for path, decays in by_path(ao.decay_mask(params, **stacked)).items() if decays}

    assert decaying() == {"layers/gate", "layers/w", "head"}
    assert decaying(stacked=1) == {"layers/w"}
    assert decaying(stacked={"^layers/": 1}) == {"layers/w", "head"}
    with pytest.raises(ValueError, match="'^blocks' matches no leaf".replace("^", r"\^")):
        decaying(stacked={"^blocks": 1})
    for wrong in (-1, 1.5, True, {"head": -1}):
        with pytest.raises(ValueError, match="stacked must be an integer in"):
            ao.decay_mask(stacked=wrong)
    with pytest.raises(ValueError, match="patterns of stacked must be regular expressions"):
        ao.decay_mask(stacked={"(": 1})


def test_masks_of_parts():
    params = {"head": jnp.ones((2, 2)), "body": optax.MaskedNode(), "none": None}
    assert ao.mask_by_path("body|none")(params) == params | {"head": False}
    assert ao.decay_mask(params) == params | {"head": True}


# --- Tables -------------------------------------------------------------------------------------------------

TABLE = """\
group              leaves  parameters  shape
^layer_1/               2          16
  layer_1/bias                      4  (4,)
  layer_1/kernel                   12  (3, 4)
bias$                   2           6
  layer_10/bias                     2  (2,)
  norm/bias                         4  (4,)
layer_1/kernel          0           0
(default)               2          12
  layer_10/kernel                   8  (4, 2)
  norm/scale                        4  (4,)
total                   6          34"""


@pytest.mark.parametrize("kind", ["dict", "linen", "nnx", "nnx, unwrapped", "abstract"])
def test_a_partition_is_described(kind):
    groups = {"^layer_1/": sgd(1.0), "bias$": sgd(1.0), "layer_1/kernel": sgd(1.0)}
    tx = ao.partition_by_path(groups, default=sgd(1.0))
    assert ao.describe_partition(tx, PARAMETERS[kind]()) == TABLE


def test_large_numbers_and_scalars_are_described():
    params = {
        "temperature": jnp.ones(()),
        "w": jax.ShapeDtypeStruct((50_000, 1024), jnp.bfloat16),
        "none": None,
    }
    tx = ao.partition_by_path({"default": sgd(1.0), "": sgd(1.0)})
    described = ao.describe_partition(tx, params | {"default": jnp.ones(1)})
    assert described == (
        "group          leaves  parameters  shape\n"
        "default             1           1\n"
        "  default                       1  (1,)\n"
        "                    2  51,200,001\n"
        "  temperature                   1  ()\n"
        "  w                    51,200,000  (50000, 1024)\n"
        "total               3  51,200,002"
    )


@pytest.mark.parametrize(
    "tx",
    [
        sgd(1.0),
        optax.chain(ao.partition_by_path({"": sgd(1.0)})),
        optax.partition({"a": sgd(1.0)}, {"b": "a"}),
        None,
    ],
    ids=["sgd", "chain", "optax", "None"],
)
def test_what_is_no_partition_is_not_described(tx):
    with pytest.raises(ValueError, match="^tx must be a result of partition_by_path or freeze, got "):
        ao.describe_partition(tx, dictionary())


def test_a_partition_that_does_not_fit_is_not_described():
    with pytest.raises(ValueError, match="The pattern 'tail' matches no leaf"):
        ao.describe_partition(ao.partition_by_path({"tail": sgd(1.0)}, sgd(1.0)), dictionary())
    with pytest.raises(ValueError, match="No pattern of 'layer' matches norm/bias, norm/scale"):
        ao.describe_partition(ao.partition_by_path({"layer": sgd(1.0)}), dictionary())


COLLIDING = {"a/b": jnp.ones(2), "a": {"b": jnp.full(2, 2.0)}}
MIXED_UP = {
    "frozen": lambda: ao.freeze(ao.sgd(1.0), lambda p: jax.tree.map(lambda x: False, p)),
    "mask": lambda: ao.adamw(1.0, mask={"a/b": True, "a": {"b": False}}),
    "prefix": lambda: ao.adamw(1.0, mask={"a/b": True, "a": False}),
    "groups": lambda: ao.partition_by_path({"a": ao.sgd(1.0)}),
}


@pytest.mark.parametrize("name", MIXED_UP)
def test_leaves_whose_paths_are_the_same_are_refused(name):
    tx = MIXED_UP[name]()
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'; rename a key"):
        tx.update(COLLIDING, tx.init(COLLIDING), COLLIDING)

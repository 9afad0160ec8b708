"""Adam-mini: its blocks against the paper's, in linen and nnx, and half the state of AdamW."""

import copy
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference.adam_mini import AdamMiniReference
from saving import same, spec
from tolerances import REFERENCE

import adaptive_optax as ao

VOCABULARY, FEATURES, HEADS = 48, 64, 4


class LinenTransformer(nn.Module):
    """One block, with the same paths as `NnxTransformer`."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, FEATURES, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm(name="norm")(x))
        x = x + nn.Dense(FEATURES, name="mlp_out")(nn.gelu(nn.Dense(4 * FEATURES, name="mlp_in")(x)))
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(x)


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.mlp_in = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)
        self.lm_head = nnx.Linear(FEATURES, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        x = x + self.mlp_out(nnx.gelu(self.mlp_in(x)))
        return self.lm_head(x)


TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 6))


@functools.cache
def linen_params():
    return jax.jit(LinenTransformer().init)(jax.random.key(0), TOKENS)["params"]


@functools.cache
def nnx_params():
    return nnx.state(NnxTransformer(nnx.Rngs(0)), nnx.Param)


PARAMETERS = {"linen": linen_params, "nnx": nnx_params}
each_flax = pytest.mark.parametrize("flax", PARAMETERS)

# One value a ...
SHAPES = {
    "attention/key/bias": (HEADS, 16),
    "attention/key/kernel": (1, HEADS, 1),  # head
    "attention/out/bias": (FEATURES,),
    "attention/out/kernel": (1, 1, FEATURES),  # output neuron
    "attention/query/bias": (HEADS, 16),
    "attention/query/kernel": (1, HEADS, 1),
    "attention/value/bias": (HEADS, 16),
    "attention/value/kernel": (1, HEADS, 16),  # output neuron
    "embed/embedding": (VOCABULARY, 1),  # token
    "lm_head/kernel": (1, VOCABULARY),  # token
    "mlp_in/bias": (4 * FEATURES,),
    "mlp_in/kernel": (1, 4 * FEATURES),
    "mlp_out/bias": (FEATURES,),
    "mlp_out/kernel": (1, FEATURES),
    "norm/bias": (FEATURES,),
    "norm/scale": (),  # tensor
}


def flat(tree):
    """A tree as a dict from paths, for trees that are plain dicts inside."""
    return {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.State(tree))}


def shapes(tree):
    return {path: x.shape for path, x in flat(nnx.to_pure_dict(nnx.State(tree))).items()}


@each_flax
def test_the_blocks_of_flax_s_layers(flax):
    assert shapes(ao.adam_mini(1e-3).init(PARAMETERS[flax]())[0].nu) == SHAPES


@each_flax
def test_the_state_is_half_of_adamw_s(flax):
    params = PARAMETERS[flax]()
    state, full = ao.adam_mini(1e-3).init(params), ao.adamw(1e-3).init(params)
    # The first moment is all of one half; a value a block is 1/64 or less of each matrix in the other half.
    assert 0.5 < ao.state_bytes(state) / ao.state_bytes(full) < 0.52
    assert ao.state_bytes(state[0].mu) == ao.state_bytes(full[0].mu)


# --- Against the paper --------------------------------------------------------------------------------------

KINDS = {
    "attention/key/bias": "bias",
    "attention/key/kernel": "key",
    "attention/out/bias": "bias",
    "attention/out/kernel": "projection",
    "attention/query/bias": "bias",
    "attention/query/kernel": "query",
    "attention/value/bias": "bias",
    "attention/value/kernel": "value",
    "embed/embedding": "embedding",
    "lm_head/kernel": "dense",
    "mlp/bias": "bias",
    "mlp/kernel": "dense",
    "norm/scale": "other",
}
SMALL = {
    "attention/key/bias": (2, 3),
    "attention/key/kernel": (4, 2, 3),
    "attention/out/bias": (4,),
    "attention/out/kernel": (2, 3, 4),
    "attention/query/bias": (2, 3),
    "attention/query/kernel": (4, 2, 3),
    "attention/value/bias": (2, 3),
    "attention/value/kernel": (4, 2, 3),
    "embed/embedding": (7, 4),
    "lm_head/kernel": (4, 7),
    "mlp/bias": (5,),
    "mlp/kernel": (4, 5),
    "norm/scale": (4,),
}
STEPS = 60


def draws(steps):
    """Gradients whose coordinates differ in scale by two decades and wane and wax in time."""
    rng = np.random.default_rng(5)
    waves = 10 ** np.sin(np.arange(steps) / 9)
    scales = {path: 10 ** rng.uniform(-3, 0, shape) for path, shape in SMALL.items()}
    return {
        path: np.float32(
            waves.reshape(-1, *[1] * len(shape)) * scales[path] * rng.normal(size=(steps, *shape))
        )
        for path, shape in SMALL.items()
    }


def nested(tree):
    """A flat dict from paths as nested dicts."""
    return nnx.to_pure_dict(nnx.from_flat_state([(tuple(path.split("/")), x) for path, x in tree.items()]))


def trained(tx, params, grads):
    """The parameters after each step."""

    @jax.jit
    def scan(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return scan(params, grads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_the_paper_s(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    grads = draws(STEPS)
    params = {path: np.float32(np.random.default_rng(6).normal(size=shape)) for path, shape in SMALL.items()}
    settings = {"b1": 0.875, "b2": 0.96875, "eps": 2**-20, "weight_decay": 0.125}
    tx = ao.adam_mini(2**-6, **settings)
    to_arrays = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    result = flat(trained(tx, to_arrays(nested(params)), to_arrays(nested(grads))))
    reference = AdamMiniReference(params, KINDS, lr=2**-6, **settings)
    for t in range(STEPS):
        expected = reference.step({path: g[t] for path, g in grads.items()})
        for path, value in expected.items():
            # A parameter is a signed sum: its rounding error is relative to the largest of its terms.
            tolerance = REFERENCE[dtype] * np.abs(params[path]).max()
            np.testing.assert_allclose(
                result[path][t], value, rtol=REFERENCE[dtype], atol=tolerance, err_msg=path
            )


def test_it_is_a_chain_of_visible_parts():
    params, grads = nested({p: np.ones(s, np.float32) for p, s in SMALL.items()}), nested(draws(5))
    chain = optax.chain(
        ao.scale_by_adam(granularity=ao.AdamMiniBlocks()),
        ao.add_decoupled_weight_decay(0.1, mask=ao.decay_mask),
        ao.scale_by_learning_rate(0.01),
    )
    ours = ao.adam_mini(0.01, weight_decay=0.1, mask=ao.decay_mask)
    same(trained(ours, params, grads), trained(chain, params, grads))
    assert spec(ours.init(params)) == spec(chain.init(params))


# --- Layouts ------------------------------------------------------------------------------------------------


def nu_of(params, layout=None):
    return ao.scale_by_rms(granularity=ao.AdamMiniBlocks(layout)).init(params).nu


QUERY = {"query": {"kernel": jnp.ones((6, 2, 3))}}


def test_layers_stacked_along_a_leading_axis_keep_their_values_apart():
    params = nested({path: jnp.ones(shape) for path, shape in SMALL.items()})
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 5), params)
    alone = shapes(nu_of(params))
    for path, shape in shapes(nu_of(stacked)).items():
        assert shape == (() if path == "norm/scale" else (5, *alone[path])), path


def test_dense_layers_named_as_those_of_attention():
    params = QUERY | {"value": {"kernel": jnp.ones((6, 1))}, "out": {"kernel": jnp.ones((6, 9))}}
    nu = nu_of(params)
    assert nu["value"]["kernel"].shape == (1, 1) and nu["out"]["kernel"].shape == (1, 9)


def test_a_layout_of_ones_own():
    params = {
        "q_proj": jnp.ones((6, 2, 3)),
        "norm": jnp.ones(6),
        "wte": jnp.ones((9, 6)),
        "w1": jnp.ones((6, 4)),
        "b1": jnp.ones(4),
        "temperature": jnp.ones(3),
    }
    layout = {
        "_proj$": "query_key",
        "wte": "token",
        "w1": "output_neuron",
        "b1": "coordinate",
        "^t": ao.Axis(0),
    }
    expected = {
        "q_proj": (1, 2, 1),
        "norm": (),
        "wte": (9, 1),
        "w1": (1, 4),
        "b1": (4,),
        "temperature": (1,),
    }
    assert jax.tree.map(jnp.shape, nu_of(params, layout)) == expected
    assert jax.tree.map(jnp.shape, ao.adam_mini(0.1, layout).init(params)[0].nu) == expected
    assert (
        ao.AdamMiniBlocks(layout).template(params)["b1"] is params["b1"]
    )  # whose sharding the state follows
    extended = {"fused/kernel$": "tensor"} | ao.FLAX_LAYOUT
    nu = nu_of(QUERY | {"fused": {"kernel": jnp.ones((6, 9))}}, extended)
    assert nu["fused"]["kernel"].shape == () and nu["query"]["kernel"].shape == (1, 2, 1)
    replaced = ao.FLAX_LAYOUT | {"(^|/)(query|key)/kernel$": "output_neuron"}
    assert nu_of({"query": {"kernel": jnp.ones((6, 6))}}, replaced)["query"]["kernel"].shape == (1, 6)


@pytest.mark.parametrize(
    ("params", "layout", "message"),
    [
        (
            {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
            None,
            r"finds no queries and keys: no leaf matches '\(\^\|/\)\(query\|key\)/kernel\$'; the leaves are "
            r"body/bias, body/kernel\. Set params_layout=",
        ),
        (
            {"query": {"kernel": jnp.ones((6, 6))}},
            None,
            r"'query/kernel' has shape \(6, 6\); the role 'query_key' needs \(features, heads, head_dim\)",
        ),
        (
            QUERY,
            {"fused": "tensor"} | ao.FLAX_LAYOUT,
            "The pattern 'fused' matches no leaf; the leaves are query",
        ),
    ],
)
def test_what_the_layout_does_not_fit_is_refused(params, layout, message):
    with pytest.raises(ValueError, match=message):
        ao.adam_mini(0.1, layout).init(params)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("kernel", r"params_layout must be a mapping \{pattern: role\}, got 'kernel'"),
        ({"(": "token"}, r"The patterns of params_layout must be regular expressions, got '\('"),
        ({"a": "neuron"}, "The role of 'a' in params_layout must be a granularity or one of 'query_key', "),
        ({"a": 1}, "The role of 'a' .* got 1"),
    ],
)
def test_what_is_no_layout_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        ao.adam_mini(0.1, layout)


# --- As the others ------------------------------------------------------------------------------------------


def test_the_granularity_is_static():
    granularity = ao.AdamMiniBlocks({"a": "token", "b": ao.Axis(0)})
    for other in (copy.deepcopy(granularity), pickle.loads(pickle.dumps(granularity))):
        assert other == granularity and hash(other) == hash(granularity)
    assert ao.AdamMiniBlocks() == ao.AdamMiniBlocks(ao.FLAX_LAYOUT) != granularity
    assert (
        repr(granularity) == "AdamMiniBlocks(layout=(('a', 'token'), ('b', Axis(axes=(0,), reduce='mean'))))"
    )
    with pytest.raises(AttributeError):
        granularity.layout = ()
    with pytest.raises(TypeError):
        ao.FLAX_LAYOUT["a"] = "token"


@pytest.mark.parametrize("storage", ["bfloat16", ao.Int8(min_size=1)], ids=["bfloat16", "int8"])
def test_any_storage_goes_with_it(storage):
    rng = np.random.default_rng(7)
    params = {"query": {"kernel": jnp.zeros((16, 4, 64))}, "mlp": {"kernel": jnp.zeros((64, 128))}}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(6, *x.shape)), jnp.float32), params)
    tx = ao.adam_mini(2**-6, mu_storage=storage, nu_storage=storage)
    for moment in tx.init(params)[0][1:3]:
        assert min(x.dtype.itemsize for x in jax.tree.leaves(moment)) < 4
    exact, stored = (jax.tree.leaves(trained(each, params, grads)) for each in (ao.adam_mini(2**-6), tx))
    differences = np.concatenate([np.ravel(x - y) for x, y in zip(stored, exact, strict=True)])
    # Rounding is unbiased, so it is the average that is close; a code is up to 1/8 off.
    assert 0 < np.abs(differences).max() < 2**-7 and abs(differences.mean()) < 2**-12


def test_leaves_of_every_kind():
    params = QUERY | {
        "dense": {"kernel": jnp.ones((3, 2), jnp.complex64), "bias": jnp.ones(2, jnp.bfloat16)},
        "empty": {"kernel": jnp.ones((0, 2)), "embedding": jnp.ones((0, 0))},
        "masked": optax.MaskedNode(),
        "none": None,
        "scalar": jnp.ones(()),
    }
    tx = ao.adam_mini(0.5, eps=0.0, weight_decay=0.0)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert spec(after) == spec(state)
    # Squares of ones have a mean of one.
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.5, rtol=1e-6), updates)
    assert updates["none"] is None and isinstance(updates["masked"], optax.MaskedNode)


def test_queries_in_another_group_are_found():
    tx = ao.partition_by_path({"^query": ao.adam_mini(0.1)}, default=ao.adam_mini(0.2))
    params = QUERY | {"dense": {"kernel": jnp.ones((6, 2))}}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["query"]["kernel"], -0.1, rtol=1e-3)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.2, rtol=1e-3)


def test_nnx_and_linen_train_alike():
    tx = ao.adam_mini(3e-3, weight_decay=0.1, mask=ao.decay_mask)

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

    model = NnxTransformer(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def nnx_step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: loss(model(TOKENS)))(model)
        optimizer.update(model, grads)
        return value

    @jax.jit
    def step(params, state):
        apply = LinenTransformer().apply
        value, grads = jax.value_and_grad(lambda p: loss(apply({"params": p}, TOKENS)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    nnx_losses, losses = [], []
    for _ in range(5):
        nnx_losses.append(float(nnx_step(model, optimizer)))
        params, state, value = step(params, state)
        losses.append(float(value))
    np.testing.assert_allclose(nnx_losses, losses, rtol=1e-3)
    assert losses[-1] < 0.8 * losses[0]

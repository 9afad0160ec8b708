"""PyTorch's names and layouts: which of its parameters a parameter is, and how its array lies there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adaptive_optax as ao
from adaptive_optax.integrations.flax import optimizer_from_state

# In the order of definition, which is that of neither the alphabet nor the paths; all square where possible.
SHAPES = {
    "stem.weight": (4, 3, 2, 5),  # a convolution's (out, in, height, width)
    "stem.bias": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "words.weight": (7, 4),
    "attention.q.weight": (4, 4),
    "attention.k.weight": (4, 4),
    "attention.v.weight": (4, 4),
    "fc1.weight": (4, 4),
    "fc2.weight": (4, 4),
    "fc10.weight": (4, 4),
    "gate": (4,),
}
NAMES = list(SHAPES)
LAYERS = {
    "stem": {"kernel": "stem.weight", "bias": "stem.bias"},
    "norm": {"scale": "norm.weight", "bias": "norm.bias"},
    "words": {"embedding": "words.weight"},
    "attention": {x: {"kernel": f"attention.{x}.weight"} for x in "qkv"},
    **{f"fc{n}": {"kernel": f"fc{n}.weight"} for n in (1, 2, 10)},
    "gate": "gate",
}


def values(name):
    """Other numbers for each parameter."""
    size = int(np.prod(SHAPES[name]))
    return (np.arange(size) + 100.0 * NAMES.index(name) + 1).reshape(SHAPES[name]).astype(np.float32)


def here(kind, name, x):
    """The array as Flax has it, written out."""
    if kind == "kernel":
        return np.einsum("oihw->hwio", x) if x.ndim == 4 else np.einsum("oi->io", x)
    return x


EXPECTED = jax.tree.map_with_path(lambda path, name: here(path[-1].key, name, values(name)), LAYERS)
PARAMS = jax.tree.map(jnp.zeros_like, EXPECTED)


def state_dict(names=NAMES, numbered=True):
    entries = {n: {"exp_avg": values(n), "exp_avg_sq": values(n) ** 2, "step": 7.0} for n in names}
    if numbered:
        entries = dict(enumerate(entries.values()))
    return {"state": entries, "param_groups": [{"params": list(entries)}]}


def assert_expected(state):
    jax.tree.map(np.testing.assert_array_equal, state[0].mu, EXPECTED)
    jax.tree.map(lambda v, x: np.testing.assert_array_equal(v, x**2), state[0].nu, EXPECTED)


TX = ao.adam(0.1)


def test_numbers_are_those_of_the_names():
    assert_expected(ao.from_torch(state_dict(), TX, PARAMS, names=NAMES))
    assert_expected(ao.from_torch(state_dict(NAMES[::-1]), TX, PARAMS, names=NAMES[::-1]))
    assert_expected(ao.from_torch(state_dict(numbered=False), TX, PARAMS))
    named = state_dict()
    named["param_groups"][0]["param_names"] = NAMES
    assert_expected(ao.from_torch(named, TX, PARAMS))


REFUSED = {
    "numbers without names": (
        {},
        "pass names= in that order, [name for name, _ in model.named_parameters()]",
    ),
    "too few names": ({"names": NAMES[:-1]}, "names must name the 12 parameters of the optimizer, got 11"),
    "a name twice": ({"names": [*NAMES[:-1], NAMES[0]]}, "names has 'stem.weight' more than once"),
    "no names": ({"names": "gate"}, "names must be a list of PyTorch's names, got 'gate'"),
    "another name": (
        {"names": [*NAMES[:-1], "door"]},
        "PyTorch's state has no 'gate' for 'gate'; it has 'stem.weight', ",
    ),
    "a path that is none": (
        {"names": NAMES, "mapping": {"gates": "gate"}},
        "mapping has 'gates', but the parameters are attention/k/kernel, ",
    ),
    "a name that is none": (
        {"names": NAMES, "mapping": {"fc1/kernel": "fc3.weight"}},
        "PyTorch's state has no 'fc3.weight' for 'fc1/kernel' (PyTorch calls a kernel \"weight\")",
    ),
    "left over": (
        {"names": NAMES, "mapping": {"fc1/kernel": "fc2.weight"}},
        "'fc1.weight' in PyTorch matches none of the parameters, which are attention/k/kernel, ",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_names_that_do_not_fit_are_refused(kind):
    arguments, sentence = REFUSED[kind]
    for call in (
        lambda: ao.from_torch(state_dict(), TX, PARAMS, **arguments),
        lambda: ao.describe_from_torch(state_dict(), PARAMS, **arguments),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert sentence in str(raised.value)


def test_what_could_be_several_is_refused():
    entry = {"exp_avg": np.ones(2), "exp_avg_sq": np.ones(2), "step": 1}
    both = {"state": {"norm.scale": entry, "norm.weight": entry}}
    with pytest.raises(ValueError, match="'norm/scale' could be 'norm.scale' or 'norm.weight'"):
        ao.from_torch(both, TX, {"norm": {"scale": jnp.ones(2)}})
    one = {"state": {"norm.weight": entry}}
    with pytest.raises(ValueError, match="'norm.weight' in PyTorch could be 'norm/kernel' or 'norm/scale'"):
        ao.from_torch(one, TX, {"norm": {"scale": jnp.ones(2), "kernel": jnp.ones(2)}})


def test_attention_with_an_axis_of_heads_needs_a_layout():
    params = {"query": {"kernel": jnp.zeros((4, 2, 3))}, "key": {"kernel": jnp.zeros((4, 2, 3))}}
    fused = np.arange(48.0).reshape(12, 4)
    state = {"state": {"in_proj_weight": {"exp_avg": fused, "exp_avg_sq": fused, "step": 2}}}
    with pytest.raises(ValueError, match="no 'key.kernel' and no 'key.weight' for 'key/kernel'"):
        ao.from_torch(state, TX, params)
    mapping = {"query/kernel": "in_proj_weight", "key/kernel": "in_proj_weight"}
    with pytest.raises(ValueError, match=r"\(12, 4\) in 'in_proj_weight' but the parameter has shape \(4, 2"):
        ao.from_torch(state, TX, params, mapping=mapping)

    def layout(path, x):
        part = x[:6] if path.startswith("query") else x[6:]
        return part.T.reshape(4, 2, 3)

    got = ao.from_torch(state, TX, params, mapping=mapping, layout=layout)
    np.testing.assert_array_equal(got[0].mu["key"]["kernel"], fused[6:].T.reshape(4, 2, 3))


def test_a_layout_of_some_leaves_the_rest_to_the_rule():
    def layout(path, x):
        return x if path == "fc1/kernel" else None

    state = ao.from_torch(state_dict(), TX, PARAMS, names=NAMES, layout=layout)
    np.testing.assert_array_equal(state[0].mu["fc1"]["kernel"], values("fc1.weight"))
    np.testing.assert_array_equal(state[0].mu["fc2"]["kernel"], values("fc2.weight").T)
    table = ao.describe_from_torch(state_dict(), PARAMS, names=NAMES, layout=layout).splitlines()
    assert [line.split() for line in table if line.startswith("fc")] == [
        ["fc1/kernel", "(4,", "4)", "fc1.weight", "(4,", "4)", "layout="],
        ["fc10/kernel", "(4,", "4)", "fc10.weight", "(4,", "4)", "axes", "moved"],
        ["fc2/kernel", "(4,", "4)", "fc2.weight", "(4,", "4)", "axes", "moved"],
    ]


def test_a_run_of_pytorch_goes_on_here_and_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not a requirement of the tests")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.second = torch.nn.Linear(4, 4)
            self.first = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    def trained(model, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 12).reshape(3, 4) + 0.1 * t
            (model(x) ** 2).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    trained(model, optimizer, range(5))
    names = [name for name, _ in model.named_parameters()]

    def here():
        weights = {name: np.asarray(p.detach()) for name, p in model.named_parameters()}
        return {
            "first": {"kernel": jnp.asarray(weights["first.weight"].T)},
            "second": {
                "kernel": jnp.asarray(weights["second.weight"].T),
                "bias": jnp.asarray(weights["second.bias"]),
            },
        }

    params, tx = here(), ao.adamw(0.01, weight_decay=0.0)
    state = ao.from_torch(optimizer.state_dict(), tx, params, names=names)
    back = ao.to_torch(state, names=names)
    for number, entry in optimizer.state_dict()["state"].items():
        for kind, tensor in entry.items():
            assert torch.equal(back["state"][number][kind], tensor)

    def loss(params, t):
        x = jnp.linspace(-1, 1, 12).reshape(3, 4) + 0.1 * t
        y = jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"] + params["second"]["bias"]
        return jnp.sum(y**2)

    for t in range(5, 10):
        updates, state = tx.update(jax.grad(loss)(params, t), state, params)
        params = optax.apply_updates(params, updates)
    trained(model, optimizer, range(5, 10))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), params, here())


@pytest.mark.parametrize("source", ["optax", "torch", "plain"])
def test_a_converted_state_goes_on_in_nnx(source):
    model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ao.adamw(0.1, nu_storage="bfloat16")
    params = nnx.state(model, nnx.Param)
    if source == "torch":
        weight = {"exp_avg": np.ones((3, 2)), "exp_avg_sq": np.ones((3, 2)), "step": 4}
        bias = {"exp_avg": np.ones(3), "exp_avg_sq": np.ones(3), "step": 4}
        state, count = ao.from_torch({"state": {"weight": weight, "bias": bias}}, tx, params), 4
    else:
        params = nnx.to_pure_dict(params) if source == "plain" else params
        theirs = optax.adamw(0.1)
        _, state = theirs.update(params, theirs.init(params), params)
        state, count = ao.from_optax(state, tx, params), 1
    optimizer = optimizer_from_state(model, tx, state)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2))(model))

    for _ in range(2):
        step(model, optimizer)
    assert int(optimizer.opt_state[0].count[...]) == count + 2
    with pytest.raises(ValueError, match="optimizer_from_state: "):
        optimizer_from_state(model, ao.adam(0.1), state)

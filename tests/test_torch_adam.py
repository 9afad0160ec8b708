"""Adam's state from and to PyTorch: a run that changes libraries ends where one that stays does."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adam_runs import (
    LOW,
    PARAMS,
    PARTS,
    STEPS,
    SWITCH,
    THERE,
    TWO_HERE,
    assert_close,
    counts,
    moments_by_path,
    rate,
    run,
    train,
)
from saving import spec

import adaptive_optax as ao

# --- PyTorch ------------------------------------------------------------------------------------------------


TORCH = json.loads((Path(__file__).parent / "reference" / "adamw_torch.json").read_text())
KINDS = {"adamw": ao.adamw, "adam": ao.adam}
each_kind = pytest.mark.parametrize("kind", KINDS)


def float32(values):
    return np.asarray(values, np.float32)


def torch_state(kind):
    """The recorded state after ten steps, as `optimizer.state_dict()` has it, with NumPy arrays."""
    recorded = TORCH[kind]["state_10"]
    return {"state": {int(n): {k: float32(x) for k, x in entry.items()} for n, entry in recorded.items()}}


def optimizer_like(kind):
    settings = dict(TORCH[kind]["settings"])
    b1, b2 = settings.pop("betas", (0.9, 0.999))
    return KINDS[kind](settings.pop("lr"), b1=b1, b2=b2, **settings)


def swap(path, x):
    """Turns a Linear weight, (out, in), into a Dense kernel, and back."""
    return x.T if x.ndim == 2 else x


def layer(values, transposed):
    """The recorded weight and bias, in PyTorch's order: in a tuple, since a dict's leaves are sorted."""
    pair = float32(values["weight"]), float32(values["bias"])
    return tuple(jnp.asarray(swap("", x) if transposed else x) for x in pair)


def recorded_gradients(transposed):
    for t in range(STEPS):
        yield layer({key: x[t] for key, x in TORCH["gradients"].items()}, transposed)


def test_the_record_says_how_it_was_made():
    assert TORCH["torch"].startswith("2.13.0")
    assert "torch.optim.AdamW" in TORCH["made_with"] and "optimizer.step()" in TORCH["made_with"]


@each_kind
@pytest.mark.parametrize("transposed", [False, True])
def test_from_torch_the_run_goes_on(kind, transposed):
    tx, params = optimizer_like(kind), layer(TORCH[kind]["params_10"], transposed)
    state = ao.from_torch(torch_state(kind), tx, params, layout=swap if transposed else None)
    assert spec(state) == spec(tx.init(params))
    assert [int(x) for x in counts(state)] == [SWITCH]  # numbers need no count
    params, _ = run(tx, params, state, list(recorded_gradients(transposed))[SWITCH:])
    # Measured 5e-7; PyTorch computes its bias corrections in float64.
    assert_close(params, layer(TORCH[kind]["params_20"], transposed), 2e-6)


@each_kind
def test_this_library_takes_pytorchs_twenty_steps(kind):
    tx, params = optimizer_like(kind), layer(TORCH["start"], False)
    gradients = list(recorded_gradients(False))
    params, state = run(tx, params, tx.init(params), gradients[:SWITCH])
    converted = ao.from_torch(torch_state(kind), tx, params)
    # Sums that cancel: relative to the leaf's largest.
    assert_close(converted[0], state[0], 2e-6, atol=1e-7)
    params, _ = run(tx, params, state, gradients[SWITCH:])
    assert_close(params, layer(TORCH[kind]["params_20"], False), 2e-6)


def test_states_keyed_by_name_are_found_by_path():
    numbered = torch_state("adamw")["state"]
    state_dict = {"state": {"dense.weight": numbered[0], "dense.bias": numbered[1]}}
    weight, bias = layer(TORCH["adamw"]["params_10"], True)
    params, tx = {"dense": {"bias": bias, "weight": weight}}, optimizer_like("adamw")
    seen = []

    def layout(path, x):
        seen.append(path)
        return swap(path, x)

    state = ao.from_torch(state_dict, tx, params, layout=layout)
    assert set(seen) == {"dense/weight", "dense/bias"}
    for field, theirs in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        kept = getattr(state[0], field)["dense"]
        np.testing.assert_array_equal(kept["weight"], numbered[0][theirs].T)
        np.testing.assert_array_equal(kept["bias"], numbered[1][theirs])


def test_from_torch_into_int8():
    tx = ao.adam(0.05, nu_storage=ao.Int8(block_size=64, min_size=1))
    params = (jnp.ones((2, 64)),)
    rng = np.random.default_rng(0)
    entry = {"exp_avg": rng.normal(size=(2, 64)), "exp_avg_sq": rng.uniform(0.5, 1, (2, 64)), "step": 3}
    state = ao.from_torch({"state": {0: entry}}, tx, params)
    assert spec(state) == spec(tx.init(params))
    np.testing.assert_allclose(ao.dense(state[0].nu)[0], entry["exp_avg_sq"], rtol=2 ** (40 / 254) - 1)


# --- To PyTorch ---------------------------------------------------------------------------------------------


class Tensor(np.ndarray):
    """Stands for a torch.Tensor."""


def trained_here():
    """AdamW's state and parameters after ten steps, in PyTorch's order and this library's layout."""
    tx, params = optimizer_like("adamw"), layer(TORCH["start"], True)
    params, state = run(tx, params, tx.init(params), list(recorded_gradients(True))[:SWITCH])
    return tx, params, state


def test_to_torch_has_pytorchs_structure_and_values(monkeypatch):
    stand_in = types.ModuleType("torch")
    vars(stand_in).update(
        from_numpy=lambda x: x.view(Tensor), tensor=lambda x: np.asarray(x, np.float32).view(Tensor)
    )
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    tx, params, state = trained_here()
    state_dict = ao.to_torch(state, layout=swap)
    (group,) = state_dict["param_groups"]
    np.testing.assert_allclose(group.pop("lr"), 0.05, rtol=1e-7)
    np.testing.assert_allclose(group.pop("eps"), 1e-6, rtol=1e-7)
    assert group == {"params": [0, 1], "betas": (0.875, 0.96875), "weight_decay": 0.125, "amsgrad": False}
    for number, entry in state_dict["state"].items():
        recorded = TORCH["adamw"]["state_10"][str(number)]
        assert entry.keys() == recorded.keys()
        for key, tensor in entry.items():
            assert type(tensor) is Tensor and tensor.dtype == np.float32
            assert tensor.base.flags.writeable and tensor.shape == np.shape(recorded[key])
            np.testing.assert_allclose(tensor, recorded[key], rtol=2e-6, atol=1e-7)
    back = ao.from_torch(state_dict, tx, params, layout=swap)
    # The sums of the weights are computed from the count, not step by step.
    assert_close(back[0], state[0], 1e-6)
    for field in ("mu", "nu"):
        assert_close(getattr(back[0], field), getattr(state[0], field), 0)


def test_to_torch_of_a_scheduled_8_bit_run_has_the_rate_of_the_last_step(monkeypatch):
    stand_in = types.ModuleType("torch")
    vars(stand_in).update(from_numpy=np.asarray, tensor=np.asarray)
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    _, state = train(LOW["int8"], SWITCH)
    with pytest.raises(ValueError, match="names= in the order of.*the parameters are bias, kernel, scale"):
        ao.to_torch(state)
    names = ["bias", "kernel", "scale"]
    state_dict = ao.to_torch(state, names=names, layout=lambda path, x: x)
    (group,) = state_dict["param_groups"]
    assert group["param_names"] == names
    np.testing.assert_allclose(group["lr"], rate(SWITCH - 1), rtol=1e-6)
    assert group["weight_decay"] == 0 and group["params"] == [0, 1, 2]
    for field, theirs in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        kept = jax.tree.leaves(ao.dense(getattr(state[0], field)))
        for number, x in enumerate(kept):
            np.testing.assert_array_equal(state_dict["state"][number][theirs], x)


def test_to_torch_without_pytorch_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        ao.to_torch(ao.adam(0.1).init(PARAMS))


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not a requirement of the tests"
)
def test_pytorch_goes_on_from_to_torch():
    import torch

    _, params, state = trained_here()
    tensors = [torch.tensor(np.array(swap("", np.asarray(p)))).requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(tensors, lr=1.0)  # the settings come with the state
    optimizer.load_state_dict(ao.to_torch(state, layout=swap))
    for gradients in list(recorded_gradients(False))[SWITCH:]:
        for p, g in zip(tensors, gradients, strict=True):
            p.grad = torch.tensor(np.array(g))
        optimizer.step()
    for p, expected in zip(tensors, layer(TORCH["adamw"]["params_20"], False), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-6)
    # Tensors as PyTorch hands them out are read too.
    tx = optimizer_like("adamw")
    back = ao.from_torch(optimizer.state_dict(), tx, params, layout=swap)
    assert int(back[0].count) == STEPS
    np.testing.assert_array_equal(back[0].mu[1], optimizer.state[tensors[1]]["exp_avg"].numpy())


def without(key):
    def change(state_dict):
        del state_dict["state"][1][key]

    return change


def replaced(number, **entries):
    return lambda state_dict: state_dict["state"][number].update(entries)


# name: (a change of the recorded state, the sentence)
TORCH_REFUSALS = {
    **{
        f"no {kind}": (
            without(kind),
            f"from_torch: the state of '1' has no {kind}, which PyTorch's Adam has; it has ",
        )
        for kind in ("exp_avg", "exp_avg_sq", "step")
    },
    "None": (replaced(1, exp_avg=None), "from_torch: the state of '1' has no exp_avg, which PyTorch's Adam"),
    "no parameter": (
        lambda s: s["state"].pop(1),
        "from_torch: PyTorch's state has no '1' for '1'; it has '0'. Specify its name with "
        "mapping={'1': ...}.",
    ),
    "a third": (
        lambda s: s["state"].update({2: s["state"][1]}),
        "from_torch: state_dict has the numbers [0, 1, 2]",
    ),
    "names and numbers": (
        lambda s: s["state"].update({"weight": s["state"].pop(0)}),
        "from_torch: state_dict['state'] has both numbers and names as keys: [1, 'weight'].",
    ),
    "a key of another kind": (
        lambda s: s["state"].update({2.5: s["state"].pop(0)}),
        "from_torch: state_dict['state'] must have numbers or names as keys, got 2.5.",
    ),
    "no mapping": (lambda s: s["state"].update({1: None}), "the state of '1' must be a mapping, got None."),
    "no mapping of states": (lambda s: s.update(state="abc"), "['state'] must be a mapping, got 'abc'."),
    "another shape": (
        replaced(1, exp_avg=np.zeros(4, np.float32)),
        "exp_avg of '1' has shape (4,) in '1' but the parameter has shape (3,); use layout= to "
        "convert one to the other.",
    ),
    "another shape of the second moment": (
        replaced(0, exp_avg_sq=np.zeros((2, 3), np.float32)),
        "exp_avg_sq of '0' has shape (2, 3) in '0' but the parameter has shape (3, 2); use layout= to",
    ),
    "other steps": (
        replaced(1, step=11.0),
        "from_torch: the step must be the same for all parameters, got {'0': 10, '1': 11}.",
    ),
    **{
        f"step {value!r}": (
            replaced(1, step=value),
            "from_torch: the step of '1' must be an integer in [0, 2147483647], got ",
        )
        for value in (2.7, -1, 2**31, "x", float("nan"), float("inf"), np.ones(1), 1j, True)
    },
    **{
        f"{what} in {kind}": (
            lambda s, kind=kind, x=x: s["state"][1].update(
                {kind: np.where([1, 0, 0], x, s["state"][1][kind])}
            ),
            f"from_torch: '{field}/1' {sentence}, which is impossible for a moment of Adam.",
        )
        for kind, field in (("exp_avg", "mu"), ("exp_avg_sq", "nu"))
        for what, x, sentence in (
            ("NaN", np.nan, "is not finite"),
            ("inf", np.inf, "is not finite"),
            ("1e300", np.float64(1e300), "is beyond float32 (up to 1e+300)"),
            ("1j", 1j, "is complex64 for float32"),
        )
    },
    "a negative second moment": (
        replaced(1, exp_avg_sq=np.array([1, -0.5, 0], np.float32)),
        "from_torch: 'nu/1' is negative (down to -0.5), which is impossible for a moment of Adam.",
    ),
    "integers": (
        replaced(1, exp_avg=np.ones(3, np.int32)),
        "from_torch: 'mu/1' is int32, which is impossible for a moment of Adam.",
    ),
    "moments at step 0": (
        lambda s: [entry.update(step=0) for entry in s["state"].values()],
        "from_torch: 'mu/0' is not zero after 0 steps, which is impossible for a moment of Adam.",
    ),
    "Lion's or Adagrad's": (
        lambda s: s["state"].update({1: {"step": 10.0, "sum": np.ones(3)}}),
        "from_torch: the state of '1' has no exp_avg, which PyTorch's Adam has; it has step, sum.",
    ),
    "SGD's": (
        lambda s: s["state"].update({1: {"momentum_buffer": np.ones(3)}}),
        "from_torch: the state of '1' has no step, which PyTorch's Adam has; it has momentum_buffer.",
    ),
    "Adamax's": (
        lambda s: s["state"].update({1: {"step": 10.0, "exp_avg": np.ones(3), "exp_inf": np.ones(3)}}),
        "from_torch: the state of '1' has no exp_avg_sq, which PyTorch's Adam has",
    ),
    "NAdam's": (
        replaced(1, mu_product=0.5),
        "the state of '1' has 'mu_product', which PyTorch's Adam does not have.",
    ),
    "amsgrad": (
        replaced(0, max_exp_avg_sq=np.zeros((3, 2), np.float32)),
        "from_torch: '0' has AMSGrad's maximum, which PyTorch defines differently from this library.",
    ),
}


@pytest.mark.parametrize("kind", TORCH_REFUSALS)
def test_states_of_pytorch_that_do_not_fit_are_refused(kind):
    change, sentence = TORCH_REFUSALS[kind]
    state_dict = torch_state("adamw")
    change(state_dict)
    with pytest.raises(ValueError) as raised:
        ao.from_torch(state_dict, optimizer_like("adamw"), layer(TORCH["start"], False))
    assert sentence in str(raised.value)


@pytest.mark.parametrize("wrong", [None, 3, [], {}, {"param_groups": []}, THERE], ids=repr)
def test_what_is_no_state_dict_is_refused(wrong):
    with pytest.raises(ValueError, match="state_dict must be the result of optimizer.state_dict.., got a "):
        ao.from_torch(wrong, ao.adam(0.1), PARAMS)


def test_from_torch_into_what_does_not_fit_is_refused():
    params = layer(TORCH["start"], False)
    for tx, match in (
        (ao.sgd(0.1), "from_torch: got 1 Adam states for the 0 of tx"),
        (ao.adam(0.1, granularity="tensor"), "from_torch needs second moments per coordinate"),
        (ao.adam(0.1, amsgrad=True), "from_torch: amsgrad must be the same in the state and in tx"),
    ):
        with pytest.raises(ValueError, match=match):
            ao.from_torch(torch_state("adamw"), tx, params)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("saw_all", [True, False])
def test_pytorchs_state_goes_into_groups_and_beside_frozen_leaves(kind, saw_all):
    names = ["bias", "weight", "scale"]
    numbers = [0, 1, 2] if saw_all or "frozen" not in kind else [0, 2]  # PyTorch has none of what it froze
    entries = {
        i: {"step": 3, "exp_avg": np.full(PARAMS[path].shape, i + 1.0).T, "exp_avg_sq": np.ones(()) * (i + 2)}
        for i, path in enumerate(("bias", "kernel", "scale"))
    }
    for entry in entries.values():
        entry["exp_avg_sq"] = np.broadcast_to(entry["exp_avg_sq"], entry["exp_avg"].shape)
    given = {"state": {i: entries[i] for i in numbers}}
    mapping = {"kernel": "weight", "scale": "scale"}  # at the top of a tree, "weight" could be either's
    ours = moments_by_path(ao.from_torch(given, PARTS[kind](), PARAMS, names=names, mapping=mapping))
    kept = ["bias", "scale"] if "frozen" in kind else ["bias", "kernel", "scale"]
    assert ours.keys() == {(name, path) for name in ("mu", "nu") for path in kept}
    for path in kept:
        number = ("bias", "kernel", "scale").index(path)
        np.testing.assert_array_equal(ours["mu", path], np.full(PARAMS[path].shape, number + 1.0))
        np.testing.assert_array_equal(ours["nu", path], np.full(PARAMS[path].shape, number + 2.0))


def test_the_weights_are_those_of_pytorchs_betas():
    steps, betas = 5, (0.8, 0.99)
    entry = {
        "step": steps,
        "exp_avg": np.full(3, -(1 - 0.8**steps)),
        "exp_avg_sq": np.full(3, 1 - 0.99**steps),
    }
    given = {"state": {0: entry}, "param_groups": [{"params": [0], "betas": betas}]}
    tx, params = ao.adam(0.1), [jnp.ones(3)]
    state = ao.from_torch(given, tx, params)
    np.testing.assert_allclose(state[0].mu_weight, 1 - 0.8**steps, rtol=1e-6)
    np.testing.assert_allclose(state[0].nu_weight, 1 - 0.99**steps, rtol=1e-6)
    updates, _ = tx.update([-jnp.ones(3)], state, params)  # after gradients of -1 only
    np.testing.assert_allclose(updates[0], 0.1, rtol=1e-6)


@pytest.mark.parametrize("betas", [[(0.9, 0.999), (0.8, 0.999)], [(0.9,)], [(1.0, 0.999)], ["ab"], [None]])
def test_betas_that_are_none_or_several_are_refused(betas):
    entry = {"step": 1, "exp_avg": np.zeros(3), "exp_avg_sq": np.zeros(3)}
    groups = [{"params": [i], "betas": given} for i, given in enumerate(betas)]
    given = {"state": {i: entry for i in range(len(betas))}, "param_groups": groups}
    with pytest.raises(ValueError, match="betas must be"):
        ao.from_torch(given, ao.adam(0.1), [jnp.ones(3)] * len(betas))


def test_what_a_group_needs_and_pytorch_has_not_is_named():
    entries = {"bias": {"step": 1, "exp_avg": np.ones(3), "exp_avg_sq": np.ones(3)}}
    with pytest.raises(ValueError, match="PyTorch's state has no 'scale' and no 'weight' for 'scale'"):
        ao.from_torch({"state": entries}, ao.freeze(ao.adam(0.1), "kernel"), PARAMS)
    with pytest.raises(ValueError, match="'head' in PyTorch matches none of the parameters"):
        ao.from_torch(
            {"state": entries | {"head": entries["bias"]}},
            ao.freeze(ao.adam(0.1), "kernel|scale"),
            PARAMS,
        )
    moments = ao.from_optax(optax.adam(0.1).init(PARAMS), ao.freeze(ao.adam(0.1), "kernel"), PARAMS)
    assert moments.inner_state[0].mu["kernel"] == optax.MaskedNode()
    smaller = {"bias": PARAMS["bias"]}
    with pytest.raises(ValueError, match="the leaf 'scale' of params is not in the moment"):
        ao.from_optax(optax.adam(0.1).init(smaller), ao.freeze(ao.adam(0.1), "kernel"), PARAMS)


def test_to_torch_of_what_it_has_not_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    for tx, match in (
        (ao.sgd(0.1), "to_torch: opt_state must hold one state of scale_by_adam, got 0"),
        (TWO_HERE, "to_torch: opt_state must hold one state of scale_by_adam, got 2"),
        (ao.adam(0.1, amsgrad=True), "to_torch: PyTorch defines AMSGrad's maximum differently"),
        (ao.adam(0.1, granularity="tensor"), "to_torch needs second moments per coordinate"),
    ):
        with pytest.raises(ValueError, match=match):
            ao.to_torch(tx.init(PARAMS))

"""Adam's state from and to optax and PyTorch, so that a run can change libraries where it is.

All three keep the same two moving averages; what this library adds, the sums of their weights and the bound,
follows from the count and the decays.
"""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._checks import check_same_tree
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._states import replace_states, states_of, unwrapped
from adaptive_optax.control.hyperparams import InjectHyperparamsState
from adaptive_optax.moments.formats import dense, refilled
from adaptive_optax.transforms.adam import ScaleByAdamState, adam_bound
from adaptive_optax.transforms.learning_rate import ScaleByLearningRateState
from adaptive_optax.transforms.weight_decay import AddDecoupledWeightDecayState

_OPTAX = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)
_SCHEDULED = (
    ScaleByLearningRateState,
    AddDecoupledWeightDecayState,
    InjectHyperparamsState,
    optax.ScaleByScheduleState,
    optax.InjectStatefulHyperparamsState,
)
Layout = Callable[[str, np.ndarray], np.ndarray]


def from_optax(opt_state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """Makes a state of this library's Adam from one of optax's, so that a run goes on with `tx`.

    Args:
        opt_state: The state of `optax.adam`, `adamw`, `amsgrad` or `scale_by_adam`, at any depth of a chain
            or wrapper.
        tx: The transformation that goes on: as many `scale_by_adam` of this library, per coordinate, in any
            storage, as `opt_state` has.
        params: The parameters.

    Returns:
        A state of `tx`, with the moments and the count of `opt_state`; the sums of the weights are those of
        the decays that `tx` starts with, held constant. Schedules go on from the count. Everything else is as
        `tx` initialises it.

    Raises:
        ValueError: If the numbers of Adam states, their counts, their trees or their shapes do not fit.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> params = jnp.ones(2)
        >>> theirs = optax.adamw(1e-3)
        >>> _, state = theirs.update(params, theirs.init(params), params)
        >>> tx = ao.adamw(1e-3, nu_storage="bfloat16")
        >>> updates, state = tx.update(params, ao.from_optax(state, tx, params), params)
        >>> int(state[0].count)
        2
    """
    found = states_of(_OPTAX, opt_state)
    if not found:
        raise ValueError(
            f"from_optax: opt_state must hold a state of optax's Adam, got a {type(opt_state).__name__}."
        )
    kept = [(s.count, s.mu, s.nu, getattr(s, "nu_max", None)) for s in found]
    return _filled("from_optax", tx, params, kept)


def to_optax(opt_state: Any, tx: optax.GradientTransformation | None = None, params: Any = None) -> Any:
    """Makes a state of optax's Adam from one of this library's.

    Args:
        opt_state: A state with `scale_by_adam` per coordinate in it, in any storage.
        tx: The optax transformation that goes on. None stands for the same chain of optax's, with a constant
            learning rate and no mask: `optax.adam` for `adam`, `optax.adamw` for `adamw`.
        params: The parameters, needed with `tx`.

    Returns:
        The state of `tx`, with moments in float32 (in the dtypes of `tx`, where it is given).

    Raises:
        ValueError: If there is no Adam state, `tx` comes without `params`, or the two do not fit.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> params = jnp.ones(2)
        >>> state = ao.to_optax(ao.adam(1e-3).init(params))
        >>> updates, state = optax.adam(1e-3).update(params, state)
    """
    found = states_of(ScaleByAdamState, opt_state)
    if not found:
        raise ValueError(
            f"to_optax: opt_state must hold a state of scale_by_adam, got a {type(opt_state).__name__}."
        )
    for state in found:
        _check_per_coordinate("to_optax", state.mu, state.nu)
    if tx is None:
        kinds = (ScaleByAdamState, ScaleByLearningRateState, AddDecoupledWeightDecayState)
        return replace_states(kinds, opt_state, _as_optax)
    if params is None:
        raise ValueError("to_optax needs params= with tx=, to make the state of tx.")
    target = tx.init(params)
    slots = states_of(_OPTAX, target)
    if len(slots) != len(found):
        raise ValueError(f"to_optax: opt_state has {len(found)} Adam states, that of tx {len(slots)}.")
    states = iter([_as_optax(state) for state in found])

    def fill(slot):
        state = next(states)
        check_same_tree("to_optax", "opt_state", state.mu, "the state of tx", slot.mu)
        if type(state) is not type(slot):
            raise ValueError("to_optax: amsgrad must be the same in opt_state and tx.")
        return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), slot, state)

    target = replace_states(_OPTAX, target, fill)
    return _scheduled_from(target, unwrapped(found[0].count))


def _as_optax(state: Any) -> Any:
    if not isinstance(state, ScaleByAdamState):
        return optax.EmptyState()
    mu, nu = dense(state.mu), dense(state.nu)
    if state.nu_max is None:
        return optax.ScaleByAdamState(state.count, mu, nu)
    return optax.ScaleByAmsgradState(state.count, mu, nu, dense(state.nu_max))


def from_torch(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    *,
    layout: Layout | None = None,
) -> Any:
    """Makes a state of this library's Adam from the `state_dict()` of PyTorch's Adam or AdamW.

    Args:
        state_dict: `optimizer.state_dict()`, with `exp_avg`, `exp_avg_sq` and `step` for each parameter.
            Parameters keyed by number are those of `jax.tree.leaves(params)` in order; parameters keyed by
            name are found by their path, with "." for "/".
        tx: The transformation that goes on, with one `scale_by_adam` per coordinate, in any storage.
        params: The parameters, as arrays of this library's side.
        layout: `layout(path, array) -> array` turns an array from PyTorch's layout to that of `params`, as
            was done with the parameters: a Dense kernel is the transpose of a Linear weight. None leaves all.

    Returns:
        A state of `tx`; see `from_optax`.

    Raises:
        ValueError: If a parameter's state is missing, has another shape, another step than the others, or
            `max_exp_avg_sq` (PyTorch's AMSGrad takes the maximum before the bias correction, this one after).

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, numpy as np
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> moments = {"exp_avg": np.ones((2, 3)), "exp_avg_sq": np.ones((2, 3)), "step": 10.0}
        >>> tx = ao.adamw(1e-3)
        >>> transposed = lambda path, x: x.T
        >>> state = ao.from_torch({"state": {0: moments}}, tx, params, layout=transposed)
        >>> int(state[0].count), state[0].mu["kernel"].shape
        (10, (3, 2))
    """
    if not isinstance(state_dict, Mapping) or "state" not in state_dict:
        raise ValueError(
            f"state_dict must be what optimizer.state_dict() returns, got a {type(state_dict).__name__}."
        )
    kept, steps = state_dict["state"], set()
    by_number = all(isinstance(key, numbers.Integral) for key in kept)
    columns: dict[str, list[Any]] = {"exp_avg": [], "exp_avg_sq": []}
    for index, (path, leaf) in enumerate(paths_and_leaves(params)):
        key = index if by_number else path.replace("/", ".")
        entry = kept.get(key, {})
        if missing := {"exp_avg", "exp_avg_sq", "step"} - entry.keys():
            raise ValueError(f"state_dict has no {min(missing)} for {path!r} (key {key!r}).")
        if "max_exp_avg_sq" in entry:
            raise ValueError("state_dict is AMSGrad's: its maximum is of another quantity than here.")
        steps.add(int(entry["step"]))
        for name, column in columns.items():
            value = _from_tensor(entry[name])
            value = value if layout is None else np.asarray(layout(path, value))
            if value.shape != leaf.shape:
                raise ValueError(
                    f"{name} of {path!r} has shape {value.shape} and the parameter {leaf.shape}; "
                    "layout= turns one into the other."
                )
            column.append(jnp.asarray(value))
    if len(steps) != 1:
        raise ValueError(f"state_dict must have one step for all parameters, got {sorted(steps)}.")
    treedef = jax.tree.structure(params)
    mu, nu = (treedef.unflatten(column) for column in columns.values())
    return _filled("from_torch", tx, params, [(steps.pop(), mu, nu, None)])


def to_torch(opt_state: Any, *, layout: Layout | None = None) -> dict[str, Any]:
    """Makes a `state_dict` that PyTorch's Adam or AdamW loads. Needs PyTorch.

    Args:
        opt_state: A state with one `scale_by_adam` per coordinate in it, in any storage.
        layout: `layout(path, array) -> array` turns an array to PyTorch's layout; the inverse of the one
            that `from_torch` takes.

    Returns:
        `{"state": {number: {"step", "exp_avg", "exp_avg_sq"}}, "param_groups": [...]}`, with tensors and one
        group, its parameters in the order of `jax.tree.leaves`, its settings those of the last step.

    Raises:
        ImportError: If PyTorch is not installed.
        ValueError: If there is not one Adam state, or it is AMSGrad's or not per coordinate.
    """
    torch = importlib.import_module("torch")  # not one of this library's requirements

    found = states_of(ScaleByAdamState, opt_state)
    if len(found) != 1:
        raise ValueError(f"to_torch: opt_state must hold one state of scale_by_adam, got {len(found)}.")
    (state,) = found
    if state.nu_max is not None:
        raise ValueError("to_torch: AMSGrad's maximum is of another quantity in PyTorch.")
    _check_per_coordinate("to_torch", state.mu, state.nu)

    def tensor(path, x):
        x = np.asarray(x) if layout is None else np.asarray(layout(path, np.asarray(x)))
        return torch.from_numpy(np.array(x))

    step = float(unwrapped(state.count))
    leaves = zip(paths_and_leaves(dense(state.mu)), jax.tree.leaves(dense(state.nu)), strict=True)
    kept = {
        index: {"step": torch.tensor(step), "exp_avg": tensor(path, m), "exp_avg_sq": tensor(path, v)}
        for index, ((path, m), v) in enumerate(leaves)
    }
    rates = [s.learning_rate for s in states_of(ScaleByLearningRateState, opt_state)]
    decays = [s.weight_decay for s in states_of(AddDecoupledWeightDecayState, opt_state)]
    group = {
        "params": list(kept),
        "lr": math.prod(float(unwrapped(rate)) for rate in rates),
        "betas": (float(unwrapped(state.b1)), float(unwrapped(state.b2))),
        "eps": float(unwrapped(state.eps)),
        "weight_decay": sum(float(unwrapped(decay)) for decay in decays),
        "amsgrad": False,
    }
    return {"state": kept, "param_groups": [group]}


def _from_tensor(x: Any) -> np.ndarray:
    return x.detach().cpu().float().numpy() if hasattr(x, "detach") else np.asarray(x)


def _check_per_coordinate(owner: str, mu: Any, nu: Any) -> None:
    shapes = [[x.shape for x in jax.tree.leaves(dense(moment))] for moment in (mu, nu)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{owner} needs second moments per coordinate: granularity='coordinate'.")


def _filled(owner: str, tx: optax.GradientTransformation, params: Any, kept: list[Any]) -> Any:
    """A state of `tx` with the counts and moments given for each `scale_by_adam` in it."""
    target = tx.init(params)
    slots = states_of(ScaleByAdamState, target)
    if len(slots) != len(kept):
        raise ValueError(f"{owner}: there are {len(kept)} Adam states to put into {len(slots)} of tx.")
    counts = {int(unwrapped(count)) for count, *_ in kept}
    if len(counts) != 1:
        raise ValueError(f"{owner}: the counts of the Adam states must be alike, got {sorted(counts)}.")
    steps = counts.pop()
    count = jnp.asarray(steps, jnp.int32)
    remaining = iter(kept)

    def fill(slot):
        _, mu, nu, nu_max = next(remaining)
        check_same_tree(owner, "the moment", mu, "params", dense(slot.mu))
        _check_per_coordinate(owner, slot.mu, slot.nu)
        if (nu_max is None) != (slot.nu_max is None):
            raise ValueError(f"{owner}: amsgrad must be the same in the state and in tx.")
        b1, b2 = _as_given(slot.b1), _as_given(slot.b2)

        def scalar(value):
            return jnp.asarray(value, unwrapped(slot.bound_sq).dtype)

        def moment(old, values, role):
            # In the slot's tree, which may be wrapped, and its dtypes.
            like, treedef = jax.tree.flatten(dense(old))
            leaves = [jnp.asarray(x, y.dtype) for x, y in zip(jax.tree.leaves(values), like, strict=True)]
            return refilled(old, treedef.unflatten(leaves), count=count, role=role)

        largest = float(jnp.finfo(jnp.float32).max)
        bound_sq = min(adam_bound(b1, b2, steps, bias_correction=False) ** 2, largest) if steps else 0.0
        return slot._replace(
            count=count,
            mu=moment(slot.mu, mu, "mu"),
            nu=moment(slot.nu, nu, "nu"),
            nu_max=None if nu_max is None else moment(slot.nu_max, nu_max, "nu"),
            mu_weight=scalar(1 - b1**steps),
            nu_weight=scalar(1 - b2**steps),
            bound_sq=scalar(bound_sq),
        )

    target = replace_states(ScaleByAdamState, target, fill)
    return _scheduled_from(target, count)


def _as_given(decay: Any) -> float:
    """The decimal number that was rounded: of 0.999 in float32, 1 - b2 would be 1e-5 off."""
    return float(str(np.asarray(unwrapped(decay))))


def _scheduled_from(opt_state: Any, count: Any) -> Any:
    """The state with its schedules at a step."""

    def at_step(state):
        if not isinstance(state, optax.InjectStatefulHyperparamsState):
            return state._replace(count=count)
        schedules = {
            name: s._replace(count=count) if getattr(s, "_fields", ()) == ("count",) else s
            for name, s in state.hyperparams_states.items()
        }
        return state._replace(count=count, hyperparams_states=schedules)

    for kind in _SCHEDULED:  # one by one: injected hyperparameters hold the others
        opt_state = replace_states(kind, opt_state, at_step)
    return opt_state

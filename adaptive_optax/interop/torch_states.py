"""Converting Adam's state from and to PyTorch, so that a run can switch libraries midway."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.states import states_of, unwrapped
from adaptive_optax._core.trees import OptState, Params
from adaptive_optax.interop.adam_states import AdamMoments, check_per_coordinate, state_with_moments
from adaptive_optax.interop.torch_layout import Layout, Place, places_in
from adaptive_optax.moments.formats import dense
from adaptive_optax.transforms.adam import ScaleByAdamState
from adaptive_optax.transforms.learning_rate import LEARNING_RATE_STATES
from adaptive_optax.transforms.weight_decay import AddDecoupledWeightDecayState

_ENTRIES = ("step", "exp_avg", "exp_avg_sq")


def from_torch(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: Params,
    *,
    names: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> OptState:
    """Converts the `state_dict()` of PyTorch's Adam or AdamW to a state of this library's Adam.

    The path "encoder/0/kernel" corresponds to PyTorch's "encoder.0.weight": "kernel", "scale" and "embedding"
    become "weight", and other names are the same. A kernel that is a "weight" in PyTorch is transposed from
    (out, in, *window) to (*window, in, out); all other arrays are unchanged. The rule is based on names,
    because shapes cannot distinguish a square matrix from its transpose. Print `describe_from_torch` to see
    the assignment.

    Some layers have other layouts, possibly with the same shapes, and need `layout`: transposed convolutions,
    attention with an axis of heads, and a Linear layer after a flattened convolution. PyTorch flattens
    (channels, height, width), Flax (height, width, channels). For C channels of H by W:

    ```python
    def layout(path, x):  # returning None applies the rule
        if path == "head/kernel":
            return x.reshape(-1, C, H, W).transpose(2, 3, 1, 0).reshape(H * W * C, -1)
    ```

    Args:
        state_dict: `optimizer.state_dict()`, with `exp_avg`, `exp_avg_sq` and `step` for each parameter for
            which `tx` has an Adam. Entries for other parameters, such as frozen ones, are optional.
        tx: The transformation that continues the run, with `scale_by_adam` per coordinate and in any storage:
            one, or several in groups.
        params: The parameters in this library's layout.
        names: PyTorch's names, in the order in which the optimizer received its parameters:
            `[name for name, _ in model.named_parameters()]` for `Adam(model.parameters())`; with several
            parameter groups, one group after the other. Needed if the state is keyed by number, unless the
            optimizer was created with `model.named_parameters()` or `params` is a list, a tuple or a single
            array.
        mapping: `{path: name}` for parameters with a different name in PyTorch. Two paths may have the same
            name, for example that of a fused projection from which `layout` takes parts.
        layout: `layout(path, array) -> array` converts an array from PyTorch's layout to that of `params`, as
            you did with the parameters; if it returns None, the rule above applies.

    Returns:
        A state of `tx`; see `from_optax`, also for `nnx.Optimizer`. The sums of weights are computed with the
        betas in `state_dict`, if it has them.

    Raises:
        ValueError: If the state is keyed by number and `names` is missing; if a parameter has no state, or
            several candidates, or a state has no parameter; if an entry is not a state of Adam (but of
            another optimizer, or of AMSGrad, whose maximum PyTorch takes before bias correction), or has a
            wrong shape, a different step than the others, or an impossible value: NaN, infinite, too large
            for the dtype, or negative in the second moment. Complex parameters are not supported, because
            PyTorch has two second moments for each.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, numpy as np
        >>> params = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}}
        >>> weight = {"exp_avg": np.ones((2, 3)), "exp_avg_sq": np.ones((2, 3)), "step": 10.0}
        >>> bias = {"exp_avg": np.zeros(2), "exp_avg_sq": np.ones(2), "step": 10.0}
        >>> names = ["dense.weight", "dense.bias"]
        >>> state = ao.from_torch({"state": {0: weight, 1: bias}}, ao.adamw(1e-3), params, names=names)
        >>> int(state[0].count), state[0].mu["dense"]["kernel"].shape
        (10, (3, 2))
    """
    owner = "from_torch"
    entries = _entries(owner, state_dict, params, names)
    for name, entry in entries.items():
        _check_entry(owner, name, entry)
    trained = _trained(tx, params)
    places = places_in(owner, trained, entries, mapping)
    moments: dict[str, list[Any]] = {"exp_avg": [], "exp_avg_sq": []}
    for path, leaf in paths_and_leaves(trained):
        place = places[path]
        for kind, column in moments.items():
            value = _array(entries[place.name][kind])
            column.append(_moved(f"{owner}: {kind} of {path!r}", path, place, value, np.shape(leaf), layout))
    steps = {name: _step(owner, name, entries[name]["step"]) for name in entries}
    if len(set(steps.values())) > 1:
        raise ValueError(f"{owner}: the step must be the same for all parameters, got {steps}.")
    count = max(steps.values(), default=0)
    treedef = jax.tree.structure(trained)
    mu, nu = (treedef.unflatten(column) for column in moments.values())
    return state_with_moments(
        owner, tx, params, [AdamMoments(count, mu, nu, decays=_betas(owner, state_dict))]
    )


def describe_from_torch(
    state_dict: Mapping[str, Any],
    params: Params,
    *,
    names: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> str:
    """Returns a table that shows how `from_torch` matches PyTorch's parameters.

    Args:
        state_dict: As in `from_torch`.
        params: As in `from_torch`.
        names: As in `from_torch`.
        mapping: As in `from_torch`.
        layout: As in `from_torch`.

    Returns:
        For each parameter its path and shape, PyTorch's name and shape, and what is done with the array.

    Raises:
        ValueError: As in `from_torch`, for names and shapes.

    Examples:
        >>> import adaptive_optax as ao, numpy as np
        >>> params = {"norm": {"scale": np.ones(2)}, "out": {"kernel": np.ones((3, 2))}}
        >>> shapes = {"out.weight": (2, 3), "norm.weight": (2,)}
        >>> state = {}
        >>> for name, shape in shapes.items():
        ...     state[name] = {"exp_avg": np.ones(shape), "exp_avg_sq": np.ones(shape), "step": 1}
        >>> print(ao.describe_from_torch({"state": state}, params))
        parameter   shape   PyTorch      shape   array
        norm/scale  (2,)    norm.weight  (2,)    as it is
        out/kernel  (3, 2)  out.weight   (2, 3)  axes moved
    """
    owner = "describe_from_torch"
    entries = _entries(owner, state_dict, params, names)
    for name, entry in entries.items():
        _check_entry(owner, name, entry)
    places = places_in(owner, params, entries, mapping)
    rows = [("parameter", "shape", "PyTorch", "shape", "array")]
    for path, leaf in paths_and_leaves(params):
        place, shape = places[path], np.shape(leaf)
        value = _array(entries[place.name]["exp_avg"])
        _moved(f"{owner}: exp_avg of {path!r}", path, place, value, shape, layout)
        by_layout = layout is not None and layout(path, value) is not None
        how = "layout=" if by_layout else "axes moved" if place.transposed and value.ndim > 1 else "as it is"
        rows.append((path, str(shape), place.name, str(value.shape), how))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _trained(tx: optax.GradientTransformation, params: Any) -> Any:
    """The parameters for which `tx` keeps a first moment; the others are hidden."""

    def moments(params):
        return [dense(state.mu) for state in states_of(ScaleByAdamState, tx.init(params))]

    kept = {path for mu in jax.eval_shape(moments, params) for path, _ in paths_and_leaves(mu)}
    leaves = [x if path in kept or not kept else optax.MaskedNode() for path, x in paths_and_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _entries(owner: str, state_dict: Any, params: Any, names: Any) -> dict[str, Any]:
    """The states of the parameters, keyed by PyTorch's names."""
    if not isinstance(state_dict, Mapping) or "state" not in state_dict:
        raise ValueError(
            "state_dict must be the result of optimizer.state_dict(), got a "
            f"{type(state_dict).__name__}" + (" without 'state'." if isinstance(state_dict, Mapping) else ".")
        )
    kept = state_dict["state"]
    if not isinstance(kept, Mapping):
        raise ValueError(f"{owner}: state_dict['state'] must be a mapping, got {kept!r}.")
    by_number: set[Any] = set(filter(_is_number, kept))
    if strange := [key for key in kept if key not in by_number and not isinstance(key, str)]:
        raise ValueError(
            f"{owner}: state_dict['state'] must have numbers or names as keys, got {strange[0]!r}."
        )
    if by_number and len(by_number) < len(kept):
        raise ValueError(f"{owner}: state_dict['state'] has both numbers and names as keys: {list(kept)}.")
    if not by_number:
        if names is not None and (unknown := sorted(kept.keys() - set(names))):
            raise ValueError(f"{owner}: state_dict has {unknown[0]!r}, which is not in names=.")
        return dict(kept)
    names = _ordered_names(owner, state_dict, params, names)
    if max(by_number) >= len(names) or min(by_number) < 0:
        raise ValueError(
            f"{owner}: state_dict has the numbers {sorted(by_number)}, but names= has {len(names)} names."
        )
    return {names[number]: kept[number] for number in kept}


def _is_number(key: Any) -> bool:
    return isinstance(key, numbers.Integral) and not isinstance(key, bool)


def _ordered_names(owner: str, state_dict: Any, params: Any, names: Any) -> list[str]:
    groups = state_dict.get("param_groups", [])
    is_list = isinstance(groups, Sequence) and all(isinstance(group, Mapping) for group in groups)
    recorded = [name for group in groups for name in group.get("param_names", [])] if is_list else []
    if names is None and recorded:
        names = recorded
    if names is None:
        if not has_an_order(params):
            raise ValueError(
                f"{owner}: the state is keyed by number, in the order of PyTorch's optimizer: pass names= in "
                "that order, [name for name, _ in model.named_parameters()]."
            )
        names = [path for path, _ in paths_and_leaves(params)]
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{owner}: names must be a list of PyTorch's names, got {names!r}.")
    names = list(names)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{owner}: names has {repeated[0]!r} more than once.")
    if recorded and names != recorded:
        raise ValueError(f"{owner}: names must be the ones in state_dict, {recorded}, got {names}.")
    numbered = sum(len(group.get("params", [])) for group in groups) if is_list else 0
    if numbered and numbered != len(names):
        raise ValueError(
            f"{owner}: names must name the {numbered} parameters of the optimizer, got {len(names)}: {names}."
        )
    return names


def has_an_order(params: Params) -> bool:
    """Whether the parameters are ordered instead of named: a list, a tuple, or a single array."""
    if type(params) in (list, tuple):
        return all(jax.tree.structure(x) == jax.tree.structure(0) for x in params)
    return jax.tree.structure(params) == jax.tree.structure(0)


def _check_entry(owner: str, name: str, entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{owner}: the state of {name!r} must be a mapping, got {entry!r}.")
    if "max_exp_avg_sq" in entry:
        raise ValueError(
            f"{owner}: {name!r} has AMSGrad's maximum, which PyTorch defines differently from this library."
        )
    for kind in _ENTRIES:
        if entry.get(kind) is None:
            raise ValueError(
                f"{owner}: the state of {name!r} has no {kind}, which PyTorch's Adam has; it has "
                f"{', '.join(str(key) for key, x in entry.items() if x is not None) or 'nothing'}."
            )
    if unexpected := sorted(map(str, entry.keys() - set(_ENTRIES))):
        raise ValueError(
            f"{owner}: the state of {name!r} has {unexpected[0]!r}, which PyTorch's Adam does not have."
        )


def _betas(owner: str, state_dict: Any) -> tuple[float, float] | None:
    """The decays of the parameter groups, which must be the same; None if there are none."""
    groups = state_dict.get("param_groups", [])
    groups = groups if isinstance(groups, Sequence) else []
    kept = [group["betas"] for group in groups if isinstance(group, Mapping) and "betas" in group]
    try:
        known = sorted({(float(b1), float(b2)) for b1, b2 in kept})
    except (TypeError, ValueError):
        known = [(math.nan, math.nan)]
    if not all(0 <= b < 1 for pair in known for b in pair):
        raise ValueError(f"{owner}: betas must be two numbers in [0, 1), got {kept}.")
    if len(known) > 1:
        raise ValueError(f"{owner}: the betas must be the same for all parameter groups, got {known}.")
    return known[0] if known else None


def _array(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # a tensor; NumPy has no bfloat16
        x = x.detach().cpu()
        return (x if x.is_complex() else x.double()).numpy()
    return np.asarray(x)


def _step(owner: str, name: str, value: Any) -> int:
    x = _array(value)
    if x.ndim or x.dtype.kind not in "iuf" or not 0 <= x < 2**31 or x != np.floor(x):
        raise ValueError(
            f"{owner}: the step of {name!r} must be an integer in [0, 2147483647], got {value!r}."
        )
    return int(x)


def _moved(
    what: str, path: str, place: Place, value: np.ndarray, shape: tuple[int, ...], layout: Layout | None
) -> np.ndarray:
    """The array in the parameter's layout."""
    turned = None if layout is None else layout(path, value)
    turned = place.from_torch(value) if turned is None else np.asarray(turned)
    if turned.shape != shape:
        moved = "" if turned.shape == value.shape else f", {turned.shape} in this layout,"
        raise ValueError(
            f"{what} has shape {value.shape} in {place.name!r}{moved} but the parameter has shape {shape}; "
            "use layout= to convert one to the other."
        )
    return turned


def to_torch(
    opt_state: OptState,
    *,
    names: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Makes a `state_dict` that PyTorch's Adam or AdamW can load. Needs PyTorch.

    Args:
        opt_state: A state that contains one `scale_by_adam`, per coordinate and in any storage.
        names: PyTorch's names in the order of its optimizer's parameters, as in `from_torch`. Needed unless
            the parameters are a list, a tuple or a single array, because PyTorch loads by number, whatever
            the shapes.
        mapping: As in `from_torch`, with a different name for each path.
        layout: `layout(path, array) -> array` converts an array to PyTorch's layout; the inverse of the
            `layout` of `from_torch`.

    Returns:
        A dictionary with "state", which has "step", "exp_avg" and "exp_avg_sq" for each number, and
        "param_groups", with one group that has the settings of the last step. Its arrays are tensors. If
        `names` is given, the group has it as "param_names".

    Raises:
        ImportError: If PyTorch is not installed.
        ValueError: If there is not exactly one Adam state, it is AMSGrad's or not per coordinate, or `names`
            is missing or incomplete.
    """
    owner = "to_torch"
    torch = importlib.import_module("torch")  # not one of this library's requirements

    found = states_of(ScaleByAdamState, opt_state)
    if len(found) != 1:
        raise ValueError(f"{owner}: opt_state must hold one state of scale_by_adam, got {len(found)}.")
    (state,) = found
    if state.nu_max is not None:
        raise ValueError(f"{owner}: PyTorch defines AMSGrad's maximum differently from this library.")
    check_per_coordinate(owner, state.mu, state.nu)
    mu = dense(state.mu)
    paths = [path for path, _ in paths_and_leaves(mu)]
    if names is None:
        if not has_an_order(mu):
            raise ValueError(
                f"{owner}: PyTorch loads a state by number: pass names= in the order of its optimizer, "
                f"[name for name, _ in model.named_parameters()]; the parameters are {', '.join(paths)}."
            )
        places = {path: Place(path, transposed=False) for path in paths}
        order = paths
    else:
        places, order = places_in(owner, mu, list(names), mapping), list(names)
        if len(order) != len(paths):
            raise ValueError(f"{owner}: names must name each parameter once, got {order} for {paths}.")

    def tensor(path, x):
        turned = None if layout is None else layout(path, np.asarray(x))
        turned = places[path].to_torch(np.asarray(x)) if turned is None else np.asarray(turned)
        return torch.from_numpy(np.array(turned))

    step = float(unwrapped(state.count))
    moments = {
        places[path].name: {
            "step": torch.tensor(step),
            "exp_avg": tensor(path, m),
            "exp_avg_sq": tensor(path, v),
        }
        for (path, m), v in zip(paths_and_leaves(mu), jax.tree.leaves(dense(state.nu)), strict=True)
    }
    rates = [s.learning_rate for s in states_of(LEARNING_RATE_STATES, opt_state)]
    decays = [s.weight_decay for s in states_of(AddDecoupledWeightDecayState, opt_state)]
    group = {
        "params": list(range(len(order))),
        "lr": math.prod(float(unwrapped(rate)) for rate in rates),
        "betas": (float(unwrapped(state.b1)), float(unwrapped(state.b2))),
        "eps": float(unwrapped(state.eps)),
        "weight_decay": sum(float(unwrapped(decay)) for decay in decays),
        "amsgrad": False,
    } | ({} if names is None else {"param_names": order})
    return {"state": {number: moments[name] for number, name in enumerate(order)}, "param_groups": [group]}

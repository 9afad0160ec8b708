"""Transferring a state to other parameters, another chain, granularity or storage."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.states import unwrapped
from adaptive_optax._core.trees import OptState, Params
from adaptive_optax.hyperparams import InjectHyperparamsState
from adaptive_optax.moments.formats import dense, encode_like
from adaptive_optax.moments.storage import Role
from adaptive_optax.monitoring.telemetry import TelemetryState
from adaptive_optax.transforms.adam import ScaleByAdamState, raised_to_least
from adaptive_optax.transforms.rms import ScaleByRmsState

_ROLES: dict[type, dict[str, tuple[Role, str]]] = {
    ScaleByAdamState: {"mu": ("mu", "mu_weight"), "nu": ("nu", "nu_weight"), "nu_max": ("nu", "")},
    ScaleByRmsState: {"mu": ("mu", ""), "nu": ("nu", "nu_weight")},
}


class TransferRow(NamedTuple):
    """What happened to one array.

    Attributes:
        path: Its path in the new state, or in the old one if dropped: "0/mu/encoder/kernel".
        outcome: "kept", "converted", "new" or "dropped".
        reason: Why it is not simply kept.
    """

    path: str
    outcome: str
    reason: str


class TransferTable(tuple[TransferRow, ...]):
    """The rows of `transfer_state`; `print` shows the rows that are not simply kept, and counts."""

    def __str__(self) -> str:
        counts = collections.Counter(row.outcome for row in self)
        rows = [row for row in self if row.outcome != "kept"]
        width = max((len(row.path) for row in rows), default=0)
        lines = [f"{row.outcome:9}  {row.path:{width}}  {row.reason}".rstrip() for row in rows]
        return "\n".join([*lines, ", ".join(f"{n} {outcome}" for outcome, n in counts.items())])


class _Node(NamedTuple):
    """A transformation's state inside another, with its own fields keyed by leaf path, moments decoded."""

    path: str
    state: Any
    fields: dict[str, dict[str, Any]]


def transfer_state(
    old_state: OptState,
    old_tx: optax.GradientTransformation,
    new_tx: optax.GradientTransformation,
    params: Params,
) -> tuple[OptState, TransferTable]:
    """Transfers a state to a changed model, chain, granularity or storage.

    States of single transformations are matched by type, at any depth of chains, groups, masks and wrappers,
    and their arrays by the paths of the parameters. A leaf that is unfrozen, or moves to another group,
    therefore keeps its moments. Whatever has no match is initialised by `new_tx.init`, and is listed.

    For a coarser granularity, a second moment is averaged over the coordinates that will share it, which is
    what it would be if they had always shared it (`reduce="mean"`). For a finer one, each coordinate gets its
    group's value, raised to the minimum that the first moment implies by `adam_bound`. The vector of `Labels`
    can only be kept at the same granularity. The same is true of `reduce="sum"`, but a state does not record
    it, so otherwise sums are mistaken for means. Parameters whose shape has changed, and first moments
    without their second moment, are initialised.

    The last measurement of `telemetry(per="tensor")` is kept only if the inner state, for example its
    moments, shows that the leaves are the same.

    Counts, sums of weights and learning rates go with the moments. New leaves under an old count look like
    leaves whose gradients have all been zero: their first steps are longer than 1, but never longer than
    `adam_bound`. Put them in their own group (`partition_by_path`) for bias correction.

    Args:
        old_state: The state of `old_tx`.
        old_tx: The transformation that made it.
        new_tx: The transformation that continues the run.
        params: The parameters with which it continues.

    Returns:
        The state of `new_tx`, and a table with one row per array: what was kept, converted, initialised or
        dropped, and why.

    Raises:
        ValueError: If `old_tx` or `new_tx` is not a transformation.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> old, new = ao.adam(1e-3), ao.adam(1e-3, granularity="tensor")
        >>> params = {"body": jnp.ones(3)}
        >>> _, state = old.update(params, old.init(params), params)
        >>> state, table = ao.transfer_state(state, old, new, params | {"head": jnp.ones(2)})
        >>> print(table)
        new        0/mu/head  its second moment could not be carried over
        converted  0/nu/body  from shape (3,) to ()
        new        0/nu/head  no such array in the old state, or several
        11 kept, 2 new, 1 converted
    """
    for name, tx in (("old_tx", old_tx), ("new_tx", new_tx)):
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(f"transfer_state: {name} must be an optax.GradientTransformation, got {tx!r}.")
    shapes = {path: np.shape(x) for path, x in paths_and_leaves(params)}
    old = list(_nodes(old_state, ""))
    rows: list[TransferRow] = []
    used: set[str] = set()
    state = _rebuilt(new_tx.init(params), "", old, shapes, rows, used)
    for node in old:
        for field, leaves in node.fields.items():
            for path in leaves:
                place = _join(node.path, field, path)
                if place not in used:
                    rows.append(TransferRow(place, "dropped", "the new state has no place for it"))
    return _without_sharing(state), TransferTable(rows)


def _without_sharing(state: Any) -> Any:
    """Copies arrays that occur in several places, as a moment or count may, so that none is donated twice."""
    seen = set()

    def own(x):
        if id(x) in seen:
            return jnp.array(x)
        seen.add(id(x))
        return x

    return jax.tree.map(lambda x: own(x) if isinstance(x, jax.Array) else x, state)


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _is_state(x: Any) -> bool:
    """Whether a node is a transformation's state and not a moment, a mask or a user's tree."""
    module = type(x).__module__.partition(".")[0]
    return (
        isinstance(x, tuple) and module in ("adaptive_optax", "optax") and type(x).__name__.endswith("State")
    )


def _children(x: Any) -> list[tuple[str, Any]]:
    if hasattr(x, "_fields"):
        return list(zip(x._fields, x, strict=True))
    if isinstance(x, dict):
        return [(str(key), value) for key, value in x.items()]
    return [(str(i), value) for i, value in enumerate(x)] if isinstance(x, list | tuple) else []


def _holds_states(x: Any) -> bool:
    return _is_state(x) or any(_holds_states(child) for _, child in _children(x))


def _nodes(x: Any, path: str) -> Iterator[_Node]:
    if _is_state(x):
        roles = _ROLES.get(type(x), {})
        own = {name: value for name, value in _children(x) if not _holds_states(value)}
        fields = {n: dict(_named_leaves(x, n, dense(v) if n in roles else v)) for n, v in own.items()}
        yield _Node(path, x, fields)
    for name, child in _children(x):
        yield from _nodes(child, _join(path, name))


def _named_leaves(x: Any, field: str, value: Any) -> list[tuple[str, Any]]:
    """The leaves of a state's field, with names by which they can be matched in another state."""
    leaves = paths_and_leaves(value)
    if not isinstance(x, InjectHyperparamsState):
        return leaves
    # These are numbered in the state, and the numbers change if the set of injected hyperparameters does.
    names = sorted(x.hyperparams)
    if field in ("given_values", "overrides"):
        return [(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    if field == "schedule_states":
        return [(_join(",".join(names), path), leaf) for path, leaf in leaves]
    return leaves


def _rebuilt(x: Any, path: str, old: list[_Node], shapes: Any, rows: Any, used: set[str]) -> Any:
    """The new state, filled from the old one where possible."""
    if not _holds_states(x):
        return x
    children = {n: _rebuilt(c, _join(path, n), old, shapes, rows, used) for n, c in _children(x)}
    if isinstance(x, dict):
        return type(x)(zip(x, children.values(), strict=True))
    if not hasattr(x, "_fields"):
        return type(x)(children.values())
    x = type(x)(**children)
    if not _is_state(x):
        return x
    own = {name: value for name, value in children.items() if not _holds_states(value)}
    same = [_regrouped(node, x, shapes, used) for node in old if type(node.state) is type(x)]
    if isinstance(x, TelemetryState):
        same = [node if _measures_same(node, x, old, shapes) else _without_measurement(node) for node in same]
    source = _source(x, own, path, same, shapes)
    start = len(rows)
    without = ""
    if type(x) in _ROLES and source is not None:
        # A first moment without its second moment would make unbounded steps.
        carried = _with_second_moment(x, source, same, shapes)
        same = [node._replace(fields=_only(node.fields, carried)) for node in same]
        source = next(node for node in same if node.path == source.path)
        without = "its second moment could not be carried over"
        if not carried:
            same, source = [], None
    filled = {n: _filled(x, n, v, path, same, source, shapes, rows, used, without) for n, v in own.items()}
    x = x._replace(**filled)
    if isinstance(x, ScaleByAdamState) and any(row.outcome == "converted" for row in rows[start:]):
        # Of coordinates that shared a second moment, one may need a larger one than their mean.
        nu = raised_to_least(dense(x.nu), dense(x.mu), unwrapped(x.bound_sq))
        x = x._replace(nu=encode_like(x.nu, nu, count=unwrapped(x.count), role="nu"))
    return x


def _measures_same(node: _Node, x: TelemetryState, old: list[_Node], shapes: Any) -> bool:
    """Whether the rows of a measurement belong to the same leaves in the new state.

    The rows have no names, but the inner state may have arrays with names, one for each row, in both states.
    """
    shape = np.shape(unwrapped(node.state.values))
    if len(shape) == 1 or shape != np.shape(x.values):
        return shape == np.shape(x.values)
    inside = _join(node.path, "inner_state")
    before = [n for n in old if n.path == inside or n.path.startswith(inside + "/")]

    def rows(nodes):
        arrays = (leaves for n in nodes for leaves in n.fields.values())
        return {
            tuple(leaves) for leaves in arrays if len(leaves) == shape[0] and leaves.keys() <= shapes.keys()
        }

    return not rows(before).isdisjoint(rows(_nodes(x.inner_state, "")))


def _without_measurement(node: _Node) -> _Node:
    return node._replace(fields={"count": node.fields["count"]})


def _regrouped(node: _Node, x: Any, shapes: Any, used: set[str]) -> _Node:
    """A node with its second moments arranged as in the new state: one for all leaves, or one per leaf."""
    if type(x) not in _ROLES:
        return node
    old, new = node.fields["nu"], dict(paths_and_leaves(dense(x.nu)))
    leaves = [path for path in shapes if path]
    if not leaves or (old.keys() == {""}) == (new.keys() == {""}):
        return node
    if old.keys() == {""} and np.shape(old[""]) == ():
        nu = {path: old[""] for path in node.fields["mu"] or leaves}
    elif new.keys() == {""} and np.shape(new[""]) == ():
        known = [(path, _spread(x, shapes[path])) for path, x in old.items() if path in shapes]
        known = [(path, x) for path, x in known if x is not None]
        size = sum(x.size for _, x in known)
        nu = {"": sum(jnp.sum(x) for _, x in known) / max(size, 1)} if known else {}
    else:  # a vector whose labels are unknown
        nu = {}
    if nu:
        used.update(_join(node.path, "nu", path) for path in old)
    return node._replace(fields=node.fields | {"nu": nu})


def _with_second_moment(x: Any, source: _Node, same: list[_Node], shapes: Any) -> set[str]:
    """The leaves whose second moment can be transferred; "" represents one that all leaves share."""
    new = dict(paths_and_leaves(dense(x.nu)))
    carried = set()
    for path, value in new.items():
        for node in same if path else [source]:
            found = node.fields["nu"].get(path)
            centered = isinstance(x, ScaleByRmsState) and (x.mu is None) != (node.state.mu is None)
            if found is not None and not centered:
                turned = _reshaped(unwrapped(found), np.shape(value), shapes.get(path), "nu")
                carried |= set() if turned is None else {path}
    return carried | set(shapes) if "" in carried else carried


def _only(fields: dict[str, dict[str, Any]], carried: set[str]) -> dict[str, dict[str, Any]]:
    """The moments of some leaves, and all fields that are not moments."""
    moments = ("mu", "nu", "nu_max")
    return {
        name: {p: x for p, x in leaves.items() if p in carried} if name in moments else leaves
        for name, leaves in fields.items()
    }


def _source(x: Any, own: Any, path: str, same: list[_Node], shapes: Any) -> _Node | None:
    """The old state that provides counts and weights: with most leaves, at the same path, or the only one."""
    votes: collections.Counter[int] = collections.Counter()
    has_leaves = False
    for name, value in own.items():
        for leaf in dict(paths_and_leaves(dense(value) if name in _ROLES.get(type(x), {}) else value)):
            if leaf in shapes and leaf:
                has_leaves = True
                votes.update(i for i, node in enumerate(same) if leaf in node.fields.get(name, {}))
    if has_leaves:
        return same[max(votes, key=lambda i: (votes[i], same[i].path == path))] if votes else None
    here = [node for node in same if node.path == path]
    return here[0] if here else same[0] if len(same) == 1 else None


def _filled(
    x: Any,
    name: str,
    value: Any,
    path: str,
    same: Any,
    source: Any,
    shapes: Any,
    rows: Any,
    used: set[str],
    without: str,
) -> Any:
    """A field, filled with arrays of the old state."""
    role, weight = _ROLES.get(type(x), {}).get(name, (None, ""))
    plain = dense(value) if role else value
    leaves = []
    for leaf, new in _named_leaves(x, name, plain):
        place = _join(path, name, leaf)
        nodes = [node for node in same if leaf in node.fields.get(name, {})]
        node = source if source in nodes else nodes[0] if len(nodes) == 1 and leaf else None
        found = None if node is None else unwrapped(node.fields[name][leaf])
        turned = None if found is None else _reshaped(found, np.shape(new), shapes.get(leaf), role)
        if node is None or found is None or turned is None:
            why = "no such array in the old state, or several"
            if found is not None:
                why = f"it had shape {np.shape(found)}"
            rows.append(TransferRow(place, "new", without if role and name != "nu" and without else why))
            leaves.append(new)
            continue
        used.add(_join(node.path, name, leaf))
        if weight and node is not source:  # rescale, so that the mean is the same with the source's weight
            ratio = unwrapped(getattr(source.state, weight)) / unwrapped(getattr(node.state, weight))
            turned = turned * jnp.where(jnp.isfinite(ratio), ratio, 0)
        resized = np.shape(found) != np.shape(new)
        reason = f"from shape {np.shape(found)} to {np.shape(new)}" if resized else ""
        rows.append(TransferRow(place, "converted" if resized else "kept", reason))
        leaves.append(jnp.asarray(turned, jnp.result_type(new)))
    tree = jax.tree.structure(plain).unflatten(leaves)
    if not role or value is None:
        return tree
    count = unwrapped((x if source is None else source.state).count)
    return encode_like(value, tree, count=count, role=role)


def _reshaped(found: Any, wanted: tuple[int, ...], param: Any, role: Role | None) -> Any:
    """A second moment at another granularity; None if the shapes do not fit."""
    shape = np.shape(found)
    if shape == wanted:
        return found
    if role != "nu" or param is None:
        return None
    spread = _spread(found, param)
    group = _keeping_axes(wanted, param)
    if spread is None or group is None:
        return None
    axes = tuple(i for i, (a, b) in enumerate(zip(group, param, strict=True)) if a != b)
    return jnp.reshape(jnp.mean(spread, axis=axes, keepdims=True) if axes else spread, wanted)


def _spread(found: Any, param: tuple[int, ...]) -> Any:
    """A leaf's second moments, broadcast to its coordinates."""
    group = _keeping_axes(np.shape(found), param)
    return None if group is None else jnp.broadcast_to(jnp.reshape(unwrapped(found), group), param)


def _keeping_axes(shape: tuple[int, ...], param: tuple[int, ...]) -> tuple[int, ...] | None:
    shape = (1,) * len(param) if shape == () else shape
    fits = len(shape) == len(param) and all(a in (1, b) for a, b in zip(shape, param, strict=True))
    return shape if fits else None

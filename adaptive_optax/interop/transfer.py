"""Transferring a state to other parameters, another chain, granularity or storage."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import check_transformation
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.states import children, unwrapped, with_children
from adaptive_optax._core.trees import OptState, Params
from adaptive_optax.interop.counterparts import counterpart
from adaptive_optax.interop.state_nodes import (
    Node,
    holds_states,
    is_state,
    join,
    named_leaves,
    nodes,
    own_fields,
)
from adaptive_optax.moments.carried import MomentField, moments_declared_by, with_repaired_moments
from adaptive_optax.moments.formats import dense, encode_like
from adaptive_optax.moments.granularity import regrouped
from adaptive_optax.moments.storage import Role
from adaptive_optax.monitoring.telemetry import TelemetryState
from adaptive_optax.transforms.momentum import TraceState


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


def transfer_state(
    old_state: OptState,
    old_tx: optax.GradientTransformation,
    new_tx: optax.GradientTransformation,
    params: Params,
) -> tuple[OptState, TransferTable]:
    """Transfers a state to a changed model, chain, granularity or storage.

    States of single transformations are matched by type, at any depth of chains, groups, masks and wrappers,
    and their arrays by the paths of the parameters. A leaf that is unfrozen, or moves to another group,
    therefore keeps its moments. Whatever has no match is initialised by `new_tx.init`, and is listed. The
    types are those of this library and of optax, and others that declare their moments (`carries_moments`).

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
        The state of `new_tx`, and a table that says, with one row per array, what was kept, converted,
        initialised or dropped, and why.

    Raises:
        ValueError: If `old_tx` or `new_tx` is not a transformation.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> old, new = ao.adam(1e-3), ao.adam(1e-3, granularity="tensor")
        >>> params = {"body": jnp.ones(3)}
        >>> _, state = old.update(params, old.init(params), params)
        >>> state, table = ao.transfer_state(state, old, new, params | {"head": jnp.ones(2)})
        >>> print(table)
        new        0/mu/head  its second moment could not be carried over
        converted  0/nu/body  from shape (3,) to ()
        new        0/nu/head  no such array in the old state, or several
        5 kept, 2 new, 1 converted
    """
    check_transformation("transfer_state: old_tx", old_tx)
    check_transformation("transfer_state: new_tx", new_tx)
    shapes = {path: np.shape(x) for path, x in paths_and_leaves(params)}
    transfer = _Transfer(list(nodes(old_state, "")), shapes, rows=[], used=set())
    state = transfer.rebuilt(new_tx.init(params), "")
    return _without_sharing(state), TransferTable([*transfer.rows, *transfer.dropped()])


def carry_moments(old_state: OptState, new_state: OptState, params: Params) -> OptState:
    """Takes over the moments of a state, with their counts and weights; everything else stays as it is.

    States are matched as in `transfer_state`. One that has none of its type gets the moments of its
    `counterpart`, such as optax's Adam's for this library's.

    Args:
        old_state: The state of a run under way.
        new_state: The initial state of the transformation that goes on, with concrete values.
        params: The parameters.

    Returns:
        The new state. Leaves that were not filled are the same objects as before.
    """
    shapes = {path: np.shape(x) for path, x in paths_and_leaves(params)}
    old = [_without_schedule(node) for node in nodes_with_moments(old_state, params)]
    return _Transfer(old, shapes, rows=[], used=set(), converts=True).rebuilt(new_state, "")


def nodes_with_moments(state: OptState, params: Params) -> list[Node]:
    """Finds the states that hold moments: those that declare them, of `trace`, and of optax."""
    shapes = {path: np.shape(x) for path, x in paths_and_leaves(params)}
    return [node for node in nodes(state, "") if _has_moments(node, shapes)]


def undeclared_states(x: OptState) -> Iterator[Any]:
    """Finds the states of other libraries that hold arrays, and do not say which of them are moments."""
    own = own_fields(x) if is_state(x) else {}
    if is_state(x) or holds_states(x) or type(x) in (tuple, list, dict):
        for name, child in children(x):
            if name not in own:
                yield from undeclared_states(child)
    elif any(np.ndim(leaf) for leaf in jax.tree.leaves(x)):
        yield x


def _has_moments(node: Node, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a state holds moments; one of optax that has a tree like the parameters does."""
    if moments_declared_by(type(node.state)) or isinstance(node.state, TraceState):
        return True
    foreign = type(node.state).__module__.partition(".")[0] == "optax"
    accumulates = isinstance(node.state, optax.MultiStepsState)  # gradients of a step that is not complete
    return foreign and not accumulates and any(_is_moment(each, shapes) for each in node.fields.values())


def _is_moment(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether these are of the parameters, or of those that a mask shows; a count is an integer."""
    of_params = leaves.keys() & shapes.keys()
    return (
        bool(of_params)
        and (leaves.keys() <= shapes.keys() or leaves.keys() >= shapes.keys())
        and all(jnp.issubdtype(jnp.result_type(leaves[path]), jnp.inexact) for path in of_params)
        and all(np.shape(leaves[path]) or not shapes[path] for path in of_params)
    )


def _without_schedule(node: Node) -> Node:
    """A node whose momentum, if scheduled, begins now."""
    if not isinstance(node.state, TraceState):
        return node
    return node._replace(fields={"trace": node.fields["trace"]})


def _without_sharing(state: Any) -> Any:
    """Copies arrays that occur in several places, as a moment or count may, so that none is donated twice."""
    seen = set()

    def own(x):
        if id(x) in seen:
            return jnp.array(x)
        seen.add(id(x))
        return x

    return jax.tree.map(lambda x: own(x) if isinstance(x, jax.Array) else x, state)


class _Matches(NamedTuple):
    """The old states from which a new one is filled.

    Attributes:
        same: Those of its type.
        source: The one that provides counts and weights, or None.
        without_second: Whether first moments are missing because their second moments do not fit.
    """

    same: list[Node]
    source: Node | None
    without_second: bool


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """A transfer under way.

    Attributes:
        old: The old states.
        shapes: The shapes of the parameters, by path.
        rows: What has happened to the arrays of the new state so far.
        used: The places of the old arrays that the new state has taken up.
        converts: Whether states that have none of their type are filled by their counterparts.
    """

    old: list[Node]
    shapes: dict[str, tuple[int, ...]]
    rows: list[TransferRow]
    used: set[str]
    converts: bool = False

    def rebuilt(self, x: Any, path: str) -> Any:
        """The new state, filled from the old one where possible."""
        if is_state(x):
            return self._filled(x, path)
        if not holds_states(x):
            why = "its state is of another library, and does not declare its moments"
            self.rows.extend(TransferRow(join(path, place), "new", why) for place, _ in paths_and_leaves(x))
            return x
        return with_children(x, [self.rebuilt(child, join(path, str(key))) for key, child in children(x)])

    def dropped(self) -> Iterator[TransferRow]:
        """The rows of the old arrays that the new state has not taken up."""
        places = (
            join(node.path, field, path)
            for node in self.old
            for field, leaves in node.fields.items()
            for path in leaves
        )
        why = "the new state has no place for it"
        return (TransferRow(place, "dropped", why) for place in places if place not in self.used)

    def _filled(self, x: Any, path: str) -> Any:
        """The state of one transformation, with what the old states of its type provide."""
        own = own_fields(x)
        inner = {n: self.rebuilt(c, join(path, n)) for n, c in children(x) if n not in own}
        x = x._replace(**inner)
        matches = self._matches(x, own, path)
        start = len(self.rows)
        x = x._replace(**{name: self._field(x, name, path, matches) for name in own})
        # Of coordinates that shared a second moment, one may need a larger one than their mean.
        resized = any(row.outcome == "converted" for row in self.rows[start:])
        return with_repaired_moments(x) if resized else x

    def _matches(self, x: Any, own: Any, path: str) -> _Matches:
        same = [node for node in self.old if type(node.state) is type(x)]
        if self.converts and not same:
            found = (counterpart(node, x, self.shapes) for node in self.old)
            same = [node for node in found if node is not None]
        same = [self._regrouped(node, x) for node in same]
        if isinstance(x, TelemetryState):
            same = [n if self._measures_same(n, x) else _without_measurement(n) for n in same]
        source = self._source(x, own, path, same)
        if source is None or not moments_declared_by(type(x), "nu"):
            return _Matches(same, source, without_second=False)
        # A first moment without its second moment would make unbounded steps.
        carried = self._with_second_moment(x, source, same)
        if not carried:
            return _Matches([], None, without_second=True)
        same = [node._replace(fields=_only(node, carried)) for node in same]
        return _Matches(same, next(n for n in same if n.path == source.path), without_second=True)

    def _measures_same(self, node: Node, x: TelemetryState) -> bool:
        """Whether the rows of a measurement belong to the same leaves in the new state.

        The rows have no names, but the inner state may have arrays with names, one for each row, in both
        states.
        """
        shape = np.shape(unwrapped(node.state.values))
        if len(shape) == 1 or shape != np.shape(x.values):
            return shape == np.shape(x.values)
        inside = join(node.path, "inner_state")
        before = [n for n in self.old if n.path == inside or n.path.startswith(inside + "/")]

        def rows(states):
            arrays = (leaves for n in states for leaves in n.fields.values())
            named = self.shapes.keys()
            return {tuple(leaves) for leaves in arrays if len(leaves) == shape[0] and leaves.keys() <= named}

        return not rows(before).isdisjoint(rows(nodes(x.inner_state, "")))

    def _regrouped(self, node: Node, x: Any) -> Node:
        """A node with its second moments arranged as in the new state: for all leaves, or for each."""
        fields = dict(node.fields)
        for name in moments_declared_by(type(x), "nu"):
            old, new = fields[name], dict(paths_and_leaves(dense(getattr(x, name))))
            if old and new and any(self.shapes) and (old.keys() == {""}) != (new.keys() == {""}):
                fields[name] = self._rearranged(old, new, node)
                if fields[name]:
                    self.used.update(join(node.path, name, path) for path in old)
        return node._replace(fields=fields)

    def _rearranged(self, old: dict[str, Any], new: dict[str, Any], node: Node) -> dict[str, Any]:
        """One second moment for all leaves as one per leaf, or the reverse; empty if that is not possible."""
        if old.keys() == {""} and np.shape(old[""]) == ():
            firsts = [
                path for name in moments_declared_by(type(node.state), "mu") for path in node.fields[name]
            ]
            return dict.fromkeys(firsts or filter(None, self.shapes), old[""])
        if new.keys() == {""} and np.shape(new[""]) == ():
            leaves = [(x, self.shapes[path]) for path, x in old.items() if path in self.shapes]
            spread = [x for x in (regrouped(x, shape, shape) for x, shape in leaves) if x is not None]
            size = sum(x.size for x in spread)
            return {"": sum(jnp.sum(x) for x in spread) / max(size, 1)} if spread else {}
        return {}  # a vector whose labels are unknown

    def _with_second_moment(self, x: Any, source: Node, same: list[Node]) -> set[str]:
        """The leaves whose second moment can be transferred; "" represents one that all leaves share."""
        carried = set()
        for name in moments_declared_by(type(x), "nu"):
            for path, value in paths_and_leaves(dense(getattr(x, name))):
                for node in same if path else [source]:
                    found = node.fields[name].get(path)
                    if found is not None and _have_same_first_moments(x, node.state):
                        fits = self._reshaped(found, np.shape(value), path, "nu") is not None
                        carried |= {path} if fits else set()
        return carried | set(self.shapes) if "" in carried else carried

    def _source(self, x: Any, own: Any, path: str, same: list[Node]) -> Node | None:
        """The old state that provides counts and weights.

        It is the one with most leaves, the one at the same path, the one whose path is the same but for a
        wrapper outside, or the only one.
        """
        votes: collections.Counter[int] = collections.Counter()
        moments = moments_declared_by(type(x))
        has_leaves = False
        for name, value in own.items():
            for leaf in dict(paths_and_leaves(dense(value) if name in moments else value)):
                if leaf in self.shapes and leaf:
                    has_leaves = True
                    votes.update(i for i, node in enumerate(same) if leaf in node.fields.get(name, {}))
        if has_leaves:
            return same[max(votes, key=lambda i: (votes[i], same[i].path == path))] if votes else None
        here = [node for node in same if node.path == path]
        within = [node for node in same if _ends_alike(node.path, path)]
        found = next((nodes for nodes in (here, within, same) if len(nodes) == 1), None)
        return None if found is None else found[0]

    def _field(self, x: Any, name: str, path: str, matches: _Matches) -> Any:
        """A field, filled with arrays of the old state."""
        moment, value = moments_declared_by(type(x)).get(name), getattr(x, name)
        plain = value if moment is None else dense(value)
        named = named_leaves(x, name, plain)
        leaves = [self._leaf(new, (path, name, leaf), moment, matches) for leaf, new in named]
        tree = jax.tree.structure(plain).unflatten(leaves)
        if moment is None or value is None:
            return tree
        count = unwrapped((x if matches.source is None else matches.source.state).count)
        return encode_like(value, tree, count=count, role=moment.role)

    def _leaf(
        self, new: Any, place: tuple[str, str, str], moment: MomentField | None, matches: _Matches
    ) -> Any:
        """An array of the old state in the form of a new one, or the new one; adds the row of the table."""
        _, name, leaf = place
        source = matches.source
        having = [node for node in matches.same if leaf in node.fields.get(name, {})]
        node = source if source in having else having[0] if len(having) == 1 and leaf else None
        role = None if moment is None else moment.role
        found = None if node is None else node.fields[name][leaf]
        turned = None if found is None else self._reshaped(found, np.shape(new), leaf, role)
        if node is None or found is None or turned is None:
            why = "no such array in the old state, or several"
            if found is not None:
                why = f"it had shape {np.shape(found)}"
            if role == "mu" and matches.without_second:
                why = "its second moment could not be carried over"
            self.rows.append(TransferRow(join(*place), "new", why))
            return new
        self.used.add(join(node.path, name, leaf))
        if moment is not None and moment.weight and source is not None and node is not source:
            # Rescale, so that the mean is the same with the source's weight.
            weights = [unwrapped(getattr(n.state, moment.weight)) for n in (source, node)]
            ratio = weights[0] / weights[1]
            turned = turned * jnp.where(jnp.isfinite(ratio), ratio, 0)
        resized = np.shape(found) != np.shape(new)
        reason = f"from shape {np.shape(found)} to {np.shape(new)}" if resized else ""
        self.rows.append(TransferRow(join(*place), "converted" if resized else "kept", reason))
        return jnp.asarray(turned, jnp.result_type(new))

    def _reshaped(self, found: Any, wanted: tuple[int, ...], leaf: str, role: Role | None) -> Any:
        """An array in a shape: a second moment at another granularity; None if the shapes do not fit."""
        if np.shape(found) == wanted:
            return found
        if role != "nu" or leaf not in self.shapes:
            return None
        return regrouped(found, self.shapes[leaf], wanted)


def _ends_alike(path: str, other: str) -> bool:
    """Whether one path is the end of the other."""
    return f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}")


def _without_measurement(node: Node) -> Node:
    return node._replace(fields={"count": node.fields["count"]})


def _have_same_first_moments(x: Any, other: Any) -> bool:
    """Whether both have them, or neither, as a second moment about the mean differs from one about zero."""
    firsts = moments_declared_by(type(x), "mu")
    return all((getattr(x, name) is None) == (getattr(other, name) is None) for name in firsts)


def _only(node: Node, carried: set[str]) -> dict[str, dict[str, Any]]:
    """The moments of some leaves, and all fields that are not moments."""
    moments = moments_declared_by(type(node.state))
    return {
        name: {p: x for p, x in leaves.items() if p in carried} if name in moments else leaves
        for name, leaves in node.fields.items()
    }

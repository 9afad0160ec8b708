"""States whose scalars are the entries of one array, because each array costs a step time of its own.

A step on a small model spends much of its time passing arrays to the device, and an accelerator launches a
kernel for each scalar that it writes. A state therefore declares `entries` of one of its fields:

    @with_entries
    class SomeState(NamedTuple):
        count: Count
        scalars: Scalars
        decay, weight = entries(2)

`state.decay` is then an entry along the last axis of `state.scalars`; `_replace(decay=...)`, the constructor and
the repr know it as if it were a field, and so do pickles and checkpoints written when it was one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from adaptive_optax._core.states import unwrapped

State = TypeVar("State")

FIELD = "scalars"


class Entry:
    """One entry of a state's array, read as an attribute of the state."""

    def __init__(self, index: int, is_flag: bool = False):
        self.index = index
        self.is_flag = is_flag

    def __get__(self, state: Any, owner: type | None = None) -> Any:
        if state is None:
            return self
        array = unwrapped(getattr(state, FIELD))
        if not hasattr(array, "ndim"):  # a sharding, for example
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape[:-1], bool if self.is_flag else array.dtype)
        value = array[..., self.index]
        return value != 0 if self.is_flag else value


def entries(number: int, *, flags: int = 0) -> Iterator[Entry]:
    """Returns the entries of a state, of which the last `flags` are bools."""
    return (Entry(i, is_flag=i >= number - flags) for i in range(number))


def stacked(values: Iterable[Any], dtype: Any) -> jax.Array:
    """Returns scalars as one array; batches of them keep their leading axes."""
    return jnp.stack([jnp.asarray(x, dtype) for x in values], axis=-1)


def with_entries(state_type: type[State]) -> type[State]:
    """Lets a NamedTuple with `entries` be used as if each were a field. A decorator; it returns the type."""
    kind: Any = state_type
    own = _entries_of(kind)
    plain = attributes_of(kind)
    construct, replace = kind.__new__, kind._replace

    def new(cls, *args, **kwargs):
        if len(args) + len(kwargs) != len(plain) or FIELD in kwargs:
            return construct(cls, *args, **kwargs)
        given = dict(zip(plain, args, strict=False)) | kwargs
        values = [given.pop(name) for name in own]
        dtype = next(jnp.result_type(x) for x in values if jnp.result_type(x) != bool)
        return construct(cls, **given, **{FIELD: stacked(map(unwrapped, values), dtype)})

    @functools.wraps(replace)
    def replaced(self, /, **kwargs):
        changed = {name: kwargs.pop(name) for name in own if name in kwargs}
        state = replace(self, **kwargs)
        if not changed:
            return state
        old = getattr(state, FIELD)
        array = jnp.asarray(unwrapped(old))
        for name, value in changed.items():
            array = array.at[..., own[name].index].set(jnp.asarray(unwrapped(value), array.dtype))
        return replace(state, **{FIELD: old.replace(array) if hasattr(old, "get_value") else array})

    def show(self):
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in plain)})"

    kind.__new__, kind._replace, kind.__repr__ = new, replaced, show
    if hasattr(kind, "__replace__"):  # for copy.replace
        kind.__replace__ = replaced
    return state_type


def _entries_of(kind: type) -> dict[str, Entry]:
    """A state's entries, in their order."""
    found = {name: x for name, x in vars(kind).items() if isinstance(x, Entry)}
    return dict(sorted(found.items(), key=lambda item: item[1].index))


def _holds_entries(node: Any) -> bool:
    return bool(_entries_of(type(node)))


def attributes_of(kind: Any) -> list[str]:
    """Lists what a state holds, by name: its fields, with the entries in place of their array."""
    names = _entries_of(kind)
    fields = getattr(kind, "_fields", ())
    return [name for field in fields for name in (names if field == FIELD and names else (field,))]


def arrays_of_entries(tree: Any) -> list[jax.Array]:
    """Lists the arrays of entries in a tree."""
    nodes = jax.tree.leaves(tree, is_leaf=_holds_entries)
    return [getattr(node, FIELD) for node in nodes if _holds_entries(node)]


def entries_by_path(tree: Any) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns what the arrays of entries in a tree hold, by their paths: the paths of the fields they replace."""
    found = {}
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_holds_entries)[0]:
        if _holds_entries(node):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            array = unwrapped(getattr(node, FIELD))
            shape = array.shape[:-1]
            found["/".join(filter(None, (path, FIELD)))] = {
                "/".join(filter(None, (path, name))): jax.ShapeDtypeStruct(
                    shape, bool if entry.is_flag else array.dtype
                )
                for name, entry in _entries_of(type(node)).items()
            }
    return found

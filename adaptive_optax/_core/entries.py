"""States whose scalars are the entries of arrays, because each array costs a step time of its own.

A step on a small model spends much of its time passing arrays to the device, and an accelerator launches a
kernel for each scalar that it writes. A state may therefore keep scalars of one dtype in one array:

    @with_entries
    class SomeState(NamedTuple):
        count: Count
        scalars: Scalars

        decay = entry("scalars")  # type: jax.Array
        weight = entry("scalars")  # type: jax.Array

`state.decay` is then an entry along the last axis of `state.scalars`. The constructor, `_replace` and the
repr know it as if it were a field, and so do pickles and checkpoints that were written when it was one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from adaptive_optax._core.states import unwrapped

State = TypeVar("State")


class Entry:
    """An entry of an array in a state, read as an attribute of the state."""

    def __init__(self, field: str, is_flag: bool):
        self.field = field
        self.index = -1  # until the type is complete
        self.is_flag = is_flag

    def __get__(self, state: Any, owner: type | None = None) -> Any:
        if state is None:
            return self
        array = unwrapped(getattr(state, self.field))
        if not hasattr(array, "ndim"):  # a sharding, for example
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape[:-1], bool if self.is_flag else array.dtype)
        value = array[..., self.index]
        return value != 0 if self.is_flag else value


def entry(field: str, *, is_flag: bool = False) -> Any:
    """Declares the next entry of an array in a state, a bool if `is_flag`. These come last.

    Its type is in a comment, because an annotation would make it a field.
    """
    return Entry(field, is_flag)


def stacked(values: Iterable[Any], dtype: Any) -> jax.Array:
    """Returns scalars as one array; batches of them keep their leading axes."""
    return jnp.stack([jnp.asarray(unwrapped(x), dtype) for x in values], axis=-1)


def with_entries(state_type: type[State]) -> type[State]:
    """Lets a NamedTuple with entries be used as if each were a field. A decorator; it returns the type."""
    kind: Any = state_type
    arrays: dict[str, list[str]] = {}
    for name, x in vars(kind).items():
        if isinstance(x, Entry):
            names = arrays.setdefault(x.field, [])
            x.index = len(names)
            names.append(name)
    kind._arrays_of_entries = arrays
    attributes = attributes_of(kind)
    construct, replace = kind.__new__, kind._replace

    def new(cls, *args, **kwargs):
        if len(args) + len(kwargs) != len(attributes) or not arrays.keys().isdisjoint(kwargs):
            return construct(cls, *args, **kwargs)
        given = dict(zip(attributes, args, strict=False)) | kwargs
        for field, names in arrays.items():
            values = [given.pop(name) for name in names]
            dtype = next(jnp.result_type(unwrapped(x)) for x in values)  # flags come last
            given[field] = stacked(values, dtype)
        return construct(cls, **given)

    @functools.wraps(replace)
    def replaced(self, /, **kwargs):
        for field, names in arrays.items():
            changed = {name: kwargs.pop(name) for name in names if name in kwargs}
            if changed:
                old = getattr(self, field)
                array = stacked(
                    (changed.get(name, getattr(self, name)) for name in names), unwrapped(old).dtype
                )
                kwargs[field] = old.replace(array) if hasattr(old, "get_value") else array
        return replace(self, **kwargs)

    def show(self):
        values = (f"{name}={getattr(self, name)!r}" for name in attributes)
        return f"{type(self).__name__}({', '.join(values)})"

    kind.__new__, kind._replace, kind.__repr__ = new, replaced, show
    if hasattr(kind, "__replace__"):  # for copy.replace
        kind.__replace__ = replaced
    return state_type


def _arrays_in(kind: Any) -> dict[str, list[str]]:
    """The fields of a state that hold entries, with the names of these."""
    return getattr(kind, "_arrays_of_entries", {})


def attributes_of(kind: Any) -> list[str]:
    """Lists what a state holds, by name: its fields, with the entries in place of their arrays."""
    arrays = _arrays_in(kind)
    return [name for field in getattr(kind, "_fields", ()) for name in arrays.get(field, [field])]


def arrays_of_entries(tree: Any) -> list[jax.Array]:
    """Lists the arrays of entries in a tree."""
    return [getattr(state, field) for _, state in _states(tree) for field in _arrays_in(type(state))]


def entries_by_path(tree: Any) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns, for the path of each array of entries in a tree, the paths that these had as fields."""
    return {
        "/".join((*path, field)): {"/".join((*path, name)): getattr(_shapes(state), name) for name in names}
        for path, state in _states(tree)
        for field, names in _arrays_in(type(state)).items()
    }


def _shapes(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def _states(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Finds the states with entries in a tree, at any depth, with their paths."""

    def is_one(node):
        return bool(_arrays_in(type(node)))

    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one)[0]:
        if is_one(node):
            place = (*path, *(jax.tree_util.keystr((key,), simple=True) for key in keys))
            yield place, node
            for field, child in zip(node._fields, node, strict=True):
                yield from _states(child, (*place, field))

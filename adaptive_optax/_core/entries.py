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
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.states import unwrapped

State = TypeVar("State")


class Entry:
    """An entry of an array in a state, read as an attribute of the state."""

    def __init__(self, field: str, is_flag: bool):
        self.field = field
        self.is_flag = is_flag
        self.index = 0
        self.names: list[str] = []  # of all entries of the array, once the type is complete

    def __get__(self, state: Any, owner: type | None = None) -> Any:
        if state is None:
            return self
        array = unwrapped(getattr(state, self.field))
        shape = getattr(array, "shape", None)
        if shape is None or tuple(shape[-1:]) != (len(self.names),):
            return array  # of a tree that was mapped to shardings, axes, sums over each array
        if not _is_array(array):  # a shape and a dtype
            return jax.ShapeDtypeStruct(shape[:-1], bool if self.is_flag else array.dtype)
        value = array[..., self.index]
        return value != 0 if self.is_flag else value


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def entry(field: str, *, is_flag: bool = False) -> Any:
    """Declares the next entry of an array in a state, a bool if `is_flag`; the first is none.

    Its type is in a comment, because an annotation would make it a field.
    """
    return Entry(field, is_flag)


def stacked(values: Iterable[Any], dtype: Any) -> jax.Array:
    """Returns scalars as one array; batches of them keep their leading axes."""
    return jnp.stack([jnp.asarray(unwrapped(x), dtype) for x in values], axis=-1)


def _together(values: list[Any]) -> Any:
    """Values as the array of a state; shapes, shardings and the like are the same for all of them."""
    first = unwrapped(values[0])
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*first.shape, len(values)), first.dtype)
    if _is_array(first) or isinstance(first, float | int | np.generic):
        return stacked(values, jnp.result_type(first))
    return first


_DECLARED: list[dict[str, list[str]]] = []


def with_entries(state_type: type[State]) -> type[State]:
    """Lets a NamedTuple with entries be used as if each were a field. A decorator; it returns the type."""
    kind: Any = state_type
    arrays: dict[str, list[str]] = {}
    for name, x in vars(kind).items():
        if isinstance(x, Entry):
            x.names = arrays.setdefault(x.field, [])
            x.index = len(x.names)
            x.names.append(name)
    kind._arrays_of_entries = arrays
    _DECLARED.append(arrays)
    attributes = attributes_of(kind)
    construct, replace = kind.__new__, kind._replace

    def new(cls, *args, **kwargs):
        given = dict(zip(attributes, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(attributes) or given.keys() != set(attributes):
            return construct(cls, *args, **kwargs)
        for field, names in arrays.items():
            given[field] = _together([given.pop(name) for name in names])
        return construct(cls, **given)

    @functools.wraps(replace)
    def replaced(self, /, **kwargs):
        for field, names in arrays.items():
            changed = {name: kwargs.pop(name) for name in names if name in kwargs}
            if changed:
                old = getattr(self, field)
                if not _is_array(unwrapped(old)):  # a tree of something else
                    kwargs[field] = next(iter(changed.values()))
                    continue
                values = (changed.get(name, getattr(self, name)) for name in names)
                array = stacked(values, unwrapped(old).dtype)
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
    return [getattr(state, field) for state in _states(tree) for field in _arrays_in(type(state))]


def fields_before(path: str, known: Collection[str]) -> list[str]:
    """Returns the paths among some that hold, one by one, what the array of entries at a path holds."""
    parent, _, field = path.rpartition("/")
    for arrays in _DECLARED:
        paths = [f"{parent}/{name}".removeprefix("/") for name in arrays.get(field, ())]
        if paths and all(each in known for each in paths):
            return paths
    return []


def _states(tree: Any) -> Iterator[Any]:
    """Finds the states with entries in a tree, at any depth."""

    def is_one(node):
        return bool(_arrays_in(type(node)))

    for node in jax.tree.leaves(tree, is_leaf=is_one):
        if is_one(node):
            yield node
            for child in node:
                yield from _states(child)

"""Recognizes a Python function by its code, so that a study's folder refuses trials of a changed one.

A training function of the user's own cannot be lowered to a program, as a task's can. Its digest covers its
bytecode, defaults and closure, and whatever it uses of its own module: functions, classes, numbers, arrays.
What lies in other modules is covered by name only.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax.study.engine.chunks import digest, digest_arrays

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range)


def digest_code(function: Any) -> str:
    """A short hash of a function, or of another object that can be called; the same in every process."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return _Digests(getattr(inner, "__module__", None)).of(function)


class _Digests:
    """Digests of values by what they hold; only what the given module defines is followed into."""

    def __init__(self, module: str | None):
        self.module = module
        self.found: dict[int, tuple[Any, str]] = {}  # keeps the values alive, so that ids stay theirs

    def of(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return digest(repr(value).encode())
        if id(value) not in self.found:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            self.found[id(value)] = value, kind  # if it is met inside itself
            parts = [kind, *self._parts(value)]
            self.found[id(value)] = value, digest(*(part.encode() for part in parts))
        return self.found[id(value)][1]

    def _parts(self, value: Any) -> list[str]:
        """The names and digests of what a value holds."""
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            numbers = value.dtype.kind != "O" and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
            return [digest_arrays({"": np.asarray(value)}) if numbers else str(value.shape)]
        if isinstance(value, types.FunctionType):
            parts = [f"{value.__module__}.{value.__qualname__}"]
            if value.__module__ == self.module:
                captured = inspect.getclosurevars(value)
                parts += map(self.of, (value.__code__, value.__defaults__, value.__kwdefaults__))
                parts += map(self.of, (dict(captured.nonlocals), dict(captured.globals)))
            return parts
        if isinstance(value, types.CodeType):
            names = value.co_names, value.co_varnames, value.co_freevars
            return [value.co_code.hex(), *map(self.of, (value.co_consts, *names))]
        if isinstance(value, types.ModuleType):
            return [value.__name__]
        if isinstance(value, os.PathLike):
            return [str(os.fspath(value))]
        if isinstance(value, type):
            parts = [f"{value.__module__}.{value.__qualname__}"]
            if value.__module__ == self.module:
                members = vars(value).items()
                of_class = ("__module__", "__dict__", "__weakref__", "__doc__", "__annotations__")
                parts.append(self.of({name: each for name, each in members if name not in of_class}))
            return parts
        if isinstance(value, types.MethodType):
            return [self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, functools.partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, staticmethod | classmethod):
            return [self.of(value.__func__)]
        if isinstance(value, property):
            return [self.of(value.fget)]
        if isinstance(value, Mapping):
            return sorted(self.of(name) + self.of(each) for name, each in value.items())
        if isinstance(value, set | frozenset):
            return sorted(map(self.of, value))
        if isinstance(value, list | tuple):
            return [*map(self.of, value)]
        if dataclasses.is_dataclass(value):
            return [self.of({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})]
        if type(value).__module__ == self.module:
            return [self.of(type(value)), self.of(dict(getattr(value, "__dict__", {})))]
        if wrapped := getattr(value, "__wrapped__", None):  # of jax.jit, functools.lru_cache and the like
            return [self.of(wrapped)]
        return []

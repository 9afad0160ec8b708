"""Recognizes a Python function by its code, so that a study's folder refuses trials of a changed one.

A training function of the user's own cannot be lowered to a program, as a task's can. Its digest covers its
bytecode, defaults and closure, and whatever it uses of its own module, at any depth: functions, classes with
their bases, and values. A value is known by the parts from which `pickle` would rebuild it (`__reduce_ex__`),
so that a value of any library counts with its content. Functions and classes of other modules count by name;
a function made there by another (a transformation of optax, `jax.grad(f)`) also by what it holds.

Bytes of `pickle` or `cloudpickle`, and the hashes that joblib and dask make of them, would not do: they refer
to functions of an importable module by name, and depend on the order of sets and on which equal parts are one
object.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import functools
import os
import random
import sys
import types
import warnings
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax.study.engine.chunks import digest, digest_arrays

_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented), range}
# Modules of locks and caches, which hold nothing to know.
_EMPTY = {"_thread", "weakref", "_weakrefset", "_abc"}
# What a class has besides its members; line numbers change with a comment.
_OF_CLASS = set(
    "__module__ __dict__ __weakref__ __doc__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __firstlineno__ __static_attributes__ __abstractmethods__ _abc_impl".split()
)
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_Parts = Generator[Any, str, list[str]]  # yields values, receives their digests, returns the parts of one


def digest_code(function: Any, name: str = "train") -> str:
    """A short hash of a function, or of another object that can be called; the same in every process.

    Args:
        function: The function.
        name: Its name in the warning.

    Warns:
        UserWarning: If it uses values in which a change cannot be seen.
    """
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    digests = _Digests(getattr(inner, "__module__", None))
    found = digests.of(function)
    if digests.unknown:
        warnings.warn(
            f"out: {name} uses values of {', '.join(sorted(digests.unknown))}, in which a change cannot be "
            "seen; after one, use another folder.",
            stacklevel=2,
        )
    return found


class _Digests:
    """Digests of values by what they hold.

    Args:
        module: The module whose functions and classes are followed into.
        found: The digests that are known, by identity. It keeps the values alive, so that ids stay theirs.
    """

    def __init__(self, module: str | None, found: Mapping[int, tuple[Any, str]] | None = None):
        self.module = module
        self.found = dict(found or {})
        self.unknown: set[str] = set()

    def of(self, value: Any) -> str:
        """The digest of a value; a loop instead of a recursion, so that it may be nested at any depth."""
        last = self._begin(value)
        stack = [] if isinstance(last, str) else [(value, last)]
        answer = last if isinstance(last, str) else None
        while stack:
            value, parts = stack[-1]
            try:
                child = parts.send(answer) if answer is not None else next(parts)
            except StopIteration as end:
                answer = digest(*(part.encode() + b"\0" for part in (_kind(value), *end.value)))
                self.found[id(value)] = value, answer
                stack.pop()
                continue
            begun = self._begin(child)
            answer = begun if isinstance(begun, str) else None
            if not isinstance(begun, str):
                stack.append((child, begun))
        assert answer is not None
        return answer

    def _begin(self, value: Any) -> str | _Parts:
        """A value's digest if it is known, or else its parts."""
        if type(value) in _PLAIN:
            return digest(type(value).__name__.encode(), repr(value).encode())
        if id(value) not in self.found:
            self.found[id(value)] = value, _kind(value)  # if it is met inside itself
            return self._parts(value)
        return self.found[id(value)][1]

    def _parts(self, value: Any) -> _Parts:
        """Yields what a value holds, and receives the digests of that."""
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return (yield from self._array(value))
        if isinstance(value, types.FunctionType):
            return (yield from self._function(value))
        if isinstance(value, types.CodeType):
            constants = value.co_code, value.co_exceptiontable, value.co_consts
            return (yield from _each((*constants, *_names(value))))
        if isinstance(value, types.ModuleType):
            return [value.__name__]
        if isinstance(value, os.PathLike):
            return [str(os.fspath(value))]
        if isinstance(value, type):
            return (yield from self._class(value))
        if isinstance(value, types.MethodType | staticmethod | classmethod):
            return (yield from _each((value.__func__, getattr(value, "__self__", None))))
        if isinstance(value, functools.partial):
            return (yield from _each((value.func, value.args, value.keywords, vars(value))))
        if isinstance(value, property):
            return (yield from _each((value.fget, value.fset, value.fdel)))
        if isinstance(value, functools.cached_property):
            return [(yield value.func)]
        if type(value).__module__ in _EMPTY:
            return []
        if type(value) in (dict, types.MappingProxyType):
            return (yield from _mapping(value))
        if type(value) in (set, frozenset):
            return self._set(value)
        if type(value) in (list, tuple):
            if all(type(each) in _PLAIN for each in value):
                return [repr(value)]
            return (yield from _each(value))
        return (yield from self._instance(value))

    def _array(self, value: Any) -> _Parts:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return [
                str(jax.random.key_impl(value)),
                digest_arrays({"": np.asarray(jax.random.key_data(value))}),
            ]
        array = np.asarray(value)
        if array.dtype.hasobject:
            return [str(array.shape), *(yield from _each((array.dtype.descr, array.tolist())))]
        held = yield from _each((vars(value),) if type(value).__module__ == self.module else ())
        return [digest_arrays({"": array}), *held]

    def _function(self, value: types.FunctionType) -> _Parts:
        own = value.__globals__.get("__name__") == self.module
        parts = [f"{value.__globals__.get('__name__')}.{value.__qualname__}"]
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        parts += yield from _each((value.__defaults__, value.__kwdefaults__, held))
        if own:
            used = _globals_of(value)
            parts += yield from _each((value.__code__, used, vars(value)))
        return parts

    def _class(self, value: type) -> _Parts:
        parts = [f"{value.__module__}.{value.__qualname__}"]
        if value.__module__ == self.module:
            members = {name: each for name, each in vars(value).items() if name not in _OF_CLASS}
            parts += yield from _each((type(value), value.__bases__, members))
        return parts

    def _set(self, value: Iterable[Any]) -> list[str]:
        """The digests of a set's elements, each as if it were met first: their order is not determined."""
        found = []
        for each in value:
            met = {key: (of, kind) for key, (of, kind) in self.found.items() if kind == _kind(of)}
            alone = _Digests(self.module, met)
            found.append(alone.of(each))
            self.unknown |= alone.unknown
        return sorted(found)

    def _instance(self, value: Any) -> _Parts:
        """Yields the parts from which a value can be built again."""
        if any(value is each for each in _shared_randomness()):
            return []
        kind = type(value)
        if (tensor := _tensor(value)) is not None:
            return (yield from _each((kind, *tensor)))
        is_linen = any(base.__module__.startswith("flax.linen") for base in kind.__mro__)
        if is_linen and dataclasses.is_dataclass(kind):
            # Everything else in a module of Linen is numbered by the order in which modules are made.
            held = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(kind)}
            return (yield from _each((kind, held)))
        wrapped = getattr(value, "__wrapped__", None) if callable(value) else None  # of jax.jit, lru_cache
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # what cannot be pickled raises almost anything
            reduced = None
        if isinstance(reduced, tuple):
            build, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
            if isinstance(state, dict):
                state = {name: each for name, each in state.items() if not _is_lazy(kind, name)} or None
            values = kind, build, arguments, state, list(items or ()), list(pairs or ()), wrapped
            return (yield from _each(values))
        if wrapped is not None:
            return [(yield wrapped)]
        if isinstance(reduced, str):
            return [reduced]
        text = repr(value)
        if " at 0x" in text:
            self.unknown.add(_kind(value))
            text = ""
        return [text, (yield kind)]


def _each(values: Iterable[Any]) -> _Parts:
    parts = []
    for value in values:
        parts.append((yield value))
    return parts


def _mapping(value: Mapping[Any, Any]) -> _Parts:
    if all(type(name) is str for name in value):
        value = {name: value[name] for name in sorted(value)}
    parts = []
    for name, each in value.items():
        parts.append((yield name) + (yield each))
    return sorted(parts)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_lazy(kind: type, name: Any) -> bool:
    """Whether an attribute is computed when it is first read."""
    return any(isinstance(vars(base).get(name), functools.cached_property) for base in kind.__mro__)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    return code.co_names, code.co_varnames, code.co_freevars


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The global values that a function reads, and the functions inside it.

    Of a namespace of options, those that it reads by name: others, such as where to write, change nothing.
    """
    read: dict[str, set[str | None]] = {}
    _read_by(function.__code__, read)
    found = {}
    for name in sorted(read.keys() & function.__globals__.keys()):
        value, attributes = function.__globals__[name], read[name]
        if isinstance(value, _NAMESPACES) and type(value) in _NAMESPACES and None not in attributes:
            value = {each: getattr(value, each) for each in attributes if each and hasattr(value, each)}
        found[name] = value
    return found


def _read_by(code: types.CodeType, found: dict[str, set[str | None]]) -> None:
    """Collects global names with the attributes read of them; None where the value itself is used."""
    instructions = list(dis.get_instructions(code))
    for i, each in enumerate(instructions):
        if each.opname.startswith("LOAD") and ("GLOBAL" in each.opname or "NAME" in each.opname):
            after = instructions[i + 1] if i + 1 < len(instructions) else each
            by_name = after.opname in ("LOAD_ATTR", "LOAD_METHOD")
            found.setdefault(each.argval, set()).add(after.argval if by_name else None)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _read_by(constant, found)


def _tensor(value: Any) -> tuple[Any, ...] | None:
    """The content of a tensor or generator of PyTorch, whose pickles are numbered by addresses."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor | torch.Generator):
        return None
    if isinstance(value, torch.Generator):
        return (value.get_state().numpy(),)
    value = value.detach().cpu()
    if value.layout != torch.strided or value.is_quantized:
        return str(value.layout), str(value.dtype), value.to_dense().tolist()
    flat = value.contiguous().reshape(-1)
    return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy()


def _shared_randomness() -> list[Any]:
    """The generators that a whole process shares: they are not a script's own, and begin somewhere else."""
    torch = sys.modules.get("torch")
    shared = [random.random.__self__, np.random.get_state.__self__]
    return shared if torch is None else [*shared, torch.default_generator]

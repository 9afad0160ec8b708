"""Calls as data: how a standard arm is built, to be made with any learning rate or written as code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MODULES = {"adaptive_optax": "ao", "optax.contrib": "optax.contrib", "optax": "optax"}  # names in code
IMPORTS = {"ao.": "import adaptive_optax as ao", "optax.": "import optax"}
WIDTH = 100  # of a line of code


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a public function of this library or of optax; arguments may be calls themselves."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of what a call returns."""

    call: Call
    name: str


def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Call:
    """Describes a call, which `made` makes and `written` writes."""
    return Call(function, arguments, keywords)


def made(value: Any) -> Any:
    """Makes a call; what is no call is returned as it is."""
    if isinstance(value, Call):
        keywords = {name: made(each) for name, each in value.keywords.items()}
        return value.function(*map(made, value.arguments), **keywords)
    return getattr(made(value.call), value.name) if isinstance(value, Field) else value


def written(assignments: Mapping[str, Any]) -> str:
    """Writes assignments as code with its imports; a call that has a name is referred to by it."""
    names: dict[int, str] = {}
    lines = []
    for name, value in assignments.items():
        lines.append(f"{name} = {_expression(value, names, WIDTH - len(name) - 3)}")
        names[id(value)] = name
    body = "\n".join(lines)
    used = [line for prefix, line in IMPORTS.items() if f" {prefix}" in body or f"({prefix}" in body]
    return "\n".join([*used, *lines])


def shortest(rate: float) -> float:
    """The shortest number that is the same in float32, as a state holds 0.1 as 0.10000000149011612."""
    return float(str(np.float32(rate))) if float(np.float32(rate)) == rate else rate


def _expression(value: Any, names: Mapping[int, str], width: int) -> str:
    if isinstance(value, Field):
        return f"{_expression(value.call, names, width)}.{value.name}"
    if not isinstance(value, Call):
        return repr(value)
    if id(value) in names:
        return names[id(value)]
    module = value.function.__module__
    place = next(name for prefix, name in MODULES.items() if module.startswith(prefix))
    arguments = [_expression(each, names, WIDTH) for each in value.arguments]
    arguments += [f"{name}={_expression(each, names, WIDTH)}" for name, each in value.keywords.items()]
    function, line = f"{place}.{value.function.__name__}", ", ".join(arguments)
    if len(f"{function}({line})") <= width:
        return f"{function}({line})"
    return "\n".join([f"{function}(", *(f"    {argument}," for argument in arguments), ")"])

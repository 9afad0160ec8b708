"""Loads the user's own tasks and arms by name: "package.module:task", "path/to/file.py:my_arm"."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

from adaptive_optax.study.arms import OPTIMIZERS, arm, is_standard
from adaptive_optax.study.engine.run import Train
from adaptive_optax.study.evaluation import Arm
from adaptive_optax.study.origin import described
from adaptive_optax.study.start import Start
from adaptive_optax.study.task import Task


def load_task(name: str) -> Task:
    """Loads `MODULE:TASK`, a task or a function without arguments that makes one.

    Raises:
        ValueError: If there is no such task. For an error in the user's code, the message has file and line.
    """
    return _as_task(name, _load("MODULE:TASK must name a module and a task", name))


def load_subject(name: str) -> Task | Train:
    """Loads `MODULE:TASK`, or `MODULE:TRAIN`: a training function, which takes one argument, the run.

    Raises:
        ValueError: As `load_task`.
    """
    found = _load("MODULE:TASK must name a module and a task", name)
    if callable(found) and not isinstance(found, Task) and _takes_a_run(found):
        return found
    return _as_task(name, found)


def load_starts(name: str) -> list[Start]:
    """Loads `MODULE:START`: a start, several, or a function without arguments that returns them.

    Raises:
        ValueError: If there is none. For an error in the user's code, the message has file and line.
    """
    found = _load("MODULE:START must name a module and a start", name)
    if callable(found) and not isinstance(found, Start):
        found = _called(name, found, "starts")
    starts = [found] if isinstance(found, Start) else found
    if not (isinstance(starts, list | tuple) and starts and all(isinstance(each, Start) for each in starts)):
        raise ValueError(
            f"{name} must be a study.Start, several, or return them, got {type(found).__name__}."
        )
    return list(starts)


def _takes_a_run(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return False
    needed = [p for p in parameters if p.default is p.empty]
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)


def _as_task(name: str, found: Any) -> Task:
    """A task, made by a function if it is one."""
    if callable(found) and not isinstance(found, Task):
        found = _called(name, found, "a task")
    if not isinstance(found, Task):
        raise ValueError(f"{name} must be a study.Task or return one, got {type(found).__name__}.")
    return found


def _called(name: str, function: Callable[[], Any], what: str) -> Any:
    """What a function of the user's returns; an error in it is reported with its place."""
    try:
        return function()
    except ImportError as error:
        raise ValueError(f"{name} cannot import what it needs: {described(error).rstrip('.')}.") from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name} must return {what} when called without arguments: {described(error).rstrip('.')}."
        ) from error


class LoadedArm(NamedTuple):
    """An arm and its source: the name of a standard arm, or `MODULE:ARM`."""

    name: str
    arm: Arm
    source: str


def load_arms(text: str) -> list[LoadedArm]:
    """Loads comma-separated arms, each in the form that `load_arm` takes.

    Raises:
        ValueError: If one cannot be loaded, or two have the same name.
    """
    arms: dict[str, LoadedArm] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        found = load_arm(part)
        if found.name in arms:
            raise ValueError(
                f"arms must have distinct names, got {found.name!r} twice; name them, as in mine={part}."
            )
        arms[found.name] = found
    return [*arms.values()]


def load_arm(text: str) -> LoadedArm:
    """Loads an arm, a standard one by its name (`study.arm`) or `MODULE:ARM`.

    Standard names take precedence over modules. The user's own arm is named as in its
    module; the prefix `NAME=` renames any arm.

    Raises:
        ValueError: If it is not a standard arm and cannot be loaded.
    """
    given, equals, spec = (part.strip() for part in text.partition("="))
    if not equals:
        given, spec = "", given
    elif not given:
        raise ValueError(f"arm {text!r}: expected a name before '='.")
    if is_standard(spec):
        return LoadedArm(given or spec, arm(spec), spec)
    try:
        found = _load("it must name a module and an arm", spec)
    except ValueError as error:
        raise ValueError(
            f"arm {spec!r}: the optimizer must be one of {', '.join(OPTIMIZERS)}; read as your own arm, "
            f"MODULE:ARM: {error}"
        ) from error
    if not callable(found):
        raise ValueError(
            f"{spec} must be an arm, a function of (learning_rate, total_steps), got {type(found).__name__}."
        )
    return LoadedArm(given or spec.rpartition(":")[2], cast(Arm, found), spec)


def load_function(option: str, name: str) -> Callable[..., Any]:
    """Loads `MODULE:FUNCTION`.

    Raises:
        ValueError: If there is none; the message names the option.
    """
    found = _load(f"{option} must name a module and a function", name)
    if not callable(found):
        raise ValueError(f"{option} must name a function, got {type(found).__name__} at {name!r}.")
    return found


def _load(what: str, name: str) -> Any:
    """Loads an attribute of a module or a file."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute or (place.startswith(".") and not place.endswith(".py")):
        raise ValueError(f"{what} in it, got {name!r}.")
    try:
        module = _import(place)
    except SystemExit as error:
        raise ValueError(
            f"{place!r} cannot be imported: it ends the program, {described(error)}; put code that only a "
            "script runs under if __name__ == '__main__'."
        ) from error
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and place.partition(".")[0] == error.name
        reason = str(error) if absent else described(error)
        raise ValueError(f"{place!r} cannot be imported: {reason}.") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"module {place!r} has no {attribute!r}.") from error


def _import(place: str) -> ModuleType:
    _find_first(os.getcwd())
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    _find_first(str(path.parent))  # as for a script, modules beside it can be imported
    return _import_file(path, path.stat().st_mtime_ns)


def _find_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


@functools.cache
def _import_file(path: Path, changed: int) -> ModuleType:
    """Imports a file, once for all names loaded from it."""
    del changed  # only a cache key: a changed file is a new module
    name = str(path) if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # because the path ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes in it may look themselves up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

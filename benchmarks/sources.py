"""Which modules of the library a result measured, and which of them have changed since.

A result keeps a hash of the code of each module, without comments, docstrings and blank lines. Where one
differs today, the tables say so: the numbers are those of older code until they are measured again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = "adaptive_optax"
ONLY_SHOWS = ("study.engine.progress", "study.report.", "monitoring.picture", "_core.drawing")  # no number
NAMED = 2  # changed modules that a table names; it counts the others


def fingerprints(roots: Iterable[str]) -> dict[str, str]:
    """Returns the hash of each module that `roots` are or import, by name: "transforms.adam".

    Modules that only show something are left out.

    Args:
        roots: Modules of the library, without its name in front.

    Raises:
        ValueError: If the library has no such module.
    """
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        if (name := waiting.pop()) in found or name.startswith(ONLY_SHOWS):
            continue
        if not (found_here := _fingerprint(PROJECT, name)):
            raise ValueError(f"{PACKAGE} has no module {name!r} to measure.")
        found[name] = found_here
        waiting += _imports(_path(PROJECT, name).read_text())
    return dict(sorted(found.items()))


def changed(recorded: Mapping[str, str], project: Path = PROJECT) -> list[str]:
    """Returns the modules whose code is not what was recorded, or that are gone."""
    return [name for name, code in recorded.items() if _fingerprint(project, name) != code]


def mark(recorded: Mapping[str, str]) -> str:
    """Returns what the tables say of a result whose code has changed: "" if it has not."""
    if not (names := changed(recorded)):
        return ""
    shown, rest = names[:NAMED], len(names[NAMED:])
    more = f" and {rest} more module{'s' * (rest > 1)}" if rest else ""
    return "**measured before changes** to " + ", ".join(f"`{name}`" for name in shown) + more


def code(text: str) -> str:
    """Returns a module's text without comments, docstrings and blank lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            for row in range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _imports(text: str) -> list[str]:
    """The modules of the library that a module imports. A package is none: what it exports need not run."""
    named: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            named += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
    inside = [name.removeprefix(f"{PACKAGE}.") for name in named if name.startswith(f"{PACKAGE}.")]
    return [name for name in inside if _path(PROJECT, name).exists()]


def _path(project: Path, name: str) -> Path:
    return project.joinpath(PACKAGE, *name.split(".")).with_suffix(".py")


@functools.cache
def _fingerprint(project: Path, name: str) -> str:
    """The hash of a module's code, "" if there is no such module."""
    path = _path(project, name)
    return hashlib.sha256(code(path.read_text()).encode()).hexdigest()[:12] if path.exists() else ""

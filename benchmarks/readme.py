"""Generates the tables of the README, and of pages of the site, from results.

A benchmark's table stands between `<!-- benchmark:SUITE TABLE -->` and `<!-- /benchmark -->`, a published
study's between `<!-- study:FOLDER -->` and `<!-- /study -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.setting import origin
from benchmarks.tables import Table

_MARK = re.compile(r"<!-- */?(?:benchmark|study)[^\n]*")
_BLOCK = re.compile(
    r"<!-- (?:benchmark:(?P<suite>\w+) (?P<table>\w+)|study:(?P<study>[\w/]+)) -->\n"
    r"(?:(?!<!-- (?:benchmark|study)).)*?<!-- /(?(suite)benchmark|study) -->",
    re.DOTALL,
)


def render(
    text: str,
    results: Mapping[str, Mapping[str, dict[str, Any]]],
    tables: Mapping[str, Callable[[dict[str, Any]], dict[str, Table]]],
    studies: Mapping[str, str] | None = None,
    root: str = "",
) -> str:
    """Returns a page with regenerated blocks.

    Args:
        text: The page.
        results: The results, by suite and hardware.
        tables: For each suite, the function that makes tables from a result.
        studies: The text of each published study, by its folder.
        root: The way from the page to the project's folder, such as "../".

    Raises:
        ValueError: If a block names an unknown suite, table or study, or a mark belongs to no block.
    """
    if stray := _MARK.search(_BLOCK.sub("", text)):
        raise ValueError(
            f"{stray[0]!r} is not a block of the README; a block is <!-- benchmark:SUITE TABLE -->, "
            "its text, and <!-- /benchmark -->, or the same with study:FOLDER and /study."
        )

    def block(found: re.Match[str]) -> str:
        if study := found["study"]:
            return f"<!-- study:{study} -->\n{_study(study, studies or {})}<!-- /study -->"
        suite, name = found["suite"], found["table"]
        made = _benchmark(suite, name, results, tables, root)
        return f"<!-- benchmark:{suite} {name} -->\n{made}<!-- /benchmark -->"

    return _BLOCK.sub(block, text)


def _study(name: str, studies: Mapping[str, str]) -> str:
    if name not in studies:
        raise ValueError(
            f"The README has a block of the study {name!r}; the studies are {', '.join(studies)}."
        )
    return studies[name]


def _benchmark(
    suite: str,
    name: str,
    results: Mapping[str, Mapping[str, dict[str, Any]]],
    tables: Mapping[str, Callable[[dict[str, Any]], dict[str, Table]]],
    root: str,
) -> str:
    """The table of a suite on each hardware."""
    if suite not in tables:
        raise ValueError(
            f"The README has a block of the suite {suite!r}; the suites are {', '.join(tables)}."
        )
    parts = []
    for hardware, result in results.get(suite, {}).items():
        made = tables[suite](result)
        if name not in made:
            raise ValueError(f"{suite} has no table {name!r}; it has {', '.join(made)}.")
        source = f"[numbers]({root}benchmarks/results/{suite}_{hardware}.json)"
        parts.append(f"{made[name].title} ({origin(result)}; {source}):\n\n{made[name].markdown()}\n")
    if not parts:
        raise ValueError(f"There is no result of the suite {suite!r}; run it first.")
    return "\n".join(parts)

"""Generates the README's tables from results, between `<!-- benchmark:SUITE TABLE -->` and its end mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.setting import described
from benchmarks.tables import Table

_BLOCK = re.compile(
    r"<!-- benchmark:(\w+) (\w+) -->\n((?:(?!<!-- benchmark).)*?)<!-- /benchmark -->", re.DOTALL
)
_MARK = re.compile(r"<!-- */?benchmark[^\n]*")


def render(
    text: str,
    results: Mapping[str, Mapping[str, dict[str, Any]]],
    tables: Mapping[str, Callable[[dict[str, Any]], dict[str, Table]]],
) -> str:
    """Returns the README with regenerated blocks.

    Args:
        text: The README.
        results: The results, by suite and hardware.
        tables: For each suite, the function that makes tables from a result.

    Raises:
        ValueError: If a block names an unknown suite or table, or if a mark does not belong to a block.
    """
    if stray := _MARK.search(_BLOCK.sub("", text)):
        raise ValueError(
            f"{stray[0]!r} is not a block of the README; a block is <!-- benchmark:SUITE TABLE -->, "
            "its text, and <!-- /benchmark -->."
        )

    def block(found: re.Match[str]) -> str:
        suite, name, _ = found.groups()
        if suite not in tables:
            raise ValueError(
                f"The README has a block of the suite {suite!r}; the suites are {', '.join(tables)}."
            )
        parts = []
        for hardware, result in results.get(suite, {}).items():
            made = tables[suite](result)
            if name not in made:
                raise ValueError(f"{suite} has no table {name!r}; it has {', '.join(made)}.")
            source = f"[numbers](benchmarks/results/{suite}_{hardware}.json)"
            parts.append(f"{made[name].title} ({described(result)}; {source}):\n\n{made[name].markdown()}\n")
        if not parts:
            raise ValueError(f"There is no result of the suite {suite!r}; run it first.")
        return f"<!-- benchmark:{suite} {name} -->\n" + "\n".join(parts) + "<!-- /benchmark -->"

    return _BLOCK.sub(block, text)

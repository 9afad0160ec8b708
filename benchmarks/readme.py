"""Puts measured numbers into the README and the pages of the site, from results.

Four kinds of marks hold them:

    <!-- benchmark:SUITE TABLE --> ... <!-- /benchmark -->    a suite's table, one for each hardware
    <!-- study:FOLDER --> ... <!-- /study -->                 the table of a published study
    <!-- slower --> ... <!-- /slower -->                      every ratio that is clearly above 1
    <!-- cell:SOURCE | ROW | COLUMN -->...<!-- /cell -->      the first number in a cell of such a table

In a cell's mark SOURCE is `benchmark SUITE TABLE` (on the first hardware), `study FOLDER` or `facts FOLDER`
(numbers of a study that stand in no table), ROW the
beginnings of the row's first cells, separated by ";", and COLUMN the beginning of the column's title. With
`| size` at the end the number is shown as a whole number of per cent, without its sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.setting import origin
from benchmarks.slower import slower
from benchmarks.studies import Study
from benchmarks.tables import Table

_MARK = re.compile(r"<!-- */?(?:benchmark|study|slower|cell)[^\n]*")
_BLOCK = re.compile(
    r"<!-- (?:benchmark:(?P<suite>\w+) (?P<table>\w+)|study:(?P<study>[\w/]+)) -->\n"
    r"(?:(?!<!-- (?:benchmark|study)).)*?<!-- /(?(suite)benchmark|study) -->",
    re.DOTALL,
)
_CELL = re.compile(
    r"<!-- cell:(?P<mark>(?P<source>[^|\n]+) \| (?P<row>[^|\n]+) \| (?P<column>[^|\n]+?)"
    r"(?P<size> \| size)?) -->[^<\n]*<!-- /cell -->"
)
_SLOWER = re.compile(r"<!-- slower -->\n(?:(?!<!-- slower).)*?<!-- /slower -->", re.DOTALL)
_EARLY = re.compile(r"^[ \t]*<!-- cell:[^\n]*", re.MULTILINE)
_NUMBER = re.compile(r"[+−-]?\d[\d,]*(?:\.\d+)?")

Tables = Mapping[str, Callable[[dict[str, Any]], dict[str, Table]]]
Results = Mapping[str, Mapping[str, dict[str, Any]]]


def render(
    text: str,
    results: Results,
    tables: Tables,
    studies: Mapping[str, Study] | None = None,
    root: str = "",
) -> str:
    """Returns a page with regenerated tables and numbers.

    Args:
        text: The page.
        results: The results, by suite and hardware.
        tables: For each suite, the function that makes tables from a result.
        studies: The published studies, by folder.
        root: The way from the page to the project's folder, such as "../".

    Raises:
        ValueError: If a mark names an unknown suite, table, study, row or column, is not complete, or is one
            of a cell at the beginning of a line.
    """
    if early := _EARLY.search(text):
        raise ValueError(f"{early[0]!r} begins a line, where Markdown takes it for the end of a paragraph.")
    if stray := _MARK.search(_CELL.sub("", _SLOWER.sub("", _BLOCK.sub("", text)))):
        raise ValueError(
            f"{stray[0]!r} is not a block of the README; a block is <!-- benchmark:SUITE TABLE -->, "
            "its text, and <!-- /benchmark -->, the same with study:FOLDER and /study, or in a line "
            "<!-- cell:SOURCE | ROW | COLUMN -->, its number, and <!-- /cell -->."
        )

    def block(found: re.Match[str]) -> str:
        if name := found["study"]:
            study = _study(name, studies or {})
            title = study.title.replace("{root}", root)
            return f"<!-- study:{name} -->\n{title}\n\n{study.table.markdown()}\n<!-- /study -->"
        suite, name = found["suite"], found["table"]
        parts = []
        for hardware, (result, table) in _made(suite, name, results, tables).items():
            source = f"[numbers]({root}benchmarks/results/{suite}_{hardware}.json)"
            parts.append(f"{table.title} ({origin(result)}; {source}):\n\n{table.markdown()}\n")
        return f"<!-- benchmark:{suite} {name} -->\n" + "\n".join(parts) + "<!-- /benchmark -->"

    def cell(found: re.Match[str]) -> str:
        kind, *words = found["source"].split()
        if kind == "study" and len(words) == 1:
            table = _study(words[0], studies or {}).table
        elif kind == "facts" and len(words) == 1:
            table = _study(words[0], studies or {}).facts
        elif kind == "benchmark" and len(words) == 2:
            table = next(iter(_made(words[0], words[1], results, tables).values()))[1]
        else:
            raise ValueError(
                "The source of a cell must be 'benchmark SUITE TABLE', 'study FOLDER' or 'facts FOLDER', got "
                f"{found['source']!r}."
            )
        number = _number(table, found["row"], found["column"])
        if found["size"]:
            number = f"{abs(float(number.replace('−', '-').replace(',', ''))):.0f} %"
        return f"<!-- cell:{found['mark']} -->{number}<!-- /cell -->"

    def losses(_: re.Match[str]) -> str:
        every = (
            (suite, table)
            for suite, by_hardware in results.items()
            for result in by_hardware.values()
            for table in tables[suite](result).values()
        )
        return f"<!-- slower -->\n{slower(every).markdown()}\n<!-- /slower -->"

    return _CELL.sub(cell, _SLOWER.sub(losses, _BLOCK.sub(block, text)))


def _study(name: str, studies: Mapping[str, Study]) -> Study:
    if name not in studies:
        raise ValueError(
            f"The README has a block of the study {name!r}; the studies are {', '.join(studies)}."
        )
    return studies[name]


def _made(suite: str, name: str, results: Results, tables: Tables) -> dict[str, tuple[dict[str, Any], Table]]:
    """The results of a suite and one of its tables, by hardware."""
    if suite not in tables:
        raise ValueError(
            f"The README has a block of the suite {suite!r}; the suites are {', '.join(tables)}."
        )
    found = {}
    for hardware, result in results.get(suite, {}).items():
        made = tables[suite](result)
        if name not in made:
            raise ValueError(f"{suite} has no table {name!r}; it has {', '.join(made)}.")
        found[hardware] = result, made[name]
    if not found:
        raise ValueError(f"There is no result of the suite {suite!r}; run it first.")
    return found


def _number(table: Table, row: str, column: str) -> str:
    """The number at the beginning of a cell."""
    columns = [i for i, title in enumerate(table.columns) if title.startswith(column)]
    starts = [each.strip() for each in row.split(";")]
    rows = [cells for cells in table.rows if all(map(str.startswith, cells, starts))]
    # "adam" is the beginning of "adamw", too.
    rows = [cells for cells in rows if cells[len(starts) - 1] == starts[-1]] or rows
    if not columns or len(rows) != 1:
        raise ValueError(
            f"{table.title!r} must have one row that begins with {row!r} and a column {column!r}; it has "
            f"{len(rows)} such rows and the columns {', '.join(table.columns)}."
        )
    if not (found := _NUMBER.match(rows[0][columns[0]])):
        raise ValueError(f"The cell {row!r}, {column!r} has no number: {rows[0][columns[0]]!r}.")
    return found[0]

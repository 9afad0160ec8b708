"""Where the library is slower than what it was compared with: every ratio of times clearly above 1."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.tables import Table

# A median ratio with quartiles, or with its interval, as `tables.ratio` writes it.
_RATIO = re.compile(r"(\d+\.\d\d) \((\d+\.\d\d)–(\d+\.\d\d)\)")
_NUMBER = re.compile(r"[\d.,]+")


def slower(tables: Iterable[tuple[str, Table]]) -> Table:
    """Returns a row for every ratio of times whose lower quartile is above 1, the largest first.

    Of a ratio of speeds, the upper quartile is below 1.

    Args:
        tables: Suites, each with a table of its results, whose rows begin with what was measured.
    """
    found = []
    for suite, table in tables:
        for cells in table.rows:
            first = list(zip(table.columns, cells, strict=True))[:2]
            names = [cell for _, cell in first if not (_NUMBER.fullmatch(cell) or _RATIO.fullmatch(cell))]
            names = names or [f"{cell} {column}" for column, cell in first]
            for column, cell in zip(table.columns, cells, strict=True):
                if not (ratio := _RATIO.fullmatch(cell)):
                    continue
                median, low, high = map(float, ratio.groups())
                if high < 1 if table.of_speeds else low > 1:
                    what = ", ".join([*names, *([] if column == "ratio" else [column])])
                    found.append((1 / median if table.of_speeds else median, [suite, what, cell]))
    made = Table("Where it is slower", ["suite", "what", "ratio"])
    for _, row in sorted(found, key=lambda each: -each[0]):
        made.add(*row)
    return made

"""Where the library is slower than what it was compared with: every ratio in the tables that is clearly above 1."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.tables import Table

# A median ratio with quartiles, or with its interval, as `tables.ratio` writes it.
_RATIO = re.compile(r"(\d+\.\d\d) \((\d+\.\d\d)–(\d+\.\d\d)\)")
_NUMBER = re.compile(r"[<>+−-]?\s*\d")


def slower(tables: Iterable[Table]) -> Table:
    """Returns a row for every ratio whose lower quartile is above 1, the largest first.

    Args:
        tables: Tables of results, whose rows begin with what was measured.
    """
    found = []
    for table in tables:
        for cells in table.rows:
            names = [title for title in cells[:3] if title and not _NUMBER.match(title)]
            for column, cell in zip(table.columns, cells, strict=True):
                if (ratio := _RATIO.fullmatch(cell)) and float(ratio[2]) > 1:
                    what = ", ".join([*names, *([] if column == "ratio" else [column])])
                    found.append((float(ratio[1]), [table.title, what, cell]))
    made = Table("Where it is slower", ["table", "what", "ratio"])
    for _, row in sorted(found, key=lambda each: -each[0]):
        made.add(*row)
    return made

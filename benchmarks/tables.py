"""Tables of results for the screen and the README, and the formatting of their numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import rich.table


@dataclasses.dataclass
class Table:
    """A title, columns and rows of text.

    Attributes:
        title: What the numbers are.
        columns: The columns' titles.
        rows: The cells.
        of_speeds: Whether ratios are those of speeds, which should be high, and not of times.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    of_speeds: bool = False

    def add(self, *cells: str) -> None:
        """Adds a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"A row of {self.title!r} has {len(self.columns)} cells, got {len(cells)}.")
        self.rows.append(list(cells))

    def markdown(self) -> str:
        """Returns columns and rows as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def rich(self) -> rich.table.Table:
        """Returns the table for the screen."""
        table = rich.table.Table(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table


def digits(number: float | None, significant: int = 3) -> str:
    """Formats a number with at least that many significant digits; None as an empty string."""
    if number is None:
        return ""
    before = math.floor(math.log10(abs(number))) + 1 if number else 1
    return f"{number:,.{max(0, significant - before)}f}"


def ratio(timed: Mapping[str, Any] | None) -> str:
    """Formats a median ratio with its quartiles; None as an empty string."""
    if timed is None:
        return ""
    found = timed["ratio"]
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"

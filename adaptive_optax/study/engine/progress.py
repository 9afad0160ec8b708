"""A live progress bar in a terminal, and silence everywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrialProgress:
    """Shows which arm is at work, how many trials are done, the best metric so far and the time left.

    Args:
        total: The number of trials, as far as it is known.
        show: Whether to show anything; None shows it where the output is a terminal.
    """

    def __init__(self, total: int, show: bool | None = None):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} trials"),
            TextColumn("{task.fields[best]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not (console.is_terminal if show is None else show),
        )
        self._task = self._bar.add_task("starting", total=total, best="")
        self._total, self._best = total, float("inf")

    def __enter__(self) -> TrialProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def describe(self, text: str) -> None:
        """Says what is at work."""
        self._bar.update(self._task, description=text)

    def extend(self, trials: int) -> None:
        """Makes the whole longer, as when a grid grows."""
        self._total += trials
        self._bar.update(self._task, total=self._total)

    def advance(self, trials: float) -> None:
        """Counts trials, or parts of them, as done."""
        self._bar.advance(self._task, trials)

    def seen(self, metric: float) -> None:
        """Takes note of a final metric."""
        if metric < self._best:
            self._best = metric
            self._bar.update(self._task, best=f"best {metric:.4g}")

    @contextlib.contextmanager
    def part(self, trials: int) -> Iterator[Callable[[float], None]]:
        """Gives a function that takes how far these trials are, from 0 to 1."""
        shown = 0.0

        def reached(fraction: float) -> None:
            nonlocal shown
            self.advance((fraction - shown) * trials)
            shown = fraction

        yield reached

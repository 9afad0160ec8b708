"""A live progress bar in a terminal, and no output elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adaptive_optax._core.names import shortened
from adaptive_optax.study.direction import MINIMIZE, Direction
from adaptive_optax.study.engine.chunks import Key
from adaptive_optax.study.statistics.paired import mean_and_error


class TrialProgress:
    """Shows the current arm, the number of finished trials, the leading arm and the time left.

    Args:
        total: The number of trials known so far.
        show: Whether to show anything; None shows it if the output is a terminal.
        direction: Which metrics are better.
    """

    def __init__(self, total: int, show: bool | None = None, direction: Direction = MINIMIZE):
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
        self._total, self._direction = total, direction
        self._metrics: dict[str, dict[tuple[str, float], list[float]]] = {}  # by phase, of each arm and rate

    def __enter__(self) -> TrialProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def describe(self, text: str) -> None:
        """Shows what is running."""
        self._bar.update(self._task, description=shortened(text, 60))

    def extend(self, trials: int) -> None:
        """Adds to the total, as when a grid grows."""
        self._total += trials
        self._bar.update(self._task, total=self._total)

    def advance(self, trials: float) -> None:
        """Counts trials, or fractions of them, as done."""
        self._bar.advance(self._task, trials)

    def seen(self, phase: str, key: Key, metric: float) -> None:
        """Records a final metric, and shows which arm leads in this phase, with its standard error."""
        found = self._metrics.setdefault(phase, {})
        found.setdefault((key.arm, key.rate), []).append(float(metric))
        means = {each: mean_and_error(np.array(values)) for each, values in found.items()}
        (arm, rate), (mean, error) = min(
            means.items(), key=lambda item: np.nan_to_num(self._direction.cost(item[1][0]), nan=np.inf)
        )
        spread = f" ± {error:.2g}" if np.isfinite(error) else ""
        self._bar.update(self._task, best=f"{shortened(arm, 24)} at {rate:g} leads, {mean:.4g}{spread}")

    @contextlib.contextmanager
    def part(self, trials: int) -> Iterator[Callable[[float], None]]:
        """Yields a function to report the progress of these trials, from 0 to 1."""
        shown = 0.0

        def reached(fraction: float) -> None:
            nonlocal shown
            self.advance((fraction - shown) * trials)
            shown = fraction

        yield reached

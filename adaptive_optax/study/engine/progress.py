"""A live progress bar in a terminal; elsewhere, as in a log file, a plain line now and then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from adaptive_optax._core.names import shortened, visible
from adaptive_optax.study.direction import MINIMIZE, Direction
from adaptive_optax.study.engine.chunks import Key
from adaptive_optax.study.statistics.paired import mean_and_error

SHOWN = 3  # leading arms
EVERY = 30.0  # seconds between plain lines
SHORT = 10.0  # seconds: a study that takes less is not announced by a plain line


class _Bar(Progress):
    """A progress bar with a line below."""

    below: str = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.below:
            yield Text(self.below, style="dim")


class TrialProgress:
    """Shows what is running, the number of finished trials, the time left, the cost and the leading arms.

    Without a terminal it writes plain lines to the standard error: an estimate after the first trials, and
    every half a minute how far the study has come. In a notebook it writes nothing.

    Args:
        total: The number of trials known so far.
        show: True shows the bar, False nothing; None the bar in a terminal and plain lines elsewhere.
        direction: Which metrics are better.
        steps: Training steps per trial, for the estimate of the cost; 0 for no estimate.
        open_ended: Whether the trials so far may decide that there are more.
        name: What is studied.
        compiles: Whether the first trials take longer because they are compiled.
    """

    def __init__(
        self,
        total: int,
        show: bool | None = None,
        direction: Direction = MINIMIZE,
        steps: int = 0,
        open_ended: bool = False,
        name: str = "study",
        compiles: bool = True,
    ):
        console = Console(stderr=True)
        self._bar = _Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} trials"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not (console.is_terminal if show is None else show),
        )
        self._task = self._bar.add_task("starting", total=total)
        self._total, self._direction, self._steps = total, direction, steps
        self._open_ended, self._name, self._compiles = open_ended, name, compiles
        plain = show is None and not console.is_terminal and not console.is_jupyter
        self._lines = console.file if plain else None
        self._began, self._done, self._found, self._leaders = time.perf_counter(), 0.0, 0, ""
        self._ended = threading.Event()
        self._metrics: dict[str, dict[str, dict[float, list[float]]]] = {}  # by phase, arm and rate

    def __enter__(self) -> TrialProgress:
        self._began = time.perf_counter()
        self._bar.start()
        if self._lines is not None:
            threading.Thread(target=self._report, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._bar.stop()

    def _report(self) -> None:
        """Writes a plain line every now and then."""
        while not self._ended.wait(EVERY):
            self._write(self.line)

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads, or the file was closed
            print(visible(line), file=self._lines, flush=True)

    @property
    def line(self) -> str:
        """How far the study has come, in one plain line."""
        elapsed, trained = time.perf_counter() - self._began, self._done - self._found
        left = ""
        if trained > 0:
            rest = elapsed / trained * max(self._total - self._done, 0)
            left = f", about {duration(rest)} left{' for these' * self._open_ended}"
        total = f"{'at least ' * self._open_ended}{self._total}"
        leaders = f"; {self._leaders}" if self._leaders else ""
        return f"{self._name}: {self._done:.0f} of {total} trials, {duration(elapsed)}{left}{leaders}"

    def describe(self, text: str) -> None:
        """Shows what is running."""
        self._bar.update(self._task, description=shortened(text, 60))

    def extend(self, trials: int) -> None:
        """Adds to the total, as when a grid grows."""
        self._total += trials
        self._bar.update(self._task, total=self._total)

    def advance(self, trials: float) -> None:
        """Counts trials, or fractions of them, as done."""
        self._done += trials
        self._bar.advance(self._task, trials)

    def found(self, trials: int) -> None:
        """Counts trials as done that are not trained now: a folder has them, or another process did them."""
        self._found += trials
        self.advance(trials)

    def took(self, seconds: float, trials: int) -> None:
        """Says, after the first chunk, what the study will cost."""
        if not self._steps or (self._bar.disable and self._lines is None):
            return
        each, least = seconds / trials, "at least " * self._open_ended
        whole = each * (self._total - self._found)
        found = f", {self._found} of them finished before" * bool(self._found)
        compiling = " with compiling" * self._compiles
        text = (
            f"{least}{self._total} trials of {self._steps:,} steps{found}; the first took {duration(each)}"
            f"{compiling}, {each / self._steps:.2g} s per step: about {duration(whole)} of computing"
            f"{' for these' * self._open_ended}."
        )
        self._steps = 0
        if self._lines is None:
            self._bar.print(text, markup=False, highlight=False)
        elif whole > SHORT:
            self._write(f"{self._name}: {text}")

    def seen(self, phase: str, key: Key, metric: float) -> None:
        """Records a final metric, and shows the leading arms of this phase with their standard errors."""
        arms = self._metrics.setdefault(phase, {})
        arms.setdefault(key.arm, {}).setdefault(key.rate, []).append(float(metric))
        leaders = []
        for arm, rates in arms.items():
            longest = max(map(len, rates.values()))  # a rate that drops out of a race does not lead
            whole = {rate: np.array(values) for rate, values in rates.items() if len(values) == longest}
            means = [(*mean_and_error(values), rate) for rate, values in whole.items()]
            if means := [each for each in means if np.isfinite(each[0])]:
                leaders.append((arm, *min(means, key=lambda each: self._direction.cost(each[0]))))
        leaders.sort(key=lambda each: self._direction.cost(each[1]))
        shown = [
            f"{shortened(arm, 24)} {mean:.4g}{f' ± {error:.2g}' if np.isfinite(error) else ''} at {rate:g}"
            for arm, mean, error, rate in leaders[:SHOWN]
        ]
        self._leaders = self._bar.below = f"leading: {'; '.join(shown)}" if shown else ""

    @contextlib.contextmanager
    def part(self, trials: int) -> Iterator[Callable[[float], None]]:
        """Yields a function to report the progress of these trials, from 0 to 1."""
        shown = 0.0

        def reached(fraction: float) -> None:
            nonlocal shown
            self.advance((fraction - shown) * trials)
            shown = fraction

        yield reached


def duration(seconds: float) -> str:
    """Formats a duration in at most two units."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

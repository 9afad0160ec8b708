"""The progress of a study in another process, read from its folder without disturbing it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptive_optax._core.names import shortened, visible
from adaptive_optax.study.details import Details
from adaptive_optax.study.engine.chunks import Results, Unusable, unpack
from adaptive_optax.study.engine.progress import duration
from adaptive_optax.study.engine.store import DETAILS
from adaptive_optax.study.result import FIRST_FRESH_SEED
from adaptive_optax.study.statistics.paired import mean_and_error


class Status(NamedTuple):
    """How far a study has come.

    Attributes:
        details: What was asked for, and what tuning has chosen so far.
        table: One row per arm: finished and wanted trials of tuning and of the verdict; the leading rate, the
            mean final metric there with its standard error, and the seeds that it is of ("tuning" or
            "fresh"); and trials that diverged, those that raised among them.
        running: Jobs that processes have claimed: they run, or wait in an executor's queue. A job is a trial
            of a training function, or a chunk of a task's.
        seconds_since: Seconds since the last trial finished; NaN if none has.
    """

    details: Details
    table: pd.DataFrame
    running: int
    seconds_since: float

    @property
    def finished(self) -> int:
        """The number of finished trials."""
        return int(self.table[["tuned", "judged"]].to_numpy().sum())

    @property
    def wanted(self) -> int:
        """The number of trials that are known to be wanted; grids may still grow."""
        return int(self.table[["to_tune", "to_judge"]].to_numpy().sum())

    @property
    def is_done(self) -> bool:
        """Whether there is a verdict on all that is wanted so far."""
        return bool(self.details.looks) and not self.running and self.finished == self.wanted

    def print(self, console: Console | None = None) -> None:
        """Prints the state of every arm."""
        console = Console(highlight=False) if console is None else console
        details = self.details
        of_most = "" if details.sequential is None else f" of at most {details.sequential.most}"
        judged = f"judged with {details.looks[-1]}{of_most} seeds" if details.looks else "no verdict yet"
        total = f"{'at least ' * (not self.is_done)}{self.wanted}"
        console.print(Text(visible(f"{details.task}: {self.finished} of {total} trials, {judged}"), "bold"))
        job = "trial" if details.dataset is None else "chunk"
        jobs = f"{self.running} {job}{'s' * (self.running != 1)}"
        verb = "is" if self.running == 1 else "are"
        state = "Finished" if self.is_done else f"{jobs} {verb} running or waiting"
        ago = f"; the last trial finished {duration(self.seconds_since)} ago"
        console.print(f"{state}{ago * bool(np.isfinite(self.seconds_since))}.")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("arm", overflow="fold")
        for name in ("tuning", "fresh", "rate", "metric", "of seeds", "diverged"):
            table.add_column(name, justify="right", no_wrap=True)
        for arm, row in self.table.to_dict("index").items():
            error = f" ± {row['standard_error']:.2g}" if np.isfinite(row["standard_error"]) else ""
            known = np.isfinite(row["final_metric"])
            table.add_row(
                Text(shortened(str(arm), 60)),
                f"{row['tuned']}/{row['to_tune']}",
                f"{row['judged']}/{row['to_judge']}",
                f"{row['learning_rate']:g}" if known else "-",
                f"{row['final_metric']:.4g}{error}" if known else "-",
                str(row["seeds"]) if known else "-",
                str(row["diverged"]),
            )
        console.print(table)


def read_status(path: str | os.PathLike[str]) -> Status:
    """Reads how far the study in a folder has come.

    Args:
        path: The folder that was given as `out`.

    Raises:
        ValueError: If it is not a folder of `compare`, or its study was begun by an earlier version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path must be a folder that compare saves to; there is no folder {str(path)!r}.")
    try:
        details = Details.from_json(json.loads((folder / DETAILS).read_text()))
    except (OSError, ValueError) as error:
        reason = f"{DETAILS} cannot be read"
        if (folder / "study.json").exists() and isinstance(error, FileNotFoundError):
            reason = "its study has just begun, and no trial yet"
        elif isinstance(error, FileNotFoundError):
            reason = "it holds no study yet"
        raise ValueError(
            f"path must be a folder that compare saves to, got {str(path)!r}: {reason}."
        ) from error
    results, newest = _finished(folder)
    rows = {arm: _row(details, arm, results) for arm in details.arms}
    since = time.time() - newest if newest else float("nan")
    return Status(details, pd.DataFrame.from_dict(rows, orient="index"), _running(folder), since)


def studies_in(path: str | os.PathLike[str]) -> list[Path]:
    """The folders of the studies in a folder: itself, or those of `decay_now`'s checkpoints, in order."""
    folder = Path(path)
    if not (folder / DETAILS).exists():
        steps = {
            file.parent: file.parent.name.removeprefix("step_") for file in folder.glob(f"step_*/{DETAILS}")
        }
        if found := {each: int(step) for each, step in steps.items() if step.isdecimal()}:
            return sorted(found, key=found.__getitem__)
    return [folder]


def _finished(folder: Path) -> tuple[Results, float]:
    """The finished trials, and when the last one was written; damaged files are left to the study."""
    results, newest = {}, 0.0
    for file in folder.glob("trials/*.npz"):
        try:
            results |= unpack(file.read_bytes())
            newest = max(newest, file.stat().st_mtime)
        except (OSError, Unusable):
            continue
    return results, newest


def _running(folder: Path) -> int:
    """The number of chunks whose locks are held."""
    return sum(_is_held(file) for file in folder.glob("locks/*") if file.name != "study")


def _is_held(file: Path) -> bool:
    """Whether a process holds a lock; on Unix a file that may only be read tells."""
    try:
        if sys.platform == "win32":
            with filelock.FileLock(file, timeout=0):
                return False
        import fcntl

        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing releases it
    except (filelock.Timeout, BlockingIOError):
        return True
    except OSError:  # it has been removed, or may not be read
        return False
    return False


def _row(details: Details, arm: str, results: Results) -> dict[str, object]:
    direction, grid = details.direction, details.grid.get(arm, ())
    found = {key: float(curves.validation[-1]) for key, curves in results.items() if key.arm == arm}
    tuned = {key: x for key, x in found.items() if key.seed < FIRST_FRESH_SEED and key.rate in grid}
    chosen = details.best_rates.get(arm)
    fresh = {key: x for key, x in found.items() if key.seed >= FIRST_FRESH_SEED and key.rate == chosen}
    by_rate: dict[float, list[float]] = {}
    for key, x in (fresh or tuned).items():
        by_rate.setdefault(key.rate, []).append(x)
    means = {rate: mean_and_error(np.array(values)) for rate, values in by_rate.items()}
    to_tune, to_judge = details.wanted.get(arm, (len(grid) * details.tuning_seeds, details.seeds))
    if details.tuning == "race" and not fresh:  # a rate that has dropped out does not lead
        longest = max(map(len, by_rate.values()), default=0)
        means = {rate: found for rate, found in means.items() if len(by_rate[rate]) == longest}
    measured = [rate for rate, (mean, _) in means.items() if np.isfinite(mean)]
    best = min(measured, key=lambda rate: direction.cost(means[rate][0])) if measured else float("nan")
    mean, error = means.get(best, (float("nan"), float("nan")))
    return {
        "tuned": min(len(tuned), to_tune),  # a race does not want all that a grid has left there
        "to_tune": to_tune,
        "judged": min(len(fresh), to_judge),
        "to_judge": to_judge,
        "learning_rate": best,
        "final_metric": mean,
        "standard_error": error,
        "seeds": "fresh" if fresh else "tuning",
        "diverged": sum(not np.isfinite(x) for x in [*tuned.values(), *fresh.values()]),
    }

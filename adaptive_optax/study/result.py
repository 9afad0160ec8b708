"""A comparison: a record that draws, reports and saves itself. Also assembles it, and reads it back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console

from adaptive_optax._core.checks import check_scalar
from adaptive_optax._core.names import as_cell, visible
from adaptive_optax.study.details import Details
from adaptive_optax.study.engine.chunks import Key, Results, Unusable, read_arrays, stacked
from adaptive_optax.study.engine.store import write_atomically
from adaptive_optax.study.engine.trials import TELEMETRY
from adaptive_optax.study.recommendation import Recommendation, recommend
from adaptive_optax.study.record import Record
from adaptive_optax.study.statistics.paired import mean_and_error
from adaptive_optax.study.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 3  # of saved comparisons
_WITHOUT_ERRORS = 2  # the format before the table had a column error
FIRST_FRESH_SEED = 1000  # tuning uses the seeds from 0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison(Record):
    """What a comparison found; `compare` makes it.

    Attributes:
        table: One row per trial: arm, phase ("tuning" or "verdict"), learning_rate, seed, final_metric,
            best_metric, best_step, initial_metric, diverged, steps_to_baseline (steps until the metric is as
            good as the baseline's final one on the same seed; NaN if never, and in tuning), compilation
            ("once", or "per rate" for an arm that refuses a traced rate; "" for a training function), error
            (the traceback of a training function that raised; otherwise ""). Diverged trials have NaN
            metrics.
        training_steps: The last steps of the windows over which the training loss is averaged; none for a
            training function.
        training_curves: Training losses, one row per trial in the order of `table`.
        validation_steps: The steps after which the metric was computed, in any trial.
        validation_curves: Metrics, one row per trial; NaN at steps that a trial did not report.
        telemetry_steps: The steps after which telemetry was measured, counted from 1.
        telemetry_curves: The measurements of `telemetry`: trial by step by field of `trials.TELEMETRY`, NaN
            where a field is undefined.
        details: What was asked for, what tuning chose, and how it ran (see `Details`).
    """

    def __repr__(self) -> str:
        found = [f"Comparison of {len(self.details.arms)} arms, {len(self.table)} trials"]
        try:
            found += [verdict.sentence for verdict in self.verdicts.values()]
        except ValueError as error:
            found.append(str(error))
        rates = ", ".join(f"{visible(arm)} {rate:g}" for arm, rate in self.details.best_rates.items())
        heading = "Best peak rates" if self.details.tuned else "Peak rates"
        return "\n".join([*found, f"{heading}: {rates}."] if rates else found)

    @property
    def info(self) -> dict[str, Any]:
        """A copy of the details as a dictionary: settings, chosen rates, looks, versions, devices."""
        return self.details.as_json()

    @property
    def summary(self) -> pd.DataFrame:
        """One row per arm: its rate, its metric on the fresh seeds, and the verdict."""
        rows = []
        fresh = self.table[self.table["phase"] == "verdict"]
        for name in self.details.arms:
            metric = fresh.loc[fresh["arm"] == name, "final_metric"]
            mean, error = mean_and_error(np.asarray(metric, float))
            verdict = self.verdicts.get(name)
            rows.append(
                {
                    "arm": name,
                    "learning_rate": self.details.best_rates.get(name, math.nan),
                    "final_metric": mean,
                    "standard_error": error,
                    "diverged": int(metric.isna().sum()),
                    "decision": verdict.decision if verdict else "baseline",
                    "effect": verdict.effect if verdict else 0.0,
                    "low": verdict.interval[0] if verdict else math.nan,
                    "high": verdict.interval[1] if verdict else math.nan,
                    "p_value": verdict.p_value if verdict else math.nan,
                }
            )
        return pd.DataFrame(rows).set_index("arm")

    def with_margin(self, margin: float) -> Comparison:
        """Returns this comparison judged with an absolute equivalence margin, in the metric's units."""
        check_scalar("margin", margin, "(0, inf)")
        return dataclasses.replace(self, details=dataclasses.replace(self.details, margin=float(margin)))

    def recommend(self) -> Recommendation:
        """Recommends an arm at its best rate, with the code to paste and the evidence in one sentence.

        The arm is one that is better than the baseline; of several, the one that did best in tuning. If none
        is better, it is the baseline, or a simpler arm that is equivalent to it: no difference was found, so
        keep the simplest. Constant rates are the simplest, then come decays (linear, 1-sqrt, cosine,
        exponential, step), schedules with a warm-up, one-cycle, and at last averages, schedule-free averaging
        and estimated rates. An undecided arm is never recommended, since it may be worse; nor can the user's
        own arms be called simpler or less simple.

        The code of a standard arm is written out, with its numbers; that of the user's own arm calls it.

        Raises:
            ValueError: As for `verdicts`, or if every verdict is withheld (it has a `reason`); the message
                says why.
        """
        return recommend(self)

    def plot(self, picture: str | None = None, *, theme: str = "light") -> Figure:
        """Draws metric against peak rate, paired differences with their intervals, and curves.

        Args:
            picture: "rates", "differences", "curves", "effective_rates" or "limits"; None for all in one
                figure, but for those that have nothing to show.
            theme: "light" or "dark".

        Raises:
            ValueError: If there is no such picture or theme.
        """
        from adaptive_optax.study.report import figures  # import matplotlib only when drawing

        if picture is None:
            return figures.plot(self, theme=theme)
        return figures.plot_one(self, picture, theme=theme)

    def print_summary(self, console: Console | None = None) -> None:
        """Prints the answer, the sentence of every other verdict, a table, what to do next, and what to use.

        Args:
            console: Where to print; None for the standard output.
        """
        from adaptive_optax.study.report import page  # as in `plot`

        page.print_summary(self, Console(highlight=False) if console is None else console)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report: one self-contained file."""
        from adaptive_optax.study.report import page  # as in `plot`

        page.to_html(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table of trials as a CSV file that a spreadsheet can open.

        A name that a spreadsheet would read as a formula (one that begins with =, +, -, @ or a control
        character) is prefixed with an apostrophe, and control characters are escaped as in Python source.
        """
        names = {name: self.table[name].map(as_cell) for name in _STRINGS}
        write_atomically(Path(path), self.table.assign(**names).to_csv(index=False).encode())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one file, which `load` reads back exactly."""
        columns = {name: self.table[name].to_numpy() for name in self.table.columns}
        strings = {name: column.tolist() for name, column in columns.items() if name in _STRINGS}
        numbers = {name: column for name, column in columns.items() if name not in _STRINGS}
        header = {"format": FORMAT, "columns": list(columns), "strings": strings, "info": self.info}
        file = io.BytesIO()
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            **{f"table.{name}": column for name, column in numbers.items()},
            **{name: getattr(self, name) for name in _ARRAYS},
        )
        write_atomically(Path(path), file.getvalue())


_FIRST_FIELDS = 4  # of `TELEMETRY` in files without limits
_STRINGS = ("arm", "phase", "compilation", "error")
_ARRAYS = tuple(
    f"{what}_{part}" for what in ("training", "validation", "telemetry") for part in ("steps", "curves")
)


def load(path: str | os.PathLike[str]) -> Comparison:
    """Reads a comparison written by `Comparison.save`; nothing is unpickled.

    Raises:
        ValueError: If the path is a folder, or the file is not a saved comparison, is damaged, or is of
            another version.
        OSError: If there is no such file, or it cannot be read.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"path must be a file written by Comparison.save, got the folder {str(path)!r}; call "
            "study.compare again with out= and this folder, which trains only what is missing."
        )
    data = Path(path).read_bytes()
    try:
        return _comparison(read_arrays(data))
    except Unusable as error:
        raise ValueError(
            f"path must be a file written by Comparison.save, got {str(path)!r}, which {error}."
        ) from error


def _comparison(arrays: dict[str, np.ndarray]) -> Comparison:
    """Assembles a comparison from arrays; raises `Unusable` if they are inconsistent."""
    foreign = Unusable("is damaged or foreign")
    try:
        header = json.loads(arrays.pop("header").tobytes())
        version, strings, details = header["format"], header["strings"], header["info"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise foreign from error
    if version == _WITHOUT_ERRORS and isinstance(strings, dict) and isinstance(strings.get("arm"), list):
        strings["error"] = [""] * len(strings["arm"])
        header["columns"] = [*header.get("columns", ()), "error"]
    elif version != FORMAT:
        raise Unusable(f"is of format {version}; this version reads {FORMAT}")
    numbers = {f"table.{name}": name for name in _COLUMNS if name not in _STRINGS}
    if not (
        header.get("columns") == list(_COLUMNS)
        and isinstance(strings, dict)
        and strings.keys() == set(_STRINGS)
        and all(isinstance(column, list) and {*map(type, column)} <= {str} for column in strings.values())
        and arrays.keys() == numbers.keys() | set(_ARRAYS)
        and all(arrays[stored].dtype == _COLUMNS[name] for stored, name in numbers.items())
    ):
        raise foreign
    if arrays["telemetry_curves"].shape[2:] == (_FIRST_FIELDS,):
        arrays["telemetry_curves"] = _with_all_fields(arrays["telemetry_curves"])
    trials = len(strings["arm"])
    columns = strings | {name: arrays.pop(stored) for stored, name in numbers.items()}
    if any(np.shape(column) != (trials,) for column in columns.values()):
        raise foreign
    for part in ("training", "validation", "telemetry"):
        steps, curves = arrays[f"{part}_steps"], arrays[f"{part}_curves"]
        fields = (len(TELEMETRY),) if part == "telemetry" else ()
        if not (
            steps.ndim == 1
            and steps.dtype.kind == "i"
            and (np.diff(steps) > 0).all()
            and curves.dtype.kind == "f"
            and curves.shape == (trials, len(steps), *fields)
        ):
            raise foreign
    table = pd.DataFrame(columns, columns=list(_COLUMNS)).astype(_COLUMNS)
    try:
        details = Details.from_json(details)
    except ValueError as error:
        raise foreign from error
    if not _is_possible(table, details):
        raise foreign
    return Comparison(table=table, details=details, **arrays)


def _is_possible(table: pd.DataFrame, details: Details) -> bool:
    """Whether a table is possible for a comparison with these details."""
    rates = table["learning_rate"]
    return (
        set(table["arm"]) <= set(details.arms)
        and set(table["phase"]) <= {"tuning", "verdict"}
        and bool((np.isfinite(rates) & (rates > 0) & (table["seed"] >= 0)).all())
        and bool((table["diverged"] == ~np.isfinite(table["final_metric"])).all())
        and not table.duplicated(["arm", "learning_rate", "seed"]).any()
    )


def collect(results: Results, wanted: Iterable[Key], subject: Subject, details: Details) -> Comparison:
    """Assembles the wanted trials: tuning first, then fresh seeds, arms in the user's order."""
    order, direction, plan = list(details.arms), details.direction, subject.plan
    keys = sorted(
        (key for key in set(wanted) if key in results),
        key=lambda key: (key.seed >= FIRST_FRESH_SEED, order.index(key.arm), key.rate, key.seed),
    )
    found = [results[key] for key in keys]
    validation_steps, validation = _aligned(
        [each.validation for each in found], [each.validation_steps for each in found], plan.validation_steps
    )
    telemetry_steps, telemetry = _aligned(
        [_with_all_fields(each.telemetry) for each in found],
        [each.telemetry_steps for each in found],
        plan.telemetry_steps if plan.validation_steps else (),
        len(TELEMETRY),
    )
    targets = {
        key.seed: final
        for key in keys
        if key.arm == details.baseline and key.seed >= FIRST_FRESH_SEED
        if np.isfinite(final := results[key].validation[-1])
    }
    rows = []
    for key, curves in zip(keys, found, strict=True):
        curve = curves.validation.astype(float)
        steps = curves.validation_steps if len(curves.validation_steps) else validation_steps
        finite = np.isfinite(curve)
        cost = direction.cost(curve)
        at_best = np.argmin(np.where(finite, cost, np.inf))
        reached = np.flatnonzero(cost <= direction.cost(targets.get(key.seed, np.nan)))
        rows.append(
            {
                "arm": key.arm,
                "phase": "verdict" if key.seed >= FIRST_FRESH_SEED else "tuning",
                "learning_rate": key.rate,
                "seed": key.seed,
                "final_metric": curve[-1] if finite[-1] else math.nan,
                "best_metric": curve[at_best] if finite.any() else math.nan,
                "best_step": int(steps[at_best]),
                "initial_metric": curve[0] if finite[0] and steps[0] == 0 else math.nan,
                "diverged": not finite[-1],
                "steps_to_baseline": float(steps[reached[0]]) if len(reached) else math.nan,
                "compilation": subject.compilation(key.arm),
                "error": str(curves.error),
            }
        )
    training_steps = plan.training_steps if plan.validation_steps else np.zeros(0, int)
    training = stacked([each.training for each in found]).reshape(len(keys), len(training_steps))
    return Comparison(
        pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS),
        training_steps,
        np.where(np.isfinite(training), training, np.nan),
        validation_steps,
        validation,
        telemetry_steps,
        telemetry,
        details,
    )


def _with_all_fields(telemetry: np.ndarray) -> np.ndarray:
    """Measurements with NaN for the newest fields of `TELEMETRY`, which older records lack."""
    missing = len(TELEMETRY) - telemetry.shape[-1]
    return np.pad(telemetry, [(0, 0)] * (telemetry.ndim - 1) + [(0, missing)], constant_values=np.nan)


def _aligned(
    curves: Sequence[np.ndarray], own: Sequence[np.ndarray], planned: Sequence[int] | np.ndarray, *fields: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of all trials, and their curves at these steps, NaN where one has none."""
    at = [steps if len(steps) or not len(planned) else np.asarray(planned) for steps in own]
    steps = np.unique(np.concatenate(at)) if at else np.asarray(planned, int)
    dtype = stacked(list(map(np.ravel, curves[:1]))).dtype if curves else np.float32
    aligned = np.full((len(curves), len(steps), *fields), np.nan, np.result_type(np.float32, dtype))
    for row, curve, mine in zip(aligned, curves, at, strict=True):
        row[np.searchsorted(steps, mine)] = np.where(np.isfinite(curve), curve, np.nan)
    return steps.astype(int), aligned


_COLUMNS = {
    "arm": str,
    "phase": str,
    "learning_rate": float,
    "seed": int,
    "final_metric": float,
    "best_metric": float,
    "best_step": int,
    "initial_metric": float,
    "diverged": bool,
    "steps_to_baseline": float,
    "compilation": str,
    "error": str,
}

"""What a comparison found: its trials as a table, its curves, its verdicts; saved, drawn and reported."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from adaptive_optax._checks import check_choice, check_scalar
from adaptive_optax.study.runner import ArmSpec
from adaptive_optax.study.store import Results, write_atomically
from adaptive_optax.study.trials import TELEMETRY, Plan
from adaptive_optax.study.verdict import Verdict, judge, judged_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_FRESH_SEED = 1000  # tuning uses the seeds from 0


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found; `compare` makes it.

    Attributes:
        table: One row a trial: arm, phase ("tuning" or "verdict"), learning_rate, seed, final_metric,
            best_metric, best_step, initial_metric, diverged, steps_to_baseline (steps until the metric is at
            most the baseline's final one on the same seed; NaN if never, and in tuning), compilation ("once",
            or "per rate" for an arm that refuses a traced rate). Diverged trials have NaN metrics.
        training_steps: The last steps of the windows over which the training loss is averaged.
        training_curves: Training losses, one row a trial in the order of `table`.
        validation_steps: The steps after which the metric was taken.
        validation_curves: Metrics, one row a trial.
        telemetry_steps: The steps at which the optimizer was looked at, counted from 1.
        telemetry_curves: What `telemetry` saw there: trial by step by field of `trials.TELEMETRY`, NaN where
            a field is not defined.
        info: Settings, chosen rates, looks, versions, devices.
    """

    table: pd.DataFrame
    training_steps: np.ndarray
    training_curves: np.ndarray
    validation_steps: np.ndarray
    validation_curves: np.ndarray
    telemetry_steps: np.ndarray
    telemetry_curves: np.ndarray
    info: dict[str, Any]

    @functools.cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """A verdict for every arm but the baseline.

        Raises:
            ValueError: If the trials do not allow one: a comparison that was stopped early, or a metric that
                is not positive without a margin (`with_margin` gives one).
        """
        if not self.info["looks"]:
            raise ValueError(
                f"The comparison was stopped before its verdict, after {len(self.table)} trials; "
                "run it again, with out= from where it was."
            )
        return judge(
            self.table,
            baseline=self.info["baseline"],
            margin=self.info["margin"],
            look=len(self.info["looks"]),
        )

    def verdict(self, arm: str | None = None) -> Verdict:
        """Gives the verdict on an arm against the baseline.

        Args:
            arm: The arm; None for the one that did best in tuning, the baseline aside.

        Raises:
            ValueError: If there is no such arm, and as `verdicts`.
        """
        others = [name for name in self.info["arms"] if name != self.info["baseline"]]
        if arm is not None:
            check_choice("arm", arm, others)
            return self.verdicts[arm]
        verdicts, means = self.verdicts, tuning_means(self.table)
        return verdicts[min(others, key=lambda name: min(means[name].values()))]

    @property
    def summary(self) -> pd.DataFrame:
        """One row an arm: its rate, its metric on the fresh seeds, and the verdict."""
        rows = []
        fresh = self.table[self.table["phase"] == "verdict"]
        for name in self.info["arms"]:
            metric = fresh.loc[fresh["arm"] == name, "final_metric"]
            verdict = self.verdicts.get(name)
            rows.append(
                {
                    "arm": name,
                    "learning_rate": self.info["best_rates"].get(name, math.nan),
                    "final_metric": metric.mean(),
                    "standard_error": metric.sem(),
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
        """Gives the comparison judged with an absolute equivalence margin, in the metric's units."""
        check_scalar("margin", margin, "(0, inf)")
        return dataclasses.replace(self, info=self.info | {"margin": float(margin)})

    def plot(self) -> Figure:
        """Draws metric against peak rate, paired differences with their intervals, and curves."""
        from adaptive_optax.study import figures

        return figures.plot(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report: one self-contained file."""
        from adaptive_optax.study import report

        report.to_html(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one file, which `load` reads back exactly."""
        columns = {name: self.table[name].to_numpy() for name in self.table.columns}
        strings = {name: column.tolist() for name, column in columns.items() if name in _STRINGS}
        numbers = {name: column for name, column in columns.items() if name not in _STRINGS}
        header = {"format": 2, "columns": list(columns), "strings": strings, "info": self.info}
        file = io.BytesIO()
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            **{f"table.{name}": column for name, column in numbers.items()},
            **{name: getattr(self, name) for name in _ARRAYS},
        )
        write_atomically(Path(path), file.getvalue())


_STRINGS = ("arm", "phase", "compilation")
_ARRAYS = tuple(
    f"{what}_{part}" for what in ("training", "validation", "telemetry") for part in ("steps", "curves")
)


def load(path: str | os.PathLike[str]) -> Comparison:
    """Reads a comparison that `Comparison.save` has written.

    Raises:
        ValueError: If the file is none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            strings, info = header["strings"], header["info"]
            table = pd.DataFrame(
                {
                    name: strings[name] if name in strings else file[f"table.{name}"]
                    for name in header["columns"]
                }
            ).astype(_COLUMNS)
            return Comparison(table=table, info=info, **{name: file[name] for name in _ARRAYS})
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"path must be a file that Comparison.save has written, got {str(path)!r}."
        ) from error


def tuning_means(table: pd.DataFrame) -> dict[str, dict[float, float]]:
    """The mean final metric by arm and learning rate; a diverged trial counts as in the verdict."""
    tuning = pd.DataFrame(table[table["phase"] == "tuning"])
    if np.isfinite(tuning[["final_metric", "initial_metric"]].to_numpy()).any():
        metric = judged_metric(tuning)
    else:  # nothing to put in a diverged trial's place
        metric = np.full(len(tuning), np.inf)
    groups: dict[str, dict[float, list[float]]] = {}
    for name, rate, value in zip(tuning["arm"], tuning["learning_rate"], metric, strict=True):
        groups.setdefault(name, {}).setdefault(rate, []).append(value)
    return {name: {rate: float(np.mean(v)) for rate, v in rates.items()} for name, rates in groups.items()}


def collect(
    results: Results, arms: dict[str, ArmSpec], plan: Plan, baseline: str, fresh: range
) -> Comparison:
    """Puts trials together: tuning first, then the fresh seeds asked for, arms in the user's order."""
    order = list(arms)
    keys = sorted(
        (key for key in results if key.seed < FIRST_FRESH_SEED or key.seed in fresh),
        key=lambda key: (key.seed >= FIRST_FRESH_SEED, order.index(key.arm), key.rate, key.seed),
    )
    steps = np.array(plan.validation_steps)
    targets = {
        key.seed: results[key].validation[-1]
        for key in keys
        if key.arm == baseline and key.seed >= FIRST_FRESH_SEED
    }
    rows = []
    for key in keys:
        curve = results[key].validation.astype(float)
        finite = np.isfinite(curve)
        at_best = np.argmin(np.where(finite, curve, np.inf))
        reached = np.flatnonzero(curve <= targets.get(key.seed, -np.inf))
        rows.append(
            {
                "arm": key.arm,
                "phase": "verdict" if key.seed >= FIRST_FRESH_SEED else "tuning",
                "learning_rate": key.rate,
                "seed": key.seed,
                "final_metric": curve[-1] if finite[-1] else math.nan,
                "best_metric": curve[at_best] if finite.any() else math.nan,
                "best_step": int(steps[at_best]),
                "initial_metric": curve[0] if finite[0] else math.nan,
                "diverged": not finite[-1],
                "steps_to_baseline": float(steps[reached[0]]) if len(reached) else math.nan,
                "compilation": arms[key.arm].compilation,
            }
        )
    training = np.array([results[key].training for key in keys]).reshape(len(keys), -1)
    validation = np.array([results[key].validation for key in keys]).reshape(len(keys), -1)
    shape = len(keys), len(plan.telemetry_steps), len(TELEMETRY)
    telemetry = np.array([results[key].telemetry for key in keys]).reshape(shape)
    return Comparison(
        pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS),
        plan.training_steps,
        np.where(np.isfinite(training), training, np.nan),
        steps,
        np.where(np.isfinite(validation), validation, np.nan),
        plan.telemetry_steps,
        np.where(np.isfinite(telemetry), telemetry, np.nan),
        {},
    )


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
}

"""The table of trials: the metric that counts for each, with a finite value where a trial diverged."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from adaptive_optax.study.direction import Direction


class Trials(NamedTuple):
    """The trials of a table, as [arms, seeds].

    Attributes:
        arms: Their names.
        final: The judged final metrics, finite where a trial diverged.
        best: The judged best metrics, None if the table has none.
        diverged: Which diverged.
    """

    arms: list[str]
    final: np.ndarray
    best: np.ndarray | None
    diverged: np.ndarray


def judged_metric(table: pd.DataFrame, *, maximize: bool = False) -> pd.Series:
    """Returns the final metric of every row as `judge` counts it, with a finite value for diverged trials.

    Raises:
        ValueError: If no finite metric can be substituted, or if the columns are not as `judge` requires.
    """
    final, _, diverged = _outcomes(table, Direction(maximize))
    if np.isnan(final[diverged]).any():
        raise ValueError(
            "final_metric must be finite in some trial, or initial_metric where a trial diverged."
        )
    return pd.Series(final, index=table.index, name="final_metric")


def _outcomes(table: pd.DataFrame, direction: Direction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns by row the judged final metric, the substitute for a diverged trial's, and which diverged."""
    final = numbers(table, "final_metric")
    diverged = ~np.isfinite(final)
    stand_in = np.full(final.shape, direction.worst(final[~diverged]))
    if "diverged" in table.columns:
        marks = table["diverged"].to_numpy(object)
        if not all(mark in (False, True) for mark in marks if mark is not pd.NA) or pd.isna(marks).any():
            raise ValueError(
                f"diverged must be True or False in every row, got {table['diverged'].dtype} values."
            )
        marks = marks.astype(bool)
        if (np.isinf(final) & ~marks).any():
            raise ValueError(
                "final_metric must be finite or NaN where diverged is False, got an infinite value."
            )
        diverged |= marks
    if "initial_metric" in table.columns:
        initial = numbers(table, "initial_metric")
        initial = np.where(np.isfinite(initial), initial, np.nan)
        worse = np.fmax(direction.cost(stand_in), direction.cost(initial))  # fmax ignores NaNs
        stand_in = direction.cost(worse)
    return np.where(diverged, stand_in, final), stand_in, diverged


def _names(column: pd.Series) -> np.ndarray:
    names = column.to_numpy(object, na_value=None)
    for name in names:
        if not (name is None or isinstance(name, str)):
            raise ValueError(f"arm must hold names, got {name!r}.")
    return names


def numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as numbers, NaN where one is missing."""
    try:
        if table[column].dtype.kind in "cmM":
            raise TypeError
        return table[column].to_numpy(float, na_value=np.nan)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{column} must hold numbers, got {table[column].dtype} values.") from None


def rows_to_judge(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of phase "verdict", or all if there are no phases.

    Raises:
        ValueError: If these are none, or if the table lacks a column.
    """
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"table must be a pandas DataFrame, got {type(table).__name__}.")
    if missing := [name for name in ("arm", "seed", "final_metric") if name not in table.columns]:
        raise ValueError(f"table must have columns arm, seed and final_metric, got none named {missing[0]}.")
    if not table.columns.is_unique:
        raise ValueError("table must have each column only once, got a duplicate.")
    if "phase" in table.columns:
        table = table.loc[table["phase"] == "verdict"]
    if table.empty:
        raise ValueError("table must have trials to judge (of phase 'verdict', if it has phases), got none.")
    return table


def trials_by_arm(table: pd.DataFrame, direction: Direction) -> Trials:
    """Brings the rows into the order of arms and seeds.

    Raises:
        ValueError: If the table is not as `judge` requires.
    """
    table = rows_to_judge(table)
    arm_of, arms = pd.factorize(_names(pd.Series(table["arm"])))
    seed_of, seeds = pd.factorize(numbers(table, "seed"), sort=True)
    if min(arm_of.min(), seed_of.min()) < 0:
        raise ValueError("table must name the arm and the seed in every row, got a row without one of them.")
    shape = len(arms), len(seeds)
    if shape[0] < 2:
        raise ValueError(f"table must have the baseline and another arm, got {arms[0]!r} alone.")
    if shape[1] < 2:
        raise ValueError(f"table must have at least 2 seeds, got {seeds[0]:g} alone.")
    trials = np.bincount(arm_of * shape[1] + seed_of, minlength=shape[0] * shape[1]).reshape(shape)
    if (trials != 1).any():
        arm, seed = np.argwhere(trials != 1)[0]
        raise ValueError(
            f"table must have one row for each arm and seed, got {trials[arm, seed]} for arm {arms[arm]!r} "
            f"and seed {seeds[seed]:g}."
        )
    at = np.argsort(arm_of * shape[1] + seed_of)  # the row of each arm and seed
    final, stand_in, diverged = (values[at].reshape(shape) for values in _outcomes(table, direction))
    best = None
    if "best_metric" in table.columns:
        best = numbers(table, "best_metric")[at].reshape(shape)
        best = np.where(np.isfinite(best), best, stand_in)
    return Trials(list(arms), final, best, diverged)

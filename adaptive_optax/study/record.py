"""The record of a comparison: its trials, curves and details, and the verdicts that follow from them.

Everything that shows a comparison reads the record; `study.result` adds methods to show and save it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from adaptive_optax._core.checks import check_choice
from adaptive_optax.study.details import Details
from adaptive_optax.study.direction import Direction
from adaptive_optax.study.statistics.judge import improved, judge
from adaptive_optax.study.statistics.sentences import (
    direction_sentence,
    undefined_sentence,
    untrained_sentence,
)
from adaptive_optax.study.statistics.tuning import tuning_means
from adaptive_optax.study.statistics.verdict import Verdict, without_decision


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What a comparison found. `Comparison`, which shows and saves it, documents the attributes."""

    table: pd.DataFrame
    training_steps: np.ndarray
    training_curves: np.ndarray
    validation_steps: np.ndarray
    validation_curves: np.ndarray
    telemetry_steps: np.ndarray
    telemetry_curves: np.ndarray
    details: Details

    @property
    def direction(self) -> Direction:
        """Which metrics are better."""
        return self.details.direction

    @functools.cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """A verdict for every arm but the baseline.

        The verdict is withheld ("undecided", with the reason "untrained") if the metric of arm or baseline
        did not improve in training, or improved at no more seeds than by chance, and its best rate is on the
        edge of those tried: such a rate was chosen by chance, or by a metric with the wrong direction. If a
        training function does not report the metric before training, nor the call says which metrics are
        better, such a rate alone is reason enough ("unknown direction"). The verdict is
        also withheld ("undefined metric") if no trial of arm and baseline has a finite metric, even before
        training.

        With a plan of seeds, these are the verdicts of the last look; if the comparison was interrupted, its
        trials for the next one are not judged.

        Raises:
            ValueError: If the trials allow no verdict: the comparison was stopped early, or the metric is not
                positive and there is no margin (`with_margin` sets one).
        """
        if not self.details.looks:
            raise ValueError(
                f"The comparison was stopped before its verdict, after {len(self.table)} trials; "
                "run it again; with out= it resumes there."
            )
        plan = self.details.sequential
        verdicts = judge(
            self.table if plan is None else self._rows_of_looks(),
            baseline=self.details.baseline,
            margin=self.details.margin,
            maximize=self.direction.maximize,
            look=len(self.details.looks) if plan is None else None,
            sequential=plan,
        )
        untrained = {arm: found for arm in self.details.arms if (found := self._untrained(arm))}
        for arm, verdict in verdicts.items():
            if verdict.reason == "nothing measured" and self._is_undefined((arm, verdict.baseline)):
                sentence = undefined_sentence(arm, verdict.baseline)
                verdicts[arm] = without_decision(verdict, "undefined metric", sentence)
            failed = [name for name in (arm, verdict.baseline) if name in untrained]
            if failed and not math.isnan(verdict.effect):
                name = failed[0]
                rate = self.details.best_rates[name]
                sentence = untrained_sentence(
                    arm, verdict.baseline, name, rate, *untrained[name], self.direction
                )
                verdicts[arm] = without_decision(verdict, "untrained", sentence)
            unsure = [name for name in (arm, verdict.baseline) if self._may_be_reversed(name)]
            if question := self._unused(arm, verdict):
                sentence = f"{verdicts[arm].sentence} {question}"
                verdicts[arm] = dataclasses.replace(verdicts[arm], sentence=sentence)
            elif unsure and not verdicts[arm].reason and not math.isnan(verdict.effect):
                rate = self.details.best_rates[unsure[0]]
                sentence = direction_sentence(arm, verdict.baseline, unsure[0], rate)
                verdicts[arm] = without_decision(verdict, "unknown direction", sentence)
        return verdicts

    def _may_be_reversed(self, arm: str) -> bool:
        """Whether nothing shows that lower metrics are better, and the best rate may be the worst one."""
        if self.details.direction_stated or not self.details.on_edge.get(arm):
            return False
        rows = self.table["arm"] == arm
        return not np.isfinite(np.asarray(self.table.loc[rows, "initial_metric"], float)).any()

    def _unused(self, arm: str, verdict: Verdict) -> str:
        """Asks what a training function may have forgotten to use, if metrics are all equal."""
        if self.details.dataset is not None:
            return ""
        fresh = self.table[self.table["phase"] == "verdict"]
        metrics = pd.DataFrame(fresh).pivot(index="seed", columns="arm", values="final_metric")
        mine, base = (metrics[name].to_numpy() for name in (arm, verdict.baseline))
        both = np.isfinite(mine) & np.isfinite(base)
        if both.any() and (mine[both] == base[both]).all():
            return "Does train use run.transformation (or run.arm)?"
        return "Does train use run.seed?" * (verdict.reason == "deterministic task")

    def _rows_of_looks(self) -> pd.DataFrame:
        """The table without what comes after the last look."""
        table, baseline = self.table, self.details.baseline
        fresh = table["phase"] == "verdict"
        seeds = np.unique(table.loc[fresh & (table["arm"] == baseline), "seed"])[: self.details.looks[-1]]
        return pd.DataFrame(table[~fresh | table["seed"].isin(seeds.tolist())])

    @property
    def unfinished(self) -> list[str]:
        """The arms that a plan of seeds has more seeds for: undecided, and not after its last look."""
        details = self.details
        if details.sequential is None or not details.looks or details.looks == details.sequential.looks:
            return []
        try:
            verdicts = judge(
                self._rows_of_looks(),
                baseline=details.baseline,
                margin=details.margin,
                maximize=details.maximize,
                sequential=details.sequential,
                resamples=0,
            )
        except ValueError:  # as for `verdicts`: no verdict without a margin
            return []
        hopeless = ("deterministic task", "nothing measured")  # which more seeds would not change
        return [
            arm
            for arm, found in verdicts.items()
            if found.decision == "undecided" and found.reason not in hopeless
        ]

    def _is_undefined(self, arms: tuple[str, ...]) -> bool:
        """Whether no trial of these arms had a finite metric even before training."""
        rows = self.table["arm"].isin(arms) & (self.table["phase"] == "verdict")
        return not np.isfinite(np.asarray(self.table.loc[rows, "initial_metric"], float)).any()

    def _untrained(self, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The metrics before and after training, if training improved nothing at any rate; otherwise None."""
        if not self.details.on_edge.get(arm):
            return None
        rows = self.table[(self.table["phase"] == "verdict") & (self.table["arm"] == arm)]
        initial, final = (np.asarray(rows[name], float) for name in ("initial_metric", "final_metric"))
        kept = np.isfinite(initial) & np.isfinite(final)
        if improved(final, initial, self.direction):
            return None
        return initial[kept], final[kept]

    def verdict(self, arm: str | None = None) -> Verdict:
        """Returns the verdict on an arm against the baseline.

        Args:
            arm: The arm; None for the one that did best in tuning, apart from the baseline.

        Raises:
            ValueError: If there is no such arm, or as for `verdicts`.
        """
        others = self.details.rivals
        if arm is not None:
            check_choice("arm", arm, others)
            return self.verdicts[arm]
        return self.verdicts[self.best_in_tuning(others)]

    def cost_of(self, verdict: Verdict) -> float:
        """The cost of an arm's mean difference from the baseline; infinity if there is none."""
        return math.inf if math.isnan(verdict.effect) else self.direction.cost(verdict.effect)

    def best_in_tuning(self, arms: Iterable[str]) -> str:
        """Returns the arm whose best rate did best on the tuning seeds, the first of them at a tie.

        After a race these are the tuning seeds that the best rates of all these arms have run on.
        """
        arms, rates = list(arms), self.details.best_rates
        tuning = pd.DataFrame(self.table[self.table["phase"] == "tuning"])
        best = tuning["arm"].isin(arms) & (tuning["arm"].map(rates.get) == tuning["learning_rate"])
        shared = tuning.loc[best].groupby("arm")["seed"].max().min()
        means = tuning_means(pd.DataFrame(tuning[tuning["seed"] <= shared]), self.direction)
        return min(arms, key=lambda name: self.direction.cost(means[name][rates[name]]))

"""Should the learning rate of a run under way decay now, or later?

At one or several checkpoints, arms go on from the run: at the constant rate, and decaying over the steps that
are left. The gain of an arm is its final metric minus that of the constant rate, on the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
import optax
import pandas as pd

from adaptive_optax._core.checks import check_choice
from adaptive_optax.hyperparams import get_hyperparams
from adaptive_optax.study.arms import OPTIMIZERS, SCHEDULES
from adaptive_optax.study.arms import arm as named_arm
from adaptive_optax.study.calls import made
from adaptive_optax.study.comparison import compare
from adaptive_optax.study.direction import Direction
from adaptive_optax.study.evaluation import Arm
from adaptive_optax.study.result import Comparison
from adaptive_optax.study.start import Start
from adaptive_optax.study.statistics.paired import mean_and_error
from adaptive_optax.study.statistics.sequential import Sequential
from adaptive_optax.study.statistics.verdict import Verdict
from adaptive_optax.study.task import Task
from adaptive_optax.transforms.averaging import average_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONSTANT, AVERAGED = "constant", "constant:averaged"
DECAYS = ("linear", "1-sqrt", "halved")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DecayNow:
    """What `decay_now` found.

    Attributes:
        steps: The steps at which the run was continued, ascending.
        comparisons: A comparison for each: every arm against the constant rate.
    """

    steps: tuple[int, ...]
    comparisons: tuple[Comparison, ...]

    def __repr__(self) -> str:
        return self.sentence

    @property
    def direction(self) -> Direction:
        """Which metrics are better."""
        return self.comparisons[-1].direction

    @property
    def table(self) -> pd.DataFrame:
        """One row per checkpoint and arm: step, arm, final metric, gain with its interval, decision.

        The gain is the arm's final metric minus the constant rate's, in the metric's units: negative is
        better, unless higher metrics are.
        """
        rows = []
        for step, comparison in zip(self.steps, self.comparisons, strict=True):
            summary = comparison.summary.reset_index()
            columns = ["arm", "final_metric", "standard_error", "effect", "low", "high", "decision"]
            chosen = pd.DataFrame(summary, columns=columns)
            rows.append(chosen.rename(columns={"effect": "gain"}).assign(step=step))
        table = pd.concat(rows, ignore_index=True)
        return pd.DataFrame(table, columns=["step", *table.columns.drop("step")])

    def best(self, at: int = -1) -> Verdict:
        """The verdict on the arm with the best mean final metric among those that decay or average.

        Args:
            at: Which checkpoint; the last by default.
        """
        from adaptive_optax.study.report.findings import paired_differences  # as in `plot`

        comparison = self.comparisons[at]

        def cost(arm: str) -> float:  # paired, since a plan of seeds may stop arms at different ones
            mean = mean_and_error(paired_differences(comparison, arm))[0]
            return math.inf if math.isnan(mean) else self.direction.cost(mean)

        return comparison.verdicts[min(comparison.details.rivals, key=cost)]

    @property
    def sentence(self) -> str:
        """Whether to decay now, by how much that helps, and whether waiting would lose it."""
        from adaptive_optax.study.report.findings import interval, metric_format  # as in `plot`

        comparison, verdict = self.comparisons[-1], self.best()
        number, remaining = metric_format(comparison), comparison.details.steps
        change = "lower" if verdict.effect < 0 else "higher"
        answer = {
            "better": "Decay now",
            "worse": "Do not decay yet",
            "equivalent": "It makes no difference yet",
            "undecided": "Not decided",
        }[verdict.decision]
        found = (
            f"{answer}: from step {self.steps[-1]:,}, {verdict.arm} over the next {remaining:,} steps ends "
            f"{number(abs(verdict.effect))} {change} than the constant rate "
            f"(adjusted 95 % interval {interval(number, verdict.interval)}, {verdict.seeds} seeds)."
        )
        return f"{found} {self._waiting()}".strip()

    def _waiting(self) -> str:
        """Compares where the decay ends if it begins at the first and at the last checkpoint."""
        from adaptive_optax.study.report.findings import final_metrics, metric_format  # as in `plot`

        if len(self.steps) < 2:
            return ""
        arm = self.best().arm
        first, last = (final_metrics(self.comparisons[at])[arm] for at in (0, -1))
        both = min(len(first), len(last))  # a plan of seeds may stop earlier at one of them
        mean, error = mean_and_error(last[:both] - first[:both])
        number = metric_format(self.comparisons[-1])
        if not abs(mean) > 2 * error:
            what = "changed little: waiting neither won nor lost"
        elif self.direction.cost(mean) < 0:
            what = f"improved by {number(abs(mean))}: waiting lost nothing"
        else:
            what = f"worsened by {number(abs(mean))}: waiting lost"
        return f"From step {self.steps[0]:,} to step {self.steps[-1]:,} what {arm} reaches {what}."

    def plot(self, *, theme: str = "light") -> Figure:
        """Draws the gain of every arm against the step at which it began.

        Args:
            theme: "light" or "dark".
        """
        from adaptive_optax.study.report.gains import plot_gains  # import matplotlib only when drawing

        return plot_gains(self.steps, self.comparisons, theme=theme)


def decay_now(
    task: Task,
    start: Start | Sequence[Start],
    *,
    steps: int,
    learning_rate: float | None = None,
    optimizer: str | Callable[[Any], optax.GradientTransformation] = "adam",
    seeds: int | Sequential = 8,
    margin: float | None = None,
    out: str | os.PathLike[str] | None = None,
    executor: Any = None,
    base_seed: int = 0,
    progress: bool | None = None,
) -> DecayNow:
    r"""Asks whether a run under way should decay its learning rate now.

    From each checkpoint the run goes on for `steps` steps in five ways, on the same batches for equal seeds:

    | arm | the learning rate over the next `steps` steps |
    |---|---|
    | constant | unchanged: what the others are compared with |
    | linear | down to 0 |
    | 1-sqrt | down to 0 as $1 - \sqrt{t / T}$ |
    | halved | half of it, from now on |
    | constant:averaged | unchanged, and the average of the parameters is judged |

    Nothing is tuned: the rate is the run's.

    Args:
        task: The task of the run.
        start: Where the run is; or several checkpoints of it, to see whether waiting would lose the gain.
        steps: The steps that are left, at least 1.
        learning_rate: The run's current rate. None reads it from the newest checkpoint's state, if that is
            one of this library's.
        optimizer: The run's optimizer, as `study.arm` names it, or a function of a learning rate or schedule
            that makes it with its other settings.
        seeds: Orders of the batches to try, at least 5, or a plan of them as in `compare`.
        margin: As in `compare`.
        out: A folder to save to and resume from, with one subfolder per checkpoint.
        executor: As in `compare`.
        base_seed: As in `compare`.
        progress: As in `compare`.

    Returns:
        The answer, with a table, a picture, and the comparison at every checkpoint.

    Raises:
        ValueError: If an argument is out of range, a checkpoint does not fit the task or comes twice, or the
            learning rate is not known.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp
        >>> from adaptive_optax import study
        >>> x = jax.random.normal(jax.random.key(0), (256, 4))
        >>> y = x @ jnp.arange(4.0) + jax.random.normal(jax.random.key(1), (256,))
        >>> task = study.Task(
        ...     init=lambda key: jnp.zeros(4),
        ...     loss=lambda w, batch, key: jnp.mean((batch["x"] @ w - batch["y"]) ** 2),
        ...     train={"x": x, "y": y}, validation={"x": x, "y": y}, batch_size=4,
        ... )
        >>> w = jnp.arange(4.0) + 0.1  # where the run is
        >>> start = study.Start(w, ao.adam(0.1).init(w), step=500)
        >>> found = study.decay_now(task, start, steps=60, progress=False)
        >>> found.best().decision
        'better'
    """
    starts = [start] if isinstance(start, Start) else list(start)
    if not starts or not all(isinstance(each, Start) for each in starts):
        raise ValueError(f"start must be a study.Start, or several, got {start!r}.")
    starts = sorted(starts, key=lambda each: each.step)
    numbers = [int(each.step) for each in starts]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"start must have checkpoints of different steps, got {numbers}.")
    if learning_rate is None:
        learning_rate = _current_rate(starts[-1])
    arms = _arms(optimizer)
    comparisons = []
    for each in starts:
        folder = None if out is None else Path(out, f"step_{each.step}")
        comparisons.append(
            compare(
                task,
                arms,
                learning_rates=dict.fromkeys(arms, [learning_rate]),
                start=each,
                steps=steps,
                seeds=seeds,
                tuning_seeds=1,
                margin=margin,
                out=folder,
                executor=executor,
                base_seed=base_seed,
                progress=progress,
            )
        )
    return DecayNow(tuple(numbers), tuple(comparisons))


def _current_rate(start: Start) -> float:
    """The learning rate in a state."""
    try:
        known = get_hyperparams(start.opt_state)
    except ValueError:  # there are none in it
        known = {}
    named = [value for name, value in known.items() if name.rpartition("/")[2] == "learning_rate"]
    rates = [float(np.asarray(value)) for value in named]
    if len(rates) != 1 or not rates[0] > 0:
        found = "none" if not rates else ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(
            f"learning_rate must be given: start.opt_state should hold one positive rate, got {found}."
        )
    return rates[0]


def _arms(optimizer: Any) -> dict[str, Arm]:
    if isinstance(optimizer, str):
        check_choice("optimizer", optimizer, OPTIMIZERS)
        return {name: named_arm(f"{optimizer}:{name}") for name in (CONSTANT, *DECAYS, AVERAGED)}
    if not callable(optimizer):
        raise ValueError(
            f"optimizer must name one of {', '.join(OPTIMIZERS)}, or be a function of a learning rate, "
            f"got {optimizer!r}."
        )
    build = cast(Callable[[Any], optax.GradientTransformation], optimizer)

    def scheduled(learning_rate: jax.Array, steps: int, schedule: str) -> optax.GradientTransformation:
        return build(made(SCHEDULES[schedule](learning_rate, steps)))

    def averaged(learning_rate: jax.Array, steps: int) -> optax.GradientTransformation:
        return optax.chain(build(learning_rate), average_parameters())

    arms: dict[str, Arm] = {name: functools.partial(scheduled, schedule=name) for name in (CONSTANT, *DECAYS)}
    arms |= {AVERAGED: averaged}
    for name, each in arms.items():
        vars(each)["source"] = f"optimizer({name})"  # for the code of a recommendation
    return arms

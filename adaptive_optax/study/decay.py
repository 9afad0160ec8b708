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

from adaptive_optax._core.checks import check_bool, check_choice, check_integer
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
_KINDS = ("worse", "equivalent", "undecided")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DecayNow:
    """What `decay_now` found.

    Attributes:
        steps: The steps at which the run was continued, ascending.
        comparisons: A comparison for each: every arm against the constant rate.
        optimizer: The name of the optimizer with which it was continued.
        new_moments: Whether that optimizer has moments, and found none of its own in the newest checkpoint.
    """

    steps: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    optimizer: str = ""
    new_moments: bool = False

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
        return self._best(self.comparisons[at].details.rivals, at)

    def _best(self, arms: Sequence[str], at: int = -1) -> Verdict:
        from adaptive_optax.study.report.findings import paired_differences  # as in `plot`

        comparison = self.comparisons[at]

        def cost(arm: str) -> float:  # paired, since a plan of seeds may stop arms at different ones
            mean = mean_and_error(paired_differences(comparison, arm))[0]
            return math.inf if math.isnan(mean) else self.direction.cost(mean)

        return comparison.verdicts[min(arms, key=cost)]

    @property
    def sentence(self) -> str:
        """Whether to decay now and by how much that helps; what averaging does; and what waiting costs."""
        said = [self._decaying(), self._averaging(), self._waiting(), self._continued()]
        return " ".join(filter(None, said))

    def _decaying(self) -> str:
        """Answers the question, by the newest checkpoint."""
        verdicts = {arm: self.comparisons[-1].verdicts[arm] for arm in DECAYS}
        over = f"over the next {self.comparisons[-1].details.steps:,} steps"
        if better := [arm for arm, verdict in verdicts.items() if verdict.decision == "better"]:
            best = self._best(better)
            ends = f"{best.arm} ends {self._change(best)} than the constant rate"
            return f"Yes: from step {self.steps[-1]:,}, {ends} {over} ({self._evidence(best)})."
        kinds = [kind for kind in _KINDS if any(verdict.decision == kind for verdict in verdicts.values())]
        answer = "Not decided" if kinds == ["undecided"] else "No"
        found = f"every decay is {' or '.join(', '.join(kinds).rsplit(', ', 1))} {over}"
        best = self._best(DECAYS)
        least = f"the best of them, {best.arm}, ends {self._change(best)} than the constant rate"
        evidence = f"{best.decision}, " * (len(kinds) > 1) + self._evidence(best)
        return f"{answer}: from step {self.steps[-1]:,}, {found}; {least} ({evidence})."

    def _averaging(self) -> str:
        """Says what the average of the constant rate's parameters is worth."""
        verdict = self.comparisons[-1].verdicts[AVERAGED]
        found = f"{self._change(verdict)} ({self._evidence(verdict)})"
        return f"Averaging the parameters at the constant rate is {verdict.decision}: {found}."

    def _continued(self) -> str:
        """Says with which optimizer the run went on."""
        rate = self.comparisons[-1].details.best_rates[CONSTANT]
        moments = ", whose moments begin anew: the state holds none for it" * self.new_moments
        return f"The run went on with {self.optimizer} at a rate of {rate:g}{moments}." * bool(self.optimizer)

    def _waiting(self) -> str:
        """Compares where the decay ends if it begins at the first and at the last checkpoint."""
        from adaptive_optax.study.report.findings import final_metrics  # as in `plot`

        if len(self.steps) < 2:
            return ""
        first, last = self.comparisons[0], self.comparisons[-1]
        ends = self.steps[0] + first.details.steps, self.steps[-1] + last.details.steps
        arm = self._best(DECAYS).arm
        early, late = (final_metrics(comparison)[arm] for comparison in (first, last))
        both = min(len(early), len(late))  # a plan of seeds may stop earlier at one of them
        mean, error = mean_and_error(late[:both] - early[:both])
        begun = f"{arm} from step {self.steps[-1]:,}"
        resolved = abs(mean) > 2 * error
        change = "lower" if mean < 0 else "higher"
        where = f"{self._number(abs(mean))} {change} than" if resolved else "about where it ends"
        where += f" from step {self.steps[0]:,}"
        if ends[0] != ends[1]:
            more = f"{ends[1] - ends[0]:,} more steps of training"
            return f"Each goes on for {last.details.steps:,} steps: {begun} ends {where}, after {more}."
        cost = self.direction.cost(mean) > 0
        what = "waiting cost that" if cost else "waiting was better"
        what = what if resolved else "no cost of waiting was found"
        return f"All end at step {ends[0]:,}: {begun} ends {where}; {what}."

    def _number(self, value: float) -> str:
        from adaptive_optax.study.report.findings import metric_format  # as in `plot`

        return metric_format(self.comparisons[-1])(value)

    def _change(self, verdict: Verdict) -> str:
        return f"{self._number(abs(verdict.effect))} {'lower' if verdict.effect < 0 else 'higher'}"

    def _evidence(self, verdict: Verdict) -> str:
        from adaptive_optax.study.report.findings import interval  # as in `plot`

        ends = interval(self._number, verdict.interval)
        return f"adjusted 95 % interval {ends}, {verdict.seeds} seeds"

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
    same_end: bool = False,
) -> DecayNow:
    r"""Asks whether a run under way should decay its learning rate now.

    From each checkpoint the run continues for `steps` steps in five ways, on the same batches for equal
    seeds. A training function cannot do that: the run must be one of a `study.Task`.

    | arm | the learning rate over the next `steps` steps |
    |---|---|
    | constant | unchanged: what the others are compared with |
    | linear | down to 0 |
    | 1-sqrt | down to 0 like $1 - \sqrt{t / T}$ |
    | halved | half of it, from now on |
    | constant:averaged | unchanged, and the average of the parameters is judged |

    Nothing is tuned: the rate is the run's.

    Args:
        task: The task of the run.
        start: Where the run is; or several checkpoints of it, to see whether waiting costs anything.
        steps: For how many steps to go on from each checkpoint, at least 1.
        learning_rate: The run's current rate. None reads it from the newest checkpoint's state: this
            library's optimizers keep it, and `optax.inject_hyperparams` does; `optax.adam(3e-3)` does not.
        optimizer: The run's optimizer, as `study.arm` names it, or a function of a learning rate or schedule
            that makes it with its other settings.
        seeds: Orders of the batches to try, at least 5, or a plan of them as in `compare`.
        margin: As in `compare`.
        out: A folder to save to and resume from, with one subfolder per checkpoint.
        executor: As in `compare`.
        base_seed: As in `compare`.
        progress: As in `compare`.
        same_end: Whether to go on from earlier checkpoints for longer, so that all end where the newest does,
            `steps` steps after it. Only then does a later beginning show what waiting costs.

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
    if not isinstance(task, Task):
        found = "a training function" if callable(task) else type(task).__name__
        raise ValueError(
            "task must be a study.Task for decay_now, which goes on from its parameters and the optimizer's "
            f"state, got {found}."
        )
    check_bool("same_end", same_end)
    starts = [start] if isinstance(start, Start) else start
    if not (isinstance(starts, Sequence) and starts and all(isinstance(each, Start) for each in starts)):
        kinds = sorted({type(each).__name__ for each in start}) if isinstance(start, list | tuple) else ()
        found = f"{type(start).__name__} of {', '.join(kinds)}" if kinds else f"{type(start).__name__}"
        raise ValueError(f"start must be a study.Start, or several, got {found}.")
    starts = sorted(starts, key=lambda each: each.step)
    numbers = [int(each.step) for each in starts]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"start must have checkpoints of different steps, got {numbers}.")
    if learning_rate is None:
        learning_rate = _current_rate(starts[-1])
    check_integer("steps", steps, "[1, inf)")
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
                steps=steps + (numbers[-1] - int(each.step)) * bool(same_end),
                seeds=seeds,
                tuning_seeds=1,
                margin=margin,
                out=folder,
                executor=executor,
                base_seed=base_seed,
                progress=progress,
            )
        )
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "")
    fresh = arms[CONSTANT](learning_rate, steps).init(starts[-1].params)
    has_moments = any(np.size(leaf) > 1 for leaf in jax.tree.leaves(fresh))
    new_moments = has_moments and starts[-1].opt_state is None  # any other state without them is refused
    name = name if not name.startswith("<") else ""
    return DecayNow(tuple(numbers), tuple(comparisons), name or "the given optimizer", new_moments)


def _current_rate(start: Start) -> float:
    """The learning rate in a state."""
    try:
        known = get_hyperparams(start.opt_state)
    except ValueError:  # there are none in it
        known = {}
    named = [value for name, value in known.items() if name.rpartition("/")[2] == "learning_rate"]
    if not known:  # optax.inject_hyperparams keeps values in a dictionary
        injected = jax.tree.leaves(start.opt_state, is_leaf=_has_values)
        named = [node.hyperparams["learning_rate"] for node in injected if _has_values(node)]
    rates = [float(str(np.asarray(value)[()])) for value in named]  # 0.003, not its nearest float32
    if len(rates) != 1 or not rates[0] > 0:
        found = "none" if not rates else ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(
            "learning_rate must be given, as learning_rate=3e-3 (in a shell, --learning-rate 3e-3), with "
            "optimizer= (--optimizer) if the run's is not Adam: start.opt_state should hold one positive "
            f"rate, got {found} (optax.adam(3e-3), for example, keeps none)."
        )
    return rates[0]


def _has_values(node: Any) -> bool:
    values = getattr(node, "hyperparams", None)
    return isinstance(values, dict) and "learning_rate" in values


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

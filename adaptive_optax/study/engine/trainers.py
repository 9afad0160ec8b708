"""Trains chunks of trials: of a task, in compiled programs; or of the user's own function, one at a time.

A trainer needs nothing but the keys of the trials, so that it can be sent to another process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from adaptive_optax.study.engine.chunks import Curves, Key, Results
from adaptive_optax.study.engine.run import Run, Train, run_trial
from adaptive_optax.study.engine.trials import Placement, Plan, as_trials, program
from adaptive_optax.study.evaluation import Arm, Evaluate
from adaptive_optax.study.start import Origin
from adaptive_optax.study.task import Task

OnProgress = Callable[[float], None]  # of a chunk, from 0 to 1


class ArmSpec(NamedTuple):
    """An arm in the form that a task's trainer needs."""

    function: Arm
    compilation: str  # "once", or "per rate" for an arm that refuses a traced rate
    evaluate: Evaluate | None
    stream: int  # 0 if trials are paired by their seed
    origin: Origin | None = None  # what trials begin with; None for the task's initial parameters


class Trainer(Protocol):
    """Trains trials."""

    @property
    def divides(self) -> bool:
        """Whether the processes of a distributed program divide the chunks, or all train every one."""
        ...

    def chunks(self, keys: Sequence[Key]) -> list[list[Key]]:
        """Divides trials into those that are trained together."""
        ...

    def train(self, keys: Sequence[Key], on_progress: OnProgress) -> Results:
        """Trains a chunk, or a part of one."""
        ...

    def lost(self, keys: Sequence[Key], error: str) -> Results | None:
        """The outcomes of trials that ended their process; None if they are no outcomes."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TaskTrainer:
    """Trains trials of a task.

    Attributes:
        task: The task.
        arms: The arms by name.
        plan: Steps and validation points.
        placement: How trials are placed on the devices of the process that trains.
        base_seed: Part of every trial's key.
    """

    task: Task
    arms: Mapping[str, ArmSpec]
    plan: Plan
    placement: Placement
    base_seed: int = 0

    @property
    def divides(self) -> bool:
        """A program runs on the devices of one process."""
        return True

    def chunks(self, keys: Sequence[Key]) -> list[list[Key]]:
        """Groups trials that share a compiled program, as many as the placement takes."""
        groups: dict[tuple[str, float | None], list[Key]] = {}
        for key in keys:
            groups.setdefault((key.arm, self._compiled_rate(key)), []).append(key)
        width = self.placement.width
        return [group[i : i + width] for group in groups.values() for i in range(0, len(group), width)]

    def train(self, keys: Sequence[Key], on_progress: OnProgress) -> Results:
        """Trains trials of one program."""
        spec, rate = self.arms[keys[0].arm], self._compiled_rate(keys[0])
        compiled = program(
            self.task, spec.function, self.plan, self.placement, spec.evaluate, rate, spec.origin
        )
        trials = as_trials(
            [key.rate for key in keys], [key.seed for key in keys], spec.stream, self.base_seed
        )
        curves = compiled.run(trials, lambda step: on_progress(step / self.plan.steps))
        return {key: Curves(*each) for key, each in zip(keys, zip(*curves, strict=True), strict=True)}

    def lost(self, keys: Sequence[Key], error: str) -> Results | None:
        """A task's trials all run in the same way: it is not theirs."""
        del keys, error
        return None

    def _compiled_rate(self, key: Key) -> float | None:
        return key.rate if self.arms[key.arm].compilation == "per rate" else None


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionTrainer:
    """Calls the user's own training function, once per trial.

    Under `jax.distributed` every process calls it with the same trials in the same order, so that it may
    train over the devices of all of them; the results of process 0 count.

    Attributes:
        function: The training function.
        arms: The arms by name: functions of learning rate and steps.
        steps: Training steps per trial.
        base_seed: Other than 0, it gives every trial another seed.
        evaluates: What arms are judged by, if not their trained parameters.
    """

    function: Train
    arms: Mapping[str, Callable[[float, int], Any]]
    steps: int
    base_seed: int = 0
    evaluates: Mapping[str, Evaluate | None] = dataclasses.field(default_factory=dict)

    @property
    def divides(self) -> bool:
        """Collectives in the function need all processes."""
        return False

    def chunks(self, keys: Sequence[Key]) -> list[list[Key]]:
        """Leaves every trial alone."""
        return [[key] for key in keys]

    def train(self, keys: Sequence[Key], on_progress: OnProgress) -> Results:
        """Trains one trial after the other."""
        found = {}
        for i, key in enumerate(keys):
            run = Run(
                key.arm,
                key.rate,
                self._seed(key.seed),
                self.steps,
                self.arms[key.arm],
                lambda fraction, done=i: on_progress((done + fraction) / len(keys)),
                self.evaluates.get(key.arm),
            )
            found[key] = run_trial(self.function, run)
            on_progress((i + 1) / len(keys))
        return found

    def lost(self, keys: Sequence[Key], error: str) -> Results | None:
        """They have diverged, as those that raised."""

        def ended(run: Run) -> None:
            del run
            raise RuntimeError(error)

        found: Results = {}
        for key in keys:
            curves = run_trial(ended, Run(key.arm, key.rate, key.seed, self.steps, self.arms[key.arm]))
            found[key] = curves._replace(error=np.array(error))
        return found

    def _seed(self, seed: int) -> int:
        if self.base_seed == 0:
            return seed
        return int(np.random.SeedSequence((self.base_seed, seed)).generate_state(1)[0])

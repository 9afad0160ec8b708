"""What a study trains: a task, or the user's own training function.

Both tune, judge and report alike. They differ in how arms are checked, how a folder recognizes them, and what
trains the trials.
"""

from __future__ import annotations

import copy
import functools
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from adaptive_optax._core.checks import check_bool, check_choice, check_integer
from adaptive_optax.study.arms import NamedArm, check_arm
from adaptive_optax.study.details import Samples
from adaptive_optax.study.engine.code import digest_code
from adaptive_optax.study.engine.fingerprint import describe_arm, describe_study, stream_of
from adaptive_optax.study.engine.placement import MODES, MOST_CHUNK, settle_placement
from adaptive_optax.study.engine.run import Train
from adaptive_optax.study.engine.store import ArmPrograms, Store
from adaptive_optax.study.engine.trainers import ArmSpec, FunctionTrainer, TaskTrainer, Trainer
from adaptive_optax.study.engine.trials import Plan
from adaptive_optax.study.evaluation import (
    AVERAGE_IF_KEPT,
    Evaluate,
    check_evaluate,
    declared,
    keeps_average,
    without_task,
)
from adaptive_optax.study.judged import describe_evaluate, describe_judged
from adaptive_optax.study.start import Start, check_start, origin_of
from adaptive_optax.study.task import Task

MOST_POINTS = 100_000


class Subject(Protocol):
    """What a study trains."""

    @property
    def name(self) -> str:
        """Its name in reports."""
        ...

    @property
    def maximize(self) -> bool:
        """Whether higher metrics are better."""
        ...

    @property
    def plan(self) -> Plan:
        """The steps of a trial, and where they are measured."""
        ...

    def compilation(self, arm: str) -> str:
        """How an arm compiles: "once", "per rate", or "" if nothing is known of it."""
        ...

    def store(self, out: Any) -> Store:
        """Opens the study's folder."""
        ...

    def trainer(self, store: Store | None, executor: Any, *, trials: int) -> tuple[Trainer, dict[str, Any]]:
        """Returns what trains, and the details that are known then."""
        ...

    def details(self) -> dict[str, Any]:
        """The details that are known before training."""
        ...


class TaskSubject:
    """A task with its arms.

    Args:
        task: The task. It is traced again in every study: data, and values that a function reads, may have
            changed since an earlier call.
        arms: The arms by name.
        grids: Each arm's learning rates.
        steps: Training steps per trial.
        options: `compare`'s arguments for tasks alone, checked here.

    Raises:
        ValueError: If an argument is out of range or an arm does not run.
    """

    def __init__(
        self,
        task: Task,
        arms: Mapping[str, Any],
        grids: Mapping[str, Sequence[float]],
        steps: int,
        *,
        base_seed: int,
        evaluate: Any,
        validation_points: Any,
        paired_batches: bool,
        mode: str | None,
        chunk: int | None,
        start: Start | None,
    ):
        check_bool("paired_batches", paired_batches)
        if mode is not None:
            check_choice("mode", mode, MODES)
        if chunk is not None:
            check_integer("chunk", chunk, f"[1, {MOST_CHUNK}]")
            chunk = int(chunk)
        self.task: Task = copy.copy(task)
        self.plan: Plan = Plan(steps, _validation_steps(validation_points, steps))
        self._mode, self._chunk, self._base_seed = mode, chunk, base_seed
        self._paired_batches, self._rates = paired_batches, {name: grids[name][0] for name in arms}
        evaluates = _check_evaluate(evaluate, arms)
        self._start = start
        if start is not None:
            check_start(start, self.task)
        self.specs: dict[str, ArmSpec] = {}
        for name, function in arms.items():
            given = function, self.task, self.plan, evaluates[name], self._rates[name]
            compilation, origin = check_arm(name, *given), None
            if start is not None:
                origin = origin_of(start, function(self._rates[name], steps).init(start.params), name)
                compilation = check_arm(name, *given, origin)
            stream = 0 if paired_batches else stream_of(name)
            self.specs[name] = ArmSpec(function, compilation, evaluates[name], stream, origin)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def maximize(self) -> bool:
        """The task's direction."""
        return self.task.maximize

    def check_relative_margin(self) -> None:
        """Refuses a metric that is negative before training: 1 % of it cannot be a margin."""
        task = self.task
        start = jax.jit(lambda data: task.validation_metric(*task.start(jax.random.key(0)), data))
        initial = float(start(task.validation))
        if initial < 0:
            raise ValueError(
                f"margin must be given, in the metric's units: the metric is {initial:.4g} before training, "
                "and 1 % of that cannot be a margin."
            )

    def compilation(self, arm: str) -> str:
        """Whether an arm is compiled once, or per rate."""
        return self.specs[arm].compilation

    def store(self, out: Any) -> Store:
        """Opens a folder; trials are recognized by their programs and data."""

        def programs(name: str, spec: ArmSpec) -> ArmPrograms:
            digests = functools.partial(describe_arm, name, self.task, spec, self.plan)
            return ArmPrograms(spec.compilation == "per rate", functools.cache(digests))

        return Store(
            out,
            describe_study(self.task, self.plan, self._base_seed, self._paired_batches, self._start),
            {name: programs(name, spec) for name, spec in self.specs.items()},
        )

    def trainer(self, store: Store | None, executor: Any, *, trials: int) -> tuple[Trainer, dict[str, Any]]:
        """Chooses how trials are placed on devices."""
        placement, seconds_per_step = settle_placement(
            self.task, self.specs, self.plan, store,
            trials=trials, example_rate=next(iter(self._rates.values())), mode=self._mode, chunk=self._chunk,
            executor=executor,
        )  # fmt: skip
        found = {"mode": placement.mode, "chunk": placement.width, "seconds_per_step": seconds_per_step}
        return TaskTrainer(self.task, self.specs, self.plan, placement, self._base_seed), found

    def details(self) -> dict[str, Any]:
        """What is known of a task."""
        task, steps = self.task, self.plan.steps
        return {
            "judged": {
                name: describe_judged(task, spec.function, spec.evaluate, self._rates[name], steps)
                for name, spec in self.specs.items()
            },
            "start_step": None if self._start is None else int(self._start.step),
            "mode": self._mode,
            "chunk": self._chunk,
            "devices": tuple(device.device_kind for device in jax.devices()),
            "metric_name": task.metric_name,
            "dataset": Samples(task.train_count, task.validation_count),
            "batch_size": task.batch_size,
            "parameters": task.parameter_count,
        }


class FunctionSubject:
    """The user's own training function with its arms.

    Args:
        function: The function, `train(run) -> metric`.
        arms: The arms by name.
        grids: Each arm's learning rates.
        steps: Training steps per trial.
        base_seed: Part of all seeds.
        maximize: Whether higher metrics are better; None if the call does not say.
        name: What the function is called in reports; None for its own name.
        metric_name: What the metric is called there; None for "metric".

    Raises:
        ValueError: If an arm cannot be called, or is judged by what needs a task.
    """

    def __init__(
        self,
        function: Train,
        arms: Mapping[str, Any],
        grids: Mapping[str, Sequence[float]],
        steps: int,
        *,
        base_seed: int,
        maximize: bool | None,
        name: str | None = None,
        metric_name: str | None = None,
    ):
        for each, arm in arms.items():
            if not callable(arm):
                raise ValueError(
                    f"arm {each!r} must be a function of (learning_rate, total_steps), "
                    f"got {type(arm).__name__}."
                )
        self._says, self._name, self._metric_name = maximize, name, metric_name or "metric"
        self.maximize: bool = bool(maximize)
        self.plan: Plan = Plan(steps, ())
        self._evaluates: dict[str, Evaluate | None] = {
            each: _without_task(each, arm, grids[each][0], steps) for each, arm in arms.items()
        }
        self._function, self._arms, self._base_seed = function, dict(arms), base_seed

    @property
    def name(self) -> str:
        """The function's name."""
        if self._name is not None:
            return self._name
        function = self._function
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__name__", type(function).__name__)

    def compilation(self, arm: str) -> str:
        """Nothing is known of it."""
        return ""

    def store(self, out: Any) -> Store:
        """Opens a folder; trials are recognized by the code of the function and of their arm."""

        def code(name: str, arm: Any) -> ArmPrograms:
            found = arm.__name__ if isinstance(arm, NamedArm) else digest_code(arm, f"arm {name!r}")
            return ArmPrograms(False, lambda rate: {"code": found})

        description = {
            "train code": digest_code(self._function),
            "steps": self.plan.steps,
            "base seed": self._base_seed,
            "maximize": self.maximize,
            "environment": {"python": ".".join(platform.python_version_tuple()[:2])},
        }
        return Store(out, description, {name: code(name, arm) for name, arm in self._arms.items()})

    def trainer(self, store: Store | None, executor: Any, *, trials: int) -> tuple[Trainer, dict[str, Any]]:
        """Calls the function."""
        given = self._function, self._arms, self.plan.steps, self._base_seed, self._evaluates
        return FunctionTrainer(*given), {}

    def details(self) -> dict[str, Any]:
        """What is known of a function: nothing but what it returns."""
        return {
            "metric_name": self._metric_name,
            "devices": (),
            "judged": {name: describe_evaluate(evaluate) for name, evaluate in self._evaluates.items()},
            "direction_stated": self._says is not None,
        }


def _without_task(name: str, arm: Any, rate: float, steps: int) -> Evaluate | None:
    """What an arm is judged by in a training function; None for its trained parameters."""
    found = declared(arm, "evaluate")
    if found is None and (isinstance(arm, NamedArm) or not keeps_average(arm, rate, steps)):
        return None
    return without_task(f"evaluate of arm {name!r}", AVERAGE_IF_KEPT if found is None else found)


def _check_evaluate(evaluate: Any, arms: Mapping[str, Any]) -> dict[str, Evaluate | None]:
    if evaluate is not None and not isinstance(evaluate, Mapping):
        check_evaluate("evaluate", evaluate)
        return dict.fromkeys(arms, evaluate)
    given = {} if evaluate is None else evaluate
    for name in given:
        check_choice("evaluate", name, arms)
    found = {}
    for name, arm in arms.items():
        found[name] = given[name] if name in given else declared(arm, "evaluate") or AVERAGE_IF_KEPT
        if found[name] is not None:
            check_evaluate(f"evaluate of arm {name!r}", found[name])
    return found


def _validation_steps(points: Any, steps: int) -> tuple[int, ...]:
    if isinstance(points, Sequence | np.ndarray) and not isinstance(points, str):
        for point in points:
            check_integer("validation_points", point, f"[0, {steps}]", "steps per trial")
        return tuple(sorted({0, *map(int, points), steps}))
    check_integer("validation_points", points, f"[1, {MOST_POINTS}]")
    return tuple(sorted(set(np.linspace(0, steps, int(points) + 1).round().astype(int).tolist())))

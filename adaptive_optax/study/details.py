"""The details of a comparison: everything except its trials, and its form in a saved file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from adaptive_optax.study.direction import Direction
from adaptive_optax.study.judged import Judged
from adaptive_optax.study.statistics.sequential import Sequential

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Samples:
    """The numbers of training and validation samples."""

    train: int
    validation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Details:
    """What a comparison was asked for, what tuning chose, and how it ran.

    Mappings are keyed by arm unless stated otherwise. A file of an earlier version may lack the fields that
    have a default.

    Attributes:
        task: The task's name.
        baseline: The arm that the others are compared with.
        arms: All arms, in the user's order.
        usual_arms: For the standard arms, the name that `study.arm` takes.
        own_arms: Where the user's own arms are defined, if known: "module:function",
            "path/to/file.py:function", "function", or "optimizer(schedule)" in `decay_now`.
        judged: Which parameters of an arm are judged; for a training function, those that
            `Run.eval_params` returns.
        steps: Training steps per trial.
        tuning: How rates are chosen, "grid" or "race".
        tuning_seeds: The number of seeds for choosing rates; in a race, the most for a rate.
        seeds: The number of fresh seeds; with a plan, the most for an arm.
        sequential: The plan of fresh seeds, if there is one.
        wanted: The numbers of trials known to be wanted by now, on tuning seeds and on fresh ones.
        margin: The margin of equivalence in the metric's units; None for a relative one.
        maximize: Whether higher metrics are better.
        direction_stated: Whether the task or the call says so; a training function alone does not.
        start_step: The step of the run under way from which arms go on; None if they begin anew.
        out: The folder in which trials are saved.
        own_rates: The arms that were tuned over rates that they declare, not over those given to all.
        looks: The number of fresh seeds at each look so far, this one last; empty before the first.
        best_rates: The peak rate that tuning chose.
        on_edge: Whether that rate is on the edge of the rates tried.
        grid: The peak rates tried, ascending.
        grown: The rates among them that were added to the user's grid.
        mode: How trials of a task ran: "scan", "step" or "vmap" (see `engine.trials`); None for a training
            function, as are chunk, dataset, batch_size and parameters.
        chunk: The number of trials per call, on all devices together.
        executor: The kind of executor that ran them; None if the calling process did.
        seconds_per_step: Seconds per step, for each mode that was timed.
        devices: The kind of each device.
        versions: Versions by package, including Python's.
        command: The calling program and its arguments.
        metric_name: The metric's name.
        dataset: The numbers of samples.
        batch_size: Samples in a training batch.
        parameters: The number of parameters.
        seconds: How long the call took.
    """

    task: str
    baseline: str
    arms: Sequence[str]
    usual_arms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_arms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    judged: Mapping[str, Judged] = dataclasses.field(default_factory=dict)
    steps: int
    tuning: str = "grid"
    tuning_seeds: int
    seeds: int
    sequential: Sequential | None = None
    wanted: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    margin: float | None
    maximize: bool = False
    direction_stated: bool = True
    start_step: int | None = None
    out: str | None = None
    own_rates: Sequence[str] = ()
    looks: Sequence[int]
    best_rates: Mapping[str, float]
    on_edge: Mapping[str, bool]
    mode: str | None = None
    chunk: int | None = None
    executor: str | None = None
    seconds_per_step: Mapping[str, float]
    devices: Sequence[str]
    versions: Mapping[str, str]
    command: Sequence[str]
    metric_name: str
    dataset: Samples | None = None
    batch_size: int | None = None
    parameters: int | None = None
    grid: Mapping[str, Sequence[float]]
    grown: Mapping[str, Sequence[float]]
    seconds: float

    @property
    def rivals(self) -> list[str]:
        """All arms but the baseline."""
        return [arm for arm in self.arms if arm != self.baseline]

    @property
    def direction(self) -> Direction:
        """Which metrics are better."""
        return Direction(self.maximize)

    @property
    def tuned(self) -> bool:
        """Whether some arm had several rates to choose from; a run under way usually has its rate."""
        return not self.grid or any(len(rates) > 1 for rates in self.grid.values())

    @property
    def goes_on(self) -> bool:
        """Whether a run under way goes on at its own rate: no arm was chosen by tuning."""
        return self.start_step is not None and not self.tuned

    @property
    def seconds_a_step(self) -> Mapping[str, float]:
        """The former name of `seconds_per_step`."""
        return self.seconds_per_step

    def as_json(self) -> dict[str, Any]:
        """Returns a copy made of dictionaries, lists, strings and numbers, the form of a saved file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, found: Any) -> Details:
        """Reads what `as_json` returns; ignores unknown names.

        Raises:
            ValueError: If something is missing, has another type, or contradicts the rest.
        """
        given = dict(found) if isinstance(found, dict) else {}
        for former, name in _FORMER_NAMES.items():
            if former in given:
                given.setdefault(name, given[former])
        try:
            details = cls(**{name: read(given[name]) for name, read in _READERS.items() if name in given})
        except TypeError as error:  # arguments are missing
            raise ValueError(str(error)) from error
        plan = details.sequential
        if not (
            details.baseline in details.arms
            and details.best_rates.keys() | details.grid.keys() <= set(details.arms)
            and all(seeds > 0 for seeds in details.looks)
            and (plan is None or details.looks == plan.looks[: len(details.looks)])
            and all(len(counts) == 2 for counts in details.wanted.values())
            and (details.margin is None or details.margin > 0)
        ):
            raise ValueError("contradicts itself")
        return details


# ---- From JSON ----


def _refuse(value: Any) -> NoReturn:
    raise ValueError(f"holds {value!r} in an invalid place")


def _exactly(kind: type[T]) -> Callable[[Any], T]:
    """Returns a reader of one type; a bool does not count as an int."""
    return lambda value: value if type(value) is kind else _refuse(value)


def _number(value: Any) -> float:
    return value if type(value) in (int, float) else _refuse(value)


def _optional(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else read(value)


def _list_of(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    return lambda value: tuple(map(read, value)) if isinstance(value, list) else _refuse(value)


def _mapping_of(read: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def read_all(value: Any) -> dict[str, T]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            _refuse(value)
        return {name: read(each) for name, each in value.items()}

    return read_all


def _judged(value: Any) -> Judged:
    words = _list_of(_exactly(str))(value)
    return Judged(*words) if len(words) == len(Judged._fields) else _refuse(value)


def _samples(value: Any) -> Samples:
    counts = _mapping_of(_exactly(int))(value)
    return Samples(**counts) if counts.keys() == {"train", "validation"} else _refuse(value)


def _plan(value: Any) -> Sequential:
    sizes = _mapping_of(_exactly(int))(value)
    return Sequential(**sizes) if sizes.keys() == {"first", "most"} else _refuse(value)


_FORMER_NAMES = {"seconds_a_step": "seconds_per_step"}  # in files of earlier versions

_READERS: dict[str, Callable[[Any], Any]] = {
    "task": _exactly(str),
    "baseline": _exactly(str),
    "arms": _list_of(_exactly(str)),
    "usual_arms": _mapping_of(_exactly(str)),
    "own_arms": _mapping_of(_exactly(str)),
    "judged": _mapping_of(_judged),
    "steps": _exactly(int),
    "tuning": _exactly(str),
    "tuning_seeds": _exactly(int),
    "seeds": _exactly(int),
    "sequential": _optional(_plan),
    "wanted": _mapping_of(_list_of(_exactly(int))),
    "margin": _optional(_number),
    "maximize": _exactly(bool),
    "direction_stated": _exactly(bool),
    "start_step": _optional(_exactly(int)),
    "out": _optional(_exactly(str)),
    "own_rates": _list_of(_exactly(str)),
    "looks": _list_of(_exactly(int)),
    "best_rates": _mapping_of(_number),
    "on_edge": _mapping_of(_exactly(bool)),
    "mode": _optional(_exactly(str)),
    "chunk": _optional(_exactly(int)),
    "executor": _optional(_exactly(str)),
    "seconds_per_step": _mapping_of(_number),
    "devices": _list_of(_exactly(str)),
    "versions": _mapping_of(_exactly(str)),
    "command": _list_of(_exactly(str)),
    "metric_name": _exactly(str),
    "dataset": _optional(_samples),
    "batch_size": _optional(_exactly(int)),
    "parameters": _optional(_exactly(int)),
    "grid": _mapping_of(_list_of(_number)),
    "grown": _mapping_of(_list_of(_number)),
    "seconds": _number,
}

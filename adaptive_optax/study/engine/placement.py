"""Chooses how trials are placed on devices: by timing on CPUs, by memory on accelerators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from adaptive_optax.study.engine.jobs import call_on
from adaptive_optax.study.engine.runner import agree
from adaptive_optax.study.engine.store import Store
from adaptive_optax.study.engine.trainers import ArmSpec
from adaptive_optax.study.engine.trials import Placement, Plan, Program, program
from adaptive_optax.study.task import Task

MODES = ("scan", "step", "vmap")
MOST_CHUNK = 100_000
STEP_ADVANTAGE = 1.25  # one call per step is chosen only if it is this much faster than the loop


def settle_placement(
    task: Task,
    arms: Mapping[str, ArmSpec],
    plan: Plan,
    store: Store | None = None,
    *,
    trials: int,
    example_rate: float,
    mode: str | None = None,
    chunk: int | None = None,
    executor: Any = None,
) -> tuple[Placement, dict[str, float]]:
    """Decides how to place the trials; returns the placement, and seconds per step for each timed mode.

    On CPUs the loop and single calls are timed with one arm. On accelerators all trials run in parallel, or
    as many as leave a third of the memory free. A resumed study keeps its original placement, and all
    processes of a distributed study use the same one.

    Args:
        task: The task.
        arms: The arms; one that takes a traced rate is timed, if there is one.
        plan: Steps and validation points.
        store: The study's folder, or None.
        trials: The largest number of trials that will be requested at once.
        example_rate: The rate used to time an arm that refuses a traced rate.
        mode: The mode to use; None chooses.
        chunk: Trials per call on each device; None chooses.
        executor: Its workers train, so that one of them chooses; None if this process trains.

    Raises:
        ValueError: If the study was begun with a different mode or chunk.
    """
    is_possible = _is_placement if executor is None else _is_consistent
    begun = store.placement(is_possible) if store else None
    if begun is None:
        choose = functools.partial(choose_placement, task, arms, plan, trials, example_rate, mode, chunk)
        if executor is None:
            placement, seconds = choose()
            agreed = agree([MODES.index(placement.mode), placement.width, placement.devices])
            placement = Placement(MODES[int(agreed[0])], int(agreed[1]), int(agreed[2]))
        else:
            placement, seconds = call_on(executor, choose)
        if store is None:
            return placement, seconds
        begun = store.settle_placement({"layout": placement, "seconds a step": seconds}, is_possible)
    placement = Placement(*begun["layout"])
    local = placement.width // placement.devices
    for name, asked, is_now in (("mode", mode, placement.mode), ("chunk", chunk, local)):
        if asked not in (None, is_now) and not (name == "chunk" and placement.mode == "step"):
            raise ValueError(f"{name} must be {is_now!r}, as in the study already in out, got {asked!r}.")
    return placement, begun["seconds a step"]


def _is_placement(begun: Any) -> bool:
    """Whether a stored placement is valid for these devices."""
    return _is_consistent(begun) and begun["layout"][2] <= len(jax.local_devices())


def _is_consistent(begun: Any) -> bool:
    """Whether a stored placement is valid for some devices."""
    try:
        (mode, width, devices), seconds = begun["layout"], begun["seconds a step"]
        return (
            mode in MODES
            and type(width) is type(devices) is int
            and 1 <= devices <= width <= MOST_CHUNK * devices
            and width % devices == 0
            and (mode != "step" or width == devices)
            and all(name in MODES and type(value) is float for name, value in seconds.items())
            and all(0 < value < float("inf") for value in seconds.values())
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # has another structure altogether
        return False


def choose_placement(
    task: Task,
    arms: Mapping[str, ArmSpec],
    plan: Plan,
    trials: int,
    example_rate: float,
    mode: str | None,
    chunk: int | None,
) -> tuple[Placement, dict[str, float]]:
    """Chooses a placement on this process's devices; also returns the seconds per step of each timed mode."""
    spec = min(arms.values(), key=lambda spec: spec.compilation != "once")
    rate = None if spec.compilation == "once" else example_rate

    def compiled(placement: Placement) -> Program:
        return program(task, spec.function, plan, placement, spec.evaluate, rate, spec.origin)

    return _choose(compiled, plan.steps, trials, mode, chunk)


def _choose(
    compiled: Callable[[Placement], Program], steps: int, trials: int, mode: str | None, chunk: int | None
) -> tuple[Placement, dict[str, float]]:
    devices = min(len(jax.local_devices()), trials)
    if mode is None and jax.default_backend() != "cpu":
        mode = "vmap"
    if mode == "step":
        return Placement(mode, devices, devices), {}
    if mode is not None and chunk is not None:
        return Placement(mode, chunk * devices, devices), {}
    if mode == "vmap":
        width = min(-(-trials // devices), MOST_CHUNK) * devices
        return _fit_memory(compiled, Placement(mode, width, devices)), {}
    seconds = _seconds_per_step(
        {name: compiled(Placement(name, devices, devices)) for name in ([mode] if mode else ["scan", "step"])}
    )
    if mode is None and seconds["step"] * STEP_ADVANTAGE < seconds["scan"]:
        return Placement("step", devices, devices), seconds
    # Several trials per call save calls; calls over two seconds would make progress and stopping coarse.
    if chunk is None:
        most = min(max(1, trials // devices // 2), MOST_CHUNK)
        chunk = int(np.clip(2.0 / (seconds["scan"] * steps), 1, most))
    return Placement("scan", chunk * devices, devices), seconds


def _seconds_per_step(programs: dict[str, Program]) -> dict[str, float]:
    """Times steps on all devices at once: the best of several rounds, with the programs interleaved."""
    counts, seconds = {}, dict.fromkeys(programs, float("inf"))
    for name, each in programs.items():
        each.seconds(1)  # warm up
        counts[name] = 1
        while counts[name] < each.plan.steps and each.seconds(counts[name]) < 0.1:
            counts[name] = min(2 * counts[name], each.plan.steps)
    for _ in range(3):
        for name, each in programs.items():
            took = each.seconds(counts[name]) - each.seconds(0)  # without the evaluation
            seconds[name] = min(max(took, 1e-9) / counts[name], seconds[name])
    return seconds


def _fit_memory(compiled: Callable[[Placement], Program], placement: Placement) -> Placement:
    limit = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
    while limit and placement.width > placement.devices:
        needed = compiled(placement).bytes_needed
        if needed < 0.67 * limit:
            break
        local = placement.width // placement.devices
        local = max(1, min(local // 2, int(local * 0.6 * limit / needed)))
        placement = placement._replace(width=local * placement.devices)
    return placement

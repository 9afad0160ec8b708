"""How to lay trials out on the devices at hand: measured on CPUs, sized to memory on accelerators."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from adaptive_optax.study.runner import ArmSpec, agree
from adaptive_optax.study.store import Store
from adaptive_optax.study.task import Task
from adaptive_optax.study.trials import Layout, Plan, Program, program

MODES = ("scan", "step", "vmap")
STEP_ADVANTAGE = 1.25  # calls a step must be this much faster than the loop to be chosen


def settle_layout(
    task: Task,
    arms: dict[str, ArmSpec],
    plan: Plan,
    store: Store | None = None,
    *,
    trials: int,
    example_rate: float,
    mode: str | None = None,
    chunk: int | None = None,
) -> tuple[Layout, dict[str, float]]:
    """Decides how to lay out the trials; gives the layout and seconds a step for each mode that was timed.

    On CPUs the loop and single calls are timed with one arm. On accelerators all trials run side by side, or
    as many as leave a third of the memory free. A study that goes on keeps the layout it was begun with, and
    all processes of a distributed run have the same.

    Args:
        task: The task.
        arms: The arms; one that takes a traced rate is timed, if there is one.
        plan: Steps and validation points.
        store: The study's folder, or None.
        trials: The most trials that will be asked for at once.
        example_rate: The rate to time an arm with that refuses a traced one.
        mode: A mode to use instead of choosing one.
        chunk: Trials a call on each device, instead of choosing it.

    Raises:
        ValueError: If the study was begun with another mode or chunk than the ones asked for.
    """
    begun = store.layout if store else None
    if begun is None:
        spec = min(arms.values(), key=lambda spec: spec.compilation != "once")
        rate = None if spec.compilation == "once" else example_rate

        def compiled(layout: Layout) -> Program:
            return program(task, spec.function, plan, layout, spec.evaluate, rate)

        layout, seconds = _choose(compiled, plan.steps, trials, mode, chunk)
        agreed = agree([MODES.index(layout.mode), layout.width, layout.devices])
        layout = Layout(MODES[int(agreed[0])], int(agreed[1]), int(agreed[2]))
        if store is None:
            return layout, seconds
        begun = store.settle_layout({"layout": layout, "seconds a step": seconds})
    layout = Layout(*begun["layout"])
    local = layout.width // layout.devices
    for name, asked, is_now in (("mode", mode, layout.mode), ("chunk", chunk, local)):
        if asked not in (None, is_now) and not (name == "chunk" and layout.mode == "step"):
            raise ValueError(
                f"{name} must be {is_now!r}, with which the study in out was begun, got {asked!r}."
            )
    return layout, begun["seconds a step"]


def _choose(
    compiled: Callable[[Layout], Program], steps: int, trials: int, mode: str | None, chunk: int | None
) -> tuple[Layout, dict[str, float]]:
    devices = min(len(jax.local_devices()), trials)
    if mode is None and jax.default_backend() != "cpu":
        mode = "vmap"
    if mode == "step":
        return Layout(mode, devices, devices), {}
    if mode is not None and chunk is not None:
        return Layout(mode, chunk * devices, devices), {}
    if mode == "vmap":
        return _fit_memory(compiled, Layout(mode, -(-trials // devices) * devices, devices)), {}
    seconds = _seconds_a_step(
        {name: compiled(Layout(name, devices, devices)) for name in ([mode] if mode else ["scan", "step"])}
    )
    if mode is None and seconds["step"] * STEP_ADVANTAGE < seconds["scan"]:
        return Layout("step", devices, devices), seconds
    # Several trials a call spare calls; more than two seconds a call would make progress and stopping coarse.
    if chunk is None:
        chunk = int(np.clip(2.0 / (seconds["scan"] * steps), 1, max(1, trials // devices // 2)))
    return Layout("scan", chunk * devices, devices), seconds


def _seconds_a_step(programs: dict[str, Program]) -> dict[str, float]:
    """Times steps of all devices at once: the best of several rounds in which the programs take turns."""
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


def _fit_memory(compiled: Callable[[Layout], Program], layout: Layout) -> Layout:
    limit = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
    while limit and layout.width > layout.devices:
        needed = compiled(layout).bytes_needed
        if needed < 0.67 * limit:
            break
        local = layout.width // layout.devices
        local = max(1, min(local // 2, int(local * 0.6 * limit / needed)))
        layout = layout._replace(width=local * layout.devices)
    return layout

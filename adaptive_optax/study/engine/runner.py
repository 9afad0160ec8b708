"""Runs the missing trials of a study, one chunk at a time, in this and other processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_optax.study.engine.chunks import Curves, Key, Results, pack, unpack
from adaptive_optax.study.engine.progress import TrialProgress
from adaptive_optax.study.engine.store import Store
from adaptive_optax.study.engine.trials import Placement, Plan, as_trials, program
from adaptive_optax.study.evaluation import Arm, Evaluate
from adaptive_optax.study.task import Task

POLL_SECONDS = 0.2  # how often to check whether another process has finished its chunk


class ArmSpec(NamedTuple):
    """An arm in the form that the runner needs."""

    function: Arm
    compilation: str  # "once", or "per rate" for an arm that refuses a traced rate
    evaluate: Evaluate | None
    stream: int  # 0 if trials are paired by their seed


class Runner:
    """Trains the requested trials and collects their curves in `results`.

    Processes that share a store share the work: each claims chunks that no other process is running. Under
    `jax.distributed` the chunks are divided among the processes and the results exchanged.

    Args:
        task: The task.
        arms: The arms by name.
        plan: Steps and validation points.
        placement: How trials are placed on this process's devices.
        store: Where finished chunks are saved, or None.
        progress: Shows the progress of the trials.
        base_seed: Part of every trial's key.
    """

    def __init__(
        self,
        task: Task,
        arms: dict[str, ArmSpec],
        plan: Plan,
        placement: Placement,
        store: Store | None,
        progress: TrialProgress,
        base_seed: int = 0,
    ):
        self.task: Task = task
        self.arms: dict[str, ArmSpec] = arms
        self.plan: Plan = plan
        self.placement: Placement = placement
        self.store: Store | None = store
        self.progress: TrialProgress = progress
        self.base_seed: int = base_seed
        self.results: Results = store.read() if store else {}
        self._exchange()

    def run(self, keys: Sequence[Key], phase: str) -> None:
        """Trains the trials that are not yet in `results`."""
        if self.store is not None:
            self.store.admit(keys)
        chunks = [chunk for chunk in self._chunks(keys) if any(key not in self.results for key in chunk)]
        waiting = chunks[jax.process_index() :: jax.process_count()]
        while waiting:
            before = len(waiting)
            waiting = [chunk for chunk in waiting if not self._finish(chunk, phase)]
            if len(waiting) == before:
                time.sleep(POLL_SECONDS)
        self._exchange()

    def _chunks(self, keys: Sequence[Key]) -> list[list[Key]]:
        groups: dict[tuple[str, float | None], list[Key]] = {}
        for key in keys:
            rate = key.rate if self.arms[key.arm].compilation == "per rate" else None
            groups.setdefault((key.arm, rate), []).append(key)
        width = self.placement.width
        return [group[i : i + width] for group in groups.values() for i in range(0, len(group), width)]

    def _finish(self, chunk: list[Key], phase: str) -> bool:
        """Trains the missing trials of a chunk unless another process is; returns whether it is finished."""
        if self.store is None:
            self._train([key for key in chunk if key not in self.results], phase)
            return True
        with self.store.claim(chunk) as is_mine:
            self.results |= self.store.read()
            missing = [key for key in chunk if key not in self.results]
            if is_mine and missing:
                self.store.write(self._train(missing, phase))
            elif not missing:
                self.progress.advance(len(chunk))
            return is_mine or not missing

    def _train(self, keys: list[Key], phase: str) -> Results:
        spec = self.arms[keys[0].arm]
        rate = keys[0].rate if spec.compilation == "per rate" else None
        self.progress.describe(f"{keys[0].arm} ({phase})")
        compiled = program(self.task, spec.function, self.plan, self.placement, spec.evaluate, rate)
        trials = as_trials(
            [key.rate for key in keys], [key.seed for key in keys], spec.stream, self.base_seed
        )
        with self.progress.part(len(keys)) as part:
            curves = compiled.run(trials, lambda step: part(step / self.plan.steps))
        found = {key: Curves(*each) for key, each in zip(keys, zip(*curves, strict=True), strict=True)}
        self.results |= found
        for each in found.values():
            self.progress.seen(each.validation[-1])
        return found

    def _exchange(self) -> None:
        """Gives every process of a distributed study the results of all."""
        if jax.process_count() == 1:
            return
        mine = np.frombuffer(pack(self.results) if self.results else b"", np.uint8)
        sizes = np.asarray(multihost_utils.process_allgather(np.array([mine.size]))).ravel()
        padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
        padded[: mine.size] = mine
        for size, data in zip(sizes, multihost_utils.process_allgather(padded), strict=True):
            if size:
                self.results |= unpack(np.asarray(data[:size]).tobytes())


def agree(value: Sequence[float]) -> list[float]:
    """Returns the first process's numbers, in every process of a distributed study."""
    if jax.process_count() == 1:
        return list(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(value, np.float32))).tolist()

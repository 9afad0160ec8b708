"""Runs the trials of a study: those that are missing, a chunk at a time, on this and other processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_optax.study.progress import TrialProgress
from adaptive_optax.study.store import Key, Record, Results, Store, pack, unpack
from adaptive_optax.study.task import Task
from adaptive_optax.study.trials import Arm, Evaluate, Layout, Plan, as_trials, program

POLL_SECONDS = 0.2  # how often to look whether another process has finished its chunk


class ArmSpec(NamedTuple):
    """An arm as the runner needs it."""

    function: Arm
    compilation: str  # "once", or "per rate" for an arm that refuses a traced rate
    evaluate: Evaluate | None
    stream: int  # 0 where trials are paired by their seed


class Runner:
    """Trains the trials asked for, and keeps what they leave behind in `results`.

    Processes that share a store share the work: each claims chunks that nobody works on. Under
    `jax.distributed` the chunks are dealt out to the processes and the results exchanged.

    Args:
        task: The task.
        arms: The arms by name.
        plan: Steps and validation points.
        layout: How trials are laid out on this process's devices.
        store: Where finished chunks are kept, or None.
        progress: Shows how far the trials are.
        base_seed: Part of every trial's key.
    """

    def __init__(
        self,
        task: Task,
        arms: dict[str, ArmSpec],
        plan: Plan,
        layout: Layout,
        store: Store | None,
        progress: TrialProgress,
        base_seed: int = 0,
    ):
        self.task, self.arms, self.plan, self.layout = task, arms, plan, layout
        self.store, self.progress, self.base_seed = store, progress, base_seed
        self.results: Results = store.read() if store else {}
        self._exchange()

    def run(self, keys: Sequence[Key], phase: str) -> None:
        """Trains those of the trials that are not in `results` yet."""
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
        width = self.layout.width
        return [group[i : i + width] for group in groups.values() for i in range(0, len(group), width)]

    def _finish(self, chunk: list[Key], phase: str) -> bool:
        """Trains what is missing of a chunk, unless another process is at it; gives whether it is done."""
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
        compiled = program(self.task, spec.function, self.plan, self.layout, spec.evaluate, rate)
        trials = as_trials(
            [key.rate for key in keys], [key.seed for key in keys], spec.stream, self.base_seed
        )
        with self.progress.part(len(keys)) as part:
            records = compiled.run(trials, lambda step: part(step / self.plan.steps))
        found = {key: Record(*record) for key, record in zip(keys, zip(*records, strict=True), strict=True)}
        self.results |= found
        for record in found.values():
            self.progress.seen(record.validation[-1])
        return found

    def _exchange(self) -> None:
        """Gives every process of a distributed run the results of all."""
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
    """Gives every process of a distributed run the numbers of the first."""
    if jax.process_count() == 1:
        return list(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(value, np.float32))).tolist()

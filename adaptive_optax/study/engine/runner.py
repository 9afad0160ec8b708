"""Runs the missing trials of a study, one chunk at a time, in this and other processes."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive_optax.study.engine.chunks import Key, Results, pack, read_arrays, unpack
from adaptive_optax.study.engine.jobs import POLL_SECONDS, Jobs, done_of, most_jobs
from adaptive_optax.study.engine.progress import TrialProgress
from adaptive_optax.study.engine.store import DIED, Store
from adaptive_optax.study.engine.trainers import Trainer


class Runner:
    """Trains the requested trials and collects their curves in `results`.

    Processes that share a store share the work: each claims chunks that no other process is running. Under
    `jax.distributed` the chunks are divided among the processes and the results exchanged; or every process
    trains all (`Trainer.divides`), and process 0 saves its results and gives them to the others.

    Args:
        trainer: Trains the trials.
        store: Where finished chunks are saved, or None.
        progress: Shows the progress of the trials.
        executor: Where the chunks are trained; None for this process.
    """

    def __init__(self, trainer: Trainer, store: Store | None, progress: TrialProgress, executor: Any = None):
        self.trainer: Trainer = trainer
        self.store: Store | None = store
        self.progress: TrialProgress = progress
        self.jobs: Jobs | None = (
            None if executor is None else Jobs(executor, trainer, store.path if store else None)
        )
        self._known: set[Key] = set()  # trials of this round that were there before
        self.results: Results = {}
        if store is not None:
            found = store.read()
            again = store.forget_raised()  # what they lacked may be there now
            self.results |= {key: curves for key, curves in found.items() if key not in again}
        self._exchange()

    def close(self) -> None:
        """Removes what was written for the executor's workers."""
        if self.jobs is not None:
            self.jobs.close()

    def run(self, keys: Sequence[Key], phase: str) -> None:
        """Trains the trials that are not yet in `results`."""
        if self.store is not None:
            self.store.admit(keys)
        self._known = {key for key in keys if key in self.results}
        self.progress.found(len(self._known))
        chunks = [chunk for chunk in self.trainer.chunks(keys) if self._missing(chunk)]
        if self.jobs is not None:
            if not (self._is_together() and jax.process_index()):
                self._send(chunks, phase, self.jobs)
        elif self._is_together():
            for chunk in chunks:
                self._train(chunk, phase)
        else:
            waiting = chunks[jax.process_index() :: jax.process_count()]
            while waiting:
                before = len(waiting)
                waiting = [chunk for chunk in waiting if not self._finish(chunk, phase)]
                if len(waiting) == before:
                    time.sleep(POLL_SECONDS)
        self._exchange()

    def _missing(self, chunk: Sequence[Key]) -> list[Key]:
        return [key for key in chunk if key not in self.results]

    def _found_elsewhere(self, chunk: Sequence[Key]) -> None:
        """Counts what another process has trained in the meantime."""
        self.progress.found(len([key for key in chunk if key not in self._known]))

    def _finish(self, chunk: list[Key], phase: str) -> bool:
        """Trains the missing trials of a chunk unless another process is; returns whether it is finished."""
        with self._claim(chunk) as is_mine:
            missing = self._missing(chunk)
            if is_mine and missing:
                self._train(missing, phase)
            elif not missing:
                self._found_elsewhere(chunk)
            return is_mine or not missing

    def _is_together(self) -> bool:
        return jax.process_count() > 1 and not self.trainer.divides

    def _train(self, keys: list[Key], phase: str) -> None:
        """Trains trials in this process."""
        self.progress.describe(f"{keys[0].arm} ({phase})")
        began = time.perf_counter()
        with self.progress.part(len(keys)) as part:
            found = self.trainer.train(keys, part)
        self.progress.took(time.perf_counter() - began, len(keys))
        self._keep(found, phase)

    def _send(self, chunks: list[list[Key]], phase: str, jobs: Jobs) -> None:
        """Trains chunks on the executor's workers; those that another process is training come last."""
        running: dict[Any, tuple[list[Key], contextlib.ExitStack]] = {}
        began = time.perf_counter()
        suspected = self.store.suspected() if self.store else set[Key]()
        waiting = sorted(chunks, key=lambda chunk: not suspected.isdisjoint(chunk))  # those come last
        taken, most = [], most_jobs(self.store is not None)
        try:
            while waiting or taken or running:
                while waiting and len(running) < (most if suspected.isdisjoint(waiting[0]) else 1):
                    chunk = waiting.pop(0)
                    with contextlib.ExitStack() as claim:
                        is_mine = claim.enter_context(self._claim(chunk))
                        missing = self._missing(chunk)
                        if is_mine and missing:
                            if not suspected.isdisjoint(missing):
                                jobs.check()
                            job = jobs.submit(missing)
                            running[job] = missing, claim.pop_all()
                            continue
                    if missing:
                        taken.append(chunk)
                    else:
                        self._found_elsewhere(chunk)
                self.progress.describe(f"{phase}: {len(running)} jobs")
                for future in list(done_of(running)):
                    if trained := self._receive(future, running, jobs, phase):
                        self.progress.took(time.perf_counter() - began, trained)
                if not running and not waiting:
                    time.sleep(POLL_SECONDS * bool(taken))
                    waiting, taken = taken, []
        except BaseException as error:
            if isinstance(error, BrokenProcessPool):
                in_flight = {future: keys for future, (keys, _) in running.items()}
                self._blame(error, jobs.in_process(in_flight), suspected, phase)
            for future in list(running):
                future.cancel()
                if future.done():  # what has finished is not lost with what failed
                    with contextlib.suppress(BaseException):
                        self._receive(future, running, jobs, phase)
            raise
        finally:
            for _, claim in running.values():
                claim.close()

    def _receive(self, future: Any, running: dict[Any, Any], jobs: Jobs, phase: str) -> int:
        """Keeps the results of a job that is done; returns their number, 0 if it has to run again."""
        keys = running[future][0]
        try:
            found = jobs.result(future, keys)
        except BrokenProcessPool:
            raise  # the caller looks at all that are in flight
        except Exception as error:
            # Dask has tried it on several workers, each of which died.
            found = (
                self.trainer.lost(keys, f"Workers that tried this trial died: {error}")
                if _is_killed(error)
                else None
            )
            if found is None:
                with running.pop(future)[1]:
                    raise
        with running.pop(future)[1] as claim:
            if not isinstance(found, dict):
                running[found] = keys, claim.pop_all()
                return 0
            self._keep(found, phase)
            self.progress.advance(len(keys))
            return len(keys)

    def _blame(self, error: BaseException, chunks: list[list[Key]], suspected: set[Key], phase: str) -> None:
        """Says during which trials a worker died; one that did so before, and alone now, has an outcome."""
        keys = [key for chunk in chunks for key in chunk]
        if not keys:
            return
        named = [f"arm {key.arm!r} at learning rate {key.rate:g} with seed {key.seed}" for key in keys]
        error.add_note(f"A worker process died while these trials ran: {'; '.join(named)}.")
        if self.store is None:
            return
        if len(chunks) == 1 and suspected.issuperset(keys):
            found = self.trainer.lost(keys, f"{DIED}, and in an earlier attempt at it.")
            if found is not None:
                self._keep(found, phase)
                error.add_note("It counts as diverged from now on; call again to go on.")
            return
        self.store.suspect(keys)
        error.add_note("The next call runs them last, and one at a time.")

    @contextlib.contextmanager
    def _claim(self, chunk: list[Key]) -> Iterator[bool]:
        """Claims a chunk, and reads what other processes have finished; yields whether it was free."""
        if self.store is None:
            yield True
            return
        with self.store.claim(chunk) as is_mine:
            self.results |= self.store.read()
            yield is_mine

    def _keep(self, found: Results, phase: str) -> None:
        """Saves and shows the results of a chunk."""
        self.results |= found  # first: on a full disk they are not lost
        if self.store is not None and not (self._is_together() and jax.process_index()):
            self.store.write(found)
        for key, each in found.items():
            self.progress.seen(phase, key, each.validation[-1])

    def _exchange(self) -> None:
        """Gives every process of a distributed study the results of all, or those of process 0."""
        if jax.process_count() == 1:
            return
        mine = np.frombuffer(_pack_all(self.results), np.uint8)
        sizes = np.asarray(multihost_utils.process_allgather(np.array([mine.size]))).ravel()
        padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
        padded[: mine.size] = mine
        found = multihost_utils.process_allgather(padded)
        each = [
            _unpack_all(np.asarray(data[:size]).tobytes()) for size, data in zip(sizes, found, strict=True)
        ]
        if self._is_together():
            self.results = each[0]
        else:
            for results in each:
                self.results |= results


def _is_killed(error: Exception) -> bool:
    """Whether a scheduler has given up on a job whose workers died."""
    return type(error).__name__ == "KilledWorker"


def _pack_all(results: Results) -> bytes:
    """Serializes results whose curves may differ in shape, which those of one file must not."""
    groups: dict[Any, Results] = {}
    for key, curves in results.items():
        groups.setdefault(tuple(np.shape(each) for each in curves), {})[key] = curves
    file = io.BytesIO()
    np.savez(file, *(np.frombuffer(pack(group), np.uint8) for group in groups.values()))
    return file.getvalue()


def _unpack_all(data: bytes) -> Results:
    results: Results = {}
    for packed in read_arrays(data).values():
        results |= unpack(packed.tobytes())
    return results


def agree(value: Sequence[float]) -> list[float]:
    """Returns the first process's numbers, in every process of a distributed study."""
    if jax.process_count() == 1:
        return list(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(value, np.float32))).tolist()

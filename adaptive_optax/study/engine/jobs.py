"""Sends chunks to the workers of an executor: processes, machines, or jobs of a cluster.

What trains (functions, and the data that they hold) travels to a worker once, not with every job. It is
pickled to a file, which workers on the same file system read. A worker that cannot see the file says so, and
gets the content with its next job.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_optax.study.engine.chunks import Key, Results, digest, pack, unpack
from adaptive_optax.study.engine.trainers import Trainer

MOST_JOBS = 1000  # submitted at a time
SMALL = 100_000  # bytes that travel with every job
KEPT = 2  # trainers that a worker keeps
POLL_SECONDS = 0.2


class Parcel(NamedTuple):
    """A pickled trainer: how a worker recognizes it, where to find it, and the number of its job."""

    digest: str
    file: str
    content: bytes | None
    number: int = 0


class Jobs:
    """The jobs of one trainer.

    Args:
        executor: Where to run them: anything with `submit`, whose futures have `done` and `result`.
        trainer: What trains.
        folder: A folder that the workers may be able to read; None for a temporary one.

    Raises:
        ValueError: If the trainer cannot be pickled, with the part that cannot.
    """

    def __init__(self, executor: Any, trainer: Trainer, folder: Path | None):
        self._executor = executor
        self._own_folder: Path | None = None
        self._submitted = 0
        self._informing: dict[str, Any] = {}  # by worker, the last job that took the content along
        self._informed: dict[str, int] = {}  # by worker, the jobs submitted until that one was done
        self._trainer, self._parcel = trainer, None
        if isinstance(executor, concurrent.futures.ThreadPoolExecutor):
            return
        content = pickled(trainer)
        name, file = digest(content), ""
        if len(content) > SMALL:
            if folder is None:
                folder = self._own_folder = Path(tempfile.mkdtemp(prefix="adaptive_optax_"))
            path = folder / f"{name}.trainer"
            path.write_bytes(content)
            file = str(path.resolve())
        self._content = content
        self._parcel = Parcel(name, file, None if file else content)

    def close(self) -> None:
        """Removes the file."""
        if self._parcel is not None and self._parcel.file:
            with contextlib.suppress(OSError):
                os.unlink(self._parcel.file)
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def check(self) -> None:
        """Lets a worker do nothing, so that what breaks the executor next is not the executor's own fault."""
        call_on(self._executor, os.getpid)

    def in_process(self, running: Mapping[Any, list[Key]]) -> list[list[Key]]:
        """Of the chunks in flight when the executor broke, those that its workers were training."""

        def broke(future: Any) -> bool:
            return not future.done() or isinstance(future.exception(), BrokenProcessPool)

        chunks = [keys for future, keys in running.items() if broke(future)]
        return chunks[: getattr(self._executor, "_max_workers", len(chunks))]  # they begin in this order

    def submit(self, keys: Sequence[Key]) -> Any:
        """Submits a chunk; returns its future."""
        if self._parcel is None:
            return self._executor.submit(_train, self._trainer, keys)
        return self._submit(self._parcel, keys)

    def _submit(self, parcel: Parcel, keys: Sequence[Key]) -> Any:
        self._submitted += 1
        return self._executor.submit(train_chunk, parcel._replace(number=self._submitted), keys)

    def result(self, future: Any, keys: Sequence[Key]) -> Results | Any:
        """Returns the results of a job that is done; or another future, if its worker lacked the trainer."""
        found = future.result()
        if isinstance(found, bytes):
            return unpack(found)
        (worker, number), parcel = found, self._parcel
        assert parcel is not None
        if not self._may_yet_arrive(worker, number):
            self._informed.pop(worker, None)
            future = self._informing[worker] = self._submit(parcel._replace(content=self._content), keys)
            return future
        return self._submit(parcel, keys)

    def _may_yet_arrive(self, worker: str, number: int) -> bool:
        """Whether the content was on its way to a worker that lacked it for the job of this number."""
        informing = self._informing.get(worker)
        if informing is None:
            return False
        return not informing.done() or number <= self._informed.setdefault(worker, self._submitted)


def most_jobs(store: bool) -> int:
    """How many jobs to submit at a time: with a folder each keeps a file open, of which half the limit."""
    if not store:
        return MOST_JOBS
    try:
        import resource
    except ImportError:  # on Windows, where a process may open thousands
        return MOST_JOBS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_JOBS if files == resource.RLIM_INFINITY else max(1, min(MOST_JOBS, files // 2))


def done_of(futures: Collection[Any]) -> Iterator[Any]:
    """Waits a moment for some futures to be done, and yields them."""
    if all(isinstance(future, concurrent.futures.Future) for future in futures):
        yield from concurrent.futures.wait(
            futures, timeout=POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
        ).done
        return
    done = [future for future in futures if future.done()]
    if not done:
        time.sleep(POLL_SECONDS)
    yield from done


def call_on(executor: Any, function: Callable[[], Any]) -> Any:
    """Calls a function once, on one of the executor's workers, and waits for its result."""
    if isinstance(executor, concurrent.futures.ThreadPoolExecutor):
        return executor.submit(function).result()
    return executor.submit(_call, pickled(function)).result()


def check_executor(executor: Any) -> None:
    """Refuses what cannot run jobs, or would hang.

    Raises:
        ValueError: If it has no `submit`, or if its processes are forked: JAX has threads, and a fork of it
            may wait forever for a lock that one of them held.
    """
    if isinstance(executor, type) or not callable(getattr(executor, "submit", None)):
        got = f"the class {executor.__name__}" if isinstance(executor, type) else type(executor).__name__
        raise ValueError(f"executor must be a concurrent.futures.Executor, or None to train here, got {got}.")
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            "executor must not fork this process, which has threads: give ProcessPoolExecutor "
            'mp_context=multiprocessing.get_context("spawn").'
        )


def describe_executor(executor: Any) -> str | None:
    """The executor's kind, for the report."""
    return None if executor is None else type(executor).__name__


# ---- Pickling ----


def pickled(value: Any) -> bytes:
    """Pickles what a worker needs, functions of a script or notebook included."""
    try:
        import cloudpickle
    except ImportError as error:
        raise ImportError("executor needs cloudpickle: pip install 'adaptive-optax[cluster]'.") from error
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        part = next((name for name, each in _parts(value) if not _can_be(each, cloudpickle)), "the study")
        raise ValueError(
            f"executor: {part} cannot be sent to another process: {error}. Create what it holds (files, "
            "locks, connections) inside the function, or train without executor."
        ) from error


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a trainer by name; a sentence can begin with them."""
    for name, part in getattr(value, "__dict__", {}).items():
        if isinstance(part, Mapping):
            yield from ((f"arm {arm!r}", each) for arm, each in part.items())
        else:
            yield ("train" if name == "function" else name), part


def _can_be(value: Any, cloudpickle: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


# ---- In the worker ----

_LOADED: dict[str, Trainer] = {}


def _call(content: bytes) -> Any:
    return _unpickled(content)()


def train_chunk(parcel: Sequence[Any], keys: Sequence[Sequence[Any]]) -> bytes | tuple[str, int]:
    """Trains a chunk in a worker; returns its packed results, or who lacks the trainer for which job.

    An executor may turn named tuples into tuples on the way.
    """
    received = Parcel(*parcel)
    trainer = _load(received)
    if trainer is None:
        return f"{socket.gethostname()}:{os.getpid()}", received.number
    return _train(trainer, keys)


def _train(trainer: Trainer, keys: Sequence[Sequence[Any]]) -> bytes:
    return pack(trainer.train([Key(*key) for key in keys], lambda fraction: None))


def _load(parcel: Parcel) -> Trainer | None:
    if parcel.digest not in _LOADED:
        content = parcel.content
        if content is None:
            try:
                content = Path(parcel.file).read_bytes()
            except OSError:
                return None
            if digest(content) != parcel.digest:  # another machine's file of the same name
                return None
        trainer = _unpickled(content)
        while len(_LOADED) >= KEPT:
            _LOADED.pop(next(iter(_LOADED)))
        _LOADED[parcel.digest] = trainer
    return _LOADED[parcel.digest]


def _unpickled(content: bytes) -> Any:
    import cloudpickle

    try:
        return cloudpickle.loads(content)
    except Exception as error:
        raise RuntimeError(
            f"a worker could not load what trains, {type(error).__name__}: {error}. Modules that a function "
            "uses must be installed where the worker runs."
        ) from error

"""The folder of a study: every finished chunk, written so that a killed study goes on where it was.

    study.json      what the study is: fingerprints of task and arms, settings, versions, the layout
    looks.json      the numbers of fresh seeds at which verdicts were drawn
    trials/*.npz    one file a finished chunk
    locks/*         held by the process that works on a chunk, let go of by the system when it dies

Files are written under another name, flushed, and renamed, so a file is whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np


class Key(NamedTuple):
    """What identifies a trial within a study."""

    arm: str
    rate: float
    seed: int


class Record(NamedTuple):
    """What one trial left behind, as in `trials.Records`."""

    training: np.ndarray
    validation: np.ndarray
    telemetry: np.ndarray


Results = dict[Key, Record]


def pack(results: Results) -> bytes:
    """Serializes results."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {
        name: np.array([getattr(record, name) for record in results.values()], np.float32)
        for name in Record._fields
    }
    np.savez(
        file,
        arm=np.array([key.arm for key in results], dtype=np.str_),
        rate=np.array([key.rate for key in results], np.float64),
        seed=np.array([key.seed for key in results], np.int64),
        **arrays,
    )
    return file.getvalue()


def unpack(data: bytes) -> Results:
    """Reads what `pack` has written."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        keys = zip(file["arm"].tolist(), file["rate"].tolist(), file["seed"].tolist(), strict=True)
        records = zip(*(file[name] for name in Record._fields), strict=True)
        return {Key(*key): Record(*record) for key, record in zip(keys, records, strict=True)}


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is, at any moment and after a crash, either whole or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest(*parts: Any) -> str:
    """A short hash of bytes."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


class Store:
    """A study's folder.

    Args:
        path: The folder; made where it does not exist.
        description: What the study is, a flat dictionary of strings, numbers and lists.

    Raises:
        ValueError: If the folder belongs to a study that differs, naming what does.
    """

    def __init__(self, path: str | os.PathLike[str], description: dict[str, Any]):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out must be a folder, got the file {str(path)!r}.")
        for folder in (self.path / "trials", self.path / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        self._read: set[str] = set()
        with self._locked():
            self._description = self._load("study.json")
            if self._description is None:
                if any(self.path.glob("trials/*.npz")):
                    raise ValueError(
                        f"out: {str(path)!r} holds trials without a study.json; use another folder."
                    )
                self._description = description
                self._save("study.json", description)
        _check_same(path, self._description, json.loads(json.dumps(description)))

    @property
    def layout(self) -> dict[str, Any] | None:
        """The layout that the study was begun with, or None."""
        return self._load("layout.json")

    def settle_layout(self, layout: dict[str, Any]) -> dict[str, Any]:
        """Writes the layout down, or gives the one that another process has written down before."""
        with self._locked():
            before = self._load("layout.json")
            if before is None:
                self._save("layout.json", layout)
            return before or layout

    def look(self, seeds: int) -> list[int]:
        """Notes that a verdict is drawn from this many fresh seeds; gives the looks so far, in order.

        A number of seeds that was looked at before is the same look: nothing new is seen.
        """
        with self._locked():
            looks = self._load("looks.json") or []
            if seeds not in looks:
                looks.append(seeds)
                self._save("looks.json", looks)
            return looks[: looks.index(seeds) + 1]

    def read(self) -> Results:
        """Reads the chunks that were finished since the last call."""
        results = {}
        for path in sorted(self.path.glob("trials/*.npz")):
            if path.name not in self._read:
                self._read.add(path.name)
                results |= unpack(path.read_bytes())
        return results

    def write(self, results: Results) -> None:
        """Writes a finished chunk."""
        name = digest(repr(sorted(results)).encode()) + ".npz"
        write_atomically(self.path / "trials" / name, pack(results))
        self._read.add(name)

    @contextlib.contextmanager
    def claim(self, keys: list[Key]) -> Iterator[bool]:
        """Claims a chunk; gives whether it is free, and lets go of it at the end."""
        lock = filelock.FileLock(self.path / "locks" / digest(repr(keys).encode()))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _locked(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.path / "locks" / "study")

    def _load(self, name: str) -> Any:
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def _save(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, (json.dumps(value, indent=2) + "\n").encode())


def _check_same(path: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old != new:
            hashes = all(value is None or name.endswith(("program", "data")) for value in (old, new))
            changes.append(name if hashes else f"{name} (was {old}, is {new})")
    if changes:
        raise ValueError(
            f"out: {str(path)!r} holds another study; changed: {', '.join(changes)}. Use another folder."
        )

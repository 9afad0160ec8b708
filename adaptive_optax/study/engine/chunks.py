"""The file format of finished trials: the results of each trial, and what it is a trial of.

Every trial carries two digests, of its study and of its arm, and every file a checksum of its content. A file
is used completely or not at all: `unpack` raises `Unusable` with the reason.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Key(NamedTuple):
    """What identifies a trial within a study."""

    arm: str
    rate: float
    seed: int


NO_STEPS = np.zeros(0, np.int64)
NO_ERROR = np.array("")


class Curves(NamedTuple):
    """The results of a trial.

    Attributes:
        training: Training losses [window].
        validation: Metrics [validation point].
        telemetry: The fields of `trials.TELEMETRY` [measurement, field].
        validation_steps: The steps of a trial that chose its own; otherwise empty, and they are the plan's.
        telemetry_steps: Likewise.
        error: The traceback of a trial that raised; otherwise "".
    """

    training: np.ndarray
    validation: np.ndarray
    telemetry: np.ndarray
    validation_steps: np.ndarray = NO_STEPS
    telemetry_steps: np.ndarray = NO_STEPS
    error: np.ndarray = NO_ERROR


class Identity(NamedTuple):
    """What a trial belongs to: digests of the study and of the arm's programs."""

    study: str = ""
    program: str = ""


Results = dict[Key, Curves]
_KEYS = {"arm": "U", "rate": "f", "seed": "i", "study": "U", "program": "U"}
_MEASURED = dict.fromkeys(("training", "validation", "telemetry"), "f")
_OWN = {"validation_steps": "i", "telemetry_steps": "i", "error": "U"}  # in files of trials that have them
KINDS = _KEYS | _MEASURED | _OWN


class Unusable(ValueError):
    """Raised for content that cannot be used; the message completes the sentence "the file ..."."""


def digest(*parts: Any) -> str:
    """A short hash of bytes."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """A short hash of arrays with their names, dtypes and shapes."""
    described = repr([(name, array.dtype.str, array.shape) for name, array in sorted(arrays.items())])
    contents = (np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays))
    return digest(described.encode(), *contents)


def pack(results: Results, identity: Callable[[Key], Identity] = lambda key: Identity()) -> bytes:
    """Serializes results, each with its identity."""
    identities = [identity(key) for key in results]
    arrays: dict[str, Any] = {
        "arm": np.array([key.arm for key in results], np.str_),
        "rate": np.array([key.rate for key in results], np.float64),
        "seed": np.array([key.seed for key in results], np.int64),
        "study": np.array([each.study for each in identities], np.str_),
        "program": np.array([each.program for each in identities], np.str_),
    }
    for name in _MEASURED:
        arrays[name] = stacked([getattr(curves, name) for curves in results.values()])
    own = {name: np.array([getattr(curves, name) for curves in results.values()]) for name in _OWN}
    if any(array.size and array.any() for array in own.values()):
        arrays |= own
    file = io.BytesIO()
    np.savez(file, seal=np.array(digest_arrays(arrays)), **arrays)
    return file.getvalue()


def unpack(
    data: bytes,
    identity: Callable[[Key], Identity | None] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Results:
    """Reads content written by `pack`.

    Args:
        data: The content of a file.
        identity: Returns the identity that a trial must have, or None if there is no such arm; if None, any
            identity is accepted.
        shapes: The shapes of a trial's curves; if None, any shapes are accepted.

    Raises:
        Unusable: If the content is damaged, foreign, impossible, or belongs to another study or arm.
    """
    arrays = read_arrays(data)
    if arrays.keys() - _OWN.keys() != _KEYS.keys() | _MEASURED.keys() | {"seal"}:
        raise Unusable("is foreign or of another version")
    seal = arrays.pop("seal")
    if seal.shape or str(seal) != digest_arrays(arrays):
        raise Unusable("was changed after it was written")
    count = arrays["arm"].shape[:1]
    for name, array in arrays.items():
        is_curve = name not in _KEYS
        has_shape = array.shape[1:] == tuple(shapes[name]) if name in _MEASURED and shapes else True
        if array.dtype.kind != KINDS[name] or array.shape[:1] != count or not has_shape:
            raise Unusable(f"holds {name!r} of dtype {array.dtype} and shape {array.shape}")
        if not is_curve and array.ndim != 1:
            raise Unusable(f"holds {name!r} of shape {array.shape}")
    for name in ("validation", "telemetry"):
        steps = arrays.get(f"{name}_steps")
        if steps is not None and (steps.shape != arrays[name].shape[:2] or (np.diff(steps) <= 0).any()):
            raise Unusable(f"holds {name!r} at impossible steps")
    if not (np.isfinite(arrays["rate"]) & (arrays["rate"] > 0)).all() or (arrays["seed"] < 0).any():
        raise Unusable("holds trials with impossible learning rates or seeds")
    keys = [Key(*key) for key in zip(*(arrays[name].tolist() for name in Key._fields), strict=True)]
    if len(set(keys)) < len(keys):
        raise Unusable("holds a trial twice")
    if identity is not None:
        for key, *found in zip(keys, arrays["study"].tolist(), arrays["program"].tolist(), strict=True):
            _check_identity(key, Identity(*found), identity(key))
    fields = [name for name in Curves._fields if name in arrays]
    curves = zip(*(arrays[name] for name in fields), strict=True)
    named = (dict(zip(fields, each, strict=True)) for each in curves)
    return {key: Curves(**each) for key, each in zip(keys, named, strict=True)}


def _check_identity(key: Key, found: Identity, expected: Identity | None) -> None:
    if expected is None:
        raise Unusable(f"holds trials of an arm that the study does not have, {key.arm!r}")
    if found.study != expected.study:
        raise Unusable("holds trials of another study")
    if found.program != expected.program:
        raise Unusable(f"holds trials of a different arm named {key.arm!r}")


def are_same(a: Curves, b: Curves) -> bool:
    """Whether two results are equal, NaNs included."""
    return all(
        np.array_equal(x, y, equal_nan=x.dtype.kind == y.dtype.kind == "f") for x, y in zip(a, b, strict=True)
    )


def stacked(values: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks curves as float32, or as float64 if one of them is (under x64)."""
    return np.array(values, np.result_type(np.float32, *(value.dtype for value in values)))


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz file; nothing is unpickled.

    Raises:
        Unusable: If it is not an npz file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # for damaged bytes NumPy, zipfile and zlib raise almost anything
        raise Unusable("is damaged") from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise Unusable("is damaged")
    return arrays

"""Checkpoints with orbax that survive kills, full disks and damage, and say what is wrong with them.

A checkpoint is a folder named after its step. It is written under a temporary name and renamed when it is
complete, so it is there as a whole or not at all, whenever the process dies. Beside the arrays it holds a
manifest, from which a foreign or damaged checkpoint is recognized before or after it is loaded:

    40/state       the arrays by path, as orbax writes them; orbax alone can read them too
    40/manifest    versions, and for every array its path, shape, dtype and the CRC-32 of its bytes
    set_aside/     checkpoints that a run left behind by going back before them; nothing reads them
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
import warnings
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adaptive_optax import __version__
from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.entries import fields_before
from adaptive_optax._core.paths import paths_and_leaves

try:
    import orbax.checkpoint as ocp
except ImportError as _error:
    raise ImportError(
        "adaptive_optax.integrations.orbax needs orbax: pip install orbax-checkpoint."
    ) from _error

Tree = TypeVar("Tree")

_FORMAT = 1  # of the manifest
_NAMED = 5  # differences in a message
_LIBRARIES = ("jax", "optax", "flax")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ORBAX_LOG = logging.getLogger("absl")


class Checkpoints:
    """The checkpoints of a run in a folder: the newest few, written in the background, checked when read.

    One process writes to a folder at a time, or all processes of one multi-host run; any number may read it.
    The folder is created by the first `save`. It must be on a file system, not in a bucket.

    Args:
        folder: Where the checkpoints are or will be, of this run alone. Without a "[" in its path.
        keep: How many to keep, at least 1. Older ones are deleted once a new one is complete, so that for a
            moment there is one more.

    Raises:
        ValueError: If `folder` does not name a folder or `keep` is out of range.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, tempfile
        >>> from adaptive_optax.integrations.orbax import Checkpoints
        >>> tx, params = ao.adam(1e-3), {"w": jnp.ones(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpoints(folder, keep=2) as checkpoints:
        ...         for step in (10, 20, 30):
        ...             checkpoints.save(step, {"params": params, "opt": tx.init(params)})
        ...     newest = Checkpoints(folder)
        ...     newest.steps()
        ...     step, tree = newest.restore({"params": params, "opt": tx.init(params)})
        [20, 30]
        >>> step, tree["params"]["w"].tolist()
        (30, [1.0, 1.0, 1.0])
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3):
        try:
            text = os.fspath(folder)
        except TypeError:
            text = b""
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise ValueError(f"folder must name a folder, got {folder!r}.")
        if "://" in text:
            raise ValueError(f"folder must be on a file system, got {text!r}.")
        if os.path.lexists(text) and not os.path.isdir(text):
            kind = "a link to nothing" if os.path.islink(text) and not os.path.exists(text) else "a file"
            raise ValueError(f"folder must be a folder, got {text!r}, which is {kind}.")
        check_integer("keep", keep, "[1, inf)")
        self.folder: Path = Path(text).absolute()
        if "[" in str(self.folder):  # orbax would look for the arrays by this pattern, and write none
            raise ValueError(f"folder must not have a '[' in its path, which orbax misreads, got {text!r}.")
        self.keep: int = int(keep)
        self._manager: Any = None
        self._writing: int | None = None
        self._went_back_to: int | None = None
        self._put_aside: dict[int, Path] = {}

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the newest last."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.is_dir()]
        except OSError:
            return []
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def save(self, step: int, tree: Any) -> None:
        """Writes a checkpoint in the background, after the one before it has been written.

        When it returns the arrays have been copied, and may be changed or donated. The copy and the
        checksums, two or three seconds per gigabyte, are all that a training loop waits for, unless the
        previous checkpoint is still being written.

        Args:
            step: The number of steps taken, above that of every checkpoint in the folder. After
                `restore(like, step=...)`, above that step: later checkpoints are then moved to the folder
                `set_aside`.
            tree: Any tree of arrays: parameters, an optimizer's state, telemetry, keys of random numbers,
                counters. Arrays without elements are not written. Weak types and byte orders are not kept.

        Raises:
            ValueError: If `step` is not above the newest, or a leaf is not an array.
            OSError: If this checkpoint or the previous one could not be written, for example as the disk is
                full. The checkpoints in the folder stay as they are. `errno` says why.
        """
        check_integer("step", step, "[0, inf)")
        step = int(step)
        leaves = paths_and_leaves(tree)
        for path, x in leaves:
            if not isinstance(x, jax.Array | np.ndarray | np.generic):
                raise ValueError(
                    f"tree must hold arrays only, got {type(x).__name__} at {path!r}; wrap a number with "
                    "np.asarray."
                )
            if isinstance(x, Tracer):
                raise ValueError(f"tree must hold arrays, got a traced one at {path!r}: save outside of jit.")
            if not _is_key(x) and not _can_be_written(x.dtype):
                raise ValueError(f"tree must hold arrays that orbax can write, got {x.dtype} at {path!r}.")
        self.wait()
        back = self._went_back_to
        newest = max(self.steps(), default=-1) if back is None else back
        if step <= newest:
            which = "the newest checkpoint in" if back is None else "the checkpoint that was gone back to in"
            raise ValueError(
                f"step must be above {newest}, that of {which} {self.folder}, got {step}; restore from it "
                "first, go back with restore(like, step=...), or use another folder."
            )
        data = {path: _plain(x) for path, x in leaves}
        manifest = {
            "format": _FORMAT,
            "versions": _versions(),
            "leaves": {path: [*_type_of(x), _checksum(data[path])] for path, x in leaves},
        }
        items: dict[str, Any] = {
            "manifest": cast(Any, ocp.args.JsonSave)({"manifest": manifest, "crc32": _digest(manifest)})
        }
        if full := {path: x for path, x in data.items() if x.size}:
            items["state"] = cast(Any, ocp.args.PyTreeSave)(full)
        self._writing = step
        try:
            _try_to_write(self.folder)
            if back is not None:
                self._set_aside([s for s in self.steps() if s > back])
                self._went_back_to = None
            _ORBAX_LOG.addFilter(_is_wanted)
            if self._manager is None:
                self._manager = _manager(self.folder, self.keep)
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, like: Tree, *, step: int | None = None) -> tuple[int, Tree] | None:
        """Reads the newest checkpoint, after comparing it with what is wanted.

        Paths, shapes and dtypes are compared before anything is loaded, and checksums before anything is
        returned. Leaves are matched by path, so that other containers with the same names fit. It waits for a
        checkpoint that is being written.

        Args:
            like: What to restore: arrays, or `jax.ShapeDtypeStruct`, with `sharding=` to place it. With
                `state_sharding` an optimizer's state goes straight to its devices, and these may be others
                than those it was on. NumPy arrays are restored as NumPy arrays, and arrays that are not
                committed to a device as such. Arrays without elements are made anew.
            step: The step of an older checkpoint. The next `save` then sets aside those after it.

        Returns:
            The step and a tree like `like`, or None if there is no checkpoint.

        Raises:
            ValueError: If the checkpoint is one of another tree, which is said with the first differences; if
                it is damaged, which is said with the newest one that is intact; if there is none of `step`;
                or if a leaf of `like` is not an array.
            OSError: If a checkpoint that was being written could not be.
        """
        leaves = paths_and_leaves(like)
        for path, x in leaves:
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise ValueError(
                    f"like must hold arrays or jax.ShapeDtypeStruct, got {type(x).__name__} at {path!r}."
                )
            known = isinstance(x, np.ndarray | np.generic) or _is_key(x)
            if not known and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
                raise ValueError(f"like holds {x.dtype} at {path!r}, which needs jax_enable_x64.")
        if step is not None:
            check_integer("step", step, "[0, inf)")
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            there = f"those of {', '.join(map(str, steps))}" if steps else "none"
            raise ValueError(
                f"step must be that of a checkpoint in {self.folder}, got {step}; there are {there}."
            )
        if not steps:
            return None
        with _without_late_answers():
            while True:
                chosen = steps[-1] if step is None else int(step)
                try:
                    loaded, versions = self._load(chosen, leaves)
                    break
                except _Damaged as error:
                    there = self.steps()
                    if not there or chosen in there:
                        raise ValueError(self._damage(chosen, str(error), leaves)) from error
                    if step is not None:
                        raise ValueError(f"Checkpoint {step} was deleted while it was read.") from error
                    steps = there  # a writer has deleted it and written a newer one
        for name, version in _versions().items():
            if versions.get(name, version) != version:
                warnings.warn(
                    f"Checkpoint {chosen} in {self.folder} was written with {name} {versions[name]}, and "
                    f"this is {version}; its arrays fit.",
                    stacklevel=2,
                )
        self._went_back_to = chosen if chosen < steps[-1] else None
        return chosen, jax.tree.structure(like).unflatten(loaded)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: If it could not be, as in `save`.
        """
        if self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._writing, self._put_aside = None, {}
        _ORBAX_LOG.removeFilter(_is_wanted)

    def close(self) -> None:
        """Waits until everything is written, and ends the threads. `save` starts them again.

        Raises:
            OSError: If it could not be written, as in `save`.
        """
        self.wait()
        if self._manager is not None:
            manager, self._manager = self._manager, None
            manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return self.close()
        with contextlib.suppress(OSError):  # the error that is on its way says more
            self.close()

    def _failed(self, error: Exception) -> OSError:
        """Cleans up after a write that failed, and returns what to raise."""
        step, self._writing = self._writing, None
        manager, self._manager = self._manager, None
        put_aside, self._put_aside = self._put_aside, {}
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()
        _ORBAX_LOG.removeFilter(_is_wanted)
        for rest in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(rest, ignore_errors=True)
        for old, path in put_aside.items():
            with contextlib.suppress(OSError):
                os.replace(path, self.folder / str(old))
        if put_aside:
            self._went_back_to = max((s for s in self.steps() if s < min(put_aside)), default=None)
        steps = self.steps()
        good = f"checkpoint {steps[-1]} there is intact" if steps else "there is none there yet"
        number = _errno_of(error)
        reason = os.strerror(number) if number else _first_line(error)
        remedy = "; free some space and save again" if number in _FULL else ""
        if number in (errno.ENOENT, errno.ENOTEMPTY) or "NOT_FOUND" in str(error):
            remedy = "; does another process write there?"
        message = f"Checkpoint {step} could not be written to {self.folder}: {reason}; {good}{remedy}."
        return OSError(number, message) if number else OSError(message)

    def _set_aside(self, steps: list[int]) -> None:
        if steps and jax.process_index() == 0:
            aside = self.folder / "set_aside"
            aside.mkdir(exist_ok=True)
            for step in reversed(steps):  # the newest first: what is left is always a run up to some step
                name = str(step) if not (aside / str(step)).exists() else f"{step}.{uuid.uuid4().hex[:8]}"
                os.replace(self.folder / str(step), aside / name)
                self._put_aside[step] = aside / name
        if steps:
            if self._manager is not None:
                self._manager.close()
                self._manager = None
            if jax.process_count() > 1:
                ocp.multihost.sync_global_processes("adaptive_optax:set_aside")

    def _load(self, step: int, leaves: list[tuple[str, Any]]) -> tuple[list[Any], dict[str, str]]:
        """Returns a checkpoint's arrays like `leaves`, and the versions that wrote it.

        Earlier versions wrote each scalar of a state as an array of its own.
        """
        folder = self.folder / str(step)
        manifest = _read_manifest(folder)
        known, asked = manifest["leaves"], leaves
        like = dict(asked)
        found = {path: fields_before(path, known) for path in like if path not in known}
        before = {path: names for path, names in found.items() if names}
        leaves = [
            pair
            for path, x in asked
            for pair in [(each, _scalar(known[each], x)) for each in before.get(path, ())] or [(path, x)]
        ]
        self._compare(step, manifest["leaves"], leaves)
        wanted = {path: x for path, x in leaves if 0 not in x.shape}
        arguments = {path: _restore_arguments(x) for path, x in wanted.items()}
        read: dict[str, Any] = {}
        if wanted:
            arrays = cast(Any, ocp.args.PyTreeRestore)(item=dict.fromkeys(wanted, 0), restore_args=arguments)
            try:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    read = checkpointer.restore(folder / "state", args=arrays)
            except Exception as error:
                raise _Damaged(_first_line(error)) from error
        for path, x in read.items():
            crc, found = manifest["leaves"][path][2], _checksum(x)
            if crc is not None and found is not None and crc != found:
                raise _Damaged(f"the bytes of {path!r} are not those that were written")
        for path, names in before.items():
            values = [np.asarray(read[name]) for name in names]
            read[path] = np.stack(values, axis=-1).astype(like[path].dtype)
        return [_placed(read[path], x) if path in read else _empty(x) for path, x in asked], manifest[
            "versions"
        ]

    def _compare(self, step: int, there: dict[str, Any], leaves: list[tuple[str, Any]]) -> None:
        """Raises if the checkpoint has other leaves than those wanted."""
        wanted = {path: _type_of(x) for path, x in leaves}
        differing = []
        for path in [*wanted, *(path for path in there if path not in wanted)]:
            has, wants = (tuple(there[path][:2]) if path in there else None), wanted.get(path)
            if has is None:
                differing.append(f"{path!r} is not there, and {_shown(wants)} in like")
            elif wants is None:
                differing.append(f"{path!r} is {_shown(has)} there, and not in like")
            elif (list(has[0]), has[1]) != (list(wants[0]), wants[1]):
                differing.append(f"{path!r} is {_shown(has)} there, and {_shown(wants)} in like")
        if differing:
            more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
            raise ValueError(
                f"Checkpoint {step} in {self.folder} is not one of like: {'; '.join(differing[:_NAMED])}"
                f"{more}. If the optimizer or its storage changed, restore with the state of the old one and "
                "carry it over with transfer_state or convert_storage."
            )

    def _damage(self, step: int, reason: str, leaves: list[tuple[str, Any]]) -> str:
        """The message about a damaged checkpoint, with the newest older one that is intact."""
        message = f"Checkpoint {step} in {self.folder} is damaged ({reason}), and nothing of it was used; "
        for older in reversed(self.steps()):
            if older >= step:
                continue
            with contextlib.suppress(ValueError):  # damaged too, or of another tree
                self._load(older, leaves)
                return f"{message}the one before it that is intact is used by restore(like, step={older})."
        return f"{message}no checkpoint before it is intact."


class _Damaged(ValueError):
    """Part of a checkpoint is missing or altered; the text says which."""


def _manager(folder: Path, keep: int) -> Any:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder, options=options)


@contextlib.contextmanager
def _without_late_answers():
    """Keeps off the screen what happens in orbax when one of many reads fails.

    It closes its event loop at the first failure. The other reads then find it closed, each in a thread of
    TensorStore's, which prints a traceback.
    """
    hook = sys.unraisablehook

    def filtered(unraisable):
        if not (
            isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)
        ):
            hook(unraisable)

    sys.unraisablehook = filtered
    try:
        yield
    except ValueError:
        time.sleep(0.1)  # the last of them
        raise
    finally:
        sys.unraisablehook = hook


def _is_wanted(record: logging.LogRecord) -> bool:
    """Drops orbax's pages about a failure while a checkpoint is written: the failure is raised."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    """What is written of a leaf; of keys their data. What may change in place is copied."""
    if isinstance(x, np.ndarray | np.generic):
        return np.array(x, _native(x.dtype))
    return jax.random.key_data(x) if _is_key(x) else x


def _type_of(x: Any) -> tuple[list[int], str]:
    """Shape and dtype, as they stand in the manifest."""
    return [int(n) for n in x.shape], str(_native(x.dtype))


def _native(dtype: Any) -> Any:
    """A dtype in this machine's byte order, in which arrays are written."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _can_be_written(dtype: Any) -> bool:
    """Whether orbax writes it, which finds out in the background, and does not say which array it was."""
    if dtype.kind in "OSUMm" or dtype.names is not None or dtype.name in ("uint2", "uint4"):
        return False
    return dtype.itemsize <= {"f": 8, "c": 16}.get(dtype.kind, 8)


def _scalar(there: Any, x: Any) -> jax.ShapeDtypeStruct:
    """What is wanted of an array that is to become an entry of x."""
    return jax.ShapeDtypeStruct(x.shape[:-1], bool if there[1] == "bool" else x.dtype)


def _shown(kind: Any) -> str:
    shape, dtype = kind
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _checksum(x: Any) -> int | None:
    """The CRC-32 of an array's bytes; None if part of it is on other hosts."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def _digest(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _read_manifest(folder: Path) -> dict[str, Any]:
    if folder.is_dir() and not (folder / "manifest").exists():
        raise _Damaged("it has no manifest, so that it was not written by this class, or not completely")
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(folder / "manifest", args=cast(Any, ocp.args.JsonRestore)())
        manifest = found["manifest"]
        intact = _digest(manifest) == found["crc32"]
    except Exception as error:
        raise _Damaged(f"its manifest cannot be read: {_first_line(error)}") from error
    if not intact:
        raise _Damaged("the bytes of its manifest are not those that were written")
    if manifest["format"] != _FORMAT:
        raise ValueError(
            f"The checkpoint {folder} must have a manifest of format {_FORMAT}, got {manifest['format']}; "
            f"it was written by adaptive_optax {manifest['versions'].get('adaptive_optax')}."
        )
    return manifest


def _restore_arguments(x: Any) -> Any:
    """How orbax reads a leaf: onto devices if it has a place, into memory otherwise."""
    place = _place(x)
    if place is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    shape = jax.eval_shape(jax.random.key_data, x).shape if _is_key(x) else x.shape
    return ocp.ArrayRestoreArgs(sharding=place, global_shape=shape)


def _place(x: Any) -> Any:
    if isinstance(x, jax.Array) and not getattr(x, "committed", True):
        return None
    return getattr(x, "sharding", None)


def _placed(read: Any, x: Any) -> Any:
    """What was read, as the kind of array that `x` is."""
    if isinstance(x, np.ndarray | np.generic):
        return (
            np.asarray(read, x.dtype)[()] if isinstance(x, np.generic) else read.astype(x.dtype, copy=False)
        )
    if isinstance(read, jax.Array):
        array = read
    elif (place := _place(x)) is None:
        array = jnp.asarray(read)
    else:
        read = np.asarray(read, x.dtype)
        array = jax.make_array_from_callback(read.shape, place, lambda index: read[index])
    if not _is_key(x):
        return array
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), x)
    return jax.random.wrap_key_data(array, impl=kinds[0])


def _empty(x: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        return np.zeros(x.shape, x.dtype)
    if isinstance(x, jax.Array):
        return x
    place = _place(x)
    zeros = jnp.zeros(x.shape, x.dtype)
    return zeros if place is None else jax.device_put(zeros, place)


def _versions() -> dict[str, str]:
    found = {"adaptive_optax": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _errno_of(error: BaseException | None) -> int | None:
    """The system's error number behind an error, which TensorStore only mentions."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error)):
            return int(found[1] or found[2])
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:200].rstrip(".")

"""Finds the place in the user's own code where an error arose, for the sentence that reports it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

# Everything installed, and this package wherever it is.
_NOT_THE_USERS = tuple(
    str(Path(path).resolve())
    for path in (
        Path(__file__).parents[1],
        *(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)


def described(error: BaseException) -> str:
    """Describes an error in one line: its type, its message, and the user's file and line."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, SyntaxError):  # has its own file and line, which str(error) repeats
        said, place = error.msg, (error.filename, error.lineno)
    else:
        place = _place(error)
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if place is None or place[0] is None:
        return text
    path = place[0].removeprefix(os.getcwd() + os.sep)
    return f"{text.rstrip('.')} ({path}, line {place[1]})"


def _place(error: BaseException) -> tuple[str, int | None] | None:
    """The innermost file and line of the user's code, if any."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = frame.filename
        if not path.startswith("<") and not str(Path(path).resolve()).startswith(_NOT_THE_USERS):
            return path, frame.lineno
    return None

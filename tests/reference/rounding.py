"""Rounding to bfloat16 and float16, and Kahan's summation, in NumPy with the dtypes of ml_dtypes.

Unlike the other references this one computes in float32, not float64: what is rounded when is the subject.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def nearest(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Rounds float32 to nearest, ties to even, and returns float32; beyond the range it is infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def neighbours(x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The finite numbers of a dtype that enclose x, as float32; twice x where it is one of them."""
    x = np.asarray(x, np.float32)
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    close = np.clip(nearest(x, dtype), -largest, largest)
    narrow = close.astype(dtype)
    with np.errstate(over="ignore"):
        below = np.nextafter(narrow, np.asarray(-np.inf, dtype)).astype(np.float32)
        above = np.nextafter(narrow, np.asarray(np.inf, dtype)).astype(np.float32)
    low, high = np.where(close > x, below, close), np.where(close < x, above, close)
    return np.clip(low, -largest, largest), np.clip(high, -largest, largest)


def unit(x: np.ndarray) -> np.ndarray:
    """The distance from |x| to the next larger number of its dtype, as float32."""
    magnitude = np.abs(x)
    above = np.nextafter(magnitude, np.asarray(np.inf, x.dtype))
    return above.astype(np.float32) - magnitude.astype(np.float32)


def kahan_step(p: np.ndarray, c: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds u to the pair (p, c) (Zamirai et al. 2020, algorithm 1).

    y = u + c, p' = round(p + y), c' = round((p - p') + y).
    """
    dtype = p.dtype
    p, c, u = (np.asarray(x, np.float32) for x in (p, c, u))
    y = u + c
    new = nearest(p + y, dtype)
    return new.astype(dtype), nearest((p - new) + y, dtype).astype(dtype)

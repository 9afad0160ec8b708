"""Rounding to 16 and to 8 bits, written out from its definitions.

A number x between neighbours a <= x <= b of a grid is rounded without bias if it becomes b with probability
(x - a) / (b - a) and a otherwise. Its expectation is then x and its variance

    (x - a)(b - x)                                                                        (1)

(Gupta et al. 2015, section 3). A moving average v_t = round(b v_{t-1} + (1 - b) q_t) that is kept rounded is
linear in its past but for the roundings, whose errors have expectation 0 whatever came before. Hence E[v_t]
is the average that is not rounded, and the errors of different steps are uncorrelated:

    Var[v_t] = b^2 Var[v_{t-1}] + E[(x_t - a_t)(b_t - x_t)],   x_t = b v_{t-1} + (1 - b) q_t   (2)

The 8-bit maps, for values over the largest magnitude of their block. Signed, codes c = 2^i + j:

    e_c = 10^(i-6) (0.1 + 0.9 (j + 1) / 2^i),   i = 0 .. 6,  j = 0 .. 2^i - 1;   e_0 = 0   (3)

(the dynamic map of Dettmers et al. 2022, section 2, with entries at the ends of their cells). Second moments,
by their roots, codes c = 1 .. 255:

    e_c = (2^-d)^2,   d = 3 n / 128 for n = 255 - c <= 148,   d = 3 148 / 128 + 5 (n - 148) / 32 beyond  (4)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The entries of a grid at or next to numbers, below and above."""

    below: np.ndarray
    above: np.ndarray

    def gap(self) -> np.ndarray:
        return self.above - self.below

    def variance(self, x: np.ndarray) -> np.ndarray:
        """Equation (1)."""
        return (x - self.below) * (self.above - x)


def signed_entries() -> np.ndarray:
    """Equation (3) for codes 0 .. 127."""
    return np.array(
        [0.0] + [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 1) / 2**i) for i in range(7) for j in range(2**i)]
    )


def root_entries() -> np.ndarray:
    """Equation (4) for codes 1 .. 255."""
    n = 255 - np.arange(1, 256)
    return 4.0 ** -np.where(n <= 148, 3 * n / 128, 3 * 148 / 128 + 5 * (n - 148) / 32)


def bfloat16_neighbours(x: np.ndarray) -> Neighbours:
    """Those in bfloat16: seven binary digits behind the leading one, down to the exponent -126."""
    x = np.asarray(x, np.float64)
    spacing = 2.0 ** (np.frexp(np.maximum(np.abs(x), 2.0**-126))[1] - 1 - 7)
    return Neighbours(np.floor(x / spacing) * spacing, np.ceil(x / spacing) * spacing)


def block_largest(x: np.ndarray, block_size: int) -> np.ndarray:
    """The largest magnitude in the block of each value; blocks run along the last axis."""
    x = np.abs(np.asarray(x, np.float64))
    starts = np.arange(0, x.shape[-1], block_size)
    largest = np.maximum.reduceat(x, starts, axis=-1)
    return np.repeat(largest, block_size, axis=-1)[..., : x.shape[-1]]


def int8_neighbours(x: np.ndarray, role: str, block_size: int) -> Neighbours:
    """Those on the 8-bit maps; below the smallest entry of (4) both are it."""
    x = np.asarray(x, np.float64)
    largest = block_largest(x, block_size)
    ratio = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0)
    entries = root_entries() if role == "nu" else signed_entries()
    entries = entries if role == "nu" else np.concatenate([-entries[:0:-1], entries])
    # A value that is an entry but for float32's rounding has that entry for a neighbour on both sides.
    below = np.clip(np.searchsorted(entries, ratio, side="right") - 1, 0, len(entries) - 1)
    above = np.clip(below + (ratio > entries[below]), 0, len(entries) - 1)
    return Neighbours(entries[below] * largest, entries[above] * largest)


def predicted_variance(values: np.ndarray, squares: np.ndarray, decay: float, neighbours) -> np.ndarray:
    """Equation (2) along the paths `values` (step, ...) that a rounded average of `squares` has taken.

    Args:
        values: v_0, v_1, ..., v_T.
        squares: q_1, ..., q_T.
        decay: b.
        neighbours: The grid.

    Returns:
        The sum over the path's steps, for each coordinate. Its mean over coordinates of one kind estimates
        their variance.
    """
    steps = len(squares)
    total = np.zeros(values.shape[1:])
    for start in range(0, steps, 500):  # not all at once, for memory
        chunk = slice(start, min(start + 500, steps))
        x = decay * np.float64(values[chunk]) + (1 - decay) * np.float64(squares[chunk])
        shrunk = decay ** (2.0 * (steps - 1 - np.arange(steps)[chunk]))
        total += np.tensordot(shrunk, np.maximum(neighbours(x).variance(x), 0), axes=1)
    return total

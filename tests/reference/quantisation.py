"""Rounding to 16 and to 8 bits, written out from its definitions.

A number x between neighbours a <= x <= b of a grid is rounded without bias if it becomes b with probability
(x - a) / (b - a) and a otherwise. Its expectation is then x and its variance

    (x - a)(b - x)                                                                        (1)

(Gupta et al. 2015, section 3). A moving average v_t = round(b v_{t-1} + (1 - b) q_t) that is kept rounded is
linear in its past but for the roundings, whose errors have expectation 0 whatever came before. Hence E[v_t]
is the average that is not rounded, and the errors of different steps are uncorrelated:

    Var[v_t] = b^2 Var[v_{t-1}] + E[(x_t - a_t)(b_t - x_t)],   x_t = b v_{t-1} + (1 - b) q_t   (2)

Equations (3) to (7) are those of `Int8`, with l(2^k (1 + f)) = k + f, a logarithm with linear pieces, and its
inverse p. A block has a scale s, its largest magnitude rounded up: to 4 binary digits behind the leading one
if the values are signed, to 2 for second moments.

Signed values, with a curvature L = l(1 + g), are decoded from y in -127.5 .. 127.5 by

    D(y) = sign(y) s (p(|y| L / 127) - 1) / g                                              (3)

With dither, y is what is sent plus a number uniform in (-1/2, 1/2), so what comes back is on average

    E(y) = the integral of D from y - 1/2 to y + 1/2                                       (4)

and x has to be sent as the y with E(y) = x. With d_i = l(max |x|) - l(|x_i|) over the values of the block
that are not 0,

    L = log2(1.5 2^(3/4 mean(d)) + 2^(3/4 max(d)) / n)^2 / 3,                              (5)

to the nearest of 1/8, 3/16, 1/4, 3/8, 1/2, ..., with l for log2 and p for powers of two.

Second moments become entries of a lattice,

    e_c = p(l(s) - (255 - c) D),   c = 1 .. 255                                            (6)

where the spacing D is the first of 2^-10, 1.125 2^-10, 1.25 2^-10, ... for which 254 D reaches down to the
smallest value that is not 0, from s or, if s is the largest value itself, from a quarter of an octave above
it                                                                                        (7)

Up to format 2 there were other maps. Signed, codes c = 2^i + j:

    e_c = 10^(i-6) (0.1 + 0.9 (j + 1) / 2^i),   i = 0 .. 6,  j = 0 .. 2^i - 1;   e_0 = 0   (8)

(the dynamic map of Dettmers et al. 2022, section 2, with entries at the ends of their cells). Second moments,
by their roots, codes c = 1 .. 255:

    e_c = (2^-d)^2,   d = 3 n / 128 for n = 255 - c <= 148,   d = 3 148 / 128 + 5 (n - 148) / 32 beyond  (9)
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
    """Equation (8) for codes 0 .. 127."""
    return np.array(
        [0.0] + [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 1) / 2**i) for i in range(7) for j in range(2**i)]
    )


def root_entries() -> np.ndarray:
    """Equation (9) for codes 1 .. 255."""
    n = 255 - np.arange(1, 256)
    return 4.0 ** -np.where(n <= 148, 3 * n / 128, 3 * 148 / 128 + 5 * (n - 148) / 32)


def bfloat16_neighbours(x: np.ndarray) -> Neighbours:
    """Those in bfloat16: seven binary digits behind the leading one, down to the exponent -126."""
    x = np.asarray(x, np.float64)
    spacing = 2.0 ** (np.frexp(np.maximum(np.abs(x), 2.0**-126))[1] - 1 - 7)
    return Neighbours(np.floor(x / spacing) * spacing, np.ceil(x / spacing) * spacing)


def logarithm(x: np.ndarray) -> np.ndarray:
    """l of positive numbers."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return exponent - 1 + (2 * fraction - 1)


def power(x: np.ndarray) -> np.ndarray:
    """p."""
    return np.ldexp(1 + x - np.floor(x), np.floor(x).astype(int))


def over_blocks(f, x: np.ndarray, block_size: int) -> np.ndarray:
    """Applies f to each block along the last axis, and gives each value the result of its block."""
    rows = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    found = np.empty(rows.shape)
    for row, into in zip(rows, found, strict=True):
        for start in range(0, row.size, block_size):
            into[start : start + block_size] = f(row[start : start + block_size])
    return found.reshape(np.shape(x))


def scale_of(block: np.ndarray, digits: int) -> float:
    largest = np.max(np.abs(block))
    return power(np.ceil(2**digits * logarithm(largest)) / 2**digits) if largest > 0 else 0.0


def signed_scale(block: np.ndarray) -> float:
    return scale_of(block, 4)


def choices(first: float, digits: int) -> np.ndarray:
    """What a header can choose from: eight octaves from the first on."""
    return np.array([first * 2.0**i * (1 + j / 2**digits) for i in range(8) for j in range(2**digits)])


CURVATURES, SPACINGS = choices(2.0**-3, 1), choices(2.0**-10, 3)


def curvature_of(block: np.ndarray) -> float:
    """Equation (5)."""
    depths = logarithm(np.abs(block[block != 0]))
    depths = depths.max() - depths
    weight = 1.5 * power(0.75 * depths.mean()) + power(0.75 * depths.max()) / depths.size
    return float(CURVATURES[np.argmin(np.abs(CURVATURES - logarithm(weight) ** 2 / 3))])


def spacing_of(block: np.ndarray) -> float:
    """Equation (7)."""
    top = np.floor(4 * logarithm(block.max()) + 1) / 4
    reach = (top - logarithm(block[block > 0].min())) / 254
    return float(SPACINGS[min(np.searchsorted(SPACINGS, reach), SPACINGS.size - 1)])


def signed_value(y: np.ndarray, scale: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Equation (3)."""
    return np.sign(y) * scale * (power(np.abs(y) * curvature / 127) - 1) / (power(curvature) - 1)


def mean_value(y: np.ndarray, scale: np.ndarray, curvature: np.ndarray, points: int = 500) -> np.ndarray:
    """Equation (4), by the rule of midpoints."""
    offsets = (np.arange(points) + 0.5) / points - 0.5
    return np.mean([signed_value(y + offset, scale, curvature) for offset in offsets], axis=0)


def int8_neighbours(x: np.ndarray, block_size: int) -> Neighbours:
    """Those of second moments, equation (6)."""
    x = np.asarray(x, np.float64)
    scale = over_blocks(lambda block: scale_of(block, 2), x, block_size)
    spacing = over_blocks(spacing_of, x, block_size)
    with np.errstate(divide="ignore"):
        steps = (logarithm(scale) - logarithm(x)) / spacing
    # A value that is an entry but for float32's rounding has that entry for a neighbour on both sides.
    steps = np.where(np.abs(steps - np.round(steps)) < 1e-4, np.round(steps), steps)
    below, above = (
        power(logarithm(scale) - np.minimum(n, 254) * spacing) for n in (np.ceil(steps), np.floor(steps))
    )
    return Neighbours(np.where(x > 0, below, 0), np.where(x > 0, above, 0))


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

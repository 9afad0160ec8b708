"""Seeds until it is decided: a plan of looks at a growing sample, and the level of each look's t-test.

After look k with n_k seeds an arm is tested at the nominal level a_k; a decided arm stops, an undecided one
gets more seeds. The levels solve, one look after the other,

    P(p_k <= a_k, and p_j > a_j for all j < k) = alpha (f_k - f_{k-1}),    f_0 = 0, f_K = 1,

for normal differences without an effect: look k spends the share f_k - f_{k-1} of alpha (Lan and DeMets 1983,
Biometrika 70:659), so that all looks together err with probability alpha. Levels of Brownian motion would not
do: t-statistics of 5 and 6 seeds depend on each other less, and 5.3 % would err instead of 5 %. The joint
distribution of the t-statistics is known exactly (Jennison and Turnbull 1991, Biometrika 78:133, integrate it
too). With S the sum of n differences and Q the sum of their squares, let w = S / sqrt(Q). Then t is an
increasing function of w, and from n to n + m seeds

    w_{n+m} = sqrt(B) w_n + sqrt(1 - B) V,    B ~ Beta(n/2, m/2),    V = w_m of the m new seeds,

with w_n, B and V independent, because Q is independent of w_n (Basu's theorem). So w is a Markov chain, and
the probability above is a recursion of one-dimensional integrals.

Several arms: p_k / (a_k / alpha) at any look is at least the smallest such ratio over all looks, and this is
a p-value. Holm's procedure on p-values that are too large rejects no more than on the smallest ones, so its
error over arms and looks stays below alpha whatever makes an arm stop (Ye et al. 2013, Stat. Med. 32:1112).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import interpolate, linalg, optimize, special

from adaptive_optax._core.checks import check_integer

MOST_SEEDS = 100_000
LOOKS_PER_DOUBLING = 3
EARLY, DECLINE, LATE = 0.25, 0.6, 8  # of `Sequential.spent`


@dataclasses.dataclass(frozen=True)
class Sequential:
    r"""A plan of seeds: looks after a growing number of them, until every arm is decided.

    Each look has about a quarter more seeds than the one before. By look k of K, with $n_k$ seeds, the share

    $$
    f_k = (1 - 0.6^k) / 4 + \tfrac{3}{4} (n_k / \text{most})^8, \qquad f_K = 1,
    $$

    of alpha is spent: a tenth at the first look, so that a large effect is found at once, and most of it at
    the end, so that little power is lost. For normal differences with the standardised effect d = mean /
    standard deviation and one arm, the default plan's expected number of seeds, and the chance that it finds
    a difference, beside that of 32 seeds without looks (other plans: the site's page "Benchmarks", from
    `python -m benchmarks --suite sequential`):

    | d | 0 | 0.25 | 0.4 | 0.5 | 0.75 | 1 | 2 |
    |---|---|---|---|---|---|---|---|
    | expected seeds | 31.7 | 31.0 | 29.4 | 27.7 | 21.6 | 15.9 | 6.9 |
    | found, % | 5.0 | 25.6 | 55.8 | 75.4 | 97.9 | 100.0 | 100.0 |
    | of 32 seeds, % | 5.0 | 27.8 | 59.2 | 78.2 | 98.4 | 100.0 | 100.0 |

    A plan cannot have everything: with a power at d = 0.5 within 3 points of that of 32 seeds, no rule that
    looks at the t-statistics after every seed from the fifth on needs fewer than 6.6 seeds at d = 2.

    Args:
        first: Seeds at the first look, from 5: with fewer, the level of a first look (0.005) needs a t above
            7, which even an effect of d = 2 rarely reaches.
        most: Seeds at the last look, from `first` to 100,000. An arm that is then undecided stays so: a plan
            cannot be extended, and its folder takes no more seeds. Another study, with another base seed and
            folder, may decide; so choose `most` as large as you can afford.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> Sequential().looks
        (5, 6, 8, 10, 13, 16, 20, 25, 32)
    """

    first: int = 5
    most: int = 32

    def __post_init__(self) -> None:
        check_integer("first", self.first, f"[5, {MOST_SEEDS}]")
        check_integer("most", self.most, f"[{int(self.first)}, {MOST_SEEDS}]", "first is the least")
        object.__setattr__(self, "first", int(self.first))
        object.__setattr__(self, "most", int(self.most))

    @property
    def looks(self) -> tuple[int, ...]:
        """The number of seeds at each look, ascending from `first` to `most`."""
        growth = self.most / self.first
        intervals = math.ceil(LOOKS_PER_DOUBLING * math.log2(growth) - 0.5)
        sizes = {round(self.first * growth ** (k / intervals)) for k in range(1, intervals)}
        return tuple(sorted(sizes | {self.first, self.most}))

    @property
    def spent(self) -> tuple[float, ...]:
        """The share of alpha that is spent by each look."""
        early = (
            EARLY * (1 - DECLINE**k) + (1 - EARLY) * (n / self.most) ** LATE
            for k, n in enumerate(self.looks, 1)
        )
        return (*list(early)[:-1], 1.0)

    def levels(self, alpha: float, *, sides: int = 2) -> tuple[float, ...]:
        """The nominal level of each look's t-test: the p-value at which it rejects.

        Args:
            alpha: The error rate of all looks together.
            sides: 2 for a two-sided test, 1 for a one-sided one.
        """
        return nominal_levels(self.looks, self.spent, alpha, sides)


# ---- The joint distribution of t-statistics ----

KNOTS = 48  # at which the distribution function of w between the boundaries is computed
CELLS = 400  # in which its splines then hold the distribution
NODES, SMOOTH_NODES = 24, 10  # of Gaussian quadrature over V and over B
FINE = 4001  # evenly spaced points at which a distribution function is tabulated
FEW = 8  # from so many new seeds on V has a smooth density, and the quadrature is over B instead of V
FAR = 6.0  # |w| beyond which no new seeds lead a one-sided test across its boundary


@functools.lru_cache(maxsize=256)
def nominal_levels(
    looks: tuple[int, ...], spent: tuple[float, ...], alpha: float, sides: int
) -> tuple[float, ...]:
    """The nominal levels of t-tests of normal differences that spend `alpha * spent[k]` by look k.

    Args:
        looks: The number of seeds at each look, ascending, at least 2.
        spent: The share of alpha that is spent by each look, ascending to 1.
        alpha: The error rate of all looks together.
        sides: 2 or 1.
    """
    levels, undecided = [alpha * spent[0]], _Undecided.at_first(looks[0], alpha * spent[0], sides)
    for k, now in enumerate(looks[1:], 1):
        target = alpha * (spent[k] - spent[k - 1])
        levels.append(_level(undecided, now, target, alpha * spent[k]))
        if now != looks[-1]:
            undecided = undecided.at_next(now, levels[-1])
    return tuple(levels)


def _level(undecided: _Undecided, seeds: int, target: float, most: float) -> float:
    """The nominal level that spends `target`: more than that, and less than `most`, spent so far."""

    def excess(log_level: float) -> float:
        boundary = _w_of_level(math.exp(log_level), seeds, undecided.sides)
        return float(undecided.above(np.array([boundary]), seeds)[0]) / target - 1

    low, high = math.log(target), math.log(min(1.05 * most, 1 - 1e-9))
    if excess(low) >= 0 or excess(high) <= 0:
        return target  # the looks all but exclude each other: Bonferroni's level, which is always safe
    level: Any = optimize.brentq(excess, low, high, xtol=1e-6)
    return math.exp(level)


class _Undecided(NamedTuple):
    """The distribution of w at a look where nothing has been rejected, that of |w| if the test is two-sided.

    Attributes:
        seeds: The number of seeds.
        sides: 2 or 1.
        w: The centres of the cells.
        mass: The probability of each cell; the sum is that of no rejection so far.
    """

    seeds: int
    sides: int
    w: np.ndarray
    mass: np.ndarray

    @classmethod
    def at_first(cls, seeds: int, level: float, sides: int) -> _Undecided:
        """After the first look."""
        knots = _knots(seeds, level, sides)
        return cls._of(seeds, sides, knots, 1 - sides * _tail(knots, seeds))

    def at_next(self, seeds: int, level: float) -> _Undecided:
        """After the next look."""
        knots = _knots(seeds, level, self.sides)
        return self._of(seeds, self.sides, knots, self.mass.sum() - self.above(knots, seeds))

    @classmethod
    def _of(cls, seeds: int, sides: int, knots: np.ndarray, below: np.ndarray) -> _Undecided:
        edges = np.linspace(knots[0], knots[-1], CELLS + 1)
        below = interpolate.CubicSpline(knots, below)(edges)
        below[0] = 0.0  # what is below the first cell counts there
        return cls(seeds, sides, (edges[1:] + edges[:-1]) / 2, np.diff(below))

    def above(self, boundary: np.ndarray, seeds: int) -> np.ndarray:
        """The probability that nothing was rejected so far, and w (or |w|) is above each boundary next."""
        found = _transition(boundary[:, None], self.w, self.seeds, seeds - self.seeds)
        if self.sides == 2:
            found = found + _transition(boundary[:, None], -self.w, self.seeds, seeds - self.seeds)
        return found @ self.mass


def _transition(boundary: np.ndarray, w: np.ndarray, seeds: int, more: int) -> np.ndarray:
    """P(w_{n+m} > boundary | w_n = w) with n = `seeds` and m = `more`."""
    total = np.zeros(np.broadcast_shapes(boundary.shape, w.shape))
    if more >= FEW:
        tail, far = _tail_table(more)
        for share, weight in zip(*_beta_quadrature(seeds / 2, more / 2, SMOOTH_NODES), strict=True):
            needed = (boundary - math.sqrt(share) * w) / math.sqrt(1 - share)
            total += weight * _lookup(needed, tail, -far, far)
        return total
    # w cos(x) + V sin(x) = size cos(x - direction) with B = cos(x)**2: it exceeds the boundary where x is
    # within `reach` of the direction, modulo a turn.
    below = _angle_table(seeds, more)
    cosine, weights = _beta_quadrature((more - 1) / 2, (more - 1) / 2, NODES)
    for v, weight in zip(math.sqrt(more) * (2 * cosine - 1), weights, strict=True):
        size, direction = np.hypot(w, v), np.arctan2(v, w)
        reach = np.arccos(np.clip(boundary / size, -1, 1))
        start, end, again = (
            _lookup(angle, below, 0, np.pi / 2)
            for angle in (direction - reach, direction + reach, direction + 2 * np.pi - reach)
        )
        total += weight * (end - start + 1 - again)
    return total


@functools.lru_cache(maxsize=64)
def _tail_table(seeds: int) -> tuple[np.ndarray, float]:
    """`_tail` at evenly spaced points, from minus the returned number to plus it."""
    far = min(math.sqrt(seeds), 12.0)
    return _tail(np.linspace(-far, far, FINE), seeds), far


@functools.lru_cache(maxsize=64)
def _angle_table(seeds: int, more: int) -> np.ndarray:
    """The distribution function of the angle x at evenly spaced points from 0 to pi / 2."""
    x = np.linspace(0, np.pi / 2, FINE)
    return special.betainc(more / 2, seeds / 2, np.sin(x) ** 2)


def _lookup(x: np.ndarray, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Interpolates values at evenly spaced points from `low` to `high`; much faster than `np.interp`."""
    last = len(values) - 1
    place = np.clip((x - low) * (last / (high - low)), 0, last)
    index = np.minimum(place.astype(np.intp), last - 1)
    return values[index] + (place - index) * np.diff(values)[index]


@functools.lru_cache(maxsize=64)
def _beta_quadrature(a: float, b: float, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1] and weights of Gaussian quadrature for the distribution Beta(a, b).

    Golub and Welsch 1969: from the recurrence of the Jacobi polynomials, in which large a and b do not
    overflow. Beta(0, 0) is a fair coin.
    """
    if a == b == 0:
        return np.array([0.0, 1.0]), np.array([0.5, 0.5])
    k = np.arange(2, nodes)
    s = 2 * k + a + b - 2
    first, second = (b - a) / (a + b), (b - a) * (a + b - 2) / ((a + b) * (a + b + 2))
    diagonal = np.concatenate([[first, second], (b - a) * (a + b - 2) / (s * (s + 2))])
    squares = 4 * k * (k + a - 1) * (k + b - 1) * (k + a + b - 2) / (s**2 * (s + 1) * (s - 1))
    squares = np.append(4 * a * b / ((a + b) ** 2 * (a + b + 1)), squares)
    cosines, vectors = linalg.eigh_tridiagonal(diagonal, np.sqrt(squares))
    return (1 - cosines) / 2, vectors[0] ** 2


def _tail(w: np.ndarray, seeds: int) -> np.ndarray:
    """P(w_n > w) without an effect."""
    share = np.clip(w * w / seeds, 0, 1)
    half = special.betaincc(0.5, (seeds - 1) / 2, share) / 2
    return np.where(w > 0, half, 1 - half)


def _w_of_level(level: float, seeds: int, sides: int) -> float:
    t = -float(special.stdtrit(seeds - 1, level / sides))
    return math.sqrt(seeds / (seeds - 1 + t * t)) * t


def _knots(seeds: int, level: float, sides: int) -> np.ndarray:
    """Points from one boundary of a test to the other."""
    start = 0.0 if sides == 2 else -min(FAR, math.sqrt(seeds))
    return np.linspace(start, _w_of_level(level, seeds, sides), KNOTS)
